"""Reinforcement on paper: two answers from the sampler to the moved parameters, for PPO, RLOO and FiSAO.

The policy is a table (tests/table.py). Its two answers, the second cut off at the token limit:

    y1            a     dog   </s>        y2            two   cats
    log pi       -1     -1    -1          log pi       -2     -1
    log pi_ref   -1.5   -0.5  -2          log pi_ref   -2     -3
    difference    0.5   -0.5   1   = 1    difference    0      2   = 2 nats
    V            -3     -0.3  -1.5        V            -1.4   -4
"""

import json
import math
from types import SimpleNamespace

import pytest
import small
import table
import torch
from table import CATS, DOG, EOS, HOT, TWO, A, Notes, Words, by_token, judge, make_run, records

import reinforce
import train
from common import BadInput
from judges import words as verifier
from model.logprobs import Scorer, Sequence, pack
from model.views import stack
from pairs import online

Y1, Y2 = [A, DOG, EOS], [TWO, CATS]
ONE_PICTURE = (["r0"], [[Y1, Y2]])  # both answers to one record
TWO_PICTURES = (["r0", "r1"], [[Y1], [Y2]])  # one to each
MARKS = judge({(r, text): mark for r in ("r0", "r1") for text, mark in (("a dog", 8.0), ("two cats", 2.0))})


def close(found: torch.Tensor, *expected) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=0, atol=2e-6)


def memory() -> reinforce.Memory:
    """Scores of the untrained model: 8 is worth (8 - 4) / 2 = 2, 2 is worth -1. The coefficient was adapted."""
    return reinforce.Memory(mean=4.0, std=2.0, kl_coef=0.5)


def rolled(run: train.Run, names: list[str], answers: list) -> reinforce.Rollout:
    return reinforce.roll_out(run.policy.plain, run.policy.reference, records(*names), answers, run.processor)


def learn(run: train.Run, rollouts: list[reinforce.Rollout]):
    """What the chosen loss makes of them, with the run's own options: targets and metrics."""
    return run.recipe.advantages(rollouts, run.learner.parts, run.learner.memory, **run.judges)


@pytest.fixture
def readable(monkeypatch):
    """All pictures can be opened."""
    monkeypatch.setattr(reinforce, "check_image", lambda record, root: None)


def saying(monkeypatch, answers: dict[str, list[list[int]]]) -> list[dict]:
    """Let the sampler say these, by record. Returns what it was asked with."""
    asked = []

    def sample(model, processor, rows, seeds, root, **options):
        asked.append({"ids": [row["id"] for row in rows], "seeds": seeds, **options})
        return [answers[row["id"]] for row in rows]

    monkeypatch.setattr(online, "sample", sample)
    return asked


# ---- from answers to a rollout -----------------------------------------------------------------------------


def test_a_rollout_holds_both_policies_and_what_ended():
    r = rolled(make_run("ppo", "--judge", "clip"), *ONE_PICTURE)
    assert r.ids == [Y1, Y2] and r.texts == ["a dog", "two cats"] and r.ended.tolist() == [True, False]
    assert r.mask.tolist() == [[True, True, True], [True, True, False]]
    close(r.old, [-1, -1, -1], [-2, -1, 0])
    close(r.reference, [-1.5, -0.5, -2], [-2, -3, 0])
    close(r.values, [-3, -0.3, -1.5], [-1.4, -4, 0])
    assert not (r.old.requires_grad or r.reference.requires_grad or r.values.requires_grad)


def test_a_value_is_read_before_its_token(model, views):
    """The state that predicts token t, which has seen the prompt and the t tokens in front: by definition."""
    prompt, response = small.prompt(6, 7), (10, 11, 12)
    scorer = Scorer(model, critic=True)
    torch.nn.init.normal_(scorer.value_head.weight, generator=torch.Generator().manual_seed(0))
    pixels, rows = stack(views[:1], small.PATCHES)
    packed = pack([Sequence(0, prompt, response)], rows, small.IMAGE_TOKEN)
    _, mask, values = scorer(packed, model.vision_features(pixels))
    model.language_model.lm_head = torch.nn.Identity()  # logits() now gives states
    states = [model.logits(torch.tensor([*prompt, *response[:t]]), *views[0])[-1] for t in range(3)]
    torch.testing.assert_close(values[0], scorer.value_head(torch.stack(states))[:, 0], rtol=0, atol=1e-5)
    assert mask.tolist() == [[True] * 3] and len(set(values[0].tolist())) == 3


def test_an_end_token_is_added_only_where_one_was_drawn(monkeypatch):
    """At most 3 tokens: two words have ended, three were cut. Every record has its own picture and seed, in its place.
    """
    asked = {}
    monkeypatch.setattr(online, "generate", lambda model, views, prompts, **options: asked.update(
        options, views=len(views), prompts=prompts) or [
            [[A, DOG], [TWO, CATS, DOG]], [[], [A]], [[A], [DOG]]])
    model = torch.nn.Module().train()
    said = online.sample(model, Words(), records("r0", "r1", "r0"), [7, 8, 9], None, samples=2, temperature=0.7,
                         max_new_tokens=3)
    assert said == [[[A, DOG, EOS], [TWO, CATS, DOG]], [[EOS], [A, EOS]], [[A, EOS], [DOG, EOS]]] and model.training
    assert asked == {"views": 2, "prompts": [[1, 0]] * 3, "shows": [(0,), (1,), (0,)], "eos_id": EOS, "n": 2,
                     "questions": [()] * 3, "max_new_tokens": 3, "temperature": 0.7, "seeds": [7, 8, 9]}


# ---- PPO ---------------------------------------------------------------------------------------------------

PPO = ["--judge", "clip", "--gamma", "0.5", "--lam", "0.8", "--kl-coef", "9", "--missing-eos-penalty", "3"]


@pytest.mark.parametrize("names, answers", [ONE_PICTURE, TWO_PICTURES], ids=["one picture", "two pictures"])
def test_ppo_advantages_and_returns(names, answers):
    """beta 0.5 (9 is the option, which the adapted one overrules), gamma 0.5, lambda 0.8, no end costs 3:

        r1 = -.25, .25, -.5 + 2 = 1.5                   r2 = 0, -1 - 1 - 3 = -5
        A3 = 1.5 + 1.5 = 3                              A2 = -5 + 4 = -1
        A2 = .25 + .5 (-1.5) + .3 + .4 (3) = 1          A1 = 0 + .5 (-4) + 1.4 + .4 (-1) = -1
        A1 = -.25 + .5 (-.3) + 3 + .4 (1) = 3
        G = A + V = 0, .7, 1.5                          G = -2.4, -5

    A: mean 1, deviations 2, 0, 2, -2, -2, variance 16 / 4 = 4: whitened 1, 0, 1, -1, -1. 5 / 2 tokens an answer.
    """
    run = make_run("ppo", *PPO, judges={"judge": MARKS}, memory=memory())
    parts = [rolled(run, [name], [group]) for name, group in zip(names, answers)]
    targets, metrics = learn(run, parts)
    rows = {name: [row[mask] for target, r in zip(targets, parts) for row, mask in zip(target[name], r.mask)]
            for name in ("advantages", "returns", "old_values", "old_sampled_token_logps")}
    for name, first, second in (("advantages", (1, 0, 1), (-1, -1)), ("returns", (0, 0.7, 1.5), (-2.4, -5)),
                                ("old_values", (-3, -0.3, -1.5), (-1.4, -4)),
                                ("old_sampled_token_logps", (-1, -1, -1), (-2, -1))):
        close(rows[name][0], *first), close(rows[name][1], *second)
    assert all(target["mean_tokens"] == 2.5 for target in targets)
    assert all(target[name][~r.mask].eq(0).all() for target, r in zip(targets, parts) for name in rows)
    assert {name: value.tolist() for name, value in metrics.items()} == {
        "score": [2, -1], "kl": [1, 2], "tokens": [3, 2], "ended": [1, 0], "kl_coef": 0.5}
    assert run.learner.memory == memory()


@pytest.mark.parametrize("names, answers, minibatches, target, coefficient", [
    (*ONE_PICTURE, 1, 3.0, 0.49998), (*TWO_PICTURES, 1, 1.4, 0.5 * (1 + 0.1 / 1.4 * 2e-4)),
    (*TWO_PICTURES, 2, 0.0, 0.5)], ids=["one picture", "two pictures", "two updates"])
def test_a_step_of_ppo_moves_the_tokens_by_their_advantages(monkeypatch, names, answers, minibatches, target,
                                                            coefficient):
    """At ratio 1 the loss is -mean of A log pi over 5 tokens, and c_V = .1 times half the mean of (V - G)^2:
    with rate 1 log pi moves by A / 5 (whitened), V by .1 (G - V) / 5 = .02 (3, 1, 3, -1, -1).

    The squared gradient is 4 (.2)^2 + (.02)^2 (9 + 1 + 9 + 1 + 1) = .16 + .0084. Two updates of one answer each
    are twice as large: an answer's share of the loss is no longer halved.
    KL 1.5 against a target of 3 is -50 %, cut to -20 %, against 1.4 it is +7 %; both of 2 / 10,000 answers.
    """
    asked = saying(monkeypatch, dict(zip(names, answers)))
    run = make_run("ppo", *PPO, "--batch-size", str(len(names)), "--samples", str(2 // len(names)),
                   "--inner-epochs", "1", "--minibatches", str(minibatches), "--kl-target", str(target),
                   "--temperature", "0.7", judges={"judge": MARKS}, memory=memory())
    picked = [[(record, 10 + i)] for i, record in enumerate(records(*names))]
    norm, before = reinforce.reinforce_step(run.learner, picked, 0, notes := Notes()), table.Table(critic=True)
    n = minibatches
    by_token((run.policy.plain.logps - before.logps) / n, a=0.2, end=0.2, two=-0.2, cats=-0.2)
    by_token((run.policy.plain.values - before.values) / n, a=0.06, dog=0.02, end=0.06, two=-0.02, cats=-0.02)
    assert n > 1 or norm == pytest.approx(math.sqrt(0.1684))
    assert run.learner.memory.kl_coef == pytest.approx(coefficient, rel=1e-7)
    assert asked == [{"ids": [name], "seeds": [10 + i], "samples": 2 // len(names), "temperature": 0.7,
                      "max_new_tokens": 96} for i, name in enumerate(names)]
    assert notes.added[0]["score"].tolist() == [2, -1]


def test_the_second_time_through_the_ratio_is_clipped(monkeypatch):
    """After the first update (above) the ratios are e^.2 = 1.2214 and e^-.2 = .8187, around pi_old as before.

    Above 1.2 with A = 1 there is no gradient left; .8187 is within the clip: -.8187 / 5 more.
    V - G was -3, -1, -3, 1, 1 and is .06, .02, .06, -.02, -.02 further: V moves by .02 (2.94, .98, 2.94, -.98,
    -.98).
    """
    saying(monkeypatch, {"r0": [Y1, Y2]})
    run = make_run("ppo", *PPO, "--inner-epochs", "2", judges={"judge": MARKS}, memory=memory())
    reinforce.reinforce_step(run.learner, [[(records("r0")[0], 1)]], 0, Notes())
    start, down = table.Table(critic=True), -0.2 - math.exp(-0.2) / 5
    by_token(run.policy.plain.logps - start.logps, a=0.2, end=0.2, two=down, cats=down)
    by_token(run.policy.plain.values - start.values, a=0.1188, dog=0.0396, end=0.1188, two=-0.0396, cats=-0.0396)


def test_every_epoch_goes_through_all_rollouts_in_an_order_of_its_own(monkeypatch):
    """Answers of 1, 2 and 3 tokens; the order follows from seed, step and epoch."""
    saying(monkeypatch, {"r0": [[EOS]], "r1": [[DOG, EOS]], "r2": [Y1]})
    zero = lambda rows, answers: [[table.Score(0.0)] for _ in rows]

    def orders(step: int, *options: str) -> list[tuple]:
        run = make_run("ppo", *PPO, "--samples", "1", "--inner-epochs", "6", *options, judges={"judge": zero})
        reinforce.reinforce_step(run.learner, [[(record, 0)] for record in records("r0", "r1", "r2")], step, Notes())
        trained = [length for length, in run.policy.plain.calls[6:]]  # behind policy and reference of three rollouts
        return [tuple(trained[i : i + 3]) for i in range(0, len(trained), 3)]

    found = orders(0)
    assert len(found) == 6 and all(sorted(order) == [1, 2, 3] for order in found) and len(set(found)) > 1
    assert found == orders(0) != orders(1) and found != orders(0, "--seed", "1")


# ---- RLOO --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_of_rloo_moves_answers_by_what_the_others_got(monkeypatch, parts):
    """Two records of two answers, beta 0.5, marks 8, 2 and 8, 4 that are worth 2, -1 and 2, 0:

        a dog </s>   2 - .5 (1)  =  1.5      A =  3.5          cats </s>   2 - .5 (2 + 1)  =  .5     A =  .75
        two cats    -1 - .5 (2)  = -2        A = -3.5          dog </s>    0 - .5 (1 - .5) = -.25    A = -.75

    The loss is the mean of -A log pi over 4 answers: with rate 4 the log-prob of a token moves by the sum of the
    advantages of the answers that it is in.
    """
    said = {"r0": [Y1, Y2], "r1": [[CATS, EOS], [DOG, EOS]]}
    saying(monkeypatch, said)
    marks = judge({("r0", "a dog"): 8, ("r0", "two cats"): 2, ("r1", "cats"): 8, ("r1", "dog"): 4})
    run = make_run("rloo", "--judge", "clip", "--samples", "2", "--kl-coef", "9", judges={"judge": marks}, memory=memory(),
                   rate=4.0)
    one = [rolled(run, ["r0", "r1"], list(said.values()))]
    targets, metrics = learn(run, one)
    close(targets[0]["advantages"], 3.5, -3.5, 0.75, -0.75)
    close(targets[0]["old_sampled_logps"], -3, -3, -2, -2)
    assert {name: value.tolist() for name, value in metrics.items()} == {
        "score": [2, -1, 2, 0], "kl": [1, 2, 3, 0.5], "tokens": [3, 2, 2, 2], "ended": [1, 0, 1, 1], "kl_coef": 0.5}

    pairs = [(record, 0) for record in records("r0", "r1")]
    reinforce.reinforce_step(run.learner, [pairs] if parts == 1 else [pairs[:1], pairs[1:]], 0, Notes())
    by_token(run.policy.plain.logps - table.Table().logps, a=3.5, dog=3.5 - 0.75, end=3.5 + 0.75 - 0.75, two=-3.5,
             cats=0.75 - 3.5)


# ---- FiSAO -------------------------------------------------------------------------------------------------

VECTORS = {"v0": (1, 0), "v1": (0, 1), "dog": (0.8, 0.6), "cats": (0.6, 0.8), "cat": (1, 0), "hot dog": (0.8, 0.6),
           "a dog.": (0.6, 0.8), "Two cats!": (0, -1), "Hot.": (0.8, 0.6)}
SHOWN = {"v0": {"dog"}, "v1": {"dog", "cat"}}
BASELINES = {"correct": 180.0, "hallucinated": 170.0, "low": 70.0, "high": 230.0, "std": 20.0}


@pytest.fixture
def eyes(monkeypatch) -> verifier.Verifier:
    """The verifier with a CLIP of two dimensions; it knows dogs and cats."""
    embed = lambda names, *_, **__: torch.tensor([VECTORS[name] for name in names]).float().numpy()
    monkeypatch.setattr(verifier, "embed_texts", embed)
    monkeypatch.setattr(verifier, "embed_images", embed)
    monkeypatch.setattr(verifier, "load_entities",
                        lambda: {"dog": "dog", "cat": "cat", "cats": "cat", "hot dog": "hot dog"})
    known = lambda reference: (SHOWN[reference], {"dog", "cat"}) if reference in SHOWN else None
    return verifier.Verifier(None, None, Words(), None, known)


def test_the_verifier_scores_the_word_that_was_said_against_its_picture(eyes):
    """250 cos: (.8, .6) and (1, 0) 200, (.6, .8) and (1, 0) 150; "cats" is not read as its entity, (1, 0).

    The first picture shows a dog only; nobody looked for hot dogs.
    """
    found = eyes(["v0", "v0", "v1", "v1"], [Y1, Y2, [TWO, CATS, A, DOG], [A, HOT, DOG, EOS]])
    close(found.scores, 200, 150, 200, 150, 150)
    assert found.entities == ["dog", "cat", "cat", "dog", "hot dog"] and found.correct.tolist() == [1, 0, 1, 1, -1]
    assert (found.rows.tolist(), found.starts.tolist(), found.stops.tolist()) == (
        [0, 1, 2, 2, 3], [1, 1, 1, 3, 1], [2, 2, 2, 4, 3])


def test_what_the_verifier_says_of_sentences(eyes):
    """"a dog." and (1, 0): 150, true there; "Two cats!" and (0, 1): cos -1 counts as 0, true there, and false of
    the first picture; "Hot." names nothing."""
    texts = ["Two cats! Hot.", "a dog.", "Two cats!"]
    scores = reinforce.verifier_scores(["v1", "v0", "v0"], [Y2, Y1, Y2], texts, eyes)
    expected = {"words, correct": [200, 200], "words, hallucinated": [150],
                "sentences, correct": [0, 150], "sentences, hallucinated": [0]}
    assert scores.keys() == expected.keys()
    for name, values in scores.items():
        assert values == pytest.approx(expected[name], abs=1e-4)


def test_a_step_of_fisao_rewards_the_words_that_the_picture_bears_out(monkeypatch, eyes):
    """Both answers to both pictures; margin 10, so above 190 a score is worth (s - 180) / (230 - 180) and below
    160 (s - 170) / (170 - 70): 200 gives .4, 150 gives -.2. beta .5, gamma 1, lambda .5, no end costs .8, V = 2
    before "cats", else 0:

        a dog </s>    r = -.25, .25 + .4, -.5       G = A = -.05, .4, -.5           of the first picture
                      r = -.25, .25 - .2, -.5       G = A = -.35, -.2, -.5          of the second
        two cats      r = 0, -1 - .2 - .8 = -2      A = 2 + .5 (-4) = 0, -4         G = 0, -2
                      r = 0, -1 + .4 - .8 = -1.4    A = 2 + .5 (-3.4) = .3, -3.4    G = .3, -1.4

    Over 10 tokens, with c_V .1 and rate 100, V moves by the sum of G - V = A.
    """
    said = {"r0": [Y1, Y2], "r1": [Y1, Y2]}
    saying(monkeypatch, said)
    run = make_run("fisao", "--samples", "2", "--lam", "0.5", "--missing-eos-penalty", "0.8", "--inner-epochs", "1",
                   judges={"verifier": eyes}, memory=reinforce.Memory(kl_coef=0.5, baselines=BASELINES), rate=100.0)
    run.policy.plain.values.data = torch.tensor([2.0 * (i == CATS) for i in range(len(table.WORDS))])
    one = [rolled(run, ["r0", "r1"], list(said.values()))]
    targets, metrics = learn(run, one)
    close(targets[0]["returns"], [-0.05, 0.4, -0.5], [0, -2, 0], [-0.35, -0.2, -0.5], [0.3, -1.4, 0])
    assert targets[0]["advantages"].sum().item() == pytest.approx(0, abs=1e-5)
    rewards = {"rewarded": 1, "reward": 0.1, "reward/correct": 0.2, "reward/hallucinated": -0.2}
    # all but the cats of the first picture are there: (.4 - .2 + .4) / 3
    assert {name: metrics[name].item() for name in rewards} == pytest.approx(rewards)

    reinforce.reinforce_step(run.learner, [[(record, 0) for record in records("r0", "r1")]], 0, Notes())
    by_token(run.policy.plain.values, a=-0.4, dog=0.2, end=-1.0, two=0.3, cats=2 - 7.4)


@pytest.mark.parametrize("options, first, second", [
    (["--position", "spread"], 0.2, 0.2),  # .4 on "hot dog", half on each token
    (["--margin", "30"], 0, 0),  # 200 is not above 210
    (["--margin", "1", "--margin-unit", "std"], 0, 0),  # 20: not above 200
    (["--margin", "30", "--margin-mode", "none"], 0, 0.4),
    (["--norm", "baseline_minus_margin"], 0, 0.25),  # (200 - 190) / (230 - 190)
])
def test_options_of_fisao_reach_its_rewards(eyes, options, first, second):
    """"hot dog" scores 200 on the first picture; KL off, gamma 0: the returns are the rewards. Nobody knows whether
    it is there."""
    run = make_run("fisao", "--kl-coef", "0", "--gamma", "0", *options, judges={"verifier": eyes},
                   memory=reinforce.Memory(baselines=BASELINES))
    run.policy.plain.values.data.zero_()
    one = [rolled(run, ["r0"], [[[HOT, DOG, EOS], [EOS]]])]
    targets, metrics = learn(run, one)
    close(targets[0]["returns"], [first, second, 0], [0, 0, 0])
    assert metrics["reward/correct"] == metrics["reward/hallucinated"] == 0


# ---- calibration -------------------------------------------------------------------------------------------


def test_calibration_of_scores(monkeypatch, readable):
    """Sampled answers, as in training, in micro-batches of 2, seeds 0, 1, 2. Marks 1, 5, 9: mean 5, variance
    (16 + 0 + 16) / 2 = 16."""
    asked = saying(monkeypatch, {"r0": [Y1], "r1": [Y2], "r2": [[DOG, EOS]]})
    marks = judge({("r0", "a dog"): 1, ("r1", "two cats"): 5, ("r2", "dog"): 9})
    run = make_run("ppo", "--judge", "clip", "--temperature", "0.7", "--max-new-tokens", "5",
                   "--micro-batch-size", "2", judges={"judge": marks})
    run.records = records("r0", "r1", "r2")
    reinforce.calibrate(run.learner, run.records)
    assert run.learner.memory == reinforce.Memory(mean=5, std=4)
    same = {"samples": 1, "temperature": 0.7, "max_new_tokens": 5}
    assert asked == [{"ids": ["r0", "r1"], "seeds": [0, 1], **same}, {"ids": ["r2"], "seeds": [2], **same}]
    monkeypatch.setattr(reinforce, "CALIBRATION", 2)
    reinforce.calibrate(run.learner, run.records)
    assert run.learner.memory == reinforce.Memory(mean=3, std=pytest.approx(math.sqrt(8)))


def test_one_record_gives_no_deviation(monkeypatch, readable):
    saying(monkeypatch, {"r0": [Y1]})
    run = make_run("ppo", "--judge", "clip", "--micro-batch-size", "2", judges={"judge": judge({("r0", "a dog"): 1})})
    with pytest.raises(BadInput, match="on two records or more, not 1"):
        reinforce.calibrate(run.learner, records("r0"))


def test_calibration_of_fisao(monkeypatch, tmp_path, eyes, readable):
    """Pictures that nobody knows are left out. Scores: a dog 200 and 150, both right; cats 150, wrong, of the
    first picture, and 200, right, of the second; hot dogs, that nobody looked for, do not count.

    S_gt = 550 / 3, S_hal = 150. The baselines are of sampled answers, what is shown before and after of greedy
    ones: the first as a sentence is false, -250 cut to 0, the second true, 250.
    """
    asked = saying(monkeypatch, {"r0": [Y1 + Y2], "r1": [[DOG, TWO, CATS, HOT, DOG, EOS]]})
    run = make_run("fisao", "--temperature", "0.7", "--micro-batch-size", "8", "--out", str(tmp_path), judges={"verifier": eyes})
    run.records = records("r9", "r0", "r8", "r1")
    monkeypatch.setitem(VECTORS, "a dog two cats", (-1, 0))
    monkeypatch.setitem(VECTORS, "dog two cats hot dog", (0, 1))
    assert train.begin(run, None) == 0
    found = run.learner.memory.baselines
    assert found["correct"] == pytest.approx(550 / 3) and found["hallucinated"] == pytest.approx(150)
    assert (found["correct_mentions"], found["hallucinated_mentions"], found["unit"]) == (3, 1, "250 * max(cos, 0)")
    assert json.loads((tmp_path / "baselines.json").read_text()) == found
    assert [(call["temperature"], call["ids"], call["seeds"]) for call in asked] == [
        (0.7, ["r0", "r1"], [0, 1]), (0.0, ["r0", "r1"], [0, 1])]
    scores = run.learner.memory.scores
    assert scores["sentences, correct"] == [250] and scores["sentences, hallucinated"] == [0]


@pytest.mark.parametrize("said, options, reason", [
    ([A, DOG, EOS], [], "finds no hallucinated object word in 1 responses"),
    ([CATS, EOS], [], "finds no correct object word in 1 responses"),
    ([DOG, CATS, EOS], ["--margin-mode", "inward", "--margin", "90"], "do not suit its options: the boundaries cross"),
])
def test_baselines_that_cannot_be_measured_are_the_users_to_mend(monkeypatch, eyes, readable, said, options, reason):
    """On the first image a dog, 200, is right and cats, 150, are not. An error in the code is none of the user's."""
    saying(monkeypatch, {"r0": [said]})
    monkeypatch.setitem(VECTORS, Words().decode(said), (1, 0))
    run = make_run("fisao", "--micro-batch-size", "8", *options, judges={"verifier": eyes})
    with pytest.raises(BadInput, match=reason):
        reinforce.calibrate(run.learner, records("r0"))


def test_scores_outside_what_was_measured(monkeypatch, eyes):
    """Baselines of one hallucinated mention leave no range below it; the step says so, other errors stay errors."""
    run = make_run("fisao", judges={"verifier": eyes}, memory=reinforce.Memory(baselines=BASELINES | {"low": 170.0}))
    rollouts = [rolled(run, ["r0"], [[Y2, Y2]])]
    with pytest.raises(BadInput, match="cannot normalise from 170"):
        learn(run, rollouts)
    run.learner.parts.place = lambda *_: exec("raise ValueError('a fault')")
    run.learner.memory.baselines = BASELINES
    with pytest.raises(ValueError, match="a fault") as error:
        learn(run, rollouts)
    assert not isinstance(error.value, BadInput)


# ---- pairs made while training -----------------------------------------------------------------------------


def test_the_better_answer_is_chosen_and_seeds_stay_with_their_records(monkeypatch):
    """Marks 2, 8 and 8, 2 of finished answers: the 8 is chosen in both; what is given keeps its pair."""
    asked = saying(monkeypatch, {"r0": [[CATS, EOS], Y1], "r2": [Y1, [CATS, EOS]]})
    marks = judge({(r, text): mark for r in ("r0", "r2") for text, mark in (("a dog", 8), ("cats", 2))})
    monkeypatch.setattr(online.random, "Random", lambda seed: SimpleNamespace(
        random=lambda: {"11/alpha": 0.6, "12/alpha": 0.4, "13/alpha": 0.6}[seed]))
    rows = [row | {"chosen": "yes", "rejected": "no"} for row in records("r0", "r1", "r2")]
    made = online.mixed_pairs(rows, [11, 12, 13], None, Words(), None, marks, samples=2, temperature=0.7,
                              max_new_tokens=5)
    assert [(row["chosen"], row["rejected"], row["weight"]) for row in made] == [
        (Y1, [CATS, EOS], 1), ("yes", "no", 1), (Y1, [CATS, EOS], 1)]
    assert asked == [{"ids": ["r0", "r2"], "seeds": [11, 13], "samples": 2, "temperature": 0.7,
                      "max_new_tokens": 5}]


@pytest.mark.parametrize("eps_s, calls", [(0.4, 3), (0.6, 1)])
def test_bdhs_obeys_its_settings_online(monkeypatch, eps_s, calls):
    """Every completion has cosine .5 with the chosen answer: taken at once below eps_s, else in the last of 3."""
    asked, options = [], {}

    def complete(attempts, **given):
        options.update(given)
        return asked.extend(attempts) or ["a dog"] * len(attempts)

    monkeypatch.setattr("pairs.bdhs.complete", complete)
    rows = [row | {"chosen": "two cats", "rejected": "cats"} for row in records("r0", "r0")]
    made = online.bdhs_triples(rows, [1, 2], None, Words(), "root", lambda left, right: [0.5] * len(left),
                               rho_th=0.3, iterations=3, eps_s=eps_s, temperature=0.7, max_new_tokens=5)
    assert [attempt.rho_th for attempt in asked] == [0.3] * 2 * calls
    assert asked[0].seed != asked[1].seed  # one record twice, at the end of an epoch and in the next
    assert options.items() >= {"max_new_tokens": 5, "temperature": 0.7, "root": "root", "noise": None}.items()
    assert [(row["chosen"], row["rejected"], row["generated"], row["weight"]) for row in made] == [
        ("two cats", "cats", "a dog", 1)] * 2
