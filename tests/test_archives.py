"""Archives from elsewhere: nothing leaves its folder, nothing half unpacked stays."""

import gzip
import io
import random
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from coop_core.archives import read_gzip, unpack
from coop_core.errors import DatasetError

FILES = {"river/a.png": b"river", "forest/deep/er/b.png": b"forest", "read me.txt": b""}
ESCAPES = ["../x", "a/../../x", "/etc/x", "..\\x", "C:\\x", "C:/x"]
NOISE = random.Random(0).randbytes(300_000)
"""Incompressible, as photographs are: damage in the middle of an archive hits a member, not its header."""
DAMAGED = r"archive .+ is (damaged \(.+\): delete it and fetch it again|neither zip nor tar)"
SPECIAL = {
    "symlink": tarfile.SYMTYPE,
    "hardlink": tarfile.LNKTYPE,
    "character device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "pipe": tarfile.FIFOTYPE,
}


def make_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, files: Mapping[str, bytes], *, mode: str = "w", special: str = "") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if special:
            member = tarfile.TarInfo("odd")
            member.type, member.linkname = SPECIAL[special], "river/a.png"
            archive.addfile(member)
    return path


def make_archive(folder: Path, kind: str, files: Mapping[str, bytes]) -> Path:
    if kind == "zip":
        return make_zip(folder / "images.zip", files)
    return make_tar(folder / f"images.{kind}", files, mode=f"w:{kind[4:]}")


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["zip", "tar", "tar.gz"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_nested_folders_are_unpacked_as_they_are(tmp_path: Path, kind: str) -> None:
    unpack(make_archive(tmp_path, kind, FILES), tmp_path / "out")
    assert tree(tmp_path / "out") == FILES


def test_folder_entries_are_no_fault(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        folder = tarfile.TarInfo("./river")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        member = tarfile.TarInfo("./river/a.png")
        archive.addfile(member, io.BytesIO())
    unpack(tmp_path / "a.tar", tmp_path / "out")
    assert tree(tmp_path / "out") == {"river/a.png": b""}


def test_an_empty_archive_gives_an_empty_folder(tmp_path: Path) -> None:
    unpack(make_zip(tmp_path / "a.zip", {}), tmp_path / "out")
    assert tree(tmp_path / "out") == {}


def test_what_the_folder_held_before_is_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.png").write_bytes(b"old")
    unpack(make_archive(tmp_path, kind, FILES), tmp_path / "out")
    assert tree(tmp_path / "out") == FILES


@pytest.mark.parametrize("name", ESCAPES)
def test_a_member_that_would_leave_its_folder_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    archive = make_archive(tmp_path, kind, {"good.png": b"good", name: b"bad"})
    with pytest.raises(DatasetError, match="which would leave its folder: it is not extracted"):
        unpack(archive, tmp_path / "deep" / "out")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


@pytest.mark.parametrize("special", SPECIAL)
def test_a_tar_member_that_is_no_regular_file_is_refused_and_nothing_stays(tmp_path: Path, special: str) -> None:
    archive = make_tar(tmp_path / "a.tar", FILES, special=special)
    with pytest.raises(DatasetError, match="holds 'odd', which is no regular file: it is not extracted"):
        unpack(archive, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [archive]


def test_a_link_in_a_zip_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    link = zipfile.ZipInfo("odd")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archive, "a") as zipped:
        zipped.writestr(link, "/etc/passwd")
    with pytest.raises(DatasetError, match="holds a link, 'odd': it is not extracted"):
        unpack(archive, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [archive]


def test_an_archive_may_unpack_to_just_the_bound(tmp_path: Path, kind: str) -> None:
    unpack(make_archive(tmp_path, kind, {"a": bytes(600), "b": bytes(400)}), tmp_path / "out", max_bytes=1000)
    assert len(tree(tmp_path / "out")) == 2


def test_an_archive_that_unpacks_to_more_than_the_bound_is_refused_and_nothing_stays(tmp_path: Path, kind: str) -> None:
    archive = make_archive(tmp_path, kind, {"a": bytes(600), "b": bytes(401)})
    with pytest.raises(DatasetError, match="unpacks to more than the allowed size: it is not extracted"):
        unpack(archive, tmp_path / "out", max_bytes=1000)
    assert list(tmp_path.iterdir()) == [archive]


def test_a_refused_archive_leaves_the_folder_of_an_earlier_one(tmp_path: Path, kind: str) -> None:
    unpack(make_archive(tmp_path, kind, FILES), tmp_path / "out")
    with pytest.raises(DatasetError, match="would leave its folder"):
        unpack(make_archive(tmp_path, kind, {"new.png": b"new", "../x": b""}), tmp_path / "out")
    assert tree(tmp_path / "out") == FILES


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_cut_off_tar_is_damaged_and_nothing_stays(tmp_path: Path, kind: str) -> None:
    archive = make_archive(tmp_path, kind, {"a": NOISE, "b": NOISE[::-1]})
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(DatasetError, match=DAMAGED):
        unpack(archive, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2"])
def test_an_archive_with_flipped_bytes_is_damaged_and_nothing_stays(tmp_path: Path, kind: str) -> None:
    archive = make_archive(tmp_path, kind, {"a": NOISE, "b": NOISE[::-1]})
    content = bytearray(archive.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    archive.write_bytes(content)
    with pytest.raises(DatasetError, match=DAMAGED):
        unpack(archive, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [archive]


def test_a_zip_behind_a_password_is_refused_with_a_sentence(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"a.png": b"a"})
    content = bytearray(archive.read_bytes())
    content[6] |= 1  # the encryption flag of the local header
    content[content.index(b"PK\x01\x02") + 8] |= 1  # and of the directory's
    archive.write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.zip.+(password|encrypted)"):
        unpack(archive, tmp_path / "out")


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_text("<html>Not found</html>")
    with pytest.raises(DatasetError, match=r"a\.zip is neither zip nor tar: check the card's file"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_gzip_file_gives_its_content(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"content"))
    assert read_gzip(tmp_path / "a.gz", max_bytes=7) == b"content"


def test_a_gzip_file_larger_than_its_bound_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"content"))
    with pytest.raises(DatasetError, match=r"a\.gz unpacks to more than 6 bytes: it is not the file it should be"):
        read_gzip(tmp_path / "a.gz", max_bytes=6)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_a_damaged_gzip_file_is_a_sentence(tmp_path: Path, damage: str) -> None:
    content = bytearray(gzip.compress(bytes(range(256)) * 8))
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "flipped":
        content[-6] ^= 255
    else:
        content[:2] = b"no"
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.gz is damaged \(.+\): delete it and fetch it again"):
        read_gzip(tmp_path / "a.gz", max_bytes=10_000)
