"""The whole story as a stranger sees it: a fresh clone, README's commands, kills and full disks. Minutes long."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from ruamel.yaml import YAML

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"
BIN = Path(sys.executable).parent


def clone(target: Path) -> Path:
    """A clone of the committed project, with what is not committed yet on top of it."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(target)], check=True)
    listed = subprocess.run(
        ["git", "ls-files", "-mo", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, listed):
        if name != "dvc.lock" and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    return target


def run(
    words: list[str], folder: Path, *, timeout: float = 500, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command as a person types it, with the virtual environment's programs first on the path."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("COOP_", "MLFLOW_"))}
    settings |= {"PATH": f"{BIN}:{settings['PATH']}", "PYTHONPATH": str(folder)}
    settings |= {"DVC_SITE_CACHE_DIR": str(folder / ".site"), "COLUMNS": "200"} | environment
    return subprocess.run(
        words, cwd=folder, env=settings, capture_output=True, text=True, timeout=timeout, check=False
    )


def stage(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", f"pipelines.stages.{name}"], folder)


def change(folder: Path, **changes: object) -> None:
    """`train__epochs=3` sets train.epochs in the clone's params.yaml."""
    yaml = YAML()
    tree = yaml.load((folder / "params.yaml").read_text())
    for key, value in changes.items():
        *sections, name = key.split("__")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(tree, file)


def paint(folder: Path, *, each: int = 24) -> Path:
    """Three classes of little pictures that differ in colour."""
    rng = np.random.default_rng(0)
    for name, colour in {"tomato": (200, 40, 30), "grass": (40, 160, 50), "sky": (90, 140, 230)}.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (40, 48, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which the demo has run, with fewer epochs."""
    folder = clone(tmp_path_factory.mktemp("demo") / "coop")
    change(folder, train__epochs=12, split__test_per_class=20, split__curve_shots=[1])
    done = run(["dvc", "repro"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "first.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone on painted pictures that trains in seconds, with its features made."""
    folder = clone(tmp_path_factory.mktemp("prepared") / "coop")
    paint(folder.parent / "photos")
    change(folder, dataset__source="../photos", split__shots=4, split__curve_shots=[], split__test_per_class=None)
    change(folder, train__epochs=5)
    done = run(["dvc", "repro", "baselines"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def small(prepared: Path, tmp_path: Path) -> Path:
    """The prepared clone, to be changed at will."""
    shutil.copytree(prepared.parent, tmp_path / "story", symlinks=True)
    return tmp_path / "story/coop"


def test_a_fresh_clone_ends_with_a_table_and_a_registered_candidate(demo: Path) -> None:
    printed = (demo / "first.txt").read_text()
    for row in ("zero-shot", "prompt ensemble", "linear probe", "coop", "alias candidate", "report.html", "MLflow"):
        assert row in printed
    tracked = json.loads((demo / "artifacts/tracked.json").read_text())
    assert tracked["model_version"] == "1"


def test_the_learned_prompt_beats_zero_shot_on_the_sample(demo: Path) -> None:
    metrics = json.loads((demo / "artifacts/metrics.json").read_text())
    assert metrics["coop"]["gain_over_zero_shot"] > 0.25


def test_nothing_runs_when_nothing_changed(demo: Path) -> None:
    done = run(["dvc", "repro"], demo)
    assert done.returncode == 0
    assert "Running stage" not in done.stdout
    assert "up to date" in done.stdout


def test_another_learning_rate_runs_training_and_what_follows_but_no_features(demo: Path) -> None:
    change(demo, train__learning_rate=0.05)
    done = run(["dvc", "repro"], demo)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]
    assert ran == ["train", "evaluate", "report", "track"]


def test_predict_compare_and_card_answer_in_the_clone(demo: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "navy").save(tmp_path / "a.png")
    answer = run(["python", "-m", "pipelines.commands.cli", "predict", str(tmp_path), "--json", "--top", "2"], demo)
    assert len(json.loads(answer.stdout)["labels"]) == 2
    command = ["python", "-m", "pipelines.commands.cli", "predict", str(tmp_path)]
    registered = run([*command, "--model", "coop-fashion-mnist@candidate"], demo)
    assert registered.returncode == 0, registered.stderr
    assert "coop-fashion-mnist/1" in run(["python", "-m", "pipelines.commands.cli", "compare"], demo).stdout
    assert "weights_digest" in run(["python", "-m", "pipelines.commands.cli", "card"], demo).stdout


def test_a_run_killed_in_training_goes_on_and_ends_like_one_that_was_not(small: Path) -> None:
    change(small, train__epochs=150)
    through = stage("train", small)
    assert through.returncode == 0, through.stderr
    expected = (small / "artifacts/prompt/context.safetensors").read_bytes()
    shutil.rmtree(small / "artifacts/prompt")
    checkpoints = small / ".cache/checkpoints"
    environment = os.environ | {"PYTHONPATH": str(small)}
    words = [sys.executable, "-m", "pipelines.stages.train"]
    with subprocess.Popen(words, cwd=small, env=environment, stderr=subprocess.DEVNULL) as training:
        deadline = time.monotonic() + 120
        while not list(checkpoints.glob("*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.05)
        training.send_signal(signal.SIGKILL)
    assert list(checkpoints.glob("*.safetensors"))
    assert not (small / "artifacts/prompt/card.json").exists()
    again = stage("train", small)
    assert again.returncode == 0, again.stderr
    assert (small / "artifacts/prompt/context.safetensors").read_bytes() == expected
    assert not list(checkpoints.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train__epoch": 3}, "train.epoch is not a known key"),
        ({"split__curve_shots": [8]}, "must all be below shots 4"),
        ({"dataset__source": "../nowhere"}, "../nowhere"),
        ({"split__shots": 9}, "split.shots 9 needs 9 training and 4 validation images a class"),
        ({"backbone__architecture": "ViT-B-16", "backbone__pretrained": "openai"}, "ViT-B-16-quickgelu"),
    ],
)
def test_a_fault_is_one_sentence_and_leaves_what_was_finished(
    small: Path, changes: dict[str, object], sentence: str
) -> None:
    change(small, **changes)
    readers = {"train": "train", "split": "split", "dataset": "download", "backbone": "features"}
    failed = stage(readers[next(iter(changes)).split("__")[0]], small)
    assert failed.returncode == 2
    assert sentence in failed.stderr.replace("\n", " ")
    assert "Traceback" not in failed.stderr
    assert (small / "artifacts/features/train.npy").exists()


def test_a_tracking_server_that_is_down_costs_only_the_last_stage(small: Path) -> None:
    down = {"COOP_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    failed = run(["dvc", "repro"], small, **down)
    assert failed.returncode != 0
    assert "MLflow at http://127.0.0.1:9" in failed.stderr + failed.stdout
    assert "Traceback" not in failed.stderr
    mended = run(["dvc", "repro"], small)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    ran = [line for line in mended.stdout.splitlines() if line.startswith("Running stage")]
    assert ran == ["Running stage 'track':"]


def test_a_run_that_returns_takes_its_stages_from_the_run_cache_and_its_version_from_the_registry(small: Path) -> None:
    """Runs A, B and A again: nothing is trained or registered for the third, and the candidate is A's version."""
    ran, candidates = [], []
    database = f"sqlite:///{small}/mlflow.db"
    client = MlflowClient(database, registry_uri=database)  # other tests have set another for the process
    for rate in (0.01, 0.05, 0.01):
        change(small, train__learning_rate=rate)
        done = run(["dvc", "repro"], small)
        assert done.returncode == 0, done.stdout + done.stderr
        ran.append([line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")])
        tracked = json.loads((small / "artifacts/tracked.json").read_text())
        candidate = client.get_model_version_by_alias(tracked["model_name"], "candidate").version
        candidates.append((str(candidate), tracked["model_version"]))
    following = ["train", "evaluate", "report", "track"]
    assert ran == [following, following, ["track"]]
    assert candidates == [("1", "1"), ("2", "2"), ("1", "1")]
    assert len(client.search_model_versions(f"name='{tracked['model_name']}'")) == 2


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="needs a mount of its own")
def test_a_full_disk_is_a_sentence_and_keeps_what_was_finished(small: Path) -> None:
    cache = small / ".cache"
    shutil.rmtree(cache)
    cache.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(cache)], check=False)
    if mounted.returncode:
        pytest.skip("this machine allows no mounts")
    try:
        failed = stage("features", small)
    finally:
        subprocess.run(["umount", str(cache)], check=True)
    assert failed.returncode == 2, failed.stderr
    assert "No space left" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert stage("features", small).returncode == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real image sets are not beside this checkout")
def test_real_photographs_in_class_folders_need_one_parameter(tmp_path: Path) -> None:
    folder = clone(tmp_path / "coop")
    shutil.copytree(SHARED / "flowers", tmp_path / "flowers", ignore=shutil.ignore_patterns("*.csv", "*.md", "*.txt"))
    change(folder, dataset__source="../flowers", split__curve_shots=[], train__epochs=20)
    done = run(["dvc", "repro", "evaluate"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((folder / "artifacts/metrics.json").read_text())
    assert metrics["coop"]["gain_over_zero_shot"] > 0.3
