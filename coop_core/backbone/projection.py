"""Projection: an image tower -> the same tower without its last linear map, and that map.

Some methods learn on what comes before the map (ProLIP), all others on what comes after it; one image pass serves both.
What is split off, by the tower's type: the matrix of open_clip's vision transformers, the attention pool's last map of
its ResNets, and the linear head on a timm trunk. The tower itself is left as it is, and shares its tensors with the one
without the map.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    tower: nn.Module
    """Normalised pixels of its own type -> (n, p), what comes before the map."""
    weight: Tensor
    """(p, d), float32"""
    bias: Tensor | None = None
    """(d,), float32"""

    def __call__(self, unprojected: Tensor) -> Tensor:
        """(..., p) -> image features (..., d), float32.

        Computed in float64, so that a row is the same whatever rows it is computed with.
        """
        found = unprojected.double() @ self.weight.double()
        return (found if self.bias is None else found + self.bias.double()).float()


def split_projection(tower: nn.Module) -> Projection | None:
    """None where the last thing the tower does is no linear map, or of a type that is not known here."""
    visual: Any = tower
    kind = type(tower).__name__
    if kind == "VisionTransformer" and isinstance(getattr(visual, "proj", None), Tensor):
        return Projection(_with(tower, "proj", None), visual.proj.detach().float())
    if kind == "ModifiedResNet" and type(visual.attnpool).__name__ == "AttentionPool2d":
        pool = visual.attnpool
        plain = _with(pool, "c_proj", _identity(pool.c_proj))                     # not called: its weights are read
        return _of_linear(_with(tower, "attnpool", plain), pool.c_proj)
    if kind == "TimmModel" and list(dict(visual.head.named_children())) == ["drop", "proj"]:
        return _of_linear(_with(tower, "head", nn.Identity().eval()), visual.head.proj)
    return None


def _of_linear(tower: nn.Module, last: nn.Linear) -> Projection:
    bias = None if last.bias is None else last.bias.detach().float()
    return Projection(tower, last.weight.detach().float().T.contiguous(), bias)


def _identity(like: nn.Linear) -> nn.Linear:
    """Of the width that it is given, so that its product is exact."""
    width: int = like.in_features
    how: dict[str, Any] = {"device": like.weight.device, "dtype": like.weight.dtype}
    found = nn.Linear(width, width, bias=False, **how)
    found.weight = nn.Parameter(torch.eye(width, **how), requires_grad=False)
    return found.eval()


def _with(module: nn.Module, name: str, part: nn.Module | None) -> nn.Module:
    """A module that shares all with this one but a part of another kind."""
    found = copy.copy(module)
    own = "_parameters" if name in module._parameters else "_modules"
    found.__dict__[own] = {**module.__dict__[own], name: part}
    return found
