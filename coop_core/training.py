"""Training: a learner and cached image features -> learned state and a curve, the same after any interruption."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

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


def fit(
    learner: nn.Module,
    features: Tensor,
    labels: Tensor,
    *,
    recipe: TrainParams,
    seed: int,
    val_features: Tensor | None = None,
    val_labels: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[Epoch], object] = lambda epoch: None,
) -> list[Epoch]:
    """Train in place with SGD and cross-entropy; the last epoch counts (no selection).

    Parameters
    ----------
    features
        L2-normalised (n, views, d) on the learner's device; each step draws one view an image.
    labels
        (n,) int64 on the same device.
    checkpoint
        Written at most every few seconds at the end of an epoch, and taken up when its key fits: the result
        is the same as that of an uninterrupted run on the same device.

    Raises
    ------
    TrainingError
        When the loss is no longer a number; nothing is trained on from there.
    """
    optimiser = torch.optim.SGD(
        learner.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    order = generator_for(seed, "batches")
    curve = _take_up(checkpoint, learner, optimiser, order) if checkpoint else []
    for done in curve:
        on_epoch(done)
    written = time.monotonic()
    for number in range(len(curve), recipe.epochs):
        rate = learning_rate_at(number, recipe)
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss, accuracy = _train_epoch(learner, optimiser, features, labels, order, batch_size=recipe.batch_size)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} in epoch {number + 1} at learning rate {rate:g}: "
                "lower train.learning_rate, or set engine.precision: float32 if it is not that"
            )
        epoch = Epoch(number, rate, loss, accuracy, *_validate(learner, val_features, val_labels))
        curve.append(epoch)
        on_epoch(epoch)
        if checkpoint and time.monotonic() - written >= checkpoint.every_seconds:
            _write(checkpoint, learner, optimiser, order, curve)
            written = time.monotonic()
    return curve


def _train_epoch(
    learner: nn.Module,
    optimiser: torch.optim.Optimizer,
    features: Tensor,
    labels: Tensor,
    order: torch.Generator,
    *,
    batch_size: int,
) -> tuple[float, float]:
    """One pass; the last incomplete batch is dropped when there is a complete one. -> (mean loss, accuracy)."""
    n, views, _ = features.shape
    permutation = torch.randperm(n, generator=order)
    drawn = torch.randint(views, (n,), generator=order).to(features.device)
    steps = max(1, n // batch_size)
    losses, hits, seen = torch.zeros((), device=features.device), torch.zeros((), device=features.device), 0
    for step in range(steps):
        batch = permutation[step * batch_size : (step + 1) * batch_size].to(features.device)
        logits = learner(features[batch, drawn[batch]])                           # (b, c)
        loss = F.cross_entropy(logits, labels[batch])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses += loss.detach()
        hits += (logits.detach().argmax(dim=1) == labels[batch]).sum()
        seen += len(batch)
    return losses.item() / steps, hits.item() / seen


@torch.no_grad()
def _validate(learner: nn.Module, features: Tensor | None, labels: Tensor | None) -> tuple[float | None, float | None]:
    if features is None or labels is None or len(labels) == 0:
        return None, None
    logits = learner(features)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(dim=1) == labels).float().mean().item()


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
