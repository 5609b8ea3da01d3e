"""Workspace: what a kill or an open hand left in DVC's folder -> mended, where no DVC is at work.

Not covered: another machine's DVC on a shared disk.
"""

import json
import logging
import os
from pathlib import Path

import psutil

from coop_core.errors import ServiceError
from pipelines import locks

log = logging.getLogger(__name__)

RWLOCK = Path(".dvc/tmp/rwlock")
"""Where DVC writes down which process uses which file; a kill while it writes leaves it empty, and DVC gives up."""
_GUARD = Path(".dvc/tmp/rwlock.lock")
"""Whoever changes the file above holds this one's lock, as DVC does."""
LOCAL_SETTINGS = Path(".dvc/config.local")


def mend_workspace() -> None:
    """Mend what would stop every later `dvc repro`, and close DVC's local settings, which may hold keys, to others."""
    _mend_rwlock()
    _close_settings()


def _mend_rwlock() -> None:
    if not _damaged(RWLOCK):
        return
    busy = f"{RWLOCK} is damaged, but another process is at work in it: it stays as it is for now"
    try:
        with locks.alone(_GUARD, otherwise=busy):
            if at_work := _dvc_processes():
                log.warning("%s is damaged, but DVC may be using it (process %s): it is mended when that has ended",
                            RWLOCK, ", ".join(map(str, at_work)))  # fmt: skip
            elif _damaged(RWLOCK):
                RWLOCK.unlink()
                log.info("removed %s, which a kill had left damaged", RWLOCK)
    except ServiceError as error:
        log.warning("%s", error)


def _damaged(path: Path) -> bool:
    try:
        return not isinstance(json.loads(path.read_bytes()), dict)
    except FileNotFoundError:
        return False
    except ValueError:  # no JSON, or no text
        return True


def _dvc_processes() -> list[int]:
    """Processes of DVC in this folder, and those of other users of which nobody may say where they are."""
    found = []
    for process in psutil.process_iter():
        try:
            is_dvc = any(Path(word).name == "dvc" or word.endswith("dvc/__main__.py") for word in process.cmdline())
            if is_dvc and _may_be_here(process):
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _may_be_here(process: psutil.Process) -> bool:
    try:
        return Path(process.cwd()).is_relative_to(Path.cwd())
    except psutil.AccessDenied:
        return True


def _close_settings() -> None:
    try:
        state = LOCAL_SETTINGS.stat()
    except FileNotFoundError:
        return
    if not state.st_mode & 0o077:
        return
    if state.st_uid != os.getuid():
        log.warning("other users can read %s, which may hold keys: its owner should `chmod 600` it", LOCAL_SETTINGS)
        return
    LOCAL_SETTINGS.chmod(0o600)
    log.info("closed %s to other users: it may hold keys", LOCAL_SETTINGS)
