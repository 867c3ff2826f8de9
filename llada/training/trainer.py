"""The one training loop. Pretraining, fine-tuning, the autoregressive and the BERT baseline all run here: they differ
in their data (which positions may be masked, what a row is divided by) and in `ObjectiveConfig`.

Runs the same under python, torchrun and Ray Train. Noise, order and learning rate are functions of the step (and of how
often the run went back to a checkpoint, which those know), so a resumed run repeats an uninterrupted one, and the number of
workers changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llada.diffusion.batch import NOISE_BUCKETS
from llada.diffusion.objective import objective_loss
from llada.errors import UserError
from llada.model.initial import Rows
from llada.model.lora import training_flops
from llada.model.transformer import ModelConfig, Transformer
from llada.settings import require
from llada.training.batches import BatchStream, StepBatch
from llada.training.checkpoint.folder import complete_checkpoints
from llada.training.ema import WeightAverage, averaged_weights
from llada.training.events import (
    Event,
    EventSink,
    RolledBack,
    RunStarted,
    Sampled,
    StepDone,
    Validated,
)
from llada.training.ledger import CHECKPOINT, LOG, VALIDATION, Ledger
from llada.training.memory import explaining_out_of_memory
from llada.training.metrics import Throughput, mean_by_noise, peak_flops, peak_memory
from llada.training.optim import build_optimizers, lr_factor, set_lr, step_all
from llada.training.parallel import (
    all_sum,
    autocast,
    begin_micro_batch,
    build_parallel,
    clip_gradients,
    evaluating,
    resolve_precision,
    training_device,
    world,
)
from llada.training.preemption import Departure, PreemptedError
from llada.training.profile import StepProfiler
from llada.training.run import RunConfig, open_splits, run_identity, run_length
from llada.training.validation import Validation

if TYPE_CHECKING:
    from llada.training.checkpoint.save import Checkpoints


@dataclass(frozen=True)
class TrainResult:
    """What a run has come to. Losses are nats per token."""

    num_steps: int
    tokens: int
    """Trained on, all epochs."""
    train_loss: float
    """Mean over the last logged interval."""
    validation_loss: float
    """The bound at the end."""
    unigram_loss: float
    """Unigram cross-entropy on the same validation tokens."""
    seconds: float
    tokens_per_second: float
    model: Transformer | None
    """The trained network, of which a worker holds its shards (`export_weights`, `full_state`), with the averages of its
    weights where the run keeps those; None beyond the workers."""
    skipped_steps: int = 0
    """Whose loss or gradient was no finite number."""
    precision: str = ""
    """torch's name of the compute dtype."""


class DivergenceError(UserError, FloatingPointError):
    """The loss or its gradient is no longer finite, and going back to a checkpoint has not helped."""


def train(
    model_config: ModelConfig,
    config: RunConfig,
    data: str,
    *,
    checkpoints: str,
    unigram_counts: np.ndarray,
    initial_state: Mapping[str, Rows] | None = None,
    report: EventSink | None = None,
    stop_at: int | None = None,
    profile_to: str | None = None,
    write_samples: Callable[[Transformer], list[str]] | None = None,
    should_stop: Callable[[], bool] | None = None,
    enter: Callable[[str], None] = lambda phase: None,
    run_id: str | None = None,
) -> TrainResult:
    """Train from the newest checkpoint in `checkpoints`, or from `initial_state`, or from random weights.

    Args:
        data: a prepared folder with splits "train" and "validation".
        checkpoints: folder (any fsspec URL that all workers reach) of the resumable checkpoints.
        unigram_counts: int64 (V,) token counts of the training split, for the baseline.
        initial_state: our parameter names -> full tensors, in memory or in a file (`open_state`), the same on every worker.
        report: called on worker 0 with every event (events.py), with CheckpointDue from the thread that writes checkpoints.
        stop_at: leave with a checkpoint after this many steps; the schedules still follow the whole run.
        write_samples: called at each validation; a collective. Its texts are told as `Sampled`.
        profile_to: folder for a trace of some steps of worker 0 (profile.py).
        should_stop: asked on every worker at every step whether this one has to leave; all do then, behind a checkpoint.
        enter: told on every worker what it is at: "step", "validation", "checkpoint", "restore" or "end".
        run_id: what the attempts of one run share: a new one takes over the checkpoints at once, as no other process may.

    Raises:
        PreemptedError: a worker had to leave.
        UserError: model and data do not fit (vocabulary, length, mask id), or the checkpoints are another run's, which may be
            at work on them.
        DivergenceError: the loss is no longer finite, and there is no checkpoint to go back to, or it was done
            `max_rollbacks` times; a checkpoint from before is left.
        OutOfMemoryError: a device, or a CPU's host, has no memory left.
    """
    # Here and in `_train`, because who starts a training elsewhere need not wait for torch's checkpoints, half of torch's start.
    from llada.training.checkpoint.save import Checkpoints

    with (
        explaining_out_of_memory(model_config, config, data),
        Checkpoints(
            checkpoints,
            keep=config.train.keep_checkpoints,
            keep_every=config.train.keep_every,
            run_id=run_id,
            report=report,
        ) as written,
    ):
        return _train(
            model_config,
            config,
            data,
            written,
            unigram_counts,
            initial_state,
            report,
            stop_at,
            profile_to,
            write_samples,
            should_stop,
            enter,
        )


def _train(
    model_config: ModelConfig,
    config: RunConfig,
    data: str,
    checkpoints: Checkpoints,
    unigram_counts: np.ndarray,
    initial_state: Mapping[str, Rows] | None,
    report: EventSink | None,
    stop_at: int | None,
    profile_to: str | None,
    write_samples: Callable[[Transformer], list[str]] | None,
    should_stop: Callable[[], bool] | None,
    enter: Callable[[str], None],
) -> TrainResult:
    """See `train`."""
    from llada.training.checkpoint.restore import restore

    rank, num_workers = world()
    device = training_device()
    dtype = resolve_precision(config.train.precision, device)
    dataset, held_out = open_splits(data, model_config, config)
    seed = config.train.seed
    global_rows = config.train.global_batch_tokens // dataset.row_length
    num_steps = run_length(config, dataset)
    stream = BatchStream(
        dataset,
        config.objective,
        model_config,
        global_rows=global_rows,
        micro_rows=config.train.micro_batch_rows,
        seed=seed,
        rank=rank,
        num_workers=num_workers,
    )
    validation = Validation(
        held_out,
        config.objective,
        num_rows=config.train.validation_rows,
        seed=seed,
        micro_rows=config.train.micro_batch_rows,
    )
    unigram_loss = validation.unigram_nats(unigram_counts)

    model = build_parallel(
        model_config,
        device,
        dtype,
        recomputed=config.train.activation_checkpointing,
        compiled=config.train.compile,
        float8=config.train.float8,
        shard_workers=config.train.shard_workers,
        lora=config.lora,
    )
    optimizers = build_optimizers(model, config.optim)
    if config.train.ema_decay is not None:
        optimizers.append(WeightAverage(model, config.train.ema_decay))
    identity = run_identity(model_config, config, dataset, initial_state)
    cursor, skipped = restore(
        checkpoints.folder, identity, model, optimizers, initial_state=initial_state, seed=seed
    )
    require(
        cursor.step <= num_steps,
        f"the checkpoints in {checkpoints.folder} are at step {cursor.step}, beyond a run of {num_steps}: "
        "set train.num_steps (or num_epochs) to more, or choose another output folder",
    )

    last_step = num_steps if stop_at is None else min(stop_at, num_steps)
    ledger = Ledger(config.train, cursor, num_steps, last_step)

    def emit(*events: Event) -> None:
        if rank == 0 and report is not None:
            for event in events:
                report(event)

    def begin() -> Generator[StepBatch, None, None]:
        """Say from where the run goes on; the batches from there."""
        emit(
            RunStarted(
                first_step=ledger.cursor.step,
                num_steps=num_steps,
                parameters=model_config.num_parameters,
                unigram_loss=unigram_loss,
                precision=str(dtype).removeprefix("torch."),
                workers=num_workers,
            )
        )
        return stream.batches(ledger.cursor.step, last_step, pinned=device.type == "cuda")

    def validate() -> float:
        with averaged_weights(optimizers):
            return validation(model, device, dtype)

    batches = begin()
    emit(*skipped)
    flops = training_flops(model_config, config.lora, dataset.row_length)
    clock = Throughput(flops, peak_flops(device, dtype), num_workers)
    profiler = StepProfiler(profile_to, device) if profile_to and rank == 0 else None
    validation_loss = float("nan")
    gone_back_to: int | None = None
    departure = Departure(should_stop)
    model.train()
    while (batch := next(batches, None)) is not None:
        enter("step")
        is_leaving = departure.agreed()
        set_lr(optimizers, ledger.cursor.lr_scale * lr_factor(batch.step, num_steps, config.optim))
        sums = train_step(model, batch.to(device), num_workers, dtype)
        norm = clip_gradients(model, config.optim.grad_clip).double()
        step_all(optimizers, skipped=(~torch.isfinite(sums[0] + norm)).float())
        ledger.note(batch.tokens, norm, sums)
        clock.add(batch.tokens)
        if profiler:
            profiler.step()
        if not (ledger.must_look() or is_leaving):
            continue
        emit(*ledger.look())
        step, is_bad = ledger.cursor.step, ledger.cursor.bad_steps > 0
        # Whether the weights are to blame or one batch, the next steps show; behind the last one, the validation.
        if ledger.is_lost or (is_bad and step == num_steps and not np.isfinite(validate())):
            enter("restore")
            checkpoints.wait()
            before = _choose_rollback(checkpoints.folder, ledger, gone_back_to)
            batches.close()
            restored, skipped = restore(
                checkpoints.folder,
                identity,
                model,
                optimizers,
                initial_state=initial_state,
                seed=seed,
                before=before,
            )
            checkpoints.drop(after=restored.step)
            ledger.go_back(restored)
            gone_back_to = restored.step
            emit(*skipped, RolledBack(restored.step, step, ledger.cursor.lr_scale))
            batches = begin()
            continue
        due = ledger.due() | ({CHECKPOINT} if is_leaving else set())
        if LOG in due and ledger.cursor.interval_steps:
            levels = mean_by_noise(ledger.cursor.interval_noise)
            ledger.close_interval()
            cursor, lr = ledger.cursor, optimizers[0].param_groups[0]["lr"]
            speed, memory = clock.read(stream.read_wait()), peak_memory(device)
            figures = (*speed, *memory, cursor.skipped_steps, *levels)
            emit(StepDone(step, cursor.train_loss, lr, ledger.grad_norm, cursor.tokens, *figures))
        if VALIDATION in due:
            enter("validation")
            validation_loss = validate()
            is_average = config.train.ema_decay is not None
            emit(Validated(step, validation_loss, validation_loss / unigram_loss, is_average))
            if write_samples is not None:
                with averaged_weights(optimizers), evaluating(model, device, dtype):
                    texts = tuple(write_samples(model))
                emit(Sampled(step, texts))
        if CHECKPOINT in due:
            enter("checkpoint")
            checkpoints.save(ledger.cursor, identity, model, optimizers)
        if is_leaving and step < last_step:
            checkpoints.wait()
            raise PreemptedError(f"the run was asked to leave, and has, behind the checkpoint of step {step}")
    enter("end")
    if profiler:
        profiler.close()
    if np.isnan(validation_loss):  # resumed after the last step, or stopped early
        validation_loss = validate()
    for optimizer in optimizers:
        if isinstance(optimizer, WeightAverage):
            optimizer.swap()  # for good
    cursor = ledger.cursor
    return TrainResult(
        num_steps=cursor.step,
        tokens=cursor.tokens,
        train_loss=cursor.train_loss,
        validation_loss=validation_loss,
        unigram_loss=unigram_loss,
        seconds=cursor.seconds,
        tokens_per_second=cursor.tokens / max(cursor.seconds, 1e-9),
        model=model,
        precision=str(dtype).removeprefix("torch."),
        skipped_steps=cursor.skipped_steps,
    )


def _choose_rollback(checkpoints: str, ledger: Ledger, gone_back_to: int | None) -> int | None:
    """The step before which the checkpoint is to be that the run goes back to; None: the newest.

    That one may hold the very weights that have no loss: where it was gone back to already, an earlier one is better.

    Raises DivergenceError where there is none, or the run has gone back often enough.
    """
    cursor = ledger.cursor
    fault = (
        f"the loss ({ledger.loss}) or its gradient ({ledger.grad_norm}) is not finite at step {cursor.step}"
    )
    remedy = "with a lower learning rate (--optim.lr, --optim.muon-lr)"
    steps = complete_checkpoints(checkpoints)
    if not steps:
        raise DivergenceError(f"{fault}, before the first checkpoint: start again {remedy}")
    if cursor.rollbacks >= ledger.config.max_rollbacks:
        often = f" and going back to a checkpoint {cursor.rollbacks} times has not helped"
        raise DivergenceError(
            f"{fault}{often if cursor.rollbacks else ''}: run the same command {remedy} to go on from the last checkpoint"
        )
    return gone_back_to if gone_back_to == steps[-1] != steps[0] else None


def train_step(model: Transformer, batch: StepBatch, num_workers: int, dtype: torch.dtype) -> Tensor:
    """Forward and backward of one global batch. (1 + 2 · NOISE_BUCKETS,) float64, the same on every worker, for which the device
    has not been waited: the loss in nats per token; then for each bucket Σ −log p of its masked tokens, and their number."""
    device = batch.micro[0].tokens.device
    normalizer = 1.0 if batch.counted is None else all_sum(batch.counted.clone()).clamp(min=1)
    sums = torch.zeros(1 + 2 * NOISE_BUCKETS, dtype=torch.float64, device=device)
    tally = sums[1:].view(NOISE_BUCKETS, 2)
    for number, micro in enumerate(batch.micro, start=1):
        begin_micro_batch(model, is_last=number == len(batch.micro))
        with autocast(device, dtype):
            loss = objective_loss(model, micro, normalizer=normalizer, tally=tally)
        (loss * num_workers).backward()  # FSDP averages gradients over workers; the loss is a sum
        sums[0] += loss.detach()
    return all_sum(sums)
