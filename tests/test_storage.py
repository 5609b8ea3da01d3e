"""Storage: a card's files come from the first source that has the right bytes, or a sentence says why not."""

import contextlib
import datetime
import hashlib
import io
import ipaddress
import logging
import os
import resource
import socket
import ssl
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coop_core.data.catalog import Card, CardFile, read_source
from coop_core.errors import DatasetError, ServiceError
from coop_core.files import digest_bytes
from pipelines import locks
from pipelines.settings import Settings
from pipelines.sources.storage import fetch_files

GOOD, WRONG = b"the bytes of the card's file", b"other bytes"
KEYS = {"s3_access_key_id": "key", "s3_secret_access_key": "secret"}


class SecureServer:
    """HTTPS on loopback: answers from `pages`, and remembers what it was asked for."""

    def __init__(self, certificate: Path) -> None:
        self.pages: dict[str, bytes] = {}
        self.cut: set[str] = set()
        """Pages that promise more than they send."""
        self.moved: dict[str, str] = {}
        """Pages that send their reader elsewhere."""
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.address = f"https://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append(request.path)
        request.close_connection = True
        if request.path == "/no-http":
            request.wfile.write(b"220 this is a mail server\r\n")
            return
        if request.path in self.moved:
            request.send_response(302)
            request.send_header("Location", self.moved[request.path])
            request.end_headers()
            return
        if request.path not in self.pages:
            request.send_error(404)
            return
        page = self.pages[request.path]
        request.send_response(200)
        if request.path.startswith("/chunks"):
            request.send_header("Transfer-Encoding", "chunked")
            request.end_headers()
            length = 1 << 40 if request.path == "/chunks-without-end" else len(page) + 10
            request.wfile.write(b"%x\r\n%s" % (length, page))
            with contextlib.suppress(OSError):  # until the reader hangs up
                while request.path == "/chunks-without-end":
                    request.wfile.write(bytes(4096))
            return
        request.send_header("Content-Length", str(len(page) + (10 if request.path in self.cut else 0)))
        request.end_headers()
        request.wfile.write(page)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class HangingUp:
    """A host that takes every connection and ends it at once, and counts them."""

    def __init__(self) -> None:
        self.calls = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.calls += 1
                connection.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch, tmp_path):
    """No setting, credential or proxy of whoever runs the tests."""
    for name in os.environ:
        if name.startswith(("COOP_", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A certificate for 127.0.0.1 that only these tests trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    path = tmp_path_factory.mktemp("tls") / "loopback.pem"
    path.write_bytes(
        key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + signed.public_bytes(encoding)
    )
    return path


@pytest.fixture
def server(certificate, monkeypatch) -> Iterator[SecureServer]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server = SecureServer(certificate)
    yield server
    server.close()


@pytest.fixture
def hanging_up() -> Iterator[HangingUp]:
    host = HangingUp()
    yield host
    host.close()


@pytest.fixture
def bucket(s3_endpoint) -> Any:
    """A bucket `images` with the right file, and nothing else."""
    s3 = boto3.resource(
        "s3", endpoint_url=s3_endpoint, aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
    )
    bucket = s3.create_bucket(Bucket="images")
    bucket.put_object(Key="deep/file.bin", Body=GOOD)
    return bucket


@pytest.fixture
def beside(tmp_path) -> Path:
    """The card's folder, with the right file and a wrong one."""
    folder = tmp_path / "catalog"
    folder.mkdir()
    (folder / "good.bin").write_bytes(GOOD)
    (folder / "wrong.bin").write_bytes(WRONG)
    return folder


@pytest.fixture
def fetch(tmp_path, beside):
    """Where a card's images are, brought with the folders of this test; keywords are settings."""

    def fetch(card: Card, **settings: Any) -> Path:
        values = {"cache_folder": tmp_path / "cache", **KEYS, **settings}
        settings = Settings(_env_file=None, **values)
        return fetch_files(card, beside, cache=tmp_path / "downloads", settings=settings) / card.path

    return fetch


def make_card(*sources: str, content: bytes = GOOD, name: str = "file.bin", **card: Any) -> Card:
    return Card(name="toys", files=[make_file(*sources, content=content, name=name)], **card)


def make_file(*sources: str, content: bytes = GOOD, name: str = "file.bin", **more: Any) -> CardFile:
    return CardFile(name=name, sha256=digest_bytes(content), sources=list(sources), **more)


def make_zip(files: Mapping[str, bytes], *, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def names_below(folder: Path) -> set[str]:
    """Everything below a folder, hidden things too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_card_without_files_is_read_where_it_lies(fetch, beside):
    assert fetch(Card(name="toys", path="images")) == beside / "images"


def test_a_file_beside_the_card_is_brought(fetch):
    assert (fetch(make_card("good.bin")) / "file.bin").read_bytes() == GOOD


def test_a_file_comes_over_https(fetch, server):
    server.pages["/good"] = GOOD

    assert (fetch(make_card(f"{server.address}/good")) / "file.bin").read_bytes() == GOOD


def test_a_file_comes_from_s3(fetch, bucket, s3_endpoint):
    folder = fetch(make_card("s3://images/deep/file.bin"), s3_endpoint_url=s3_endpoint)

    assert (folder / "file.bin").read_bytes() == GOOD


def test_a_card_may_name_a_folder_below_its_files(fetch):
    folder = fetch(make_card("good.bin", path="inner"))

    assert (folder.parent / "file.bin").read_bytes() == GOOD
    assert folder.name == "inner"


def test_wrong_bytes_are_refused_and_the_next_source_is_asked(fetch, server):
    server.pages["/good"] = GOOD

    assert (fetch(make_card("wrong.bin", f"{server.address}/good")) / "file.bin").read_bytes() == GOOD


def test_sources_are_asked_in_their_order_until_one_is_right(fetch, server):
    server.pages = {"/wrong": WRONG, "/good": GOOD, "/spare": GOOD}

    fetch(make_card(*(f"{server.address}/{page}" for page in ("missing", "wrong", "good", "spare"))))

    assert server.asked == ["/missing", "/wrong", "/good"]


def test_wrong_bytes_everywhere_are_a_sentence_with_both_checksums(fetch):
    found, expected = (hashlib.sha256(content).hexdigest()[:12] for content in (WRONG, GOOD))

    with pytest.raises(ServiceError, match=rf"wrong\.bin: has checksum {found}\.\.\., not {expected}\.\.\."):
        fetch(make_card("wrong.bin"))


def test_the_error_names_each_source_in_order_with_its_reason(fetch, server, bucket, s3_endpoint):
    sources = [f"{server.address}/missing", "s3://images/none", "none.bin", "wrong.bin"]
    missing = r"bucket images has no none \(404 NoSuchKey\).*"
    reasons = "answers 404 Not Found", missing, r".*/catalog/none\.bin is not a file", "has checksum .*"
    said = "; ".join(f"{source}: {reason}" for source, reason in zip(sources, reasons, strict=True))

    with pytest.raises(ServiceError, match=rf"^file\.bin could not be fetched from any of 4 sources \({said}\): "):
        fetch(make_card(*sources), s3_endpoint_url=s3_endpoint)


def test_a_file_put_where_the_error_says_is_taken(fetch, tmp_path):
    place = tmp_path / "downloads/toys/fetched/file.bin"
    with pytest.raises(ServiceError, match=f"put the file at {place}$"):
        fetch(make_card("none.bin"))
    place.write_bytes(GOOD)

    assert fetch(make_card("none.bin")) / "file.bin" == place


def test_an_unreachable_host_is_asked_only_once(fetch, hanging_up):
    gone = [f"https://{hanging_up.host}/{number}" for number in range(4)]
    files = [make_file(*gone[:2], "good.bin", name="a"), make_file(*gone[2:], "good.bin", name="b")]

    folder = fetch(Card(name="toys", files=files))

    assert names_below(folder) == {"a", "b"}
    assert hanging_up.calls == 1


def test_an_unreachable_s3_endpoint_is_asked_twice_for_all_files_together(fetch, hanging_up):
    files = [make_file("s3://images/file.bin", "good.bin", name=name) for name in "ab"]

    fetch(Card(name="toys", files=files), s3_endpoint_url=f"http://{hanging_up.host}")

    assert hanging_up.calls == 2


def test_the_error_says_of_an_unreachable_host_that_it_does_not_answer(fetch, hanging_up):
    first, second = (f"https://{hanging_up.host}/{number}" for number in "12")

    with pytest.raises(ServiceError, match=rf"; {second}: {hanging_up.host} does not answer\)"):
        fetch(make_card(first, second))


def test_an_unreachable_host_does_not_speak_for_another(fetch, server, hanging_up):
    server.pages["/good"] = GOOD

    folder = fetch(make_card(f"https://{hanging_up.host}/good", f"{server.address}/good"))

    assert (folder / "file.bin").read_bytes() == GOOD


def test_an_address_without_a_host_does_not_stop_the_files_beside_the_card(fetch):
    assert (fetch(make_card("https:///good", "good.bin")) / "file.bin").read_bytes() == GOOD


def test_a_host_that_lacks_one_file_is_asked_for_the_next(fetch, server):
    server.pages["/good"] = GOOD
    files = [make_file(f"{server.address}/none", "good.bin", name="a"), make_file(f"{server.address}/good", name="b")]

    fetch(Card(name="toys", files=files))

    assert server.asked == ["/none", "/good"]


def test_a_redirection_within_https_is_followed(fetch, server):
    server.pages["/good"] = GOOD
    server.moved["/old"] = f"{server.address}/good"

    assert (fetch(make_card(f"{server.address}/old")) / "file.bin").read_bytes() == GOOD


@pytest.mark.parametrize("scheme", ["http", "ftp"])
def test_a_redirection_out_of_https_is_refused_without_asking_there(fetch, server, hanging_up, scheme):
    server.moved["/old"] = f"{scheme}://{hanging_up.host}/good"

    with pytest.raises(ServiceError, match=rf"/old: is redirected to {scheme}://{hanging_up.host}/good, which is not"):
        fetch(make_card(f"{server.address}/old"))
    assert hanging_up.calls == 0


def test_an_http_source_is_no_path_beside_the_card(fetch):
    with pytest.raises(ServiceError, match=r"http://127\.0\.0\.1:1/a: is neither https:// nor s3://"):
        fetch(make_card("http://127.0.0.1:1/a"))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_an_impossible_path_is_a_sentence(fetch, name):
    with pytest.raises(ServiceError, match="is not a file"):
        fetch(make_card(name))


@pytest.mark.parametrize(
    "source",
    ["SERVER/good", "SERVER/chunks-without-end", "s3://images/deep/file.bin", "good.bin", "debian:words/share/words"],
)
def test_a_source_with_more_bytes_than_the_card_allows_is_refused(
    fetch, server, bucket, s3_endpoint, debian, tmp_path, source
):
    debian(apt_get=f'{PACKED} "$3.deb"')
    server.pages = {"/good": GOOD, "/chunks-without-end": GOOD}
    file = make_file(source.replace("SERVER", server.address), max_bytes=len(GOOD) - 1)

    with pytest.raises(ServiceError, match=f"has more than {len(GOOD) - 1} bytes: it is not the file it should be"):
        fetch(Card(name="toys", files=[file]), s3_endpoint_url=s3_endpoint)
    assert names_below(tmp_path / "downloads/toys/fetched") == set()


@pytest.mark.parametrize("source", ["SERVER/good", "s3://images/deep/file.bin", "good.bin", "debian:words/share/words"])
def test_a_source_with_just_the_bytes_that_the_card_allows_is_taken(fetch, server, bucket, s3_endpoint, debian, source):
    debian(apt_get=f'{PACKED} "$3.deb"')
    server.pages["/good"] = GOOD
    file = make_file(source.replace("SERVER", server.address), max_bytes=len(GOOD))

    assert names_below(fetch(Card(name="toys", files=[file]), s3_endpoint_url=s3_endpoint)) == {"file.bin"}


@pytest.mark.parametrize("unpack", [False, True])
def test_a_disk_without_room_is_an_error_that_names_the_folder(fetch, server, tmp_path, unpack):
    """A bound on the size of files stands for the full disk: neither says of itself where it was."""
    content = make_zip({"a.png": bytes(100_000)}, method=zipfile.ZIP_DEFLATED if unpack else zipfile.ZIP_STORED)
    server.pages["/file"] = content
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=str(tmp_path / "downloads/toys")):
            fetch(Card(name="toys", files=[make_file(f"{server.address}/file", content=content, unpack=unpack)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_certificate_that_is_not_trusted_is_a_sentence(fetch, server, monkeypatch):
    server.pages["/good"] = GOOD
    monkeypatch.delenv("SSL_CERT_FILE")

    with pytest.raises(ServiceError, match="CERTIFICATE_VERIFY_FAILED"):
        fetch(make_card(f"{server.address}/good"))


@pytest.mark.parametrize("page", ["short", "chunks", "no-http"])
def test_a_transfer_that_breaks_off_is_a_sentence(fetch, server, page):
    server.pages = {"/short": GOOD[:5], "/chunks": GOOD[:5]}
    server.cut.add("/short")

    with pytest.raises(ServiceError, match=rf"file\.bin could not be fetched from any .+/{page}: "):
        fetch(make_card(f"{server.address}/{page}"))


@pytest.mark.parametrize("address", ["https://127.0.0.1:1/a b", "https://127.0.0.1:x/a", "https://127.0.0.1:1/ä"])
def test_an_address_that_cannot_be_asked_is_a_sentence(fetch, address):
    with pytest.raises(ServiceError, match=r"file\.bin could not be fetched from any of 1 sources"):
        fetch(make_card(address))


@pytest.mark.parametrize("endpoint", ["localhost:9000", ""])
def test_an_s3_endpoint_without_a_scheme_is_a_sentence(fetch, endpoint):
    with pytest.raises(ServiceError, match=r"file\.bin could not be fetched .+endpoint"):
        fetch(make_card("s3://images/file.bin"), s3_endpoint_url=endpoint)


def test_missing_s3_keys_are_a_sentence(fetch, s3_endpoint):
    with pytest.raises(ServiceError, match=r"s3://images/file\.bin: Unable to locate credentials"):
        fetch(
            make_card("s3://images/file.bin"),
            s3_endpoint_url=s3_endpoint,
            s3_access_key_id=None,
            s3_secret_access_key=None,
        )


def test_the_error_never_shows_the_s3_secret(fetch, s3_endpoint):
    with pytest.raises(ServiceError, match="could not be fetched") as caught:
        fetch(make_card("s3://nowhere/none"), s3_endpoint_url=s3_endpoint, s3_secret_access_key="xyzzy-plugh")

    assert "xyzzy" not in str(caught.value)


@pytest.mark.parametrize("source", ["none.bin", "wrong.bin", "SERVER/none", "SERVER/short", "s3://images/none"])
def test_nothing_partial_stays(fetch, server, bucket, s3_endpoint, tmp_path, source):
    server.pages["/short"] = GOOD[:5]
    server.cut.add("/short")
    with pytest.raises(ServiceError, match="could not be fetched"):
        fetch(make_card(source.replace("SERVER", server.address)), s3_endpoint_url=s3_endpoint)

    assert names_below(tmp_path / "downloads") == {"toys", "toys/fetched", "toys/lock"}


def test_nothing_but_the_file_stays(fetch, tmp_path):
    fetch(make_card("wrong.bin", "good.bin"))

    assert names_below(tmp_path / "downloads/toys/fetched") == {"file.bin"}


def test_a_fetched_file_is_not_fetched_again(fetch, server):
    server.pages["/good"] = GOOD
    card = make_card(f"{server.address}/good")
    fetch(card)
    fetch(card)

    assert server.asked == ["/good"]


def test_a_fetched_file_that_was_damaged_is_fetched_again(fetch):
    kept = fetch(make_card("good.bin")) / "file.bin"
    kept.write_bytes(WRONG)
    fetch(make_card("good.bin"))

    assert kept.read_bytes() == GOOD


def test_a_damaged_file_stays_where_it_is_when_no_source_has_a_better_one(fetch):
    kept = fetch(make_card("good.bin")) / "file.bin"
    kept.write_bytes(WRONG)
    with pytest.raises(ServiceError, match=r"none\.bin is not a file"):
        fetch(make_card("none.bin"))

    assert kept.read_bytes() == WRONG


def archived(beside: Path, content: bytes, *, name: str = "images.zip", **card: Any) -> Card:
    """A card with one archive, which lies beside it."""
    (beside / name).write_bytes(content)
    return Card(name="toys", files=[make_file(name, content=content, name=name, unpack=True)], **card)


def test_archives_are_unpacked_each_into_a_folder_of_its_name(fetch, beside):
    folder = fetch(archived(beside, make_zip({"river/a.png": b"river"})))

    assert (folder / "images/river/a.png").read_bytes() == b"river"


def test_the_path_of_a_card_starts_where_its_archives_are_unpacked(fetch, beside):
    folder = fetch(archived(beside, make_zip({"river/a.png": b"river"}), path="images"))

    assert (folder / "river/a.png").read_bytes() == b"river"


def test_an_unpacked_folder_that_is_gone_is_unpacked_again_without_fetching(fetch, beside):
    card = archived(beside, make_zip({"a.png": b"a"}))
    image = fetch(card) / "images/a.png"
    image.unlink()
    image.parent.rmdir()
    (beside / "images.zip").unlink()
    fetch(card)

    assert image.read_bytes() == b"a"


def test_another_version_of_an_archive_takes_the_place_of_the_unpacked_one(fetch, beside):
    fetch(archived(beside, make_zip({"old.png": b"old"})))

    folder = fetch(archived(beside, make_zip({"new.png": b"new"})))

    assert names_below(folder) == {"images", "images/new.png"}


def test_another_version_of_an_archive_put_there_by_hand_is_unpacked_too(fetch, beside):
    """As the error asks for when no source answers; a kill between fetching and unpacking looks the same."""
    kept = fetch(archived(beside, make_zip({"old.png": b"old"}))).parent / "fetched/images.zip"
    new = make_zip({"new.png": b"new"})
    kept.write_bytes(new)

    folder = fetch(archived(beside, new))

    assert names_below(folder) == {"images", "images/new.png"}


def test_an_unpacked_folder_with_every_file_is_not_unpacked_again(fetch, beside):
    card = archived(beside, make_zip({"a.png": b"a", "b.png": b"b"}))
    image = fetch(card) / "images/a.png"
    image.write_bytes(b"?")
    fetch(card)

    assert image.read_bytes() == b"?"


@pytest.mark.parametrize("loss", ["a file", "its bytes", "the count"])
def test_an_unpacked_folder_that_lost_something_is_unpacked_again(fetch, beside, loss):
    card = archived(beside, make_zip({"a.png": b"a", "b.png": b"b"}))
    folder = fetch(card) / "images"
    if loss == "its bytes":
        (folder / "a.png").write_bytes(b"")
    else:
        (folder / "a.png").unlink()
    if loss == "the count":  # as the note was before it had one
        (folder.parents[1] / "fetched/images.zip.unpacked").write_text(card.files[0].sha256)
    fetch(card)

    assert (folder / "a.png").read_bytes() == b"a"


def test_an_empty_archive_that_was_unpacked_and_is_gone_is_unpacked_again(fetch, beside):
    card = archived(beside, make_zip({}))
    (fetch(card) / "images").rmdir()

    assert (fetch(card) / "images").is_dir()


def test_what_killed_processes_left_is_removed(fetch, beside, tmp_path):
    card, folder = archived(beside, make_zip({"a.png": b"a"})), tmp_path / "downloads/toys"
    for left in ("fetched/.partial-1", "unpacked/.images.partial-1/new", "unpacked/.images.partial"):
        (folder / left).mkdir(parents=True)
    fetch(card)

    assert names_below(folder / "unpacked") == {"images", "images/a.png"}
    assert names_below(folder / "fetched") == {"images.zip", "images.zip.unpacked"}


def test_an_archive_that_cannot_be_unpacked_does_not_look_unpacked(fetch, beside):
    with pytest.raises(DatasetError, match="which is no name of a file"):
        fetch(archived(beside, make_zip({"a.png": b"a", ".": b"x"})))

    folder = fetch(archived(beside, make_zip({"b.png": b"b"})))

    assert names_below(folder) == {"images", "images/b.png"}


def test_who_comes_second_waits_and_says_so(fetch, beside, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    card, folder = archived(beside, make_zip({"a.png": b"a"})), tmp_path / "downloads/toys"
    with ThreadPoolExecutor(1) as pool:
        with locks.in_turn(folder / "lock", meanwhile=""):
            second = pool.submit(fetch, card)
            wait_for(lambda: "another process is fetching the files of toys: waiting for it" in caplog.messages)
            assert names_below(folder) == {"lock"}
        assert names_below(second.result(timeout=20)) == {"images", "images/a.png"}


def test_many_at_once_all_see_every_file_and_fetch_once(fetch, server):
    content = make_zip({f"class/{number}.png": b"x" for number in range(100)})
    server.pages["/images"] = content
    card = Card(name="toys", files=[make_file(f"{server.address}/images", content=content, name="a.zip", unpack=True)])
    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(lambda _: len(names_below(fetch(card) / "a/class")), range(8)))

    assert seen == [100] * 8
    assert server.asked == ["/images"]


def wait_for(happened: Any, *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("images.zip", "images.tar.gz"), "unpacked folder images"),
        (("images.zip", "images.zip"), "file images.zip"),
        (("images", "images.unpacked"), "file images.unpacked"),
    ],
)
def test_a_card_whose_files_would_overwrite_each_other_is_refused(tmp_path, names, what):
    files = "".join(f"\n  - {{name: {name}, sha256: {'a' * 64}, sources: [x], unpack: true}}" for name in names)
    (tmp_path / "card.yaml").write_text(f"name: toys\nfiles:{files}\n")

    with pytest.raises(DatasetError, match=rf"card\.yaml: .*two of them would become the {what}.*: rename one"):
        read_source(tmp_path / "card.yaml")


@pytest.mark.parametrize("names", [("a.zip", "b.zip"), ("images.zip", "images-2.zip"), ("train.tar.gz", "test.tar.gz")])
def test_archives_of_different_names_keep_apart(fetch, beside, names):
    files = []
    for name in names:
        (beside / name).write_bytes(content := make_zip({f"{name}.png": b"x"}))
        files.append(make_file(name, content=content, name=name, unpack=True))

    assert len([name for name in names_below(fetch(Card(name="toys", files=files))) if "/" in name]) == 2


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """Scripts in the place of the machine's package tools; nothing is downloaded."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def write(apt_get: str, dpkg_deb: str = "") -> Path:
        calls = tmp_path / "calls.txt"
        unpack = dpkg_deb or 'mkdir "$3/share" && cp "$2" "$3/share/words"'
        for name, script in {"apt-get": apt_get, "dpkg-deb": unpack}.items():
            path = folder / name
            path.write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n{script}\n')
            path.chmod(0o755)
        return calls

    return write


PACKED = f"printf '%s' \"{GOOD.decode()}\" > "
"""Shell words that write the right file."""


def test_a_file_comes_out_of_a_debian_package(fetch, debian):
    debian(apt_get=f'{PACKED} "$3.deb"')

    assert (fetch(make_card("debian:wamerican/share/words")) / "file.bin").read_bytes() == GOOD


def test_a_debian_package_is_unpacked_below_a_relative_cache_folder_too(fetch, debian, tmp_path, monkeypatch):
    debian(apt_get=f'{PACKED} "$3.deb"')
    monkeypatch.chdir(tmp_path)

    folder = fetch(make_card("debian:wamerican/share/words"), cache_folder=Path("here"))

    assert (folder / "file.bin").read_bytes() == GOOD
    assert (tmp_path / "here/debian/wamerican/share/words").is_file()


def test_a_debian_package_is_downloaded_once_for_all_its_files(fetch, debian):
    calls = debian(apt_get=f'{PACKED} "$3.deb"')

    fetch(Card(name="toys", files=[make_file("debian:wamerican/share/words", name=name) for name in "ab"]))

    assert calls.read_text().count("apt-get download -- wamerican") == 1


def test_a_machine_without_package_lists_gets_its_own_for_the_download(fetch, debian):
    calls = debian(
        apt_get='case "$1 $*" in download*) exit 100;; *update) exit 0;; esac\n'
        f'for package; do :; done\n{PACKED} "$package.deb"'
    )

    fetch(make_card("debian:wamerican/share/words"))

    assert [line.split()[-1] for line in calls.read_text().splitlines()][:3] == ["wamerican", "update", "wamerican"]


@pytest.mark.parametrize("package", ["-oX", "--help", "Words", "w", "", "words=1", "words*", "../words", ".."])
def test_a_package_name_that_debian_does_not_allow_never_reaches_its_tools(fetch, debian, package):
    calls = debian(apt_get=f'{PACKED} "$3.deb"')

    with pytest.raises(ServiceError, match="is no name of a Debian package"):
        fetch(make_card(f"debian:{package}/share/words"))
    assert not calls.exists()


def test_two_cards_at_once_fetch_a_debian_package_once(fetch, debian):
    calls = debian(apt_get=f'sleep 0.2; {PACKED} "$3.deb"')
    cards = [Card(name=name, files=[make_file("debian:wamerican/share/words")]) for name in ("one", "two")]
    with ThreadPoolExecutor(2) as pool:
        found = [(folder / "file.bin").read_bytes() for folder in pool.map(fetch, cards)]

    assert found == [GOOD, GOOD]
    assert calls.read_text().count("apt-get download -- wamerican") == 1


def test_a_package_that_apt_get_does_not_know_is_a_sentence_with_its_last_words(fetch, debian):
    debian(apt_get='echo "E: Unable to locate package" >&2; exit 100')

    with pytest.raises(ServiceError, match="debian:none/x: apt-get failed: E: Unable to locate package"):
        fetch(make_card("debian:none/x"))


def test_a_package_without_the_file_is_a_sentence(fetch, debian):
    debian(apt_get=f'{PACKED} "$3.deb"')

    with pytest.raises(ServiceError, match="debian:wamerican/share/none: package wamerican has no file share/none"):
        fetch(make_card("debian:wamerican/share/none"))


def test_nothing_partial_stays_of_a_package_that_cannot_be_unpacked(fetch, debian, tmp_path):
    debian(apt_get=f'{PACKED} "$3.deb"', dpkg_deb="exit 2")
    with pytest.raises(ServiceError, match="dpkg-deb failed"):
        fetch(make_card("debian:wamerican/share/words"))

    assert list((tmp_path / "cache/debian").glob("*")) == []


def test_a_folder_called_as_a_word_of_the_command_does_not_change_it(fetch, debian, tmp_path, monkeypatch):
    debian(apt_get=f'{PACKED} "$3.deb"')
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wamerican").mkdir()

    assert (fetch(make_card("debian:wamerican/share/words")) / "file.bin").read_bytes() == GOOD


def test_a_machine_without_apt_get_says_so(fetch, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))

    with pytest.raises(ServiceError, match=r"debian:wamerican/x: this is no Debian system \(no apt-get\)"):
        fetch(make_card("debian:wamerican/x"))
