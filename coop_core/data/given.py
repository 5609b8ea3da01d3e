"""Given images: a folder, a CSV file, or pictures and their class names -> a data set to learn from, in normal form.

Images in a folder `test` beside `train` keep their subset; no other image is held out for testing.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coop_core.data.catalog import Card, read_source
from coop_core.data.dataset import Dataset
from coop_core.data.images import Source, decoded
from coop_core.data.importers import import_dataset, import_images
from coop_core.errors import DatasetError

Images = str | Path | Iterable[Source | str]
"""A folder of class folders or a CSV file with path and label; or pictures: paths, PIL images, uint8 arrays, bytes."""


def read_given(
    images: Images,
    labels: Iterable[str] | None,
    folder: Path,
    *,
    template: str,
    descriptions: dict[str, list[str]] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Dataset:
    """The images, each looked at, in their normal form below `folder`; pictures need `labels`, a class name each.

    `descriptions` are sentences a class by its name.

    Raises
    ------
    DatasetError
        With all faults of the images at once.
    """
    target = folder / "raw"
    if labels is not None:
        pictures, names = image_pairs(images, labels)
        own = Card(name="images").model_copy(update={"template": template, "descriptions": descriptions})
        return import_images(own, _as_files(pictures, folder / "pictures"), names, target, progress=progress)
    if not isinstance(images, str | Path):
        raise DatasetError("images without labels must be a folder of class folders or a CSV file: give its path, or "
                           "a class name for each image")  # fmt: skip
    place = Path(images)
    if not place.is_dir() and not (place.suffix.lower() == ".csv" and place.is_file()):
        raise DatasetError(f"{place} is no folder of class folders and no CSV file with path and label: give one, or "
                           "a list of images with their labels")  # fmt: skip
    card, below = read_source(place)
    own = card.model_copy(update={"template": template, "descriptions": descriptions})
    return import_dataset(own, below, target, test_fraction=0, progress=progress)


def image_pairs(images: Images, labels: Iterable[str]) -> tuple[list[Source | str], list[str]]:
    """As many pictures as class names.

    Raises
    ------
    DatasetError
        When their numbers differ, there are none, or a label is no text.
    """
    if isinstance(images, str | bytes | Path | Image.Image) or isinstance(labels, str):
        raise DatasetError("a list of images and a list of labels are wanted, not one: write [image], [label]")
    pictures, names = list(images), list(labels)
    if len(pictures) != len(names) or not pictures:
        raise DatasetError(f"there are {len(pictures)} images and {len(names)} labels: give each image its label")
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise DatasetError(f"label {wrong[0]!r} is no class name, and the text tower reads words: give names such as "
                           "'forest', not numbers")  # fmt: skip
    return pictures, names


def _as_files(pictures: Sequence[Source | str], folder: Path) -> list[Path]:
    """Paths as they are; what is in memory becomes a file."""
    folder.mkdir()
    return [Path(one) if isinstance(one, str | Path) else _as_file(one, number, folder)
            for number, one in enumerate(pictures)]  # fmt: skip


def _as_file(picture: Any, number: int, folder: Path) -> Path:
    if not isinstance(picture, bytes | Image.Image | np.ndarray):
        raise DatasetError(f"image {number} is a {type(picture).__name__}: give a path, a PIL image, an array of uint8 "
                           "or a file's bytes")  # fmt: skip
    file = folder / f"{number}.png"
    try:
        with decoded(picture) as found:
            found.image.save(file)
    except DatasetError as error:
        raise DatasetError(f"image {number}: {error}") from None
    return file
