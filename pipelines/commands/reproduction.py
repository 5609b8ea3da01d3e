"""`coop reproduce`: a recipe -> its sweeps on the data sets that are here, and a table beside the published figures."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from coop_core.data.catalog import read_source
from coop_core.data.dataset import Dataset
from coop_core.errors import BackboneError, CoopError, DatasetError, ParamsError, ServiceError
from coop_core.files import write_text
from coop_core.params import DatasetParams, Params, load_params
from coop_core.params.recipes import read_recipe
from coop_core.reproduction.comparison import COLUMNS, UNAVAILABLE, Line, as_csv, as_markdown, compare, head
from coop_core.reproduction.estimate import Pace, Size, Work, pace_of, seconds_an_image, work_of
from coop_core.reproduction.figures import Published
from coop_core.reproduction.grid import Asked, ask, sweeps
from coop_core.sweeps.sweep import Row, rows
from pipelines import console, paths
from pipelines.commands.sweep import sweep_here
from pipelines.records.server import Records
from pipelines.settings import Settings, choose_device
from pipelines.sources.catalogue import source_of
from pipelines.sources.datasets import cached_dataset
from pipelines.sweeps.outcome import Standing

log = logging.getLogger(__name__)

_SAID_OTHERWISE = {"seed", "dataset", "tests", "sweep", "split.shots"}
_WIDE = 110
"""Columns that the table needs; a narrower terminal wraps it."""


def asked_for(name: str, **how: Any) -> Asked:
    """The recipe's grid, less or other as the options say."""
    return ask(name, read_recipe(paths.RECIPES, name), **how)


def overrides(backbone: str | None, changes: Sequence[str]) -> dict[str, Any]:
    """`--backbone NAME` and `--set NAME=VALUE` -> values by dotted name.

    Raises
    ------
    ParamsError
        For a change without an equals sign, and of what other options say.
    """
    found: dict[str, Any] = {}
    if backbone:
        found |= {"backbone.architecture": backbone, "backbone.pretrained": None}
    for change in changes:
        name, sign, value = change.partition("=")
        if not sign or not name:
            raise ParamsError(f"--set {change} is no NAME=VALUE: write, for instance, --set train.epochs=5")
        if name in _SAID_OTHERWISE or name.split(".")[0] in _SAID_OTHERWISE:
            raise ParamsError(f"--set {name} is not for `coop reproduce`: data sets, shots and seeds have options of "
                              "their own")  # fmt: skip
        found[name] = YAML(typ="safe", pure=True).load(value)
    return found


Run = Callable[[Params], Sequence[Row]]
"""One sweep -> what it scored."""


def run_here(params: Params, *, settings: Settings, jobs: int | None) -> Sequence[Row]:
    """What is missing of a sweep, on this machine. Where some seeds failed, the others count.

    Raises
    ------
    CoopError
        When nothing was scored.
    """
    last = Standing()

    def hear(standing: Standing) -> None:
        nonlocal last
        last = standing

    try:
        return sweep_here(params, Records(settings), jobs, hear=hear).rows
    except ServiceError as error:
        if not last.results:
            raise ServiceError("; ".join(sorted(set(last.failures.values()))) or str(error)) from None
        return rows(list(last.results.values()))


def reproduce(asked: Asked, settings: Settings, folder: Path, *, run: Run) -> list[Line]:
    """Run what is missing, then print the table and write it; a data set that cannot be had is a line that says so."""
    base, published = load_params(paths.PARAMS), Published.read(paths.PUBLISHED)
    above = head(asked, " ".join(["coop", *sys.argv[1:]]))
    scored: dict[str, list[Row]] = {}
    reasons: dict[str, str] = {}
    weights_fault: str | None = None
    for dataset in asked.datasets:
        try:
            planned = sweeps(asked, base, dataset=dataset, sources=_sources(asked, dataset, settings, folder))
            weights_fault = _weights_fault(planned[0]) if weights_fault is None else weights_fault
            if weights_fault:
                raise BackboneError(weights_fault)
            for params in planned:
                scored.setdefault(dataset, []).extend(run(params))
        except ParamsError:
            raise  # the recipe or an option: the same for all
        except CoopError as error:
            reasons[dataset] = " ".join(str(error).split())
            log.warning("%s is not available here: %s", dataset, reasons[dataset])
    lines = compare(asked, scored, reasons, published)
    for path, text in {".csv": as_csv(lines), ".md": as_markdown(lines, above, asked.recipe.differs)}.items():
        write_text(_place(asked).with_name(_place(asked).name + path), text)
    _print(lines, above, asked)
    return lines


def _weights_fault(params: Params) -> str:
    """Why the weights cannot be had; asked once, because a hub that does not answer takes a minute to say so."""
    try:
        params.backbone.load(device="cpu")
    except BackboneError as error:
        return str(error)
    return ""


def show_plan(asked: Asked, settings: Settings, folder: Path) -> None:
    """Say what is missing, what will be computed and about how long; nothing is trained for the record."""
    base, say = load_params(paths.PARAMS), _say
    for line in head(asked, " ".join(["coop", *sys.argv[1:]])):
        say(line)
    total, largest, last = Work(0, 0, 0), 0, None
    for dataset in asked.datasets:
        try:
            planned = sweeps(asked, base, dataset=dataset, sources=_sources(asked, dataset, settings, folder))
            size = _size(planned[0].dataset, settings)
            further = [test for name, test in planned[0].tests.items() if name in asked.how.tests]
            tests = sum(_size(test, settings).test for test in further)
            work = work_of(planned, size, tests=tests)
        except ParamsError:
            raise
        except CoopError as error:
            say(f"{dataset}: not available here: {' '.join(str(error).split())}")
            continue
        total, last = total + work, planned[0]
        largest = max(largest, size.learned(last.split.classes))
        say(f"{dataset}: {work.encodings} encodings of images at most, {work.trainings} trainings")
    say(f"in all: {total.encodings} encodings, {total.trainings} trainings")
    if last is None:
        last = sweeps(asked, base, dataset=asked.datasets[0], sources=dict.fromkeys(_names(asked), "none"))[0]
    _say_time(last, total, largest, settings)


def _say_time(params: Params, total: Work, classes: int, settings: Settings) -> None:
    device = choose_device(settings)
    try:
        backbone = params.backbone.load(device=device)
    except CoopError as error:
        _say(f"weights: not available here: {' '.join(str(error).split())}")
        return
    _say(f"weights: {backbone.name}, here")
    if not total.trainings:
        return
    image = seconds_an_image(backbone, batch_size=min(32, params.features.batch_size))
    _say(f"time on {device}: about {console.duration(image * total.encodings)} of encoding ({1 / image:.0f} images a "
         f"second, files not read) and {_training(pace_of(params, backbone, classes=classes), total, classes)}")


def _training(pace: Pace, total: Work, classes: int) -> str:
    """What all trainings take, one after another."""
    if pace.building:
        return (f"{console.duration(pace.building * total.trainings)} of building one after another "
                f"({pace.building:.2g} s each with {classes} classes)")  # fmt: skip
    kinds = [("search", pace.search_step, total.search_steps), ("training", pace.step, total.steps)]
    each = [(kind, step, count) for kind, step, count in kinds if step]
    times = " and ".join(f"{console.duration(step * count)} of {kind}" for kind, step, count in each)
    steps = " and ".join(f"{1000 * step:.1f} ms a step" + (" of the search" if kind == "search" else "")
                         for kind, step, _ in each)  # fmt: skip
    return f"{times} one after another ({steps} with {classes} classes)"


def _size(params: DatasetParams, settings: Settings) -> Size:
    """As the card says, or as the data set is found, which is then imported."""
    known = read_source(Path(params.source))[0].published
    if known is not None and known.train is not None and known.test is not None:
        return Size(known.number, known.train, known.test)
    found: Dataset = cached_dataset(params, settings)
    subsets = [image.subset for image in found.images]
    return Size(len(found.class_names), subsets.count("train"), subsets.count("test"))


def _names(asked: Asked) -> tuple[str, ...]:
    return (*asked.datasets, *asked.how.tests)


def _sources(asked: Asked, dataset: str, settings: Settings, folder: Path) -> Mapping[str, str]:
    """The places of a data set and of the protocol's tests.

    Raises
    ------
    DatasetError
        When one of them is not here.
    """
    if not folder.is_dir():
        way = "`dvc repro data.dvc` brings it" if folder == paths.SOURCE else "name another --data-folder"
        raise DatasetError(f"the folder {folder} with the data sets is not here: {way}")
    return {name: str(source_of(name, folder, cards=settings.cache_folder / paths.CARDS))
            for name in (dataset, *asked.how.tests)}  # fmt: skip


def _place(asked: Asked) -> Path:
    """The table's files, without their suffix; another backbone does not take the place of the papers'."""
    parts = [asked.protocol, asked.variant]
    if asked.backbone != asked.own_backbone:
        parts.append("".join(character if character.isalnum() else "-" for character in asked.backbone))
    return paths.REPRODUCE / asked.name / "-".join(filter(None, parts))


def _print(lines: Sequence[Line], above: Sequence[str], asked: Asked) -> None:
    for sentence in above:
        _say(sentence)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS[:-1]:
        left = name in ("dataset", "metric", "verdict")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for line in lines:
        cells = ["-" if cell == UNAVAILABLE else cell for cell in line.cells()[:-1]]
        table.add_row(*cells, style="bold" if line.cell.dataset.startswith("average-") else None)
    Console(width=max(console.console.width, _WIDE)).print(table)
    _say("Percent and points; mean and sample standard deviation over n seeds.")
    for note in dict.fromkeys(map(_note, lines)):
        if note:
            _say(note)
    _say(f"files  {_place(asked)}.csv, {_place(asked)}.md")


def _note(line: Line) -> str:
    if line.ours is None:
        return f"{line.cell.dataset}: {UNAVAILABLE}: {line.note}"
    if line.note or line.tolerance is None:
        return line.note and f"{line.cell.dataset}: {line.note}"
    return f"tolerance of {line.cell.dataset}: {line.tolerance.reason}"


def _say(line: str) -> None:
    console.console.print(line, highlight=False, soft_wrap=True, markup=False)
