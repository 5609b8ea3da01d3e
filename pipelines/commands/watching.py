"""`coop watch`: settings and params.yaml -> one comparison of what the champion is sent; nothing is logged."""

import json

import typer
from rich import box
from rich.table import Table

from coop_core.judging.drift import Drift
from coop_core.params import load_params
from pipelines.console import console
from pipelines.environment import hurried
from pipelines.records.server import open_records
from pipelines.serving import watching
from pipelines.serving.watching import Look, gather, look


def show_look(*, as_json: bool) -> bool:
    """Whether a limit is passed.

    Raises
    ------
    WatchError
        When there is nothing to compare.
    """
    records, params = open_records(), load_params().watch
    with hurried():
        gathered = gather(records, at_most=params.max_images)
    found = look(gathered, params)
    if as_json:
        typer.echo(json.dumps(_tree(found), indent=2))
    else:
        _print(found, significance=params.significance)
    return found.drift is not None and bool(found.drift.raised)


def _tree(found: Look) -> dict[str, object]:
    return watching.as_json(found) | {"sentence": found.sentence}


def _print(found: Look, *, significance: float) -> None:
    its = found.gathered
    if found.drift is not None:
        title = (f"{its.model} version {its.version.number}: {len(its.sent)} images against {len(its.reference)} test "
                 "images")  # fmt: skip
        console.print(_table(found.drift, title=title, significance=significance))
    console.print(f"{found.sentence}.", highlight=False, soft_wrap=True)
    if its.skipped:
        console.print("skipped rows of the records, which are not whole or not of this version's classes: "
                      f"{its.skipped}", highlight=False, soft_wrap=True)  # fmt: skip


def _table(drift: Drift, *, title: str, significance: float) -> Table:
    caption = f"passed: above the limit, and rarer by chance than {significance / len(drift.signs):g}"
    table = Table("sign", title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("value", "95 %", "limit", "chance", "passed"):
        table.add_column(column, justify="right")
    for sign in drift.signs:
        interval = f"{sign.interval[0]:.2f}-{sign.interval[1]:.2f}" if sign.interval else ""
        table.add_row(sign.name, f"{sign.value:.3f}", interval, f"{sign.limit:g}", f"{sign.p:.2g}",
                      "yes" if sign.raised else "no", style="bold red" if sign.raised else None)  # fmt: skip
    return table
