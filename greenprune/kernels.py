"""Triton kernels for what a gate does on a GPU: each in one pass over the activations, or one launch.

Written out in PyTorch's operators a gate takes some twenty small launches and three passes over the activations more
than a block without one. Here a block's gate takes four launches, and the sum that it switches is fused with the
activation behind it. Results are those of the operators: sums are taken in fp32 and rounded once.

The module needs Triton, which comes with PyTorch's builds for GPUs: :func:`greenprune.models.kernels_for` imports it
where it can be used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PIECE = 16_384  # elements of a sample that one program goes through
_TILE = 4_096  # elements at a time


@triton.jit
def _sum_forward(
    shortcut,
    branch,
    decision,
    out,
    kept,
    size,
    every,
    keeps: tl.constexpr,
    relu: tl.constexpr,
    piece: tl.constexpr,
    tile: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    on = tl.load(decision + sample)
    is_kept = sample % every == 0
    start = tl.program_id(1) * piece
    for offset in range(0, piece, tile):
        index = start + offset + tl.arange(0, tile)
        inside = index < size
        of_branch = tl.load(branch + sample * size + index, mask=inside)
        total = tl.load(shortcut + sample * size + index, mask=inside).to(tl.float32) + of_branch.to(tl.float32) * on
        if relu:
            # As torch's: what is not a number stays so.
            total = tl.where(total < 0, 0.0, total)
        tl.store(out + sample * size + index, total.to(out.dtype.element_ty), mask=inside)
        if keeps:
            tl.store(kept + sample // every * size + index, of_branch, mask=inside & is_kept)


@triton.jit
def _sum_backward(
    grad,
    out,
    kept,
    decision,
    to_shortcut,
    to_branch,
    to_decision,
    size,
    every,
    keeps: tl.constexpr,
    relu: tl.constexpr,
    piece: tl.constexpr,
    tile: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    on = tl.load(decision + sample)
    is_kept = sample % every == 0
    start = tl.program_id(1) * piece
    total = tl.zeros((tile,), tl.float32)
    for offset in range(0, piece, tile):
        index = start + offset + tl.arange(0, tile)
        inside = index < size
        slope = tl.load(grad + sample * size + index, mask=inside, other=0.0)
        if relu:
            passed = tl.load(out + sample * size + index, mask=inside, other=0.0)
            slope = tl.where(passed <= 0, 0.0, slope.to(tl.float32)).to(slope.dtype)
        tl.store(to_shortcut + sample * size + index, slope, mask=inside)
        wide = slope.to(tl.float32)
        tl.store(to_branch + sample * size + index, (wide * on).to(to_branch.dtype.element_ty), mask=inside)
        if keeps:
            of_branch = tl.load(kept + sample // every * size + index, mask=inside & is_kept, other=0.0)
            total += wide * of_branch.to(tl.float32)
    if keeps:
        tl.store(to_decision + sample * tl.num_programs(1) + tl.program_id(1), tl.sum(total))


@triton.jit
def _decide_forward(
    x,
    weight,
    bias,
    direction,
    logit,
    decision,
    counted,
    channels,
    positions,
    sample_stride,
    channel_stride,
    position_stride,
    eps,
    scale,
    block_c: tl.constexpr,
    block_p: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, block_c)
    is_channel = channel < channels
    total = tl.zeros((block_c,), tl.float32)
    for start in range(0, positions, block_p):
        position = start + tl.arange(0, block_p)
        place = position.to(tl.int64)[:, None] * position_stride + channel[None, :] * channel_stride
        inside = (position < positions)[:, None] & is_channel[None, :]
        total += tl.sum(tl.load(x + sample * sample_stride + place, mask=inside, other=0.0).to(tl.float32), axis=0)
    pooled = total / positions
    centred = tl.where(is_channel, pooled - tl.sum(pooled) / channels, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred) / channels + eps)
    aligned = tl.sum(normed * tl.load(weight + channel, mask=is_channel, other=0.0))
    value = tl.load(bias) + aligned * scale
    tl.store(direction + sample * channels + channel, normed, mask=is_channel)
    tl.store(logit + sample, value)
    tl.store(decision + sample, (value > 0).to(tl.float32))
    tl.store(counted + sample, (value > 0).to(tl.float32))


@triton.jit
def _decide_backward(
    task,
    counted,
    logit,
    direction,
    loss_scale,
    to_weight,
    to_bias,
    channels,
    voices,
    every,
    task_stride,
    counted_stride,
    curvature,
    factor,
    pull,
    bound,
    scale,
    scaled: tl.constexpr,
    block_c: tl.constexpr,
    block_v: tl.constexpr,
):
    channel = tl.program_id(0) * block_c + tl.arange(0, block_c)
    is_channel = channel < channels
    if scaled:
        pull = pull * tl.load(loss_scale)
        curvature = curvature / tl.load(loss_scale)
    weights = tl.zeros((block_c,), tl.float32)
    biases = 0.0
    for start in range(0, voices, block_v):
        voice = start + tl.arange(0, block_v)
        is_voice = voice < voices
        sample = voice.to(tl.int64) * every
        value = tl.load(logit + sample, mask=is_voice, other=0.0)
        slope = tl.load(task + sample * task_stride, mask=is_voice, other=0.0)
        slope -= tl.where(value > 0, curvature * slope * slope, 0.0)
        slope = (slope + tl.load(counted + sample * counted_stride, mask=is_voice, other=0.0)) * factor
        # At the bounds only what moves the logit inward passes.
        least = tl.where(value < bound, -pull, 0.0)
        most = tl.where(value > -bound, pull, 0.0)
        slope = tl.minimum(tl.maximum(slope, least, propagate_nan=tl.PropagateNan.ALL), most, tl.PropagateNan.ALL)
        slope = tl.where(is_voice, slope, 0.0)
        inside = is_voice[:, None] & is_channel[None, :]
        seen = tl.load(direction + sample[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        weights += tl.sum(slope[:, None] * seen, axis=0)
        biases += tl.sum(slope)
    tl.store(to_weight + channel, weights * scale, mask=is_channel)
    if tl.program_id(0) == 0:
        tl.store(to_bias, biases)


def _pieces(size: int) -> int:
    return -(-size // _PIECE)


def gated_sum(
    shortcut: Tensor, branch: Tensor, decision: Tensor, every: int, *, keeps: bool, relu: bool
) -> tuple[Tensor, Tensor | None]:
    """``shortcut + decision * branch``, then ReLU if asked for.

    Args:
        shortcut: Activations [B, ...] of whichever dense layout.
        branch: The same of the same shape, layout and precision.
        decision: Decisions [B], fp32.
        every: Of how many samples one has a gradient towards its decision.
        keeps: Whether decisions have a gradient at all.
        relu: Whether ReLU follows.

    Returns:
        The result, and the branch of every ``every``-th sample [ceil(B / every), N] for :func:`gated_sum_backward`.
    """
    samples, size = len(branch), branch[0].numel()
    out = torch.empty_like(branch)
    kept = branch.new_empty(-(-samples // every), size) if keeps else None
    grid = (samples, _pieces(size))
    with torch.cuda.device_of(branch):
        _sum_forward[grid](
            shortcut,
            branch,
            decision,
            out,
            out if kept is None else kept,
            size,
            every,
            keeps,
            relu,
            _PIECE,
            _TILE,
            num_warps=8,
        )
    return out, kept


def gated_sum_backward(
    grad: Tensor, out: Tensor | None, kept: Tensor | None, decision: Tensor, every: int, stride: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`gated_sum` towards shortcut, branch and decision.

    Args:
        grad: Gradient of the result [B, ...].
        out: The result if ReLU followed; else None.
        kept: As :func:`gated_sum` gave it.
        decision: Decisions [B], fp32.
        every: As it was there.
        stride: Layout of the result.

    Returns:
        The gradients; towards the decision [B] in fp32, 0 for samples without one, None if nothing was kept.
    """
    if grad.stride() != stride:
        grad = torch.empty_strided(grad.shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)
    samples, size = len(grad), grad[0].numel()
    grid = (samples, _pieces(size))
    to_shortcut, to_branch = torch.empty_like(grad), torch.empty_like(grad)
    sums = decision.new_empty(grid)
    with torch.cuda.device_of(grad):
        _sum_backward[grid](
            grad,
            grad if out is None else out,
            grad if kept is None else kept,
            decision,
            to_shortcut,
            to_branch,
            sums,
            size,
            every,
            kept is not None,
            out is not None,
            _PIECE,
            _TILE,
            num_warps=8,
        )
    if kept is None:
        return to_shortcut, to_branch, None
    return to_shortcut, to_branch, sums.sum(1) if grid[1] > 1 else sums.view(samples)


def decide(x: Tensor, dim: int, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decisions of a gate ``a = w . norm(GAP(x)) / sqrt(C) + b`` from its input, read once.

    Args:
        x: The input [B, ...] of C channels, whose other dimensions lie one behind another in memory.
        dim: Dimension of the channels.
        weight: w [1, C], fp32.
        bias: b [1], fp32.
        eps: What is added to the variance.

    Returns:
        Decisions [B, 1], the same again for counts, logits [B, 1], and the normalised input [B, C] for
        :func:`decide_backward`; fp32.
    """
    samples, channels = len(x), x.shape[dim]
    positions = x[0].numel() // channels
    channel_stride, position_stride = x.stride(dim), _stride_of(x, dim)
    assert position_stride is not None
    block_c = triton.next_power_of_2(channels)
    block_p = max(1, min(triton.next_power_of_2(positions), _TILE // block_c))
    direction = bias.new_empty(samples, channels)
    logit, decision, counted = (bias.new_empty(samples, 1) for _ in range(3))
    with torch.cuda.device_of(x):
        _decide_forward[(samples,)](
            x,
            weight,
            bias,
            direction,
            logit,
            decision,
            counted,
            channels,
            positions,
            x.stride(0),
            channel_stride,
            position_stride,
            eps,
            channels**-0.5,
            block_c,
            block_p,
            num_warps=8,
        )
    return decision, counted, logit, direction


def decide_backward(
    task: Tensor,
    counted: Tensor,
    logit: Tensor,
    direction: Tensor,
    *,
    every: int,
    curvature: float,
    factor: float,
    pull: float,
    bound: float,
    loss_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`decide` towards weight [1, C] and bias [1], by the bounded straight-through estimator.

    Args:
        task: Gradient of the decisions [B, 1], which are bent as :mod:`greenprune.gating.gates` says.
        counted: Gradient of the counted decisions [B, 1].
        logit: Logits [B, 1].
        direction: As :func:`decide` gave it.
        every: Of how many samples one teaches the gate.
        curvature: Factor of the square of a gradient.
        factor: Factor of a gradient before it is bounded.
        pull: Largest gradient of one sample.
        bound: Bound of the logits, at which only what moves them inward passes.
        loss_scale: Factor (scalar) by which mixed precision scales the loss; None if it does not.
    """
    samples, channels = direction.shape
    to_weight, to_bias = direction.new_empty(1, channels), direction.new_empty(1)
    block_c = min(64, triton.next_power_of_2(channels))
    with torch.cuda.device_of(logit):
        _decide_backward[(triton.cdiv(channels, block_c),)](
            task,
            counted,
            logit,
            direction,
            logit if loss_scale is None else loss_scale,
            to_weight,
            to_bias,
            channels,
            -(-samples // every),
            every,
            task.stride(0),
            counted.stride(0),
            curvature,
            factor,
            pull,
            bound,
            channels**-0.5,
            loss_scale is not None,
            block_c,
            64,
        )
    return to_weight, to_bias


def _stride_of(x: Tensor, without: int = 0) -> int | None:
    """Distance in memory between neighbours in a sample, where all follow each other so in some order; else None.

    Args:
        x: A tensor [B, ...].
        without: Another dimension to leave aside.
    """
    dims = {*range(1, x.dim())} - {without % x.dim()}
    rest = sorted((x.stride(dim), x.shape[dim]) for dim in dims if x.shape[dim] > 1)
    if not rest:
        return 1
    expected: int = rest[0][0]
    for stride, length in rest:
        if stride != expected:
            return None
        expected *= length
    return int(rest[0][0])


_PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def can_decide(x: Tensor, dim: int) -> bool:
    """Whether :func:`decide` takes an input of this precision and layout."""
    return x.numel() > 0 and x.dtype in _PRECISIONS and x.shape[dim] <= _TILE and _stride_of(x, dim) is not None


def can_sum(shortcut: Tensor, branch: Tensor) -> bool:
    """Whether :func:`gated_sum` takes tensors of this precision and layout."""
    alike = shortcut.shape == branch.shape and shortcut.stride() == branch.stride() and shortcut.dtype == branch.dtype
    if not alike or branch.numel() == 0 or branch.dtype not in _PRECISIONS:
        return False
    return _stride_of(branch) == 1 and branch.stride(0) == branch[0].numel()


def try_out(device: torch.device) -> None:
    """Make and run each kernel once on a small block, in each precision of the device.

    Raises:
        Exception: Whatever Triton, its compiler or the driver raises where it does not work.
    """
    halves = torch.bfloat16 if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0) else None
    weight, bias = torch.zeros(1, 8, device=device), torch.zeros(1, device=device)
    for dtype in filter(None, (torch.float32, torch.float16, halves)):
        x = torch.zeros(4, 8, 2, 2, device=device, dtype=dtype)
        decision, counted, logit, direction = decide(x, 1, weight, bias, 1e-5)
        out, kept = gated_sum(x, x, decision.view(4), 4, keeps=True, relu=True)
        gated_sum_backward(out, out, kept, decision.view(4), 4, out.stride())
        given = {"every": 4, "curvature": 1.0, "factor": 1.0, "pull": 1.0, "bound": 1.0, "loss_scale": None}
        decide_backward(decision, counted, logit, direction, **given)  # type: ignore[arg-type]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
