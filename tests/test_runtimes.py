"""Runtimes: another library runs the image tower as torch does, or is refused; what it computed is kept apart."""

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_folding import Tower as Convolutions
from toy_images import paint
from toy_params import toy_params

from coop_core.artifact import Artifact, check_backbone, read_artifact
from coop_core.backbone import Backbone, load_backbone
from coop_core.backbone.base import Precision, freeze
from coop_core.backbone.runtimes import TOLERANCE, choose_runtime, compile_tower
from coop_core.data.split import SplitImage
from coop_core.errors import ArtifactError, BackboneError, ParamsError
from coop_core.features.extract import extract_features, feature_key
from coop_core.files import digest_file
from pipelines.records.served import log_model

REGISTERED = Path(__file__).parent / "registered_earlier"
SIDE = 16
CPU = torch.device("cpu")


def compiled(tower: torch.nn.Module, *, precision: Precision = "float32", device: torch.device = CPU) -> Callable:
    run = compile_tower(tower, "openvino", side=SIDE, precision=precision, device=device)
    assert run is not None
    return run


class Several(Convolutions):
    """Enough of them to count as a network of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 1) for _ in range(4)))


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)


@pytest.fixture(scope="module")
def by_openvino() -> Backbone:
    return load_backbone("mini", None, image_runtime="openvino")


def test_openvino_says_of_images_what_torch_says(mini, by_openvino, relative_error) -> None:
    for n in (1, 3):
        pixels = torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(n))
        found = by_openvino.encode_images(pixels)
        assert found.dtype == torch.float32
        assert relative_error(found, mini.encode_images(pixels)) < TOLERANCE["float32"]
    assert by_openvino.weights_digest == mini.weights_digest
    assert by_openvino.name == "mini (imagenet-minilm), images by openvino"


def test_what_it_gives_stays_when_the_next_batch_comes(by_openvino) -> None:
    first = by_openvino.encode_images(torch.zeros(1, 3, 224, 224))
    kept = first.clone()
    by_openvino.encode_images(torch.ones(1, 3, 224, 224))
    assert torch.equal(first, kept)


def test_bfloat16_is_computed_in_bfloat16_or_refused_on_this_processor(relative_error) -> None:
    tower, pixels = Convolutions(), torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    if _has_bfloat16():
        assert 1e-5 < relative_error(compiled(tower, precision="bfloat16")(pixels), tower(pixels)) < 0.1
    else:
        with pytest.raises(BackboneError, match="does not compute in bfloat16 on this processor, but in f32: set"):
            compiled(tower, precision="bfloat16")


def _has_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class Undecided(torch.nn.Module):
    """Says something else of dark pictures; a tracer sees one of the two ways."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1) * (2 if pixels.abs().sum() > 0 else 1)


def test_a_tower_that_would_say_something_else_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"other features than torch .*relative error 5e-01.*: set backbone"):
        compiled(Undecided())


class Unknown(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(pixels).real.flatten(1)


def test_a_tower_that_openvino_cannot_compute_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"openvino cannot compute this image tower \(.*image_runtime: torch"):
        compiled(Unknown())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "float16"}, "openvino does not compute in float16 here: set backbone.image_precision"),
        ({"device": torch.device("cuda")}, "computes on the CPU, but the device is cuda: set backbone.image_runtime"),
    ],
)
def test_other_devices_and_precisions_are_refused(options, sentence) -> None:
    with pytest.raises(BackboneError, match=sentence):
        compiled(Convolutions(), **options)


@pytest.mark.usefixtures("without_openvino")
def test_a_missing_package_is_one_sentence() -> None:
    with pytest.raises(BackboneError, match=r"needs the package openvino: pip install -c constraints.txt openvino"):
        compiled(Convolutions())


def test_nothing_reports_the_use_to_openvinos_maker(monkeypatch) -> None:
    telemetry = pytest.importorskip("openvino_telemetry.main")
    monkeypatch.setattr(telemetry.Telemetry, "__init__", lambda *given, **named: pytest.fail("it reports its use"))
    compiled(Convolutions())


def test_auto_takes_openvino_for_convolutions_in_bfloat16(backbone, monkeypatch) -> None:
    tower = freeze(Several())
    assert choose_runtime("auto", tower, precision="bfloat16", device=CPU) == "openvino"
    assert choose_runtime("auto", tower, precision="float32", device=CPU) == "torch"
    assert choose_runtime("auto", tower, precision="bfloat16", device=torch.device("cuda")) == "torch"
    assert choose_runtime("auto", backbone.image_tower, precision="bfloat16", device=CPU) == "torch"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert choose_runtime("auto", tower, precision="bfloat16", device=CPU) == "torch"


def test_features_of_both_runtimes_are_kept_apart(mini, by_openvino, tmp_path) -> None:
    path = paint(tmp_path / "one.png", 1)
    image = SplitImage(path.name, 0, digest_file(path))
    for one in (mini, by_openvino):
        extract_features(one, [image], root=tmp_path, target=tmp_path / "rows.npy", store_folder=tmp_path / "store")
    assert {folder.name for folder in (tmp_path / "store").iterdir()} == {feature_key(mini), feature_key(by_openvino)}
    assert feature_key(mini) != feature_key(by_openvino)


def learned_by_openvino(**changes: Any) -> Artifact:
    artifact = read_artifact(REGISTERED)
    artifact.card["backbone"] |= {"image_runtime": "openvino", "batch_norm_folded": True, **changes}
    return artifact


def test_a_prompt_is_loaded_with_the_runtime_of_its_card(by_openvino) -> None:
    artifact = learned_by_openvino()
    assert artifact.load_backbone().image_runtime == "openvino"
    assert artifact.feature_key == feature_key(by_openvino)


@pytest.mark.usefixtures("without_openvino")
def test_in_float32_torch_answers_where_openvino_is_missing(mini) -> None:
    artifact = learned_by_openvino()
    assert artifact.load_backbone().image_runtime == "torch"
    check_backbone(artifact, mini)


@pytest.mark.usefixtures("without_openvino")
def test_in_bfloat16_it_does_not(mini) -> None:
    artifact = learned_by_openvino(image_precision="bfloat16")
    with pytest.raises(BackboneError, match="needs the package openvino"):
        artifact.load_backbone()
    with pytest.raises(ArtifactError, match=r"openvino computed in bfloat16, but this is torch.*: set backbone"):
        check_backbone(artifact, replace(mini, image_precision="bfloat16"))


@pytest.mark.parametrize("runtime", ["openvino", "auto"])
def test_a_method_that_learns_through_the_image_tower_needs_torch(runtime) -> None:
    with pytest.raises(ParamsError, match="dpl learns through the image tower, which torch alone can: set backbone"):
        toy_params("ViT-B-32", backbone={"image_runtime": runtime, "pretrained": "openai"}, method={"name": "dpl"})


def test_a_served_version_requires_the_runtime_of_its_card(tmp_path) -> None:
    told: dict[str, Any] = {}
    mlflow = types.SimpleNamespace(pyfunc=types.SimpleNamespace(log_model=lambda **given: told.update(given)))
    (tmp_path / "card.json").write_text('{"backbone": {"image_runtime": "openvino"}}')
    log_model(mlflow, tmp_path)
    assert any(line.startswith("openvino==") for line in told["pip_requirements"])
    log_model(mlflow, REGISTERED)
    assert not any(line.startswith("openvino") for line in told["pip_requirements"])
