"""Generation: greedy search, sampling, batching, the cache, and the text interface."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from goldens import make
from safetensors.torch import load_file

from data.processor import Processor
from model.checkpoint import load_llava
from model.generate import CANDIDATES, Cache, NotFinite, answers, generate, pick, read, write
from model.lora import adapters_cast, add_lora, lora_layers, merge_lora
from model.views import View

NEVER = 999  # an EOS id that is never drawn
PROMPTS = [list(small.prompt(*range(7, 7 + n))) for n in (3, 1, 5, 2, 3, 8)]
SEEDS = [11, 12, 13, 14, 15, 16]


@pytest.fixture(scope="module")
def pictures() -> list[View]:
    return small.views(len(PROMPTS))


@pytest.fixture(scope="module")
def model(llava_folder):
    return load_llava(llava_folder)


def best(row: torch.Tensor, step: int) -> int:
    return int(row.argmax())


def naive(model, picture, prompt, tokens: int, eos_id: int, choose=best) -> list[int]:
    """Token by token, the whole sequence anew each time."""
    ids = list(prompt)
    for step in range(tokens):
        with torch.no_grad():
            logits = model.logits(torch.tensor(ids), picture.pixels)[-1]
            logits[small.IMAGE_TOKEN] = float("-inf")  # an image token is no word
            new = choose(logits, step)
        if new == eos_id:
            break
        ids.append(new)
    return ids[len(prompt) :]


def stopping_token(continuations: list[list[int]]) -> int:
    """A token that, taken as EOS, ends at least half of the continuations within 8 steps, and one later than
    10: then finished prompts leave the batch while others go on."""
    for token in range(small.VOCAB):
        ends = [c.index(token) if token in c else len(c) for c in continuations]
        if sum(e < 8 for e in ends) >= len(ends) / 2 and max(ends) > 10:
            return token
    raise AssertionError("no token fits; change the weights")


# ----------------------------------------------------------------------------------------------------- greedy


def test_greedy_equals_the_goldens(model):
    """The tokens that `transformers` generated, three prompts of different length in one batch."""
    golden = load_file(make.GOLDENS)
    prompts = [list(p) for p in make.PROMPTS]
    ours = generate(model, small.views(3), prompts, eos_id=NEVER, max_new_tokens=make.TOKENS)
    assert [group[0] for group in ours] == [golden[f"llava.greedy.{i}"].tolist() for i in range(3)]


def test_greedy_equals_argmax_of_naive_logits(model, pictures):
    ours = generate(model, pictures, PROMPTS, eos_id=NEVER, max_new_tokens=20)
    expected = [[naive(model, p, ids, 20, NEVER)] for p, ids in zip(pictures, PROMPTS)]
    assert ours == expected and len({tuple(group[0]) for group in ours}) == len(PROMPTS)


@pytest.mark.parametrize("cut", ["eos at once", "one token", "never"])
def test_ends(model, pictures, cut):
    first = generate(model, pictures[:1], PROMPTS[:1], eos_id=NEVER, max_new_tokens=5)[0][0]
    eos_id, tokens, expected = {
        "eos at once": (first[0], 5, []), "one token": (NEVER, 1, first[:1]), "never": (NEVER, 5, first),
    }[cut]
    assert generate(model, pictures[:1], PROMPTS[:1], eos_id=eos_id, max_new_tokens=tokens) == [[expected]]


def test_finished_prompts_leave_the_batch(model, pictures, monkeypatch):
    """With EOS at different times the batch shrinks; what remains is what each prompt gives alone."""
    free = [naive(model, p, ids, 30, NEVER) for p, ids in zip(pictures, PROMPTS)]
    eos_id = stopping_token(free)
    kept = []
    keep = Cache.keep
    monkeypatch.setattr(Cache, "keep", lambda self, prompts: (kept.append(len(prompts)), keep(self, prompts)))
    ours = generate(model, pictures, PROMPTS, eos_id=eos_id, max_new_tokens=30)
    assert ours == [[c[: c.index(eos_id)] if eos_id in c else c] for c in free]
    assert kept and kept[0] < len(PROMPTS)


def test_stops_early_when_all_are_done(model, pictures, monkeypatch):
    """EOS is asked for every 8 steps: ending in step 1 costs 8 steps, not 100."""
    first = generate(model, pictures[:1], PROMPTS[:1], eos_id=NEVER, max_new_tokens=1)[0][0][0]
    steps = []
    head = model.language_model.lm_head
    hook = head.register_forward_hook(lambda *_: steps.append(1))
    generate(model, pictures[:1], PROMPTS[:1], eos_id=first, max_new_tokens=100)
    hook.remove()
    assert len(steps) == 8


def test_one_picture_for_several_prompts(model, pictures):
    shows = [2, 0, 2]
    ours = generate(model, pictures[:3], PROMPTS[:3], shows=shows, eos_id=NEVER, max_new_tokens=8)
    assert ours == generate(model, [pictures[i] for i in shows], PROMPTS[:3], eos_id=NEVER, max_new_tokens=8)


# -------------------------------------------------------------------------------------------- read once, write often


def test_prompts_are_read_once_and_continued_in_any_selection(model, pictures):
    """Different beginnings, numbers of responses and rows, with room made before and without: each time what one call
    gives, so nothing that was written before is left in the way."""
    starts = [[[21, 22], []], [[23]], [[]], [[24, 25, 26]], [[], [], [27]], [[28]]]
    for room in (0, 200):
        prompts = read(model, pictures, PROMPTS, room=room)
        for rows, tokens in (([0, 1, 2, 3, 4, 5], 12), ([3, 0], 20), ([0, 1, 2, 3, 4, 5], 12), ([4], 3)):
            ours = write(model, prompts, [starts[row] for row in rows], rows=rows, eos_id=NEVER, max_new_tokens=tokens)
            expected = generate(model, [pictures[row] for row in rows], [PROMPTS[row] for row in rows],
                                starts=[starts[row] for row in rows], eos_id=NEVER, max_new_tokens=tokens)
            assert ours == expected


# --------------------------------------------------------------------------------------------------- sampling


def sample(model, pictures, prompts, seeds, **options) -> list[list[list[int]]]:
    settings = dict(eos_id=NEVER, max_new_tokens=30, temperature=0.8, top_p=0.95, seeds=seeds) | options
    return generate(model, pictures, prompts, **settings)


def test_batch_composition_does_not_matter(model, pictures):
    """All together, one at a time, and in another order: the same samples."""
    free = sample(model, pictures, PROMPTS, SEEDS)
    eos_id = stopping_token([group[0] for group in free])
    together = sample(model, pictures, PROMPTS, SEEDS, eos_id=eos_id)
    assert len({len(group[0]) for group in together}) > 2
    for order in ([0], [1], [2], [3], [4], [5], [4, 1, 0]):
        prompts, seeds = [PROMPTS[i] for i in order], [SEEDS[i] for i in order]
        part = sample(model, [pictures[i] for i in order], prompts, seeds, eos_id=eos_id)
        assert part == [together[i] for i in order]


def test_several_answers_share_a_prefix_and_nothing_else(model, pictures, monkeypatch):
    """n = 4 equals n = 2 for the first two answers, a longer limit only appends, and the answers differ."""
    free = sample(model, pictures, PROMPTS, SEEDS, n=4)
    eos_id = stopping_token([min(group, key=lambda c: -len(c)) for group in free])
    four = sample(model, pictures, PROMPTS, SEEDS, n=4, eos_id=eos_id)
    two = sample(model, pictures, PROMPTS, SEEDS, n=2, eos_id=eos_id)
    longer = sample(model, pictures, PROMPTS, SEEDS, n=4, eos_id=eos_id, max_new_tokens=40)
    assert [group[:2] for group in four] == two
    assert [[answer[:30] for answer in group] for group in longer] == four
    assert all(len(set(map(tuple, group))) > 1 for group in four)


def test_n_answers_equal_n_single_ones(model, pictures):
    """Each answer of a prompt, drawn naively from its own stream of random numbers."""
    from model.generate import _uniforms

    n, steps = 3, 12
    streams = _uniforms(SEEDS[:2], n, steps).view(2, n, steps)
    ours = sample(model, pictures[:2], PROMPTS[:2], SEEDS[:2], n=n, max_new_tokens=steps)
    for i in range(2):
        for j in range(n):
            def choose(row, step):
                return int(pick(row[None], 0.8, 0.95, streams[i, j, step : step + 1]))

            assert ours[i][j] == naive(model, pictures[i], PROMPTS[i], steps, NEVER, choose)


def test_seeds_decide(model, pictures):
    one, same, other = (sample(model, pictures[:1], PROMPTS[:1], [s]) for s in (5, 5, 6))
    assert one == same != other


def test_equal_prompts_with_different_seeds_differ(model, pictures):
    rows = sample(model, pictures[:1], [PROMPTS[0]] * 4, [1, 2, 3, 4], shows=[0] * 4)
    assert len({tuple(group[0]) for group in rows}) == 4


def test_compaction_with_several_answers(model, pictures, monkeypatch):
    """A prompt leaves only when all its answers are done; the others are not disturbed."""
    free = sample(model, pictures, PROMPTS, SEEDS, n=2, max_new_tokens=60)
    kept = []
    keep = Cache.keep
    monkeypatch.setattr(Cache, "keep", lambda self, prompts: (kept.append(len(prompts)), keep(self, prompts)))
    tried = 0
    for eos_id in range(small.VOCAB):
        ends = [max(a.index(eos_id) if eos_id in a else 60 for a in group) for group in free]
        if sum(e < 32 for e in ends) >= 2 and max(ends) > 48:
            ours = sample(model, pictures, PROMPTS, SEEDS, n=2, max_new_tokens=60, eos_id=eos_id)
            assert ours == [[a[: a.index(eos_id)] if eos_id in a else a for a in group] for group in free]
            tried += 1
    assert tried and kept


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(seeds=None), "one seed per prompt"),
        (dict(seeds=[1, 2]), "one seed per prompt"),
        (dict(temperature=-1.0), "temperature -1.0"),
        (dict(top_p=0.0), "top_p 0.0"),
        (dict(top_p=1.5), "top_p 1.5"),
        (dict(prompts=[[1]]), "at least two tokens"),
        (dict(prompts=[[1, *[small.IMAGE_TOKEN] * 8, 4]]), "prompt 0: 8 image tokens, its image needs 9"),
    ],
)
def test_refusals(model, pictures, options, reason):
    settings = dict(prompts=PROMPTS[:1], eos_id=2, temperature=1.0, seeds=[1]) | options
    with pytest.raises(ValueError, match=reason):
        generate(model, pictures[:1], **settings)


# ------------------------------------------------------------------------------------------------------- pick


LOGITS = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()[None]  # order: 1, 3, then 0 before 2, which are tied


@pytest.mark.parametrize(
    "top_p, u, token",
    [
        # 0.5 reaches 0.5: token 1 alone
        (0.5, 0.0, 1), (0.5, 0.999, 1),
        # 0.6 needs tokens 1 and 3 of total 0.75: shares 2/3 and 1/3
        (0.6, 0.0, 1), (0.6, 0.66, 1), (0.6, 0.67, 3), (0.6, 0.999, 3),
        # 0.8 needs one more, token 0, total 0.875: borders at 4/7 = 0.571 and 6/7 = 0.857
        (0.8, 0.57, 1), (0.8, 0.575, 3), (0.8, 0.856, 3), (0.8, 0.858, 0), (0.8, 0.999, 0),
        # everything: borders at 1/2, 3/4, 7/8
        (1.0, 0.499, 1), (1.0, 0.501, 3), (1.0, 0.749, 3), (1.0, 0.751, 0), (1.0, 0.874, 0), (1.0, 0.876, 2),
        (1.0, 1 - 2**-24, 2),
    ],
)
def test_top_p_by_hand(top_p, u, token):
    assert pick(LOGITS, 1.0, top_p, torch.tensor([u])).tolist() == [token]


def test_temperature_by_hand():
    """Temperature 1/2 squares probabilities: 16 : 4 : 1 : 1 of 22, so token 1 ends at 16/22 = 0.727."""
    u = torch.tensor([0.72, 0.73, 0.90, 0.92, 0.98])
    assert pick(LOGITS.expand(5, -1), 0.5, 1.0, u).tolist() == [1, 3, 3, 0, 2]


def test_greedy_is_the_argmax():
    assert pick(torch.tensor([[0.0, 3.0, 2.0], [5.0, 3.0, 2.0]]), 0, 1.0, None).tolist() == [1, 0]


def test_nothing_outside_the_nucleus_is_ever_drawn():
    """The largest uniform below 1 stays inside, for random distributions and cut-offs."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 50, generator=draw) * 3
    for top_p in (0.1, 0.5, 0.9, 0.99):
        tokens = pick(logits, 1.0, top_p, torch.full((2000,), 1 - 2**-24))
        probs, order = logits.softmax(-1).sort(descending=True, stable=True)
        smallest = (probs.cumsum(-1) < top_p).sum(-1)  # index of the token that reaches top_p
        rank = (order == tokens[:, None]).int().argmax(-1)
        assert (rank <= smallest).all() and (rank == smallest).float().mean() > 0.99


def sorted_pick(logits, temperature, top_p, u):
    """The definition: all tokens sorted, equal ones by number; the first whose sum exceeds u times the kept mass."""
    probs, order = (logits / temperature).softmax(-1).sort(descending=True, dim=-1, stable=True)
    total = probs.cumsum(-1)
    kept = total.masked_fill(total - probs >= top_p, 0).amax(-1, keepdim=True)
    rank = (total < u[:, None] * kept).sum(-1, keepdim=True).clamp_max(logits.shape[-1] - 1)
    return order.gather(1, rank)[:, 0]


@pytest.mark.parametrize("steps", [None, 4, 1])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_the_best_candidates_are_enough_or_all_are_sorted(top_p, scale, steps):
    """Flat and peaked distributions, with ties where logits are rounded: always the token of the full sort."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3000, 5 * CANDIDATES, generator=draw) * scale
    logits = logits if steps is None else (logits * steps).round() / steps
    u = torch.rand(3000, generator=draw)
    u[:4] = torch.tensor([0.0, 1e-7, 0.5, 1 - 2**-24])
    assert torch.equal(pick(logits, 0.7, top_p, u), sorted_pick(logits, 0.7, top_p, u))


def test_a_draw_at_a_border_is_that_of_the_full_sort():
    """u equal to each partial sum, and next to it: where rounding decides, all tokens are sorted."""
    row = torch.randn(5 * CANDIDATES, generator=torch.Generator().manual_seed(1)) * 4
    sums = row.softmax(-1).sort(descending=True).values.cumsum(-1)[:40]
    u = torch.cat([sums, sums.nextafter(torch.zeros(())), sums.nextafter(torch.ones(()))]).clamp_max(1 - 2**-24)
    logits = row.expand(len(u), -1)
    for top_p in (1.0, 0.99):
        assert torch.equal(pick(logits, 1.0, top_p, u), sorted_pick(logits, 1.0, top_p, u))


def test_frequencies_follow_the_softmax(model, pictures):
    """4000 draws of one token: total variation from the softmax about sqrt(V / (2 pi N)) = 0.05 by chance."""
    settings = dict(n=4000, max_new_tokens=1, temperature=0.7, top_p=1.0)
    tokens = sample(model, pictures[:1], PROMPTS[:1], [3], **settings)[0]
    counts = np.bincount([t[0] for t in tokens], minlength=small.VOCAB) / len(tokens)
    with torch.no_grad():
        logits = model.logits(torch.tensor(PROMPTS[0]), pictures[0].pixels)[-1]
    for temperature, near in ((0.7, True), (1.4, False)):
        expected = (logits / temperature).softmax(-1).numpy()
        assert (np.abs(counts - expected).sum() / 2 < 0.07) == near


# ----------------------------------------------------------------------------------------- other models, text


def test_adapters_take_part(llava_folder, pictures):
    """A model with LoRA generates what the merged model generates, and not what the base does."""
    model = load_llava(llava_folder)
    base = generate(model, pictures, PROMPTS, eos_id=NEVER, max_new_tokens=12)
    add_lora(model.language_model.model, rank=3, alpha=6.0)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    adapted = generate(model, pictures, PROMPTS, eos_id=NEVER, max_new_tokens=12)
    merge_lora(model)
    assert adapted == generate(model, pictures, PROMPTS, eos_id=NEVER, max_new_tokens=12) != base


def test_adapters_are_cast_once_and_come_back_bit_for_bit(llava_folder, pictures, monkeypatch):
    """fp32 adapters on bf16 weights: the same tokens as cast at every step, and the same bits afterwards."""
    model = load_llava(llava_folder, dtype=torch.bfloat16)
    add_lora(model.language_model.model, rank=3, alpha=6.0)
    torch.manual_seed(0)
    layers = lora_layers(model).values()
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    kept = [(p, p.data, p.data.clone()) for layer in layers for p in (layer.lora_A, layer.lora_B)]
    seen = []
    hook = model.language_model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda layer, *_: seen.append((layer.lora_A.dtype, layer.lora_B.dtype)))
    adapted = generate(model, pictures, PROMPTS, eos_id=NEVER, max_new_tokens=6)
    hook.remove()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)} and len(seen) == 6
    with pytest.raises(KeyError), adapters_cast(model):
        raise KeyError
    assert all(p.data.data_ptr() == data.data_ptr() and torch.equal(p, bits) and p.dtype == torch.float32
               for p, data, bits in kept)
    monkeypatch.setattr("model.generate.adapters_cast", lambda model: nullcontext())
    assert adapted == generate(model, pictures, PROMPTS, eos_id=NEVER, max_new_tokens=6)


def test_bf16_generates(llava_folder, pictures):
    model = load_llava(llava_folder, dtype=torch.bfloat16)
    rows = sample(model, pictures, PROMPTS, SEEDS, max_new_tokens=6, n=2)
    assert [[len(a) for a in group] for group in rows] == [[6, 6]] * len(PROMPTS)


class Words:
    """Stands for data.processor.Processor: pictures by number, prompts and answers as numbers in text."""

    eos_id = NEVER
    show, questions = Processor.show, Processor.questions

    def __init__(self):
        self.opened: list[str] = []

    def image(self, reference: str, root: Path | None) -> View:
        self.opened.append(reference)
        return small.views(int(reference) + 1)[-1]

    def prompt(self, text: str, count: tuple = (small.PATCHES,)) -> list[int]:
        assert list(count) == [small.PATCHES]
        return list(small.prompt(*map(int, text.split())))

    def question(self, text: str) -> tuple[int, ...]:
        return ()

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers(model, batch_size):
    """Order, seeds and pictures do not depend on the batch size; a picture is opened once per batch."""
    references, texts = ["0", "1", "0", "0", "2"], ["7", "8 9", "8", "7", "10 11 12"]
    settings = dict(max_new_tokens=6, temperature=1.0, n=2, seed=40)
    words = Words()
    ours = answers(model, words, references, texts, batch_size=batch_size, **settings)
    expected = [
        generate(model, [words.image(r, None)], [words.prompt(t)], eos_id=NEVER, max_new_tokens=6, n=2,
                 temperature=1.0, seeds=[40 + i])[0]
        for i, (r, t) in enumerate(zip(references, texts))
    ]
    assert ours == [[words.decode(a) for a in group] for group in expected]
    assert ours[0] != ours[3]  # the same question twice: two seeds
    opened = words.opened[: -len(references)]
    assert len(opened) == {1: 5, 2: 4, 5: 3}[batch_size]


def test_answers_switches_dropout_off(llava_folder):
    model = load_llava(llava_folder)
    add_lora(model.language_model.model, rank=3, alpha=6.0, dropout=0.9)
    for layer in lora_layers(model).values():
        torch.nn.init.constant_(layer.lora_B, 0.3)
    model.train()
    runs = [answers(model, Words(), ["0"], ["7 8"], max_new_tokens=10) for _ in range(3)]
    assert runs[0] == runs[1] == runs[2] and model.training
    assert answers(model, Words(), [], []) == []


# ------------------------------------------------------------------------------------------------------- live


def test_live_greedy_equals_transformers(model, pictures, llava_folder):
    """Token for token, EOS at different times."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(llava_folder).eval()
    eos_id = stopping_token([naive(model, p, ids, 30, NEVER) for p, ids in zip(pictures, PROMPTS)])
    ours = generate(model, pictures, PROMPTS, eos_id=eos_id, max_new_tokens=30)
    for picture, prompt, group in zip(pictures, PROMPTS, ours):
        ids = torch.tensor([prompt])
        inputs = dict(input_ids=ids, pixel_values=picture.pixels, attention_mask=torch.ones_like(ids))
        expected = make.greedy(theirs, inputs, 30, eos_id).tolist()
        assert group[0] == (expected[: expected.index(eos_id)] if eos_id in expected else expected)


def test_live_top_p_keeps_what_transformers_keeps():
    """The set that can be drawn, read off with a fine grid of uniforms, against TopPLogitsWarper."""
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(20, 12, generator=torch.Generator().manual_seed(4)) * 2
    grid = (torch.arange(4096) + 0.5) / 4096
    for top_p in (0.2, 0.7, 0.95):
        kept = transformers.TopPLogitsWarper(top_p)(None, logits.clone()).softmax(-1)
        for row, expected in zip(logits, kept):
            drawn = pick(row.expand(len(grid), -1), 1.0, top_p, grid).bincount(minlength=12) / len(grid)
            torch.testing.assert_close(drawn, expected, rtol=0, atol=1 / 1024)


def test_longer_than_the_decoder_takes(model, pictures):
    limit = model.config.text.max_position_embeddings
    with pytest.raises(ValueError, match=f"the decoder takes {limit}"):
        generate(model, pictures[:1], PROMPTS[:1], eos_id=NEVER, max_new_tokens=limit)


# --------------------------------------------------------------------------------------------- broken weights


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, dict(temperature=1.0, seeds=SEEDS[:3]), dict(stop=lambda *_: False)])
def test_logits_that_are_not_finite(llava_folder, pictures, value, options):
    """The embedding of a token that only prompt 1 holds is broken: that prompt is named, early or at the end."""
    model = load_llava(llava_folder)
    prompts = [list(small.prompt(7, token)) for token in (8, 30, 9)]
    model.language_model.lm_head.weight.data[30] = 0  # so that nobody else comes to say it
    model.language_model.model.embed_tokens.weight.data[30] = value
    for tokens in (1, 20):
        with pytest.raises(NotFinite, match="prompt 1: the model's logits are NaN or infinite"):
            generate(model, pictures[:3], prompts, eos_id=NEVER, max_new_tokens=tokens, **options)
    fine = [prompts[0], prompts[2]]
    assert generate(model, [pictures[0], pictures[2]], fine, eos_id=NEVER, max_new_tokens=1)


def test_a_broken_answer_that_ends_at_once_is_named(llava_folder, pictures):
    """The argmax of NaN is token 0, here EOS."""
    model = load_llava(llava_folder)
    prompts = [list(small.prompt(7, token)) for token in (30, 9)]
    model.language_model.model.embed_tokens.weight.data[30] = float("nan")
    for tokens in (1, 7, 9, 20):
        with pytest.raises(NotFinite, match="prompt 0"):
            generate(model, pictures[:2], prompts, eos_id=0, max_new_tokens=tokens)


def test_answers_names_the_image_of_broken_logits(llava_folder):
    model = load_llava(llava_folder)
    model.language_model.model.embed_tokens.weight.data[30] = float("nan")
    with pytest.raises(ValueError, match="^4: the model's logits are NaN or infinite"):
        answers(model, Words(), ["0", "1", "0", "4", "2"], ["7", "8 9", "8", "30", "10"], batch_size=2, max_new_tokens=1)


def test_writing_is_without_dropout_and_afterwards_it_is_back(model, views):
    seen = []
    model.language_model.model.layers[0].mlp.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    model.train()
    generate(model, views[:1], [small.prompt(6, 7)], eos_id=1, max_new_tokens=3)
    assert seen and not any(seen) and model.training and model.language_model.training
