"""Training on one CUDA device: right first, then tokens per second, MFU and memory. Torch ≥ 2.11 and this repository, no Ray.

    python tests/benchmarks/gpu_train.py [--minutes 7] [--results FOLDER] [--quick] [--device cpu]

Checks: a run that goes on from a checkpoint takes the step that an uninterrupted one does; attention under a document mask
(FlexAttention on CUDA) and the head with its loss are those of the plain formulas, with their gradients; a step without a
finite loss moves nothing; compiled and recomputed blocks give what plain ones do; float8 comes close; between two logged
steps nothing waits for the device. One that fails is written down, the others are done all the same, and the exit code is 1.

Figures: `llada_1b`, whole, and the shape of `llada_8b` with as many layers, up to eight, as leave a third of the memory to
activations; float32 masters, AdamW, bf16, 16 rows of 4,096 tokens a step, through `BatchStream` and
`train_step`; by compilation, recomputation, float8 and rows of a micro-batch. What does not fit is said, what the minutes do
not suffice for is left out. Two MFUs: `mfu` as the trainer logs it, with the head at all positions, which flatters a network
of few layers; `mfu_done` counts it where it is computed, at masked positions. Both of the device's bf16 peak, float8 too.

Prints a table and writes gpu_train.json. --quick takes tiny networks, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_sample import environment, synchronize
from torch import Tensor
from training import write_data

from llada.data.tokens.shards import TokenDataset
from llada.diffusion.cross_entropy import SLICE, weighted_nats
from llada.diffusion.objective import ObjectiveConfig
from llada.model.attention import AttentionMask, masked_attention
from llada.model.transformer import ModelConfig
from llada.presets import llada_1b, llada_8b
from llada.training.batches import BatchStream
from llada.training.checkpoint.restore import restore
from llada.training.checkpoint.save import Checkpoints
from llada.training.checkpoint.state import Cursor
from llada.training.metrics import peak_flops, peak_memory
from llada.training.optim import OptimConfig, build_optimizers, step_all
from llada.training.parallel import Recomputed, build_parallel, clip_gradients
from llada.training.run import RunConfig, run_identity
from llada.training.trainer import train_step

HERE = Path(__file__).resolve().parent
SMALL = ModelConfig(
    512, 128, 2, 4, 256, num_kv_heads=2, max_length=256, mask_token_id=511, eos_token_id=1, pad_token_id=0
)
SMALL_ROW, SMALL_ROWS = 128, 4
STEP_ROWS = 16
WARM_UP, TIMED = 1, 2  # steps
HAS_FLOAT8 = importlib.util.find_spec("torchao") is not None


class Run:
    """A network, its optimizers and its batches, as `train` has them."""

    def __init__(
        self,
        config: ModelConfig,
        dataset: TokenDataset,
        device: torch.device,
        dtype: torch.dtype,
        *,
        micro_rows: int,
        micro_batches: int = 1,
        document_mask: bool = False,
        optim: OptimConfig | None = None,
        **parallel: Any,
    ) -> None:
        self.device, self.dtype, self.optim = device, dtype, optim or OptimConfig()
        self.model = build_parallel(config, device, dtype, **parallel)
        self.model.init_weights(0)
        self.model.train()
        self.optimizers = build_optimizers(self.model, self.optim)
        self.stream = BatchStream(
            dataset,
            ObjectiveConfig(document_mask=document_mask),
            config,
            global_rows=micro_rows * micro_batches,
            micro_rows=micro_rows,
            seed=0,
            rank=0,
            num_workers=1,
        )

    def learn(self, step: int) -> Tensor:
        """Forward and backward of a step: the loss, () float64."""
        return train_step(self.model, self.stream.prepare(step).to(self.device), 1, self.dtype)[0]

    def move(self, loss: Tensor) -> None:
        norm = clip_gradients(self.model, self.optim.grad_clip).double()
        step_all(self.optimizers, skipped=(~torch.isfinite(loss + norm)).float())

    def step(self, step: int) -> Tensor:
        loss = self.learn(step)
        self.move(loss)
        return loss

    def gradients(self) -> list[Tensor]:
        grads = [parameter.grad for parameter in self.model.parameters()]
        assert all(grad is not None for grad in grads)
        return [grad.clone() for grad in grads if grad is not None]

    def state(self) -> list[Tensor]:
        """Copies of the weights, the moments and the counts of steps."""
        held = [p.detach() for p in self.model.parameters()]
        for optimizer in self.optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                state = optimizer.state[parameter]
                held += [state[name] for name in sorted(state) if torch.is_tensor(state[name])]
        return [tensor.clone() for tensor in held]


def relative_error(ours: list[Tensor], expected: list[Tensor], at_most: float) -> float:
    """The largest error of a tensor, in norms of the one expected. Raises AssertionError above `at_most`."""
    worst = 0.0
    for one, other in zip(ours, expected, strict=True):
        size = float(other.double().norm())
        error = float((one.double() - other.double()).norm()) / (size or 1.0)
        assert error <= at_most, f"an error of {error:.3g}, where {at_most:g} is allowed"
        worst = max(worst, error)
    return worst


@dataclass(frozen=True)
class Checks:
    """What has to hold, on this device, with little data. Each returns figures, or raises AssertionError."""

    device: torch.device
    folder: Path

    @functools.cached_property
    def dataset(self) -> TokenDataset:
        return write_data(self.folder, SMALL, 64, SMALL_ROW, documents=3)

    def run(self, dtype: torch.dtype = torch.float32, **settings: Any) -> Run:
        return Run(SMALL, self.dataset, self.device, dtype, micro_rows=SMALL_ROWS, **settings)

    def resume(self) -> dict:
        """Two steps, a checkpoint, a third one: the same in a new network that is restored."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        checkpoints, worst, exact = self.folder / "checkpoints", 0.0, True
        for number, optim in enumerate(OPTIMIZERS):
            folder, run = str(checkpoints / str(number)), self.run(optim=optim)
            identity = run_identity(SMALL, RunConfig(optim=optim), self.dataset)
            for step in range(2):
                run.step(step)
            with Checkpoints(folder) as written:
                written.save(Cursor(step=2), identity, run.model, run.optimizers)
            again = self.run(optim=optim)
            cursor, skipped = restore(
                folder, identity, again.model, again.optimizers, initial_state=None, seed=1
            )
            assert (cursor.step, skipped) == (2, [])
            run.step(2), again.step(2)
            worst = max(worst, relative_error(again.state(), run.state(), 1e-4))
            exact &= all(map(torch.equal, again.state(), run.state()))
        return {"worst_error": worst, "bit_for_bit": exact}

    def document_mask(self) -> dict:
        """The kernel under a mask beside torch's attention under a dense one, in float64."""
        generator = torch.Generator(self.device).manual_seed(0)
        worst = 0.0
        for length, kv_heads in ((256, 4), (200, 2)):
            segments = torch.arange(length, device=self.device)[None] // torch.tensor(
                [[60], [length]], device=self.device
            )
            sight = AttentionMask.of(None, segments, length, self.device)
            assert sight is not None
            q, k, v = (
                torch.randn(2, length, heads, 64, device=self.device, generator=generator)
                for heads in (4, kv_heads, kv_heads)
            )
            results = []
            for mask, dtype in ((sight.for_kernel(64), torch.float32), (sight.dense(), torch.float64)):
                inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
                out = masked_attention(*inputs, mask, causal=False)
                results.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
            worst = max(worst, relative_error(results[0], results[1], 1e-4))
        return {"worst_error": worst, "kernel": type(sight.for_kernel(64)).__name__}

    def head_and_loss(self) -> dict:
        """`weighted_nats` beside log-softmax, over more than one of its slices."""
        errors = {}
        generator = torch.Generator(self.device).manual_seed(0)
        random = functools.partial(torch.randn, device=self.device, generator=generator)
        vocabulary, width = 1 << 15, 64
        positions = SLICE[self.device.type] // vocabulary + 100
        x, weight = random(positions, width), random(vocabulary, width) * width**-0.5
        targets = torch.randint(vocabulary, (positions,), device=self.device, generator=generator)
        scale = random(positions).double().abs()
        for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
            results = []
            for is_plain in (True, False):
                inputs = [tensor.clone().requires_grad_() for tensor in (x, weight)]
                if is_plain:
                    nats = -(inputs[0] @ inputs[1].T).log_softmax(1).gather(1, targets[:, None])[:, 0]
                    loss = (nats * scale).sum()
                else:
                    with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                        loss = weighted_nats(inputs[0], inputs[1], targets, scale)
                results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
            errors[str(dtype)] = relative_error(results[1], results[0], allowed)
        return errors

    def skipped_step(self) -> dict:
        """A gradient that is no number: weights, moments and counts stay, bit for bit."""
        for optim in OPTIMIZERS:
            run = self.run(optim=optim)
            run.step(0)
            before = run.state()
            loss = run.learn(1)
            for parameter in run.model.parameters():
                assert parameter.grad is not None
                parameter.grad.view(-1)[0] = torch.nan
            run.move(loss)
            assert all(map(torch.equal, run.state(), before)), f"{optim}: a skipped step moved something"
            run.step(2)
            moved = [not torch.equal(new, old) for new, old in zip(run.state(), before, strict=True)]
            assert all(moved), f"{optim}: a sound step did not move everything"
        return {"optimizers": len(OPTIMIZERS)}

    def blocks(self) -> dict:
        """Loss and gradients of blocks compiled and recomputed, with and without a document mask; two steps, so that what
        was compiled meets another mask."""
        errors = {}
        for document_mask in (False, True):
            expected = self._two_steps(document_mask=document_mask)
            for name, settings in {
                "compiled": {"compiled": True},
                "selective": {"recomputed": "selective"},
                "full": {"recomputed": "full"},
                "compiled, selective": {"compiled": True, "recomputed": "selective"},
            }.items():
                if self.device.type == "cpu" and (document_mask or name == "compiled"):
                    continue  # nothing new there, where masks are dense, but much to compile
                torch.compiler.reset()
                found = self._two_steps(document_mask=document_mask, **settings)
                label = f"{name}, document mask" if document_mask else name
                errors[label] = relative_error(found, expected, 1e-3)
        return errors

    def _two_steps(self, **settings: Any) -> list[Tensor]:
        run = self.run(**settings)
        run.step(0)
        loss = run.learn(1)
        return [loss, *run.gradients()]

    def float8(self) -> dict | str:
        if not HAS_FLOAT8:
            return "left out: no torchao"
        losses = [self.run(torch.bfloat16, float8=float8).learn(0) for float8 in (False, True)]
        return {"error_of_loss": relative_error(losses[1:], losses[:1], 0.05)}

    def no_waiting(self) -> dict:
        """Whatever waits for the device in five steps, warned of by torch; three steps before, what a first use loads may."""
        is_cuda = self.device.type == "cuda"
        waits: dict[str, list[str]] = {}
        for document_mask in (False, True):
            run = self.run(torch.bfloat16, micro_batches=2, document_mask=document_mask)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for batch in run.stream.batches(0, 8, pinned=is_cuda):
                    if batch.step == 3:
                        synchronize(self.device.type)
                        caught.clear()
                        if is_cuda:
                            torch.cuda.set_sync_debug_mode("warn")
                    run.move(train_step(run.model, batch.to(self.device), 1, run.dtype)[0])
            if is_cuda:
                torch.cuda.set_sync_debug_mode("default")
            waits["document mask" if document_mask else "no mask"] = [
                f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
            ]
        assert not any(waits.values()), f"the device was waited for: {waits}"
        return {"steps": 5, "seen": is_cuda}


OPTIMIZERS = (OptimConfig(), OptimConfig(moments="bf16"), OptimConfig(optimizer="muon"))
CHECKS = (
    Checks.resume,
    Checks.document_mask,
    Checks.head_and_loss,
    Checks.skipped_step,
    Checks.blocks,
    Checks.float8,
    Checks.no_waiting,
)


def run_checks(device: torch.device) -> dict[str, Any]:
    """What each check has found; "FAILED: …" of those that raised."""
    found: dict[str, Any] = {}
    for check in CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[check.__name__] = check(Checks(device, Path(folder)))
            except Exception as error:
                traceback.print_exc()
                found[check.__name__] = f"FAILED: {type(error).__name__}: {error}"
            finally:  # what comes next is not to run as a failed check has left it
                torch.use_deterministic_algorithms(False)
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        print(f"{check.__name__:15} {found[check.__name__]}", flush=True)
    return found


@dataclass(frozen=True)
class Variant:
    """One way to run a network."""

    micro_rows: int
    compiled: bool = True
    recomputed: Recomputed = "none"
    float8: bool = False

    @property
    def parallel(self) -> dict[str, Any]:
        return {"compiled": self.compiled, "recomputed": self.recomputed, "float8": self.float8}


# The likeliest first, in case the minutes do not suffice for all.
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "llada_8b": (
        Variant(2),
        Variant(2, compiled=False),
        Variant(4, recomputed="selective"),
        Variant(8, recomputed="full"),
        Variant(2, float8=True),
        Variant(8, recomputed="full", float8=True),
    ),
    # Its ffn_dim, 5634, is no multiple of 16, as float8 needs it.
    "llada_1b": (
        Variant(4),
        Variant(4, compiled=False),
        Variant(8, recomputed="selective"),
        Variant(16, recomputed="full"),
    ),
}
QUICK_VARIANTS = (
    Variant(2, compiled=False),
    Variant(2),
    Variant(2, compiled=False, recomputed="selective"),
    Variant(2, compiled=False, recomputed="full", float8=True),
)


def layers_that_fit(config: ModelConfig, device: torch.device) -> int:
    """Up to eight layers whose weights, gradients and moments in float32 take two thirds of the memory, with the embeddings'."""
    if device.type == "cpu":
        return config.num_layers
    embeddings = config.num_parameters - config.num_non_embedding_parameters
    layer = config.num_non_embedding_parameters / config.num_layers
    parameters = torch.cuda.get_device_properties(device).total_memory * 2 / 3 / 16
    return max(1, min(8, int((parameters - embeddings) / layer)))


def measure(
    config: ModelConfig, dataset: TokenDataset, device: torch.device, variant: Variant
) -> dict[str, Any]:
    """Speed and memory; or what went wrong."""
    torch.compiler.reset()
    peak_memory(device)
    began = time.perf_counter()
    try:
        figures = _measure(config, dataset, device, variant)
    except torch.OutOfMemoryError:
        figures = {"fault": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        figures = {"fault": f"{type(error).__name__}: {error}"[:300]}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return asdict(variant) | figures | {"seconds_in_all": round(time.perf_counter() - began, 1)}


def _measure(
    config: ModelConfig, dataset: TokenDataset, device: torch.device, variant: Variant
) -> dict[str, Any]:
    run = Run(
        config,
        dataset,
        device,
        torch.bfloat16,
        micro_rows=variant.micro_rows,
        micro_batches=max(1, STEP_ROWS // variant.micro_rows),
        **variant.parallel,
    )
    batches = run.stream.batches(0, WARM_UP + TIMED, pinned=device.type == "cuda")
    predicted = tokens = 0
    since, losses = 0.0, []
    for batch in batches:
        if batch.step == WARM_UP:
            synchronize(device.type)
            since = time.perf_counter()
        if batch.step >= WARM_UP:
            tokens += batch.tokens
            predicted += sum(len(micro.positions) for micro in batch.micro)
        losses.append(train_step(run.model, batch.to(device), 1, run.dtype)[0])
        run.move(losses[-1])
    synchronize(device.type)
    rate = tokens / (time.perf_counter() - since)
    memory = peak_memory(device)
    flops = config.training_flops_per_token(dataset.row_length)
    head = 6 * config.vocab_size * config.d_model
    done = flops - head * (1 - predicted / tokens)
    peak = peak_flops(device, torch.bfloat16)
    return {
        "tokens_per_s": round(rate, 1),
        "mfu": round(rate * flops / peak, 4),
        "mfu_done": round(rate * done / peak, 4),
        "allocated_gib": round(memory.allocated_gib, 2),
        "reserved_gib": round(memory.reserved_gib, 2),
        "last_loss": float(losses[-1]),
    }


def networks(
    device: torch.device, quick: bool
) -> Iterator[tuple[str, ModelConfig, int, tuple[Variant, ...]]]:
    """(name, shape, length of its rows, ways to run it)."""
    if quick:
        yield "small", replace(SMALL, num_layers=1), SMALL_ROW, QUICK_VARIANTS
        return
    for preset in (llada_8b, llada_1b):
        name, recipe = preset.__name__, preset()
        model = recipe.model
        if preset is llada_8b:
            model = replace(model, num_layers=layers_that_fit(model, device))
        yield name, model, recipe.prepare.row_length, VARIANTS[name]


def format_row(name: str, row: dict[str, Any]) -> str:
    how = f"{'compiled' if row['compiled'] else 'eager'}{' float8' if row['float8'] else ''}"
    setting = f"{name:9} {how:15} recomputed {row['recomputed']:9} rows {row['micro_rows']:2}"
    if "fault" in row:
        return f"{setting}  {row['fault']}"
    return (
        f"{setting}  {row['tokens_per_s']:9,.0f} tokens/s  MFU {row['mfu']:6.1%} (done {row['mfu_done']:6.1%})  "
        f"{row['allocated_gib']:6.1f} GiB ({row['reserved_gib']:.1f} reserved)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=7.0, help="after them nothing new is begun")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    began, device = time.perf_counter(), torch.device(arguments.device)
    torch.backends.cuda.matmul.allow_tf32 = False  # the checks are of float32; what is timed is bf16
    report: dict[str, Any] = {
        "environment": environment(arguments.device),
        "checks": run_checks(device),
        "networks": {},
    }
    for name, config, row_length, variants in networks(device, arguments.quick):
        entry: dict[str, Any] = {
            "model": config.content(),
            "parameters": config.num_parameters,
            "row_length": row_length,
            "rows_a_step": STEP_ROWS,
            "results": [],
            "left_out": [],
        }
        report["networks"][name] = entry
        print(f"{name}: {config.num_layers} layers, {config.num_parameters / 1e9:.2f} B parameters")
        with tempfile.TemporaryDirectory() as folder:
            dataset = write_data(Path(folder), config, 256, row_length)
            for variant in variants:
                if time.perf_counter() - began > 60 * arguments.minutes:
                    entry["left_out"].append(asdict(variant) | {"why": "no time left"})
                elif variant.float8 and not HAS_FLOAT8:
                    entry["left_out"].append(asdict(variant) | {"why": "no torchao"})
                else:
                    entry["results"].append(measure(config, dataset, device, variant))
                    print(format_row(name, entry["results"][-1]), flush=True)
        for left_out in entry["left_out"]:
            print(f"left out: {left_out}")
    report["seconds"] = round(time.perf_counter() - began, 1)
    target = arguments.results / "gpu_train.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {target} ({report['seconds']:.0f} s)")
    failed = [name for name, found in report["checks"].items() if str(found).startswith("FAILED")]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
