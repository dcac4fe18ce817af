"""Layers of transformers: every kind that is known, and what transformers asks of them beside tokens."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from families import BATCH, TRANSFORMERS, TRANSFORMERS_VIT, transformers_network
from torch import Tensor, nn
from torch.nn import functional

from greenprune import BudgetConfig, GateConfig, Pruner, UserError
from greenprune.gating import find_gates
from greenprune.models import BlockError, ResidualBlock, convert_blocks, find_channels, residual_blocks
from greenprune.models.attention import SeparateSelfAttention
from greenprune.surgery import Operation, carry_out

IMAGES = torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(BATCH, 5, 24, generator=torch.Generator().manual_seed(1))
DROPPING = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.2}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def vit(**options: Any) -> Any:
    return transformers_network("ViT", intermediate_size=48, **TRANSFORMERS_VIT, **options)


def pruner_of(model: nn.Module) -> Pruner:
    gate, budget = GateConfig(units=["block", "channel"]), BudgetConfig(target=0.9)
    return Pruner(model, IMAGES, total_steps=100, gate=gate, budget=budget)


def labels() -> Tensor:
    return torch.arange(BATCH) % 5


class Called(nn.Module):
    """A layer called as transformers calls it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.layer(tokens, attention_mask=None)
        return out


@pytest.mark.parametrize(
    ("kind", "gated_mlp"),
    [
        *((kind, False) for kind in ("ViT", "DeiT", "IJepa", "ViTMAE", "ViTMSN", "Dinov2", "Dinov2WithRegisters")),
        *((kind, True) for kind in ("Dinov2", "Dinov2WithRegisters")),
    ],
)
def test_a_layer_computes_and_drops_the_same_with_the_same_parameters(kind: str, gated_mlp: bool) -> None:
    transformers = pytest.importorskip("transformers", minversion=TRANSFORMERS)
    splits = pytest.importorskip("greenprune.models.transformers_splits")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=24, num_attention_heads=3, use_swiglu_ffn=gated_mlp, layerscale_value=0.5, **DROPPING
    )
    config._attn_implementation = "sdpa"
    (layer,) = [layer for layer in splits.SPLITS if layer.__name__ == f"{kind}Layer"]
    original = Called(layer(config))
    model = copy.deepcopy(original)
    parameters = set(model.parameters())
    assert convert_blocks(model, TOKENS) == ["layer.attention", "layer.mlp"]
    assert set(model.parameters()) == parameters
    assert isinstance(model.layer, layer)
    for training in (False, True):
        outs = []
        for network in (original, model):
            torch.manual_seed(2)
            outs.append(network.train(training)(TOKENS))
        assert torch.allclose(*outs, atol=1e-5)
    found = find_channels(model)
    assert [one.label for one in found.sets.values()] == (["heads"] if gated_mlp else ["heads", "hidden"])
    assert len(found.notes) == gated_mlp
    assert all("the channels inside a Dinov2" in note for note in found.notes)


def test_a_head_takes_its_queries_keys_and_values_along() -> None:
    attention = SeparateSelfAttention(*(nn.Linear(8, 8) for _ in range(4)), heads=4)
    before = copy.deepcopy(attention)
    model = nn.Sequential(ResidualBlock(nn.Sequential(attention), nn.Identity(), nn.Identity(), input_activated=True))
    carry_out([Operation("remove", "0:heads", 1, 0.1, "off", (0, 2))], model)
    kept = [2, 3, 6, 7]
    for name in ("query", "key", "value"):
        old, new = before.get_submodule(name), attention.get_submodule(name)
        assert torch.equal(new.weight, old.weight[kept])
        assert torch.equal(new.bias, old.bias[kept])
        assert new.out_features == 4
    assert torch.equal(attention.proj.weight, before.proj.weight[:, kept])
    assert (attention.heads, attention.head_dim, attention.proj.in_features) == (2, 2, 4)
    x = torch.randn(2, 5, 8)
    query, key, value = (
        functional.linear(x, layer.weight, layer.bias) for layer in (before.query, before.key, before.value)
    )
    outs = []
    for head in (1, 3):
        at = slice(2 * head, 2 * head + 2)
        weights = (query[..., at] @ key[..., at].transpose(1, 2) / 2**0.5).softmax(-1)
        outs.append(weights @ value[..., at])
    expected = torch.cat(outs, -1) @ before.proj.weight[:, kept].T + before.proj.bias
    assert torch.allclose(attention(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"attention_mask": torch.arange(17).expand(BATCH, 17) < 9}, r"^attention_mask: a mask is not valid"),
        ({"output_attentions": True}, r"^output_attentions: True is not valid .* expected False$"),
        ({"is_causal": True}, r"^is_causal: a value is not valid .* expected None$"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_change_the_attention_is_refused(given: dict[str, Any], complaint: str) -> None:
    model = vit()
    convert_blocks(model, IMAGES)
    with pytest.raises(UserError, match=complaint):
        model(IMAGES, **given)


def test_attention_weights_that_the_config_asks_for_are_refused() -> None:
    model = vit(attn_implementation="eager")
    convert_blocks(model, IMAGES)
    model.config.output_attentions = True
    with pytest.raises(UserError, match=r"^output_attentions: True is not valid"):
        model(IMAGES)


def test_what_does_not_concern_a_layer_is_taken() -> None:
    model = vit()
    convert_blocks(model, IMAGES)
    expected = model.eval()(IMAGES).logits
    nothing = {"attention_mask": None, "output_attentions": False, "is_causal": False}
    assert torch.equal(model(IMAGES, num_items_in_batch=torch.tensor(BATCH), **nothing).logits, expected)


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "ConvNext", "ResNet"])
def test_hidden_states_are_those_of_the_layers_as_before(name: str) -> None:
    options = TRANSFORMERS_VIT if name in ("ViT", "Dinov2") else {"hidden_sizes": [8, 16], "depths": [1, 2]}
    options = options | ({"num_stages": 2} if name == "ConvNext" else {})
    model = transformers_network(name, **options).eval()
    expected = copy.deepcopy(model)(IMAGES, output_hidden_states=True).hidden_states
    blocks = convert_blocks(model, IMAGES)
    got = model(IMAGES, output_hidden_states=True).hidden_states
    assert len(got) == len(expected) == 3
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    carry_out([Operation("remove", block, 1, 0.1, "off") for block in blocks], model)
    assert len(model(IMAGES, output_hidden_states=True).hidden_states) == 3


def test_a_backbone_that_asks_its_layers_for_hidden_states_gives_them_as_before() -> None:
    transformers = pytest.importorskip("transformers", minversion=TRANSFORMERS)
    config = transformers.Dinov2Config(**TRANSFORMERS_VIT, mlp_ratio=2, out_features=["stage1", "stage2"])
    model = transformers.Dinov2Backbone(config).eval()
    expected = copy.deepcopy(model)(IMAGES).feature_maps
    pruner_of(model)
    got = model(IMAGES).feature_maps
    assert len(got) == len(expected) == 2
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_layer_that_is_always_given_a_mask_is_refused() -> None:
    class Masked(Called):
        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = self.layer(tokens, torch.ones(BATCH, 1, 5, 5, dtype=torch.bool))
            return out

    with pytest.raises(BlockError, match=r"^layer: a ViTLayer that is called with more than its input cannot be taken"):
        convert_blocks(Masked(vit().vit.layers[0]), TOKENS)


def test_a_network_that_has_shown_its_hidden_states_before_goes_on_showing_them() -> None:
    """It has hooks by then, for the weights of its attention too, which it does not show any more."""
    model = vit().eval()
    expected = model(IMAGES, output_hidden_states=True).hidden_states
    convert_blocks(model, IMAGES)
    got = model(IMAGES, output_hidden_states=True).hidden_states
    assert len(got) == len(expected) == 3
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    with pytest.raises(UserError, match=r"^output_attentions: True is not valid"):
        model(IMAGES, output_attentions=True)


def test_hooks_of_an_attention_that_others_have_put_there_are_refused() -> None:
    model = vit()
    model(IMAGES, output_hidden_states=True)
    model.vit.layers[1].attention.register_forward_hook(lambda *_: None)
    with pytest.raises(BlockError, match=r"^vit\.layers\.1\.attention: a ViTAttention with hooks is taken apart"):
        convert_blocks(model, IMAGES)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpoints_of_activations_leave_the_gradients_as_they_are(when: str) -> None:
    """Switched on before the layers are taken apart or after it."""

    def gradients(checkpoints: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        model = vit()
        if checkpoints and when == "before":
            model.gradient_checkpointing_enable()
        pruner = pruner_of(model)
        if checkpoints and when == "after":
            model.gradient_checkpointing_enable()
        calls: list[object] = []
        residual_blocks(model)["vit.layers.1.mlp"].branch.register_forward_hook(lambda *_: calls.append(1))
        (model.train()(IMAGES, labels=labels()).loss + pruner.penalty()).backward()
        return [parameter.grad for parameter in model.parameters()], len(calls)

    expected, once = gradients(False)
    got, twice = gradients(True)
    assert (once, twice) == (1, 2)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(got, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_checkpoints_that_keep_no_gradient_are_refused() -> None:
    model = vit()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    pruner = pruner_of(model)
    model.train()(IMAGES)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        pruner.penalty()


def test_a_gated_network_is_pickled_and_copied() -> None:
    model = vit()
    pruner_of(model)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert find_gates(again).keys() == find_gates(model).keys()
        assert torch.equal(again.eval()(IMAGES).logits, model.eval()(IMAGES).logits)
