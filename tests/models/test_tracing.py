"""Blocks that nobody has registered, found in what a module's forward does."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from families import Pattern
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

from greenprune import BudgetConfig, GateConfig, Pruner
from greenprune.config import UserError
from greenprune.gating import attach_gates
from greenprune.models import (
    BlockError,
    PlainBlock,
    ResidualBlock,
    convert_blocks,
    find_channels,
    register_block,
    residual_blocks,
)
from greenprune.models import blocks as blocks_module
from greenprune.surgery import carry_out


def conv(before: int, after: int, side: int = 3) -> nn.Conv2d:
    return nn.Conv2d(before, after, side, padding=side // 2, bias=False)


class Unit(nn.Module):
    """A convolution with its norm: a module of one's own inside a branch."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv, self.norm = conv(before, after), nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Parts(nn.Module):
    """Two units, and of what else a block may be made of what it names."""

    uses: tuple[str, ...] = ()

    def __init__(self, before: int = 8, after: int = 8) -> None:
        super().__init__()
        self.first, self.second = Unit(before, 6), Unit(6, after)
        self.down = nn.Conv2d(before, after, 1) if before != after else None
        self.p = 0.3
        others = {
            "relu": nn.ReLU(inplace=True),
            "norm": nn.BatchNorm2d(before),
            "gamma": nn.Parameter(torch.rand(after, 1, 1) + 0.5),
            "mix": nn.Conv2d(after, after, 1),
        }
        for name in self.uses:
            setattr(self, name, others[name])


class WithFunctions(Parts):
    def forward(self, x):  # as people write it, without types
        out = functional.relu(self.first(x))
        out = self.second(out)
        out += x if self.down is None else self.down(x)
        return functional.relu(out)


class OneRelu(Parts):
    uses = ("relu",)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        out = self.relu(self.first(x))
        return self.relu(shortcut + self.second(out))


class PreActivated(Parts):
    uses = ("norm",)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.norm(x))
        shortcut = x if self.down is None else self.down(out)
        return self.second(functional.relu(self.first(out))) + shortcut


class Scaled(Parts):
    uses = ("gamma",)

    def forward(self, x: Tensor) -> Tensor:
        return x.add(self.second(functional.silu(self.first(x))) * self.gamma)


class Twice(Parts):
    uses = ("norm", "mix")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(torch.relu(self.first(self.norm(x))))
        return torch.add(x, self.mix(x)).contiguous()


class Excited(Parts):
    """A factor of its own on what the branch makes."""

    uses = ("mix",)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.first(x).relu())
        return x + out * torch.sigmoid(self.mix(out.mean((2, 3), keepdim=True)))


def network(*kinds: type[nn.Module], widths: tuple[int, ...] = (8, 8, 8)) -> nn.Module:
    """Two blocks, of one class or of two, between a stem and a head."""
    torch.manual_seed(0)
    blocks = [kind(*sizes) for kind, sizes in zip(kinds * 2, itertools.pairwise(widths), strict=False)]
    model = nn.Sequential(conv(3, widths[0]), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(widths[-1], 5))
    model(images())  # statistics of its own
    return model.eval()


def images(seed: int = 1) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


FORMS: dict[str, tuple[type[nn.Module], tuple[int, ...], int, int]] = {  # with the number of blocks and sets
    "functions": (WithFunctions, (8, 8, 8), 2, 2),
    "projection": (WithFunctions, (8, 8, 12), 2, 2),
    "one relu": (OneRelu, (8, 8, 8), 2, 2),
    "pre-activated": (PreActivated, (8, 8, 8), 2, 2),
    "pre-activated, projection": (PreActivated, (8, 8, 12), 2, 2),
    "scaled": (Scaled, (8, 8, 8), 2, 2),
    "two sums": (Twice, (8, 8, 8), 4, 2),
    "excited": (Excited, (8, 8, 8), 2, 2),
}
every_form = pytest.mark.parametrize(("block", "widths", "blocks", "sets"), FORMS.values(), ids=FORMS)


@every_form
@pytest.mark.parametrize("with_example", [True, False])
def test_it_computes_the_same_with_the_same_parameters(
    block: type[nn.Module], widths: tuple[int, ...], blocks: int, sets: int, with_example: bool
) -> None:
    model = network(block, widths=widths)
    twin, before = copy.deepcopy(model), {id(parameter) for parameter in model.parameters()}
    convert_blocks(model, images() if with_example else None)
    assert (len(residual_blocks(model)), len(find_channels(model).sets)) == (blocks, sets)
    assert not any(module.training for module in model.modules())
    assert {id(parameter) for parameter in model.parameters()} == before
    for mode in (False, True):
        got, expected = model.train(mode)(images(2)), twin.train(mode)(images(2))
        torch.testing.assert_close(got, expected)


@every_form
def test_what_is_off_is_removed_exactly(
    block: type[nn.Module], widths: tuple[int, ...], blocks: int, sets: int
) -> None:
    model = network(block, widths=widths)
    convert_blocks(model, images())
    channels = dict.fromkeys(find_channels(model).sets, (0, 2, 3))
    pattern = Pattern(frozenset(list(residual_blocks(model))[:1]), channels)
    attach_gates(model, GateConfig(units=["block", "channel"] if channels else ["block"]), images())
    masked = copy.deepcopy(model)
    pattern.mask(masked)
    carry_out(pattern.operations(model), model)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in masked.parameters())
    torch.testing.assert_close(model(images(3)), masked.eval()(images(3)))


class Concatenates(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.second(self.first(x))], 1)[:, :8]


class AddsAConstant(Parts):
    uses = ("gamma",)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.gamma


class WaysOfOneSize(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(self.first(x), (0, 0, 0, 0, 0, 2)) + self.second(x[:, :6])


class TakesMore(Parts):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.second(self.first(x))


class DropsByItself(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x + functional.dropout(self.second(self.first(x)), self.p, self.training)


class LooksAtValues(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x)) if x.sum() > 0 else x


class ChangesItsInput(Parts):
    uses = ("relu",)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(self.relu(x)))


class AddsToItsInput(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x += self.second(self.first(x))
        return x


class CallsTwice(Parts):
    uses = ("mix",)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.second(self.first(x)))
        return x + self.mix(x)


class LeavesOut(Parts):
    uses = ("mix",)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class BroadcastsItsShortcut(Parts):
    uses = ("mix",)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.mix(x.mean((2, 3), keepdim=True))


class AddsInTraining(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + (y * 0.5 if self.training else y)


class AddsByAModule(Parts):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.add = AddsInTraining()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.add(x, self.second(self.first(x)))
        return out


class Frozen(Unit):
    def train(self, mode: bool = True) -> Unit:
        super().train(mode)
        self.norm.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class CallsAMethod(Parts):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.first = Frozen(before, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first.features(x))


class HasAStateHook(Parts):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.register_state_dict_post_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class ChangesWhatItAdded(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second(self.first(x))).mul_(0.5)


class Remembers(Parts):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.losses: list[Tensor] = []
        self.grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.arange(x.shape[-1], device=x.device) / 8
        out = x + self.second(self.first(x + self.grid))
        self.losses.append(out.square().mean())
        return out


class SwitchesAutocastOff(Parts):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x + self.second(self.first(x.float()))


class SwitchesAutocastOn(Parts):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu"):
            return x + self.second(self.first(x)).float()


class LearnsNothing(Parts):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class DrawsNumbers(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x)) * torch.rand(8, 1, 1)


class KeepsAnAverage(Parts):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.first(x)) - self.average
        self.average.lerp_(out.detach().mean(), 0.1)
        return x + out


class StaysInEvaluation(Parts):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


class ChecksPointsOfItsOwn(Parts):
    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.first, x, use_reentrant=False)
        return x + self.second(hidden)


class ChecksPointsByModule(Parts):
    def forward(self, x: Tensor) -> Tensor:
        def branch(x: Tensor) -> Tensor:
            return self.second(self.first(x))

        out: Tensor = x + torch.utils.checkpoint.checkpoint(branch, x, use_reentrant=False)
        return out


@pytest.mark.parametrize("with_example", [True, False])
@pytest.mark.parametrize(
    "block",
    [
        AddsByAModule,
        CallsAMethod,
        HasAStateHook,
        ChangesWhatItAdded,
        Remembers,
        SwitchesAutocastOff,
        SwitchesAutocastOn,
        LearnsNothing,
        DrawsNumbers,
        KeepsAnAverage,
        StaysInEvaluation,
        ChecksPointsOfItsOwn,
        ChecksPointsByModule,
        Concatenates,
        AddsAConstant,
        WaysOfOneSize,
        TakesMore,
        DropsByItself,
        LooksAtValues,
        ChangesItsInput,
        AddsToItsInput,
        CallsTwice,
        LeavesOut,
    ],
)
def test_what_is_no_such_block_is_left_as_it_is(block: type[nn.Module], with_example: bool) -> None:
    example = images() if with_example else None
    alone = network(block)
    with pytest.raises(BlockError, match=f"no residual block that greenprune knows or can follow; .* {block.__name__}"):
        convert_blocks(alone, example)
    beside = network(WithFunctions, block)
    assert convert_blocks(beside, example) == ["2"]
    assert type(beside[3]) is block


def test_a_branch_that_turns_out_to_work_in_place_is_left_as_it_is() -> None:
    class Hidden(Unit):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x.mul_(2)))

    model = network(WithFunctions, WithFunctions)
    model[3].first = Hidden(8, 6)
    assert convert_blocks(model, images()) == ["2"]


def test_a_block_that_is_called_twice_or_not_at_all_is_left_as_it_is() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.once, self.twice, self.never = conv(3, 8), *(WithFunctions() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(self.once(self.stem(x))))

    assert convert_blocks(Network(), images()) == ["once"]


@pytest.mark.parametrize("what", ["module", "tensor"])
def test_what_shares_something_is_left_as_it_is(what: str) -> None:
    model = network(WithFunctions, WithFunctions)
    model.append(Unit(8, 6))
    if what == "module":
        model[3].first = model[7]
    else:
        model[3].first.conv.weight = model[7].conv.weight
    assert convert_blocks(model) == ["2"]


class ChangesItsInputByAView(Parts):
    def forward(self, x: Tensor) -> Tensor:
        out = x.view(x.shape)
        out += self.second(self.first(x))
        return out


class Turned(Parts):
    """The sum lies in memory as its first operand does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.transpose(2, 3))).transpose(2, 3) + x


class CountsInNumbers(Parts):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.number = nn.Parameter(torch.zeros(1, dtype=torch.long), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x)) * (1 + self.number)


@pytest.mark.parametrize("block", [BroadcastsItsShortcut, ChangesItsInputByAView, Turned])
def test_what_an_example_shows_to_be_more_is_left_as_it_is(block: type[nn.Module]) -> None:
    model = network(WithFunctions, block)
    assert convert_blocks(model, images()) == ["2"]


def test_numbers_that_are_no_weights_are_left_alone() -> None:
    assert convert_blocks(network(CountsInNumbers), images()) == ["2", "3"]


def test_following_a_forward_leaves_no_trace() -> None:
    model = network(WithFunctions, Remembers)
    block = model[3]
    block.losses.clear()
    block.grid = None
    convert_blocks(model)
    assert (block.losses, block.grid) == ([], None)
    model = network(WithFunctions, DrawsNumbers)
    before = torch.get_rng_state()
    convert_blocks(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_notes_say_why_a_block_that_was_found_stays() -> None:
    gate, budget = GateConfig(units=["block"]), BudgetConfig(target=0.9)
    pruner = Pruner(network(WithFunctions, Turned), images(), total_steps=40, gate=gate, budget=budget)
    reason = "a Turned whose result lies otherwise in memory when it is taken apart cannot be gated"
    assert pruner.notes == [f"3: left as it is: {reason}"]


def test_where_blocks_are_known_no_others_are_looked_for() -> None:
    model = network(WithFunctions)
    model.insert(2, resnet.BasicBlock(8, 8))
    assert convert_blocks(model, images()) == ["2"]


def test_buffers_that_blocks_share_leave_them_as_they_are() -> None:
    class Rotation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("angles", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.angles

    class Rotated(Parts):
        rotation: nn.Module

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.rotation(self.first(x)))

    model = network(WithFunctions, WithFunctions)
    one = Rotation()
    for block in (Rotated(8, 8), Rotated(8, 8)):
        block.rotation = one
        model.insert(4, block)
    assert convert_blocks(model, images()) == ["2", "3"]


def test_a_norm_of_ones_own_ends_the_row_of_channels() -> None:
    class Centred(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(1, keepdim=True))

    model = network(WithFunctions)
    model[2].first.norm = Centred(6)
    convert_blocks(model, images())
    assert list(find_channels(model).sets) == ["3:hidden"]


def test_a_part_of_a_forward_is_not_pickled_but_copied() -> None:
    model = network(Scaled)
    convert_blocks(model, images())
    with pytest.raises(TypeError, match="cannot be pickled as a whole; expected its state_dict"):
        torch.save(model, io.BytesIO())
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))


def test_a_forward_of_an_instance_is_left_as_it_is() -> None:
    model = network(WithFunctions, WithFunctions)
    model[3].forward = lambda x: 2 * x
    assert convert_blocks(model) == ["2"]


def test_a_block_without_a_sum_around_others_is_left_as_it_is() -> None:
    class Nested(nn.Module):
        def __init__(self, inner: nn.Module | None = None) -> None:
            super().__init__()
            self.inner, self.last = inner or Unit(8, 8), conv(8, 8)
            self.skips = inner is None

        def forward(self, x: Tensor) -> Tensor:
            out = self.last(self.inner(x))
            return x + out if self.skips else out

    assert convert_blocks(nn.Sequential(conv(3, 8), Nested(Nested())), images()) == ["1.inner"]


def test_tensors_that_are_not_saved_are_not_saved_afterwards() -> None:
    class Masked(Parts):
        def __init__(self, before: int, after: int) -> None:
            super().__init__(before, after)
            self.register_buffer("mask", torch.ones(after, 1, 1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.first(x)) * self.mask

    model = network(Masked)
    convert_blocks(model, images())
    assert len(residual_blocks(model)) == 2
    assert sum("mask" in name for name, _ in model.named_buffers()) == 2
    assert not any("mask" in name for name in model.state_dict())


def test_hooks_inside_leave_a_block_as_it_is() -> None:
    model = network(WithFunctions, WithFunctions)
    model[3].second.register_forward_hook(lambda *_: None)
    assert convert_blocks(model, images()) == ["2"]


def test_of_blocks_inside_each_other_it_is_the_inner_one() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = nn.Sequential(WithFunctions(), WithFunctions()), conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.last(self.body(x))

    assert convert_blocks(nn.Sequential(conv(3, 8), Outer()), images()) == ["1.body.0", "1.body.1"]


def test_what_is_registered_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "_SPLITS", dict(blocks_module._SPLITS))

    @register_block(WithFunctions)
    def split(block: WithFunctions) -> nn.Module:
        branch = nn.Sequential(block.first, nn.ReLU(), block.second)
        return ResidualBlock(branch, nn.Identity(), nn.ReLU(), input_activated=True)

    model = network(WithFunctions)
    convert_blocks(model, images())
    assert isinstance(model[2].branch[0], Unit)  # not opened, as what is found would be


def test_of_a_class_of_blocks_those_without_a_sum_are_found_too() -> None:
    class Inverted(nn.Module):
        def __init__(self, before: int, after: int) -> None:
            super().__init__()
            self.first, self.second, self.act = Unit(before, 16), Unit(16, after), nn.ReLU6()
            self.skips = before == after

        def forward(self, x: Tensor) -> Tensor:
            out = self.second(self.act(self.first(x)))
            return x + out if self.skips else out

    model = network(Inverted, widths=(8, 8, 12))
    assert convert_blocks(model, images()) == ["2", "3"]
    assert isinstance(model[3], PlainBlock)
    assert list(find_channels(model).sets) == ["2:hidden", "3:hidden"]


def test_an_activation_that_stays_leaves_its_input_to_others() -> None:
    model = network(OneRelu)
    convert_blocks(model, images())
    block = model[2]
    assert isinstance(block, ResidualBlock)
    x = torch.randn(2, 8, 4, 4)
    before = x.clone()
    block.without_branch()(x)
    assert torch.equal(x, before)


def test_frozen_norms_stay_frozen() -> None:
    model = network(WithFunctions).train()
    model[2].first.norm.eval()
    convert_blocks(model, images())
    frozen = [
        name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d) and not module.training
    ]
    assert frozen == ["2.branch.1"]


@pytest.mark.parametrize("units", [["block"], ["channel"], ["block", "channel"]])
def test_a_network_of_ones_own_is_pruned_without_a_word(units: list[Any]) -> None:
    """Trained to its budget, with a state that a network that was built anew takes up."""
    model = network(WithFunctions, widths=(8, 8, 12)).train()
    budget, gate = BudgetConfig(target=0.6), GateConfig(units=units)
    pruner = Pruner(model, images(), total_steps=40, gate=gate, budget=budget)
    optimizer = torch.optim.SGD(pruner.parameter_groups(batch_size=4), lr=0.01, momentum=0.9)
    labels = torch.tensor([0, 1, 2, 3])
    for step in range(40):
        loss = functional.cross_entropy(model(images(step)), labels) + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step(optimizer)
    assert pruner.report()["kept_cost"] <= 0.6
    assert pruner.report()["gates_left"] == 0
    fresh = network(WithFunctions, widths=(8, 8, 12))
    again = Pruner(fresh, images(), total_steps=40, gate=gate, budget=budget)
    again.load_state_dict(pruner.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images()), model.eval()(images()))
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))


def test_a_budget_that_cannot_be_met_is_refused_with_the_network_as_it_was() -> None:
    model = network(Excited)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=r"budget\.target"):
        Pruner(model, images(), total_steps=40, budget=BudgetConfig(target=0.01))
    assert [type(module) for module in model.modules()] == kinds
