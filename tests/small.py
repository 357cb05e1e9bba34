"""Small checkpoints with awkward sizes, the same on every machine.

Every number that could be confused with another is different: 3 vision heads of width 8, 6 query heads that
share 2 key-value heads of width 10 in a decoder of width 18, 17 pixels cut into 3 x 3 patches of 5, and 67
tokens. Weights are drawn per tensor from a generator seeded by the tensor's name, so nothing but these lines
fixes them and the goldens need not store them.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.clip import CLIP, VisionTransformer
from model.config import clip_config
from model.families.instructblip import instructblip_config
from model.families.janus import janus_config, saved_name
from model.families.llava import llava_config
from model.instructblip import InstructBlip
from model.janus import Janus
from model.llava import Llava
from model.views import View, single

SIDE, PATCHES, VOCAB, IMAGE_TOKEN = 17, 9, 67, 64
VISION = dict(
    model_type="clip_vision_model", hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=3, image_size=SIDE, patch_size=5, projection_dim=10,
)
TEXT = dict(
    model_type="llama", vocab_size=VOCAB, hidden_size=18, intermediate_size=30, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, head_dim=10, rms_norm_eps=1e-5, rope_theta=500.0,
    max_position_embeddings=128,
)
LLAVA = dict(
    model_type="llava", vision_config=VISION, text_config=TEXT, image_token_index=IMAGE_TOKEN,
    vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu",
)
JANUS_VISION = dict(
    model_type="janus_vision_model", hidden_size=24, num_hidden_layers=3, num_attention_heads=3, image_size=SIDE,
    patch_size=5, mlp_ratio=1.7, projection_dim=18, num_image_tokens=PATCHES,
)
JANUS = dict(model_type="janus", vision_config=JANUS_VISION, text_config=TEXT, image_token_id=IMAGE_TOKEN)
INSTRUCTBLIP = dict(
    model_type="instructblip", text_config=TEXT, num_query_tokens=5, image_token_index=IMAGE_TOKEN,
    vision_config=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
                       image_size=SIDE, patch_size=5, layer_norm_eps=1e-6),
    qformer_config=dict(vocab_size=61, hidden_size=20, intermediate_size=28, num_hidden_layers=3,
                        num_attention_heads=2, max_position_embeddings=130, cross_attention_frequency=2),
)
CLIP_TEXT = dict(
    model_type="clip_text_model", vocab_size=VOCAB, hidden_size=18, intermediate_size=30, num_hidden_layers=2,
    num_attention_heads=3, max_position_embeddings=12, projection_dim=10, bos_token_id=65, eos_token_id=40,
    pad_token_id=1,
)
CLIP_BOTH = dict(model_type="clip", vision_config=VISION, text_config=CLIP_TEXT, projection_dim=10)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight called `name`: norms near 1, matrices of gain 1.5, embeddings and biases of visible size."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if name.endswith("logit_scale"):
        return torch.tensor(2.5)
    if "norm" in name.lower():
        return torch.from_numpy(draw * 0.2 + (1.0 if name.endswith("weight") else 0.0))
    if len(shape) < 2 or "embed" in name:
        return torch.from_numpy(draw * (0.2 if name.endswith("bias") else 0.6))
    if name.endswith("lm_head.weight"):
        draw[IMAGE_TOKEN] = 0  # as in a trained model, the image token is next to never generated
    return torch.from_numpy(draw * (1.5 / np.prod(shape[1:]) ** 0.5)).float()


def fill(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The weights for every name in a state dict."""
    return {prefix + name: weight(prefix + name, tuple(tensor.shape)) for name, tensor in state.items()}


def write_llava(folder: Path, text: dict | None = None, **fields) -> Path:
    """Write a llava-hf folder as first published, vision layers complete; `text`, `fields` change it."""
    raw = {**LLAVA, "text_config": {**TEXT, **(text or {})}, **fields}
    config = llava_config(raw)
    tensors = fill(Llava(config).state_dict())
    tensors |= fill(VisionTransformer(config.vision).state_dict(), "vision_tower.vision_model.")
    if config.text.tie_word_embeddings:
        tensors.pop("language_model.lm_head.weight")
    return write(folder, raw, tensors)


def write_janus(folder: Path, text: dict | None = None, **fields) -> Path:
    """Write a Janus-Pro folder in the layout of transformers, without what generates images."""
    raw = {**JANUS, "text_config": {**TEXT, **(text or {})}, **fields}
    state = fill(Janus(janus_config(raw)).state_dict())
    return write(folder, raw, {saved_name(name): tensor for name, tensor in state.items()})


def write_instructblip(folder: Path, text: dict | None = None, **fields) -> Path:
    """Write an InstructBLIP folder in the hub's layout, without tokenizers; `text`, `fields` change it."""
    raw = {**INSTRUCTBLIP, "text_config": {**TEXT, **(text or {})}, **fields}
    return write(folder, raw, fill(InstructBlip(instructblip_config(raw)).state_dict()))


def write_clip(folder: Path, **text) -> Path:
    """Write a CLIP folder. `text` changes the text tower's config."""
    raw = {**CLIP_BOTH, "text_config": {**CLIP_TEXT, **text}}
    return write(folder, raw, fill(CLIP(clip_config(raw)).state_dict()))


def write(folder: Path, raw: dict, tensors: dict[str, Tensor]) -> Path:
    """config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def pictures(n: int, side: int = SIDE) -> Tensor:
    """n distinct pictures (n, 3, side, side), about standard normal."""
    streams = [np.random.default_rng(900 + i) for i in range(n)]
    return torch.from_numpy(np.stack([s.standard_normal((3, side, side), dtype=np.float32) for s in streams]))


def views(n: int) -> list[View]:
    """Those pictures, one tile each."""
    return [single(picture, PATCHES) for picture in pictures(n)]


def photo(width: int, height: int) -> np.ndarray:
    """An RGB picture (height, width, 3) uint8: smooth waves and a noisy corner, so that resampling shows."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 3 + c) + np.cos(y / (2 + c)) for c in range(3)], axis=-1) * 60 + 128
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height // 2, width // 2, 3))
    waves[: height // 2, : width // 2] = noise
    return waves.clip(0, 255).astype(np.uint8)


def prompt(*text: int) -> tuple[int, ...]:
    """BOS, a word, one picture, then `text`."""
    return (1, 5, *[IMAGE_TOKEN] * PATCHES, *text)
