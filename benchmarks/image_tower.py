"""The image tower from files: as it was, with freed memory kept, with batch norm folded as well, and by OpenVINO.

    python benchmarks/image_tower.py                                                a quarter of an hour on 2 cores
    python benchmarks/image_tower.py --backbones mini --precisions float32 --images 128 --repeats 5 --json FILE

Four processes, one a way, because the allocator is a process's own; three where openvino is not installed. Each takes
JPEG files that the script paints through `extract_features` into an empty store. They take turns, the others asleep
meanwhile, and the median of the pairs' ratios is what a machine whose speed changes by the minute can tell. Decoding
alone, on all cores, is the rate that no tower can exceed. All backbones but `mini` have random weights.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

WAYS = ("as it was", "memory kept", "and folded", "by openvino")


class Worker:
    """A process of one way."""

    def __init__(self, way: str, folder: Path, images: int) -> None:
        self.way = way
        words = [sys.executable, __file__, "--work", way, str(folder), str(images)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **order: Any) -> Any:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["mini", "RN50", "ViT-B-32"])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        return work(*given.work)
    from pipeline import paint

    from coop_core.backbone import is_installed
    from coop_core.files import write_json

    rows = []
    with tempfile.TemporaryDirectory() as name:
        paint(Path(name), given.images)
        ways = WAYS if is_installed("openvino") else WAYS[:-1]
        workers = [Worker(way, Path(name), given.images) for way in ways]
        for backbone in given.backbones:
            for precision in given.precisions:
                rows.append(compare(workers, backbone, precision, given.repeats, given.images))
                show(rows[-1:])
    show(rows)
    if given.json:
        write_json(given.json, rows)
    return None


def compare(workers: list[Worker], backbone: str, precision: str, repeats: int, images: int) -> dict[str, Any]:
    for worker in workers:
        folded = worker.ask(load=backbone, precision=precision)["folded"]
    rates: dict[str, list[float]] = {worker.way: [] for worker in workers}
    decoding, digests = [], {}
    for number in range(repeats):
        for worker in workers[:: 1 if number % 2 else -1]:
            seconds, digests[worker.way] = worker.ask(run=True)
            rates[worker.way].append(images / seconds)
        decoding.append(images / workers[0].ask(decode=True))
    first = rates[WAYS[0]]
    return {
        "backbone": backbone, "precision": precision, "folded": folded, "rates": rates,
        "median": {way: statistics.median(found) for way, found in rates.items()},
        "ratio": {way: statistics.median(b / a for a, b in zip(first, found, strict=True))
                  for way, found in rates.items()},
        "decoding": statistics.median(decoding),
        "memory kept gives the same bytes": digests[WAYS[0]] == digests[WAYS[1]],
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    ways = list(rows[0]["median"])
    table = Table("backbone", "precision", *(f"{way}, images/s" for way in ways), "decoding alone", "the same bytes")
    for row in rows:
        cells = [f"{row['median'][way]:.1f} ({row['ratio'][way]:.2f})" for way in ways]
        if not row["folded"]:
            cells[2] = "nothing to fold"
        same = "yes" if row["memory kept gives the same bytes"] else "NO"
        table.add_row(row["backbone"], row["precision"], *cells, f"{row['decoding']:.0f}", same)
    Console(width=140).print(table)


def work(way: str, folder: str, images: str) -> None:
    """One way, by orders from standard input."""
    from pipelines.allocator import keep_freed_memory

    if way != WAYS[0]:
        keep_freed_memory()
    from random_weights import random_backbone

    from coop_core.backbone import load_backbone, mini, open_clip_models
    from coop_core.data.split import SplitImage
    from coop_core.features.extract import extract_features

    if way in WAYS[:2]:
        for module in (mini, open_clip_models):
            module.fold_batch_norms = lambda *arguments, **options: 0
    found = [Path(folder) / f"{number}.jpg" for number in range(int(images))]
    split = [SplitImage(path.name, 0, hashlib.sha256(path.read_bytes()).hexdigest()) for path in found]
    backbone: Any = None

    def run() -> tuple[float, str]:
        with tempfile.TemporaryDirectory() as made:
            target, begin = Path(made) / "features.npy", time.perf_counter()
            extract_features(backbone, split, root=Path(folder), target=target, store_folder=Path(made) / "store",
                             batch_size=32)  # fmt: skip
            return time.perf_counter() - begin, hashlib.sha256(target.read_bytes()).hexdigest()

    for line in sys.stdin:
        order = json.loads(line)
        said: Any
        if "load" in order:
            runtime = "openvino" if way == WAYS[3] else "torch"
            options = {"image_precision": order["precision"], "image_runtime": runtime, "device": "cpu"}
            name = order["load"]
            backbone = load_backbone(name, None, **options) if name == "mini" else random_backbone(name, **options)
            _ = backbone.weights_digest
            run()                                                                 # the first pass makes its plans
            said = {"folded": backbone.folded}
        elif "decode" in order:
            said = decode(backbone, found)
        else:
            said = run()
        print(json.dumps(said), flush=True)


def decode(backbone: Any, files: list[Path]) -> float:
    from coop_core.data.images import read_image

    begin = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda path: backbone.transform.test_view(read_image(path)), files))
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
