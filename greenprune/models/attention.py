"""Self-attention whose heads can be gated and removed one by one: of plain and of shifted-window transformers.

The attention modules of PyTorch, torchvision, timm and transformers take the width or the number of heads from how they
were made, so none of them can lose a head. These hold the same parameters and compute the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) over tokens [B, N, E].

    Args:
        qkv: Projection from E to 3 x heads x head_dim: all queries, all keys, all values, each head by head.
        proj: Projection of the heads' outputs, from heads x head_dim to E.
        heads: Number of heads.
        dropout: Probability with which an attention weight is dropped in training.

    Attributes:
        merged: The heads' outputs side by side, [B, N, heads x head_dim], pass through it: the place for a gate.
    """

    def __init__(self, qkv: nn.Linear, proj: nn.Linear, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = qkv
        self.merged: nn.Module = nn.Identity()
        self.proj = proj
        self.heads = heads
        self.head_dim = qkv.out_features // (3 * heads)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, E] that have attended to each other."""
        qkv = torch.unflatten(self.qkv(x), 2, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        out = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], dropout_p=dropout)
        projected: Tensor = self.proj(self.merged(out.transpose(1, 2).flatten(2)))
        return projected


class SeparateSelfAttention(nn.Module):
    """Multi-head self-attention over tokens [B, N, E] whose queries, keys and values have a projection each.

    Args:
        query: Projection from E to heads x head_dim: the queries, head by head.
        key: The same of the keys.
        value: The same of the values.
        proj: Projection of the heads' outputs, from heads x head_dim to E.
        heads: Number of heads.
        dropout: Probability with which an attention weight is dropped in training.

    Attributes:
        merged: The heads' outputs side by side, [B, N, heads x head_dim], pass through it: the place for a gate.
    """

    def __init__(
        self, query: nn.Linear, key: nn.Linear, value: nn.Linear, proj: nn.Linear, heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.query = query
        self.key = key
        self.value = value
        self.merged: nn.Module = nn.Identity()
        self.proj = proj
        self.heads = heads
        self.head_dim = query.out_features // heads
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, N, E] that have attended to each other."""
        query, key, value = (
            torch.unflatten(each(x), 2, (self.heads, self.head_dim)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        out = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        projected: Tensor = self.proj(self.merged(out.transpose(1, 2).flatten(2)))
        return projected


class WindowAttention(nn.Module):
    """Self-attention inside shifted windows (Swin, arXiv 2103.14030; V2 with cosine attention, arXiv 2111.09883).

    Args:
        qkv: Projection from C to 3 x heads x head_dim.
        proj: Projection of the heads' outputs to C.
        heads: Number of heads.
        window: Height and width of a window.
        shift: Shift of the windows.
        position_index: For each pair of positions in a window, its row in the table of biases; flat.
        table: V1: learned biases [rows, heads].
        coordinates: V2: the rows' relative coordinates, from which ``bias_mlp`` makes the biases.
        bias_mlp: V2: from coordinates to a bias for each head.
        logit_scale: V2: logarithm of each head's factor of the cosines, [heads, 1, 1].
        dropout: Probability with which an attention weight is dropped in training.

    Attributes:
        merged: The heads' outputs side by side, [B, H, W, heads x head_dim], pass through it: the place for a gate.
    """

    def __init__(  # noqa: PLR0913 -- what a window attention is made of
        self,
        qkv: nn.Linear,
        proj: nn.Linear,
        *,
        heads: int,
        window: tuple[int, int],
        shift: tuple[int, int],
        position_index: Tensor,
        table: nn.Parameter | None = None,
        coordinates: Tensor | None = None,
        bias_mlp: nn.Sequential | None = None,
        logit_scale: nn.Parameter | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.qkv = qkv
        self.merged: nn.Module = nn.Identity()
        self.proj = proj
        self.heads = heads
        self.head_dim = qkv.out_features // (3 * heads)
        self.window = window
        self.shift = shift
        self.dropout = dropout
        self.table = table
        self.bias_mlp = bias_mlp
        self.logit_scale = logit_scale
        self.position_index: Tensor
        self.coordinates: Tensor | None
        self.register_buffer("position_index", position_index)
        self.register_buffer("coordinates", coordinates)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, H, W, C], each position attended to its window."""
        _, height, width, _ = x.shape
        window_h, window_w = self.window
        x = functional.pad(x, (0, 0, 0, -width % window_w, 0, -height % window_h))
        rows, columns = x.shape[1] // window_h, x.shape[2] // window_w
        # A single window that covers all has nothing to be shifted against.
        shift = (self.shift[0] if rows > 1 else 0, self.shift[1] if columns > 1 else 0)
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2))
        windows = torch.unflatten(torch.unflatten(x, 2, (columns, window_w)), 1, (rows, window_h))
        tokens = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, windows, positions, C]
        out = self._attend(tokens, self._biases(tokens, rows, columns, shift))
        out = torch.unflatten(torch.unflatten(out, 2, (window_h, window_w)), 1, (rows, columns))
        out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shift):
            out = torch.roll(out, shift, dims=(1, 2))
        # The projection works on each position alone, so the padding need not pass through it.
        projected: Tensor = self.proj(self.merged(out[:, :height, :width].contiguous()))
        return projected

    def _attend(self, tokens: Tensor, biases: Tensor) -> Tensor:
        """Attention of each window: tokens [B, windows, P, C] to the heads' outputs [B, windows, P, heads x D]."""
        bias: Tensor | None = self.qkv.bias
        if self.logit_scale is not None and bias is not None:
            queries, keys, values = bias.chunk(3)
            bias = torch.cat([queries, torch.zeros_like(keys), values])  # V2: keys have no bias
        qkv = functional.linear(tokens, self.qkv.weight, bias)
        query, key, value = torch.unflatten(qkv, 3, (3, self.heads, self.head_dim)).permute(3, 0, 1, 4, 2, 5)
        scale = None
        if self.logit_scale is not None:
            factor = self.logit_scale.clamp(max=math.log(100.0)).exp()
            query, key, scale = functional.normalize(query, dim=-1) * factor, functional.normalize(key, dim=-1), 1.0
        dropout = self.dropout if self.training else 0.0
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=biases.to(query.dtype), dropout_p=dropout, scale=scale
        )
        return out.transpose(2, 3).flatten(3)

    def _biases(self, tokens: Tensor, rows: int, columns: int, shift: tuple[int, int]) -> Tensor:
        """What is added to the attention logits, [1 or windows, heads, P, P]."""
        positions = tokens.shape[2]
        table: Tensor | None = (
            self.table if self.bias_mlp is None else self.bias_mlp(self.coordinates).view(-1, self.heads)
        )
        assert table is not None
        biases = table[self.position_index].view(1, positions, positions, self.heads).permute(0, 3, 1, 2)
        if self.bias_mlp is not None:
            biases = 16 * torch.sigmoid(biases)
        if not any(shift):
            return biases
        # Windows at the edge hold positions from both ends of the image, which must not attend to each other.
        row, column = (
            _region(count, size, moved, tokens.device)
            for count, size, moved in zip((rows, columns), self.window, shift, strict=True)
        )
        region = (3 * row[:, None] + column).view(rows, self.window[0], columns, self.window[1])
        region = region.transpose(1, 2).reshape(rows * columns, 1, positions)
        apart = region.unsqueeze(2) != region.unsqueeze(3)  # [windows, 1, P, P]
        return biases + apart * -100.0


def _region(windows: int, size: int, moved: int, device: torch.device) -> Tensor:
    """For each position along a side: 0 before the last window, then 1, and 2 for what was rolled over."""
    position = torch.arange(windows * size, device=device)
    if not moved:
        return torch.zeros_like(position)
    return (position >= (windows - 1) * size).long() + (position >= windows * size - moved)
