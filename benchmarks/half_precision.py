"""Half precision on padded text towers: a step of `mini` in float32 and in bfloat16, in turn -> the ratio.

    python benchmarks/half_precision.py [--classes 10 40]
"""

import argparse
import logging
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from coop_core.backbone import Precision, TextTower, load_backbone
from coop_core.prompts.encoder import PromptEncoder
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import build_layout

N_CONTEXT = 16
STEPS = 7


def encoder(tower: TextTower, classes: int, precision: Precision) -> PromptEncoder:
    layout = build_layout(tower, [f"species number {i}" for i in range(classes)], n_context=N_CONTEXT)
    return PromptEncoder(tower, layout, engine=Engine(precision=precision))


def seconds(encode: PromptEncoder, context: torch.Tensor) -> float:
    """Of one forward and backward pass."""
    started = time.perf_counter()
    encode(context).sum().backward()
    return time.perf_counter() - started


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--classes", type=int, nargs="+", default=[10, 40])
    logging.disable(logging.WARNING)  # what is warned of is what is measured
    tower = load_backbone("mini", None).text_tower
    table = Table("classes", "float32 ms", "bfloat16 ms", "float32 / bfloat16")
    for classes in options.parse_args().classes:
        context = (0.02 * torch.randn(N_CONTEXT, tower.width)).requires_grad_()
        both = [encoder(tower, classes, "float32"), encoder(tower, classes, "bfloat16")]
        pairs = [[seconds(one, context) for one in both] for _ in range(STEPS + 2)][2:]
        exact, half = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        table.add_row(str(classes), f"{exact:.0f}", f"{half:.0f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
