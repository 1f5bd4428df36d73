"""Kernels for cores without vectors, selected by capability. See README.md of this folder."""

from ..template import Template
from .matrix import matrix_kernel

SCALAR_TEMPLATES = (Template("scalar.matrix", matrix_kernel),)
