"""LLaVA-1.5 and 1.6: everything that a checkpoint's files decide. The network is in model/llava.py.

Liu et al. 2023, arXiv 2310.03744 (1.5); Liu et al. 2024, "LLaVA-NeXT" (1.6).

    checkpoint            config.json                                images  template
    LLaVA-1.5 (llava-hf)  model_type llava                           one     hf
    LLaVA-1.6 (llava-hf)  model_type llava_next                      tiles   by decoder: Vicuna vicuna_v1,
                                                                             Mistral mistral_instruct,
                                                                             Yi (34B) chatml_direct
    1.5, 1.6 (original)   mm_vision_tower, LlavaLlamaForCausalLM or  by image_aspect_ratio; template as in 1.6
                          LlavaMistralForCausalLM

Original files name grid resolutions as (width, height), llava-hf as (height, width): here they are (height, width).

Vocabulary. llava-hf appends <image>, <pad> and filler rows to both tables (32064 rows for 32000 tokens). No text
contains them, so they must not take part in the softmax: `vocab_size` counts the rows before them and `surplus_rows`
the rest (`_text_rows`).

Tensors. Every name is translated by itself to that of the model, so mixtures load too:

    in the model, and in llava-hf   in llava-hf as later             in original LLaVA
    folders as first published      versions of it save it
    language_model.model.X          model.language_model.X           model.X
    language_model.lm_head          lm_head                          lm_head
    vision_tower.vision_model.X     (model.)vision_tower.X, or with  model.vision_tower.
                                        vision_model in between          vision_tower.vision_model.X
    multi_modal_projector.linear_1  model.multi_modal_projector.     model.mm_projector.0
    multi_modal_projector.linear_2      linear_1, linear_2           model.mm_projector.2
    image_newline                   model.image_newline              model.image_newline

An original checkpoint may leave its vision tower (then it is the CLIP that config.json names) and its projector (then
it is in mm_projector.bin) outside. LLaVA's adapters may name a bare decoder as their base: then the tower is that of
the adapters' config.json, and the projector is in their non_lora_trainables.bin.

Images, by `aspect`:

    crop     shorter side resized, centre square: the rest is lost          llava-hf's LLaVA-1.5
    pad      centred on a square of the mean colour (122, 116, 104)         original LLaVA-1.5; Re-Align also 1.6
    anyres   an overview and tiles of a higher resolution (model/anyres.py) LLaVA-1.6

Templates, to the letter:

    hf                 <s>USER: <image>⏎{prompt} ASSISTANT: {answer}</s>
    vicuna_v1          <s>{system, user} USER: <image>⏎{prompt} ASSISTANT: {answer}</s>
    llava_v1           <s>{system, human} USER: <image>⏎{prompt} ASSISTANT: {answer}</s>
    mistral_instruct   <s>[INST] <image>⏎{prompt} [/INST] {answer} </s>
    chatml_direct      <|im_start|>system⏎Answer the questions.<|im_end|><|im_start|>user⏎<image>⏎{prompt}
                       <|im_end|><|im_start|>assistant⏎{answer}<|im_end|>

with ⏎ a line break and {system} the sentences of SYSTEM. The last token, the stop token, belongs to the response.
Only chatml_direct has no token that begins a text. Without an image "<image>⏎" is left out. Of several images each is
"<image>" where the prompt marks it, as in LLaVA-NeXT's training (`preprocess_multimodal`); without marks "<image>⏎" is
there once for each.

    hf                 model cards of llava-hf's LLaVA-1.5; the embedded model
    vicuna_v1          training of LLaVA-1.5 and of LLaVA-1.6 on Vicuna
    llava_v1           the same with a "human" for the "user": RLAIF-V, and LLaVA's own chat scripts
    mistral_instruct   training of LLaVA-1.6 on Mistral-7B
    chatml_direct      training of LLaVA-1.6 on Yi-34B

Tokens. As in LLaVA with its slow tokenizer, the text is cut at the image and at special tokens, and each part is
tokenised on its own. LLaMA's and Mistral's vocabularies put a "▁" before each part, so one dangles on either side of
the image; Yi's does not. The fast tokenizers of llava-hf, given the whole text, leave out the one after the image.
Question "A dog?" and answer "Yes." in the vocabulary of tests/goldens/tokenizer.model (chatml_direct: without the "▁"
at the start, as in Yi's); "…" leaves tokens out, "|" is where the answer begins:

    hf                 <s> ▁USER : ▁ <image> ▁ <0x0A> A ▁dog ? ▁ASSISTANT : | ▁Yes . </s>
    vicuna_v1          <s> … ▁user ' s … ▁USER : ▁ <image> ▁ <0x0A> A ▁dog ? ▁ASSISTANT : | ▁Yes . </s>
    llava_v1           <s> … ▁human ' s … ▁USER : ▁ <image> ▁ <0x0A> A ▁dog ? ▁ASSISTANT : | ▁Yes . </s>
    mistral_instruct   <s> ▁ [ INST ] ▁ <image> ▁ <0x0A> A ▁dog ? ▁[/ INST ] | ▁Yes . ▁ </s>
    chatml_direct      <|im_start|> … <0x0A> <image> <0x0A> A ▁dog ? <|im_end|> … <0x0A> | Y es . <|im_end|>
"""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from PIL import Image

from common import BadInput
from model.anyres import anyres, image_rows
from model.config import (
    LlamaConfig,
    Template,
    VisionConfig,
    llama_config,
    read_config,
    refuse,
    section,
    token_ids,
    value,
    vision_config,
)
from model.hub import resolve
from model.layouts import SETTINGS, adapter_base, by_name, config_folder, renamed, unwrapped
from model.llava import Llava, LlavaConfig
from model.settings import image_settings, kind_of, read_preprocessing
from model.tensors import Stored, list_file, list_tensors
from model.views import Preprocessing, Size, View, pad_to_square, preprocess, single

Model = Llava

SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
IMAGE, USER = "<image>\n", "{prompt} ASSISTANT:"
TEMPLATES = {
    "hf": Template("<s>USER: ", IMAGE, USER, " {answer}", "</s>"),
    "vicuna_v1": Template(f"<s>{SYSTEM.format('user')} USER: ", IMAGE, USER, " {answer}", "</s>"),
    "llava_v1": Template(f"<s>{SYSTEM.format('human')} USER: ", IMAGE, USER, " {answer}", "</s>"),
    "mistral_instruct": Template("<s>[INST] ", IMAGE, "{prompt} [/INST]", " {answer} ", "</s>"),
    "chatml_direct": Template(
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n", IMAGE,
        "{prompt}<|im_end|><|im_start|>assistant\n", "{answer}", "<|im_end|>",
    ),
}

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

RENAMES = (
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"language_model.model.\1."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower\.|multi_modal_projector\.|image_newline$)", r"\1"),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
SEVERAL_IMAGES = True
COMPANIONS = ()
PROJECTOR, TOWER = "multi_modal_projector.", "vision_tower.vision_model."
OF_TOWER = ("vision_model.", "embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")  # in CLIP's files


# ---------------------------------------------------------------------------------------------- configuration


def llava_config(raw: dict, where: str = "config.json", tower: VisionConfig | None = None) -> LlavaConfig:
    """Read a config.json of llava-hf or of the original repository.

    Args:
        tower: that of an original checkpoint whose `mm_vision_tower` is none of OpenAI's.
    Raises BadInput on an architecture that is not LLaVA-1.5's or 1.6's.
    """
    if is_original(raw):
        return _original_config(raw, where, tower)
    refuse(raw, where, projector_hidden_act=("gelu",), vision_feature_select_strategy=("default",),
           multimodal_projector_bias=(True,), use_image_newline_parameter=(True, None),
           prompt_template=(*TEMPLATES, None))
    vision = vision_config(section(raw, "vision_config", where), f"{where}: vision_config")
    decoder = section(raw, "text_config", where)
    text = llama_config(decoder, f"{where}: text_config")
    model_type = raw.get("model_type", "llava")
    tiles = model_type == "llava_next"
    return LlavaConfig(
        vision=vision,
        text=text,
        model_type=model_type,
        image_token_index=value(raw, ("image_token_index", "image_token_id"), 32000, where),
        vision_feature_layer=_layer(raw, "vision_feature_layer", vision, where),
        image_grid_pinpoints=_pairs(raw.get("image_grid_pinpoints") or PINPOINTS, where) if tiles else (),
        aspect="anyres" if tiles else "pad" if raw.get("image_aspect_ratio") == "pad" else "crop",
        template=raw.get("prompt_template") or (_template(decoder, text, where) if tiles else "hf"),
    )


def hf_config(config: LlavaConfig, extra_rows: int = 0) -> dict:
    """config.json of the llava-hf layout, for tables with `extra_rows` after `text.vocab_size`.

    `image_aspect_ratio` and `prompt_template` are not llava-hf's: they keep what an original checkpoint says.
    """
    mistral = config.template == "mistral_instruct"
    text = {"model_type": "mistral", "sliding_window": None} if mistral else {"model_type": "llama"}
    text |= asdict(config.text) | {"vocab_size": config.text.vocab_size + extra_rows, "hidden_act": "silu"}
    grid = [list(pair) for pair in config.image_grid_pinpoints]
    return {
        "model_type": config.model_type,
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
    tower = tower or vision_config(TOWERS[named], where)
    decoder = {**raw, "model_type": "mistral" if name == ORIGINAL[1] else "llama"}
    text = llama_config(decoder, where)
    grid = _pairs(raw.get("image_grid_pinpoints") or PINPOINTS, where) if aspect == "anyres" else ()
    return LlavaConfig(
        vision=tower,
        text=text,
        model_type="llava_next" if grid else "llava",
        image_token_index=text.vocab_size,  # the original has none; llava-hf takes the first free id
        vision_feature_layer=_layer(raw, "mm_vision_select_layer", tower, where),
        image_grid_pinpoints=tuple(pair[::-1] for pair in grid),
        aspect=aspect,
        template=_template(decoder, text, where),
    )


def _layer(raw: dict, key: str, tower: VisionConfig, where: str) -> int:
    layer, layers = raw.get(key, -2), tower.num_hidden_layers
    if type(layer) is not int or not -layers - 1 <= layer <= layers:
        raise BadInput(f"{where}: {key}={layer!r:.80} is not one of the tower's {layers + 1} states")
    return layer


def _pairs(grid, where: str) -> tuple[tuple[int, int], ...]:
    """Pinpoints as the file orders them. A canvas has as many pixels as an image may have at most."""
    fits = isinstance(grid, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(x) is int and 0 < x <= 2**13 for x in pair)
        for pair in grid
    )
    if not fits:
        raise BadInput(f"{where}: image_grid_pinpoints={grid!r:.80} is not a list of two sizes each, of at most"
                       f" {2**13} pixels")
    return tuple(map(tuple, grid))


def _template(decoder: dict, text: LlamaConfig, where: str) -> str:
    """Name of the template that goes with a decoder (LLaVA-1.6 and original checkpoints)."""
    if decoder.get("model_type") == "mistral":
        return "mistral_instruct"
    if text.vocab_size > YI_VOCABULARY + PADDING:
        raise BadInput(f"{where}: vocab_size={text.vocab_size} is neither Vicuna's, Mistral's nor Yi's")
    return "chatml_direct" if text.vocab_size >= YI_VOCABULARY else "vicuna_v1"


def read(folder: Path) -> LlavaConfig:
    """The configuration of a LLaVA folder, rows that no text uses taken off the vocabulary.

    Raises BadInput naming the file and the setting that does not fit.
    """
    raw, tower = read_config(folder), None
    if is_original(raw) and (place := tower_folder(folder, raw)):
        found, where = read_config(place), str(place / "config.json")
        if "vision_config" in found:  # a CLIP with both towers
            found, where = section(found, "vision_config", where), f"{where}: vision_config"
        tower = vision_config(found, where)
    config = llava_config(raw, str(folder / "config.json"), tower)
    rows = _text_rows(folder, config)
    return replace(config, text=replace(config.text, vocab_size=rows), surplus_rows=config.text.vocab_size - rows)


def _text_rows(folder: Path, config: LlavaConfig) -> int:
    """Rows of the vocabulary tables that belong to tokens of text.

    They end after the last token of tokenizer.json that is neither <image> nor <pad>. Without that file,
    llava-hf's conversion is recognised by <image> being the first of exactly 64 last rows; otherwise every
    row counts.
    """
    path, size = folder / "tokenizer.json", config.text.vocab_size
    if not path.is_file():
        return config.image_token_index if config.image_token_index + PADDING == size else size
    ids = [i for token, i in token_ids(path) if token not in ("<image>", "<pad>")]
    return min(size, 1 + max(ids, default=size - 1))


def tower_folder(folder: Path, raw: dict) -> Path | None:
    """The CLIP folder that an original checkpoint names: as written, inside the checkpoint, or next to it.

    Raises BadInput when the name is none."""
    name = raw["mm_vision_tower"]
    if not isinstance(name, str) or not name.strip("/."):
        raise BadInput(f"{folder / 'config.json'}: mm_vision_tower={name!r:.80} names no vision tower")
    leaf = name.rstrip("/").rsplit("/", 1)[-1]
    places = (Path(name), folder / name, folder / leaf, folder.parent / leaf)
    return next((p for p in places if os.path.isfile(p / "config.json")), None)


# ----------------------------------------------------------------------------------------------------- tensors


def canonical(name: str) -> str:
    """Name in the model of a tensor in any of the layouts."""
    return renamed(name, RENAMES)


def saved_name(name: str) -> str:
    """The same: the model has llava-hf's names as first published."""
    return name


def peft_name(name: str) -> str:
    """Name in the model -> name in `transformers`' LlavaForConditionalGeneration."""
    return "model." + name.replace("language_model.model.", "language_model.", 1)


def tensors(folder: Path) -> dict[str, Stored]:
    """Name in the model -> place, for all tensors of a LLaVA folder, or of the model that adapters go onto.

    Raises BadInput as from `list_tensors`, and when there is no projector.
    """
    base, home = adapter_base(folder) or folder, config_folder(folder)
    found, raw = by_name(list_tensors(base), canonical), read_config(home)
    if not is_original(raw):
        return found
    for path in (base / "mm_projector.bin", folder / "non_lora_trainables.bin"):
        if path.is_file() and not any(n.startswith(PROJECTOR) for n in found):
            found |= {n: t for n, t in by_name(list_file(path), canonical).items() if n.startswith(PROJECTOR)}
    if not any(n.startswith(PROJECTOR) for n in found):
        raise BadInput(f"{folder}: no projector: no tensor mm_projector in the weights of {base}, in its"
                       " mm_projector.bin or in non_lora_trainables.bin")
    if not any(n.startswith(TOWER) for n in found):
        clip = tower_folder(home, raw) or resolve(raw["mm_vision_tower"])
        tower = by_name(list_tensors(clip), unwrapped)  # of both towers, or the vision tower alone
        found |= {TOWER + n.removeprefix("vision_model."): t for n, t in tower.items() if n.startswith(OF_TOWER)}
    return found


def may_ignore(config: LlavaConfig, name: str) -> bool:
    """True for a tensor that a LLaVA file may hold although the model has no place for it: the newline embedding of a
    model that shows single views, vision layers after the chosen feature layer."""
    if name == "image_newline":
        return not config.anyres
    after = range(config.vision_layers_used, config.vision.num_hidden_layers)
    return name.startswith((f"{TOWER}post_layernorm.", *(f"{TOWER}encoder.layers.{i}." for i in after)))


def converted_config(config: LlavaConfig, raw: dict) -> dict | None:
    """config.json of what is saved where the source has the original layout: llava-hf's, with the tables PADDING rows
    longer. None: the source is llava-hf's, and its own file can be copied."""
    return hf_config(config, PADDING) if is_original(raw) else None


# ------------------------------------------------------------------------------------------------------ images


def find_aspect(folder: Path, config: LlavaConfig, asked: str | None) -> str:
    """How images are shown: as asked for, or as the folder's configurations say. BadInput if impossible."""
    where, raw = image_settings(settings_folder(folder))
    kind, aspect = kind_of(where, raw) or "Llava", asked or config.aspect
    if not asked and aspect == "crop" and kind == "LlavaNext":
        raise BadInput(f"{where}: LlavaNextImageProcessor makes tiles, the model of {folder / 'config.json'}"
                       " takes none")
    if not asked and aspect == "crop" and kind == "Llava" and raw.get("do_pad"):
        aspect = "pad"
    if aspect not in ("crop", "pad", "anyres"):
        raise BadInput(f"aspect {aspect!r} is none of crop, pad, anyres")
    if aspect == "anyres":
        odd = [pair for pair in config.image_grid_pinpoints if any(x % config.vision.image_size for x in pair)]
        if odd or not config.anyres:
            reason = f"{odd[0]} is no multiple of {config.vision.image_size}" if odd else "there are none"
            raise BadInput(f"{folder / 'config.json'}: anyres needs image_grid_pinpoints, {reason}")
        refuse(raw, where, image_grid_pinpoints=([list(pair) for pair in config.image_grid_pinpoints],))
    return aspect


def preprocessing(folder: Path, config: LlavaConfig, aspect: str) -> Preprocessing:
    """The folder's numbers. BadInput naming the file and the setting that does not fit or is not supported."""
    return read_preprocessing(settings_folder(folder), config.vision.image_size, aspect)


def settings_folder(folder: Path) -> Path:
    """Where the image settings of a folder are: in it, or with the CLIP that an original checkpoint names."""
    if any((folder / name).is_file() for name in SETTINGS) or not (folder / "config.json").is_file():
        return folder
    raw = read_config(folder)
    return (tower_folder(folder, raw) if is_original(raw) else None) or folder


def view(image: Image.Image, aspect: str, how: Preprocessing, config: LlavaConfig) -> View:
    """RGB image -> tiles and rows, by `aspect`."""
    if aspect == "anyres":
        return anyres(image, config.image_grid_pinpoints, how, config.tile_tokens)
    image = pad_to_square(image, how.fill) if aspect == "pad" else image
    return single(preprocess(image, how), config.tile_tokens)


def image_tokens(size: Callable[[], Size], aspect: str, how: Preprocessing, config: LlavaConfig) -> int:
    """len(rows) of `view`. `size` gives (height, width); it is asked only where the number depends on it."""
    if aspect != "anyres":
        return config.tile_tokens
    return len(image_rows(size(), config.image_grid_pinpoints, how.size, config.tile_tokens))


def question_reader(folder: Path) -> Callable[[str], tuple[int, ...]]:
    """Question -> what `Llava.connect` reads of it: nothing, image tokens do not depend on the question."""
    return lambda text: ()
