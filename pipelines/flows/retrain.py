"""Retrain flow: data sources -> `dvc repro` where something changed -> gate -> champion or not. Pool `cpu`."""

from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact

from pipelines.console import prepare
from pipelines.flows.lifeline import end_with_worker
from pipelines.flows.promote import decide_and_promote
from pipelines.retraining import alone, reproduce, summary, waits_for_judgement
from pipelines.settings import load_settings


@flow(name="retrain", log_prints=False)
def retrain() -> str:
    """Retrain in this workspace if a data source, a parameter or the code changed, and promote what passes the gate."""
    prepare()
    end_with_worker()
    logger, settings = get_run_logger(), load_settings()
    with alone(settings):
        reproduced = reproduce(settings, flow_run=str(runtime.flow_run.id))
        waiting = reproduced.version if reproduced else waits_for_judgement(settings)
        if waiting is None:
            logger.info("nothing had changed")
            create_markdown_artifact(summary(None, None, False), key="retraining")
            return "nothing had changed"
        decision, said = decide_and_promote(settings, waiting)
        create_markdown_artifact(summary(reproduced, decision, said == "promoted"), key="retraining")
    logger.info("version %s: %s", waiting, said)
    return said
