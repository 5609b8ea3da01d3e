"""Files and what they are -> one archive that is whole or refused; and back, into a folder.

A tar file whose last member lists every other with its size and digest. So it is written in one go, from streams too,
and an archive that was cut anywhere lacks that list.
"""

import gzip
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from coop_core.errors import ArtifactError

_LIST = "backup.json"
_FORMAT = 1
_PIECE = 1 << 20


class Writer:
    """An archive that is being written."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._members: dict[str, list[Any]] = {}

    def add(self, name: str, file: Path) -> None:
        """A file under this name; one that grows meanwhile is taken as long as it was."""
        with file.open("rb") as stream:
            self.stream(name, stream, os.fstat(stream.fileno()).st_size)

    def add_folder(self, name: str, folder: Path) -> None:
        """Every file of a folder; what vanishes meanwhile was nobody's."""
        for file in sorted(folder.rglob("*")):
            if file.is_file() and not file.is_symlink():
                try:
                    self.add(f"{name}/{file.relative_to(folder).as_posix()}", file)
                except FileNotFoundError:
                    continue

    def stream(self, name: str, stream: IO[bytes], size: int) -> None:
        """So many bytes of a stream, which must have them."""
        about = tarfile.TarInfo(name)
        about.size, about.mode = size, 0o600
        digesting = _Digesting(stream)
        self._tar.addfile(about, digesting)
        self._members[name] = [size, digesting.digest.hexdigest()]

    def finish(self, facts: dict[str, Any]) -> None:
        text = json.dumps({"format": _FORMAT, **facts, "members": self._members}, indent=1).encode()
        about = tarfile.TarInfo(_LIST)
        about.size = len(text)
        self._tar.addfile(about, io.BytesIO(text))


class _Digesting:
    """A stream whose bytes are counted into a digest as they are read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        piece = self._stream.read(size)
        self.digest.update(piece)
        return piece


@contextmanager
def writing(file: Path) -> Iterator[Writer]:
    """An archive for this user's eyes alone, there only once it is whole; compressed where its name ends in .gz.

    Raises
    ------
    ArtifactError
        When there is a file of that name.
    """
    if file.exists():
        raise ArtifactError(f"{file} is there already: name another file, or remove it")
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:
            with tarfile.open(fileobj=out, mode="w:gz" if file.suffix == ".gz" else "w") as tar:
                yield Writer(tar)
            out.flush()
            os.fsync(out.fileno())
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)


def read_facts(file: Path) -> dict[str, Any]:
    """What an archive says of itself, once every byte of it has been read and found right.

    Raises
    ------
    ArtifactError
        When it is cut, damaged, or none of ours.
    """
    found: dict[str, list[Any]] = {}
    with _open(file) as members:
        for about, stream in members:
            if about.name == _LIST:
                return _checked(file, json.loads(stream.read()), found)
            digest = hashlib.sha256()
            while piece := stream.read(_PIECE):
                digest.update(piece)
            found[about.name] = [about.size, digest.hexdigest()]
    raise ArtifactError(f"{file} is no backup of `coop backup`, or was cut short: take another one")


def _checked(file: Path, facts: dict[str, Any], found: dict[str, list[Any]]) -> dict[str, Any]:
    if facts.pop("format", None) != _FORMAT:
        raise ArtifactError(f"{file} is of another version of the product: restore it with that one")
    if facts["members"] != found:
        raise ArtifactError(f"{file} is damaged: not every file in it is as it was; take another backup")
    return facts


def each(file: Path, take: Callable[[str, IO[bytes], int], object]) -> None:
    """Hand on every member: its name, a stream of it, and its size."""
    with _open(file) as members:
        for about, stream in members:
            if about.name != _LIST:
                take(about.name, stream, about.size)


def write_out(stream: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        while piece := stream.read(_PIECE):
            out.write(piece)


@contextmanager
def _open(file: Path) -> Iterator[Iterator[tuple[tarfile.TarInfo, IO[bytes]]]]:
    """The members with their streams; whatever is wrong with the file is a sentence."""
    try:
        with tarfile.open(file, "r:*") as tar:
            yield ((about, _stream(file, tar, about)) for about in tar)
    except FileNotFoundError as error:
        if error.filename not in (file, str(file)):
            raise
        raise ArtifactError(f"there is no backup {file}") from None
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArtifactError(f"{file} is cut short or no backup ({error}): take another one") from None


def _stream(file: Path, tar: tarfile.TarFile, about: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(about) if about.isfile() else None
    if stream is None or about.name.startswith("/") or ".." in Path(about.name).parts:
        raise ArtifactError(f"{file} holds {about.name!r}, which no backup does: take another one")
    return stream
