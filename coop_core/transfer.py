"""Transfer: a learned prompt and further test sets -> how it judges images and classes beyond its training.

Base-to-new generalisation (Zhou et al., CVPR 2022, section 4.1), cross-dataset transfer (4.2) and domain generalisation
(4.3) are one thing: the prompt is re-bound to each test set's class names and judged on its images, with the baselines
that can answer there beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coop_core.answering import Answerer
from coop_core.backbone import Backbone
from coop_core.data.dataset import Dataset, words
from coop_core.data.split import SplitImage, judged_images
from coop_core.errors import SplitError
from coop_core.files import digest_json
from coop_core.judging import baselines
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Examples
from coop_core.params import TargetParams


@dataclass(frozen=True)
class Target:
    """A test set of its own: nothing of it was trained on."""

    dataset_name: str
    dataset_digest: str
    class_names: tuple[str, ...]
    """The words shown to the text tower."""
    template: str
    classes: str
    images: tuple[SplitImage, ...]

    @property
    def labels(self) -> list[int]:
        return [image.label for image in self.images]

    @property
    def digest(self) -> str:
        """Equal for two judgements exactly when they are of the same images, labels and class names."""
        return digest_json([self.class_names, self.template, [(image.digest, image.label) for image in self.images]])


def target_of(dataset: Dataset, params: TargetParams) -> Target:
    """The images and class names that parameters choose of a data set.

    Raises
    ------
    SplitError
        When a class has no test image, or `class_names` names a class that the set does not have.
    """
    names, images = judged_images(dataset, classes=params.classes, per_class=params.test_per_class)
    if unknown := sorted(set(params.class_names) - set(names)):
        raise SplitError(f"tests: class_names gives other words for {unknown[0]!r}, which {dataset.name} does not "
                         f"have: its classes are {', '.join(names[:10])}{', ...' * (len(names) > 10)}")  # fmt: skip
    shown = tuple(words(params.class_names.get(name, name)) for name in names)
    return Target(dataset.name, dataset.digest, shown, dataset.template, params.classes, images)


def judge(
    target: Target,
    features: Tensor,
    *,
    backbone: Backbone,
    answerer: Answerer,
    method: str,
    templates: Sequence[str],
    known: Mapping[str, tuple[LinearClassifier, Sequence[str]]],
    pixels: Examples | None = None,
) -> dict[str, Tensor]:
    """Probabilities (n, c) of each classifier for a target's features (n, d), the method's own last.

    Where the method reads what comes before the image tower's last linear map, that is what is given (n, p). `pixels`
    are the same images for a method that reads them. `known` are classifiers of fixed classes with their names: one
    answers here when its classes cover the target's.
    """
    names = target.class_names
    classifiers = {
        "zero-shot": baselines.zero_shot(backbone, names, target.template),
        "prompt ensemble": baselines.prompt_ensemble(backbone, names, templates, own_template=target.template),
    }
    for name, (classifier, its_names) in known.items():
        if (cut := cut_to(classifier, its_names, names)) is not None:
            classifiers[name] = cut
    seen = backbone.project(features) if answerer.reads == "unprojected" else features
    found = {name: classifier.probabilities(seen) for name, classifier in classifiers.items()}
    own = answerer.probabilities(features) if pixels is None else answerer.of_examples(pixels)
    return {**found, method: own}


def cut_to(classifier: LinearClassifier, known: Sequence[str], wanted: Sequence[str]) -> LinearClassifier | None:
    """A classifier of the wanted classes alone, in their order; None when it does not know them all."""
    places = {words(name): place for place, name in enumerate(known)}
    if not set(wanted) <= set(places):
        return None
    rows = torch.tensor([places[name] for name in wanted])
    bias = None if classifier.bias is None else classifier.bias[rows]
    return LinearClassifier(classifier.weights[rows], classifier.scale, bias, classifier.normalise)
