"""The project's own README: how to use it, and how to check it on a board that nobody emulates."""

from __future__ import annotations

from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..targets import Target

_TEXT = Template("""\
# $name for $target

`add_subdirectory` this folder in CMake and link `$name`, or compile `$name.c` and
`${name}_constants.c` and link the kernels ($kernels).
Flags: `$flags`.
`$name.h` says what inputs and outputs are; memory is one block of `${upper}_ARENA_BYTES` bytes, and
nothing is allocated.

## Is it right on my board?

Under the emulator:

    cmake -S . -B build -D${upper}_SELFTEST=ON -DCMAKE_TOOLCHAIN_FILE=toolchain.cmake
    cmake --build build && ctest --test-dir build

On the board: `selftest.c` holds the network on samples with known results (`golden.c`). Put both
into your firmware, compile `selftest.c` with `-D${upper}_NO_MAIN`, and print what it returns:

    extern int ${name}_selftest(void);
    printf("%d samples differ\\n", ${name}_selftest()); /* 0: every bit is as it should be */

Without a serial port keep it in a `volatile int` and read that with the debugger. The samples take
flash; leave them out of what you ship.
$runtime""")

_RUNTIME = Template("""
## A file of samples through the board

`runtime/main.c` reads samples from `input.bin`, runs them, and writes `output.bin` and
`counters.bin`. All it asks of the machine is in `runtime/host.h`: $host

A sample in `input.bin` is every input of `$name.h` in turn, little-endian; one in `output.bin` is
every output. In Python, for one input of codes and `x` of shape [samples, ...]:

    import json, numpy as np
    port = json.load(open("interface.json"))["inputs"][0]
    limits = np.iinfo(port["dtype"])
    codes = np.clip(np.rint(x / port["scale"]) + port["zero_point"], limits.min, limits.max)
    codes.astype(port["dtype"]).tofile("input.bin")

The emulated board's answers to the same samples: compress with the CPU's name as `--target` instead
of the board's file, then `tvm-compress run OUT --input x.npz -o y.npz`. The integers are the same.
""")

_BARE = """with a
debugger attached `runtime/semihosting.c` does it as it is (OpenOCD: `arm semihosting enable`; files
lie in the folder that it was started in). Without one, write `host_read` and `host_write` over your
UART and answer them from a script. Take your board's own start-up code and linker script: those in
`runtime/` are for the emulated machine."""
_LINUX = """`runtime/linux/host.c`
does it by files, so the same program runs on the board: build it there or cross-compile it, copy
`input.bin`, run, fetch `output.bin`."""


def readme(name: str, target: Target, form: str) -> str:
    """Markdown for a project called `name`; `form` is one of `build.FORMS`."""
    from .build import C_FLAGS

    # Kernels that are machine code have been compiled with theirs.
    flags = [*target.compiler_flags, *(C_FLAGS if form == "c" else ())]
    facts = {
        "name": name,
        "upper": name.upper(),
        "target": target.name,
        "kernels": f"`lib{name}_kernels.a`" if form == "object" else f"`{name}_kernels.c`",
        "flags": " ".join(flags) or "none of its own",
        "host": _BARE if target.is_bare_metal else _LINUX,
    }
    runtime = _RUNTIME.substitute(facts) if target.machine else ""
    return _TEXT.substitute(facts, runtime=runtime)
