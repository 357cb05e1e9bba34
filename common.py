"""What all folders share: JSON is read strictly, so that one line names the file and what is wrong with it, a file of
many faults is refused in few lines, and the signatures of functions become the options of scripts."""

import argparse
import errno
import inspect
import json
import os
import platform
import re
import reprlib
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from itertools import takewhile
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

HOME = Path(__file__).resolve().parent


class BadInput(ValueError):
    """What the user gave cannot be used. The scripts print it and end with status 2; every other exception is a
    fault in the code and keeps its traceback."""


# A disk that is full or cannot be written, a place where no file can be; what else may go wrong with a file is a fault
# in the code.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
PLACE = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # a file system that has none


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Around a block that writes one file. Raises BadInput naming it where the disk is full or it cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK | PLACE:
            raise
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from None


@contextmanager
def written_whole(path: Path | str) -> Iterator[Path]:
    """A file that appears whole or not at all: the block writes the temporary path that it gets. Raises BadInput as
    `writing` does."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:80]}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with writing(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # its content before its name
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """A UTF-8 text file, as `written_whole` writes one."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def unwritable(path: Path) -> str:
    """Why a file could not be written at a path, or ""; folders above it that are missing will be made then."""
    if os.path.exists(path) and not os.path.isfile(path):
        return "it is no regular file"
    folder = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    try:
        tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}.").close()
    except OSError as error:
        return error.strerror
    return ""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Inside, this process alone writes a file or folder: a lock lies next to the file, or in the folder. Raises
    BadInput where another process has it; one that was killed has none. On Windows and on a file system
    without such locks nothing is refused."""
    if fcntl is None:
        yield
        return
    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, whose lock a loader's processes would keep
        except (BlockingIOError, PermissionError):
            raise BadInput(f"{path}: another run is writing it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what `written_whole` leaves in a folder when the process is killed in the middle of a write."""
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.\d+-[0-9a-f]{8}", path.name):
            path.unlink()


def parse_json(data: bytes, *, surrogates: bool = True) -> object:
    """JSON text -> value.

    Args:
        data: UTF-8, with or without a byte order mark.
        surrogates: accept lone ones (half a character, written as an escape), which cannot be encoded again.
    Raises BadInput in one line, without a file name: no UTF-8, no JSON, a key given twice, NaN or infinity, a number
    of more digits than Python converts, nested too deeply.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_refuse)
        if not surrogates and re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except UnicodeEncodeError as error:
        raise BadInput(f"holds half a character, the lone surrogate {error.object[error.start]!r}") from None
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise BadInput(f"not valid JSON ({error.msg} at {where})") from None
    except RecursionError:
        raise BadInput("not valid JSON (nested too deeply)") from None
    except ValueError as error:  # int() refuses thousands of digits
        reason = str(error) if str(error).startswith("holds") else "a number has too many digits"
        raise BadInput(f"not valid JSON ({reason})") from None


def _refuse(constant: str) -> None:
    raise BadInput(f"holds {constant}")


def _object(items: list[tuple]) -> dict:
    made = dict(items)
    if len(made) < len(items):
        keys = [key for key, _ in items]
        raise BadInput(f"holds the key {brief(next(key for key in keys if keys.count(key) > 1))} twice")
    return made


def read_json(path: Path | str, kind: type = dict):
    """The value of a JSON file, a `kind` (`object`: any). Raises BadInput naming the file: missing, unreadable, another
    type, or as from `parse_json` without surrogates."""
    try:
        value = parse_json(Path(path).read_bytes(), surrogates=False)
    except FileNotFoundError:
        raise BadInput(f"{path}: not found") from None
    except (OSError, BadInput) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{path}: {reason}") from None
    if not isinstance(value, kind):
        names = {dict: "object", list: "list"}
        raise BadInput(f"{path}: a JSON {names.get(kind, kind.__name__)} is wanted, found {type(value).__name__}")
    return value


SHOWN = 20  # problems that an error names; all are counted
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def refuse(problems: Iterable[str]) -> None:
    """BadInput with one line for each of the first SHOWN problems and one that counts the others, if any."""
    problems = list(problems)
    if problems:
        rest = [f"... and {len(problems) - SHOWN:,} more problems"] if len(problems) > SHOWN else []
        raise BadInput("\n".join(problems[:SHOWN] + rest))


def is_url(text: str) -> bool:
    """Whether a name is the address of a server."""
    return text.startswith(("http://", "https://"))


def brief(value: object) -> str:
    """`repr` in one short line that can be printed, whatever a file held."""
    return _short.repr(value)


def run_script(main: Callable[[], int | None], script: str, hint: str = "") -> typing.NoReturn:
    """How a script ends: with the status that `main` returns; 2 on bad input and unreachable servers, said in one line;
    1 when interrupted, with a hint."""
    try:
        sys.exit(main())
    except (BadInput, ConnectionError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted{hint}", file=sys.stderr)
        sys.exit(1)


def versions() -> dict[str, str | None]:
    """What a run was made with: the commit of this checkout ("-dirty" where files were changed, None without git), and
    the versions of Python and of the packages whose numbers count."""
    command = ["git", "-C", str(HOME), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
        commit = found.stdout.strip() if found.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):  # no git
        commit = None
    packages = {name: metadata.version(name) for name in ("torch", "tokenizers", "safetensors", "numpy", "Pillow")}
    return {"commit": commit, "python": platform.python_version(), **packages}


# ---- A function's signature says what it needs and what its options are --------------------------------------------


def arguments_of(function: Callable) -> list[str]:
    """What a function asks for by name: its arguments but for the keyword-only ones."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]


def options_of(*functions: Callable) -> dict[str, tuple[object, object]]:
    """Keyword-only arguments with a default: name -> (type, default)."""
    found = {}
    for function in functions:
        types = typing.get_type_hints(function)
        keywords = (p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY)
        found |= {p.name: (types[p.name], p.default) for p in keywords if p.default is not p.empty}
    return found


def kwargs_of(function: Callable, values: Mapping[str, object]) -> dict[str, object]:
    """The options of a function: what is given for them, else their defaults."""
    return {name: values.get(name, default) for name, (_, default) in options_of(function).items()}


def meaning(option: str, *functions: Callable) -> str:
    """What the tables in the headers of the functions' files say about an argument, without its symbol and type."""
    for function in functions:
        lines = (inspect.getmodule(function).__doc__ or "").splitlines() if option in options_of(function) else []
        for number, line in enumerate(lines):
            row = re.split(r"\s{2,}", line.strip())  # symbol, argument, type, meaning
            if option in row[:2] and row[-1] not in (option, "float", "int", "str"):
                column = line.rindex(row[-1])
                more = takewhile(lambda x: len(x) - len(x.lstrip()) == column, lines[number + 1 :])  # noqa: B023
                return " ".join([row[-1], *map(str.strip, more)])
    return ""


def add_options(group, *functions: Callable, suppress: bool = False, skip: Collection[str] = (),
                tuned: Mapping[str, str] = {}) -> None:
    """The options of functions on a command line: type, choices and default from the signature, the help from the
    header's table.

    Args:
        suppress: what is not given is absent, for functions whose defaults differ.
        skip: keyword arguments that are no options.
        tuned: what the help says of a default that is set elsewhere.
    """
    for name, (kind, default) in options_of(*functions).items():
        if name in skip:
            continue
        kind = next((k for k in typing.get_args(kind) if type(None) in typing.get_args(kind)), kind)  # of `kind | None`
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None
        several = typing.get_origin(kind) is tuple  # tuple[X, ...]
        kind = typing.get_args(kind)[0] if several else type(choices[0]) if choices else kind
        how = {"action": "store_true"} if kind is bool else {"type": kind, "choices": choices}
        how |= {"nargs": "+"} if several else {}
        shown = tuned.get(name, default.relative_to(HOME) if isinstance(default, Path) else default)
        unset = shown is None or shown is False or shown == ()  # 0 equals False, and is a default to show
        text = meaning(name, *functions) + ("" if unset else f" (default: {shown})")
        default = argparse.SUPPRESS if suppress else default
        group.add_argument(f"--{name.replace('_', '-')}", default=default, help=text.replace("%", "%%"), **how)


def check_ranges(values: Mapping[str, object], ranges: Mapping[str, str], *functions: Callable) -> None:
    """Refuse numbers outside their interval, NaN among them. Raises one BadInput that lists all.

    Args:
        values: option -> value; what is no number is passed over.
        ranges: interval such as "[0, 1)" -> options, of one function alone where FUNCTION.option.
    """
    intervals = {option: interval for interval, options in ranges.items() for option in options.split()}
    problems = []
    for name, value in values.items():
        if type(value) not in (int, float):
            continue
        keys = [*(f"{f.__name__}.{name}" for f in functions), name]
        interval = next((intervals[key] for key in keys if key in intervals), "(-inf, inf)")
        low, high = map(float, interval[1:-1].split(","))
        if not (low < value < high or value == low and interval[0] == "[" or value == high and interval[-1] == "]"):
            problems.append(f"--{name.replace('_', '-')} must be in {interval}, not {value}")
    refuse(problems)
