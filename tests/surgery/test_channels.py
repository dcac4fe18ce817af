"""Removal of channels and blocks in every family: exactly what the masked network computed, in training too."""

from __future__ import annotations

import copy

import pytest
import torch
from families import BATCH, CLASSES, FAMILIES, difference, follow, gated, patterns
from torch import Tensor, nn
from torch.nn import functional

from greenprune.surgery import Surgeon, carry_out

TOLERANCE = 1e-4
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)


def train_pass(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in training; leaves the gradients of the task in the parameters."""
    model.train().zero_grad()
    logits = model(images)
    functional.cross_entropy(logits, torch.arange(BATCH) % CLASSES).backward()
    return logits.detach()


def evaluate(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


def largest_difference_of_gradients(masked: nn.Module, origin: dict, surgeon: Surgeon) -> float:
    """Over all surviving parameters, each relative to its gradient, or to a small part of the whole one."""
    whole = float(torch.stack([p.grad.norm() for p in masked.parameters()]).norm())
    alive = set(surgeon.model.parameters())
    seen, largest = set(), 0.0
    for parameter in masked.parameters():
        survivor, expected = follow(surgeon, origin[parameter], parameter.grad)
        if survivor in alive:
            seen.add(survivor)
            assert survivor.grad is not None
            assert survivor.grad.shape == expected.shape
            largest = max(largest, difference(expected, survivor.grad, 1e-3 * whole))
    assert seen == alive
    return largest


def compare(name: str, kind: str) -> dict:
    dense = gated(name, kind)
    images = FAMILIES[name].images()
    found = {}
    for label, pattern in patterns(dense).items():
        masked = copy.deepcopy(dense)
        pattern.mask(masked)
        removed = copy.deepcopy(masked)
        origin = dict(zip(masked.parameters(), removed.parameters(), strict=True))
        surgeon = carry_out(pattern.operations(masked), removed)
        evaluated = difference(evaluate(masked, images), evaluate(removed, images))
        trained = difference(train_pass(masked, images), train_pass(removed, images))
        found[label] = (evaluated, trained, largest_difference_of_gradients(masked, origin, surgeon))
        again = difference(evaluate(masked, images), evaluate(removed, images))
        found[label] += (again,)
    return found


@EVERY_FAMILY
@pytest.mark.parametrize("kind", ["static", "conditional"])
def test_the_removed_network_computes_what_the_masked_one_computes(name: str, kind: str) -> None:
    for label, found in compare(name, kind).items():
        assert max(found) <= TOLERANCE, f"{label}: {found}"
