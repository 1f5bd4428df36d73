"""Kernels for x86-64, selected by capability. See the README of `schedules/`."""

from .depthwise import depthwise_space, schedule_depthwise
from .matrix import matrix_space, schedule_matrix

TEMPLATES = (
    ("x86.depthwise", schedule_depthwise, depthwise_space),
    ("x86.matrix", schedule_matrix, matrix_space),
)
