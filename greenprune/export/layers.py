"""The building blocks of an exported network: plain PyTorch, without gates.

The text of the classes that a network needs is copied into its module file, so a class here may use nothing but
``math``, ``torch``, ``Tensor``, ``nn``, ``functional`` and functions of this module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """``activation(shortcut(x) + branch(x))``.

    Args:
        branch: F, from x [B, C, ...] to [B, C', ...].
        shortcut: S, to the same shape; None: x itself.
        activation: Applied to the sum; None: the sum itself.
    """

    def __init__(
        self, branch: nn.Module, shortcut: nn.Module | None = None, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The block's output [B, C', ...]."""
        out: Tensor = (x if self.shortcut is None else self.shortcut(x)) + self.branch(x)
        return out if self.activation is None else self.activation(out)


class SqueezeExcitation(nn.Module):
    """Multiplies each channel by a factor made from the means of all channels (arXiv 1709.01507).

    Args:
        factors: From means [B, C, 1, 1] to factors of the same shape.
    """

    def __init__(self, factors: nn.Module) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, C, H, W], each channel times its factor."""
        factors: Tensor = self.factors(x.mean((2, 3), keepdim=True))
        return x * factors


class Scale(nn.Module):
    """Multiplies by a learned factor for each channel (LayerScale, arXiv 2103.17239).

    Args:
        shape: Shape of the factors, which broadcasts over the input.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """``weight * x``."""
        return self.weight * x


class SubsamplePad(nn.Module):
    """Shortcut of a CIFAR ResNet: every second pixel, and new channels that are zero (arXiv 1512.03385, option A).

    Args:
        stride: Step between the pixels kept.
        before: Channels put before the old ones.
        after: Channels put behind them.
    """

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """From [B, C, H, W] to [B, before + C + after, H / stride, W / stride]."""
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of features [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised features [B, C, H, W]."""
        x = x.permute(0, 2, 3, 1)
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Permute(nn.Module):
    """Puts the dimensions into another order.

    Args:
        dims: For each new dimension the old one.
    """

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with its dimensions in the new order."""
        return x.permute(self.dims)


class PatchMerging(nn.Module):
    """Puts the four pixels of each 2x2 patch side by side: from [B, H, W, C] to [B, H / 2, W / 2, 4 C] (Swin)."""

    def forward(self, x: Tensor) -> Tensor:
        """The merged patches; a side of odd length is padded with zeros."""
        x = functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)


class Tokens(nn.Module):
    """From features [B, C, H, W] to tokens [B, H W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """The tokens, row by row."""
        return x.flatten(2).transpose(1, 2)


class ClassTokens(nn.Module):
    """Puts learned tokens before the others (ViT, arXiv 2010.11929).

    Args:
        count: Number of tokens put before the others.
        width: Width of a token.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.width = width
        self.weight = nn.Parameter(torch.zeros(1, count, width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, count + N, width] from tokens [B, N, width]."""
        return torch.cat([self.weight.expand(x.shape[0], -1, -1), x], dim=1)


class PositionEmbedding(nn.Module):
    """Adds a learned vector to the token at each position.

    Args:
        count: Number of tokens.
        width: Width of a token.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.width = width
        self.weight = nn.Parameter(torch.zeros(1, count, width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, count, width] that know where they are."""
        return x + self.weight


class FirstToken(nn.Module):
    """The first of the tokens: from [B, N, E] to [B, E]."""

    def forward(self, x: Tensor) -> Tensor:
        """The first token."""
        return x[:, 0]


class MeanToken(nn.Module):
    """The mean of the tokens after the first few: from [B, N, E] to [B, E].

    Args:
        skipped: Tokens at the beginning that do not count.
    """

    def __init__(self, skipped: int) -> None:
        super().__init__()
        self.skipped = skipped

    def forward(self, x: Tensor) -> Tensor:
        """The mean token."""
        return x[:, self.skipped :].mean(1)
