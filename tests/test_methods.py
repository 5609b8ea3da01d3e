"""Every method: trained, kept, built again and asked; and those that are built from examples, in no step at all."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F
from toy_params import toy_params
from toy_split import toy_split

from coop_core.answering import answer_with, answerer
from coop_core.artifact import read_artifact, restore_learner, write_artifact
from coop_core.card import make_card
from coop_core.errors import ArtifactError, TrainingError
from coop_core.features.examples import CachedFeatures
from coop_core.judging.baselines import linear_probe, prompt_ensemble
from coop_core.methods import Task, class_mean, load_method, method_names, zero_shot
from coop_core.methods import linear_probe as probe_method
from coop_core.methods.learner import ContextParams
from coop_core.preparing import prepare
from coop_core.prompts.engine import Engine
from coop_core.training import Checkpoint, fit

NAMES = ("cat", "sea lake", "river")
OTHERS = ["dog", "red fox"]
METHODS = [{"name": "coop", "n_context": 2}, {"name": "cocoop", "n_context": 2, "initial_words": None},
           {"name": "biomedcoop"}, {"name": "upl", "members": 2, "n_context": 2},
           {"name": "gda"}, {"name": "prolip", "learning_rate": 0.01, "penalty": 0.01}, {"name": "class_mean"},
           {"name": "linear_probe"}, {"name": "probe", "epochs": 50}, {"name": "tip_adapter"},
           {"name": "zero_shot"}]  # fmt: skip
BUILT = [method["name"] for method in METHODS
         if not issubclass(load_method(method["name"]).Params, ContextParams | zero_shot.Params)]  # fmt: skip
"""Of methods that are finished when they are built from examples."""
OWN_CLASSES = ("class_mean", "linear_probe", "probe", "tip_adapter")
"""Of methods that know their own classes alone."""


def images(count: int = 12, *, views: int = 2, width: int = 24) -> CachedFeatures:
    """Features around one direction a class, in the tiny backbones' joint space or before it."""
    drawn = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % len(NAMES)
    centres = torch.randn(len(NAMES), width, generator=drawn)
    features = centres[labels][:, None] + 0.3 * torch.randn(count, views, width, generator=drawn)
    return CachedFeatures(3 * features, labels)


def width_read(name: str, backbone: Any) -> int:
    """Of what a method reads."""
    is_before = load_method(name).Params.reads == "unprojected" and backbone.projection
    return backbone.projection.weight.shape[0] if is_before else 24


@pytest.fixture
def trained(backbone, zoo):
    """A method's training and its curve."""

    def train(method: dict[str, Any], **options: Any) -> Any:
        split = {"unlabelled": "all"} if method["name"] == "upl" else {}
        params = toy_params(zoo.architecture("flat"), method=method, train={"epochs": 6}, split=split)
        return training_of(params, backbone, **options)

    return train


def training_of(params: Any, backbone: Any, *, fitted: bool = True, **options: Any) -> Any:
    width = width_read(params.method.name, backbone)
    training = prepare(params, split=toy_split(NAMES), backbone=backbone, examples=images(width=width),
                       validation=images(6, width=width), **options)  # fmt: skip
    return params, training, fit(training) if fitted else []


def kept(params: Any, training: Any, curve: Any, backbone: Any, folder: Any) -> Any:
    card = make_card(
        learner=training.learner, method=params.method, backbone=backbone, split=toy_split(NAMES), shots=2,
        params={}, curve=[], code_revision="abc",
    )  # fmt: skip
    write_artifact(folder, training.learner, card)
    return read_artifact(folder)


def test_every_method_is_tried_here():
    """But those that read pixels, which are tried in files of their own."""
    reading = [name for name in method_names() if load_method(name).Params.reads != "pixels"]
    assert sorted(method["name"] for method in METHODS) == reading


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_a_kept_method_answers_as_the_trained_one(trained, backbone, tmp_path, method):
    params, training, curve = trained(method)
    features = images(9, width=width_read(method["name"], backbone)).features[:, 0]
    artifact = kept(params, training, curve, backbone, tmp_path / "prompt")

    own = answer_with(training.learner, class_names=NAMES).probabilities(features)

    assert torch.equal(answerer(artifact, backbone=backbone).probabilities(features), own)
    restored = restore_learner(artifact, backbone)
    torch.testing.assert_close(restored.logits(features), training.learner.logits(features))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_a_method_learns_what_the_images_show(trained, method):
    curve = trained(method)[2]

    assert curve[-1].loss <= curve[0].loss
    if method["name"] in BUILT:
        assert curve[-1].val_accuracy == 1.0


@pytest.mark.parametrize("name", BUILT)
def test_a_method_that_is_built_from_examples_has_one_row_of_curve_and_no_step(trained, name):
    _, training, curve = trained({"name": name})

    assert [row.epoch for row in curve] == [0]
    assert list(training.learner.parameters()) == []


@pytest.mark.parametrize("name", BUILT)
def test_a_method_that_is_built_from_examples_says_so_without_any(backbone, name):
    module = load_method(name)

    with pytest.raises(TrainingError, match=f"{name} is built from examples, and there are none"):
        module.build(module.Params(), backbone=backbone, task=Task(NAMES, "a {}."))


@pytest.mark.parametrize(
    "method",
    [*(method for method in METHODS if method["name"] in OWN_CLASSES),
     {"name": "coop", "n_context": 2, "class_specific": True}],
    ids=lambda method: method["name"],
)  # fmt: skip
def test_what_was_learned_of_its_own_classes_is_not_used_with_others(trained, backbone, tmp_path, method):
    artifact = kept(*trained(method), backbone, tmp_path / "prompt")

    with pytest.raises(ArtifactError, match="something of its own for each of cat, sea lake, river"):
        answerer(artifact, backbone=backbone, class_names=OTHERS)


@pytest.mark.parametrize(
    "method", [method for method in METHODS if method["name"] not in OWN_CLASSES], ids=lambda method: method["name"]
)
def test_what_is_not_of_its_own_classes_is_used_with_others(trained, backbone, tmp_path, method):
    artifact = kept(*trained(method), backbone, tmp_path / "prompt")

    features = images(5, width=width_read(method["name"], backbone)).features[:, 0]
    found = answerer(artifact, backbone=backbone, class_names=OTHERS).probabilities(features)

    assert found.shape == (5, 2)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(5))


def test_class_mean_is_the_mean_of_unit_features_of_all_views(backbone):
    examples = images(9, views=3)

    found = class_mean.build(class_mean.Params(), backbone=backbone, task=Task(NAMES, "a {}."), examples=examples)

    unit = F.normalize(examples.features, dim=-1)
    means = torch.stack([unit[examples.labels == label].flatten(0, 1).mean(dim=0) for label in range(3)])
    torch.testing.assert_close(found.classifier().weights, F.normalize(means, dim=-1))


def test_class_mean_refuses_a_class_without_an_image(backbone):
    with pytest.raises(TrainingError, match="needs an image of each class, but label 1 has none"):
        class_mean.build(class_mean.Params(), backbone=backbone, task=Task(NAMES, "a {}."), examples=images(1))


def test_the_linear_probe_is_the_baseline_of_that_name(backbone):
    examples, watched = images(), images(6)

    found = probe_method.build(
        probe_method.Params(), backbone=backbone, task=Task(NAMES, "a {}."), examples=examples, validation=watched
    )

    expected = linear_probe(*arrays(examples), *arrays(watched)).classifier
    assert torch.equal(found.classifier().weights, expected.weights)


@pytest.mark.parametrize("own", [True, False])
def test_zero_shot_is_the_baseline_of_its_templates(backbone, own):
    texts = ["a {}.", "this is a {}."]
    params = zero_shot.Params(templates=texts, own_template=own)
    found = zero_shot.build(params, backbone=backbone, task=Task(NAMES, "a photo of a {}."))

    expected = prompt_ensemble(backbone, NAMES, texts, own_template="a photo of a {}." if own else texts[0])
    assert torch.equal(found.classifier().weights, expected.weights)
    assert list(found.state_dict()) == []


@pytest.mark.parametrize(
    ("params", "sentence"),
    [({"templates": ["a photo"]}, r"each template needs exactly one \{\}, unlike \['a photo'\]"),
     ({"own_template": False}, "own_template can be false only with templates")],
)  # fmt: skip
def test_zero_shot_needs_a_template_with_a_hole(params, sentence):
    with pytest.raises(ValidationError, match=sentence):
        zero_shot.Params(**params)


def arrays(examples: CachedFeatures) -> tuple[np.ndarray, np.ndarray]:
    return examples.features[:, 0].numpy(), examples.labels.numpy()


# CoCoOp


@pytest.mark.parametrize("tower", ["flat", "bert-mean-linear"])
@pytest.mark.parametrize("limit", [None, 60_000], ids=["at once", "in pieces"])
def test_a_batch_of_cocoop_is_its_images_one_by_one(zoo, relative_error, tower, limit):
    backbone = zoo.backbone(tower)
    params = toy_params(zoo.architecture(tower), method=METHODS[1])
    examples = images(4, views=1)
    engines = (Engine(max_memory=limit), Engine())

    def gradients(engine: Engine, batches: list[Tensor]) -> list[Tensor]:
        learner = prepare(params, split=toy_split(NAMES), backbone=backbone, examples=examples, engine=engine).learner
        for rows in batches:
            loss, _ = learner.loss(examples.features[rows, 0], examples.labels[rows])
            (loss * len(rows) / len(examples.labels)).backward()
        return [parameter.grad for parameter in learner.parameters()]

    together = gradients(engines[0], [torch.arange(4)])
    one_by_one = gradients(engines[1], [torch.tensor([i]) for i in range(4)])

    assert max(map(relative_error, together, one_by_one)) <= 1e-4


def test_cocoop_answers_a_few_images_at_a_time_where_memory_is_short(backbone, zoo):
    params = toy_params(zoo.architecture("flat"), method=METHODS[1])
    roomy, short = (
        prepare(params, split=toy_split(NAMES), backbone=backbone, examples=images(), engine=engine).learner
        for engine in (Engine(), Engine(max_memory=100_000))
    )

    assert short.images_at_once < 12 < roomy.images_at_once
    few, all_at_once = (answer_with(one, class_names=NAMES).probabilities(images().features[:, 0])
                        for one in (short, roomy))  # fmt: skip
    torch.testing.assert_close(few, all_at_once)


def test_an_answer_of_cocoop_costs_a_prompt_a_class_and_a_collapsed_one_none(trained):
    prompts = {method["name"]: answer_with(trained(method)[1].learner, class_names=NAMES).prompts_per_image
               for method in METHODS}  # fmt: skip

    assert prompts == {method["name"]: 3 if method["name"] == "cocoop" else 0 for method in METHODS}


def test_cocoop_goes_on_from_its_checkpoint_to_equal_bytes(trained, tmp_path):
    class Stopped(Exception):  # noqa: N818
        pass

    def stop(epoch: Any) -> None:
        if epoch.epoch == 3:
            raise Stopped

    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", "key", every_seconds=0)
    with pytest.raises(Stopped):
        trained(METHODS[1], checkpoint=checkpoint, on_epoch=stop)

    _, resumed, _ = trained(METHODS[1], checkpoint=checkpoint)

    _, whole, _ = trained(METHODS[1])
    state = whole.learner.state_dict()
    assert sorted(state) == ["context_vectors", "meta.linear1.bias", "meta.linear1.weight", "meta.linear2.bias",
                             "meta.linear2.weight"]  # fmt: skip
    assert all(torch.equal(value, resumed.learner.state_dict()[name]) for name, value in state.items())
