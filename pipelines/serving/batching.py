"""Batching: images of many requests, one by one -> passes through the tower together, and to each its answer."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from coop_core.predictor import Prediction

_WAITING_BATCHES = 4
"""Views that may wait, in batches; who brings more waits with one in hand, so memory is bounded."""


class Ranks(Protocol):
    def rank(self, views: np.ndarray) -> list[Prediction]:
        """Test views (n, 3, size, size) -> a prediction each."""


@dataclass
class _Item:
    model: Ranks
    view: np.ndarray                                                              # (3, size, size)
    answer: Future[Prediction] = field(default_factory=Future)


class Batcher:
    """One thread computes; whatever came meanwhile is its next batch."""

    def __init__(self, *, size: int, wait_seconds: float, told: Callable[[int], object] = lambda images: None) -> None:
        """A batch starts when it has `size` images, or `wait_seconds` after its first; `told` hears of each."""
        self._size, self._wait, self._told = size, wait_seconds, told
        self._waiting: queue.Queue[_Item | None] = queue.Queue(_WAITING_BATCHES * size)
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def submit(self, model: Ranks, view: np.ndarray) -> Future[Prediction]:
        """Images of one batch have one model: a swap begins the next batch."""
        item = _Item(model, view)
        self._waiting.put(item)
        return item.answer

    def close(self) -> None:
        """After what was submitted is answered."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        item = self._waiting.get()
        while item is not None:
            batch, item = self._gather(item)
            self._told(len(batch))
            _answer(batch)
            item = item or self._waiting.get()

    def _gather(self, first: _Item) -> tuple[list[_Item], _Item | None]:
        """-> a batch, and the item that came too soon for it, if any."""
        batch, until = [first], time.monotonic() + self._wait
        while len(batch) < self._size:
            try:
                found = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if found is None:
                self._waiting.put(None)                                           # seen again after this batch
                break
            if found.model is not first.model:
                return batch, found
            batch.append(found)
        return batch, None


def _answer(batch: Sequence[_Item]) -> None:
    try:
        found = batch[0].model.rank(np.stack([item.view for item in batch]))
    except Exception as error:  # whoever waits is told; the next batch has its own chance
        for item in batch:
            item.answer.set_exception(error)
        return
    for item, prediction in zip(batch, found, strict=True):
        item.answer.set_result(prediction)
