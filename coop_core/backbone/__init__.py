"""Backbones: architecture + pretrained tag -> a frozen image tower and text tower.

The only package that knows open_clip, timm and transformers. Importing it imports none of them.
"""

from typing import TYPE_CHECKING

from coop_core.backbone.base import (
    Backbone,
    Precision,
    Runtime,
    SentenceTower,
    TextTower,
    Tokenizer,
    backbone_name,
    digest_tensors,
    pad,
)
from coop_core.backbone.runtimes import AskedRuntime, is_installed

if TYPE_CHECKING:
    import torch

__all__ = ["AskedRuntime", "Backbone", "Precision", "Runtime", "SentenceTower", "TextTower", "Tokenizer",
           "backbone_name", "digest_tensors", "is_installed", "load_backbone", "pad"]  # fmt: skip


def load_backbone(
    architecture: str,
    pretrained: str | None,
    *,
    image_precision: Precision = "float32",
    image_runtime: AskedRuntime = "torch",
    device: "torch.device | str" = "cpu",
) -> Backbone:
    """Load frozen weights; `mini` needs no network, every other name goes to open_clip.

    The image tower is computed in `image_precision` by `image_runtime`, the text tower in float32 by torch (an engine
    has its own say).

    Raises
    ------
    BackboneError
        For unknown names, weights that cannot be had, an activation that does not fit the weights, text towers that
        open_clip itself computes wrongly, and a runtime that is not installed or does not say what torch says. Families
        that prompts cannot be injected into load, and refuse prompts by `Backbone.text_tower` (the message names the
        family).
    """
    if architecture == "mini":
        from coop_core.backbone.mini import load_mini

        return load_mini(pretrained, image_precision=image_precision, image_runtime=image_runtime, device=device)
    from coop_core.backbone.open_clip_models import load_open_clip

    return load_open_clip(
        architecture, pretrained, image_precision=image_precision, image_runtime=image_runtime, device=device
    )
