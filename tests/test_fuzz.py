"""A few broken files of every kind; `python -m tests.fuzz` tries thousands."""

from common import BadInput
from tests import fuzz


def test_broken_files_are_read_or_refused_by_name():
    totals, faults = fuzz.count(3)
    assert faults == {}
    assert totals["read"] >= 30 and totals["refused"] > 50


def test_faults_are_seen(tmp_path):
    """The counter itself: another exception, an error without a file's name, and a hang are faults."""
    def fail(error):
        def read(path):
            raise error
        return fuzz.Kind("x.json", {}, read)

    def outcome(kind):
        return fuzz.outcome(kind, b"{}", tmp_path)

    assert outcome(fail(KeyError("k"))).startswith("KeyError in test_fuzz.py")
    assert outcome(fail(BadInput("oh"))) == "names no file: oh"
    assert outcome(fail(ValueError("oh"))).startswith("ValueError in test_fuzz.py")
    assert outcome(fail(BadInput(f"{tmp_path}: oh"))) == "refused"
    assert outcome(fail(fuzz.TooLong())) == "takes more than 10 s"
    assert outcome(fuzz.Kind("x.json", {}, lambda path: path.read_bytes())) == "read"
