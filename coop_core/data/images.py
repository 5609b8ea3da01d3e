"""Images: a file, bytes, an array or a picture in memory -> an upright RGB picture (`data.views` makes pixels of it).

What is opened is bounded before a pixel is decoded: the format, the number of pixels, their aspect, and how many
pixels all threads hold at once. Sixteen threads that each read the largest image allowed hold 0.56 GB at most for
16-bit PNG, 0.62 for RGB PNG, 0.74 for RGBA PNG, 0.90 for progressive JPEG and 1.45 for WebP, whose decoder keeps
frames of its own (`benchmarks/image_memory.py`).
"""

import functools
import io
import re
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from coop_core.errors import DatasetError
from coop_core.files import read_array

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

Source = Path | bytes | Image.Image | np.ndarray
"""A file, the bytes of one, a picture, or uint8 pixels (h, w), (h, w, 3) or (h, w, 4)."""

_SLICE = re.compile(r"(?P<file>.+\.npy)#(?P<index>\d{1,9})", re.DOTALL)
_STRIPE_PIXELS = 1 << 20
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What makes each EXIF orientation upright. Pillow's own exif_transpose also writes the other EXIF data anew, and
fails on photographs where these are damaged."""


@dataclass(frozen=True)
class Decoded:
    image: Image.Image
    """Upright, 8-bit RGB."""
    notes: tuple[str, ...] = ()
    """What was done to it that a person might not expect, such as `LAID_ON_WHITE`."""


@contextmanager
def decoded(source: Source) -> Iterator[Decoded]:
    """An image while it is in use, counted among the pixels in flight; a path may be `images.npy#12`, slice 12 of
    an array of grey or RGB images. Do not nest: the outer image may leave no pixels for the inner.

    The colour conversion comes before any resizing, as in CoOp's data pipeline. Photographs are turned as their EXIF
    orientation says, 16-bit grey is scaled and transparency is laid on white, which that pipeline does not do.

    Raises
    ------
    DatasetError
        When the file is missing, no regular file, truncated, of no format in `FORMATS`, or too large; and for
        pixels whose range nobody knows: floating-point ones, and 32-bit integers outside 0 to 65535. It begins with
        "image PATH", or "the image" where there is no path.
    """
    name = f"image {source}" if isinstance(source, Path) else "the image"
    with _opened(source, name) as opened, _IN_FLIGHT.take(_checked_pixels(opened, name)):
        try:
            found = _upright_rgb(opened)
        except Exception as error:  # damaged contents: a decoder may raise MemoryError, RuntimeError, struct.error, ...
            raise _unreadable(name, error) from None
        yield found


def read_image(source: Source) -> Image.Image:
    """The image alone, as `decoded` gives it."""
    with decoded(source) as found:
        return found.image


def is_picture(file: Path) -> bool:
    """Whether a regular file's content begins as one of `FORMATS` does, whatever it is called and however it goes on.

    A file that cannot be opened counts as one: reading it says why.
    """
    try:
        with Image.open(file, formats=FORMATS):
            return True
    except UnidentifiedImageError:
        return False
    except Exception:  # a decoder may raise anything on a damaged header
        return True


def is_slice(path: Path) -> bool:
    """Whether a path is one slice of a npy file that is there, such as `images.npy#12`."""
    match = _SLICE.fullmatch(path.name)
    return match is not None and path.with_name(match["file"]).is_file()


@contextmanager
def _opened(source: Source, name: str) -> Iterator[Image.Image]:
    """Only its header is read, so far as the format allows that."""
    if isinstance(source, Image.Image):
        yield source                                                              # and stays open: it is the caller's
    elif isinstance(source, np.ndarray):
        yield _from_array(source, name)
    elif isinstance(source, Path) and (match := _SLICE.fullmatch(source.name)) and not source.exists():
        yield _from_array(_slice(source.with_name(match["file"]), int(match["index"]), name), name)
    else:
        try:
            if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):
                raise DatasetError(f"{name} is no regular file")
            opened = Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS)
        except DatasetError:
            raise
        except FileNotFoundError:
            raise DatasetError(f"{name} is missing") from None
        except Exception as error:  # a decoder may raise anything on a damaged header
            raise _unreadable(name, error) from None
        with opened:
            yield opened


def _upright_rgb(image: Image.Image) -> Decoded:
    """Converted first and turned then, which gives the same pixels and is the cheaper order where 4 channels or 16
    bits become 3 channels of 8."""
    image.load()
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    notes: tuple[str, ...] = ()
    if image.mode == "F":
        raise OSError("floating-point pixels, whose range is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image, notes = _from_16_bits(image)
    elif image.has_transparency_data:
        image, notes = _laid_on_white(image)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return Decoded(image if turn is None else image.transpose(turn), notes)


def _from_16_bits(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    ranges = []
    clear = image.info.get("transparency")                                        # one grey that is transparent

    def convert(stripe: Image.Image) -> Image.Image:
        wide = np.asarray(stripe)
        ranges.append((int(wide.min()), int(wide.max())))
        narrow = (wide // 257).astype(np.uint8)
        if clear is not None:
            narrow[wide == clear] = 255
        return Image.fromarray(narrow).convert("RGB")

    found = _by_stripes(image, convert)
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low < 0 or high > 65535:
        raise OSError(f"32-bit pixels from {low} to {high}, whose range is not known; save it with 8 or 16 bits")
    return found, (NEARLY_BLACK,) if 0 < high < 4096 else ()


def _laid_on_white(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    least = []

    def convert(stripe: Image.Image) -> Image.Image:
        stripe = stripe.convert("RGBA")
        least.append(np.asarray(stripe)[..., 3].min())
        white = Image.new("RGB", stripe.size, "white")
        white.paste(stripe, mask=stripe)
        return white

    found = _by_stripes(image, convert)
    return found, (LAID_ON_WHITE,) if min(least) < 255 else ()


def _by_stripes(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`convert(image)` of a conversion to RGB that looks at each pixel alone, without its copies of the whole."""
    width, height = image.size
    rows = max(1, _STRIPE_PIXELS // width)
    if rows >= height:
        return convert(image)
    found = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        found.paste(convert(image.crop((0, top, width, min(top + rows, height)))), (0, top))
    return found


def _checked_pixels(image: Image.Image, name: str) -> int:
    """How many an opened image has, refused where they are none, too many or too oddly arranged."""
    width, height = image.size
    if not width * height:
        raise DatasetError(f"{name} has {width} x {height} pixels: replace or remove it")
    if width * height > MAX_PIXELS:
        raise DatasetError(f"{name} has {width} x {height} pixels, more than {MAX_PIXELS:,}: scale it down")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DatasetError(f"{name} has {width} x {height} pixels, one side more than {MAX_ASPECT} times the other: "
                           "cut it")  # fmt: skip
    return width * height


def _unreadable(name: str, error: Exception) -> DatasetError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return DatasetError(f"{name} has more than {MAX_PIXELS:,} pixels: scale it down")
    if isinstance(error, UnidentifiedImageError):
        reason = f"no picture in one of the formats {', '.join(FORMATS)}"
    elif isinstance(error, MemoryError):
        reason = "not enough memory"
    else:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        reason = " ".join(text.split())
    return DatasetError(f"{name} cannot be read ({reason}): replace or remove it")


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise DatasetError(f"{name} is an array of {pixels.dtype} {pixels.shape}, not of uint8 (h, w), (h, w, 3) or "
                           "(h, w, 4): convert it")  # fmt: skip
    return Image.fromarray(pixels)


def _slice(array: Path, index: int, name: str) -> np.ndarray:
    if not array.is_file():
        raise DatasetError(f"{name} is missing")
    slices = _open_array(array, array.stat().st_mtime_ns)
    if not slices.ndim or index >= len(slices):
        raise DatasetError(f"{name} is missing: the array holds {len(slices) if slices.ndim else 0}")
    return np.asarray(slices[index])


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
