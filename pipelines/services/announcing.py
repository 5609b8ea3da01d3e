"""What happened to the champion -> an event in Prefect, where automations take it on; nobody waits for more than that.

Without a Prefect server nothing is announced. One that does not answer is no reason to fail: what happened, happened.
"""

import base64
import json
import logging
import uuid
from datetime import UTC, datetime
from http.client import HTTPException
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from pipelines.environment import LOOPBACK
from pipelines.services.supervision import connect
from pipelines.settings import Settings, named, prefect_login

log = logging.getLogger(__name__)

CHAMPION_CHANGED = "coop.champion.changed"
GATE_REFUSED = "coop.gate.refused"
MODEL = "coop.model"
"""Of a registered model's resource in Prefect, before its name."""
_SECONDS = 5.0


def announce(event: str, settings: Settings, *, model: str, text: str, **facts: str | None) -> None:
    """Tell Prefect's server of an event of a registered model; `text` is what people read."""
    settings = _with_server(settings)
    if settings.prefect_api_url is None:
        return
    told = [{
        "id": str(uuid.uuid4()), "occurred": datetime.now(UTC).isoformat(), "event": event,
        "resource": {"prefect.resource.id": f"{named(settings, MODEL)}.{model}", "prefect.resource.name": model},
        "payload": {"text": text, "model": model, **facts},
    }]  # fmt: skip
    request = Request(f"{settings.prefect_api_url.rstrip('/')}/events", json.dumps(told).encode(),
                      {"Content-Type": "application/json"})  # fmt: skip
    if login := prefect_login(settings):
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    own = urlsplit(settings.prefect_api_url).hostname in LOOPBACK
    try:
        build_opener(*([ProxyHandler({})] if own else [])).open(request, timeout=_SECONDS).close()
    except (OSError, HTTPException, ValueError) as error:
        level = logging.WARNING if settings.notify_url else logging.DEBUG
        log.log(level, "Prefect at %s could not be told (%s): nobody is notified", settings.prefect_api_url, error)


def _with_server(settings: Settings) -> Settings:
    """With the address of the server of `make up`, where that runs and the settings name no other."""
    if settings.prefect_api_url is not None or connect(settings.services_folder.absolute()) is None:
        return settings
    return settings.model_copy(update={"prefect_api_url": f"http://127.0.0.1:{settings.prefect_port}/api"})
