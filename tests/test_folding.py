"""Folding: batch norm goes into the convolution before it where the features stay the same, and nowhere else."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from coop_core.artifact import read_artifact
from coop_core.backbone import load_backbone
from coop_core.backbone import mini as mini_backbone
from coop_core.backbone.base import freeze
from coop_core.backbone.folding import fold_batch_norms
from coop_core.features.extract import feature_key

SIDE = 8


class Tower(nn.Module):
    """Two convolutions with batch norm that has seen something; `way` says what the forward pass does with them."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        self.first, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.second, self.other = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        with torch.no_grad():
            for norm in (self.norm, self.other):
                for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    tensor.copy_(0.5 + torch.rand(4))
        freeze(self)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.first(pixels)
        if self.way == "also used bare":
            x = self.norm(x) + x
        elif self.way == "not after a convolution":
            x = self.norm(x.relu())
        else:
            x = self.norm(x).relu()
        x = self.other(self.second(x))
        if self.way == "a convolution used twice":
            x = self.second(x)
        return x.flatten(1)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("way", "pairs"), [("plain", 2), ("not after a convolution", 1), ("a convolution used twice", 1)]
)
def test_each_batch_norm_right_after_a_convolution_of_its_own_is_folded(relative_error, pixels, way, pairs) -> None:
    tower = Tower(way)
    own = tower(pixels)
    assert fold_batch_norms(tower, side=SIDE) == pairs
    assert sum(isinstance(module, nn.BatchNorm2d) for module in tower.modules()) == 2 - pairs
    assert relative_error(tower(pixels), own) < 1e-6
    assert not any(module.training for module in tower.modules())


def test_a_tower_that_would_say_something_else_is_left_as_it_was(caplog, pixels) -> None:
    tower = Tower("also used bare")
    own, state = tower(pixels), tower.state_dict()
    with caplog.at_level(logging.WARNING):
        assert fold_batch_norms(tower, side=SIDE) == 0
    assert "batch norm is not folded into this image tower" in caplog.text
    assert torch.equal(tower(pixels), own)
    assert list(tower.state_dict()) == list(state)


def test_mini_is_folded_and_says_what_its_packaged_tower_says(mini, relative_error) -> None:
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    own = mini_backbone._image_tower()(pixels)
    assert mini.folded == 49
    assert 0 < relative_error(mini.encode_images(pixels), own) < 1e-5


def test_the_plain_network_of_mini_is_timms(open_clip, relative_error) -> None:
    import timm

    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    ours = mini_backbone._image_tower()
    theirs.load_state_dict(ours.state_dict())
    pixels = torch.randn(2, 3, 97, 120, generator=torch.Generator().manual_seed(2))
    features = freeze(theirs).forward_head(theirs.forward_features(pixels), pre_logits=True)
    assert relative_error(ours(pixels), features) < 1e-6


def test_a_resnet_is_folded_and_a_transformer_has_nothing_to_fold(zoo) -> None:
    assert zoo.backbone("flat-resnet-quickgelu").folded > 0
    assert zoo.backbone("flat").folded == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_weights_are_digested_as_they_came(zoo, precision) -> None:
    """What was learned on them before they were folded answers on."""
    backbone = load_backbone(zoo.architecture("flat-resnet-quickgelu"), None, image_precision=precision)
    own = zoo.model("flat-resnet-quickgelu").state_dict()
    found = backbone.load_weights()
    assert sorted(found) == sorted(own)
    visual = [name for name in own if name.startswith("visual.") and own[name].is_floating_point()]
    assert all(torch.equal(found[name], own[name].to(getattr(torch, precision))) for name in visual)


def test_features_of_a_folded_tower_are_kept_apart(mini) -> None:
    assert feature_key(mini) != feature_key(replace(mini, folded=0))


def test_a_prompt_of_before_knows_the_features_of_before(mini) -> None:
    from test_registered_earlier import FOLDER

    assert read_artifact(FOLDER).feature_key == feature_key(replace(mini, folded=0))
