"""Storage: a dataset card's files, fetched from the first source that has the right bytes."""

import http.client
import logging
import os
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlparse

from coop_core.data.archives import measure, remove_leftovers, unpack
from coop_core.data.catalog import Card, CardFile
from coop_core.errors import ServiceError
from coop_core.files import digest_file, write_text
from pipelines import locks
from pipelines.settings import Settings
from pipelines.sources import bucket
from pipelines.sources.refusals import UnreachableError

log = logging.getLogger(__name__)
TIMEOUT_SECONDS = 20


def fetch_files(card: Card, beside: Path, *, cache: Path, settings: Settings) -> Path:
    """Bring a card's files -> the folder that its paths start from: in the cache, or beside the card without files.

    Files that are there with the right checksum are not fetched again. Processes that share the cache do this in
    turn, a card at a time.

    Raises
    ------
    ServiceError
        When no source has a file, with what each source said.
    """
    if not card.files:
        return beside
    folder = cache / card.name
    unreachable: set[str] = set()
    told = f"another process is fetching the files of {card.name}: waiting for it"
    with _named(folder), locks.in_turn(folder / "lock", meanwhile=told):
        for left in (folder / "fetched").glob(".partial-*"):  # by a kill
            shutil.rmtree(left)
        for file in card.files:
            kept = folder / "fetched" / file.name
            _fetch(file, kept, beside=beside, settings=settings, unreachable=unreachable)
            if file.unpack:
                _unpack_once(file, kept, folder / "unpacked" / file.unpacked_name)
        for left in (folder / "fetched").glob(".arriving-*"):  # of sources that are asked no more
            shutil.rmtree(left)
    unpacked = [file for file in card.files if file.unpack]
    return folder / ("unpacked" if unpacked else "fetched")


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """A full disk does not say which file did not fit: the error names the folder then."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise


def _unpack_once(file: CardFile, archive: Path, target: Path) -> None:
    """Unpack unless just this archive was unpacked before and nothing of it is lost.

    A note beside the archive says which one was, and how many files and bytes came out of it.
    """
    note = archive.with_name(f"{archive.name}.unpacked")
    if target.is_dir() and note.is_file() and note.read_bytes() == _note(file, measure(target)).encode():
        return
    note.unlink(missing_ok=True)
    remove_leftovers(target)
    write_text(note, _note(file, unpack(archive, target)))


def _note(file: CardFile, measured: tuple[int, int]) -> str:
    return f"{file.sha256} {measured[0]} files {measured[1]} bytes\n"


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
                _reader(source)(source, arrived, beside, settings, file.max_bytes)
            except ServiceError as error:
                said.append(f"{source}: {error}")
                if isinstance(error, UnreachableError) and host:
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


def _reader(source: str) -> Callable[[str, Path, Path, Settings, int], None]:
    scheme = source.partition(":")[0] if ":" in source else ""
    return {"https": _from_https, "s3": _from_s3, "debian": _from_debian}.get(scheme, _from_folder)


class _SecureRedirects(urllib.request.HTTPRedirectHandler):
    """A redirection may lead to another host, but not out of https."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urlparse(newurl).scheme != "https":
            fp.close()
            raise ServiceError(f"is redirected to {newurl}, which is not https: name a source that stays there")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _from_https(source: str, target: Path, beside: Path, settings: Settings, max_bytes: int) -> None:
    try:
        response = urllib.request.build_opener(_SecureRedirects).open(source, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        raise ServiceError(f"answers {error.code} {error.reason}") from error
    except OSError as error:  # of urllib, the socket or TLS
        raise UnreachableError(str(getattr(error, "reason", error))) from error
    except (http.client.HTTPException, ValueError) as error:  # no HTTP at the other end, or no address at all
        raise ServiceError(f"{type(error).__name__} {error}") from error
    with response, target.open("wb") as file:
        _check_size(response.length or 0, max_bytes)
        arrived = 0
        while piece := _next_piece(response):
            arrived += len(piece)
            _check_size(arrived, max_bytes)
            file.write(piece)
        if response.length:
            raise ServiceError(f"broke off with {response.length} bytes to come")


def _next_piece(response: http.client.HTTPResponse) -> bytes:
    """Apart from writing: what goes wrong here is the source's fault, not the disk's."""
    try:
        return response.read(1 << 20)
    except (http.client.HTTPException, OSError) as error:
        raise ServiceError(f"broke off ({type(error).__name__})") from error


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ServiceError(f"has more than {max_bytes} bytes: it is not the file it should be, or raise max_bytes")


def _from_s3(source: str, target: Path, beside: Path, settings: Settings, max_bytes: int) -> None:
    key, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    client = bucket.connect(
        settings.s3_endpoint_url, key.get_secret_value() if key else None, secret.get_secret_value() if secret else None
    )
    bucket.fetch(client, source, target, max_bytes=max_bytes)


def _from_folder(source: str, target: Path, beside: Path, settings: Settings, max_bytes: int) -> None:
    if "://" in source:
        raise ServiceError("is neither https:// nor s3://")
    path = beside / source
    if not os.path.isfile(path):  # unlike Path.is_file, it answers for impossible names too
        raise ServiceError(f"{path} is not a file")
    _check_size(path.stat().st_size, max_bytes)
    shutil.copyfile(path, target)


def _from_debian(source: str, target: Path, beside: Path, settings: Settings, max_bytes: int) -> None:
    """debian:PACKAGE/path/inside: the package is downloaded and unpacked, not installed; no root needed."""
    package, _, inside = source.removeprefix("debian:").partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", package):  # Debian's policy, section 5.6.1
        raise ServiceError(f"{package!r} is no name of a Debian package")
    cache = settings.cache_folder / "debian"
    told = f"another process is fetching Debian packages into {cache}: waiting for it"
    with locks.in_turn(settings.cache_folder / "debian.lock", meanwhile=told):
        _bring_package(package, cache)
    if not (cache / package / inside).is_file():
        raise ServiceError(f"package {package} has no file {inside}")
    _check_size((cache / package / inside).stat().st_size, max_bytes)
    shutil.copyfile(cache / package / inside, target)


def _bring_package(package: str, cache: Path) -> None:
    """A package's content -> the folder of its name in the cache, unless it is there."""
    if (cache / package).is_dir():
        return
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise ServiceError("this is no Debian system (no apt-get)")
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob(".partial-*"):  # by a kill
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as folder:
        workspace = Path(folder).resolve()
        _download_package(package, workspace)
        (workspace / "content").mkdir()
        archives = sorted(workspace.glob("*.deb"))
        if not archives:
            raise ServiceError(f"apt-get brought no package {package}")
        _command(["dpkg-deb", "-x", str(archives[0]), str(workspace / "content")], cwd=workspace)
        os.replace(workspace / "content", cache / package)


def _download_package(package: str, workspace: Path) -> None:
    """With the machine's package lists when it has any, else with lists of our own."""
    try:
        _command(["apt-get", "download", "--", package], cwd=workspace)
    except ServiceError:
        state = workspace / "state"
        (state / "lists/partial").mkdir(parents=True)
        (workspace / "cache/archives/partial").mkdir(parents=True)
        own = ["-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={workspace}/cache"]
        _command(["apt-get", *own, "update"], cwd=workspace)
        _command(["apt-get", *own, "download", "--", package], cwd=workspace)


def _command(words: list[str], *, cwd: Path) -> None:
    try:
        subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True, timeout=300)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise ServiceError(f"{words[0]} failed: {last}") from error
    except subprocess.TimeoutExpired as error:
        raise ServiceError(f"{words[0]} did not end within {error.timeout:.0f} seconds") from error
