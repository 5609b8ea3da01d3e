"""Claims: the right to change the champion, held by one process at a time, on whatever machine."""

import logging
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coop_core.errors import GateError
from pipelines.records.server import connected
from pipelines.settings import Settings

log = logging.getLogger(__name__)

_CLAIM_SECONDS = 300


class Claim:
    """The right to change the champion, held in the registry."""

    def __init__(self, client: Any, name: str, token: str) -> None:
        self._client, self._name, self._token = client, name, token

    def confirm(self) -> None:
        """Is the claim still ours? Asked right before the alias moves.

        Raises
        ------
        GateError
            When it was taken over, because this process stood still for too long.
        """
        if self._owner() != self._token:
            raise GateError("another promotion or a rollback took this one's place: look at `coop history`")

    def release(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            if self._owner() == self._token:
                self._client.delete_registered_model(self._name)
        except MlflowException as error:  # it gives way by itself; what went wrong before says more
            log.warning("the claim on the promotion stays for some minutes: %s", error)

    def _owner(self) -> str | None:
        found = self._client.search_registered_models(f"name = '{self._name}'")
        return found[0].tags.get("owner") if found else None


@contextmanager
def claim_promotion(settings: Settings, *, by: str, at_once: bool = False) -> Iterator[Claim]:
    """One promotion at a time, on whatever machines; the other is told at once.

    A registered model of a certain name is made and deleted again: the registry makes it for one caller only. What
    a killed process left is taken over after some minutes, or now with `at_once`; a living owner then finds out.

    Raises
    ------
    GateError
        When another promotion is under way.
    """
    with connected(settings) as mlflow:
        from mlflow.exceptions import MlflowException

        client, name = mlflow.MlflowClient(), f"{settings.registered_model}.promotion"
        earlier = client.search_registered_models(f"name = '{name}'")
        if earlier and (at_once or time.time() - earlier[0].creation_timestamp / 1000 > _CLAIM_SECONDS):
            client.delete_registered_model(name)
        token = f"{by} on {socket.gethostname()} ({uuid.uuid4().hex[:8]})"
        try:
            client.create_registered_model(name, tags={"owner": token})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            holder = next((m.tags.get("owner") for m in client.search_registered_models(f"name = '{name}'")), "another")
        else:
            holder = token
        if holder != token:  # our own, when the answer to our first request was lost and it was sent again
            way_out = f"try again; what a killed one leaves gives way after {_CLAIM_SECONDS / 60:.0f} minutes"
            raise GateError(f"another promotion is under way, by {holder}: {way_out}")
        claim = Claim(client, name, token)
        try:
            yield claim
        finally:
            claim.release()
