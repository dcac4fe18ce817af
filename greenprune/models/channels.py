"""Sets of channels inside a branch: which there are, what holds them, and where a gate can switch them.

A branch is a chain of modules. Between two dense layers (convolutions, linear layers) lies a set of channels that
nothing outside the chain sees; so do the heads inside an attention module. A unit is one channel of a set, or several
that only make sense together: a group of a grouped convolution with its inputs and outputs, an attention head.

All that a removal has to do follows from one description: the tensors that hold the set and along which dimension.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules import activation, batchnorm, dropout
from torch.nn.modules.conv import _ConvNd
from torchvision.ops import SqueezeExcitation, StochasticDepth

from greenprune.models.attention import SelfAttention, SeparateSelfAttention, WindowAttention
from greenprune.models.residual import ChannelSlot, PlainBlock, ResidualBlock

_MIXING_ACTIVATIONS = (
    activation.Softmax,
    activation.Softmin,
    activation.Softmax2d,
    activation.LogSoftmax,
    activation.GLU,
    activation.MultiheadAttention,
    activation.PReLU,  # one with a slope for each channel holds a tensor; one with a single slope is rare
)

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d

# Pools, by the number of positions they go over: the last ones of what they are given.
_POOLS: dict[type[nn.Module], int] = {
    getattr(nn, f"{kind}Pool{dims}d"): dims
    for kind in ("Avg", "Max", "AdaptiveAvg", "AdaptiveMax")
    for dims in (1, 2, 3)
}

# Modules without tensors of their own that treat each channel alike and by itself.
_CHANNELWISE: set[type[nn.Module]] = {
    nn.Identity,
    *_POOLS,
    StochasticDepth,
    *(
        kind
        for kind in vars(activation).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module) and kind not in (nn.Module, *_MIXING_ACTIVATIONS)
    ),
    *(getattr(dropout, name) for name in dropout.__all__),
}


# Of these modules those that map 0 to something else, in training at least. Behind the place where channels are
# switched they would turn a channel that is off into a constant.
_NOT_ZERO_AT_ZERO = (
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.LogSigmoid,
    nn.Softplus,
    nn.Threshold,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_NOT_ZERO_AT_ZERO_BY_NAME = {
    "timm": ("Sigmoid", "HardSigmoid"),
    "transformers": ("LaplaceActivation", "SqrtSoftplusActivation"),
}

_Attention = SelfAttention | SeparateSelfAttention | WindowAttention

_TIMM_SQUEEZE_EXCITATIONS = {"SEModule": ("fc1", "fc2"), "SqueezeExcite": ("conv_reduce", "conv_expand")}

# Tensors that lose entries when channels go.
_CUT = ("weight", "bias", "running_mean", "running_var", "table", "logit_scale")


def register_channelwise(kind: type[nn.Module]) -> type[nn.Module]:
    """Declare that modules of a class treat each channel by itself, map 0 to 0, and hold no tensors.

    Such modules may stand between the layers of a branch whose channels are gated. Usable as a class decorator.
    """
    _CHANNELWISE.add(kind)
    return kind


@dataclass(frozen=True)
class Slice:
    """A tensor that holds a set of channels along one dimension.

    The dimension is made of ``repeats`` stretches, each with ``per_unit`` entries for every unit, unit by unit.

    Attributes:
        module: Path of the module that owns the tensor.
        tensor: Name of the parameter or buffer in it.
        dim: The dimension.
        per_unit: Consecutive entries that belong to one unit.
        repeats: Number of stretches (3 for the queries, keys and values of an attention's one projection).
    """

    module: str
    tensor: str
    dim: int
    per_unit: int = 1
    repeats: int = 1


@dataclass
class ChannelSet:
    """A set of channels inside one block, as the network is now.

    Attributes:
        name: ``<path of the block>:<label>``, the label being hidden, hidden1, hidden2 or heads.
        block: Path of the block.
        units: Number of units now.
        slot: Path of the module after which the units are switched.
        channel_dim: Dimension of the channels in that module's output.
        slices: The tensors that hold the set.
        sizes: Modules and their attributes that count the set's channels, and shrink with it.
        removable: Whether the block can go as a whole when all units are off.
    """

    name: str
    block: str
    units: int
    slot: str
    channel_dim: int
    removable: bool
    slices: list[Slice] = field(default_factory=list)
    sizes: list[tuple[str, str]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name within the block."""
        return self.name.rpartition(":")[2]

    @property
    def width(self) -> int:
        """Channels of one unit where the set ends: those that the next layer takes."""
        return next(piece.per_unit for piece in self.slices if piece.dim == 1)


@dataclass(frozen=True)
class ChannelMap:
    """All sets of channels of a network.

    Attributes:
        sets: By name, in the order of the forward pass.
        notes: One line for each place where channels could have been expected but cannot be gated, with the reason.
    """

    sets: dict[str, ChannelSet]
    notes: list[str]


def find_channels(model: nn.Module) -> ChannelMap:
    """Find the sets of channels inside the blocks of an unwrapped network, gated or not."""
    sets: dict[str, ChannelSet] = {}
    notes: list[str] = []
    shared = _chains_in_several_places(model)
    for name, block in model.named_modules():
        if isinstance(block, ResidualBlock | PlainBlock):
            walk = _Walk(name, removable=isinstance(block, ResidualBlock))
            for path, module in _chain(f"{name}.branch", block.branch, shared):
                walk.pass_through(path, module)
            sets.update((found.name, found) for found in walk.named_sets())
            notes += walk.notes
    return ChannelMap(sets, notes)


def named_steps(chain: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a chain calls, by name and in order; ``named_children`` tells of one that comes twice once."""
    for name, module in chain._modules.items():
        if module is not None:
            yield name, module


def _chains_in_several_places(model: nn.Module) -> set[nn.Module]:
    """Chains without tensors that stand in more than one place, such as several activations in a row."""
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    found = {module for module, count in places.items() if count > 1 and isinstance(module, nn.Sequential)}
    return {module for module in found if not any(True for _ in itertools.chain(module.parameters(), module.buffers()))}


def _chain(path: str, module: nn.Module, shared: Collection[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a chain in the order in which they are called, nested sequences taken apart.

    Each comes with its path, where a gate can be put around it. What is put into a chain that is shared would be in all
    of its places: the path of the modules in there is that of the whole chain. So it is with what a gate stands around,
    which may have been shared when it got the gate.
    """
    if isinstance(module, ChannelSlot):
        inner = f"{path}.inner"
        yield from ((inner, step) for _, step in _chain(inner, module.inner, shared))
    elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for name, child in named_steps(module):
            for inner, step in _chain(f"{path}.{name}", child, shared):
                yield (path if module in shared else inner), step
    else:
        yield path, module


class _Walk:
    """Goes along the chain of one block and collects its sets of channels.

    Args:
        block: Path of the block.
        removable: Whether the block can go as a whole.
    """

    def __init__(self, block: str, *, removable: bool) -> None:
        self.block = block
        self.removable = removable
        self.hidden: list[ChannelSet] = []
        self.heads: list[ChannelSet] = []
        self.notes: list[str] = []
        self._open: ChannelSet | None = None  # its next dense layer is still to come
        self._from = ""
        self._width = 0  # channels of the open set, where the walk stands
        self._positions = 0  # dimensions behind the channels of the open set
        self._switched = False  # the place for the open set's gate is fixed
        self._previous = ""
        self._spoilt = ""  # why the channels that are open cannot be gated

    def named_sets(self) -> list[ChannelSet]:
        """The sets found, with their names."""
        for number, found in enumerate(self.hidden, 1):
            found.name = f"{self.block}:hidden{number if len(self.hidden) > 1 else ''}"
        for number, found in enumerate(self.heads, 1):
            found.name = f"{self.block}:heads{number if len(self.heads) > 1 else ''}"
        return [*self.heads, *self.hidden]

    def pass_through(self, path: str, module: nn.Module) -> None:
        """Take the next module of the chain."""
        if isinstance(module, _Conv | nn.Linear) and _is_plain_layer(module):
            if isinstance(module, _Conv) and (module.groups > 1 or was_grouped(module)):
                self._grouped(path, module)
            else:
                self._dense(path, module)
        elif isinstance(module, _Attention) and _are_plain(module, *_projections(module), "proj"):
            self._attention(path, module)
        elif isinstance(module, batchnorm._BatchNorm) and _is_plain_norm(module):
            self._carry(path, module)
        elif (layers := _layers_of_squeeze_excitation(module)) and _are_plain(module, *layers):
            self._squeeze_excitation(path, module, *layers)
        elif type(module) not in _CHANNELWISE and not _is_channelwise_by_name(module):
            self._unknown(path, module)
        elif type(module) in _POOLS and _POOLS[type(module)] != self._positions:
            self._spoil(f"{path} ({type(module).__name__}) pools over the channels")
        elif self._switched and _makes_constants(module):
            self._spoil(f"{path} ({type(module).__name__}) makes a constant of a channel that is off")
        self._previous = path

    def _unknown(self, path: str, module: nn.Module) -> None:
        """A module that may mix channels, and may hide some inside."""
        traced = isinstance(module, fx.GraphModule)
        self._spoil(
            f"{path} ({'a function' if traced else type(module).__name__}) is not known to treat each channel by itself"
        )
        if any(isinstance(child, _ConvNd | nn.Linear) for child in module.modules()):
            what = "what the block's forward does between modules" if traced else f"a {type(module).__name__}"
            self.notes.append(f"{path}: the channels inside {what} are not gated")

    def _dense(self, path: str, module: _Conv | nn.Linear) -> None:
        self._close(path, module)
        width = module.out_channels if isinstance(module, _Conv) else module.out_features
        self._begin(path, module, width)
        self._add_output(path, module)

    def _begin(self, path: str, module: _Conv | nn.Linear, units: int) -> None:
        self._positions = len(module.kernel_size) if isinstance(module, _Conv) else 0
        channel_dim = 1 if isinstance(module, _Conv) else -1
        self._open = ChannelSet("", self.block, units, "", channel_dim, self.removable)
        self._from, self._width, self._switched, self._spoilt = path, units, False, ""

    def _add_output(self, path: str, module: _Conv | nn.Linear) -> None:
        assert self._open is not None
        self._open.slices += [Slice(path, name, 0) for name, _ in module.named_parameters(recurse=False)]
        self._open.sizes.append((path, "out_channels" if isinstance(module, _Conv) else "out_features"))

    def _close(self, path: str, module: _Conv | nn.Linear) -> None:
        """The open set ends here, where its channels are the input."""
        ended = self._open
        if ended is None:
            return
        is_conv = isinstance(module, _Conv)
        if (ended.channel_dim == 1) != is_conv:
            self._spoil(f"{path} takes its channels from another dimension")
        width = module.in_channels if isinstance(module, _Conv) else module.in_features
        if width != self._width:
            self._spoil(f"{path} does not take the same channels")
        if self._spoilt:
            self.notes.append(f"{self.block}: channels from {self._from} to {path} are not gated: {self._spoilt}")
            return
        if not self._switched:
            ended.slot = self._previous
        ended.slices.append(Slice(path, "weight", 1, width // ended.units))
        ended.sizes.append((path, "in_channels" if is_conv else "in_features"))
        self.hidden.append(ended)

    def _spoil(self, reason: str) -> None:
        if self._open is not None and not self._spoilt:
            self._spoilt = reason

    def _carry(self, path: str, module: nn.Module) -> None:
        """A normalisation that keeps statistics and factors for each channel."""
        if self._open is None:
            return
        if self._switched:
            self._spoil(f"{path} makes a constant of a channel that is off")
            return
        width = int(module.num_features)  # type: ignore[arg-type]
        if self._open.channel_dim != 1 and isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            self._spoil(f"{path} normalises another dimension")
        elif width != self._width:
            self._spoil(f"{path} does not take the same channels")
        per_unit = width // self._open.units
        tensors = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        self._open.slices += [Slice(path, name, 0, per_unit) for name, tensor in tensors if tensor.dim() == 1]
        self._open.sizes.append((path, "num_features"))

    def _grouped(self, path: str, module: _Conv) -> None:
        """A grouped convolution ties the inputs and the outputs of a group together into one unit."""
        opened = self._open
        if opened is None:
            self._begin(path, module, module.out_channels)
            self._spoil(f"the groups of {path} take the block's input, whose width stays")
            return
        if max(opened.units, module.groups) % min(opened.units, module.groups):
            self._spoil(f"the {module.groups} groups of {path} do not divide its channels evenly")
            return
        if self._switched:
            self._spoil(f"{path} works in groups behind a squeeze-and-excitation")
            return
        units = min(opened.units, module.groups)
        factor = opened.units // units
        opened.units = units
        opened.slices = [
            Slice(old.module, old.tensor, old.dim, old.per_unit * factor, old.repeats) for old in opened.slices
        ]
        opened.slices += [
            Slice(path, name, 0, module.out_channels // units) for name, _ in module.named_parameters(recurse=False)
        ]
        opened.sizes += [(path, name) for name in ("in_channels", "out_channels", "groups")]
        self._width = module.out_channels

    def _squeeze_excitation(self, path: str, module: nn.Module, squeeze: str, excite: str) -> None:
        """Scales each channel by a factor made from all of them: they have to be switched before it."""
        if self._open is None:
            return
        if not self._switched:
            self._open.slot, self._switched = self._previous, True
        first, second = f"{path}.{squeeze}", f"{path}.{excite}"
        per_unit = int(module.get_submodule(squeeze).in_channels) // self._open.units  # type: ignore[arg-type]
        self._open.slices.append(Slice(first, "weight", 1, per_unit))
        self._open.sizes.append((first, "in_channels"))
        for name, _ in module.get_submodule(excite).named_parameters(recurse=False):
            self._open.slices.append(Slice(second, name, 0, per_unit))
        self._open.sizes.append((second, "out_channels"))

    def _attention(self, path: str, module: _Attention) -> None:
        if self._open is not None:
            self._close_before_attention(path)
        heads = ChannelSet("", self.block, module.heads, f"{path}.merged", -1, self.removable)
        if isinstance(module.merged, ChannelSlot):
            heads.slot += ".inner"
        width = module.head_dim
        for projection, stretches in _projections(module).items():
            held = module.get_submodule(projection).named_parameters(recurse=False)
            heads.slices += [Slice(f"{path}.{projection}", name, 0, width, stretches) for name, _ in held]
            heads.sizes.append((f"{path}.{projection}", "out_features"))
        heads.slices.append(Slice(f"{path}.proj", "weight", 1, width))
        heads.sizes += [(f"{path}.proj", "in_features"), (path, "heads")]
        if isinstance(module, WindowAttention):
            if module.table is not None:
                heads.slices.append(Slice(path, "table", 1))
            if module.logit_scale is not None:
                heads.slices.append(Slice(path, "logit_scale", 0))
            if module.bias_mlp is not None:
                last = f"{path}.bias_mlp.{len(module.bias_mlp) - 1}"
                heads.slices.append(Slice(last, "weight", 0))
                heads.sizes.append((last, "out_features"))
        self.heads.append(heads)
        self._open = None

    def _close_before_attention(self, path: str) -> None:
        self.notes.append(f"{self.block}: channels from {self._from} to {path} are not gated: they feed an attention")


def _projections(attention: _Attention) -> dict[str, int]:
    """An attention's projections of its input, with the number of stretches that the output of each is made of."""
    return {"query": 1, "key": 1, "value": 1} if isinstance(attention, SeparateSelfAttention) else {"qkv": 3}


def _is_plain_layer(module: _Conv | nn.Linear) -> bool:
    """Whether a layer uses its tensors as they are, and does not derive them from others or normalise them."""
    kind = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) if isinstance(module, kind))
    methods = ("forward",) if kind is nn.Linear else ("forward", "_conv_forward")
    as_it_is = all(getattr(type(module), method) is getattr(kind, method) for method in methods)
    return as_it_is and _hold_their_tensors([module])


def _is_plain_norm(module: nn.Module) -> bool:
    """Whether a batch norm normalises as torch does, perhaps with timm's activation behind, by the tensors it holds."""
    forward = type(module).forward
    of_library = forward.__module__.startswith(("torch.nn.", "timm.layers."))
    return of_library and _hold_their_tensors([module])


def _are_plain(module: nn.Module, *layers: str) -> bool:
    """Whether a module and all in it use their tensors as they are, and its layers are such as can be cut."""
    kinds = _Conv | nn.Linear
    there = [getattr(module, name) for name in layers]
    return all(isinstance(layer, kinds) and _is_plain_layer(layer) for layer in there) and _hold_their_tensors(
        module.modules()
    )


def _hold_their_tensors(modules: Iterable[nn.Module]) -> bool:
    """Whether modules hold all that would have to be cut, and derive nothing of it (as parametrizations do)."""
    return all(
        name in module._parameters or name in module._buffers or getattr(module, name, None) is None
        for module in modules
        for name in _CUT
    )


def mark_grouped(module: nn.Module) -> None:
    """Remember that a convolution works in groups, of which a removal may leave only one."""
    module._greenprune_grouped = True  # type: ignore[assignment]


def was_grouped(module: nn.Module) -> bool:
    """Whether a convolution worked in groups before any were removed."""
    return getattr(module, "_greenprune_grouped", False) is True


def _makes_constants(module: nn.Module) -> bool:
    """Whether a module that treats each channel by itself maps 0 to something else."""
    library = type(module).__module__.partition(".")[0]
    return isinstance(module, _NOT_ZERO_AT_ZERO) or type(module).__name__ in _NOT_ZERO_AT_ZERO_BY_NAME.get(library, ())


def _layers_of_squeeze_excitation(module: nn.Module) -> tuple[str, str] | None:
    """The names of its two layers: of torchvision's, or of timm's, an optional dependency, known by their names."""
    if isinstance(module, SqueezeExcitation):
        return "fc1", "fc2"
    kind = type(module)
    return _TIMM_SQUEEZE_EXCITATIONS.get(kind.__name__) if kind.__module__.startswith("timm.") else None


def _is_channelwise_by_name(module: nn.Module) -> bool:
    """Timm's and transformers' own activations and stochastic depth."""
    home, name = type(module).__module__, type(module).__name__
    if home.startswith("timm.layers"):
        return (home.startswith("timm.layers.activations") and name != "PReLU") or name == "DropPath"
    if home.startswith("transformers.models."):
        return name.endswith("DropPath")
    return home == "transformers.activations" and not any(True for _ in module.parameters())
