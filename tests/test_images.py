"""Images: any file becomes upright RGB, view 0 is the papers' test transform, other views depend on what they say."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_images import paint, toy_image

from coop_core.backbone.torchvision_operators import declare_missing_operators
from coop_core.errors import DatasetError
from coop_core.files import write_array
from coop_core.images import ImageTransform, _random_crop, read_image

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
