"""Watching: what is recorded of the champion's answers, and what it saw of its test images -> whether they differ.

The reference lies with the registered version, so that no project's folder is needed.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coop_core.artifact import read_artifact
from coop_core.errors import WatchError
from coop_core.files import write_json
from coop_core.judging.drift import Drift, compare
from coop_core.judging.seen import Seen, label_numbers
from coop_core.params import WatchParams
from coop_core.reference import read_reference
from coop_core.report.drift import drift_picture
from coop_core.report.style import save_png
from pipelines.records.registry import CHAMPION, RegisteredVersion, fetch_prompt, find_version
from pipelines.records.server import Records
from pipelines.records.watches import LastLook, last_look, log_look
from pipelines.serving.answered import Row, read_recorded


@dataclass(frozen=True)
class Gathered:
    """Of a champion: what it saw of its test images, and of the newest images that it was sent."""

    model: str
    version: RegisteredVersion
    class_names: tuple[str, ...]
    reference: Seen
    """Without images that were sent as well."""
    sent: Seen
    newest: float
    """When the newest of them was answered, in seconds since 1970; 0 without any."""
    skipped: int
    """Lines of the records that are no whole row, or of no class or width of this version."""


@dataclass(frozen=True)
class Look:
    gathered: Gathered
    drift: Drift | None
    """None where there are too few images to judge."""

    @property
    def sentence(self) -> str:
        its = self.gathered
        named = f"version {its.version.number} of {its.model}"
        if self.drift is None:
            return (f"{named}: {len(its.sent)} different images are recorded and {len(its.reference)} test images are "
                    "left to compare with, too few to judge (watch.min_images)")  # fmt: skip
        said = "; ".join(sign.sentence for sign in self.drift.raised)
        return f"{named}, {len(its.sent)} images: {said or 'nothing differs from its test images beyond the limits'}"


def gather(records: Records, *, at_most: int) -> Gathered:
    """The champion's reference, and the newest images that it was sent, at most so many.

    Raises
    ------
    WatchError
        When nothing is recorded, there is no champion, or it carries no reference.
    """
    if records.settings.serve_record is None:
        raise WatchError("nothing is recorded, so there is nothing to watch: set COOP_SERVE_RECORD to a folder, and "
                         "start `coop serve` again")  # fmt: skip
    name = records.model
    champion = find_version(CHAMPION, records)
    if champion is None:
        raise WatchError(f"{name} has no champion to watch: `coop promote` makes one")
    with tempfile.TemporaryDirectory() as folder:
        prompt = fetch_prompt(f"{name}/{champion.number}", records, Path(folder))
        class_names, reference = read_artifact(prompt).class_names, read_reference(prompt)
    if reference is None:
        raise WatchError(f"version {champion.number} of {name} carries nothing of its test images, so there is nothing "
                         "to compare with: it was registered by an earlier coop; `dvc repro` and `coop promote` bring "
                         "one that does")  # fmt: skip
    recorded = read_recorded(records.settings.serve_record, run=champion.run_id, at_most=at_most)
    numbers, width = label_numbers(class_names), reference.features.shape[1]
    rows = [row for row in recorded.rows if row.label in numbers and len(row.feature) == width]
    sent = _seen(rows, numbers, width=width)
    skipped = recorded.torn + len(recorded.rows) - len(rows)
    newest = max((row.time for row in rows), default=0.0)
    return Gathered(name, champion, class_names, reference.without(sent.images), sent, newest, skipped)


def look(gathered: Gathered, params: WatchParams) -> Look:
    """Compare; the same images give the same figures."""
    if min(len(gathered.sent), len(gathered.reference)) < params.min_images:
        return Look(gathered, None)
    random = np.random.default_rng(0)
    return Look(gathered, compare(gathered.reference, gathered.sent, params.limits(), random=random))


def watch(
    records: Records, params: WatchParams, *, ask: Callable[[Look], object], flow_run: str | None = None
) -> Look | str:
    """One look on a schedule, put on record -> what was found, or why there was nothing to look at.

    `ask` is called with a look that asks for a retraining.
    """
    try:
        gathered = gather(records, at_most=params.max_images)
    except WatchError as error:
        return str(error)
    if not is_new(gathered, records):
        return f"version {gathered.version.number} of {gathered.model}: nothing was recorded since the last look"
    found = look(gathered, params)
    alarm = is_alarm(found, records, quiet_hours=params.quiet_hours)
    if alarm:  # before it is on record: a kill between the two asks twice, and not never
        ask(found)
    record(found, records, alarm=alarm, flow_run=flow_run)
    return found


def is_new(gathered: Gathered, records: Records) -> bool:
    """Whether anything was recorded since the last look that is on record."""
    last = last_look(records, version_run=gathered.version.run_id)
    return last is None or gathered.newest > last.newest


def is_alarm(found: Look, records: Records, *, quiet_hours: float) -> bool:
    """Whether a retraining is to be asked for: a limit is passed, and this version raised none lately."""
    if found.drift is None or not found.drift.raised:
        return False
    last: LastLook | None = last_look(records, version_run=found.gathered.version.run_id)
    return last is None or time.time() - last.alarm >= 3600 * quiet_hours


def record(found: Look, records: Records, *, alarm: bool, flow_run: str | None = None) -> str:
    """Log a look in MLflow, with a picture -> the id of its run."""
    its = found.gathered
    tags = {"coop.model": its.model, "coop.version": its.version.number}
    if flow_run:
        tags["prefect.flow_run_id"] = flow_run
    metrics: dict[str, float] = {"images": len(its.sent), "reference_images": len(its.reference),
                                 "skipped_rows": its.skipped, "alarm": alarm}  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if found.drift is not None:
            for sign in found.drift.signs:
                metrics |= {f"{sign.name}/value": sign.value, f"{sign.name}/chance": sign.p}
            write_json(folder / "drift.json", found.drift.as_dict())
            save_png(drift_picture(found.drift, its.reference, its.sent, its.class_names), folder / "drift.png")
        return log_look(
            records, name=f"{its.model} version {its.version.number}", version_run=its.version.run_id,
            newest=its.newest, alarm=alarm, tags=tags, metrics=metrics, note=as_markdown(found), folder=folder,
        )  # fmt: skip


def as_markdown(found: Look) -> str:
    lines = [f"{found.sentence[:1].upper()}{found.sentence[1:]}."]
    if found.drift is not None:
        lines += ["", "| sign | value | limit | chance | passed |", "|---|---|---|---|---|"]
        lines += [f"| {sign.name} | {sign.value:.3f} | {sign.limit:g} | {sign.p:.2g} | "
                  f"{'**yes**' if sign.raised else 'no'} |" for sign in found.drift.signs]  # fmt: skip
    return "\n".join(lines)


def as_json(found: Look) -> dict[str, Any]:
    its = found.gathered
    about = {"model": its.model, "version": its.version.number, "newest": its.newest, "skipped_rows": its.skipped,
             "images": len(its.sent), "reference_images": len(its.reference)}  # fmt: skip
    return about | (found.drift.as_dict() if found.drift else {"raised": [], "signs": []})


def _seen(rows: list[Row], numbers: dict[str, int], *, width: int) -> Seen:
    features = np.stack([row.feature for row in rows]) if rows else np.zeros((0, width), np.float16)
    return Seen(
        features,
        np.array([numbers[row.label] for row in rows], dtype=np.int64),
        np.array([row.confidence for row in rows], dtype=np.float32),
        np.array([row.answered for row in rows], dtype=bool),
        tuple(row.image for row in rows),
    )
