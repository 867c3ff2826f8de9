"""Whether a task's documents can be asked and judged, with examples before them: seen before the network is asked anything."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any

from llada.errors import UserError
from llada.settings import require

# Of `random` as lm_eval's command line sets it, and of the generator that its GPQA has for itself.
_SEED, _OWN_SEED = 0, 42
# Of the examples' generator, that of lm_eval's own command line.
_EXAMPLES_SEED = 1234
# Any answer to a request of each kind.
_ANSWERS = {"generate_until": "One.", "loglikelihood": (0.0, False), "loglikelihood_rolling": 0.0}
_NLTK_DATA = re.compile(r"nltk\.download\(['\"](\w+)['\"]\)")


def settle_documents(task: Any) -> Any:
    """The task, its documents made once, and the same each time, and no question its own example. lm_eval makes them anew to ask, to
    judge and to show examples; where that shuffles the choices (GPQA, by a generator that goes on and on), a letter would be judged
    by another order than was asked, and a question would not be known among its examples."""
    _leave_out_the_question(task)
    make = getattr(task.config, "process_docs", None)
    if make is None:
        return task
    made: dict[int, tuple[Any, Any]] = {}

    def once(rows: Any) -> Any:
        # The rows are kept, so that no others can have their address.
        if id(rows) not in made:
            random.seed(_SEED)
            for value in getattr(make, "__globals__", {}).values():
                if isinstance(value, random.Random):
                    value.seed(_OWN_SEED)
            made[id(rows)] = rows, make(rows)
        return made[id(rows)][1]

    task.config.process_docs = once
    if task.fewshot_cfg.process_docs is make:
        task.fewshot_cfg.process_docs = once
    if hasattr(task, "sampler"):  # whose documents were made with the task
        task.sampler.replace_df(list(task.fewshot_docs()))
    return task


def seed_examples(task: Any) -> None:
    """From here on a task draws the examples that it would from its start."""
    task.set_fewshot_seed(_EXAMPLES_SEED)


def check_examples(name: str, task: Any) -> None:
    """Raises UserError where the prompts of a task are to have more examples than there are."""
    wanted = task.config.num_fewshot or 0
    if not wanted or not hasattr(task, "sampler"):
        return
    shown = list(task.sampler.df)
    there = len(shown)
    if task.fewshot_cfg.split == task.config.test_split:
        # Then lm_eval leaves out what is equal to the question; its usual sampler draws one more for that, needed or not.
        counts = Counter(map(_content, shown))
        alike = max((counts[_content(document)] for document in task.eval_docs), default=0)
        there -= max(alike, 0 if task.fewshot_cfg.sampler == "first_n" else 1)
    require(
        wanted <= there,
        f"{name}: {wanted} examples asked for, and it has {max(there, 0)} beside the question; give --benchmarks.num-fewshot "
        f"{max(there, 0)}",
    )


def check_documents(name: str, task: Any, limit: int | None) -> None:
    """Raises UserError with the place of a document of lm_eval's own task that cannot be asked and judged, of the first `limit`."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":  # of which nothing is asked but its text
        return
    seed_examples(task)
    for number, document in enumerate(islice(task.eval_docs, limit), start=1):
        or_no_document(f"{name}, document {number}", partial(_go_through, task, document))


def _go_through(task: Any, document: Any) -> None:
    """All that lm_eval does with a document, the answer being any. Raises whatever is wrong with it."""
    prompt = task.fewshot_context(document, num_fewshot=task.config.num_fewshot or 0)
    made = task.construct_requests(document, prompt)
    requests = made if isinstance(made, list) else [made]
    for request in requests:  # of which a task may have several kinds
        answer = _ANSWERS[request.request_type]
        request.resps = [answer] * (task.config.repeats or 1)
    if task.OUTPUT_TYPE == "multiple_choice":
        _check_choices(task, document)
    for rule in task._filters:
        rule.apply(requests)
        task.process_results(document, [request.filtered_resps[rule.name] for request in requests])


def ask_and_judge(task: Any, document: Any) -> None:
    """Raises whatever is wrong with a document of a benchmark: a prompt, choices, the right one, a judgement of any answer."""
    _, target = task.doc_to_text(document), task.doc_to_target(document)
    if task.OUTPUT_TYPE == "multiple_choice":
        results: list[Any] = [(0.0, False)] * _check_choices(task, document)
    else:
        if isinstance(target, str) and not target.strip():
            raise ValueError("it has no answer")
        results = ["One."]
    task.process_results(document, results)


def _check_choices(task: Any, document: Any) -> int:
    """How many choices a document has. Raises ValueError for an empty one, and where the right one is none of them."""
    choices = task.doc_to_choice(document)
    if not all(choices):
        raise ValueError("a choice is empty")
    # Where the contexts are the choices, the prompt is the number of the right one.
    right = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    for one in right if isinstance(right, list) else [right]:
        if not (one in choices if isinstance(one, str) else 0 <= one < len(choices)):
            raise ValueError(f"{one!r} is none of its {len(choices)} choices")
    return len(choices)


def or_no_document(place: str, make: Callable[[], Any]) -> Any:
    """What is made of a document or a task. Raises UserError with its place for whatever lm_eval's templates and functions meet."""
    try:
        return make()
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{place} needs a package that is not installed: {told(error)}") from error
    except Exception as error:
        if resource := _NLTK_DATA.search(str(error)):
            raise UserError(
                f"{place} is judged with nltk's data, which is not on this machine: python -m nltk.downloader {resource[1]}"
            ) from error
        raise UserError(f"{place} cannot be asked and judged: {told(error)}") from error


def told(error: Exception) -> str:
    """An error of a library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _leave_out_the_question(task: Any) -> None:
    """Where a task has its examples from what it asks. lm_eval leaves the question out of them only where the split of examples is
    named as that of the tests."""
    config, shown = task.config, getattr(task, "fewshot_cfg", None)
    if shown is None or (shown.split is None and shown.samples is not None):
        return
    asked = config.test_split or config.validation_split
    drawn = shown.split or config.training_split or config.validation_split or config.test_split
    if drawn == asked and shown.split != config.test_split:
        if shown.split is None:  # then the examples are made as the documents are
            shown.process_docs = config.process_docs
        shown.split = config.test_split = asked


def _content(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, default=str)
