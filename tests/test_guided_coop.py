"""CoOp with guidance and a decoupled head: its loss and answers against their formulas, and off where they are 0."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from test_methods import NAMES, OTHERS, images, kept, training_of
from torch.nn import functional as F
from toy_params import toy_params

from coop_core.answering import answerer
from coop_core.judging.baselines import zero_shot
from coop_core.methods import Task, coop
from coop_core.methods.guided_coop import LENGTH, GuidedCoOp, distance
from coop_core.training import fit_together

ASKED = images(9).features[:, 0]


def untrained(backbone: Any, names: Any = NAMES, **options: Any) -> Any:
    params = coop.Params(n_context=2, **options)
    return coop.build(params, backbone=backbone, task=Task(tuple(names), "a photo of a {}."),
                      generator=torch.Generator().manual_seed(3))  # fmt: skip


def unit(features: torch.Tensor) -> np.ndarray:
    rows = features.detach().double().numpy()
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]).mean())


def test_with_both_at_0_it_is_plain_coop(backbone):
    assert type(untrained(backbone)) is type(untrained(backbone, guidance=0.0, decoupled=0.0)) is coop.CoOp


def test_the_context_starts_where_plain_coops_does(backbone):
    plain, guided = untrained(backbone), untrained(backbone, guidance=8.0, decoupled=0.7)

    assert torch.equal(plain.context_vectors, guided.context_vectors)


def test_the_loss_is_the_papers(backbone):
    learner, labels = untrained(backbone, guidance=8.0, decoupled=0.7), images(9).labels
    with torch.no_grad():
        for parameter in learner.head.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    loss, _ = learner.loss(ASKED, labels)

    head = {name: value.detach().double().numpy() for name, value in learner.head.named_parameters()}
    learned, texts = unit(learner.class_weights()), unit(zero_shot(backbone, NAMES, "a photo of a {}.").weights)
    rows = np.concatenate([LENGTH * unit(ASKED) * head["image_stretch"] + head["image_shift"],
                           LENGTH * learned[labels] * head["text_stretch"] + head["text_shift"]])  # fmt: skip
    expected = 0.3 * cross_entropy(backbone.logit_scale * unit(ASKED) @ learned.T, labels.numpy())
    expected += 0.7 * cross_entropy(rows @ head["weight"].T + head["bias"], np.tile(labels.numpy(), 2))
    expected += 4.0 * ((learned - texts) ** 2).sum(axis=1).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_slope_of_guidance_is_that_of_its_differences():
    drawn = torch.Generator().manual_seed(0)
    learned, texts = (torch.randn(3, 4, generator=drawn, dtype=torch.float64) for _ in range(2))
    found = torch.autograd.functional.jacobian(lambda rows: distance(F.normalize(rows, dim=1), texts), learned)

    for place in itertools.product(range(3), range(4)):
        step = torch.zeros_like(learned)
        step[place] = 1e-6
        up, down = (distance(F.normalize(learned + s, dim=1), texts) for s in (step, -step))
        assert found[place].item() == pytest.approx((up - down).item() / 2e-6, abs=1e-7)


def test_an_answer_is_the_same_sum_of_both_logits(backbone):
    learner = untrained(backbone, decoupled=0.25)
    plain = backbone.logit_scale * unit(ASKED) @ unit(learner.class_weights()).T

    expected = 0.75 * torch.from_numpy(plain).float() + 0.25 * learner.head.images(F.normalize(ASKED, dim=-1))
    torch.testing.assert_close(learner.logits(ASKED), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learner.loss(ASKED, images(9).labels)[1], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def trained(backbone, zoo):
    """Parameters, training and curve, by guidance and the head's share."""

    def train(**method: Any) -> Any:
        changes = {"name": "coop", "n_context": 2, **method}
        params = toy_params(zoo.architecture("flat"), method=changes, train={"epochs": 12, "learning_rate": 0.1})
        return training_of(params, backbone)

    return train


def test_guidance_keeps_text_features_nearer_to_the_hand_written_prompts(backbone, trained):
    texts = zero_shot(backbone, NAMES, "a photo of a {}.").weights

    free, held = (distance(trained(guidance=weight)[1].learner.class_weights(), texts).item()
                  for weight in (1e-9, 50.0))  # fmt: skip
    assert held < 0.9 * free


def test_other_classes_are_answered_by_the_prompt_alone(backbone, trained, tmp_path):
    params, training, curve = trained(decoupled=0.5)
    artifact = kept(params, training, curve, backbone, tmp_path / "prompt")
    assert curve[-1].loss < curve[0].loss

    found = answerer(artifact, backbone=backbone, class_names=OTHERS).probabilities(ASKED)
    plain = untrained(backbone, OTHERS)
    plain.load_state_dict({"context_vectors": artifact.state["context_vectors"]})
    torch.testing.assert_close(found, plain.classifier().probabilities(ASKED))

    own = answerer(artifact, backbone=backbone).probabilities(ASKED)
    torch.testing.assert_close(own, training.learner.classifier().probabilities(ASKED))


def test_side_by_side_each_has_its_own_loss(backbone, zoo):
    def trainings() -> list[Any]:
        methods = [{"guidance": 8.0}, {"decoupled": 0.7}, {"guidance": 8.0}]
        return [
            training_of(toy_params(zoo.architecture("flat"), method={"name": "coop", "n_context": 2, **own},
                                   train={"epochs": 3}), backbone, fitted=False)[1] for own in methods
        ]  # fmt: skip

    together = fit_together(trainings())
    alone = [fit_together([one])[0] for one in trainings()]

    assert not hasattr(GuidedCoOp, "logits_together")
    for ours, its in zip(together, alone, strict=True):
        assert [row.loss for row in ours] == pytest.approx([row.loss for row in its], rel=1e-5)
