"""Trials side by side: each scores what its training alone scores, and one that cannot be done disturbs no other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from toy_dataset import toy_dataset
from toy_params import toy_params

from coop_core.data.dataset import Dataset
from coop_core.errors import BackboneError, PromptError, SplitError, TrainingError
from coop_core.params import Params
from coop_core.prompts import engine
from coop_core.prompts.engine import Engine
from coop_core.sweeps.trials import Scores, TrialRunner


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def runner(tmp_path: Path) -> TrialRunner:
    return TrialRunner(store_folder=tmp_path / "store", device="cpu")


@pytest.fixture
def trial(zoo) -> Any:
    def make(*, architecture: str = "flat", **changes: Any) -> Params:
        return toy_params(zoo.architecture(architecture), **changes)

    return make


def test_trials_side_by_side_score_what_each_scores_alone(runner, trial, dataset, tmp_path):
    several = [
        trial(), trial(seed=2), trial(split={"shots": 1}), trial(method={"n_context": 3, "class_specific": True}),
        trial(features={"views": 2}), trial(train={"learning_rate": 0.1}),
    ]  # fmt: skip

    together = runner.run(several, dataset)

    for params, found in zip(several, together, strict=True):
        (alone,) = TrialRunner(store_folder=tmp_path / "other", device="cpu").run([params], dataset)
        assert isinstance(found, Scores)
        assert isinstance(alone, Scores)
        assert len(found.curve) == 4
        for name, value in alone.metrics().items():
            if name != "seconds":
                assert found.metrics()[name] == pytest.approx(value, abs=1e-4), name


def test_seeds_draw_other_images_and_are_judged_on_the_same_test_images(runner, trial, dataset):
    first, second = runner.run([trial(), trial(seed=2)], dataset)
    assert first.test_digest == second.test_digest
    assert first.zero_shot_accuracy == second.zero_shot_accuracy
    assert first.curve[-1].loss != second.curve[-1].loss


def test_one_that_cannot_be_done_says_why_and_the_others_are_done(runner, trial, dataset):
    found = runner.run([
        trial(split={"shots": 50}), trial(), trial(method={"initial_words": "a photo of a"}),
        trial(train={"learning_rate": 1e2, "epochs": 40, "weight_decay": 1.0, "momentum": 0.99}),
    ], dataset)  # fmt: skip

    assert isinstance(found[0], SplitError)
    assert isinstance(found[1], Scores)
    assert isinstance(found[2], PromptError)
    assert isinstance(found[3], TrainingError)
    assert "lower train.learning_rate" in str(found[3])


def test_an_image_is_encoded_once_for_all_trials(runner, trial, dataset):
    encoded = []

    def see(module: torch.nn.Module, inputs: Any) -> None:
        if type(module).__name__ == "VisionTransformer":
            encoded.append(len(inputs[0]))

    handle = register_module_forward_pre_hook(see)
    try:
        runner.run([trial(split={"shots": 1}), trial(split={"shots": 2}), trial(train={"epochs": 2})], dataset)
        several = sum(encoded)
        runner.run([trial(split={"shots": 2}, method={"n_context": 4})], dataset)
    finally:
        handle.remove()

    assert several > 0
    assert sum(encoded) == several


def test_trainers_that_share_a_device_share_its_memory(trial, dataset, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "device_memory", lambda device: 8_000)
    monkeypatch.setattr(Engine, "memory_on", spy(Engine.memory_on, asked))
    TrialRunner(store_folder=tmp_path, device="cpu", sharing=4).run([trial()], dataset)

    assert set(asked) == {500}


def spy(method: Any, heard: list[Any]) -> Any:
    """The method, with what it returns kept in a list."""

    def call(*given: Any) -> Any:
        heard.append(method(*given))
        return heard[-1]

    return call


def test_another_backbone_has_features_of_its_own(runner, trial, dataset):
    first, other = runner.run([trial(), trial(architecture="flat-resnet-quickgelu")], dataset)
    assert first.curve[-1].loss != other.curve[-1].loss


def test_a_trial_has_a_score_a_test_set(runner, trial, dataset):
    tests = {"again": {"source": "toys"}, "other": {"source": "toys", "class_names": {"cat": "red fox"}}}

    shared, own, *heads = runner.run(
        [trial(tests=tests, method=method) for method in ({}, {"class_specific": True}, {"name": "gda"},
                                                          {"name": "prolip"}, {"name": "coop", "decoupled": 0.5})],
        dataset, tests={"again": dataset, "other": dataset},
    )  # fmt: skip

    assert shared.tests["again"] == {"learned": pytest.approx(shared.accuracy),
                                     "zero_shot": pytest.approx(shared.zero_shot_accuracy)}  # fmt: skip
    assert set(shared.tests["other"]) == {"learned", "zero_shot"}
    assert shared.metrics()["tests/other/learned"] == shared.tests["other"]["learned"]
    assert own.tests == {"again": own.tests["again"], "other": {}}
    for head in heads:
        assert head.tests["again"]["learned"] == pytest.approx(head.accuracy)
        assert set(head.tests["other"]) == {"learned", "zero_shot"}


def test_what_is_built_from_examples_took_its_building(runner, trial, dataset):
    short, long = runner.run([trial(method={"name": "prolip", "steps": steps}) for steps in (0, 1000)], dataset)

    assert long.seconds > short.seconds + 0.05


def test_a_backbone_that_takes_no_prompts_is_refused_before_its_features(runner, trial, dataset):
    refused, built = runner.run([trial(architecture="siglip"), trial(architecture="siglip", method={"name": "gda"})],
                                dataset)  # fmt: skip
    alone = TrialRunner(store_folder=runner.store_folder.with_name("empty"), device="cpu")
    alone.run([trial(architecture="siglip")], dataset)

    assert isinstance(refused, BackboneError)
    assert isinstance(built, Scores)
    assert not alone.store_folder.exists()
