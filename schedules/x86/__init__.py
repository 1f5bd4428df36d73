"""Kernels for x86-64, selected by capability. See the README of `schedules/`."""

from .depthwise import schedule_depthwise
from .matrix import schedule_matrix

TEMPLATES = (("x86.depthwise", schedule_depthwise), ("x86.matrix", schedule_matrix))
