"""The network: its shape, its masks, its initial weights."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llada.errors import UserError
from llada.model.hf import tensor_names
from llada.model.transformer import ModelConfig, Transformer

MakeModel = Callable[..., Transformer]

LLADA_8B = ModelConfig(
    vocab_size=126464,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    ffn_dim=12288,
    max_length=4096,
    mask_token_id=126336,
    eos_token_id=126081,
    pad_token_id=126081,
)
LLADA_1B = ModelConfig(
    vocab_size=126464, d_model=2048, num_layers=22, num_heads=32, num_kv_heads=4, ffn_dim=5634
)
ILLADA = ModelConfig(
    vocab_size=155136,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    ffn_dim=14336,
    max_length=8192,
    tie_embeddings=True,
    mask_token_id=5,
)

SIGHTS: list[dict] = [{}, {"causal": True}, {"block_length": 3}, {"shift": True}]


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 22, shape, generator=torch.Generator().manual_seed(seed))


def build_on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


@pytest.mark.parametrize(
    ("config", "total", "without_embeddings"),
    [
        (LLADA_8B, 8_015_581_184, 6_979_588_096),
        (LLADA_1B, 1_487_243_264, 969_246_720),
        (ILLADA, 155136 * 4096 + 6_979_588_096, 6_979_588_096),  # 7.62 billion; the card says 6.98 without
    ],
    ids=["llada_8b", "llada_1b", "illada_8b"],
)
def test_parameter_counts_are_the_published_ones(
    config: ModelConfig, total: int, without_embeddings: int
) -> None:
    counted = sum(p.numel() for p in build_on_meta(config).parameters())
    assert counted == total
    assert config.num_parameters == total
    assert config.num_non_embedding_parameters == without_embeddings


def test_parameter_counts_know_biases_norms_and_widths() -> None:
    """Qwen2.5-0.5B (494,032,768 parameters by its card's weights) and Qwen3-0.6B (596,049,920)."""
    qwen2 = ModelConfig(
        vocab_size=151936,
        d_model=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        ffn_dim=4864,
        tie_embeddings=True,
        qkv_bias=True,
    )
    qwen3 = ModelConfig(
        vocab_size=151936,
        d_model=1024,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        ffn_dim=3072,
        tie_embeddings=True,
        head_width=128,
        qk_norm=True,
    )
    for config, total in [(qwen2, 494_032_768), (qwen3, 596_049_920)]:
        assert sum(p.numel() for p in build_on_meta(config).parameters()) == total == config.num_parameters
    attention = 12 * 28 * 16 * 128 * 512
    assert qwen3.training_flops_per_token(512) == pytest.approx(6 * qwen3.num_parameters + attention)


def test_8b_tensors_have_the_names_and_shapes_of_the_published_index(shared_dir: Path) -> None:
    index = json.loads((shared_dir / "data/tokenizers/llada_8b_special_tokens/tensors.json").read_text())
    shapes = {name: list(p.shape) for name, p in build_on_meta(LLADA_8B).named_parameters()}
    ours = {theirs: shapes[name] for name, theirs in tensor_names(LLADA_8B, "llada").items()}
    assert ours == {tensor["name"]: tensor["shape"] for tensor in index["tensors"]}
    assert len(ours) == 291


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 5},  # does not divide d_model
        {"num_heads": 8},  # head width 3 is odd: no rotary pairs
        {"num_kv_heads": 3},
        {"head_width": 5},
        {"mask_token_id": 23},
        {"eos_token_id": -1},
        {"num_heads": 0},
        {"vocab_size": 0},
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(make_model: MakeModel, change: dict[str, int]) -> None:
    with pytest.raises(UserError, match="model:"):
        make_model(**change)


def test_too_long_input_is_refused_with_both_lengths(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"33.*32"):
        make_model()(random_tokens(1, 33))
    assert make_model()(random_tokens(1, 32)).shape == (1, 32, 23)


def test_every_position_sees_every_other(make_model: MakeModel) -> None:
    tokens = random_tokens(1, 6)
    for causal in (False, True):
        model = make_model(causal=causal)
        base = model(tokens)
        for i in range(6):
            changed = tokens.clone()
            changed[0, i] = (changed[0, i] + 1) % 22
            moved = (model(changed) - base)[0].abs().amax(-1) > 1e-5
            expected = torch.arange(6) >= i if causal else torch.ones(6).bool()
            assert torch.equal(moved, expected), (causal, i)


def test_lookahead_opens_from_causal_to_both_sides(make_model: MakeModel) -> None:
    tokens, model = random_tokens(2, 6), make_model()
    assert torch.equal(model(tokens, lookahead=0), make_model(causal=True)(tokens))
    torch.testing.assert_close(model(tokens, lookahead=5), model(tokens))
    base = make_model(num_layers=1)(tokens, lookahead=2)
    for i in range(6):
        changed = tokens.clone()
        changed[0, i] = (changed[0, i] + 1) % 22
        moved = (make_model(num_layers=1)(changed, lookahead=2) - base)[0].abs().amax(-1) > 1e-5
        assert torch.equal(moved, torch.arange(6) >= i - 2), i
    for sight in SIGHTS[1:3]:
        with pytest.raises(ValueError, match="lookahead is for a network that sees both sides"):
            make_model(**sight)(tokens, lookahead=2)


def test_with_a_shift_a_position_is_read_at_the_one_before(make_model: MakeModel) -> None:
    """So that with causal attention, predictions are those of the autoregressive network, to the bit."""
    tokens = random_tokens(2, 7)
    for sight in SIGHTS[:2]:
        plain, shifted = make_model(**sight)(tokens), make_model(**sight, shift=True)(tokens)
        assert torch.equal(shifted[:, 1:], plain[:, :-1])
        assert torch.equal(shifted[:, 0], plain[:, 0])
        where = torch.tensor([[True, False, True, True, False, False, False]] * 2)
        torch.testing.assert_close(make_model(**sight, shift=True)(tokens, logits_at=where), shifted[where])


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_segments_equal_documents_alone(make_model: MakeModel, sight: dict) -> None:
    model = make_model(**sight)
    tokens = random_tokens(2, 10)
    segments = torch.tensor([[0] * 4 + [1] * 5 + [-1], [0] * 7 + [1] * 3])
    packed = model(tokens, segment_ids=segments)
    for row, start, end in [(0, 0, 4), (0, 4, 9), (1, 0, 7), (1, 7, 10)]:
        alone = model(tokens[row : row + 1, start:end])[0]
        # Positions are physical indices, so a later document is only shifted: equal up to rounding.
        torch.testing.assert_close(packed[row, start:end], alone, atol=2e-5, rtol=1e-4)
    assert packed.isfinite().all()


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_left_padding_changes_nothing(make_model: MakeModel, sight: dict) -> None:
    model = make_model(**sight)
    tokens = random_tokens(3, 9)
    lengths = [9, 6, 1]
    mask = torch.stack([torch.arange(9) >= 9 - n for n in lengths])
    for form in (mask, mask.long(), mask.float()):
        padded = model(tokens, form)
        for row, n in enumerate(lengths):
            alone = model(tokens[row : row + 1, 9 - n :])[0]
            torch.testing.assert_close(padded[row, 9 - n :], alone, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(model(tokens)[1, 3:], padded[1, 3:], atol=1e-3)


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_padding_and_segments_together_stay_finite(make_model: MakeModel, sight: dict) -> None:
    tokens = random_tokens(1, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    segments = torch.tensor([[-1, -1, 0, 0, 0, 0]])
    logits = make_model(**sight)(tokens, mask, segment_ids=segments)
    torch.testing.assert_close(logits[:, 2:], make_model(**sight)(tokens[:, 2:]), atol=2e-5, rtol=1e-4)


def test_a_mask_of_ones_is_no_mask(make_model: MakeModel) -> None:
    tokens = random_tokens(2, 7)
    model = make_model()
    assert torch.equal(model(tokens, torch.ones_like(tokens)), model(tokens))


def test_logits_at_equals_indexing(make_model: MakeModel) -> None:
    model, tokens = make_model(), random_tokens(3, 8)
    where = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    torch.testing.assert_close(model(tokens, logits_at=where), model(tokens)[where])
    assert model(tokens, logits_at=torch.zeros(3, 8).bool()).shape == (0, 23)


def test_grouped_queries_equal_repeated_key_heads(make_model: MakeModel) -> None:
    grouped = make_model(num_kv_heads=2)
    full = make_model(num_kv_heads=4)
    state = dict(grouped.state_dict())
    for name, value in state.items():
        if "k_proj" in name or "v_proj" in name:
            heads = value.view(2, 6, 24)
            state[name] = heads.repeat_interleave(2, dim=0).reshape(24, 24)
    full.load_state_dict(state)
    tokens = random_tokens(2, 8)
    torch.testing.assert_close(full(tokens), grouped(tokens))


def test_bfloat16_runs_close_to_float32(make_model: MakeModel) -> None:
    model, tokens = make_model(), random_tokens(2, 8)
    exact = model(tokens)
    half = make_model().to(torch.bfloat16)(tokens)
    assert half.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: about 1 % of the largest logit after two layers.
    assert (half.float() - exact).abs().max() < 0.04 * exact.abs().max()


def test_initial_weights_follow_seed_and_name(make_model: MakeModel) -> None:
    first, again, other = (make_model(seed, qkv_bias=True, qk_norm=True) for seed in (3, 3, 4))
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert name.endswith(("norm.weight", ".bias")) == torch.equal(a, c)
    q = [layer.q_proj.weight for layer in first.layers]
    assert not torch.equal(q[0], q[1])


def test_initial_weights_have_the_configured_spread() -> None:
    model = Transformer(ModelConfig(vocab_size=300, d_model=128, num_layers=2, num_heads=4, ffn_dim=256))
    model.init_weights(0)
    cut = 0.98658  # std of a standard normal cut at ±3
    expected = {
        "embed.weight": 128**-0.5,
        "lm_head.weight": 128**-0.5,
        "layers.1.gate_proj.weight": 128**-0.5,
        "layers.0.o_proj.weight": 128**-0.5 / 2**0.5,
        "layers.1.o_proj.weight": 128**-0.5 / 4**0.5,
        "layers.1.down_proj.weight": 256**-0.5 / 4**0.5,
    }
    parameters = dict(model.named_parameters())
    for name, std in expected.items():
        values = parameters[name]
        # 1/√(2n) = 0.6 % for 16k values.
        assert values.std().item() == pytest.approx(cut * std, rel=0.02), name
        assert values.abs().max() <= 3 * std * (1 + 1e-6), name
        assert values.abs().max() > 2.8 * std, name


def test_blocks_are_refused_where_they_mean_nothing() -> None:
    with pytest.raises(UserError, match="block_length=4 and causal=True contradict"):
        dataclasses.replace(LLADA_8B, block_length=4, causal=True)
    with pytest.raises(UserError, match="block_length=4 and shift=True contradict"):
        dataclasses.replace(LLADA_8B, block_length=4, shift=True)
    with pytest.raises(UserError, match="block_length 4097 is more than max_length 4096"):
        dataclasses.replace(LLADA_8B, block_length=4097)


def test_of_what_a_network_has_not_nothing_is_said() -> None:
    """Hashes and files of plain networks must not know the settings of others."""
    optional = ["rope_scaling", "block_length", "head_width", "qkv_bias", "qk_norm", "shift"]
    assert LLADA_8B.content() == {
        name: value for name, value in dataclasses.asdict(LLADA_8B).items() if name not in optional
    }
    changes = {"block_length": 32, "head_width": 64, "qkv_bias": True, "qk_norm": True}
    assert dataclasses.replace(LLADA_8B, **changes).content() == {**LLADA_8B.content(), **changes}
    assert dataclasses.replace(LLADA_8B, shift=True).content() == {**LLADA_8B.content(), "shift": True}


def test_tied_head_is_one_parameter(make_model: MakeModel) -> None:
    tied = make_model(tie_embeddings=True)
    assert tied.lm_head.weight is tied.embed.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    untied = make_model()
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 23 * 24
    assert tied.config.num_parameters == sum(p.numel() for p in tied.parameters())


def test_flops_per_token_are_six_per_multiplying_weight() -> None:
    small = dataclasses.replace(LLADA_1B, vocab_size=1000)
    weights = small.num_non_embedding_parameters + 1000 * 2048
    attention = 12 * 22 * 2048 * 512
    assert small.training_flops_per_token(512) == pytest.approx(6 * weights + attention)
    causal = dataclasses.replace(small, causal=True)
    assert causal.training_flops_per_token(512) == pytest.approx(6 * weights + attention / 2)
    blocks = dataclasses.replace(
        small, block_length=32
    )  # a noised and a clean copy, half of the attention in each
    twice = 6 * small.num_non_embedding_parameters
    assert blocks.training_flops_per_token(512) == pytest.approx(6 * weights + twice + attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_left_padded_row_is_rotated_as_alone(make_model: MakeModel, dtype: torch.dtype) -> None:
    """The very same numbers enter the attention, in bfloat16 too, where shifted angles would round differently."""
    model = make_model().to(dtype)
    seen: list[Tensor] = []
    model.layers[0].o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    row = torch.arange(2, 9)[None]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), row], dim=1)
    with torch.no_grad():
        model(row)
        model(padded, (padded != 0).long())
    torch.testing.assert_close(
        seen[1][:, 5:], seen[0], rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6
    )
