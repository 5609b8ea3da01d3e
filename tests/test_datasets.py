"""Data sets: what a source holds arrives whole, in its own turn, and a cached one is trusted only while it is whole."""

import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from toy_images import paint, paint_classes

from coop_core.data.dataset import Dataset, read_dataset
from coop_core.errors import DatasetError
from coop_core.params import DatasetParams
from pipelines import locks
from pipelines.settings import Settings
from pipelines.sources.datasets import bring_dataset, cached_dataset, expected_dataset


@pytest.fixture
def params(tmp_path: Path) -> DatasetParams:
    return DatasetParams(source=str(paint_classes(tmp_path / "toys", {"cat": 4, "dog": 4})))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(_env_file=None, cache_folder=tmp_path / "cache")


def is_whole(dataset: Dataset) -> bool:
    return all((dataset.root / image.path).is_file() for image in dataset.images)


def test_a_data_set_takes_the_place_of_what_was_there(tmp_path, params, settings):
    paint(tmp_path / "raw/images/old/1.png", 1000)
    dataset = bring_dataset(params, tmp_path / "raw", settings)
    assert dataset == read_dataset(tmp_path / "raw")
    assert is_whole(dataset)
    assert sorted(path.name for path in (tmp_path / "raw/images").iterdir()) == ["cat", "dog"]


def test_a_source_with_a_fault_leaves_what_was_there(tmp_path, params, settings):
    before = bring_dataset(params, tmp_path / "raw", settings)
    (tmp_path / "toys/cat/0.png").write_text("no image")
    with pytest.raises(DatasetError, match="data set toys has 1 fault"):
        bring_dataset(params, tmp_path / "raw", settings)
    assert read_dataset(tmp_path / "raw") == before
    assert is_whole(before)


def test_nothing_partial_stays_beside_the_target_nor_in_the_cache(tmp_path, params, settings):
    for left in (".raw.partial-1/new", "cache/datasets/.partial-1/dataset"):  # by a kill
        (tmp_path / left).mkdir(parents=True)
    bring_dataset(params, tmp_path / "raw", settings)
    cached = cached_dataset(params, settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "raw", "toys"]
    assert list((tmp_path / "cache/datasets").iterdir()) == [cached.root]


def test_a_cached_data_set_that_is_whole_stays_as_it_is(params, settings):
    cached = cached_dataset(params, settings)
    (cached.root / "mark").touch()
    assert cached_dataset(params, settings) == cached
    assert (cached.root / "mark").exists()


@pytest.mark.parametrize("lost", ["images/cat/0.png", "images", "manifest.csv", "dataset.json"])
def test_a_cached_data_set_that_lost_something_is_brought_anew(params, settings, lost):
    cached = cached_dataset(params, settings)
    for again in (
        lambda: cached_dataset(params, settings),
        lambda: expected_dataset(cached.digest, params, settings),
    ):
        place = cached.root / lost
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        assert again() == cached
        assert is_whole(cached)


def test_an_expected_data_set_in_the_cache_needs_no_source(params, settings):
    cached = cached_dataset(params, settings)
    shutil.rmtree(params.source)
    assert expected_dataset(cached.digest, params, settings) == cached


def test_who_brings_a_data_set_second_waits_and_says_so(tmp_path, params, settings, caplog):
    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor(3) as pool:
        with locks.in_turn(settings.cache_folder / "datasets.lock", meanwhile=""):
            waiting = [
                pool.submit(bring_dataset, params, tmp_path / "raw", settings),
                pool.submit(cached_dataset, params, settings),
                pool.submit(expected_dataset, "0" * 64, params, settings),
            ]
            while sum(message.endswith("waiting for it") for message in caplog.messages) < 3:
                assert not any(one.done() for one in waiting)
                time.sleep(0.01)
            assert sorted(path.name for path in tmp_path.rglob("*.lock")) == ["datasets.lock"]
            assert not (tmp_path / "raw").exists()
        assert is_whole(waiting[0].result(timeout=20))
        assert is_whole(waiting[1].result(timeout=20))
        with pytest.raises(DatasetError, match="toys here is not the data set of this sweep"):
            waiting[2].result(timeout=20)
