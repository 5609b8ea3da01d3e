"""What people type after `coop watch`; nothing heavy yet."""

from typing import Annotated

import typer


def watch(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compare what the champion is sent with its test images; exit status 1 where they differ beyond the limits."""
    from pipelines.commands.watching import show_look

    if show_look(as_json=as_json):
        raise typer.Exit(1)
