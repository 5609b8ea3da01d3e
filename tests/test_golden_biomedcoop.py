"""BiomedCoOp against the numbers that its paper's own code computes, on a CLIP and on a BERT tower (tests/golden)."""

import zlib

import pytest
import torch
from golden_bert import CLINICAL, bert_weights, sentences, write_bert
from golden_weights import draw, write_clip
from test_golden import ENGINES, assert_close, read
from torch import Tensor
from torch.nn import functional as F

from coop_core.backbone import Backbone, load_backbone
from coop_core.methods import Task, biomedcoop
from coop_core.prompts.engine import Engine

CASES = {"a": (12, {}), "narrow": (11, {"n_context": 3, "initial_words": None})}
"""Sentences a class, and what the context is."""
TOWERS = {"biomedcoop_clip": ["packed", "packed in pieces", "cut", "full"], "biomedcoop_bert": ["cut", "full"]}


@pytest.fixture(scope="module", params=TOWERS)
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def backbone(tower: str, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    write = write_clip if tower == "biomedcoop_clip" else write_bert
    return load_backbone(write(tmp_path_factory.mktemp(tower)), None)


@pytest.fixture(scope="module")
def numbers(tower: str) -> dict[str, Tensor]:
    return read(tower)


@pytest.fixture(scope="module")
def images(backbone: Backbone, numbers: dict[str, Tensor]) -> Tensor:
    """(6, d), as the image tower says them; the BERT has none."""
    given = numbers.get("image_features")
    return backbone.encode_images(draw("images", 6, 3, 32, 32)) if given is None else given


def build(backbone: Backbone, numbers: dict[str, Tensor], case: str, engine: Engine) -> biomedcoop.BiomedCoOp:
    """On the reference's weights of the losses and the context that it started from."""
    count, context = CASES[case]
    sccm, kdsp, threshold = numbers[f"{case}.lambda_sccm_kdsp_tau"].tolist()
    params = biomedcoop.Params(sccm_weight=sccm, kdsp_weight=kdsp, selection_threshold=threshold, **context)
    learner = biomedcoop.build(params, backbone=backbone, task=Task(CLINICAL, "a photo of a {}.", sentences(count)),
                               generator=torch.Generator(), engine=engine)  # fmt: skip
    if context:
        learner.load_state_dict({"context_vectors": draw("context", *learner.context_vectors.shape, std=0.02)})
    return learner


def test_the_bert_weights_are_those_of_the_reference() -> None:
    weights = bert_weights()
    assert (len(weights), sum(tensor.numel() for tensor in weights.values())) == (40, 81_089)
    assert zlib.crc32(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))) == 2170746267


@pytest.mark.parametrize("case", CASES)
def test_sentences_and_their_choice_are_those_of_the_reference(
    backbone: Backbone, numbers: dict[str, Tensor], images: Tensor, case: str
) -> None:
    learner = build(backbone, numbers, case, Engine())
    assert learner.sentences is not None
    expected = F.normalize(numbers["sentence_features"][:, : CASES[case][0]], dim=-1)
    assert_close(learner.sentences.features, expected, of="sentence features")
    scores = learner.sentences.scores(F.normalize(images, dim=-1), learner.logit_scale)
    assert_close(scores, numbers[f"{case}.scores"], of="scores")
    selected = biomedcoop.select(scores, learner.params.selection_threshold)
    assert torch.equal(selected, numbers[f"{case}.mask"])
    assert 0 < selected.sum() < len(selected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", ENGINES)
def test_losses_and_gradient_are_those_of_the_reference(
    backbone: Backbone, numbers: dict[str, Tensor], images: Tensor, tower: str, case: str, path: str
) -> None:
    if path not in TOWERS[tower]:
        pytest.skip("no way through this tower")
    learner, labels = build(backbone, numbers, case, ENGINES[path]), numbers["labels"]
    if case == "a":
        assert torch.equal(learner.context_vectors.detach(), numbers["a.context"])
    total, logits = learner.loss(images, labels)
    total.backward()
    weights = learner.class_weights().detach()
    sccm, kdsp = learner.held_near_sentences(weights, logits.detach(), images)
    ce = numbers[f"{case}.loss.ce"]
    assert_close(logits.detach(), numbers[f"{case}.logits"], of="logits")
    assert_close(sccm.item(), numbers[f"{case}.loss.sccm"], of="sccm")
    assert_close(kdsp.item(), numbers[f"{case}.loss.kdsp"], of="kdsp")
    assert_close((total - sccm - kdsp).item(), ce, of="cross-entropy")
    assert_close(learner.context_vectors.grad, numbers[f"{case}.grad.context"], of="gradient")
