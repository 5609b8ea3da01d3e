"""params.yaml -> Params: every hyper-parameter of a run, checked at once.

Hyper-parameters come from this file alone. The environment never changes one (see `pipelines.settings`),
so that the values DVC records are the values that were used.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

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
from ruamel.yaml.error import YAMLError

from coop_core.dataset import has_one_hole
from coop_core.errors import ParamsError
from coop_core.gate import Policy
from coop_core.methods import MethodParams, load_method, method_names
from coop_core.text_encoding import Engine, Precision


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DatasetParams(Section):
    source: str = Field(min_length=1)
    """A dataset card (.yaml), a folder of class folders, or a CSV file with the columns path and label."""
    test_fraction: float = Field(default=0.5, gt=0, lt=1)
    """Share of each class kept for testing when the source names no test images."""
    accept: list[Literal["duplicate-across-subsets", "duplicate-class-names"]] = []
    """Faults of the images that are known and accepted; they are reported all the same."""


class SplitParams(Section):
    shots: int = Field(ge=1, le=1_000)
    """Training images a class."""
    curve_shots: list[Annotated[int, Field(ge=1)]] = []
    """Fewer shots to train as well, for the few-shot curve; each set is part of the next larger one."""
    classes: Literal["all", "base", "new"] = "all"
    """base is the first half of the labels (rounded up), new the rest."""
    test_per_class: int | None = Field(default=None, ge=1)
    """At most so many test images a class, chosen independently of the seed; null takes all."""

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


class FeatureParams(Section):
    views: int = Field(default=1, ge=1, le=256)
    """Encodings of each training image: view 0 is the test transform, the others random crops and flips."""
    batch_size: int = Field(default=64, ge=1)
    """Images that go through the image tower together; changes speed and memory, not the features."""


class TrainParams(Section):
    epochs: int = Field(ge=1, le=10_000)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(ge=0, le=100)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0, le=1)
    warmup_epochs: int = Field(default=1, ge=0)
    """First epochs at the constant warm-up learning rate; the cosine starts after them."""
    warmup_learning_rate: float = Field(default=1e-5, ge=0, le=1)

    @model_validator(mode="after")
    def _warmup_inside_training(self) -> "TrainParams":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be below epochs {self.epochs}")
        return self


def _check_memory(value: str) -> str:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)? ?(MB|GB)", value):
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

    def engine(self) -> Engine:
        if self.max_memory is None:
            return Engine(self.path, self.precision)
        number, unit = float(self.max_memory[:-2]), self.max_memory[-2:]
        return Engine(self.path, self.precision, int(number * {"MB": 10**6, "GB": 10**9}[unit]))


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
    min_images_a_class: int = Field(default=20, ge=1)
    """Classes with fewer test images are not judged one by one."""

    def policy(self) -> Policy:
        return Policy(**self.model_dump())


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
    gate: GateParams


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read params.yaml as DVC does (YAML 1.2), so that 1e-3 is a number and no is a word.

    Raises
    ------
    ParamsError
        With every fault of the file in one message.
    """
    try:
        tree = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing: run in the project's folder, or restore it with git") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    return parse_params(tree, where=str(path))


def parse_params(tree: Any, *, where: str) -> Params:
    """A parsed tree -> Params; `where` names its origin in errors."""
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        faults = "; ".join(_sentence(fault) for fault in error.errors(include_url=False))
        raise ParamsError(f"{where}: {faults}") from None


def _sentence(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "the file"
    if fault["type"] == "extra_forbidden":
        return f"{key} is not a known key (check its spelling and its section)"
    if fault["type"] == "missing":
        return f"{key} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if isinstance(fault["input"], dict | BaseModel) else f" (it is {fault['input']!r})"
    return f"{key}: {message[0].lower()}{message[1:]}{given}"
