"""Records of several images, from the file to the log-probs: checked, placed, each encoded once, in order."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import small
import test_instructblip
import test_janus
import test_processor
import torch
from PIL import Image
from test_anyres import GRID

import generate_pairs
import train
from common import BadInput, run_script
from data.batch import BadRecord, check_image, collate, tokens_of
from data.check import check_records, problems_of
from data.corrupt import add_noise, crop
from data.export import write
from data.formats import load
from data.images import cut_at_images
from data.processor import Processor
from data.records import MOST_IMAGES, read_pairs, relocate
from judges import ask
from judges.scene import judge_scene
from losses import rdpo
from model.checkpoint import DEFAULT_MODEL, load_llava
from model.generate import answers
from model.logprobs import Scorer, Sequence, naive_logprobs
from model.views import stack
from pairs import bdhs, gallery, online, progress
from pairs.methods import make_pairs

Q, A, B = "What differs?", "Yes, a dog.", "a dog in"
MARKED = "<image> is there a dog? <image>"
SIZES = {"a.png": (40, 24), "b.png": (23, 57), "c.png": (17, 17)}
PAIR = {"id": "p", "image": ["a.png", "b.png"], "prompt": MARKED, "chosen": A, "rejected": B,
        "rejected_image": ["c.png", "b.png"]}
FAMILIES = ("llava", "llava_next", "janus")


def draw(folder: Path) -> Path:
    for name, size in SIZES.items():
        Image.fromarray(small.photo(*size)).save(folder / name)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    return draw(tmp_path)


def llava(folder: Path, **fields) -> Path:
    text = dict(vocab_size=400, max_position_embeddings=512)
    small.write_llava(folder, text, image_token_index=4, **fields)
    test_processor.tokenizer().save(str(folder / "tokenizer.json"))
    return draw(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A small checkpoint of each family, with tokenizer and images."""
    made = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    llava(made["llava"])
    llava(made["llava_next"], model_type="llava_next", image_grid_pinpoints=[list(pair) for pair in GRID])
    janus = draw(made["janus"])
    small.write_janus(janus, dict(vocab_size=400, max_position_embeddings=512), image_token_id=5)
    test_janus.tokenizer().save(str(janus / "tokenizer.json"))
    test_janus.settings(janus)
    return made


@pytest.fixture
def folder(folders, request) -> Path:
    return folders[getattr(request, "param", "llava")]


every_family = pytest.mark.parametrize("folder", FAMILIES, indirect=True)

# ---------------------------------------------------------------------------------------------------- records


def save(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problems(path: Path) -> list[str]:
    with pytest.raises(BadInput) as caught:
        load(path)
    return str(caught.value).split("\n")


def test_records_keep_order_and_marks(images):
    rows = [PAIR, {**PAIR, "id": "q", "prompt": " What? "}, {**PAIR, "id": "r", "image": ["scene:1", "a.png", "a.png"],
                                                           "prompt": "<image><image>\nor<image>", "rejected_image": None}]
    assert read_pairs(save(images / "p.jsonl", *rows)) == rows
    write(images / "sub" / "out.jsonl", rows, root=images)
    moved = read_pairs(images / "sub" / "out.jsonl")
    assert [row["image"] for row in moved] == [["../a.png", "../b.png"]] * 2 + [["scene:1", "../a.png", "../a.png"]]
    assert moved[0]["rejected_image"] == ["../c.png", "../b.png"] and moved[2]["rejected_image"] is None
    assert relocate(rows, images, images) == rows


def test_a_list_of_one_image_is_that_image(images):
    row = {**PAIR, "image": ["a.png"], "rejected_image": ["c.png"], "prompt": f"{Q}\n<image>"}
    assert read_pairs(save(images / "p.jsonl", row)) == \
        [{**row, "image": "a.png", "rejected_image": "c.png", "prompt": Q}]


@pytest.mark.parametrize(("change", "reasons"), [
    ({"prompt": "<image>" + Q}, ["'prompt' marks 1 places with <image>, 'image' lists 2 images"]),
    ({"prompt": "<image>" * 3 + Q}, ["'prompt' marks 3 places with <image>, 'image' lists 2 images"]),
    ({"prompt": "<image>\n<image>"}, ["'prompt' is empty"]),
    ({"prompt": "<image><image><ImageHere>?"}, ["'prompt' contains <ImageHere>"]),
    ({"rejected_image": "c.png"}, ["'rejected_image' names 1 of 2 images"]),
    ({"rejected_image": ["a.png", "b.png", "c.png"]}, ["'rejected_image' names 3 of 2 images"]),
    ({"image": "a.png", "prompt": Q}, ["'rejected_image' names 2 of 1 images"]),
    ({"image": ["a.png", "none.png"]}, ["none.png: no such image"]),
    ({"image": ["none.png", "scene:x"], "rejected_image": ["a.png", "lost.png"]},
     ["'image': ", "'image': image reference 'scene:x'", "'rejected_image': "]),
    ({"image": []}, ["'image' lists 0 images, 1 to 64 are wanted"]),
    ({"image": ["a.png"] * (MOST_IMAGES + 1), "prompt": Q, "rejected_image": None},
     ["'image' lists 65 images, 1 to 64 are wanted"]),
    ({"image": ["a.png", 3]}, ["'image' must list strings, found int"]),
    ({"image": ["a.png", "b\0.png"]}, ["'image' holds a NUL character"]),
    ({"image": ["a.png", " "]}, ["'image' is empty"]),
])
def test_every_flaw_is_named_by_line(images, change, reasons):
    path = save(images / "p.jsonl", PAIR, {**PAIR, "id": "b", **change})
    with pytest.raises(BadInput) as caught:
        read_pairs(path)
    found = str(caught.value).split("\n")
    assert len(found) == len(reasons)
    for line, reason in zip(found, reasons):
        assert line.startswith(f"{path}:2: ") and reason in line


# ---------------------------------------------------------------------------------------------------- formats


def turn(text: str, keys: tuple[str, str] = ("role", "content"), who: str = "user") -> dict:
    return dict(zip(keys, (who, text)))


def content(*parts: str) -> list[dict]:
    said = [{"type": "image", "text": None} if part == "#" else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": said}]


TALK = [turn(MARKED, ("from", "value"), "human"), turn(A, ("from", "value"), "gpt")]
CHOSEN, REJECTED = (turn(text, who="assistant") for text in (A, B))
BOTH = {"images": ["a.png", "b.png"]}


@pytest.mark.parametrize(("row", "prompt", "other"), [
    ({"image": ["a.png", "b.png"], "conversations": TALK}, MARKED, None),
    ({**BOTH, "conversations": TALK}, MARKED, None),
    ({**BOTH, "conversations": TALK[:1], "chosen": CHOSEN, "rejected": REJECTED}, MARKED, None),
    ({**BOTH, "instruction": f"<image>\n<image>{Q}", "chosen": A, "rejected": B}, f"<image>\n<image>{Q}", None),
    ({"images": [{"path": "a.png"}, {"path": "b.png"}], "messages": [turn(MARKED), CHOSEN], "rejected_response": B,
      "rejected_images": ["b.png", "a.png"]}, MARKED, ["b.png", "a.png"]),
    ({**BOTH, "messages": [turn(MARKED), CHOSEN], "rejected_response": B, **{f"rejected_{k}": v for k, v in BOTH.items()}},
     MARKED, None),
    ({**BOTH, "prompt": content("#", "#", Q), "chosen": [CHOSEN], "rejected": [REJECTED]}, Q, None),
    ({**BOTH, "prompt": content("#", " is there a dog? ", "#"), "chosen": [CHOSEN], "rejected": [REJECTED],
      "rejected_images": ["c.png", "b.png"]}, MARKED, ["c.png", "b.png"]),
    ({**BOTH, "prompt": content(Q, "#", "#"), "chosen": [CHOSEN], "rejected": [REJECTED]}, f"{Q}<image><image>", None),
    ({**BOTH, "prompt": MARKED, "chosen": A, "rejected": B}, MARKED, None),
    ({**BOTH, "question": Q, "image": ["a.png", "b.png"], "chosen": A, "rejected": B}, Q, None),
])
def test_foreign_rows_of_several_images(images, row, prompt, other):
    """One image part in the middle of a text, of a row of one image, is where the template puts it, as before."""
    (record,) = load(save(images / "d.jsonl", row)).records
    assert (record["image"], record["prompt"], record["chosen"]) == (["a.png", "b.png"], prompt, A)
    assert record.get("rejected_image") == other


def test_foreign_rows_are_refused_by_line(images):
    row = {**BOTH, "conversations": TALK[:1], "chosen": CHOSEN, "rejected": REJECTED}
    path = save(images / "d.jsonl", row, {**row, "images": ["a.png", "b.png", "c.png"]}, {**row, "images": ["a.png", 3]})
    assert problems(path) == [f"{path}:2: 'prompt' marks 2 places with <image>, 'image' lists 3 images",
                              f"{path}:3: the image must be a path or bytes, found int"]


@pytest.mark.parametrize(("prompt", "kinds"), [
    (MARKED, "titi"), (Q, "iit"), (f"<image>\n<image>\n{Q}", "titit"), (f"{Q} <image><image>", "tii"),
    (f"<image><image> {Q}", "tiit"), (f"<image><image>{Q}", "tiit"), (f"See <image> and\n<image>: {Q}", "titit")])
def test_trl_lists_images_and_places(images, prompt, kinds):
    write(images / "t.jsonl", [{**PAIR, "prompt": prompt}], "trl")
    row = json.loads((images / "t.jsonl").read_text())
    assert [Path(path).name for path in row["images"]] == PAIR["image"]
    assert [Path(path).name for path in row["rejected_images"]] == PAIR["rejected_image"]
    assert "".join(part["type"][0] for part in row["prompt"][0]["content"]) == kinds
    (record,) = load(images / "t.jsonl").records
    assert record["prompt"] == prompt and record["image"] == [str(images / name) for name in PAIR["image"]]


def test_trl_parquet_carries_all_images(images):
    pytest.importorskip("pyarrow")
    write(images / "t.parquet", [PAIR, {**PAIR, "id": "q", "image": ["scene:2", "a.png"]},
                                   {**PAIR, "id": "r", "prompt": f"<image><image>{Q}"}], "trl")
    first, second, third = load(images / "t.parquet").records
    assert (first["prompt"], third["prompt"], third["image"]) == (MARKED, f"<image><image>{Q}", first["image"])
    for key in ("image", "rejected_image"):
        assert [(images / name).read_bytes() for name in first[key]] == [(images / name).read_bytes() for name in PAIR[key]]
    assert Image.open(images / second["image"][0]).size == (96, 96) and len(second["image"]) == 2


# ---------------------------------------------------------------------------------------------------- prompts


def spelt(processor: Processor, ids: list[int]) -> list[str]:
    """Tokens, with runs of image tokens as #COUNT."""
    result: list = []
    for token in ids:
        if token == processor.image_id:
            result[-1:] = [result[-1] + 1] if result and isinstance(result[-1], int) else [*result[-1:], 1]
        else:
            result.append(processor.tokenizer.core.id_to_token(token))
    return [f"#{part}" if isinstance(part, int) else part for part in result]


def test_images_are_where_the_marks_are(folder):
    """Each with its own number of tokens, texts tokenised apart as LLaVA does; unmarked ones as the template's."""
    processor = Processor(folder)
    ids = spelt(processor, processor.prompt("a <image>dog<image>", [3, 5]))
    assert [part for part in ids if part[0] == "#"] == ["#3", "#5"]
    assert ids[ids.index("#3") + 1 : ids.index("#5")] == spelt(processor, processor.tokenizer.encode("dog"))
    assert processor.prompt("a dog", [3, 5]) == processor.prompt("<image>\n<image>\na dog", [3, 5])
    assert processor.prompt("a dog", [4]) == processor.prompt("a dog", 4) != processor.prompt("a dog", [4, 4])
    assert processor.prompt("a dog", [0]) == processor.prompt("a dog", 0) == processor.prompt("a dog", [])
    for text in ("<image> a dog", "<image>" * 3):
        with pytest.raises(BadInput, match="special token <image>"):
            processor.prompt(text, [3, 5])


@pytest.mark.parametrize("folder", ["janus"], indirect=True)
def test_janus_opens_and_closes_each_image(folder):
    processor = Processor(folder)
    for text, expected in ((f"<image> or <image>\n{Q}", ["{}", "Ġ", "o", "r", "Ġ", "{}"]), (Q, ["{}", "Ċ", "{}"])):
        ids = spelt(processor, processor.prompt(text, [9, 9]))
        middle = ids[ids.index("<begin_of_image>") : len(ids) - ids[::-1].index("<end_of_image>")]
        whole = ["<begin_of_image>", "#9", "<end_of_image>"]
        parts = [part for kind in expected for part in (whole if kind == "{}" else [kind])]
        assert "".join(middle) == "".join(parts)


def test_one_question_and_image_for_the_q_former(tmp_path):
    """Refused for each record by name, before any model is loaded."""
    processor = Processor(test_instructblip.write(draw(tmp_path)))
    with pytest.raises(BadInput, match="d.jsonl: record 'p': 'prompt': 2 images, instructblip takes one"):
        check_records([PAIR], processor, tmp_path, "d.jsonl")
    assert problems_of({**PAIR, "image": "a.png", "prompt": Q}, processor, tmp_path) == []


def test_texts_and_their_images():
    assert cut_at_images("x<image>y<image>", 2) == ["x", "<image>", "y", "<image>"]
    assert cut_at_images("x", 2) == ["<image>", "<image>", "x"] and cut_at_images("x<image>", 2)[2] == "x<image>"
    assert cut_at_images("x", 1) == ["<image>", "x"] and cut_at_images("x", 0) == ["x"]


# ------------------------------------------------------------------------------------------------ batch, scores

RECORDS = [PAIR, {**PAIR, "id": "q", "image": ["b.png", "a.png"], "rejected_image": ["b.png", "c.png"]},
           {**PAIR, "id": "r", "prompt": "a dog", "image": ["a.png", "b.png"], "rejected_image": ["b.png", "b.png"]},
           {**PAIR, "id": "s", "prompt": "a", "image": "c.png", "rejected_image": "a.png"}]


@every_family
def test_each_image_is_encoded_once(folder):
    """Three images in all; chosen and rejected share the prefix of their images; rows follow the order of the list."""
    processor = Processor(folder)
    batch = collate(RECORDS, rdpo.SEQUENCES, processor, folder)
    views = {name: processor.image(name, folder) for name in ("a.png", "b.png", "c.png")}
    assert len(batch.pixels) == sum(len(view.pixels) for view in views.values())
    assert len(batch.packed.prefixes) == 8  # of 12 sequences
    own = [record[key] for key in ("image", "rejected_image") for record in RECORDS]
    counts = [[len(views[name].rows) for name in ([names] if isinstance(names, str) else names)] for names in own]
    assert len(batch.packed.slots) == sum(map(sum, counts))
    for record in RECORDS:
        assert tokens_of(record, rdpo.SEQUENCES, processor, folder) == \
            len(collate([record], rdpo.SEQUENCES, processor, folder).packed.ids)
    blank = collate(RECORDS, rdpo.SEQUENCES, processor, folder, blank=True)
    assert blank.packed.prefixes == batch.packed.prefixes and blank.pixels.is_meta


def plain(processor: Processor, folder: Path) -> tuple[list, list[Sequence]]:
    """Every image of every sequence as a view of its own, without the batch's bookkeeping."""
    views, sequences = [], []
    for how in rdpo.SEQUENCES.values():
        for record in RECORDS:
            names = record[how["image"]]
            shown = [processor.image(name, folder) for name in ([names] if isinstance(names, str) else names)]
            numbers = tuple(range(len(views), len(views) + len(shown)))
            prompt = processor.prompt(record["prompt"], [len(view.rows) for view in shown])
            views += shown
            sequences.append(Sequence(numbers, tuple(prompt), tuple(processor.response(record[how["response"]]))))
    return views, sequences


@every_family
@torch.no_grad()
def test_packed_scores_are_those_of_one_at_a_time(folder):
    model, processor = load_llava(folder), Processor(folder)
    batch = collate(RECORDS, rdpo.SEQUENCES, processor, folder)
    logps, mask = Scorer(model)(batch.packed, model.vision_features(batch.pixels))
    views, sequences = plain(processor, folder)
    expected = naive_logprobs(model, sequences, views)
    for row, keep, want in zip(logps, mask, expected, strict=True):
        torch.testing.assert_close(row[keep], want, rtol=0, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)  # the same two images, the other way round


def their_model(family: str, folder: Path):
    """`transformers`' model of a folder, and what it takes of a prompt's images."""
    transformers = pytest.importorskip("transformers")
    kind = {"llava": "Llava", "llava_next": "LlavaNext", "janus": "Janus"}[family]
    model = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(folder).eval()

    def shown(names: list[str], views: list) -> dict[str, torch.Tensor]:
        if family != "llava_next":
            return {"pixel_values": torch.cat([view.pixels for view in views])}
        return {"pixel_values": torch.nn.utils.rnn.pad_sequence([view.pixels for view in views], batch_first=True),
                "image_sizes": torch.tensor([SIZES[name][::-1] for name in names])}

    return model, shown


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_live_log_probs_equal_transformers(folders, family, tmp_path):
    """Two images in a prompt, at its marks and before it, as chosen and as rejected image."""
    folder = place = folders[family]
    if family == "janus":  # `transformers` wants what generates images, too
        place = tmp_path
        test_janus.write_theirs(place, dict(vocab_size=400, max_position_embeddings=512))
        raw = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**raw, "image_token_id": 5}))
    theirs, shown_to = their_model(family, place)
    model, processor = load_llava(place), Processor(folder)
    batch = collate(RECORDS, rdpo.SEQUENCES, processor, folder)
    logps, mask = Scorer(model)(batch.packed, model.vision_features(batch.pixels))
    views, sequences = plain(processor, folder)
    fields = [how["image"] for how in rdpo.SEQUENCES.values() for _ in RECORDS]
    for i in (0, 2, 5, 9):  # chosen at the marks, chosen after the images, rejected, under the rejected image
        s, names = sequences[i], RECORDS[i % len(RECORDS)][fields[i]]
        inputs = shown_to(names, [views[number] for number in s.image])
        logits = theirs(input_ids=torch.tensor([[*s.prompt, *s.response]]), **inputs).logits[0]
        logits = logits[len(s.prompt) - 1 : -1, : model.config.text.vocab_size]
        expected = logits.log_softmax(-1)[range(len(s.response)), list(s.response)]
        torch.testing.assert_close(logps[i][mask[i]], expected, rtol=0, atol=1e-4)


def test_crops_and_noise_are_of_every_image(folder):
    processor = Processor(folder)
    sequences = {"whole": dict(image="image", response="chosen"),
                 "crop": dict(image="image", response="chosen", view="crop"),
                 "noise": dict(image="image", response="chosen", view="noise")}
    batch = collate([PAIR], sequences, processor, folder, seeds=[5])
    views = [processor.image(name, folder) for name in PAIR["image"]]
    noisy = [processor.view(add_noise(Image.open(folder / name).convert("RGB"), seed=5)) for name in PAIR["image"]]
    expected = [*(view.pixels for view in views), *(crop(view.pixels, 5) for view in views), *(v.pixels for v in noisy)]
    assert torch.equal(batch.pixels, torch.cat(expected))
    each = 2 * small.PATCHES
    assert batch.packed.rows.tolist() == list(range(3 * each))


def test_picked_in_noise_shows_all_images_noisy(folder):
    sequences = {"a": dict(image="image", response="chosen", tokens="picked_in_noise")}
    batch = collate([PAIR], sequences, Processor(folder), folder, seeds=[5])
    first, each = batch.packed.rows.tolist(), 2 * small.PATCHES
    assert first == list(range(each)) and batch.noisy.rows.tolist() == [each + row for row in first]


def test_errors_name_the_record(folder, tmp_path):
    draw(tmp_path)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:300])
    with pytest.raises(BadRecord, match="record 'p': .*b.png: not a readable image"):
        collate([PAIR], rdpo.SEQUENCES, Processor(folder), tmp_path)
    with pytest.raises(BadRecord, match="record 'p': .*b.png"):
        check_image(PAIR, tmp_path)
    good = {**PAIR, "id": "good", "image": ["a.png", "c.png"]}
    work, bad = progress.readable([PAIR, good], lambda rows: [check_image(row, tmp_path) for row in rows], tmp_path, "skip")
    assert (work, bad) == ([None], 1)
    with pytest.raises(BadInput, match="record 'p': "):
        progress.readable([PAIR, good], lambda rows: [check_image(row, tmp_path) for row in rows], tmp_path, "stop")


def test_the_window_counts_every_image(folder):
    processor = Processor(folder)
    processor.window = len(processor.prompt(MARKED, [9, 9])) + 10
    assert problems_of(PAIR, processor, folder, new_tokens=10) == []
    (found,) = problems_of(PAIR, processor, folder, new_tokens=11)
    assert found.startswith(f"{processor.window - 10} tokens of prompt and image and 11 new ones")


# ------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def greedy(model, processor: Processor, text: str, names: list[str | None], root: Path, steps: int = 6) -> str:
    """An answer token by token, the whole sequence again each time."""
    views, new = [processor.image(name, root) for name in names], []
    pixels, rows = stack(views, model.config.tile_tokens)
    prompt = processor.prompt(text, [len(view.rows) for view in views])
    for _ in range(steps):
        row = model.logits(torch.tensor(prompt + new), pixels, torch.cat(rows))[-1]
        row[processor.image_id] = float("-inf")
        new.append(int(row.argmax()))
    return processor.decode(new[: (new + [processor.eos_id]).index(processor.eos_id)])


@every_family
def test_answers_are_those_of_one_at_a_time(folder):
    """However often an image is shown; the order of images matters."""
    model, processor = load_llava(folder), Processor(folder)
    shown = [["a.png", "b.png"], ["b.png", "a.png"], "a.png", None, ["a.png", "b.png"]]
    asked = [MARKED, MARKED, "a dog", "a dog", "a dog"]
    together = answers(model, processor, shown, asked, max_new_tokens=6, root=folder)
    alone = [[greedy(model, processor, text, names if isinstance(names, list) else [names], folder)]
             for names, text in zip(shown, asked)]
    assert together == alone and together[0] != together[1]
    assert len(processor.show(shown, folder)[0]) == 3


def test_samples_judges_and_completions(folder):
    """Whoever asks hands all images on: samples while training, a judge, completions with noise."""
    model, processor = load_llava(folder), Processor(folder)
    records = [PAIR, {**PAIR, "id": "q", "image": ["b.png", "a.png"]}]
    first, second = online.sample(model, processor, records, [1, 1], folder, samples=1, temperature=0, max_new_tokens=6)
    assert first != second
    local = ask.local_model(model, processor, "small", max_new_tokens=6, root=folder)
    prompts = [f"{MARKED} Why?", f"{MARKED} Why?"]
    replies = local.ask([ask.Request(record["image"], text) for record, text in zip(records, prompts)])
    assert replies == [local.ask([ask.Request(record["image"], text)])[0] for record, text in zip(records, prompts)]
    noised = []
    bdhs.complete([bdhs.Attempt(record["image"], MARKED, [], 0.0, 3) for record in records], model, processor,
                  noise=lambda image, seed: noised.append(image.size) or image, max_new_tokens=6, temperature=0, root=folder)
    assert noised == [SIZES[name] for record in records for name in record["image"]]


def test_all_images_are_hidden_from_completions(folder, monkeypatch):
    """Eq. 6 draws over the image tokens of all images; with all of them hidden, which images they are does not matter."""
    model, processor = load_llava(folder), Processor(folder)
    prompt = processor.prompt(MARKED, [9, 9])
    hidden = bdhs.draw_mask(prompt, processor.image_id, 1.0, np.random.default_rng(0))
    assert hidden.sum() == 18 and hidden.tolist() == [token == processor.image_id for token in prompt]
    seen = {}
    real = bdhs.generate
    monkeypatch.setattr(bdhs, "generate", lambda *a, **k: seen.update(k, views=a[1]) or real(*a, **k))
    for names in (["a.png", "b.png"], ["b.png", "c.png"]):
        attempts = [bdhs.Attempt(names, MARKED, [], rho, 3) for rho in (1.0, 0.0)]
        bdhs.complete(attempts, model, processor, max_new_tokens=6, temperature=0, root=folder)
        assert seen["shows"] == [(0, 1), (2, 3)] and [int(mask.sum()) for mask in seen["hidden"]] == [18, 0]
        images = [processor.image(name, folder).pixels for name in names * 2]
        assert all(torch.equal(view.pixels, pixels) for view, pixels in zip(seen["views"], images, strict=True))


def test_a_server_gets_the_images_at_their_places(images):
    server = ask.Server("http://x", "m")
    parts = ask._body(server, ask.Request(["a.png", "b.png"], "One <image> or <image>?"), images)["messages"][0]["content"]
    assert [part.get("text", "#") for part in parts] == ["One ", "#", " or ", "#", "?"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    single = ask._body(server, ask.Request("b.png", Q), images)["messages"][0]["content"]
    assert urls[1] == single[0]["image_url"]["url"] != urls[0] and single[1:] == [{"type": "text", "text": Q}]
    blind = ask._body(ask.Server("http://x", "m", images=False), ask.Request(["a.png", "b.png"], Q), images)
    assert blind["messages"][0]["content"] == [{"type": "text", "text": Q}]


# ------------------------------------------------------------------------------------------------------ scenes

SCENES = [{"id": f"s{i}", "image": [f"scene:{3000 + i}", f"scene:{4000 + i}"], "prompt": "Describe the image."}
          for i in range(3)]


def test_two_scenes_show_what_either_shows():
    """An object counts as absent if neither scene has it."""
    def judged(image, text: str):
        return judge_scene({"id": "a", "image": image}, [text])[0]

    names = {name: f"A {name}." for name in ("dog", "cat", "chair", "bowl", "person", "car", "bench", "bird")}
    for text in names.values():
        one, two, both = (judged(image, text).wrong for image in ("scene:3000", "scene:4000", ["scene:3000", "scene:4000"]))
        assert both == min(one, two)
    with pytest.raises(BadInput, match="are unknown"):
        judged(["scene:1", "a.png"], "A dog.")


def test_pairs_of_two_scenes(tmp_path):
    """Ranked by the scenes' judge, written, read, shown on a page and scored."""
    model, processor = load_llava(DEFAULT_MODEL), Processor(DEFAULT_MODEL)
    made, report = make_pairs("rank", model, processor, records=SCENES, samples=3, max_new_tokens=24, progress=False)
    assert report["images"] == 3 and len(made) + sum(report["dropped"].values()) == 3
    pairs = made or [{**SCENES[0], "chosen": "A dog.", "rejected": "A cat.", "rejected_image": None}]
    write(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs
    gallery.write_gallery(tmp_path / "p.html", pairs, root=tmp_path)
    assert (tmp_path / "p.html").read_text().count("<figcaption>image: scene:") == 2 * len(pairs)
    batch = collate(pairs, {"chosen": dict(image="image", response="chosen")}, processor)
    assert len(batch.pixels) == 2 * len(pairs)


def test_training_on_two_scenes(tmp_path):
    """AdaViP starts at ln 3 and moves."""
    rows = [{**row, "chosen": "A dog is here.", "rejected": "A cat is here.", "rejected_image": row["image"][::-1]}
            for row in SCENES]
    path = save(tmp_path / "p.jsonl", *rows)
    words = ["--loss", "adavip", "--data", path, "--out", tmp_path / "run", "--batch-size", 2, "--steps", 2,
             "--log-every", 1, "--eval-scenes", 0, "--lora-rank", 4]
    assert train.main(list(map(str, words))) == 0
    first, second = (json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first == pytest.approx(math.log(3), abs=1e-6) and second != pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize("words", [["--loss", "fisao"], ["--loss", "ppo", "--judge", "clip"]])
def test_clip_looks_at_one_image(words, tmp_path, monkeypatch):
    """Said before a model is loaded."""
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("a model was loaded"))
    path = save(tmp_path / "p.jsonl", *SCENES)
    with pytest.raises(BadInput, match="with CLIP takes one image a record, 3 of 3 have several"):
        train.main([*words, "--data", str(path), "--out", str(tmp_path / "run"), "--batch-size", "2"])


@pytest.mark.parametrize("method", ["realign", "adavip", "povid", "mdpo"])
def test_methods_that_change_the_image_take_one(method):
    mixed = [{**SCENES[0], "id": "one", "image": "scene:1"}, *SCENES]
    with pytest.raises(BadInput) as caught:
        make_pairs(method, records=mixed)
    assert str(caught.value) == f"{method} takes one image a record, 3 of 4 have several (first: 's0')"


@pytest.mark.parametrize(("method", "options", "who"), [
    ("rank", dict(judge="clip"), "--judge clip"), ("corrupt", {}, "--writer scene")])
def test_tools_that_know_one_image(method, options, who):
    with pytest.raises(BadInput, match=f"^{who} takes one image a record, 3 of 3 have several"):
        make_pairs(method, records=SCENES, progress=False, **options)


def test_the_command_refuses_scenes_without_files(tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "s.jsonl", *SCENES)
    words = ["--method", "rank", "--data", str(path), "--out", str(tmp_path / "o.jsonl"), "--format", "trl"]
    monkeypatch.setattr("sys.argv", ["generate_pairs.py", *words])
    with pytest.raises(SystemExit) as ended:
        run_script(generate_pairs.main, "generate_pairs.py")
    assert ended.value.code == 2 and "scenes have no files to point to" in capsys.readouterr().err
