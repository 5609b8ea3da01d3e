"""The image tower alone, on pixels in memory, by torch and by OpenVINO, in float32 and in bfloat16, in turns.

    python benchmarks/image_runtimes.py                                                  two minutes on 2 cores
    python benchmarks/image_runtimes.py --backbones mini --batch-size 32 --repeats 9 --json FILE

One process that keeps freed memory, batch norm folded; the median of the turns counts. The difference is that of the
features to torch's in float32, relative to their length. All backbones but `mini` have random weights.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from random_weights import random_backbone
from rich.console import Console
from rich.table import Table

from coop_core.backbone import Backbone, load_backbone
from coop_core.files import write_json
from pipelines.allocator import keep_freed_memory

WAYS = [(runtime, precision) for precision in ("float32", "bfloat16") for runtime in ("torch", "openvino")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["mini", "RN50", "ViT-B-32"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    keep_freed_memory()
    rows = []
    for name in given.backbones:
        rows += compare(name, given.batch_size, given.repeats)
        show(rows)
    if given.json:
        write_json(given.json, rows)


def compare(name: str, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    seconds = {}
    backbones = {}
    for way in WAYS:
        begin = time.perf_counter()
        backbones[way] = load(name, *way)
        seconds[way] = time.perf_counter() - begin
    size = backbones[WAYS[0]].transform.size
    pixels = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))
    features = {way: backbone.encode_images(pixels) for way, backbone in backbones.items()}
    rates: dict[Any, list[float]] = {way: [] for way in WAYS}
    for number in range(repeats):
        for way in WAYS[:: 1 if number % 2 else -1]:
            begin = time.perf_counter()
            backbones[way].encode_images(pixels)
            rates[way].append(batch_size / (time.perf_counter() - begin))
    own, median = features[WAYS[0]], {way: statistics.median(rates[way]) for way in WAYS}
    return [
        {"backbone": name, "runtime": way[0], "precision": way[1], "rates": rates[way], "load": seconds[way],
         "median": median[way], "ratio": median[way] / median["torch", way[1]],
         "difference": ((features[way] - own).norm() / own.norm()).item()}
        for way in WAYS
    ]  # fmt: skip


def load(name: str, runtime: Any, precision: Any) -> Backbone:
    options: Any = {"image_precision": precision, "image_runtime": runtime, "device": "cpu"}
    return load_backbone(name, None, **options) if name == "mini" else random_backbone(name, **options)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("backbone", "precision", "runtime", "images/s", "to torch", "difference", "load, s")
    for row in rows:
        table.add_row(row["backbone"], row["precision"], row["runtime"], f"{row['median']:.1f}", f"{row['ratio']:.2f}",
                      f"{row['difference']:.0e}", f"{row['load']:.1f}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
