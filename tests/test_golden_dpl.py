"""DPL's training and a step of its search against the numbers that the paper's own code computes (tests/golden)."""

from collections.abc import Sequence

import pytest
import torch
from golden_weights import IMAGE_WIDTH, WIDTH, draw
from test_golden import ENGINES, TASK, assert_close, clip, read  # noqa: F401
from torch import Tensor

from coop_core.answering import answer_with
from coop_core.backbone import Backbone
from coop_core.methods import Task, dpl
from coop_core.prompts.engine import Engine

SUBNET, SUPERNET = read("dpl_subnet"), read("dpl_supernet")
TEMPLATES = {"a": "a photo of a {}.", "zero": "a photo of a {}.", "custom": "a photo of a {}, a type of animal."}
LABELS = SUBNET["labels"]


def learner(clip: Backbone, case: str, engine: Engine) -> dpl.DPL:  # noqa: F811
    images, texts = (SUBNET[f"{case}.{tower}_lengths"].tolist() for tower in ("image", "text"))
    params = dpl.Params(image_lengths=images, text_lengths=texts)
    found = dpl.build(params, backbone=clip, task=Task(TASK.class_names, TEMPLATES[case]), generator=torch.Generator(),
                      engine=engine)  # fmt: skip
    found.load_state_dict({
        f"{tower}_rows.{i}": draw(f"dpl {tower} {i}", length, width, std=0.5)
        for tower, lengths, width in (("image", images, IMAGE_WIDTH), ("text", texts, WIDTH))
        for i, length in enumerate(lengths) if length
    })  # fmt: skip
    return found


@pytest.mark.parametrize("path", ENGINES)
@pytest.mark.parametrize("case", TEMPLATES)
def test_deep_prompts_answer_and_learn_as_in_the_reference(clip: Backbone, case: str, path: str) -> None:  # noqa: F811
    found = learner(clip, case, ENGINES[path])
    loss, logits = found.loss(SUBNET["images"], LABELS)
    assert_close(logits.detach(), SUBNET[f"{case}.logits"])
    assert_close(loss.detach(), SUBNET[f"{case}.loss"])
    assert_close(dpl.divergence(SUBNET[f"{case}.zero_shot_logits"], logits.detach()), SUBNET[f"{case}.distillation"])
    gradients = {name: array for name, array in SUBNET.items() if name.startswith(f"{case}.grad.")}
    assert len(gradients) == len(list(found.parameters()))
    if gradients:
        loss.backward()
    for name, expected in gradients.items():
        tower, layer = name.removeprefix(f"{case}.grad.").split(".")
        assert_close(found.get_parameter(f"{tower}_rows.{layer}").grad, expected)


def test_no_rows_at_all_are_zero_shot(clip: Backbone) -> None:  # noqa: F811
    found = learner(clip, "zero", Engine())
    assert list(found.parameters()) == []
    answers = answer_with(found, class_names=TASK.class_names).probabilities(SUBNET["images"])
    assert_close(answers, SUBNET["zero.logits"].softmax(1))
    plain = clip.encode_images(SUBNET["images"])
    assert_close(found.features(SUBNET["images"]), plain.double())


@pytest.mark.parametrize("path", ENGINES)
def test_a_step_of_the_search_has_the_references_gradients(clip: Backbone, path: str) -> None:  # noqa: F811
    """Three candidates for images and two for texts, which one search does not mix; the numbers say how many."""
    params = dpl.Params()
    towers = dpl.Towers(clip, Task(TASK.class_names, TEMPLATES["a"]), params, ENGINES[path])
    found = dpl.Supernet(towers, (3, 2), torch.Generator())
    found.load_state_dict({
        "image_alphas": draw("alpha image", 3, 4, std=0.5), "text_alphas": draw("alpha text", 3, 3, std=0.5),
        "image_rows": _rows("image", 3, IMAGE_WIDTH), "text_rows": _rows("text", 2, WIDTH),
    })  # fmt: skip
    loss, logits = found.loss(SUPERNET["images"], SUPERNET["labels"])
    loss.backward()
    assert_close(logits.detach(), SUPERNET["logits"])
    assert_close(loss.detach(), SUPERNET["loss"])
    assert_close(found.image_alphas.grad, SUPERNET["grad.alpha.image"])
    assert_close(found.text_alphas.grad, SUPERNET["grad.alpha.text"])
    for tower, candidates, parameter in (("image", 3, found.image_rows), ("text", 2, found.text_rows)):
        for layer in range(3):
            parts = parameter.grad[layer].split(list(range(1, candidates + 1)))
            for c, part in enumerate(parts, start=1):
                assert_close(part, SUPERNET[f"grad.{tower}.{layer}.{c}"])


def _rows(tower: str, candidates: int, width: int) -> Tensor:
    """(layers, 1 + 2 + ... + candidates, w)"""
    def of(layer: int) -> Sequence[Tensor]:
        return [draw(f"search {tower} {layer} {c}", c, width, std=0.5) for c in range(1, candidates + 1)]

    return torch.stack([torch.cat(of(layer)) for layer in range(3)])
