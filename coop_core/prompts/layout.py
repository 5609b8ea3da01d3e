"""Prompts: class names and a class token position -> which rows are frozen tokens and which are learned.

    end      SOS, context 1..m, name, ".", EOT
    middle   SOS, context 1..m//2, name, context m//2+1..m, ".", EOT
    front    SOS, name, context 1..m, ".", EOT

(CoOp, Zhou et al. 2022, equations 2 and 3; for odd m the shorter half comes first.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from coop_core.backbone import Backbone, TextTower
from coop_core.data.dataset import words
from coop_core.errors import PromptError

Position = Literal["end", "middle", "front"]
CONTEXT_STD = 0.02
"""Standard deviation of random first context vectors (CoOp, section 3.2)."""


Element = int | tuple[Literal["context"], int]
"""What stands in a row of a prompt: a frozen token by its id, or a context vector by its number."""


@dataclass(frozen=True)
class PromptLayout:
    """One prompt a class, right-padded to the longest, never truncated."""

    token_ids: Tensor
    """(c, l); placeholders where the context vectors go."""
    lengths: Tensor
    """(c,) rows up to and with the last special token."""
    context_rows: Tensor
    """(c, m) the row of each context vector."""
    blended: Tensor | None = None
    """(t, c, l) ids whose embeddings are averaged in each row, where a row is not one token."""

    def embed(self, tower: TextTower, rows: int) -> Tensor:
        """Frozen embeddings (c, l, w) of at least so many rows."""
        ids = self.token_ids if self.blended is None else self.blended
        found = tower.embed(F.pad(ids, (0, max(0, rows - ids.shape[-1])), value=tower.pad_id))
        return found if self.blended is None else found.mean(dim=0)

    def prompts(self, *, class_specific: bool) -> list[tuple[Element, ...]]:
        """Each prompt as what stands in its rows; a context vector by its number among all of them.

        >>> rows = PromptLayout(
        ...     token_ids=torch.tensor([[1, 0, 0, 7, 9], [1, 0, 0, 8, 9]]),
        ...     lengths=torch.tensor([5, 5]),
        ...     context_rows=torch.tensor([[1, 2], [1, 2]]),
        ... )
        >>> rows.prompts(class_specific=False)[1]
        (1, ('context', 0), ('context', 1), 8, 9)
        >>> rows.prompts(class_specific=True)[1]
        (1, ('context', 2), ('context', 3), 8, 9)
        """
        m = self.context_rows.shape[1]
        found = []
        for number, (ids, length, rows) in enumerate(
            zip(self.token_ids.tolist(), self.lengths.tolist(), self.context_rows.tolist(), strict=True)
        ):
            elements: list[Element] = ids[:length]
            for place, row in enumerate(rows):
                elements[row] = ("context", place + number * m * class_specific)
            found.append(tuple(elements))
        return found

    def fill(self, embeddings: Tensor, context_vectors: Tensor) -> Tensor:
        """Frozen embeddings (c, l, w) and context vectors (m, w) or (c, m, w) -> prompts (c, l, w)."""
        c, m, w = *self.context_rows.shape, embeddings.shape[-1]
        rows = self.context_rows[..., None].expand(c, m, w)
        return embeddings.scatter(1, rows, context_vectors.expand(c, m, w).to(embeddings.dtype))


def build_layout(
    tower: TextTower,
    class_names: Sequence[str],
    *,
    n_context: int,
    position: Position = "end",
    initial_words: str | None = None,
) -> PromptLayout:
    """Lay out a prompt for every class name.

    The class name's tokens are found inside the whole sentence, not by tokenising the name alone, because
    word boundaries and the full stop change pieces in some tokenizers. Names and initial words are taken as words
    (`dataset.words`), as the CoOp code does: "forest_floor" reads "forest floor".

    Raises
    ------
    PromptError
        When a prompt is longer than the text tower's context, or a name contains a special token.
    """
    placeholder = words(initial_words) if initial_words else " ".join(["X"] * n_context)
    if len(tower.tokenizer.pieces(placeholder)) != n_context:
        raise PromptError(f"{placeholder!r} is not {n_context} tokens in this text tower: correct method.n_context")
    orders = []
    for name in class_names:
        ids, name_length = _sentence(tower, placeholder, words(name), n_context=n_context)
        orders.append(_rows(ids, name_length, tower.tokenizer.prefix_length, n_context, position))
    _check_lengths(orders, class_names, tower, n_context)
    return _layout(tower, orders)


def lay_out_sentences(tower: TextTower, sentences: Sequence[str]) -> PromptLayout:
    """Whole sentences as prompts in which nothing is learned; m is 0.

    Raises
    ------
    PromptError
        When a sentence is longer than the text tower's context.
    """
    orders: list[tuple[list[int], list[int]]] = [(tower.tokenizer.tokenize(text), []) for text in sentences]
    _check_lengths(orders, sentences, tower, 0)
    return _layout(tower, orders)


def lay_out_blended(tower: TextTower, sentences: Sequence[Sequence[str]]) -> PromptLayout:
    """Several sentences a class (t, c), row by row averaged as embeddings and ended where the last one ends, as DPL's
    released code does."""
    layouts = [lay_out_sentences(tower, its) for its in sentences]
    last = layouts[-1]
    ids = [F.pad(one.token_ids, (0, last.token_ids.shape[1]), value=tower.pad_id) for one in layouts]
    return replace(last, blended=torch.stack([its[:, : last.token_ids.shape[1]] for its in ids]))


def _layout(tower: TextTower, orders: Sequence[tuple[list[int], list[int]]]) -> PromptLayout:
    """Each prompt's ids and the rows of its context vectors."""
    longest = max(len(ids) for ids, _ in orders)
    device = tower.device
    return PromptLayout(
        token_ids=torch.tensor([ids + [tower.pad_id] * (longest - len(ids)) for ids, _ in orders], device=device),
        lengths=torch.tensor([len(ids) for ids, _ in orders], device=device),
        context_rows=torch.tensor([rows for _, rows in orders], dtype=torch.long, device=device),
    )


def count_words(tower: TextTower, initial_words: str) -> int:
    """How many context vectors the words become: their tokens, not their spaces."""
    return len(tower.tokenizer.pieces(words(initial_words)))


def context_size(n_context: int | None, initial_words: str | None, backbone: Backbone) -> int:
    """How many context vectors `method.n_context` and `method.initial_words` ask for: tokens, not words.

    Raises
    ------
    PromptError
        When both are given and differ.
    """
    if initial_words is None:
        assert n_context is not None
        return n_context
    counted = count_words(backbone.text_tower, initial_words)
    if n_context not in (None, counted):
        raise PromptError(
            f"method.initial_words {initial_words!r} is {counted} tokens for {backbone.name}, but "
            f"method.n_context is {n_context}: set it to {counted} or null"
        )
    return counted


def initial_context(
    tower: TextTower,
    *,
    n_context: int,
    initial_words: str | None,
    class_specific: int | None,
    generator: torch.Generator,
) -> Tensor:
    """First context vectors, float32: (m, w), or (c, m, w) with c = `class_specific`.

    Random ones are drawn from N(0, 0.02^2) on the CPU, so that every device starts alike.
    """
    shape = (n_context, tower.width) if class_specific is None else (class_specific, n_context, tower.width)
    if initial_words is None:
        return CONTEXT_STD * torch.randn(shape, generator=generator)
    pieces = tower.tokenizer.pieces(words(initial_words))
    return tower.embed(torch.tensor(pieces, device=tower.device)).expand(shape).detach().cpu().clone()


def _sentence(tower: TextTower, placeholder: str, name: str, *, n_context: int) -> tuple[list[int], int]:
    """The whole prompt's ids in end order, and how many of them are the class name's.

    Where the name's last piece and the full stop are one piece, as in "kite (bird of prey).", that piece
    belongs to the name, as in CoOp.
    """
    tokenizer = tower.tokenizer
    head = tokenizer.prefix_length + n_context
    sentence = f"{placeholder} {name}."
    ids = tokenizer.tokenize(sentence)
    if ids[:head] != tokenizer.tokenize(placeholder)[:head]:
        raise PromptError(f"class name {name!r} merges with the context before it: rename the class")
    name_length = min(len(tokenizer.pieces(f"{placeholder} {name}")), len(tokenizer.pieces(sentence))) - n_context
    return ids, name_length


def _rows(
    ids: list[int], name_length: int, first: int, n_context: int, position: Position
) -> tuple[list[int], list[int]]:
    """Reorder ids from end order -> (ids, the rows of the context vectors)."""
    if position == "end":
        return ids, list(range(first, first + n_context))
    prefix, context = ids[:first], ids[first : first + n_context]
    name = ids[first + n_context : first + n_context + name_length]
    rest = ids[first + n_context + name_length :]
    before = n_context // 2 if position == "middle" else 0
    reordered = prefix + context[:before] + name + context[before:] + rest
    rows = [first + i if i < before else first + name_length + i for i in range(n_context)]
    return reordered, rows


def _check_lengths(
    orders: list[tuple[list[int], list[int]]], class_names: Sequence[str], tower: TextTower, n_context: int
) -> None:
    long = [(name, len(ids)) for (ids, _), name in zip(orders, class_names, strict=True)
            if len(ids) > tower.context_length]  # fmt: skip
    if long:
        found = ", ".join(f"{name!r} needs {count}" for name, count in long[:5])
        raise PromptError(
            f"prompts do not fit the text tower's {tower.context_length} token slots with {n_context} context "
            f"vectors: {found}: shorten the class names or lower method.n_context"
        )


def slices(items: Sequence[int], size: int) -> list[Sequence[int]]:
    """Prompts by number, in parts of at most this size."""
    return [items[start : start + size] for start in range(0, len(items), size)]
