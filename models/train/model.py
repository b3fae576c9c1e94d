"""The Llama shape of baton-3m in plain PyTorch. Parameter names are Hugging Face's, so saving needs no renaming."""

import torch
import torch.nn as nn
import torch.nn.functional as F

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1536,
    "max_position_embeddings": 4096,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}


class RmsNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x, cos, sin):
    """RoPE, rotate-half convention. x: (batch, head, token, head_dim); cos, sin: (token, head_dim / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        hidden = c["hidden_size"]
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)

    def forward(self, x, cos, sin):
        batch, tokens, _ = x.shape
        split = lambda y, heads: y.view(batch, tokens, heads, self.head_dim).transpose(1, 2)
        q = rotate(split(self.q_proj(x), self.heads), cos, sin)
        k = rotate(split(self.k_proj(x), self.kv_heads), cos, sin)
        v = split(self.v_proj(x), self.kv_heads)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RmsNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RmsNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = Mlp(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RmsNorm(c["hidden_size"], c["rms_norm_eps"])


class Llama(nn.Module):
    def __init__(self, c=CONFIG):
        super().__init__()
        self.model = Body(c)
        half = torch.arange(0, c["head_dim"], 2, dtype=torch.float64) / c["head_dim"]
        angle = torch.outer(torch.arange(c["max_position_embeddings"], dtype=torch.float64), c["rope_theta"] ** -half)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = (2 * c["num_hidden_layers"]) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(p, std=c["initializer_range"] * scale)

    def forward(self, ids):
        """ids: (batch, token) -> logits (batch, token, vocab)."""
        tokens = ids.shape[1]
        cos, sin = self.cos[:tokens], self.sin[:tokens]
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

EMBED_STD, CONSTANT = 0.1, 4.0
BACK, MATCH, COPY = 2.5, 2.8, 8.0
SHUN = 4.0
CODE = 8.0  # length of a recall word's code, in units of EMBED_STD


@torch.no_grad()
def center(embed):
    """Keeps the embedding fit for the planted heads: rows differ, and after the norm the last direction is CONSTANT.

    What all rows share is taken out: the softmax does not see it, but it would drown what tells words apart.
    """
    embed[:, :-1] -= embed[:, :-1].mean(0)
    others = embed.shape[1] - CONSTANT**2
    embed[:, -1] = CONSTANT * (embed[:, :-1].square().sum(1) / others).sqrt()


def codes(count, size, generator):
    """`count` unit vectors pushed apart from each other."""
    x = torch.randn(count, size, generator=generator).requires_grad_()
    with torch.enable_grad():
        adam = torch.optim.Adam([x], lr=0.02)
        for _ in range(300):
            unit = F.normalize(x, dim=1)
            near = (unit @ unit.T).fill_diagonal_(-1)
            adam.zero_grad()
            (12 * near).logsumexp(1).mean().backward()
            adam.step()
    return F.normalize(x.detach(), dim=1)


def plant_lookback(model, generator, words, silent, shunned):
    """Starts the model with heads that training would take long to find by itself, and then refines.

    Two kv heads of layer 0 look one token back (RoPE alone decides: a constant direction of the embedding feeds q
    and k) and copy a projection of that token. Two of layer 1 look for a place whose copied token is the current one
    and copy what stands there: together, "what followed this word before?" The ids in `words` start with codes that
    are easy to tell apart; those in `silent` start uncopied; the id `shunned`, which follows the word in a question,
    is not looked at: a direction of its own lowers the score of its place.
    """
    c = CONFIG
    hidden, size, unit = c["hidden_size"], c["head_dim"], EMBED_STD
    half, fast = size // 2, 4
    # Only the slow half of RoPE's pairs holds still over a thousand tokens.
    slow = torch.cat((torch.arange(half // 2, half), torch.arange(half + half // 2, size)))
    angle = c["rope_theta"] ** -(torch.arange(0, size, 2) / size)
    # Six projections (head_dim, hidden), orthogonal to each other and to the constant direction, the last.
    drawn = torch.linalg.qr(torch.randn(hidden - 1, 6 * size + 1, generator=generator))[0].T
    drawn = F.pad(drawn, (0, 1))
    shun, drawn = drawn[-1], drawn[:-1].view(6, size, hidden)

    with torch.no_grad():
        embed = model.model.embed_tokens.weight
        nn.init.normal_(embed, std=unit, generator=generator)
        embed[:, -1] = 0
        embed -= torch.outer(embed @ shun, shun)
        embed[shunned] += CODE * unit * shun
        back, match = model.model.layers[0].self_attn, model.model.layers[1].self_attn
        for kv in (0, 1):
            content, written, copied = drawn[kv], drawn[2 + kv], drawn[4 + kv]
            for basis in (content[: len(slow)], copied):
                rows = embed[words]
                rows += (CODE * unit * codes(len(words), len(basis), generator) - rows @ basis.T) @ basis
                embed[words] = rows
            embed[silent] -= embed[silent] @ copied.T @ copied
            here = slice(kv * size, (kv + 1) * size)
            back.k_proj.weight[here] *= 0.1
            back.k_proj.weight[here][:fast, -1] = BACK
            back.v_proj.weight[here] = content
            match.k_proj.weight[here] *= 0.1
            match.k_proj.weight[here][slow] = MATCH * written[: len(slow)]
            match.k_proj.weight[here][half // 2 - 1] = -SHUN * shun
            match.v_proj.weight[here] = copied
            for head in (2 * kv, 2 * kv + 1):
                here = slice(head * size, (head + 1) * size)
                back.q_proj.weight[here] *= 0.1
                back.q_proj.weight[here][:fast, -1] = BACK * angle[:fast].cos()
                back.q_proj.weight[here][half : half + fast, -1] = -BACK * angle[:fast].sin()
                back.o_proj.weight[:, here] = 2 * unit * written.T
                match.q_proj.weight[here] *= 0.1
                match.q_proj.weight[here][slow] = MATCH * content[: len(slow)]
                match.q_proj.weight[here][half // 2 - 1, -1] = SHUN
                match.o_proj.weight[:, here] = COPY * unit * copied.T
    center(embed)
