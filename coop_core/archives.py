"""Archives from elsewhere: zip or tar -> files that stay inside their folder and below a size."""

import gzip
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from coop_core.errors import DatasetError

MAX_BYTES = 500 * 2**30
"""Upper bound of everything one archive may unpack to."""


def unpack(archive: Path, target: Path, *, max_bytes: int = MAX_BYTES) -> None:
    """Extract regular files only, into a folder that appears whole or not at all.

    Raises
    ------
    DatasetError
        For members that would leave the folder, links and devices, archives that unpack to more than
        `max_bytes`, and damaged files.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    left = max_bytes
    try:
        for name, stream in _members(archive):
            path = _inside(partial, name, archive)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                left -= _copy(stream, file, limit=left, archive=archive)
        partial.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise DatasetError(f"archive {archive} is damaged ({error}): delete it and fetch it again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_gzip(path: Path, *, max_bytes: int) -> bytes:
    """The content of one .gz file, refused when it is damaged or larger than `max_bytes`."""
    try:
        with gzip.open(path) as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: put it there, or name its sources in the card") from None
    except (zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise DatasetError(f"{path} is damaged ({error}): delete it and fetch it again") from None
    if len(content) > max_bytes:
        raise DatasetError(f"{path} unpacks to more than {max_bytes} bytes: it is not the file it should be")
    return content


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                if (entry.external_attr >> 16) & 0o170000 == 0o120000:
                    raise DatasetError(f"archive {archive} holds a link, {entry.filename!r}: it is not extracted")
                if entry.flag_bits & 1:
                    raise DatasetError(f"archive {archive} is locked by a password: unlock it and pack it again")
                if not entry.is_dir():
                    with zipped.open(entry) as stream:
                        yield entry.filename, stream
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tarred:
            for member in tarred:
                if member.isdir():
                    continue
                stream_or_none = tarred.extractfile(member) if member.isfile() else None
                if stream_or_none is None:
                    raise DatasetError(
                        f"archive {archive} holds {member.name!r}, which is no regular file: it is not extracted"
                    )
                yield member.name, stream_or_none
            while tarred.fileobj is not None and tarred.fileobj.read(1 << 20):
                pass  # to the end, where a compressed stream keeps its checksum
    else:
        raise DatasetError(f"archive {archive} is neither zip nor tar: check the card's file")


def _inside(folder: Path, name: str, archive: Path) -> Path:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name:
        raise DatasetError(f"archive {archive} holds {name!r}, which would leave its folder: it is not extracted")
    return folder / parts


def _copy(stream: IO[bytes], file: IO[bytes], *, limit: int, archive: Path) -> int:
    written = 0
    while piece := stream.read(1 << 20):
        written += len(piece)
        if written > limit:
            raise DatasetError(f"archive {archive} unpacks to more than the allowed size: it is not extracted")
        file.write(piece)
    return written
