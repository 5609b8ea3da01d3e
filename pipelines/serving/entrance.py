"""Entrance: a request for answers -> bounded, given a version, and handed to MLflow's scoring server.

Whatever is turned away is turned away before its body is parsed, and every fault leaves as one sentence.
"""

import asyncio
import logging
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.guard import Turned
from pipelines.serving.metrics import Metrics
from pipelines.serving.model import CALL, Call
from pipelines.serving.problems import problem, sentence_of
from pipelines.serving.versions import Champion

log = logging.getLogger(__name__)

VERSION_HEADER = "X-Coop-Version"
MAX_BODY = 32 << 20
"""Bytes: sixty-four photographs of some 400 kB in base64."""
_BODY_SECONDS = 30.0
"""For a body to arrive."""
_OUR_FAULT = "the server failed to answer, and its log says why: ask again, or tell who runs it"
_DRAINED = 4 * MAX_BODY
"""Bytes of a body too large that are still read and dropped, so that its sender sees the answer."""


class Entrance:
    """The way of one request to the scoring server, and of its answer back."""

    def __init__(self, app: ASGIApp, champion: Champion, metrics: Metrics, *, queue: int) -> None:
        """`queue`: requests that may wait for their answers at a time."""
        self._app, self._champion, self._metrics, self._queue = app, champion, metrics, queue
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin = time.perf_counter()
        if self._in_flight >= self._queue:
            return await self._turn(Turned("queue full", problem(
                503, f"{self._queue} requests wait already: ask again in a second", retry_after="1"
            )), scope, receive, send)  # fmt: skip
        self._in_flight += 1
        self._metrics.in_flight.set(self._in_flight)
        try:
            await self._answer(scope, receive, send)
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.set(self._in_flight)
            self._metrics.latency.observe(time.perf_counter() - begin)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(scope, receive)
        if isinstance(body, Turned):
            return await self._turn(body, scope, receive, send)
        version = self._champion.current
        if version is None:
            return await self._turn(Turned("no version", problem(
                503, "no version answers yet: `coop promote` makes a champion, and the log says what else is missing",
                retry_after="5",
            )), scope, receive, send)  # fmt: skip
        call = Call(version)
        CALL.set(call)                                                            # of this request's task alone
        try:
            answer = await _collect(self._app, scope, body)
        except RecursionError:
            answer = problem(400, "the body is nested too deeply: send a table with one column, image")
        except Exception:  # whatever it is, its sender gets an answer and the next request its own chance
            log.exception("the scoring server failed")
            answer = problem(500, _OUR_FAULT)
        else:
            answer = answer if answer.status_code < 400 else _as_problem(answer, call)
        answer.headers[VERSION_HEADER] = version.number
        return await self._send(answer, scope, receive, send)

    async def _turn(self, turned: Turned, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.refused.labels(turned.why).inc()
        await self._send(turned.answer, scope, receive, send)

    async def _send(self, answer: Response, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.requests.labels(str(answer.status_code)).inc()
        await answer(scope, receive, send)


async def _read(scope: Scope, receive: Receive) -> bytes | Turned:
    """The whole body, or why it is not taken."""
    headers = Headers(scope=scope)
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return Turned("no JSON", problem(415, "the body's type is not application/json: send JSON and say so"))
    too_large = Turned("body too large", problem(
        413, f"the body is larger than {MAX_BODY >> 20} MB: send fewer or smaller images", connection="close"
    ))  # fmt: skip
    given = headers.get("content-length", "0")
    limit = _DRAINED if given.isdigit() and int(given) > MAX_BODY else MAX_BODY
    parts, size = list[bytes](), 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_BODY_SECONDS):
            while size <= limit:
                message = await receive()
                part = message.get("body", b"")
                size += len(part)
                if size <= MAX_BODY:
                    parts.append(part)
                if not message.get("more_body", False):
                    break
            return too_large if size > MAX_BODY else b"".join(parts)
    return Turned("body too slow", problem(408, f"the body did not arrive within {_BODY_SECONDS:.0f} s: send it again",
                                           connection="close"))  # fmt: skip


async def _collect(app: ASGIApp, scope: Scope, body: bytes) -> Response:
    """What an application answers to a request whose body is here already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    head: MutableMapping[str, Any] = {}
    parts: list[bytes] = []

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()                                              # a caller that leaves is answered too
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            head.update(message)
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    answer = Response(b"".join(parts), head["status"])
    answer.raw_headers = list(head["headers"])
    return answer


def _as_problem(answer: Response, call: Call) -> Response:
    if call.failed:
        return problem(500, _OUR_FAULT)
    if answer.status_code == 504:
        return problem(504, "the answer took too long: ask again with fewer images", retry_after="5")
    return problem(answer.status_code, sentence_of(bytes(answer.body)))
