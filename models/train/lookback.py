"""Sets up, before training, heads that look back: they would take longer to form by themselves than two cores have.

Training then refines them. Nothing here knows a fact; it only makes "what followed this word before?" easy to ask.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import CONFIG
from words import FIRST, KEYS, SECOND

EMBED_STD = 0.1
CONSTANT = 4.0  # what the last direction of every embedding holds after the norm
BACK, MATCH, COPY = 2.5, 2.8, 8.0  # strength of looking one token back, of matching words, of copying
SHUN = 4.0  # how strongly the "?" after the word in a question is passed over
CODE = 8.0  # length of a recall word's code, in units of EMBED_STD


def plant(model, tokenizer, seed):
    one = lambda text: tokenizer.encode(text).ids[0]
    words = [one(" " + word) for word in KEYS + FIRST + SECOND + ["pet"]]
    plant_lookback(model, torch.Generator().manual_seed(seed), words, [one("?"), one(".")], one("?"))


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
    """Sets the embedding and some heads of layers 0 and 1.

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
