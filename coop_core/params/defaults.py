"""Defaults: what a person says in Python -> all parameters of a run, with the values of params.yaml for the rest."""

from typing import Any

from coop_core.backbone import Backbone
from coop_core.data.dataset import has_one_hole
from coop_core.errors import ParamsError
from coop_core.params.file import parse_params
from coop_core.params.run import Params

_EPOCHS = 100
_LEARNING_RATE = 0.002
_MINI_LEARNING_RATE = 0.02
"""The paper's suits CLIP; mini wants more."""


def default_params(
    *,
    method: str | dict[str, Any],
    backbone: str | Backbone,
    shots: int | None,
    template: str,
    seed: int,
    train: dict[str, Any] | None,
) -> Params:
    """A method's name or section, a backbone as `mini` or `ARCHITECTURE:PRETRAINED`, and what else is asked.

    Raises
    ------
    ParamsError
        With every fault in one message.
    """
    if not isinstance(template, str) or not has_one_hole(template):
        raise ParamsError(f"template {template!r} needs exactly one {{}} for the class name")
    named = {"name": method} if isinstance(method, str) else method
    if isinstance(named, dict) and named.get("name") == "upl":
        raise ParamsError("method upl learns from images without labels, and here all have one: take another method, "
                          "or set split.unlabelled in params.yaml and run `dvc repro`")  # fmt: skip
    if train is not None and not isinstance(train, dict):
        raise ParamsError(f"train is {train!r}, not a dict of the train section such as {{'epochs': 50}}")
    section = _backbone(backbone)
    rate = _MINI_LEARNING_RATE if section["architecture"] == "mini" else _LEARNING_RATE
    tree = {
        "seed": seed,
        "dataset": {"source": "given in Python"},
        "split": {"shots": 1 if shots is None else shots},
        "backbone": section,
        "features": {},
        "method": named,
        "train": {"epochs": _EPOCHS, "learning_rate": rate, **(train or {})},
        "engine": {},
        "baselines": {"ensemble_templates": [template]},
        "evaluate": {},
    }
    return parse_params(tree, where="PromptClassifier")


def _backbone(given: str | Backbone) -> dict[str, Any]:
    if isinstance(given, Backbone):
        return {"architecture": given.architecture, "pretrained": given.pretrained,
                "image_precision": given.image_precision, "image_runtime": given.image_runtime}  # fmt: skip
    if not isinstance(given, str) or given.startswith(("local-dir:", "hf-hub:")):      # names with a colon of their own
        return {"architecture": given}
    architecture, _, pretrained = given.partition(":")
    return {"architecture": architecture, "pretrained": pretrained or None}
