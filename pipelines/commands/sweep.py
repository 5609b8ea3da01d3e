"""`coop sweep`: on this machine, or through Prefect's server and its workers with the progress in this terminal."""

import time
from collections.abc import Callable

from coop_core.errors import ServiceError
from coop_core.params import Params, load_params
from coop_core.sweeps.sweep import require_sweep
from pipelines import console, paths
from pipelines.environment import use_prefect
from pipelines.records.server import Records
from pipelines.settings import Settings, prefect_login
from pipelines.sweeps.outcome import Outcome, Standing, read_outcome
from pipelines.sweeps.sweeping import check, sweep
from pipelines.sweeps.trainers import LocalTrainers, local_slots
from pipelines.sweeps.view import details, print_outcome

_LOOK_SECONDS = 2.0
_PATIENCE_SECONDS = 180.0
"""How long a server may be away while a sweep is followed."""


def run_sweep(settings: Settings, *, local: bool, jobs: int | None, detach: bool) -> None:
    """Run what is missing and show what came of it; `detach` leaves a sweep to the workers."""
    params = load_params(paths.PARAMS)
    check(params)
    records = Records(settings)
    if settings.prefect_api_url is None or local:
        print_outcome(sweep_here(params, records, jobs), records)
    else:
        use_prefect(settings.prefect_api_url, settings.services_folder / "client", prefect_login(settings))
        _through_prefect(params, records, detach=detach)


def sweep_here(
    params: Params, records: Records, jobs: int | None, *, hear: Callable[[Standing], object] = lambda standing: None
) -> Outcome:
    """On this machine, with its progress in this terminal; `hear` is told how far it is."""
    name = require_sweep(params).name
    logs, slots = records.settings.cache_folder / paths.TRAINER_LOGS / name, local_slots(records.settings, jobs)
    console.console.print(f"{len(slots)} trainer(s) on this machine; log: {logs}", highlight=False, soft_wrap=True)
    with console.progress(f"sweep {name}") as update:

        def show(standing: Standing) -> None:
            update(standing.done, standing.planned, details=details(standing))
            hear(standing)

        return sweep(params, records, LocalTrainers(records, slots, log_folder=logs), show=show)


def _through_prefect(params: Params, records: Records, *, detach: bool) -> None:
    """The sweep is a run of the deployment `sweep`; what it found is read from MLflow."""
    from pipelines.flows import client

    client.require_answer()
    name = require_sweep(params).name
    run = client.start("sweep", parameters={"params": params.model_dump(mode="json")}, flow_run_name=name)
    console.console.print(f"Prefect  {client.page(run.id)}", highlight=False, soft_wrap=True)
    if detach:
        return
    try:
        with console.progress(f"sweep {name}", 100) as update:
            while not client.ended(run := client.look(run.id, patience=_PATIENCE_SECONDS)):
                percent, said = client.progress(run.id)
                update(int(percent), details=said or run.state_name or "")
                time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        client.cancel([run.id])
        raise
    if run.state_name != "Completed":
        message = " ".join((run.state.message or "").split())[:500] if run.state else ""
        raise ServiceError(f"the sweep ended as {run.state_name}: {message} ({client.page(run.id)}); "
                           "`coop sweep` again does what is missing")  # fmt: skip
    print_outcome(read_outcome(params, records, flow_run=str(run.id)), records)
