"""Probes of Prefect and of this machine: settings -> whether workers live, and disk, clock and device are well."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import httpx

from coop_core.errors import ServiceError
from pipelines.environment import LOOPBACK
from pipelines.finding import Finding, unused, well, wrong
from pipelines.services.planning import ASKED_OF_PREFECT, find_devices, prefect_address
from pipelines.services.supervision import fault, opener
from pipelines.settings import Settings, choose_device, is_own, named, prefect_login

PREFECT, CLOCK, DISK, GPU = "Prefect", "clock", "disk", "GPU"
POOLS = ("cpu", "gpu")
_SECONDS = 5
_SKEW_SECONDS = 30
"""Claims of other machines are judged by their clocks; S3 refuses beyond 15 minutes."""
_FREE_BYTES = 2_000_000_000


def probe_prefect(settings: Settings) -> Iterator[Finding]:
    """The server, and the live workers of each of our pools."""
    names = [f"pool {named(settings, pool)}" for pool in POOLS]
    if settings.prefect_api_url is None:
        yield unused(PREFECT, "COOP_PREFECT_API_URL is not set: sweeps run here")
        yield from (unused(name, "not tried") for name in names)
        return
    address, login = prefect_address(settings), prefect_login(settings)
    if said := fault(address + ASKED_OF_PREFECT, login):
        start = "`make up`" if is_own(settings.prefect_api_url, settings.prefect_port) else "start that server"
        mend = f"correct COOP_PREFECT_API_URL or {start}"
        login_wrong = "set COOP_PREFECT_API_AUTH to NAME:PASSWORD"
        yield wrong(PREFECT, f"{address} {said}: {login_wrong if '(40' in said else mend}")
        yield from (unused(name, "not tried: Prefect does not answer") for name in names)
        return
    yield well(PREFECT, address)
    for name in names:
        yield _probe_pool(f"{address}/api", name, login)


def _probe_pool(api: str, name: str, login: str | None) -> Finding:
    pool = f"{api}/work_pools/{name.removeprefix('pool ')}/workers/filter"
    auth = httpx.BasicAuth(*login.split(":", 1)) if login else None
    try:
        own = urlsplit(api).hostname in LOOPBACK  # which no proxy stands before
        answer = httpx.post(pool, json={}, auth=auth, timeout=_SECONDS, trust_env=not own)
        if answer.status_code == 404:
            return wrong(name, "is not on the server: `make up` makes it, or python -m pipelines.flows.bootstrap")
        answer.raise_for_status()
        alive = [worker["name"] for worker in answer.json() if worker["status"] == "ONLINE"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        return wrong(name, f"cannot be asked about ({type(error).__name__}): look at the log of Prefect's server")
    if not alive:
        return wrong(name, "has no live worker, so that runs stay Late: `make up` starts one")
    return well(name, f"{len(alive)} live: {', '.join(sorted(alive))}")


def probe_clock(settings: Settings) -> Iterator[Finding]:
    """The servers' clocks by the Date of an answer, against ours."""
    servers = {"MLflow": settings.tracking_uri, "Prefect": settings.prefect_api_url, "S3": settings.s3_endpoint_url}
    skews = {name: skew for name, address in servers.items()
             if address and address.startswith("http") and (skew := _skew(address)) is not None}  # fmt: skip
    if not skews:
        yield unused(CLOCK, "no server to compare with")
        return
    name, skew = max(skews.items(), key=lambda item: abs(item[1]))
    side = "ahead of" if skew > 0 else "behind"
    if abs(skew) > _SKEW_SECONDS:
        yield wrong(CLOCK, f"this machine is {abs(skew):.0f} s {side} {name}'s server: set both by NTP, because claims "
                           "are judged by the clocks")  # fmt: skip
    else:
        yield well(CLOCK, f"within {max(1, round(abs(skew)))} s of {', '.join(sorted(skews))}")


def _skew(address: str) -> float | None:
    """Seconds that this machine is ahead of a server, whatever that answers; None when it does not."""
    answer: Any
    try:
        answer = opener(address).open(address, timeout=_SECONDS)
    except HTTPError as error:
        answer = error
    except (OSError, ValueError):
        return None
    with answer:
        date = answer.headers.get("Date")
    return (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds() if date else None


def probe_machine(settings: Settings) -> Iterator[Finding]:
    """Room on the disks of the project and of the cache, and the device that trains."""
    short = {}
    for place in (Path.cwd(), settings.cache_folder.absolute()):
        while not place.exists():
            place = place.parent
        if (free := shutil.disk_usage(place).free) < _FREE_BYTES:
            short[str(place)] = f"{free / 1e9:.1f} GB free at {place}"
    if short:
        yield wrong(DISK, f"{'; '.join(short.values())}: free space, or set COOP_CACHE_FOLDER elsewhere")
    else:
        yield well(DISK, f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB free")
    try:
        device = choose_device(settings)
    except ServiceError as error:
        yield wrong(GPU, str(error))
        return
    if device == "cpu":
        there = find_devices(settings.model_copy(update={"device": "auto"})) if settings.device == "auto" else []
        if there:
            yield wrong(GPU, f"nvidia-smi lists {len(there)}, but torch sees none: install a torch with CUDA, or set "
                             "COOP_DEVICE=cpu")  # fmt: skip
        else:
            yield unused(GPU, "the processor trains" + ("" if settings.device == "cpu" else ": there is none"))
        return
    yield well(GPU, f"{device}: {len(find_devices(settings)) or 1} of them")
