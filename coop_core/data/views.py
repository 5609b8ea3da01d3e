"""Views: an upright RGB picture -> the pixels a backbone expects, as tested or augmented."""

import hashlib
import random
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from coop_core.files import digest_json

PREPROCESSING = 2
"""Version of what happens between a file and the pixels; raised with any change of them, so that no feature computed
from other pixels is taken for one of these."""
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class ImageTransform:
    """What an image tower was trained to see; part of every feature's identity."""

    size: int
    """Side of the square input in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
    """shortest: shorter side to `size`, then the centre; squash: both sides to `size`."""

    @property
    def digest(self) -> str:
        """Of the constants and of `PREPROCESSING`: equal where equal files give equal pixels."""
        return digest_json([PREPROCESSING, asdict(self)])

    def test_view(self, image: Image.Image, *, out: np.ndarray | None = None) -> np.ndarray:
        """The deterministic view (view 0): RGB image -> float32 (3, size, size), normalised, in `out` if given."""
        resampling = _RESAMPLING[self.interpolation]
        if self.resize_mode == "squash":
            return self._normalise(image.resize((self.size, self.size), resampling), out)
        width, height = image.size
        short = min(width, height)
        resized = image.resize((self.size * width // short, self.size * height // short), resampling)
        left, top = round((resized.width - self.size) / 2), round((resized.height - self.size) / 2)
        return self._normalise(resized.crop((left, top, left + self.size, top + self.size)), out)

    def training_view(
        self, image: Image.Image, rng: random.Random, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """An augmented view: random resized crop (scale 0.08-1, aspect 3/4-4/3), flipped half of the time."""
        box = _random_crop(*image.size, rng)
        crop = image.resize((self.size, self.size), _RESAMPLING[self.interpolation], box=box)
        if rng.random() < 0.5:
            crop = ImageOps.mirror(crop)
        return self._normalise(crop, out)

    def view(
        self, image: Image.Image, *, view: int, seed: int, image_digest: str, out: np.ndarray | None = None
    ) -> np.ndarray:
        """View 0 is the test view; any other depends on nothing but the image, the seed and its number."""
        if view == 0:
            return self.test_view(image, out=out)
        entropy = hashlib.sha256(f"{seed}:{image_digest}:{view}".encode()).digest()
        return self.training_view(image, random.Random(entropy), out=out)

    def _normalise(self, image: Image.Image, out: np.ndarray | None) -> np.ndarray:
        mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (self.mean, self.std))
        pixels = np.empty((3, self.size, self.size), np.float32) if out is None else out
        pixels[:] = np.asarray(image).transpose(2, 0, 1)
        pixels /= 255.0
        pixels -= mean
        pixels /= std
        return pixels


def _random_crop(width: int, height: int, rng: random.Random) -> tuple[float, float, float, float]:
    """The box of a random resized crop; after ten misses the largest centred box within the aspect range."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    aspect = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, height * aspect), min(height, width / aspect)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2
