"""Kernels for Arm cores, selected by capability. See README.md of this folder."""

from ..template import Template
from .depthwise import depthwise_kernel
from .matrix import matrix_kernel

DSP_TEMPLATES = (
    Template("arm.depthwise", depthwise_kernel),
    Template("arm.matrix", matrix_kernel),
)
