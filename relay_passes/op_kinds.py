"""Which Relax operators have an integer form, and what kind of region each belongs to."""

from __future__ import annotations

ANCHORS = {
    "relax.nn.conv1d": "conv1d",
    "relax.nn.conv2d": "conv2d",
    "relax.nn.conv1d_transpose": "conv1d_transpose",
    "relax.nn.conv2d_transpose": "conv2d_transpose",
    "relax.matmul": "matmul",
}

# Integers pass through unchanged: the output has its input's scale and zero point.
MOVEMENT = {
    "relax.nn.max_pool1d",
    "relax.nn.max_pool2d",
    "relax.nn.max_pool3d",
    "relax.reshape",
    "relax.permute_dims",
    "relax.flatten",
    "relax.squeeze",
    "relax.expand_dims",
    "relax.broadcast_to",
    "relax.concat",
    "relax.split",
    "relax.strided_slice",
    "relax.nn.pad",
    "relax.image.resize2d",
    "relax.tile",
    "relax.repeat",
    "relax.flip",
    "relax.take",
}

POOLS = {
    "relax.nn.avg_pool1d",
    "relax.nn.avg_pool2d",
    "relax.nn.adaptive_avg_pool1d",
    "relax.nn.adaptive_avg_pool2d",
    "relax.mean",
}

NORMALISERS = {"relax.nn.softmax", "relax.nn.layer_norm"}

# A function of one number: computed by a table of all its inputs.
UNARY = {
    "relax.nn.relu",
    "relax.nn.relu6",
    "relax.clip",
    "relax.nn.leakyrelu",
    "relax.nn.silu",
    "relax.nn.gelu",
    "relax.nn.gelu_tanh",
    "relax.nn.softplus",
    "relax.nn.selu",
    "relax.sigmoid",
    "relax.tanh",
    "relax.exp",
    "relax.log",
    "relax.erf",
    "relax.sqrt",
    "relax.rsqrt",
    "relax.square",
    "relax.negative",
    "relax.abs",
    "relax.floor",
    "relax.ceil",
    "relax.round",
    "relax.sin",
    "relax.cos",
}

# Of two numbers: tables when one is a constant or both come from one tensor.
BINARY = {
    "relax.add",
    "relax.subtract",
    "relax.multiply",
    "relax.divide",
    "relax.maximum",
    "relax.minimum",
    "relax.power",
}

# Of two tensors, with integer kernels.
TENSOR_SUMS = {"relax.add", "relax.subtract"}
TENSOR_BINARY = TENSOR_SUMS | {"relax.multiply"}

CLAMPS = {"relax.nn.relu", "relax.nn.relu6", "relax.clip"}
CONSTANT_CLAMPS = {"relax.maximum", "relax.minimum"}
