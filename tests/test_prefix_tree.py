"""Prefix tree: every prompt's EOT sees its own prompt, and no beginning is computed again where it can be seen."""

from collections.abc import Hashable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coop_core.prompts.prefix_tree import Path, PrefixTree, build_tree

SOS, EOT = 0, 99
WORDS = [1, 2, 3, ("context", 7), ("context", 8)]
ANIMALS = ["bear", "cat", "dog", "eagle", "fox", "goat", "heron", "ibis", "jay", "kite", "lynx", "mole", "newt"]


@st.composite
def prompts_of(draw: st.DrawFn, *, least: int = 1) -> list[Path]:
    """Prompts with a common beginning of any length; often one twice, often one that is another's beginning + EOT."""
    beginning = [("context", i) for i in range(draw(st.sampled_from([0, 1, 16, 200])))]
    names = draw(st.lists(st.lists(st.sampled_from(WORDS), max_size=10), min_size=least, max_size=50))
    return [(SOS, *beginning, *name, EOT) for name in names]


ANY = st.sampled_from([1, 6, 35]).flatmap(lambda least: prompts_of(least=least))
MANY = prompts_of(least=35)
of_any_prompts = given(prompts=ANY)
of_many_prompts = given(prompts=MANY)
moderately = settings(max_examples=25, deadline=None, derandomize=True)


def test_common_beginnings_stand_once_and_branches_follow_them():
    tree = build_tree(_sentences(["cat", "sea lion", "sea snake"]))

    assert tree.elements == list(_words("SOS a photo of cat . EOT sea lion . EOT snake . EOT"))


def test_a_branch_goes_on_at_the_position_where_it_left():
    tree = build_tree(_sentences(["cat", "sea lion", "sea snake"]))

    assert tree.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 5, 6, 7]


def test_a_row_sees_its_own_branch_and_no_other():
    tree = build_tree(_sentences(["cat", "sea lion", "sea snake"]))

    words = [element for _, element in _seen(tree, tree.elements.index("snake"))]
    assert words == list(_words("SOS a photo of sea snake"))


def test_a_long_list_is_cut_into_stripes_that_share_one_trunk():
    tree = build_tree(_sentences([f"{animal} {place}" for animal in ANIMALS for place in ("hut", "zoo", "field")]))

    assert (tree.mask.shape[0] > 1, tree.trunk) == (True, len(_words("SOS a photo of")))


@of_any_prompts
@moderately
def test_each_prompts_end_sees_exactly_its_prompt(prompts):
    tree = build_tree(prompts)

    assert [_seen(tree, end) for end in tree.ends.tolist()] == [list(enumerate(path)) for path in prompts]


@of_any_prompts
@moderately
def test_a_row_sees_one_row_at_each_position_up_to_its_own(prompts):
    tree = build_tree(prompts)

    for row, position in _real_rows(tree):
        assert [seen for seen, _ in _seen(tree, row)] == list(range(position + 1))


@of_any_prompts
@moderately
def test_what_a_row_sees_last_is_itself(prompts):
    tree = build_tree(prompts)

    for row, position in _real_rows(tree):
        assert _seen(tree, row)[-1] == (position, tree.elements[row])


@of_any_prompts
@moderately
def test_no_row_of_a_prompt_sees_padding(prompts):
    tree = build_tree(prompts)

    for row, _ in _real_rows(tree):
        assert None not in [element for _, element in _seen(tree, row)]


@of_any_prompts
@moderately
def test_every_row_sees_something_even_in_padding(prompts):
    assert (build_tree(prompts).mask == 0).any(dim=-1).all()


@of_any_prompts
@moderately
def test_a_mask_only_shows_or_hides(prompts):
    mask = build_tree(prompts).mask

    assert ((mask == 0) | (mask == float("-inf"))).all()


@of_any_prompts
@moderately
def test_every_row_lies_on_the_way_to_an_end(prompts):
    tree = build_tree(prompts)

    beginnings = {path[:length] for path in prompts for length in range(1, len(path) + 1)}
    assert {_beginning(tree, row) for row, _ in _real_rows(tree)} == beginnings


@of_many_prompts
@moderately
def test_a_beginning_is_computed_again_only_where_its_branch_is_out_of_sight(prompts):
    tree = build_tree(prompts)
    last_row: dict[Path, int] = {}

    for row, _ in _real_rows(tree):
        before = last_row.get(_beginning(tree, row))
        if before is not None:
            end = next(end for end in sorted(tree.ends.tolist()) if end >= row)
            assert _seen_rows(tree, before)[tree.trunk] < end // tree.mask.shape[1] * tree.mask.shape[1] - tree.reach
        last_row[_beginning(tree, row)] = row


@given(prompts=prompts_of().filter(lambda prompts: sum(map(len, prompts)) <= 48))
@moderately
def test_prompts_that_fit_in_one_stripe_are_computed_without_padding_or_trunk(prompts):
    tree = build_tree(prompts)

    beginnings = {path[:length] for path in prompts for length in range(1, len(path) + 1)}
    assert (tree.mask.shape[:2], tree.trunk) == ((1, len(beginnings)), 0)


@of_many_prompts
@moderately
def test_the_trunk_is_all_that_prompts_share_where_there_are_several_stripes(prompts):
    tree = build_tree(prompts)

    shared = [i for i in range(min(map(len, prompts)) - 1) if len({path[: i + 1] for path in prompts}) == 1]
    assert tree.trunk == (len(shared) if tree.mask.shape[0] > 1 else 0)


@of_many_prompts
@moderately
def test_the_trunk_stands_in_the_first_rows_in_its_order(prompts):
    tree = build_tree(prompts)

    assert tree.elements[: tree.trunk] == list(prompts[0][: tree.trunk])


@of_many_prompts
@moderately
def test_the_trunk_is_never_computed_again(prompts):
    tree = build_tree(prompts)

    assert all(position >= tree.trunk for row, position in _real_rows(tree) if row >= tree.trunk)


@of_any_prompts
@moderately
def test_only_the_last_rows_are_padding_and_fewer_than_a_stripe(prompts):
    tree = build_tree(prompts)

    real = len(_real_rows(tree))
    assert (set(tree.elements[real:]) <= {None}, len(tree.elements) - real < tree.mask.shape[1]) == (True, True)


@of_any_prompts
@moderately
def test_a_stripe_is_no_smaller_than_what_it_reads_of_others(prompts):
    tree = build_tree(prompts)

    assert max(tree.trunk, tree.reach) <= tree.mask.shape[1]


@of_any_prompts
@moderately
def test_different_prompts_never_take_more_rows_than_they_have_padded_to_the_longest(prompts):
    prompts = list(dict.fromkeys(prompts))

    tree = build_tree(prompts)

    assert len(tree.elements) <= len(prompts) * max(map(len, prompts))


@given(data=st.data(), prompts=ANY)
@moderately
def test_the_order_of_prompts_changes_no_row(data, prompts):
    tree, shuffled = build_tree(prompts), build_tree(data.draw(st.permutations(prompts)))

    assert (shuffled.elements, shuffled.positions.tolist()) == (tree.elements, tree.positions.tolist())
    assert torch.equal(shuffled.mask, tree.mask)


@given(data=st.data(), prompts=ANY)
@moderately
def test_the_order_of_prompts_moves_no_prompts_end(data, prompts):
    prompts = list(dict.fromkeys(prompts))
    order = data.draw(st.permutations(range(len(prompts))))

    tree, shuffled = build_tree(prompts), build_tree([prompts[i] for i in order])

    assert shuffled.ends.tolist() == tree.ends[list(order)].tolist()


@given(prompt=prompts_of().map(lambda prompts: prompts[0]))
@moderately
def test_one_prompt_alone_is_its_own_tree(prompt):
    tree = build_tree([prompt])

    assert (tree.elements, tree.positions.tolist()) == (list(prompt), list(range(len(prompt))))


def test_a_prompt_given_twice_is_computed_once():
    tree = build_tree(_sentences(["cat", "cat"]))

    assert tree.elements == list(_words("SOS a photo of cat . EOT"))


def test_prompts_with_nothing_in_common_have_no_trunk():
    tree = build_tree([(i, *range(100, 150), EOT) for i in range(8)])

    assert (tree.mask.shape[0] > 1, tree.trunk) == (True, 0)


@pytest.mark.parametrize("context", [4, 16, 60])
def test_a_long_list_takes_less_than_half_of_the_rows_of_its_prompts(context):
    beginning = [("context", i) for i in range(context)]
    prompts = [(SOS, *beginning, i, i % 7, EOT) for i in range(100, 200)]

    tree = build_tree(prompts)

    assert len(tree.elements) < sum(map(len, prompts)) / 2


@pytest.mark.parametrize(("shared", "count"), [(True, 400), (False, 30)], ids=["trunk", "reach"])
def test_stripes_grow_with_what_they_must_read(shared, count):
    prompts = [(SOS, *(("context", j if shared else 200 * i + j) for j in range(150)), i, EOT) for i in range(count)]

    tree = build_tree(prompts)

    assert 150 <= tree.mask.shape[1] <= 160
    assert [_seen(tree, end) for end in tree.ends.tolist()] == [list(enumerate(path)) for path in prompts]


def _sentences(names: list[str]) -> list[Path]:
    return [_words(f"SOS a photo of {name} . EOT") for name in names]


def _words(text: str) -> Path:
    return tuple(text.split())


def _real_rows(tree: PrefixTree) -> list[tuple[int, int]]:
    """(row, position) of every row that is not padding."""
    return [(row, tree.positions[row].item()) for row, it in enumerate(tree.elements) if it is not None]


def _seen_rows(tree: PrefixTree, row: int) -> list[int]:
    """The rows that a row sees, by position."""
    (_, s), read = tree.mask.shape[:2], tree.trunk + tree.reach
    keys = (tree.mask.flatten(0, 1)[row] == 0).nonzero().flatten()
    rows = torch.where(keys < tree.trunk, keys, keys - read + row // s * s)
    return rows[tree.positions[rows].argsort(stable=True)].tolist()


def _seen(tree: PrefixTree, row: int) -> list[tuple[int, Hashable]]:
    """(position, element) of all that a row sees, by position."""
    return [(tree.positions[i].item(), tree.elements[i]) for i in _seen_rows(tree, row)]


def _beginning(tree: PrefixTree, row: int) -> Path:
    return tuple(element for _, element in _seen(tree, row))
