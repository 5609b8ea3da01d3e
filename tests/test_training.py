"""Training: the published schedule, frozen towers, and the same result after any interruption."""

import pytest
import torch
from torch import Tensor, nn

from coop_core import training
from coop_core.backbone import digest_tensors
from coop_core.errors import TrainingError
from coop_core.features.examples import CachedFeatures
from coop_core.judging.baselines import zero_shot
from coop_core.methods import Task, coop
from coop_core.methods.learner import FeatureLearner
from coop_core.params import TrainParams
from coop_core.training import Checkpoint, Epoch, Training, fit_together, generator_for, learning_rate_at

NAMES = ("cat", "annual crop land", "river")
TASK = Task(NAMES, "a photo of a {}.")
RECIPE = TrainParams(epochs=6, batch_size=4, learning_rate=0.02)
STOPS = range(RECIPE.epochs)


def fit(
    learner: nn.Module, features: Tensor, labels: Tensor, *, validation: tuple[Tensor, Tensor] | None = None, **options
) -> list[Epoch]:
    """On features (n, views, d); validation likewise."""
    watched = None if validation is None else CachedFeatures(*validation)
    return training.fit(Training(learner, CachedFeatures(features, labels), validation=watched, **options))


class Counting(FeatureLearner):
    """A linear learner that remembers what it was asked."""

    def __init__(self, width: int, *, broken_from: int | None = None) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(len(NAMES), width))
        self.asked: list[Tensor] = []
        self.broken_from = broken_from

    def logits(self, features: Tensor) -> Tensor:
        self.asked.append(features)
        logits = features @ self.weights.T
        return logits * float("nan") if self.broken_from and len(self.asked) >= self.broken_from else logits


class Interrupted(Exception):  # noqa: N818
    pass


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """L2-normalised features (10, 2, 24) in the tiny backbone's joint space, and labels."""
    features = torch.randn(10, 2, 24, generator=torch.Generator().manual_seed(0))
    return nn.functional.normalize(features, dim=-1), torch.arange(10) % len(NAMES)


@pytest.fixture
def learner(backbone):
    """A fresh learner at every call."""

    def build(**params) -> coop.CoOp:
        settings = {"n_context": 2, **params}
        return coop.build(
            coop.Params(**settings), backbone=backbone, task=TASK, generator=generator_for(0, "context")
        )

    return build


@pytest.mark.parametrize(
    ("epochs", "first", "second", "third", "last"),
    [
        (10, 1e-5, 2.000000e-3, 1.951057e-3, 1.909830e-4),
        (50, 1e-5, 2.000000e-3, 1.998027e-3, 7.885299e-6),
        (100, 1e-5, 2.000000e-3, 1.999507e-3, 1.973272e-6),
        (200, 1e-5, 2.000000e-3, 1.999877e-3, 4.934396e-7),
    ],
)
def test_learning_rates_are_the_published_ones(epochs, first, second, third, last):
    recipe = TrainParams(epochs=epochs, learning_rate=2e-3)

    rates = [learning_rate_at(epoch, recipe) for epoch in (0, 1, 2, epochs - 1)]

    assert rates == pytest.approx([first, second, third, last], abs=1e-9, rel=0)


def test_the_fourth_learning_rate_of_fifty_is_that_of_the_published_log():
    assert learning_rate_at(3, TrainParams(epochs=50, learning_rate=2e-3)) == pytest.approx(1.992115e-3, abs=1e-9)


def test_without_warm_up_the_cosine_starts_at_once():
    assert learning_rate_at(0, TrainParams(epochs=10, learning_rate=2e-3, warmup_epochs=0)) == 2e-3


def test_the_curve_records_the_learning_rate_each_epoch_ran_at(learner, images):
    curve = fit(learner(), *images, recipe=RECIPE, seed=0)

    assert [row.learning_rate for row in curve] == [learning_rate_at(epoch, RECIPE) for epoch in range(6)]


def test_words_that_never_learn_answer_as_the_zero_shot_baseline(backbone, learner, images):
    features, labels = images
    still = TrainParams(epochs=2, learning_rate=0, warmup_learning_rate=0, weight_decay=0)
    trained = learner(n_context=None, initial_words="a photo of a")

    fit(trained, features, labels, recipe=still, seed=0)

    expected = zero_shot(backbone, NAMES, "a photo of a {}.").logits(features[:, 0])
    torch.testing.assert_close(trained.logits(features[:, 0]).detach(), expected, atol=1e-5, rtol=1e-5)


def test_a_learning_rate_of_zero_leaves_the_context_as_it_was(learner, images):
    trained = learner()

    fit(trained, *images, recipe=TrainParams(epochs=2, learning_rate=0, warmup_learning_rate=0), seed=0)

    assert torch.equal(trained.context_vectors, learner().context_vectors)


def test_training_moves_the_context(learner, images):
    trained = learner()

    fit(trained, *images, recipe=RECIPE, seed=0)

    assert not torch.equal(trained.context_vectors, learner().context_vectors)


def test_training_lowers_the_loss(learner, images):
    curve = fit(learner(), *images, recipe=TrainParams(epochs=15, batch_size=10, learning_rate=0.1), seed=0)

    assert curve[-1].loss < curve[0].loss


def test_frozen_weights_are_bit_identical_after_training(backbone, learner, images):
    before = digest_tensors(backbone.load_weights())

    fit(learner(), *images, recipe=RECIPE, seed=0)

    assert digest_tensors(backbone.load_weights()) == before


def test_putting_a_learner_in_training_mode_leaves_its_tower_out(zoo):
    """The encoder drops out one value in ten when it trains."""
    backbone = zoo.backbone("bert-mean-linear")
    learner = coop.build(
        coop.Params(n_context=2), backbone=backbone, task=TASK, generator=generator_for(0, "context")
    )

    learner.train()

    assert not any(part.training for part in backbone.text_tower.encoder.modules())


def test_only_the_context_is_learned(learner):
    assert list(learner().state_dict()) == ["context_vectors"]


def test_one_step_is_torchs_sgd_on_the_mean_cross_entropy(images):
    features, labels = images
    trained, expected = Counting(24), nn.Parameter(torch.zeros(3, 24))
    recipe = TrainParams(epochs=1, batch_size=32, learning_rate=0.5, warmup_epochs=0, weight_decay=0.1)

    fit(trained, features[:, :1], labels, recipe=recipe, seed=0)

    nn.functional.cross_entropy(features[:, 0] @ expected.T, labels).backward()
    torch.optim.SGD([expected], lr=0.5, momentum=0.9, weight_decay=0.1).step()
    torch.testing.assert_close(trained.weights, expected)


@pytest.mark.parametrize("class_specific", [False, True])
def test_the_same_seed_gives_the_same_result_bit_for_bit(learner, images, class_specific):
    first, second = learner(class_specific=class_specific), learner(class_specific=class_specific)

    first_curve = fit(first, *images, recipe=RECIPE, seed=1)
    torch.randn(7)
    second_curve = fit(second, *images, recipe=RECIPE, seed=1)

    assert torch.equal(first.context_vectors, second.context_vectors)
    assert first_curve == second_curve


def test_another_seed_gives_another_result(learner, images):
    first, second = learner(), learner()

    fit(first, *images, recipe=RECIPE, seed=1)
    fit(second, *images, recipe=RECIPE, seed=2)

    assert not torch.equal(first.context_vectors, second.context_vectors)


def test_training_leaves_torchs_global_random_state_alone(learner, images):
    before = torch.get_rng_state()

    fit(learner(), *images, recipe=RECIPE, seed=1)

    assert torch.equal(torch.get_rng_state(), before)


def test_generators_of_other_purposes_draw_other_numbers():
    first, second = (torch.rand(4, generator=generator_for(0, purpose)) for purpose in ("batches", "context"))

    assert not torch.equal(first, second)


@pytest.mark.parametrize("stop", STOPS)
def test_training_interrupted_at_any_epoch_ends_as_uninterrupted(learner, images, tmp_path, stop):
    features, labels = images
    validation = {"validation": (features[:3], labels[:3])}
    uninterrupted, resumed = learner(), learner()
    expected = fit(uninterrupted, features, labels, recipe=RECIPE, seed=3, **validation)
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", key="this training", every_seconds=0)

    with pytest.raises(Interrupted, match=f"at {stop}"):
        fit(learner(), features, labels, recipe=RECIPE, seed=3, **validation, checkpoint=checkpoint,
            on_epoch=_interrupt_at(stop))  # fmt: skip
    curve = fit(resumed, features, labels, recipe=RECIPE, seed=3, **validation, checkpoint=checkpoint)

    assert torch.equal(resumed.context_vectors, uninterrupted.context_vectors)
    assert curve == expected


def test_training_interrupted_twice_ends_as_uninterrupted(learner, images, tmp_path):
    uninterrupted, resumed = learner(), learner()
    fit(uninterrupted, *images, recipe=RECIPE, seed=3)
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", key="this training", every_seconds=0)

    for stop in (2, 4):
        with pytest.raises(Interrupted, match=f"at {stop}"):
            fit(learner(), *images, recipe=RECIPE, seed=3, checkpoint=checkpoint, on_epoch=_interrupt_at(stop))
    fit(resumed, *images, recipe=RECIPE, seed=3, checkpoint=checkpoint)

    assert torch.equal(resumed.context_vectors, uninterrupted.context_vectors)


def test_resumed_training_does_only_the_epochs_that_are_left(images, tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", key="this training", every_seconds=0)
    with pytest.raises(Interrupted, match="at 4"):
        fit(Counting(24), *images, recipe=RECIPE, seed=3, checkpoint=checkpoint, on_epoch=_interrupt_at(4))
    resumed = Counting(24)

    fit(resumed, *images, recipe=RECIPE, seed=3, checkpoint=checkpoint)

    assert len(resumed.asked) == 2 * 2


def test_resumed_training_reports_the_epochs_already_done(images, tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", key="this training", every_seconds=0)
    with pytest.raises(Interrupted, match="at 4"):
        fit(Counting(24), *images, recipe=RECIPE, seed=3, checkpoint=checkpoint, on_epoch=_interrupt_at(4))
    reported: list[Epoch] = []

    fit(Counting(24), *images, recipe=RECIPE, seed=3, checkpoint=checkpoint, on_epoch=reported.append)

    assert [row.epoch for row in reported] == list(range(6))


def test_a_checkpoint_of_a_finished_training_is_its_result(images, tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", key="this training", every_seconds=0)
    first, second = Counting(24), Counting(24)
    fit(first, *images, recipe=RECIPE, seed=3, checkpoint=checkpoint)

    fit(second, *images, recipe=RECIPE, seed=3, checkpoint=checkpoint)

    assert torch.equal(second.weights, first.weights)
    assert second.asked == []


def test_no_checkpoint_is_written_before_its_time(images, tmp_path):
    fit(Counting(24), *images, recipe=RECIPE, seed=3, checkpoint=Checkpoint(tmp_path / "c", "k", every_seconds=3600))

    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_with_another_key_is_ignored(images, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    fit(Counting(24), *images, recipe=RECIPE, seed=4, checkpoint=Checkpoint(path, "another training", every_seconds=0))
    alone, beside = Counting(24), Counting(24)
    expected = fit(alone, *images, recipe=RECIPE, seed=3)

    curve = fit(beside, *images, recipe=RECIPE, seed=3, checkpoint=Checkpoint(path, "this training", every_seconds=0))

    assert torch.equal(beside.weights, alone.weights)
    assert curve == expected


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_damaged_checkpoint_is_ignored(images, tmp_path, kept):
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", key="this training", every_seconds=0)
    fit(Counting(24), *images, recipe=RECIPE, seed=3, checkpoint=checkpoint)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:kept])
    alone, beside = Counting(24), Counting(24)
    expected = fit(alone, *images, recipe=RECIPE, seed=3)

    curve = fit(beside, *images, recipe=RECIPE, seed=3, checkpoint=checkpoint)

    assert torch.equal(beside.weights, alone.weights)
    assert curve == expected


@pytest.mark.parametrize(
    ("batch_size", "batches"),
    [(32, [10]), (11, [10]), (10, [10]), (9, [9]), (5, [5, 5]), (4, [4, 4]), (3, [3, 3, 3]), (1, [1] * 10)],
)
def test_an_incomplete_last_batch_is_dropped_only_beside_a_complete_one(images, batch_size, batches):
    learner = Counting(24)

    fit(learner, *images, recipe=TrainParams(epochs=1, batch_size=batch_size, warmup_epochs=0, learning_rate=0), seed=0)

    assert [len(asked) for asked in learner.asked] == batches


def test_an_epoch_shows_no_image_twice(images):
    features, labels = images
    learner = Counting(24)

    fit(learner, features[:, :1], labels, recipe=TrainParams(epochs=1, batch_size=5, warmup_epochs=0, learning_rate=0),
        seed=0)  # fmt: skip

    shown = torch.cat(learner.asked)
    assert torch.equal(shown.unique(dim=0), features[:, 0].unique(dim=0))


def test_every_epoch_has_an_order_of_its_own(images):
    features, labels = images
    learner = Counting(24)

    fit(learner, features[:, :1], labels, recipe=TrainParams(epochs=2, batch_size=10, learning_rate=0), seed=0)

    assert not torch.equal(*learner.asked)


def test_views_are_drawn_from_all_views_image_by_image():
    views = torch.arange(4.0).view(1, 4, 1).expand(10, 4, 1)
    learner = Counting(1)

    fit(learner, views, torch.zeros(10, dtype=torch.int64), recipe=TrainParams(epochs=20, learning_rate=0), seed=0)

    drawn = torch.cat(learner.asked).flatten()
    assert drawn.unique().tolist() == [0, 1, 2, 3]
    assert drawn.long().bincount().min() > 25
    assert len(learner.asked[0].unique()) > 1


def test_a_loss_that_is_no_number_ends_training_and_names_the_epoch(images):
    with pytest.raises(TrainingError, match=r"became nan in epoch 3 at .*: lower train.learning_rate, or"):
        fit(Counting(24, broken_from=5), *images, recipe=RECIPE, seed=0)


def test_a_diverged_epoch_is_not_kept_in_the_checkpoint(images, tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", key="this training", every_seconds=0)
    with pytest.raises(TrainingError, match="in epoch 3"):
        fit(Counting(24, broken_from=5), *images, recipe=RECIPE, seed=0, checkpoint=checkpoint)
    resumed = Counting(24)

    fit(resumed, *images, recipe=RECIPE, seed=0, checkpoint=checkpoint)

    assert torch.isfinite(resumed.weights).all()


def test_without_validation_images_the_curve_has_none(images):
    curve = fit(Counting(24), *images, recipe=RECIPE, seed=0)

    assert {(row.val_loss, row.val_accuracy) for row in curve} == {(None, None)}


def test_validation_changes_nothing_that_is_learned(learner, images):
    features, labels = images
    watched, alone = learner(), learner()

    fit(watched, features, labels, recipe=RECIPE, seed=0, validation=(features[:3], labels[:3]))
    fit(alone, features, labels, recipe=RECIPE, seed=0)

    assert torch.equal(watched.context_vectors, alone.context_vectors)


def test_accuracies_of_the_curve_are_those_before_each_step(images):
    features, labels = images
    recipe = TrainParams(epochs=1, batch_size=10, warmup_epochs=0, learning_rate=0.1)

    curve = fit(Counting(24), features, labels, recipe=recipe, seed=0)

    assert curve[0].accuracy == pytest.approx((labels == 0).float().mean().item())
    assert curve[0].loss == pytest.approx(torch.tensor(3.0).log().item())


def _interrupt_at(number: int):
    def on_epoch(epoch: Epoch) -> None:
        if epoch.epoch == number:
            raise Interrupted(f"at {number}")

    return on_epoch


# Many at once


SETTINGS = [(0, 0.02, 6), (1, 0.02, 6), (2, 0.5, 6), (0, 0.1, 3)]
"""Seed, learning rate and epochs."""


def _training(learner, images, seed: int, rate: float, epochs: int, **options) -> Training:
    recipe = RECIPE.model_copy(update={"learning_rate": rate, "epochs": epochs})
    examples = CachedFeatures(*images)
    return Training(learner, examples, recipe=recipe, seed=seed, validation=examples, **options)


@pytest.mark.parametrize("class_specific", [False, True])
def test_trainings_at_once_are_each_training_alone(learner, images, relative_error, class_specific):
    together, alone = ([learner(class_specific=class_specific) for _ in SETTINGS] for _ in range(2))

    found = fit_together([_training(one, images, *each) for one, each in zip(together, SETTINGS, strict=True)])

    expected = [fit_together([_training(one, images, *each)])[0] for one, each in zip(alone, SETTINGS, strict=True)]
    assert [len(curve) for curve in found] == [epochs for _, _, epochs in SETTINGS]
    for curve, curve_alone, one, one_alone in zip(found, expected, together, alone, strict=True):
        assert [epoch.loss for epoch in curve] == pytest.approx([epoch.loss for epoch in curve_alone], rel=1e-5)
        assert [epoch.val_loss for epoch in curve] == pytest.approx([e.val_loss for e in curve_alone], rel=1e-5)
        assert relative_error(one.context_vectors.detach(), one_alone.context_vectors.detach()) <= 1e-4


def test_trainings_at_once_encode_their_prompts_in_one_pass(learner, images):
    learners = [learner() for _ in range(3)]
    asked = []
    for one in learners:
        encode = one.encoder._encoding
        one.encoder._encoding = lambda sets, deep, encode=encode: asked.append(len(sets)) or encode(sets, deep)

    fit_together([_training(one, images, 0, 0.02, 2) for one in learners])

    assert set(asked) == {3}


def test_learners_of_different_forms_train_at_once(learner, images):
    learners = [learner(), learner(n_context=3), learner(class_specific=True)]

    found = fit_together([_training(one, images, 0, 0.02, 4) for one in learners])

    alone = [fit(learner(**form), *images, recipe=RECIPE.model_copy(update={"epochs": 4}), seed=0)
             for form in ({}, {"n_context": 3}, {"class_specific": True})]  # fmt: skip
    for curve, curve_alone in zip(found, alone, strict=True):
        assert curve[-1].loss == pytest.approx(curve_alone[-1].loss, rel=1e-5)


def test_one_that_diverges_does_not_disturb_the_others(images):
    broken, whole = Counting(24, broken_from=3), Counting(24)

    failed, curve = fit_together([_training(one, images, 0, 0.02, 6) for one in (broken, whole)])

    assert isinstance(failed, TrainingError)
    assert curve == fit_together([_training(Counting(24), images, 0, 0.02, 6)])[0]


def test_an_interrupted_one_catches_up_with_the_others(learner, images, tmp_path, relative_error):
    checkpoint = Checkpoint(tmp_path / "one.safetensors", "key", every_seconds=0)

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit_together([_training(learner(), images, 1, 0.02, 6, checkpoint=checkpoint, on_epoch=stop)])
    resumed, fresh = learner(), learner()

    fit_together([_training(resumed, images, 1, 0.02, 6, checkpoint=checkpoint),
                  _training(fresh, images, 2, 0.02, 6)])  # fmt: skip

    for one, seed in ((resumed, 1), (fresh, 2)):
        expected = learner()
        fit_together([_training(expected, images, seed, 0.02, 6)])
        assert relative_error(one.context_vectors.detach(), expected.context_vectors.detach()) <= 1e-4
