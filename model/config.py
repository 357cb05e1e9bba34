"""Configurations that several families share, and the helpers that read them from a config.json.

Only what the forward pass needs is kept. Fields that a file leaves out get the defaults of `transformers`, because
that is what the file's writer relied on; a value that is not supported (another activation, scaled RoPE, attention
biases) or that cannot be (a string for a number, 0 heads) is refused here, before any weight is read.

What a whole vision-language model is made of is read by its family (model/families).

Mistral's sliding window is the same as full attention up to its length, so it bounds `max_position_embeddings`; the
Mistral of LLaVA-1.6 has none.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from common import BadInput, read_json


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
    """CLIP text transformer. `eos_token_id` marks the position whose state represents the whole text."""

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


class Template(NamedTuple):
    """Text around image, question and response.

    before: up to the image.
    image: what a prompt with an image has after it: `<image>`, where the image tokens are, and what comes with it.
    after: from there to the response.
    answer: the response.
    stop: the token after it; it belongs to the response.
    """

    before: str
    image: str
    after: str
    answer: str
    stop: str


MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8}  # defaults that are not LLaMA's
TYPES = {  # annotation of a field -> what JSON may hold for it, and what that is called
    int: (int, "a whole number"), float: ((int, float), "a number"),
    bool: (bool, "true or false"), str: (str, "a string"),
}
LIMITS = {  # smallest and largest value; of the numbers not named here 1 and 2**20
    "num_hidden_layers": (1, 1000), "image_size": (1, 2048), "max_position_embeddings": (1, 2**31),
    "layer_norm_eps": (0, 1), "post_layernorm_eps": (0, 1), "rms_norm_eps": (0, 1), "rope_theta": (1, 1e12),
    **dict.fromkeys(("eos_token_id", "pad_token_id", "image_token_index", "image_token_id"), (0, 2**20)),
}


def read_config(folder: Path) -> dict:
    """The parsed config.json of a checkpoint folder. Raises BadInput naming an unusable file."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise BadInput(f"{path}: not found (a checkpoint folder has one, with weights and a tokenizer)")
    return read_json(path)


def take(cls, raw: dict, where: str, **fixed):
    """Build `cls` from the keys of `raw` that it knows; `fixed` wins. BadInput on a value that cannot be."""
    known = {k: raw[k] for k in cls.__dataclass_fields__ if raw.get(k) is not None} | fixed
    for name, value in known.items():
        check(name, value, cls.__dataclass_fields__[name].type, where)
    return cls(**known)


def check(name: str, value, kind: type, where: str) -> None:
    """Raise BadInput when a value is not of the kind (a key of TYPES), or beyond its LIMITS."""
    types, called = TYPES[kind]
    if not isinstance(value, types) or isinstance(value, bool) != (kind is bool):
        raise BadInput(f"{where}: {name}={value!r:.80} is not {called}")
    low, high = LIMITS.get(name, (1, 2**20))
    if kind in (int, float) and not low <= value <= high:
        raise BadInput(f"{where}: {name}={value!r:.80} is not between {low} and {high}")


def value(raw: dict, names: tuple[str, ...], default, where: str, kind: type = int):
    """The first of the keys that is there; BadInput as from `check`."""
    name, found = next(((n, raw[n]) for n in names if raw.get(n) is not None), (names[0], default))
    check(name, found, kind, where)
    return found


def refuse(raw: dict, where: str, **supported) -> None:
    """Raise BadInput when a key is present with a value that this code does not implement."""
    for key, allowed in supported.items():
        if key in raw and raw[key] not in allowed:
            raise BadInput(f"{where}: {key}={raw[key]!r:.80} is not supported (supported: {list(allowed)})")


def section(raw: dict, name: str, where: str) -> dict:
    """A section of the file. Raises BadInput when it is missing or no object."""
    if not isinstance(raw.get(name), dict):
        raise BadInput(f"{where}: " + (f"{name} is no object" if raw.get(name) is not None else f"has no {name}"))
    return raw[name]


def shared(width: int, heads: int, where: str, names: str = "hidden_size, num_attention_heads") -> None:
    """Raise BadInput when a width cannot be shared out among the heads."""
    if width % heads:
        raise BadInput(f"{where}: {width} is no multiple of {heads} ({names})")


def llama_config(raw: dict, where: str = "config.json") -> LlamaConfig:
    """Read a LLaMA-type section. Raises BadInput on features that change the mathematics."""
    refuse(raw, where, model_type=("llama", "mistral"), hidden_act=("silu",), attention_bias=(False, None),
           mlp_bias=(False, None))
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = section(raw, key, where) if raw.get(key) else {}
    refuse(rope, f"{where}: {key}", rope_type=("default",), type=("default",))
    mistral = raw.get("model_type") == "mistral"
    raw = {**MISTRAL, **raw} if mistral else raw
    base = take(LlamaConfig, raw, where)
    heads, longest = base.num_attention_heads, base.max_position_embeddings
    if raw.get("head_dim") is None:
        shared(base.hidden_size, heads, where)
    if mistral and raw.get("sliding_window", 4096) is not None:
        longest = min(longest, value(raw, ("sliding_window",), 4096, where))
    config = replace(
        base,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or base.hidden_size // heads,
        rope_theta=float(value(rope, ("rope_theta",), base.rope_theta, f"{where}: {key}", float)),
        max_position_embeddings=longest,
    )
    shared(heads, config.num_key_value_heads, where, "num_attention_heads, num_key_value_heads")
    shared(config.head_dim, 2, where, "head_dim, whose halves are rotated")
    return config


def vision_config(raw: dict, where: str, **fixed) -> VisionConfig:
    """Read a CLIP vision section. Raises BadInput naming the file and the field."""
    refuse(raw, where, model_type=("clip_vision_model",), hidden_act=("quick_gelu",))
    return vision_shapes(raw, where, **fixed)


def vision_shapes(raw: dict, where: str, **fixed) -> VisionConfig:
    """The numbers of a vision transformer of any kind. Raises BadInput where they do not fit one another."""
    config = take(VisionConfig, raw, where, **fixed)
    shared(config.hidden_size, config.num_attention_heads, where)
    if config.patch_size > config.image_size:
        raise BadInput(f"{where}: patch_size={config.patch_size} is larger than image_size={config.image_size}")
    return config


def clip_config(raw: dict, where: str = "config.json") -> ClipConfig:
    """Read a CLIP config.json (both towers). Raises BadInput like `llava_config`."""
    refuse(raw, where, model_type=("clip",))
    vision, text = (section(raw, name, where) for name in ("vision_config", "text_config"))
    dim, where_text = value(raw, ("projection_dim",), 512, where), f"{where}: text_config"
    refuse(text, where_text, model_type=("clip_text_model",), hidden_act=("quick_gelu",))
    text = take(ClipTextConfig, text, where_text, projection_dim=dim)
    shared(text.hidden_size, text.num_attention_heads, where_text)
    return ClipConfig(vision_config(vision, f"{where}: vision_config", projection_dim=dim), text, dim)


def token_ids(path: Path) -> list[tuple[str, int]]:
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
