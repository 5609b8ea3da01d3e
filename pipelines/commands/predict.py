"""Answering on the command line: files and an artefact or registered version -> lines of labels."""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coop_core.data.images import SUFFIXES, is_picture, is_slice
from coop_core.errors import ArtifactError, DatasetError
from coop_core.predictor import Prediction, Predictor
from pipelines.settings import Settings

Answer = Prediction | str
"""A prediction, or why there is none."""
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SHOWN = 3
"""Examples of what is left out."""
_ON_ONE_LINE = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


@dataclass
class Found:
    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Why -> what, in folders that were asked for."""

    def leave_out(self, why: str, path: str) -> None:
        self.left_out.setdefault(why, []).append(path)

    def note(self) -> str:
        """One line that counts what was left out, with examples; empty when that is nothing."""
        counts = []
        for why, paths in self.left_out.items():
            more = ", ..." if len(paths) > _SHOWN else ""
            counts.append(f"{len(paths)} {why} ({', '.join(sorted(paths)[:_SHOWN])}{more})")
        return printable(f"left out: {'; '.join(counts)}") if counts else ""


def image_files(places: Sequence[str]) -> Found:
    """Files as given, folders as the pictures below them, whatever these are called.

    Raises
    ------
    DatasetError
        When a place is an address or does not exist, or a folder holds no image; all of a kind at once.
    """
    if addresses := [place for place in places if _ADDRESS.match(place)]:
        raise DatasetError(printable(f"files are wanted, not addresses: {', '.join(addresses)} (download first, for "
                                     "instance with `curl -O`, and give the path)"))  # fmt: skip
    found = Found()
    missing = []
    for place in places:
        if os.path.isdir(place):
            before = len(found.files)
            _search(place, found)
            if len(found.files) == before:
                missing.append(f"{place} (a folder without images)")
        elif os.path.exists(place) or is_slice(Path(place)):  # os.path: a name too long is missing, not an error
            found.files.append(Path(place))
        else:
            missing.append(place)
    if missing:
        note = found.note()
        raise DatasetError(printable(f"nothing to predict at: {', '.join(missing)}") + (f"; {note}" if note else ""))
    return found


def printable(text: str) -> str:
    """On one line, with backslashes where a file's name is no text."""
    return text.translate(_ON_ONE_LINE).encode("utf-8", "backslashreplace").decode()


def _search(folder: str, found: Found) -> None:
    """Add the pictures below a folder in the order of their paths."""
    files = []
    unreadable = "folders that cannot be read"
    for parent, folders, names in os.walk(folder, onerror=lambda error: found.leave_out(unreadable, error.filename)):
        for name in [*folders, *names]:
            path = os.path.join(parent, name)
            if name.startswith("."):
                found.leave_out("hidden", path)
            elif name in folders:
                if os.path.islink(path):
                    found.leave_out("links to folders", path)
            elif not os.path.isfile(path):
                found.leave_out("dead links, pipes or devices", path)
            elif Path(name).suffix.lower() in SUFFIXES or is_picture(Path(path)):
                files.append(Path(path))
            else:
                found.leave_out("in no format that is read", path)
        folders[:] = [name for name in folders if not name.startswith(".")]
    found.files += sorted(files)


def parse_classes(text: str) -> list[str] | None:
    """`cat, dog` -> its class names; nothing -> None."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text and len(set(names)) < 2:
        raise DatasetError(f"--classes {text!r} needs two different names or more, separated by commas")
    if len(set(names)) < len(names):
        raise DatasetError(f"--classes {text!r} names a class twice")
    return names or None


def load_predictor(model: str, settings: Settings, *, class_names: list[str] | None, device: str) -> Predictor:
    with tempfile.TemporaryDirectory() as folder:
        artifact = find_artifact(model, settings, Path(folder))
        return Predictor.load(artifact, class_names=class_names, device=device)


def find_artifact(model: str, settings: Settings, workspace: Path) -> Path:
    """A folder as it is; a registry reference downloaded into `workspace`."""
    if os.path.exists(os.path.join(model, "card.json")):
        return Path(model)
    if "@" in model or model.startswith("models:/") or (model.count("/") == 1 and model.rsplit("/", 1)[1].isdigit()):
        from pipelines.records.registry import fetch_prompt
        from pipelines.records.server import Records

        return fetch_prompt(model, Records(settings), workspace)
    from pipelines.records.names import find_model_name

    named = find_model_name(settings) or "NAME"
    raise ArtifactError(
        f"no learned prompt at {printable(model)}: run `dvc repro` or wait until it has ended, or give --model a "
        f"folder or a registered version such as {named}@candidate or {named}/1"
    )


def answers(
    predictor: Predictor, files: Sequence[Path], *, top: int, batch_size: int
) -> Iterator[tuple[Path, Answer]]:
    """In the order given; an image that cannot be read gets its reason, which leaves its path to the caller."""
    for file, answer in zip(files, predictor.answers(files, top=top, batch_size=batch_size), strict=True):
        yield file, answer if isinstance(answer, Prediction) else printable(str(answer).removeprefix(f"image {file} "))


def as_line(file: Path, answer: Answer) -> str:
    name = printable(str(file))
    if isinstance(answer, str):
        return f"{name}\t-\t{answer}"
    ranked = zip(answer.labels, answer.probabilities, strict=True)
    abstains = "no answer\t" if answer.answer is None else ""
    return f"{name}\t{abstains}" + "\t".join(f"{label} {100 * probability:.1f} %" for label, probability in ranked)


def as_json(file: Path, answer: Answer) -> str:
    if isinstance(answer, str):
        return json.dumps({"image": str(file), "error": answer})
    return json.dumps(
        {"image": str(file), "answer": answer.answer, "label": answer.labels[0], "probability": answer.probabilities[0],
         "labels": answer.labels, "probabilities": answer.probabilities}
    )  # fmt: skip
