"""Shapes of the three networks, read from a config.json.

Only what the forward pass needs is kept. Fields that a file leaves out get the defaults of `transformers`,
because that is what the file's writer relied on; a value that we cannot honour (another activation, scaled
RoPE, attention biases) or that cannot be (a string for a number, 0 heads) is refused here, before any weight is
read.

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

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import BadInput, read_json
from data.templates import TEMPLATES


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
TYPES = {  # annotation of a field -> what JSON may hold for it, and what that is called
    "int": (int, "a whole number"), "float": ((int, float), "a number"), "bool": (bool, "true or false"),
    "str": (str, "a string"),
}
LIMITS = {  # smallest and largest value; of the numbers not named here 1 and 2**20
    "num_hidden_layers": (1, 1000), "image_size": (1, 2048), "max_position_embeddings": (1, 2**31),
    "layer_norm_eps": (0, 1), "rms_norm_eps": (0, 1), "rope_theta": (1, 1e12),
    "eos_token_id": (0, 2**20), "image_token_index": (0, 2**20), "image_token_id": (0, 2**20),
}


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


def _take(cls, raw: dict, where: str, **fixed):
    """Build `cls` from the keys of `raw` that it knows; `fixed` wins. BadInput on a value that cannot be."""
    known = {k: raw[k] for k in cls.__dataclass_fields__ if raw.get(k) is not None} | fixed
    for name, value in known.items():
        _check(name, value, cls.__dataclass_fields__[name].type, where)
    return cls(**known)


def _check(name: str, value, kind: str, where: str) -> None:
    """Raise BadInput when a value is not of the kind (a key of TYPES), or beyond its LIMITS."""
    types, called = TYPES[kind]
    if not isinstance(value, types) or isinstance(value, bool) != (kind == "bool"):
        raise BadInput(f"{where}: {name}={value!r:.80} is not {called}")
    low, high = LIMITS.get(name, (1, 2**20))
    if kind in ("int", "float") and not low <= value <= high:
        raise BadInput(f"{where}: {name}={value!r:.80} is not between {low} and {high}")


def _value(raw: dict, names: tuple[str, ...], default, where: str, kind: str = "int"):
    """The first of the keys that is there; BadInput as from `_check`."""
    name, value = next(((n, raw[n]) for n in names if raw.get(n) is not None), (names[0], default))
    _check(name, value, kind, where)
    return value


def refuse(raw: dict, where: str, **supported) -> None:
    """Raise BadInput when a key is present with a value that this code does not implement."""
    for key, allowed in supported.items():
        if key in raw and raw[key] not in allowed:
            raise BadInput(f"{where}: {key}={raw[key]!r:.80} is not supported (supported: {list(allowed)})")


def _section(raw: dict, name: str, where: str) -> dict:
    """A section of the file. Raises BadInput when it is missing or no object."""
    if not isinstance(raw.get(name), dict):
        raise BadInput(f"{where}: " + (f"{name} is no object" if raw.get(name) is not None else f"has no {name}"))
    return raw[name]


def _shared(width: int, heads: int, where: str, names: str = "hidden_size, num_attention_heads") -> None:
    """Raise BadInput when a width cannot be shared out among the heads."""
    if width % heads:
        raise BadInput(f"{where}: {width} is no multiple of {heads} ({names})")


def llama_config(raw: dict, where: str = "config.json") -> LlamaConfig:
    """Read a LLaMA-type section. Raises BadInput on features that change the mathematics."""
    refuse(raw, where, model_type=("llama", "mistral"), hidden_act=("silu",), attention_bias=(False, None),
           mlp_bias=(False, None))
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = _section(raw, key, where) if raw.get(key) else {}
    refuse(rope, f"{where}: {key}", rope_type=("default",), type=("default",))
    mistral = raw.get("model_type") == "mistral"
    raw = {**MISTRAL, **raw} if mistral else raw
    base = _take(LlamaConfig, raw, where)
    heads, longest = base.num_attention_heads, base.max_position_embeddings
    if raw.get("head_dim") is None:
        _shared(base.hidden_size, heads, where)
    if mistral and raw.get("sliding_window", 4096) is not None:
        longest = min(longest, _value(raw, ("sliding_window",), 4096, where))
    config = replace(
        base,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or base.hidden_size // heads,
        rope_theta=float(_value(rope, ("rope_theta",), base.rope_theta, f"{where}: {key}", "float")),
        max_position_embeddings=longest,
    )
    _shared(heads, config.num_key_value_heads, where, "num_attention_heads, num_key_value_heads")
    _shared(config.head_dim, 2, where, "head_dim, whose halves are rotated")
    return config


def llava_config(raw: dict, where: str = "config.json", tower: VisionConfig | None = None) -> LlavaConfig:
    """Read a config.json of llava-hf or of the original repository.

    Args:
        tower: that of an original checkpoint whose `mm_vision_tower` is none of OpenAI's.
    Raises BadInput on an architecture that is not LLaVA-1.5's or 1.6's.
    """
    if is_original(raw):
        return _original_config(raw, where, tower)
    family = raw.get("model_type", "llava")
    if family not in ("llava", "llava_next"):
        raise BadInput(f"{where}: model_type={family!r:.80} is not supported (LLaVA-1.5 and 1.6 are: llava,"
                       " llava_next, or the original layout)")
    refuse(raw, where, projector_hidden_act=("gelu",), vision_feature_select_strategy=("default",),
           multimodal_projector_bias=(True,), use_image_newline_parameter=(True, None),
           prompt_template=(*TEMPLATES, None))
    vision = _vision(_section(raw, "vision_config", where), f"{where}: vision_config")
    section = _section(raw, "text_config", where)
    text = llama_config(section, f"{where}: text_config")
    tiles = family == "llava_next"
    return LlavaConfig(
        vision=vision,
        text=text,
        image_token_index=_value(raw, ("image_token_index", "image_token_id"), 32000, where),
        vision_feature_layer=_layer(raw, "vision_feature_layer", vision, where),
        image_grid_pinpoints=_pairs(raw.get("image_grid_pinpoints") or PINPOINTS, where) if tiles else (),
        aspect="anyres" if tiles else "pad" if raw.get("image_aspect_ratio") == "pad" else "crop",
        template=raw.get("prompt_template") or (_template(section, text, where) if tiles else "hf"),
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


def _original_config(raw: dict, where: str, tower: VisionConfig | None) -> LlavaConfig:
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    refuse({"architectures[0]": name}, where, **{"architectures[0]": ORIGINAL})
    refuse(raw, where, mm_projector_type=("mlp2x_gelu",), mm_vision_select_feature=("patch",),
           mm_use_im_start_end=(False, None), image_aspect_ratio=("pad", "anyres", "square", None))
    ratio = raw.get("image_aspect_ratio")
    aspect = ratio if ratio in ("pad", "anyres") else "crop"
    if aspect == "anyres":
        refuse({"mm_patch_merge_type": None} | raw, where, mm_patch_merge_type=("spatial_unpad",))
    named = str(raw["mm_vision_tower"]).rstrip("/").rsplit("/", 1)[-1]
    if tower is None and named not in TOWERS:
        raise BadInput(f"{where}: mm_vision_tower={raw['mm_vision_tower']!r:.200} is no CLIP folder and none of"
                       f" {list(TOWERS)}")
    tower = tower or _vision(TOWERS[named], where)
    section = {**raw, "model_type": "mistral" if name == ORIGINAL[1] else "llama"}
    text = llama_config(section, where)
    grid = _pairs(raw.get("image_grid_pinpoints") or PINPOINTS, where) if aspect == "anyres" else ()
    return LlavaConfig(
        vision=tower,
        text=text,
        image_token_index=text.vocab_size,  # the original has none; llava-hf takes the first free id
        vision_feature_layer=_layer(raw, "mm_vision_select_layer", tower, where),
        image_grid_pinpoints=tuple(pair[::-1] for pair in grid),
        aspect=aspect,
        template=_template(section, text, where),
    )


def _vision(raw: dict, where: str, **fixed) -> VisionConfig:
    refuse(raw, where, model_type=("clip_vision_model",), hidden_act=("quick_gelu",))
    config = _take(VisionConfig, raw, where, **fixed)
    _shared(config.hidden_size, config.num_attention_heads, where)
    if config.patch_size > config.image_size:
        raise BadInput(f"{where}: patch_size={config.patch_size} is larger than image_size={config.image_size}")
    return config


def _layer(raw: dict, key: str, tower: VisionConfig, where: str) -> int:
    layer, layers = raw.get(key, -2), tower.num_hidden_layers
    if type(layer) is not int or not -layers - 1 <= layer <= layers:
        raise BadInput(f"{where}: {key}={layer!r:.80} is not one of the tower's {layers + 1} states")
    return layer


def _pairs(grid, where: str) -> tuple[tuple[int, int], ...]:
    """Pinpoints as the file orders them. A canvas has as many pixels as a picture may have at most."""
    fits = isinstance(grid, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(x) is int and 0 < x <= 2**13 for x in pair)
        for pair in grid
    )
    if not fits:
        raise BadInput(f"{where}: image_grid_pinpoints={grid!r:.80} is not a list of two sizes each, of at most"
                       f" {2**13} pixels")
    return tuple(map(tuple, grid))


def _template(section: dict, text: LlamaConfig, where: str) -> str:
    """Name of the template that goes with a decoder (LLaVA-1.6 and original checkpoints)."""
    if section.get("model_type") == "mistral":
        return "mistral_instruct"
    if text.vocab_size > YI_VOCABULARY + PADDING:
        raise BadInput(f"{where}: vocab_size={text.vocab_size} is neither Vicuna's, Mistral's nor Yi's")
    return "chatml_direct" if text.vocab_size >= YI_VOCABULARY else "vicuna_v1"


def clip_config(raw: dict, where: str = "config.json") -> ClipConfig:
    """Read a CLIP config.json (both towers). Raises BadInput like `llava_config`."""
    refuse(raw, where, model_type=("clip",))
    vision, text = (_section(raw, name, where) for name in ("vision_config", "text_config"))
    dim, where_text = _value(raw, ("projection_dim",), 512, where), f"{where}: text_config"
    refuse(text, where_text, model_type=("clip_text_model",), hidden_act=("quick_gelu",))
    text = _take(ClipTextConfig, text, where_text, projection_dim=dim)
    _shared(text.hidden_size, text.num_attention_heads, where_text)
    return ClipConfig(_vision(vision, f"{where}: vision_config", projection_dim=dim), text, dim)


def read_llava_config(folder: Path | str) -> LlavaConfig:
    """The configuration of a LLaVA folder, rows that no text uses taken off the vocabulary.

    Raises BadInput naming the file and the setting that does not fit.
    """
    folder = Path(folder)
    raw, tower = read_config(folder), None
    if is_original(raw) and (place := tower_folder(folder, raw)):
        section, where = read_config(place), str(place / "config.json")
        if "vision_config" in section:  # a CLIP with both towers
            section, where = _section(section, "vision_config", where), f"{where}: vision_config"
        tower = _vision(section, where)
    config = llava_config(raw, str(folder / "config.json"), tower)
    rows = text_rows(folder, config)
    return replace(
        config, text=replace(config.text, vocab_size=rows), surplus_rows=config.text.vocab_size - rows
    )


def tower_folder(folder: Path, raw: dict) -> Path | None:
    """The CLIP folder that an original checkpoint names: as written, inside the checkpoint, or beside it.

    Raises BadInput when the name is none."""
    name = raw["mm_vision_tower"]
    if not isinstance(name, str) or not name.strip("/."):
        raise BadInput(f"{folder / 'config.json'}: mm_vision_tower={name!r:.80} names no vision tower")
    leaf = name.rstrip("/").rsplit("/", 1)[-1]
    places = (Path(name), folder / name, folder / leaf, folder.parent / leaf)
    return next((p for p in places if os.path.isfile(p / "config.json")), None)


def text_rows(folder: Path, config: LlavaConfig) -> int:
    """Rows of the vocabulary tables that belong to tokens of text.

    They end behind the last token of tokenizer.json that is neither <image> nor <pad>. Without that file,
    llava-hf's conversion is recognised by <image> being the first of exactly 64 last rows; otherwise every
    row counts.
    """
    path, size = folder / "tokenizer.json", config.text.vocab_size
    if not path.is_file():
        return config.image_token_index if config.image_token_index + PADDING == size else size
    ids = [i for token, i in _token_ids(path) if token not in ("<image>", "<pad>")]
    return min(size, 1 + max(ids, default=size - 1))


def _token_ids(path: Path) -> list[tuple[str, int]]:
    """(token, id) of a tokenizer.json: its vocabulary and what is added. Raises BadInput naming the file."""
    raw = read_json(path)
    model, added = raw.get("model", {}), raw.get("added_tokens") or []
    known = model.get("vocab", {}) if isinstance(model, dict) else None
    if not isinstance(known, (dict, list)) or not isinstance(added, list):
        raise BadInput(f"{path}: not a readable tokenizer (it has no vocabulary)")
    if isinstance(known, list):  # (token, score), in the order of the ids
        known = {str(entry[0]) if isinstance(entry, list) and entry else "": i for i, entry in enumerate(known)}
    ids = [*known.items(), *((t.get("content"), t.get("id")) if isinstance(t, dict) else (t, None) for t in added)]
    for token, i in ids:
        if type(i) is not int or i < 0:
            raise BadInput(f"{path}: not a readable tokenizer (token {token!r:.80} has the id {i!r:.80})")
    return ids


def read_config(folder: Path) -> dict:
    """The parsed config.json of a checkpoint folder. Raises BadInput naming an unusable file."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise BadInput(f"{path}: not found (a checkpoint folder has one, with weights and a tokenizer)")
    return read_json(path)
