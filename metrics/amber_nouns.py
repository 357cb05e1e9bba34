"""The nouns that AMBER counts: which words of its vocabulary a description mentions (metrics/amber.py).

The released code tokenises, tags and lemmatises with NLTK (Treebank tokens, averaged perceptron, WordNet) and keeps
the nouns that are words of relation.json, 418 in all. The vocabulary is closed, so rules for its words do:

    tokenize    symbols alone, clitics ('s, n't) detached, words joined by - / ' . whole; case is kept
    forms       word and plural -> word, as in NLTK's lemmatiser with WordNet 3.0. Case counts: "Trees" at the start
                of a sentence is no lemma, so it is not counted. Oddities are kept, since published figures contain them
    is_noun     a form is a noun, unless it can be something else and the words around it say so

The lemmas agree with WordNet 3.0 on every noun and plural. The tagger's weights could not be had: `is_noun` is
reconstructed. On 2,000 captions of LLaVA-1.5 it rejects 97 of 19,701 forms, not counting can and hot.
"""

import re
from collections.abc import Collection, Sequence

_SYMBOLS = re.compile(r"[\[\](){}<>;@#$%&*?!\"`“”„«»‘’\u2012-\u2015…]|--|\.{2,}|[,:](?!\d)")
_CLITIC = re.compile(r"(?i)(?<=\S)('(?:s|m|d|ll|re|ve)?|n't)(?=\s|$)")

_IRREGULAR = {
    "bookshelf": "bookshelves", "child": "children", "goose": "geese", "knife": "knives", "mouse": "mice",
    "potato": "potatoes", "scarf": "scarves", "shelf": "shelves", "snowman": "snowmen", "tomato": "tomatoes",
    "woman": "women"}  # fmt: skip; no "men", which is a lemma itself
# WordNet's shortest lemma of these is another word: sunglass, chopstick ...
_NO_LEMMA = frozenset(("chopsticks", "earrings", "slippers", "sunglasses"))
# The plural is no form of the word: vases has the lemma vas, leaves has leaf, and WordNet lacks the others.
_NO_PLURAL = _NO_LEMMA | frozenset(
    """vase leave TV air-conditioning baconic bedsheet cann cathole closestool cooktop doghole e-book earing ebook hot
    electrombile kiwifruit paraglider pissoir rpoe sanitizer scoon seegull showerpuff streetlamp waterfont""".split())

_NEVER = frozenset(("can", "hot"))  # always a modal, an adjective
_VERBS = frozenset(
    """bear board book box brush dove drain drink duck fence file fish flag float fork grill house leave light line
    lock lounge mirror monitor net note pack pad paddle paper pipe plug range ring rock rope saddle sail screen shell
    ship shovel sign signal sink skate ski sound spray stage star support switch tank tap tape tie tire track train
    watch water""".split())
_SUBJECT_VERBS = frozenset("board drink leave line lounge paddle skate ski support watch".split())  # "people watch"
_THIRD_PERSON = frozenset(("drinks", "lights", "lines", "paddles", "skis", "supports", "watches"))
_OBJECTS = frozenset("a an the his her its their him them nearby up".split())  # after a verb
_PARTICIPLES = frozenset(("building", "drawing", "painting", "sailing"))
_BEFORE_VERB = frozenset(
    """to can could may might must shall should will would 'll do does did n't not i you we they who let""".split())
_TO_IS_PREPOSITION = frozenset("access adjacent attached belonging close connected due leading next similar".split())
_PLURAL_SUBJECTS = frozenset(
    """people men women children others both adults boys cows dogs fans friends girls horses individuals kids
    pedestrians persons spectators students tourists visitors""".split())
_SINGULAR_SUBJECTS = frozenset("he she it who which that".split())
_BE = frozenset("is are was were be been being 're by".split())
_COLOURS = frozenset("black blue brown gold gray green grey pink purple red white yellow".split())
_AFTER_NOUN = frozenset(
    """and or but , . ; : ! ? ) is are was were can may might has have with on in at of to from for near next that which
    while as by behind beside under above hanging standing sitting placed visible located positioned""".split())


def tokenize(text: str) -> list[str]:
    """Tokens as NLTK makes them, as far as words of the vocabulary and their neighbours are concerned."""
    text = re.sub(r"\.(?=[\s')\]]|$)", " . ", _SYMBOLS.sub(r" \g<0> ", text))
    return _CLITIC.sub(r" \1 ", text).split()


def forms(vocabulary: Collection[str]) -> dict[str, str]:
    """Form as written -> word of the vocabulary."""
    singular = {word: word for word in vocabulary if word not in _NO_LEMMA}
    regular = {_plural(word): word for word in vocabulary if word not in _NO_PLURAL}
    return {**regular, **{_IRREGULAR[word]: word for word in _IRREGULAR.keys() & vocabulary}, **singular}


def _plural(word: str) -> str:
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(?:s|x|z|ch|sh)$", word) else "s")


def mentions(text: str, known: dict[str, str]) -> list[str]:
    """Words of the vocabulary that a text mentions as nouns, in order, repeats kept. known: from `forms`."""
    tokens = tokenize(text)
    return [known[token] for i, token in enumerate(tokens) if token in known and is_noun(tokens, i)]


def is_noun(tokens: Sequence[str], i: int) -> bool:
    """Is token i, a form of a word of the vocabulary, tagged as a noun?"""
    word, after = tokens[i], tokens[i + 1].lower() if i + 1 < len(tokens) else "."
    before = [token.lower() for token in tokens[max(0, i - 3) : i] if not token.endswith("ly")]
    last = before[-1] if before else "."
    if word in _NEVER:
        return False
    if word in _PARTICIPLES:
        return last not in (_BE if word == "building" else _BE | _AFTER_NOUN)
    if word in _VERBS:
        return not (_is_base_verb(word, before, after) or _is_adjective(word, last, after))
    if word in _THIRD_PERSON:
        return not (last in _SINGULAR_SUBJECTS or after in _OBJECTS)
    return not _is_adjective(word, last, after)


def _is_base_verb(word: str, before: Sequence[str], after: str) -> bool:
    last = before[-1] if before else "."
    if last == "to":
        return _TO_IS_PREPOSITION.isdisjoint(before[-2:-1])
    if last in ("and", "or"):  # "sit and watch the game"
        return word in _SUBJECT_VERBS and after in _OBJECTS
    plural = last in _PLURAL_SUBJECTS or last.endswith("ers")  # passengers, players, skiers
    return last in _BEFORE_VERB or (word in _SUBJECT_VERBS and plural)


def _is_adjective(word: str, last: str, after: str) -> bool:
    if word == "orange":  # the colour, but orange juice
        fruit = after in _AFTER_NOUN or after.startswith(("juice", "slice"))
        return after in _COLOURS or last in _COLOURS or not fruit
    if word == "light":
        return after in _COLOURS
    return word == "individual" and last in ("their", "its", "his", "her", "each", "own") and after not in _AFTER_NOUN
