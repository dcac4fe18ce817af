"""Blocks are compiled one by one, anew where the structure changed and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from greenprune.config import GateConfig, ModelConfig
from greenprune.engine.compilation import compile_blocks
from greenprune.gating import attach_gates, find_gates, take_decisions
from greenprune.models import build_model
from greenprune.surgery import Surgeon

# torch.compile itself looks at tensors in a way that torch warns of, and hides the warning unless it is an error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Counting:
    """A backend of torch.compile that runs what it is given and counts it."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(kind: str = "conditional") -> nn.Module:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="resnet20"), classes=10, channels=3, image_size=8)
    attach_gates(model, GateConfig(kind=kind, units=["block", "channel"]))  # type: ignore[arg-type]
    return model


def outputs(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Logits of a training pass and the gradients of the weights."""
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model.train()
    model.zero_grad()
    logits = model(images)
    loss = logits.square().mean()
    gates = list(find_gates(model).values())
    if gates:
        loss = loss + 0.1 * take_decisions(gates)[0].sum()
    loss.backward()
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", ["conditional", "static"])
def test_compiled_blocks_compute_what_the_network_computes(kind: str) -> None:
    plain, compiled = network(kind), network(kind)
    backend = Counting()
    compile_blocks(compiled, backend)
    (ours, our_gradients), (theirs, their_gradients) = outputs(compiled), outputs(plain)
    assert backend.graphs > 0
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_pass_that_was_learnt_from_may_come_before_one_that_is_not_compiled() -> None:
    """The compiled graph does not tell where a backward pass has been."""
    model = network()
    images = torch.randn(4, 3, 8, 8)
    compile_blocks(model, "aot_eager")
    loss = model(images).square().mean()
    loss.backward()
    with torch.compiler.set_stance("force_eager"):
        logits = model(images)
    rates, _ = take_decisions(list(find_gates(model).values()))
    assert rates.requires_grad
    assert loss.requires_grad
    assert logits.requires_grad


def test_only_what_changed_is_compiled_anew() -> None:
    plain, compiled = network(), network()
    backend = Counting()
    compile_blocks(compiled, backend)
    outputs(compiled)
    first = backend.graphs
    outputs(compiled)
    assert backend.graphs == first

    for model in (plain, compiled):
        Surgeon(model).remove_block("stages.1.1")
    outputs(compiled)
    after_block = backend.graphs
    # What stands in the block's place is new, the other blocks are as they were.
    assert after_block - first <= 1

    for model in (plain, compiled):
        Surgeon(model).remove_channels("stages.2.1:hidden", [0, 5, 9])
    (ours, our_gradients), (theirs, their_gradients) = outputs(compiled), outputs(plain)
    assert 1 <= backend.graphs - after_block <= 3  # the graph of the block that lost channels, and no other's
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_many_structures_do_not_end_compilation() -> None:
    """torch.compile gives up silently after 8 variants of a function; a run has as many as removals."""
    model = network("static")
    backend = Counting()
    compile_blocks(model, backend)
    outputs(model)
    for channel in range(20):
        before = backend.graphs
        Surgeon(model).remove_channels("stages.2.1:hidden", [channel])
        outputs(model)
        assert backend.graphs > before, f"not compiled after removal {channel + 1}"
