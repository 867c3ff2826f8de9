"""What Ray's job server makes of a log, and what is shown of it. The pieces are those that a real one has sent."""

from __future__ import annotations

import pytest

from pipelines.stage.job_log import JobLog

BAR = "\ndedup documents:   0%|          | 0/1 [00:00<?, ?task/s]"
DONE = "\ndedup documents: 100%|██████████| 1/1 [00:15<00:00, 15.58s/task]"
ERASED = "\n" + " " * 64 + "\n"
DUMP = (
    "\x1b[33m(raylet)\x1b[0m Raylet is terminated. Last 20 lines of the Raylet logs:\n"
    "    [state-dump] \tNodeManagerService.grpc_server - 1 total (0 active), Execution time: mean = 0.93ms\n",
    "    [state-dump] \n"
    "    [2026-11-26 20:39:41,172 I 7846 7846] (raylet) worker_pool.cc:564: Started worker process\n\n",
)


def shown(*pieces: str) -> str:
    log = JobLog()
    return "".join([*map(log.read, pieces), log.close()])


def on_screen(text: str) -> list[str]:
    """The lines of a terminal that was sent this text."""
    lines = [""]
    column = 0
    for character in text:
        if character == "\n":
            lines.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column].ljust(column) + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_a_bar_keeps_to_one_line_and_is_shown_as_it_comes():
    log = JobLog()
    assert log.read("a\n\n\nb\n") == "a\n\n\nb\n"
    assert log.read(BAR) == "\rdedup documents:   0%|          | 0/1 [00:00<?, ?task/s]"
    text = log.read(DONE)
    assert "\n" not in text
    assert text.rstrip().endswith("15.58s/task]")
    assert on_screen("x\n" + text + log.read(ERASED) + log.read("the end\n") + log.close()) == [
        "x", "the end", "",
    ]  # fmt: skip


def test_what_is_written_behind_a_bar_gets_a_line_of_its_own():
    assert on_screen(shown(BAR + "a word\n", DONE, ERASED + "left out: none\n")) == [
        "a word", "left out: none", "",
    ]  # fmt: skip
    assert on_screen(shown(BAR + "a wo", "rd\n")) == ["a word", ""]


@pytest.mark.parametrize(
    "bar", ["pretrain: 300it [00:10, 29.90it/s]", "tiny:  50%|█████     | 6/12 [00:01<00:01, 4.8step/s, loss=3.1]"]
)  # fmt: skip
def test_bars_of_any_kind(bar):
    assert shown(f"\n{bar}\n{bar}") == "\r" + bar + "\r" + bar + "\r" + " " * len(bar) + "\r"


def test_the_dumps_of_a_lost_node_are_left_out():
    assert on_screen(shown(BAR, *DUMP, DONE, ERASED, "the end\n")) == [
        "(raylet) Raylet is terminated.", "the end", "",
    ]  # fmt: skip


def test_it_does_not_depend_on_how_the_log_is_cut():
    text = "begin\n" + BAR + DUMP[0] + DUMP[1] + DONE + ERASED + "\nthe end\nwithout a newline"
    whole = on_screen(shown(text))
    assert whole[-2:] == ["without a newline", ""]
    for size in (1, 2, 7, 100):
        assert on_screen(shown(*(text[i : i + size] for i in range(0, len(text), size)))) == whole
