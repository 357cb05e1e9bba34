"""End to end: pairs from scenes, a short alignment, less hallucination on held-out scenes."""

import json

import train


def test_dpo_lowers_hallucination_on_held_out_scenes(tmp_path):
    """100 scenes, 12 steps: fewer absent objects are mentioned, and the model still describes and answers."""
    options = "--loss dpo --scenes 100 --steps 12 --eval-scenes 50 --eval-split dev --seed 7"
    assert train.main([*options.split(), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    before, after = result["before"], result["after"]
    assert after["CHAIR_i"] < before["CHAIR_i"] and after["CHAIR_s"] < before["CHAIR_s"]
    assert after["recall"] > before["recall"] - 15
    assert after["POPE adversarial"] > before["POPE adversarial"] - 3
