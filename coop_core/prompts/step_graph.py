"""Step graph: a forward and a backward pass of many small CUDA kernels -> one launch each.

On a GPU a short class list is over before its next kernel can be launched from Python. Recorded once as CUDA
graphs, a pass is one launch; rows and gradients are copied into the memory it was recorded with.
"""

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Steps = tuple[Callable[[Tensor], tuple[Tensor, Any]], Callable[[Tensor, Any], Tensor]]
"""Forward: rows -> the result, and what backward reads. Backward: the result's gradient, that -> the rows' gradient."""


class Ticket:
    """Held by whoever has run forward and may still run backward."""


class StepGraph:
    def __init__(self, steps: Steps, rows: Tensor) -> None:
        """Record both passes for rows of this shape; raises RuntimeError where CUDA cannot."""
        forward, backward = steps
        self._rows = rows.detach().clone()
        self._holder: Callable[[], Ticket | None] = lambda: None
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward):
            self._result, self._saved = forward(self._rows)
        self._gradient = torch.zeros_like(self._result)
        with torch.cuda.graph(self._backward, pool=self._forward.pool()):
            self._found = backward(self._gradient, self._saved)

    @property
    def free(self) -> bool:
        """Whether nobody's backward pass is still to come: there is one memory for what forward saves."""
        return self._holder() is None

    def forward(self, rows: Tensor) -> tuple[Tensor, Ticket]:
        ticket = Ticket()
        self._holder = weakref.ref(ticket)
        self._rows.copy_(rows)
        self._forward.replay()
        return self._result.clone(), ticket

    def backward(self, gradient: Tensor) -> Tensor:
        self._gradient.copy_(gradient)
        self._backward.replay()
        return self._found.clone()


class Recorder:
    """Records a step that comes again and again; where that fails, steps go on being launched kernel by kernel."""

    AFTER = 3
    """Steps of one kind before it is worth recording; they also warm up the libraries, as recording needs."""

    def __init__(self) -> None:
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, StepGraph | None] = {}

    def graph_for(self, rows: Tensor, steps: Callable[[], Steps]) -> StepGraph | None:
        """A graph that may be used now, or None; `steps` are to be recorded with memory of their own."""
        if not rows.is_cuda:
            return None
        key = rows.shape
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] > self.AFTER and key not in self._graphs:
            try:
                self._graphs[key] = StepGraph(steps(), rows)
            except RuntimeError as error:
                log.warning("CUDA graphs are not used: %s", error)
                self._graphs[key] = None
        graph = self._graphs.get(key)
        return graph if graph is not None and graph.free else None
