"""Kernels for NEON (ARMv7-A and AArch64), selected by capability. See README.md of this folder."""

from ..template import Template
from .depthwise import depthwise_kernel
from .matrix import matrix_kernel
from .sparse import sparse_kernel
from .sparse_bytes import sparse_bytes_kernel

NEON_TEMPLATES = (
    Template("neon.depthwise", depthwise_kernel),
    Template("neon.matrix", matrix_kernel),
    Template("neon.sparse", sparse_kernel),
    Template("neon.sparse_bytes", sparse_bytes_kernel),
)
