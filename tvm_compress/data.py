"""Calibration and evaluation data: .npz files, folders of images, Python iterables.

Everything is streamed one sample at a time; sizes are read from the headers and bounded before
anything is allocated; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .artefact import sha256_of
from .errors import DataError
from .typed_yaml import nearest

if TYPE_CHECKING:
    from .model import Model, TensorSpec
    from .recipe import Preprocessing

LABELS = "labels"
LABEL_WORDS = ("label", "target", "targets", "y", "y_true", "class", "classes")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
MAX_SAMPLE_BYTES = 1 << 28
MAX_LABELS = 20_000_000
MAX_ARRAYS = 1024  # members of one .npz
MAX_IMAGE_PIXELS = 64_000_000
MAX_IMAGES = 2_000_000
HASHED_BYTES = 1 << 28  # files up to this size are hashed whole, larger ones by size and time

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Run:
    """What one inference takes: `feed` has the model's own shapes; its first `count` samples are
    real (the last batch is filled up by repetition); `labels` belong to those."""

    feed: Rows
    count: int
    labels: np.ndarray | None


@dataclass(frozen=True)
class Dataset:
    """A re-readable stream of samples that fit one model.

    `len()` counts samples. Iterating yields feeds: one array per model input, in the model's own
    shape and dtype. `runs()` yields the same with counts and labels.
    """

    source: str
    length: int
    has_labels: bool
    fingerprint: str | None  # None: cannot be known (an iterable), so nothing is cached
    inputs: tuple[TensorSpec, ...]
    open_rows: Callable[[], Iterator[tuple[Rows, Any]]]  # per sample: arrays, label or None
    batch: int = 1  # samples in one run
    label_range: tuple[int, int] | None = None  # smallest and largest, where known beforehand
    picked: range | tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.length if self.picked is None else len(self.picked)

    def __iter__(self) -> Iterator[Rows]:
        for run in self.runs():
            yield run.feed

    def take(self, count: int) -> Dataset:
        """At most `count` samples, evenly spaced (data sorted by class stays balanced)."""
        total = len(self)
        if count >= total:
            return self
        chosen = [index * total // count for index in range(count)]
        if self.picked is not None:
            chosen = [self.picked[index] for index in chosen]
        return replace(self, picked=tuple(chosen))

    def parted(self, count: int) -> tuple[Dataset, Dataset]:
        """(the others, `take(count)`); twice all of it where there are no others."""
        taken = self.take(count)
        if taken is self or taken.picked is None:
            return self, self
        every = range(self.length) if self.picked is None else self.picked
        others = sorted(set(every) - set(taken.picked))
        return replace(self, picked=tuple(others)), taken

    def runs(self) -> Iterator[Run]:
        """One `Run` after the other. Raises `DataError` at the first sample that does not fit."""
        rows: list[Rows] = []
        labels: list[Any] = []
        for row, label in self._picked_rows():
            rows.append(row)
            labels.append(label)
            if len(rows) == self.batch:
                yield self._assemble(rows, labels)
                rows, labels = [], []
        if rows:
            yield self._assemble(rows, labels)

    def _picked_rows(self) -> Iterator[tuple[Rows, Any]]:
        if self.picked is None:
            yield from self.open_rows()
            return
        wanted = iter(self.picked)
        next_index = next(wanted, None)
        for index, row in enumerate(self.open_rows()):
            if next_index is None:
                return
            if index == next_index:
                yield row
                next_index = next(wanted, None)

    def _assemble(self, rows: list[Rows], labels: list[Any]) -> Run:
        count = len(rows)
        rows = rows + [rows[-1]] * (self.batch - count)
        feed = {}
        for spec in self.inputs:
            parts = [row[spec.name] for row in rows]
            joined = parts[0] if self.batch == 1 else np.stack(parts)
            feed[spec.name] = np.asarray(joined.reshape(spec.shape), order="C")
        known = np.asarray(labels, np.int64) if self.has_labels else None
        return Run(feed, count, known)


def load_data(
    source: str | Path | Mapping[str, Any] | Iterable[Any] | Callable[[], Iterable[Any]] | Dataset,
    model: Model,
    preprocessing: Preprocessing | None = None,
) -> Dataset:
    """Open data for `model`; checks names, shapes and dtypes now, values while streaming.

    `source` is an .npz, a folder of images, a mapping laid out like an .npz (arrays by input name,
    first axis = samples, optional `labels`), or an iterable of samples or (sample, label) pairs.
    Raises `DataError` when something does not fit.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, Mapping):
        return _from_iterable(_rows_of_arrays(source, model.inputs), model.inputs)
    if not isinstance(source, str | Path):
        return _from_iterable(source, model.inputs)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, model.inputs, preprocessing)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    return _from_npz(path, model.inputs, preprocessing)


def read_arrays(path: Path, inputs: tuple[TensorSpec, ...]) -> Dataset:
    """The inputs of `run`: an .npz with one array per input, labels not looked at."""
    return _from_npz(path, inputs, None)


# --- .npz ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    """What the .npy header of one member says, before any of its data is read."""

    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int  # of the data within the member


def _read_headers(path: Path) -> dict[str, _Header]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MAX_ARRAYS:
                raise DataError(f"{path}: {len(members)} arrays; the limit is {MAX_ARRAYS}")
            return {
                info.filename.removesuffix(".npy"): _read_header(path, archive, info)
                for info in members
                if info.filename.endswith(".npy")
            }
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise DataError(f"{path}: not a readable .npz file: {error}") from None


def _read_header(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Header:
    name = info.filename.removesuffix(".npy")
    with archive.open(info) as file:
        try:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            elif version == (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
            else:
                raise ValueError(f"unknown .npy version {version}")
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{path}: array {name!r} has a bad header: {reason}") from None
        if dtype.hasobject:
            raise DataError(
                f"{path}: array {name!r} holds pickled Python objects, which are never loaded; "
                "save plain numbers"
            )
        size = dtype.itemsize
        for side in shape:
            if side < 0:
                raise DataError(f"{path}: array {name!r} has a negative side: {list(shape)}")
            size *= side
        if file.tell() + size != info.file_size:
            raise DataError(
                f"{path}: array {name!r} is damaged: {list(shape)} {dtype} needs {size} bytes, "
                f"the file holds {info.file_size - file.tell()}"
            )
        return _Header(info.filename, tuple(shape), dtype, bool(fortran), file.tell())


def _from_npz(
    path: Path, inputs: tuple[TensorSpec, ...], preprocessing: Preprocessing | None
) -> Dataset:
    headers = _read_headers(path)
    _check_names(path, set(headers), inputs)
    counts = {}
    for spec in inputs:
        header = headers[spec.name]
        if not header.shape:
            raise DataError(
                f"{path}: {spec.name!r} is a single number; its first axis must be the samples"
            )
        counts[spec.name] = header.shape[0]
    (count, *others) = set(counts.values())
    if others:
        listed = ", ".join(f"{name!r} {length}" for name, length in counts.items())
        raise DataError(f"{path}: the inputs differ in their number of samples: {listed}")
    if count == 0:
        raise DataError(f"{path}: holds no samples (first axis is 0)")
    adapters = {}
    whole = {}
    for spec in inputs:
        header = headers[spec.name]
        adapters[spec.name], whole[spec.name] = _adapter(
            f"{path}: input {spec.name!r}", header.shape[1:], header.dtype, spec, preprocessing
        )
        if header.dtype.itemsize * _product(header.shape[1:]) > MAX_SAMPLE_BYTES:
            raise DataError(f"{path}: one sample of {spec.name!r} is over {MAX_SAMPLE_BYTES} bytes")
        if header.fortran and len(header.shape) > 1:
            raise DataError(
                f"{path}: {spec.name!r} is stored column by column and cannot be streamed; "
                "save np.ascontiguousarray(array)"
            )
    batch = _batch(str(path), inputs, whole)
    labels = _read_labels(path, headers.get(LABELS), count)

    def open_rows() -> Iterator[tuple[Rows, Any]]:
        try:
            yield from _stream(path, inputs, headers, adapters, labels)
        except (zipfile.BadZipFile, OSError, zlib.error, EOFError) as error:
            raise DataError(f"{path}: damaged: {error}") from None

    return Dataset(
        source=str(path),
        length=count,
        has_labels=labels is not None,
        fingerprint=file_fingerprint(path),
        inputs=inputs,
        open_rows=open_rows,
        batch=batch,
        label_range=None if labels is None else (int(labels.min()), int(labels.max())),
    )


def _check_names(path: Path, names: set[str], inputs: tuple[TensorSpec, ...]) -> None:
    for spec in inputs:
        if spec.name not in names:
            takes = ", ".join(repr(other.name) for other in inputs)
            holds = ", ".join(repr(name) for name in sorted(names)) or "no arrays"
            raise DataError(
                f"{path}: no array for input {spec.name!r}; the model takes {takes}, "
                f"the file holds {holds}"
            )
    for name in sorted(names - {spec.name for spec in inputs} - {LABELS}):
        if LABELS not in names and name.lower() in LABEL_WORDS:
            raise DataError(f"{path}: array {name!r} is not known; did you mean {LABELS!r}?")
        takes = ", ".join(repr(spec.name) for spec in inputs)
        raise DataError(
            f"{path}: array {name!r} is none of the model's inputs ({takes}); leave it out"
        )


def _read_labels(path: Path, header: _Header | None, count: int) -> np.ndarray | None:
    if header is None:
        return None
    if header.dtype.kind not in "iu":
        raise DataError(f"{path}: labels must be class numbers (integers), not {header.dtype}")
    if header.shape not in ((count,), (count, 1)) or count > MAX_LABELS:
        raise DataError(f"{path}: labels has shape {list(header.shape)}; {count} samples need "
                        f"[{count}]")  # fmt: skip
    with zipfile.ZipFile(path) as archive, archive.open(header.member) as file:
        file.read(header.offset)
        raw = file.read(count * header.dtype.itemsize)
    return np.frombuffer(raw, header.dtype).astype(np.int64)


def _stream(
    path: Path,
    inputs: tuple[TensorSpec, ...],
    headers: Mapping[str, _Header],
    adapters: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    labels: np.ndarray | None,
) -> Iterator[tuple[Rows, Any]]:
    with zipfile.ZipFile(path) as archive:
        files = {spec.name: archive.open(headers[spec.name].member) for spec in inputs}
        for name, file in files.items():
            file.read(headers[name].offset)
        for index in range(headers[inputs[0].name].shape[0]):
            row = {}
            for name, file in files.items():
                header = headers[name]
                shape = header.shape[1:]
                size = header.dtype.itemsize * _product(shape)
                raw = file.read(size)
                if len(raw) != size:
                    raise DataError(f"{path}: {name!r} ends at sample {index}")
                array = np.frombuffer(raw, header.dtype).reshape(shape)
                _check_finite(array, f"{path}: input {name!r}", index)
                row[name] = adapters[name](array)
            yield row, None if labels is None else int(labels[index])


# --- folders of images --------------------------------------------------------------------------


def _from_folder(
    folder: Path, inputs: tuple[TensorSpec, ...], preprocessing: Preprocessing | None
) -> Dataset:
    if preprocessing is None:
        raise DataError(
            f"{folder}: a folder of images needs a `preprocessing:` block in the recipe "
            "(resize, crop, divide_by, mean, std, channels)"
        )
    if len(inputs) != 1:
        raise DataError(
            f"{folder}: images feed one input, the model takes {len(inputs)}; use an .npz"
        )
    spec = inputs[0]
    files, labels = _list_images(folder)
    adapt = _image_adapter(f"{folder}: input {spec.name!r}", spec, preprocessing)

    def open_rows() -> Iterator[tuple[Rows, Any]]:
        for index, file in enumerate(files):
            row = {spec.name: adapt(_read_image(file, preprocessing))}
            yield row, None if labels is None else labels[index]

    listing = hashlib.sha256()
    for file in files:
        status = file.stat()
        listing.update(f"{file.relative_to(folder)}\0{status.st_size}\0".encode())
        listing.update(f"{status.st_mtime_ns}\n".encode())
    return Dataset(
        source=str(folder),
        length=len(files),
        has_labels=labels is not None,
        fingerprint=listing.hexdigest(),
        inputs=inputs,
        open_rows=open_rows,
        batch=_batch(str(folder), inputs, {spec.name: False}),
        label_range=None if labels is None else (min(labels), max(labels)),
    )


def _list_images(folder: Path) -> tuple[list[Path], list[int] | None]:
    """Image files in a fixed order, and labels when they lie in one subfolder per class.

    Subfolders named by numbers give those numbers, others their place in alphabetical order.
    """
    flat = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if flat and classes:
        raise DataError(f"{folder}: holds both images and subfolders; use one subfolder per class")
    if flat:
        return flat, None
    numbered = all(p.name.isdecimal() and p.name.isascii() for p in classes)
    files: list[Path] = []
    labels: list[int] = []
    for place, folder_of_class in enumerate(classes):
        for file in sorted(folder_of_class.iterdir()):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                files.append(file)
                labels.append(int(folder_of_class.name) if numbered else place)
                if len(files) > MAX_IMAGES:
                    raise DataError(f"{folder}: more than {MAX_IMAGES} images")
    if not files:
        raise DataError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) here or one level down")
    return files, labels


def _read_image(path: Path, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 [H, W, C] in RGB, or [H, W] for gray."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise DataError(
                    f"{path}: {image.width}x{image.height} pixels; the limit is {MAX_IMAGE_PIXELS}"
                )
            return np.asarray(image.convert("L" if preprocessing.channels == "gray" else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: not a readable image: {error}") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: too many pixels; the limit is {MAX_IMAGE_PIXELS}") from None


def _image_adapter(
    what: str, spec: TensorSpec, preprocessing: Preprocessing
) -> Callable[[np.ndarray], np.ndarray]:
    channels = 1 if preprocessing.channels == "gray" else 3
    channels_first = _channels_first(what, spec, preprocessing, channels)
    if not spec.dtype.startswith("float") and (
        spec.dtype != "uint8"
        or (preprocessing.divide_by, *preprocessing.mean, *preprocessing.std) != (1.0, 0.0, 1.0)
    ):
        raise DataError(
            f"{what} is {spec.dtype}: images can feed float inputs, and uint8 inputs with "
            "divide_by 1, mean 0, std 1; otherwise use an .npz"
        )
    mean = np.asarray(preprocessing.mean, np.float32)
    std = np.asarray(preprocessing.std, np.float32)
    divide_by = np.float32(preprocessing.divide_by)

    def adapt(image: np.ndarray) -> np.ndarray:
        image = _resize_and_crop(what, image, preprocessing)
        pixels = image.astype(np.float32).reshape(*image.shape[:2], -1)  # [H, W, C]
        if pixels.shape[2] != channels:
            raise DataError(f"{what}: images have {pixels.shape[2]} channels, not {channels}")
        if preprocessing.channels == "bgr":
            pixels = pixels[:, :, ::-1]
        pixels = (pixels / divide_by - mean) / std
        if channels_first:
            pixels = pixels.transpose(2, 0, 1)
        if _product(pixels.shape) != _product(spec.shape[1:]) or (
            len(spec.shape) == 4 and pixels.shape != spec.shape[1:]
        ):
            raise DataError(
                f"{what} is {list(spec.shape)} but images come out as {list(pixels.shape)}; "
                "set resize or crop in the recipe's preprocessing"
            )
        return np.ascontiguousarray(pixels, spec.dtype)

    return adapt


def _channels_first(
    what: str, spec: TensorSpec, preprocessing: Preprocessing, channels: int
) -> bool:
    if preprocessing.layout != "auto":
        return preprocessing.layout == "NCHW"
    if len(spec.shape) == 3 and channels == 1:  # [N, H, W]
        return True
    if len(spec.shape) == 4:
        first, last = spec.shape[1] == channels, spec.shape[3] == channels
        if first != last:
            return first
    raise DataError(
        f"{what} has shape {list(spec.shape)}: which axis holds the {channels} channels? "
        "Set `layout: NCHW` or `NHWC` in the recipe's preprocessing"
    )


def _resize_and_crop(what: str, image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    from PIL import Image

    height, width = image.shape[:2]
    resize = preprocessing.resize
    if resize is not None:
        if isinstance(resize, tuple):
            height, width = resize
        else:
            shorter = min(height, width)
            height, width = round(height * resize / shorter), round(width * resize / shorter)
        if height * width > MAX_IMAGE_PIXELS:
            raise DataError(f"{what}: an image of {height}x{width} after resize is too large")
        if image.shape[:2] != (height, width):
            squeezed = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
            resized = Image.fromarray(squeezed).resize((width, height), Image.Resampling.BILINEAR)
            image = np.asarray(resized)
    if preprocessing.crop is not None:
        crop = preprocessing.crop
        rows, columns = crop if isinstance(crop, tuple) else (crop, crop)
        if rows > height or columns > width:
            raise DataError(
                f"{what}: crop {rows}x{columns} is larger than an image of {height}x{width}; "
                "set resize in the recipe's preprocessing"
            )
        top, left = (height - rows) // 2, (width - columns) // 2
        image = image[top : top + rows, left : left + columns]
    return image


# --- Python iterables ---------------------------------------------------------------------------


def _from_iterable(source: Any, inputs: tuple[TensorSpec, ...]) -> Dataset:
    if not callable(source) and iter(source) is source:
        raise DataError(
            "a generator can be read only once; pass a list, or a function that returns a fresh "
            "iterator"
        )

    def opened() -> Iterator[Any]:
        return iter(source() if callable(source) else source)

    first = next(opened(), None)
    if first is None:
        raise DataError("the data holds no samples")
    has_labels = isinstance(first, tuple) and len(first) == 2
    whole = {}
    for spec in inputs:
        array = _arrays_of(first, inputs, 0)[0][spec.name]
        what = f"data: input {spec.name!r}"
        _, whole[spec.name] = _adapter(what, array.shape, array.dtype, spec, None)

    def open_rows() -> Iterator[tuple[Rows, Any]]:
        for index, item in enumerate(opened()):
            arrays, label = _arrays_of(item, inputs, index)
            row = {}
            for spec in inputs:
                array = arrays[spec.name]
                what = f"data: sample {index}, input {spec.name!r}"
                adapt, _ = _adapter(what, array.shape, array.dtype, spec, None)
                _check_finite(array, f"data: input {spec.name!r}", index)
                row[spec.name] = adapt(array)
            yield row, label

    is_sized = not callable(source) and isinstance(source, Sized)
    return Dataset(
        source="a Python iterable",
        length=len(source) if is_sized else sum(1 for _ in opened()),
        has_labels=has_labels,
        fingerprint=None,
        inputs=inputs,
        open_rows=open_rows,
        batch=_batch("data", inputs, whole),
    )


def _rows_of_arrays(source: Mapping[str, Any], inputs: tuple[TensorSpec, ...]) -> list[Any]:
    """Arrays by name => one (row, label) or row a sample."""
    arrays = {}
    for spec in inputs:
        if spec.name not in source:
            raise DataError(f"data: there is no input {spec.name!r}{nearest(spec.name, source)}")
        arrays[spec.name] = np.asarray(source[spec.name])
    labels = np.asarray(source[LABELS]).ravel() if LABELS in source else None
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if labels is not None:
        counts[LABELS] = len(labels)
    if len(set(counts.values())) != 1:
        found = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise DataError(f"data: the arrays hold different numbers of samples: {found}")
    rows = [
        {name: array[index] for name, array in arrays.items()}
        for index in range(next(iter(counts.values())))
    ]
    return rows if labels is None else list(zip(rows, labels.tolist(), strict=True))


def _arrays_of(item: Any, inputs: tuple[TensorSpec, ...], index: int) -> tuple[Rows, Any]:
    label = None
    if isinstance(item, tuple) and len(item) == 2:
        item, label = item
        label = int(label)
    if not isinstance(item, Mapping):
        if len(inputs) != 1:
            raise DataError(
                f"data: sample {index} is {type(item).__name__}; a model with {len(inputs)} "
                "inputs takes a mapping from input name to array"
            )
        item = {inputs[0].name: item}
    for spec in inputs:
        if spec.name not in item:
            raise DataError(
                f"data: sample {index} has no input {spec.name!r}{nearest(spec.name, item)}"
            )
    return {spec.name: np.asarray(item[spec.name]) for spec in inputs}, label


# --- shared -------------------------------------------------------------------------------------


def _adapter(
    what: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    spec: TensorSpec,
    preprocessing: Preprocessing | None,
) -> tuple[Callable[[np.ndarray], np.ndarray], bool]:
    """How one sample of `shape` becomes an input of the model, and whether it is a whole feed
    (the model's shape with its batch axis) rather than one row of the batch."""
    if dtype == np.uint8 and spec.dtype.startswith("float"):
        if preprocessing is not None:
            return _image_adapter(what, spec, preprocessing), False
        raise DataError(
            f"{what} is uint8; the model takes {spec.dtype}. Convert the data, or give the recipe "
            "a `preprocessing:` block to scale 8-bit images"
        )
    if dtype.kind == "f" and spec.dtype.startswith(("int", "uint")):
        raise DataError(
            f"{what} is {dtype}; the model takes {spec.dtype} codes. Quantise the data with the "
            "scale and zero point of the model's input, round(x / scale) + zero_point; a cast "
            "would give it other numbers"
        )
    if str(dtype) != spec.dtype:
        raise DataError(
            f"{what} is {dtype}; the model takes {spec.dtype} (convert with "
            f".astype({spec.dtype!r}))"
        )
    if spec.shape and shape == spec.shape[1:]:
        return _same, False
    if shape == spec.shape:
        return _same, True
    wanted = list(spec.shape[1:]) if spec.shape else []
    raise DataError(f"{what} has samples of shape {list(shape)}; the model takes {wanted}")


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _batch(what: str, inputs: tuple[TensorSpec, ...], whole: Mapping[str, bool]) -> int:
    """Samples in one run. `whole` says which inputs come as whole feeds, one for each run."""
    sizes = {1 if whole[spec.name] else spec.shape[0] for spec in inputs}
    if len(sizes) > 1:
        listed = ", ".join(f"{spec.name!r} {list(spec.shape)}" for spec in inputs)
        raise DataError(
            f"{what}: the inputs have no common batch axis ({listed}); give every array the "
            "shape [samples, *shape of the input]"
        )
    return sizes.pop()


def _check_finite(array: np.ndarray, what: str, index: int) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        kind = "NaN" if np.isnan(array).any() else "an infinite value"
        raise DataError(f"{what} has {kind} in sample {index}")


def _product(shape: Iterable[int]) -> int:
    result = 1
    for side in shape:
        result *= side
    return result


def file_fingerprint(path: Path) -> str:
    """Identifies the content: a SHA-256, or size and time for files too large to read twice."""
    status = path.stat()
    if status.st_size > HASHED_BYTES:
        return f"{status.st_size} bytes of {status.st_mtime_ns}"
    return sha256_of(path)
