"""download: what dataset.source names -> data/raw, the data set in its normal form."""

import logging
import shutil
from pathlib import Path

from coop_core.catalog import read_source
from coop_core.importers import import_dataset
from coop_core.params import load_params
from pipelines import console, paths
from pipelines.settings import load_settings
from pipelines.storage import fetch_card

log = logging.getLogger(__name__)


def main() -> None:
    params, settings = load_params(paths.PARAMS).dataset, load_settings()
    card, beside = read_source(Path(params.source))
    folder = fetch_card(card, beside, cache=settings.cache_folder / paths.DOWNLOADS, settings=settings)
    shutil.rmtree(paths.RAW, ignore_errors=True)
    with console.progress(f"checking images of {card.name}") as update:
        dataset = import_dataset(
            card, folder, paths.RAW, test_fraction=params.test_fraction, accept=params.accept, progress=update
        )
    for note in dataset.about["notes"]:
        log.warning("%s: %s", dataset.name, note)
    log.info("%s: %d images of %d classes", dataset.name, len(dataset.images), len(dataset.class_names))


if __name__ == "__main__":
    console.run(main)
