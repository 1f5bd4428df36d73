"""Kernels for x86-64, selected by capability. See the README of `schedules/`."""

from ...targets import Target
from ..choice import Choice
from ..fused import FusedFunction
from ..sparse import sparse_kernel
from ..sparse_bytes import SparseBytesKernel, sparse_bytes_kernel
from ..template import Template
from .batch_matmul import batch_matmul_kernel
from .depthwise import depthwise_kernel
from .dot import widest_byte_dot
from .matrix import matrix_kernel
from .nibbles import NAME as NIBBLES
from .nibbles import nibble_kernel
from .winograd import winograd_kernel


def _sparse_bytes(
    fused: FusedFunction, target: Target, choice: Choice | None
) -> SparseBytesKernel | None:
    """With vpdpbusd, in the widest registers that have it."""
    return sparse_bytes_kernel(fused, target, choice, widest_byte_dot(target))


TEMPLATES = (
    Template("x86.depthwise", depthwise_kernel),
    Template(NIBBLES, nibble_kernel),
    Template("x86.winograd", winograd_kernel),
    Template("x86.matrix", matrix_kernel),
    Template("x86.batch_matmul", batch_matmul_kernel),
    Template("sparse", sparse_kernel),
    Template("x86.sparse_bytes", _sparse_bytes),
)
