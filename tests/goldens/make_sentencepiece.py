"""Regenerate tokenizer.model and sentencepiece.json: a small vocabulary of LLaMA's kind and what the
sentencepiece library (pip install sentencepiece) makes of awkward texts with it.

    python tests/goldens/make_sentencepiece.py
"""

import io
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

from model.families.llava import TEMPLATES  # noqa: E402

TEXTS = (
    "Is it a dog?", "", " ", "  ", "   two  blanks   ", "\n", "\n\na\n", "\t tab\r\n", "a dog\n", "naïve café",
    "e\u0301\u0327", "犬は走る dog", "🙂 👩\u200d👩\u200d👧", "\x00\x01\x7f", "\u200b\ufeff\u2028\u00a0", "ﬁ ½ Ⅳ", "▁",
    "a ▁▁ b", "x" * 300, "dog" * 99, "1234567890", "<s>", "a</s>b", "<unk>", "<0x0A>", "<image>",
    "<|im_start|>", "a<|im_end|>b <|im_start|> c",
    "<|im_end|><|im_end|>", "<|im_start", "\ud7ff\U0010ffff", "USER: is there a dog? ASSISTANT:",
)
WORDS = (
    "Is it a dog? Yes. Is there a cat in the image? No, there is a red bus and two people next to it.\n"
    "Describe the picture. What color is the traffic light? The light is green and the street is empty.    "
    "A man rides a horse on the beach.  In 1984 there were 27 of them, 365 days a year.\n"
)
SETTINGS = dict(
    model_type="bpe", vocab_size=540, byte_fallback=True, normalization_rule_name="identity",
    remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
    character_coverage=1.0, user_defined_symbols=["<|im_start|>", "<|im_end|>"], minloglevel=2, num_threads=1,
)


def train(**changes) -> bytes:
    """The bytes of a tokenizer.model trained on WORDS and the templates: SETTINGS with `changes`."""
    import sentencepiece

    around = (part for template in TEMPLATES.values() for part in (template.before, template.image.removeprefix("<image>") + template.after))
    corpus = [line for text in (*around, WORDS) for line in text.split("\n")] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, **{**SETTINGS, **changes}
    )
    return model.getvalue()


if __name__ == "__main__":
    import sentencepiece

    model = train()
    (HERE / "tokenizer.model").write_bytes(model)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    cases = [{"text": text, "ids": oracle.encode(text)} for text in TEXTS]
    cases = [{**case, "decoded": oracle.decode(case["ids"])} for case in cases]
    lines = ",\n".join(json.dumps(case) for case in cases)
    (HERE / "sentencepiece.json").write_text(f"[\n{lines}\n]\n")
