"""Kernels for x86-64, selected by capability. See the README of `schedules/`."""

from .batch_matmul import batch_matmul_space, schedule_batch_matmul
from .depthwise import depthwise_space, schedule_depthwise
from .matrix import matrix_space, schedule_matrix
from .nibbles import NAME as NIBBLES
from .nibbles import nibble_space, schedule_nibbles
from .winograd import schedule_winograd, winograd_space

TEMPLATES = (
    ("x86.depthwise", schedule_depthwise, depthwise_space),
    (NIBBLES, schedule_nibbles, nibble_space),
    ("x86.winograd", schedule_winograd, winograd_space),
    ("x86.matrix", schedule_matrix, matrix_space),
    ("x86.batch_matmul", schedule_batch_matmul, batch_matmul_space),
)
