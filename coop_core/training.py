"""Training: a learner and cached image features -> learned state and a curve, the same after any interruption."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coop_core.errors import ArtifactError, TrainingError
from coop_core.files import digest_bytes, read_tensors, write_tensors
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


def learning_rate_at(epoch: int, recipe: TrainParams) -> float:
    """The published schedule, stepped once an epoch (Dassl's cosine with a recounted constant warm-up).

    Warm-up epochs run at the constant warm-up rate; the cosine then counts from zero with its period equal to
    all epochs, so it does not reach zero.
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
    features: Tensor
    """L2-normalised (n, views, d) on the learner's device; each step draws one view an image."""
    labels: Tensor
    """(n,) int64 on the same device."""
    recipe: TrainParams
    seed: int
    val_features: Tensor | None = None
    val_labels: Tensor | None = None
    checkpoint: Checkpoint | None = None
    """Written at most every few seconds at the end of an epoch, and taken up when its key fits: the result is the
    same as that of an uninterrupted run on the same device."""
    on_epoch: Callable[[Epoch], object] = lambda epoch: None

    @property
    def validation(self) -> tuple[Tensor, Tensor] | None:
        """Features and labels, if there are any."""
        if self.val_features is None or self.val_labels is None or len(self.val_labels) == 0:
            return None
        return self.val_features, self.val_labels


def fit(learner: nn.Module, features: Tensor, labels: Tensor, **options: Any) -> list[Epoch]:
    """One training -> its curve. Options are the other fields of `Training`.

    Raises
    ------
    TrainingError
        When the loss is no longer a number; nothing is trained on from there.
    """
    (found,) = fit_together([Training(learner, features, labels, **options)])
    if isinstance(found, TrainingError):
        raise found
    return found


def fit_together(trainings: Sequence[Training]) -> list[list[Epoch] | TrainingError]:
    """Train with SGD and cross-entropy; the last epoch counts (no selection). -> every training's curve, or its end.

    Trainings take their steps side by side, and learners that can encode their prompts in one pass do so
    (`forward_together`): small class lists then cost little more together than one costs alone. Each result is
    that of the training alone, to rounding. One that diverges ends without disturbing the others.
    """
    runs = [_Run(training) for training in trainings]
    while waiting := [run for run in runs if run.error is None and len(run.curve) < run.training.recipe.epochs]:
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
            training.learner.parameters(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.order = generator_for(training.seed, "batches")
        self.steps = max(1, len(training.labels) // recipe.batch_size)
        """In an epoch; the last incomplete batch is dropped when there is a complete one."""
        self.error: TrainingError | None = None
        self.curve: list[Epoch] = []
        if training.checkpoint:
            self.curve = _take_up(training.checkpoint, training.learner, self.optimiser, self.order)
        for done in self.curve:
            training.on_epoch(done)
        self.written = time.monotonic()

    def draw(self) -> tuple[list[Tensor], list[Tensor]]:
        """One epoch's batches: image features (b, d) with one view an image, and labels (b,)."""
        features, labels = self.training.features, self.training.labels
        n, views, _ = features.shape
        order = torch.randperm(n, generator=self.order)
        drawn = torch.randint(views, (n,), generator=self.order)[order].to(features.device)
        order = order.to(features.device)
        size = self.training.recipe.batch_size
        batches, views_of = order.split(size)[: self.steps], drawn.split(size)[: self.steps]
        return (
            [features[batch, view] for batch, view in zip(batches, views_of, strict=True)],
            [labels[batch] for batch in batches],
        )

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
            _write(checkpoint, self.training.learner, self.optimiser, self.order, self.curve)
            self.written = time.monotonic()


def _train_epoch(runs: Sequence[_Run]) -> None:
    """One pass over everyone's images, in as many steps; nothing waits for the device before the end."""
    rates = [run.set_rate() for run in runs]
    drawn = [run.draw() for run in runs]
    learners = [run.training.learner for run in runs]
    device = runs[0].training.features.device
    losses, hits = torch.zeros(len(runs), device=device), torch.zeros(len(runs), device=device)
    for step in range(runs[0].steps):
        batches = [features[step] for features, _ in drawn]
        labels = [labels[step] for _, labels in drawn]
        logits = _logits(learners, batches)                                       # (b, c) each
        found = [F.cross_entropy(one, label) for one, label in zip(logits, labels, strict=True)]
        for run in runs:
            run.optimiser.zero_grad(set_to_none=True)
        sum(found[1:], found[0]).backward()
        for run in runs:
            run.optimiser.step()
        losses += torch.stack([loss.detach() for loss in found])
        hits += torch.stack([(one.argmax(1) == label).sum() for one, label in zip(logits, labels, strict=True)])
    seen = [sum(map(len, labels)) for _, labels in drawn]
    validated = _validate(runs)
    for i, (run, loss, hit) in enumerate(zip(runs, losses.tolist(), hits.tolist(), strict=True)):
        run.finish(Epoch(len(run.curve), rates[i], loss / run.steps, hit / seen[i], *validated[i]))


def _logits(learners: Sequence[nn.Module], image_features: Sequence[Tensor]) -> list[Tensor]:
    """Each learner's answer to its own images (n, d) -> (n, c)."""
    together = getattr(type(learners[0]), "forward_together", None)
    if together and len(learners) > 1 and all(type(learner) is type(learners[0]) for learner in learners):
        return together(learners, image_features)
    return [learner(features) for learner, features in zip(learners, image_features, strict=True)]


@torch.no_grad()
def _validate(runs: Sequence[_Run]) -> list[tuple[float | None, float | None]]:
    """Loss and accuracy on each run's validation images, if it has any."""
    data = {i: run.training.validation for i, run in enumerate(runs) if run.training.validation}
    found: list[tuple[float | None, float | None]] = [(None, None)] * len(runs)
    if data:
        answers = _logits([runs[i].training.learner for i in data], [features for features, _ in data.values()])
        for (i, (_, labels)), logits in zip(data.items(), answers, strict=True):
            hits = logits.argmax(dim=1) == labels
            found[i] = (F.cross_entropy(logits, labels).item(), hits.float().mean().item())
    return found


def _write(
    checkpoint: Checkpoint,
    learner: nn.Module,
    optimiser: torch.optim.Optimizer,
    order: torch.Generator,
    curve: list[Epoch],
) -> None:
    """State, momentum and the position in the random sequence, in one file that appears at once."""
    tensors = {f"learned.{name}": tensor for name, tensor in learner.state_dict().items()}
    for name, parameter in learner.named_parameters():
        momentum = optimiser.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    tensors["order"] = order.get_state()
    metadata = {"key": checkpoint.key, "curve": json.dumps([asdict(epoch) for epoch in curve])}
    write_tensors(checkpoint.path, tensors, metadata)


def _take_up(
    checkpoint: Checkpoint, learner: nn.Module, optimiser: torch.optim.Optimizer, order: torch.Generator
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
    order.set_state(tensors["order"])
    return [Epoch(**epoch) for epoch in json.loads(metadata["curve"])]
