"""CLIP: a vision transformer and a text transformer that meet in one space.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv
2103.00020. LLaVA takes patch features from the vision tower. In the shared space retrieval (Re-Align)
compares images with images, object removal (AdaViP) and the verifier (FiSAO) images with texts.

Module names are the tensor names of the published checkpoints (`pre_layrnorm` is spelled so there), so a
state dict loads without a translation table.

Shapes: B batch, P patches, T tokens, D width, H heads, d = D / H, E shared space.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import BadInput
from model.attention import mix
from model.config import ClipConfig, ClipTextConfig, VisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "relu": F.relu}  # "gelu": exact


class Attention(nn.Module):
    """Multi-head self-attention with biases: (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(mix(q, k, v, causal).flatten(2))  # from (B, T, H, d)


class MLP(nn.Module):
    """Linear, activation, linear: (.., D) -> (.., D)."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-LayerNorm transformer block, the same in both towers."""

    def __init__(self, config: VisionConfig | ClipTextConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = Attention(width, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """Blocks one after the other: (B, T, D) -> (B, T, D)."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.checkpointing = False  # recompute each block in the backward instead of keeping its activations

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        recompute = self.checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, causal, use_reentrant=False) if recompute else layer(x, causal)
        return x


class VisionEmbeddings(nn.Module):
    """pixels (B, 3, S, S) -> class token and patches with their positions (B, 1+P, D).

    class_token: False for SigLIP (Janus-Pro), which has biases in the patch embedding and no class token: (B, P, D).
    """

    def __init__(self, config: VisionConfig, class_token: bool = True):
        super().__init__()
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(width)) if class_token else None
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=not class_token)
        self.position_embedding = nn.Embedding(config.num_patches + class_token, width)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, P, D)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        return x + self.position_embedding.weight.to(x.dtype)


class VisionTransformer(nn.Module):
    """The vision tower up to `layers` encoder layers; layers whose output is never read are not built.

    Args:
        layers: encoder layers to build; None builds all of them and the final LayerNorm (for the pooled state).
    """

    def __init__(self, config: VisionConfig, layers: int | None = None):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        count = config.num_hidden_layers if layers is None else layers
        self.encoder = Encoder(EncoderLayer(config) for _ in range(count))
        if layers is None:
            self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> hidden states (B, 1+P, D), class token first. ValueError on another size."""
        size = self.config.image_size
        if tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"images are {tuple(pixels.shape[1:])}, the vision tower takes (3, {size}, {size})")
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)))


class TextEmbeddings(nn.Module):
    """ids (B, T) -> tokens with their positions (B, T, D)."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B, T, D)


class TextTransformer(nn.Module):
    """Causal text tower; the state at the first EOS represents the text."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T), padded with EOS -> pooled states (B, D)."""
        states = self.final_layer_norm(self.encoder(self.embeddings(ids), causal=True))  # (B, T, D)
        # Checkpoints from before transformers 4.24 carry eos_token_id = 2 although EOS is the largest id.
        eos = self.config.eos_token_id
        end = ids.argmax(1) if eos == 2 else (ids == eos).int().argmax(1)  # (B,)
        return states[torch.arange(len(ids), device=ids.device), end]


class CLIP(nn.Module):
    """Both towers with their projections. `logit_scale` is the log of the inverse temperature."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))
        self.vision_model = VisionTransformer(config.vision)
        self.text_model = TextTransformer(config.text)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)

    def image_embeddings(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> unit vectors (B, E)."""
        cls = self.vision_model(pixels)[:, 0]  # (B, D)
        return F.normalize(self.visual_projection(self.vision_model.post_layernorm(cls)), dim=-1)

    def text_embeddings(self, texts: list[list[int]]) -> Tensor:
        """Token ids of each text (with BOS and EOS, at most `max_position_embeddings`) -> unit vectors (B, E)."""
        eos, limit = self.config.text.eos_token_id, self.config.text.max_position_embeddings
        longest = max(len(t) for t in texts)
        if longest > limit:
            raise BadInput(f"a text has {longest} tokens, the text tower takes {limit}")
        pad = max(max(t) for t in texts) if eos == 2 else eos
        ids = torch.tensor([t + [pad] * (longest - len(t)) for t in texts], device=self.logit_scale.device)
        return F.normalize(self.text_projection(self.text_model(ids)), dim=-1)
