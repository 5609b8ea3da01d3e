"""Linear probe: logistic regression on image features, as published with CoOp; built from examples, in no epochs.

Its strength of regularisation is chosen on the validation images (`judging.baselines.linear_probe`).
"""

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from coop_core.backbone import Backbone
from coop_core.judging import baselines
from coop_core.judging.classifier import LinearClassifier
from coop_core.methods import Examples, MethodParams, Task
from coop_core.methods.fitting import given, progress
from coop_core.methods.learner import Fixed


class Params(MethodParams):
    name: Literal["linear_probe"] = "linear_probe"
    knows_texts: ClassVar[bool] = False
    steps: int = Field(default=8, ge=0, le=32)
    """Refinement steps of the search for the regularisation after its first grid."""


def build(
    params: Params,
    *,
    backbone: Backbone,
    task: Task,
    examples: Examples | None = None,
    validation: Examples | None = None,
    state: dict[str, Tensor] | None = None,
    **rest: Any,
) -> Fixed:
    """From the test view of examples; or, to load `state`, of its size.

    Raises
    ------
    TrainingError
        Without examples.
    """
    if state is not None:
        weights, bias = torch.zeros_like(state["weights"]), torch.zeros_like(state["bias"])
        return Fixed(LinearClassifier(weights, bias=bias, normalise=False))
    known = _arrays(given(examples, method=params.name))
    asked = (known[0][:0], known[1][:0]) if validation is None else _arrays(validation)
    tell = progress(params.name, "fits")
    found = baselines.linear_probe(*known, *asked, classes=len(task.class_names), steps=params.steps,
                                   progress=tell).classifier  # fmt: skip
    assert found.bias is not None
    weights, bias = found.weights.to(backbone.device), found.bias.to(backbone.device)
    return Fixed(LinearClassifier(weights, bias=bias, normalise=False))


def _arrays(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Features of the test view (n, d), and labels (n,)."""
    rows = torch.arange(len(examples.labels), device=examples.labels.device)
    return examples.batch(rows, torch.zeros_like(rows)).cpu().numpy(), examples.labels.cpu().numpy()
