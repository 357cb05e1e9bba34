"""plots.py: every metric of a run in its panel, several runs in the same ones."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import plots
from common import BadInput

ADAVIP = {"loss": 1.1, "reward/chosen": 0.0, "reward/rejected": -1.0, "reward/removed": -2.0, "weight/rejected": 0.7,
          "weight/removed": 0.3, "scale": 0.7, "lr": 1e-6, "tokens/s": 10.0, "peak_gib": 1.0, "eta_s": 3.0}


def run(folder: Path, *lines) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return folder


def texts(path: Path) -> list[str]:
    return [e.text for e in ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")]


def test_panels_of_one_run():
    lines = [{"step": 1, **ADAVIP}, {"step": 3, **ADAVIP, "loss": 0.9, "weight/removed": 0.1}]
    found = {panel.title: panel.series for panel in plots.panels({"adavip": lines})}
    assert list(found) == ["loss", "reward", "weights of the negatives (AdaViP, Eq. 13)", "learning rate", "tokens/s",
                           "memory, GiB"]
    assert found["loss"] == {"loss": [(1, 1.1), (3, 0.9)]}
    assert list(found["reward"]) == ["chosen", "rejected", "removed"] and found["tokens/s"].keys() == {"tokens/s"}
    assert found["weights of the negatives (AdaViP, Eq. 13)"] == {"rejected": [(1, 0.7), (3, 0.7)],
                                                                  "removed": [(1, 0.3), (3, 0.1)]}


def test_values_that_are_not_finite_are_left_out():
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 2.0, "kl": float("inf")},
             {"step": 4, "loss": None}]
    assert [panel.series for panel in plots.panels({"a": lines})] == [{"loss": [(1, 1.0), (3, 2.0)]}]


def test_command_line(tmp_path, capsys):
    """A line that a kill has torn is left out; runs of the same name are told apart."""
    a = run(tmp_path / "a", {"step": 1, **ADAVIP}, '{"step": 2, "lo')
    b = run(tmp_path / "x" / "a", {"step": 1, "loss": 0.7}, '{"step": 2, "loss": NaN}')
    plots.main([str(a)])
    assert {"loss", "removed", "learning rate"} <= set(texts(a / "plots.svg"))
    plots.main([str(a), str(b), "--out", str(tmp_path / "both.svg")])
    assert {f"{a} loss", f"{b} loss", f"{a} removed"} <= set(texts(tmp_path / "both.svg"))
    with pytest.raises(SystemExit):
        plots.main([str(a), str(b)])
    assert "several runs need --out" in capsys.readouterr().err


@pytest.mark.parametrize("lines, message", [([], "without a line"), (["{"], "without a line"),
                                            ([{"step": 1}], "no metric to draw")])  # fmt: skip
def test_what_has_no_curves_is_refused(tmp_path, lines, message):
    with pytest.raises(BadInput, match=message):
        plots.main([str(run(tmp_path / "a", *lines))])
    with pytest.raises(BadInput, match="nowhere.*not found"):
        plots.main([str(tmp_path / "nowhere")])
