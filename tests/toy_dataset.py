"""A data set of toy images as the importer gives it."""

from pathlib import Path

from toy_images import paint_classes

from coop_core.data.catalog import read_source
from coop_core.data.dataset import Dataset
from coop_core.data.importers import import_dataset


def toy_dataset(folder: Path) -> Dataset:
    """Three classes of 14 images, two fifths of them for testing."""
    paint_classes(folder / "toys", {"cat": 14, "dog": 14, "large dog": 14})
    card, beside = read_source(folder / "toys")
    return import_dataset(card, beside / card.path, folder / "raw", test_fraction=0.4, accept=[])
