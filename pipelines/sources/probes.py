"""Probes of sources: settings and DVC's -> whether the remote can be written and the buckets of the card be read."""

import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from coop_core.data.catalog import read_source
from coop_core.errors import CoopError, ServiceError
from coop_core.params import load_params
from pipelines import paths
from pipelines.finding import Finding, unused, well, wrong
from pipelines.settings import Settings
from pipelines.sources import bucket
from pipelines.sources.refusals import Named, in_a_sentence

REMOTE, SOURCES = "DVC remote", "S3 sources"
_NAMED = Named("endpointurl by `dvc remote modify`",
               "access_key_id and secret_access_key by `dvc remote modify --local`")  # fmt: skip
_SECONDS = 10


def probe_remote() -> Iterator[Finding]:
    """Where `dvc push` goes: a small object or file is written there and removed."""
    try:
        options = _dvc_options()
        if not options:
            yield unused(REMOTE, "none is set: `dvc push` has no place to go")
            return
        url = options.get("url", "")
        if urlsplit(url).scheme == "s3":
            _write_object(url, options)
        elif "://" in url:
            yield unused(REMOTE, f"{url} is not looked at: `dvc status --cloud` does it")
            return
        else:
            _write_beside(Path(".dvc") / url)
        yield well(REMOTE, f"{url}: written and removed")
    except ServiceError as error:
        yield wrong(REMOTE, str(error))
    except OSError as error:
        yield wrong(REMOTE, f"{error.filename} cannot be written ({error.strerror}): correct its rights or "
                            "`dvc remote modify --local ... url`")  # fmt: skip


def _dvc_options() -> dict[str, str]:
    """Of the remote that `dvc push` uses, as DVC understands its files; they may hold a secret."""
    if not Path(".dvc").is_dir():
        return {}
    try:
        found = subprocess.run([sys.executable, "-m", "dvc", "config", "--list"], capture_output=True, text=True,
                               timeout=3 * _SECONDS)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ServiceError("dvc config does not answer: is the machine overloaded?") from None
    if found.returncode:
        raise ServiceError(f"dvc config says: {(found.stderr.strip().splitlines() or ['nothing'])[-1]}")
    lines = dict(line.split("=", 1) for line in found.stdout.splitlines() if "=" in line)
    start = f"remote.{lines.get('core.remote', '')}."
    return {name.removeprefix(start): value for name, value in lines.items() if name.startswith(start)}


def _write_object(url: str, options: dict[str, str]) -> None:
    place = urlsplit(url)
    client = bucket.connect(options.get("endpointurl"), options.get("access_key_id"), options.get("secret_access_key"),
                            region=options.get("region"), named=_NAMED)  # fmt: skip
    key = "/".join(filter(None, [place.path.strip("/"), f"coop-doctor-{uuid.uuid4().hex}"]))
    with in_a_sentence(client, place.netloc, named=_NAMED):
        client.put_object(Bucket=place.netloc, Key=key, Body=b"")
        client.delete_object(Bucket=place.netloc, Key=key)


def _write_beside(folder: Path) -> None:
    """In the nearest folder that is there, because DVC makes the rest."""
    while not folder.is_dir():
        folder = folder.parent
    with tempfile.NamedTemporaryFile(dir=folder, prefix="coop-doctor-"):
        pass


def probe_sources(settings: Settings) -> Iterator[Finding]:
    """The first object that the card of params.yaml names in each bucket, unread."""
    if not paths.PARAMS.exists():
        yield unused(SOURCES, f"there is no {paths.PARAMS} here")
        return
    try:
        source = Path(load_params(paths.PARAMS).dataset.source)
        card = read_source(source)[0] if source.suffix == ".yaml" and source.is_file() else None
    except (CoopError, OSError) as error:
        yield wrong(SOURCES, str(error))
        return
    wanted = {urlsplit(one).netloc: one for file in reversed(card.files if card else [])
              for one in file.sources if one.startswith("s3://")}  # fmt: skip
    if not wanted:
        yield unused(SOURCES, "the data set of params.yaml names none")
        return
    key, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    try:
        client = bucket.connect(settings.s3_endpoint_url, key.get_secret_value() if key else None,
                                secret.get_secret_value() if secret else None)  # fmt: skip
        for name, one in wanted.items():
            path = urlsplit(one).path.lstrip("/")
            with in_a_sentence(client, name, key=path):
                client.get_object(Bucket=name, Key=path)["Body"].close()
    except ServiceError as error:
        yield wrong(SOURCES, str(error))
        return
    yield well(SOURCES, f"{', '.join(sorted(wanted))}: readable")
