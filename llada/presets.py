"""Presets: functions that return a complete `Recipe`.

tiny         1 M parameters, learns the Python documentation in minutes on two CPU cores
mdlm_small   MDLM's OpenWebText model and objective (arXiv 2406.07524), on this network
mdlm_lm1b    the same on the One Billion Word Benchmark, 128 tokens
llada_1b     LLaDA's 1B (arXiv 2502.09992, Table 5)
llada_8b     LLaDA-8B
illada_8b    iLLaDA-8B (arXiv 2606.25331)

`twin` makes of each its autoregressive or its BERT baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from llada.config import Recipe
from llada.data.dedup.steps import DedupConfig
from llada.data.work.config import PrepareConfig
from llada.data.work.read_config import ReadConfig
from llada.diffusion.embedding_noise import EmbeddingNoiseConfig
from llada.diffusion.objective import ObjectiveConfig
from llada.diffusion.time import TimeConfig
from llada.model.transformer import ModelConfig
from llada.registry import Registry
from llada.sampling.config import SamplingConfig
from llada.training.optim import OptimConfig
from llada.training.run import RunConfig, TrainConfig

LLADA_TOKENIZER = "GSAI-ML/LLaDA-8B-Base"  # a local copy of this folder goes into --tokenizer
SFT_DATA = PrepareConfig(
    kind="sft", row_length=4096, validation_fraction=0.01, too_long="truncate_prompt", turns="random"
)


def tiny() -> Recipe:
    """For a laptop, the embedded default of `llada quickstart`: 1 M parameters, about five minutes on two CPU cores.

    What gets so small a model off the unigram plateau so early, by experiment: noise levels between 0.1 and 0.8 drawn
    uniformly in log t (every row then weighs the same; with 1/t weights over [0, 1] it has learned nothing yet after the
    same time), Muon on the matrices, short rows with rotary positions that turn fast, a small vocabulary.
    """
    row_length = 64
    model = ModelConfig(
        vocab_size=512,
        d_model=128,
        num_layers=4,
        num_heads=4,
        ffn_dim=384,
        max_length=256,
        rope_theta=100.0,
        mask_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    prepare = PrepareConfig(
        row_length=row_length,
        train_tokenizer_vocab=512,
        tokenizer_sample_bytes=4 << 20,
        validation_fraction=0.05,
        read=ReadConfig(min_chars=100),
        rows_per_shard=8192,
        unit_bytes=1 << 20,
    )
    pretrain = RunConfig(
        objective=ObjectiveConfig(
            time=TimeConfig(density="importance", t_min=0.1, t_max=0.8), document_mask=False
        ),
        optim=OptimConfig(
            optimizer="muon",
            lr=3e-3,
            muon_lr=1e-2,
            weight_decay=0.0,
            warmup_steps=30,
            decay_fraction=0.4,
            final_lr_ratio=0.01,
        ),
        train=TrainConfig(
            num_steps=1100,
            global_batch_tokens=32 * row_length,
            micro_batch_rows=32,
            log_every=10,
            validate_every=250,
            validation_rows=256,
            samples=2,
            checkpoint_every=250,
        ),
    )
    sft = replace(
        pretrain,
        optim=replace(pretrain.optim, lr=1e-3, muon_lr=3e-3, warmup_steps=10),
        train=replace(
            pretrain.train,
            num_steps=150,
            global_batch_tokens=16 * 128,
            validate_every=75,
            checkpoint_every=75,
        ),
    )
    return Recipe(
        model=model,
        prepare=prepare,
        pretrain=pretrain,
        sft_prepare=replace(
            prepare,
            kind="sft",
            row_length=128,
            train_tokenizer_vocab=None,
            read=ReadConfig(),
            too_long="drop",
        ),
        sft=sft,
        sampling=SamplingConfig(gen_length=48, steps=48, block_length=8, temperature=0.5),
    )


def mdlm_small() -> Recipe:
    """MDLM's OpenWebText run: 12 × 768, 1024 tokens, batch 512, one million steps; SUBS, log-linear schedule.

    The objective and the optimiser are MDLM's; the network is this repository's (SwiGLU, RMSNorm) at its size, and rows are
    documents with EOS behind each, without MDLM's BOS and EOS around every row.
    """
    return _mdlm(
        "gpt2",
        row_length=1024,
        vocab_size=50_304,  # GPT-2's 50,257, a mask and chat markers, padded to a multiple of 64
        mask_token_id=50_257,
        eos_token_id=50_256,
        pad_token_id=50_256,
    )


def mdlm_lm1b() -> Recipe:
    """The One Billion Word Benchmark as BD3-LM has it (arXiv 2503.09573, Table 3): sentences wrapped into rows of 128, batch
    512, one million steps, 65 B tokens; MDLM comes to a perplexity of at most 31.78 there. (MDLM's own 27.04 is of sentences
    padded to 128 each.)"""
    return _mdlm(
        "bert-base-uncased",
        row_length=128,
        vocab_size=30_528,  # BERT's 30,522, end and begin of text and chat markers, padded to a multiple of 32
        mask_token_id=103,
        eos_token_id=30_522,
        pad_token_id=0,
    )


def _mdlm(tokenizer: str, *, row_length: int, vocab_size: int, **tokens: Any) -> Recipe:
    """MDLM's small model and training (configs/config.yaml), for rows of this length."""
    model = ModelConfig(
        vocab_size=vocab_size,
        d_model=768,
        num_layers=12,
        num_heads=12,
        ffn_dim=2048,
        max_length=row_length,
        rope_theta=10_000.0,
        **tokens,
    )
    run = RunConfig(
        objective=ObjectiveConfig(
            schedule="loglinear", time=TimeConfig(t_min=1e-3), subs=True, document_mask=False
        ),
        optim=OptimConfig(
            lr=3e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup_steps=2500, decay_fraction=0.0
        ),
        train=TrainConfig(
            num_steps=1_000_000,
            global_batch_tokens=512 * row_length,
            micro_batch_rows=32,
            precision="bf16",
            validate_every=10_000,
            validation_rows=1024,
            checkpoint_every=5_000,
            ema_decay=0.9999,
            compile=True,
        ),
    )
    sft = replace(
        run,
        optim=replace(run.optim, lr=1e-4, warmup_steps=200, decay_fraction=0.1),
        train=replace(
            run.train,
            ema_decay=None,
            num_steps=None,
            num_epochs=3.0,
            global_batch_tokens=256 * row_length,
            validate_every=500,
        ),
    )
    return Recipe(
        model=model,
        prepare=PrepareConfig(row_length=row_length, tokenizer=tokenizer, validation_fraction=0.01),
        pretrain=run,
        sft_prepare=replace(SFT_DATA, row_length=row_length, tokenizer=tokenizer),
        sft=sft,
        sampling=SamplingConfig(
            gen_length=row_length, steps=row_length, block_length=row_length, remasking="ancestral"
        ),
    )


def _llada(model: ModelConfig, *, num_steps: int, optim: OptimConfig, micro_batch_rows: int) -> Recipe:
    run = RunConfig(
        objective=ObjectiveConfig(
            schedule="llada", document_mask=False, random_length=0.01, time=TimeConfig(sampling="stratified")
        ),
        optim=optim,
        train=TrainConfig(
            num_steps=num_steps,
            global_batch_tokens=1280 * 4096,
            micro_batch_rows=micro_batch_rows,
            precision="bf16",
            validate_every=2000,
            validation_rows=1024,
            checkpoint_every=1000,
            activation_checkpointing="full",
            compile=True,
        ),
    )
    # SFT (§2.3, B.1): 3 epochs, 2.5e-5 after 50 steps, last tenth linear to 2.5e-6, 256 rows a batch.
    sft = replace(
        run,
        optim=OptimConfig(lr=2.5e-5, warmup_steps=50, decay_fraction=0.1, final_lr_ratio=0.1),
        train=replace(
            run.train,
            num_steps=None,
            num_epochs=3.0,
            global_batch_tokens=256 * 4096,
            micro_batch_rows=2,
            validate_every=500,
        ),
    )
    return Recipe(
        model=model,
        prepare=PrepareConfig(
            row_length=4096, tokenizer=LLADA_TOKENIZER, validation_fraction=0.0005, dedup=DedupConfig()
        ),
        pretrain=run,
        sft_prepare=replace(SFT_DATA, tokenizer=LLADA_TOKENIZER),
        sft=sft,
        sampling=SamplingConfig(gen_length=128, steps=128, block_length=32),
    )


_LLADA_TOKENS: dict[str, Any] = {"mask_token_id": 126_336, "eos_token_id": 126_081, "pad_token_id": 126_081}


def llada_1b() -> Recipe:
    """LLaDA 1B: 22 layers, 4 KV heads; 4e-4 held without decay; 400 B tokens (ML-GSAI/LLaDA#55)."""
    model = ModelConfig(
        vocab_size=126_464,
        d_model=2048,
        num_layers=22,
        num_heads=32,
        num_kv_heads=4,
        ffn_dim=5634,
        **_LLADA_TOKENS,
    )
    optim = OptimConfig(lr=4e-4, warmup_steps=2000, decay_fraction=0.0)
    return _llada(model, num_steps=76_294, optim=optim, micro_batch_rows=8)


def llada_8b() -> Recipe:
    """LLaDA 8B (§2.2): 2.3 T tokens; 4e-4, from 1.2 T tokens on 1e-4, the last 0.3 T linear to 1e-5."""
    model = ModelConfig(
        vocab_size=126_464, d_model=4096, num_layers=32, num_heads=32, ffn_dim=12_288, **_LLADA_TOKENS
    )
    optim = OptimConfig(
        lr=4e-4, warmup_steps=2000, drops=((1.2 / 2.3, 0.25),), decay_fraction=0.3 / 2.3, final_lr_ratio=0.025
    )
    return _llada(model, num_steps=438_690, optim=optim, micro_batch_rows=4)


def illada_8b() -> Recipe:
    """iLLaDA 8B: 8 KV heads, tied embeddings, 8192 tokens, mask id 5, documents do not see each other, three rows in ten are
    split in two; 12 T tokens at 2e-4, then by cosine to 5e-6. Fine-tuning is unified: prompts are learned too, 12 epochs.

    The paper began the decay when the loss had reached a plateau, and does not say when; here it is the last tenth. Nor does
    it give the batches and the warm-up: those of LLaDA, in tokens.
    """
    model = ModelConfig(
        vocab_size=155_136,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        ffn_dim=14_336,
        max_length=8192,
        tie_embeddings=True,
        mask_token_id=5,
    )
    optim = OptimConfig(lr=2e-4, warmup_steps=2000, decay="cosine", decay_fraction=0.1, final_lr_ratio=0.025)
    recipe = _llada(model, num_steps=2_288_818, optim=optim, micro_batch_rows=2)
    run = replace(
        recipe.pretrain,
        objective=replace(recipe.pretrain.objective, document_mask=True, random_length=0.0, random_split=0.3),
        train=replace(recipe.pretrain.train, global_batch_tokens=640 * 8192),
    )
    sft = replace(
        recipe.sft,
        objective=replace(run.objective, random_split=0.0),
        optim=replace(recipe.sft.optim, lr=5e-6),
        train=replace(recipe.sft.train, num_epochs=12.0, global_batch_tokens=128 * 8192),
    )
    tokenizer = "GSAI-ML/iLLaDA-8B-Base"
    return replace(
        recipe,
        pretrain=run,
        prepare=replace(recipe.prepare, row_length=8192, tokenizer=tokenizer),
        sft_prepare=replace(recipe.sft_prepare, kind="unified", row_length=8192, tokenizer=tokenizer),
        sft=sft,
    )


PRESETS: Registry[Callable[[], Recipe]] = Registry(
    "preset",
    {preset.__name__: preset for preset in (tiny, mdlm_small, mdlm_lm1b, llada_1b, llada_8b, illada_8b)},
)
"""By name. A new one is a function above and its name here."""


def get_preset(name: str) -> Recipe:
    """The recipe of this name. Raises UserError naming the nearest."""
    return PRESETS.find(name)()


Twin = Literal["ar", "bert"]


def twin(recipe: Recipe, kind: Twin) -> Recipe:
    """The same network on the same data and budget with another objective, for fair comparisons.

    "ar" predicts the next token with causal attention: what the mask costs. "bert" masks a fixed 15 %: what it is worth to
    learn all noise levels.
    """
    is_causal = kind == "ar"

    def learn(run: RunConfig) -> RunConfig:
        objective = replace(
            run.objective,
            kind="autoregressive" if is_causal else "masked_diffusion",
            schedule=run.objective.schedule if is_causal else "bert",
            time=TimeConfig(),
            attention_annealing_steps=0 if is_causal else run.objective.attention_annealing_steps,
            embedding_noise=EmbeddingNoiseConfig() if is_causal else run.objective.embedding_noise,
        )
        train = replace(run.train, samples=0) if is_causal else run.train  # it does not write by unmasking
        return replace(run, objective=objective, train=train)

    # Who reads the next token at each position has nothing to shift.
    model = replace(
        recipe.model, causal=is_causal, block_length=None, shift=recipe.model.shift and not is_causal
    )
    return replace(recipe, model=model, pretrain=learn(recipe.pretrain), sft=learn(recipe.sft))
