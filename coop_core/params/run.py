"""All of params.yaml."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from coop_core.methods import MethodParams, load_method, method_names
from coop_core.params.sections import (
    AnsweringParams,
    BackboneParams,
    BaselineParams,
    DatasetParams,
    EngineParams,
    EvaluateParams,
    FeatureParams,
    GateParams,
    LabellerParams,
    Section,
    SplitParams,
    TargetParams,
    TrainParams,
    WatchParams,
    local_weights,
)
from coop_core.params.sweep import SweepParams


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
    answering: AnsweringParams = AnsweringParams()
    tests: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,49}$")], TargetParams] = {}
    """Further test sets by name: base-to-new, cross-dataset, domain generalisation."""
    gate: GateParams = GateParams()
    watch: WatchParams = WatchParams()
    sweep: SweepParams | None = None

    @model_validator(mode="after")
    def _names_are_free(self) -> "Params":
        if "own" in self.tests:
            raise ValueError("tests: own is the data set's own test images: give this one another name")
        return self

    @model_validator(mode="after")
    def _upl_reads_no_labels(self) -> "Params":
        if self.method.name == "upl" and self.split.unlabelled is None:
            raise ValueError("method upl learns from images without labels: set split.unlabelled, for instance to all")
        return self

    @model_validator(mode="after")
    def _pixels_have_labels(self) -> "Params":
        if self.method.reads == "pixels" and self.split.unlabelled is not None:
            raise ValueError(f"method {self.method.name} reads pixels, and labels by zero-shot are given to features: "
                             "leave split.unlabelled out")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _each_labeller_counts_once_and_is_watched(self) -> "Params":
        all_of_them: list[BackboneParams | LabellerParams] = [self.backbone, *self.split.further_labellers]
        named = [(one.architecture, one.architecture != "mini" and one.pretrained) for one in all_of_them]
        for one, its in zip(all_of_them[1:], named[1:], strict=True):
            if named.count(its) > 1:
                raise ValueError(f"split.further_labellers: {one.architecture} would count twice: name each backbone "
                                 "once, and not backbone itself")  # fmt: skip
            local = local_weights(one.architecture, one.pretrained)
            if local is not None and not self.backbone.watches(local):
                raise ValueError(f"split.further_labellers: backbone.files must be a folder that holds {local} as well "
                                 f"(it is {self.backbone.files}), so that other weights there are noticed")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _torch_learns_through_the_image_tower(self) -> "Params":
        if self.method.reads == "pixels" and self.backbone.image_runtime != "torch":
            raise ValueError(f"method {self.method.name} learns through the image tower, which torch alone can: "
                             "set backbone.image_runtime: torch")  # fmt: skip
        return self

    def of_run(self) -> dict[str, Any]:
        """What a run's result can depend on: all but what is tried around it (sweep) and asked after it."""
        left_out: dict[str, Any] = dict.fromkeys(("tests", "gate", "watch", "sweep"), True)
        if not self.answering.is_fitted:  # what is not asked for makes no other run
            left_out["answering"] = True
        if not self.split.further_labellers:
            left_out["split"] = {"further_labellers"}
        return self.model_dump(exclude=left_out)
