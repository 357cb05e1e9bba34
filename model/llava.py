"""LLaVA: patch features of a CLIP tower, a two-layer MLP, a LLaMA decoder.

Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744 (LLaVA-1.5).

An image stands in the token sequence as P copies of the image token (P = patches); `embed` puts the projected
patch features there. The vision tower is frozen in the papers, so its output does not depend on the
policy: callers run `vision_features` once per distinct image and hand the result to policy and reference
alike.

Shapes: M images, S pixels a side, P patches, C vision width, D decoder width, T tokens, V vocabulary.
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

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @torch.no_grad()
    def vision_features(self, pixels: Tensor) -> Tensor:
        """pixels (M, 3, S, S) -> patch features (M, P, C) of the chosen layer, class token dropped."""
        dtype = self.vision_tower.vision_model.embeddings.class_embedding.dtype
        return self.vision_tower.vision_model(pixels.to(dtype))[:, 1:]

    def embed(self, ids: Tensor, features: Tensor) -> Tensor:
        """Token embeddings with image features in place of image tokens.

        Args:
            ids: (T,) token ids; runs of the image token stand for the images of `features`, in order.
            features: (M, P, C) output of `vision_features`.
        Returns: (T, D).
        Raises ValueError when the image tokens are not M unbroken runs of P.
        """
        is_image = ids == self.config.image_token_index  # (T,)
        rows = is_image.nonzero()[:, 0]
        M, P = features.shape[:2]
        if len(rows) != M * P:
            raise ValueError(f"{len(rows)} image tokens for {M} images of {P} features")
        runs = rows.view(M, P)
        if (runs[:, -1] - runs[:, 0] != P - 1).any():  # packing splits a prompt that ends in its picture
            raise ValueError(f"the {P} tokens of an image do not follow one another; a prompt must not end in them")
        # The image token may lie outside the embedding table (original LLaVA), so it is never looked up.
        x = self.language_model.model.embed_tokens(ids.masked_fill(is_image, 0))  # (T, D)
        features = features.to(self.multi_modal_projector.linear_1.weight.dtype)  # fp32 where it trains
        return x.index_copy(0, rows, self.multi_modal_projector(features).flatten(0, 1).to(x.dtype))

    def logits(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """One sequence, plainly: ids (T,), pixels (M, 3, S, S) -> logits (T, V). The yardstick for faster paths."""
        x = self.embed(ids, self.vision_features(pixels))
        states = self.language_model.model(x, torch.arange(len(ids), device=ids.device), Causal())
        return self.language_model.lm_head(states)
