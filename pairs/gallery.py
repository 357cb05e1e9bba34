"""A page to look at preference pairs: images side by side, differences between the answers marked.

    python -m pairs.gallery runs/pairs-adavip.jsonl        -> runs/pairs-adavip.html
    python -m pairs.gallery PAIRS.jsonl PAGE.html --limit 50

One HTML file that needs nothing else: the images are inside it as small JPEGs, there is no script, and its
Content-Security-Policy forbids to load anything. Whatever a record says is escaped.
"""

import argparse
import json
import re
from contextlib import suppress
from difflib import SequenceMatcher
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import BadInput, run_script, write_text
from data.detect import Detection, box_of, overview
from data.images import data_url, open_image, references
from data.records import read_pairs

COMPARED = 10**7  # words times words: a second or so
STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #d33; --good: #283; --soft: #888; }
@media (prefers-color-scheme: dark) { :root { --bad: #f77; --good: #6c8; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
section { border-top: 1px solid var(--line); padding: 1.2rem 0; display: grid; gap: .6rem 1.2rem;
          grid-template-columns: auto minmax(0, 1fr); }
figcaption, .note { color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
figure { margin: 0 0 .6rem; } figcaption { max-width: 15rem; }
.images { display: flex; gap: .8rem; } img { display: block; max-width: 15rem; border-radius: 4px; }
h3 { font-size: .8rem; margin: .7rem 0 0; font-weight: 600; }
p { margin: .1rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.chosen { color: var(--good); } .rejected { color: var(--bad); }
ins, del { text-decoration: none; border-radius: 3px; padding: 0 2px; }
ins { background: color-mix(in srgb, var(--good) 25%, transparent); }
del { background: color-mix(in srgb, var(--bad) 25%, transparent); }
pre { font-size: .75rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }
@media (max-width: 800px) { section { display: block; } figure { flex: 0 1 15rem; min-width: 0; }
                           img { max-width: 100%; height: auto; } }
"""
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1><p class="note">{note}</p>
"""


def write_gallery(path: Path | str, pairs: list[dict], *, root: Path | str | None = None,
                  title: str = "Pairs", limit: int = 200, side: int = 240) -> None:
    """Write the page, whole or not at all, with up to `limit` of the pairs, evenly spaced; images are up to `side`
    pixels long. Raises BadInput naming an image that cannot be opened."""
    count = min(limit, len(pairs))
    shown = [pairs[i * len(pairs) // count] for i in range(count)]
    note = f"{len(pairs)} pairs" + (f", {count} of them shown, evenly spaced" if count < len(pairs) else "")
    thumb = lru_cache(64)(lambda reference: thumbnail(open_image(reference, root), side))
    page = HEAD.format(title=escape(title), style=STYLE, note=note)
    page += "".join(_section(pair, thumb, root, side) for pair in shown) + "</body></html>\n"
    write_text(path, page)


def marked(chosen: str, rejected: str) -> tuple[str, str]:
    """Both texts as HTML, with the words that only the chosen one has in <ins>, the other's in <del>.

    Comparing takes up to the product of their lengths: texts of more than COMPARED stay without marks.
    """
    left, right = (re.findall(r"\w+(?:['’-]\w+)*|\s+|[^\w\s]", text) for text in (chosen, rejected))
    if len(left) * len(right) > COMPARED:
        return escape(chosen), escape(rejected)
    sides: tuple[list[str], list[str]] = ([], [])
    for kind, a, b, c, d in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        for side, tag, words in ((sides[0], "ins", left[a:b]), (sides[1], "del", right[c:d])):
            text = escape("".join(words))  # white space at its ends stays outside the mark
            side.append(text if kind == "equal" else re.sub(r"\S(.*\S)?", rf"<{tag}>\g<0></{tag}>", text, flags=re.S))
    return "".join(sides[0]), "".join(sides[1])


def objects(pair: dict, root: Path | str | None) -> Image.Image | None:
    """The image with what could be removed from it (pairs/adavip.py): where a candidate differs from the image is the
    mask of the object that it lacks. None where the pair has no candidates, or their images are gone."""
    source = pair.get("source") or {}
    if source.get("method") != "adavip":
        return None
    image, found = open_image(pair["image"], root), []
    for candidate in source.get("candidates", []):
        with suppress(BadInput):
            without = open_image(candidate["image"], root)
            if without.size == image.size:
                mask = torch.from_numpy((np.asarray(without) != np.asarray(image)).any(-1))  # (H, W)
                found.append(Detection(candidate["removed"], 1.0, box_of(mask), mask))
    return overview(image, found) if found else None


def thumbnail(image: Image.Image, side: int) -> tuple[str, int, int]:
    """An image as small JPEG in a data URL, and the width and height to show it in."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    image.thumbnail((2 * side, 2 * side))  # twice as fine, for fine screens
    return data_url(image, "JPEG", quality=85), width, height


def _section(pair: dict, thumb, root: Path | str | None, side: int) -> str:
    images = _figures("image", pair["image"], thumb)
    if found := objects(pair, root):
        images += _figure("objects", "what could be removed", thumbnail(found, side))
    if pair.get("rejected_image"):
        images += _figures("rejected image", pair["rejected_image"], thumb)
    chosen, rejected = marked(pair["chosen"], pair["rejected"])
    context = f'<h3>Context</h3><p>{escape(pair["context"])}</p>' if pair.get("context") else ""
    other = pair.get("rejected_image_response")
    right = f"<h3>Right for the rejected image</h3><p>{escape(other)}</p>" if other else ""
    return (f'<section><div class="images">{images}</div><div><h2>{escape(pair["id"])}</h2>'
            f'<h3>Prompt</h3><p>{escape(pair["prompt"])}</p>{context}<h3 class="chosen">Chosen</h3><p>{chosen}</p>'
            f'<h3 class="rejected">Rejected</h3><p>{rejected}</p>{right}{_source(pair.get("source") or {})}</div>'
            '</section>\n')


def _figures(name: str, image: str | list[str], thumb) -> str:
    return "".join(_figure(name, reference, thumb(reference)) for reference in references(image))


def _figure(name: str, reference: str, shown: tuple[str, int, int]) -> str:
    url, width, height = shown
    return (f'<figure><img src="{url}" width="{width}" height="{height}" alt="{escape(name)}">'
            f'<figcaption>{escape(name)}: {escape(reference)}</figcaption></figure>')


def _source(source: dict) -> str:
    """Plain values in one line, everything in a fold."""
    if not source:
        return ""
    plain = " · ".join(f"{key} {value}" for key, value in source.items() if type(value) in (str, int, float))
    whole = json.dumps(source, indent=1, ensure_ascii=False)
    return (f'<details class="note"><summary>{escape(plain) or "source"}</summary>'
            f'<pre>{escape(whole)}</pre></details>')


def main() -> None:
    """The command line. Raises BadInput."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, metavar="PAIRS.jsonl")
    parser.add_argument("page", type=Path, nargs="?", metavar="PAGE.html", help="(default: next to the pairs)")
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="pairs to show (default: %(default)s)")
    arguments = parser.parse_args()
    page = arguments.page or arguments.pairs.with_suffix(".html")
    write_gallery(page, read_pairs(arguments.pairs), root=arguments.pairs.parent, title=arguments.pairs.name,
                  limit=arguments.limit)
    print(page)


if __name__ == "__main__":
    run_script(main, "pairs.gallery")
