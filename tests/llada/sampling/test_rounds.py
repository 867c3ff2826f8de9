"""Text longer than the window: lengths, contexts and noise of the strided rounds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llada.errors import UserError
from llada.model.transformer import Transformer
from llada.sampling.generate import generate
from llada.sampling.rounds import generate_rounds

MakeModel = Callable[..., Transformer]


def test_lengths_and_contexts_of_the_rounds() -> None:
    seen: list[Tensor] = []

    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        seen.append(tokens.clone())
        return torch.randn(*tokens.shape, 9, generator=torch.Generator().manual_seed(len(seen)))

    out = generate_rounds(predict, rows=2, window=8, stride=3, num_strides=2, steps=4, mask_id=8, seed=0)
    assert out.sequences.shape == out.reveal_step.shape == (2, 14)
    assert not (out.sequences == 8).any()
    assert len(seen) == out.nfe
    assert out.token_forwards == sum(tokens.numel() for tokens in seen)
    assert (out.reveal_step >= 0).all()
    ends = [int(out.reveal_step[:, a:b].max()) + 1 for a, b in ((0, 8), (8, 11), (11, 14))]
    assert ends[-1] == out.nfe
    for k, start in ((1, ends[0]), (2, ends[1])):
        context = out.sequences[:, 8 + 3 * (k - 1) - 5 : 8 + 3 * (k - 1)]
        first = seen[start]
        assert first.shape[1] == 8
        assert all(row in context.tolist() for row in first[:, :5].tolist())
        assert (first[:, 5:] == 8).all()


def test_the_prompt_leads_the_first_window(make_model: MakeModel) -> None:
    model, prompt = make_model(), torch.tensor([[5, 6, 7], [9, 8, 7]])
    out = generate_rounds(model, window=10, stride=4, num_strides=1, steps=5, prompt=prompt, seed=3)
    assert torch.equal(out.sequences[:, :3], prompt)
    assert out.sequences.shape == (2, 14)
    assert out.reveal_step.shape == (2, 11)
    first = generate(model, prompt, gen_length=7, steps=5, block_length=7, remasking="ancestral", seed=3)
    assert torch.equal(out.sequences[:, :10], first.sequences)
    assert torch.equal(out.reveal_step[:, :7], first.reveal_step)


def test_rounds_and_rows_have_noise_of_their_own() -> None:
    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 50)

    for seed in (0, [0, 1, 2], [0, 3, 6], [5, 3, 8]):
        out = generate_rounds(
            predict,
            rows=3,
            window=8,
            stride=4,
            num_strides=3,
            steps=1,
            mask_id=49,
            seed=seed,
            remasking="random",
            temperature=1.0,
        )
        pieces = {tuple(piece.tolist()) for row in out.sequences for piece in row[8:].split(4)}
        pieces |= {tuple(row[:4].tolist()) for row in out.sequences}
        assert len(pieces) == 12, seed  # 49⁴ possible pieces: a repetition is a shared stream
        again = generate_rounds(
            predict,
            rows=3,
            window=8,
            stride=4,
            num_strides=3,
            steps=1,
            mask_id=49,
            seed=seed,
            remasking="random",
            temperature=1.0,
        )
        assert torch.equal(again.sequences, out.sequences)


def test_nothing_is_written_after_an_eos_of_an_earlier_round() -> None:
    def predict(tokens: Tensor, **_: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 6)
        logits[..., 3] = 1.0
        logits[0, 2, 1] = 9.0  # row 0 ends at its third token
        return logits

    out = generate_rounds(
        predict,
        rows=2,
        window=6,
        stride=3,
        num_strides=1,
        steps=6,
        mask_id=5,
        eos_id=1,
        remasking="low_confidence",
    )
    assert out.sequences[0].tolist() == [3, 3] + [1] * 7
    assert out.reveal_step[0, 3:].tolist() == [-1] * 6
    assert out.sequences[1].tolist()[6:] == [3, 3, 3]


def test_impossible_windows_are_refused(make_model: MakeModel) -> None:
    for window, stride in ((8, 8), (8, 0)):
        with pytest.raises(ValueError, match="stride"):
            generate_rounds(make_model(), window=window, stride=stride, num_strides=1, steps=1)
    with pytest.raises(ValueError, match="window"):
        generate_rounds(
            make_model(), window=4, stride=2, num_strides=1, steps=1, prompt=torch.ones(1, 4).long()
        )
    with pytest.raises(UserError, match="window=49 exceeds the context length of 48"):
        generate_rounds(make_model(), window=49, stride=2, num_strides=1)
    with pytest.raises(UserError, match="steps=1 is too few for 2 blocks"):
        generate_rounds(make_model(), window=4, stride=2, num_strides=1, steps=1, block_length=2)
