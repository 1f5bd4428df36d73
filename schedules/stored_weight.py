"""Weights with zeros whose layers run dense: stored without the zeros, decoded before every call.

    decoded[i] = bit i of words ? values[how many bits are set before bit i] : 0

The decoded array is the packed weight that the dense kernel reads, whatever its layout. A bit for
each weight is an eighth of dense bytes, a 32nd of floats; so int8 weights with 50 % zeros take 62 %
of the room, with 80 % zeros 33 %. Decoding is one pass over the weight, which a layer that uses
each weight for many positions hardly notices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..targets import Target
from .emit import Emitter
from .prim import OPAQUE, make_prim_func
from .spec import KERNEL_ATTR, Conv2dSpec, MatmulSpec, WeightedSpec, ceil_div

if TYPE_CHECKING:
    from tvm import tirx

NAME = "stored_weight"
# What a choice for this form is called, and reports.
STORED = "zeros left out, decoded per call"
WORD = 64
# Words between two entries of `starts`: pieces that threads share, at a thousandth of the bytes.
RUN = 64
# Kernels load whole registers of values.
_BEHIND_BYTES = 64
# Less is no gain to speak of: the part of its dense bytes that a stored weight may take.
_WORTHWHILE = 0.9
# Weights from which on threads share the work.
_PARALLEL = 1 << 18
# What a decoding function adds to a library: objects have 4.6 to 6.2 kB of code and of strings,
# some of which other kernels have as well; in ResNet-20 one adds 3.5 kB.
CODE_BYTES = 4000
# Cycles for a weight, one after the other.
_CYCLES = 4.0


@dataclass(frozen=True)
class StoredWeight:
    """A packed weight without its zeros, as a kernel's description."""

    shape: tuple[int, ...]
    dtype: str
    stored: int
    """Values, those behind the last one included."""

    @property
    def size(self) -> int:
        """Weights, zeros included."""
        return int(np.prod(self.shape))

    @property
    def words(self) -> int:
        """64 weights each."""
        return ceil_div(self.size, WORD)

    @property
    def runs(self) -> int:
        """`RUN` words each."""
        return ceil_div(self.words, RUN)

    @property
    def decoding(self) -> Decoding:
        """The function that decodes it."""
        is_large, is_ragged = self.size >= _PARALLEL, self.size % WORD != 0
        return Decoding(self.dtype, len(self.shape), is_large, is_ragged)

    def prim_func(self) -> tirx.PrimFunc:
        """The naive decoding kernel: (values, words, starts) => weight. Nothing may be fused with
        it.

        It knows no sizes, so one function decodes all weights of a network that are alike in the
        rest."""
        from tvm import te, tirx

        sides = [te.var(f"side{place}") for place in range(len(self.shape))]
        values = te.placeholder((te.var("stored"),), self.dtype, name="values")
        words = te.placeholder((te.var("count"),), "uint64", name="words")
        starts = te.placeholder((te.var("runs"),), "int32", name="starts")
        number = te.reduce_axis((0, RUN), name="number")
        one = tirx.const(1, "uint64")

        def bits_before(word: tirx.Var) -> tirx.PrimExpr:
            other = word // RUN * RUN + number
            count = tirx.popcount(words[tirx.min(other, word)]).astype("int32")
            is_before = other < word
            return te.sum(tirx.Select(is_before, count, tirx.const(0, "int32")), axis=number)

        ranks = te.compute(words.shape, bits_before, name="ranks")

        def value(*index: tirx.Var) -> tirx.PrimExpr:
            flat: tirx.PrimExpr = tirx.const(0, "int32")
            for position, extent in zip(index, sides, strict=True):
                flat = flat * extent + position
            word, shift = flat // WORD, (flat % WORD).astype("uint64")
            below = tirx.popcount(words[word] & ((one << shift) - one)).astype("int32")
            found = values[starts[word // RUN] + ranks[word] + below]
            is_set = tirx.NE((words[word] >> shift) & one, tirx.const(0, "uint64"))
            return tirx.if_then_else(is_set, found, tirx.const(0, self.dtype))

        out = te.compute(tuple(sides), value, name="decoded")
        roles, parameters = ["weights", "indices", "indices"], asdict(self.decoding)
        return make_prim_func(NAME, [values, words, starts], out, roles, OPAQUE, parameters)


@dataclass(frozen=True)
class Decoding:
    """What a decoding function knows of the weights that it decodes: those that have this in common
    share it."""

    dtype: str
    axes: int
    is_large: bool
    """Enough for threads."""
    is_ragged: bool
    """The last word has fewer weights."""

    @property
    def kind(self) -> str:
        """Such as `int8, 5 axes, ragged`: tells functions of a target apart."""
        parts = [self.dtype, f"{self.axes} axes"]
        parts += ["large"] * self.is_large + ["ragged"] * self.is_ragged
        return ", ".join(parts)


def description_of(attrs: Mapping[str, Any] | None) -> Decoding | None:
    """What `StoredWeight.prim_func` noted in a function's attributes; None: another function."""
    text = (attrs or {}).get(KERNEL_ATTR)
    fields = {} if text is None else json.loads(str(text))
    if fields.pop("family", None) != NAME:
        return None
    return Decoding(**fields)


def encode(weight: np.ndarray) -> tuple[StoredWeight, list[np.ndarray]]:
    """A packed weight => its description, and values, words uint64, starts int32."""
    flat = np.ascontiguousarray(weight).reshape(-1)
    kept = flat != 0  # negative zeros, as of masked weights, are decoded as zeros
    behind = np.zeros(_BEHIND_BYTES // flat.dtype.itemsize, flat.dtype)
    values = np.concatenate([flat[kept], behind])
    full = np.zeros(ceil_div(flat.size, WORD) * WORD, bool)
    full[: flat.size] = kept
    words = np.packbits(full, bitorder="little").view("<u8").astype(np.uint64)
    counts = np.add.reduceat(full, np.arange(0, full.size, RUN * WORD), dtype=np.int64)
    starts = (np.cumsum(counts) - counts).astype(np.int32)
    described = StoredWeight(weight.shape, str(flat.dtype), len(values))
    return described, [values, words, starts]


def empty(dtype: str) -> tuple[StoredWeight, list[np.ndarray]]:
    """The least there is to decode: what a call takes."""
    return encode(np.zeros(WORD, dtype))


def decode(
    stored: StoredWeight, values: np.ndarray, words: np.ndarray, _starts: np.ndarray
) -> np.ndarray:
    """Inverse of `encode`."""
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[: stored.size]
    flat = np.zeros(stored.size, values.dtype)
    flat[bits.astype(bool)] = values[: int(bits.sum())]
    return flat.reshape(stored.shape)


def expected_share(spec: WeightedSpec, target: Target) -> float:
    """Expected time of decoding in times of the dense layer's."""
    from .x86.stored_weight import cycles_of_a_weight

    assert isinstance(spec, (Conv2dSpec, MatmulSpec))
    cycles = cycles_of_a_weight(spec.weight_dtype, target) if target.is_x86 else None
    weights = spec.reduction_size * spec.columns * spec.groups_of_channels
    bits = 8 * np.dtype(spec.data_dtype).itemsize
    dense = spec.macs / max(1, target.lanes(bits))
    return (_CYCLES if cycles is None else cycles) * weights / dense


def stored_weight(
    spec: WeightedSpec, weight: np.ndarray, target: Target
) -> tuple[StoredWeight, list[np.ndarray]] | None:
    """A layer's packed weight without its zeros; None: hardly smaller, or none that is decoded.

    Boards have no room for the decoded weight.
    """
    is_layer = isinstance(spec, (Conv2dSpec, MatmulSpec)) and spec.columns > 1
    if target.is_cross or not is_layer or spec.group_size or spec.weight_dtype == "int4":
        return None
    found = encode(weight)
    small = sum(part.nbytes for part in found[1]) <= _WORTHWHILE * weight.nbytes
    return found if small else None


def kernel_of(func: tirx.PrimFunc, target: Target) -> StoredKernel | None:
    """The kernel of a naive decoding function for the target; None: another function."""
    found = description_of(func.attrs)
    if found is None:
        return None
    if target.is_x86:
        from .x86.stored_weight import kernel_class

        return kernel_class(found.dtype, target)(found, func, target)
    return StoredKernel(found, func, target)


class StoredKernel:
    """One function being written; the loop over a word's bits serves every target."""

    def __init__(self, decoding: Decoding, func: tirx.PrimFunc, target: Target) -> None:
        self.decoding, self.func, self.target = decoding, func, target
        self.e = Emitter()

    def build(self) -> tirx.PrimFunc:
        """The scheduled function."""
        from tvm import tirx

        e = self.e
        self.values, words, starts, out = self.func.params
        self.out = e.flat(out)
        count, runs = words.shape[0], starts.shape[0]
        size = self.out.shape[0]
        whole = count - 1 if self.decoding.is_ragged else count
        is_parallel = self.target.threads > 1 and self.decoding.is_large
        with e.loop("run", runs, "parallel" if is_parallel else "serial") as run:
            place = e.alloc(1, "int32", "place", registers=True)
            e.store(place, starts[run], 0)
            first = e.bind("first", run * RUN)
            with e.loop("number", tirx.min(tirx.const(RUN, "int32"), whole - first)) as number:
                bits = e.bind("bits", words[first + number])
                here = e.bind("here", place[0])
                self.word(here, bits, (first + number) * WORD)
                e.store(place, here + tirx.popcount(bits).astype("int32"), 0)
            if self.decoding.is_ragged:
                with e.when(run == runs - 1):
                    bits, base = e.bind("bits", words[whole]), whole * WORD
                    self.bit_by_bit(place[0], bits, base, size - base)
        return e.function(list(self.func.params), {}, self.helpers())

    def helpers(self) -> str:
        """Functions of LLVM that the kernel calls."""
        return ""

    def word(self, place: Any, bits: Any, base: Any) -> None:
        """Decode the weights from `base` on, by all bits of a word, from the values from `place`
        on."""
        self.bit_by_bit(place, bits, base, WORD)

    def bit_by_bit(self, place: Any, bits: Any, base: Any, count: Any) -> None:
        """The same for the first `count` weights of a word."""
        from tvm import tirx

        e, one = self.e, tirx.const(1, "uint64")
        next_value = e.alloc(1, "int32", "next", registers=True)
        e.store(next_value, place, 0)
        with e.loop("bit", count) as lane:
            bit = e.bind("is_set", ((bits >> lane.astype("uint64")) & one).astype("int32"))
            here = e.bind("from", next_value[0])
            zero = tirx.const(0, self.decoding.dtype)
            e.store(self.out, tirx.Select(bit != 0, self.values[here], zero), base + lane)
            e.store(next_value, here + bit, 0)
