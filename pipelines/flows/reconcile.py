"""Reconcile flow: what lost its process -> closed, in MLflow and in Prefect. Runs on a schedule in the pool `cpu`."""

from prefect import flow, get_run_logger

from pipelines.console import prepare
from pipelines.flows.client import cancel_orphans
from pipelines.flows.names import on_server
from pipelines.records.server import open_records
from pipelines.records.trials import reconcile as reconcile_runs
from pipelines.services.workspace import mend_workspace


@flow(name=on_server("reconcile"), log_prints=False)
def reconcile() -> dict[str, list[str]]:
    """Close MLflow runs without a heartbeat, cancel trials whose sweep has ended, and mend what a kill left of DVC."""
    prepare()
    mend_workspace()
    logger = get_run_logger()
    closed, cancelled = reconcile_runs(open_records()), cancel_orphans()
    logger.info("closed %d MLflow runs, cancelled %d runs of ended sweeps", len(closed), len(cancelled))
    return {"closed": closed, "cancelled": cancelled}
