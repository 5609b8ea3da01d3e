"""DPL: deep prompts in both towers, as many in each layer as a search finds.

Huang, Pedapati, Chen, Gao: Differentiable Prompt Learning for Vision Language Models, 2025 (arXiv 2501.00457). Learned
rows stand beside the keys and values of a layer's attention (`backbone.blocks`). The search mixes 0 to n rows in every
layer by weights that it learns (section 3.2); training then learns the rows of the depths found, from the start.
It learns through the image tower, so it reads pixels; it collapses to class weights and a prompted image tower.

Where the released code differs from this file: it swaps the two towers' depths when it saves them, it searches by the
same first validation images throughout, its teacher knows the last template alone, and it averages the embeddings of
templates of different lengths and ends them where the last one ends. `strict_upstream` repeats all four; otherwise
several templates are averaged as features.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from coop_core.backbone import Backbone
from coop_core.backbone.blocks import Deep
from coop_core.data.dataset import words
from coop_core.errors import PromptError
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import MethodParams, Reads, Task
from coop_core.methods.learner import FeatureLearner
from coop_core.prompts.encoder import PromptEncoder, encode_texts
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import CONTEXT_STD, lay_out_blended, lay_out_sentences
from coop_core.prompts.packed_tower import supports_packing
from coop_core.prompts.prompted_images import PromptedImages, supports_image_prompts

_Lengths = list[Annotated[int, Field(ge=0, le=64)]]


class SearchParams(BaseModel):
    """The search's own recipe; momentum and weight decay are those of `train`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    image_candidates: int = Field(default=6, ge=1, le=16)
    """A layer of the image tower gets 0 to so many rows (the paper's n)."""
    text_candidates: int = Field(default=6, ge=1, le=16)
    """A layer of the text tower."""
    epochs: int = Field(default=80, ge=1, le=10_000)
    batch_size: int = Field(default=4, ge=1, le=4_096)
    validation_batch_size: int = Field(default=16, ge=1, le=4_096)
    """Validation images that each step of the mixing weights sees; the next ones each time."""
    learning_rate: float = Field(default=0.0035, ge=0, le=100)
    """Of the rows, by SGD with one epoch of warm-up."""
    mixing_learning_rate: float = Field(default=0.0035, ge=0, le=100)
    """Of the mixing weights (the paper's alpha), by Adam."""


class Params(MethodParams):
    name: Literal["dpl"] = "dpl"
    reads: ClassVar[Reads] = "pixels"
    image_lengths: _Lengths | None = None
    """Rows in each layer of the image tower; null for both towers: the search finds them."""
    text_lengths: _Lengths | None = None
    """Rows in each layer of the text tower."""
    templates: list[str] | None = None
    """Sentences around the class name, whose text features are averaged; null takes the data set's own template."""
    distillation: float = Field(default=0.0, ge=0, le=1000)
    """Weight of the divergence from zero-shot's answers; the released code multiplies it by 0."""
    search: SearchParams = SearchParams()
    strict_upstream: bool = False
    """Repeat the released code's defects in search and teacher, for comparison."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.image_lengths is None) != (self.text_lengths is None):
            raise ValueError("image_lengths and text_lengths are given together, or both left to the search")
        return self

    def check_backbone(self, backbone: Backbone) -> None:
        """Raises PromptError for towers of other blocks as well."""
        backbone.check_prompts()
        if not supports_image_prompts(backbone.image_tower):
            raise PromptError(f"dpl prompts open_clip's own vision transformers, and {backbone.name} has another "
                              "tower: set backbone.architecture to a ViT, such as ViT-B-16-quickgelu")  # fmt: skip
        if not supports_packing(backbone.text_tower):
            raise PromptError(f"dpl prompts plain causal text towers, and {backbone.name} has another one: set "
                              "backbone.architecture to a CLIP of open_clip, such as ViT-B-16-quickgelu")  # fmt: skip

    @property
    def is_searched(self) -> bool:
        return self.image_lengths is None


class Towers:
    """Both frozen towers as deep prompts enter them.

    A plain object, not a module: it is neither trained nor saved. The text side is made when it is first needed.
    """

    def __init__(self, backbone: Backbone, task: Task, params: Params, engine: Engine | None) -> None:
        self.backbone, self.engine = backbone, engine or Engine()
        self.templates, self.strict = tuple(params.templates or [task.template]), params.strict_upstream
        self.class_names = tuple(map(words, task.class_names))
        self.images = PromptedImages(backbone.image_tower, self.engine)

    @cached_property
    def encoder(self) -> PromptEncoder:
        sentences = [[template.format(name) for name in self.class_names] for template in self.templates]
        tower = self.backbone.text_tower
        layout = (lay_out_blended(tower, sentences) if self.strict
                  else lay_out_sentences(tower, [one for its in sentences for one in its]))  # fmt: skip
        return PromptEncoder(tower, layout, engine=self.engine)

    @property
    def text_layers(self) -> int:
        return len(self.backbone.text_tower.module.transformer.resblocks)  # type: ignore[attr-defined]

    def class_weights(self, deep: Sequence[Deep | None]) -> Tensor:
        """Text features (c, d), L2-normalised, of each class's sentences."""
        nothing = torch.zeros(0, self.backbone.text_tower.width, device=self.backbone.device)
        features = self.encoder(nothing, deep=deep).unflatten(0, (-1, len(self.class_names)))
        return features[0] if len(features) == 1 else F.normalize(features.mean(0), dim=-1)

    def taught(self) -> Tensor:
        """Zero-shot's class weights (c, d)."""
        if not self.strict:
            return self.class_weights([None] * self.text_layers)
        return encode_texts(self.backbone.text_tower, [self.templates[-1].format(name) for name in self.class_names])


class _Prompted(FeatureLearner):
    """Answers by prompted towers; a subclass says what is read in each of their blocks."""

    reads: Reads = "pixels"

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.towers, self.logit_scale = towers, towers.backbone.logit_scale

    @property
    def encoder(self) -> PromptEncoder:
        return self.towers.encoder

    def deep_images(self) -> list[Deep | None]:
        raise NotImplementedError

    def deep_texts(self) -> list[Deep | None]:
        raise NotImplementedError

    def features(self, pixels: Tensor) -> Tensor:
        """What the prompted image tower says of normalised pixels (n, 3, size, size): (n, d), not normalised."""
        return self.towers.images(pixels, self.deep_images())

    def classifier(self) -> LinearClassifier:
        """Of the prompted tower's features."""
        return LinearClassifier(self.towers.class_weights(self.deep_texts()), scale=self.logit_scale)

    def logits(self, images: Tensor) -> Tensor:
        class_weights = self.towers.class_weights(self.deep_texts())
        return self.logit_scale * F.normalize(self.features(images), dim=-1) @ class_weights.T


class DPL(_Prompted):
    """Learned rows in the layers that have some."""

    def __init__(
        self, towers: Towers, image_rows: Sequence[Tensor], text_rows: Sequence[Tensor], *, params: Params
    ) -> None:
        super().__init__(towers)
        self.params, self.layers = params, (len(image_rows), len(text_rows))
        self.image_rows, self.text_rows = _of_layers(image_rows), _of_layers(text_rows)

    def deep_images(self) -> list[Deep | None]:
        return [Deep(self.image_rows[str(i)]) if str(i) in self.image_rows else None for i in range(self.layers[0])]

    def deep_texts(self) -> list[Deep | None]:
        return [Deep(self.text_rows[str(i)]) if str(i) in self.text_rows else None for i in range(self.layers[1])]

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(images)
        loss = F.cross_entropy(logits, labels)
        if self.params.distillation:
            loss = loss + self.params.distillation * divergence(self._taught(images), logits)
        return loss, logits

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor:
        """What zero-shot answers (n, c)."""
        features = self.towers.images(images, [None] * self.layers[0])
        return self.logit_scale * F.normalize(features, dim=-1) @ self._teacher.T

    @cached_property
    def _teacher(self) -> Tensor:
        return self.towers.taught()


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of logits (n, c), summed, over n * c as in the released code."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="sum", log_target=True) / student.numel()


def _of_layers(rows: Sequence[Tensor]) -> nn.ParameterDict:
    return nn.ParameterDict({str(i): nn.Parameter(its) for i, its in enumerate(rows) if len(its)})


class Supernet(_Prompted):
    """Every layer mixes 0 to n rows, by learned weights (the paper's equation of the mixed operation).

    Candidate c has c rows of its own, which lie together: 0 of candidate 0, then 1, then 2, up to n.
    """

    def __init__(self, towers: Towers, candidates: tuple[int, int], generator: torch.Generator) -> None:
        """`candidates`: n of the image and of the text tower."""
        super().__init__(towers)
        layers = towers.images.layers, towers.text_layers
        sides = list(zip(layers, candidates, strict=True))
        self.image_members, self.text_members = (_members(n).to(towers.backbone.device) for n in candidates)
        alphas = [1e-3 * torch.randn(count, n + 1, generator=generator) for count, n in sides]
        shapes = [(count, n * (n + 1) // 2) for count, n in sides]
        images = torch.randn(*shapes[0], towers.images.width, generator=generator)
        texts = torch.rand(*shapes[1], towers.backbone.text_tower.width, generator=generator)
        self.image_alphas, self.text_alphas = map(nn.Parameter, alphas)           # (layers, 1 + n)
        self.image_rows, self.text_rows = nn.Parameter(images), nn.Parameter(texts)  # (layers, t, w)
        self.to(towers.backbone.device)

    def deep_images(self) -> list[Deep | None]:
        return _mixed(self.image_rows, self.image_alphas, self.image_members)

    def deep_texts(self) -> list[Deep | None]:
        return _mixed(self.text_rows, self.text_alphas, self.text_members)

    @property
    def rows(self) -> list[nn.Parameter]:
        return [self.image_rows, self.text_rows]

    @property
    def alphas(self) -> list[nn.Parameter]:
        return [self.image_alphas, self.text_alphas]

    def found(self, params: Params) -> Params:
        """Each layer's largest share, as the parameters to train with."""
        images, texts = (its.argmax(1).tolist() for its in self.alphas)
        if params.strict_upstream and len(images) == len(texts):
            images, texts = texts, images
        return params.model_copy(update={"image_lengths": images, "text_lengths": texts})


def _members(n: int) -> Tensor:
    """Which rows each of 0 to n is made of (1 + n, t)."""
    counts = torch.arange(n + 1)
    return (counts.repeat_interleave(counts) == counts[:, None]).float()


def _mixed(rows: Iterable[Tensor], alphas: Iterable[Tensor], members: Tensor) -> list[Deep | None]:
    return [Deep(its, alpha.softmax(0), members) for its, alpha in zip(rows, alphas, strict=True)]


def supernet(
    params: Params, *, backbone: Backbone, task: Task, generator: torch.Generator, engine: Engine | None = None
) -> Supernet:
    """What the search trains. Raises PromptError as `build` does."""
    _check(params, backbone, engine)
    asked = params.search.image_candidates, params.search.text_candidates
    return Supernet(Towers(backbone, task, params, engine), asked, generator)


def build(
    params: Params,
    *,
    backbone: Backbone,
    task: Task,
    generator: torch.Generator,
    engine: Engine | None = None,
    **rest: Any,
) -> DPL:
    """Untrained rows of the lengths in `params`, drawn from N(0, 0.02^2), the image tower's first.

    Raises
    ------
    PromptError
        For towers of other blocks, lengths for another number of layers, and sentences that do not fit the text tower.
    """
    _check(params, backbone, engine)
    towers = Towers(backbone, task, params, engine)
    sides = ((params.image_lengths or [], towers.images.layers, towers.images.width, "image"),
             (params.text_lengths or [], towers.text_layers, backbone.text_tower.width, "text"))  # fmt: skip
    rows = []
    for lengths, layers, width, name in sides:
        if len(lengths) != layers:
            raise PromptError(f"method.{name}_lengths has {len(lengths)} numbers, but {backbone.name} has {layers} "
                              f"{name} layers: give one a layer")  # fmt: skip
        rows.append([CONTEXT_STD * torch.randn(length, width, generator=generator) for length in lengths])
    return DPL(towers, rows[0], rows[1], params=params).to(backbone.device)


def _check(params: Params, backbone: Backbone, engine: Engine | None) -> None:
    params.check_backbone(backbone)
    if "float16" in (backbone.image_precision, engine.precision if engine else "float32"):
        raise PromptError("dpl learns through both towers, and in float16 its gradients would vanish: set "
                          "backbone.image_precision and engine.precision to float32 or bfloat16")  # fmt: skip
