"""Importers: image folders, CSV lists, split JSON or IDX files -> one data set in its normal form.

Every layout is read, validated as a whole and only then written; a fault leaves the target untouched.
"""

import csv
import json
import shutil
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from coop_core import validation
from coop_core.archives import read_gzip
from coop_core.catalog import Card
from coop_core.dataset import SUBSETS, Dataset, LabelledImage, Subset, words, write_dataset
from coop_core.errors import DatasetError
from coop_core.files import digest_bytes, write_array
from coop_core.images import SUFFIXES
from coop_core.validation import Findings, Sample

_SUBSET_NAMES: dict[str, Subset] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_CSV_COLUMNS = {
    "path": ("path", "file", "filename", "image"),
    "label": ("label", "class", "class_name"),
    "subset": ("subset", "split"),
}


def import_dataset(
    card: Card,
    folder: Path,
    target: Path,
    *,
    test_fraction: float,
    accept: Collection[str] = (),
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Dataset:
    """Read the data set that `card` describes below `folder` and write its normal form into `target`.

    Raises
    ------
    DatasetError
        With all faults at once: unreadable images, empty classes, gaps, duplicates (see `validation`).
    """
    if not folder.is_dir():
        raise DatasetError(f"data set {card.name}: image folder {folder} does not exist: correct the card's path")
    if card.layout == "idx":
        return _import_idx(card, folder, target, accept=accept)
    findings = Findings()
    samples, class_names = _READERS[card.layout](card, folder, findings)
    validation.check_classes(class_names, findings, accept=accept)
    digests = validation.check_files(samples, findings, progress=progress)
    subsets = _assign_subsets(samples, digests, test_fraction=test_fraction)
    validation.check_duplicates(samples, digests, subsets, findings, accept=accept)
    images = tuple(
        LabelledImage(f"images/{sample.file.relative_to(folder).as_posix()}", sample.label, subset, digest)
        for sample, subset, digest in zip(samples, subsets, digests, strict=True)
    )
    dataset = _dataset(card, target, class_names, images, findings)
    for sample, image in zip(samples, images, strict=True):
        copy = target / image.path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sample.file, copy)
    write_dataset(dataset)
    return dataset


def _dataset(
    card: Card, target: Path, class_names: Sequence[str], images: tuple[LabelledImage, ...], findings: Findings
) -> Dataset:
    """The data set, or all its faults."""
    about = {
        "title": card.title or card.name,
        "licence": card.licence,
        "homepage": card.homepage,
        "layout": card.layout,
        "notes": findings.notes,
    }
    dataset = Dataset(target, card.name, tuple(class_names), card.template, images, about)
    validation.check_counts(dataset.counts(), findings)
    findings.raise_faults(card.name)
    return dataset


def _assign_subsets(samples: Sequence[Sample], digests: Sequence[str], *, test_fraction: float) -> list[Subset]:
    """Keep the source's subsets; where it names none, hold out a share of each class for testing.

    The choice is by image digest: it depends on nothing but the images, copies stay together, and an image
    keeps its side when its file is renamed.
    """
    if any(sample.subset for sample in samples):
        return [sample.subset or "train" for sample in samples]
    by_class: dict[int, set[str]] = defaultdict(set)
    for sample, digest in zip(samples, digests, strict=True):
        by_class[sample.label].add(digest)
    held_out: set[tuple[int, str]] = set()
    for label, unique in by_class.items():
        ranked = sorted(unique, key=lambda digest: digest_bytes(f"test:{digest}".encode()))
        count = min(max(1, round(len(ranked) * test_fraction)), len(ranked) - 1)
        held_out.update((label, digest) for digest in ranked[:count])
    return [
        "test" if (sample.label, digest) in held_out else "train"
        for sample, digest in zip(samples, digests, strict=True)
    ]


def _read_folders(card: Card, folder: Path, findings: Findings) -> tuple[list[Sample], list[str]]:
    """Class folders, or train/, val/ and test/ with class folders inside."""
    top = _subfolders(folder)
    by_subset = {path: _SUBSET_NAMES.get(path.name.lower()) for path in top}
    if top and all(by_subset.values()):
        class_folders = [(subset, path) for parent, subset in by_subset.items() for path in _subfolders(parent)]
    else:
        class_folders = [(None, path) for path in top]
    labels, class_names = _labels(card, {path.name for _, path in class_folders}, findings)
    samples, left_out = [], []
    for subset, class_folder in class_folders:
        files = sorted(path for path in class_folder.rglob("*") if path.is_file() and not _hidden(path, class_folder))
        left_out += [path.relative_to(folder).as_posix() for path in files if path.suffix.lower() not in SUFFIXES]
        samples += [
            Sample(path, labels[class_folder.name], subset) for path in files if path.suffix.lower() in SUFFIXES
        ]
    findings.add("files without an image suffix were left out", left_out, accepted=True)
    if not samples:
        findings.add("no images found; expected one folder a class in", [str(folder)])
    return samples, class_names


def _read_csv(card: Card, folder: Path, findings: Findings) -> tuple[list[Sample], list[str]]:
    """A header with path and label, and subset where the source decides it; paths relative to the file."""
    path = folder / card.index
    header, rows = _csv_rows(path)
    cells = [{name: (row[column] or "").strip() if column else "" for name, column in header.items()} for row in rows]
    complete = [cell for cell in cells if cell["path"] and cell["label"]]
    missing = [f"line {line}" for line, cell in enumerate(cells, start=2) if not (cell["path"] and cell["label"])]
    unknown = {cell["subset"].lower() for cell in cells} - {""} - set(_SUBSET_NAMES)
    findings.add(f"lines of {path.name} lack a path or a label", missing)
    findings.add(f"subsets of {path.name} other than train, val, test", unknown)
    labels, class_names = _labels(card, {cell["label"] for cell in complete}, findings)
    _check_inside([cell["path"] for cell in complete], folder, findings)
    samples = [
        Sample(folder / cell["path"], labels[cell["label"]], _SUBSET_NAMES.get(cell["subset"].lower()))
        for cell in complete
    ]
    return samples, class_names


def _csv_rows(path: Path) -> tuple[dict[str, str | None], list[dict[str, str]]]:
    """-> ({path, label, subset: the column that holds it}, rows)."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: correct the card's index") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} is not a CSV file in UTF-8 ({error}): save it as such") from None
    header = {name: next((c for c in columns if c.lower() in known), None) for name, known in _CSV_COLUMNS.items()}
    if not header["path"] or not header["label"]:
        raise DatasetError(f"{path} needs the columns path and label; it has: {', '.join(columns)}")
    return header, rows


def _read_split_json(card: Card, folder: Path, findings: Findings) -> tuple[list[Sample], list[str]]:
    """A papers' split file: {"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
    index = folder / card.index
    try:
        split = json.loads(index.read_text(encoding="utf-8"))
        rows = [(subset, *row) for subset in SUBSETS for row in split.get(subset, [])]
        names = {int(label): str(class_name) for _, _, label, class_name in rows}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DatasetError(f"{index} is not a split file ({error}): expected train, val and test lists") from None
    root = _image_root(folder, rows[0][1] if rows else "")
    gaps = sorted(set(range(max(names, default=-1) + 1)) - set(names))
    findings.add(f"labels of {index.name} have gaps", [str(label) for label in gaps])
    two = {f"label {label} ({names[int(label)]}, {name})" for _, _, label, name in rows if names[int(label)] != name}
    findings.add(f"labels of {index.name} have more than one class name", two)
    class_names = [card.class_words(names.get(label, f"label {label}")) for label in range(max(names, default=-1) + 1)]
    _check_inside([path for _, path, _, _ in rows], root, findings)
    return [Sample(root / path, int(label), subset) for subset, path, label, _ in rows], class_names


def _import_idx(card: Card, folder: Path, target: Path, *, accept: Collection[str]) -> Dataset:
    """The four .gz files of the MNIST family -> train.npy and test.npy."""
    if not isinstance(card.class_names, list):
        raise DatasetError(f"dataset card {card.name}: layout idx needs class_names as a list in label order")
    findings = Findings()
    validation.check_classes(card.class_names, findings, accept=accept)
    arrays: dict[str, np.ndarray] = {}
    images: list[LabelledImage] = []
    for subset, prefix in (("train", "train"), ("test", "t10k")):
        pixels = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
        labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
        if len(pixels) != len(labels) or labels.max(initial=0) >= len(card.class_names):
            raise DatasetError(f"{folder}: the {subset} images and labels do not fit each other or the class names")
        arrays[subset] = pixels
        images += [
            LabelledImage(f"{subset}.npy#{i}", int(label), _SUBSET_NAMES[subset], digest_bytes(image.tobytes()))
            for i, (image, label) in enumerate(zip(pixels, labels, strict=True))
        ]
    copies = Counter(image.digest for image in images)
    samples = [Sample(Path(image.path), image.label, image.subset) for image in images]
    if len(copies) < len(images):
        validation.check_duplicates(
            samples, [image.digest for image in images], [image.subset for image in images], findings, accept=accept
        )
    dataset = _dataset(card, target, [words(name) for name in card.class_names], tuple(images), findings)
    for subset, pixels in arrays.items():
        write_array(target / f"{subset}.npy", pixels)
    write_dataset(dataset)
    return dataset


def _read_idx(path: Path, *, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes: magic number, sizes, then the values."""
    content = read_gzip(path, max_bytes=2**31)
    header = 4 * (1 + dimensions)
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise DatasetError(f"{path} is not an IDX file of {dimensions} dimensions: fetch it again")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != np.prod(shape, dtype=np.int64):
        raise DatasetError(f"{path} is truncated: its header promises {shape}: fetch it again")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _labels(card: Card, class_folders: Collection[str], findings: Findings) -> tuple[dict[str, int], list[str]]:
    """({class folder: label}, class names in label order): the card's list, else folders in alphabetical order."""
    folders = sorted(class_folders)
    if not isinstance(card.class_names, list):
        return {folder: label for label, folder in enumerate(folders)}, [card.class_words(folder) for folder in folders]
    names = [words(name) for name in card.class_names]
    unknown = [folder for folder in folders if card.class_words(folder) not in names]
    findings.add("classes are not in the card's class_names", unknown)
    names += [card.class_words(folder) for folder in unknown]
    return {folder: names.index(card.class_words(folder)) for folder in folders}, names


def _check_inside(paths: Collection[str], folder: Path, findings: Findings) -> None:
    """Listed paths stay below their folder, both as written and where links lead."""
    root = folder.resolve()
    outside = [
        path for path in paths
        if Path(path).is_absolute() or ".." in Path(path).parts or not (folder / path).resolve().is_relative_to(root)
    ]  # fmt: skip
    findings.add(f"paths leave the folder {folder}", outside)
    if outside:
        findings.raise_faults(folder.name)


def _hidden(path: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(below).parts)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_root(folder: Path, first: str) -> Path:
    """Split files count from the image folder, which may be a folder or two below the file's own."""
    for root in (folder, *_subfolders(folder), *(deeper for top in _subfolders(folder) for deeper in _subfolders(top))):
        if (root / first).is_file():
            return root
    return folder


_READERS = {"folders": _read_folders, "csv": _read_csv, "split-json": _read_split_json}
