"""Answers of MATH: where they stand in a text, what they are called, and whether two are the same.

The rules are those of Minerva (Lewkowycz et al., arXiv 2206.14858, appendix D), as lm_eval's minerva_math has them; two answers
that are spelled differently are compared by math-verify.
"""

from __future__ import annotations

import re

from llada.errors import UserError

NO_ANSWER = "[invalidanswer]"
# Appendix D: what is replaced, in this order, and what is taken out.
_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), (r"\$", ""), (r"\ ", ""), (" ", ""), ("mbox", "text"),
    (r",\text{and}", ","), (r"\text{and}", ","), (r"\text{m}", r"\text{}"),
)  # fmt: skip
_UNITS = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "sue", "points", "feet",
    "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples",
)  # fmt: skip
_TAKEN_OUT = (
    r"\ldots", r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}", r"\text{}",
    r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots",
)  # fmt: skip
_WHOLE_UNIT = re.compile(rf"(?<!\\)\b({'|'.join(_UNITS)})\b")
_COMMAND = re.compile(r"(\\[a-zA-Z]+)")


def final_answer(text: str) -> str:
    """What follows "Final Answer: The final answer is" and precedes "I hope it is correct."; `NO_ANSWER` without it."""
    found = re.search(
        r"Final Answer: The final answer is(.*?). I hope it is correct.", text + "I hope it is correct."
    )
    return found[1].strip() if found else NO_ANSWER


def boxed_answer(text: str) -> str:
    r"""What stands in the last \boxed{…} or \fbox{…} of a text, braces within it included; `NO_ANSWER` without one."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return NO_ANSWER
    rest = text[start:].removeprefix(r"\boxed").removeprefix(r"\fbox")
    if rest.startswith(" "):
        return rest[1:].split("$")[0]
    depth = 0
    for place, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return rest[1:place] if sign == "}" else NO_ANSWER
    return NO_ANSWER


def normalize(answer: str) -> str:
    """An answer without its units, dollars, boxes and short forms (Minerva, appendix D)."""
    answer = _WHOLE_UNIT.sub("", answer.split("=")[-1])
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for unit in _UNITS:
        # Also where it is glued to a number by now, but not in the name of a command, such as "ft" in \left.
        answer = "".join(
            part if part.startswith("\\") else part.replace(unit, "") for part in _COMMAND.split(answer)
        )
    for sign in _TAKEN_OUT:
        answer = answer.replace(sign, "")
    answer = re.sub(r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$", answer)
    for command in ("text", "textbf", "overline"):
        answer = re.sub(rf"\\{command}\{{(.*?)\}}", r"\1", answer)
    answer = re.sub(r"\\boxed\{(.*)\}", r"\1", answer)
    # \frac12 is \frac{1}{2}, \sqrt2 is \sqrt{2}, \sqrt[3]2 is \sqrt[3]{2}.
    answer = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", answer)
    answer = re.sub(r"sqrt(\[[^\]]*\])(\w)", r"sqrt\1{\2}", answer)
    answer = re.sub(r"sqrt(?!\[)([^{])", r"sqrt{\1}", answer).replace("$", "")
    # 100,000 is 100000, while 0,1 are two numbers.
    return answer.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+", answer) else answer


def is_equivalent(answer: str, gold: str) -> bool:
    """Whether two normalized answers are the same. Raises UserError without math-verify."""
    if not answer or answer == NO_ANSWER:
        return False
    if answer == gold:
        return True
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError("the task math needs math-verify: pip install 'llada-pipelines[eval]'") from None
    return bool(verify(parse(f"${gold}$"), parse(f"${answer}$")))
