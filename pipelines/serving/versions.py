"""Versions: the registry's alias, looked at every few seconds -> the version that answers, swapped while it answers."""

import logging
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coop_core.errors import ArtifactError, CoopError
from pipelines.records.names import find_model_name
from pipelines.records.registry import CHAMPION, RegisteredVersion, fetch_prompt, find_version
from pipelines.records.server import Records
from pipelines.serving.metrics import Metrics
from pipelines.settings import Settings, choose_device

if TYPE_CHECKING:
    from coop_core.artifact import Artifact
    from coop_core.backbone import Backbone
    from coop_core.predictor import Predictor

log = logging.getLogger(__name__)

LOOK_SECONDS = 3.0
_AGAIN_SECONDS = 60.0
"""Before a version that could not be loaded is tried again."""


@dataclass(frozen=True)
class Version:
    number: str
    run_id: str
    predictor: "Predictor"


Find = Callable[[], RegisteredVersion | None]
Load = Callable[[RegisteredVersion, Version | None], Version]


class Champion:
    """What answers now: `current`, which changes between two requests and never within one."""

    def __init__(self, find: Find, load: Load, metrics: Metrics) -> None:
        """`find` says which version it should be; `load` makes it ready beside the one that answers."""
        self._find, self._load, self._metrics = find, load, metrics
        self.current: Version | None = None
        self._failed: tuple[RegisteredVersion, float] | None = None
        self._said = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="champion", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Without waiting for a look that is under way."""
        self._stopped.set()

    def look(self) -> None:
        """Once: whatever goes wrong, the version that answers stays."""
        try:
            wanted = self._find()
        except CoopError as error:
            self._metrics.unreachable.inc()
            return self._say(f"the registry cannot be asked: {error}")
        if wanted is None:
            return self._say("there is no champion yet: `coop promote` makes one")
        now = self.current
        if now is not None and (now.number, now.run_id) == (wanted.number, wanted.run_id):
            return self._say("")
        if self._failed is not None and self._failed[0] == wanted and time.monotonic() < self._failed[1]:
            return None
        try:
            version = self._load(wanted, now)
        except Exception as error:  # counted and told; the old version answers on
            self._metrics.reloads.labels("failed").inc()
            self._failed = wanted, time.monotonic() + _AGAIN_SECONDS
            log.debug("why version %s cannot be loaded", wanted.number, exc_info=error)
            reason = " ".join(str(error).split()) or type(error).__name__
            kept = f"version {now.number} answers on" if now else "nothing answers yet"
            return self._say(f"version {wanted.number} cannot be loaded, so {kept}: {reason}")
        self._swap(version, now)
        return None

    def _swap(self, version: Version, before: Version | None) -> None:
        self.current = version
        self._metrics.reloads.labels("done").inc()
        if before is not None:
            self._metrics.version.remove(before.number)
        self._metrics.version.labels(version.number).set(1)
        self._said = ""
        log.info("version %s answers%s", version.number, f", instead of {before.number}" if before else "")

    def _say(self, sentence: str) -> None:
        """Once, however often it is found."""
        if sentence and sentence != self._said:
            log.warning("%s", sentence)
        self._said = sentence

    def _watch(self) -> None:
        while not self._stopped.is_set():
            try:
                self.look()
            except Exception:  # a thread that ends would leave the alias unwatched for good
                log.exception("looking for the champion failed")
            self._stopped.wait(LOOK_SECONDS)


def registered_champion(settings: Settings) -> RegisteredVersion | None:
    """The version that the alias names; None before there is a model, or an alias."""
    name = find_model_name(settings)
    named = Records(settings.model_copy(update={"registered_model": name}))
    return None if name is None else find_version(CHAMPION, named)


def load_version(wanted: RegisteredVersion, before: Version | None, settings: Settings) -> Version:
    """Fetch a version as files, check all of them, and answer one picture with it.

    The backbone is taken from the version before where it is the same, so a swap costs no second copy of it.
    """
    import numpy as np

    from coop_core.artifact import read_artifact
    from coop_core.predictor import Predictor

    name = find_model_name(settings)
    with tempfile.TemporaryDirectory() as folder:
        artifact = read_artifact(fetch_prompt(f"{name}/{wanted.number}", Records(settings), Path(folder)))
    backbone = _backbone(artifact, before, device=choose_device(settings))
    predictor = Predictor(artifact, backbone, with_features=settings.serve_record is not None)
    predictor.predict([np.full((64, 64, 3), 128, dtype=np.uint8)])
    return Version(wanted.number, wanted.run_id, predictor)


def _backbone(artifact: "Artifact", before: Version | None, *, device: str) -> "Backbone":
    from coop_core.artifact import check_backbone

    if before is not None:
        with suppress(ArtifactError):                                             # learned on another one
            check_backbone(artifact, before.predictor.backbone)
            return before.predictor.backbone
    return artifact.load_backbone(device=device)
