"""How torchvision's blocks are taken apart."""

from __future__ import annotations

from torch import nn
from torchvision.models import convnext, efficientnet, mobilenetv2, mobilenetv3, regnet, resnet, vision_transformer
from torchvision.models import swin_transformer as swin

from greenprune.models.attention import SelfAttention, WindowAttention
from greenprune.models.residual import PlainBlock, Scale
from greenprune.models.splitting import Split, activated, chain, stream, transformer


def _basic_block(block: resnet.BasicBlock) -> nn.Module:
    branch = chain(block.conv1, block.bn1, nn.ReLU(inplace=True), block.conv2, block.bn2)
    return activated(branch, block.downsample, nn.ReLU(inplace=True))


def _bottleneck(block: resnet.Bottleneck) -> nn.Module:
    first = (block.conv1, block.bn1, nn.ReLU(inplace=True))
    branch = chain(*first, block.conv2, block.bn2, nn.ReLU(inplace=True), block.conv3, block.bn3)
    return activated(branch, block.downsample, nn.ReLU(inplace=True))


def _regnet_block(block: regnet.ResBottleneckBlock) -> nn.Module:
    return activated(block.f, block.proj, block.activation)


def _mobilenet_v2_block(block: mobilenetv2.InvertedResidual) -> nn.Module:
    return stream(block.conv) if block.use_res_connect else PlainBlock(block.conv)


def _mobilenet_v3_block(block: mobilenetv3.InvertedResidual) -> nn.Module:
    return stream(block.block) if block.use_res_connect else PlainBlock(block.block)


def _efficientnet_block(block: efficientnet.MBConv | efficientnet.FusedMBConv) -> nn.Module:
    if not block.use_res_connect:
        return PlainBlock(block.block)
    return stream(nn.Sequential(block.block, block.stochastic_depth))


def _convnext_block(block: convnext.CNBlock) -> nn.Module:
    return stream(nn.Sequential(block.block, Scale(block.layer_scale), block.stochastic_depth))


def _vit_block(block: vision_transformer.EncoderBlock) -> nn.Module:
    attention = nn.Sequential(block.ln_1, _self_attention(block.self_attention), block.dropout)
    return transformer(attention, nn.Sequential(block.ln_2, block.mlp))


def _self_attention(attention: nn.MultiheadAttention) -> SelfAttention:
    plain = attention.batch_first and attention.bias_k is None and not attention.add_zero_attn
    if not plain or not isinstance(attention.in_proj_weight, nn.Parameter):
        raise AttributeError("its attention is not plain self-attention with the batch first")
    width = attention.embed_dim
    qkv = nn.Linear(width, 3 * width, bias=False, device="meta")
    qkv.weight = attention.in_proj_weight
    qkv.bias = attention.in_proj_bias
    return SelfAttention(qkv, attention.out_proj, attention.num_heads, attention.dropout)


def _swin_block(block: swin.SwinTransformerBlock) -> nn.Module:
    attention = nn.Sequential(block.norm1, _window_attention(block.attn), block.stochastic_depth)
    return transformer(attention, nn.Sequential(block.norm2, block.mlp, block.stochastic_depth))


def _swin_v2_block(block: swin.SwinTransformerBlockV2) -> nn.Module:
    attention = nn.Sequential(_window_attention(block.attn), block.norm1, block.stochastic_depth)
    return transformer(attention, nn.Sequential(block.mlp, block.norm2, block.stochastic_depth))


def _window_attention(attention: swin.ShiftedWindowAttention) -> nn.Module:
    second = isinstance(attention, swin.ShiftedWindowAttentionV2)
    converted = WindowAttention(
        attention.qkv,
        attention.proj,
        heads=attention.num_heads,
        window=(attention.window_size[0], attention.window_size[1]),
        shift=(attention.shift_size[0], attention.shift_size[1]),
        position_index=attention.relative_position_index,
        table=None if second else attention.relative_position_bias_table,
        coordinates=attention.relative_coords_table if second else None,
        bias_mlp=attention.cpb_mlp if second else None,
        logit_scale=attention.logit_scale if second else None,
        dropout=attention.attention_dropout,
    )
    return nn.Sequential(converted, nn.Dropout(attention.dropout)) if attention.dropout else converted


SPLITS: dict[type[nn.Module], Split] = {
    resnet.BasicBlock: _basic_block,
    resnet.Bottleneck: _bottleneck,
    regnet.ResBottleneckBlock: _regnet_block,
    mobilenetv2.InvertedResidual: _mobilenet_v2_block,
    mobilenetv3.InvertedResidual: _mobilenet_v3_block,
    efficientnet.MBConv: _efficientnet_block,
    efficientnet.FusedMBConv: _efficientnet_block,
    convnext.CNBlock: _convnext_block,
    vision_transformer.EncoderBlock: _vit_block,
    swin.SwinTransformerBlock: _swin_block,
    swin.SwinTransformerBlockV2: _swin_v2_block,
}
