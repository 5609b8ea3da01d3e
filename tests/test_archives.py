"""Archives from elsewhere: nothing leaves its folder, nothing half unpacked stays."""

import bz2
import contextlib
import gzip
import io
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coop_core.data.archives import measure, read_gzip, remove_leftovers, unpack
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


def make_zip(path: Path, files: Mapping[str, bytes], *, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
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


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_an_archive_with_flipped_bytes_is_damaged_and_nothing_stays(tmp_path: Path, kind: str) -> None:
    archive = make_archive(tmp_path, kind, {"a": NOISE, "b": NOISE[::-1]})
    content = bytearray(archive.read_bytes())
    inside = len(content) // 3
    content[inside : inside + 64] = bytes(64)
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


def test_a_zip_of_an_unknown_method_asks_for_another(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"a.png": NOISE})
    content = bytearray(archive.read_bytes())
    for header, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):  # 9 is Deflate64, as Windows packs large files
        content[content.index(header) + method] = 9
    archive.write_bytes(content)
    with pytest.raises(DatasetError, match=r"a\.zip is packed in a way that cannot be unpacked here .+: pack it again"):
        unpack(archive, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_with_a_wrong_byte_is_damaged_whatever_its_method(tmp_path: Path, method: int) -> None:
    archive = make_zip(tmp_path / "a.zip", {"a": b"hello" * 1000}, method=method)
    content = bytearray(archive.read_bytes())
    content[60] ^= 1
    archive.write_bytes(content)
    with pytest.raises(DatasetError, match=DAMAGED):
        unpack(archive, tmp_path / "out")


def test_a_zip_that_lost_bytes_at_its_head_is_damaged(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"a": NOISE, "b": NOISE})
    content = archive.read_bytes()
    archive.write_bytes(content[:5] + content[40:])
    with pytest.raises(DatasetError, match=DAMAGED):
        unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("damage", ["a header", "the mark of the end"])
def test_a_tar_whose_members_end_early_is_damaged(tmp_path: Path, damage: str) -> None:
    archive = make_tar(tmp_path / "a.tar", {name: bytes(512) for name in "abc"})
    content = bytearray(archive.read_bytes())
    if damage == "a header":
        content[2048 + 1] ^= 1  # of the third member: the first two are whole
    else:
        del content[3 * 1024 :]
    archive.write_bytes(content)
    with pytest.raises(DatasetError, match=DAMAGED):
        unpack(archive, tmp_path / "out")


def test_a_tar_behind_whose_end_more_follows_is_damaged(tmp_path: Path) -> None:
    first, second = (make_tar(tmp_path / name, {name: b"x"}) for name in ("a", "b"))
    both = tmp_path / "both.tar"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(DatasetError, match=r"damaged \(there is more behind the mark of its end\)"):
        unpack(both, tmp_path / "out")


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path: Path) -> None:
    inner = make_zip(tmp_path / "inner.zip", {"x": b"x"}).read_bytes()
    unpack(make_tar(tmp_path / "a.tar", {"a.png": b"a", "z.zip": inner}), tmp_path / "out")
    assert tree(tmp_path / "out") == {"a.png": b"a", "z.zip": inner}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("inner", ["zip", "tar"])
def test_a_wrong_byte_anywhere_is_a_sentence_or_loses_no_file(
    tmp_path: Path, inner: str, pack: Callable[[bytes], bytes]
) -> None:
    whole = pack(make_archive(tmp_path, inner, dict.fromkeys("abc", NOISE[:700])).read_bytes())
    archive, choose = tmp_path / "a", random.Random(0)
    for _ in range(150):
        content = bytearray(whole)
        content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
        archive.write_bytes(content)
        with contextlib.suppress(DatasetError):
            assert unpack(archive, tmp_path / "out")[0] == len(tree(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    "names", [("a", "a/b"), ("a/b", "a"), ("a", "a/b/c"), ("a", "./a")], ids=lambda names: " ".join(names)
)
def test_two_members_at_one_place_are_refused_and_nothing_stays(
    tmp_path: Path, kind: str, names: tuple[str, str]
) -> None:
    archive = make_archive(tmp_path, kind, dict(zip(names, (b"1", b"2"), strict=True)))
    place = f"holds '{names[1]}', whose place another member has already: it is not extracted"
    with pytest.raises(DatasetError, match=place):
        unpack(archive, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("name", ["x" * 300, "d" * 300 + "/a"], ids=["file", "folder"])
def test_a_name_too_long_for_the_disk_is_shown_shortened(tmp_path: Path, kind: str, name: str) -> None:
    archive = make_archive(tmp_path, kind, {name: b""})
    with pytest.raises(DatasetError, match=r"holds '(x{80}|d{80})\.\.\.', a name too long for this disk"):
        unpack(archive, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [archive]


def test_a_member_that_is_called_as_its_folder_is_refused_and_does_not_block_it(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DatasetError, match=r"holds '\.', which is no name of a file: it is not extracted"):
        unpack(make_archive(tmp_path, kind, {".": b"y"}), tmp_path / "out")
    unpack(make_archive(tmp_path, kind, FILES), tmp_path / "out")
    assert tree(tmp_path / "out") == FILES


def test_a_zero_byte_in_a_name_is_refused_instead_of_cutting_the_name(tmp_path: Path) -> None:
    zipped = make_zip(tmp_path / "a.zip", {"cat_1.png": b"a"})
    zipped.write_bytes(zipped.read_bytes().replace(b"cat_1", b"cat\x001"))
    member = tarfile.TarInfo("short")
    member.pax_headers = {"path": "cat\x001.png"}
    with tarfile.open(tmp_path / "a.tar", "w") as tarred:
        tarred.addfile(member)
    for archive in (zipped, tmp_path / "a.tar"):
        with pytest.raises(DatasetError, match=r"holds 'cat\\x001\.png', which is no name of a file"):
            unpack(archive, tmp_path / "out")


def test_the_count_of_files_and_bytes_is_what_lies_in_the_folder(tmp_path: Path, kind: str) -> None:
    assert unpack(make_archive(tmp_path, kind, FILES), tmp_path / "out") == (3, 11) == measure(tmp_path / "out")


def test_two_at_once_in_one_target_each_leave_it_whole(tmp_path: Path) -> None:
    files = {f"class/{number}.png": b"x" for number in range(50)}
    archive = make_zip(tmp_path / "a.zip", files)
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda _: unpack(archive, tmp_path / "out"), range(20)):
            pass
    assert tree(tmp_path / "out") == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "out"]


def test_leftovers_of_one_target_go_and_those_of_others_stay(tmp_path: Path) -> None:
    for folder in (".out.partial-1", ".other.partial-1"):
        (tmp_path / folder / "new").mkdir(parents=True)
    (tmp_path / ".out.partial").write_text("a file, as a member called '.' left one")
    remove_leftovers(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".other.partial-1"]


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
