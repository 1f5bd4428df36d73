"""A worker of tuning some of whose candidates misbehave, as the variable FAULTS says: JSON,
choice as text => what happens."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvm_compress.startup import start_without_torch

start_without_torch()

from tvm_compress.bare.compile import CompiledKernel  # noqa: E402 - imports TVM
from tvm_compress.schedules.choice import choice_to_json  # noqa: E402 - imports TVM
from tvm_compress.tuning import worker  # noqa: E402

FAULTS: dict[str, str] = json.loads(os.environ["FAULTS"])
real_build, real_measure = worker.build, worker.measure
real_build_bare = worker.build_bare


def build(
    task: str, choice: Mapping[str, int] | None, output: str, target: Mapping[str, Any]
) -> dict[str, Any]:
    """The real one, but for the faults of compilers."""
    fault = FAULTS.get(choice_to_json(choice), "") if choice is not None else ""
    if fault == "does not compile":
        raise RuntimeError("LLVM ERROR: out of registers\nwhile compiling")
    if fault == "compiler crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    Path(output + ".fault").write_text(fault)
    if fault in ("wrong", "lucky"):
        return _build_zeros(task, output)
    return real_build(task, choice, output, target)


def build_bare(
    task: str, choice: Mapping[str, int], symbol: str, output: str, target: Mapping[str, Any]
) -> dict[str, Any]:
    """The real one, but for kernels that crash or do nothing."""
    bodies = {"crashes": "__builtin_trap();", "does nothing": ""}
    fault = FAULTS.get(choice_to_json(choice), "")
    answer = real_build_bare(task, choice, symbol, output, target)
    if fault:
        source = Path(output + ".c")
        source.write_text(f"void {symbol}(void) {{ {bodies[fault]} }}\n")
        command = [target["compiler"], *target["compiler_flags"], "-c", source, "-o", output + ".o"]
        subprocess.run(command, check=True)
        kernel = CompiledKernel.from_bytes(Path(output).read_bytes())
        replaced = dataclasses.replace(kernel, code=Path(output + ".o").read_bytes())
        Path(output).write_bytes(replaced.to_bytes())
    return answer


def _build_zeros(task: str, output: str) -> dict[str, Any]:
    """A kernel of the same arguments that writes zeros, quickly."""
    import tvm
    from tvm import te, tirx

    params = worker._function(task).params
    inputs = [te.placeholder(p.shape, str(p.dtype), name=p.name) for p in params[:-1]]
    last = params[-1]
    out = te.compute(last.shape, lambda *_: tirx.const(0, str(last.dtype)), name="out")
    func = te.create_prim_func([*inputs, out]).with_attr("global_symbol", worker.KERNEL)
    tvm.tirx.build(tvm.IRModule({worker.KERNEL: func}), "llvm").export_library(output)
    return {}


def measure(task: str, library: str, best: float | None) -> dict[str, Any]:
    """The real one, but for the faults of candidates."""
    fault = Path(library + ".fault").read_text()
    if fault == "hangs":
        time.sleep(1000)
    if fault == "lucky":  # right on the first data, by chance
        return {"seconds": 1e-9}
    return real_measure(task, library, best)


worker._OPERATIONS.update(build=build, build_bare=build_bare, measure=measure)

if __name__ == "__main__":
    worker.main()
