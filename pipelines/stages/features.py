"""features: the split's images -> artifacts/features, what the frozen image tower says of them."""

import itertools
import logging

from coop_core.data.dataset import read_dataset
from coop_core.data.split import located, read_split
from coop_core.features.extract import extract_features, features_card, features_file
from coop_core.files import write_json
from coop_core.params import load_params
from pipelines import console, paths
from pipelines.settings import choose_device, load_settings

log = logging.getLogger(__name__)


def main() -> None:
    params, settings = load_params(paths.PARAMS), load_settings()
    device = choose_device(settings)
    split = read_split(paths.SPLIT)
    training = located(split.train, read_dataset(paths.RAW)) if split.is_unlabelled else split.train
    backbone = params.backbone.load(device=device)
    params.method.check_backbone(backbone)
    log.info("backbone %s on %s", backbone.name, device)
    subsets = {"train": (training, params.features.views), "val": (split.val, 1), "test": (split.test, 1)}
    ways = (False, True) if backbone.projection else (False,)                     # the second finds all in the store
    for (name, (images, views)), unprojected in itertools.product(subsets.items(), ways):
        with console.progress(f"features of {name} images", len(images) * views) as update:
            extract_features(
                backbone,
                images,
                root=paths.RAW,
                target=paths.FEATURES / features_file(name, unprojected=unprojected),
                store_folder=settings.cache_folder / paths.FEATURE_STORE,
                views=views,
                seed=params.seed,
                batch_size=params.features.batch_size,
                unprojected=unprojected,
                progress=update,
            )
    write_json(paths.FEATURES / "card.json", features_card(backbone, split, views=params.features.views))


if __name__ == "__main__":
    console.run(main)
