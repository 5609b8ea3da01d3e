"""open_clip models: architecture + pretrained tag, hub name or local folder -> a checked, frozen backbone."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coop_core.backbone.base import Backbone, Precision, TextTower, Tokenizer, freeze, in_precision
from coop_core.backbone.folding import fold_batch_norms
from coop_core.backbone.projection import split_projection
from coop_core.backbone.runtimes import AskedRuntime, choose_runtime, compile_tower
from coop_core.backbone.tokenizers import from_hugging_face, from_simple_tokenizer, token_counter
from coop_core.backbone.torchvision_operators import declare_missing_operators
from coop_core.backbone.towers import CausalTextTower, PaddedTextTower, WholeSentences
from coop_core.data.views import ImageTransform
from coop_core.errors import BackboneError

SUPPORTED = "OpenAI-type CLIP, open_clip's native causal text towers and Hugging Face encoders"


def load_open_clip(
    architecture: str,
    pretrained: str | None,
    *,
    image_precision: Precision,
    image_runtime: AskedRuntime,
    device: torch.device | str,
) -> Backbone:
    """Load a model and find out from its parts, not from its name, what kind of text tower it has."""
    declare_missing_operators()
    import open_clip

    model, config = _create(open_clip, architecture, pretrained)
    family, takes_prompts = text_family(model)
    device = torch.device(device)
    freeze(model)
    transform = _image_transform(architecture, model.visual.preprocess_cfg)
    dtype: torch.dtype = getattr(torch, image_precision)
    own = model.visual.state_dict()
    folded = fold_batch_norms(model.visual, side=transform.size)
    image_tower = _PooledAlone(model.visual) if type(model).__name__ == "CoCa" else model.visual
    has_projection = type(model).__name__ != "CoCa"
    whole = split_projection(model.visual) if has_projection else None
    before = whole.tower if whole else image_tower
    runtime = choose_runtime(image_runtime, before, precision=image_precision, device=device)
    compiled = compile_tower(before, runtime, side=transform.size, precision=image_precision, device=device)
    model.to(device).visual.to(dtype)

    def weights() -> dict[str, Tensor]:
        """As they came, whatever is folded."""
        rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("visual.")}
        return rest | {f"visual.{name}": tensor for name, tensor in in_precision(own, dtype).items()}

    return Backbone(
        architecture=architecture,
        pretrained=pretrained,
        image_precision=image_precision,
        family=family,
        transform=transform,
        logit_scale=model.logit_scale.detach().float().exp().item(),
        image_tower=image_tower,
        load_text_tower=lambda: _text_tower(open_clip, architecture, model),
        load_weights=weights if folded else model.state_dict,
        config=config,
        device=device,
        folded=folded,
        image_runtime=runtime,
        compiled=compiled,
        sentence_tower=None if takes_prompts else _sentence_tower(open_clip, architecture, model, device),
        refusal="" if takes_prompts else _refusal(family),
        projection=split_projection(model.visual) if has_projection else None,
    )


class _PooledAlone(nn.Module):
    """CoCa's image tower without the tokens that it gives beside its features."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> Tensor:
        pooled: Tensor = self.visual(pixels)[0]
        return pooled


def text_family(model: Any) -> tuple[str, bool]:
    """-> (the text tower's family, whether prompts can be injected into it exactly).

    They cannot where features depend on what stands after the prompt, or embeddings are hidden.

    Raises
    ------
    BackboneError
        For a pooling that open_clip computes wrongly.
    """
    kind = type(model).__name__
    if kind == "CoCa":
        return "CoCa (a class token appended behind the padding)", False
    if kind == "CLIP":
        return _native_family(model, model.text_pool_type, name="OpenAI-type CLIP")
    text: Any = getattr(model, "text", None)
    if type(text).__name__ == "HFTextEncoder":
        pooler = type(text.pooler).__name__
        if pooler == "MaxPooler":
            raise BackboneError(_refusal("Hugging Face encoders with max pooling (open_clip 3.3 inverts its mask)"))
        return f"Hugging Face encoder ({text.config.model_type}, padding masked, {pooler})", True
    if type(text).__name__ == "TextTransformer":
        if text.cls_emb is not None or text.use_pad_mask:
            return "native text towers with a class token or a padding mask", False
        return _native_family(text, text.pool_type, name="native text transformer")
    return f"{kind} with a text tower of type {type(text).__name__}", False


def _native_family(module: Any, pool_type: str, *, name: str) -> tuple[str, bool]:
    if module.attn_mask is None:
        if pool_type == "last":
            return "SigLIP and CLIPA (no causal mask, pooled at the last slot, which is padding)", False
        return "MobileCLIP-S and others without a causal mask (padding is attended to)", False
    if pool_type == "eos":
        return "worldwide CLIP (its own end-of-text id and multilingual tokenizers)", False
    if pool_type != "argmax":
        return f"causal text towers pooled by {pool_type!r} instead of at EOT", False
    return f"{name} (causal, pooled at EOT)", True


def _refusal(family: str) -> str:
    return (
        f"backbone.architecture has a text tower of the family {family}, which context vectors cannot be "
        f"injected into exactly; supported are {SUPPORTED}; methods that read class texts alone, such as gda, probe, "
        "prolip and tip_adapter, take the others as well"
    )


def _create(open_clip: Any, architecture: str, pretrained: str | None) -> tuple[Any, dict[str, Any]]:
    """-> (the model with its weights, its configuration)."""
    _check_names(open_clip, architecture, pretrained)
    try:
        config = open_clip.get_model_config(architecture)
        _check_quick_gelu(open_clip, architecture, pretrained, config)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            return open_clip.create_model(architecture, pretrained=pretrained, require_pretrained=True), config
    except BackboneError:
        raise
    except Exception as error:  # open_clip, the hub client and torch raise their own kinds for missing weights
        reason = " ".join(str(error).split())[:300]
        raise BackboneError(
            f"backbone {architecture} with pretrained {pretrained!r} cannot be loaded ({type(error).__name__}: "
            f"{reason}): check both names, the network, or give a local checkpoint"
        ) from error


def _check_names(open_clip: Any, architecture: str, pretrained: str | None) -> None:
    if architecture.startswith(("hf-hub:", "local-dir:")):
        if pretrained:
            raise BackboneError(f"backbone.pretrained must be null for {architecture}, which brings its own weights")
        return
    if architecture not in open_clip.list_models():
        close = [name for name in open_clip.list_models() if name.lower().startswith(architecture.lower()[:5])][:8]
        raise BackboneError(f"backbone.architecture {architecture!r} is not known to open_clip; similar: {close}")
    if not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)[:8]) or "none known"
        raise BackboneError(f"backbone.pretrained is missing for {architecture}: a checkpoint file or one of: {tags}")


def _check_quick_gelu(open_clip: Any, architecture: str, pretrained: str | None, config: dict[str, Any]) -> None:
    """OpenAI's weights were trained with QuickGELU; with GELU they load, and answer a little worse."""
    own = bool(config.get("quick_gelu", False))
    tag = open_clip.get_pretrained_cfg(architecture, pretrained) if pretrained else {}
    if tag and own != bool(tag.get("quick_gelu", False)):
        other = architecture.removesuffix("-quickgelu") if own else f"{architecture}-quickgelu"
        raise BackboneError(
            f"backbone {architecture} computes {'QuickGELU' if own else 'GELU'}, but the weights {pretrained!r} were "
            f"trained with {'GELU' if own else 'QuickGELU'}: set backbone.architecture: {other}"
        )
    if pretrained and not own and Path(pretrained).is_file() and "openai" in Path(pretrained).name.lower():
        warnings.warn(
            f"{pretrained} looks like OpenAI's weights, which need the architecture {architecture}-quickgelu",
            stacklevel=2,
        )


def _text_tower(open_clip: Any, architecture: str, model: Any) -> TextTower:
    tokenizer = _tokenizer(open_clip, architecture)
    if type(model).__name__ == "CLIP":
        return CausalTextTower(model, tokenizer[0], model.encode_text)
    if type(model.text).__name__ == "TextTransformer":
        return CausalTextTower(model.text, tokenizer[0], model.encode_text)
    text = model.text
    return PaddedTextTower(
        text.transformer,
        tokenizer[0],
        pool=text.pooler,
        project=text.proj,
        context_length=tokenizer[1],
        pad_id=text.config.pad_token_id,
    )


def _sentence_tower(open_clip: Any, architecture: str, model: Any, device: torch.device) -> WholeSentences:
    """The model's own tokenizer and text encoder, for what cannot take prompts."""
    tokenizer = open_clip.get_tokenizer(architecture)

    def encode(texts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(texts).to(device))

    return WholeSentences(encode, token_counter(tokenizer), context_length=tokenizer.context_length)


def _tokenizer(open_clip: Any, architecture: str) -> tuple[Tokenizer, int]:
    """The tokenizer in our shape, and the context length that goes with it."""
    tokenizer = open_clip.get_tokenizer(architecture)
    if hasattr(tokenizer, "sot_token_id"):
        return from_simple_tokenizer(tokenizer), tokenizer.context_length
    clean: Callable[[str], str] = tokenizer.clean_fn
    return from_hugging_face(tokenizer.tokenizer, clean=clean), tokenizer.context_length


def _image_transform(architecture: str, preprocess: dict[str, Any]) -> ImageTransform:
    size = preprocess["size"]
    side = size if isinstance(size, int) else size[0]
    mode, interpolation = preprocess["resize_mode"], preprocess["interpolation"]
    if (not isinstance(size, int) and size[0] != size[1]) or mode not in ("shortest", "squash"):
        raise BackboneError(f"backbone {architecture} wants images of size {size} by {mode!r}: not supported")
    return ImageTransform(
        size=side,
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
        resize_mode=mode,
    )
