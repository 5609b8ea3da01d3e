"""Recorder: answers as they are given -> files of rows, written beside the answering and never in its way.

Whoever answers puts a row into a bounded queue and goes on; where that is full, or the disk, the row is dropped and
counted. Files and folders are the user's own, and the oldest go when the limit is reached.
"""

import hashlib
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coop_core.errors import ServiceError
from coop_core.predictor import Prediction
from pipelines.serving.answered import Row, as_line, files_of
from pipelines.serving.metrics import Metrics
from pipelines.serving.versions import Version

log = logging.getLogger(__name__)

_PARTS = 16
"""A file is full with this part of all that may be kept."""
_FILES = 200
_WAITING_ROWS = 1024
_WAITING_BYTES = 64 << 20
"""Of pictures that wait to be written."""
AGAIN_SECONDS = 60.0
"""Before a disk that refused is tried again."""


@dataclass(frozen=True)
class _Item:
    row: Row
    picture: bytes | None


class Recorder:
    """One thread writes; `put` never waits and never fails."""

    def __init__(self, folder: Path, metrics: Metrics, *, megabytes: int, pictures: bool) -> None:
        """`megabytes`: of all files together; `pictures`: whether the files that were sent are kept, too.

        Raises
        ------
        ServiceError
            When the folder cannot be made or written to.
        """
        self._folder, self._metrics, self._pictures = folder, metrics, pictures
        self._at_most = megabytes * 10**6
        self._file: Path | None = None
        self._handle, self._size = -1, 0
        self._waiting: queue.Queue[_Item | None] = queue.Queue(_WAITING_ROWS)
        self._waiting_bytes, self._counting = 0, threading.Lock()
        self._refused_until = 0.0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise ServiceError(f"answers cannot be recorded in {folder} ({error.strerror}): correct COOP_SERVE_RECORD, "
                               "or leave it out") from None  # fmt: skip
        metrics.recording.set(1)
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def put(self, version: Version, file: bytes, prediction: Prediction) -> None:
        """A file that was sent, and what was answered, with the feature."""
        feature = prediction.feature if prediction.feature is not None else np.zeros(0, np.float16)
        row = Row(time.time(), version.number, version.run_id, hashlib.sha256(file).hexdigest(), prediction.labels[0],
                  prediction.probabilities[0], prediction.answer is not None, feature)  # fmt: skip
        picture = file if self._pictures else None
        with self._counting:
            full = picture is not None and self._waiting_bytes + len(picture) > _WAITING_BYTES
            if not full:
                with suppress(queue.Full):
                    self._waiting.put_nowait(_Item(row, picture))
                    self._waiting_bytes += len(picture or b"")
                    return
        self._metrics.records.labels("dropped").inc()

    def close(self) -> None:
        """After what waits is written."""
        self._waiting.put(None)
        self._thread.join()
        self._shut()

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            with self._counting:
                self._waiting_bytes -= len(item.picture or b"")
            if time.monotonic() < self._refused_until:
                self._metrics.records.labels("dropped").inc()
                continue
            try:
                self._write(item)
            except Exception as error:  # whatever it is, answers are given on
                self._stop(error)

    def _write(self, item: _Item) -> None:
        if self._handle < 0 or self._size >= self._at_most // _PARTS or os.fstat(self._handle).st_nlink == 0:
            self._open()                                                          # full, or removed by somebody
        with self._whole_or_none():
            self._append(as_line(item.row))
        if item.picture is not None:
            self._keep(item.picture, item.row.image)
        self._metrics.records.labels("kept").inc()
        if self._refused_until:
            self._refused_until = 0.0
            self._metrics.recording.set(1)
            log.info("answers are recorded in %s again", self._folder)

    def _append(self, line: bytes) -> None:
        left = memoryview(line)
        while left:
            left = left[os.write(self._handle, left) :]
        self._size += len(line)

    @contextmanager
    def _whole_or_none(self) -> Iterator[None]:
        """A full disk takes the beginning of a row; that is taken back."""
        size = os.fstat(self._handle).st_size
        try:
            yield
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._handle, size)
            raise

    def _keep(self, picture: bytes, name: str) -> None:
        assert self._file is not None
        folder = _pictures_of(self._file)
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished = folder / f".{name}"
        handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as out:
            out.write(picture)
        os.replace(unfinished, folder / name)
        self._size += len(picture)

    def _open(self) -> None:
        """A new file, which makes room first."""
        self._shut()
        sizes = {file: _size(file) for file in files_of(self._folder)}
        room = self._at_most - self._at_most // _PARTS
        for oldest in list(sizes):
            if not sizes[oldest] or len(sizes) >= _FILES or sum(sizes.values()) > room:
                del sizes[oldest]
                oldest.unlink(missing_ok=True)
                shutil.rmtree(_pictures_of(oldest), ignore_errors=True)
        self._file = self._folder / f"answers-{time.time_ns():020d}-{os.getpid()}.jsonl"
        self._handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._size = 0

    def _shut(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def _stop(self, error: Exception) -> None:
        """One line in the log, however long it lasts."""
        self._metrics.records.labels("dropped").inc()
        if not self._refused_until:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            log.warning("answers are given on, but no longer recorded in %s (%s): free space or correct its rights; it "
                        "is tried again every minute", self._folder, reason)  # fmt: skip
            self._metrics.recording.set(0)
        self._refused_until = time.monotonic() + AGAIN_SECONDS


def _pictures_of(file: Path) -> Path:
    return file.with_suffix(".pictures")


def _size(file: Path) -> int:
    """Of a file of rows and its pictures."""
    with suppress(OSError):
        return file.stat().st_size + sum(one.stat().st_size for one in _pictures_of(file).glob("*"))
    return 0
