"""The head: what it reads, and that nothing beside a row changes its outputs."""

from __future__ import annotations

import pytest
import torch

from llada.errors import UserError
from llada.model.transformer import ModelConfig, Transformer
from llada.tokenizer import encode_texts, train_tokenizer
from llada.understanding.classifier import Classifier, encode_rows

TOKENIZER = train_tokenizer(["The cat sat on the mat."] * 5, 300)
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def network_of(**changes: object) -> Transformer:
    network = Transformer(ModelConfig(300, 16, 2, 2, 32, max_length=32, mask_token_id=1, **changes))  # type: ignore[arg-type]
    network.init_weights(0)
    return network.double().eval()


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_head_reads_the_last_layer_of_its_own_row(pooling: str, causal: bool) -> None:
    network = network_of(causal=causal)
    model = Classifier(network, 3, pooling, seed=4).double()  # type: ignore[arg-type]
    rows = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
    together = model(rows)
    for row, output in zip(rows, together, strict=True):
        stream = network(torch.tensor([row]), read_out=lambda x, weight: x)[0]
        pooled = {"mean": stream.mean(0), "first": stream[0], "last": stream[-1]}[pooling]
        torch.testing.assert_close(output, model.head(pooled), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(together[0], together[1])


def test_the_seed_draws_the_head() -> None:
    heads = [Classifier(network_of(), 50, "mean", seed).head for seed in (1, 1, 2)]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert float(heads[0].weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert heads[0].bias.abs().max() == 0


def test_rows_have_the_marks_of_their_pooling_and_fit() -> None:
    cat, mat = encode_texts(TOKENIZER, ["The cat sat", " mat"])

    def rows(pairs: list[str] | None, pooling: str, length: int = 32) -> tuple[list[list[int]], int]:
        return encode_rows(TOKENIZER, ["The cat sat"], pairs, pooling, length)  # type: ignore[arg-type]

    assert rows(None, "mean") == ([cat], 0)
    assert rows(None, "first") == ([[BOS, *cat]], 0)
    assert rows(None, "last") == ([[*cat, EOS]], 0)
    assert rows([" mat"], "last") == ([[*cat, EOS, *mat, EOS]], 0)
    assert rows(None, "last", len(cat)) == ([[*cat[:-1], EOS]], 1)
    # Of a pair the longer one loses its end, and the marks stay.
    assert len(cat) > len(mat)
    cut = len(cat) + len(mat)
    assert rows([" mat"], "first", cut) == ([[BOS, *cat[:-2], EOS, *mat]], 1)
    assert encode_rows(TOKENIZER, [""], None, "mean", 32) == ([[EOS]], 0)


def test_a_tokenizer_without_a_beginning_cannot_be_read_there() -> None:
    bare = train_tokenizer(["The cat sat on the mat."] * 5, 300)
    bare.bos_token = None
    with pytest.raises(UserError, match='no token for the beginning of a text, which pooling "first" reads'):
        encode_rows(bare, ["a"], None, "first", 8)
