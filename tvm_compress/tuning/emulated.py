"""Candidates of one kernel in one program, run under the target's emulator: exact instructions.

Each is compiled as a C project has it; sample `2 n + d` of the program runs candidate `n` on data
set `d`. So one start of the emulator serves a batch, and the outputs come back for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArtefactError
from ..interrupts import check
from ..model import TensorSpec
from .worker import difference

if TYPE_CHECKING:
    from ..bare.compile import CompiledKernel
    from ..targets import Target

RUN = "run_candidate"
_CHOSEN = "candidate"
# An emulator does more than this many instructions a second, while its neighbours are busy.
_LEAST_SPEED = 10e6
_START_SECONDS = 20.0


@dataclass(frozen=True)
class DataSet:
    """Arguments of a kernel by position, and what the naive function makes of them."""

    arguments: Mapping[int, np.ndarray]
    expected: Mapping[int, np.ndarray]


@dataclass(frozen=True)
class Bench:
    """What candidates of a task are run with. `constants` are in the program, like weights are."""

    target: Target
    parameters: tuple[TensorSpec, ...]
    constants: Mapping[int, np.ndarray]
    is_integer: bool
    sets: tuple[DataSet, ...]
    is_checked: bool = True
    """Whether results are compared with what is expected."""
    takes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Symbol of a kernel => the parameters that it has; those that are not named have all."""

    def count(
        self, kernels: Sequence[CompiledKernel], folder: Path, instructions: float | None
    ) -> list[int | str]:
        """Instructions of one call of each kernel, the larger of the two data sets; a text says
        what is wrong with it.

        `instructions` is what one of them may take; None: unknown. Where one crashes or does not
        end, the others are run again in smaller programs.
        """
        try:
            return self._count(kernels, folder, instructions)
        except ArtefactError as error:
            check()  # Ctrl-C ends the emulator as well: nobody's fault
            if len(kernels) == 1:
                return [" ".join(str(error).split())]
        half = len(kernels) // 2
        return [
            *self.count(kernels[:half], folder, instructions),
            *self.count(kernels[half:], folder, instructions),
        ]

    def _count(
        self, kernels: Sequence[CompiledKernel], folder: Path, instructions: float | None
    ) -> list[int | str]:
        from tempfile import TemporaryDirectory

        from ..runners.project import Project, build_program
        from ..runners.run import run_program

        with TemporaryDirectory(dir=folder) as name:
            place = Path(name)
            objects = []
            for number, kernel in enumerate(kernels):
                objects.append(f"kernel{number}.o")
                (place / objects[-1]).write_bytes(kernel.code)
            sources = {
                "candidates.h": f"int {RUN}(const void *const *, void *const *, void *);\n",
                "candidates.c": self._calls(kernels),
                "constants.S": self._constants(place),
            }
            for file, text in sources.items():
                (place / file).write_text(text)
            project = Project(
                folder=place,
                header="candidates.h",
                run=RUN,
                arena_bytes=max(_arena(kernel)[1] for kernel in kernels),
                inputs=(TensorSpec(_CHOSEN, (1,), "int32"), *map(self._spec, self._data)),
                outputs=tuple(map(self._spec, self.sets[0].expected)),
                sources=("candidates.c", "constants.S"),
                objects=tuple(objects),
            )
            (place / "build").mkdir()
            program = build_program(project, self.target, place / "build")
            feeds = [
                {_CHOSEN: np.array([number], np.int32)}
                | {_name(index): data.arguments[index] for index in self._data}
                for number in range(len(kernels))
                for data in self.sets
            ]
            seconds = _START_SECONDS + len(feeds) * (instructions or 1e9) / _LEAST_SPEED
            result = run_program(program, feeds, count=True, seconds=seconds)
        counts = [
            total - functions.get(RUN, 0)
            for total, functions in zip(result.instructions or (), result.by_function, strict=True)
        ]
        step = len(self.sets)
        return [
            (self.is_checked and self._wrong(result.outputs[at : at + step]))
            or max(counts[at : at + step])
            for at in range(0, len(feeds), step)
        ]

    def _wrong(self, outputs: Sequence[Mapping[str, np.ndarray]]) -> str:
        for found, data in zip(outputs, self.sets, strict=True):
            for index, expected in data.expected.items():
                wrong = difference(found[_name(index)], expected, self.is_integer)
                if wrong:
                    return wrong
        return ""

    @property
    def _data(self) -> list[int]:
        return [i for i in self.sets[0].arguments if i not in self.constants]

    def _spec(self, index: int) -> TensorSpec:
        spec = self.parameters[index]
        return TensorSpec(_name(index), spec.shape, spec.dtype)

    def _constants(self, folder: Path) -> str:
        lines = ['.section .rodata.constants,"a"']
        for index, array in self.constants.items():
            path = folder / f"{_name(index)}.bin"
            path.write_bytes(np.ascontiguousarray(array).tobytes())
            quoted = str(path.resolve()).replace("\\", "\\\\").replace('"', '\\"')
            lines += [f".globl {_name(index)}", ".balign 64", f"{_name(index)}:"]
            lines.append(f'.incbin "{quoted}"')
        return "\n".join(lines) + "\n"

    def _calls(self, kernels: Sequence[CompiledKernel]) -> str:
        places = {index: f"inputs[{1 + n}]" for n, index in enumerate(self._data)}
        places |= {index: f"outputs[{n}]" for n, index in enumerate(self.sets[0].expected)}
        places |= {index: _name(index) for index in self.constants}
        declared = [f"extern const uint8_t {_name(index)}[];" for index in self.constants]
        cases = []
        for number, kernel in enumerate(kernels):
            pointers = [f"{kind} *" for kind in kernel.parameters]
            declared.append(f"void {kernel.symbol}({', '.join(pointers)});")
            takes = self.takes.get(kernel.symbol, range(len(self.parameters)))
            given = [places[index] for index in takes]
            given += [f"((uint8_t *)arena + {offset})" for offset in _arena(kernel)[0]]
            arguments = ", ".join(
                f"({pointer})(uintptr_t){place}"
                for pointer, place in zip(pointers, given, strict=True)
            )
            cases.append(f"    case {number}: {kernel.symbol}({arguments}); return 0;")
        return "\n".join(
            [
                '#include "candidates.h"',
                "#include <stdbool.h>",
                "#include <stdint.h>",
                *declared,
                f"int {RUN}(const void *const *inputs, void *const *outputs, void *arena) {{",
                "    (void)outputs, (void)arena;",
                "    switch (*(const int32_t *)inputs[0]) {",
                *cases,
                "    }",
                "    return 1;",
                "}",
                "",
            ]
        )


def _name(index: int) -> str:
    return f"argument{index}"


def _arena(kernel: CompiledKernel) -> tuple[list[int], int]:
    """Offsets of the workspaces, and how many bytes they take together."""
    offsets, end = [], 0
    for workspace in kernel.workspaces:
        offsets.append(end)
        end += -(-workspace.bytes // kernel.alignment) * kernel.alignment
    return offsets, end
