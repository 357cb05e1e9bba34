"""Janus-Pro 1B and 7B: everything that a checkpoint's files decide. The network is in model/janus.py.

Chen et al. 2025, arXiv 2501.17811.

    checkpoint              config.json                  weights         images
    deepseek-community      model_type janus             safetensors     short side rounded
    deepseek-ai             model_type multi_modality    .bin, bf16      short side truncated

The original config.json names its tower (TOWERS) and gives fields of the decoder that are not LLaMA's defaults: of the
7B model's, three.

Every row of the two vocabulary tables takes part in the softmax, also those that no text uses: so was it trained. The
head is never tied to the embedding: files hold both, and `transformers`' default of `tie_word_embeddings` (True, where
config.json leaves it out) is not followed.

Tensors. Every name is translated by itself to that of the model, so mixtures load too:

    in the model                      in deepseek-community           in the original
    language_model.model.X            model.language_model.X          language_model.model.X
    language_model.lm_head            lm_head                         language_model.lm_head
    aligner.fc1                       model.aligner.fc1               aligner.layers.0
    aligner.hidden_layers.0           model.aligner.hidden_layers.0   aligner.layers.2
    vision_model.X                    model.vision_model.X            vision_model.vision_tower.X, X of timm
        embeddings.patch_embedding        the same                        patch_embed.proj
        embeddings.position_embedding     the same                        pos_embed (1, P, C)
        encoder.layers.N                  the same                        blocks.N
            layer_norm1, layer_norm2          the same                        norm1, norm2
            self_attn.q_proj, k_proj, v_proj  the same                        attn.qkv, one after the other
            self_attn.out_proj                self_attn.projection_layer      attn.proj
        post_layernorm                    the same                        norm

The parts that generate images have no place in the model (GENERATION); a saved folder has them as they are in the
source, under the names of deepseek-community. The original's pooling and the mark of used codes (DROPPED) are what the
conversion of `transformers` leaves out, too.

Images: the long side becomes S, the short side is scaled with it, at least 14 pixels, and the rest of the square is
grey (127 where the mean is 0.5). By `aspect`:

    pad          the short side is truncated to whole pixels   VLMImageProcessor, the original
    pad_round    it is rounded, halves to even                 JanusImageProcessor of `transformers`

Template, to the letter:

    janus   <｜begin▁of▁sentence｜>{system}⏎⏎<|User|>: <begin_of_image><image><end_of_image>⏎{prompt}⏎⏎
            <|Assistant|>: {answer}<｜end▁of▁sentence｜>

with ⏎ a line break, {system} the sentences of SYSTEM and the image tokens in place of <image>. Without an image
"<begin_of_image><image><end_of_image>⏎" is left out. Of several images each is that without "⏎" where the prompt marks
it; without marks all of it is there once for each.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from PIL import Image

from common import BadInput
from model.config import (
    Template,
    VisionConfig,
    llama_config,
    read_config,
    refuse,
    section,
    token_ids,
    value,
    vision_shapes,
)
from model.janus import Janus, JanusConfig
from model.layouts import adapter_base, by_name, renamed
from model.settings import colours, image_settings, size_of
from model.tensors import Stored, list_tensors
from model.views import Preprocessing, Size, View, normalise, pad_to_square, single

Model = Janus

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PLACEHOLDER = "<image_placeholder>"
SPECIAL = (BEGIN, END, "<begin_of_image>", "<end_of_image>", PLACEHOLDER)
TEMPLATES = {
    "janus": Template(f"{BEGIN}{SYSTEM}\n\n<|User|>: ", "<begin_of_image><image><end_of_image>\n",
                      "{prompt}\n\n<|Assistant|>:", " {answer}", END),
}
SEVERAL_IMAGES = True
COMPANIONS = ()
ASPECTS = {"VLMImageProcessor": "pad", "JanusImageProcessor": "pad_round"}
MIN_SIDE = 14  # pixels of the short side

SIGLIP = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=384, patch_size=16,
              layer_norm_eps=1e-6, mlp_ratio=4)
TOWERS = {"siglip_large_patch16_384": SIGLIP}  # the towers that original checkpoints name

RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_model|aligner|vqmodel|generation_\w+)\.", r"\1."),
    (r"^(gen_)?aligner\.layers\.0\.", r"\1aligner.fc1."),
    (r"^(gen_)?aligner\.layers\.2\.", r"\1aligner.hidden_layers.0."),
    (r"^vision_model\.vision_tower\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^vision_model\.vision_tower\.pos_embed$", "vision_model.embeddings.position_embedding.weight"),
    (r"^vision_model\.vision_tower\.norm\.", "vision_model.post_layernorm."),
    (r"^vision_model\.vision_tower\.blocks\.(\d+)\.", r"vision_model.encoder.layers.\1."),
    (r"^(vision_model\.encoder\.layers\.\d+\.)norm(\d)\.", r"\1layer_norm\2."),
    (r"^(vision_model\.encoder\.layers\.\d+\.)attn\.", r"\1self_attn."),
    (r"^(vision_model\..*\.self_attn\.)(proj|projection_layer)\.", r"\1out_proj."),
    # what generates images
    (r"^gen_embed\.", "generation_embeddings."),
    (r"^gen_aligner\.", "generation_aligner."),
    (r"^gen_head\.output_mlp_projector\.", "generation_head.proj_out."),
    (r"^gen_head\.", "generation_head."),
    (r"^gen_vision_model\.", "vqmodel."),
    (r"^vqmodel\.encoder\.conv_blocks\.", "vqmodel.encoder.down."),
    (r"^vqmodel\.decoder\.conv_blocks\.", "vqmodel.decoder.up."),
    (r"^(vqmodel\..*\.)res\.", r"\1block."),
    (r"^(vqmodel\..*\.mid\.)0\.", r"\1block_1."),
    (r"^(vqmodel\..*\.mid\.)1\.", r"\1attn_1."),
    (r"^(vqmodel\..*\.mid\.)2\.", r"\1block_2."),
)
SAVED = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_model|aligner|vqmodel|generation_\w+)\.", r"model.\1."),
    (r"^(model\.vision_model\..*\.self_attn\.)out_proj\.", r"\1projection_layer."),
)
GENERATION = ("vqmodel.", "generation_embeddings.", "generation_aligner.", "generation_head.")
DROPPED = ("vision_model.vision_tower.attn_pool.", "vqmodel.quantize.codebook_used")
POSITIONS, FUSED = "vision_model.embeddings.position_embedding.weight", ".self_attn.qkv."


# ---------------------------------------------------------------------------------------------- configuration


def read(folder: Path) -> JanusConfig:
    """The configuration of a Janus-Pro folder. Raises BadInput naming the file and the setting that does not fit."""
    raw, where = read_config(folder), str(folder / "config.json")
    config = _original_config(raw, where) if is_original(raw) else janus_config(raw, where)
    path = folder / "tokenizer.json"
    if is_original(raw) and path.is_file():  # config.json does not name these tokens
        ids = {PLACEHOLDER: config.image_token_index, **dict(zip((BEGIN, END), config.ends)), **dict(token_ids(path))}
        config = replace(config, image_token_index=ids[PLACEHOLDER], ends=(ids[BEGIN], ids[END]))
    return config


def janus_config(raw: dict, where: str = "config.json") -> JanusConfig:
    """Read a config.json of `transformers`. Raises BadInput on another architecture."""
    tower, where_tower = section(raw, "vision_config", where), f"{where}: vision_config"
    text = llama_config(section(raw, "text_config", where), f"{where}: text_config")
    refuse(tower, where_tower, model_type=("janus_vision_model",), hidden_act=("gelu",), attention_bias=(True,),
           use_qk_norm=(False,), num_channels=(3,), depth=(2,), projection_dim=(text.hidden_size,))
    vision = _tower({**SIGLIP, **tower}, where_tower)
    refuse(tower, where_tower, num_image_tokens=(vision.num_patches,))
    image = value(raw, ("image_token_id", "image_token_index"), JanusConfig.image_token_index, where)
    return JanusConfig(vision, replace(text, tie_word_embeddings=False), image)


def is_original(raw: dict) -> bool:
    """True for the layout of the original repository."""
    return raw.get("model_type") == "multi_modality"


def _original_config(raw: dict, where: str) -> JanusConfig:
    tower, aligner, codes = (section(section(raw, f"{part}_config", where), "params", f"{where}: {part}_config")
                             for part in ("vision", "aligner", "gen_vision"))
    text = llama_config(section(raw, "language_config", where), f"{where}: language_config")
    refuse({"model_name": None} | tower, f"{where}: vision_config", model_name=tuple(TOWERS), select_layer=(-1,),
           select_feature=("same",), pixel_mean=(None,), pixel_std=(None,))
    sizes = TOWERS[tower["model_name"]]
    refuse(tower, f"{where}: vision_config", image_size=(sizes["image_size"],))
    refuse(aligner, f"{where}: aligner_config", projector_type=("mlp_gelu",), depth=(2,),
           input_dim=(sizes["hidden_size"],), n_embed=(text.hidden_size,))
    count, width = (value(codes, (name,), default, f"{where}: gen_vision_config")
                    for name, default in zip(("image_token_size", "n_embed"), JanusConfig.codes))
    return JanusConfig(_tower(sizes, where), replace(text, tie_word_embeddings=False), codes=(count, width))


def _tower(raw: dict, where: str) -> VisionConfig:
    """SigLIP's shapes; the MLP is `mlp_ratio` times as wide as the rest."""
    ratio, width = value(raw, ("mlp_ratio",), None, where, float), value(raw, ("hidden_size",), None, where)
    return vision_shapes(raw, where, intermediate_size=int(width * ratio), hidden_act="gelu")


def converted_config(config: JanusConfig, raw: dict) -> dict | None:
    """config.json of what is saved where the source has the original layout; None: the source's can be copied."""
    return hf_config(config) if is_original(raw) else None


def hf_config(config: JanusConfig) -> dict:
    """config.json of the layout of `transformers`."""
    vision, width = config.vision, config.text.hidden_size
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "layer_norm_eps",
            "hidden_act")
    tower = {name: number for name, number in asdict(vision).items() if name in kept}
    return {
        "model_type": "janus",
        "architectures": ["JanusForConditionalGeneration"],
        "text_config": {"model_type": "llama", **asdict(config.text), "hidden_act": "silu",
                        "bos_token_id": config.ends[0], "eos_token_id": config.ends[1]},
        "vision_config": {
            "model_type": "janus_vision_model", **tower, "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "projection_dim": width, "depth": 2, "num_image_tokens": vision.num_patches,
        },
        "vq_config": {
            "model_type": "janus_vqgan", "num_embeddings": config.codes[0], "embed_dim": config.codes[1],
            "projection_dim": width, "image_token_embed_dim": width,
        },
        "image_token_id": config.image_token_index,
        "tie_word_embeddings": False,
    }


# ----------------------------------------------------------------------------------------------------- tensors


def canonical(name: str) -> str:
    """Name in the model of a tensor in any of the layouts; of the fused attention weights, ...self_attn.qkv."""
    return renamed(name, RENAMES)


def saved_name(name: str) -> str:
    """Name of a tensor of the model in the layout of `transformers`."""
    return renamed(name, SAVED)


def peft_name(name: str) -> str:
    """Name in the model -> name in `transformers`' JanusForConditionalGeneration."""
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def tensors(folder: Path) -> dict[str, Stored]:
    """Name in the model -> place, for all tensors of a folder, or of the model that adapters go onto.

    Raises BadInput as from `list_tensors`.
    """
    found = by_name(list_tensors(adapter_base(folder) or folder), canonical)
    return {part: place for name, stored in found.items() if not name.startswith(DROPPED)
            for part, place in _parts(name, stored).items()}


def _parts(name: str, stored: Stored) -> dict[str, Stored]:
    """What a tensor of the file is in the model: fused attention weights are three, positions lose their first
    dimension, everything else is itself."""
    shape = stored.shape
    if FUSED in name and shape and shape[0] % 3 == 0:
        shape = (shape[0] // 3, *shape[1:])
        return {name.replace("qkv", f"{part}_proj"): stored._replace(shape=shape, offset=i * math.prod(shape))
                for i, part in enumerate("qkv")}
    if name == POSITIONS and len(shape) == 3 and shape[0] == 1:
        return {name: stored._replace(shape=shape[1:])}
    return {name: stored}


def may_ignore(config: JanusConfig, name: str) -> bool:
    """True for a tensor that a file may hold although the model has no place for it: those that generate images."""
    return name.startswith(GENERATION)


# ------------------------------------------------------------------------------------------------------ images


def find_aspect(folder: Path, config: JanusConfig, asked: str | None) -> str:
    """How the short side becomes whole pixels: as asked for, or as the folder's image processor does it."""
    where, raw = image_settings(folder)
    usual = "VLMImageProcessor" if is_original(read_config(folder)) else "JanusImageProcessor"
    name = str(raw.get("image_processor_type", usual))
    kind = re.sub("(Fast|Pil)$", "", name)
    if kind not in ASPECTS:
        raise BadInput(f"{where}: image_processor_type={name!r:.80} is not supported (supported: {', '.join(ASPECTS)})")
    if asked not in (None, *ASPECTS.values()):
        raise BadInput(f"aspect {asked!r} is none of {', '.join(ASPECTS.values())}")
    return asked or ASPECTS[kind]


def preprocessing(folder: Path, config: JanusConfig, aspect: str) -> Preprocessing:
    """The folder's numbers. BadInput naming the file and the setting that does not fit or is not supported."""
    (where, raw), size = image_settings(folder), config.vision.image_size
    refuse(raw, where, do_resize=(True,), do_rescale=(True,), rescale_factor=(1 / 255,), do_normalize=(True, False),
           do_pad=(True,), min_size=(MIN_SIDE,), resample=(Image.Resampling.BICUBIC.value,), image_size=(size,))
    if size_of(raw, "size", where) not in (None, (size, size)):
        raise BadInput(f"{where}: size={raw['size']!r} is not what the vision tower takes, {size} x {size}")
    mean, std, fill = colours(raw, where)
    return Preprocessing(size, mean, std, fill=fill)


def settings_folder(folder: Path) -> Path:
    """Where the image settings are: in the folder itself."""
    return folder


def view(image: Image.Image, aspect: str, how: Preprocessing, config: JanusConfig) -> View:
    """RGB image -> one tile, all its rows in order."""
    small = image.resize(resized(image.size, how.size, aspect), how.resample)
    return single(normalise(pad_to_square(small, how.fill), how), config.tile_tokens)


def resized(sides: tuple[int, int], size: int, aspect: str) -> tuple[int, int]:
    """Sides in pixels, in either order -> those of the image on its square of `size` pixels."""
    long = max(sides)
    whole = (int(x / long * size) if aspect == "pad" else round(x * (size / long)) for x in sides)
    return tuple(max(x, MIN_SIDE) for x in whole)


def image_tokens(size: Callable[[], Size], aspect: str, how: Preprocessing, config: JanusConfig) -> int:
    """len(rows) of `view`, whatever the size."""
    return config.tile_tokens


def question_reader(folder: Path) -> Callable[[str], tuple[int, ...]]:
    """Question -> what `Janus.connect` reads of it: nothing, image tokens do not depend on the question."""
    return lambda text: ()
