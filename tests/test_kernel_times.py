"""Times of single kernels beside the latency that they are part of, and the threads they run on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from tvm_compress import compress
from tvm_compress.benchmarking import (
    probe_inputs,
    set_threads,
    take_turn,
    time_kernels,
)
from tvm_compress.kernels import LibraryInfo

from .onnx_files import save_onnx


def chain(path: Path, count: int) -> Path:
    """`count` small linear layers, some hundred nanoseconds each."""
    random = np.random.default_rng(0)
    nodes, constants, last = [], {}, "image"
    for index in range(count):
        constants[f"w{index}"] = random.standard_normal((16, 16)) / 4
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"y{index}"]))
        nodes.append(helper.make_node("Relu", [f"y{index}"], [f"z{index}"]))
        last = f"z{index}"
    return save_onnx(path, nodes, constants, [1, 16], last, [1, 16])


def test_small_kernels_take_no_longer_than_the_inference(tmp_path: Path) -> None:
    """The time that watching a call takes is no layer's: it is several times that of these."""
    artefact = compress(
        chain(tmp_path / "chain.onnx", 60), recipe="int8_w_only", out=tmp_path / "o"
    )
    set_threads(1)
    session, feed = artefact.session(), probe_inputs(artefact)[0]
    info = LibraryInfo.from_json(artefact.kernels["compressed"])
    latency = 1e6 * min(take_turn(session.bind(feed), 200))  # nobody has watched it yet
    found = time_kernels(session, info, feed)
    assert [kernel.output for kernel in found] == [call.output for call in info.calls]
    assert len(found) >= 60 and min(kernel.time_us for kernel in found) > 0
    assert sum(kernel.time_us for kernel in found) < latency
    report = artefact.report["after"]
    assert report["kernels_us"] < report["latency"]["min_us"]


COMPARES = """
import os, sys
import tvm
from tvm_compress import flow
from tvm_compress.benchmarking import set_threads

flow.load_job(sys.argv[1], "int8_w_only", "host", None)
cores = os.sched_getaffinity(0)
os.sched_setaffinity(0, {max(cores)})
tvm.get_global_func("runtime.NumThreads")()
set_threads(1)
os.sched_setaffinity(0, cores)
print(set_threads(None))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_kernels_compared_on_one_core_leave_the_others_theirs(tmp_path: Path) -> None:
    """TVM's pool is as large as when it was asked first."""
    path = chain(tmp_path / "chain.onnx", 1)
    environment = {k: v for k, v in os.environ.items() if k != "TVM_NUM_THREADS"}
    command = [sys.executable, "-c", COMPARES, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(os.sched_getaffinity(0))
