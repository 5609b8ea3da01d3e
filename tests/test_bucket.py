"""Bucket: objects come in parallel parts, go on after a kill, and each fault of a store is one sentence."""

import hashlib
import io
import random
import socket
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ProxyConnectionError
from botocore.stub import ANY, Stubber

from coop_core.errors import ServiceError
from pipelines.sources import bucket
from pipelines.sources.refusals import UnreachableError, in_a_sentence

PART = 1000
CONTENT = random.Random(0).randbytes(10 * PART + 17)
SOURCE = "s3://images/deep/file.bin"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch, tmp_path):
    """Small parts, and no proxy or credential of whoever runs the tests, or of a test before in this process."""
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    monkeypatch.setattr(bucket, "PART_BYTES", PART)
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION",
                 "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


class Counting:
    """A client that counts what is asked of it, and can lose its answers."""

    def __init__(self, client: Any) -> None:
        self._client, self.ranges = client, []
        self.broken: set[str] = set()
        """Ranges that break off whenever they are asked for."""

    @property
    def meta(self) -> Any:
        return self._client.meta

    def get_object(self, **words: Any) -> Any:
        wanted = words.get("Range", "")
        self.ranges.append(wanted)
        answer = self._client.get_object(**words)
        if wanted in self.broken:
            answer["Body"] = io.BytesIO(answer["Body"].read()[:5])
        return answer


@pytest.fixture
def store(s3_endpoint) -> Counting:
    client = bucket.connect(s3_endpoint, "key", "secret", region="us-east-1")
    client.create_bucket(Bucket="images")
    client.put_object(Bucket="images", Key="deep/file.bin", Body=CONTENT)
    return Counting(client)


@pytest.fixture
def target(tmp_path) -> Path:
    """Where storage has it made: in a folder of the attempt, below that of the card's files."""
    (tmp_path / "fetched/.partial-1").mkdir(parents=True)
    return tmp_path / "fetched/.partial-1/file"


def fetch(store: Counting, target: Path, **words: Any) -> None:
    bucket.fetch(store, SOURCE, target, **{"max_bytes": 1 << 20, **words})


def test_an_object_arrives_whole_in_parts_and_nothing_else_stays(store, target):
    fetch(store, target)

    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(CONTENT).digest()
    assert len(store.ranges) == 1 + 11
    assert [path.name for path in target.parent.parent.iterdir()] == [".partial-1"]


def test_an_empty_object_is_an_empty_file(store, target):
    store._client.put_object(Bucket="images", Key="deep/file.bin", Body=b"")
    fetch(store, target)

    assert target.read_bytes() == b""


def test_parts_that_arrived_are_not_asked_for_again(store, target):
    store.broken = {"bytes=5000-5999"}
    with pytest.raises(ServiceError, match="broke off with 995 bytes of a part to come"):
        fetch(store, target)
    arrived = (target.parent.parent / next(target.parent.parent.glob(".arriving-*")) / "done").read_text().split()
    store.broken, store.ranges = set(), []
    fetch(store, target)

    assert target.read_bytes() == CONTENT
    assert "5000" not in arrived
    assert len(store.ranges) == 1 + 11 - len(arrived)


def test_a_part_that_breaks_off_once_is_asked_for_again(store, target, monkeypatch):
    part, broken = bucket._part, ["once"]

    def breaks_once(*words: Any) -> None:
        if broken:
            broken.pop()
            raise bucket._BrokenOffError("broke off")
        part(*words)

    monkeypatch.setattr(bucket, "_part", breaks_once)
    fetch(store, target)

    assert target.read_bytes() == CONTENT


def test_of_an_object_that_was_replaced_no_earlier_part_is_kept(store, target):
    store.broken = {"bytes=5000-5999"}
    with pytest.raises(ServiceError, match="broke off"):
        fetch(store, target)
    store.broken = set()
    other = bytes(reversed(CONTENT))
    store._client.put_object(Bucket="images", Key="deep/file.bin", Body=other)
    fetch(store, target)

    assert target.read_bytes() == other


def test_an_object_that_changes_while_it_is_fetched_is_a_sentence(store, target, monkeypatch):
    begin = bucket._begin

    def changes(*words: Any) -> set[int]:
        store._client.put_object(Bucket="images", Key="deep/file.bin", Body=CONTENT + b"!")
        return begin(*words)

    monkeypatch.setattr(bucket, "_begin", changes)
    with pytest.raises(ServiceError, match=r"^was changed while it was fetched \(412 .*\): run the same"):
        fetch(store, target)


@pytest.mark.parametrize(
    ("source", "said"),
    [("s3://images/none", r"^bucket images has no none \(404 NoSuchKey\): correct the name, or put the file there$"),
     ("s3://nowhere-at-all/x", r"^there is no bucket nowhere-at-all \(404 NoSuchBucket\): correct its name, or")],
)  # fmt: skip
def test_what_is_not_there_is_named(store, target, source, said):
    with pytest.raises(ServiceError, match=said):
        bucket.fetch(store, source, target, max_bytes=1 << 20)
    assert not list(target.parent.parent.glob(".arriving-*"))


@pytest.mark.parametrize(
    ("code", "status", "headers", "said"),
    [("SignatureDoesNotMatch", 403, {}, r"^refuses the access key or its secret \(403 Signature.*\): set COOP_S3"),
     ("InvalidAccessKeyId", 403, {}, r"^does not know the access key \(403 InvalidAccessKeyId\): set COOP_S3_ACCESS"),
     ("AccessDenied", 403, {}, r"^forbids this to the access key .*: grant it s3:GetObject on bucket images, or set"),
     ("RequestTimeTooSkewed", 403, {"date": "Tue, 01 Jan 2019 00:00:00 GMT"},
      r"^refuses this machine's clock \(403 RequestTimeTooSkewed\), which is \d{6,} minutes ahead: set it, best by"),
     ("PermanentRedirect", 301, {"x-amz-bucket-region": "eu-west-1"},
      r"^bucket images is in region eu-west-1 \(301 PermanentRedirect\): set AWS_DEFAULT_REGION=eu-west-1$"),
     ("SlowDown", 503, {}, r"^answers 503 SlowDown: ")],
)  # fmt: skip
def test_each_refusal_of_a_store_is_a_sentence_with_the_way_out(code, status, headers, said):
    client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="hidden-word")
    stub = Stubber(client)
    stub.add_client_error("get_object", code, "no", status, expected_params={"Bucket": "images", "Key": ANY},
                          response_meta={"HTTPHeaders": headers})  # fmt: skip
    with stub, pytest.raises(ServiceError, match=said) as caught, in_a_sentence(client, "images", key="a"):
        client.get_object(Bucket="images", Key="a")
    assert "hidden-word" not in str(caught.value)


def test_a_store_without_a_network_is_unreachable_with_its_address(target):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    client = bucket.connect(address, "key", "secret", region="us-east-1")

    with pytest.raises(UnreachableError, match=rf"^{address} does not answer .*: check the network and COOP_S3"):
        bucket.fetch(client, SOURCE, target, max_bytes=1)


def test_a_proxy_that_does_not_answer_is_named_without_its_login(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:hidden-word@proxy.example:3128")
    client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="x")

    said = (r"^the proxy proxy\.example:3128 does not answer: correct HTTPS_PROXY, or ask without it by "
            r"NO_PROXY=s3\.(us-east-1\.)?amazonaws\.com$")  # fmt: skip
    with pytest.raises(UnreachableError, match=said), in_a_sentence(client, "images"):
        raise ProxyConnectionError(proxy_url="http://me:hidden-word@proxy.example:3128")


def test_keys_that_nobody_gave_are_asked_for_by_name(s3_endpoint, target):
    with pytest.raises(ServiceError, match=r"^Unable to locate credentials: set COOP_S3_ACCESS_KEY_ID and"):
        bucket.fetch(bucket.connect(s3_endpoint, None, None), SOURCE, target, max_bytes=1)
