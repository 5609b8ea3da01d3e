"""Claims: the right to change the champion, or to retrain, held by one process at a time, on whatever machine.

A claim is a tag `claim.NUMBER` of the registered model, or of the experiment that a retraining records in, so whoever
may promote may claim, and clear what others left. Every claimer writes a tag of its own and then reads all of them. Of
two at once the later writer sees the earlier, so never do both find themselves alone (Dekker). No compare-and-set is
needed, and nobody writes or removes another's tag unless it is stale. Machines whose clocks differ by minutes take
living claims for stale ones; `confirm` then tells.
"""

import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from coop_core.errors import CoopError, GateError
from pipelines.records.server import Records

log = logging.getLogger(__name__)

_CLAIM_SECONDS = 300
"""What a killed process left is in nobody's way after so long."""
_UNDECIDED_SECONDS = 10.0
"""How long to wait for another who has asked and neither holds nor withdraws."""
_POLL_SECONDS = 0.1
_RENEW_SECONDS = 60.0
"""A retraining takes longer than what a killed process leaves."""
_LAST_SECONDS = 60.0
"""For a renewal that is under way when a retraining ends."""
_CLAIM = "claim."
_ASKING, _HOLDING = "asking", "holding"


@dataclass(frozen=True)
class _Tag:
    by: str
    host: str
    state: str
    since: float
    """Seconds since 1970, by its writer's clock."""

    @property
    def stale(self) -> bool:
        """Too old, or from a clock too far ahead, which would block for as long as that is."""
        return not abs(time.time() - self.since) <= _CLAIM_SECONDS


class Claim:
    """The right to change the champion, held in the registry; or another that the same tags can hold (`what`)."""

    def __init__(self, client: Any, name: str, by: str, *, what: str = "promotion") -> None:
        self._client, self._name, self._by, self._what = client, name, by, what
        self._key, self._since = f"{_CLAIM}{uuid.uuid4().hex}", time.time()

    def ask(self) -> None:
        self._write(_ASKING)

    def hold(self) -> None:
        """Wait until nobody else asks or holds.

        Raises
        ------
        GateError
            When another promotion is under way.
        """
        until = time.monotonic() + _UNDECIDED_SECONDS
        while others := self._others():
            holder = next((tag for tag in others.values() if tag.state == _HOLDING), None)
            first = min(others)
            # Of those who ask at once the smallest key stays, and waits until the others have withdrawn.
            if holder or first < self._key or time.monotonic() > until:
                raise _under_way(holder or others[first], self._what)
            time.sleep(_POLL_SECONDS)
        self._write(_HOLDING)
        self.confirm()  # our tag may have been cleared while we asked, and writing it made it anew

    def confirm(self) -> None:
        """Is the claim ours, and ours alone? Asked right before the alias moves.

        Raises
        ------
        GateError
            When it was taken over, because this process stood still for too long.
        """
        tags = _read(self._client, self._name)
        own = tags.pop(self._key, None)
        if own is None or own.state != _HOLDING or any(tag.state == _HOLDING for tag in tags.values()):
            raise GateError("another promotion or a rollback took this one's place: look at `coop history`")

    def renew(self) -> None:
        """Hold it for longer than a killed process would."""
        self._since = time.time()
        self._write(_HOLDING)

    def release(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.delete_registered_model_tag(self._name, self._key)
        except MlflowException as error:  # it gives way by itself; what went wrong before says more
            log.warning("the claim on the " + self._what + " stays for some minutes: %s", error)

    def _write(self, state: str) -> None:
        tag = _Tag(self._by, socket.gethostname(), state, self._since)
        self._client.set_registered_model_tag(self._name, self._key, json.dumps(asdict(tag)))

    def _others(self) -> dict[str, _Tag]:
        """The others' claims by key; stale ones are removed."""
        tags = _read(self._client, self._name)
        tags.pop(self._key, None)
        _clear(self._client, self._name, [key for key, tag in tags.items() if tag.stale])
        return {key: tag for key, tag in tags.items() if not tag.stale}


@contextmanager
def claim_promotion(records: Records, *, by: str, at_once: bool = False) -> Iterator[Claim]:
    """One promotion at a time, on whatever machines; the other is told at once.

    What a killed process left gives way after some minutes, or now with `at_once`; a living owner then finds out.

    Raises
    ------
    GateError
        When another promotion is under way, or there is no model whose champion could change.
    """
    with records.asked() as client:
        from mlflow.exceptions import MlflowException

        name = records.model
        try:
            found = _read(client, name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise GateError(f"there is no model {name} in the registry at {records.address}: `dvc repro` "
                            "registers a candidate, `coop promote` makes it champion") from None  # fmt: skip
        if at_once:
            _clear(client, name, found)
        claim = Claim(client, name, by)
        claim.ask()
        try:
            claim.hold()
            yield claim
        finally:
            claim.release()


class _Experiment:
    """MLflow's client, for tags of an experiment where a claim asks for those of a registered model."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def get_registered_model(self, number: str) -> Any:
        return self._client.get_experiment(number)

    def set_registered_model_tag(self, number: str, key: str, value: str) -> None:
        self._client.set_experiment_tag(number, key, value)

    def delete_registered_model_tag(self, number: str, key: str) -> None:
        self._client.delete_experiment_tag(number, key)


@contextmanager
def claim_retraining(records: Records, *, by: str) -> Iterator[None]:
    """One retraining at a time into an experiment, and so into its models, from whatever clones; renewed meanwhile.

    `by` names the clone, and whoever calls holds that clone's own lock: so a claim of the same name from this machine
    is what a killed retraining left, and is removed.

    Raises
    ------
    GateError
        When another retraining is under way.
    """
    with records.asked() as client:
        number = records.find_experiment(client, records.experiment)
        place, own = _Experiment(client), (by, socket.gethostname())
        left = [key for key, tag in _read(place, number).items() if (tag.by, tag.host) == own]
        _clear(place, number, left)
        claim = Claim(place, number, by, what="retraining")
        claim.ask()
        try:
            claim.hold()
        except BaseException:
            claim.release()
            raise
    ended = threading.Event()
    thread = threading.Thread(target=_keep, args=(claim, records, ended), daemon=True, name="claim")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_LAST_SECONDS)  # or a late renewal would make the claim anew
        with records.asked():
            claim.release()


def _keep(claim: Claim, records: Records, ended: threading.Event) -> None:
    while not ended.wait(_RENEW_SECONDS):
        try:
            with records.asked():
                claim.renew()
        except CoopError as error:  # at the next beat perhaps
            log.warning("the claim on the retraining is not renewed: %s", error)


def _read(client: Any, name: str) -> dict[str, _Tag]:
    tags = client.get_registered_model(name).tags
    return {key: _parse(value) for key, value in tags.items() if key.startswith(_CLAIM)}


def _parse(text: str) -> _Tag:
    """A claim's tag; one that nobody can read is stale."""
    try:
        tag = json.loads(text)
        return _Tag(str(tag["by"]), str(tag["host"]), str(tag["state"]), float(tag["since"]))
    except (ValueError, TypeError, KeyError):
        return _Tag("somebody", "some machine", "", 0.0)


def _clear(client: Any, name: str, keys: Iterable[str]) -> None:
    """Each by its own key, so that nobody's newer claim goes with it."""
    for key in keys:
        client.delete_registered_model_tag(name, key)


def _under_way(holder: _Tag, what: str) -> GateError:
    way_out = f"try again; what a killed one leaves gives way after {_CLAIM_SECONDS / 60:.0f} minutes"
    return GateError(f"another {what} is under way, by {holder.by} on {holder.host}: {way_out}")
