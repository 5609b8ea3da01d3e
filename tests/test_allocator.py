"""The allocator: memory that was freed is used again, where the C library can be told so."""

import platform
import subprocess
import sys

import pytest

from pipelines.allocator import keep_freed_memory

_FAULTS = """
import resource, sys, threading
import numpy as np
from pipelines.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    np.ones(8_000_000)
    [np.ones(4_000_000) for _ in range(8)]
def measure():
    use()
    before = faults()
    for _ in range(10):
        use()
    print(faults() - before)
if sys.argv[2] == "a thread":
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
else:
    measure()
"""


class Library:
    """A C library that refuses what it is asked."""

    def mallopt(self, parameter: int, value: int) -> int:
        return 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("where", ["the first thread", "a thread"])
def test_a_block_that_was_freed_costs_no_page_faults_when_it_is_wanted_again(where: str) -> None:
    found = {}
    for way in ("given back", "kept"):
        command = [sys.executable, "-c", _FAULTS, way, where]
        found[way] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["given back"] > 1000
    assert found["kept"] < found["given back"] / 10


@pytest.mark.parametrize("library", [object(), Library()], ids=["without mallopt", "that refuses"])
def test_another_library_stays_as_it_is(library: object) -> None:
    assert not keep_freed_memory(library)
