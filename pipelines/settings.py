"""Environment -> Settings: where things are. What is computed stands in params.yaml, never here."""

from pathlib import Path

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from coop_core.errors import ServiceError


class Settings(BaseSettings):
    """Read from variables with the prefix COOP_ and from `.env`; see README for the table."""

    model_config = SettingsConfigDict(env_prefix="COOP_", env_file=".env", extra="ignore", frozen=True)

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto takes a CUDA device when there is one."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """MLflow's server, or its SQLite file in the project's folder."""
    artifact_location: str | None = None
    """Where a new experiment keeps its files; null is mlruns/ beside the SQLite file, or the server's choice."""
    experiment: str = "coop"
    registered_model: str = "coop-prompt"
    cache_folder: Path = Path(".cache")
    """Fetched files, image features and checkpoints: safe to delete, slow to make again."""
    flow_run: str | None = None
    """Prefect's flow run this process belongs to; flows set it, and the run's record carries it."""
    s3_endpoint_url: str | None = None
    s3_access_key_id: SecretStr | None = None
    s3_secret_access_key: SecretStr | None = None
    prefect_api_url: str | None = None
    """Prefect's server; null runs sweeps locally."""
    prefect_port: int = Field(default=4200, ge=1, le=65535)
    """Of the server that `make up` starts, as is the next."""
    mlflow_port: int = Field(default=5000, ge=1, le=65535)
    services_folder: Path = Path(".services")
    """State and logs of `make up`."""
    retrain_cron: str = "0 3 * * *"
    """When the services of `make up` retrain."""


def load_settings() -> Settings:
    """The settings of this process.

    Raises
    ------
    ServiceError
        With every variable that is not valid.
    """
    try:
        return Settings()
    except UnicodeDecodeError as error:
        raise ServiceError(f".env is not UTF-8 text ({error.reason}): save it as such") from None
    except ValidationError as error:
        faults = "; ".join(
            f"COOP_{'_'.join(map(str, e['loc'])).upper()} is {e['input']!r}: {e['msg']}" for e in error.errors()
        )
        raise ServiceError(f"the environment or .env is not valid: {faults}") from None


def choose_device(settings: Settings) -> str:
    """The device's torch name.

    Raises
    ------
    ServiceError
        When a CUDA device is asked for and there is none.
    """
    import torch

    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ServiceError(f"COOP_DEVICE is {settings.device}, but torch sees no CUDA device: set it to auto or cpu")
    return settings.device
