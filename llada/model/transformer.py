"""The network: tokens in, logits out.

A bidirectional Llama-style Transformer (LLaDA, arXiv 2502.09992, Table 5): pre-norm RMSNorm, rotary positions in
float32, SwiGLU, grouped-query attention. Nothing here knows about losses, meshes or optimizers. Settings add what Qwen2
(`qkv_bias`) and Qwen3 (`qk_norm`, `head_width`) have besides.
`causal=True` gives the autoregressive twin for fair comparison, `block_length` a block-causal network, in between.

Shape legend: B rows, L positions, T tokens of rows laid end to end, D model width, H heads, K key/value heads, E head
width, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from llada.model.attention import AttentionMask, masked_attention, row_positions
from llada.model.initial import draw_normal_
from llada.model.rotary import UNSCALED, RopeScaling, rotary_table, rotate
from llada.settings import check_limits, limited, require


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network and the ids it must know."""

    vocab_size: int = limited(MISSING, low=1)
    """Embedding rows, padding rows included."""
    d_model: int = limited(MISSING, low=1)
    """Width of the residual stream."""
    num_layers: int = limited(MISSING, low=1)
    num_heads: int = limited(MISSING, low=1)
    """Attention heads."""
    ffn_dim: int = limited(MISSING, low=1)
    """Width of the SwiGLU."""
    num_kv_heads: int | None = limited(None, low=1)
    """Key/value heads, a divisor of num_heads (grouped-query attention); None: as many as heads."""
    max_length: int = limited(4096, low=1)
    """Positions; longer inputs are refused."""
    rope_theta: float = limited(500_000.0, above=0)
    """Base of the rotary positions' wavelengths."""
    rope_scaling: RopeScaling = UNSCALED
    rms_norm_eps: float = limited(1e-5, low=0)
    tie_embeddings: bool = False
    """The head is the embedding."""
    causal: bool = False
    """A position attends only to what stands before it: the autoregressive twin."""
    block_length: int | None = limited(None, low=1)
    """A position attends to its own block of so many, counted from a row's first token, and to the earlier ones (BD3-LM,
    LLaDA2), so that the keys and values of a finished block stay as they are; None: to all positions."""
    head_width: int | None = limited(None, low=2)
    """Width of each head, even; None: d_model / num_heads."""
    qkv_bias: bool = False
    """The projections to queries, keys and values add a bias (Qwen2)."""
    qk_norm: bool = False
    """Each head's queries and keys have RMS norms of their own before they are rotated (Qwen3)."""
    shift: bool = False
    """What a position predicts is read at the one before it, as an autoregressive network learned it (DiffuLLaMA, Dream)."""
    mask_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_limits(self, "model")
        require(
            self.head_width is not None or (self.d_model % self.num_heads == 0 and self.head_dim % 2 == 0),
            f"model: d_model {self.d_model} must be num_heads {self.num_heads} × an even head width, or head_width be set",
        )
        require(self.head_dim % 2 == 0, f"model: head_width {self.head_width} must be even")
        require(
            self.num_heads % self.kv_heads == 0,
            f"model: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}",
        )
        require(
            self.block_length is None or not self.causal,
            f"model: block_length={self.block_length} and causal=True contradict each other: leave one out",
        )
        require(
            self.block_length is None or not self.shift,
            f"model: block_length={self.block_length} and shift=True contradict each other: what the first position of a block "
            "predicts would be read in the block before it; leave one out",
        )
        require(
            self.block_length is None or self.block_length <= self.max_length,
            f"model: block_length {self.block_length} is more than max_length {self.max_length}: leave it out",
        )
        require(
            self.rope_scaling.kind != "yarn" or self.rope_theta > 1,
            f"model: rope_theta {self.rope_theta} must be above 1 for rope_scaling of kind yarn",
        )
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            require(
                token is None or 0 <= token < self.vocab_size,
                f"model: {name} {token} lies outside the {self.vocab_size} vocabulary rows",
            )

    def content(self) -> dict[str, Any]:
        """The settings as files, hashes and a run's identity hold them: all, but of `OPTIONAL` those that ask for nothing."""
        settings = asdict(self) | {"rope_scaling": self.rope_scaling.content()}
        return {name: value for name, value in settings.items() if value or name not in OPTIONAL}

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads if self.head_width is None else self.head_width

    @property
    def num_parameters(self) -> int:
        return self.num_non_embedding_parameters + self.vocab_size * self.d_model * (2 - self.tie_embeddings)

    @property
    def num_non_embedding_parameters(self) -> int:
        q_dim, kv_dim = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.d_model * (q_dim + kv_dim)
        attention += (q_dim + 2 * kv_dim) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        per_layer = attention + 3 * self.d_model * self.ffn_dim + 2 * self.d_model
        return self.num_layers * per_layer + self.d_model

    def training_flops_per_token(self, row_length: int) -> float:
        """Forward and backward FLOPs of one token: 6 per weight that multiplies it, 12·L·H·E per layer of attention.

        The head counts although it runs at masked positions only (half of them on average), as the usual
        convention has it; a causal network needs half of the attention part. A block-causal one runs each token twice,
        noised and clean (`Transformer.forward`), each time with half of the attention.
        """
        head = self.vocab_size * self.d_model
        attention = 12.0 * self.num_layers * self.num_heads * self.head_dim * row_length
        attention /= 2 if self.causal else 1
        copies = 1 if self.block_length is None else 2
        return 6.0 * (copies * self.num_non_embedding_parameters + head) + attention


# Settings of networks that not all have: files and hashes of the others do not know them.
OPTIONAL = frozenset({"rope_scaling", "block_length", "head_width", "qkv_bias", "qk_norm", "shift"})

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What the heads see, (T, H, E), from the fed tokens' q (T, H, E), k and v (T, K, E)."""
LayerStep = Callable[[int, "Block", Tensor, Tensor, Tensor], Tensor]
"""The residual stream (T, D) behind a layer from (its number, the layer, the stream before it, cos, sin)."""
Perturb = Callable[[Tensor], Tensor]
"""The embeddings (B, L, D) that the first layer reads, from those of the tokens; behind them stand the context's, if there is one."""
ReadOut = Callable[[Tensor, Tensor], Tensor]
"""What is wanted of the head, from (the normed stream (N, D) behind the layers, its weight (V, D))."""
HeadStep = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""Logits (N, V) from (the norm and the head, the stream (N, D) behind the layers)."""


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, times the weight (the order of LLaDA's reference code)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


def from_before(x: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """x (B, L, …) of the position before each one; at the first of a row, and of a document in it, its own, as Dream has it."""
    is_first = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    is_first[:, 0] = True
    if attention_mask is not None:
        is_first[:, 1:] |= ~attention_mask[:, :-1].bool()
    if segment_ids is not None:
        is_first[:, 1:] |= segment_ids[:, 1:] != segment_ids[:, :-1]
    return torch.where(is_first[..., None], x, x.roll(1, 1))


class Block(nn.Module):
    """One layer: attention and SwiGLU, each behind its own norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, q_dim, kv_dim = (
            config.d_model,
            config.num_heads * config.head_dim,
            config.kv_heads * config.head_dim,
        )
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.causal = config.causal
        self.attn_norm = RMSNorm(d, config.rms_norm_eps)
        self.q_proj = nn.Linear(d, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, kv_dim, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.o_proj = nn.Linear(q_dim, d, bias=False)
        self.ffn_norm = RMSNorm(d, config.rms_norm_eps)
        self.gate_proj = nn.Linear(d, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(d, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, d, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | BlockMask | None = None,
        attend: Attend | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x (B, L, D); cos and sin (L, 1, E), or (B, L, 1, E) where rows begin at different columns. With `attend`, which
        takes the place of the attention under `mask`, x is (T, D) with cos and sin (T, 1, E). `wanted` (N,) of the B · L
        positions go on behind the attention: (N, D)."""
        q, k, v = self.project(x, cos, sin)
        attended = self.attention(q, k, v, mask) if attend is None else attend(q, k, v)
        if wanted is not None:
            x, attended = (of_all.flatten(0, 1).index_select(0, wanted) for of_all in (x, attended))
        return self.mix(x, attended)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (…, H, E), keys and values (…, K, E) of x (…, D), rotated."""
        h = self.attn_norm(x)
        q = self.q_proj(h).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(h).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(h).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
        """(B, L, H, E) from q (B, L, H, E), k and v (B, L, K, E)."""
        return masked_attention(q, k, v, mask, causal=self.causal)

    def mix(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream (…, D) behind the layer, from before it and what its heads saw (…, H, E)."""
        x = x + self.o_proj(attended.flatten(-2))
        h = self.ffn_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Head(nn.Linear):
    """The last matrix. What is made of it in place of logits is made in its forward, where a sharded weight is whole."""

    def forward(self, x: Tensor, read_out: ReadOut | None = None) -> Tensor:
        """Logits (N, V) of x (N, D), or what `read_out` makes of it."""
        return super().forward(x) if read_out is None else read_out(x, self.weight)


class Transformer(nn.Module):
    """The mask predictor p(x₀ | xₜ): no time input, because xₜ already tells it (LLaDA Eq. 11)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # All ids that end a text, by the checkpoint's files: a folder may name more than `config.eos_token_id`.
        self.end_ids: tuple[int, ...] = () if config.eos_token_id is None else (config.eos_token_id,)
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.lm_head = Head(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        context: Tensor | None = None,
        lookahead: int | None = None,
        perturb: Perturb | None = None,
        logits_at: Tensor | None = None,
        read_out: ReadOut | None = None,
        positions: Tensor | None = None,
        layer_step: LayerStep | None = None,
        head_step: HeadStep | None = None,
    ) -> Tensor:
        """Logits over the vocabulary.

        Args:
            input_ids: (B, L) int64, mask tokens included; or (T,), the tokens of any rows one behind the other, with
                `positions` and `layer_step`.
            attention_mask: (B, L), 0 where a position is padding that nobody may attend to. Positions count from a row's
                first attended column: a left-padded row is rotated as it would be alone.
            segment_ids: (B, L) integers; positions attend only to equal ids (packed documents). Padding has an id
                of its own, so that it sees only itself.
            context: (B, L) int64, of a block-causal network: what each block of `input_ids` finds in the earlier ones,
                in place of their own tokens. So one forward gives what one for each block, on `context` before it,
                would.
            lookahead: a position sees no farther than so many behind itself; None: all (a bidirectional network).
            perturb: changes the tokens' embeddings.
            logits_at: (B, L) bool, or (N,) indices into the B · L or T positions; only these N get logits, in order. The head
                is the widest matrix of the network, and a loss needs it at masked positions only.
            read_out: what is returned in place of logits, computed where the head's weight is at hand (FSDP).
            positions: (T,) int64, where each token stands in its row.
            layer_step: runs each layer; who attends to whom, and what is kept of it, is its business.
            head_step: runs the norm and the head behind the last layer, all at once without it.

        Returns:
            (B, L, V) or (T, V), or (N, V) with `logits_at`, in the network's compute dtype; what `read_out` returns.

        Raises:
            ValueError: a row longer than `config.max_length`; `context` of a network without blocks; `lookahead` of one that
                does not see both sides.
        """
        if layer_step is not None:
            assert positions is not None
            assert not self.config.shift
            assert perturb is None
            x = self._walk(input_ids, positions, layer_step)
            x = x if logits_at is None else x[logits_at]
            return self._head(x) if head_step is None else head_step(self._head, x)
        if logits_at is not None and logits_at.dim() == 2:
            logits_at = logits_at.flatten().nonzero()[:, 0]
        seen = (input_ids, attention_mask, segment_ids, context, lookahead, perturb)
        if self.config.shift:
            x = from_before(self._attend_densely(*seen), attention_mask, segment_ids)
            x = x if logits_at is None else x.flatten(0, 1).index_select(0, logits_at)
        else:
            x = self._attend_densely(*seen, logits_at)
        return self.lm_head(self.norm(x), read_out)

    def _head(self, x: Tensor) -> Tensor:
        return self.lm_head(self.norm(x))

    def _attend_densely(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        segment_ids: Tensor | None,
        context: Tensor | None,
        lookahead: int | None,
        perturb: Perturb | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """The stream (B, L, D) behind the layers, or (N, D) of the `wanted` (N,) positions: the last layer is spared what
        nobody asks for."""
        L, device = input_ids.shape[1], input_ids.device
        if self.config.max_length < L:
            raise ValueError(f"input of {L} tokens exceeds the model's max_length {self.config.max_length}")
        if context is not None and self.config.block_length is None:
            raise ValueError("context is for a block-causal network: this one has no block_length")
        if lookahead is not None and (self.config.causal or self.config.block_length is not None):
            raise ValueError(
                "lookahead is for a network that sees both sides: this one is causal or has blocks"
            )
        sight = AttentionMask.of(
            attention_mask,
            segment_ids,
            L,
            device,
            causal=self.config.causal,
            lookahead=lookahead,
            block_length=self.config.block_length,
            with_context=context is not None,
        )
        mask = None if sight is None else sight.for_kernel(self.config.head_dim)
        positions = torch.arange(L, device=device)
        if attention_mask is not None and sight is not None:
            positions = row_positions(attention_mask).clamp(min=0)
        if context is not None:
            input_ids = torch.cat([input_ids, context], dim=1)
            positions = torch.cat([positions, positions], dim=-1)
        cos, sin = self._rotary(positions)
        x = self.embed(input_ids)
        x = x if perturb is None else perturb(x)
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, cos, sin, mask)
        if wanted is None:
            return last(x, cos, sin, mask)[:, :L]
        if context is not None:
            wanted = wanted + wanted // L * L  # its columns stand behind each row's own
        return last(x, cos, sin, mask, None, wanted)

    def _walk(self, input_ids: Tensor, positions: Tensor, layer_step: LayerStep) -> Tensor:
        cos, sin = self._rotary(positions)
        x = self.embed(input_ids)
        for number, layer in enumerate(self.layers):
            x = layer_step(number, cast(Block, layer), x, cos, sin)
        return x

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (…, 1, E) of the positions (…), for all heads."""
        cos, sin = rotary_table(
            positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
        )
        return cos[..., None, :], sin[..., None, :]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """LLaDA's configured initialisation ("mitchell"): normal with std 1/√fan-in cut at ±3 std; the two
        projections that write into the residual stream are divided further by √(2·(layer + 1)). Biases are zero.

        Of sharded parameters a worker draws its own rows, on its device: those of the whole (see initial.py).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            if name.endswith(".bias"):
                parameter.zero_()
                continue
            std = 1.0 / math.sqrt(parameter.shape[-1])  # fan-in; D for the embedding
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * (int(name.split(".")[1]) + 1))
            draw_normal_(parameter, seed, name, std)
