"""The data set in its one normal form: data/raw -> class names and images with label, subset and digest."""

import csv
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from coop_core.errors import DatasetError
from coop_core.files import as_csv, digest_json, read_json, write_json, write_text

SCHEMA = 1
NO_LABEL = -1
"""Of an image that nobody has labelled, or whose label is not to be read."""
Subset = Literal["train", "val", "test"]
SUBSETS: tuple[Subset, ...] = ("train", "val", "test")
SUBSET_NAMES: dict[str, Subset] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""What sources call them, in lower case."""


@dataclass(frozen=True)
class LabelledImage:
    path: str
    """Relative to the data set's folder; `train.npy#12` is slice 12 of an array."""
    label: int
    subset: Subset
    digest: str
    """SHA-256 of the file's bytes or of the slice's."""


@dataclass(frozen=True)
class Dataset:
    root: Path
    name: str
    class_names: tuple[str, ...]
    """The words shown to the text tower; the position is the label."""
    template: str
    """The data set's own hand-written prompt, with one {} for the class name."""
    images: tuple[LabelledImage, ...]
    about: dict[str, Any]
    """Title, licence, homepage, where it came from, and notes of its validation."""
    descriptions: tuple[tuple[str, ...], ...] = ()
    """Sentences a class, for methods that read them; empty where the source has none."""

    def __repr__(self) -> str:
        """For people: images would fill pages."""
        return f"Dataset({self.name!r}, {len(self.class_names)} classes, {len(self.images)} images in {self.root})"

    @property
    def digest(self) -> str:
        """Changes with any image, label, subset, class name, description or the template; not with paths."""
        images = sorted((image.digest, image.label, image.subset) for image in self.images)
        described = [self.descriptions] if self.descriptions else []
        return digest_json([self.class_names, self.template, images, *described])

    def counts(self) -> dict[str, dict[str, int]]:
        """Images a class and subset: {class name: {subset: count}}."""
        found = Counter((image.label, image.subset) for image in self.images)
        names = distinct(self.class_names)
        return {name: {subset: found[label, subset] for subset in SUBSETS} for label, name in enumerate(names)}


def words(class_folder: str) -> str:
    """The words of a class folder: `forest_floor` -> `forest floor`, in composed Unicode."""
    return " ".join(unicodedata.normalize("NFC", class_folder).replace("_", " ").split())


def shown(text: str) -> str:
    """A text on one line that terminals and files can take: controls, line ends and halves of characters (as in file
    names that are no UTF-8) are escaped."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} else character
        for character in text
    )  # fmt: skip


def distinct(class_names: Sequence[str]) -> list[str]:
    """Class names as keys: a name that stands twice gets its label."""
    counts = Counter(class_names)
    return [f"{name} (label {label})" if counts[name] > 1 else name for label, name in enumerate(class_names)]


def has_one_hole(template: str) -> bool:
    """Whether a template takes a class name and nothing else."""
    try:
        return [field for _, field, _, _ in Formatter().parse(template) if field is not None] == [""]
    except ValueError:
        return False


def write_dataset(dataset: Dataset) -> None:
    """Write dataset.json and manifest.csv into the data set's folder; the images are there already."""
    rows = ((image.path, image.label, image.subset, image.digest) for image in dataset.images)
    write_text(dataset.root / "manifest.csv", as_csv([("path", "label", "subset", "digest"), *rows]))
    write_json(
        dataset.root / "dataset.json",
        {
            "schema": SCHEMA,
            "name": dataset.name,
            "class_names": list(dataset.class_names),
            "template": dataset.template,
            "descriptions": dataset.descriptions,
            "digest": dataset.digest,
            "counts": dataset.counts(),
            "about": dataset.about,
        },
    )


def read_dataset(root: Path) -> Dataset:
    """Read what `write_dataset` wrote.

    Raises
    ------
    DatasetError
        When the folder is of another schema or was changed by hand.
    """
    card = read_json(root / "dataset.json")
    if card.get("schema") != SCHEMA:
        raise DatasetError(f"{root}/dataset.json has schema {card.get('schema')}, not {SCHEMA}: run `dvc repro`")
    with (root / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows: Iterable[dict[str, Any]] = csv.DictReader(file)
        images = tuple(LabelledImage(row["path"], int(row["label"]), row["subset"], row["digest"]) for row in rows)
    dataset = Dataset(
        root, card["name"], tuple(card["class_names"]), card["template"], images, card["about"],
        tuple(map(tuple, card.get("descriptions", ()))),
    )  # fmt: skip
    if dataset.digest != card["digest"]:
        raise DatasetError(f"{root}: manifest.csv and dataset.json do not belong together: run `dvc repro -f download`")
    return dataset
