"""Storage: a dataset card's files, fetched from the first source that has the right bytes."""

import logging
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

from coop_core.archives import unpack
from coop_core.catalog import Card, CardFile
from coop_core.errors import ServiceError
from coop_core.files import digest_file
from pipelines.settings import Settings

log = logging.getLogger(__name__)
TIMEOUT_SECONDS = 20


def fetch_card(card: Card, beside: Path, *, cache: Path, settings: Settings) -> Path:
    """Bring a card's files -> the folder with its images: below the cache, or beside the card without files.

    Files that are there with the right checksum are not fetched again.

    Raises
    ------
    ServiceError
        When no source has a file, with what each source said.
    """
    if not card.files:
        return beside / card.path
    folder = cache / card.name
    unreachable: set[str] = set()
    for file in card.files:
        kept = folder / "fetched" / file.name
        fetched = _fetch(file, kept, beside=beside, settings=settings, unreachable=unreachable)
        if file.unpack:
            target = folder / "unpacked" / Path(file.name).stem.removesuffix(".tar")
            if fetched or not target.is_dir():
                unpack(kept, target)
    unpacked = [file for file in card.files if file.unpack]
    return folder / ("unpacked" if unpacked else "fetched") / card.path


def _fetch(
    file: CardFile, target: Path, *, beside: Path, settings: Settings, unreachable: set[str]
) -> bool:
    """Bring one file -> whether it had to be fetched. `unreachable` collects hosts that did not answer."""
    if target.is_file() and digest_file(target) == file.sha256:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    said = []
    for source in file.sources:
        host = urlparse(source).netloc
        if host in unreachable:
            said.append(f"{source}: {host} does not answer")
            continue
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
            arrived = Path(partial) / "file"
            try:
                _reader(source)(source, arrived, beside, settings)
            except ServiceError as error:
                said.append(f"{source}: {error}")
                if isinstance(error.__cause__, urllib.error.URLError) and not isinstance(
                    error.__cause__, urllib.error.HTTPError
                ):
                    unreachable.add(host)
                continue
            if (found := digest_file(arrived)) != file.sha256:
                said.append(f"{source}: has checksum {found[:12]}..., not {file.sha256[:12]}...: truncated or changed")
                continue
            os.replace(arrived, target)
            log.info("fetched %s from %s", file.name, source)
            return True
    raise ServiceError(
        f"{file.name} could not be fetched from any of {len(said)} sources ({'; '.join(said)}): "
        f"check the network, or put the file at {target}"
    )


def _reader(source: str) -> Callable[[str, Path, Path, Settings], None]:
    scheme = source.partition(":")[0] if ":" in source else ""
    return {"https": _from_https, "s3": _from_s3, "debian": _from_debian}.get(scheme, _from_folder)


def _from_https(source: str, target: Path, beside: Path, settings: Settings) -> None:
    try:
        with urllib.request.urlopen(source, timeout=TIMEOUT_SECONDS) as response, target.open("wb") as file:
            shutil.copyfileobj(response, file)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise ServiceError(str(getattr(error, "reason", error))) from error


def _from_s3(source: str, target: Path, beside: Path, settings: Settings) -> None:
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    key = settings.s3_access_key_id
    secret = settings.s3_secret_access_key
    where = urlparse(source)
    try:
        client = boto3.client(
            "s3",
            endpoint_url=settings.s3_endpoint_url,
            aws_access_key_id=key.get_secret_value() if key else None,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
        )
        client.download_file(where.netloc, where.path.lstrip("/"), str(target))
    except (BotoCoreError, Boto3Error, ClientError) as error:
        raise ServiceError(" ".join(str(error).split())) from error


def _from_folder(source: str, target: Path, beside: Path, settings: Settings) -> None:
    path = beside / source
    if not path.is_file():
        raise ServiceError(f"{path} is not a file")
    shutil.copyfile(path, target)


def _from_debian(source: str, target: Path, beside: Path, settings: Settings) -> None:
    """debian:PACKAGE/path/inside: the package is downloaded and unpacked, not installed; no root needed."""
    package, _, inside = source.removeprefix("debian:").partition("/")
    unpacked = settings.cache_folder / "debian" / package
    if not unpacked.is_dir():
        if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
            raise ServiceError("this is no Debian system (no apt-get)")
        with tempfile.TemporaryDirectory() as workspace:
            _download_package(package, Path(workspace))
            unpacked.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=unpacked.parent))
            _command(["dpkg-deb", "-x", str(next(Path(workspace).glob("*.deb"))), str(partial)], cwd=unpacked.parent)
            os.replace(partial, unpacked)
    if not (unpacked / inside).is_file():
        raise ServiceError(f"package {package} has no file {inside}")
    shutil.copyfile(unpacked / inside, target)


def _download_package(package: str, workspace: Path) -> None:
    """With the machine's package lists when it has any, else with lists of our own."""
    try:
        _command(["apt-get", "download", package], cwd=workspace)
    except ServiceError:
        state = workspace / "state"
        (state / "lists/partial").mkdir(parents=True)
        (workspace / "cache/archives/partial").mkdir(parents=True)
        own = ["-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={workspace}/cache"]
        _command(["apt-get", *own, "update"], cwd=workspace)
        _command(["apt-get", *own, "download", package], cwd=workspace)


def _command(words: list[str], *, cwd: Path) -> None:
    try:
        subprocess.run(
            [Path(word).resolve() if Path(word).exists() else word for word in words],
            cwd=cwd, check=True, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise ServiceError(f"{words[0]} failed: {last}") from error
    except subprocess.TimeoutExpired as error:
        raise ServiceError(f"{words[0]} did not end within {error.timeout:.0f} seconds") from error
