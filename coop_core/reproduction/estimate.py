"""Estimate: sweeps and the size of their data sets -> how many images to encode, how many trainings, and how long.

The time is measured on random pixels and random features of the real sizes: reading and decoding files comes on top,
and training side by side takes less.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch

from coop_core.backbone import Backbone
from coop_core.data.split import MAX_VALIDATION_SHOTS, Split, SplitImage
from coop_core.features.examples import CachedFeatures
from coop_core.params import Params
from coop_core.preparing import prepare
from coop_core.sweeps.sweep import require_sweep
from coop_core.training import fit

_STEPS = 3
"""Of training, in each of the epochs that are timed."""


@dataclass(frozen=True)
class Size:
    """Of a data set that is learned on or judged on."""

    classes: int
    train: int
    test: int

    def learned(self, classes: str) -> int:
        """Of all, base or new."""
        return {"all": self.classes, "base": ceil(self.classes / 2), "new": self.classes // 2}[classes]


@dataclass(frozen=True)
class Work:
    """What sweeps of one data set compute at most; features that are known already are not computed again."""

    encodings: int
    """Passes of an image through the image tower; each view of an image is one."""
    trainings: int
    steps: int
    """Of all trainings together."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + its for mine, its in zip(dataclasses.astuple(self), dataclasses.astuple(other),
                                                      strict=True)))  # fmt: skip


def work_of(sweeps: Sequence[Params], size: Size, *, tests: int) -> Work:
    """`tests`: images of further test sets."""
    images, trainings, steps = size.test + tests, 0, 0
    for params in sweeps:
        shots, seeds = _shots(params), require_sweep(params).seeds
        classes = size.learned(params.split.classes)
        most = size.train if params.split.unlabelled is not None else classes * max(shots)
        images += len(seeds) * (min(most, size.train) * params.features.views
                                + classes * min(max(shots), MAX_VALIDATION_SHOTS))  # fmt: skip
        trainings += len(seeds) * len(shots)
        for count in shots:
            steps += len(seeds) * params.train.epochs * max(1, classes * count // params.train.batch_size)
    return Work(images, trainings, steps)


def seconds_an_image(backbone: Backbone, *, batch_size: int) -> float:
    """Through the image tower."""
    size = backbone.transform.size
    pixels = torch.rand(batch_size, 3, size, size)
    backbone.encode_images(pixels[:1])
    started = time.monotonic()
    float(backbone.encode_images(pixels).sum())
    return (time.monotonic() - started) / batch_size


def seconds_a_step(params: Params, backbone: Backbone, *, classes: int) -> float | None:
    """Of one training alone; 0 for a method that is finished when it is built, None for one that reads pixels."""
    if params.method.reads == "pixels":
        return None
    names = tuple(f"kind {number}" for number in range(classes))
    size = min(params.train.batch_size, classes * max(_shots(params)))
    labels = torch.arange(_STEPS * size) % classes
    pixels = torch.zeros(1, 3, backbone.transform.size, backbone.transform.size)
    encode = backbone.encode_unprojected if params.method.reads == "unprojected" else backbone.encode_images
    width = encode(pixels).shape[1]
    drawn = torch.randn(len(labels), 1, width, generator=torch.Generator().manual_seed(0))
    images = tuple(SplitImage(str(row), int(label), str(row)) for row, label in enumerate(labels))
    said = tuple((f"this shows {name}.", f"an image of {name}.") for name in names)
    split = Split("", "", "a photo of a {}.", names, 1, 0, "all", images, (), (), descriptions=said)
    brief = params.model_copy(update={"train": params.train.model_copy(
        update={"epochs": 3, "warmup_epochs": 0, "batch_size": size})})  # fmt: skip
    ticks = [time.monotonic()]
    training = prepare(brief, split=split, backbone=backbone, on_epoch=lambda epoch: ticks.append(time.monotonic()),
                       examples=CachedFeatures(drawn.to(backbone.device), labels.to(backbone.device)))  # fmt: skip
    if training.epochs == 1:
        return 0.0
    fit(training)
    return min(after - before for before, after in itertools.pairwise(ticks[1:])) / _STEPS


def _shots(params: Params) -> list[int]:
    given = require_sweep(params).space["split.shots"]
    assert isinstance(given, list)
    return given
