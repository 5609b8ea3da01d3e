"""Lists of images: a CSV file or one of the papers' split files -> samples and class names.

A list names files below its folder. What it cannot mean is a fault, and the other lines are judged all the same.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from coop_core.data.catalog import Card, class_labels
from coop_core.data.dataset import SUBSET_NAMES, SUBSETS, Subset, shown, words
from coop_core.data.validation import Findings, Sample, file_fault
from coop_core.errors import DatasetError

_COLUMNS = {
    "path": ("path", "file", "filename", "image"),
    "label": ("label", "class", "class_name"),
    "subset": ("subset", "split"),
}
"""The documented name first; the others count where it is missing, in this order."""
_ROOT_PROBES = 100


def read_csv(card: Card, folder: Path, findings: Findings) -> tuple[list[Sample], list[str]]:
    """A header with path and label, and subset where the source decides it; paths relative to the file."""
    path = _index(card, folder)
    lines, clear = _csv_lines(path, findings)
    unknown = [line for line, cells in clear.items() if cells["subset"].lower() not in {"", *SUBSET_NAMES}]
    findings.add(f"subsets of {path.name} other than train, val, test", {clear[line]["subset"] for line in unknown})
    labels, class_names, missing = class_labels(card, {cells["label"] for cells in clear.values()})
    findings.add("classes are not in the card's class_names", missing)
    files = _located([cells["path"] for cells in clear.values()], folder, findings)
    samples = []
    for (line, cells), file in zip(clear.items(), files, strict=True):
        if file is None or line in unknown:
            findings.explained.add(labels[cells["label"]])
        if file is not None:
            samples.append(Sample(file, labels[cells["label"]], SUBSET_NAMES.get(cells["subset"].lower())))
    if len(clear) < lines:                                                     # the others may be of any class
        findings.explained.update(range(len(class_names)))
    return samples, class_names


def read_split_json(card: Card, folder: Path, findings: Findings) -> tuple[list[Sample], list[str]]:
    """A papers' split file: {"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
    index = _index(card, folder)
    rows = _split_rows(index)
    if not rows:
        findings.add("no images are listed in", [str(index)])
    names = {label: name for _, _, label, name in rows}
    found = sorted(names)
    gaps = list(_gaps(found))
    findings.add(f"labels of {index.name} have gaps", gaps)
    two = {f"label {label} ({names[label]}, {name})" for _, _, label, name in rows if names[label] != name}
    findings.add(f"labels of {index.name} have more than one class name", two)
    paths = [path for _, path, _, _ in rows]
    files = _located(paths, _image_root(folder, paths), findings)
    position = {label: position for position, label in enumerate(found)}
    findings.explained |= {position[row[2]] for row, file in zip(rows, files, strict=True) if file is None or gaps}
    samples = [
        Sample(file, position[label], subset)
        for (subset, _, label, _), file in zip(rows, files, strict=True)
        if file is not None
    ]
    return samples, [card.class_words(names[label]) for label in found]


def read_lists(card: Card, folder: Path, findings: Findings) -> tuple[list[Sample], list[str]]:
    """Text files for train, val and test with lines `image words of the class`, the images in images/NAME.jpg, as
    FGVC-Aircraft has them."""
    if not isinstance(card.class_names, list):
        raise DatasetError(f"dataset card {card.name}: layout lists needs class_names in label order")
    names, samples = [words(name) for name in card.class_names], []
    listed: list[tuple[Subset, str, str]] = []
    for subset in SUBSETS:
        path = folder / _index_name(card).replace("*", subset)
        if fault := file_fault(path):
            raise DatasetError(f"{path} {fault}: put the data set's own list there")
        lines = [line.strip().partition(" ") for line in _text(path, "a list").splitlines() if line.strip()]
        listed += [(subset, f"images/{name}.jpg", words(label)) for name, _, label in lines]
    unknown = {label for _, _, label in listed if label not in names}
    findings.add("classes are not in the card's class_names", unknown)
    files = _located([path for _, path, _ in listed], folder, findings)
    label_of = {name: label for label, name in enumerate(names)}
    for (subset, _, label), file in zip(listed, files, strict=True):
        if file is not None and label in label_of:
            samples.append(Sample(file, label_of[label], subset))
    return samples, names


def _index_name(card: Card) -> str:
    if "*" not in card.index:
        raise DatasetError(f"dataset card {card.name}: layout lists needs index, the name of its lists with a * for "
                           "train, val and test")  # fmt: skip
    return card.index


def _index(card: Card, folder: Path) -> Path:
    if not card.index:
        raise DatasetError(f"dataset card {card.name}: layout {card.layout} needs index, the file that lists images")
    if fault := file_fault(folder / card.index):
        raise DatasetError(f"{shown(str(folder / card.index))} {fault}: correct the card's index")
    return folder / card.index


def _csv_lines(path: Path, findings: Findings) -> tuple[int, dict[int, dict[str, str]]]:
    """-> (how many lines there are, {number of a line that can be understood: its path, label and subset})."""
    columns, rows = _csv_rows(path)
    where = _columns(path, columns, findings)
    long = {line for line, row in rows.items() if any(cell.strip() for cell in row[len(columns):])}
    lines = {
        line: {name: row[at] if at < len(row) else "" for name, at in where.items()}
        for line, row in rows.items() if line not in long
    }  # fmt: skip
    lack = {line for line, cells in lines.items() if not (cells["path"].strip() and cells["label"].strip())}
    findings.add(f"lines of {path.name} have more cells than the header (put quotes around a label with a comma)",
                 [f"line {line}" for line in long])  # fmt: skip
    findings.add(f"lines of {path.name} lack a path or a label", [f"line {line}" for line in lack])
    if not rows:
        findings.add("no images are listed in", [str(path)])
    clear = {
        line: {"path": cells["path"], "label": cells["label"].strip(), "subset": cells.get("subset", "").strip()}
        for line, cells in lines.items() if line not in lack
    }  # fmt: skip
    return len(rows), clear


def _csv_rows(path: Path) -> tuple[list[str], dict[int, list[str]]]:
    """-> (header, {line number: row}), without rows that are empty."""
    text = _text(path, "a CSV file")
    spaced = ", " in text.partition("\n")[0]                                   # then so are the rows, around quotes too
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=spaced)
    try:
        columns = [column.strip() for column in next(reader, [])]
        rows = ((reader.line_num, row) for row in reader)
        return columns, {line: row for line, row in rows if any(cell.strip() for cell in row)}
    except csv.Error as error:                               # strict: an open quote would swallow all that follows
        raise DatasetError(f"{path} is not a CSV file, line {reader.line_num} ({error}): correct it") from None


def _columns(path: Path, columns: Sequence[str], findings: Findings) -> dict[str, int]:
    """{path, label, subset: the column that holds it}."""
    lower = [column.lower() for column in columns]
    where, unused = {}, []
    for name, known in _COLUMNS.items():
        found = [column for column in known if column in lower]
        if twice := [column for column in found if lower.count(column) > 1]:
            raise DatasetError(f"{path} has more than one column {twice[0]}: remove the others")
        if found:
            where[name] = lower.index(found[0])
        unused += [f"{column} ({found[0]} is there)" for column in found[1:]]
    if "path" not in where or "label" not in where:
        raise DatasetError(f"{path} needs the columns path and label; it has: {shown(', '.join(columns))}")
    findings.add(f"columns of {path.name} were not used", unused, accepted=True)
    return where


def _split_rows(index: Path) -> list[tuple[Subset, str, int, str]]:
    """-> [(subset, path, label, class name)]."""
    try:
        split = json.loads(_text(index, "a split file"), object_pairs_hook=_unique)
        if not isinstance(split, dict):
            raise ValueError(f"it is a {type(split).__name__}")
        if other := split.keys() - set(SUBSETS):
            raise ValueError(f"it has {', '.join(sorted(other))}")
        rows = []
        for subset in SUBSETS:
            if not isinstance(listed := split.get(subset, []), list):
                raise ValueError(f"{subset} is a {type(listed).__name__}")
            for number, row in enumerate(listed):
                if not _is_row(row):
                    raise ValueError(f"entry {number} of {subset} is {str(row)[:80]}")
                rows.append((subset, *row))
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"{index} is not a split file ({shown(str(error))}): expected train, val and test lists of "
            "[path, label, class name], labels being whole numbers from 0"
        ) from None
    return rows


def _is_row(row: Any) -> bool:
    """[path, label, class name]; True and 1.0 are no labels."""
    return (
        isinstance(row, list) and [type(value) for value in row] == [str, int, str] and row[1] >= 0 and bool(row[0])
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, of which `json` would silently keep the last of equal keys."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _text(path: Path, kind: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not {kind} in UTF-8 ({error}): save it as such") from None


def _gaps(labels: Sequence[int]) -> Iterable[str]:
    """What is missing between 0 and the last of sorted labels, in ranges."""
    for before, after in zip([-1, *labels], labels, strict=False):
        if after - before > 1:
            yield f"{before + 1}" if after - before == 2 else f"{before + 1} to {after - 1}"


def _located(listed: Sequence[str], folder: Path, findings: Findings) -> list[Path | None]:
    """The files that are meant, below `folder` both as written and where links lead; None for what is not."""
    root = Path(os.path.realpath(folder))
    files: list[Path | None] = []
    outside, impossible = [], []
    for text in listed:
        try:
            text.encode()
            relative = _below(text, folder, root)
        except (ValueError, OSError):                                 # a NUL, half a character, a name that is too long
            impossible.append(text)
            files.append(None)
            continue
        if relative is None:
            outside.append(text)
        files.append(None if relative is None else folder / relative)
    findings.add(f"paths leave the folder {folder}", outside)
    findings.add("paths are no names of files", [text[:100] for text in impossible])
    return files


def _below(text: str, folder: Path, root: Path) -> Path | None:
    """A listed path relative to its folder, with separators of Windows and blanks around it where no file has them."""
    forms = (text, text.strip(), text.strip().replace("\\", "/"))
    path = Path(next((form for form in forms if (folder / form).is_file()), text.strip()))
    real = Path(os.path.realpath(folder / path))
    if not real.is_relative_to(root) or (PureWindowsPath(path).drive and not real.exists()):
        return None
    return real.relative_to(root) if path.is_absolute() or ".." in path.parts else path


def _image_root(folder: Path, paths: Sequence[str]) -> Path:
    """Split files count from the image folder, which may be a folder or two below the file's own."""
    top = _subfolders(folder)
    roots = [folder, *top, *(deeper for path in top for deeper in _subfolders(path))]
    probes = paths[:: len(paths) // _ROOT_PROBES + 1]
    return next((root for path in probes for root in roots if file_fault(root / path) == ""), folder)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
