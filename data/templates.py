"""Prompt templates: what stands around picture, question and answer, to the letter.

    hf                 <s>USER: <image>⏎{prompt} ASSISTANT: {answer}</s>
    vicuna_v1          <s>{system, user} USER: <image>⏎{prompt} ASSISTANT: {answer}</s>
    llava_v1           <s>{system, human} USER: <image>⏎{prompt} ASSISTANT: {answer}</s>
    mistral_instruct   <s>[INST] <image>⏎{prompt} [/INST] {answer} </s>
    chatml_direct      <|im_start|>system⏎Answer the questions.<|im_end|><|im_start|>user⏎<image>⏎{prompt}
                       <|im_end|><|im_start|>assistant⏎{answer}<|im_end|>

with ⏎ a line break and {system} the sentences of SYSTEM. The last token, the stop token, belongs to the answer.
Only chatml_direct has no token that begins a text.

    hf                 model cards of llava-hf's LLaVA-1.5; the embedded model
    vicuna_v1          training of LLaVA-1.5 and of LLaVA-1.6 on Vicuna
    llava_v1           the same with a "human" for the "user": RLAIF-V, and LLaVA's own chat scripts
    mistral_instruct   training of LLaVA-1.6 on Mistral-7B
    chatml_direct      training of LLaVA-1.6 on Yi-34B

Tokens. As in LLaVA with its slow tokenizer, the text is cut at the picture and at special tokens, and each
part is tokenised on its own. LLaMA's and Mistral's vocabularies put a "▁" in front of each part, so one dangles
on either side of the picture; Yi's does not. The fast tokenizers of llava-hf, given the whole text, leave out
the one behind the picture. Question "A dog?" and answer "Yes." in the vocabulary of
tests/goldens/tokenizer.model (chatml_direct: without the "▁" in front, as in Yi's); "…" leaves tokens out, "|"
is where the answer begins:

    hf                 <s> ▁USER : ▁ <image> ▁ <0x0A> A ▁dog ? ▁ASSISTANT : | ▁Yes . </s>
    vicuna_v1          <s> … ▁user ' s … ▁USER : ▁ <image> ▁ <0x0A> A ▁dog ? ▁ASSISTANT : | ▁Yes . </s>
    llava_v1           <s> … ▁human ' s … ▁USER : ▁ <image> ▁ <0x0A> A ▁dog ? ▁ASSISTANT : | ▁Yes . </s>
    mistral_instruct   <s> ▁ [ INST ] ▁ <image> ▁ <0x0A> A ▁dog ? ▁[/ INST ] | ▁Yes . ▁ </s>
    chatml_direct      <|im_start|> … <0x0A> <image> <0x0A> A ▁dog ? <|im_end|> … <0x0A> | Y es . <|im_end|>
"""

from __future__ import annotations

import re
from typing import NamedTuple

from common import BadInput

SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


class Template(NamedTuple):
    """Text up to the picture, from the picture to the answer, and the answer; `stop` is the token behind."""

    before: str
    after: str
    answer: str
    stop: str


TEMPLATES = {
    "hf": Template("<s>USER: ", "\n{prompt} ASSISTANT:", " {answer}", "</s>"),
    "vicuna_v1": Template(f"<s>{SYSTEM.format('user')} USER: ", "\n{prompt} ASSISTANT:", " {answer}", "</s>"),
    "llava_v1": Template(f"<s>{SYSTEM.format('human')} USER: ", "\n{prompt} ASSISTANT:", " {answer}", "</s>"),
    "mistral_instruct": Template("<s>[INST] ", "\n{prompt} [/INST]", " {answer} ", "</s>"),
    "chatml_direct": Template(
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n",
        "\n{prompt}<|im_end|><|im_start|>assistant\n", "{answer}", "<|im_end|>",
    ),
}


def find_template(name: str) -> Template:
    """Template by name. Raises BadInput listing the names."""
    if name not in TEMPLATES:
        raise BadInput(f"no template {name!r} (there are: {', '.join(TEMPLATES)})")
    return TEMPLATES[name]


def cut(text: str) -> list[str]:
    """Special tokens and the texts between them, in order; no part is empty."""
    return [part for part in re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text) if part]
