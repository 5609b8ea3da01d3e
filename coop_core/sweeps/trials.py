"""Trials: parameters of several runs on one data set -> what each scores, trained side by side.

What trials have in common is computed once: the backbone, each image's features, the zero-shot baseline.
"""

import dataclasses
import functools
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coop_core.answering import answer_with
from coop_core.backbone import Backbone
from coop_core.data.dataset import Dataset
from coop_core.data.split import Split, SplitImage, few_shot_split, located
from coop_core.errors import CoopError, TrainingError
from coop_core.features.examples import FRESH, CachedFeatures, DecodedImages
from coop_core.features.extract import feature_key, features_in_memory
from coop_core.files import digest_json
from coop_core.judging import baselines
from coop_core.judging.evaluation import evaluate
from coop_core.judging.pseudo_labels import Labeller, answer_pool, label_pool, pool_examples
from coop_core.methods import Examples, Task, load_method
from coop_core.methods.learner import first_views, projected
from coop_core.params import BackboneParams, LabellerParams, Params
from coop_core.preparing import prepare
from coop_core.training import Epoch, Training, fit_together, generator_for
from coop_core.transfer import Target, target_of

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
    """Of training; trials trained side by side share it evenly. What is built from examples took them to be built."""
    curve: tuple[Epoch, ...]
    test_digest: str
    tests: dict[str, dict[str, float]]
    """Accuracy by further test set and classifier: the method's own, and zero-shot beside it."""

    def metrics(self) -> dict[str, float]:
        names = ("val_accuracy", "val_loss", "accuracy", "macro_f1", "calibration_error", "zero_shot_accuracy",
                 "seconds")  # fmt: skip
        further = {f"tests/{test}/{name}": accuracy for test, found in self.tests.items()
                   for name, accuracy in found.items()}  # fmt: skip
        return {name: getattr(self, name) for name in names} | further


@dataclass(frozen=True)
class Materials:
    """What a training learns from and is judged on, as its method reads images."""

    backbone: Backbone
    split: Split
    train: Examples
    val: Examples
    test: Examples
    zero_shot: float
    """Accuracy on the test images."""


@dataclass(frozen=True)
class _Prepared:
    training: Training
    seconds: float
    """Of building the learner."""
    split: Split
    test: Examples
    zero_shot_accuracy: float
    backbone: Backbone
    targets: dict[str, tuple[Target, Tensor]]
    """Further test sets by name, with the features of their images as the method reads them: (n, d) or (n, p)."""
    roots: dict[str, Path]
    """Where their images are."""


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
        tests: Mapping[str, Dataset] | None = None,
        on_epoch: Callable[[int, Epoch], object] = lambda position, epoch: None,
    ) -> list[Scores | CoopError]:
        """Train all side by side and judge each -> its scores, or why it has none; in the order given.

        Test images are read once, after the training, and decide nothing. `tests` holds the data sets of
        `Params.tests`, by name.
        """
        found: dict[int, Scores | CoopError] = {}
        prepared: dict[int, _Prepared] = {}
        for position, params in enumerate(trials):
            try:
                prepared[position] = self._prepare(params, dataset, tests or {}, functools.partial(on_epoch, position))
            except CoopError as error:
                found[position] = error
        started = time.monotonic()
        curves = fit_together([one.training for one in prepared.values()])
        seconds = (time.monotonic() - started) / max(1, len(prepared))
        for (position, one), curve in zip(prepared.items(), curves, strict=True):
            found[position] = curve if isinstance(curve, CoopError) else _judge(one, curve, trials[position], seconds)
        return [found[position] for position in range(len(trials))]

    def materials(self, params: Params, dataset: Dataset) -> Materials:
        """What a training of these parameters learns from and is judged on, with features computed where they are
        not yet.

        Raises
        ------
        CoopError
            When a class has too few images, or the backbone is none for the method.
        """
        backbone = self._backbone(params.backbone)
        params.method.check_backbone(backbone)
        split = few_shot_split(
            dataset,
            shots=params.split.shots,
            seed=params.seed,
            classes=params.split.classes,
            test_per_class=params.split.test_per_class,
            label_noise=params.split.label_noise,
            unlabelled=params.split.unlabelled,
        )
        if not split.val:
            raise TrainingError(f"{dataset.name} leaves no validation images, and a sweep chooses by them: add images")
        training_images = located(split.train, dataset)

        def cached(images: Sequence[SplitImage], views: int = 1) -> CachedFeatures:
            features = self._features(backbone, dataset, images, params, views=views)
            return CachedFeatures(features, torch.tensor([image.label for image in images], device=backbone.device))

        test = cached(split.test)
        zero_shot = self._zero_shot(backbone, split, test, params)
        if params.method.reads == "pixels":
            train, *others = (
                DecodedImages(images, dataset.root, backbone.transform, backbone.device, views, params.seed)
                for images, views in ((training_images, FRESH), (split.val, 1), (split.test, 1))
            )
            return Materials(backbone, split, train, others[0], others[1], zero_shot)
        learned_from = cached(training_images, params.features.views)
        if split.is_unlabelled:
            seen = projected(learned_from.features[:, 0], backbone, reads=params.method.reads)
            answers = itertools.chain([answer_pool(split, seen, backbone)],
                                      self._further_answers(params, dataset, split, training_images))  # fmt: skip
            labels = label_pool(split, answers, per_class=split.shots, min_confidence=params.split.min_confidence)
            learned_from = pool_examples(learned_from.features, labels.chosen)
        return Materials(backbone, split, learned_from, cached(split.val), test, zero_shot)

    def _further_answers(
        self, params: Params, dataset: Dataset, split: Split, images: Sequence[SplitImage]
    ) -> Iterator[tuple[Labeller, np.ndarray]]:
        """Of each further labeller, which is loaded when its turn comes and not kept; its answers are."""
        for further in params.split.further_labellers:
            def compute(further: LabellerParams = further) -> tuple[Labeller, np.ndarray]:
                backbone = further.load(device=self.device)
                features = self._computed(backbone, dataset, images, params, views=1)[:, 0]
                return answer_pool(split, features, backbone, name=further.name)

            yield self._keep(("answers", further, split.class_names, split.template, tuple(images)), compute)

    def train(self, params: Params, found: Materials, **how: Any) -> Training:
        """The training of these parameters, with its share of the device's memory; `how` goes to `prepare`."""
        engine = dataclasses.replace(params.engine.engine(), sharing=self.sharing)
        asked = {"examples": found.train, "validation": found.val, **how}
        return prepare(params, split=found.split, backbone=found.backbone, engine=engine, **asked)

    def _prepare(
        self, params: Params, dataset: Dataset, tests: Mapping[str, Dataset], on_epoch: Callable[[Epoch], object]
    ) -> _Prepared:
        found = self.materials(params, dataset)
        started = time.monotonic()
        training = self.train(params, found, on_epoch=on_epoch)
        seconds = time.monotonic() - started
        targets = {}
        for name, its in params.tests.items():
            target = target_of(tests[name], its)
            features = self._features(found.backbone, tests[name], target.images, params, views=1)[:, 0]
            targets[name] = (target, features)
        roots = {name: tests[name].root for name in targets}
        return _Prepared(training, seconds, found.split, found.test, found.zero_shot, found.backbone, targets, roots)

    def _backbone(self, params: BackboneParams) -> Backbone:
        key = ("backbone", params)
        if key not in self._kept:  # one at a time in memory
            self._kept.clear()
        return self._keep(key, lambda: params.load(device=self.device))

    def _features(
        self, backbone: Backbone, dataset: Dataset, images: Sequence[SplitImage], params: Params, *, views: int
    ) -> Tensor:
        """As the method reads them, (n, views, d) or (n, views, p), on the device, kept."""
        unprojected = params.method.reads == "unprojected" and backbone.projection is not None
        drawn_by = params.seed if views > 1 else None
        digest = digest_json([image.digest for image in images])
        return self._keep(
            ("features", feature_key(backbone), digest, views, drawn_by, unprojected),
            lambda: self._computed(backbone, dataset, images, params, views=views, unprojected=unprojected),
        )

    def _computed(
        self, backbone: Backbone, dataset: Dataset, images: Sequence[SplitImage], params: Params, *, views: int,
        unprojected: bool = False,
    ) -> Tensor:  # fmt: skip
        """The same, from the store on disk."""
        return features_in_memory(
            backbone, images, root=dataset.root, store_folder=self.store_folder, views=views, seed=params.seed,
            batch_size=params.features.batch_size, unprojected=unprojected,
        )  # fmt: skip

    def _zero_shot(self, backbone: Backbone, split: Split, test: CachedFeatures, params: Params) -> float:
        def compute() -> float:
            classifier = baselines.zero_shot(backbone, split.class_names, split.template)
            features = projected(first_views(test), backbone, reads=params.method.reads)
            return float((classifier.logits_in_pieces(features).argmax(1) == test.labels).float().mean())

        return self._keep(("zero-shot", feature_key(backbone), split.class_names, split.template, split.test_digest),
                          compute)  # fmt: skip

    def _keep(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """The value of a key, computed when it is not in memory; the one longest unused makes room."""
        value = self._kept.pop(key) if key in self._kept else compute()
        self._kept[key] = value
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return value


def _judge(one: _Prepared, curve: Sequence[Epoch], params: Params, seconds: float) -> Scores:
    answers = answer_with(one.training.learner, class_names=one.split.class_names)
    test = evaluate(
        answers.of_examples(one.test).numpy(), one.test.labels.cpu().numpy(),
        one.split.class_names, calibration_bins=params.evaluate.calibration_bins,
    )  # fmt: skip
    last = curve[-1]
    return Scores(
        val_accuracy=last.val_accuracy or 0.0,
        val_loss=last.val_loss or 0.0,
        accuracy=test.accuracy,
        macro_f1=test.macro_f1,
        calibration_error=test.calibration_error,
        zero_shot_accuracy=one.zero_shot_accuracy,
        seconds=one.seconds + seconds,
        curve=tuple(curve),
        test_digest=one.split.test_digest,
        tests={name: _judge_target(one, *its, one.roots[name], params) for name, its in one.targets.items()},
    )


def _judge_target(
    one: _Prepared, target: Target, features: Tensor, root: Path, params: Params
) -> dict[str, float]:
    """Accuracy of the learner, bound to the target's classes, and of zero-shot."""
    learner = one.training.learner
    if target.class_names == one.split.class_names:
        answers = answer_with(learner, class_names=target.class_names)
    elif learner.rebinds:
        task = Task(target.class_names, target.template)
        rebound = load_method(params.method.name).build(
            one.training.found or params.method, backbone=one.backbone, task=task, engine=params.engine.engine(),
            generator=generator_for(params.seed, "context"), state=learner.state_dict(), rebound=True,
        )  # fmt: skip
        rebound.load_state_dict(learner.state_dict())
        answers = answer_with(rebound, class_names=target.class_names)
    else:
        return {}
    labels = torch.tensor(target.labels)
    pixels = DecodedImages(target.images, root, one.backbone.transform, one.backbone.device)
    own = answers.of_examples(pixels) if answers.reads == "pixels" else answers.probabilities(features)
    zero_shot = baselines.zero_shot(one.backbone, target.class_names, target.template)
    features = projected(features, one.backbone, reads=answers.reads)
    found = {"learned": own, "zero_shot": zero_shot.probabilities(features)}
    return {name: float((its.argmax(1).cpu() == labels).float().mean()) for name, its in found.items()}
