"""`coop choose`: every head on the project's images -> a table, the one to take, and the patch that takes it."""

import itertools
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from coop_core.data.dataset import Dataset
from coop_core.errors import ParamsError
from coop_core.files import table_as_csv, write_json, write_text
from coop_core.judging.confidence import FEW_IMAGES
from coop_core.methods import method_names
from coop_core.params import Params, load_params
from coop_core.params.recipes import apply_recipe
from coop_core.sweeps.choosing import FEW, HEADS, Candidate, Choice, choose, try_heads
from coop_core.sweeps.trials import TrialRunner
from pipelines import console, paths
from pipelines.settings import choose_device, load_settings
from pipelines.sources.datasets import cached_dataset


def run_choice(*, methods: Sequence[str], shots: int | None, seed: int | None) -> None:
    """Try all, print the table and write artifacts/choice."""
    settings, params = load_settings(), _asked(load_params(paths.PARAMS), shots, seed)
    if unknown := sorted(set(methods) - set(method_names())):
        raise ParamsError(f"--methods {unknown[0]!r} is no method: there are {', '.join(method_names())}")
    heads: list[dict[str, Any]] = [head for head in HEADS if not methods or head["name"] in methods]
    heads += [{"name": name} for name in methods if name not in {head["name"] for head in heads}]
    dataset = cached_dataset(params.dataset, settings)
    runner = TrialRunner(store_folder=settings.cache_folder / paths.FEATURE_STORE, device=str(choose_device(settings)))
    found = choose(_tried(params, dataset, runner, heads))
    console.console.print(table_of(found, params, dataset.name))
    console.console.print(sentence_of(found), highlight=False)
    _write(found, params)


def _asked(params: Params, shots: int | None, seed: int | None) -> Params:
    split = params.split if shots is None else params.split.model_copy(update={"shots": shots, "curve_shots": []})
    return params.model_copy(update={"split": split, "seed": params.seed if seed is None else seed})


def _tried(params: Params, dataset: Dataset, runner: TrialRunner, heads: Sequence[dict[str, Any]]) -> list[Candidate]:
    with console.progress(f"heads on {dataset.name}", len(heads)) as update:
        count = itertools.count(1)

        def heard(one: Candidate | str) -> None:
            if isinstance(one, str):
                console.console.print(f"left out: {one}", highlight=False, soft_wrap=True)
            update(min(next(count), len(heads)), details="" if isinstance(one, str) else one.name)

        return try_heads(params, dataset, runner, heads=heads, heard=heard)


def table_of(found: Choice, params: Params, dataset: str) -> Table:
    table = Table(
        title=f"{dataset}: {params.split.shots} shots, seed {params.seed}, {found.images} validation images",
        caption="chosen by validation, in percent; behind: points behind the best and the standard error of that, "
                "= where it is not told apart; sec.: to train; new: takes other classes; test accuracy decides nothing",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    for name in ("head", "validation", "behind", "ECE", "sec.", "answer", "new", "test"):
        table.add_column(name, justify="left" if name in ("head", "answer", "new") else "right", no_wrap=True)
    for one, (by, error) in zip(found.candidates, found.behind, strict=True):
        is_best = one is found.candidates[0]
        behind = "best" if is_best else f"{_with_error(by, error)}{' =' if one in found.tied else '  '}"
        behind = "-  " if one in found.out else behind
        table.add_row(
            one.name, _with_error(one.accuracy, one.standard_error), behind, f"{100 * one.calibration_error:.1f}",
            f"{one.seconds:.1f}", _answer(one), "yes" if one.rebinds else "no", f"{100 * one.test_accuracy:.1f}",
            style="bold green" if one is found.taken else None,
        )  # fmt: skip
    return table


def _with_error(fraction: float, error: float) -> str:
    return f"{100 * fraction:.1f} \N{PLUS-MINUS SIGN}{100 * error:.1f}"


def _answer(one: Candidate) -> str:
    if one.prompts_per_image:
        return "prompts"
    return "linear" if one.collapses else "its own"


def sentence_of(found: Choice) -> str:
    """Which one, why, and how much the validation images decide."""
    name, others = found.taken.name, len(found.tied) - 1
    if others == 0:
        said = f"Take {name}: it answers best, by more than one standard error."
    elif len(found.tied) == len(found.candidates):
        said = f"Nothing separates these {len(found.candidates)} heads: take {name}, the cheapest."
    else:
        said = (f"Take {name}: it is the cheapest of {others + 1} that the validation images do not tell apart "
                "(within one standard error).")  # fmt: skip
    if found.out:
        said += (f" With fewer than {FEW} validation images, heads that know no class text are out of the question: "
                 f"{', '.join(one.name for one in found.out)}.")  # fmt: skip
    if found.images < FEW_IMAGES:
        widest = 100 * max(one.standard_error for one in found.candidates)
        said += (f" {found.images} validation images decide little: an accuracy is known to \N{PLUS-MINUS SIGN}"
                 f"{widest:.1f} points. More of them decide more.")  # fmt: skip
    return said


def _write(found: Choice, params: Params) -> None:
    folder = paths.CHOICE
    method = found.taken.method.model_dump()
    values: dict[str, Any] = {"method": method, "seed": params.seed}
    if params.split.shots != load_params(paths.PARAMS).split.shots:
        values |= {"split.shots": params.split.shots, "split.curve_shots": []}
    _, diff = apply_recipe(paths.PARAMS, values)
    write_text(folder / "winner.patch", diff)
    write_text(folder / "heads.csv", _csv(found))
    write_json(folder / "choice.json", {"taken": method, "tied": [one.method.model_dump() for one in found.tied],
                                        "validation_images": found.images, "shots": params.split.shots,
                                        "seed": params.seed})  # fmt: skip
    do = f"git apply {folder}/winner.patch && dvc repro" if diff else "params.yaml has it already: dvc repro"
    console.console.print(f"{do}\ntable: {folder}/heads.csv", highlight=False, soft_wrap=True)


def _csv(found: Choice) -> str:
    lines = [
        {"head": one.name, "val_accuracy": one.accuracy, "standard_error": one.standard_error, "behind": by,
         "behind_standard_error": error, "val_calibration_error": one.calibration_error, "seconds": one.seconds,
         "numbers": one.numbers, "collapses": one.collapses, "rebinds": one.rebinds, "taken": one is found.taken,
         "in_question": one not in found.out, "test_accuracy": one.test_accuracy}
        for one, (by, error) in zip(found.candidates, found.behind, strict=True)
    ]  # fmt: skip
    return table_as_csv(lines)
