"""Our errors keep their class when a pass raises them inside TVM.

TVM runs passes behind its foreign-function interface, which hands on an exception by the name of
its class and makes a `RuntimeError` of a name that it does not know.
"""

from __future__ import annotations

import tvm_ffi

from .. import errors


def register_errors() -> None:
    """Make every class of `errors` known to TVM; doing it again changes nothing."""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.TvmCompressError):
            tvm_ffi.register_error(name, value)
