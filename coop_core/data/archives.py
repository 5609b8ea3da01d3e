"""Archives from elsewhere: zip or tar -> files that stay inside their folder and below a size."""

import contextlib
import errno
import gzip
import os
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Self

from coop_core.errors import DatasetError

MAX_BYTES = 500 * 2**30
"""Upper bound of one file that is fetched, and of everything one archive may unpack to."""
_PIECE = 1 << 20


def unpack(archive: Path, target: Path, *, max_bytes: int = MAX_BYTES) -> tuple[int, int]:
    """Extract regular files only, into a folder that appears whole or not at all -> (files, bytes) extracted.

    Raises
    ------
    DatasetError
        For members that would leave the folder, that share one name or have none, links and devices, archives that
        unpack to more than `max_bytes`, and damaged files.
    """
    files, left = 0, max_bytes
    with appearing(target) as folder:
        for name, pieces in _members(archive):
            with _create(_inside(folder, name, archive), name, archive) as file:
                for piece in pieces:
                    left -= len(piece)
                    if left < 0:
                        raise DatasetError(
                            f"archive {archive} unpacks to more than the allowed size: it is not extracted"
                        )
                    file.write(piece)
            files += 1
    return files, max_bytes - left


def measure(folder: Path) -> tuple[int, int]:
    """(files, bytes) below a folder: what `unpack` said, as long as nothing was lost."""
    sizes = [os.lstat(os.path.join(root, name)).st_size for root, _, names in os.walk(folder) for name in names]
    return len(sizes), sum(sizes)


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """An empty folder of one's own to fill; in the end it takes the place of `target`, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.partial-") as own:
        folder = Path(own) / "new"
        folder.mkdir()
        yield folder
        while True:
            with contextlib.suppress(FileNotFoundError):
                target.rename(Path(tempfile.mkdtemp(dir=own)) / "old")
            try:
                folder.rename(target)
                return
            except OSError as error:  # another process was faster: now its folder is the old one
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes left of `target`; for callers that know nobody else to be at work there."""
    for left in target.parent.glob(f".{target.name}.partial*"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def read_gzip(path: Path, *, max_bytes: int) -> bytes:
    """The content of one .gz file, refused when it is damaged or larger than `max_bytes`."""
    try:
        with _decoding(path), gzip.open(path) as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: put it there, or name its sources in the card") from None
    if len(content) > max_bytes:
        raise DatasetError(f"{path} unpacks to more than {max_bytes} bytes: it is not the file it should be")
    return content


class _Member(tarfile.TarInfo):
    """A header of a tar; tarfile takes a damaged one for the end of the archive, and what follows would be lost."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not buf.strip(b"\0"):  # the mark of the end
                raise
            raise tarfile.ReadError(f"a member's {error}") from None


def _members(archive: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    """(name, content in pieces) of each file."""
    with _decoding(f"archive {archive}"):
        if tarfile.is_tarfile(archive):  # asked first: a tar that ends with a zip looks like a zip too
            yield from _tar_members(archive)
        elif zipfile.is_zipfile(archive):
            yield from _zip_members(archive)
        else:
            raise DatasetError(f"archive {archive} is neither zip nor tar: check the card's file")


def _zip_members(archive: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    with zipfile.ZipFile(archive) as zipped:
        _check_count(archive, len(zipped.infolist()))
        for entry in zipped.infolist():
            if (entry.external_attr >> 16) & 0o170000 == 0o120000:
                raise DatasetError(f"archive {archive} holds a link, {entry.filename!r}: it is not extracted")
            if entry.flag_bits & 1:
                raise DatasetError(f"archive {archive} is locked by a password: unlock it and pack it again")
            if not entry.is_dir():
                name = entry.orig_filename if "\0" in entry.orig_filename else entry.filename  # zipfile cuts it there
                with zipped.open(entry) as stream:
                    yield name, _pieces(stream, archive)


def _check_count(archive: Path, found: int) -> None:
    """zipfile reads a damaged list of members as far as it goes; the end record says how many there should be."""
    with archive.open("rb") as file:
        file.seek(max(0, archive.stat().st_size - 22 - 65_535))  # the record and the longest comment behind it
        tail = file.read()
    (listed,) = struct.unpack_from("<H", tail, tail.rfind(b"PK\5\6") + 10)
    if listed not in (0xFFFF, found & 0xFFFF):  # 0xFFFF: too many for this record
        raise zipfile.BadZipFile(f"{found} of {listed} members are listed")


def _tar_members(archive: Path) -> Iterator[tuple[str, Iterator[bytes]]]:
    with tarfile.open(archive, tarinfo=_Member) as tarred:
        for member in tarred:
            if member.isdir():
                continue
            stream = tarred.extractfile(member) if member.isfile() else None
            if stream is None:
                raise DatasetError(
                    f"archive {archive} holds {member.name!r}, which is no regular file: it is not extracted"
                )
            yield member.name, _pieces(stream, archive)
        while tarred.fileobj is not None and (piece := tarred.fileobj.read(_PIECE)):  # a checksum may be at the end
            if piece.strip(b"\0"):
                raise tarfile.ReadError("there is more behind the mark of its end")


def _pieces(stream: IO[bytes], archive: Path) -> Iterator[bytes]:
    with _decoding(f"archive {archive}"):
        while piece := stream.read(_PIECE):
            yield piece


@contextmanager
def _decoding(what: str | Path) -> Iterator[None]:
    """Around reading alone: what a damaged stream makes a decoder raise -> one sentence.

    Every exception is caught because zipfile, tarfile and their decoders let out at least OSError, ValueError,
    RuntimeError, struct.error and MemoryError beside their own; the machine's faults, which have a number, pass.
    """
    try:
        yield
    except DatasetError:
        raise
    except NotImplementedError as error:
        way_out = "pack it again as .tar.gz or with the usual method, Deflate"
        raise DatasetError(f"{what} is packed in a way that cannot be unpacked here ({error}): {way_out}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"{what} is damaged ({reason}): delete it and fetch it again") from None


def _inside(folder: Path, name: str, archive: Path) -> Path:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name:
        raise DatasetError(f"archive {archive} holds {name!r}, which would leave its folder: it is not extracted")
    if not parts.parts or "\0" in name:
        raise DatasetError(f"archive {archive} holds {name!r}, which is no name of a file: it is not extracted")
    return folder / parts


def _create(path: Path, name: str, archive: Path) -> IO[bytes]:
    """Open a file that was not there before."""
    try:
        try:
            return path.open("xb")
        except FileNotFoundError:  # asked in this order because most files come into a folder that is there
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("xb")
    except (FileExistsError, NotADirectoryError):
        fault = "whose place another member has already"
    except UnicodeEncodeError:
        fault = "which is no name of a file"
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        fault = "a name too long for this disk"
    shown = name if len(name) <= 80 else f"{name[:80]}..."
    raise DatasetError(f"archive {archive} holds {shown!r}, {fault}: it is not extracted")
