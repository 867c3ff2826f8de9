"""The report as a browser sees it: well-formed, complete in itself, with the right numbers and no HTML from the data."""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llada.data.dedup.clusters import Cluster, Clusters
from llada.data.dedup.decontaminate import Coverage, DecontaminationConfig
from llada.data.dedup.steps import DedupConfig
from llada.data.document import Document
from llada.data.filters.chain import FILTERS
from llada.data.outcomes import KEPT, Report, merge
from llada.data.prepare import before
from llada.data.read.listing import list_inputs
from llada.data.read.parts import Part
from llada.data.report.facts import Facts, Run
from llada.data.report.funnel import steps
from llada.data.report.html import Markup, funnel_picture, histogram, note
from llada.data.report.page import SECTIONS, render_report
from llada.data.tokens.manifest import DatasetEntry, SplitEntry
from llada.data.work.config import PrepareConfig, SourceConfig
from llada.data.work.job import Job, Snapshot
from llada.data.work.read_config import ReadConfig
from llada.data.work.reading import Reading
from llada.data.work.units import Plan, Unit

ATTACK = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;</style></details>"
PLAN = Plan("unused", 3, 2, 4_000_000, "0123456789abcdef")
CHINESE = "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。"


class Page(HTMLParser):
    """The elements of a page, each [name, attributes, text inside]; complains about tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[int] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag != "meta":
            self._open.append(len(self.elements) - 1)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        names = [self.elements[place][0] for place in self._open]
        if {"td", "th"} & set(names):
            self.tables[-1][-1][-1] += data
        for place in self._open:
            self.elements[place][2].append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return [
            "".join(text)
            for name, found, text in self.elements
            if name == tag and attributes.items() <= found.items()
        ]

    def table(self, *head: str) -> list[list[str]]:
        """The rows of the first table whose head begins like this."""
        return next(rows[1:] for rows in self.tables if tuple(rows[0][: len(head)]) == head)


def _render(report: Report, config: PrepareConfig | None = None) -> str:
    return render_report({"": report}, plan=PLAN, config=config or PrepareConfig())


def _report() -> Report:
    report = Report(input_bytes=1000)
    report.outcomes = {
        "en": {
            KEPT: [50, 5000],
            "gopher_quality.few_words": [20, 400],
            "gopher_quality.stop_words": [10, 100],
        },
        "zh": {KEPT: [6, 600], "c4_quality.few_sentences": [3, 300], "duplicate": [4, 500]},
        "und": {"too_short": [5, 5], "url.domain": [1, 40], "surprise": [1, 55]},
    }
    report.splits = {"train": {"tokens": 1600}, "validation": {"tokens": 400}}
    report.seconds = {"filter": 7.0, "tokenise": 2.5, "pack": 0.5}
    return report


CONFIG = PrepareConfig(read=ReadConfig(filters=("web",)), dedup=DedupConfig())


def test_the_funnel_takes_away_what_each_filter_refused() -> None:
    rows = Page(_render(_report(), CONFIG)).table("After")
    assert [row[:5] for row in rows] == [
        ["Read", "", "100", "100%", "7.00 kB"],
        ["Length limits", "5", "95", "95.0%", "7.00 kB"],
        ["URL lists", "1", "94", "94.0%", "6.96 kB"],
        ["Language", "0", "94", "94.0%", "6.96 kB"],
        ["Gopher repetition", "0", "94", "94.0%", "6.96 kB"],
        ["Gopher quality", "30", "64", "64.0%", "6.46 kB"],
        ["C4", "3", "61", "61.0%", "6.16 kB"],
        ["FineWeb", "0", "61", "61.0%", "6.16 kB"],
        ["Duplicates", "4", "57", "57.0%", "5.66 kB"],
        ["surprise", "1", "56", "56.0%", "5.60 kB"],
    ]
    widths = re.findall(r'<rect width="([\d.]+)%"', _render(_report(), CONFIG))
    assert [widths[0], widths[-1]] == ["100.00", "80.00"]


def test_the_funnel_knows_every_filter_in_its_order() -> None:
    assert [step for step in steps() if step in FILTERS] == [name for name in FILTERS if name != "pii"]


def test_steps_that_are_off_and_refused_nothing_are_not_in_the_funnel() -> None:
    rows = Page(_render(_report())).table("After")
    assert [row[0] for row in rows] == [
        "Read", "Length limits", "URL lists", "Gopher quality", "C4", "Duplicates", "surprise",
    ]  # fmt: skip


def test_each_source_has_its_own_funnel_with_its_own_filters() -> None:
    sources = (SourceConfig("web", (), read=ReadConfig(filters=("fineweb",))), SourceConfig("code", ()))
    code = Report("code", outcomes={"und": {KEPT: [7, 70_000]}}, splits={"train": {"tokens": 9000}})
    page = Page(
        render_report({"web": _report(), "code": code}, plan=PLAN, config=PrepareConfig(sources=sources))
    )
    assert page.table("Source") == [
        ["code", "7", "7", "100.0%", "70.0 kB", "70.0 kB", "9,000"],
        ["web", "100", "56", "56.0%", "7.00 kB", "5.60 kB", "2,000"],
    ]
    overall, own_code, own_web = (rows[1:] for rows in page.tables if rows[0][0] == "After")
    assert overall[0][2] == "107"
    assert [row[0] for row in own_code] == ["Read"]
    assert [row[0] for row in own_web][-4:] == ["C4", "FineWeb", "Duplicates", "surprise"]


def test_headline_figures() -> None:
    text = " ".join(Page(_render(_report())).texts("dl"))
    for figure in (
        "100",
        "56",
        "56.0% of those read",
        "2,000",
        "train 1,600",
        "5.60 kB",
        "4.00 MB",
        "2 files · 3 units",
    ):
        assert figure in text
    assert "Tokens per second and core200CPU" in text  # 2000 tokens in 10 seconds


def test_rules_stand_under_their_filter_with_the_most_frequent_first() -> None:
    rows = Page(_render(_report())).table("Filter", "Rule")
    assert [row[1] for row in rows] == [
        "too_short", "url.domain", "gopher_quality.few_words", "gopher_quality.stop_words",
        "c4_quality.few_sentences", "duplicate", "surprise",
    ]  # fmt: skip
    assert rows[2] == ["Gopher quality", "gopher_quality.few_words", "20", "66.7%", "20.0%", "400 bytes"]


def test_languages_are_the_twenty_most_frequent_and_the_sum_of_the_rest() -> None:
    report = Report(
        outcomes={f"l{n:02d}": {KEPT: [100 - n, 1], "language.low_score": [n, 1]} for n in range(23)}
    )
    rows = Page(_render(report)).table("Language")
    assert [row[0] for row in rows] == [f"l{n:02d}" for n in range(20)] + ["3 more"]
    assert rows[5] == ["l05", "100", "95", "95.0%", "5"]
    assert rows[-1] == ["3 more", "300", "237", "79.0%", "63"]


def test_nothing_from_the_data_becomes_html() -> None:
    sample = {
        "hash": "0",
        "text": ATTACK,
        "value": ATTACK,
        "limit": ATTACK,
        "place": ATTACK,
        "language": ATTACK,
    }
    report = Report(
        ATTACK, outcomes={ATTACK: {KEPT: [1, 9], f"url.{ATTACK}": [1, 9], "contaminated": [1, 9]}}
    )
    report.samples = {
        KEPT: [sample],
        f"url.{ATTACK}": [sample],
        "duplicate": [{**sample, "value": 1}],
    }
    report.rejected = report.skipped = report.edits = {ATTACK: 2}
    report.damaged_files = report.unreadable_files = [ATTACK]
    report.matches = [{"place": ATTACK, "file": ATTACK, "line": 1, "words": ATTACK}]
    report.splits, report.seconds = {"train": {"tokens": 4}}, {ATTACK: 1.0}
    report.histograms = {ATTACK: {"3": 1}}
    config = PrepareConfig(
        tokenizer=ATTACK,
        dedup=DedupConfig(),
        decontamination=DecontaminationConfig(files=(ATTACK,)),
        sources=(SourceConfig(ATTACK, (ATTACK,)), SourceConfig("b", ())),
    )
    document = Document(ATTACK + " x", ATTACK, language=ATTACK)
    clusters = Clusters(1, 3, Counter({1: 1}), [Cluster(3, (1, 2))])
    page = render_report(
        {ATTACK: report, "b": Report("b")},
        plan=Plan("", 1, 1, 1, ATTACK),
        config=config,
        clusters=clusters,
        documents={1: document, 2: document},
    )
    harmless = Page(_render(_report()))
    attacked = Page(page)
    extra = {name for name, _, _ in attacked.elements} - {name for name, _, _ in harmless.elements}
    assert extra <= {
        "article",
        "details",
        "summary",
        "mark",
        "h3",
        "h4",
        "ul",
        "li",
        "figure",
        "figcaption",
        "title",
        "svg",
        "text",
        "span",
        "del",
        "polygon",
    }
    allowed = {"class", "id", "lang", "dir", "href", "style", "role", "aria-label", "open", "charset", "name", "content",
               "viewbox", "x", "y", "width", "height", "points", "tabindex"}  # fmt: skip
    assert {key for _, attributes, _ in attacked.elements for key in attributes} <= allowed
    assert ATTACK in attacked.texts("div", **{"class": "text"})  # and it can be read
    assert page.count("alert(1)") > 20


def test_what_the_tokenizer_made_of_a_sample_is_shown_by_source() -> None:
    counts = {"documents": 40, "empty_documents": 2, "altered_documents": 20, "lossy_documents": 10}
    counts |= {"characters": 1000, "lost_characters": 30, "tokens": 200, "unknown_tokens": 1}
    reports = {"web": Report("web", tokenizer=counts), "books": Report("books")}
    rows = Page(render_report(reports, plan=PLAN, config=CONFIG)).table(
        "Source", "Documents", "Unknown tokens"
    )
    assert rows == [
        ["web", "40", "0.5%", "5.0%", "50.0%", "25.0%", "3.0%"],
        ["books", "0", "–", "–", "–", "–", "–"],
    ]


def test_the_page_needs_no_other_file() -> None:
    page = _render(_report(), CONFIG)
    assert not re.search(r"https?:|<script|<link|<img|url\(|@import|\bsrc=", page)
    elements = Page(page).elements
    targets = {attributes["id"] for _, attributes, _ in elements if "id" in attributes}
    links = [attributes["href"] or "" for name, attributes, _ in elements if name == "a"]
    assert len(links) == 12
    assert {link.removeprefix("#") for link in links} == targets
    assert elements[2][:2] == ("meta", {"charset": "utf-8"})
    assert "light-dark(" in page


def test_a_run_with_much_to_tell_stays_below_a_megabyte() -> None:
    text = "字" * 600  # three bytes each
    place = "s3://bucket/" + "x" * 1000
    sample = {"hash": "0", "text": text, "value": text, "limit": None, "place": place, "language": "en"}
    sources = tuple(SourceConfig(f"s{n}", tuple([place] * 100)) for n in range(60))
    report = _report()
    report.samples = {f"gopher_quality.rule_{n}": [sample] * 4 for n in range(45)}
    report.matches = [{"place": place, "file": place, "line": 1, "words": text}] * 1000
    report.damaged_files = report.unreadable_files = [place] * 1000
    report.rejected = {f"{text} {n}": 1 for n in range(1000)}
    page = render_report(
        {source.name: report for source in sources},
        plan=PLAN,
        config=PrepareConfig(sources=sources, decontamination=DecontaminationConfig(files=("x",))),
    )
    assert 500_000 < len(page.encode()) < 1_000_000


def test_texts_of_every_script_stand_there_in_their_direction() -> None:
    texts = {
        "ar": "كل الناس يولدون أحرارا\nمتساوين",
        "zh": "人人生而自由，在尊严和权利上一律平等。",
        "ko": "모든 인간은",
        "cmn_Hans": "人人 & <生>",
    }
    report = Report()
    for language, text in texts.items():
        report.add(KEPT, Document(text, f"s3://{language}.jsonl:1", language=language))
    page = Page(_render(report).encode("utf-8").decode("utf-8"))
    for language, text in texts.items():
        assert page.texts("div", dir="auto", lang=language.replace("_", "-")) == [text]


def test_a_file_name_that_is_no_text_does_not_stop_the_report() -> None:
    report = Report(damaged_files=["/data/caf\udce9.jsonl"])
    assert "/data/caf?.jsonl" in _render(report).encode("utf-8").decode()


def test_a_refused_document_says_what_failed() -> None:
    report = Report()
    report.add("gopher_quality.few_words", Document("too few words", "s3://a.jsonl:7", language="en"), 3, 50)
    report.add("gopher_quality.hashes", Document("# # #", "s3://a.jsonl:8", language="en"), 0.123456, 0.1)
    report.add("url.domain", Document("x", "s3://a.jsonl:9"), "bad.example")
    page = Page(_render(report))
    assert page.texts("summary")[:3] == [
        "url.domain – 1 of 1", "gopher_quality.few_words – 1 of 1", "gopher_quality.hashes – 1 of 1",
    ]  # fmt: skip
    notes = page.texts("p", **{"class": "note"})
    assert "value 3 · limit 50 · en · s3://a.jsonl:7" in notes
    assert "value 0.1235 · limit 0.1 · en · s3://a.jsonl:8" in notes
    assert "value bad.example · und · s3://a.jsonl:9" in notes


@pytest.mark.parametrize(
    "removed, stayed, marked",
    [
        ("the quick brown fox", "the quick red fox", ["brown", "red"]),
        ("same words", "same words", []),
        ("one two three", "one  two three four", [" four"]),
        (CHINESE, CHINESE.replace("尊严", "自由"), ["尊严", "自由"]),
    ],
)
def test_near_duplicates_stand_side_by_side_with_their_differences_marked(
    removed: str, stayed: str, marked: list[str]
) -> None:
    report = Report()
    report.add("duplicate", Document(removed, "s3://a.jsonl:1", language="en"), 987654321)
    documents = {987654321: Document(stayed)}
    page = Page(render_report({"": report}, plan=PLAN, config=CONFIG, documents=documents))
    assert page.texts("div", **{"class": "text"}) == [removed, stayed]
    assert page.texts("mark") == marked
    assert "987654321" not in "".join(page.texts("main"))  # an internal number, not a value that failed


def test_clusters_of_duplicates_have_sizes_and_their_largest_is_shown() -> None:
    documents = {
        number: Document(text, "s3://x:1", language="en") for number, text in ((5, "a b c"), (9, "d b c"))
    }
    clusters = Clusters(700, 2500, Counter({1: 699, 10: 1}), [Cluster(1234, (5, 9))])
    report = Report(outcomes={"en": {"duplicate": [1800, 9000]}})
    page = Page(render_report({"": report}, plan=PLAN, config=CONFIG, clusters=clusters, documents=documents))
    assert "2,500 documents stand in 700 clusters" in "".join(page.texts("main"))
    assert "1,234 documents, 2 of them shown" in page.texts("summary")
    assert page.texts("title")[-10:][0] == "2 to 4: 699 clusters"
    assert page.texts("mark") == ["only here", "d"]
    assert page.texts("del") == ["only in the one that stayed", "a"]
    assert "duplicates; of each" not in "".join(Page(_render(report, CONFIG)).texts("main"))


def test_duplicate_lines_are_lines_wherever_the_report_speaks_of_them() -> None:
    """Not the documents of which too little stays without them: those have a name of their own."""
    report = Report(
        outcomes={"en": {KEPT: [40, 9000], "duplicate_lines": [3, 20]}}, edits={"duplicate_lines": 1712}
    )
    config = PrepareConfig(dedup=DedupConfig(lines=True))
    html = _render(report, config)
    page = Page(html)
    assert ["Too short without duplicate lines", "3"] in [row[:2] for row in page.table("After")]
    text = " ".join(page.texts("main"))
    assert "Too short without duplicate lines: 3 · Duplicate lines removed: 1,712" in text
    assert ["Duplicate lines removed", "1,712"] in [row[:2] for table in page.tables for row in table]
    assert set(re.findall(r"Duplicate lines(?! removed| are lines)[^<]*", html)) == set()


def test_matches_with_evaluation_sets_are_listed() -> None:
    report = Report(outcomes={"en": {"contaminated": [1, 10]}})
    report.matches = [
        {"place": f"s3://a:{n}", "file": "gsm8k.jsonl", "line": 2000, "words": "natalia sold"}
        for n in range(150)
    ]
    config = PrepareConfig(decontamination=DecontaminationConfig(files=("gsm8k.jsonl",)))
    page = Page(_render(report, config))
    rows = page.table("Evaluation file")
    assert len(rows) == 100
    assert rows[0] == ["gsm8k.jsonl", "2,000", "s3://a:0", "natalia sold"]
    assert "Matches, 100 of 150" in page.texts("summary")


def test_evaluation_rows_that_are_not_looked_for_are_no_clean_bill() -> None:
    config = PrepareConfig(decontamination=DecontaminationConfig(files=("a.jsonl",)))

    def shown(found: int) -> Page:
        each: Coverage = {"file": "a.jsonl", "rows": 50, "found_rows": found, "fields": 90, "found_fields": 3}
        return Page(render_report({"": _report()}, plan=PLAN, config=config, coverage=[each]))

    assert shown(50).table("Evaluation file") == [["a.jsonl", "50", "50", "90", "3"]]
    assert shown(50).texts("p", **{"class": "warning"}) == []
    assert "No document contains one of the 50 rows that were looked for." in shown(50).texts("p")
    (some,) = shown(48).texts("p", **{"class": "warning"})
    assert some.startswith(
        "2 of 50 evaluation rows of a.jsonl are not looked for: they are shorter than min_words=8"
    )
    (none,) = shown(0).texts("p", **{"class": "warning"})
    assert none.startswith("nothing was looked for in the data: none of the 50 evaluation rows")
    assert not any("No document contains" in text for text in shown(0).texts("p"))


def _mixture_report() -> str:
    sources = (SourceConfig("web", (), weight=0.75), SourceConfig("books", (), weight=0.25))
    counts = {
        name: {"documents": 9, "rows": 9, "tokens": tokens}
        for name, tokens in (("web", 3000), ("books", 4000))
    }
    splits = {
        "train": SplitEntry(rows=9, tokens=7000, indexes=()),
        "validation": SplitEntry(rows=0, tokens=0, indexes=()),
    }
    epochs = {"web": 1.0, "books": 0.25}
    dataset = DatasetEntry(kind="pretrain", row_length=8, splits=splits, sources=counts, epochs=epochs)
    run = Run(
        "s3://bucket/" + "very-long-name/" * 9, "snapshots/0002", "2026-11-26", "llada_8b", "107381d", 10.0
    )
    report = _report()
    report.unreadable_files = ["s3://bucket/a.jsonl"]
    report.file_problems = {"s3://bucket/a.jsonl": "access was denied (403)"}
    return render_report(
        {"web": report, "books": _report()},
        plan=PLAN,
        config=replace(CONFIG, sources=sources),
        dataset=dataset,
        run=run,
    )


def test_a_file_with_another_fault_than_damage_is_named_with_it() -> None:
    why = "missing_text: no field 'text', but 'body'"
    report = Report(rejected={"missing_text": 3}, file_problems={"/data/m.parquet": why})
    page = Page(render_report({"": report}, plan=PLAN, config=CONFIG))
    (listed,) = page.texts("li")
    assert listed == "/data/m.parquet" + why
    (damaged,) = Page(
        render_report({"": replace(report, damaged_files=["/data/m.parquet"])}, plan=PLAN, config=CONFIG)
    ).texts("li")
    assert damaged == listed


def test_the_report_says_which_run_it_is_and_what_its_mixture_uses() -> None:
    page = Page(_mixture_report())
    (facts,) = page.texts("dl", **{"class": "terms"})
    assert re.fullmatch("Presetllada_8bOutputs3://.*Snapshotsnapshots/0002Date2026-11-26Commit107381d", facts)
    assert "Tokens per second40010 seconds" in " ".join(page.texts("dl"))
    assert page.table("Source", "Weight") == [
        ["web", "0.75 (75.0%)", "3,000", "1", "3,000", "75.0%", "0 (0.0%)"],
        ["books", "0.25 (25.0%)", "4,000", "0.25", "1,000", "25.0%", "3,000 (75.0%)"],
    ]
    (warned,) = page.texts("p", **{"class": "warning"})
    assert warned.startswith("No row is held out for validation")
    assert page.texts("li") == ["s3://bucket/a.jsonlaccess was denied (403)"]


def test_each_source_has_a_picture_of_its_funnel() -> None:
    page = Page(_mixture_report())
    assert page.texts("figcaption")[:3] == ["All sources", "web", "books"]
    assert page.texts("text", **{"class": "start"})[:3] == ["Read", "Length limits", "URL lists"]
    assert page.texts("text", **{"class": "end"})[:3] == ["200 · 100.0%", "190 · 95.0%", "188 · 94.0%"]
    (picture,) = {
        name for name, attributes, _ in Page(funnel_picture([("Read", 0)])).elements if name == "svg"
    }
    assert picture == "svg"


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<script>
document.querySelectorAll("details").forEach(each => each.open = true);
const width = document.documentElement.clientWidth;
const outside = [...document.querySelectorAll("body *")].filter(
  each => each.getBoundingClientRect().right > width + 1 && !each.closest(".scroll"));
const cut = [...document.querySelectorAll("table")].filter(
  each => each.scrollWidth > each.parentElement.clientWidth
    && getComputedStyle(each.parentElement).overflowX !== "auto");
parent.postMessage([document.documentElement.scrollWidth <= width, outside.length, cut.length].join(), "*");
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [360, 420, 1280])
def test_the_page_fits_a_phone(tmp_path: Path, width: int) -> None:
    """Nothing but tables is wider than the screen, and those scroll by themselves."""
    (tmp_path / "report.html").write_text(_mixture_report().replace("</body>", MEASURE))
    (tmp_path / "phone.html").write_text(
        f"<iframe src=report.html width={width} height=900></iframe>"
        "<script>onmessage = message => { document.title = message.data }</script>"
    )
    command = [
        *(
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/profile",
        ),
        *("--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/phone.html"),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>true,0,0</title>" in shown


def test_bars_are_as_high_as_their_numbers() -> None:
    page = Page(histogram({"5": 10, "7": 40}))
    bars = [float(attributes["height"] or 0) for name, attributes, _ in page.elements if name == "rect"]
    assert bars == [pytest.approx(bars[2] / 4, abs=0.1), 0, bars[2]]
    assert page.texts("text", **{"class": "axis"}) == ["32", "64", "128", "256"]
    assert page.texts("title")[2] == "128 to 256: 40 documents"


def test_settings_that_were_changed_stand_first() -> None:
    read = ReadConfig(filters=("c4",))
    config = PrepareConfig(row_length=4096, sources=(SourceConfig("web", ("a", "b"), read=read),))
    page = Page(_render(Report(), config))
    changed, same = (rows[1:] for rows in page.tables if rows[0] == ["Setting", "Value"])
    assert changed == [
        ["row_length", "4096"], ["sources.web.input", '["a", "b"]'], ["sources.web.read.filters", '["c4"]'],
    ]  # fmt: skip
    assert ["dedup.bands", "14"] in same
    assert not {row[0] for row in same} & {row[0] for row in changed}


def test_dialogues_have_no_cost_of_a_corpus_and_an_empty_run_has_a_report() -> None:
    sft = Page(_render(Report(), PrepareConfig(kind="sft")))
    assert "Cost" not in sft.texts("h2")
    empty = Page(render_report({}, plan=PLAN, config=PrepareConfig()))
    assert "Cost" in empty.texts("h2")
    assert "Every file was read and every record was sound." in empty.texts("p")
    assert "Left out: none." in empty.texts("p")


def test_what_is_left_out_is_named() -> None:
    """What the listing of the input met, and what reading a file showed."""
    report = Report(outcomes={"und": {KEPT: [1, 9]}}, skipped={"request": 4})
    report.left_out = {"JSON object without 'text'": {"files": 1, "examples": ["/d/infos.json"]}}
    unread = {
        "*.md": {"files": 12, "examples": ["d/a.md", "d/b.md"]},
        ATTACK: {"files": 1, "examples": [ATTACK]},
    }
    page = Page(render_report({"": report}, plan=replace(PLAN, left_out=unread), config=PrepareConfig()))
    assert page.table("What", "Files or folders") == [
        ["*.md", "12", "d/a.md, d/b.md"],
        [ATTACK, "1", ATTACK],
        ["JSON object without 'text'", "1", "/d/infos.json"],
    ]
    assert "Left out: 14 files or folders" in page.texts("summary")
    assert "Left out: none." not in page.texts("p")


def test_the_report_of_real_documents_adds_up(shared_dir: Path) -> None:
    reports = {}
    for source, file in (("web", "text/c4_200.jsonl.gz"), ("labelled", "web/quality_labels.jsonl")):
        (listed,) = list_inputs([str(shared_dir / "data" / file)])
        unit = Unit((Part(listed, listed.size),), source)
        config = PrepareConfig(read=ReadConfig(filters=("gopher_repetition", "c4", "fineweb")))
        reading = Reading.of(Job(config, Snapshot("unused", 0), PLAN), unit)
        for document in before(reading):
            reading.report.add(KEPT, document)
        reports[source] = reading.report
    page = Page(render_report(reports, plan=PLAN, config=PrepareConfig()))
    total = merge(reports.values())
    assert total.documents() == 200 + 181
    assert page.table("After")[-1][2] == f"{total.documents(KEPT):,}"
    refused = sum(int(row[2].replace(",", "")) for row in page.table("Filter", "Rule"))
    assert refused == total.documents() - total.documents(KEPT) > 0
    shown = page.texts("div", **{"class": "text"})
    assert {sample["text"] for samples in total.samples.values() for sample in samples} == set(shown)


def test_a_section_is_a_function_and_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def weather(facts: Facts) -> Markup:
        return note(f"{facts.total.documents()} clouds")

    monkeypatch.setitem(SECTIONS._entries, "Weather", weather)
    page = Page(_render(_report()))
    assert page.texts("section", id="weather") == ["Weather100 clouds"]
    assert page.texts("a", href="#weather") == ["Weather"]
