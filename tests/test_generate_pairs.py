"""generate_pairs.py as a whole: every method, interruptions, processes, formats, judges, photographs."""

import json
import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_formats import ROWS, A, B, Q

import generate_pairs
from common import BadInput, check_ranges, meaning, options_of, run_script
from data import scenes
from data.batch import collate
from data.detect import Detection
from data.formats import load
from data.processor import ClipProcessor, Processor
from data.records import PAIR_TEXTS, read_pairs, write_jsonl
from generate_pairs import RANGES, read_arguments, read_input, relocate, run
from generate_pairs import __doc__ as MANUAL
from judges.ask import CUT, Reply, Request, local_model
from judges.scene import judge_scene
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL, load_clip, load_llava
from model.generate import answers
from options import check as check_of_train
from options import pair_problems
from options import read_arguments as read_arguments_of_train
from pairs import bdhs, mdpo, realign, texts, tools
from pairs.methods import METHODS, Method, chain, complete_options, make_pairs, scene_records
from pairs.rank import UNFAITHFUL
from pairs.texts import scene_captions
from pairs.tools import Setting, Tools, with_tools
from prepare import read_records
from train import LOSSES

HOME = Path(__file__).resolve().parents[1]
SEEDS = range(scenes.PAIRS, scenes.PAIRS + 6)
MAKES_PICTURES = ("povid", "mdpo")


@pytest.fixture(scope="module")
def models():
    return (load_llava(DEFAULT_MODEL), Processor(DEFAULT_MODEL),
            load_clip(DEFAULT_CLIP), ClipProcessor(DEFAULT_CLIP))


def make(method: str, models, folder: Path, **more):
    settings = dict(scene_seeds=SEEDS, samples=3, progress=False, folder=folder / "pictures", root=folder)
    return make_pairs(method, *models, **(settings | more))


# ---------------------------------------------------------------------------------------- every method


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_pairs_of_scenes(method, models, tmp_path):
    pairs, report = make(method, models, tmp_path)
    assert report["method"] == method and report["images"] == len(SEEDS)
    images = {pair["image"] for pair in pairs}  # of which sentinel makes several pairs
    assert len(images) + sum(report["dropped"].values()) == len(SEEDS) and len(pairs) == report["pairs"] >= 2
    assert all(pair["source"]["method"] == method for pair in pairs)
    second = () if method in ("rank", "bdhs", "corrupt", "sentinel") else ("rejected_image",)
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl", second) == pairs  # pictures are found from here
    assert all(bool(pair["rejected_image"]) == bool(second) for pair in pairs)
    assert (tmp_path / "pictures").exists() == (method in MAKES_PICTURES)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_cannot_read_a_methods_pairs_says_so_before_they_are_made(method, models, tmp_path):
    """Of all losses: refused early if and only if the pairs themselves would be."""
    pairs, _ = make(method, models, tmp_path, scene_seeds=SEEDS[:3])
    assert {key for pair in pairs for key, value in pair.items() if value is not None} == \
        {*PAIR_TEXTS, "source", *METHODS[method].adds}
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    for loss, recipe in LOSSES.items():
        args = read_arguments_of_train(LOSSES, ["--loss", loss, "--pairs", method])
        found = [*pair_problems(args, recipe)]
        try:
            data = read_records(tmp_path / "pairs.jsonl", recipe)
        except BadInput as error:
            late = str(error)
            (early,) = found
            start, fitting = early.removesuffix(" make").split(", which ")
            assert start.startswith(f"--pairs {method}: {loss} needs ") and method not in fitting.split(", ")
            assert fitting.split(", ") == [other for other in METHODS if not refused(loss, other)]
            assert all(key in start for key in METHODS["symmpo"].adds if f"{key!r} is missing" in late)
            assert ("without a context" in start) == ("continue a 'context'" in late)
            with pytest.raises(BadInput, match=re.escape(early)):
                check_of_train(args, recipe, 1)
        else:
            assert found == []
            if not recipe.samples:
                collate(data.records, recipe.sequences, models[1], tmp_path)


@lru_cache
def refused(loss: str, method: str) -> bool:
    args = read_arguments_of_train(LOSSES, ["--loss", loss, "--pairs", method])
    return bool([*pair_problems(args, LOSSES[loss])])


def test_a_method_of_ones_own_fits_by_what_its_line_says(monkeypatch):
    monkeypatch.setitem(METHODS, "wild", Method([]))
    assert refused("adavip", "wild") and not refused("dpo", "wild")
    monkeypatch.setitem(METHODS, "wilder", Method([], adds=("rejected_image",)))
    assert not refused("adavip", "wilder")


@pytest.mark.parametrize("loss", LOSSES)
def test_the_own_method_of_a_loss_fits_it(loss):
    assert not LOSSES[loss].pairs or not refused(loss, LOSSES[loss].pairs)


def test_the_report_counts_what_the_pairs_say(models, tmp_path):
    pairs, report = make("adavip", models, tmp_path)
    wrong = sum(judge_scene(pair, [pair["chosen"]])[0].wrong > 0 for pair in pairs)
    assert report["hallucinating"] == {"chosen": wrong / len(pairs), "rejected": 1.0}
    lies = sum(judge_scene({**pair, "image": pair["rejected_image"]}, [pair["chosen"]])[0].wrong
               > judge_scene(pair, [pair["chosen"]])[0].wrong for pair in pairs)
    assert report["rejected_image"] == {"contradicts": lies / len(pairs), "gone": 1.0}


@pytest.mark.parametrize("method", ["rank", "realign", "bdhs", "corrupt"])
def test_clean_chosen_drops_what_is_not_faithful_and_nothing_else(method, models, tmp_path):
    usual, report = make(method, models, tmp_path, samples=2)
    clean, counted = make(method, models, tmp_path, samples=2, clean_chosen=True)
    assert clean == [pair for pair in usual if not judge_scene(pair, [pair["chosen"]])[0].wrong] != usual
    assert counted["hallucinating"]["chosen"] == 0 and counted["dropped"][UNFAITHFUL] >= len(usual) - len(clean)


def test_the_scene_writes_chosen_answers(models, tmp_path):
    """No samples, no judge, no policy where it is not needed for more."""
    asked = scene_records(SEEDS)
    assert loads("corrupt", asked, author="scene") == [] and loads("corrupt", asked, clean_chosen=True) == ["model"]
    texts = [reply.text for reply in scene_captions(asked, seed=2)]
    for method in ("corrupt", "bdhs", "realign"):
        pairs, report = make(method, models, tmp_path, author="scene", seed=2)
        assert len(pairs) == len(SEEDS) and [pair["chosen"] for pair in pairs] == texts
        assert {pair["source"]["author"] for pair in pairs} == {"scene"} and report["hallucinating"]["chosen"] == 0


def test_corruption_by_rule_makes_every_answer_wrong_in_its_way(models, tmp_path):
    """An exchanged object is a mention of an absent one; changed counts and positions are none."""
    pairs, _ = make("corrupt", models, tmp_path)
    for pair in pairs:
        wrong = [judge_scene(pair, [pair[key]])[0].wrong for key in ("chosen", "rejected")]
        assert wrong[1] - wrong[0] == (pair["source"]["how"] == "object")
        assert pair["source"]["writer"] == "rules"


def test_what_could_not_be_read_back_is_dropped(tmp_path, monkeypatch):
    """A model writes any token, and a file with NUL or an invisible response would stop the run that reads it."""
    said = ["A cup.", "A \0 cup.", "\u200b", "A dog.", "A cat."]

    def wild_pairs(records):
        return [{**record, "chosen": "A dog.", "rejected": text, "rejected_image": None}
                for record, text in zip(records, said)], Counter()

    monkeypatch.setitem(METHODS, "wild", Method([wild_pairs]))
    pairs, report = make_pairs("wild", scene_seeds=SEEDS[:5], progress=False)
    assert [pair["rejected"] for pair in pairs] == ["A cup.", "A cat."]
    assert report["dropped"] == {"a text that cannot be read back": 3} and report["pairs"] == 2
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs


def test_given_texts_stay(models, tmp_path):
    """adavip, povid and mdpo keep both texts and load no model, symmpo keeps both; realign, bdhs and corrupt keep
    `chosen`."""
    given, _ = make("rank", models, tmp_path)
    given = [{**pair, "rejected_image": "scene:1", "rejected_image_response": "A cup."} for pair in given]
    for method in METHODS.keys() - {"rank", "sentinel"}:
        own = "model" in loads(method, given)
        some = models if own else (None, None, *models[2:])
        pairs, _ = make(method, some, tmp_path, records=given)
        texts = {pair["id"]: pair for pair in given}
        assert own == (method in ("realign", "symmpo", "bdhs"))
        assert pairs and all(pair["chosen"] == texts[pair["id"]]["chosen"] for pair in pairs)
        assert all("A cup." != pair.get("rejected_image_response") for pair in pairs)  # it was about scene 1
        kept = [pair["rejected"] == texts[pair["id"]]["rejected"] for pair in pairs]
        assert all(kept) if method in ("adavip", "symmpo", "povid", "mdpo") else not any(kept)
        assert all(pair["source"]["text"]["method"] == "rank" for pair in pairs)


def loads(method: str, records: list[dict], **more) -> list[str]:
    """Which networks the tools of a method load."""
    asked = []

    class Loads(Tools):
        def get(self, name):
            if name in ("model", "clip"):
                return asked.append(name)
            return "near" if name == "neighbours" and self.get("clip") is None else super().get(name)

    setting = Setting(records, cache=more.pop("cache", None))
    Loads(setting, complete_options(method, more), {"processor": None, "clip_processor": None}).bind(
        chain(method, records))
    return sorted(set(asked))


def test_what_is_loaded():
    """Nothing that the given texts and the options do without."""
    asked = [{"id": str(i), "image": f"scene:{i}", "prompt": Q} for i in range(2)]
    answered = [{**record, "chosen": "A dog."} for record in asked]
    need = {method: loads(method, answered) for method in METHODS}
    assert [method for method, found in need.items() if "model" not in found] == ["povid", "corrupt"]
    assert all("model" in loads(method, asked) for method in METHODS)
    assert loads("corrupt", answered, writer="policy") == ["model"]
    assert loads("corrupt", asked, author="http://x", author_model="m", cache=Path("x")) == []
    assert [method for method in METHODS if "clip" in loads(method, asked)] == ["realign", "adavip", "symmpo", "bdhs"]
    assert "clip" in loads("rank", asked, judge="clip")


def test_noise_takes_the_place_of_the_mask(models, tmp_path):
    pairs, _ = make("bdhs", models, tmp_path, noise=True, noise_step=900)
    assert pairs and all((p["source"]["rho"], p["source"]["noise_step"]) == (0.0, 900) for p in pairs)


def test_an_approximate_index_reports_its_recall(models, tmp_path):
    """One cell holds everything: nothing is missed, and the pairs are those of the exact index."""
    exact, _ = make("realign", models, tmp_path, samples=1)
    pairs, report = make("realign", models, tmp_path, samples=1, nprobe=1)
    assert report["recall"] == 1.0 and pairs == exact
    with pytest.raises(ValueError, match="nprobe 2: must be between 1 and the number of cells, 1"):
        make("realign", models, tmp_path, nprobe=2)


def test_embeddings_are_kept(models, tmp_path, monkeypatch):
    first, _ = make("realign", models, tmp_path, cache=tmp_path / "cache")
    monkeypatch.setattr("retrieval.cache.embed_images", None)  # nothing is left to be embedded
    assert make("realign", models, tmp_path, cache=tmp_path / "cache")[0] == first


def test_another_similarity(models, tmp_path, monkeypatch):
    """A sentence encoder to which all texts are equal: no completion is unlike enough."""

    class Same:
        def __init__(self, name, device):
            assert name == Path("mpnet")

        def similarity(self, left, right):
            return [1.0 for _ in left]

    monkeypatch.setattr(tools, "SentenceEncoder", Same)
    pairs, report = make("realign", models, tmp_path, sentence_model=Path("mpnet"), top_k=1)
    assert not pairs and report["dropped"] == {"no completion below similarity 0.95": len(SEEDS)}
    pairs, _ = make("bdhs", models, tmp_path, sentence_model=Path("mpnet"), iterations=2)
    assert pairs and not any(pair["source"]["guided"] for pair in pairs)


# ---------------------------------------------------------------------------------------- judges


def test_judges(models, tmp_path):
    for judge in ("clip", "policy"):
        pairs, _ = make("rank", models, tmp_path, judge=judge)
        assert all(pair["source"]["judge"] == judge and "score" in pair["source"]["chosen"] for pair in pairs)
        assert judge == "policy" or len(pairs) == len(SEEDS)
    other, _ = make("rank", models, tmp_path, judge=str(DEFAULT_MODEL))  # by its folder
    assert [{**p, "source": {**p["source"], "judge": "policy"}} for p in other] == pairs
    assert all(pair["source"]["judge"] == str(DEFAULT_MODEL) for pair in other)


def test_another_local_writer_is_named_in_the_records():
    made = Tools(Setting([]), complete_options("corrupt", {"writer": str(DEFAULT_MODEL)}), {})
    made.get("writer")
    assert made.get("source") == {"writer": str(DEFAULT_MODEL)}


def test_a_model_that_judges_and_writes_is_loaded_once(monkeypatch):
    loads = []
    monkeypatch.setattr(tools, "load_llava", lambda *what: loads.append(what))
    ask = tools.asked(None, None, tools.Setting([], dtype="bf16", device="cuda:1"), {})
    for _ in ("judge", "author", "writer"):
        ask(str(DEFAULT_MODEL), None)
    assert loads == [(str(DEFAULT_MODEL), "bf16", "cuda:1")]


def test_a_stronger_model_writes_the_chosen_answers(models, tmp_path):
    """Its greedy answers become `chosen`; nobody has to judge samples, so photographs need no judge."""
    said = answers(*models[:2], [scenes.reference(seed) for seed in SEEDS], [scenes.CAPTION_PROMPT] * len(SEEDS))
    for method in ("corrupt", "bdhs"):
        pairs, _ = make(method, models, tmp_path, author=str(DEFAULT_MODEL))
        texts = {f"scene-{seed}": text for seed, (text,) in zip(SEEDS, said)}
        assert pairs and all(pair["chosen"] == texts[pair["id"]] for pair in pairs)
        assert all(pair["source"]["author"] == str(DEFAULT_MODEL) for pair in pairs)
        assert not any("judge" in pair["source"] for pair in pairs)


def test_a_server_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("judges.ask.time.sleep", lambda _: None)
    command = ["generate_pairs.py", "--scenes", "2", "--samples", "2", "--judge", "http://127.0.0.1:9/v1",
               "--judge-model", "some-vlm", "--out", str(tmp_path / "p.jsonl")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        run_script(generate_pairs.main, "generate_pairs.py", "; go on with --resume")
    assert ended.value.code == 2 and not (tmp_path / "p.jsonl").exists()
    assert "http://127.0.0.1:9/v1/chat/completions: no answer after 6 tries" in capsys.readouterr().err


def test_a_server_needs_a_name_and_a_cache(models, tmp_path):
    url = "http://127.0.0.1:9/v1"
    for more, reason in [({"judge": url}, "--judge URL and --judge-model NAME belong together"),
                         ({"judge": "a/me"}, "a/me: no such folder"),
                         ({"judge": url, "judge_model": "m"}, "needs a folder that keeps its replies")]:
        with pytest.raises(ValueError, match=reason):
            make("rank", models, tmp_path, **more)


# ---------------------------------------------------------------------------------------- long runs


def test_an_interrupted_run_goes_on(models, tmp_path, monkeypatch):
    """Six records in chunks of two, stopped in the second chunk: the second run samples two chunks only."""
    whole, report = make("povid", models, tmp_path)
    sample, calls = texts.answers, []

    def stopping(**arguments):
        calls.append(len(arguments["images"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(**arguments)

    monkeypatch.setattr(texts, "answers", stopping)
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        make("povid", models, tmp_path, out=out, batch_size=2)
    with pytest.raises(ValueError, match="other settings"):
        make("povid", models, tmp_path, out=out, batch_size=2, seed=1)
    calls[:] = [0, 0]
    again, second = make("povid", models, tmp_path, out=out, batch_size=2)
    assert calls == [0, 0, 2, 2]
    assert json.dumps(again) == json.dumps(whole) and second == report


def test_two_processes_write_the_same_file(tmp_path):
    """Under torchrun, through the command line: byte for byte, and no part file stays."""
    command = ["--method", "realign", "--scenes", "6", "--samples", "2"]
    run(read_arguments([*command, "--out", str(tmp_path / "one" / "p.jsonl")]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
              str(HOME / "generate_pairs.py"), *command, "--out", str(tmp_path / "two" / "p.jsonl")]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("pairs of 6 images") == 1
    assert (tmp_path / "one" / "p.jsonl").read_bytes() == (tmp_path / "two" / "p.jsonl").read_bytes()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["cache", "p.jsonl"]


# ---------------------------------------------------------------------------------------- files


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two pictures with a red square each, pairs about them, and COCO's record of the squares."""
    folder = tmp_path / "in"
    folder.mkdir()
    rows, images, squares = [], [], []
    for i, name in enumerate(("one.png", "two.png")):
        pixels = np.full((60, 80, 3), 200, np.uint8)
        pixels[20:40, 30:50] = 255, 0, 0
        Image.fromarray(pixels).save(folder / name)
        rows.append({"id": str(i), "image": name, "prompt": Q, "chosen": "A red ball.", "rejected": B})
        images.append({"id": i, "file_name": name, "width": 80, "height": 60})
        squares.append({"id": i, "image_id": i, "category_id": 1,
                        "segmentation": [[30, 20, 50, 20, 50, 40, 30, 40]]})
    write_jsonl(folder / "pairs.jsonl", rows)
    coco = {"images": images, "annotations": squares, "categories": [{"id": 1, "name": "sports ball"}]}
    (folder / "instances.json").write_text(json.dumps(coco))
    return folder


def test_objects_are_removed_from_photographs(photos, tmp_path):
    """With the square and a rim of 2 pixels gone, the harmonic fill leaves the plain background."""
    out = tmp_path / "out" / "p.jsonl"
    report = run(read_arguments([
        "--method", "adavip", "--data", str(photos / "pairs.jsonl"), "--out", str(out), "--gallery",
        "--detector", str(photos / "instances.json"), "--dilation", "5", "--clip-model", str(DEFAULT_CLIP)]))
    pairs = read_pairs(out, {"rejected_image"})
    assert len(pairs) == report["pairs"] == 2 and "hallucinating" not in report
    for pair in pairs:
        assert pair["image"].startswith("../in/") and pair["rejected_image"].startswith("p-images/")
        assert np.unique(np.array(Image.open(out.parent / pair["rejected_image"]))).tolist() == [200]
        (candidate,) = pair["source"]["candidates"]
        assert candidate["removed"] == "sports ball" and candidate["image"] == pair["rejected_image"]
        assert pair["source"]["fill"] == "harmonic, without weights" and "model" not in pair["source"]
    page = out.with_suffix(".html").read_text()
    assert page.count("<img") == 6 and page.count("what could be removed") == 2  # image, its objects, one without
    assert report["fill"].startswith("harmonic: no inpainting weights")
    assert not list(out.parent.glob("*.part-*"))


def test_the_papers_detector(photos, tmp_path, monkeypatch):
    """Weights that are missing are all named; what was found and by which thresholds is in the pairs; an image without
    objects is counted."""
    command = ["--method", "adavip", "--data", str(photos / "pairs.jsonl"), "--clip-model", str(DEFAULT_CLIP),
               "--out", str(tmp_path / "p.jsonl"), "--detector", "ram+dino+sam", "--ram-tags", "tags.txt"]
    with pytest.raises(BadInput) as error:
        run(read_arguments(command))
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "--ram", "tags.txt", "--dino", "--dino-tokenizer", "--sam"]
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[20:40, 30:50] = True
    asked = []

    def made(files, **settings):
        asked.append((files, settings))
        return lambda reference, image: [] if "two" in reference else [Detection("ball", 0.9, (30, 20, 50, 40), mask)]

    monkeypatch.setattr("networks.chain.ram_dino_sam", made)
    report = run(read_arguments([*command, "--box-threshold", "0.5", "--dilation", "5", "--ram", "r", "--sam", "s"]))
    (pair,) = read_pairs(tmp_path / "p.jsonl", {"rejected_image"})
    assert pair["source"]["thresholds"] == {"tag_threshold": 0.68, "box_threshold": 0.5, "overlap": 0.7}
    assert pair["source"]["detector"] == "ram+dino+sam" and sum(report["dropped"].values()) == 1
    files, settings = asked[0]
    assert (files["ram"], files["ram_tags"], files["sam"]) == (Path("r"), Path("tags.txt"), Path("s"))
    assert settings == {"tag_threshold": 0.68, "box_threshold": 0.5, "overlap": 0.7, "device": "cpu"}


def test_what_nobody_knows_about_photographs(photos, tmp_path):
    """Refused before anything is written: another command must not meet the part files of this one."""
    clip = ["--clip-model", str(DEFAULT_CLIP)]
    for method, more, reason in [("adavip", clip, "photographs need a detector"), ("corrupt", [], "only a model can corrupt"),
                                 ("realign", [], "photographs need --clip-model DIR: the embedded CLIP knows scenes only")]:
        with pytest.raises(ValueError, match=reason):
            run(read_arguments(["--method", method, "--data", str(photos / "pairs.jsonl"),
                                "--out", str(tmp_path / "out" / "p.jsonl"), *more]))
    assert not (tmp_path / "out").exists()


def test_the_columns_of_trl(photos, tmp_path):
    out = tmp_path / "p.jsonl"
    run(read_arguments(["--method", "mdpo", "--data", str(photos / "pairs.jsonl"), "--out", str(out),
                        "--format", "trl"]))
    found = load(out).records
    assert [(p["chosen"], p["rejected"]) for p in found] == [("A red ball.", B)] * 2
    assert all(Path(p["rejected_image"]).parent == tmp_path / "p-images" for p in found)


def test_parquet_with_drawn_pictures(tmp_path):
    pytest.importorskip("pyarrow")
    out = tmp_path / "p.parquet"
    report = run(read_arguments(["--scenes", "4", "--samples", "2", "--format", "trl", "--out", str(out)]))
    assert len(load(out).records) == report["pairs"]


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_read(name, photos, tmp_path):
    file = photos / "data.json"
    file.write_text(json.dumps([ROWS[name]]))
    if name == "llava":
        (record,), root = read_input(read_arguments(["--data", str(file)]))
        assert (record["chosen"], root) == (A, photos)
        return
    with pytest.raises(ValueError, match="rank makes the text pairs itself: give images and questions, not pairs"):
        run(read_arguments(["--data", str(file), "--out", str(tmp_path / "p.jsonl")]))
    out = tmp_path / "p.jsonl"
    run(read_arguments(["--method", "mdpo", "--data", str(file), "--out", str(out)]))
    (pair,) = read_pairs(out, {"rejected_image"})
    assert (pair["prompt"], pair["chosen"], pair["rejected"], pair["image"]) == (Q, A, B, "in/one.png")
    assert pair["rejected_image"].startswith("p-images/")


def test_pictures_that_are_lists_as_candidates_move_too(tmp_path):
    row = {"image": "a.png", "rejected_image": "b.png",
           "source": {"candidates": [{"image": "b.png", "score": 1}]}}
    (moved,) = relocate([row], tmp_path / "in", tmp_path / "out")
    assert moved == {"image": "../in/a.png", "rejected_image": "../in/b.png",
                     "source": {"candidates": [{"image": "../in/b.png", "score": 1}]}}
    assert row["source"]["candidates"][0]["image"] == "b.png"


@pytest.mark.parametrize(("arguments", "reason"), [
    (["--judge", "nobody"], "--judge 'nobody' is none of scene, chair, clip, policy, a LLaVA folder or hub id, or a server's"),
    (["--method", "corrupt", "--writer", "clip"], "--writer 'clip' is none of scene, policy, a LLaVA folder"),
    (["--judge", "no/where/at/all"], "no/where/at/all: no such folder, and not a hub id"),
    (["--method", "adavip", "--detector", "cats"], "'cats' is none of scene, ram+dino+sam, maskrcnn or a .json file"),
    (["--judge", "http://x/v1"], "--judge URL and --judge-model NAME belong together"),
    (["--method", "povid", "--writer-model", "x"], "--writer URL and --writer-model NAME belong together"),
    (["--method", "adavip", "--dilation", "4"], "--dilation 4: must be odd"),
    (["--author", "model/tiny"], "unrecognized arguments: --author"),
    (["--judge", "clip", "--clean-chosen"], "--judge clip only compares responses: choose scene or chair"),
    (["--format", "trl", "--out", "x.jsonl"], "scenes have no files to point to"),
    (["--out", "x.parquet"], "written with --format trl"),
    (["--method", "adavip", "--detector", "nowhere.json"], "nowhere.json: not found"),
    (["--method", "bdhs", "--sentence-model", "nowhere"], "nowhere: no such folder"),
    (["--method", "povid", "--noise-step", "1000"], "--noise-step must be in [0, 999], not 1000"),
    (["--method", "adavip", "--samples", "1"], "--samples must be in [2, 1e9], not 1"),
    (["--temperature", "0"], "--temperature must be in (0, 10], not 0"),
    (["--seed", "-1"], "--seed must be in [0, 1e9], not -1"),
    (["--out", "/dev/null/x.jsonl"], "/dev/null/x.jsonl: cannot be written (Not a directory)"),
    (["--out", ".", "--overwrite"], ".: cannot be written (it is no regular file)"),
    (["--cache", "/dev/null/x"], "--cache /dev/null/x: cannot be written (Not a directory)"),
    (["--out", "x.html", "--gallery"], "x.html: --gallery writes its page there"),
    (["--scenes", "1000001"], "--scenes 1000001: a split has 1,000,000"),
    (["--device", "gpu"], "--device 'gpu' is none of cpu, cuda, cuda:1"),
    (["--device", "cuda:99"], "--device cuda:99: torch finds"),
    (["--rho", "1"], "unrecognized arguments"),
    (["--resume"], "--resume: there are no part files of runs/pairs-rank.jsonl"),
    (["--resume", "--overwrite"], "which of them?"),
])
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["generate_pairs.py", "--scenes", "2", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_script(generate_pairs.main, "generate_pairs.py", "; go on with --resume")
    assert ended.value.code == 2 and reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # nothing is left behind


# ---- bad records ---------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Six pairs; of the fourth one's picture only the header is whole."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(6):
        scenes.open_scene(f"scene:{scenes.PAIRS + i}").save(folder / f"{i}.bmp")
    (folder / "3.bmp").write_bytes((folder / "3.bmp").read_bytes()[:900])
    write_jsonl(folder / "pairs.jsonl", [
        {"id": f"r{i}", "image": f"{i}.bmp", "prompt": Q, "chosen": "A dog and a car on the grass.", "rejected": B}
        for i in range(6)])
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("method", ["mdpo", "realign"])
def test_a_damaged_picture_stops_the_run_or_is_dropped(method, damaged, tmp_path):
    """`stop` names the record and keeps what is done; the same command with `skip` goes on and counts it."""
    out = tmp_path / "p.jsonl"
    command = ["--method", method, "--data", str(damaged), "--out", str(out), "--clip-model", str(DEFAULT_CLIP),
               "--batch-size", "2", *(["--tau", "1"] if method == "realign" else [])]
    with pytest.raises(ValueError, match="record 'r3': .*3.bmp: not a readable image .*--bad-records skip"):
        run(read_arguments(command))
    assert not out.exists()
    if method == "mdpo":
        assert "r0" in (tmp_path / "p.jsonl.part-0").read_text()
    report = run(read_arguments([*command, "--bad-records", "skip"]))
    assert report["dropped"].pop("unreadable image") == 1
    assert report["pairs"] + sum(report["dropped"].values()) == 5
    assert all("3.bmp" not in (pair["image"], pair["rejected_image"]) for pair in read_pairs(out))
    assert method == "realign" or report["pairs"] == 5


def test_an_error_that_no_picture_explains_is_not_skipped(models, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("something else")

    monkeypatch.setattr(texts, "answers", fail)
    with pytest.raises(ValueError, match="^something else$"):
        make("rank", models, tmp_path, bad_records="skip")


@pytest.mark.parametrize(("method", "change", "reason"), [
    ("bdhs", {"chosen": "It says <unk>."}, "'chosen': text contains the special token <unk>"),
    ("realign", {"prompt": "<s>"}, "'prompt': text contains the special token <s>"),
    ("realign", {"chosen": "A dog. " * 400}, "'chosen': .* tokens with prompt and image, the decoder takes 1024"),
    ("bdhs", {"prompt": "What? " * 450}, "972 tokens of prompt and image and 96 new ones .--max-new-tokens."),
])
def test_texts_are_refused_before_the_model_is_loaded(damaged, tmp_path, monkeypatch, method, change, reason):
    monkeypatch.setattr(tools, "load_llava", None)
    rows = read_pairs(damaged)
    write_jsonl(damaged, [{**row, **change} if row["id"] in ("r1", "r4") else row for row in rows])
    with pytest.raises(ValueError, match=f"(?s)pairs.jsonl: record 'r1': {reason}.*: record 'r4': {reason}"):
        run(read_arguments(["--method", method, "--data", str(damaged), "--out", str(tmp_path / "p.jsonl"),
                            "--clip-model", str(DEFAULT_CLIP)]))


def test_an_answer_that_leaves_no_room_is_no_completion(models):
    """It is dropped alone; what stands beside it is written as if it were not there."""
    model, processor = models[:2]
    long = "Yes" + ", yes" * 500 + ". A dog."
    rows = [{"id": name, "image": "scene:5", "prompt": Q, "chosen": text}
            for name, text in (("long", long), ("short", "A dog is there. It runs on the grass."))]
    complete = partial(bdhs.complete, model=model, processor=processor, max_new_tokens=24)
    attempts = [bdhs._attempt(row, 1, False, 0.9, 0.5, 0) for row in rows]
    assert complete(attempts) == [None, *complete(attempts[1:])]
    jobs = [realign.Job("scene:5", Q, row["chosen"], realign.mask_words(row["chosen"])) for row in rows]
    fill = partial(realign.infill, model=model, processor=processor)
    assert fill(jobs)[0] == long and fill(jobs)[1] == fill(jobs[1:])[0]


def test_questions_that_a_local_model_cannot_be_asked_are_problems_of_their_own(models):
    model, processor = models[:2]
    ask = local_model(model, processor, "tiny", max_new_tokens=8).ask
    good = Request("scene:5", Q)
    replies = ask([Request("scene:5", "<s>"), good, Request("scene:5", "What? " * 600)])
    assert [reply.problem for reply in replies[::2]] == ["a special token in the question",
                                                         "question longer than the model's window"]
    assert replies[1:2] == ask([good]) and [reply.text for reply in ask([Request("scene:5", "<s>")])] == [""]


def test_bad_texts_are_named_before_any_work(photos, tmp_path):
    rows = [json.loads(line) for line in (photos / "pairs.jsonl").read_text().splitlines()]
    rows[1]["chosen"] = "A dog \ud83d"
    (photos / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="bad.jsonl:2: 'chosen' holds half a character"):
        run(read_arguments(["--method", "mdpo", "--data", str(photos / "bad.jsonl"),
                            "--out", str(tmp_path / "p.jsonl")]))
    (photos / "images.jsonl").write_text(json.dumps({"id": "a", "image": "one.png", "prompt": Q}))
    with pytest.raises(ValueError, match="the contents of 'one.png' are unknown, so --judge scene"):
        run(read_arguments(["--data", str(photos / "images.jsonl"), "--out", str(tmp_path / "p.jsonl")]))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ---- the rule: a signature says it all -------------------------------------------------------------------------


def test_the_manual_lists_every_method():
    assert [line.split()[0] for line in MANUAL.splitlines() if line[4:].startswith(tuple(METHODS))] == list(METHODS)


def test_every_option_has_a_meaning_and_a_range():
    """The tables in the headers of the files name all options."""
    for method, (functions, _) in METHODS.items():
        found = options_of(*with_tools(*functions))
        assert [name for name in found if not meaning(name, *with_tools(*functions))] == []
        numbers = {name for name, (_, default) in found.items() if type(default) in (int, float)}
        assert numbers <= set(" ".join(RANGES.values()).split()), method


def test_a_method_begins_where_the_records_are():
    asked, answered, paired = {}, {"chosen": "A"}, {"chosen": "A", "rejected": "B"}
    lengths = {method: [len(chain(method, [{"id": "a", **more}])) for more in (asked, answered, paired)]
               for method in METHODS if method not in ("rank", "sentinel")}
    assert lengths == {"realign": [2, 1, 1], "adavip": [2, 2, 1], "symmpo": [2, 2, 1], "bdhs": [2, 1, 1], "povid": [3, 2, 1],
                       "mdpo": [2, 2, 1], "corrupt": [2, 1, 1]}


def test_functions_get_the_tools_and_options_that_they_ask_for_by_name(models, tmp_path, monkeypatch):
    """A method of one's own needs no more than a line in the table."""
    def shout(pairs: list[dict], root: Path, models: dict, *, marks: int = 2):
        return [{**pair, "rejected": pair["chosen"] + "!" * marks, "source": {"method": "shout", **models}}
                for pair in pairs[1:]], Counter({"the first": 1})

    monkeypatch.setitem(METHODS, "shout", Method([*METHODS["rank"].functions, shout]))
    pairs, report = make("shout", models, tmp_path, marks=3, batch_size=6)
    assert report["dropped"]["the first"] == 1 and all(p["rejected"] == p["chosen"] + "!!!" for p in pairs)
    with pytest.raises(BadInput, match="shout has no option tau"):
        make("shout", models, tmp_path, tau=0.5)


def test_ranges():
    """Round brackets leave the end out; what is said of one function wins; NaN is in no interval."""
    def half():
        pass

    ranges = {"[0, 1)": "x y", "[0, 1]": "half.x", "(0, inf)": "z"}
    check_ranges({"x": 0.0, "y": 0.5, "z": 1e-9, "name": "text", "flag": True}, ranges)
    check_ranges({"x": 1.0}, ranges, half)
    for name, value in (("x", 1.0), ("y", -0.1), ("z", 0), ("z", float("inf")), ("x", float("nan"))):
        with pytest.raises(BadInput, match=f"--{name} must be in .* not {value}"):
            check_ranges({name: value}, ranges)
    with pytest.raises(BadInput, match="^--x must be in .*\n--y must be in .*$"):
        check_ranges({"x": 1.0, "y": -0.1, "z": 1.0}, ranges)


def test_every_record_has_a_seed_of_its_own():
    made = Tools(Setting([{"id": "a"}, {"id": "b"}]), complete_options("rank", {"seed": 7}),
                 {"model": None, "processor": None})
    assert made.get("sample").keywords["seeds"] == {"a": 7, "b": 8}


def test_records_without_a_chosen_response_are_dropped_and_counted():
    replies = [Reply("Yes."), Reply("", CUT), Reply("")]
    kept, dropped = texts.chosen_responses([{"id": name} for name in "abc"], lambda records: replies)
    assert kept == [{"id": "a", "chosen": "Yes."}] and dropped == {CUT: 1, "an empty response": 1}


def test_an_author_has_nothing_to_write_where_answers_are_given(photos, tmp_path):
    with pytest.raises(BadInput, match="(?s)^--author is for chosen responses.*\n--clean-chosen is for .* bring theirs"):
        run(read_arguments(["--method", "bdhs", "--author", str(DEFAULT_MODEL), "--data", str(photos / "pairs.jsonl"),
                            "--clean-chosen", "--out", str(tmp_path / "p.jsonl")]))


def test_former_names_of_data():
    for name in ("--data", "--images", "--pairs"):
        assert read_arguments([name, "x.jsonl"]).data == Path("x.jsonl")


def test_what_out_holds_is_replaced_on_demand_only(photos, tmp_path, monkeypatch, capsys):
    """A finished file is kept; part files are gone on with, also when --resume says so, and dropped by --overwrite."""
    out = tmp_path / "p.jsonl"
    command = ["--method", "mdpo", "--data", str(photos / "pairs.jsonl"), "--out", str(out), "--batch-size", "1"]
    run(read_arguments(command))
    whole = out.read_bytes()
    with pytest.raises(BadInput, match="p.jsonl exists: choose another --out, or replace it with --overwrite"):
        run(read_arguments([*command, "--seed", "1"]))
    store, calls = mdpo.store, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return store(*arguments)

    monkeypatch.setattr(mdpo, "store", stopping)
    monkeypatch.setattr("sys.argv", ["generate_pairs.py", *command, "--overwrite"])
    with pytest.raises(SystemExit) as ended:
        run_script(generate_pairs.main, "generate_pairs.py", "; go on with --resume")
    assert ended.value.code == 1 and "interrupted; go on with --resume" in capsys.readouterr().err
    with pytest.raises(BadInput, match="other settings"):
        run(read_arguments([*command, "--resume", "--seed", "1"]))
    run(read_arguments([*command, "--resume"]))
    assert len(calls) == 3 and out.read_bytes() == whole
    run(read_arguments([*command, "--overwrite", "--seed", "1"]))
    assert out.read_bytes() != whole and len(calls) == 5
    (tmp_path / "p.jsonl.part-0").write_text('{"settings": "others"}\n{"ids": []}\n')
    run(read_arguments([*command, "--overwrite"]))
    assert out.read_bytes() == whole
