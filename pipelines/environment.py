"""Defaults for libraries that are set through the environment; the only module that writes to it."""

import os

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
}
"""Libraries' telemetry, progress bars that would run through ours, and MLflow's idle job runner."""


def quiet_libraries() -> None:
    """Set defaults that a person's own environment overrides."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
