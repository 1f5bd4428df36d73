"""What layers cost on the target of a run: `relay_passes.costs.LayerCosts`.

Costs come from `kernel_bench` where anything here runs the target's kernels, else from the tables
of expected costs that kernels bring with them. A comparison is made once: its figures are kept in
the user's cache, and in the artefact's recipe, by which a later run decides as this one did.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ArtefactError, TargetError
from .relay_passes.costs import (
    COUNTED,
    MEASURED,
    PREDICTED,
    Comparison,
    Cost,
    Decoder,
    Sparse,
    Stored,
)

if TYPE_CHECKING:
    from .kernel_bench import Kernel, KernelBench
    from .kernel_cache import KernelCache
    from .progress import Progress
    from .relay_passes.costs import LayerUse
    from .relay_passes.layer_spec import LayerSpec
    from .relay_passes.quantize_config import QuantizeConfig
    from .schedules.sparse_form import SparseForm
    from .targets import Target

# So many of the forms that are expected to be cheapest are looked at.
_FORMS = 2
# What is expected to take so many times as long as the dense kernel is not run to find out.
_HOPELESS = 4.0
# Weights that are stored, of how many: what forms are compared at before there are zeros.
_USUAL = 1, 5
_KEY_DIGITS = 16
_PART = re.compile(r"_(part\d+|residual)$")


def costs_folder() -> Path:
    """Where figures are kept for later runs."""
    from .user_cache import user_cache

    return user_cache() / "costs"


class TargetCosts:
    """Costs on `target`.

    `known`: figures of comparisons by key, as `used` has them; they are not made again. `cache`
    keeps figures of other runs on this machine. `bench` None: all costs are predicted.
    """

    def __init__(
        self,
        target: Target,
        bench: KernelBench | None = None,
        known: Mapping[str, Sequence[float]] | None = None,
        cache: KernelCache | None = None,
        progress: Progress | None = None,
    ) -> None:
        from .progress import Progress as Silent

        self.target = target
        self.bench = bench
        self.known = dict(known or {})
        self.cache = cache
        self.progress = progress or Silent()
        self.schemes: Mapping[str, QuantizeConfig] = {}
        """What later steps make of the layers; the others ship in float."""
        self.used: dict[str, tuple[float, ...]] = {}
        """Figures of all comparisons that were asked for and not predicted, by key."""

    @property
    def unit(self) -> str:
        """Of costs, wherever kernels could be run."""
        return PREDICTED if self.bench is None else self.bench.unit

    # --- LayerCosts -----------------------------------------------------------------------------

    @property
    def lanes(self) -> int:
        """See `LayerCosts`."""
        return self.target.lanes(32)

    def totals(self, alternatives: Sequence[Sequence[LayerUse]]) -> list[Cost]:
        """See `LayerCosts`."""
        shipped = [
            [(self._shipped(use.layer, use.spec), use.calls) for use in uses]
            for uses in alternatives
        ]
        first = next(use.layer for uses in alternatives for use in uses)
        different = {spec.to_json(): spec for uses in shipped for spec, _ in uses}
        kernels = [self._dense(different[key]) for key in sorted(different)]
        costs = {kernel.name: cost for kernel, cost in self._costs(first, kernels).items()}
        found = []
        for uses in shipped:
            own = [(costs[spec.to_json()], calls) for spec, calls in uses]
            time = sum(cost.time * calls for cost, calls in own)
            unit = next(iter(costs.values())).unit
            found.append(Cost(time, sum(cost.bytes for cost, _ in own), unit))
        return found

    def sparse(self, layer: str, spec: LayerSpec, kept: np.ndarray) -> Comparison:
        """See `LayerCosts`."""
        shipped = self._shipped(layer, spec)
        codes = _random_weights(shipped, kept.shape) * kept
        dense = self._dense(shipped, codes)
        forms = self._sparse(shipped, codes, dense)
        decoding = self._decoding(shipped, dense)
        rivals = [*forms, *([] if decoding is None else [decoding.whole])]
        is_close = any(item.expected <= _HOPELESS * dense.expected for item in rivals)
        calls = [] if decoding is None else [decoding.nothing]
        costs = self._costs(layer, [dense, *rivals, *calls], is_run=is_close)
        sparse = stored = None
        if forms:
            best = min(forms, key=lambda item: costs[item].time)
            sparse = Sparse(forms[best], costs[best])
        if decoding is not None:
            # A call takes its time, which the dense kernel's has in it already.
            decoded, nothing = costs[decoding.whole], costs[decoding.nothing]
            time = costs[dense].time + max(0.0, decoded.time - nothing.time)
            stored = Stored(replace(decoded, time=time), decoding.decoder)
        return Comparison(costs[dense], sparse, stored)

    def blocks(self, layer: str, spec: LayerSpec) -> tuple[int, ...]:
        """See `LayerCosts`."""
        from .schedules.dispatch import sparse_forms

        forms = sparse_forms(self._shipped(layer, spec), self.target)
        # Patterns in code serve few weights, and another form has the same block.
        ordered = sorted(
            (form for form in forms if not form.compiled),
            key=lambda form: (form.share(*_USUAL), -form.block),
        )
        return tuple(dict.fromkeys(form.block for form in ordered))

    # --- figures --------------------------------------------------------------------------------

    def _costs(
        self, layer: str, contestants: Sequence[_Contestant], is_run: bool = True
    ) -> dict[_Contestant, Cost]:
        """All in one unit; predicted, unless they are run here or were before."""
        figures, unit = None, PREDICTED
        if is_run:
            names = [contestant.name for contestant in contestants]
            kernels = [contestant.kernel for contestant in contestants]
            figures, unit = self._figures(layer, names, kernels)
        if figures is None:
            figures = [contestant.expected for contestant in contestants]
        pairs = zip(contestants, figures, strict=True)
        return {contestant: Cost(figure, contestant.bytes, unit) for contestant, figure in pairs}

    def _figures(
        self, layer: str, names: Sequence[str], kernels: Sequence[Kernel]
    ) -> tuple[list[float] | None, str]:
        """(costs of kernels that take turns, their unit), known ones where `names` were compared
        before; None: they have to be predicted."""
        key = _key(names, self.target.fingerprint())
        for unit in (MEASURED, COUNTED):
            found = self.known.get(f"{unit}:{key}")
            if found is not None and len(found) == len(names):
                self.used[f"{unit}:{key}"] = tuple(found)
                return list(found), unit
        if self.bench is None:
            return None, PREDICTED
        costs = self._cached(key, len(names))
        if costs is None:
            try:
                costs = [float(f"{cost:.4g}") for cost in self.bench.costs(kernels)]
            except (ArtefactError, TargetError) as error:
                self.progress.note(f"{layer}: its cost is predicted: {error}")
                return None, PREDICTED
            self._keep(key, costs)
        full = f"{self.bench.unit}:{key}"
        self.known[full] = self.used[full] = tuple(costs)
        return costs, self.bench.unit

    def _cached(self, key: str, count: int) -> list[float] | None:
        content = None if self.cache is None else self.cache.get(self._cache_key(key))
        if content is None:
            return None
        costs = [float(cost) for cost in json.loads(content)]
        return costs if len(costs) == count else None

    def _keep(self, key: str, costs: Sequence[float]) -> None:
        if self.cache is not None:
            self.cache.put(self._cache_key(key), json.dumps(costs).encode())
            self.cache.trim()

    def _cache_key(self, key: str) -> str:
        """With what measured, the code that made the kernels and the code that timed them."""
        from .compile_kernels import compiler_version
        from .tuning.tune import device_of
        from .workspace import hash_sources

        assert self.bench is not None
        parts = [key, self.bench.unit, device_of(self.target), compiler_version()]
        return hash_sources([Path(__file__).with_name("kernel_bench.py")], json.dumps(parts))

    # --- kernels --------------------------------------------------------------------------------

    def _shipped(self, layer: str, spec: LayerSpec) -> LayerSpec:
        """In the integers that later steps give the layer. Weight-only layers compute in float."""
        data = spec.data_dtype
        config = self.schemes.get(layer) or self.schemes.get(_PART.sub("", layer))
        if config is not None and config.weights is not None and config.activations is not None:
            data = config.activations
        if data == "float32":
            return spec
        if data == "int8" and self.target.is_x86:
            data = "uint8"  # UnsignedActivations
        largest = spec.reduction_size * (255 if data != "int16" else 2**15) * 127
        acc = "int32" if largest < 2**31 else "int64"
        return spec.replace(data_dtype=data, weight_dtype="int8", acc_dtype=acc)

    def _dense(self, spec: LayerSpec, codes: np.ndarray | None = None) -> _Contestant:
        """`codes` [G, K, N]; None: any."""
        from .kernel_bench import Kernel
        from .schedules import pack_weight

        groups, columns = spec.groups_of_channels, spec.columns
        if codes is None:
            codes = _random_weights(spec, (groups, spec.reduction_size, columns))
        # [G, K, N] -> [K, G * N]
        weight = codes.transpose(1, 0, 2).reshape(spec.weight_shape)
        packed = pack_weight(spec, weight, self.target) or (spec, weight)
        cycles = predicted_cycles(spec, self.target)
        return _Contestant(spec.to_json(), Kernel(packed[0], (packed[1],)), cycles)

    def _sparse(
        self, spec: LayerSpec, codes: np.ndarray, dense: _Contestant
    ) -> dict[_Contestant, SparseForm]:
        """The forms that are expected to be cheapest for a layer with the weight `codes`
        [G, K, N]."""
        from .kernel_bench import Kernel
        from .schedules.sparse_form import CODE_BYTES
        from .schedules.sparse_weight import adds_exactly, encoded, leaves_out, sparse_candidates

        found: dict[_Contestant, SparseForm] = {}
        for share, form in sparse_candidates(spec, codes != 0, self.target):
            if len(found) == _FORMS or (found and share > _HOPELESS):
                break
            sparse, arrays = encoded(spec, codes, form)
            # Faster though it skips nothing: a choice between kernels, not a reason for zeros.
            if leaves_out(spec, arrays[0], form) and adds_exactly(sparse, form):
                entries = arrays[0].size // form.block
                name, kernel = f"{form.words} {entries}", Kernel(sparse, tuple(arrays))
                code = entries * CODE_BYTES if form.compiled else 0
                found[_Contestant(name, kernel, share * dense.expected, code)] = form
        return found

    def _decoding(self, spec: LayerSpec, dense: _Contestant) -> _Decoding | None:
        """Of the dense kernel's weight; None: hardly smaller, or not to be had."""
        from .kernel_bench import Kernel
        from .schedules.stored_weight import CODE_BYTES, empty, expected_share, stored_weight

        found = stored_weight(spec, dense.kernel.weights[0], self.target)
        if found is None:
            return None
        stored, arrays = found
        time = expected_share(spec, self.target) * dense.expected
        name, kernel = f"decoded {stored.stored} of {stored.size}", Kernel(stored, tuple(arrays))
        none, few = empty(stored.dtype)
        return _Decoding(
            _Contestant(name, kernel, time),
            _Contestant("decoded none", Kernel(none, tuple(few)), 0.0),
            Decoder(stored.decoding.kind, CODE_BYTES),
        )


@dataclass(frozen=True, eq=False)
class _Contestant:
    """A kernel that is compared with others."""

    name: str
    """Tells it from other kernels of layers of its kind, where figures are kept."""
    kernel: Kernel
    expected: float
    """Cycles, should nobody run it."""
    code: int = 0
    """Bytes of a pattern that is in its code."""

    @property
    def bytes(self) -> int:
        """As it is stored."""
        return sum(array.nbytes for array in self.kernel.weights) + self.code


@dataclass(frozen=True)
class _Decoding:
    """What is run to know the time that decoding a weight adds to a layer."""

    whole: _Contestant
    nothing: _Contestant
    """A call, and hardly more."""
    decoder: Decoder


def _key(names: Sequence[str], surroundings: str) -> str:
    return hashlib.sha256(json.dumps([*names, surroundings]).encode()).hexdigest()[:_KEY_DIGITS]


def _random_weights(spec: LayerSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Distributed like weights, none of them zero: codes that are small are common, which decides
    on some CPUs how many products fit 16 bits."""
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    if spec.weight_dtype == "float32":
        return values + np.float32(1e-6)
    codes = np.clip(np.rint(values * 32), -127, 127).astype(spec.weight_dtype)
    codes[codes == 0] = 1
    return codes


def predicted_cycles(spec: Any, target: Target) -> float:
    """Products and results by the vector, ragged ends in full."""
    bits = 32 if spec.data_dtype == "float32" else 8 * np.dtype(spec.data_dtype).itemsize
    lanes = max(1, target.lanes(bits))
    outputs = int(np.prod(spec.output_shape)) // (spec.columns * spec.groups_of_channels)
    groups, columns = spec.groups_of_channels, spec.columns
    if columns == 1:  # depthwise: lanes are groups
        groups, columns = 1, groups
    vectors = -(-columns // lanes) * groups
    return float(outputs * vectors * (spec.reduction_size + 1))
