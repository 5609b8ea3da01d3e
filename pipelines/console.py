"""What a person sees in the terminal: log lines, progress, and one sentence for a fault."""

import errno
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from coop_core.errors import CoopError
from pipelines.environment import quiet_libraries

FAULT = 2
"""Exit status of anything the user can mend."""

console = Console()
_stderr = Console(stderr=True)


def run(main: Callable[[], object]) -> NoReturn:
    """Run a stage or a command: faults become one sentence on stderr and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    prepare()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
    except CoopError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped; what is finished is kept, and the same command goes on from here", status=130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        where = f" at {error.filename}" if error.filename else ""
        way_out = "free space or correct the rights, then run the same again"
        fail(f"cannot read or write{where} ({error.strerror}): {way_out}")
    sys.exit(0)


def prepare() -> None:
    """What every process of ours begins with: our log lines are heard, the libraries' noise is not."""
    for ours in ("pipelines", "coop_core"):
        logging.getLogger(ours).setLevel(logging.INFO)
    quiet_libraries()


def _interrupt(number: int, frame: object) -> NoReturn:
    """Let a polite kill unwind like Ctrl-C, so that open MLflow runs are closed as failed."""
    raise KeyboardInterrupt


def fail(sentence: str, *, status: int = FAULT) -> NoReturn:
    _stderr.print(f"error: {sentence}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar that appears with the first step -> a function of how many are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[details]}"))  # fmt: skip
    with Progress(*columns, console=_stderr) as bar:
        task = bar.add_task(what, total=total, visible=False, details="")

        def update(done: int, total: int | None = total, *, details: str = "") -> None:
            bar.update(task, completed=done, total=total, details=details, visible=True)

        yield update
