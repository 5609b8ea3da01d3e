"""Training, ours against the straightforward way: a step's images and class names -> learned context vectors.

    python benchmarks/training.py                                   CoOp at 10, 47 and 100 classes, CoCoOp, 8 at once
    python benchmarks/training.py --classes 10 --whole --json FILE  a training to its end, both ways

The straightforward way encodes the batch's images and every class's prompt at the text tower's full length in every
step, as the CoOp code does. Ours encodes images once and only the tokens that matter; a row of bfloat16 computes both
towers in it. All run the same training loop over the same batches from the same first context, on random weights and
generated pictures: the losses, the accuracy and the learned context must agree. Without --whole all take the same few
steps, and the whole training (16 shots, 50 epochs, the paper's recipe) is computed from the measured parts; that
column says "computed".
"""

import argparse
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_weights import random_backbone
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from coop_core.backbone import Backbone, Precision
from coop_core.features.examples import CachedFeatures
from coop_core.files import write_json
from coop_core.memory import device_memory
from coop_core.methods import Task, cocoop, coop
from coop_core.methods.learner import FeatureLearner
from coop_core.params import TrainParams
from coop_core.prompts.engine import Engine
from coop_core.training import Training, fit, fit_together, generator_for

SHOTS, EPOCHS, BATCH = 16, 50, 32
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="ViT-B-32", help="an open_clip model with a causal text tower")
    parser.add_argument("--classes", nargs="*", type=int, default=[10, 47, 100])
    parser.add_argument("--steps", type=int, default=5, help="steps of each way without --whole")
    parser.add_argument("--whole", action="store_true", help=f"all {EPOCHS} epochs, both ways")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    backbones = {
        precision: random_backbone(arguments.architecture, device=arguments.device, image_precision=precision)
        for precision in PRECISIONS
    }
    backbone = backbones["float32"]
    rows = []
    for classes in arguments.classes:
        rows += coop_training(backbones, classes, arguments)
        show_trainings(rows, arguments)
    others = [cocoop_step(backbone, batch, classes) for batch, classes in ((1, 10), (8, 10), (8, 100))]
    others.append(many_at_once(backbone))
    show_others(others)
    if arguments.json:
        write_json(arguments.json, {"trainings": rows, "others": others})


class Straightforward(FeatureLearner):
    """A CoOp learner that is given the numbers of its images and encodes everything in every step."""

    def __init__(self, learner: coop.CoOp, backbone: Backbone, pixels: Tensor) -> None:
        super().__init__()
        self.learner, self.backbone, self.pixels = learner, backbone, pixels

    def logits(self, images: Tensor) -> Tensor:
        return self.learner.logits(self.backbone.encode_images(self.pixels[images[:, 0].long()]).float())


def coop_training(backbones: dict[Precision, Backbone], classes: int, arguments: Any) -> list[dict[str, Any]]:
    """The straightforward way once, ours in every precision."""
    backbone = backbones["float32"]
    images = classes * SHOTS
    all_steps = EPOCHS * max(1, images // BATCH)
    used = images if arguments.whole else min(images, arguments.steps * BATCH)
    epochs = EPOCHS if arguments.whole else max(2, math.ceil(arguments.steps / max(1, used // BATCH)))
    recipe = TrainParams(epochs=epochs, batch_size=BATCH, learning_rate=0.002, warmup_epochs=1)
    labels = (torch.arange(used) % classes).to(backbone.device)
    pixels = pictures(labels, backbone)
    numbers = torch.arange(used, device=backbone.device).float().view(-1, 1, 1)
    steps = epochs * max(1, used // BATCH)

    def learner(engine: Engine) -> coop.CoOp:
        return coop.build(coop.Params(), backbone=backbone, task=task(classes),
                          generator=generator_for(0, "context"), engine=engine)  # fmt: skip

    straight = Straightforward(learner(Engine("full", max_memory=2**40)), backbone, pixels)
    warm_up(straight, numbers[:BATCH, 0], labels[:BATCH])
    reference_seconds, reference = timed(
        lambda: fit(Training(straight, CachedFeatures(numbers, labels), recipe, 0))
    )
    common = {
        "classes": classes, "steps": steps, "images": used, "reference_step_seconds": reference_seconds / steps,
        "reference_whole_seconds": all_steps * reference_seconds / steps, "reference_loss": reference[-1].loss,
        "reference_accuracy": reference[-1].accuracy, "whole_is": "measured" if arguments.whole else "computed",
    }  # fmt: skip

    def ours(precision: Precision) -> dict[str, Any]:
        mine = learner(Engine(precision=precision))
        encode(backbones[precision], pixels[:BATCH])
        feature_seconds, features = timed(lambda: encode(backbones[precision], pixels))
        warm_up(mine, features[:BATCH, 0], labels[:BATCH])
        seconds, curve = timed(lambda: fit(Training(mine, CachedFeatures(features, labels), recipe, 0)))
        whole = images * feature_seconds / used + all_steps * seconds / steps
        context, first = straight.learner.context_vectors, learner(Engine()).context_vectors
        return {
            **common, "precision": precision, "feature_seconds": feature_seconds, "step_seconds": seconds / steps,
            "whole_seconds": whole, "speedup": common["reference_whole_seconds"] / whole, "loss": curve[-1].loss,
            "accuracy": curve[-1].accuracy,
            "context_difference": ((mine.context_vectors - context).norm() / (context - first).norm()).item(),
        }  # fmt: skip

    return [ours(precision) for precision in backbones]


def cocoop_step(backbone: Backbone, batch: int, classes: int = 10) -> dict[str, Any]:
    """Loss and gradients of one batch; the straightforward way encodes the images, too."""
    labels = (torch.arange(batch) % classes).to(backbone.device)
    pixels = pictures(labels, backbone)
    features = encode(backbone, pixels)[:, 0]

    def learner(engine: Engine) -> cocoop.CoCoOp:
        return cocoop.build(cocoop.Params(), backbone=backbone, task=task(classes),
                            generator=generator_for(0, "context"), engine=engine)  # fmt: skip

    ours, full = learner(Engine()), learner(Engine("full", max_memory=3 * device_memory(backbone.device) // 4))
    chunks = ", in chunks" if full.encoder.sets_at_once < batch else ""

    def step(one: cocoop.CoCoOp, images: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(one.loss(images, labels)[0], list(one.parameters())))

    def straightforward() -> list[Tensor]:
        return step(full, backbone.encode_images(pixels).float())

    seconds, gradients = median(lambda: step(ours, features), 7)
    reference_seconds, expected = median(straightforward, 3 if batch * classes < 400 else 1)
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(gradients, expected, strict=True))
    return {"what": f"CoCoOp step, batch {batch}, {classes} classes{chunks}", "seconds": seconds,
            "reference_seconds": reference_seconds, "speedup": reference_seconds / seconds, "error": error}  # fmt: skip


def many_at_once(backbone: Backbone, *, count: int = 8, classes: int = 10, epochs: int = 4) -> dict[str, Any]:
    """Seeds and learning rates over the same features, one after another and side by side."""
    labels = (torch.arange(classes * SHOTS) % classes).to(backbone.device)
    features = torch.randn(len(labels), 1, 512, generator=torch.Generator().manual_seed(0)).to(backbone.device)
    features = F.normalize(features, dim=-1)

    def trainings() -> list[Training]:
        return [
            Training(
                coop.build(coop.Params(), backbone=backbone, task=task(classes),
                           generator=generator_for(seed, "context")),
                CachedFeatures(features, labels), TrainParams(epochs=epochs, learning_rate=0.002 * (1 + seed)), seed,
            )
            for seed in range(count)
        ]  # fmt: skip

    fit_together(trainings()[:2])
    together, alone = trainings(), trainings()
    seconds, _ = timed(lambda: fit_together(together))
    reference_seconds, _ = timed(lambda: [fit_together([one]) for one in alone])
    error = max(
        ((a.learner.context_vectors - b.learner.context_vectors).norm() / b.learner.context_vectors.norm()).item()
        for a, b in zip(together, alone, strict=True)
    )
    return {"what": f"{count} trainings at once, {classes} classes, {epochs} epochs, against one by one",
            "seconds": seconds, "reference_seconds": reference_seconds, "speedup": reference_seconds / seconds,
            "error": error}  # fmt: skip


def task(classes: int) -> Task:
    from open_clip import IMAGENET_CLASSNAMES

    return Task(tuple(IMAGENET_CLASSNAMES[:classes]), "a photo of a {}.")


def pictures(labels: Tensor, backbone: Backbone) -> Tensor:
    """Normalised pixels (n, 3, size, size): noise around a pattern of stripes a class."""
    random = torch.Generator().manual_seed(0)
    size = backbone.transform.size
    line = torch.linspace(0, 1, size)
    found = torch.randn(len(labels), 3, size, size, generator=random)
    for picture, label in zip(found, labels.tolist(), strict=True):
        colour = torch.randn(3, generator=torch.Generator().manual_seed(label))
        picture += 2 * colour[:, None, None] * torch.sin(2 * math.pi * (1 + label) * line)
    return found.to(backbone.device)


def encode(backbone: Backbone, pixels: Tensor) -> Tensor:
    """(n, 3, size, size) -> L2-normalised features (n, 1, d)."""
    parts = [backbone.encode_images(part).float() for part in pixels.split(BATCH)]
    return F.normalize(torch.cat(parts), dim=-1)[:, None]


def warm_up(learner: nn.Module, features: Tensor, labels: Tensor) -> None:
    for _ in range(2):
        learner.loss(features, labels)[0].backward()
    learner.zero_grad(set_to_none=True)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    synchronise()
    start = time.perf_counter()
    found = run()
    synchronise()
    return time.perf_counter() - start, found


def median(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    run()
    measured = [timed(run) for _ in range(repeats)]
    return sorted(seconds for seconds, _ in measured)[repeats // 2], measured[0][1]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def show_trainings(rows: list[dict[str, Any]], arguments: Any) -> None:
    machine = f"{arguments.device}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    table = Table(title=f"CoOp, {SHOTS} shots, {EPOCHS} epochs, batch {BATCH}; {arguments.architecture}, {machine}")
    for header in ("classes", "precision", "steps", "a step", "straight", "whole training", "straight", "", "speed-up",
                   "loss", "straight", "accuracy", "straight", "context differs"):  # fmt: skip
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            str(row["classes"]), row["precision"], str(row["steps"]), f"{1e3 * row['step_seconds']:.0f} ms",
            f"{1e3 * row['reference_step_seconds']:.0f} ms", f"{row['whole_seconds']:.0f} s",
            f"{row['reference_whole_seconds']:.0f} s", row["whole_is"], f"{row['speedup']:.1f}x",
            f"{row['loss']:.4f}", f"{row['reference_loss']:.4f}", f"{row['accuracy']:.3f}",
            f"{row['reference_accuracy']:.3f}", f"{row['context_difference']:.0e}",
        )  # fmt: skip
    Console(width=170).print(table)


def show_others(rows: list[dict[str, Any]]) -> None:
    table = Table()
    for header in ("", "ours", "straightforward", "speed-up", "difference"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(row["what"], f"{row['seconds']:.3f} s", f"{row['reference_seconds']:.3f} s",
                      f"{row['speedup']:.1f}x", f"{row['error']:.0e}")  # fmt: skip
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
