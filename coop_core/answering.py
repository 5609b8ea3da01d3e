"""Answering: an artefact or a learner -> probabilities; the one way, for evaluation, trials, predicting and serving.

Linear where the prompt collapses: one matrix product an image, of features or of what the method's own image tower says
of pixels. By the method itself where it does not, in pieces that fit into memory.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from coop_core.artifact import Artifact, restore_learner
from coop_core.backbone import Backbone
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Examples, Learner, Reads
from coop_core.methods.learner import collapsed, first_views, first_views_in_turn, logits_in_pieces
from coop_core.prompts.engine import Engine


class Answerer:
    """Answers what images show; `answerer` makes one of an artefact."""

    def __init__(
        self,
        answers: LinearClassifier | Learner,
        *,
        class_names: Sequence[str],
        reads: Reads = "features",
        features: Callable[[Tensor], Tensor] | None = None,
        temperature: float = 1.0,
        threshold: float = 0.0,
    ) -> None:
        """`features`: what a method's own image tower says of pixels, where it reads them."""
        self._answers, self.class_names, self._features = answers, tuple(class_names), features
        self.reads = reads
        self._temperature, self.threshold = temperature, threshold
        """Of probabilities, the least that is an answer."""

    @property
    def prompts_per_image(self) -> int:
        """How many prompts an answer costs; 0 for a matrix product."""
        return getattr(self._answers, "prompts_per_image", 0)

    def probabilities(self, images: Tensor) -> Tensor:
        """What it reads, (n, d), (n, p) or (n, 3, size, size), not normalised features -> (n, c), float32."""
        return self.with_features(images)[0]

    @torch.no_grad()
    def with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the features (n, d) that were answered from: given, or of the method's own image tower."""
        features = images if self._features is None else self._features(images)
        if isinstance(self._answers, LinearClassifier):
            logits = self._answers.logits_in_pieces(features)
        else:
            logits = logits_in_pieces(self._answers, features)
        return (logits / self._temperature).softmax(dim=-1), features

    def of_examples(self, examples: Examples) -> Tensor:
        """Probabilities (n, c) of every image's test view, on the CPU; examples hold what it reads."""
        return self.of_examples_with_features(examples)[0]

    def of_examples_with_features(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """The same, and the features (n, d)."""
        batches: Iterable[Tensor] = first_views_in_turn(examples)
        if self.reads != "pixels":
            batches = [first_views(examples)]
        found = [[its.cpu() for its in self.with_features(images)] for images in batches]
        probabilities, features = (torch.cat(its) for its in zip(*found, strict=True))
        return probabilities, features


def encoded(pixels: Tensor, backbone: Backbone, *, reads: Reads) -> Tensor:
    """Normalised pixels (n, 3, size, size) -> what an answerer reads."""
    if reads == "pixels":
        return pixels
    return backbone.encode_unprojected(pixels) if reads == "unprojected" else backbone.encode_images(pixels)


def answer_with(learner: Learner, *, class_names: Sequence[str]) -> Answerer:
    """A trained learner's answers, by what it collapses to where it does."""
    return Answerer(collapsed(learner) or learner, class_names=class_names, reads=learner.reads,
                    features=_own_features(learner))  # fmt: skip


def _own_features(learner: Any) -> Callable[[Tensor], Tensor] | None:
    return learner.features if learner.reads == "pixels" else None


def answerer(
    artifact: Artifact,
    *,
    backbone: Backbone | None = None,
    class_names: Sequence[str] | None = None,
    template: str | None = None,
    engine: Engine | None = None,
) -> Answerer:
    """An artefact's answers, for its own classes or re-bound to others.

    Its temperature and threshold were fitted among its own classes, and serve no others.
    `backbone` is the one to compute with, or None to load what the card names where the answers need it. `template`
    is that of the other classes' data set, for methods that read class texts.

    Raises
    ------
    ArtifactError
        For another backbone, an unknown method, or a method that knows its own classes alone.
    """
    names = tuple(class_names or artifact.class_names)
    is_own = names == artifact.class_names
    how: dict[str, Any] = {"temperature": artifact.temperature, "threshold": artifact.threshold} if is_own else {}
    if artifact.classifier is not None and is_own and artifact.reads == "features":
        return Answerer(artifact.classifier, class_names=names, **how)
    learner = restore_learner(artifact, backbone or artifact.load_backbone(), names, template=template, engine=engine)
    answers = artifact.classifier if is_own else collapsed(learner)
    return Answerer(answers or learner, class_names=names, reads=learner.reads, features=_own_features(learner), **how)
