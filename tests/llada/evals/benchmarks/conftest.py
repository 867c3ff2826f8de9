"""A folder of all benchmarks, a few documents of each."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("LLADA_SHARED", Path(__file__).resolve().parents[5] / "shared"))
DATA = SHARED / "data" / "eval"
# Of these there are no rows with the others: made up in the fields of their data sets.
GPQA = {
    "Question": "Which is it?", "Correct Answer": "this", "Incorrect Answer 1": "that",
    "Incorrect Answer 2": "none", "Incorrect Answer 3": "all",
}  # fmt: skip
MMLU_PRO = {
    "question_id": 1, "question": "How much is 1 + 1?", "options": ["1", "2 ", "3"], "answer": "B", "answer_index": 1,
    "category": "computer science", "cot_content": "A: Let's think step by step. It is 2. The answer is (B).",
}  # fmt: skip
IFEVAL = {
    "key": 1, "prompt": "Write a word. Use no comma.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]
}  # fmt: skip


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of each file of real ones, and of those made up; examples as they are."""
    if not DATA.is_dir():
        pytest.skip(f"no {DATA}: set LLADA_SHARED")
    folder = tmp_path_factory.mktemp("eval")
    for path in DATA.glob("*.jsonl"):
        lines = path.read_text().splitlines()
        if ".fewshot" not in path.name:
            # Of subjects and tasks, all documents of the first three.
            groups = [key for key in ("subject", "task", "type") if key in json.loads(lines[0])]
            of = [json.loads(line).get(groups[0]) if groups else None for line in lines]
            first = list(dict.fromkeys(of))[:3]
            lines = [line for line, group in zip(lines, of, strict=True) if group in first][:8]
        (folder / path.name).write_text("\n".join(lines) + "\n")
    for name, row in (
        ("gpqa", GPQA),
        ("mmlu_pro", MMLU_PRO),
        ("mmlu_pro.fewshot", MMLU_PRO),
        ("ifeval", IFEVAL),
    ):
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 6)
    pool = (DATA / "winogrande.jsonl").read_text().splitlines()[50:]
    (folder / "winogrande.fewshot.jsonl").write_text("\n".join(pool) + "\n")
    return folder
