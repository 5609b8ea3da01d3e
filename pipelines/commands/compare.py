"""Comparing on the command line: tracked runs -> one table."""

from typing import Any

from rich import box
from rich.table import Table

from coop_core.errors import ServiceError
from pipelines.console import console
from pipelines.records.runs import list_runs
from pipelines.records.server import Records

_ORDER = {"when": "start_time", "accuracy": "accuracy", "gain": "gain_over_zero_shot"}


def run_rows(records: Records, *, limit: int, sort: str = "when") -> list[dict[str, Any]]:
    """One flat object a run, the best or newest first.

    Raises
    ------
    ServiceError
        For an unknown sort column, or when MLflow does not answer.
    """
    if sort not in _ORDER:
        raise ServiceError(f"--sort {sort} is not one of: {', '.join(_ORDER)}")
    rows = []
    for run in list_runs(records, limit=limit):
        tags, metrics = run["tags"], run["metrics"]
        rows.append(
            {
                "run_id": run["run_id"],
                "experiment_id": run["experiment_id"],
                "start_time": run["start_time"],
                "version": f"{tags['coop.model']}/{tags['coop.version']}" if "coop.version" in tags else None,
                **{key: tags.get(key) for key in ("dataset", "backbone", "method", "shots", "seed", "test_digest")},
                **{key: metrics.get(key) for key in ("accuracy", "gain_over_zero_shot", "val_accuracy")},
                "linear_probe": metrics.get("test/linear_probe/accuracy"),
                "learning_rate": run["params"].get("train.learning_rate"),
                "epochs": run["params"].get("train.epochs"),
            }
        )
    return sorted(rows, key=lambda row: row[_ORDER[sort]] or 0, reverse=True)


def print_runs(rows: list[dict[str, Any]], link: str) -> None:
    if not rows:
        console.print("no finished runs yet: `dvc repro` makes one")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("version", "data set", "backbone", "method"):
        table.add_column(column, overflow="fold", no_wrap=column == "version")
    for column in ("shots", "seed", "rate", "top-1", "gain", "probe", "val"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        named = (row[key] or "-" for key in ("version", "dataset", "backbone", "method"))
        numbers = (row[key] or "-" for key in ("shots", "seed", "learning_rate"))
        accuracies = (row[key] for key in ("accuracy", "gain_over_zero_shot", "linear_probe", "val_accuracy"))
        table.add_row(*named, *numbers, *(_percent(value) for value in accuracies))
    console.print(table)
    console.print("Percent of test images; gain over zero-shot, linear probe and validation beside it.")
    if len(rows) > 1:
        console.print(f"Side by side: {link}", soft_wrap=True, highlight=False)
    if len({row["test_digest"] for row in rows}) > 1:
        console.print("These runs were judged on different test images: compare rows of the same data set and split.")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
