"""Pair making: ranking, masking and filling in, removal, and the command line."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import BadInput, run_script
from data import scenes
from data.processor import ClipProcessor, Processor
from data.records import read_pairs, write_jsonl
from data.sentences import sentences
from generate_pairs import main, read_arguments, relocate, run
from judges.ask import Reply
from judges.clip import clip_similarity
from judges.scene import judge_scene
from judges.scores import Judgement, Score, one_by_one
from metrics import claims
from metrics.chair import load_synonyms, mentions
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL, load_clip, load_llava
from model.generate import generate
from pairs.adavip import adavip_pairs, candidate_scores, mentions_of, scene_candidates
from pairs.methods import make_pairs
from pairs.rank import UNFAITHFUL, rank_pairs
from pairs.realign import Job, algorithm_1, fill, infill, mask_words, suit
from pairs.symmpo import symmetric_pairs
from pairs.texts import best_responses, chosen_responses, names_another, scene_captions

HOME = Path(__file__).resolve().parents[1]
SEEDS = range(scenes.PAIRS, scenes.PAIRS + 12)


def record(seed: int = 1_000_000, **more) -> dict:
    return {"id": f"scene-{seed}", "image": f"scene:{seed}", "prompt": scenes.CAPTION_PROMPT} | more


# ---------------------------------------------------------------------------------------- ranking


def judge_by(judgements: dict[str, tuple[int, int]]):
    return one_by_one(lambda _, answers: [Judgement(*judgements[answer]) for answer in answers])


def test_best_against_worst():
    """(wrong, right): a and c have the fewest wrong claims, c more right; b and d the most, b fewer right."""
    judge = judge_by({"a": (0, 1), "b": (2, 0), "c": (0, 2), "d": (2, 3)})
    (pair,), dropped = rank_pairs([record()], lambda _: [["a", "b", "c", "d"]], judge, {"seed": 3})
    assert (pair["chosen"], pair["rejected"], pair["rejected_image"]) == ("c", "b", None)
    assert pair["source"] == {"method": "rank", "seed": 3, "samples": 4, "chosen": {"wrong": 0, "right": 2},
                              "rejected": {"wrong": 2, "right": 0}}
    assert not dropped and best_responses([record()], lambda _: [["a", "b", "c", "d"]], judge) == [("c", "")]


def test_pictures_without_a_useful_pair_are_counted():
    judge = judge_by({"good": (0, 2), "poor": (0, 1), "bad": (1, 1), "bad too": (1, 1), " ": (0, 0),
                       "": (0, 0)})
    answers = [["good", "poor"], ["bad", "bad too"], ["bad", " ", ""], ["bad", "good"]]
    pairs, dropped = rank_pairs([record(seed) for seed in range(4)], lambda _: answers, judge)
    assert [pair["id"] for pair in pairs] == ["scene-3"]
    assert dropped == {"no response hallucinates": 1, "all responses judged equal": 1,
                       "fewer than two non-empty responses": 1}
    assert best_responses([record()], lambda _: [["", " "]], judge) == [("", "no finished response, or no verdict")]


def test_a_clean_chosen_answer_is_asked_for():
    """Of the best answers the first is faithful, the second is not; of a score that is not known."""
    judge = judge_by({"good": (0, 2), "poor": (1, 1), "bad": (2, 1)})
    answers = [["poor", "good"], ["bad", "poor"]]
    pairs, dropped = rank_pairs([record(seed) for seed in range(2)], lambda _: answers, judge, clean_chosen=True)
    assert [(pair["id"], pair["chosen"]) for pair in pairs] == [("scene-0", "good")] and dropped == {UNFAITHFUL: 1}
    assert len(rank_pairs([record(seed) for seed in range(2)], lambda _: answers, judge)[0]) == 2
    scores = one_by_one(lambda _, answers: [Score(float(len(answer))) for answer in answers])
    assert rank_pairs([record()], lambda _: answers[1:], scores, clean_chosen=True) == ([], {UNFAITHFUL: 1})


def test_a_referee_keeps_unfaithful_records_out():
    """It sees the chosen answers alone, not the record without one; what has no verdict is not known to be faithful."""
    asked = []

    def referee(records, answers):
        asked.extend(zip([record["id"] for record in records], answers, strict=True))
        return [None if texts == ["odd"] else [Judgement(len(text) - 2, 0) for text in texts] for texts in answers]

    replies = [Reply(text) for text in ("ok", "three", "", "odd", "so")]
    records = [record(seed) for seed in range(5)]
    kept, dropped = chosen_responses(records, lambda _: replies, referee)
    assert kept == [{**records[0], "chosen": "ok"}, {**records[4], "chosen": "so"}]
    assert dropped == {UNFAITHFUL: 2, "an empty response": 1}
    assert asked == [("scene-0", ["ok"]), ("scene-1", ["three"]), ("scene-3", ["odd"]), ("scene-4", ["so"])]
    assert len(chosen_responses(records, lambda _: replies)[0]) == 4


def test_the_scene_as_author_says_nothing_wrong():
    """By every claim, also where objects are removed; and whatever the order."""
    records = [record(seed) for seed in range(scenes.PAIRS, scenes.PAIRS + 40)]
    removed = max(scenes.objects_present(scenes.sample_scene(scenes.PAIRS)))
    records.append(record(id="removed", image=scenes.reference(scenes.PAIRS, [removed])))
    texts = [reply.text for reply in scene_captions(records, seed=3)]
    figures = claims.score(records, {row["id"]: text for row, text in zip(records, texts)})
    assert figures["all"]["claims"] > 300 and figures["all"]["false"] == figures["captions"]["unread_sentences"] == 0
    assert [reply.text for reply in scene_captions(records[::-1], seed=3)] == texts[::-1]
    assert sum(reply.text == text for reply, text in zip(scene_captions(records), texts)) < 4
    with pytest.raises(BadInput, match="(?s)^p: --author scene describes scenes.*\nq: .* 'Describe the image in detail.'"):
        scene_captions([record(id="p", image="p.png"), records[0], record(id="q", prompt="How many dogs?")])


def test_scene_annotator():
    scene = scenes.sample_scene(1_000_000)
    shown = sorted(scenes.objects_present(scene))
    absent = next(name for name in scenes.CATEGORIES if name not in shown)
    text = f"There is a {shown[0]} and a {shown[0]} and a {absent}. A {absent} again."
    assert judge_scene(record(), [text, "", f"A {shown[0]}, a {shown[1]}."]) == [(2, 1), (0, 0), (0, 2)]
    removed = record(image=scenes.reference(1_000_000, [shown[0]]))
    assert judge_scene(removed, [f"A {shown[0]}."]) == [(1, 0)]
    with pytest.raises(ValueError, match="p1: the contents of 'photo.jpg' are unknown"):
        judge_scene({"id": "p1", "image": "photo.jpg"}, [])


# ---------------------------------------------------------------------------------------- masking


@pytest.mark.parametrize(("text", "hidden"), [
    ("There is a large dog on the left.", ["a large dog", "left"]),
    ("Two small cats are next to an apple, a red potted plant.",
     ["Two small cats", "next to", "an apple", "a red potted plant"]),
    ("A man riding a dog a cat red", ["A man", "riding", "a dog", "a cat red"]),
    ("Sports balls and a traffic light; A hot dog", ["Sports balls", "a traffic light", "A hot dog"]),
    ("It is nice and it is an idea a", []),
    ("", []),
])
def test_mask_words(text, hidden):
    spans = mask_words(text)
    assert [text[start:end] for start, end in spans] == hidden
    assert all(one[1] < two[0] for one, two in zip(spans, spans[1:]))


def test_no_object_of_a_scene_caption_stays_in_sight():
    for seed in SEEDS:
        text = scenes.caption(scenes.sample_scene(seed), random.Random(seed), noise=0.5)
        kept = list(text)
        for start, end in mask_words(text):
            kept[start:end] = "-" * (end - start)
        assert mentions(text, load_synonyms()) and not mentions("".join(kept), load_synonyms())


# ---------------------------------------------------------------------------------------- filling in


@pytest.mark.parametrize(("proposal", "hidden", "new"), [
    ("a small cat on the right.", "a dog", "a small cat"),
    ("There is a small cat", "A dog", "A small cat"),  # the first of its kind, with the same first letter
    ("two cups and a fork", "a dog", "a fork"),  # a phrase with an article for a phrase with an article
    ("There are Two cups. A fork", "dogs", "two cups"),
    ("right of the image", "left", "right"),
    ("above it", "next to", "above"),
    ("on the right", "next to", "next to"),  # nothing of its kind is written: the hidden expression stays
    ("", "a dog", "a dog"),
    ("a cat", "some mask of my own", "some mask of my own"),
])
def test_suit(proposal, hidden, new):
    assert suit(proposal, hidden) == new


def writer(words: list[str], log: list):
    """A model that names the animal that belongs to a job."""

    def write(rows, prefixes):
        log.append([*zip(rows, prefixes, strict=True)])
        return [f"There is {words[row]} on the floor. More" for row in rows]

    return write


def test_fill_goes_from_left_to_right_and_batches_equal_gaps():
    """Answers with two gaps and with one: the second round has the first only, its first gap filled."""
    texts = ["A dog on a bed.", "My cat on it"]
    spans = [[(0, 5), (9, 14)], [(3, 6)]]
    jobs = [Job(image, "p", text, found) for image, text, found in zip("xy", texts, spans)]
    log: list = []
    done = fill([*jobs, Job("x", "p", "Nothing.", [])], writer(["a giraffe", "birds", ""], log))
    assert done == ["A giraffe on a giraffe.", "My birds on it", "Nothing."]
    assert log == [[(0, ""), (1, "My")], [(0, "A giraffe on")]]


def retrieve(alike: dict[str, float], neighbours: list[list[str]], tau=0.95, **options):
    """Run the acceptance rule with a completion that is the neighbour's name and a similarity table."""
    asked: list[list[str]] = []

    def complete(jobs):
        asked.append([job.image for job in jobs])
        return [f"A {job.image}." for job in jobs]

    def similarity(left, right):
        assert all(text == "A dog." for text in left)
        return [alike[text] for text in right]

    records = [record(seed, chosen="A dog.") for seed in range(len(neighbours))]
    found = [[(name, 0.5) for name in names] for names in neighbours]
    return *algorithm_1(records, found, complete, similarity, tau=tau, **options), asked


def test_the_next_neighbour_is_asked_until_one_is_unlike_enough():
    """tau .95 is a strict bound: .95 is too similar. Record 2 runs out of neighbours, record 3 has none."""
    alike = {"A hound.": 0.97, "A wolf.": 0.95, "A cat.": 0.94, "A car.": 0.2}
    pairs, dropped, asked = retrieve(alike, [["car", "cat"], ["hound", "wolf", "cat", "car"], ["wolf"], []])
    assert [(p["id"], p["rejected"], p["rejected_image"]) for p in pairs] == [
        ("scene-0", "A car.", "car"), ("scene-1", "A cat.", "cat")]
    assert [p["source"]["rank"] for p in pairs] == [1, 3] and pairs[1]["source"]["similarity"] == 0.94
    assert dropped == {"no completion below similarity 0.95": 1, "no other image is found": 1}
    assert asked == [["car", "hound", "wolf"], ["wolf"], ["cat"]]


def test_the_next_neighbour_is_asked_until_one_has_a_response_of_its_own():
    """Of image 0 the nearest has y_w again, the next y_l, the third none; image 3 has no other."""
    says = {"a": "A dog.", "b": "A cat.", "c": "", "d": "A cup.", "e": "A cow."}
    near = {"0": "abcd", "1": "ed", "2": "cab", "3": ""}
    asked = []

    def author(records):
        asked.append([(record["id"], record["prompt"], record["image"]) for record in records])
        return [Reply(says[record["image"]]) for record in records]

    pairs = [{"id": f"r{i}", "image": i, "prompt": f"{i}?", "chosen": "A dog.", "rejected": "A cat."} for i in near]
    made, dropped = symmetric_pairs(pairs, lambda image: [(name, 0.5) for name in near[image]], author, {"model": "m"})
    assert [(p["id"], p["image"], p["rejected_image"], p["rejected_image_response"]) for p in made] == [
        ("r0", "0", "d", "A cup."), ("r1", "1", "e", "A cow.")]
    assert all((p["chosen"], p["rejected"]) == ("A dog.", "A cat.") for p in made)
    assert made[0]["source"] == {"method": "symmpo", "model": "m", "rank": 4, "cosine": 0.5, "text": None}
    assert dropped == {"no other image is found": 1, "no response to a similar image": 1}
    assert asked == [[("r0", "0?", "a"), ("r1", "1?", "e"), ("r2", "2?", "c")], [("r0", "0?", "b"), ("r2", "2?", "a")],
                     [("r0", "0?", "c"), ("r2", "2?", "b")], [("r0", "0?", "d")]]


def test_the_next_neighbour_is_asked_until_one_has_a_faithful_response():
    """It is judged by the neighbour, not by the image of the pair."""
    def referee(records, answers):
        return [[Judgement(int(record["image"] == "a"), 1)] for record in records]

    pair = {"id": "r", "image": "0", "prompt": "?", "chosen": "A dog.", "rejected": "A cat."}
    near = [("a", 0.9), ("b", 0.8)]
    author = lambda records: [Reply("A cup.")] * len(records)  # noqa: E731
    for judge, image in ((None, "a"), (referee, "b")):
        (made,), _ = symmetric_pairs([pair], lambda _: near, author, referee=judge)
        assert (made["chosen"], made["rejected_image"], made["rejected_image_response"]) == ("A dog.", image, "A cup.")
    assert symmetric_pairs([pair], lambda _: near[:1], author, referee=referee) == (
        [], {"no response to a similar image": 1})


def test_an_unchanged_answer_is_never_a_rejected_one():
    pairs, dropped, _ = retrieve({"A dog.": 0.9999, "A cat.": 0.9999}, [["dog", "cat"]], tau=1.0)
    assert [pair["rejected"] for pair in pairs] == ["A cat."] and not dropped


def test_without_another_object_the_next_neighbour_is_asked():
    alike, neighbours = {"A big dog.": 0.1, "A lawn.": 0.2, "A cat.": 0.3}, [["big dog", "cat"], ["lawn"]]
    pairs, dropped, _ = retrieve(alike, neighbours, differ=True)
    assert [pair["rejected"] for pair in pairs] == ["A cat."] and dropped == {"no completion below similarity 0.95": 1}
    assert [pair["rejected"] for pair in retrieve(alike, neighbours)[0]] == ["A big dog.", "A lawn."]


def test_answers_without_visual_words_are_dropped():
    nothing = [record(chosen="It is nice.")]
    pairs, dropped = algorithm_1(nothing, [[("x", 0.9)]], lambda *_: [], lambda *_: [])
    assert pairs == [] and dropped == {"nothing to mask": 1}


# ---------------------------------------------------------------------------------------- removal


def test_candidate_scores_by_hand():
    """c_1 = (1, 0), c_2 = (.6, .8); s_1 = (1, 0), s_2 = (0, 1): Score_1 = 1 + 0, Score_2 = .6 + .8."""
    scores = candidate_scores(np.array([[1, 0], [0.6, 0.8]]), np.eye(2))
    assert scores == pytest.approx([1.0, 1.4])


def test_the_candidate_of_least_score_is_taken(monkeypatch):
    """Summed cosines with s_1 = (1, 0), s_2 = (0, 1): a .6 + .8 = 1.4, b 0 + 1 = 1, c .8 + .6 = 1.4: b.

    The second record has one candidate, the third none.
    """
    table = {"a": (0.6, 0.8), "b": (0, 1), "c": (0.8, 0.6), "One dog.": (1, 0), "One cat!": (0, 1)}
    for name in ("pairs.adavip.embed_images", "judges.clip.embed_texts"):
        monkeypatch.setattr(name, lambda x, *_, **__: np.array([table[item] for item in x]))
    options = {"x": [("dog", "a"), ("cat", "b"), ("cow", "c")], "y": [("cow", "c")], "z": []}
    pairs = [{"id": name, "image": name, "chosen": "One dog. One cat!", "rejected": "No."} for name in "xyz"]
    made, dropped = adavip_pairs(pairs, None, None, lambda pair: options[pair["image"]])
    assert [(pair["id"], pair["rejected_image"], pair["rejected"]) for pair in made] == [("x", "b", "No.")]
    assert made[0]["source"]["candidates"] == [
        {"removed": "dog", "image": "a", "score": 1.4, "mentioned": True},
        {"removed": "cat", "image": "b", "score": 1.0, "mentioned": True},
        {"removed": "cow", "image": "c", "score": 1.4, "mentioned": False}]
    assert dropped == {"nothing to remove": 1, "no removed object is mentioned in the chosen response": 1}


def test_what_is_removed_is_an_object_that_the_chosen_answer_mentions(monkeypatch):
    """The cow's picture fits least, but without the cow "A puppy." is as true as before; the paper takes it."""
    table = {"dog": (0.8, 0.6), "cow": (0, 1), "A puppy.": (1, 0)}
    for name in ("pairs.adavip.embed_images", "judges.clip.embed_texts"):
        monkeypatch.setattr(name, lambda x, *_, **__: np.array([table[item] for item in x]))
    pairs = [{"id": "x", "image": "x", "chosen": "A puppy.", "rejected": "No."}]
    options = {"candidates": lambda pair: [("cow", "cow"), ("dog", "dog")]}
    assert adavip_pairs(pairs, None, None, **options)[0][0]["rejected_image"] == "dog"
    assert adavip_pairs(pairs, None, None, any_object=True, **options)[0][0]["rejected_image"] == "cow"


def test_mentions_of_a_class():
    """By CHAIR's synonyms, by the entity list, by its own name; not by a part of another word."""
    text = "Two puppies and a houseplant near a surfboarder's lamp-post, and a Zorble."
    labels = ["dog", "potted plant", "lamp", "zorble", "surfboard", "cat", "(*"]
    assert mentions_of(text, labels) == [True, True, True, True, False, False, False]
    assert mentions_of("A hot dog on a plate.", ["dog", "hot dog"]) == [False, True]


def test_scene_candidates_lack_one_class_each():
    scene = scenes.sample_scene(1_000_000)
    shown = scenes.objects_present(scene)
    found = scene_candidates(record())
    assert {label for label, _ in found} == shown
    for label, reference in found:
        assert scenes.objects_present(*scenes.parse_reference(reference)) == shown - {label}
    with pytest.raises(ValueError, match="cannot remove objects from 'photo.jpg'"):
        scene_candidates({"id": "p", "image": "photo.jpg"})


def test_sentences():
    assert sentences(" A dog. Is it?  Yes! At 3.5 m\n") == ["A dog.", "Is it?", "Yes!", "At 3.5 m"]


# ---------------------------------------------------------------------------------------- all together


@pytest.fixture(scope="module")
def models():
    return (load_llava(DEFAULT_MODEL), Processor(DEFAULT_MODEL),
            load_clip(DEFAULT_CLIP), ClipProcessor(DEFAULT_CLIP))


@pytest.fixture(scope="module")
def made(models):
    options = dict(samples=3, seed=5, progress=False)
    return {method: make_pairs(method, *models, scene_seeds=SEEDS, **options)
            for method in ("rank", "realign", "adavip")}


def test_pairs_of_scenes(made, tmp_path):
    for method, (pairs, report) in made.items():
        assert len(pairs) + sum(report["dropped"].values()) == report["images"] == len(SEEDS)
        assert report["pairs"] == len(pairs) >= 3
        needs = () if method == "rank" else ("rejected_image",)
        write_jsonl(tmp_path / "pairs.jsonl", pairs)
        assert read_pairs(tmp_path / "pairs.jsonl", needs) == pairs


def test_ranked_pairs_tell_truth_from_hallucination(made):
    pairs, report = made["rank"]
    assert report["hallucinating"]["rejected"] == 1.0 > report["hallucinating"]["chosen"]
    for pair in pairs:
        best, worst = judge_scene(pair, [pair["chosen"], pair["rejected"]])
        assert (best.wrong, -best.right) < (worst.wrong, -worst.right)


def test_adavip_keeps_the_text_pairs_and_takes_the_least_score(made, models):
    assert [(p["chosen"], p["rejected"]) for p in made["adavip"][0]] == [
        (p["chosen"], p["rejected"]) for p in made["rank"][0]]
    for pair in made["adavip"][0]:
        listing = pair["source"]["candidates"]
        least = min(listing, key=lambda candidate: candidate["score"])
        taken = next(c for c in listing if c["image"] == pair["rejected_image"])
        assert taken["score"] == least["score"] and pair["source"]["text"]["method"] == "rank"
    again, _ = make_pairs("adavip", *models, records=made["rank"][0], progress=False)
    assert [p["rejected_image"] for p in again] == [p["rejected_image"] for p in made["adavip"][0]]


def test_realign_takes_another_picture_and_an_unlike_answer(made, models):
    similarity = clip_similarity(*models[2:])
    for pair in made["realign"][0]:
        assert pair["rejected_image"] != pair["image"] and pair["rejected_image"].startswith("scene:")
        (alike,) = similarity([pair["chosen"]], [pair["rejected"]])
        assert alike < 0.95 and alike == pytest.approx(pair["source"]["similarity"], abs=1e-3)


def test_another_object():
    """Neither other words, counts and places nor something left out; synonyms are one object."""
    chosen = "There is a large dog on the left. Two bicycles are next to it."
    said = ["A dog.", "Three small bikes are on the right of a dog.", "A dog and a cat.", "A cat.", "Nothing."]
    assert [names_another(text, chosen) for text in said] == [False, False, True, True, False]
    assert names_another(chosen, "A dog.")


def test_rejected_responses_name_another_object(models):
    """Some of what is completed with half of the image tokens hidden does not; it is then written again."""
    other = lambda pair: names_another(pair["rejected"], pair["chosen"])  # noqa: E731
    options = dict(scene_seeds=SEEDS[:8], author="scene", progress=False)
    usual, differing = (make_pairs("bdhs", *models, **options, rho_th=0.5, differ=differ)[0] for differ in (False, True))
    assert not all(map(other, usual)) and all(map(other, differing))
    assert [pair for pair in usual if other(pair)] == [pair for pair in differing if pair in usual] != differing
    assert all(map(other, make_pairs("realign", *models, **options, differ=True)[0]))


def test_the_same_text_is_entirely_similar(models):
    assert clip_similarity(*models[2:])(["A dog. A cat."], ["A dog. A cat."]) == pytest.approx([1.0])


def test_infill_keeps_what_is_not_masked(models):
    text = "There is a dog on the left. There are two cats."
    job = Job(scenes.reference(SEEDS[0]), scenes.CAPTION_PROMPT, text, mask_words(text))
    other = Job(scenes.reference(SEEDS[1]), scenes.CAPTION_PROMPT, "A dog.", [(0, 5)])
    model, processor = models[:2]
    (alone,) = infill([job], model, processor)
    assert re.fullmatch(r"There is .+ on the .+\. There are .+\.", alone)
    for size in (1, 2):
        assert infill([other, job], model, processor, batch_size=size)[1] == alone


def test_infill_computes_an_image_and_its_prompt_once(models, monkeypatch):
    """Two jobs of one image and one of another: what is written equals prompt and text computed again at each gap."""
    text = "There is a dog on the left. There are two cats."
    jobs = [Job(scenes.reference(seed), scenes.CAPTION_PROMPT, said, mask_words(said))
            for seed, said in zip((SEEDS[0], SEEDS[1], SEEDS[0]), (text, "A dog.", "A bus is near a red car."))]
    model, processor = models[:2]
    tiles, encode = [], model.vision_features
    monkeypatch.setattr(model, "vision_features", lambda pixels: (tiles.append(len(pixels)), encode(pixels))[1])
    filled = infill(jobs, model, processor)
    assert tiles == [2]

    def write(rows, prefixes):
        prompts = [processor.prompt(jobs[row].prompt) + processor.opening(prefix)
                   for row, prefix in zip(rows, prefixes)]
        out = generate(model, [processor.image(jobs[row].image) for row in rows], prompts, eos_id=processor.eos_id,
                       max_new_tokens=8)
        return [processor.decode(ids) for (ids,) in out]

    assert filled == fill(jobs, write) and len(set(filled) - {job.text for job in jobs}) > 1


def test_same_seed_same_pairs_whatever_the_batch_size(made, models):
    options = dict(scene_seeds=SEEDS, samples=3, progress=False)
    for method in ("rank", "realign"):
        again, _ = make_pairs(method, *models, **options, seed=5, batch_size=5)
        texts = [[(p["id"], p["chosen"], p["rejected"], p["rejected_image"]) for p in pairs]
                 for pairs in (again, made[method][0])]
        assert texts[0] == texts[1]
    other, _ = make_pairs("rank", *models, **options, seed=99)
    assert [p["rejected"] for p in other] != [p["rejected"] for p in made["rank"][0]]


def test_input_that_a_method_cannot_use(models):
    photo = {"id": "p", "image": "photo.jpg", "prompt": "What?"}
    pair = {**photo, "chosen": "a", "rejected": "b"}
    for method, given, reason in [
        ("none", [photo], "unknown method 'none', there are rank, realign, adavip"),
        ("rank", [], "no images"),
        ("rank", [photo], "the contents of 'photo.jpg' are unknown"),
        ("realign", [photo], "the contents of 'photo.jpg' are unknown"),
        ("realign", [photo, {**photo, "chosen": "A dog."}], "'chosen' is missing in 1 of 2"),
        ("adavip", [pair, {**photo, "chosen": "A dog."}], "'rejected' is missing in 1 of 2"),
        ("rank", [pair], "rank makes the text pairs itself"),
        ("adavip", [pair], "cannot remove objects"),
    ]:
        with pytest.raises(ValueError, match=re.escape(reason)):
            make_pairs(method, *models, records=given)


def test_relative_paths_follow_the_output_file(tmp_path):
    rows = [{"image": "a/x.png", "rejected_image": "/y.png"}, {"image": "scene:1", "rejected_image": None}]
    moved = relocate(rows, tmp_path / "in", tmp_path / "out" / "deep")
    assert moved == [{"image": "../../in/a/x.png", "rejected_image": "/y.png"}, rows[1]]


# ---------------------------------------------------------------------------------------- command line


def test_command_line(tmp_path):
    """The file is the same from another process; the summary counts what is in it; AdaViP builds on it."""
    command = [sys.executable, str(HOME / "generate_pairs.py"), "--scenes", "6", "--samples", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "runs" / "pairs-rank.jsonl"
    pairs = read_pairs(file)
    counts = re.findall(r"(\d+) (?:pairs of|dropped)", done.stdout)
    assert int(counts[0]) == len(pairs) and sum(map(int, counts)) == 6
    assert "100.0 % of the rejected answers" in done.stdout and pairs[0]["source"]["model"] == "model/tiny"
    run(read_arguments([*command[2:], "--out", str(tmp_path / "again.jsonl")]))
    assert (tmp_path / "again.jsonl").read_bytes() == file.read_bytes()
    new = tmp_path / "new" / "a.jsonl"
    run(read_arguments(["--method", "adavip", "--data", str(file), "--out", str(new)]))
    assert len(read_pairs(new, {"rejected_image"})) == len(pairs)


def test_photographs_with_given_answers(tmp_path, monkeypatch):
    """Six pictures on disk, listed with relative paths; the output lies in another folder and finds them."""
    (tmp_path / "in").mkdir()
    rows = []
    for seed in range(6):
        scenes.render(scenes.sample_scene(seed)).resize((120, 100), Image.Resampling.BICUBIC).save(
            tmp_path / "in" / f"{seed}.png")
        rows.append({"id": str(seed), "image": f"{seed}.png", "prompt": "Describe it.",
                     "chosen": "There is a large dog on the left. There are two cups next to a cat."})
    write_jsonl(tmp_path / "in" / "photos.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    arguments = ["--method", "realign", "--data", "in/photos.jsonl", "--out", "out/p.jsonl", "--tau", "1",
                 "--clip-model", str(DEFAULT_CLIP)]
    report = run(read_arguments(arguments))
    pairs = read_pairs(tmp_path / "out" / "p.jsonl", {"rejected_image"})
    assert {pair["chosen"] for pair in pairs} == {rows[0]["chosen"]} and "hallucinating" not in report
    assert all(pair["image"].startswith("../in/") != pair["rejected_image"] for pair in pairs)


@pytest.mark.parametrize(("arguments", "reason"), [
    (["--method", "none"], "invalid choice: 'none'"),
    (["--scenes", "0"], "--scenes must be in [1, 1e9], not 0"),
    (["--method", "realign", "--tau", "1.5"], "--tau must be in [-1, 1], not 1.5"),
    (["--method", "realign", "--tau", "nan"], "--tau must be in [-1, 1], not nan"),
    (["--tau", "0.5"], "unrecognized arguments: --tau 0.5"),
    (["--method", "bdhs", "--overflow", "turn"], "invalid choice: 'turn'"),
    (["--temperature", "hot"], "invalid float value: 'hot'"),
    (["--scene-split", "test"], "invalid choice: 'test'"),
    (["--scenes", "3", "--data", "x.jsonl"], "not allowed with"),
    (["--sample", "3"], "unrecognized arguments"),
    (["--data", "x.jsonl"], "x.jsonl: not found"),
    (["--data", "bad.jsonl"], "bad.jsonl:1: 'prompt' is empty\nbad.jsonl:2: not valid JSON"),
    (["--model", "nowhere"], "nowhere"),
])
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, reason):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"id": "a", "image": "scene:1", "prompt": ""}) + "\n{\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["generate_pairs.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_script(main, "generate_pairs.py")
    assert ended.value.code == 2 and reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
