"""Feature store: rows come back, are computed once, and a kill or a second process never spoils them."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from coop_core.feature_store import FeatureStore, Key

WIDTH = 6


def keys_of(names: str) -> list[Key]:
    return [(name, "0") for name in names]


def rows_of(names: str) -> np.ndarray:
    """The row that belongs to each name, (n, width)."""
    return np.stack([np.random.default_rng(ord(name)).normal(size=WIDTH) for name in names]).astype(np.float32)


def open_store(folder: Path, names: str = "") -> FeatureStore:
    store = FeatureStore(folder, width=WIDTH)
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
    assert open_store(tmp_path).get([]).shape == (0, WIDTH)


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


def test_a_reader_does_not_cut_off_the_line_that_a_writer_is_writing(tmp_path: Path) -> None:
    writer = open_store(tmp_path, "a")
    with writer._locked():  # as `add` does, caught between two flushes of the index
        with (tmp_path / "features.f32").open("ab") as features:
            features.write(rows_of("bc").tobytes())
        with (tmp_path / "index.txt").open("a") as index:
            index.write("b 0\nc")
            index.flush()
            assert open_store(tmp_path).missing(keys_of("ab")) == []
            index.write(" 0\n")
    assert_holds(tmp_path, "abc")
