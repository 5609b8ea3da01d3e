"""Watch flow: what the champion is sent against its test images -> a look in MLflow, and an event past a limit. Pool
`cpu`.

The automation `retrain-on-drift` answers the event with a run of `retrain`, whose gate decides as ever.
"""

from prefect import flow, get_run_logger, runtime
from prefect.events import emit_event

from coop_core.params import load_params
from pipelines import paths
from pipelines.console import prepare
from pipelines.flows.client import show_markdown
from pipelines.flows.lifeline import end_with_worker
from pipelines.flows.names import on_server
from pipelines.flows.pools import DRIFT, WATCHED
from pipelines.records.server import open_records
from pipelines.serving.watching import Look, as_json, as_markdown
from pipelines.serving.watching import watch as watch_once


@flow(name=on_server("watch"), log_prints=False)
def watch() -> str:
    """Look at the newest images that the champion was sent, where there are new ones; nothing to watch is no fault."""
    prepare()
    end_with_worker()
    logger, params = get_run_logger(), load_params(paths.PARAMS).watch
    found = watch_once(open_records(), params, ask=raise_alarm, flow_run=str(runtime.flow_run.id))
    if isinstance(found, str):
        logger.info("%s", found)
        return found
    show_markdown(as_markdown(found), key="watch")
    logger.info("%s", found.sentence)
    return found.sentence


def raise_alarm(found: Look) -> None:
    """Tell Prefect, whose automation asks for the retraining."""
    its = found.gathered
    resource = {"prefect.resource.id": f"{on_server(WATCHED)}.{its.model}", "prefect.resource.name": its.model,
                "coop.version": its.version.number}  # fmt: skip
    emit_event(DRIFT, resource, payload=as_json(found) | {"sentence": found.sentence})
    get_run_logger().warning("%s: a retraining is asked for", found.sentence)
