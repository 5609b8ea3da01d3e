"""Nearest words and linear classifiers: figures are exact, whatever float32 products are computed in."""

import pytest
import torch

from coop_core.judging.classifier import LinearClassifier
from coop_core.prompts.interpretation import nearest_words


@pytest.fixture
def rough_products(monkeypatch):
    """Float32 products as on a processor that computes them in bfloat16."""
    exact = torch.Tensor.__matmul__

    def rough(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return exact(a.bfloat16(), b.bfloat16()).to(a.dtype) if a.dtype == torch.float32 else exact(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rough)


@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["around zero", "far from zero, where squares cancel"])
def test_distances_are_those_of_the_differences(zoo, offset):
    tower = zoo.backbone("flat").text_tower
    context = offset + torch.randn(5, tower.width, generator=torch.Generator().manual_seed(0))
    found = nearest_words(tower, context)

    rows: dict[str, list[int]] = {}  # several tokens may read the same
    for i in range(tower.vocabulary_size):
        rows.setdefault(tower.tokenizer.decode([i]).strip(), []).append(i)
    for vector, words in zip(context.double(), found["vectors"], strict=True):
        for word in words:
            exact = (vector - tower.embed(torch.tensor(rows[word["word"]])).double()).norm(dim=1)
            assert (exact / word["distance"] - 1).abs().min() < 1e-12


def test_figures_do_not_depend_on_the_precision_of_float32_products(rough_products):
    draw = torch.Generator().manual_seed(0)
    weights, features = torch.randn(7, 64, generator=draw), torch.randn(9, 64, generator=draw)
    exact = torch.einsum("nd,cd->nc", features.double(), weights.double()).float()

    assert torch.equal(LinearClassifier(weights, normalise=False).logits(features), exact)


def test_many_images_are_answered_in_pieces_that_say_the_same(monkeypatch):
    """A piece has copies in float64; of fifty thousand images at once they took gigabytes."""
    draw = torch.Generator().manual_seed(0)
    classifier = LinearClassifier(torch.randn(7, 64, generator=draw), scale=100.0, bias=torch.randn(7, generator=draw))
    features, sizes = torch.randn(10, 64, generator=draw), []
    whole, logits = classifier.logits(features), LinearClassifier.logits
    monkeypatch.setattr("coop_core.judging.classifier._AT_ONCE", 4)
    monkeypatch.setattr(LinearClassifier, "logits", lambda own, some: sizes.append(len(some)) or logits(own, some))

    assert torch.equal(classifier.probabilities(features), whole.softmax(dim=-1))
    assert sizes == [4, 4, 2]
    assert classifier.probabilities(features[:0]).shape == (0, 7)
