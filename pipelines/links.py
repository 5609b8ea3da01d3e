"""Links: a page of MLflow -> an address that opens where runs and models are shown; and where answers are given.

MLflow opens in its workspace for language models, which hides the registry and shows other things of a run, unless
the address asks for the other workspace; and it asks behind the `#`, where the page's own program looks.
"""

from urllib.parse import quote, urlencode

from pipelines.settings import Settings


def server_address(settings: Settings) -> str:
    """The server's address, or the one that `make ui` and `make up` give it."""
    server = (
        settings.tracking_uri
        if settings.tracking_uri.startswith("http")
        else f"http://127.0.0.1:{settings.mlflow_port}"
    )
    return server.rstrip("/")


def answering(settings: Settings) -> str:
    """Where `coop serve` answers on this machine."""
    return f"http://127.0.0.1:{settings.serve_port}"


def page(settings: Settings, route: str, **query: str) -> str:
    """The whole address of a page, such as `experiments/1/runs/ID`; what a page is asked comes in `query`."""
    return f"{server_address(settings)}/{fragment(route, **query)}"


def fragment(route: str, **query: str) -> str:
    """The same within MLflow, whatever its address is: for texts that are shown there."""
    return f"#/{quote(route)}?{urlencode({**query, 'workflowType': 'machine_learning'})}"


def run_route(experiment_id: str, run_id: str) -> str:
    return f"experiments/{experiment_id}/runs/{run_id}"
