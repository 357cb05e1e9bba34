"""BDHS: hidden image tokens, completions that share a prompt, sentences and cuts, Algorithm 1."""

import random
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import small
import torch

from data.processor import Processor
from data.scene_text import CAPTION_PROMPT, caption
from data.scenes import PAIRS, reference, sample_scene
from data.sentences import sentence_end, split_sentences
from model.attention import SharedPrefix
from model.checkpoint import DEFAULT_MODEL, load_llava
from model.generate import _predict, _uniforms, generate, pick
from pairs.bdhs import Attempt, Cut, algorithm_1, bdhs_pairs, close, complete, cut_sentences, draw_mask, swap_answer

NEVER = 999  # an EOS id that is never drawn
PROMPTS = [list(small.prompt(*range(7, 7 + n))) for n in (3, 1, 5)]
STARTS = [[[21, 22, 23], [], [24]], [[25, 26]], [[], [27, 28, 29, 30, 31]]]
SEEDS = [11, 12, 13]
STEPS = 20


@pytest.fixture(scope="module")
def model(llava_folder):
    return load_llava(llava_folder)


@pytest.fixture(scope="module")
def pictures():
    return small.views(3)


class Plain:
    """Causal attention written out for one sequence, some keys hidden from every query."""

    skip = 0

    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden  # (T,)

    def __call__(self, layer, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril() & ~self.hidden
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def mask_of(prompt: list[int], every: int) -> torch.Tensor:
    """Hide each `every`-th image token but the first."""
    hidden = torch.tensor(prompt) == small.IMAGE_TOKEN
    return hidden & (hidden.cumsum(0) % every == 0)


@torch.no_grad()
def naive(model, view, prompt, start, hidden=None, steps=STEPS, eos_id=NEVER, choose=None) -> list[int]:
    """One answer, token by token, the whole sequence anew each time."""
    new = []
    for step in range(steps):
        ids = torch.tensor(prompt + start + new)
        flags = torch.zeros(len(ids), dtype=torch.bool)
        if hidden is not None:
            flags[: len(prompt)] = hidden
        x = model.embed(ids[: len(prompt)], model.vision_features(view.pixels), view.rows)
        x = torch.cat([x, model.language_model.model.embed_tokens(ids[len(prompt) :])])
        states = model.language_model.model(x, torch.arange(len(ids)), Plain(flags))
        row = model.language_model.lm_head(states[-1])
        row[model.config.image_token_index] = float("-inf")  # no word
        token = int(row.argmax()) if choose is None else choose(row, step)
        if token == eos_id:
            break
        new.append(token)
    return new


def heads(model, *args, **kwargs) -> torch.Tensor:
    """What the head is given while `generate` runs, all steps one after another."""
    seen = []
    with patch("model.generate._predict", lambda model, states: (seen.append(states), _predict(model, states))[1]):
        generate(model, *args, eos_id=NEVER, max_new_tokens=6, **kwargs)
    return torch.cat(seen)


# ------------------------------------------------------------------------------------- generate: starts, hidden, stop


@pytest.mark.parametrize("every", [None, 1, 2])
def test_beginnings_equal_single_answers(model, pictures, every):
    """Three, one and two answers that begin with 0 to 5 tokens: each as if written alone, with and without a mask."""
    hidden = None if every is None else [mask_of(prompt, every) for prompt in PROMPTS]
    ours = generate(model, pictures, PROMPTS, starts=STARTS, hidden=hidden, eos_id=NEVER, max_new_tokens=STEPS)
    for i, prompt in enumerate(PROMPTS):
        alone = [naive(model, pictures[i], prompt, start, hidden and hidden[i]) for start in STARTS[i]]
        assert ours[i] == alone


def test_beginnings_with_ends(model, pictures):
    """Every token that ends some answers early: answers leave one by one, and the others are not disturbed."""
    free = [[naive(model, pictures[i], PROMPTS[i], s, steps=28) for s in STARTS[i]] for i in range(3)]
    flat = [answer for group in free for answer in group]
    tried = 0
    for eos_id in range(small.VOCAB):
        ends = sorted(a.index(eos_id) if eos_id in a else 28 for a in flat)
        if ends[2] < 8 and ends[-1] > 16:
            ours = generate(model, pictures, PROMPTS, starts=STARTS, eos_id=eos_id, max_new_tokens=28)
            assert ours == [[a[: a.index(eos_id)] if eos_id in a else a for a in group] for group in free]
            tried += 1
    assert tried


def test_beginnings_are_sampled_from_their_own_streams(model, pictures):
    """Answer j of a prompt: stream (seed, j), whatever the others of the batch are."""
    settings = dict(eos_id=NEVER, max_new_tokens=10, temperature=0.8, top_p=0.95)
    hidden = [mask_of(prompt, 2) for prompt in PROMPTS]
    ours = generate(model, pictures, PROMPTS, starts=STARTS, hidden=hidden, seeds=SEEDS, **settings)
    for i in (0, 2):
        assert ours[i : i + 1] == generate(model, pictures[i : i + 1], PROMPTS[i : i + 1], starts=STARTS[i : i + 1],
                                           hidden=hidden[i : i + 1], seeds=SEEDS[i : i + 1], **settings)
    u = _uniforms([11], 3, 10)
    for j in range(3):
        def choose(row, step):
            return int(pick(row[None], 0.8, 0.95, u[j, step : step + 1])[0])

        assert ours[0][j] == naive(model, pictures[0], PROMPTS[0], STARTS[0][j], hidden[0], 10, choose=choose)


def test_nothing_hidden_is_bit_equal_to_no_mask(model, pictures):
    none = [torch.zeros(len(prompt), dtype=torch.bool) for prompt in PROMPTS]
    plain = heads(model, pictures, PROMPTS, starts=STARTS)
    assert torch.equal(heads(model, pictures, PROMPTS, starts=STARTS, hidden=none), plain)


def test_everything_hidden_is_independent_of_the_picture(model, pictures):
    """Bit for bit, in every step. One visible token makes a difference."""
    masks = [mask_of(prompt, 1) for prompt in PROMPTS]
    one = heads(model, pictures, PROMPTS, starts=STARTS, hidden=masks)
    assert torch.equal(heads(model, pictures[::-1], PROMPTS, starts=STARTS, hidden=masks), one)
    masks[1][PROMPTS[1].index(small.IMAGE_TOKEN)] = False
    a, b = (heads(model, v, PROMPTS, starts=STARTS, hidden=masks) for v in (pictures, [*pictures[:1], *pictures[:2]]))
    rows = torch.tensor([0, 1, 2, 4, 5])  # of the other two prompts
    assert torch.equal(a[rows], b[rows]) and not torch.equal(a[3], b[3])


def test_positions_do_not_move(model, pictures):
    """Hiding all nine image tokens is not the same as leaving them out: what follows keeps its position.
    With the gap put back by hand, it is the same."""
    prompt = PROMPTS[0]
    text = [t for t in prompt if t != small.IMAGE_TOKEN]
    places = torch.tensor([i for i, t in enumerate(prompt) if t != small.IMAGE_TOKEN])
    decoder = model.language_model.model
    with torch.no_grad():
        states = [decoder(decoder.embed_tokens(torch.tensor(text)), positions, Plain(torch.zeros(len(text)).bool()))[-1]
                  for positions in (places, torch.arange(len(text)))]
    ours = heads(model, pictures[:1], [prompt], hidden=[mask_of(prompt, 1)])[0]
    assert (ours - states[0]).abs().max() < 1e-5 < 1e-2 < (ours - states[1]).abs().max()


def test_a_prompt_may_begin_with_hidden_tokens(model, pictures):
    """Hidden tokens before the first visible one: the heads are those of the visible tokens alone at their positions,
    also where nothing but the last token is visible, and nothing is NaN."""
    image = [small.IMAGE_TOKEN] * small.PATCHES
    prompts, decoder = [[*image, 2, 7, 8], [*image, 2], [*image, 2, 9]], model.language_model.model
    hidden = [torch.tensor([i < n for i in range(len(p))]) for p, n in zip(prompts, (4, 9, 9))]
    starts = [[[], [5, 6]], [[7]], [[8, 9, 10]]]
    ours = iter(heads(model, pictures, prompts, starts=starts, hidden=hidden)[:4])
    for view, prompt, flags, group in zip(pictures, prompts, hidden, starts):
        with torch.no_grad():
            x = model.embed(torch.tensor(prompt), model.vision_features(view.pixels), view.rows)
        for start in group:
            with torch.no_grad():
                whole = torch.cat([x[~flags], decoder.embed_tokens(torch.tensor(start, dtype=torch.long))])
                places = [i for i in range(len(prompt) + len(start)) if i >= len(prompt) or not flags[i]]
                expected = decoder(whole, torch.tensor(places), Plain(torch.zeros(len(places)).bool()))[-1]
            torch.testing.assert_close(next(ours), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_with_hidden_tokens_is_finite(dtype):
    """Padding and hidden tokens have a key, too: none of them gives NaN to what they share the batch with."""
    rule = SharedPrefix([4, 3], [[], [2, 1]], hidden=[torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 1, 0]).bool()])
    q, k, v = (torch.randn(4 + 3 + 3, 2, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    y = rule(0, q, k, v)
    y.sum().backward()
    assert all(x.isfinite().all() for x in (y, q.grad, k.grad, v.grad))


@pytest.mark.parametrize("flags", [[0, 0, 0, 0, 1], [0, 1, 0]])
def test_hidden_flags_that_do_not_fit(flags):
    with pytest.raises(ValueError, match="prefix 0: need 5 flags"):
        SharedPrefix([5], [[]], hidden=[torch.tensor(flags).bool()])


@pytest.mark.parametrize("starts", [[], [[]], [[[]], [[]]]])
def test_every_prompt_needs_a_beginning(model, pictures, starts):
    with pytest.raises(ValueError, match="at least one beginning of a response"):
        generate(model, pictures[:1], PROMPTS[:1], starts=starts, eos_id=NEVER)


@pytest.mark.parametrize("wanted", [3, 9])
def test_stop(model, pictures, wanted):
    """Asked every 8 steps with (prompt, answer) and the new tokens; an answer it stops is one of 8 or 16 tokens."""
    free = generate(model, pictures, PROMPTS, starts=STARTS, eos_id=NEVER, max_new_tokens=30)
    asked = []

    def stop(i, j, new):
        asked.append((i, j))
        assert new == free[i][j][: len(new)]
        return (i, j) != (2, 1) and len(new) >= wanted

    ours = generate(model, pictures, PROMPTS, starts=STARTS, eos_id=NEVER, max_new_tokens=30, stop=stop)
    length = -(-wanted // 8) * 8
    assert ours == [[answer[: 30 if (i, j) == (2, 1) else length] for j, answer in enumerate(group)]
                    for i, group in enumerate(free)]
    assert asked.count((0, 0)) == length // 8 and asked.count((2, 1)) == 3


# ----------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A dog. A cat!  Two?", ["A dog.", "A cat!", "Two?"]),
        ("It is 3.5 m long. Mr. Lee sees it, e.g. by day.", ["It is 3.5 m long.", "Mr. Lee sees it, e.g. by day."]),
        ("At 3 p.m. it rains. Then not.", ["At 3 p.m. it rains.", "Then not."]),
        ('He says "Go." She (his wife.) goes', ['He says "Go."', "She (his wife.) goes"]),
        ("1. A dog\n2. A cat.\n\nBoth sit", ["1. A dog", "2. A cat.", "Both sit"]),
        ("Wow... no. Yes", ["Wow... no.", "Yes"]),
        ("no end", ["no end"]),
    ],
)
def test_split(text, expected):
    parts = split_sentences(text)
    assert [sentence for sentence, _ in parts] == expected
    assert "".join(sentence + gap for sentence, gap in parts) == text


def test_the_end_must_be_certain():
    """ "3." may become "3.5", and "p.m. it" does not end: only a whole text ends with its last mark."""
    assert sentence_end("It is 3.", 0, whole=False) is None
    assert sentence_end("It is 3.", 0, whole=True) == 8
    assert sentence_end("It is 3.5 m. ", 0, whole=False) is None
    assert sentence_end("It is 3. I see", 0, whole=False) == 8
    assert sentence_end("Aa. Bb. C", 4, whole=False) == 7
    assert sentence_end("a cat and", 0, whole=True) == 9


@pytest.mark.parametrize(
    "text, expected",
    [("Yes, it is.", "No, it is."), ("no cat", "yes cat"), ("\n No.", "\n Yes."), ("YES!", "NO!"), ("NO!", "YES!"),
     ("Not one.", "Not one."), ("None", "None"), ("Nothing", "Nothing"), ("Now, yes.", "Now, yes."),
     ("Yesterday", "Yesterday")],
)
def test_swap(text, expected):
    assert swap_answer(text) == expected


def test_cuts():
    """4 words: each of 4 places in a quarter of 4000 draws (standard deviation 27), never behind the last word.
    Half of the leading yes are swapped, and a swapped one always stays; the context is the truth, unswapped."""
    text = "Yes, a b cc. Aa bb cc dd."
    cuts = [cut_sentences(text, np.random.default_rng(seed)) for seed in range(4000)]
    firsts = [cut[1].first for cut in cuts]
    counts = [firsts.count(first) for first in ("", "Aa", "Aa bb", "Aa bb cc")]
    assert sum(counts) == 4000 and all(880 < count < 1120 for count in counts)
    assert all(cut[1].before == "Yes, a b cc. " and cut[0].before == "" for cut in cuts)
    swapped = [cut[0].first for cut in cuts if cut[0].first.startswith("No")]
    assert 1880 < len(swapped) < 2120
    assert set(swapped) == {"No", "No,", "No, a", "No, a b"}
    assert 880 / 2 < swapped.count("No,") < 1120 / 2
    assert {cut[0].first for cut in cuts} - set(swapped) == {"", "Yes,", "Yes, a", "Yes, a b"}
    assert cut_sentences("Yes.", np.random.default_rng(1), swap=1.0) == [Cut("", "No", "Yes.", "")]
    assert cut_sentences("Yes.", np.random.default_rng(1), swap=0.0) == [Cut("", "", "Yes.", "")]


@pytest.mark.parametrize(
    "sentence, original, expected",
    [
        ('It says "Go to Hill.', 'It says "Telephone Hill."', 'It says "Go to Hill."'),
        ('It says "Go."', 'It says "Stop."', 'It says "Go."'),
        ("It is red.", 'It says "Stop."', "It is red."),
        ("A (small dog.", "A (large cat.)", "A (small dog.)"),
        ('A "b" (c.', "A (b).", 'A "b" (c.'),
    ],
)
def test_closing_marks(sentence, original, expected):
    assert close(sentence, original) == expected


# ---------------------------------------------------------------------------------------------------- Algorithm 1


RECORDS = [{"id": f"r{i}", "image": f"{i}.png", "prompt": "Q", "chosen": f"Yes, it is {i}. A cat sits. A dog runs."}
           for i in range(3)]


def run(written, score=lambda text: 0.5, records=RECORDS, **options):
    """`algorithm_1` with a writer (attempt, iteration) -> text; returns its result and the attempts of each iteration."""
    seen = []

    def complete(attempts):
        seen.append(attempts)
        return [written(attempt, len(seen)) for attempt in attempts]

    def similarity(left, right):
        assert set(left) <= {record["chosen"] for record in records}
        return [score(text) for text in right]

    return *algorithm_1(records, complete, similarity, **options), seen


def test_accepts_the_first_that_differs_enough():
    """r0 at once; r1 is .98, then .97 (not below), then .96; r2 never: the fifth attempt counts whatever it is."""
    scores = {"r1": iter([0.98, 0.97, 0.96])}
    queue = []

    def written(attempt, iteration):
        name = f"r{attempt.image[0]}"
        queue.append(0.1 if name == "r0" else 0.99 if name == "r2" else next(scores["r1"]))
        return f"{name} in {iteration}"

    pairs, dropped, seen = run(written, lambda text: queue.pop(0), seed=4, source={"model": "m"})
    assert [pair["id"] for pair in pairs] == ["r0", "r1", "r2"] and not dropped
    assert [pair["rejected"] for pair in pairs] == ["r0 in 1", "r1 in 3", "r2 in 5"]
    assert [pair["source"]["iteration"] for pair in pairs] == [1, 3, 5]
    assert [pair["source"]["guided"] for pair in pairs] == [True, True, False]
    assert [len(attempts) for attempts in seen] == [3, 2, 2, 1, 1]
    assert pairs[1]["source"] == {"method": "bdhs", "model": "m", "seed": 4, "rho": 0.99, "iteration": 3,
                                  "guided": True, "similarity": 0.96, "text": None}
    assert pairs[0]["chosen"] == RECORDS[0]["chosen"] and pairs[0]["rejected_image"] is None


def test_only_the_last_of_several_is_free():
    """Four guided attempts with three sentences each and new cuts and seeds, then one without cuts."""
    *_, seen = run(lambda attempt, i: "alike", lambda text: 1.0, records=RECORDS[:1])
    attempts = [attempt for (attempt,) in seen]
    assert [len(attempt.cuts) for attempt in attempts] == [3, 3, 3, 3, 0]
    assert len({attempt.seed for attempt in attempts}) == 5
    assert len({tuple(attempt.cuts) for attempt in attempts}) == 5
    pairs, _, seen = run(lambda attempt, i: "alike", lambda text: 1.0, iterations=1)
    assert len(seen) == 1 and all(attempt.cuts for attempt in seen[0])
    assert [pair["source"]["guided"] for pair in pairs] == [True] * 3


def test_unfinished_empty_and_equal_texts():
    """They are tried again, and dropped when the last attempt is no better."""
    def written(attempt, iteration):
        return {"0": None, "1": "", "2": RECORDS[2]["chosen"]}[attempt.image[0]]

    pairs, dropped, seen = run(written, iterations=3)
    assert pairs == [] and len(seen) == 3 and [len(attempts) for attempts in seen] == [3, 3, 3]
    assert dropped == {"not finished within the token limit": 1, "an empty response": 1, "same as the chosen response": 1}
    pairs, dropped, _ = run(lambda attempt, i: None if i < 3 else "at last")
    assert [pair["source"]["iteration"] for pair in pairs] == [3] * 3 and not dropped
    records = [*RECORDS[:1], {**RECORDS[1], "chosen": " "}]
    assert run(lambda attempt, i: "new", records=records)[1] == {"nothing chosen": 1}
    assert run(lambda attempt, i: "new", records=[])[0] == []


def test_without_another_object_it_is_tried_again_and_dropped():
    said = lambda attempt, i: "A dog runs." if attempt.image == "0.png" or i < 2 else "A horse runs."  # noqa: E731
    pairs, dropped, _ = run(said, iterations=3, differ=True)
    assert [(pair["id"], pair["source"]["iteration"]) for pair in pairs] == [("r1", 2), ("r2", 2)]
    assert dropped == {"names no other object than the chosen response": 1} and len(run(said)[0]) == 3


def test_draws_depend_on_the_record_and_the_seed_only():
    forward, backward, other = (run(lambda a, i: "new", records=records, seed=seed)[2][0]
                                for records, seed in ((RECORDS, 0), (RECORDS[::-1], 0), (RECORDS, 1)))
    assert forward == backward[::-1] and all(a != b for a, b in zip(forward, other))


@pytest.mark.parametrize("options", [dict(rho_th=1.5), dict(rho_th=-0.1), dict(iterations=0)])
def test_settings_out_of_range(options):
    with pytest.raises(ValueError, match="rho_th"):
        run(lambda attempt, i: "new", **options)


def test_masks():
    """2000 image tokens at .9: 200 visible (standard deviation 13); 0 hides none, 1 all; text is never hidden."""
    prompt = [1, 5, *[64] * 2000, 7, 8]
    hidden = draw_mask(prompt, 64, 0.9, np.random.default_rng(0))
    assert hidden.shape == (2004,) and not hidden[[0, 1, -2, -1]].any() and 1740 < hidden.sum() < 1860
    assert draw_mask(prompt, 64, 0.0, np.random.default_rng(0)).sum() == 0
    assert draw_mask(prompt, 64, 1.0, np.random.default_rng(0)).sum() == 2000
    assert not torch.equal(hidden, draw_mask(prompt, 64, 0.9, np.random.default_rng(1)))


def test_some_image_tokens_stay_visible():
    """Those of the largest rho: what a lower rho_th shows first. More than there are: all."""
    prompt, mask = [1, *[64] * 50, 7], lambda rho, **more: draw_mask(prompt, 64, rho, np.random.default_rng(0), **more)
    assert mask(1.0).sum() == 50 and mask(1.0, visible=6).sum() == 44 and mask(1.0, visible=60).sum() == 0
    lower = np.sort(np.random.default_rng(0).random(50))[-6]
    assert torch.equal(mask(1.0, visible=6), mask(lower)) and torch.equal(mask(0.5, visible=6), mask(0.5))


# ----------------------------------------------------------------------------------------------- the embedded model


@pytest.fixture(scope="module")
def tiny():
    return load_llava(DEFAULT_MODEL), Processor(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def scenes():
    return [{"id": f"scene-{seed}", "image": reference(seed), "prompt": CAPTION_PROMPT,
             "chosen": caption(sample_scene(seed), random.Random(seed))} for seed in range(PAIRS, PAIRS + 5)]


def words_shared(left: list[str], right: list[str]) -> list[float]:
    pairs = [(set(a.split()), set(b.split())) for a, b in zip(left, right)]
    return [len(a & b) / len(a | b) for a, b in pairs]


def test_real_completions(tiny, scenes):
    """Independent of the batch; every sentence begins as its ground truth does, at least with the word it was cut at;
    and the mode of the model is what it was."""
    model, processor = tiny
    model.train()
    runs = [bdhs_pairs(scenes, model, processor, words_shared, size, eps_s=0.8)
            for size in (1, 3)]
    assert model.training and runs[0] == runs[1] and len(runs[0][0]) >= 4
    model.eval()
    for pair in runs[0][0]:
        assert pair["rejected"] != pair["chosen"] and pair["rejected"].strip() == pair["rejected"]
        if pair["source"]["guided"]:
            assert pair["source"]["similarity"] < 0.8


def test_greedy_without_a_mask_is_what_the_model_writes(tiny, scenes):
    """rho_th = 0: each sentence is the continuation that `generate` gives for prompt and beginning in one string."""
    model, processor = tiny
    cuts = cut_sentences(scenes[0]["chosen"], np.random.default_rng(3))
    attempt = Attempt(scenes[0]["image"], CAPTION_PROMPT, cuts, 0.0, 5)
    (text,) = complete([attempt], model, processor, temperature=0)
    expected = []
    for cut in cuts:
        begun = (cut.before + cut.first).rstrip()
        ids = processor.prompt(CAPTION_PROMPT) + processor.opening(begun)
        ((new,),) = generate(model, [processor.image(attempt.image)], [ids], eos_id=processor.eos_id)
        whole = processor.decode(processor.opening(begun) + new)
        rest = whole[len(cut.before) :] if cut.before else whole
        expected.append(rest[: rest.index(".") + 1] if "." in rest else rest)  # or the end of the answer
    assert text == " ".join(filter(None, expected))


def test_what_stays_visible_is_seen(tiny, scenes):
    """All of the 64 image tokens hidden but all kept: as with none hidden; the records say how many are kept."""
    kept, all_seen, blind = ([pair["rejected"] for pair in bdhs_pairs(scenes[:2], *tiny, words_shared, **options)[0]]
                             for options in (dict(rho_th=1.0, visible=64), dict(rho_th=0.0), dict(rho_th=1.0)))
    assert kept == all_seen != blind and len(kept) == 2
    (pair,), _ = bdhs_pairs(scenes[:1], *tiny, words_shared, visible=6)
    assert (pair["source"]["rho"], pair["source"]["visible"]) == (0.99, 6)


def test_a_sentence_cut_at_the_limit_is_not_finished(tiny, scenes):
    pairs, dropped = bdhs_pairs(scenes[:2], *tiny, words_shared, max_new_tokens=2, iterations=2)
    assert pairs == [] and dropped == {"not finished within the token limit": 2}


def test_noise(tiny, scenes):
    """Instead of the mask: called with the picture at its own size and another seed in each iteration."""
    seeds = []

    def noise(image, seed):
        seeds.append(seed)
        assert image.mode == "RGB"
        return image.point(lambda value: 255 - value)

    settings = dict(rho_th=0.0, eps_s=-1.0, iterations=2)
    write = partial(complete, model=tiny[0], processor=tiny[1], noise=noise, temperature=0)
    noisy = algorithm_1(scenes[:2], write, words_shared, **settings)[0]
    clear = bdhs_pairs(scenes[:2], *tiny, words_shared, temperature=0, **settings)[0]
    assert len(set(seeds)) == 4 and [p["rejected"] for p in noisy] != [p["rejected"] for p in clear]
