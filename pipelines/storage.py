"""Storage: a dataset card's files, fetched from the first source that has the right bytes."""

import http.client
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
from coop_core.files import digest_file, write_text
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
        _fetch(file, kept, beside=beside, settings=settings, unreachable=unreachable)
        if file.unpack:
            _unpack_once(file, kept, folder / "unpacked" / Path(file.name).stem.removesuffix(".tar"))
    unpacked = [file for file in card.files if file.unpack]
    return folder / ("unpacked" if unpacked else "fetched") / card.path


def _unpack_once(file: CardFile, archive: Path, target: Path) -> None:
    """Unpack unless just this archive was unpacked before; a note beside the archive says which one was."""
    note = archive.with_name(f"{archive.name}.unpacked")
    if target.is_dir() and note.is_file() and note.read_text() == file.sha256:
        return
    note.unlink(missing_ok=True)
    unpack(archive, target)
    write_text(note, file.sha256)


class _UnreachableError(ServiceError):
    """The host did not answer at all, so that asking it for the next file is no use."""


def _fetch(file: CardFile, target: Path, *, beside: Path, settings: Settings, unreachable: set[str]) -> None:
    """Bring one file. `unreachable` collects hosts that did not answer."""
    if target.is_file() and digest_file(target) == file.sha256:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    said = []
    for source in file.sources:
        host = _host(source, settings)
        if host in unreachable:
            said.append(f"{source}: {host} does not answer")
            continue
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
            arrived = Path(partial) / "file"
            try:
                _reader(source)(source, arrived, beside, settings)
            except ServiceError as error:
                said.append(f"{source}: {error}")
                if isinstance(error, _UnreachableError) and host:
                    unreachable.add(host)
                continue
            if (found := digest_file(arrived)) != file.sha256:
                said.append(f"{source}: has checksum {found[:12]}..., not {file.sha256[:12]}...: truncated or changed")
                continue
            os.replace(arrived, target)
            log.info("fetched %s from %s", file.name, source)
            return
    raise ServiceError(
        f"{file.name} could not be fetched from any of {len(said)} sources ({'; '.join(said)}): "
        f"check the network, or put the file at {target}"
    )


def _host(source: str, settings: Settings) -> str:
    """Who is asked: a web host or the S3 endpoint; nobody for files beside the card."""
    if source.startswith("s3://"):
        return settings.s3_endpoint_url or "AWS S3"
    return source.split("/")[2] if source.startswith("https://") else ""


def _reader(source: str) -> Callable[[str, Path, Path, Settings], None]:
    scheme = source.partition(":")[0] if ":" in source else ""
    return {"https": _from_https, "s3": _from_s3, "debian": _from_debian}.get(scheme, _from_folder)


def _from_https(source: str, target: Path, beside: Path, settings: Settings) -> None:
    try:
        response = urllib.request.urlopen(source, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        raise ServiceError(f"answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise _UnreachableError(str(getattr(error, "reason", error))) from error
    except (http.client.HTTPException, ValueError) as error:  # no HTTP at the other end, or no address at all
        raise ServiceError(f"{type(error).__name__} {error}") from error
    with response, target.open("wb") as file:
        try:
            shutil.copyfileobj(response, file)
        except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
            raise ServiceError(f"broke off ({type(error).__name__})") from error


def _from_s3(source: str, target: Path, beside: Path, settings: Settings) -> None:
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

    key = settings.s3_access_key_id
    secret = settings.s3_secret_access_key
    where = urlparse(source)
    try:
        client = boto3.client(
            "s3",
            endpoint_url=settings.s3_endpoint_url or None,
            aws_access_key_id=key.get_secret_value() if key else None,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            config=Config(retries={"total_max_attempts": 2}),
        )
        client.download_file(where.netloc, where.path.lstrip("/"), str(target))
    except HTTPClientError as error:
        raise _UnreachableError(" ".join(str(error).split())) from error
    except (BotoCoreError, Boto3Error, ClientError, ValueError) as error:  # ValueError: an endpoint that is no URL
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
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=unpacked.parent, prefix=".partial-") as folder:
            workspace = Path(folder).resolve()
            _download_package(package, workspace)
            (workspace / "content").mkdir()
            archives = sorted(workspace.glob("*.deb"))
            if not archives:
                raise ServiceError(f"apt-get brought no package {package}")
            _command(["dpkg-deb", "-x", str(archives[0]), str(workspace / "content")], cwd=workspace)
            os.replace(workspace / "content", unpacked)
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
        subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True, timeout=300)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise ServiceError(f"{words[0]} failed: {last}") from error
    except subprocess.TimeoutExpired as error:
        raise ServiceError(f"{words[0]} did not end within {error.timeout:.0f} seconds") from error
