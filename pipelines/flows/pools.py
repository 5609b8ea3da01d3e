"""Pools: a Prefect server -> one that has our work pools and ends runs whose process is gone; again changes nothing."""

from datetime import timedelta
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed
from prefect.workers.process import ProcessWorker

from coop_core.errors import ServiceError
from pipelines.flows.names import on_server
from pipelines.flows.notices import arrange
from pipelines.settings import refusal

POOLS = {
    "cpu": "Flows that wait for others and work that needs no accelerator.",
    "gpu": "Trials: one worker a device, one run at a time each.",
}
CRASH_ZOMBIES, RETRAIN_ON_DRIFT = "crash-zombies", "retrain-on-drift"
DRIFT, WATCHED = "coop.drift", "coop.model"
"""What the flow `watch` calls its event, and what the name of the model it is about begins with."""
SILENCE = timedelta(seconds=90)
"""Three heartbeats of the workers that `make up` starts."""


def bootstrap(api_url: str, *, notify_url: str | None = None, without_workers: bool = False) -> None:
    """Create what is missing on a server and set what is there as it should be.

    `notify_url` is where its automations send what happened; None takes them away. `without_workers` says that no
    worker of our pools is alive, so that what seems to run there is lost.

    Raises
    ------
    ServiceError
        When the server does not answer or refuses.
    """
    try:
        with temporary_settings({PREFECT_API_URL: api_url}), get_client(sync_client=True) as client:
            for name, description in POOLS.items():
                _ensure_pool(client, on_server(name), description)
            _ensure_automation(client, zombie_automation())
            _ensure_automation(client, drift_automation(_retraining(client)))
            arrange(client, notify_url)
            if without_workers:
                _crash_lost_runs(client)
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
        if refused := refusal(status, "PREFECT_API_AUTH_STRING to NAME:PASSWORD"):
            raise ServiceError(f"Prefect at {api_url} {refused}") from error
        reason = " ".join(str(error).split())[:300]
        raise ServiceError(f"Prefect at {api_url} says: {reason}; correct the address or start the server") from error


def zombie_automation() -> AutomationCore:
    """Crash a flow run whose heartbeat stops without an end; the server cannot see a killed process otherwise."""
    beat = "prefect.flow-run.heartbeat"
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    return AutomationCore(
        name=CRASH_ZOMBIES,
        description=f"Flow runs without a heartbeat for {SILENCE.seconds} seconds become crashed.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            after={beat},
            expect={beat} | ends,
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat: its process is gone")],
    )


def drift_automation(retraining: UUID) -> AutomationCore:
    """Run the deployment `retrain`, of which this is the id, when the flow `watch` says that images differ."""
    return AutomationCore(
        name=on_server(RETRAIN_ON_DRIFT),
        description="Retrains when what the champion is sent differs from its test images; the gate decides as ever.",
        trigger=EventTrigger(
            match=ResourceSpecification({"prefect.resource.id": [f"{on_server(WATCHED)}.*"]}),
            expect={DRIFT},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[RunDeployment(source="selected", deployment_id=retraining)],
    )


def _retraining(client: SyncPrefectClient) -> UUID:
    """The id of the deployment `retrain`, which it keeps when it is deployed: made now where it is not there yet."""
    name = on_server("retrain")
    try:
        return client.read_deployment_by_name(f"{name}/{name}").id
    except ObjectNotFound:
        return client.create_deployment(client.create_flow_from_name(name), name, work_pool_name=on_server("cpu"))


def _ensure_pool(client: SyncPrefectClient, name: str, description: str) -> None:
    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        pool = WorkPoolCreate(name=name, type="process", description=description, base_job_template=template)
        client.create_work_pool(pool)


def _ensure_automation(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
    elif (found[0].trigger, found[0].actions) != (wanted.trigger, wanted.actions):
        # An update forgets which runs it was watching, so not without need.
        client.update_automation(found[0].id, wanted)


def _crash_lost_runs(client: SyncPrefectClient) -> None:
    """The automation misses runs whose silence began before a stop of the server longer than its patience."""
    types = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED]
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=types),
                               name=FlowRunFilterStateName(not_any_=["Suspended"]))  # fmt: skip
    pools = WorkPoolFilter(name=WorkPoolFilterName(any_=[on_server(name) for name in POOLS]))
    while runs := client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state), work_pool_filter=pools):
        for run in runs:
            client.set_flow_run_state(run.id, Crashed(message="its process is gone"), force=True)
