"""Backbones: every supported family takes injected prompts exactly; every other one is refused by name."""

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES_ONLY
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from coop_core.backbone import base, digest_tensors, load_backbone, pad
from coop_core.backbone import mini as mini_backbone
from coop_core.backbone.base import full_float32
from coop_core.backbone.torchvision_operators import declare_missing_operators
from coop_core.data.views import ImageTransform
from coop_core.errors import BackboneError, PromptError
from coop_core.features.extract import feature_key
from coop_core.methods import coop
from coop_core.prompts.encoder import encode_texts, read_texts

TEXTS = ["a photo of a cat.", "annual crop land", "two large dogs on a field, and a river by the sea."]


def test_injected_prompts_equal_the_models_own_encoding(zoo, family, relative_error):
    tower = zoo.backbone(family).text_tower
    token_ids, lengths = pad([tower.tokenizer.tokenize(text) for text in TEXTS], tower, full=True)

    injected = tower.encode(tower.embed(token_ids), lengths)

    assert relative_error(injected, zoo.model(family).encode_text(token_ids)) <= 1e-5


def test_prompts_cut_after_the_longest_equal_the_models_own_encoding(zoo, family, relative_error):
    tower = zoo.backbone(family).text_tower
    token_ids, lengths = pad([tower.tokenizer.tokenize(text) for text in TEXTS], tower)

    cut = tower.encode(tower.embed(token_ids), lengths)

    assert relative_error(cut, zoo.texts(family, TEXTS)) <= 1e-5


def test_the_towers_own_way_with_words_is_the_models(zoo, family, relative_error):
    tower = zoo.backbone(family).text_tower
    token_ids, _ = pad([tower.tokenizer.tokenize(text) for text in TEXTS], tower, full=True)

    assert relative_error(tower.encode_words(token_ids), zoo.texts(family, TEXTS)) <= 1e-6


def test_padded_token_ids_are_open_clips_own(zoo, family, open_clip):
    tower = zoo.backbone(family).text_tower

    token_ids, _ = pad([tower.tokenizer.tokenize(text) for text in TEXTS], tower, full=True)

    assert torch.equal(token_ids, open_clip.get_tokenizer(zoo.architecture(family))(TEXTS))


def test_a_tokenizer_never_cuts_a_text(zoo, family):
    tokenizer = zoo.backbone(family).text_tower.tokenizer
    cat = len(tokenizer.pieces("a cat")) - len(tokenizer.pieces("a"))

    assert len(tokenizer.pieces("a" + 600 * " cat")) == len(tokenizer.pieces("a")) + 600 * cat


def test_image_features_are_the_models_own(zoo, family, relative_error):
    backbone = zoo.backbone(family)
    size = backbone.transform.size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))

    assert relative_error(backbone.encode_images(pixels), zoo.model(family).encode_image(pixels)) <= 1e-6


def test_logit_scale_is_the_factor_itself(zoo, family):
    assert zoo.backbone(family).logit_scale == pytest.approx(1 / 0.07)


def test_swapping_two_prompt_rows_changes_the_features(zoo, family, relative_error):
    tower = zoo.backbone(family).text_tower
    token_ids, lengths = pad([tower.tokenizer.tokenize(TEXTS[1])], tower)
    prompts = tower.embed(token_ids)
    swapped = prompts[:, [0, 2, 1, *range(3, prompts.shape[1])]]

    assert relative_error(tower.encode(swapped, lengths), tower.encode(prompts, lengths)) > 1e-3


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("siglip", "family SigLIP and CLIPA"),
        ("clipa", "family SigLIP and CLIPA"),
        ("mobileclip-s", "family MobileCLIP-S and others without a causal mask"),
        ("coca", "family CoCa"),
        ("worldwide", "family worldwide CLIP"),
        ("first-row", "family causal text towers pooled by 'first'"),
        ("class-token", "family native text towers with a class token"),
    ],
)
def test_a_family_that_cannot_take_prompts_refuses_them_by_name(zoo, name, family):
    backbone = zoo.backbone(name)

    for refused in (lambda: backbone.text_tower, lambda: coop.Params().check_backbone(backbone)):
        with pytest.raises(BackboneError, match=f"{family}.*; supported are OpenAI-type CLIP.*gda, probe"):
            refused()


def test_a_pooling_that_is_computed_wrongly_is_refused_at_once(zoo):
    with pytest.raises(BackboneError, match="family Hugging Face encoders with max pooling"):
        load_backbone(zoo.architecture("max-pooled"), None)


@pytest.mark.parametrize("name", SENTENCES_ONLY)
def test_class_texts_and_images_are_the_models_own_where_no_prompt_can_be_injected(zoo, name, relative_error):
    backbone = zoo.backbone(name)
    size = backbone.transform.size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))

    expected = F.normalize(zoo.texts(name, TEXTS), dim=-1)
    assert relative_error(read_texts(backbone, TEXTS), expected) <= 1e-6
    seen, own = (F.normalize(its, dim=-1) for its in (backbone.encode_images(pixels),
                                                      zoo.model(name).encode_image(pixels)))  # fmt: skip
    assert relative_error(seen, own) <= 1e-6


@pytest.mark.parametrize("name", SENTENCES_ONLY)
def test_a_class_text_that_would_be_cut_is_refused(zoo, name, open_clip):
    backbone, cut = zoo.backbone(name), open_clip.get_tokenizer(zoo.architecture(name))
    fits, too_long = ("a" + " cat" * count for count in (10, 60))

    assert backbone.sentence_tower.count_tokens(fits) == (cut([fits]) != 0).sum()
    with pytest.raises(PromptError, match=r"tokens, but the text tower takes 40: shorten it"):
        read_texts(backbone, [too_long])


def test_a_tower_that_pools_elsewhere_than_its_tokenizer_ends_is_refused(zoo):
    backbone = load_backbone(zoo.architecture("misplaced-end"), None)

    with pytest.raises(PromptError, match=r"does not take injected prompts exactly.*choose another backbone"):
        _ = backbone.text_tower


def test_weights_trained_with_another_activation_are_refused_before_any_download(open_clip, network):
    network.clear()

    with pytest.raises(BackboneError, match=r"set backbone\.architecture: ViT-B-16-quickgelu$"):
        load_backbone("ViT-B-16", "openai")

    assert network == []


def test_the_way_out_of_a_wrong_activation_is_always_a_known_architecture(open_clip):
    def activations_differ(architecture: str, tag: str) -> bool:
        own = open_clip.get_model_config(architecture).get("quick_gelu", False)
        return own != open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False)

    wrong = [pair for pair in open_clip.list_pretrained() if activations_differ(*pair)]
    known = "|".join(sorted(open_clip.list_models()))
    for architecture, tag in wrong:
        with pytest.raises(BackboneError, match=rf"set backbone\.architecture: ({known})$"):
            load_backbone(architecture, tag)


def test_an_unknown_architecture_is_refused_with_similar_ones():
    with pytest.raises(BackboneError, match=r"'ViT-B-99' is not known to open_clip; similar: .*'ViT-B-16'"):
        load_backbone("ViT-B-99", "openai")


def test_an_architecture_without_its_tag_is_refused_with_known_tags():
    with pytest.raises(BackboneError, match=r"pretrained is missing for ViT-B-16: .*laion2b_s34b_b88k"):
        load_backbone("ViT-B-16", None)


def test_an_unknown_tag_is_refused_before_any_download(open_clip, network):
    network.clear()

    with pytest.raises(BackboneError, match="ViT-B-16 with pretrained 'nonsense' cannot be loaded"):
        load_backbone("ViT-B-16", "nonsense")

    assert network == []


def test_a_tag_beside_a_local_folder_is_refused(zoo):
    with pytest.raises(BackboneError, match="pretrained must be null for local-dir:"):
        load_backbone(zoo.architecture("flat"), "openai")


def test_a_local_folder_without_weights_is_refused(zoo, tmp_path):
    _copy(zoo, "flat", tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()

    with pytest.raises(BackboneError, match=r"cannot be loaded .*Required pretrained weights"):
        load_backbone(f"local-dir:{tmp_path}", None)


def test_a_missing_local_folder_is_refused(tmp_path):
    with pytest.raises(BackboneError, match="nowhere"):
        load_backbone(f"local-dir:{tmp_path / 'nowhere'}", None)


def test_nothing_in_a_text_tower_is_trainable(zoo, family):
    module = _text_module(zoo.backbone(family).text_tower)

    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_no_part_of_a_text_tower_is_in_training_mode(zoo, family):
    module = _text_module(zoo.backbone(family).text_tower)

    assert not any(part.training for part in module.modules())


def test_text_features_are_the_same_twice(zoo, family):
    """Hugging Face encoders drop out one value in ten when they train."""
    tower = zoo.backbone(family).text_tower
    token_ids, lengths = pad([tower.tokenizer.tokenize(text) for text in TEXTS], tower)
    prompts = tower.embed(token_ids)

    assert torch.equal(tower.encode(prompts, lengths), tower.encode(prompts, lengths))


def test_encoding_images_leaves_every_weight_and_statistic_alone(zoo):
    """BatchNorm statistics would drift in training mode."""
    backbone = zoo.backbone("flat-resnet-quickgelu")
    before = digest_tensors(backbone.load_weights())

    backbone.encode_images(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))

    assert digest_tensors(backbone.load_weights()) == before


def test_image_features_carry_no_gradient(backbone):
    pixels = torch.zeros(1, 3, backbone.transform.size, backbone.transform.size, requires_grad=True)

    assert not backbone.encode_images(pixels).requires_grad


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["flat", "flat-resnet-quickgelu", "native", "mini"])
def test_an_image_tower_in_half_precision_says_nearly_the_same(zoo, name, precision, relative_error):
    architecture = "mini" if name == "mini" else zoo.architecture(name)
    exact, half = (load_backbone(architecture, None, image_precision=p) for p in ("float32", precision))
    size = exact.transform.size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))

    found = half.encode_images(pixels)

    assert 0 < relative_error(found, exact.encode_images(pixels)) <= 3e-2
    assert found.dtype == torch.float32


@pytest.mark.parametrize("name", ["flat", "bert-mean-linear", "mini"])
def test_the_text_tower_is_exact_whatever_the_image_tower_computes_in(zoo, name):
    architecture = "mini" if name == "mini" else zoo.architecture(name)
    exact, half = (load_backbone(architecture, None, image_precision=p) for p in ("float32", "bfloat16"))

    found, expected = (encode_texts(backbone.text_tower, TEXTS) for backbone in (half, exact))

    assert torch.equal(found, expected)


def test_features_of_another_precision_are_kept_apart(zoo):
    half = load_backbone(zoo.architecture("flat"), None, image_precision="bfloat16")

    assert half.weights_digest != zoo.backbone("flat").weights_digest


def test_the_same_weights_have_the_same_digest(zoo, tmp_path):
    _copy(zoo, "flat", tmp_path)

    assert load_backbone(f"local-dir:{tmp_path}", None).weights_digest == zoo.backbone("flat").weights_digest


def test_one_changed_weight_changes_the_digest(zoo, tmp_path):
    _copy(zoo, "flat", tmp_path)
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] += 1e-3
    save_file(weights, tmp_path / "open_clip_model.safetensors")

    assert load_backbone(f"local-dir:{tmp_path}", None).weights_digest != zoo.backbone("flat").weights_digest


def test_features_of_another_activation_are_kept_apart(zoo, tmp_path):
    """QuickGELU is no weight, yet decides every feature: cached ones must not be taken for the others."""
    _copy(zoo, "flat", tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))

    assert feature_key(load_backbone(f"local-dir:{tmp_path}", None)) != feature_key(zoo.backbone("flat"))


@pytest.mark.parametrize("name", ["flat", "flat-squash", "native-biased-projection-timm"])
@pytest.mark.parametrize(
    "size", [(37, 53), (53, 37), (35, 32), (32, 35), (201, 160), (160, 160), (33, 300), (9, 7), (641, 479)]
)
def test_the_test_view_is_open_clips_own_preprocessing(zoo, open_clip, name, size):
    rng = np.random.default_rng(size[0])
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    settings = open_clip.transform.PreprocessCfg(**zoo.model(name).visual.preprocess_cfg)
    expected = open_clip.transform.image_transform_v2(settings, is_train=False)(image)

    found = torch.from_numpy(zoo.backbone(name).transform.test_view(image))

    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_resize_mode_that_cannot_be_followed_is_refused(zoo):
    with pytest.raises(BackboneError, match=r"wants images of size .* by 'longest': not supported"):
        load_backbone(zoo.architecture("flat-longest"), None)


def test_the_test_view_of_the_mini_backbone_is_its_packages_own_preprocessing(mini, open_clip):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (301, 255, 3), dtype=np.uint8))
    settings = open_clip.transform.PreprocessCfg(size=224, mean=(0.498,) * 3, std=(0.502,) * 3)
    expected = open_clip.transform.image_transform_v2(settings, is_train=False)(image)

    torch.testing.assert_close(torch.from_numpy(mini.transform.test_view(image)), expected, atol=1e-6, rtol=0)


def test_the_mini_text_tower_takes_prompts_exactly(mini, relative_error):
    tower = mini.text_tower
    token_ids, lengths = pad([tower.tokenizer.tokenize(text) for text in TEXTS], tower, full=True)

    assert relative_error(tower.encode(tower.embed(token_ids), lengths), tower.encode_words(token_ids)) <= 1e-5


def test_the_mini_tokenizer_never_cuts_a_text(mini):
    """Its packaged file says to cut after 128 tokens."""
    assert len(mini.text_tower.tokenizer.pieces(" ".join(["cat"] * 600))) == 600


def test_mini_image_features_are_finite_and_differ_between_images(mini):
    features = mini.encode_images(torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))

    assert torch.isfinite(features).all()
    assert not torch.allclose(features[0], features[1])


def test_mini_text_features_lie_in_the_space_of_its_image_features(mini):
    tower = mini.text_tower
    token_ids, lengths = pad([tower.tokenizer.tokenize(text) for text in TEXTS], tower)
    features = tower.encode(tower.embed(token_ids), lengths)

    assert features.shape == (len(TEXTS), mini.encode_images(torch.zeros(1, 3, 224, 224)).shape[1])
    assert torch.isfinite(features).all()


def test_mini_reads_a_kind_of_cat_as_nearer_to_a_cat_than_to_a_truck(mini):
    tower = mini.text_tower
    names = ["a photo of a tabby cat.", "a photo of a Siamese cat.", "a photo of a garbage truck."]
    token_ids, lengths = pad([tower.tokenizer.tokenize(name) for name in names], tower)
    tabby, siamese, truck = torch.nn.functional.normalize(tower.encode(tower.embed(token_ids), lengths), dim=-1)

    assert tabby @ siamese > tabby @ truck


def test_minis_joint_space_is_of_the_class_names_that_open_clip_has(open_clip):
    """Which are read without importing it."""
    assert mini_backbone._imagenet_names() == tuple(open_clip.IMAGENET_CLASSNAMES)


def test_mini_has_one_set_of_weights_only():
    with pytest.raises(BackboneError, match=r"pretrained.* 'openai'.* mini has .*'imagenet-minilm'"):
        load_backbone("mini", "openai")


def test_transforms_that_differ_anywhere_have_different_digests():
    plain = ImageTransform(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    squashed = ImageTransform(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize_mode="squash")

    assert plain.digest != squashed.digest


def test_declaring_torchvisions_operators_again_does_nothing():
    declare_missing_operators()
    before = str(torch.ops.torchvision.nms)

    declare_missing_operators()

    assert str(torch.ops.torchvision.nms) == before


def _copy(zoo, name: str, folder: Path) -> None:
    source = Path(zoo.architecture(name).removeprefix("local-dir:"))
    shutil.copytree(source, folder, dirs_exist_ok=True)


def _text_module(tower) -> torch.nn.Module:
    return tower.module if hasattr(tower, "module") else tower.encoder


@pytest.fixture
def flags() -> Iterator[tuple[Any, Any]]:
    """torch's two switches for TF32, as they are for the whole process."""
    found = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [each.allow_tf32 for each in found]
    yield found
    for each, allowed in zip(found, before, strict=True):
        each.allow_tf32 = allowed


@pytest.mark.parametrize("allowed", [True, False])
def test_float32_on_cuda_is_no_tf32_and_the_process_keeps_what_it_allows(flags, allowed):
    for each in flags:
        each.allow_tf32 = allowed
    seen = []

    cuda = torch.device("cuda")
    with full_float32(cuda):
        seen.append([each.allow_tf32 for each in flags])
    with pytest.raises(ZeroDivisionError), full_float32(cuda):
        seen.append([each.allow_tf32 for each in flags][1 // 0 :])
    assert seen == [[False, False]]
    assert [each.allow_tf32 for each in flags] == [allowed, allowed]


@pytest.mark.parametrize("name", ["flat", "mini"])
def test_features_are_computed_in_full_float32(zoo, monkeypatch, name):
    asked = []
    monkeypatch.setattr(base, "full_float32", lambda device: asked.append(device.type) or nullcontext())
    backbone = load_backbone("mini", None) if name == "mini" else zoo.backbone(name)
    backbone.encode_images(torch.zeros(1, 3, backbone.transform.size, backbone.transform.size))
    assert asked == ["cpu"]
