"""What a kernel computes, as data: one frozen dataclass per family.

A spec names everything a kernel depends on at compile time and nothing else, so two layers with
equal specs share one kernel. Its JSON travels on the PrimFunc and on the compute block as
`KERNEL_ATTR`; that is how a kernel is recognised after fusion. This file imports nothing heavy.

Integers: an integer kernel returns the raw sum over taps of `x * (w - weight_zero_point)`. The
input's zero point only appears as `pad_value`, the value of the taps outside the input, so that the
caller may subtract `zero_point * sum(w)` as a constant per channel, borders included.

Weight-only (float32 data with integer codes): the codes are converted to float32 and summed; a
scale per output channel is the caller's business, after the sum. With `group_size` the scales are
the kernel's: one per `group_size` consecutive positions of the flattened reduction axis (kernel
row, kernel column, input channel; the last group may be shorter) and output channel.

Integer data with `group_size`: the scales are whole numbers, uint8, so the sum stays exact; what
they are multiples of is one scale per output channel, again the caller's. With `table_channels`
the 4-bit codes are unsigned indices into tables of 16 int8 values, one table for so many
consecutive output channels.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .layout import PackedLayout, parse_layout
from .pitch import unaliased_row

if TYPE_CHECKING:
    from typing_extensions import Self

KERNEL_ATTR = "tvm_compress.kernel"
SCHEDULE_ATTR = "tvm_compress.schedule"

DATA_DTYPES = ("float32", "int8", "uint8", "int16")
WEIGHT_DTYPES = ("float32", "int8", "uint8", "int16", "int4")
ACC_DTYPES = ("float32", "int32", "int64")
# Values that four bits can name.
TABLE_SIZE = 16


class SpecError(ValueError):
    """A kernel was asked for that cannot exist: a mistake of the caller, not of the user."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(message)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


_FAMILIES: dict[str, type[KernelSpec]] = {}


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """Base of all specs: JSON round trip under the family's name."""

    family: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "family" in cls.__dict__:
            _FAMILIES[cls.family] = cls

    def to_json(self) -> str:
        """One line of JSON, keys sorted, equal for equal specs."""
        fields: dict[str, Any] = {"family": self.family}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or value != field.default:
                fields[field.name] = value
        return json.dumps(fields, sort_keys=True)

    def replace(self, **changes: Any) -> Self:
        """The same spec with some fields changed."""
        return dataclasses.replace(self, **changes)


def spec_from_json(text: str) -> KernelSpec:
    """Inverse of `KernelSpec.to_json`. Raises SpecError when `text` is not a spec."""
    try:
        fields = json.loads(text)
        family = _FAMILIES[fields.pop("family")]
        return family(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"not a kernel spec: {text[:80]!r} ({error})") from error


@dataclass(frozen=True, kw_only=True)
class WeightedSpec(KernelSpec):
    """What all kernels with a constant weight share."""

    plain_layout: ClassVar[str] = ""

    data_dtype: str = "float32"
    weight_dtype: str = "float32"
    acc_dtype: str = "float32"
    weight_zero_point: int = 0
    weight_layout: str = ""
    group_size: int = 0
    group_zero_points: bool = False
    table_channels: int = 0
    """Output channels that share a table; 0: codes are values themselves."""
    chain: int = 0
    """Steps of four products whose sums in pairs stay within int16, proven from the weights, for
    unsigned bytes of data; 0: not even one step's, or not looked at. Only of packed weights."""

    def __post_init__(self) -> None:
        if not self.weight_layout:
            object.__setattr__(self, "weight_layout", self.plain_layout)
        _require(
            self.data_dtype in DATA_DTYPES, f"data dtype {self.data_dtype!r} not in {DATA_DTYPES}"
        )
        _require(
            self.weight_dtype in WEIGHT_DTYPES,
            f"weight dtype {self.weight_dtype!r} not in {WEIGHT_DTYPES}",
        )
        _require(
            self.acc_dtype in ACC_DTYPES,
            f"accumulator dtype {self.acc_dtype!r} not in {ACC_DTYPES}",
        )
        _require(
            (self.data_dtype == "float32") == (self.acc_dtype == "float32"),
            f"{self.data_dtype} data cannot be summed in {self.acc_dtype}",
        )
        _require(
            self.data_dtype == "float32" or self.weight_dtype != "float32",
            f"{self.data_dtype} data with float32 weights",
        )
        _require(self.group_size >= 0, f"group_size {self.group_size} < 0")
        _require(
            not self.group_size or self.weight_dtype in ("int8", "int4"),
            "group_size is for int8 or int4 codes",
        )
        _require(
            self.table_channels >= 0
            and (
                not self.table_channels
                or (self.weight_dtype == "int4" and self.data_dtype != "float32")
            ),
            f"table_channels {self.table_channels} needs int4 codes and integer data",
        )
        _require(
            not (self.table_channels and self.weight_zero_point),
            "table_channels and weight_zero_point exclude each other",
        )
        _require(
            not (self.group_zero_points and self.data_dtype != "float32"),
            "group_zero_points are for float32 data",
        )
        _require(
            not self.group_zero_points or self.group_size > 0, "group_zero_points needs group_size"
        )
        _require(
            not (self.group_size and self.weight_zero_point),
            "weight_zero_point and group_size exclude each other",
        )
        _require(self.groups_of_channels >= 1, "groups < 1")
        if self.weight_layout != self.plain_layout:
            try:
                parse_layout(self.weight_layout)
            except ValueError as error:
                raise SpecError(str(error)) from error

    # The weight seen as `groups` matrices [K, N].

    @property
    def groups_of_channels(self) -> int:
        """How many independent matrices the weight holds."""
        return 1

    @property
    def reduction(self) -> tuple[int, int, int]:
        """Kernel rows, kernel columns and input channels of one group; K is their product."""
        raise NotImplementedError

    @property
    def columns(self) -> int:
        """N: output channels of one group."""
        raise NotImplementedError

    @property
    def reduction_size(self) -> int:
        """K: terms of one output's sum."""
        return math.prod(self.reduction)

    @property
    def is_integer(self) -> bool:
        """Whether the sum is exact, in integers."""
        return self.acc_dtype != "float32"

    @property
    def weight_only(self) -> bool:
        """Whether float data meets integer codes."""
        return self.data_dtype == "float32" and self.weight_dtype != "float32"

    @property
    def packed_layout(self) -> PackedLayout | None:
        """The packed layout, or None for the plain one."""
        if self.weight_layout == self.plain_layout:
            return None
        return parse_layout(self.weight_layout)

    @property
    def plain_weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight's values in the plain layout."""
        raise NotImplementedError

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stored weight array."""
        packed = self.packed_layout
        if packed is not None:
            return packed.shape(
                self.groups_of_channels, self.reduction, self.columns, self.weight_dtype
            )
        if self.weight_dtype == "int4":
            return (ceil_div(self.reduction_size, 2), self.columns * self.groups_of_channels)
        return self.plain_weight_shape

    @property
    def weight_storage_dtype(self) -> str:
        """dtype of the stored weight array: int4 is stored as two codes in a uint8."""
        return "uint8" if self.weight_dtype == "int4" else self.weight_dtype

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Shape of the group-wise scales (and zero points): [groups of K, output channels]; of
        whole-number scales of a packed weight [blocks, groups of K, width]."""
        _require(self.group_size > 0, "no group_size, no scales")
        groups = ceil_div(self.reduction_size, self.group_size)
        packed = self.packed_layout
        if packed is not None and self.is_integer:
            return (ceil_div(self.columns, packed.width), groups, packed.width)
        return (groups, self.columns * self.groups_of_channels)

    @property
    def scales_dtype(self) -> str:
        """float32, or uint8 where the sum is in integers."""
        return "uint8" if self.is_integer else "float32"

    @property
    def has_one_table(self) -> bool:
        """Whether all output channels share a table."""
        return self.table_channels >= self.columns * self.groups_of_channels

    @property
    def tables_shape(self) -> tuple[int, int]:
        """Shape of the tables, [tables, 16]: of a packed weight enough for the padded channels."""
        _require(self.table_channels > 0, "no table_channels, no tables")
        channels = self.columns * self.groups_of_channels
        packed = self.packed_layout
        if packed is not None and not self.has_one_table:
            channels = ceil_div(self.columns, packed.width) * packed.width
        return (ceil_div(channels, self.table_channels), TABLE_SIZE)


@dataclass(frozen=True, kw_only=True)
class _ConvolutionSpec(WeightedSpec):
    """What both directions share: sizes, groups, and the shapes of their arguments."""

    plain_layout: ClassVar[str] = "HWIO"

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Top, left, bottom, right."""
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pad_value: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = (self.batch, self.height, self.width, self.in_channels, self.out_channels)
        _require(
            min(sizes + self.kernel + self.strides + self.dilation) >= 1, f"a size < 1 in {self}"
        )
        _require(
            self.in_channels % self.groups == 0 and self.out_channels % self.groups == 0,
            f"{self.groups} groups do not divide {self.in_channels} and {self.out_channels}",
        )

    @property
    def groups_of_channels(self) -> int:
        return self.groups

    @property
    def reduction(self) -> tuple[int, int, int]:
        return (*self.kernel, self.in_channels // self.groups)

    @property
    def columns(self) -> int:
        return self.out_channels // self.groups

    @property
    def out_height(self) -> int:
        """Rows of the result."""
        raise NotImplementedError

    @property
    def out_width(self) -> int:
        """Columns of the result."""
        raise NotImplementedError

    @property
    def data_shape(self) -> tuple[int, ...]:
        """[batch, height, width, in_channels]."""
        return (self.batch, self.height, self.width, self.in_channels)

    @property
    def plain_weight_shape(self) -> tuple[int, ...]:
        return (*self.kernel, self.in_channels // self.groups, self.out_channels)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """[batch, out_height, out_width, out_channels]."""
        return (self.batch, self.out_height, self.out_width, self.out_channels)


@dataclass(frozen=True, kw_only=True)
class Conv2dSpec(_ConvolutionSpec):
    """2-D convolution, NHWC data, HWIO weight; conv1d is one of height 1.

    data [batch, height, width, in_channels], weight [kh, kw, in_channels / groups, out_channels],
    result [batch, out_height, out_width, out_channels]. int4 weights are stored as uint8
    [ceil(kh*kw*ic/2), out_channels], position 2j of the flattened (kh, kw, ic) in the low nibble.
    """

    family: ClassVar[str] = "conv2d"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(min(self.padding) >= 0, f"negative padding {self.padding}")
        _require(
            self.out_height >= 1 and self.out_width >= 1,
            f"kernel larger than the padded input: {self}",
        )

    @property
    def is_depthwise(self) -> bool:
        """One input channel per group, more than one group."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def padded_height(self) -> int:
        """Height with the padding."""
        return self.height + self.padding[0] + self.padding[2]

    @property
    def padded_width(self) -> int:
        """Width with the padding."""
        return self.width + self.padding[1] + self.padding[3]

    @property
    def out_height(self) -> int:
        """Rows of the result."""
        extent = self.dilation[0] * (self.kernel[0] - 1) + 1
        return (self.padded_height - extent) // self.strides[0] + 1

    @property
    def out_width(self) -> int:
        """Columns of the result."""
        extent = self.dilation[1] * (self.kernel[1] - 1) + 1
        return (self.padded_width - extent) // self.strides[1] + 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call, border taps included."""
        return (
            self.batch
            * self.out_height
            * self.out_width
            * self.out_channels
            * (self.reduction_size)
        )


@dataclass(frozen=True, kw_only=True)
class SparseConv2dSpec(KernelSpec):
    """A convolution most of whose weights are zero; a linear layer is one of height 1 and kernel 1.

    `block` neighbouring output channels share which inputs they read. Block b has the entries
    starts[b] .. starts[b + 1]; each is the weights of one input, values [entries, block], and where
    that lies in the padded NHWC data, counted by `pitches` from the window's first element, offsets
    [entries]. Channels of the last block beyond `out_channels` have zeros. Kernels that lay the
    data out anew read offsets `by_channel` instead: channel * 2**tap_bits + tap, taps in kernel
    order.
    """

    family: ClassVar[str] = "sparse_conv2d"

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Top, left, bottom, right."""
    dilation: tuple[int, int] = (1, 1)
    pad_value: int = 0
    data_dtype: str = "float32"
    weight_dtype: str = "float32"
    acc_dtype: str = "float32"
    block: int
    entries: int
    longest: int
    """Most entries of a block."""
    group: int = 1
    """Entries of a block whose weights lie side by side: values [entries / group, block, group].
    Blocks have a multiple of it; those that are too many have zeros."""
    chain: int = 0
    """Groups, one behind the other, that may be added in 16 bits; 0: not even one."""
    is_flat: bool = False
    """A linear layer: data [width, in_channels], result [width, out_channels]."""
    by_channel: bool = False
    """Whether offsets name a channel and a tap instead of a place in the padded data."""
    pattern: tuple[int, ...] = ()
    """The contents of offsets and then of starts, for kernels that are written for them; empty: not
    known before the kernel runs."""

    def __post_init__(self) -> None:
        _require(
            (self.data_dtype == "float32") == (self.acc_dtype == "float32"),
            f"{self.data_dtype} data cannot be summed in {self.acc_dtype}",
        )
        _require(self.block >= 1, f"blocks of {self.block} channels")
        _require(
            0 <= self.longest <= self.entries <= self.blocks * self.longest,
            f"{self.entries} entries, at most {self.longest} in each of {self.blocks} blocks",
        )
        _require(
            self.group >= 1 and self.entries % self.group == 0 and self.longest % self.group == 0,
            f"{self.entries} entries in groups of {self.group}",
        )
        _require(
            not self.is_flat or (self.batch, self.height, self.kernel) == (1, 1, (1, 1)),
            f"a linear layer with a window: {self}",
        )
        known = self.entries + self.blocks + 1
        _require(
            len(self.pattern) in (0, known),
            f"a pattern of {len(self.pattern)} numbers, not {known}",
        )
        assert self.dense  # checks the sizes

    @property
    def dense(self) -> Conv2dSpec:
        """The same layer with all its weights."""
        return Conv2dSpec(
            batch=self.batch, height=self.height, width=self.width, in_channels=self.in_channels,
            out_channels=self.out_channels, kernel=self.kernel, strides=self.strides,
            padding=self.padding, dilation=self.dilation, pad_value=self.pad_value,
            data_dtype=self.data_dtype, weight_dtype=self.weight_dtype, acc_dtype=self.acc_dtype,
        )  # fmt: skip

    @property
    def blocks(self) -> int:
        """How many runs of `block` output channels there are."""
        return ceil_div(self.out_channels, self.block)

    @property
    def is_integer(self) -> bool:
        """Whether the sum is exact, in integers."""
        return self.acc_dtype != "float32"

    @property
    def values_shape(self) -> tuple[int, ...]:
        """[entries, block] or [entries / group, block, group]."""
        if self.group == 1:
            return (self.entries, self.block)
        return (self.entries // self.group, self.block, self.group)

    @property
    def pitches(self) -> tuple[int, int]:
        """Elements from one row of the data to the next, of a copy where it is padded; and from one
        column to the next."""
        row = self.dense.padded_width * self.in_channels
        if any(self.padding):
            row = unaliased_row(row, 4 if self.data_dtype == "float32" else 1)
        return row, self.in_channels

    @property
    def tap_bits(self) -> int:
        """Bits of an offset `by_channel` that name the tap."""
        return (self.kernel[0] * self.kernel[1] - 1).bit_length()

    @property
    def offsets_dtype(self) -> str:
        """uint16 where every offset of the window fits, else int32."""
        if self.by_channel:
            return "uint16" if self.in_channels << self.tap_bits <= 2**16 else "int32"
        row, column = self.pitches
        last = (self.kernel[0] - 1) * self.dilation[0] * row
        last += (self.kernel[1] - 1) * self.dilation[1] * column + self.in_channels - 1
        return "uint16" if last < 2**16 else "int32"

    @property
    def data_shape(self) -> tuple[int, ...]:
        """[batch, height, width, in_channels], or [width, in_channels]."""
        return self.dense.data_shape[2 if self.is_flat else 0 :]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """[batch, out_height, out_width, out_channels], or [width, out_channels]."""
        return self.dense.output_shape[2 if self.is_flat else 0 :]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call: those of the weights that are there."""
        positions = self.dense.macs // (self.dense.reduction_size * self.out_channels)
        return positions * self.entries * self.block


@dataclass(frozen=True, kw_only=True)
class Conv2dTransposeSpec(_ConvolutionSpec):
    """2-D transposed convolution, NHWC data, weight [kh, kw, in_channels / groups, out_channels].

    Defined as: insert strides - 1 times `pad_value` between the input's values, pad that with
    `pad_value`, and correlate with the kernel turned by 180 degrees. `padding` (top, left, bottom,
    right) is what the operator cuts off the full result; `output_padding` (rows, columns) is added
    at the bottom and right.
    """

    family: ClassVar[str] = "conv2d_transpose"

    output_padding: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(min(self.padding + self.output_padding) >= 0, f"negative padding in {self}")
        _require(
            self.out_height >= 1 and self.out_width >= 1, f"padding cuts everything off: {self}"
        )

    @property
    def out_height(self) -> int:
        """Rows of the result."""
        full = (self.height - 1) * self.strides[0] + self.dilation[0] * (self.kernel[0] - 1) + 1
        return full - self.padding[0] - self.padding[2] + self.output_padding[0]

    @property
    def out_width(self) -> int:
        """Columns of the result."""
        full = (self.width - 1) * self.strides[1] + self.dilation[1] * (self.kernel[1] - 1) + 1
        return full - self.padding[1] - self.padding[3] + self.output_padding[1]

    @property
    def macs(self) -> int:
        """Multiply-accumulates that touch real input values, borders ignored."""
        return self.batch * self.height * self.width * self.out_channels * self.reduction_size


@dataclass(frozen=True, kw_only=True)
class MatmulSpec(WeightedSpec):
    """data [rows, in_features] times weight [in_features, out_features].

    int4 weights are stored as uint8 [ceil(in_features/2), out_features], row 2j in the low nibble.
    """

    family: ClassVar[str] = "matmul"
    plain_layout: ClassVar[str] = "KN"

    rows: int
    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(min(self.rows, self.in_features, self.out_features) >= 1, f"a size < 1 in {self}")

    @property
    def reduction(self) -> tuple[int, int, int]:
        return 1, 1, self.in_features

    @property
    def columns(self) -> int:
        return self.out_features

    @property
    def data_shape(self) -> tuple[int, ...]:
        """[rows, in_features]."""
        return (self.rows, self.in_features)

    @property
    def plain_weight_shape(self) -> tuple[int, ...]:
        return (self.in_features, self.out_features)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """[rows, out_features]."""
        return (self.rows, self.out_features)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        return self.rows * self.in_features * self.out_features


@dataclass(frozen=True, kw_only=True)
class SparseRowsSpec(KernelSpec):
    """A linear layer of few rows most of whose weights are zero: a bit of each says whether it is
    stored.

    Blocks of `LANES` outputs, weights of a block in a fixed order: input by input, or four inputs
    by four where `group` is 4 (bytes), there output by output. `words` [blocks * words of a block]
    hold 64 bits each in this order, of weights, or `shared`, of inputs that all outputs of a block
    read. `values` are those whose bits are set, `group` by `group`; `starts` says where every
    `RUN` words begin, counted in bits.
    """

    family: ClassVar[str] = "sparse_rows"
    LANES: ClassVar[int] = 16
    RUN: ClassVar[int] = 8

    rows: int
    in_features: int
    out_features: int
    data_dtype: str = "float32"
    weight_dtype: str = "float32"
    acc_dtype: str = "float32"
    group: int = 1
    shared: bool = False
    stored: int
    """Values, those included that nobody asks for."""
    longest: int
    """Most bits that a block sets, a multiple of `group` where they are `shared`."""

    def __post_init__(self) -> None:
        _require(min(self.rows, self.in_features, self.out_features) >= 1, f"a size < 1 in {self}")
        _require(
            (self.data_dtype, self.weight_dtype, self.acc_dtype, self.group)
            in (("float32", "float32", "float32", 1), ("uint8", "int8", "int32", 4)),
            f"neither floats one by one nor bytes four by four: {self}",
        )

    @property
    def is_integer(self) -> bool:
        """Whether the sum is exact, in integers."""
        return self.acc_dtype != "float32"

    @property
    def blocks(self) -> int:
        """How many runs of `LANES` outputs there are."""
        return ceil_div(self.out_features, self.LANES)

    @property
    def inputs_of_a_word(self) -> int:
        """Inputs whose weights one word is about."""
        return 64 if self.shared else 64 // self.LANES

    @property
    def words_of_a_block(self) -> int:
        """Words of a block."""
        return ceil_div(self.in_features, self.inputs_of_a_word)

    @property
    def starts_of_a_block(self) -> int:
        """Runs of words of a block."""
        return ceil_div(self.words_of_a_block, self.RUN)

    @property
    def data_shape(self) -> tuple[int, int]:
        """[rows, in_features]."""
        return (self.rows, self.in_features)

    @property
    def output_shape(self) -> tuple[int, int]:
        """[rows, out_features]."""
        return (self.rows, self.out_features)

    @property
    def dense(self) -> MatmulSpec:
        """The same layer with all its weights."""
        return MatmulSpec(
            rows=self.rows, in_features=self.in_features, out_features=self.out_features,
            data_dtype=self.data_dtype, weight_dtype=self.weight_dtype, acc_dtype=self.acc_dtype,
        )  # fmt: skip

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call: of `shared` bits those that are there."""
        return self.rows * self.stored if self.shared else self.dense.macs


@dataclass(frozen=True, kw_only=True)
class BatchMatmulSpec(KernelSpec):
    """sum over k of (a - a_zero_point) * (b - b_zero_point), both operands known at run time only.

    a [batch, rows, depth], b [batch or 1, depth, columns] ([.., columns, depth] with
    `transpose_b`), result [batch, rows, columns].
    """

    family: ClassVar[str] = "batch_matmul"

    batch: int
    rows: int
    depth: int
    columns: int
    b_batch: int = 0
    """Batch of b: `batch` (0 means the same) or 1."""
    a_dtype: str = "float32"
    b_dtype: str = "float32"
    acc_dtype: str = "float32"
    a_zero_point: int = 0
    b_zero_point: int = 0
    transpose_b: bool = False

    def __post_init__(self) -> None:
        if not self.b_batch:
            object.__setattr__(self, "b_batch", self.batch)
        _require(min(self.batch, self.rows, self.depth, self.columns) >= 1, f"a size < 1 in {self}")
        _require(
            self.b_batch in (1, self.batch), f"b_batch {self.b_batch} is neither 1 nor {self.batch}"
        )
        for dtype in (self.a_dtype, self.b_dtype):
            _require(dtype in DATA_DTYPES, f"dtype {dtype!r} not in {DATA_DTYPES}")
        floats = {self.a_dtype == "float32", self.b_dtype == "float32", self.acc_dtype == "float32"}
        _require(len(floats) == 1, f"float32 and integers mixed in {self}")

    @property
    def is_integer(self) -> bool:
        """Whether the sum is exact, in integers."""
        return self.acc_dtype != "float32"

    @property
    def a_shape(self) -> tuple[int, int, int]:
        """[batch, rows, depth]."""
        return (self.batch, self.rows, self.depth)

    @property
    def b_shape(self) -> tuple[int, int, int]:
        """[b_batch, depth, columns] or its transpose."""
        if self.transpose_b:
            return (self.b_batch, self.columns, self.depth)
        return (self.b_batch, self.depth, self.columns)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """[batch, rows, columns]."""
        return (self.batch, self.rows, self.columns)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        return self.batch * self.rows * self.depth * self.columns
