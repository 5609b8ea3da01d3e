"""Engine: how prompts are encoded, as parameters ask for it."""

from dataclasses import dataclass
from typing import Literal

import torch

from coop_core.backbone import Precision
from coop_core.memory import device_memory

Path = Literal["packed", "cut", "full"]


@dataclass(frozen=True)
class Engine:
    """How prompts are encoded; changes speed, memory and rounding, never what is computed."""

    path: Path | Literal["auto"] = "auto"
    precision: Precision = "float32"
    """What the frozen text tower computes in; context vectors, features and logits are float32."""
    max_memory: int | None = None
    """Bytes that one step may hold besides the weights, as far as a single class allows; None takes a quarter of the
    device's memory, divided by `sharing`."""
    sharing: int = 1
    """Processes that train on the device at the same time."""
    cuda_graphs: bool = False
    """Whether a packed step on CUDA is recorded once and launched whole; never tried on a GPU."""

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)

    def memory_on(self, device: torch.device) -> int:
        return device_memory(device) // (4 * self.sharing) if self.max_memory is None else self.max_memory
