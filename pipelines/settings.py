"""Environment -> Settings: where things are. What is computed stands in params.yaml, never here."""

import difflib
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from dotenv import dotenv_values
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from coop_core.errors import ServiceError
from pipelines.environment import LOOPBACK, SERVICE_OF, variable_names
from pipelines.logins import find_login

_PREFIX = "COOP_"
_NO_SETTINGS = {SERVICE_OF, "COOP_PROJECT", "COOP_WATCH_ACTIVE"}
"""Names with our prefix that something else reads: the services' mark, and infra/prefect.yaml."""


class Settings(BaseSettings):
    """Read from variables with the prefix COOP_ and from `.env`; see README for the table."""

    model_config = SettingsConfigDict(env_prefix="COOP_", env_file=".env", extra="ignore", frozen=True)

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto takes a CUDA device when there is one."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """MLflow's server, or its SQLite file in the project's folder; a login in it is taken out into the next two."""
    tracking_username: str | None = None
    tracking_password: SecretStr | None = None
    """For MLflow's server; null is the login of `make up` where the address is its own."""
    artifact_location: str | None = None
    """Where a new experiment keeps its files; null is mlruns/ beside the SQLite file, or the server's choice.
    For s3://..., MLflow gets the keys below."""
    project_name: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    """Tells projects apart that share a Prefect or an MLflow: begins the names of pools, flows, deployments, models."""
    experiment: str = "coop"
    """Where MLflow keeps the runs; with a project's name, that."""
    registered_model: str | None = Field(default=None, min_length=1)
    """Of all versions; null names it after the data set, coop-DATASET or PROJECT-DATASET (`records.names`)."""
    cache_folder: Path = Path(".cache")
    """Fetched files, image features and checkpoints: safe to delete, slow to make again."""
    flow_run: str | None = None
    """Prefect's flow run this process belongs to; flows set it, and the run's record carries it."""
    s3_endpoint_url: str | None = None
    s3_access_key_id: SecretStr | None = None
    s3_secret_access_key: SecretStr | None = None
    prefect_api_url: str | None = None
    """Prefect's server; null runs sweeps locally."""
    prefect_api_auth: SecretStr | None = None
    """NAME:PASSWORD for it; null is the login of `make up` where the address is its own."""
    prefect_port: int = Field(default=4200, ge=1, le=65535)
    """Of the server that `make up` starts, as is the next."""
    mlflow_port: int = Field(default=5000, ge=1, le=65535)
    serve_port: int = Field(default=5001, ge=1, le=65535)
    """Of `coop serve`, which `make up` starts as well."""
    serve_token: SecretStr | None = Field(default=None, min_length=16)
    """What callers of `coop serve` send as `Authorization: Bearer TOKEN`; null asks for none, on loopback."""
    serve_record: Annotated[Path | None, BeforeValidator(lambda given: given or None)] = None
    """A folder for what `coop serve` answers, which `coop watch` looks at; null records nothing."""
    serve_record_megabytes: int = Field(default=256, ge=1, le=10**6)
    """Of all records together; the oldest go."""
    serve_record_pictures: bool = False
    """Whether the files that were sent are recorded as well."""
    watch_cron: str = "17 * * * *"
    """When the services of `make up` watch what is recorded."""
    services_folder: Path = Path(".services")
    """State and logs of `make up`."""
    notify_url: SecretStr | None = None
    """Where Prefect's server sends what happened: a champion, a refusal, a failed retraining; null sends nothing."""
    retrain_cron: str = "0 3 * * *"
    """When the services of `make up` retrain."""

    @property
    def watch_active(self) -> str:
        """Whether the watch has a schedule, as infra/prefect.yaml wants it: where nothing is recorded it has none."""
        return "false" if self.serve_record is None else "true"

    @model_validator(mode="before")
    @classmethod
    def _keep_no_login_in_an_address(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Addresses are shown and stored, so a login in one goes where secrets are; what is set there wins."""
        given = dict(given)
        for field, places in _LOGINS.items():
            if isinstance(address := given.get(field), str):
                given[field], login = _without_login(field, address)
                parts = login if len(places) == 2 else (":".join(login),)
                for place, part in zip(places, parts, strict=False):
                    given[place] = given.get(place) or part or None
        if given.get("project_name"):
            given.setdefault("experiment", given["project_name"])
        return given


_LOGINS = {
    "tracking_uri": ("tracking_username", "tracking_password"),
    "prefect_api_url": ("prefect_api_auth",),
    "s3_endpoint_url": ("s3_access_key_id", "s3_secret_access_key"),
}
"""Addresses, and where the name and the password in them belong."""


def _without_login(field: str, address: str) -> tuple[str, tuple[str, ...]]:
    """-> the address without NAME:PASSWORD@, and the name and password or nothing. No error shows the address."""
    try:
        parts = urlsplit(address)
        in_order = not parts.netloc or ("@" not in parts.path + parts.query + parts.fragment and parts.port != 0)
    except ValueError:
        in_order = False
    if not in_order:
        raise ServiceError(f"{_PREFIX}{field.upper()} is no address: write SCHEME://NAME:PASSWORD@HOST:PORT, with "
                           "%40, %3A, %2F, %3F and %23 for @, :, /, ? and # in a name or password")  # fmt: skip
    login, at, host = parts.netloc.rpartition("@")
    name, _, password = login.partition(":")
    if not at:
        return address, ()
    return urlunsplit(parts._replace(netloc=host)), (unquote(name), unquote(password))


def load_settings() -> Settings:
    """The settings of this process.

    Raises
    ------
    ServiceError
        With every variable that is not valid, or not known.
    """
    try:
        _require_known_names()
        return Settings()
    except UnicodeDecodeError as error:
        raise ServiceError(f".env is not UTF-8 text ({error.reason}): save it as such") from None
    except ValidationError as error:
        faults = "; ".join(
            f"COOP_{'_'.join(map(str, e['loc'])).upper()} is {e['input']!r}: {e['msg']}" for e in error.errors()
        )
        raise ServiceError(f"the environment or .env is not valid: {faults}") from None


def _require_known_names() -> None:
    """A misspelt name would leave a default in force without a word."""
    known = sorted({_PREFIX + field.upper() for field in Settings.model_fields} | _NO_SETTINGS)
    faults = []
    for where, names in (("the environment", variable_names()), (".env", dotenv_values(".env", interpolate=False))):
        for name in sorted(names):
            if name.upper().startswith(_PREFIX) and name.upper() not in known:
                nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)[0]
                faults.append(f"{name} in {where} is no setting (the nearest is {nearest})")
    if faults:
        raise ServiceError("; ".join(faults) + ": correct the name or remove it; README lists all")


def named(settings: Settings, name: str) -> str:
    """A name on a shared Prefect: the project's name stands before it, where there is one."""
    return f"{settings.project_name}-{name}" if settings.project_name else name


def store_keys(settings: Settings) -> dict[str, str]:
    """What MLflow and its server reach an S3 store of files with; nothing where files lie elsewhere."""
    key, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    if not (settings.artifact_location or "").startswith("s3://") or key is None or secret is None:
        return {}
    endpoint = {"MLFLOW_S3_ENDPOINT_URL": settings.s3_endpoint_url} if settings.s3_endpoint_url else {}
    return {"AWS_ACCESS_KEY_ID": key.get_secret_value(), "AWS_SECRET_ACCESS_KEY": secret.get_secret_value(), **endpoint}


def is_own(address: str | None, port: int) -> bool:
    """Whether an address is that of a server which `make up` starts on this port."""
    parts = urlsplit(address or "")
    return parts.scheme == "http" and parts.hostname in LOOPBACK and parts.port == port


def prefect_login(settings: Settings) -> str | None:
    """NAME:PASSWORD for Prefect's server: what is set, or for the one of `make up` what that made."""
    if settings.prefect_api_auth:
        return settings.prefect_api_auth.get_secret_value()
    return find_login(settings.services_folder) if is_own(settings.prefect_api_url, settings.prefect_port) else None


def tracking_login(settings: Settings) -> tuple[str, str] | None:
    """Name and password for MLflow's server, found likewise."""
    if settings.tracking_password:
        return settings.tracking_username or "", settings.tracking_password.get_secret_value()
    own = find_login(settings.services_folder) if is_own(settings.tracking_uri, settings.mlflow_port) else None
    if own is None:
        return None
    name, _, password = own.partition(":")
    return name, password


def store_address(settings: Settings) -> str:
    """What MLflow opens: the settings' address, with the login where it is a database's. Never to be shown."""
    scheme, found, rest = settings.tracking_uri.partition("://")
    login = tracking_login(settings)
    if not found or login is None or scheme in ("http", "https", "sqlite"):
        return settings.tracking_uri
    return f"{scheme}://{quote(login[0], safe='')}:{quote(login[1], safe='')}@{rest}"


def refusal(status: int | None, variables: str) -> str:
    """What a server means by this status; empty where it refuses nobody."""
    if status == 401:
        return f"refuses the login (401): set {variables}, or leave them out for the servers of `make up`"
    if status == 403:
        return f"forbids this (403): the user of {variables} lacks the right, or the server expects another host name"
    return ""


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
