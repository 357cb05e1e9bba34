"""BERT and MPNet: transformers that read a text in both directions.

BERT: Devlin et al., arXiv 1810.04805. MPNet: Song et al., arXiv 2004.09297. Both are post-LayerNorm transformers with
exact GELU and differ in three places:

                         BERT                                   MPNet
    embeddings           word + position + token type 0         word + position
    first position       row 0 of the position table            row 2 (rows 0 and 1 are for padding)
    attention scores     q k / sqrt d                           q k / sqrt d + bias[bucket(key - query), head]

Sentence encoders (judges/sentence.py) are either one; GroundingDINO reads its captions with BERT and restricts which
tokens see each other (networks/dino.py); RAM tags with its layers (networks/ram.py).

Shapes: B texts, T tokens of the longest, D width, H heads, d = D / H.
"""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import mix
from model.config import refuse, shared, take

MAX_DISTANCE = 128  # tokens further apart share MPNet's last buckets
NAMES = (  # BERT's tensor names -> MPNet's, which the modules below carry
    (r"\.attention\.self\.(q|k|v)\w+\.", r".attention.attn.\1."),
    (r"\.attention\.output\.dense\.", ".attention.attn.o."),
    (r"\.attention\.output\.LayerNorm\.", ".attention.LayerNorm."),
)
UNUSED = re.compile(r"^pooler\.|embeddings\.position_ids$")  # in the files, and nothing here needs it


@dataclass(frozen=True)
class BertConfig:
    """Either network; the defaults are those of BERT in `transformers`."""

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    relative_attention_num_buckets: int = 32
    pad_token_id: int = 0

    @property
    def mpnet(self) -> bool:
        """Whether it is MPNet, not BERT."""
        return self.model_type == "mpnet"

    @property
    def first_position(self) -> int:
        """Row of the position table for a text's first token."""
        return self.pad_token_id + 1 if self.mpnet else 0

    @property
    def longest(self) -> int:
        """Tokens that the position table has room for."""
        return self.max_position_embeddings - self.first_position


def bert_config(raw: dict, where: str = "config.json") -> BertConfig:
    """Read config.json. Raises BadInput on another network or activation, and on sizes that are none."""
    refuse({"model_type": None, **raw}, where, model_type=("bert", "mpnet"), hidden_act=("gelu",),
           position_embedding_type=("absolute",))
    defaults = {"vocab_size": 30527, "pad_token_id": 1} if raw["model_type"] == "mpnet" else {}
    config = take(BertConfig, defaults | {k: v for k, v in raw.items() if v is not None}, where)
    shared(config.hidden_size, config.num_attention_heads, where)
    return config


class Layer(nn.Module):
    """Post-LayerNorm block: x = LN(x + attention(x, y)), then x = LN(x + MLP(x)).

    source: width of y, where y is not x (RAM's labels look at the image).
    """

    def __init__(self, width: int, heads: int, inner: int, eps: float = 1e-12, source: int | None = None):
        super().__init__()
        self.heads, inputs = heads, dict.fromkeys("kv", source or width)
        self.attention = nn.ModuleDict({
            "attn": nn.ModuleDict({name: nn.Linear(inputs.get(name, width), width) for name in "qkvo"}),
            "LayerNorm": nn.LayerNorm(width, eps=eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps=eps)})

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, D), y (B, K, source); mask: bool or added to the scores, broadcast to (B, H, T, K)."""
        attn = self.attention.attn
        q, k, v = (z.unflatten(-1, (self.heads, -1)) for z in (attn.q(x), attn.k(y), attn.v(y)))
        x = self.attention.LayerNorm(x + attn.o(mix(q, k, v, mask=mask).flatten(2)))
        return self.output.LayerNorm(x + self.output.dense(F.gelu(self.intermediate.dense(x))))


def relative_bucket(distance: Tensor, buckets: int) -> Tensor:
    """MPNet's bucket of key position minus query position; any shape, long.

    Half of the buckets is for keys after the query. In each half, half is for single distances and the
    rest for ranges that widen logarithmically up to MAX_DISTANCE.
    """
    half, single = buckets // 2, buckets // 4
    far = distance.abs()
    # fp32 throughout: at 16, 32 and 64 the logarithm is a whole number but for rounding.
    wide = single + ((far.float() / single).log() / math.log(MAX_DISTANCE / single) * (half - single)).long()
    return (distance > 0) * half + torch.where(far < single, far, wide.clamp_max(half - 1))


class Bert(nn.Module):
    """Token ids (B, T) -> states (B, T, D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(config.vocab_size, width),
            "position_embeddings": nn.Embedding(config.max_position_embeddings, width),
            "LayerNorm": nn.LayerNorm(width, eps=config.layer_norm_eps)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(
            Layer(width, config.num_attention_heads, config.intermediate_size, config.layer_norm_eps)
            for _ in range(config.num_hidden_layers))})
        if config.mpnet:
            self.encoder["relative_attention_bias"] = nn.Embedding(
                config.relative_attention_num_buckets, config.num_attention_heads)
        else:
            self.embeddings["token_type_embeddings"] = nn.Embedding(config.type_vocab_size, width)

    def forward(self, ids: Tensor, visible: Tensor, positions: Tensor | None = None) -> Tensor:
        """ids (B, T), padded at the end.

        visible: (B, T) bool, False at padding, or (B, T, T), what each token may attend to.
        positions: (B, T), left out where they count from 0.
        """
        x, mask = self.embed(ids, positions), self.attention_mask(visible)
        for layer in self.encoder.layer:
            x = layer(x, x, mask)
        return x

    def embed(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """Tokens, positions and, in BERT, the first token type, normalised: (B, T) -> (B, T, D)."""
        table = self.embeddings
        positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        x = table.word_embeddings(ids) + table.position_embeddings(self.config.first_position + positions)
        return table.LayerNorm(x if self.config.mpnet else x + table.token_type_embeddings.weight[0])

    def attention_mask(self, visible: Tensor) -> Tensor | None:
        """Which keys count, with MPNet's bias by relative position: what `Layer` takes."""
        mask = visible[:, None, None] if visible.dim() == 2 else visible[:, None]  # (B, 1, 1 or T, T)
        if not self.config.mpnet:
            return None if visible.all() else mask
        place = torch.arange(visible.shape[-1], device=visible.device)
        table = self.encoder.relative_attention_bias.weight  # (buckets, H)
        bias = table[relative_bucket(place - place[:, None], len(table))].permute(2, 0, 1)  # (H, T, T)
        return bias[None].masked_fill(~mask, float("-inf"))  # (B, H, T, T)
