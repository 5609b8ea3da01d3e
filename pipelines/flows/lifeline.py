"""A flow's process -> ends with the worker that started it.

A worker that is killed leaves its flows running, and the next worker would start another training beside them on
the same device.
"""

import os
import signal
import threading
import time

from pipelines.environment import is_service

_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 10.0


def end_with_worker() -> None:
    """Watch the parent process from now on; when it is gone, end as if the run had been stopped."""
    parent = os.getppid()
    if parent == 1 and is_service():
        parent = 0  # the worker was gone before we began
    threading.Thread(target=_watch, args=(parent,), daemon=True, name="lifeline").start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    # Nothing is logged: our output went to the worker, and rich ends whichever thread writes into a broken pipe.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
