"""Logits at positions: what a whole forward gives there, guidance by its formula."""

from __future__ import annotations

import copy

import pytest
import torch

from llada.errors import UserError
from llada.model.predict import check_weights, device_of, guided_predict, predict, resolve_mask_id
from llada.model.transformer import ModelConfig, Transformer

MASK = 9


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(ModelConfig(10, 16, 1, 2, 32, mask_token_id=MASK))
    model.init_weights(0)
    return model.eval()


def test_predict_is_the_whole_forward_at_the_positions(model: Transformer) -> None:
    tokens = torch.tensor([[1, MASK, 3], [MASK, 5, MASK]])
    where = tokens == MASK
    with torch.no_grad():
        whole = model(tokens)[where]
        torch.testing.assert_close(predict(model, tokens, where), whole)
        torch.testing.assert_close(predict(lambda t: model(t), tokens, where), whole)  # any function


def test_guidance_doubles_the_batch_and_hides_the_prompt(model: Transformer) -> None:
    tokens = torch.tensor([[1, 2, MASK], [3, MASK, MASK]])
    where = tokens == MASK
    calls = []

    def spy(t: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        calls.append((t.clone(), attention_mask))
        return model(t)

    with torch.no_grad():
        guided = guided_predict(spy, tokens, where, ~where, 0.5, MASK, attention_mask=torch.ones(2, 3).long())
        conditional, unconditional = model(tokens)[where], model(torch.full_like(tokens, MASK))[where]
    torch.testing.assert_close(guided, unconditional + 1.5 * (conditional - unconditional))
    ((seen, attended),) = calls
    assert seen.tolist() == [*tokens.tolist(), [MASK] * 3, [MASK] * 3]
    assert attended.shape == (4, 3)


def test_the_mask_id_comes_from_the_config_or_the_caller(model: Transformer) -> None:
    assert resolve_mask_id(model, None) == MASK
    assert resolve_mask_id(model, 3) == 3
    assert device_of(model) == torch.device("cpu")
    assert device_of(lambda t: t) is None
    with pytest.raises(UserError, match="mask_id"):
        resolve_mask_id(lambda t: t, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["layers.0.q_proj.weight", "norm.weight", "lm_head.weight"])
def test_a_weight_that_is_no_number_is_named(model: Transformer, name: str, value: float) -> None:
    check_weights(model)
    check_weights(lambda tokens: tokens)
    damaged = copy.deepcopy(model).to(torch.bfloat16)
    damaged.get_parameter(name).data.view(-1)[5] = value
    with pytest.raises(
        FloatingPointError, match=f"^the network's weight {name} holds NaN or infinite values$"
    ):
        check_weights(damaged)
