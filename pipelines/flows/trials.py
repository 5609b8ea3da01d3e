"""Trials flow: groups of trials -> one trainer on this worker's device. Runs in the pool `gpu`."""

from typing import Any

from prefect import flow, get_run_logger

from pipelines import paths
from pipelines.console import prepare
from pipelines.environment import service_name
from pipelines.flows.lifeline import end_with_worker
from pipelines.flows.names import on_server
from pipelines.records.server import open_records
from pipelines.sweeps.trainer import Order
from pipelines.sweeps.trainers import LocalTrainers, Slot


@flow(name=on_server("trials"), log_prints=False)
def trials(groups: list[list[dict[str, Any]]]) -> dict[str, str]:
    """Train each group side by side -> reasons of those that failed, by trial key. What they score is in MLflow."""
    prepare()
    end_with_worker()
    logger, records = get_run_logger(), open_records()
    orders = [[Order(**order) for order in group] for group in groups]
    names = {order.key: order.name for group in orders for order in group}
    failed: dict[str, str] = {}

    def hear(event: dict[str, Any]) -> None:
        name = names[event["key"]]
        if event["event"] == "finished":
            logger.info("%s: validation %.3f", name, event["metrics"]["val_accuracy"])
        elif event["event"] == "failed":
            failed[event["key"]] = event["reason"]
            logger.warning("%s failed: %s", name, event["reason"])
        elif event["event"] == "started":
            logger.info("%s: MLflow run %s", name, event["run_id"])

    folder = records.settings.cache_folder / paths.TRAINER_LOGS / service_name()
    LocalTrainers(records, [Slot(None, None)], log_folder=folder)(orders, hear)
    return failed
