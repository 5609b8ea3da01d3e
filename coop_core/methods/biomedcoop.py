"""BiomedCoOp: context vectors held near what a language model says of the classes.

Koleilat, Asgariandehkordi, Rivaz, Xiao: BiomedCoOp: Learning to Prompt for Biomedical Vision-Language Models,
CVPR 2025. CoOp's loss and two more: SCCM pulls each class's learned text feature towards the mean of all its
sentences, KDSP pulls the answers towards those of the sentences that the batch's images agree on. Sentences serve
training alone: what was learned is context vectors, which collapse as CoOp's do.

Where the released code differs from this file: it drops sentences whose scores are alike out of all (a loss of NaN),
it trains BERT towers with dropout, and it cuts sentences that are too long; here all sentences are taken then, towers
stay as in evaluation, and what does not fit is refused.
"""

from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from coop_core.backbone import Backbone, TextTower
from coop_core.errors import TrainingError
from coop_core.methods import Task
from coop_core.methods.learner import ContextLearner, ContextLength, ContextParams, InitialWords, first_prompts
from coop_core.prompts.encoder import PromptEncoder, encode_texts
from coop_core.prompts.engine import Engine


class Params(ContextParams):
    name: Literal["biomedcoop"] = "biomedcoop"
    n_context: ContextLength | None = None
    initial_words: InitialWords | None = "a photo of a"
    sccm_weight: float = Field(default=0.5, ge=0, le=1000)
    """Weight of the distance between learned text features and the mean of all sentences (the paper's lambda 1)."""
    kdsp_weight: float = Field(default=0.5, ge=0, le=1000)
    """Weight of the divergence from what the selected sentences answer (lambda 2)."""
    selection_threshold: float = Field(default=1.5, gt=0, le=100)
    """A sentence is selected when its score is at most so many standard deviations from the mean score."""


class Sentences:
    """Text features of every class's sentences."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        """L2-normalised (s, d) a class, of any number s each."""
        longest = max(map(len, features))
        self.features = torch.stack([F.pad(own, (0, 0, 0, longest - len(own))) for own in features])   # (c, s, d)
        counts = torch.tensor([len(own) for own in features], device=self.features.device)
        self.exist = torch.arange(longest, device=counts.device) < counts[:, None]                      # (c, s)
        self.overall = self.mean(self.exist.any(0))
        """The mean of all (c, d)."""

    def scores(self, images: Tensor, scale: float) -> Tensor:
        """Unit image features (n, d) -> (s,): how well the i-th sentences answer, the best class an image counting."""
        logits = scale * torch.einsum("nd,csd->ncs", images, self.features)
        return logits.masked_fill(~self.exist, -torch.inf).amax(1).mean(0)

    def mean(self, selected: Tensor) -> Tensor:
        """The classes' mean sentence (c, d), normalised, of the selected (s,); a class that has none of the selected
        keeps all of its own."""
        chosen = self.exist & selected
        chosen = torch.where(chosen.any(1, keepdim=True), chosen, self.exist)
        total = torch.einsum("cs,csd->cd", chosen.to(self.features.dtype), self.features)
        return F.normalize(total / chosen.sum(1, keepdim=True), dim=-1)


def select(scores: Tensor, threshold: float) -> Tensor:
    """Scores (s,) -> which sentences agree with the others (s,): |score - mean| <= threshold * std, unbiased.

    (Section 3.3. The published distance from the median over the median deviation is taken back by the
    standardisation that follows it.) All, where most scores are alike or there is one: nothing sets any apart.
    """
    everything = torch.ones_like(scores, dtype=torch.bool)
    if len(scores) < 2 or (scores - scores.median()).abs().median() == 0:
        return everything
    selected = (scores - scores.mean()).abs() <= threshold * scores.std()
    return selected if selected.any() else everything


class BiomedCoOp(ContextLearner):
    """Learned context vectors and the frozen sentences that they are held near."""

    def __init__(
        self, encoder: PromptEncoder, context_vectors: Tensor, sentences: Sentences | None, params: Params, *,
        logit_scale: float,
    ) -> None:  # fmt: skip
        """Without sentences it answers, and does not learn."""
        super().__init__(encoder, context_vectors, logit_scale=logit_scale)
        self.sentences, self.params = sentences, params

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """CE + lambda 1 * SCCM + lambda 2 * KDSP (equations 5 to 9); sentences are selected by this batch."""
        class_weights = self.class_weights()                                      # (c, d)
        logits = self.logits_with(class_weights, images)                          # (n, c)
        sccm, kdsp = self.held_near_sentences(class_weights, logits, images)
        return F.cross_entropy(logits, labels) + sccm + kdsp, logits

    def held_near_sentences(self, class_weights: Tensor, logits: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """The two losses beside cross-entropy, with their weights."""
        assert self.sentences is not None
        with torch.no_grad():
            unit = F.normalize(images, dim=-1)
            selected = select(self.sentences.scores(unit, self.logit_scale), self.params.selection_threshold)
            taught = self.logit_scale * unit @ self.sentences.mean(selected).T    # (n, c)
        sccm = F.mse_loss(class_weights, self.sentences.overall)
        student, teacher = logits.log_softmax(1), taught.log_softmax(1)
        kdsp = F.kl_div(student, teacher, reduction="sum", log_target=True) / logits.numel()
        return self.params.sccm_weight * sccm, self.params.kdsp_weight * kdsp


def build(
    params: Params,
    *,
    backbone: Backbone,
    task: Task,
    generator: torch.Generator,
    engine: Engine | None = None,
    state: dict[str, Tensor] | None = None,
    **rest: Any,
) -> BiomedCoOp:
    """An untrained BiomedCoOp, or one that is to take up `state`, which needs no sentences.

    Raises
    ------
    PromptError
        When n_context is not the number of tokens of initial_words, or prompts or sentences do not fit the tower.
    TrainingError
        When there are no sentences to learn from.
    """
    if state is None and not task.descriptions:
        raise TrainingError("biomedcoop learns from sentences a class, and the data set has none: make them with "
                            "`coop describe`, and name the file under `descriptions` in the dataset card")  # fmt: skip
    encoder, context = first_prompts(params, backbone=backbone, task=task, generator=generator, engine=engine)
    sentences = None if state is not None else Sentences(_encoded(backbone.text_tower, task.descriptions))
    return BiomedCoOp(encoder, context, sentences, params, logit_scale=backbone.logit_scale)


def _encoded(tower: TextTower, descriptions: tuple[tuple[str, ...], ...]) -> tuple[Tensor, ...]:
    """Kept beside the tower for the trials of a sweep, because thousands of sentences take it minutes."""
    if _kept.get(tower, ((), ()))[0] != descriptions:
        features = encode_texts(tower, [sentence for own in descriptions for sentence in own])
        _kept[tower] = descriptions, features.split([len(own) for own in descriptions])
    return _kept[tower][1]


_kept: WeakKeyDictionary[Any, tuple[tuple[tuple[str, ...], ...], tuple[Tensor, ...]]] = WeakKeyDictionary()
"""The last descriptions of each text tower that is in use, and their features."""
