"""Images: a file, bytes or an array slice -> the pixels a backbone expects, at test time or as an augmented view.

What is opened is bounded before a pixel is decoded: the format, the number of pixels, their aspect, and how many
pixels all threads hold at once.
"""

import functools
import hashlib
import io
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from coop_core.errors import DatasetError
from coop_core.files import digest_json, read_array

PREPROCESSING = 2
"""Version of what happens between a file and the pixels; raised with any change of them, so that no feature computed
from other pixels is taken for one of these."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Pillow's decoders that may run, whatever a file is called; others start programs or are rarely looked after. JPEG
opens MPO too."""
SUFFIXES = frozenset({
    ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif",
    ".tiff", ".webp",
})  # fmt: skip
MAX_PIXELS = 89_478_485
"""Of one image, and of all that are decoded at the same moment; Pillow's own limit."""
MAX_ASPECT = 100
"""Longer side over shorter side; beyond it, resizing the shorter side makes gigabytes of the longer."""

LAID_ON_WHITE = "transparent pixels were laid on white"
NEARLY_BLACK = "16-bit pixels use less than a sixteenth of their range, so that they are nearly black (scale them up)"

_SLICE = re.compile(r"(?P<file>.+\.npy)#(?P<index>\d{1,9})")
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Decoded:
    image: Image.Image
    """Upright, 8-bit RGB."""
    notes: tuple[str, ...] = ()
    """What was done to it that a person might not expect, such as `LAID_ON_WHITE`."""


@contextmanager
def decoded(source: Path | bytes) -> Iterator[Decoded]:
    """An image while it is in use, counted among the pixels in flight: a file, a file's bytes, or `images.npy#12`,
    slice 12 of an array of grey or RGB images.

    The colour conversion comes before any resizing, as in CoOp's data pipeline. Photographs are turned as their EXIF
    orientation says and transparency is laid on white, which that pipeline does not do.

    Raises
    ------
    DatasetError
        When the file is missing, no regular file, truncated, of no format in `FORMATS`, or too large.
    """
    name = "the image" if isinstance(source, bytes) else f"image {source}"
    if isinstance(source, Path) and not source.is_file():
        if match := _SLICE.fullmatch(source.name):
            yield Decoded(_read_slice(source.with_name(match["file"]), int(match["index"])))
            return
        raise DatasetError(f"{name} is no regular file" if source.exists() else f"{name} is missing")
    try:
        opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except Exception as error:  # a decoder may raise anything on a damaged header
        raise _unreadable(name, error) from None
    with opened, _IN_FLIGHT.take(_checked_pixels(opened, name)):
        try:
            found = to_rgb(opened)
        except Exception as error:  # and on damaged contents: MemoryError, RuntimeError, struct.error, ...
            raise _unreadable(name, error) from None
        yield found


def read_image(source: Path | bytes) -> Image.Image:
    """The image alone, as `decoded` gives it."""
    with decoded(source) as found:
        return found.image


def to_rgb(image: Image.Image) -> Decoded:
    """Any opened image, upright, as 8-bit RGB; 16-bit grey is scaled, transparency laid on white.

    Raises
    ------
    OSError
        For truncated files, and for pixels whose range nobody knows: floating-point ones, and 32-bit integers
        outside 0 to 65535.
    """
    notes = []
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:                    # an upright image is not copied
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise OSError("floating-point pixels, whose range is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        low, high = int(wide.min()), int(wide.max())
        if low < 0 or high > 65535:
            raise OSError(f"32-bit pixels from {low} to {high}, whose range is not known; save it with 8 or 16 bits")
        if 0 < high < 4096:
            notes.append(NEARLY_BLACK)
        image = Image.fromarray((wide // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").histogram()[:255] != [0] * 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            notes.append(LAID_ON_WHITE)
    return Decoded(image if image.mode == "RGB" else image.convert("RGB"), tuple(notes))


def _checked_pixels(image: Image.Image, name: str) -> int:
    """How many an opened image has, refused where they are too many or too oddly arranged."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DatasetError(f"{name} has {width} x {height} pixels, more than {MAX_PIXELS:,}: scale it down")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DatasetError(f"{name} has {width} x {height} pixels, one side more than {MAX_ASPECT} times the other: "
                           "cut it")  # fmt: skip
    return width * height


def _unreadable(name: str, error: Exception) -> DatasetError:
    if isinstance(error, UnidentifiedImageError):
        reason = f"no picture in one of the formats {', '.join(FORMATS)}"
    elif isinstance(error, MemoryError):
        reason = "not enough memory"
    else:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return DatasetError(f"{name} cannot be read ({reason}): replace or remove it")


def _read_slice(array: Path, index: int) -> Image.Image:
    if not array.is_file():
        raise DatasetError(f"image {array}#{index} is missing")
    slices = _open_array(array, array.stat().st_mtime_ns)
    if index >= len(slices):
        raise DatasetError(f"image {array}#{index} is missing: the array holds {len(slices)}")
    try:
        return Image.fromarray(slices[index]).convert("RGB")
    except (TypeError, ValueError) as error:
        raise DatasetError(f"image {array}#{index} cannot be read ({error}): grey or RGB bytes are wanted") from None


class _Budget:
    """Pixels that threads may hold at once; whoever wants more waits for the others."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken, self._changed = limit, 0, threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + pixels <= self._limit)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()


_IN_FLIGHT = _Budget(MAX_PIXELS)


@functools.lru_cache(maxsize=8)
def _open_array(path: Path, modified: int) -> np.ndarray:
    """`modified` only tells apart what a path held at different times."""
    return read_array(path)


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
