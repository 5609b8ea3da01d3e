"""What people type after `coop reproduce` -> what is to be run; nothing heavy yet."""

import functools
from pathlib import Path
from typing import Annotated

import typer


def reproduce(
    name: Annotated[str, typer.Argument(help="A recipe of `coop recipe list`.", metavar="RECIPE")],
    datasets: Annotated[list[str] | None, typer.Option(help="Of these data sets alone.", metavar="NAME...")] = None,
    shots: Annotated[list[int] | None, typer.Option(help="With so many images a class.", metavar="N...")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="With these seeds.", metavar="N...")] = None,
    protocol: Annotated[str | None, typer.Option(help="few-shot, base-to-new, ...; the recipe's first.")] = None,
    variant: Annotated[str | None, typer.Option(help="What the paper varies.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Another architecture, such as mini.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Other parameters.", metavar="NAME=VALUE...")
    ] = None,
    data_folder: Annotated[Path, typer.Option(help="Where the data sets stand.")] = Path("data/source"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Local trainers at once; by default one a GPU.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what is missing and how long it takes; train nothing.")
    ] = False,
) -> None:
    """Run a published setting on its data sets and hold every figure against the printed one; again does the rest."""
    from pipelines.commands import reproduction
    from pipelines.settings import load_settings

    settings = load_settings()
    asked = reproduction.asked_for(
        name, protocol=protocol, variant=variant, datasets=datasets or (), shots=shots or (), seeds=seeds or (),
        overrides=reproduction.overrides(backbone, changes or ()),
    )  # fmt: skip
    if plan:
        reproduction.show_plan(asked, settings, data_folder)
    else:
        run = functools.partial(reproduction.run_here, settings=settings, jobs=jobs)
        reproduction.reproduce(asked, settings, data_folder, run=run)
