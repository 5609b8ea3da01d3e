"""Training: a learner and examples -> learned state and a curve, the same after any interruption."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coop_core.errors import ArtifactError, TrainingError
from coop_core.files import digest_bytes, read_tensors, write_tensors
from coop_core.methods import Examples, MethodParams
from coop_core.methods.learner import first_views, in_turn, is_built, logits_of
from coop_core.params import TrainParams


@dataclass(frozen=True)
class Epoch:
    """One row of the training curve; accuracies are fractions."""

    epoch: int
    learning_rate: float
    loss: float
    accuracy: float
    """Over the epoch's batches, each before its step."""
    val_loss: float | None
    val_accuracy: float | None
    """On view 0 of the validation images; watched, never used to choose an epoch."""


@dataclass(frozen=True)
class Checkpoint:
    """Where training can be taken up again, and what it must be the training of."""

    path: Path
    key: str
    """Digest of everything that decides the result; a checkpoint of another key is ignored."""
    every_seconds: float = 2.0

    @property
    def of_search(self) -> "Checkpoint":
        """That of the search before the training, which stays until the training is done."""
        return replace(self, path=self.path.with_suffix(".search.safetensors"), key=f"{self.key} search")

    def remove(self) -> None:
        """When all is done."""
        for path in (self.path, self.of_search.path):
            path.unlink(missing_ok=True)


def learning_rate_at(epoch: int, recipe: TrainParams) -> float:
    """The published schedule, stepped once an epoch (Dassl's cosine with a recounted constant warm-up).

    Warm-up epochs run at the constant warm-up rate; the cosine then counts from zero with its period equal to
    all epochs, so it does not reach zero.

    >>> recipe = TrainParams(epochs=4, learning_rate=0.02)
    >>> [round(learning_rate_at(epoch, recipe), 5) for epoch in range(4)]
    [1e-05, 0.02, 0.01707, 0.01]
    """
    if epoch < recipe.warmup_epochs:
        return recipe.warmup_learning_rate
    phase = (epoch - recipe.warmup_epochs) / recipe.epochs
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * phase))


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on the seed and what it is for, and on nothing drawn elsewhere."""
    entropy = digest_bytes(f"{purpose}:{seed}".encode())
    return torch.Generator().manual_seed(int(entropy[:15], 16))


@dataclass(frozen=True)
class Training:
    """One training to be done; the learner is trained in place."""

    learner: Any
    """A learner (`coop_core.methods.Learner`) that is a torch module."""
    examples: Examples
    """On the learner's device; each step draws one view an image."""
    recipe: TrainParams
    seed: int
    validation: Examples | None = None
    """Watched on view 0; never used to choose an epoch."""
    checkpoint: Checkpoint | None = None
    """Written at most every few seconds at the end of an epoch, and taken up when its key fits: the result is the
    same as that of an uninterrupted run on the same device."""
    on_epoch: Callable[[Epoch], object] = lambda epoch: None
    found: MethodParams | None = None
    """The method's parameters with what a search found, where there was one."""

    @property
    def epochs(self) -> int:
        """A learner without parameters was finished when it was built, and is looked at once."""
        return 1 if is_built(self.learner) else self.recipe.epochs


def fit(training: Training) -> list[Epoch]:
    """One training -> its curve.

    Raises
    ------
    TrainingError
        When the loss is no longer a number; nothing is trained on from there.
    """
    (found,) = fit_together([training])
    if isinstance(found, TrainingError):
        raise found
    return found


def fit_together(trainings: Sequence[Training]) -> list[list[Epoch] | TrainingError]:
    """Train with SGD; the last epoch counts (no selection). -> every training's curve, or its end.

    Trainings take their steps side by side, and learners that can encode their prompts in one pass do so
    (`logits_together`): small class lists then cost little more together than one costs alone. Each result is
    that of the training alone, to rounding. A training that diverges does not stop the others.
    """
    runs = [_Run(training) for training in trainings]
    while waiting := [run for run in runs if run.error is None and len(run.curve) < run.training.epochs]:
        behind = min(len(run.curve) for run in waiting)
        steps = next(run.steps for run in waiting if len(run.curve) == behind)
        _train_epoch([run for run in waiting if len(run.curve) == behind and run.steps == steps])
    return [run.error or run.curve for run in runs]


class _Run:
    """A training under way."""

    def __init__(self, training: Training) -> None:
        recipe = training.recipe
        self.training = training
        self.optimiser = torch.optim.SGD(
            [{"params": list(training.learner.parameters())}],  # a group may be empty, a list of parameters not
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.members = getattr(training.learner, "members", None)
        self.orders = [generator_for(training.seed + i, "batches") for i in range(self.members or 1)]
        self.steps = max(1, len(training.examples.labels) // recipe.batch_size)
        """In an epoch; the last incomplete batch is dropped when there is a complete one."""
        self.error: TrainingError | None = None
        self.curve: list[Epoch] = []
        if training.checkpoint:
            self.curve = _take_up(training.checkpoint, training.learner, self.optimiser, self.orders)
        for done in self.curve:
            training.on_epoch(done)
        self.written = time.monotonic()

    def draw(self) -> tuple[list[Tensor], list[Tensor]]:
        """One epoch's batches: the numbers of images (b,), and of one view of each (b,); with members, (g, b)."""
        examples, size = self.training.examples, self.training.recipe.batch_size
        n, device = len(examples.labels), examples.labels.device
        orders, views = [], []
        for generator in self.orders:
            orders.append(torch.randperm(n, generator=generator))
            views.append(torch.randint(examples.views, (n,), generator=generator)[orders[-1]])
        order, drawn = ((torch.stack(its) if self.members else its[0]).to(device) for its in (orders, views))
        return list(order.split(size, dim=-1)[: self.steps]), list(drawn.split(size, dim=-1)[: self.steps])

    def set_rate(self) -> float:
        rate = learning_rate_at(len(self.curve), self.training.recipe)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        return rate

    def finish(self, epoch: Epoch) -> None:
        if not math.isfinite(epoch.loss):
            self.error = TrainingError(
                f"the loss became {epoch.loss} in epoch {epoch.epoch + 1} at learning rate {epoch.learning_rate:g}: "
                "lower train.learning_rate, or set engine.precision: float32 if it is not that"
            )
            return
        self.curve.append(epoch)
        self.training.on_epoch(epoch)
        checkpoint = self.training.checkpoint
        if checkpoint and time.monotonic() - self.written >= checkpoint.every_seconds:
            _write(checkpoint, self.training.learner, self.optimiser, self.orders, self.curve)
            self.written = time.monotonic()


def _train_epoch(runs: Sequence[_Run]) -> None:
    """One pass over everyone's images, in as many steps; nothing waits for the device before the end."""
    rates = [run.set_rate() for run in runs]
    drawn = [run.draw() for run in runs]
    learners = [run.training.learner for run in runs]
    device = runs[0].training.examples.labels.device
    losses, hits = torch.zeros(len(runs), device=device), torch.zeros(len(runs), device=device)
    streams = [in_turn(run.training.examples, *batches) for run, batches in zip(runs, drawn, strict=True)]
    for step in range(runs[0].steps):
        rows = [batches[step] for batches, _ in drawn]
        images = [next(stream) for stream in streams]
        labels = [run.training.examples.labels[row] for run, row in zip(runs, rows, strict=True)]
        found = _losses(learners, images, labels)
        if total := [loss * (run.members or 1) for run, (loss, _) in zip(runs, found, strict=True)
                     if loss.requires_grad]:
            for run in runs:
                run.optimiser.zero_grad(set_to_none=True)
            sum(total[1:], total[0]).backward()
            for run in runs:
                run.optimiser.step()
        losses += torch.stack([loss.detach() for loss, _ in found])
        hits += torch.stack([(one.argmax(-1) == label).sum() for (_, one), label in zip(found, labels, strict=True)])
    seen = [sum(batch.numel() for batch in batches) for batches, _ in drawn]
    validated = _validate(runs)
    for i, (run, loss, hit) in enumerate(zip(runs, losses.tolist(), hits.tolist(), strict=True)):
        run.finish(Epoch(len(run.curve), rates[i], loss / run.steps, hit / seen[i], *validated[i]))


def _losses(learners: Sequence[Any], images: Sequence[Tensor], labels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each learner's loss and logits (b, c) for its own batch."""
    if _join(learners):
        logits = type(learners[0]).logits_together(learners, images)
        return [(F.cross_entropy(one, label), one) for one, label in zip(logits, labels, strict=True)]
    return [learner.loss(some, label) for learner, some, label in zip(learners, images, labels, strict=True)]


def _join(learners: Sequence[Any]) -> bool:
    """Whether these learners encode their prompts in one pass."""
    return len(learners) > 1 and hasattr(learners[0], "logits_together") and len(set(map(type, learners))) == 1


@torch.no_grad()
def _validate(runs: Sequence[_Run]) -> list[tuple[float | None, float | None]]:
    """Loss and accuracy on each run's validation images, if it has any."""
    data = {i: run.training.validation for i, run in enumerate(runs)
            if run.training.validation is not None and len(run.training.validation.labels)}  # fmt: skip
    found: list[tuple[float | None, float | None]] = [(None, None)] * len(runs)
    if not data:
        return found
    learners = [runs[i].training.learner for i in data]
    if _join(learners) and not hasattr(learners[0], "images_at_once"):
        answers = type(learners[0]).logits_together(learners, [first_views(examples) for examples in data.values()])
    else:
        answers = [logits_of(learner, examples) for learner, examples in zip(learners, data.values(), strict=True)]
    for (i, examples), logits in zip(data.items(), answers, strict=True):
        hits = logits.argmax(dim=1) == examples.labels
        found[i] = (F.cross_entropy(logits, examples.labels).item(), hits.float().mean().item())
    return found


def _write(
    checkpoint: Checkpoint,
    learner: nn.Module,
    optimiser: torch.optim.Optimizer,
    orders: Sequence[torch.Generator],
    curve: list[Epoch],
) -> None:
    """State, momentum and the position in the random sequences, in one file that appears at once."""
    tensors = {f"learned.{name}": tensor for name, tensor in learner.state_dict().items()}
    for name, parameter in learner.named_parameters():
        momentum = optimiser.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    tensors["orders"] = torch.stack([order.get_state() for order in orders])
    metadata = {"key": checkpoint.key, "curve": json.dumps([asdict(epoch) for epoch in curve])}
    write_tensors(checkpoint.path, tensors, metadata)


def _take_up(
    checkpoint: Checkpoint, learner: nn.Module, optimiser: torch.optim.Optimizer, orders: Sequence[torch.Generator]
) -> list[Epoch]:
    """Continue from a checkpoint of the same training -> the epochs it has done."""
    if not checkpoint.path.exists():
        return []
    try:
        tensors, metadata = read_tensors(checkpoint.path)
    except ArtifactError:  # a damaged checkpoint costs time, not the result
        return []
    if metadata.get("key") != checkpoint.key:
        return []
    learned = {name.removeprefix("learned."): t for name, t in tensors.items() if name.startswith("learned.")}
    learner.load_state_dict(learned)
    for name, parameter in learner.named_parameters():
        if f"momentum.{name}" in tensors:
            optimiser.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"].to(parameter.device)
    for order, state in zip(orders, tensors["orders"], strict=True):
        order.set_state(state.clone())  # a view of several is not taken
    return [Epoch(**epoch) for epoch in json.loads(metadata["curve"])]
