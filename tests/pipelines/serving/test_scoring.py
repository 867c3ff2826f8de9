"""The likelihood of prompts, equal to what one computes from the network's logits by hand, and as OpenAI's lists."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from llada.diffusion.chain import chain_log_probs
from llada.diffusion.likelihood import log_likelihood
from llada.model.transformer import ModelConfig, Transformer
from llada.sampling.engine import DenoiseEngine
from llada.sampling.events import Event
from llada.tokenizer import encode_texts, train_tokenizer
from pipelines.serving.errors import RequestError
from pipelines.serving.replica import Denoiser
from pipelines.serving.scoring import Score, score_prompts

Call = Callable[..., httpx.Response]
TEXT = "Ten, twenty!"


@pytest.fixture(scope="module")
def ids(denoiser: Denoiser) -> list[int]:
    return encode_texts(denoiser.engine.tokenizer, [TEXT])[0]


def log_probs(model: Any, noisy: torch.Tensor, mask: int, cfg_scale: float = 0.0) -> torch.Tensor:
    """(L, V) float64."""
    with torch.no_grad():
        logits = model(noisy[None])[0].double()
        if cfg_scale:
            hidden = torch.full_like(noisy, mask)
            without = model(hidden[None])[0].double()
            logits = without + (1 + cfg_scale) * (logits - without)
    return logits.log_softmax(-1)


def run(engine: DenoiseEngine, *scores: Score) -> None:
    async def read() -> list[Event]:
        return [event async for event in score_prompts(engine, scores)]

    assert len(asyncio.run(read())) == 1


@pytest.mark.parametrize("begin", [0, 3])
def test_the_chain_rule(denoiser: Denoiser, ids: list[int], begin: int) -> None:
    """The numbers that benchmarks are scored with, and of the likeliest ids those that are text."""
    engine = denoiser.engine
    score = Score(engine, ids, begin=begin, num_top=3)
    run(engine, score)
    assert score.forwards == len(ids) - begin
    scored = torch.arange(len(ids))[None] >= begin
    chain = chain_log_probs(engine.model, torch.tensor([ids]), scored)[0]
    assert [t.logprob for t in score.tokens[begin:]] == pytest.approx(chain[begin:].tolist(), rel=1e-4)
    for place, token in enumerate(score.tokens):
        assert token.id == ids[place]
        if place < begin:
            assert token.logprob is None
            continue
        noisy = torch.tensor([*ids[:place], *[engine.mask_id] * (len(ids) - place)])
        expected = log_probs(engine.model, noisy, engine.mask_id)[place]
        assert token.logprob == pytest.approx(float(expected[ids[place]]), rel=1e-4)
        expected[engine.mask_id] = -torch.inf
        best, which = expected.topk(3)
        assert [value for _, value in token.top] == pytest.approx(best.tolist(), rel=1e-4)
        assert [spelled for spelled, _ in token.top] == [engine.token_bytes[i] for i in which.tolist()]


@pytest.mark.parametrize("network_block", [None, 4])
def test_the_monte_carlo_bound(network_block: int | None) -> None:
    """Σ log p · T/l over masks as `llada.log_likelihood` draws them; blocks of a block-causal network see clean ones before."""
    tokenizer = train_tokenizer(["One, two"] * 5, 300)
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    shape = {"max_length": 64, "mask_token_id": mask, "eos_token_id": eos}
    model = Transformer(ModelConfig(len(tokenizer), 32, 2, 2, 64, **shape, block_length=network_block)).eval()
    model.init_weights(1)
    engine = DenoiseEngine(model, tokenizer)
    ids, begin = encode_texts(tokenizer, [TEXT])[0], 2
    score = Score(engine, ids, begin=begin, samples=20, seed=7)
    clean, total = torch.tensor(ids), torch.zeros(len(ids), dtype=torch.float64)
    for masked in score._masks(20):
        is_masked = torch.cat([torch.zeros(begin, dtype=torch.bool), masked])
        noisy = torch.where(is_masked, mask, clean)
        if network_block is None:
            found = log_probs(model, noisy, mask)
        else:  # each block behind the clean ones
            rows = []
            for block in range(0, len(ids), network_block):
                seen = torch.where(torch.arange(len(ids)) < block, clean, noisy)
                rows.append(log_probs(model, seen, mask)[block : block + network_block])
            found = torch.cat(rows)
        own = found.gather(1, clean[:, None]).squeeze(1)
        total += own.masked_fill(~is_masked, 0.0) * len(masked) / int(masked.sum()) / 20
    run(engine, score)
    engine.close()
    assert [token.logprob for token in score.tokens[:begin]] == [None] * begin
    assert [t.logprob for t in score.tokens[begin:]] == pytest.approx(total[begin:].tolist(), rel=1e-3)
    told = sum(token.logprob or 0 for token in score.tokens)
    generator = torch.Generator().manual_seed(7)
    bound = log_likelihood(model, clean[:begin], clean[begin:], num_samples=20, generator=generator)
    assert told == pytest.approx(bound, rel=1e-4)


def test_guidance_and_a_token_alone(denoiser: Denoiser, ids: list[int]) -> None:
    """Of one token chain and bound are the same, whatever the samples."""
    engine, begin = denoiser.engine, len(ids) - 1
    chain = Score(engine, ids, begin=begin, cfg_scale=1.5)
    bound = Score(engine, ids, begin=begin, cfg_scale=1.5, samples=3)
    run(engine, chain, bound)
    noisy = torch.tensor([*ids[:-1], engine.mask_id])
    expected = log_probs(engine.model, noisy, engine.mask_id, 1.5)[-1, ids[-1]]
    assert chain.tokens[-1].logprob == pytest.approx(float(expected), rel=1e-4)
    assert bound.tokens[-1].logprob == pytest.approx(float(expected), rel=1e-4)


def test_what_is_asked_behind_the_prompt_is_refused(denoiser: Denoiser, ids: list[int]) -> None:
    with pytest.raises(RequestError, match="likelihood_from=99 lies behind the prompt"):
        Score(denoiser.engine, ids, begin=99)
    empty = Score(denoiser.engine, ids, begin=len(ids))
    assert list(empty.requests()) == []


@pytest.mark.parametrize(
    "knobs",
    [{"steps": 2}, {"temperature": 2}, {"threshold": 0.9}, {"cache": "dual"}, {"fixed": {"0": 7}}, {"stop": ["x"]}, {"ignore_eos": True}],
    ids=str,
)  # fmt: skip
def test_a_likelihood_alone_has_no_settings_of_a_reply(post: Call, knobs: dict[str, Any]) -> None:
    body = {"prompt": "Go", "max_tokens": 0, "echo": True, "logprobs": 0}
    (name,) = knobs
    for asked in (body, {"prompt": "Go", "max_tokens": 0, "echo": True}):
        error = post("/v1/completions", {**asked, **knobs}).json()["error"]
        assert error["param"] == name
        assert "is a setting of replies, and max_tokens=0 asks for none" in error["message"]
    sound = {"temperature": 0, "seed": 3, "cfg_scale": 0.5, "stop": [], "ignore_eos": False}
    assert post("/v1/completions", {**body, **sound}).status_code == 200
    assert post("/v1/completions", {**body, **knobs, "max_tokens": 8}).status_code == 200


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_a_prompt_is_scored_over_http(
    post: Call, denoiser: Denoiser, ids: list[int], max_tokens: int
) -> None:
    """Token ids and text, several prompts, choices that share a prompt; whole and streamed."""
    body = {"prompt": [ids, ids[:3]], "max_tokens": max_tokens, "echo": True, "logprobs": 2, "n": 2}
    reply = post("/v1/completions", body).json()
    score = Score(denoiser.engine, ids, num_top=2)
    run(denoiser.engine, score)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    for choice in reply["choices"][:2]:
        found = choice["logprobs"]
        end = len(ids)
        assert choice["text"].startswith(TEXT)
        assert len(found["tokens"]) == len(found["token_logprobs"]) <= end + max_tokens
        assert "".join(found["tokens"][:end]) == TEXT
        assert found["token_logprobs"][:end] == pytest.approx([t.logprob for t in score.tokens], rel=1e-5)
        assert found["text_offset"][:end] == [len("".join(found["tokens"][:i])) for i in range(end)]
        for token, value, top in zip(
            found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
        ):
            assert len(top) == 2
            assert value <= max(top.values())
            assert token not in top or top[token] == value
    usage = reply["usage"]
    assert usage["prompt_tokens"] == len(ids) + 3
    assert usage["completion_tokens"] <= 4 * max_tokens
    assert reply["denoising"]["forwards"] >= len(ids) + 3
    if not max_tokens:
        assert [choice["text"] for choice in reply["choices"]][:2] == [TEXT, TEXT]
        assert {choice["finish_reason"] for choice in reply["choices"]} == {"length"}
    text = post("/v1/completions", {**body, "prompt": TEXT, "n": 1}).json()["choices"][0]["logprobs"]
    assert text["tokens"] == reply["choices"][0]["logprobs"]["tokens"]
    assert text["token_logprobs"] == pytest.approx(
        reply["choices"][0]["logprobs"]["token_logprobs"], rel=1e-4
    )


def test_a_prompt_that_fills_the_context_can_be_scored_alone(post: Call, ids: list[int]) -> None:
    body = {"max_tokens": 0, "echo": True, "logprobs": 0, "likelihood_from": 2047}
    full = post("/v1/completions", {**body, "prompt": (ids * 2048)[:2048]})
    assert full.status_code == 200
    assert full.json()["choices"][0]["logprobs"]["top_logprobs"] is None
    over = post("/v1/completions", {**body, "prompt": (ids * 2048)[:2049]})
    assert over.json()["error"]["code"] == "context_length_exceeded"


def test_lm_eval_scores_choices_and_texts(denoiser: Denoiser, small_model: Path, url: str) -> None:
    """Its local-completions: log p of each continuation by the chain rule, whether it is the greedy one, and texts."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model="tiny",
        tokenizer=str(small_model),
        tokenizer_backend="huggingface",
        batch_size=2,
        max_length=512,
    )
    question = "Question: Which of these do cats like best?\nAnswer:"
    pairs = [(question, choice) for choice in (" fish", " two stones", " Grüße")]
    rows = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found = model.loglikelihood(rows, disable_tqdm=True)
    engine = denoiser.engine
    for (context, choice), (value, is_greedy) in zip(pairs, found, strict=True):
        given, whole = (encode_texts(engine.tokenizer, [text])[0] for text in (context, context + choice))
        score = Score(engine, whole, begin=len(given), num_top=1)
        run(engine, score)
        assert value == pytest.approx(sum(token.logprob or 0 for token in score.tokens), rel=1e-4)
        assert is_greedy is all(token.top[0][1] == token.logprob for token in score.tokens if token.top)
    (rolled,) = model.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, ("One, two",), 0)], disable_tqdm=True
    )
    assert rolled < 0
    asked = Instance("generate_until", {}, (question, {"until": ["\n"], "max_gen_toks": 6}), 0)
    (text,) = model.generate_until([asked], disable_tqdm=True)
    body = {"prompt": question, "max_tokens": 6, "stop": ["\n"], "temperature": 0}
    assert text == httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"]


def test_real_questions_have_the_scores_that_an_evaluation_gives_them(
    small_model: Path, url: str, shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm_eval's own evaluator over HTTP, and on the checkpoint itself, with the chain rule: the same log p of each choice. Answers
    to be written are what the endpoint writes."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    from llada.evals.harness import HarnessModel

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def task(name: str, **more: Any) -> dict[str, Any]:
        lines = (shared_dir / "data" / "eval" / f"{name}.jsonl").read_text().splitlines()
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[:2]))
        files = {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}}
        place = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        return {"task": name, **place, "doc_to_text": "Question: {{question}}\nAnswer:", **more}

    choosing = task(
        "arc_challenge", output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target="label"
    )
    writing = task("gsm8k", output_type="generate_until", doc_to_target="{{answer}}")
    writing["generation_kwargs"] = {"until": ["Question:"], "max_gen_toks": 6, "temperature": 0}

    def answers(model: Any, *tasks: dict[str, Any]) -> dict[str, list[Any]]:
        manager = TaskManager(include_defaults=False)
        found = simple_evaluate(
            model, tasks=[*tasks], task_manager=manager, log_samples=True, bootstrap_iters=0
        )
        assert found is not None
        return {name: [one["resps"] for one in samples] for name, samples in found["samples"].items()}

    served = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model="tiny",
        tokenizer=str(small_model),
        tokenizer_backend="huggingface",
        batch_size=4,
        max_length=2048,
    )
    over_http = answers(served, choosing, writing)
    local = answers(HarnessModel.from_arguments(str(small_model), rule="left_to_right"), choosing)
    for told, known in zip(over_http["arc_challenge"], local["arc_challenge"], strict=True):
        assert len(told) == len(known) == 4
        assert [float(one[0][0]) for one in told] == pytest.approx(
            [float(one[0][0]) for one in known], rel=1e-4
        )
    lines = [json.loads(line) for line in (tmp_path / "gsm8k.jsonl").read_text().splitlines()]
    for line, ((text,),) in zip(lines, over_http["gsm8k"], strict=True):
        prompt = f"Question: {line['question']}\nAnswer:"
        body = {"prompt": prompt, "max_tokens": 6, "stop": ["Question:"], "temperature": 0}
        assert text == httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"]
