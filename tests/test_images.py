"""Images: any file becomes upright RGB, view 0 is the papers' test transform, other views depend on what they say."""

import base64
import hashlib
import os
import random
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageDraw, ImageOps
from toy_images import paint, toy_image

from coop_core.backbone.torchvision_operators import declare_missing_operators
from coop_core.data.images import _IN_FLIGHT, LAID_ON_WHITE, NEARLY_BLACK, _Budget, decoded, is_picture, read_image
from coop_core.data.views import PREPROCESSING, ImageTransform, _random_crop
from coop_core.errors import DatasetError
from coop_core.files import write_array

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TRANSFORM = ImageTransform(size=8, mean=MEAN, std=STD)
PLAIN = ImageTransform(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""Pixels between 0 and 1, to be read off."""
EXTREMES = [(1, 1), (1, 300), (300, 1), (7, 9), (8, 8), (2, 1000)]


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


# The test view


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(12, 10), (10, 12), (8, 8), (5, 40), (400, 3), (1, 1)])
def test_the_test_view_is_a_float32_square_of_three_channels(mode: str, size: tuple[int, int]) -> None:
    transform = ImageTransform(size=8, mean=MEAN, std=STD, resize_mode=mode)
    view = transform.test_view(toy_image(0, size=size))
    assert view.shape == (3, 8, 8)
    assert view.dtype == np.float32
    assert view.flags.c_contiguous


@pytest.mark.parametrize("size", [(12, 10), (10, 13), (33, 8), (8, 31), (100, 57)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_test_view_is_torchvisions_resize_centre_crop_and_normalise(
    size: tuple[int, int], interpolation: str
) -> None:
    declare_missing_operators()
    from torchvision import transforms

    transform = ImageTransform(size=8, mean=MEAN, std=STD, interpolation=interpolation)
    reference = transforms.Compose([
        transforms.Resize(8, interpolation=transforms.InterpolationMode(interpolation)),
        transforms.CenterCrop(8),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])
    image = toy_image(1, size=size)
    np.testing.assert_allclose(transform.test_view(image), reference(image).numpy(), atol=1e-6)


def test_squashing_shows_the_whole_image() -> None:
    image = Image.new("RGB", (80, 8), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 40, 8))
    squashed = ImageTransform(size=8, mean=PLAIN.mean, std=PLAIN.std, resize_mode="squash").test_view(image)
    assert squashed[0, 4, 0] == 1
    assert squashed[0, 4, 7] == 0


def test_the_centre_of_a_long_image_is_shown() -> None:
    image = Image.new("RGB", (80, 8), (0, 0, 0))
    image.paste((255, 255, 255), (36, 0, 44, 8))
    assert PLAIN.test_view(image).min() == 1


def test_normalisation_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel() -> None:
    view = TRANSFORM.test_view(Image.new("RGB", (8, 8), (255, 0, 51)))
    expected = [(1 - MEAN[0]) / STD[0], (0 - MEAN[1]) / STD[1], (0.2 - MEAN[2]) / STD[2]]
    np.testing.assert_allclose(view[:, 3, 3], expected, rtol=1e-5)


def test_equal_transforms_have_equal_digests_and_any_field_changes_them() -> None:
    assert TRANSFORM.digest == ImageTransform(size=8, mean=MEAN, std=STD).digest
    others = [
        ImageTransform(size=9, mean=MEAN, std=STD),
        ImageTransform(size=8, mean=STD, std=STD),
        ImageTransform(size=8, mean=MEAN, std=MEAN),
        ImageTransform(size=8, mean=MEAN, std=STD, interpolation="bilinear"),
        ImageTransform(size=8, mean=MEAN, std=STD, resize_mode="squash"),
    ]
    assert len({TRANSFORM.digest, *(other.digest for other in others)}) == 6


# Views


def view(number: int, *, seed: int = 1, image_digest: str = "abc") -> np.ndarray:
    return TRANSFORM.view(toy_image(0, size=(30, 20)), view=number, seed=seed, image_digest=image_digest)


@pytest.mark.parametrize(("seed", "image_digest"), [(1, "abc"), (2, "abc"), (1, "def")])
def test_view_0_is_the_test_view_whatever_the_seed_and_digest(seed: int, image_digest: str) -> None:
    expected = TRANSFORM.test_view(toy_image(0, size=(30, 20)))
    np.testing.assert_array_equal(view(0, seed=seed, image_digest=image_digest), expected)


@pytest.mark.parametrize("number", [0, 1])
def test_a_view_is_written_where_it_is_wanted(number: int) -> None:
    image, out = toy_image(0, size=(30, 20)), np.full((3, TRANSFORM.size, TRANSFORM.size), 7, np.float32)

    TRANSFORM.view(image, view=number, seed=1, image_digest="abc", out=out)

    np.testing.assert_array_equal(out, view(number))


def test_a_view_is_the_same_at_every_call_whatever_the_global_random_state() -> None:
    random.seed(0)
    first = view(3)
    random.seed(1)
    np.testing.assert_array_equal(view(3), first)


def test_views_do_not_depend_on_the_order_in_which_they_are_asked() -> None:
    forward = [view(number) for number in (1, 2, 3)]
    backward = [view(number) for number in (3, 2, 1)]
    np.testing.assert_array_equal(forward, backward[::-1])


def test_the_views_of_an_image_differ() -> None:
    assert len({view(number).tobytes() for number in range(9)}) == 9


def test_another_seed_gives_other_views() -> None:
    assert not np.array_equal(view(1, seed=1), view(1, seed=2))


def test_the_same_pixels_under_another_digest_give_other_views() -> None:
    assert not np.array_equal(view(1, image_digest="abc"), view(1, image_digest="def"))


def test_about_half_of_the_views_are_mirrored() -> None:
    gradient = Image.linear_gradient("L").rotate(90).convert("RGB")
    views = [PLAIN.view(gradient, view=number, seed=1, image_digest="abc") for number in range(1, 201)]
    rising = sum(bool(v[0, 4, 0] < v[0, 4, -1]) for v in views)
    assert 70 <= rising <= 130


def test_views_show_between_8_percent_and_all_of_the_image() -> None:
    boxes = [_random_crop(1000, 1000, random.Random(number)) for number in range(300)]
    shares = [(right - left) * (bottom - top) / 1e6 for left, top, right, bottom in boxes]
    assert 0.078 <= min(shares) <= 0.12
    assert 0.9 <= max(shares) <= 1


def test_crops_have_aspect_ratios_between_3_to_4_and_4_to_3() -> None:
    boxes = [_random_crop(1000, 1000, random.Random(number)) for number in range(300)]
    ratios = [(right - left) / (bottom - top) for left, top, right, bottom in boxes]
    assert 0.745 <= min(ratios) <= 0.8
    assert 1.25 <= max(ratios) <= 1.34


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None, database=None)
def test_a_crop_lies_inside_the_image(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = _random_crop(width, height, random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize("size", EXTREMES)
def test_images_of_extreme_shape_have_views(size: tuple[int, int]) -> None:
    for number in range(1, 30):
        augmented = TRANSFORM.view(toy_image(0, size=size), view=number, seed=1, image_digest="abc")
        assert augmented.shape == (3, 8, 8)
        assert np.isfinite(augmented).all()


# Files


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".tif", ".webp"])
def test_a_lossless_file_gives_its_pixels(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == ".webp" else {}
    path = save(tmp_path / f"a{suffix}", toy_image(0), **options)
    np.testing.assert_array_equal(np.asarray(read_image(path)), np.asarray(toy_image(0)))


def test_a_grey_image_becomes_rgb(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.png", Image.new("L", (4, 4), 100)))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (100, 100, 100)


def test_a_black_and_white_image_becomes_rgb(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.png", Image.new("1", (4, 4), 1)))
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_a_palette_image_becomes_rgb(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert read_image(save(tmp_path / "a.png", image)).getpixel((0, 0)) == (10, 20, 30)


def test_a_palette_image_with_transparency_becomes_rgb_without_a_warning(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    path = save(tmp_path / "a.png", image, transparency=bytes([128, 255]))
    assert read_image(path).getpixel((0, 0)) == (10, 20, 30)


def test_an_image_with_alpha_becomes_rgb(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.png", Image.new("RGBA", (4, 4), (10, 20, 30, 255))))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_16_bit_grey_image_keeps_its_greys(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 16_384], [32_768, 65_535]], dtype=np.uint16)
    image = read_image(save(tmp_path / f"a{suffix}", Image.fromarray(values)))
    np.testing.assert_allclose(np.asarray(image)[:, :, 0], [[0, 64], [128, 255]], atol=1)


def test_a_cmyk_photograph_becomes_rgb(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "a.jpg", Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK")))
    assert image.mode == "RGB"
    np.testing.assert_allclose(image.getpixel((8, 8)), (200, 30, 30), atol=6)


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    path = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert read_image(path).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (15, 7)), (6, (7, 0)), (8, (0, 15))])
def test_a_photograph_is_turned_as_its_orientation_says(
    tmp_path: Path, orientation: int, corner: tuple[int, int]
) -> None:
    image = Image.new("RGB", (16, 8), (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = read_image(save(tmp_path / "a.png", image, exif=exif))
    assert upright.size == ((16, 8) if orientation in {1, 3} else (8, 16))
    assert upright.getpixel(corner) == (255, 255, 255)


def test_a_photograph_with_broken_exif_data_is_read_all_the_same(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", toy_image(0), exif=b"Exif\0\0garbage")
    assert read_image(path).size == (12, 10)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".bmp", ".webp"])
def test_a_truncated_file_is_a_sentence(tmp_path: Path, suffix: str) -> None:
    path = paint(tmp_path / f"cut{suffix}", 0, size=(64, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError, match=r"image .+cut\.\w+ cannot be read \(.+\): replace or remove it"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"<html>Not found</html>", b"\x89PNG\r\n"], ids=["empty", "html", "head"])
def test_a_file_that_is_no_image_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DatasetError, match=r"image .+a\.png cannot be read \(.+\): replace or remove it"):
        read_image(tmp_path / "a.png")


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"image .+a\.png is missing"):
        read_image(tmp_path / "a.png")


# Array slices


def test_a_slice_of_a_grey_array_is_an_rgb_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4), dtype=np.uint8)
    write_array(tmp_path / "train.npy", pixels)
    image = read_image(tmp_path / "train.npy#2")
    assert (image.mode, image.size) == ("RGB", (4, 5))
    np.testing.assert_array_equal(np.asarray(image), np.repeat(pixels[2][:, :, None], 3, axis=2))


def test_a_slice_of_a_colour_array_keeps_its_colours(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    write_array(tmp_path / "train.npy", pixels)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "train.npy#0")), pixels[0])


def test_a_slice_of_an_array_that_was_written_anew_is_the_new_one(tmp_path: Path) -> None:
    for value in (1, 2):
        write_array(tmp_path / "train.npy", np.full((2, 4, 4), value, dtype=np.uint8))
        assert read_image(tmp_path / "train.npy#1").getpixel((0, 0)) == (value, value, value)


def test_a_slice_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    write_array(tmp_path / "train.npy", np.zeros((2, 4, 4), dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"train\.npy#2 is missing: the array holds 2$"):
        read_image(tmp_path / "train.npy#2")


@pytest.mark.parametrize("pixels", [np.zeros((2, 4), np.uint8), np.zeros((2, 4, 4), np.float32), np.uint8(3)])
def test_an_array_that_holds_no_images_is_a_sentence(tmp_path: Path, pixels: np.ndarray) -> None:
    write_array(tmp_path / "train.npy", pixels)
    with pytest.raises(DatasetError, match=r"image .+train\.npy#0 is (missing|an array of \w+ \(.+, not of uint8)"):
        read_image(tmp_path / "train.npy#0")


def test_a_file_that_is_called_like_a_slice_is_read_as_a_file(tmp_path: Path) -> None:
    save(tmp_path / "x.npy#0", toy_image(3), format="PNG")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "x.npy#0")), np.asarray(toy_image(3)))


# Transparency


def shape_on_nothing() -> Image.Image:
    """A black disc with every opacity on transparent black, as icons come."""
    alpha = Image.new("L", (24, 20), 0)
    ImageDraw.Draw(alpha).ellipse((4, 4, 18, 16), fill=255)
    alpha.paste(Image.linear_gradient("L").resize((24, 8)), (0, 12))
    icon = Image.new("RGBA", alpha.size, (0, 0, 0, 0))
    icon.putalpha(alpha)
    return icon


def on_white(image: Image.Image) -> np.ndarray:
    """What a person sees of an image on a white page."""
    image = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image.getchannel("A"))
    return np.asarray(page)


def palette(path: Path, **options: object) -> Path:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    return save(path, image, **options)


TRANSPARENT = {
    "RGBA": lambda path: save(path, shape_on_nothing(), format="PNG"),
    "RGBA WebP": lambda path: save(path, shape_on_nothing(), format="WEBP", lossless=True, exact=True),
    "LA": lambda path: save(path, shape_on_nothing().convert("LA"), format="PNG"),
    "P": lambda path: palette(path, format="PNG", transparency=bytes([0, 128])),
    "GIF": lambda path: palette(path, format="GIF", transparency=0),
    "one colour of RGB": lambda path: save(path, Image.new("RGB", (4, 4)), format="PNG", transparency=(0, 0, 0)),
    "one grey of L": lambda path: save(path, Image.new("L", (4, 4), 9), format="PNG", transparency=9),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparency_is_laid_on_white(tmp_path: Path, kind: str) -> None:
    path = TRANSPARENT[kind](tmp_path / "a.png")
    with Image.open(path) as opened:
        expected = on_white(opened)
    np.testing.assert_array_equal(np.asarray(read_image(path)), expected)
    assert expected[0, 0].tolist() == [255, 255, 255]


def test_one_grey_of_16_bits_that_is_transparent_is_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[514, 25_700]], dtype=np.uint16))
    path = save(tmp_path / "a.png", image, transparency=514)
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [255, 100]


@pytest.mark.parametrize(("alpha", "notes"), [(255, ()), (254, (LAID_ON_WHITE,))])
def test_laying_on_white_is_noted_where_it_changed_something(tmp_path: Path, alpha: int, notes: tuple) -> None:
    with decoded(save(tmp_path / "a.png", Image.new("RGBA", (4, 4), (1, 2, 3, alpha)))) as found:
        assert found.notes == notes


# 16 bits


def test_12_bits_in_16_are_noted(tmp_path: Path) -> None:
    with decoded(save(tmp_path / "a.png", Image.fromarray(np.full((4, 4), 4095, np.uint16)))) as found:
        assert found.notes == (NEARLY_BLACK,)


@pytest.mark.parametrize("value", [-1, 65_536])
def test_32_bit_pixels_of_an_unknown_range_are_a_sentence(tmp_path: Path, value: int) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray(np.full((4, 4), value, np.int32)))
    with pytest.raises(DatasetError, match=rf"32-bit pixels from {value} to {value}, whose range is not known"):
        read_image(path)


def test_floating_point_pixels_are_a_sentence(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray(np.full((4, 4), 0.5, np.float32)))
    with pytest.raises(DatasetError, match="floating-point pixels, whose range is not known; save it with 8 or 16"):
        read_image(path)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "I;16"])
def test_a_large_image_is_converted_in_stripes_as_a_small_one_in_one_piece(kind: str) -> None:
    """1100 x 1000 pixels are more than a stripe, and their halves less."""
    random = np.random.default_rng(0)
    pixels = (random.integers(0, 65_536, (1000, 1100), dtype=np.uint16) if kind == "I;16"
              else random.integers(0, 256, (1000, 1100, 4), dtype=np.uint8))  # fmt: skip
    image = Image.fromarray(pixels)
    image = image.convert("LA") if kind == "LA" else image
    halves = [np.asarray(read_image(image.crop((0, top, 1100, top + 500)))) for top in (0, 500)]
    np.testing.assert_array_equal(np.asarray(read_image(image)), np.concatenate(halves))


# What may be opened


def test_an_eps_file_under_another_name_runs_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/it-ran\nexit 1\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)                        # as in a process that never asked
    path = save(tmp_path / "a.jpg", toy_image(0), format="EPS")
    with pytest.raises(DatasetError, match=r"a\.jpg cannot be read \(no picture in one of the formats JPEG, PNG, "):
        read_image(path)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("name", ["BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP", "AVIF"])
def test_a_picture_of_a_listed_format_is_read_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    assert read_image(save(tmp_path / "picture", toy_image(0), format=name)).size == (12, 10)


@pytest.mark.parametrize("name", ["ICO", "JPEG2000", "TGA", "PCX", "SGI", "DDS"])
def test_a_picture_of_another_format_is_refused(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "a.png", toy_image(0, size=(16, 16)), format=name)
    with pytest.raises(DatasetError, match="no picture in one of the formats"):
        read_image(path)


def png_header(width: int, height: int) -> bytes:
    """A whole PNG file without a pixel: what it claims is all there is."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "fault"),
    [
        (60_000, 1, "has 60000 x 1 pixels, one side more than 100 times the other: cut it"),
        (1, 4000, "has 1 x 4000 pixels, one side more than 100 times the other: cut it"),
        (101, 1, "has 101 x 1 pixels, one side more than 100 times the other: cut it"),
        (9460, 9460, "(has 9460 x 9460|has more than 89,478,485) pixels"),
        (20_000, 20_000, "has more than 89,478,485 pixels: scale it down"),
    ],
)
def test_pixels_that_are_too_many_are_refused_before_they_are_decoded(width: int, height: int, fault: str) -> None:
    with pytest.raises(DatasetError, match=f"^the image {fault}"):
        read_image(png_header(width, height))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixels_that_pillow_only_warns_of_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"^the image has 9460 x 9460 pixels, more than 89,478,485"):
        read_image(png_header(9460, 9460))


def test_pillow_warns_of_no_image_that_is_small_enough_for_us() -> None:
    """Warnings are errors here, and this is 0.01 % below our limit: it fails for want of pixels, not for its size."""
    with pytest.raises(DatasetError, match=r"^the image cannot be read \("):
        read_image(png_header(9459, 9459))


def test_an_aspect_of_100_is_read() -> None:
    assert read_image(Image.new("RGB", (100, 1))).size == (100, 1)


@pytest.mark.parametrize("pixels", [np.zeros((0, 4), np.uint8), np.zeros((4, 0, 3), np.uint8)])
def test_an_image_without_pixels_is_a_sentence(pixels: np.ndarray) -> None:
    with pytest.raises(DatasetError, match=r"the image (has \d x \d pixels|cannot be read)"):
        read_image(pixels)


def within(seconds: float, work: Callable[[], object]) -> BaseException | None:
    """What the work raised; a work that hangs fails here."""
    found: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
            found.append(None)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"no end in {seconds} seconds"
    return found[0]


def test_a_named_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    assert str(within(5, lambda: read_image(tmp_path / "a.jpg"))) == f"image {tmp_path}/a.jpg is no regular file"


def test_a_device_is_refused_at_once() -> None:
    assert str(within(5, lambda: read_image(Path("/dev/zero")))) == "image /dev/zero is no regular file"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is no regular file$"):
        read_image(tmp_path)


def test_a_name_that_is_too_long_is_a_sentence() -> None:
    with pytest.raises(DatasetError, match=r"cannot be read \(File name too long\)"):
        read_image(Path("a" * 300))


def test_a_damaged_avif_file_is_a_sentence(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", toy_image(0, size=(64, 64)), format="AVIF")
    whole, pixels = path.read_bytes(), path.read_bytes().index(b"mdat") + 4
    path.write_bytes(whole[:pixels] + bytes(len(whole) - pixels))
    with pytest.raises(DatasetError, match=r"a\.jpg cannot be read \(Failed to decode .+\): replace or remove it"):
        read_image(path)


def test_a_blp_file_under_another_name_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"BLP2" + struct.pack("<ibbbb", 1, 9, 9, 9, 0) + bytes(400))
    with pytest.raises(DatasetError, match=r"a\.tif cannot be read \(no picture in one of the formats"):
        read_image(tmp_path / "a.tif")


class Failing(Image.Image):
    """A picture whose decoder raises what decoders raise on odd days."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._mode, self._size, self._error = "RGB", (4, 4), error

    def load(self) -> None:
        raise self._error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("Decoding failed"), "Decoding failed"),
        (NotImplementedError("Unsupported\n  compression"), "Unsupported compression"),
        (IndexError(), "IndexError"),
        (OSError(5, "Input/output error", "/some/file"), "Input/output error"),
    ],
)
def test_whatever_a_decoder_raises_is_one_sentence(error: Exception, reason: str) -> None:
    with pytest.raises(DatasetError, match=rf"^the image cannot be read \({reason}\): replace or remove it$"):
        read_image(Failing(error))


def test_an_upright_photograph_whose_other_exif_data_cannot_be_written_anew_is_turned(tmp_path: Path) -> None:
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x0100, 2, 4, 0x00616263)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    assert read_image(save(tmp_path / "a.jpg", toy_image(0, size=(16, 8)), exif=exif)).size == (8, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", toy_image(0, size=(16, 8)), exif=exif)
    with Image.open(path) as opened:
        expected = ImageOps.exif_transpose(opened)
    np.testing.assert_array_equal(np.asarray(read_image(path)), np.asarray(expected))


# Pixels in flight


def test_images_wait_while_together_they_hold_more_than_the_limit() -> None:
    budget, order = _Budget(100), []

    def take(name: str, pixels: int) -> None:
        with budget.take(pixels):
            order.append(name)

    with budget.take(60):
        large = threading.Thread(target=take, args=("large", 41))
        large.start()
        take("small", 40)
        large.join(0.2)
        assert large.is_alive()
    large.join(5)
    assert order == ["small", "large"]


def test_an_image_that_fails_leaves_its_place_to_others() -> None:
    budget = _Budget(100)
    with pytest.raises(DatasetError, match="broken"), budget.take(100):
        raise DatasetError("broken")
    with budget.take(100):
        pass


def test_an_image_is_counted_while_it_is_used_and_no_longer() -> None:
    with decoded(Image.new("RGB", (30, 20))):
        assert _IN_FLIGHT._taken == 600
    assert _IN_FLIGHT._taken == 0


# Pictures in memory


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I"])
def test_a_picture_in_memory_of_any_mode_becomes_rgb(mode: str) -> None:
    assert read_image(Image.new(mode, (6, 4))).mode == "RGB"


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 4)])
def test_an_array_of_bytes_is_an_image(shape: tuple[int, ...]) -> None:
    assert read_image(np.full(shape, 255, np.uint8)).getpixel((5, 3)) == (255, 255, 255)


@pytest.mark.parametrize("pixels", [np.zeros((3, 4, 6), np.uint8), np.zeros((4, 6, 3)), np.zeros(9, np.uint8)])
def test_an_array_that_is_no_image_says_what_is_wanted(pixels: np.ndarray) -> None:
    with pytest.raises(DatasetError, match=r"is an array of \w+ \(.+\), not of uint8 \(h, w\), \(h, w, 3\) or"):
        read_image(pixels)


# What a file is by its content


@pytest.mark.parametrize("name", ["JPEG", "PNG", "AVIF", "GIF", "TIFF"])
def test_a_picture_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    assert is_picture(save(tmp_path / "no-suffix", toy_image(0), format=name))


@pytest.mark.parametrize("content", [b"", b"a text", b"\0\0\0\x18ftypheic\0\0\0\0", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_other_contents_are_no_pictures(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    assert not is_picture(tmp_path / "a.jpg")


def test_a_picture_that_is_too_large_is_one_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(png_header(20_000, 20_000))
    assert is_picture(tmp_path / "a")


# The pixels of this version

JPEG = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABQODxIPDRQSEBIXFRQYHjIhHhwcHj0sLiQySUBMS0dARkVQWnNiUFVtVkVGZIhlbXd7gYKBTmCNl4"
    "x9lnN+gXz/2wBDARUXFx4aHjshITt8U0ZTfHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHx8fHz/wAARCAAM"
    "ABADASIAAhEBAxEB/8QAHwAAAQUBAQEBAQEAAAAAAAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQRBRIhMUEGE1FhBy"
    "JxFDKBkaEII0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRkdISUpTVFVWV1hZWmNkZWZnaGlqc3R1dnd4eXqDhIWGh4iJipKT"
    "lJWWl5iZmqKjpKWmp6ipqrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3+Pn6/8QAHwEAAwEBAQEBAQEBAQAAAA"
    "AAAAECAwQFBgcICQoL/8QAtREAAgECBAQDBAcFBAQAAQJ3AAECAxEEBSExBhJBUQdhcRMiMoEIFEKRobHBCSMzUvAVYnLRChYkNOEl8RcYGRom"
    "JygpKjU2Nzg5OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6goOEhYaHiImKkpOUlZaXmJmaoqOkpaanqKmqsrO0tba3uLm6wsPExc"
    "bHyMnK0tPU1dbX2Nna4uPk5ebn6Onq8vP09fb3+Pn6/9oADAMBAAIRAxEAPwDnUi9akWLjgcduKnRAXx74qYKDtBHtWaYqdRn/2Q=="
)
"""16 x 12 pixels as libjpeg wrote them: this file also decides whether decoding stays as it is."""
GOLDEN = {
    "RGB": ["cc1f84264997", "642a974d8816", "c18e428f9aba", "a0c17544cc97", "bd463b09ff57", "3d9ab2acc7db"],
    "L": ["abfd26ec0ceb", "7c62bb562bb2", "30d845c9fd51", "205a8419e1f5", "26de409a3e8d", "ed18a802030d"],
    "P": ["46739514a752", "b47138a274df", "297ba36c85d9", "71eb97c37e38", "509490c58343", "1e3e4d9fb8c2"],
    "RGBA": ["3c056cbf83b3", "1b63e756bb19", "b40ed2c1bca3", "9fb3396a1418", "b129b8bcf8cd", "dc7e714b3412"],
    "LA": ["123dffb4aefe", "09b50760a514", "70ec9762b2b1", "5f8919807d55", "5727964c1bb3", "8e74763fe790"],
    "I;16": ["abfd26ec0ceb", "7c62bb562bb2", "30d845c9fd51", "205a8419e1f5", "26de409a3e8d", "ed18a802030d"],
    "turned": ["a6573dfb1edb", "033a81a8098c", "0b1e8708d647", "99f139adab05", "d1861a595a80", "fae61efe4cc5"],
    "JPEG": ["414f79f119bf", "f4041e556053", "834dbf350d3d", "630bf1a3a16f", "0fda6eb9d2cc", "8bd33ae8225b"],
}


def synthetic(mode: str, *, size: tuple[int, int] = (40, 28)) -> Image.Image:
    """A smooth picture with noise on it, in one of Pillow's modes; its bytes come from arithmetic of integers alone."""
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    noise = np.random.default_rng(7).integers(0, 40, (height, width), dtype=np.int64)
    planes = np.stack([5 * x + noise, 7 * y + noise, 3 * (x + y), 6 * x + noise], axis=2).clip(0, 255).astype(np.uint8)
    if mode == "I;16":
        wide = 257 * planes[..., 0].astype(np.int64) + 5 * noise                      # between two 8-bit values as well
        return Image.fromarray(wide.clip(0, 65535).astype(np.uint16))
    if mode == "P":
        image = Image.fromarray(planes[..., 0] // 4, mode="P")
        image.putpalette([value for i in range(64) for value in (4 * i, 255 - 4 * i, i)])
        return image
    bands = {"L": [0], "LA": [0, 3], "RGB": [0, 1, 2], "RGBA": [0, 1, 2, 3]}[mode]
    return Image.merge(mode, [Image.fromarray(planes[..., band]) for band in bands])


def golden_sources() -> dict[str, bytes | Image.Image]:
    turned = synthetic("RGB")
    turned.getexif()[0x0112] = 6
    modes = ("RGB", "L", "P", "RGBA", "LA", "I;16")
    return {**{mode: synthetic(mode) for mode in modes}, "turned": turned, "JPEG": base64.b64decode(JPEG)}


def digests(image: Image.Image) -> list[str]:
    """Of the test view and two training views, for either way of resizing."""
    transforms = (
        ImageTransform(size=16, mean=MEAN, std=STD),
        ImageTransform(size=16, mean=MEAN, std=STD, interpolation="bilinear", resize_mode="squash"),
    )
    views = [t.view(image, view=view, seed=1, image_digest="abc") for t in transforms for view in range(3)]
    return [hashlib.sha256(view.tobytes()).hexdigest()[:12] for view in views]


def test_another_version_of_the_pixels_is_another_transform(monkeypatch):
    before = ImageTransform(size=16, mean=MEAN, std=STD).digest
    monkeypatch.setattr("coop_core.data.views.PREPROCESSING", PREPROCESSING + 1)

    assert ImageTransform(size=16, mean=MEAN, std=STD).digest != before


@pytest.mark.parametrize("name", golden_sources())
def test_equal_files_give_the_pixels_of_this_version(name: str) -> None:
    found = digests(read_image(golden_sources()[name]))
    assert (PREPROCESSING, found) == (2, GOLDEN[name]), (
        "other pixels than features were computed from: raise views.PREPROCESSING and write the new digests here"
    )
