"""Toy images: a number -> a little image that no other number gives, and folders of them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def toy_image(number: int, *, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """An RGB image (width, height) of noise that depends on `number` alone."""
    width, height = size
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def paint(path: Path, number: int, *, size: tuple[int, int] = (12, 10)) -> Path:
    """Write toy image `number`; equal numbers and suffixes give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    toy_image(number, size=size).save(path)
    return path


def paint_classes(folder: Path, counts: Mapping[str, int], *, first: int = 0) -> Path:
    """Class folders with so many different images each: <class>/0.png, <class>/1.png, ..."""
    number = first
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            paint(folder / name / f"{i}.png", number)
            number += 1
    return folder
