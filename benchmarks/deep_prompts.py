"""DPL's steps, ours against the straightforward way, in turn in one run -> seconds, and bytes between the passes.

    python benchmarks/deep_prompts.py [--architecture ViT-B-32] [--classes 10 100] [--repeats 3]
    ... --steps training --ours       one kind of step, and without the other way, which at 100 classes takes minutes
    python benchmarks/deep_prompts.py --images FOLDER_OF_CLASS_FOLDERS       a search and a training on real images

Random weights; batches of 4 images, as published. A step of training has 3 rows in every layer of both towers, a step
of the search mixes 0 to 6. The straightforward way encodes every prompt at the text tower's full length by open_clip's
own blocks, and each candidate by an attention of its own. Losses and gradients must agree.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_weights import random_backbone
from rich.console import Console
from rich.table import Table
from torch import Tensor

from coop_core.backbone import Backbone
from coop_core.data.catalog import read_source
from coop_core.data.importers import import_dataset
from coop_core.data.split import few_shot_split
from coop_core.features.examples import FRESH, DecodedImages
from coop_core.methods import Task, dpl
from coop_core.params import TrainParams
from coop_core.prompts.engine import Engine
from coop_core.searching import search
from coop_core.training import Training, fit, generator_for

BATCH, ROWS = 4, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="ViT-B-32")
    parser.add_argument("--classes", nargs="*", type=int, default=[10, 100])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", nargs="+", choices=("training", "search"), default=["training", "search"])
    parser.add_argument("--ours", action="store_true", help="leave the straightforward way out")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--epochs", type=int, default=3, help="of the search and of the training on --images")
    arguments = parser.parse_args()
    backbone = random_backbone(arguments.architecture, device="cuda" if torch.cuda.is_available() else "cpu")
    if arguments.images:
        on_real_images(backbone, arguments.images, arguments.epochs)
        return
    table = Table("step", "classes", "ours", "straightforward", "ratio", "from - to", "kept", "of", "difference")
    for classes in arguments.classes:
        for name in arguments.steps:
            build = {"training": trained, "search": searched}[name]
            table.add_row(name, str(classes), *compared(backbone, classes, build, arguments.repeats, arguments.ours))
    Console(width=120).print(table)


def task_of(classes: int) -> Task:
    from open_clip import IMAGENET_CLASSNAMES  # after the backbone, which declares what it needs

    return Task(tuple(IMAGENET_CLASSNAMES[:classes]), "a photo of a {}.")


def trained(backbone: Backbone, classes: int, engine: Engine) -> Any:
    layers = len(backbone.text_tower.module.transformer.resblocks)  # type: ignore[attr-defined]
    params = dpl.Params(image_lengths=[ROWS] * 12, text_lengths=[ROWS] * layers)
    drawn = generator_for(0, "rows")
    return dpl.build(params, backbone=backbone, task=task_of(classes), generator=drawn, engine=engine)


def searched(backbone: Backbone, classes: int, engine: Engine) -> Any:
    return dpl.supernet(dpl.Params(), backbone=backbone, task=task_of(classes), generator=generator_for(0, "rows"),
                        engine=engine)  # fmt: skip


def compared(backbone: Backbone, classes: int, build: Callable[..., Any], repeats: int, alone: bool) -> list[str]:
    size = backbone.transform.size
    pixels = torch.randn(BATCH, 3, size, size, generator=generator_for(0, "pixels"))
    labels = torch.arange(BATCH) % classes
    paths = ("auto",) if alone else ("auto", "full")
    both = [build(backbone, classes, Engine(path, max_memory=10**11)) for path in paths]
    times, kept, gradients = [], [], []
    for _ in range(repeats):
        for learner in both:
            seconds, held, found = step(learner, pixels.to(backbone.device), labels.to(backbone.device))
            times.append(seconds)
            kept.append(held)
            gradients.append(found)
    if alone:
        return [f"{statistics.median(times):.2f} s", "", "", f"{min(times):.2f} - {max(times):.2f} s",
                f"{kept[0] / 1e6:,.0f} MB", "", ""]  # fmt: skip
    ours, theirs = times[::2], times[1::2]
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    seconds = [f"{statistics.median(its):.2f} s" for its in (ours, theirs)]
    held = [f"{its / 1e6:,.0f} MB" for its in kept[:2]]
    spread = f"{min(ratios):.1f} - {max(ratios):.1f}"
    return [*seconds, f"{statistics.median(ratios):.1f}", spread, *held, f"{float(error):.0e}"]


def step(learner: Any, pixels: Tensor, labels: Tensor) -> tuple[float, int, Tensor]:
    """-> seconds, bytes kept between the passes, and all gradients in a row."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not tensor.is_mkldnn:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    learner.zero_grad(set_to_none=True)
    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = learner.loss(pixels, labels)
    loss.backward()
    seconds = time.perf_counter() - started
    frozen = {tensor.untyped_storage().data_ptr() for tensor in learner.towers.backbone.load_weights().values()}
    held = sum(size for place, size in kept.items() if place not in frozen)
    return seconds, held, torch.cat([parameter.grad.flatten() for parameter in learner.parameters()])


def on_real_images(backbone: Backbone, folder: Path, epochs: int) -> None:
    """A search and a training, 4 images a class, and what they made of the loss."""
    card, beside = read_source(folder)
    with tempfile.TemporaryDirectory() as place:
        dataset = import_dataset(card, beside / card.path, Path(place) / "raw", test_fraction=0.5, accept=[])
        split = few_shot_split(dataset, shots=4, seed=1)
        train, val = (DecodedImages(its, dataset.root, backbone.transform, backbone.device, views, 1)
                      for its, views in ((split.train, FRESH), (split.val, 1)))  # fmt: skip
        task = Task(split.class_names, split.template)
        params = dpl.Params()
        net = dpl.supernet(params, backbone=backbone, task=task, generator=generator_for(1, "search"))
        recipe = TrainParams(epochs=epochs, batch_size=BATCH, learning_rate=0.0035)
        started = time.perf_counter()
        search(net, train, val, recipe=recipe, seed=1, mixing_learning_rate=0.0035, validation_batch_size=16)
        between = time.perf_counter()
        found = net.found(params)
        learner = dpl.build(found, backbone=backbone, task=task, generator=generator_for(1, "context"))
        curve = fit(Training(learner, train, recipe, 1, validation=val))
        numbers = sum(p.numel() for p in learner.parameters())
        Console().print(f"search: {between - started:.0f} s, found images {found.image_lengths}, texts "
                        f"{found.text_lengths}\ntraining: {time.perf_counter() - between:.0f} s, loss "
                        f"{' '.join(f'{row.loss:.3f}' for row in curve)}\nlearned: "
                        f"{numbers:,} numbers in {len(learner.state_dict())} tensors")


if __name__ == "__main__":
    main()
