"""Estimate: sweeps and the size of their data sets -> how many images to encode, how many trainings, and how long.

The time is measured on random pixels and random features of the real sizes: reading and decoding files comes on top,
and training side by side takes less. A search is taken to find the most rows in every layer, which cost the most.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor

from coop_core.backbone import Backbone
from coop_core.data.split import MAX_VALIDATION_SHOTS, Split, SplitImage
from coop_core.features.examples import CachedFeatures
from coop_core.methods import Task, load_method
from coop_core.methods.learner import is_built
from coop_core.params import Params
from coop_core.preparing import prepare
from coop_core.searching import search
from coop_core.sweeps.sweep import require_sweep
from coop_core.training import fit, generator_for

_STEPS = 3
"""Of training on features, in each of the epochs that are timed; through the image tower it is one."""
_LARGEST = 100
"""Classes up to which a building is timed as it is."""


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
    """Passes of an image through the image tower outside the steps; each view of an image is one."""
    trainings: int
    steps: int
    """Of all trainings together."""
    search_steps: int = 0
    """Of the searches before them."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + its for mine, its in zip(dataclasses.astuple(self), dataclasses.astuple(other),
                                                      strict=True)))  # fmt: skip


def work_of(sweeps: Sequence[Params], size: Size, *, tests: int) -> Work:
    """`tests`: images of further test sets."""
    total = Work(size.test + tests, 0, 0)
    for params in sweeps:
        shots, seeds = _shots(params), require_sweep(params).seeds
        classes, epochs = size.learned(params.split.classes), params.train.epochs
        most = size.train if params.split.unlabelled is not None else classes * max(shots)
        views = params.features.views + len(params.split.further_labellers)      # each labeller encodes once
        encodings = min(most, size.train) * views + _validated(classes, max(shots))
        steps, found = 0, search_of(params)
        search_steps = 0
        if params.method.reads == "pixels":  # nothing is kept: every epoch and every judgement encodes anew
            encodings = sum(epochs * _validated(classes, count) + size.test + tests for count in shots)
        for count in shots:
            steps += epochs * max(1, classes * count // params.train.batch_size)
            search_steps += found.epochs * max(1, classes * count // found.batch_size) if found else 0
        total += Work(*(len(seeds) * one for one in (encodings, len(shots), steps, search_steps)))
    return total


def search_of(params: Params) -> Any:
    """The recipe of the method's search, or None where there is none to be done."""
    return getattr(params.method, "search", None) if params.method.is_searched else None


def _validated(classes: int, shots: int) -> int:
    return classes * min(shots, MAX_VALIDATION_SHOTS)


@dataclass(frozen=True)
class Pace:
    """Seconds of one training, without others beside it; 0 for what a method does not have."""

    building: float
    """Of a method that is finished when it is built."""
    step: float
    search_step: float


def seconds_an_image(backbone: Backbone, *, batch_size: int) -> float:
    """Through the image tower."""
    size = backbone.transform.size
    pixels = torch.rand(batch_size, 3, size, size)
    backbone.encode_images(pixels[:1])
    started = time.monotonic()
    float(backbone.encode_images(pixels).sum())
    return (time.monotonic() - started) / batch_size


def pace_of(params: Params, backbone: Backbone, *, classes: int) -> Pace:
    """Measured here, on random numbers."""
    if params.method.reads == "pixels":
        return _through_the_tower(params, backbone, classes)
    if is_built(_prepared(params, backbone, classes=2, images=4).learner):
        return Pace(_building(lambda some: _timed(lambda: _prepared(
            params, backbone, classes=some, images=some * max(_shots(params)))), classes), 0.0, 0.0)  # fmt: skip
    size = min(params.train.batch_size, classes * max(_shots(params)))
    ticks = [time.monotonic()]
    training = _prepared(params, backbone, classes=classes, images=_STEPS * size, batch_size=size, epochs=3,
                         on_epoch=lambda epoch: ticks.append(time.monotonic()))  # fmt: skip
    fit(training)
    return Pace(0.0, min(after - before for before, after in itertools.pairwise(ticks[1:])) / _STEPS, 0.0)


def _building(measure: Callable[[int], float], classes: int) -> float:
    """At most so many classes are measured; beyond, the time grows on as it did from half of them."""
    if classes <= _LARGEST:
        return measure(classes)
    measure(2)                                                                    # what a first time costs besides
    half, whole = measure(_LARGEST // 2), measure(_LARGEST)
    return whole * (classes / _LARGEST) ** min(2.0, max(0.0, log2(whole / half)))


def _timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _prepared(
    params: Params, backbone: Backbone, *, classes: int, images: int, batch_size: int = 1, epochs: int = 2,
    on_epoch: Callable[[Any], object] = lambda epoch: None,
) -> Any:  # fmt: skip
    """A training on random features."""
    encode = backbone.encode_unprojected if params.method.reads == "unprojected" else backbone.encode_images
    width = encode(torch.zeros(1, 3, backbone.transform.size, backbone.transform.size)).shape[1]
    examples, validation = (
        CachedFeatures(
            torch.randn(count, 1, width, generator=generator_for(0, name)).to(backbone.device),
            (torch.arange(count) % classes).to(backbone.device),
        )
        for name, count in (("train", images), ("val", _validated(classes, max(_shots(params)))))
    )
    judged = validation if epochs == 2 else None                                  # what is built sets something by it
    return prepare(_brief(params, batch_size, epochs), split=_split(classes), backbone=backbone, examples=examples,
                   validation=judged, on_epoch=on_epoch)  # fmt: skip


def _through_the_tower(params: Params, backbone: Backbone, classes: int) -> Pace:
    """A step of training, and of the search where there is one."""
    asked, method, split = search_of(params), params.method, _split(classes)
    seconds = 0.0
    if asked:
        task = Task(split.class_names, split.template)
        net = load_method(method.name).supernet(method, backbone=backbone, task=task, engine=params.engine.engine(),
                                                generator=generator_for(params.seed, "search"))  # fmt: skip
        recipe = _brief(params, asked.batch_size, 1).train
        examples, validation = (_Noise(count, classes, backbone) for count in
                                (asked.batch_size, asked.validation_batch_size))  # fmt: skip
        for _ in range(2):                                                        # the first lays the prompts out
            seconds = _timed(lambda: search(
                net, examples, validation, recipe=recipe, seed=0, mixing_learning_rate=asked.mixing_learning_rate,
                validation_batch_size=asked.validation_batch_size))  # fmt: skip
        found = net.found(method)
        method = method.model_copy(update={
            "image_lengths": [asked.image_candidates] * len(found.image_lengths),
            "text_lengths": [asked.text_candidates] * len(found.text_lengths)})  # fmt: skip
    size, ticks = params.train.batch_size, [time.monotonic()]
    brief = _brief(params, size, 2).model_copy(update={"method": method})
    fit(prepare(brief, split=split, backbone=backbone, examples=_Noise(size, classes, backbone),
                on_epoch=lambda epoch: ticks.append(time.monotonic())))  # fmt: skip
    return Pace(0.0, ticks[2] - ticks[1], seconds)


def _brief(params: Params, batch_size: int, epochs: int) -> Params:
    update = {"epochs": epochs, "warmup_epochs": 0, "batch_size": batch_size}
    return params.model_copy(update={"train": params.train.model_copy(update=update)})


def _split(classes: int) -> Split:
    names = tuple(f"kind {number}" for number in range(classes))
    said = tuple((f"this shows {name}.", f"an image of {name}.") for name in names)
    images = tuple(SplitImage(str(label), label, str(label)) for label in range(classes))
    return Split("", "", "a photo of a {}.", names, 1, 0, "all", images, (), (), descriptions=said)


@dataclass(frozen=True)
class _Noise:
    """Images of random pixels, which cost no decoding."""

    count: int
    classes: int
    backbone: Backbone
    views: int = 1

    @cached_property
    def labels(self) -> Tensor:
        return (torch.arange(self.count) % self.classes).to(self.backbone.device)

    def batch(self, rows: Tensor, views: Tensor) -> Tensor:
        size = self.backbone.transform.size
        return torch.rand(len(rows), 3, size, size, device=self.backbone.device)


def _shots(params: Params) -> list[int]:
    given = require_sweep(params).space["split.shots"]
    assert isinstance(given, list)
    return given
