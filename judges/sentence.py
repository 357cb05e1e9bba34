"""Sentence encoders: the BERT and MPNet networks of sentence-transformers folders, mean pooling, unit vectors.

Reimers & Gurevych 2019, "Sentence-BERT", arXiv 1908.10084. BERT: Devlin et al., arXiv 1810.04805. MPNet: Song
et al., arXiv 2004.09297. Re-Align and BDHS compare answers by the cosine of all-mpnet-base-v2;
all-MiniLM-L6-v2 is a BERT. Both are post-LayerNorm transformers with exact GELU and differ in three places:

                         BERT                                   MPNet
    embeddings           word + position + token type 0         word + position
    first position       row 0 of the position table            row 2 (rows 0 and 1 are for padding)
    attention scores     q k / sqrt d                           q k / sqrt d + bias[bucket(key - query), head]

    sentence vector      e = mean over the text's tokens, special ones included, of the last states; e / |e|

A folder holds config.json, *.safetensors, tokenizer.json, modules.json (which must say transformer, mean
pooling and perhaps normalisation: anything else is refused), the pooling's config.json and
sentence_bert_config.json with the longest text in tokens. Longer texts are cut, as sentence-transformers
does: 384 tokens for all-mpnet-base-v2, 256 for all-MiniLM-L6-v2.

Shapes: B texts, T tokens of the longest, D width, H heads, d = D / H; the embedding width E is D.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from common import BadInput, read_json
from model.checkpoint import fill
from model.config import read_config
from model.hub import resolve
from model.layouts import by_name, unwrapped
from model.tensors import list_tensors

MAX_DISTANCE = 128  # tokens further apart share MPNet's last buckets
BERT_NAMES = (  # BERT's tensor names -> MPNet's, which the modules below carry
    (r"\.attention\.self\.(q|k|v)\w+\.", r".attention.attn.\1."),
    (r"\.attention\.output\.dense\.", ".attention.attn.o."),
    (r"\.attention\.output\.LayerNorm\.", ".attention.LayerNorm."),
)
UNUSED = re.compile(r"^pooler\.|embeddings\.position_ids$")  # mean pooling does without BERT's pooler


@dataclass(frozen=True)
class SentenceConfig:
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
        return self.model_type == "mpnet"

    @property
    def first_position(self) -> int:
        """Row of the position table for a text's first token."""
        return self.pad_token_id + 1 if self.mpnet else 0

    @property
    def longest(self) -> int:
        """Tokens that the position table has room for."""
        return self.max_position_embeddings - self.first_position


def sentence_config(raw: dict, where: str = "config.json") -> SentenceConfig:
    """Read config.json. Raises BadInput on another network or activation, and on sizes that are none."""
    required = {"model_type": ("bert", "mpnet"), "hidden_act": ("gelu",), "position_embedding_type": ("absolute",)}
    for key, allowed in required.items():
        value = raw.get(key, None if key == "model_type" else allowed[0])
        if value not in allowed:
            raise BadInput(f"{where}: {key}={value!r} is not supported (supported: {list(allowed)})")
    defaults = {"vocab_size": 30527, "pad_token_id": 1} if raw["model_type"] == "mpnet" else {}
    config = SentenceConfig(**defaults | {
        key: raw[key] for key in SentenceConfig.__dataclass_fields__ if raw.get(key) is not None})
    for key, value in vars(config).items():
        least, most = int(key != "pad_token_id"), 1000 if key == "num_hidden_layers" else 10**7
        if key not in ("model_type", "layer_norm_eps") and not (type(value) is int and least <= value <= most):
            raise BadInput(f"{where}: {key}={value!r} is not a whole number from {least} to {most}")
    if type(config.layer_norm_eps) not in (int, float) or not 0 < config.layer_norm_eps < 1:
        raise BadInput(f"{where}: layer_norm_eps={config.layer_norm_eps!r} is not a number between 0 and 1")
    if config.hidden_size % config.num_attention_heads:
        raise BadInput(f"{where}: hidden_size={config.hidden_size} is no multiple of"
                       f" num_attention_heads={config.num_attention_heads}")
    return config


class Layer(nn.Module):
    """Post-LayerNorm block: x = LN(x + attention(x)), then x = LN(x + MLP(x)); parts carry the names of checkpoints."""

    def __init__(self, config: SentenceConfig):
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.attention = nn.ModuleDict({
            "attn": nn.ModuleDict({name: nn.Linear(width, width) for name in "qkvo"}),
            "LayerNorm": nn.LayerNorm(width, eps=eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps=eps)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, D); mask: bool or added to the scores, broadcast to (B, H, T, T)."""
        attn = self.attention.attn
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (attn.q, attn.k, attn.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, d)
        x = self.attention.LayerNorm(x + attn.o(y.transpose(1, 2).flatten(2)))
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


class SentenceTransformer(nn.Module):
    """The network alone: token ids to unit vectors."""

    def __init__(self, config: SentenceConfig):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(config.vocab_size, width),
            "position_embeddings": nn.Embedding(config.max_position_embeddings, width),
            "LayerNorm": nn.LayerNorm(width, eps=config.layer_norm_eps)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        if config.mpnet:
            self.encoder["relative_attention_bias"] = nn.Embedding(
                config.relative_attention_num_buckets, config.num_attention_heads)
        else:
            self.embeddings["token_type_embeddings"] = nn.Embedding(config.type_vocab_size, width)

    def forward(self, texts: list[list[int]]) -> Tensor:
        """Token ids of each text, special tokens included -> unit vectors (B, E). BadInput if too long or
        when a token is unknown."""
        longest = max(len(ids) for ids in texts)
        if longest > self.config.longest:
            raise BadInput(f"a text has {longest} tokens, the encoder takes {self.config.longest}")
        if (last := max((i for ids in texts for i in ids), default=0)) >= self.config.vocab_size:
            raise BadInput(f"tokenizer.json has a token {last}, the encoder {self.config.vocab_size} words")
        device, pad = self.embeddings.word_embeddings.weight.device, self.config.pad_token_id
        ids = torch.tensor([text + [pad] * (longest - len(text)) for text in texts], device=device)  # (B, T)
        lengths = torch.tensor([len(text) for text in texts], device=device)[:, None]  # (B, 1)
        inside = torch.arange(longest, device=device) < lengths  # (B, T)
        x, mask = self.embed(ids), self.attention_mask(inside)
        for layer in self.encoder.layer:
            x = layer(x, mask)  # (B, T, D)
        return F.normalize((x.float() * inside[..., None]).sum(1) / lengths, dim=-1)

    def embed(self, ids: Tensor) -> Tensor:
        """Tokens, positions and, in BERT, the first token type, normalised: (B, T) -> (B, T, D)."""
        table, first = self.embeddings, self.config.first_position
        x = table.word_embeddings(ids) + table.position_embeddings.weight[first : first + ids.shape[1]]
        return table.LayerNorm(x if self.config.mpnet else x + table.token_type_embeddings.weight[0])

    def attention_mask(self, inside: Tensor) -> Tensor | None:
        """Which keys count, (B, T) bool, with MPNet's bias by relative position: what `Layer` takes."""
        mask = inside[:, None, None]  # (B, 1, 1, T)
        if not self.config.mpnet:
            return None if inside.all() else mask
        place = torch.arange(inside.shape[1], device=inside.device)
        table = self.encoder.relative_attention_bias.weight  # (buckets, H)
        bias = table[relative_bucket(place - place[:, None], len(table))].permute(2, 0, 1)  # (H, T, T)
        return bias[None].masked_fill(~mask, float("-inf"))  # (B, H, T, T)


class SentenceEncoder:
    """A sentence-transformers folder, ready for text.

    Args:
        name: the folder, or a hub id ("sentence-transformers/all-mpnet-base-v2").
        dtype, device: of the network; vectors are fp32 on the CPU.
    Raises BadInput naming the file and the tensor or setting that does not fit.
    """

    def __init__(self, name: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        folder = resolve(name)
        if not Path(name).is_dir():  # `resolve` leaves subfolders out
            huggingface_hub.snapshot_download(str(name), allow_patterns=["*_Pooling/config.json"])
        root = _transformer_folder(folder)
        config = sentence_config(read_config(root), str(root / "config.json"))
        self.model = _load(config, root, dtype, device)
        path = root / "tokenizer.json"
        if not path.is_file():
            raise BadInput(f"{path}: not found")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no other class
            raise BadInput(f"{path}: not a readable tokenizer ({str(error)[:200]})") from None
        self.tokenizer.no_padding()  # published files pad every text to 128
        settings = root / "sentence_bert_config.json"
        chosen = read_json(settings).get("max_seq_length") if settings.is_file() else None
        if chosen is not None and (type(chosen) is not int or chosen < 3):
            raise BadInput(f"{settings}: max_seq_length={chosen!r} is no number of tokens")
        self.max_length = min(chosen or config.longest, config.longest)
        self.tokenizer.enable_truncation(self.max_length)

    @torch.no_grad()
    def encode(self, texts: list[str], batch_size: int = 64) -> Tensor:
        """Texts -> unit vectors (N, E), in the given order; texts of like length go through together."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors = torch.zeros(len(ids), self.model.config.hidden_size)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            vectors[rows] = self.model([ids[i] for i in rows]).cpu()
        return vectors

    def similarity(self, left: list[str], right: list[str]) -> list[float]:
        """Cosine of each text of one list with its partner in the other (a `Similarity` of judges/clip.py)."""
        return (self.encode(left) * self.encode(right)).sum(-1).tolist()


def _transformer_folder(folder: Path) -> Path:
    """Where modules.json has the transformer. BadInput unless mean pooling (and normalisation) follows."""
    listing = folder / "modules.json"
    modules = read_json(listing, list)
    for module in modules:
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("type", "path")):
            raise BadInput(f"{listing}: is not a list of modules with type and path")
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise BadInput(f"{listing}: the modules {kinds} are not Transformer, Pooling[, Normalize]")
    pooling = folder / modules[1]["path"] / "config.json"
    modes = [key for key, on in read_json(pooling).items() if key.startswith("pooling_mode") and on]
    if modes != ["pooling_mode_mean_tokens"]:
        raise BadInput(f"{pooling}: {modes} is not supported (supported: pooling_mode_mean_tokens alone)")
    return folder / modules[0]["path"]


def _load(config: SentenceConfig, folder: Path, dtype: torch.dtype, device) -> SentenceTransformer:
    """Strictly: every tensor present, none unknown, all of the right shape."""
    with torch.device("meta"):
        model = SentenceTransformer(config)

    def rename(name: str) -> str:
        name = unwrapped(name).removeprefix(f"{config.model_type}.")
        for pattern, replacement in () if config.mpnet else BERT_NAMES:
            name = re.sub(pattern, replacement, name)
        return name

    fill(model, by_name(list_tensors(folder), rename), folder, dtype, device, lambda name: bool(UNUSED.search(name)))
    return model.eval().requires_grad_(False)
