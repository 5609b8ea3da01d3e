"""UPL's prompts trained side by side against one after another, in turn in one run -> the ratio of their times.

    python benchmarks/side_by_side.py [--members 16] [--repeats 3]

The same steps over the same features, on `mini` with 10 classes and on ViT-B-32 (random weights) with 100: 16 context
vectors, batches of 32. The learned contexts must agree.
"""

import argparse
import statistics
import time

import torch
from random_weights import random_backbone
from rich.console import Console
from rich.table import Table

from coop_core.backbone import Backbone, load_backbone
from coop_core.features.examples import CachedFeatures
from coop_core.methods import Task, upl
from coop_core.params import TrainParams
from coop_core.prompts.encoder import encode_texts
from coop_core.training import Training, fit

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
    ratios, times = [], []
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
    error = (torch.cat([one.context_vectors for one in alone]) - together.context_vectors).norm()
    moved = (together.context_vectors - contexts).norm()
    return [str(classes), f"{1000 * statistics.median(times):.0f} ms", f"{statistics.median(ratios):.1f}x",
            f"{min(ratios):.1f} to {max(ratios):.1f}", f"{float(error / moved):.1e}"]  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--members", type=int, default=16)
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    table = Table("text tower", "classes", "a step side by side", "faster", "of all runs", "relative difference")
    for name, backbone, classes in (
        ("mini", load_backbone("mini", None), 10), ("ViT-B-32", random_backbone("ViT-B-32", device="cpu"), 100),
    ):  # fmt: skip
        table.add_row(name, *measured(backbone, classes, given.members, given.repeats))
    Console().print(table)


if __name__ == "__main__":
    main()
