"""Answering on the command line: files and an artefact or registered version -> lines of labels."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from coop_core.errors import ArtifactError, CoopError, DatasetError
from coop_core.images import SUFFIXES, read_image
from coop_core.predictor import Prediction, Predictor
from pipelines.settings import Settings

Answer = Prediction | str
"""A prediction, or why there is none."""


def image_files(places: Sequence[Path]) -> list[Path]:
    """Files as given, folders as the images below them.

    Raises
    ------
    DatasetError
        When a place does not exist or a folder holds no image; all of them at once.
    """
    found: list[Path] = []
    missing = [str(place) for place in places if not place.exists()]
    for place in places:
        if place.is_dir():
            inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            missing += [] if inside else [f"{place} (a folder without images)"]
            found += inside
        else:
            found.append(place)
    if missing:
        raise DatasetError(f"nothing to predict at: {', '.join(missing)}")
    return found


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
    if (Path(model) / "card.json").exists():
        return Path(model)
    if "@" in model or model.startswith("models:/") or (model.count("/") == 1 and model.rsplit("/", 1)[1].isdigit()):
        from pipelines.tracking import fetch_prompt

        return fetch_prompt(model, settings, workspace)
    raise ArtifactError(
        f"no learned prompt at {model}: run `dvc repro`, or give --model a folder, NAME@ALIAS or NAME/VERSION"
    )


def answers(
    predictor: Predictor, files: Sequence[Path], *, top: int, batch_size: int
) -> Iterator[tuple[Path, Answer]]:
    """In the order given; an image that cannot be read gets its reason and stops nobody."""
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        decoded: list[Image.Image | str] = []
        for file in batch:
            try:
                decoded.append(read_image(file))
            except CoopError as error:
                decoded.append(str(error))
        images = [image for image in decoded if not isinstance(image, str)]
        found = iter(predictor.predict(images, top=top) if images else [])
        for file, image in zip(batch, decoded, strict=True):
            yield file, image if isinstance(image, str) else next(found)


def as_line(file: Path, answer: Answer) -> str:
    if isinstance(answer, str):
        return f"{file}\t-\t{answer}"
    ranked = zip(answer.labels, answer.probabilities, strict=True)
    return f"{file}\t" + "\t".join(f"{label} {100 * probability:.1f} %" for label, probability in ranked)


def as_json(file: Path, answer: Answer) -> str:
    if isinstance(answer, str):
        return json.dumps({"image": str(file), "error": answer})
    return json.dumps(
        {"image": str(file), "label": answer.labels[0], "probability": answer.probabilities[0],
         "labels": answer.labels, "probabilities": answer.probabilities}
    )  # fmt: skip
