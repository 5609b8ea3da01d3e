"""Methods, one file each: the file's name is the method's name in params.yaml (docs/adding-a-method.md).

A method file holds two public things; adding the file is all it takes to add the method:

    class Params(MethodParams)      its hyper-parameters, with ranges and help
    def build(params, *, backbone, task, generator, engine, examples, validation, state, rebound) -> Learner

`preparing.prepare` calls it, `training.fit` trains any learner, `artifact` saves its state and builds it again, and
`answering` answers with it.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from coop_core.backbone import Backbone
    from coop_core.judging.classifier import LinearClassifier


Reads = Literal["features", "unprojected", "pixels"]
"""features: what the image tower says (n, d), not normalised; unprojected: the same before the tower's last linear map
(n, p), or the features where it has none; pixels: normalised ones (n, 3, size, size)."""


class MethodParams(BaseModel):
    """The `method` section of params.yaml; every method adds its own fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    reads: ClassVar[Reads] = "features"
    """What its learner reads."""
    knows_texts: ClassVar[bool] = True
    """Whether it starts from, or answers by, class texts: one that knows images alone falls far below zero-shot where
    there are few of them."""

    @property
    def is_searched(self) -> bool:
        """Whether a search comes before the training (`searching`); the file then has a `supernet` as well."""
        return False

    def check_backbone(self, backbone: "Backbone") -> None:
        """Refuse a backbone that the method cannot learn on, before anything is computed with it.

        Raises
        ------
        BackboneError
        """


@dataclass(frozen=True)
class Task:
    """What is to be told apart."""

    class_names: tuple[str, ...]
    template: str
    """The data set's own hand-written prompt, with one {} for the class name."""
    descriptions: tuple[tuple[str, ...], ...] = ()
    """Sentences a class, from the data set's card, for methods that read them; empty where the card has none."""


class Examples(Protocol):
    """Labelled images, in whatever form a learner reads them: cached features now, pixels decoded as they come."""

    @property
    def labels(self) -> "Tensor":
        """(n,) int64, on the device that learners compute on."""

    @property
    def views(self) -> int:
        """Encodings or augmentations there are of each image; view 0 is the test transform."""

    def batch(self, rows: "Tensor", views: "Tensor") -> "Tensor":
        """Images by number (b,), one view of each (b,) -> what `Learner.reads` names, on the device."""

    # Optional, where a batch takes its time: batches(rows, views), many in turn, the next ones read ahead.


class Learner(Protocol):
    """What training, evaluation and serving ask of a method; in practice a torch module (`methods.learner`).

    Only what is learned may be in its state: the state is the product's artefact, and the frozen towers must stay
    out of it. A learner without parameters is finished when it is built.
    """

    reads: Reads
    rebinds: bool
    """Whether what was learned can be used with another class list."""

    def logits(self, images: "Tensor") -> "Tensor":
        """Images -> (n, c), float32."""

    def loss(self, images: "Tensor", labels: "Tensor") -> "tuple[Tensor, Tensor]":
        """Images and labels (n,) -> the loss to go down, and the logits (n, c) for the curve."""

    def classifier(self) -> "LinearClassifier | None":
        """What it collapses to for its classes, or None where the answer to an image needs the method itself."""

    # Optional, for many trainings at once, by methods that take cross-entropy:
    #   logits_together(learners, images) -> list of logits, static, each learner's for its own images
    # Optional, for methods that train several members side by side:
    #   members: how many; each has an order of batches of its own, so that the loss is given images (g, n, d) and
    #   labels (g, n), and says the members' mean
    # Optional, for methods that do not collapse:
    #   images_at_once: how many images' logits fit into its engine's memory without a gradient
    #   prompts_per_image: how many prompts an answer costs
    # For methods that read pixels:
    #   features(pixels): what its own image tower says (n, d); the classifier it collapses to reads these

    def parameters(self) -> "Iterator[Parameter]": ...

    def state_dict(self) -> "dict[str, Tensor]": ...

    def load_state_dict(self, state: "dict[str, Tensor]") -> object: ...


_SHARED = ("fitting", "guided_coop", "learner")
"""Files here that are no method."""


def method_names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED]


def load_method(name: str) -> ModuleType:
    """The method file called `name`, one of `method_names()`."""
    return importlib.import_module(f"{__name__}.{name}")
