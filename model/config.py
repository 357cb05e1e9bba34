"""Shapes of the three networks, read from a Hugging Face config.json.

Only what the forward pass needs is kept. Fields that a file leaves out get the defaults of `transformers`,
because that is what the file's writer relied on; a value that we cannot honour (another activation, scaled
RoPE, attention biases) is refused here, before any weight is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision transformer. `projection_dim` is the width of the shared image-text space."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    projection_dim: int = 512

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ClipTextConfig:
    """CLIP text transformer. `eos_token_id` marks the position whose state stands for the whole text."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    projection_dim: int = 512
    eos_token_id: int = 49407


@dataclass(frozen=True)
class ClipConfig:
    """Both towers and the shared space."""

    vision: VisionConfig
    text: ClipTextConfig
    projection_dim: int = 512


@dataclass(frozen=True)
class LlamaConfig:
    """LLaMA decoder (also Vicuna, Mistral and Yi, which differ in numbers only)."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False


MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8}  # defaults that are not LLaMA's


@dataclass(frozen=True)
class LlavaConfig:
    """CLIP tower -> two-layer MLP -> LLaMA."""

    vision: VisionConfig
    text: LlamaConfig
    image_token_index: int = 32000
    vision_feature_layer: int = -2

    @property
    def vision_layers_used(self) -> int:
        """Encoder layers that the chosen features depend on; -2 of 24 means 23."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision.num_hidden_layers + 1 + layer


def _take(cls, raw: dict, **fixed):
    """Build `cls` from the keys of `raw` that it knows; `fixed` wins."""
    known = {k: raw[k] for k in cls.__dataclass_fields__ if raw.get(k) is not None}
    return cls(**{**known, **fixed})


def _refuse(raw: dict, where: str, **required) -> None:
    """Raise ValueError when a key is present with a value that this code does not implement."""
    for key, allowed in required.items():
        if key in raw and raw[key] not in allowed:
            raise ValueError(f"{where}: {key}={raw[key]!r} is not supported (supported: {list(allowed)})")


def _require(raw: dict, where: str, *sections: str) -> None:
    """Raise ValueError when a section is missing."""
    for name in sections:
        if not isinstance(raw.get(name), dict):
            raise ValueError(f"{where}: has no {name}")


def llama_config(raw: dict, where: str = "config.json") -> LlamaConfig:
    """Read a LLaMA-type section. Raises ValueError on features that change the mathematics."""
    _refuse(raw, where, model_type=("llama", "mistral"), hidden_act=("silu",), attention_bias=(False, None),
            mlp_bias=(False, None))
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    _refuse(rope, where, rope_type=("default",), type=("default",))
    raw = {**MISTRAL, **raw} if raw.get("model_type") == "mistral" else raw
    base = _take(LlamaConfig, raw)
    heads = base.num_attention_heads
    return _take(
        LlamaConfig, raw,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or base.hidden_size // heads,
        rope_theta=float(rope.get("rope_theta") or base.rope_theta),
    )


def llava_config(raw: dict, where: str = "config.json") -> LlavaConfig:
    """Read llava-hf's config.json. Raises ValueError on an architecture that is not LLaVA-1.5's."""
    _require(raw, where, "vision_config", "text_config")
    _refuse(raw, where, model_type=("llava",), projector_hidden_act=("gelu",),
            vision_feature_select_strategy=("default",), multimodal_projector_bias=(True,))
    _refuse(raw["vision_config"], where, model_type=("clip_vision_model",), hidden_act=("quick_gelu",))
    index = raw.get("image_token_index", raw.get("image_token_id", 32000))
    layer, layers = raw.get("vision_feature_layer", -2), raw["vision_config"].get("num_hidden_layers", 12)
    if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        raise ValueError(f"{where}: vision_feature_layer={layer!r} is not one of the tower's {layers + 1} states")
    return LlavaConfig(
        vision=_take(VisionConfig, raw["vision_config"]),
        text=llama_config(raw["text_config"], where),
        image_token_index=index,
        vision_feature_layer=layer,
    )


def clip_config(raw: dict, where: str = "config.json") -> ClipConfig:
    """Read a CLIP config.json (both towers). Raises ValueError like `llava_config`."""
    _require(raw, where, "vision_config", "text_config")
    _refuse(raw, where, model_type=("clip",))
    dim = raw.get("projection_dim", 512)
    for tower in ("vision_config", "text_config"):
        _refuse(raw[tower], where, hidden_act=("quick_gelu",))
    return ClipConfig(
        vision=_take(VisionConfig, raw["vision_config"], projection_dim=dim),
        text=_take(ClipTextConfig, raw["text_config"], projection_dim=dim),
        projection_dim=dim,
    )


def read_config(folder: Path) -> dict:
    """The parsed config.json of a checkpoint folder. Raises ValueError naming the file when it is unusable."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found (a checkpoint folder has config.json, *.safetensors, tokenizer.json)")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
