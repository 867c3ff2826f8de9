"""Requests in blocks: nothing is lost, each finds its answer again, and a text that is too long is scored in pieces."""

from __future__ import annotations

import itertools
from collections import Counter

from llada.evals.requests.blocks import TextRequest, add_up, score_blocks, windows, write_blocks
from llada.evals.requests.scoring import ScoreConfig
from llada.evals.requests.worker import Asked, Scored


def test_every_token_is_scored_once_behind_what_fits_before_it() -> None:
    context, text, longest = list(range(7)), list(range(100, 123)), 9
    pieces = list(windows(context, text, None, longest))
    assert list(itertools.chain.from_iterable(piece for _, piece, _ in pieces)) == text
    whole = [*context, *text]
    for before, piece, noise_of in pieces:
        begin = whole.index(piece[0])
        assert noise_of == whole[:begin]  # all of it, though a part is shown
        assert 1 <= len(before) == min(longest - len(piece), begin)
        assert before == whole[begin - len(before) : begin]
    assert list(windows([1], [], None, 4)) == []


def test_the_masks_are_those_of_the_whole_context() -> None:
    """Choices of one prompt share them where the prompt is cut for the longer one; pieces of a text have masks of their own."""
    prompt = list(range(8))
    ((_, _, short),) = windows(prompt, [50], None, 9)
    ((shown, _, long),) = windows(prompt, [60, 61, 62], None, 9)
    assert (short, long, shown) == (None, prompt, prompt[2:])
    pieces = list(windows([0], [1, 2, 3, 4, 5], [7, 7], 3))
    assert [noise_of for _, _, noise_of in pieces] == [[7, 7], [7, 7, 1, 2], [7, 7, 1, 2, 3, 4]]


def test_scores_come_back_to_their_pairs() -> None:
    asked: list[Asked] = [([1] * (n % 5 + 1), [2] * (n % 11), [3] * (n % 2) or None) for n in range(150)]
    blocks, owners = score_blocks(asked, ScoreConfig(num_samples=9, seed=2), max_length=6)
    assert [block["num_requests"] for block in blocks] == [len(block["pairs"]) for block in blocks]
    assert max(block["num_requests"] for block in blocks) == 64
    assert len({block["name"] for block in blocks}) == len(blocks)
    # What decides a score stands in the block, so that a result of other settings is not taken for its own.
    assert all(
        block["score"] == {"rule": "monte_carlo", "num_samples": 9, "cfg_scale": 0.0, "seed": 2}
        for block in blocks
    )
    pairs = [pair for block in blocks for pair in block["pairs"]]
    lengths = [len(context) + len(piece) for context, piece, _ in pairs]
    assert lengths == sorted(lengths)
    for (context, piece, noise_of), owner in zip(pairs, owners, strict=True):
        before, text, given = asked[owner]
        own = before if given is None else given
        whole = context if noise_of is None else noise_of
        assert whole == own + text[: len(whole) - len(own)]
        assert piece == text[len(whole) - len(own) :][: len(piece)]
    scores: list[Scored] = [
        {"log_p": -len(piece), "is_greedy": len(piece) < 5, "nfe": 1, "seconds": 0.5, "dtype": "bfloat16"}
        for _, piece, _ in pairs
    ]
    found = add_up(len(asked), owners, scores)
    assert [score["log_p"] for score in found] == [-len(text) for _, text, _ in asked]
    # A piece holds five tokens at the most, and one that does not is enough.
    assert [score["is_greedy"] for score in found] == [len(text) < 5 for _, text, _ in asked]
    assert {score["dtype"] for score, (_, text, _) in zip(found, asked, strict=True) if text} == {"bfloat16"}
    pieces = [-(-len(text) // 5) for _, text, _ in asked]
    assert [score["nfe"] for score in found] == pieces
    assert [score["seconds"] for score in found] == [count / 2 for count in pieces]


def test_texts_of_one_wish_stand_together_and_keep_their_seeds() -> None:
    wishes = [({"gen_length": 8}, ["."]), ({"gen_length": 4}, ["."]), ({"gen_length": 8}, [])]
    requests = [TextRequest([n] * (1 + n % 7), *wishes[n % 3], [n] * (n % 2)) for n in range(200)]
    blocks, order = write_blocks(requests, seed=1000)
    assert sorted(order) == list(range(200))
    places = iter(order)
    for block in blocks:
        assert block["num_requests"] == len(block["prompts"]) == len(block["seeds"]) <= 64
        for prompt, suffix, seed in zip(block["prompts"], block["suffixes"], block["seeds"], strict=True):
            number = next(places)
            assert (prompt, block["sampling"], block["stop"], suffix) == tuple(requests[number])
            assert seed == 1000 + number
    kinds = Counter((block["sampling"]["gen_length"], tuple(block["stop"])) for block in blocks)
    # 67, 67 and 66 texts of each kind.
    assert kinds == {(8, (".",)): 2, (4, (".",)): 2, (8, ()): 2}
