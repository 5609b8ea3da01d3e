"""Text encoding: the shared prefix and the cut change the time prompts take, never what comes out."""

import pytest
import torch
from conftest import CAUSAL, PADDED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coop_core.backbone import pad
from coop_core.backbone.shared_prefix import supports_shared_prefix
from coop_core.errors import PromptError
from coop_core.prompt import build_layout, count_words, initial_context
from coop_core.text_encoding import PromptEncoder, encode_texts

NAMES = ["cat", "annual crop land", "pterodactyl", "river", "forget-me-not by the sea"]
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_path_gives_the_same_features_and_gradients(zoo, data):
    family = data.draw(st.sampled_from([*CAUSAL, *PADDED]), label="family")
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5), label="class names")
    n_context = data.draw(st.integers(1, 7), label="n_context")
    position = data.draw(st.sampled_from(["end", "middle", "front"]), label="position")
    chunk = data.draw(st.sampled_from([None, 1, 2, 3]), label="classes per chunk")
    class_specific = data.draw(st.booleans(), label="class-specific")
    tower = zoo.backbone(family).text_tower
    layout = build_layout(tower, names, n_context=n_context, position=position)
    shape = (len(names), n_context, tower.width) if class_specific else (n_context, tower.width)
    context = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(n_context))

    reference = _encoded(PromptEncoder(tower, layout, path="full"), context)

    fast = ["shared-prefix", "cut"] if supports_shared_prefix(tower) else ["cut"]
    for path in fast:
        found = _encoded(PromptEncoder(tower, layout, path=path, classes_per_chunk=chunk), context)
        for ours, theirs in zip(found, reference, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_auto_takes_the_shared_prefix_for_plain_causal_towers_only(zoo, family, position):
    tower = zoo.backbone(family).text_tower

    encoder = PromptEncoder(tower, build_layout(tower, NAMES, n_context=2, position=position))

    plain = family in CAUSAL and family != "native-custom-blocks"
    assert encoder.path == ("shared-prefix" if plain else "cut")


@pytest.mark.parametrize("class_specific", [None, len(NAMES)])
def test_a_prompt_of_real_words_is_the_models_own_encoding(zoo, family, relative_error, class_specific):
    tower = zoo.backbone(family).text_tower
    words = "a photo of a large"
    count = count_words(tower, words)
    layout = build_layout(tower, NAMES, n_context=count, initial_words=words)
    context = initial_context(
        tower, n_context=count, initial_words=words, class_specific=class_specific, generator=torch.Generator()
    )

    found = PromptEncoder(tower, layout)(context)

    expected = torch.nn.functional.normalize(zoo.texts(family, [f"{words} {name}." for name in NAMES]), dim=-1)
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("position", ["middle", "front"])
def test_words_moved_behind_the_name_are_the_models_own_encoding_of_that_order(zoo, causal, relative_error, position):
    tower = zoo.backbone(causal).text_tower
    layout = build_layout(tower, ["river"], n_context=2, position=position, initial_words="large photo")
    context = initial_context(
        tower, n_context=2, initial_words="large photo", class_specific=None, generator=torch.Generator()
    )

    found = PromptEncoder(tower, layout)(context)

    sentence = {"middle": "large river photo.", "front": "river large photo."}[position]
    assert relative_error(found, torch.nn.functional.normalize(zoo.texts(causal, [sentence]), dim=-1)) <= 1e-5


def test_rows_after_the_end_never_change_the_features(zoo, family, relative_error):
    tower = zoo.backbone(family).text_tower
    token_ids, lengths = pad([tower.tokenizer.tokenize(f"{name}.") for name in NAMES], tower, full=True)
    prompts = tower.embed(token_ids)
    after = torch.arange(prompts.shape[1]) >= lengths[:, None]
    noise = 10 * torch.randn(prompts.shape, generator=torch.Generator().manual_seed(0))

    found = tower.encode(torch.where(after[..., None], noise, prompts), lengths)

    assert relative_error(found, tower.encode(prompts, lengths)) <= 1e-6


def test_features_are_of_unit_length_in_float32(zoo, family):
    encoder, context = _three_words(zoo.backbone(family).text_tower)

    features = encoder(context)

    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(NAMES)))


def test_every_context_vector_receives_a_gradient(zoo, family):
    _, gradient = _encoded(*_three_words(zoo.backbone(family).text_tower))

    assert (gradient.norm(dim=-1) > 0).all()


def test_nothing_but_the_context_receives_a_gradient(zoo, family):
    tower = zoo.backbone(family).text_tower

    _encoded(*_three_words(tower))

    module = tower.module if hasattr(tower, "module") else tower.encoder
    assert all(parameter.grad is None for parameter in module.parameters())


def test_bfloat16_is_close_to_float32(zoo, family, relative_error):
    tower = zoo.backbone(family).text_tower
    encoder, context = _three_words(tower)

    found = PromptEncoder(tower, encoder.layout, precision="bfloat16")(context)

    assert found.dtype == torch.float32
    assert relative_error(found, encoder(context)) < 0.03


def test_bfloat16_gives_the_context_a_float32_gradient_close_to_float32s(zoo, family, relative_error):
    tower = zoo.backbone(family).text_tower
    encoder, context = _three_words(tower)

    _, found = _encoded(PromptEncoder(tower, encoder.layout, precision="bfloat16"), context)

    _, expected = _encoded(encoder, context)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 0.1


def test_plain_sentences_are_the_models_own_encoding(zoo, family, relative_error):
    texts = [f"a photo of a {name}." for name in NAMES]

    found = encode_texts(zoo.backbone(family).text_tower, texts, batch_size=2)

    assert relative_error(found, torch.nn.functional.normalize(zoo.texts(family, texts), dim=-1)) <= 1e-5


def test_a_sentence_of_exactly_the_context_length_is_taken(zoo, causal):
    tower = zoo.backbone(causal).text_tower

    assert encode_texts(tower, [" ".join(["cat"] * 38)]).shape[0] == 1


def test_a_sentence_too_long_is_refused_and_not_truncated(zoo, causal):
    tower = zoo.backbone(causal).text_tower

    with pytest.raises(PromptError, match="has 41 tokens, but the text tower takes 40: shorten it"):
        encode_texts(tower, ["cat", " ".join(["cat"] * 39)])


def _three_words(tower) -> tuple[PromptEncoder, Tensor]:
    """Every class with three random context vectors in front."""
    layout = build_layout(tower, NAMES, n_context=3, position="middle")
    return PromptEncoder(tower, layout), 0.3 * torch.randn(3, tower.width, generator=torch.Generator().manual_seed(0))


def _encoded(encoder: PromptEncoder, context: Tensor) -> tuple[Tensor, Tensor]:
    """Features, and the context's gradient of one fixed random sum of them."""
    context = context.clone().requires_grad_()
    features = encoder(context)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (features * weights).sum().backward()
    return features.detach(), context.grad
