"""Which channels leave: the criteria of `shrink` beside each other on a CIFAR-10 ResNet.

    python tests/benchmarks/channel_criteria.py [--model cifar10_resnet20] [--keep 0.7,0.5]

In every residual block the channels between its two convolutions are cut to the same share, by each
criterion on the same calibration data, in one stage. Prints a line for each: top-1 on 500 test
images, and in how many of them the answer is the whole network's, before and after the layers that
read fewer channels are solved for.
"""

from __future__ import annotations

import argparse
import re
from typing import Any, get_args, get_type_hints

import numpy as np
from asset_data import ASSETS, TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="cifar10_resnet20")
    parser.add_argument("--keep", default="0.7,0.5", help="shares of the channels")
    parser.add_argument("--samples", type=int, default=256, help="for calibration")
    arguments = parser.parse_args()

    from tvm_compress import load_data, load_model
    from tvm_compress.calibrate import calibrate
    from tvm_compress.kernel_cache import KernelCache
    from tvm_compress.relay_passes.observations import Observations
    from tvm_compress.relay_passes.passes import PASSES
    from tvm_compress.relay_passes.select import list_layers
    from tvm_compress.relay_passes.shrink_config import ChannelShare, ShrinkConfig
    from tvm_compress.targets import get_target

    task = next(task for task in TASKS if task.model == arguments.model)
    model, target, cache = load_model(task.path), get_target("host"), KernelCache()
    names = [x.name for x in list_layers(model.module) if re.fullmatch("layer._._conv1", x.name)]
    shrink = PASSES["shrink"]
    criteria = get_args(get_type_hints(ShrinkConfig)["criterion"])

    def schemes(**fields: Any) -> dict[str, Any]:
        return dict.fromkeys(names, ShrinkConfig(multiple=1, **fields))

    with np.load(ASSETS / "data" / "cifar10_train_first8000.npz") as archive:
        labels = archive["y"][: arguments.samples]
    rows = [{model.inputs[0].name: x} for x, _ in zip(task.calibration(), labels, strict=False)]
    data = load_data(list(zip(rows, labels.tolist(), strict=True)), model)
    wanted = Observations()
    for criterion in criteria:
        wanted |= shrink.observe(model.module, schemes(criterion=criterion)) or Observations()
    statistics = calibrate(model, data, wanted, target=target, cached=cache)

    images, truth = next(iter(task.tests.values()))()
    feeds = [{model.inputs[0].name: np.ascontiguousarray(x, np.float32)} for x in images]

    def answers(module: Any) -> np.ndarray:
        from tvm_compress.build import build
        from tvm_compress.runtime import Session

        executable = build(module, target, cached=cache).executable
        session = Session(executable, model.inputs, model.outputs)
        return np.array([int(next(iter(session.run(feed).values())).argmax()) for feed in feeds])

    whole = answers(model.module)
    print(f"{arguments.model}: {100 * np.mean(whole == truth):.1f} %, {len(feeds)} images")
    print("| channels | criterion | top-1 | as before | solved: top-1 | as before |\n" + "|---" * 6)
    for share in map(float, arguments.keep.split(",")):
        for criterion in criteria:
            cells = [f"{100 * share:g} %", criterion]
            for solved in (False, True):
                config = schemes(keep=ChannelShare(share), criterion=criterion, reconstruct=solved)
                found = answers(shrink.apply(model.module, config, statistics))
                cells += [f"{100 * np.mean(found == other):.1f}" for other in (truth, whole)]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
