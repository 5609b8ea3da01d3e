"""Promotion: a registered candidate -> judged by the gate -> the champion that answers, and back again."""

import csv
import getpass
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from coop_core.errors import GateError
from coop_core.files import read_json
from coop_core.judging.gate import Answers, Decision, Policy, decide, require_classes
from pipelines.records.claims import Claim, claim_promotion
from pipelines.records.registry import (
    CANDIDATE,
    CHAMPION,
    RegisteredVersion,
    fetch_evaluation,
    find_version,
    list_events,
    record_decision,
    set_champion,
)
from pipelines.records.server import Records
from pipelines.services.announcing import CHAMPION_CHANGED, announce

_OWN_COLUMNS = ("path", "label", "predicted", "confidence")
"""Of predictions.csv; each of the others holds what a baseline answered."""


def promote(
    records: Records, policy: Policy, *, version: str | None = None, compare: bool = True, by: str | None = None
) -> Decision:
    """Judge a version (the candidate unless a number is given) and make it champion if the gate lets it pass.

    `by` is who or what decided; the user of this process unless told.

    Raises
    ------
    GateError
        When there is nothing to judge, it cannot answer, or another promotion is under way.
    """
    by = by or user()
    with claim_promotion(records, by=by) as claim:
        candidate, champion, decision = _judge(records, policy, version, compare)
        if decision.promote:
            _move(candidate, champion, "promote", records, claim, by, decision.as_dict())
    return decision


def judge(records: Records, policy: Policy, *, version: str | None = None, compare: bool = True) -> Decision:
    """What the gate says of a version now; nothing is promoted.

    Raises
    ------
    GateError
        When there is nothing to judge.
    """
    return _judge(records, policy, version, compare)[2]


def _judge(
    records: Records, policy: Policy, version: str | None, compare: bool
) -> tuple[RegisteredVersion, RegisteredVersion | None, Decision]:
    candidate = _find(version or CANDIDATE, records)
    champion = find_version(CHAMPION, records)
    if champion and champion.number == candidate.number:
        raise GateError(f"version {candidate.number} is the champion already: nothing to promote")
    _require_answers(candidate, records)
    ours, theirs = fetch_answers(candidate, records), fetch_answers(champion, records) if champion else None
    if theirs is not None:
        require_classes(ours, theirs, may_add=not compare)
    decision = decide(ours, theirs if compare else None, policy, may_be_unjudged=not compare)
    record_decision(candidate, _time(), decision.as_dict(), records)
    return candidate, champion, decision


def rollback(records: Records) -> tuple[str, str]:
    """Make the champion before this one champion again -> (from, to).

    Raises
    ------
    GateError
        When there is no champion, none before it, or that one cannot answer.
    """
    by = user()
    with claim_promotion(records, by=by, at_once=True) as claim:
        champion, events = _find(CHAMPION, records), history(records)
        if events and champion.number not in {e["version"] for e in events if e["action"] == "promote"}:
            raise GateError(f"version {champion.number} was made champion outside coop, so what was before it is not "
                            "on record: name the one to go back to with `coop promote --version`")  # fmt: skip
        before = previous_champion(events, champion.number)
        if before is None:
            raise GateError(f"version {champion.number} is the first champion: promote another with `coop promote`")
        version = _find(before, records)
        _require_answers(version, records)
        _move(version, champion, "rollback", records, claim, by, None)
    return champion.number, before


def history(records: Records) -> list[dict[str, Any]]:
    """Every change of the champion, oldest first.

    Each has time, action, version, previous, by, carried_out (or cut short before the alias moved), and
    changed_outside: whether somebody moved the alias by other means afterwards.
    """
    events = list_events(records)
    champion = find_version(CHAMPION, records)
    now = champion.number if champion else None
    following = [*(event["previous"] for event in events), now][1:]
    found = []
    for event, after in zip(events, following, strict=True):
        still_there = event["version"] == after  # at the next change, or now
        carried_out = still_there or event.get("carried_out", False)
        found.append({**event, "carried_out": carried_out, "changed_outside": carried_out and not still_there})
    return found


def previous_champion(events: list[dict[str, Any]], champion: str) -> str | None:
    """The version that was replaced when this champion was last promoted; a rollback does not count as such."""
    for event in reversed(events):
        if event["carried_out"] and event["action"] == "promote" and event["version"] == champion:
            return event["previous"]
    return None


def was_champion(records: Records, number: str) -> bool:
    """Whether a version answered before and does not now: it was replaced, or rolled back."""
    champion = find_version(CHAMPION, records)
    if champion is not None and champion.number == number:
        return False
    return any(event["carried_out"] and number in (event["version"], event["previous"]) for event in history(records))


def fetch_answers(version: RegisteredVersion, records: Records) -> Answers:
    """A version's answers to its test images, as its run recorded them."""
    with tempfile.TemporaryDirectory() as target:
        folder = fetch_evaluation(version, records, Path(target))
        evaluation = read_json(folder / "evaluation.json")
        with (folder / "predictions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    return Answers(
        version=version.number,
        test_digest=evaluation["test_digest"],
        class_names=tuple(evaluation["class_names"]),
        labels=tuple(int(row["label"]) for row in rows),
        predicted=tuple(int(row["predicted"]) for row in rows),
        zero_shot_accuracy=evaluation["classifiers"].get("zero-shot", {}).get("accuracy", 0.0),
        baselines={name: tuple(int(row[name]) for row in rows) for name in (rows[0] if rows else ())
                   if name not in _OWN_COLUMNS},
    )  # fmt: skip


def _find(reference: str, records: Records) -> RegisteredVersion:
    found = find_version(reference, records)
    if found is None:
        what = f"version {reference}" if reference.isdigit() else f"{reference}"
        raise GateError(f"{records.model} has no {what} in the registry at {records.address}: "
                        "`dvc repro` registers a candidate, `coop promote` makes it champion")  # fmt: skip
    return found


def _require_answers(version: RegisteredVersion, records: Records) -> None:
    from pipelines.champion.proof import require_answers  # and torch, which the history needs not

    require_answers(version, records)


def _move(
    version: RegisteredVersion,
    champion: RegisteredVersion | None,
    action: str,
    records: Records,
    claim: Claim,
    by: str,
    decision: dict[str, Any] | None,
) -> None:
    event = {
        "time": _time(),
        "action": action,
        "version": version.number,
        "previous": champion.number if champion else None,
        "by": by,
        "decision": decision,
    }
    set_champion(version, event, records, claim)
    name = records.model
    before = champion.number if champion else None
    instead = f" instead of {before}" if before else ""
    announce(CHAMPION_CHANGED, records.settings, model=name, text=f"{name}: version {version.number} answers{instead} "
             f"({action}, by {by})", version=version.number, previous=before, action=action)  # fmt: skip


def user() -> str:
    """Who runs this process; in a container that may be a number without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the latter from Python 3.13 on
        return f"uid {os.getuid()}"


def _time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S-%fZ")
