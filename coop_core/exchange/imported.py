"""Imported: a checkpoint, its backbone and class names -> an artefact, whose card says what is unknown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coop_core.artifact import write_artifact
from coop_core.backbone import Backbone
from coop_core.card import SCHEMA, backbone_facts, libraries
from coop_core.data.dataset import words
from coop_core.errors import ArtifactError
from coop_core.exchange.dassl import Checkpoint
from coop_core.files import read_json, whole_folder
from coop_core.methods import Learner, MethodParams, Task, cocoop, coop
from coop_core.prompts.layout import Position, build_layout

UNKNOWN = "unknown"
_OF_DATA = ("name", "dataset_digest", "train_digest", "val_digest", "test_digest", "shots", "seed", "classes")
_SAME = 0.01
"""Relative difference below which embeddings are the same ones, one of them rounded to float16."""


def import_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    backbone: Backbone,
    class_names: Sequence[str],
    position: Position = "end",
    code_revision: str,
) -> dict[str, Any]:
    """Write an artefact in our own form -> its card.

    `position` is where the class name stands in the prompt, which the file does not say.

    Raises
    ------
    ArtifactError
        When the context or the meta-net does not fit the backbone, the embeddings kept with it are another tower's,
        or class-specific context is for another number of classes.
    PromptError
        When prompts do not fit the text tower.
    """
    names = tuple(map(words, class_names))
    if (folder / "card.json").exists() and "imported" not in read_json(folder / "card.json"):
        raise ArtifactError(f"{folder} holds a prompt that was not imported: name another folder with --to")
    _check_names(checkpoint, names)
    _check_width(checkpoint, backbone)
    params = _params(checkpoint, position)
    build: Any = coop.build if checkpoint.method == "coop" else cocoop.build
    learner = build(params, backbone=backbone, task=Task(names, "a photo of a {}."), generator=torch.Generator())
    own, given = (_shapes(state) for state in (learner.state_dict(), checkpoint.state))
    if own != given:
        raise ArtifactError(f"{checkpoint.path} holds {given}, but {checkpoint.method} on {backbone.name} has {own}: "
                            "name the backbone that it was learned on")  # fmt: skip
    same_names = _kept_names(checkpoint, backbone, names)
    if same_names is False and checkpoint.context.ndim == 3:
        raise ArtifactError(f"{checkpoint.path} holds context of its own for each class, and the class names given are "
                            "not those it was learned for, in its order: give these")  # fmt: skip
    learner.load_state_dict(checkpoint.state)
    card = _card(checkpoint, learner, params, backbone, names, code_revision=code_revision, same_names=same_names)
    with whole_folder(folder, marker="card.json") as made:
        write_artifact(made, learner, card)
    return card


def _params(checkpoint: Checkpoint, position: Position) -> MethodParams:
    n_context = checkpoint.context.shape[-2]
    if checkpoint.method == "coop":
        specific = checkpoint.context.ndim == 3
        return coop.Params(n_context=n_context, class_specific=specific, class_token_position=position)
    if position != "end":
        raise ArtifactError(f"--position {position}: CoCoOp has the class name at the end alone")
    hidden, d = checkpoint.state["meta.linear1.weight"].shape
    return cocoop.Params(n_context=n_context, initial_words=None, reduction=max(1, d // hidden))


def _check_names(checkpoint: Checkpoint, names: tuple[str, ...]) -> None:
    context = checkpoint.context
    if len(set(names)) < max(2, len(names)):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ArtifactError(f"class names must be two or more, and differ{': twice ' if twice else ''}"
                            f"{', '.join(twice[:3])}")  # fmt: skip
    if context.ndim == 3 and len(context) != len(names):
        raise ArtifactError(f"{checkpoint.path} holds context of its own for each of {len(context)} classes, and "
                            f"{len(names)} class names are given: give those it was learned for, in order")  # fmt: skip


def _check_width(checkpoint: Checkpoint, backbone: Backbone) -> None:
    width = checkpoint.context.shape[-1]
    if width != backbone.text_tower.width:
        raise ArtifactError(f"{checkpoint.path} holds context vectors {width} wide, and the text tower of "
                            f"{backbone.name} is {backbone.text_tower.width} wide: name the backbone that it was "
                            "learned on")  # fmt: skip


def _kept_names(checkpoint: Checkpoint, backbone: Backbone, names: tuple[str, ...]) -> bool | None:
    """Whether the embeddings that lie in the file are those of these class names; None without any.

    They are no part of what was learned. Those before the context are the same for every class and name the tower.
    """
    if checkpoint.prefix is None or checkpoint.suffix is None:
        return None
    tower, m = backbone.text_tower, checkpoint.context.shape[-2]
    layout = build_layout(tower, names, n_context=m)
    before = tower.embed(layout.token_ids[:1, :1])[0]                             # (1, w)
    if not _are_same(checkpoint.prefix[:1, 0], before):
        raise ArtifactError(f"{checkpoint.path} was not learned on {backbone.name}: the embedding of its first token "
                            "is another one; name the architecture and weights that it was learned on")  # fmt: skip
    if len(checkpoint.suffix) != len(names):
        return False
    for row, (ids, length) in enumerate(zip(layout.token_ids, layout.lengths.tolist(), strict=True)):
        after = tower.embed(ids[1 + m : length])                                  # (its own, w)
        if not _are_same(checkpoint.suffix[row, : len(after)], after):
            return False
    return True


def _are_same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected.cpu()).norm() <= _SAME * expected.norm().cpu())


def _card(
    checkpoint: Checkpoint,
    learner: Learner,
    params: MethodParams,
    backbone: Backbone,
    names: tuple[str, ...],
    *,
    code_revision: str,
    same_names: bool | None,
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "method": params.model_dump(),
        "learned": {name: list(tensor.shape) for name, tensor in learner.state_dict().items()},
        "backbone": backbone_facts(backbone),
        "engine": learner.encoder.summary(),  # type: ignore[attr-defined]
        "answering": {"prompts_per_image": getattr(learner, "prompts_per_image", 0)},
        "class_names": list(names),
        "data": dict.fromkeys(_OF_DATA, UNKNOWN),
        "params": {},
        "training": {"is_built": False, "epochs": checkpoint.epoch or UNKNOWN, "last": None},
        "imported": {
            "layout": "Dassl",
            "file": checkpoint.path.name,
            "sha256": checkpoint.digest,
            "precision": checkpoint.precision,
            "class_names": {None: "given, the file does not say", True: "given, and those of the file",
                            False: "given, other than those of the file"}[same_names],
            "backbone": "given" if same_names is None else "given; the file's first token is of its text tower",
            "class_token_position": "given, the file does not say",
            "unknown": ["data set", "split", "seed", "training parameters", "accuracy", "code revision"],
        },
        "code_revision": code_revision,
        "libraries": libraries(),
    }  # fmt: skip


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in sorted(state.items())}
