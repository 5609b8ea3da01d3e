"""An untrained prompt on a backbone, written as an artefact."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from toy_split import toy_split

from coop_core.artifact import write_artifact
from coop_core.backbone import Backbone
from coop_core.card import make_card
from coop_core.methods import Task, coop


def write_prompt(
    folder: Path, backbone: Backbone, class_names: Sequence[str], *, curve: Sequence[dict[str, Any]] = ()
) -> Path:
    """The folder, with an artefact in it."""
    params = coop.Params(n_context=3)
    learner = coop.build(
        params, backbone=backbone, task=Task(tuple(class_names), "a photo of a {}."),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    card = make_card(
        learner=learner, method=params, backbone=backbone, split=toy_split(tuple(class_names)), shots=1,
        params={"seed": 7}, curve=curve, code_revision="abc123",
    )  # fmt: skip
    write_artifact(folder, learner, card)
    return folder
