"""`coop predict` from start to end: one image, and many; a prompt from its folder and from a registry in SQLite.

    python benchmarks/predicting.py                                      some minutes on 2 cores
    python benchmarks/predicting.py --images 200 --repeats 3 --json FILE

Every row is a process of its own, begun anew for each repeat, in turns; the median counts. `import torch` alone is
the floor that no answer can be below. The tower's own rate is that of `mini` on pixels in memory, in a process that
keeps freed memory as `coop predict` does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

TOWER = """
import sys, time, torch
from pipelines.allocator import keep_freed_memory
keep_freed_memory()
from coop_core.backbone import load_backbone
backbone, pixels = load_backbone("mini", None), torch.randn(32, 3, 224, 224)
for _ in range(2): backbone.encode_images(pixels)
begin = time.perf_counter()
for _ in range(8): backbone.encode_images(pixels)
print(8 * 32 / (time.perf_counter() - begin))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from pipeline import paint
    from registered import EARLIER, as_variables, register, registry_settings

    from coop_core.files import write_json

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        paint(folder / "images", given.images)
        settings = registry_settings(folder)
        number = register(EARLIER, settings)
        environment = os.environ | as_variables(settings)
        coop = [sys.executable, "-m", "pipelines.commands.cli", "predict"]
        one, many = [str(folder / "images" / "0.jpg")], [str(folder / "images")]
        words = {
            "import torch": [sys.executable, "-c", "import torch"],
            "one image": [*coop, *one, "--model", str(EARLIER)],
            "one image, registry": [*coop, *one, "--model", f"toys/{number}"],
            f"{given.images} images": [*coop, *many, "--model", str(EARLIER)],
            f"{given.images} images, registry": [*coop, *many, "--model", f"toys/{number}"],
        }
        seconds: dict[str, list[float]] = {row: [] for row in words}
        for turn in range(given.repeats + 1):                                     # the first fills the disk's cache
            for row, its in words.items():
                if row.startswith(str(given.images)) and turn not in (1, 2):       # they take long and differ little
                    continue
                begin = time.perf_counter()
                subprocess.run(its, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=folder)
                if turn:
                    seconds[row].append(time.perf_counter() - begin)
        rate = float(subprocess.run([sys.executable, "-c", TOWER], check=True, capture_output=True, text=True).stdout)
    median = {row: statistics.median(found) for row, found in seconds.items()}
    found = {"seconds": seconds, "median": median, "tower, images/s": rate}
    show(median, rate, given.images)
    if given.json:
        write_json(given.json, found)
    else:
        Console().print(json.dumps(seconds), highlight=False)


def show(median: dict[str, float], rate: float, images: int) -> None:
    table = Table("from start to end", "seconds", "images/s after the start", title=f"tower alone: {rate:.0f} images/s")
    for row, seconds in median.items():
        start = median["one image, registry" if "registry" in row else "one image"]
        table.add_row(row, f"{seconds:.2f}", f"{(images - 1) / (seconds - start):.0f}" if row[0].isdigit() else "")
    Console().print(table)


if __name__ == "__main__":
    main()
