"""The linear probe's search: synthetic features with class structure -> seconds, C and accuracies.

    python benchmarks/linear_probe.py --classes 10 --width 1280
    python benchmarks/linear_probe.py --classes 1000 --width 512

On busy cores one thread is faster than several: OMP_NUM_THREADS=1.
"""

import argparse
import time

import numpy as np
import torch
from rich.console import Console

from coop_core.judging.baselines import linear_probe

SHOTS, VAL_SHOTS, TEST_SHOTS = 16, 4, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    console = Console()
    (train, val, test), labels = features(arguments.classes, arguments.width, seed=arguments.seed)

    def progress(done: int, total: int) -> None:
        console.print(f"{done} of {total} fits, {time.perf_counter() - started:.1f} s")

    started = time.perf_counter()
    probe = linear_probe(train, labels[0], val, labels[1], progress=progress)
    seconds = time.perf_counter() - started
    accuracy = (probe.classifier.logits(torch.from_numpy(test)).argmax(dim=1).numpy() == labels[2]).mean()
    console.print(
        f"{arguments.classes} classes, width {arguments.width}: {seconds:.2f} s, C {probe.regularisation:.3g}, "
        f"validation {probe.val_accuracy:.3f}, test {accuracy:.3f}"
    )


def features(classes: int, width: int, *, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Training, validation and test features (n, d) and labels: positive, with a common part, as pooled outputs are."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.normal(size=width)) * 0.3
    centres = rng.normal(size=(classes, width))
    labels = [np.repeat(np.arange(classes), shots) for shots in (SHOTS, VAL_SHOTS, TEST_SHOTS)]
    noise = 1.0 * (width / 128) ** 0.5
    parts = [np.maximum(scales * (0.5 + centres[part] + noise * rng.normal(size=(len(part), width))), 0)
             for part in labels]  # fmt: skip
    return [part.astype(np.float32) for part in parts], labels


if __name__ == "__main__":
    main()
