"""Dassl checkpoints: `model.pth.tar-N` of CoOp and CoCoOp -> what was learned; nothing in the file is run.

The file is a pickle of {state_dict, epoch, optimizer, scheduler, val_result}. Torch's weights-only reader makes tensors
and plain containers alone, and refuses the scheduler's state, which holds a scheduler and an optimiser as objects.
These few names are answered by `_Nothing`, which takes whatever it is given and keeps none of it. A file that names
anything else is refused.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from coop_core.errors import ArtifactError
from coop_core.files import digest_file

_META = ("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
_BUFFERS = ("token_prefix", "token_suffix")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    digest: str
    """SHA-256 of the file."""
    method: Literal["coop", "cocoop"]
    state: dict[str, Tensor]
    """By the names of our method, float32: context_vectors (m, w) or (c, m, w), and meta.*."""
    precision: str
    """What the file holds it in, such as float16."""
    epoch: int | None
    prefix: Tensor | None
    """(c, 1, w) the embeddings before the context, of the classes it was learned for, float32."""
    suffix: Tensor | None
    """(c, l - 1 - m, w) those after it."""

    @property
    def context(self) -> Tensor:
        return self.state["context_vectors"]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and check a file that CoOp's or CoCoOp's code wrote.

    Raises
    ------
    ArtifactError
        For no file, a damaged one, one that needs code to be read, and one of another method.
    """
    if path.is_dir():
        inside = ", ".join(sorted(str(one.relative_to(path)) for one in path.rglob("model*.pth.tar*"))[:5])
        raise ArtifactError(f"{path} is a folder: name a file in it" + (f", such as {inside}" if inside else ""))
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: name the checkpoint's file, such as prompt_learner/model.pth.tar-50")
    told = _load(path)
    found = told.get("state_dict", told) if isinstance(told, dict) else told
    if not isinstance(found, dict) or not all(isinstance(one, Tensor) for one in found.values()):
        raise ArtifactError(f"{path} holds no state dict: is it Dassl's model.pth.tar-N?")
    state = {str(name).removeprefix("module.").removeprefix("prompt_learner."): one for name, one in found.items()}
    meta = {f"meta.{name}": state[f"meta_net.{name}"] for name in _META if f"meta_net.{name}" in state}
    known = {"ctx", *_BUFFERS, *(f"meta_net.{name}" for name in _META)}
    if "ctx" not in state or set(state) - known or len(meta) not in (0, len(_META)):
        why = ", ".join(sorted(set(state) - known)[:3]) or "no ctx" * ("ctx" not in state) or "half of a meta-net"
        raise ArtifactError(f"{path} is neither CoOp's nor CoCoOp's ({why}): other methods are not imported")
    context = state["ctx"]
    learned = {"context_vectors": context, **meta}
    if context.ndim not in ((2,) if meta else (2, 3)) or not all(one.is_floating_point() for one in learned.values()):
        raise ArtifactError(f"{path}: ctx is {context.dtype} {tuple(context.shape)}, not numbers (m, w) or (c, m, w)")
    if odd := [name for name, one in learned.items() if not one.isfinite().all()]:
        raise ArtifactError(f"{path}: {', '.join(odd)} holds values that are no numbers: the training had diverged")
    epoch = told.get("epoch")
    return Checkpoint(
        path, digest_file(path), "cocoop" if meta else "coop",
        {name: one.detach().float().contiguous() for name, one in learned.items()},
        str(context.dtype).removeprefix("torch."), epoch if isinstance(epoch, int) else None,
        *(state[name].float() if name in state else None for name in _BUFFERS),
    )  # fmt: skip


class _Nothing:
    """Stands for an object that is not wanted: made of anything, it keeps nothing."""

    def __new__(cls, *ignored: Any, **also_ignored: Any) -> "_Nothing":
        return object.__new__(cls)

    def __init__(self, *ignored: Any, **also_ignored: Any) -> None:
        pass

    def __setstate__(self, ignored: Any) -> None:
        pass


def _plain_dict(*ignored: Any) -> dict[Any, Any]:
    return {}


_SCHEDULERS = ("CosineAnnealingLR", "StepLR", "MultiStepLR", "LambdaLR", "ExponentialLR", "LRScheduler",
               "_LRScheduler")  # fmt: skip
_STAND_INS: dict[str, Callable[..., Any]] = {
    **{f"torch.optim.lr_scheduler.{name}": _Nothing for name in _SCHEDULERS},
    **{f"torch.optim.{name}": _Nothing for name in ("sgd.SGD", "adam.Adam", "adamw.AdamW", "rmsprop.RMSprop")},
    **{f"dassl.optim.lr_scheduler.{name}": _Nothing for name in ("ConstantWarmupScheduler", "LinearWarmupScheduler")},
    "dassl.optim.radam.RAdam": _Nothing,
    "numpy.dtype": _Nothing,
    "numpy.core.multiarray.scalar": _Nothing,
    "numpy._core.multiarray.scalar": _Nothing,
    "collections.defaultdict": _plain_dict,
    "builtins.dict": _plain_dict,
    "__builtin__.dict": _plain_dict,
}
"""Names that optimisers, schedulers and results in a Dassl checkpoint have, and what is made in their place."""


def _load(path: Path) -> Any:
    allowed: list[Any] = [(stand_in, name) for name, stand_in in _STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and the unpickler raise their own kinds for what is damaged or refused
        reason = " ".join(str(error).split())
        if named := re.search(r"GLOBAL (\S+)", reason):
            raise ArtifactError(f"{path} cannot be read without running code: it names {named[1]}, and only tensors, "
                                "optimisers and schedulers are expected in it") from None  # fmt: skip
        reason = reason.split("Please file an issue")[0][:200]
        raise ArtifactError(f"{path} is no checkpoint that torch reads, or is damaged ({type(error).__name__}: "
                            f"{reason})") from None  # fmt: skip
