"""The corpus that every Python installation carries: its language reference and its docstrings. No download.

    python_documents()   prose for pretraining: one document per pydoc topic and per documented module
    python_questions()   {"prompt", "response"} pairs for SFT: "What does os.path.join do?"
The order is fixed; the content depends on the Python version only. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llada.data.document import Document

_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "turtledemo",
    "pydoc_data",
}
_ALIASES = {"posixpath": "os.path"}
_UNDERLINE = re.compile(r"^[*=\-~^#\"]{3,}$")
_EMPHASIS = re.compile(r"(?<![\w*`])\*{1,2}(?=\S)([^*\n]+?)(?<=\S)\*{1,2}(?![\w*])")
_ROLE = re.compile(r":[a-z:]+:`~?([^`]+)`")
_SIGNATURE = re.compile(r"^[\w.]+\s*\([^\n]*\)\s*(->.*)?$")
_SENTENCE = re.compile(r"[A-Za-z]{2,}[^\n]* [a-z]+")
_ANSWER_CHARS = (40, 400)
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_documents() -> Iterator[Document]:
    """The topics of the language reference, then the docstrings of each public standard module as one document."""
    from pydoc_data.topics import topics

    for label in sorted(topics):
        yield Document(reflow(clean_topic(topics[label])), f"python:topic/{label}")
    for module, entries in _modules():
        texts = [prose for _, _, docstring in entries if (prose := clean_docstring(docstring))]
        if texts:
            text = reflow("\n\n".join(dict.fromkeys(texts)))
            yield Document(text, f"python:module/{module}")


def python_questions() -> Iterator[dict[str, str]]:
    """One question per public module, class, function and method whose docstring opens with a usable answer."""
    prompts, responses = set(), set()
    for _, entries in _modules():
        for kind, name, docstring in entries:
            response = _answer(docstring)
            prompt = f"What does {name} do?" if kind == "function" else f"What is the {kind} {name} for?"
            if response is None or prompt in prompts or response in responses:
                continue
            prompts.add(prompt)
            responses.add(response)
            yield {"prompt": prompt, "response": response}


def reflow(text: str) -> str:
    """One paragraph a line: hard line breaks and indentation are the terminal's, not the language's."""
    return "\n".join(" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if p.strip())


def clean_topic(text: str) -> str:
    """A pydoc topic as prose: no underlines of headings, no emphasis stars; everything else as it stands."""
    lines = [line for line in text.splitlines() if not _UNDERLINE.match(line.strip())]
    lines = [line.replace("-[ ", "").replace(" ]-", "") if line.startswith("-[ ") else line for line in lines]
    return _EMPHASIS.sub(r"\1", "\n".join(lines)).strip()


def clean_docstring(text: str) -> str:
    """A docstring as prose: no interpreter sessions, no reST roles; "" when no sentence is left."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text))
    kept = [p for p in paragraphs if not p.lstrip().startswith((">>>", "..."))]
    prose = _ROLE.sub(r"\1", "\n\n".join(kept)).strip()
    return prose if _SENTENCE.search(prose) else ""


def _answer(docstring: str) -> str | None:
    """The first paragraph in one line, without a leading signature; None when too short, too long or no sentence."""
    lines = clean_docstring(docstring).split("\n\n")[0].splitlines()
    if lines and _SIGNATURE.match(lines[0].strip()):
        lines = lines[1:]
    answer = " ".join(" ".join(lines).split())
    shortest, longest = _ANSWER_CHARS
    is_prose = shortest <= len(answer) <= longest and _SENTENCE.search(answer) and answer[-1] in ".!?)"
    return answer if is_prose else None


@functools.cache
def _modules() -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(module name, [(kind, dotted name, docstring)]) of the public modules of the standard library, by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for path in root.rglob("*.py"):
        pieces = path.relative_to(root).with_suffix("").parts
        if pieces[-1] == "__init__":
            pieces = pieces[:-1]
        hidden = any(piece.startswith("_") or "-" in piece or piece in _SKIPPED for piece in pieces)
        if pieces and not hidden:
            sources.append((".".join(pieces), path))
    modules = []
    for module, path in sorted(sources):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a template or a file of another encoding is no documentation
        name = _ALIASES.get(module, module)
        if entries := list(_docstrings(tree, name, "module")):
            modules.append((name, entries))
    return modules


def _docstrings(node: _Documented, name: str, kind: str) -> Iterator[tuple[str, str, str]]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring:
        yield kind, name, docstring
    for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else []:
        if isinstance(child, _DEFINITIONS) and not child.name.startswith("_"):
            child_kind = "class" if isinstance(child, ast.ClassDef) else "function"
            yield from _docstrings(child, f"{name}.{child.name}", child_kind)
