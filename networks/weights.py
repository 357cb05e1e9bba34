"""Published weights into a network, strictly."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from common import BadInput
from model.layouts import renamed
from model.tensors import check_tensors, describe, finite, read_file

Tensors = dict[str, Tensor]


def load_weights(build: Callable[[Tensors], nn.Module], path: Path | str, published: str,
                 convert: Callable[[Tensors], Tensors], device: torch.device | str = "cpu") -> nn.Module:
    """The network with the tensors of a file, in fp32, frozen.

    Args:
        build: converted tensors -> the network; called on the meta device, so that sizes may be read off the tensors.
        path: safetensors, or a torch file that weights_only=True reads; its state dict may lie under "model".
        published: name, size and place of the published file, and what it is for; part of the messages.
        convert: tensors as published -> tensors by the network's names, without those that it has no use for.
    Raises BadInput naming the file and every tensor that is missing, unknown or of another shape, or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: not found; wanted is {published}")
    found = convert(read_file(path))
    try:
        with torch.device("meta"):
            model = build(found)
    except KeyError as error:
        raise BadInput(f"{path}: no tensor {error.args[0]}; wanted is {published}") from None
    check_tensors({stored.name: stored for stored in describe(found, path)},
                  {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, path)
    loaded = {name: finite(tensor.to(device, torch.float32), f"{path}: tensor {name}")
              for name, tensor in found.items()}
    model.load_state_dict(loaded, assign=True)
    return model.eval().requires_grad_(False)


def translated(tensors: Tensors, names: tuple[tuple[str, str], ...], unused: re.Pattern) -> Tensors:
    """By the network's names (`model.layouts.renamed`), without those that it has no use for."""
    named = {renamed(name, names): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if not unused.search(name)}


def depth(tensors: Tensors, prefix: str) -> int:
    """How many layers are named PREFIX0, PREFIX1, ..."""
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def fuse(tensors: Tensors, parts: tuple[str, str, str], whole: str) -> Tensors:
    """Query, key and value that are stored apart, as one tensor: names with `parts` become one with `whole`."""
    result = {}
    for name, tensor in tensors.items():
        if parts[0] in name:
            rows = [tensors[name.replace(parts[0], part)] for part in parts]
            result[name.replace(parts[0], whole)] = torch.cat(rows)
        elif not any(part in name for part in parts[1:]):
            result[name] = tensor
    return result
