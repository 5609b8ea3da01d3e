"""The shape of the house: which module may import which, and who owns each outside library."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lower lines know nothing of higher ones; modules on one line know nothing of each other.
LAYERS = {
    "coop_core": [
        "errors memory",
        "files",
        "images dataset archives",
        "catalog validation split evaluation gate pictures_style",
        "folders listings",
        "importers pictures findings",
        "backbone.base backbone.torchvision_operators",
        "backbone.tokenizers backbone.towers backbone.prefix_tree backbone.step_graph",
        "backbone.mini backbone.open_clip_models backbone.packed_block",
        "backbone.packed_tower",
        "backbone",
        "feature_store prompt classifier",
        "text_encoding features interpretation",
        "methods",
        "methods.coop",
        "params",
        "training baselines artifact sweep",
        "predictor report trials",
    ],
    "pipelines": [
        "environment paths revision summary locks",
        "settings processes supervision",
        "console",
        "storage tracking_server prompt_model services",
        "datasets tracking tracking_trials",
        "trainer",
        "trainers",
        "sweeping",
        "sweep_view predicting comparing promotion",
        "retraining",
        "flows.lifeline flows.client flows.bootstrap",
        "flows.trials flows.sweep flows.reconcile flows.promote",
        "flows.retrain",
        "flows",
        "sweep_command",
        "cli",
        "stages.download stages.split stages.features stages.baselines stages.train stages.evaluate stages.report",
        "stages.track",
        "stages",
        "stages.__main__",
    ],
}
# Importing inside a function is how a light module reaches a heavy one; these pairs are the only such upward steps.
LATE = {("backbone", "backbone.mini"), ("backbone", "backbone.open_clip_models"), ("methods", "methods.coop")}

OWNERS = {
    "open_clip": "coop_core.backbone",
    "timm": "coop_core.backbone",
    "transformers": "coop_core.backbone",
    "sklearn": "",
    "scipy": "coop_core.gate",
    "matplotlib": "coop_core.pictures",
    "jinja2": "coop_core.report",
    "mlflow": "pipelines.tracking pipelines.prompt_model",
    "pydantic_settings": "pipelines.settings",
    "boto3": "pipelines.storage",
    "typer": "pipelines.cli",
    "dvc": "",
    "prefect": "pipelines.flows",
    "optuna": "coop_core.sweep",
    "supervisor": "pipelines.supervision",
    "psutil": "pipelines.supervision",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in LAYERS for path in sorted((ROOT / package).rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Every dotted module or name that a file imports, at any depth; typing-only imports do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        child for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }  # fmt: skip
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def level(package: str, name: str) -> int:
    return next(i for i, line in enumerate(LAYERS[package]) if name in line.split())


@pytest.mark.parametrize("package", LAYERS)
def test_the_list_of_layers_names_every_module_once(package: str) -> None:
    listed = [name for line in LAYERS[package] for name in line.split()]
    found = [name.removeprefix(f"{package}.") for name in MODULES if name.startswith(f"{package}.")]
    assert sorted(listed) == sorted(found)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_layers_below_its_own(module: str) -> None:
    package, _, own = module.partition(".")
    for imported in imports(MODULES[module]) & set(MODULES):
        other_package, _, other = imported.partition(".")
        if not own or not other or imported == module:
            continue
        if package == other_package:
            below = level(package, other) < level(package, own)
            assert below or (own, other) in LATE, f"{module} imports {imported}"
        else:
            assert package == "pipelines", f"{module} imports {imported}: the core knows nothing of pipelines"


@pytest.mark.parametrize("library", OWNERS)
def test_an_outside_library_has_one_owner(library: str) -> None:
    users = {name for name, path in MODULES.items() if any(i.split(".")[0] == library for i in imports(path))}
    assert all(any(user.startswith(owner) for owner in OWNERS[library].split()) for user in users), users


def test_only_the_environment_module_touches_the_environment() -> None:
    users = {name for name, path in MODULES.items() if "os.environ" in path.read_text() or "getenv" in path.read_text()}
    assert users == {"pipelines.environment"}


def test_the_core_prints_nothing() -> None:
    for path in MODULES.values():
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), path


def test_no_file_is_loaded_that_can_run_code() -> None:
    for path in MODULES.values():
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "allow_pickle=True" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
