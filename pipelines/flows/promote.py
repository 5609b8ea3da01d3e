"""Promote flow: a registered version -> judged, approved by a person where params.yaml asks for one -> champion."""

import logging

from prefect import flow, get_run_logger
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput

from coop_core.judging.gate import Decision
from coop_core.params import load_params
from pipelines import paths
from pipelines.champion.promotion import promote as promote_now
from pipelines.champion.retraining import judged, judgement
from pipelines.console import prepare
from pipelines.flows.client import show_markdown
from pipelines.flows.lifeline import end_with_worker
from pipelines.flows.names import on_server
from pipelines.records.registry import CHAMPION, find_version, mark_judged
from pipelines.records.server import Records, open_records
from pipelines.services.announcing import GATE_REFUSED, announce

_NAME_LENGTH = 100


class Approval(RunInput):
    """What a person fills in on the run's page."""

    approve: bool = False
    name: str = ""
    """Who decided; it stands in `coop history` as claimed, because Prefect's login is one for all."""

    @property
    def by(self) -> str:
        """Who answered, in one line that nobody takes for a checked name."""
        name = " ".join("".join(c if c.isprintable() else " " for c in self.name).split())[:_NAME_LENGTH]
        return f"claimed: {name}" if name else "claimed: a person, in Prefect"


@flow(name=on_server("promote"), log_prints=False)
def promote(version: int | None = None) -> str:
    """Judge a version (the candidate unless a number is given) and promote it if the gate and a person let it pass."""
    prepare()
    end_with_worker()
    decision, said = decide_and_promote(open_records(), str(version) if version else None)
    show_markdown("\n".join(judgement(decision, said)), key="promotion")
    return said


def decide_and_promote(records: Records, version: str | None) -> tuple[Decision | str, str]:
    """-> the gate's decision, and in few words what came of it."""
    gate, logger = load_params(paths.PARAMS).gate, get_run_logger()
    decision = judged(records, gate.policy(), version)
    if isinstance(decision, str):
        logger.warning(decision)
        champion = find_version(CHAMPION, records)
        if version is not None and (champion is None or champion.number != version):
            mark_judged(version, "not comparable", records)
        _tell(decision, records, version)
        return decision, "nothing was promoted"
    for check in decision.checks:
        logger.log(logging.INFO if check.passed else logging.WARNING, "%s: %s", check.name, check.sentence)
    if not decision.promote:
        failed = "; ".join(check.sentence for check in decision.checks if not check.passed)
        _tell(f"the gate refused it: {failed}", records, decision.candidate)
        return decision, f"version {decision.candidate} was refused by the gate"
    by = "gate"
    if gate.approval_minutes:
        answer = _ask(decision, gate.approval_minutes)
        if answer is None or not answer.approve:
            mark_judged(decision.candidate, "declined", records)
            who = "nobody answered in time" if answer is None else f"declined ({answer.by})"
            return decision, f"version {decision.candidate} was not promoted: {who}"
        by = answer.by
    # Judged again under the promotion's claim: the champion may have changed meanwhile.
    decision = promote_now(records, gate.policy(), version=decision.candidate, by=by)
    word = "is champion" if decision.promote else "was refused by the gate, which had passed it before"
    return decision, f"version {decision.candidate} {word}"


def _tell(why: str, records: Records, version: str | None) -> None:
    name = records.model
    text = f"{name}: {f'version {version}' if version else 'the candidate'} was not promoted: {why}"
    announce(GATE_REFUSED, records.settings, model=name, text=text, version=version)


def _ask(decision: Decision, minutes: int) -> Approval | None:
    """Wait for a person on the run's page; None when nobody answers."""
    checks = "\n".join(f"- {check.name}: {check.sentence}" for check in decision.checks)
    text = f"Version {decision.candidate} passed the gate. Shall it become champion?\n\n{checks}"
    try:
        asked = Approval.with_initial_data(description=text)
        return pause_flow_run(wait_for_input=asked, timeout=60 * minutes, poll_interval=2)
    except FlowPauseTimeout:
        return None
