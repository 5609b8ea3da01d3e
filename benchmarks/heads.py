"""Heads over shots and seeds: data sets -> accuracy and seconds of every head that learns from cached features.

    python benchmarks/heads.py PATH ... --set features.views=8 split.test_per_class=null
    ... --shots 1 2 4 8 16 --seeds 1 2 3 --heads GDA CLAP --json FILE

What FILE holds already is not trained again, so that a long table can be made in pieces. Features are computed before
anything is timed. Every number of shots has a split of its own, whose validation images (at most 4 a class, at most the
shots) are all that a head may choose by; test images are the same for all.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from accuracy import changed
from methods import features, over_seeds
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from coop_core.answering import answer_with
from coop_core.backbone import Backbone
from coop_core.data.dataset import Dataset
from coop_core.data.split import few_shot_split
from coop_core.features.examples import CachedFeatures
from coop_core.files import read_json, write_json
from coop_core.judging.baselines import zero_shot
from coop_core.params import DatasetParams, Params, parse_params
from coop_core.preparing import prepare
from coop_core.training import fit
from pipelines import paths
from pipelines.settings import choose_device, load_settings
from pipelines.sources.datasets import bring_dataset

HEADS: dict[str, dict[str, Any]] = {
    "linear probe": {"name": "linear_probe"},
    "class mean": {"name": "class_mean"},
    "GDA": {"name": "gda"},
    "ZS-LP": {"name": "probe", "penalty": "none"},
    "CLAP": {"name": "probe"},
    "Tip-Adapter": {"name": "tip_adapter"},
    "Tip-Adapter-F": {"name": "tip_adapter", "fine_tune": True},
    "ProLIP": {"name": "prolip"},
    "CoOp": {"name": "coop", "n_context": 16},
}
"""Heads by name, with their published recipes; CoOp's is params.yaml's."""
TEXT_INFORMED = ("GDA", "ZS-LP", "CLAP", "Tip-Adapter", "Tip-Adapter-F", "ProLIP")
RIVALS = ("CoOp", "linear probe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="+", help="cards, folders or CSVs")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="change a parameter")
    parser.add_argument("--json", type=Path, help="found there, and kept there")
    options = parser.parse_args()
    settings = load_settings()
    tree = changed(YAML(typ="safe").load(paths.PARAMS.read_text()), options.set)
    backbone = parse_params(tree, where="params.yaml with --set").backbone.load(device=choose_device(settings))
    found: list[dict[str, Any]] = read_json(options.json) if options.json and options.json.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for number, source in enumerate(options.source):
            dataset = bring_dataset(DatasetParams(source=source), Path(folder) / str(number), settings)
            for seed in options.seeds:
                for shots in options.shots:
                    own = tree | {"seed": seed, "sweep": None, "tests": {}}
                    own["split"] = tree["split"] | {"shots": shots, "curve_shots": []}
                    cell = {"dataset": dataset.name, "seed": seed, "shots": shots}
                    known = {row["head"] for row in found if cell.items() <= row.items()}
                    if heads := [head for head in options.heads if head not in known]:
                        rows = judged(own, heads, dataset, backbone, settings.cache_folder / paths.FEATURE_STORE)
                        found += [{**cell, **row} for row in rows if row["head"] not in known]
                        if options.json:
                            write_json(options.json, found)
            show(dataset.name, [row for row in found if row["dataset"] == dataset.name])


def judged(
    tree: dict[str, Any], heads: list[str], dataset: Dataset, backbone: Backbone, store: Path
) -> list[dict[str, Any]]:
    params = parse_params(tree, where="params.yaml with --set")
    split = few_shot_split(
        dataset, shots=params.split.shots, seed=params.seed, test_per_class=params.split.test_per_class
    )
    read = {unprojected: [
        CachedFeatures.of(images, features(backbone, dataset, images, params, store, views=views,
                                           unprojected=unprojected), device=backbone.device)
        for images, views in ((split.train, params.features.views), (split.val, 1), (split.test, 1))
    ] for unprojected in {False, backbone.projection is not None}}  # fmt: skip

    def accuracy(answers: Any, test: CachedFeatures) -> float:
        return float((answers.probabilities(test.features[:, 0]).argmax(1) == test.labels).float().mean())

    untrained = zero_shot(backbone, split.class_names, split.template)
    rows = [{"head": "zero-shot", "accuracy": accuracy(untrained, read[False][2])}]
    for head in heads:
        own: Params = parse_params({**tree, "method": HEADS[head]}, where="params.yaml with --set")
        train, val, test = read[own.method.reads == "unprojected" and backbone.projection is not None]
        started = time.perf_counter()
        training = prepare(own, split=split, backbone=backbone, examples=train, validation=val)
        fit(training)
        seconds = time.perf_counter() - started
        answers = answer_with(training.learner, class_names=split.class_names)
        rows.append({"head": head, "accuracy": accuracy(answers, test), "seconds": seconds})
    return rows


def show(dataset: str, rows: list[dict[str, Any]]) -> None:
    """Mean and sample standard deviation over seeds, in percent, and seconds; then what is best where."""
    shots = sorted({row["shots"] for row in rows})
    cells: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["head"]][row["shots"]].append(row)
    table = Table(title=f"{dataset}, percent of test images, (seconds a training)")
    table.add_column("head")
    for number in shots:
        table.add_column(f"{number} shots", justify="right")
    for head, by_shots in cells.items():
        table.add_row(head, *(_cell(by_shots[number]) for number in shots))
    Console(width=150).print(table)
    for number in shots:
        mean = {head: statistics.mean(row["accuracy"] for row in its[number]) for head, its in cells.items()}
        _compare(number, mean)


def _cell(rows: list[dict[str, Any]]) -> str:
    seconds = [row["seconds"] for row in rows if "seconds" in row]
    shown = over_seeds([row["accuracy"] for row in rows])
    return f"{shown} ({statistics.mean(seconds):.2g})" if seconds else shown


def _compare(shots: int, mean: dict[str, float]) -> None:
    """The best head against the better of CoOp and the linear probe; the best text-informed one against the latter."""
    heads = [name for name in mean if name not in ("zero-shot", *RIVALS)]
    informed = [name for name in heads if name in TEXT_INFORMED]
    if not informed or not mean.keys() >= set(RIVALS):
        return
    best, rival, texts = (max(names, key=mean.__getitem__) for names in (heads, RIVALS, informed))
    Console(width=150).print(
        f"{shots} shots: best head {best}, {100 * (mean[best] - mean[rival]):+.1f} points against {rival}; best "
        f"text-informed head {texts}, {100 * (mean[texts] - mean['linear probe']):+.1f} points against the linear probe"
    )


if __name__ == "__main__":
    main()
