"""The command line: `llada <stage> …`, the same as `python -m pipelines.<stage> …`.

Options are the fields of the stages' dataclasses, typed and strict: `--optim.lr 1e-3`, and a mistyped one is refused
with the nearest name. A preset, or the JSON file of a recipe, gives the defaults. Exit code 0 only when the output is
complete; 1 with one line for what the user can mend, 2 for a wrong command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from llada.config import Recipe
from llada.data.filters.classifier import ClassifierConfig, read_labels, train_classifier
from llada.data.tokens.packing import Packing
from llada.data.work.config import PrepareConfig, SourceConfig
from llada.data.work.read_config import ReadConfig
from llada.files import exists, join
from llada.model.hf import Layout
from llada.model.transformer import ModelConfig
from llada.plan import format_plan, plan
from llada.presets import PRESETS, get_preset
from llada.settings import from_dict, from_json, merge_settings
from llada.training.batches import ObjectiveConfig
from llada.training.optim import OptimConfig
from llada.training.trainer import RunConfig, TrainConfig
from pipelines.convert import convert_checkpoint, convert_tokens, is_tokens
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.generate import GenerateConfig, generate
from pipelines.prepare import prepare
from pipelines.pretrain import pretrain
from pipelines.sft import sft
from pipelines.stage.artifact import StageError
from pipelines.stage.cluster import ClusterConfig, load_cluster
from pipelines.stage.tracking import tracked

Flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Common:
    """Where a stage runs, writes and is tracked."""

    output: str
    """Folder to write, any fsspec URL. A finished one is kept as it is, an unfinished one is completed."""
    cluster: str | None = None
    """Cluster file (ray_configs/*.yaml); without one, a Ray of its own on this machine."""
    tracking_uri: str | None = None
    """MLflow; default $MLFLOW_TRACKING_URI, else an sqlite file beside the output."""
    resume: bool = False
    """Insist that the output was begun before (going on is the default anyway)."""
    progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True)
class PrepareArgs:
    """Raw text to token shards."""

    common: Annotated[Common, Flat]
    config: Annotated[PrepareConfig, Flat]
    input: tuple[str, ...] = ()
    """Files, folders, globs, or @ and a list of files: .jsonl .txt .warc (each also .gz .zst), .parquet."""
    mixture: str | None = None
    """YAML file of several weighted sources instead: {name: {input: [...], weight: 0.7, read: {filters: [web]}}}."""


@dataclass(frozen=True)
class TrainClassifierArgs:
    """Labelled documents to a quality classifier, for the filter `classifier`."""

    input: tuple[str, ...]
    """Files of {"text", "label"}, label 1 for what is to be kept and 0 for what is not."""
    output: str
    """Folder to write."""
    train_classifier: bool = True
    text_field: str = "text"
    label_field: str = "label"
    config: Annotated[ClassifierConfig, Flat] = field(default_factory=ClassifierConfig)


@dataclass(frozen=True)
class PretrainArgs:
    """Token shards to a checkpoint folder."""

    data: str
    """A prepared folder."""
    common: Annotated[Common, Flat]
    model: ModelConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    train: TrainConfig


@dataclass(frozen=True)
class SftArgs:
    """A checkpoint and prepared conversations to a fine-tuned checkpoint folder."""

    model: str
    """Checkpoint folder to start from: ours, GSAI-ML/LLaDA's or iLLaDA's."""
    data: str
    """A folder prepared with --kind sft."""
    common: Annotated[Common, Flat]
    objective: ObjectiveConfig
    optim: OptimConfig
    train: TrainConfig


@dataclass(frozen=True)
class EvaluateArgs:
    """A checkpoint's perplexity bound and samples."""

    model: str
    """Checkpoint folder."""
    common: Annotated[Common, Flat]
    data: str | None = None
    """A prepared folder, for the perplexity bound."""
    config: Annotated[EvaluateConfig, Flat] = EvaluateConfig()


@dataclass(frozen=True)
class GenerateArgs:
    """Batch inference over a file of prompts."""

    model: str
    """Checkpoint folder."""
    prompts: str
    """JSON lines with "prompt" or "messages", or .txt with one prompt a line."""
    common: Annotated[Common, Flat]
    config: Annotated[GenerateConfig, Flat] = GenerateConfig()


@dataclass(frozen=True)
class PlanArgs:
    """What a pretraining run costs before it is started."""

    gpus: int = 8
    gpu: str = "h100"
    """h100, h200, h800, a100, b200."""
    mfu: float = 0.35
    """Assumed model FLOPs utilisation."""


@dataclass(frozen=True)
class ConvertArgs:
    """Rewrite a checkpoint folder in another layout, bit for bit; or token data from and to Megatron's .idx/.bin."""

    source: tyro.conf.Positional[str]
    """A checkpoint folder, a prepared folder, or PREFIX.idx of Megatron data."""
    target: tyro.conf.Positional[str]
    """A folder; of Megatron data a prefix, completed by -train.idx and so on."""
    layout: Layout | None = None
    """Of the target: ours, llada (GSAI-ML/LLaDA), llama (standard names). Default: the other one."""
    mask_token_id: int | None = None
    """Makes an autoregressive checkpoint bidirectional, with this row as the mask."""
    tokenizer: str | None = None
    """Folder of the tokenizer that made the Megatron data."""
    row_length: int | None = None
    """Tokens per row to pack Megatron data into."""
    packing: Packing = "concatenate_and_cut"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `llada` command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _quiet()
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if argv else 2)
    name = argv[0]
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(STAGES)}"
        print(f"llada: no command {name!r}; {hint}", file=sys.stderr)
        raise SystemExit(2)
    try:
        STAGES[name][0](argv[1:])
    except (StageError, ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("LLADA_TRACEBACK"):
            raise
        print(f"llada {name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"llada {name}: interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _quiet() -> None:
    """Our own warnings show as single lines; those of libraries that users cannot act on do not."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", module=r"(torch|ray|mlflow|transformers|pydantic|google)\b.*")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")


def _usage() -> str:
    lines = ["usage: llada <command> …      llada <command> --help", ""]
    lines += [f"  {name:<11}{text}" for name, (_, text) in STAGES.items()]
    lines += ["", f"presets: {', '.join(PRESETS)}"]
    return "\n".join(lines)


def _recipe(argv: list[str], command: str) -> tuple[Recipe, list[str]]:
    """The preset named by the first argument (or a recipe's JSON file), and the rest of the arguments."""
    if not argv or argv[0].startswith("-"):
        if any(flag in argv for flag in ("-h", "--help")):
            return get_preset("tiny"), argv
        raise StageError(f"name a preset first: llada {command} <{'|'.join(PRESETS)}|recipe.json> …")
    if argv[0].endswith(".json"):
        return from_json(Recipe, Path(argv[0]).read_text()), argv[1:]
    return get_preset(argv[0]), argv[1:]


def parse(kind: type, argv: list[str], command: str, **defaults: Any) -> Any:
    """Arguments of a stage; `defaults` are the fields' values where the command line says nothing."""
    default = tyro.MISSING_NONPROP
    if defaults:
        unset = {
            f.name: tyro.MISSING_NONPROP if f.default is dataclasses.MISSING else f.default
            for f in dataclasses.fields(kind)
        }
        default = kind(**unset | defaults)
    return tyro.cli(kind, args=argv, prog=f"llada {command}", default=default)


def _run(
    stage: str, function: Callable[..., dict[str, Any]], common: Common, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Call a stage inside its MLflow run; its manifest."""
    if common.resume and not exists(join(common.output, "stage.json")):
        raise StageError(f"--resume: nothing was begun in {common.output}")
    cluster = load_cluster(common.cluster) if common.cluster else ClusterConfig()
    with tracked(stage, common.output, uri=common.tracking_uri) as tracker:
        return function(
            *args,
            output=common.output,
            cluster=cluster,
            tracker=tracker,
            progress=common.progress,
            **kwargs,
        )


def _prepare(argv: list[str]) -> None:
    if "--train-classifier" in argv:
        _train_classifier(argv)
        return
    recipe, rest = _recipe(argv, "prepare")
    words = [word for pair in rest for word in pair.split("=", 1)]
    is_sft = "--kind" in words and words[words.index("--kind") + 1 :][:1] == ["sft"]
    config = recipe.sft_prepare if is_sft else recipe.prepare
    if "--tokenizer" in words:
        config = replace(config, train_tokenizer_vocab=None)
    elif "--train-tokenizer-vocab" in words:
        config = replace(config, tokenizer=None)
    args = parse(PrepareArgs, rest, "prepare <preset>", config=config)
    config = args.config
    if args.mixture:
        config = replace(config, sources=load_mixture(args.mixture, config.read))
    counts = _run("prepare", prepare, args.common, config, inputs=args.input)["counts"]
    print(
        f"{args.common.output}: {counts['train_tokens']:,} training tokens in {counts['train_rows']:,} rows, "
        f"{counts['validation_rows']:,} validation rows"
    )


def load_mixture(path: str, read: ReadConfig) -> tuple[SourceConfig, ...]:
    """The sources of a mixture file; what they do not say of reading is as in `read`. Raises ValueError."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict) or not all(isinstance(source, dict) for source in loaded.values()):
        raise ValueError(f"{path} must hold 'name:' and below it the source's settings")
    return tuple(
        from_dict(
            SourceConfig,
            merge_settings({"read": asdict(read)}, {"name": str(name), **source}),
            f"{path}: {name}.",
        )
        for name, source in loaded.items()
    )


def _train_classifier(argv: list[str]) -> None:
    args = parse(TrainClassifierArgs, argv, "prepare")
    classifier, figures = train_classifier(
        read_labels(args.input, args.text_field, args.label_field), args.config
    )
    classifier.save(args.output)
    print(f"{args.output}: " + ", ".join(f"{name} {value:,.3f}" for name, value in figures.items()))


def _pretrain(argv: list[str]) -> None:
    recipe, rest = _recipe(argv, "pretrain")
    run = recipe.pretrain
    defaults = {"model": recipe.model, "objective": run.objective, "optim": run.optim, "train": run.train}
    args = parse(PretrainArgs, rest, "pretrain <preset>", **defaults)
    recipe = replace(recipe, model=args.model, pretrain=RunConfig(args.objective, args.optim, args.train))
    _print_training(args.common.output, _run("pretrain", pretrain, args.common, recipe, data=args.data))


def _sft(argv: list[str]) -> None:
    recipe, rest = _recipe(argv, "sft")
    run = recipe.sft
    defaults = {"objective": run.objective, "optim": run.optim, "train": run.train}
    args = parse(SftArgs, rest, "sft <preset>", **defaults)
    recipe = replace(recipe, sft=RunConfig(args.objective, args.optim, args.train))
    manifest = _run("sft", sft, args.common, recipe, model=args.model, data=args.data)
    _print_training(args.common.output, manifest)


def _print_training(output: str, manifest: dict[str, Any]) -> None:
    counts = manifest["counts"]
    print(
        f"{output}: {counts['num_steps']:,} steps, {counts['tokens']:,} tokens, validation bound "
        f"{counts['validation_loss']:.4f} nats/token ({counts['validation_ratio']:.2f} × unigram)"
    )


def _evaluate(argv: list[str]) -> None:
    args = parse(EvaluateArgs, argv, "evaluate")
    manifest = _run("evaluate", evaluate, args.common, args.config, model=args.model, data=args.data)
    for key, value in manifest["results"].items():
        if key != "samples":
            print(f"{key:<24}{value:,.4f}" if isinstance(value, float) else f"{key:<24}{value:,}")
    for sample in manifest["results"].get("samples", []):
        print(f"--- {sample['prompt']}\n{sample['text']}")


def _generate(argv: list[str]) -> None:
    args = parse(GenerateArgs, argv, "generate")
    manifest = _run("generate", generate, args.common, args.config, model=args.model, prompts=args.prompts)
    counts = manifest["counts"]
    target = join(args.common.output, "generations.jsonl")
    print(f"{target}: {counts['prompts']:,} answers, {counts['tokens']:,} tokens")
    if counts["refused"]:
        raise StageError(f'{counts["refused"]} prompts were refused; their lines carry an "error"')


def _serve(argv: list[str]) -> None:
    from pipelines.serve import ServeArgs, serve  # Ray Serve and FastAPI take seconds to import

    fields = [("args", Annotated[ServeArgs, Flat]), ("cluster", str | None, None)]
    kind = dataclasses.make_dataclass("ServeCommand", fields, frozen=True)
    kind.__doc__ = "An OpenAI-compatible endpoint of a checkpoint."
    args = parse(kind, argv, "serve")
    serve(args.args, load_cluster(args.cluster) if args.cluster else ClusterConfig())


def _quickstart(argv: list[str]) -> None:
    from pipelines.quickstart import QuickstartArgs, quickstart

    quickstart(parse(QuickstartArgs, argv, "quickstart"))


def _plan(argv: list[str]) -> None:
    recipe, rest = _recipe(argv, "plan")
    args = parse(PlanArgs, rest, "plan <preset>")
    print(format_plan(plan(recipe, gpus=args.gpus, gpu=args.gpu, mfu=args.mfu)))


def _convert(argv: list[str]) -> None:
    args = parse(ConvertArgs, argv, "convert")
    if is_tokens(args.source):
        options = {"tokenizer": args.tokenizer, "row_length": args.row_length, "packing": args.packing}
        print(convert_tokens(args.source, args.target, **options))
    else:
        options = {"layout": args.layout, "mask_token_id": args.mask_token_id}
        print(convert_checkpoint(args.source, args.target, **options))


STAGES: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "prepare": (_prepare, "raw text to token shards"),
    "pretrain": (_pretrain, "token shards to a checkpoint"),
    "sft": (_sft, "checkpoint and conversations to a fine-tuned checkpoint"),
    "evaluate": (_evaluate, "perplexity bound and samples of a checkpoint"),
    "generate": (_generate, "batch inference over a file of prompts"),
    "serve": (_serve, "an OpenAI-compatible endpoint"),
    "quickstart": (_quickstart, "everything above on this machine, in minutes"),
    "plan": (_plan, "memory and time of a pretraining run"),
    "convert": (_convert, "layouts: checkpoints (LLaDA, iLLaDA, Llama), token data (Megatron)"),
}

if __name__ == "__main__":
    main()
