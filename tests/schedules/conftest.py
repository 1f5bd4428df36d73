"""The targets that kernels are tested for: every one is compiled, those the host can run are
run."""

from __future__ import annotations

import pytest

from tvm_compress.targets import Target, get_target

TARGETS = ("host", "x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-vnni")


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    """Every target in turn."""
    return get_target(request.param)


@pytest.fixture(params=("host", "x86-64-v3"))
def main_target(request: pytest.FixtureRequest) -> Target:
    """The host, and the level any current x86 has."""
    return get_target(request.param)
