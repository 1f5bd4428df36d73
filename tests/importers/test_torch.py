"""torch.export programs and .pt2 files."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_compress.errors import ModelError
from tvm_compress.importers import load_model
from tvm_compress.model import REQUANTIZE_ATTR, Model
from tvm_compress.relay_passes.ir import op_name

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'torch')")

Run = Callable[..., dict[str, np.ndarray]]
Count = Callable[[Model], Counter[str]]


class Small(torch.nn.Module):  # type: ignore[name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = torch.nn.BatchNorm2d(8)
        self.blocks = torch.nn.ModuleList(
            [torch.nn.Conv2d(8, 8, 3, 2, 1, groups=8), torch.nn.Conv2d(8, 6, 1)]
        )
        self.fc = torch.nn.Linear(6, 4)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.bn(self.conv(x)))
        for block in self.blocks:
            x = torch.nn.functional.hardtanh(block(x), 0.0, 6.0)
        return self.fc(torch.dropout(x.mean((2, 3)), 0.5, False))


def small() -> Any:
    torch.manual_seed(0)
    module = Small().eval()
    with torch.no_grad():
        module.bn.running_mean.uniform_(-1, 1)
        module.bn.running_var.uniform_(0.5, 2)
    return module


def export(module: Any, *inputs: Any, **options: Any) -> Any:
    return torch.export.export(module, inputs, **options)


def same(module: Any, model: Model, inputs: tuple[Any, ...], run: Run) -> None:
    arrays = {spec.name: x.numpy() for spec, x in zip(model.inputs, inputs, strict=True)}
    (output,) = run(model, arrays).values()
    expected = module(*inputs).detach().numpy()
    bound = 1e-4 * float(np.abs(expected).max())
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=bound)


def test_module(run: Run, count: Count) -> None:
    module, x = small(), torch.randn(2, 3, 9, 9)
    model = load_model(export(module, x), name="small")
    same(module, model, (x,), run)
    operators = count(model)
    assert operators["relax.nn.conv2d"] == 3
    assert operators["relax.matmul"] == 1
    assert not {"relax.nn.batch_norm", "relax.nn.dropout", "relax.permute_dims"} & set(operators)
    bindings = model.module["main"].body.blocks[0].bindings
    anchors = [b.var.name for b in bindings if "conv" in str(op_name(b.value))]
    assert anchors == ["conv", "blocks_0", "blocks_1"]
    assert "fc" in [b.var.name for b in bindings]
    assert model.name == "small"
    assert [spec.name for spec in model.outputs] == ["output"]


def test_two_outputs(run: Run) -> None:
    class Two(torch.nn.Module):  # type: ignore[name-defined]
        def forward(self, a: Any, b: Any) -> Any:
            return a + b, {"product": a * b}

    a, b = torch.randn(3), torch.randn(3)
    model = load_model(export(Two(), a, b))
    assert [spec.name for spec in model.inputs] == ["a", "b"]
    outputs = run(model, {"a": a.numpy(), "b": b.numpy()})
    np.testing.assert_allclose(outputs["output_0"], (a + b).numpy(), rtol=1e-6)
    np.testing.assert_allclose(outputs["output_1"], (a * b).numpy(), rtol=1e-6)


def saved(module: Any, path: Path, *inputs: Any, **options: Any) -> Path:
    torch.export.save(export(module, *inputs, **options), path)
    return path


def test_file(tmp_path: Path, run: Run) -> None:
    module, x = small(), torch.randn(1, 3, 8, 8)
    model = load_model(saved(module, tmp_path / "net.pt2", x))
    same(module, model, (x,), run)
    assert model.name == "net"


def test_dynamic_batch(tmp_path: Path, run: Run) -> None:
    module = small()
    batch = {"x": {0: torch.export.Dim("batch", max=8)}}
    path = saved(module, tmp_path / "net.pt2", torch.randn(2, 3, 8, 8), dynamic_shapes=batch)
    assert load_model(path).inputs[0].shape == (1, 3, 8, 8)
    model = load_model(path, shapes={"x": (4, 3, 8, 8)})
    same(module, model, (torch.randn(4, 3, 8, 8),), run)
    with pytest.raises(ModelError, match="exported for sizes"):
        load_model(path, shapes={"x": (9, 3, 8, 8)})
    with pytest.raises(ModelError, match="which 4x3x9x9 does not fit"):
        load_model(path, shapes={"x": (4, 3, 9, 9)})


def test_index_from_the_end(run: Run) -> None:
    class Last(torch.nn.Module):  # type: ignore[name-defined]
        def forward(self, x: Any) -> Any:
            return x[:, -1], x[..., -2], x[:, torch.tensor([-3, 1])]

    x = torch.randn(1, 4, 5)
    model = load_model(torch.export.export(Last(), (x,)))
    found = run(model, {"x": x.numpy()})
    for output, expected in zip(found.values(), Last()(x), strict=True):
        np.testing.assert_array_equal(output, expected.numpy())


def test_quantised_program(run: Run, count: Count) -> None:
    """What PT2E conversion writes: quantize and dequantize per tensor and per channel."""
    from tvm_compress.importers.torch import _register_quantised_operators

    _register_quantised_operators()
    ops = torch.ops.quantized_decomposed
    importlib.import_module("torch.ao.quantization.fx._decomposed")

    class Quantised(torch.nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.register_buffer("w", torch.randint(-127, 128, (4, 3, 3, 3), dtype=torch.int8))
            self.register_buffer("s", torch.linspace(0.01, 0.02, 4))
            self.register_buffer("z", torch.zeros(4, dtype=torch.int64))

        def forward(self, x: Any) -> Any:
            x = ops.quantize_per_tensor.default(x, 0.03, 5, -128, 127, torch.int8)
            x = ops.dequantize_per_tensor.default(x, 0.03, 5, -128, 127, torch.int8)
            w = ops.dequantize_per_channel.default(self.w, self.s, self.z, 0, -127, 127, torch.int8)
            y = torch.nn.functional.conv2d(x, w, padding=1)
            y = ops.quantize_per_tensor.default(y, 0.1, -3, -100, 127, torch.int8)
            return ops.dequantize_per_tensor.default(y, 0.1, -3, -100, 127, torch.int8)

    module, x = Quantised(), torch.randn(1, 3, 6, 6)
    model = load_model(export(module, x))
    operators = count(model)
    assert operators["relax.quantize"] == 2
    assert operators["relax.dequantize"] == 3
    assert operators["relax.clip"] == 1  # -100 is above the type's minimum
    assert model.module["main"].attrs[REQUANTIZE_ATTR] == "float32"
    (output,) = run(model, {"x": x.numpy()}).values()
    assert np.abs(output - module(x).numpy()).max() <= 0.1 + 1e-6
    assert (np.abs(output - module(x).numpy()) < 1e-6).mean() > 0.99


def test_unsupported_operator() -> None:
    class Strange(torch.nn.Module):  # type: ignore[name-defined]
        def forward(self, x: Any) -> Any:
            return torch.linalg.eigvalsh(x)

    with pytest.raises(ModelError, match=r"operator aten\._linalg_eigh.* of node .* not supported"):
        load_model(export(Strange(), torch.eye(3)))


def test_nan_parameter() -> None:
    module = small()
    with torch.no_grad():
        module.fc.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"parameter 'fc\.weight' contains NaN"):
        load_model(export(module, torch.randn(1, 3, 8, 8)))


# ---- archives that must not be opened ------------------------------------------------------------


class Evil:
    """Pickles to a call that would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], **extra: bytes) -> Path:
    """A copy of the archive with members changed (`None` drops one) or added."""
    output = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(output, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for member in old.namelist():
            content = change(member, old.read(member))
            if content is not None:
                new.writestr(member, content)
        for name, content in extra.items():
            new.writestr(f"{root}/{name}", content)
    return output


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return saved(small(), tmp_path / "net.pt2", torch.randn(1, 3, 8, 8))


def test_unchanged_copy_loads(archive: Path) -> None:
    """The refusals below are about what they change, not about the copying."""
    assert load_model(rewritten(archive, lambda name, content: content)).inputs[0].name == "x"


def test_pickled_sample_inputs(archive: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = io.BytesIO()
    torch.save(Evil(mark), evil)

    def change(name: str, content: bytes) -> bytes:
        return evil.getvalue() if "sample_inputs" in name else content

    with pytest.raises(ModelError, match="sample inputs are more than tensors"):
        load_model(rewritten(archive, change))
    assert not mark.exists()


def test_pickled_weight(archive: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def change(name: str, content: bytes) -> bytes:
        if name.endswith("weights_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true')
        return pickle.dumps(Evil(mark)) if name.endswith("weight_0") else content

    with pytest.raises(ModelError, match="stored as a pickle"):
        load_model(rewritten(archive, change))
    assert not mark.exists()


def test_foreign_call(archive: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("model.json"):
            return content
        return content.replace(b"torch.ops.aten.relu.default", b"torch.hub.load")

    with pytest.raises(ModelError, match=r"calls 'torch\.hub\.load'"):
        load_model(rewritten(archive, change))


def test_code_in_a_symbolic_size(tmp_path: Path) -> None:
    batch = {"x": {0: torch.export.Dim("batch")}}
    path = saved(small(), tmp_path / "net.pt2", torch.randn(2, 3, 8, 8), dynamic_shapes=batch)
    mark = tmp_path / "mark"

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("model.json"):
            return content

        def poison(value: Any) -> Any:
            if isinstance(value, dict):
                return {
                    k: f"open('{mark}', 'w')" if k == "expr_str" else poison(v)
                    for k, v in value.items()
                }
            return [poison(v) for v in value] if isinstance(value, list) else value

        return json.dumps(poison(json.loads(content))).encode()

    with pytest.raises(ModelError, match="symbolic size .* is not accepted"):
        load_model(rewritten(path, change))
    assert not mark.exists()


def test_compiled_code(archive: Path) -> None:
    changed = rewritten(
        archive, lambda _, content: content, **{"data/aotinductor/model/a.so": b"\x7fELF"}
    )
    with pytest.raises(ModelError, match="contains compiled or pickled code"):
        load_model(changed)


def test_garbage(tmp_path: Path, archive: Path) -> None:
    content = archive.read_bytes()
    for number, damaged in enumerate((b"", b"PK\3\4", content[: len(content) // 2])):
        path = tmp_path / f"bad{number}.pt2"
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match="not a torch.export archive"):
            load_model(path)


def test_zip_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("top/readme", b"hello")
    with pytest.raises(ModelError, match="holds no exported program"):
        load_model(path)


# ---- the asset modules ---------------------------------------------------------------------------

MODULES = {
    "resnet8": ("ResNet8", (1, 3, 32, 32)),
    "dscnn": ("DSCNN", (1, 1, 49, 10)),
    "mobilenetv1_025_vww": ("MobileNetV1_025", (1, 3, 96, 96)),
    "autoencoder": ("AutoEncoder", (1, 640)),
}


@pytest.mark.parametrize("name", MODULES)
def test_asset(name: str, asset: Callable[[str], Path], run: Run, count: Count) -> None:
    """Trained modules with batch-norm still separate."""
    spec = importlib.util.spec_from_file_location("asset_models", asset("torch/models.py"))
    assert spec is not None
    assert spec.loader is not None
    definitions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(definitions)
    class_name, shape = MODULES[name]
    module = getattr(definitions, class_name)().eval()
    module.load_state_dict(torch.load(asset(f"torch/{name}.pt"), weights_only=True))
    x = torch.randn(*shape)
    model = load_model(export(module, x))
    same(module, model, (x,), run)
    operators = count(model)
    assert not {"relax.nn.batch_norm", "relax.nn.pad", "relax.multiply"} & set(operators)
