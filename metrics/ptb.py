"""Words of a caption as coco-caption counts them: Penn Treebank tokens in lower case, without punctuation.

The released code runs Stanford's PTBTokenizer (CoreNLP 3.4.1, in Java) and drops 17 tokens. `tokenize` follows the
rules of that program for what captions contain, oddities included: British spellings become American ("grey" is "gray",
but "Grey" stays); "man's" is two words, and "can't" is "ca", "n't"; "black-and-white", "7:30", "p.m." and "o'clock"
are one; a slash is \\/; brackets survive as -lrb- and -rrb-, because they are dropped by upper-case names; "!!"
survives.

Departures: of its abbreviations only those likely in captions are known; emoticons, mixed fractions and telephone
numbers are taken apart.
"""

import re

_A = r"[^\W_]"  # letter or digit
_L = r"[^\W\d_]"  # letter
_TOKEN = re.compile(
    rf"""
    (?:https?://|www\.)[^\s"<>|()]+[^\s"<>|.!?(){{}},-]
  | {_A}[\w-]*(?:\.{_A}[\w-]*)*\.(?:com|net|org|edu)\b
  | [A-Z]+(?:[+&][A-Z]+)+                                                       # AT&T
  | (?<!\w)(?:(?:[A-Za-z]\.)+[A-Za-z](?![\w'])\.?|[A-Za-z]\.(?!{_A}))           # p.m. and initials
  | (?<!\w)(?i:mr|mrs|ms|dr|st|ave|blvd|rd|mt|jr|sr|co|corp|inc|ltd|dept|vs|etc)\.(?!{_A})
  | [A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){{0,2}}){{1,2}}  # and/or, 1/2
  | [A-Za-z0-9][A-Za-z0-9.,]*(?:-[A-Za-z0-9]+)+                                 # 3.5-inch
  | [-+]?\d*(?:[.:,]\d+)+ | [-+]\d+                                             # 1,000 and 7:30
  | (?i:can)(?=(?i:not)\b)
  | [A-Za-z]+(?=(?i:n't)) | (?i:n't)
  | '(?i:s|m|d|re|ve|ll)(?![A-Za-z]) | '(?:n'?|em|tis|cause|[2-9]0s)(?!{_A})
  | {_L}+[aeiouyAEIOUY]'[aeiou]{_L}* | [yY]'(?={_L}) | c'mon                    # ma'am, y'all
  | (?:[dDoOlL]'{_A})?{_A}+(?:[-_](?:[dDoOlL]'{_A})?{_A}+)*                     # words, o'clock, black-and-white
  | [@\#]{_L}\w*
  | \.{{3,5}} | [?!]+ | -+ | \*+ | @+ | \#+ | _+ | ''
  | [^\s\w]
    """,
    re.VERBOSE,
)
_QUOTES = str.maketrans("’‘‛`´\u0092\u0091", "'" * 7)
_AS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
       "£": "#", "€": "$", "¢": "cents"}  # fmt: skip
_DROPPED = {*"'\"“”«»‹›.?!,:;-–—―…", "''", "--", "---", "----", "...", "....", "....."}
_UNKNOWN = re.compile("[\U00010000-\U0010ffff\ufe0f\u200d]")  # emoji, which the released code deletes

_OUR = """armoured coloured colouring colourful discoloured discolouring endeavoured endeavouring favoured favouring
    favourite favourites flavoured flavouring honoured honouring honourable humoured humouring laboured labouring
    neighbourhood neighbourhoods rumoured rumouring savoured savouring"""
_ISE = """analyse analysed analysing capitalise capitalised capitalisation finalise finalised finalising localise
    localised maximise maximised maximising minimise minimised minimising modernise modernised modernising organisation
    organisations penalise penalised popularise popularised popularises popularising pressurise pressurised pressurises
    pressurising realise realised realising realises recognise recognised recognising recognises"""
_LL = "cancelled cancelling labelled labelling travelled travelling"
_OTHER = """anaesthetic anesthetic analogue analog analogues analogs centre center chimaeric chimeric defence defense
    Defence Defense encyclopaedia encyclopedia fibre fiber fibres fibers grey gray homologue homolog homologues homologs
    kerb curb leant leaned learnt learned manoeuvre maneuver manoeuvres maneuvers meagre meager oestrogen estrogen
    oestrogens estrogens practise practice practised practiced theatre theater theatres theaters titre titer
    titres titers Labour Labor""".split()
AMERICAN = {
    **{word: word.replace("our", "or") for word in _OUR.split()},
    **{word: re.sub("s(e[ds]?|ing|ations?)$", r"z\1", word) for word in _ISE.split()},
    **{word: word.replace("ll", "l") for word in _LL.split()},
    **dict(zip(_OTHER[::2], _OTHER[1::2])),
}
_ENDING_OUR = re.compile(r"^(?!.*(?:flour|bonjour|carrefour|contour|de[tv]our|downpour|glamour|inpour|outpour|paramour"
                         r"|pompadour|tambour|troubadour|velour))([a-z]{3,})our(s?)$")  # fmt: skip


def tokenize(caption: str) -> list[str]:
    """The words of a caption that are counted."""
    text = _UNKNOWN.sub(" ", caption).translate(_QUOTES)
    return [_written(token) for token in _TOKEN.findall(text) if token not in _DROPPED]


def _written(token: str) -> str:
    token = _AS.get(token) or AMERICAN.get(token) or _ENDING_OUR.sub(r"\1or\2", token)
    token = re.sub("programme(s?)$", r"program\1", token) if token.isalpha() else token
    return re.sub(r"[/*]", r"\\\g<0>", token).lower()
