"""Kernels for RISC-V with vectors, selected by capability. See README.md of this folder."""

from ..template import Template
from .depthwise import depthwise_kernel
from .matrix import matrix_kernel
from .sparse import sparse_kernel

RVV_TEMPLATES = (
    Template("riscv.depthwise", depthwise_kernel),
    Template("riscv.matrix", matrix_kernel),
    Template("riscv.sparse", sparse_kernel),
)
