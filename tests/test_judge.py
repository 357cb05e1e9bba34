"""Models that are asked: a real server with failures, the embedded model; verdicts, ranking, corruption."""

import base64
import io
import json
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from data import scenes
from data.places import PLACES
from data.processor import Processor
from judges.ask import CUT, Model, Reply, Request, Server, kept_model, local_model, read_reply, server_model
from judges.clip import clip_judge
from judges.compare import model_judge, verdict
from judges.scene import judge_scene
from judges.scores import Score
from model.checkpoint import DEFAULT_MODEL, load_llava
from pairs.corrupt import (
    Corruption,
    _change_count,
    _change_position,
    _exchange_object,
    corrupt_pairs,
    model_corrupt,
    scene_corrupt,
)
from pairs.rank import rank_pairs
from pairs.texts import best_responses

SECRET = "sk-very-secret"


class Handler(BaseHTTPRequestHandler):
    """Fails as often as the server's `failures` say, then answers with the text after "Question: "."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.seen.append((self.path, dict(self.headers), body))
            failure = server.failures.pop(0) if server.failures else None
        if failure == "hang up":
            return self.close()
        if str(failure).startswith("drip"):
            return self.drip(failure)
        text = next(p["text"] for p in body["messages"][0]["content"] if p["type"] == "text")
        said = f" said: {text} " if server.say == "" else server.say
        reply = {"choices": [{"message": {"role": "assistant", "content": said, "reasoning_content": "Hm."},
                              "finish_reason": "length" if failure == "cut" else "stop"}]}
        data = failure if isinstance(failure, bytes) else json.dumps(reply).encode()
        if failure == "echo":
            failure, data = 401, f"\x1b[2J\r\n{self.headers['Authorization']} is not known".encode()
        self.send_response(failure if isinstance(failure, int) else 200)
        if failure in (301, 302, 303, 307, 308):
            self.send_header("Location", f"http://127.0.0.1:{server.server_port}/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def drip(self, failure):
        """A byte now and then: no read ever times out."""
        head = {"drip": "200 OK\r\n\r\n", "drip headers": "200 OK\r\nX: ", "drip error": "500 Oh\r\n\r\n"}
        self.wfile.write(f"HTTP/1.1 {head[failure]}".encode())
        for _ in range(100):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.05)

    def close(self):
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.seen, http.failures, http.lock, http.say = [], [], threading.Lock(), ""
    http.handle_error = lambda *_: None  # the hang-ups
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


def asker(server, cache, **more) -> Model:
    url = f"http://127.0.0.1:{server.server_port}/v1/"
    return server_model(Server(url, "judge-7b", **{"wait": 0.005, "timeout": 10, **more}), cache=cache)


def test_what_is_sent(server, tmp_path):
    Image.new("RGB", (300, 150), "red").save(tmp_path / "p.jpg")
    url = f"http://127.0.0.1:{server.server_port}/v1"
    model = server_model(Server(url, "judge-7b", side=100), cache=tmp_path / "c", root=tmp_path)
    assert model.name == "judge-7b" and model.ask([Request("p.jpg", "Why?")]) == [Reply("said: Why?")]
    (path, headers, body), = server.seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {SECRET}"
    picture, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "Why?"}
    assert body["model"] == "judge-7b" and body["temperature"] == 0
    head, data = picture["image_url"]["url"].split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/png;base64" and image.size == (100, 50) and image.getpixel((9, 9))[0] > 250


def test_transient_failures_are_tried_again(server, tmp_path):
    server.failures += [429, 503, "hang up", b"<html>busy</html>"]
    assert asker(server, tmp_path).ask([Request("scene:1", "a")]) == [Reply("said: a")]
    assert len(server.seen) == 5


def test_a_server_that_stays_down(server, tmp_path):
    server.failures += [500] * 3
    with pytest.raises(ConnectionError, match="no answer after 3 tries; the last one: status 500"):
        asker(server, tmp_path, tries=3).ask([Request("scene:1", "a")])
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [401, 404, 307])
def test_no_second_try_where_none_can_help(server, tmp_path, status):
    server.failures += [status]
    with pytest.raises(ConnectionError, match=f"status {status}") as caught:
        asker(server, tmp_path, workers=1).ask([Request("scene:1", "a")])
    assert len(server.seen) == 1 and SECRET not in str(caught.value)


def test_what_concerns_one_request_is_its_problem(server, tmp_path):
    server.failures += [400, "cut"]
    replies = asker(server, tmp_path, workers=1).ask([Request("scene:1", name) for name in "abc"])
    assert replies == [Reply("", "refused by the server, status 400"), Reply("", CUT), Reply("said: c")]


def test_thoughts_are_no_part_of_an_answer():
    assert read_reply("<think>\nA cat?\n</think>\n\nA dog.") == Reply("A dog.")
    assert read_reply("A cat?\n</think>\n\nA dog.\n") == Reply("A dog.")  # the template opened the tag
    assert read_reply("<think>No </think> yet.</think>A dog.") == Reply("A dog.")
    assert read_reply("◁think▷A cat?◁/think▷A dog.") == Reply("A dog.")
    for text in ("<think>A cat, or", "<think>A cat.</think>", "A cat.</think>\n"):
        assert read_reply(text) == Reply("", "thoughts without an answer")
    assert read_reply(" \n") == Reply("", "empty answer")
    assert read_reply("I think so.") == Reply("I think so.")


@pytest.mark.parametrize("text", ["A dog \ud83d", "A dog\0", "\x1b[2JA dog"])
def test_what_no_text_has_is_a_problem_of_the_reply(server, tmp_path, text):
    server.say = text
    assert asker(server, tmp_path).ask([Request("scene:1", "a")]) == [Reply("", "characters that no text has")]


def test_thoughts_stay_out_of_what_is_stored(server, tmp_path):
    """In the text, in a field of their own, in parts, and in replies that an earlier version kept."""
    server.say = "<think>A cat?</think>A dog."
    asker(server, tmp_path).ask([Request("scene:1", "a")])
    (file,) = tmp_path.rglob("*.json")
    row = json.loads(file.read_text())
    assert row["reply"] == {"text": "A dog.", "problem": ""}
    file.write_text(json.dumps({**row, "reply": {"text": "A cat?</think>A cow.", "problem": ""}}))
    assert asker(server, tmp_path).ask([Request("scene:1", "a")]) == [Reply("A cow.")]
    server.say = [{"type": "thinking", "thinking": "A cat?"}, {"type": "text", "text": "A horse."}]
    assert asker(server, tmp_path).ask([Request("scene:2", "a")]) == [Reply("A horse.")]
    server.say = None  # all of it in reasoning_content
    assert asker(server, tmp_path).ask([Request("scene:3", "a")]) == [Reply("", "empty answer")]
    file.write_text("{}")
    with pytest.raises(ValueError, match=f"{file.name}: holds no reply"):
        asker(server, tmp_path).ask([Request("scene:1", "a")])


@pytest.mark.parametrize("failure", ["drip", "drip headers", "drip error"])
def test_a_try_ends_although_the_server_goes_on_sending(server, tmp_path, failure):
    server.failures += [failure] * 2
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="no answer after 2 tries; the last one: TimeoutError: not done after 0.3 s"):
        asker(server, tmp_path, tries=2, timeout=0.3).ask([Request("scene:1", "a")])
    assert time.monotonic() - start < 3


def test_a_reply_has_a_largest_size(server, tmp_path):
    server.say = "A dog. " * 100
    with pytest.raises(ConnectionError, match="the reply is longer than 500 bytes"):
        asker(server, tmp_path, tries=1, max_bytes=500).ask([Request("scene:1", "a")])
    assert asker(server, tmp_path, tries=1).ask([Request("scene:1", "a")]) == [Reply(server.say.strip())]


def test_the_key_is_masked_where_a_server_repeats_it(server, tmp_path):
    server.failures += ["echo"]
    with pytest.raises(ConnectionError) as caught:
        asker(server, tmp_path).ask([Request("scene:1", "a")])
    assert SECRET not in str(caught.value) and "Bearer ***" in str(caught.value)
    assert str(caught.value).isprintable()  # no line breaks, nothing that moves the cursor


def test_a_redirect_does_not_carry_the_key_elsewhere(server, tmp_path):
    for server.redirect in (301, 302, 303, 307, 308):
        server.failures += [server.redirect]
        with pytest.raises(ConnectionError, match=f"status {server.redirect}"):
            asker(server, tmp_path).ask([Request("scene:1", "a")])
    assert len(server.seen) == 5  # nothing went to the place named, which is this server's /elsewhere


@pytest.mark.parametrize("data", [b"[" * 100_000, b"\xff", b'{"choices": [{"message": {"content": 5}}]}',
                                  b'{"choices": [' + b"9" * 5000 + b"]}", b"null", b""])
def test_what_is_no_completion_is_asked_for_again(server, tmp_path, data):
    server.failures += [data]
    assert asker(server, tmp_path).ask([Request("scene:1", "a")]) == [Reply("said: a")]


def test_a_key_that_no_header_can_hold(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\r\nX-Evil: 1")
    with pytest.raises(ConnectionError, match="OPENAI_API_KEY holds characters") as caught:
        asker(server, tmp_path).ask([Request("scene:1", "a")])
    assert SECRET not in str(caught.value) and not server.seen
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")  # as `export KEY="$(cat file)"` may leave it
    assert asker(server, tmp_path).ask([Request("scene:1", "a")]) == [Reply("said: a")]


def test_replies_are_kept(server, tmp_path):
    """Ten requests, the server breaks in the middle: the second run asks only for what is missing."""
    requests = [Request(f"scene:{i}", f"q{i}") for i in range(10)]
    server.failures += [None] * 6 + [401]
    with pytest.raises(ConnectionError):
        asker(server, tmp_path, workers=1).ask(requests)
    assert 7 <= len(server.seen) <= 8  # one more may have been under way
    replies = asker(server, tmp_path).ask(requests)
    assert replies == [Reply(f"said: q{i}") for i in range(10)] and len(server.seen) == 11
    assert asker(server, tmp_path).ask(requests) == replies and len(server.seen) == 11
    asker(server, tmp_path, temperature=0.5).ask(requests[:1])
    asker(server, tmp_path, images=False).ask(requests[:1])
    assert len(server.seen) == 13 and len(server.seen[-1][2]["messages"][0]["content"]) == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 12 and not any(path.name.startswith(".") for path in files)
    assert not any(SECRET in path.read_text() for path in files)


@pytest.mark.parametrize(("text", "choice"), [
    ("Response 1. It names only what is there.", 0), ("**Response 2** is better.", 1), ("2", 1),
    ("Answer: 1", 0),
    ("response 2: because response 1 invents a dog", 1), ("The final answer is response 1.", 0),
    ("Final answer: Response 1", 0), ("I prefer response 2, as response 1 invents a cat.", 1),
    ("After comparing both, response 1 is more accurate than response 2.", 0),
    ("Only response 2 is right.", 1), ("Response 1 and Response 2 are equal.", None),
    ("Both are wrong.", None), ("", None),
    ("Response 1 and 2 are equally good.", None), ("Response 1 is right. Response 2 is right.", None),
    ("Response 1 hallucinates more.", 1), ("Response 1 invents a dog. Response 2 is better.", 1),
    ("Response 2 is not better.", None), ("Response 1\nIt is shorter.", 0),
    ("Response 2 hallucinates less.", 1),
    ("I cannot see the picture.", None), ("Response 12", None), ("Neither response 1 nor the other.", None),
    ("The better response is Response 2, not response 1.", 1),
    ("<think>\nResponse 1 is better at colours, but it invents a cat.\n</think>\n\nResponse 2. It is right.", 1),
    ("Response 1 is better on colour but wrong on objects.\n</think>\n\nResponse 2. It is accurate.", 1),
    ("<think>I would say </think> here. Response 1 is better.</think>Response 2", 1),
    ("[THINK]Response 1 is better.[/THINK]Response 2", 1), ("<think>Response 1 is better.", None),
    ("[[2]]", 1), ("\\boxed{2}", 1), ("$\\boxed{\\text{Response 1}}$", 0), ("<answer>2</answer>", 1),
    ("Response 1 is better in style, but: <answer> Response 2 </answer>", 1), ("[[1]] or [[2]]", None),
    ("Response 1 is accurate about the dog. However, Response 2 hallucinates less overall.", 1),
    ("Response 2 does not hallucinate less than Response 1.", 0), ("Response 2 is worse.", 0),
    ("I do not think that response 1 is better.", None), ("If response 1 is better, nobody knows.", None),
    ("It doesn’t seem that response 1 is better; response 2 hallucinates less.", 1),
])
def test_verdicts(text, choice):
    assert verdict(text) == choice


def record(name: str = "a", **more) -> dict:
    return {"id": name, "image": "scene:1000000", "prompt": "What?", **more}


def honest(texts: dict[str, float]) -> Model:
    """A judge that knows how good each text is, and says nothing clear about equals."""

    def ask(requests):
        replies = []
        for request in requests:
            one, two = (request.text.split(f"Response {i}: ")[1].split("\n")[0] for i in (1, 2))
            better = np.sign(texts[two] - texts[one])
            replies.append(Reply({-1: "Response 1.", 0: "Hard to say.", 1: "Response 2."}[better]))
        return replies

    return Model("honest", ask)


def test_model_judge_ranks():
    """a, b, c, d are worth 1, 3, 2, 3: b = d undecided, so wins - losses are -3, 2, -1, 2; "" is left out."""
    judge = model_judge(honest({"a": 1, "b": 3, "c": 2, "d": 3, "e": 3}))
    answers = [["a", "b", "c", "d", ""], ["b", "d"], ["a", " "]]
    records = [record(name) for name in "xyz"]
    assert judge(records, answers) == [[(-3,), (2,), (-1,), (2,), (0,)], None, [(0,), (0,)]]
    (pair,), dropped = rank_pairs(records, lambda _: answers, judge, {"judge": "honest"})
    assert (pair["chosen"], pair["rejected"]) == ("b", "a") and pair["source"]["rejected"] == {"score": -3}
    assert pair["source"]["judge"] == "honest"
    assert dropped == {"no verdict of the judge": 1, "fewer than two non-empty responses": 1}
    assert [reply.text for reply in best_responses(records, lambda _: answers, judge)] == ["b", "", "a"]


def test_the_order_is_random_and_depends_on_the_record_only():
    asked = []

    def ask(requests):
        asked.extend(requests)
        return [Reply("Response 1")] * len(requests)

    judge = model_judge(Model("first", ask), seed=1)
    records, answers = [record(str(i)) for i in range(200)], [["good", "bad"]] * 200
    together = judge(records, answers)
    first = Counter(request.text.split("Response 1: ")[1].split("\n")[0] for request in asked)
    assert 70 < first["good"] < 130  # a judge that always takes the first one favours neither answer
    alone = [judge([one], [texts])[0] for one, texts in reversed(list(zip(records, answers)))]
    assert alone[::-1] == together
    assert model_judge(Model("first", ask), seed=2)(records, answers) != together


def test_clip_judge(monkeypatch):
    """cosines with the picture (1, 0): "A dog." 1, "A cat." .6: means 1, .6 and .8."""
    table = {"scene:1000000": (1, 0), "A dog.": (1, 0), "A cat.": (0.6, 0.8), "": (0, 1)}
    for name in ("embed_images", "embed_texts"):
        monkeypatch.setattr(f"judges.clip.{name}", lambda x, *_, **__: np.array([table[item] for item in x]))
    answers = [["A cat.", "A dog.", "A dog. A cat.", ""], ["A dog."]]
    judged = clip_judge(None, None)([record(), record("b")], answers)
    assert judged == [[Score(0.6), Score(1), Score(0.8), Score(0)], [Score(1)]]
    (pair,), _ = rank_pairs([record()], lambda _: answers[:1], clip_judge(None, None))
    assert (pair["chosen"], pair["rejected"]) == ("A dog.", "A cat.")


@pytest.fixture(scope="module")
def policy():
    return load_llava(DEFAULT_MODEL), Processor(DEFAULT_MODEL)


def test_the_policy_answers(policy):
    model = local_model(*policy, "model/tiny", batch_size=2)
    dog = next(seed for seed in range(100) if "dog" in scenes.objects_present(scenes.sample_scene(seed)))
    no = next(seed for seed in range(100) if "dog" not in scenes.objects_present(scenes.sample_scene(seed)))
    question = "Is there a dog in the image?"
    replies = model.ask([Request(f"scene:{seed}", question) for seed in (dog, no, dog)])
    assert [reply.text[:2] for reply in replies] == ["Ye", "No", "Ye"]
    short = local_model(*policy, "model/tiny", max_new_tokens=2)
    assert short.ask([Request("scene:0", scenes.CAPTION_PROMPT)]) == [Reply("", CUT)]


def captioned(seeds=range(1_000_000, 1_000_120)) -> list[dict]:
    return [{"id": f"s{seed}", "image": f"scene:{seed}", "prompt": scenes.CAPTION_PROMPT,
             "chosen": scenes.caption(scenes.sample_scene(seed), random.Random(seed))} for seed in seeds]


def test_scene_corruption_is_wrong_by_the_ground_truth():
    """Captions without noise name no absent object; an exchanged one is absent, other kinds name none."""
    records = captioned()
    pairs, dropped = corrupt_pairs(records, scene_corrupt(seed=1), {"seed": 1})
    assert len(pairs) == len(records) and not dropped
    kinds = Counter(pair["source"]["how"] for pair in pairs)
    assert min(kinds[how] for how in ("object", "count", "position")) > 20
    for pair in pairs:
        chosen, rejected = judge_scene(pair, [pair["chosen"], pair["rejected"]])
        assert chosen.wrong == 0 and rejected.wrong == (pair["source"]["how"] == "object")
        same = set(pair["chosen"].lower().split()) ^ set(pair["rejected"].lower().split())
        assert same and len(same) <= 8
        assert abs(len(pair["chosen"].split()) - len(pair["rejected"].split())) <= 1  # "dog", "wine glass"
    alone, _ = corrupt_pairs(records[7:8], scene_corrupt(seed=1), {"seed": 1})
    assert alone == pairs[7:8]
    other, _ = corrupt_pairs(records, scene_corrupt(seed=2))
    assert [p["rejected"] for p in other] != [p["rejected"] for p in pairs]


def test_scene_corruption_by_hand():
    """Scene with one dog on the left: "on the left" can only become middle or right; "a dog" two or three."""
    item = scenes.Object("dog", 0, 0, 5, 2)
    scene = scenes.Scene(0, "park", (item, scenes.Object("dog", 0, 6, 5, 2)))
    text = "On the left there is a dog."
    drawn = {_change_position(text, scene, (), random.Random(i)) for i in range(30)}
    assert drawn == {"In the middle there is a dog."}  # the other dog is on the right
    alone = scenes.Scene(0, "park", (item,))
    drawn = {_change_position(text, alone, (), random.Random(i)) for i in range(30)}
    assert drawn == {"In the middle there is a dog.", "On the right there is a dog."}
    drawn = {_change_count(text, scene, (), random.Random(i)) for i in range(30)}
    assert drawn == {"On the left there are three dogs."}  # there are two
    assert _change_count("Nothing here.", scene, (), random.Random(0)) == ""
    drawn = {_exchange_object("A small dog and two cats.", alone, (), random.Random(i)) for i in range(200)}
    assert {text.split(" and ")[1] for text in drawn} == {"two cats."}  # nothing shows cats: they stay
    absent = [text.split(" and ")[0].removeprefix("A small ") for text in drawn]
    assert len(absent) > 3 and set(absent) <= set(PLACES["park"]) - {"dog", "cat"}
    drawn = {_exchange_object("There is a dog.", alone, (), random.Random(i)) for i in range(200)}
    assert "There is an umbrella." in drawn


def test_scene_corruption_wants_scenes():
    with pytest.raises(ValueError, match="the contents of 'p.jpg' are unknown"):
        scene_corrupt()([{"id": "a", "image": "p.jpg", "chosen": "A."}])
    assert scene_corrupt()([record(chosen="Hm.") | {"image": "scene:1?without=dog"}]) == [
        Corruption("", "nothing to corrupt")]


def test_a_model_corrupts():
    said = {"A red bus.": Reply('Rewritten: "A blue bus."'), "One cat.": Reply("One cat."),
            "A dog.": Reply("", CUT), "A cow.": Reply("Sorry, I cannot help with rewriting this text.")}

    def ask(requests):
        return [said[request.text.rpartition("Answer: ")[2].split("\n")[0]] for request in requests]

    records = [record(f"r{i}", chosen=text) for i, text in enumerate(said)]
    corrupt = model_corrupt(Model("writer", ask))
    assert corrupt(records)[0] == Corruption("A blue bus.", "model")
    (pair,), dropped = corrupt_pairs(records, corrupt, {"model": "writer"})
    assert (pair["chosen"], pair["rejected"]) == ("A red bus.", "A blue bus.")
    assert pair["source"] == {"method": "corrupt", "model": "writer", "how": "model", "text": None}
    assert dropped == {"the corruption changes nothing": 1, CUT: 1, "the corruption has another length": 1}


def test_a_kept_model_is_asked_once(tmp_path):
    """A request is the image and the text; what was answered before, a problem too, is read from the disk."""
    asked = []

    def ask(requests):
        asked.extend(requests)
        return [Reply(f"{r.image} {r.text}") if r.text != "bad" else Reply("", "no") for r in requests]

    one, two, bad = Request("a", "x"), Request(None, "x"), Request("a", "bad")
    model = kept_model(Model("m", ask), tmp_path)
    assert model.ask([one, two, one, bad]) == [Reply("a x"), Reply("None x"), Reply("a x"), Reply("", "no")]
    assert asked == [one, two, bad]
    assert kept_model(Model("m", ask), tmp_path).ask([bad, two]) == [Reply("", "no"), Reply("None x")]
    assert len(asked) == 3 and kept_model(Model("other", ask), tmp_path).ask([one]) == [Reply("a x")] and len(asked) == 4
