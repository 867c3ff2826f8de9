"""A reply on its canvas: what can be read already, what a draft looks like, when it ends."""

from __future__ import annotations

import torch

from llada.sampling.reply import Reply
from llada.tokenizer import END_OF_TURN, encode_texts, train_tokenizer

TOKENIZER = train_tokenizer(["The cat sat on the mat. The dog ran off."] * 5, 300)
EOS, MASK = TOKENIZER.eos_token_id, TOKENIZER.mask_token_id
EOT = TOKENIZER.convert_tokens_to_ids(END_OF_TURN)
SAT, ON, MAT = (encode_texts(TOKENIZER, [text])[0] for text in (" sat", " on", " mat"))


def build(length: int, stop: tuple[str, ...] = (), fill_id: int | None = EOS) -> Reply:
    ends = frozenset({EOS, EOT})
    return Reply(TOKENIZER, start=1, length=length, mask_id=MASK, end_ids=ends, stop=stop, fill_id=fill_id)


def row(*ids: int) -> torch.Tensor:
    return torch.tensor([7, *ids, 8])  # prompt, reply, suffix


def test_reads_up_to_the_first_mask_and_no_token_twice() -> None:
    reply = build(len(SAT + ON) + 2)
    tokens = row(*SAT, *[MASK] * len(ON), MASK, *MAT[:1])
    assert reply.read(tokens) == " sat"
    assert reply.draw() == [*SAT, *[None] * (len(ON) + 1), *MAT[:1]]
    assert reply.read(tokens) == ""
    assert reply.reason is None
    assert reply.num_committed == len(SAT)


def test_an_end_behind_masks_ends_nothing_yet_but_fills_what_follows() -> None:
    reply = build(6)
    tokens = row(*SAT[:1], MASK, EOT, MASK, MAT[0], MASK)
    reply.read(tokens)
    assert reply.reason is None
    assert tokens.tolist() == [7, SAT[0], MASK, EOT, EOS, MAT[0], EOS, 8]
    assert reply.draw() == [SAT[0], None]
    tokens[2] = SAT[0]
    reply.read(tokens)
    assert (reply.reason, reply.num_committed) == ("stop", 2)
    other = row(EOT, MASK)
    build(2, fill_id=None).read(other)
    assert other.tolist() == [7, EOT, EOT, 8]  # no EOS: the end token itself


def test_a_full_canvas_ends_it_and_a_stop_string_cuts_it() -> None:
    reply = build(len(SAT + ON))
    assert reply.read(row(*SAT, *ON)) == " sat on"
    assert reply.reason == "length"
    stopped = build(len(SAT + ON + MAT), stop=("at on",))
    assert stopped.read(row(*SAT, *ON, *MAT)) == " s"
    assert stopped.reason == "stop"
