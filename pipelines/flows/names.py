"""Names: settings -> what our flows, deployments and pools are called on a server that projects may share.

Prefect fixes a flow's name when its module is imported, so the settings are read then.
"""

from pipelines.settings import load_settings, named


def on_server(name: str) -> str:
    """A flow's, deployment's or pool's name, with the project's before it where there is one.

    Raises
    ------
    ServiceError
        When the settings are not valid.
    """
    return named(load_settings(), name)
