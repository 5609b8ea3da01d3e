"""Processes: a command -> a process group that ends with whoever started it.

The group's leader is this module run as a program, a guard: it holds the other end of a pipe, and when the pipe
closes, because its owner ended it or was itself killed, the guard kills the whole group. So no training and no
`dvc repro` goes on alone, whatever signal took its owner.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from pipelines.environment import inherited_environment

_LOG_BYTES = 20_000_000
"""A log over this size begins anew."""
_GRACE_SECONDS = 5.0
"""Between asking a group to end and killing it."""


class Group:
    """A guarded command. Leaving the `with` block ends it, if it has not ended."""

    def __init__(
        self, words: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None, talk: bool = False
    ) -> None:
        """Output goes to the log file; with `talk`, lines can be written to the command and read from it instead."""
        log.parent.mkdir(parents=True, exist_ok=True)
        full = log.exists() and log.stat().st_size > _LOG_BYTES
        self._log = log.open("wb" if full else "ab")
        self._ending = threading.Lock()
        held, self._held = os.pipe()
        with os.fdopen(held, "rb"):
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.processes", str(held), *words],
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talk else self._log,
                stderr=self._log,
                env=inherited_environment() | dict(environment or {}),
                pass_fds=(held,),
                start_new_session=True,
                text=True,
            )

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.end()

    @property
    def says(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def tell(self, line: str) -> None:
        """Write a line to the command; lost when the command is gone, which reading from it shows."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; negative for a signal.

        Raises
        ------
        subprocess.TimeoutExpired
        """
        return self.process.wait(timeout)

    def finish(self) -> int:
        """Tell the command that nothing more will come, and let it end by itself -> its exit status."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE_SECONDS)
        self.end()
        return self.process.returncode

    def end(self) -> None:
        """Ask the group to end, and kill what is left of it. Any thread may."""
        with self._ending:
            if self._held >= 0:
                self._end()

    def _end(self) -> None:
        if self.process.poll() is None:
            _signal_group(self.process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE_SECONDS)
        until = time.monotonic() + _GRACE_SECONDS
        while _exists(self.process.pid) and time.monotonic() < until:  # a stage may still be closing its run
            time.sleep(0.05)
        _signal_group(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._held)
        self._held = -1
        for stream in (self.process.stdin, self.process.stdout, self._log):
            if stream is not None and not stream.closed:
                with suppress(BrokenPipeError):
                    stream.close()


def end_all(groups: Sequence[Group]) -> None:
    """End groups at the same time: together they take no longer than the slowest."""
    threads = [threading.Thread(target=group.end, name="end") for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def guard(held: int, words: Sequence[str]) -> int:
    """Run a command and end with it; kill the whole group when the pipe closes."""
    child = subprocess.Popen(words)  # the pipe stays here
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # the group has it too; what the command says counts
    signal.signal(signal.SIGINT, lambda number, frame: None)
    closing = threading.Event()
    watch = threading.Thread(target=_kill_when_closed, args=(held, closing), daemon=True)
    watch.start()
    status = child.wait()
    if closing.is_set():  # the others of the group may need longer than the command
        watch.join()
    return 128 - status if status < 0 else status


def _kill_when_closed(held: int, closing: threading.Event) -> None:
    os.read(held, 1)  # returns when nobody holds the other end
    closing.set()
    os.killpg(0, signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _exists(leader: int) -> bool:
    """Whether anything is left of a group."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def _signal_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, number)


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
