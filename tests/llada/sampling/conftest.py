"""A tiny network with varied, peaked predictions, what a rule sees of such, and a slow one with caches, written from the
definitions."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llada.model.transformer import Block, ModelConfig, Transformer
from llada.sampling.candidates import Candidates
from llada.sampling.canvas import Canvas
from llada.sampling.forward import forward
from llada.sampling.sampler import commit, plan

torch.set_num_threads(1)

KEEPING: list[dict[str, Any]] = [
    {},
    {"remasking": "margin"},
    {"remasking": "random"},
    {"remasking": "leftmost"},
    {"remasking": "first_hitting"},
    {"remasking": "ancestral"},
    {"remasking": "ancestral", "schedule": "cosine", "stratified": True},
    {"error_bound": 0.7},
    {"leap_threshold": 0.2, "leap_anchor": 0.4, "leap_radius": 2},
    {"threshold": 0.4},
    {"factor": 1.0},
    {"entropy_bound": 1.0},
]
REMASKING: list[dict[str, Any]] = [{"remdm_cap": 0.3}, {"p2_eta": 1.0}, {"p2_eta": 4.0}]


@pytest.fixture(scope="session", params=KEEPING, ids=str)
def keeping_rule(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings of each rule that keeps what it has committed."""
    return request.param


@pytest.fixture(scope="session", params=[*KEEPING, *REMASKING], ids=str)
def any_rule(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings of each rule."""
    return request.param


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    """A factory of small random networks over 23 ids of which 22 is the mask, 1 EOS and 0 padding."""

    def make(seed: int = 0, **changes: object) -> Transformer:
        shape: dict = {
            "vocab_size": 23,
            "d_model": 24,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_dim": 20,
            "max_length": 48,
            "mask_token_id": 22,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
        model = Transformer(ModelConfig(**{**shape, **changes}))
        model.init_weights(seed)
        with torch.no_grad():
            model.lm_head.weight.mul_(4)
            model.lm_head.weight[22].mul_(3)  # the mask would often be the best guess
        return model.eval()

    return make


@pytest.fixture(scope="session")
def random_prompt() -> Callable[..., Tensor]:
    """A factory of prompts (rows, length) for such networks, without a mask or an end."""

    def make(rows: int, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(2, 22, (rows, length), generator=generator)

    return make


@pytest.fixture(scope="session")
def make_candidates() -> Callable[..., Candidates]:
    """A factory of candidates over three ids from the probabilities of their tokens, row by row."""

    def make(rows: list[list[float]], **changes: Any) -> Candidates:
        """Candidates whose tokens, all 0, have these probabilities; the next token has all but a thousandth of the rest."""
        row = torch.tensor([r for r, values in enumerate(rows) for _ in values])
        slot = torch.tensor([s for values in rows for s in range(len(values))])
        p = torch.tensor([value for values in rows for value in values], dtype=torch.float64)
        logits = torch.stack([p, (1 - p) * 0.999, (1 - p) * 0.001], dim=1).log()
        count = torch.ones(len(rows), dtype=torch.int64)
        fields: dict[str, Any] = {
            "logits": logits,
            "tokens": torch.zeros(len(row), dtype=torch.int64),
            "is_held": torch.zeros(len(row), dtype=torch.bool),
            "row": row,
            "slot": slot,
            "column": slot,
            "shape": (len(rows), int(slot.max()) + 1),
            "step": 0 * count,
            "steps": count,
            "quota": count,
            "knobs": torch.zeros(len(rows), 1, dtype=torch.float64),
            "draw_keys": lambda: torch.arange(len(row)),
            "doubt": torch.zeros(len(row), dtype=torch.float64),
            "unsure_ids": None,
        }
        return Candidates(**{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def watch_products() -> Callable[[Transformer], set[int]]:
    """How many rows the matrices had that were multiplied by the network's weights, from now on."""

    def watch(model: Transformer) -> set[int]:
        seen: set[int] = set()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].shape[0]))
        return seen

    return watch


@pytest.fixture(scope="session")
def walk_bit_for_bit() -> Callable[[Transformer, Canvas], None]:
    """Walks a canvas to its end, and each of its rows alone beside it: with `batch_invariant` their logits are the same."""

    @torch.no_grad()
    def walk(model: Transformer, canvas: Canvas) -> None:
        singles = [canvas.take([row]) for row in range(len(canvas))]
        while (step := plan(canvas)) is not None:
            logits = forward(model, canvas, step, batch_invariant=True)
            parts = logits.split(step.where.sum(1).tolist())
            for row, expected in zip(step.rows.tolist(), parts, strict=True):
                own = plan(singles[row])
                assert own is not None
                found = forward(model, singles[row], own, batch_invariant=True)
                assert torch.equal(found, expected)
                commit(singles[row], own, found)
            commit(canvas, step, logits)

    return walk


@pytest.fixture(scope="session")
def naive_row() -> "type[NaiveRow]":
    return NaiveRow


State = dict[int, Tensor]
"""By column."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean() + eps).sqrt()


def rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """Each pair (i, i + E/2) of x (H, E) turned by position · theta^(−2i/E)."""
    half = x.shape[-1] // 2
    angles = torch.tensor([position * theta ** (-i / half) for i in range(half)])
    left, right = x[:, :half], x[:, half:]
    return torch.cat(
        [left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], 1
    )


class NaiveRow:
    """One row (or its copy without a prompt), one column after the other, and what was kept of them in each layer."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        layers = range(model.config.num_layers)
        self.keys: list[State] = [{} for _ in layers]
        self.values: list[State] = [{} for _ in layers]

    def embed(self, tokens: Sequence[int], columns: Sequence[int]) -> State:
        return {c: self.model.embed.weight[tokens[c]] for c in columns}

    def logits(self, x: State) -> State:
        norm = self.model.norm
        return {
            c: self.model.lm_head.weight @ rms_norm(h, norm.weight, self.model.config.rms_norm_eps)
            for c, h in x.items()
        }

    def keep(self, number: int, x: State) -> None:
        """Keys and values of these columns; the first column has position 0."""
        layer, config = self.layer(number), self.model.config
        for c, h in x.items():
            h = rms_norm(h, layer.attn_norm.weight, config.rms_norm_eps)
            key = (layer.k_proj.weight @ h).view(config.kv_heads, config.head_dim)
            self.keys[number][c] = rotated(key, c, config.rope_theta)
            self.values[number][c] = (layer.v_proj.weight @ h).view(config.kv_heads, config.head_dim)

    def attended(self, number: int, x: State, seen: Sequence[int]) -> State:
        """What attention adds to these columns, which see the keys and values that are kept of the columns `seen`."""
        layer, config, out = self.layer(number), self.model.config, {}
        for c, h in x.items():
            h = rms_norm(h, layer.attn_norm.weight, config.rms_norm_eps)
            queries = (layer.q_proj.weight @ h).view(config.num_heads, config.head_dim)
            queries = rotated(queries, c, config.rope_theta)
            heads = []
            for head in range(config.num_heads):
                group = head // (config.num_heads // config.kv_heads)
                keys = torch.stack([self.keys[number][s][group] for s in seen])
                values = torch.stack([self.values[number][s][group] for s in seen])
                heads.append((keys @ queries[head] / config.head_dim**0.5).softmax(0) @ values)
            out[c] = layer.o_proj.weight @ torch.cat(heads)
        return out

    def mlp(self, number: int, x: State) -> State:
        layer, out = self.layer(number), {}
        for c, h in x.items():
            h = rms_norm(h, layer.ffn_norm.weight, self.model.config.rms_norm_eps)
            gate = torch.nn.functional.silu(layer.gate_proj.weight @ h)
            out[c] = layer.down_proj.weight @ (gate * (layer.up_proj.weight @ h))
        return out

    def layer(self, number: int) -> Block:
        layer = self.model.layers[number]
        assert isinstance(layer, Block)
        return layer

    def run_layer(self, number: int, x: State, seen: Sequence[int]) -> State:
        self.keep(number, x)
        x = add(x, self.attended(number, x, seen))
        return add(x, self.mlp(number, x))

    def forward(self, tokens: Sequence[int], fed: Sequence[int], seen: Sequence[int]) -> State:
        """Logits of the columns that are fed, which see those and what was kept of the others."""
        x = self.embed(tokens, fed)
        for number in range(self.model.config.num_layers):
            x = self.run_layer(number, x, seen)
        return self.logits(x)


def add(x: State, more: State) -> State:
    return {c: h + more[c] for c, h in x.items()}
