"""Tokenizers: functions around Hugging Face's `PreTrainedTokenizerFast` (no wrapper class).

They train a byte-level BPE, load and save a folder, turn plain text into ids and render a conversation.
Two rules hold everywhere:
* text is only text: a document or a chat message that spells `<|mdm_mask|>` gives ordinary tokens, never the mask id;
* a tokenizer that comes out of here declares its mask, eos and pad token.
transformers is imported where one is made: who only knows of tokenizers does not need the half second that it takes.
"""

from __future__ import annotations

import json
import re
import secrets
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from llada.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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

# The fields of a message in which people and chat templates keep what the assistant thinks before it answers.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")

# The tokenizers library needs about 100 bytes of memory per character, so long texts are encoded in pieces, where a cut
# changes no id: between a lone newline and a word (byte-level tokenizers) or before a lone space (all that mark words).
_PIECE_CHARS = 1_000_000
_CUTS = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")
_CUTS_TRIED = 64
_CUT_CONTEXT = 1000  # characters on either side of a cut, by which it is judged
# A run of letters, of figures, of other signs or of white space is one word for the training, which takes time that grows
# with the square of a word's length.
_LONGEST_RUN = 1000
_LONG_RUN = re.compile(
    "|".join(rf"{each}{{{_LONGEST_RUN}}}(?={each})" for each in (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s"))
)
_NONCE = secrets.token_hex(8)  # part of names that no text spells


class TemplateRefusalError(UserError):
    """A chat template cannot render a conversation. `reason` is what it says."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the chat template refuses the conversation: {reason}")
        self.reason = reason


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` entries, the six special tokens first. Same texts, same tokenizer.

    A run of more than 1,000 letters, figures or other signs counts as several words.

    Raises UserError when `vocab_size` cannot hold the special tokens and the 256 bytes.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise UserError(f"a byte-level vocabulary needs at least {smallest} entries, not {vocab_size}")
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_short_runs(texts), trainer=trainer)
    trained = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **_ROLES
    )
    trained.chat_template = CHAT_TEMPLATE
    return trained


def _with_short_runs(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut inside runs that are too long to be a word."""
    for text in texts:
        start = 0
        for run in _LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
        yield text[start:]


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
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), clean_up_tokenization_spaces=False)
    except OSError:
        raise
    except (
        Exception
    ) as error:  # what the libraries raise over damaged files is of many types, in Rust of none
        raise UserError(
            f"the tokenizer's files in {path} are damaged ({' '.join(repr(error).split())}): copy or download them again"
        ) from error
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


def declare_mask(tokenizer: PreTrainedTokenizerFast, token_id: int) -> PreTrainedTokenizerFast:
    """Make the token of this id the mask, in place; the first id behind the vocabulary becomes LLaDA's mask token.

    Raises UserError for another mask, and for an id that no token has or can get.
    """
    declared = tokenizer.mask_token_id
    if declared is not None and declared != token_id:
        raise UserError(f"the tokenizer's mask has the id {declared}, not {token_id}")
    token = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < vocab_size(tokenizer) else None
    if token is None and token_id != vocab_size(tokenizer):
        raise UserError(
            f"the tokenizer has no token with the id {token_id}; the next that it could give the mask is {vocab_size(tokenizer)}"
        )
    if token is None:
        token = MASK
        tokenizer.add_tokens([AddedToken(MASK, special=True, normalized=False)], special_tokens=True)
    tokenizer.mask_token = token
    return tokenizer


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id (a vocabulary may have holes, so counting entries is not enough)."""
    return max(tokenizer.get_vocab().values()) + 1


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: str | Path) -> None:
    """Write tokenizer.json, its configuration and the chat template into the local folder `path`."""
    tokenizer.save_pretrained(str(path))


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text as plain text: no special token is added, and none is recognised inside it."""
    copy = _copy_for_text(tokenizer)
    pieces = [list(_pieces(text, copy)) for text in texts]
    encoded = iter(copy.encode([piece for group in pieces for piece in group]))
    return [
        next(encoded) if len(group) == 1 else list(chain.from_iterable(next(encoded) for _ in group))
        for group in pieces
    ]


def holds_words(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> bool:
    """Whether the ids stand for some text: one of them is neither special nor what stands for unknown text."""
    copy = _copy_for_text(tokenizer)
    return any(number not in copy.wordless for number in ids)


def unknown_token_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that stands for text which is not in the vocabulary; None when such text is left out or cannot occur."""
    return _copy_for_text(tokenizer).unknown_id


# --- Conversations ----------------------------------------------------------------------------------------------------


def render_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] = (),
) -> list[int]:
    """The ids of a conversation followed by the open assistant header: the prompt of a reply.

    They are those of the rendered text as a whole, in which only the template's own special tokens count. Works with a
    template that honours add_generation_prompt and with one that ignores it.

    Args:
        messages: {"role", "content"} mappings, with what else the template looks at ("tool_calls").
        tools: descriptions of the functions that the assistant may call.

    Raises:
        TemplateRefusalError: the template cannot render them.
        UserError: the tokenizer has no chat template, or there is no message.
    """
    copy = _copy_for_text(tokenizer)
    return copy.encode([_chat_text(tokenizer, copy, messages, tools)])[0]


def render_exchange(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    answer: Mapping[str, Any],
    *,
    tools: Sequence[Any] = (),
) -> tuple[list[int], list[int]]:
    """(the ids of `render_chat`, those of the assistant's answer to it): together, where a prompt that stands alone
    allows it, the ids of the whole text. The answer ends with the token by which the template ends a turn.

    An answer's text is the message's content as it is; with calls or thoughts it is what the template makes of all.
    Raises what `render_chat` raises.
    """
    copy = _copy_for_text(tokenizer)
    prompt = _chat_text(tokenizer, copy, messages, tools)
    if more := [name for name in ("tool_calls", *THOUGHTS) if answer.get(name)]:
        closed = _chat_text(tokenizer, copy, [*messages, answer], tools, is_open=False)
        if not closed.startswith(prompt):
            raise TemplateRefusalError(f"a turn with {more[0]} does not begin as the prompt of a reply ends")
        # Those of earlier turns a template may well forget.
        if thoughts := [name for name in more if name in THOUGHTS]:
            bare = {name: value for name, value in answer.items() if name not in thoughts}
            if _chat_text(tokenizer, copy, [*messages, bare], tools, is_open=False) == closed:
                raise TemplateRefusalError(f"it does not write {' and '.join(thoughts)}")
        written, closing = closed[len(prompt) :].rstrip(), ""
    else:
        written, closing = answer["content"], _turn_end(tokenizer, copy)
    last = prompt.rfind(copy.begin)
    tail = prompt[max(last, 0) :]
    ids, short, whole, alone = copy.encode([prompt, tail, tail + written, copy.border + written])
    answered = whole[len(short) :] if whole[: len(short)] == short else alone[1:]
    return ids, answered + (copy.encode([closing])[0] if closing else [])


def _turn_end(tokenizer: PreTrainedTokenizerFast, copy: _TextCopy) -> str:
    """The special token that the template writes behind an assistant's answer, by its name in the copy; "" for none."""
    if (llada := copy.names.get(END_OF_TURN)) is not None:
        return llada
    probe = f"<|{_NONCE}|>"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": probe}]
    behind = _chat_text(tokenizer, copy, turns, is_open=False).rpartition(probe)[2]
    found = copy.named.search(behind)
    return found.group() if found else ""


def _chat_text(
    tokenizer: PreTrainedTokenizerFast,
    copy: _TextCopy,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] = (),
    *,
    is_open: bool = True,
) -> str:
    """A conversation as the template renders it, its special tokens by their names in the copy."""
    if tokenizer.chat_template is None:
        raise UserError("this tokenizer has no chat template; prepare the data with one that has")
    if not messages:
        raise UserError("a conversation needs at least one message")
    for turn in messages:
        if not isinstance(turn["content"], str):
            raise TypeError(f"a message's content must be text, not {type(turn['content']).__name__}")
    # Special tokens that a message spells out travel under other names, so that they stay text.
    spelled: list[str] = []

    def hide(match: re.Match[str]) -> str:
        spelled.append(match.group())
        return f"<|{_NONCE}={len(spelled) - 1}|>"

    def hidden(value: Any) -> Any:
        if isinstance(value, str):
            return copy.spelled.sub(hide, value)
        if isinstance(value, Mapping):
            return {key: hidden(item) for key, item in value.items()}
        return [hidden(item) for item in value] if isinstance(value, (list, tuple)) else value

    def render(turns: Any, tools: Any) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    turns, tools=tools, tokenize=False, add_generation_prompt=is_open
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise TemplateRefusalError(" ".join(str(error).split())) from None

    safe, safe_tools = hidden(list(messages)), hidden(list(tools)) or None
    text = render(safe, safe_tools)
    # Who trains on calls must not find out that the template never wrote them.
    if safe_tools and render(safe, None) == text:
        raise TemplateRefusalError("it does not write tools")
    if any(turn.get("tool_calls") for turn in safe):
        bare = [{key: item for key, item in turn.items() if key != "tool_calls"} for turn in safe]
        if render(bare, safe_tools) == text:
            raise TemplateRefusalError("it does not write tool_calls")
    text = copy.spelled.sub(lambda match: copy.names[match.group()], text)
    return re.sub(rf"<\|{_NONCE}=([0-9]+)\|>", lambda match: spelled[int(match.group(1))], text)


# --- The copy that reads text -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TextCopy:
    """A tokenizer with the same ids, whose special tokens have names that no text can spell.

    The tokenizers library would find "<mask>" in a text in three ways: as a special token, as a word of the vocabulary
    (unigram and word models), and by merging. Nor does the copy cut texts or pad them, whatever the folder asks for.
    """

    backend: Tokenizer
    names: Mapping[str, str]
    """{special token: its name here}"""
    unknown_id: int | None
    made_of: Any
    """What the tokenizer was when it was copied, see `_version`."""
    wordless: frozenset[int]
    """The ids of the special tokens, and of unknown text."""
    begin = f"<|{_NONCE}:"
    """The beginning of all names."""
    border = f"{begin}|>"
    """A special token of the copy alone."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> _TextCopy:
        original = tokenizer.backend_tokenizer
        state = json.loads(original.to_str())
        special = _special_tokens(tokenizer)
        names = {token: f"{cls.begin}{number}|>" for token, number in special.items()}
        model = state["model"]
        for added in state["added_tokens"]:
            added["content"] = names.get(added["content"], added["content"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
        else:  # a unigram model: [[token, score], ...]
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not _makes(pair, names)]
        unknown = model.get("unk_token")
        if unknown in names:
            model["unk_token"] = names[unknown]
        state |= {"post_processor": None, "truncation": None, "padding": None}
        backend = Tokenizer.from_str(json.dumps(state))
        moved = [
            token for token, name in names.items() if backend.token_to_id(name) != original.token_to_id(token)
        ]
        assert not moved, moved
        backend.add_special_tokens([AddedToken(cls.border, normalized=False)])
        unknown_id = original.token_to_id(unknown) if unknown is not None else model.get("unk_id")
        wordless = frozenset(special.values()) | ({unknown_id} if unknown_id is not None else set())
        return cls(backend, names, unknown_id, _version(tokenizer), wordless)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts in which special tokens go by their names here."""
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def spelled(self) -> re.Pattern[str]:
        """Any special token as the template writes it."""
        return _any_of(self.names)

    @cached_property
    def named(self) -> re.Pattern[str]:
        """Any special token by its name here."""
        return _any_of(self.names.values())


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """The longest first, so that none hides inside another. Of none, a pattern that is nowhere."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


_COPIES: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, _TextCopy] = weakref.WeakKeyDictionary()


def _copy_for_text(tokenizer: PreTrainedTokenizerFast) -> _TextCopy:
    """Made once, and again when the tokenizer has gained tokens."""
    copy = _COPIES.get(tokenizer)
    if copy is None or copy.made_of != _version(tokenizer):
        copy = _COPIES[tokenizer] = _TextCopy.of(tokenizer)
    return copy


def _version(tokenizer: PreTrainedTokenizerFast) -> Any:
    return len(tokenizer), dict(tokenizer.special_tokens_map)


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {t.content: number for number, t in tokenizer.added_tokens_decoder.items() if t.special}


def _makes(pair: str | list[str], tokens: Mapping[str, str]) -> bool:
    """Whether a merge takes or makes one of the tokens."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left in tokens or right in tokens or left + right in tokens


def _pieces(text: str, copy: _TextCopy) -> Iterator[str]:
    """A text in pieces whose ids, one after the other, are the text's. Whole when there is no place for a cut."""
    start = 0
    while len(text) - start > 2 * _PIECE_CHARS:
        places = (cut.start() for cut in _CUTS.finditer(text, start + _PIECE_CHARS))
        end = next((p for p in islice(places, _CUTS_TRIED) if _is_harmless(text, p, copy)), None)
        if end is None:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def _is_harmless(text: str, cut: int, copy: _TextCopy) -> bool:
    """Whether the text around a cut has the same ids with and without it."""
    left, right = text[max(0, cut - _CUT_CONTEXT) : cut], text[cut : cut + _CUT_CONTEXT]
    before, behind, whole = copy.encode([left, right, left + right])
    return before + behind == whole
