"""What a decoder is made of, in one dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from thinkernel.nn.rope_scaling import RopeScaling, Yarn, scaling_from_dict

ATTENTION_KINDS = ("gqa", "mla", "dsa")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: `layers` × (attention, feed-forward), RMSNorm before each, residual around each.

    attention "gqa" reads kv_heads … qk_norm; "mla" reads kv_latent … latent_norm_eps; "dsa" is MLA and reads the
    indexer's fields too. Layers from `first_dense` on are mixtures of experts when `experts` > 0, the others dense.
    """

    vocab_size: int
    layers: int
    hidden: int
    heads: int
    ff_dim: int  # the dense layers' intermediate size
    attention: str = "gqa"
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool | None = None  # of grouped-query attention's o_proj alone; default: attention_bias
    max_positions: int = 4096  # what the model was made for; nothing is allocated by it
    init_std: float = 0.02

    # rotary embedding
    rope_theta: float = 10000.0
    rope_interleaved: bool = False  # MLA models of DeepSeek: True
    rope_scaling: RopeScaling | None = None  # nn.LinearRope, nn.Llama3Rope or nn.Yarn

    # grouped-query attention
    kv_heads: int | None = None  # default: heads
    head_dim: int | None = None  # default: hidden / heads
    qk_norm: bool = False
    window: tuple[int, int] | None = None

    # multi-head latent attention
    kv_latent: int = 512
    q_latent: int | None = 1536
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    latent_norm_eps: float = 1e-6

    # sparse attention's indexer
    top_k: int = 2048
    indexer_heads: int = 64
    indexer_dim: int = 128
    indexer_rope_interleaved: bool = False
    dense_attention: int = 0  # of a "dsa" model, the first so many layers are plain MLA
    shared_indexers: tuple[int, ...] = ()  # layers without an indexer: they attend to what the last one before them with one chose

    # mixture of experts
    experts: int = 0
    experts_per_token: int = 8
    expert_dim: int = 0
    shared_experts: int = 0
    first_dense: int = 0
    score: str = "softmax"
    expert_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2"
    renormalize: bool = True
    routed_scaling: float = 1.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "layers", "hidden", "heads", "ff_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, takes at least 1")
        if self.attention not in ATTENTION_KINDS:
            raise ValueError(f"attention: got {self.attention!r}, takes one of {', '.join(ATTENTION_KINDS)}")
        if self.attention == "gqa" and self.head_dim is None and self.hidden % self.heads:
            raise ValueError(f"heads: got {self.heads}, takes a divisor of hidden = {self.hidden} or a head_dim")
        if self.rotary_dim % 2:
            name = "head_dim" if self.attention == "gqa" else "rope_dim"
            raise ValueError(f"{name}: got {self.rotary_dim}, takes an even number (it is turned in pairs)")
        if not all(self.dense_attention < layer < self.layers for layer in self.shared_indexers):
            first = f"the first sparse layer, {self.dense_attention}, has its own"
            raise ValueError(f"shared_indexers: got {self.shared_indexers}, takes layers below {self.layers} ({first})")
        if self.experts and self.expert_dim < 1:
            raise ValueError(f"expert_dim: got {self.expert_dim}, takes at least 1 where there are experts")

    @property
    def softmax_factor(self) -> float:
        """What YaRN multiplies MLA's softmax scale by."""
        return self.rope_scaling.softmax_factor if isinstance(self.rope_scaling, Yarn) else 1.0

    @property
    def rotary_dim(self) -> int:
        """How many dims of a head are turned by RoPE."""
        return (self.head_dim or self.hidden // self.heads) if self.attention == "gqa" else self.rope_dim

    def is_moe(self, layer: int) -> bool:
        return self.experts > 0 and layer >= self.first_dense

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        scaling = self.rope_scaling
        return dataclasses.asdict(self) | {"rope_scaling": None if scaling is None else scaling.to_dict()}

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        values = dict(values)
        if "yarn" in values:  # files written before there were other kinds
            yarn = values.pop("yarn")
            values["rope_scaling"] = yarn and {"rope_type": "yarn", **yarn}
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"config: got unknown fields {', '.join(sorted(unknown))}")
        if isinstance(values.get("rope_scaling"), dict):
            values["rope_scaling"] = scaling_from_dict(values["rope_scaling"])
        if values.get("window") is not None:
            values["window"] = tuple(values["window"])
        values["shared_indexers"] = tuple(values.get("shared_indexers", ()))
        return cls(**values)
