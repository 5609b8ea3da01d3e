"""Growth: ten times the trials, images or classes -> ten times the cost, or less, or more.

    python benchmarks/growth.py                                       a quarter of an hour on 2 cores
    python benchmarks/growth.py --trials 10 100 --images 1000 --classes 10 --json FILE

Whole commands in a clone with painted pictures and `mini`, in seconds on a clock, with the largest process's memory.
Images are of 64 x 64 pixels in ten classes, half of them for testing. Classes have four images each, one to learn from,
and one epoch is trained.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from kill_matrix import Playground, change
from PIL import Image
from rich.console import Console
from rich.table import Table

from coop_core.files import write_json

SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", nargs="*", type=int, default=[10, 100, 1000])
    parser.add_argument("--images", nargs="*", type=int, default=[1000, 10000])
    parser.add_argument("--classes", nargs="*", type=int, default=[10, 100, 1000])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for what, sizes, measure in (("trials", given.trials, grow_trials), ("images", given.images, grow_images),
                                 ("classes", given.classes, grow_classes)):  # fmt: skip
        found[what] = {}
        for size in sizes:
            with tempfile.TemporaryDirectory(prefix="growth-") as folder:
                found[what][size] = measure(Playground(Path(folder) / "project"), size)
            show({what: found[what]})
            if given.json:
                write_json(given.json, found)


def grow_trials(clone: Playground, count: int) -> dict[str, Any]:
    clone.params(epochs=2)
    dvc(clone, "repro", "features")
    rates = [0.01 + 1e-5 * number for number in range(count // 10)]
    change(clone.folder, sweep={"name": "growth", "seeds": [1, 2, 3, 4, 5],
                                "space": {"split.shots": [1, 2], "train.learning_rate": rates}})  # fmt: skip
    sweep = coop(clone, "sweep", "--local")
    again = coop(clone, "sweep", "--local")
    compared = coop(clone, "compare")
    return {
        "sweep": sweep, "a trial": f"{sweep[0] / count:.2f} s", "the same sweep again": again,
        "coop compare": compared, "MLflow's database": megabytes(clone.folder / "mlflow.db"),
        "its files": megabytes(clone.folder / "mlruns"),
    }  # fmt: skip


def grow_images(clone: Playground, count: int) -> dict[str, Any]:
    paint(clone.folder / "images", classes=10, images=count // 10)
    clone.params(epochs=2)
    change(clone.folder, split={"shots": 16, "test_per_class": None})
    stages = ("download", "split", "features", "baselines", "train", "evaluate", "report", "track")
    rows = {stage: dvc(clone, "repro", stage) for stage in stages}
    return {
        **rows, "dvc repro, nothing new": dvc(clone, "repro"),
        "feature files": megabytes(clone.folder / "artifacts/features"),
        "cache": megabytes(clone.folder / ".dvc/cache"),
    }  # fmt: skip


def grow_classes(clone: Playground, count: int) -> dict[str, Any]:
    paint(clone.folder / "images", classes=count, images=4)
    clone.params(epochs=1)
    change(clone.folder, split={"shots": 1, "test_per_class": 2}, train={"warmup_epochs": 0})
    dvc(clone, "repro", "features")
    stages = ("baselines", "train", "evaluate", "report", "track")
    rows = {stage: dvc(clone, "repro", stage) for stage in stages}
    image = next((clone.folder / "images").rglob("*.jpg"))
    return {
        **rows, "steps of train": max(1, count // 32), "coop predict": coop(clone, "predict", str(image)),
        "artefact": megabytes(clone.folder / "artifacts/prompt"),
    }  # fmt: skip


def paint(folder: Path, *, classes: int, images: int) -> None:
    shutil.rmtree(folder)
    rng = np.random.default_rng(0)
    for number in range(classes):
        colour = rng.integers(0, 256, 3)
        (folder / f"kind {number}").mkdir(parents=True)
        for i in range(images):
            pixels = np.clip(colour + rng.normal(0, 40, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"kind {number}" / f"{i}.jpg")


def coop(clone: Playground, *words: str) -> tuple[float, int]:
    return timed(clone, "-m", "pipelines.commands.cli", *words)


def dvc(clone: Playground, *words: str) -> tuple[float, int]:
    return timed(clone, "-m", "dvc", *words)


def timed(clone: Playground, *words: str) -> tuple[float, int]:
    """A command to its end -> seconds, and megabytes of the largest process in it."""
    begun = time.monotonic()
    number = os.fork()
    if number == 0:
        with (clone.folder / "said.log").open("w") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        os.chdir(clone.folder)
        os.execve(sys.executable, [sys.executable, *words], clone.environment)
    _, status, used = os.wait4(number, 0)
    if status:
        raise SystemExit(f"{' '.join(words)}: {clone.said()}")
    return time.monotonic() - begun, used.ru_maxrss // 1024


def megabytes(place: Path) -> str:
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    return f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB"


def show(found: dict[str, dict[int, dict[str, Any]]]) -> None:
    for what, columns in found.items():
        table = Table(title=what)
        table.add_column("")
        for size in columns:
            table.add_column(f"{size:,}", justify="right")
        for row in next(iter(columns.values())):
            cells = [column[row] for column in columns.values()]
            table.add_row(row, *(f"{cell[0]:.2f} s, {cell[1]} MB" if isinstance(cell, tuple) else str(cell)
                                 for cell in cells))  # fmt: skip
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
