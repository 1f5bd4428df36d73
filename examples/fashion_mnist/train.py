"""Train the example network on Fashion-MNIST and write the files that the demo uses.

    pip install -e ".[torch]"
    apt-get install dataset-fashion-mnist
    python examples/fashion_mnist/train.py

Writes model.onnx, calibration.npz and test.npz beside this file and prints the accuracy on all
10,000 test images. They take no part in any choice: the number of epochs is fixed and the last
weights are kept.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
DEBIAN_DATA = Path("/usr/share/datasets/fashion-mnist")
CALIBRATION_IMAGES = 512
TEST_IMAGES = 2000
MAX_SHIFT = 2  # pixels


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut: a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Separable(nn.Module):
    """A 3x3 depthwise and a 1x1 convolution beside an identity shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.depthwise(x)))
        return F.relu(self.norm2(self.pointwise(y)) + x)


class FashionNet(nn.Module):
    """[N, 1, 28, 28] in 0..1 -> [N, 10] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.stage1 = Residual(16, 16, stride=1)  # 28x28
        self.stage2 = Residual(16, 32, stride=2)  # 14x14
        self.stage3 = Residual(32, 64, stride=2)  # 7x7
        self.stage4 = Separable(64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return self.classifier(x.mean((2, 3)))


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped idx file of unsigned bytes (format: yann.lecun.com/exdb/mnist)."""
    with gzip.open(path) as file:
        raw = file.read()
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [N, 1, 28, 28] in 0..1 and labels int64 [N]; split is "train" or "t10k"."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return images[:, None].astype(np.float32) / np.float32(255), labels.astype(np.int64)


def augment(images: Tensor, random: torch.Generator) -> Tensor:
    """Flip every image left to right with even odds and shift it by up to MAX_SHIFT pixels."""
    count, _, height, width = images.shape
    padded = F.pad(images, (MAX_SHIFT,) * 4)
    top, left = torch.randint(0, 2 * MAX_SHIFT + 1, (2, count, 1), generator=random)
    flip = torch.rand(count, 1, generator=random) < 0.5
    rows = top + torch.arange(height)  # [N, H]
    columns = torch.arange(width).expand(count, width)
    columns = left + torch.where(flip, width - 1 - columns, columns)  # [N, W]
    samples = torch.arange(count)[:, None, None]
    return padded[samples, 0, rows[:, :, None], columns[:, None, :]][:, None]


def train(
    net: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, batch: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    steps = len(images) // batch
    optimiser = torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=0.2, total_steps=epochs * steps, pct_start=0.2
    )
    for epoch in range(epochs):
        net.train()
        started = time.perf_counter()
        total = 0.0
        order = torch.randperm(len(images), generator=random)
        for picked in order[: steps * batch].split(batch):
            x = augment(images[picked], random).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):  # twice as fast where the CPU has bf16
                loss = F.cross_entropy(net(x), labels[picked], label_smoothing=0.05)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - started
        print(
            f"epoch {epoch + 1:2}/{epochs}  loss {total / steps:.4f}  {seconds:.0f} s", flush=True
        )


@torch.inference_mode()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    net.eval()
    correct = sum(
        int((net(x).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return correct / len(images)


def export(net: nn.Module, path: Path) -> None:
    """Write static-batch ONNX; the exporter folds batch-norm into the convolutions."""
    net.eval()
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    torch.onnx.export(
        net,
        (torch.zeros(1, 1, 28, 28),),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        opset_version=17,
        dynamo=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=DEBIAN_DATA, help="folder of the idx files")
    parser.add_argument("--out", type=Path, default=HERE, help="where the three files go")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.exit(2, f"{args.data}: no such folder; run: apt-get install dataset-fashion-mnist\n")

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    train_images, train_labels = read_split(args.data, "train")
    test_images, test_labels = read_split(args.data, "t10k")
    net = FashionNet()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters")
    train(
        net,
        torch.from_numpy(train_images),
        torch.from_numpy(train_labels),
        epochs=args.epochs,
        batch=args.batch,
        seed=args.seed,
    )
    score = accuracy(net, torch.from_numpy(test_images), torch.from_numpy(test_labels))
    print(f"accuracy {score:.4f} on {len(test_images):,} test images")

    args.out.mkdir(parents=True, exist_ok=True)
    export(net, args.out / "model.onnx")
    # Labels are left out of the calibration file: calibration must not see them.
    picked = np.random.default_rng(args.seed).choice(
        len(train_images), CALIBRATION_IMAGES, replace=False
    )
    np.savez_compressed(args.out / "calibration.npz", image=train_images[picked])
    np.savez_compressed(
        args.out / "test.npz", image=test_images[:TEST_IMAGES], labels=test_labels[:TEST_IMAGES]
    )


if __name__ == "__main__":
    main()
