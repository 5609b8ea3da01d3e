"""Memory: what a container or a batch job leaves a process counts, not what the machine has."""

from pathlib import Path

import pytest
import torch

from coop_core import memory
from coop_core.memory import device_memory, group_limits
from coop_core.prompts.engine import Engine


@pytest.fixture
def groups(tmp_path: Path):
    """(root of the groups, the file that says which group this process is in)."""
    (tmp_path / "cgroup").write_text("4:memory:/job/step\n0::/job/step\n")
    return tmp_path / "fs", tmp_path / "cgroup"


@pytest.mark.parametrize(
    "file",
    ["memory.max", "job/memory.max", "job/step/memory.max", "memory/memory.limit_in_bytes",
     "memory/job/memory.limit_in_bytes", "memory/job/step/memory.limit_in_bytes"],
)  # fmt: skip
def test_a_limit_of_any_group_above_the_process_counts(groups, file):
    (groups[0] / file).parent.mkdir(parents=True)
    (groups[0] / file).write_text("2000000000\n")

    assert group_limits(*groups) == [2_000_000_000]


def test_a_group_beside_that_of_the_process_does_not_count(groups):
    (groups[0] / "other").mkdir(parents=True)
    (groups[0] / "other/memory.max").write_text("1")

    assert group_limits(*groups) == []


@pytest.mark.parametrize("content", ["max", "", "nonsense"])
def test_no_limit_is_no_number(groups, content):
    groups[0].mkdir()
    (groups[0] / "memory.max").write_text(content)

    assert group_limits(*groups) == []


def test_where_there_are_no_groups_nothing_is_limited(tmp_path):
    assert group_limits(tmp_path / "fs", tmp_path / "cgroup") == []


def test_the_least_of_machine_and_groups_is_the_memory_of_the_cpu(monkeypatch):
    machine = device_memory(torch.device("cpu"))
    monkeypatch.setattr(memory, "group_limits", lambda: [machine // 2, machine // 3, 2**62])

    assert device_memory(torch.device("cpu")) == machine // 3


def test_processes_that_share_a_device_take_a_part_of_a_quarter_each():
    cpu = torch.device("cpu")

    assert Engine(sharing=2).memory_on(cpu) == device_memory(cpu) // 8
    assert Engine(max_memory=1000, sharing=2).memory_on(cpu) == 1000
