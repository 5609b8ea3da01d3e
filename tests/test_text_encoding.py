"""Text encoding: packing and cutting change the time prompts take, never what comes out."""

import pytest
import torch
from conftest import CAUSAL, PADDED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coop_core.backbone import pad
from coop_core.errors import PromptError
from coop_core.prompts.encoder import PromptEncoder, encode_texts
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import build_layout, count_words, initial_context
from coop_core.prompts.packed_tower import supports_packing

NAMES = ["cat", "annual crop land", "pterodactyl", "river", "forget-me-not by the sea"]
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_path_gives_the_same_features_and_gradients(zoo, data):
    family = data.draw(st.sampled_from([*CAUSAL, *PADDED]), label="family")
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5), label="class names")
    n_context = data.draw(st.integers(1, 7), label="n_context")
    position = data.draw(st.sampled_from(["end", "middle", "front"]), label="position")
    max_memory = data.draw(st.sampled_from([None, 1, 100_000, 300_000]), label="memory")
    class_specific = data.draw(st.booleans(), label="class-specific")
    tower = zoo.backbone(family).text_tower
    layout = build_layout(tower, names, n_context=n_context, position=position)
    shape = (len(names), n_context, tower.width) if class_specific else (n_context, tower.width)
    context = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(n_context))

    def encoder(path, max_memory=None):
        return PromptEncoder(tower, layout, class_specific=class_specific, engine=Engine(path, max_memory=max_memory))

    reference = _encoded(encoder("full"), context)

    for path in ["packed", "cut"] if supports_packing(tower) else ["cut"]:
        found = _encoded(encoder(path, max_memory), context)
        for ours, theirs in zip(found, reference, strict=True):
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_auto_takes_packing_for_plain_causal_towers_only(zoo, family, position):
    tower = zoo.backbone(family).text_tower

    encoder = PromptEncoder(tower, build_layout(tower, NAMES, n_context=2, position=position))

    plain = family in CAUSAL and family != "native-custom-blocks"
    assert encoder.path == ("packed" if plain else "cut")


@pytest.mark.parametrize("class_specific", [None, len(NAMES)])
def test_a_prompt_of_real_words_is_the_models_own_encoding(zoo, family, relative_error, class_specific):
    tower = zoo.backbone(family).text_tower
    words = "a photo of a large"
    count = count_words(tower, words)
    layout = build_layout(tower, NAMES, n_context=count, initial_words=words)
    context = initial_context(
        tower, n_context=count, initial_words=words, class_specific=class_specific, generator=torch.Generator()
    )

    found = PromptEncoder(tower, layout, class_specific=class_specific is not None)(context)

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


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_close_to_float32(zoo, family, relative_error, precision):
    tower = zoo.backbone(family).text_tower
    if precision == "float16" and not supports_packing(tower):
        return  # refused, as another test says
    encoder, context = _three_words(tower)
    expected, expected_gradient = _encoded(encoder, context)

    found, gradient = _encoded(PromptEncoder(tower, encoder.layout, engine=Engine(precision=precision)), context)

    assert found.dtype == gradient.dtype == torch.float32
    assert relative_error(found, expected) < 0.03
    assert relative_error(gradient, expected_gradient) < 0.1


@pytest.mark.parametrize("causal", ["flat", "flat-resnet-quickgelu", "native-layer-scale"], indirect=True)
def test_float16_keeps_gradients_too_small_for_it(zoo, causal, relative_error):
    tower = zoo.backbone(causal).text_tower
    encoder, context = _three_words(tower)
    half = PromptEncoder(tower, encoder.layout, engine=Engine(precision="float16"))

    found, expected = (_encoded(e, context, scale=1e-9)[1] for e in (half, encoder))

    assert relative_error(found, expected) < 0.1


@pytest.mark.parametrize("class_specific", [False, True])
def test_a_set_of_context_vectors_for_each_image_is_each_set_alone(zoo, family, relative_error, class_specific):
    tower = zoo.backbone(family).text_tower
    layout = build_layout(tower, NAMES, n_context=3)
    shape = (2, 2, len(NAMES), 3, tower.width) if class_specific else (2, 2, 3, tower.width)
    sets = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    encoder = PromptEncoder(tower, layout, class_specific=class_specific)

    found = _encoded(encoder, sets)

    alone = [[_encoded(encoder, one, weights=(i, j)) for j, one in enumerate(row)] for i, row in enumerate(sets)]
    for part, together in enumerate(found):
        expected = torch.stack([torch.stack([one[part] for one in row]) for row in alone])
        assert relative_error(together, expected) <= 1e-5


def test_two_encodings_before_their_backward_passes_do_not_disturb_each_other(zoo, causal, relative_error):
    encoder, context = _three_words(zoo.backbone(causal).text_tower)
    first, second = (value.clone().requires_grad_() for value in (context, 2 * context))
    expected = [_encoded(encoder, value)[1] for value in (context, 2 * context)]

    features = [encoder(first), encoder(second)]
    with torch.no_grad():
        encoder(3 * context)
    for one in features:
        (one * _direction(one)).sum().backward()

    assert relative_error(first.grad, expected[0]) <= 1e-6
    assert relative_error(second.grad, expected[1]) <= 1e-6


def test_a_second_backward_pass_is_refused_unless_it_was_asked_for(zoo):
    encoder, context = _three_words(zoo.backbone("flat").text_tower)
    features = encoder(context.requires_grad_())
    total = (features * _direction(features)).sum()
    (first,) = torch.autograd.grad(total, context, retain_graph=True)
    (second,) = torch.autograd.grad(total, context)

    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


def test_packing_is_refused_where_it_is_not_exact(zoo):
    tower = zoo.backbone("bert-mean-linear").text_tower

    with pytest.raises(PromptError, match="not a plain causal one: set auto"):
        PromptEncoder(tower, build_layout(tower, NAMES, n_context=3), engine=Engine("packed"))


def test_prompts_of_different_lengths_are_cut_in_groups(zoo, relative_error):
    tower = zoo.backbone("bert-mean-linear").text_tower
    names = [f"cat {'sea ' * (n % 3 * 12)}" for n in range(90)]
    layout = build_layout(tower, names, n_context=2)
    context = 0.3 * torch.randn(2, tower.width, generator=torch.Generator().manual_seed(0))

    encoder = PromptEncoder(tower, layout)

    assert encoder.rows == layout.lengths.sum()
    found, expected = (_encoded(e, context) for e in (encoder, PromptEncoder(tower, layout, engine=Engine("full"))))
    assert max(map(relative_error, found, expected)) <= 1e-5


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


def _encoded(
    encoder: PromptEncoder, context: Tensor, *, scale: float = 1, weights: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Features, and the context's gradient of one fixed random sum of them (or of that part of a larger one)."""
    context = context.clone().requires_grad_()
    features = encoder(context)
    direction = _direction(features) if not weights else _direction(features.expand(2, 2, -1, -1))[weights]
    (scale * features * direction).sum().backward()
    return features.detach(), context.grad


def _direction(features: Tensor) -> Tensor:
    return torch.randn(features.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["bert-mean-linear"])
def test_half_precision_on_a_padded_tower_is_warned_of_or_refused(zoo, name, caplog):
    tower = zoo.backbone(name).text_tower
    layout = build_layout(tower, ["cat", "dog"], n_context=2)
    PromptEncoder(tower, layout, engine=Engine(precision="bfloat16"))

    assert "gains on this text tower where the processor multiplies in it, and loses elsewhere" in caplog.text
    with pytest.raises(PromptError, match=r"float16 is not for this text tower: its gradients are not scaled"):
        PromptEncoder(tower, layout, engine=Engine(precision="float16"))


def test_a_padded_tower_with_frozen_products_is_the_same_and_copies_no_parameter(zoo, relative_error):
    tower = zoo.backbone("bert-mean-linear").text_tower
    ready = tower.ready_for(torch.float32)
    prompts = torch.randn(3, 7, tower.width, generator=torch.Generator().manual_seed(0))
    found = []
    for one in (tower, ready):
        leaf = prompts.clone().requires_grad_()
        features = one.encode(leaf, torch.tensor([7, 5, 6]))
        (features * _direction(features)).sum().backward()
        found.append((features.detach(), leaf.grad))
    kinds = [{type(layer) for layer in one.encoder.modules()} for one in (tower, ready)]
    owned = {parameter.data_ptr() for parameter in tower.encoder.parameters()}

    assert [torch.nn.Linear in kind for kind in kinds] == [True, False]
    assert {parameter.data_ptr() for parameter in ready.encoder.parameters()} < owned
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(*found, strict=True))
