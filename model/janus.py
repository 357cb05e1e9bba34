"""Janus-Pro, what understands images: a SigLIP tower, a two-layer MLP, a LLaMA decoder.

Chen et al. 2025, "Janus-Pro: Unified Multimodal Understanding and Generation with Data and Model Scaling", arXiv
2501.17811. What generates images (a VQ model and its embeddings, aligner and head) has no part in the answer to a
question and is not built; a saved folder has its weights as the source has them.

SigLIP (Zhai et al. 2023, arXiv 2303.15343) is CLIP's transformer (model/clip.py) without class token and without the
norm before the first block, with biases in the patch embedding and the exact GELU. The features are its last states
after the final norm; the attention pooling of SigLIP is left out, as in Janus.

An image is one tile of S x S pixels, and each of its P patches is one image token. What its files decide is in
model/families/janus.py.

Shapes: N tiles, S pixels a side, P patches, C vision width, D decoder width, I image tokens.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from model.clip import Encoder, EncoderLayer, VisionEmbeddings
from model.config import LlamaConfig, VisionConfig
from model.llama import CausalLM
from model.vlm import VLM


@dataclass(frozen=True)
class JanusConfig:
    """SigLIP tower -> two-layer MLP -> LLaMA.

    surplus_rows: none, as all rows of the tables took part in the softmax of the training.
    codes, ends: number and width of the codes that images are generated of, ids of the tokens that begin and end a
        text: for the config.json of a saved folder.
    """

    vision: VisionConfig
    text: LlamaConfig
    image_token_index: int = 100581
    surplus_rows: int = 0
    codes: tuple[int, int] = (16384, 8)
    ends: tuple[int, int] = (100000, 100001)
    template: str = "janus"
    model_type: str = "janus"

    @property
    def tile_tokens(self) -> int:
        """Image tokens of a tile: its patches."""
        return self.vision.num_patches


class VisionTower(nn.Module):
    """SigLIP: pixels (N, 3, S, S) -> patch features (N, P, C). ValueError on another size."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.size = config.image_size
        self.embeddings = VisionEmbeddings(config, class_token=False)
        self.encoder = Encoder(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1:] != (wanted := (3, self.size, self.size)):
            raise ValueError(f"images are {tuple(pixels.shape[1:])}, the vision tower takes {wanted}")
        return self.post_layernorm(self.encoder(self.embeddings(pixels)))


class Aligner(nn.Module):
    """Linear, exact GELU, Linear: patch features (.., C) -> decoder embeddings (.., D)."""

    def __init__(self, vision_width: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(vision_width, width)
        self.hidden_layers = nn.ModuleList([nn.Linear(width, width)])  # one, in a list: so are its tensors named

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden_layers[0](F.gelu(self.fc1(x)))


class Janus(VLM):
    """Vision tower, aligner and decoder of Janus-Pro."""

    CONNECTOR, TOWER = "aligner", "vision_model"

    def __init__(self, config: JanusConfig):
        super().__init__(config)
        self.vision_model = VisionTower(config.vision)
        self.aligner = Aligner(config.vision.hidden_size, config.text.hidden_size)
        self.language_model = CausalLM(config.text)

    def run_tower(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, S, S) -> patch features (N, P, C)."""
        return self.vision_model(pixels.to(self.vision_model.post_layernorm.weight.dtype))

    def connect(self, features: Tensor, rows: Tensor, questions: list[tuple[int, ...]]) -> Tensor:
        """Patch features (N, P, C), rows (I,) of the flattened (N P, C) features -> (I, D).

        Each feature is aligned once, however often it is shown. Questions play no part in Janus-Pro.
        """
        return self.aligner(features.to(self.aligner.fc1.weight.dtype)).flatten(0, 1)[rows]  # fp32 where it trains
