"""Few-shot splits: the choice depends on data, shots and seed alone, and train, val and test never share an image."""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from coop_core.data.dataset import Dataset, LabelledImage
from coop_core.data.split import Split, SplitImage, few_shot_split, read_split, split_to_learn, write_split
from coop_core.errors import SplitError
from coop_core.files import digest_bytes, digest_json

FIVE = ("abbey", "bay", "cliff", "dune", "estuary")


def toy_dataset(
    class_names: Iterable[str] = FIVE, *, train: int = 12, val: int = 0, test: int = 6, copies: int = 1
) -> Dataset:
    """So many images a class and subset, each `copies` times; digests follow from class name, subset and number."""
    names = tuple(class_names)
    images = tuple(
        LabelledImage(f"{name}/{subset}{i}-{copy}.png", label, subset, digest_bytes(f"{name}{subset}{i}".encode()))
        for label, name in enumerate(names)
        for subset, count in (("train", train), ("val", val), ("test", test))
        for i in range(count)
        for copy in range(copies)
    )
    return Dataset(Path("toy"), "toy", names, "a photo of a {}.", images, {})


def digests(images: Iterable[SplitImage]) -> list[str]:
    return [image.digest for image in images]


def by_class(split: Split, images: Iterable[SplitImage]) -> dict[str, list[str]]:
    """{class name: digests in their order}."""
    found: dict[str, list[str]] = {name: [] for name in split.class_names}
    for image in images:
        found[split.class_names[image.label]].append(image.digest)
    return found


def choice(split: Split) -> Mapping[str, list[list[str]]]:
    """{class name: [train, val, test digests]}."""
    parts = [by_class(split, images) for images in (split.train, split.val, split.test)]
    return {name: [part[name] for part in parts] for name in split.class_names}


# What the choice depends on


def test_every_class_gets_its_shots() -> None:
    split = few_shot_split(toy_dataset(), shots=3, seed=1)
    assert Counter(image.label for image in split.train) == dict.fromkeys(range(5), 3)


def test_the_same_arguments_give_the_same_split() -> None:
    assert few_shot_split(toy_dataset(), shots=3, seed=1) == few_shot_split(toy_dataset(), shots=3, seed=1)


def test_a_split_does_not_touch_the_global_random_state() -> None:
    random.seed(0)
    state = random.getstate()
    few_shot_split(toy_dataset(), shots=3, seed=1)
    assert random.getstate() == state


@pytest.mark.parametrize("seed", [0, 2, 1000])
def test_another_seed_gives_other_training_images(seed: int) -> None:
    first, second = (few_shot_split(toy_dataset(), shots=3, seed=s) for s in (1, seed))
    assert set(digests(first.train)) != set(digests(second.train))


def test_renaming_files_does_not_change_the_choice() -> None:
    dataset = toy_dataset()
    renamed = tuple(
        dataclasses.replace(image, path=f"{1000 - i}.jpg") for i, image in enumerate(dataset.images)
    )
    split = few_shot_split(dataclasses.replace(dataset, images=renamed), shots=3, seed=1)
    assert choice(split) == choice(few_shot_split(dataset, shots=3, seed=1))


def test_reordering_images_does_not_change_the_split() -> None:
    dataset = toy_dataset(val=5)
    shuffled = random.Random(0).sample(dataset.images, len(dataset.images))
    split = few_shot_split(dataclasses.replace(dataset, images=tuple(shuffled)), shots=3, seed=1)
    assert split == few_shot_split(dataset, shots=3, seed=1)


def test_adding_another_class_does_not_change_a_classs_choice() -> None:
    small = choice(few_shot_split(toy_dataset(FIVE), shots=3, seed=1))
    large = choice(few_shot_split(toy_dataset(["aaa", *FIVE, "zzz"]), shots=3, seed=1))
    assert {name: large[name] for name in FIVE} == small


def test_another_classs_images_do_not_change_a_classs_choice() -> None:
    dataset = toy_dataset()
    fewer = tuple(image for image in dataset.images if image.label != 0 or not image.path.endswith("train0-0.png"))
    before = choice(few_shot_split(dataset, shots=3, seed=1))
    after = choice(few_shot_split(dataclasses.replace(dataset, images=fewer), shots=3, seed=1))
    assert {name: before[name] for name in FIVE[1:]} == {name: after[name] for name in FIVE[1:]}


def test_the_choice_of_a_release_stays_the_choice_of_the_next() -> None:
    dataset = toy_dataset(["river"], train=12)
    ranked = sorted((image.digest for image in dataset.images if image.subset == "train"),
                    key=lambda digest: digest_bytes(f"7:{digest}".encode()))  # fmt: skip
    assert digests(few_shot_split(dataset, shots=4, seed=7).train) == ranked[:4]


# Fewer shots


@pytest.mark.parametrize("shots", [1, 2, 4])
def test_the_images_of_fewer_shots_are_part_of_those_of_more(shots: int) -> None:
    few, many = (few_shot_split(toy_dataset(), shots=n, seed=1) for n in (shots, 8))
    assert digests(few.train) == digests(many.train)[: shots * len(FIVE)]


def test_the_subset_of_fewer_shots_is_the_split_of_fewer_shots() -> None:
    split = few_shot_split(toy_dataset(), shots=8, seed=1)
    assert split.shots_subset(2) == few_shot_split(toy_dataset(), shots=2, seed=1).train


def test_the_subset_of_all_shots_is_the_training_set() -> None:
    split = few_shot_split(toy_dataset(), shots=4, seed=1)
    assert split.shots_subset(4) == split.train


# Base and new classes


@pytest.mark.parametrize(
    ("count", "base", "new"), [(5, "abc", "de"), (4, "ab", "cd"), (3, "ab", "c"), (2, "a", "b")]
)
def test_base_is_the_first_half_of_the_labels_rounded_up_and_new_the_rest(count: int, base: str, new: str) -> None:
    dataset = toy_dataset("abcde"[:count])
    assert few_shot_split(dataset, shots=1, seed=1, classes="base").class_names == tuple(base)
    assert few_shot_split(dataset, shots=1, seed=1, classes="new").class_names == tuple(new)


@pytest.mark.parametrize(("classes", "count"), [("base", 3), ("new", 2)])
def test_the_labels_of_each_half_count_from_0(classes: str, count: int) -> None:
    split = few_shot_split(toy_dataset(val=2), shots=2, seed=1, classes=classes)
    for images in (split.train, split.val, split.test):
        assert {image.label for image in images} == set(range(count))


@pytest.mark.parametrize("classes", ["base", "new"])
def test_a_halfs_images_are_those_of_the_split_of_all_classes(classes: str) -> None:
    whole = choice(few_shot_split(toy_dataset(val=2), shots=4, seed=1))
    half = choice(few_shot_split(toy_dataset(val=2), shots=4, seed=1, classes=classes))
    assert half == {name: whole[name] for name in half}


def test_base_and_new_together_are_all_classes() -> None:
    base, new = (few_shot_split(toy_dataset(), shots=2, seed=1, classes=half) for half in ("base", "new"))
    assert (*base.class_names, *new.class_names) == FIVE


# Validation and test images


@pytest.mark.parametrize(("shots", "expected"), [(1, 1), (2, 2), (4, 4), (8, 4)])
@pytest.mark.parametrize("val", [0, 6])
def test_validation_images_a_class_are_the_shots_but_at_most_four(shots: int, expected: int, val: int) -> None:
    split = few_shot_split(toy_dataset(val=val), shots=shots, seed=1)
    assert Counter(image.label for image in split.val) == dict.fromkeys(range(5), expected)


def test_validation_images_come_from_the_data_sets_own_val_subset() -> None:
    dataset = toy_dataset(val=6)
    own = {image.digest for image in dataset.images if image.subset == "val"}
    assert set(digests(few_shot_split(dataset, shots=4, seed=1).val)) <= own


def test_validation_images_come_from_the_spare_training_images_without_a_val_subset() -> None:
    dataset = toy_dataset()
    train = {image.digest for image in dataset.images if image.subset == "train"}
    assert set(digests(few_shot_split(dataset, shots=4, seed=1).val)) <= train


def test_the_val_subset_frees_all_training_images_for_shots() -> None:
    assert len(few_shot_split(toy_dataset(train=8, val=4), shots=8, seed=1).train) == 40


@pytest.mark.parametrize("val", [0, 6])
@pytest.mark.parametrize("seed", range(5))
def test_train_val_and_test_never_share_an_image(val: int, seed: int) -> None:
    split = few_shot_split(toy_dataset(val=val), shots=8, seed=seed)
    train, validation, test = (set(digests(images)) for images in (split.train, split.val, split.test))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_copies_of_a_training_image_are_not_validated_on() -> None:
    split = few_shot_split(toy_dataset(copies=2), shots=3, seed=1)
    assert not set(digests(split.train)) & set(digests(split.val))


def test_the_shots_of_a_class_are_different_images_even_when_the_data_set_holds_copies() -> None:
    split = few_shot_split(toy_dataset(copies=2), shots=4, seed=1)
    assert len(set(digests(split.train))) == 20


def test_all_test_images_are_taken_unless_limited() -> None:
    assert len(few_shot_split(toy_dataset(test=6), shots=1, seed=1).test) == 30


def test_test_images_a_class_can_be_limited() -> None:
    split = few_shot_split(toy_dataset(test=6), shots=1, seed=1, test_per_class=2)
    assert Counter(image.label for image in split.test) == dict.fromkeys(range(5), 2)


def test_a_limit_above_what_there_is_takes_all() -> None:
    assert len(few_shot_split(toy_dataset(test=6), shots=1, seed=1, test_per_class=100).test) == 30


def test_limited_test_images_do_not_depend_on_the_seed_or_the_shots() -> None:
    first = few_shot_split(toy_dataset(), shots=1, seed=1, test_per_class=3)
    second = few_shot_split(toy_dataset(), shots=4, seed=2, test_per_class=3)
    assert first.test == second.test


# Too few images


def test_all_classes_with_too_few_images_are_named_with_the_way_out() -> None:
    dataset = toy_dataset(train=8)
    fewer = tuple(image for image in dataset.images if image.label not in {1, 3} or image.subset != "train")
    with pytest.raises(
        SplitError,
        match=r"split\.shots 4 needs 4 training and 4 validation images a class, but 'bay' has 0, 'dune' has 0: "
        r"lower split\.shots or add images",
    ):
        few_shot_split(dataclasses.replace(dataset, images=fewer), shots=4, seed=1)


def test_only_the_training_images_are_asked_for_when_there_is_a_val_subset() -> None:
    with pytest.raises(SplitError, match=r"split\.shots 9 needs 9 training images a class, but 'abbey' has 8, "):
        few_shot_split(toy_dataset(train=8, val=4), shots=9, seed=1)


def test_more_than_ten_classes_with_too_few_images_are_cut_short() -> None:
    with pytest.raises(SplitError, match=r"'j' has 1, \.\.\.: lower split\.shots"):
        few_shot_split(toy_dataset("abcdefghijkl", train=1), shots=4, seed=1)


def test_just_enough_images_are_enough() -> None:
    split = few_shot_split(toy_dataset(train=8), shots=4, seed=1)
    assert (len(split.train), len(split.val)) == (20, 20)


def test_a_new_class_with_too_few_images_does_not_stop_the_base_classes() -> None:
    dataset = toy_dataset(train=8)
    fewer = tuple(image for image in dataset.images if image.label != 4)
    split = few_shot_split(dataclasses.replace(dataset, images=fewer), shots=4, seed=1, classes="base")
    assert split.class_names == FIVE[:3]


# Digests and files


def test_runs_of_different_seeds_are_judged_on_the_same_test_digest() -> None:
    first, second = (few_shot_split(toy_dataset(), shots=n, seed=n, test_per_class=3) for n in (1, 2))
    assert first.test_digest == second.test_digest
    assert first.train_digest != second.train_digest


def test_other_test_images_have_another_test_digest() -> None:
    first, second = (few_shot_split(toy_dataset(), shots=1, seed=1, test_per_class=n) for n in (3, 4))
    assert first.test_digest != second.test_digest
    assert first.train_digest == second.train_digest


def test_other_class_names_have_other_digests() -> None:
    dataset = toy_dataset()
    renamed = dataclasses.replace(dataset, class_names=("minster", *FIVE[1:]))
    first, second = (few_shot_split(data, shots=1, seed=1) for data in (dataset, renamed))
    assert first.test_digest != second.test_digest
    assert first.train_digest != second.train_digest


def test_digests_do_not_depend_on_file_names() -> None:
    dataset = toy_dataset()
    renamed = tuple(dataclasses.replace(image, path=f"x/{image.path}") for image in dataset.images)
    first = few_shot_split(dataset, shots=2, seed=1)
    second = few_shot_split(dataclasses.replace(dataset, images=renamed), shots=2, seed=1)
    assert (first.train_digest, first.test_digest) == (second.train_digest, second.test_digest)


@pytest.mark.parametrize("classes", ["all", "base", "new"])
def test_a_split_comes_back_from_its_file_as_it_went(tmp_path: Path, classes: str) -> None:
    split = few_shot_split(toy_dataset(val=3), shots=2, seed=1, classes=classes, test_per_class=3)
    write_split(tmp_path / "split.json", split)
    assert read_split(tmp_path / "split.json") == split


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_split(tmp_path / "split.json", few_shot_split(toy_dataset(), shots=2, seed=1))
    return tmp_path / "split.json"


@pytest.mark.parametrize("subset", ["train", "val", "test"])
def test_a_split_whose_images_were_edited_is_refused(written: Path, subset: str) -> None:
    tree = json.loads(written.read_text())
    tree[subset][0]["label"] = 4
    written.write_text(json.dumps(tree))
    with pytest.raises(SplitError, match=r"split\.json does not carry the digest of its own content: run `dvc repro"):
        read_split(written)


@pytest.mark.parametrize("subset", ["train", "val", "test"])
def test_a_split_from_which_an_image_was_removed_is_refused(written: Path, subset: str) -> None:
    tree = json.loads(written.read_text())
    tree[subset].pop()
    written.write_text(json.dumps(tree))
    with pytest.raises(SplitError, match=r"split\.json does not carry the digest of its own content"):
        read_split(written)


def test_a_split_whose_training_images_were_reordered_is_refused(written: Path) -> None:
    tree = json.loads(written.read_text())
    tree["train"].reverse()  # the prefix that fewer shots take would be another
    written.write_text(json.dumps(tree))
    with pytest.raises(SplitError, match=r"split\.json does not carry the digest of its own content"):
        read_split(written)


def test_a_split_whose_class_names_were_edited_is_refused(written: Path) -> None:
    tree = json.loads(written.read_text())
    tree["class_names"][0] = "minster"
    written.write_text(json.dumps(tree))
    with pytest.raises(SplitError, match=r"split\.json does not carry the digest of its own content"):
        read_split(written)


def test_a_split_without_its_digest_is_refused(written: Path) -> None:
    tree = json.loads(written.read_text())
    del tree["digest"]
    written.write_text(json.dumps(tree))
    with pytest.raises(SplitError, match=r"split\.json does not carry the digest of its own content"):
        read_split(written)


@pytest.mark.parametrize("key", ["val", "shots"])
def test_a_split_that_lacks_a_part_is_refused_with_a_sentence(written: Path, key: str) -> None:
    tree = json.loads(written.read_text())
    del tree[key]
    written.write_text(json.dumps(tree))
    with pytest.raises(SplitError, match=r"split\.json"):
        read_split(written)


# Wrong labels on purpose


def noisy(share: float, *, seed: int = 1) -> Split:
    return few_shot_split(toy_dataset(), shots=8, seed=seed, label_noise=share)


def wrong(split: Split) -> set[str]:
    """Digests of training images that bear another class's label."""
    return {image.digest for image in split.train if FIVE[image.label] != image.path.split("/")[0]}


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 4), (0.2, 8), (0.4, 16), (0.99, 40)])
def test_just_the_asked_share_of_training_labels_is_wrong(share, count) -> None:
    assert len(wrong(noisy(share))) == count


def test_validation_and_test_labels_are_right_whatever_the_noise() -> None:
    assert (noisy(0.4).val, noisy(0.4).test) == (noisy(0).val, noisy(0).test)


def test_what_is_wrong_at_a_smaller_share_is_wrong_at_a_larger() -> None:
    assert wrong(noisy(0.1)) < wrong(noisy(0.2)) < wrong(noisy(0.4))
    labels = {image.digest: image.label for image in noisy(0.4).train}
    assert all(labels[image.digest] == image.label for image in noisy(0.1).train if image.digest in wrong(noisy(0.1)))


def test_another_seed_gives_other_wrong_labels() -> None:
    assert wrong(noisy(0.2)) != wrong(noisy(0.2, seed=2))


def test_every_other_class_is_drawn() -> None:
    drawn = {(image.path.split("/")[0], FIVE[image.label])
             for seed in range(60) for image in noisy(0.9, seed=seed).train}  # fmt: skip
    assert len({pair for pair in drawn if pair[0] != pair[1]}) == 20


def test_label_noise_is_part_of_the_training_images_digest_and_survives_writing(tmp_path: Path) -> None:
    assert noisy(0.2).train_digest != noisy(0).train_digest
    write_split(tmp_path / "split.json", noisy(0.2))
    assert read_split(tmp_path / "split.json") == noisy(0.2)


def test_a_split_of_before_label_noise_is_read(tmp_path: Path) -> None:
    write_split(tmp_path / "split.json", noisy(0))
    tree = json.loads((tmp_path / "split.json").read_text())
    del tree["label_noise"]
    fields = {name: tree[name] for name in Split.__dataclass_fields__ if name in tree}
    (tmp_path / "split.json").write_text(json.dumps({**tree, "digest": digest_json(fields)}))
    assert read_split(tmp_path / "split.json") == noisy(0)


# Images that are all there to learn from


@pytest.mark.parametrize(("given", "shots", "train", "val"), [
    (4, None, 4, 0), (5, None, 4, 1), (20, None, 16, 4), (50, None, 46, 4),
    (8, 8, 8, 0), (10, 8, 8, 2), (50, 8, 8, 4), (50, 1, 1, 1),
])  # fmt: skip
def test_what_is_left_or_a_fifth_validates_and_four_at_most(given, shots, train, val) -> None:
    split = split_to_learn(toy_dataset(train=given, test=0), shots=shots, seed=1)
    assert (len(split.train), len(split.val), split.shots) == (5 * train, 5 * val, train)
    assert not set(digests(split.train)) & set(digests(split.val))


def test_own_validation_images_leave_all_others_to_learn_from() -> None:
    split = split_to_learn(toy_dataset(train=10, val=6, test=0), shots=None, seed=1)
    assert (len(split.train), len(split.val)) == (50, 20)


def test_copies_of_an_image_do_not_validate_what_they_taught() -> None:
    split = split_to_learn(toy_dataset(train=4, test=0, copies=3), shots=None, seed=1)
    assert (len(split.train), len(split.val)) == (20, 0)


def test_uneven_classes_are_taken_whole_and_round_by_round() -> None:
    dataset = toy_dataset(["a", "b"], train=8, test=0)
    fewer = dataclasses.replace(dataset, images=tuple(i for i in dataset.images if i.label or not i.path[7] > "2"))
    split = few_shot_split(fewer, shots=None, seed=1, val_shots=1)
    assert [image.label for image in split.train] == [0, 1, 0, 1, 1, 1, 1, 1, 1]
    assert split.shots == 7
    even = few_shot_split(dataset, shots=7, seed=1, val_shots=1)
    assert by_class(split, split.train)["b"] == by_class(even, even.train)["b"]


def test_a_pool_without_labels_needs_its_shots() -> None:
    with pytest.raises(SplitError, match=r"images without labels need split\.shots: how many of each class"):
        few_shot_split(toy_dataset(), shots=None, seed=1, unlabelled="all")
