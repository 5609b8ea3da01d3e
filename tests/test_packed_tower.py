"""Packed tower: features and gradients are the tower's own, and its memory is what was promised."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coop_core.backbone.blocks import Deep
from coop_core.backbone.towers import CausalTextTower
from coop_core.prompts.encoder import PromptEncoder
from coop_core.prompts.engine import Engine
from coop_core.prompts.layout import build_layout
from coop_core.prompts.packed_block import Shape
from coop_core.prompts.packed_tower import PackedTower, supports_packing
from coop_core.prompts.prefix_tree import Path, build_tree

TOWERS = ["flat", "flat-resnet-quickgelu", "native-layer-scale"]
VOCABULARY = 100


def _prompts(count: int) -> list[Path]:
    """SOS, a common beginning, a few words of their own, EOT."""
    draw = random.Random(0)
    return [(0, 1, 2, 3, *draw.choices(range(10, 40), k=draw.randint(1, 6)), 99) for _ in range(count)]


FEW, MANY = _prompts(4), _prompts(80)
"""One stripe, and several."""


@pytest.fixture(params=TOWERS)
def tower(zoo, request: pytest.FixtureRequest) -> CausalTextTower:
    return zoo.backbone(request.param).text_tower


@pytest.mark.parametrize("prompts", [FEW, MANY], ids=["one stripe", "several stripes"])
def test_features_and_gradients_are_those_of_each_prompt_through_the_tower_itself(tower, prompts, relative_error):
    words = _words(tower, sets=2)

    found = _with_gradient(_Packed(tower, prompts), words)

    expected = _with_gradient(lambda words: _one_by_one(tower, prompts, words), words)
    assert max(map(relative_error, found, expected)) <= 1e-5


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's switch sets flags that a CPU build warns about
def test_features_and_gradients_are_the_same_without_onednn(tower, relative_error):
    with torch.backends.mkldnn.flags(enabled=False):
        plain = _Packed(tower, MANY)

    found, expected = (_with_gradient(packed, _words(tower)) for packed in (_Packed(tower, MANY), plain))

    assert max(map(relative_error, found, expected)) <= 1e-5


def test_the_gradient_foretells_what_a_small_step_changes(tower):
    packed, words = _Packed(tower, MANY), _words(tower)
    features, gradient = _with_gradient(packed, words)
    step = 1e-2 * gradient / gradient.norm()

    ahead, behind = ((packed(words + way * step) * _direction(features)).sum().item() for way in (1, -1))

    assert (ahead - behind) / 2e-2 == pytest.approx(gradient.norm().item(), rel=1e-2)


def test_many_prompts_in_stripes_are_what_they_are_a_few_at_a_time(tower, relative_error):
    words = _words(tower)

    together = _Packed(tower, MANY)(words)

    alone = torch.cat([_Packed(tower, MANY[start : start + 8])(words) for start in range(0, len(MANY), 8)], dim=1)
    assert relative_error(together, alone) <= 1e-6


def test_the_order_of_prompts_changes_no_feature(tower):
    words = _words(tower)

    assert torch.equal(_Packed(tower, MANY[::-1])(words), _Packed(tower, MANY)(words).flip(1))


def test_a_prompt_given_twice_has_its_features_twice(tower):
    first, second = _Packed(tower, [FEW[0], FEW[1], FEW[0]])(_words(tower))[0, [0, 2]]

    assert torch.equal(first, second)


def test_the_gradients_of_a_prompt_given_twice_add_up(tower, relative_error):
    words = _words(tower).requires_grad_()

    twice, once = (
        torch.autograd.grad(_Packed(tower, prompts)(words)[..., 0].sum(), words)[0] for prompts in (FEW * 2, FEW)
    )

    assert relative_error(twice, 2 * once) <= 1e-6


def test_a_second_step_gives_bit_identical_features_and_gradients(tower):
    packed, words = _Packed(tower, MANY), _words(tower)
    first = _with_gradient(packed, words)
    _with_gradient(packed, 2 * words)

    again = _with_gradient(packed, words)

    assert all(map(torch.equal, first, again))


def test_a_step_leaves_the_towers_weights_bit_identical(tower):
    before = {name: tensor.clone() for name, tensor in tower.module.state_dict().items()}

    _with_gradient(_Packed(tower, MANY), _words(tower))

    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.module.state_dict().items())


def test_packing_a_tower_asks_no_gradient_of_its_weights(tower):
    _with_gradient(_Packed(tower, FEW), _words(tower))

    assert all(parameter.grad is None for parameter in tower.module.parameters())


@pytest.mark.parametrize("prompts", [FEW, MANY], ids=["one stripe", "several stripes"])
def test_recomputed_features_and_gradients_are_bit_identical(tower, prompts):
    words = _words(tower)

    kept, recomputed = (_with_gradient(_Packed(tower, prompts, recompute=it), words) for it in (False, True))

    assert all(map(torch.equal, kept, recomputed))


@pytest.mark.parametrize("activation", ["GELU", "QuickGELU"])
def test_recompute_keeps_only_the_rows_between_the_passes(open_clip, activation):
    tower = _wide_tower(open_clip, activation)
    packed, words = _Packed(tower, MANY, recompute=True), _words(tower).requires_grad_()
    rows = packed.rows(words).nbytes

    with Memory() as memory:
        features = packed(words)

        assert memory.held <= rows + 2 * features.nbytes


@torch.no_grad()
def test_features_alone_keep_nothing_but_themselves(tower):
    packed, words = _Packed(tower, MANY), _words(tower)

    with Memory() as memory:
        features = packed(words)

        assert memory.held == features.nbytes


def test_a_finished_step_leaves_nothing_behind(tower):
    packed, words = _Packed(tower, MANY), _words(tower)

    with Memory() as memory:
        features = packed(words.requires_grad_())
        features.sum().backward()
        words.grad = None

        assert memory.held == features.nbytes


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["GELU", "QuickGELU"])
@pytest.mark.parametrize("prompts", [FEW, MANY], ids=["one stripe", "several stripes"])
def test_kept_bytes_is_more_and_less_than_twice_what_is_held_between_the_passes(
    open_clip, activation, precision, prompts
):
    tower = _wide_tower(open_clip, activation)
    packed, words = _Packed(tower, prompts, dtype=precision), _words(tower).requires_grad_()

    with Memory() as memory:
        features = packed(words)

        assert memory.held <= packed.kept_bytes <= 2 * memory.held
    assert features.requires_grad


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("activation", ["GELU", "QuickGELU"])
@pytest.mark.parametrize("prompts", [FEW, MANY, 30 * FEW[:1]], ids=["one stripe", "several stripes", "one prompt"])
@pytest.mark.parametrize("layers", [4, 24])
def test_kept_bytes_is_enough_for_the_peak_of_a_step(open_clip, activation, sets, prompts, layers):
    tower = _wide_tower(open_clip, activation, layers=layers)
    packed, words = _Packed(tower, prompts), _words(tower, sets=sets)

    with Memory() as memory:
        _with_gradient(packed, words)

    assert memory.peak <= sets * packed.kept_bytes


@pytest.mark.parametrize("share", [2, 5])
def test_an_encoder_in_chunks_peaks_below_its_limit(zoo, share):
    names, tower = _animals(), zoo.backbone("flat").text_tower
    layout = build_layout(tower, names, n_context=4)
    limit = _Packed(tower, layout.prompts(class_specific=False)).kept_bytes // share
    encoder = PromptEncoder(tower, layout, engine=Engine(max_memory=limit))
    context = torch.zeros(4, tower.width, requires_grad=True)

    with Memory() as memory:
        encoder(context).sum().backward()

    assert memory.peak <= limit


def test_an_encoder_limited_in_memory_works_in_chunks_and_says_so(zoo):
    tower = zoo.backbone("flat").text_tower
    layout = build_layout(tower, _animals(), n_context=4)

    encoder = PromptEncoder(tower, layout, engine=Engine(max_memory=400_000))

    assert encoder.summary()["chunks"] > 1


def test_an_encoder_with_room_works_in_one_chunk(zoo):
    tower = zoo.backbone("flat").text_tower

    assert PromptEncoder(tower, build_layout(tower, _animals(), n_context=4)).summary()["chunks"] == 1


def test_a_summary_says_which_way_was_taken_and_how_many_rows_it_saves(zoo):
    tower = zoo.backbone("flat").text_tower
    layout = build_layout(tower, ["cat", "sea"], n_context=2)

    summary = PromptEncoder(tower, layout, engine=Engine(precision="bfloat16")).summary()

    # SOS and two context vectors once; a name, the full stop and EOT twice
    rows = {"rows": 3 + 2 * 3, "full_rows": 2 * tower.context_length}
    assert summary == {"path": "packed", "precision": "bfloat16", **rows, "chunks": 1}


def test_plain_towers_are_packed(tower):
    assert supports_packing(tower)


@pytest.mark.parametrize("name", ["native-custom-blocks", "bert-mean-linear", "mt5-mean-linear"])
def test_customised_and_padded_towers_are_not_packed(zoo, name):
    assert not supports_packing(zoo.backbone(name).text_tower)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("mlp.gelu", nn.GELU(approximate="tanh")),
        ("mlp.gelu", nn.ReLU()),
        ("ln_1", nn.Identity()),
        ("ln_2", nn.RMSNorm(32)),
        ("ln_1_kv", nn.LayerNorm(32)),
        ("attn", nn.Identity()),
        ("attn", nn.MultiheadAttention(32, 4, bias=False)),
        ("attn", nn.MultiheadAttention(32, 4, kdim=16, vdim=16)),
    ],
    ids=lambda value: str(value).partition("(")[0],
)
def test_one_other_part_in_the_last_block_and_a_tower_is_not_packed(zoo, part, other):
    tower = zoo.backbone("flat").text_tower
    module = copy.deepcopy(tower.module)
    *way, last = part.split(".")
    setattr(module.transformer.resblocks[-1].get_submodule(".".join(way)), last, other)

    assert not supports_packing(CausalTextTower(module, tower.tokenizer, tower.encode_words))


class Memory(TorchDispatchMode):
    """Watches operations: the bytes of the tensors they made."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        """Bytes."""
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.held)
        return result

    @property
    def held(self) -> int:
        """Bytes of those that are still there."""
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(size for _, size in self._made.values())


def _tensors(tree: Any) -> list[Tensor]:
    """All but those in oneDNN's own layout, which have no storage to look at."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_mkldnn]


CANDIDATES = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1]])
"""Of none, one and two rows."""


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["read", "candidates"])
@pytest.mark.parametrize("prompts", [FEW, MANY], ids=["one stripe", "several stripes"])
def test_deep_rows_are_keys_and_values_of_their_block_and_nothing_else(
    tower, prompts, shared, recompute, relative_error
):
    """Differentiable prompt learning's operation, O(x) = MHA(q = LN(x), k = v = LN([x; P])), in every block that has
    rows, or the mixture of several such; the first block has none."""
    drawn = torch.Generator().manual_seed(3)
    count = len(tower.module.transformer.resblocks) - 1
    rows = [torch.randn(3, tower.width, generator=drawn).requires_grad_() for _ in range(count)]
    alphas = [torch.randn(3, generator=drawn).requires_grad_() for _ in range(count)]
    packed = _Packed(tower, prompts)

    def deep() -> list[Deep | None]:
        if not shared:
            return [None, *map(Deep, rows)]
        shares = [alpha.softmax(0) for alpha in alphas]
        return [None, *(Deep(its, share, CANDIDATES.float()) for its, share in zip(rows, shares, strict=True))]

    def encode(words: Tensor) -> Tensor:
        return packed.packed.encode(packed.rows(words), packed.shape, deep=deep(), recompute=recompute)

    results = []
    learned = rows + alphas if shared else rows
    for one in (encode, lambda words: _one_by_one_with_deep(tower, prompts, words, deep())):
        for its in learned:
            its.grad = None
        features, gradient = _with_gradient(one, _words(tower, sets=2))
        results.append([features, gradient, *(its.grad.clone() for its in learned)])
    assert max(map(relative_error, *results)) <= 3e-5  # alphas' gradients are small differences of large numbers


def _one_by_one_with_deep(
    tower: CausalTextTower, prompts: list[Path], words: Tensor, deep: list[Deep | None]
) -> Tensor:
    """Each prompt and each candidate alone through open_clip's own parts."""
    module, found = tower.module, []
    for prompt in prompts:
        x = words[:, [_id(element) for element in prompt]] + module.positional_embedding[: len(prompt)]
        for block, its in zip(module.transformer.resblocks, deep, strict=True):
            total = 0
            for share, rows in its.candidates() if its else [(1.0, x[0, :0])]:
                keys = block.ln_1(torch.cat([rows.expand(len(x), -1, -1), x], dim=1))
                mask = nn.functional.pad(module.attn_mask[: len(prompt), : len(prompt)], (len(rows), 0))
                total += share * block.attn(block.ln_1(x), keys, keys, need_weights=False, attn_mask=mask)[0]
            x = x + block.ls_1(total)
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        found.append(x[:, -1])
    return torch.stack(found, dim=1)


class _Packed:
    """Words' vectors (g, vocabulary, w) -> every prompt's row at EOT (g, c, w), by the packed tower."""

    def __init__(
        self,
        tower: CausalTextTower,
        prompts: list[Path],
        *,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
    ) -> None:
        tree = build_tree(prompts)
        self.packed, self.shape = PackedTower(tower, dtype), Shape.of(tree, tower.device, dtype)
        self.recompute = recompute
        self.kept_bytes = self.packed.kept_bytes(tree)
        self.ids = torch.tensor([VOCABULARY - 1 if element is None else _id(element) for element in tree.elements])
        self.positions = tower.module.positional_embedding.detach()[tree.positions]  # (r, w)

    def rows(self, words: Tensor) -> Tensor:
        return words[:, self.ids] + self.positions

    def __call__(self, words: Tensor) -> Tensor:
        return self.packed.encode(self.rows(words), self.shape, recompute=self.recompute)


def _one_by_one(tower: CausalTextTower, prompts: list[Path], words: Tensor) -> Tensor:
    """The same by open_clip's own transformer."""
    module, found = tower.module, []
    for prompt in prompts:
        rows = words[:, [_id(element) for element in prompt]] + module.positional_embedding[: len(prompt)]
        mask = module.attn_mask[: len(prompt), : len(prompt)]
        found.append(module.transformer(rows, attn_mask=mask)[:, -1])
    return torch.stack(found, dim=1)


def _with_gradient(encode: Any, words: Tensor) -> tuple[Tensor, Tensor]:
    """Features, and the words' gradient of one fixed random sum of them."""
    words = words.clone().requires_grad_()
    features = encode(words)
    (features * _direction(features)).sum().backward()
    return features.detach(), words.grad


def _direction(features: Tensor) -> Tensor:
    return torch.randn(features.shape, generator=torch.Generator().manual_seed(1))


def _words(tower: CausalTextTower, *, sets: int = 1) -> Tensor:
    return 0.3 * torch.randn(sets, VOCABULARY, tower.width, generator=torch.Generator().manual_seed(0))


def _id(element: Any) -> int:
    """A context vector's word is its number."""
    return (element[1] if isinstance(element, tuple) else element) % VOCABULARY


def _animals() -> list[str]:
    animals = ("cat", "dog", "fox", "owl", "bear")
    return [f"{colour} {animal}" for colour in ("red", "grey", "black") for animal in animals]


def _wide_tower(open_clip: Any, activation: str, *, layers: int = 4) -> CausalTextTower:
    """Wide enough that nothing but the tower's rows counts."""
    kind = {"GELU": nn.GELU, "QuickGELU": open_clip.transformer.QuickGELU}[activation]
    sizes = {"context_length": 16, "vocab_size": VOCABULARY, "width": 256, "heads": 4, "layers": layers}
    module = open_clip.transformer.TextTransformer(**sizes, act_layer=kind).eval().requires_grad_(False)
    return CausalTextTower(module, tokenizer=None, encode_words=None)
