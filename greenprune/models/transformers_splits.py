"""How the vision layers of Hugging Face transformers are taken apart; imported only if a network comes from there.

Written for transformers 5.24, whose vision transformers have layers of two shapes, that of ViT and that of DINOv2.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchvision.ops.misc import Permute

from greenprune.config import UserError
from greenprune.models.attention import SeparateSelfAttention
from greenprune.models.residual import Scale
from greenprune.models.splitting import Split, activated, chain, stream

# What a layer may be given besides its input without using it: the loss and the recording of hidden states use it.
_NOT_OF_THE_LAYER = ("num_items_in_batch", "output_hidden_states")


class _TransformerLayer(nn.Module):
    """A layer of a transformer as two residual blocks, called as transformers calls its own layers.

    It is mixed into the class of the layer itself, by which transformers finds the layers whose activations are
    checkpointed (``gradient_checkpointing_enable``) and whose outputs are hidden states (``output_hidden_states``).

    Args:
        layer: The layer, whose settings for checkpoints of activations it takes over.
        attention: The branch of the attention.
        mlp: The branch of the MLP.
    """

    def __init__(self, layer: Any, attention: nn.Module, mlp: nn.Module) -> None:
        nn.Module.__init__(self)  # the layer's own would make its modules anew
        self.config = layer.attention.config
        self.attention = stream(attention)
        self.mlp = stream(mlp)
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if name in vars(layer):
                setattr(self, name, vars(layer)[name])

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Tokens [B, N, E] that have passed both blocks.

        Args:
            hidden_states: Tokens [B, N, E].
            attention_mask: Has to be None.
            **options: What transformers hands down to each layer; nothing that would change what it computes.

        Raises:
            UserError: There is a mask, attention weights are asked for, or another option is set.
        """
        if attention_mask is not None:
            raise UserError("attention_mask: a mask is not valid for a layer with gated heads; expected None")
        if options.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise UserError(
                "output_attentions: True is not valid for a layer with gated heads, which keeps no attention weights; "
                "expected False"
            )
        for name, value in options.items():
            if value is not None and value is not False and name not in _NOT_OF_THE_LAYER:
                raise UserError(f"{name}: a value is not valid for a layer with gated heads; expected None")
        out: Tensor = self.mlp(self.attention(hidden_states))
        return out


def _resnet_layer(block: Any) -> nn.Module:
    parts = [(layer.convolution, layer.normalization, layer.activation) for layer in block.layer]
    return activated(chain(*(part for layer in parts for part in layer)), block.shortcut, block.activation)


def _convnext_layer(block: Any) -> nn.Module:
    scale = None if block.layer_scale_parameter is None else Scale(block.layer_scale_parameter)
    hidden = (block.layernorm, block.pwconv1, block.act, block.pwconv2, scale)
    return stream(chain(block.dwconv, Permute([0, 2, 3, 1]), *hidden, Permute([0, 3, 1, 2]), block.drop_path))


def _vit_layer(block: Any) -> nn.Module:
    attention = chain(block.layernorm_before, _attention(block.attention), block.dropout)
    mlp = chain(block.layernorm_after, *_mlp(block.mlp), block.dropout)
    return _TAKEN_APART[type(block)](block, attention, mlp)


def _dinov2_layer(block: Any) -> nn.Module:
    first, second = Scale(block.layer_scale1.lambda1), Scale(block.layer_scale2.lambda1)
    attention = chain(block.norm1, _attention(block.attention), first, block.drop_path)
    mlp = chain(block.norm2, *_mlp(block.mlp), second, block.drop_path)
    return _TAKEN_APART[type(block)](block, attention, mlp)


def _attention(attention: Any) -> nn.Module:
    return SeparateSelfAttention(
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        attention.num_attention_heads,
        attention.attention_dropout,
    )


def _mlp(mlp: Any) -> tuple[nn.Module, ...]:
    """The layers of a plain MLP; a SwiGLU stays whole, and its hidden neurons with it."""
    if type(mlp).__name__.endswith("SwiGLUFFN"):
        return (mlp,)
    return mlp.fc1, mlp.activation_fn, mlp.fc2


# The layers by the package in transformers.models that they are from; an older release may lack some of the packages.
_CONVOLUTIONAL: dict[str, dict[str, Split]] = {
    "resnet": {"ResNetBasicLayer": _resnet_layer, "ResNetBottleNeckLayer": _resnet_layer},
    "convnext": {"ConvNextLayer": _convnext_layer},
}
_TRANSFORMERS: dict[str, dict[str, Split]] = {
    "vit": {"ViTLayer": _vit_layer},
    "deit": {"DeiTLayer": _vit_layer},
    "ijepa": {"IJepaLayer": _vit_layer},
    "vit_mae": {"ViTMAELayer": _vit_layer},
    "vit_msn": {"ViTMSNLayer": _vit_layer},
    "dinov2": {"Dinov2Layer": _dinov2_layer},
    "dinov2_with_registers": {"Dinov2WithRegistersLayer": _dinov2_layer},
}


def _there(table: dict[str, dict[str, Split]]) -> dict[type[nn.Module], Split]:
    """The layers that the installed release has."""
    found: dict[type[nn.Module], Split] = {}
    for package, layers in table.items():
        try:
            modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        except ImportError:
            continue
        found.update((vars(modeling)[name], split) for name, split in layers.items() if name in vars(modeling))
    return found


_KINDS = _there(_TRANSFORMERS)
_TAKEN_APART: dict[type[nn.Module], Callable[[Any, nn.Module, nn.Module], nn.Module]] = {
    kind: type(kind.__name__, (_TransformerLayer, kind), {"__module__": __name__, "__doc__": _TransformerLayer.__doc__})
    for kind in _KINDS
}
globals().update((kind.__name__, made) for kind, made in _TAKEN_APART.items())  # where pickle looks for them

SPLITS: dict[type[nn.Module], Split] = _there(_CONVOLUTIONAL) | _KINDS
