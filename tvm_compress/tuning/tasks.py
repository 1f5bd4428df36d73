"""The kernels of a model that leave something to choose, each once, with how often it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .workload import workload_key

if TYPE_CHECKING:
    import numpy as np
    import tvm
    from tvm import tirx

    from ..schedules.choice import SearchSpace
    from ..targets import Target


@dataclass
class Task:
    """One workload of a model.

    `constants`: argument position => array, of the first call; the others are data or results.
    `results` are the positions that the function writes. `side` names the model, where several are
    tuned together.
    """

    key: str
    name: str
    func: tirx.PrimFunc
    block: str
    space: SearchSpace
    is_integer: bool
    constants: Mapping[int, np.ndarray]
    results: tuple[int, ...]
    calls: int = 1
    side: str = ""


def extract_tasks(module: tvm.IRModule, target: Target) -> list[Task]:
    """Tasks of a model in graph form, for `target`, in the order of their first call."""
    from ..pipeline import planning_pipeline, project_pipeline

    with target.tvm_target():
        pipeline = project_pipeline(target) if target.is_cross else planning_pipeline(target)
        module = pipeline(module)
    return tasks_of(module, target)


def merge_tasks(sides: Mapping[str, list[Task]]) -> list[Task]:
    """The tasks of several models, each once; what models share counts for the first of them."""
    found: dict[str, Task] = {}
    for side, tasks in sides.items():
        for task in tasks:
            found.setdefault(task.key, replace(task, side=side))
    return list(found.values())


def tasks_of(planned: tvm.IRModule, target: Target) -> list[Task]:
    """Tasks of a module as `schedule_pipeline` takes it: fused kernels that write into memory."""
    import tvm
    from tvm import tirx

    from ..relay_passes import ir
    from ..relay_passes.branches import walk

    found: dict[str, Task] = {}
    keys: dict[Any, str | None] = {}
    for _, binding in walk(planned):
        call = binding.value
        if not isinstance(call, tvm.ir.Call) or not isinstance(call.op, tvm.ir.GlobalVar):
            continue
        func = planned[call.op]
        if not isinstance(func, tirx.PrimFunc):
            continue
        name = call.op.name_hint
        if name not in keys:
            keys[name] = workload_key(func)
        key = keys[name]
        if key is None:
            continue
        if key in found:
            found[key].calls += 1
            continue
        constants = {i: ir.constant(argument) for i, argument in enumerate(call.args)}
        task = make_task(
            key, name, func, target, {i: a for i, a in constants.items() if a is not None}
        )
        if task is not None:
            found[key] = task
    return list(found.values())


def make_task(
    key: str,
    name: str,
    func: tirx.PrimFunc,
    target: Target,
    constants: Mapping[int, np.ndarray],
) -> Task | None:
    """The task of one function; None: there is nothing to choose in it."""
    from ..schedules import search_space
    from ..schedules.fused import analyse

    space = search_space(func, target)
    fused = analyse(func)
    if space is None or fused is None or fused.anchor is None:
        return None
    written = fused.outputs
    results = tuple(i for i, p in enumerate(func.params) if any(p.same_as(o) for o in written))
    return Task(
        key=key,
        name=name,
        func=func,
        block=fused.anchor.name,
        space=space,
        is_integer=not str(fused.anchor.buffer.dtype).startswith("float"),
        constants=constants,
        results=results,
    )
