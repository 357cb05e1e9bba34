"""Strict JSON: every way of being broken is one line that names the file. Options from signatures; whole files."""

import argparse
import errno
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import pytest

import common
from common import BadInput, held, parse_json, read_json, versions

BROKEN = {
    b"\xff{}": "not UTF-8 (invalid start byte at byte 0)",
    b'{"a": 1': "not valid JSON (Expecting ',' delimiter at column 8)",
    b'{"a": 1,\n"b" 2}': "not valid JSON (Expecting ':' delimiter at line 2, column 5)",
    b'{"a": NaN}': "not valid JSON (holds NaN)",
    b'{"a": -Infinity}': "not valid JSON (holds -Infinity)",
    b'{"a": ' + b"9" * 5000 + b"}": "not valid JSON (a number has too many digits)",
    b"[" * 200_000: "not valid JSON (nested too deeply)",
}


@pytest.mark.parametrize("data", BROKEN, ids=range(len(BROKEN)))
def test_what_is_broken_is_said_in_one_line(data, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_json(tmp_path / "a.json")
    assert str(caught.value) == f"{tmp_path / 'a.json'}: {BROKEN[data]}"


def test_type_and_absence_are_named(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    assert read_json(tmp_path / "a.json", list) == [1]
    with pytest.raises(ValueError, match="a.json: a JSON object is wanted, found list"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="b.json: not found"):
        read_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match=": Is a directory"):
        read_json(tmp_path)


def test_a_byte_order_mark_is_taken_and_keys_and_characters_are_whole():
    assert parse_json('\ufeff{"a": "é"}'.encode()) == {"a": "é"}
    with pytest.raises(ValueError, match="holds the key 'a' twice"):
        parse_json(b'{"b": 0, "a": 1, "a": 2}')
    assert parse_json(b'["\\ud83d", "\\ud83d\\ude00"]') == ["\ud83d", "\U0001f600"]
    assert parse_json(b'["\\ud83d\\ude00"]', surrogates=False) == ["\U0001f600"]
    with pytest.raises(ValueError, match="half a character, the lone surrogate"):
        parse_json(b'["\\ud83d"]', surrogates=False)


def test_versions_do_without_git(monkeypatch):
    found = versions()
    assert found["torch"] and found["python"].startswith("3.") and (found["commit"] or "0").strip("0123456789abcdef") in (
        "", "-dirty")
    monkeypatch.setenv("PATH", "")
    assert versions() == {**found, "commit": None}


# ---- options from signatures, whole files ----------------------------------------------------------------------------


def function(data, *, share: float = 0.5, first: int = 0, whole: bool = False, way: Literal["a", "b"] = "a",
             files: tuple[Path, ...] = (), name: str | None = None, measured: float = 2.0):
    """Options of every kind."""


def test_options_of_a_signature():
    """Types, choices, defaults and lists; 0 is a default to show, False and None are not; what is skipped is unknown."""
    parser = argparse.ArgumentParser()
    common.add_options(parser, function, skip=("measured",), tuned={"share": "0.7 by a file"})
    args = parser.parse_args(["--files", "x", "y", "--whole", "--way", "b"])
    assert vars(args) == {"share": 0.5, "first": 0, "whole": True, "way": "b", "files": [Path("x"), Path("y")],
                          "name": None}
    shown = " ".join(parser.format_help().split())
    assert "(default: 0.7 by a file)" in shown and "(default: 0)" in shown and "(default: a)" in shown
    assert "False" not in shown and "None" not in shown and "()" not in shown
    for wrong in (["--way", "c"], ["--first", "1.5"], ["--measured", "1"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
    parser = argparse.ArgumentParser()
    common.add_options(parser, function, suppress=True)
    assert vars(parser.parse_args(["--first", "3"])) == {"first": 3}


def test_a_file_that_could_not_be_written_leaves_the_former_one(tmp_path):
    with common.written_whole(tmp_path / "deep" / "a.txt") as temporary:
        temporary.write_text("one")
    with pytest.raises(KeyError), common.written_whole(tmp_path / "deep" / "a.txt") as temporary:
        temporary.write_text("tw")
        raise KeyError
    (path,) = (tmp_path / "deep").iterdir()
    assert (path.name, path.read_text()) == ("a.txt", "one")


def test_a_place_where_no_file_can_be_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "file" / "a", "File exists"),
                         (tmp_path / "file" / "b" / "a", "Not a directory"), (tmp_path / ("x" * 300), "File name too long")):
        with pytest.raises(BadInput, match=f"^{path}: cannot be written \\({reason}\\)$"):
            common.write_text(path, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


HOLDS = "import sys, time; from common import held\nwith held(__import__('pathlib').Path(sys.argv[1])): print(flush=True); time.sleep(60)"


@pytest.mark.parametrize("name", ["", "part-0"])
def test_two_processes_cannot_write_the_same(tmp_path, name):
    """A folder or a file; one that was killed holds nothing, and what was held leaves nothing behind."""
    other = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path / name], stdout=subprocess.PIPE, cwd=common.HOME)
    other.stdout.readline()
    try:
        with pytest.raises(BadInput, match="another run is writing it"), held(tmp_path / name):
            pass
        with held(tmp_path / "part-1"):
            pass
    finally:
        other.kill()
        other.communicate()
    with held(tmp_path / name), held(tmp_path / name):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, passes", [(errno.ENOLCK, True), (errno.EIO, False)])
def test_without_locks_nothing_is_refused(tmp_path, monkeypatch, number, passes):
    def lockf(*_):
        raise OSError(number, "no")

    monkeypatch.setattr(common.fcntl, "lockf", lockf)
    with nullcontext() if passes else pytest.raises(OSError, match="no"), held(tmp_path):
        assert passes


def test_where_a_file_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert common.unwritable(tmp_path / "new" / "folder" / "a.txt") == common.unwritable(tmp_path / "file") == ""
    assert common.unwritable(tmp_path) == "it is no regular file"
    assert common.unwritable(tmp_path / "file" / "a.txt") == "Not a directory"
    assert common.unwritable(tmp_path / ("x" * 300)) == "File name too long"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
