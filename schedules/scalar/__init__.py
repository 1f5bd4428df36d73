"""Kernels for cores without vectors, selected by capability. See README.md of this folder."""

from ..template import Template
from .depthwise import depthwise_kernel
from .matrix import matrix_kernel
from .sparse import sparse_kernel

SCALAR_TEMPLATES = (
    Template("scalar.depthwise", depthwise_kernel),
    Template("scalar.matrix", matrix_kernel),
    Template("scalar.sparse", sparse_kernel),
)
