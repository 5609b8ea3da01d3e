"""Damaged input, by the thousand: every mutated file is read or refused in a sentence, and none ends in a traceback.

    python benchmarks/mutations.py              2,000 images and 2,000 parameter files, a minute or two
    python benchmarks/mutations.py --count 200 --seed 7

Images of every format that may be opened (and of two that may not) lose, gain and change bytes; lines of params.yaml
lose, gain and swap values, keys and bytes. What is neither accepted nor a `CoopError` is printed and counted.
"""

import argparse
import io
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from coop_core.data.images import read_image
from coop_core.errors import CoopError
from coop_core.params import load_params
from coop_core.sweeps.sweep import next_choices, trials

PARAMS = Path(__file__).parents[1] / "params.yaml"
SUFFIXES = (".jpg", ".png", ".tif", ".webp", ".gif", ".avif", ".bmp", "", ".npy#0")
VALUES = (
    "", "null", "~", "yes", "-1", "0", "1e400", ".nan", ".inf", "-.inf", "9" * 5000, "0x" + "f" * 5000, "10" * 20,
    "2001-99-99", "2001-01-01", "2001-01-01 10:99:00", "!!int abc", "!!bool maybe", "!!float x", "!!binary x",
    "!!set {a}",
    "!!python/object:os.system x", "[]", "{}", "[[[[1]]]]", "{a: {b: {c: 1}}}", "&a [*a]", "*nowhere", "'\\0'", '"\\0"',
    '"\\ud800"', "\u2028", "{}: {}", "? [a]\n  : b", "- a", "|", ">", "'", '"', "#", "@", "%", "a: b: c", "1_000",
    "1:30", "0o17", "0b1", "1.5 GB", "9" * 400 + " GB", "mini", "local-dir:/nowhere", "../../x.pt", "coop",
    "a photo of a {}",
    "{low: .nan, high: 1.0}", "{low: 0, high: .inf}", "{low: 1, high: 2, log: true}", "[.nan]",
    "[2001-01-01]", "[1, 1]",
)  # fmt: skip


def pictures() -> list[bytes]:
    """One file of each kind, small and noisy."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    wide = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    kinds = [(rgb, name) for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "PPM", "TIFF", "AVIF", "EPS", "ICO")]
    kinds += [(rgba, "PNG"), (rgba, "TIFF"), (rgba, "WEBP"), (wide, "PNG"), (wide, "TIFF"), (rgb.convert("P"), "PNG")]
    found = []
    for image, name in kinds:
        file = io.BytesIO()
        image.save(file, name)
        found.append(file.getvalue())
    return found


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        place = draw.randrange(len(found)) if draw.random() < 0.5 else draw.randrange(min(64, len(found)))
        kind = draw.randrange(5)
        if kind == 0:
            found[place] = draw.randrange(256)
        elif kind == 1:
            found[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del found[place : place + draw.choice((1, 4, 100))]
        elif kind == 3:
            found[place:place] = draw.randbytes(draw.choice((1, 4, 100)))
        else:
            found[place : place + 4] = draw.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
        if not found:
            return b""
    return bytes(found)


def mutate_lines(text: str, draw: random.Random) -> bytes:
    lines = text.splitlines()
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.randrange(len(lines))
        line, kind = lines[place], draw.randrange(7)
        if kind <= 2 and ":" in line:
            lines[place] = f"{line.partition(':')[0]}: {draw.choice(VALUES)}"
        elif kind == 3:
            lines.insert(place, lines[draw.randrange(len(lines))])
        elif kind == 4 and len(lines) > 1:
            del lines[place]
        elif kind == 5:
            lines[place] = " " * draw.randrange(5) + line.lstrip()
        else:
            lines[place] = f"{draw.choice(VALUES)}: {draw.choice(VALUES)}"
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return mutate_bytes(data, draw) if draw.random() < 0.1 else data


def mutated_images(count: int, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    sources = pictures()
    for number in range(count):
        yield f"{number}{draw.choice(SUFFIXES)}", mutate_bytes(draw.choice(sources), draw)


def mutated_params(count: int, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    text = PARAMS.read_text(encoding="utf-8")
    for number in range(count):
        yield f"{number}.yaml", mutate_lines(text, draw)


def read_params(path: Path) -> None:
    """As `coop sweep` does before anything is started."""
    params = load_params(path)
    if params.sweep is not None:
        trials(params, next_choices(params, {}))


def outcomes(files: Iterator[tuple[str, bytes]], read: Callable[[Path], object]) -> Counter[str]:
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files:
            path = Path(folder) / name
            path.write_bytes(data)
            try:
                read(path)
                found["accepted"] += 1
            except CoopError:
                found["a sentence"] += 1
            except Exception as error:
                found["traceback"] += 1
                sys.stderr.write(f"{name}: {type(error).__name__}: {str(error)[:150]}\n")
            path.unlink()
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--count", type=int, default=2_000)
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    warnings.simplefilter("ignore")  # Pillow's, of what it repairs
    table = Table("input", "files", "accepted", "a sentence", "traceback", "seconds", "peak MB so far")
    worst = 0
    for name, files, read in (("images", mutated_images, read_image), ("params.yaml", mutated_params, read_params)):
        started = time.monotonic()
        found = outcomes(files(given.count, random.Random(given.seed)), read)
        worst += found["traceback"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        table.add_row(name, str(given.count), *(str(found[kind]) for kind in ("accepted", "a sentence", "traceback")),
                      f"{time.monotonic() - started:.0f}", f"{peak:.0f}")  # fmt: skip
    Console().print(table)
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
