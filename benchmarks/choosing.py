"""Choosing by validation images: data sets, shots and seeds -> what was taken, beside zero-shot and the best by test.

    python benchmarks/choosing.py PATH ... [--shots 1 2 4 8 16] [--seeds 1 2 3] [--heads class_mean gda ...]

`behind` is what the choice lost against the head that would have been best on the test images, which nobody knows
before. A line says how often the choice fell below zero-shot.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from coop_core.params import DatasetParams, load_params
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
    arguments = parser.parse_args()
    settings, console = load_settings(), Console(width=110)
    base = load_params(paths.PARAMS)
    runner = TrialRunner(store_folder=settings.cache_folder / paths.FEATURE_STORE, device=str(choose_device(settings)))
    heads = [head for head in HEADS if not arguments.heads or head["name"] in arguments.heads]
    table = Table("data set", "shots", "taken, by seed", "its test", "zero-shot", "best by test", "behind")
    below = trials = 0
    for path in arguments.datasets:
        with tempfile.TemporaryDirectory() as place:
            dataset = bring_dataset(DatasetParams(source=str(path)), Path(place) / "raw", settings)
            for shots in arguments.shots:
                split = base.split.model_copy(update={"shots": shots, "curve_shots": [], "test_per_class": None})
                rows = []
                for seed in arguments.seeds:
                    params = base.model_copy(update={"split": split, "seed": seed})
                    found = choose(try_heads(params, dataset, runner, heads=heads))
                    untrained = next(one for one in found.candidates if one.method.name == "zero_shot")
                    best = max(found.candidates, key=lambda one: one.test_accuracy)
                    rows.append((found.taken, untrained.test_accuracy, best.test_accuracy))
                    below += found.taken.test_accuracy < untrained.test_accuracy
                    trials += 1
                own, untrained, best = (statistics.mean(its) for its in zip(
                    *((taken.test_accuracy, other, most) for taken, other, most in rows), strict=True))  # fmt: skip
                table.add_row(path.name, str(shots), " ".join(taken.name for taken, _, _ in rows), f"{100 * own:.1f}",
                              f"{100 * untrained:.1f}", f"{100 * best:.1f}", f"{100 * (best - own):.1f}")  # fmt: skip
    console.print(table)
    console.print(f"below zero-shot: {below} of {trials}")


if __name__ == "__main__":
    main()
