"""The page in a real browser, in front of the real application and engine: what a visitor sees, on a desk and on a phone.

Needs Chromium; `make test` installs one where it can (the fixture `browser`).
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from playwright.sync_api import Error as PlaywrightError

from llada.sampling.config import SamplingConfig
from llada.sampling.rules import RULES
from pipelines.serving.replica import Denoiser

pytestmark = pytest.mark.integration
PATIENCE_MS = 60_000  # on a machine that has other things to do
expect.set_options(PATIENCE_MS)
Served = Callable[[FastAPI], contextlib.AbstractContextManager[str]]
DESK = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}
PHONE = {
    "viewport": {"width": 360, "height": 740},
    "color_scheme": "dark",
    "has_touch": True,
    "is_mobile": True,
}
SCREENS = pytest.mark.parametrize("screen", [DESK, PHONE], ids=["desk", "phone"])
# Where the narrow screen is the harder one.
PHONE_FIRST = pytest.mark.parametrize(
    "screen", [pytest.param(DESK, marks=pytest.mark.slow), PHONE], ids=["desk", "phone"]
)
# A random network that is drawn from: many words, in an order of its own.
DRAWN = {"temperature": 1, "seed": 3}

# Of the last reply at each step: what stands in each place, and where that is.
REPLAY = """() => {
  const reply = [...document.querySelectorAll(".reply")].at(-1), slider = reply.querySelector("input");
  return Array.from({ length: Number(slider.max) + 1 }, (_, step) => {
    slider.value = step;
    slider.dispatchEvent(new Event("input"));
    return [...reply.querySelectorAll(".token:not(.end)")].map(token => {
      const { x, y, width } = token.getBoundingClientRect();
      const shown = token.classList.contains("other") ? token.dataset.other : token.textContent;
      return { text: token.classList.contains("masked") ? null : shown, at: [x, y, width],
        isFresh: token.classList.contains("fresh"), shade: token.style.getPropertyValue("--at") };
    });
  });
}"""
# Every place of the cells that a reply is shown in while it comes, each time that one of them changes.
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const box = document.querySelector(".tokens.cells");
    if (!box || !box.querySelector(".known")) return;
    window.seen.push([...box.querySelectorAll(".token")].map(cell => {
      const { x, y, width, height } = cell.getBoundingClientRect();
      return [x, y, width, height].join();
    }));
  }).observe(document.querySelector("#talk"), { subtree: true, attributes: true, attributeFilter: ["class"] });
}"""
# What may be pressed, smaller than a finger; and what is set smaller than a phone lets one read or type.
SMALL = """() => [...document.querySelectorAll("button, input, select, textarea, summary, .choice label")].flatMap(control => {
  if (!control.checkVisibility({ visibilityProperty: true }) || control.matches(".choice input")) return [];
  const { width, height } = control.getBoundingClientRect(), font = parseFloat(getComputedStyle(control).fontSize);
  const isTyped = control.matches("input:not([type=range]), select, textarea");
  return width < 40 || height < 40 || (isTyped && font < 16) ? [`${control.outerHTML.slice(0, 80)} ${width}x${height} ${font}`] : [];
})"""
# Texts smaller than a phone lets one read.
TINY = """() => {
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const box = walker.currentNode.parentElement, font = parseFloat(getComputedStyle(box).fontSize);
    if (!walker.currentNode.data.trim() || !box.checkVisibility({ visibilityProperty: true }) || box.closest(".sr, noscript")) continue;
    if (font < 16) found.push(`${font} ${box.outerHTML.slice(0, 120)}`);
  }
  return found;
}"""
# Texts, and what an empty field says, whose contrast to what is behind them is less than 4.5.
PALE = """() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour, under) => {
    paint.fillStyle = under; paint.fillRect(0, 0, 1, 1);
    paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = parts => parts.map(part => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  const check = (box, ink) => {
    if (!box.checkVisibility({ visibilityProperty: true }) || box.closest(".sr, .masked, noscript") || !box.getClientRects().length) return;
    const around = [];
    for (let each = box; each; each = each.parentElement) around.unshift(getComputedStyle(each).backgroundColor);
    const behind = around.reduce((under, colour) => `rgb(${rgb(colour, under)})`, "white");
    const [low, high] = [luminance(rgb(ink.color, behind)), luminance(rgb(behind, behind))].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${box.outerHTML.slice(0, 120)}`);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const box = walker.currentNode.parentElement;
    if (walker.currentNode.data.trim()) check(box, getComputedStyle(box));
  }
  for (const box of document.querySelectorAll(":placeholder-shown")) check(box, getComputedStyle(box, "::placeholder"));
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium: the machine's own, or that of `playwright install` (see the Makefile). Without one the page is not
    tested, and the run says so. (Of this file alone: Playwright has an event loop run in this thread for as long as it is up.)"""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except PlaywrightError as error:
            why = f"THE PAGE IS NOT TESTED, no Chromium: {error.message.splitlines()[0]}"
            warnings.warn(why, stacklevel=1)
            pytest.skip(why)
        yield browser
        browser.close()


class Slow:
    """A network each of whose forwards takes at least `pause_s`, as a large one's would."""

    def __init__(self, network: Any) -> None:
        self.network, self.pause_s = network, 0.0

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        time.sleep(self.pause_s)
        return self.network(*inputs, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)


@pytest.fixture(scope="module")
def denoiser(small_model: Path) -> Iterator[Denoiser]:
    denoiser = Denoiser(str(small_model), SamplingConfig(gen_length=24, steps=None, block_length=8))
    denoiser.engine.model = Slow(denoiser.engine.model)
    yield denoiser
    denoiser.close()


@pytest.fixture
def network(denoiser: Denoiser) -> Iterator[Slow]:
    yield denoiser.engine.model
    denoiser.engine.model.pause_s = 0.0


@pytest.fixture(scope="module")
def address(denoiser: Denoiser, application: Callable[..., FastAPI], served: Served) -> Iterator[str]:
    with served(application(denoiser)) as address:
        yield address


class Visitor:
    """A browser's window on the page, what it has asked for, and what it has complained of."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self.page: Page = context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.posts: list[dict[str, Any]] = []
        self._replies: list[Any] = []
        self.page.on("console", lambda said: self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._note)
        self.page.on("requestfinished", self._keep)
        self.page.goto(address)
        expect(self.page.locator("#facts dd").first).to_be_visible()

    def _note(self, request: Any) -> None:
        self.asked.append(request.url)
        if request.method == "POST":
            self.posts.append(json.loads(request.post_data))

    def _keep(self, request: Any) -> None:
        if request.method == "POST":
            self._replies.append(request)

    def drafts(self) -> list[dict[str, Any]]:
        """Those of the last reply, as they came."""
        while len(self._replies) < len(self.posts):  # the page may know of its end sooner
            self.page.wait_for_timeout(20)
        text = self._replies[-1].response().text()
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        return [chunk["draft"] for chunk in chunks if "draft" in chunk]

    def set(self, **values: Any) -> None:
        """Through the drawer."""
        self.page.get_by_role("button", name="Settings").click()
        for name, value in values.items():
            knob = self.page.get_by_label(name, exact=True)
            if not knob.is_visible():
                self.page.locator("summary").click()
            knob.fill(str(value))
            knob.blur()
        self.page.keyboard.press("Escape")

    def ask(self, text: str, *, shown: bool = True) -> None:
        """Send, and wait until the reply is there, and `shown` to its end."""
        self.page.get_by_role("textbox").fill(text)
        self.page.locator("#send").click()
        expect(self.page.locator("#send")).not_to_have_text("Stop")
        if shown:
            for play in self.page.locator(".reply:not(.folded) .play").all():
                expect(play).to_have_text("Play")

    def mode(self, name: str) -> None:
        self.page.get_by_role("radio", name=name).check(force=True)


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Callable[..., Visitor]]:
    """visit(**screen) opens the page. Afterwards: nothing went elsewhere, and the browser had nothing to complain of."""
    contexts: list[BrowserContext] = []
    visitors: list[Visitor] = []

    def visit(**screen: Any) -> Visitor:
        contexts.append(browser.new_context(**screen))
        visitors.append(Visitor(contexts[-1], address))
        return visitors[-1]

    yield visit
    for context in contexts:
        context.close()
    for visitor in visitors:
        assert visitor.complaints == []
        assert {url.split("/")[2] for url in visitor.asked if not url.startswith("data:")} == {address[7:]}


def check_looks(page: Page, screen: dict[str, Any]) -> None:
    """What is shown can be read and pressed, and is no larger than the screen: only the talk is scrolled."""
    assert page.evaluate(SMALL) == []
    assert page.evaluate(PALE) == []
    assert screen is DESK or page.evaluate(TINY) == []
    assert page.evaluate("() => document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate(
        "() => document.documentElement.scrollHeight <= document.documentElement.clientHeight"
    )
    assert page.evaluate(
        "() => { const m = document.querySelector('main'); return m.scrollWidth <= m.clientWidth }"
    )


@pytest.mark.parametrize(
    "screen, settings",
    [
        pytest.param(DESK, DRAWN, marks=pytest.mark.slow),
        (PHONE, DRAWN),
        (DESK, {**DRAWN, "remdm_cap": 0.4}),
    ],
    ids=["desk", "phone", "tokens are taken back"],
)
def test_words_come_in_the_order_of_the_events_and_nothing_moves(
    visit: Any, screen: dict[str, Any], settings: dict[str, Any]
) -> None:
    visitor = visit(**screen)
    visitor.set(**settings)
    visitor.ask("Go on!")
    drafts, steps = visitor.drafts(), visitor.page.evaluate(REPLAY)
    number, last = len(steps) - 1, drafts[-1]
    assert number == last["forwards"] >= 8
    assert all(token["text"] is None for token in steps[0])
    for draft in drafts:  # a busy machine's reader is not sent every one
        tokens = steps[draft["forwards"]]
        assert len(tokens) == len(last["tokens"])
        for place, token in enumerate(tokens):
            text, step = draft["tokens"][place], draft["steps"][place]
            if text is None or token["text"] is None:
                assert text is token["text"]
            else:
                assert token["text"].strip() == text.strip() or token["text"] == "↵"
            assert token["isFresh"] == (step is not None and number > step + 1 == draft["forwards"])
            assert step is None or float(token["shade"]) == pytest.approx(step / (number - 1), abs=1e-3)
    if "remdm_cap" not in settings:
        came = [
            next(n for n, tokens in enumerate(steps) if tokens[place]["text"] is not None)
            for place in range(len(last["tokens"]))
        ]
        assert came == [step + 1 for step in last["steps"]]
    for tokens in steps:
        assert [token["at"] for token in tokens] == [token["at"] for token in steps[0]]
    visitor.mode("confidence")
    for token, sure in zip(visitor.page.evaluate(REPLAY)[-1], last["confidences"], strict=True):
        assert float(token["shade"]) == pytest.approx(1 - sure, abs=1e-3)


@PHONE_FIRST
def test_a_reply_that_takes_its_time_does_not_move_either(
    visit: Any, network: Slow, screen: dict[str, Any]
) -> None:
    """Words that are not known yet have places of one width, until all are there."""
    visitor = visit(**screen)
    visitor.set(**DRAWN)
    network.pause_s = 0.25  # so that a busy machine's browser is shown enough of them
    visitor.page.evaluate(WATCH)
    visitor.ask("Go on!")
    seen = visitor.page.evaluate("() => window.seen")
    assert len(seen) >= 8
    assert len({len(places) for places in seen}) == 1
    assert [set(place) for place in zip(*seen, strict=True)] == [{place} for place in seen[0]]
    assert visitor.page.locator(".cells").count() == 0  # in the end it is text
    shown = visitor.page.locator(".tokens").last.inner_text()
    said = visitor.page.locator(".reply .text").text_content()
    assert "".join(shown.removesuffix("end").split()) == "".join(str(said).split())


def test_the_slider_and_the_button_replay_a_reply(visit: Any) -> None:
    visitor = visit(**DESK)
    visitor.set(**DRAWN)
    visitor.ask("Go on!")
    page, number = visitor.page, visitor.drafts()[-1]["forwards"]
    slider, output = page.get_by_role("slider"), page.locator(".count")
    expect(output).to_have_text(f"step {number} of {number}")
    slider.press("Home")
    expect(output).to_have_text(f"step 0 of {number}")
    assert page.locator(".reply .known").count() == 0
    slider.press("ArrowRight")
    slider.press("ArrowRight")
    expect(output).to_have_text(f"step 2 of {number}")
    fresh = [text for text in page.locator(".token.fresh").all_inner_texts() if text.strip()]
    said = f"step 2 of {number}" + (f": {', '.join(fresh)}" if fresh else "")
    assert slider.get_attribute("aria-valuetext") == said
    assert page.locator(".block.now").count() == 1
    page.get_by_role("button", name="Play").press("Enter")
    expect(page.get_by_role("button", name="Pause")).to_be_focused()
    expect(output).to_have_text(f"step {number} of {number}")
    assert page.locator(".block.now").count() == 0
    visitor.ask("One", shown=False)
    visitor.mode("confidence")
    page.get_by_role("button", name="Replay").click()
    assert page.locator(".legend .low").all_inner_texts() == ["sure", "sure"]
    visitor.mode("step")
    assert page.locator(".legend .low").all_inner_texts() == ["first", "first"]
    visitor.ask("One", shown=False)  # only the last reply has its player
    expect(page.get_by_role("slider")).to_have_count(1)


def test_two_settings_side_by_side(visit: Any) -> None:
    visitor = visit(**DESK)
    seed = 2**53 + 1  # no number of JavaScript
    visitor.set(seed=seed, temperature=1)
    visitor.page.get_by_role("button", name="Compare").click()
    visitor.ask("Go on!")
    assert [("threshold" in body, body["seed"]) for body in visitor.posts] == [(False, seed), (True, seed)]
    names = visitor.page.locator(".reply .name").all_inner_texts()
    assert names == [f"A: seed {seed}, temperature 1", f"B: seed {seed}, temperature 1, threshold 0.9"]
    left, right = (reply.bounding_box() for reply in visitor.page.locator(".reply").all())
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_role("radio", name="Side B").check(force=True)
    expect(visitor.page.get_by_label("threshold", exact=True)).to_have_value("0.9")
    expect(visitor.page.get_by_label("seed", exact=True)).to_have_value(str(seed))
    visitor.page.get_by_label("block_length", exact=True).fill("4")
    visitor.page.keyboard.press("Escape")
    visitor.ask("Go on!")
    assert [body.get("block_length") for body in visitor.posts[2:]] == [None, 4]
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_role("radio", name="Side A").check(force=True)
    visitor.page.keyboard.press("Escape")
    visitor.set(threshold=2)  # refused: the talk goes on with what the other side has said
    visitor.ask("One", shown=False)
    said = visitor.page.locator(".reply .text").last.text_content()
    visitor.ask("One, two", shown=False)
    assert [message["content"] for message in visitor.posts[-1]["messages"][-3:]] == ["One", said, "One, two"]
    visitor.complaints.clear()  # Chromium reports status 400 by itself


def test_beside_any_rule_stands_one_that_is_not_refused(visit: Any, address: str) -> None:
    page = visit(**DESK).page
    numbers = {"leap_anchor": 0.95, "leap_radius": 2, "schedule": "cosine", "confidence_eos_eot_inf": True}
    sides: list[dict[str, Any]] = [
        {
            **({rule.knob: 0.5} if rule.knob else {"remasking": name}),
            **({"top_p": 0.9, "stratified": True} if rule.temperature else {}),
            **{name: numbers[name] for name in rule.heeded},
        }
        for name, rule in RULES.items()
    ]
    sides.append({"temperature": 1, "top_k": 5, "min_p": 0.1, "seed": 3})
    beside = page.evaluate(
        """async sides => (({ beside }) => sides.map(side => beside(side, { temperature: null })))(
             await import("./static/settings.js"))""",
        sides,
    )
    for side in (*sides, *beside):
        answer = page.request.post(
            f"{address}/v1/completions", data={"prompt": "Go on!", "max_tokens": 3, **side}
        )
        assert answer.ok, (side, answer.text())
    assert beside[-1] == {**sides[-1], "threshold": 0.9}


def test_gaps_are_filled_and_what_stands_around_them_stays(visit: Any) -> None:
    visitor = visit(**PHONE)
    page = visitor.page
    visitor.set(**DRAWN)
    visitor.mode("Fill gaps")
    box = page.get_by_role("textbox", name="Text with gaps")
    box.fill("One, ")
    page.get_by_role("button", name="Add gap").click()
    assert box.input_value() == "One, ____"
    page.keyboard.type(" three. Go on!")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".figures")).to_contain_text("4 tokens")
    sent = {name: visitor.posts[0][name] for name in ("prompt", "suffix", "max_tokens", "seed")}
    assert sent == {"prompt": "One, ", "suffix": " three. Go on!", "max_tokens": 4, "seed": 3}
    whole = str(page.locator(".reply .text").text_content())
    assert (whole[:5], whole[-14:]) == ("One, ", " three. Go on!")
    expect(page.locator(".play")).to_have_text("Play")
    shown = page.locator(".reply .tokens").inner_text()
    assert (shown[:4], shown[-13:]) == ("One,", "three. Go on!")
    assert page.locator(".reply .token:not(.end)").count() == 4
    assert box.input_value() == "One, ____ three. Go on!"  # to go on with
    box.fill("One, __ three. ___ Go on!")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".figures").last).to_contain_text("forwards")
    assert visitor.posts[1]["suffix"] == [" three. ", 3, " Go on!"]
    assert visitor.posts[1]["max_tokens"] == 2
    whole = str(page.locator(".reply .text").last.text_content())
    assert (whole[:5], whole[-7:], " three. " in whole) == ("One, ", " Go on!", True)
    last = visitor.page.evaluate(REPLAY)
    kept = "".join(token["text"] for token in last[0] if token["text"] is not None)
    assert kept == "three."  # from the first step on
    assert sum(token["text"] is None for token in last[0]) == 5
    box.fill("no gap")
    page.locator("#send").click()
    expect(page.locator("#how")).to_contain_text("There is no gap yet")
    assert len(visitor.posts) == 2


def test_each_knob_is_in_the_drawer_with_its_default_and_its_help(visit: Any, address: str) -> None:
    visitor = visit(**PHONE)
    page = visitor.page
    card = page.request.get(f"{address}/v1/models").json()["data"][0]
    page.get_by_role("button", name="Settings").click()
    page.locator("summary").click()
    for name, default in card["defaults"].items():
        knob = page.get_by_label(name, exact=True)
        expect(knob).to_be_visible()
        help_id = str(knob.get_attribute("aria-describedby"))
        said = str(page.locator(f"#{help_id}").text_content())
        assert said, name
        assert "`" not in said, name
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert knob.get_attribute("placeholder") == str(default).removesuffix(".0"), name
    assert page.evaluate(SMALL) == []
    page.get_by_label("threshold", exact=True).fill("2")
    page.keyboard.press("Escape")
    visitor.ask("Go on!", shown=False)
    expect(page.locator(".reply .bad")).to_contain_text("threshold: input should be less than or equal to 1")
    visitor.set(threshold=".5")  # as HTML has it, not JSON
    again = page.get_by_role("button", name="Regenerate")
    again.click()
    expect(page.locator(".figures")).to_contain_text("tokens")
    assert visitor.posts[-1]["threshold"] == 0.5
    assert [message["content"] for message in visitor.posts[-1]["messages"]] == ["Go on!"]
    said = page.locator(".reply .text").text_content()
    visitor.set(threshold="2")
    visitor.ask("One, two", shown=False)
    visitor.set(threshold="0.5")
    again.click()  # what is asked again is what was refused, not what was answered before it
    expect(page.locator(".figures").last).to_contain_text("tokens")
    assert [message["content"] for message in visitor.posts[-1]["messages"]] == ["Go on!", said, "One, two"]
    visitor.complaints.clear()  # Chromium reports status 400 by itself


def test_a_system_prompt_a_second_turn_and_what_no_longer_fits(visit: Any) -> None:
    visitor = visit(**DESK)
    visitor.set(**{"System prompt": "Be brief."})
    visitor.ask("Go on! " * 300, shown=False)
    visitor.ask("One, two", shown=False)
    roles = [message["role"] for message in visitor.posts[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert visitor.posts[-1]["messages"][0]["content"] == "Be brief."
    reply = visitor.page.locator(".reply .text").first.text_content()
    assert visitor.posts[-1]["messages"][2]["content"] == reply
    assert visitor.page.locator(".trimmed").count() == 0
    visitor.ask("Go on! " * 400, shown=False)
    expect(visitor.page.locator(".trimmed")).to_have_text("The oldest turn no longer fits and is left out.")
    kept = [
        message["content"][:8] for message in visitor.posts[-1]["messages"] if message["role"] != "assistant"
    ]
    assert kept == ["Be brief", "One, two", "Go on! G"]
    visitor.page.get_by_role("button", name="New").click()
    visitor.ask("One", shown=False)
    assert len(visitor.posts[-1]["messages"]) == 2
    visitor.complaints.clear()  # Chromium reports status 400 by itself


@SCREENS
def test_a_locked_endpoint_asks_for_its_key(
    browser: Browser,
    denoiser: Denoiser,
    application: Callable[..., FastAPI],
    served: Served,
    screen: dict[str, Any],
) -> None:
    """Until it has one, what would do nothing cannot be pressed. Why a key is not taken can be read, and the next one typed."""
    with served(application(denoiser, keys=["correct-horse"])) as address:
        context = browser.new_context(**screen, reduced_motion="reduce")  # a colour on its way may be pale
        page, faults = context.new_page(), list[str]()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        heading, key = page.get_by_role("heading", level=1), page.locator("#key")
        later = [page.locator("#send"), *page.locator("#compare, #open-settings, #examples button").all()]
        kept = "() => sessionStorage.getItem('api-key')"
        expect(page.get_by_label("This endpoint wants an API key.")).to_be_focused()
        expect(key).to_have_attribute("aria-invalid", "false")
        expect(page.locator("#trouble")).to_be_hidden()
        assert len(later) == 6
        for button in later:
            expect(button).to_be_disabled()

        def check_refused(why: str) -> None:
            expect(page.locator("#trouble")).to_have_text(why)
            expect(page.locator("#trouble")).to_be_in_viewport(ratio=1)
            expect(page.get_by_role("status")).to_have_text(why)
            expect(key).to_have_attribute("aria-invalid", "true")
            expect(key).to_have_accessible_description(why)
            expect(key).to_be_focused()
            expect(heading).to_have_text("locked")
            check_looks(page, screen)

        unknown = "this API key is not one of the endpoint's"
        unseen = "character 8 of this API key is U+200B, which no key has: copy the key again"
        key.fill("another-horse")
        page.keyboard.press("Enter")
        check_refused(unknown)
        key.fill("correct\u200b-horse")
        page.get_by_role("button", name="Use it").click()
        check_refused(unseen)
        assert page.evaluate(kept) is None
        for stored, why in (("was-once-good", unknown), ("correct\u200b-horse", unseen)):
            page.evaluate("key => sessionStorage.setItem('api-key', key)", stored)
            page.reload()
            check_refused(why)
        key.fill(" correct-horse\u00a0")
        page.keyboard.press("Enter")
        expect(heading).to_have_text("tiny")
        expect(key).to_be_hidden()
        expect(page.locator("#trouble")).to_be_hidden()
        assert page.evaluate(kept) == "correct-horse"
        page.reload()
        expect(heading).to_have_text("tiny")
        for button in later:
            expect(button).to_be_enabled()
        page.get_by_role("button", name="Compare").click()
        page.get_by_role("textbox", name="Message").fill("Go on!")
        page.keyboard.press("Enter")
        expect(page.locator(".figures")).to_have_count(2)
        expect(page.locator(".figures").last).to_contain_text("tokens")

        page.evaluate("import('./static/endpoint.js').then(endpoint => endpoint.setKey('was-once-good'))")
        bodies = list[Any]()
        page.on("request", lambda sent: bodies.append(sent.post_data_json) if sent.method == "POST" else None)
        page.get_by_role("textbox", name="Message").fill("One, two")
        page.keyboard.press("Enter")
        check_refused(unknown)
        assert page.locator(".turn").last.inner_text().count(unknown) == 1
        key.fill("another-horse")
        with page.expect_response("**/v1/chat/completions"):
            page.keyboard.press("Enter")
        check_refused(unknown)
        key.fill("correct-horse")
        page.get_by_role("button", name="Use it").click()
        expect(page.locator(".turn").last.locator(".figures").last).to_contain_text("tokens")
        expect(key).to_be_hidden()
        expect(heading).to_have_text("tiny")
        assert [body["messages"][-1]["content"] for body in bodies] == ["One, two"] * 6
        assert bodies[-1]["messages"] == bodies[0]["messages"]
        assert page.locator(".turn").count() == 2
        assert faults == []
        context.close()


def test_a_page_opened_during_a_rollout_waits_for_the_endpoint(browser: Browser, address: str) -> None:
    page, faults = browser.new_page(), list[str]()
    page.on("pageerror", lambda error: faults.append(str(error)))

    def check_away(why: str) -> None:
        expect(page.locator("#trouble")).to_have_text(f"{why}; this page tries again by itself")
        expect(page.get_by_role("heading", level=1)).to_have_text("the endpoint is away")
        expect(page.get_by_role("button", name="Compare")).to_be_disabled()
        expect(page.get_by_role("button", name="Settings")).to_be_disabled()

    page.route("**/v1/models", lambda route: route.abort())
    page.goto(address)
    check_away("Failed to fetch")
    page.route("**/v1/models", lambda route: route.fulfill(status=503, body="<h1>no</h1>"))
    check_away("the endpoint answers with status 503")
    page.route(
        "**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "tiny"}]})
    )  # no defaults yet
    expect(page.get_by_role("heading", level=1)).to_have_text("tiny is starting")
    expect(page.locator("#trouble")).to_be_hidden()
    expect(page.get_by_role("button", name="Compare")).to_be_disabled()
    page.unroute("**/v1/models")
    expect(page.get_by_role("heading", level=1)).to_have_text("tiny")
    expect(page.locator("#trouble")).to_be_hidden()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("threshold", exact=True)).to_be_visible()
    assert faults == []
    page.close()


def test_copy_regenerate_and_stop(visit: Any, network: Slow) -> None:
    visitor = visit(**DESK, permissions=["clipboard-read", "clipboard-write"])
    page = visitor.page
    visitor.set(temperature=1)
    visitor.ask("<img src=x onerror=alert(1)>")
    first = page.locator(".reply .text").text_content()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == first
    assert page.get_by_role("status").text_content() == first
    page.get_by_role("button", name="Regenerate").press("Enter")
    expect(page.get_by_role("group", name="Reply")).to_be_focused()
    expect(page.locator("#send")).to_have_text("Send")
    assert page.locator(".reply").count() == 1
    assert page.locator(".reply .text").text_content() != first
    assert visitor.posts[0] == visitor.posts[1]
    assert page.locator("#talk img").count() == 0
    network.pause_s = 0.5
    page.get_by_role("textbox").fill("Go on!")
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_have_text("Stop")
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.locator(".reply .note").last).to_have_text("Stopped.")


def test_new_while_a_reply_comes_begins_anew(visit: Any, network: Slow) -> None:
    visitor = visit(**DESK)
    page = visitor.page
    network.pause_s = 0.5
    page.get_by_role("button", name="Tell me a story").press("Enter")
    expect(page.locator("#send")).to_have_text("Stop")
    expect(page.get_by_role("group", name="Reply")).to_be_focused()
    page.locator("#clear").click()
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.get_by_role("status")).to_have_text("")
    assert page.locator(".reply").count() == 0
    network.pause_s = 0
    visitor.ask("Go on!")
    assert len(visitor.posts[-1]["messages"]) == 1


def test_who_does_not_see_the_page_is_told_the_same(visit: Any, network: Slow) -> None:
    """The tree that a screen reader reads: everything has its name, who says what is said, a reply is announced. (What a step
    has written is in the test of the slider.)"""
    visitor = visit(**DESK)
    page, status = visitor.page, visitor.page.get_by_role("status")
    visitor.set(**DRAWN)
    network.pause_s = 0.5
    page.get_by_role("textbox", name="Message").fill("Go on!")
    page.keyboard.press("Enter")
    expect(status).to_have_text("The reply is being written.")
    assert page.get_by_role("group", name="Reply").get_attribute("aria-busy") == "true"
    network.pause_s = 0
    expect(page.locator(".figures")).to_contain_text("tokens")
    reply = str(page.locator(".reply .text").text_content())
    expect(status).to_have_text(reply)
    assert page.get_by_role("group", name="Reply").get_attribute("aria-busy") is None
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_role("button", name="Close")).to_be_focused()  # Enter does nothing that is lost
    drawer = page.locator("#settings").aria_snapshot()
    page.keyboard.press("Escape")
    tree = page.locator("body").aria_snapshot()
    print(tree)
    for part in ("- main:", '- group "Conversation":', "- article:", '- group "Reply":', '- form "Ask":'):
        assert part in tree, tree
    assert "You: Go on!" in tree
    nameless = r"^ *- (?:button|slider|textbox|radio|combobox|spinbutton|group|form|dialog)(?: \[.*\])?:?$"
    assert re.findall(nameless, f"{drawer}\n{tree}", re.MULTILINE) == []


def test_the_keyboard_reaches_everything_in_order(visit: Any) -> None:
    visitor = visit(**DESK)
    page = visitor.page
    visitor.set(**DRAWN)
    expect(page.get_by_role("button", name="Settings")).to_be_focused()  # where it was before the drawer
    visitor.ask("Go on!")
    page.locator("#clear").focus()
    walked = []
    for _ in range(12):
        page.keyboard.press("Tab")
        walked.append(
            page.evaluate(
                "() => (e => e.value && e.type === 'radio' ? e.value : e.id || e.className)(document.activeElement)"
            )
        )
        outlined = page.evaluate("""() => { const e = document.activeElement;
          return getComputedStyle(e.matches(".choice input") ? e.nextElementSibling : e).outlineStyle }""")
        assert walked[-1] in ("", "main") or outlined != "none", walked
    buttons = ["play", "", "quiet copy", "quiet again"]
    assert walked[:7] == [*buttons, "text", "send", "step"]


@SCREENS
def test_it_can_be_read_and_pressed(visit: Any, screen: dict[str, Any]) -> None:
    visitor = visit(**screen)
    page = visitor.page

    under_way = page.locator("#picture .masked:not(.end), #picture .fresh")
    expect(under_way).to_have_count(0)  # the picture has come to its end
    page.wait_for_timeout(400)
    check_looks(page, screen)
    visitor.set(**DRAWN)
    visitor.page.get_by_role("button", name="Compare").click()
    visitor.ask("Go on!")
    page.wait_for_timeout(400)
    check_looks(page, screen)
    page.get_by_role("button", name="Settings").click()
    check_looks(page, screen)
    drawer = page.locator("#settings")
    assert drawer.evaluate("drawer => drawer.scrollWidth <= drawer.clientWidth")


@PHONE_FIRST
def test_the_schemas_page_can_be_read(visit: Any, address: str, screen: dict[str, Any]) -> None:
    """Every route, with what must be sent first; no wider than the screen, and no mark-up in its text."""
    page = visit(**screen).page
    page.goto(f"{address}/docs")
    expect(page.locator("details").first).to_be_visible()
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(PALE) == []
    assert page.evaluate(SMALL) == []
    assert screen is DESK or page.evaluate(TINY) == []
    chat = page.locator("details", has=page.locator("summary", has_text="/v1/chat/completions"))
    assert chat.locator("dt").first.inner_text().startswith("messages")
    assert "`" not in page.locator("body").inner_text()
