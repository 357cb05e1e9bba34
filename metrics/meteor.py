"""METEOR (Denkowski and Lavie, WMT 2014), by its own program: meteor-1.5.jar, which Java runs and which needs its
paraphrase table (data/paraphrase-en.gz) in its folder. Both are in the PyPI package pycocoevalcap, folder meteor."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from common import BadInput
from metrics.ngrams import Words

OPTIONS = ("-", "-", "-stdio", "-l", "en", "-norm")


def meteor(jar: Path, captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """METEOR of the corpus, as coco-caption asks for it. Raises BadInput: no jar, no Java, no answer."""
    if not jar.is_file():
        raise BadInput(f"{jar}: not found; METEOR is computed by this program")
    command = ["java", "-Xmx2G", "-jar", str(jar.resolve()), *OPTIONS]
    try:
        with subprocess.Popen(command, cwd=jar.resolve().parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, encoding="utf-8") as program:  # fmt: skip
            return _asked(program, captions, references)
    except FileNotFoundError:
        raise BadInput("METEOR needs Java, and there is none") from None
    except (OSError, ValueError) as error:  # it ended, or said something that is no number
        raise BadInput(f"{jar}: METEOR failed ({error})") from None


def _asked(program: subprocess.Popen, captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    def say(*parts: str) -> None:
        program.stdin.write(" ||| ".join(parts) + "\n")
        program.stdin.flush()

    statistics = []
    for caption, refs in zip(captions, references):
        say("SCORE", *(" ".join(ref) for ref in refs), " ".join(caption).replace("|||", "").replace("  ", " "))
        statistics.append(program.stdout.readline().strip())
    say("EVAL", *statistics)
    for _ in captions:
        program.stdout.readline()  # the caption's own score
    return float(program.stdout.readline())
