"""A trained network as a chain of plain layers: what is exported, and what its module file is written from.

Each module of the libraries that the networks come from is exchanged for one of ``torch.nn``, or for one of the small
classes in :mod:`greenprune.export.layers` and :mod:`greenprune.models.attention`. What does nothing at inference is
left out. The result is compared with the trained network before anything is written, so a library that changes the
meaning of an attribute is noticed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from greenprune.config import UserError
from greenprune.export import layers
from greenprune.models.attention import SelfAttention, SeparateSelfAttention, WindowAttention
from greenprune.models.channels import named_steps


class NoPlainForm(UserError):
    """A network that cannot be written as a chain of plain layers; the message names the module."""


def plain_network(model: nn.Module) -> nn.Sequential:
    """The network as a chain of named parts that computes the same at inference.

    Args:
        model: A network without gates; it is left as it is, and shares its tensors with the result.

    Raises:
        NoPlainForm: A module of it is of an unknown class.
    """
    parts = _look_up(_NETWORKS, model)
    if parts is not None:
        named = parts(model)
    elif _is_chain(model):
        named = {name if name.isidentifier() else f"part{name}": step for name, step in named_steps(model)}
    else:
        raise NoPlainForm(
            f"the network ({type(model).__name__}) has a forward of its own; expected torch.nn.Sequential, or a "
            "network that greenprune builds by its name"
        )
    network = nn.Sequential()
    for name, part in named.items():
        converted = _plain(part, name)
        if converted is not None:
            network.add_module(name, converted)
    return network.eval()


def fold_batch_norm(network: nn.Sequential) -> int:
    """Fold each batch normalisation that directly follows a convolution into it, in place.

    Returns:
        How many were folded.
    """
    folded = 0
    for chain in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        there: list[tuple[str, nn.Module]] = []
        for name, module in named_steps(chain):
            conv = there[-1][1] if there else None
            if isinstance(conv, nn.Conv2d) and isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                # In double precision, so that each weight is rounded once.
                there[-1] = there[-1][0], fuse_conv_bn_eval(conv.double(), module.double()).float()
                folded += 1
            else:
                there.append((name, module))
        for name, _ in list(named_steps(chain)):
            delattr(chain, name)
        for index, (name, module) in enumerate(there):
            chain.add_module(str(index) if name.isdigit() else name, module)
    return folded


def constructor_arguments(module: nn.Module) -> dict[str, Any]:
    """The arguments that make a module like this one: its attributes under the names of the parameters."""
    arguments = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if name in ("device", "dtype") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, name, parameter.default)  # some old name of another, as Hardtanh's min_value
        if name == "bias":
            value = value is not None
        if isinstance(value, Tensor) or value != parameter.default:
            arguments[name] = value
    return arguments


def _plain(module: nn.Module, path: str) -> nn.Module | None:
    """The module in its plain form; None if it does nothing at inference.

    Raises:
        NoPlainForm: Its class is unknown.
    """
    kind = f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"
    if isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd) or kind in _NOTHING:
        return None
    if type(module).__module__ == layers.__name__:
        return module
    convert = _look_up(_MODULES, module)
    if convert is not None:
        converted: nn.Module | None = convert(module, path)
        return converted
    if _is_chain(module):
        return _chain([step for _, step in named_steps(module)], path)
    leaf = _leaf(module)
    if leaf is None:
        raise NoPlainForm(f"{path} is a {kind}, which has no plain form")
    return leaf


def _is_chain(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _look_up(table: dict[str, Callable[..., Any]], module: nn.Module) -> Callable[..., Any] | None:
    """What a table has for a module's class, or for the one whose forward it has inherited."""
    for kind in type(module).__mro__:
        found = table.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}")
        if found is not None and getattr(kind, "forward", None) is type(module).forward:
            return found
    return None


def _chain(modules: list[nn.Module], path: str) -> nn.Module | None:
    converted = [_plain(module, f"{path}.{index}") for index, module in enumerate(modules)]
    there = [module for module in converted if module is not None]
    if len(there) < 2:
        return there[0] if there else None
    return nn.Sequential(*there)


def _leaf(module: nn.Module) -> nn.Module | None:
    """A layer of ``torch.nn`` made anew, with the same tensors; None if it is not one."""
    for kind in type(module).__mro__:
        if getattr(nn, kind.__name__, None) is kind and kind is not nn.Module:
            break
    else:
        return None
    if type(module).forward is not kind.forward or list(module.children()):
        return None
    weight = getattr(module, "weight", None)
    derived = isinstance(weight, Tensor) and "weight" not in module._parameters  # by a hook that normalises it
    return None if derived else _made_anew(kind, module)


def _made_anew(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    like = kind.__new__(kind)
    like.__dict__.update(module.__dict__)
    with torch.device("meta"):
        fresh = kind(**constructor_arguments(like))
    fresh.load_state_dict({name: tensor.detach() for name, tensor in module.state_dict().items()}, assign=True)
    return fresh


def _residual_block(block: Any, path: str) -> nn.Module:
    branch = _plain(block.branch, f"{path}.branch") or nn.Identity()
    return layers.ResidualBlock(
        branch, _plain(block.shortcut, f"{path}.shortcut"), _plain(block.activation, f"{path}.activation")
    )


def _self_attention(attention: Any, path: str) -> nn.Module:
    return SelfAttention(_layer(attention.qkv, path), _layer(attention.proj, path), attention.heads)


def _separate_self_attention(attention: Any, path: str) -> nn.Module:
    query, key, value = (_layer(layer, path) for layer in (attention.query, attention.key, attention.value))
    return SeparateSelfAttention(query, key, value, _layer(attention.proj, path), attention.heads)


def _window_attention(attention: Any, path: str) -> nn.Module:
    mlp = attention.bias_mlp
    if mlp is not None:
        children = (_plain(layer, f"{path}.bias_mlp") for layer in mlp)
        mlp = nn.Sequential(*(layer for layer in children if layer is not None))
    return WindowAttention(
        _layer(attention.qkv, path),
        _layer(attention.proj, path),
        heads=attention.heads,
        window=attention.window,
        shift=attention.shift,
        position_index=attention.position_index,
        table=_shared(attention.table),
        coordinates=attention.coordinates,
        bias_mlp=mlp,
        logit_scale=_shared(attention.logit_scale),
    )


def _layer(layer: nn.Module, path: str) -> Any:
    plain = _plain(layer, path)
    assert plain is not None
    return plain


def _shared(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach())


def _scale(weight: Tensor) -> nn.Module:
    scale = layers.Scale(tuple(weight.shape))
    scale.weight = nn.Parameter(weight.detach())
    return scale


def _position_embedding(weight: Tensor) -> nn.Module:
    embedding = layers.PositionEmbedding(*weight.shape[1:])
    embedding.weight = nn.Parameter(weight.detach())
    return embedding


def _class_tokens(weight: Tensor) -> nn.Module:
    tokens = layers.ClassTokens(*weight.shape[1:])
    tokens.weight = nn.Parameter(weight.detach())
    return tokens


def _squeeze_excitation(module: Any, path: str) -> nn.Module:
    chain = _chain([module.fc1, module.activation, module.fc2, module.scale_activation], path)
    return layers.SqueezeExcitation(chain or nn.Identity())


def _timm_squeeze_excitation(module: Any, path: str) -> nn.Module:
    if module.add_maxpool:
        raise NoPlainForm(f"{path} is a timm.SEModule with max pooling, which has no plain form")
    chain = _chain([module.fc1, module.bn, module.act, module.fc2, module.gate], path)
    return layers.SqueezeExcitation(chain or nn.Identity())


def _patch_merging(module: Any, path: str) -> nn.Module:
    return nn.Sequential(layers.PatchMerging(), _layer(module.norm, path), _layer(module.reduction, path))


def _patch_merging_v2(module: Any, path: str) -> nn.Module:
    return nn.Sequential(layers.PatchMerging(), _layer(module.reduction, path), _layer(module.norm, path))


def _timm_pool(module: Any, path: str) -> nn.Module | None:
    """Timm's pooling over all positions, as a mean; its other kinds have no plain form."""
    if not module.pool_type:
        return _plain(module.flatten, path)
    if module.pool_type not in ("avg", "fast"):
        raise NoPlainForm(f"{path} is timm's pooling {module.pool_type!r}, which has no plain form")
    flattens = getattr(module.pool, "flatten", False) is True or isinstance(module.flatten, nn.Flatten)
    return _pool() if flattens else nn.AdaptiveAvgPool2d(1)


def _timm_patches(module: Any, path: str) -> nn.Module:
    if module.dynamic_img_pad or not module.flatten:
        raise NoPlainForm(f"{path} is a timm.PatchEmbed for images of any size, which has no plain form")
    return nn.Sequential(_layer(module.proj, path), layers.Tokens(), _plain(module.norm, path) or nn.Identity())


def _timm_head(module: Any, path: str) -> nn.Module | None:
    names = ("global_pool", "norm", "flatten", "pre_logits", "fc")
    return _chain([getattr(module, name) for name in names if hasattr(module, name)], path)


def _timm_classifier(module: Any, path: str) -> nn.Module | None:
    return _chain([module.global_pool, module.fc, module.flatten], path)


def _transformers_layer_norm(norm: Any, _: str) -> nn.Module:
    return _made_anew(layers.LayerNorm2d if norm.data_format == "channels_first" else nn.LayerNorm, norm)


# How modules are exchanged, by the package and the name of their class.
_MODULES: dict[str, Callable[[Any, str], nn.Module | None]] = {
    "greenprune.ResidualBlock": _residual_block,
    "greenprune.PlainBlock": lambda block, path: _plain(block.branch, path),
    "greenprune.Scale": lambda scale, _: _scale(scale.weight.view(scale.shape)),
    "greenprune.SelfAttention": _self_attention,
    "greenprune.SeparateSelfAttention": _separate_self_attention,
    "greenprune.WindowAttention": _window_attention,
    "greenprune.SubsamplePad": lambda module, _: layers.SubsamplePad(module.stride, module.before, module.after),
    "torchvision.SqueezeExcitation": _squeeze_excitation,
    "torchvision.LayerNorm2d": lambda norm, _: _made_anew(layers.LayerNorm2d, norm),
    "torchvision.Permute": lambda module, _: layers.Permute(tuple(module.dims)),
    "torchvision.PatchMerging": _patch_merging,
    "torchvision.PatchMergingV2": _patch_merging_v2,
    "timm.SEModule": _timm_squeeze_excitation,
    "timm.LayerNorm2d": lambda norm, _: _made_anew(layers.LayerNorm2d, norm),
    "timm.LayerNorm": lambda norm, _: _made_anew(nn.LayerNorm, norm),
    "timm.LayerScale": lambda module, _: _scale(module.gamma),
    "timm.SelectAdaptivePool2d": _timm_pool,
    "timm.PatchEmbed": _timm_patches,
    "timm.NormMlpClassifierHead": _timm_head,
    "timm.ClassifierHead": _timm_classifier,
    "timm.ConvNeXtStage": lambda stage, path: _chain([stage.downsample, *stage.blocks], path),
    "timm.GELU": lambda *_: nn.GELU(),
    "timm.GELUTanh": lambda *_: nn.GELU("tanh"),
    "timm.Swish": lambda *_: nn.SiLU(),
    "timm.Sigmoid": lambda *_: nn.Sigmoid(),
    "timm.Tanh": lambda *_: nn.Tanh(),
    "timm.HardSwish": lambda *_: nn.Hardswish(),
    "timm.HardSigmoid": lambda *_: nn.Hardsigmoid(),
    "transformers.ResNetConvLayer": lambda m, path: _chain([m.convolution, m.normalization, m.activation], path),
    "transformers.ResNetShortCut": lambda m, path: _chain([m.convolution, m.normalization], path),
    "transformers.ResNetStage": lambda stage, path: _chain([*stage.layers], path),
    "transformers.ConvNextStage": lambda stage, path: _chain([*stage.downsampling_layer, *stage.layers], path),
    "transformers.ConvNextLayerNorm": _transformers_layer_norm,
    "transformers.GELUActivation": lambda *_: nn.GELU(),
    "transformers.GELUTanh": lambda *_: nn.GELU("tanh"),
    "transformers.SiLUActivation": lambda *_: nn.SiLU(),
}

# What does nothing at inference, beside torch.nn's Identity and dropouts.
_NOTHING = (
    "torchvision.StochasticDepth",
    "timm.DropPath",
    "timm.DropBlock2d",
    "timm.PatchDropout",
    "transformers.ConvNextDropPath",
)


def _pool() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def _resnet(model: Any) -> dict[str, nn.Module]:
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    stages = {f"layer{index}": getattr(model, f"layer{index}") for index in (1, 2, 3, 4)}
    return {"stem": stem, **stages, "pool": nn.Sequential(model.avgpool, nn.Flatten(1)), "head": model.fc}


def _features(model: Any) -> dict[str, nn.Module]:
    pool = getattr(model, "avgpool", None) or nn.AdaptiveAvgPool2d(1)
    return {"features": model.features, "pool": nn.Sequential(pool, nn.Flatten(1)), "head": model.classifier}


def _vit(model: Any) -> dict[str, nn.Module]:
    encoder = model.encoder
    return {
        "patches": nn.Sequential(model.conv_proj, layers.Tokens()),
        "class_token": _class_tokens(model.class_token),
        "positions": _position_embedding(encoder.pos_embedding),
        "blocks": encoder.layers,
        "norm": encoder.ln,
        "pool": layers.FirstToken(),
        "head": model.heads,
    }


def _timm_resnet(model: Any) -> dict[str, nn.Module]:
    stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
    stages = {f"layer{index}": getattr(model, f"layer{index}") for index in (1, 2, 3, 4)}
    return {"stem": stem, **stages, "pool": model.global_pool, "head": model.fc}


def _timm_vit(model: Any) -> dict[str, nn.Module]:
    known = model.global_pool in ("token", "avg") and model.attn_pool is None and not model.dynamic_img_size
    if not known or model.pos_embed is None:
        raise NoPlainForm("the network is a timm.VisionTransformer with a pooling or positions that have no plain form")
    prefix = [token for token in (model.cls_token, model.reg_token) if token is not None]
    tokens = {"class_token": _class_tokens(torch.cat(prefix, dim=1))} if prefix else {}
    positions = {"positions": _position_embedding(model.pos_embed)}
    skipped = 0 if model.pool_include_prefix else model.num_prefix_tokens
    pool = layers.FirstToken() if model.global_pool == "token" else layers.MeanToken(skipped)
    return {
        "patches": model.patch_embed,
        **(positions | tokens if model.no_embed_class else tokens | positions),
        "norm_before": model.norm_pre,
        "blocks": model.blocks,
        "norm": model.norm,
        "pool": pool,
        "pool_norm": model.fc_norm,
        "head": model.head,
    }


def _transformers_resnet(model: Any) -> dict[str, nn.Module]:
    body = model.resnet
    return {
        "stem": nn.Sequential(body.embedder.embedder, body.embedder.pooler),
        "stages": nn.Sequential(*body.encoder.stages),
        "pool": body.pooler,
        "head": model.classifier,
    }


def _transformers_convnext(model: Any) -> dict[str, nn.Module]:
    body = model.convnext
    return {
        "stem": nn.Sequential(body.embeddings.patch_embeddings, body.embeddings.layernorm),
        "stages": nn.Sequential(*body.encoder.stages),
        "pool": _pool(),
        "norm": body.layernorm,
        "head": model.classifier,
    }


def _transformers_vit(model: Any) -> dict[str, nn.Module]:
    body, embeddings = model.vit, model.vit.embeddings
    return {
        "patches": nn.Sequential(embeddings.patch_embeddings.projection, layers.Tokens()),
        "class_token": _class_tokens(embeddings.cls_token),
        "positions": _position_embedding(embeddings.position_embeddings),
        "blocks": nn.Sequential(*(nn.Sequential(layer.attention, layer.mlp) for layer in body.layers)),
        "norm": body.layernorm,
        "pool": layers.FirstToken(),
        "head": model.classifier,
    }


# The parts of whole networks in the order of their forward, by the package and the name of their class.
_NETWORKS: dict[str, Callable[[Any], dict[str, nn.Module]]] = {
    "greenprune.CifarResNet": lambda m: {"stem": m.stem, "stages": m.stages, "pool": _pool(), "head": m.head},
    "torchvision.ResNet": _resnet,
    "torchvision.RegNet": lambda m: {
        "stem": m.stem,
        "stages": m.trunk_output,
        "pool": nn.Sequential(m.avgpool, nn.Flatten(1)),
        "head": m.fc,
    },
    "torchvision.MobileNetV2": _features,
    "torchvision.MobileNetV3": _features,
    "torchvision.EfficientNet": _features,
    "torchvision.ConvNeXt": lambda m: {"features": m.features, "pool": m.avgpool, "head": m.classifier},
    "torchvision.VisionTransformer": _vit,
    "torchvision.SwinTransformer": lambda m: {
        "features": m.features,
        "norm": m.norm,
        "pool": nn.Sequential(m.permute, m.avgpool, m.flatten),
        "head": m.head,
    },
    "timm.ResNet": _timm_resnet,
    "timm.ConvNeXt": lambda m: {"stem": m.stem, "stages": m.stages, "norm": m.norm_pre, "head": m.head},
    "timm.VisionTransformer": _timm_vit,
    "transformers.ResNetForImageClassification": _transformers_resnet,
    "transformers.ConvNextForImageClassification": _transformers_convnext,
    "transformers.ViTForImageClassification": _transformers_vit,
}
