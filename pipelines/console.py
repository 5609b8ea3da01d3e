"""What a person sees in the terminal: log lines, progress, and one sentence for a fault."""

import errno
import logging
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from coop_core.errors import CoopError, ServiceError
from pipelines import paths
from pipelines.allocator import keep_freed_memory
from pipelines.environment import quiet_libraries

FAULT = 2
"""Exit status of anything the user can mend."""

_FIRST_SECONDS = 5
"""Of a job, before its length is guessed."""
_LONG_SECONDS = 60
"""A job that takes longer is announced."""
_LINE_SECONDS = 30
"""Between two lines that say how far a job is, where there is no terminal for a bar."""

log = logging.getLogger(__name__)
console = Console()
_stderr = Console(stderr=True)


def run(main: Callable[[], object]) -> NoReturn:
    """Run a stage or a command: faults become one sentence on stderr and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Lines()])
    prepare()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
    except CoopError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped; what is finished is kept, and the same command goes on from here", status=130)
    except OSError as error:
        if error.errno in _MENDABLE:
            where = f" at {error.filename}" if error.filename else ""
            fail(f"cannot read or write{where} ({error.strerror}): {_MENDABLE[error.errno]}")
        _fail_unforeseen(error)
    except Exception as error:  # the last of all: no traceback in front of a person, and none is lost
        _fail_unforeseen(error)
    sys.exit(0)


_SPACE = "free space or correct the rights, then run the same again"
_PLACE = "a file stands where a folder should be, or the other way round: move it, or name another place"
_MENDABLE = {
    errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE, errno.EACCES: _SPACE, errno.EROFS: _SPACE, errno.EPERM: _SPACE,
    errno.ENOTDIR: _PLACE, errno.EEXIST: _PLACE, errno.EISDIR: _PLACE,
}  # fmt: skip
"""Faults of places, with the way out."""


def _fail_unforeseen(error: Exception) -> NoReturn:
    """A sentence, and the traceback in a file of its own."""
    with tempfile.NamedTemporaryFile("w", prefix="coop-", suffix=".log", delete=False, errors="replace") as file:
        traceback.print_exception(error, file=file)
    reason = " ".join(str(error).split())[:200]
    fail(f"something unforeseen happened ({type(error).__name__}{': ' * bool(reason)}{reason}): "
         f"{file.name} says where; please report it with what you did")  # fmt: skip


def require_project(otherwise: str = "") -> None:
    """For what works in the project's folder alone, before anything is made in another one.

    Raises
    ------
    ServiceError
        In any other folder, with the way out and what may be done `otherwise`.
    """
    if not paths.PARAMS.exists() and not Path("dvc.yaml").exists():
        raise ServiceError(f"this is not the project's folder: {Path.cwd()} has neither {paths.PARAMS} nor dvc.yaml; "
                           f"change into the one that has them{otherwise}")  # fmt: skip


class _Lines(logging.Handler):
    """Log lines on stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        _stderr.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def prepare() -> None:
    """What every process of ours begins with: our log lines are heard, the libraries' noise is not, and freed memory
    is used again."""
    keep_freed_memory()
    for ours in ("pipelines", "coop_core"):
        logging.getLogger(ours).setLevel(logging.INFO)
    logging.getLogger("urllib3.connectionpool").addFilter(_RETRIES)
    quiet_libraries()


class _Retries(logging.Filter):
    """A server that is asked again and again: one plain line now and then, instead of one with a traceback's words."""

    def __init__(self) -> None:
        super().__init__()
        self._said: float | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("Retrying"):
            return True
        record.msg, record.args = "a server does not answer: it is asked again, for some minutes at most", ()
        if self._said is not None and record.created - self._said < _LINE_SECONDS:
            return False
        self._said = record.created
        return True


_RETRIES = _Retries()


def _interrupt(number: int, frame: object) -> NoReturn:
    """Let a polite kill unwind like Ctrl-C, so that open MLflow runs are closed as failed."""
    raise KeyboardInterrupt


def fail(sentence: str, *, status: int = FAULT) -> NoReturn:
    _stderr.print(f"error: {sentence}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar that appears with the first step -> a function of how many are done.

    A job of more than a minute is announced in a line; outside a terminal lines say how far it is, now and then.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[details]}"))  # fmt: skip
    spoken = Spoken(what, every=None if _stderr.is_terminal else _LINE_SECONDS)
    with Progress(*columns, console=_stderr) as bar:
        task = bar.add_task(what, total=total, visible=False, details="")

        def update(done: int, total: int | None = total, *, details: str = "") -> None:
            bar.update(task, completed=done, total=total, details=details, visible=True)
            if line := spoken.line(done, total, time.monotonic(), details):
                log.info(line)

        yield update


class Spoken:
    """What is said of a long job in lines."""

    def __init__(self, what: str, *, every: float | None) -> None:
        """`every`: seconds between lines that say how far it is; None says only how long it will take."""
        self._what, self._every = what, every
        self._begun: tuple[float, int] | None = None
        """When it was first heard of, and how much was done by then, in an earlier attempt perhaps."""
        self._announced, self._last = False, 0.0

    def line(self, done: int, total: int | None, now: float, details: str = "") -> str | None:
        """What to say at the time `now` in seconds, if anything."""
        if self._begun is None:
            self._begun, self._last = (now, done), now
        start, before = self._begun
        if total is None or done <= before or done >= total or now - start < _FIRST_SECONDS:
            return None
        left = (total - done) * (now - start) / (done - before)
        if not self._announced:
            self._announced = True
            if now - start + left > _LONG_SECONDS:
                self._last = now
                return f"{self._what}: about {duration(left)}"
        if self._every is None or now - self._last < self._every:
            return None
        self._last = now
        return f"{self._what}: {done} of {total}, about {duration(left)} left" + (f", {details}" if details else "")


def duration(seconds: float) -> str:
    """For people: 40 seconds, 12 minutes, 3.5 hours."""
    if seconds < 100:
        return f"{seconds:.0f} second{'' if round(seconds) == 1 else 's'}"
    return f"{seconds / 60:.0f} minutes" if seconds < 100 * 60 else f"{seconds / 3600:.1f} hours"
