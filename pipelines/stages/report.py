"""report: everything the stages before it found -> artifacts/report, one page and the pictures on it."""

import csv
from pathlib import Path
from typing import Any

from coop_core import pictures
from coop_core.dataset import read_dataset
from coop_core.errors import ArtifactError
from coop_core.files import read_json
from coop_core.report import write_report
from pipelines import console, paths


def main() -> None:
    evaluations = read_json(paths.EVALUATION / "evaluation.json")
    curve = read_table(paths.PROMPT / "curve.csv")
    dataset = read_dataset(paths.RAW)
    write_report(
        paths.REPORT / "report.html",
        evaluations=evaluations,
        curve=curve,
        predictions=read_table(paths.EVALUATION / "predictions.csv"),
        words=read_json(paths.PROMPT / "words.json"),
        card=read_json(paths.PROMPT / "card.json"),
        baseline_card=read_json(paths.BASELINES / "card.json"),
        dataset_about={**dataset.about, "name": dataset.name, "counts": dataset.counts()},
        image_root=paths.RAW,
    )
    learned = evaluations["classifiers"][evaluations["method"]]
    pictures.save_png(pictures.training_curve(curve), paths.REPORT / "training_curve.png")
    pictures.save_png(
        pictures.confusion_matrix(learned["confusion"], evaluations["class_names"]),
        paths.REPORT / "confusion_matrix.png",
    )
    pictures.save_png(pictures.reliability_diagram(learned), paths.REPORT / "reliability.png")
    if len(evaluations["few_shot_curve"]) > 1:
        zero_shot = evaluations["classifiers"]["zero-shot"]["accuracy"]
        figure = pictures.few_shot_curve(evaluations["few_shot_curve"], zero_shot)
        pictures.save_png(figure, paths.REPORT / "few_shot_curve.png")


def read_table(path: Path) -> list[dict[str, Any]]:
    """A CSV of numbers and paths; empty cells are None."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: _value(name, cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: run the stage that writes it with `dvc repro`") from None


def _value(name: str, cell: str) -> Any:
    if name == "path":
        return cell
    if cell == "":
        return None
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)


if __name__ == "__main__":
    console.run(main)
