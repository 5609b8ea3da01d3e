"""Answering: an artefact or a learner -> probabilities; the one way, for evaluation, trials, predicting and serving.

Linear where the prompt collapses: one matrix product an image. By the method itself where it does not, in pieces that
fit into memory.
"""

from collections.abc import Sequence

from torch import Tensor

from coop_core.artifact import Artifact, restore_learner
from coop_core.backbone import Backbone
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Learner
from coop_core.methods.learner import collapsed, logits_in_pieces
from coop_core.prompts.engine import Engine


class Answerer:
    """Answers what images show; `answerer` makes one of an artefact."""

    def __init__(self, answers: LinearClassifier | Learner, *, class_names: Sequence[str]) -> None:
        self._answers, self.class_names = answers, tuple(class_names)

    @property
    def reads(self) -> str:
        """features or pixels, as `methods.Learner` has them."""
        return "features" if isinstance(self._answers, LinearClassifier) else self._answers.reads

    @property
    def prompts_per_image(self) -> int:
        """How many prompts an answer costs; 0 for a matrix product."""
        return getattr(self._answers, "prompts_per_image", 0)

    def probabilities(self, images: Tensor) -> Tensor:
        """What it reads, (n, d) or (n, 3, size, size), not normalised features -> (n, c), float32."""
        if isinstance(self._answers, LinearClassifier):
            return self._answers.probabilities(images)
        return logits_in_pieces(self._answers, images).softmax(dim=-1)


def answer_with(learner: Learner, *, class_names: Sequence[str]) -> Answerer:
    """A trained learner's answers, by what it collapses to where it does."""
    return Answerer(collapsed(learner) or learner, class_names=class_names)


def answerer(
    artifact: Artifact,
    *,
    backbone: Backbone | None = None,
    class_names: Sequence[str] | None = None,
    template: str | None = None,
    engine: Engine | None = None,
) -> Answerer:
    """An artefact's answers, for its own classes or re-bound to others.

    `backbone` is the one to compute with, or None to load what the card names where the answers need it. `template`
    is that of the other classes' data set, for methods that read class texts.

    Raises
    ------
    ArtifactError
        For another backbone, an unknown method, or a method that knows its own classes alone.
    """
    names = tuple(class_names or artifact.class_names)
    if artifact.classifier is not None and names == artifact.class_names:
        return Answerer(artifact.classifier, class_names=names)
    learner = restore_learner(artifact, backbone or artifact.load_backbone(), names, template=template, engine=engine)
    return answer_with(learner, class_names=names)
