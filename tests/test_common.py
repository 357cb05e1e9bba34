"""Strict JSON: every way of being broken is one line that names the file."""

import pytest

from common import parse_json, read_json, versions

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
