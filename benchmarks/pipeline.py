"""The pipeline around the model: image files -> features a second, and what the commands cost when nothing is new.

    python benchmarks/pipeline.py                                   mini, 512 images, this machine's device
    python benchmarks/pipeline.py --backbone ViT-B-32 --images 128 --repeats 3 --memory --json FILE

Throughput: the bare model on pixels in memory, against extract_features from JPEG files into an empty store, with the
same batch size, in turns. The script paints the files (smooth noise, 256 to 500 pixels a side, some 0.3 bytes a pixel,
as photographs have). Decoding alone on all cores tells which of the two bounds the whole. On a CPU both want the same
cores, so the most that is possible there is 1 / (1 + bare / decoding); beside a GPU it is min(1, decoding / bare).
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from random_weights import random_backbone
from rich.console import Console
from rich.table import Table
from torch import Tensor

from coop_core.backbone import Backbone, load_backbone
from coop_core.data.images import read_image
from coop_core.data.split import SplitImage
from coop_core.features.extract import extract_features
from coop_core.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = Path(sys.executable).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="mini", help="mini, or an open_clip name with random weights")
    parser.add_argument("--image-precision", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", action="store_true", help="also the peak memory at N and 2 N images")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        return measure_peak(arguments)
    with tempfile.TemporaryDirectory() as folder:
        images = paint(Path(folder), arguments.images * (2 if arguments.memory else 1))
        found: dict[str, Any] = {"throughput": throughput(images[: arguments.images], Path(folder), arguments)}
        if arguments.memory:
            counts = (arguments.images, 2 * arguments.images)
            found["memory"] = {count: peak(count, Path(folder), arguments) for count in counts}
    found["commands"] = {"dvc repro, nothing to do": idle_repro(), "coop --help": timed_command("coop", "--help")}
    show(found)
    if arguments.json:
        write_json(arguments.json, found)
    return None


def paint(folder: Path, count: int) -> list[SplitImage]:
    """Write JPEG files of different sizes; the n-th is the same in every run."""
    images = []
    for number in range(count):
        random = np.random.default_rng(number)
        width, height = (int(side) for side in random.integers(256, 501, 2))
        coarse, fine = (
            Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            for cells in (6, 96)
        )
        path = folder / f"{number}.jpg"
        Image.blend(coarse, fine, alpha=0.3).save(path, quality=90)
        images.append(SplitImage(path.name, 0, hashlib.sha256(path.read_bytes()).hexdigest()))
    return images


def throughput(images: list[SplitImage], folder: Path, arguments: Any) -> dict[str, Any]:
    """Images a second of each way, medians over repeats that take turns."""
    backbone = load(arguments)
    pixels = torch.from_numpy(np.stack(decoded(backbone, images, folder)))  # (n, 3, size, size)
    ways: dict[str, Callable[[], object]] = {
        "bare": lambda: run_bare(backbone, pixels, arguments.batch_size),
        "extract": lambda: run_extract(backbone, images, folder, arguments.batch_size),
        "decoding": lambda: decoded(backbone, images, folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    run_bare(backbone, pixels[: arguments.batch_size], arguments.batch_size)
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    rates = {name: len(images) / statistics.median(values) for name, values in seconds.items()}
    share = rates["bare"] / rates["decoding"]
    return {
        "backbone": arguments.backbone,
        "image_precision": arguments.image_precision,
        "images": len(images),
        "batch_size": arguments.batch_size,
        "device": arguments.device,
        **{f"{name}_images_per_second": rate for name, rate in rates.items()},
        "ratio": rates["extract"] / rates["bare"],
        "best_possible_ratio": 1 / (1 + share) if backbone.device.type == "cpu" else min(1, 1 / share),
        "seconds": seconds,
    }


def load(arguments: Any) -> Backbone:
    options = {"image_precision": arguments.image_precision, "device": arguments.device}
    if arguments.backbone == "mini":
        return load_backbone("mini", None, **options)
    return random_backbone(arguments.backbone, **options)


def decoded(backbone: Backbone, images: list[SplitImage], folder: Path) -> list[np.ndarray]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda image: backbone.transform.test_view(read_image(folder / image.path)), images))


def run_bare(backbone: Backbone, pixels: Tensor, batch_size: int) -> None:
    for batch in pixels.split(batch_size):
        backbone.encode_images(batch).cpu()


def run_extract(backbone: Backbone, images: list[SplitImage], folder: Path, batch_size: int) -> None:
    with tempfile.TemporaryDirectory() as made:
        target, store = Path(made) / "features.npy", Path(made) / "store"
        extract_features(backbone, images, root=folder, target=target, store_folder=store, batch_size=batch_size)


def timed(way: Callable[[], object]) -> float:
    """Every way ends with its results in host memory, so there is nothing to wait for."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def peak(count: int, folder: Path, arguments: Any) -> int:
    """Peak resident memory of an extraction over what the loaded model holds, in a process of its own (Linux)."""
    answer = folder / "peak.json"
    words = [sys.executable, __file__, "--backbone", arguments.backbone, "--device", arguments.device,
             "--image-precision", arguments.image_precision, "--batch-size", str(arguments.batch_size),
             "--peak", str(count), str(folder), str(answer)]  # fmt: skip
    subprocess.run(words, check=True)
    return int(read_json(answer))


def measure_peak(arguments: Any) -> None:
    count, folder, answer = arguments.peak
    paths = [Path(folder) / f"{number}.jpg" for number in range(int(count))]
    images = [SplitImage(path.name, 0, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]
    backbone = load(arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts again from here
    held = memory("VmRSS")
    run_extract(backbone, images, Path(folder), arguments.batch_size)
    write_json(Path(answer), memory("VmHWM") - held)


def memory(line: str) -> int:
    found = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(line))
    return 1024 * int(found.split()[1])


def idle_repro() -> dict[str, Any]:
    """The time of `dvc repro`, only where it has nothing to do."""
    done = subprocess.run(
        [COMMANDS / "dvc", "status", "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode != 0:
        return {"skipped": f"dvc status says: {' '.join(done.stderr.split())[:80]}"}
    stages = json.loads(done.stdout)
    return {"skipped": f"not up to date: {', '.join(stages)}"} if stages else timed_command("dvc", "repro")


def timed_command(*words: str, repeats: int = 5) -> dict[str, Any]:
    command = [str(COMMANDS / words[0]), *words[1:]]
    seconds = [
        timed(lambda: subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)) for _ in range(repeats)
    ]
    return {"best": min(seconds), "median": statistics.median(seconds)}


def show(found: dict[str, Any]) -> None:
    rates = found["throughput"]
    machine = f"{rates['device']}, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    tower = f"{rates['backbone']} in {rates['image_precision']}"
    what = f"{tower}, {rates['images']} images in batches of {rates['batch_size']}"
    table = Table(title=f"{what}; {machine}")
    table.add_column("")
    table.add_column("found", justify="right")
    for name, label in (("bare", "bare model"), ("extract", "from files"), ("decoding", "decoding alone, all cores")):
        table.add_row(label, f"{rates[f'{name}_images_per_second']:.1f} images/s")
    table.add_row("from files / bare model", f"{rates['ratio']:.3f}")
    table.add_row("most that is possible here", f"{rates['best_possible_ratio']:.3f}")
    for count, size in found.get("memory", {}).items():
        table.add_row(f"peak memory over the model, {count} images", f"{size / 2**20:.0f} MB")
    for name, times in found["commands"].items():
        shown = times.get("skipped") or f"{times['best']:.2f} s, median {times['median']:.2f} s"
        table.add_row(name, shown)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
