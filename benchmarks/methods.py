"""Methods over seeds: data sets -> accuracy of zero-shot, prompt ensemble and every method that is named.

    python benchmarks/methods.py PATH ... --methods coop upl                             upl learns as if unlabelled
    python benchmarks/methods.py PATH --methods coop cocoop linear_probe --noise 0 0.1 0.2 0.4
    python benchmarks/methods.py PATH --methods coop biomedcoop --descriptions FILE
    ... --seeds 1 2 3 --set split.shots=16 --json FILE

The same test images for all; every seed chooses training images, first context and batches. What a method differs in
from params.yaml stands in RECIPES. `upl` has all training images as a pool without labels.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import changed
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from coop_core.answering import answer_with
from coop_core.backbone import Backbone
from coop_core.data.dataset import Dataset
from coop_core.data.descriptions import check_descriptions, read_descriptions
from coop_core.data.split import few_shot_split, located
from coop_core.features.examples import CachedFeatures
from coop_core.features.extract import extract_features
from coop_core.files import read_array, write_json
from coop_core.judging import baselines
from coop_core.judging.pseudo_labels import answer_pool, label_pool, training_examples
from coop_core.params import DatasetParams, Params, parse_params
from coop_core.preparing import prepare
from coop_core.training import fit
from pipelines import paths
from pipelines.settings import choose_device, load_settings
from pipelines.sources.datasets import bring_dataset

RECIPES: dict[str, dict[str, Any]] = {
    "coop": {"method": {"name": "coop", "n_context": 16}, "train": {"epochs": 100}},
    "cocoop": {"method": {"name": "cocoop"}, "train": {"epochs": 10, "batch_size": 1, "learning_rate": 0.002}},
    "upl": {"method": {"name": "upl"}, "train": {"epochs": 50}, "split": {"unlabelled": "all"}},
    "biomedcoop": {"method": {"name": "biomedcoop"}, "train": {"epochs": 100, "batch_size": 4}},
    "linear_probe": {"method": {"name": "linear_probe"}},
    "class_mean": {"method": {"name": "class_mean"}},
}  # fmt: skip
"""Epochs, batches and context of the papers; the learning rate of params.yaml where the paper's is CLIP's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="+", help="cards, folders or CSVs")
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=["coop"])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0], help="shares of wrong training labels")
    parser.add_argument("--descriptions", type=Path, help="JSON with sentences a class, for one data set")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="change a parameter")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = load_settings()
    tree = changed(YAML(typ="safe").load(paths.PARAMS.read_text()), options.set)
    backbone = parse_params(tree, where="params.yaml with --set").backbone.load(device=choose_device(settings))
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, source in enumerate(options.source):
            dataset = bring_dataset(DatasetParams(source=source), Path(folder) / str(number), settings)
            if options.descriptions:
                content = read_descriptions(options.descriptions)
                described = check_descriptions(content, dataset.class_names, where=str(options.descriptions))
                dataset = dataclasses.replace(dataset, descriptions=described)
            for noise in options.noise:
                for seed in options.seeds:
                    for method in options.methods:
                        params = params_of(tree, method, seed=seed, noise=noise)
                        rows = judged(params, dataset, backbone, settings.cache_folder / paths.FEATURE_STORE)
                        found += [{"dataset": dataset.name, "noise": noise, "seed": seed, **row} for row in rows]
                show(dataset.name, noise, [r for r in found if (r["dataset"], r["noise"]) == (dataset.name, noise)])
    if options.json:
        write_json(options.json, found)


def params_of(tree: dict[str, Any], method: str, *, seed: int, noise: float) -> Params:
    recipe = RECIPES[method]
    own: dict[str, Any] = {**tree, "seed": seed, "sweep": None, "tests": {}}
    own["method"] = recipe["method"]
    own["train"] = tree["train"] | recipe.get("train", {})
    own["split"] = tree["split"] | {"curve_shots": []} | recipe.get("split", {"label_noise": noise})
    return parse_params(own, where="params.yaml with --set")


def judged(params: Params, dataset: Dataset, backbone: Backbone, store: Path) -> list[dict[str, Any]]:
    split = few_shot_split(
        dataset, shots=params.split.shots, seed=params.seed, test_per_class=params.split.test_per_class,
        label_noise=params.split.label_noise, unlabelled=params.split.unlabelled,
    )  # fmt: skip
    train = features(backbone, dataset, located(split.train, dataset), params, store, views=params.features.views)
    test = features(backbone, dataset, split.test, params, store)
    labels = None
    if split.is_unlabelled:
        answers = answer_pool(split, torch.from_numpy(np.array(train[:, 0])).to(backbone.device), backbone)
        labels = label_pool(split, [answers], per_class=split.shots)
    examples = training_examples(split, train, labels, shots=split.shots, device=backbone.device)
    started = time.perf_counter()
    training = prepare(params, split=split, backbone=backbone, examples=examples,
                       validation=CachedFeatures.of((), train[:0], device=backbone.device))  # fmt: skip
    fit(training)
    seconds = time.perf_counter() - started
    wanted = np.array([image.label for image in split.test])
    images = torch.from_numpy(np.array(test[:, 0])).to(backbone.device)

    def accuracy(answers: Any) -> float:
        return float((answers.probabilities(images).argmax(1).cpu().numpy() == wanted).mean())

    ensemble = baselines.prompt_ensemble(backbone, split.class_names, params.baselines.ensemble_templates,
                                         own_template=split.template)  # fmt: skip
    rows = [
        {"method": "zero-shot", "accuracy": accuracy(baselines.zero_shot(backbone, split.class_names, split.template))},
        {"method": "prompt ensemble", "accuracy": accuracy(ensemble)},
        {"method": params.method.name, "seconds": seconds,
         "accuracy": accuracy(answer_with(training.learner, class_names=split.class_names))},
    ]  # fmt: skip
    if labels is not None:
        chosen, truth = labels.chosen, {image.digest: image.label for image in dataset.images}
        right = [truth[split.train[row].digest] == label for row, label in zip(chosen.rows, chosen.labels, strict=True)]
        rows[-1] |= {"images": len(right), "right": float(np.mean(right))}
    return rows


def features(
    backbone: Backbone, dataset: Dataset, images: Any, params: Params, store: Path, *, views: int = 1,
    unprojected: bool = False,
) -> np.ndarray:  # fmt: skip
    """(n, views, d), or what comes before the tower's last linear map (n, views, p)"""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "features.npy"
        extract_features(backbone, images, root=dataset.root, target=target, store_folder=store, views=views,
                         seed=params.seed, unprojected=unprojected)  # fmt: skip
        return np.array(read_array(target))


def show(dataset: str, noise: float, rows: list[dict[str, Any]]) -> None:
    """Mean and sample standard deviation over seeds, in percent."""
    title = f"{dataset}, percent of test images" + (f", {noise:.0%} of the training labels wrong" if noise else "")
    table = Table(title=title)
    for column in ("method", "accuracy", "learned from", "labels right", "seconds a training"):
        table.add_column(column, justify="left" if column == "method" else "right")
    by_method = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append(row)
    for method, its in by_method.items():
        table.add_row(
            method, over_seeds([r["accuracy"] for r in its]),
            f"{statistics.mean(r['images'] for r in its):.0f}" if "images" in its[0] else "-",
            over_seeds([r["right"] for r in its]) if "right" in its[0] else "-",
            f"{statistics.mean(r['seconds'] for r in its):.0f}" if "seconds" in its[0] else "-",
        )  # fmt: skip
    Console().print(table)


def over_seeds(values: list[float]) -> str:
    distinct = values if len(set(values)) > 1 else values[:1]
    spread = f" ± {100 * statistics.stdev(distinct):.1f}" if len(distinct) > 1 else ""
    return f"{100 * statistics.mean(distinct):.1f}{spread}"


if __name__ == "__main__":
    main()
