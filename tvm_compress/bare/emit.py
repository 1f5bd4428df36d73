"""A built program => the files of a C project. README.md of this folder says what is in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArtefactError
from .archive import archive
from .cmake import TOOLCHAIN, cmake_lists, toolchain_file
from .float_calls import definitions
from .kernel_code import c_type
from .program import COPY, KernelCall, Program, Tensor
from .readme import readme

if TYPE_CHECKING:
    from .build import BareBuilt
    from .compile import CompiledKernel

INTERFACE = "interface.json"
INTERFACE_VERSION = 2  # of that file
GOLDEN_SAMPLES = 2
_RESERVED = frozenset(
    "auto bool break case char const continue default do double else enum extern false float for "
    "goto if inline int long main register restrict return short signed sizeof static struct "
    "switch true typedef union unsigned void volatile while".split()
)
_NOTE = "/* Written by tvm-compress; changes are lost when it runs again. */\n"


@dataclass(frozen=True)
class Port:
    """An input or output of the C function. `source` is the model's own name for it."""

    source: str
    c_name: str
    tensor: Tensor
    scale: float | None
    zero_point: int
    converted: bool
    ties_away: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.source,
            "c_name": self.c_name,
            "shape": list(self.tensor.shape),
            "dtype": self.tensor.dtype,
            "bytes": self.tensor.bytes,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "converted": self.converted,
            "ties_away": self.ties_away,
        }


@dataclass(frozen=True)
class Golden:
    """Samples with the reference's results, [samples, bytes of a port] for each port."""

    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]


def c_identifier(text: str, prefix: str = "model") -> str:
    """A name that C takes."""
    name = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_").lower()
    if not name or name[0].isdigit() or name in _RESERVED:
        name = f"{prefix}_{name}".rstrip("_")
    return name


def write_project(
    built: BareBuilt,
    name: str,
    sources: tuple[Sequence[str], Sequence[str]],
    folder: Path,
    golden: Golden | None = None,
) -> None:
    """Write the project into `folder`, which exists.

    `name` is a C identifier; `sources` are the model's names of its inputs and outputs.
    """
    from ..targets.runtime_files import runtime_files

    project = _Project(built, name, sources)
    files = dict(project.files(golden))
    if golden is not None:
        files["README.md"] = readme(name, built.target, built.form)
    if built.target.machine:
        for path, text in runtime_files(built.target).items():
            files[f"runtime/{path}"] = text
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())


def _loops(kernel: CompiledKernel) -> list[str]:
    """Functions in assembly that a kernel's code names: it may share them with other kernels."""
    named = {name.decode() for name in re.findall(rb"\btvmc_\w+", kernel.code)}
    return sorted(named - {kernel.symbol})


class _Project:
    def __init__(
        self, built: BareBuilt, name: str, sources: tuple[Sequence[str], Sequence[str]]
    ) -> None:
        self.built, self.name = built, name
        self.upper = name.upper()
        self.program: Program = built.program
        self.inputs = self._ports(self.program.inputs, sources[0], built.inputs)
        self.outputs = self._ports(self.program.outputs, sources[1], built.outputs)
        self.kernels = {kernel.symbol: kernel for kernel in built.kernels}
        self.constants = {
            tensor.name: f"{name}_{tensor.name}"
            for tensor in self.program.constants
            if any(tensor.name in call.arguments for call in self.program.calls)
        }

    def _ports(
        self, names: Sequence[str], sources: Sequence[str], edges: Sequence[Any]
    ) -> tuple[Port, ...]:
        found: list[Port] = []
        for tensor, source, edge in zip(names, sources, edges, strict=True):
            wanted = c_identifier(source, "tensor")
            taken = {port.c_name for port in found}
            c_name, number = wanted, 1
            while c_name in taken:
                number += 1
                c_name = f"{wanted}_{number}"
            found.append(
                Port(
                    source,
                    c_name,
                    self.program.tensors[tensor],
                    edge.scale,
                    edge.zero_point,
                    edge.converted,
                    edge.ties_away,
                )
            )
        return tuple(found)

    def files(self, golden: Golden | None) -> Iterator[tuple[str, str | bytes]]:
        name = self.name
        yield f"{name}.h", self.header()
        yield f"{name}.c", self.source()
        yield f"{name}_kernels.h", self.kernel_header()
        yield f"{name}_constants.h", self.constant_header()
        yield f"{name}_constants.c", self.constant_source()
        if self.built.form == "c":
            yield f"{name}_kernels.c", self.kernel_source()
        else:
            yield (
                self.archive_name,
                archive([(f"{k.symbol}.o", k.code, [k.symbol]) for k in self.built.kernels]),
            )
        yield f"{name}_io.h", self.io_header()
        yield "runtime/model-io.h", self.model_io()
        if golden is not None:
            yield "golden.h", self.golden_header()
            yield "golden.c", self.golden_source(golden)
            yield "selftest.c", self.selftest()
        yield "CMakeLists.txt", self.cmake(golden is not None)
        if self.built.target.machine:
            yield TOOLCHAIN, toolchain_file(self.built.target)
        yield INTERFACE, json.dumps(self.interface(golden), indent=1) + "\n"

    @property
    def archive_name(self) -> str:
        return f"lib{self.name}_kernels.a"

    @property
    def _parameters(self) -> str:
        return f"const {self.name}_inputs *inputs, const {self.name}_outputs *outputs, void *arena"

    # --- the interface --------------------------------------------------------------------------

    def header(self) -> str:
        built, name, upper = self.built, self.name, self.upper
        lines = [
            _NOTE + f"#ifndef {upper}_H\n#define {upper}_H\n\n#include <stdbool.h>\n"
            '#include <stdint.h>\n\n#ifdef __cplusplus\nextern "C" {\n#endif\n',
            self._needs(),
            "/* Memory that the caller lends for the time of a call. */",
            f"#define {upper}_ARENA_BYTES {max(built.arena_bytes, 1)}",
            "/* Addresses of the arena, of inputs and of outputs are multiples of it. */",
            f"#define {upper}_ALIGNMENT {built.alignment}",
            "",
        ]
        for kind, ports in (("INPUT", self.inputs), ("OUTPUT", self.outputs)):
            lines.append(f"#define {upper}_{kind}S {len(ports)}")
            for index, port in enumerate(ports):
                lines += self._port_lines(f"{upper}_{kind}_{index}", port)
            lines.append("")
        lines += [
            self._struct("inputs", self.inputs, "const "),
            self._struct("outputs", self.outputs, ""),
            "/* One inference. Keeps no state: calls with different arenas may run at once.",
            f" * 0: done; 1: an address is no multiple of {upper}_ALIGNMENT: nothing was done. */",
            f"int {name}_run({self._parameters});\n",
            *self._conversions(),
            f"#ifdef __cplusplus\n}}\n#endif\n\n#endif /* {upper}_H */\n",
        ]
        return "\n".join(lines)

    def _needs(self) -> str:
        functions = self.built.library_functions
        if not functions:
            return "/* Needs memcpy, memset and the compiler's own helpers, and nothing else. */"
        named = ", ".join(functions)
        return f"/* Layers that stayed float call {named}: link the mathematical library (-lm). */"

    def _port_lines(self, macro: str, port: Port) -> Iterator[str]:
        tensor = port.tensor
        shape = " x ".join(map(str, tensor.shape)) or "one number"
        yield f"/* {_comment(port.source)}: {shape}, {tensor.dtype}"
        if port.scale is None:
            yield " * The numbers are what they are. */"
        else:
            yield " * real value = SCALE * (number - ZERO_POINT) */"
        yield f"#define {macro}_TYPE {c_type(tensor.dtype)}"
        yield f"#define {macro}_BYTES {tensor.bytes}"
        yield f"#define {macro}_ELEMENTS {int(np.prod(tensor.shape, dtype=np.int64))}"
        if port.scale is not None:
            yield f"#define {macro}_SCALE {_float(port.scale)}"
            yield f"#define {macro}_ZERO_POINT ({port.zero_point})"

    def _struct(self, kind: str, ports: Sequence[Port], const: str) -> str:
        fields = "".join(f"    {const}{c_type(p.tensor.dtype)} *{p.c_name};\n" for p in ports)
        return f"typedef struct {{\n{fields}}} {self.name}_{kind};\n"

    def _conversions(self) -> Iterator[str]:
        """Functions between real numbers and codes, for who has floats; the network uses none."""
        for index, port in enumerate(self.inputs):
            if port.scale is not None:
                yield self._quantise(index, port)
        for index, port in enumerate(self.outputs):
            if port.scale is not None:
                yield self._dequantise(index, port)

    def _quantise(self, index: int, port: Port) -> str:
        limits = np.iinfo(port.tensor.dtype)
        macro = f"{self.upper}_INPUT_{index}"
        low, high = limits.min - port.zero_point, limits.max - port.zero_point
        ties, reaches = "to even", "size > middle || (size == middle && (whole & 1))"
        if port.ties_away:
            ties, reaches = "away from zero", "size >= middle"
        return f"""/* A real number as a code of input {index}: nearest, ties {ties}, clamped. */
static inline {macro}_TYPE {self.name}_quantize_input_{index}(float value) {{
    volatile float steps = value / {macro}_SCALE; /* rounded to float before it is compared */
    float size = steps < 0.0f ? -steps : steps, middle;
    int32_t whole, sum;
    if (!(size < 4194304.0f)) size = 4194304.0f;
    whole = (int32_t)size;
    middle = (float)whole + 0.5f;
    if ({reaches}) ++whole;
    sum = steps < 0.0f ? -whole : whole;
    if (sum < {low}) sum = {low};
    if (sum > {high}) sum = {high};
    return ({macro}_TYPE)(sum + {macro}_ZERO_POINT);
}}
"""

    def _dequantise(self, index: int, port: Port) -> str:
        macro = f"{self.upper}_OUTPUT_{index}"
        return f"""/* A code of output {index} as a real number. */
static inline float {self.name}_dequantize_output_{index}({macro}_TYPE code) {{
    return (float)((int32_t)code - {macro}_ZERO_POINT) * {macro}_SCALE;
}}
"""

    def interface(self, golden: Golden | None) -> dict[str, Any]:
        built = self.built
        return {
            "version": INTERFACE_VERSION,
            "name": self.name,
            "target": built.target.name,
            "form": built.form,
            "library_functions": list(built.library_functions),
            "arena_bytes": max(built.arena_bytes, 1),
            "alignment": built.alignment,
            "constant_bytes": sum(self.program.tensors[tensor].bytes for tensor in self.constants),
            "golden_samples": 0 if golden is None else len(golden.inputs[0]),
            "inputs": [port.to_json() for port in self.inputs],
            "outputs": [port.to_json() for port in self.outputs],
            "calls": [
                {"symbol": call.symbol, "layers": list(call.layers), "outputs": list(call.outputs),
                 "loops": _loops(self.kernels[call.symbol])}
                for call in self.program.calls
            ],
            "observed": [
                {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype,
                 "layers": list(call.layers)}
                for call in self.program.calls
                for tensor in self._observed(call)
            ],
        }  # fmt: skip

    def _observed(self, call: KernelCall) -> list[Tensor]:
        """What a call leaves in the arena."""
        tensors = (self.program.tensors[name] for name in call.outputs)
        return [tensor for tensor in tensors if tensor.role == "activation"]

    def io_header(self) -> str:
        """The same function with arrays of pointers, for programs that know no model."""
        name, guard = self.name, f"{self.upper}_IO_H"
        text = _NOTE + f'#ifndef {guard}\n#define {guard}\n\n#include "{name}.h"\n\n'
        text += (
            f"static inline int {name}_run_arrays(\n"
            "    const void *const *in, void *const *out, void *arena) {\n"
            f"    {name}_inputs inputs;\n    {name}_outputs outputs;\n"
        )
        for index, port in enumerate(self.inputs):
            kind = c_type(port.tensor.dtype)
            text += f"    inputs.{port.c_name} = (const {kind} *)in[{index}];\n"
        for index, port in enumerate(self.outputs):
            kind = c_type(port.tensor.dtype)
            text += f"    outputs.{port.c_name} = ({kind} *)out[{index}];\n"
        return text + f"    return {name}_run(&inputs, &outputs, arena);\n}}\n\n#endif\n"

    def model_io(self) -> str:
        """What `runtime/main.c`, which knows no model, includes."""
        text = _NOTE + f'#ifndef Model_IO_H\n#define Model_IO_H\n\n#include "{self.name}_io.h"\n\n'
        for kind, ports in (("INPUT", self.inputs), ("OUTPUT", self.outputs)):
            sizes = [port.tensor.bytes for port in ports]
            text += f"#define Model_{kind}_BYTES {{{', '.join(f'{size}u' for size in sizes)}}}\n"
            room = sum(-(-size // 16) * 16 for size in sizes)
            text += f"#define Model_{kind}_BUFFER_BYTES {room}u\n"
        text += f"#define Model_ARENA_BYTES {self.upper}_ARENA_BYTES\n"
        return text + f"#define Model_RUN {self.name}_run_arrays\n\n#endif\n"

    # --- the calls ------------------------------------------------------------------------------

    def source(self) -> str:
        name, upper = self.name, self.upper
        checked = [f"(uintptr_t)inputs->{port.c_name}" for port in self.inputs] + [
            f"(uintptr_t)outputs->{port.c_name}" for port in self.outputs
        ]
        body = "".join(
            f"    if ({address} % {upper}_ALIGNMENT != 0) return 1;\n"
            for address in (*checked, "(uintptr_t)arena")
        )
        uses_memory = any(call.workspaces for call in self.program.calls) or any(
            tensor.role == "activation" for tensor in self.program.tensors.values()
        )
        if uses_memory:
            body = "    uint8_t *const memory = (uint8_t *)arena;\n" + body
        observed = 0
        for step, call in enumerate(self.program.calls):
            layers = ", ".join(call.layers)
            if layers:
                body += f"    /* {_comment(layers)} */\n"
            body += self._call(call, self.built.plan.steps[step])
            for tensor in self._observed(call):
                where = self._address(tensor.name, None)
                body += f"    {upper}_OBSERVE({observed}, {where}, {tensor.bytes});\n"
                observed += 1
        return (
            _NOTE + f'#include "{name}.h"\n\n#include <string.h>\n\n'
            f'#include "{name}_constants.h"\n#include "{name}_kernels.h"\n\n'
            "/* Define it to look at what a layer has written: number among `observed` of\n"
            " * interface.json, address, bytes. */\n"
            f"#ifndef {upper}_OBSERVE\n#define {upper}_OBSERVE(tensor, data, bytes) ((void)0)\n"
            "#endif\n\n"
            f"int {name}_run({self._parameters}) {{\n{body}    return 0;\n}}\n"
            + self._float_calls()
        )

    def _float_calls(self) -> str:
        if self.built.form == "c":
            return ""
        return definitions((kernel.code for kernel in self.built.kernels), self.built.target)

    def _call(self, call: KernelCall, step: str) -> str:
        if call.symbol == COPY:
            source, destination = call.arguments
            size = self.program.tensors[destination].bytes
            return (
                f"    memcpy({self._address(destination, None)}, "
                f"{self._address(source, None)}, {size});\n"
            )
        kernel = self.kernels[call.symbol]
        arguments = [
            self._address(name, kind)
            for name, kind in zip(call.arguments, kernel.parameters, strict=False)
        ]
        base = self.built.plan.arena.offsets.get(f"{step}.workspace", 0)
        for (_, offset), kind in zip(
            call.workspaces, kernel.parameters[len(call.arguments) :], strict=True
        ):
            arguments.append(f"({kind} *)(memory + {base + offset})")
        joined = ",\n        ".join(arguments)
        return f"    {call.symbol}(\n        {joined});\n"

    def _address(self, name: str, kind: str | None) -> str:
        """Where a tensor lies, as a pointer to `kind`."""
        tensor = self.program.tensors[name]
        cast = f"({kind} *)" if kind is not None else ""
        if tensor.role == "constant":
            return f"{cast}{self.constants[name]}"
        if tensor.role == "activation":
            return f"{cast}(memory + {self.built.plan.arena.offsets[name]})"
        side, ports = ("inputs", self.inputs) if tensor.role == "input" else (
            "outputs", self.outputs
        )  # fmt: skip
        port = next(port for port in ports if port.tensor.name == name)
        return f"{cast}{side}->{port.c_name}"

    def kernel_header(self) -> str:
        """Kernels only read what they get as inputs, though their types do not say so."""
        text = _NOTE + f"#ifndef {self.upper}_KERNELS_H\n#define {self.upper}_KERNELS_H\n\n"
        text += "#include <stdbool.h>\n#include <stdint.h>\n\n"
        for kernel in self.built.kernels:
            text += f"void {kernel.symbol}({', '.join(f'{t} *' for t in kernel.parameters)});\n"
        return text + "\n#endif\n"

    def kernel_source(self) -> str:
        math = "#include <math.h>\n\n" if self.built.library_functions else ""
        text = _NOTE + f'#include "{self.name}_kernels.h"\n\n{math}'
        return text + "\n".join(kernel.code.decode() for kernel in self.built.kernels)

    # --- constants ------------------------------------------------------------------------------

    def constant_header(self) -> str:
        text = _NOTE + f"#ifndef {self.upper}_CONSTANTS_H\n#define {self.upper}_CONSTANTS_H\n\n"
        text += "#include <stdbool.h>\n#include <stdint.h>\n\n"
        for tensor, symbol in self.constants.items():
            text += f"extern {self._constant(tensor, symbol)};\n"
        return text + "\n#endif\n"

    def constant_source(self) -> str:
        text = _NOTE + f'#include "{self.name}_constants.h"\n\n'
        for tensor, symbol in self.constants.items():
            content = self.program.tensors[tensor].content
            assert content is not None
            attribute = f"__attribute__((aligned({self._constant_alignment(tensor)})))"
            text += f"{self._constant(tensor, symbol)} {attribute} = {_initialiser(content)};\n"
        return text

    def _constant(self, tensor: str, symbol: str) -> str:
        content = self.program.tensors[tensor].content
        assert content is not None
        return f"const {c_type(str(content.dtype))} {symbol}[{max(content.size, 1)}]"

    def _constant_alignment(self, tensor: str) -> int:
        return self.built.alignment

    # --- test -----------------------------------------------------------------------------------

    def golden_header(self) -> str:
        text = _NOTE + "#ifndef GOLDEN_H\n#define GOLDEN_H\n\n"
        text += f'#include "{self.name}.h"\n\n#define GOLDEN_SAMPLES {GOLDEN_SAMPLES}\n'
        for kind, ports in (("input", self.inputs), ("output", self.outputs)):
            for index, _ in enumerate(ports):
                stem = f"{self.upper}_{kind.upper()}_{index}"
                text += (
                    f"extern const {stem}_TYPE golden_{kind}_{index}"
                    f"[GOLDEN_SAMPLES][{stem}_ROOM];\n"
                )
        text = text.replace("extern", "@", 1)
        room = "".join(
            f"/* Elements of a sample, so that the next one is aligned as well. */\n"
            f"#define {self.upper}_{kind.upper()}_{index}_ROOM {self._room(port)}\n"
            for kind, ports in (("input", self.inputs), ("output", self.outputs))
            for index, port in enumerate(ports)
        )
        return text.replace("@", f"{room}extern", 1) + "\n#endif\n"

    def _room(self, port: Port) -> int:
        item = max(1, port.tensor.bytes // max(1, int(np.prod(port.tensor.shape))))
        size = -(-port.tensor.bytes // self.built.alignment) * self.built.alignment
        return size // item

    def golden_source(self, golden: Golden) -> str:
        text = _NOTE + '#include "golden.h"\n\n'
        sides = (("input", self.inputs, golden.inputs), ("output", self.outputs, golden.outputs))
        for kind, ports, arrays in sides:
            for index, (port, array) in enumerate(zip(ports, arrays, strict=True)):
                stem = f"{self.upper}_{kind.upper()}_{index}"
                rows = ",\n".join(_initialiser(row) for row in array[:GOLDEN_SAMPLES])
                text += (
                    f"const {stem}_TYPE golden_{kind}_{index}[GOLDEN_SAMPLES][{stem}_ROOM]\n"
                    f"    __attribute__((aligned({self.upper}_ALIGNMENT))) = {{\n{rows}}};\n"
                )
                del port
        return text

    def selftest(self) -> str:
        """Returns the number of samples with a wrong byte."""
        name, upper = self.name, self.upper
        aligned = f"__attribute__((aligned({upper}_ALIGNMENT)))"
        buffers = "".join(
            f"static {upper}_OUTPUT_{i}_TYPE found_{i}[{upper}_OUTPUT_{i}_ELEMENTS] {aligned};\n"
            for i, _ in enumerate(self.outputs)
        )
        sets = "".join(
            f"        inputs.{port.c_name} = golden_input_{i}[sample];\n"
            for i, port in enumerate(self.inputs)
        ) + "".join(
            f"        outputs.{port.c_name} = found_{i};\n" for i, port in enumerate(self.outputs)
        )
        checks = "".join(
            f"        wrong |= {_differs(i, upper, port)};\n" for i, port in enumerate(self.outputs)
        )
        return f"""{_NOTE}/* The network on samples with known results: returns how many fail. */
#include "golden.h"

#include <string.h>

static uint8_t arena[{upper}_ARENA_BYTES] {aligned};
{buffers}
int {name}_selftest(void);

int {name}_selftest(void) {{
    int failed = 0;
    for (int sample = 0; sample < GOLDEN_SAMPLES; ++sample) {{
        {name}_inputs inputs;
        {name}_outputs outputs;
        int wrong = 0;
{sets}        wrong |= {name}_run(&inputs, &outputs, arena);
{checks}        failed += wrong != 0;
    }}
    return failed;
}}

#ifndef {upper}_NO_MAIN
int main(void) {{ return {name}_selftest(); }}
#endif
"""

    def cmake(self, has_golden: bool) -> str:
        from ..targets.runtime_files import startup_sources

        is_c = self.built.form == "c"
        return cmake_lists(
            self.name,
            self.built.target,
            [
                f"{self.name}{part}.c"
                for part in ("", "_constants", *(["_kernels"] if is_c else []))
            ],
            archive=None if is_c else self.archive_name,
            is_mathematical=bool(self.built.library_functions),
            has_golden=has_golden,
            runtime=startup_sources(self.built.target),
        )


def _differs(index: int, upper: str, port: Port) -> str:
    del port
    stem = f"{upper}_OUTPUT_{index}"
    return f"memcmp(found_{index}, golden_output_{index}[sample], {stem}_BYTES) != 0"


def _comment(text: str) -> str:
    return text.replace("*/", "* /").replace("\n", " ")


def _float(value: float) -> str:
    """Nine digits give every float32 back."""
    return f"{value:.9g}f" if re.search(r"[.e]", f"{value:.9g}") else f"{value:.9g}.0f"


def _initialiser(array: np.ndarray) -> str:
    flat = array.reshape(-1)
    if flat.dtype.kind == "f" and flat.dtype.itemsize >= 4:
        suffix = "f" if flat.dtype.itemsize == 4 else ""
        words = [_float_literal(float(value), suffix) for value in flat]
    elif flat.dtype.kind == "f":
        words = [str(value) for value in flat.view(np.uint16)]
    elif flat.dtype == np.int64:
        words = [_int64_literal(int(value)) for value in flat]
    else:
        words = [str(int(value)) for value in flat]
    lines, line = [], "  "
    for word in words:
        if len(line) + len(word) > 98:
            lines.append(line)
            line = "  "
        line += f" {word},"
    return "{\n" + "\n".join([*lines, line]) + "\n}"


def _int64_literal(value: int) -> str:
    return "INT64_MIN" if value == -(1 << 63) else f"{value}LL"


def _float_literal(value: float, suffix: str) -> str:
    if value != value:
        return '__builtin_nanf("")' if suffix else '__builtin_nan("")'
    if abs(value) == float("inf"):
        return f"{'-' if value < 0 else ''}__builtin_inf{suffix}()"
    return f"{value.hex()}{suffix}"


def read_interface(folder: Path) -> Mapping[str, Any]:
    """`interface.json` of a project. Raises `ArtefactError` for one of another version."""
    value: Mapping[str, Any] = json.loads((folder / INTERFACE).read_text(encoding="utf-8"))
    version = value.get("version", 1)
    if version != INTERFACE_VERSION:
        raise ArtefactError(
            f"{folder / INTERFACE} is of version {version}, not {INTERFACE_VERSION}: another "
            "version of tvm-compress wrote it; compress again"
        )
    return value
