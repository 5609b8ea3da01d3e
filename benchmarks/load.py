"""Load: many short trials through a team's workers, with promotions meanwhile -> what it cost, and whether all agrees.

    python benchmarks/load.py                                  200 trials, 4 workers; needs what infra/native needs
    python benchmarks/load.py --trials 200 --workers 4 --json FILE

A topology of its own (PostgreSQL, an S3 store, MLflow and Prefect with logins) and a clone with little pictures, whose
sweep goes through the workers. Meanwhile a second clone trains and promotes, again and again, in the same registry.
Afterwards Prefect, MLflow and the registry are asked whether they tell the same. A trial's overhead is the whole time,
less what the trainers measured as training, over the number of trials.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kill_matrix import Playground, change
from rich.console import Console
from rich.table import Table
from team import ENDED, Team

from coop_core.files import write_json
from pipelines.records.trials import TRIAL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="a multiple of 20")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="load-", ignore_cleanup_errors=True) as name:
        team = Team(Path(name))
        try:
            installed = team.topology("install")
            assert installed.returncode == 0, installed.stderr
            team.up("--gpu-workers", str(given.workers))
            found = run(team, given.trials)
        finally:
            team.topology("down")
    table = Table("", "")
    for what, value in found.items():
        table.add_row(what, str(value))
    Console().print(table)
    if given.json:
        write_json(given.json, found)
    if found["not as it should be"]:
        sys.exit("not consistent")


def run(team: Team, trials: int) -> dict[str, Any]:
    second = Playground(team.folder / "second")
    for clone in (team.first, second):
        team.share(clone)
        clone.params(epochs=2)
    space = {"split.shots": [1, 2], "train.epochs": [2, 3], "train.weight_decay": [0.0, 1e-4, 2e-4, 3e-4, 4e-4]}
    change(team.first.folder, sweep={"name": "load", "seeds": list(range(1, trials // 20 + 1)), "space": space})
    promoted: list[str] = []
    over = threading.Event()
    promoting = threading.Thread(target=_promote_until, args=(team, second, over, promoted))
    since = time.time()
    promoting.start()
    team.coop(team.first, "sweep", timeout=3600)
    whole = time.time() - since
    over.set()
    promoting.join()
    again = time.time()
    team.coop(team.first, "sweep", timeout=600)
    again = time.time() - again
    runs = [one for one in team.runs(f"attributes.start_time > {1000 * since:.0f}") if TRIAL in one.data.tags]
    training = sum(one.data.metrics.get("seconds", 0) for one in runs)
    waits = [one.info.end_time / 1000 - since for one in runs if one.info.end_time]
    return {
        "trials": len(runs), "whole": f"{whole:.0f} s", "training": f"{training:.0f} s",
        "beside it, a trial": f"{(whole - training) / max(1, len(runs)):.2f} s",
        "first trial done": f"{min(waits):.0f} s", "half of them": f"{statistics.median(waits):.0f} s",
        "the same sweep again": f"{again:.0f} s",
        "workers that trained": len(list((team.first.folder / ".cache/trainers").iterdir())),
        "promotions meanwhile": len(promoted), "not as it should be": _faults(team, runs, trials, promoted),
    }  # fmt: skip


def _promote_until(team: Team, clone: Playground, over: threading.Event, promoted: list[str]) -> None:
    while not over.is_set():
        clone.params(epochs=2)
        team.dvc(clone, "repro")
        team.coop(clone, "promote")
        promoted.append(json.loads((clone.folder / "artifacts/tracked.json").read_text())["model_version"])


def _faults(team: Team, runs: list[Any], trials: int, promoted: list[str]) -> list[str]:
    """What Prefect, MLflow and the registry tell otherwise than it was."""
    found = []
    counts = Counter(one.data.tags[TRIAL] for one in runs if one.info.status == "FINISHED")
    if len(counts) != trials or set(counts.values()) != {1}:
        found.append(f"{len(counts)} trials finished of {trials}, {sum(counts.values()) - len(counts)} of them twice")
    names = Counter(tuple(sorted(one.data.metrics)) for one in runs)
    if len(names) != 1:
        found.append(f"trials with other metrics than the rest: {names}")
    if not_ended := [one.info.run_id for one in team.runs("attributes.status = 'RUNNING'")]:
        found.append(f"runs still open: {not_ended}")
    states = Counter(one["state"]["type"] for one in team.prefect("flow_runs/filter", {"limit": 200}))
    if not set(states) <= {*ENDED, "SCHEDULED"} or states["FAILED"] or states["CRASHED"]:
        found.append(f"flow runs {dict(states)}")
    versions = [version.version for version in team.versions()]
    if sorted(versions) != sorted(set(promoted)):
        found.append(f"versions {versions}, promoted {promoted}")
    if promoted and team.champion() != promoted[-1]:
        found.append(f"champion {team.champion()}, promoted last {promoted[-1]}")
    return found


if __name__ == "__main__":
    main()
