"""Looking into a C project while it runs: a checksum of every tensor that a layer has written.

A tensor in the arena is overwritten by later ones, so that it can only be looked at when it is
made: `NAME.c` calls the macro `NAME_OBSERVE`, which is empty unless it is defined.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..model import TensorSpec
from ..runners.project import Project

SUMS = "tvmc_sums"  # the further output
_HEADER = """#include <stdint.h>
void tvmc_observe(uint32_t tensor, const void *data, uint32_t bytes);
int tvmc_run_observed(const void *const *inputs, void *const *outputs, void *arena);
"""
# CRC-32 by half bytes, as zlib's.
_SOURCE = """
static uint32_t *sums;

void tvmc_observe(uint32_t tensor, const void *data, uint32_t bytes) {
    static const uint32_t table[16] = {
        0x00000000u, 0x1db71064u, 0x3b6e20c8u, 0x26d930acu, 0x76dc4190u, 0x6b6b51f4u,
        0x4db26158u, 0x5005713cu, 0xedb88320u, 0xf00f9344u, 0xd6d6a3e8u, 0xcb61b38cu,
        0x9b64c2b0u, 0x86d3d2d4u, 0xa00ae278u, 0xbdbdf21cu};
    const uint8_t *next = (const uint8_t *)data;
    uint32_t sum = 0xffffffffu;
    while (bytes-- > 0) {
        sum ^= *next++;
        sum = (sum >> 4) ^ table[sum & 15u];
        sum = (sum >> 4) ^ table[sum & 15u];
    }
    sums[tensor] = ~sum;
}
"""


def observed_project(project: Project, name: str, tensors: int, folder: Path) -> Project:
    """The same project with `SUMS`, a checksum for each of `tensors`, behind its outputs.

    Files of its own are written to `folder`.
    """
    (folder / "observe.h").write_text(_HEADER)
    source = folder / "observe.c"
    source.write_text(
        f'#include "observe.h"\n#include "{project.header}"\n{_SOURCE}\n'
        "int tvmc_run_observed(const void *const *inputs, void *const *outputs, void *arena) {\n"
        f"    sums = (uint32_t *)outputs[{len(project.outputs)}];\n"
        f"    return {project.run}(inputs, outputs, arena);\n}}\n"
    )
    return replace(
        project,
        header="observe.h",
        run="tvmc_run_observed",
        outputs=(*project.outputs, TensorSpec(SUMS, (tensors,), "uint32")),
        sources=(*project.sources, str(source)),
        include_folders=(*project.include_folders, str(folder)),
        flags=(
            *project.flags,
            "-include",
            str(folder / "observe.h"),
            f"-D{name.upper()}_OBSERVE=tvmc_observe",
        ),
    )


def checksum(array: np.ndarray) -> int:
    """Of a tensor as it lies in memory."""
    return zlib.crc32(np.ascontiguousarray(array).tobytes())
