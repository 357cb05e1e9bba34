"""Tensor files: found, listed and read lazily; written atomically and in shards.

A folder holds *.safetensors, or else pytorch_model*.bin (read with `weights_only`, so no code in it runs), in
one file or in shards with an index. `list_tensors` looks at headers only. `read` hands out one tensor after
another, backed by the memory-mapped file: what is converted or moved costs its new size once, and what keeps
dtype and device costs no memory of its own, only file pages that the system may drop and read again.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.\w+$")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
SHARD_BYTES = 5_000_000_000


class Stored(NamedTuple):
    """Where a tensor is and what it is; `dtype` is None when it is no floating-point type to compute in."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    written: str  # the dtype as the file calls it


# ---------------------------------------------------------------------------------------------------- reading


def list_tensors(folder: Path) -> list[Stored]:
    """All tensors of a folder's weight files. ValueError on a missing shard, a broken index or file."""
    found, seen = [], {}
    for file in weight_files(folder):
        for tensor in list_file(file):
            if tensor.name in seen:
                raise ValueError(f"{file}: tensor {tensor.name} is also in {seen[tensor.name].name}")
            seen[tensor.name] = file
            found.append(tensor)
    for name, file in (_index(folder) or {}).items():
        if name not in seen:
            raise ValueError(f"{folder / file}: has no tensor {name}, which the index places there")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that the index names, or without one all *.safetensors, or else all pytorch_model*.bin."""
    index = _index(folder)
    if index is not None:
        names = sorted(set(index.values()))
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
        names = names or sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    if not names:
        raise ValueError(f"{folder}: no *.safetensors file and no pytorch_model*.bin")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing shard, named by the index")
        if index is None and (shard := SHARD.search(name)):
            for i in range(1, int(shard[2]) + 1):
                other = name[: shard.start(1)] + f"{i:05d}" + name[shard.end(1) :]
                if other not in names:
                    raise ValueError(f"{folder / other}: missing shard, {name} is one of {int(shard[2])}")
    return [folder / name for name in names]


def _index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name of an index file; None without one."""
    for kind in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        path = folder / kind
        if not path.is_file() or (kind.startswith("pytorch") and any(folder.glob("model*.safetensors"))):
            continue
        try:
            index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a readable index ({type(error).__name__}: {error})") from None
        if not isinstance(index, dict) or any(not isinstance(f, str) or "/" in f for f in index.values()):
            raise ValueError(f"{path}: weight_map is not a map from tensors to files of this folder")
        return index
    return None


def list_file(file: Path) -> list[Stored]:
    """The tensors of one file. Raises ValueError when it is truncated or of another format."""
    if file.suffix == ".safetensors":
        with _safetensors(file) as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}
            return [Stored(file, n, tuple(s.get_shape()), FLOATS.get(s.get_dtype()), s.get_dtype())
                    for n, s in slices.items()]
    state = _pickled(file)
    return [Stored(file, n, tuple(t.shape), t.dtype if t.dtype in FLOATS.values() else None, str(t.dtype))
            for n, t in state.items()]


def read(tensors: Iterable[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Yield each tensor, file by file, on the CPU in the file's dtype, backed by the mapped file."""
    files: dict[Path, list[Stored]] = {}
    for tensor in tensors:
        files.setdefault(tensor.file, []).append(tensor)
    for file, members in files.items():
        state = _pickled(file) if file.suffix != ".safetensors" else None
        for tensor in members:
            if state is not None:
                yield tensor, state.pop(tensor.name)
                continue
            # Opened anew for each, so that a mapping lives no longer than the tensors that need it.
            with _safetensors(file) as shard:
                value = shard.get_tensor(tensor.name)
            yield tensor, value


@contextmanager
def _safetensors(file: Path):
    try:
        with safe_open(file, "pt") as shard:
            yield shard
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from None


def _pickled(file: Path) -> dict[str, Tensor]:
    """State dict of a .bin file, memory-mapped."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds: RuntimeError, UnpicklingError, EOFError, KeyError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: not a readable file of weights ({reason[:200]})") from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{file}: is no plain dictionary of tensors")
    return state


# ---------------------------------------------------------------------------------------------------- writing


def save_tensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file under a temporary name, then move it into place."""
    temporary = path.with_name(path.name + ".tmp")
    plain = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in tensors.items()}
    save_file(plain, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def save_shards(
    tensors: dict[str, Callable[[], Tensor]],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
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
    save_file(plain, folder / f"part-{i}.tmp", metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in shard.items()}


def save_json(value: object, path: Path) -> None:
    """Write JSON under a temporary name, then move it into place."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
