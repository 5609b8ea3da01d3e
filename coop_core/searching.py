"""Searching: a supernet, training and validation images -> mixing weights, by alternating first-order steps.

Liu, Simonyan, Yang: DARTS, ICLR 2019, first-order approximation, as DPL uses it: in every step the mixing weights take
one on validation images (test view), then the rows take one on training images. The same after any interruption, also
in the middle of an epoch.
"""

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from coop_core.errors import ArtifactError, TrainingError
from coop_core.files import read_tensors, write_tensors
from coop_core.methods import Examples
from coop_core.params import TrainParams
from coop_core.training import Checkpoint, generator_for, in_turn, learning_rate_at

log = logging.getLogger(__name__)


def search(
    supernet: Any,
    examples: Examples,
    validation: Examples | None,
    *,
    recipe: TrainParams,
    seed: int,
    mixing_learning_rate: float,
    validation_batch_size: int,
    rotate: bool = True,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Train a supernet (`rows` by SGD as `recipe` says, `alphas` by Adam) in place.

    Validation images come in a new order each time all have been seen; without `rotate`, the first ones every time.

    Raises
    ------
    TrainingError
        Without validation images, and when the loss is no longer a number.
    """
    if validation is None or not len(validation.labels):
        raise TrainingError("the search needs validation images, and there are none: add images, or give "
                            "method.image_lengths and method.text_lengths")  # fmt: skip
    run = _Search(supernet, examples, validation, recipe, seed, mixing_learning_rate, validation_batch_size, rotate)
    done = _take_up(checkpoint, run) if checkpoint else 0
    written = time.monotonic()
    for epoch in range(done // run.steps, recipe.epochs):
        for step, loss in run.epoch(epoch, first=done - epoch * run.steps if epoch == done // run.steps else 0):
            if not math.isfinite(loss):
                raise TrainingError(f"the search's loss became {loss} in epoch {epoch + 1}: lower "
                                    "method.search.learning_rate")  # fmt: skip
            if checkpoint and time.monotonic() - written >= checkpoint.every_seconds:
                _write(checkpoint, run, epoch * run.steps + step + 1)
                written = time.monotonic()
        log.info("search, epoch %d of %d: loss %.3f", epoch + 1, recipe.epochs, loss)
    if checkpoint:
        _write(checkpoint, run, recipe.epochs * run.steps)


class _Search:
    """A search under way; what happens in a step depends on its number and the state alone."""

    def __init__(
        self, supernet: Any, examples: Examples, validation: Examples, recipe: TrainParams, seed: int,
        mixing_learning_rate: float, validation_batch_size: int, rotate: bool,
    ) -> None:  # fmt: skip
        self.supernet, self.examples, self.validation = supernet, examples, validation
        self.recipe, self.seed, self.rotate = recipe, seed, rotate
        self.steps = max(1, len(examples.labels) // recipe.batch_size)
        self.asked = min(validation_batch_size, len(validation.labels))
        self.sgd = torch.optim.SGD(supernet.rows, lr=0.0, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        self.adam = torch.optim.Adam(supernet.alphas, lr=mixing_learning_rate, betas=(0.5, 0.999))

    def epoch(self, number: int, *, first: int) -> Iterator[tuple[int, float]]:
        """The steps of an epoch from `first` on: -> their numbers and losses on training images."""
        for group in self.sgd.param_groups:
            group["lr"] = learning_rate_at(number, self.recipe)
        device, n = self.examples.labels.device, len(self.examples.labels)
        drawn = generator_for(self.seed, f"search, epoch {number}")
        order = torch.randperm(n, generator=drawn).to(device)
        views = torch.randint(self.examples.views, (n,), generator=drawn).to(device)
        size = self.recipe.batch_size
        rows = list(order.split(size))[first : self.steps]
        asked = [self._asked(number * self.steps + step).to(device) for step in range(first, self.steps)]
        training = in_turn(self.examples, rows, [views[some] for some in rows])
        judging = in_turn(self.validation, asked, [torch.zeros_like(some) for some in asked])
        for i, (images, others) in enumerate(zip(training, judging, strict=True)):
            self._step(self.adam, others, self.validation.labels[asked[i]])
            yield first + i, self._step(self.sgd, images, self.examples.labels[rows[i]])

    def _asked(self, step: int) -> Tensor:
        """The validation images of a step, by number."""
        n, start = len(self.validation.labels), step * self.asked
        if not self.rotate:
            return torch.arange(self.asked)
        rounds = range(start // n, (start + self.asked - 1) // n + 1)
        order = torch.cat([torch.randperm(n, generator=generator_for(self.seed, f"asked, {i}")) for i in rounds])
        return order[start - rounds[0] * n :][: self.asked]

    def _step(self, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
        """One step of these parameters; the gradients that the others get meanwhile are dropped."""
        learned = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        loss, _ = self.supernet.loss(images, labels)
        gradients = torch.autograd.grad(loss, learned)
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        return loss.item()


def _write(checkpoint: Checkpoint, run: _Search, steps: int) -> None:
    """State, momentum and the number of steps done, in one file that appears at once."""
    tensors = {f"learned.{name}": tensor for name, tensor in run.supernet.state_dict().items()}
    for kind, optimiser in (("sgd", run.sgd), ("adam", run.adam)):
        for number, its in optimiser.state_dict()["state"].items():
            tensors |= {f"{kind}.{number}.{name}": t for name, t in its.items() if isinstance(t, Tensor)}
    write_tensors(checkpoint.path, tensors, {"key": checkpoint.key, "steps": str(steps)})


def _take_up(checkpoint: Checkpoint, run: _Search) -> int:
    """Continue from a checkpoint of the same search -> how many steps it has done."""
    if not checkpoint.path.exists():
        return 0
    try:
        tensors, metadata = read_tensors(checkpoint.path)
    except ArtifactError:  # a damaged checkpoint costs time, not the result
        return 0
    if metadata.get("key") != checkpoint.key:
        return 0
    own = {name.removeprefix("learned."): t for name, t in tensors.items() if name.startswith("learned.")}
    run.supernet.load_state_dict(own)
    for kind, optimiser in (("sgd", run.sgd), ("adam", run.adam)):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"{kind}."):
                _, number, field = name.split(".")
                state.setdefault(int(number), {})[field] = tensor
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return int(metadata["steps"])
