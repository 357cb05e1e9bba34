"""tools/pretrain.py: rows of equal size, a loss that equals scoring every segment alone, and what was shipped."""

import random

import pytest
import torch

from data import scenes
from data.processor import Processor
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL, load_llava
from model.logprobs import Scorer, Sequence, naive_logprobs
from model.views import stack
from tools import pretrain


@pytest.mark.parametrize("stage", pretrain.STAGES.values(), ids=pretrain.STAGES.keys())
def test_rows_have_one_size_and_mark_what_is_trained(stage):
    """Every row fills `room` exactly; only answers are trained, and a Yes or No is one token."""
    processor, rng = Processor(DEFAULT_MODEL), random.Random(0)
    yes, no = (processor.response(word)[0] for word in ("Yes", "No"))
    for seed in range(40):
        row = pretrain.segments(scenes.sample_scene(seed), processor, rng, stage)
        assert len(row) == stage.captions + stage.questions
        assert sum(len(ids) for ids, _ in row) == stage.room
        for ids, kinds in row:
            assert len(ids) == len(kinds) and kinds[0] == 0
            assert all(token in (yes, no) for token, kind in zip(ids, kinds) if kind == 2)
            text = processor.decode([token for token, kind in zip(ids, kinds) if kind])
            assert text and "ASSISTANT" not in text


def test_loss_equals_scoring_each_segment_alone():
    """2 mean(captions) + mean(Yes / No) + mean(others), from one sequence at a time with full logits."""
    model, processor, rng = load_llava(DEFAULT_MODEL), Processor(DEFAULT_MODEL), random.Random(1)
    rows = [pretrain.segments(scenes.sample_scene(s), processor, rng, pretrain.STAGES["llava"]) for s in (3, 8)]
    views = [processor.image(scenes.reference(s)) for s in (3, 8)]
    pixels, _ = stack(views, processor.patches)
    with torch.no_grad():
        loss, _ = pretrain._llava_loss(Scorer(model), processor, rows, model.vision_features(pixels))
        prefix = pretrain.shared_prefix(processor)
        flat = [(Sequence(i, prefix, tuple(ids)), kinds) for i, row in enumerate(rows) for ids, kinds in row]
        alone = naive_logprobs(model, [sequence for sequence, _ in flat], views)
    by_kind = {kind: [] for kind in range(4)}
    for logps, (_, kinds) in zip(alone, flat):
        for value, kind in zip(logps.tolist(), kinds):
            by_kind[kind].append(-value)
    mean = {kind: sum(values) / len(values) for kind, values in by_kind.items()}
    assert loss.item() == pytest.approx(2 * mean[1] + mean[2] + mean[3], abs=1e-4)


def test_prompts_begin_with_the_shared_prefix():
    processor = Processor(DEFAULT_MODEL)
    prefix = list(pretrain.shared_prefix(processor))
    for text in (scenes.CAPTION_PROMPT, scenes.exist_question("apple"), "What place is this?"):
        assert processor.prompt(text)[: len(prefix)] == prefix


def test_shipped_files_are_those_of_the_tokenizer_stage(tmp_path):
    """The tokenizer of model/tiny comes out of the code byte for byte, and its configurations fit."""
    pretrain.train_tokenizer(tmp_path)
    for folder, made in ((DEFAULT_MODEL, tmp_path), (DEFAULT_CLIP, tmp_path / "clip")):
        for name in ("tokenizer.json", "config.json", "preprocessor_config.json"):
            assert (made / name).read_bytes() == (folder / name).read_bytes(), name
    size = sum(file.stat().st_size for file in DEFAULT_MODEL.rglob("*.safetensors"))
    assert size < 12e6
