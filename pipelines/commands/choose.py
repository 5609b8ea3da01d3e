"""What people type after `coop choose`; nothing heavy yet."""

from typing import Annotated

import typer


def choose(
    methods: Annotated[str, typer.Option(help="Of these methods alone, comma-separated.")] = "",
    shots: Annotated[int | None, typer.Option(min=1, help="Images a class; by default those of params.yaml.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="By default that of params.yaml.")] = None,
) -> None:
    """Try every head on the project's images, and say by validation images which to take."""
    from pipelines.commands.choice import run_choice

    run_choice(methods=[name.strip() for name in methods.split(",") if name.strip()], shots=shots, seed=seed)
