"""LLaVA: patch features of a CLIP tower, a two-layer MLP, a LLaMA decoder.

Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744 (LLaVA-1.5). LLaVA-1.6
adds tiles and one parameter, the embedding that ends each row of patches (model/anyres.py).

An image is one or more tiles of S x S pixels, each of which gives P patch features. `rows` says for each image token
which patch feature it stands for, so that how tiles make up an image is data (model/views.py), and here a gather.
What its files decide is in model/families/llava.py.

Shapes: N tiles, S pixels a side, P patches, C vision width, D decoder width, I image tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.clip import VisionTransformer
from model.config import LlamaConfig, VisionConfig
from model.llama import CausalLM
from model.vlm import VLM


@dataclass(frozen=True)
class LlavaConfig:
    """CLIP tower -> two-layer MLP -> LLaMA.

    image_grid_pinpoints: resolutions (height, width) in pixels that an image may be tiled to (LLaVA-1.6);
        empty: one view an image (LLaVA-1.5).
    aspect: how the single view is made: "crop" (short side resized, centre cropped) or "pad" (to a square);
        "anyres" with tiles.
    template: name of the prompt template the family was trained with.
    surplus_rows: rows of the two tables in the file after the `text.vocab_size` that text can use.
    """

    vision: VisionConfig
    text: LlamaConfig
    image_token_index: int = 32000
    vision_feature_layer: int = -2
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    aspect: str = "crop"
    template: str = "hf"
    surplus_rows: int = 0
    model_type: str = "llava"

    @property
    def anyres(self) -> bool:
        """Images become several tiles, with a newline embedding after every row of patches."""
        return bool(self.image_grid_pinpoints)

    @property
    def tile_tokens(self) -> int:
        """Image tokens of a tile: its patches."""
        return self.vision.num_patches

    @property
    def vision_layers_used(self) -> int:
        """Encoder layers that the chosen features depend on; -2 of 24 means 23."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision.num_hidden_layers + 1 + layer


class Projector(nn.Module):
    """Linear, exact GELU, Linear: patch features (.., C) -> decoder embeddings (.., D)."""

    def __init__(self, vision_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class VisionTower(nn.Module):
    """Holds the transformer under the name that llava-hf checkpoints use."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.vision_model = VisionTransformer(config.vision, layers=config.vision_layers_used)


class Llava(VLM):
    """Vision tower, projector and decoder of LLaVA-1.5 and 1.6."""

    CONNECTOR, TOWER = "multi_modal_projector", "vision_tower"

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config.vision.hidden_size, config.text.hidden_size)
        self.language_model = CausalLM(config.text)
        if config.anyres:
            self.image_newline = nn.Parameter(torch.zeros(config.text.hidden_size))

    def run_tower(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, S, S) -> patch features (N, P, C) of the chosen layer, class token dropped."""
        dtype = self.vision_tower.vision_model.embeddings.class_embedding.dtype
        return self.vision_tower.vision_model(pixels.to(dtype))[:, 1:]

    def connect(self, features: Tensor, rows: Tensor, questions: list[tuple[int, ...]]) -> Tensor:
        """Patch features (N, P, C), rows (I,) of the flattened (N P, C) features, -1 for `image_newline` -> (I, D).

        Each feature is projected once, however often it is shown. Questions play no part in LLaVA.
        """
        features = features.to(self.multi_modal_projector.linear_1.weight.dtype)  # fp32 where it trains
        shown = self.multi_modal_projector(features).flatten(0, 1)  # (N P, D)
        if self.config.anyres:
            shown = torch.cat([shown, self.image_newline[None].to(shown.dtype)])  # the last row is row -1
        return shown[rows]
