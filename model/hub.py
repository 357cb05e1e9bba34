"""A model by name: a folder is used as it is, a hub id ("llava-hf/llava-1.5-7b-hf") is downloaded and cached.

Only what is read is downloaded: configuration, tokenizer and preprocessing files, those of a second tokenizer in a
folder of its own, and the weights as safetensors or, where a repository has none, as .bin files.
"""

import os
import re
from pathlib import Path

import huggingface_hub

from common import BadInput

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SMALL = ["*.json", "tokenizer.model", "vocab.txt", "merges.txt"]
SAFE = ["*.safetensors", "non_lora_trainables.bin"]
NESTED = ["*/*.safetensors", "*/*.bin"]
PICKLED = ["pytorch_model*.bin", "mm_projector.bin", "adapter_model.bin", "non_lora_trainables.bin"]


def resolve(name: Path | str) -> Path:
    """Folder of a model. Raises BadInput in one line when there is none and none can be downloaded."""
    folder = Path(name)
    if os.path.isdir(folder):  # False also for what can be no path: too long, a null byte
        if (folder / "metrics.jsonl").is_file():
            raise BadInput(f"{name}: is the folder of a run; its model is {folder / 'model'}")
        return folder
    if os.path.isfile(folder):
        raise BadInput(f"{name}: is a file; the folder that holds it is wanted")
    if not HUB_ID.fullmatch(str(name)) or folder.is_absolute():
        raise BadInput(f"{name}: no such folder, and not a hub id (owner/name)")
    folder = _download(str(name), SMALL + SAFE)
    return folder if any(folder.glob("*.safetensors")) else _download(str(name), SMALL + PICKLED)


def _download(name: str, patterns: list[str]) -> Path:
    """Folder in the cache that holds the files that match; of weights only those of the repository's top level."""
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=NESTED))
    except (OSError, ValueError) as error:  # offline, unknown, gated: the client's errors are of these kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{name}: no such folder, and the download failed ({reason[:200]})") from None
