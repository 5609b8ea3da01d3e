"""download: what dataset.source names -> data/raw, the data set in its normal form."""

import logging

from coop_core.params import load_params
from pipelines import console, paths
from pipelines.settings import load_settings
from pipelines.sources.datasets import bring_dataset

log = logging.getLogger(__name__)


def main() -> None:
    params, settings = load_params(paths.PARAMS).dataset, load_settings()
    with console.progress("checking images") as update:
        dataset = bring_dataset(params, paths.RAW, settings, progress=update)
    for note in dataset.about["notes"]:
        log.warning("%s: %s", dataset.name, note)
    log.info("%s: %d images of %d classes", dataset.name, len(dataset.images), len(dataset.class_names))


if __name__ == "__main__":
    console.run(main)
