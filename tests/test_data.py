"""Calibration and evaluation data: what is read, what is refused, and that nothing is held."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tvm_compress.data import Dataset, load_data
from tvm_compress.errors import DataError
from tvm_compress.model import Model, TensorSpec
from tvm_compress.recipe import Preprocessing


def model(*specs: tuple[str, tuple[int, ...], str]) -> Model:
    inputs = tuple(TensorSpec(*spec) for spec in specs)
    return Model("m", None, inputs, (), "test")


IMAGE = model(("x", (1, 3, 4, 4), "float32"))


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def refusal(source: Any, for_model: Model = IMAGE, preprocessing: Any = None) -> str:
    with pytest.raises(DataError) as caught:
        list(load_data(source, for_model, preprocessing))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- .npz ---------------------------------------------------------------------------------------


def test_samples_get_the_models_shape(tmp_path: Path) -> None:
    x = floats(5, 3, 4, 4)
    data = load_data(save(tmp_path / "d.npz", x=x, labels=np.arange(5)), IMAGE)
    runs = list(data.runs())
    assert (len(data), len(runs), data.has_labels) == (5, 5, True)
    for index, run in enumerate(runs):
        assert run.feed["x"].shape == (1, 3, 4, 4)
        assert np.array_equal(run.feed["x"][0], x[index])
        assert run.labels is not None and run.labels.tolist() == [index]


def test_it_can_be_read_again(tmp_path: Path) -> None:
    data = load_data(save(tmp_path / "d.npz", x=floats(3, 3, 4, 4)), IMAGE)
    assert [f["x"].sum() for f in data] == [f["x"].sum() for f in data]


def test_compressed_files_and_labels_as_column(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=floats(4, 3, 4, 4), labels=np.arange(4, dtype=np.uint8)[:, None])
    labels = [run.labels for run in load_data(path, IMAGE).runs()]
    assert np.concatenate([label for label in labels if label is not None]).tolist() == [0, 1, 2, 3]


def test_batches_are_filled_up_and_counted(tmp_path: Path) -> None:
    batched = model(("x", (4, 2), "float32"))
    x = floats(6, 2)
    runs = list(load_data(save(tmp_path / "d.npz", x=x, labels=np.arange(6)), batched).runs())
    assert [run.count for run in runs] == [4, 2]
    assert np.array_equal(runs[1].feed["x"], x[[4, 5, 5, 5]])
    assert runs[1].labels is not None and runs[1].labels.tolist() == [4, 5]


def test_several_inputs_with_and_without_batch_axis(tmp_path: Path) -> None:
    several = model(("a", (1, 2), "float32"), ("state", (2, 1, 3), "float32"), ("r", (), "int64"))
    arrays = {"a": floats(3, 2), "state": floats(3, 2, 1, 3), "r": np.array([1, 2, 3])}
    feeds = list(load_data(save(tmp_path / "d.npz", **arrays), several))
    assert len(feeds) == 3
    assert feeds[2]["state"].shape == (2, 1, 3)
    assert np.array_equal(feeds[2]["state"], arrays["state"][2])
    assert feeds[1]["r"].shape == () and feeds[1]["r"] == 2


def test_take_is_evenly_spaced(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", x=floats(10, 3, 4, 4), labels=np.arange(10))
    data = load_data(path, IMAGE)
    few = data.take(4)
    assert len(few) == 4
    assert [int(run.labels[0]) for run in few.runs() if run.labels is not None] == [0, 2, 5, 7]
    assert len(few.take(2)) == 2
    assert data.take(99) is data


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    wide = model(("x", (1, 1000), "float32"))
    peaks = []
    for count in (100, 2000):
        path = tmp_path / f"{count}.npz"
        np.savez_compressed(path, x=np.zeros((count, 1000), np.float32))
        data = load_data(path, wide)
        tracemalloc.start()
        for _ in data:
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 100_000  # the large file is 8 MB when unpacked


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"y": floats(2, 3, 4, 4)}, ["no array for input 'x'", "holds 'y'"]),
        ({"x": floats(2, 3, 4, 5)}, ["'x'", "[3, 4, 5]", "takes [3, 4, 4]"]),
        ({"x": floats(2, 3, 4, 4).astype(np.float64)}, ["float64", ".astype('float32')"]),
        ({"x": np.zeros((2, 3, 4, 4), np.uint8)}, ["uint8", "preprocessing"]),
        ({"x": floats(0, 3, 4, 4)}, ["no samples"]),
        ({"x": np.float32(1)}, ["single number"]),
        ({"x": floats(2, 3, 4, 4), "label": np.zeros(2, int)}, ["'label'", "mean 'labels'"]),
        ({"x": floats(2, 3, 4, 4), "labels": np.zeros(3, int)}, ["labels", "[3]", "[2]"]),
        ({"x": floats(2, 3, 4, 4), "labels": np.zeros(2)}, ["integers", "float64"]),
        ({"x": np.asfortranarray(floats(2, 3, 4, 4))}, ["ascontiguousarray"]),
        ({"x": np.array([{}, {}], dtype=object)}, ["pickled"]),
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, Any], parts: list[str]) -> None:
    message = refusal(save(tmp_path / "d.npz", **arrays))
    for part in [*parts, "d.npz"]:
        assert part in message


def test_unequal_sample_counts(tmp_path: Path) -> None:
    two = model(("a", (1, 2), "float32"), ("b", (1, 2), "float32"))
    assert "'a' 2, 'b' 3" in refusal(save(tmp_path / "d.npz", a=floats(2, 2), b=floats(3, 2)), two)


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_nan_names_the_sample(tmp_path: Path, bad: float, word: str) -> None:
    x = floats(4, 3, 4, 4)
    x[2, 1, 0, 0] = bad
    message = refusal(save(tmp_path / "d.npz", x=x))
    assert word in message and "sample 2" in message


def test_missing_file() -> None:
    assert "no such file" in refusal("/nowhere/d.npz")


def test_file_that_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(b"hello")
    assert "not a readable .npz" in refusal(path)


def test_header_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    """A header may claim any size; nothing is allocated for it."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 3, 4, 4)}
    )
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
    assert "damaged" in refusal(tmp_path / "d.npz")


def test_header_with_an_expression_is_not_evaluated(tmp_path: Path) -> None:
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').getpid(),)}\n"
    header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", header)
    assert "bad header" in refusal(tmp_path / "d.npz")


def test_one_sample_beyond_the_limit(tmp_path: Path) -> None:
    huge = model(("x", (1, 1 << 27), "float32"))
    path = tmp_path / "d.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (1, 1 << 27)}
        )
        for _ in range(512):
            file.write(bytes(1 << 20))
    assert "over 268435456 bytes" in refusal(path, huge)


def test_truncated_data_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=np.round(floats(200, 3, 4, 4)))
    raw = bytearray(path.read_bytes())
    raw[1000:1100] = bytes(100)
    path.write_bytes(raw)
    assert "damaged" in refusal(path)


# --- folders of images --------------------------------------------------------------------------

SCALE = Preprocessing(divide_by=1.0)


def draw(path: Path, size: tuple[int, int] = (4, 4), colour: Any = (10, 20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_images_become_samples_in_order(tmp_path: Path) -> None:
    for index in (2, 0, 1):
        draw(tmp_path / f"{index}.png", colour=(index, 20, 30))
    data = load_data(tmp_path, IMAGE, SCALE)
    feeds = list(data)
    assert (len(data), data.has_labels) == (3, False)
    assert [feed["x"][0, 0, 0, 0] for feed in feeds] == [0.0, 1.0, 2.0]
    assert feeds[0]["x"].dtype == np.float32


def test_scaling_layout_and_channel_order(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    prep = Preprocessing(divide_by=10.0, mean=(1.0, 0.0, 0.5), std=(2.0, 1.0, 1.0), channels="bgr")
    (feed,) = load_data(tmp_path, IMAGE, prep)
    assert feed["x"][0, :, 1, 2] == pytest.approx([(3 - 1) / 2, 2.0, 1 - 0.5])
    last = model(("x", (1, 4, 4, 3), "float32"))
    (feed,) = load_data(tmp_path, last, prep)
    assert feed["x"][0, 1, 2] == pytest.approx([1.0, 2.0, 0.5])


def test_resize_shorter_side_then_crop_the_middle(tmp_path: Path) -> None:
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12] = 200
    Image.fromarray(image).save(tmp_path / "a.png")
    (feed,) = load_data(tmp_path, IMAGE, Preprocessing(resize=4, crop=4, divide_by=1.0))
    assert feed["x"][0, 0, :, 1:3] == pytest.approx(200)
    (feed,) = load_data(tmp_path, IMAGE, Preprocessing(resize=(4, 4), divide_by=1.0))
    assert feed["x"][0, 0, 0, 0] < 50


@pytest.mark.parametrize(("names", "labels"), [(("cat", "ant"), [0, 1]), (("10", "9"), [10, 9])])
def test_subfolders_are_classes(tmp_path: Path, names: tuple[str, ...], labels: list[int]) -> None:
    for name in names:
        draw(tmp_path / name / "a.png")
    data = load_data(tmp_path, IMAGE, SCALE)
    found = [int(run.labels[0]) for run in data.runs() if run.labels is not None]
    assert sorted(found) == sorted(labels)


def test_gray_images(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", colour=(77, 77, 77))
    gray = model(("x", (1, 1, 4, 4), "float32"))
    (feed,) = load_data(tmp_path, gray, Preprocessing(channels="gray", divide_by=1.0))
    assert feed["x"] == pytest.approx(77)


def test_uint8_arrays_take_the_same_way(tmp_path: Path) -> None:
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    feeds = list(load_data(save(tmp_path / "d.npz", x=pixels), IMAGE, SCALE))
    assert np.array_equal(feeds[1]["x"][0], pixels[1].transpose(2, 0, 1).astype(np.float32))


def test_folder_that_does_not_fit(tmp_path: Path) -> None:
    assert "no images" in refusal(tmp_path, IMAGE, SCALE)
    draw(tmp_path / "a.png", (6, 6))
    assert "preprocessing" in refusal(tmp_path)
    assert "come out as [3, 6, 6]" in refusal(tmp_path, IMAGE, SCALE)
    assert "larger than an image" in refusal(tmp_path, IMAGE, Preprocessing(crop=7))
    ambiguous = model(("x", (1, 3, 3, 3), "float32"))
    assert "layout" in refusal(tmp_path, ambiguous, Preprocessing(resize=(3, 3)))
    two = model(("a", (1, 3, 4, 4), "float32"), ("b", (1, 2), "float32"))
    assert "one input" in refusal(tmp_path, two, SCALE)
    signed = model(("x", (1, 3, 6, 6), "int8"))
    assert "int8" in refusal(tmp_path, signed, SCALE)
    draw(tmp_path / "cat" / "b.png")
    assert "both images and subfolders" in refusal(tmp_path, IMAGE, SCALE)


def test_file_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert "not a readable image" in refusal(tmp_path, IMAGE, SCALE)


def test_image_with_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    Image.new("1", (9000, 9000)).save(tmp_path / "a.png")
    assert "pixels" in refusal(tmp_path, IMAGE, SCALE)


# --- Python iterables ---------------------------------------------------------------------------


def test_lists_of_arrays_mappings_and_labelled_pairs() -> None:
    x = floats(3, 3, 4, 4)
    for source in (list(x), [{"x": item} for item in x], [item[None] for item in x]):
        feeds = list(load_data(source, IMAGE))
        assert [feed["x"].shape for feed in feeds] == [(1, 3, 4, 4)] * 3
        assert np.array_equal(feeds[1]["x"][0], x[1])
    data = load_data([(item, index) for index, item in enumerate(x)], IMAGE)
    assert [int(run.labels[0]) for run in data.runs() if run.labels is not None] == [0, 1, 2]


def test_function_that_returns_an_iterator() -> None:
    def samples() -> Iterator[np.ndarray]:
        yield from floats(4, 3, 4, 4)

    data = load_data(samples, IMAGE)
    assert isinstance(data, Dataset)
    assert (len(data), data.fingerprint) == (4, None)
    assert len(list(data)) == len(list(data)) == 4


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ([], "no samples"),
        ((x for x in floats(2, 3, 4, 4)), "only once"),
        ([{"y": floats(3, 4, 4)}], "no input 'x'"),
        ([floats(3, 4, 5)], "[3, 4, 5]"),
        ([floats(3, 4, 4), floats(3, 4, 5)], "sample 1"),
        ([np.full((3, 4, 4), np.nan, np.float32)], "NaN in sample 0"),
    ],
)
def test_iterable_that_does_not_fit(source: Any, part: str) -> None:
    assert part in refusal(source)


def test_mapping_of_arrays_is_read_like_an_npz() -> None:
    images = np.arange(3 * 48, dtype=np.float32).reshape(3, 3, 4, 4)
    data = load_data({"x": images, "labels": np.array([2, 0, 1])}, IMAGE)
    runs = list(data.runs())
    assert len(data) == 3
    assert [int(run.labels[0]) for run in runs] == [2, 0, 1]
    np.testing.assert_array_equal(np.concatenate([run.feed["x"] for run in runs]), images)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ({"y": np.zeros((2, 3, 4, 4), np.float32)}, "no input 'x'"),
        ({"x": np.zeros((2, 3, 4, 4), np.float32), "labels": [1]}, "different numbers of samples"),
        ({"x": np.float32(1)}, "holds no samples"),
    ],
)
def test_mapping_that_does_not_fit(source: Any, part: str) -> None:
    assert part in refusal(source)
