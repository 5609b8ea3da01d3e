"""What this checkout keeps and nothing needs -> a list; and each entry of it -> away.

Below the cache folder: image features, checkpoints and logs of trainers that nobody has opened for so long. Below
artifacts/: what `dvc.lock` no longer names, and sweeps' files that MLflow has as well. What work under way uses is
younger than a day, and no list reaches that far.
"""

import fcntl
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from coop_core.features.store import LOCK
from pipelines import paths
from pipelines.records.retention import DAY, newest

STORES, CHECKPOINTS, LOGS = "image features", "checkpoints", "logs of trainers"
SWEEPS, JUDGED = "files of sweeps", "test sets of before"


@dataclass(frozen=True)
class Leaving:
    kind: str
    place: Path


def find_leavings(cache: Path, *, days: int, sweeps: Collection[str]) -> list[Leaving]:
    """What nothing has touched for so many days; `sweeps` are those whose files MLflow has."""
    before = time.time() - days * DAY
    outs = _outs(Path("dvc.lock"))
    found = [
        *_old(STORES, cache / paths.FEATURE_STORE, before, lambda place: (place / LOCK).exists()),
        *_old(CHECKPOINTS, cache / paths.CHECKPOINTS, before),
        *_old(LOGS, cache / paths.TRAINER_LOGS, before),
        *_old(SWEEPS, paths.SWEEPS, before, lambda place: place.name in sweeps),
        *_old(JUDGED, paths.JUDGED, before, lambda place: bool(outs) and place.as_posix() not in outs),
    ]
    return sorted(found, key=lambda leaving: leaving.place)


def remove(leaving: Leaving, *, days: int) -> bool:
    """Remove it, unless somebody uses it by now -> whether it went."""
    before = time.time() - days * DAY
    if leaving.kind != STORES:
        if newest(leaving.place) > before:
            return False
        shutil.rmtree(leaving.place) if leaving.place.is_dir() else leaving.place.unlink()
        return True
    with (leaving.place / LOCK).open("rb") as lock:  # not as the store opens it, which is a sign of use
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if newest(leaving.place) > before:
            return False
        shutil.rmtree(leaving.place)
    return True


def size(place: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(found.lstat().st_size for found in (place, *place.rglob("*")) if not found.is_dir())


def _old(
    kind: str, folder: Path, before: float, fits: Callable[[Path], bool] = lambda place: True
) -> Iterator[Leaving]:
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if fits(place) and newest(place) < before:
            yield Leaving(kind, place)


def _outs(lock: Path) -> set[str]:
    """Every output that dvc.lock names."""
    if not lock.exists():
        return set()
    stages = (YAML(typ="safe").load(lock) or {}).get("stages", {})
    return {out["path"] for stage in stages.values() for out in stage.get("outs", [])}
