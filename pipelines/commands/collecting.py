"""Making room on the command line: what nothing needs -> a table of it, and with `delete` away."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.filesize import decimal
from rich.table import Table

from pipelines import locks
from pipelines.console import console
from pipelines.records import retention
from pipelines.records.retention import Found, Spent
from pipelines.records.server import Records, open_records
from pipelines.upkeep import leavings
from pipelines.upkeep.leavings import Leaving

_WHY = {
    retention.TRIALS: "failed or killed, and nothing refers to them; they go to MLflow's bin",
    retention.BIN: "somebody deleted them, or `coop gc` did; they go for good, with their files",
    retention.FOLDERS: "MLflow has no run or model of that name",
    leavings.STORES: "no run has opened them; they are computed again where they are needed",
    leavings.CHECKPOINTS: "their training ended or was given up",
    leavings.LOGS: "old",
    leavings.SWEEPS: "MLflow has the same files with the sweep's run",
    leavings.JUDGED: "dvc.lock names them no longer",
}
"""Kinds of what goes, with the reason, in the order of the table."""


def collect(*, days: int, delete: bool) -> None:
    """Show what nobody has used for so many days; with `delete`, remove it.

    Raises
    ------
    ServiceError
        When MLflow does not answer, or another `coop gc` or `coop backup` is at work.
    """
    records = open_records()
    busy = "another `coop gc` or `coop backup` is at work here: wait for it"
    with locks.alone(records.settings.cache_folder / "upkeep.lock", otherwise=busy):
        found = retention.find_spent(records, days=days)
        sweeps = retention.finished_sweeps(records)
        left = leavings.find_leavings(records.settings.cache_folder, days=days, sweeps=sweeps)
        _show(found, left, days=days)
        if delete and (found.spent or left):
            _remove(found.spent, left, records, days=days)


def _show(found: Found, left: Sequence[Leaving], *, days: int) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what")
    table.add_column("how many", justify="right")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("why they may go", overflow="fold")
    every: list[Spent | Leaving] = [*found.spent, *left]
    for kind, why in _WHY.items():
        places = [one.place for one in every if one.kind == kind]
        if places:
            table.add_row(kind, str(len(places)), decimal(sum(_size(place) for place in places)), why)
    if table.row_count:
        console.print(table)
        console.print(f"Not used for {days} days or more. `coop gc --days {days} --delete` removes them.")
    else:
        console.print(f"nothing has been out of use for {days} days or more")
    if found.kept:
        console.print(f"{found.kept} more are kept, because a registered version or the champion's history refers to "
                      "them.")  # fmt: skip
    if found.refused:
        console.print(found.refused, soft_wrap=True, highlight=False)
    console.print("DVC's cache is DVC's: `dvc gc --workspace --all-commits --dry` shows what no commit needs.",
                  soft_wrap=True, highlight=False)  # fmt: skip


def _size(place: Path | None) -> int:
    return leavings.size(place) if place and place.exists() else 0


def _remove(spent: Sequence[Spent], left: Sequence[Leaving], records: Records, *, days: int) -> None:
    gone = retention.discard(spent, records) + sum(leavings.remove(one, days=days) for one in left)
    in_use = len(spent) + len(left) - gone
    console.print(f"removed {gone}" + (f"; {in_use} are in use by now and stay" if in_use else ""), highlight=False)
