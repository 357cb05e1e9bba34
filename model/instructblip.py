"""InstructBLIP: an EVA tower, a Q-Former that reads image and question, a linear projection, a LLaMA decoder.

Dai et al. 2023, "InstructBLIP", arXiv 2305.06500, on BLIP-2 (Li et al., 2301.12597) and EVA-CLIP's ViT-g (2303.15389).

Learned queries look at the patches in every second layer of the Q-Former, and at the question in each, so what an image
becomes depends on what is asked:

    [queries, question] -> joint self-attention -> queries: cross-attention to the patches, MLP of their own
                                                -> question: MLP                                    12 times
    queries -> projection -> the image tokens of the prompt

The tower runs once per image (`vision_features`), the Q-Former once per image and question (`connect`). Module names
are the tensor names of the published checkpoints. What its files decide is in model/families/instructblip.py.

Shapes: N tiles (images), S pixels a side, P patches and the class token, C tower width, H heads of width d; G prompts
with an image, Q queries, T tokens of the longest question, E Q-Former width; D decoder width, I = G Q image tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from model.attention import mix
from model.clip import MLP, Encoder
from model.config import LlamaConfig
from model.llama import CausalLM
from model.vlm import VLM


@dataclass(frozen=True)
class EvaConfig:
    """The tower; ViT-g of EVA-CLIP without its last block. `post_layernorm_eps` is that of the norm after it."""

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    post_layernorm_eps: float = 1e-6


@dataclass(frozen=True)
class QFormerConfig:
    """BERT with queries. Every `cross_attention_frequency`-th layer, from the first, looks at the image."""

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    cross_attention_frequency: int = 2


@dataclass(frozen=True)
class InstructBlipConfig:
    """EVA -> Q-Former -> projection -> LLaMA.

    num_query_tokens: queries, which become the image tokens.
    surplus_rows: rows of the two tables in the file after the `text.vocab_size` that text can use.
    """

    vision: EvaConfig
    qformer: QFormerConfig
    text: LlamaConfig
    num_query_tokens: int = 32
    image_token_index: int = 32001
    surplus_rows: int = 0
    template: str = "instructblip"
    model_type: str = "instructblip"

    @property
    def tile_tokens(self) -> int:
        """Image tokens of a tile: the queries."""
        return self.num_query_tokens


def named(**modules: nn.Module) -> nn.ModuleDict:
    """Modules under the names that published checkpoints have."""
    return nn.ModuleDict(modules)


# ------------------------------------------------------------------------------------------------------ tower


class EvaLayer(nn.Module):
    """Pre-LayerNorm block with exact GELU: (N, P, C) -> (N, P, C)."""

    def __init__(self, config: EvaConfig):
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.self_attn = named(qkv=nn.Linear(width, 3 * width), projection=nn.Linear(width, width))
        self.mlp = MLP(width, inner, "gelu")

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        q, k, v = self.self_attn.qkv(self.layer_norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (N, P, H, d)
        x = x + self.self_attn.projection(mix(q, k, v, causal).flatten(2))
        return x + self.mlp(self.layer_norm2(x))


class EvaEmbeddings(nn.Module):
    """pixels (N, 3, S, S) -> class token and patches with their positions (N, P, C)."""

    def __init__(self, config: EvaConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, patch, patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + (config.image_size // patch) ** 2, width))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (N, P - 1, C)
        return torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], 1) + self.position_embedding


class EvaTower(nn.Module):
    """pixels (N, 3, S, S) -> states of class token and patches (N, P, C), normalised."""

    def __init__(self, config: EvaConfig):
        super().__init__()
        self.embeddings = EvaEmbeddings(config)
        self.encoder = Encoder(EvaLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.post_layernorm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.embeddings(pixels.to(self.post_layernorm.weight.dtype))))


# --------------------------------------------------------------------------------------------------- Q-Former


class PostNormAttention(nn.Module):
    """LN(x + attention from x to y): x (G, n, E), y (G, m, source) -> (G, n, E)."""

    def __init__(self, config: QFormerConfig, source: int):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.attention = named(query=nn.Linear(width, width), key=nn.Linear(source, width),
                               value=nn.Linear(source, width))
        self.output = named(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, config.layer_norm_eps))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (G, 1, n, m) bool, True where x may look; None: everywhere."""
        of = self.attention
        q, k, v = (z.unflatten(-1, (self.heads, -1)) for z in (of.query(x), of.key(y), of.value(y)))
        return self.output.LayerNorm(x + self.output.dense(mix(q, k, v, mask=mask).flatten(2)))


def feed_forward(x: Tensor, intermediate: nn.ModuleDict, output: nn.ModuleDict) -> Tensor:
    """LN(x + MLP(x)), exact GELU: (G, n, E) -> (G, n, E)."""
    return output.LayerNorm(x + output.dense(F.gelu(intermediate.dense(x))))


class QFormerLayer(nn.Module):
    """Queries and question attend to both; then the queries look at the image, where the layer has `crossattention`."""

    def __init__(self, config: QFormerConfig, source: int | None):
        """source: width of the image features; None: the layer does not look at them."""
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.attention = PostNormAttention(config, width)
        self.crossattention = PostNormAttention(config, source) if source else None
        self.intermediate, self.intermediate_query = (named(dense=nn.Linear(width, inner)) for _ in range(2))
        self.output, self.output_query = (
            named(dense=nn.Linear(inner, width), LayerNorm=nn.LayerNorm(width, eps)) for _ in range(2))

    def forward(self, x: Tensor, shown: Tensor, queries: int, mask: Tensor) -> Tensor:
        """x (G, Q + T, E), the first `queries` of them queries; shown (G, P, C); mask (G, 1, Q + T, Q + T)."""
        x = self.attention(x, x, mask)
        query, question = x[:, :queries], x[:, queries:]
        if self.crossattention is not None:
            query = self.crossattention(query, shown)
        return torch.cat([feed_forward(query, self.intermediate_query, self.output_query),
                          feed_forward(question, self.intermediate, self.output)], 1)


class QFormer(nn.Module):
    """Queries (1, Q, E), image features (G, P, C) and questions -> (G, Q, E)."""

    def __init__(self, config: QFormerConfig, source: int):
        super().__init__()
        width, every = config.hidden_size, config.cross_attention_frequency
        self.embeddings = named(word_embeddings=nn.Embedding(config.vocab_size, width),
                                position_embeddings=nn.Embedding(config.max_position_embeddings, width),
                                layernorm=nn.LayerNorm(width, config.layer_norm_eps))
        self.encoder = named(layer=nn.ModuleList(
            QFormerLayer(config, source if i % every == 0 else None) for i in range(config.num_hidden_layers)))

    def forward(self, queries: Tensor, shown: Tensor, questions: list[tuple[int, ...]]) -> Tensor:
        """questions: token ids of each prompt's; shorter ones are padded, which no other token sees."""
        table, count = self.embeddings, queries.shape[1]
        ids = [torch.tensor(question, dtype=torch.long) for question in questions]
        ids = pad_sequence(ids, batch_first=True).to(shown.device)  # (G, T)
        lengths = torch.tensor([[count + len(question)] for question in questions])
        there = (torch.arange(count + ids.shape[1]) < lengths).to(shown.device)  # (G, Q + T)
        text = table.word_embeddings(ids) + table.position_embeddings.weight[: ids.shape[1]]  # (G, T, E)
        x = table.layernorm(torch.cat([queries.expand(len(text), -1, -1), text], 1))  # (G, Q + T, E)
        mask = there[:, None, None].expand(-1, 1, there.shape[1], -1)  # (G, 1, Q + T, Q + T)
        for layer in self.encoder.layer:
            x = layer(x, shown, count, mask)
        return x[:, :count]


# ------------------------------------------------------------------------------------------------------ whole


class InstructBlip(VLM):
    """Tower, Q-Former, projection and decoder of InstructBLIP on Vicuna."""

    CONNECTOR, TOWER = "language_projection", "vision_model"

    def __init__(self, config: InstructBlipConfig):
        super().__init__(config)
        width = config.qformer.hidden_size
        self.vision_model = EvaTower(config.vision)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.qformer = QFormer(config.qformer, config.vision.hidden_size)
        self.language_projection = nn.Linear(width, config.text.hidden_size)
        self.language_model = CausalLM(config.text)

    def run_tower(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, S, S) -> features (N, P, C), class token first."""
        return self.vision_model(pixels)

    def connect(self, features: Tensor, rows: Tensor, questions: list[tuple[int, ...]]) -> Tensor:
        """features (N, P, C), rows (I,), questions of the G prompts -> (I, D).

        A prompt shows the Q rows of its tile, so its first row names the tile.
        """
        count = self.config.num_query_tokens
        tiles = rows.view(len(questions), count)[:, 0] // count  # (G,)
        queries = self.qformer(self.query_tokens, features.to(self.query_tokens.dtype)[tiles], questions)  # (G, Q, E)
        # The projection is in fp32 where it trains.
        return self.language_projection(queries.to(self.language_projection.weight.dtype)).flatten(0, 1)
