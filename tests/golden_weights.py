"""Names and a seed -> the small CLIP, images and start values that the numbers in tests/golden were computed on.

Each tensor has a random stream of its own, seeded by its name, so that it depends on no other and on no order.
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SEED = 7
JOINT, WIDTH, IMAGE_WIDTH, LAYERS, PATCH, SIZE = 64, 128, 192, 3, 8, 32
CONTEXT_LENGTH, VOCABULARY = 77, 49408
CONFIG: dict[str, Any] = {
    "embed_dim": JOINT,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIZE, "patch_size": PATCH, "width": IMAGE_WIDTH, "layers": LAYERS, "head_width": 64},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 2,
                 "layers": LAYERS},
}  # fmt: skip
"""open_clip's model configuration; OpenAI's architecture."""
CLASS_NAMES = (
    "cat", "abyssinian", "black-and-white colobus", "air_plane", "kite (bird of prey)", "747-400", "dog's", "C++",
)  # fmt: skip
"""Names of one to seven tokens, with an underscore, a digit, brackets that merge with the full stop, and so on."""


def draw(name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
    """A float32 tensor of normal numbers, computed in float64; RandomState's streams are frozen in all of NumPy."""
    numbers = _stream(name).standard_normal(shape)
    return torch.from_numpy(np.asarray(mean + std * numbers, dtype=np.float32))


def draw_labels(count: int) -> Tensor:
    """(count,) labels of `CLASS_NAMES`."""
    return torch.from_numpy(_stream("labels").randint(0, len(CLASS_NAMES), count).astype(np.int64))


def clip_weights() -> dict[str, Tensor]:
    """The state dict of OpenAI's and open_clip's flat CLIP."""
    return {name: _weight(name, shape) for name, shape in _clip_shapes()}


def write_clip(folder: Path) -> str:
    """The folder as open_clip reads it -> its name as an architecture."""
    text = json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}})
    (folder / "open_clip_config.json").write_text(text)
    torch.save(clip_weights(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def _stream(name: str) -> np.random.RandomState:
    return np.random.RandomState((zlib.crc32(name.encode()) + 1_000_003 * SEED) % 2**32)


def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Layer norms around 1 and 0, and everything else around 0, of about the size that training gives it."""
    kind = name.rpartition(".")[2]
    if name == "logit_scale":
        return torch.tensor(math.log(100), dtype=torch.float32)
    if ".ln_" in name or name.startswith("ln_"):
        return draw(name, *shape, std=0.1, mean=float(kind == "weight"))
    if "embedding" in name:
        return draw(name, *shape, std=0.1 if name.startswith("visual.") else 0.02)
    if kind.endswith("bias"):
        return draw(name, *shape, std=0.02)
    inputs = shape[0] if kind in ("proj", "text_projection") else math.prod(shape[1:])
    return draw(name, *shape, std=inputs**-0.5)


def _clip_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "logit_scale", ()
    yield "token_embedding.weight", (VOCABULARY, WIDTH)
    yield "positional_embedding", (CONTEXT_LENGTH, WIDTH)
    yield "text_projection", (WIDTH, JOINT)
    yield "visual.class_embedding", (IMAGE_WIDTH,)
    yield "visual.positional_embedding", ((SIZE // PATCH) ** 2 + 1, IMAGE_WIDTH)
    yield "visual.conv1.weight", (IMAGE_WIDTH, 3, PATCH, PATCH)
    yield "visual.proj", (IMAGE_WIDTH, JOINT)
    for norm, width in (("visual.ln_pre", IMAGE_WIDTH), ("visual.ln_post", IMAGE_WIDTH), ("ln_final", WIDTH)):
        yield f"{norm}.weight", (width,)
        yield f"{norm}.bias", (width,)
    for tower, width in (("visual.transformer", IMAGE_WIDTH), ("transformer", WIDTH)):
        for layer in range(LAYERS):
            for name, shape in _block_shapes(width):
                yield f"{tower}.resblocks.{layer}.{name}", shape


def _block_shapes(w: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, out, into in (
        ("attn.in_proj_", 3 * w, w), ("attn.out_proj.", w, w), ("mlp.c_fc.", 4 * w, w), ("mlp.c_proj.", w, 4 * w),
    ):  # fmt: skip
        yield f"{name}weight", (out, into)
        yield f"{name}bias", (out,)
    for norm in ("ln_1", "ln_2"):
        yield f"{norm}.weight", (w,)
        yield f"{norm}.bias", (w,)
