"""What people type to keep things in order; nothing heavy yet."""

from pathlib import Path
from typing import Annotated

import typer


def reconcile() -> None:
    """Close MLflow runs whose process is gone, and mend what a kill left of DVC's."""
    from pipelines.records.server import open_records
    from pipelines.records.trials import reconcile as close_lost
    from pipelines.services.workspace import mend_workspace

    mend_workspace()
    lost = close_lost(open_records())
    typer.echo("\n".join(f"closed  run {run_id}" for run_id in lost) or "no run has lost its process")


def gc(
    days: Annotated[int, typer.Option(min=1, help="What nobody has used for so many days.")] = 30,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without this it is only shown.")] = False,
) -> None:
    """Show what nothing needs any more, or remove it; never what a registered version refers to."""
    from pipelines.commands.collecting import collect

    collect(days=days, delete=delete)


def backup(
    file: Annotated[Path, typer.Argument(help="The archive to write, such as backup.tar or backup.tar.gz.")],
    without_secrets: Annotated[
        bool, typer.Option("--without-secrets", help="Leave out .env and .dvc/config.local.")
    ] = False,
) -> None:
    """Keep all records, with the files that they tell of, in one file; services may run meanwhile."""
    from pipelines.commands.moving import back_up

    back_up(file, secrets=not without_secrets)


def restore(
    file: Annotated[Path, typer.Argument(help="An archive of `coop backup`.")],
    yes: Annotated[bool, typer.Option("--yes", help="Replace what is there without asking.")] = False,
) -> None:
    """Put a backup in place, on whatever machine and in whatever folder this is."""
    from pipelines.commands.moving import put_back

    put_back(file, yes=yes)
