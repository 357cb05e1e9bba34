"""Checkpoints on disk: folders of a VLM or a CLIP, read strictly, written atomically.

A folder holds config.json, weights (model/tensors.py), tokenizer files and preprocessor_config.json; what they mean
is up to the family that config.json names (model/families). A hub id in place of a folder is downloaded
(model/hub.py), and a folder of LoRA adapters is loaded with its base model (model/adapters.py).

A tensor that is missing, unexpected, of another shape or not floating-point is an error that names it, found
in the headers before any weight is read; one that holds NaN or infinity, when it is read. Extra tensors are
passed over only when the family says why (vision layers after the chosen feature layer, for example), and index
buffers that old versions of `transformers` wrote.

Vocabulary rows that no text uses are left in the file; `save_llava` carries them over.

The model is built without weights, and each tensor goes from the mapped file to its final dtype and device by itself.
"""

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
from model.config import clip_config, read_config
from model.families import family_of
from model.hub import resolve
from model.layouts import adapter_base, by_name, config_folder, copy_companions, unwrapped
from model.lora import LoRALinear, lora_layers
from model.tensors import (
    SHARD_BYTES,
    Stored,
    check_tensors,
    finite,
    list_tensors,
    read,
    read_one,
    save_json,
    save_shards,
)
from model.vlm import VLM

DEFAULT_MODEL = Path(__file__).parent / "tiny"
DEFAULT_CLIP = DEFAULT_MODEL / "clip"

BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


# ---------------------------------------------------------------------------------------------------- loading


def load_llava(name: Path | str, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu") -> VLM:
    """Load a folder or hub id of any family; adapters, if the folder holds some, stay adapters.

    Args:
        dtype: of the weights; None for that of each in the files, which on the CPU then stay mapped.

    Raises BadInput naming the file and the tensor or setting that does not fit.
    """
    folder = resolve(name)
    model, stored = _network(folder)
    fill(model, **stored, dtype=dtype, device=device)
    if model.config.text.tie_word_embeddings:
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    if adapter_base(folder):
        load_adapters(model, folder)
    return model.eval()


def outline(name: Path | str, dtype: torch.dtype = torch.float32) -> VLM:
    """What `load_llava` would load and merge, on the meta device: shapes of config.json, compared with the headers of
    the weights. BadInput naming what does not fit; no weight is read."""
    model, stored = _network(resolve(name))
    _match(model, **stored)
    return model.to(dtype).eval()


def _network(folder: Path) -> tuple[VLM, dict]:
    """The family's network on the meta device, and what is stored of it: arguments of `_match`."""
    family = family_of(folder)
    with torch.device("meta"), _Unfilled():
        model = family.Model(family.read(config_folder(folder)))
    return model, dict(found=family.tensors(folder), folder=adapter_base(folder) or folder,
                       may_ignore=partial(family.may_ignore, model.config), surplus_rows=model.config.surplus_rows)


class _Unfilled(TorchFunctionMode):
    """Inside, modules draw no initial weights: they are about to be read, and torch takes seconds to import
    what drawing on the meta device needs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def load_clip(name: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> CLIP:
    """Load a CLIP folder or hub id with both towers. Raises BadInput like `load_llava`."""
    folder = resolve(name)
    with torch.device("meta"), _Unfilled():
        model = CLIP(clip_config(read_config(folder), str(folder / "config.json")))
    fill(model, by_name(list_tensors(folder), unwrapped), folder, dtype, device)
    return model.eval().requires_grad_(False)


def fill(model: nn.Module, found: dict[str, Stored], folder: Path, dtype: torch.dtype | None,
         device: torch.device | str, may_ignore: Callable[[str], bool] = lambda name: False, surplus_rows: int = 0,
         ) -> None:
    """Put tensors into a model built on the meta device; the tables in the file have `surplus_rows` more.

    Raises BadInput naming every tensor that does not fit, or the first that is not finite.
    """
    rows = _match(model, found, folder, may_ignore, surplus_rows)
    names = {found[name]: name for name in rows}
    loaded = {}
    for stored, tensor in read(names):
        name = names[stored]
        tensor = tensor[: rows[name][0]] if name in (EMBEDDINGS, HEAD) else tensor
        loaded[name] = finite(tensor.to(device=device, dtype=dtype), f"{stored.file}: tensor {stored.name}")
    if _tied(model):
        loaded[HEAD] = loaded[EMBEDDINGS]
    model.load_state_dict(loaded, assign=True)


def _match(model: nn.Module, found: dict[str, Stored], folder: Path, may_ignore: Callable[[str], bool],
           surplus_rows: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors to read, by their names in the model. BadInput naming every tensor that does not fit."""
    rows = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if _tied(model):
        rows.pop(HEAD)
        found = {n: t for n, t in found.items() if n != HEAD}
    tables = {n: (rows[n][0] + surplus_rows, rows[n][1]) for n in (EMBEDDINGS, HEAD) if n in rows}
    check_tensors(found, rows | tables, folder, lambda name: bool(BUFFERS.search(name)) or may_ignore(name))
    return rows


def _tied(model: nn.Module) -> bool:
    """Whether the head is the table of embeddings."""
    named = model.state_dict(keep_vars=True)
    return HEAD in named and named[HEAD] is named[EMBEDDINGS]


# ----------------------------------------------------------------------------------------------------- saving


def save_llava(model: VLM, folder: Path | str, source: Path | str, dtype: torch.dtype | None = None,
               shard_bytes: int = SHARD_BYTES) -> None:
    """Write a folder in the layout of the family that `transformers` reads (of LLaVA: llava-hf's as first published),
    adapters merged, every file replaced atomically.

    Adapters alone are written by `model.adapters.save_adapters`.

    Args:
        source: the folder or hub id the model came from; its configuration and tokenizer files, the vision
            layers that are not built here and surplus vocabulary rows are carried over, so that other
            libraries find all they expect. From an original checkpoint, a new config.json is written, and 64
            rows for <image> and filler are appended to the tables, each the mean of the others.
        dtype: storage dtype; left out, that of each weight.
        shard_bytes: largest file of weights.
    Raises BadInput when an original checkpoint would be overwritten.
    """
    folder, source = Path(folder), resolve(source)
    base, home, family = adapter_base(source) or source, config_folder(source), family_of(source)
    new = family.converted_config(model.config, read_config(home))  # None: the source has the layout that is written
    if new and folder.resolve() == base.resolve():
        raise BadInput(f"{folder}: holds an original checkpoint, which would be mixed with another layout")
    tensors = merged_tensors(model)
    kept = {n: t for n, t in family.tensors(source).items() if not BUFFERS.search(n)}
    extra = new["text_config"]["vocab_size"] - model.config.text.vocab_size if new else model.config.surplus_rows
    for name in (EMBEDDINGS, HEAD) if extra else ():
        tensors[name] = partial(_with_rows, tensors[name], None if new else kept[name], extra)
    for name in sorted(kept.keys() - tensors.keys()):
        if name != "image_newline":
            tensors[name] = partial(read_one, kept[name])
    if model.config.text.tie_word_embeddings:
        tensors.pop(HEAD, None)
    folder.mkdir(parents=True, exist_ok=True)
    copy_companions(source, folder, family.settings_folder(home), family.COMPANIONS)
    if new:
        save_json(new, folder / "config.json")
    save_shards({family.saved_name(name): make for name, make in tensors.items()}, folder, shard_bytes, dtype)


def merged_tensors(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Name -> function that makes the tensor, LoRA update added; the model itself is left as it is."""
    layers = {f"{name}.weight": layer for name, layer in lora_layers(model).items()}
    return {name: partial(_merged, tensor, layers.get(name)) for name, tensor in model.state_dict().items()
            if not name.endswith((".lora_A", ".lora_B"))}


@torch.no_grad()
def _merged(weight: Tensor, layer: LoRALinear | None) -> Tensor:
    return weight if layer is None else layer.merged()


def _with_rows(make: Callable[[], Tensor], stored: Stored | None, extra: int) -> Tensor:
    """A table with `extra` more rows: the last ones of `stored`, or the mean of its own."""
    table = make().cpu()
    rows = table.float().mean(0).expand(extra, -1) if stored is None else read_one(stored)[-extra:]
    return torch.cat([table, rows.to(table.dtype)])
