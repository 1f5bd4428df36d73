"""Kernels for x86-64, selected by capability. See the README of `schedules/`."""

from .matrix import schedule_matrix

TEMPLATES = (("x86.matrix", schedule_matrix),)
