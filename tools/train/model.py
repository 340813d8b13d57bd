"""The LLaMA architecture in PyTorch, as small as it can be kept.

The weights follow the Hugging Face conventions: linear layers are stored as
(output, input) matrices without biases, and the rotary embedding pairs
dimension i of a head with dimension i + head_dim / 2 ("half-split" order).
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """Sizes of the model. The defaults are those of hepta-stories-7m."""

    vocab_size: int = 4096
    dim: int = 256
    n_layers: int = 8
    n_heads: int = 4
    n_kv_heads: int = 2
    hidden_dim: int = 768
    context: int = 512
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self):
        return self.dim // self.n_heads

    def to_dict(self):
        return asdict(self)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).type_as(x)


def rope_tables(config):
    """Cosines and sines of the rotary embedding, each (context, head_dim / 2)."""
    half = config.head_dim // 2
    inv_freq = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(config.context, dtype=torch.float64), inv_freq)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x, cos, sin):
    """Rotate x, of shape (batch, heads, time, head_dim), by its positions."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, cos, sin):
        batch, time, dim = x.shape

        def heads(y, n):
            return y.view(batch, time, n, self.head_dim).transpose(1, 2)

        q = apply_rope(heads(self.q_proj(x), self.n_heads), cos, sin)
        k = apply_rope(heads(self.k_proj(x), self.n_kv_heads), cos, sin)
        v = heads(self.v_proj(x), self.n_kv_heads)
        group = self.n_heads // self.n_kv_heads
        k = k.repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, time, dim))


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Decoder-only language model with tied input and output embeddings.

    Parameter names equal those of a Hugging Face LlamaForCausalLM without
    the leading "model.".
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        """Normal initialisation; the matrices that write to the residual
        stream are scaled down with depth."""
        for name, p in self.named_parameters():
            if p.ndim < 2:
                continue
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * self.config.n_layers) ** 0.5
            elif "_proj" in name:
                std = 0.5 * p.shape[1] ** -0.5
            nn.init.normal_(p, std=std)

    def forward(self, tokens, targets=None, reduction="mean"):
        """Logits for tokens of shape (batch, time), or with targets the
        cross-entropy loss in nats."""
        time = tokens.shape[1]
        cos, sin = self.cos[:time], self.sin[:time]
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction=reduction
        )

    def parameter_count(self):
        return sum(p.numel() for p in self.parameters())
