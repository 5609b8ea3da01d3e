"""Bucket: an S3 store -> an object in a file, in parallel parts that a kill does not lose; each fault is a sentence.

What arrived is kept beside the target until it is whole, and goes on where it stopped as long as the object is the
same by its ETag. Whether the bytes are right, the card's checksum says.
"""

import datetime
import hashlib
import os
import shutil
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from coop_core.errors import ServiceError
from coop_core.files import read_json, write_json
from pipelines.console import progress

PART_BYTES = 8 * 1024 * 1024
_AT_ONCE = 4
_ATTEMPTS = 3
"""Of a part that breaks off."""
_MEGA = 1_000_000
_KEYS = "COOP_S3_ACCESS_KEY_ID and COOP_S3_SECRET_ACCESS_KEY"


class UnreachableError(ServiceError):
    """The host did not answer at all, so that asking it for the next file is no use."""


def connect(endpoint: str | None, key: str | None, secret: str | None, *, region: str | None = None) -> Any:
    """A client that gives up within seconds. Keys that are not given are AWS's own way of finding them.

    Raises
    ------
    ServiceError
        When the endpoint is no address.
    """
    import boto3
    from botocore.config import Config

    config = Config(retries={"total_max_attempts": 2}, connect_timeout=5, read_timeout=20,
                    max_pool_connections=_AT_ONCE)  # fmt: skip
    try:
        return boto3.client("s3", endpoint_url=endpoint or None, aws_access_key_id=key, aws_secret_access_key=secret,
                            region_name=region, config=config)  # fmt: skip
    except ValueError as error:
        raise ServiceError(f"{error}: COOP_S3_ENDPOINT_URL is http://HOST:PORT or https://HOST") from error


def fetch(client: Any, source: str, target: Path, *, max_bytes: int) -> None:
    """Bring `s3://BUCKET/KEY` into a file.

    Raises
    ------
    ServiceError
        When the store refuses, lacks the object, changes it meanwhile, or breaks off too often.
    UnreachableError
        When nobody answers.
    """
    bucket, key = urlsplit(source).netloc, urlsplit(source).path.lstrip("/")
    found = ask(client, bucket, lambda: client.get_object(Bucket=bucket, Key=key), key=key)
    found["Body"].close()
    size, etag = int(found["ContentLength"]), str(found["ETag"])
    if size > max_bytes:
        raise ServiceError(f"has more than {max_bytes} bytes: it is not the file it should be, or raise max_bytes")
    kept = _kept(source, target)
    parts = [(start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]
    done = _begin(kept, {"etag": etag, "size": size, "part_bytes": PART_BYTES})
    left = [part for part in parts if part[0] not in done]
    arrived = size - sum(end - start for start, end in left)

    def bring(part: tuple[int, int]) -> int:
        for attempt in range(_ATTEMPTS):
            try:
                ask(client, bucket, lambda: _part(client, bucket, key, etag, part, kept / "object"), key=key)
                break
            except (_BrokenOffError, UnreachableError):
                if attempt + 1 == _ATTEMPTS:
                    raise
        with (kept / "done").open("a", encoding="utf-8") as file:
            file.write(f"{part[0]}\n")
        return part[1] - part[0]

    with progress(f"fetch {Path(key).name} (MB)", size // _MEGA) as show, ThreadPoolExecutor(_AT_ONCE) as pool:
        waiting = [pool.submit(bring, part) for part in left]
        try:
            for ended in as_completed(waiting):
                arrived += ended.result()
                show(arrived // _MEGA)
        finally:
            for one in waiting:
                one.cancel()
    os.replace(kept / "object", target)
    shutil.rmtree(kept)


class _BrokenOffError(ServiceError):
    pass


def _kept(source: str, target: Path) -> Path:
    """Where parts stand until the file is whole: beside the folder in which the target is made."""
    return target.parent.parent / f".arriving-{hashlib.sha256(source.encode()).hexdigest()[:16]}"


def _begin(kept: Path, identity: dict[str, Any]) -> set[int]:
    """Where the parts begin that an earlier attempt brought of this very object; of another one nothing is kept."""
    note = kept / "object.json"
    if note.is_file() and read_json(note) == identity and (kept / "object").is_file():
        done = (kept / "done").read_text(encoding="utf-8").split("\n")[:-1] if (kept / "done").is_file() else []
        return {int(start) for start in done if start.isdigit()}
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    with (kept / "object").open("wb") as file:
        file.truncate(identity["size"])
    write_json(note, identity)
    return set()


def _part(client: Any, bucket: str, key: str, etag: str, part: tuple[int, int], file: Path) -> None:
    start, end = part
    answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", IfMatch=etag)
    with file.open("r+b") as out:
        out.seek(start)
        while piece := _next_piece(answer["Body"]):
            out.write(piece)
        if out.tell() != end:
            raise _BrokenOffError(f"broke off with {end - out.tell()} bytes of a part to come")


def _next_piece(body: Any) -> bytes:
    """Apart from writing: what goes wrong here is the store's fault, not the disk's."""
    from botocore.exceptions import BotoCoreError

    try:
        return bytes(body.read(1 << 20))
    except (BotoCoreError, OSError) as error:
        raise _BrokenOffError(f"broke off ({type(error).__name__})") from error


def ask(client: Any, bucket: str, request: Callable[[], Any], *, key: str = "", keys: str = _KEYS) -> Any:
    """A request's answer; its fault is a sentence with the way out. `keys` says where the access keys are set."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    try:
        return request()
    except ClientError as error:
        raise ServiceError(_refusal(error, bucket, key, keys)) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise ServiceError(f"Unable to locate credentials: set {keys}") from error
    except (ConnectionError, HTTPClientError) as error:
        raise UnreachableError(_silence(error, str(client.meta.endpoint_url))) from error
    except (BotoCoreError, ValueError) as error:
        raise ServiceError(" ".join(str(error).split())) from error


def _refusal(error: Any, bucket: str, key: str, keys: str) -> str:
    """What a store means by its code."""
    code, meta = str(error.response.get("Error", {}).get("Code")), error.response.get("ResponseMetadata", {})
    status, headers = meta.get("HTTPStatusCode"), meta.get("HTTPHeaders", {})
    shown = code if str(status) == code else f"{status} {code}"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"):
        unknown = code == "InvalidAccessKeyId"
        which = "does not know the access key" if unknown else "refuses the access key or its secret"
        return f"{which} ({shown}): set {keys}"
    if code == "RequestTimeTooSkewed":
        return f"refuses this machine's clock ({shown}){_skew(headers)}: set it, best by NTP"
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket} ({shown}): correct its name, or COOP_S3_ENDPOINT_URL"
    if code in ("NoSuchKey", "404"):
        return f"bucket {bucket} has no {key} ({shown}): correct the name, or put the file there"
    if code in ("AccessDenied", "403"):
        return f"forbids this to the access key ({shown}): grant it s3:GetObject on bucket {bucket}, or set {keys}"
    if code in ("PreconditionFailed", "412"):
        return f"was changed while it was fetched ({shown}): run the same again"
    if region := headers.get("x-amz-bucket-region"):
        return f"bucket {bucket} is in region {region} ({shown}): set AWS_DEFAULT_REGION={region}"
    return f"answers {shown}: {' '.join(str(error).split())[:200]}"


def _skew(headers: dict[str, str]) -> str:
    if "date" not in headers:
        return ""
    apart = (datetime.datetime.now(datetime.UTC) - parsedate_to_datetime(headers["date"])).total_seconds()
    return f", which is {abs(apart) / 60:.0f} minutes {'ahead' if apart > 0 else 'behind'}"


def _silence(error: Exception, endpoint: str) -> str:
    """Who did not answer: the store, or a proxy before it. No proxy's login is shown."""
    from botocore.exceptions import ProxyConnectionError, SSLError

    parts = urlsplit(endpoint)
    if isinstance(error, ProxyConnectionError):
        proxy = urlsplit(urllib.request.getproxies().get(parts.scheme, ""))
        return (f"the proxy {proxy.hostname}:{proxy.port} does not answer: correct {parts.scheme.upper()}_PROXY, or "
                f"ask without it by NO_PROXY={parts.hostname}")  # fmt: skip
    if isinstance(error, SSLError):
        return f"{endpoint} has a certificate that is not trusted here: name yours in AWS_CA_BUNDLE"
    reason = " ".join(str(error).split())
    return f"{endpoint} does not answer ({reason[:200]}): check the network and COOP_S3_ENDPOINT_URL"
