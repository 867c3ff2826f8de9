"""The pictures of the endpoint's page in README, taken of the page itself.

    python tests/experiments/page_pictures.py --model FOLDER [--images .github/images]

Serves FOLDER (that of page_model.py) in this process, asks through the page in headless Chromium, and writes
    page.gif          a reply, step by step, then coloured by confidence
    page-compare.png  two settings side by side, midway
    page-phone.png    a gap being filled, on a phone in the dark
Needs Chromium, Playwright and Pillow.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from llada.sampling.config import SamplingConfig
from pipelines.serving.backend import Health
from pipelines.serving.card import model_facts
from pipelines.serving.replica import Denoiser
from pipelines.serving.routes import build_api

STEP_MS, QUESTION_MS, END_MS = 150, 900, 2500
COLOURS = 128
SMALL_SCREEN = {"width": 360, "height": 740}


class Backend:
    """A Denoiser in this process."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.stream = denoiser.stream

    def health(self) -> Health:
        return Health("ok")


@contextlib.contextmanager
def serving(denoiser: Denoiser, name: str) -> Iterator[str]:
    facts = model_facts(denoiser.engine.model.config, denoiser.sampling)
    api = build_api(Backend(denoiser), name, facts=facts)
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    (socket,) = server.servers[0].sockets
    yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def open_page(
    browser: Browser, address: str, *, width: int, height: int, scale: float = 1, dark: bool = False
) -> Page:
    """Without motion: what is shown is what a picture was asked of."""
    page = browser.new_page(
        viewport={"width": width, "height": height},
        device_scale_factor=scale,
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
        is_mobile=dark,
        has_touch=dark,
    )
    page.goto(address)
    expect(page.locator("#facts dd").first).to_be_visible()
    return page


def ask(page: Page, question: str) -> None:
    page.get_by_role("textbox").fill(question)
    page.locator("#send").click()
    expect(page.locator(".figures").last).to_contain_text("tokens")
    page.locator("#text").evaluate("box => box.blur()")


def show(page: Page, share: float) -> None:
    """All replies at this share of their steps."""
    page.evaluate(
        """share => document.querySelectorAll(".player input").forEach(slider => {
             slider.value = Math.round(share * slider.max);
             slider.dispatchEvent(new Event("input"));
           })""",
        share,
    )


def animate(page: Page, question: str, file: Path) -> None:
    ask(page, question)
    frames: list[tuple[bytes, int]] = []
    steps = int(page.locator(".player input").get_attribute("max") or 0)
    for step in range(steps + 1):
        show(page, step / steps)
        frames.append((page.screenshot(), QUESTION_MS if step == 0 else STEP_MS if step < steps else END_MS))
    page.get_by_role("radio", name="confidence").check(force=True)
    frames.append((page.screenshot(), END_MS))
    images = [Image.open(io.BytesIO(content)).convert("RGB") for content, _ in frames]
    # One palette of all, so that what does not change does not flicker.
    sheet = Image.new("RGB", (images[0].width, images[0].height * 3))
    for place, image in enumerate((images[0], images[len(images) // 2], images[-2])):
        sheet.paste(image, (0, place * image.height))
    palette = sheet.quantize(COLOURS, dither=Image.Dither.NONE)
    drawn = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    drawn[0].save(
        file,
        save_all=True,
        append_images=drawn[1:],
        duration=[milliseconds for _, milliseconds in frames],
        loop=0,
        optimize=True,
    )


def take(page: Page, file: Path) -> None:
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--images", type=Path, default=Path(".github/images"))
    parser.add_argument("--question", default="Tell me a story about a girl.")
    parser.add_argument("--text", default="Once upon a time, in a small house, there lived a __ named Amy.")
    arguments = parser.parse_args()
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    denoiser = Denoiser(str(arguments.model), SamplingConfig(gen_length=48, steps=None, block_length=16))
    with serving(denoiser, "stories") as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        animate(
            open_page(browser, address, width=820, height=460, scale=1.5),
            arguments.question,
            arguments.images / "page.gif",
        )
        page = open_page(browser, address, width=1100, height=520, scale=1.5)
        page.get_by_role("button", name="Compare").click()
        ask(page, arguments.question)
        show(page, 0.6)
        take(page, arguments.images / "page-compare.png")
        page = open_page(browser, address, **SMALL_SCREEN, scale=1.5, dark=True)
        page.get_by_role("radio", name="Fill gaps").check(force=True)
        ask(page, arguments.text)
        show(page, 0.5)
        take(page, arguments.images / "page-phone.png")
        browser.close()
    denoiser.close()


if __name__ == "__main__":
    main()
