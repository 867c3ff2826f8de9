"""What a training run is: its settings, the splits that it learns from, its length, and what must not change when it goes
on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llada.data.tokens.shards import TokenDataset
from llada.diffusion.objective import ObjectiveConfig
from llada.model.initial import Rows
from llada.model.lora import LoraConfig, adapted_linears
from llada.model.transformer import ModelConfig
from llada.settings import check_limits, limited, require
from llada.training.optim import OptimConfig, schedule_faults
from llada.training.parallel import Precision, Recomputed, world

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How long, how big, how often. A run is complete in itself: the batch is counted in tokens, never per GPU."""

    num_steps: int | None = limited(None, low=1)
    """Optimizer steps; None: `num_epochs` passes over the data."""
    num_epochs: float = limited(1.0, above=0)
    """Passes over the data when num_steps is None."""
    global_batch_tokens: int = limited(262_144, low=1)
    """Tokens of one step over all workers, a multiple of the rows' length."""
    micro_batch_rows: int = limited(8, low=1)
    """Rows of one forward on one worker, at the most; changes memory and speed only."""
    precision: Precision = "auto"
    """Of the forward pass: bf16 where the hardware multiplies it natively ("auto"), always, or never."""
    seed: int = 0
    """Of weights, order and noise."""
    log_every: int = limited(10, low=1)
    """Steps between two logged losses."""
    validate_every: int = limited(500, low=1)
    """Steps between two validations."""
    validation_rows: int = limited(256, low=1)
    """Rows of the validation split that are scored each time."""
    samples: int = limited(0, low=0)
    """Texts that the network writes at each validation, for people to read: by the preset's sampling, from nothing or, in
    fine-tuning, behind prompts of the validation split."""
    checkpoint_every: int = limited(500, low=1)
    """Steps between two resumable checkpoints."""
    max_bad_steps: int = limited(5, low=1)
    """A step whose loss or gradient is no finite number is skipped; after so many in a row, or where the run would end in
    weights without a finite bound, it goes back to its last checkpoint, and if that does not help to an earlier one."""
    max_rollbacks: int = limited(3, low=0)
    """So often; then it ends."""
    rollback_lr_scale: float = limited(0.5, above=0, high=1)
    """What the learning rates are multiplied with each time (LLaDA-8B went on at a quarter); checkpoints keep the product."""
    keep_checkpoints: int = limited(2, low=1)
    """The newest ones; older ones are deleted."""
    keep_every: int | None = limited(None, low=1)
    """Beside those, one checkpoint in each so many steps is kept for good; None: none."""
    ema_decay: float | None = limited(None, above=0, below=1)
    """Keep an exponential moving average of the weights with this decay (MDLM: 0.9999): it is validated and becomes the
    checkpoint folder's weights. None: the weights themselves. A run may go on with another one."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trained weights that the output folder holds. (Checkpoints are float32.)"""
    activation_checkpointing: Recomputed = "none"
    """What of each block is computed again in the backward pass instead of being kept: less memory, more time. "selective"
    keeps the attention and every other matrix product, "full" keeps nothing."""
    compile: bool = False
    """Each block through torch.compile."""
    float8: bool = False
    """The blocks' matrix products in float8 through torchao (the extra `float8`): faster on H100s and later GPUs, and coarser."""
    shard_workers: int | None = limited(None, low=1)
    """Workers that share one copy of weights and optimizer state, a divisor of their number; None: all. With the GPUs of one
    node only gradients, once a step, go from node to node (HSDP). Changes memory and speed only. Where the number of workers
    changes to one that it does not divide, all share."""

    def __post_init__(self) -> None:
        check_limits(self, "train")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a training run learns, and nothing about where it runs."""

    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()

    def __post_init__(self) -> None:
        require(
            self.lora.rank is None or not self.train.float8,
            "train.float8 and lora.rank do not go together: torchao would replace the layers with adapters; leave one out",
        )


def open_splits(data: str, model: ModelConfig, config: RunConfig) -> tuple[TokenDataset, TokenDataset]:
    """The training and the validation split of a prepared folder.

    Raises UserError, before anything is built, for a network that cannot learn from this data; warns of a schedule that
    does not fit the length of the run.
    """
    dataset = TokenDataset(data, "train")
    info, where = dataset.info, dataset.url
    require(
        info.vocab_size <= model.vocab_size,
        f"{where} was tokenised with {info.vocab_size} ids, the model has {model.vocab_size} rows: "
        "prepare the data with the model's tokenizer, or set model.vocab_size",
    )
    require(
        model.mask_token_id is not None or config.objective.kind == "autoregressive",
        "the model has no mask_token_id, which masked diffusion needs: set model.mask_token_id",
    )
    require(
        model.mask_token_id is None or info.mask_token_id == model.mask_token_id,
        f"{where} has mask id {info.mask_token_id}, the model {model.mask_token_id}: "
        "they must be of one tokenizer",
    )
    require(
        dataset.row_length <= model.max_length,
        f"{where} has rows of {dataset.row_length} tokens, the model takes {model.max_length}: "
        "prepare shorter rows or raise model.max_length",
    )
    require(
        (config.objective.kind == "autoregressive") == model.causal,
        f"objective.kind {config.objective.kind} and model.causal={model.causal} do not go together",
    )
    require(
        not (model.causal and model.shift),
        "model.shift is for what is learned by masks: an autoregressive network reads the position before without it",
    )
    require(
        (config.objective.kind == "block_diffusion") == (model.block_length is not None),
        f"objective.kind {config.objective.kind} and model.block_length={model.block_length} do not go together: a "
        "block-causal network learns by block_diffusion, and no other does",
    )
    require(
        config.train.samples == 0 or not model.causal,
        f"train.samples {config.train.samples}: an autoregressive network does not write by unmasking: leave it out",
    )
    require(
        config.train.global_batch_tokens % dataset.row_length == 0,
        f"train.global_batch_tokens {config.train.global_batch_tokens} is not a multiple of the rows' length "
        f"{dataset.row_length}",
    )
    if config.lora.rank is not None:
        adapted_linears(config.lora, model)
    require(len(dataset) > 0, f"{where} has no training rows")
    global_rows = config.train.global_batch_tokens // dataset.row_length
    require(
        len(dataset) >= global_rows,
        f"{where} has {len(dataset):,} training rows, fewer than the {global_rows:,} of one global batch: set "
        f"train.global_batch_tokens to {len(dataset) * dataset.row_length} or less, or prepare more data",
    )
    held_out = TokenDataset(data, "validation")
    require(
        len(held_out) > 0,
        f"{where} has no validation rows: prepare it with a larger validation_fraction",
    )
    if world()[0] == 0:
        for fault in schedule_faults(run_length(config, dataset), config.optim):
            log.warning("%s", fault)
    return dataset, held_out


def run_length(config: RunConfig, dataset: TokenDataset) -> int:
    """Optimizer steps of the whole run."""
    global_rows = config.train.global_batch_tokens // dataset.row_length
    return config.train.num_steps or max(1, round(config.train.num_epochs * len(dataset) / global_rows))


# Settings of training and optimizer that no run may go on with changed. Of those of the other groups none may.
IDENTITY_SETTINGS = ("optim.optimizer", "train.seed", "train.global_batch_tokens")


def run_identity(
    model: ModelConfig,
    config: RunConfig,
    dataset: TokenDataset,
    initial_state: Mapping[str, Rows] | None = None,
) -> dict[str, Any]:
    """What must not change when a run goes on: the network, the data, the noise and the batch. Learning rates may. Of
    adapters also what they are put onto (`initial_state`, see `train`)."""
    identity = {
        "model": model.content(),
        "objective": _jsonable(config.objective.content()),
        "optimizer": config.optim.optimizer,
        "seed": config.train.seed,
        "global_batch_tokens": config.train.global_batch_tokens,
        "data": dataset.fingerprint,
    }
    if config.lora.rank is not None:
        require(
            initial_state is not None, "lora: adapters need a trained network to be put onto: name a model"
        )
        assert initial_state is not None
        identity["lora"] = {**config.lora.content(), "base": weights_id(initial_state)}
    return identity


def weights_id(state: Mapping[str, Rows]) -> str:
    """16 hex digits that change with any matrix that training has moved: of the names and the first rows."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name][:1].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _jsonable(value: Any) -> Any:
    """Tuples become lists, as they do in JSON, so that stored and fresh values compare equal."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, list | tuple) else value
