"""Retraining: data sources -> what has changed -> `dvc repro` -> a judged candidate, tied to what made it.

One at a time in a workspace. Every step can be cut off: the next retraining goes on from there.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from coop_core.errors import GateError, ServiceError
from coop_core.files import digest_file, read_json
from coop_core.judging.gate import Decision, Policy
from pipelines import locks, paths
from pipelines.champion.promotion import judge, was_champion
from pipelines.processes import Group
from pipelines.records.registry import CANDIDATE, CHAMPION, find_version
from pipelines.records.runs import is_tied, tie_run
from pipelines.records.server import Records
from pipelines.services.workspace import mend_workspace
from pipelines.settings import Settings

log = logging.getLogger(__name__)

LOCK = Path("dvc.lock")


@dataclass(frozen=True)
class Reproduced:
    """What `dvc repro` left: the registered version and what made it."""

    run_id: str
    version: str
    changed: list[str]
    """Stages that had to run."""
    pushed: bool
    tags: dict[str, str]


def alone(settings: Settings) -> AbstractContextManager[None]:
    """One retraining at a time in this workspace; the other is told.

    Raises
    ------
    ServiceError
    """
    told = f"another retraining is under way in {Path.cwd().name}: wait for it, or cancel it"
    return locks.alone(settings.cache_folder / "retraining.lock", otherwise=told)


def reproduce(records: Records, *, flow_run: str | None = None) -> Reproduced | None:
    """Look at the sources, run what has changed, push and tie -> what came of it, or None when all that was done.

    A frozen data.dvc is a choice and is left as it is.

    Raises
    ------
    ServiceError
        When DVC fails, with its last line; what was finished is kept.
    """
    mend_workspace()
    changed = changed_stages()
    if changed:
        log.info("changed: %s", ", ".join(changed))
        dvc("repro", settings=records.settings, flow_run=flow_run)
    tracked = read_json(paths.TRACKED)
    if not changed and is_tied(tracked["run_id"], records):
        return None
    tags = {
        "dvc_lock": digest_file(LOCK),
        "dataset_digest": read_json(paths.RAW / "dataset.json")["digest"],
        "coop.version": tracked["model_version"],
    }
    if flow_run:
        tags["prefect.flow_run_id"] = flow_run
    pushed = has_remote()
    if pushed:
        dvc("push", settings=records.settings)
    tie_run(tracked["run_id"], tags, LOCK, records)
    return Reproduced(tracked["run_id"], tracked["model_version"], changed, pushed, tags)


def changed_stages() -> list[str]:
    """What `dvc repro` would run, as DVC sees it."""
    found = subprocess.run([*_DVC, "status", "--json"], capture_output=True, text=True, check=False)
    if found.returncode:
        raise ServiceError(f"dvc status says: {_last_line(found.stderr)}")
    return list(json.loads(found.stdout.strip().splitlines()[-1]))


def waits_for_judgement(records: Records) -> str | None:
    """The candidate's number when its judgement was not carried out, as after a retraining that was cut off."""
    candidate, champion = find_version(CANDIDATE, records), find_version(CHAMPION, records)
    if candidate is None or (champion and champion.number == candidate.number):
        return None
    open_still = candidate.gate in (None, "passed")  # passed, and cut off before the alias moved or anybody answered
    return candidate.number if open_still and not was_champion(records, candidate.number) else None


def judged(records: Records, policy: Policy, version: str | None) -> Decision | str:
    """The gate's decision, or why there was nothing to decide."""
    try:
        return judge(records, policy, version=version)
    except GateError as error:
        return str(error)


def has_remote() -> bool:
    """Whether `dvc push` has a place to go."""
    found = subprocess.run([*_DVC, "config", "core.remote"], capture_output=True, text=True, check=False)
    return bool(found.stdout.strip())


def dvc(*words: str, settings: Settings, flow_run: str | None = None) -> None:
    """Run DVC in a process group of its own, which ends with this process; output goes to a log file."""
    path = settings.cache_folder / paths.DVC_LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    start = path.stat().st_size if path.exists() else 0
    environment = {"COOP_FLOW_RUN": flow_run} if flow_run else {}
    with Group([*_DVC, *words], log=path, environment=environment) as group:
        status = _wait(group)
    with path.open("rb") as file:
        file.seek(start)
        said = file.read().decode("utf-8", "replace")
    if status:
        raise ServiceError(f"dvc {' '.join(words)} failed: {_fault(said)} (see {path})")
    log.info("dvc %s: %s", " ".join(words), _last_line(said))


_DVC: Sequence[str] = (sys.executable, "-m", "dvc")


def _wait(group: Group) -> int:
    """In small steps, so that a signal to this process is noticed."""
    while True:
        try:
            return group.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue


def _fault(said: str) -> str:
    """A stage's own sentence says more than DVC's last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("error: ")]
    return own[-1].removeprefix("error: ") if own else (lines or ["no message"])[-1]


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or ["no message"])[-1].strip()


def summary(reproduced: Reproduced | None, decision: Decision | str | None, said: str) -> str:
    """What happened, as Markdown for Prefect's page."""
    lines = ["# Retraining", ""]
    if reproduced is not None:
        lines += [f"Registered version **{reproduced.version}** (MLflow run `{reproduced.run_id}`)"
                  f"{', pushed to the DVC remote' if reproduced.pushed else ''}.", "",
                  "| | |", "|---|---|", f"| changed | {', '.join(reproduced.changed)} |",
                  *(f"| {name} | `{value}` |" for name, value in reproduced.tags.items()), ""]  # fmt: skip
    return "\n".join(lines + judgement(decision, said))


def judgement(decision: Decision | str | None, said: str) -> list[str]:
    """The gate's part of a page: every check, and what came of it."""
    if decision is None or isinstance(decision, str):
        return [*([decision, ""] if decision else []), f"**{said[:1].upper()}{said[1:]}.**"]
    return [f"## Gate: version {decision.candidate} against {decision.champion or 'no champion'}", "",
            "| check | passed | |", "|---|---|---|",
            *(f"| {check.name} | {'yes' if check.passed else '**no**'} | {check.sentence} |"
              for check in decision.checks), "", f"**{said[:1].upper()}{said[1:]}.**"]  # fmt: skip
