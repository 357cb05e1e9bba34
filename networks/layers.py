"""What GroundingDINO (networks/dino.py) and SAM (networks/sam.py) are both made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import mix


class Attention(nn.Module):
    """Multi-head attention within `inner` channels; the projections of query, key and value are one tensor, as in
    nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, inner: int | None = None):
        super().__init__()
        self.heads, inner = heads, inner or width
        self.in_proj, self.out_proj = nn.Linear(width, 3 * inner), nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
        """q (B, T, D), k and v (B, K, D), visible (B, T or 1, K) bool -> (B, T, D)."""
        weights, biases = self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (self.heads, -1)) for x, w, b in zip((q, k, v), weights, biases))
        return self.out_proj(mix(q, k, v, mask=None if visible is None else visible[:, None]).flatten(2))


class Head(nn.Module):
    """Linear layers with ReLU between them: (.., first width) -> (.., last width)."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def centres(H: int, W: int, device: torch.device) -> Tensor:
    """The centres of a map's positions (1, H * W, 2), x and y in shares of the map."""
    y, x = torch.meshgrid(torch.arange(H, device=device), torch.arange(W, device=device), indexing="ij")
    return torch.stack([(x + 0.5) / W, (y + 0.5) / H], -1).flatten(0, 1)[None]
