"""The command `quickstart`: every stage on this machine, from raw text to a streamed chat answer.

The default corpus is what every Python has: its documentation topics and the standard library's docstrings, from which
the question-answer pairs come too. Nothing is downloaded. Each stage is the one that runs on a cluster; a second call
skips what is finished, and an interrupted one goes on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from llada.config import Recipe
from llada.data.read.listing import list_inputs
from llada.data.read.python_docs import python_documents, python_questions
from llada.data.work.config import PrepareConfig
from llada.errors import UserError
from llada.evals.evaluation import EvaluateConfig
from llada.files import write_bytes
from llada.model.transformer import Transformer
from llada.presets import get_preset
from llada.sampling.completions import complete_texts
from llada.tokenizer import load_tokenizer
from pipelines.evaluate import evaluate
from pipelines.prepare import prepare
from pipelines.pretrain import pretrain
from pipelines.sft import sft
from pipelines.stage.cluster import ClusterConfig, connect, load_cluster
from pipelines.stage.command import exit_codes, parse, run_command
from pipelines.stage.own_ray import is_own_ray
from pipelines.stage.tracking import Tracker, tracked

PROMPT = "The function returns"
QUESTION = "What does os.path.join do?"
SECTION_CHARS = 2000  # of the user's own long texts
OWN_TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class QuickstartArgs:
    """Prepare, pretrain, fine-tune, evaluate, serve and chat, in one go."""

    output: str = "quickstart"
    """Folder for everything it makes."""
    preset: str = "tiny"
    """Recipe to run."""
    input: tuple[str, ...] = ()
    """Your own text instead of Python's documentation: what `prepare` reads, such as .txt and .jsonl.gz."""
    sft_input: tuple[str, ...] = ()
    """Your own conversations instead of questions about the standard library."""
    validation_fraction: float | None = None
    """Share of the documents held out; default the preset's, for your own text a fifth of the first megabyte."""
    question: str = QUESTION
    """Asked at the end."""
    cluster: str | None = None
    """Cluster file; without one, a Ray of its own on this machine."""
    pretrain_steps: int | None = None
    """Override the preset's number of pretraining steps."""
    sft_steps: int | None = None
    """Override the preset's number of fine-tuning steps."""
    progress: bool = True


def main(argv: Sequence[str]) -> None:
    """`llada quickstart …`"""
    args = parse(QuickstartArgs, argv, "quickstart")
    with exit_codes("quickstart", args.output):
        quickstart(args)


def quickstart(args: QuickstartArgs) -> dict[str, Any]:
    """Run all stages and print a summary; the figures it shows. Raises UserError like the stages."""
    import ray.serve  # noqa: F401 (before `connect`, which sends to the log what Ray's loggers would print)

    recipe = _with_steps(get_preset(args.preset), args)
    root = Path(args.output).absolute()
    cluster = load_cluster(args.cluster)
    started = time.perf_counter()
    texts = list(args.input) or [_write_once(root / "corpus" / "python.jsonl", _documents())]
    pairs = list(args.sft_input) or [_write_once(root / "corpus" / "questions.jsonl", python_questions())]
    data, pretrained, sft_data, model, evaluation = (
        str(root / name) for name in ("data", "pretrained", "sft_data", "model", "evaluation")
    )
    # Of a folder that holds the output too, what this command writes is no text.
    written = [str(root)]
    common: dict[str, Any] = {"cluster": cluster, "progress": args.progress}
    with connect(cluster, root / "logs") as log:
        _say(f"working in {root}; Ray's log is {log}")
        with _stage("prepare", data, args.preset) as tracker:
            prepared = prepare(
                _prepare_config(recipe, args),
                inputs=texts,
                written=written if args.input else (),
                output=data,
                tracker=tracker,
                preset=args.preset,
                **common,
            )
        before = _untrained_sample(recipe, data)
        with _stage("pretrain", pretrained, args.preset) as tracker:
            first = pretrain(recipe, data=data, output=pretrained, tracker=tracker, **common)
        sft_config = replace(recipe.sft_prepare, tokenizer=str(Path(data) / "tokenizer"))
        with _stage("prepare", sft_data, args.preset) as tracker:
            prepare(
                sft_config,
                inputs=pairs,
                written=written if args.sft_input else (),
                output=sft_data,
                tracker=tracker,
                preset=args.preset,
                **common,
            )
        with _stage("sft", model, args.preset) as tracker:
            second = sft(recipe, model=pretrained, data=sft_data, output=model, tracker=tracker, **common)
        config = EvaluateConfig(
            prompts=(PROMPT,), sampling=recipe.sampling, document_mask=recipe.pretrain.objective.document_mask
        )
        with _stage("evaluate", evaluation, args.preset) as tracker:
            results = evaluate(
                config, model=pretrained, data=data, output=evaluation, tracker=tracker, **common
            )["results"]
        _say(f"serve: {args.question}")
        answer = _serve_and_ask(model, args.question, recipe, cluster, str(log))
    figures = {
        "root": str(root),
        "seconds": time.perf_counter() - started,
        "prepared": prepared["counts"],
        "pretrain": first["counts"],
        "sft": second["counts"],
        "evaluation": {k: v for k, v in results.items() if k not in ("samples", "settings")},
        "before": before,
        "after": results["samples"][0]["text"],
        **answer,
    }
    write_bytes(str(root / "summary.json"), (json.dumps(figures, indent=2) + "\n").encode())
    print(_summary(figures))
    return figures


def _with_steps(recipe: Recipe, args: QuickstartArgs) -> Recipe:
    for name, steps in (("pretrain", args.pretrain_steps), ("sft", args.sft_steps)):
        if steps is not None:
            run = getattr(recipe, name)
            recipe = replace(recipe, **{name: replace(run, train=replace(run.train, num_steps=steps))})
    return recipe


def _prepare_config(recipe: Recipe, args: QuickstartArgs) -> PrepareConfig:
    """The preset's preparation; for the user's own text made to hold something out of little or of one long text."""
    config = recipe.prepare
    if args.input:
        files = list_inputs(args.input, written=[args.output])
        size = sum(file.size or 0 for file in files)
        share = min(0.2, max(config.validation_fraction, 0.2 * OWN_TEXT_BYTES / max(size, 1)))
        read = replace(config.read, min_chars=1, section_chars=SECTION_CHARS)
        config = replace(config, read=read, validation_fraction=share)
    if args.validation_fraction is not None:
        config = replace(config, validation_fraction=args.validation_fraction)
    return config


def _stage(name: str, output: str, preset: str) -> AbstractContextManager[Tracker]:
    _say(f"{name} → {output}")
    return tracked(name, output, preset=preset)


def _say(text: str) -> None:
    print(f"· {text}", file=sys.stderr, flush=True)


def _documents() -> Iterable[dict[str, str]]:
    return ({"text": document.text} for document in python_documents())


def _write_once(path: Path, records: Iterable[dict[str, Any]]) -> str:
    """Write JSON lines unless they are there: a new file would count as another input."""
    if not path.is_file():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_bytes(str(path), lines.encode())
    return str(path)


def _untrained_sample(recipe: Recipe, data: str) -> str:
    """What the network writes before it has learned anything."""
    tokenizer = load_tokenizer(Path(data) / "tokenizer")
    network = Transformer(recipe.model)
    network.init_weights(recipe.pretrain.train.seed)
    return complete_texts(network.eval(), tokenizer, [PROMPT], recipe.sampling, seed=0)[0]["text"]


def _serve_and_ask(
    model: str, question: str, recipe: Recipe, cluster: ClusterConfig, log: str
) -> dict[str, Any]:
    """Start the endpoint, ask one question as a stream, print the answer as it comes, stop the endpoint."""
    from ray.serve import delete

    from pipelines.serve import APP_NAME, serve, start_app
    from pipelines.serving.args import ServeArgs
    from pipelines.serving.listener import open_port

    args = ServeArgs(model=model, sampling=replace(recipe.sampling, steps=None))
    with ExitStack() as stack:
        if is_own_ray():
            port = stack.enter_context(open_port("127.0.0.1", 0))
            start_app(args, log, port)
            url = port.url
        else:
            url = serve(args, cluster, blocking=False)
        stack.callback(delete, APP_NAME)
        body = {"messages": [{"role": "user", "content": question}], "stream": True, "seed": 0}
        pieces: list[str] = []
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as response:
            if response.status_code != 200:
                raise UserError(f"the endpoint refused the question: {response.read().decode()}")
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                if text := json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    pieces.append(text)
                    print(text, end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    return {"question": question, "answer": "".join(pieces), "chunks": len(pieces), "requests": 1}


def _summary(f: dict[str, Any]) -> str:
    """One screen."""
    counts, run, tuned, held_out = f["prepared"], f["pretrain"], f["sft"], f["evaluation"]
    root = f["root"]
    minutes = f["seconds"] / 60

    def shown(text: str) -> str:
        line = " ".join(text.split())
        return line if len(line) <= 150 else line[:149] + "…"

    return "\n".join(
        [
            "",
            f"done in {minutes:.1f} minutes (training {run['seconds'] / 60:.1f}, fine-tuning {tuned['seconds'] / 60:.1f})",
            "",
            f"prepared     {counts['train_tokens']:,} training tokens, {counts['validation_tokens']:,} held out",
            f"pretraining  loss {run['train_loss']:.3f} nats/token · {run['tokens_per_second']:,.0f} tokens/s",
            f"held out     bound {held_out['nats_per_token']:.3f} ± {held_out['standard_error']:.3f} nats/token, "
            f"perplexity ≤ {held_out['perplexity_bound']:.1f}",
            f"             = {held_out['ratio_to_unigram']:.2f} × the unigram baseline "
            f"({held_out['unigram_nats_per_token']:.3f} nats/token)",
            f"fine-tuning  loss {tuned['train_loss']:.3f}, held out {tuned['validation_loss']:.3f} nats/token",
            "",
            f"“{PROMPT}” before   {shown(f['before'])}",
            f"“{PROMPT}” after    {shown(f['after'])}",
            f"served       {f['requests']} request, {f['chunks']} chunks: “{f['question']}”",
            f"             {shown(f['answer']) or '(empty)'}",
            "",
            f"loss curve   {root}/pretrained/loss.png",
            f"checkpoint   {root}/model",
            f"MLflow       sqlite:///{root}/mlflow.db",
            "",
            "next         llada serve --model " + f"{root}/model",
            "             llada quickstart --input my.jsonl --output mine",
            f"             mlflow ui --backend-store-uri sqlite:///{root}/mlflow.db",
        ]
    )


if __name__ == "__main__":
    run_command("quickstart")
