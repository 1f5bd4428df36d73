"""Tuning records in files: what was measured, what ships, what users exchange.

A database is a folder with the two files of MetaSchedule's `JSONDatabase` (workloads and records),
which grow by whole lines, so that a killed run loses nothing that was measured. Exported files hold
the best records as plain JSON; imported ones are kept beside the two files, and so are those that
ship with the package. A look-up reads them all.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import DatabaseError
from ..schedules.choice import Choice, SearchSpace, choice_to_json, digest
from ..user_cache import user_cache
from .record import SECONDS, Record, from_metaschedule, to_metaschedule

if TYPE_CHECKING:
    from tvm import tirx

    from ..targets import Target
    from .record import Conditions

WORKLOADS = "database_workload.json"  # MetaSchedule's own names
RECORDS = "database_tuning_record.json"
IMPORTED = "imported.json"
SHIPPED = Path(__file__).resolve().parent.parent / "databases"
FORMAT = "tvm-compress tuning records"
VERSION = 1
MAX_FILE_BYTES = 1 << 30
MAX_IMPORT_BYTES = 64 << 20


def default_folder() -> Path:
    """The user's own database: `tvm-compress/tuning` in the user's cache."""
    return user_cache() / "tuning"


class Database:
    """The records of a folder over those that ship (`shipped=False`: without them).

    Nothing is created before the first `add`. Raises `DatabaseError` for files that are damaged.
    """

    def __init__(self, folder: Path | None = None, *, shipped: bool = True) -> None:
        self.folder = default_folder() if folder is None else Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise DatabaseError(
                f"{self.folder}: a tuning database is a folder; files are read with "
                "`tvm-compress tune --import`"
            )
        self._best: dict[str, dict[object, Record]] = {}  # by what they compete under
        self._measured: dict[str, list[Record]] = {}
        self._indices: dict[str, int] = {}  # workload => line of the workload file
        for path in sorted(SHIPPED.glob("*.json")) if shipped else []:
            self._note(read_export(path))
        if (self.folder / IMPORTED).is_file():
            self._note(read_export(self.folder / IMPORTED))
        for index, record in self._read_lines():
            self._indices.setdefault(record.workload, index)
            self._measured.setdefault(record.workload, []).append(record)
            self._note([record])

    # --- asking -----------------------------------------------------------------------------

    def measured(self, workload: str, conditions: Conditions) -> list[Record]:
        """Everything that was measured in the folder for a workload, in order, failures too."""
        records = self._measured.get(workload, [])
        return [record for record in records if record.conditions == conditions]

    def winners(self) -> list[Record]:
        """The best verified record of every workload under every conditions, over every
        default."""
        return [record for found in self._best.values() for record in found.values()]

    def lookup(self, workload: str, target: Target, cpu: str = "") -> list[Record]:
        """Verified records that may serve `target`, the best first.

        They use no capability that the target lacks, its vector width, and as many threads or, for
        a target of several, more: work shared out for two may be too little for eight. Instructions
        count for targets that an emulator stands for, and for no other. Best is: made on the same
        CPU, for the same capabilities, by time, for the same number of threads, with the largest
        speed-up.
        """

        def rank(record: Record) -> tuple[Any, ...]:
            conditions = record.conditions
            return (
                conditions.cpu == cpu,
                len(conditions.capabilities),
                conditions.measure == SECONDS,
                conditions.threads == target.threads,
                record.speedup,
            )

        fitting = [
            record
            for record in self._best.get(workload, {}).values()
            if record.conditions.vector_bits == target.vector_bits
            and target.has(*record.conditions.capabilities)
            and (target.is_cross or record.conditions.measure == SECONDS)
            and (
                record.conditions.threads == target.threads
                or record.conditions.threads > target.threads > 1
            )
        ]
        return sorted(fitting, key=rank, reverse=True)

    def fingerprint(self) -> str:
        """Changes when a look-up could give something else."""
        winners = sorted(json.dumps(r.to_json(), sort_keys=True) for r in self.winners())
        return digest("\n".join(winners))

    # --- adding -----------------------------------------------------------------------------

    def add(
        self,
        record: Record,
        *,
        space: SearchSpace,
        block: str,
        func: tirx.PrimFunc,
        tvm_options: Any,
    ) -> None:
        """Append one record; it is on disk when this returns.

        `func` is the naive function and `block` the name of its anchor's block, for MetaSchedule.
        """
        with self._locked() as file:
            index = self._indices.get(record.workload)
            if index is None:
                index = self._indices[record.workload] = self._add_workload(func)
            value = to_metaschedule(record, space, block, tvm_options)
            file.write(json.dumps([index, value], separators=(",", ":")) + "\n")
            file.flush()
        self._measured.setdefault(record.workload, []).append(record)
        self._note([record])

    def merge(self, path: Path) -> int:
        """Take over the records of an exported file. Returns how many were new or better."""
        before = self.fingerprint()
        new = 0
        for record in read_export(path):
            new += self._note([record])
        if self.fingerprint() != before:
            with self._locked():
                known = self.folder / IMPORTED
                merged = read_export(known) if known.is_file() else []
                write_export(known, _best_of([*merged, *read_export(path)]))
        return new

    def export(self, path: Path, workloads: Iterable[str] | None = None) -> int:
        """Write the winners (of `workloads` only, if given) to one file. Returns how many."""
        kept = None if workloads is None else set(workloads)
        records = [r for r in self.winners() if kept is None or r.workload in kept]
        try:
            write_export(path, records)
        except OSError as error:
            raise DatabaseError(f"{path}: cannot be written: {error.strerror}") from None
        return len(records)

    def _note(self, records: Iterable[Record]) -> int:
        """Remember the verified ones among `records` that are the best of their conditions."""
        new = 0
        for record in records:
            if not record.is_verified:
                continue
            best = self._best.setdefault(record.workload, {})
            known = best.get(_rivals(record))
            if known is None or record.speedup > known.speedup:
                best[_rivals(record)] = record
                new += 1
        return new

    # --- files ------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        """The record file, open at its end, ours alone until the block is left."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / RECORDS).open("a+", encoding="utf-8")
        except OSError as error:
            raise DatabaseError(
                f"{self.folder}: cannot be written: {error.strerror}; name another folder with "
                "--database"
            ) from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _cut_torn_line(self.folder / RECORDS)
            file.seek(0, os.SEEK_END)
            yield file

    def _add_workload(self, func: tirx.PrimFunc) -> int:
        """Append the function to the workload file, in which others may have written as well."""
        line = _workload_line(func)
        path = self.folder / WORKLOADS
        path.touch()
        _cut_torn_line(path)
        with path.open("r+", encoding="utf-8") as file:
            count = 0
            for count, known in enumerate(file, 1):
                if known.rstrip("\n") == line:
                    return count - 1
            file.write(line + "\n")
            return count

    def _read_lines(self) -> Iterator[tuple[int, Record]]:
        path = self.folder / RECORDS
        if not path.is_file():
            return
        _check_size(path, MAX_FILE_BYTES)
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):
                    return  # a run was killed while it wrote; the next `add` cuts it off
                try:
                    index, value = json.loads(line)
                    record = from_metaschedule(value)
                except (ValueError, RecursionError) as error:
                    raise DatabaseError(
                        f"{path}, line {number}: {_one_line(error)}; remove the line, or name "
                        "another folder with --database"
                    ) from None
                if record is not None and isinstance(index, int):
                    yield index, record


class TunedChoices:
    """For `ScheduleKernels`: the best stored choice of a function that its space still has.

    Choices of an older template, that the space no longer has, or that beat another default than
    today's are passed over. Counts the functions with a space (`tunable`) and keeps the records
    that were used.
    """

    def __init__(self, database: Database, target: Target, cpu: str = "") -> None:
        self._database, self._target, self._cpu = database, target, cpu
        self.tunable = 0
        self.used: list[Record] = []

    @property
    def tuned(self) -> int:
        """Functions that got a choice."""
        return len(self.used)

    def __call__(self, func: tirx.PrimFunc) -> Choice | None:
        from ..schedules import search_space
        from .workload import workload_key

        space = search_space(func, self._target)
        key = None if space is None else workload_key(func)
        if space is None or key is None:
            return None
        self.tunable += 1
        for record in self._database.lookup(key, self._target, self._cpu):
            if record.fits(space):
                self.used.append(record)
                return dict(record.choice)
        return None


def read_export(path: Path) -> list[Record]:
    """The records of an exported file. Raises `DatabaseError` when it is none."""
    try:
        _check_size(path, MAX_IMPORT_BYTES)
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatabaseError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DatabaseError(f"{path}: is no file of `tvm-compress tune --export`") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DatabaseError(f"{path}: is no file of `tvm-compress tune --export`")
    if value.get("version") != VERSION or not isinstance(value.get("records"), list):
        raise DatabaseError(
            f"{path}: has version {value.get('version')!r} of the format, this is {VERSION}"
        )
    records = []
    for number, entry in enumerate(value["records"], 1):
        try:
            records.append(Record.from_json(entry))
        except ValueError as error:
            raise DatabaseError(f"{path}, record {number}: {_one_line(error)}") from None
    return records


def write_export(path: Path, records: Iterable[Record]) -> None:
    """Write records to one file, which is complete or not there at all."""
    ordered = sorted(records, key=lambda r: (r.workload, r.conditions.threads, r.conditions.cpu))
    lines = ",\n".join(json.dumps(r.to_json(), sort_keys=True) for r in ordered)
    head = f'{{"format": {json.dumps(FORMAT)}, "version": {VERSION}, "records": ['
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(f"{head}\n{lines}\n]}}\n", encoding="utf-8")
    unfinished.replace(path)


def _best_of(records: Iterable[Record]) -> list[Record]:
    best: dict[object, Record] = {}
    for record in records:
        key = (record.workload, _rivals(record))
        if key not in best or record.speedup > best[key].speedup:
            best[key] = record
    return list(best.values())


def _rivals(record: Record) -> object:
    """Equal for winners of one workload whose speed-ups compare."""
    return record.conditions, choice_to_json(record.default or {})


def _workload_line(func: tirx.PrimFunc) -> str:
    """A line of MetaSchedule's workload file: structural hash and the module as JSON."""
    import tvm
    from tvm.s_tir.meta_schedule.database import Workload

    plain = func
    for name in dict((func.attrs or {}).items()):
        if str(name).startswith("tvm_compress."):
            plain = plain.without_attr(name)
    module = tvm.IRModule({"main": plain.with_attr("global_symbol", "main")})
    shash, text = Workload(module).as_json()
    return json.dumps([str(shash), str(text)], separators=(",", ":"))


def _cut_torn_line(path: Path) -> None:
    """Remove what a killed writer left behind the last whole line."""
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        position = size
        while position:
            step = min(position, 1 << 16)
            file.seek(position - step)
            block = file.read(step)
            if position == size and block.endswith(b"\n"):
                return
            newline = block.rfind(b"\n")
            if newline >= 0:
                file.truncate(position - step + newline + 1)
                return
            position -= step
        file.truncate(0)


def _check_size(path: Path, limit: int) -> None:
    if path.stat().st_size > limit:
        raise DatabaseError(f"{path}: is larger than {limit >> 20} MiB; no such database")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
