"""Runtimes: an image tower -> the same tower as another library than torch runs it, on a CPU.

OpenVINO is an optional package. Where it is faster, and by how much, stands in docs/benchmarks.md; why it is not the
default in docs/decisions/014-another-runtime.md.
"""

import importlib.util
import threading
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coop_core.backbone.base import Precision, Runtime
from coop_core.errors import BackboneError

AskedRuntime = Literal["torch", "openvino", "auto"]
TOLERANCE: dict[Precision, float] = {"float32": 1e-5, "bfloat16": 0.1}
"""How far features may be from those of torch in float32, relative to their length. In bfloat16 torch's own are some
hundredths away."""
_HINTS: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}


def choose_runtime(
    asked: AskedRuntime, tower: nn.Module, *, precision: Precision, device: torch.device
) -> Runtime:
    """What `auto` means for a tower: OpenVINO where it was measured to be 1.3 times as fast and is installed."""
    if asked != "auto":
        return asked
    return "openvino" if device.type == "cpu" and _gains(tower, precision) and is_installed("openvino") else "torch"


def compile_tower(
    tower: nn.Module, runtime: Runtime, *, side: int, precision: Precision, device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """A frozen float32 tower -> a function of pixels (n, 3, side, side) to features (n, d), float32; None for torch.

    Raises
    ------
    BackboneError
        Where the runtime is not installed, does not know the tower, the device or the precision, or says something else
        than torch does.
    """
    if runtime == "torch":
        return None
    if device.type != "cpu":
        raise BackboneError(f"backbone.image_runtime openvino computes on the CPU, but the device is {device}: set "
                            "backbone.image_runtime: torch")  # fmt: skip
    if precision not in _HINTS:
        raise BackboneError(f"backbone.image_runtime openvino does not compute in {precision} here: set "
                            "backbone.image_precision to float32 or bfloat16, or image_runtime to torch")  # fmt: skip
    if not is_installed(runtime):
        raise BackboneError("backbone.image_runtime openvino needs the package openvino: pip install -c "
                            "constraints.txt openvino, or set backbone.image_runtime: torch")  # fmt: skip
    run = _with_openvino(tower, side=side, precision=precision)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = tower(pixels)
    error = ((run(pixels) - own).norm() / own.norm()).item()
    if not error <= TOLERANCE[precision]:
        raise BackboneError(f"openvino computes other features than torch for this image tower (relative error "
                            f"{error:.0e}, {precision}): set backbone.image_runtime: torch")  # fmt: skip
    return run


def is_installed(runtime: Runtime) -> bool:
    return runtime == "torch" or importlib.util.find_spec(runtime) is not None


def _with_openvino(tower: nn.Module, *, side: int, precision: Precision) -> Callable[[Tensor], Tensor]:
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),                          # trainers side by side have one each
    }
    try:
        compiled = openvino.Core().compile_model(_converted(tower, side), "CPU", options)
    except Exception as error:  # its converter and compiler raise kinds of their own for what they do not know
        reason = " ".join(str(error).split())[:200]
        raise BackboneError(f"openvino cannot compute this image tower ({type(error).__name__}: {reason}): set "
                            "backbone.image_runtime: torch") from error  # fmt: skip
    its = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if its != _HINTS[precision]:
        raise BackboneError(f"openvino does not compute in {precision} on this processor, but in {its}: set "
                            "backbone.image_runtime: torch, or backbone.image_precision: float32")  # fmt: skip
    request, one_at_a_time = compiled.create_infer_request(), threading.Lock()

    def run(pixels: Tensor) -> Tensor:
        given = pixels.detach().to("cpu", torch.float32).contiguous().numpy()
        with one_at_a_time:
            return torch.from_numpy(request.infer([given], share_inputs=True)[0].copy())

    return run


@torch.no_grad()
def _converted(tower: nn.Module, side: int) -> Any:
    """By the converter's parts: `openvino.convert_model` reports its use to its maker."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                           # the tracer's, of sizes that stay
        traced = TorchScriptPythonDecoder(tower, example_input=(torch.zeros(1, 3, side, side),))
    reader = FrontEndManager().load_by_framework("pytorch")
    found = reader.convert(reader.load(traced))
    found.reshape([-1, 3, side, side])
    return found


def _gains(tower: nn.Module, precision: Precision) -> bool:
    """Whether it is a network of convolutions in bfloat16; a transformer has one, which cuts the picture up."""
    return precision == "bfloat16" and sum(isinstance(module, nn.Conv2d) for module in tower.modules()) > 4
