"""`coop`: the command line. Importing this module imports nothing heavy; each command does so in its body."""

import json
from pathlib import Path
from typing import Annotated

import typer

from coop_core.errors import DatasetError, GateError, ServiceError
from pipelines.commands.beginning import DEFAULT_MODEL, Commands, Model, Several
from pipelines.commands.choose import choose
from pipelines.commands.doctor import doctor
from pipelines.commands.exchange import export, import_
from pipelines.commands.keeping import backup, gc, reconcile, restore
from pipelines.commands.reproduce import reproduce
from pipelines.commands.serve import serve
from pipelines.commands.watch import watch

app = typer.Typer(
    cls=Commands,
    help="Prompt learning for CLIP-like models: train with `dvc repro`, answer and compare here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for light in (choose, serve, watch, doctor):
    app.command()(light)
app.command(cls=Several)(reproduce)
app.command(cls=Several)(export)
app.command(name="import")(import_)


def main() -> None:
    """Run a command; faults are one sentence and exit status 2."""
    from pipelines import console

    console.run(app)


@app.command()
def predict(
    images: Annotated[list[str], typer.Argument(help="Image files, or folders with images.", metavar="IMAGE...")],
    model: Model = DEFAULT_MODEL,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show an image.")] = 1,
    classes: Annotated[str, typer.Option(help="Other class names, comma-separated; shared context only.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Images through the image tower together.")] = 32,
) -> None:
    """Say what is on images: labels and probabilities."""
    from pipelines.environment import without_collecting

    with without_collecting():
        from pipelines.commands import predict as predicting
        from pipelines.settings import choose_device, load_settings
    settings = load_settings()
    found = predicting.image_files(images)
    if note := found.note():
        typer.echo(note, err=True)
    class_names = predicting.parse_classes(classes)
    predictor = predicting.load_predictor(model, settings, class_names=class_names, device=choose_device(settings))
    unreadable, total = 0, len(found.files)
    for file, answer in predicting.answers(predictor, found.files, top=top, batch_size=batch_size):
        unreadable += isinstance(answer, str)
        typer.echo(predicting.as_json(file, answer) if as_json else predicting.as_line(file, answer))
    if unreadable:
        raise DatasetError(f"{unreadable} of {total} images could not be read; the others are answered above")


@app.command()
def compare(
    limit: Annotated[int, typer.Option(min=1, help="At most so many runs, the newest first.")] = 20,
    sort: Annotated[str, typer.Option(help="A column to sort by: when, accuracy, gain.")] = "when",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """Show tracked runs as a table."""
    from pipelines.commands.compare import print_runs, run_rows
    from pipelines.records.runs import compare_link
    from pipelines.records.server import open_records

    records = open_records()
    rows = run_rows(records, limit=limit, sort=sort)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_runs(rows, compare_link(rows, records))


@app.command()
def sweep(
    local: Annotated[bool, typer.Option("--local", help="On this machine even where Prefect's server is set.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Local trainers at once; by default one a GPU.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave it to the workers and return.")] = False,
) -> None:
    """Train what the sweep section of params.yaml asks for, and find its best choice."""
    from pipelines.commands.sweep import run_sweep
    from pipelines.settings import load_settings

    run_sweep(load_settings(), local=local, jobs=jobs, detach=detach)


@app.command()
def card(
    model: Model = DEFAULT_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="The card as it is stored.")] = False,
) -> None:
    """Show what made a learned prompt."""
    import tempfile

    from coop_core.artifact import read_artifact
    from coop_core.report.findings import answer_cost
    from pipelines.commands.cards import as_text
    from pipelines.commands.predict import find_artifact
    from pipelines.settings import load_settings

    with tempfile.TemporaryDirectory() as folder:
        content = read_artifact(find_artifact(model, load_settings(), Path(folder))).card
    if as_json:
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        typer.echo(as_text({"answer": f"costs {answer_cost(content)} once its image is encoded", **content}))


@app.command()
def promote(
    version: Annotated[int | None, typer.Option(min=1, help="A registered version instead of the candidate.")] = None,
    without_comparison: Annotated[
        bool, typer.Option("--without-comparison", help="Judge against zero-shot alone, for a new test set or none.")
    ] = False,
) -> None:
    """Judge the candidate by the gate of params.yaml and make it champion."""
    from coop_core.params import load_params
    from pipelines.champion import promotion
    from pipelines.records.server import open_records

    records, policy = open_records(), load_params().gate.policy()
    decision = promotion.promote(
        records, policy, version=str(version) if version else None, compare=not without_comparison
    )
    for check in decision.checks:
        typer.echo(f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.sentence}")
    if not decision.promote:
        raise GateError(f"version {decision.candidate} is not promoted; the champion stays as it was")
    typer.echo(f"champion  {records.model} version {decision.candidate}")


@app.command()
def rollback() -> None:
    """Make the champion before this one champion again."""
    from pipelines.champion import promotion
    from pipelines.records.server import open_records

    records = open_records()
    left, found = promotion.rollback(records)
    typer.echo(f"champion  {records.model} version {found}, instead of {left}")


@app.command()
def history(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list.")] = False,
) -> None:
    """Show every change of the champion."""
    from pipelines.champion import promotion
    from pipelines.records.server import open_records

    events = promotion.history(open_records())
    if as_json:
        typer.echo(json.dumps(events, indent=2))
        return
    for event in events:
        note = "" if event["carried_out"] else "  (cut short: the champion did not change)"
        note += "  (changed outside coop since)" if event["changed_outside"] else ""
        typer.echo(f"{event['time']}  {event['action']:8}  {event['previous'] or '-'} -> {event['version']}  "
                   f"by {event['by']}{note}")  # fmt: skip
    if not events:
        typer.echo("no champion yet: `coop promote` makes one")


@app.command()
def describe(
    answer: Annotated[Path | None, typer.Argument(help="A file with a language model's answer.")] = None,
    sentences: Annotated[int, typer.Option(min=1, max=200, help="How many to ask for a class.")] = 20,
) -> None:
    """Write the question for sentences a class; given an ANSWER, check it and write the JSON file for the card."""
    from pipelines.commands.describe import question_or_file

    typer.echo(question_or_file(answer, sentences=sentences), nl=False)


@app.command()
def recipe(
    name: Annotated[str, typer.Argument(help="A recipe, or `list`.")],
    shots: Annotated[int | None, typer.Option(min=1, help="The schedule of so many images a class.")] = None,
    variant: Annotated[str | None, typer.Option(help="What the paper varies.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the change without making it.")] = False,
) -> None:
    """Write a published setting into params.yaml, and say in what a run of it differs from the published one."""
    from coop_core.files import write_text
    from coop_core.params.recipes import apply_recipe, read_recipe, recipe_names
    from pipelines import paths

    if name == "list":
        for known in recipe_names(paths.RECIPES):
            found = read_recipe(paths.RECIPES, known)
            variants = f" (--variant {', '.join(found.variants)})" if found.variants else ""
            typer.echo(f"{known}: {found.title}{variants}")
        return
    found = read_recipe(paths.RECIPES, name)
    text, diff = apply_recipe(paths.PARAMS, found.values(shots=shots, variant=variant))
    if not show:
        write_text(paths.PARAMS, text)
    typer.echo(diff or "params.yaml has this setting already\n", nl=False)
    typer.echo(f"\n{found.paper}\nseeds {', '.join(map(str, found.seeds))}; read from {found.code}\ndiffers:", err=True)
    for difference in found.differs:
        typer.echo(f"  - {difference}", err=True)


for command in (reconcile, gc, backup, restore):
    app.command()(command)


@app.command()
def ui(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="On loopback; else COOP_MLFLOW_PORT.")] = None,
) -> None:
    """Open MLflow's pages on the tracking database, on loopback, until Ctrl-C."""
    from pipelines.links import page
    from pipelines.logins import LOGIN
    from pipelines.services import local
    from pipelines.settings import load_settings

    settings = load_settings()
    if settings.tracking_uri.startswith("http"):
        raise ServiceError(f"the runs are on a server already: open {settings.tracking_uri} in a browser")
    port = port or settings.mlflow_port
    home = page(settings.model_copy(update={"mlflow_port": port}), "experiments")
    typer.echo(f"MLflow on {home} (ready in about 20 seconds; Ctrl-C ends it)\n"
               f"login: NAME:PASSWORD in {settings.services_folder / LOGIN}")  # fmt: skip
    local.show_pages(settings, port)


@app.command()
def up() -> None:
    """Start Prefect, MLflow and the workers on this machine, and deploy the flows; again repairs what is missing."""
    from pipelines.services import local
    from pipelines.settings import load_settings

    local.up(load_settings())


@app.command()
def down() -> None:
    """End every service of `coop up`, also what a crash left behind."""
    from pipelines.services import local
    from pipelines.settings import load_settings

    local.down(load_settings())


@app.command()
def status() -> None:
    """Show the services of `coop up`; exit status 1 unless all run."""
    from pipelines.services import local
    from pipelines.settings import load_settings

    if not local.status(load_settings()):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
