"""A judge: an autoregressive network with its tokenizer, that tells how likely a text is, and what it makes of it.

A checkpoint of ours that is causal (a twin), or any causal language model's folder of transformers, in safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.evals.autoregressive.likelihood import next_token_nats
from llada.model.hf import load_model
from llada.model.hf_config import OUR_MODEL_TYPE, MissingCheckpointError, read_config, read_object
from llada.model.predict import Model, device_of
from llada.model.transformer import Transformer
from llada.settings import check_limits, limited
from llada.tokenizer import encode_texts, load_tokenizer


@dataclass(frozen=True)
class GenerativeConfig:
    """Texts that the checkpoint writes from nothing, before a judge (the task "generative_perplexity")."""

    judge: str | None = None
    """Folder of an autoregressive checkpoint with its tokenizer (MDLM: GPT-2 large)."""
    num_texts: int = limited(64, low=2)
    """Written, with the settings of `sampling`."""
    texts_per_forward: int = limited(8, low=1)
    context: int = limited(1024, low=2)
    """Tokens that the judge reads at a time; a longer text is judged in pieces, each without what stands before it."""
    reference: str | None = None
    """Texts that people wrote (.txt or JSON lines): MAUVE tells how near the checkpoint's are, where mauve-text is installed."""

    def __post_init__(self) -> None:
        check_limits(self, "generative")


class Verdict(NamedTuple):
    """Of one text."""

    nats: float
    """−log p, summed over its scored tokens."""
    tokens: int


@dataclass(frozen=True)
class Judge:
    """An autoregressive network that reads a text's ids (`encode_documents`)."""

    network: Any
    """A causal `Transformer`, or a model of transformers."""
    eos_id: int
    context: int
    """Tokens that it takes at a time."""

    def verdict(self, ids: Sequence[int]) -> Verdict:
        """The likelihood of a text's ids, in pieces of `context`, the first token of each for nothing.

        As in MDLM's code (`compute_generative_perplexity`), of the ends of text in a piece the first alone is scored.
        """
        nats, tokens = 0.0, 0
        for at in range(0, len(ids), self.context):
            piece = torch.tensor([ids[at : at + self.context]], device=device_of(self.network))
            is_end = piece == self.eos_id
            scored = ~is_end | (is_end.cumsum(1) == 1)
            scored[:, 0] = False
            nats += float(next_token_nats(self._model, piece, scored).sum())
            tokens += int(scored.sum())
        return Verdict(nats, tokens)

    @torch.no_grad()
    def features(self, ids: Sequence[int]) -> list[float]:
        """What the last layer holds at the last of the first `context` tokens, (D,): MAUVE's features of a text."""
        piece = torch.tensor([ids[: self.context]], device=device_of(self.network))
        if isinstance(self.network, Transformer):
            last = torch.tensor([piece.shape[1] - 1], device=piece.device)
            found = self.network(piece, logits_at=last, read_out=lambda x, _weight: x)[0]
        else:
            found = self.network(piece, output_hidden_states=True).hidden_states[-1][0, -1]
        return [float(value) for value in found]

    @property
    def _model(self) -> Model:
        if isinstance(self.network, Transformer):
            return self.network
        return lambda tokens: self.network(tokens).logits


def judge_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a judge's local folder, whose weights are not looked at.

    Raises UserError: no checkpoint, one of ours that is not autoregressive, no tokenizer, or one without an end of text.
    """
    if not (Path(folder) / "config.json").is_file():
        raise MissingCheckpointError(f"the judge {folder} is no checkpoint: it has no config.json")
    config = read_object(Path(folder) / "config.json")
    if config.get("model_type") == OUR_MODEL_TYPE and not read_config(folder)[0].causal:
        raise UserError(
            f"the judge {folder} is not autoregressive, and has no exact likelihood: name one that is"
        )
    eos_id = config.get("eos_token_id")
    try:
        tokenizer = load_tokenizer(folder, eos_token_id=eos_id if isinstance(eos_id, int) else None)
    except UserError as error:
        raise UserError(f"the judge has no tokenizer that can be read: {error}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the judge {folder} declares no end of text (eos_token)")
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> list[int]:
    """A text's ids with this tokenizer: its documents with the end of text between them, or that alone where there is nothing. What a
    document spells is text, never a special token."""
    ids: list[int] = []
    for number, document in enumerate(encode_texts(tokenizer, list(documents))):
        ids += [tokenizer.eos_token_id] * (number > 0) + document
    return ids or [tokenizer.eos_token_id]


def open_judge(folder: str | Path, context: int) -> Judge:
    """The judge in a local folder, on this process' GPU if it has one, reading at most `context` tokens at a time.

    Raises UserError as `judge_tokenizer` does, and for weights that are no causal language model in safetensors.
    """
    tokenizer = judge_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if read_object(Path(folder) / "config.json").get("model_type") == OUR_MODEL_TYPE:
        network = load_model(folder, device=device)
        return Judge(network, tokenizer.eos_token_id, min(context, network.config.max_length))
    model = _load_causal_lm(folder).to(device).eval()
    longest = getattr(model.config, "max_position_embeddings", None) or context
    return Judge(model, tokenizer.eos_token_id, min(context, longest))


def _load_causal_lm(folder: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        # Safetensors alone: what is unpickled can run code.
        return AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"the judge {folder} cannot be read as a causal language model of transformers: {' '.join(str(error).split())[:300]}"
        ) from error
