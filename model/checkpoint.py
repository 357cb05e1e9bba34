"""Checkpoints on disk: llava-hf and CLIP folders, read strictly, written atomically.

A folder holds config.json, one or more *.safetensors, tokenizer.json and preprocessor_config.json. A tensor
that is missing, unexpected or of another shape is an error that names it. Only two kinds of extra tensors are
passed over, and only when the configuration says why: vision layers behind the chosen feature layer, and
index buffers that old versions of `transformers` wrote.

llava-hf folders come in several layouts, as first published (left) and as later `transformers` re-save them;
each name is translated by itself, so mixtures load too:

    language_model.model.X          model.language_model.X                             decoder
    language_model.lm_head          lm_head                                            head
    vision_tower.vision_model.X     vision_tower.X, model.vision_tower.vision_model.X  CLIP tower
    multi_modal_projector.X         model.multi_modal_projector.X                      projector
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.clip import CLIP
from model.config import clip_config, llava_config, read_config
from model.llava import Llava
from model.lora import lora_layers

DEFAULT_MODEL = Path(__file__).parent / "tiny"
DEFAULT_CLIP = DEFAULT_MODEL / "clip"

RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
COMPANIONS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def load_llava(folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Llava:
    """Load a llava-hf folder. Raises ValueError naming the file and the tensor or setting that does not fit."""
    folder = Path(folder)
    config = llava_config(read_config(folder), str(folder / "config.json"))
    with torch.device("meta"):
        model = Llava(config)
    unused = re.compile(
        rf"^vision_tower\.vision_model\.(post_layernorm\.|encoder\.layers\.({_numbers(config)})\.)"
    )
    _fill(model, folder, dtype, device, lambda name: bool(BUFFERS.search(name) or unused.match(name)))
    if config.text.tie_word_embeddings:
        model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    return model.eval()


def _numbers(config) -> str:
    """Alternation of the vision layers that lie behind the feature layer."""
    return "|".join(str(i) for i in range(config.vision_layers_used, config.vision.num_hidden_layers)) or "none"


def load_clip(folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> CLIP:
    """Load a CLIP folder with both towers. Raises ValueError like `load_llava`."""
    folder = Path(folder)
    with torch.device("meta"):
        model = CLIP(clip_config(read_config(folder), str(folder / "config.json")))
    _fill(model, folder, dtype, device, lambda name: bool(BUFFERS.search(name)))
    return model.eval().requires_grad_(False)


def read_tensors(folder: Path) -> dict[str, tuple[Path, str]]:
    """Canonical tensor name -> (file, name in the file), over all shards of a folder."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors file")
    found: dict[str, tuple[Path, str]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as shard:
                names = list(shard.keys())
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
        for name in names:
            canonical = name
            for pattern, replacement in RENAMES:
                canonical = re.sub(pattern, replacement, canonical)
            if canonical in found:
                raise ValueError(f"{file}: tensor {name} is also in {found[canonical][0].name}")
            found[canonical] = (file, name)
    return found


def _fill(model: nn.Module, folder: Path, dtype, device, may_ignore) -> None:
    """Put the folder's tensors into a model built on the meta device."""
    wanted = model.state_dict()
    found = read_tensors(folder)
    tied = getattr(getattr(model, "config", None), "text", None)
    if getattr(tied, "tie_word_embeddings", False):
        found.setdefault("language_model.lm_head.weight", found.get("language_model.model.embed_tokens.weight"))
    problems = [f"missing tensor {n}" for n in wanted if found.get(n) is None]
    problems += [f"unexpected tensor {n}" for n in found if n not in wanted and not may_ignore(n)]
    loaded = {}
    for name, place in found.items():
        if name in wanted and place is not None:
            with safe_open(place[0], "pt") as shard:
                tensor = shard.get_tensor(place[1])
            if tensor.shape != wanted[name].shape:
                problems.append(f"tensor {name} is {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}")
            loaded[name] = tensor.to(device=device, dtype=dtype)
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{folder}: " + "; ".join(sorted(problems)[:8]) + more)
    model.load_state_dict(loaded, assign=True)


def save_llava(model: Llava, folder: Path | str, source: Path | str, dtype: torch.dtype | None = None) -> None:
    """Write a llava-hf folder (layout as first published), adapters merged, every file replaced atomically.

    Args:
        source: the folder the model came from; its configuration and tokenizer files and the vision layers that
            are not built here are carried over, so that other libraries find all they expect.
        dtype: storage dtype; left out, that of each weight.
    """
    folder, source = Path(folder), Path(source)
    tensors = merged_state(model)
    for name, (file, stored) in read_tensors(source).items():
        if name not in tensors and not BUFFERS.search(name):
            with safe_open(file, "pt") as shard:
                tensors[name] = shard.get_tensor(stored)
    if model.config.text.tie_word_embeddings:
        tensors.pop("language_model.lm_head.weight", None)
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / f"{name}.tmp")
            os.replace(folder / f"{name}.tmp", folder / name)
    save_tensors(tensors, folder / "model.safetensors", dtype)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict with every LoRA update added to its weight; the model itself is left as it is."""
    layers = lora_layers(model)
    state = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            continue
        if leaf == "weight" and owner in layers:
            tensor = (tensor.float() + layers[owner].update()).to(tensor.dtype)
        state[name] = tensor
    return state


def save_tensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file under a temporary name, then move it into place."""
    temporary = path.with_name(path.name + ".tmp")
    plain = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in tensors.items()}
    save_file(plain, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def save_json(value: object, path: Path) -> None:
    """Write JSON under a temporary name, then move it into place."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
