"""LLaVA-1.6: resolutions, tiles, the merge as a gather, and the model, by hand and against `transformers`.

The small model has tiles of 17 pixels with 3 x 3 patches (tests/small.py) and the five published shapes of canvas.
"""

import json

import numpy as np
import pytest
import small
import torch
from PIL import Image
from test_processor import tokenizer

from data.processor import Processor
from model.anyres import anyres, best_resolution, merge
from model.checkpoint import load_llava
from model.generate import generate
from model.logprobs import Scorer, Sequence, naive_logprobs, pack
from model.views import Preprocessing, View, pad_to_square, preprocess, single, stack

S, P, IMAGE = small.SIDE, small.PATCHES, small.IMAGE_TOKEN
PUBLISHED = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
GRID = tuple((h // 336 * S, w // 336 * S) for h, w in PUBLISHED)
HOW = Preprocessing(S)
SIZES = ((40, 24), (23, 57), (17, 17), (16, 90), (5, 4), (70, 70), (150, 3), (33, 34))  # width, height
NEVER = 999


def photo(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(small.photo(*size))


def view(size: tuple[int, int]) -> View:
    return anyres(photo(size), GRID, HOW, P)


def prompt(count: int, *text: int) -> tuple[int, ...]:
    return (1, 5, *[IMAGE] * count, *text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llava_next checkpoint with random weights."""
    grid = [list(pair) for pair in GRID]
    return small.write_llava(tmp_path_factory.mktemp("next"), model_type="llava_next", image_grid_pinpoints=grid)


@pytest.fixture(scope="module")
def model(folder):
    return load_llava(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.LlavaNextForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def processor():
    pil = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
    return pil.LlavaNextImageProcessorPil(size={"shortest_edge": S}, crop_size={"height": S, "width": S},
                                          image_grid_pinpoints=[list(pair) for pair in GRID])


# ----------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    "size, tokens",
    [((640, 480), 2340), ((480, 640), 2352), ((640, 427), 2144), ((336, 336), 1176), ((1024, 1024), 2928),
     ((1000, 300), 2182), ((300, 1000), 2232)],
)
def test_image_tokens_of_published_checkpoints(size, tokens):
    """For example 1024 x 1024: 576 for the overview, 48 rows of 48 patches and a newline: 576 + 48 * 49 = 2928."""
    shape = size[::-1]
    canvas = best_resolution(shape, PUBLISHED)
    assert len(merge(shape, (canvas[0] // 336, canvas[1] // 336), 24)) == tokens


def test_best_resolution_by_hand():
    """A 336 x 336 picture fits all canvases whole; the smallest waste least, and of those the first is taken.

    640 x 480 is kept whole in the square one (672 * 504), reduced to 448 x 336 in the wide one. 1000 x 300 is kept whole
    in the widest and reduced to 672 x 201 in the square.
    """
    assert best_resolution((336, 336), PUBLISHED) == (336, 672)
    assert best_resolution((336, 336), PUBLISHED[1:]) == best_resolution((336, 336), PUBLISHED[::-1]) == (672, 336)
    assert best_resolution((480, 640), PUBLISHED) == (672, 672)
    assert best_resolution((300, 1000), PUBLISHED) == (336, 1008)
    assert best_resolution((1000, 300), PUBLISHED) == (1008, 336)


def test_merge_by_hand():
    """A 4 x 1 picture on 2 x 2 tiles of 2 x 2 patches: overview 0..3, tiles 4.., 8.., 12.., 16..

    The large map is  4  5  8  9      Scaled to 4 columns the picture is one row high; (4 - 1) // 2 = 1 row of black
                      6  7 10 11      above and below is left out. The rows that stay end in a newline.
                     12 13 16 17
                     14 15 18 19
    """
    expected = [0, 1, 2, 3, 6, 7, 10, 11, -1, 12, 13, 16, 17, -1]
    assert merge((1, 4), (2, 2), 2).tolist() == expected
    tall = [0, 1, 2, 3, 5, 8, -1, 7, 10, -1, 13, 16, -1, 15, 18, -1]
    assert merge((4, 1), (2, 2), 2).tolist() == tall
    assert merge((3, 3), (1, 2), 1).tolist() == [0, 1, 2, -1]  # (2 - 1) // 2 = 0 columns left out


def test_margins_are_rounded_before_the_cut():
    """94 x 47 on 6 x 6 patches: 47 * 6 / 94 = 3 rows, in floats 2.9999..; (6 - 3) // 2 = 1 above and 1 below go."""
    assert len(merge((47, 94), (2, 2), 3)) == 9 + 4 * 7


def test_black_around_the_picture():
    """A white 34 x 17 picture fills the 34 x 17 canvas; a white 60 x 51 one 34 x 29 of 34 x 34, rounded up."""
    white, black = ((torch.full((3,), v) - torch.tensor(HOW.mean)) / torch.tensor(HOW.std) for v in (1.0, 0.0))
    pixels = anyres(Image.new("RGB", (34, 17), (255,) * 3), GRID, HOW, P).pixels
    assert pixels.shape == (3, 3, S, S)
    torch.testing.assert_close(pixels, white[:, None, None].expand_as(pixels))
    pixels = anyres(Image.new("RGB", (60, 51), (255,) * 3), GRID, HOW, P).pixels  # 34 / 60 * 51 = 28.9
    assert pixels.shape == (5, 3, S, S)
    for tile, row, colour in ((0, 0, white), (1, 1, black), (1, 2, white), (4, 13, white), (4, 14, black)):
        torch.testing.assert_close(pixels[tile, :, row, 3], colour)  # (34 - 29) // 2 = 2 rows of black above


# ----------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("size", SIZES)
def test_live_pixels_equal_transformers(processor, size):
    expected = processor(photo(size), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(view(size).pixels, expected, rtol=0, atol=2e-6)


def test_live_merge_equals_transformers(theirs, processor):
    """500 random sizes: the merged features are the gathered ones, so their number is right, too."""
    draw = np.random.default_rng(0)
    for height, width in draw.integers(1, 400, (500, 2)).tolist():
        size = height, width
        canvas = best_resolution(size, GRID)
        down, across = canvas[0] // S, canvas[1] // S
        features = torch.arange(1.0, 1 + P * (1 + down * across))[:, None]
        packed, _ = theirs.model.pack_image_features(
            [features.view(-1, P, 1)], torch.tensor([size]), "default", image_newline=torch.zeros(1)
        )
        assert torch.equal(packed[0][:, 0].long() - 1, merge(size, (down, across), 3)), size


def inputs(processor, sizes, ids) -> dict:
    """Pictures and sequences as `transformers` takes them, padded on the right."""
    made = processor([photo(size) for size in sizes], return_tensors="pt")
    longest = max(map(len, ids))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return dict(input_ids=padded, attention_mask=mask, **made)


@torch.no_grad()
def test_live_logits_equal_transformers(model, theirs, processor):
    """Eight pictures of different size in one of their batches; ours one at a time."""
    views = [view(size) for size in SIZES]
    ids = [prompt(len(v.rows), *range(7, 10 + i)) for i, v in enumerate(views)]
    expected = theirs(**inputs(processor, SIZES, ids)).logits
    for row, v, want in zip(ids, views, expected):
        ours = model.logits(torch.tensor(row), v.pixels, v.rows)
        torch.testing.assert_close(ours, want[: len(row)], rtol=1e-4, atol=1e-4)


def sequences(views: list[View]) -> list[Sequence]:
    """Two answers to each picture, the first of them also with another picture's number of tokens in between."""
    prompts = [prompt(len(v.rows), 7, 8 + i) for i, v in enumerate(views)]
    return [Sequence(i, p, r) for i, p in enumerate(prompts) for r in ((20, 21, 22 + i, 2), (30 + i, 2))]


def scored(model, sequences: list[Sequence], views: list[View], **options) -> list[torch.Tensor]:
    pixels, rows = stack(views, P)
    logps, mask = Scorer(model, **options)(pack(sequences, rows, IMAGE), model.vision_features(pixels))
    return [row[keep] for row, keep in zip(logps, mask)]


@torch.no_grad()
def their_logprobs(theirs, processor, sequences: list[Sequence]) -> list[torch.Tensor]:
    ids = [s.prompt + s.response for s in sequences]
    logps = theirs(**inputs(processor, [SIZES[s.image] for s in sequences], ids)).logits.log_softmax(-1)
    return [row[range(len(s.prompt) - 1, len(s.prompt + s.response) - 1), list(s.response)]
            for row, s in zip(logps, sequences)]


def test_live_packed_scores_equal_transformers(model, theirs, processor):
    """Shared prefixes, each picture once: packed = one at a time = `transformers`, to 1e-4."""
    views = [view(size) for size in SIZES]
    asked = sequences(views)
    assert len(pack(asked, stack(views, P)[1], IMAGE).prefixes) == len(SIZES)
    with torch.no_grad():
        ours, naive = scored(model, asked, views), naive_logprobs(model, asked, views)
    for a, b, c in zip(ours, naive, their_logprobs(theirs, processor, asked), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-4)


def test_live_bf16_stays_within_its_error(model, theirs, processor):
    """Ours under bf16 is as near to their fp32 as their own bf16 autocast is (factor 2)."""
    views = [view(size) for size in SIZES]
    asked = sequences(views)
    exact = torch.cat(their_logprobs(theirs, processor, asked))
    with torch.no_grad():
        ours = torch.cat(scored(model, asked, views, autocast=torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16):
            plain = torch.cat(their_logprobs(theirs, processor, asked))
    error, usual = (ours - exact).norm(), (plain - exact).norm()
    assert 1e-4 * exact.norm() < usual < 0.1 * exact.norm() and error < 2 * usual


def test_live_greedy_equals_transformers(model, theirs, processor):
    """Token for token, all pictures in one batch of ours."""
    views = [view(size) for size in SIZES]
    prompts = [list(prompt(len(v.rows), 7 + i, 9)) for i, v in enumerate(views)]
    ours = generate(model, views, prompts, eos_id=NEVER, max_new_tokens=12)
    for size, ids, (tokens,) in zip(SIZES, prompts, ours):
        settings = dict(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
        expected = theirs.generate(**inputs(processor, [size], [ids]), **settings)[0, len(ids) :]
        assert tokens == expected.tolist()


# ------------------------------------------------------------------------------------------------------ model


def test_gradients_of_newline_and_projector_equal_naive(folder):
    """Both train where they are unfrozen; a picture that several prompts show gets the sum of their gradients."""
    model, views = load_llava(folder), [view(size) for size in SIZES[:3]]
    model.requires_grad_(False)
    model.image_newline.requires_grad_(True)
    model.multi_modal_projector.requires_grad_(True)
    asked = sequences(views) + [Sequence(0, prompt(len(views[0].rows), 11), (4, 2))]
    grads = []
    for rows in (scored(model, asked, views), naive_logprobs(model, asked, views)):
        model.zero_grad(set_to_none=True)
        sum(row.sum() for row in rows).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert len(grads[0]) == 5 and grads[1]["image_newline"].abs().max() > 1e-3
    for name, expected in grads[1].items():
        torch.testing.assert_close(grads[0][name], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_a_single_view_needs_no_newline(folder):
    """Re-Align shows a 1.6 model one padded tile, 576 features (9 here) and no newline, whose value does not matter."""
    model = load_llava(folder)
    one, tiled = single(small.pictures(1)[0], P), view((17, 17))
    before = [model.logits(torch.tensor(prompt(len(v.rows), 7)), *v) for v in (one, tiled)]
    model.image_newline.add_(1.0)
    after = [model.logits(torch.tensor(prompt(len(v.rows), 7)), *v) for v in (one, tiled)]
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1], atol=1e-3)


def test_newline_exists_only_with_tiles(model, llava_folder):
    assert "image_newline" in dict(model.named_parameters())
    assert "image_newline" not in dict(load_llava(llava_folder).named_parameters())


def test_processor_shows_what_the_checkpoint_says(tmp_path):
    """Tiles by default, one padded tile when asked; the prompt takes as many image tokens as the picture has rows."""
    grid = [list(pair) for pair in GRID]
    raw = {**small.LLAVA, "model_type": "llava_next", "image_token_index": 4, "image_grid_pinpoints": grid,
           "text_config": {**small.TEXT, "vocab_size": 400}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    photo((40, 24)).save(tmp_path / "a.png")
    tiled, padded = (Processor(tmp_path, aspect=aspect).image("a.png", tmp_path) for aspect in (None, "pad"))
    assert all(torch.equal(a, b) for a, b in zip(tiled, view((40, 24))))
    assert torch.equal(padded.pixels[0], preprocess(pad_to_square(photo((40, 24))), HOW))
    assert padded.rows.tolist() == list(range(P)) and len(tiled.rows) > P
    for shown in (tiled, padded):
        assert Processor(tmp_path).prompt("a dog", len(shown.rows)).count(4) == len(shown.rows)
