"""Kernels for Arm cores, selected by capability. See README.md of this folder."""

from .matrix import matrix_space, schedule_matrix

DSP_TEMPLATES = (("arm.matrix", schedule_matrix, matrix_space),)
