"""Fitting: examples and a loss -> what a light head learns, at once, when it is built.

Each of these heads has an optimiser and a schedule of its own paper, so they stand in its `method` section; the `train`
section is for methods that learn epoch by epoch.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from coop_core.errors import TrainingError
from coop_core.methods import Examples

log = logging.getLogger(__name__)

Choice = TypeVar("Choice")
Batch = tuple[Tensor, Tensor]
"""Images by number (b,), and one view of each (b,)."""
_WARM_UP_RATE = 1e-5
"""Of warm-up steps, as in CoOp's schedule."""
_SECONDS_A_LINE = 10.0
"""Between two lines of progress in the log."""


def given(examples: Examples | None, *, method: str) -> Examples:
    """The examples, or a TrainingError where there are none."""
    if examples is None or not len(examples.labels):
        raise TrainingError(f"{method} is built from examples, and there are none")
    return examples


def all_views(examples: Examples) -> Tensor:
    """What is read of all views of all examples (n, views, d), float32."""
    rows = torch.arange(len(examples.labels), device=examples.labels.device)
    return torch.stack([examples.batch(rows, torch.full_like(rows, view)) for view in range(examples.views)], dim=1)


def unit_views(examples: Examples) -> Tensor:
    """All views of all examples -> unit image features (n, views, d), float32."""
    return F.normalize(all_views(examples), dim=-1)


def check_classes(labels: Tensor, classes: int, *, method: str) -> None:
    """Raises TrainingError when a class has no example."""
    if empty := set(range(classes)) - set(labels.tolist()):
        raise TrainingError(f"{method} needs an image of each class, but label {min(empty)} has none")


def watched(validation: Examples | None) -> tuple[Tensor, Tensor] | None:
    """Validation images -> unit features (n, d) of the test view, float64, and labels (n,); None without any."""
    if validation is None or not len(validation.labels):
        return None
    rows = torch.arange(len(validation.labels), device=validation.labels.device)
    return F.normalize(validation.batch(rows, torch.zeros_like(rows)).double(), dim=-1), validation.labels


def best_choice(candidates: Iterable[tuple[Choice, Tensor]], labels: Tensor) -> Choice:
    """Choices with their logits (n, c) on validation images -> the one of the highest accuracy.

    Of equals the lowest log loss wins, as in the linear probe's search.
    """

    def score(candidate: tuple[Choice, Tensor]) -> tuple[float, float]:
        _, logits = candidate
        accuracy = float((logits.argmax(dim=1) == labels).double().mean())
        return accuracy, -float(F.cross_entropy(logits, labels))

    scored = ((choice, score((choice, logits))) for choice, logits in candidates)  # one candidate's logits in memory
    return max(scored, key=lambda each: each[1])[0]


def draw_batches(examples: Examples, *, size: int, epochs: int, generator: torch.Generator) -> Iterator[Batch]:
    """Every image once an epoch, in an order and a view that are drawn; the last batch of an epoch may be smaller."""
    n, device = len(examples.labels), examples.labels.device
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)
        views = torch.randint(examples.views, (n,), generator=generator)
        yield from zip(order.to(device).split(size), views.to(device).split(size), strict=True)


def batches_an_epoch(examples: Examples, *, size: int) -> int:
    return math.ceil(len(examples.labels) / size)


def progress(method: str, what: str) -> Callable[[int, int], None]:
    """To be told how much is done, of all; a line every ten seconds goes to the log."""
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _SECONDS_A_LINE:
            log.info("%s: %d of %d %s", method, done, total, what)
            told = time.monotonic()

    return tell


def descend(
    optimiser: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[Batch],
    *,
    steps: int,
    warmup: int = 0,
    method: str,
) -> None:
    """Take a step a batch; the rate falls from the optimiser's own to 0 by a cosine, after `warmup` steps near 0.

    Raises
    ------
    TrainingError
        When the loss is no longer a number.
    """
    rate, tell = optimiser.param_groups[0]["lr"], progress(method, "steps")
    for step, (rows, views) in enumerate(batches):
        phase = (step - warmup) / max(1, steps - warmup)
        now = _WARM_UP_RATE if step < warmup else rate * 0.5 * (1 + math.cos(math.pi * phase))
        for group in optimiser.param_groups:
            group["lr"] = now
        optimiser.zero_grad(set_to_none=True)
        value = loss(rows, views)
        if not math.isfinite(value.item()):
            raise TrainingError(f"the loss of {method} became {value.item()} in step {step + 1} of {steps} at learning "
                                f"rate {now:g}: lower method.learning_rate")  # fmt: skip
        value.backward()
        optimiser.step()
        tell(step + 1, steps)
