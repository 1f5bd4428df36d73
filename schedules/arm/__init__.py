"""Kernels for Arm cores, selected by capability. See README.md of this folder."""

from ..template import Template
from .depthwise import depthwise_kernel
from .matrix import matrix_kernel
from .mve_depthwise import depthwise_kernel as mve_depthwise_kernel
from .mve_matrix import matrix_kernel as mve_matrix_kernel
from .mve_sparse import sparse_kernel as mve_sparse_kernel
from .sparse import sparse_kernel

DSP_TEMPLATES = (
    Template("arm.depthwise", depthwise_kernel),
    Template("arm.matrix", matrix_kernel),
    Template("arm.sparse", sparse_kernel),
)

MVE_TEMPLATES = (
    Template("arm.mve_depthwise", mve_depthwise_kernel),
    Template("arm.mve_matrix", mve_matrix_kernel),
    Template("arm.mve_sparse", mve_sparse_kernel),
    Template("arm.matrix", matrix_kernel),  # codes of four bits in groups
    Template("arm.sparse", sparse_kernel),  # unsigned data, windows beyond 16-bit offsets
)
