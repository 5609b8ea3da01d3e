"""Class mean: each class is the mean of its images' features; nothing is trained.

The nearest class mean on unit features (Snell, Swersky, Zemel, NeurIPS 2017, equation 1, with cosine similarity in
place of distance): a classifier that costs one pass over the images, and the one to beat with few of them.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from coop_core.backbone import Backbone
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Examples, MethodParams, Task
from coop_core.methods.fitting import check_classes, given, unit_views
from coop_core.methods.learner import Fixed


class Params(MethodParams):
    name: Literal["class_mean"] = "class_mean"
    knows_texts: ClassVar[bool] = False


def build(
    params: Params,
    *,
    backbone: Backbone,
    task: Task,
    examples: Examples | None = None,
    state: dict[str, Tensor] | None = None,
    **rest: Any,
) -> Fixed:
    """From examples, all views of them; or, to load `state`, of its size.

    Raises
    ------
    TrainingError
        When a class has no example.
    """
    if state is not None:
        weights = torch.zeros_like(state["weights"])
    else:
        weights = _means(given(examples, method=params.name), len(task.class_names))
    return Fixed(LinearClassifier(weights, scale=backbone.logit_scale))


def _means(examples: Examples, classes: int) -> Tensor:
    """L2-normalised means of L2-normalised features (c, d)."""
    check_classes(examples.labels, classes, method="class_mean")
    members = F.one_hot(examples.labels, classes).T.float()                       # (c, n)
    return F.normalize(members @ unit_views(examples).sum(dim=1), dim=-1)
