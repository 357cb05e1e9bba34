"""One step of train.py on paper: rate, clipping, weights, what is scored (the policy is tests/table.py's)."""

import math

import pytest
import table
import torch
from table import CATS, DOG, EOS, TWO, A, Words, by_token, make_run, one_step, records

import results
import train
from data.batch import collate
from model.logprobs import SelectedLogProbs
from model.training import learning_rate


def pairs(run: train.Run, *answers: tuple[list[int], list[int]], weights: list[float] | None = None):
    """A batch of (chosen, rejected) token ids."""
    rows = [record | {"chosen": chosen, "rejected": rejected}
            for record, (chosen, rejected) in zip(records(*(f"r{i}" for i in range(len(answers)))), answers)]
    rows = [row | {"weight": weight} for row, weight in zip(rows, weights)] if weights else rows
    return collate(rows, run.recipe.sequences, Words())


def test_the_rate_rises_in_warm_up_and_falls_as_a_cosine():
    """10 steps, 4 of them warm-up: quarters up to 1, then (1 + cos(pi t / 6)) / 2 for t = 0 .. 5."""
    falling = [1, (1 + math.sqrt(3) / 2) / 2, 0.75, 0.5, 0.25, (1 - math.sqrt(3) / 2) / 2]
    assert [learning_rate(8.0, step, 10, 4) for step in range(10)] == pytest.approx(
        [2, 4, 6, 8, *(8 * share for share in falling)])
    assert learning_rate(8.0, 0, 10, 1) == 8


@pytest.mark.parametrize("steps, warmup, expected", [(10, 0.4, 4), (10, 0.0, 1), (4, 0.5, 2)])
def test_warm_up_is_a_share_of_the_steps_and_never_none(monkeypatch, tmp_path, steps, warmup, expected):
    """Without one the first step, like the second, is at the peak; the optimiser gets the rate."""
    run, asked = make_run("dpo", "--lr", "8", "--warmup", str(warmup)), []
    monkeypatch.setattr(train, "learning_rate", lambda *args: asked.append(args) or 0.5)
    monkeypatch.setattr(train, "StopRequest", lambda world: None)  # no signal handlers: the step below is cut short
    monkeypatch.setattr(train, "load_micro_batches", lambda *_: iter([]))
    run.args.steps, run.args.out, run.args.micro_batch_size = steps, tmp_path, 16
    with pytest.raises(StopIteration):
        train.train(run)
    assert asked == [(8, 0, steps, expected, "cosine")] and run.policy.optimizer.param_groups[0]["lr"] == 0.5


def test_the_gradient_is_clipped_once_over_all_micro_batches(monkeypatch, tmp_path):
    """beta 2 at policy = reference: d loss / d log pi is -1 for chosen and +1 for rejected, halved by two
    micro-batches.

    -.5, .5, -.5, .5 has norm 1, clipped to .5: with rate 1 the log-probs move by .25. A second step of the same
    size: nothing is left over from the first.
    """
    run = make_run("dpo", "--beta", "2", "--clip-norm", "0.5")
    run.policy.plain.logps.data = torch.tensor(table.REFERENCE)
    _, line = one_step(monkeypatch, tmp_path, run, pairs(run, ([A], [DOG])), pairs(run, ([TWO], [CATS])))
    assert line["grad_norm"] == pytest.approx(1) and line["lr"] == 1
    by_token(run.policy.plain.logps - torch.tensor(table.REFERENCE), a=0.25, dog=-0.25, two=0.25, cats=-0.25)
    assert all(p.grad is None or not p.grad.any() for p in run.policy.trained.values())


def test_a_useless_pair_leaves_the_others_their_share(monkeypatch, tmp_path):
    """Weights 1 and 0 of two pairs: half the gradient of a pair alone, not all of it."""
    run = make_run("dpo", "--beta", "2")
    run.policy.plain.logps.data = torch.tensor(table.REFERENCE)
    _, line = one_step(monkeypatch, tmp_path, run, pairs(run, ([A], [DOG]), ([TWO], [CATS]), weights=[1.0, 0.0]))
    by_token(run.policy.plain.logps - torch.tensor(table.REFERENCE), a=0.5, dog=-0.5)
    assert line["used"] == 0.5


def test_policy_and_reference_are_not_swapped(monkeypatch, tmp_path):
    """a against dog: log-ratios .5 and -.5, at beta 1 the margin is 1."""
    run = make_run("dpo", "--beta", "1")
    inputs, line = one_step(monkeypatch, tmp_path, run, pairs(run, ([A], [DOG])))
    assert (inputs["policy_chosen_logps"].item(), inputs["reference_chosen_logps"].item()) == (-1, -1.5)
    assert inputs["chosen_mask"].tolist() == [[True]]
    assert line["loss"] == pytest.approx(math.log(1 + math.exp(-1)))


def test_changed_tokens_are_those_of_their_own_answer(monkeypatch, tmp_path):
    """"a dog </s>" against "two cats dog </s>": changed is "a", and "two cats". With gamma 3 and beta 1

        s = [3 (.5) - .5 + 1] / (3 + 2) = .4 for chosen, [3 (0 + 2) - .5 + 1] / (6 + 2) = .8125 for rejected
    """
    run = make_run("dpo_weighted", "--beta", "1", "--gamma", "3")
    inputs, line = one_step(monkeypatch, tmp_path, run, pairs(run, ([A, DOG, EOS], [TWO, CATS, DOG, EOS])))
    assert inputs["chosen_changed"].tolist() == [[True, False, False, False]]
    assert inputs["rejected_changed"].tolist() == [[True, True, False, False]]
    assert inputs["chosen_mask"].tolist() == [[True, True, True, False]] and inputs["rejected_mask"].all()
    assert line["margin"] == pytest.approx(0.4 - 0.8125)
    assert line["loss"] == pytest.approx(math.log(1 + math.exp(0.4125)))


def test_a_competitor_is_the_best_token_other_than_the_label():
    """Probabilities .5, .3, .2: the rival of the first token is the second, of the others the first."""
    logits, labels = torch.tensor([0.5, 0.3, 0.2]).log().repeat(4, 1), torch.tensor([0, 1, 2, 0])
    flags = torch.tensor([True, True, True, False])
    found = SelectedLogProbs.apply(logits, torch.eye(3), labels, flags)
    torch.testing.assert_close(found.exp(), torch.tensor([0.3, 0.5, 0.5, 0.5]))


def test_accuracy_of_a_reward_model_counts_chosen_answers_with_more():
    """Rewards are those of the first token; of five pairs three are right, one is equal and one is wrong: 60 %."""
    run = make_run("reward_model", "--micro-batch-size", "2")
    worth = torch.tensor(table.LOGPS)  # a -1, dog -1, two -2, cats -1
    firsts = []

    def reward(packed, features):
        rows = packed.labels.split(packed.lengths)
        assert all(row[-1] == row[-2] == EOS for row in rows)  # read at the end token, which is there twice
        firsts.append(len(rows))
        return torch.stack([worth[row[0]] for row in rows])

    run.policy.scorer = reward
    held = [row | {"chosen": chosen, "rejected": rejected} for row, (chosen, rejected) in zip(
        records("r0", "r1", "r2", "r3", "r4"),
        [("a", "two"), ("dog", "two"), ("cats", "two"), ("a", "dog"), ("two", "a")])]
    assert results.measure_rewards(run, held) == {"accuracy": 60}
    assert firsts == [4, 4, 2]
