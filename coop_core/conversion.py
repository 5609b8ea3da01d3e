"""Conversion: a frozen module of pixels -> an ONNX file and an OpenVINO model, and runtimes that answer with them.

The only module that knows onnx, onnxruntime and openvino, which the extra `export` brings; importing it imports none
of them. What it makes computes in float32: OpenVINO would choose bfloat16 where the processor has it, and image
features would change by hundredths.
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coop_core.errors import ArtifactError

INPUT = "pixels"
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino")
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
"""What OpenVINO must be told at compiling."""

Runtime = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Normalised pixels (n, 3, size, size), float32 -> every output by name."""


def require_packages() -> None:
    """Raises ArtifactError, with what to type, unless all packages are here."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ArtifactError(f"an export needs {', '.join(missing)}: pip install -c constraints.txt -e '.[export]' in "
                            "the project's folder")  # fmt: skip


def write_onnx(module: nn.Module, path: Path, *, example: Tensor, outputs: Sequence[str]) -> None:
    """A module in evaluation mode, from pixels (n, 3, size, size) to `outputs` -> one ONNX file for any n.

    `example` (2, 3, size, size) is passed through it once; a batch of 1 would be taken for fixed. Weights stand in the
    file itself, which ONNX bounds at 2 GB.

    Raises
    ------
    ArtifactError
        When the module computes something that ONNX has no operator for.
    """
    images = torch.export.Dim("n", min=1, max=1 << 20)
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                module, (example,), path, input_names=[INPUT], output_names=list(outputs),
                dynamic_shapes=({0: images},), dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter raises its own kinds, by the step that failed
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ArtifactError(f"this model cannot be written as ONNX ({reason}): export its class weights with "
                            "--only weights") from error  # fmt: skip


def write_openvino(onnx: Path, path: Path) -> None:
    """An ONNX file -> OpenVINO's IR: `path` (.xml), and its weights beside it (.bin), not compressed to float16."""
    import openvino

    # Not openvino.convert_model, which reports its use to its makers' server.
    openvino.save_model(openvino.Core().read_model(onnx), path, compress_to_fp16=False)


def onnx_runtime(path: Path) -> Runtime:
    """ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3                                                # errors alone
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda pixels: dict(zip(names, session.run(names, {INPUT: pixels}), strict=True))


def openvino_runtime(path: Path) -> Runtime:
    """OpenVINO on the CPU, in float32."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", FLOAT32)

    def answer(pixels: np.ndarray) -> dict[str, np.ndarray]:
        found: Any = compiled({INPUT: pixels})
        return {output.any_name: np.array(found[output]) for output in compiled.outputs}

    return answer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks of its own steps: to standard output, as warnings and as log lines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
