"""How timm's blocks are taken apart; an optional dependency, imported only if a network comes from there."""

from __future__ import annotations

from typing import Any

from timm.models import convnext, resnet, vision_transformer
from torch import nn
from torchvision.ops.misc import Permute

from greenprune.models.attention import SelfAttention
from greenprune.models.residual import Scale
from greenprune.models.splitting import Split, activated, chain, stream, transformer


def _basic_block(block: Any) -> nn.Module:
    hidden = (block.conv1, block.bn1, block.drop_block, block.act1, block.aa)
    branch = chain(*hidden, block.conv2, block.bn2, block.se, block.drop_path)
    return activated(branch, block.downsample, block.act2)


def _bottleneck(block: Any) -> nn.Module:
    hidden = (block.conv1, block.bn1, block.act1, block.conv2, block.bn2, block.drop_block, block.act2, block.aa)
    branch = chain(*hidden, block.conv3, block.bn3, block.se, block.drop_path)
    return activated(branch, block.downsample, block.act3)


def _convnext_block(block: Any) -> nn.Module:
    scale = None if block.gamma is None else Scale(block.gamma, (-1, 1, 1))
    if block.use_conv_mlp:
        branch = chain(block.conv_dw, block.norm, *_mlp(block.mlp), scale, block.drop_path)
    else:
        inner = (Permute([0, 2, 3, 1]), block.norm, *_mlp(block.mlp), Permute([0, 3, 1, 2]))
        branch = chain(block.conv_dw, *inner, scale, block.drop_path)
    return stream(branch, block.shortcut)


def _vit_block(block: Any) -> nn.Module:
    attention = chain(block.norm1, *_attention(block.attn), block.ls1, block.drop_path1)
    return transformer(attention, chain(block.norm2, *_mlp(block.mlp), block.ls2, block.drop_path2))


def _mlp(mlp: Any) -> tuple[nn.Module, ...]:
    """The layers of timm's plain MLP; any other stays whole, and its hidden channels with it."""
    if type(mlp).__name__ != "Mlp":
        return (mlp,)
    return (mlp.fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2)


def _attention(attention: Any) -> tuple[nn.Module, ...]:
    """Timm's plain attention with removable heads; any other stays whole, and its heads with it."""
    extras = (getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate"))
    plain = type(attention).__name__ == "Attention" and all(
        extra is None or type(extra) is nn.Identity for extra in extras
    )
    if not plain:
        return (attention,)
    heads = SelfAttention(attention.qkv, attention.proj, attention.num_heads, attention.attn_drop.p)
    return heads, attention.proj_drop


SPLITS: dict[type[nn.Module], Split] = {
    resnet.BasicBlock: _basic_block,
    resnet.Bottleneck: _bottleneck,
    convnext.ConvNeXtBlock: _convnext_block,
    vision_transformer.Block: _vit_block,
}
