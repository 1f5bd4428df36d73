"""Turn inputs of a module into constants (`--input-value`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax

from ..errors import ModelError
from ..model import INPUT_NAMES_ATTR
from ..relay_passes.ir import array_const, dtype_of, shape_of
from .shapes import unknown_input


def freeze_inputs(
    module: tvm.IRModule, values: Mapping[str, float | np.ndarray] | None
) -> tvm.IRModule:
    """`main` without the named inputs; each becomes its value, broadcast to the input's shape."""
    if not values:
        return module
    main = module["main"]
    labels = [str(name) for name in main.attrs[INPUT_NAMES_ATTR]]
    bound = {}
    for name, value in values.items():
        if name not in labels:
            raise ModelError(unknown_input(name, dict.fromkeys(labels)))
        param = main.params[labels.index(name)]
        try:
            array = np.broadcast_to(np.asarray(value), shape_of(param) or ())
        except ValueError:
            raise ModelError(
                f"the value given for input {name!r} has shape {list(np.shape(value))}; "
                f"the input has {list(shape_of(param) or ())}"
            ) from None
        bound[param.name] = array_const(array.astype(dtype_of(param)))
    module = relax.transform.BindParams("main", bound)(module)
    kept = [name for name in labels if name not in values]
    module["main"] = module["main"].with_attr(INPUT_NAMES_ATTR, kept)
    return module
