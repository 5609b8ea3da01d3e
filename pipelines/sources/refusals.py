"""Refusals: what an S3 store, or the way to it, says no with -> one sentence with the way out."""

import datetime
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from coop_core.errors import ServiceError


class UnreachableError(ServiceError):
    """The host did not answer at all, so that asking it for the next file is no use."""


@dataclass(frozen=True)
class Named:
    """What a person sets to reach a store."""

    endpoint: str
    keys: str


OF_SOURCES = Named("COOP_S3_ENDPOINT_URL", "COOP_S3_ACCESS_KEY_ID and COOP_S3_SECRET_ACCESS_KEY")


@contextmanager
def in_a_sentence(client: Any, bucket: str, *, key: str = "", named: Named = OF_SOURCES) -> Iterator[None]:
    """Around requests of boto3's client.

    Raises
    ------
    ServiceError
        When the store refuses; the error begins with a verb or the bucket, for "NAME: " or a place to stand before it.
    UnreachableError
        When nobody answers.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    try:
        yield
    except ClientError as error:
        raise ServiceError(_refusal(error, bucket, key, named)) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise ServiceError(f"Unable to locate credentials: set {named.keys}") from error
    except (ConnectionError, HTTPClientError) as error:
        raise UnreachableError(_silence(error, str(client.meta.endpoint_url), named)) from error
    except (Boto3Error, BotoCoreError, ValueError) as error:
        raise ServiceError(" ".join(str(error).split())) from error


def _refusal(error: Any, bucket: str, key: str, named: Named) -> str:
    """What a store means by its code."""
    code, meta = str(error.response.get("Error", {}).get("Code")), error.response.get("ResponseMetadata", {})
    status, headers = meta.get("HTTPStatusCode"), meta.get("HTTPHeaders", {})
    shown = code if str(status) == code else f"{status} {code}"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"):
        unknown = code == "InvalidAccessKeyId"
        which = "does not know the access key" if unknown else "refuses the access key or its secret"
        return f"{which} ({shown}): set {named.keys}"
    if code == "RequestTimeTooSkewed":
        return f"refuses this machine's clock ({shown}){_skew(headers)}: set it, best by NTP"
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket} ({shown}): correct its name, or {named.endpoint}"
    if code in ("NoSuchKey", "404"):
        return f"bucket {bucket} has no {key} ({shown}): correct the name, or put the file there"
    if code in ("AccessDenied", "403"):
        wanted = f"s3:{error.operation_name} on bucket {bucket}"
        return f"forbids this to the access key ({shown}): grant it {wanted}, or set {named.keys}"
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


def _silence(error: Exception, endpoint: str, named: Named) -> str:
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
    return f"{endpoint} does not answer ({reason[:200]}): check the network and {named.endpoint}"
