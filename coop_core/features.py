"""Features: images of a split -> what the frozen image tower says of them, computed once."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from coop_core.backbone import Backbone
from coop_core.errors import ArtifactError
from coop_core.feature_store import FeatureStore, Key
from coop_core.files import digest_json, read_array, read_json
from coop_core.images import read_image
from coop_core.split import Split, SplitImage

Request = tuple[SplitImage, int]
"""An image and the number of its view."""


def extract_features(
    backbone: Backbone,
    images: Sequence[SplitImage],
    *,
    root: Path,
    store_folder: Path,
    views: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], object] = lambda done: None,
) -> np.ndarray:
    """Image tower outputs (n, views, d), float32, not normalised (the linear probe wants them so).

    View 0 is the test transform, the others are augmented by `seed`. Rows come from the store below
    `store_folder` where it has them; the others are computed, decoding while the model runs, and kept there.
    """
    store = FeatureStore(store_folder / feature_key(backbone), width=feature_width(backbone))
    requests = [(image, view) for image in images for view in range(views)]
    keys = [_key(image, view, seed) for image, view in requests]
    missing = store.missing(keys)
    done = len(requests) - len(missing)
    progress(done)
    todo = [requests[position] for position in missing]
    for start, pixels in _batches(backbone, todo, root=root, seed=seed, batch_size=batch_size):
        features = backbone.encode_images(torch.from_numpy(pixels)).cpu().numpy()
        store.add([keys[position] for position in missing[start : start + len(features)]], features)
        done += len(features)
        progress(done)
    return store.get(keys).reshape(len(images), views, -1)


def load_features(folder: Path, subset: Literal["train", "val", "test"], split: Split) -> np.ndarray:
    """What the features stage wrote for one subset (n, views, d), mapped into memory.

    Raises
    ------
    ArtifactError
        When the features are of another split.
    """
    card = read_json(folder / "card.json")
    features = read_array(folder / f"{subset}.npy")
    ours = {"train_digest": split.train_digest, "test_digest": split.test_digest}
    if {name: card.get(name) for name in ours} != ours or len(features) != len(getattr(split, subset)):
        raise ArtifactError(f"{folder} holds the features of another split: run `dvc repro features`")
    return features


def normalised(features: np.ndarray, *, device: torch.device | str = "cpu") -> Tensor:
    """Image tower outputs (..., d) -> L2-normalised image features, float32."""
    return torch.nn.functional.normalize(torch.from_numpy(np.array(features)).float(), dim=-1).to(device)


def feature_key(backbone: Backbone) -> str:
    """What decides a feature besides the image: the weights and the transform."""
    return digest_json([backbone.weights_digest, backbone.transform.digest])[:16]


def feature_width(backbone: Backbone) -> int:
    size = backbone.transform.size
    return backbone.encode_images(torch.zeros(1, 3, size, size)).shape[1]


def _key(image: SplitImage, view: int, seed: int) -> Key:
    return image.digest, "0" if view == 0 else f"{seed}:{view}"


def _batches(
    backbone: Backbone, requests: Sequence[Request], *, root: Path, seed: int, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode ahead of the model, by at most two batches -> (position, pixels (b, 3, size, size))."""

    def pixels(request: Request) -> np.ndarray:
        image, view = request
        decoded = read_image(root / image.path)
        return backbone.transform.view(decoded, view=view, seed=seed, image_digest=image.digest)

    with ThreadPoolExecutor() as pool:
        waiting: deque[Future[np.ndarray]] = deque()
        upcoming = iter(requests)
        for start in range(0, len(requests), batch_size):
            wanted = min(batch_size, len(requests) - start)
            while len(waiting) < wanted + 2 * batch_size and (request := next(upcoming, None)) is not None:
                waiting.append(pool.submit(pixels, request))
            yield start, np.stack([waiting.popleft().result() for _ in range(wanted)])
