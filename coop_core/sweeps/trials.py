"""Trials: parameters of several runs on one data set -> what each scores, trained side by side.

What trials have in common is computed once: the backbone, each image's features, the zero-shot baseline.
"""

import dataclasses
import fcntl
import functools
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coop_core.backbone import Backbone
from coop_core.data.dataset import Dataset
from coop_core.data.split import Split, SplitImage, few_shot_split
from coop_core.errors import CoopError, TrainingError
from coop_core.features.extract import extract_features, feature_key, normalised
from coop_core.files import digest_json, read_array
from coop_core.judging import baselines
from coop_core.judging.evaluation import evaluate
from coop_core.methods import load_method
from coop_core.params import BackboneParams, Params
from coop_core.training import Epoch, Training, fit_together, generator_for

_KEPT = 12
"""Arrays of features and class weights that stay in memory."""


@dataclass(frozen=True)
class Scores:
    """One trial's; accuracies are fractions."""

    val_accuracy: float
    val_loss: float
    accuracy: float
    """On the test images, as are the next three."""
    macro_f1: float
    calibration_error: float
    zero_shot_accuracy: float
    seconds: float
    """Of training; trials trained side by side share it evenly."""
    curve: tuple[Epoch, ...]
    test_digest: str

    def metrics(self) -> dict[str, float]:
        names = ("val_accuracy", "val_loss", "accuracy", "macro_f1", "calibration_error", "zero_shot_accuracy",
                 "seconds")  # fmt: skip
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Prepared:
    training: Training
    split: Split
    test_features: Tensor
    """(n, d), L2-normalised"""
    test_labels: np.ndarray
    zero_shot_accuracy: float


class TrialRunner:
    """Runs trials one group after another; groups of one backbone and data set are fastest."""

    def __init__(self, *, store_folder: Path, device: str, sharing: int = 1) -> None:
        """`sharing`: how many processes train on the device at the same time, this one included."""
        self.store_folder, self.device, self.sharing = store_folder, device, sharing
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def run(
        self,
        trials: Sequence[Params],
        dataset: Dataset,
        *,
        on_epoch: Callable[[int, Epoch], object] = lambda position, epoch: None,
    ) -> list[Scores | CoopError]:
        """Train all side by side and judge each -> its scores, or why it has none; in the order given.

        Test images are read once, after the training, and decide nothing.
        """
        found: dict[int, Scores | CoopError] = {}
        prepared: dict[int, _Prepared] = {}
        for position, params in enumerate(trials):
            try:
                prepared[position] = self._prepare(params, dataset, functools.partial(on_epoch, position))
            except CoopError as error:
                found[position] = error
        started = time.monotonic()
        curves = fit_together([one.training for one in prepared.values()])
        seconds = (time.monotonic() - started) / max(1, len(prepared))
        for (position, one), curve in zip(prepared.items(), curves, strict=True):
            found[position] = curve if isinstance(curve, CoopError) else _judge(one, curve, trials[position], seconds)
        return [found[position] for position in range(len(trials))]

    def _prepare(self, params: Params, dataset: Dataset, on_epoch: Callable[[Epoch], object]) -> _Prepared:
        backbone = self._backbone(params.backbone)
        split = few_shot_split(
            dataset,
            shots=params.split.shots,
            seed=params.seed,
            classes=params.split.classes,
            test_per_class=params.split.test_per_class,
        )
        if not split.val:
            raise TrainingError(f"{dataset.name} leaves no validation images, and a sweep chooses by them: add images")
        train = self._features(backbone, dataset, split.train, params, views=params.features.views)  # (n, views, d)
        val, test = (
            self._features(backbone, dataset, images, params)[:, 0] for images in (split.val, split.test)
        )                                                                                            # (n, d)
        learner = load_method(params.method.name).build(
            params.method,
            backbone=backbone,
            class_names=split.class_names,
            generator=generator_for(params.seed, "context"),
            engine=dataclasses.replace(params.engine.engine(), sharing=self.sharing),
        )
        labels = _labels(split.test)
        training = Training(
            learner, train, torch.tensor(_labels(split.train), device=backbone.device), params.train, params.seed,
            val_features=val, val_labels=torch.tensor(_labels(split.val), device=backbone.device), on_epoch=on_epoch,
        )  # fmt: skip
        zero_shot = self._zero_shot(backbone, split, test, labels)
        return _Prepared(training, split, test, labels, zero_shot)

    def _backbone(self, params: BackboneParams) -> Backbone:
        key = ("backbone", params)
        if key not in self._kept:  # one at a time in memory
            self._kept.clear()
        return self._keep(key, lambda: params.load(device=self.device))

    def _features(
        self, backbone: Backbone, dataset: Dataset, images: Sequence[SplitImage], params: Params, *, views: int = 1
    ) -> Tensor:
        """L2-normalised (n, views, d) on the device; one process computes at a time, the others find it done."""

        def compute() -> Tensor:
            self.store_folder.mkdir(parents=True, exist_ok=True)
            lock = (self.store_folder / "computing.lock").open("w")
            with lock, tempfile.TemporaryDirectory(dir=self.store_folder) as folder:
                fcntl.flock(lock, fcntl.LOCK_EX)
                target = Path(folder) / "features.npy"
                extract_features(
                    backbone, images, root=dataset.root, target=target, store_folder=self.store_folder, views=views,
                    seed=params.seed, batch_size=params.features.batch_size,
                )  # fmt: skip
                return normalised(np.array(read_array(target)), device=backbone.device)

        drawn_by = params.seed if views > 1 else None
        digest = digest_json([image.digest for image in images])
        return self._keep(("features", feature_key(backbone), digest, views, drawn_by), compute)

    def _zero_shot(self, backbone: Backbone, split: Split, test: Tensor, labels: np.ndarray) -> float:
        key = ("zero-shot", feature_key(backbone), split.class_names, split.template, split.test_digest)
        classifier = baselines.zero_shot
        return self._keep(key, lambda: float(
            (classifier(backbone, split.class_names, split.template).logits(test).argmax(1).cpu().numpy() == labels)
            .mean()
        ))  # fmt: skip

    def _keep(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """The value of a key, computed when it is not in memory; the one longest unused makes room."""
        value = self._kept.pop(key) if key in self._kept else compute()
        self._kept[key] = value
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return value


def _judge(one: _Prepared, curve: Sequence[Epoch], params: Params, seconds: float) -> Scores:
    with torch.no_grad():
        probabilities = one.training.learner(one.test_features).softmax(dim=-1).cpu().numpy()  # (n, c)
    test = evaluate(
        probabilities, one.test_labels, one.split.class_names, calibration_bins=params.evaluate.calibration_bins
    )
    last = curve[-1]
    return Scores(
        val_accuracy=last.val_accuracy or 0.0,
        val_loss=last.val_loss or 0.0,
        accuracy=test.accuracy,
        macro_f1=test.macro_f1,
        calibration_error=test.calibration_error,
        zero_shot_accuracy=one.zero_shot_accuracy,
        seconds=seconds,
        curve=tuple(curve),
        test_digest=one.split.test_digest,
    )


def _labels(images: Sequence[SplitImage]) -> np.ndarray:
    return np.array([image.label for image in images])
