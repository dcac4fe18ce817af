"""Whether a block that has been taken apart is still the block: run beside it, on what the network gives it."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from greenprune.config import UserError
from greenprune.models.residual import PlainBlock, ResidualBlock, hooks_of

# Largest relative difference between a block and its taken-apart form, both run on the same input in fp32.
_TOLERANCE = 1e-4

# Where hooks are from that nobody misses: transformers puts them on each attention once hidden states are asked for,
# and layers that are taken apart refuse to be asked for what they would keep, the weights of the attention.
_LOST_KNOWINGLY = ("transformers.utils.output_capturing",)


class BlockError(UserError):
    """A network that cannot be gated as asked; the message names the module and what to do."""


def refuse_lost_hooks(name: str, block: nn.Module, split: nn.Module) -> None:
    """Refuse hooks of a module that is not there any more when its block has been taken apart.

    Raises:
        BlockError: There is one.
    """
    left = set(split.modules())
    for path, module in block.named_modules(prefix=name):
        watched = any(getattr(hook, "__module__", None) not in _LOST_KNOWINGLY for hook in hooks_of(module))
        if module is not block and module not in left and watched:
            raise BlockError(
                f"{path}: a {type(module).__name__} with hooks is taken apart with its block, and they would see "
                f"nothing any more; expected hooks of {name}, or such as are registered afterwards, on what stands "
                "there then"
            )


@dataclass(frozen=True)
class Call:
    """How a network calls a block.

    Attributes:
        x: The block's input.
        args: What comes behind it, such as a mask that is not there.
        options: The same by keyword.
    """

    x: Tensor
    args: tuple[bool | None, ...]
    options: Mapping[str, bool | None]


def record_inputs(
    model: nn.Module, blocks: dict[str, nn.Module], example: Tensor
) -> tuple[dict[str, Call], dict[str, BlockError]]:
    """How each block is called when the network runs on the example, in evaluation mode.

    Returns:
        By name, the calls of those that run, and why one of them, or one that has been taken apart before, cannot be a
        block: what the network calls otherwise.
    """
    inputs: dict[str, Call] = {}
    odd: dict[str, BlockError] = {}
    calls: Counter[str] = Counter()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(block: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            calls[name] += 1
            if isinstance(block, ResidualBlock | PlainBlock):
                return
            alone = all(isinstance(more, bool | None) for more in (*args[1:], *options.values()))
            if args and isinstance(args[0], Tensor) and alone:
                inputs[name] = Call(args[0].clone(), args[1:], options)
            else:
                odd[name] = _called_with_more(name, block)

        return keep

    ready = {name: module for name, module in model.named_modules() if isinstance(module, ResidualBlock | PlainBlock)}
    watched = blocks | ready
    handles = [block.register_forward_pre_hook(hook(name), with_kwargs=True) for name, block in watched.items()]
    try:
        pass_through(model, example)
    finally:
        for handle in handles:
            handle.remove()
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for name, count in calls.items():
        if count > places[watched[name]]:  # of one that stands in several places, those are named (_refuse_shared)
            odd[name] = BlockError(
                f"{name}: the network calls it {count} times in one pass, and a gate would count what it decides in "
                "the last call alone; expected a block called once, or one for each call"
            )
    return inputs, odd


def _called_with_more(name: str, block: nn.Module) -> BlockError:
    return BlockError(
        f"{name}: a {type(block).__name__} that is called with more than its input cannot be taken apart; expected a "
        "block called with one tensor"
    )


def pass_through(model: nn.Module, example: Tensor) -> None:
    """Run a network on an example in evaluation mode, without gradients; its modules' own modes are put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _whole_products() -> Iterator[None]:
    """Within, fp32 products on a GPU are not rounded to TF32, of which other kernels would make another sum.

    Where the newer of PyTorch's settings was used, which cannot be mixed with this one, it is left as it is.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        before = "highest"
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_same(name: str, block: nn.Module, split: nn.Module, call: Call, by: str) -> None:
    """Check that a taken-apart block computes what the block computes, and drops as much in training.

    Args:
        name: Path of the block.
        block: The block.
        split: Its taken-apart form.
        call: How the network calls it.
        by: What it was taken apart by, for messages.

    Raises:
        BlockError: It does not, or cannot be called in the same way.
    """
    # One copy of both, in fp32: they go on sharing their tensors.
    block, split = copy.deepcopy((block, split))
    block.float()
    split.float()  # has an activation of its own, perhaps
    x = call.x.float() if call.x.is_floating_point() else call.x
    _move_constants(block)
    failure = ""
    with torch.no_grad(), _whole_products():
        # Copies of the input: a module of one may work in place on what the other still needs.
        expected = block.eval()(x.clone(), *call.args, **call.options)
        try:
            got = split.eval()(x.clone(), *call.args, **call.options)
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, TypeError) and (call.args or call.options):
                raise _called_with_more(name, block) from None
            failure = f" ({' '.join(str(error).split())})"
    same = not failure and got.shape == expected.shape
    if same:
        scale = expected.abs().max().clamp(min=1e-6)
        same = bool((got - expected).abs().max() / scale <= _TOLERANCE)  # not if there is a NaN
    if not same:
        raise BlockError(
            f"{name}: taken apart by {by}, the block computes something else{failure}; expected branch, shortcut and "
            "activation to be those of its forward, made of its own modules, none of them in place on the block's input"
        )
    if _changes_its_input(split, x):
        raise BlockError(
            f"{name}: its branch works in place on the block's input, and without the branch the network would go on "
            "with another; expected modules that leave it as it is (ReLU(inplace=False), or the like) where a branch "
            "begins"
        )
    if _forgets_to_drop(block, split, x):
        raise BlockError(
            f"{name}: taken apart by {by}, the block draws fewer random numbers in training; expected all that drops "
            "something there (dropout, stochastic depth) in branch, shortcut or activation"
        )


def check_alike(name: str, block: nn.Module, split: nn.Module, call: Call) -> None:
    """Check what else of a block that nobody has registered has to be the same, beside what it computes.

    Raises:
        BlockError: It changes its input; its branch is of another shape or precision than its shortcut, or what it
            gives lies otherwise in memory than what the taken-apart form gives.
    """
    block, split = copy.deepcopy((block, split))
    odd: list[nn.Module] = []
    for inner in split.modules():
        if isinstance(inner, ResidualBlock):
            _compare_ways(inner, odd)
    given = [call.x.clone(), call.x.clone()]
    with torch.no_grad():
        expected = block.eval()(given[0], *call.args, **call.options)
        got = split.eval()(given[1], *call.args, **call.options)
    what = ""
    if not all(torch.equal(x, call.x) for x in given):
        what = "that changes its input"
    elif odd:
        what = "whose branch is of another shape or precision than its shortcut"
    elif (got.stride(), got.dtype) != (expected.stride(), expected.dtype):
        what = "whose result lies otherwise in memory when it is taken apart"
    if what:
        raise BlockError(f"{name}: a {type(block).__name__} {what} cannot be gated")


def _compare_ways(block: ResidualBlock, odd: list[nn.Module]) -> None:
    """Have a block put itself among those whose shortcut is of another shape or precision than the branch."""
    ends: list[Tensor] = []

    def compare(_: nn.Module, __: object, output: Tensor) -> None:
        if (output.shape, output.dtype) != (ends[0].shape, ends[0].dtype):
            odd.append(block)

    block.shortcut.register_forward_hook(lambda _, __, output: ends.__setitem__(slice(None), [output]))
    block.branch.register_forward_hook(compare)


def _changes_its_input(split: nn.Module, x: Tensor) -> bool:
    """Whether the branch of a block that can be removed changes, in either mode, what the shortcut passes on."""
    changed: list[nn.Module] = []
    handles = []
    for block in split.modules():
        if isinstance(block, ResidualBlock):
            handles += _watched(block, changed)
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        split.eval()(x.clone())
        with contextlib.suppress(RuntimeError, ValueError):  # as of a norm over one value: no example to train with
            split.train()(x.clone())
    for handle in handles:
        handle.remove()
    return bool(changed)


def _watched(block: ResidualBlock, changed: list[nn.Module]) -> list[RemovableHandle]:
    """Have a block put itself among those whose shortcut passes on something else once the branch has run."""
    passed_on: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        passed_on[:] = [output, output.clone()]

    def compare(*_: object) -> None:
        if not torch.equal(*passed_on):
            changed.append(block)

    return [block.shortcut.register_forward_hook(keep), block.branch.register_forward_hook(compare)]


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, _: object, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        # Fused attention is said to draw also where it drops nothing.
        self.count += torch.Tag.nondeterministic_seeded in func.tags and given.get("dropout_p") != 0.0
        return func(*args, **(kwargs or {}))


def _forgets_to_drop(block: nn.Module, split: nn.Module, x: Tensor) -> bool:
    """Whether of copies of a block and of its taken-apart form this one draws random numbers at fewer places."""
    counts: list[int] = []
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        for module in (block, split):
            with _Draws() as draws:
                try:
                    module.train()(x.clone())
                except (RuntimeError, ValueError):  # as of a norm over one value: no example to train with
                    return False
            counts.append(draws.count)
    return counts[1] < counts[0]


def _move_constants(block: nn.Module) -> None:
    """Move parameters that are constant, in place: a branch that starts at zero would hide what it computes."""
    for number, parameter in enumerate(block.parameters()):
        if parameter.is_floating_point() and parameter.numel() and parameter.min() == parameter.max():
            generator = torch.Generator(parameter.device).manual_seed(number)
            inputs = parameter.numel() // parameter.shape[0] if parameter.dim() else 1
            parameter.detach().normal_(0.0, inputs**-0.5, generator=generator)


def correct_activated(split: nn.Module, x: Tensor) -> None:
    """Correct blocks of which it is wrongly assumed that their activation leaves their input as it is."""
    twin = copy.deepcopy(split).eval()
    for block, copied in zip(split.modules(), twin.modules(), strict=True):
        if isinstance(block, ResidualBlock) and isinstance(block.shortcut, nn.Identity) and block.input_activated:
            copied.register_forward_pre_hook(partial(_correct, block))
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        twin(x.clone())


def _correct(block: ResidualBlock, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Correct a block that is given this input. In training its activation may do more: drop a share, for example."""
    activation = copy.deepcopy(block.activation)
    block.input_activated = all(
        torch.equal(activation.train(training)(inputs[0].clone()), inputs[0]) for training in (False, True)
    )
