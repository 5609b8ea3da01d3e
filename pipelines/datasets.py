"""Data sets: what dataset.source names -> the data set in its normal form, in a folder or in the cache."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from coop_core.catalog import read_source
from coop_core.dataset import Dataset, read_dataset
from coop_core.errors import DatasetError
from coop_core.importers import import_dataset
from coop_core.params import DatasetParams
from pipelines import paths
from pipelines.settings import Settings
from pipelines.storage import fetch_card

_STALE_SECONDS = 86_400


def bring_dataset(
    params: DatasetParams, target: Path, settings: Settings, *, progress: Callable[..., None] = lambda *done: None
) -> Dataset:
    """Fetch, check and write into `target`, which is emptied first."""
    if not paths.SOURCE.exists() and Path(params.source).is_relative_to(paths.SOURCE):
        raise DatasetError(f"{params.source} is not here yet: `dvc repro data.dvc` brings {paths.SOURCE}")
    card, beside = read_source(Path(params.source))
    folder = fetch_card(card, beside, cache=settings.cache_folder / paths.DOWNLOADS, settings=settings)
    shutil.rmtree(target, ignore_errors=True)
    return import_dataset(
        card, folder, target, test_fraction=params.test_fraction, accept=params.accept, progress=progress
    )


def cached_dataset(params: DatasetParams, settings: Settings) -> Dataset:
    """As it is now, below the cache folder in a place named by its content."""
    cache = settings.cache_folder / paths.DATASETS
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(".partial-*"):  # by a kill; another process may be at work in a younger one
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as partial:
        arrived = Path(partial) / "dataset"
        target = cache / bring_dataset(params, arrived, settings).digest[:32]
        try:
            arrived.rename(target)
        except OSError:  # there already
            if not (target / "dataset.json").exists():
                raise
    return read_dataset(target)


def expected_dataset(digest: str, params: DatasetParams, settings: Settings) -> Dataset:
    """The data set with this content: from the cache, or brought anew.

    Raises
    ------
    DatasetError
        When the source now holds something else.
    """
    kept = settings.cache_folder / paths.DATASETS / digest[:32]
    found = read_dataset(kept) if (kept / "dataset.json").exists() else cached_dataset(params, settings)
    if found.digest != digest:
        raise DatasetError(f"{params.source} here is not the data set of this sweep (digest {found.digest[:12]}, not "
                           f"{digest[:12]}): bring this machine's source up to date")  # fmt: skip
    return found
