"""The files of a model's folder: which tensor has which name, where configuration and tokenizer are.

What PEFT, DDP, FSDP and torch.compile put before a tensor's name is taken off first. Then each family translates the
names of its layouts on disk to those of the model (model/families).
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from common import BadInput, read_json, written_whole
from model.hub import resolve
from model.tensors import Stored

WRAPPERS = re.compile(r"^((base_model\.model|module|_orig_mod|_fsdp_wrapped_module)\.)+"
                      r"|\b(_orig_mod|_fsdp_wrapped_module)\.")
SETTINGS = ("processor_config.json", "preprocessor_config.json")  # of images (model/settings.py)
COMPANIONS = (
    "config.json", "generation_config.json", *SETTINGS, "chat_template.json", "chat_template.jinja",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "train.json",  # of train.py: the settings that suit this model, also in a second stage
)


def unwrapped(name: str) -> str:
    """The name without what wrappers of the model put before it."""
    return WRAPPERS.sub("", name)


def renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    """The name without wrappers, after all replacements (pattern, replacement) in order."""
    name = unwrapped(name)
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def by_name(tensors: list[Stored], rename: Callable[[str], str]) -> dict[str, Stored]:
    """Keyed by the name in the model. Raises BadInput when two tensors have the same."""
    found: dict[str, Stored] = {}
    for tensor in tensors:
        name = rename(tensor.name)
        if name in found:
            raise BadInput(f"{tensor.file}: tensor {tensor.name} is also in {found[name].file.name},"
                           f" as {found[name].name}")
        found[name] = tensor
    return found


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


def copy_companions(source: Path, folder: Path, settings: Path, more: tuple[str, ...] = ()) -> None:
    """Configuration and tokenizer files (what adapters lack, of their base), each replaced atomically.

    Args:
        settings: the folder of the image settings, where `source` has none.
        more: further files of the model's family, which may be in folders of their own.
    """
    base = adapter_base(source)
    for name in (*COMPANIONS, *more):
        places = [source, base, settings if name in SETTINGS else None]
        path = next((p / name for p in places if p and (p / name).is_file()), None)
        if path and path.resolve() != (folder / name).resolve():
            with written_whole(folder / name) as temporary:
                shutil.copyfile(path, temporary)
