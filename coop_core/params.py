"""params.yaml -> Params: every hyper-parameter of a run, checked at once.

Hyper-parameters come from this file alone. The environment never changes one (see `pipelines.settings`),
so that the values DVC records are the values that were used.
"""

import difflib
import io
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from coop_core.backbone import Backbone, Precision, load_backbone
from coop_core.data.dataset import has_one_hole
from coop_core.errors import ParamsError
from coop_core.judging.gate import Policy
from coop_core.methods import MethodParams, load_method, method_names
from coop_core.prompts.engine import Engine

PINS = "constraints.txt"
"""Pins of every package, those of packaged weights among them."""
_SHOWN = 80
"""Characters of a wrong value that an error repeats."""
_CHECKPOINTS = {".bin", ".ckpt", ".pt", ".pth", ".safetensors"}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DatasetParams(Section):
    source: str = Field(min_length=1)
    """A dataset card (.yaml), a folder of class folders, or a CSV file with the columns path and label."""
    test_fraction: float = Field(default=0.5, gt=0, lt=1)
    """Share of each class kept for testing when the source names no test images."""
    accept: list[Literal["duplicate-across-subsets", "duplicate-class-names"]] = []
    """Faults of the images that are known and accepted; they are reported all the same."""


class TargetParams(DatasetParams):
    """A further test set, on which what was learned is judged with the set's own class names."""

    classes: Literal["all", "base", "new"] = "all"
    """Of this data set; base is the first half of the labels (rounded up), new the rest."""
    test_per_class: int | None = Field(default=None, ge=1, le=10**9)
    """At most so many test images a class; null takes all."""
    class_names: dict[str, str] = {}
    """Other words for some of its classes, where they differ from those the prompt was learned for."""


class SplitParams(Section):
    shots: int = Field(ge=1, le=1_000)
    """Training images a class."""
    curve_shots: list[Annotated[int, Field(ge=1, le=1_000)]] = []
    """Fewer shots to train as well, for the few-shot curve; each set is part of the next larger one."""
    classes: Literal["all", "base", "new"] = "all"
    """base is the first half of the labels (rounded up), new the rest."""
    test_per_class: int | None = Field(default=None, ge=1, le=10**9)
    """At most so many test images a class, chosen independently of the seed; null takes all."""
    label_noise: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training labels that are replaced by another class's, by seed: how a method bears wrong labels."""

    @model_validator(mode="after")
    def _curve_below_shots(self) -> "SplitParams":
        if any(shots >= self.shots for shots in self.curve_shots):
            raise ValueError(f"curve_shots {self.curve_shots} must all be below shots {self.shots}")
        if len(set(self.curve_shots)) != len(self.curve_shots):
            raise ValueError(f"curve_shots {self.curve_shots} names a number twice")
        return self


class BackboneParams(Section):
    architecture: str = Field(min_length=1)
    """`mini`, or any name open_clip knows: ViT-B-16-quickgelu, hf-hub:..., local-dir:..."""
    pretrained: str | None = None
    """open_clip's pretrained tag or a local checkpoint; null for mini, hf-hub: and local-dir:."""
    image_precision: Precision = "float32"
    """What the image tower computes in. Where the processor has it, bfloat16 is 1.5 to 4 times as fast; it changes
    features by hundredths; float16, which few CPUs are faster in, by thousandths. A prompt answers with the precision
    it was learned with."""
    files: str = Field(default="", min_length=1, validate_default=True)
    """What decides the weights on this disk, which DVC watches: the pins of the packages for packaged and published
    weights; for a local checkpoint or `local-dir:` the same path again. Known by itself where it is left out."""

    @model_validator(mode="before")
    @classmethod
    def _find_files(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "files" in given:
            return given
        return {**given, "files": local_weights(given.get("architecture"), given.get("pretrained")) or PINS}

    @model_validator(mode="after")
    def _local_weights_are_watched(self) -> "BackboneParams":
        local = local_weights(self.architecture, self.pretrained)
        if local is not None and self.files != local:
            raise ValueError(f"files must be {local} as well, so that other weights at that place are noticed")
        return self

    def load(self, *, device: torch.device | str) -> Backbone:
        """The backbone itself; faults as `load_backbone` has them."""
        return load_backbone(self.architecture, self.pretrained, image_precision=self.image_precision, device=device)


def local_weights(architecture: Any, pretrained: Any) -> str | None:
    """The checkpoint or folder that weights are read from; None for packaged and published ones."""
    if isinstance(architecture, str) and architecture.startswith("local-dir:"):
        return architecture.removeprefix("local-dir:")
    if isinstance(pretrained, str) and ("/" in pretrained or Path(pretrained).suffix in _CHECKPOINTS):
        return pretrained
    return None


class FeatureParams(Section):
    views: int = Field(default=1, ge=1, le=256)
    """Encodings of each training image: view 0 is the test transform, the others random crops and flips."""
    batch_size: int = Field(default=64, ge=1, le=4_096)
    """Images that go through the image tower together; changes speed and memory, not the features."""


class TrainParams(Section):
    epochs: int = Field(ge=1, le=10_000)
    batch_size: int = Field(default=32, ge=1, le=10**6)
    learning_rate: float = Field(ge=0, le=100)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0, le=1)
    warmup_epochs: int = Field(default=1, ge=0, le=10_000)
    """First epochs at the constant warm-up learning rate; the cosine starts after them."""
    warmup_learning_rate: float = Field(default=1e-5, ge=0, le=1)

    @model_validator(mode="after")
    def _warmup_inside_training(self) -> "TrainParams":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be below epochs {self.epochs}")
        return self


def _check_memory(value: str) -> str:
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,7})? ?(MB|GB)", value):
        raise ValueError("write a number with its unit, such as 500 MB or 4 GB")
    return value


class EngineParams(Section):
    """How prompts are encoded: speed and memory, and no result beyond rounding."""

    path: Literal["auto", "packed", "cut", "full"] = "auto"
    """auto takes the fastest way that is exact for the text tower; full is the straightforward one."""
    precision: Precision = "float32"
    """What the frozen text tower computes in; context vectors, logits and loss stay in float32."""
    max_memory: Annotated[str, AfterValidator(_check_memory)] | None = None
    """What a training step may hold besides the weights, such as 4 GB; null takes a quarter of the device's."""
    cuda_graphs: bool = False
    """Record a step once and launch it whole, on CUDA with packed prompts; never tried on a GPU, so off."""

    def engine(self) -> Engine:
        limit = None
        if self.max_memory is not None:
            limit = int(float(self.max_memory[:-2]) * {"MB": 10**6, "GB": 10**9}[self.max_memory[-2:]])
        return Engine(self.path, self.precision, limit, cuda_graphs=self.cuda_graphs)


class BaselineParams(Section):
    ensemble_templates: list[str] = Field(min_length=1)
    """Templates of the prompt ensemble; the data set's own template is added when it is not among them."""
    linear_probe_steps: int = Field(default=8, ge=0, le=32)
    """Refinement steps of the linear probe's regularisation search after its first grid."""

    @model_validator(mode="after")
    def _one_hole_each(self) -> "BaselineParams":
        wrong = [template for template in self.ensemble_templates if not has_one_hole(template)]
        if wrong:
            raise ValueError(f"each template needs exactly one {{}}, unlike {wrong}")
        return self


class EvaluateParams(Section):
    calibration_bins: int = Field(default=15, ge=2, le=100)
    """Equally wide confidence bins of the reliability diagram and the expected calibration error."""


class GateParams(Section):
    """What a candidate must show before it becomes champion."""

    min_gain_over_zero_shot: float = Field(default=0.0, ge=-1, le=1)
    """Fraction of the test images by which it must beat the zero-shot baseline."""
    significance: float = Field(default=0.05, gt=0, lt=1)
    """It is worse than the champion when chance alone would lose so many images more rarely than this."""
    max_class_drop: float = Field(default=0.15, ge=0, le=1)
    """By how much of its test images a class may fall against the champion."""
    min_images_a_class: int = Field(default=20, ge=1, le=10**9)
    """Classes with fewer test images are not judged one by one."""

    approval_minutes: int = Field(default=0, ge=0, le=10_080)
    """How long Prefect's flows wait for a person's yes before the champion changes; 0 asks nobody."""

    def policy(self) -> Policy:
        return Policy(**self.model_dump(exclude={"approval_minutes"}))


class Range(Section):
    """Numbers a search may draw; whole ones where the parameter is one."""

    low: Annotated[int, Field(ge=-(10**15), le=10**15)] | float
    high: Annotated[int, Field(ge=-(10**15), le=10**15)] | float
    log: bool = False
    """Drawn evenly on a logarithmic scale."""

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"low {self.low} must be below high {self.high}" + ", and above 0 with log" * self.log)
        return self


class SweepParams(Section):
    """What `coop sweep` varies; `dvc repro` takes no notice."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    search: Literal["grid", "random", "tpe"] = "grid"
    """grid takes every combination; random draws; tpe draws near what went well (Bergstra et al. 2011, by Optuna)."""
    space: dict[str, Annotated[list[Any], Field(min_length=1)] | Range] = Field(min_length=1)
    """Values by dotted parameter name. A value may be a section, whose entries then change together. Data set and
    split are tasks: whatever the search, every one of them is posed to every choice of the others."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(min_length=1)
    """Each choice is trained with every seed."""
    draws: int = Field(default=20, ge=1, le=10_000)
    """Choices that random and tpe draw."""
    max_failed: float = Field(default=0.2, ge=0, le=1)
    """Share of the trials that may fail before the sweep gives up."""

    @model_validator(mode="after")
    def _plain_values(self) -> "SweepParams":
        for name, values in self.space.items():
            if isinstance(values, list) and not _is_plain(values):
                raise ValueError(f"space.{name} holds something else than numbers, words, lists and sections "
                                 "(a date? write it in quotes)")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _possible(self) -> "SweepParams":
        ranges = [name for name, values in self.space.items() if isinstance(values, Range)]
        if self.search == "grid" and ranges:
            raise ValueError(f"grid needs lists, but {', '.join(ranges)} is a range: list values, or take random")
        if tasks := [name for name in ranges if poses_a_task(name)]:
            raise ValueError(f"{', '.join(tasks)} poses a task and needs a list of values, not a range")
        for name in self.space:
            if name.split(".")[0] in ("seed", "gate", "sweep"):
                raise ValueError(f"space cannot vary {name}" + ": list seeds in sweep.seeds" * (name == "seed"))
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} names a seed twice")
        return self


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def poses_a_task(name: str) -> bool:
    """Whether a parameter says what is to be recognised, rather than how."""
    return name.split(".")[0] in ("dataset", "split")


def _method_params(value: Any) -> Any:
    """Give the section to the class of the method it names."""
    if isinstance(value, MethodParams):
        return value
    name = value.get("name") if isinstance(value, dict) else None
    if name not in method_names():
        raise ValueError(f"name is {name!r}, but the methods are: {', '.join(method_names())}")
    return load_method(name).Params.model_validate(value)


class Params(Section):
    """All hyper-parameters of a run, as DVC tracks them."""

    seed: int = Field(ge=0, lt=2**31)
    """Chooses the few-shot images, the augmentation, the first context vectors and the order of batches."""
    dataset: DatasetParams
    split: SplitParams
    backbone: BackboneParams
    features: FeatureParams
    method: Annotated[SerializeAsAny[MethodParams], BeforeValidator(_method_params)]
    train: TrainParams
    engine: EngineParams
    baselines: BaselineParams
    evaluate: EvaluateParams
    tests: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,49}$")], TargetParams] = {}
    """Further test sets by name: base-to-new, cross-dataset, domain generalisation."""
    gate: GateParams = GateParams()
    sweep: SweepParams | None = None

    @model_validator(mode="after")
    def _names_are_free(self) -> "Params":
        if "own" in self.tests:
            raise ValueError("tests: own is the data set's own test images: give this one another name")
        return self

    def of_run(self) -> dict[str, Any]:
        """What a run's result can depend on: all but what is tried around it (sweep) and asked after it."""
        return self.model_dump(exclude={"tests", "gate", "sweep"})


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read params.yaml as DVC does (YAML 1.2), so that 1e-3 is a number and no is a word.

    Raises
    ------
    ParamsError
        With every fault of the file in one message.
    """
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing: run in the project's folder, or restore it with git") from None
    except RecursionError:
        raise ParamsError(f"{path} is nested too deeply to be a file of parameters") from None
    except Exception as error:  # what does not fit its own tag, such as a 13th month, ends in errors of many kinds
        raise ParamsError(f"{path} is not readable YAML: {' '.join(str(error).split())[:300]}") from None
    return parse_params(tree, where=str(path))


def parse_params(tree: Any, *, where: str) -> Params:
    """A parsed tree -> Params; `where` names its origin in errors."""
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        faults = "; ".join(_sentence(fault) for fault in error.errors(include_url=False))
        raise ParamsError(f"{where}: {faults}") from None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parameters -> dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def patch(text: str, values: dict[str, Any], *, path: str = "params.yaml") -> str:
    """A params file's text and new values by dotted name -> a unified diff that `git apply` understands.

    Comments, order and style stay as they are.
    """
    yaml = next((style for style in _styles() if _dumped(style, style.load(text)) == text), next(_styles()))
    tree = yaml.load(text)
    for name, value in values.items():
        *sections, last = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    before, after = text.splitlines(True), _dumped(yaml, tree).splitlines(True)
    return "".join(difflib.unified_diff(before, after, f"a/{path}", f"b/{path}"))


def _styles() -> Iterator[YAML]:
    """Ways to write the same YAML: lists set in or not (as DVC does), null as a word or as nothing."""
    for (sequence, offset), null in itertools.product(((4, 2), (2, 0)), ("null", "")):
        yaml = YAML()
        yaml.preserve_quotes, yaml.width = True, 4096
        yaml.indent(mapping=2, sequence=sequence, offset=offset)
        yaml.Representer = type("Representer", (RoundTripRepresenter,), {})  # what is added to it stays with it
        yaml.representer.add_representer(
            type(None), lambda to, _, word=null: to.represent_scalar("tag:yaml.org,2002:null", word)
        )
        yield yaml


def _dumped(yaml: YAML, tree: Any) -> str:
    text = io.StringIO()
    yaml.dump(tree, text)
    return text.getvalue()


def _sentence(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "the file"
    if fault["type"] == "extra_forbidden":
        return f"{key} is not a known key (check its spelling and its section)"
    if fault["type"] == "missing":
        return f"{key} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if isinstance(fault["input"], dict | BaseModel) else f" (it is {_shown(fault['input'])})"
    return f"{key}: {message[0].lower()}{message[1:]}{given}"


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**30:  # Python itself refuses to write very long ones
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
