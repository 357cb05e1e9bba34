"""Held-out preference accuracy: the figures of dpo_loss itself, whatever the batch size, and by hand."""

import math

import pytest
import torch

import evaluate
from common import BadInput
from data.batch import collate
from data.images import open_image
from data.processor import Processor
from data.records import write_jsonl
from losses.dpo import SEQUENCES, dpo_loss
from metrics import preference
from model.checkpoint import DEFAULT_MODEL, load_llava
from model.logprobs import Scorer
from model.lora import Reference, add_lora, lora_layers, merge_lora

ROWS = [
    {"id": "a", "image": "scene:1", "prompt": "Describe the image.", "chosen": "A dog.", "rejected": "A red car and a cat."},
    {"id": "b", "image": "scene:2", "prompt": "What is there?", "chosen": "There are two cups on a table.", "rejected": "Cup"},
    {"id": "c", "image": "scene:1", "prompt": "Describe the image.", "chosen": "A tree.", "rejected": "A bench."},
]


@pytest.fixture(scope="module")
def policy():
    """The embedded model with adapters that matter."""
    model = load_llava(DEFAULT_MODEL)
    torch.manual_seed(0)  # of lora_A, too
    add_lora(model.language_model.model, rank=2, alpha=4.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def processor():
    return Processor(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def said(policy, processor):
    return preference.measure(policy, processor, ROWS, batch_size=3)


def test_figures_are_those_of_dpo_loss(policy, processor, said):
    batch, scorer, reference = collate(ROWS, SEQUENCES, processor), Scorer(policy), Reference(policy)
    with torch.no_grad():
        features = policy.vision_features(batch.pixels)
        mine = scorer(batch.packed, features)[0].sum(-1)
        with reference():
            other = scorer(batch.packed, features)[0].sum(-1)
    loss, metrics = dpo_loss(*mine.chunk(2), *other.chunk(2), beta=0.3)
    scores = preference.score(ROWS, said, beta=0.3)
    assert len(set((metrics["margin"] > 0).tolist())) == 2  # a swapped pair would show
    for name, value in (("accuracy", metrics["accuracy"]), ("margin", metrics["margin"]), ("loss", loss),
                        ("reward_chosen", metrics["reward/chosen"]), ("reward_rejected", metrics["reward/rejected"])):
        assert scores[name] == pytest.approx(value.mean().item(), abs=1e-4), name


def test_batch_size_does_not_matter(policy, processor, said):
    single = preference.measure(policy, processor, ROWS, batch_size=1)
    assert list(single) == ["a", "b", "c"]
    for key, numbers in said.items():
        assert single[key] == pytest.approx(numbers, abs=1e-3)


def test_a_second_model_is_the_reference_with_its_own_adapters(policy, processor, said):
    """Base model: as with adapters off. The policy itself: no margin, though it carries adapters."""
    base = preference.measure(policy, processor, ROWS, reference=load_llava(DEFAULT_MODEL))
    for key, numbers in said.items():
        assert base[key] == pytest.approx(numbers, abs=1e-3)
    same = preference.score(ROWS, preference.measure(policy, processor, ROWS, reference=policy))
    assert same["margin"] == 0 and same["ties"] == 3 and same["accuracy"] == 0
    assert same["loss"] == pytest.approx(math.log(2))


def test_without_any_reference_it_is_refused(processor):
    model = load_llava(DEFAULT_MODEL)
    merge_lora(model)
    with pytest.raises(BadInput, match="^preference needs --reference DIR"):
        preference.measure(model, processor, ROWS)


def logps(chosen, rejected, reference_chosen, reference_rejected):
    names = "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"
    return dict(zip(names, (chosen, rejected, reference_chosen, reference_rejected)))


def test_score_by_hand():
    """Rewards at beta 0.5: a 1 and -1, margin 2; b -1 and 0, margin -1; c 0 and 0, a tie."""
    said = {"a": logps(-8, -12, -10, -10), "b": logps(-6, -3, -4, -3), "c": logps(-5, -9, -5, -9)}
    scores = preference.score(ROWS, said, beta=0.5)
    loss = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1)) + math.log(2)) / 3
    assert scores == {
        "n": 3, "right": 1, "ties": 1, "beta": 0.5, "accuracy": 1 / 3, "likelihood_accuracy": 2 / 3,
        "margin": pytest.approx(1 / 3), "reward_chosen": 0, "reward_rejected": pytest.approx(-1 / 3),
        "loss": pytest.approx(loss),
        "rounded": {"accuracy": 33.3, "likelihood_accuracy": 66.7, "margin": 0.3333, "reward_chosen": 0,
                    "reward_rejected": -0.3333, "loss": round(loss, 4)},
    }  # fmt: skip
    assert preference.table(scores)[1][:3] == ("3", "33.3", "66.7")
    far = preference.score(ROWS[:1], {"a": logps(-9000, 0, 0, 0)}, beta=1.0)
    assert far["loss"] == 9000


def test_a_file_of_pairs_is_read_and_bad_rows_are_listed(tmp_path):
    path = tmp_path / "pairs.jsonl"
    line = '{"id": "%s", "image": "scene:1", "prompt": "?", "chosen": "A dog."%s}\n'
    path.write_text(line % ("a", ', "rejected": "A cat."'))
    assert preference.questions(path)[0]["rejected"] == "A cat."
    path.write_text(line % ("a", "") + line % ("b", ', "rejected": 3'))
    with pytest.raises(BadInput, match=r"pairs.jsonl:1.*(?s:.*)pairs.jsonl:2"):
        preference.questions(path)


@pytest.mark.parametrize("image", ["1.png", ["1.png", "scene:2"], ["scene:1", "scene:2"]])
def test_the_images_of_a_file_of_pairs_start_at_its_folder(tmp_path, image):
    open_image("scene:1").save(tmp_path / "1.png")
    write_jsonl(tmp_path / "pairs.jsonl", [{**ROWS[0], "image": image, "context": "A room."}])
    args = evaluate.read_arguments(["--benchmark", "preference", "--data", str(tmp_path / "pairs.jsonl"),
                                    "--reference", str(DEFAULT_MODEL)])
    ((_, said, result),) = evaluate.run(args)
    assert list(said) == ["a"] and result["scores"]["ties"] == 1  # the reference is the model itself


def test_texts_that_cannot_be_scored_are_named_before_any_work(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", [{**ROWS[0], "chosen": "A </s> dog."}, {**ROWS[1], "rejected": "<s>"}])
    with pytest.raises(BadInput, match=r"record 'a': 'chosen': .*</s>(?s:.*)record 'b': 'rejected': .*<s>"):
        evaluate.run(evaluate.read_arguments(["--benchmark", "preference", "--data", str(tmp_path / "pairs.jsonl")]))
