"""dvc.yaml against the code: stages, files and parameters are named alike on both sides."""

import ast
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML
from test_architecture import MODULES, imports, nodes

from coop_core.params import Params, load_params
from pipelines import paths

ROOT = Path(__file__).parents[1]
STAGES: dict[str, Any] = {
    name: stage.get("do", stage)
    for name, stage in YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"].items()
}
"""A stage that stands for several, one an entry of params.yaml, as one of them."""

PARSE_ONLY = {"coop_core.params"}
"""Reads parameters; what it imports from the library are their types."""
DECIDE_NOTHING = {
    "coop_core.errors", "pipelines.console", "pipelines.environment", "pipelines.paths", "pipelines.settings",
    "pipelines.logins", "pipelines.revision", "pipelines.locks", "pipelines.links",
} | {name for name, path in MODULES.items() if len(ast.parse(path.read_text()).body) == 1}  # fmt: skip
"""What is said, where things are, and a room's own sentence; no number and no file depends on it."""


def names(entries: list[Any]) -> list[str]:
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def outs(stage: dict[str, Any]) -> list[str]:
    return names(stage.get("outs", []) + stage.get("metrics", []))


def test_params_yaml_is_valid() -> None:
    load_params(ROOT / "params.yaml")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_its_own_module(stage: str) -> None:
    assert STAGES[stage]["cmd"].removesuffix(" ${key}") == f"python -m pipelines.stages {stage}"
    assert (ROOT / f"pipelines/stages/{stage}.py").is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_its_own_code_and_on_files_that_exist(stage: str) -> None:
    deps = STAGES[stage]["deps"]
    assert f"pipelines/stages/{stage}.py" in deps
    assert len(set(deps)) == len(deps)
    produced = {out for other in STAGES.values() for out in outs(other)}
    produced |= {str(Path(out).parent) for out in produced}
    produced |= {"data/source", "${dataset.source}", "${item.source}", "${backbone.files}"}
    assert [dep for dep in deps if dep not in produced and not (ROOT / dep).exists()] == []


def closure(module: str) -> set[str]:
    """Every module of ours that one imports, directly or not, itself included; what a library is told by name too."""
    found, todo = set(), {module}
    while todo:
        name = todo.pop()
        if name in found or name in DECIDE_NOTHING:
            continue
        found.add(name)
        if name in PARSE_ONLY:
            continue
        todo |= imports(MODULES[name]) & set(MODULES)
        todo |= {other for other in MODULES if name == "coop_core.methods" and other.startswith(f"{name}.")}
    return found


def files(modules: set[str]) -> set[str]:
    return {MODULES[name].relative_to(ROOT).as_posix() for name in modules}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_code_that_decides_what_it_writes(stage: str) -> None:
    """After a change of code, `dvc repro` runs what the change may concern, and no number is of older code."""
    wanted, deps = files(closure(f"pipelines.stages.{stage}")), STAGES[stage]["deps"]
    missing = {file for file in wanted if not any(Path(file).is_relative_to(dep) for dep in deps)}
    assert missing == set()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_no_code_that_it_does_not_import(stage: str) -> None:
    """Else a change of the report would train anew."""
    wanted = files(closure(f"pipelines.stages.{stage}"))
    code = [dep for dep in STAGES[stage]["deps"] if dep.startswith(("coop_core", "pipelines"))]
    idle = {dep for dep in code if not any(Path(file).is_relative_to(dep) for file in wanted)}
    assert idle <= {"coop_core/report/report.html.jinja", "pipelines/records/prompt_model.py"}


@pytest.mark.parametrize("stage", ["features", "label", "baselines", "train"])
def test_local_weights_are_watched_by_every_stage_that_loads_them(stage: str) -> None:
    assert "${backbone.files}" in STAGES[stage]["deps"]


def test_the_record_of_a_run_is_never_taken_from_the_run_cache() -> None:
    """Else the third of runs A, B, A would leave the alias candidate on B."""
    assert STAGES["track"]["outs"] == [{"artifacts/tracked.json": {"persist": True}}]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_names_only_places_that_it_depends_on_or_writes(stage: str) -> None:
    """What it reads and writes when it runs is for test_stages.py to see."""
    declared = {entry.removesuffix("/${key}") for entry in [*outs(STAGES[stage]), *STAGES[stage]["deps"]]}
    attributes = [node for node in nodes(MODULES[f"pipelines.stages.{stage}"]) if isinstance(node, ast.Attribute)]
    named = {node.attr for node in attributes if ast.unparse(node.value) == "paths"}
    for name in named - {"DOWNLOADS", "FEATURE_STORE", "CHECKPOINTS", "PARAMS"}:  # below the cache folder, and params
        place = getattr(paths, name)
        assert any(place.is_relative_to(entry) for entry in declared), f"{stage}: paths.{name} = {place}"


def test_every_out_lies_below_an_ignored_folder() -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    for stage in STAGES.values():
        assert all(f"/{out.split('/')[0]}/" in ignored for out in outs(stage))


def fields(model: type[BaseModel], prefix: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and inner.model_fields and name != "method":
            found |= fields(inner, f"{prefix}{name}.")
        else:
            found.add(f"{prefix}{name}")
    return found


def test_every_parameter_of_a_run_is_tracked_by_a_stage_that_computes_with_it() -> None:
    tracked = {key for name, stage in STAGES.items() if name != "track" for key in stage.get("params", [])}
    untracked = {key for key in fields(Params) if not any(key == t or key.startswith(f"{t}.") for t in tracked)}
    around = ("gate.", "watch.", "sweep")                                         # before and after runs
    assert untracked == {key for key in fields(Params) if key.startswith(around)}


def test_every_tracked_parameter_exists() -> None:
    known = fields(Params) | {key.split(".")[0] for key in fields(Params)} | {"method.name"}
    assert {key for stage in STAGES.values() for key in stage.get("params", [])} <= known | {"tests.${key}"}


def test_the_learning_rate_is_no_business_of_the_features() -> None:
    users = {name for name, stage in STAGES.items() if "train" in stage.get("params", [])}
    assert users == {"train", "track"}


def test_the_tracked_dvc_configuration_holds_no_secret_and_no_address() -> None:
    config = (ROOT / ".dvc/config").read_text().lower()
    assert not any(word in config for word in ("secret", "password", "access_key", "token", "://"))


def test_the_dataset_sources_are_imported_unfrozen() -> None:
    data = YAML(typ="safe").load((ROOT / "data.dvc").read_text())
    assert data["deps"][0]["path"] == "remote://source"
    assert not data.get("frozen")
