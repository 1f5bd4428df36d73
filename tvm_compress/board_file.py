"""A board of the user's own, in a YAML file: `--target my_board.yaml`.

version: 1
cpu: cortex-m4            # a target of `tvm-compress list targets`, which brings all but the rest
flash_address: 0x08000000
flash_bytes: 1048576
ram_address: 0x20000000
ram_bytes: 131072
runner: serial            # default: the emulator of the CPU

Linux boards that run TVM's RPC server: `runner: rpc`, `tracker: host:port` and `key: name`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import RecipeError, TargetError

if TYPE_CHECKING:
    from .targets import Target

VERSION = 1
SUFFIXES = (".yaml", ".yml")
RAM_ALIGNMENT = 8  # of a stack, on every CPU of the table


@dataclass(frozen=True)
class Board:
    """A CPU of the target table on a board of one's own."""

    cpu: str = field(metadata={"help": "name from `tvm-compress list targets`"})
    name: str | None = field(default=None, metadata={"help": "default: the file's name"})
    description: str | None = None
    flash_bytes: int | None = field(
        default=None, metadata={"help": "room for code and weights; a larger model is refused"}
    )
    ram_bytes: int | None = field(
        default=None, metadata={"help": "the largest piece of RAM; a larger model is refused"}
    )
    flash_address: int | None = None
    ram_address: int | None = None
    runner: Literal["emulator", "serial", "rpc"] = field(
        default="emulator",
        metadata={
            "help": "serial: you put the program on the board yourself; rpc: the board runs TVM's "
            "RPC server"
        },
    )
    tracker: str | None = field(
        default=None, metadata={"help": "of runner rpc: host:port of the tracker"}
    )
    key: str | None = field(default=None, metadata={"help": "of runner rpc: the board's key there"})

    def __post_init__(self) -> None:
        for name in ("flash_bytes", "ram_bytes"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 1 << 40:
                raise ValueError(f"{name} is from 1 to 2^40, not {value}")
        for name in ("flash_address", "ram_address"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1 << 64:
                raise ValueError(f"{name} is from 0 to 2^64 - 1, not {value}")
        if self.ram_address is not None and self.ram_address % RAM_ALIGNMENT:
            raise ValueError(
                f"ram_address {self.ram_address:#x} is not a multiple of {RAM_ALIGNMENT}"
            )
        if (self.tracker is None) != (self.key is None):
            raise ValueError("tracker and key belong together")
        if self.tracker is not None and self.runner != "rpc":
            raise ValueError(f"tracker and key belong to `runner: rpc`, not {self.runner}")
        if self.name is not None and (not self.name or any(c in self.name for c in "/\\\n")):
            raise ValueError(f"name {self.name!r} is empty or holds a slash or line break")

    def target(self, default_name: str) -> Target:
        """The CPU's target with what the board changes. Raises `TargetError`: no such CPU, one that
        TVM's RPC server does not run on, or memories that overlap."""
        from .targets import as_board, get_target

        try:
            cpu = get_target(self.cpu)
        except TargetError as error:
            raise TargetError(f"cpu: {error}") from None
        if self.runner == "rpc":
            cpu = as_board(cpu)
            if cpu.is_bare_metal:
                raise TargetError(f"cpu {self.cpu!r} has no operating system to run an RPC server")
        if not cpu.is_cross:
            raise TargetError(f"cpu {self.cpu!r} is no CPU of a board; take it as --target itself")
        name = self.name or default_name
        own = {
            key: value
            for key in ("flash_bytes", "ram_bytes", "flash_address", "ram_address")
            if (value := getattr(self, key)) is not None
        }
        target = dataclasses.replace(
            cpu,
            name=name,
            description=self.description or f"{name}: {cpu.description}",
            runner=cpu.runner if self.runner == "emulator" else self.runner,
            rpc_tracker=self.tracker or "",
            rpc_key=self.key or "",
            **own,
        )
        _require_apart(target)
        return target


def _require_apart(target: Target) -> None:
    """Flash and RAM share no byte, where both addresses are known."""
    if target.flash_address is None or target.ram_address is None:
        return
    flash_end = target.flash_address + (target.flash_bytes or 1)
    ram_end = target.ram_address + (target.ram_bytes or 1)
    if target.flash_address < ram_end and target.ram_address < flash_end:
        raise TargetError(
            f"flash_address, ram_address: flash {target.flash_address:#x}-{flash_end - 1:#x} and "
            f"RAM {target.ram_address:#x}-{ram_end - 1:#x} overlap"
        )


def find_target(name_or_path: str | Path) -> Target:
    """A target of the table by name, or of a board file (`SUFFIXES`). Raises `TargetError`."""
    from .targets import get_target

    path = Path(name_or_path)
    if path.suffix not in SUFFIXES:
        return get_target(str(name_or_path))
    board = load_board(path)
    try:
        return board.target(path.stem)
    except TargetError as error:
        raise TargetError(f"{path}: {error}") from None


def load_board(path: Path) -> Board:
    """Raises `TargetError` with file and line."""
    from .typed_yaml import MAX_BYTES

    try:
        if path.stat().st_size > MAX_BYTES:
            raise TargetError(f"{path}: larger than {MAX_BYTES} bytes; this is no board file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TargetError(f"board file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TargetError(f"board file {path}: is not UTF-8 text") from None
    return parse_board(text, str(path))


def parse_board(text: str, name: str) -> Board:
    from .runners.rpc import Rpc
    from .typed_yaml import Source, compose, pairs, parse, parse_dataclass

    source = Source(name, "a board file")
    try:
        node = compose(text, source)
        versions = [value for key, _, value in pairs(node, source, "board") if key == "version"]
        if not versions or parse(int, versions[0], source, "version") != VERSION:
            raise source.error(node, f"a board file has `version: {VERSION}`")
        board: Board = parse_dataclass(Board, node, source, "board", skip=("version",))
        if board.tracker is not None and board.key is not None:
            Rpc(board.tracker, board.key)
    except RecipeError as error:
        raise TargetError(str(error)) from None
    return board


def target_entry(target: Target, name_or_path: str | Path) -> dict[str, Any]:
    """What an artefact keeps of its target, for `target_of_entry`."""
    path = Path(name_or_path)
    entry: dict[str, Any] = {
        "name": target.name,
        "description": target.description,
        "tvm": {
            key: list(value) if isinstance(value, list | tuple) else value
            for key, value in target.tvm_options.items()
        },
    }
    if path.suffix in SUFFIXES:
        board = dataclasses.asdict(load_board(path))
        # An artefact may come from anybody: nobody is connected to because it says so.
        entry["board"] = board | {"tracker": None, "key": None}
    return entry


def target_of_entry(entry: Mapping[str, Any]) -> Target:
    """The target of an artefact, whose board file may be elsewhere now."""
    from .targets import get_target

    board = entry.get("board")
    if board is None:
        return get_target(str(entry["name"]))
    try:
        return Board(**board).target(str(entry["name"]))
    except (TypeError, ValueError) as error:
        raise TargetError(f"manifest.json: its board is damaged ({error})") from None


def board_schema() -> dict[str, Any]:
    """JSON Schema of a board file, for editors; made from the dataclass."""
    from .typed_yaml import dataclass_schema

    schema = dataclass_schema(Board)
    schema["properties"] = {"version": {"const": VERSION}, **schema["properties"]}
    schema["required"] = ["version", "cpu"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tvm-compress board",
        **schema,
    }
