"""The sections of params.yaml, each with its ranges and meanings."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from coop_core.backbone import AskedRuntime, Backbone, Precision, backbone_name, load_backbone
from coop_core.data.dataset import has_one_hole
from coop_core.judging.gate import Policy
from coop_core.judging.limits import Limits
from coop_core.prompts.engine import Engine

PINS = "constraints.txt"  # of every package, those of packaged weights among them
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


class LabellerParams(Section):
    """A further backbone whose zero-shot answers count towards pseudo labels."""

    architecture: str = Field(min_length=1)
    """As `backbone.architecture`."""
    pretrained: str | None = None
    """As `backbone.pretrained`."""

    def load(self, *, device: torch.device | str) -> Backbone:
        """The backbone itself; faults as `load_backbone` has them."""
        return load_backbone(self.architecture, self.pretrained, device=device)

    @property
    def name(self) -> str:
        """For people and cards."""
        return backbone_name(self.architecture, self.pretrained, "float32")


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
    unlabelled: Literal["all"] | Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Learn without labels: so many training images, or all, are a pool that zero-shot labels; of each class that it
    answers, `shots` images are learned from, the most confident ones."""
    min_confidence: float | None = Field(default=None, gt=0, lt=1)
    """Images of the pool whose confidence is above this are learned from as well, beyond `shots` a class."""
    further_labellers: list[LabellerParams] = []
    """Backbones beside `backbone` that label the pool: the mean of all their zero-shot probabilities is what counts.
    `backbone` alone is learned with and answers."""

    @property
    def asked_of_labels(self) -> dict[str, Any]:
        """How pseudo labels are to be chosen, as `label_file.require_asked` compares it."""
        return {"per_class": self.shots, "min_confidence": self.min_confidence,
                "further": [one.name for one in self.further_labellers]}  # fmt: skip

    @model_validator(mode="after")
    def _a_pool_has_no_labels(self) -> "SplitParams":
        if self.unlabelled is None and self.min_confidence is not None:
            raise ValueError("min_confidence is for images without labels: set unlabelled, or leave it out")
        if self.unlabelled is None and self.further_labellers:
            raise ValueError("further_labellers are for images without labels: set unlabelled, or leave them out")
        if self.unlabelled is not None and self.classes != "all":
            raise ValueError(f"classes {self.classes} needs the labels that unlabelled leaves unread: set all")
        if self.unlabelled is not None and self.label_noise:
            raise ValueError("label_noise needs labels, and unlabelled leaves them unread: set one of the two")
        return self

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
    image_runtime: AskedRuntime = "torch"
    """What runs the image tower on a CPU. openvino, an optional package, computes float32 features that differ by 1e-5
    at most; auto takes it for networks of convolutions in bfloat16, where it is installed. A method that learns through
    the image tower needs torch."""
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
        if local is not None and not self.watches(local):
            raise ValueError(f"files must be {local} as well, or a folder above it, so that other weights at that "
                             "place are noticed")  # fmt: skip
        return self

    def watches(self, place: str) -> bool:
        """Whether `files` holds it."""
        return Path(place).is_relative_to(self.files)

    def load(self, *, device: torch.device | str) -> Backbone:
        """The backbone itself; faults as `load_backbone` has them."""
        return load_backbone(
            self.architecture, self.pretrained, image_precision=self.image_precision,
            image_runtime=self.image_runtime, device=device,
        )  # fmt: skip


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


class AnsweringParams(Section):
    """What is fitted on the validation images once the method is trained, and kept with what was learned."""

    temperature: bool = False
    """Divide logits by the temperature at which validation labels are likeliest, so that confidence means what it
    says."""
    target_accuracy: float | None = Field(default=None, gt=0, lt=1)
    """Answer only from the confidence on at which so many validation answers are right; null answers everything."""
    target_share: float | None = Field(default=None, gt=0, lt=1)
    """Answer only from the confidence on that so many validation images reach."""

    @model_validator(mode="after")
    def _one_target(self) -> "AnsweringParams":
        if self.target_accuracy is not None and self.target_share is not None:
            raise ValueError("target_accuracy and target_share each decide when to abstain: set one to null")
        return self

    @property
    def is_fitted(self) -> bool:
        return self.temperature or self.target_accuracy is not None or self.target_share is not None


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
    against_baselines: Literal["refuse", "tell"] = "refuse"
    """What becomes of it when it is worse than its best baseline, such as the linear probe, beyond chance."""

    approval_minutes: int = Field(default=0, ge=0, le=10_080)
    """How long Prefect's flows wait for a person's yes before the champion changes; 0 asks nobody."""

    def policy(self) -> Policy:
        return Policy(**self.model_dump(exclude={"approval_minutes"}))


class WatchParams(Section):
    """When what the champion is sent differs from its test images so much that a retraining is asked for."""

    significance: float = Field(default=0.01, ge=0.002, lt=1)
    """Of looks at images like the test images, at most this share raises anything."""
    max_auc: float = Field(default=0.65, ge=0.5, le=1)
    """How well a classifier may tell what is sent from the test images: 0.5 not at all, 1 always."""
    max_confidence_shift: float = Field(default=0.2, ge=0, le=1)
    """How far the distributions of confidences may lie apart, in shares of images."""
    max_label_shift: float = Field(default=0.3, ge=0, le=1)
    """Which share of the images may be answered with other labels than the test's mix; 1 lets any mix pass."""
    max_abstention_rise: float = Field(default=0.15, ge=0, le=1)
    """By how much the share of images without an answer may rise."""
    min_images: int = Field(default=50, ge=20, le=2_000)
    """Fewer images are not judged."""
    max_images: int = Field(default=500, ge=20, le=2_000)
    """The newest ones are looked at; the time of a look grows with them."""
    quiet_hours: int = Field(default=24, ge=0, le=8_760)
    """How long after an alarm the same version raises none again."""

    @model_validator(mode="after")
    def _enough_to_judge(self) -> "WatchParams":
        if self.min_images > self.max_images:
            raise ValueError(f"min_images {self.min_images} must not be above max_images {self.max_images}")
        return self

    def limits(self) -> Limits:
        return Limits(**self.model_dump(exclude={"max_images", "quiet_hours"}))
