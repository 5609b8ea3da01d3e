"""Serving on the command line: options -> a server that answers as the champion."""

from typing import Annotated

import typer


def serve(
    host: Annotated[str, typer.Option(help="Other than loopback needs COOP_SERVE_TOKEN.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Else COOP_SERVE_PORT.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Images through the image tower together.")] = 32,
    queue: Annotated[int, typer.Option(min=1, max=1024, help="Requests that may wait; more are told to wait.")] = 64,
) -> None:
    """Answer over HTTP as the champion of the registry, and go over to the next one while answering."""
    from pipelines.serving.app import Limits
    from pipelines.serving.server import serve as answer
    from pipelines.settings import load_settings

    settings = load_settings()
    answer(settings, host=host, port=port or settings.serve_port, limits=Limits(batch_size=batch_size, queue=queue))
