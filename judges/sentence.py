"""Sentence encoders: the BERT and MPNet networks of sentence-transformers folders, mean pooling, unit vectors.

Reimers & Gurevych 2019, "Sentence-BERT", arXiv 1908.10084. Re-Align and BDHS compare answers by the cosine of
all-mpnet-base-v2; all-MiniLM-L6-v2 is a BERT. The networks are in networks/bert.py.

    sentence vector      e = mean over the text's tokens, special ones included, of the last states; e / |e|

A folder holds config.json, *.safetensors, tokenizer.json, modules.json (which must say transformer, mean
pooling and perhaps normalisation: anything else is refused), the pooling's config.json and
sentence_bert_config.json with the longest text in tokens. Longer texts are cut, as sentence-transformers
does: 384 tokens for all-mpnet-base-v2, 256 for all-MiniLM-L6-v2.

Shapes: B texts, T tokens of the longest, D width; the embedding width E is D.
"""

from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
from torch import Tensor

from common import BadInput, read_json
from data.tokenizer import load_tokenizer
from model.checkpoint import fill
from model.config import read_config
from model.hub import resolve
from model.layouts import by_name, renamed, unwrapped
from model.tensors import list_tensors
from networks.bert import NAMES, UNUSED, Bert, bert_config


class SentenceTransformer(Bert):
    """The network alone: token ids to unit vectors."""

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
        states = super().forward(ids, inside).float()  # (B, T, D)
        return F.normalize((states * inside[..., None]).sum(1) / lengths, dim=-1)


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
        config = bert_config(read_config(root), str(root / "config.json"))
        with torch.device("meta"):
            model = SentenceTransformer(config)
        name_of = lambda name: renamed(unwrapped(name).removeprefix(f"{config.model_type}."), NAMES)  # noqa: E731
        fill(model, by_name(list_tensors(root), name_of), root, dtype, device, lambda name: bool(UNUSED.search(name)))
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(root / "tokenizer.json")
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
