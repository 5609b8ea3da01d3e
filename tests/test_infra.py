"""infra/: what compose, Kubernetes and the image's builder would take, asked of their own parsers and schemas."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import kubernetes_validate
import pytest
from ruamel.yaml import YAML
from running_services import free_port

from pipelines.flows.pools import POOLS
from pipelines.settings import Settings

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
CLUSTER = "1.32"
"""Older clusters than the newest schema, which lets fields pass that those do not know."""
SECRET = "a-secret-for-tests-1"


def filled(folder: Path, **instead: str | None) -> Path:
    """example.env as a team fills it; None takes a line out."""
    lines = []
    for line in (INFRA / "example.env").read_text().splitlines():
        name, assigned, value = line.partition("=")
        if not assigned or line.startswith("#"):
            continue
        value = value or ("/srv/coop" if name == "PROJECT_FOLDER" else SECRET)
        if (value := instead.get(name, value)) is not None:
            lines.append(f"{name}={value}")
    file = folder / ".env"
    file.write_text("\n".join(lines))
    return file


def compose(
    env: Path, *words: str, file: Path = INFRA / "compose.yaml", more: Sequence[Path] = ()
) -> subprocess.CompletedProcess[str]:
    """Docker's own compose, which comes as a package; the package's wrapper would always exit 0."""
    binary = Path(importlib.util.find_spec("compose").origin).parent / "docker-compose"
    files = [word for path in (file, *more) for word in ("-f", path)]
    command = [binary, "--env-file", env, *files, "--profile", "gpu", "--profile", "no-gpu", "config", *words]
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(command, capture_output=True, text=True, env=clean)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """compose.yaml as Docker's compose understands it."""
    read = compose(filled(tmp_path_factory.mktemp("compose")), "--format", "json")
    assert read.returncode == 0, read.stderr
    return json.loads(read.stdout)["services"]


def test_compose_names_every_variable_that_is_missing(tmp_path):
    text = (INFRA / "compose.yaml").read_text()
    required = set(re.findall(r"\$\{(\w+):\?", text))
    open_lines = {line.split("=")[0] for line in (INFRA / "example.env").read_text().splitlines() if line.endswith("=")}
    assert required - {"MODEL"} == open_lines
    for name in required:
        refused = compose(filled(tmp_path, **{name: None}), "-q")
        assert refused.returncode != 0
        assert f"required variable {name} is missing a value" in refused.stderr


def test_example_env_names_every_variable_that_may_be_left_out_with_what_it_is_then():
    found = re.findall(r"\$\{(\w+):-((?:\$\{\w+:-\w+\}|[^}$])*)\}", (INFRA / "compose.yaml").read_text())
    defaults = {name: re.sub(r"\$\{\w+:-(\w+)\}", r"\1", value) for name, value in found}
    lines = re.findall(r"^(?:# )?([A-Z0-9_]+)=(.+)$", (INFRA / "example.env").read_text(), re.M)
    assert dict(lines) == defaults | {"MODEL": "coop-fashion-mnist"}


def test_compose_refuses_a_key_that_does_not_exist(tmp_path):
    broken = tmp_path / "compose.yaml"
    broken.write_text((INFRA / "compose.yaml").read_text().replace("  read_only: true", "  readonly: true"))
    refused = compose(filled(tmp_path), "-q", file=broken)
    assert refused.returncode != 0
    assert "readonly" in refused.stderr


def test_no_container_can_become_root_or_change_its_image(services):
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        own = "build" in service  # our images say USER themselves
        assert own or service["user"].split(":")[0] not in ("", "0", "root"), name
    assert re.findall(r"^USER (.*)$", (INFRA / "Containerfile").read_text(), re.M) == ["1000:1000", "1000:1000"]


def test_ports_are_on_loopback(services):
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}


def test_images_are_pinned_and_ours_has_the_versions_number(services):
    images = {name: service["image"] for name, service in services.items()}
    assert all(re.search(r":[^:/]*\d+\.\d+", image) for image in images.values()), images
    assert {image for image in images.values() if image.startswith("coop:")} == {f"coop:{VERSION}"}
    assert services["s3"]["image"].split(":")[1] in (INFRA / "Containerfile").read_text()


def test_everything_that_works_or_answers_waits_for_the_bootstrap(services):
    for name in ("cpu-worker", "gpu-worker", "trial-worker", "serve"):
        assert services[name]["depends_on"]["bootstrap"]["condition"] == "service_completed_successfully", name
    for name in ("mlflow", "prefect"):
        assert services["bootstrap"]["depends_on"][name]["condition"] == "service_healthy"
        assert services[name]["depends_on"]["prepare"]["condition"] == "service_completed_successfully"
    for name in services.keys() - {"prepare", "bootstrap"}:
        assert services[name]["healthcheck"]["test"], name


def test_both_servers_and_their_clients_have_a_login(services):
    login = f"coop:{SECRET}"
    assert services["prefect"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"] == login
    for name in ("bootstrap", "cpu-worker", "gpu-worker", "trial-worker"):
        assert services[name]["environment"]["PREFECT_API_AUTH_STRING"] == login
        assert services[name]["environment"]["COOP_TRACKING_PASSWORD"] == SECRET
    assert "--app-name basic-auth" in " ".join(services["mlflow"]["command"])
    assert services["serve"]["environment"]["COOP_SERVE_TOKEN"] == SECRET


def test_workers_take_one_run_a_device_from_pools_that_bootstrap_makes(services):
    commands = {name: service["command"] for name, service in services.items() if "worker" in name}
    assert {command[command.index("--pool") + 1] for command in commands.values()} == set(POOLS)
    for name in ("gpu-worker", "trial-worker"):
        assert commands[name][commands[name].index("--limit") + 1] == "1"


def test_every_setting_that_infra_names_exists(services):
    known = {f"COOP_{field.upper()}" for field in Settings.model_fields} | {"COOP_PROJECT"}
    given = {name for service in services.values() for name in service.get("environment", {})}
    for file in KUBERNETES.iterdir():
        given |= set(re.findall(r"\bCOOP_[A-Z0-9_]+", file.read_text()))
    assert {name for name in given if name.startswith("COOP_")} <= known


def test_a_second_gpu_is_a_second_worker(tmp_path):
    read = compose(filled(tmp_path), "--format", "json", more=[INFRA / "example.override.yaml"])
    found = json.loads(read.stdout)["services"]
    devices = [found[name]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
               for name in ("gpu-worker", "gpu-worker-1")]  # fmt: skip
    assert devices == [["0"], ["1"]]


def lint(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*words], capture_output=True, text=True)


def tool(name: str) -> str:
    """A command beside this Python, or on the path."""
    found = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    assert found, f"{name} is in no folder of commands: install the extra `test`"
    return found


@pytest.mark.parametrize(("line", "instead", "rule"), [
    (None, None, None),
    ("USER 1000:1000\nCMD", "USER root\nCMD", "DL3002"),
    ("ARG BASE=docker.io/library/python:3.11-slim-bookworm", "FROM python:latest AS old", "DL3007"),
    ("# hadolint ignore=DL3008\n", "", "DL3008"),
])  # fmt: skip
def test_the_linter_of_images_finds_nothing_here_and_something_in_a_worse_one(tmp_path, line, instead, rule):
    text = (INFRA / "Containerfile").read_text()
    worse = tmp_path / "Containerfile"
    worse.write_text(text.replace(line, instead) if line else text)
    linted = lint(tool("hadolint"), "--failure-threshold", "warning", worse)
    assert (linted.returncode == 0) == (rule is None), linted.stdout
    assert rule is None or rule in linted.stdout


@pytest.mark.parametrize(("line", "worse"), [
    (None, None),
    ("  cap_drop: [ALL]", "  privileged: true"),
    ('["s3:/data"]', '["s3:/data", "/var/run/docker.sock:/var/run/docker.sock"]'),
])  # fmt: skip
def test_the_linter_of_compose_files_finds_nothing_here_and_something_in_a_worse_one(tmp_path, line, worse):
    text = (INFRA / "compose.yaml").read_text()
    (tmp_path / "compose.yaml").write_text(text.replace(line, worse) if line else text)
    filled(tmp_path)
    linted = lint(sys.executable, "-m", "compose_lint", tmp_path / "compose.yaml")
    assert (linted.returncode == 0) == (line is None), linted.stdout


def documents(file: Path) -> Iterator[dict[str, Any]]:
    yield from YAML(typ="safe").load_all(file.read_text())


MANIFESTS = [KUBERNETES / "serve.yaml", KUBERNETES / "volumes.yaml"]


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_manifests_follow_the_schemas_of_their_kinds(file):
    for document in documents(file):
        kubernetes_validate.validate(document, CLUSTER, strict=True)


def job(**values: Any) -> dict[str, Any]:
    """The job of one run of trials, filled in as Prefect fills in a pool's template."""
    template = json.loads((KUBERNETES / "gpu-job-template.json").read_text())
    given = {name: field.get("default") for name, field in template["variables"]["properties"].items()} | values

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: fill(value) for key, value in node.items()}
        if isinstance(node, list):
            return [fill(value) for value in node]
        if isinstance(node, str) and (whole := re.fullmatch(r"\{\{ (\w+) \}\}", node)):
            return given[whole[1]]
        return re.sub(r"\{\{ (\w+) \}\}", lambda found: str(given[found[1]]), node) if isinstance(node, str) else node

    return fill(template["job_configuration"]["job_manifest"])


def test_the_job_of_the_gpu_pool_is_one_gpu_with_time_to_stop_and_a_cache():
    manifest = job(name="trials", command=["prefect", "flow-run", "execute"])
    manifest["metadata"]["name"] = "trials-1"  # the cluster makes it of generateName
    kubernetes_validate.validate(manifest, CLUSTER, strict=True)
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == f"coop:{VERSION}"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["terminationGracePeriodSeconds"] > 20  # what `make up` gives a worker
    cache = next(variable["value"] for variable in container["env"] if variable["name"] == "COOP_CACHE_FOLDER")
    assert cache in {mount["mountPath"] for mount in container["volumeMounts"]}
    claims = {document["metadata"]["name"] for document in documents(KUBERNETES / "volumes.yaml")}
    assert {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v} <= claims


@pytest.mark.parametrize(("where", "key", "value"), [
    (("spec",), "replica", 2),
    (("spec", "template", "spec", "containers", 0, "readinessProbe"), "httpget", {}),
    (("spec", "template", "spec", "containers", 0), "ports", [{"name": "http", "containerPort": "http"}]),
])  # fmt: skip
def test_a_manifest_with_a_fault_is_refused(where, key, value):
    deployment = next(documents(KUBERNETES / "serve.yaml"))
    node: Any = deployment
    for step in where:
        node = node[step]
    node[key] = value
    with pytest.raises(kubernetes_validate.ValidationError, match=key):
        kubernetes_validate.validate(deployment, CLUSTER, strict=True)


def test_the_serving_pod_is_ready_when_a_version_answers_and_outlives_what_is_in_flight():
    deployment, service, scaler, _ = documents(KUBERNETES / "serve.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert pod["terminationGracePeriodSeconds"] > 10 + 30
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert container["resources"]["requests"]["cpu"]  # what the autoscaler's percentages are of


def test_values_turn_on_what_the_charts_leave_off():
    server, gpu, cpu, mlflow = (
        next(documents(KUBERNETES / f"{name}-values.yaml")) for name in ("prefect-server", "gpu-worker", "cpu-worker",
                                                                        "mlflow")
    )  # fmt: skip
    assert server["server"]["basicAuth"] == {"enabled": True, "existingSecret": "prefect-login"}
    assert server["global"]["prefect"]["image"]["prefectTag"] == VERSION
    for worker in (gpu["worker"], cpu["worker"]):
        assert worker["selfHostedServerApiConfig"]["basicAuth"] == {"enabled": True, "existingSecret": "prefect-login"}
        assert worker["livenessProbe"]["enabled"]
    assert gpu["worker"]["image"]["prefectTag"].startswith(f"{PINS['prefect']}-")
    assert cpu["worker"]["image"]["prefectTag"] == mlflow["image"]["tag"] == VERSION
    assert mlflow["server"]["value_options"]["app_name"] == "basic-auth"
    assert {gpu["worker"]["config"]["workPool"], cpu["worker"]["config"]["workPool"]} == set(POOLS)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, INFRA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("secret", ["", "short", "with:a-colon-and-more"])
def test_secrets_that_would_break_an_address_are_refused_before_anything_is_made(monkeypatch, capsys, secret):
    prepare = script("prepare")
    for name in prepare.SECRETS:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("MLFLOW_DATABASE_PASSWORD", secret)
    monkeypatch.setenv("PREFECT_PASSWORD", secret)
    with pytest.raises(SystemExit, match=r"^2$"):
        prepare.main()
    said = capsys.readouterr().err
    assert said.startswith("error: MLFLOW_DATABASE_PASSWORD, PREFECT_PASSWORD: a secret has 16 characters or more")
    assert said.count("\n") == 1


def test_every_secret_of_the_compose_file_is_looked_at(services):
    given = services["prepare"]["environment"]
    assert {name for name, value in given.items() if value == SECRET} == set(script("prepare").SECRETS)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, s3_endpoint: str) -> str:
    for name, value in {"AWS_ENDPOINT_URL_S3": s3_endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "key",
                        "AWS_DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return s3_endpoint


def test_buckets_are_made_once(s3, monkeypatch):
    """SeaweedFS refuses a bucket that is there; moto takes it, so the requests are counted."""
    client, made = boto3.client("s3"), []
    client.meta.events.register(
        "provide-client-params.s3.CreateBucket", lambda params, **_: made.append(params["Bucket"])
    )
    monkeypatch.setattr(boto3, "client", lambda service: client)
    for _ in range(2):
        script("prepare").make_buckets()
    assert sorted(made) == ["dvc", "mlflow"]
    assert {bucket["Name"] for bucket in client.list_buckets()["Buckets"]} == {"mlflow", "dvc"}


def test_an_s3_server_that_is_away_is_a_sentence(s3, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(SystemExit, match=r"^2$"):
        script("prepare").make_buckets()
    assert capsys.readouterr().err.startswith("error: S3 at http://127.0.0.1:")


def test_a_folder_that_is_no_checkout_is_refused_before_anything_is_deployed(tmp_path):
    ended = subprocess.run(["sh", INFRA / "deploy.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: PROJECT_FOLDER is no checkout: ")


def test_health_is_what_a_server_says(s3):
    for address, status in ((s3, 0), (f"{s3}/no-such-bucket", 1), (f"http://127.0.0.1:{free_port()}", 1)):
        ended = subprocess.run([sys.executable, INFRA / "healthy.py", address], capture_output=True, text=True)
        assert (ended.returncode, "Traceback" in ended.stderr) == (status, False), address


def test_another_port_is_a_name_that_the_servers_answer_under(tmp_path):
    env = filled(tmp_path)
    env.write_text(env.read_text() + "\nMLFLOW_PORT=15000\nPREFECT_PORT=14200\n")
    found = json.loads(compose(env, "--format", "json").stdout)["services"]
    mlflow, prefect = found["mlflow"]["environment"], found["prefect"]["environment"]
    assert mlflow["MLFLOW_HOSTS"] == "127.0.0.1:15000,localhost:15000"
    assert mlflow["MLFLOW_ORIGINS"] == "http://127.0.0.1:15000,http://localhost:15000"
    assert prefect["PREFECT_SERVER_UI_API_URL"] == "http://127.0.0.1:14200/api"
    assert prefect["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:14200"


def test_the_commands_of_the_readme_fill_in_what_is_open(tmp_path):
    """As a person pastes them, in a folder with a copy of infra/, up to the first that needs Docker."""
    shutil.copytree(INFRA, tmp_path / "project/infra", ignore=shutil.ignore_patterns(".env"))
    (tmp_path / "coop-services").mkdir()
    readme = (INFRA / "README.md").read_text()
    block = re.search(r"## Containers on one machine\n.*?\n\n((?:    [^\n]*\n)+)", readme, re.DOTALL)
    lines = [line[4:] for line in block[1].splitlines() if not line.startswith(("    docker", "    git clone"))]
    subprocess.run("\n".join(lines), shell=True, cwd=tmp_path / "project", check=True)
    env = tmp_path / "project/infra/.env"
    assert env.stat().st_mode & 0o077 == 0
    read = compose(env, "--format", "json")
    assert read.returncode == 0, read.stderr
    services = json.loads(read.stdout)["services"]
    assert services["cpu-worker"]["volumes"][0]["source"] == str(tmp_path / "coop-services")
    secrets = [services["prepare"]["environment"][name] for name in script("prepare").SECRETS]
    assert len(set(secrets)) == len(secrets)
    assert all(re.fullmatch(r"[0-9a-f]{48}", secret) for secret in secrets)
