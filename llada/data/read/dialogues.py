"""Records to dialogues (LLaDA's SFT data, facts of its paper's section 2.3), in the forms in which people keep them.

A record holds turns, or one question and its answer:
    {"messages" | "conversations" | ...: [{"role" | "from", "content" | "value" | "parts"}, ...]}
    {"prompt" | "instruction" | "question" | "query" | "input": ..., "response" | "completion" | "output" | "answer": ...}
Beside them it may say "system", "context" (also an instruction's "input"), "history" ([[question, answer], ...]) and
"tools", and by a weight that none of its answers is to be learned. Turns may be those of ShareGPT and of OpenAI, with
content in parts, calls of tools, and weights.

Where a turn cannot be used, the dialogue ends before it; an answer without text stays in the history of later ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

from llada.data.document import Document, Message, dialogue, prompt_answer_pairs, text_problem
from llada.data.outcomes import Rejects
from llada.data.read.cleaning import clean_text
from llada.data.read.formats import read_records
from llada.data.read.parts import Part, ReadOptions

ROLES = ("system", "user", "assistant", "tool")
_SENDERS = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),  # ShareGPT: the call as text
    **dict.fromkeys(("function", "function_response", "tool_response", "observation", "ipython"), "tool"),
}
# What a dialogue consists of: the fields in which it is looked for, in this order.
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "contents"),
    "prompt": ("prompt", "instruction", "question", "query", "input"),
    "answer": ("response", "completion", "output", "answer"),
    "system": ("system", "system_prompt", "system_message"),
    "context": ("context",),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "role": ("role", "from"),
    "content": ("content", "value", "parts"),
    "weight": ("weight", "train", "training", "trainable", "loss"),
    "mask": ("mask", "masked"),
}
_OF_TURNS = ("role", "content")
_ALPACA = ("instruction", "input")  # where there are both, the second is what the first is about
_PASSED_ON = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_SPELLED = {"0": 0, "1": 1, "false": 0, "true": 1}
_REASON_CHARS = 40


class RecordError(ValueError):
    """A record that is no dialogue; the message is a short reason for the statistics, such as "empty_text"."""


class Dialogue(NamedTuple):
    """What of a record can be used."""

    messages: list[Message]
    tools: list[Any]
    problem: str | None = None
    """Why not all turns can be used."""
    lost: int = 0
    """Turns that cannot."""


def read_dialogues(part: Part, rejects: Rejects, options: ReadOptions) -> Iterator[Document]:
    """The dialogues of a part, their messages cleaned, each with at least one answer. Other records are rejected."""
    shape = Shape(options.chat_fields, options.chat_roles, clean=clean_text)
    options = replace(options, columns=shape.columns)
    for record in read_records(part, rejects, options):
        try:
            found = shape.read(record.fields)
            if not prompt_answer_pairs(found.messages):
                is_masked = any(not message.get("trained", True) for message in found.messages)
                raise RecordError(found.problem or ("no_trained_answer" if is_masked else "no_answer"))
        except RecordError as problem:
            if record.is_only and str(problem) == "unknown_sft_format":
                rejects.leave_out("JSON object that is no dialogue", part.label)
                continue
            excerpt = json.dumps(record.fields, default=str, ensure_ascii=False)
            rejects.add(str(problem), part.label, record.line, excerpt)
            continue
        if found.problem:
            rejects.edits[f"turns_left_out.{found.problem}"] += found.lost
        yield dialogue(found.messages, found.tools, f"{part.label}:{record.line}")


def parse_dialogue(record: Mapping[str, Any]) -> Dialogue:
    """A record all of whose turns can be used. Raises RecordError."""
    found = Shape().read(record)
    if found.problem:
        raise RecordError(found.problem)
    return found


class Shape:
    """How a record tells a dialogue. `fields` names the fields in use instead of those in FIELDS, `roles` adds roles;
    `clean` is done to every text."""

    def __init__(
        self,
        fields: Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
        clean: Callable[[str], str] = str,
    ) -> None:
        self._fields = FIELDS | {name: (given,) for name, given in (fields or {}).items()}
        self._roles = _SENDERS | dict(roles or {})
        self._clean = clean

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of a record that are looked at."""
        return tuple(
            field for name, fields in self._fields.items() if name not in _OF_TURNS for field in fields
        )

    def read(self, record: Mapping[str, Any]) -> Dialogue:
        """Raises RecordError for a record that tells none, or has no turn before the first that cannot be used."""
        turns = self._turns(record)
        messages: list[Message] = []
        problem: str | None = None
        lost = 0
        for place, turn in enumerate(turns):
            try:
                message, without_text = self._message(turn)
            except RecordError as error:
                problem, lost = problem or str(error), lost + len(turns) - place
                break
            if without_text and message["role"] == "system":
                continue
            if without_text:
                problem, lost = problem or without_text, lost + 1
                message["trained"] = False
            messages.append(message)
        if not messages:
            raise RecordError(problem or "no_messages")
        self._add_system(record, messages)
        self._add_context(record, messages)
        return Dialogue(messages, self._tools(record), problem, lost)

    def _find(self, record: Mapping[str, Any], name: str) -> tuple[str, Any] | None:
        """(field, value) of the first field of that name: one that holds something, if there is one."""
        there = [(field, record[field]) for field in self._fields[name] if field in record]
        return next((found for found in there if found[1] not in (None, "")), there[0] if there else None)

    def _value(self, record: Mapping[str, Any], name: str) -> Any:
        found = self._find(record, name)
        return found[1] if found else None

    # --- Turns --------------------------------------------------------------------------------------------------------

    def _turns(self, record: Mapping[str, Any]) -> list[Any]:
        is_trained = self._is_trained(self._flags(record))
        if (told := self._told(record)) is not None:
            listed = _listed(told, "no_messages")
            return listed if is_trained else self._untrained(listed)
        asked, answered = self._find(record, "prompt"), self._find(record, "answer")
        if asked is None or answered is None:
            raise RecordError("no_messages" if self._find(record, "messages") else "unknown_sft_format")
        turns: list[Any] = []
        for exchange in _listed(self._value(record, "history") or [], "history_not_a_list"):
            if not isinstance(exchange, Sequence) or isinstance(exchange, str) or len(exchange) != 2:
                raise RecordError("history_not_in_pairs")
            turns += [self._turn("user", exchange[0]), self._turn("assistant", exchange[1])]
        prompt, answer = asked[1], answered[1]
        # A conversation in front of an answer is there to be answered, not to be learned.
        turns += self._untrained(prompt) if _are_turns(prompt) else [self._turn("user", prompt)]
        answers = answer if _are_turns(answer) else [self._turn("assistant", answer)]
        return turns + (answers if is_trained else self._untrained(answers))

    def _told(self, record: Mapping[str, Any]) -> Any:
        """The turns as a list, or one in JSON; None when there are none."""
        values = (record.get(field) for field in self._fields["messages"])
        return next(
            (v for v in values if v and (isinstance(v, list) or str(v).lstrip().startswith("["))), None
        )

    def _turn(self, role: str, content: Any) -> dict[str, Any]:
        return {self._fields["role"][0]: role, self._fields["content"][0]: content}

    def _untrained(self, turns: list[Any]) -> list[Any]:
        weight = self._fields["weight"][0]
        return [{**turn, weight: 0} if isinstance(turn, Mapping) else turn for turn in turns]

    def _flags(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What a record says of learning its answers, all of them."""
        weight = self._fields["weight"][0]
        names = (*self._fields["weight"], *self._fields["mask"])
        # A figure or a word may be called so too (a record's loss); a weight is one, and a list asks for more than is done.
        return {
            name: record[name]
            for name in names
            if name in record
            and (name == weight or _flag(record[name]) in (0, 1) or isinstance(record[name], list))
        }

    def _message(self, turn: Any) -> tuple[Message, str | None]:
        """(a turn, why it has no text though it should). Raises RecordError for one behind which nothing can be used."""
        if not isinstance(turn, Mapping):
            raise RecordError("message_not_an_object")
        sender = str(self._value(turn, "role"))
        role = self._roles.get(sender) or self._roles.get(sender.strip().lower())
        if role is None:
            raise RecordError("unknown_role")
        passed = {name: turn[name] for name in _PASSED_ON if isinstance(turn.get(name), str) and turn[name]}
        message = cast(Message, {"role": role, "content": "", **passed})
        if calls := _calls(turn):
            message["tool_calls"] = calls
        _check_utf8([passed, calls])
        if role == "assistant" and not self._is_trained(turn):
            message["trained"] = False
        content = _text(self._value(turn, "content"))
        problem = text_problem(content)
        if problem is None:
            message["content"] = self._clean(content)
            problem = text_problem(message["content"])
        if problem in ("null_text", "empty_text") and (calls or role == "tool"):
            problem = None  # who calls need not speak, and a tool may have nothing to say
        if problem and not (problem in ("null_text", "empty_text") and role in ("assistant", "system")):
            raise RecordError(problem)
        return message, problem

    def _is_trained(self, turn: Mapping[str, Any]) -> bool:
        """What a turn's flags say. Raises RecordError for a weight between "not at all" and "fully"."""
        said = []
        for name in ("weight", "mask"):
            for value in (_flag(turn.get(field)) for field in self._fields[name]):
                if value is not None and value not in (0, 1):
                    raise RecordError("weight_neither_0_nor_1")
                if value is not None:
                    said.append(bool(value) is (name == "weight"))
        return all(said)

    # --- What is said beside the turns --------------------------------------------------------------------------------

    def _add_system(self, record: Mapping[str, Any], messages: list[Message]) -> None:
        system = self._statement(record, "system")
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        elif system and messages[0]["content"] != system:
            messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"

    def _add_context(self, record: Mapping[str, Any], messages: list[Message]) -> None:
        """Behind the first question of turns, or behind the one question that is asked."""
        contexts = [self._statement(record, "context")]
        are_turns = self._told(record) is not None
        asked = None if are_turns else self._find(record, "prompt")
        if asked is not None and asked[0] == _ALPACA[0]:
            contexts.insert(0, self._clean(_text_beside(record.get(_ALPACA[1]), _ALPACA[1])))
        questions = [message for message in messages if message["role"] == "user"]
        for context in filter(None, contexts):
            if not questions:
                raise RecordError("context_without_a_question")
            question = questions[0 if are_turns else -1]
            question["content"] = f"{question['content']}\n\n{context}"

    def _statement(self, record: Mapping[str, Any], name: str) -> str:
        return self._clean(_text_beside(self._value(record, name), name))

    def _tools(self, record: Mapping[str, Any]) -> list[Any]:
        tools = self._value(record, "tools") or []
        _check_utf8(tools)
        if isinstance(tools, str) and tools.lstrip().startswith("{"):
            tools = f"[{tools}]"
        return [tools] if isinstance(tools, Mapping) else _listed(tools, "tools_not_a_list")


def _listed(value: Any, reason: str) -> list[Any]:
    """A list, which may be written as JSON. Raises RecordError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RecordError(reason) from None
    if not isinstance(value, list | tuple):
        raise RecordError(reason)
    return list(value)


def _flag(value: Any) -> Any:
    """A flag as JSON has it, also where a table holds it as text."""
    return _SPELLED.get(value.strip().lower(), value) if isinstance(value, str) else value


def _check_utf8(value: Any) -> None:
    """Raises RecordError when a text somewhere in the value holds half of a surrogate pair, as JSON can spell it."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RecordError("not_utf8") from None


def _text_beside(value: Any, name: str) -> str:
    """A text beside the turns, or several; "" for none. Raises RecordError."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = "\n\n".join(value)
    elif isinstance(value, list):
        value = _text(value)
    problem = text_problem(value)
    if problem in ("null_text", "empty_text"):
        return ""
    if problem:
        raise RecordError(f"{name}_{problem}")
    return str(value)


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_turn, value))


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and not {"type", "text"} & value.keys()  # as a part of a content has


def _text(content: Any) -> Any:
    """A message's text, its parts one after the other; what is no text stays what it is. Raises RecordError for a part
    that is none."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RecordError(f"content_part_{kind}"[:_REASON_CHARS])
        texts.append(part["text"])
    return "".join(texts)


def _calls(turn: Mapping[str, Any]) -> list[Any]:
    """The calls of a turn as chat templates want them: their arguments as objects. Raises RecordError."""
    calls = turn.get("tool_calls") or []
    if not calls and isinstance(turn.get("function_call"), Mapping):
        calls = [{"type": "function", "function": turn["function_call"]}]
    made = []
    for call in _listed(calls, "tool_calls_not_a_list"):
        if isinstance(call, Mapping) and "function" not in call:  # the call is its function, as Hermes has it
            inner = ("name", "arguments")
            outer = {name: value for name, value in call.items() if name not in inner}
            call = {**outer, "type": "function", "function": {name: call.get(name) for name in inner}}
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RecordError("tool_call_without_a_function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise RecordError("tool_call_arguments_not_json") from None
        made.append({**call, "function": {**function, "arguments": arguments or {}}})
    return made
