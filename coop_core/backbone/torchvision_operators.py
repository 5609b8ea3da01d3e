"""Make torchvision importable beside a CPU build of torch.

Package registries carry torchvision for Linux as a CUDA build. Beside a CPU build of torch its compiled
operators do not load, and the import dies with "operator torchvision::nms does not exist", because it
registers shape rules for two operators that are not there. open_clip and timm import it; neither they nor we
call those operators. Declaring them first lets the import pass. On a matching pair nothing happens.
"""

import importlib.util
from pathlib import Path

import torch

_DECLARED: list[torch.library.Library] = []  # a library's operators live as long as the object


def declare_missing_operators() -> None:
    """Call before the first import of torchvision."""
    if _DECLARED or _compiled_operators_load():
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    compiled = next((path for path in Path(spec.origin).parent.glob("_C*") if path.suffix in {".so", ".pyd"}), None)
    if compiled is None:
        return False
    try:
        torch.ops.load_library(str(compiled))
    except OSError:  # it links against CUDA libraries that a CPU build does not bring
        return False
    return True
