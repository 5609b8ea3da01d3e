"""Retrain flow: data sources -> `dvc repro` where something changed -> gate -> champion or not. Pool `cpu`."""

from pathlib import Path

from prefect import flow, get_run_logger, runtime

from coop_core.params import load_params
from pipelines import paths
from pipelines.champion.promotion import user, was_champion
from pipelines.champion.retraining import alone, reproduce, summary, waits_for_judgement
from pipelines.console import prepare
from pipelines.flows.client import page, show_markdown, start
from pipelines.flows.lifeline import end_with_worker
from pipelines.flows.names import on_server
from pipelines.flows.promote import decide_and_promote
from pipelines.records.claims import claim_retraining
from pipelines.records.server import open_records


@flow(name=on_server("retrain"), log_prints=False)
def retrain() -> str:
    """Retrain in this workspace if a data source, a parameter or the code changed, and promote what passes the gate.

    Where params.yaml wants a person's yes, a run of `promote` asks for it, so that the workspace is free meanwhile.
    """
    prepare()
    end_with_worker()
    logger, records = get_run_logger(), open_records()
    decision, said = None, "nothing had changed"
    with alone(records.settings), claim_retraining(records, by=f"{user()} in {Path.cwd()}"):
        reproduced = reproduce(records, flow_run=str(runtime.flow_run.id))
        version = reproduced.version if reproduced else waits_for_judgement(records)
        if version is not None and was_champion(records, version):
            said = f"version {version} has been champion before: only `coop promote --version {version}` brings it back"
        elif version is not None and load_params(paths.PARAMS).gate.approval_minutes:
            asked = {"version": int(version)}
            run = start("promote", parameters=asked, flow_run_name=f"version {version}")
            said = f"version {version} waits for the gate and a person: {page(run.id)}"
        elif version is not None:
            decision, said = decide_and_promote(records, version)
    show_markdown(summary(reproduced, decision, said), key="retraining")
    logger.info(said)
    return said
