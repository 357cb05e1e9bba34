"""The tensors of a TorchScript archive, read without running what it holds.

torch.jit.load compiles the archive's code and calls its `__setstate__`, so a file could do as it likes. Here
the archive is data: a zip file with

    ROOT/data.pkl    a pickle of the module tree: classes by name, attributes, tensors as (storage, offset, ..)
    ROOT/data/KEY    the bytes of a storage, not compressed
    ROOT/code/       never looked at

The pickle is followed step by step, the few opcodes that TorchScript writes and no others; what it would
call becomes a `Call`, which is only looked at. Damaged files are BadInput.
"""

import math
import pickletools
import zipfile
from copy import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common import BadInput

REBUILD = "torch._utils _rebuild_tensor_v2"
STORAGES = {
    "torch DoubleStorage": torch.float64, "torch FloatStorage": torch.float32, "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16, "torch LongStorage": torch.int64, "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16, "torch CharStorage": torch.int8, "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "EMPTY_DICT": {}, "EMPTY_LIST": []}
LITERALS = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")


class Call:
    """A class or function by its name, what it would be called with, and the state it would be given."""

    def __init__(self, name: str, args: object = None):
        self.name, self.args, self.state = name, args, None


class Storage(NamedTuple):
    """A tensor's data in the archive, not read yet."""

    key: str
    dtype: torch.dtype
    length: int


def script_tensors(path: Path) -> dict[str, Tensor] | None:
    """Tensors of all modules by the names that `state_dict` gives them; None for a file that is no TorchScript.

    Attributes that are tensors without being parameters or buffers are among them.
    Raises BadInput naming a damaged file.
    """
    try:
        if not zipfile.is_zipfile(path):  # raises, too, on some damage
            return None
        with zipfile.ZipFile(path) as archive:
            roots = {name.split("/code/")[0] for name in archive.namelist() if "/code/" in name}
            return _tensors(archive, min(roots), path.stat().st_size) if roots else None
    except Exception as error:  # zipfile and pickletools have no one class of errors for damaged files
        reason = (str(error).splitlines() or [""])[0][:200]
        raise BadInput(f"{path}: not a readable TorchScript archive ({type(error).__name__}: {reason})") from None


def _tensors(archive: zipfile.ZipFile, root: str, size: int) -> dict[str, Tensor]:
    """The tensors of an archive of `size` bytes, whose members lie in the folder `root`."""
    members = [m for m in archive.infolist() if m.filename.startswith((f"{root}/data/", f"{root}/data.pkl"))]
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise BadInput("its data is compressed, or larger than the file")
    storages: dict[Storage, Tensor] = {}
    found: dict[str, Tensor] = {}
    pickled = archive.read(f"{root}/data.pkl")
    modules, left = [("", follow(pickled))], len(pickled)  # an attribute takes more than a byte
    while modules:
        prefix, module = modules.pop()
        if not isinstance(module.state, dict):
            raise BadInput(f"the module {prefix} has no attributes but what code of its own would make")
        left -= 1 + len(module.state)
        if left < 0 or len(prefix) > 1000:  # a module may be in several places, but not in itself
            raise BadInput("its modules contain each other")
        for name, value in module.state.items():
            if not isinstance(value, Call):
                continue
            if value.name == REBUILD:
                storage = value.args[0]
                if storage not in storages:
                    storages[storage] = _storage(bytearray(archive.read(f"{root}/data/{storage.key}")), storage)
                found[prefix + name] = _view(storages[storage], *value.args[1:4])
            elif value.name.startswith("__torch__"):
                modules.append((f"{prefix}{name}.", value))
    return found


def _storage(data: bytearray, storage: Storage) -> Tensor:
    if len(data) != storage.length * storage.dtype.itemsize:
        raise BadInput(f"storage {storage.key} has {len(data)} bytes, not {storage.length} {storage.dtype}")
    return torch.frombuffer(data, dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)


def _view(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """A tensor in a storage (n,). BadInput unless every element lies inside."""
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise BadInput(f"a tensor of size {size}, stride {stride} and offset {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if math.prod(size) > len(storage) or (math.prod(size) and last >= len(storage)):
        raise BadInput(f"a tensor of size {size} reaches beyond its storage of {len(storage)}")
    return storage.as_strided(size, stride, offset)


def follow(data: bytes) -> object:
    """The value that a pickle describes, calls left as `Call`. BadInput on an opcode TorchScript never writes;
    other exceptions on damaged data."""
    stack: list = []
    marks: list[int] = []
    memo: dict[int, object] = {}

    def items() -> list:
        at = marks.pop()
        taken = stack[at:]
        del stack[at:]
        return taken

    for opcode, arg, _ in pickletools.genops(data):
        name = opcode.name
        if name in LITERALS:
            stack.append(arg)
        elif name in CONSTANTS:
            stack.append(copy(CONSTANTS[name]))  # a list or dict is filled later
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(items()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "APPENDS"):
            added = items() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(added)
        elif name in ("SETITEM", "SETITEMS"):
            added = items() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            if not all(isinstance(key, (str, int, float)) for key in added[::2]):
                raise BadInput("a key that is no text or number")
            stack[-1].update(zip(added[::2], added[1::2], strict=True))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "GLOBAL":
            stack.append(Call(arg))
        elif name in ("REDUCE", "NEWOBJ"):
            args = stack.pop()
            stack[-1] = Call(stack[-1].name, args)
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif name == "BINPERSID":  # ("storage", class, key, device, length)
            _, kind, key, _, length = stack.pop()
            stack.append(Storage(key, STORAGES[kind.name], length))
        elif name not in ("PROTO", "STOP"):
            raise BadInput(f"opcode {name}")
    return stack.pop()
