"""Sweeping: params.yaml -> trials that are not on record yet -> trainers -> what came of all of them, on record.

A killed sweep started again finds its finished trials in MLflow and does the rest. Where trials run is the
caller's choice: `execute` takes groups of orders and reports events (see `pipelines.sweeps.trainers`).
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coop_core.errors import ServiceError
from coop_core.files import digest_path
from coop_core.params import DatasetParams, Params, flat
from coop_core.sweeps.sweep import Trial, choice_key, next_choices, require_sweep, scores, trials
from pipelines import paths
from pipelines.locks import alone
from pipelines.records.server import Records, heartbeat
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
from pipelines.sweeps.outcome import Outcome, Standing, conclude, result_of, write_record
from pipelines.sweeps.trainer import Order
from pipelines.sweeps.trainers import Event

log = logging.getLogger(__name__)

Execute = Callable[[Sequence[Sequence[Order]], Callable[[Event], object]], None]
_TOGETHER = 8
"""Trials that are trained side by side."""


def check(params: Params) -> None:
    """Build every combination of the first round, so that what is not valid is told before anything is started.

    Raises
    ------
    ParamsError
    """
    trials(params, next_choices(params, {}))


def sweep(
    params: Params,
    records: Records,
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
    lock = records.settings.cache_folder / paths.SWEEP_LOCKS / sweep_key(tree, core_digest())
    with alone(lock, otherwise="this very sweep is under way here already: wait for it, or stop it"):
        return _sweep(params, records, execute, tree=tree, tags=tags or {}, show=show)


def _sweep(
    params: Params, records: Records, execute: Execute, *, tree: dict[str, Any], tags: dict[str, str],
    show: Callable[[Standing], object],
) -> Outcome:  # fmt: skip
    plan, code = require_sweep(params), core_digest()
    for lost in reconcile(records):
        log.info("closed run %s, whose process was gone", lost)
    run_id = open_sweep(
        records, name=plan.name, key=sweep_key(tree, code), params=flat(tree),
        tags={"code_revision": code_revision(), **tags},
    )  # fmt: skip
    try:
        with heartbeat(records, [run_id]):
            standing = _run_trials(params, records, execute, run_id=run_id, code=code, show=show)
            outcome = conclude(params, run_id=run_id, standing=standing)
            _finish(outcome, records)
            return outcome
    except Exception as error:
        _close(records, run_id, "FAILED", f"{type(error).__name__}: {error}")
        raise
    except BaseException:  # Ctrl-C, or one of Prefect's signals
        _close(records, run_id, "KILLED", "stopped")
        raise


def _finish(outcome: Outcome, records: Records) -> None:
    """Log what came of the sweep and close its run."""
    metrics = {name: outcome.winner.mean(name) for name in ("val_accuracy", "accuracy", "zero_shot_accuracy")}
    files = [*outcome.files, write_record(outcome)]
    finish_sweep(records, outcome.run_id, metrics=metrics, params=outcome.values, files=files)


def _close(records: Records, run_id: str, status: str, reason: str) -> None:
    """Close the sweep's run; where MLflow does not answer, the reconciler will, and the first fault is what is told."""
    try:
        close_run(records, run_id, status, reason=reason)
    except ServiceError as error:
        log.warning("the sweep's run stays open for now: %s", error)


def _run_trials(
    params: Params, records: Records, execute: Execute, *, run_id: str, code: str, show: Callable[[Standing], object]
) -> Standing:
    digests: dict[str, str] = {}
    standing, settings = Standing(), records.settings
    judged: dict[str, float] = {}
    tags = {"coop.sweep_name": require_sweep(params).name}
    while choices := next_choices(params, judged):
        by_key: dict[str, Trial] = {}
        for trial in trials(params, choices):
            images, tests = _digest(trial.params.dataset, digests, settings), _test_digests(trial, digests, settings)
            key = trial.key(dataset_digest=images, weights_digest=_weights_digest(trial, digests), code=code,
                            tests=tests)  # fmt: skip
            by_key[key] = trial
        standing.planned += len(by_key)
        for key, found in finished_trials(records, code=code).items():
            if key in by_key and key not in standing.results:
                standing.results[key] = result_of(by_key[key], found.metrics, found.run_id)
                standing.found += 1
        show(standing)
        missing = {key: trial for key, trial in by_key.items() if key not in standing.results}
        orders = {
            key: Order(key, trial.name, trial.params.model_dump(exclude={"gate", "sweep"}),
                       _digest(trial.params.dataset, digests, settings), _weights_digest(trial, digests), code, run_id,
                       {**tags, "method": trial.params.method.name, "shots": str(trial.params.split.shots),
                        "seed": str(trial.params.seed)}, _test_digests(trial, digests, settings))
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
        named = (*map(str, backbone.values()), order.dataset_digest, split["classes"], str(order.tests))
        return (params["train"]["epochs"] * split["shots"], *named, params["method"]["name"])

    found: list[list[Order]] = []
    for _, alike in itertools.groupby(sorted(orders, key=shared, reverse=True), key=shared):
        together = list(alike)
        found += [together[start : start + _TOGETHER] for start in range(0, len(together), _TOGETHER)]
    return found


def _digest(dataset: DatasetParams, known: dict[str, str], settings: Settings) -> str:
    """The content of a data set as it is now; each is looked at once."""
    key = dataset.model_dump_json(include=set(DatasetParams.model_fields))
    if key not in known:
        known[key] = cached_dataset(dataset, settings).digest
    return known[key]


def _test_digests(trial: Trial, known: dict[str, str], settings: Settings) -> dict[str, str]:
    """The same of the further test sets, by name."""
    return {name: _digest(test, known, settings) for name, test in trial.params.tests.items()}


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
            standing.results[key] = result_of(by_key[key], event["metrics"], event["run_id"])
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
