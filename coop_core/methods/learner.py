"""What methods have in common: a torch module that reads image features and learns by cross-entropy."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from coop_core.backbone import Backbone
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Examples, Learner, MethodParams, Reads, Task
from coop_core.prompts.encoder import PromptEncoder
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import Position, build_layout, context_size, initial_context

_AT_ONCE = 64
"""Images whose pixels are in memory together."""


class FeatureLearner(nn.Module):
    """Reads what the image tower says; a method overrides what is different with it."""

    reads: Reads = "features"
    rebinds = True

    def logits(self, images: Tensor) -> Tensor:
        """Image tower outputs (n, d) -> (n, c)."""
        raise NotImplementedError

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(images)
        return F.cross_entropy(logits, labels), logits

    def classifier(self) -> LinearClassifier | None:
        return None


ContextLength = Annotated[int, Field(ge=1, le=512)]
InitialWords = Annotated[str, Field(min_length=1)]


class ContextParams(MethodParams):
    """What every method with learned context takes; each has defaults of its own."""

    n_context: ContextLength | None = 16
    """How many context vectors (the papers' M); null takes the number of tokens of initial_words."""
    initial_words: InitialWords | None = None
    """Words the context starts from, such as "a photo of a"; null starts from random vectors."""

    @model_validator(mode="after")
    def _some_length(self) -> Self:
        if self.n_context is None and self.initial_words is None:
            raise ValueError("n_context can be null only with initial_words")
        return self

    def check_backbone(self, backbone: Backbone) -> None:
        backbone.check_prompts()


def first_prompts(
    params: ContextParams,
    *,
    backbone: Backbone,
    task: Task,
    generator: torch.Generator,
    engine: Engine | None = None,
    position: Position = "end",
    class_specific: bool = False,
    members: int | None = None,
) -> tuple[PromptEncoder, Tensor]:
    """-> (encoder of a prompt a class, the context that learning starts from on the backbone's device).

    The context is (m, w), class-specific (c, m, w), and with `members` (g, m, w), drawn one after another.

    Raises
    ------
    PromptError
        When n_context is not the number of tokens of initial_words, or prompts do not fit the tower.
    """
    tower, words = backbone.text_tower, params.initial_words
    n_context = context_size(params.n_context, words, backbone)
    layout = build_layout(tower, task.class_names, n_context=n_context, position=position, initial_words=words)
    classes = len(task.class_names) if class_specific else None
    drawn = [
        initial_context(
            tower, n_context=n_context, initial_words=words, class_specific=classes, generator=generator
        )
        for _ in range(members or 1)
    ]
    encoder = PromptEncoder(tower, layout, class_specific=class_specific, engine=engine)
    return encoder, (torch.stack(drawn) if members else drawn[0]).to(backbone.device)


class ContextLearner(FeatureLearner):
    """Learned context vectors in front of a frozen text tower, which collapse to class weights."""

    def __init__(self, encoder: PromptEncoder, context_vectors: Tensor, *, logit_scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.logit_scale = logit_scale
        self.context_vectors = nn.Parameter(context_vectors)                      # (m, w) or (c, m, w), float32
        self.rebinds = context_vectors.ndim == 2

    def class_weights(self) -> Tensor:
        """L2-normalised text features (c, d)."""
        return self.encoder(self.context_vectors)

    def classifier(self) -> LinearClassifier:
        return LinearClassifier(self.class_weights(), scale=self.logit_scale)

    def logits(self, images: Tensor) -> Tensor:
        return self.logits_with(self.class_weights(), images)

    def logits_with(self, class_weights: Tensor, images: Tensor) -> Tensor:
        return self.logit_scale * F.normalize(images, dim=-1) @ class_weights.T   # (n, c)


class Fixed(FeatureLearner):
    """Built and finished: a linear classifier that learns no further."""

    weights: Tensor
    bias: Tensor | None

    def __init__(self, classifier: LinearClassifier, *, from_names: bool = False) -> None:
        """What was built from examples knows its own classes alone. `from_names`: it was built from class names, so
        there is nothing to keep, and it is built again for others."""
        super().__init__()
        self.rebinds = from_names
        self.scale, self.normalise = classifier.scale, classifier.normalise
        self.register_buffer("weights", classifier.weights, persistent=not from_names)   # (c, d)
        self.register_buffer("bias", classifier.bias, persistent=not from_names)         # (c,) or None

    def classifier(self) -> LinearClassifier:
        return LinearClassifier(self.weights, self.scale, self.bias, self.normalise)

    def logits(self, images: Tensor) -> Tensor:
        return self.classifier().logits(images)


@torch.no_grad()
def logits_in_pieces(learner: Learner, images: Tensor) -> Tensor:
    """The logits of many images (n, c), as many at a time as the learner says fit into memory."""
    pieces = images.split(getattr(learner, "images_at_once", None) or max(1, len(images)))
    return torch.cat([learner.logits(piece) for piece in pieces])


@torch.no_grad()
def logits_of(learner: Any, examples: Examples) -> Tensor:
    """The logits of every image's test view (n, c)."""
    if learner.reads != "pixels":
        return logits_in_pieces(learner, first_views(examples))
    classifier = learner.classifier()
    return torch.cat([classifier.logits(learner.features(pixels)) for pixels in first_views_in_turn(examples)])


def first_views(examples: Examples) -> Tensor:
    """View 0 of every image."""
    rows = torch.arange(len(examples.labels), device=examples.labels.device)
    return examples.batch(rows, torch.zeros_like(rows))


def projected(images: Tensor, backbone: Backbone, *, reads: Reads) -> Tensor:
    """What a method that reads features or what comes before them was given -> features (..., d)."""
    return backbone.project(images) if reads == "unprojected" else images


def first_views_in_turn(examples: Examples) -> Iterator[Tensor]:
    """The same, a batch at a time."""
    rows = torch.arange(len(examples.labels), device=examples.labels.device).split(_AT_ONCE)
    return in_turn(examples, rows, [torch.zeros_like(some) for some in rows])


def in_turn(examples: Any, rows: Sequence[Tensor], views: Sequence[Tensor]) -> Iterator[Tensor]:
    """Batches one after another, read ahead where the examples can."""
    if hasattr(examples, "batches"):
        return examples.batches(rows, views)
    return (examples.batch(some, its) for some, its in zip(rows, views, strict=True))


def is_built(learner: Learner) -> bool:
    """Whether it was finished when it was built: nothing of it is trained."""
    return not any(parameter.requires_grad for parameter in learner.parameters())


@torch.no_grad()
def collapsed(learner: Learner) -> LinearClassifier | None:
    """What a trained learner collapses to, on the CPU, or None."""
    found = learner.classifier()
    return None if found is None else found.cpu()
