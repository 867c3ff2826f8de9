"""What a step holds in the memory of one worker, counted tensor by tensor: for `llada plan`, and for the message of a run that
has no more of it.

A step is fullest at one of a few moments, and at which depends on the shape. What blocks keep for the backward pass is what
autograd saves of `Block.forward` as it is written; torch.compile fuses some of it away, so that less is needed than is counted
(up to an eighth on a CPU), and float8 is counted as the dtype that it multiplies in place of. tests/benchmarks/plan_memory.py
compares the count with measured peaks: of one worker and of two, of all weights and of adapters.

Shape legend: T tokens of a micro-batch (rows × length), N predicted positions among them, D model width, F of the SwiGLU, V
vocabulary rows, c bytes of a number in the compute dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from llada.data.tokens.manifest import load_dataset_entry
from llada.diffusion.cross_entropy import SLICE
from llada.errors import UserError
from llada.model.lora import TARGETS, LoraConfig, Target, num_adapter_parameters
from llada.model.transformer import ModelConfig
from llada.training.batches import PREFETCHED, cut_evenly
from llada.training.parallel import copy_size, resolve_precision, training_device, world
from llada.training.run import RunConfig, TrainConfig

GIB = 1024**3
_FP32 = 4

Moment = Literal["head", "last block", "block before", "first block", "embedding", "optimizer", "validation"]


class OutOfMemoryError(UserError, MemoryError):
    """A worker has no memory left; the message names the settings that lower its need most."""


@dataclass(frozen=True)
class Worker:
    """One of the workers of a run, as far as its memory depends on it."""

    num_workers: int = 1
    """Of the run."""
    dtype: torch.dtype = torch.bfloat16
    """Of the forward pass."""
    device: Literal["cpu", "cuda"] = "cuda"


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one worker at a moment of its step."""

    moment: Moment
    """The loss, the backward pass of the last block, of the one before, of the first, of the embedding; the optimizer's step; a
    validation."""
    weights: float
    """Its shard of the float32 masters."""
    optimizer: float
    """Its shard of the moments, and of the weights' average."""
    gradients: float
    """Its shard, float32."""
    copies: float
    """Weights in the compute dtype: gathered from all workers, or cast."""
    activations: float
    """What the blocks keep for the backward pass."""
    workspace: float
    """What is gone after the moment: a slice of logits, gradients on their way."""

    @property
    def state(self) -> float:
        """What does not depend on the micro-batch."""
        return self.weights + self.optimizer + self.gradients + self.copies

    @property
    def total(self) -> float:
        return self.state + self.activations + self.workspace


def micro_batches(train: TrainConfig, row_length: int, num_workers: int) -> tuple[int, int]:
    """(number, rows of the largest) of the micro-batches that each worker runs in a step."""
    global_rows = train.global_batch_tokens // row_length
    sizes = cut_evenly(-(-global_rows // num_workers), train.micro_batch_rows)
    return len(sizes), sizes[0]


def step_memory(
    model: ModelConfig, run: RunConfig, worker: Worker, *, row_length: int, predicted: float = 1.0
) -> list[StepMemory]:
    """Each moment of a step, the fullest first.

    Args:
        predicted: N / T of the fullest micro-batch. One row's noise level can mask nearly all of it.
    """
    number, rows = micro_batches(run.train, row_length, worker.num_workers)
    D, F, V, c = model.d_model, model.ffn_dim, model.vocab_size, worker.dtype.itemsize
    T = rows * row_length
    fed = T if model.block_length is None else 2 * T  # block diffusion runs a row noised and clean
    N = predicted * T  # at the most
    cast = 0 if c == _FP32 else c  # bytes of a copy in the compute dtype, where it is another
    is_sharded = worker.num_workers > 1
    sharing = copy_size(worker.num_workers, run.train.shard_workers)
    table, layer = V * D, (model.num_non_embedding_parameters - D) / model.num_layers
    # Numbers that are trained: of a table, of a block, of the largest matrix in it. Adapters stand beside frozen ones.
    trains_all = run.lora.rank is None
    own_table, own_layer, own_matrix = float(table), layer, float(D * F)
    adapters = 0.0
    if run.lora.rank is not None:
        adapters = own_layer = num_adapter_parameters(run.lora, model) / model.num_layers
        own_table, own_matrix = 0.0, float(run.lora.rank * max(D, F))

    trained = _FP32 * _num_trained(model, run) / sharing
    frozen = 0.0 if trains_all else c * model.num_parameters / sharing
    weights, optimizer = trained + frozen, _optimizer_bytes(model, run) / sharing
    # Weights in the compute dtype at the head and at a block, and a message that is kept from the micro-batch before.
    if is_sharded:
        # A group is gathered into a message and copied out of it; the message lies there until the next one has come. The head
        # stays whole between micro-batches, and where it is the embedding, always.
        whole_layer, is_alone = layer + adapters, number == 1 and not model.tie_embeddings
        copies = c * (table + (table if is_alone else whole_layer))
        own_copies = c * (2 * whole_layer + table * (model.tie_embeddings or number > 2))
        in_blocks = own_copies
        unsent = _FP32 * (own_table or adapters) * (number > 1)
    else:  # autocast casts what is multiplied and of another type, and the graph keeps it
        copies, own_copies, unsent = model.num_layers * own_layer * cast, own_layer * cast, 0.0
        in_blocks = copies if run.train.activation_checkpointing == "none" else own_copies

    seen = _mask_numbers(model, run, worker, rows, row_length)
    # With the mask as numbers that are added to the scores.
    whole = _block_bytes(model, run.lora, fed, c) + seen * c
    recomputed = run.train.activation_checkpointing
    kept = whole
    if recomputed != "none":
        kept = _kept_bytes(model, run.lora, recomputed == "selective", fed, c)
    # Behind its attention the last block has the predicted positions only.
    asked = fed if model.shift else N
    whole_last = _block_bytes(model, run.lora, fed, c, asked) + seen * c
    kept_last = whole_last if recomputed == "none" else kept

    # What the last norm keeps; a slice of logits in float32, then its error; the gradients of the head and of what goes into it.
    logits = min(N, max(1, SLICE[worker.device] // V)) * V
    normed = T if model.shift else N
    head = normed * D * (_FP32 + c * trains_all) + logits * (_FP32 + cast) + 2 * N * D * c
    head += own_table * (_FP32 + cast) + unsent
    if not is_sharded:
        head += own_table * cast  # its weight
    if worker.device == "cpu" and cast:
        head += own_table * _FP32  # the kernel that adds numbers of two kinds

    # The same without gradients: a slice of logits, in float32 and normalised; or what a block has at a time: its stream before
    # and behind the attention, that normed, all of the heads and three tensors of the SwiGLU.
    scoring = 2 * N * D * c + logits * (cast + 2 * _FP32) + own_table * cast * (not is_sharded)
    of_heads = 2 * (model.num_heads + model.kv_heads) * model.head_dim
    scoring = max(scoring, fed * (3 * D + of_heads + 3 * F) * c)

    # In a block's backward pass: the gradients of its output, of two tensors of the SwiGLU and of its matrix. What lies behind
    # the block is on its way to the workers meanwhile, in float32.
    sent = _FP32 * is_sharded
    of_matrix = own_matrix * (c if is_sharded else _FP32 * (number == 1))
    block: float = fed * (D + 2 * F) * c + of_matrix
    # The last block's: of the predicted positions; then of all, zeros for the most part, in its stream and of what its heads saw.
    last = max(asked * (D + 2 * F) * c + of_matrix, fed * (D + model.num_heads * model.head_dim) * c)
    # A head that is the embedding has its gradient wait for the other one.
    waiting = own_table * (c if is_sharded else _FP32) if model.tie_embeddings else 0.0
    sent_head = 0.0 if model.tie_embeddings else own_table * sent

    # The gradients of earlier micro-batches are there already; the only one's come into being from the last block to the first.
    at_last = at_first = trained
    if number == 1:
        at_last = 0.0 if model.tie_embeddings else _FP32 * own_table / sharing
        at_first = trained - _FP32 * (own_table + own_layer) / sharing
    embedding: float = fed * D * c * trains_all
    if is_sharded:
        embedding += own_table * (c + _FP32) + waiting
    elif number > 1 or model.tie_embeddings:
        embedding += own_table * _FP32 + waiting * (number > 1)
    updates = 0.0
    if run.optim.optimizer == "muon":  # of all matrices, before and behind their orthogonalisation
        updates = 2 * _FP32 * model.num_layers * own_layer / sharing
    if run.optim.moments == "bf16":  # the largest parameter's, in float32
        updates = max(updates, 6 * _FP32 * (own_table or own_matrix) / sharing)

    def at(
        moment: Moment, gradients: float, copies: float, activations: float, workspace: float
    ) -> StepMemory:
        return StepMemory(moment, weights, optimizer, gradients, copies, activations + seen, workspace)

    return sorted(
        [
            at("head", trained * (number > 1), copies, (model.num_layers - 1) * kept + kept_last, head),
            at(
                "last block",
                at_last,
                in_blocks,
                (model.num_layers - 1) * kept + whole_last,
                last + waiting + sent_head,
            ),
            at(
                "block before",
                at_last + _FP32 * own_layer / sharing * (number == 1),
                in_blocks,
                max(model.num_layers - 2, 0) * kept + whole,
                block + waiting + own_layer * sent,
            ),
            at("first block", at_first, own_copies, whole, block + waiting + own_layer * sent),
            at("embedding", trained, own_copies if is_sharded else 0.0, 0.0, embedding),
            at("optimizer", trained, 0.0, 0.0, updates),
            at("validation", 0.0, copies, 0.0, scoring),
        ],
        key=lambda memory: -memory.total,
    )


def _mask_numbers(model: ModelConfig, run: RunConfig, worker: Worker, rows: int, length: int) -> int:
    """Of the dense mask on a CPU; on CUDA FlexAttention has tiles."""
    if worker.device == "cuda" or not (run.objective.document_mask or model.block_length is not None):
        return 0
    columns = length if model.block_length is None else 2 * length
    return (rows if run.objective.document_mask else 1) * columns**2


def _block_bytes(model: ModelConfig, lora: LoraConfig, fed: int, c: int, asked: float | None = None) -> float:
    """All that a block keeps of so many tokens: of each norm its input in float32, what it normed and its result; queries,
    keys, values, what the heads saw and a number a head; four tensors of the SwiGLU. The last block has a copy of what its
    heads saw at the positions that are `asked` for, and its second half of these alone.

    A frozen matrix asks for nothing of what it multiplies, nor a frozen norm of what it normed; an adapter asks for what goes
    into it and for what stands between its two matrices.
    """
    q, kv = model.num_heads * model.head_dim, model.kv_heads * model.head_dim
    learns = dict.fromkeys(TARGETS, True)
    rank = 0
    if lora.rank is not None:
        learns, rank = {name: name in lora.targets for name in TARGETS}, lora.rank

    def norm(*readers: Target) -> float:
        return model.d_model * (_FP32 + c * (rank == 0) + c * any(learns[name] for name in readers))

    def between(*names: Target) -> float:
        return rank * c * sum(learns[name] for name in names)

    of_heads = (q + kv) * (_FP32 + c * (rank == 0)) * model.qk_norm
    first = norm("q_proj", "k_proj", "v_proj") + between("q_proj", "k_proj", "v_proj") + of_heads
    first += 2 * (q + kv) * c + _FP32 * model.num_heads
    second = norm("gate_proj", "up_proj") + between("o_proj", "gate_proj", "up_proj", "down_proj")
    second += (3 + learns["down_proj"]) * model.ffn_dim * c
    if asked is None:
        return fed * (first + second)
    return fed * first + asked * (second + q * c * learns["o_proj"])


def _kept_bytes(model: ModelConfig, lora: LoraConfig, is_selective: bool, fed: int, c: int) -> float:
    """What is left of that until the backward pass: the block's input, and with selective recomputation the attention's result
    and that of every other product."""
    if not is_selective:
        return fed * model.d_model * c
    q, kv = model.num_heads * model.head_dim, model.kv_heads * model.head_dim
    widths = (q, kv, kv, model.d_model, model.ffn_dim, model.ffn_dim, model.d_model)
    products: list[int] = []
    for name, width in zip(TARGETS, widths, strict=True):  # in the order of the forward pass
        is_adapted = lora.rank is not None and name in lora.targets
        products += [width, lora.rank or 0, width] if is_adapted else [width]
    return fed * ((model.d_model + q + sum(products[::2])) * c + _FP32 * model.num_heads)


def host_memory(
    model: ModelConfig, run: RunConfig, worker: Worker, *, row_length: int
) -> tuple[float, float]:
    """Bytes of a worker's host: (the batches that are made ahead of time, a copy of its part of a checkpoint)."""
    number, rows = micro_batches(run.train, row_length, worker.num_workers)
    tokens = number * rows * row_length
    of_token = 8 + 4 * run.objective.document_mask + 8 * (model.block_length is not None)
    of_position = 8 + 8 + 8  # where, what, how much it counts
    predicted = 1.0 if run.objective.kind == "autoregressive" else 0.5
    ahead = PREFETCHED * tokens * (of_token + predicted * of_position)
    return ahead, checkpoint_bytes(model, run) / copy_size(worker.num_workers, run.train.shard_workers)


def checkpoint_bytes(model: ModelConfig, run: RunConfig) -> float:
    """Of a resumable checkpoint in its store: weights and optimizer state as they are trained."""
    return _FP32 * _num_trained(model, run) + _optimizer_bytes(model, run)


def _num_trained(model: ModelConfig, run: RunConfig) -> int:
    return model.num_parameters if run.lora.rank is None else num_adapter_parameters(run.lora, model)


def _optimizer_bytes(model: ModelConfig, run: RunConfig) -> float:
    """AdamW's two moments, or Muon's one of the blocks' matrices; the average of the weights."""
    trained, matrices = _num_trained(model, run), 0
    if run.optim.optimizer == "muon":
        matrices = model.num_non_embedding_parameters - model.d_model if run.lora.rank is None else trained
    of_adamw = 2 * (torch.bfloat16.itemsize if run.optim.moments == "bf16" else _FP32)
    average = _FP32 * trained * (run.train.ema_decay is not None)
    return of_adamw * (trained - matrices) + _FP32 * matrices + average


def remedies(
    model: ModelConfig, run: RunConfig, worker: Worker, *, row_length: int
) -> list[tuple[str, float]]:
    """(what to change, bytes that it saves) of the settings that change nothing of what is learned, the best first."""
    train = run.train
    _, rows = micro_batches(train, row_length, worker.num_workers)
    changes: list[tuple[str, TrainConfig, Worker]] = []

    def change(name: str, old: object, new: object, worker: Worker = worker) -> None:
        setting: dict[str, Any] = {name: new}
        changes.append((f"train.{name} {old} → {new}", replace(train, **setting), worker))

    if rows > 1:
        change("micro_batch_rows", train.micro_batch_rows, rows // 2)
    for name in ("selective", "full"):
        if train.activation_checkpointing not in (name, "full"):
            change("activation_checkpointing", train.activation_checkpointing, name)
    if worker.dtype == torch.float32 and worker.device == "cuda":
        change("precision", train.precision, "bf16", replace(worker, dtype=torch.bfloat16))
    if copy_size(worker.num_workers, train.shard_workers) < worker.num_workers:
        change("shard_workers", train.shard_workers, worker.num_workers)
    doubled = replace(worker, num_workers=2 * worker.num_workers)
    changes.append((f"workers {worker.num_workers} → {doubled.num_workers}", train, doubled))

    def need(train: TrainConfig, worker: Worker) -> float:
        return step_memory(model, replace(run, train=train), worker, row_length=row_length)[0].total

    saved = [(text, need(train, worker) - need(new, place)) for text, new, place in changes]
    return sorted((pair for pair in saved if pair[1] > 0), key=lambda pair: -pair[1])


def out_of_memory_message(model: ModelConfig, run: RunConfig, worker: Worker, *, row_length: int) -> str:
    """One line: what a step needs, and the three settings that lower it most."""
    memory = step_memory(model, run, worker, row_length=row_length)[0]
    best = [
        f"{text}: −{_size(saved)}" for text, saved in remedies(model, run, worker, row_length=row_length)[:3]
    ]
    return (
        f"out of memory: a worker needs about {_size(memory.total)} ({_size(memory.state)} of weights, gradients and moments, "
        f"{_size(memory.activations + memory.workspace)} for {micro_batches(run.train, row_length, worker.num_workers)[1]} rows "
        f"of {row_length}); what lowers it most: {'; '.join(best)}"
    )


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 1024**2:.1f} MiB"


@contextlib.contextmanager
def explaining_out_of_memory(model: ModelConfig, run: RunConfig, data: str) -> Iterator[None]:
    """A worker that has no memory left says which settings need less. Raises OutOfMemoryError."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        device = training_device()
        worker = Worker(
            num_workers=world()[1],
            dtype=resolve_precision(run.train.precision, device),
            device="cuda" if device.type == "cuda" else "cpu",
        )
        row_length = load_dataset_entry(data).row_length
        raise OutOfMemoryError(out_of_memory_message(model, run, worker, row_length=row_length)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or a host, has no memory left. torch's allocator for CPUs only says so."""
    if isinstance(error, UserError):
        return False
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in str(error).lower()
    )
