"""What people type after `coop doctor`; nothing heavy yet."""

from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """Look at all that the settings name, and say what is wrong and what to do; exit status 1 where something is."""
    from pipelines.commands.examination import examine, print_findings
    from pipelines.settings import load_settings

    if not print_findings(examine(load_settings()), as_json=as_json):
        raise typer.Exit(1)
