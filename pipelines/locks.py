"""Locks: a file -> the right to be the only process at something; it ends with the process, however that ends."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coop_core.errors import ServiceError

log = logging.getLogger(__name__)


@contextmanager
def alone(file: Path, *, otherwise: str) -> Iterator[None]:
    """Hold a file's lock; who comes second is told at once.

    Raises
    ------
    ServiceError
        With the sentence `otherwise`, when another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(otherwise) from None
        yield


@contextmanager
def in_turn(file: Path, *, meanwhile: str) -> Iterator[None]:
    """Hold a file's lock; who comes second says `meanwhile` in the log and waits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info(meanwhile)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
