"""The flow: load -> profile -> calibrate -> compress -> lower and build -> verify -> report."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artefact import (
    DEPLOY,
    FORMAT,
    KERNELS,
    LIBRARIES,
    MANIFEST,
    RECIPE,
    RECORDS,
    REPORT_HTML,
    REPORT_JSON,
    Artefact,
    describe_files,
)
from .errors import DataError, RecipeError, TargetError
from .progress import Progress
from .workspace import Workspace

if TYPE_CHECKING:
    import tvm

    from .bare.build import Planned
    from .build import Lowered
    from .data import Dataset
    from .kernel_cache import KernelCache
    from .kernels import LibraryInfo
    from .layer_costs import TargetCosts
    from .model import Model
    from .recipe import Recipe, Step
    from .relay_passes.costs import LayerCosts
    from .relay_passes.numerics.statistics import Statistics
    from .relay_passes.observations import Observations
    from .report.arena import Arena
    from .report.rows import StepTime
    from .targets import Target
    from .tuning.database import Database, TunedChoices

LOSS_SAMPLES = 64  # on which a network's outputs are compared, layer by layer
PROBES = 8  # inputs kept in the artefact, so that it can be verified without data
BENCHMARK_SECONDS = 2.0  # of each side, for the report; `benchmark` measures longer
SIMD = frozenset({"dsp", "mve", "neon", "rvv"})  # which kernels in portable C do without


def compress(
    model: Any,
    *,
    recipe: str | Path | Recipe = "int8",
    target: str | None = None,
    calibration: Any = None,
    evaluate: Any = None,
    out: str | Path,
    seed: int | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    input_values: Mapping[str, float] | None = None,
    threads: int | None = None,
    trials: int | None = None,
    minutes: float | None = None,
    database: Path | None = None,
    kernel_cache: bool = True,
    emit: str = "object",
    force: bool = False,
    progress: Progress | None = None,
) -> Artefact:
    """Compress, compile and check a model; write the artefact to the folder `out`.

    `model` is what `load_model` takes: a path or a model in memory. `recipe` is a shipped
    recipe's name, a file or a `Recipe`. `calibration` and `evaluate` are what `load_data`
    takes. `target`, `seed`, `shapes` and `input_values` override the recipe's. `threads` is
    what kernels are laid out and measured for (default: the target's). `trials` or `minutes`
    tune the kernels of both sides before they are built (`tuning.tune`); `database` is the
    folder of tuning records (default: the user's own). Compiled kernels are kept in the user's
    cache and taken from there by later builds, of this model and of others, unless
    `kernel_cache` is false. `emit` says what the kernels of a C project are, `object` or `c`;
    `c` is refused for a target whose artefact is no C project. `force` replaces an artefact of
    another model. An exact repetition of an interrupted call goes on where that one stopped.

    Raises an error of `errors.py` before anything is written when an input is wrong. Checks that
    fail (integers, accuracy) do not raise: they stand in `artefact.report["checks"]`.
    """
    progress = progress or Progress()
    clock = _Clock(progress)

    # 1. Load. Everything the user gave is looked at here, before any work is done.
    with clock.step("import"):
        job = _load(
            model, recipe, target, calibration, evaluate, seed, shapes, input_values, threads,
            kernel_cache=kernel_cache, emit=emit,
        )  # fmt: skip
        if job.target.rpc_tracker:
            from .runners.rpc import Rpc

            Rpc.of(job.target).require()
        records = _open_database(database)
        if trials is not None or minutes is not None:
            from .tuning.tune import require_device

            require_device(job.target)
    with Workspace(Path(out), job.model_key, force) as workspace:
        # 2. Profile the float original.
        from .profiling import profile_model

        profile = profile_model(job.model)

        # 3. Calibrate and compress: graph form in, graph form out.
        compressed = apply_recipe(job, workspace, clock)

        # 4. Tune, if asked to: measured choices go to the database.
        if trials is not None or minutes is not None:
            _tune(job, compressed, records, trials, minutes, clock)

        # 5. Lower, schedule and build both sides with the same compiler for the same target, and
        #    the executable reference graph for this machine.
        folders = _build_all(job, compressed, records, workspace, clock)

        # 6. Lay the artefact out, all but its evidence.
        artefact = _stage(job, folders, workspace.staging)

        # 7. Verify and measure what was laid out, from its files.
        evidence = _gather_evidence(artefact, job, compressed, records, threads, clock)

        # 8. Report, manifest, and the atomic swap.
        from .report.assemble import assemble
        from .report.html import write_html

        report = assemble(artefact, job, profile, compressed, evidence, clock.steps)
        _write_json(workspace.staging / REPORT_JSON, report.to_json())
        write_html(report, workspace.staging / REPORT_HTML)
        _write_manifest(artefact, workspace.staging)
        workspace.publish()
    if job.emit == "c" and job.target.capabilities & SIMD:
        progress.note(
            f"{job.target.name}: portable C takes many times the instructions of machine code "
            "(--emit object) on this core with SIMD"
        )
    return Artefact.open(out)


# --- 1. load ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What one call of `compress` works on; all of it has been checked."""

    model: Model
    model_key: str
    recipe: Recipe  # resolved: with target, seed, shapes
    recipe_name: str
    target: Target
    plan: tuple[tuple[Step, ...], ...]  # steps in groups that become one pass each
    calibration: Dataset | None
    evaluate: Dataset | None
    kernel_cache: KernelCache | None  # None: every kernel is compiled
    costs: TargetCosts
    notes: tuple[str, ...] = ()  # what the user should know about the recipe
    emit: str = "object"

    @property
    def float_target(self) -> Target:
        """Where the float original runs: calibration and comparisons are made on this machine."""
        from .targets import get_target

        return get_target("host") if self.target.is_cross else self.target


def _load(
    source: Any,
    recipe: str | Path | Recipe,
    target_name: str | None,
    calibration: Any,
    evaluate: Any,
    seed: int | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
    input_values: Mapping[str, float] | None,
    threads: int | None = None,
    kernel_cache: bool = True,
    emit: str = "object",
) -> Job:
    from .accuracy import scores_output
    from .benchmarking import set_threads
    from .board_file import find_target
    from .build import require_linker
    from .data import load_data
    from .importers import load_model
    from .kernel_cache import KernelCache
    from .recipe import Recipe, load_recipe
    from .step_order import check_order

    # TVM's pool never grows: whoever asks it first, pinned to one core to compare kernels, say,
    # would leave all others one thread.
    set_threads(threads)
    is_recipe = isinstance(recipe, Recipe)
    chosen: Recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    board = target_name or chosen.target or "host"
    target = find_target(board)
    if threads is not None:
        target = replace(target, threads=threads)
    if emit == "c" and not target.is_cross:
        raise TargetError(
            "--emit is for targets that ship as C projects (Arm, RISC-V and board files; see "
            f"`tvm-compress list targets`); {target.name} ships a library"
        )
    chosen = chosen.replace(
        target=str(board) if target.name != board else target.name,  # a board file stays one
        seed=chosen.seed if seed is None else seed,
        shapes={**chosen.shapes, **(shapes or {})},
        input_values={**chosen.input_values, **(input_values or {})},
    )
    model = load_model(source, shapes=chosen.shapes, input_values=chosen.input_values)
    plan = _plan(model.module, chosen)
    notes = tuple(check_order(model.module, plan))
    dataset = None
    if calibration is not None:
        dataset = load_data(calibration, model, chosen.preprocessing)
        dataset = dataset.take(chosen.calibration.samples)
    elif (needing := _step_that_needs_data(model.module, plan)) is not None:
        raise DataError(
            f"the recipe's step {needing} looks at the layers' inputs and needs calibration data: "
            "give --calib (an .npz or a folder of images)"
        )
    labelled = None
    if evaluate is not None:
        labelled = load_data(evaluate, model, chosen.preprocessing)
        if labelled.has_labels:
            scores_output(model.outputs, labelled)
    require_linker()
    return Job(
        model=model,
        model_key=module_key(model.module),
        recipe=chosen,
        recipe_name="custom" if is_recipe else Path(str(recipe)).stem,
        target=target,
        plan=plan,
        calibration=dataset,
        evaluate=labelled,
        kernel_cache=KernelCache() if kernel_cache else None,
        costs=_costs(target, chosen, kernel_cache),
        notes=notes,
        emit=emit,
    )


def _costs(target: Target, recipe: Recipe, cached: bool) -> TargetCosts:
    from .kernel_bench import bench_of
    from .kernel_cache import KernelCache
    from .layer_costs import TargetCosts, costs_folder

    bench = bench_of(target) if recipe.measure else None
    return TargetCosts(target, bench, recipe.costs, KernelCache(costs_folder()) if cached else None)


def _plan(module: tvm.IRModule, recipe: Recipe) -> tuple[tuple[Step, ...], ...]:
    """Consecutive steps of one name are one pass: their selectors decide by layer.

    Raises `RecipeError` for a selector that matches nothing.
    """
    groups: list[list[Step]] = []
    for step in recipe.steps:
        if groups and groups[-1][0].name == step.name:
            groups[-1].append(step)
        else:
            groups.append([step])
    for step in recipe.steps:
        try:
            schemes_of(module, [step])
        except RecipeError as error:
            raise RecipeError(f"{step.origin}: {error}" if step.origin else str(error)) from None
    return tuple(tuple(group) for group in groups)


def schemes_of(module: tvm.IRModule, steps: Sequence[Step]) -> dict[str, Any]:
    """Layer name => config, the most specific selector winning."""
    from .relay_passes.select import list_layers, resolve

    layers = list_layers(module)
    if not layers:
        raise RecipeError("the model has no layer that could be compressed (conv, matmul)")
    return resolve(layers, [(step.layers, step.config) for step in steps])


def quantised_layers(module: tvm.IRModule) -> frozenset[str]:
    """The layers whose weight is stored compressed: in an imported model, those that came so."""
    from .relay_passes.select import list_layers

    return frozenset(layer.name for layer in list_layers(module) if layer.is_quantized)


def _step_that_needs_data(module: tvm.IRModule, plan: tuple[tuple[Step, ...], ...]) -> str | None:
    """The first one."""
    from .relay_passes.passes import PASSES

    for group in plan:
        name, schemes = group[0].name, schemes_of(module, group)
        by_losses = any(
            getattr(config, "scope", "") == "sensitivity" for config in schemes.values()
        )
        if by_losses or PASSES[name].observe(module, schemes):
            return name
    return None


def module_key(module: tvm.IRModule) -> str:
    """Hash of a module with its constants."""
    import tvm

    return hashlib.sha256(tvm.ir.save_json(module).encode()).hexdigest()


# --- 3. calibrate and compress ------------------------------------------------------------------


def apply_recipe(job: Job, workspace: Workspace, clock: _Clock) -> tvm.IRModule:
    """Run the recipe's passes in order; calibrate whenever tensors have changed."""
    from .pipeline import choosing_pipeline
    from .relay_passes.passes import PASSES
    from .relay_passes.step_notes import (
        left_alone,
        read_missed,
        untouched,
        with_left_alone,
        with_missed,
    )

    module = job.model.module
    came_quantised = quantised_layers(module)
    insisted: set[str] = set()
    statistics: Statistics | None = None
    for index, group in enumerate(job.plan):
        entry = PASSES[group[0].name]
        is_staged = entry.stages_at is not None
        if statistics is None and entry.needs_statistics and not is_staged:
            statistics = _calibrate(job, module, job.plan[index:], workspace, clock)
        with clock.step(group[0].name, shown=not is_staged):
            schemes = schemes_of(module, group)
            left = left_alone(group[0].name, module, schemes)
            schemes = {name: config for name, config in schemes.items() if name not in left}
            if entry.uses_costs:
                job.costs.schemes = _shipped_as(module, job.plan[index + 1 :])
            if group[0].name == "sparsify":
                insisted |= {name for name, config in schemes.items() if config.insist}
            if is_staged:
                before = module
                module = _apply_in_stages(
                    job, module, group[0].name, schemes, job.costs, workspace, clock.progress
                )
                left |= untouched(group[0].name, module, schemes)
                module = with_left_alone(module, group[0].name, left)
                module = with_missed(module, group[0].name, before, schemes)
                statistics = None
                continue
            if entry.compares_with_float:
                schemes = {n: config for n, config in schemes.items() if n not in came_quantised}
            module = entry.apply(module, schemes, statistics, job.costs)
            module = with_left_alone(module, group[0].name, left)
        if not entry.keeps_statistics:
            statistics = None
    for words in read_missed(module):
        clock.progress.note(words)
    with clock.step("compare kernels"):
        job.costs.schemes = {}  # the graph itself has the integers now
        return choosing_pipeline(job.target, job.costs, insisted)(module)


def _shipped_as(module: tvm.IRModule, plan: Iterable[tuple[Step, ...]]) -> dict[str, Any]:
    """Layer name => how the first of the steps in `plan` that does quantises it."""
    found: dict[str, Any] = {}
    for group in plan:
        if group[0].name == "quantize":
            found = {**schemes_of(module, group), **found}
    return found


def _apply_in_stages(
    job: Job,
    module: tvm.IRModule,
    name: str,
    schemes: Mapping[str, Any],
    costs: LayerCosts | None,
    workspace: Workspace,
    progress: Progress,
) -> tvm.IRModule:
    """Part by part, each calibrated on the module with the parts before it compressed, towards
    what its layers gave in the module as it was."""
    from .calibrate import calibrate
    from .calibrate_towards import calibrate_towards
    from .relay_passes.numerics.statistics import Statistics
    from .relay_passes.passes import PASSES

    entry = PASSES[name]
    original, data = module, job.calibration
    if entry.undecided(schemes):
        schemes = _decide(job, module, name, schemes, workspace, progress)
    stages = entry.stages(module, schemes)
    for index, stage in enumerate(progress.track(stages, name, len(stages), "parts")):
        wanted = entry.observe(module, stage)
        statistics = Statistics()
        if wanted and data is not None:
            model, options = replace(job.model, module=module), _calibration_options(job)
            parts = ["stage", _key_of(job, original), *_calibration_parts(job, module, wanted)]
            if index == 0:
                gather = partial(calibrate, model, data, wanted, **options)
            else:
                layers = wanted.second_moments
                options["rows"] = wanted.patches
                gather = partial(calibrate_towards, original, model, layers, data, **options)
            statistics = _kept(gather, parts, data, workspace)
        module = entry.apply(module, stage, statistics, costs)
    return module


def _decide(
    job: Job,
    module: tvm.IRModule,
    name: str,
    schemes: Mapping[str, Any],
    workspace: Workspace,
    progress: Progress,
) -> dict[str, Any]:
    """A config for each layer, where several have one together."""
    from .calibrate import calibrate
    from .output_loss import OutputLoss
    from .relay_passes.numerics.statistics import Statistics
    from .relay_passes.passes import PASSES

    entry, data = PASSES[name], job.calibration
    if data is None:
        return entry.decide(module, schemes, Statistics(), None, job.costs)
    model, options = replace(job.model, module=module), _calibration_options(job)
    # Losses on what the layers were solved for would say nothing where samples are few.
    seen, unseen = data.parted(min(LOSS_SAMPLES, max(1, len(data) // 3)))
    wanted = entry.observe(module, entry.undecided(schemes))
    statistics = Statistics()
    if wanted:
        shown = partial(calibrate, model, seen, wanted, progress=progress, **options)
        parts = ["decide", len(unseen), *_calibration_parts(job, module, wanted)]
        statistics = _kept(shown, parts, data, workspace)
    with progress.step(f"{name}: shares by layer"):
        loss = OutputLoss(model, unseen, **options)
        return entry.decide(module, schemes, statistics, loss, job.costs)


def compress_module(
    module: tvm.IRModule, recipe: str | Path | Recipe, target: str, calibration: Any
) -> tuple[tvm.IRModule, Target]:
    """Steps 1 to 3 alone, on a module in memory: compressed graph form and the target it is for."""
    job = load_job(module, recipe, target, calibration)
    return compress_job(job, Progress()), job.target


def load_job(
    model: Any,
    recipe: str | Path | Recipe,
    target: str | None,
    calibration: Any,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    input_values: Mapping[str, float] | None = None,
    threads: int | None = None,
) -> Job:
    """Step 1 alone: everything the user gave, checked."""
    return _load(model, recipe, target, calibration, None, None, shapes, input_values, threads)


def compress_job(job: Job, progress: Progress) -> tvm.IRModule:
    """Step 3 alone, in memory."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        with Workspace(Path(folder) / "out", job.model_key) as workspace:
            return apply_recipe(job, workspace, _Clock(progress))


def _calibrate(
    job: Job,
    module: tvm.IRModule,
    groups: Iterable[tuple[Step, ...]],
    workspace: Workspace,
    clock: _Clock,
) -> Statistics:
    """One pass over the data for all groups up to the first that changes the tensors."""
    from .calibrate import calibrate
    from .relay_passes.numerics.statistics import Statistics
    from .relay_passes.observations import Observations
    from .relay_passes.passes import PASSES

    wanted = Observations()
    for group in groups:
        entry = PASSES[group[0].name]
        if entry.stages_at is not None:
            break
        wanted = wanted | (entry.observe(module, schemes_of(module, group)) or Observations())
        if not entry.keeps_statistics:
            break
    if not wanted or job.calibration is None:
        return Statistics()
    data = job.calibration
    options = {**_calibration_options(job), "progress": clock.progress}
    gather = partial(calibrate, replace(job.model, module=module), data, wanted, **options)

    def make(folder: Path) -> None:
        gather().save(folder / "statistics.npz")

    if data.fingerprint is None:  # an iterable: nothing says whether it is the same as before
        with clock.step("calibrate", shown=False):
            return gather()
    parts = _calibration_parts(job, module, wanted)
    with clock.cached(workspace, "calibrate", parts, make, shown=False) as folder:
        return Statistics.load(folder / "statistics.npz")


def _kept(
    gather: Callable[[], Statistics], parts: Sequence[object], data: Dataset, workspace: Workspace
) -> Statistics:
    """Statistics that an earlier run may have gathered."""
    from .relay_passes.numerics.statistics import Statistics

    if data.fingerprint is None:  # an iterable: nothing says whether it is the same as before
        return gather()
    folder = workspace.cached("calibrate", parts, lambda at: gather().save(at / "statistics.npz"))
    return Statistics.load(folder / "statistics.npz")


def _calibration_options(job: Job) -> dict[str, Any]:
    return {"target": job.float_target, "cached": job.kernel_cache}


def _calibration_parts(job: Job, module: tvm.IRModule, wanted: Observations) -> list[object]:
    """What statistics depend on."""
    assert job.calibration is not None
    return [
        _key_of(job, module),
        _observations_key(wanted),
        job.calibration.fingerprint,
        len(job.calibration),
        job.recipe.preprocessing,
        dict(job.float_target.tvm_options),
        job.recipe.seed,
    ]


def _observations_key(wanted: Observations) -> str:
    return json.dumps(
        {
            "tensors": sorted(wanted.tensors),
            "channels": dict(sorted(wanted.channels.items())),
            "first": sorted(wanted.first_moments),
            "second": sorted(wanted.second_moments),
            "gradients": dict(sorted(wanted.gradients.items())),
            "patches": dict(sorted(wanted.patches.items())),
        }
    )


# --- 4. tune ------------------------------------------------------------------------------------


def _open_database(folder: Path | None) -> Database:
    from .tuning.database import Database

    return Database(folder)


def _tune(
    job: Job,
    compressed: tvm.IRModule,
    records: Database,
    trials: int | None,
    minutes: float | None,
    clock: _Clock,
) -> None:
    from .tuning.ledger import Budget
    from .tuning.tune import tune_modules

    sides = {"compressed": compressed}
    if not job.target.is_cross:
        # The original as well: a speed-up over kernels that nobody tuned would be no honest figure.
        sides["original"] = job.model.module
    with clock.step("tune", shown=False):
        tune_modules(sides, job.target, Budget(trials, minutes), records, clock.progress)


# --- 5. build -----------------------------------------------------------------------------------


def _build_all(
    job: Job, compressed: tvm.IRModule, records: Database, workspace: Workspace, clock: _Clock
) -> dict[str, Path]:
    """Folder of each library, `library.so` and `info.json`; of the reference with `taps.json`."""
    from .tuning.tune import this_cpu

    if job.target.is_cross:
        return _build_project(job, compressed, records, workspace, clock)
    folders: dict[str, Path] = {}
    modules = {"compressed": compressed, "original": job.model.module}
    for side, module in modules.items():
        if folders and _computes_the_same(compressed, module):
            folders[side] = folders["compressed"]  # came quantised, and nothing was left to do
            continue
        parts = [side, _key_of(job, module), job.target.fingerprint()]
        lowering = Lowering(module, job.target, records)
        # Records that change no choice of this model change nothing in its library.
        asked = [*parts, records.fingerprint(), this_cpu()]
        with clock.cached(workspace, f"lower {side}", asked, lowering.save_choices) as folder:
            choices = (folder / "choices.json").read_text(encoding="utf-8")
        build = partial(_build_side, lowering, job, side == "compressed")
        with clock.cached(workspace, f"build {side}", [*parts, choices], build) as folder:
            folders[side] = folder
        if side == "compressed" and job.target.runs_here():
            reference = partial(_build_reference, lowering, job)
            with clock.cached(workspace, "build reference", parts, reference) as folder:
                folders["reference"] = folder
    if job.kernel_cache is not None and job.kernel_cache.trouble is not None:
        clock.progress.note(f"warning: cache of kernels: {job.kernel_cache.trouble}")
    return folders


def _build_project(
    job: Job, compressed: tvm.IRModule, records: Database, workspace: Workspace, clock: _Clock
) -> dict[str, Path]:
    """The same for a C project: what it is compared with is built for the machine at hand."""
    from .tuning.tune import device_of

    target, host = job.target, job.float_target
    parts = ["project", _key_of(job, compressed), target.fingerprint(), job.emit, job.model.name]
    lowering = Lowering(compressed, target, records)
    asked = [*parts, records.fingerprint(), device_of(target)]
    with clock.cached(workspace, "lower compressed", asked, lowering.save_choices) as folder:
        choices = (folder / "choices.json").read_text(encoding="utf-8")
    folders: dict[str, Path] = {}
    reference = partial(_build_reference, lowering, job)
    with clock.cached(workspace, "build reference", parts, reference) as folder:
        folders["reference"] = folder
    golden_from = job.calibration or job.evaluate
    probes = "" if golden_from is None else f"{golden_from.fingerprint} {len(golden_from)}"
    asked = [*parts, choices, probes, str(job.recipe.seed)]
    build = partial(_write_project, lowering, job, folders["reference"])
    with clock.cached(workspace, "build compressed", asked, build) as folder:
        folders["compressed"] = folder
    parts = ["original", _key_of(job, job.model.module), host.fingerprint()]
    original = Lowering(job.model.module, host, records)
    build = partial(_build_side, original, job, False)
    with clock.cached(workspace, "build original", parts, build) as folder:
        folders["original"] = folder
    return folders


def _plan_project(lowering: Lowering, job: Job, folder: Path) -> None:
    lowering.planned(job)
    lowering.save_choices(folder)


def _write_project(lowering: Lowering, job: Job, reference: Path, folder: Path) -> str:
    from .bare.emit import c_identifier, write_project
    from .bare.golden import golden_samples
    from .build import compile_project
    from .contents import describe_project, require_project_fits
    from .report.arena import arena_of
    from .verification import tap_specs

    planned = lowering.planned(job)
    built = compile_project(lowering.lowered, job.emit, job.kernel_cache, planned)
    info = describe_project(built)
    require_project_fits(built, info)
    project = built.project
    arena = arena_of(project.plan, project.steps, job.target.ram_bytes)
    sources = ([s.name for s in job.model.inputs], [s.name for s in job.model.outputs])
    taps = tap_specs(json.loads((reference / "taps.json").read_text(encoding="utf-8")))
    golden = golden_samples(built.project, reference / "library.so", taps, sources, _probes(job))
    (folder / "project").mkdir()
    write_project(built.project, c_identifier(job.model.name), sources, folder / "project", golden)
    _write_info(folder, built, info, lowering, arena)
    kernels = built.project.kernels
    compiled = len(kernels) - built.project.cached_kernels
    return f"{len(kernels)} kernels: {built.project.cached_kernels} from cache, {compiled} compiled"


class Lowering:
    """A module lowered for a target, when that is needed and once."""

    def __init__(self, module: tvm.IRModule, target: Target, records: Database) -> None:
        self._module, self._target, self._records = module, target, records
        self._planned: Planned | None = None

    @cached_property
    def choices(self) -> TunedChoices:
        from .tuning.database import TunedChoices
        from .tuning.tune import device_of

        return TunedChoices(self._records, self._target, device_of(self._target))

    @cached_property
    def lowered(self) -> Lowered:
        from .build import lower

        return lower(self._module, self._target, self.choices)

    def planned(self, job: Job) -> Planned:
        """Of a C project: what `job` asks for, once."""
        from .build import plan_project

        if self._planned is None:
            self._planned = plan_project(self.lowered, job.emit, job.kernel_cache)
        return self._planned

    def save_choices(self, folder: Path) -> None:
        """What tuning decided, by kernel."""
        chosen = {k: dict(choice) for k, choice in self.lowered.choices.items() if choice}
        _write_json(folder / "choices.json", chosen)


def _key_of(job: Job, module: tvm.IRModule) -> str:
    return job.model_key if module is job.model.module else module_key(module)


def _computes_the_same(a: tvm.IRModule, b: tvm.IRModule) -> bool:
    """Whether two modules differ at most in what passes noted."""
    from tvm_ffi import structural_equal

    from .relay_passes.quantize import LEFT_FLOAT_ATTR
    from .relay_passes.step_notes import LEFT_ALONE_ATTR, MISSED_ATTR

    def plain(module: tvm.IRModule) -> tvm.IRModule:
        module = module.clone()
        for attribute in (LEFT_FLOAT_ATTR, LEFT_ALONE_ATTR, MISSED_ATTR):
            module["main"] = module["main"].without_attr(attribute)
        return module

    return bool(structural_equal(plain(a), plain(b)))


def _build_side(lowering: Lowering, job: Job, is_compressed: bool, folder: Path) -> str:
    from .build import compile_lowered
    from .contents import describe_library, require_fits

    built = compile_lowered(lowering.lowered, job.kernel_cache)
    library = folder / "library.so"
    built.export(library)
    info = describe_library(built, library)
    if is_compressed:
        require_fits(info, job.target)
    _write_info(folder, built, info, lowering)
    return str(built.kernels)


def _write_info(
    folder: Path,
    built: Lowered,
    info: LibraryInfo,
    lowering: Lowering,
    arena: Arena | None = None,
) -> None:
    value: dict[str, Any] = {
        "info": info.to_json(),
        "left_float": list(built.left_float),
        "decoded_per_call": list(built.decoded_per_call),
        "sparse_kernels": dict(built.sparse_kernels),
        "generic_layers": list(built.generic_layers),
        "dead_channels": dict(built.dead_channels),
        "tuned": [record.to_json() for record in lowering.choices.used],
        "arena": None if arena is None else asdict(arena),
    }
    _write_json(folder / "info.json", value)


def _build_reference(lowering: Lowering, job: Job, folder: Path) -> None:
    from .build import compile_reference, export_library
    from .taps import tap

    lowered = lowering.lowered
    tapped, taps = tap(lowered.reference_module, [call.output for call in lowered.calls])
    export_library(compile_reference(tapped, job.kernel_cache), folder / "library.so")
    _write_json(folder / "taps.json", taps)


# --- 6. lay out ---------------------------------------------------------------------------------


def _stage(job: Job, folders: Mapping[str, Path], staging: Path) -> Artefact:
    """Everything but report and manifest, as an `Artefact` that can already run."""
    import shutil

    import numpy as np

    from .board_file import target_entry
    from .recipe import dump_recipe
    from .runners.rpc import Rpc

    (staging / DEPLOY).mkdir()
    (staging / "reference").mkdir()
    if job.target.is_cross:
        shutil.copytree(folders["compressed"] / "project", staging / DEPLOY, dirs_exist_ok=True)
    else:
        shutil.copyfile(folders["compressed"] / "library.so", staging / LIBRARIES["compressed"])
    shutil.copyfile(folders["original"] / "library.so", staging / LIBRARIES["original"])
    infos = {
        side: json.loads((folders[side] / "info.json").read_text())
        for side in ("compressed", "original")
    }
    _stage_records([info["tuned"] for info in infos.values()], staging)
    taps = []
    if "reference" in folders:
        taps = json.loads((folders["reference"] / "taps.json").read_text())
        shutil.copyfile(folders["reference"] / "library.so", staging / LIBRARIES["reference"])
    _write_json(
        staging / KERNELS,
        {
            "compressed": infos["compressed"]["info"],
            "original": infos["original"]["info"],
            "left_float": infos["compressed"]["left_float"],
            "decoded_per_call": infos["compressed"].get("decoded_per_call", []),
            "sparse_kernels": infos["compressed"].get("sparse_kernels", {}),
            "generic_layers": infos["compressed"].get("generic_layers", []),
            "dead_channels": infos["compressed"].get("dead_channels", {}),
            "arena": infos["compressed"].get("arena"),
            "taps": taps,
        },
    )
    comment = (
        f"Resolved recipe of {job.model.name}: with the model and the data, it reproduces this "
        f"artefact.\ntvm-compress compress MODEL --recipe {RECIPE} --calib DATA -o OUT"
    )
    recipe = job.recipe.replace(costs=dict(sorted(job.costs.used.items())))
    (staging / RECIPE).write_text(dump_recipe(recipe, comment), encoding="utf-8")
    probes = _probes(job)
    with (staging / "reference" / "probes.npz").open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **probes)
    manifest = {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "model": {
            "name": job.model.name,
            "key": job.model_key,
            "source_format": job.model.source_format,
            "original": "source, as imported"
            if quantised_layers(job.model.module)
            else "float original",
        },
        "recipe": job.recipe_name,
        "target": target_entry(job.target, job.recipe.target or job.target.name),
        "calibration": _data_summary(job.calibration),
        "evaluation": _data_summary(job.evaluate),
        "probes": "calibration data" if job.calibration is not None else "random",
        "inputs": [asdict(spec) for spec in job.model.inputs],
        "outputs": [asdict(spec) for spec in job.model.outputs],
        "files": {},
    }
    # The board's file was named by the user: what it says of a tracker holds for this run.
    device = Rpc.of(job.target) if job.target.rpc_tracker else None
    return Artefact(staging, manifest, device)


def _stage_records(used: Iterable[list[Any]], staging: Path) -> None:
    """The tuning records that the libraries were built with: they are part of what was done."""
    from .tuning.database import write_export
    from .tuning.record import Record

    records = {
        (value["workload"], value["threads"]): Record.from_json(value)
        for values in used
        for value in values
    }
    if records:
        (staging / RECORDS).parent.mkdir()
        write_export(staging / RECORDS, records.values())


def _probes(job: Job) -> dict[str, Any]:
    """A few inputs, [PROBES, *shape of the input]: real ones where there are any."""
    import numpy as np

    data = job.calibration if job.calibration is not None else job.evaluate
    if data is not None:
        feeds = list(data.take(PROBES * data.batch))
    else:
        random = np.random.default_rng(job.recipe.seed)
        feeds = [
            {spec.name: random_input(random, spec.shape, spec.dtype) for spec in job.model.inputs}
            for _ in range(PROBES)
        ]
    return {spec.name: np.stack([feed[spec.name] for feed in feeds]) for spec in job.model.inputs}


def random_input(random: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An array for an input of the model where there is no data."""
    import numpy as np

    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    if np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        wide = limits.bits > 16  # most likely indices or counts: stay small
        return random.integers(0 if wide else limits.min, 2 if wide else limits.max, shape).astype(
            dtype
        )
    return random.standard_normal(shape).astype(dtype)


def _data_summary(data: Dataset | None) -> dict[str, Any] | None:
    if data is None:
        return None
    return {
        "source": Path(data.source).name,
        "samples": len(data),
        "fingerprint": data.fingerprint,
    }


def versions() -> dict[str, str]:
    """What was used to make an artefact."""
    from importlib.metadata import version

    from . import __version__

    return {
        "tvm_compress": __version__,
        "apache-tvm": version("apache-tvm"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
    }


# --- 7. verify and measure ----------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What was found out about a staged artefact; `None` where this machine cannot run it."""

    verification: Any
    benchmark: Any
    board: Any = None
    """Of a C project, in the place of times: what it costs on its emulated machine."""


def _gather_evidence(
    artefact: Artefact,
    job: Job,
    compressed: tvm.IRModule,
    records: Database,
    threads: int | None,
    clock: _Clock,
) -> Evidence:
    from .benchmarking import benchmark
    from .verification import verify

    if job.target.is_cross:
        return _project_evidence(artefact, job, compressed, records, clock)
    if not job.target.runs_here():
        clock.progress.note(
            f"{job.target.name} does not run on this machine: built, but neither verified nor timed"
        )
        return Evidence(None, None)
    with clock.step("verify", shown=False):
        verification = verify(artefact, job.evaluate, threads=threads, progress=clock.progress)
    with clock.step("benchmark", shown=False):
        measured = benchmark(
            artefact, seconds=BENCHMARK_SECONDS, threads=threads, progress=clock.progress
        )
    return Evidence(verification, measured)


def _project_evidence(
    artefact: Artefact, job: Job, compressed: tvm.IRModule, records: Database, clock: _Clock
) -> Evidence:
    """On the emulated machine, where there is one."""
    from .bare.session import cannot_run
    from .benchmarking import probe_inputs
    from .board_benchmarking import benchmark_board, board_cost
    from .original_on_board import original_cost
    from .verification import verify

    reason = cannot_run(job.target)
    if reason is not None:
        clock.progress.note(f"{job.target.name}: built, but not verified: {reason}")
        return Evidence(None, None)
    with clock.step("verify", shown=False):
        verification = verify(artefact, job.evaluate, progress=clock.progress)
    if job.target.runner == "rpc":
        return Evidence(verification, None)
    with clock.step("count", shown=False):
        cost = board_cost(benchmark_board(artefact, progress=clock.progress))
    if cost.instructions is not None and not _computes_the_same(compressed, job.model.module):
        with clock.step("count original"):
            lowering = Lowering(job.model.module, job.target, records)
            found = original_cost(job, lowering, probe_inputs(artefact)[0])
        cost = replace(cost, original=found[0], no_original=found[1])
    return Evidence(verification, None, cost)


def _write_manifest(artefact: Artefact, staging: Path) -> None:
    manifest = {**artefact.manifest, "files": describe_files(staging)}
    _write_json(staging / MANIFEST, manifest)


def _write_json(path: Path, value: Any) -> None:
    """Plain data to a file; refuses NaN, which JSON does not have."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


# --- time ---------------------------------------------------------------------------------------


@dataclass
class _Clock:
    """Times the steps for the report and shows them while they run."""

    progress: Progress
    steps: list[StepTime] = field(default_factory=list)

    @contextmanager
    def step(self, name: str, shown: bool = True) -> Iterator[None]:
        """`shown=False` for a step that shows its own progress."""
        started = time.perf_counter()
        if shown:
            with self.progress.step(name):
                yield
        else:
            yield
        self._add(name, started, cached=False)

    @contextmanager
    def cached(
        self,
        workspace: Workspace,
        name: str,
        parts: Sequence[object],
        make: Callable[[Path], str | None],
        shown: bool = True,
    ) -> Iterator[Path]:
        """The folder of a step that may have been done by an earlier run.

        `make` may return a detail for the report.
        """
        started = time.perf_counter()
        made: list[str] = []

        def noted(folder: Path) -> None:
            if shown:
                with self.progress.step(name):
                    made.append(make(folder) or "")
            else:
                made.append(make(folder) or "")

        yield workspace.cached(name.replace(" ", "-"), parts, noted)
        self._add(name, started, cached=not made, detail="".join(made))

    def _add(self, name: str, started: float, cached: bool, detail: str = "") -> None:
        from .report.rows import StepTime

        self.steps.append(StepTime(name, time.perf_counter() - started, cached, detail))
