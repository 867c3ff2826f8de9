"""The option that a text decides for, where a chat model answers in words.

The rules are the English ones of OpenCompass (`first_option_postprocess`), with which LLaDA's chat models were judged, in their
order: a letter that ends the text, one that is said to be the answer, one that stands alone, one before a colon, any.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_RULES = (
    r"[\s:,](LETTER)[.,]?$",
    r"[Tt]he answer is (LETTER)",
    r"[Tt]he answer is option (LETTER)",
    r"[Tt]he correct answer is (LETTER)",
    r"[Tt]he correct answer is option (LETTER)",
    r"[Tt]he answer to the question is (LETTER)",
    r"(?:^|\s)(LETTER)(?=[\s,:.$])",
    r"(?:^|\s)(LETTER)$",
    r"(LETTER):",
    r"(LETTER)",
)


def chosen_letter(text: str, letters: str) -> str:
    """The one of `letters` that a text decides for; "" where it has none of them."""
    for rule in _RULES:
        if found := re.search(rule.replace("LETTER", f"[{letters}]"), text):
            return found[1]
    return ""


def letter_score(
    options: Callable[[Mapping[str, Any]], tuple[str, str]], doc: Mapping[str, Any], results: Sequence[str]
) -> dict[str, float]:
    """lm_eval's judgement of a document: `options` tells its letters and the right one of them."""
    letters, right = options(doc)
    return {"exact_match": float(chosen_letter(results[0], letters) == right)}
