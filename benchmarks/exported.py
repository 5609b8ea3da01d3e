"""Exported models against the product's own image tower: images a second from pixels to probabilities, in turns.

    python benchmarks/exported.py                                        mini, RN50 and ViT-B-32, batches of 1 and 32
    python benchmarks/exported.py --backbones mini --seconds 2 --repeats 5 --json FILE

Every backbone answers ten classes zero-shot, is exported as `coop export` does, and then takes the same batch again and
again: torch as `coop predict` runs it, ONNX Runtime, OpenVINO in float32 (what an export is checked in) and OpenVINO as
it chooses itself, which is bfloat16 where the processor has it. The last column is how far features are then off,
relative to their length. All backbones but `mini` have random weights. Decoding is not in it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_weights import random_backbone
from rich.console import Console
from rich.table import Table

from coop_core.answering import answerer
from coop_core.artifact import Artifact, read_artifact, write_artifact
from coop_core.backbone import Backbone, load_backbone
from coop_core.card import SCHEMA, backbone_facts
from coop_core.conversion import INPUT, onnx_runtime, openvino_runtime
from coop_core.exchange.exported import export_model
from coop_core.files import write_json
from coop_core.methods import Task, zero_shot
from pipelines.allocator import keep_freed_memory

NAMES = ("cat", "dog", "horse", "ship", "truck", "bird", "frog", "deer", "car", "plane")
WAYS = ("torch", "ONNX Runtime", "OpenVINO", "OpenVINO, its choice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["mini", "RN50", "ViT-B-32"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=1.0, help="a way and turn, at least")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    keep_freed_memory()
    rows = []
    for name in given.backbones:
        backbone = load_backbone(name, None) if name == "mini" else random_backbone(name, device="cpu")
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(backbone, Path(folder), given)
        show(rows)
    if given.json:
        write_json(given.json, rows)


def measure(backbone: Backbone, folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    from pipeline import paint

    paint(folder, 4)
    artifact = zero_shot_of(backbone, folder / "prompt")
    begin = time.perf_counter()
    found = export_model(artifact, backbone, folder / "model", images=sorted(folder.glob("*.jpg")))
    seconds = time.perf_counter() - begin
    ways = ways_of(artifact, backbone, folder / "model")
    rows = []
    for batch in given.batches:
        pixels = np.random.default_rng(0).standard_normal((batch, 3, *2 * (backbone.transform.size,)), np.float32)
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        for way in WAYS:
            ways[way](pixels)                                                     # makes its plans for this shape
        for turn in range(given.repeats):
            for way in WAYS[:: 1 if turn % 2 else -1]:
                rates[way].append(rate(ways[way], pixels, given.seconds))
        rows.append({
            "backbone": backbone.architecture, "batch": batch, "export seconds": seconds, "files": found.files,
            "differences": found.differences, "rates": rates,
            "median": {way: statistics.median(its) for way, its in rates.items()},
            "ratio": {way: statistics.median(b / a for a, b in zip(rates["torch"], its, strict=True))
                      for way, its in rates.items()},
            "off by": {way: off(ways[way](pixels)["features"], ways["torch"](pixels)["features"]) for way in WAYS},
        })  # fmt: skip
    return rows


def zero_shot_of(backbone: Backbone, folder: Path) -> Artifact:
    params = zero_shot.Params()
    learner = zero_shot.build(params, backbone=backbone, task=Task(NAMES, "a photo of a {}."))
    card = {"schema": SCHEMA, "method": params.model_dump(), "backbone": backbone_facts(backbone),
            "class_names": list(NAMES), "data": {}}  # fmt: skip
    write_artifact(folder, learner, card)
    return read_artifact(folder)


def ways_of(artifact: Artifact, backbone: Backbone, folder: Path) -> dict[str, Callable[[np.ndarray], Any]]:
    import openvino

    own = answerer(artifact, backbone=backbone)
    chosen = openvino.Core().compile_model(folder / "model.xml", "CPU")

    def by_torch(pixels: np.ndarray) -> dict[str, np.ndarray]:
        features = backbone.encode_images(torch.from_numpy(pixels))
        return {"probabilities": own.probabilities(features).numpy(), "features": features.numpy()}

    def by_choice(pixels: np.ndarray) -> dict[str, np.ndarray]:
        found = chosen({INPUT: pixels})
        return {output.any_name: np.array(found[output]) for output in chosen.outputs}

    its = (by_torch, onnx_runtime(folder / "model.onnx"), openvino_runtime(folder / "model.xml"), by_choice)
    return dict(zip(WAYS, its, strict=True))


def rate(way: Callable[[np.ndarray], Any], pixels: np.ndarray, seconds: float) -> float:
    """Images a second."""
    count, begin = 0, time.perf_counter()
    while count < 2 * len(pixels) or time.perf_counter() - begin < seconds:
        way(pixels)
        count += len(pixels)
    return count / (time.perf_counter() - begin)


def off(found: np.ndarray, own: np.ndarray) -> float:
    return float(np.linalg.norm(found - own) / np.linalg.norm(own))


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("backbone", "batch", *(f"{way}, images/s" for way in WAYS), "its choice is off by", "export")
    for row in rows:
        cells = [f"{row['median'][way]:.1f} ({row['ratio'][way]:.2f})" for way in WAYS]
        size = row["files"]["model.onnx"] / 1e6
        table.add_row(row["backbone"], str(row["batch"]), *cells, f"{row['off by'][WAYS[-1]]:.1e}",
                      f"{row['export seconds']:.0f} s, {size:.1f} MB")  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
