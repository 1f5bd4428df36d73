"""Small tasks for tests of tuning."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from tvm import tirx

from tvm_compress.schedules import (
    Conv2dSpec,
    SearchSpace,
    choice_from_json,
    pack_weight,
    prim_func,
    search_space,
)
from tvm_compress.targets import Target, get_target
from tvm_compress.tuning.tasks import Task, make_task
from tvm_compress.tuning.workload import workload_key

CPU = "a CPU"
TARGET = dataclasses.replace(get_target("x86-64-v2"), threads=1)  # runs on any x86
SIDE = 6


def conv_spec(**changes: Any) -> Conv2dSpec:
    """A 3x3 convolution of int8 codes."""
    spec = Conv2dSpec(
        batch=1,
        height=SIDE,
        width=SIDE,
        in_channels=8,
        out_channels=16,
        kernel=(3, 3),
        padding=(1, 1, 1, 1),
        data_dtype="int8",
        weight_dtype="int8",
        acc_dtype="int32",
    )
    return spec.replace(**changes)


def conv_function(target: Target = TARGET, **changes: Any) -> tuple[tirx.PrimFunc, np.ndarray]:
    """The packed, naive convolution, and its weight."""
    spec = conv_spec(**changes)
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, spec.weight_shape).astype(spec.weight_dtype)
    packed = pack_weight(spec, weight, target)
    assert packed is not None
    return prim_func(packed[0]), packed[1]


def conv_task(target: Target = TARGET, **changes: Any) -> Task:
    """A task with the whole space of its kernel."""
    func, weight = conv_function(target, **changes)
    key = workload_key(func)
    assert key is not None
    task = make_task(key, "conv", func, target, {1: weight})
    assert task is not None
    return task


def small_task(choices: int, target: Target = TARGET) -> Task:
    """A task with a space of exactly so many choices."""
    task = conv_task(target)
    texts = [choice for _, choice in zip(range(choices), task.space, strict=False)]
    assert len(texts) == choices
    parameters = {
        name: tuple(sorted({choice[name] for choice in texts})) for name in task.space.parameters
    }
    space = SearchSpace(
        task.space.template, parameters, task.space.default, lambda choice: dict(choice) in texts
    )
    return dataclasses.replace(task, space=space)


def tuned(func: tirx.PrimFunc, text: str, target: Target = TARGET) -> bool:
    """Whether a choice, as JSON, is one of the function's space."""
    space = search_space(func, target)
    return space is not None and space.contains(choice_from_json(text))
