"""COOP_NOTIFY_URL -> automations of Prefect's server that send what people want to hear to that address; or none.

The address is kept as a block of Prefect's, which its server stores encrypted and its pages show as dots: it may hold
a token. An address that nobody answers costs a line in the server's log, and no run.
"""

from urllib.parse import urlsplit

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import CallWebhook
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound

from coop_core.errors import ServiceError
from pipelines.flows.names import on_server
from pipelines.services.announcing import CHAMPION_CHANGED, GATE_REFUSED, MODEL

BLOCK = "coop-notify"
_SAID = {  # automation: the events, and what of them is said; both in Prefect's templates
    "notify-champion": ([CHAMPION_CHANGED], "{{ event.payload['text'] | tojson }}"),
    "notify-gate": ([GATE_REFUSED], "{{ event.payload['text'] | tojson }}"),
    "notify-retrain": (
        ["prefect.flow-run.Failed", "prefect.flow-run.Crashed"],
        "{{ (flow.name ~ ' ' ~ flow_run.name ~ ' ' ~ flow_run.state.name ~ ': ' ~ flow_run.state.message) | tojson }}",
    ),
}
_BODY = '{"text": TEXT, "event": {{ event.event | tojson }}}'


def arrange(client: SyncPrefectClient, address: str | None) -> None:
    """Make or correct the automations for an address; without one, remove them.

    Raises
    ------
    ServiceError
        For what is no address of a page; it is not shown.
    """
    if address is None:
        _remove(client)
        return
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServiceError("COOP_NOTIFY_URL is no address: write https://HOST/PATH, or remove it")
    block = Webhook(url=address, headers={"Content-Type": "application/json"}).save(on_server(BLOCK), overwrite=True)
    for short, (events, text) in _SAID.items():
        name = on_server(short)
        wanted = AutomationCore(
            name=name,
            description="Sends JSON with `text` to COOP_NOTIFY_URL; `make up` keeps it as it is.",
            trigger=_trigger(set(events)),
            actions=[CallWebhook(block_document_id=block, payload=_BODY.replace("TEXT", text))],
        )
        found = client.read_automations_by_name(name)
        if not found:
            client.create_automation(wanted)
        elif (found[0].trigger, found[0].actions) != (wanted.trigger, wanted.actions):
            client.update_automation(found[0].id, wanted)


def _trigger(events: set[str]) -> EventTrigger:
    """Each such event by itself; of flow runs only those that retrain or promote."""
    of_runs = any(event.startswith("prefect.") for event in events)
    flows = {"prefect.resource.role": "flow", "prefect.resource.name": [on_server("retrain"), on_server("promote")]}
    resources = "prefect.flow-run.*" if of_runs else f"{on_server(MODEL)}.*"
    return EventTrigger(
        expect=events,
        match=ResourceSpecification({"prefect.resource.id": resources}),
        match_related=ResourceSpecification(flows if of_runs else {}),
        posture=Posture.Reactive,
        threshold=1,
    )


def _remove(client: SyncPrefectClient) -> None:
    for name in _SAID:
        for found in client.read_automations_by_name(on_server(name)):
            client.delete_automation(found.id)
    try:
        block = client.read_block_document_by_name(on_server(BLOCK), "webhook")
    except ObjectNotFound:
        return
    client.delete_block_document(block.id)
