"""LoRA adapters on disk: PEFT's format both ways, and LLaVA's own files.

    written here and by PEFT   adapter_config.json, adapter_model.safetensors (or .bin)
    written by LLaVA           the same, and non_lora_trainables.bin with what trained without an adapter

    name in the file (of LLaVA)                                     name in the model
    base_model.model.model.language_model.layers.0.mlp.up_proj      language_model.model.layers.0.mlp.up_proj
        .lora_A.weight  (r, in)                                         .lora_A
        .lora_B.weight  (out, r)                                        .lora_B
    base_model.model.model.multi_modal_projector.linear_1.weight    multi_modal_projector.linear_1.weight

The prefix may be doubled (checkpoints from the middle of a LLaVA training), and the rest may follow any
layout of the model's family. The update is alpha / r (alpha / sqrt(r) with `use_rslora`) times B A; dropout is
a matter of training and is ignored. What changes the mathematics otherwise (DoRA, biases, ranks of single
layers) is refused, and so is an initialisation that changed the base weights (PiSSA, OLoRA, CorDA, LoftQ,
LoRA-GA): the update is then one to weights that the base folder does not hold.

Adapters of the vision tower are refused too: policy and reference share its output.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common import BadInput, read_json
from model.config import refuse
from model.families import family_of, find_family
from model.hub import resolve
from model.layouts import by_name, config_folder, copy_companions, unwrapped
from model.lora import LoRALinear, lora_layers
from model.tensors import Stored, check_tensors, finite, list_file, read, save_json, save_tensors
from model.vlm import VLM

LORA = re.compile(r"(.+)\.(lora_[AB])(?:\.\w+)?\.weight")
PLAIN = dict(
    peft_type=("LORA",), bias=("none",), use_dora=(False,), fan_in_fan_out=(False,), lora_bias=(False,),
    use_qalora=(False,), rank_pattern=({},), alpha_pattern=({},), layer_replication=(None,),
    trainable_token_indices=(None,), target_parameters=(None, []),
    alora_invocation_tokens=(None,), arrow_config=(None,), kasa_config=(None,), monteclora_config=(None,),
    use_bdlora=(None,),
)
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")  # init_lora_weights
PEFT = "base_model.model."  # before the names of `transformers`' model
FILES = ("adapter_model.safetensors", "adapter_model.bin")
Pairs = dict[str, dict[str, Stored]]  # layer -> its two factors


def load_adapters(model: VLM, folder: Path | str) -> None:
    """Put the adapters of a folder onto a model without any; base weights freeze, adapters train.

    Weights that trained without an adapter (the connector) replace the model's.
    Raises BadInput naming the file and the tensor or setting that does not fit.
    """
    folder = Path(folder)
    if lora_layers(model):
        raise BadInput("the model has adapters already; merge them first")
    rank, alpha = read_adapter_config(folder / "adapter_config.json", model.CONNECTOR)
    files = [folder / name for name in FILES if (folder / name).is_file()][:1]
    if not files:
        raise BadInput(f"{folder}: no {FILES[0]} and no {FILES[1]}")
    files += [p for p in [folder / "non_lora_trainables.bin"] if p.is_file()]
    canonical = find_family({"model_type": model.config.model_type}).canonical
    pairs, plain = _sort([tensor for file in files for tensor in list_file(file)], canonical)
    _check(model, pairs, plain, rank, folder)
    wanted = [*plain.values(), *(tensor for pair in pairs.values() for tensor in pair.values())]
    values = {t: finite(value, f"{t.file}: tensor {t.name}") for t, value in read(wanted)}
    model.requires_grad_(False)
    with torch.no_grad():
        for name, stored in plain.items():
            model.get_parameter(name).copy_(values[stored])
        for name, pair in pairs.items():
            layer = LoRALinear(model.get_submodule(name), rank, alpha, dropout=0.0)
            for part, stored in pair.items():
                getattr(layer, part).copy_(values[stored])
            model.set_submodule(name, layer)


def read_adapter_config(path: Path, connector: str) -> tuple[int, float]:
    """(rank r, alpha as in alpha / r). Raises BadInput on a kind of adapter that is not plain LoRA.

    Args:
        connector: the module that may have trained without adapters.
    """
    raw = {key: value for key, value in read_json(path).items() if value is not None}
    refuse(raw, str(path), **PLAIN, modules_to_save=([], [connector], [f"model.{connector}"]))
    if (initial := raw.get("init_lora_weights")) is not None and initial not in KEEPS_BASE:
        raise BadInput(f"{path}: init_lora_weights={initial!r} is not supported (supported: {list(KEEPS_BASE)}):"
                       " it may have changed the base weights. Merge the adapters, or have PEFT convert them:"
                       " save_pretrained(.., path_initial_model_for_weight_conversion=..)")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not -1e9 < alpha < 1e9:
        raise BadInput(f"{path}: r={rank!r} and lora_alpha={alpha!r} are not a rank and a number")
    return rank, float(alpha) * (math.sqrt(rank) if raw.get("use_rslora") else 1.0)


def _sort(tensors: list[Stored], canonical: Callable[[str], str]) -> tuple[Pairs, dict[str, Stored]]:
    """Layer -> its two factors; parameter -> its new value."""
    pairs, plain = {}, {}
    for name, tensor in by_name(tensors, partial(_place, canonical)).items():
        layer, _, part = name.rpartition(".")
        if part in ("lora_A", "lora_B"):
            pairs.setdefault(layer, {})[part] = tensor
        else:
            plain[name] = tensor
    return pairs, plain


def _place(canonical: Callable[[str], str], name: str) -> str:
    """Name in a file -> that of the parameter it is for: LAYER.lora_A, LAYER.lora_B, or one of the base."""
    if match := LORA.fullmatch(unwrapped(name)):
        return canonical(match[1] + ".weight").removesuffix("weight") + match[2]
    return canonical(name)


def _check(model: VLM, pairs: Pairs, plain: dict[str, Stored], rank: int, folder: Path) -> None:
    """Raise BadInput naming everything in the files that does not fit the model."""
    if not pairs and not plain:
        raise BadInput(f"{folder}: the adapter files hold no tensors")
    takes = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)
             and not n.startswith(f"{model.TOWER}.") and not n.endswith("lm_head")}
    found, wanted = dict(plain), {n: tuple(p.shape) for n, p in model.named_parameters() if n in plain}
    for name, pair in pairs.items():
        found |= {f"{name}.{part}": tensor for part, tensor in pair.items()}
        if layer := takes.get(name):  # else its factors are unexpected
            wanted |= {f"{name}.lora_A": (rank, layer.in_features), f"{name}.lora_B": (layer.out_features, rank)}
    check_tensors(found, wanted, folder)


def save_adapters(model: VLM, folder: Path | str, base: Path | str) -> None:
    """Write the adapters, and the connector (the projector of LLaVA) if it trains, in PEFT's format, with `base` named.

    `load_llava(folder)` loads both, and so does PEFT, on top of `transformers`' model of the base folder. The
    base's configuration and tokenizer files are copied, so that the folder can stand for a model everywhere.
    Raises BadInput when there are no adapters, when they differ in rank or scale, or when weights train
    that the format has no place for.
    """
    folder, source, layers = Path(folder), resolve(base), lora_layers(model)
    family = family_of(source)
    kinds = {(layer.lora_A.shape[0], layer.scale) for layer in layers.values()}
    if not kinds:
        raise BadInput("the model has no adapters")
    if len(kinds) > 1:
        raise BadInput(f"adapters differ in rank or scale: {kinds}")
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}
    if other := sorted(n for n in trained if not n.startswith(model.CONNECTOR + ".")):
        raise BadInput(f"{other[0]} trains without an adapter; write the whole model instead")
    tensors = {f"{PEFT}{family.peft_name(name)}.{part}.weight": getattr(layer, part)
               for name, layer in layers.items() for part in ("lora_A", "lora_B")}
    if trained:
        tensors |= {PEFT + family.peft_name(n): p for n, p in model.named_parameters()
                    if n.startswith(model.CONNECTOR + ".")}
    (rank, scale), = kinds
    leaves = sorted({name.rsplit(".", 1)[-1] for name in layers})
    whole = [family.peft_name(model.CONNECTOR)]  # PEFT takes what ends so, and Janus-Pro also has a generation_aligner
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": scale * rank,
        "lora_dropout": 0.0, "bias": "none", "target_modules": rf".*language_model.*\.({'|'.join(leaves)})",
        "modules_to_save": whole if trained else None, "inference_mode": True, "task_type": None,
    }
    copy_companions(source, folder, family.settings_folder(config_folder(source)), family.COMPANIONS)
    save_json(config, folder / "adapter_config.json")
    save_tensors(tensors, folder / "adapter_model.safetensors")
