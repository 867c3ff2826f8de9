"""The one training loop. Pretraining, fine-tuning, the autoregressive and the BERT baseline all run here: they differ
in their data (which positions may be masked, what a row is divided by) and in `ObjectiveConfig`.

Runs the same under python, torchrun and Ray Train. Noise, order and learning rate are functions of the step, so a
resumed run repeats an uninterrupted one, and the number of workers changes nothing but rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llada.data.tokens.shards import TokenDataset
from llada.diffusion.objective import masked_diffusion_loss, next_token_loss, predictors
from llada.model.transformer import ModelConfig, Transformer, copy_full_
from llada.training import checkpoint
from llada.training.batches import Batch, BatchStream, ObjectiveConfig, add_noise, predicted_positions
from llada.training.metrics import Throughput, peak_flops
from llada.training.optim import OptimConfig, build_optimizers, lr_factor, set_lr
from llada.training.parallel import (
    Precision,
    all_sum,
    autocast,
    build_parallel,
    clip_gradients,
    full_state,
    resolve_precision,
    set_gradient_sync,
    training_device,
    world,
)
from llada.training.validation import Validation


@dataclass(frozen=True)
class TrainConfig:
    """How long, how big, how often. A run is complete in itself: the batch is counted in tokens, never per GPU."""

    num_steps: int | None = None  # None: `num_epochs` passes over the data
    num_epochs: float = 1.0
    global_batch_tokens: int = 262_144
    micro_batch_rows: int = 8  # rows of one forward on one worker; changes memory and speed only
    precision: Precision = "auto"
    seed: int = 0
    log_every: int = 10
    validate_every: int = 500
    validation_rows: int = 256
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    activation_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name in (
            "global_batch_tokens",
            "micro_batch_rows",
            "log_every",
            "validate_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be at least 1, not {getattr(self, name)}")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"train: num_steps must be at least 1, not {self.num_steps}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a training run learns, and nothing about where it runs."""

    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()


@dataclass(frozen=True)
class TrainResult:
    num_steps: int
    tokens: int  # trained on, all epochs
    train_loss: float  # nats per token, mean over the last logged interval
    validation_loss: float  # bound in nats per token at the end
    unigram_loss: float  # unigram cross-entropy on the same validation tokens
    seconds: float
    tokens_per_second: float
    state: dict[str, Tensor] | None  # full weights on worker 0


Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Cursor:
    """Where a run is: all that a checkpoint holds beside tensors. The data position is the step."""

    step: int = 0  # steps done
    tokens: int = 0  # trained on so far
    seconds: float = 0.0  # spent so far, attempts before this one included
    train_loss: float = float("nan")  # last logged
    interval_loss: float = 0.0  # summed since then
    interval_steps: int = 0


def train(
    model_config: ModelConfig,
    config: RunConfig,
    data: str,
    *,
    checkpoints: str,
    unigram_counts: np.ndarray,
    initial_state: dict[str, Tensor] | None = None,
    report: Report | None = None,
    stop_at: int | None = None,
) -> TrainResult:
    """Train from the newest checkpoint in `checkpoints`, or from `initial_state`, or from random weights.

    Args:
        data: a prepared folder with splits "train" and "validation".
        checkpoints: folder (any fsspec URL that all workers reach) of the resumable checkpoints.
        unigram_counts: int64 (V,) token counts of the training split, for the baseline.
        initial_state: our parameter names -> full tensors, the same on every worker (fine-tuning).
        report: called on worker 0 with one dict per event; "event" is start, step, validation or checkpoint
            (the last one just before the checkpoint is written).
        stop_at: leave with a checkpoint after this many steps; the schedules still follow the whole run.

    Raises:
        ValueError: model and data do not fit (vocabulary, length, mask id), or the checkpoints are another run's.
        FloatingPointError: the loss is no longer finite; the last checkpoint is intact.
    """
    rank, num_workers = world()
    device = training_device()
    dtype = resolve_precision(config.train.precision, device)
    dataset = TokenDataset(data, "train")
    check_fit(model_config, config, dataset)
    seed = config.train.seed
    global_rows = config.train.global_batch_tokens // dataset.row_length
    num_steps = config.train.num_steps or max(1, round(config.train.num_epochs * len(dataset) / global_rows))
    stream = BatchStream(
        dataset, config.objective, global_rows=global_rows, seed=seed, rank=rank, num_workers=num_workers
    )
    validation = Validation(
        TokenDataset(data, "validation"),
        config.objective,
        num_rows=config.train.validation_rows,
        seed=seed,
        micro_rows=config.train.micro_batch_rows,
    )
    unigram_loss = validation.unigram_nats(unigram_counts)

    model = build_parallel(
        model_config, device, dtype, activation_checkpointing=config.train.activation_checkpointing
    )
    optimizers = build_optimizers(model, config.optim)
    identity = run_identity(model_config, config, dataset)
    cursor = restore(checkpoints, identity, model, optimizers, initial_state, seed)
    network = torch.compile(model) if config.train.compile else model

    def emit(event: str, **values: Any) -> None:
        if rank == 0 and report:
            report({"event": event, **values})

    emit(
        "start",
        first_step=cursor.step,
        num_steps=num_steps,
        parameters=model_config.num_parameters,
        unigram_loss=unigram_loss,
        precision=str(dtype).removeprefix("torch."),
        workers=num_workers,
    )
    last_step = num_steps if stop_at is None else min(stop_at, num_steps)
    flops = model_config.training_flops_per_token(dataset.row_length)
    clock = Throughput(flops, peak_flops(device, dtype) * num_workers)
    started = time.perf_counter() - cursor.seconds
    validation_loss = float("nan")
    model.train()
    for batch in stream.batches(cursor.step, last_step):
        step = batch.step + 1
        set_lr(optimizers, lr_factor(batch.step, num_steps, config.optim))
        loss = float(train_step(network, model, batch.to(device), config, num_workers, dtype))
        norm = float(clip_gradients(model, config.optim.grad_clip))
        if not np.isfinite(loss + norm):  # before the weights move, and before a checkpoint could keep them
            raise FloatingPointError(
                f"the loss ({loss}) or its gradient ({norm}) is not finite at step {step}: "
                "run the same command with a lower learning rate (--optim.lr, --optim.muon-lr) to go on from the "
                "last checkpoint"
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        num_tokens = global_rows * batch.tokens.shape[1]
        clock.add(num_tokens)
        cursor = replace(
            cursor,
            step=step,
            tokens=cursor.tokens + num_tokens,
            seconds=time.perf_counter() - started,
            interval_loss=cursor.interval_loss + loss,
            interval_steps=cursor.interval_steps + 1,
        )
        if step % config.train.log_every == 0 or step == num_steps:
            train_loss = cursor.interval_loss / cursor.interval_steps
            lr = optimizers[0].param_groups[0]["lr"]
            speed = clock.read()
            emit(
                "step",
                step=step,
                loss=train_loss,
                lr=lr,
                grad_norm=norm,
                tokens=cursor.tokens,
                **speed,
            )
            cursor = replace(cursor, train_loss=train_loss, interval_loss=0.0, interval_steps=0)
        if step % config.train.validate_every == 0 or step == num_steps:
            validation_loss = validation(model, device, dtype)
            emit("validation", step=step, loss=validation_loss, ratio=validation_loss / unigram_loss)
        if step % config.train.checkpoint_every == 0 or step == last_step:
            emit("checkpoint", step=step)  # before it: a record of events must never be behind a checkpoint
            state = {"identity": identity, **asdict(cursor)}
            checkpoint.save_checkpoint(
                checkpoints, step, model, optimizers, state, keep=config.train.keep_checkpoints
            )
    if np.isnan(validation_loss):  # resumed after the last step, or stopped early
        validation_loss = validation(model, device, dtype)
    return TrainResult(
        num_steps=cursor.step,
        tokens=cursor.tokens,
        train_loss=cursor.train_loss,
        validation_loss=validation_loss,
        unigram_loss=unigram_loss,
        seconds=cursor.seconds,
        tokens_per_second=cursor.tokens / max(cursor.seconds, 1e-9),
        state=full_state(model),
    )


def train_step(
    network: Any, model: Transformer, batch: Batch, config: RunConfig, num_workers: int, dtype: torch.dtype
) -> Tensor:
    """Forward and backward of one global batch; the loss in nats per token, the same number on every worker.

    Each row is divided by a number that knows the whole global batch (its token count, or rows × answer length in SFT),
    so micro-batches and workers add up to the same gradient however the rows are split.
    """
    counts = predicted_positions(batch, config.objective.objective).sum(1)
    if batch.per_row:
        normalizer = counts.clamp(min=1) * batch.global_rows
    else:
        normalizer = all_sum(counts.sum()).clamp(min=1).expand(len(counts))
    total = torch.zeros((), dtype=torch.float64, device=batch.tokens.device)
    micro_rows = config.train.micro_batch_rows
    for start, micro in zip(range(0, len(counts), micro_rows), batch.split(micro_rows), strict=True):
        set_gradient_sync(model, start + micro_rows >= len(counts))
        with autocast(batch.tokens.device, dtype):
            loss = micro_batch_loss(network, model, micro, config, normalizer[start : start + micro_rows])
        (loss * num_workers).backward()  # FSDP averages gradients over workers; the loss is a sum
        total += loss.detach()
    return all_sum(total)


def micro_batch_loss(
    network: Any, model: Transformer, batch: Batch, config: RunConfig, normalizer: Tensor
) -> Tensor:
    """The objective on these rows, a scalar."""
    if config.objective.objective == "autoregressive":
        predicted = predicted_positions(batch, "autoregressive")
        logits = network(batch.tokens, segment_ids=batch.segment_ids, logits_at=predictors(predicted))
        return next_token_loss(logits, batch.tokens, predicted, normalizer=normalizer)
    mask_id = model.config.mask_token_id
    assert mask_id is not None  # check_fit
    noisy = add_noise(batch, config.objective, config.train.seed, mask_id)
    logits = network(noisy.tokens, segment_ids=batch.segment_ids, logits_at=noisy.masked)
    subs = mask_id if config.objective.subs else None
    return masked_diffusion_loss(logits, batch.tokens, noisy, normalizer=normalizer, subs_mask_id=subs)


def check_fit(model: ModelConfig, config: RunConfig, dataset: TokenDataset) -> None:
    """Refuse a network that cannot learn from this data, before anything is built."""
    info, where = dataset.info, dataset.url
    if info.vocab_size > model.vocab_size:
        raise ValueError(
            f"{where} was tokenised with {info.vocab_size} ids, the model has {model.vocab_size} rows: "
            "prepare the data with the model's tokenizer, or set model.vocab_size"
        )
    if model.mask_token_id is None and config.objective.objective == "masked_diffusion":
        raise ValueError("the model has no mask_token_id, which masked diffusion needs")
    if model.mask_token_id is not None and info.mask_token_id != model.mask_token_id:
        raise ValueError(
            f"{where} has mask id {info.mask_token_id}, the model {model.mask_token_id}: they must be of one tokenizer"
        )
    if dataset.row_length > model.max_length:
        raise ValueError(
            f"{where} has rows of {dataset.row_length} tokens, the model takes {model.max_length}: "
            "prepare shorter rows or raise model.max_length"
        )
    if (config.objective.objective == "autoregressive") != model.causal:
        raise ValueError(
            f"objective {config.objective.objective} and model.causal={model.causal} do not go together"
        )
    if config.train.global_batch_tokens % dataset.row_length:
        raise ValueError(
            f"train.global_batch_tokens {config.train.global_batch_tokens} is not a multiple of the rows' length "
            f"{dataset.row_length}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{where} has no training rows")


def run_identity(model: ModelConfig, config: RunConfig, dataset: TokenDataset) -> dict[str, Any]:
    """What must not change when a run goes on: the network, the data, the noise and the batch. Learning rates may."""
    return {
        "model": asdict(model),
        "objective": _jsonable(asdict(config.objective)),
        "optimizer": config.optim.optimizer,
        "seed": config.train.seed,
        "global_batch_tokens": config.train.global_batch_tokens,
        "data": dataset.fingerprint,
    }


def restore(
    checkpoints: str,
    identity: dict[str, Any],
    model: Transformer,
    optimizers: list[torch.optim.Optimizer],
    initial_state: dict[str, Tensor] | None,
    seed: int,
) -> Cursor:
    """Fill the network (and optimizers) from the newest checkpoint, or else the initial weights, or else the seed."""
    steps = checkpoint.complete_checkpoints(checkpoints)
    if steps:
        state = checkpoint.read_state(checkpoints, steps[-1])
        stored = state.pop("identity")
        different = sorted(key for key in identity if stored.get(key) != identity[key])
        if different:
            raise ValueError(
                f"the checkpoints in {checkpoints} are of another run ({', '.join(different)} differ): "
                "choose another output folder"
            )
        checkpoint.load_checkpoint(checkpoints, steps[-1], model, optimizers)
        return Cursor(**state)
    if initial_state is None:
        model.init_weights(seed)
    else:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                copy_full_(parameter, initial_state[name])
    return Cursor()


def _jsonable(value: Any) -> Any:
    """Tuples become lists, as they do in JSON, so that stored and fresh values compare equal."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value
