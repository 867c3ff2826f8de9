"""The sections of the report: each a function of the facts of a run that gives its HTML, or None when it has nothing to say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from llada.data.dedup.decontaminate import coverage_problem
from llada.data.filters.chain import resolve_filters
from llada.data.left_out import FilesLeftOut, added
from llada.data.outcomes import KEPT, Counts, Report, merge
from llada.data.report.cost_tables import cost_tables, format_rate
from llada.data.report.examples import LINES
from llada.data.report.facts import Facts, Run
from llada.data.report.funnel import (
    DUPLICATE,
    NOTHING,
    Amount,
    amount_of,
    amount_read,
    by_outcome,
    in_order,
    rank,
    refused_by_step,
    step_name,
    step_of,
    steps,
)
from llada.data.report.html import (
    Markup,
    bar,
    cell,
    details,
    format_bytes,
    format_count,
    format_share,
    funnel_picture,
    histogram,
    join,
    note,
    table,
    tag,
    terms,
    warning,
)
from llada.data.tokens.splits import SPLITS
from llada.data.work.config import PrepareConfig, SourceConfig

_MAX_LANGUAGES = 20
_MAX_ROWS = 100  # of a list of files, matches or reasons
_MAX_SOURCES = 20  # with a funnel of their own
NO_VALIDATION = "No row is held out for validation: training on this data cannot tell whether it learns more than the text."


def overview(facts: Facts) -> Markup:
    total, plan = facts.total, facts.plan
    read, kept = amount_read(total), amount_of(total, KEPT)
    tokens, seconds = _tokens(total), sum(total.seconds.values())
    rejected = sum(total.rejected.values())
    splits = (f"{name} {format_count(total.splits.get(name, {}).get('tokens', 0))}" for name in SPLITS)
    steps = (f"{step} {spent:,.1f}" for step, spent in total.seconds.items())
    speed = format_count(tokens / seconds) if seconds else "–"
    figures = [
        ("Documents read", format_count(read.documents), f"{format_count(rejected)} records rejected"),
        ("Documents kept", format_count(kept.documents), f"{format_share(kept.documents, read.documents)} of those read"),
        ("Tokens", format_count(tokens), " · ".join(splits)),
        ("Text kept", format_bytes(kept.bytes), f"of {format_bytes(read.bytes)} read"),
        ("Input", format_bytes(plan.bytes), f"{format_count(plan.files)} files · {format_count(plan.units)} units"),
        *_wall_speed(facts.run, tokens),
        ("Tokens per second and core", speed, f"CPU seconds: {', '.join(steps) or '–'}"),
    ]  # fmt: skip
    tiles = [
        tag("div", tag("dt", name), tag("dd", value), tag("dd", remark, class_="note"))
        for name, value, remark in figures
    ]
    held_out = facts.dataset.splits["validation"].rows if facts.dataset else 1
    return join(
        _run_facts(facts.run) if facts.run else "",
        tag("dl", *tiles, class_="figures"),
        "" if held_out else warning(NO_VALIDATION),
        note(f"Plan {plan.id}. Sizes are decimal: 1 MB is 1,000,000 bytes."),
    )


def _run_facts(run: Run) -> Markup:
    named = {
        "Preset": run.preset or "–",
        "Output": run.output,
        "Snapshot": run.snapshot,
        "Date": run.created_at,
        "Commit": run.git_commit or "–",
    }
    return terms({name: tag("code", value) for name, value in named.items()})


def _wall_speed(run: Run | None, tokens: int) -> Iterator[tuple[str, str, str]]:
    if run and run.seconds:
        remark = f"{run.seconds:,.0f} seconds from the beginning of the last attempt to this report"
        yield "Tokens per second", format_count(tokens / run.seconds), remark


def funnels(facts: Facts) -> Markup:
    reports, total, config = facts.by_source, facts.total, facts.config
    active = {
        name: {*resolve_filters(config.read_of(name).filters), *_global_steps(config)} for name in reports
    }
    everywhere: set[str] = set().union(*active.values())
    largest = sorted(reports, key=lambda name: -amount_read(reports[name]).bytes)
    pictures = [_picture(total, everywhere, "All sources" if len(reports) > 1 else "Documents")]
    if len(reports) > 1:
        pictures += [_picture(reports[name], active[name], name) for name in largest[:_MAX_SOURCES]]
    parts = [tag("div", *pictures, class_="columns"), _funnel(total, everywhere)]
    parts.append(
        note(
            "Bytes are those of a text when its fate was decided: C4 and the scrubbing of personal data rewrite. "
            "Duplicate lines are lines; a document of which too little stays without them goes as a whole."
        )
    )
    if len(reports) > 1:
        rows = []
        for name in largest:
            read, kept = amount_read(reports[name]), amount_of(reports[name], KEPT)
            counts = (
                format_count(read.documents),
                format_count(kept.documents),
                format_share(kept.documents, read.documents),
            )
            rows.append(
                (
                    name,
                    *counts,
                    format_bytes(read.bytes),
                    format_bytes(kept.bytes),
                    format_count(_tokens(reports[name])),
                )
            )
        head = ("Source", "Read", "Kept", "Share", "Text read", "Text kept", "Tokens")
        parts += [tag("h3", "By source"), table(head, rows, "lrrrrrr")]
        parts += [details(name, _funnel(reports[name], active[name])) for name in largest[:_MAX_SOURCES]]
    return join(*parts)


def _global_steps(config: PrepareConfig) -> Iterator[str]:
    """The steps after the filters that are switched on."""
    if config.decontamination.files:
        yield "contaminated"
    if config.dedup.exact or config.dedup.fuzzy:
        yield DUPLICATE
    if config.dedup.lines:
        yield "duplicate_lines"


def _left_after(report: Report, active: set[str]) -> Iterator[tuple[str, Amount, Amount]]:
    """(step, what it refused, what is left) of each step that is switched on or refused something."""
    refused, left = refused_by_step(report), amount_read(report)
    for step in in_order({*refused, *(active & set(steps()))}):
        lost = refused.get(step, NOTHING)
        left = left.plus(-lost.documents, -lost.bytes)
        yield step, lost, left


def _picture(report: Report, active: set[str], title: str) -> Markup:
    read = amount_read(report)
    levels = [("Read", read.documents)]
    levels += [(step_name(step), left.documents) for step, _, left in _left_after(report, active)]
    return tag("figure", tag("figcaption", cell(title)), funnel_picture(levels))


def _funnel(report: Report, active: set[str]) -> Markup:
    """Documents and bytes left after each step."""
    read = amount_read(report)
    rows = [("Read", "", format_count(read.documents), "100%", format_bytes(read.bytes), bar(1))]
    for step, lost, left in _left_after(report, active):
        documents = format_count(left.documents), format_share(left.documents, read.documents)
        size = format_bytes(left.bytes), bar(left.bytes / read.bytes if read.bytes else 0)
        rows.append((step_name(step), format_count(lost.documents), *documents, *size))
    return table(("After", "Refused", "Documents left", "Share", "Bytes left", ""), rows, "lrrrrb")


def languages(facts: Facts) -> Markup:
    total = facts.total
    by_language = {code: Report(outcomes={code: counts}) for code, counts in total.outcomes.items()}
    ranked = sorted(by_language, key=lambda code: (-by_language[code].documents(), code))
    shown = [(code, by_language[code]) for code in ranked[:_MAX_LANGUAGES]]
    if rest := ranked[_MAX_LANGUAGES:]:
        shown.append((f"{len(rest)} more", merge(by_language[code] for code in rest)))
    steps = in_order(refused_by_step(total))
    rows = []
    for code, report in shown:
        refused, read, kept = refused_by_step(report), report.documents(), report.documents(KEPT)
        counts = (format_count(refused[step].documents) if step in refused else "·" for step in steps)
        rows.append((code, format_count(read), format_count(kept), format_share(kept, read), *counts))
    head = ("Language", "Read", "Kept", "Share", *map(step_name, steps))
    explained = (
        "und: not identified, or refused before that. After the share: documents that each step refused."
    )
    return join(table(head, rows, "lrrr" + "r" * len(steps)), note(explained))


def rules(facts: Facts) -> Markup:
    total = facts.total
    by_rule, by_step = by_outcome(total), refused_by_step(total)
    by_rule.pop(KEPT, None)
    rows = []
    for rule in sorted(by_rule, key=lambda rule: (rank(rule), -by_rule[rule].documents, rule)):
        (documents, size), step = by_rule[rule], step_of(rule)
        shares = format_share(documents, by_step[step].documents), format_share(documents, total.documents())
        rows.append(
            (step_name(step), tag("code", rule), format_count(documents), *shares, format_bytes(size))
        )
    head = ("Filter", "Rule", "Documents", "Of the filter's", "Of all", "Bytes")
    return table(head, rows, "llrrrr") if rows else note("No document was refused.")


def lengths(facts: Facts) -> Markup:
    charts = [
        tag("figure", tag("figcaption", f"{name.capitalize()} of the kept documents"), histogram(counts))
        for name, counts in sorted(facts.total.histograms.items())
        if counts
    ]
    return tag("div", *charts, class_="columns") if charts else note("No document was kept.")


def tokenizer(facts: Facts) -> Markup | None:
    """What is left of a sample when its tokens are read again, by source."""
    rows = []
    for source, report in facts.by_source.items():
        counts = Counter(report.tokenizer)
        documents = counts["documents"]
        rows.append(
            (
                cell(source or "all"),
                format_count(documents),
                format_share(counts["unknown_tokens"], counts["tokens"]),
                *(
                    format_share(counts[f"{kind}_documents"], documents)
                    for kind in ("empty", "altered", "lossy")
                ),
                format_share(counts["lost_characters"], counts["characters"]),
            )
        )
    if not any(report.tokenizer for report in facts.by_source.values()):
        return None
    head = ("Source", "Documents", "Unknown tokens", "Empty", "Altered", "Lossy", "Characters lost")
    explained = (
        "A sample is encoded and decoded again. Empty: documents of which nothing is left. Altered: whose text is not the "
        "same; lossy: those in which more than case, accents and spaces is different. "
        f"Above {facts.config.max_lost_text_fraction:.0%} of the characters lost, a preparation stops."
    )
    return join(table(head, rows, "lrrrrrr"), note(explained))


def contamination(facts: Facts) -> Markup:
    config, total, coverage = facts.config.decontamination, facts.total, facts.coverage
    if not config.files:
        return note("No evaluation set was given.")
    counted = [
        (
            cell(each["file"]),
            *(format_count(each[key]) for key in ("rows", "found_rows", "fields", "found_fields")),
        )
        for each in coverage[:_MAX_ROWS]
    ]
    head = ("Evaluation file", "Rows", "Looked for", "Fields", "Looked for alone")
    title = f"Evaluation files, {_listed(counted, coverage)}"
    searched = [details(title, table(head, counted, "lrrrr"), is_open=True)] if counted else []
    if problem := coverage_problem(coverage, config.min_words):
        searched.insert(0, warning(problem))
    if not total.matches:
        rows_found = sum(each["found_rows"] for each in coverage)
        fine = f"No document contains one of the {format_count(rows_found)} rows that were looked for."
        return join(note(fine) if rows_found else "", *searched)
    rows = [
        (
            cell(match["file"]),
            format_count(match["line"]),
            cell(match["place"]),
            tag("span", cell(match["words"]), dir="auto"),
        )
        for match in total.matches[:_MAX_ROWS]
    ]
    removed = format_count(total.documents("contaminated"))
    listed = table(("Evaluation file", "Line", "Document", "Matching words"), rows, "lrll")
    matches = details(f"Matches, {_listed(rows, total.matches)}", listed)
    return join(note(f"Documents removed: {removed}."), *searched, matches)


def input_files(facts: Facts) -> Markup:
    total = facts.total
    parts: list[object] = []
    told = {*total.unreadable_files, *total.damaged_files}
    others = [name for name in total.file_problems if name not in told]
    for title, files in (
        ("Unreadable files", total.unreadable_files),
        ("Damaged files", total.damaged_files),
        ("Files with other problems", others),
    ):
        if files:
            items = [tag("li", _file_and_why(name, total)) for name in files[:_MAX_ROWS]]
            parts.append(details(f"{title}: {_listed(items, files)}", tag("ul", *items), is_open=True))
    left_out = added(facts.plan.left_out, total.left_out)
    if left_out:
        parts.append(details(f"Left out: {_files(left_out)}", _left_out_table(left_out), is_open=True))
    tables = [
        (title, counts)
        for title, counts in (
            ("Rejected records", total.rejected),
            ("Skipped records", total.skipped),
            ("Replaced or removed in kept documents", total.edits),
        )
        if counts
    ]
    columns = [tag("div", tag("h3", title), _counts_table(counts)) for title, counts in tables]
    parts.append(tag("div", *columns, class_="columns"))
    fine = join(note("Left out: none."), note("Every file was read and every record was sound."))
    return join(*parts) if any((told, others, left_out, tables)) else fine


def _file_and_why(label: str, report: Report) -> Markup:
    why = report.file_problems.get(label)
    return join(cell(label), tag("p", why, class_="note") if why else "")


def speed(facts: Facts) -> Markup:
    total, rates = facts.total, facts.rates
    seconds = sum(total.seconds.values())
    rows = [
        (name, f"{spent:,.1f}", format_share(spent, seconds),
         format_count(_tokens(total) / spent) if spent else "–",
         format_rate(name, rates) if name in rates.measured else "–")
        for name, spent in total.seconds.items()
    ]  # fmt: skip
    head = ("Step", "CPU seconds", "Share", "Tokens per second and core", "Text per second and core")
    explained = (
        "Seconds of CPU time, summed over workers. A short run's include the loading of models and lists. Those of the "
        "deduplication after its signatures (sorting and linking keys) are not measured here."
    )
    return join(table(head, rows, "lrrrr"), note(explained))


def cost(facts: Facts) -> Markup | None:
    return cost_tables(facts.rates) if facts.config.kind == "pretrain" else None


def settings(facts: Facts) -> Markup:
    config = facts.config
    chosen, defaults = dict(_flat(asdict(config))), dict(_flat(asdict(PrepareConfig())))
    for source in config.sources:
        defaults |= _flat(asdict(SourceConfig(source.name, ())), f"sources.{source.name}.")
    changed = {name: value for name, value in chosen.items() if defaults.get(name) != value}
    same = {name: value for name, value in chosen.items() if name not in changed and "sources." not in name}
    tables = [
        table(("Setting", "Value"), [(tag("code", cell(n)), cell(value)) for n, value in rows.items()], "ll")
        for rows in (changed, same)
    ]
    return join(tables[0], details("Settings left at their defaults", tables[1]))


# --- Parts of sections ------------------------------------------------------------------------------------------------


def _counts_table(counts: Counts) -> Markup:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = {"duplicate_lines": LINES}
    rows = [(cell(named.get(name, name)), format_count(number)) for name, number in ranked[:_MAX_ROWS]]
    return table(("Reason", "Number"), rows, "lr")


def _left_out_table(left_out: FilesLeftOut) -> Markup:
    ranked = sorted(left_out.items(), key=lambda item: (-item[1]["files"], item[0]))
    rows = [
        (cell(reason), format_count(entry["files"]), cell(", ".join(entry["examples"])))
        for reason, entry in ranked[:_MAX_ROWS]
    ]
    return table(("What", "Files or folders", "Some of them"), rows, "lrl")


def _files(left_out: FilesLeftOut) -> str:
    return f"{format_count(sum(entry['files'] for entry in left_out.values()))} files or folders"


def _tokens(report: Report) -> int:
    return sum(split.get("tokens", 0) for split in report.splits.values())


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, JSON) of every setting; the items of a list of settings are called by their name."""
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], dict):
        value = {item.get("name", str(place)): item for place, item in enumerate(value)}
    if not isinstance(value, dict):
        yield prefix.removesuffix("."), json.dumps(value, ensure_ascii=False, default=str)
        return
    for name, item in value.items():
        yield from _flat(item, f"{prefix}{name}.")


def _listed(shown: Sequence[object], everything: Sequence[object]) -> str:
    return f"{len(shown)} of {len(everything)}" if len(shown) < len(everything) else str(len(shown))
