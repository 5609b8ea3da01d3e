"""Accuracy over seeds: a data set and params.yaml -> zero-shot, ensemble, linear probe and CoOp on the same images.

    python benchmarks/accuracy.py                                  the data set and parameters of params.yaml
    python benchmarks/accuracy.py PATH ... --seeds 1 2 3 --set train.epochs=100 --json FILE
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from coop_core.answering import answer_with
from coop_core.backbone import Backbone
from coop_core.data.dataset import Dataset
from coop_core.data.split import few_shot_split
from coop_core.features.examples import CachedFeatures
from coop_core.features.extract import extract_features
from coop_core.files import read_array, write_json
from coop_core.judging import baselines
from coop_core.judging.evaluation import evaluate
from coop_core.params import Params, parse_params
from coop_core.preparing import prepare
from coop_core.training import fit
from pipelines import paths
from pipelines.settings import choose_device, load_settings
from pipelines.sources.datasets import bring_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="*", help="card, folder or CSV; default is params.yaml's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="change a parameter")
    parser.add_argument("--json", type=Path, help="write one object a source, seed and classifier")
    arguments = parser.parse_args()
    tree = changed(YAML(typ="safe").load(paths.PARAMS.read_text()), arguments.set)
    params = parse_params(tree, where="params.yaml with --set")
    settings = load_settings()
    backbone = params.backbone.load(device=choose_device(settings))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, source in enumerate(arguments.source or [params.dataset.source]):
            named = params.dataset.model_copy(update={"source": source})
            dataset = bring_dataset(named, Path(folder) / str(number), settings)
            for seed in arguments.seeds:
                found = run(dataset, params, backbone, seed, store=settings.cache_folder / paths.FEATURE_STORE)
                rows += [{"dataset": dataset.name, "seed": seed, **row} for row in found]
            show(dataset.name, [row for row in rows if row["dataset"] == dataset.name])
    if arguments.json:
        write_json(arguments.json, rows)


def changed(tree: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    for change in changes:
        keys, _, value = change.partition("=")
        *sections, key = keys.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[key] = YAML(typ="safe").load(value)
    return tree


def run(dataset: Dataset, params: Params, backbone: Backbone, seed: int, *, store: Path) -> list[dict[str, Any]]:
    split = few_shot_split(
        dataset, shots=params.split.shots, seed=seed, classes=params.split.classes,
        test_per_class=params.split.test_per_class,
    )  # fmt: skip
    features, labels = {}, {}
    for subset, views in (("train", params.features.views), ("val", 1), ("test", 1)):
        images = getattr(split, subset)
        target = dataset.root / f"features-{subset}.npy"
        extract_features(backbone, images, root=dataset.root, target=target, store_folder=store, views=views, seed=seed)
        features[subset] = np.array(read_array(target))
        labels[subset] = np.array([image.label for image in images])
    classifiers = {
        "zero-shot": baselines.zero_shot(backbone, split.class_names, split.template),
        "prompt ensemble": baselines.prompt_ensemble(
            backbone, split.class_names, params.baselines.ensemble_templates, own_template=split.template
        ),
        "linear probe": baselines.linear_probe(
            features["train"][:, 0], labels["train"], features["val"][:, 0], labels["val"],
            steps=params.baselines.linear_probe_steps,
        ).classifier,
    }  # fmt: skip
    test = torch.from_numpy(features["test"][:, 0])
    found = {name: classifier.probabilities(test).numpy() for name, classifier in classifiers.items()}  # (n, c)
    examples, validation = (
        CachedFeatures(torch.from_numpy(features[subset]).to(backbone.device),
                       torch.from_numpy(labels[subset]).to(backbone.device))
        for subset in ("train", "val")
    )  # fmt: skip
    params = params.model_copy(update={"seed": seed})
    training = prepare(params, split=split, backbone=backbone, examples=examples, validation=validation)
    curve = fit(training)
    answers = answer_with(training.learner, class_names=split.class_names)
    found[params.method.name] = answers.probabilities(test.to(backbone.device)).cpu().numpy()
    rows = []
    for name, probabilities in found.items():
        judged = evaluate(
            probabilities, labels["test"], split.class_names, calibration_bins=params.evaluate.calibration_bins
        )
        val_accuracy = curve[-1].val_accuracy if name == params.method.name else None
        rows.append({"classifier": name, "accuracy": judged.accuracy, "calibration_error": judged.calibration_error,
                     "val_accuracy": val_accuracy})  # fmt: skip
    return rows


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """Mean and sample standard deviation over seeds."""
    seeds = sorted({row["seed"] for row in rows})
    table = Table(title=f"{name}, top-1 on the test images, seeds {seeds}")
    table.add_column("classifier")
    for column in (*(f"seed {seed}" for seed in seeds), "mean", "spread", "against zero-shot", "mean ECE"):
        table.add_column(column, justify="right")
    by_name: dict[str, list[float]] = {}
    calibration: dict[str, list[float]] = {}
    for row in rows:
        by_name.setdefault(row["classifier"], []).append(row["accuracy"])
        calibration.setdefault(row["classifier"], []).append(row["calibration_error"])
    reference = statistics.mean(by_name["zero-shot"])
    for classifier, values in by_name.items():
        mean = statistics.mean(values)
        spread = f"{statistics.stdev(values):.3f}" if len(values) > 1 else "-"
        error = statistics.mean(calibration[classifier])
        table.add_row(
            classifier, *(f"{v:.3f}" for v in values), f"{mean:.3f}", spread, f"{mean - reference:+.3f}", f"{error:.3f}"
        )
    Console().print(table)
    val = [row["val_accuracy"] for row in rows if row["val_accuracy"] is not None]
    Console().print(f"validation accuracy of the learned prompt: {statistics.mean(val):.3f}")


if __name__ == "__main__":
    main()
