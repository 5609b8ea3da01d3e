"""The shape of the house: which module may import which, and who owns each outside library."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Rooms, lower lines first: a room knows nothing of higher ones, and rooms on one line know nothing of each other.
ROOMS = {
    "coop_core": [
        "errors memory showing",
        "files conversion",
        "data",
        "backbone",
        "features prompts",
        "judging",
        "methods report",
        "params card",
        "artifact",
        "answering training reference",
        "searching predictor transfer exchange",
        "preparing",
        "sweeps estimator",
        "reproduction",
    ],
    "pipelines": [
        "logins",
        "environment paths revision summary locks allocator finding",
        "settings processes",
        "console links",
        "sources records services",
        "sweeps champion serving upkeep",
        "flows stages",
        "commands",
    ],
}
# Inside a room, the same.
INSIDE = {
    "coop_core.data": [
        "images views dataset archives",
        "catalog split descriptions",
        "validation",
        "folders listings",
        "importers",
        "given",
    ],
    "coop_core.backbone": [
        "blocks torchvision_operators efficientnet folding projection frozen_linear",
        "base",
        "runtimes tokenizers towers",
        "mini open_clip_models",
    ],
    "coop_core.features": ["store decoding", "examples extract"],
    "coop_core.prompts": [
        "layout interpretation prefix_tree step_graph engine",
        "packed_block",
        "packed_tower",
        "packed_prompts padded_prompts prompted_images",
        "encoder",
    ],
    "coop_core.methods": [
        "learner fitting",
        "guided_coop",
        "class_mean linear_probe zero_shot coop cocoop biomedcoop upl dpl gda probe tip_adapter prolip",
    ],
    "coop_core.judging": [
        "classifier evaluation gate transfer limits seen", "baselines confidence label_file drift", "pseudo_labels",
    ],
    "coop_core.report": ["style", "pictures findings gallery drift", "beyond", "page"],
    "coop_core.params": ["sections", "sweep", "run", "file", "recipes defaults"],
    "coop_core.exchange": ["portable dassl", "exported imported"],
    "coop_core.sweeps": ["space", "sweep", "trials", "choosing"],
    "coop_core.reproduction": ["figures grid estimate", "comparison"],
    "pipelines.sources": ["refusals catalogue", "bucket", "storage probes", "datasets"],
    "pipelines.records": [
        "prompt_model served names local_versions", "server", "claims trials watches probes", "registry",
        "runs retention imported",
    ],
    "pipelines.services": ["supervision workspace", "planning", "local probes announcing"],
    "pipelines.sweeps": ["trainer outcome", "trainers", "sweeping", "view"],
    "pipelines.champion": ["proof", "promotion", "retraining"],
    "pipelines.upkeep": ["leavings archive bucket databases", "places", "backup restore"],
    "pipelines.serving": [
        "metrics problems batching answered", "versions guard", "recorder watching", "model", "entrance", "app",
        "server",
    ],
    "pipelines.flows": [
        "lifeline names", "client notices", "pools", "deploying",
        "bootstrap trials sweep reconcile promote watch", "retrain",
    ],
    "pipelines.stages": ["download split features label baselines train evaluate report", "judge track", "__main__"],
    "pipelines.commands": [
        "beginning sweep predict compare describe serve choice collecting moving importing watching cards examination",
        "reproduction exporting", "reproduce choose keeping exchange watch doctor", "cli",
    ],
}
OWNERS = {
    "open_clip": "coop_core.backbone",
    "timm": "coop_core.backbone",
    "transformers": "coop_core.backbone",
    "sklearn": "",
    "scipy": "coop_core.judging.gate coop_core.judging.drift",
    "matplotlib": "coop_core.report",
    "onnx": "",
    "onnxruntime": "coop_core.conversion",
    "openvino": "coop_core.conversion coop_core.backbone.runtimes",
    "jinja2": "coop_core.report",
    "mlflow": "pipelines.records pipelines.serving",
    "prometheus_client": "pipelines.serving",
    "starlette": "pipelines.serving",
    "uvicorn": "pipelines.serving",
    "pydantic_settings": "pipelines.settings",
    "boto3": "pipelines.sources pipelines.records.server",
    "typer": "pipelines.commands",
    "dvc": "",
    "prefect": "pipelines.flows",
    "optuna": "coop_core.sweeps.sweep",
    "supervisor": "pipelines.services.supervision",
    "psutil": "pipelines.services",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in ROOMS for path in sorted((ROOT / package).rglob("*.py"))}


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def calls(path: Path) -> list[ast.Call]:
    return [node for node in nodes(path) if isinstance(node, ast.Call)]


@functools.cache
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


def place(lines: list[str], name: str) -> int:
    return next((i for i, line in enumerate(lines) if name in line.split()), -1)


def parts(module: str) -> tuple[str, str, str]:
    """Package, room and module; a room's own `__init__` and a module that is a room have no third part."""
    package, _, rest = module.partition(".")
    room, _, own = rest.partition(".")
    return package, room, own


def test_the_lists_name_every_room_and_every_module_once() -> None:
    for package, lines in ROOMS.items():
        assert sorted(" ".join(lines).split()) == sorted({parts(m)[1] for m in MODULES if m.startswith(f"{package}.")})
    for room in {".".join(parts(module)[:2]) for module in MODULES if parts(module)[2]}:
        own = [module.removeprefix(f"{room}.") for module in MODULES if module.startswith(f"{room}.")]
        assert sorted(" ".join(INSIDE[room]).split()) == sorted(own), room


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_below(module: str) -> None:
    package, room, own = parts(module)
    for imported in imports(MODULES[module]) & set(MODULES):
        other_package, other_room, other = parts(imported)
        if not room or not other_room or imported == module:
            continue
        told = f"{module} imports {imported}"
        if package != other_package:
            assert package == "pipelines", f"{told}: the core knows nothing of pipelines"
        elif room != other_room:
            assert place(ROOMS[package], other_room) < place(ROOMS[package], room), told
        elif own and other:
            lines = INSIDE[f"{package}.{room}"]
            assert place(lines, other) < place(lines, own), told


@pytest.mark.parametrize("library", OWNERS)
def test_an_outside_library_has_one_owner(library: str) -> None:
    users = {name for name, path in MODULES.items() if any(i.split(".")[0] == library for i in imports(path))}
    assert all(any(user.startswith(owner) for owner in OWNERS[library].split()) for user in users), users


def test_only_the_environment_module_touches_the_environment() -> None:
    ways = {f"os.{name}" for name in ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")}
    users = {
        module for module, path in MODULES.items()
        if ways & imports(path) or any(isinstance(node, ast.Attribute) and ast.unparse(node) in ways
                                       for node in nodes(path))
    }  # fmt: skip
    assert users == {"pipelines.environment"}


def test_the_core_prints_nothing() -> None:
    for path in MODULES.values():
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls(path)), path


def test_no_file_is_loaded_that_can_run_code() -> None:
    """Every `load` of torch or NumPy is named as an attribute, so that its keywords can be seen."""
    unpicklers = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for path in MODULES.values():
        imported = imports(path)
        assert not {name.split(".")[0] for name in imported} & unpicklers, path
        assert not {"torch.load", "numpy.load", "pandas.read_pickle"} & imported, path
        for call in calls(path):
            name = ast.unparse(call.func)
            told = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert told.get("allow_pickle", "False") == "False", path
            assert name != "torch.load" or told.get("weights_only") == "True", path
            assert not name.endswith(".read_pickle"), path


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_stay_small_enough_to_read(module: str) -> None:
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= 300, module
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{module}.{node.name}"


def test_no_test_file_imports_prefect_before_it_is_told_which_server() -> None:
    """Prefect reads its settings once in a process, and all test files are imported before the first test runs."""
    early = [path.name for path in (ROOT / "tests").glob("*.py")
             for node in ast.parse(path.read_text()).body
             if isinstance(node, ast.Import | ast.ImportFrom)
             and any(name.partition(".")[0] == "prefect" for name in
                     [getattr(node, "module", None) or "", *(alias.name for alias in node.names)])]  # fmt: skip
    assert early == []
