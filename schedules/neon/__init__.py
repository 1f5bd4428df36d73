"""Kernels for NEON (ARMv7-A and AArch64), selected by capability. See README.md of this folder."""

from ..template import Template
from .matrix import matrix_kernel

NEON_TEMPLATES = (Template("neon.matrix", matrix_kernel),)
