"""EfficientNet-Lite0: pixels -> 1280 pooled activations, in plain torch, so that `mini` starts without timm.

The network of Tan and Le, "EfficientNet" (2019), table 1, in its Lite form: ReLU6 for Swish, no squeeze-and-excitation.
Modules bear the names that timm gives them, because the digest of the weights is taken over names; padding is that of
TensorFlow ("same"), which the packaged weights were trained with.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
           (1, 3, 1, 6, 320))  # fmt: skip
"""Blocks, kernel, stride of the first block, expansion and output channels of each stage."""
_STEM, WIDTH, _CLASSES = 32, 1280, 1000


class EfficientNetLite0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, _STEM, 3, stride=2, bias=False)
        self.bn1 = _norm(_STEM)
        stages, width = [], _STEM
        for blocks, kernel, stride, expansion, out in _STAGES:
            found: list[nn.Module] = []
            for number in range(blocks):
                step = stride if number == 0 else 1
                found.append(_Separable(width, out, kernel) if expansion == 1 else
                             _Inverted(width, out, kernel, step, expansion))  # fmt: skip
                width = out
            stages.append(nn.Sequential(*found))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(width, WIDTH, 1, bias=False)
        self.bn2 = _norm(WIDTH)
        self.classifier = nn.Linear(WIDTH, _CLASSES)
        """ImageNet's; `mini` takes its rows for the joint space and never calls it."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (n, 3, s, s) -> pooled activations (n, 1280)."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        x = self.blocks(F.relu6(self.bn1(self.conv_stem(pixels))))                # (n, 320, s / 32, s / 32)
        return F.relu6(self.bn2(self.conv_head(x))).mean(dim=(2, 3))


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow does: the odd pixel goes to the right and to the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = (self._padding_of(side, axis) for axis, side in enumerate(x.shape[-2:]))
        if any(height + width):
            x = F.pad(x, (*width, *height))
        return super().forward(x)

    def _padding_of(self, side: int, axis: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[axis], self.stride[axis]
        missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        return missing // 2, missing - missing // 2


class _Separable(nn.Module):
    """A convolution a channel, then one across them."""

    def __init__(self, width: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv_dw, self.bn1 = _depthwise(width, kernel, 1), _norm(width)
        self.conv_pw, self.bn2 = nn.Conv2d(width, out, 1, bias=False), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(x)))))


class _Inverted(nn.Module):
    """Widen, a convolution a channel, narrow; the input is added where the shape allows it."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * width
        self.conv_pw, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), _norm(inner)
        self.conv_dw, self.bn2 = _depthwise(inner, kernel, stride), _norm(inner)
        self.conv_pwl, self.bn3 = nn.Conv2d(inner, out, 1, bias=False), _norm(out)
        self.adds_input = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn1(self.conv_pw(x)))
        y = F.relu6(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.adds_input else y


def _depthwise(width: int, kernel: int, stride: int) -> nn.Conv2d:
    if stride == 1:
        return nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
    return SameConv2d(width, width, kernel, stride=stride, groups=width, bias=False)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)
