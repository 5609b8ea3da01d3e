"""What a backbone offers: pixels -> image features, prompt embeddings -> text features.

Dimensions everywhere: n images or prompts, c classes, m context vectors, l token slots, w text width,
d joint width, p width before the image tower's last linear map.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from coop_core.backbone.projection import Projection
from coop_core.data.views import ImageTransform
from coop_core.errors import BackboneError, PromptError
from coop_core.files import digest_bytes, digest_json

Precision = Literal["float32", "bfloat16", "float16"]
Runtime = Literal["torch", "openvino"]
"""What runs the image tower."""


@dataclass(frozen=True)
class Tokenizer:
    """Text -> token ids, never truncated, with the number of special tokens around the words."""

    tokenize: Callable[[str], list[int]]
    """A whole sequence, special tokens included."""
    decode: Callable[[list[int]], str]
    prefix_length: int
    """Special tokens before the words: SOS or [CLS]."""
    suffix_length: int
    """Special tokens after the words: EOT or [SEP]."""
    special_ids: frozenset[int]

    def pieces(self, text: str) -> list[int]:
        """The ids of the words alone.

        Raises
        ------
        PromptError
            When the text contains one of the tokenizer's special tokens literally: it would end the prompt.
        """
        ids = self.tokenize(text)
        inner = ids[self.prefix_length : len(ids) - self.suffix_length]
        if self.special_ids.intersection(inner):
            raise PromptError(f"{text!r} contains a special token of the tokenizer: rename the class")
        return inner


class TextTower(Protocol):
    """The frozen half that reads prompts. Implementations are plain objects, not modules, so that a method
    that holds one neither trains it, nor saves it, nor switches it out of evaluation mode."""

    tokenizer: Tokenizer
    width: int
    context_length: int
    """Token slots a prompt may fill, special tokens included."""
    pad_id: int
    vocabulary_size: int

    @property
    def device(self) -> torch.device: ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids (...) -> the embeddings a prompt is made of, float32 (..., w)."""

    def encode(self, prompts: Tensor, lengths: Tensor) -> Tensor:
        """Prompt embeddings (n, l, w), of which the first `lengths` (n,) rows count -> features (n, d).

        Features are not normalised. l may be anything up to the context length: rows after a prompt's end
        cannot change its features in any supported family.
        """

    def kept_bytes(self, length: int) -> int:
        """About what `encode` keeps of one prompt of so many rows for its backward pass."""

    def encode_words(self, token_ids: Tensor) -> Tensor:
        """The model's own way from full-length token ids (n, context_length) to features (n, d)."""


class SentenceTower(Protocol):
    """A text tower that reads whole sentences alone, the model's own way: no prompt can be injected into it."""

    context_length: int

    def count_tokens(self, text: str) -> int:
        """Token slots a sentence fills, special tokens included."""

    def encode_sentences(self, texts: list[str]) -> Tensor:
        """Sentences that fit -> features (n, d), not normalised."""


@dataclass(frozen=True)
class Backbone:
    architecture: str
    pretrained: str | None
    image_precision: Precision
    """What the image tower is kept and computed in."""
    family: str
    """The kind of text tower, in words."""
    transform: ImageTransform
    logit_scale: float
    """The factor itself, after exp."""
    image_tower: nn.Module
    """The frozen half that sees: normalised pixels (n, 3, size, size) of its own type -> (n, d)."""
    load_text_tower: Callable[[], TextTower]
    load_weights: Callable[[], Mapping[str, Tensor]]
    config: dict[str, Any]
    """What decides the features besides weights: activation, heads, pooling."""
    device: torch.device
    folded: int = 0
    """Batch norms of the image tower that were folded into its convolutions (`backbone.folding`): features differ by
    rounding from those of the tower as it came, so the feature key says so, while the weights are the same."""
    image_runtime: Runtime = "torch"
    compiled: Callable[[Tensor], Tensor] | None = None
    """The image tower up to its projection as a runtime other than torch runs it (`backbone.runtimes`); what learns
    through the image tower takes `image_tower`, which stays."""
    sentence_tower: SentenceTower | None = None
    """What reads class texts where no prompt can be injected; None where the text tower takes prompts."""
    refusal: str = ""
    """Why not, as a sentence."""
    projection: Projection | None = None
    """The image tower's last linear map, apart from what comes before it; None where there is none."""

    def __repr__(self) -> str:
        """For people: towers would fill pages."""
        return f"Backbone({self.name!r} on {self.device}, {self.transform.size} x {self.transform.size} pixels)"

    @property
    def name(self) -> str:
        return backbone_name(self.architecture, self.pretrained, self.image_precision, self.image_runtime)

    def check_prompts(self) -> None:
        """Raises BackboneError where prompts cannot be injected."""
        if self.sentence_tower is not None:
            raise BackboneError(self.refusal)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (n, 3, size, size) -> features (n, d), float32, not L2-normalised, without gradient."""
        return self.project(self.encode_unprojected(pixels))

    @torch.no_grad()
    def encode_unprojected(self, pixels: Tensor) -> Tensor:
        """The same before the last linear map (n, p); the features themselves where the tower has no such map."""
        if self.compiled is not None:
            return self.compiled(pixels)
        tower = self.projection.tower if self.projection else self.image_tower
        with full_float32(self.device):
            return tower(pixels.to(self.device, getattr(torch, self.image_precision))).float()

    def project(self, unprojected: Tensor) -> Tensor:
        """What `encode_unprojected` gave (..., p) -> features (..., d)."""
        return self.projection(unprojected) if self.projection else unprojected

    @cached_property
    def text_tower(self) -> TextTower:
        """Built when first asked for, and checked: its injected prompts must equal the model's own encoding.

        Raises
        ------
        BackboneError
            Where prompts cannot be injected; `sentence_tower` reads class texts there.
        """
        self.check_prompts()
        tower = self.load_text_tower()
        verify_text_tower(tower, name=self.name)
        return tower

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 over every frozen tensor's name, shape, type and values, and over how they are computed with.

        The image tower's tensors are of the type it computes in, so that `image_precision` is in it.
        """
        return digest_json([digest_tensors(self.load_weights()), self.config])


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Without TF32: on CUDA, torch computes float32 convolutions in it unless it is told not to, and features that say
    float32 would differ from a CPU's by thousandths."""
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def backbone_name(
    architecture: str, pretrained: str | None, image_precision: Precision, image_runtime: Runtime = "torch"
) -> str:
    """For people: "ViT-B-16-quickgelu (openai)", "mini (imagenet-minilm), images in bfloat16 by openvino"."""
    name = f"{architecture} ({pretrained})" if pretrained else architecture
    how = f" in {image_precision}" if image_precision != "float32" else ""
    how += f" by {image_runtime}" if image_runtime != "torch" else ""
    return f"{name}, images{how}" if how else name


def verify_text_tower(tower: TextTower, *, name: str) -> None:
    """Encode two sentences as words and as injected embeddings, and refuse a tower where they differ.

    Raises
    ------
    PromptError
        When this tower does something to its embeddings that the injection does not know of.
    """
    sentences = ["a photo of a cat.", "a drawing of two large dogs on a field."]
    token_ids, lengths = pad([tower.tokenizer.tokenize(text) for text in sentences], tower, full=True)
    with torch.no_grad():
        own = tower.encode_words(token_ids)
        injected = tower.encode(tower.embed(token_ids), lengths)
    error = ((own - injected).norm() / own.norm()).item()
    if not error < 1e-3:
        raise PromptError(
            f"the text tower of {name} does not take injected prompts exactly (relative error {error:.1e}): "
            "choose another backbone"
        )


def pad(sequences: list[list[int]], tower: TextTower, *, full: bool = False) -> tuple[Tensor, Tensor]:
    """Token sequences -> (ids (n, l), lengths (n,)), padded to the longest or to the full context length."""
    lengths = [len(sequence) for sequence in sequences]
    width = tower.context_length if full else max(lengths)
    rows = [sequence + [tower.pad_id] * (width - len(sequence)) for sequence in sequences]
    return torch.tensor(rows, device=tower.device), torch.tensor(lengths, device=tower.device)


def freeze(module: nn.Module) -> nn.Module:
    """No gradients and evaluation mode, so that BatchNorm and dropout stand still."""
    return module.requires_grad_(False).eval()


def in_precision(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What `module.to(dtype)` makes of its state: counts stay integers."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    parts = []
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        data = digest_bytes(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else ""
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {data}")
    return digest_bytes("\n".join(parts).encode())
