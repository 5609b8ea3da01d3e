"""Text encoding, ours against the straightforward way, on the same random weights in one run.

    python benchmarks/text_encoding.py                              ViT-B-32's text tower, this machine's device
    python benchmarks/text_encoding.py --classes 10 100 --device cpu --precision float32 --repeats 3 --json FILE

One row is one forward and backward pass from context vectors to text features of all classes. The straightforward
way runs the model's whole context length for every class, as the CoOp code does. Errors compare ours with it:
features by the largest absolute difference, gradients of the context by the relative norm. Where the straightforward
way does not fit into three quarters of the memory, its classes are encoded in chunks (marked) and computed again in
the backward pass; that costs it another third. With many classes it takes minutes a step.
"""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from coop_core.backbone.tokenizers import from_simple_tokenizer
from coop_core.backbone.torchvision_operators import declare_missing_operators
from coop_core.backbone.towers import CausalTextTower
from coop_core.files import read_json, write_json
from coop_core.memory import device_memory
from coop_core.prompts.encoder import PromptEncoder
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import build_layout, initial_context

KEYS = (
    "classes", "n_context", "position", "class_specific", "device", "precision", "tokens", "seconds",
    "reference_seconds", "speedup", "peak_bytes", "reference_peak_bytes", "max_feature_error", "max_gradient_error",
    "share_of_matrix_rate", "chunks", "reference_chunks",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="ViT-B-32", help="an open_clip model with a causal text tower")
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 47, 100, 397, 1000])
    parser.add_argument("--n-context", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--positions", nargs="+", default=["end", "class-specific"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        return measure_peak(arguments)
    tower, names = load(arguments.architecture, arguments.device)
    rate = matrix_rate(arguments.device, arguments.precision)
    rows = []
    for classes in arguments.classes:
        for n_context in arguments.n_context:
            for form in arguments.positions:
                rows.append(measure(tower, names, classes, n_context, form, rate, arguments))
    show(rows, arguments, rate)
    if arguments.json:
        write_json(arguments.json, rows)
    return None


def load(architecture: str, device: str) -> tuple[CausalTextTower, list[str]]:
    declare_missing_operators()
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(architecture).eval().requires_grad_(False).to(device)
    tokenizer = from_simple_tokenizer(open_clip.get_tokenizer(architecture))
    return CausalTextTower(getattr(model, "text", model), tokenizer, model.encode_text), open_clip.IMAGENET_CLASSNAMES


def encoder_for(
    tower: CausalTextTower, names: list[str], classes: int, n_context: int, form: str, path: Any, precision: Any
) -> tuple[PromptEncoder, torch.Tensor]:
    own = form == "class-specific"
    position: Any = "end" if own else form
    layout = build_layout(tower, names[:classes], n_context=n_context, position=position)
    context = initial_context(
        tower, n_context=n_context, initial_words=None, class_specific=classes if own else None,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    limit = 3 * device_memory(tower.device) // 4 if path == "full" else None
    engine = Engine(path, precision, max_memory=limit)
    return PromptEncoder(tower, layout, class_specific=own, engine=engine), context.to(tower.device)


def step(encoder: PromptEncoder, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Context vectors -> (features, gradient of the context)."""
    context = context.detach().requires_grad_()
    features = encoder(context)
    direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(features.device)
    (features * direction).sum().backward()
    return features.detach(), context.grad


def timed(encoder: PromptEncoder, context: torch.Tensor, repeats: int) -> float:
    """The median of `repeats` steps in seconds, after one that does not count where there are several."""
    seconds = []
    for _ in range(repeats + (repeats > 1)):
        synchronise(context.device)
        start = time.perf_counter()
        step(encoder, context)
        synchronise(context.device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[-repeats:])[repeats // 2]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    tower: CausalTextTower, names: list[str], classes: int, n_context: int, form: str, rate: float, arguments: Any
) -> dict[str, Any]:
    place = (tower, names, classes, n_context, form)
    ours, context = encoder_for(*place, "auto", arguments.precision)
    reference, _ = encoder_for(*place, "full", arguments.precision)
    features, gradient = step(ours, context)
    expected_features, expected_gradient = step(reference, context)
    seconds, reference_seconds = (timed(e, context, arguments.repeats) for e in (ours, reference))
    tokens = ours.rows
    peaks = [peak(arguments, classes, n_context, form, path) for path in ("auto", "full")]
    parameters = sum(p.numel() for p in tower.module.transformer.parameters())
    values = (
        classes, n_context, "end" if form == "class-specific" else form, form == "class-specific",
        arguments.device, arguments.precision, tokens, seconds, reference_seconds, reference_seconds / seconds, *peaks,
        (features - expected_features).abs().max().item(),
        ((gradient - expected_gradient).norm() / expected_gradient.norm()).item(),
        4 * parameters * tokens / seconds / rate, ours.summary()["chunks"], reference.summary()["chunks"],
    )  # fmt: skip
    return dict(zip(KEYS, values, strict=True))


def matrix_rate(device: str, precision: str, size: int = 2048) -> float:
    """This machine's rate of a large matrix product in floating-point operations a second."""
    x = torch.randn(size, size, device=device, dtype=getattr(torch, precision))
    best = 0.0
    for _ in range(8):
        synchronise(x.device)
        start = time.perf_counter()
        x @ x
        synchronise(x.device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def peak(arguments: Any, classes: int, n_context: int, form: str, path: str) -> int:
    """Peak memory of one step over what the loaded model holds, in a process of its own."""
    words = [sys.executable, __file__, "--architecture", arguments.architecture, "--device", arguments.device,
             "--precision", arguments.precision, "--peak", str(classes), str(n_context), form, path]  # fmt: skip
    answer = Path(f".cache/peak-{time.time_ns()}.json")
    subprocess.run([*words, str(answer)], check=True)
    found = read_json(answer)
    answer.unlink()
    return int(found)


def measure_peak(arguments: Any) -> None:
    classes, n_context, form, path, answer = arguments.peak
    tower, names = load(arguments.architecture, arguments.device)
    encoder, context = encoder_for(tower, names, int(classes), int(n_context), form, path, arguments.precision)
    if arguments.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step(encoder, context)
        write_json(Path(answer), torch.cuda.max_memory_allocated() - held)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts again from here
        held = high_water()
        step(encoder, context)
        write_json(Path(answer), high_water() - held)


def high_water() -> int:
    """Peak resident memory of this process in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def show(rows: list[dict[str, Any]], arguments: Any, rate: float) -> None:
    machine = f"{arguments.device}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    title = f"{arguments.architecture}, {arguments.precision}, {machine}; matrix product {rate / 1e9:.0f} GFLOP/s"
    table = Table(title=title)
    headers = ("classes", "context", "form", "tokens", "ours", "straight", "speed-up", "memory", "straight", "share",
               "feature error", "gradient error")  # fmt: skip
    for header in headers:
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            str(row["classes"]), str(row["n_context"]),
            "class-specific" if row["class_specific"] else row["position"], str(row["tokens"]),
            f"{1e3 * row['seconds']:.0f} ms",
            f"{1e3 * row['reference_seconds']:.0f} ms" + (" *" if row["reference_chunks"] > 1 else ""),
            f"{row['speedup']:.1f}x",
            f"{row['peak_bytes'] / 2**20:.0f} MB", f"{row['reference_peak_bytes'] / 2**20:.0f} MB",
            f"{row['share_of_matrix_rate']:.2f}", f"{row['max_feature_error']:.0e}", f"{row['max_gradient_error']:.0e}",
        )  # fmt: skip
    if any(row["reference_chunks"] > 1 for row in rows):
        table.caption = "* in chunks, computed again in the backward pass"
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
