"""Random weights: an open_clip architecture's name -> a backbone, loaded the way the product loads any."""

import tempfile
from pathlib import Path

import torch

from coop_core.backbone import AskedRuntime, Backbone, Precision, load_backbone
from coop_core.backbone.torchvision_operators import declare_missing_operators


def random_backbone(
    architecture: str, *, device: str, image_precision: Precision = "float32", image_runtime: AskedRuntime = "torch"
) -> Backbone:
    declare_missing_operators()
    import open_clip

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(open_clip.create_model(architecture, pretrained_image=False).state_dict(), path)
        return load_backbone(
            architecture, str(path), image_precision=image_precision, image_runtime=image_runtime, device=device
        )
