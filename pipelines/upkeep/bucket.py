"""A place in S3, s3://BUCKET/PREFIX -> its objects as streams; and streams into it.

Address and keys come from AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, as MLflow's server has
them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import urlsplit

from coop_core.errors import ServiceError
from pipelines.sources.bucket import connect
from pipelines.sources.refusals import Named, in_a_sentence

_NAMED = Named("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


def is_bucket(place: str) -> bool:
    return place.startswith("s3://")


def each(place: str, take: Callable[[str, IO[bytes], int], object]) -> None:
    """Hand on every object: its name below the place, a stream of it, and its size in bytes."""
    with _client(place) as (client, bucket, prefix):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for found in page.get("Contents", ()):
                body = client.get_object(Bucket=bucket, Key=found["Key"])
                take(found["Key"].removeprefix(prefix), body["Body"], body["ContentLength"])


def is_empty(place: str) -> bool:
    with _client(place) as (client, bucket, prefix):
        return not client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1).get("KeyCount")


def put(place: str, name: str, stream: IO[bytes]) -> None:
    """Write one object, in parts where it is large."""
    with _client(place) as (client, bucket, prefix):
        client.upload_fileobj(stream, bucket, prefix + name)


@contextmanager
def _client(place: str) -> Iterator[tuple[Any, str, str]]:
    """A client, the bucket, and the prefix with a slash; faults are sentences."""
    parts = urlsplit(place)
    prefix = parts.path.strip("/")
    try:
        client = connect(named=_NAMED, patient=True)
        with in_a_sentence(client, parts.netloc, named=_NAMED):
            yield client, parts.netloc, f"{prefix}/" if prefix else ""
    except ServiceError as error:
        raise ServiceError(f"{place}: {error}") from error
