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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ArtefactError, TargetError
from .relay_passes.costs import COUNTED, MEASURED, PREDICTED, Comparison, StoredCost, Total

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

    def compare(self, layer: str, chains: Sequence[Sequence[LayerSpec]]) -> list[float]:
        """See `LayerCosts`."""
        shipped = [[self._shipped(layer, spec) for spec in chain] for chain in chains]
        costs, _, _ = self._dense_costs(layer, [spec for chain in shipped for spec in chain])
        return [sum(costs[spec.to_json()] for spec in chain) for chain in shipped]

    def totals(self, alternatives: Sequence[Sequence[LayerUse]]) -> list[Total]:
        """See `LayerCosts`."""
        shipped = [
            [(self._shipped(use.layer, use.spec), use.calls) for use in uses]
            for uses in alternatives
        ]
        first = next(use.layer for uses in alternatives for use in uses)
        every = [spec for uses in shipped for spec, _ in uses]
        costs, sizes, unit = self._dense_costs(first, every)
        return [
            Total(
                sum(costs[spec.to_json()] * calls for spec, calls in uses),
                sum(sizes[spec.to_json()] for spec, _ in uses),
                unit,
            )
            for uses in shipped
        ]

    def sparse(self, layer: str, spec: LayerSpec, kept: np.ndarray) -> Comparison:
        """See `LayerCosts`."""
        from .schedules.sparse_form import CODE_BYTES
        from .schedules.sparse_weight import adds_exactly, encoded, sparse_candidates
        from .schedules.stored_weight import empty, expected_share, stored_weight

        shipped = self._shipped(layer, spec)
        item = np.dtype(shipped.weight_storage_dtype).itemsize
        dense_bytes = kept.size * item
        cycles = predicted_cycles(shipped, self.target)
        codes = _random_weights(shipped, kept.shape) * kept
        found: list[tuple[float, SparseForm, int, Kernel]] = []
        for share, form in sparse_candidates(shipped, kept, self.target):
            if len(found) == _FORMS or (found and share > _HOPELESS):
                break
            sparse, arrays = encoded(shipped, codes, form)
            groups, inputs, outputs = kept.shape
            whole = groups * inputs * -(-outputs // form.block) * form.block
            # Faster though it skips nothing: a choice between kernels, not a reason for zeros.
            if arrays[0].size < whole and adds_exactly(sparse, form):
                entries = arrays[0].size // form.block
                found.append((share, form, entries, _kernel(sparse, arrays)))
        dense = self._dense(shipped, codes)
        decoding = stored_weight(shipped, dense.weights[0], self.target)
        if not found and decoding is None:
            return Comparison(None, cycles, cycles, dense_bytes, dense_bytes, PREDICTED)
        names = [f"{form.words} {entries}" for _, form, entries, _ in found]
        shares, kernels = [share for share, *_ in found], [kernel for *_, kernel in found]
        if decoding is not None:
            names.append(f"decoded {decoding[0].stored} of {decoding[0].size}")
            shares.append(expected_share(shipped, self.target))
            kernels.append(_kernel(*decoding))
            # A call takes its time, which the dense kernel's has in it already.
            names.append("decoded none")
            kernels.append(_kernel(*empty(decoding[0].dtype)))
        figures, unit = None, PREDICTED
        if min(shares) <= _HOPELESS:
            figures, unit = self._figures(layer, [shipped.to_json(), *names], [dense, *kernels])
        if figures is None:
            figures = [cycles, *(share * cycles for share in shares)]
            figures += [0.0] * (decoding is not None)
        stored = None
        if decoding is not None:
            room = sum(array.nbytes for array in decoding[1])
            call = figures.pop()
            stored = StoredCost(figures[0] + max(0.0, figures.pop() - call), room)
        if not found:
            cost = figures[0]
            return Comparison(None, cost, cost, dense_bytes, dense_bytes, unit, stored)
        best = int(np.argmin(figures[1:]))
        _, form, entries, kernel = found[best]
        room = sum(array.nbytes for array in kernel.weights)
        if form.compiled:
            room += entries * CODE_BYTES
        return Comparison(form, figures[1 + best], figures[0], room, dense_bytes, unit, stored)

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

    def _dense_costs(
        self, layer: str, specs: Sequence[LayerSpec]
    ) -> tuple[dict[str, float], dict[str, int], str]:
        """(cost, bytes of the stored weight) by spec as JSON, and the unit of all costs."""
        different = {spec.to_json(): spec for spec in specs}
        keys = sorted(different)
        kernels = [self._dense(different[key]) for key in keys]
        figures, unit = self._figures(layer, keys, kernels)
        if figures is None:
            figures = [predicted_cycles(different[key], self.target) for key in keys]
        sizes = [sum(array.nbytes for array in kernel.weights) for kernel in kernels]
        return dict(zip(keys, figures, strict=True)), dict(zip(keys, sizes, strict=True)), unit

    # --- figures --------------------------------------------------------------------------------

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
        """With what measured, and the code that made the kernels."""
        from .compile_kernels import compiler_version
        from .tuning.tune import device_of

        assert self.bench is not None
        parts = [key, self.bench.unit, device_of(self.target), compiler_version()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

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

    def _dense(self, spec: LayerSpec, codes: np.ndarray | None = None) -> Kernel:
        """`codes` [G, K, N]; None: any."""
        from .schedules import pack_weight

        groups, columns = spec.groups_of_channels, spec.columns
        if codes is None:
            codes = _random_weights(spec, (groups, spec.reduction_size, columns))
        # [G, K, N] -> [K, G * N]
        weight = codes.transpose(1, 0, 2).reshape(spec.weight_shape)
        packed = pack_weight(spec, weight, self.target) or (spec, weight)
        return _kernel(packed[0], [packed[1]])


def _kernel(spec: Any, weights: Sequence[np.ndarray]) -> Kernel:
    from .kernel_bench import Kernel

    return Kernel(spec, tuple(weights))


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
