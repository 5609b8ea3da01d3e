"""Peak memory of threads that read the largest images allowed, all at once.

    python benchmarks/image_memory.py                                       16 threads, every kind
    python benchmarks/image_memory.py --threads 4 --kinds "RGBA PNG" --json FILE

Each kind has a process of its own. It prints its peak resident memory less what it held before the first image
(interpreter, NumPy, Pillow), and how many bytes that is for each pixel of `MAX_PIXELS`.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from coop_core.data.images import MAX_PIXELS, decoded
from coop_core.data.views import ImageTransform
from coop_core.files import write_json

SIDE = math.isqrt(MAX_PIXELS)
TRANSFORM = ImageTransform(size=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return print(json.dumps(measure(Path(arguments.measure), arguments.threads)))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.kinds:
            file = Path(folder) / "image"
            KINDS[kind](file)
            command = [sys.executable, __file__, "--threads", str(arguments.threads), "--measure", str(file)]
            found[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    show(found, arguments.threads)
    if arguments.json:
        write_json(arguments.json, {"threads": arguments.threads, "side": SIDE, "kinds": found})
    return None


def ramp(channels: int, dtype: type[np.generic] = np.uint8) -> np.ndarray:
    """Slowly changing pixels (side, side) or (side, side, channels), cheap to compress; alpha is never full."""
    row = np.linspace(0, np.iinfo(dtype).max - 1, SIDE, dtype=dtype)
    plane = np.broadcast_to(row, (SIDE, SIDE))
    return plane if channels == 1 else np.broadcast_to(plane[..., None], (SIDE, SIDE, channels))


def saver(channels: int, dtype: type[np.generic] = np.uint8, **options: Any) -> Callable[[Path], None]:
    return lambda file: Image.fromarray(np.ascontiguousarray(ramp(channels, dtype))).save(file, **options)


KINDS = {
    "RGB PNG": saver(3, format="PNG", compress_level=1),
    "RGBA PNG": saver(4, format="PNG", compress_level=1),
    "16-bit PNG": saver(1, np.uint16, format="PNG", compress_level=1),
    "baseline JPEG": saver(3, format="JPEG"),
    "progressive JPEG": saver(3, format="JPEG", progressive=True, subsampling=0),
    "WebP": saver(4, format="WEBP", lossless=True, method=0, quality=0),
}


def measure(file: Path, threads: int) -> dict[str, float]:
    def read() -> None:
        with decoded(file) as found:
            TRANSFORM.test_view(found.image)

    Image.init()                                                                  # so that decoders count as held
    before, started = held(), time.perf_counter()
    workers = [threading.Thread(target=read) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"bytes": peak - before, "seconds": time.perf_counter() - started}


def held() -> int:
    """Bytes resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def show(found: dict[str, dict[str, float]], threads: int) -> None:
    table = Table("image", "peak GB", "bytes a pixel", "seconds", title=f"{threads} threads, {SIDE} x {SIDE} pixels")
    for kind, values in found.items():
        table.add_row(kind, f"{values['bytes'] / 1e9:.2f}", f"{values['bytes'] / SIDE**2:.1f}",
                      f"{values['seconds']:.1f}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
