"""A checkpoint as Dassl's code writes it: our golden context -> prompt_learner/model.pth.tar-N."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coop_core.backbone import Backbone
from coop_core.prompts.layout import build_layout


class ConstantWarmupScheduler(torch.optim.lr_scheduler.LRScheduler):
    """Constant at first, then what follows; it keeps what follows as an object, and so the file holds it."""

    def __init__(self, optimizer: Any, successor: Any) -> None:
        self.successor, self.warmup_epoch, self.cons_lr = successor, 1, 1e-5
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [self.cons_lr for _ in self.base_lrs]


def write_dassl(
    path: Path, backbone: Backbone, learned: dict[str, Tensor], class_names: tuple[str, ...], *,
    dtype: torch.dtype = torch.float32, prefix: str = "", epoch: int = 50,
) -> Path:  # fmt: skip
    """`learned` by upstream's names, ctx and meta_net.*; the buffers are made of the class names as upstream does."""
    tower, m = backbone.text_tower, learned["ctx"].shape[-2]
    layout = build_layout(tower, class_names, n_context=m)
    ids = torch.full((len(class_names), tower.context_length), tower.pad_id)
    ids[:, : layout.token_ids.shape[1]] = layout.token_ids
    rows = tower.embed(ids)
    buffers = {"token_prefix": rows[:, :1], "token_suffix": rows[:, 1 + m :]}
    parameters = {name: nn.Parameter(tensor.to(dtype, copy=True)) for name, tensor in learned.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.002, momentum=0.9, weight_decay=5e-4)
    sum(one.float().square().sum() for one in parameters.values()).backward()
    optimizer.step()
    scheduler = ConstantWarmupScheduler(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50))
    state = {f"{prefix}{name}": tensor.to(dtype) for name, tensor in {**learned, **buffers}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "epoch": epoch, "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(), "val_result": None}, path)  # fmt: skip
    return path
