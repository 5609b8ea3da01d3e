"""report: everything the stages before it found -> artifacts/report, one page and the pictures on it."""

import csv
import re
import shutil
from pathlib import Path
from typing import Any

from coop_core.data.dataset import NO_LABEL, Dataset, read_dataset
from coop_core.data.images import read_image
from coop_core.data.split import located, read_split
from coop_core.errors import ArtifactError
from coop_core.files import read_json
from coop_core.judging.label_file import origin_of, read_labels
from coop_core.params import Params, load_params
from coop_core.report import pictures
from coop_core.report.findings import best_baseline, pseudo_label_counts
from coop_core.report.page import write_report
from pipelines import console, paths

_SAMPLES = 3
"""Test images that are left as files to try."""


def main() -> None:
    evaluations = read_json(paths.EVALUATION / "evaluation.json")
    predictions = read_table(paths.EVALUATION / "predictions.csv")
    curve = read_table(paths.PROMPT / "curve.csv")
    dataset, card = read_dataset(paths.RAW), read_json(paths.PROMPT / "card.json")
    write_report(
        paths.REPORT / "report.html",
        evaluations=evaluations,
        curve=curve,
        predictions=predictions,
        words=read_json(paths.PROMPT / "words.json"),
        card=card,
        baseline_card=read_json(paths.BASELINES / "card.json"),
        dataset_about={**dataset.about, "name": dataset.name, "counts": dataset.counts()},
        image_root=paths.RAW,
        targets=read_targets(load_params(paths.PARAMS)),
        pseudo=read_pseudo_labels(dataset, card),
    )
    if not card["training"]["is_built"]:
        pictures.save_png(pictures.training_curve(curve), paths.REPORT / "training_curve.png")
    if evaluations["classifiers"]:
        write_samples(paths.SAMPLES, predictions, evaluations["class_names"])
        write_pictures(evaluations)
    else:
        write_samples(paths.SAMPLES, surest_of_the_pool(dataset), evaluations["class_names"])


def write_pictures(evaluations: dict[str, Any]) -> None:
    """The page's pictures of a run that was judged, as files."""
    learned = evaluations["classifiers"][evaluations["method"]]
    pictures.save_png(
        pictures.confusion_matrix(learned["confusion"], evaluations["class_names"]),
        paths.REPORT / "confusion_matrix.png",
    )
    pictures.save_png(pictures.reliability_diagram(learned), paths.REPORT / "reliability.png")
    if len(evaluations["few_shot_curve"]) > 1:
        found, best = evaluations["classifiers"], best_baseline(evaluations)
        figure = pictures.few_shot_curve(evaluations["few_shot_curve"], found["zero-shot"]["accuracy"],
                                         best_baseline=(best, found[best]["accuracy"]))  # fmt: skip
        pictures.save_png(figure, paths.REPORT / "few_shot_curve.png")


def read_targets(params: Params) -> dict[str, dict[str, Any]]:
    """The evaluations of the test sets that params.yaml names now; what lies beside them is of earlier ones."""
    return {name: read_json(paths.JUDGED / name / "evaluation.json") for name in params.tests}


def read_pseudo_labels(dataset: Dataset, card: dict[str, Any]) -> dict[str, Any] | None:
    """What zero-shot called the images that were learned from; where the data set knows better, how often it was right.

    None where the training images had labels. `card` is the prompt's.
    """
    split = read_split(paths.SPLIT)
    labels = read_labels(paths.LABELS, split)
    if labels is None:
        return None
    if card["data"].get("labels_digest") != origin_of(paths.LABELS, labels)["labels_digest"]:
        raise ArtifactError(f"the prompt in artifacts/ was learned from other labels than those in {paths.LABELS}: "
                            "run `dvc repro`")  # fmt: skip
    truth = {image.digest: image.label for image in dataset.images if image.label != NO_LABEL}
    named = [(split.train[row].digest, int(label)) for row, label in zip(labels.chosen.rows, labels.chosen.labels,
                                                                         strict=True)]  # fmt: skip
    return {**pseudo_label_counts(named, split.class_names, truth, pool=len(split.train)),
            "labellers": [one.name for one in labels.labellers]}  # fmt: skip


def surest_of_the_pool(dataset: Dataset) -> list[dict[str, Any]]:
    """Where no image is labelled: a path and zero-shot's label for each image that was learned from."""
    split = read_split(paths.SPLIT)
    labels = read_labels(paths.LABELS, split)
    if labels is None:
        return []
    images = located([split.train[row] for row in labels.chosen.rows], dataset)
    return [{"label": int(label), "path": image.path} for label, image in zip(labels.chosen.labels, images,
                                                                             strict=True)]  # fmt: skip


def write_samples(folder: Path, predictions: list[dict[str, Any]], names: list[str]) -> None:
    """An image of each of the first classes, as files to try `coop predict` on: test images where there are some."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    first = {answer["label"]: answer["path"] for answer in reversed(predictions)}
    for label in sorted(first)[:_SAMPLES]:
        name = re.sub(r"[^A-Za-z0-9]+", "-", names[label]).strip("-") or f"class-{label}"
        read_image(paths.RAW / first[label]).save(folder / f"{label}-{name[:40]}.png")


def read_table(path: Path) -> list[dict[str, Any]]:
    """A CSV of numbers and paths; empty cells are None."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: _value(name, cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: run the stage that writes it with `dvc repro`") from None


def _value(name: str, cell: str) -> Any:
    if name in ("path", "digest"):
        return cell
    if cell == "":
        return None
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)


if __name__ == "__main__":
    console.run(main)
