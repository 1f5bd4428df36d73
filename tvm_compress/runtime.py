"""Run a compiled artefact with TVM's own Relax VM: arrays by name in, arrays by name out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .errors import ArtefactError, DataError

if TYPE_CHECKING:
    import numpy as np
    from tvm import relax

    from .model import TensorSpec

KernelHook = Callable[[str, bool, tuple[Any, ...]], None]


def _load(library: Path) -> Any:
    """The module in a shared library, also where another file of that name is loaded already."""
    import tvm_ffi

    # The dynamic linker knows what it has loaded by the path that it was given, and nothing is ever
    # unloaded. (TVM's own `load_module` looks behind links.)
    with TemporaryDirectory() as folder:
        link = Path(folder) / library.name
        link.symlink_to(library.resolve())
        return tvm_ffi.load_module(str(link))


class Session:
    """A loaded executable on the local CPU.

    `executable` is what `build.compile_module` returned or the path of an exported shared library.
    `run` takes one array per input, by name, with the model's own shape and dtype.
    """

    def __init__(
        self,
        executable: relax.VMExecutable | Path,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> None:
        import tvm
        from tvm import relax

        if isinstance(executable, Path):
            if not executable.is_file():
                raise ArtefactError(f"{executable}: no such shared library; compress again")
            executable = _load(executable)
        self.inputs = inputs
        self.outputs = outputs
        self._library = executable if hasattr(executable, "imports") else executable.mod
        self._vm = relax.VirtualMachine(executable, tvm.cpu())
        self._main = self._vm["main"]

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference. Raises `DataError` when a name, shape or dtype does not fit the model."""
        result = self._main(*self._tensors(arrays))
        tensors = [result] if hasattr(result, "numpy") else list(result)
        return {
            spec.name: tensor.numpy() for spec, tensor in zip(self.outputs, tensors, strict=True)
        }

    def run_all(self, feeds: Iterable[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """One inference after the other."""
        return [self.run(feed) for feed in feeds]

    def bind(self, arrays: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """A function that runs one inference on `arrays`, for timing: it copies nothing."""
        tensors = self._tensors(arrays)
        return lambda: self._main(*tensors)

    def timer(self, symbol: str, calls: int, turns: int) -> Callable[..., list[float]]:
        """A function from a kernel's arguments to the seconds of one call, for each of `turns`:
        the mean of `calls` calls in a row, timed outside of Python."""
        import tvm

        for module in (self._library, *self._library.imports):
            if module.implements_function(symbol):
                evaluator = module.time_evaluator(symbol, tvm.cpu(), calls, turns)
                return lambda *arguments: list(evaluator(*arguments).results)
        raise ArtefactError(f"the library has no kernel {symbol!r}; compress again")

    def _tensors(self, arrays: Mapping[str, np.ndarray]) -> list[Any]:
        import numpy as np
        import tvm

        missing = [spec.name for spec in self.inputs if spec.name not in arrays]
        if missing:
            raise DataError(
                f"input {missing[0]!r} is missing; the model takes "
                + ", ".join(repr(spec.name) for spec in self.inputs)
            )
        values = []
        for spec in self.inputs:
            array = np.asarray(arrays[spec.name])
            if tuple(array.shape) != spec.shape or str(array.dtype) != spec.dtype:
                raise DataError(
                    f"input {spec.name!r} is {array.dtype}{list(array.shape)}; the model takes "
                    f"{spec.dtype}{list(spec.shape)}"
                )
            # Not ascontiguousarray, which turns a scalar into [1].
            values.append(tvm.runtime.tensor(np.asarray(array, order="C")))
        return values

    def observe(self, hook: KernelHook | None) -> None:
        """Call `hook(symbol, before, arguments)` around every kernel call; `None` stops.

        Kernels write their result into the last argument (destination passing), so after a call
        the hook can read every tensor that the shipped code produced.
        """
        if hook is None:
            self._vm.set_instrument(None)
            return

        def instrument(_func: Any, symbol: str, before: bool, _ret: Any, *args: Any) -> None:
            hook(symbol, bool(before), args)

        self._vm.set_instrument(instrument)
