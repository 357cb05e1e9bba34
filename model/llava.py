"""LLaVA: patch features of a CLIP tower, a two-layer MLP, a LLaMA decoder.

Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744 (LLaVA-1.5). LLaVA-1.6
adds tiles and one parameter, the embedding that ends each row of patches (data/anyres.py).

A picture is one or more tiles of S x S pixels, each of which gives P patch features. In the token sequence it
stands as copies of the image token; `rows` says for each of them which patch feature it stands for, so that
how tiles make up a picture is data (data/images.py), and here a gather. The vision tower is frozen in the
papers, so its output does not depend on the policy: callers run `vision_features` once per distinct picture
and hand the result to policy and reference alike.

Shapes: N tiles, S pixels a side, P patches, C vision width, D decoder width, T tokens,
I image tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Causal
from model.clip import VisionTransformer
from model.config import LlavaConfig
from model.llama import CausalLM


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


class Llava(nn.Module):
    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config.vision.hidden_size, config.text.hidden_size)
        self.language_model = CausalLM(config.text)
        if config.anyres:
            self.image_newline = nn.Parameter(torch.zeros(config.text.hidden_size))

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @torch.no_grad()
    def vision_features(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, S, S) -> patch features (N, P, C) of the chosen layer, class token dropped."""
        dtype = self.vision_tower.vision_model.embeddings.class_embedding.dtype
        return self.vision_tower.vision_model(pixels.to(dtype))[:, 1:]

    def embed(self, ids: Tensor, features: Tensor, rows: Tensor, slots: Tensor | None = None) -> Tensor:
        """Token embeddings with projected patch features in place of image tokens.

        Args:
            ids: (T,) token ids.
            features: (N, P, C) output of `vision_features`; each is projected once, however often it is shown.
            rows: (I,) for each image token the patch feature that stands there, as a row of the flattened
                (N P, C) features; -1 is the embedding `image_newline`.
            slots: (I,) where in `ids` these image tokens are; left out, they are looked for, which on CUDA waits
                for the device.
        Returns: (T, D).
        Raises ValueError when the image tokens are not as many as `rows`.
        """
        is_image = ids == self.config.image_token_index  # (T,)
        slots = is_image.nonzero()[:, 0] if slots is None else slots
        if len(slots) != len(rows):
            raise ValueError(f"{len(slots)} image tokens for {len(rows)} image features")
        # The image token may lie outside the embedding table (original LLaVA), so it is never looked up.
        x = self.language_model.model.embed_tokens(ids.masked_fill(is_image, 0))  # (T, D)
        features = features.to(self.multi_modal_projector.linear_1.weight.dtype)  # fp32 where it trains
        shown = self.multi_modal_projector(features).flatten(0, 1)  # (N P, D)
        if self.config.anyres:
            shown = torch.cat([shown, self.image_newline[None].to(shown.dtype)])  # the last row is row -1
        return x.index_copy(0, slots, shown[rows].to(x.dtype))

    def logits(self, ids: Tensor, pixels: Tensor, rows: Tensor | None = None) -> Tensor:
        """One sequence, plainly: ids (T,), pixels (N, 3, S, S), rows (I,) -> logits (T, V). The yardstick for
        faster paths. Without `rows` all patches of all tiles are shown in order, as in LLaVA-1.5."""
        features = self.vision_features(pixels)  # (N, P, C)
        rows = torch.arange(features.shape[:2].numel(), device=ids.device) if rows is None else rows
        states = self.language_model.model(
            self.embed(ids, features, rows), torch.arange(len(ids), device=ids.device), Causal()
        )
        return self.language_model.lm_head(states)
