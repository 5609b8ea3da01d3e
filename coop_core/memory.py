"""Memory: a device -> the bytes that this process may count on."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def device_memory(device: torch.device) -> int:
    """All memory of the device in bytes, in use or not; of the CPU, what its control group leaves this process."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *group_limits()])


def group_limits(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> list[int]:
    """The limits that control groups (version 1 or 2) set on this process: a container's, a batch job's."""
    return [limit for file in _limit_files(root, membership) if (limit := _number(file)) is not None]


def _limit_files(root: Path, membership: Path) -> Iterator[Path]:
    """The limit of this process's group and of every group above it; a container sees its own as the root."""
    groups = [PurePosixPath("/")]
    try:
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                groups += [PurePosixPath(path), *PurePosixPath(path).parents]
    except (OSError, ValueError):  # no Linux, or not told
        return
    for group in dict.fromkeys(groups):
        inside = str(group).lstrip("/")
        yield root / inside / "memory.max"
        yield root / "memory" / inside / "memory.limit_in_bytes"


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())  # "max" where there is no limit
    except (OSError, ValueError):
        return None
