"""The command `convert`: layouts of others, of checkpoints (LLaDA's, iLLaDA's, Llama's, Qwen's) and of token data (Megatron's
.idx/.bin)."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from llada.data.tokens.manifest import (
    DatasetEntry,
    SplitEntry,
    load_dataset_entry,
    resolve_snapshot,
    write_index,
)
from llada.data.tokens.megatron import export_megatron, import_megatron_shards
from llada.data.tokens.packing import Packing
from llada.data.tokens.shards import write_unigram_counts
from llada.errors import UserError
from llada.files import exists, file_sizes, join, local_path, read_bytes
from llada.model.hf import Layout, convert, read_config
from llada.model.peft import load_adapter
from llada.settings import require
from llada.tokenizer import (
    declare_mask,
    ensure_special_tokens,
    has_tokenizer,
    load_tokenizer,
    save_tokenizer,
    vocab_size,
)
from pipelines.stage.artifact import fetch_folder, find_manifest, open_output, put_folder
from pipelines.stage.command import parse, run_command
from pipelines.stage.delivery import model_folder
from pipelines.stage.tracking import default_tracking_uri


@dataclass(frozen=True)
class ConvertArgs:
    """Rewrite a checkpoint folder in another layout, bit for bit, or with an adapter merged into its weights; or token data
    from and to Megatron's .idx/.bin."""

    source: tyro.conf.Positional[str]
    """A checkpoint folder or models:/…, a prepared folder, or PREFIX.idx of Megatron data."""
    target: tyro.conf.Positional[str]
    """A folder; of Megatron data a prefix, completed by -train.idx and so on."""
    layout: Layout | None = None
    """Of the target: ours, llada (GSAI-ML/LLaDA), llama (standard names). Default: the other one; with --merge the source's."""
    mask_token_id: int | None = None
    """Makes an autoregressive checkpoint bidirectional, with this row as the mask: one that no token of the tokenizer has, or
    the first behind the vocabulary, which grows; its tokenizer gets the token."""
    mask_noise: float | None = None
    """How far the mask's row is drawn from the mean of all rows, in their spread (1)."""
    shift: bool = False
    """With a mask: a position is still predicted from the one before it, as the autoregressive network did (DiffuLLaMA)."""
    merge: str | None = None
    """A folder of the peft library with a LoRA adapter of the source, which is merged into the weights."""
    tokenizer: str | None = None
    """Folder of the tokenizer that made the Megatron data."""
    row_length: int | None = None
    """Tokens per row to pack Megatron data into."""
    packing: Packing = "concatenate_and_cut"
    tracking_uri: str | None = None
    """MLflow of models:/…; default $MLFLOW_TRACKING_URI, else an sqlite file beside the target."""


def main(argv: Sequence[str]) -> None:
    """`llada convert SOURCE TARGET …`"""
    args = parse(ConvertArgs, argv, "convert")
    source = model_folder(args.source, args.tracking_uri or default_tracking_uri(args.target))
    if is_tokens(source):
        require(args.merge is None, f"--merge is for checkpoints, and {source} is token data: leave it out")
        print(
            convert_tokens(
                source,
                args.target,
                tokenizer=args.tokenizer,
                row_length=args.row_length,
                packing=args.packing,
            )
        )
    else:
        print(
            convert_checkpoint(
                source,
                args.target,
                layout=args.layout,
                mask_token_id=args.mask_token_id,
                mask_noise=args.mask_noise,
                shift=args.shift,
                merge=args.merge,
            )
        )


def convert_checkpoint(
    source: str,
    target: str,
    *,
    layout: Layout | None,
    mask_token_id: int | None,
    mask_noise: float | None = None,
    shift: bool = False,
    merge: str | None = None,
) -> str:
    """Rewrite a checkpoint folder in another layout, bit for bit, or with the adapter folder `merge` merged into its
    weights, in its own; a line that says what was written."""
    local = local_path(target)
    if file_sizes(target):
        raise UserError(f"{target} is not empty; choose another target")
    require(
        (mask_noise is None and not shift) or mask_token_id is not None,
        "mask_noise and shift are for a checkpoint that gets a mask: give --mask-token-id",
    )
    origin = fetch_folder(source)
    tokenizer = None
    if mask_token_id is not None and has_tokenizer(origin):
        tokenizer = declare_mask(load_tokenizer(origin), mask_token_id)
    adapters = None
    if merge is not None:
        network, own_layout = read_config(origin)
        adapters, layout = load_adapter(fetch_folder(merge), network, own_layout), layout or own_layout
    with tempfile.TemporaryDirectory() as folder:
        config = convert(
            origin,
            local or folder,
            layout=layout,
            mask_token_id=mask_token_id,
            mask_noise=1.0 if mask_noise is None else mask_noise,
            shift=shift,
            adapters=adapters,
        )
        if tokenizer is not None:
            save_tokenizer(tokenizer, local or folder)
        if not local:
            put_folder(folder, target)
    return f"{target}: {config.num_parameters:,} parameters"


def is_tokens(source: str) -> bool:
    """Whether `source` is a prepared folder or a Megatron index."""
    if source.endswith(".idx"):
        return True
    manifest = find_manifest(source)
    return manifest is not None and manifest["kind"] == "tokens"


def convert_tokens(
    source: str, target: str, *, tokenizer: str | None, row_length: int | None, packing: Packing
) -> str:
    """A prepared folder to `target`-train.idx/.bin and `target`-validation.idx/.bin, or an .idx to a prepared folder."""
    if not source.endswith(".idx"):
        lines = []
        snapshot = resolve_snapshot(source)
        for split, entry in load_dataset_entry(snapshot).splits.items():
            if entry.rows:
                totals = export_megatron(snapshot, split, f"{target}-{split}")
                lines.append(
                    f"{target}-{split}.idx: {totals['documents']:,} documents, {totals['tokens']:,} tokens"
                )
        return "\n".join(lines)
    if tokenizer is None or row_length is None:
        raise UserError("reading Megatron data needs --tokenizer, the one that made it, and --row-length")
    if not exists(source):
        raise UserError(f"no file at {source}")
    return _import(source, target, tokenizer, row_length, packing)


def _import(source: str, target: str, tokenizer_url: str, row_length: int, packing: Packing) -> str:
    """All documents go to the training split: a Megatron index is one split."""
    index_hash = hashlib.sha256(read_bytes(source)).hexdigest()[:16]
    config = {"row_length": row_length, "packing": packing}
    folder = open_output(target, stage="convert", config=config, inputs=[{"url": source, "id": index_hash}])
    if folder.manifest is None:
        tokenizer = ensure_special_tokens(load_tokenizer(fetch_folder(tokenizer_url)))
        size = vocab_size(tokenizer)
        with tempfile.TemporaryDirectory() as local:
            save_tokenizer(tokenizer, local)
            put_folder(local, join(target, "tokenizer"))
            digest = hashlib.sha256(
                b"".join(p.read_bytes() for p in sorted(Path(local).iterdir()))
            ).hexdigest()
        shards, counts = import_megatron_shards(
            source.removesuffix(".idx"),
            target,
            split="train",
            row_length=row_length,
            vocab_size=size,
            eos_id=tokenizer.eos_token_id,
            packing=packing,
        )
        if not shards:
            raise UserError(f"{source} holds no tokens")
        files = {"train.parquet": write_index(join(target, "train.parquet"), shards)}
        files["validation.parquet"] = write_index(join(target, "validation.parquet"), [])
        write_unigram_counts(target, counts)
        rows, tokens = sum(shard.rows for shard in shards), sum(shard.tokens for shard in shards)
        dataset = DatasetEntry.of(
            tokenizer,
            kind="pretrain",
            row_length=row_length,
            packing=packing,
            tokenizer_hash=digest[:16],
            splits={
                "train": SplitEntry(rows=rows, tokens=tokens, indexes=("train.parquet",)),
                "validation": SplitEntry(indexes=("validation.parquet",)),
            },
        )
        totals = {"rows": rows, "tokens": tokens}
        folder.finish(totals, kind="tokens", files=files, dataset=dataset.to_json())
    assert folder.manifest is not None
    counted = folder.manifest["counts"]
    return f"{target}: {counted['tokens']:,} tokens in {counted['rows']:,} rows"


if __name__ == "__main__":
    run_command("convert")
