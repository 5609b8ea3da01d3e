"""Text encoding of two checkouts, steps taken in turn by two processes -> the ratio of their times.

    git worktree add ../before COMMIT
    python benchmarks/in_turn.py ../before                                 this checkout against that one
    python benchmarks/in_turn.py ../before --forms "10 end" "47 class-specific" --pairs 21

ViT-B-32's text tower with random weights, 16 context vectors, float32, forward and backward. A machine whose speed
changes by the minute tells nothing by one process after the other; the median of the pairs' ratios it does tell. The
other checkout needs benchmarks/text_encoding.py with `load`, `encoder_for` and `step`.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

FORMS = ["10 end", "47 end", "100 end", "10 class-specific", "47 class-specific"]
WORKER = """
import sys, time
sys.path.insert(0, "benchmarks")
import text_encoding
tower, names = text_encoding.load("ViT-B-32", "cpu")
known = None
print("ready", flush=True)
for line in sys.stdin:
    form = line.strip()
    if form != known:
        classes, position = form.split(" ", 1)
        own = text_encoding.encoder_for(tower, names, int(classes), 16, position, "auto", "float32")
        known = form
        text_encoding.step(*own)
    started = time.perf_counter()
    text_encoding.step(*own)
    print(time.perf_counter() - started, flush=True)
"""


class Checkout:
    """A process that takes steps with the code of one checkout."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder.resolve())},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        if self.process.stdout.readline() != "ready\n":
            sys.exit(f"{folder} has no text encoding of this kind: see the end of --help")

    def step(self, form: str) -> float:
        """Seconds."""
        self.process.stdin.write(form + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout of this project")
    parser.add_argument("--forms", nargs="+", default=FORMS, help="classes and position")
    parser.add_argument("--pairs", type=int, default=15)
    given = parser.parse_args()
    other, own = Checkout(given.other), Checkout(Path(__file__).parents[1])
    table = Table("classes", "other", "this", "this / other")
    for form in given.forms:
        other.step(form), own.step(form)
        pairs = []
        for number in range(given.pairs):
            first, second = (other, own) if number % 2 else (own, other)
            times = {first: first.step(form), second: second.step(form)}
            pairs.append((times[other], times[own]))
        medians = (f"{1000 * statistics.median(column):.0f} ms" for column in zip(*pairs, strict=True))
        table.add_row(form, *medians, f"{statistics.median(b / a for a, b in pairs):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
