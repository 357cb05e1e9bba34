"""Tensor files: found, listed and read lazily; written atomically and in shards.

A folder's weights are the files that `transformers` would read (`weight_files`); .bin with `weights_only`, so no code
in it runs. Whatever else lies there is passed over. `list_tensors` looks at headers only. `read` hands out one tensor
after another, backed by the memory-mapped file: what is converted or moved costs its new size once, and what keeps
dtype and device costs no memory of its own, only file pages that the system may drop and read again.
"""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as write_file
from torch import Tensor

from common import BadInput, read_json, write_text, writing, written_whole

SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.\w+$")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
SHARD_BYTES = 5_000_000_000


class Stored(NamedTuple):
    """Where a tensor is and what it is; `dtype` is None when it is no floating-point type to compute in.

    A family may ask for a part of what the file holds under this name, or for another shape of it: `shape` is what is
    asked for, and `offset` the number of values before it.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    written: str  # the dtype as the file calls it
    offset: int = 0


# ---------------------------------------------------------------------------------------------------- reading


def list_tensors(folder: Path) -> list[Stored]:
    """All tensors of a folder's weight files. BadInput on a missing shard, a broken index or file."""
    files, placed = weight_files(folder)
    found = [tensor for file in files for tensor in list_file(file)]
    for name in sorted(placed.keys() - {tensor.name for tensor in found}):
        raise BadInput(f"{folder / placed[name]}: has no tensor {name}, which the index places there")
    return found


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files to read, and which tensor the index, where there is one, places in which.

    Safetensors before .bin; of either kind the single file before what the index names, as `transformers` has
    it, and then shards that are complete without an index.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            if index.is_file():
                _say(f"{single}: read instead of the shards that {index.name} names, as transformers does")
            return [single], {}
        if index.is_file():
            placed = _index(index)
            return [folder / name for name in sorted(set(placed.values()))], placed
        if shards := sorted(p for p in folder.glob(f"{stem}-*.{suffix}") if SHARD.search(p.name)):
            _complete(shards)
            return shards, {}
    raise BadInput(f"{folder}: no model.safetensors, no pytorch_model.bin, and no shards of either")


@cache
def _say(line: str) -> None:
    """One line on the console, once."""
    print(line, file=sys.stderr)


def _index(path: Path) -> dict[str, str]:
    """Tensor name -> name of a file that is there."""
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or any(not isinstance(f, str) or "/" in f for f in placed.values()):
        raise BadInput(f"{path}: weight_map is not a map from tensors to files of this folder")
    there = {p.name for p in path.parent.iterdir() if p.is_file()}
    for name in sorted(set(placed.values())):
        if name not in there:
            raise BadInput(f"{path.parent / name}: missing shard, named by the index")
    return placed


def _complete(shards: list[Path]) -> None:
    """Raise BadInput naming a shard that the others' names ask for."""
    for path in shards:
        match = SHARD.search(path.name)
        for i in range(1, int(match[2]) + 1):
            other = path.with_name(path.name[: match.start(1)] + f"{i:05d}" + path.name[match.end(1) :])
            if other not in shards:
                raise BadInput(f"{other}: missing shard, {path.name} is one of {int(match[2])}")


def list_file(file: Path) -> list[Stored]:
    """The tensors of one file. Raises BadInput when it is truncated or of another format."""
    if file.suffix == ".safetensors":
        with opened(file) as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}
            return [Stored(file, n, tuple(s.get_shape()), FLOATS.get(s.get_dtype()), s.get_dtype())
                    for n, s in slices.items()]
    return describe(_pickled(file), file)


def describe(tensors: dict[str, Tensor], file: Path) -> list[Stored]:
    """What is known of tensors in memory that came from a file."""
    return [Stored(file, n, tuple(t.shape), t.dtype if t.dtype in FLOATS.values() else None, str(t.dtype))
            for n, t in tensors.items()]


def read(tensors: Iterable[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Yield each tensor, file by file, on the CPU in the file's dtype, backed by the mapped file."""
    files: dict[Path, list[Stored]] = {}
    for tensor in tensors:
        files.setdefault(tensor.file, []).append(tensor)
    for file, members in files.items():
        state = _pickled(file) if file.suffix != ".safetensors" else None
        for tensor in members:
            if state is not None:
                yield tensor, _part(state[tensor.name], tensor)
                continue
            # Opened again for each, so that a mapping lives no longer than the tensors that need it.
            with opened(file) as shard:
                value = shard.get_tensor(tensor.name)
            yield tensor, _part(value, tensor)


def _part(value: Tensor, tensor: Stored) -> Tensor:
    """What `tensor` asks for of the values that the file has under its name."""
    if value.shape == tensor.shape:
        return value
    return value.flatten()[tensor.offset : tensor.offset + math.prod(tensor.shape)].view(tensor.shape)


def read_one(stored: Stored) -> Tensor:
    """The tensor, as `read` yields it."""
    return next(read([stored]))[1]


def read_file(file: Path) -> dict[str, Tensor]:
    """All tensors of one file by name. BadInput as from `list_file`, and when there is none."""
    if not file.is_file():
        raise BadInput(f"{file}: not found")
    return {stored.name: tensor for stored, tensor in read(list_file(file))}


@contextmanager
def opened(file: Path) -> Iterator:
    """A safetensors file. Raises BadInput naming one that cannot be read."""
    try:
        with safe_open(file, "pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file}: not a readable safetensors file ({error})") from None


def _pickled(file: Path) -> dict[str, Tensor]:
    """State dict of a torch file, or what it holds under "state_dict" or "model"; memory-mapped, but for files of
    torch before 1.6, which are no zip archives."""
    try:
        with file.open("rb") as archive:
            mappable = archive.read(4) == b"PK\x03\x04"
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # torch raises many kinds: RuntimeError, UnpicklingError, EOFError, KeyError
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].splitlines() or [type(error).__name__]
        raise BadInput(f"{file}: not a readable file of weights ({reason[0][:200]})") from None
    for inner in ("state_dict", "model"):  # next to it a training file has optimiser and settings
        state = state[inner] if isinstance(state, dict) and isinstance(state.get(inner), dict) else state
    if not isinstance(state, dict) or not all(isinstance(n, str) and _plain(t) for n, t in state.items()):
        raise BadInput(f"{file}: is no plain dictionary of tensors")
    return state


def _plain(value: object) -> bool:
    """True for a tensor of numbers in memory: not sparse, not quantised, not without data."""
    return (isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
            and value.device.type == "cpu")


# --------------------------------------------------------------------------------------------------- checking


def check_tensors(found: dict[str, Stored], wanted: dict[str, tuple[int, ...]], where: Path | str,
                  may_ignore: Callable[[str], bool] = lambda name: False) -> None:
    """Raise one BadInput that names the first eight tensors in `found` that are not what `wanted` (name -> shape) asks
    for: missing, unexpected, of another shape, not floating-point."""
    problems = [f"missing tensor {n}" for n in wanted if n not in found]
    problems += [f"unexpected tensor {n}" for n in found if n not in wanted and not may_ignore(n)]
    wrong = ((found[n].file, _misfit(found[n], wanted[n])) for n in wanted if n in found)
    problems += [f"{reason} (in {file.name})" for file, reason in wrong if reason]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise BadInput(f"{where}: " + " ".join("; ".join(sorted(problems)[:8]).splitlines()) + more)


def _misfit(stored: Stored, shape: tuple[int, ...]) -> str:
    """What is wrong with a tensor that should be floating-point and of this shape; "" for nothing."""
    if stored.shape == (0,) != shape:
        return f"tensor {stored.name} is empty, as ZeRO-3 leaves it (its zero_to_fp32.py writes whole weights)"
    if stored.shape != shape:
        return f"tensor {stored.name} is {stored.shape}, expected {shape}"
    return f"tensor {stored.name} is {stored.written}, not floating-point" if stored.dtype is None else ""


def finite(tensor: Tensor, where: str) -> Tensor:
    """The tensor itself. Raises BadInput when it holds NaN or infinity.

    One pass over it (0.1 s a GiB on one core) without memory of its size.

    Args:
        where: what the message begins with, file and tensor.
    """
    # aminmax hands NaN on, so the two extremes tell of all values.
    if tensor.is_floating_point() and tensor.numel() and not all(map(math.isfinite, tensor.detach().aminmax())):
        raise BadInput(f"{where} holds NaN or infinity as {str(tensor.dtype).removeprefix('torch.')}")
    return tensor


# ---------------------------------------------------------------------------------------------------- writing


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file. Raises OSError, as other writers do, where the disk is full or cannot be written."""
    try:
        write_file(tensors, path, metadata)
    except SafetensorError as error:
        if not (code := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from None


def save_tensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    plain = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in tensors.items()}
    with written_whole(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})


def save_shards(tensors: dict[str, Callable[[], Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES,
                dtype: torch.dtype | None = None) -> None:
    """Write model.safetensors, or shards and their index when it would be larger than `shard_bytes`.

    A tensor is made when its shard is filled, so one shard at a time is in memory. All shards are complete
    under temporary names before the first is moved into place; files of an earlier save that are not part of
    this one are removed last.

    Args:
        tensors: name -> function that makes the tensor.
        dtype: storage dtype; left out, that of each tensor.
    """
    parts: list[dict[str, int]] = []  # of each shard: name -> bytes
    shard: dict[str, Tensor] = {}
    for name, make in tensors.items():
        tensor = make().detach()
        tensor = tensor.to("cpu", dtype or tensor.dtype)
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            parts.append(_save_part(shard, folder, len(parts)))
            shard = {}
        shard[name] = tensor
    parts.append(_save_part(shard, folder, len(parts)))
    old = [p for p in folder.glob("model*.safetensors*") if OURS.fullmatch(p.name)]
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    files = files if len(parts) > 1 else ["model.safetensors"]
    for i, file in enumerate(files):
        os.replace(folder / f"part-{i}.tmp", folder / file)
    if len(files) > 1:
        weight_map = {name: file for file, part in zip(files, parts) for name in part}
        total = sum(size for part in parts for size in part.values())
        files.append("model.safetensors.index.json")
        save_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / files[-1])
    for path in old:
        if path.name not in files:
            path.unlink()


def _save_part(shard: dict[str, Tensor], folder: Path, i: int) -> dict[str, int]:
    """Write one shard under a temporary name; returns the size of each tensor."""
    plain = {name: tensor.contiguous() for name, tensor in shard.items()}
    with writing(folder / f"part-{i}.tmp"):
        save_file(plain, folder / f"part-{i}.tmp", metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in shard.items()}


def save_json(value: object, path: Path) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")
