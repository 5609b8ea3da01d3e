"""Store: OpenStack Swift with its S3 interface, on loopback -> buckets that ask for signed requests."""

import configparser
import getpass
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from keeping import Keeper, answers, run

from pipelines.logins import write_private

KEY = "coop:s3"
"""The access key; Swift's are ACCOUNT:USER."""
KINDS = ("account", "container", "object")
_PIPELINE = ("catch_errors gatekeeper healthcheck listing_formats bulk s3api tempauth copy slo dlo versioned_writes "
             "symlink proxy-server")  # fmt: skip
_REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def start(keeper: Keeper, *, ports: Mapping[str, int], secrets: Mapping[str, str], buckets: Sequence[str],
          cwd: Path) -> None:  # fmt: skip
    """Install Swift into a virtual environment in the folder, configure and run it, and make the buckets."""
    folder = keeper.folder / "swift"
    programs = install(keeper.folder)
    _configure(folder, programs, ports, secrets)
    for kind in (*KINDS, "proxy"):
        command = [str(programs / "python"), str(programs / f"swift-{kind}-server"), str(folder / f"{kind}.conf")]
        keeper.start(f"swift-{kind}", command, os.environ, cwd=cwd)
    address = f"http://127.0.0.1:{ports['s3']}"
    keeper.wait("swift-proxy", lambda: answers(f"{address}/healthcheck"))
    _make_buckets(address, secrets["s3"], buckets)


def install(folder: Path) -> Path:
    """Swift in a virtual environment of its own -> its programs.

    Raises
    ------
    ServiceError
        When pip cannot bring it.
    """
    venv = folder / "swift/venv"
    programs = venv / "bin"
    if not (programs / "swift-proxy-server").exists():
        run([sys.executable, "-m", "venv", str(venv)])
        run([str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
             "-r", str(_REQUIREMENTS)])  # fmt: skip
    return programs


def _configure(folder: Path, programs: Path, ports: Mapping[str, int], secrets: Mapping[str, str]) -> None:
    (folder / "disks/d1").mkdir(parents=True, exist_ok=True)
    hashed = {"swift_hash_path_suffix": secrets["swift"], "swift_hash_path_prefix": secrets["swift"]}
    _write(folder / "swift.conf", {"swift-hash": hashed, "storage-policy:0": {"name": "default", "default": "yes"}})
    shared = {"swift_dir": str(folder), "bind_ip": "127.0.0.1", "workers": "0", "user": getpass.getuser()}
    for kind in KINDS:
        own = {"bind_port": str(ports[kind]), "devices": str(folder / "disks"), "mount_check": "false",
               "fallocate_reserve": "0", "recon_cache_path": str(folder)}  # fmt: skip
        _write(folder / f"{kind}.conf", {"DEFAULT": shared | own, "pipeline:main": {"pipeline": f"{kind}-server"},
                                         f"app:{kind}-server": {"use": f"egg:swift#{kind}"}})  # fmt: skip
        _make_ring(folder, programs, kind, ports[kind])
    filters = {f"filter:{name}": {"use": f"egg:swift#{name}"} for name in _PIPELINE.split() if name != "proxy-server"}
    filters["filter:tempauth"] |= {"user_coop_s3": f"{secrets['s3']} .admin"}
    filters["filter:s3api"] |= {"location": "us-east-1", "s3_acl": "false"}
    _write(folder / "proxy.conf", {
        "DEFAULT": shared | {"bind_port": str(ports["s3"])}, "pipeline:main": {"pipeline": _PIPELINE}, **filters,
        "app:proxy-server": {"use": "egg:swift#proxy", "account_autocreate": "true"},
    })  # fmt: skip


def _write(file: Path, sections: Mapping[str, Mapping[str, str]]) -> None:
    parser = configparser.RawConfigParser()
    parser.read_dict(sections)
    write_private(file, "")
    with file.open("w", encoding="utf-8") as out:
        parser.write(out)


def _make_ring(folder: Path, programs: Path, kind: str, port: int) -> None:
    """One disk, one copy: where the few parts of a store lie."""
    if (folder / f"{kind}.ring.gz").exists():
        return
    builder = [str(programs / "python"), str(programs / "swift-ring-builder"), str(folder / f"{kind}.builder")]
    for words in (["create", "4", "1", "0"], ["add", f"r1z1-127.0.0.1:{port}/d1", "1"], ["rebalance"]):
        run([*builder, *words])


def _make_buckets(address: str, secret: str, buckets: Sequence[str]) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", endpoint_url=address, aws_access_key_id=KEY, aws_secret_access_key=secret,
                          region_name="us-east-1", config=Config(proxies={}))  # fmt: skip
    there = {found["Name"] for found in client.list_buckets()["Buckets"]}
    for bucket in buckets:
        if bucket not in there:
            client.create_bucket(Bucket=bucket)
