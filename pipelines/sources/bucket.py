"""Bucket: an S3 store -> an object in a file, in parallel parts that a kill does not lose; each fault is a sentence.

What arrived is kept beside the target until it is whole, and goes on where it stopped as long as the object is the
same by its ETag. Whether the bytes are right, the card's checksum says.
"""

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from coop_core.errors import ServiceError
from coop_core.files import read_json, write_json
from pipelines.console import progress
from pipelines.sources.refusals import OF_SOURCES, Named, UnreachableError, in_a_sentence

PART_BYTES = 8 * 1024 * 1024
_AT_ONCE = 4
_ATTEMPTS = 3
"""Of a part that breaks off."""
_MEGA = 1_000_000


def connect(
    endpoint: str | None = None, key: str | None = None, secret: str | None = None, *, region: str | None = None,
    named: Named = OF_SOURCES, patient: bool = False,
) -> Any:  # fmt: skip
    """A client that gives up within seconds, or, where it is `patient`, as boto3 has it: with retries, and a connection
    for each thread of its own uploads. An endpoint and keys that are not given are found in AWS's own way.

    Raises
    ------
    ServiceError
        When the endpoint is no address.
    """
    import boto3
    from botocore.config import Config

    hasty = Config(retries={"total_max_attempts": 2}, connect_timeout=5, read_timeout=20,
                   max_pool_connections=_AT_ONCE)  # fmt: skip
    try:
        return boto3.client("s3", endpoint_url=endpoint or None, aws_access_key_id=key, aws_secret_access_key=secret,
                            region_name=region, config=None if patient else hasty)  # fmt: skip
    except ValueError as error:
        raise ServiceError(f"{error}: {named.endpoint} is http://HOST:PORT or https://HOST") from error


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
    with in_a_sentence(client, bucket, key=key):
        found = client.get_object(Bucket=bucket, Key=key)
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
                with in_a_sentence(client, bucket, key=key):
                    _part(client, bucket, key, etag, part, kept / "object")
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
