"""Feature store, and the file that is made of it: rows come back, are computed once, and no kill spoils them."""

import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_images import paint

from coop_core.backbone import Backbone
from coop_core.data.images import read_image
from coop_core.data.split import SplitImage
from coop_core.data.views import ImageTransform
from coop_core.errors import BackboneError, DatasetError
from coop_core.features.extract import extract_features
from coop_core.features.store import FeatureStore, Key
from coop_core.files import digest_file, read_array, write_array, write_array_in_pieces

WIDTH = 6
TRANSFORM = ImageTransform(size=4, mean=(0.5, 0.5, 0.5), std=(0.2, 0.3, 0.4))


def keys_of(names: str) -> list[Key]:
    return [(name, "0") for name in names]


def rows_of(names: str) -> np.ndarray:
    """The row that belongs to each name, (n, width)."""
    return np.stack([np.random.default_rng(ord(name)).normal(size=WIDTH) for name in names]).astype(np.float32)


def line_of(name: str) -> str:
    """The index line of a row, as the store writes it."""
    return f"{name} 0 {zlib.crc32(rows_of(name)):08x}\n"


def open_store(folder: Path, names: str = "") -> FeatureStore:
    store = FeatureStore(folder)
    if names:
        store.add(keys_of(names), rows_of(names))
    return store


def assert_holds(folder: Path, names: Sequence[str]) -> None:
    store = open_store(folder)
    assert store.missing(keys_of("".join(names))) == []
    np.testing.assert_array_equal(store.get(keys_of("".join(names))), rows_of("".join(names)))


def test_rows_come_back_bit_for_bit_in_the_order_that_is_asked(tmp_path: Path) -> None:
    store = open_store(tmp_path, "abc")
    np.testing.assert_array_equal(store.get(keys_of("cab")), rows_of("cab"))


def test_rows_outlive_the_store_that_wrote_them(tmp_path: Path) -> None:
    open_store(tmp_path, "ab")
    open_store(tmp_path, "c")
    assert_holds(tmp_path, "abc")


def test_a_key_may_be_asked_for_twice(tmp_path: Path) -> None:
    np.testing.assert_array_equal(open_store(tmp_path, "ab").get(keys_of("aba")), rows_of("aba"))


def test_views_of_one_image_are_different_rows(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.add([("a", "0"), ("a", "1:1"), ("a", "2:1")], rows_of("xyz"))
    np.testing.assert_array_equal(store.get([("a", "2:1"), ("a", "0")]), rows_of("zx"))


def test_everything_is_missing_in_a_new_store(tmp_path: Path) -> None:
    assert open_store(tmp_path / "deep" / "er").missing(keys_of("ab")) == [0, 1]


def test_positions_of_missing_keys_are_told(tmp_path: Path) -> None:
    assert open_store(tmp_path, "ac").missing(keys_of("abcd")) == [1, 3]


def test_a_missing_key_that_is_asked_for_twice_is_to_be_computed_once(tmp_path: Path) -> None:
    assert open_store(tmp_path, "a").missing(keys_of("babcb")) == [0, 3]


def test_rows_of_other_types_are_kept_as_float32(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.add(keys_of("a"), rows_of("a").astype(np.float64))
    assert store.get(keys_of("a")).dtype == np.float32
    np.testing.assert_array_equal(store.get(keys_of("a")), rows_of("a"))


def test_nothing_can_be_asked_of_an_empty_store(tmp_path: Path) -> None:
    assert open_store(tmp_path).get([]).shape == (0, 0)


@pytest.mark.parametrize("names", ["", "a"], ids=["an empty store", "a store with other rows"])
def test_a_row_that_was_never_added_is_an_error_not_zeros(tmp_path: Path, names: str) -> None:
    store = open_store(tmp_path, names)
    with pytest.raises(KeyError, match="b"):
        store.get(keys_of("b"))


def test_adding_known_keys_again_keeps_the_first_rows(tmp_path: Path) -> None:
    store = open_store(tmp_path, "ab")
    store.add(keys_of("bc"), np.stack([rows_of("z")[0], rows_of("c")[0]]))
    assert_holds(tmp_path, "abc")


def test_a_key_twice_in_one_call_does_not_shift_later_rows(tmp_path: Path) -> None:
    store = open_store(tmp_path, "aa")
    store.add(keys_of("b"), rows_of("b"))
    store.add(keys_of("c"), rows_of("c"))
    assert_holds(tmp_path, "abc")


# After a kill


def test_a_torn_index_line_is_ignored_and_overwritten(tmp_path: Path) -> None:
    open_store(tmp_path, "ab")
    with (tmp_path / "index.txt").open("a") as index:
        index.write("c")
    with (tmp_path / "features.f32").open("ab") as features:
        features.write(rows_of("z").tobytes())
    store = open_store(tmp_path)
    assert store.missing(keys_of("abc")) == [2]
    store.add(keys_of("c"), rows_of("c"))
    assert_holds(tmp_path, "abc")


def test_a_torn_line_that_looks_whole_but_for_its_end_does_not_count(tmp_path: Path) -> None:
    open_store(tmp_path, "ab")
    os.truncate(tmp_path / "index.txt", (tmp_path / "index.txt").stat().st_size - 1)
    assert open_store(tmp_path).missing(keys_of("ab")) == [1]


@pytest.mark.parametrize("extra", [1, 4, WIDTH * 4, WIDTH * 4 + 3])
def test_row_bytes_beyond_the_index_are_ignored_and_overwritten(tmp_path: Path, extra: int) -> None:
    open_store(tmp_path, "ab")
    with (tmp_path / "features.f32").open("ab") as features:
        features.write(b"\xff" * extra)
    assert_holds(tmp_path, "ab")
    open_store(tmp_path, "c")
    assert_holds(tmp_path, "abc")
    assert (tmp_path / "features.f32").stat().st_size == 3 * WIDTH * 4


def test_a_kill_between_the_first_rows_and_their_lines_leaves_an_empty_store(tmp_path: Path) -> None:
    (tmp_path / "features.f32").write_bytes(rows_of("z").tobytes())
    assert open_store(tmp_path).missing(keys_of("a")) == [0]
    open_store(tmp_path, "a")
    assert_holds(tmp_path, "a")


def test_the_store_that_was_open_during_the_tear_goes_on(tmp_path: Path) -> None:
    store = open_store(tmp_path, "a")
    with (tmp_path / "index.txt").open("a") as index:
        index.write("b 0")
    store.add(keys_of("b"), rows_of("b"))
    assert_holds(tmp_path, "ab")


# What is read of the index


def test_what_is_known_of_the_index_is_not_read_again(tmp_path: Path) -> None:
    store = open_store(tmp_path, "ab")
    with (tmp_path / "index.txt").open("r+b") as index:
        index.write(b"#" * 7)  # would be a fault, or another digest, to whoever reads it
    store.add(keys_of("c"), rows_of("c"))
    assert store.missing(keys_of("abcd")) == [3]
    np.testing.assert_array_equal(store.get(keys_of("cba")), rows_of("cba"))


def test_half_a_line_is_read_whole_when_its_writer_has_ended_it(tmp_path: Path) -> None:
    open_store(tmp_path, "a")
    with (tmp_path / "features.f32").open("ab") as features:
        features.write(rows_of("b").tobytes())
    with (tmp_path / "index.txt").open("a") as index:
        index.write("b")
        index.flush()
        reader = open_store(tmp_path)
        assert reader.missing(keys_of("ab")) == [1]
        index.write(line_of("b")[1:])
    assert reader.missing(keys_of("ab")) == []
    np.testing.assert_array_equal(reader.get(keys_of("ab")), rows_of("ab"))


def test_a_reader_follows_when_another_store_cuts_off_a_torn_line(tmp_path: Path) -> None:
    writer = open_store(tmp_path, "a")
    with (tmp_path / "index.txt").open("a") as index:
        index.write("zzzzzz")
    reader = open_store(tmp_path)
    writer.add(keys_of("bc"), rows_of("bc"))
    assert reader.missing(keys_of("abcz")) == [3]
    np.testing.assert_array_equal(reader.get(keys_of("cab")), rows_of("cab"))


# A store that is not what it wrote


def zero_a_row(folder: Path) -> None:
    with (folder / "features.f32").open("r+b") as rows:
        rows.seek(WIDTH * 4)
        rows.write(bytes(WIDTH * 4))


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "features.f32").read_bytes())
    data[WIDTH * 4 + 3] ^= 1
    (folder / "features.f32").write_bytes(data)


def cut_the_rows(folder: Path) -> None:
    os.truncate(folder / "features.f32", WIDTH * 4 + 2)


def spoil_a_line(folder: Path) -> None:
    lines = (folder / "index.txt").read_bytes().split(b"\n")
    (folder / "index.txt").write_bytes(b"\n".join([*lines[:2], b"\xff\xfe nonsense", *lines[3:]]))


def spoil_the_head(folder: Path) -> None:
    (folder / "index.txt").write_bytes((folder / "index.txt").read_bytes().replace(b"width 6", b"width x"))


def lose_the_rows(folder: Path) -> None:
    (folder / "features.f32").unlink()


@pytest.mark.parametrize(
    "spoil", [zero_a_row, flip_a_bit, cut_the_rows, spoil_a_line, spoil_the_head, lose_the_rows]
)
def test_a_damaged_store_is_begun_anew_with_one_line_in_the_log(tmp_path: Path, spoil, caplog) -> None:
    open_store(tmp_path, "abc")
    spoil(tmp_path)
    store = open_store(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert store.missing(keys_of("abc")) == [0, 1, 2]
        store.add(keys_of("abc"), rows_of("abc"))
    assert_holds(tmp_path, "abc")
    assert [record.message.count("is damaged") for record in caplog.records] == [1]


def test_rows_of_another_width_begin_a_store_anew(tmp_path: Path, caplog) -> None:
    open_store(tmp_path, "ab")
    open_store(tmp_path).add(keys_of("c"), rows_of("c")[:, :4])
    assert open_store(tmp_path).missing(keys_of("abc")) == [0, 1]
    assert "width" in caplog.text


def test_a_store_that_another_process_began_anew_is_read_anew(tmp_path: Path) -> None:
    first, second = open_store(tmp_path, "abc"), open_store(tmp_path)
    assert second.missing(keys_of("abc")) == []
    zero_a_row(tmp_path)
    assert open_store(tmp_path).missing(keys_of("b")) == [0]
    first.add(keys_of("b"), rows_of("b"))
    assert second.missing(keys_of("abc")) == [0, 2]
    np.testing.assert_array_equal(second.get(keys_of("b")), rows_of("b"))


def test_rows_are_on_the_disk_before_their_lines(tmp_path: Path, monkeypatch) -> None:
    """A crash of the machine between the two must not leave lines without rows."""
    lines_at_sync = []
    index = tmp_path / "index.txt"
    monkeypatch.setattr(os, "fsync", lambda file: lines_at_sync.append(index.exists() and index.read_text()))
    open_store(tmp_path, "a")
    assert lines_at_sync == [False]


# Two stores on one folder


def test_two_stores_see_each_others_rows(tmp_path: Path) -> None:
    first, second = open_store(tmp_path), open_store(tmp_path)
    first.add(keys_of("a"), rows_of("a"))
    second.add(keys_of("b"), rows_of("b"))
    for store in (first, second):
        assert store.missing(keys_of("abc")) == [2]
        np.testing.assert_array_equal(store.get(keys_of("ab")), rows_of("ab"))


def test_a_key_that_another_store_has_added_meanwhile_is_kept_once(tmp_path: Path) -> None:
    first, second = open_store(tmp_path), open_store(tmp_path)
    assert first.missing(keys_of("ab")) == second.missing(keys_of("ab")) == [0, 1]
    first.add(keys_of("ab"), rows_of("ab"))
    second.add(keys_of("abc"), rows_of("abc"))
    assert_holds(tmp_path, "abc")
    assert (tmp_path / "features.f32").stat().st_size == 3 * WIDTH * 4


def test_rows_of_stores_that_take_turns_do_not_mix(tmp_path: Path) -> None:
    first, second = open_store(tmp_path), open_store(tmp_path)
    for i in range(0, 20, 2):
        first.add(keys_of(chr(97 + i)), rows_of(chr(97 + i)))
        second.add(keys_of(chr(98 + i)), rows_of(chr(98 + i)))
    assert_holds(tmp_path, "abcdefghijklmnopqrst")


def test_stores_that_add_at_the_same_time_keep_every_row_once(tmp_path: Path) -> None:
    def add(first: int) -> None:
        store = open_store(tmp_path)
        for i in range(first, first + 12):
            names = chr(97 + i) + chr(98 + i)
            store.add(keys_of(names), rows_of(names))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(add, (0, 4, 8)))
    assert_holds(tmp_path, "abcdefghijklmnopqrstu")
    assert (tmp_path / "features.f32").stat().st_size == 21 * WIDTH * 4


def test_a_reader_does_not_cut_off_the_line_that_a_writer_is_writing(tmp_path: Path) -> None:
    writer = open_store(tmp_path, "a")
    with writer._locked():  # as `add` does, caught between two flushes of the index
        with (tmp_path / "features.f32").open("ab") as features:
            features.write(rows_of("bc").tobytes())
        with (tmp_path / "index.txt").open("a") as index:
            index.write(line_of("b") + "c")
            index.flush()
            assert open_store(tmp_path).missing(keys_of("ab")) == []
            index.write(line_of("c")[1:])
    assert_holds(tmp_path, "abc")


# From the store to a file


class Tower(nn.Module):
    """An image tower that says some pixels of the image, counts images, and is killed at some batch."""

    def __init__(self, *, killed_at: int | None = None) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.killed_at = killed_at

    def forward(self, pixels: Tensor) -> Tensor:
        if len(self.batches) == self.killed_at:
            raise KeyboardInterrupt
        self.batches.append(len(pixels))
        return pixels[:, :, ::2, 1].flatten(1).clone()  # (n, WIDTH)

    @property
    def images(self) -> int:
        return sum(self.batches)


def backbone_of(tower: Tower) -> Backbone:
    nothing = dict[str, Tensor]
    return Backbone(
        architecture="toy", pretrained=None, image_precision="float32", family="toy", transform=TRANSFORM,
        logit_scale=1.0, image_tower=tower,
        load_text_tower=lambda: pytest.fail("the images need no text tower"), load_weights=nothing, config={},
        device=torch.device("cpu"),
    )  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> list[SplitImage]:
    """Seven, the fifth of which is a copy of the second."""
    paths = [paint(tmp_path / "images" / f"{i}.png", 1 if i == 4 else i) for i in range(7)]
    return [SplitImage(path.name, 0, digest_file(path)) for path in paths]


def extract(folder: Path, images: Sequence[SplitImage], tower: Tower, *, store: str = "store", views: int = 1) -> Path:
    target = folder / "out" / "train.npy"
    extract_features(
        backbone_of(tower), images, root=folder / "images", target=target, store_folder=folder / store, views=views,
        seed=3, batch_size=2,
    )  # fmt: skip
    return target


def straightforward(folder: Path, images: Sequence[SplitImage], *, views: int) -> np.ndarray:
    """Every image and view by itself, all in one array (n, views, d)."""
    tower = Tower()
    rows = []
    for image in images:
        decoded = read_image(folder / "images" / image.path)
        pixels = [TRANSFORM.view(decoded, view=v, seed=3, image_digest=image.digest) for v in range(views)]
        rows.append(tower(torch.from_numpy(np.stack(pixels))).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("views", [1, 3])
def test_the_file_holds_every_image_and_view_in_order(tmp_path: Path, images: list[SplitImage], views: int) -> None:
    found = read_array(extract(tmp_path, images, Tower(), views=views))
    assert found.shape == (7, views, WIDTH)
    np.testing.assert_array_equal(found, straightforward(tmp_path, images, views=views))


def test_features_that_are_no_numbers_are_refused_and_not_kept(tmp_path: Path, images: list[SplitImage]) -> None:
    class Overflowing(Tower):
        def forward(self, pixels: Tensor) -> Tensor:
            return super().forward(pixels) * (float("inf") if len(self.batches) == 2 else 1.0)

    with pytest.raises(BackboneError, match=r"no numbers for 2\.png, 3\.png: set backbone.image_precision: float32"):
        extract(tmp_path, images, Overflowing())
    tower = Tower()
    extract(tmp_path, images, tower)
    assert tower.images == 4  # of six different ones the first two were sound


def test_the_file_is_byte_for_byte_that_of_the_whole_array(tmp_path: Path, images: list[SplitImage]) -> None:
    write_array(tmp_path / "whole.npy", straightforward(tmp_path, images, views=2))
    target = extract(tmp_path, images, Tower(), views=2)
    assert target.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_an_image_and_its_copy_are_computed_once(tmp_path: Path, images: list[SplitImage]) -> None:
    tower = Tower()
    extract(tmp_path, images, tower)
    assert tower.images == 6


def test_no_images_make_an_array_without_rows(tmp_path: Path) -> None:
    assert read_array(extract(tmp_path, [], Tower(), views=2)).shape == (0, 2, WIDTH)


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_killed_extraction_leaves_no_file(tmp_path: Path, images: list[SplitImage], batches: int) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        extract(tmp_path, images, Tower(killed_at=batches))
    assert not (tmp_path / "out").exists()


def test_a_killed_extraction_leaves_the_file_of_an_earlier_one(tmp_path: Path, images: list[SplitImage]) -> None:
    before = extract(tmp_path, images[:1], Tower()).read_bytes()
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        extract(tmp_path, images, Tower(killed_at=1))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {"train.npy": before}


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_an_extraction_that_goes_on_computes_only_the_rest(
    tmp_path: Path, images: list[SplitImage], batches: int
) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        extract(tmp_path, images, Tower(killed_at=batches))
    tower = Tower()
    extract(tmp_path, images, tower)
    assert tower.images == 6 - 2 * batches


def test_an_extraction_that_went_on_ends_with_the_same_bytes(tmp_path: Path, images: list[SplitImage]) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        extract(tmp_path, images, Tower(killed_at=1))
    resumed = extract(tmp_path, images, Tower()).read_bytes()
    assert resumed == extract(tmp_path, images, Tower(), store="another").read_bytes()


def test_an_image_that_cannot_be_read_keeps_what_came_before_it(tmp_path: Path, images: list[SplitImage]) -> None:
    (tmp_path / "images" / "6.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"6\.png cannot be read"):
        extract(tmp_path, images, Tower())
    paint(tmp_path / "images" / "6.png", 6)
    tower = Tower()
    extract(tmp_path, images, tower)
    assert tower.images == 2


def test_a_write_that_fails_between_two_pieces_leaves_the_old_file_alone(tmp_path: Path) -> None:
    def pieces() -> Iterator[np.ndarray]:
        yield rows_of("a")
        raise OSError("no space left on device")

    write_array(tmp_path / "a.npy", rows_of("z"))
    with pytest.raises(OSError, match="no space left"):
        write_array_in_pieces(tmp_path / "a.npy", pieces(), shape=(2, WIDTH), dtype=np.float32)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), rows_of("z"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
