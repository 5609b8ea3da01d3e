"""Showing: what is done, how much, and of how much -> a bar where a person looks, in a notebook or a terminal."""

import html
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS = 0.2
"""Between two changes of a bar in a notebook."""


class ProgressBar:
    """For `PromptClassifier(progress=ProgressBar())`: one bar for each thing that is done.

    A notebook shows it in the cell's output, with no widget to install. Outside a notebook and a terminal it is silent.
    """

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._bars:
            self._bars[what] = _Cell() if in_notebook() else _Line(what)
        self._bars[what].update(what, done, total)
        if done >= total:
            self._bars.pop(what).close()


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    python = sys.modules.get("IPython")
    shell = python.get_ipython() if python else None
    return shell is not None and hasattr(shell, "kernel")


class _Cell:
    """A bar in a cell's output."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._last = 0.0

    def update(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._handle is not None and done < total and now - self._last < _SECONDS:
            return
        self._last, said = now, f"{what}: {done} of {total}"
        content = {"text/plain": said,
                   "text/html": f'<progress value="{done}" max="{total}"></progress> {html.escape(said)}'}  # fmt: skip
        if self._handle is None:
            from IPython.display import display

            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)

    def close(self) -> None:
        pass


class _Line:
    """A bar in a line of the terminal."""

    def __init__(self, what: str) -> None:
        console = Console(stderr=True)
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                             console=console, disable=not console.is_terminal)  # fmt: skip
        self._task = self._bar.add_task(what)
        self._bar.start()

    def update(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def close(self) -> None:
        self._bar.stop()
