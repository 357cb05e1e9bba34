"""Prompt templates by name, of all families. What they are, to the letter, is in the file of each family."""

from __future__ import annotations

import re

from common import BadInput
from model.config import Template
from model.families import TEMPLATES


def find_template(name: str, templates: dict[str, Template] = TEMPLATES) -> Template:
    """Template by name. Raises BadInput listing the names."""
    if name not in templates:
        raise BadInput(f"no template {name!r} (there are: {', '.join(templates)})")
    return templates[name]


def cut(text: str, special: tuple[str, ...]) -> list[str]:
    """Special tokens and the texts between them, in order; no part is empty."""
    return [part for part in re.split(f"({'|'.join(map(re.escape, special))})", text) if part]
