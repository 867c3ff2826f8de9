"""The report of a preparation run as one HTML file: no script, no other file, and everything from the data escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llada.data.dedup.clusters import Clusters
from llada.data.dedup.decontaminate import Coverage
from llada.data.document import Document
from llada.data.outcomes import Report
from llada.data.report import examples, sections
from llada.data.report.facts import Facts, Run
from llada.data.report.html import Markup, page, tag
from llada.data.report.mixture import mixture
from llada.data.tokens.manifest import DatasetEntry
from llada.data.work.config import PrepareConfig
from llada.data.work.units import Plan
from llada.registry import Registry

Section = Callable[[Facts], Markup | None]

# In the order in which they stand on the page. A new one is a function in sections.py (or beside it) and a row here.
SECTIONS: Registry[Section] = Registry(
    "section of the report",
    {
        "Overview": sections.overview,
        "Funnel": sections.funnels,
        "Mixture": mixture,
        "Languages": sections.languages,
        "Rules": sections.rules,
        "Lengths": sections.lengths,
        "Tokenizer": sections.tokenizer,
        "Samples": examples.samples,
        "Duplicates": examples.duplicates,
        "Contamination": sections.contamination,
        "Input": sections.input_files,
        "Speed": sections.speed,
        "Cost": sections.cost,
        "Settings": sections.settings,
    },
)


def render_report(
    by_source: Mapping[str, Report],
    *,
    plan: Plan,
    config: PrepareConfig,
    clusters: Clusters | None = None,
    documents: Mapping[int, Document] | None = None,
    coverage: Sequence[Coverage] = (),
    dataset: DatasetEntry | None = None,
    run: Run | None = None,
) -> str:
    """The page, as text to be stored in UTF-8; for the arguments see `Facts`."""
    facts = Facts(by_source, plan, config, clusters, documents or {}, coverage, dataset, run)
    bodies = {name: body for name, section in SECTIONS.items() if (body := section(facts)) is not None}
    links = [tag("a", name, href=f"#{name.lower()}") for name in bodies]
    main = [tag("section", tag("h2", name), body, id=name.lower()) for name, body in bodies.items()]
    title = f"Data preparation: {run.output}" if run else "Data preparation"
    return page(title, tag("nav", *links), tag("main", *main))
