"""Sweep flow: params -> trials on the workers of the pool `gpu` -> a table, a picture and the winner. Pool `cpu`."""

import time
from typing import Any, cast
from uuid import UUID

from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_link_artifact, create_progress_artifact, update_progress_artifact

from coop_core.params import Params, load_params, parse_params
from pipelines import paths
from pipelines.console import prepare
from pipelines.flows.client import (
    PROGRESS,
    AwayError,
    DeployedTrainers,
    cancel_orphans,
    patiently,
    show_markdown,
)
from pipelines.flows.lifeline import end_with_worker
from pipelines.flows.names import on_server
from pipelines.records.server import open_records
from pipelines.records.trials import sweep_links
from pipelines.sweeps.outcome import Standing
from pipelines.sweeps.sweeping import sweep as run_sweep
from pipelines.sweeps.view import as_markdown, details

_SHOWN_SECONDS = 3.0


@flow(name=on_server("sweep"), log_prints=False)
def sweep(params: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the sweep of `params` (a whole params.yaml as JSON), or of this workspace's params.yaml -> what won."""
    prepare()
    end_with_worker()
    records, own = open_records(), str(runtime.flow_run.id)
    wanted: Params = load_params(paths.PARAMS) if params is None else parse_params(params, where="the run's params")
    cancel_orphans()
    trainers = DeployedTrainers(records, sweep_run=own)
    outcome = run_sweep(wanted, records, trainers, tags={"prefect.flow_run_id": own}, show=_progress())
    show_markdown(as_markdown(outcome), key="sweep-result", description=f"sweep {outcome.name}")
    runs = [result.run_id for row in outcome.rows for result in row.results]
    link = sweep_links(records, outcome.run_id, runs)[1]
    patiently(lambda: create_link_artifact(link, key="sweep-comparison", link_text="MLflow"))
    get_run_logger().info("winner: %s", outcome.values or "params.yaml as it is")
    return outcome.values


def _progress() -> Any:
    """Shows a standing as a bar on the run's page, at most every few seconds, and in the log when it changes."""
    logger, artifact = get_run_logger(), cast(UUID, create_progress_artifact(0.0, key=PROGRESS))
    shown, logged = 0.0, -1

    def show(standing: Standing) -> None:
        nonlocal shown, logged
        finished = standing.done == standing.planned
        if time.monotonic() - shown < _SHOWN_SECONDS and not finished:
            return
        shown = time.monotonic()
        try:
            percent = 100 * standing.done / max(1, standing.planned)
            patiently(lambda: update_progress_artifact(artifact, percent, details(standing)), seconds=0)
        except AwayError:  # the bar is not the work
            return
        if standing.done != logged:
            logged = standing.done
            logger.info("%d of %d trials; %s", standing.done, standing.planned, details(standing) or "none training")

    return show
