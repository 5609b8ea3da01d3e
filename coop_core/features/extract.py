"""Features: images of a split -> what the frozen image tower says of them, computed once.

Where the tower ends in a linear map, the store keeps what comes before it, and features are one product away: one image
pass serves methods that read either.
"""

import fcntl
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from coop_core.backbone import Backbone, Runtime
from coop_core.data.split import Split, SplitImage
from coop_core.data.views import ImageTransform
from coop_core.errors import ArtifactError, BackboneError
from coop_core.features.decoding import decode_ahead
from coop_core.features.store import FeatureStore
from coop_core.files import digest_json, read_array, read_json, write_array_in_pieces

_ROWS = 1024
"""Rows that are copied from the store at a time."""


def extract_features(
    backbone: Backbone,
    images: Sequence[SplitImage],
    *,
    root: Path,
    target: Path,
    store_folder: Path,
    views: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    unprojected: bool = False,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Write image tower outputs (n, views, d), float32, not normalised (the linear probe wants them so), to a npy file.

    `unprojected`: what comes before the tower's last linear map instead (n, views, p).

    View 0 is the test transform, the others are augmented by `seed`. Rows come from the store below
    `store_folder` where it has them; the others are computed, decoding while the model runs, and kept there.
    `target` is whole or absent. In memory are the images' keys and a few batches, however many images there are.
    """
    store = FeatureStore(store_folder / feature_key(backbone))
    names = ["0", *(f"{seed}:{view}" for view in range(1, views))]
    keys = [(image.digest, name) for image in images for name in names]
    missing = store.missing(keys)
    done = len(keys) - len(missing)
    progress(done)
    todo = ((images[position // views], position % views) for position in missing)
    upcoming = iter(missing)
    batches = iter(lambda: list(islice(todo, batch_size)), [])
    for pixels in decode_ahead(backbone.transform, batches, root=root, seed=seed, device=backbone.device):
        features = backbone.encode_unprojected(pixels.to(backbone.device, non_blocking=True)).cpu().numpy()
        positions = list(islice(upcoming, len(features)))
        _check_finite(features, [images[position // views] for position in positions], backbone)
        store.add([keys[position] for position in positions], features)
        done += len(features)
        progress(done)
    kept = (store.get(keys[start : start + _ROWS]) for start in range(0, len(keys), _ROWS))
    if backbone.projection is None or unprojected:
        rows, width = kept, store.width or feature_width(backbone)               # asked only of an empty store
    else:
        rows, width = (_projected(some, backbone) for some in kept), backbone.projection.weight.shape[1]
    write_array_in_pieces(target, rows, shape=(len(images), views, width), dtype=np.float32)


def features_in_memory(
    backbone: Backbone, images: Sequence[SplitImage], *, root: Path, store_folder: Path, **how: Any
) -> Tensor:
    """The same on the backbone's device; `how` as above. One process computes at a time, the others find it done."""
    store_folder.mkdir(parents=True, exist_ok=True)
    with (
        (store_folder / "computing.lock").open("w") as lock,
        tempfile.TemporaryDirectory(dir=store_folder) as folder,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = Path(folder) / "features.npy"
        extract_features(backbone, images, root=root, target=target, store_folder=store_folder, **how)
        return torch.from_numpy(np.array(read_array(target))).to(backbone.device)


def features_card(backbone: Backbone, split: Split, *, views: int) -> dict[str, Any]:
    """What the features of a split were made from, by digest; every consumer compares it (`load_features`)."""
    return {
        "backbone": backbone.name,
        "weights_digest": backbone.weights_digest,
        "transform_digest": backbone.transform.digest,
        "feature_key": feature_key(backbone),
        "train_digest": split.train_digest,
        "val_digest": split.val_digest,
        "test_digest": split.test_digest,
        "seed": split.seed,
        "views": views,
        "is_projected": backbone.projection is not None,
    }


def features_file(subset: str, *, unprojected: bool = False) -> str:
    return f"{subset}-unprojected.npy" if unprojected else f"{subset}.npy"


def load_features(
    folder: Path, subset: Literal["train", "val", "test"], split: Split, *, key: str, unprojected: bool = False
) -> np.ndarray:
    """What the features stage wrote for one subset (n, views, d), mapped into memory.

    `key` is `feature_key` of the backbone that the consumer works with. `unprojected`: what comes before the tower's
    last linear map (n, views, p), where it has one.

    Raises
    ------
    ArtifactError
        When the features are of another split, or of other weights or another preparation of images.
    """
    card = read_json(folder / "card.json")
    file = folder / features_file(subset, unprojected=unprojected and card.get("is_projected", False))
    features = read_array(file)
    ours = {f"{name}_digest": getattr(split, f"{name}_digest") for name in ("train", "val", "test")}
    ours["seed"] = split.seed
    if {name: card.get(name) for name in ours} != ours or len(features) != len(getattr(split, subset)):
        raise ArtifactError(f"{folder} holds the features of another split: run `dvc repro features`")
    if card.get("feature_key") != key:
        raise ArtifactError(f"{folder} holds features that {card.get('backbone')} computed with other weights or from "
                            "images prepared in another way: run `dvc repro -f features`")  # fmt: skip
    if features.shape[1] != (card["views"] if subset == "train" else 1):
        raise ArtifactError(f"{file} has {features.shape[1]} views, not those of its card: "
                            "run `dvc repro -f features`")  # fmt: skip
    return features


def normalised(features: np.ndarray, *, device: torch.device | str = "cpu") -> Tensor:
    """Image tower outputs (..., d) -> L2-normalised image features, float32."""
    return torch.nn.functional.normalize(torch.from_numpy(np.array(features)).float(), dim=-1).to(device)


def feature_key(backbone: Backbone) -> str:
    """What decides a feature besides the image: the weights, the transform, whether batch norm is folded, whether the
    last linear map is computed apart, and what runs the image tower."""
    return key_of(backbone.weights_digest, backbone.transform, folded=backbone.folded > 0,
                  projected_apart=backbone.projection is not None, runtime=backbone.image_runtime)  # fmt: skip


def key_of(
    weights_digest: str, transform: ImageTransform, *, folded: bool, projected_apart: bool, runtime: Runtime
) -> str:
    """`feature_key` of a backbone that is known by its card."""
    ways = [*["batch norm folded"] * folded, *["projected apart"] * projected_apart,
            *[f"by {runtime}"] * (runtime != "torch")]  # fmt: skip
    return digest_json([weights_digest, transform.digest, *ways])[:16]


def feature_width(backbone: Backbone) -> int:
    """Of what the store keeps: before the last linear map, where the tower has one."""
    size = backbone.transform.size
    return backbone.encode_unprojected(torch.zeros(1, 3, size, size)).shape[1]


def _projected(unprojected: np.ndarray, backbone: Backbone) -> np.ndarray:
    """(n, p) -> (n, d)"""
    return backbone.project(torch.from_numpy(unprojected).to(backbone.device)).cpu().numpy()


def _check_finite(features: np.ndarray, images: Sequence[SplitImage], backbone: Backbone) -> None:
    wrong = [image.path for image, row in zip(images, features, strict=True) if not np.isfinite(row).all()]
    if wrong:
        raise BackboneError(f"{backbone.name} computes features that are no numbers for {', '.join(wrong[:3])}: "
                            "set backbone.image_precision: float32, or another checkpoint")  # fmt: skip
