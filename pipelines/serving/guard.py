"""Guard: any request -> the application, where its caller has the token and is no page of somebody else's."""

import hmac
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.environment import LOOPBACK
from pipelines.serving.metrics import Metrics
from pipelines.serving.problems import problem

_OPEN = ("/", "/health", "/ready")
"""What is told to anybody."""


@dataclass(frozen=True)
class Turned:
    """A request that goes no further."""

    why: str
    answer: Response


class Guard:
    """Asks for the token where one is set, and takes requests of our own page alone."""

    def __init__(self, app: ASGIApp, *, token: str | None, metrics: Metrics) -> None:
        self._app, self._token, self._metrics = app, token, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        turned = self._turned(scope["path"], Headers(scope=scope))
        if turned is None:
            return await self._app(scope, receive, send)
        self._metrics.refused.labels(turned.why).inc()
        return await turned.answer(scope, receive, send)

    def _turned(self, path: str, headers: Headers) -> Turned | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return Turned("another page", problem(403, "pages of another origin may not ask this server"))
        if self._token is None:
            if urlsplit(f"//{host}").hostname not in LOOPBACK:
                return Turned("another page", problem(403, f"without a token only {' and '.join(LOOPBACK)} answer: set "
                                                           "COOP_SERVE_TOKEN for other names"))  # fmt: skip
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if path in _OPEN or hmac.compare_digest(given.encode(), self._token.encode()):
            return None
        detail = "the token is missing or wrong: send `Authorization: Bearer TOKEN` with the server's COOP_SERVE_TOKEN"
        return Turned("no token", problem(401, detail, www_authenticate="Bearer"))
