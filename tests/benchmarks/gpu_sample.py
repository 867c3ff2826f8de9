"""The sampler on one CUDA device: exact first, then tokens per second by batch and cache. Torch ≥ 2.11 and this repository.

    python tests/benchmarks/gpu_sample.py [--results FOLDER] [--quick] [--device cpu]

Exactness: a small network in float32, rows of many lengths, rules and caches: together ≡ alone, and every cache that is
refreshed at each forward ≡ none. The same again compiled, where hardly a text may be another than without (rounding decides
between equals), and with `batch_invariant` in bfloat16 a row's logits are those of the row alone, bit for bit. Then llada_8b's
shape in bfloat16 with random weights: prompts of 96 to 160 tokens, replies of 256 in blocks of 32, two tokens a forward,
batches of 1, 4, 8 and 32, by cache; then compiled, batches of 1 and 8. Of each setting whole blocks are timed after one block
of warm-up; random weights end no text, so committed tokens are all tokens. Below 8 minutes on an H100.
Prints a table and writes gpu_sample.json. --quick takes a tiny network, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.canvas import Canvas, prompt_canvas
from llada.sampling.compiled import CompiledTransformer, compile_network
from llada.sampling.config import SamplingConfig
from llada.sampling.forward import forward
from llada.sampling.generate import generate
from llada.sampling.sampler import advance, plan

HERE = Path(__file__).resolve().parent
BATCHES, COMPILED_BATCHES = (1, 4, 8, 32), (1, 8)
CACHES = (None, "prefix", "dual")
REPLY, BLOCK, TOKENS_A_FORWARD = 256, 32, 2
SMALL = ModelConfig(
    512, 256, 4, 4, 512, num_kv_heads=2, max_length=512, mask_token_id=511, eos_token_id=1, pad_token_id=0
)


def build(config: ModelConfig, device: str, dtype: torch.dtype) -> Transformer:
    """A network with random weights, made where it will be: 8B parameters take a second on the device."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def check_exactness(device: str) -> dict[str, int]:
    """Raises AssertionError where a row depends on its company, a refreshed cache on being one, or texts on `compiled`."""
    plain, model = (build(SMALL, device, torch.float32) for _ in range(2))
    rng = random.Random(0)
    rules: list[dict] = [{}, {"threshold": 0.1}, {"entropy_bound": 1.0}, {"remasking": "random"}]
    rows = unlike = 0
    for compiled, cache, rule in itertools.product((False, True), CACHES, rules):
        if compiled:
            compile_network(model)
        prompts = [[rng.randrange(2, 500) for _ in range(rng.randrange(60))] for _ in range(6)]
        knobs: dict = {
            "gen_length": 24,
            "block_length": 8,
            "cache": cache,
            "seed": 3,
            "eos_id": 1,
            **rule,
        }
        together = generate(model, prompts, **knobs).sequences[:, -24:]
        for row, prompt in enumerate(prompts):
            alone = generate(model, [prompt], **{**knobs, "seed": 3 + row}).sequences[0, -24:]
            assert torch.equal(alone, together[row]), f"{cache} {rule}: row {row} depends on its company"
            rows += 1
        if compiled:
            expected = generate(plain, prompts, **knobs).sequences[:, -24:]
            unlike += int((together != expected).any(1).sum())
        if cache is not None:
            whole = generate(model, prompts, **{**knobs, "cache": None}).sequences
            fresh = generate(model, prompts, **knobs, refresh_every=1).sequences
            assert torch.equal(whole, fresh), f"{cache} {rule}: refreshed at every forward, and not exact"
    assert unlike * 100 <= rows, f"compiled: {unlike} texts are not those without it"
    return {
        "rows_alone_and_together": rows,
        "compiled_texts_unlike": unlike,
        "compiled_rows_bit_for_bit": check_compiled_rows(device),
    }


def check_compiled_rows(device: str) -> int:
    """Raises AssertionError where a row's logits, compiled and `batch_invariant`, are not those of the row alone."""
    model, rng = build(SMALL, device, torch.bfloat16), random.Random(1)
    compile_network(model)
    config = SamplingConfig(gen_length=16, block_length=16, steps=1)

    def first_logits(prompts: list[list[int]]) -> torch.Tensor:
        canvas = prompt_canvas(prompts, config, mask_id=511, seed=0)
        step = plan(canvas)
        assert step is not None
        return forward(model, canvas, step, batch_invariant=True)

    prompts = [[rng.randrange(2, 500) for _ in range(rng.randrange(60))] for _ in range(32)]
    for prompt, expected in zip(prompts, first_logits(prompts).split(16), strict=True):
        assert torch.equal(first_logits([prompt]), expected), "compiled: a row depends on its company"
    return len(prompts)


def walk(model: Transformer, canvas: Canvas, forwards: int) -> Iterator[int]:
    """Tokens committed in each forward."""
    for _ in range(forwards):
        masks = int((canvas.tokens == canvas.mask_id).sum())
        step = plan(canvas)
        assert step is not None
        advance(model, canvas, step)
        yield masks - int((canvas.tokens == canvas.mask_id).sum())


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(model: Transformer, device: str, batch: int, cache: str | None, blocks: int) -> dict:
    rng = random.Random(batch)
    prompts = [[rng.randrange(2, 500) for _ in range(rng.randrange(96, 161))] for _ in range(batch)]
    config = SamplingConfig(
        gen_length=REPLY, block_length=BLOCK, steps=REPLY // TOKENS_A_FORWARD, cache=cache
    )
    mask_id = model.config.mask_token_id
    assert mask_id is not None
    canvas = prompt_canvas(prompts, config, mask_id=mask_id, seed=0)
    per_block = BLOCK // TOKENS_A_FORWARD
    for _ in walk(model, canvas, per_block):
        pass
    fed = int(canvas.token_forwards.sum())
    synchronize(device)
    began = time.perf_counter()
    committed = sum(walk(model, canvas, blocks * per_block))
    synchronize(device)
    seconds = time.perf_counter() - began
    return {
        "batch": batch,
        "cache": cache or "none",
        "compiled": isinstance(model, CompiledTransformer),
        "tokens_per_s": round(committed / seconds, 1),
        "ms_per_forward": round(1000 * seconds / (blocks * per_block), 2),
        "forwards": blocks * per_block,
        "token_forwards_per_token": round((int(canvas.token_forwards.sum()) - fed) / committed, 1),
    }


def environment(device: str) -> dict:
    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, cwd=HERE, check=False).stdout.strip()

    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "git": output("git", "rev-parse", "HEAD"),
        "changed_files": len(output("git", "status", "--porcelain").splitlines()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    device = arguments.device
    torch.backends.cuda.matmul.allow_tf32 = False  # exactness is that of float32
    report: dict = {"environment": environment(device), "exactness": check_exactness(device)}
    print(f"exact: {report['exactness']}")
    if arguments.quick:
        config, dtype = SMALL, torch.float32
    else:
        from llada.presets import PRESETS

        config, dtype = PRESETS["llada_8b"]().model, torch.bfloat16
    model = build(config, device, dtype)
    report["settings"] = {
        "parameters": config.num_parameters,
        "dtype": str(dtype),
        "prompt_tokens": "96-160",
        "reply": REPLY,
        "block_length": BLOCK,
        "tokens_per_forward": TOKENS_A_FORWARD,
    }
    report["results"] = []
    batches = BATCHES[:2] if arguments.quick else BATCHES
    for compiled in (False, True):
        if compiled:
            began = time.perf_counter()
            compile_network(model)
            report["seconds_to_compile"] = round(time.perf_counter() - began, 1)
        for batch, cache in itertools.product(batches, CACHES):
            if compiled and batch not in COMPILED_BATCHES:
                continue
            # Without a cache a block of 32 rows feeds 200,000 tokens: one is enough.
            report["results"].append(measure(model, device, batch, cache, 1 if cache is None else 3))
            print(json.dumps(report["results"][-1]))
    speeds = {(r["batch"], r["cache"], r["compiled"]): r["tokens_per_s"] for r in report["results"]}
    report["ratios"] = {
        f"batch {batch} over 1, cache {cache}": round(speed / speeds[1, cache, False], 2)
        for (batch, cache, compiled), speed in speeds.items()
        if batch > 1 and not compiled
    } | {
        f"compiled over not, batch {batch}, cache {cache}": round(speed / speeds[batch, cache, False], 2)
        for (batch, cache, compiled), speed in speeds.items()
        if compiled
    }
    print(json.dumps(report["ratios"], indent=2))
    target = arguments.results / "gpu_sample.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
