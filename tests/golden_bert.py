"""A BERT text tower and clinical sentences, drawn as `golden_weights` draws the CLIP."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_weights import SEED, draw
from torch import Tensor

CLINICAL = ("glioma tumor", "normal brain", "meningioma", "pituitary_tumor", "no finding")
WIDTH, INNER, LAYERS, CONTEXT, JOINT = 64, 128, 2, 32, 48
_WORDS = (
    "a photo of an image showing scan with dense mass in the left lobe clear margin bright region dark "
    "edge no sign soft tissue round shape thin wall large area small spot near center normal brain tumor "
    "finding glioma"
)
_PIECES = ("men", "##ing", "##ioma", "pit", "##uit", "##ary", "x", ".", ",", "-", "_")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_VOCABULARY = list(dict.fromkeys([*_SPECIAL, *_WORDS.split(), *_PIECES]))
_TRANSFORMER: dict[str, Any] = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": len(_VOCABULARY), "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": INNER, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 64,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip


def sentences(count: int) -> tuple[tuple[str, ...], ...]:
    """So many sentences of 5 to 12 words for each of `CLINICAL`."""
    return tuple(tuple(_sentences(name, count)) for name in CLINICAL)


def bert_weights() -> dict[str, Tensor]:
    """The text tower's part of open_clip's state dict."""
    return {name: _weight(name, shape) for name, shape in _shapes()}


def write_bert(folder: Path) -> str:
    """The folder as open_clip reads it -> its name as an architecture; its image tower is drawn by torch."""
    import open_clip
    from tokenizers import BertWordPieceTokenizer

    (folder / "config.json").write_text(json.dumps(_TRANSFORMER))
    (folder / "vocab.txt").write_text("\n".join(_VOCABULARY) + "\n")
    BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True).save(str(folder / "tokenizer.json"))
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": CONTEXT}  # fmt: skip
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 8, "layers": 1}
    config = {"model_cfg": {"embed_dim": JOINT, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_hf=False)
    left = model.load_state_dict(bert_weights(), strict=False)
    assert not left.unexpected_keys
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def _sentences(name: str, count: int) -> Iterator[str]:
    stream = np.random.RandomState((zlib.crc32(b"sentences " + name.encode()) + 1_000_003 * SEED) % 2**32)
    words = _WORDS.split()
    for _ in range(count):
        chosen = stream.randint(0, len(words), stream.randint(5, 13))
        yield " ".join(words[i] for i in chosen) + "."


def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    if not shape:
        return torch.tensor(100.0).log()
    is_bias = name.endswith("bias")
    if "LayerNorm" in name:
        return draw(name, *shape, std=0.1, mean=float(not is_bias))
    if "embeddings" in name or is_bias:
        return draw(name, *shape, std=0.02)
    return draw(name, *shape, std=shape[1] ** -0.5)


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    embeddings, middle = "text.transformer.embeddings", (WIDTH + JOINT) // 2
    yield "logit_scale", ()
    for name, rows in (("word", len(_VOCABULARY)), ("position", 64), ("token_type", 2)):
        yield f"{embeddings}.{name}_embeddings.weight", (rows, WIDTH)
    yield "text.proj.0.weight", (middle, WIDTH)
    yield "text.proj.2.weight", (JOINT, middle)
    norms = [f"{embeddings}.LayerNorm"]
    for layer in (f"text.transformer.encoder.layer.{i}" for i in range(LAYERS)):
        for part in ("query", "key", "value"):
            yield f"{layer}.attention.self.{part}.weight", (WIDTH, WIDTH)
            yield f"{layer}.attention.self.{part}.bias", (WIDTH,)
        for part, out, into in (("attention.output", WIDTH, WIDTH), ("intermediate", INNER, WIDTH),
                                ("output", WIDTH, INNER)):  # fmt: skip
            yield f"{layer}.{part}.dense.weight", (out, into)
            yield f"{layer}.{part}.dense.bias", (out,)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for norm in norms:
        yield f"{norm}.weight", (WIDTH,)
        yield f"{norm}.bias", (WIDTH,)
