"""Importers: image folders, CSV lists, split JSON or IDX files -> one data set in its normal form.

Every layout is read, validated as a whole and only then written; a fault leaves the target untouched.
"""

import shutil
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from coop_core.data import validation
from coop_core.data.archives import read_gzip
from coop_core.data.catalog import Card, class_labels
from coop_core.data.dataset import NO_LABEL, SUBSET_NAMES, Dataset, LabelledImage, Subset, shown, words, write_dataset
from coop_core.data.descriptions import check_descriptions
from coop_core.data.folders import read_folders, read_pool, read_unlabelled
from coop_core.data.listings import read_csv, read_lists, read_split_json
from coop_core.data.validation import Findings, Sample, file_fault
from coop_core.errors import DatasetError
from coop_core.files import digest_bytes, write_array


def import_dataset(
    card: Card,
    folder: Path,
    target: Path,
    *,
    test_fraction: float,
    accept: Collection[str] = (),
    progress: Callable[[int, int], object] = lambda done, total: None,
    pool: Path | None = None,
) -> Dataset:
    """Read the data set that `card` describes below `folder` and write its normal form into `target`.

    `pool` is the folder of its images without labels, if it has any: they are trained on, and what lies below `folder`
    judges. `test_fraction` 0 holds no image out, and no class needs a test image.

    Raises
    ------
    DatasetError
        With all faults at once: unreadable images, empty classes, gaps, duplicates (see `validation`).
    """
    if not folder.is_dir():
        kind = "is no folder" if folder.exists() else "does not exist"
        raise DatasetError(f"data set {card.name}: image folder {shown(str(folder))} {kind}: correct the card's path")
    if pool is not None and not pool.is_dir():
        raise DatasetError(f"data set {card.name}: folder {pool} of images without labels does not exist: correct the "
                           "card's unlabelled")  # fmt: skip
    if card.layout == "idx":
        return _import_idx(card, folder, target, accept=accept)
    findings = Findings()
    samples, class_names = _READERS[card.layout](card, folder, findings)
    if pool is not None:
        samples = [replace(sample, subset=sample.subset or "test") for sample in samples]
        samples += read_pool(pool, findings)
    places = [_place(sample, folder, pool) for sample in samples]
    return _import_files(card, samples, places, class_names, target, findings, test_fraction=test_fraction,
                         accept=accept, progress=progress)  # fmt: skip


def import_images(
    card: Card,
    files: Sequence[Path],
    labels: Sequence[str],
    target: Path,
    *,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Dataset:
    """Files, wherever they lie, and the class folder each would be in -> the data set, all of it to train on.

    Raises
    ------
    DatasetError
        As `import_dataset`, with all faults at once.
    """
    label_of, class_names, _ = class_labels(card, set(labels))
    samples = [Sample(file, label_of[label], "train") for file, label in zip(files, labels, strict=True)]
    places = [f"images/{number}{file.suffix}" for number, file in enumerate(files)]
    return _import_files(card, samples, places, class_names, target, Findings(), test_fraction=0, progress=progress)


def _import_files(
    card: Card, samples: Sequence[Sample], places: Sequence[str], class_names: Sequence[str], target: Path,
    findings: Findings, *, test_fraction: float, progress: Callable[[int, int], object], accept: Collection[str] = (),
) -> Dataset:  # fmt: skip
    """Check all samples and copy each to its place below `target`."""
    validation.check_classes(class_names, findings, accept=accept)
    digests = validation.check_files(samples, findings, progress=progress)
    subsets = _assign_subsets(samples, digests, test_fraction=test_fraction)
    validation.check_duplicates(samples, digests, subsets, findings, accept=accept)
    images = tuple(
        LabelledImage(place, sample.label, subset, digest)
        for place, sample, subset, digest in zip(places, samples, subsets, digests, strict=True)
    )
    dataset = _dataset(card, target, class_names, images, findings, tests=test_fraction > 0)
    for sample, image in zip(samples, images, strict=True):
        copy = target / image.path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sample.file, copy)
    write_dataset(dataset)
    return dataset


def _place(sample: Sample, folder: Path, pool: Path | None) -> str:
    if pool is not None and sample.label == NO_LABEL:
        return f"unlabelled/{sample.file.relative_to(pool).as_posix()}"
    return f"images/{sample.file.relative_to(folder).as_posix()}"


def _dataset(
    card: Card, target: Path, class_names: Sequence[str], images: tuple[LabelledImage, ...], findings: Findings,
    *, tests: bool = True,
) -> Dataset:  # fmt: skip
    """The data set, or all its faults."""
    about = {
        "title": card.title or card.name,
        "licence": card.licence,
        "homepage": card.homepage,
        "layout": card.layout,
        "notes": findings.notes,
    }
    dataset = Dataset(target, card.name, tuple(class_names), card.template, images, about)
    if card.descriptions is not None:
        described = check_descriptions(card.descriptions, class_names, where=f"descriptions of {card.name}")
        dataset = replace(dataset, descriptions=described)
    trains = not card.unlabelled and card.subsets.get("*") != "test"
    if card.layout != "unlabelled":
        validation.check_counts(dataset.counts(), findings, trains=trains, tests=tests)
    validation.check_published(card, class_names, [image.subset for image in images], findings)
    findings.raise_faults(card.name)
    return dataset


def _assign_subsets(samples: Sequence[Sample], digests: Sequence[str], *, test_fraction: float) -> list[Subset]:
    """Keep the source's subsets; where it names none, hold out a share of each class for testing (0: none).

    The choice is by image digest: it depends on nothing but the images, copies stay together, and an image
    keeps its side when its file is renamed.
    """
    if any(sample.subset for sample in samples) or not test_fraction:
        return [sample.subset or "train" for sample in samples]
    by_class: dict[int, set[str]] = defaultdict(set)
    keys = [digest or f"unreadable {position}" for position, digest in enumerate(digests)]
    for sample, key in zip(samples, keys, strict=True):
        by_class[sample.label].add(key)
    held_out: set[tuple[int, str]] = set()
    for label, unique in by_class.items():
        ranked = sorted(unique, key=lambda digest: digest_bytes(f"test:{digest}".encode()))
        count = min(max(1, round(len(ranked) * test_fraction)), len(ranked) - 1)
        held_out.update((label, digest) for digest in ranked[:count])
    return [
        "test" if (sample.label, key) in held_out else "train" for sample, key in zip(samples, keys, strict=True)
    ]


def _import_idx(card: Card, folder: Path, target: Path, *, accept: Collection[str]) -> Dataset:
    """The four .gz files of the MNIST family -> train.npy and test.npy."""
    if not isinstance(card.class_names, list):
        raise DatasetError(f"dataset card {card.name}: layout idx needs class_names as a list in label order")
    if card.unlabelled:
        raise DatasetError(f"dataset card {card.name}: unlabelled is for folders of images, and layout idx has none")
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
            LabelledImage(f"{subset}.npy#{i}", int(label), SUBSET_NAMES[subset], digest_bytes(image.tobytes()))
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
    if path.exists() and (fault := file_fault(path)):
        raise DatasetError(f"{path} {fault}: put the file there")
    content = read_gzip(path, max_bytes=2**31)
    header = 4 * (1 + dimensions)
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        raise DatasetError(f"{path} is not an IDX file of {dimensions} dimensions: fetch it again")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != np.prod(shape, dtype=np.int64):
        raise DatasetError(f"{path} is truncated: its header promises {shape}: fetch it again")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


_READERS = {"folders": read_folders, "csv": read_csv, "split-json": read_split_json, "lists": read_lists,
            "unlabelled": read_unlabelled}  # fmt: skip
