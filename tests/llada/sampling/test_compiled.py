"""The switch `compiled`: the same texts, logits up to rounding, one compilation for all layers and shapes, and a network that
others find as it was."""

import asyncio
import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from llada.errors import UserError
from llada.model.hf import save_model
from llada.model.transformer import Block, Transformer
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.compiled import CompiledBlock, CompiledTransformer, compile_network
from llada.sampling.config import SamplingConfig
from llada.sampling.engine import DenoiseEngine
from llada.sampling.events import Finished, Text
from llada.sampling.forward import forward
from llada.sampling.generate import generate, infill
from llada.sampling.request import GenerateRequest
from llada.sampling.sampler import plan
from llada.tokenizer import train_tokenizer

MakeModel = Callable[..., Transformer]
LAYERS = 10  # more than torch compiles one function for
FUNCTIONS = 3  # are compiled: before the attention, behind it, the head
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13], [], [14, 15, 16]]
KNOBS: dict[str, Any] = {"gen_length": 16, "block_length": 8, "steps": 8, "eos_id": 1, "seed": 5}
CACHES: list[dict[str, Any]] = [
    {},
    {"cache": "prefix"},
    {"cache": "dual", "refresh_every": 3},
    {"cache": "vicinity"},
    {"cache": "interval", "prompt_interval": 4, "response_interval": 2, "refresh_share": 0.5},
    {"shared_depth": 0.5},
]
TOKENIZER = train_tokenizer(["The cat sat on the mat. The dog ran off."] * 5, 300)


class Pair(NamedTuple):
    """Two networks of the same weights."""

    plain: Transformer
    compiled: Transformer


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module", autouse=True)
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is compiled here is compiled anew."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("NOT TESTED: `compiled`, as this machine has no C++ compiler (g++ or $CXX)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        torch.compiler.reset()  # what other files of this process have compiled
        yield


@pytest.fixture(scope="module")
def pair(make_model: MakeModel, compiler: None) -> Pair:
    plain, before = make_model(num_layers=LAYERS), compilations()
    compiled = copy.deepcopy(plain)
    compile_network(compiled)
    assert compilations() - before == FUNCTIONS
    return Pair(plain, compiled)


@pytest.fixture(autouse=True)
def nothing_is_compiled_twice(request: pytest.FixtureRequest) -> Iterator[None]:
    """Any layer and any number of tokens finds what was compiled at first."""
    if "pair" in request.fixturenames:
        request.getfixturevalue("pair")
    before, breaks = compilations(), dict(counters["graph_break"])
    yield
    if "pair" in request.fixturenames:
        assert compilations() == before
        assert counters["graph_break"] == breaks


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_texts_are_those_without_it(pair: Pair, any_rule: dict[str, Any], scale: float) -> None:
    """Rows of different lengths, an empty prompt among them."""
    knobs = {**KNOBS, "cfg_scale": scale, **any_rule}
    plain, compiled = (generate(model, PROMPTS, **knobs) for model in pair)
    assert torch.equal(plain.sequences, compiled.sequences)
    assert torch.equal(plain.reveal_step, compiled.reveal_step)


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_texts_of_caches_are_those_without_it(pair: Pair, cache: dict[str, Any]) -> None:
    for prompts in (PROMPTS, PROMPTS[1:2]):
        knobs = {**KNOBS, "temperature": 0.7, **cache}
        plain, compiled = (generate(model, prompts, **knobs).sequences for model in pair)
        assert torch.equal(plain, compiled)


def test_a_gap_is_filled_as_without_it(pair: Pair) -> None:
    tokens = torch.tensor([[3, 22, 22, 4, 5, 22], [22, 6, 7, 8, 22, 22]])
    plain, compiled = (infill(model, tokens).sequences for model in pair)
    assert torch.equal(plain, compiled)


def test_logits_are_equal_up_to_rounding(pair: Pair) -> None:
    """Of few tokens and many, one token and one position among them."""
    for prompts, length in ((PROMPTS, 16), ([[]], 1), ([[3]], 1), (PROMPTS * 12, 24)):
        config = SamplingConfig(gen_length=length, block_length=length, steps=1)
        logits = []
        for model in pair:
            canvas = prompt_canvas(prompts, config, mask_id=22, seed=0)
            step = plan(canvas)
            assert step is not None
            logits.append(forward(model, canvas, step))
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        assert len(prompts) * length == 1 or not torch.equal(*logits)  # else nothing was compiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_rows_get_the_logits_of_the_row_alone_bit_for_bit(
    make_model: MakeModel, walk_bit_for_bit: Callable[[Transformer, Canvas], None], dtype: torch.dtype
) -> None:
    model = make_model(2, num_layers=LAYERS).to(dtype)
    compile_network(model)
    before = compilations()
    singles = [
        prompt_canvas(
            [prompt],
            SamplingConfig(gen_length=24, block_length=8, cfg_scale=scale, cache=cache),
            mask_id=22,
            seed=0,
        )
        for prompt, scale, cache in zip(
            PROMPTS, (0.0, 1.0, 0.0, 2.0, 0.0), (None, "dual", "dual", None, None), strict=True
        )
    ]
    canvas = Canvas.join(singles)
    walk_bit_for_bit(model, canvas)
    assert compilations() == before


@torch.no_grad()
def test_a_token_gets_the_same_wherever_it_stands_in_a_chunk(pair: Pair) -> None:
    block = pair.compiled.layers[3]
    assert isinstance(block, CompiledBlock)
    x, cos, sin = torch.randn(64, 24), torch.randn(64, 1, 6), torch.randn(64, 1, 6)
    attended = torch.randn(64, 4, 6)
    expected = (*block.project(x, cos, sin), block.mix(x, attended), pair.compiled._head(x))
    for shift in range(1, 64, 5):
        x1, cos1, sin1, attended1 = (t.roll(shift, 0) for t in (x, cos, sin, attended))
        found = (*block.project(x1, cos1, sin1), block.mix(x1, attended1), pair.compiled._head(x1))
        for one, two in zip(found, expected, strict=True):
            assert torch.equal(one.roll(-shift, 0), two)


def test_the_engine_runs_it_in_its_thread(pair: Pair) -> None:
    """Where nothing is compiled any more either."""
    config = SamplingConfig(gen_length=16, block_length=8, steps=8, temperature=0.5)

    async def read(engine: DenoiseEngine) -> tuple[list[tuple[int, int]], list[list[int | None]]]:
        requests = [GenerateRequest(prompt, config, seed=5, wants_trace=True) for prompt in PROMPTS]
        events = [event async for event in engine.stream(*requests)]
        ends = sorted((e for e in events if isinstance(e, Finished)), key=lambda e: e.index)
        steps: list[list[int | None]] = [[] for _ in requests]
        for event in events:
            if isinstance(event, Text):
                steps[event.index] += [token.step for token in event.tokens]
        return [(e.completion_tokens, e.nfe) for e in ends], steps

    found = []
    for model in pair:
        engine = DenoiseEngine(model, TOKENIZER, compiled=model is pair.compiled)
        found.append(asyncio.run(read(engine)))
        engine.close()
    assert found[0] == found[1]


def test_calling_it_again_is_free(pair: Pair) -> None:
    before = compilations()
    compile_network(pair.compiled)
    generate(pair.compiled, PROMPTS, **KNOBS, compiled=True)
    infill(pair.compiled, torch.tensor([[3, 22, 4]]), compiled=True)
    assert compilations() == before


def test_others_find_the_network_as_it_was(pair: Pair, tmp_path: Path) -> None:
    plain, compiled = pair
    assert list(plain.state_dict()) == list(compiled.state_dict())
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in compiled.named_parameters()]
    for model, name in ((plain, "plain"), (compiled, "compiled")):
        save_model(model, tmp_path / name)
    for file in sorted((tmp_path / "plain").iterdir()):
        assert file.read_bytes() == (tmp_path / "compiled" / file.name).read_bytes()
    gradients = []
    for model in pair:
        model.zero_grad()
        model(torch.tensor([[3, 4, 22, 5]])).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    for one, two in zip(*gradients, strict=True):
        assert one is not None
        assert torch.equal(one, two)
    with torch.no_grad():
        rows = torch.tensor([[3, 4, 22, 5], [6, 7, 8, 22]])
        assert torch.equal(plain(rows), compiled(rows))


@torch.no_grad()
def test_copies_have_weights_of_their_own(pair: Pair) -> None:
    for other in (copy.deepcopy(pair.compiled), pickle.loads(pickle.dumps(pair.compiled))):
        assert type(other) is CompiledTransformer
        plain = copy.deepcopy(pair.plain)
        for model in (plain, other):
            for parameter in model.parameters():
                parameter.mul_(1.1)
        sequences = [generate(model, PROMPTS, **KNOBS).sequences for model in (plain, other)]
        assert torch.equal(*sequences)


def test_a_plain_function_is_refused() -> None:
    def model(tokens: torch.Tensor) -> torch.Tensor:
        raise AssertionError("was run")

    for run in (
        lambda: generate(model, PROMPTS, mask_id=22, compiled=True),
        lambda: infill(model, torch.tensor([[22]]), mask_id=22, compiled=True),
        lambda: DenoiseEngine(model, TOKENIZER, compiled=True),
    ):
        with pytest.raises(UserError, match="compiled: it needs a network of ours"):
            run()


def test_a_machine_without_a_compiler_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    with (
        inductor.patch("cpp.cxx", (None, "no-such-compiler")),
        pytest.raises(UserError, match=r"no C\+\+ compiler.*install it, or leave compiled out"),
    ):
        generate(model, PROMPTS, **KNOBS, compiled=True)
    assert (type(model), type(model.layers[0])) == (Transformer, Block)
