"""The page of preference pairs: parsed, and looked at by a browser where there is one."""

import base64
import io
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from common import run_script
from data.images import open_image
from data.records import write_jsonl
from pairs.gallery import main, marked, objects, thumbnail, write_gallery

EVIL = "<script>document.title='hacked'</script> & \"quotes\" <img src=x onerror=\"document.title='hacked'\">"
PAIR = {"id": "a", "image": "scene:1", "prompt": "What?", "chosen": "A dog is here.",
        "rejected": "A cat is here."}


class Page(HTMLParser):
    """Tags with attributes, and the text inside each kind of tag; fails on a tag that is not closed."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.text.setdefault(tag, []).append(data)


def page(tmp_path, *pairs, **options) -> tuple[str, Page]:
    write_gallery(tmp_path / "p.html", list(pairs), root=tmp_path, **options)
    html = (tmp_path / "p.html").read_text()
    return html, Page(html)


def test_long_texts_are_shown_without_marks():
    """Comparing 60,000 words with 60,000 would take hours."""
    assert marked("a < b " * 20_000, "c " * 30_000) == ("a &lt; b " * 20_000, "c " * 30_000)


def test_differences_are_marked():
    chosen, rejected = marked("A small dog, and a cat.", "A small cow and two cats.")
    assert re.findall("<ins>(.*?)</ins>", chosen) == ["dog,", "a", "cat"]
    assert re.findall("<del>(.*?)</del>", rejected) == ["cow", "two", "cats"]
    assert re.sub("</?ins>", "", chosen) == "A small dog, and a cat."
    assert re.sub("</?del>", "", rejected) == "A small cow and two cats."
    assert marked("a < b", "a < b") == ("a &lt; b", "a &lt; b")
    assert marked("A.", "A. And <b>.") == ("A.", "A. <del>And &lt;b&gt;.</del>")


def test_whatever_a_record_says_is_escaped(tmp_path):
    Image.new("RGB", (300, 100), "red").save(tmp_path / "a'\"&<b>.png")
    pair = {"id": EVIL, "image": "a'\"&<b>.png", "prompt": EVIL, "chosen": EVIL, "rejected": EVIL + "!",
            "source": {EVIL: EVIL, "score": 0.25}}
    html, found = page(tmp_path, pair, title=EVIL)
    assert "<script" not in html and [tag for tag, _ in found.tags].count("img") == 1
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert "".join(found.text["title"]) == "".join(found.text["h1"]) == EVIL
    assert "".join(found.text["h2"]) == EVIL and "score 0.25" in "".join(found.text["summary"])


def test_pictures_are_inside(tmp_path):
    html, found = page(tmp_path, {**PAIR, "rejected_image": "scene:2"}, side=48)
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert [image["alt"] for image in images] == ["image", "rejected image"]
    assert images[0]["src"] != images[1]["src"]
    assert (images[0]["width"], images[0]["height"]) == ("48", "48")
    head, data = images[0]["src"].split(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (96, 96)
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!data:)[a-z]", html)
    policy = next(attributes["content"] for tag, attributes in found.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")


def test_the_response_to_the_rejected_picture_is_shown(tmp_path):
    html, _ = page(tmp_path, {**PAIR, "rejected_image": "scene:2", "rejected_image_response": "A <b>cup</b>."}, side=48)
    assert "A &lt;b&gt;cup&lt;/b&gt;." in html and "rejected image</h3>" not in page(tmp_path, PAIR, side=48)[0]


def test_size_of_pictures(tmp_path):
    Image.new("RGB", (2000, 500)).save(tmp_path / "p.png")
    url, width, height = thumbnail(open_image("p.png", tmp_path), 240)
    assert (width, height) == (240, 60)
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == (480, 120)


def test_more_pairs_than_shown(tmp_path):
    html, found = page(tmp_path, *({**PAIR, "id": f"n{i}"} for i in range(10)), limit=4)
    assert found.text["h2"] == ["n0", "n2", "n5", "n7"] and "10 pairs, 4 of them shown" in html
    assert "0 pairs" in page(tmp_path)[0]


def test_command_line(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "p.jsonl", [PAIR])
    monkeypatch.setattr(sys, "argv", ["gallery", str(tmp_path / "p.jsonl")])
    main()
    assert capsys.readouterr().out == f"{tmp_path / 'p.html'}\n"
    assert Page((tmp_path / "p.html").read_text()).text["h2"] == ["a"]
    write_jsonl(tmp_path / "p.jsonl", [{**PAIR, "image": "none.png"}])
    with pytest.raises(SystemExit) as ended:
        run_script(main, "pairs.gallery")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("pairs.gallery: ") and "none.png: no such image" in said


def test_in_a_browser(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no browser")
    page(tmp_path, {**PAIR, "id": EVIL, "prompt": EVIL}, title="Pairs")
    shot, profile = tmp_path / "shot.png", f"--user-data-dir={tmp_path / 'profile'}"
    call = [browser, "--headless", "--no-sandbox", "--disable-gpu", profile, (tmp_path / "p.html").as_uri()]
    subprocess.run([*call, "--window-size=900,500", f"--screenshot={shot}"], capture_output=True, timeout=90,
                   check=True)
    picture = Image.open(shot).convert("RGB")
    shown = thumbnail(open_image("scene:1"), 240)[0].split(",")[1]
    colours = {tuple(c // 32 for c in Image.open(io.BytesIO(base64.b64decode(shown))).getpixel((5, 5)))}
    seen = {tuple(c // 32 for c in picture.getpixel((x, y)))
            for x in range(0, 300, 4) for y in range(0, 400, 4)}
    assert colours <= seen  # the picture is drawn
    dom = subprocess.run([*call, "--dump-dom"], capture_output=True, timeout=90, text=True)
    assert "<title>Pairs</title>" in dom.stdout  # no text of a record ran as a script


def test_what_could_be_removed_is_where_candidates_differ(tmp_path):
    """One channel is enough; candidates that are gone or of another size are passed over."""
    plain = np.full((40, 60, 3), 90, np.uint8)
    without = plain.copy()
    without[10:20, 30:50, 1] = 0
    for name, pixels in (("a.png", plain), ("b.png", without), ("c.png", plain[:9])):
        Image.fromarray(pixels).save(tmp_path / name)
    source = {"method": "adavip", "candidates": [{"removed": "cup", "image": name} for name in ("b.png", "c.png", "d.png")]}
    shown = np.asarray(objects({"image": "a.png", "source": source}, tmp_path)).astype(int)
    assert (shown[12:18, 32:48] != 90).any(-1).mean() > 0.9 and (shown[25:, :25] == 90).all()  # tinted; outside
    assert objects({"image": "a.png", "source": {"method": "adavip"}}, tmp_path) is None
    assert objects({"image": "a.png"}, tmp_path) is None
