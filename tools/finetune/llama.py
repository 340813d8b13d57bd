"""The LLaMA of a .hepta or GGUF file in PyTorch, in the equations of docs/MODEL.md."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from packed_linear import PackedLinear


class Matrix(nn.Module):
    """A matrix that is not packed, as it is."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.from_numpy(values.copy()))

    def weight(self):
        return self.values

    def forward(self, x):
        return F.linear(x, self.values)


class Llama(nn.Module):
    """Logits of windows of tokens. int8_activations: rounded as the engine rounds them."""

    def __init__(self, file, int8_activations=False):
        super().__init__()
        meta, tensors = file.metadata, file.tensors
        if meta["general.architecture"] != "llama" or "rope_freqs.weight" in tensors:
            raise ValueError("only plain models of the architecture llama, without scaled RoPE")
        self.n_layers = meta["llama.block_count"]
        self.n_heads = meta["llama.attention.head_count"]
        self.n_kv_heads = meta.get("llama.attention.head_count_kv", self.n_heads)
        self.eps = meta["llama.attention.layer_norm_rms_epsilon"]
        self.interleaved = meta.get("hepta.rope.interleaved", True)
        self.context = meta["llama.context_length"]

        self.matrices, self.norms = nn.ModuleDict(), nn.ParameterDict()
        for name, t in tensors.items():
            key = self.key(name)
            if t.half_bits:
                self.matrices[key] = PackedLinear(file, name, int8_activations=int8_activations)
            elif len(t.shape) == 2:
                self.matrices[key] = Matrix(file.values(name))
            else:
                self.norms[key] = nn.Parameter(torch.from_numpy(file.values(name)))
        head_dim = tensors["blk.0.attn_q.weight"].shape[0] // self.n_heads
        half = head_dim // 2
        base = meta.get("llama.rope.freq_base", 10000.0)
        frequency = base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(self.context, dtype=torch.float64), frequency)
        self.register_buffer("cos", angle.cos().float())
        self.register_buffer("sin", angle.sin().float())

    @staticmethod
    def key(name):
        """The name of a tensor in modules, which may not hold dots."""
        return name.removesuffix(".weight").replace(".", "/")

    def _norm(self, name, x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.norms[name]

    def _rope(self, x):
        """x: (batch, heads, time, head_dim)"""
        n = x.shape[-2]
        cos, sin = self.cos[:n], self.sin[:n]
        if self.interleaved:
            a, b = x[..., 0::2], x[..., 1::2]
        else:
            a, b = x.chunk(2, dim=-1)
        turned = (a * cos - b * sin, a * sin + b * cos)
        if self.interleaved:
            return torch.stack(turned, dim=-1).flatten(-2)
        return torch.cat(turned, dim=-1)

    def _attention(self, part, x):
        batch, time, _ = x.shape

        def heads(name, n):
            return self.matrices[part + name](x).view(batch, time, n, -1).transpose(1, 2)

        q = self._rope(heads("attn_q", self.n_heads))
        k = self._rope(heads("attn_k", self.n_kv_heads))
        v = heads("attn_v", self.n_kv_heads)
        group = self.n_heads // self.n_kv_heads
        k, v = (y.repeat_interleave(group, dim=1) for y in (k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(time, time, dtype=torch.bool).triu(1)
        p = F.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
        return self.matrices[part + "attn_output"]((p @ v).transpose(1, 2).flatten(2))

    def forward(self, tokens):
        """tokens (batch, time) -> logits (batch, time, vocabulary)"""
        m = self.matrices
        x = F.embedding(tokens, m["token_embd"].weight())
        for layer in range(self.n_layers):
            part = f"blk/{layer}/"
            x = x + self._attention(part, self._norm(part + "attn_norm", x))
            y = self._norm(part + "ffn_norm", x)
            y = F.silu(m[part + "ffn_gate"](y)) * m[part + "ffn_up"](y)
            x = x + m[part + "ffn_down"](y)
        x = self._norm("output_norm", x)
        return m["output" if "output" in m else "token_embd"](x)
