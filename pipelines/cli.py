"""The command line: `llada <command> …`, the same as `python -m pipelines.<command> …`.

This file only knows the commands' names and loads the one that is called (pipelines/stage/command.py), so that `--help`
comes at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llada.errors import hint

# A command is the file of its name in this folder, with _ for -.
COMMANDS = {
    "prepare": "raw text to token shards",
    "pretrain": "token shards to a checkpoint",
    "sft": "checkpoint and conversations to a fine-tuned checkpoint",
    "evaluate": "perplexity, samples and benchmarks of a checkpoint; two results compared",
    "generate": "batch inference over a file of prompts",
    "serve": "an OpenAI-compatible endpoint",
    "quickstart": "everything above on this machine, in minutes",
    "plan": "days, dollars and memory of a run; what to train with a budget",
    "convert": "layouts: checkpoints (LLaDA, iLLaDA, Llama), token data (Megatron)",
    "train-classifier": "labelled documents to a quality filter for prepare",
    "submit": "a stage as a job of a Ray cluster; list, follow, stop",
    "deploy": "a Serve configuration on a running cluster",
    "promote": "which version of a registered model is the champion; roll-back",
    "lineage": "what an answer, a checkpoint or data came from",
    "track": "to MLflow, what stages could not deliver",
    "check": "files for a cluster: Serve configurations, KubeRay's objects, cluster files",
}
# The names of llada.presets.PRESETS, which takes seconds to import.
PRESETS = ("tiny", "mdlm_small", "mdlm_lm1b", "llada_1b", "llada_8b", "illada_8b")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `llada` command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if words else 2)
    name = words[0]
    if name not in COMMANDS:
        print(f"llada: no command {name!r}; {hint(name, COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    try:
        # Not above: it takes a second, which `llada --help` and a mistyped name need not wait for.
        from pipelines.stage.command import run_command
    except KeyboardInterrupt:
        print(f"llada {name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None

    run_command(name, words[1:], ends_process=argv is None)


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "usage: llada <command> …      llada <command> --help",
            "",
            *(f"  {name:<{width}}{text}" for name, text in COMMANDS.items()),
            "",
            f"presets: {', '.join(PRESETS)}",
        ]
    )


if __name__ == "__main__":
    main()
