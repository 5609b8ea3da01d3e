"""Folding: an image tower -> the same tower with each batch norm multiplied into the convolution before it.

In evaluation mode a batch norm is a product and a sum a channel, which the convolution's own weights can take over
(docs/decisions/010-folded-batch-norm.md). Which pairs there are is seen while a picture of noise passes through, not
guessed from names.
"""

import logging
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

log = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""How far the folded tower's features may be from the tower's own, relative to their length."""


@torch.no_grad()
def fold_batch_norms(tower: nn.Module, *, side: int) -> int:
    """Fold a frozen float32 tower in place -> how many batch norms were folded; 0 leaves it as it was.

    It takes pixels (n, 3, side, side). A tower whose features would change by more than `TOLERANCE` is left as it was,
    with a log line.
    """
    if not any(type(module) is nn.BatchNorm2d for module in tower.modules()):
        return 0
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    pairs, own = _watch(tower, pixels)
    names = {module: name for name, module in tower.named_modules()}
    for convolution, norm in pairs:
        tower.set_submodule(names[convolution], fuse_conv_bn_eval(convolution, norm))
        tower.set_submodule(names[norm], nn.Identity().eval())
    error = ((tower(pixels) - own).norm() / own.norm()).item()
    if error <= TOLERANCE:
        return len(pairs)
    log.warning("batch norm is not folded into this image tower, because its features would change by %.0e", error)
    for pair in pairs:
        for module in pair:
            tower.set_submodule(names[module], module)
    return 0


def _watch(tower: nn.Module, pixels: Tensor) -> tuple[list[tuple[nn.Conv2d, nn.BatchNorm2d]], Tensor]:
    """Convolutions whose output a batch norm takes, each called once, and what the tower gives."""
    outputs: list[tuple[Tensor, nn.Conv2d]] = []
    found: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    calls: Counter[nn.Module] = Counter()

    def after_convolution(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        calls[module] += 1
        outputs.append((output, module))                                          # held: no other can be taken for it

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        calls[module] += 1
        found.extend((convolution, module) for output, convolution in outputs if output is inputs[0])

    hooks = [module.register_forward_hook(after_convolution) for module in tower.modules()
             if isinstance(module, nn.Conv2d)]  # fmt: skip
    hooks += [module.register_forward_pre_hook(before_norm) for module in tower.modules()
              if type(module) is nn.BatchNorm2d]  # fmt: skip
    try:
        given = tower(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in found if all(calls[module] == 1 for module in pair)], given
