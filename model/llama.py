"""LLaMA decoder on packed tokens: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Touvron et al. 2023, arXiv 2302.13971; rotary embeddings: Su et al., arXiv 2104.09864; grouped queries: Ainslie et
al., arXiv 2305.13245. Vicuna, Mistral and Yi are the same network with other numbers.

There is no batch dimension: all sequences of a batch lie one after another, (T, D), with an explicit position for
every token, and an attention rule (model/attention.py) says which tokens belong together. Nothing is padded outside
the attention itself, and the same code serves scoring, prefill and cached decoding.

Shapes: T packed tokens, D width, H heads, K key-value heads, d head width.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import ops
from model.config import LlamaConfig

Rope = tuple[Tensor, Tensor]
PART = 512  # most tokens whose wide hidden states are alive while an MLP is recomputed


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the mean square taken in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = ops.RMSNorm.apply(x, self.weight, self.eps)
        # Only linear layers read y. Under autocast each would cast it: q, k and v once, not three times.
        return y.to(ops.compute_dtype(y.device, y.dtype))


def rope_table(positions: Tensor, head_dim: int, theta: float) -> Rope:
    """Positions (T,) -> cos and sin, each (T, 1, d), in fp32."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)  # (d/2,)
    angle = positions[:, None].float() * frequency  # (T, d/2)
    angle = torch.cat([angle, angle], dim=-1)[:, None]  # (T, 1, d)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (x_i, x_{i+d/2}) of x (T, H, d) by its position's angle."""
    cos, sin = (r.to(x.dtype) for r in rope)
    return ops.Rotate.apply(x, cos, sin)


def _drop(x: Tensor, skip: int) -> Tensor:
    """x without its first `skip` rows. A slice that drops nothing would still cost a copy in the backward."""
    return x[skip:] if skip else x


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding: x (T, D) -> (T - skip, D); `attend` holds the attention mask."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        self.head_dim = d
        self.q_proj = nn.Linear(D, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, D, bias=False)

    def forward(self, x: Tensor, rope: Rope, attend: Callable, layer: int, skip: int) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.q_proj(_drop(x, skip)).unflatten(-1, heads)  # (T - skip, H, d)
        k = self.k_proj(x).unflatten(-1, heads)  # (T, K, d)
        v = self.v_proj(x).unflatten(-1, heads)  # (T, K, d)
        q, k = rotate(q, (rope[0][skip:], rope[1][skip:])), rotate(k, rope)
        return self.o_proj(attend(layer, q, k, v).flatten(1))  # (T - skip, D)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): (T, D) -> (T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """Pre-norm block: attention, then the MLP, each added to its input."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, attend: Callable, layer: int, skip: int, half: Callable | None = None,
                ) -> Tensor:
        """x (T, D) -> (T - skip, D): the first `skip` tokens serve as keys and values only.

        half: called as half(function, x) to run the second half of the layer; left out, it just runs.
        """
        x = _drop(x, skip) + self.self_attn(self.input_layernorm(x), rope, attend, layer, skip)
        return half(self.second_half, x) if half else self.second_half(x)

    def second_half(self, x: Tensor) -> Tensor:
        """Norm, MLP and residual: (T, D) -> (T, D)."""
        return x + self.mlp(self.post_attention_layernorm(x))


class Recomputed:
    """Runs a layer so that the backward recomputes it, and the wide hidden states of its MLP a part of the tokens at
    a time.

    The parts are checkpoints within that of the layer. When the layer is recomputed, only their inputs are wanted, so
    that they run once each: in the forward, and when the backward reaches them.
    """

    def __init__(self):
        self.again = False

    def __call__(self, layer: Layer, *args) -> Tensor:
        contexts = lambda: (nullcontext(), self._again())  # noqa: E731
        return checkpoint(layer, *args, self.in_parts, use_reentrant=False, context_fn=contexts)

    def in_parts(self, function: Callable, x: Tensor) -> Tensor:
        """`function` of x (T, D), whose rows do not depend on one another."""
        if self.again:
            function = nn.Identity()
        parts = x.tensor_split(math.ceil(len(x) / PART))
        return torch.cat([checkpoint(function, part, use_reentrant=False) for part in parts])

    @contextmanager
    def _again(self) -> Iterator[None]:
        self.again = True
        try:
            yield
        finally:
            self.again = False


class Decoder(nn.Module):
    """Embeddings, layers and final norm (`model.` in the published tensor names)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False  # recompute each layer in backward instead of keeping its activations

    def forward(self, x: Tensor, positions: Tensor, attend: Callable) -> Tensor:
        """Embeddings x (T, D) at positions (T,) -> final states (T - attend.skip, D)."""
        rope = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            recompute = self.checkpointing and torch.is_grad_enabled()
            args = (x, rope, attend, i, attend.skip if i == last else 0)
            x = Recomputed()(layer, *args) if recompute else layer(*args)
        return self.norm(x)


class CausalLM(nn.Module):
    """Decoder and language-model head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
