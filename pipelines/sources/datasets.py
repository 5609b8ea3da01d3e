"""Data sets: what dataset.source names -> the data set in its normal form, in a folder or in the cache."""

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from coop_core.data.archives import appearing, remove_leftovers
from coop_core.data.catalog import read_class_names, read_source
from coop_core.data.dataset import Dataset, read_dataset
from coop_core.data.descriptions import read_descriptions
from coop_core.data.importers import import_dataset
from coop_core.errors import CoopError, DatasetError
from coop_core.params import DatasetParams
from pipelines import locks, paths
from pipelines.settings import Settings
from pipelines.sources.storage import fetch_files

log = logging.getLogger(__name__)


def bring_dataset(
    params: DatasetParams, target: Path, settings: Settings, *, progress: Callable[..., None] = lambda *done: None
) -> Dataset:
    """Fetch, check and write a data set, which takes the place of `target` whole or not at all."""
    with _in_turn(settings):
        remove_leftovers(target)
        with appearing(target) as arrived:
            dataset = _bring(params, arrived, settings, progress=progress)
    return dataclasses.replace(dataset, root=target)


def cached_dataset(params: DatasetParams, settings: Settings) -> Dataset:
    """As it is now, below the cache folder in a place named by its content."""
    with _in_turn(settings):
        return _bring_into_cache(params, settings)


def expected_dataset(digest: str, params: DatasetParams, settings: Settings) -> Dataset:
    """The data set with this content: from the cache, or brought anew.

    Raises
    ------
    DatasetError
        When the source now holds something else.
    """
    found = _kept(digest, settings)
    if not found:
        with _in_turn(settings):
            found = _kept(digest, settings) or _bring_into_cache(params, settings)
    if found.digest != digest:
        raise DatasetError(f"{params.source} here is not the data set of this sweep (digest {found.digest[:12]}, not "
                           f"{digest[:12]}): bring this machine's source up to date")  # fmt: skip
    return found


def _in_turn(settings: Settings) -> AbstractContextManager[None]:
    """The right to be the only process that brings data sets with this cache folder."""
    told = f"another process is bringing a data set into {settings.cache_folder}: waiting for it"
    return locks.in_turn(settings.cache_folder / "datasets.lock", meanwhile=told)


def _bring(params: DatasetParams, target: Path, settings: Settings, *, progress: Callable[..., None]) -> Dataset:
    if not paths.SOURCE.exists() and Path(params.source).is_relative_to(paths.SOURCE):
        raise DatasetError(f"{params.source} is not here yet: `dvc repro data.dvc` brings {paths.SOURCE}")
    card, beside = read_source(Path(params.source))
    if isinstance(card.descriptions, str):
        card = card.model_copy(update={"descriptions": read_descriptions(beside / card.descriptions)})
    if isinstance(card.class_names, str):
        card = card.model_copy(update={"class_names": read_class_names(beside / card.class_names)})
    root = fetch_files(card, beside, cache=settings.cache_folder / paths.DOWNLOADS, settings=settings)
    return import_dataset(
        card, root / card.path, target, test_fraction=params.test_fraction, accept=params.accept, progress=progress,
        pool=root / card.unlabelled if card.unlabelled else None,
    )  # fmt: skip


def _bring_into_cache(params: DatasetParams, settings: Settings) -> Dataset:
    cache = settings.cache_folder / paths.DATASETS
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(".partial-*"):  # by a kill
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as partial:
        arrived = Path(partial) / "dataset"
        digest = _bring(params, arrived, settings, progress=lambda *done: None).digest
        if kept := _kept(digest, settings):  # trainers may be reading it: it stays
            return kept
        target = cache / digest[:32]
        if target.exists():
            target.rename(Path(partial) / "damaged")
        arrived.rename(target)
    return read_dataset(target)


def _kept(digest: str, settings: Settings) -> Dataset | None:
    """The data set with this content in the cache, if it is there with all its files."""
    folder = settings.cache_folder / paths.DATASETS / digest[:32]
    if not folder.is_dir():
        return None
    try:
        dataset = read_dataset(folder)
    except (CoopError, OSError, ValueError, KeyError) as error:
        log.warning("data set %s in the cache is not whole (%s): it is brought anew", folder, error)
        return None
    lost = sum(not (folder / name).is_file() for name in {image.path.partition("#")[0] for image in dataset.images})
    if lost:
        log.warning("data set %s in the cache has lost %d files: it is brought anew", folder, lost)
    return None if lost else dataset
