"""The card: all that made what was learned -> the JSON that lies beside it."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel, Field

from coop_core.backbone import Backbone, Precision, Runtime
from coop_core.data.split import Split
from coop_core.judging.confidence import Confidence
from coop_core.methods import Learner, MethodParams
from coop_core.methods.learner import is_built

SCHEMA = 2
_LIBRARIES = ("torch", "open_clip_torch", "timm", "transformers", "numpy", "scipy")


class _TransformFields(BaseModel):
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: Literal["shortest", "squash"]


class _BackboneFields(BaseModel):
    architecture: str
    pretrained: str | None
    image_precision: Precision = "float32"
    image_runtime: Runtime = "torch"
    weights_digest: str
    transform: _TransformFields
    batch_norm_folded: bool = False
    """How its features were computed; what was learned answers either way (docs/decisions/010)."""
    projected_apart: bool = False
    """The same, of the tower's last linear map."""


class _AnsweringFields(BaseModel):
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    threshold: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class CardFields(BaseModel):
    """What loading relies on; a card holds more."""

    method: dict[str, Any]
    backbone: _BackboneFields
    class_names: list[str] = Field(min_length=2)
    data: dict[str, Any]
    digests: dict[str, str]
    answering: _AnsweringFields = _AnsweringFields()


def make_card(
    *,
    learner: Learner,
    method: MethodParams,
    backbone: Backbone,
    split: Split,
    shots: int,
    params: dict[str, Any],
    curve: Sequence[dict[str, Any]],
    code_revision: str,
    confidence: Confidence | None = None,
) -> dict[str, Any]:
    """Everything that made a learned prompt; digests of the two tensor files are added by `write_artifact`."""
    encoder = getattr(learner, "encoder", None)
    return {
        "schema": SCHEMA,
        "method": method.model_dump(),
        "learned": {name: list(tensor.shape) for name, tensor in learner.state_dict().items()},
        "backbone": backbone_facts(backbone),
        "engine": encoder.summary() if encoder else {},
        "answering": {
            "prompts_per_image": getattr(learner, "prompts_per_image", 0),
            **(confidence.as_dict() if confidence else {}),
        },
        "class_names": list(split.class_names),
        "template": split.template,
        "data": {
            "name": split.dataset_name,
            "dataset_digest": split.dataset_digest,
            "train_digest": split.train_digest,
            "val_digest": split.val_digest,
            "test_digest": split.test_digest,
            "shots": shots,
            "seed": split.seed,
            "classes": split.classes,
        },
        "params": params,
        "training": {"is_built": is_built(learner), "epochs": len(curve), "last": curve[-1] if curve else None},
        "code_revision": code_revision,
        "libraries": libraries(),
    }


def backbone_facts(backbone: Backbone) -> dict[str, Any]:
    return {
        "architecture": backbone.architecture,
        "pretrained": backbone.pretrained,
        "image_precision": backbone.image_precision,
        "image_runtime": backbone.image_runtime,
        "family": backbone.family,
        "weights_digest": backbone.weights_digest,
        "logit_scale": backbone.logit_scale,
        "transform": asdict(backbone.transform),
        "transform_digest": backbone.transform.digest,
        "batch_norm_folded": backbone.folded > 0,
        "projected_apart": backbone.projection is not None,
    }


def libraries() -> dict[str, str]:
    """Versions, Python's too."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}
