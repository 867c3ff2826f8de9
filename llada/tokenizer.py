"""Tokenizers: functions around Hugging Face's `PreTrainedTokenizerFast` (no wrapper class).

They train a byte-level BPE, load and save a folder, turn plain text into ids and render a conversation.
Two rules hold everywhere:
* text is only text: a document or a chat message that spells `<|mdm_mask|>` gives ordinary tokens, never the mask id;
* a tokenizer that comes out of here declares its mask, eos and pad token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError

END_OF_TEXT = "<|endoftext|>"  # ends a document; also the padding token
MASK = "<|mdm_mask|>"
START_OF_TEXT = "<|startoftext|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
END_OF_TURN = "<|eot_id|>"
# Ids 0..5 of a tokenizer trained here.
SPECIAL_TOKENS = (
    END_OF_TEXT,
    MASK,
    START_OF_TEXT,
    START_HEADER,
    END_HEADER,
    END_OF_TURN,
)
_ROLES = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "mask_token": MASK, "bos_token": START_OF_TEXT}

# LLaDA's template, except that the open assistant header is appended only on request (LLaDA's always appends it).
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# The tokenizers library needs about 100 bytes of memory per character, so long texts are encoded in pieces. A cut
# between a lone newline and a following word is one that the byte-level pre-tokenizer makes anyway.
_PIECE_CHARS = 1_000_000
_PLACEHOLDER = "\ue000([0-9]+)\ue001"  # private-use characters
_SAFE_CUT = re.compile(r"(?<=\S\n)(?=\S)")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` entries, the six special tokens first. Same texts, same tokenizer.

    Raises UserError when `vocab_size` cannot hold the special tokens and the 256 bytes.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise UserError(f"a byte-level vocabulary needs at least {smallest} entries, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    trained = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **_ROLES
    )
    trained.chat_template = CHAT_TEMPLATE
    return trained


def has_tokenizer(path: str | Path) -> bool:
    """True when the local folder `path` holds a tokenizer.json."""
    return (Path(path) / "tokenizer.json").is_file()


def load_tokenizer(
    path: str | Path,
    *,
    mask_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedTokenizerFast:
    """The tokenizer in the local folder `path`.

    The ids fill in roles that the folder does not declare (LLaDA's official folder declares no mask token); a role
    that it does declare is kept. Raises UserError when there is none, a damaged one, or no token of an id.
    """
    if not has_tokenizer(path):
        raise UserError(f"no tokenizer.json in {path}; a tokenizer is a folder that holds one")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), clean_up_tokenization_spaces=False)
    except json.JSONDecodeError as error:
        raise UserError(
            f"the tokenizer's files in {path} are damaged ({error}): copy or download them again"
        ) from None
    for role, token_id in {
        "mask_token": mask_token_id,
        "eos_token": eos_token_id,
        "pad_token": pad_token_id,
    }.items():
        if token_id is None or getattr(tokenizer, role) is not None:
            continue
        token = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < len(tokenizer) else None
        if token is None:
            raise UserError(f"{path} has no token with id {token_id}, so it cannot be the {role}")
        setattr(tokenizer, role, token)
    return tokenizer


def ensure_special_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Give `tokenizer` in place every role and chat marker that it lacks, and a chat template if it has none.

    A token that exists under LLaDA's name is declared; a missing one is added at the end of the vocabulary, so that a
    tokenizer of an autoregressive model becomes one for a diffusion model without moving an id.
    """
    vocabulary = tokenizer.get_vocab()
    missing = {role: token for role, token in _ROLES.items() if getattr(tokenizer, role) is None}
    if "pad_token" in missing and tokenizer.eos_token is not None:
        missing["pad_token"] = tokenizer.eos_token
    wanted = list(missing.values())
    if tokenizer.chat_template is None:
        wanted += [START_HEADER, END_HEADER, END_OF_TURN]
        tokenizer.chat_template = CHAT_TEMPLATE
    new = [
        AddedToken(t, special=True, normalized=False) for t in dict.fromkeys(wanted) if t not in vocabulary
    ]
    tokenizer.add_tokens(new, special_tokens=True)
    for role, token in missing.items():
        setattr(tokenizer, role, token)
    return tokenizer


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id (a vocabulary may have holes, so counting entries is not enough)."""
    return max(tokenizer.get_vocab().values()) + 1


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: str | Path) -> None:
    """Write tokenizer.json, its configuration and the chat template into the local folder `path`."""
    tokenizer.save_pretrained(str(path))


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text as plain text: no special token is added, and none is recognised inside it."""
    pieces = [list(_pieces(text)) for text in texts]
    backend = tokenizer.backend_tokenizer
    # True is "encode them as text"; transformers sets this flag on its own calls too.
    backend.encode_special_tokens = True
    encoded = iter(
        backend.encode_batch_fast([p for group in pieces for p in group], add_special_tokens=False)
    )
    return [
        next(encoded).ids if len(group) == 1 else list(chain.from_iterable(next(encoded).ids for _ in group))
        for group in pieces
    ]


def _pieces(text: str) -> Iterable[str]:
    start = 0
    while len(text) - start > 2 * _PIECE_CHARS:
        cut = _SAFE_CUT.search(text, start + _PIECE_CHARS, start + 2 * _PIECE_CHARS)
        end = cut.start() if cut else start + 2 * _PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def render_chat(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids of a conversation followed by the open assistant header: the prompt of a reply.

    `messages` are {"role", "content"} mappings. Works with a template that honours add_generation_prompt and with one
    that ignores it. Raises UserError when the tokenizer has no chat template or there is no message.
    """
    if tokenizer.chat_template is None:
        raise UserError("this tokenizer has no chat template; prepare the data with one that has")
    if not messages:
        raise UserError("a conversation needs at least one message")
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    # Longest first, so that no special token hides inside another.
    markers = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    # Special tokens that a message spells out travel as placeholders, so that they stay text.
    spelled: list[str] = []

    def hide(match: re.Match[str]) -> str:
        spelled.append(match.group())
        return f"\ue000{len(spelled) - 1}\ue001"

    def reveal(text: str) -> str:
        return re.sub(_PLACEHOLDER, lambda match: spelled[int(match.group(1))], text)

    hidden = re.compile(f"{markers}|{_PLACEHOLDER}")
    safe = [{"role": m["role"], "content": hidden.sub(hide, m["content"])} for m in messages]
    text = str(tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=True))
    ids: list[int] = []
    position = 0
    for marker in [*re.finditer(markers, text), None]:
        plain = text[position : marker.start() if marker else len(text)]
        if plain:
            ids += encode_texts(tokenizer, [reveal(plain)])[0]
        if marker:
            ids.append(special[marker.group()])
            position = marker.end()
    return ids
