"""The command line: a thin layer over the Python API. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from . import __version__
from .errors import CheckFailed, TvmCompressError
from .interrupts import was_interrupted, watch
from .startup import start_without_torch

if TYPE_CHECKING:
    from .progress import Progress
    from .runners.rpc import Rpc

USAGE_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells report it
Command = TypeVar("Command", bound=Callable[..., Any])


def main() -> NoReturn:
    """Entry point of `tvm-compress`: runs one verb and turns every error into one line."""
    start_without_torch()
    try:
        watch()
        cli.main(standalone_mode=False)
        sys.stdout.flush()
        status = 0
    except click.exceptions.Exit as stop:
        status = stop.exit_code
    except click.UsageError as error:
        usage = error.ctx.get_usage() + "\n" if error.ctx is not None else ""
        status = _fail(f"{error.format_message()}", USAGE_STATUS, before=usage)
    except click.ClickException as error:
        status = _fail(error.format_message(), USAGE_STATUS)
    except TvmCompressError as error:
        stopped = was_interrupted()
        status = _interrupted() if stopped else _fail(str(error), error.exit_status)
    except (KeyboardInterrupt, click.Abort):
        status = _interrupted()
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except MemoryError:
        status = _fail("not enough memory for this model or data", USAGE_STATUS)
    except Exception as error:  # noqa: BLE001 - the last resort must not be a traceback
        status = _interrupted() if was_interrupted() else _internal_error(error)
    sys.exit(status)


def _interrupted() -> int:
    return _fail("interrupted; the same command goes on from here", INTERRUPTED_STATUS)


def _internal_error(error: Exception) -> int:
    detail = " ".join(str(error).split())[:300]
    return _fail(
        f"internal error, please report it (--debug shows where): {type(error).__name__}: {detail}",
        USAGE_STATUS,
    )


def _fail(message: str, status: int, before: str = "") -> int:
    if "--debug" in sys.argv and sys.exc_info()[0] is not None:
        traceback.print_exc()
    one_line = " ".join(message.split())
    click.echo(f"{before}error: {one_line}", err=True)
    return status


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 done, 1 a check failed, 2 wrong use or input. "
    "`tvm-compress VERB --help` shows an example of each verb.",
)
@click.version_option(__version__, prog_name="tvm-compress")
def cli() -> None:
    """Compress a trained network and ship it through Apache TVM: smaller, faster, and measured."""


# --- options that several verbs share -----------------------------------------------------------

PATH = click.Path(path_type=Path)
_artefact_argument = click.argument("artefact", type=PATH)


class ShapeType(click.ParamType):
    """`name=1x3x224x224`."""

    name = "NAME=1x3x224x224"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, tuple[int, ...]]:
        if isinstance(value, tuple):
            return value
        label, equals, text = value.rpartition("=")
        sides = text.lower().split("x")
        if not equals or not label or not all(s.isascii() and s.isdecimal() for s in sides):
            self.fail(f"{value!r} is not of the form name=1x3x224x224", param, ctx)
        shape = tuple(int(side) for side in sides)
        if any(not 1 <= side < 2**31 for side in shape):
            self.fail(f"{value!r}: every side is from 1 to 2^31 - 1", param, ctx)
        return label, shape


class InputValueType(click.ParamType):
    """`name=16000`."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        label, equals, text = value.rpartition("=")
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not equals or not label or number != number or abs(number) == float("inf"):
            self.fail(f"{value!r} is not of the form name=number", param, ctx)
        return label, number


def _model_options(command: Command) -> Command:
    command = click.option(
        "--shape",
        "shapes",
        type=ShapeType(),
        multiple=True,
        help="Shape of a dynamic input; repeat for several.",
    )(command)
    return click.option(
        "--input-value",
        "input_values",
        type=InputValueType(),
        multiple=True,
        help="Fix an input to a constant; repeat for several.",
    )(command)


def _common_options(command: Command) -> Command:
    command = click.option(
        "--json", "as_json", is_flag=True, help="Machine-readable result on standard output."
    )(command)
    return click.option("--debug", is_flag=True, help="Show the traceback of an error.")(command)


def _threads_option(command: Command) -> Command:
    return click.option(
        "--threads",
        type=click.IntRange(1, 1024),
        help="Threads to run with.  [default: all cores]",
    )(command)


def _tuning_options(command: Command) -> Command:
    command = click.option(
        "--database",
        type=PATH,
        help="Folder of tuning records.  [default: tvm-compress/tuning in the user's cache]",
    )(command)
    command = click.option(
        "--minutes", type=click.FloatRange(0.05, 10_000), help="Tune for at most this long."
    )(command)
    return click.option(
        "--trials",
        type=click.IntRange(0, 10_000_000),
        help="Tune with at most this many measured candidates, earlier runs included; 0: none.",
    )(command)


def _rpc_options(command: Command) -> Command:
    command = click.option("--rpc-key", metavar="KEY", help="The device's key on the tracker.")(
        command
    )
    return click.option(
        "--rpc-tracker",
        metavar="HOST:PORT",
        help="Run on a device behind this tracker of TVM's RPC.",
    )(command)


def _eval_option(words: str) -> Callable[[Command], Command]:
    return click.option("--eval", "evaluate", type=PATH, help=words)


def _calib_option(words: str) -> Callable[[Command], Command]:
    return click.option("--calib", "calibration", type=PATH, help=words)


def _running_options(command: Command) -> Command:
    """Of the verbs that run an artefact."""
    return _threads_option(_rpc_options(_common_options(command)))


def _device(tracker: str | None, key: str | None) -> Rpc | None:
    """What both options together name."""
    if (tracker is None) != (key is None):
        raise click.UsageError("--rpc-tracker and --rpc-key belong together")
    if tracker is None or key is None:
        return None
    from .runners.rpc import Rpc

    return Rpc(tracker, key)


def _kernel_cache_option(command: Command) -> Command:
    return click.option(
        "--no-kernel-cache",
        "kernel_cache",
        flag_value=False,
        default=True,
        help="Compile every kernel, and keep none in the user's cache.",
    )(command)


PEERS = ("onnxruntime", "openvino", "litert")  # `peers.LOADERS`, which would import NumPy


def _runtimes(_context: Any, _parameter: Any, value: str | None) -> tuple[str, ...]:
    """Comma-separated names of other runtimes."""
    names = tuple(part.strip() for part in (value or "").split(",") if part.strip())
    for name in names:
        if name not in PEERS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(PEERS)}")
    return tuple(dict.fromkeys(names))


def _example(text: str) -> str:
    return f"\b\nExample:\n  {text}"


def _progress(as_json: bool = False) -> Progress:
    from .progress import TerminalProgress

    return TerminalProgress()


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def _unique(pairs: tuple[tuple[str, Any], ...], option: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise click.UsageError(f"{option} gives {name!r} twice")
        values[name] = value
    return values


# --- verbs --------------------------------------------------------------------------------------


@cli.command(epilog=_example("tvm-compress profile model.onnx --shape input=1x3x224x224"))
@click.argument("model", type=PATH)
@_model_options
@_common_options
def profile(
    model: Path,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    input_values: tuple[tuple[str, float], ...],
    as_json: bool,
    debug: bool,
) -> None:
    """Show where the operations, parameters and activations of MODEL are."""
    from .importers import load_model
    from .profiling import profile_model
    from .report.terminal import print_profile

    with _progress().step(f"reading {model.name}"):
        loaded = load_model(
            model,
            shapes=_unique(shapes, "--shape"),
            input_values=_unique(input_values, "--input-value"),
        )
        result = profile_model(loaded)
    if as_json:
        from dataclasses import asdict

        _print_json(asdict(result))
    else:
        print_profile(result)


@cli.command(
    epilog=_example(
        "tvm-compress compress model.onnx --recipe int8 --target host \\\n"
        "      --calib calibration.npz --eval test.npz -o out"
    )
)
@click.argument("model", type=PATH)
@click.option(
    "--recipe",
    default="int8",
    show_default=True,
    help="A shipped recipe (`tvm-compress list recipes`) or a YAML file.",
)
@click.option(
    "--target",
    help="A target (`tvm-compress list targets`) or a board file (.yaml).  "
    "[default: the recipe's, or host]",
)
@_calib_option("Calibration data: .npz or a folder of images.")
@_eval_option("Labelled data to measure the accuracy on.")
@click.option("-o", "--out", type=PATH, required=True, help="Folder of the artefact.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Seed.  [default: the recipe's]")
@click.option(
    "--emit",
    type=click.Choice(["object", "c"]),
    default="object",
    show_default=True,
    help="Kernels of a C project: machine code, or C for any compiler (portable; many times the "
    "instructions of the default on cores with SIMD).",
)
@click.option("--force", is_flag=True, help="Replace the artefact of another model in OUT.")
@_tuning_options
@_kernel_cache_option
@_threads_option
@_model_options
@_common_options
def compress(
    model: Path,
    recipe: str,
    target: str | None,
    calibration: Path | None,
    evaluate: Path | None,
    out: Path,
    seed: int | None,
    force: bool,
    trials: int | None,
    minutes: float | None,
    database: Path | None,
    kernel_cache: bool,
    emit: str,
    threads: int | None,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    input_values: tuple[tuple[str, float], ...],
    as_json: bool,
    debug: bool,
) -> None:
    """Compress MODEL for a target, compile it, check it, and write the artefact to OUT.

    The artefact that was in OUT stays usable until the new one is complete. A run that was stopped
    goes on where it was when the same command is given again. --trials and --minutes tune the
    kernels of both, MODEL as it is and compressed, so that their comparison is fair.
    """
    from . import flow
    from .report.terminal import print_summary

    artefact = flow.compress(
        model,
        recipe=recipe,
        target=target,
        calibration=calibration,
        evaluate=evaluate,
        out=out,
        seed=seed,
        shapes=_unique(shapes, "--shape"),
        input_values=_unique(input_values, "--input-value"),
        threads=threads,
        trials=trials,
        minutes=minutes,
        database=database,
        kernel_cache=kernel_cache,
        emit=emit,
        force=force,
        progress=_progress(),
    )
    if as_json:
        _print_json(artefact.report)
    else:
        print_summary(artefact.report, artefact.path)
    _require(artefact.report["checks"])


@cli.command(
    epilog=_example(
        "tvm-compress tune model.onnx --recipe int8 --target host --minutes 10\n"
        "  tvm-compress tune --export records.json"
    )
)
@click.argument("model", type=PATH, required=False)
@click.option(
    "--recipe",
    default="int8",
    show_default=True,
    help="What the model will be compressed with; `none`: the model as it is.",
)
@click.option("--target", help="What it will be compressed for.  [default: the recipe's, or host]")
@_calib_option("Calibration data. Without it random data does: ranges change no schedule.")
@_tuning_options
@_rpc_options
@click.option(
    "--import",
    "imports",
    type=PATH,
    multiple=True,
    help="Take over the records of an exported file; repeat for several.",
)
@click.option(
    "--export",
    "export",
    type=PATH,
    help="Write the best records to one file, at the end; of MODEL only, if given (with "
    "--trials 0 without measuring).",
)
@click.option("--list", "is_list", is_flag=True, help="Show the best records that are known.")
@_threads_option
@_model_options
@_common_options
def tune(
    model: Path | None,
    recipe: str,
    target: str | None,
    calibration: Path | None,
    trials: int | None,
    minutes: float | None,
    database: Path | None,
    rpc_tracker: str | None,
    rpc_key: str | None,
    imports: tuple[Path, ...],
    export: Path | None,
    is_list: bool,
    threads: int | None,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    input_values: tuple[tuple[str, float], ...],
    as_json: bool,
    debug: bool,
) -> None:
    """Measure the kernels of MODEL, compressed, on its target and remember the best.

    `compress` uses them; `--recipe none` does the same for MODEL as it is.
    A run that was stopped loses nothing and goes on when the same command is given again. Without
    MODEL, --import, --export and --list work on the records alone.
    """
    from .tuning.commands import tune_command

    if model is None and not (imports or export or is_list):
        raise click.UsageError("give a MODEL to tune, or --import, --export, --list")
    result = tune_command(
        model,
        imports=imports,
        export=export,
        is_list=is_list,
        database=database,
        rpc=_device(rpc_tracker, rpc_key),
        progress=_progress(),
        is_quiet=as_json,
        recipe=recipe,
        target=target,
        calibration=calibration,
        trials=trials,
        minutes=minutes,
        threads=threads,
        shapes=_unique(shapes, "--shape"),
        input_values=_unique(input_values, "--input-value"),
    )
    if as_json:
        _print_json(result)


def _require(checks: list[Mapping[str, Any]]) -> None:
    failed = [f"{check['name']}: {check['detail']}" for check in checks if not check["passed"]]
    if failed:
        raise CheckFailed("; ".join(failed))


@cli.command(epilog=_example("tvm-compress run out --input x.npz -o y.npz"))
@_artefact_argument
@click.option(
    "--input",
    "data",
    type=PATH,
    required=True,
    help=".npz with one array per model input, first axis = samples.",
)
@click.option(
    "-o",
    "--out",
    type=PATH,
    required=True,
    help=".npz to write: one array per model output.",
)
@_running_options
def run(
    artefact: Path,
    data: Path,
    out: Path,
    threads: int | None,
    rpc_tracker: str | None,
    rpc_key: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Run the compressed model of ARTEFACT on all samples of an .npz."""
    from .artefact import Artefact
    from .running import run_file

    opened = Artefact.open(artefact).on(_device(rpc_tracker, rpc_key))
    result = run_file(opened, data, out, threads=threads, progress=_progress())
    if as_json:
        _print_json(result)
    else:
        shapes = ", ".join(f"{name} {shape}" for name, shape in result["outputs"].items())
        click.echo(f"{out}: {result['samples']} samples, {shapes}")


@cli.command(epilog=_example("tvm-compress verify out --eval test.npz --per-layer"))
@_artefact_argument
@_eval_option("Data to check on; without it, the inputs kept in the artefact.")
@click.option("--per-layer", is_flag=True, help="Error of every layer's output; not of C projects.")
@click.option(
    "--exact-inputs",
    type=click.IntRange(1, 100_000),
    default=8,
    show_default=True,
    help="Inputs on which every integer tensor is compared.",
)
@_running_options
def verify(
    artefact: Path,
    evaluate: Path | None,
    per_layer: bool,
    exact_inputs: int,
    threads: int | None,
    rpc_tracker: str | None,
    rpc_key: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Check ARTEFACT against its reference graph, its float original, and labels.

    Exit status 1 when an integer differs or the accuracy drops more than the recipe allows.
    """
    from dataclasses import asdict

    from .artefact import Artefact
    from .report.terminal import print_verification
    from .verification import verify as verify_artefact

    opened = Artefact.open(artefact).on(_device(rpc_tracker, rpc_key))
    result = verify_artefact(
        opened,
        evaluate,
        per_layer=per_layer,
        exact_inputs=exact_inputs,
        threads=threads,
        progress=_progress(),
    )
    if as_json:
        _print_json(asdict(result))
    else:
        print_verification(result, per_layer, opened.original, opened.is_project)
    result.require()


@cli.command(
    epilog=_example(
        "tvm-compress benchmark out --against onnxruntime,openvino --model model.onnx \\\n"
        "      --calib calibration.npz --eval test.npz"
    )
)
@_artefact_argument
@click.option(
    "--against",
    callback=_runtimes,
    help=f"Other runtimes to time side by side, of {', '.join(PEERS)}; needs --model.",
)
@click.option(
    "--model",
    "models",
    type=PATH,
    multiple=True,
    help="Source model for the other runtimes; again for one in another format.",
)
@_calib_option(
    "Calibration data: the other runtimes also run the model as their own tools quantise it."
)
@_eval_option("Labelled data to measure the accuracy of all sides on.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 3600),
    default=5.0,
    show_default=True,
    help="Measuring time for each side.",
)
@_running_options
def benchmark(
    artefact: Path,
    against: tuple[str, ...],
    models: tuple[Path, ...],
    calibration: Path | None,
    evaluate: Path | None,
    seconds: float,
    threads: int | None,
    rpc_tracker: str | None,
    rpc_key: str | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Time ARTEFACT and its original side by side on this machine, and score them on labelled data.

    An artefact for another machine is run under its emulator, which counts instructions, exactly,
    or on a board behind an RPC tracker, which measures time; flash, RAM and stack are those of the
    linked program.

    Other runtimes that are to run the model in int8 (--calib) are calibrated with the samples that
    `compress` takes of the same data.
    """
    from dataclasses import asdict

    from .artefact import Artefact
    from .benchmarking import benchmark as run_benchmark
    from .report.terminal import print_benchmark

    if against and not models:
        raise click.UsageError("--against needs the source model: --model model.onnx")
    if calibration is not None and not against:
        raise click.UsageError("--calib is for other runtimes: --against onnxruntime,openvino")
    opened = Artefact.open(artefact).on(_device(rpc_tracker, rpc_key))
    if opened.is_project:
        from .board_benchmarking import benchmark_board
        from .report.board import print_board_benchmark

        if against:
            raise click.UsageError(
                "--against: other runtimes run on this machine, the artefact does not; "
                "compress for 'host' to compare them"
            )
        counted = benchmark_board(opened, evaluate=evaluate, seconds=seconds, progress=_progress())
        if as_json:
            _print_json(asdict(counted))
        else:
            print_board_benchmark(counted, opened.original)
        return
    result = run_benchmark(
        opened,
        against=against,
        models=models,
        calibration=calibration,
        evaluate=evaluate,
        seconds=seconds,
        threads=threads,
        progress=_progress(),
    )
    if as_json:
        _print_json(asdict(result))
    else:
        print_benchmark(result, opened.original)


@cli.command(epilog=_example("tvm-compress report out"))
@_artefact_argument
@_common_options
def report(artefact: Path, as_json: bool, debug: bool) -> None:
    """Show the report of ARTEFACT; report.html in its folder shows the same with plots."""
    from .artefact import Artefact

    opened = Artefact.open(artefact)
    if as_json:
        _print_json(opened.report)
    else:
        from .report.terminal import print_report

        print_report(opened.report, opened.path)


@cli.command("list", epilog=_example("tvm-compress list recipes --schema > recipe.schema.json"))
@click.argument("what", type=click.Choice(["targets", "recipes", "passes"]))
@click.option(
    "--schema",
    is_flag=True,
    help="With `recipes` or `targets`: the JSON Schema of recipe or board files.",
)
@_common_options
def list_(what: str, schema: bool, as_json: bool, debug: bool) -> None:
    """List what `compress` can use: targets, recipes, passes."""
    if schema:
        from .board_file import board_schema
        from .recipe import recipe_schema

        schemas = {"recipes": recipe_schema, "targets": board_schema}
        if what not in schemas:
            raise click.UsageError("--schema belongs to `list recipes` and `list targets`")
        _print_json(schemas[what]())
        return
    rows = {"targets": _list_targets, "recipes": _list_recipes, "passes": _list_passes}[what]()
    if as_json:
        _print_json(rows)
    else:
        from .report.terminal import print_rows, print_targets

        (print_targets if what == "targets" else print_rows)(rows)


def _list_targets() -> list[dict[str, Any]]:
    from .targets import list_targets
    from .targets.listing import facts

    return [facts(target) for target in list_targets()]


def _list_recipes() -> list[dict[str, Any]]:
    from .recipe import recipe_summary, shipped_recipes

    return [
        {"name": name, "description": recipe_summary(path)}
        for name, path in shipped_recipes().items()
    ]


def _list_passes() -> list[dict[str, Any]]:
    from .relay_passes.passes import PASSES

    rows = []
    for name, entry in PASSES.items():
        options, description = entry.describe()
        rows.append(
            {
                "name": name,
                "options": ", ".join(["layers", *options]),
                "description": description,
            }
        )
    return rows


if __name__ == "__main__":
    main()
