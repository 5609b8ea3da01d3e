"""The catalogue against trees in the real layouts: each card imports its own data set and refuses any other."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from toy_images import paint

from coop_core.data.catalog import Card, PublishedCounts, read_class_names, read_source
from coop_core.data.dataset import Dataset
from coop_core.data.importers import import_dataset
from coop_core.errors import DatasetError
from coop_core.params import DatasetParams
from pipelines.settings import Settings
from pipelines.sources.datasets import cached_dataset

ROOT = Path(__file__).parents[1]
CARDS = {path.stem: read_source(path)[0] for path in sorted((ROOT / "catalog").glob("*.yaml"))}
WORDNET = ROOT / "catalog/imagenet-classnames.txt"
WNIDS = [line.split()[0] for line in WORDNET.read_text().splitlines()]
SPLIT = {"train": 2, "val": 1, "test": 1}
"""Images a class of the trees that are painted here."""
JUDGED_ALONE = ("imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r")


def names_of(card: Card) -> list[str]:
    """Three of its classes, as its files call them."""
    if card.published and isinstance(card.published.classes, list):
        return card.published.classes[:3]
    return {"imagenetv2": ["0", "2", "10"], "imagenet-r": ["n01443537", "n02007558", "n07873807"]}.get(
        card.name, [WNIDS[0], WNIDS[5], WNIDS[999]] if card.name.startswith("imagenet") else ["maple tree", "a", "b"]
    )


def build(card: Card, root: Path) -> Card:
    """Paint a tree as the card's data set has it -> the card of so small a set."""
    names, folder = names_of(card), root / card.path
    make = {"split-json": _split_json, "lists": _lists, "folders": _wordnet_folders, "idx": _idx}[card.layout]
    counts = make(card, folder, names)
    if card.layout == "lists":
        card = card.model_copy(update={"class_names": read_class_names(folder / "variants.txt")})
    if card.layout == "folders":
        card = card.model_copy(update={"class_names": read_class_names(WORDNET)})
    if card.layout == "idx":
        return card.model_copy(update={"published": PublishedCounts(classes=10, **counts)})
    known = names if card.published and isinstance(card.published.classes, list) else len(names)
    return card.model_copy(update={"published": PublishedCounts(classes=known, **counts)})


def _split_json(card: Card, folder: Path, names: list[str]) -> dict[str, int]:
    split: dict[str, list[tuple[str, int, str]]] = {subset: [] for subset in SPLIT}
    number = 0
    for label, name in enumerate(names):
        for subset, count in SPLIT.items():
            for _ in range(count):
                place = f"{name.replace(' ', '_')}/{number}.jpg"
                paint(folder / "images" / place, number)
                split[subset].append((place, label, name))
                number += 1
    (folder / card.index).write_text(json.dumps(split))
    return {subset: len(rows) for subset, rows in split.items()}


def _lists(card: Card, folder: Path, names: list[str]) -> dict[str, int]:
    names[:] = ["707-320", "DC-9-30", "F/A-18"]
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("\n".join(names) + "\n")
    number = 1
    for subset, count in SPLIT.items():
        lines = []
        for name in names * count:
            paint(folder / f"images/{number:07}.jpg", number)
            lines.append(f"{number:07} {name}\n")
            number += 1
        (folder / card.index.replace("*", subset)).write_text("".join(lines))
    return {subset: 3 * count for subset, count in SPLIT.items()}


def _wordnet_folders(card: Card, folder: Path, names: list[str]) -> dict[str, int]:
    alone = card.name in JUDGED_ALONE
    number = 0
    for name in names:
        for place, count in {".": 2}.items() if alone else {"train": 2, "val": 1}.items():
            for _ in range(count):
                paint(folder / place / name / f"{number}.JPEG", number)
                number += 1
    (folder.parent / "README.txt").write_text("about")
    return {"test": 6} if alone else {"train": 6, "val": 0, "test": 3}


def _idx(card: Card, folder: Path, names: list[str]) -> dict[str, int]:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", 20), ("t10k", 10)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 5, 4), dtype=np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", (np.arange(count) % 10).astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return {"train": 20, "val": 0, "test": 10}


def imported(card: Card, root: Path, *, target: str = "out") -> Dataset:
    return import_dataset(card, root / card.path, root / target, test_fraction=0.5)


@pytest.mark.parametrize("name", CARDS)
def test_a_card_imports_its_data_set_and_refuses_one_of_another_size(name: str, tmp_path: Path) -> None:
    card = CARDS[name]
    small = build(card, tmp_path)
    dataset = imported(small, tmp_path)
    counts = {subset: sum(its[subset] for its in dataset.counts().values()) for subset in SPLIT}
    assert small.published
    wanted = {subset: getattr(small.published, subset) or 0 for subset in SPLIT}
    assert (counts, len(dataset.class_names)) == (wanted, small.published.number)
    assert dataset.template == card.template

    assert card.published
    with pytest.raises(DatasetError, match=rf"this is not the published .*, published {card.published.test}\b"):
        imported(small.model_copy(update={"published": card.published}), tmp_path, target="other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", CARDS)
def test_a_card_says_what_must_be_found(name: str) -> None:
    published = CARDS[name].published
    assert published
    assert published.test
    assert (published.train is None) == (name in JUDGED_ALONE)
    if name == "fashion-mnist":
        assert len(CARDS[name].class_names or ()) == published.number


def test_classes_that_are_called_otherwise_are_refused(tmp_path: Path) -> None:
    small = build(CARDS["btmri"], tmp_path)
    wanted = small.published.model_copy(update={"classes": ["glioma tumor", "pituitary tumor", "meningioma tumor"]})
    with pytest.raises(DatasetError, match=r"class 1 is 'meningioma tumor', published 'pituitary tumor'; class 2 is"):
        imported(small.model_copy(update={"published": wanted}), tmp_path)


# ImageNet and its variants


def test_the_validation_images_of_imagenet_judge(tmp_path: Path) -> None:
    dataset = imported(build(CARDS["imagenet"], tmp_path), tmp_path)
    assert dataset.class_names == ("tench", "electric ray", "toilet paper")
    assert {image.subset for image in dataset.images if "/val/" in image.path} == {"test"}


def test_the_folders_of_imagenet_v2_count_the_classes(tmp_path: Path) -> None:
    dataset = imported(build(CARDS["imagenetv2"], tmp_path), tmp_path)
    lines = WORDNET.read_text().splitlines()
    names = dict(zip(dataset.class_names, ("0", "10", "2"), strict=True))
    assert {folder: lines[int(folder)].split(maxsplit=1)[1] for folder in names.values()} == {
        folder: name for name, folder in names.items()
    }


def test_labels_of_imagenet_r_count_the_folders_there_are(tmp_path: Path) -> None:
    dataset = imported(build(CARDS["imagenet-r"], tmp_path), tmp_path)
    assert dataset.class_names == ("goldfish", "flamingo", "pizza")
    assert sorted({image.label for image in dataset.images}) == [0, 1, 2]


def test_a_wordnet_number_without_words_is_refused(tmp_path: Path) -> None:
    card = build(CARDS["imagenet-a"], tmp_path)
    for number in range(2):
        paint(tmp_path / card.path / "n99999999" / f"{number}.JPEG", 100 + number)
    counts = PublishedCounts(classes=4, test=8)
    with pytest.raises(DatasetError, match="n99999999 has no words"):
        imported(card.model_copy(update={"published": counts}), tmp_path)


def test_the_words_of_the_catalogue_are_open_clips_in_the_order_of_wordnet_numbers(open_clip) -> None:
    names = [line.split(maxsplit=1)[1] for line in WORDNET.read_text().splitlines()]
    assert tuple(names) == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert sorted(WNIDS) == WNIDS
    assert len(set(WNIDS)) == 1000


# Files of class names, and lists


def test_a_card_may_name_a_file_beside_it_for_its_class_names(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("n00000001 great cat\nn00000002 small dog\n")
    for number, folder in enumerate(("n00000001", "n00000002") * 2):
        paint(tmp_path / "images" / folder / f"{number}.png", number)
    (tmp_path / "card.yaml").write_text("name: toys\npath: images\nclass_names: names.txt")
    settings = Settings(_env_file=None, cache_folder=tmp_path / "cache")
    found = cached_dataset(DatasetParams(source=str(tmp_path / "card.yaml")), settings)
    assert found.class_names == ("great cat", "small dog")


@pytest.mark.parametrize(("text", "sentence"), [
    ("", r"names\.txt is no list of class names: expected a line a class, each `wnid words` or each `words`"),
    ("n00000001 cat\nriver\n", r"names\.txt is no list of class names"),
])  # fmt: skip
def test_a_file_that_is_no_list_of_class_names_is_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(DatasetError, match=sentence):
        read_class_names(tmp_path / "names.txt")


def test_a_file_of_class_names_that_is_missing_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"names\.txt with the class names is missing: put it there, or correct"):
        read_class_names(tmp_path / "names.txt")


def test_the_variants_of_aircraft_have_the_order_of_their_list(tmp_path: Path) -> None:
    assert imported(build(CARDS["fgvc-aircraft"], tmp_path), tmp_path).class_names == ("707-320", "DC-9-30", "F/A-18")


def test_a_list_that_is_missing_or_names_another_variant_is_a_sentence(tmp_path: Path) -> None:
    card = build(CARDS["fgvc-aircraft"], tmp_path)
    (tmp_path / card.path / "images_variant_val.txt").write_text("0000001 Zeppelin\n")
    with pytest.raises(DatasetError, match="classes are not in the card's class_names: Zeppelin"):
        imported(card, tmp_path)
    (tmp_path / card.path / "images_variant_val.txt").unlink()
    with pytest.raises(DatasetError, match=r"images_variant_val\.txt is missing: put the data set's own list there"):
        imported(card, tmp_path)


@pytest.mark.parametrize(("change", "sentence"), [
    ({"index": "list.txt"}, "layout lists needs index, the name of its lists with a \\* for train, val and test"),
    ({"class_names": None}, "layout lists needs class_names in label order"),
])  # fmt: skip
def test_a_card_of_lists_that_lacks_something_is_a_sentence(tmp_path: Path, change: dict, sentence: str) -> None:
    card = build(CARDS["fgvc-aircraft"], tmp_path)
    with pytest.raises(DatasetError, match=sentence):
        imported(card.model_copy(update=change), tmp_path)
