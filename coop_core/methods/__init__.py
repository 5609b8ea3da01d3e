"""Prompt-learning methods, one file each: the file's name is the method's name in params.yaml.

A method file holds two public things; adding the file is all it takes to add the method:

    class Params(MethodParams)      its hyper-parameters, with ranges and help
    def build(params, *, backbone, class_names, generator, engine) -> Learner

`training.fit` trains any learner; `artifact` saves its state and builds it again.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter


class MethodParams(BaseModel):
    """The `method` section of params.yaml; every method adds its own fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str


class Learner(Protocol):
    """What training, evaluation and serving ask of a method; in practice a torch module.

    Only what is learned may be registered as a parameter: the state is the product's artefact, and the
    frozen towers must stay out of it.
    """

    rebinds: bool
    """Whether what was learned can be used with another class list."""

    def __call__(self, image_features: "Tensor") -> "Tensor":
        """L2-normalised image features (n, d) -> logits (n, c), in float32."""

    def class_weights(self) -> "Tensor | None":
        """L2-normalised (c, d), or None where the classifier depends on the image."""

    # Optional, for many trainings at once:
    #   forward_together(learners, image_features) -> list of logits, static, each learner's for its own images

    def parameters(self) -> "Iterator[Parameter]": ...

    def state_dict(self) -> "dict[str, Tensor]": ...

    def load_state_dict(self, state: "dict[str, Tensor]") -> object: ...


def method_names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def load_method(name: str) -> ModuleType:
    """The method file called `name`, one of `method_names()`."""
    return importlib.import_module(f"{__name__}.{name}")
