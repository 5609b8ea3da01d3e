"""Outcome: what a sweep's trials scored -> the winner, a table and files; and its record, from which it is read again.

The record is a file of the sweep's run. Whoever did not run the sweep reads it there and computes nothing anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coop_core.errors import ServiceError
from coop_core.files import digest_json, table_as_csv, write_json, write_text
from coop_core.params import Params, load_params, patch
from coop_core.report import pictures
from coop_core.sweeps.space import columns, short
from coop_core.sweeps.sweep import (
    Result,
    Row,
    Trial,
    require_sweep,
    rows,
    target_task,
    tasks,
    trials,
    winner,
    winning_values,
)
from pipelines import paths
from pipelines.records.server import Records
from pipelines.records.trials import read_sweep

RECORD = "results.json"
_METRICS = ("val_accuracy", "val_loss", "accuracy", "zero_shot_accuracy")


@dataclass
class Standing:
    """How far a sweep is."""

    planned: int = 0
    results: dict[str, Result] = field(default_factory=dict)
    """By trial key."""
    failures: dict[str, str] = field(default_factory=dict)
    """Reasons by trial key."""
    found: int = 0
    """Results that were on record before."""
    running: dict[str, float] = field(default_factory=dict)
    """Share that is done, by trial key."""

    @property
    def done(self) -> int:
        return len(self.results) + len(self.failures)


@dataclass(frozen=True)
class Outcome:
    name: str
    run_id: str
    standing: Standing
    rows: list[Row]
    winner: Row
    values: dict[str, Any]
    """What to set in params.yaml to make the winner; empty when it is there already."""
    folder: Path
    files: list[Path]


def conclude(params: Params, *, run_id: str, standing: Standing) -> Outcome:
    """Choose by validation accuracy, and write the files that people want of a sweep.

    Raises
    ------
    ServiceError
        When no choice has all its seeds.
    """
    plan, results = require_sweep(params), list(standing.results.values())
    best = winner(params, results)
    if best is None:
        raise ServiceError(f"no choice of sweep {plan.name} has all its seeds: `coop sweep` again does what is missing")
    values, folder = winning_values(load_params(paths.PARAMS), best), paths.SWEEPS / plan.name
    posed = tasks(plan)
    table = sorted(rows(results), key=lambda row: (posed.index(row.task), -row.mean("val_accuracy")))
    text = paths.PARAMS.read_text(encoding="utf-8")
    write_text(folder / "winner.patch", patch(text, values))
    write_text(folder / "results.csv", _csv(results))
    files = [folder / "winner.patch", folder / "results.csv"]
    if "split.shots" in plan.space:
        figure = pictures.sweep_curve(_curve(params, results), zero_shot=best.mean("zero_shot_accuracy"))
        pictures.save_png(figure, folder / "few_shot_curve.png")
        files.append(folder / "few_shot_curve.png")
    return Outcome(plan.name, run_id, standing, table, best, values, folder, files)


def write_record(outcome: Outcome) -> Path:
    """Everything that `read_outcome` needs, exact to the last digit -> its file."""
    standing = outcome.standing
    entries = [
        {"key": key, "task": result.trial.task, "choice": result.trial.choice, "seed": result.trial.params.seed,
         **{name: getattr(result, name) for name in (*_METRICS, "run_id")}, **result.tests}
        for key, result in standing.results.items()
    ]  # fmt: skip
    path = outcome.folder / RECORD
    write_json(path, {"planned": standing.planned, "found": standing.found, "results": entries,
                      "failures": standing.failures})  # fmt: skip
    return path


def read_outcome(params: Params, records: Records, *, flow_run: str) -> Outcome:
    """What came of the sweep in `params` that Prefect's run did, as its run in MLflow has it; that run is only read.

    Raises
    ------
    ServiceError
        When MLflow does not answer, or has no such record.
    """
    run_id, record = read_sweep(records, flow_run=flow_run, file=RECORD)
    choices = {digest_json(entry["choice"]): entry["choice"] for entry in record["results"]}
    known = {digest_json([one.task, one.choice, one.params.seed]): one for one in trials(params, choices.values())}
    results = {
        entry["key"]: result_of(
            known[digest_json([entry["task"], entry["choice"], entry["seed"]])], entry, entry["run_id"]
        )
        for entry in record["results"]
    }
    standing = Standing(record["planned"], results, record["failures"], record["found"])
    return conclude(params, run_id=run_id, standing=standing)


def result_of(trial: Trial, metrics: Mapping[str, Any], run_id: str) -> Result:
    """What a trial scored, from the metrics that its run has."""
    tests = {name: value for name, value in metrics.items() if name.startswith("tests/")}
    return Result(trial, **{name: metrics[name] for name in _METRICS}, run_id=run_id, tests=tests)


def _curve(params: Params, results: Sequence[Result]) -> dict[str, list[tuple[int, float, float]]]:
    """(shots, mean, spread) on the test images for every choice, the best by validation first."""
    target = {name: value for name, value in target_task(params).items() if name != "split.shots"}
    found: dict[str, list[tuple[int, float, float]]] = {}
    order = sorted(rows(results), key=lambda row: (row.task != target_task(params), -row.mean("val_accuracy")))
    for row in order:
        if {name: value for name, value in row.task.items() if name != "split.shots"} == target:
            label = ", ".join(f"{short(name)} {value}" for name, value in columns(row.choice).items())
            point = (row.task["split.shots"], row.mean("accuracy"), row.spread("accuracy"))
            found.setdefault(label or params.method.name, []).append(point)
    return {label: sorted(points) for label, points in found.items()}


def _csv(results: Sequence[Result]) -> str:
    """A line a trial."""
    lines = [
        {**columns(result.trial.task), **columns(result.trial.choice), "seed": result.trial.params.seed,
         **{name: getattr(result, name) for name in (*_METRICS, "run_id")}, **result.tests}
        for result in results
    ]  # fmt: skip
    return table_as_csv(lines)
