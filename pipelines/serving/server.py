"""Server: settings and limits -> a process that answers as the champion until it is told to stop."""

import logging
import os
import socket
from contextlib import suppress

from coop_core.errors import ServiceError
from pipelines.environment import LOOPBACK
from pipelines.serving.app import Limits, make_app
from pipelines.serving.metrics import Metrics
from pipelines.serving.recorder import Recorder
from pipelines.serving.versions import Champion, load_version, registered_champion
from pipelines.settings import Settings

log = logging.getLogger(__name__)

_STOP_SECONDS = 30
"""For what is in flight when the server is told to stop."""


def serve(settings: Settings, *, host: str, port: int, limits: Limits) -> None:
    """Answer on HOST:PORT until SIGTERM or Ctrl-C, and finish what is in flight then.

    Raises
    ------
    ServiceError
        For a port that cannot be had, or an address that others reach without a token.
    """
    import uvicorn

    token = settings.serve_token.get_secret_value() if settings.serve_token else None
    if token is None and host not in LOOPBACK:
        raise ServiceError(f"on {host} whoever reaches this machine gets answers: set COOP_SERVE_TOKEN, or leave "
                           "--host out")  # fmt: skip
    metrics = Metrics()
    recorder = None
    if settings.serve_record is not None:
        recorder = Recorder(settings.serve_record, metrics, megabytes=settings.serve_record_megabytes,
                            pictures=settings.serve_record_pictures)  # fmt: skip
        log.info("answers are recorded in %s%s", settings.serve_record,
                 ", with the pictures" if settings.serve_record_pictures else "")  # fmt: skip
    champion = Champion(
        lambda: registered_champion(settings), lambda wanted, now: load_version(wanted, now, settings), metrics
    )
    with listen(host, port) as listening:
        app = make_app(champion, metrics, limits=limits, token=token, recorder=recorder)
        config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False,
                                timeout_graceful_shutdown=_STOP_SECONDS)  # fmt: skip
        log.info("http://%s:%d answers once there is a champion", host, port)
        with suppress(KeyboardInterrupt):                                         # uvicorn's way to say why it ended
            uvicorn.Server(config).run(sockets=[listening])
    log.info("stopped; what was in flight is answered")


def listen(host: str, port: int) -> socket.socket:
    """A socket whose connections send every piece at once.

    Raises
    ------
    ServiceError
        For a port that cannot be had.
    """
    try:
        listening = socket.create_server((host, port), backlog=256)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ServiceError(f"port {port} on {host} cannot be had ({reason}): end what uses it, or set COOP_SERVE_PORT "
                           "to another") from None  # fmt: skip
    # Connections inherit it. asyncio sets it on sockets of its own alone, and an answer in two pieces waits 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
