"""Shapes of the three networks, read from a config.json.

Only what the forward pass needs is kept. Fields that a file leaves out get the defaults of `transformers`,
because that is what the file's writer relied on; a value that we cannot honour (another activation, scaled
RoPE, attention biases) is refused here, before any weight is read.

Families and what tells them apart:

    family                config.json                                views   template
    LLaVA-1.5 (llava-hf)  model_type llava                           one     hf
    LLaVA-1.6 (llava-hf)  model_type llava_next                      tiles   by decoder: Vicuna vicuna_v1,
                                                                             Mistral mistral_instruct,
                                                                             Yi (34B) chatml_direct
    1.5, 1.6 (original)   mm_vision_tower, LlavaLlamaForCausalLM or  by image_aspect_ratio; template as in 1.6
                          LlavaMistralForCausalLM

Original files name grid resolutions as (width, height), llava-hf as (height, width): here they are (height,
width).

Mistral's sliding window is the same as full attention up to its length, so it bounds
`max_position_embeddings`; the Mistral of LLaVA-1.6 has none.

Vocabulary: llava-hf appends <image>, <pad> and filler rows to both tables (32064 rows for 32000 tokens). No
text contains them, so they must not take part in the softmax: `vocab_size` counts the rows in front of them
and `surplus_rows` the rest (`text_rows`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
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
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # llava_next's default
PADDING = 64  # rows that llava-hf's conversion appends to the tables, <image> first
YI_VOCABULARY = 64000
OPENAI_TOWER = dict(
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, patch_size=14, projection_dim=768,
)
TOWERS = {  # the towers that original checkpoints name
    "clip-vit-large-patch14-336": {**OPENAI_TOWER, "image_size": 336},
    "clip-vit-large-patch14": {**OPENAI_TOWER, "image_size": 224},
}
ORIGINAL = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM")


@dataclass(frozen=True)
class LlavaConfig:
    """CLIP tower -> two-layer MLP -> LLaMA.

    image_grid_pinpoints: resolutions (height, width) in pixels that a picture may be tiled to (LLaVA-1.6);
        empty: one view a picture (LLaVA-1.5).
    aspect: how the single view is made: "crop" (short side resized, centre cropped) or "pad" (to a square);
        "anyres" with tiles.
    template: name of the prompt template the family was trained with.
    surplus_rows: rows of the two tables in the file behind the `text.vocab_size` that text can use.
    """

    vision: VisionConfig
    text: LlamaConfig
    image_token_index: int = 32000
    vision_feature_layer: int = -2
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    aspect: str = "crop"
    template: str = "hf"
    surplus_rows: int = 0

    @property
    def anyres(self) -> bool:
        """Pictures become several tiles, with a newline embedding behind every row of patches."""
        return bool(self.image_grid_pinpoints)

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
    mistral = raw.get("model_type") == "mistral"
    raw = {**MISTRAL, **raw} if mistral else raw
    base = _take(LlamaConfig, raw)
    heads = base.num_attention_heads
    window = raw.get("sliding_window", 4096) if mistral else None
    return _take(
        LlamaConfig, raw,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or base.hidden_size // heads,
        rope_theta=float(rope.get("rope_theta") or base.rope_theta),
        max_position_embeddings=min(base.max_position_embeddings, window or base.max_position_embeddings),
    )


def llava_config(raw: dict, where: str = "config.json", tower: dict | None = None) -> LlavaConfig:
    """Read a config.json of llava-hf or of the original repository.

    Args:
        tower: vision section of an original checkpoint whose `mm_vision_tower` is none of OpenAI's.
    Raises ValueError on an architecture that is not LLaVA-1.5's or 1.6's.
    """
    if is_original(raw):
        return _original_config(raw, where, tower)
    _require(raw, where, "vision_config", "text_config")
    _refuse(raw, where, model_type=("llava", "llava_next"), projector_hidden_act=("gelu",),
            vision_feature_select_strategy=("default",), multimodal_projector_bias=(True,),
            use_image_newline_parameter=(True, None))
    text = llama_config(raw["text_config"], where)
    tiles = raw.get("model_type") == "llava_next"
    grid = (raw.get("image_grid_pinpoints") or PINPOINTS) if tiles else ()
    family = _template(raw["text_config"], text, where) if tiles else "hf"
    return LlavaConfig(
        vision=_vision(raw["vision_config"], where),
        text=text,
        image_token_index=raw.get("image_token_index", raw.get("image_token_id", 32000)),
        vision_feature_layer=_layer(raw, "vision_feature_layer", raw["vision_config"], where),
        image_grid_pinpoints=_pairs(grid, where),
        aspect="anyres" if tiles else "pad" if raw.get("image_aspect_ratio") == "pad" else "crop",
        template=raw.get("prompt_template") or family,
    )


def hf_config(config: LlavaConfig, extra_rows: int = 0) -> dict:
    """config.json of the llava-hf layout, for tables with `extra_rows` behind `text.vocab_size`.

    `image_aspect_ratio` and `prompt_template` are not llava-hf's: they keep what an original checkpoint says.
    """
    mistral = config.template == "mistral_instruct"
    text = {"model_type": "mistral", "sliding_window": None} if mistral else {"model_type": "llama"}
    text |= asdict(config.text) | {"vocab_size": config.text.vocab_size + extra_rows, "hidden_act": "silu"}
    grid = [list(pair) for pair in config.image_grid_pinpoints]
    return {
        "model_type": "llava_next" if config.anyres else "llava",
        "architectures": [f"Llava{'Next' if config.anyres else ''}ForConditionalGeneration"],
        "vision_config": {"model_type": "clip_vision_model", **asdict(config.vision)},
        "text_config": text,
        "image_token_index": config.image_token_index,
        "image_seq_length": config.vision.num_patches,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "image_aspect_ratio": config.aspect,
        "prompt_template": config.template,
        **({"image_grid_pinpoints": grid} if grid else {}),
    }


def is_original(raw: dict) -> bool:
    """True for the original repository's layout: decoder fields at the top, a tower named there."""
    return "mm_vision_tower" in raw


def _original_config(raw: dict, where: str, tower: dict | None) -> LlavaConfig:
    name = (raw.get("architectures") or [None])[0]
    _refuse({"architectures[0]": name}, where, **{"architectures[0]": ORIGINAL})
    _refuse(raw, where, mm_projector_type=("mlp2x_gelu",), mm_vision_select_feature=("patch",),
            mm_use_im_start_end=(False, None), image_aspect_ratio=("pad", "anyres", "square", None))
    aspect = {"pad": "pad", "anyres": "anyres"}.get(raw.get("image_aspect_ratio"), "crop")
    if aspect == "anyres":
        _refuse({"mm_patch_merge_type": None} | raw, where, mm_patch_merge_type=("spatial_unpad",))
    named = raw["mm_vision_tower"]
    tower = tower or TOWERS.get(str(named).rsplit("/", 1)[-1])
    if tower is None:
        raise ValueError(f"{where}: mm_vision_tower={named!r} is no CLIP folder and none of {list(TOWERS)}")
    section = {**raw, "model_type": "mistral" if name == ORIGINAL[1] else "llama"}
    text = llama_config(section, where)
    grid = [pair[::-1] for pair in raw.get("image_grid_pinpoints") or PINPOINTS] if aspect == "anyres" else ()
    return LlavaConfig(
        vision=_vision(tower, where),
        text=text,
        image_token_index=text.vocab_size,  # the original has none; llava-hf takes the first free id
        vision_feature_layer=_layer(raw, "mm_vision_select_layer", tower, where),
        image_grid_pinpoints=_pairs(grid, where),
        aspect=aspect,
        template=_template(section, text, where),
    )


def _vision(raw: dict, where: str) -> VisionConfig:
    _refuse(raw, where, model_type=("clip_vision_model",), hidden_act=("quick_gelu",))
    return _take(VisionConfig, raw)


def _layer(raw: dict, key: str, tower: dict, where: str) -> int:
    layer, layers = raw.get(key, -2), tower.get("num_hidden_layers", 12)
    if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        raise ValueError(f"{where}: {key}={layer!r} is not one of the tower's {layers + 1} states")
    return layer


def _pairs(grid, where: str) -> tuple[tuple[int, int], ...]:
    pairs = tuple(tuple(pair) for pair in grid)
    if not all(len(p) == 2 and all(isinstance(x, int) and x > 0 for x in p) for p in pairs):
        raise ValueError(f"{where}: image_grid_pinpoints={grid!r} is not a list of two sizes each")
    return pairs


def _template(section: dict, text: LlamaConfig, where: str) -> str:
    """Name of the template that goes with a decoder (LLaVA-1.6 and original checkpoints)."""
    if section.get("model_type") == "mistral":
        return "mistral_instruct"
    if text.vocab_size > YI_VOCABULARY + PADDING:
        raise ValueError(f"{where}: vocab_size={text.vocab_size} is neither Vicuna's, Mistral's nor Yi's")
    return "chatml_direct" if text.vocab_size >= YI_VOCABULARY else "vicuna_v1"


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


def read_llava_config(folder: Path | str) -> LlavaConfig:
    """The configuration of a LLaVA folder, rows that no text uses taken off the vocabulary.

    Raises ValueError naming the file and the setting that does not fit.
    """
    folder = Path(folder)
    raw, where = read_config(folder), str(folder / "config.json")
    tower = None
    if is_original(raw) and (place := tower_folder(folder, raw)):
        tower = read_config(place)
        tower = tower.get("vision_config", tower)
    config = llava_config(raw, where, tower)
    rows = text_rows(folder, config)
    return replace(
        config, text=replace(config.text, vocab_size=rows), surplus_rows=config.text.vocab_size - rows
    )


def tower_folder(folder: Path, raw: dict) -> Path | None:
    """The CLIP folder that an original checkpoint names: as written, inside the checkpoint, or beside it."""
    name = str(raw["mm_vision_tower"])
    leaf = name.rstrip("/").rsplit("/", 1)[-1]
    places = (Path(name), folder / name, folder / leaf, folder.parent / leaf)
    return next((p for p in places if (p / "config.json").is_file()), None)


def text_rows(folder: Path, config: LlavaConfig) -> int:
    """Rows of the vocabulary tables that belong to tokens of text.

    They end behind the last token of tokenizer.json that is neither <image> nor <pad>. Without that file,
    llava-hf's conversion is recognised by <image> being the first of exactly 64 last rows; otherwise every
    row counts.
    """
    path, size = folder / "tokenizer.json", config.text.vocab_size
    if not path.is_file():
        return config.image_token_index if config.image_token_index + PADDING == size else size
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    vocabulary = raw.get("model", {}).get("vocab", {})
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {t: i for i, (t, _) in enumerate(vocabulary)}
    ids |= {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
    return min(size, 1 + max((i for t, i in ids.items() if t not in ("<image>", "<pad>")), default=size - 1))


def read_config(folder: Path) -> dict:
    """The parsed config.json of a checkpoint folder. Raises ValueError naming an unusable file."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found (a checkpoint folder has one, with weights and a tokenizer)")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
