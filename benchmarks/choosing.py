"""Choosing by validation images: data sets, shots and seeds -> what was taken, beside zero-shot and the best by test.

    python benchmarks/choosing.py PATH ... [--shots 1 2 4 8 16] [--seeds 1 2 3] [--heads class_mean ...] [--json FILE]

What FILE holds already is not tried again, so that a long table can be made in pieces. `behind` is what the choice lost
against the head that would have been best on the test images, which nobody knows before. A line names every choice that
fell below zero-shot.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from coop_core.data.dataset import Dataset
from coop_core.files import read_json, write_json
from coop_core.params import DatasetParams, Params, load_params
from coop_core.sweeps.choosing import HEADS, choose, try_heads
from coop_core.sweeps.trials import TrialRunner
from pipelines import paths
from pipelines.settings import choose_device, load_settings
from pipelines.sources.datasets import bring_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", type=Path, help="folders of class folders, or dataset cards")
    parser.add_argument("--shots", nargs="*", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--heads", nargs="*", default=[])
    parser.add_argument("--json", type=Path, help="found there, and kept there")
    arguments = parser.parse_args()
    settings, base = load_settings(), load_params(paths.PARAMS)
    runner = TrialRunner(store_folder=settings.cache_folder / paths.FEATURE_STORE, device=str(choose_device(settings)))
    heads = [head for head in HEADS if not arguments.heads or head["name"] in arguments.heads]
    known = read_json(arguments.json) if arguments.json and arguments.json.exists() else []
    asked = [(path, shots, seed) for path in arguments.datasets for shots in arguments.shots
             for seed in arguments.seeds]  # fmt: skip
    for path in arguments.datasets:
        with tempfile.TemporaryDirectory() as place:
            dataset = bring_dataset(DatasetParams(source=str(path)), Path(place) / "raw", settings)
            for _, shots, seed in (one for one in asked if one[0] == path):
                if not any(cell_of(row) == (path.stem, shots, seed) for row in known):
                    split = base.split.model_copy(update={"shots": shots, "curve_shots": [], "test_per_class": None})
                    params = base.model_copy(update={"split": split, "seed": seed})
                    known.append({"dataset": path.stem, **tried(params, dataset, runner, heads)})
                    if arguments.json:
                        write_json(arguments.json, known)
    show([row for row in known if cell_of(row) in {(path.stem, shots, seed) for path, shots, seed in asked}])


def cell_of(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["dataset"], row["shots"], row["seed"]


def tried(params: Params, dataset: Dataset, runner: TrialRunner, heads: list[dict[str, Any]]) -> dict[str, Any]:
    """What was taken, and what every head would have answered."""
    found = choose(try_heads(params, dataset, runner, heads=heads))
    return {
        "shots": params.split.shots, "seed": params.seed, "taken": found.taken.name, "images": found.images,
        "val": {one.name: one.accuracy for one in found.candidates},
        "test": {one.name: one.test_accuracy for one in found.candidates},
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("data set", "shots", "taken, by seed", "its test", "zero-shot", "best by test", "behind")
    for name, shots in dict.fromkeys((row["dataset"], row["shots"]) for row in rows):
        its = [row for row in rows if (row["dataset"], row["shots"]) == (name, shots)]
        own, untrained, best = (statistics.mean(figure(row) for row in its) for figure in (
            lambda row: row["test"][row["taken"]], lambda row: row["test"]["zero_shot"],
            lambda row: max(row["test"].values())))  # fmt: skip
        table.add_row(name, str(shots), " ".join(row["taken"] for row in its), f"{100 * own:.1f}",
                      f"{100 * untrained:.1f}", f"{100 * best:.1f}", f"{100 * (best - own):.1f}")  # fmt: skip
    console = Console(width=110)
    console.print(table)
    below = [row for row in rows if row["test"][row["taken"]] < row["test"]["zero_shot"]]
    console.print(f"below zero-shot: {len(below)} of {len(rows)}", *(
        f"{row['dataset']}, {row['shots']} shots, seed {row['seed']}: {row['taken']} {row['test'][row['taken']]:.3f} "
        f"against {row['test']['zero_shot']:.3f}" for row in below), sep="\n")  # fmt: skip


if __name__ == "__main__":
    main()
