"""params.yaml -> Params: every hyper-parameter of a run, checked at once.

Hyper-parameters come from this file alone. The environment never changes one (see `pipelines.settings`),
so that the values DVC records are the values that were used.
"""

from coop_core.params.file import flat, load_params, parse_params, patch
from coop_core.params.run import Params
from coop_core.params.sections import (
    PINS,
    AnsweringParams,
    BackboneParams,
    BaselineParams,
    DatasetParams,
    EngineParams,
    EvaluateParams,
    FeatureParams,
    GateParams,
    LabellerParams,
    SplitParams,
    TargetParams,
    TrainParams,
    WatchParams,
    local_weights,
)
from coop_core.params.sweep import Range, SweepParams, poses_a_task

__all__ = [
    "PINS", "AnsweringParams", "BackboneParams", "BaselineParams", "DatasetParams", "EngineParams", "EvaluateParams",
    "FeatureParams", "GateParams", "LabellerParams", "Params", "Range", "SplitParams", "SweepParams", "TargetParams",
    "TrainParams", "WatchParams", "flat", "load_params", "local_weights", "parse_params", "patch", "poses_a_task",
]  # fmt: skip
