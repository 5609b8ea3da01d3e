"""Transfer over seeds: zero-shot and methods on base and new classes, and on images of another kind.

    python benchmarks/transfer.py PATH ...                     base-to-new, for each data set and over all of them
    python benchmarks/transfer.py PATH --onto OTHER            learned on all classes of PATH, judged on OTHER's images
    ... --methods coop guided gda prolip --seeds 1 2 3 --set split.shots=16 --json FILE

Base-to-new: 16 images of each base class (the first half), judged on test images of base and of new classes, each with
its own class names (Zhou et al., CVPR 2022, section 4.1). The papers average in two ways, and both are shown: H of the
mean accuracies, and the mean of each data set's H. Methods have the recipes of RECIPES.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from accuracy import changed
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from coop_core.data.dataset import Dataset
from coop_core.errors import CoopError
from coop_core.files import write_json
from coop_core.judging.transfer import harmonic_mean
from coop_core.params import DatasetParams, Params, parse_params
from coop_core.sweeps.trials import Scores, TrialRunner
from pipelines import paths
from pipelines.settings import choose_device, load_settings
from pipelines.sources.datasets import bring_dataset

RECIPES: dict[str, dict[str, Any]] = {
    "coop": {"method": {"name": "coop", "n_context": None, "initial_words": "a photo of a"},
             "train": {"epochs": 50, "batch_size": 32, "learning_rate": 0.02}},
    "cocoop": {"method": {"name": "cocoop"}, "train": {"epochs": 10, "batch_size": 1, "learning_rate": 0.002}},
    "guided": {"method": {"name": "coop", "n_context": None, "initial_words": "a photo of a", "guidance": 2.0,
                          "decoupled": 0.7}, "train": {"epochs": 50, "batch_size": 32, "learning_rate": 0.02}},
    "gda": {"method": {"name": "gda"}},
    "prolip": {"method": {"name": "prolip"}},
}  # fmt: skip
"""CoOp as in CoCoOp's comparison, from the words "a photo of a"; CoCoOp's own ten epochs at batch 1; CoOp again with
DePT's weights of guidance and head."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="+", help="cards, folders or CSVs")
    parser.add_argument("--onto", help="a data set to judge on instead of the new classes")
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=["coop", "cocoop"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="change a parameter")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = load_settings()
    runner = TrialRunner(store_folder=settings.cache_folder / paths.FEATURE_STORE, device=choose_device(settings))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        onto = None
        if arguments.onto:
            onto = bring_dataset(DatasetParams(source=arguments.onto), Path(folder) / "onto", settings)
        for number, source in enumerate(arguments.source):
            dataset = bring_dataset(DatasetParams(source=source), Path(folder) / str(number), settings)
            for method in arguments.methods:
                trials = [params_of(method, source, arguments, seed=seed) for seed in arguments.seeds]
                for seed, found in zip(
                    arguments.seeds, runner.run(trials, dataset, tests={"beyond": onto or dataset}), strict=True
                ):
                    rows += rows_of(dataset.name, method, seed, found)
            show(dataset.name, [row for row in rows if row["dataset"] == dataset.name], onto=onto)
    if not onto and len(arguments.source) > 1:
        show_averages(rows)
    if arguments.json:
        write_json(arguments.json, rows)


def params_of(method: str, source: str, arguments: Any, *, seed: int) -> Params:
    tree = changed(YAML(typ="safe").load(paths.PARAMS.read_text()), arguments.set)
    tree["seed"], tree["sweep"] = seed, None
    tree["split"] |= {"classes": "all" if arguments.onto else "base", "curve_shots": []}
    tree["method"], tree["train"] = RECIPES[method]["method"], tree["train"] | RECIPES[method].get("train", {})
    tree["tests"] = {"beyond": {"source": arguments.onto or source, "classes": "all" if arguments.onto else "new"}}
    return parse_params(tree, where="params.yaml with --set")


def rows_of(dataset: str, method: str, seed: int, found: Scores | CoopError) -> list[dict[str, Any]]:
    if isinstance(found, CoopError):
        raise found
    common, beyond = {"dataset": dataset, "seed": seed}, found.tests["beyond"]
    learned = {**common, "method": method, "own": found.accuracy, "beyond": beyond["learned"], "seconds": found.seconds}
    untrained = {**common, "method": "zero-shot", "own": found.zero_shot_accuracy, "beyond": beyond["zero_shot"]}
    return [learned, untrained]


def show(dataset: str, rows: list[dict[str, Any]], *, onto: Dataset | None) -> None:
    """Mean and sample standard deviation over seeds, in percent."""
    table = Table(title=f"{dataset}, percent of test images, mean and spread over seeds")
    for column in ("method", *(("its own", onto.name) if onto else ("base", "new", "H")), "seconds a training"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in _in_order(rows):
        its = [row for row in rows if row["method"] == method]
        cells = [shown([row[key] for row in its]) for key in ("own", "beyond")]
        means = [statistics.mean(row[key] for row in its) for key in ("own", "beyond")]
        if not onto:
            cells.append(f"{100 * harmonic_mean(*means):.1f}")
        seconds = [row["seconds"] for row in its if "seconds" in row]
        table.add_row(method, *cells, f"{statistics.mean(seconds):.0f}" if seconds else "-")
    Console().print(table)


def show_averages(rows: list[dict[str, Any]]) -> None:
    table = Table("method", "base", "new", "H of the means", "mean of the H", title="over all data sets, percent")
    for method in _in_order(rows):
        its = [row for row in rows if row["method"] == method]
        pairs = [
            [statistics.mean(row[key] for row in its if row["dataset"] == name) for key in ("own", "beyond")]
            for name in dict.fromkeys(row["dataset"] for row in its)
        ]
        base, new = (statistics.mean(column) for column in zip(*pairs, strict=True))
        mean_of_h = statistics.mean(harmonic_mean(*pair) for pair in pairs)
        table.add_row(method, *(f"{100 * value:.1f}" for value in (base, new, harmonic_mean(base, new), mean_of_h)))
    Console().print(table)


def _in_order(rows: list[dict[str, Any]]) -> list[str]:
    """Zero-shot, which every method's trials tell anew and alike, and the methods."""
    return ["zero-shot", *(name for name in RECIPES if any(row["method"] == name for row in rows))]


def shown(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
