"""Decoding: images and their views, batch by batch -> pixels, ahead of the model that reads them."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coop_core.data.images import decoded
from coop_core.data.split import SplitImage
from coop_core.data.views import ImageTransform

Request = tuple[SplitImage, int]
"""An image and the number of its view."""
_AHEAD = 2
"""Batches that are decoded ahead of the model."""


def decode_ahead(
    transform: ImageTransform,
    batches: Iterable[Sequence[Request]],
    *,
    root: Path,
    seed: int,
    device: torch.device | str,
) -> Iterator[Tensor]:
    """Batches of requests -> pixels (b, 3, size, size) on the CPU, decoded in as many threads as there are cores.

    The threads write into the batch itself, page-locked for a CUDA device, which then copies it while others decode.
    An image that cannot be read is raised with its batch.
    """
    size, pinned = transform.size, torch.device(device).type == "cuda"

    def decode(request: Request, row: np.ndarray) -> None:
        image, view = request
        with decoded(root / image.path) as found:
            transform.view(found.image, view=view, seed=seed, image_digest=image.digest, out=row)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
        for batch in batches:
            pixels = torch.empty(len(batch), 3, size, size, pin_memory=pinned)
            rows = zip(batch, pixels.numpy(), strict=True)
            waiting.append((pixels, [pool.submit(decode, request, row) for request, row in rows]))
            if len(waiting) > _AHEAD:
                yield _whole(*waiting.popleft())
        while waiting:
            yield _whole(*waiting.popleft())


def _whole(pixels: Tensor, rows: Sequence[Future[None]]) -> Tensor:
    """The batch when all its rows are there."""
    for row in rows:
        row.result()
    return pixels
