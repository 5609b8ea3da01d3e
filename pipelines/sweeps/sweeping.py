"""Sweeping: params.yaml -> trials that are not on record yet -> trainers -> a table, a picture and the winner.

A killed sweep started again finds its finished trials in MLflow and does the rest. Where trials run is the
caller's choice: `execute` takes groups of orders and reports events (see `pipelines.sweeps.trainers`).
"""

import csv
import io
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coop_core.errors import ServiceError
from coop_core.files import digest_path, write_text
from coop_core.params import Params, flat, load_params, patch
from coop_core.report import pictures
from coop_core.sweeps.sweep import (
    Result,
    Row,
    Trial,
    choice_key,
    columns,
    next_choices,
    require_sweep,
    rows,
    scores,
    short,
    target_task,
    tasks,
    trials,
    winner,
    winning_values,
)
from pipelines import paths
from pipelines.locks import alone
from pipelines.records.server import heartbeat
from pipelines.records.trials import (
    close_run,
    finish_sweep,
    finished_trials,
    open_sweep,
    reconcile,
    sweep_key,
)
from pipelines.revision import code_revision, core_digest
from pipelines.settings import Settings
from pipelines.sources.datasets import cached_dataset
from pipelines.sweeps.trainer import Order
from pipelines.sweeps.trainers import Event

log = logging.getLogger(__name__)

Execute = Callable[[Sequence[Sequence[Order]], Callable[[Event], object]], None]
_TOGETHER = 8
"""Trials that are trained side by side."""


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


def check(params: Params) -> None:
    """Build every combination of the first round, so that what is not valid is told before anything is started.

    Raises
    ------
    ParamsError
    """
    trials(params, next_choices(params, {}))


def sweep(
    params: Params,
    settings: Settings,
    execute: Execute,
    *,
    tags: dict[str, str] | None = None,
    show: Callable[[Standing], object] = lambda standing: None,
) -> Outcome:
    """Run what is missing of the sweep in `params`, then judge it.

    Raises
    ------
    ParamsError
        When a combination is not valid, before anything is trained.
    ServiceError
        When more trials fail than sweep.max_failed allows; what is finished is kept.
    """
    check(params)
    tree = {**params.of_run(), "sweep": require_sweep(params).model_dump()}
    lock = settings.cache_folder / paths.SWEEP_LOCKS / sweep_key(tree, core_digest())
    with alone(lock, otherwise="this very sweep is under way here already: wait for it, or stop it"):
        return _sweep(params, settings, execute, tree=tree, tags=tags or {}, show=show)


def _sweep(
    params: Params, settings: Settings, execute: Execute, *, tree: dict[str, Any], tags: dict[str, str],
    show: Callable[[Standing], object],
) -> Outcome:  # fmt: skip
    plan, code = require_sweep(params), core_digest()
    for lost in reconcile(settings):
        log.info("closed run %s, whose process was gone", lost)
    run_id = open_sweep(
        settings, name=plan.name, key=sweep_key(tree, code), params=flat(tree),
        tags={"code_revision": code_revision(), **tags},
    )  # fmt: skip
    try:
        with heartbeat(settings, [run_id]):
            standing = _run_trials(params, settings, execute, run_id=run_id, code=code, show=show)
            return _conclude(params, settings, run_id, standing)
    except Exception as error:
        _close(settings, run_id, "FAILED", f"{type(error).__name__}: {error}")
        raise
    except BaseException:  # Ctrl-C, or one of Prefect's signals
        _close(settings, run_id, "KILLED", "stopped")
        raise


def _close(settings: Settings, run_id: str, status: str, reason: str) -> None:
    """Close the sweep's run; where MLflow does not answer, the reconciler will, and the first fault is what is told."""
    try:
        close_run(settings, run_id, status, reason=reason)
    except ServiceError as error:
        log.warning("the sweep's run stays open for now: %s", error)


def _run_trials(
    params: Params, settings: Settings, execute: Execute, *, run_id: str, code: str, show: Callable[[Standing], object]
) -> Standing:
    digests: dict[str, str] = {}
    standing = Standing()
    judged: dict[str, float] = {}
    tags = {"coop.sweep_name": require_sweep(params).name}
    while choices := next_choices(params, judged):
        by_key: dict[str, Trial] = {}
        for trial in trials(params, choices):
            images, weights = _digest(trial, digests, settings), _weights_digest(trial, digests)
            by_key[trial.key(dataset_digest=images, weights_digest=weights, code=code)] = trial
        standing.planned += len(by_key)
        for key, found in finished_trials(settings, code=code).items():
            if key in by_key and key not in standing.results:
                standing.results[key] = _result(by_key[key], found.metrics, found.run_id)
                standing.found += 1
        show(standing)
        missing = {key: trial for key, trial in by_key.items() if key not in standing.results}
        orders = {
            key: Order(key, trial.name, trial.params.of_run(), _digest(trial, digests, settings),
                       _weights_digest(trial, digests), code, run_id,
                       {**tags, "method": trial.params.method.name, "shots": str(trial.params.split.shots),
                        "seed": str(trial.params.seed)})
            for key, trial in missing.items()
        }  # fmt: skip
        if orders:
            execute(groups(list(orders.values())), _listener(params, standing, by_key, show))
        if unanswered := set(missing) - set(standing.results) - set(standing.failures):
            raise ServiceError(f"{len(unanswered)} trials were not answered for: `coop sweep` again does them")
        judged |= {choice_key(choice): float("nan") for choice in choices}
        judged |= scores(params, list(standing.results.values()))
    return standing


def groups(orders: Sequence[Order]) -> list[list[Order]]:
    """Orders that share data set, backbone and number of steps, a few in each group, the longest groups first."""

    def shared(order: Order) -> tuple[Any, ...]:
        params = order.params
        backbone, split = params["backbone"], params["split"]
        named = (*map(str, backbone.values()), order.dataset_digest, split["classes"])
        return (params["train"]["epochs"] * split["shots"], *named, params["method"]["name"])

    found: list[list[Order]] = []
    for _, alike in itertools.groupby(sorted(orders, key=shared, reverse=True), key=shared):
        together = list(alike)
        found += [together[start : start + _TOGETHER] for start in range(0, len(together), _TOGETHER)]
    return found


def _digest(trial: Trial, known: dict[str, str], settings: Settings) -> str:
    """The content of a trial's data set as it is now; each is looked at once."""
    dataset = trial.params.dataset
    key = dataset.model_dump_json()
    if key not in known:
        known[key] = cached_dataset(dataset, settings).digest
    return known[key]


def _weights_digest(trial: Trial, known: dict[str, str]) -> str:
    """The content of `backbone.files` as it is now; each is looked at once, for a checkpoint may be large."""
    files = trial.params.backbone.files
    if files not in known:
        known[files] = digest_path(Path(files))
    return known[files]


def _listener(
    params: Params, standing: Standing, by_key: dict[str, Trial], show: Callable[[Standing], object]
) -> Callable[[Event], None]:
    plan = require_sweep(params)

    def hear(event: Event) -> None:
        key = event["key"]
        if event["event"] == "finished":
            standing.results[key] = _result(by_key[key], event["metrics"], event["run_id"])
        elif event["event"] == "failed":
            standing.failures[key] = event["reason"]
            log.warning("%s: %s", by_key[key].name, event["reason"])
        standing.running.pop(key, None)
        if event["event"] in ("started", "progress"):
            standing.running[key] = event.get("done", 0.0)
        show(standing)
        if len(standing.failures) > plan.max_failed * standing.planned:
            raise ServiceError(
                f"{len(standing.failures)} of {standing.planned} trials failed, more than sweep.max_failed "
                f"{plan.max_failed:g} allows; the last: {event['reason']}; `coop sweep` again does what is missing"
            )

    return hear


def _result(trial: Trial, metrics: dict[str, float], run_id: str) -> Result:
    return Result(
        trial, val_accuracy=metrics["val_accuracy"], val_loss=metrics["val_loss"], accuracy=metrics["accuracy"],
        zero_shot_accuracy=metrics["zero_shot_accuracy"], run_id=run_id,
    )  # fmt: skip


def _conclude(params: Params, settings: Settings, run_id: str, standing: Standing) -> Outcome:
    """Choose by validation accuracy, write the files, and close the sweep's run."""
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
    metrics = {name: best.mean(name) for name in ("val_accuracy", "accuracy", "zero_shot_accuracy")}
    finish_sweep(settings, run_id, metrics=metrics, params=values, files=files)
    return Outcome(plan.name, run_id, standing, table, best, values, folder, files)


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
    names = ("val_accuracy", "val_loss", "accuracy", "zero_shot_accuracy", "run_id")
    lines = [
        {**columns(result.trial.task), **columns(result.trial.choice), "seed": result.trial.params.seed,
         **{name: getattr(result, name) for name in names}}
        for result in results
    ]  # fmt: skip
    table = io.StringIO()
    fields = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(table, fieldnames=fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return table.getvalue()
