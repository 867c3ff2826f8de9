"""The training loop on one worker: resuming, accumulating, refusing, and learning."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llada.diffusion.embedding_noise import EmbeddingNoiseConfig
from llada.diffusion.objective import add_noise, masked_diffusion_loss
from llada.errors import UserError
from llada.model.transformer import ModelConfig, Transformer
from llada.training.batches import BatchStream
from llada.training.checkpoint.folder import complete_checkpoints
from llada.training.events import CheckpointDue, RolledBack, StepDone, StepSkipped, Validated
from llada.training.parallel import build_parallel
from llada.training.preemption import PreemptedError
from llada.training.run import RunConfig
from llada.training.trainer import DivergenceError, train_step

Configs = tuple[ModelConfig, RunConfig]


def by_noise(event: StepDone) -> tuple[tuple[float, ...], tuple[int, ...]]:
    return event.noise_nats, event.noise_tokens


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(
    "knobs",
    [
        {"optimizer": "muon", "random_length": 0.4, "random_split": 0.3, "ema_decay": 0.7},
        {"optimizer": "adamw", "tie_embeddings": True},
        {"data": "sft"},
        pytest.param({"data": "unified", "micro_batch_rows": 3}, marks=pytest.mark.slow),
        pytest.param({"kind": "autoregressive", "causal": True}, marks=pytest.mark.slow),
        {"kind": "block_diffusion", "block_length": 4, "embedding_noise": EmbeddingNoiseConfig(0.2, 7)},
        {"moments": "bf16", "attention_annealing_steps": 7, "qk_norm": True, "qkv_bias": True},
    ],
    ids=str,
)
def test_resuming_equals_never_stopping(
    make_config: Callable,
    run_here: Callable,
    pretrain_folder: Any,
    sft_folder: Any,
    unified_folder: Any,
    tmp_path: Path,
    knobs: dict[str, Any],
) -> None:
    changes = dict(knobs)
    folders = {"sft": sft_folder, "unified": unified_folder}
    folder = folders.get(changes.pop("data", ""), pretrain_folder)
    configs = make_config(**changes, num_steps=9, log_every=3, checkpoint_every=2, validate_every=4)
    whole = run_here(configs, folder, tmp_path / "whole")
    first = run_here(configs, folder, tmp_path / "parts", stop_at=4)  # in the middle of a log interval
    assert first.result.num_steps == 4
    second = run_here(configs, folder, tmp_path / "parts", stop_at=5)
    third = run_here(configs, folder, tmp_path / "parts")
    assert [run.events[0].first_step for run in (first, second, third)] == [0, 4, 5]
    assert_equal(whole.state, third.state)
    assert first.losses + second.losses + third.losses == whole.losses
    assert len(whole.losses) == 3
    told = [[e for e in run.events if isinstance(e, StepDone)] for run in (whole, first, second, third)]
    assert [by_noise(e) for e in told[0]] == [by_noise(e) for e in told[1] + told[2] + told[3]]
    assert all(sum(e.noise_tokens) > 0 for e in told[0]) == (knobs.get("kind") != "autoregressive")
    assert third.result.validation_loss == whole.result.validation_loss
    assert third.result.train_loss == whole.result.train_loss == whole.losses[-1]
    assert third.result.tokens == whole.result.tokens
    assert third.result.seconds > second.result.seconds > first.result.seconds
    done = run_here(configs, folder, tmp_path / "parts")  # nothing is left to do
    assert done.losses == []
    assert_equal(done.state, whole.state)
    assert done.result.validation_loss == whole.result.validation_loss
    assert complete_checkpoints(str(tmp_path / "parts")) == [8, 9]


def test_leaving_when_asked_equals_never_stopping(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    """In the middle of a log interval, behind a checkpoint of that step; in the last step there is nothing to leave."""
    configs = make_config(num_steps=6, log_every=3, checkpoint_every=2, validate_every=4)
    whole = run_here(configs, pretrain_folder, tmp_path / "whole")
    asked = iter([False, False, False, False, True])
    phases: list[str] = []
    options = {"should_stop": asked.__next__, "enter": phases.append}
    with pytest.raises(PreemptedError, match="step 5"):
        run_here(configs, pretrain_folder, tmp_path / "parts", **options)
    assert complete_checkpoints(str(tmp_path / "parts"))[-1] == 5
    assert phases == [
        "step",
        *("step", "checkpoint"),
        "step",
        *("step", "validation", "checkpoint"),
        *("step", "checkpoint"),
    ]
    rest = run_here(configs, pretrain_folder, tmp_path / "parts", should_stop=lambda: True)
    assert rest.events[0].first_step == 5
    assert_equal(rest.state, whole.state)
    assert rest.losses == whole.losses[1:]


def test_events_tell_the_story(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    configs = make_config(num_steps=5, log_every=2, validate_every=3, checkpoint_every=4)
    run = run_here(configs, pretrain_folder, tmp_path)
    story = [(event.name, getattr(event, "step", None)) for event in run.events]
    assert [told for told in story if told[0] != "checkpoint"] == [
        ("start", None),
        ("step", 2),
        ("validation", 3),
        ("step", 4),
        ("step", 5),
        ("validation", 5),
    ]
    # Checkpoints are written beside the steps: they are told of when they are about to be complete.
    assert [told for told in story if told[0] == "checkpoint"] == [("checkpoint", 4), ("checkpoint", 5)]
    assert story.index(("checkpoint", 4)) > story.index(("step", 4))
    assert run.events[0].parameters == configs[0].num_parameters
    assert run.events[1].lr == pytest.approx(0.01)
    assert [event.tokens for event in run.events if isinstance(event, StepDone)] == [256, 512, 640]
    assert run.result.unigram_loss == run.events[0].unigram_loss
    (*_, last) = (event for event in run.events if isinstance(event, Validated))
    assert last.ratio == pytest.approx(run.result.validation_loss / run.result.unigram_loss)


@pytest.mark.parametrize("data", ["pretrain", "sft"])
def test_micro_batches_change_nothing_but_rounding(
    make_config: Callable,
    run_here: Callable,
    pretrain_folder: Any,
    sft_folder: Any,
    tmp_path: Path,
    data: str,
) -> None:
    folder = sft_folder if data == "sft" else pretrain_folder
    runs = [
        run_here(make_config(**knobs), folder, tmp_path / str(i))
        for i, knobs in enumerate(
            [
                {},
                {"micro_batch_rows": 1},
                {"micro_batch_rows": 3},
                {"activation_checkpointing": "full"},
                {"activation_checkpointing": "selective"},
            ]
        )
    ]
    for run in runs[1:]:
        assert run.losses == pytest.approx(runs[0].losses, rel=1e-5)
        for name, value in runs[0].state.items():
            # Six steps of 0.01: float32 rounding of the gradients, divided by Adam.
            torch.testing.assert_close(run.state[name], value, rtol=0, atol=1e-4)


def test_the_step_loss_is_the_formula(make_config: Callable, pretrain_folder: Any, sft_folder: Any) -> None:
    """train_step against the loss written out by hand: pretraining over all tokens, fine-tuning row by row."""
    from llada.data.tokens.shards import TokenDataset

    for folder in (pretrain_folder, sft_folder):
        model_config, config = make_config(micro_batch_rows=3)
        model = build_parallel(model_config, torch.device("cpu"), torch.float32)
        model.init_weights(0)
        dataset = TokenDataset(folder.url)
        stream = BatchStream(
            dataset,
            config.objective,
            model_config,
            global_rows=8,
            micro_rows=3,
            seed=0,
            rank=0,
            num_workers=1,
        )
        got, *by_noise = train_step(model, stream.prepare(1), 1, torch.float32).tolist()
        grad = model.embed.weight.grad.clone()
        model.zero_grad()
        batch = stream.load(1)
        noisy = add_noise(batch, config.objective, 0, 1)
        logits = model(noisy.tokens, segment_ids=batch.segment_ids)
        counts = batch.maskable.sum(1)
        per_row = folder is sft_folder
        loss = masked_diffusion_loss(
            logits, batch.tokens, noisy, normalizer=8 * counts if per_row else counts.sum()
        )
        loss.backward()
        by_hand, levels = 0.0, [0.0] * 20
        log_p = logits.log_softmax(-1)
        for row in range(8):
            for column in noisy.masked[row].nonzero().flatten().tolist():
                nats, p = -log_p[row, column, batch.tokens[row, column]].item(), float(noisy.mask_prob[row])
                by_hand += nats / p / (8 * float(counts[row]) if per_row else float(counts.sum()))
                levels[2 * int(p * 10)] += nats
                levels[2 * int(p * 10) + 1] += 1
        assert got == pytest.approx(loss.item(), rel=1e-5) == pytest.approx(by_hand, rel=1e-5)
        assert by_noise == pytest.approx(levels, rel=1e-5)
        torch.testing.assert_close(grad, model.embed.weight.grad, rtol=1e-4, atol=1e-6)


def train_for(
    run_here: Callable, configs: Configs, folder: Any, path: Path, **options: Any
) -> tuple[float, float, list[float]]:
    run = run_here(configs, folder, path, **options)
    return run.result.validation_loss, run.result.unigram_loss, run.losses


@pytest.mark.parametrize(
    ("knobs", "below"),
    [
        ({"optimizer": "muon"}, 0.75),
        ({"schedule": "loglinear", "subs": True}, 0.85),
        ({"kind": "autoregressive", "causal": True}, 0.4),
        ({"kind": "block_diffusion", "block_length": 4, "optimizer": "muon"}, 0.65),
        ({"schedule": "bert"}, 0.9),
    ],
    ids=str,
)
def test_every_objective_learns_to_count(
    make_config: Callable,
    run_here: Callable,
    pretrain_folder: Any,
    tmp_path: Path,
    knobs: dict[str, Any],
    below: float,
) -> None:
    configs = make_config(num_steps=120, log_every=20, lr=0.01, muon_lr=0.03, eps=1e-8, **knobs)
    bound, unigram, losses = train_for(run_here, configs, pretrain_folder, tmp_path)
    # Means of 20 steps whose weights reach 1/t: the bound is the steadier measure.
    assert losses[-1] < losses[0]
    assert bound < below * unigram


def test_fine_tuning_starts_from_given_weights_and_learns(
    make_config: Callable, run_here: Callable, sft_folder: Any, tmp_path: Path
) -> None:
    model = Transformer(make_config()[0])
    model.init_weights(123)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    still = run_here(make_config(num_steps=1, lr=1e-12), sft_folder, tmp_path / "still", initial_state=start)
    for name, value in start.items():
        torch.testing.assert_close(still.state[name], value, rtol=0, atol=1e-9)
    configs = make_config(num_steps=240, log_every=40, lr=0.03, eps=1e-8)
    bound, unigram, losses = train_for(run_here, configs, sft_folder, tmp_path / "learn", initial_state=start)
    assert losses[-1] < 0.8 * losses[0]
    assert bound < 0.7 * unigram


def test_bf16_trains(make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path) -> None:
    exact = run_here(make_config(num_steps=4), pretrain_folder, tmp_path / "fp32")
    half = run_here(make_config(num_steps=4, precision="bf16"), pretrain_folder, tmp_path / "bf16")
    assert half.events[0].precision == "bfloat16"
    assert half.losses == pytest.approx(exact.losses, rel=0.03)
    assert half.losses != exact.losses
    assert {tensor.dtype for tensor in half.state.values()} == {torch.float32}


def test_float8_trains_or_says_what_it_needs(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    """Emulated here; the master weights stay float32 under their own names."""
    pytest.importorskip("torchao", reason="the extra float8 is not installed")
    shape = {"ffn_dim": 32, "num_steps": 4}
    exact = run_here(make_config(**shape), pretrain_folder, tmp_path / "fp32")
    coarse = run_here(make_config(**shape, float8=True), pretrain_folder, tmp_path / "float8")
    assert coarse.losses == pytest.approx(exact.losses, rel=0.05)
    assert coarse.losses != exact.losses
    assert coarse.state.keys() == exact.state.keys()
    with pytest.raises(UserError, match=r"float8: gate_proj is 24 × 16.*multiples of 16"):
        run_here(make_config(ffn_dim=24, float8=True), pretrain_folder, tmp_path / "odd")


def test_seeds_change_everything(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    losses = [
        run_here(make_config(num_steps=2, seed=seed), pretrain_folder, tmp_path / str(i)).losses
        for i, seed in enumerate((0, 0, 1))
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_epochs_decide_the_number_of_steps(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    from llada.data.tokens.shards import TokenDataset

    rows = len(TokenDataset(pretrain_folder.url))
    run = run_here(make_config(num_steps=None, num_epochs=1.5), pretrain_folder, tmp_path)
    assert run.result.num_steps == round(1.5 * rows / 8) == run.events[0].num_steps


def steps_fed(configs: Configs, folder: Any, token: int, num_steps: int) -> list[int]:
    from llada.data.tokens.shards import TokenDataset

    stream = BatchStream(
        TokenDataset(folder.url),
        configs[1].objective,
        configs[0],
        global_rows=8,
        micro_rows=8,
        seed=0,
        rank=0,
        num_workers=1,
    )
    return [
        batch.step + 1
        for batch in stream.batches(0, num_steps)
        if any((micro.tokens == token).any() for micro in batch.micro)
    ]


def test_a_step_without_a_finite_loss_is_skipped_and_counted(
    make_config: Callable, run_here: Callable, poisoned: Callable, rare_folder: Any, tmp_path: Path
) -> None:
    """Its weights stay, its data are passed over, what was due at it is done at the next one; the last may be one, and so
    may that at which a run is interrupted."""
    folder, rare = rare_folder
    configs = make_config(num_steps=12, log_every=3, validate_every=4, checkpoint_every=2)
    initial = poisoned(configs, rare)
    bad = steps_fed(configs, folder, rare, 12)
    assert bad == [4, 9, 12]
    whole = run_here(configs, folder, tmp_path / "whole", initial_state=initial)
    skipped = [event.step for event in whole.events if isinstance(event, StepSkipped)]
    assert skipped == bad
    assert whole.result.skipped_steps == len(bad)
    assert np.isfinite(whole.losses).all()
    assert all(np.isfinite(event.noise_nats).all() for event in whole.events if isinstance(event, StepDone))
    assert [event.step for event in whole.events if isinstance(event, StepDone)] == [3, 6, 10, 12]
    assert [event.step for event in whole.events if isinstance(event, Validated)] == [5, 8, 12]
    assert [event.step for event in whole.events if isinstance(event, CheckpointDue)] == [2, 5, 6, 8, 10, 12]
    events = []
    for stop_at in (3, 4, 9, None):
        parts = run_here(configs, folder, tmp_path / "parts", initial_state=initial, stop_at=stop_at)
        events += parts.events
    assert parts.result.skipped_steps == len(bad)
    for kind in (StepDone, StepSkipped, Validated):
        told = [
            [(e.step, str(e.loss)) for e in some if isinstance(e, kind)] for some in (events, whole.events)
        ]
        assert told[0] == told[1]
    for name, value in whole.state.items():
        assert torch.equal(value.nan_to_num(), parts.state[name].nan_to_num()), name


def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(
    make_config: Callable, run_here: Callable, poisoned: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    configs = make_config(log_every=5, checkpoint_every=1)
    initial = poisoned(configs, 3)  # which every batch has
    with pytest.raises(DivergenceError, match="step 5, before the first checkpoint.*lower learning rate"):
        run_here(configs, pretrain_folder, tmp_path, initial_state=initial)
    assert complete_checkpoints(str(tmp_path)) == []
    assert issubclass(DivergenceError, UserError)
    assert issubclass(DivergenceError, FloatingPointError)


def explode_after_two(
    make_config: Callable, run_here: Callable, folder: Any, path: Path, **knobs: Any
) -> Any:
    """Two sound steps, of which a checkpoint is kept, then at a rate that no weight survives."""
    shared = {"log_every": 1, "warmup_steps": 0, "decay_fraction": 0.0, "weight_decay": 0.0, "num_steps": 9}
    run_here(make_config(**shared, checkpoint_every=1), folder, path, stop_at=2)
    return run_here(make_config(**shared, lr=1e36, **knobs), folder, path)


def test_a_run_that_diverges_goes_back_and_on_at_a_lower_rate(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    """It ends with the weights of a run that had had the lower rate from there on."""
    run = explode_after_two(
        make_config, run_here, pretrain_folder, tmp_path / "back", rollback_lr_scale=1e-38, max_bad_steps=3
    )
    kinds = [type(event).__name__ for event in run.events if not isinstance(event, Validated)]
    assert kinds[:7] == ["RunStarted", "StepDone", *["StepSkipped"] * 3, "RolledBack", "RunStarted"]
    (back,) = (event for event in run.events if isinstance(event, RolledBack))
    assert (back.step, back.diverged_at, back.lr_scale) == (2, 6, 1e-38)
    assert [event.step for event in run.events if isinstance(event, StepDone)] == [3, *range(3, 10)]
    assert run.result.skipped_steps == 3
    sound = make_config(
        log_every=1, warmup_steps=0, decay_fraction=0.0, weight_decay=0.0, num_steps=9, checkpoint_every=1
    )
    straight = run_here(sound, pretrain_folder, tmp_path / "straight")
    for name, value in run.state.items():
        torch.testing.assert_close(value, straight.state[name], rtol=0, atol=1e-6)


def test_a_checkpoint_that_does_not_help_is_given_up_for_an_earlier_one(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    """The step that destroys the weights has a loss itself, and its checkpoint holds what it left."""
    run = explode_after_two(
        make_config,
        run_here,
        pretrain_folder,
        tmp_path,
        rollback_lr_scale=1e-19,  # twice: 0.01
        max_bad_steps=2,
        checkpoint_every=1,
    )
    assert [event.step for event in run.events if isinstance(event, RolledBack)] == [3, 2]
    assert math.isfinite(run.result.validation_loss)
    assert complete_checkpoints(str(tmp_path)) == [8, 9]


def test_who_diverges_again_and_again_is_told_so(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    with pytest.raises(
        DivergenceError, match="step 7.*2 times has not helped.*go on from the last checkpoint"
    ):
        explode_after_two(make_config, run_here, pretrain_folder, tmp_path, max_rollbacks=2)
    assert complete_checkpoints(str(tmp_path)) == [1]
    configs = make_config(
        num_steps=9, checkpoint_every=1, warmup_steps=0, decay_fraction=0.0, weight_decay=0.0
    )
    resumed = run_here(configs, pretrain_folder, tmp_path)
    assert resumed.events[0].first_step == 1
    assert math.isfinite(resumed.result.train_loss)


def test_a_run_never_ends_in_weights_that_have_no_bound(
    make_config: Callable, run_here: Callable, poisoned: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    """Fewer steps are skipped than `max_bad_steps`, but the validation at the end shows what is wrong."""
    configs = make_config(max_bad_steps=50)
    with pytest.raises(DivergenceError, match="step 6, before the first checkpoint"):
        run_here(configs, pretrain_folder, tmp_path, initial_state=poisoned(configs, 3))
    assert complete_checkpoints(str(tmp_path)) == []


def test_the_autoregressive_baseline_needs_no_mask(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    configs = make_config(kind="autoregressive", causal=True, mask_token_id=None, num_steps=2)
    run = run_here(configs, pretrain_folder, tmp_path)
    assert np.isfinite(run.losses).all()


def test_result_weights_are_the_checkpoints(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path
) -> None:
    configs = make_config(num_steps=2, tie_embeddings=True)
    state = run_here(configs, pretrain_folder, tmp_path).state
    model = Transformer(configs[0])
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"]  # the tied head is stored once
    assert unexpected == []


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values that are read off it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("knobs", [{"optimizer": "muon", "micro_batch_rows": 3}, {"ema_decay": 0.9}], ids=str)
def test_between_logged_steps_nobody_waits_for_the_device(
    make_config: Callable, run_here: Callable, pretrain_folder: Any, tmp_path: Path, knobs: dict[str, Any]
) -> None:
    counts = []
    for num_steps in (3, 9):
        configs = make_config(num_steps=num_steps, log_every=100, **knobs)
        with Reads() as reads:
            run_here(configs, pretrain_folder, tmp_path / str(num_steps))
        counts.append(reads.count)
    assert counts[0] == counts[1]
