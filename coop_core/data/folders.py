"""Class folders: a folder a class, or train/, val/ and test/ with class folders inside -> samples and class names.

Every file is accounted for: it becomes a sample, or a note or a fault names it.
"""

import os
from collections import defaultdict
from pathlib import Path

from coop_core.data.catalog import Card, class_labels
from coop_core.data.dataset import NO_LABEL, SUBSET_NAMES, Subset, words
from coop_core.data.images import SUFFIXES
from coop_core.data.validation import Findings, Sample

_IMAGE = ""
_LOOSE = "images beside the class folders were left out"
_HIDDEN = "hidden files and folders were left out"
_LINKED = "linked folders inside class folders were left out"
_OTHER = "files without an image suffix were left out"
_EXTRA = "folders beside train, val and test were left out"
_WRAPPER = "the class folders were found further down, in"
_CLASS_NOT_SUBSET = "a folder with the name of a subset is taken for a class, as train is not beside val or test"
_DEAD = "links lead nowhere (mend or remove them)"
_FOREIGN = "names of files are not UTF-8 (rename them)"
_CLOSED = "folders cannot be read (correct their rights)"
_FAULTS = {_DEAD, _FOREIGN, _CLOSED}

Places = dict[str, list[Path]]
"""What happened to files -> which."""


def read_folders(card: Card, folder: Path, findings: Findings) -> tuple[list[Sample], list[str]]:
    """The images below `folder` with the label of their class folder, and the class names in label order."""
    places: Places = defaultdict(list)
    class_folders = _class_folders(_unwrapped(folder, places), places)
    labels, class_names, unknown = class_labels(card, {path.name for _, path in class_folders})
    findings.add("classes are not in the card's class_names", unknown)
    whole = card.subsets.get("*")
    class_folders = [
        (whole or (subset and card.subsets.get(subset, subset)), path) for subset, path in class_folders
    ]
    samples: list[Sample] = []
    empty: list[str] = []
    for subset, class_folder in class_folders:
        found, label = _contents(class_folder), labels[class_folder.name]
        images = sorted(found.pop(_IMAGE, []))
        samples += [Sample(image, label, subset) for image in images]
        if found and not images and not found.keys() & _FAULTS:
            empty.append(f"{class_folder.relative_to(folder).as_posix()} ({_kinds(found)})")
        if found.keys() & _FAULTS or (found and not images):
            findings.explained.add(label)
        _merge(places, found)
    findings.add("class folders hold nothing that can be used", empty)
    if not class_folders:
        findings.add("images lie in no class folder", _names(places.pop(_LOOSE, []), folder))
        findings.add("no class folders found; expected one folder a class in", [str(folder)])
    for problem, paths in places.items():
        findings.add(problem, _names(paths, folder), accepted=problem not in _FAULTS)
    return samples, class_names


def read_pool(folder: Path, findings: Findings) -> list[Sample]:
    """The images below `folder` at any depth, without labels; nothing is read from the names of its folders."""
    places = _contents(folder)
    samples = [Sample(image, NO_LABEL, "train") for image in sorted(places.pop(_IMAGE, []))]
    if not samples:
        findings.add("a folder of images without labels holds none", [str(folder)])
    for problem, paths in places.items():
        findings.add(problem, _names(paths, folder), accepted=problem not in _FAULTS)
    return samples


def read_unlabelled(card: Card, folder: Path, findings: Findings) -> tuple[list[Sample], list[str]]:
    """The images below `folder`, all of them without labels, and the class names that the card lists."""
    if not isinstance(card.class_names, list):
        findings.faults.append("the file of class_names names class folders, and layout unlabelled has none: list a "
                               "name a line")  # fmt: skip
        return [], []
    return read_pool(folder, findings), [words(name) for name in card.class_names]


def _unwrapped(folder: Path, places: Places) -> Path:
    """Where the class folders are: archives often wrap them in another folder or two."""
    inner = folder
    passed: list[Places] = []
    while _LOOSE not in (beside := _beside(inner)):
        below = _subfolders(inner)
        if len(below) > 1 or any(map(_is_subset, below)):
            for found in passed:
                _merge(places, found)
            places[_WRAPPER] += [inner] if passed else []
            return inner
        if not below:
            break
        passed.append(beside)
        inner = below[0]
    return folder


def _class_folders(folder: Path, places: Places) -> list[tuple[Subset | None, Path]]:
    """train/ beside val/ or test/ makes them subsets; other folders beside them are left out."""
    _merge(places, _beside(folder))
    top = _subfolders(folder)
    subsets = {path: SUBSET_NAMES[path.name.lower()] for path in top if _is_subset(path)}
    together = "train" in subsets.values() and len(set(subsets.values())) > 1
    if not subsets or not (together or len(subsets) == len(top)):
        places[_CLASS_NOT_SUBSET] += subsets
        return [(None, path) for path in top]
    for path in subsets:
        _merge(places, _beside(path))
    places[_EXTRA] += [path for path in top if path not in subsets]
    return [(subset, path) for parent, subset in subsets.items() for path in _subfolders(parent)]


def _contents(class_folder: Path) -> Places:
    """What is below a class folder, at any depth; linked folders are not followed, as they may lead in circles."""
    found: Places = defaultdict(list)
    closed: list[OSError] = []
    for parent, folders, files in os.walk(class_folder, onerror=closed.append):
        for path in [Path(parent, name) for name in folders]:
            if _hidden(path) or path.is_symlink():
                found[_HIDDEN if _hidden(path) else _LINKED].append(path)
        folders[:] = [name for name in folders if not _hidden(Path(name))]
        for path in [Path(parent, name) for name in files]:
            found[_fate(path)].append(path)
    if closed:
        found[_CLOSED] += [Path(error.filename) for error in closed]
    return found


def _beside(folder: Path) -> Places:
    """What lies in a folder beside the folders that are looked into."""
    found: Places = defaultdict(list)
    for path in folder.iterdir():
        if _hidden(path) or not path.is_dir():
            fate = _fate(path)
            found[_LOOSE if fate == _IMAGE else fate].append(path)
    return found


def _fate(path: Path) -> str:
    if _hidden(path):
        return _HIDDEN
    if path.is_symlink() and not os.path.exists(path):                        # unlike Path.exists, never an exception
        return _DEAD
    if path.suffix.lower() not in SUFFIXES:
        return _OTHER
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return _FOREIGN
    return _IMAGE


def _kinds(found: Places) -> str:
    """What a class folder holds instead of images: the suffixes of its files, else what happened to them."""
    suffixes = {path.suffix.lower() or "no suffix" for path in found.get(_OTHER, [])}
    return ", ".join(sorted(suffixes | {problem.partition(" were ")[0] for problem in found if problem != _OTHER}))


def _names(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def _merge(places: Places, found: Places) -> None:
    for problem, paths in found.items():
        places[problem] += paths


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(path))


def _is_subset(folder: Path) -> bool:
    return folder.name.lower() in SUBSET_NAMES


def _hidden(path: Path) -> bool:
    """Also the leavings of archives that a Mac packed."""
    return path.name.startswith(".") or path.name == "__MACOSX"
