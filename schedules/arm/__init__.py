"""Kernels for Arm cores, selected by capability. See README.md of this folder."""

from .depthwise import depthwise_space, schedule_depthwise
from .matrix import matrix_space, schedule_matrix

DSP_TEMPLATES = (
    ("arm.depthwise", schedule_depthwise, depthwise_space),
    ("arm.matrix", schedule_matrix, matrix_space),
)
