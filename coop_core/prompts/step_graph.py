"""Step graph: an encoding that is many small CUDA kernels each way -> one launch each way.

On a GPU a short class list is over before its next kernel can be launched from Python. Off unless
`engine.cuda_graphs` asks for it: no GPU was at hand when this was written, so it has never run.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def graphed(encode: Callable[[Tensor], Tensor], rows: Tensor) -> Callable[[Tensor], Tensor]:
    """`encode` recorded for rows of this shape, with its backward pass; itself where CUDA cannot record it.

    There is one memory for what the forward pass keeps, so its backward pass must come before the next forward.
    """
    sample = rows.detach().clone().requires_grad_()
    try:
        with torch.cuda.device(rows.device), torch.cuda.stream(torch.cuda.Stream(rows.device)):
            recorded: Any = torch.cuda.make_graphed_callables(encode, (sample,))
    except RuntimeError as error:
        log.warning("engine.cuda_graphs is not used: %s", error)
        return encode
    return lambda rows: recorded(rows).clone()  # the next launch writes over what it returned
