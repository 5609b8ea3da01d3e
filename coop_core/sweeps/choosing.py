"""Choosing: every head on the same images -> the one to take, by validation images alone.

A head that sets something by the validation images (a weight beside zero-shot, a strength of regularisation) would be
flattered by them, so it is fitted twice more: by one half of them and judged on the other. Its paired difference from
the best, in standard errors, says whether the images tell the two apart; of those they do not, the cheapest is taken.
With few validation images, heads that know no class text are out of the question beside zero-shot: by chance they look
good on some, and published figures have them far below it there. Test accuracy is shown last and decides nothing.
"""

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coop_core.answering import answer_with
from coop_core.data.dataset import Dataset
from coop_core.errors import CoopError, TrainingError
from coop_core.features.examples import CachedFeatures
from coop_core.judging.evaluation import evaluate
from coop_core.methods import MethodParams, load_method
from coop_core.methods.learner import is_built
from coop_core.params import Params
from coop_core.sweeps.trials import Materials, TrialRunner
from coop_core.training import fit

HEADS: tuple[dict[str, Any], ...] = (
    {"name": "zero_shot"}, {"name": "class_mean"}, {"name": "linear_probe"}, {"name": "probe"}, {"name": "gda"},
    {"name": "tip_adapter"}, {"name": "tip_adapter", "fine_tune": True}, {"name": "prolip"}, {"name": "coop"},
)  # fmt: skip
"""What is compared unless other heads are asked for."""

FEW = 20
"""Validation images below which only heads that know class texts are in question (docs/decisions/009)."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Candidate:
    method: MethodParams
    hits: tuple[bool, ...]
    """Of the validation images, each judged by what had not seen it."""
    calibration_error: float
    """On the validation images."""
    seconds: float
    """To train, on features that are there."""
    numbers: int
    """How many were learned or are kept."""
    prompts_per_image: int
    collapses: bool
    """An answer is one matrix product."""
    rebinds: bool
    """It can be used with other classes."""
    is_built: bool
    """Without epochs."""
    test_accuracy: float

    @property
    def name(self) -> str:
        return f"{self.method.name}-f" if getattr(self.method, "fine_tune", False) else self.method.name

    @property
    def accuracy(self) -> float:
        return sum(self.hits) / len(self.hits)

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.hits))

    @property
    def cost(self) -> tuple[int, bool, bool, int]:
        """Cheaper and simpler ones first: what an answer costs, then training, then what was learned."""
        return self.prompts_per_image, not self.collapses, not self.is_built, self.numbers


@dataclass(frozen=True)
class Choice:
    candidates: tuple[Candidate, ...]
    """The best by validation first, and those that are out of the question last."""
    taken: Candidate
    behind: tuple[tuple[float, float], ...]
    """By how much each one is behind the best, and the standard error of that difference."""

    out: tuple[Candidate, ...] = ()
    """Of the candidates, those that are out of the question with so few images."""

    @property
    def tied(self) -> tuple[Candidate, ...]:
        """Those that the validation images do not tell from the best, which is among them."""
        its = zip(self.candidates, self.behind, strict=True)
        return tuple(one for one, (by, error) in its if by <= error + _ROUNDING and one not in self.out)

    @property
    def images(self) -> int:
        return len(self.taken.hits)


def choose(candidates: Sequence[Candidate]) -> Choice:
    """The cheapest of those in question that are within one standard error of the best."""
    is_few = len(candidates[0].hits) < FEW and any(one.method.name == "zero_shot" for one in candidates)
    out = [one for one in candidates if is_few and not one.method.knows_texts]
    ordered = tuple(sorted(candidates, key=lambda one: (one in out, -one.accuracy, one.cost)))
    behind = tuple(_behind(one, ordered[0]) for one in ordered)
    found = Choice(ordered, ordered[0], behind, tuple(out))
    return replace(found, taken=min(found.tied, key=lambda one: one.cost))


def _behind(one: Candidate, best: Candidate) -> tuple[float, float]:
    """Mean of the differences image by image, and its standard error."""
    each = [int(a) - int(b) for a, b in zip(best.hits, one.hits, strict=True)]
    mean = sum(each) / len(each)
    variance = sum((difference - mean) ** 2 for difference in each) / max(1, len(each) - 1)
    return mean, math.sqrt(variance / len(each))


def try_heads(
    params: Params,
    dataset: Dataset,
    runner: TrialRunner,
    *,
    heads: Sequence[dict[str, Any]] = HEADS,
    heard: Callable[[Candidate | str], object] = lambda one: None,
) -> list[Candidate]:
    """Each head on the split of `params`, and the project's own method where it is none of them.

    `heard` is told each one when it is done, or why it cannot be.

    Raises
    ------
    TrainingError
        When none can be.
    """
    methods = [load_method(head["name"]).Params.model_validate(head) for head in heads]
    own = params.method
    methods = [own if method.name == own.name and not getattr(method, "fine_tune", False) else method
               for method in methods]  # fmt: skip
    if own not in methods and own.reads != "pixels" and params.split.unlabelled is None:
        methods.append(own)
    found: list[Candidate] = []
    for method in methods:
        try:
            found.append(_tried(params.model_copy(update={"method": method, "tests": {}}), dataset, runner))
            heard(found[-1])
        except CoopError as error:
            heard(f"{method.name}: {error}")
    if not found:
        raise TrainingError(f"no head can be trained on {dataset.name}: see the reasons above")
    return found


def _tried(params: Params, dataset: Dataset, runner: TrialRunner) -> Candidate:
    materials = runner.materials(params, dataset)
    started = time.monotonic()
    training = runner.train(params, materials)
    fit(training)
    seconds, learner = time.monotonic() - started, training.learner
    answers = answer_with(learner, class_names=materials.split.class_names)
    probabilities = (_cross_fitted(params, materials, runner) if sets_by_validation(params.method.name)
                     else answers.of_examples(materials.val))  # fmt: skip
    labels = materials.val.labels.cpu()
    judged = evaluate(probabilities.numpy(), labels.numpy(), materials.split.class_names)
    test = answers.of_examples(materials.test).argmax(dim=1) == materials.test.labels.cpu()
    return Candidate(
        method=params.method,
        hits=tuple((probabilities.argmax(dim=1) == labels).tolist()),
        calibration_error=judged.calibration_error,
        seconds=seconds,
        numbers=sum(tensor.numel() for tensor in learner.state_dict().values()),
        prompts_per_image=answers.prompts_per_image,
        collapses=learner.classifier() is not None,
        rebinds=learner.rebinds,
        is_built=is_built(learner),
        test_accuracy=float(test.double().mean()),
    )


def sets_by_validation(method: str) -> bool:
    """Whether a method sets something by the validation images: they are handed to its `build`."""
    return "validation" in inspect.signature(load_method(method).build).parameters


def _cross_fitted(params: Params, materials: Materials, runner: TrialRunner) -> Tensor:
    """Probabilities (n, c) for the validation images, each half by what was fitted with the other half."""
    val = materials.val
    assert isinstance(val, CachedFeatures)
    order = val.labels.argsort(stable=True)                                       # classes in turn, shared evenly
    halves = order[::2], order[1::2]
    found = torch.empty(len(order), len(materials.split.class_names))
    for judged, seen in (halves, halves[::-1]):
        fitted = runner.train(params, materials, validation=CachedFeatures(val.features[seen], val.labels[seen]))
        answers = answer_with(fitted.learner, class_names=materials.split.class_names)
        asked = CachedFeatures(val.features[judged], val.labels[judged])
        found[judged.cpu()] = answers.of_examples(asked)
    return found
