"""Kernels for x86-64, selected by capability. See the README of `schedules/`."""

from ..sparse import sparse_kernel
from ..template import Template
from .batch_matmul import batch_matmul_kernel
from .depthwise import depthwise_kernel
from .matrix import matrix_kernel
from .nibbles import NAME as NIBBLES
from .nibbles import nibble_kernel
from .sparse_byte_planes import sparse_byte_planes_kernel
from .sparse_bytes import sparse_bytes_kernel
from .sparse_compiled import sparse_compiled_kernel
from .sparse_planes import sparse_planes_kernel
from .sparse_rows import NAME as SPARSE_ROWS
from .sparse_rows import sparse_rows_kernel
from .winograd import winograd_kernel

TEMPLATES = (
    Template("x86.depthwise", depthwise_kernel),
    Template(NIBBLES, nibble_kernel),
    Template("x86.winograd", winograd_kernel),
    Template("x86.matrix", matrix_kernel),
    Template("x86.batch_matmul", batch_matmul_kernel),
    Template("x86.sparse_compiled", sparse_compiled_kernel),
    Template("x86.sparse_planes", sparse_planes_kernel),
    Template("x86.sparse_byte_planes", sparse_byte_planes_kernel),
    Template(SPARSE_ROWS, sparse_rows_kernel),
    Template("sparse", sparse_kernel),
    Template("x86.sparse_bytes", sparse_bytes_kernel),
)
