"""App: the champion and MLflow's scoring application -> the routes of the server."""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pipelines.serving.batching import Batcher
from pipelines.serving.entrance import VERSION_HEADER, Entrance
from pipelines.serving.guard import Guard
from pipelines.serving.metrics import CONTENT_TYPE, Metrics
from pipelines.serving.model import scoring_app
from pipelines.serving.problems import problem
from pipelines.serving.recorder import Recorder
from pipelines.serving.versions import Champion


@dataclass(frozen=True)
class Limits:
    batch_size: int = 32
    """Images through the tower together."""
    wait_seconds: float = 0.005
    """How long the first image of a batch waits for others."""
    queue: int = 64
    """Requests that may wait for their answers."""


def make_app(
    champion: Champion, metrics: Metrics, *, limits: Limits, token: str | None, recorder: Recorder | None = None
) -> ASGIApp:
    """The whole application; it watches the champion from its start to its end, and ends the recorder with itself."""
    batcher = Batcher(size=limits.batch_size, wait_seconds=limits.wait_seconds, told=metrics.batch.observe)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # A thread a request: they decode, and wait for the batch.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(limits.queue, "request"))
        champion.start()
        yield
        champion.stop()
        batcher.close()
        if recorder is not None:
            recorder.close()

    async def ready(request: Request) -> Response:
        version = champion.current
        if version is None:
            return problem(503, "no version answers yet", retry_after="5")
        return PlainTextResponse(f"version {version.number} answers\n", headers={VERSION_HEADER: version.number})

    answers = Entrance(scoring_app(batcher, metrics, recorder), champion, metrics, queue=limits.queue)
    routes = [
        Route("/", _page()),
        Route("/health", _alive),
        Route("/ready", ready),
        Route("/metrics", lambda request: Response(metrics.text(), media_type=CONTENT_TYPE)),
        Route("/invocations", answers, methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _no_route})
    return Guard(app, token=token, metrics=metrics)


async def _alive(request: Request) -> Response:
    return PlainTextResponse("alive\n")


def _page() -> Any:
    """One file that loads nothing; the browser runs its own script alone."""
    text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    found = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert found is not None
    script = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
    policy = (f"default-src 'none'; script-src 'sha256-{script}'; style-src 'unsafe-inline'; img-src blob:; "
              "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip

    async def page(request: Request) -> Response:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    return page


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return problem(405, f"{request.url.path} takes {allowed}, not {request.method}", allow=allowed)
    return problem(error.status_code, "there is nothing at this path: POST /invocations answers, and / is a page")
