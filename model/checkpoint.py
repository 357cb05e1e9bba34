"""Checkpoints on disk: LLaVA and CLIP folders, read strictly, written atomically.

A folder holds config.json, weights (model/tensors.py), tokenizer files and preprocessor_config.json; the
layouts that are understood are in model/layouts.py. A hub id in place of a folder is downloaded
(model/hub.py), and a folder of LoRA adapters is loaded with its base model (model/adapters.py).

A tensor that is missing, unexpected, of another shape or not floating-point is an error that names it, found
in the headers before any weight is read; one that holds NaN or infinity, when it is read. Extra tensors are
passed over only when the configuration says why: vision layers behind the chosen feature layer, the newline
embedding of a model that shows single views, and index buffers that old versions of `transformers` wrote.

Vocabulary rows that no text uses (model/config.py) are left in the file; `save_llava` carries them over.

Memory: the model is built without weights, and each tensor goes from the mapped file to its final dtype and
device by itself. On the CPU, weights that keep their dtype stay in the file's pages (read once, to look for NaN).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common import BadInput
from model.adapters import load_adapters
from model.clip import CLIP
from model.config import PADDING, clip_config, hf_config, is_original, read_config, read_llava_config
from model.hub import resolve
from model.layouts import TOWER, adapter_base, by_name, config_folder, copy_companions, llava_tensors, unwrapped
from model.llava import Llava
from model.lora import LoRALinear, lora_layers
from model.tensors import (
    SHARD_BYTES,
    Stored,
    finite,
    list_tensors,
    misfits,
    read,
    refuse,
    save_json,
    save_shards,
)

DEFAULT_MODEL = Path(__file__).parent / "tiny"
DEFAULT_CLIP = DEFAULT_MODEL / "clip"

BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


# ---------------------------------------------------------------------------------------------------- loading


def load_llava(
    name: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Llava:
    """Load a LLaVA folder or hub id; adapters, if the folder holds some, stay adapters.

    Raises BadInput naming the file and the tensor or setting that does not fit.
    """
    folder = resolve(name)
    base = adapter_base(folder)
    config = read_llava_config(config_folder(folder))
    with torch.device("meta"), _Unfilled():
        model = Llava(config)
    may_ignore = partial(_is_surplus, config)
    _fill(model, llava_tensors(folder), base or folder, dtype, device, may_ignore, config.surplus_rows)
    if config.text.tie_word_embeddings:
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    if base:
        load_adapters(model, folder)
    return model.eval()


class _Unfilled(TorchFunctionMode):
    """Inside, modules draw no initial weights: they are about to be read, and torch takes seconds to import
    what drawing on the meta device needs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def _is_surplus(config, name: str) -> bool:
    """True for a tensor that a LLaVA file may hold although the model has no place for it."""
    if BUFFERS.search(name) or (name == "image_newline" and not config.anyres):
        return True
    behind = range(config.vision_layers_used, config.vision.num_hidden_layers)
    numbers = "|".join(map(str, behind)) or "none"
    return bool(re.match(rf"{re.escape(TOWER)}(post_layernorm\.|encoder\.layers\.({numbers})\.)", name))


def load_clip(
    name: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CLIP:
    """Load a CLIP folder or hub id with both towers. Raises BadInput like `load_llava`."""
    folder = resolve(name)
    with torch.device("meta"), _Unfilled():
        model = CLIP(clip_config(read_config(folder), str(folder / "config.json")))
    found = by_name(list_tensors(folder), unwrapped)
    _fill(model, found, folder, dtype, device, lambda name: bool(BUFFERS.search(name)))
    return model.eval().requires_grad_(False)


def _fill(
    model: nn.Module,
    found: dict[str, Stored],
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    may_ignore: Callable[[str], bool],
    surplus_rows: int = 0,
) -> None:
    """Put tensors into a model built on the meta device; the tables in the file have `surplus_rows` more."""
    rows = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    text = getattr(model.config, "text", None)
    if tied := getattr(text, "tie_word_embeddings", False):
        rows.pop(HEAD)
        found = {n: t for n, t in found.items() if n != HEAD}
    tables = {n: (rows[n][0] + surplus_rows, rows[n][1]) for n in (EMBEDDINGS, HEAD) if n in rows}
    refuse(misfits(found, rows | tables, may_ignore), f"{folder}: ")
    names = {found[name]: name for name in rows}
    loaded = {}
    for stored, tensor in read(names):
        name = names[stored]
        tensor = tensor[: rows[name][0]] if name in tables else tensor
        loaded[name] = finite(tensor.to(device=device, dtype=dtype), f"{stored.file}: tensor {stored.name}")
    if tied:
        loaded[HEAD] = loaded[EMBEDDINGS]
    model.load_state_dict(loaded, assign=True)


# ----------------------------------------------------------------------------------------------------- saving


def save_llava(
    model: Llava,
    folder: Path | str,
    source: Path | str,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a llava-hf folder (layout as first published), adapters merged, every file replaced atomically.

    Adapters alone are written by `model.adapters.save_adapters`.

    Args:
        source: the folder or hub id the model came from; its configuration and tokenizer files, the vision
            layers that are not built here and surplus vocabulary rows are carried over, so that other
            libraries find all they expect. From an original checkpoint, config.json is written anew, and 64
            rows for <image> and filler are appended to the tables, each the mean of the others.
        dtype: storage dtype; left out, that of each weight.
        shard_bytes: largest file of weights.
    Raises BadInput when an original checkpoint would be overwritten.
    """
    folder, source = Path(folder), resolve(source)
    base = adapter_base(source) or source
    original = is_original(read_config(config_folder(source)))
    if original and folder.resolve() == base.resolve():
        raise BadInput(f"{folder}: holds an original checkpoint, which would be mixed with another layout")
    tensors = merged_tensors(model)
    kept = {n: t for n, t in llava_tensors(source).items() if not BUFFERS.search(n)}
    extra = model.config.surplus_rows or (PADDING if original else 0)
    for name in (EMBEDDINGS, HEAD) if extra else ():
        tensors[name] = partial(_with_rows, tensors[name], None if original else kept[name], extra)
    for name in sorted(kept.keys() - tensors.keys()):
        if name != "image_newline":
            tensors[name] = partial(_read_one, kept[name])
    if model.config.text.tie_word_embeddings:
        tensors.pop(HEAD, None)
    folder.mkdir(parents=True, exist_ok=True)
    copy_companions(source, folder)
    if original:
        save_json(hf_config(model.config, extra), folder / "config.json")
    save_shards(tensors, folder, shard_bytes, dtype)


def merged_tensors(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Name -> function that makes the tensor, LoRA update added; the model itself is left as it is."""
    layers = lora_layers(model)
    result = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            continue
        adapted = layers.get(owner) if leaf == "weight" else None
        result[name] = partial(_merged, tensor, adapted)
    return result


@torch.no_grad()
def _merged(weight: Tensor, layer: LoRALinear | None) -> Tensor:
    return weight if layer is None else (weight.float() + layer.update()).to(weight.dtype)


def _with_rows(make: Callable[[], Tensor], stored: Stored | None, extra: int) -> Tensor:
    """A table with `extra` more rows: the last ones of `stored`, or the mean of its own."""
    table = make().cpu()
    rows = table.float().mean(0).expand(extra, -1) if stored is None else _read_one(stored)[-extra:]
    return torch.cat([table, rows.to(table.dtype)])


def _read_one(stored: Stored) -> Tensor:
    return next(read([stored]))[1]
