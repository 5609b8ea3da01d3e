"""Learning without labels: the pool, what zero-shot says of it, and prompts that are trained side by side."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_methods import images
from test_split import toy_dataset
from toy_images import paint, paint_classes
from toy_params import toy_params

from coop_core.backbone import Backbone
from coop_core.data.dataset import Dataset
from coop_core.data.split import few_shot_split, located, read_split, write_split
from coop_core.errors import DatasetError, ParamsError, SplitError, TrainingError
from coop_core.judging.pseudo_labels import answer_pool, label_pool, pool_examples, pseudo_labels
from coop_core.methods import Task, upl
from coop_core.params import DatasetParams
from coop_core.training import Checkpoint, Training, fit
from pipelines.settings import Settings
from pipelines.sources.datasets import bring_dataset

NAMES = ("cat", "sea lake", "river")


def learner(backbone: Backbone, members: int = 3) -> upl.UPL:
    params = upl.Params(members=members, n_context=2)
    return upl.build(params, backbone=backbone, task=Task(NAMES, "a {}."), generator=torch.Generator().manual_seed(1))


def recipe(zoo: Any, **train: Any) -> Any:
    return toy_params(zoo.architecture("flat"), train=train).train


def test_the_split_of_a_pool_has_no_labels_and_no_paths_of_its_images(tmp_path: Path) -> None:
    dataset = toy_dataset(train=9)
    write_split(tmp_path / "split.json", few_shot_split(dataset, shots=2, seed=1, unlabelled="all"))
    split = read_split(tmp_path / "split.json")
    kept = json.loads((tmp_path / "split.json").read_text())

    assert split.is_unlabelled
    assert {(image["label"], image["path"]) for image in kept["train"]} == {(-1, "")}
    assert {image.digest for image in split.train} == {i.digest for i in dataset.images if i.subset == "train"}
    assert all(image.path and image.label >= 0 for image in split.test)


def test_another_label_of_a_training_image_changes_nothing_of_the_pool() -> None:
    dataset = toy_dataset(train=9)
    wrong = tuple(replace(i, label=0) if i.subset == "train" else i for i in dataset.images)
    pools = [few_shot_split(replace(dataset, images=its), shots=2, seed=1, unlabelled="all").train
             for its in (dataset.images, wrong)]  # fmt: skip
    assert pools[0] == pools[1]


def test_fewer_images_are_the_first_of_more_and_another_seed_takes_others() -> None:
    dataset = toy_dataset(train=9)
    pools = [few_shot_split(dataset, shots=2, seed=seed, unlabelled=count).train
             for seed, count in ((1, 5), (1, 12), (2, 5))]  # fmt: skip
    assert pools[0] == pools[1][:5]
    assert pools[0] != pools[2]


def test_more_images_than_there_are_is_a_sentence() -> None:
    with pytest.raises(SplitError, match=r"split.unlabelled is 1000, but toy has \d+ different training images"):
        few_shot_split(toy_dataset(train=9), shots=2, seed=1, unlabelled=1000)


def test_an_image_of_the_pool_is_found_by_its_digest() -> None:
    dataset = toy_dataset(train=9)
    pool = few_shot_split(dataset, shots=2, seed=1, unlabelled=4).train
    path_of = {image.digest: image.path for image in dataset.images}
    assert [image.path for image in located(pool, dataset)] == [path_of[image.digest] for image in pool]
    with pytest.raises(SplitError, match="has no image with digest"):
        located(pool, replace(dataset, images=()))


@pytest.mark.parametrize(
    ("split", "method", "sentence"),
    [
        ({}, {"name": "upl"}, "method upl learns from images without labels"),
        ({"min_confidence": 0.9}, {}, "min_confidence is for images without labels"),
        ({"unlabelled": "all", "classes": "base"}, {}, "classes base needs the labels"),
        ({"unlabelled": "all", "label_noise": 0.1}, {}, "label_noise needs labels"),
    ],
)
def test_what_needs_labels_is_refused_without_them(zoo, split, method, sentence) -> None:
    with pytest.raises(ParamsError, match=sentence):
        toy_params(zoo.architecture("flat"), split=split, **({"method": method} if method else {}))


def test_equally_confident_images_are_ordered_by_their_digests() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.2, 0.8]], dtype=np.float32)
    assert pseudo_labels(probabilities, ["c", "a", "b", "d"], per_class=2).rows.tolist() == [1, 2, 3]
    assert pseudo_labels(probabilities[::-1], ["d", "b", "a", "c"], per_class=2).rows.tolist() == [2, 1, 0]


def test_examples_stand_in_the_pools_order_and_a_class_that_is_never_answered_has_none(backbone) -> None:
    split = few_shot_split(toy_dataset(train=9), shots=2, seed=1, unlabelled="all")
    features = torch.randn(len(split.train), 2, 24, generator=torch.Generator().manual_seed(0))
    found = label_pool(split, [answer_pool(split, features[:, 0], backbone)], per_class=2).chosen
    examples = pool_examples(features, found)

    rows = np.sort(found.rows)
    assert torch.equal(examples.features, features[rows])
    assert np.bincount(examples.labels.numpy()).max() <= 2
    assert examples.labels.tolist() == [dict(zip(found.rows, found.labels, strict=True))[row] for row in rows]


def test_one_label_for_all_images_is_a_sentence(backbone) -> None:
    split = few_shot_split(toy_dataset(train=9), shots=2, seed=1, unlabelled="all")
    alike = answer_pool(split, torch.ones(len(split.train), 24), backbone)
    with pytest.raises(TrainingError, match="zero-shot takes every image without a label for "):
        label_pool(split, [alike], per_class=2)


def test_each_member_is_trained_as_it_would_be_alone(backbone, zoo) -> None:
    together = learner(backbone)
    alone = []
    for number in range(3):
        one = learner(backbone, members=1)
        one.load_state_dict({"context_vectors": together.context_vectors[number : number + 1].detach().clone()})
        fit(Training(one, images(), recipe(zoo, epochs=6), seed=5 + number))
        alone.append(one.context_vectors.detach())
    curve = fit(Training(together, images(), recipe(zoo, epochs=6), seed=5))

    torch.testing.assert_close(together.context_vectors.detach(), torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1])
    assert curve[-1].loss < curve[0].loss
    assert 0 <= curve[-1].accuracy <= 1


def test_a_training_that_was_cut_short_goes_on_to_the_same_bytes(backbone, zoo, tmp_path) -> None:
    class CutError(Exception):
        pass

    def stop(epoch: Any) -> None:
        if epoch.epoch == 2:
            raise CutError

    training = Training(learner(backbone), images(), recipe(zoo, epochs=6), 5)
    fit(training)
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", "key", every_seconds=0)
    with pytest.raises(CutError):
        fit(replace(training, learner=learner(backbone), checkpoint=checkpoint, on_epoch=stop))
    resumed = replace(training, learner=learner(backbone), checkpoint=checkpoint)
    fit(resumed)
    assert torch.equal(resumed.learner.context_vectors, training.learner.context_vectors)


def test_the_mean_of_the_members_answers(backbone) -> None:
    found, some = learner(backbone), images(6).features[:, 0]
    _, members = found.loss(some.expand(3, 6, -1), torch.zeros(3, 6, dtype=torch.int64))
    torch.testing.assert_close(found.logits(some), members.mean(0), rtol=1e-4, atol=1e-4)


def test_validation_images_come_from_the_data_sets_own_subset_alone() -> None:
    def split(dataset: Dataset) -> Any:
        return few_shot_split(dataset, shots=2, seed=1, unlabelled="all")

    assert split(toy_dataset(train=9)).val == ()
    assert {image.label for image in split(toy_dataset(train=9, val=3)).val} == set(range(5))


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """What a user without labels has: a folder of images, class names, and a few labelled ones to judge by."""
    for number in range(8):
        paint(tmp_path / f"photos/{'deeper/' * (number % 2)}{number}.png", 50 + number)
    paint_classes(tmp_path / "judged", {"cat": 2, "dog": 2})
    (tmp_path / "card.yaml").write_text(
        "name: pets\npath: judged\nunlabelled: photos\nclass_names: [dog, cat]\n"
    )
    return tmp_path


def brought(folder: Path, **changes: Any) -> Dataset:
    params = DatasetParams(source=str(folder / "card.yaml"), **changes)
    return bring_dataset(params, folder / "raw", Settings(_env_file=None, cache_folder=folder / ".cache"))


def test_a_folder_of_images_and_a_list_of_names_are_enough_to_learn_from(flat) -> None:
    dataset = brought(flat)
    split = few_shot_split(dataset, shots=2, seed=1, unlabelled="all")

    assert dataset.class_names == ("dog", "cat")
    assert (len(split.train), len(split.test)) == (8, 4)
    assert all((dataset.root / image.path).is_file() for image in located(split.train, dataset))
    assert dataset.counts() == {name: {"train": 0, "val": 0, "test": 2} for name in ("dog", "cat")}


def test_the_same_folder_has_nothing_for_whoever_wants_labels(flat) -> None:
    with pytest.raises(SplitError, match=r"the training images of pets have no labels: set split\.unlabelled"):
        few_shot_split(brought(flat), shots=2, seed=1)


def test_an_image_of_the_pool_that_is_judged_as_well_is_a_fault(flat) -> None:
    shutil.copy(flat / "photos/0.png", flat / "judged/cat/0.png")
    with pytest.raises(DatasetError, match="the same image is in more than one of train, val and test"):
        brought(flat)


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda folder: shutil.rmtree(folder / "photos"), "of images without labels does not exist"),
    (lambda folder: [path.unlink() for path in (folder / "photos").rglob("*.png")], "images without labels holds none"),
    (lambda folder: (folder / "photos/broken.png").write_text("x"), "images cannot be read"),
])  # fmt: skip
def test_what_is_wrong_with_the_pool_is_said(flat, change, sentence) -> None:
    change(flat)
    with pytest.raises(DatasetError, match=sentence):
        brought(flat)
