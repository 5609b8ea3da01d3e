"""Logins: a services' folder -> the login that its servers ask for, in files of its user alone."""

import hashlib
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from coop_core.errors import ServiceError

LOGIN = "login"
"""File in the services' folder: NAME:PASSWORD for the servers that `make up` starts."""
_USERS, _USERS_SETTINGS = "mlflow-users.db", "mlflow-users.ini"


def find_login(folder: Path) -> str | None:
    """NAME:PASSWORD for the servers of a services' folder; None before the first `make up`.

    Raises
    ------
    ServiceError
        When other users can read the file, or it holds something else.
    """
    file = folder / LOGIN
    try:
        state, login = file.stat(), file.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    another = "remove it, then `make down` and `make up` make another"
    if state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise ServiceError(f"{file} holds a password and other users can read it (mode {state.st_mode & 0o777:o}): "
                           + another)  # fmt: skip
    name, _, password = login.partition(":")
    if not name or not password or not login.isascii() or len(login.split()) > 1:
        raise ServiceError(f"{file} is not NAME:PASSWORD: {another}")
    return login


def make_login(folder: Path) -> str:
    """The login of a services' folder, made at the first call and kept; its user alone can read it."""
    found = find_login(folder)
    if found is not None:
        return found
    login = f"coop:{secrets.token_urlsafe(32)}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(folder / LOGIN, login + "\n")
    return login


def prepare_login(folder: Path) -> str:
    """The login of our servers, and MLflow's file about its users, who end with the login they began with."""
    if find_login(folder) is None:
        (folder / _USERS).unlink(missing_ok=True)
    users = str(folder / _USERS).replace("%", "%%")
    lines = ["[mlflow]", "default_permission = READ", f"database_uri = sqlite:///{users}",
             # A password costs tens of milliseconds to check, and every heartbeat brings one.
             "auth_cache_ttl_seconds = 300"]  # fmt: skip
    write_private(folder / _USERS_SETTINGS, "\n".join(lines) + "\n")
    return make_login(folder)


def mlflow_users(folder: Path) -> dict[str, str]:
    """Where MLflow's server finds that file; what it has no rule for is forbidden, not allowed."""
    return {"MLFLOW_AUTH_CONFIG_PATH": str(folder / _USERS_SETTINGS), "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true"}


def mlflow_server_secrets(login: str) -> dict[str, str]:
    """What MLflow's server takes its first user and the key of its forms from."""
    name, _, password = login.partition(":")
    key = hashlib.sha256(f"forms of {login}".encode()).hexdigest()
    return {"MLFLOW_AUTH_ADMIN_USERNAME": name, "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": key}  # fmt: skip


def write_private(file: Path, text: str) -> None:
    """Write a file whole or not at all, for this user's eyes alone; a full disk's error names the file."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # made with mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        os.replace(temporary, file)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise OSError(error.errno, error.strerror, str(file)) from error
