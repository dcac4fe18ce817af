"""Which block classes can be gated, and how each is taken apart into shortcut, branch and activation.

A network is converted in place: each block of a known class is exchanged for the same modules in the form of a
:class:`ResidualBlock` (or a chain of them), which computes the same. The parameters stay the same objects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torchvision.models import convnext, efficientnet, mobilenetv2, mobilenetv3, regnet, resnet, vision_transformer
from torchvision.models import swin_transformer as swin
from torchvision.ops.misc import Permute

from greenprune.models.attention import SelfAttention, WindowAttention
from greenprune.models.residual import PlainBlock, ResidualBlock, Scale, follow_mode, with_hooks_of
from greenprune.models.sameness import BlockError, check_same, correct_activated, record_inputs, refuse_lost_hooks

Block = TypeVar("Block", bound=nn.Module)
Split = Callable[[Any], nn.Module]

_SPLITS: dict[type[nn.Module], Split] = {}

# What gating changes of a block, besides its modules; a gate that is not there is no module.
_GATING = ("gate", "every", "slots", "channels_left")


def register_block(kind: type[Block]) -> Callable[[Callable[[Block], nn.Module]], Callable[[Block], nn.Module]]:
    """Teach greenprune a block class: decorate the function that takes a block of it apart.

    The function gets a block and returns a :class:`ResidualBlock` built of the block's own modules, or an
    :class:`torch.nn.Sequential` of several, one for each shortcut. Channels inside a branch can be gated if the branch
    is an :class:`torch.nn.Sequential`. What it returns is compared with the block on a real input before it is used.

    Example::

        @register_block(MyBlock)
        def split(block: MyBlock) -> nn.Module:
            branch = nn.Sequential(block.conv1, block.norm1, nn.ReLU(), block.conv2, block.norm2)
            return ResidualBlock(branch, nn.Identity(), nn.ReLU(), input_activated=True)
    """

    def register(split: Callable[[Block], nn.Module]) -> Callable[[Block], nn.Module]:
        _SPLITS[kind] = split
        return split

    return register


def convert_blocks(model: nn.Module, example: Tensor | None = None) -> list[str]:
    """Exchange every block of a known class for its taken-apart form, in place.

    Args:
        model: An unwrapped network on any device.
        example: An input of the network, on its device. With it, every converted block is run beside the original, and
            the calls of every block are counted.

    Returns:
        Paths of the blocks, those that were there in this form already included, in the order of the network.

    Raises:
        BlockError: There is no block to gate, or one cannot be taken apart, or is used in two places or called twice.
    """
    _load_timm_splits(model)
    if type(model) in _SPLITS or isinstance(model, ResidualBlock | PlainBlock):
        raise BlockError(
            f"the network is itself a block ({type(model).__name__}); put it into a torch.nn.Sequential first"
        )
    found = _outermost({name: module for name, module in model.named_modules() if type(module) in _SPLITS})
    inputs = {} if example is None else record_inputs(model, found, example)
    for name, block in found.items():
        split = _take_apart(name, block)
        if name in inputs:
            check_same(name, block, split, inputs[name])
            correct_activated(split, inputs[name])
        refuse_lost_hooks(name, block, split)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, with_hooks_of(split, block))
    blocks = [name for name, module in model.named_modules() if isinstance(module, ResidualBlock | PlainBlock)]
    if not any(isinstance(model.get_submodule(name), ResidualBlock) for name in blocks):
        raise BlockError(_nothing_to_gate(model))
    for name in blocks:
        inner = next((other for other in blocks if other.startswith(f"{name}.")), None)
        if inner is not None:
            raise BlockError(f"{inner} lies inside the block {name}; expected a chain of blocks, not one in another")
    _refuse_shared(model)
    return blocks


@contextmanager
def put_back_on_failure(model: nn.Module) -> Iterator[None]:
    """Within, a network is taken apart and gated; if that fails, however, its modules are again what they were.

    Args:
        model: The unwrapped network.
    """
    children = [(module, dict(module._modules.items())) for module in model.modules()]
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock | PlainBlock)]
    gating = [{name: copy.copy(vars(block)[name]) for name in _GATING if name in vars(block)} for block in blocks]
    try:
        yield
    except BaseException:
        for module, before in children:
            if dict(module._modules.items()) != before:
                module._modules.clear()
                module._modules.update(before)
        for block, kept in zip(blocks, gating, strict=True):
            vars(block).update(kept)
        raise


def _outermost(blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The blocks that do not lie inside another one of them."""
    found: dict[str, nn.Module] = {}
    for name, block in blocks.items():  # an outer one comes first
        if not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = block
    return found


def _nothing_to_gate(model: nn.Module) -> str:
    own = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.nn.")}
    made_of = ", ".join(sorted(kind.__name__ for kind in own - {type(model)})) or "torch.nn's layers alone"
    return (
        f"{type(model).__name__} has no residual block that greenprune knows; it is made of {made_of}. "
        "Expected a class registered with greenprune.register_block (docs/networks.md)"
    )


def _take_apart(name: str, block: nn.Module) -> nn.Module:
    try:
        split = _SPLITS[type(block)](block)
    except AttributeError as error:
        raise BlockError(f"{name}: a {type(block).__name__} cannot be taken apart: {error}") from None
    inside = split.modules() if isinstance(split, nn.Module) else ()
    if not any(isinstance(module, ResidualBlock | PlainBlock) for module in inside):
        raise BlockError(
            f"{name}: the function registered for {type(block).__name__} gave a {type(split).__name__} without a "
            "ResidualBlock; expected a ResidualBlock or a torch.nn.Sequential of them"
        )
    follow_mode(split, block)
    return split


def _refuse_shared(model: nn.Module) -> None:
    """Refuse a block, or a tensor of a branch, that the network uses in a second place.

    Raises:
        BlockError: There is one; the message names both places.
    """
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ResidualBlock | PlainBlock):
            for path, tensor in _tensors(module.branch, f"{name}.branch"):
                owners.setdefault(id(tensor), path)
    for path, tensor in _tensors(model):
        first = owners.get(id(tensor), path)
        if first != path:
            raise BlockError(
                f"{first} is also {path}: a unit that is used in two places cannot be removed; expected blocks that "
                "share nothing with the rest of the network"
            )


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by every path that leads to them."""
    yield from module.named_parameters(prefix, remove_duplicate=False)
    yield from module.named_buffers(prefix, remove_duplicate=False)


# torchvision.


def _chain(*modules: nn.Module | None) -> nn.Sequential:
    """The modules in a row, without those that are not there or do nothing."""
    there = [module for module in modules if module is not None and type(module) is not nn.Identity]
    return nn.Sequential(*there)


def _activated(branch: nn.Module, shortcut: nn.Module | None, activation: nn.Module) -> ResidualBlock:
    """A block whose sum is activated, in a network in which every block is, and the first one's input too."""
    idempotent = isinstance(activation, nn.ReLU | nn.ReLU6 | nn.Identity)
    return ResidualBlock(branch, shortcut or nn.Identity(), activation, input_activated=idempotent)


def _stream(branch: nn.Module, shortcut: nn.Module | None = None) -> ResidualBlock:
    """A block whose sum is not activated, as in inverted residuals and transformers."""
    return ResidualBlock(branch, shortcut or nn.Identity(), nn.Identity(), input_activated=True)


@register_block(resnet.BasicBlock)
def _basic_block(block: resnet.BasicBlock) -> nn.Module:
    branch = _chain(block.conv1, block.bn1, nn.ReLU(inplace=True), block.conv2, block.bn2)
    return _activated(branch, block.downsample, nn.ReLU(inplace=True))


@register_block(resnet.Bottleneck)
def _bottleneck(block: resnet.Bottleneck) -> nn.Module:
    first = (block.conv1, block.bn1, nn.ReLU(inplace=True))
    branch = _chain(*first, block.conv2, block.bn2, nn.ReLU(inplace=True), block.conv3, block.bn3)
    return _activated(branch, block.downsample, nn.ReLU(inplace=True))


@register_block(regnet.ResBottleneckBlock)
def _regnet_block(block: regnet.ResBottleneckBlock) -> nn.Module:
    return _activated(block.f, block.proj, block.activation)


@register_block(mobilenetv2.InvertedResidual)
def _mobilenet_v2_block(block: mobilenetv2.InvertedResidual) -> nn.Module:
    return _stream(block.conv) if block.use_res_connect else PlainBlock(block.conv)


@register_block(mobilenetv3.InvertedResidual)
def _mobilenet_v3_block(block: mobilenetv3.InvertedResidual) -> nn.Module:
    return _stream(block.block) if block.use_res_connect else PlainBlock(block.block)


@register_block(efficientnet.MBConv)
@register_block(efficientnet.FusedMBConv)
def _efficientnet_block(block: efficientnet.MBConv | efficientnet.FusedMBConv) -> nn.Module:
    if not block.use_res_connect:
        return PlainBlock(block.block)
    return _stream(nn.Sequential(block.block, block.stochastic_depth))


@register_block(convnext.CNBlock)
def _convnext_block(block: convnext.CNBlock) -> nn.Module:
    return _stream(nn.Sequential(block.block, Scale(block.layer_scale), block.stochastic_depth))


@register_block(vision_transformer.EncoderBlock)
def _vit_block(block: vision_transformer.EncoderBlock) -> nn.Module:
    attention = nn.Sequential(block.ln_1, _self_attention(block.self_attention), block.dropout)
    chain = nn.Sequential()
    chain.add_module("attention", _stream(attention))
    chain.add_module("mlp", _stream(nn.Sequential(block.ln_2, block.mlp)))
    return chain


def _self_attention(attention: nn.MultiheadAttention) -> SelfAttention:
    plain = attention.batch_first and attention.bias_k is None and not attention.add_zero_attn
    if not plain or not isinstance(attention.in_proj_weight, nn.Parameter):
        raise AttributeError("its attention is not plain self-attention with the batch first")
    width = attention.embed_dim
    qkv = nn.Linear(width, 3 * width, bias=False, device="meta")
    qkv.weight = attention.in_proj_weight
    qkv.bias = attention.in_proj_bias
    return SelfAttention(qkv, attention.out_proj, attention.num_heads, attention.dropout)


@register_block(swin.SwinTransformerBlock)
def _swin_block(block: swin.SwinTransformerBlock) -> nn.Module:
    chain = nn.Sequential()
    attention = nn.Sequential(block.norm1, _window_attention(block.attn), block.stochastic_depth)
    chain.add_module("attention", _stream(attention))
    chain.add_module("mlp", _stream(nn.Sequential(block.norm2, block.mlp, block.stochastic_depth)))
    return chain


@register_block(swin.SwinTransformerBlockV2)
def _swin_v2_block(block: swin.SwinTransformerBlockV2) -> nn.Module:
    chain = nn.Sequential()
    attention = nn.Sequential(_window_attention(block.attn), block.norm1, block.stochastic_depth)
    chain.add_module("attention", _stream(attention))
    chain.add_module("mlp", _stream(nn.Sequential(block.mlp, block.norm2, block.stochastic_depth)))
    return chain


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


# timm, an optional dependency: looked at only if the network comes from there.


def _load_timm_splits(model: nn.Module) -> None:
    if not any(type(module).__module__.startswith("timm.") for module in model.modules()):
        return
    from timm.models import convnext as timm_convnext
    from timm.models import resnet as timm_resnet
    from timm.models import vision_transformer as timm_vit

    _SPLITS.setdefault(timm_resnet.BasicBlock, _timm_basic_block)
    _SPLITS.setdefault(timm_resnet.Bottleneck, _timm_bottleneck)
    _SPLITS.setdefault(timm_convnext.ConvNeXtBlock, _timm_convnext_block)
    _SPLITS.setdefault(timm_vit.Block, _timm_vit_block)


def _timm_basic_block(block: Any) -> nn.Module:
    hidden = (block.conv1, block.bn1, block.drop_block, block.act1, block.aa)
    branch = _chain(*hidden, block.conv2, block.bn2, block.se, block.drop_path)
    return _activated(branch, block.downsample, block.act2)


def _timm_bottleneck(block: Any) -> nn.Module:
    hidden = (block.conv1, block.bn1, block.act1, block.conv2, block.bn2, block.drop_block, block.act2, block.aa)
    branch = _chain(*hidden, block.conv3, block.bn3, block.se, block.drop_path)
    return _activated(branch, block.downsample, block.act3)


def _timm_convnext_block(block: Any) -> nn.Module:
    scale = None if block.gamma is None else Scale(block.gamma, (-1, 1, 1))
    if block.use_conv_mlp:
        branch = _chain(block.conv_dw, block.norm, *_timm_mlp(block.mlp), scale, block.drop_path)
    else:
        inner = (Permute([0, 2, 3, 1]), block.norm, *_timm_mlp(block.mlp), Permute([0, 3, 1, 2]))
        branch = _chain(block.conv_dw, *inner, scale, block.drop_path)
    return _stream(branch, block.shortcut)


def _timm_vit_block(block: Any) -> nn.Module:
    chain = nn.Sequential()
    attention = _timm_attention(block.attn)
    chain.add_module("attention", _stream(_chain(block.norm1, *attention, block.ls1, block.drop_path1)))
    mlp = _chain(block.norm2, *_timm_mlp(block.mlp), block.ls2, block.drop_path2)
    chain.add_module("mlp", _stream(mlp))
    return chain


def _timm_mlp(mlp: Any) -> tuple[nn.Module, ...]:
    """The layers of timm's plain MLP; any other stays whole, and its hidden channels with it."""
    if type(mlp).__name__ != "Mlp":
        return (mlp,)
    return (mlp.fc1, mlp.act, mlp.drop1, mlp.norm, mlp.fc2, mlp.drop2)


def _timm_attention(attention: Any) -> tuple[nn.Module, ...]:
    """Timm's plain attention with removable heads; any other stays whole, and its heads with it."""
    extras = (getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate"))
    plain = type(attention).__name__ == "Attention" and all(
        extra is None or type(extra) is nn.Identity for extra in extras
    )
    if not plain:
        return (attention,)
    heads = SelfAttention(attention.qkv, attention.proj, attention.num_heads, attention.attn_drop.p)
    return heads, attention.proj_drop
