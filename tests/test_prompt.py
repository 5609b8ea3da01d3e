"""Prompts: which row holds what, row by row, in every layout and tokenizer; nothing is merged or cut in silence."""

from collections.abc import Callable

import pytest
import torch

from coop_core.errors import PromptError
from coop_core.methods import Task, coop
from coop_core.prompts.layout import CONTEXT_STD, build_layout, count_words, initial_context

NAMES = ["cat", "annual crop land", "pterodactyl", "forget-me-not", "residential"]
TOKENIZERS = ["flat", "bert-mean-linear", "roberta-mean-mlp", "xlm-roberta-mean-linear", "mt5-mean-linear"]
"""Byte-pair, WordPiece, byte-level byte-pair, and unigram with and without a first special token."""
WORDS = "an aerial photo of pterodactyls"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("n_context", [1, 2, 3, 5])
def test_rows_follow_the_published_table(zoo, open_clip, name, position, n_context):
    tower = zoo.backbone(name).text_tower
    specials, pieces = _own_words(open_clip.get_tokenizer(zoo.architecture(name)))

    layout = build_layout(tower, NAMES, n_context=n_context, position=position)

    expected = [_table(position, n_context, pieces(class_name), pieces("cat.")[-1:], *specials) for class_name in NAMES]
    assert _rows(layout) == expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_shorter_prompts_are_filled_with_padding(zoo, name):
    tower = zoo.backbone(name).text_tower

    layout = build_layout(tower, NAMES, n_context=4)

    for ids, length in zip(layout.token_ids, layout.lengths, strict=True):
        assert set(ids[length:].tolist()) <= {tower.pad_id}


def test_elements_name_context_vectors_by_number_and_all_else_by_token(zoo):
    tower = zoo.backbone("flat").text_tower
    layout = build_layout(tower, ["cat", "sea"], n_context=2, position="middle")
    (sos, cat, stop, eot), (_, sea, _, _) = (tower.tokenizer.tokenize(f"{name}.") for name in ("cat", "sea"))

    shared, own = layout.prompts(class_specific=False), layout.prompts(class_specific=True)

    first, second = ("context", 0), ("context", 1)
    assert shared == [(sos, first, cat, second, stop, eot), (sos, first, sea, second, stop, eot)]
    assert own == [shared[0], (sos, ("context", 2), sea, ("context", 3), stop, eot)]


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_each_classs_prompt_is_as_long_in_every_position(backbone, position):
    lengths = build_layout(backbone.text_tower, NAMES, n_context=5).lengths

    assert torch.equal(build_layout(backbone.text_tower, NAMES, n_context=5, position=position).lengths, lengths)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_shared_context_fills_the_context_rows_of_every_class_and_no_other(backbone, position):
    layout = build_layout(backbone.text_tower, NAMES, n_context=3, position=position)
    embeddings = torch.zeros(*layout.token_ids.shape, 2)
    context = torch.arange(1.0, 7.0).view(3, 2)

    filled = layout.fill(embeddings, context)

    for row in range(len(NAMES)):
        assert torch.equal(filled[row, layout.context_rows[row]], context)
        assert filled[row].sum() == context.sum()


def test_class_specific_context_fills_each_class_with_its_own(backbone):
    layout = build_layout(backbone.text_tower, NAMES, n_context=3, position="middle")
    context = torch.arange(1.0, 1 + len(NAMES) * 6).view(len(NAMES), 3, 2)

    filled = layout.fill(torch.zeros(*layout.token_ids.shape, 2), context)

    for row in range(len(NAMES)):
        assert torch.equal(filled[row, layout.context_rows[row]], context[row])


def test_filling_changes_neither_embeddings_nor_context(backbone):
    layout = build_layout(backbone.text_tower, NAMES, n_context=3)
    embeddings = torch.zeros(*layout.token_ids.shape, 2)

    layout.fill(embeddings, torch.ones(3, 2))

    assert embeddings.count_nonzero() == 0


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_a_piece_shared_by_name_and_full_stop_belongs_to_the_name(backbone, open_clip, position):
    """OpenAI's tokenizer reads ")." as one piece."""
    specials, pieces = _own_words(open_clip.get_tokenizer("ViT-B-16"))
    name = "kite (bird of prey)"
    assert len(pieces(f"{name}.")) == len(pieces(name))

    layout = build_layout(backbone.text_tower, [name], n_context=3, position=position)

    assert _rows(layout) == [_table(position, 3, pieces(f"{name}."), [], *specials)]


@pytest.mark.parametrize("name", ["flat", "bert-mean-linear"])
def test_names_and_first_words_are_taken_as_words(zoo, name):
    """As importers and the reference take them: an underscore is a space, here and when a prompt is re-bound."""
    tower = zoo.backbone(name).text_tower
    n = count_words(tower, "a photo of a")
    folders = build_layout(tower, ["forest_floor", "<end_of_text>"], n_context=n, initial_words="a_photo_of_a")
    plain = build_layout(tower, ["forest floor", "<end of text>"], n_context=n, initial_words="a photo of a")
    assert count_words(tower, "a_photo_of_a") == n
    assert torch.equal(folders.token_ids, plain.token_ids)
    options = {"n_context": n, "class_specific": None, "generator": torch.Generator()}
    first = [initial_context(tower, initial_words=text, **options) for text in ("a_photo_of_a", "a photo of a")]
    assert torch.equal(*first)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [("bert-mean-linear", "the [SEP] day"), ("roberta-mean-mlp", "the </s> day"),
     ("xlm-roberta-mean-linear", "the <pad> day")],
)  # fmt: skip
def test_a_class_name_with_a_special_token_is_refused(zoo, name, class_name):
    with pytest.raises(PromptError, match="contains a special token of the tokenizer: rename the class"):
        build_layout(zoo.backbone(name).text_tower, ["cat", class_name], n_context=4)


def test_a_word_the_tokenizer_does_not_know_is_no_special_token(zoo):
    layout = build_layout(zoo.backbone("xlm-roberta-mean-linear").text_tower, ["猫"], n_context=4)

    assert layout.lengths.item() > 4


@pytest.mark.parametrize("name", ["flat", "bert-mean-linear"])
def test_a_prompt_of_exactly_the_context_length_is_taken(zoo, name):
    tower = zoo.backbone(name).text_tower
    words = " ".join(["cat"] * (tower.context_length - 16 - 3))

    layout = build_layout(tower, [words], n_context=16)

    assert layout.lengths.tolist() == [tower.context_length]


@pytest.mark.parametrize("name", ["flat", "bert-mean-linear"])
def test_a_prompt_one_token_too_long_is_refused_with_its_name_and_count(zoo, name):
    tower = zoo.backbone(name).text_tower
    words = " ".join(["cat"] * (tower.context_length - 16 - 2))

    with pytest.raises(PromptError, match=f"40 token slots with 16 context vectors: '{words}' needs 41: shorten"):
        build_layout(tower, ["dog", words], n_context=16)


def test_initial_words_are_counted_in_tokens_not_in_words(backbone, open_clip):
    pieces = open_clip.get_tokenizer("ViT-B-16").encode(WORDS)

    assert count_words(backbone.text_tower, WORDS) == len(pieces) > len(WORDS.split())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_initial_words_of_several_pieces_keep_the_class_name_whole(zoo, open_clip, name):
    tower = zoo.backbone(name).text_tower
    count = count_words(tower, WORDS)
    assert count > len(WORDS.split())

    layout = build_layout(tower, ["cat"], n_context=count, initial_words=WORDS)

    sentence = open_clip.get_tokenizer(zoo.architecture(name))([f"{WORDS} cat."])[0]
    assert torch.equal(layout.token_ids[0], sentence[: layout.lengths[0]])


def test_a_number_of_context_vectors_that_is_not_the_initial_words_is_refused(backbone):
    with pytest.raises(PromptError, match="'a photo of a' is not 5 tokens"):
        build_layout(backbone.text_tower, ["cat"], n_context=5, initial_words="a photo of a")


def test_a_method_whose_n_context_is_not_its_initial_words_is_refused_with_both_counts(backbone):
    params = coop.Params(n_context=16, initial_words="a photo of a")

    with pytest.raises(PromptError, match=r"is 4 tokens for .*, but .*n_context is 16: set it to 4 or null"):
        _build(params, backbone)


def test_n_context_null_takes_the_number_of_tokens_of_the_initial_words(backbone):
    learner = _build(coop.Params(n_context=None, initial_words=WORDS), backbone)

    assert learner.context_vectors.shape == (count_words(backbone.text_tower, WORDS), backbone.text_tower.width)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_context_from_words_starts_at_their_embeddings(zoo, open_clip, name):
    tower = zoo.backbone(name).text_tower
    _, pieces = _own_words(open_clip.get_tokenizer(zoo.architecture(name)))
    count = count_words(tower, "a photo of a")

    context = initial_context(
        tower, n_context=count, initial_words="a photo of a", class_specific=None, generator=torch.Generator()
    )

    # The bare phrase starts a text, so its first piece carries no space before it.
    expected = tower.embed(torch.tensor(pieces("a photo of a", first=True)))
    assert torch.equal(context, expected)


def test_class_specific_context_is_kept_with_initial_words(backbone):
    learner = _build(coop.Params(n_context=None, initial_words="a photo of a", class_specific=True), backbone)
    shared = _build(coop.Params(n_context=None, initial_words="a photo of a"), backbone)

    assert torch.equal(learner.context_vectors, shared.context_vectors.expand(len(NAMES), -1, -1))


def test_class_specific_context_of_initial_words_can_be_learned_class_by_class(backbone):
    """An expanded view would share its memory between classes."""
    learner = _build(coop.Params(n_context=None, initial_words="a photo of a", class_specific=True), backbone)
    first, second = learner.context_vectors.data[:2]

    first += 1.0

    assert not torch.equal(first, second)


def test_random_context_has_the_published_spread(backbone):
    generator = torch.Generator().manual_seed(0)

    context = initial_context(
        backbone.text_tower, n_context=16, initial_words=None, class_specific=50, generator=generator
    )

    assert context.std().item() == pytest.approx(CONTEXT_STD, rel=0.02)
    assert context.mean().item() == pytest.approx(0, abs=1e-3)


def test_random_context_depends_on_its_generator_alone(backbone):
    def drawn(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return initial_context(
            backbone.text_tower, n_context=2, initial_words=None, class_specific=None, generator=generator
        )

    first = drawn(1)
    torch.randn(3)

    assert torch.equal(drawn(1), first)
    assert not torch.equal(drawn(2), first)


def _build(params: coop.Params, backbone) -> coop.CoOp:
    return coop.build(
        params, backbone=backbone, task=Task(tuple(NAMES), "a photo of a {}."),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def _table(position: str, m: int, name: list, stop: list, first: list, last: list) -> list:
    """The table of CoOp's layouts (methods.md, 1.0), with context vectors by their number."""
    context = [f"context {i}" for i in range(m)]
    half = m // 2
    words = {
        "end": context + name,
        "middle": context[:half] + name + context[half:],
        "front": name + context,
    }[position]
    return [*first, *words, *stop, *last]


def _rows(layout) -> list[list]:
    """Token ids up to the end of each prompt, context vectors by their number."""
    found = []
    for ids, length, context in zip(layout.token_ids, layout.lengths, layout.context_rows, strict=True):
        rows = ids[:length].tolist()
        for number, row in enumerate(context.tolist()):
            rows[row] = f"context {number}"
        found.append(rows)
    return found


def _own_words(tokenizer) -> tuple[tuple[list[int], list[int]], Callable[..., list[int]]]:
    """open_clip's or Hugging Face's own tokenizer -> (special tokens before and after, words inside a text -> ids)."""
    if hasattr(tokenizer, "encode"):
        return ([tokenizer.sot_token_id], [tokenizer.eot_token_id]), lambda text, first=False: tokenizer.encode(text)
    own = tokenizer.tokenizer
    byte_level = own.convert_tokens_to_ids("Ġ") != own.unk_token_id

    def pieces(text: str, *, first: bool = False) -> list[int]:
        text = f" {text}" if byte_level and not first else text
        return own.convert_tokens_to_ids(own.tokenize(text))

    before = [] if own.bos_token is None and own.cls_token is None else [own.cls_token_id]
    after = [own.eos_token_id if own.sep_token is None else own.sep_token_id]
    return (before, after), pieces
