"""Predictor: an artefact and its backbone -> labels and probabilities for images."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from coop_core.answering import answerer, encoded
from coop_core.artifact import Artifact, check_backbone, read_artifact
from coop_core.backbone import Backbone
from coop_core.data.images import Source, decoded
from coop_core.errors import DatasetError
from coop_core.judging.seen import small

_AHEAD = 2
"""Batches that are decoded ahead of the model."""


@dataclass(frozen=True)
class Prediction:
    labels: tuple[str, ...]
    """Class names, the most probable first."""
    probabilities: tuple[float, ...]
    threshold: float = 0.0
    """The least probability that is an answer."""
    feature: np.ndarray | None = field(default=None, compare=False, repr=False)
    """What it was answered from (d,), as `judging.seen.small` has it, where the predictor was told to hand it out."""

    @property
    def answer(self) -> str | None:
        """The most probable class, or None where that is not probable enough."""
        return self.labels[0] if self.probabilities[0] >= self.threshold else None


class Predictor:
    """One image pass and, where the prompt collapses, one matrix product an image; the text tower is needed for other
    classes and for methods that do not collapse."""

    def __init__(
        self,
        artifact: Artifact,
        backbone: Backbone,
        class_names: Sequence[str] | None = None,
        *,
        with_features: bool = False,
    ) -> None:
        """Answer with the artefact's own classes, or re-bind what was learned to `class_names`.

        `with_features`: every prediction carries the feature that it was answered from.

        Raises
        ------
        ArtifactError
            For another backbone, or other classes for a method that knows its own alone.
        """
        check_backbone(artifact, backbone)
        self.backbone = backbone
        self.class_names = tuple(class_names or artifact.class_names)
        self._with_features = with_features
        self._answerer = answerer(artifact, backbone=backbone, class_names=self.class_names)

    def __repr__(self) -> str:
        return f"Predictor({len(self.class_names)} classes, {self.backbone!r})"

    @classmethod
    def load(
        cls, folder: Path, *, class_names: Sequence[str] | None = None, device: torch.device | str = "cpu"
    ) -> "Predictor":
        """From an artefact's folder, with the backbone that its card names."""
        artifact = read_artifact(folder)
        return cls(artifact, artifact.load_backbone(device=device), class_names)

    def predict(
        self, images: Iterable[Source | str], *, top: int | None = None, batch_size: int = 32
    ) -> list[Prediction]:
        """Files, their bytes, PIL images of any mode or uint8 arrays -> the `top` most probable classes of each
        (all of them by default).

        Raises
        ------
        DatasetError
            For the first image that cannot be read.
        """
        found = []
        for answer in self.answers(images, top=top, batch_size=batch_size):
            if isinstance(answer, DatasetError):
                raise answer
            found.append(answer)
        return found

    def answers(
        self, images: Iterable[Source | str], *, top: int | None = None, batch_size: int = 32
    ) -> Iterator[Prediction | DatasetError]:
        """As `predict`, one after another; an image that cannot be read gets its fault in place of an answer.

        Images are decoded ahead of the model, and only views of a few batches are in memory, however many there are.
        """
        if isinstance(images, str | bytes | Path | Image.Image | np.ndarray):
            raise DatasetError("a list of images is wanted, not one: write [image], or list(images) of an array")
        if top is not None and top < 1:
            raise DatasetError(f"top is {top}, but counts the classes to show: give 1 or more")
        if batch_size < 1:
            raise DatasetError(f"batch_size is {batch_size}: give 1 or more")
        return self._answers(iter(images), top=top, batch_size=batch_size)

    def view(self, image: Source | str) -> np.ndarray | DatasetError:
        """The test view (3, size, size), or why there is none."""
        if isinstance(image, str):
            image = Path(image)
        if not isinstance(image, Path | bytes | Image.Image | np.ndarray):
            return DatasetError(f"the image is a {type(image).__name__}: give a path, a file's bytes, a PIL image or "
                                "an array of uint8")  # fmt: skip
        try:
            with decoded(image) as found:
                return self.backbone.transform.test_view(found.image)
        except DatasetError as error:
            return error
        except MemoryError:
            return DatasetError("the image cannot be read (not enough memory): scale it down")

    def rank(self, views: np.ndarray, *, top: int | None = None) -> list[Prediction]:
        """Test views (n, 3, size, size) -> a prediction each, of the `top` most probable classes (all by default)."""
        images = encoded(torch.from_numpy(views), self.backbone, reads=self._answerer.reads)
        probabilities, features = self._answerer.with_features(images)
        ranked, threshold = probabilities.sort(dim=-1, descending=True, stable=True), self._answerer.threshold
        kept: Sequence[np.ndarray | None] = list(small(features)) if self._with_features else [None] * len(images)
        return [
            Prediction(tuple(self.class_names[i] for i in labels[:top]), tuple(its[:top]), threshold, feature)
            for labels, its, feature in zip(ranked.indices.tolist(), ranked.values.tolist(), kept, strict=True)
        ]

    def _answers(
        self, images: Iterator[Source | str], *, top: int | None, batch_size: int
    ) -> Iterator[Prediction | DatasetError]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            waiting: deque[Future[np.ndarray | DatasetError]] = deque()

            def refill() -> None:
                for image in islice(images, (1 + _AHEAD) * batch_size - len(waiting)):
                    waiting.append(self._submit(pool, image))

            refill()
            while waiting:
                views = [waiting.popleft().result() for _ in range(min(batch_size, len(waiting)))]
                refill()                                                          # decoded while the model runs
                yield from self._answered(views, top)

    def _answered(
        self, views: Sequence[np.ndarray | DatasetError], top: int | None
    ) -> Iterator[Prediction | DatasetError]:
        readable = [view for view in views if not isinstance(view, DatasetError)]
        ranked = iter(self.rank(np.stack(readable), top=top) if readable else [])
        for view in views:
            yield view if isinstance(view, DatasetError) else next(ranked)

    def _submit(self, pool: ThreadPoolExecutor, image: Source | str) -> Future[np.ndarray | DatasetError]:
        if not isinstance(image, Image.Image):
            return pool.submit(self.view, image)
        view: Future[np.ndarray | DatasetError] = Future()
        view.set_result(self.view(image))                                        # two threads must not load the same
        return view
