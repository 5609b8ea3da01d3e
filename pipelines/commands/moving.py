"""Backing up and restoring on the command line: an archive's name -> what was kept or put back, in lines."""

import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.filesize import decimal

from pipelines import locks
from pipelines.console import console
from pipelines.records.names import find_model_name
from pipelines.settings import load_settings
from pipelines.upkeep.backup import backup
from pipelines.upkeep.restore import restore

_BUSY = "another `coop gc`, `coop backup` or `coop restore` is at work here: wait for it"


def back_up(file: Path, *, secrets: bool) -> None:
    settings = load_settings()
    with locks.alone(settings.cache_folder / "upkeep.lock", otherwise=_BUSY), console.status("backing up"):
        taken = backup(settings, file, secrets=secrets)
    _say("\n".join(taken))
    held = "; it may hold passwords" if secrets else ""
    _say(f"kept in {file} ({decimal(file.stat().st_size)}), which you alone can read{held}")


def put_back(file: Path, *, yes: bool) -> None:
    def agree(there: Sequence[str]) -> bool:
        _say("There already, and replaced:\n" + "\n".join(f"  {one}" for one in there))
        return yes or (sys.stdin.isatty() and typer.confirm("Replace that?"))

    settings = load_settings()
    with locks.alone(settings.cache_folder / "upkeep.lock", otherwise=_BUSY):
        found = restore(settings, file, agree=agree)
    facts = found.facts
    _say(f"from {facts['host']}:{facts['project']}, {facts['made']}\n" + "\n".join(found.put))
    if found.changed:
        _say(f"{found.changed} addresses in MLflow's records were written anew")
    if found.aside:
        _say(f"what was there is in {found.aside.name}/: remove it when all is well")
    for note in found.notes:
        _say(note)
    name = find_model_name(load_settings()) or "NAME"
    _say(f"then: `make up`, and `coop predict --model {name}@champion IMAGE` to see it answer")


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
