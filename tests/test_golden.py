"""CoOp and CoCoOp against the numbers that their papers' own code computes on the same weights (tests/golden)."""

import functools
import itertools
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_weights import CLASS_NAMES, JOINT, WIDTH, clip_weights, draw, draw_labels, write_clip
from torch import Tensor, nn

from coop_core.backbone import Backbone, load_backbone
from coop_core.features.examples import CachedFeatures
from coop_core.methods import Task, cocoop, coop
from coop_core.methods.learner import logits_in_pieces
from coop_core.params import TrainParams
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import build_layout
from coop_core.training import Epoch, Training, fit, fit_together, generator_for

ENGINES = {f"{path}{how}": Engine(path, max_memory=memory)
           for path in ("packed", "cut", "full") for how, memory in (("", None), (" in pieces", 1))}  # fmt: skip
POSITIONS = ("end", "middle", "front")
TASK = Task(CLASS_NAMES, "a photo of a {}.")
RECIPE = TrainParams(epochs=3, batch_size=3, learning_rate=0.002)
META = {"meta.linear1.weight": draw("meta.linear1.weight", 4, JOINT, std=0.5),
        "meta.linear1.bias": draw("meta.linear1.bias", 4, std=0.1, mean=0.4),
        "meta.linear2.weight": draw("meta.linear2.weight", WIDTH, 4, std=0.02),
        "meta.linear2.bias": draw("meta.linear2.bias", WIDTH, std=0.005)}  # fmt: skip


def read(method: str) -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / f"golden/{method}.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


COOP, COCOOP = read("coop"), read("cocoop")
LABELS = COOP["labels"]


def assert_close(found: Any, expected: Tensor, *, of: str = "") -> None:
    """The largest difference against the largest number; sums over the meta-net's few hidden units round more."""
    found = torch.as_tensor(found, dtype=torch.float64)
    assert found.shape == expected.shape, of
    error = (found - expected).abs().max() / expected.abs().max()
    assert error.item() < (5e-5 if "linear1" in of else 2e-5), of


@pytest.fixture(scope="session")
def clip(open_clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(write_clip(tmp_path_factory.mktemp("golden")), None)


@pytest.fixture(scope="session")
def features(clip: Backbone) -> Tensor:
    """(6, d)"""
    return clip.encode_images(COOP["images"])


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Every way through the text tower in turn, at once and a prompt at a time."""
    return ENGINES[request.param]


@pytest.fixture(params=["packed", "cut", "full", "packed in pieces"])
def training_engine(request: pytest.FixtureRequest) -> Engine:
    """Fewer, because a training repeats the same pass."""
    return ENGINES[request.param]


def coop_learner(clip: Backbone, engine: Engine | None = None, **params: Any) -> coop.CoOp:
    """On the context that the reference started from."""
    learner = coop.build(coop.Params(n_context=4, **params), backbone=clip, task=TASK, engine=engine,
                         generator=torch.Generator())  # fmt: skip
    learner.load_state_dict({"context_vectors": draw("context", *learner.context_vectors.shape, std=0.02)})
    return learner


def cocoop_learner(clip: Backbone, engine: Engine | None = None) -> cocoop.CoCoOp:
    """On the words and the meta-net that the reference started from."""
    learner = cocoop.build(cocoop.Params(), backbone=clip, task=TASK, engine=engine, generator=torch.Generator())
    learner.load_state_dict({"context_vectors": learner.context_vectors, **META})
    return learner


class Noting(nn.Module):
    """A learner that notes the loss of every step."""

    def __init__(self, learner: Any) -> None:
        super().__init__()
        self.learner, self.losses = learner, []

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = self.learner.loss(images, labels)
        self.losses.append(loss.item())
        return loss, logits


@functools.cache
def seed_of_order(images: int, *, batch_size: int, epochs: int) -> int:
    """The first seed by which training draws, in every epoch, the batches in the images' own order."""
    wanted = torch.arange(images).split(batch_size)
    for seed in itertools.count():
        order = generator_for(seed, "batches")
        for _ in range(epochs):
            drawn = torch.randperm(images, generator=order).split(batch_size)
            if any(not torch.equal(some.sort().values, batch) for some, batch in zip(drawn, wanted, strict=True)):
                break
            torch.randint(1, (images,), generator=order)  # the views
        else:
            return seed
    raise AssertionError


def test_the_weights_are_those_of_the_reference() -> None:
    weights = clip_weights()
    assert (len(weights), sum(tensor.numel() for tensor in weights.values())) == (86, 8_325_313)
    assert zlib.crc32(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))) == 475394773


@pytest.mark.parametrize("arrays", [COOP, COCOOP], ids=["coop", "cocoop"])
def test_images_and_labels_are_those_of_the_reference(arrays: dict[str, Tensor]) -> None:
    assert torch.equal(draw("images", 6, 3, 32, 32), arrays["images"])
    assert torch.equal(draw_labels(6), arrays["labels"])


def test_the_meta_net_starts_as_that_of_the_reference() -> None:
    for name, tensor in META.items():
        assert torch.equal(tensor, COCOOP[f"start.{name}"])


def test_image_features_are_those_of_the_reference(features: Tensor) -> None:
    assert_close(features, COOP["image_features"])


@pytest.mark.parametrize("initial_words", [None, "a photo of a"])
def test_token_ids_are_those_of_the_reference(clip: Backbone, initial_words: str | None) -> None:
    expected = COOP["m4.token_ids"] if initial_words is None else COCOOP["words.token_ids"]
    layout = build_layout(clip.text_tower, CLASS_NAMES, n_context=4, initial_words=initial_words)
    assert torch.equal(layout.token_ids, expected.long())


def test_a_name_has_as_many_tokens_as_in_the_reference(clip: Backbone) -> None:
    """Read off the layout where the context follows the name."""
    layout = build_layout(clip.text_tower, CLASS_NAMES, n_context=4, position="front")
    assert torch.equal(layout.context_rows[:, 0] - 1, COOP["name_lengths"])


@pytest.mark.parametrize("sharing", ["shared", "specific"])
@pytest.mark.parametrize("position", POSITIONS)
def test_coop_has_the_logits_loss_and_gradient_of_the_reference(
    clip: Backbone, features: Tensor, engine: Engine, position: str, sharing: str
) -> None:
    learner = coop_learner(clip, engine, class_token_position=position, class_specific=sharing == "specific")
    loss, logits = learner.loss(features, LABELS)
    loss.backward()
    name = f"m4.{sharing}.{position}"
    assert_close(logits.detach(), COOP[f"{name}.logits"], of="logits")
    assert_close(loss.item(), COOP[f"{name}.loss"], of="loss")
    assert_close(learner.context_vectors.grad, COOP[f"{name}.grad.context"], of="gradient")


def test_coop_starts_from_words_as_the_reference_does(clip: Backbone, features: Tensor, engine: Engine) -> None:
    params = coop.Params(n_context=None, initial_words="a photo of a")
    learner = coop.build(params, backbone=clip, task=TASK, engine=engine, generator=torch.Generator())
    assert torch.equal(learner.context_vectors.detach(), COOP["words.context"])
    assert_close(learner.logits(features).detach(), COOP["words.logits"])


def test_coop_is_trained_as_by_the_reference(clip: Backbone, features: Tensor, training_engine: Engine) -> None:
    learner, contexts = Noting(coop_learner(clip, training_engine)), []

    def note(epoch: Epoch) -> None:
        contexts.append(learner.learner.context_vectors.detach().clone())

    examples = CachedFeatures(features[:, None], LABELS)
    seed = seed_of_order(6, batch_size=3, epochs=3)
    curve = fit(Training(learner, examples, RECIPE, seed, on_epoch=note))
    assert_close(learner.losses, COOP["run.losses"], of="losses")
    assert_close([epoch.learning_rate for epoch in curve], COOP["run.learning_rates"], of="learning rates")
    assert_close(torch.stack(contexts), COOP["run.contexts"], of="contexts")


def test_coop_is_trained_beside_another_as_by_the_reference(clip: Backbone, features: Tensor) -> None:
    examples, seed = CachedFeatures(features[:, None], LABELS), seed_of_order(6, batch_size=3, epochs=3)
    learners = [coop_learner(clip), coop_learner(clip)]
    fit_together([Training(one, examples, RECIPE, seed + i) for i, one in enumerate(learners)])
    assert_close(learners[0].context_vectors.detach(), COOP["run.contexts"][-1])


def test_cocoop_has_the_logits_of_the_reference(clip: Backbone, features: Tensor, engine: Engine) -> None:
    learner = cocoop_learner(clip, engine)
    assert torch.equal(learner.context_vectors.detach(), COCOOP["words.context"])
    assert_close(logits_in_pieces(learner, features), COCOOP["words.logits"])


@pytest.mark.parametrize(("batch", "count"), [("batch6", 6), ("first", 1)])
def test_cocoop_has_the_loss_and_gradients_of_the_reference(
    clip: Backbone, features: Tensor, engine: Engine, batch: str, count: int
) -> None:
    learner = cocoop_learner(clip, engine)
    loss, _ = learner.loss(features[:count], LABELS[:count])
    loss.backward()
    assert_close(loss.item(), COCOOP[f"words.{batch}.loss"], of="loss")
    assert_close(learner.context_vectors.grad, COCOOP[f"words.{batch}.grad.context"], of="context")
    for name in META:
        assert_close(learner.get_parameter(name).grad, COCOOP[f"words.{batch}.grad.{name}"], of=name)


def test_cocoop_is_trained_as_by_the_reference(clip: Backbone, features: Tensor, training_engine: Engine) -> None:
    learner = Noting(cocoop_learner(clip, training_engine))
    examples = CachedFeatures(features[:3, None], LABELS[:3])
    seed = seed_of_order(3, batch_size=1, epochs=3)
    fit(Training(learner, examples, RECIPE.model_copy(update={"batch_size": 1}), seed))
    assert_close(learner.losses, COCOOP["run.losses"], of="losses")
    assert_close(learner.learner.context_vectors.detach(), COCOOP["run.context"], of="context")
    for name in META:
        assert_close(learner.learner.get_parameter(name).detach(), COCOOP[f"run.{name}"], of=name)
