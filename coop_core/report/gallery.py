"""Gallery: answers to test images -> the pictures that show what is confused and what is not."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coop_core.data.images import read_image

_GALLERY_CLASSES = 4
_GALLERY_IMAGES = 7
_THUMBNAIL = 96
"""Longer side in pixels."""


def galleries(
    confusion: np.ndarray, names: Sequence[str], predictions: Sequence[dict[str, Any]], image_root: Path
) -> dict[str, list[dict[str, Any]]]:
    """The worst classes with mistakes, the best ones with hits; in both the most confident answers first."""
    tested = confusion.sum(axis=1)
    accuracy = confusion.diagonal() / np.maximum(tested, 1)
    ordered = sorted(np.flatnonzero(tested).tolist(), key=lambda label: (accuracy[label], label))
    each = min(_GALLERY_CLASSES, max(1, len(ordered) // 2))
    worst = [label for label in ordered[:each] if accuracy[label] < 1]
    best = [label for label in ordered[::-1][:each] if accuracy[label] > 0]
    answers = sorted(predictions, key=lambda answer: (-answer["confidence"], answer["path"]))

    def gallery(label: int, *, hits: bool) -> dict[str, Any]:
        fitting = [a for a in answers if a["label"] == label and (a["predicted"] == label) == hits]
        images = [
            {**a, "source": _thumbnail(image_root / a["path"]), "predicted": names[a["predicted"]]}
            for a in fitting[:_GALLERY_IMAGES]
        ]
        return {"name": names[label], "accuracy": accuracy[label], "count": int(tested[label]), "images": images}

    return {
        "worst": [gallery(label, hits=False) for label in worst],
        "best": [gallery(label, hits=True) for label in best],
    }


def _thumbnail(path: Path) -> str:
    """An image as a small JPEG in a data URI."""
    image = read_image(path)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
