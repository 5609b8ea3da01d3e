"""`coop doctor`: settings -> a table of what answers and what does not, each with the way out.

All is looked at side by side, and what does not come to an end in time is told as such: the table always comes.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

from rich import box
from rich.markup import escape
from rich.table import Table

from coop_core.errors import CoopError
from pipelines.console import console
from pipelines.finding import Finding, unused, wrong
from pipelines.records.probes import probe_mlflow
from pipelines.services.probes import probe_clock, probe_machine, probe_prefect
from pipelines.settings import Settings
from pipelines.sources.probes import probe_remote, probe_sources

WITHIN_SECONDS = 45.0
"""For everything together: a silent server costs 10, and a busy machine imports libraries for as long again."""
_WIDTH = 80
_SHOWN = {"well": ("well", None), "wrong": ("WRONG", "bold red"), "unused": ("-", "dim")}


def examine(settings: Settings) -> list[Finding]:
    """Look at everything side by side; what is tried is removed again."""
    probes: dict[str, Callable[[], Iterable[Finding]]] = {
        "MLflow": lambda: probe_mlflow(settings),
        "Prefect": lambda: probe_prefect(settings),
        "DVC remote": probe_remote,
        "S3 sources": lambda: probe_sources(settings),
        "clock": lambda: probe_clock(settings),
        "this machine": lambda: probe_machine(settings),
    }
    found: dict[str, list[Finding]] = {name: [] for name in probes}
    threads = {name: threading.Thread(target=_look, args=(name, probe, found[name]), daemon=True)
               for name, probe in probes.items()}  # fmt: skip
    end = time.monotonic() + WITHIN_SECONDS
    with console.status("looking"):
        for thread in threads.values():
            thread.start()
        for name, thread in threads.items():
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                found[name] = [*found[name], wrong(name, f"came to no end in {WITHIN_SECONDS:.0f} s: look at the logs")]
    return [finding for findings in found.values() for finding in findings]


def _look(name: str, probe: Callable[[], Iterable[Finding]], found: list[Finding]) -> None:
    try:
        for finding in probe():
            found.append(finding)
    except CoopError as error:
        found.append(wrong(name, str(error)))
    except ImportError as error:
        found.append(unused(name, f"cannot be looked at without the Python module {error.name}"))


def print_findings(findings: Sequence[Finding], *, as_json: bool) -> bool:
    """Show them -> whether nothing is wrong."""
    if as_json:
        console.file.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        table = Table(box=box.SIMPLE, pad_edge=False, show_header=False, width=_WIDTH)
        for _ in range(3):
            table.add_column(overflow="fold")
        for finding in findings:
            mark, style = _SHOWN[finding.state]
            table.add_row(finding.name, mark, escape(finding.said), style=style)
        console.print(table)
    return all(finding.state != "wrong" for finding in findings)
