"""Sweep: params.yaml -> trials, and trials' results -> a table, the best choice and the params that make it again.

A trial is one training and what it scores. A sweep poses tasks (data set, split) and compares choices (everything
else it varies), each with several seeds. Test accuracy is reported and never looked at when choosing.
"""

import itertools
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from coop_core.errors import ParamsError
from coop_core.files import digest_json
from coop_core.judging.transfer import harmonic_mean
from coop_core.params import Params, Range, SweepParams, flat, poses_a_task
from coop_core.sweeps.space import Values, short, shown, with_values

_NO_RESULT = {"dataset.source", "features.batch_size", "engine.max_memory"}
"""Parameters that change where, how fast and in how much memory, and no result beyond rounding."""
_TOGETHER = 4
"""Choices that tpe draws before it looks at results again."""


@dataclass(frozen=True)
class Trial:
    params: Params
    """Of one run: its seed set, without a few-shot curve."""
    task: Values
    choice: Values

    @cached_property
    def name(self) -> str:
        return ", ".join([*(f"{short(k)} {shown(v)}" for k, v in (self.task | self.choice).items()),
                          f"seed {self.params.seed}"])  # fmt: skip

    def key(
        self, *, dataset_digest: str, weights_digest: str, code: str, tests: Mapping[str, str] | None = None
    ) -> str:
        """What decides the result: parameters, images, weights and code; the same key is never trained twice.

        `weights_digest` is of `backbone.files`: a local checkpoint, or the pins that packaged weights follow. `tests`
        are the digests of the further test sets' data, by name.
        """
        leaves = {name: value for name, value in flat(self.params.of_run()).items() if name not in _NO_RESULT}
        judged = {name: [digest, self.params.tests[name].model_dump(exclude={"source"})]
                  for name, digest in (tests or {}).items()}  # fmt: skip
        return digest_json([leaves, dataset_digest, weights_digest, code, judged])


@dataclass(frozen=True)
class Result:
    """What a trial scored; accuracies are fractions."""

    trial: Trial
    val_accuracy: float
    val_loss: float
    accuracy: float
    """On the test images."""
    zero_shot_accuracy: float
    run_id: str = ""
    tests: Mapping[str, float] = field(default_factory=dict)
    """Accuracy on further test sets: `tests/NAME/learned` and `tests/NAME/zero_shot`."""

    def score(self, metric: str) -> float | None:
        """A field, or an entry of `tests`; None where the method cannot answer on that test set."""
        return self.tests.get(metric) if metric.startswith("tests/") else getattr(self, metric)

    @property
    def new(self) -> str | None:
        """The test set of new classes, where base classes of the same data set were learned."""
        params = self.trial.params
        return next((name for name, test in params.tests.items()
                     if params.split.classes == "base" and test.classes == "new"
                     and test.source == params.dataset.source), None)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One choice on one task, over its seeds."""

    task: Values
    choice: Values
    results: tuple[Result, ...]

    def mean(self, metric: str) -> float:
        """Over seeds; not a number where one of them has no such score."""
        values = [result.score(metric) for result in self.results]
        return math.nan if None in values else statistics.fmean(value for value in values if value is not None)

    @property
    def harmonic(self) -> float | None:
        """H of the mean accuracies on base and new classes (Zhou et al., CVPR 2022), where this is base-to-new."""
        new = self.results[0].new
        if new is None or math.isnan(found := self.mean(f"tests/{new}/learned")):
            return None
        return harmonic_mean(self.mean("accuracy"), found)

    def spread(self, metric: str) -> float:
        """Sample standard deviation; 0 for one seed."""
        values = [value for result in self.results if (value := result.score(metric)) is not None]
        return statistics.stdev(values) if len(values) > 1 else 0.0


def require_sweep(params: Params) -> SweepParams:
    """The sweep section.

    Raises
    ------
    ParamsError
        When params.yaml has none.
    """
    if params.sweep is None:
        raise ParamsError("params.yaml has no section sweep: add one (name, search, space, seeds; see README)")
    return params.sweep


def tasks(sweep: SweepParams) -> list[Values]:
    """Every combination of the data sets and splits it names."""
    return _combinations({name: values for name, values in sweep.space.items() if poses_a_task(name)})


def target_task(params: Params) -> Values:
    """The task that choices are compared on: the data set of params.yaml, or the first, with the most shots."""
    sweep, own = require_sweep(params), params.model_dump()
    found = tasks(sweep)
    for name in found[0]:
        values = [task[name] for task in found]
        wanted = max(values) if name == "split.shots" else _get(own, name)
        found = [task for task in found if task[name] == (wanted if wanted in values else values[0])]
    return found[0]


def next_choices(params: Params, scores: Mapping[str, float]) -> list[Values]:
    """The choices to try now, given the scores of earlier ones by `choice_key`; none when the search is done.

    Draws depend on the scores and nothing else, so that a sweep that starts again asks for the same choices.
    """
    sweep = require_sweep(params)
    space = {name: values for name, values in sweep.space.items() if not poses_a_task(name)}
    if sweep.search == "grid" or not space:
        return [choice for choice in _combinations(space) if choice_key(choice) not in scores]
    together = sweep.draws if sweep.search == "random" else _TOGETHER
    whole = {name for name in space if isinstance(flat(params.of_run()).get(name, space[name]), int)}
    return _draw(sweep, space, scores, together, whole)


def choice_key(choice: Values) -> str:
    return digest_json(choice)


def trials(params: Params, choices: Iterable[Values]) -> list[Trial]:
    """Every choice on every task with every seed.

    Raises
    ------
    ParamsError
        Naming the combination that is not valid.
    """
    sweep = require_sweep(params)
    return [
        Trial(with_values(params, {**task, **choice, "seed": seed}), task, choice)
        for choice in choices
        for task in tasks(sweep)
        for seed in sweep.seeds
    ]


def rows(results: Sequence[Result]) -> list[Row]:
    """Results by task and choice, in the order they came."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(digest_json([result.trial.task, result.trial.choice]), []).append(result)
    return [Row(group[0].trial.task, group[0].trial.choice, tuple(group)) for group in groups.values()]


def scores(params: Params, results: Sequence[Result]) -> dict[str, float]:
    """Each choice's mean validation accuracy on the target task."""
    target = target_task(params)
    return {choice_key(row.choice): row.mean("val_accuracy") for row in rows(results) if row.task == target}


def winner(params: Params, results: Sequence[Result]) -> Row | None:
    """The best choice on the target task by mean validation accuracy, or None when no choice has all its seeds.

    Equals are told apart by mean validation loss.
    """
    target, seeds = target_task(params), len(require_sweep(params).seeds)
    whole = [row for row in rows(results) if row.task == target and len(row.results) == seeds]
    return max(whole, key=lambda row: (row.mean("val_accuracy"), -row.mean("val_loss")), default=None)


def winning_values(params: Params, row: Row) -> Values:
    """What to set in params.yaml so that `dvc repro` makes the winner: leaf by leaf, where it differs.

    A method of another name is one whole section, because what the former had besides is none of its. The seed stays
    that of params.yaml if the sweep trained with it, else it is the sweep's first.
    """
    seeds = [result.trial.params.seed for result in row.results]
    seed = params.seed if params.seed in seeds else seeds[0]
    trained = row.results[seeds.index(seed)].trial.params
    wanted, own = flat(trained.of_run()), flat(params.of_run())
    wanted["split.curve_shots"] = [n for n in params.split.curve_shots if n < trained.split.shots]
    if trained.method.name != params.method.name:
        wanted = {name: value for name, value in wanted.items() if not name.startswith("method.")}
        wanted["method"] = trained.method.model_dump()
    return {name: value for name, value in wanted.items() if name not in own or own[name] != value}


def _combinations(space: Mapping[str, Any]) -> list[Values]:
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def _draw(sweep: SweepParams, space: Mapping[str, Any], known: Mapping[str, float], together: int,
          whole: Collection[str]) -> list[Values]:  # fmt: skip
    """Tell a study what is known, in the order it asked, until it asks for something new."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = int(digest_json(sweep.model_dump(exclude={"draws", "max_failed"}))[:8], 16)
    sampler = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}[sweep.search](seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    asked = 0
    while asked < sweep.draws:
        pending = [study.ask() for _ in range(min(together, sweep.draws - asked))]
        choices = [{name: _suggest(one, name, values, whole) for name, values in space.items()} for one in pending]
        asked += len(pending)
        if new := {choice_key(choice): choice for choice in choices if choice_key(choice) not in known}:
            return list(new.values())
        for one, choice in zip(pending, choices, strict=True):
            score = known[choice_key(choice)]
            failed = math.isnan(score)
            study.tell(one, None if failed else score,
                       optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE)  # fmt: skip
    return []


def _suggest(trial: Any, name: str, values: Any, whole: Collection[str]) -> Any:
    if not isinstance(values, Range):
        return values[trial.suggest_categorical(name, range(len(values)))]
    if name in whole:
        return trial.suggest_int(name, values.low, values.high, log=values.log)
    return trial.suggest_float(name, values.low, values.high, log=values.log)


def _get(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree
