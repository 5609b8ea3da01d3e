"""params.yaml: read as DVC reads it, checked as a whole, every fault told at once in words."""

import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from coop_core.errors import ParamsError
from coop_core.methods import load_method, method_names
from coop_core.params import Params, load_params, parse_params
from coop_core.prompts.engine import Engine

VALID = """
seed: 1
dataset:
  source: catalog/fashion-mnist.yaml
  test_fraction: 0.3
  accept: [duplicate-across-subsets]
split:
  shots: 16
  curve_shots: [1, 2, 4, 8]
  classes: all
  test_per_class: null
backbone:
  architecture: mini
  pretrained: null
features:
  views: 8
  batch_size: 64
method:
  name: coop
  n_context: 4
  class_specific: true
  class_token_position: middle
train:
  epochs: 50
  learning_rate: 2e-3
  weight_decay: 5e-4
  warmup_learning_rate: 1e-5
engine:
  max_memory: 1.5 GB
baselines:
  ensemble_templates: ["itap of a {}.", "art of the {}."]
evaluate:
  calibration_bins: 10
gate:
  max_class_drop: 0.1
"""


def tree() -> dict[str, Any]:
    return YAML(typ="safe").load(VALID)


def changed(**changes: Any) -> dict[str, Any]:
    """The valid tree with some values of sections replaced: changed(split={"shots": 0})."""
    found = tree()
    for section, values in changes.items():
        found[section] = {**found[section], **values} if isinstance(values, dict) else values
    return found


def parse(**changes: Any) -> Params:
    return parse_params(changed(**changes), where="params.yaml")


def sweeping(section: dict[str, Any]) -> Params:
    return parse_params({**changed(), "sweep": section}, where="params.yaml")


def write(folder: Path, text: str) -> Path:
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    return folder / "params.yaml"


# What is read


def test_a_valid_file_gives_its_values_and_the_defaults_of_the_rest(tmp_path: Path) -> None:
    params = load_params(write(tmp_path, VALID))
    assert (params.seed, params.split.shots, params.split.curve_shots) == (1, 16, [1, 2, 4, 8])
    assert (params.dataset.test_fraction, params.split.test_per_class) == (0.3, None)
    assert (params.train.batch_size, params.train.momentum, params.train.warmup_epochs) == (32, 0.9, 1)
    assert params.engine.engine() == Engine("auto", "float32", max_memory=1_500_000_000)


@pytest.mark.parametrize(("written", "number"), [(None, None), ("500 MB", 500_000_000), ("4GB", 4_000_000_000)])
def test_a_bound_on_memory_has_its_unit(written: str | None, number: int | None) -> None:
    assert parse(engine={"max_memory": written}).engine.engine().max_memory == number


def test_numbers_with_an_exponent_and_no_point_are_numbers(tmp_path: Path) -> None:
    train = load_params(write(tmp_path, VALID)).train
    assert (train.learning_rate, train.weight_decay, train.warmup_learning_rate) == (2e-3, 5e-4, 1e-5)


@pytest.mark.parametrize("word", ["no", "off", "yes", "on"])
def test_words_that_older_yaml_took_for_truth_values_are_words(tmp_path: Path, word: str) -> None:
    text = VALID.replace("pretrained: null", f"pretrained: {word}")
    assert load_params(write(tmp_path, text)).backbone.pretrained == word


def test_the_method_section_is_read_by_the_class_of_the_method_it_names(tmp_path: Path) -> None:
    method = load_params(write(tmp_path, VALID)).method
    assert isinstance(method, load_method("coop").Params)
    assert (method.n_context, method.class_specific, method.initial_words) == (4, True, None)


@pytest.mark.parametrize("name", method_names())
def test_every_method_can_be_named_with_its_defaults(name: str) -> None:
    found = changed()
    found["method"] = {"name": name}
    found["split"] |= {"unlabelled": "all"} if name == "upl" else {}
    assert parse_params(found, where="params.yaml").method == load_method(name).Params(name=name)


def test_a_method_is_dumped_with_its_own_fields() -> None:
    assert parse().model_dump()["method"]["n_context"] == 4


def test_what_was_dumped_can_be_parsed_again() -> None:
    assert parse_params(parse().model_dump(), where="card.json") == parse()


def test_a_parsed_tree_can_be_parsed_again_with_its_method_object() -> None:
    params = parse()
    assert Params(**{name: getattr(params, name) for name in Params.model_fields}) == params


def test_seed_0_is_a_seed() -> None:
    assert parse(seed=0).seed == 0


def test_params_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse().train.epochs = 3


def test_the_environment_does_not_change_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEED", "COOP_SEED", "SPLIT__SHOTS", "COOP_SPLIT__SHOTS"):
        monkeypatch.setenv(name, "7")
    params = load_params(write(tmp_path, VALID))
    assert (params.seed, params.split.shots) == (1, 16)


# Faults


def test_every_fault_comes_at_once() -> None:
    found = changed(
        seed=-1,
        dataset={"source": "", "accept": ["everything"]},
        split={"shots": 0, "shot": 3},
        features={"views": 0},
        train={"learning_rate": -1},
        engine={"path": "fast", "precision": "float8", "max_memory": "4"},
        evaluate={"calibration_bins": 1},
    )
    del found["backbone"]
    with pytest.raises(ParamsError, match=r"^params\.yaml: ") as caught:
        parse_params(found, where="params.yaml")
    faults = str(caught.value).removeprefix("params.yaml: ").split("; ")
    assert sorted(fault.split(":")[0].split(" is ")[0] for fault in faults) == [
        "backbone", "dataset.accept.0", "dataset.source", "engine.max_memory", "engine.path", "engine.precision",
        "evaluate.calibration_bins", "features.views", "seed", "split.shot", "split.shots", "train.learning_rate",
    ]  # fmt: skip


def test_a_fault_says_which_value_it_found() -> None:
    with pytest.raises(ParamsError, match=r"^params\.yaml: split\.shots: input should be .*equal to 1 \(it is 0\)$"):
        parse(split={"shots": 0, "curve_shots": []})


def test_an_unknown_key_is_a_fault_with_its_place() -> None:
    with pytest.raises(ParamsError, match=r"train\.learnig_rate is not a known key \(check its spelling and its sect"):
        parse(train={"learnig_rate": 0.1})


def test_an_unknown_section_is_a_fault() -> None:
    with pytest.raises(ParamsError, match="trian is not a known key"):
        parse_params({**tree(), "trian": {}}, where="params.yaml")


def test_a_missing_key_is_a_fault_with_its_place() -> None:
    found = tree()
    del found["train"]["epochs"]
    with pytest.raises(ParamsError, match=r"^params\.yaml: train\.epochs is missing$"):
        parse_params(found, where="params.yaml")


@pytest.mark.parametrize("name", ["cocop", None, 3])
def test_an_unknown_method_lists_the_methods(name: object) -> None:
    with pytest.raises(ParamsError, match=rf"method: name is {name!r}, but the methods are: .*coop"):
        parse(method={"name": name})


@pytest.mark.parametrize("method", ["coop", None, ["coop"], {}], ids=repr)
def test_a_method_section_without_a_name_lists_the_methods(method: object) -> None:
    with pytest.raises(ParamsError, match=r"method: name is None, but the methods are: .*coop"):
        parse_params({**tree(), "method": method}, where="params.yaml")


def test_a_fault_of_the_method_section_is_told_like_any_other() -> None:
    with pytest.raises(ParamsError, match=r"^params\.yaml: method\.n_context: input should be .+ \(it is 0\)$"):
        parse(method={"n_context": 0})


def test_an_unknown_key_of_the_method_section_is_told_like_any_other() -> None:
    with pytest.raises(ParamsError, match=r"^params\.yaml: method\.n_ctx is not a known key"):
        parse(method={"n_ctx": 4})


def test_all_faults_of_the_method_section_come_with_those_of_the_others() -> None:
    with pytest.raises(ParamsError, match=r"^[^\n]+$") as caught:
        parse(seed=-1, method={"n_context": 0, "n_ctx": 4})
    for key in ("seed", "method.n_context", "method.n_ctx"):
        assert key in str(caught.value)


# Impossible combinations


@pytest.mark.parametrize("curve", [[16], [1, 32]])
def test_the_curve_is_below_the_shots(curve: list[int]) -> None:
    with pytest.raises(ParamsError, match=r"split: curve_shots \[.+\] must all be below shots 16"):
        parse(split={"curve_shots": curve})


def test_the_curve_names_no_number_twice() -> None:
    with pytest.raises(ParamsError, match=r"split: curve_shots \[1, 2, 1\] names a number twice"):
        parse(split={"curve_shots": [1, 2, 1]})


@pytest.mark.parametrize("warmup", [50, 51])
def test_the_warm_up_ends_before_training_does(warmup: int) -> None:
    with pytest.raises(ParamsError, match=rf"train: warmup_epochs {warmup} must be below epochs 50"):
        parse(train={"warmup_epochs": warmup})


@pytest.mark.parametrize("template", ["a photo", "a {} of a {}"])
def test_each_template_of_the_ensemble_has_one_hole(template: str) -> None:
    with pytest.raises(ParamsError, match=r"baselines: each template needs exactly one \{\}, unlike \['a "):
        parse(baselines={"ensemble_templates": ["art of the {}.", template]})


def test_an_ensemble_template_with_another_kind_of_hole_is_refused() -> None:
    with pytest.raises(ParamsError, match="template"):
        parse(baselines={"ensemble_templates": ["a {colour} {}."]})


def test_context_vectors_need_a_number_or_words() -> None:
    with pytest.raises(ParamsError, match="n_context can be null only with initial_words"):
        parse(method={"n_context": None})


def test_initial_words_can_give_the_number_of_context_vectors() -> None:
    assert parse(method={"n_context": None, "initial_words": "a photo of a"}).method.initial_words == "a photo of a"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("dataset", "test_fraction", 0),
        ("dataset", "test_fraction", 1),
        ("split", "shots", 1.5),
        ("split", "classes", "old"),
        ("split", "test_per_class", 0),
        ("features", "views", 257),
        ("train", "epochs", 0),
        ("train", "learning_rate", float("nan")),
        ("train", "learning_rate", float("inf")),
        ("train", "momentum", 1),
        ("evaluate", "calibration_bins", 101),
    ],
)
def test_a_value_out_of_its_range_is_a_fault(section: str, key: str, value: object) -> None:
    with pytest.raises(ParamsError, match=rf"params\.yaml: {section}\.{key}: "):
        parse(**{section: {key: value}})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("features", "batch_size", 10**24),
        ("train", "batch_size", 10**24),
        ("train", "learning_rate", float("nan")),
        ("train", "momentum", float("inf")),
        ("engine", "max_memory", "9" * 400 + " GB"),
        ("split", "test_per_class", 10**30),
    ],
)
def test_a_number_beyond_all_bounds_is_a_fault(section: str, key: str, value: object) -> None:
    with pytest.raises(ParamsError, match=rf"params\.yaml: {section}\.{key}: .{{1,400}}$"):
        parse(**{section: {key: value}})


@pytest.mark.parametrize("values", [{"low": float("nan"), "high": 1.0}, {"low": 0.1, "high": float("inf")}])
def test_a_range_without_end_is_a_fault(values: dict[str, float]) -> None:
    with pytest.raises(ParamsError, match=r"sweep\.space\.train\.learning_rate.*finite number"):
        sweeping({"name": "a", "search": "random", "seeds": [1], "space": {"train.learning_rate": values}})


@pytest.mark.parametrize("value", [datetime.date(2001, 1, 1), float("nan"), {1: 2}])
def test_a_sweep_over_what_is_no_parameter_is_a_fault(value: object) -> None:
    with pytest.raises(ParamsError, match=r"space\.train\.epochs holds something else than numbers, words"):
        sweeping({"name": "a", "seeds": [1], "space": {"train.epochs": [value]}})


@pytest.mark.parametrize("text", ["seed: 2001-99-99", "seed: !!int abc", "seed: !!bool maybe", f"seed: {'9' * 5000}",
                                  f"seed: {'[' * 5000}{']' * 5000}", "seed: !!python/object:os.system x"],
                         ids=["date", "int", "bool", "digits", "depth", "object"])  # fmt: skip
def test_what_a_tag_cannot_hold_is_a_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(ParamsError, match=r"^[^\n]{1,600}$"):
        load_params(write(tmp_path, text))


def test_a_very_long_number_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"seed: .*\(it is a number of 20000 bits\)"):
        load_params(write(tmp_path, VALID.replace("seed: 1", f"seed: 0x{'f' * 5000}")))


@pytest.mark.parametrize("part", [{"architecture": "local-dir:models/a"}, {"architecture": "ViT-B-32",
                                  "pretrained": "models/a"}])  # fmt: skip
def test_local_weights_are_what_dvc_watches(part: dict[str, str]) -> None:
    assert parse(backbone=part).backbone.files == "models/a"
    with pytest.raises(ParamsError, match=r"files must be models/a as well, or a folder above it, so that other"):
        parse(backbone={**part, "files": "constraints.txt"})
    assert parse(backbone={**part, "files": "models"}).backbone.files == "models"


def test_published_weights_follow_the_pins() -> None:
    assert parse(backbone={"architecture": "ViT-B-32", "pretrained": "openai"}).backbone.files == "constraints.txt"
    assert (Path(__file__).parents[1] / "constraints.txt").is_file()


# The file


def test_a_missing_file_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"params\.yaml is missing: run in the project's folder, or restore it"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["seed: [", "seed: 1\nseed: 2", "\tseed: 1"], ids=["open", "twice", "tab"])
def test_a_file_that_is_no_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ParamsError, match=r"^[^\n]+params\.yaml is not readable YAML: [^\n]+$"):
        load_params(write(tmp_path, text))


def test_a_file_that_is_not_utf_8_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes("source: Flüsse".encode("latin-1"))
    with pytest.raises(ParamsError, match=r"params\.yaml is not readable YAML"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["", "[1, 2]", "seed"], ids=["empty", "list", "word"])
def test_a_file_that_is_no_mapping_is_a_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(ParamsError, match=r"params\.yaml: the file: input should be a valid dictionary"):
        load_params(write(tmp_path, text))


def test_faults_name_the_file_they_are_in(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"params\.yaml: seed: "):
        load_params(write(tmp_path, VALID.replace("seed: 1", "seed: one")))
