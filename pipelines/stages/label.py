"""label: images without labels -> artifacts/labels, what zero-shot takes the surest of them for.

Where the training images have labels, an empty file that says so, and no backbone is loaded.
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch

from coop_core.backbone import Backbone
from coop_core.data.dataset import read_dataset
from coop_core.data.split import Split, located, read_split
from coop_core.features.extract import feature_key, features_in_memory, load_features
from coop_core.judging.label_file import write_labels
from coop_core.judging.pseudo_labels import Labeller, answer_pool, label_pool
from coop_core.params import Params, load_params
from pipelines import console, paths
from pipelines.settings import Settings, choose_device, load_settings

log = logging.getLogger(__name__)


def main() -> None:
    params, split = load_params(paths.PARAMS), read_split(paths.SPLIT)
    if not split.is_unlabelled:
        write_labels(paths.LABELS, None, split)
        return
    answers = answers_of(params, split, load_settings())
    labels = label_pool(split, answers, per_class=params.split.shots, min_confidence=params.split.min_confidence)
    log.info("%d of %d images without labels are learned from, labelled by %s", len(labels.chosen.rows),
             len(split.train), ", ".join(one.name for one in labels.labellers))  # fmt: skip
    write_labels(paths.LABELS, labels, split)


def answers_of(params: Params, split: Split, settings: Settings) -> Iterator[tuple[Labeller, np.ndarray]]:
    """The backbone's and each further one's, which is loaded when its turn comes."""
    device = choose_device(settings)
    backbone = params.backbone.load(device=device)
    known = load_features(paths.FEATURES, "train", split, key=feature_key(backbone))
    yield answer_pool(split, torch.from_numpy(np.array(known[:, 0])).to(device), backbone)
    for further in params.split.further_labellers:
        backbone = further.load(device=device)
        yield answer_pool(split, features_of(split, params, backbone, settings), backbone,
                          name=further.name)  # fmt: skip


def features_of(split: Split, params: Params, backbone: Backbone, settings: Settings) -> torch.Tensor:
    """The pool's image features (n, d) by a further backbone, from the store where it has them."""
    images = located(split.train, read_dataset(paths.RAW))
    with console.progress(f"features by {backbone.name}", len(images)) as update:
        return features_in_memory(
            backbone, images, root=paths.RAW, store_folder=settings.cache_folder / paths.FEATURE_STORE,
            batch_size=params.features.batch_size, progress=update,
        )[:, 0]  # fmt: skip


if __name__ == "__main__":
    console.run(main)
