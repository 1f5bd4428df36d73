"""Board files: what they change of a CPU's target, what is refused, their schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from tvm_compress.bare.session import cannot_run
from tvm_compress.board_file import (
    board_schema,
    find_target,
    parse_board,
    target_entry,
    target_of_entry,
)
from tvm_compress.errors import TargetError
from tvm_compress.targets import get_target
from tvm_compress.tuning.tune import emulated

TEXT = """\
version: 1
cpu: cortex-m4
flash_address: 0x08000000
flash_bytes: 524288
ram_address: 0x20000000
ram_bytes: 98304
"""


def test_a_board_is_its_cpu_with_other_memories(tmp_path: Path) -> None:
    path = tmp_path / "my_board.yaml"
    path.write_text(TEXT)
    board, cpu = find_target(path), get_target("cortex-m4")
    assert board.name == "my_board" and board.tvm_options == cpu.tvm_options
    assert (board.flash_bytes, board.ram_bytes) == (524288, 98304)
    assert (board.flash_address, board.ram_address) == (0x08000000, 0x20000000)
    assert board.runner == "qemu_system" and board.machine == cpu.machine
    assert find_target("cortex-m4") is cpu
    path.write_text(TEXT + "name: lamp\ndescription: A lamp\nrunner: serial\n")
    assert find_target(str(path)).name == "lamp"
    assert find_target(path).runner == "serial"
    reason = cannot_run(find_target(path))
    assert reason is not None and "yourself (runner: serial); deploy/README.md says how" in reason
    assert emulated(find_target(path)).runner == "qemu_system"  # tuned under the emulator


def test_an_artefact_needs_the_file_no_more(tmp_path: Path) -> None:
    path = tmp_path / "my_board.yaml"
    path.write_text(TEXT)
    target = find_target(path)
    entry = json.loads(json.dumps(target_entry(target, path)))
    path.unlink()
    assert target_of_entry(entry).fingerprint() == target.fingerprint()
    plain = json.loads(json.dumps(target_entry(get_target("cortex-m55"), "cortex-m55")))
    assert target_of_entry(plain) is get_target("cortex-m55")
    with pytest.raises(TargetError, match="damaged"):
        target_of_entry({"name": "x", "board": {"cpu": "cortex-m4", "memory": 3}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("version: 1\n", ""), "has `version: 1`"),
        (("version: 1", "version: 2"), "has `version: 1`"),
        (("ram_bytes", "ram_byte"), r"my.yaml:6: unknown key 'ram_byte'.*did you mean 'ram_bytes'"),
        (("98304", "many"), "my.yaml:6"),
        (("98304", "-1"), "ram_bytes is from 1"),
        (("cpu: cortex-m4\n", ""), "needs the key 'cpu'"),
        (("version: 1", "version: 1\nrunner: telepathy"), "runner"),
        (("version: 1", "version: 1\nname: a/b"), "slash"),
        (("version: 1", "- 1"), "my.yaml"),
        ((TEXT, ""), r"my.yaml: empty; a board file starts with `version: 1`"),
        (("0x20000000", "0x20000004"), r"my.yaml:.*ram_address 0x20000004 is not a multiple of 8"),
    ],
)
def test_mistakes_are_named_with_their_line(change: tuple[str, str], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        parse_board(TEXT.replace(*change), "my.yaml")


def test_memories_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(TEXT.replace("0x20000000", "0x0807fff8"))
    reason = "my.yaml: flash_address, ram_address: flash 0x8000000-0x807ffff and RAM 0x807fff8-0x"
    with pytest.raises(TargetError, match=reason):
        find_target(path)
    path.write_text(TEXT.replace("0x20000000", "0x08080000"))  # they may touch
    find_target(path)


def test_unknown_cpu_and_file(tmp_path: Path) -> None:
    for cpu, reason in (("cortex_m4", "did you mean"), ("host", "is no CPU of a board")):
        path = tmp_path / "my.yaml"
        path.write_text(TEXT.replace("cortex-m4", cpu))
        with pytest.raises(TargetError, match=f"my.yaml: cpu.*{reason}"):
            find_target(path)
    with pytest.raises(TargetError, match="did you mean 'cortex-m4'"):
        parse_board(TEXT.replace("cortex-m4", "cortex_m4"), "my.yaml").target("x")
    with pytest.raises(TargetError, match="is no CPU of a board"):
        parse_board(TEXT.replace("cortex-m4", "host"), "my.yaml").target("x")
    with pytest.raises(TargetError, match="No such file"):
        find_target(tmp_path / "none.yaml")


def test_schema_takes_what_the_parser_takes() -> None:
    schema = board_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(TEXT), schema)
    for wrong in ("cpu: 3", "colour: red", "flash_bytes: many"):
        data = {**yaml.safe_load(TEXT), **yaml.safe_load(wrong)}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data, schema)
