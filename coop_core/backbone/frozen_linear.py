"""Frozen linear: a product with a frozen matrix, under autograd.

Only the gradient of the rows is wanted, never that of a weight, so nothing is kept for the backward pass, and the
matrix lies in memory as the processor multiplies fastest, once for each direction (docs/decisions/003).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenLinear:
    """y = x W^T + b with frozen W (out, in) and b (out): (..., in) -> (..., out)."""

    def __init__(self, weight: Tensor, bias: Tensor, scale: Tensor | None, dtype: torch.dtype) -> None:
        """`scale` (out,) is multiplied into both."""
        if scale is not None:
            weight, bias = weight * scale[:, None], bias * scale
        weight, bias = weight.detach().to(dtype), bias.detach()
        self.forward, self.backward = _product(weight, bias.to(dtype)), _product(weight.T, None)

    def __call__(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)


class _Layer(nn.Module):
    """A frozen nn.Linear; some encoders ask it for its weight's type."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        self._linear = FrozenLinear(layer.weight, bias, None, dtype)
        self.weight = torch.empty(0, dtype=dtype, device=layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x.to(self.weight.dtype))


def with_frozen_products(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose linear layers are frozen and computed in a type; all other parameters are the module's own."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return _replaced(copy.deepcopy(module, shared), dtype)


def _replaced(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    if type(module) is nn.Linear:
        return _Layer(module, dtype)
    for name, child in module.named_children():
        setattr(module, name, _replaced(child, dtype))
    return module


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.backward(gradient), None


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x (..., in) -> x W^T + bias (..., out).

    On a CPU, W is kept as oneDNN multiplies it: for the few rows of a short class list, putting it in that order
    takes much of the product's time.
    """
    if not is_packable(weight):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def is_packable(weight: Tensor) -> bool:
    """Whether this processor multiplies with a matrix of this kind through oneDNN."""
    mkldnn, asked = torch.backends.mkldnn, {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(weight.dtype)
    if weight.device.type != "cpu" or not mkldnn.is_available() or not mkldnn.enabled:
        return False
    return asked is None or bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{asked}_supported")())
