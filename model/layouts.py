"""The names that tensors of a LLaVA checkpoint go by, and where each of them is.

Every name is translated by itself to that of the model, so mixtures load too:

    in the model, and in llava-hf   in llava-hf as later             in original LLaVA
    folders as first published      versions of it save it
    language_model.model.X          model.language_model.X           model.X
    language_model.lm_head          lm_head                          lm_head
    vision_tower.vision_model.X     (model.)vision_tower.X, or with  model.vision_tower.
                                        vision_model in between          vision_tower.vision_model.X
    multi_modal_projector.linear_1  model.multi_modal_projector.     model.mm_projector.0
    multi_modal_projector.linear_2      linear_1, linear_2           model.mm_projector.2
    image_newline                   model.image_newline              model.image_newline

What PEFT, DDP, FSDP and torch.compile put in front of a name is taken off first.

An original checkpoint may leave its vision tower (then it is the CLIP that config.json names) and its
projector (then it is in mm_projector.bin) outside. LLaVA's adapters may name a bare decoder as their base: then
the tower is that of the adapters' config.json, and the projector is in their non_lora_trainables.bin.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from common import BadInput, read_json, written_whole
from model.config import is_original, read_config, tower_folder
from model.hub import resolve
from model.tensors import Stored, list_file, list_tensors

WRAPPERS = re.compile(r"^((base_model\.model|module|_orig_mod|_fsdp_wrapped_module)\.)+"
                      r"|\b(_orig_mod|_fsdp_wrapped_module)\.")
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
PROJECTOR, TOWER = "multi_modal_projector.", "vision_tower.vision_model."
SETTINGS = ("processor_config.json", "preprocessor_config.json")  # of images (data/settings.py)
COMPANIONS = (
    "config.json", "generation_config.json", *SETTINGS, "chat_template.json", "chat_template.jinja",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "train.json",  # of train.py: the settings that suit this model, also in a second stage
)


def unwrapped(name: str) -> str:
    """The name without what wrappers of the model put before it."""
    return WRAPPERS.sub("", name)


def canonical(name: str) -> str:
    """Name in the model of a tensor in any of the layouts."""
    name = unwrapped(name)
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def llava_tensors(folder: Path) -> dict[str, Stored]:
    """Name in the model -> place, for all tensors of a LLaVA folder, or of the model that adapters go onto.

    Raises BadInput as from `list_tensors`, and when there is no projector.
    """
    base, home = adapter_base(folder) or folder, config_folder(folder)
    found, raw = by_name(list_tensors(base)), read_config(home)
    if not is_original(raw):
        return found
    for path in (base / "mm_projector.bin", folder / "non_lora_trainables.bin"):
        if path.is_file() and not any(n.startswith(PROJECTOR) for n in found):
            found |= {n: t for n, t in by_name(list_file(path)).items() if n.startswith(PROJECTOR)}
    if not any(n.startswith(PROJECTOR) for n in found):
        raise BadInput(f"{folder}: no projector: no tensor mm_projector in the weights of {base}, in its"
                       " mm_projector.bin or in non_lora_trainables.bin")
    if not any(n.startswith(TOWER) for n in found):
        clip = tower_folder(home, raw) or resolve(raw["mm_vision_tower"])
        tower = by_name(list_tensors(clip), unwrapped)
        found |= {TOWER + n.removeprefix("vision_model."): t for n, t in tower.items() if _of_tower(n)}
    return found


def by_name(tensors: list[Stored], rename: Callable[[str], str] = canonical) -> dict[str, Stored]:
    """Keyed by the name in the model. Raises BadInput when two tensors have the same."""
    found: dict[str, Stored] = {}
    for tensor in tensors:
        name = rename(tensor.name)
        if name in found:
            raise BadInput(f"{tensor.file}: tensor {tensor.name} is also in {found[name].file.name},"
                           f" as {found[name].name}")
        found[name] = tensor
    return found


def _of_tower(name: str) -> bool:
    """Vision tensors of a CLIP file with both towers, or of the vision tower alone."""
    return bool(re.match(r"(vision_model\.|embeddings\.|pre_layrnorm\.|encoder\.|post_layernorm\.)", name))


def adapter_base(folder: Path) -> Path | None:
    """Folder of the base model of an adapter folder; None for a folder that holds a model of its own."""
    path = folder / "adapter_config.json"
    if not path.is_file() or any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return None
    name = read_json(path).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise BadInput(f"{path}: names no base_model_name_or_path")
    try:
        base = resolve(name)
    except BadInput as error:
        raise BadInput(f"{path}: the base model: {error}") from None
    if not (base / "config.json").is_file():
        raise BadInput(f"{path}: the base model: {base} has no config.json")
    return base


def config_folder(folder: Path) -> Path:
    """Where config.json and tokenizer of a model are: with it. Adapters may have their own, as LLaVA's do
    (what they were trained with), or go by their base's."""
    return folder if (folder / "config.json").is_file() else adapter_base(folder) or folder


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a model is: with its config.json, or with its base where adapters bring none."""
    home, base = config_folder(folder), adapter_base(folder)
    return home if not base or any((home / n).is_file() for n in ("tokenizer.json", "tokenizer.model")) else base


def settings_folder(folder: Path) -> Path:
    """Where the image settings of a folder are: in it, or with the CLIP that an original checkpoint names."""
    if any((folder / name).is_file() for name in SETTINGS) or not (folder / "config.json").is_file():
        return folder
    raw = read_config(folder)
    return (tower_folder(folder, raw) if is_original(raw) else None) or folder


def copy_companions(source: Path, folder: Path) -> None:
    """Configuration and tokenizer files (what adapters lack, of their base; image settings of an original
    checkpoint's tower), each replaced atomically."""
    base = adapter_base(source)
    for name in COMPANIONS:
        places = [source, base, settings_folder(base or source) if name in SETTINGS else None]
        path = next((p / name for p in places if p and (p / name).is_file()), None)
        if path and path.resolve() != (folder / name).resolve():
            with written_whole(folder / name) as temporary:
                shutil.copyfile(path, temporary)
