"""The sections that show texts: samples of what was kept and refused, and duplicates beside what stayed for them."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator

from llada.data.document import Document
from llada.data.outcomes import KEPT, SAMPLE_CHARS, Sample
from llada.data.report.facts import Facts
from llada.data.report.funnel import DUPLICATE, DUPLICATES, rank, steps
from llada.data.report.html import (
    Markup,
    cell,
    details,
    format_count,
    format_number,
    histogram,
    join,
    note,
    tag,
)

LINES = "Duplicate lines removed"


def samples(facts: Facts) -> Markup:
    total = facts.total
    documents = Counter({KEPT: total.documents(KEPT)}) + total.refused()
    parts = []
    for outcome in sorted(total.samples, key=lambda name: (name != KEPT, rank(name), name)):
        if outcome != DUPLICATE:
            chosen = total.samples[outcome]
            title = join(tag("code", outcome), f" – {len(chosen)} of {format_count(documents[outcome])}")
            articles = (tag("article", _origin(s), _text_box(s["text"], s["language"])) for s in chosen)
            parts.append(details(title, *articles))
    return join(note(f"Chosen by the hash of their text, cut at {SAMPLE_CHARS} characters."), *parts)


def duplicates(facts: Facts) -> Markup:
    total = facts.total
    if not facts.config.deduplicates:
        return note("Deduplication is off.")
    pairs = []
    for sample in total.samples.get(DUPLICATE, []):
        removed, stayed = sample["text"], facts.documents.get(_document_id(sample))
        texts = (removed,) if stayed is None else _side_by_side(removed, stayed.text)
        columns = [
            tag("div", tag("h4", name), _text_box(text, sample["language"]))
            for name, text in zip(("Removed", "Stayed"), texts, strict=False)
        ]
        origin = _origin({**sample, "value": None})  # the value is an internal number
        pairs.append(tag("article", origin, tag("div", *columns, class_="columns")))
    counts = [f"{steps()[outcome]}: {format_count(total.documents(outcome))}" for outcome in DUPLICATES]
    if facts.config.dedup.lines:
        counts.append(f"{LINES}: {format_count(total.edits.get('duplicate_lines', 0))}")
    shown = [details("Samples, with the words that differ marked", *pairs)] if pairs else []
    return join(note(" · ".join(counts)), _clusters(facts), *shown)


def _legend() -> Markup:
    own, missing = tag("mark", "only here"), tag("del", "only in the one that stayed")
    return tag("p", "In a removed text: ", own, ", ", missing, ".", class_="note")


def _document_id(sample: Sample) -> int:
    """Of the document that stayed for a sample of duplicates; 0 when it is not known."""
    return sample["value"] if isinstance(sample["value"], int) else 0


def _clusters(facts: Facts) -> Markup:
    """How large the clusters of duplicates are, and the largest ones: what stayed and some of what went for it."""
    clusters = facts.clusters
    if clusters is None or not clusters.number:
        return join()
    summary = (
        f"{format_count(clusters.documents)} documents stand in {format_count(clusters.number)} clusters of "
        "duplicates; of each the first one stays."
    )
    largest = []
    for cluster in clusters.largest:
        stayed, *went = (facts.documents[number] for number in cluster.ids)
        boxes = [join(tag("h4", "Stayed"), _place(stayed), _text_box(stayed.text, stayed.language))]
        for document in went:
            marked = _in_one(document.text, stayed.text)
            boxes.append(join(tag("h4", "Removed"), _place(document), _text_box(marked, document.language)))
        title = f"{format_count(cluster.size)} documents, {len(boxes)} of them shown"
        largest.append(details(title, *(tag("article", box) for box in boxes)))
    sizes = {str(k): number for k, number in clusters.sizes.items()}
    figure = tag("figure", tag("figcaption", "Clusters by their documents"), histogram(sizes, of="clusters"))
    return join(note(summary), figure, tag("h3", "Largest clusters"), _legend(), *largest)


# --- Parts of sections ------------------------------------------------------------------------------------------------


def _origin(sample: Sample) -> Markup:
    """Value and limit, language and place of a sample."""
    facts = [sample["language"], cell(sample["place"])]
    if sample["limit"] is not None:
        facts.insert(0, f"limit {format_number(sample['limit'])}")
    if sample["value"] is not None:
        facts.insert(0, f"value {format_number(sample['value'])}")
    return tag("p", " · ".join(filter(None, facts)), class_="note")


def _place(document: Document) -> Markup:
    return tag("p", f"{document.language} · ", cell(document.place), class_="note")


def _text_box(text: object, language: str) -> Markup:
    return tag("div", text, class_="text", dir="auto", lang=language.replace("_", "-"))


def _differences(removed: str, stayed: str) -> Iterator[tuple[bool, str, str]]:
    """(whether they are equal, piece of `removed`, piece of `stayed`), one behind the other, in whole words."""
    by_character = len(removed) > 30 * len(removed.split())  # a script without spaces
    left, right = (list(t) if by_character else re.split(r"(\s+)", t) for t in (removed, stayed))
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    for kind, begin, end, other_begin, other_end in matcher.get_opcodes():
        yield kind == "equal", "".join(left[begin:end]), "".join(right[other_begin:other_end])


def _side_by_side(removed: str, stayed: str) -> tuple[Markup, Markup]:
    """Both texts, with the words that the other one does not have in that place marked."""
    pieces = list(_differences(removed, stayed))
    return (
        join(*(_marked(own, is_equal) for is_equal, own, _ in pieces)),
        join(*(_marked(other, is_equal) for is_equal, _, other in pieces)),
    )


def _in_one(removed: str, stayed: str) -> Markup:
    """The text that was removed, its own words marked, and those that only the other one has struck out beside them."""
    parts: list[object] = []
    for is_equal, own, other in _differences(removed, stayed):
        parts += [tag("del", other)] if other.strip() and not is_equal else []
        parts.append(_marked(own, is_equal))
    return join(*parts)


def _marked(piece: str, is_equal: bool) -> str:
    return piece if is_equal or not piece.strip() else tag("mark", piece)
