"""Light heads on cached features: closed forms, gradients and limits against what is computed beside them."""

import dataclasses
import itertools
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from test_methods import NAMES, OTHERS, images, kept, training_of, width_read
from torch import Tensor
from torch.nn import functional as F
from toy_params import toy_params

from coop_core.answering import answerer
from coop_core.errors import ArtifactError, TrainingError
from coop_core.features.examples import CachedFeatures
from coop_core.judging.baselines import zero_shot
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Task, fitting, gda, load_method, probe, prolip, tip_adapter

TASK = Task(NAMES, "a photo of a {}.")
HEADS: dict[str, Any] = {"gda": gda, "probe": probe, "prolip": prolip, "tip_adapter": tip_adapter}
ASKED = images(9).features[:, 0]


def built(backbone: Any, head: Any, examples: CachedFeatures | None = None, task: Task = TASK, **options: Any) -> Any:
    """A head of parameters, and of what `build` takes besides."""
    known = {name: options.pop(name) for name in ("state", "rebound", "validation", "generator") if name in options}
    given = images(width=width_read(head.Params().name, backbone)) if examples is None else examples
    return head.build(head.Params(**options), backbone=backbone, task=task, examples=given, **known)


def untrained(backbone: Any, names: Any = NAMES) -> LinearClassifier:
    return zero_shot(backbone, names, TASK.template)


def unit(features: Tensor) -> np.ndarray:
    """As numpy has it, in float64."""
    rows = features.double().numpy()
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def shrunk(rows: np.ndarray) -> np.ndarray:
    """Kubokawa and Srivastava's precision of rows around their centre, by the formula as it is written."""
    n, d = rows.shape
    covariance = rows.T @ rows / (n - 1)
    return d * np.linalg.pinv((n - 1) * covariance + np.trace(covariance) * np.eye(d))


def gaussian_logits(asked: np.ndarray, means: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Each class's log density but for what all share: -(f - mu)'P(f - mu) / 2, with f'Pf / 2 added back."""
    apart = asked[:, None] - means
    quadratic = np.einsum("ncd,de,nce->nc", apart, precision, apart)
    return -(quadratic - np.einsum("nd,de,ne->n", asked, precision, asked)[:, None]) / 2 - np.log(len(means))


# GDA


@pytest.mark.parametrize("count", [6, 60], ids=["fewer images than dimensions", "more"])
def test_gda_is_zero_shot_and_the_gaussians_of_its_paper(backbone, count):
    examples = images(count, views=2)
    found = built(backbone, gda, examples, alpha=0.7).logits(ASKED)

    rows, labels = unit(examples.features).reshape(2 * count, -1), examples.labels.repeat_interleave(2).numpy()
    means = np.stack([rows[labels == label].mean(axis=0) for label in range(3)])
    expected = 0.7 * gaussian_logits(unit(ASKED), means, shrunk(rows - means[labels]))
    expected += backbone.logit_scale * unit(ASKED) @ untrained(backbone).weights.double().numpy().T

    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gda_of_other_classes_is_that_of_the_features_nearest_to_their_texts(backbone, monkeypatch):
    monkeypatch.setattr(gda, "_NEAREST", 5)
    learned = built(backbone, gda, alpha=0.7)
    task = Task(tuple(OTHERS), TASK.template)
    found = built(backbone, gda, task=task, state=learned.state_dict(), rebound=True).logits(ASKED)

    rows, texts = unit(images().features).reshape(24, -1), untrained(backbone, OTHERS).weights.double().numpy()
    nearest = [rows[np.argsort(-rows @ text)[:5]] for text in texts]
    means = np.stack([np.concatenate([near, np.tile(text, (16, 1))]).mean(axis=0)
                      for near, text in zip(nearest, texts, strict=True)])  # fmt: skip
    precision = np.mean([shrunk(near - text) for near, text in zip(nearest, texts, strict=True)], axis=0)
    expected = 0.7 * gaussian_logits(unit(ASKED), means, precision) + backbone.logit_scale * unit(ASKED) @ texts.T

    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_other_classes_are_written_in_their_own_template(backbone, zoo, tmp_path):
    params, training, curve = training_of(toy_params(zoo.architecture("flat"), method={"name": "gda"}), backbone)
    artifact = kept(params, training, curve, backbone, tmp_path / "prompt")
    found = answerer(artifact, backbone=backbone, class_names=OTHERS, template="a drawing of {}.").probabilities(ASKED)

    task = Task(tuple(OTHERS), "a drawing of {}.")
    expected = built(backbone, gda, task=task, state=artifact.state, rebound=True).classifier().probabilities(ASKED)
    assert torch.equal(found, expected)
    assert not torch.equal(found, answerer(artifact, backbone=backbone, class_names=OTHERS).probabilities(ASKED))


def test_gda_at_alpha_0_is_zero_shot(backbone):
    assert torch.equal(built(backbone, gda, alpha=0.0).logits(ASKED), untrained(backbone).logits(ASKED))


def test_gda_of_one_image_a_class_answers_by_the_class_means(backbone):
    examples = images(3, views=1)
    found = built(backbone, gda, examples, alpha=1e6)

    nearest = unit(ASKED) @ unit(examples.features[:, 0]).T
    assert found.logits(ASKED).argmax(dim=1).tolist() == nearest.argmax(axis=1).tolist()
    assert found.logits(ASKED).isfinite().all()


def test_gda_takes_the_alpha_that_answers_validation_best(backbone):
    """Labels are turned round, so that the examples mislead and a small alpha is best."""
    right = images(9)
    asked = CachedFeatures(right.features, (right.labels + 1) % 3)

    def accuracy(alpha: float) -> float:
        answers = built(backbone, gda, alpha=alpha).logits(asked.features[:, 0]).argmax(dim=1)
        return (answers == asked.labels).float().mean().item()

    assert built(backbone, gda, validation=right).alpha.item() > built(backbone, gda, validation=asked).alpha.item()
    assert accuracy(built(backbone, gda, validation=asked).alpha.item()) == max(map(accuracy, gda.ALPHAS))


def test_gda_without_validation_images_has_the_alpha_it_states(backbone):
    assert built(backbone, gda).alpha.item() == gda.DEFAULT_ALPHA


def test_gda_says_how_much_it_keeps(backbone, caplog):
    with caplog.at_level(logging.INFO):
        built(backbone, gda)

    assert "it keeps 24 unit features for other classes, 0.0 MB" in caplog.text


# The probe from class texts


def test_the_probe_starts_from_zero_shot(backbone):
    found = built(backbone, probe, epochs=0)

    torch.testing.assert_close(found.logits(ASKED), untrained(backbone).logits(ASKED))


def test_its_penalty_is_the_papers_and_so_is_its_gradient():
    drawn = torch.Generator().manual_seed(0)
    weights, start = (torch.randn(3, 5, generator=drawn, dtype=torch.float64) for _ in range(2))
    strength = torch.tensor([0.2, 1.0, 0.5], dtype=torch.float64)
    expected = sum(float(a) * np.linalg.norm(w - t) ** 2 for a, w, t in
                   zip(strength, weights.numpy(), start.numpy(), strict=True)) / 3  # fmt: skip

    assert probe.penalty(weights, start, strength).item() == pytest.approx(expected)
    found = torch.autograd.functional.jacobian(lambda w: probe.penalty(w, start, strength), weights)
    for place in itertools.product(range(3), range(5)):
        step = torch.zeros_like(weights)
        step[place] = 1e-6
        slope = (probe.penalty(weights + step, start, strength) - probe.penalty(weights - step, start, strength)) / 2e-6
        assert found[place].item() == pytest.approx(slope.item(), abs=1e-7)


def test_a_class_is_held_as_surely_as_zero_shot_knows_its_images(backbone):
    examples, texts = images(6, views=2), untrained(backbone)
    found = probe.class_strength(texts, fitting.unit_views(examples), examples.labels)

    for label in range(3):
        own = examples.features[examples.labels == label].flatten(0, 1)
        assert found[label].item() == pytest.approx(texts.probabilities(own)[:, label].mean().item())


def test_a_class_without_an_image_is_held_as_one_that_is_known(backbone):
    examples = images(2)

    assert probe.class_strength(untrained(backbone), fitting.unit_views(examples), examples.labels)[2] == 1.0


def test_longer_weights_move_less(backbone):
    texts = untrained(backbone).weights
    short, long = (F.cosine_similarity(built(backbone, probe, length=length, penalty="none").weights, texts).mean()
                   for length in (1.0, 10.0))  # fmt: skip

    assert short < long < 1


def test_the_penalty_holds_the_probe_nearer_to_the_texts(backbone):
    texts = untrained(backbone).weights
    held, free = (F.cosine_similarity(built(backbone, probe, penalty=penalty).weights, texts).mean()
                  for penalty in ("class_adaptive", "none"))  # fmt: skip

    assert free < held < 1


# Tip-Adapter


def test_tip_adapter_is_zero_shot_and_its_memory(backbone):
    examples = images(6, views=2)
    found = built(backbone, tip_adapter, examples, alpha=2.0, beta=3.0).logits(ASKED)

    keys = unit(torch.from_numpy(unit(examples.features).mean(axis=1)))
    near = np.exp(-3.0 * (1 - unit(ASKED) @ keys.T))
    expected = 2.0 * near @ np.eye(3)[examples.labels.numpy()]
    expected += backbone.logit_scale * unit(ASKED) @ untrained(backbone).weights.double().numpy().T

    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_tip_adapter_at_alpha_0_is_zero_shot(backbone):
    assert torch.equal(built(backbone, tip_adapter, alpha=0.0).logits(ASKED), untrained(backbone).logits(ASKED))


def test_learned_keys_answer_the_examples_better(backbone):
    still, learned = (built(backbone, tip_adapter, fine_tune=fine_tune, epochs=30, learning_rate=0.02)
                      for fine_tune in (False, True))  # fmt: skip

    examples = images().features[:, 0], images().labels
    assert learned.loss(*examples)[0] < still.loss(*examples)[0]
    assert not torch.equal(learned.keys, still.keys)


@pytest.mark.parametrize("options", [{}, {"alpha": 2.0}, {"beta": 3.0}, {"fine_tune": True, "epochs": 2}])
def test_no_other_alpha_and_beta_of_the_grid_answer_validation_better(backbone, options):
    watched = CachedFeatures(images(9).features, torch.tensor([0, 0, 1, 2, 1, 2, 0, 1, 2]))
    found = built(backbone, tip_adapter, validation=watched, **options)

    chosen = found.alpha.item(), found.beta.item()
    right = {}
    for alpha in (tip_adapter.ALPHAS if "alpha" not in options else [2.0]):
        for beta in (tip_adapter.BETAS if "beta" not in options else [3.0]):
            other = tip_adapter.TipAdapter(found.texts, found.keys, found.labels, alpha=alpha, beta=beta)
            logits = other.logits(watched.features[:, 0])
            right[alpha, beta] = ((logits.argmax(1) == watched.labels).float().mean().item(),
                                  -F.cross_entropy(logits.double(), watched.labels).item())  # fmt: skip
    best = max(right.values())
    assert right[chosen] == (best[0], pytest.approx(best[1], abs=1e-6))


def test_tip_adapter_without_validation_images_has_the_papers_alpha_and_beta(backbone):
    found = built(backbone, tip_adapter)

    assert (found.alpha.item(), found.beta.item()) == (1.0, 5.5)


def test_tip_adapter_answers_many_images_in_pieces_that_fit(backbone, monkeypatch):
    found = built(backbone, tip_adapter)
    monkeypatch.setattr(tip_adapter, "_AFFINITIES", 2 * 12)

    assert found.images_at_once == 2


# ProLIP


def before(count: int = 12, *, views: int = 2) -> CachedFeatures:
    """As wide as what comes before the tiny towers' last linear map."""
    return images(count, views=views, width=32)


@pytest.fixture(params=["flat", "flat-resnet-quickgelu", "no last map"])
def moved(request, zoo, backbone):
    """A backbone with what ProLIP learns from on it: (n, views, p), h and W0 as its paper has them, and a bias."""
    if request.param == "no last map":
        plain = dataclasses.replace(backbone, projection=None)
        return plain, images(), torch.from_numpy(unit(images().features)), torch.eye(24).double(), torch.zeros(24)
    its = zoo.backbone(request.param)
    weight, bias = its.projection.weight, its.projection.bias
    examples = images(width=len(weight))
    return its, examples, examples.features.double(), weight.double(), torch.zeros(24) if bias is None else bias


def test_prolip_without_a_step_is_zero_shot(moved):
    backbone, examples, *_ = moved
    found = built(backbone, prolip, examples, steps=0).logits(examples.features[:, 0])

    expected = untrained(backbone).logits(backbone.project(examples.features[:, 0]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_heavy_penalty_leaves_prolip_at_zero_shot(moved):
    backbone, examples, *_ = moved
    found = built(backbone, prolip, examples, penalty=1e9, learning_rate=1e-5).logits(examples.features[:, 0])

    expected = untrained(backbone).logits(backbone.project(examples.features[:, 0]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)


def test_prolip_is_adam_on_the_objective_of_its_paper_from_the_pretrained_map_on(moved):
    """One view, so that nothing is drawn; W itself is learned, in float64, and the penalty is part of the loss."""
    backbone, examples, h, start, bias = moved
    h, texts = h[:, 0], untrained(backbone)
    one_view = CachedFeatures(examples.features[:, :1], examples.labels)
    change = built(backbone, prolip, one_view, penalty=0.3, learning_rate=0.003, steps=40).change

    weight = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([weight], lr=0.003)
    for step in range(40):
        adam.param_groups[0]["lr"] = 0.003 * 0.5 * (1 + math.cos(math.pi * step / 40))
        logits = texts.scale * F.normalize(h @ weight + bias.double(), dim=-1) @ texts.weights.double().T
        loss = F.cross_entropy(logits, examples.labels) + 0.3 * (weight - start).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    expected = (weight - start).detach().float()
    assert (change - expected).norm() <= 1e-3 * expected.norm()


def test_prolip_answers_by_the_map_that_it_learned(moved):
    backbone, examples, h, start, bias = moved
    found = built(backbone, prolip, examples, learning_rate=0.01)

    texts = untrained(backbone)
    mapped = F.normalize(h[:, 0] @ (start + found.change.double()) + bias.double(), dim=-1)
    expected = texts.scale * mapped @ texts.weights.double().T
    torch.testing.assert_close(found.logits(examples.features[:, 0]), expected.float(), rtol=0, atol=1e-4)
    assert not torch.equal(found.change, torch.zeros_like(found.change))


def test_prolip_takes_the_papers_rate_where_there_is_a_map_and_ten_times_that_where_there_is_none(moved):
    backbone, examples, *_ = moved
    rate = 1e-4 if backbone.projection is None else 1e-5
    given, stated = (built(backbone, prolip, examples, learning_rate=rate).change for rate in (rate, None))

    assert torch.equal(given, stated)


def test_prolip_says_where_the_tower_has_no_last_map(moved, caplog):
    backbone, examples, *_ = moved
    with caplog.at_level(logging.INFO):
        built(backbone, prolip, examples, steps=0)

    assert ("has no last linear map" in caplog.text) == (backbone.projection is None)


def test_a_map_that_was_learned_on_features_is_refused_where_there_is_one_before_them(backbone, zoo, tmp_path):
    params = toy_params(zoo.architecture("flat"), method={"name": "prolip"})
    plain = dataclasses.replace(backbone, projection=None)
    artifact = kept(*training_of(params, plain), plain, tmp_path / "prompt")

    with pytest.raises(ArtifactError, match=r"holds \{'change': \(24, 24\)\}, but the method expects .*32, 24"):
        answerer(artifact, backbone=backbone)


def test_the_penalty_of_prolip_is_one_over_the_shots(backbone):
    assert prolip.shots_of(torch.tensor([0] * 4 + [1] * 4 + [2] * 9)) == 4
    given, counted = (built(backbone, prolip, before(), penalty=penalty, learning_rate=0.01).change
                      for penalty in (1 / 4, None))  # fmt: skip

    assert torch.equal(given, counted)


# All of them


def test_a_loss_that_is_no_number_is_told(backbone):
    with pytest.raises(TrainingError, match=r"the loss of probe became (nan|inf) in step .*: lower method\."):
        built(backbone, probe, learning_rate=100.0)


def test_the_rate_warms_up_and_falls_to_nothing_by_a_cosine():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser, rates = torch.optim.SGD([weight], lr=0.5), []

    def loss(rows: Tensor, views: Tensor) -> Tensor:
        rates.append(optimiser.param_groups[0]["lr"])
        return weight.sum()

    fitting.descend(optimiser, loss, [(torch.zeros(1), torch.zeros(1))] * 6, steps=6, warmup=2, method="toy")

    assert rates == pytest.approx([1e-5, 1e-5, 0.5, 0.5 * (1 + 0.5**0.5) / 2, 0.25, 0.5 * (1 - 0.5**0.5) / 2])


@pytest.mark.parametrize("name", HEADS)
def test_what_is_drawn_comes_from_the_generator_alone(backbone, name):
    options = {"probe": {"batch_size": 5, "epochs": 20}, "tip_adapter": {"fine_tune": True, "batch_size": 5},
               "prolip": {"learning_rate": 0.01, "steps": 20}}.get(name, {})  # fmt: skip
    first, again, other = (
        built(backbone, HEADS[name], generator=torch.Generator().manual_seed(seed), **options).state_dict()
        for seed in (1, 1, 2)
    )

    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert name == "gda" or any(not torch.equal(value, other[key]) for key, value in first.items())


@pytest.mark.parametrize("tower", ["siglip", "coca"])
def test_heads_work_on_text_towers_that_take_no_prompts(zoo, tower):
    backbone = zoo.backbone(tower)
    for name in HEADS:
        learned = built(backbone, HEADS[name])
        again = built(backbone, HEADS[name], state=learned.state_dict())
        again.load_state_dict(learned.state_dict())
        asked = images(9, width=width_read(name, backbone)).features[:, 0]
        assert torch.equal(again.logits(asked), learned.logits(asked))


@pytest.mark.parametrize("name", ["gda", "class_mean"])
def test_a_head_of_class_means_refuses_a_class_without_an_image(backbone, name):
    with pytest.raises(TrainingError, match=f"{name} needs an image of each class, but label 2 has none"):
        built(backbone, load_method(name), images(2))


def test_a_long_fit_says_where_it_is(backbone, caplog, monkeypatch):
    monkeypatch.setattr(fitting, "_SECONDS_A_LINE", 0.0)
    with caplog.at_level(logging.INFO):
        built(backbone, prolip, steps=3)

        built(backbone, load_method("linear_probe"))

    assert "prolip: 2 of 3 steps" in caplog.text
    assert "linear_probe: 1 of 1 fits" in caplog.text


def test_every_image_is_drawn_once_an_epoch_in_a_view_it_has():
    examples = images(7, views=3)
    batches = list(fitting.draw_batches(examples, size=3, epochs=2, generator=torch.Generator().manual_seed(0)))

    assert len(batches) == 2 * fitting.batches_an_epoch(examples, size=3)
    rows, views = (torch.cat(its) for its in zip(*batches, strict=True))
    assert sorted(rows[:7].tolist()) == sorted(rows[7:].tolist()) == list(range(7))
    assert set(views.tolist()) <= {0, 1, 2}


def test_of_equally_right_choices_the_surer_one_wins():
    right = torch.tensor([[2.0, 0.0], [0.0, 2.0]])

    assert fitting.best_choice([("a", right), ("b", 2 * right), ("c", -right)], torch.tensor([0, 1])) == "b"
