"""Step graph: a recorded step answers as what it was recorded from, and where nothing can be recorded, that answers."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from coop_core.params import EngineParams
from coop_core.prompts.step_graph import graphed


def encode(rows: Tensor) -> Tensor:
    return 2 * rows


@pytest.fixture
def recorder(monkeypatch) -> list[int]:
    """CUDA's recorder as torch documents it: one memory for results, written over by the next launch."""
    launches = []

    def record(function: Any, samples: tuple[Tensor]) -> Any:
        memory = function(*samples).detach()

        def launch(rows: Tensor) -> Tensor:
            launches.append(len(rows))
            return memory.copy_(function(rows).detach())

        return launch

    for name in ("device", "stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return launches


def test_a_result_is_not_written_over_by_the_next_launch(recorder):
    launch = graphed(encode, torch.zeros(3, 2))

    first, second = launch(torch.ones(3, 2)), launch(5 * torch.ones(3, 2))

    assert (first.unique().item(), second.unique().item()) == (2, 10)
    assert recorder == [3, 3]


def test_a_step_that_cannot_be_recorded_runs_as_it_is_and_says_so(recorder, monkeypatch, caplog):
    def refuse(*given: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)

    assert graphed(encode, torch.zeros(3, 2)) is encode
    assert "engine.cuda_graphs is not used: operation not permitted" in caplog.text


def test_nothing_is_recorded_unless_it_is_asked_for():
    assert EngineParams().engine().cuda_graphs is False
    assert EngineParams(cuda_graphs=True).engine().cuda_graphs is True
