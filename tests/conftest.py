"""What every test shares: where the model assets are, thread counts, and the order of the tests."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ASSETS_VARIABLE = "TVM_COMPRESS_ASSETS"

# Before TVM or a BLAS is loaded. Two threads exercise the parallel code on any machine, and a
# machine with many cores does not spend its time waking threads for tiny networks. NumPy and torch
# get one: theirs wait spinning for each other, for milliseconds where other tests have the cores.
os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick answers first: unit tests, then slow ones, then those in tests/end_to_end.

    Tests that link a library are skipped where there is no compiler to link with.
    """

    def folder(item: pytest.Item) -> str:
        return item.path.relative_to(REPOSITORY / "tests").parts[0]

    def rank(item: pytest.Item) -> tuple[bool, bool, bool]:
        return (
            folder(item) == "end_to_end",
            item.get_closest_marker("slow") is not None,
            item.path.name != "test_tiny.py",
        )

    items.sort(key=rank)
    if not _has_compiler():
        skip = pytest.mark.skip(reason="no C++ compiler (Debian: apt-get install g++)")
        for item in items:
            if folder(item) == "end_to_end" or item.get_closest_marker("links"):
                item.add_marker(skip)


def _has_compiler() -> bool:
    """Whether TVM finds a compiler to link with; it looks in the same places."""
    named = os.environ.get("CXX") or os.environ.get("CC")
    return any(
        map(shutil.which, [named] if named else ["g++", "gcc", "clang++", "clang", "c++", "cc"])
    )


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that the tests belong to."""
    return REPOSITORY


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of real models and labelled data. A test that needs it skips where it is absent."""
    default = REPOSITORY.parent / "shared" / "assets"
    folder = Path(os.environ.get(ASSETS_VARIABLE, default))
    if not folder.is_dir():
        pytest.skip(f"no model assets: {folder} does not exist (set {ASSETS_VARIABLE})")
    return folder


@pytest.fixture(scope="session")
def asset(assets: Path) -> Callable[[str], Path]:
    """Look one asset up by its path below the assets folder; the test skips where it is absent."""

    def find(name: str) -> Path:
        path = assets / name
        if not path.exists():
            pytest.skip(f"model asset {name} does not exist in {assets}")
        return path

    return find


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """The trained example that ships: model.onnx, calibration.npz and test.npz."""
    return REPOSITORY / "examples" / "fashion_mnist"


@pytest.fixture(autouse=True, scope="session")
def _no_user_records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the user tuned must not change what tests build, nor the other way round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_modules() -> Iterator[None]:
    """TVM modules hang in reference cycles; without this they pile up over a run."""
    yield
    gc.collect()
