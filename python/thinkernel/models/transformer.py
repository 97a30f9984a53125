"""The reference decoder, built from the modules of thinkernel.nn alone.

Shapes: B batch, S new tokens, V vocabulary. tokens [B, S] int64.

    h = embedding(tokens);  every layer: h += attention(norm(h)), h += feed_forward(norm(h));  head(norm(h))

Sequences of different lengths are padded on the right: causal attention never looks there, so padding needs no mask,
and a row's result does not depend on its neighbours. Generation appends every row at its own length.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from thinkernel.models.cache import Cache
from thinkernel.models.config import ModelConfig
from thinkernel.nn import (
    CacheStep,
    FeedForward,
    GroupedQueryAttention,
    LinearLogProb,
    MixtureOfExperts,
    MoELosses,
    MultiHeadLatentAttention,
    RotaryEmbedding,
    SparseLatentAttention,
)


class ModelOutput(NamedTuple):
    """What a forward returns; what was not asked for is None.

    logits [B, S, V] without targets; logprob and entropy [B, S] float32 with them (0 where the target is ignored).
    indexer_loss: mean over real tokens and layers; balance_loss and router_z_loss: mean over the expert layers, balance 1
    when balanced; expert_counts [expert layers, E] int32, for `update_expert_bias`. experts [B, S, expert layers, K]: the
    choices, in `nn.expert_dtype`, 0 for padding.
    """

    logits: Tensor | None = None
    logprob: Tensor | None = None
    entropy: Tensor | None = None
    indexer_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    expert_counts: Tensor | None = None
    router_z_loss: Tensor | None = None
    experts: Tensor | None = None


class LayerLosses(NamedTuple):
    """A layer's losses, and what else goes on from it beside its output."""

    indexer: Tensor | None = None  # [B, S]
    moe: MoELosses | None = None  # of a layer of experts, where asked for
    chosen: Tensor | None = None  # [B, S, K] the keys of a sparse layer, for those after it that share its indexer


def build_attention(config: ModelConfig, layer: int) -> GroupedQueryAttention | MultiHeadLatentAttention:
    if config.attention == "gqa":
        return GroupedQueryAttention(
            config.hidden,
            config.heads,
            config.kv_heads,
            config.head_dim,
            qk_norm=config.qk_norm,
            bias=config.attention_bias,
            out_bias=config.attention_out_bias,
            eps=config.norm_eps,
            rope_interleaved=config.rope_interleaved,
            window=config.window,
        )
    latent = dict(
        kv_latent=config.kv_latent,
        q_latent=config.q_latent,
        nope_dim=config.nope_dim,
        rope_dim=config.rope_dim,
        value_dim=config.value_dim,
        bias=config.attention_bias,
        eps=config.latent_norm_eps,
        rope_interleaved=config.rope_interleaved,
        scale=(config.nope_dim + config.rope_dim) ** -0.5 * config.softmax_factor,
    )
    if config.attention == "mla" or layer < config.dense_attention:
        return MultiHeadLatentAttention(config.hidden, config.heads, **latent)
    return SparseLatentAttention(
        config.hidden,
        config.heads,
        top_k=config.top_k,
        indexer_heads=config.indexer_heads,
        indexer_dim=config.indexer_dim,
        indexer_rope_interleaved=config.indexer_rope_interleaved,
        shared_indexer=layer in config.shared_indexers,
        **latent,
    )


def build_feed_forward(config: ModelConfig, layer: int) -> nn.Module:
    if not config.is_moe(layer):
        return FeedForward(config.hidden, config.ff_dim)
    return MixtureOfExperts(
        config.hidden,
        config.expert_dim,
        config.experts,
        config.experts_per_token,
        shared_experts=config.shared_experts,
        score=config.score,
        expert_bias=config.expert_bias,
        n_group=config.n_group,
        topk_group=config.topk_group,
        group_score=config.group_score,
        renormalize=config.renormalize,
        scaling=config.routed_scaling,
    )


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind an RMSNorm and beside a residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.attention: GroupedQueryAttention | MultiHeadLatentAttention = build_attention(config, layer)
        self.feed_forward_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.feed_forward = build_feed_forward(config, layer)

    def forward(
        self,
        h: Tensor,
        rope: tuple[Tensor, Tensor],
        *,
        key_start: Tensor | None = None,
        valid: Tensor | None = None,
        cache: tuple[Tensor, ...] | None = None,
        step: CacheStep | None = None,
        sparse: bool = True,
        chosen: Tensor | None = None,
        experts: Tensor | None = None,
        return_losses: bool = False,
        return_experts: bool = False,
    ) -> tuple[Tensor, LayerLosses]:
        """chosen: what the sparse layer before this one attended to."""
        options: dict = dict(key_start=key_start, cache=cache, step=step)
        indexer = None
        if isinstance(self.attention, SparseLatentAttention):
            own = self.attention.indexer is not None
            options |= dict(sparse=sparse, indices=None if own else chosen, return_indices=True)
            options |= dict(return_indexer_loss=return_losses and own)
            out, *loss, chosen = self.attention(self.attention_norm(h), rope, **options)
            indexer = loss[0] if loss else None
        else:
            out = self.attention(self.attention_norm(h), rope, **options)
        h = h + out

        x = self.feed_forward_norm(h)
        if not isinstance(self.feed_forward, MixtureOfExperts):
            return h + self.feed_forward(x), LayerLosses(indexer, chosen=chosen)
        routing: dict = dict(valid=valid, experts=experts)
        if not (return_losses or return_experts):
            return h + self.feed_forward(x, **routing), LayerLosses(indexer, chosen=chosen)
        out, moe_losses = self.feed_forward(x, **routing, return_losses=return_losses, return_experts=return_experts)
        return h + out, LayerLosses(indexer, moe_losses, chosen)


class Transformer(nn.Module):
    """A decoder after a ModelConfig."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.rope = RotaryEmbedding(config.rotary_dim, config.rope_theta, config.rope_scaling)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.head = LinearLogProb(config.hidden, config.vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of init_std; what writes into the residual stream is divided by √(2·layers)."""
        config = self.config
        residual_std = config.init_std * (2 * config.layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue  # norms and biases start at one and zero
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "w_down"))
            nn.init.normal_(parameter, std=residual_std if writes else config.init_std)
        if config.tie_embeddings:
            self.head.register_parameter("weight", cast(nn.Parameter, self.embedding.weight))

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` tokens."""
        weight = self.embedding.weight
        layers = [
            cast(Block, block).attention.new_cache(batch, capacity, dtype=weight.dtype, device=weight.device)
            for block in self.blocks
        ]
        return Cache(layers, torch.zeros(batch, dtype=torch.int32, device=weight.device))

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        key_start: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        sparse: bool = True,
        experts: Tensor | None = None,
        return_losses: bool = False,
        return_experts: bool = False,
    ) -> tuple[Tensor, list[LayerLosses]]:
        """The final, normalised hidden states [B, S, hidden] that the head reads, and the layers' losses.

        The arguments are those of `forward`."""
        self._check(tokens, lengths, key_start, cache, return_losses)
        expert_layers = [layer for layer in range(self.config.layers) if self.config.is_moe(layer)]
        if experts is not None:
            wanted = (*tokens.shape, len(expert_layers), self.config.experts_per_token)
            if experts.shape != wanted:
                raise ValueError(f"experts: got shape {tuple(experts.shape)}, takes [B, S, expert layers, K] = {wanted}")
        choices = {} if experts is None else dict(zip(expert_layers, experts.unbind(2)))  # [B, S, K] each
        size = tokens.shape[1]
        slots = torch.arange(size, device=tokens.device)  # [S]
        step = None if cache is None else cache.begin(size)
        if positions is None:
            positions = slots.expand(tokens.shape)  # [B, S]
            if cache is not None:
                positions = positions + cache.lengths[:, None]
            elif key_start is not None:
                positions = (positions - key_start[:, None]).clamp(min=0)
        valid = None if lengths is None else slots < lengths[:, None]  # [B, S]
        if key_start is not None:
            real = slots >= key_start[:, None]
            valid = real if valid is None else valid & real

        rope = self.rope(positions)
        h = self.embedding(tokens)  # [B, S, hidden]
        losses: list[LayerLosses] = []
        chosen = None
        for layer, block in enumerate(self.blocks):
            h, layer_losses = block(
                h,
                rope,
                key_start=key_start,
                valid=valid,
                cache=None if cache is None else cache.layers[layer],
                step=step,
                sparse=sparse,
                chosen=chosen,
                experts=choices.get(layer),
                return_losses=return_losses,
                return_experts=return_experts,
            )
            chosen = layer_losses.chosen
            losses.append(layer_losses._replace(chosen=None))  # [B, S, K] of one layer at a time
        if cache is not None and step is not None:
            cache.commit(step, lengths)
        return self.norm(h), losses

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = True,
        lengths: Tensor | None = None,
        key_start: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        sparse: bool = True,
        experts: Tensor | None = None,
        return_losses: bool = False,
        return_experts: bool = False,
    ) -> ModelOutput:
        """tokens [B, S] -> logits, or with targets [B, S] (-100 is ignored) log-probabilities and entropy under
        softmax(logits / temperature), with no [B, S, V] tensor.

        lengths [B]: real tokens of rows padded on the right; padding is left out of the experts and of the losses.
        key_start [B]: first real token of rows padded on the left (not with sparse attention, not with a cache).
        positions [B, S]: default 0 … S−1 from the row's first real token, after what the cache holds.
        cache: the tokens are appended and see all that is in it; lengths then says how many of them are real. There is
        a backward for an empty cache alone.
        sparse=False: the indexer's warm-up stage, dense attention and its loss over all keys.
        experts [B, S, expert layers, K]: routing replay, these choices (of `Generation.experts`, or an earlier forward's
        `experts`) with the live router's weights.
        return_losses: fill in indexer_loss, balance_loss, expert_counts and router_z_loss; return_experts: experts."""
        h, losses = self.hidden_states(
            tokens,
            lengths=lengths,
            key_start=key_start,
            positions=positions,
            cache=cache,
            sparse=sparse,
            experts=experts,
            return_losses=return_losses,
            return_experts=return_experts,
        )
        extra = _collect(losses, lengths, tokens.shape[1]) if return_losses or return_experts else {}
        if targets is None:
            return ModelOutput(logits=self.head(h), **extra)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets: got shape {tuple(targets.shape)}, takes that of tokens {tuple(tokens.shape)}")
        logprob, entropies = self.head(h, targets, temperature=temperature, entropy=entropy)
        return ModelOutput(logprob=logprob, entropy=entropies if entropy else None, **extra)

    def _check(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        key_start: Tensor | None,
        cache: Cache | None,
        return_losses: bool,
    ) -> None:
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens: got {tokens.dtype} {tuple(tokens.shape)}, takes int64 [B, S]")
        for name, tensor in (("lengths", lengths), ("key_start", key_start)):
            if tensor is not None and tensor.shape != tokens.shape[:1]:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, takes [{tokens.shape[0]}]")
        if key_start is not None and self.config.attention == "dsa":
            raise ValueError("key_start: sparse attention takes no left padding; pad on the right and give lengths")
        if cache is not None:
            if key_start is not None:
                raise ValueError("key_start: takes no cache beside it; pad on the right and give lengths")
            if return_losses:
                raise ValueError("return_losses: takes no cache beside it (losses belong to training)")
            if cache.lengths.shape[0] != tokens.shape[0]:
                raise ValueError(f"cache: got {cache.lengths.shape[0]} rows, takes {tokens.shape[0]} as tokens has")


def _collect(losses: list[LayerLosses], lengths: Tensor | None, size: int) -> dict[str, Tensor]:
    """The layers' losses as ModelOutput's fields."""
    fields = {}
    indexer = [layer.indexer for layer in losses if layer.indexer is not None]
    if indexer:
        per_token = torch.stack(indexer).mean(0)  # [B, S]
        if lengths is None:
            fields["indexer_loss"] = per_token.mean()
        else:
            real = torch.arange(size, device=per_token.device) < lengths[:, None]  # [B, S]
            total = torch.where(real, per_token, 0.0).sum()
            fields["indexer_loss"] = total / real.sum().clamp(min=1)
    of_experts = [layer.moe for layer in losses if layer.moe is not None]
    for name, source in (("balance_loss", "balance"), ("router_z_loss", "z"), ("expert_counts", "counts")):
        found = [getattr(layer, source) for layer in of_experts if getattr(layer, source) is not None]
        if found:
            fields[name] = torch.stack(found) if source == "counts" else torch.stack(found).mean()
    chosen = stack_experts(losses)
    if chosen is not None:
        fields["experts"] = chosen
    return fields


def stack_experts(losses: list[LayerLosses]) -> Tensor | None:
    """The recorded choices of all layers of experts, [B, S, expert layers, K]; None where none were."""
    chosen = [layer.moe.experts for layer in losses if layer.moe is not None and layer.moe.experts is not None]
    return torch.stack(chosen, 2) if chosen else None
