"""Importers: every layout becomes the same normal form, every fault is reported, nothing is written on one."""

import contextlib
import gzip
import json
import os
import shutil
import struct
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_images import paint, paint_classes

from coop_core.data.catalog import Card, read_source
from coop_core.data.dataset import Dataset, read_dataset
from coop_core.data.importers import import_dataset
from coop_core.data.validation import TOKENIZER_SIGNS, Findings, Sample, check_files
from coop_core.errors import DatasetError
from coop_core.files import digest_bytes, digest_file, read_array

FOLDERS = Card(name="toy")
CSV = Card(name="toy", layout="csv", index="list.csv")
SPLIT = Card(name="toy", layout="split-json", index="split_zhou_Toy.json")
IDX = Card(name="toy", layout="idx", class_names=["t-shirt", "ankle_boot"])
Row = tuple[str, int, str]


def import_folder(
    folder: Path, *, card: Card = FOLDERS, fraction: float = 0.5, accept: Sequence[str] = ()
) -> Dataset:
    """Import into the folder `out` beside `folder`."""
    return import_dataset(card, folder, folder.parent / "out", test_fraction=fraction, accept=accept)


def faults_of(folder: Path, *, card: Card = FOLDERS, accept: Sequence[str] = ()) -> str:
    """The report of an import that must fail, after a look that it wrote nothing."""
    with pytest.raises(DatasetError, match=r"data set toy has \d+ fault") as caught:
        import_folder(folder, card=card, accept=accept)
    assert not (folder.parent / "out").exists()
    return str(caught.value)


def by_subset(dataset: Dataset) -> dict[str, dict[str, int]]:
    """{class name: {subset: count}}, without zeros."""
    return {name: {s: n for s, n in counts.items() if n} for name, counts in dataset.counts().items()}


def write_csv(folder: Path, *lines: str, encoding: str = "utf-8") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "list.csv").write_text("\n".join(lines) + "\n", encoding=encoding)
    return folder


def write_split(folder: Path, split: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SPLIT.index).write_text(json.dumps(split))
    return folder


def paint_split(folder: Path, *, below: str = "") -> dict[str, list[Row]]:
    """Two classes with two training, one validation and one test image each; paths count from `below`."""
    split: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
    number = 0
    for label, name in enumerate(("forest", "river")):
        for subset in ("train", "train", "val", "test"):
            paint(folder / below / name / f"{number}.png", number)
            split[subset].append((f"{name}/{number}.png", label, name))
            number += 1
    return split


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_idx_files(folder: Path, labels: Mapping[str, Sequence[int]] | None = None) -> dict[str, np.ndarray]:
    """The four files of the MNIST family with different 4 x 5 images -> {"train" and "t10k": pixels}."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    pixels = {}
    for prefix, chosen in (labels or {"train": [0, 1, 1, 0], "t10k": [1, 0]}).items():
        pixels[prefix] = generator.integers(0, 256, (len(chosen), 5, 4), dtype=np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", pixels[prefix])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.array(chosen))
    return pixels


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "source"


# Class folders


def test_class_folders_become_classes_in_alphabetical_order(source: Path) -> None:
    dataset = import_folder(paint_classes(source, {"river": 4, "forest_floor": 6}))
    assert dataset.class_names == ("forest floor", "river")
    assert by_subset(dataset) == {"forest floor": {"train": 3, "test": 3}, "river": {"train": 2, "test": 2}}


def test_what_was_imported_can_be_read_again(source: Path) -> None:
    dataset = import_folder(paint_classes(source, {"river": 4, "forest": 4}))
    assert read_dataset(dataset.root) == dataset


def test_images_are_copied_below_images_with_the_digest_of_their_bytes(source: Path) -> None:
    dataset = import_folder(paint_classes(source, {"river": 2, "forest": 2}))
    expected = {f"images/{name}/{i}.png" for name in ("river", "forest") for i in (0, 1)}
    assert {image.path for image in dataset.images} == expected
    for image in dataset.images:
        copy = dataset.root / image.path
        assert copy.read_bytes() == (source / image.path.removeprefix("images/")).read_bytes()
        assert digest_file(copy) == image.digest


def test_the_card_goes_into_the_data_set(source: Path) -> None:
    card = Card(name="toy", title="Toy", licence="CC0", homepage="https://example.org", template="a map of a {}.")
    dataset = import_folder(paint_classes(source, {"river": 2, "forest": 2}), card=card)
    assert (dataset.name, dataset.template) == ("toy", "a map of a {}.")
    assert {key: dataset.about[key] for key in ("title", "licence", "homepage", "layout")} == {
        "title": "Toy", "licence": "CC0", "homepage": "https://example.org", "layout": "folders"
    }  # fmt: skip


def test_a_cards_mapping_gives_words_to_class_folders(source: Path) -> None:
    card = Card(name="toy", class_names={"n01": "river", "n02": "forest"})
    assert import_folder(paint_classes(source, {"n01": 2, "n02": 2}), card=card).class_names == ("river", "forest")


def test_a_cards_list_decides_the_order_of_labels(source: Path) -> None:
    card = Card(name="toy", class_names=["river", "forest"])
    dataset = import_folder(paint_classes(source, {"forest": 2, "river": 4}), card=card)
    assert dataset.class_names == ("river", "forest")
    assert {image.label for image in dataset.images if "river" in image.path} == {0}


def test_a_class_folder_that_is_not_in_the_cards_list_is_a_fault(source: Path) -> None:
    card = Card(name="toy", class_names=["river", "forest"])
    report = faults_of(paint_classes(source, {"forest": 2, "river": 2, "sea": 2}), card=card)
    assert "classes are not in the card's class_names: sea" in report


def test_images_in_deeper_folders_belong_to_the_class(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    paint(source / "river" / "2019" / "may" / "x.jpg", 99)
    assert sum(import_folder(source).counts()["river"].values()) == 3


def test_suffixes_count_in_any_case(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    (source / "river" / "0.png").rename(source / "river" / "0.PNG")
    assert sum(import_folder(source).counts()["river"].values()) == 2


def test_files_that_are_no_images_are_left_out_and_noted(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    (source / "river" / "notes.txt").write_text("x")
    dataset = import_folder(source)
    assert dataset.about["notes"] == ["files without an image suffix were left out: river/notes.txt"]
    assert not (dataset.root / "images" / "river" / "notes.txt").exists()


def test_hidden_files_and_folders_are_left_out_and_noted(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    paint(source / "river" / ".thumbnail.png", 50)
    paint(source / "river" / ".ipynb_checkpoints" / "0-checkpoint.png", 0)
    paint(source / ".trash" / "0.png", 51)
    paint(source / "__MACOSX" / "._0.png", 52)
    dataset = import_folder(source)
    assert len(dataset.images) == 4
    assert dataset.about["notes"] == [
        "hidden files and folders were left out: .trash, __MACOSX, river/.ipynb_checkpoints, river/.thumbnail.png"
    ]


def test_images_beside_the_class_folders_are_left_out_and_noted(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    paint(source / "stray.png", 50)
    assert import_folder(source).about["notes"] == ["images beside the class folders were left out: stray.png"]


def test_a_linked_folder_inside_a_class_is_left_out_and_noted(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    (source / "river" / "more").symlink_to(source / "forest")
    assert import_folder(source).about["notes"] == ["linked folders inside class folders were left out: river/more"]


@pytest.mark.parametrize("name", ["river/gone.png", "river/deep/gone", "gone", "gone.png"])
def test_a_link_that_leads_nowhere_is_a_fault(source: Path, name: str) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to("nowhere")
    report = faults_of(source)
    assert report == f"data set toy has 1 fault:\n  - links lead nowhere (mend or remove them): {name}"


def test_a_pipe_among_the_images_is_a_fault_and_not_waited_for(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    os.mkfifo(source / "river" / "pipe.png")
    assert "river/pipe.png is no regular file" in faults_of(source)


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"caf\xe9/0.png"])
def test_names_that_are_not_utf_8_are_a_fault_that_can_be_printed(source: Path, name: bytes) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    path = source / "river" / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    (source / "river" / "0.png").rename(path)
    report = faults_of(source).encode().decode()
    assert report.startswith("data set toy has 1 fault:\n  - names of files are not UTF-8 (rename them): river/caf\\u")


def test_a_class_whose_files_have_another_suffix_is_a_fault_that_names_the_suffix(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2, "sea": 0})
    for number in range(3):
        (source / "sea" / f"{number}.HEIC").write_bytes(b"ftypheic")
    report = faults_of(source)
    assert report == "data set toy has 1 fault:\n  - class folders hold nothing that can be used: sea (.heic)"


def test_a_hash_sign_in_a_file_name_is_no_array_slice(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    paint(source / "river" / "no#3.png", 50)
    assert sum(import_folder(source).counts()["river"].values()) == 3


def test_progress_tells_how_many_images_of_all_are_done(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    seen: list[tuple[int, int]] = []
    import_dataset(
        FOLDERS, source, source.parent / "out", test_fraction=0.5, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_folder_that_does_not_exist_is_a_sentence(source: Path) -> None:
    with pytest.raises(DatasetError, match=r"image folder .+source does not exist: correct the card's path"):
        import_folder(source)


def test_a_folder_without_images_says_what_is_expected(source: Path) -> None:
    source.mkdir()
    assert faults_of(source) == (
        f"data set toy has 1 fault:\n  - no class folders found; expected one folder a class in: {source}"
    )


def test_images_without_class_folders_are_named(source: Path) -> None:
    paint(source / "0.png", 0)
    report = faults_of(source)
    assert "images lie in no class folder: 0.png" in report
    assert "no class folders found" in report


def test_one_class_is_not_enough(source: Path) -> None:
    report = faults_of(paint_classes(source, {"river": 4}))
    assert report == (
        "data set toy has 1 fault:\n  - a classifier needs two classes or more, but there is only one: river"
    )


def test_an_empty_class_is_one_fault(source: Path) -> None:
    report = faults_of(paint_classes(source, {"river": 2, "forest": 2, "sea": 0}))
    assert report == "data set toy has 1 fault:\n  - classes have no image: sea"


def test_a_class_with_one_image_cannot_be_trained_and_tested(source: Path) -> None:
    report = faults_of(paint_classes(source, {"river": 2, "forest": 2, "sea": 1}))
    assert "classes have no test image (each needs one to train on and another to test on): sea" in report


@pytest.mark.parametrize("classes", ["my_photos", "archive/my_photos"])
def test_class_folders_in_a_wrapper_are_found_and_the_wrapper_is_noted(source: Path, classes: str) -> None:
    paint_classes(source / classes, {"river": 2, "forest": 2})
    (source / "README.txt").write_text("x")
    dataset = import_folder(source)
    assert dataset.class_names == ("forest", "river")
    assert set(dataset.about["notes"]) == {
        f"the class folders were found further down, in: {classes}",
        "files without an image suffix were left out: README.txt",
    }


def test_a_wrapper_of_train_and_test_folders_is_seen_through(source: Path) -> None:
    paint_classes(source / "photos" / "train", {"river": 3, "forest": 2})
    paint_classes(source / "photos" / "test", {"river": 1, "forest": 1}, first=100)
    assert by_subset(import_folder(source))["river"] == {"train": 3, "test": 1}


def test_a_folder_with_images_of_its_own_is_no_wrapper(source: Path) -> None:
    paint_classes(source / "river", {"may": 2, "june": 2})
    paint(source / "river" / "0.png", 50)
    assert "there is only one: river" in faults_of(source)


# Train, val and test folders


@pytest.mark.parametrize(("train", "val", "test"), [("train", "val", "test"), ("Training", "validation", "TESTING")])
def test_subset_folders_decide_the_subsets(source: Path, train: str, val: str, test: str) -> None:
    for first, (subset, count) in enumerate({train: 3, val: 1, test: 2}.items()):
        paint_classes(source / subset, {"river": count, "forest": count}, first=100 * first)
    expected = {"train": 3, "val": 1, "test": 2}
    assert by_subset(import_folder(source)) == {"forest": expected, "river": expected}


def test_train_and_test_folders_are_enough(source: Path) -> None:
    paint_classes(source / "train", {"river": 3, "forest": 2})
    paint_classes(source / "test", {"river": 1, "forest": 1}, first=100)
    assert by_subset(import_folder(source))["river"] == {"train": 3, "test": 1}


@pytest.mark.parametrize("files", [["0.png"], ["labels.txt"], []], ids=["images", "text", "empty"])
def test_a_folder_beside_train_and_test_is_left_out_and_noted(source: Path, files: list[str]) -> None:
    paint_classes(source / "train", {"river": 3, "forest": 2})
    paint_classes(source / "test", {"river": 1, "forest": 1}, first=100)
    (source / "unlabeled").mkdir()
    for file in files:
        (source / "unlabeled" / file).write_bytes(b"x")
    dataset = import_folder(source)
    assert dataset.class_names == ("forest", "river")
    assert dataset.about["notes"] == ["folders beside train, val and test were left out: unlabeled"]


def test_images_in_train_and_in_no_class_are_left_out_and_noted(source: Path) -> None:
    paint_classes(source / "train", {"river": 3, "forest": 2})
    paint_classes(source / "test", {"river": 1, "forest": 1}, first=100)
    paint(source / "train" / "stray.png", 50)
    assert import_folder(source).about["notes"] == ["images beside the class folders were left out: train/stray.png"]


def test_a_class_called_train_is_a_class_where_no_test_is_beside_it_and_is_noted(source: Path) -> None:
    dataset = import_folder(paint_classes(source, {"car": 2, "train": 2}))
    assert dataset.class_names == ("car", "train")
    assert "name of a subset is taken for a class" in dataset.about["notes"][0]


def test_composed_and_decomposed_names_in_train_and_test_are_one_class(source: Path) -> None:
    paint_classes(source / "train", {unicodedata.normalize("NFD", "Köter"): 2, "cat": 2})
    paint_classes(source / "test", {unicodedata.normalize("NFC", "Köter"): 1, "cat": 1}, first=100)
    assert by_subset(import_folder(source))["Köter"] == {"train": 2, "test": 1}


def test_a_class_that_is_only_tested_is_a_fault(source: Path) -> None:
    paint_classes(source / "train", {"river": 2, "forest": 2})
    paint_classes(source / "test", {"river": 1, "forest": 1, "sea": 1}, first=100)
    assert "classes have no train image (each needs one to train on and another to test on): sea" in faults_of(source)


def test_the_same_image_in_train_and_test_is_a_fault(source: Path) -> None:
    paint_classes(source / "train", {"river": 2, "forest": 2})
    paint_classes(source / "test", {"river": 1, "forest": 1}, first=100)
    paint(source / "test" / "river" / "copy.png", 0)
    report = faults_of(source)
    assert "the same image is in more than one of train, val and test" in report
    assert "river/copy.png = river/0.png" in report or "river/0.png = river/copy.png" in report


def test_an_accepted_duplicate_across_subsets_becomes_a_note(source: Path) -> None:
    paint_classes(source / "train", {"river": 2, "forest": 2})
    paint_classes(source / "test", {"river": 1, "forest": 1}, first=100)
    paint(source / "test" / "river" / "copy.png", 0)
    dataset = import_folder(source, accept=["duplicate-across-subsets"])
    assert by_subset(dataset)["river"] == {"train": 2, "test": 2}
    assert len(dataset.about["notes"]) == 1
    assert "river/copy.png" in dataset.about["notes"][0]


# The held-out share


def test_a_share_of_each_class_is_held_out(source: Path) -> None:
    dataset = import_folder(paint_classes(source, {"river": 10, "forest": 5}), fraction=0.2)
    assert by_subset(dataset) == {"forest": {"train": 4, "test": 1}, "river": {"train": 8, "test": 2}}


def test_at_least_one_image_of_each_class_is_held_out(source: Path) -> None:
    dataset = import_folder(paint_classes(source, {"river": 3, "forest": 3}), fraction=0.01)
    assert by_subset(dataset)["river"] == {"train": 2, "test": 1}


def test_an_image_keeps_its_side_when_files_are_renamed(tmp_path: Path) -> None:
    first = paint_classes(tmp_path / "a" / "source", {"river": 8, "forest": 8})
    second = tmp_path / "b" / "source"
    for path in first.rglob("*.png"):
        (second / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, second / path.parent.name / f"{9 - int(path.stem)} renamed.png")
    sides = [{image.digest: image.subset for image in import_folder(folder).images} for folder in (first, second)]
    assert sides[0] == sides[1]


def test_an_image_keeps_its_side_when_a_class_is_added(tmp_path: Path) -> None:
    small = import_folder(paint_classes(tmp_path / "a" / "source", {"river": 8, "forest": 8}))
    large = import_folder(paint_classes(tmp_path / "b" / "source", {"river": 8, "forest": 8, "abbey": 8}))
    sides = {image.digest: image.subset for image in large.images}
    assert all(sides[image.digest] == image.subset for image in small.images if image.label == 1)


def test_copies_of_an_image_stay_on_one_side(source: Path) -> None:
    paint_classes(source, {"river": 6, "forest": 6})
    for i in range(6):
        paint(source / "river" / f"copy {i}.png", i)
    images = import_folder(source).images
    for digest in {image.digest for image in images}:
        assert len({image.subset for image in images if image.digest == digest}) == 1


# Faults of images and classes


def test_an_unreadable_image_is_a_fault_with_its_path(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    (source / "river" / "bad.png").write_text("<html>")
    report = faults_of(source)
    assert "images cannot be read (replace or remove them)" in report
    assert "river/bad.png" in report


def test_a_truncated_image_is_a_fault_with_its_path(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    whole = paint(source / "river" / "cut.jpg", 50, size=(64, 64)).read_bytes()
    (source / "river" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    report = faults_of(source)
    assert "images cannot be read (replace or remove them)" in report
    assert report.count("river/cut.jpg") == 1


def test_an_image_that_is_removed_while_it_is_looked_at_costs_the_others_nothing(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    (source / "river" / "1.png").unlink()
    samples = [Sample(source / name, 0, None) for name in ("river/0.png", "river/1.png", "x" * 300, "forest/0.png")]
    findings = Findings()
    digests = check_files(samples, findings)
    assert [bool(digest) for digest in digests] == [True, False, False, True]
    assert "river/1.png is missing" in findings.faults[0]
    assert "cannot be opened (File name too long)" in findings.faults[0]


def test_a_class_whose_images_cannot_be_read_is_not_said_to_lack_them(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    for number in range(2):
        (source / "river" / f"{number}.png").write_bytes(b"")
    assert faults_of(source).startswith("data set toy has 1 fault:\n  - images cannot be read")


def test_images_whose_transparency_was_laid_on_white_are_counted_in_a_note(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    for number in range(12):
        Image.new("RGBA", (8, 8), (0, number, 0, 100)).save(source / "river" / f"icon {number}.png")
    (note,) = import_folder(source).about["notes"]
    assert note.startswith("in 12 images, transparent pixels were laid on white: river/icon 0.png, river/icon 1.png")
    assert note.endswith(" and 2 more")


def test_16_bit_images_that_are_nearly_black_are_counted_in_a_note(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(source / "river" / "ct.png")
    (note,) = import_folder(source).about["notes"]
    assert note.startswith("in 1 image, 16-bit pixels use less than a sixteenth of their range")
    assert note.endswith(": river/ct.png")


def test_many_faults_of_one_kind_are_counted_after_ten(source: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 2})
    for i in range(13):
        (source / "river" / f"bad {i}.png").write_bytes(b"")
    report = faults_of(source)
    assert report.count("cannot be read (no picture in one of the formats") == 10
    assert "and 3 more" in report


def test_the_same_image_in_two_classes_is_a_fault(source: Path) -> None:
    paint_classes(source, {"river": 4, "forest": 4})
    paint(source / "forest" / "copy.png", 0)
    report = faults_of(source)
    assert "the same image is in two classes" in report
    assert "forest/copy.png" in report


def test_the_same_image_in_two_classes_cannot_be_accepted(source: Path) -> None:
    paint_classes(source, {"river": 4, "forest": 4})
    paint(source / "forest" / "copy.png", 0)
    accept = ["duplicate-across-subsets", "duplicate-class-names"]
    assert "the same image is in two classes" in faults_of(source, accept=accept)


@pytest.mark.parametrize("twin", ["Forest_floor", "forest floor", "forest__floor"])
def test_two_class_folders_with_the_same_words_are_a_fault(source: Path, twin: str) -> None:
    report = faults_of(paint_classes(source, {"forest_floor": 2, twin: 2, "river": 2}))
    assert "class names stand twice (rename one, or accept duplicate-class-names): forest floor" in report


@pytest.mark.parametrize("sign", [*TOKENIZER_SIGNS, "<|EndOfText|>"])
def test_a_class_name_with_a_tokenizers_own_sign_is_a_fault(source: Path, sign: str) -> None:
    lines = [f"{label}/{number}.png,{label}" for label in ("a", "b") for number in range(2)]
    write_csv(source, "path,label", *[line.replace(",b", f",b {sign}") for line in lines])
    paint_classes(source, {"a": 2, "b": 2})
    assert faults_of(source, card=CSV) == (
        f"data set toy has 1 fault:\n  - class names hold a tokenizer's own sign (rename the class): b {sign}"
    )


def test_a_class_name_with_a_control_character_is_a_fault_that_can_be_printed(source: Path) -> None:
    paint_classes(source, {"a": 2, "b": 2, "c\x01": 2})
    assert "class names hold a character that is no text (rename the class): c\\x01" in faults_of(source)


def test_accepted_duplicate_class_names_stay_two_labels_with_their_own_images(source: Path) -> None:
    paint_classes(source, {"crane": 4, "crane_": 4, "river": 4})
    dataset = import_folder(source, accept=["duplicate-class-names"])
    assert dataset.class_names == ("crane", "crane", "river")
    assert [sum(image.label == label for image in dataset.images) for label in range(3)] == [4, 4, 4]


def test_all_faults_come_in_one_report(source: Path) -> None:
    paint_classes(source, {"river": 4, "forest": 4, "sea": 0, "SEA": 0, "lake": 1})
    paint(source / "forest" / "copy.png", 0)
    (source / "river" / "bad.png").write_bytes(b"")
    report = faults_of(source)
    for fault in (
        "class names stand twice",
        "images cannot be read",
        "the same image is in two classes",
        "classes have no image",
        "classes have no test image",
    ):
        assert report.count(f"\n  - {fault}") == 1
    assert report.startswith("data set toy has 5 faults:")


def test_a_fault_leaves_an_earlier_data_set_untouched(source: Path) -> None:
    dataset = import_folder(paint_classes(source, {"river": 2, "forest": 2}))
    (source / "river" / "bad.png").write_bytes(b"")
    with pytest.raises(DatasetError, match="data set toy has 1 fault:"):
        import_folder(source)
    assert read_dataset(dataset.root) == dataset


# The normal form


def test_a_data_set_whose_manifest_was_edited_is_refused(source: Path) -> None:
    dataset = import_folder(paint_classes(source, {"river": 2, "forest": 2}))
    manifest = dataset.root / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(",train,", ",test,"))
    with pytest.raises(DatasetError, match=r"manifest\.csv and dataset\.json do not belong together: run `dvc repro"):
        read_dataset(dataset.root)


def test_a_data_set_of_another_schema_is_refused(source: Path) -> None:
    dataset = import_folder(paint_classes(source, {"river": 2, "forest": 2}))
    card = dataset.root / "dataset.json"
    card.write_text(card.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(DatasetError, match=r"dataset\.json has schema 99, not 1: run `dvc repro`"):
        read_dataset(dataset.root)


def test_the_digest_of_a_data_set_does_not_depend_on_file_names(tmp_path: Path) -> None:
    first = paint_classes(tmp_path / "a" / "source", {"river": 4, "forest": 4})
    second = shutil.copytree(first, tmp_path / "b" / "source")
    (second / "river" / "0.png").rename(second / "river" / "z.png")
    assert import_folder(first).digest == import_folder(second).digest


def test_the_digest_of_a_data_set_depends_on_every_image(tmp_path: Path) -> None:
    first = paint_classes(tmp_path / "a" / "source", {"river": 4, "forest": 4})
    second = shutil.copytree(first, tmp_path / "b" / "source")
    paint(second / "river" / "0.png", 99)
    assert import_folder(first).digest != import_folder(second).digest


# CSV


def test_a_csv_file_lists_paths_and_labels(source: Path) -> None:
    paint_classes(source / "all", {"x": 8})
    lines = [f"all/x/{i}.png,{'river' if i % 2 else 'forest_floor'}" for i in range(8)]
    dataset = import_folder(write_csv(source, "path,label", *lines), card=CSV)
    assert by_subset(dataset) == {"forest floor": {"train": 2, "test": 2}, "river": {"train": 2, "test": 2}}


def test_a_subset_column_decides_the_subsets(source: Path) -> None:
    paint_classes(source, {"a": 6, "b": 6})
    subsets = ["train", "Training", "val", "validation", "test", "TESTING"]
    lines = [f"{c}/{i}.png,{c},{subset}" for c in "ab" for i, subset in enumerate(subsets)]
    dataset = import_folder(write_csv(source, "path,label,subset", *lines), card=CSV)
    found = {image.path: image.subset for image in dataset.images}
    assert [found[f"images/b/{i}.png"] for i in range(6)] == ["train", "train", "val", "val", "test", "test"]


def test_rows_without_a_subset_are_trained_on_where_others_name_one(source: Path) -> None:
    paint_classes(source, {"a": 2, "b": 2})
    write_csv(source, "path,label,split", "a/0.png,a,", "a/1.png,a,test", "b/0.png,b,", "b/1.png,b,test")
    assert by_subset(import_folder(source, card=CSV))["a"] == {"train": 1, "test": 1}


def test_a_csv_file_with_a_byte_order_mark_is_read(source: Path) -> None:
    paint_classes(source, {"a": 2, "b": 2})
    lines = [f"{c}/{i}.png,{c}" for c in "ab" for i in range(2)]
    assert len(import_folder(write_csv(source, "path,label", *lines, encoding="utf-8-sig"), card=CSV).images) == 4


@pytest.mark.parametrize("header", ["file,class", "FileName,Class_Name", "label,image"])
def test_columns_may_have_other_usual_names_and_any_order(source: Path, header: str) -> None:
    paint_classes(source, {"a": 2, "b": 2})
    lines = [f"{c},{c}/{i}.png" if header.startswith("label") else f"{c}/{i}.png,{c}" for c in "ab" for i in range(2)]
    assert len(import_folder(write_csv(source, header, *lines), card=CSV).images) == 4


@pytest.mark.parametrize("header", ["path", "name,label", "path;label"])
def test_missing_columns_are_a_sentence_with_those_there_are(source: Path, header: str) -> None:
    write_csv(source, header, "x")
    with pytest.raises(DatasetError, match=rf"list\.csv needs the columns path and label; it has: .*{header[:4]}"):
        import_folder(source, card=CSV)


def test_an_empty_csv_file_is_a_sentence(source: Path) -> None:
    source.mkdir()
    (source / "list.csv").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"list\.csv needs the columns path and label"):
        import_folder(source, card=CSV)


def test_a_csv_file_that_does_not_exist_is_a_sentence(source: Path) -> None:
    source.mkdir()
    with pytest.raises(DatasetError, match=r"list\.csv"):
        import_folder(source, card=CSV)


def test_a_csv_file_that_is_not_utf_8_is_a_sentence(source: Path) -> None:
    write_csv(source, "path,label", "x.png,Flüsse", encoding="latin-1")
    with pytest.raises(DatasetError, match=r"list\.csv"):
        import_folder(source, card=CSV)


def test_all_faults_of_a_csv_file_come_at_once(source: Path) -> None:
    paint_classes(source, {"a": 2, "b": 2})
    lines = ["a/0.png,a,train", "a/1.png,a,", ",b,train", "b/0.png,,train", "b/1.png,b,tests", "b/7.png,b,test"]
    report = faults_of(write_csv(source, "path,label,subset", *lines), card=CSV)
    assert "lines of list.csv lack a path or a label: line 4, line 5" in report
    assert "subsets of list.csv other than train, val, test: tests" in report
    assert "images cannot be read (replace or remove them)" in report
    assert "b/7.png is missing" in report
    assert report.startswith("data set toy has 3 faults:")


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../secret.png"])
def test_a_csv_path_that_leaves_the_folder_is_a_fault(source: Path, path: str) -> None:
    paint_classes(source, {"a": 2, "b": 2})
    paint(source.parent / "secret.png", 99)
    write_csv(source, "path,label", "a/0.png,a", f"{path},b")
    with pytest.raises(DatasetError, match=r"paths leave the folder .+source: .+(secret|passwd)"):
        import_folder(source, card=CSV)
    assert not (source.parent / "out").exists()


def test_a_link_that_leaves_the_folder_is_a_fault_in_a_csv_file(source: Path) -> None:
    paint_classes(source, {"a": 2, "b": 2})
    (source / "link.png").symlink_to(paint(source.parent / "secret.png", 99))
    write_csv(source, "path,label", "a/0.png,a", "link.png,b")
    with pytest.raises(DatasetError, match=r"paths leave the folder .+link\.png"):
        import_folder(source, card=CSV)


def test_a_path_that_leaves_the_folder_and_comes_back_writes_nothing_outside_the_data_set(source: Path) -> None:
    paint_classes(source, {"a": 2, "b": 2})
    lines = [f"{c}/{i}.png,{c}" for c in "ab" for i in range(2)]
    paint(source / "c.png", 50)
    write_csv(source, "path,label", *lines, "../../deep/source/c.png,a")
    deep = shutil.copytree(source, source.parent / "deep" / "source")
    before = {path for path in source.parent.rglob("*") if path.is_file()}
    with contextlib.suppress(DatasetError):
        import_dataset(CSV, deep, source.parent / "x" / "target", test_fraction=0.5)
    new = {path for path in source.parent.rglob("*") if path.is_file()} - before
    assert [path for path in new if not path.resolve().is_relative_to(source.parent / "x" / "target")] == []


def csv_of(folder: Path, header: str, line: str) -> Path:
    """Two classes with four images each and a line of the list for each of them, made from {path} and {label}."""
    paint_classes(folder, {"a": 4, "b": 4})
    lines = [line.format(path=f"{label}/{i}.png", label=label) for label in "ab" for i in range(4)]
    return write_csv(folder, header, *lines)


@pytest.mark.parametrize("other", ["class", "class_name", "CLASS"])
def test_the_documented_column_wins_wherever_it_stands_and_the_other_is_noted(source: Path, other: str) -> None:
    dataset = import_folder(csv_of(source, f"{other},path,label", "animal,{path},{label}"), card=CSV)
    assert dataset.class_names == ("a", "b")
    assert dataset.about["notes"] == [f"columns of list.csv were not used: {other.lower()} (label is there)"]


def test_a_column_that_stands_twice_is_a_sentence(source: Path) -> None:
    csv_of(source, "path,label,Label", "{path},{label},x")
    with pytest.raises(DatasetError, match=r"list\.csv has more than one column label: remove the others"):
        import_folder(source, card=CSV)


def test_a_label_with_a_comma_and_no_quotes_is_one_fault_and_never_cut(source: Path) -> None:
    assert faults_of(csv_of(source, "path,label", "{path},salt, {label}"), card=CSV).startswith(
        "data set toy has 1 fault:\n  - lines of list.csv have more cells than the header (put quotes around a label "
        "with a comma): line 2, line 3"
    )


@pytest.mark.parametrize(("header", "line"), [("path,label", '{path},"salt, {label}"'),
                                              ("path, label", '{path}, "salt, {label}"')])  # fmt: skip
def test_a_label_with_a_comma_in_quotes_is_whole(source: Path, header: str, line: str) -> None:
    assert import_folder(csv_of(source, header, line), card=CSV).class_names == ("salt, a", "salt, b")


@pytest.mark.parametrize("header", ["path, label", " path ,label\t", "path,label,,"])
def test_blanks_and_empty_cells_around_columns_do_not_count(source: Path, header: str) -> None:
    assert len(import_folder(csv_of(source, header, "{path}, {label},,"), card=CSV).images) == 8


def test_a_quote_that_never_ends_is_a_sentence_and_swallows_no_lines(source: Path) -> None:
    write_csv(csv_of(source, "path,label", "{path},{label}"), "path,label", "a/0.png,a", 'a/1.png,"a', "b/0.png,b")
    with pytest.raises(DatasetError, match=r"list\.csv is not a CSV file, line \d+ \(unexpected end of data\)"):
        import_folder(source, card=CSV)


def test_lines_are_counted_as_an_editor_counts_them(source: Path) -> None:
    paint_classes(source, {"a": 2})
    write_csv(source, "path,label", "", '"a/0.png","a', 'b"', "a/1.png,")
    assert "lack a path or a label: line 5" in faults_of(source, card=CSV)


def test_a_csv_file_without_lines_is_one_fault(source: Path) -> None:
    report = faults_of(write_csv(source, "path,label"), card=CSV)
    assert report == f"data set toy has 1 fault:\n  - no images are listed in: {source}/list.csv"


@pytest.mark.parametrize("form", ["./{}", "{} ", "{root}/{}", "x/../{}"])
def test_a_path_in_a_csv_file_may_have_any_form_that_stays_in_the_folder(source: Path, form: str) -> None:
    csv_of(source, "path,label", f"{form.format('{path}', root=source)},{{label}}")
    assert {image.path for image in import_folder(source, card=CSV).images} >= {"images/a/0.png", "images/b/3.png"}


def test_separators_of_windows_are_understood_where_no_file_has_them(source: Path) -> None:
    csv_of(source, "path,label", "{path},{label}")
    listed = (source / "list.csv").read_text().replace("/", "\\")
    paint(source / "a\\0.png", 50)
    (source / "list.csv").write_text(listed)
    found = {image.path for image in import_folder(source, card=CSV).images}
    assert found >= {"images/a\\0.png", "images/a/1.png"}


def test_a_path_with_a_drive_leaves_the_folder(source: Path) -> None:
    csv_of(source, "path,label", "C:\\photos\\{path},{label}")
    assert "paths leave the folder" in faults_of(source, card=CSV)


@pytest.mark.parametrize("path", ["../secret.png", "a\0b.png", "x" * 300])
def test_a_path_that_cannot_be_costs_the_others_their_verdict_nothing(source: Path, path: str) -> None:
    csv_of(source, "path,label", "{path},{label}")
    (source / "b" / "0.png").write_bytes(b"")
    with (source / "list.csv").open("a") as file:
        file.write(f"{path},a\n")
    report = faults_of(source, card=CSV)
    assert report.startswith("data set toy has 2 faults:")
    assert "b/0.png cannot be read" in report
    assert "\0" not in report


def test_a_slice_of_an_array_is_no_image_of_a_csv_file(source: Path) -> None:
    csv_of(source, "path,label", "{path},{label}")
    np.save(source / "x.npy", np.zeros((2, 8, 8), np.uint8))
    with (source / "list.csv").open("a") as file:
        file.write("x.npy#0,a\n")
    assert "x.npy#0 is missing" in faults_of(source, card=CSV)


def test_a_listed_pipe_is_a_fault_and_not_waited_for(source: Path) -> None:
    csv_of(source, "path,label", "{path},{label}")
    (source / "a" / "0.png").unlink()
    os.mkfifo(source / "a" / "0.png")
    assert "a/0.png is no regular file" in faults_of(source, card=CSV)


@pytest.mark.parametrize("card", [CSV, SPLIT, IDX], ids=lambda card: card.layout)
def test_a_pipe_for_the_list_itself_is_a_sentence_and_not_waited_for(source: Path, card: Card) -> None:
    source.mkdir()
    os.mkfifo(source / (card.index or "train-images-idx3-ubyte.gz"))
    with pytest.raises(DatasetError, match="is no regular file: "):
        import_folder(source, card=card)


def test_a_card_without_the_index_that_its_layout_needs_is_a_sentence(source: Path) -> None:
    source.mkdir()
    with pytest.raises(DatasetError, match="dataset card toy: layout csv needs index"):
        import_folder(source, card=Card(name="toy", layout="csv"))


@pytest.mark.parametrize(("line", "fault"), [
    ("b/1.png,", "lack a path or a label: line 2"), ("b/1.png,b,dev", "other than train, val, test: dev"),
    ("../0.png,b", "paths leave the folder"),
])  # fmt: skip
def test_a_line_that_is_not_understood_is_the_only_fault(source: Path, line: str, fault: str) -> None:
    paint_classes(source, {"a": 2, "b": 2})
    lines = ["a/0.png,a,test", "a/1.png,a,train", "b/0.png,b,train"]
    report = faults_of(write_csv(source, "path,label,subset", line, *lines), card=CSV)
    assert report.startswith("data set toy has 1 fault:")
    assert fault in report


# Split files of the papers


def test_a_split_file_decides_labels_and_subsets(source: Path) -> None:
    dataset = import_folder(write_split(source, paint_split(source)), card=SPLIT)
    expected = {"train": 2, "val": 1, "test": 1}
    assert by_subset(dataset) == {"forest": expected, "river": expected}


def test_a_split_file_is_read_when_it_is_in_the_folder(source: Path) -> None:
    card, folder = read_source(write_split(source, paint_split(source)))
    dataset = import_dataset(card, folder, source.parent / "out", test_fraction=0.5)
    assert {image.subset for image in dataset.images} == {"train", "val", "test"}


@pytest.mark.parametrize("below", ["images", "caltech/101_ObjectCategories"])
def test_the_image_root_of_a_split_file_is_found_below_its_folder(source: Path, below: str) -> None:
    dataset = import_folder(write_split(source, paint_split(source, below=below)), card=SPLIT)
    assert all(image.path.startswith(f"images/{below}/") for image in dataset.images)


def test_a_split_files_labels_need_not_be_in_alphabetical_order(source: Path) -> None:
    split = paint_split(source)
    for rows in split.values():
        rows[:] = [(path, 1 - label, name) for path, label, name in rows]
    dataset = import_folder(write_split(source, split), card=SPLIT)
    assert dataset.class_names == ("river", "forest")
    assert {image.label for image in dataset.images if "river/" in image.path} == {0}


def test_a_cards_mapping_renames_the_classes_of_a_split_file(source: Path) -> None:
    card = SPLIT.model_copy(update={"class_names": {"river": "River_or_Lake"}})
    assert import_folder(write_split(source, paint_split(source)), card=card).class_names == ("forest", "River or Lake")


def test_gaps_in_the_labels_are_a_fault(source: Path) -> None:
    split = paint_split(source)
    for rows in split.values():
        rows[:] = [(path, 3 * label, name) for path, label, name in rows]
    report = faults_of(write_split(source, split), card=SPLIT)
    assert "labels of split_zhou_Toy.json have gaps: 1 to 2" in report


def test_an_image_that_a_split_file_lists_and_that_is_missing_is_a_fault(source: Path) -> None:
    write_split(source, paint_split(source))
    (source / "river" / "7.png").unlink()
    assert "river/7.png is missing" in faults_of(source, card=SPLIT)


@pytest.mark.parametrize(
    "split",
    [
        [], {"train": [["a.png", 0]]}, {"train": [["a.png", "zero", "a"]]}, {"train": 3}, "x", {"validation": []},
        {"train": [["a.png", float("inf"), "a"]]}, {"train": [["a.png", True, "a"]]}, {"train": [["a.png", -1, "a"]]},
        {"train": [[5, 0, "a"]]}, {"train": [[None, 0, "a"]]}, {"train": [["a.png", 0, None]]},
        {"train": [["", 0, ""]]}, {"train": {"a.png": 0}}, {"\ud800": 1}, {"train": ["abc"]},
    ],
    ids=repr,
)  # fmt: skip
def test_a_json_file_that_is_no_split_file_is_a_sentence(source: Path, split: object) -> None:
    write_split(source, split)
    with pytest.raises(DatasetError, match=r"split_zhou_Toy\.json is not a split file \(.+\): expected train, val and"):
        import_folder(source, card=SPLIT)


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"train": [], "train": []}', "[" + "9" * 5_000 + "]"],
                         ids=["deep", "twice", "digits"])  # fmt: skip
def test_json_that_cannot_be_a_split_file_is_a_sentence(source: Path, text: str) -> None:
    source.mkdir()
    (source / SPLIT.index).write_text(text)
    with pytest.raises(DatasetError, match=r"split_zhou_Toy\.json is not a split file \([^\n]+\): expected train"):
        import_folder(source, card=SPLIT)


def test_a_label_of_a_thousand_million_is_a_gap_and_takes_no_memory(source: Path) -> None:
    split = paint_split(source)
    split["train"].append(("sea/0.png", 10**9, "sea"))
    paint(source / "sea" / "0.png", 50)
    report = faults_of(write_split(source, split), card=SPLIT)
    assert report == "data set toy has 1 fault:\n  - labels of split_zhou_Toy.json have gaps: 2 to 999999999"


@pytest.mark.parametrize("path", ["\ud800", "a\0", "x" * 300])
def test_a_path_that_no_file_can_have_is_a_fault_that_can_be_printed(source: Path, path: str) -> None:
    split = paint_split(source)
    split["train"].append((path, 0, "forest"))
    report = faults_of(write_split(source, split), card=SPLIT).encode().decode()
    assert report.startswith("data set toy has 1 fault:")
    assert "\0" not in report


@pytest.mark.parametrize("name", ["y.npy#0", "x.npy#0", "x.npy#99"])
def test_a_slice_of_an_array_is_no_image_of_a_split_file(source: Path, name: str) -> None:
    split = paint_split(source)
    np.save(source / "x.npy", np.zeros((2, 8, 8), np.uint8))
    split["train"].append((name, 0, "forest"))
    assert f"{name} is missing" in faults_of(write_split(source, split), card=SPLIT)


def test_the_image_root_is_found_though_the_first_image_is_missing(source: Path) -> None:
    split = paint_split(source, below="images")
    split["train"].insert(0, ("forest/gone.png", 0, "forest"))
    report = faults_of(write_split(source, split), card=SPLIT)
    assert report.count("is missing") == 1
    assert "images/forest/gone.png is missing" in report


def test_a_split_file_that_is_missing_is_a_sentence(source: Path) -> None:
    source.mkdir()
    with pytest.raises(DatasetError, match=r"split_zhou_Toy\.json is missing: correct the card's index"):
        import_folder(source, card=SPLIT)


def test_a_split_files_path_that_leaves_the_folder_is_a_fault(source: Path) -> None:
    split = paint_split(source)
    paint(source.parent / "secret.png", 99)
    split["test"].append(("../secret.png", 0, "forest"))
    with pytest.raises(DatasetError, match=r"paths leave the folder .+secret\.png"):
        import_folder(write_split(source, split), card=SPLIT)


# IDX files


def test_idx_files_become_arrays_with_a_path_a_slice(source: Path) -> None:
    pixels = write_idx_files(source)
    dataset = import_folder(source, card=IDX)
    np.testing.assert_array_equal(read_array(dataset.root / "train.npy"), pixels["train"])
    np.testing.assert_array_equal(read_array(dataset.root / "test.npy"), pixels["t10k"])
    assert [(image.path, image.label, image.subset) for image in dataset.images] == [
        ("train.npy#0", 0, "train"), ("train.npy#1", 1, "train"), ("train.npy#2", 1, "train"),
        ("train.npy#3", 0, "train"), ("test.npy#0", 1, "test"), ("test.npy#1", 0, "test"),
    ]  # fmt: skip
    assert dataset.images[2].digest == digest_bytes(pixels["train"][2].tobytes())


def test_idx_classes_are_the_cards_words(source: Path) -> None:
    write_idx_files(source)
    dataset = import_folder(source, card=IDX)
    assert dataset.class_names == ("t-shirt", "ankle boot")
    assert read_dataset(dataset.root) == dataset


def test_idx_files_need_class_names_as_a_list(source: Path) -> None:
    write_idx_files(source)
    with pytest.raises(DatasetError, match="layout idx needs class_names as a list in label order"):
        import_folder(source, card=Card(name="toy", layout="idx"))


def test_an_idx_label_without_a_class_name_is_a_fault(source: Path) -> None:
    write_idx_files(source, {"train": [0, 1, 2], "t10k": [0, 1]})
    with pytest.raises(DatasetError, match="the train images and labels do not fit each other or the class names"):
        import_folder(source, card=IDX)


def test_idx_files_of_unequal_length_are_a_fault(source: Path) -> None:
    write_idx_files(source)
    write_idx(source / "t10k-labels-idx1-ubyte.gz", np.array([0, 1, 0]))
    with pytest.raises(DatasetError, match="the test images and labels do not fit each other or the class names"):
        import_folder(source, card=IDX)


def test_a_class_without_idx_images_is_a_fault(source: Path) -> None:
    write_idx_files(source, {"train": [0, 1], "t10k": [0, 0]})
    assert "classes have no test image (each needs one to train on and another to test on): ankle boot" in faults_of(
        source, card=IDX
    )


def test_the_same_idx_slice_in_two_classes_is_a_fault(source: Path) -> None:
    pixels = write_idx_files(source)["train"].copy()
    pixels[1] = pixels[0]
    write_idx(source / "train-images-idx3-ubyte.gz", pixels)
    assert "the same image is in two classes: train.npy#0 = train.npy#1" in faults_of(source, card=IDX)


def test_a_truncated_idx_file_is_a_sentence(source: Path) -> None:
    write_idx_files(source)
    path = source / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(DatasetError, match=r"train-images-idx3-ubyte\.gz is truncated: its header promises"):
        import_folder(source, card=IDX)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x01", b"\x89PNG" + bytes(40)], ids=["empty", "short", "png"])
def test_a_file_that_is_no_idx_file_is_a_sentence(source: Path, content: bytes) -> None:
    write_idx_files(source)
    (source / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DatasetError, match=r"train-images-idx3-ubyte\.gz is not an IDX file of 3 dimensions: fetch it"):
        import_folder(source, card=IDX)


def test_an_idx_file_that_is_missing_is_a_sentence(source: Path) -> None:
    write_idx_files(source)
    (source / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DatasetError, match=r"t10k-labels-idx1-ubyte\.gz"):
        import_folder(source, card=IDX)
    assert not (source.parent / "out").exists()


def test_nothing_is_held_out_where_no_test_fraction_is_asked(source: Path, tmp_path: Path) -> None:
    paint_classes(source, {"river": 2, "forest": 1})
    dataset = import_dataset(*read_source(source), tmp_path / "raw", test_fraction=0)
    assert [image.subset for image in dataset.images] == ["train"] * 3


def test_a_class_that_is_only_tested_cannot_be_learned(source: Path, tmp_path: Path) -> None:
    paint_classes(source / "train", {"river": 2, "forest": 1})
    paint_classes(source / "test", {"sea": 2}, first=9)
    with pytest.raises(DatasetError, match=r"classes have no train image \(.*\): sea$"):
        import_dataset(*read_source(source), tmp_path / "raw", test_fraction=0)
