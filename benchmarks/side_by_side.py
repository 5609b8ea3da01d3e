"""UPL's prompts trained side by side against one after another, in turn in one run -> the ratio of their times.

    python benchmarks/side_by_side.py [--members 16] [--repeats 3]

The same steps over the same features, on `mini` with 10 classes and on ViT-B-32 (random weights) with 100: 16 context
vectors, batches of 32. The learned contexts must agree. "At the matrix rate" is how much faster one prompt alone would
be if its products ran at the rate of this machine's large ones: no way of training can gain more than that.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from random_weights import random_backbone
from rich.console import Console
from rich.table import Table

from coop_core.backbone import Backbone, load_backbone
from coop_core.backbone.frozen_linear import FrozenLinear
from coop_core.features.examples import CachedFeatures
from coop_core.methods import Task, upl
from coop_core.params import TrainParams
from coop_core.prompts.encoder import encode_texts
from coop_core.training import Training, fit
from pipelines.allocator import keep_freed_memory

BATCH, STEPS = 32, 4
"""Images a step, and steps an epoch of which there are two."""


def learner(backbone: Backbone, task: Task, contexts: torch.Tensor) -> upl.UPL:
    params = upl.Params(members=len(contexts), n_context=contexts.shape[1])
    found = upl.build(params, backbone=backbone, task=task, generator=torch.Generator())
    found.load_state_dict({"context_vectors": contexts})
    return found


def measured(backbone: Backbone, classes: int, members: int, repeats: int) -> list[str]:
    from open_clip import IMAGENET_CLASSNAMES  # after the backbone, which declares what it needs

    task = Task(tuple(IMAGENET_CLASSNAMES[:classes]), "a photo of a {}.")
    drawn = torch.Generator().manual_seed(0)
    d, n = encode_texts(backbone.text_tower, ["a"]).shape[1], BATCH * STEPS
    examples = CachedFeatures(torch.randn(n, 1, d, generator=drawn), torch.arange(n) % classes)
    contexts = 0.02 * torch.randn(members, 16, backbone.text_tower.width, generator=drawn)
    recipe = TrainParams(epochs=2, batch_size=BATCH, learning_rate=0.02)
    ratios, times, apart = [], [], []
    for _ in range(repeats):
        together = learner(backbone, task, contexts)
        alone = [learner(backbone, task, contexts[i : i + 1]) for i in range(members)]
        started = time.perf_counter()
        fit(Training(together, examples, recipe, 1))
        between = time.perf_counter()
        for i, one in enumerate(alone):
            fit(Training(one, examples, recipe, 1 + i))
        ended = time.perf_counter()
        ratios.append((ended - between) / (between - started))
        times.append((between - started) / (2 * STEPS))
        apart.append((ended - between) / (2 * STEPS * members))
    error = (torch.cat([one.context_vectors.detach() for one in alone]) - together.context_vectors.detach()).norm()
    moved = (together.context_vectors.detach() - contexts).norm()
    tower: Any = backbone.text_tower
    module = tower.module.transformer if hasattr(tower, "module") else tower.encoder
    weights = sum(p.numel() for name, p in module.named_parameters()
                  if p.ndim == 2 and "embed" not in name and "projection" not in name)  # fmt: skip
    share = 4 * weights * alone[0].encoder.rows / statistics.median(apart) / product_rate()
    return [str(classes), f"{1000 * statistics.median(times):.0f} ms", f"{1000 * statistics.median(apart):.0f} ms",
            f"{statistics.median(ratios):.2f}x", f"{min(ratios):.2f} to {max(ratios):.2f}", f"{1 / share:.2f}x",
            f"{(error / moved).item():.1e}"]  # fmt: skip


def product_rate(size: int = 2048) -> float:
    """Floating-point operations a second of a large product with a frozen matrix, at best."""
    x, weight = torch.randn(size, size), torch.randn(size, size)
    product, best = FrozenLinear(weight, torch.zeros(size), None, torch.float32), 0.0
    for _ in range(20):
        started = time.perf_counter()
        product(x)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--members", type=int, default=16)
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    keep_freed_memory()  # as whatever trains does
    table = Table("text tower", "classes", "a step side by side", "of one alone", "faster", "of all runs",
                  "at the matrix rate", "relative difference")  # fmt: skip
    for name, backbone, classes in (
        ("mini", load_backbone("mini", None), 10), ("ViT-B-32", random_backbone("ViT-B-32", device="cpu"), 100),
    ):  # fmt: skip
        table.add_row(name, *measured(backbone, classes, given.members, given.repeats))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
