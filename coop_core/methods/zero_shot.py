"""Zero-shot: class names and hand-written templates -> a linear classifier; no image is looked at, nothing is learned.

The baselines of that name as the method that is judged (Radford et al. 2021, section 3.1): one template, or the mean of
several. It is there to be held against published figures; every run has it as a baseline already.
"""

from typing import Any, Literal, Self

from pydantic import model_validator

from coop_core.backbone import Backbone
from coop_core.data.dataset import has_one_hole
from coop_core.judging import baselines
from coop_core.methods import MethodParams, Task
from coop_core.methods.learner import Fixed


class Params(MethodParams):
    name: Literal["zero_shot"] = "zero_shot"
    templates: list[str] = []
    """Averaged with the data set's own template; none: that one alone."""
    own_template: bool = True
    """Whether the data set's own template is one of several."""

    @model_validator(mode="after")
    def _some_template(self) -> Self:
        if wrong := [template for template in self.templates if not has_one_hole(template)]:
            raise ValueError(f"each template needs exactly one {{}}, unlike {wrong}")
        if not self.templates and not self.own_template:
            raise ValueError("own_template can be false only with templates")
        return self


def build(params: Params, *, backbone: Backbone, task: Task, **rest: Any) -> Fixed:
    """From class names alone, so it is built again for other ones."""
    own = task.template if params.own_template else params.templates[0]
    found = baselines.prompt_ensemble(backbone, task.class_names, params.templates, own_template=own)
    return Fixed(found, from_names=True)
