"""lm_eval on a checkpoint of ours: its own evaluator asks, and gets what scoring and the sampler give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llada.errors import UserError
from llada.evals.harness import HarnessModel, Setup, open_folder
from llada.evals.requests.scoring import Pair, ScoreConfig, score_pairs
from llada.model.hf import save_model
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.completions import complete_texts
from llada.sampling.config import SamplingConfig
from llada.sampling.text import load
from llada.tokenizer import END_OF_TEXT, MASK, encode_texts, save_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[3]
CONTEXT = 64
QUESTIONS = [
    {"question": f"What is {n} and {n}?", "choices": [str(n), str(2 * n), "nothing at all"], "answer": n % 3}
    for n in range(3)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([line["question"] for line in QUESTIONS] * 5, 300)
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = Transformer(ModelConfig(300, 16, 1, 2, 32, max_length=CONTEXT, **ids))
    model.init_weights(0)
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS))
    return str(folder)


def task_of(folder: str, **changes: Any) -> dict[str, Any]:
    """A task of lm_eval on the file beside the model."""
    return {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{folder}/questions.jsonl"}},
        "test_split": "test",
        "doc_to_text": "Q: {{question}}\nA:",
        **changes,
    }


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def evaluated(model: HarnessModel, task: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures, and what was asked and answered for each document."""
    tasks = TaskManager(include_defaults=False)  # thousands of files are looked through for those
    found = simple_evaluate(model, tasks=[task], task_manager=tasks, log_samples=True, bootstrap_iters=0)
    assert found is not None
    return found["results"]["questions"], found["samples"]["questions"]


def asked(*args: Any) -> Instance:
    return Instance("generate_until", {}, args, 0)


def through_json(
    build: Callable[[], Callable[[Any], Any]], blocks: Sequence[Any], *, folder: str
) -> Iterator[Any]:
    """As a store between processes would have them."""
    for block in blocks:
        yield json.loads(json.dumps(build()(json.loads(json.dumps(block)))))


def test_choices_are_scored_and_counted(folder: str) -> None:
    assert get_model("llada") is HarnessModel
    model = HarnessModel.from_arguments(folder, num_samples=4, cfg_scale=0.5)
    task = task_of(
        folder,
        output_type="multiple_choice",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        num_fewshot=0,
    )
    figures, samples = evaluated(model, task)
    network, tokenizer = load(folder)
    hits = 0
    for line, sample in zip(QUESTIONS, samples, strict=True):
        prompt = f"Q: {line['question']}\nA:"
        given = encode_texts(tokenizer, [prompt])[0]
        wholes = encode_texts(tokenizer, [f"{prompt} {choice}" for choice in line["choices"]])
        pairs = [Pair(given, whole[len(given) :]) for whole in wholes]
        expected = score_pairs(network, pairs, ScoreConfig(num_samples=4, cfg_scale=0.5))
        got = [float(answer[0][0]) for answer in sample["resps"]]
        assert got == pytest.approx([score.log_p for score in expected], rel=1e-5)
        hits += max(range(3), key=lambda k: expected[k].log_p) == line["answer"]
    assert figures["acc,none"] == pytest.approx(hits / 3)


def test_texts_are_bounded_in_pieces_that_fit(folder: str) -> None:
    network, tokenizer = load(folder)
    model = HarnessModel.from_arguments(folder, num_samples=2)
    text = "What is it and what is nothing? " * 12
    ids, eos = list(encode_texts(tokenizer, [text])[0]), tokenizer.eos_token_id
    pieces = [ids[start : start + CONTEXT - 1] for start in range(0, len(ids), CONTEXT - 1)]
    assert len(pieces) > 2
    pairs, before = [], [eos]
    for piece in pieces:
        pairs.append(Pair(before[-(CONTEXT - len(piece)) :], piece, [*ids, *before[1:]]))
        before += piece
    assert len(pairs[1].context) == 1
    assert len(pairs[-1].context) == CONTEXT - len(pieces[-1])
    expected = sum(score.log_p for score in score_pairs(network, pairs, ScoreConfig(num_samples=2)))
    assert model.loglikelihood_rolling([asked(text)]) == pytest.approx([expected], rel=1e-5)
    assert model.num_cut == 1
    figures, _ = evaluated(
        HarnessModel.from_arguments(folder, num_samples=2),
        task_of(
            folder,
            output_type="loglikelihood_rolling",
            doc_to_target="{{question}}",
            metric_list=[{"metric": "bits_per_byte"}],
        ),
    )
    assert 0 < figures["bits_per_byte,none"] < 60


def test_texts_behind_the_same_token_have_masks_of_their_own(folder: str) -> None:
    """By one mask each, what two texts are over or under their bounds is not the same."""
    texts = [
        "What is it and nothing is 1",
        "What is it and nothing is 2",
    ]  # whose tokens err alike, by like masks
    found = []
    for seed in range(60):
        model = HarnessModel.from_arguments(folder, num_samples=1, seed=seed)
        model._worker = found[0][0]._worker if found else None  # opened once
        found.append((model, model.loglikelihood_rolling([asked(text) for text in texts])))
    scores = torch.tensor([score for _, score in found], dtype=torch.float64)
    assert abs(float(torch.corrcoef(scores.T)[0, 1])) < 0.4  # three standard errors
    (alone,) = HarnessModel.from_arguments(folder, num_samples=1).loglikelihood_rolling([asked(texts[1])])
    assert alone == pytest.approx(found[0][1][1], rel=1e-5)


def test_texts_are_written_up_to_a_stop_string(folder: str) -> None:
    network, tokenizer = load(folder)
    model = HarnessModel.from_arguments(folder, block_length=4, seed=3)
    prompts = ["What is 1?", "What is nothing?"]
    wishes = {"until": ["a", "\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}
    got = model.generate_until([asked(prompt, wishes) for prompt in prompts])
    sampling = SamplingConfig(gen_length=8, block_length=4)
    whole = [line["text"] for line in complete_texts(network, tokenizer, prompts, sampling, seed=3)]
    assert got == [text.split("a")[0].split("\n")[0] for text in whole]
    drawn = {**wishes, "until": [], "do_sample": True, "temperature": 1, "top_k": 3, "max_gen_toks": 30}
    sampling = SamplingConfig(gen_length=30, block_length=4, temperature=1.0, top_k=3)
    expected = complete_texts(network, tokenizer, prompts, sampling, seed=3)
    assert model.generate_until([asked(prompt, drawn) for prompt in prompts]) == [
        line["text"] for line in expected
    ]
    longer = HarnessModel.from_arguments(
        folder, gen_length=16
    )  # what is given by hand goes before what a task says
    whole = [
        line["text"] for line in complete_texts(network, tokenizer, prompts, SamplingConfig(gen_length=16))
    ]
    assert longer.generate_until([asked(prompt, {"max_gen_toks": 8}) for prompt in prompts]) == whole


def test_a_prompt_without_room_loses_its_beginning(folder: str) -> None:
    network, tokenizer = load(folder)
    model = HarnessModel.from_arguments(folder, gen_length=8)
    prompt = "What is it and what is nothing? " * 12
    ids = list(encode_texts(tokenizer, [prompt])[0])[-(CONTEXT - 8) :]
    (expected,) = complete_texts(network, tokenizer, [ids], SamplingConfig(gen_length=8))
    assert model.generate_until([asked(prompt, {}), asked("What", {})])[0] == expected["text"]
    assert model.num_cut == 1


def test_choices_that_are_contexts_share_their_masks(folder: str) -> None:
    """As WinoGrande's, of which one continuation stands behind both: what differs is not the noise."""
    network, tokenizer = load(folder)
    texts = [("What is it", " and nothing"), ("What is 1", " and nothing"), ("What is 1", " and nothing")]
    documents = [("toy", 0, 1), ("toy", 0, 1), ("toy", 1, 1)]
    requests = [
        Instance("loglikelihood", {}, pair, n, metadata=document)
        for n, (pair, document) in enumerate(zip(texts, documents, strict=True))
    ]
    model = HarnessModel.from_arguments(folder, num_samples=4)
    found = [log_p for log_p, _ in model.loglikelihood(requests)]
    one, other = (encode_texts(tokenizer, [text])[0] for text in ("What is it", "What is 1"))
    (whole,) = encode_texts(tokenizer, ["What is it and nothing"])
    continuation = whole[len(one) :]
    pairs = [Pair(one, continuation), Pair(other, continuation, one), Pair(other, continuation)]
    expected = [score.log_p for score in score_pairs(network, pairs, ScoreConfig(num_samples=4))]
    assert found == pytest.approx(expected, abs=1e-4)
    assert abs(found[1] - found[2]) > 1e-3  # of another document it has masks of its own


def test_choices_without_a_context_share_the_masks_of_those_behind_it(folder: str) -> None:
    """As acc_mutual_info asks for them: in the difference of two choices there is not the noise of other masks."""
    network, tokenizer = load(folder)
    context, choices = "What is", [" it and nothing", " 1 and nothing"]
    texts = [(given, choice) for given in (context, "") for choice in choices]
    requests = [
        Instance("loglikelihood", {}, pair, n, metadata=("toy", 0, 1)) for n, pair in enumerate(texts)
    ]
    model = HarnessModel.from_arguments(folder, num_samples=4)
    found = [log_p for log_p, _ in model.loglikelihood(requests)]
    (given,) = encode_texts(tokenizer, [context])
    wholes = [encode_texts(tokenizer, [context + choice])[0][len(given) :] for choice in choices]
    alone = encode_texts(tokenizer, choices)
    end = [tokenizer.eos_token_id]
    pairs = [Pair(given, whole) for whole in wholes] + [Pair(end, choice, given) for choice in alone]
    expected = [score.log_p for score in score_pairs(network, pairs, ScoreConfig(num_samples=4))]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_gap_is_filled_between_what_is_before_and_behind_it(folder: str) -> None:
    network, tokenizer = load(folder)
    wishes = {"gap": {"suffix": "behind", "answer": "right"}, "block_length": 64}
    docs = [{"behind": " is 1?", "right": " it and"}, {"behind": " is nothing? " * 20, "right": " it"}]
    requests = [Instance("generate_until", doc, ("What", wishes), 0) for doc in docs]
    model = HarnessModel.from_arguments(folder)
    found = model.generate_until(requests)
    for doc, text in zip(docs, found, strict=True):
        prompt, behind, right = encode_texts(tokenizer, ["What", doc["behind"], doc["right"]])
        room = CONTEXT - len(right)
        sampling = SamplingConfig(gen_length=len(right), block_length=64)
        suffix = behind[: room - len(prompt)]
        (expected,) = complete_texts(network, tokenizer, [prompt], sampling, suffixes=[suffix])
        assert text == expected["text"]
    # The second suffix loses its end; a long prompt beside it, its beginning.
    assert model.num_cut == 1
    given = HarnessModel.from_arguments(folder, gen_length=8)
    long = Instance("generate_until", docs[1], ("What is it? " * 40, wishes), 0)
    prompt, behind = encode_texts(tokenizer, ["What is it? " * 40, docs[1]["behind"]])
    sampling, room = SamplingConfig(gen_length=8, block_length=64), CONTEXT - 8
    suffix = behind[: room // 2]
    cut = prompt[len(suffix) - room :]
    (expected,) = complete_texts(network, tokenizer, [cut], sampling, suffixes=[suffix])
    assert given.generate_until([long]) == [expected["text"]]
    assert given.num_cut == 1


def test_a_gap_that_is_longer_than_half_of_the_context_has_so_many_masks_and_is_counted(folder: str) -> None:
    network, tokenizer = load(folder)
    doc = {"behind": " is 1?", "right": "it and " * CONTEXT}
    request = Instance("generate_until", doc, ("What", {"gap": {"suffix": "behind", "answer": "right"}}), 0)
    model = HarnessModel.from_arguments(folder)
    prompt, behind = encode_texts(tokenizer, ["What", doc["behind"]])
    sampling = SamplingConfig(gen_length=CONTEXT // 2, block_length=1024)
    (expected,) = complete_texts(network, tokenizer, [prompt], sampling, suffixes=[behind])
    assert model.generate_until([request]) == [expected["text"]]
    assert model.num_cut == 1
    given = HarnessModel.from_arguments(folder, gen_length=8)
    assert given.generate_until([request])
    assert given.num_cut == 0  # so many were asked for


def test_what_is_asked_may_be_answered_elsewhere(folder: str) -> None:
    """Blocks and their results are JSON; the network is opened where they are worked on."""
    pairs = [((question["question"], " 2"), [5, 6], [7] * (n + 1)) for n, question in enumerate(QUESTIONS)]
    here, there = (
        HarnessModel.from_arguments(folder),
        HarnessModel(
            folder,
            Setup(partial(open_folder, folder, None, None), max_tokens=8192),
            score=ScoreConfig(),
            sampling={},
            map_blocks=through_json,
        ),
    )
    assert here._loglikelihood_tokens(pairs) == [tuple(score) for score in there._loglikelihood_tokens(pairs)]
    requests = [asked("What is 1?", {"max_gen_toks": 8}), asked("What is", {"max_gen_toks": 4})]
    assert here.generate_until(requests) == there.generate_until(requests)


def test_a_choice_that_the_tokenizer_cannot_spell_is_named(tmp_path: Path) -> None:
    words = ["<unk>", MASK, END_OF_TEXT, "What", "is", "1"]
    spelled = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    spelled.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "mask_token": MASK, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=spelled, **names), tmp_path)
    network = Transformer(ModelConfig(6, 16, 1, 2, 32, max_length=8, mask_token_id=1, eos_token_id=2))
    network.init_weights(0)
    save_model(network, tmp_path)
    model = HarnessModel.from_arguments(str(tmp_path), num_samples=1)
    scored = Instance("loglikelihood", {}, ("What is", " 1"), 0)
    assert model.loglikelihood([scored])[0][0] < 0
    lost = Instance("loglikelihood", {}, ("What is", " 2"), 0)
    with pytest.raises(
        UserError, match="its tokenizer has no tokens for ' 2', whose likelihood is asked for"
    ):
        model.loglikelihood([scored, lost])
    for nothing in ("", " "):
        empty = Instance("loglikelihood", {}, ("", nothing), 0, metadata=("mine", 3, 1))
        with pytest.raises(
            UserError, match="mine, document 3: its context is empty, and its continuation has no"
        ):
            model.loglikelihood([scored, empty])
    with pytest.raises(UserError, match="its tokenizer has no tokens for '2'"):
        model.loglikelihood([Instance("loglikelihood", {}, ("", "2"), 0)])
    with pytest.raises(UserError, match=r"half of a surrogate pair.* stands in 'Whatis \\ud83d'"):
        model.loglikelihood([Instance("loglikelihood", {}, ("What", "is \ud83d"), 0)])
    with pytest.raises(UserError, match="no tokens for 'What are'"):
        model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("What are",), 0)])


def test_a_chat_is_rendered_and_read_with_its_special_tokens(folder: str) -> None:
    model = HarnessModel.from_arguments(folder)
    text = model.apply_chat_template([{"role": "user", "content": "What is 1?"}])
    ids = model.tok_encode(text)
    assert ids[0] == model.tokenizer.bos_token_id
    assert len(ids) < len(text) / 2


def test_a_chat_out_of_the_cache_of_requests_is_read_as_the_one_that_was_rendered(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the second run lm_eval takes the prompts from its cache, and the model renders none."""
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "requests"))
    choosing = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    task = task_of(folder, **choosing)

    def scores() -> list[Any]:
        model = HarnessModel.from_arguments(folder, num_samples=2)
        tasks = TaskManager(include_defaults=False)
        found = simple_evaluate(
            model,
            tasks=[dict(task)],
            task_manager=tasks,
            apply_chat_template=True,
            cache_requests=True,
            bootstrap_iters=0,
        )
        assert found is not None
        return [sample["resps"] for sample in found["samples"]["questions"]]

    first = scores()
    assert list((tmp_path / "requests").iterdir())
    assert scores() == first


def test_special_tokens_count_where_a_template_is_asked_for_or_all_contexts_are_chats(folder: str) -> None:
    rendered = HarnessModel.from_arguments(folder).apply_chat_template(
        [{"role": "system", "content": "Answer."}, {"role": "user", "content": "What is 1?"}]
    )
    named, chats, mixed = (HarnessModel.from_arguments(folder, num_samples=1, gen_length=4) for _ in range(3))
    mask = named.tokenizer.mask_token_id
    assert mask not in named.tok_encode(MASK)
    named.chat_template(True)
    assert named.tok_encode(MASK) == [mask]
    chats.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in ((rendered, "1"), ("", "1"))])
    assert chats.tok_encode(MASK) == [mask]
    mixed.generate_until([asked(rendered, {}), asked("What", {})])
    assert mask not in mixed.tok_encode(MASK)  # text is text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_sample": 3}, "unknown model argument num_sample; did you mean 'num_samples'"),
        ({"num_samples": 0}, "num_samples"),
        ({"rule": "chain"}, "rule"),
        ({"block_length": 0}, "block_length"),
        ({"batch_size": "many"}, "batch_size must be a number of rows or auto, not 'many'"),
        ({"batch_size": 0}, "batch_size"),
    ],
    ids=str,
)
def test_wrong_model_arguments_are_named(folder: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HarnessModel.from_arguments(folder, **settings)
    with pytest.raises(UserError, match="give --model_args pretrained=FOLDER"):
        HarnessModel.from_arguments(**settings)


def test_wishes_that_cannot_be_granted_are_named(folder: str) -> None:
    model = HarnessModel.from_arguments(folder)
    with pytest.raises(UserError, match="asks for num_beams=4, which this sampler has not"):
        model.generate_until([asked("What", {"num_beams": 4})])
    with pytest.raises(UserError, match="256 tokens of an answer leave no room"):
        model.generate_until([asked("What", {})])


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize(
    "command", [["-m", "llada.evals.harness"], ["-m", "lm_eval"]], ids=["ours", "its own"]
)
def test_the_command_line_of_lm_eval_knows_the_model(command: list[str], folder: str, tmp_path: Path) -> None:
    task = task_of(folder, output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target="answer")
    (tmp_path / "questions.yaml").write_text(json.dumps(task))  # JSON is YAML
    words = [
        "--model",
        "llada",
        "--model_args",
        f"pretrained={folder},rule=left_to_right",
        "--tasks",
        "questions",
    ]
    words += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--batch_size", "4"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, *command, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(results.read_text())["results"]["questions"]["acc,none"] <= 1
