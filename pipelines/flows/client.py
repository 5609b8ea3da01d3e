"""Prefect's server, asked by us: starting runs of our deployments, looking at them, cancelling them."""

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar, cast
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings
from prefect.states import Cancelling

from coop_core.errors import ServiceError
from pipelines.flows.names import on_server
from pipelines.records.server import Records, silence
from pipelines.records.trials import trial_states
from pipelines.settings import is_own, load_settings, refusal
from pipelines.sweeps.trainer import Order

log = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_SECONDS = 600.0
"""For a server that was there when the work began."""
_LOOK_SECONDS = 3.0
_FIRST_SECONDS = 5.0
"""For a server's first answer."""
_GROUPS = 3
"""Groups of trials a run: starting a run and its trainer costs about as much as training a small group."""
_WAITING = 20
"""Runs of trials that stand in the queue at once; a longer queue slows the server for everybody."""
_ENDED = {StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED}
_UNDER_WAY = FlowRunFilterState(type=FlowRunFilterStateType(not_any_=sorted(_ENDED)))
TRIALS = "coop-trials"
"""Tag of every run of trials; beside it stands the run of the sweep it belongs to."""
PROGRESS = "sweep-progress"
"""Key of the bar on a sweep's page."""
_SWEEP = "sweep-run:"
ATTEMPTS = 2
"""How often a group is started whose run crashes."""


class AwayError(ServiceError):
    """The server does not answer, or its own database does not: it may, in a while."""


@contextmanager
def connection() -> Iterator[SyncPrefectClient]:
    """A client for the server of PREFECT_API_URL; its faults become sentences.

    Raises
    ------
    AwayError
        When the server does not answer, or fails by itself.
    ServiceError
        When it refuses.
    """
    with _sentences(), get_client(sync_client=True) as client:
        yield client


def patiently(ask: Callable[[], T], *, seconds: float = PATIENCE_SECONDS) -> T:
    """What is asked of a server that may be away for so many seconds, as while it or its database starts again."""
    until, said = time.monotonic() + seconds, False
    while True:
        try:
            with _sentences():
                return ask()
        except AwayError as error:
            if time.monotonic() > until:
                raise
            if not said:
                log.warning("%s: it is asked again for %.0f minutes", error, seconds / 60)
            said = True
            time.sleep(_LOOK_SECONDS)


def show_markdown(text: str, *, key: str, description: str | None = None) -> None:
    """Text on the page of the run under way, also where the server is away for a while: the work is done by then."""
    patiently(lambda: create_markdown_artifact(text, key=key, description=description))


@contextmanager
def _sentences() -> Iterator[None]:
    where = get_current_settings().api.url or ""
    try:
        yield
    except ObjectNotFound as error:
        raise ServiceError(f"Prefect at {where} has no such deployment or run: {_deploying(where)}") from error
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
        if refused := refusal(status, "COOP_PREFECT_API_AUTH to NAME:PASSWORD"):
            raise ServiceError(f"Prefect at {where} {refused}") from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        kind = AwayError if status is None or status >= 500 else ServiceError
        raise kind(f"Prefect at {where} says: {reason}; {_starting(where)}") from error


def require_answer() -> None:
    """The server of PREFECT_API_URL answers now, while a person waits; its client would ask for minutes.

    Raises
    ------
    ServiceError
    """
    where = get_current_settings().api.url or ""
    if said := silence(f"{where}/health", within=_FIRST_SECONDS):
        raise ServiceError(f"Prefect at {where} does not answer ({said}): {_starting(where)}")


def _starting(where: str) -> str:
    own = is_own(where, load_settings().prefect_port)
    return f"correct COOP_PREFECT_API_URL or {'`make up`' if own else 'start that server'}"


def _deploying(where: str) -> str:
    """How the flows come to a server."""
    if is_own(where, load_settings().prefect_port):
        return "`make up` deploys"
    return ("deploy to it once, in the project's folder, with `coop up`, which starts workers here as well, or with "
            f"`python -m pipelines.flows.bootstrap {where}` alone (see infra/README.md)")


class DeployedTrainers:
    """Runs groups of trials through the deployment `trials`, on whichever workers the pool `gpu` has.

    Prefect says which runs go on; what became of each trial is read in MLflow, the record.
    """

    def __init__(self, records: Records, *, sweep_run: str) -> None:
        self.records, self.sweep_run = records, sweep_run

    def __call__(self, groups: Sequence[Sequence[Order]], on_event: Callable[[dict[str, Any]], object]) -> None:
        todo: list[tuple[Sequence[Sequence[Order]], int]] = [
            (groups[start : start + _GROUPS], 1) for start in range(0, len(groups), _GROUPS)
        ]
        running: dict[UUID, tuple[Sequence[Sequence[Order]], int]] = {}
        open_keys = {order.key for group in groups for order in group}
        parent = groups[0][0].parent
        earlier = {state.run_id for state in trial_states(self.records, parent=parent)}
        try:
            while todo or running:
                while todo and len(running) < _WAITING:
                    together, attempt = todo.pop(0)
                    started = patiently(functools.partial(self._start, together, attempt))
                    running[started] = (together, attempt)
                time.sleep(_LOOK_SECONDS)
                found = patiently(functools.partial(self._look, list(running)))
                ended = {run.id: run for run in found if run.state_type in _ENDED}
                self._report(parent, earlier, open_keys, on_event)
                for run_id, run in ended.items():
                    together, attempt = running.pop(run_id)
                    left = [[order for order in group if order.key in open_keys] for group in together]
                    left = [group for group in left if group]
                    if left and run.state_type == StateType.CRASHED and attempt < ATTEMPTS:
                        todo.append((left, attempt + 1))
                        continue
                    for order in itertools.chain(*left):
                        open_keys.discard(order.key)
                        reason = f"its run {run.name} ended as {run.state_name}"
                        on_event({"event": "failed", "key": order.key, "reason": reason})
        finally:
            if running:
                try:
                    cancel(list(running))
                except ServiceError as error:  # `reconcile` cancels them; what went wrong before says more
                    log.warning("%d runs of trials could not be cancelled: %s", len(running), error)

    def _start(self, groups: Sequence[Sequence[Order]], attempt: int) -> UUID:
        first, more = groups[0][0], sum(map(len, groups)) - 1
        run = start(
            "trials", parameters={"groups": [[asdict(order) for order in group] for group in groups]},
            flow_run_name=first.name + (f", and {more} more" if more else ""), as_subflow=True,
            tags=[TRIALS, f"{_SWEEP}{self.sweep_run}"], idempotency_key=f"{self.sweep_run}/{first.key}/{attempt}",
        )  # fmt: skip
        return run.id

    def _look(self, run_ids: list[UUID]) -> list[FlowRun]:
        with connection() as client:
            return client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=run_ids)))

    def _report(
        self, parent: str, earlier: set[str], open_keys: set[str], on_event: Callable[[dict[str, Any]], object]
    ) -> None:
        for state in trial_states(self.records, parent=parent, but=earlier):
            if state.key not in open_keys:
                continue
            if state.status in ("FINISHED", "FAILED"):
                open_keys.discard(state.key)
            event = {"FINISHED": "finished", "FAILED": "failed"}.get(state.status, "started")
            if state.status != "KILLED":
                on_event({"event": event, "key": state.key, "run_id": state.run_id, "metrics": state.metrics,
                          "reason": state.reason})  # fmt: skip


def start(deployment: str, *, parameters: dict[str, Any], as_subflow: bool = False, **options: Any) -> FlowRun:
    """A run of this project's deployment, put into its pool's queue; `options` are those of `run_deployment`."""
    name = on_server(deployment)
    with connection():
        run = run_deployment(f"{name}/{name}", parameters=parameters, timeout=0, as_subflow=as_subflow, **options)
    return cast(FlowRun, run)


def look(run_id: UUID, *, patience: float = 0.0) -> FlowRun:
    """A run as it is now, from a server that may be away for so many seconds."""

    def ask() -> FlowRun:
        with connection() as client:
            return client.read_flow_run(run_id)

    return patiently(ask, seconds=patience)


def ended(run: FlowRun) -> bool:
    return run.state_type in _ENDED


def cancel(run_ids: Sequence[UUID]) -> None:
    """Ask runs to end; those that have ended stay as they are."""
    with connection() as client:
        for run_id in run_ids:
            if not ended(client.read_flow_run(run_id)):
                client.set_flow_run_state(run_id, Cancelling())


def progress(run_id: UUID) -> tuple[float, str]:
    """What a sweep's run shows of itself: percent done, and a line; nothing when the server is away."""
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[PROGRESS]), flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
    try:
        with connection() as client:
            found = client.read_artifacts(artifact_filter=wanted)
    except ServiceError:
        return 0.0, "the server is away"
    return (float(cast(float, found[0].data)), found[0].description or "") if found else (0.0, "")


def page(run_id: UUID) -> str:
    """The run's page."""
    where = get_current_settings().api.url or ""
    return f"{where.removesuffix('/api')}/runs/flow-run/{run_id}"


def cancel_orphans() -> list[str]:
    """Cancel runs of trials whose sweep has ended, as after a kill -> their names."""
    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[TRIALS]), state=_UNDER_WAY)
    with connection() as client:
        found = client.read_flow_runs(flow_run_filter=wanted)
        sweeps = {run.id: _sweep_of(run) for run in found}
        alive = {sweep for sweep in set(sweeps.values()) if sweep and not ended(client.read_flow_run(sweep))}
    orphans = [run for run in found if sweeps[run.id] not in alive]
    cancel([run.id for run in orphans])
    return [run.name for run in orphans]


def _sweep_of(run: FlowRun) -> UUID | None:
    return next((UUID(tag.removeprefix(_SWEEP)) for tag in run.tags if tag.startswith(_SWEEP)), None)
