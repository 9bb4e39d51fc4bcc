"""GPT and its variants, bottom-up: settings, primitives, blocks, context slots, GPT.

A variant is a setting of GPTConfig; at 0, "" or False it has no parameter and draws no random number, and what is left is
the plain GPT, bit for bit. `layers` describes the network, a character a block:

    A   causal self-attention + MLP

Notation: B rows, T positions, C = n_embd channels, H heads, D = head_dim, V = vocab_size, S context slots.
This module knows torch and nothing else: no files, no data, no decoding policy.
"""
import dataclasses
import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------------------
# settings


@dataclass
class GPTConfig:
    block_size: int = 256  # tokens in the window (hard tokens: context slots come on top)
    vocab_size: int = 0  # number of tokens; 0: that of the dataset
    layers: str = ""  # one character a block; "" means "A" * n_layer
    n_layer: int = 6  # number of blocks when layers is ""
    n_embd: int = 384  # channels C of the residual stream
    n_head: int | tuple[int, ...] = 6  # query heads; one number, or one per layer
    n_kv_head: int | tuple[int, ...] = 0  # key and value heads (grouped-query attention), one or per layer; 0: n_head
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    n_mlp: int | tuple[int, ...] = 0  # width of the MLP, one or per layer; 0: 4 * n_embd (8/3 for swiglu), -1: no MLP
    mlp: str = "relu2"  # relu2 | gelu | swiglu
    norm: str = "rms"  # rms (no gain: the next matrix has it) | layer | scale
    pos: str = "rope"  # rope | learned | none
    init: str = "fan_in"  # fan_in (output projections and head start at 0) | gpt2 (normal 0.02)
    bias: bool = False  # biases in linear layers and LayerNorm
    tie: bool = False  # output head shares the token embedding
    qk_norm: bool = True  # RMSNorm on queries and keys
    embed_norm: bool = True  # RMSNorm on the embeddings
    n_value_embed: int = 0  # the last n blocks that add a token embedding of their own to their attention values
    dropout: float = 0.0  # on embeddings, attention weights and residual branches
    channel_drop: float = 0.0  # on residual branches, whole channels of a row at a time: unlike dropout it costs no time
    head: str = "softmax"  # softmax | nearest (logits fall with the distance of a regressed point to each embedding)
    ce_weight: float = 1.0  # weight of cross-entropy in training; 0: the semantic loss alone
    semantic: str = "cos"  # cos | mse (a point regressed onto the target's embedding) | soft_ce (softened targets)
    semantic_weight: float = 0.0  # weight of that loss; 0: off
    semantic_temp: float = 0.1  # soft_ce: temperature of the similarity of two embeddings (a cosine)
    soft_rate: float = 0.0  # share of training inputs that are the model's own expected embedding in place of the token's
    n_think: int = 0  # soft steps: the first n think tokens of a window read what the model put out one step before
    think_token: int = -1  # id of the think token; -1: that of the dataset
    history: int = 0  # tokens before the window that are compressed into context slots
    aggregate: int = 0  # 1: a slot with the decayed mean of the whole history
    n_segment: int = 0  # slots with the means of as many equal parts of the history
    n_span: int = 0  # slots that each bind `span` consecutive tokens, the last n_span * span before the window
    span: int = 0  # tokens in a span
    span_binding: bool = True  # turn each token of a span by its place before summing (False: a bag of tokens)
    enrich: bool = False  # make slots from the model's own output vectors over the history, not from its embeddings

    def __post_init__(self):
        def choice(name, *options):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} is one of {', '.join(options)}, not {getattr(self, name)!r}")

        choice("mlp", "relu2", "gelu", "swiglu")
        choice("norm", "rms", "layer", "scale")
        choice("pos", "rope", "learned", "none")
        choice("init", "fan_in", "gpt2")
        choice("head", "softmax", "nearest")
        choice("semantic", "cos", "mse", "soft_ce")
        self.layers = self.layers or "A" * self.n_layer
        self.n_layer = len(parse_layers(self.layers))
        for name in ("block_size", "n_embd", "n_layer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("n_head", "n_kv_head", "n_mlp"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.n_layer:
                raise ValueError(f"{name} gives {len(value)} values for {self.n_layer} layers")
        for i in range(self.n_layer):
            h, kv, d = self.heads(i)
            if h < 1 or kv < 1 or h % kv:
                raise ValueError(f"n_head ({h}) must be a positive multiple of n_kv_head ({kv}) in layer {i}")
            if d * h != self.n_embd and not self.head_dim:
                raise ValueError(f"n_embd ({self.n_embd}) is not a multiple of n_head ({h}); set head_dim to choose one")
            if d < 1 or (self.pos == "rope" and (d % 2 or d != self.heads(0)[2])):
                raise ValueError(f"head_dim must be positive, and for pos = rope even and the same in all layers, not {d}; "
                                 f"with a different n_head per layer set head_dim")
        if not 0 <= self.n_value_embed <= self.n_layer:
            raise ValueError(f"n_value_embed ({self.n_value_embed}) must lie between 0 and the number of layers")
        if self.tie and self.init == "fan_in" and not self.embed_norm:
            raise ValueError("tie = True with init = fan_in needs embed_norm = True: one table cannot be small for the head "
                             "and large for the input")
        for name in ("dropout", "channel_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        if min(self.ce_weight, self.semantic_weight, self.n_think) < 0 or self.semantic_temp <= 0:
            raise ValueError("ce_weight, semantic_weight and n_think cannot be negative, and semantic_temp is positive")
        if not 0 <= self.soft_rate <= 1:
            raise ValueError(f"soft_rate must lie in [0, 1], not {self.soft_rate}")
        if not self.ce_weight and not self.semantic_weight:
            raise ValueError("ce_weight = 0 and semantic_weight = 0 leave nothing to learn; set one of them")
        if not self.ce_weight and self.head == "softmax" and self.semantic != "soft_ce":
            raise ValueError("ce_weight = 0 leaves the softmax head untrained; add --head=nearest or --semantic=soft_ce")
        if not self.ce_weight and self.head == "nearest" and self.semantic == "soft_ce":
            raise ValueError("ce_weight = 0 with head = nearest regresses a point; it needs semantic = mse or cos")
        if self.head == "nearest" and self.tie:
            raise ValueError("head = nearest has no table to tie: it already reads the token embedding; leave tie out")
        if self.enrich and not self.n_slot:
            raise ValueError("enrich needs context slots to make; set history and its slots")
        if self.enrich and self.pos == "learned" and self.history > self.block_size:
            raise ValueError(f"enrich with pos = learned needs history ({self.history}) <= block_size ({self.block_size})")
        if min(self.history, self.n_segment, self.n_span, self.span) < 0 or self.aggregate not in (0, 1):
            raise ValueError("history, n_segment, n_span and span cannot be negative, and aggregate is 0 or 1")
        if bool(self.history) != bool(self.n_slot):
            raise ValueError("history and its slots (aggregate, n_segment, n_span) go together: set both or neither")
        if bool(self.n_span) != bool(self.span) or self.n_span * self.span > self.history:
            raise ValueError(f"n_span * span ({self.n_span} * {self.span}) must be positive and fit into history "
                             f"({self.history})")
        if self.n_segment and self.history % self.n_segment:
            raise ValueError(f"history ({self.history}) is not a multiple of n_segment ({self.n_segment})")
        if self.n_span and self.n_embd % 2:
            raise ValueError(f"n_embd ({self.n_embd}) must be even for the rotary binding of spans")

    @property
    def n_slot(self):
        return self.aggregate + self.n_segment + self.n_span

    def per_layer(self, name, i):
        value = getattr(self, name)
        return value[i] if isinstance(value, tuple) else value

    def heads(self, i):
        """(query heads, key and value heads, head_dim) of layer i."""
        h = self.per_layer("n_head", i)
        return h, self.per_layer("n_kv_head", i) or h, self.head_dim or self.n_embd // max(h, 1)

    def mlp_width(self, i):
        width = self.per_layer("n_mlp", i)
        full = 4 * self.n_embd if self.mlp != "swiglu" else -(-8 * self.n_embd // 3 // 32) * 32
        return full if width == 0 else max(width, 0)


def parse_layers(layers):
    """The blocks that a layer string names, in order; ValueError names the first character that is no block."""
    for i, c in enumerate(layers):
        if c not in BLOCKS:
            raise ValueError(f"layers = {layers!r}: character {i + 1}, {c!r}, is no block; blocks are {', '.join(BLOCKS)}")
    return list(layers)


# ---------------------------------------------------------------------------------------------------------------------
# primitives


class Linear(nn.Linear):
    """nn.Linear that computes in its input's type. The weights stay fp32 for the optimizer and are cast where they are
    used; compiled, that is one cast a step, which costs less than autocast's bookkeeping."""

    def reset_parameters(self):
        """Nothing: GPT.init_weights gives every parameter its value, and building draws no random number."""

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if x.numel() == x.size(-1) and torch.compiler.is_compiling() and x.device.type == "cpu":
            # one token: the fused sum reads weights at memory speed, BLAS's matrix-vector product at a third of it
            y = (weight.float() * x.float().view(-1)).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
            return y if bias is None else y + bias
        return F.linear(x, weight, bias)


class Embedding(nn.Embedding):
    """nn.Embedding of tokens that may be soft: ids (...) -> rows, or distributions p (..., V) -> expected rows p @ E.
    Values are left to GPT.init_weights."""

    def reset_parameters(self):
        """Nothing, as in Linear."""

    def forward(self, tokens):
        V = self.num_embeddings
        if not tokens.is_floating_point():
            if V > 256 or tokens.device.type != "cpu" or not (self.training and torch.compiler.is_compiling()):
                return F.embedding(tokens, self.weight)
            # a small table on a CPU: the gradient of a lookup is added up row by row, that of a product is not
            tokens = tokens[..., None] == torch.arange(V, device=tokens.device)
        return tokens.to(self.weight.dtype) @ self.weight


def rms_norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)  # torch's default would depend on the type


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.n_embd))
        self.bias = nn.Parameter(torch.empty(cfg.n_embd)) if cfg.bias else None

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias)


class ScaleNorm(nn.Module):
    """x / |x| times one learned length (Nguyen and Salazar 2019, arXiv:1910.05895)."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))  # in units of sqrt(C), so that 1 is RMSNorm

    def forward(self, x):
        return rms_norm(x) * self.weight.to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x), without a gain."""

    def __init__(self, cfg):
        super().__init__()

    def forward(self, x):
        return rms_norm(x)


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "scale": ScaleNorm}


class Drop(nn.Module):
    """Dropout of single values, and of whole channels for all positions of a row (variational dropout, Gal and Ghahramani
    2016, arXiv:1512.05287), which draws T times fewer random numbers: those are what dropout costs on a CPU."""

    def __init__(self, cfg):
        super().__init__()
        self.each, self.channel = cfg.dropout, cfg.channel_drop

    def forward(self, x):
        if self.channel and self.training:
            x = x * F.dropout(x.new_ones(x.size(0), 1, x.size(2)), self.channel)
        return F.dropout(x, self.each, self.training) if self.each else x


def rotate(x, cos, sin):
    """Turn the channel pairs (i, i + n/2) of x (..., n) by angles given as cos and sin (..., n/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def attend(q, k, v, mask, dropout):
    """Softmax attention. q (B, H, T, D), k and v (B, Hkv, L, D) -> (B, H, T, D). mask (B, 1, T, L) is True where a query
    may look; None means causal, with T = L.

    On a CPU in bf16 the attention is written out: the compiler fuses it, while the backward of PyTorch's own kernel
    runs about ten times slower in bf16 than in fp32 there.
    """
    B, H, T, D = q.shape
    if T == 1 and mask is not None and q.device.type == "cpu":  # one query: sums, which the compiler fuses
        q = (q * D ** -0.5).reshape(B, k.size(1), -1, 1, D)
        att = (q.float() * k.float().unsqueeze(2)).sum(-1).masked_fill(~mask, float("-inf")).softmax(-1)  # (B, Hkv, G, L)
        return (att[..., None] * v.float().unsqueeze(2)).sum(-2).to(q.dtype).view(B, H, T, D)
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, enable_gqa=H != k.size(1))
    if mask is None:  # in pieces: no query meets the keys of later pieces, and the scores stay in the cache
        place = torch.arange(T, device=q.device)
        n = max(1, T // 128)
        cuts = [T * i // n for i in range(n + 1)]
        return torch.cat([attend(q[:, :, a:b], k[:, :, :b], v[:, :, :b], (place[:b] <= place[a:b, None])[None, None], dropout)
                          for a, b in zip(cuts, cuts[1:])], dim=2)
    group = H // k.size(1)  # the query heads of one key head go along the rows: no key is copied
    q = (q * D ** -0.5).reshape(B, k.size(1), group * T, D)
    att = (q @ k.transpose(-2, -1)).view(B, k.size(1), group, T, -1)
    att = att.float().masked_fill(~mask.unsqueeze(-3), float("-inf")).softmax(-1).to(q.dtype)
    att = F.dropout(att, dropout)
    return (att.view(B, k.size(1), group * T, -1) @ v).view(B, H, T, D)


# ---------------------------------------------------------------------------------------------------------------------
# blocks


class KVCache:
    """Keys and values of one attention layer, (B, L, Hkv, D) each. Which entries are valid is said by the positions in
    State, so rollback has nothing to do here."""

    def __init__(self, k, v):
        self.k, self.v = k, v

    def append(self, k, v, pos):
        """Write k, v (B, Hkv, T, D) at positions pos (B, T); -> all keys and values, (B, Hkv, L, D) each."""
        rows = torch.arange(pos.size(0), device=pos.device)[:, None]
        self.k[rows, pos] = k.transpose(1, 2)
        self.v[rows, pos] = v.transpose(1, 2)
        return self.k.transpose(1, 2), self.v.transpose(1, 2)

    def select(self, rows):
        return KVCache(self.k[rows], self.v[rows])


class State:
    """What decoding carries from one forward to the next: `pos` (B,), the positions each row has filled, and one part
    per block. Passed to GPT.forward and updated by it; made by GPT.init_state. Every shape stays as it is, so that a
    decoding step compiles once; that no row outgrows `capacity` is for the caller to see to."""

    def __init__(self, pos, parts, capacity, begun=False):
        self.pos, self.parts, self.capacity = pos, parts, capacity
        self.begun = begun  # the slots are in

    def advance(self, T):
        """Positions (B, T) of the next T inputs."""
        pos = self.pos[:, None] + torch.arange(T, device=self.pos.device)
        self.pos, self.begun = self.pos + T, True
        return pos

    def rollback(self, n):
        """Forget the last n positions: a number, or one per row (B,)."""
        self.pos = self.pos - n

    def select(self, rows):
        """The state of these rows (a LongTensor; a row may be taken several times)."""
        return State(self.pos[rows], [p.select(rows) for p in self.parts], self.capacity, self.begun)


@dataclass
class Context:
    """What a block may know of its inputs beside x: rotary angles, which keys may be seen, where the state stands."""
    mask: torch.Tensor | None  # (B, 1, T, L), True where a query may look; None: causal
    rope: tuple | None = None  # cos and sin, (T, D/2) or (B, 1, T, D/2)
    tokens: torch.Tensor | None = None  # (B, T) ids or (B, T, V) distributions, for value embeddings; slots have none
    pos: torch.Tensor | None = None  # (B, T) places in the state


class Attention(nn.Module):
    """Causal self-attention with grouped key heads (Ainslie et al. 2023, arXiv:2305.13245), rotary positions
    (Su et al. 2021, arXiv:2104.09864) and QK-norm (Henry et al. 2020, arXiv:2010.04245). (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg, i):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = cfg.heads(i)
        self.qk_norm, self.dropout = cfg.qk_norm, cfg.dropout
        kv_dim = self.n_kv_head * self.head_dim
        self.sizes = (self.n_head * self.head_dim, kv_dim, kv_dim)
        self.c_attn = Linear(cfg.n_embd, sum(self.sizes), bias=cfg.bias)
        self.c_attn.weight.parts = self.sizes  # three matrices in one: an optimizer of matrices takes them apart
        self.c_proj = Linear(self.sizes[0], cfg.n_embd, bias=cfg.bias)
        has_table = i >= cfg.n_layer - cfg.n_value_embed
        self.value_embed = Embedding(cfg.vocab_size, kv_dim) if has_table else None

    def init_state(self, B, L, device, dtype):
        shape = (B, L, self.n_kv_head, self.head_dim)
        return KVCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    def forward(self, x, ctx, cache=None):
        B, T, C = x.shape
        qk, v = self.c_attn(x).split((self.sizes[0] + self.sizes[1], self.sizes[2]), dim=-1)
        if self.value_embed is not None:
            ve = self.value_embed(ctx.tokens).to(v.dtype)
            v = v + F.pad(ve, (0, 0, T - ve.size(1), 0))  # slots have no token
        qk, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in (qk, v))  # (B, H + Hkv, T, D), (B, Hkv, T, D)
        if self.qk_norm:
            qk = rms_norm(qk)
        if ctx.rope is not None:
            qk = rotate(qk, *ctx.rope)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=1)
        if cache is not None:
            k, v = cache.append(k, v, ctx.pos)
        y = attend(q, k, v, ctx.mask, self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """Feed-forward layer: relu2 (So et al. 2021, arXiv:2109.08668), gelu, or swiglu (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, cfg, width):
        super().__init__()
        self.kind = cfg.mlp
        self.c_fc = Linear(cfg.n_embd, width * (2 if cfg.mlp == "swiglu" else 1), bias=cfg.bias)
        self.c_proj = Linear(width, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        x = self.c_fc(x)
        if self.kind == "relu2":
            x = F.relu(x).square()
        elif self.kind == "gelu":
            x = F.gelu(x)
        else:
            x, gate = x.chunk(2, dim=-1)
            x = x * F.silu(gate)
        return self.c_proj(x)


BLOCKS = {"A": (Attention, MLP)}  # character: (mixer over positions, feed-forward)


class Block(nn.Module):
    """Pre-norm residual block: a mixer over positions, then a feed-forward layer (none where its width is 0)."""

    def __init__(self, cfg, char, i):
        super().__init__()
        mixer, feed_forward = BLOCKS[char]
        width = cfg.mlp_width(i)
        self.ln_1 = NORMS[cfg.norm](cfg)
        self.attn = mixer(cfg, i)
        self.ln_2 = NORMS[cfg.norm](cfg) if width else None
        self.mlp = feed_forward(cfg, width) if width else None
        self.drop = Drop(cfg)

    def forward(self, x, ctx, part=None):
        x = x + self.drop(self.attn(self.ln_1(x), ctx, part))
        if self.mlp is not None:
            x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


# ---------------------------------------------------------------------------------------------------------------------
# context slots


class Slots(nn.Module):
    """Context slots (softAR): the tokens before the window as [aggregate | segments | spans], oldest first.

    history (B, history) token ids, oldest first, -1 where there is none, and a vector for each, (B, history, C)
    -> (B, S, C). The vectors are embeddings, or with `enrich` what the model put out over the history. The aggregate is a
    decayed mean of the whole history; a token's weight has fallen to e^-4 when it leaves, so that slots are a function of
    the ids kept and of nothing else. A segment is the mean of an equal part; a span is the sum of its tokens, each turned
    by its place (a rotary binding in the manner of Plate 1995, so order survives the sum). Then a norm, one shared
    projection and a learned embedding per slot. A slot with nothing in it has the learned vector `empty` in place of its normed sum.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.proj = Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.slot_embed = nn.Parameter(torch.empty(cfg.n_slot, cfg.n_embd))
        self.empty = nn.Parameter(torch.empty(cfg.n_embd))
        age = torch.arange(cfg.history - 1, -1, -1, dtype=torch.float32)
        self.register_buffer("decay", torch.exp(-4 * age / cfg.history), persistent=False)
        # angles spread evenly over (0, pi): sums of tokens at different places are orthogonal on average
        turn = math.pi * (torch.arange(cfg.n_embd // 2) + 0.5) / (cfg.n_embd // 2)
        turn = torch.outer(torch.arange(cfg.span, dtype=torch.float32), turn) * cfg.span_binding
        self.register_buffer("cos", turn.cos(), persistent=False)
        self.register_buffer("sin", turn.sin(), persistent=False)

    def forward(self, history, vectors):
        B, cfg = history.size(0), self.cfg
        have = (history >= 0).to(vectors.dtype)  # (B, history)
        e = vectors * have[..., None]
        pooled, count = [], []
        if cfg.aggregate:
            w = self.decay * have
            pooled.append(w[:, None] @ e)
            count.append(w.sum(1, keepdim=True))
        if cfg.n_segment:
            pooled.append(e.view(B, cfg.n_segment, -1, e.size(-1)).sum(2))
            count.append(have.view(B, cfg.n_segment, -1).sum(2))
        if cfg.n_span:
            n = cfg.n_span * cfg.span
            pooled.append(rotate(e[:, -n:].view(B, cfg.n_span, cfg.span, -1), self.cos, self.sin).sum(2))
            count.append(have[:, -n:].view(B, cfg.n_span, -1).sum(2))
        pooled, count = torch.cat(pooled, 1), torch.cat(count, 1)[..., None]
        pooled = torch.where(count > 0, rms_norm(pooled), self.empty)  # the norm makes a sum and a mean the same
        return self.proj(pooled) + self.slot_embed


# ---------------------------------------------------------------------------------------------------------------------
# soft tokens


class Point(nn.Module):
    """The output as a point z of the embedding space, regressed onto the target's normalised embedding e_y, or read off by
    distance. (B, T, C) -> (B, T, C). |e_v|^2 is C for every v, so -|z - e_v|^2 and 2 z.e_v differ by the same for all
    tokens and have one softmax: what `nearest` computes."""

    def __init__(self, cfg):
        super().__init__()
        self.proj = Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        self.scale = nn.Parameter(torch.empty(1)) if cfg.head == "nearest" else None

    def forward(self, h):
        return self.proj(h).float()

    def nearest(self, z, e):
        """Points (B, T, C), embeddings (V, C) -> logits (B, T, V): negative squared distances, up to a row's constant."""
        return 16 * self.scale * (z @ e.T) / e.size(-1)


def semantic_loss(kind, z, logits, e, targets, temp):
    """A loss that knows how far off a wrong token is, summed over scored targets (B, T). z (B, T, C) is regressed onto the
    target's normalised embedding (mse: squared distance / C; cos: 1 - cosine); soft_ce is the cross-entropy of logits
    (B, T, V) against targets spread over tokens by their similarity to the right one. e (V, C) carries no gradient."""
    e, y = e.detach(), targets.clamp(min=0)
    if kind == "soft_ce":
        near = (e[y] @ e.T / e.size(-1) / temp).softmax(-1)  # (B, T, V)
        loss = -(near * logits.log_softmax(-1)).sum(-1)
    elif kind == "mse":
        loss = (z - e[y]).square().mean(-1)
    else:
        loss = 1 - F.cosine_similarity(z, e[y], dim=-1)
    return loss.masked_fill(targets < 0, 0.0).sum()


class Thoughts:
    """What thinking adds to a State: for each position the distribution (B, L, V) that the model put out there, and how many
    think tokens (B, L) there were up to it."""

    def __init__(self, p, count):
        self.p, self.count = p, count

    def select(self, rows):
        return Thoughts(self.p[rows], self.count[rows])


# ---------------------------------------------------------------------------------------------------------------------
# GPT


@dataclass
class Output:
    """What GPT.forward returns, whatever the variant. Unpacks as `logits, loss = model(idx, targets)`."""
    logits: torch.Tensor  # (B, T, V)
    loss: torch.Tensor | None  # scalar: the weighted sum of `losses`, None without targets
    losses: dict  # name: scalar; "ce" is the plain cross-entropy, nats a scored token

    def __iter__(self):
        return iter((self.logits, self.loss))


class GPT(nn.Module):
    """A decoder-only transformer and its variants. All weights are drawn from (seed, parameter name)."""

    def __init__(self, cfg, seed=1337):
        super().__init__()
        if cfg.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, not {cfg.vocab_size}")
        self.cfg = cfg
        self.wte = Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = Embedding(cfg.block_size, cfg.n_embd) if cfg.pos == "learned" else None
        self.slots = Slots(cfg) if cfg.n_slot else None
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, c, i) for i, c in enumerate(parse_layers(cfg.layers)))
        self.ln_f = NORMS[cfg.norm](cfg)
        nearest = cfg.head == "nearest"
        self.lm_head = None if nearest else Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.point = Point(cfg) if nearest or (cfg.semantic_weight and cfg.semantic != "soft_ce") else None
        if cfg.n_think and not 0 <= cfg.think_token < cfg.vocab_size:
            raise ValueError(f"think_token must be an id below {cfg.vocab_size}, not {cfg.think_token}")
        if cfg.tie:
            self.lm_head.weight = self.wte.weight
        if cfg.pos == "rope":
            angle = 10000.0 ** (-torch.arange(0, 1, 2 / cfg.heads(0)[2]))
            length = cfg.n_slot + max(cfg.block_size, cfg.history if cfg.enrich else 0)
            angle = torch.outer(torch.arange(length, dtype=torch.float32), angle)
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)
        self.dtype = torch.float32  # what the forward computes in; the trainer sets bf16 where it is fast
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """Every initial value, in one place. Each parameter has a generator of its own, seeded by (seed, its name), so a
        mechanism that is switched on changes no other parameter."""
        gpt2 = self.cfg.init == "gpt2"
        for name, p in self.named_parameters():
            g = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big"))
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1 and name != "slots.empty":  # gains of norms
                p.fill_(1.0)
            elif gpt2:
                out = name.endswith("c_proj.weight")
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.cfg.n_layer) if out else 0.02, generator=g)
            elif name.endswith(("c_proj.weight", "value_embed.weight")) or name == "lm_head.weight":
                p.zero_()
            elif name in ("wte.weight", "slots.empty"):  # as the output head too, ones would shout the current token
                p.normal_(0.0, 1 / self.cfg.n_embd if self.cfg.tie else 1.0, generator=g)
            elif name in ("wpe.weight", "slots.slot_embed"):
                p.normal_(0.0, 0.1, generator=g)
            elif name == "point.proj.weight":  # near nothing, where every token is as near, but with a direction
                p.normal_(0.0, 0.1 * p.size(1) ** -0.5, generator=g)
            else:  # matrices
                p.normal_(0.0, p.size(1) ** -0.5, generator=g)

    def num_params(self):
        """Number of parameters without learned positions, as nanoGPT counts."""
        return sum(p.numel() for p in self.parameters()) - (self.wpe.weight.numel() if self.wpe is not None else 0)

    def random(self):
        """Whether training computes something else than evaluation does."""
        return bool(self.cfg.dropout or self.cfg.channel_drop or self.cfg.soft_rate)

    def flops_per_token(self):
        """Floating-point operations of forward and backward per scored token: 6 per weight of a matrix and position, and
        12 H D T for attention (PaLM, arXiv:2204.02311, appendix B), slots counted as positions. A pass of thinking counts
        whole, one without gradient a third."""
        cfg = self.cfg
        T = cfg.n_slot + cfg.block_size
        weights = sum(p.numel() for n, p in self.named_parameters() if p.dim() == 2 and "embed" not in n and "wpe" not in n
                      and (n != "wte.weight" or cfg.tie or cfg.head == "nearest"))
        attention = sum(12 * cfg.heads(i)[0] * cfg.heads(i)[2] * T for i in range(cfg.n_layer))
        positions = T + cfg.enrich * (cfg.n_slot + cfg.history) / 3
        return (6 * weights + attention) * positions / cfg.block_size * (1 + cfg.n_think + (cfg.soft_rate > 0) / 3)

    def init_state(self, B, dtype=None):
        """An empty decoding State for B rows, with room for every slot and the whole window."""
        device, L, V = self.wte.weight.device, self.cfg.n_slot + self.cfg.block_size, self.cfg.vocab_size
        parts = [b.attn.init_state(B, L, device, dtype or self.dtype) for b in self.blocks]
        if self.cfg.n_think:
            parts.append(Thoughts(torch.zeros(B, L, V, device=device), torch.zeros(B, L, dtype=torch.long, device=device)))
        return State(torch.zeros(B, dtype=torch.long, device=device), parts, L)

    def vectors(self, history):
        """What slots are made of, a vector for each id of history (B, H) -> (B, H, C): embeddings, or with `enrich` the
        output of one pass without gradient over the history, its own slots empty."""
        ids = history.clamp(min=0)
        if not self.cfg.enrich:
            return self.wte(ids)
        with torch.no_grad():
            return self.hidden(ids, have=history >= 0).float()

    def embed(self, tokens, history, state):
        """Tokens, ids (B, T) or distributions (B, T, V), and the history behind them -> x (B, S + T, C), S. Slots come
        first, once: with a state that already holds positions there are none to add."""
        x = self.wte(tokens)
        begins = state is None or not state.begun
        if self.wpe is not None:
            place = torch.arange(tokens.size(1), device=tokens.device)
            if not begins:
                place = (place + state.pos[:, None] - self.cfg.n_slot).clamp(max=self.cfg.block_size - 1)
            x = x + self.wpe(place)
        S = 0
        if self.slots is not None and begins:
            if history is None:
                history = torch.full((x.size(0), self.cfg.history), -1, device=x.device)
                vectors = x.new_zeros(*history.shape, x.size(-1))
            else:
                vectors = self.vectors(history)
            x = torch.cat((self.slots(history, vectors), x), dim=1)
            S = self.cfg.n_slot
        x = x.to(self.dtype)
        return self.drop(rms_norm(x) if self.cfg.embed_norm else x), S

    def context(self, tokens, T, state, have):
        """What all blocks share: the causal mask, rotary angles, and where the state stands."""
        if state is None:
            rope = None if self.cfg.pos != "rope" else (self.cos[:T].to(self.dtype), self.sin[:T].to(self.dtype))
            mask = None
            if have is not None:  # what is missing is seen by nobody but itself
                at = torch.arange(T, device=tokens.device)
                seen = F.pad(have, (T - have.size(1), 0), value=True)[:, None] & (at <= at[:, None])
                mask = (seen | (at == at[:, None]))[:, None]
            return Context(mask, rope, tokens)
        pos = state.advance(T)  # (B, T)
        mask = (torch.arange(state.capacity, device=tokens.device) <= pos[..., None])[:, None]
        at = pos.clamp(max=state.capacity - 1)[:, None]
        rope = None if self.cfg.pos != "rope" else (self.cos[at].to(self.dtype), self.sin[at].to(self.dtype))
        return Context(mask, rope, tokens, pos)

    def hidden(self, tokens, history=None, state=None, have=None):
        """The trunk: tokens, ids (B, T) or distributions (B, T, V) -> normalised output vectors (B, T, C). have (B, T) is
        False where there is no token."""
        x, S = self.embed(tokens, history, state)
        ctx = self.context(tokens, x.size(1), state, have)
        for i, block in enumerate(self.blocks):
            x = block(x, ctx, None if state is None else state.parts[i])
        return self.ln_f(x[:, S:])

    def read(self, h, regress=False):
        """Output vectors (B, T, C) -> logits (B, T, V), and where the head or, with `regress`, a loss asks for them: the
        point (B, T, C) in embedding space and the normalised embeddings (V, C), else None."""
        near = self.lm_head is None
        z = self.point(h) if near or (regress and self.point is not None) else None
        e = rms_norm(self.wte.weight.float()) if near or (regress and self.cfg.semantic_weight) else None
        if not near:
            return self.lm_head(h).float(), z, e
        if self.cfg.ce_weight:
            return self.point.nearest(z, e), z, e
        return self.point.nearest(z.detach(), e.detach()), z, e  # cross-entropy then sets the scale and nothing else

    def soften(self, idx, history):
        """Training inputs of which a share is soft: idx (B, T) -> (B, T, V), where a token is replaced by what the model
        expected in its place, from a pass without gradient."""
        with torch.no_grad():
            p = self.read(self.hidden(idx, history))[0].softmax(-1)
        soft = (torch.rand(idx.shape, device=idx.device) < self.cfg.soft_rate) & (idx != self.cfg.think_token)
        soft = soft[:, 1:, None]  # nothing is expected in the first place
        hard = F.one_hot(idx, self.cfg.vocab_size).to(p.dtype)
        return torch.cat((hard[:, :1], torch.where(soft, p[:, :-1], hard[:, 1:])), dim=1)

    def think(self, tokens, history, state):
        """hidden, but each of the first n_think think tokens in the window reads the distribution that the model put out one
        step before, and gradients flow through it (Coconut, Hao et al. 2024, arXiv:2412.06769, with expected embeddings
        for hidden states). n_think further passes over all places: after the i-th the first i are right."""
        n, V = self.cfg.n_think, self.cfg.vocab_size
        hard = tokens if tokens.is_floating_point() else F.one_hot(tokens, V).float()
        B, T, _ = hard.shape
        thinks = hard[..., self.cfg.think_token] == 1
        count = thinks.cumsum(1)  # (B, T): think tokens so far
        first, can = hard[:, :1], torch.zeros_like(thinks[:, :1])  # the first place has an output before it in a state only
        before = None if state is None else (state.pos, state.begun)
        if state is not None and state.begun:
            rows, thoughts, can = torch.arange(B, device=hard.device), state.parts[-1], (state.pos > self.cfg.n_slot)[:, None]
            last = (state.pos - 1).clamp(min=0)
            first, count = thoughts.p[rows, last][:, None], count + thoughts.count[rows, last][:, None] * can
        soft = (thinks & (count <= n))[..., None]
        first = torch.where(soft[:, :1] & can[..., None], first, hard[:, :1])
        tokens = torch.cat((first, hard[:, 1:]), dim=1)
        h = self.hidden(tokens, history, state)
        for _ in range(min(n, T - 1)):
            if state is not None:
                state.pos, state.begun = before
            p = self.read(h)[0].softmax(-1)
            tokens = torch.cat((first, torch.where(soft[:, 1:], p[:, :-1], hard[:, 1:])), dim=1)
            h = self.hidden(tokens, history, state)
        if state is not None:
            rows = torch.arange(B, device=hard.device)[:, None]
            pos = state.pos[:, None] - T + torch.arange(T, device=hard.device)
            state.parts[-1].p[rows, pos] = self.read(h)[0].softmax(-1)
            state.parts[-1].count[rows, pos] = count
        return h

    def forward(self, idx, targets=None, history=None, state=None, denom=None):
        """idx (B, T) token ids, or (B, T, V) distributions over them (soft tokens) -> Output.

        targets (B, T): the next tokens, -1 where none is scored; the loss is their summed cross-entropy over `denom`
        (default: how many are scored; a trainer passes the count over all ranks and micro-steps).
        history (B, cfg.history): the ids before the window, oldest first, -1 where missing; None: all missing.
        state: decoding State that idx continues; it is updated in place.
        """
        cfg = self.cfg
        if self.training and cfg.soft_rate:
            idx = self.soften(idx, history)
        h = self.think(idx, history, state) if cfg.n_think else self.hidden(idx, history, state)
        logits, z, e = self.read(h, regress=targets is not None)
        if targets is None:
            return Output(logits, None, {})
        denom = (targets >= 0).sum().clamp(min=1) if denom is None else denom
        ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        losses = {"ce": ce / denom}
        loss = losses["ce"] * (cfg.ce_weight or float(cfg.head == "nearest"))
        if cfg.semantic_weight:
            losses["semantic"] = semantic_loss(cfg.semantic, z, logits, e, targets, cfg.semantic_temp) / denom
            loss = loss + cfg.semantic_weight * losses["semantic"]
        return Output(logits, loss, losses)


def settings(cfg):
    """A config as plain data, for a checkpoint; GPTConfig(**settings) makes it again."""
    return dataclasses.asdict(cfg)
