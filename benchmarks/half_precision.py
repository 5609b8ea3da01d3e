"""Half precision on padded text towers: a step in float32 and in bfloat16, in turn -> the ratio.

    python benchmarks/half_precision.py [--classes 10 40] [--towers mini bert-base]

`bert-base` has the shape of BiomedCLIP's text tower (12 layers, width 768) and random weights.
"""

import argparse
import itertools
import logging
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from coop_core.backbone import Precision, TextTower, load_backbone
from coop_core.backbone.towers import PaddedTextTower, mean_pool
from coop_core.prompts.encoder import PromptEncoder
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import build_layout
from pipelines.allocator import keep_freed_memory

N_CONTEXT = 16
STEPS = 7


def encoder(tower: TextTower, classes: int, precision: Precision) -> PromptEncoder:
    layout = build_layout(tower, [f"species number {i}" for i in range(classes)], n_context=N_CONTEXT)
    return PromptEncoder(tower, layout, engine=Engine(precision=precision))


def load_tower(name: str) -> TextTower:
    tower = load_backbone("mini", None).text_tower
    if name == "mini":
        return tower
    from transformers import BertConfig, BertModel

    assert isinstance(tower, PaddedTextTower)
    encoder = BertModel(BertConfig(vocab_size=tower.vocabulary_size), add_pooling_layer=False).eval()
    return PaddedTextTower(encoder.requires_grad_(False), tower.tokenizer, pool=mean_pool, project=torch.nn.Identity(),
                           context_length=tower.context_length, pad_id=tower.pad_id)  # fmt: skip


def seconds(encode: PromptEncoder, context: torch.Tensor) -> float:
    """Of one forward and backward pass."""
    started = time.perf_counter()
    encode(context).sum().backward()
    return time.perf_counter() - started


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--classes", type=int, nargs="+", default=[10, 40])
    options.add_argument("--towers", nargs="+", default=["mini", "bert-base"])
    asked = options.parse_args()
    keep_freed_memory()  # as whatever trains does
    logging.disable(logging.WARNING)  # what is warned of is what is measured
    table = Table("tower", "classes", "float32 ms", "bfloat16 ms", "float32 / bfloat16")
    for name, classes in itertools.product(asked.towers, asked.classes):
        tower = load_tower(name)
        context = (0.02 * torch.randn(N_CONTEXT, tower.width)).requires_grad_()
        both = [encoder(tower, classes, "float32"), encoder(tower, classes, "bfloat16")]
        pairs = [[seconds(one, context) for one in both] for _ in range(STEPS + 2)][2:]
        exact, half = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        table.add_row(name, str(classes), f"{exact:.0f}", f"{half:.0f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
