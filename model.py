"""GPT and its variants, bottom-up: settings, primitives, retrieval, blocks, context slots, GPT.

A variant is a setting of GPTConfig; at 0, "" or False it has no parameter and draws no random number, and what is left is
the plain GPT, bit for bit. `layers` describes the network, a character a block:

    A   causal self-attention + MLP
    R   gated linear recurrence + MLP
    G   GRU + MLP
    F   causal self-attention + featural memory: learned slots in place of the MLP
    M   causal self-attention + associative memory: entries written while reading, in place of the MLP
    ( ) a level: what stands inside runs once a chunk of what stands outside
    .   an early exit: the model's one head reads what it has got so far

Notation: B rows, T positions, C = n_embd channels, H heads, D = head_dim, V = vocab_size, S context slots.
This module knows torch and nothing else: no files, no data, no decoding policy.
"""
import dataclasses
import hashlib
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------------------
# settings


CHOICES = {"mlp": ("relu2", "gelu", "swiglu"), "norm": ("rms", "layer", "scale"), "pos": ("rope", "learned", "none"),
           "init": ("fan_in", "gpt2"), "gate": ("positive", "real", "complex"), "plan": ("add", "cross"),
           "concept": ("cos", "mse", "energy", "flow"), "head": ("softmax", "nearest"), "semantic": ("cos", "mse", "soft_ce"),
           "exit_loss": ("depth", "rotate")}
RANGES = {"block_size": (1, 2 ** 20), "vocab_size": (0, 2 ** 24), "n_layer": (0, 1000), "n_embd": (1, 2 ** 16), "n_head": (1, 2 ** 12),
          "n_kv_head": (0, 2 ** 12), "head_dim": (0, 2 ** 12), "n_mlp": (-1, 2 ** 20), "concept_weight": (0, 1e6), "horizon": (1, 2 ** 12),
          "eot": (-1, 2 ** 24), "space": (0, 2 ** 24), "n_mem": (1, 2 ** 24), "mem_head": (1, 2 ** 10), "mem_top": (1, 2 ** 12),
          "mem_dim": (1, 2 ** 12), "mem_size": (0, 2 ** 24), "mem_chunk": (1, 2 ** 16), "mem_shift": (0, 2 ** 16), "mem_novelty": (1e-6, 1e6),
          "mem_drop": (0, 1 - 1e-9), "mem_noise": (0, 1e6), "n_value_embed": (0, 1000), "dropout": (0, 1 - 1e-9), "channel_drop": (0, 1 - 1e-9),
          "ce_weight": (0, 1e6), "semantic_weight": (0, 1e6), "semantic_temp": (1e-6, 1e6), "soft_rate": (0, 1), "n_think": (0, 1000),
          "think_token": (-1, 2 ** 24), "history": (0, 2 ** 20), "aggregate": (0, 1), "n_segment": (0, 2 ** 12), "n_span": (0, 2 ** 16),
          "span": (0, 2 ** 16), "exit_weight": (0, 1e6), "exit_distill": (0, 1), "exit_rate": (0, 1), "layer_drop": (0, 1 - 1e-9)}


@dataclass
class GPTConfig:
    block_size: int = 256  # tokens in the window (hard tokens: context slots come on top)
    vocab_size: int = 0  # number of tokens; 0: that of the dataset
    layers: str = ""  # one character a block; "" means "A" * n_layer
    n_layer: int = 0  # number of blocks; 0: 6, or those of layers
    n_embd: int = 384  # channels C of the residual stream
    n_head: int | tuple[int, ...] = 6  # query heads; one number, or one per block in the order of the string
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
    gate: str = "real"  # of R: positive (0 to 1) | real (-1 to 1) | complex (channel pairs turn by n-ths, and keep 0 to 1)
    chunk: str | int = "4"  # positions in a chunk of a level, or space (a word); "space,4" is one value a depth
    plan: str = "add"  # how a level reaches the one below it: add (its state) | cross (attention to predicted concepts)
    concept: str = "cos"  # a level predicts the next concept by cos | mse | energy (an energy score) | flow (flow matching)
    concept_weight: float | tuple[float, ...] = 0.01  # weight of that loss, one or per depth; 0: a level without it
    horizon: int = 1  # concepts that are predicted ahead
    share_levels: bool = False  # levels run the blocks of the token level, one set of weights for all
    eot: int = -1  # id that ends a document, where recurrences and chunks begin again; -1: that of the dataset
    space: tuple[int, ...] = ()  # ids that end a word, for chunk = space; (): those of the dataset
    n_mem: int = 4096  # slots of a featural memory (F), a square number
    mem_head: int = 4  # queries that each position puts to a memory
    mem_top: int = 16  # slots that a query reads
    mem_dim: int = 64  # channels of a query and of a key
    mem_size: int = 2048  # entries that an associative memory (M) keeps beyond its window, per head
    mem_chunk: int = 16  # positions that search before any of them is written
    mem_shift: int = 1  # an entry pairs the key of a position with the value of the one so many later: what came next
    mem_novelty: float = 0.98  # a key as near as that (cosine) to a stored one takes its place; above 1: all are stored
    mem_drop: float = 0.0  # share of what is found that is dropped in training
    mem_noise: float = 0.0  # standard deviation of noise on a query's channels in training: what is found must be nearer than that
    mem_straight: bool = False  # return keys too, whose gradient counts as the query's
    n_value_embed: int = 0  # the last n token-level blocks A that add a token embedding of their own to their attention values
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
    exit_weight: float = 1.0  # weight of the losses at the exits, all together; 0: exits that are not trained
    exit_loss: str = "depth"  # depth (every exit, the deeper the more: CALM) | rotate (one exit a step, in turn: LayerSkip)
    exit_distill: float = 0.0  # share of an exit's loss that is its divergence from the last layer, in place of the target
    exit_rate: float = 0.0  # share of training rows whose positions leave where an exit is sure, as they do in decoding
    exit_keys: bool = False  # attention behind the first exit takes keys and values from there: leaving changes nothing for others
    exit_classifier: bool = False  # a classifier for all exits: is what this one would choose what the last layer will?
    layer_drop: float = 0.0  # chance that a training step leaves out the last block; earlier ones have less, the first none

    def __post_init__(self):
        for name, options in CHOICES.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name} is one of {', '.join(options)}, not {getattr(self, name)!r}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            each = value if isinstance(value, tuple) else (value,)
            if not all(type(v) in (int, float) and low <= v <= high for v in each) or not (each or name == "space"):  # NaN is in no range
                raise ValueError(f"{name} must lie between {low} and {high:,}, not {value}")
        if len(self.layers) > 4000:
            raise ValueError(f"layers has {len(self.layers):,} characters; give at most 4,000")
        self.layers = self.layers or "A" * (self.n_layer or 6)
        tree, blocks = parse_layers(self.layers), [c for c in self.layers if c in BLOCKS]
        if len(blocks) > RANGES["n_layer"][1]:
            raise ValueError(f"layers has {len(blocks):,} blocks; a model has at most {RANGES['n_layer'][1]:,}")
        if self.n_layer not in (0, len(blocks)):
            raise ValueError(f"n_layer says {self.n_layer} blocks, and layers = {self.layers} has {len(blocks)}; leave one of them out")
        self.n_layer = len(blocks)
        for name, needs in self.idle(shapes=False):
            raise ValueError(f"{name} has nothing to work on; it needs {needs}")
        self.check_levels(tree)
        self.check_memories(tree)
        self.check_heads(tree)
        self.check_slots(tree)
        if self.tie and self.init == "fan_in" and not self.embed_norm:
            raise ValueError("tie = True with init = fan_in needs embed_norm = True: one table cannot be small for the head "
                             "and large for the input")
        if self.layer_drop and self.n_layer < 2:
            raise ValueError("layer_drop spares the first block, and there is no other; leave it out")
        if "." in self.layers and self.head == "nearest" and not self.ce_weight:
            raise ValueError("exits are trained by cross-entropy, which ce_weight = 0 turns off; leave one of them out")
        if not self.ce_weight and not self.semantic_weight:
            raise ValueError("ce_weight = 0 and semantic_weight = 0 leave nothing to learn; set one of them")
        if not self.ce_weight and self.head == "softmax" and self.semantic != "soft_ce":
            raise ValueError("ce_weight = 0 leaves the softmax head untrained; add --head=nearest or --semantic=soft_ce")
        if not self.ce_weight and self.head == "nearest" and self.semantic == "soft_ce":
            raise ValueError("ce_weight = 0 with head = nearest regresses a point; it needs semantic = mse or cos")
        if self.head == "nearest" and self.tie:
            raise ValueError("head = nearest has no table to tie: it already reads the token embedding; leave tie out")
        if self.exit_keys and (carries := [c for c in self.layers[self.layers.index("."):] if c in "RGM("]):
            raise ValueError(f"exit_keys promises that a token which leaves changes nothing for others, and behind the first exit in layers = "
                             f"{self.layers} {'a level' if carries[0] == '(' else carries[0]} carries on what a token left with; put A or F there")

    def idle(self, shapes=True):
        """Yields (name, what it needs) of each setting that was changed and has nothing to work on; shapes: also of those that only say
        how large or of which kind a mechanism is, which settings shared by several models may well have."""
        has = lambda letters: bool(set(letters) & set(self.layers))
        for there, needs, names, shape in (
                (has("R"), "a block R in layers", "", "gate"),
                (has("AFM") or self.plan == "cross", "a block that attends (A, F or M) in layers", "", "n_kv_head head_dim qk_norm"),
                (has("ARG"), "a block with an MLP (A, R or G) in layers", "", "mlp n_mlp"),
                (has("("), "a level, ( ), in layers", "share_levels", "chunk plan concept concept_weight horizon"),
                (has("FM"), "a memory (F or M) in layers", "", "mem_head mem_top mem_dim"),
                (has("F"), "a block F in layers", "", "n_mem"),
                (has("M"), "a block M in layers", "mem_drop mem_noise mem_straight", "mem_size mem_chunk mem_shift mem_novelty"),
                (has("."), "an exit, . , in layers", "exit_distill exit_rate exit_keys exit_classifier", "exit_weight exit_loss"),
                (has(".") and self.exit_weight, "an exit with an exit_weight", "", "exit_distill exit_loss"),
                (self.plan == "cross" or self.concept_weight, "plan = cross or a concept_weight", "", "concept horizon"),
                (self.n_slot, "context slots: history and one of aggregate, n_segment, n_span", "enrich", ""),
                (self.n_span, "spans: history, n_span and span", "", "span_binding"),
                (self.semantic_weight, "a semantic_weight above 0", "", "semantic"),
                (self.semantic_weight and self.semantic == "soft_ce", "semantic = soft_ce and its weight", "", "semantic_temp"),
                (self.n_think, "n_think above 0", "", "think_token")):
            for name in (names + (" " + shape) * shapes).split():
                if not there and getattr(self, name) != getattr(GPTConfig, name):
                    yield name, needs

    def check_memories(self, tree):
        if "F" in self.layers and (math.isqrt(self.n_mem) ** 2 != self.n_mem or not 2 <= self.mem_top <= self.n_mem or self.mem_dim % 2 or
                                   self.mem_dim < 4):
            raise ValueError(f"a memory F needs n_mem ({self.n_mem}) to be a square number of at least mem_top ({self.mem_top}) slots, mem_top to "
                             f"be at least 2 (of one slot it cannot learn which), and mem_dim ({self.mem_dim}) to be even and at least 4")

        def check(items, depth):
            places = self.most_chunks(depth, self.block_size)
            first = self.mem_chunk * (self.mem_shift // self.mem_chunk + 1)  # the place that finds something first
            if "M" in items and places <= first:
                raise ValueError("a block M has " + (f"{places} chunks of a level" if depth else f"block_size = {places} tokens") + f", and with mem_chunk "
                                 f"= {self.mem_chunk} and mem_shift = {self.mem_shift} finds nothing before the {first + 1}th; give a smaller mem_chunk or mem_shift" + ", or a smaller chunk" * bool(depth))
            for item in items:
                if isinstance(item, list):
                    check(item, depth + 1)
        if "M" in self.layers:
            check(tree, 0)
            if self.block_size % self.mem_chunk:
                raise ValueError(f"block_size ({self.block_size}) is not a multiple of mem_chunk ({self.mem_chunk})")
            if self.mem_shift > self.block_size // 2:
                raise ValueError(f"mem_shift ({self.mem_shift}) pairs a key with a value so many places on; give at most half of block_size "
                                 f"({self.block_size})")

    def check_heads(self, tree):
        for name in ("n_head", "n_kv_head", "n_mlp"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.n_layer:
                raise ValueError(f"{name} gives {len(value)} values for {self.n_layer} layers")
        for i in self.attending():
            h, kv, d = self.heads(i)
            if h % kv:
                raise ValueError(f"n_head ({h}) must be a positive multiple of n_kv_head ({kv}) in layer {i}")
            if d * h != self.n_embd and not self.head_dim:
                raise ValueError(f"n_embd ({self.n_embd}) is not a multiple of n_head ({h}); set head_dim to choose one")
            if d < 1 or (self.pos == "rope" and (d % 2 or d != self.heads(self.attending()[0])[2])):
                raise ValueError(f"head_dim must be positive, and for pos = rope even and the same in all layers, not {d}; "
                                 f"with a different n_head per layer set head_dim")
        if self.n_value_embed > tree.count("A"):
            raise ValueError(f"n_value_embed ({self.n_value_embed}) must lie between 0 and the number of token-level blocks A")

    def check_slots(self, tree):
        if self.enrich and self.pos == "learned" and self.history > self.block_size:
            raise ValueError(f"enrich with pos = learned needs history ({self.history}) <= block_size ({self.block_size})")
        if bool(self.history) != bool(self.n_slot):
            raise ValueError("history and its slots (aggregate, n_segment, n_span) go together: set both or neither")
        if bool(self.n_span) != bool(self.span) or self.n_span * self.span > self.history:
            raise ValueError(f"n_span * span ({self.n_span} * {self.span}) must be positive and fit into history "
                             f"({self.history})")
        if self.n_segment and self.history % self.n_segment:
            raise ValueError(f"history ({self.history}) is not a multiple of n_segment ({self.n_segment})")
        if self.n_span and self.n_embd % 2:
            raise ValueError(f"n_embd ({self.n_embd}) must be even for the rotary binding of spans")
        if self.n_slot and not any(c in BLOCKS for c in tree if isinstance(c, str)):
            raise ValueError(f"context slots are read by blocks outside of levels, and layers = {self.layers} has none; add one")

    def check_levels(self, tree):
        """ValueError where the settings of levels and of recurrences do not fit the tree of a layer string."""
        chunks = str(self.chunk).replace(" ", "").split(",")
        self.chunk = ",".join(chunks)
        depth = max(itertools.accumulate({"(": 1, ")": -1}.get(c, 0) for c in self.layers))
        for i, c in enumerate(chunks):
            if not (c.isascii() and c.isdecimal() and len(c) < 10 and int(c) > 0) and not (c == "space" and i == 0):
                raise ValueError(f"chunk is a positive number or, for the first level, space, not {c!r}")
        if len(chunks) not in (1, depth) and depth:
            raise ValueError(f"chunk gives {len(chunks)} values for {depth} depths of levels")
        if chunks == ["space"] and depth > 1:
            raise ValueError("chunk = space says nothing of the levels above words; give one value a depth, as space,4")
        if depth and not self.most_chunks(depth, self.block_size):
            raise ValueError(f"chunk = {self.chunk} closes no chunk of the slowest level in a window of {self.block_size}; give a smaller one")
        if isinstance(self.concept_weight, tuple) and len(self.concept_weight) != depth:
            raise ValueError(f"concept_weight gives {len(self.concept_weight)} values for {depth} depths of levels")
        if depth and self.horizon > self.block_size:
            raise ValueError(f"horizon ({self.horizon}) must lie between 1 and block_size ({self.block_size})")
        if self.share_levels and self.plan == "cross" and depth > 1:
            raise ValueError("share_levels with plan = cross takes one depth of levels: nobody would read the slower plans")
        if self.share_levels and "M" in self.layers:
            raise ValueError("share_levels gives one block to several levels, and a memory M belongs to one; leave one of them out")
        if (depth or (self.gate == "complex" and "R" in self.layers)) and self.n_embd % 2:
            raise ValueError(f"n_embd ({self.n_embd}) must be even for levels and for gate = complex")

        def check(items, outer):
            for i, item in enumerate(items):
                if isinstance(item, list):
                    if self.plan == "cross" and not any(c in BLOCKS for c in items[i:] if isinstance(c, str)):
                        raise ValueError("plan = cross needs a block behind each level, to read its plan")
                    mine = [c for c in item if isinstance(c, str)]
                    if self.share_levels and outer[:len(mine)] != mine:
                        raise ValueError(f"share_levels runs the first token-level blocks ({''.join(outer)}) in every level, but "
                                         f"one of them asks for {''.join(mine)}")
                    check(item, outer)
        check(tree, [c for c in tree if isinstance(c, str) and c in BLOCKS])

    @property
    def n_slot(self):
        return self.aggregate + self.n_segment + self.n_span

    def attending(self):
        """The numbers of the blocks that attend to something, by heads."""
        return [i for i, c in enumerate(c for c in self.layers if c in BLOCKS) if c in "AFM" or self.plan == "cross"]

    def most_chunks(self, depth, length):
        """The most chunks that levels of this depth close over so many tokens (words beyond a quarter of them are none to a level)."""
        chunks = self.chunk.split(",")
        for c in chunks[:depth] if len(chunks) > 1 else chunks * depth:
            length //= 4 if c == "space" else int(c)
        return length

    def per_layer(self, name, i):
        value = getattr(self, name)
        return value[i] if isinstance(value, tuple) else value

    def level_weight(self, depth):
        return self.concept_weight[depth - 1] if isinstance(self.concept_weight, tuple) else self.concept_weight

    def heads(self, i):
        """(query heads, key and value heads, head_dim) of layer i."""
        h = self.per_layer("n_head", i)
        return h, self.per_layer("n_kv_head", i) or h, self.head_dim or self.n_embd // max(h, 1)

    def mlp_width(self, i):
        width = self.per_layer("n_mlp", i)
        full = 4 * self.n_embd if self.mlp != "swiglu" else -(-8 * self.n_embd // 3 // 32) * 32
        return full if width == 0 else max(width, 0)


def parse_layers(layers):
    """A layer string as a tree: characters are blocks, lists are levels. ValueError names the first character that is wrong."""
    open_lists, last = [[]], max(map(layers.rfind, BLOCKS))  # last: where the last block stands
    for i, c in enumerate(layers):
        where = f"layers = {layers[:80]!r}: character {i + 1}, {c!r},"
        if c == "(":
            if len(open_lists) > 8:
                raise ValueError(f"{where} opens more than 8 levels in one another")
            open_lists.append([])
        elif c == ")":
            if len(open_lists) == 1 or not open_lists[-1]:
                raise ValueError(f"{where} ends " + ("no level" if len(open_lists) == 1 else "a level without a block"))
            level = open_lists.pop()
            open_lists[-1].append(level)
        elif c == ".":
            if len(open_lists) > 1:
                raise ValueError(f"{where} is an exit inside a level, which has no tokens to choose; put it outside")
            if not open_lists[0] or open_lists[0][-1] == "." or i > last:
                raise ValueError(f"{where} is an exit, which stands between blocks")
            open_lists[0].append(c)
        elif c in BLOCKS:
            open_lists[-1].append(c)
        else:
            raise ValueError(f"{where} is no block; blocks are {', '.join(BLOCKS)}, ( ) a level, and . an exit")
    if len(open_lists) > 1:
        raise ValueError(f"layers = {layers!r}: a level is not closed; add )")
    return open_lists[0]


# ---------------------------------------------------------------------------------------------------------------------
# primitives


class Linear(nn.Linear):
    """nn.Linear that computes in its input's type. The weights stay fp32 for the optimizer and are cast where they are
    used; compiled, that is one cast a step, which costs less than autocast's bookkeeping."""

    def reset_parameters(self):
        """Nothing: GPT.init_weights gives every parameter its value, and building draws no random number."""

    def rows(self, x, first=0, last=None):
        """The outputs from the first-th on, up to the last."""
        weight, bias = self.weight, self.bias
        if first or last:
            weight, bias = weight[first:last], None if bias is None else bias[first:last]
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if x.numel() == x.size(-1) and torch.compiler.is_compiling() and x.device.type == "cpu":
            # one token: the fused sum reads weights at memory speed, BLAS's matrix-vector product at a third of it
            y = (weight.float() * x.float().view(-1)).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
            return y if bias is None else y + bias
        return F.linear(x, weight, bias)

    def forward(self, x):
        return self.rows(x)


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


def rms_norm(x, eps=1e-6):  # torch's default would depend on the type
    return F.rms_norm(x, (x.size(-1),), eps=eps)


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
    if T == 1 and mask is not None and q.device.type == "cpu" and (q.dtype != torch.float32 or torch.compiler.is_compiling()):
        # one query: sums, which the compiler fuses
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
# retrieval


@torch.library.custom_op("nanoconcept::best", mutates_args=(), device_types="cpu")
def sorted_best(scores: torch.Tensor, k: int, ordered: bool) -> torch.Tensor:
    """`topk_indices` of many short rows in fp32: 64-bit numbers, the score's bits above its place, partitioned and sorted by NumPy, which has
    both vectorised; as many rows at a time as stay in the cache."""
    N, found = scores.size(-1), []
    for part in scores.reshape(-1, N).split(max(1, 2 ** 18 // N)):
        bits = part.contiguous().view(torch.int32)
        both = (bits ^ (bits >> 31 & 0x7FFFFFFF)).long().bitwise_left_shift_(32).bitwise_or_(torch.arange(N)).numpy()
        if 2 * k < N:
            both.partition(N - k, -1)
            both = both[:, N - k:]
        if ordered or both.shape[1] > k:
            both.sort(-1)
        found.append(torch.from_numpy(both[:, -k:]).flip(-1).bitwise_and_(0xFFFFFFFF))
    return torch.cat(found).view(*scores.shape[:-1], k)


@sorted_best.register_fake
def _(scores, k, ordered):
    return scores.new_empty((*scores.shape[:-1], k), dtype=torch.long)


def topk_indices(scores, k, ordered=True):
    """Where the k largest of scores (..., N) stand, largest first if they are to be ordered: (..., k). On a CPU many rows of up to
    1,024 go another way, which takes a fourth to a fifteenth of topk's time."""
    if scores.dtype == torch.float32 and scores.device.type == "cpu" and scores.size(-1) <= 1024 and scores.numel() >= 64 * scores.size(-1):
        return sorted_best(scores.detach(), k, ordered)
    return scores.topk(k, sorted=ordered)[1]


def topk(scores, k, group=8, ordered=True):
    """The k largest of scores (..., N), largest first if they are to be ordered, and where they stand: (..., k) each, exactly. They
    lie in the k groups of 8 with the largest maxima, and those are found in the same way; where values are equal, either may be
    taken. Values have a gradient. On a CPU it takes a fifth to a half of topk's time for many rows and k = 32, a quarter for one of a million."""
    N = scores.size(-1)
    n = N // group
    if N < 16 * k or scores.numel() < 2 ** 17 or scores.device.type != "cpu":
        places = topk_indices(scores, k, ordered)
    else:
        groups = scores.detach()[..., :n * group].unflatten(-1, (group, n))  # j, j + n, j + 2n, ..: so the maxima are of vectors
        found = topk(groups.amax(-2), k, ordered=False)[1]
        rest = torch.arange(n * group, N, device=scores.device).expand(*found.shape[:-1], -1)
        places = torch.cat([found + i * n for i in range(group)] + [rest], dim=-1)
        places = places.gather(-1, topk_indices(scores.detach().gather(-1, places), k, ordered))
    return scores.gather(-1, places), places


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

    def __init__(self, pos, parts, capacity, begun=False, memory=None):
        self.pos, self.parts, self.capacity = pos, parts, capacity
        self.begun = begun  # the slots are in
        self.memory = memory or {}  # {block: Memory} that blocks M read, and never change

    def advance(self, T):
        """Positions (B, T) of the next T inputs, none past the last place (which levels leave for that)."""
        pos = (self.pos[:, None] + torch.arange(T, device=self.pos.device)).clamp(max=self.capacity - 1)
        self.pos, self.begun = self.pos + T, True
        return pos

    def rollback(self, n):
        """Forget the last n positions: a number, or one per row (B,)."""
        self.pos = self.pos - n

    def select(self, rows):
        """The state of these rows (a LongTensor; a row may be taken several times)."""
        return State(self.pos[rows], [p.select(rows) for p in self.parts], self.capacity, self.begun,
                     {i: m.select(rows) for i, m in self.memory.items()})


class Parts(list):
    """Several parts of a State as one."""

    def select(self, rows):
        return Parts(None if p is None else p.select(rows) for p in self)


@dataclass
class Context:
    """What a block or a level may know of its inputs beside x (B, L, C)."""
    mask: torch.Tensor | None  # (B, 1, L, capacity), True where a query may look; None: causal
    rope: tuple | None  # cos and sin, (L, D/2) or (B, 1, L, D/2)
    table: tuple | None  # cos and sin of all positions
    pos: torch.Tensor | None  # (B, L) places in the state; None: there is no state
    begins: bool = True  # nothing stands before these positions
    prefix: int = 0  # how many positions at the front belong to no chunk: slots, a level's own bos
    tokens: torch.Tensor | None = None  # (B, T) ids or (B, T, V) distributions, for value embeddings; a prefix has none
    space: torch.Tensor | None = None  # (B, T) True where a word ends
    fresh: torch.Tensor | None = None  # (B, L) True where a document begins; None: nowhere
    real: torch.Tensor | None = None  # (B, L) False where no chunk closed: places that follow all others; None: real everywhere
    scored: torch.Tensor | None = None  # (B, L) how many scored tokens stand there; None: there is no loss to find
    losses: dict | None = None  # where a level leaves its loss, by depth
    levels: list | None = None  # where a level leaves what GPT.concepts returns
    exits: list | None = None  # where a stack leaves what it has got at each exit, (B, L, C)
    keep: torch.Tensor | None = None  # (n_layer,) 0 where a block is left out of this step; None: nowhere
    leave: "Callable | None" = None  # leave(x (B, L, C)) -> (B, L): which positions leave at the exit that is reached
    source: torch.Tensor | None = None  # (B, L, C) what keys and values are made of; None: of what queries are
    gone: torch.Tensor | None = None  # (B, L) True where a position has left at an exit, and stays as it is; None: nowhere
    told: torch.Tensor | None = None  # (B, M + 1, C) what the last level adds, by the number of chunks closed
    fed: dict | None = None  # where blocks leave what their feed-forward layer gave, (B, L, C), by block
    memory: dict | None = None  # {block: Memory} that blocks M read
    memory_writes: dict | None = None  # {block: MemoryWrites}: where blocks M leave what they would write
    plan: "Plan | None" = None  # what the last level has predicted, for blocks that read it

    @classmethod
    def make(cls, x, table, state, **more):
        """For inputs x: the causal mask and rotary angles, and where the state stands."""
        T, begins = x.size(1), state is None or not state.begun
        if state is None:
            rope = None if table is None else tuple(t[:T].to(x.dtype) for t in table)
            return cls(None, rope, table, None, begins, **more)
        pos = state.advance(T)  # (B, T)
        mask = (torch.arange(state.capacity, device=x.device) <= pos[..., None])[:, None]
        rope = None if table is None else tuple(t[pos[:, None]].to(x.dtype) for t in table)
        return cls(mask, rope, table, pos, begins, **more)


class Attention(nn.Module):
    """Causal self-attention with grouped key heads (Ainslie et al. 2023, arXiv:2305.13245), rotary positions
    (Su et al. 2021, arXiv:2104.09864) and QK-norm (Henry et al. 2020, arXiv:2010.04245). (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg, i, table=False):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = cfg.heads(i)
        self.qk_norm, self.dropout = cfg.qk_norm, cfg.dropout
        kv_dim = self.n_kv_head * self.head_dim
        self.sizes = (self.n_head * self.head_dim, kv_dim, kv_dim)
        self.c_attn = Linear(cfg.n_embd, sum(self.sizes), bias=cfg.bias)
        self.c_attn.weight.parts = self.sizes  # three matrices in one: an optimizer of matrices takes them apart
        self.c_proj = Linear(self.sizes[0], cfg.n_embd, bias=cfg.bias)
        self.value_embed = Embedding(cfg.vocab_size, kv_dim) if table else None

    def init_state(self, B, L, device, dtype):
        shape = (B, L, self.n_kv_head, self.head_dim)
        return KVCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    def heads(self, qk, v, ctx):
        """Queries and keys, or keys alone, (B, T, heads * D), and values -> (B, heads, T, D) each, ready to attend."""
        B, T, _ = v.shape
        if self.value_embed is not None and ctx.tokens is not None:
            ve = self.value_embed(ctx.tokens).to(v.dtype)
            v = v + F.pad(ve, (0, 0, T - ve.size(1), 0))  # slots have no token
        qk, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in (qk, v))
        if self.qk_norm:
            qk = rms_norm(qk)
        return (qk if ctx.rope is None else rotate(qk, *ctx.rope)), v

    def remember(self, x, ctx, cache):
        """Put x (B, T, C) into the cache, as forward does, for others to attend to; nothing else."""
        cache.append(*self.heads(*self.c_attn.rows(x, self.sizes[0]).chunk(2, dim=-1), ctx), ctx.pos)

    def forward(self, x, ctx, cache=None, source=None):
        """source (B, T, C): what keys and values are made of, where that is not x."""
        B, T, C = x.shape
        n = self.sizes[0]
        qkv = self.c_attn(x) if source is None else torch.cat((self.c_attn.rows(x, 0, n), self.c_attn.rows(source, n)), dim=-1)
        qk, v = self.heads(*qkv.split((self.sizes[0] + self.sizes[1], self.sizes[2]), dim=-1), ctx)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=1)
        if cache is not None:
            k, v = cache.append(k, v, ctx.pos)
        y = attend(q, k, v, ctx.mask, self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


@dataclass
class Plan:
    """What a level hands to the blocks behind it with plan = cross."""
    concepts: torch.Tensor | None  # (B, M, horizon, C) predicted from M states; None: no new ones since the last step
    first: torch.Tensor  # (B,) which states they are: first, first + 1, ...
    count: torch.Tensor  # (B, L) a position may read the states 0..count
    capacity: int  # states that there is room for


class Cross(nn.Module):
    """Attention to the concepts that a level has predicted. A query turns by the number of the chunk it stands in, a key by
    that of the chunk it speaks of, so what counts is how far ahead a concept lies. (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg, i):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = cfg.heads(i)
        self.horizon, self.qk_norm = cfg.horizon, cfg.qk_norm
        self.c_q = Linear(cfg.n_embd, self.n_head * self.head_dim, bias=cfg.bias)
        self.c_kv = Linear(cfg.n_embd, 2 * self.n_kv_head * self.head_dim, bias=cfg.bias)
        self.c_kv.weight.parts = (self.n_kv_head * self.head_dim,) * 2
        self.c_proj = Linear(self.n_head * self.head_dim, cfg.n_embd, bias=cfg.bias)

    def heads(self, x, at, table):
        """(B, L, heads * D), the chunk of each place (B, L) -> (B, heads, L, D), turned."""
        x = x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        x = rms_norm(x) if self.qk_norm else x
        if table is None:
            return x
        at = at.clamp(max=table[0].size(0) - 1)[:, None]
        return rotate(x, *(t[at].to(x.dtype) for t in table))

    def forward(self, x, ctx, cache=None):
        plan, ahead = ctx.plan, torch.arange(self.horizon, device=x.device)
        q = self.heads(self.c_q(x), plan.count, ctx.table)
        kv = None
        if plan.concepts is not None:
            M = plan.concepts.size(1)
            state = plan.first[:, None] + torch.arange(M, device=x.device)  # (B, M)
            k, v = self.c_kv(plan.concepts.flatten(1, 2).to(x.dtype)).chunk(2, dim=-1)
            k = self.heads(k, (state[..., None] + ahead).flatten(1), ctx.table)
            kv = k, v.view(*v.shape[:2], -1, self.head_dim).transpose(1, 2)
        of = torch.arange(plan.capacity if cache is not None else M, device=x.device).repeat_interleave(self.horizon)
        if cache is not None:
            if kv is not None:
                place = state.clamp(max=plan.capacity - 1)[..., None] * self.horizon + ahead
                cache.append(*kv, place.flatten(1))
            kv = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
        y = attend(q, *kv, (of <= plan.count[..., None])[:, None], 0.0)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def init_state(self, B, L, device, dtype):
        shape = (B, L * self.horizon, self.n_kv_head, self.head_dim)
        return KVCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))


def scan(a, b, size=16):
    """h_t = a_t h_{t-1} + b_t over dim 1, with h_{-1} = 0. a, b (B, T, D) -> h. Pieces of `size` steps run side by side, each
    in one loop that the compiler fuses; then the ends of the pieces, in the same way; then what each end carries on (Blelloch
    1990). The work is linear in T."""
    B, T, D = b.shape
    n = -(-T // size)
    a, b = (F.pad(t, (0, 0, 0, n * size - T)).view(B, n, size, D).unbind(2) if n > 1 else t.unbind(1) for t in (a, b))
    h, reach = [b[0]], [a[0]]  # reach: how much of what came before the piece is left
    for t in range(1, len(a)):
        h.append(a[t] * h[-1] + b[t])
        reach.append(a[t] * reach[-1])
    if n == 1:
        return torch.stack(h, 1)
    ends = scan(reach[-1], h[-1], size)
    before = F.pad(ends[:, :-1], (0, 0, 1, 0))[:, :, None]
    return (torch.stack(h, 2) + torch.stack(reach, 2) * before).view(B, -1, D)[:, :T]


class Trail:
    """What a recurrence held after each position, (B, L, D). A step starts from the place before it, so rollback has
    nothing to do here."""

    def __init__(self, h):
        self.h = h

    def before(self, pos):
        """What was held before positions pos (B, T): (B, D), 0 at the start."""
        rows, at = torch.arange(len(pos), device=pos.device), pos[:, 0]
        return torch.where((at > 0)[:, None], self.h[rows, (at - 1).clamp(min=0)], 0)

    def write(self, h, pos):
        self.h[torch.arange(len(pos), device=pos.device)[:, None], pos] = h.to(self.h.dtype)

    def select(self, rows):
        return Trail(self.h[rows])


class Recurrence(nn.Module):
    """Gated linear recurrence h_t = a_t h_{t-1} + (1 - |a_t|) v_t (after Martin and Cundy 2018, arXiv:1709.04057, and De et
    al. 2024, arXiv:2402.19427), a_t and v_t linear in x_t, read through a SiLU gate. A gate in (0, 1) cannot count; one that
    can be negative solves parity, one that turns solves cycles (Grazzi et al. 2024, arXiv:2411.12537). A turning gate is a
    positive one in a frame that turns along; channel pair i settles near n-ths of a full turn, n = 2 + i mod 8, so that it counts
    modulo n and hardly drifts. Documents begin with h = 0. (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg, i, table=False):
        super().__init__()
        C = cfg.n_embd
        self.gate = cfg.gate
        self.c_in = Linear(C, 3 * C, bias=cfg.bias)  # values, gates, what is read
        self.c_in.weight.parts = (C, C, C)
        self.rate = nn.Parameter(torch.empty(C // 2 if cfg.gate == "complex" else C))  # of keeping, when x says nothing
        self.c_proj = Linear(C, C, bias=cfg.bias)
        self.register_buffer("stops", 2.0 + torch.arange(C // 2) % 8 if cfg.gate == "complex" else None, persistent=False)

    def settle(self, turn):
        """Half turns (.., C/2) -> near the closest n-th of a full turn: a smooth staircase, level on its stairs. A free angle
        drifts, and need not wrap at all within the lengths that training sees."""
        n = math.pi * self.stops.float()
        return turn - torch.sin(n * turn) / n

    def full(self, a):
        """A gate reaches 1 itself, not only in the limit: then it keeps for ever, and takes in nothing."""
        return (1.05 * a).clamp(-1, 1)

    def init_state(self, B, L, device, dtype):
        return Trail(torch.zeros(B, L, self.c_proj.in_features, device=device))

    def forward(self, x, ctx, trail=None):
        v, g, o = self.c_in(x).chunk(3, dim=-1)
        v, g = v.float(), g.float()
        if self.gate == "complex":
            g, turn = g.chunk(2, dim=-1)
            frame = (math.pi * self.settle(turn)).cumsum(1)  # (B, T, C/2) radians since the first of these positions
            cos, sin = frame.cos(), frame.sin()
            a = self.full(torch.sigmoid(g + self.rate)).repeat(1, 1, 2)
            v = rotate(v, cos, -sin)
        else:
            a = self.full(torch.sigmoid(g + self.rate) if self.gate == "positive" else torch.tanh(g + self.rate))
        b = (1 - a.abs()) * v
        if ctx.fresh is not None:
            a = a.masked_fill(ctx.fresh[..., None], 0.0)
        if trail is not None:
            b = torch.cat((b[:, :1] + a[:, :1] * trail.before(ctx.pos)[:, None], b[:, 1:]), dim=1)
        h = scan(a, b)
        if self.gate == "complex":
            h = rotate(h, cos, sin)
        if trail is not None:
            trail.write(h, ctx.pos)
        h = rms_norm(h, eps=1e-16)  # what has faded evenly still says what it said
        return self.c_proj(h.to(x.dtype) * F.silu(o))


class GRU(nn.Module):
    """A GRU (Cho et al. 2014, arXiv:1406.1078), torch's own: not linear, so a step after another. Documents begin with
    h = 0. (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg, i, table=False):
        super().__init__()
        C = cfg.n_embd
        with torch.random.fork_rng(devices=[]):  # its own initial values are not used, and nothing is step_draw
            self.rnn = nn.GRU(C, C, batch_first=True)
        self.rnn.weight_ih_l0.parts = self.rnn.weight_hh_l0.parts = (C, C, C)
        self.c_proj = Linear(C, C, bias=cfg.bias)

    def init_state(self, B, L, device, dtype):
        return Trail(torch.zeros(B, L, self.c_proj.in_features, device=device))

    def forward(self, x, ctx, trail=None):
        B, T, C = x.shape
        v = x.to(self.rnn.weight_ih_l0.dtype)  # torch's own takes no other
        before = None if trail is None else trail.before(ctx.pos).to(v.dtype)
        starts = torch.zeros(B, T, dtype=torch.bool, device=x.device) if ctx.fresh is None else ctx.fresh
        h = self.pieces(v, starts, before)
        if trail is not None:
            trail.write(h, ctx.pos)
        return self.c_proj(h.to(x.dtype))

    @torch.compiler.disable  # torch's own GRU breaks the graph, and so do documents of any length
    def pieces(self, v, starts, before):
        """Run each document of each row as a sequence of its own: v (B, T, C), starts (B, T), before (B, C) or None."""
        B, T, C = v.shape
        begins = starts.clone()
        begins[:, 0] = True
        row, at = begins.nonzero(as_tuple=True)
        if len(row) == B:  # one each
            h0 = None if before is None else torch.where(starts[:, :1], 0.0, before)[None]
            return self.rnn(v, h0)[0]
        end = torch.cat((torch.where(row[1:] == row[:-1], at[1:], T), at.new_tensor([T])))
        length = end - at
        place = torch.arange(int(length.max()), device=v.device)
        inside = place < length[:, None]
        source = (row[:, None] * T + (at[:, None] + place).clamp(max=T - 1)).masked_fill(~inside, B * T)
        parts = F.pad(v.reshape(B * T, C), (0, 0, 0, 1))[source]
        h0 = None if before is None else torch.where(starts[row, at][:, None] | (at > 0)[:, None], 0.0, before[row])[None]
        out, _ = self.rnn(parts, h0)
        return torch.zeros_like(v).reshape(B * T, C).index_put((source[inside],), out[inside]).view(B, T, C)


class MLP(nn.Module):
    """Feed-forward layer: relu2 (So et al. 2021, arXiv:2109.08668), gelu, or swiglu (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, cfg, width):
        super().__init__()
        self.kind = cfg.mlp
        self.c_fc = Linear(cfg.n_embd, width * (2 if cfg.mlp == "swiglu" else 1), bias=cfg.bias)
        self.c_proj = Linear(width, cfg.n_embd, bias=cfg.bias)

    def forward(self, x, ctx=None):
        x = self.c_fc(x)
        if self.kind == "relu2":
            x = F.relu(x).square()
        elif self.kind == "gelu":
            x = F.gelu(x)
        else:
            x, gate = x.chunk(2, dim=-1)
            x = x * F.silu(gate)
        return self.c_proj(x)


class FeaturalMemory(nn.Module):
    """In place of an MLP: each of mem_head queries finds the mem_top nearest of n_mem learned keys, and takes the sum of their
    values, weighted by neg_distance. Keys are pairs of half keys, sqrt(n_mem) of each, so that all of them are searched by two short
    lists, exactly (product keys, Lample et al. 2019, arXiv:1907.05242). Queries and half keys have one length, so their product is
    their distance. What is found is chosen without a gradient, and weighted with one. (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg, i):
        super().__init__()
        self.n_head, self.top, self.side = cfg.mem_head, cfg.mem_top, math.isqrt(cfg.n_mem)
        self.c_q = Linear(cfg.n_embd, cfg.mem_head * cfg.mem_dim, bias=cfg.bias)
        self.keys = nn.Parameter(torch.empty(cfg.mem_head, 2, self.side, cfg.mem_dim // 2))
        self.values = Embedding(cfg.n_mem, cfg.n_embd)
        self.c_proj = Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)
        # the i-th best half with the j-th best is behind all i * j pairs of such as are no worse
        ranks = range(1, min(self.top, self.side) + 1)
        pairs = [(i - 1, j - 1) for i in ranks for j in ranks if i * j <= self.top]
        self.register_buffer("pairs", torch.tensor(pairs).t().contiguous(), persistent=False)

    def find(self, x):
        """x (B, T, C) -> slots (B, T, H, top) and how near they are."""
        B, T, _ = x.shape
        q = rms_norm(self.c_q(x).view(B, T, self.n_head, 2, -1))
        near = torch.einsum("bthpd,hpnd->bthpn", q, rms_norm(self.keys.to(x.dtype))).float()
        half = topk_indices(near, min(self.top, self.side))  # the best pairs are among the best halves
        score, (a, b) = near.detach().gather(-1, half), self.pairs
        pair = topk_indices(score[..., 0, a] + score[..., 1, b], self.top)
        a, b = half[..., 0, :].gather(-1, a[pair]), half[..., 1, :].gather(-1, b[pair])
        return a * self.side + b, (near[..., 0, :].gather(-1, a) + near[..., 1, :].gather(-1, b)) * q.size(-1) ** -0.5

    def forward(self, x, ctx):
        B, T, C = x.shape
        slots, score = self.find(x)
        table = self.values.weight
        y = F.embedding_bag(slots.view(B * T, -1), table, per_sample_weights=score.softmax(-1).view(B * T, -1).to(table.dtype), mode="sum")
        return self.c_proj(y.view(B, T, C).to(x.dtype))


@dataclass
class Memory:
    """The entries of one block M: keys and values (B, H, N, D), and how often and how lately each was used, usage (B, H, N), 0
    where there is none (LRFU, Lee et al. 2001). Arrays that blocks read and nothing but `write` changes. One row may stand
    for all (B = 1)."""
    keys: torch.Tensor
    values: torch.Tensor
    usage: torch.Tensor
    store: "Memory | None" = None  # entries besides, that every document finds and that nothing changes: those of a store
    index: list | None = None  # Clusters of the keys of each head, for very many that nothing changes; None: search is exact

    @classmethod
    def empty(cls, B, cfg, size=None, device=None, dtype=torch.float32):
        shape = (B, cfg.mem_head, cfg.mem_size if size is None else size, cfg.mem_dim)
        return cls(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype),
                   torch.zeros(shape[:-1], device=device))

    def select(self, rows):
        """Those rows (a slice or a LongTensor); what stands for all still does."""
        return self if len(self.usage) == 1 else Memory(self.keys[rows], self.values[rows], self.usage[rows], self.store)

    def copy(self, B):
        """A memory of B rows that may be written to, each as the one row of this."""
        return Memory(*(t.expand(B, *t.shape[1:]).clone() for t in (self.keys, self.values, self.usage)), self.store)

    @torch.no_grad()
    def write(self, wrote):
        """Take over what a window left, a MemoryWrites; the best of old and new stay. -> (slots (B, H, n), places in the window (B, H, n), which of
        those were written (B, H, n))."""
        usage, N = wrote.usage[:, -1], self.usage.size(-1)
        self.usage.copy_(usage[..., :N])
        n = min(N, usage.size(-1) - N)
        low, slot = self.usage.topk(n, largest=False)
        high, at = usage[..., N:].topk(n)
        better = high > low
        for mine, new in ((self.keys, wrote.keys), (self.values, wrote.values)):
            i, j = (t[..., None].expand(*t.shape, mine.size(-1)) for t in (slot, at))
            mine.scatter_(2, i, torch.where(better[..., None], new.gather(2, j).to(mine.dtype), mine.gather(2, i)))
        self.usage.scatter_(2, slot, torch.where(better, high, low))
        return slot, at, better


@dataclass
class MemoryWrites:
    """What a block M would write of a window: entries (B, H, L, D), and usage (B, .., H, N + L) of old ones and these, the last of which
    counts (a whole window has one before each memory chunk and one after the last)."""
    keys: torch.Tensor
    values: torch.Tensor
    usage: torch.Tensor


@dataclass
class MemoryCache:
    """What a block M knows of the positions of its window: entries keys, values (B, H, L, D), where there is one ok (B, L), which
    positions count real (B, L), documents begun docs (B, L), what each found and its weight (B, H, L, k), and usage before each memory
    chunk (B, K + 1, H, N + L). In all but usage there is one place more, which is nobody's. All by place, and a chunk's end is computed
    from its places, so rollback has nothing to do here."""

    keys: torch.Tensor
    values: torch.Tensor
    ok: torch.Tensor
    real: torch.Tensor
    docs: torch.Tensor
    found: torch.Tensor
    weight: torch.Tensor
    usage: torch.Tensor
    given: torch.Tensor  # (B,) the first entries behind `front` are what they are, and not made anew of what stands there
    front: int = 0  # positions that come first and count nothing: slots, a level's bos

    def select(self, rows):
        parts = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return MemoryCache(*(t[rows] for t in parts[:-1]), parts[-1])

    def note(self, ctx, pos, shift):
        """Note of positions pos (B, T) which count, their documents, and which make an entry: those with a key `shift` places before."""
        rows, before = torch.arange(len(pos), device=pos.device)[:, None], pos[:, :1] - 1
        if ctx.begins:
            self.front = ctx.prefix
        docs = torch.zeros_like(pos) if ctx.fresh is None else ctx.fresh.cumsum(1)
        self.docs[rows, pos] = docs = docs + self.docs.gather(1, before.clamp(min=0)) * (before >= 0)
        self.real[rows, pos] = real = (pos >= self.front) if ctx.real is None else (pos >= self.front) & ctx.real
        key = (pos - shift).clamp(min=0)
        ok = real & (pos >= shift) & self.real.gather(1, key) & (self.docs.gather(1, key) == docs)
        self.ok[rows, self.new(pos)] = ok

    def new(self, at):
        """Places at (B, T), where what is there is to be made anew; nobody's elsewhere."""
        L = self.real.size(1) - 1
        return torch.where(at < self.front + self.given[:, None], L, at.clamp(max=L))

    def put(self, k, v, pos, shift):
        """Put what positions pos (B, T) make of entries: values v (B, H, T, D), and keys k (B, H, T, D) of those `shift` places later."""
        rows = torch.arange(len(pos), device=pos.device)[:, None]
        self.keys[rows, :, self.new(pos + shift)], self.values[rows, :, self.new(pos)] = k.transpose(1, 2), v.transpose(1, 2)


class AssociativeMemory(nn.Module):
    """In place of an MLP: each position searches what was written before, and attends to the mem_top nearest entries, or to
    nothing. Positions go in memory chunks of mem_chunk, counted from the window's start: all of a chunk search, then all of it is
    written (Memorizing Transformers, Wu et al. 2022, arXiv:2203.08913), so nothing sees its future, and gradients reach
    what the window wrote earlier. Entries pair a key with what came next (mem_shift). One as near as mem_novelty to a
    stored one takes its place and its count. A document sees its own entries only. (B, T, C) -> (B, T, C)."""
    DECAY = 0.999  # of usage, a memory chunk

    def __init__(self, cfg, i):
        super().__init__()
        H, D, C = cfg.mem_head, cfg.mem_dim, cfg.n_embd
        self.cfg, self.shape, self.i = cfg, (H, D), i
        self.c_q, self.c_k, self.c_v = (Linear(C, H * D, bias=cfg.bias) for _ in range(3))
        self.scale = nn.Parameter(torch.empty(H))  # of cosines, in tens, and by the logarithm of how many entries there are
        self.none = nn.Parameter(torch.empty(H))  # the cosine of "nothing", in halves
        self.c_proj = Linear(H * D * (1 + cfg.mem_straight), C, bias=cfg.bias)

    def window(self, B, L, base, dtype, device):
        """An empty MemoryCache of L places over the entries of a Memory, or of None."""
        (H, D), N, store = self.shape, *(0 if m is None else m.usage.size(-1) for m in (base, base and base.store))
        k, K = min(self.cfg.mem_top, N + store + L), -(-L // self.cfg.mem_chunk)
        new = lambda *shape, dtype=torch.float32: torch.zeros(B, *shape, device=device, dtype=dtype)
        usage = new(K + 1, H, N + L)
        if N:
            usage[:, 0, :, :N] = base.usage
        return MemoryCache(new(H, L + 1, D, dtype=dtype), new(H, L + 1, D, dtype=dtype), new(L + 1, dtype=torch.bool),
                      new(L + 1, dtype=torch.bool), new(L + 1, dtype=torch.long), new(H, L + 1, k, dtype=torch.long), new(H, L + 1, k),
                      usage, new(dtype=torch.long))

    def init_state(self, B, L, memory, device, dtype):
        return self.window(B, L, memory.get(self.i), dtype, device)

    @torch.no_grad()
    def left(self, w, base, n):
        """What a MemoryCache w over the entries of a Memory would write of its first n (B,) positions, a MemoryWrites; w is of no use then."""
        near, c, rows = Near(self, w, base), n // self.cfg.mem_chunk, torch.arange(len(n), device=n.device)
        near.close(c.clamp(max=w.usage.size(1) - 2), w.front + n - 1)  # the chunk that is left in part
        usage = w.usage[rows, (n + self.cfg.mem_chunk - 1) // self.cfg.mem_chunk]
        return MemoryWrites(near.keys, near.values, usage[:, None])

    def forward(self, x, ctx, part=None):
        (B, T, _), (H, D), m = x.shape, self.shape, self.cfg.mem_chunk
        q, k, v = (f(x).view(B, T, H, D).transpose(1, 2) for f in (self.c_q, self.c_k, self.c_v))
        if self.training and self.cfg.mem_noise:
            q = F.normalize(q.float(), dim=-1) + self.cfg.mem_noise * torch.randn(q.shape, device=q.device)
        q, k = (F.normalize(t.float(), dim=-1).to(x.dtype) for t in (q, k))
        base = None if ctx.memory is None else ctx.memory.get(self.i)
        rows, at = torch.arange(B, device=x.device)[:, None], torch.arange(T, device=x.device)
        if part is None:
            w, pos, chunks = self.window(B, T, base, x.dtype, x.device), at.expand(B, T), -(-(T - ctx.prefix) // m)
        else:
            w, pos, chunks = part, ctx.pos, -(-T // m) + (T > 1)  # rows may begin anywhere in a chunk
        w.note(ctx, pos, self.cfg.mem_shift)
        if part is None:
            w.keys, w.values = F.pad(k, (0, 0, self.cfg.mem_shift, 0))[:, :, :T], v
        else:
            w.put(k, v, pos, self.cfg.mem_shift)
        near, y = Near(self, w, base), x.new_zeros(B, T + 1, self.c_proj.in_features)
        chunk = (pos - w.front).div(m, rounding_mode="floor")  # (B, T)
        for j in range(chunks):
            c = (chunk[:, 0].clamp(min=0) + j).clamp(max=w.usage.size(1) - 2)  # (B,)
            of = (w.front + c * m - pos[:, 0]).clamp(min=0)[:, None] + at[:m]  # (B, m or T) where the chunk stands in x
            mine = (of < T) & (chunk.gather(1, of.clamp(max=T - 1)) == c[:, None])
            of = of.clamp(max=T - 1)
            place = pos.gather(1, of)
            got, found, weight = near.search(q.gather(2, of[:, None, :, None].expand(-1, H, -1, D)), c, place, self.training)
            y[rows, torch.where(mine, of, T)] = got.transpose(1, 2).flatten(2)
            with torch.no_grad():
                place = torch.where(mine, place, near.L)
                w.found.transpose(1, 2)[rows, place], w.weight.transpose(1, 2)[rows, place] = found.transpose(1, 2), weight.transpose(1, 2)
                if part is None or torch.compiler.is_compiling() or bool((pos[:, -1] >= w.front + (c + 1) * m - 1).any()):
                    near.close(c, pos[:, -1])
        if part is None and ctx.memory_writes is not None:
            ctx.memory_writes[self.i] = MemoryWrites(near.keys.detach(), near.values.detach(), w.usage[:, :chunks + 1])
        return self.c_proj(y[:, :T])


PROBES = 64  # pages of an index that a query reads


class Near:
    """One forward's view of what an associative memory can find: old entries and those of the window, in one row of numbers, and
    behind those what was store."""
    ROOM = 2 ** 26  # scores at once

    def __init__(self, of, w, base):
        self.of, self.w, self.base, self.store = of, w, base, None if base is None else base.store
        self.N, self.L = 0 if base is None else base.usage.size(-1), w.real.size(1) - 1
        self.keys, self.values, self.ok = w.keys[:, :, :self.L], w.values[:, :, :self.L], w.ok[:, :self.L]

    def old(self, memory, q, there, n):
        """The n nearest to q (B, H, T, D) of the entries of a Memory that are there (B or 1, H, N): cosines, -inf where there are no more,
        and places, (B, H, T, n) each. A large one may have an index, which finds almost all of them."""
        B, H, T, D = q.shape
        if memory.index is not None:
            found = [i.search(x.reshape(-1, D), n, PROBES) for i, x in zip(memory.index, q.unbind(1))]
            return tuple(torch.stack(t, 1).view(B, T, H, n).transpose(1, 2) for t in zip(*found))
        keys, room = memory.keys.to(q.dtype), max(1, self.ROOM // (B * H * memory.keys.size(2)))
        if T > room:  # as many queries at a time as have room for their scores
            return tuple(torch.cat(t, 2) for t in zip(*(self.old(memory, x, there, n) for x in q.split(room, 2))))
        if len(keys) == 1:  # one row stands for all: one product, and no copies of it
            score = (q.transpose(0, 1).reshape(1, H, B * T, D) @ keys.mT).view(H, B, T, -1).transpose(0, 1)
        else:
            score = q @ keys.mT
        return topk(score.float().masked_fill(~there[:, :, None], float("-inf")), n)

    def doc(self, c):
        """Documents begun before chunk c (B,)."""
        place = self.w.front + c[:, None] * self.of.cfg.mem_chunk - 1
        return self.w.docs.gather(1, place.clamp(0, self.L - 1))[:, 0] * (c > 0)

    def search(self, q, c, pos, training):
        """What queries q (B, H, T, D) at places pos (B, T) read in chunk c (B,): (B, H, T, D), and the entries (B, H, T, k) they found
        with their weights."""
        cfg, w, N = self.of.cfg, self.w, self.N
        rows = torch.arange(len(c), device=c.device)
        there, mine = w.usage[rows, c] > 0, (w.docs.gather(1, pos) == self.doc(c)[:, None])[:, None, :, None]
        cosine, scores, old, count = (q @ self.keys.mT).float(), [], [], there.sum(-1)
        with torch.no_grad():
            if self.store is not None:
                store = self.store.usage > 0
                score, at = self.old(self.store, q, store, min(cfg.mem_top, store.size(-1)))
                scores, old, count = [score], [(self.store, at, N + self.L)], count + store.sum(-1)
            if N:
                score, at = self.old(self.base, q, there[..., :N], min(cfg.mem_top, N))
                scores, old = [*scores, score.masked_fill(~mine, float("-inf"))], [*old, (self.base, at, 0)]
            score = torch.cat((*scores, cosine.masked_fill(~(there[:, :, None, N:] & mine), float("-inf"))), -1)
            low, found = topk(score, w.found.size(-1))
            chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, found, low > float("-inf"))  # no gradient flows into the choice
        n, old_k, old_v = score.size(-1) - self.L, None, None
        if n:
            old_k, old_v = (torch.cat([t.to(q.dtype).expand(len(c), -1, -1, -1).gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, t.size(-1)))
                                       .view(*at.shape, -1) for t, at in each], 3)
                            for each in ([(m.keys, at) for m, at, _ in old], [(m.values, at) for m, at, _ in old]))
            cosine = torch.cat(((q[..., None, :] * old_k).sum(-1).float(), cosine), -1)
        if training and cfg.mem_drop:
            chosen = chosen & (torch.rand_like(cosine) >= cfg.mem_drop)
        sharp = 10 * self.of.scale * (count + 2).log()  # (B, H): the more there are, the nearer the best false one (arXiv:2501.19399)
        logits = (sharp[..., None, None] * cosine).masked_fill(~chosen, float("-inf"))
        none = (sharp * self.of.none / 2)[..., None, None].expand(*logits.shape[:3], 1)
        p = torch.cat((logits, none), -1).softmax(-1)[..., :-1]

        def read(new, old):
            y = p[..., n:].to(new.dtype) @ new
            return y + (p[..., :n, None].to(new.dtype) * old).sum(-2) if n else y

        y = read(self.values, old_v)
        if cfg.mem_straight:
            y = torch.cat((y, read(self.keys, old_k) + q - q.detach()), -1)
        places = N + found - n
        if n:
            at = torch.cat([at + first for _, at, first in old], -1)
            places = torch.where(found < n, at.gather(-1, found.clamp(max=n - 1)), places)
        return y, places, p.detach().gather(-1, found)

    def close(self, c, last):
        """Write what chunk c (B,) has at places up to `last` (B,): the usage before the next chunk."""
        cfg, w, N, m = self.of.cfg, self.w, self.N, self.of.cfg.mem_chunk
        rows = torch.arange(len(c), device=c.device)
        place = w.front + c[:, None] * m + torch.arange(m, device=c.device)  # (B, m)
        there, place = place <= last[:, None], place.clamp(max=self.L - 1)
        docs, doc = w.docs.gather(1, place), self.doc(c)
        decay = self.of.DECAY ** there.float().mean(1)
        there = there & w.real.gather(1, place)
        now = torch.where(there, docs, 0).amax(1).maximum(doc)
        same = (now == doc)[:, None, None]
        usage = w.usage[rows, c] * same  # a new document begins with none
        stored = usage > 0
        pick = lambda t: t.gather(2, place[:, None, :, None].expand(-1, t.size(1), -1, t.size(-1)))
        found = pick(w.found)
        used = pick(w.weight) * there[:, None, :, None] * same[..., None] * (found < N + self.L)
        usage = (usage * decay[:, None, None]).scatter_add(2, found.flatten(2).clamp(max=N + self.L - 1), used.flatten(2))
        new = (self.ok.gather(1, place) & there & (docs == now[:, None]))[:, None].expand(-1, usage.size(1), -1)  # (B, H, m)
        gain = torch.ones_like(new, dtype=usage.dtype)
        if cfg.mem_novelty <= 1:
            keys = pick(self.keys)
            best, at = (keys @ self.keys.mT).float().masked_fill(~stored[:, :, None, N:], -1.0).max(-1)
            at = at + N
            if N:
                old, where = (t[..., 0] for t in self.old(self.base, keys, stored[..., :N], 1))
                best, at = torch.maximum(best, old), torch.where(old > best, where, at)
            near = (best >= cfg.mem_novelty) & new
            gain = gain + near * usage.gather(2, at)
            usage = usage * (1 - torch.zeros_like(usage).scatter_add(2, at, near.float()).clamp(max=1))  # the newer one takes its place
            later = torch.ones(m, m, device=c.device, dtype=torch.bool).triu(1)
            new = new & ~((keys @ keys.mT >= cfg.mem_novelty) & new[:, :, None] & later).any(-1)
        gain = gain * new
        w.usage[rows, c + 1] = usage.scatter_add(2, (N + place)[:, None].expand_as(gain), gain)


def mlp_of(cfg, i):
    """The MLP of block i, None where its width is 0."""
    width = cfg.mlp_width(i)
    return MLP(cfg, width) if width else None


BLOCKS = {"A": (Attention, mlp_of), "R": (Recurrence, mlp_of), "G": (GRU, mlp_of),
          "F": (Attention, FeaturalMemory), "M": (Attention, AssociativeMemory)}  # character: (mixer over positions, feed-forward)


class Block(nn.Module):
    """Pre-norm residual block: a mixer over positions, with plan = cross attention to the plan of the level before it, then a
    feed-forward layer (none where its width is 0)."""

    def __init__(self, cfg, char, i, table, reads_plan):
        super().__init__()
        mixer, feed_forward = BLOCKS[char]
        self.ln_1 = NORMS[cfg.norm](cfg)
        self.attn = mixer(cfg, i, table)
        self.ln_x = NORMS[cfg.norm](cfg) if reads_plan else None
        self.cross = Cross(cfg, i) if reads_plan else None
        self.mlp = feed_forward(cfg, i)
        self.ln_2 = NORMS[cfg.norm](cfg) if self.mlp is not None else None
        self.drop, self.i = Drop(cfg), i

    def init_state(self, B, L, states, memory, device, dtype):
        """Of a stack of L positions; states: how many of them the level before this block has."""
        return Parts([self.attn.init_state(B, L, device, dtype),
                      None if self.cross is None else self.cross.init_state(B, states, device, dtype),
                      self.mlp.init_state(B, L, memory, device, dtype) if isinstance(self.mlp, AssociativeMemory) else None])

    def remember(self, x, ctx, part):
        """Update the state by x (B, T, C), as forward does, without computing what comes out."""
        own, seen, wrote = part
        if wrote is not None:  # what it writes hangs on what it attends to
            self(x, ctx, part)
            return
        if isinstance(self.attn, Attention):
            self.attn.remember(self.ln_1(x if ctx.source is None else ctx.source), ctx, own)
        else:
            self.attn(self.ln_1(x), ctx, own)
        if self.cross is not None and ctx.plan is not None and ctx.plan.concepts is not None:
            self.cross(self.ln_x(x), ctx, seen)

    def forward(self, x, ctx, part=None):
        own, seen, wrote = part or (None, None, None)
        before, more = x, ()
        if ctx.source is not None and isinstance(self.attn, Attention):
            more = (self.ln_1(ctx.source),)
        x = x + self.drop(self.attn(self.ln_1(x), ctx, own, *more))
        if self.cross is not None and ctx.plan is not None:
            x = x + self.drop(self.cross(self.ln_x(x), ctx, seen))
        if self.mlp is not None:
            y = self.mlp(self.ln_2(x), ctx, *(() if wrote is None else (wrote,)))
            if ctx.fed is not None:
                ctx.fed[self.i] = y
            x = x + self.drop(y)
        return x if ctx.keep is None else before + ctx.keep[self.i].to(x.dtype) * (x - before)


# ---------------------------------------------------------------------------------------------------------------------
# levels


def binding(places, C):
    """cos and sin (places, C/2) of a rotary binding: a vector is turned by its place, so that order survives a sum (in the
    manner of Plate 1995). Angles spread evenly over (0, pi): sums of vectors at different places are orthogonal on average."""
    turn = math.pi * (torch.arange(C // 2) + 0.5) / (C // 2)
    turn = torch.outer(torch.arange(places, dtype=torch.float32), turn)
    return turn.cos(), turn.sin()


class Stack(nn.Module):
    """Blocks and levels that run at one pace, in the order of the layer string. GPT is one, and so is every level. Neither
    counts in the other's names, so that parameters keep theirs when a model grows a level."""

    def add_layers(self, cfg, tree, number, depth=0, shared=None):
        """Make the layers of a tree. number: an iterator that counts the blocks of the whole string; shared: the token-level
        blocks, for levels that run those."""
        plain = tree.count("A") - (cfg.n_value_embed if depth == 0 else 0)  # blocks A without a table of values
        self.blocks, self.levels, inside = nn.ModuleList(), nn.ModuleList(), []
        self.exits = {}  # place in the order: number of blocks before it, those inside levels too
        for item in tree:  # blocks first: levels may share them
            if item == ".":
                continue
            if isinstance(item, list):
                inside.append([next(number) for c in str(item) if c in BLOCKS])
            elif shared is None:
                reads_plan = cfg.plan == "cross" and bool(inside)
                self.blocks.append(Block(cfg, item, next(number), item == "A" and plain < 1, reads_plan))
                plain -= item == "A"
        blocks, self.order = iter(self.blocks if shared is None else shared), []  # a plain list: nothing is registered twice
        if cfg.share_levels and depth == 0:
            shared = list(self.blocks)
        for i, item in enumerate(tree):
            if item == ".":
                self.exits[len(self.order)] = sum(c in BLOCKS for c in str(tree[:i]))
                continue
            if isinstance(item, list):
                self.levels.append(Level(cfg, item, iter(inside[len(self.levels)]), depth + 1, shared))
            self.order.append(next(blocks) if isinstance(item, str) else self.levels[-1])

    def init_states(self, B, L, memory, device, dtype):
        """A part of a State for each layer, for L positions."""
        parts, states = [], 0
        for layer in self.order:
            parts.append(layer.init_state(B, L, states, memory, device, dtype))
            states = parts[-1].inner.capacity if isinstance(layer, Level) else states
        return parts

    def run(self, x, ctx, state=None, first=0, last=None):
        """x (B, L, C) through all layers, or those from place `first` of the order up to `last`."""
        for i, layer in enumerate(self.order[first:last], first):
            if i in self.exits and i > first:
                self.reach_exit(x, ctx)
            y = layer(x, ctx, None if state is None else state.parts[i])
            x = y if ctx.gone is None else torch.where(ctx.gone[..., None], x, y)
        return x

    def remember(self, x, ctx, state, first):
        """Update the state by x (B, L, C) as the layers from place `first` on would, without computing what comes out: how
        positions that have left at an exit are seen by those after them."""
        for layer, part in zip(self.order[first:], state.parts[first:]):
            (layer.remember if isinstance(layer, Block) else layer)(x, ctx, part)

    def written(self, parts, memory, S, n):
        """What blocks M would write into memory {block: Memory} of the first n (B,) positions behind S, by what decoding carries of
        them, `parts`: yields (block, MemoryWrites)."""
        for layer, part in zip(self.order, parts):
            if isinstance(layer, Level):
                marks = part.marks[torch.arange(len(n), device=n.device), (S + n - 1).clamp(min=0)] * (n > 0)[:, None]
                _, closed, docs, doc = marks.unbind(1)
                for i, wrote in layer.written(part.inner.parts, memory, 1, closed):
                    wrote.usage *= (docs == doc)[:, None, None, None]  # a document that no chunk has closed in ends the one before all the same
                    yield i, wrote
            elif part[2] is not None:
                yield layer.i, layer.mlp.left(part[2], memory.get(layer.i), n)

    def flops(self, L):
        """Of forward and backward over L positions: 6 per weight of a matrix and position, and 12 H D for every pair of
        positions (PaLM, arXiv:2204.02311, appendix B). Attention to plans counts its weights alone, at every position."""
        total = 0
        for layer in self.order:
            parts = [layer.tell, layer.head] if isinstance(layer, Level) else [layer]
            matrices = [p for part in parts if part is not None for m in part.modules() if not isinstance(m, Embedding)
                        for p in m.parameters(recurse=False) if p.dim() > 1]
            if isinstance(layer, Level):
                L_inside = min(L, layer.capacity) + 1
                total += 6 * L_inside * sum(p.numel() for p in matrices) + layer.flops(L_inside)
                continue
            total += 6 * L * sum(p.numel() for p in matrices)
            if isinstance(layer.attn, Attention):
                total += 12 * layer.attn.sizes[0] * L * L
            if isinstance(layer.mlp, FeaturalMemory):  # of its values those that are found
                total += 6 * L * layer.mlp.n_head * layer.mlp.top * layer.mlp.c_proj.in_features
        return total


class ConceptHead(nn.Module):
    """Predicts the next `horizon` concepts (.., H, C) from a level's states u (.., C). cos and mse regress one point, which
    is the mean of what may come. energy draws samples from noise and is scored by the energy score 2 E|X - y| - E|X - X'|
    (Gneiting and Raftery 2007; Shao et al. 2025, arXiv:2510.27688), which the true distribution minimises. flow denoises: from
    a mixture (1 - t) e + t y of noise and target it regresses y, which says where the flow from noise to targets goes there
    (Lipman et al. 2022, arXiv:2210.02747)."""
    STEPS, TIMES = 8, 8  # of a flow sample; features of its time

    def __init__(self, cfg):
        super().__init__()
        C, H = cfg.n_embd, cfg.horizon
        self.kind, self.H = cfg.concept, H
        random = cfg.concept in ("energy", "flow")
        self.c_fc = Linear(C, 2 * C, bias=cfg.bias) if random else None
        self.c_in = Linear(H * C + self.TIMES if cfg.concept == "flow" else C // 2, 2 * C, bias=False) if random else None
        self.c_mid = Linear(2 * C, 2 * C, bias=cfg.bias) if random else None
        self.out = Linear(2 * C if random else C, H * C, bias=cfg.bias)

    def inside(self, u, z):
        """The random heads' network: states u (.., C) and noise, or a noisy target and its time, z -> (.., H, C)."""
        h = self.c_fc(u) + self.c_in(z)
        h = h + self.c_mid(rms_norm(F.silu(h)))  # a second layer: with one, two futures run into each other
        return self.out(F.silu(h)).float().unflatten(-1, (self.H, -1))

    def forward(self, u):
        """One concept for each place ahead (.., H, C): the point itself, or what is made of noise that is 0."""
        if self.kind in ("cos", "mse"):
            return self.out(u).float().unflatten(-1, (self.H, -1))
        if self.kind == "flow":
            return self.denoise(u, u.new_zeros(*u.shape[:-1], self.H, u.size(-1)), u.new_zeros(*u.shape[:-1], 1, 1))
        return self.inside(u, u.new_zeros(*u.shape[:-1], self.c_in.in_features))

    def sample(self, u):
        """A draw of the concepts ahead (.., H, C); cos and mse have but one."""
        if self.kind in ("cos", "mse"):
            return self(u)
        if self.kind == "energy":
            return self.inside(u, torch.randn(*u.shape[:-1], self.c_in.in_features, device=u.device, dtype=u.dtype))
        y = torch.randn(*u.shape[:-1], self.H, u.size(-1), device=u.device)
        for i in range(self.STEPS):  # what is left of the way, in equal steps; the last one ends at what is denoised
            y = y + (self.denoise(u, y, torch.full_like(y[..., :1, :1], i / self.STEPS)) - y) / (self.STEPS - i)
        return y

    def denoise(self, u, y, t):
        """The mean of targets behind y (.., H, C) at time t (.., 1, 1)."""
        t = torch.cos(math.pi * t.flatten(-2) * torch.arange(self.TIMES, device=t.device))
        return self.inside(u, torch.cat((y.flatten(-2), t), dim=-1).to(u.dtype))

    def loss(self, u, target):
        """States (B, M, C), targets (B, M, H, C) of norm sqrt(C) -> (B, M, H)."""
        if self.kind == "cos":
            return 1 - F.cosine_similarity(self(u), target, dim=-1)
        if self.kind == "mse":
            return (self(u) - target).square().mean(-1)
        if self.kind == "energy":
            x, y = self.sample(u), self.sample(u)
            far = lambda a, b: ((a - b).square().mean(-1) + 1e-8).sqrt()
            return far(x, target) + far(y, target) - far(x, y)
        noise, t = torch.randn_like(target), torch.rand(*target.shape[:2], 1, 1, device=target.device)
        return (self.denoise(u, (1 - t) * noise + t * target, t) - target).square().mean(-1)


@dataclass
class LevelOutput:
    """What a level made of its inputs: states u (B, M + 1, C), concepts (B, M, C), which of those exist (B, M), and where in the
    stack below their chunks end (B, M). State i predicts concept i."""
    level: "Level"
    u: torch.Tensor
    concepts: torch.Tensor
    exists: torch.Tensor
    end: torch.Tensor


class LevelState:
    """What a level carries while decoding: for each position of the level below, (B, L): the place in its chunk of the next
    position, chunks closed, documents begun, documents begun when the last chunk closed; the open sum (B, L, C); for each
    state of the level, what it tells the level below (B, capacity, C); and the State of the layers inside. Where those stand
    follows from how many chunks are closed, so rollback has nothing to do here."""

    def __init__(self, marks, open, told, inner):
        self.marks, self.open, self.told, self.inner = marks, open, told, inner

    def select(self, rows):
        return LevelState(self.marks[rows], self.open.select(rows), self.told[rows], self.inner.select(rows))


class Level(Stack):
    """A slower stack (next-concept prediction, and the hierarchical RNN, in one): what is inside runs once a chunk of the
    positions outside. Chunk i's concept is c_i = norm(sum_j turn(x_j, place j)); the layers inside run over (bos, c_0, ..,
    c_{n-1}) and give u_0 .. u_n; position t outside reads u_i with i = the number of chunks closed up to and including t, so
    nothing sees its future. u_i also predicts c_i, the concept that is not complete yet. x (B, L, C) -> (B, L, C)."""

    def __init__(self, cfg, tree, number, depth, shared):
        super().__init__()
        C, chunks = cfg.n_embd, cfg.chunk.split(",")
        self.chunk = chunks[min(depth, len(chunks)) - 1]
        self.depth, self.horizon = depth, cfg.horizon
        self.capacity = cfg.most_chunks(depth, max(cfg.block_size, cfg.history if cfg.enrich else 0))
        self.bos = nn.Parameter(torch.empty(C))
        self.ln = NORMS[cfg.norm](cfg)
        self.tell = Linear(C, C, bias=cfg.bias) if cfg.plan == "add" else None
        self.regresses = cfg.level_weight(depth) > 0
        self.head = ConceptHead(cfg) if self.regresses or cfg.plan == "cross" else None
        cos, sin = binding(64 if self.chunk == "space" else int(self.chunk), C)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.add_layers(cfg, tree, number, depth, shared)

    def init_state(self, B, L, states, memory, device, dtype):
        room = self.capacity + 2  # for bos, and a place that nobody reads
        inner = State(torch.zeros(B, dtype=torch.long, device=device), self.init_states(B, room, memory, device, dtype), room)
        C = self.bos.numel()
        return LevelState(torch.zeros(B, L, 4, dtype=torch.long, device=device), Trail(torch.zeros(B, L, C, device=device)),
                          torch.zeros(B, room, C, device=device, dtype=dtype), inner)

    def chunks(self, ctx, T, before):
        """Where chunks end: closes (B, T), place in the chunk, chunks closed so far, documents begun so far (B, T). before (B,
        4): the marks of the position before."""
        S, at = ctx.prefix, torch.arange(T, device=before.device)
        none = torch.zeros(len(before), T, dtype=torch.bool, device=before.device)
        starts = fresh = none if ctx.fresh is None else ctx.fresh[:, S:]
        if self.chunk == "space":
            starts = fresh | F.pad(ctx.space[:, :-1], (1, 0))
        start = torch.where(starts, at, -1).cummax(1).values  # where the running chunk, or document, began; -1: before
        place = torch.where(start >= 0, at - start, before[:, :1] + at)
        if self.chunk == "space":
            closes = ctx.space
        else:
            place = place % len(self.cos)
            closes = place == len(self.cos) - 1
        if ctx.real is not None:
            closes = closes & ctx.real[:, S:]
        count = before[:, 1:2] + closes.cumsum(1)
        closes = closes & (count <= self.capacity)
        return closes, place, count.clamp(max=self.capacity), before[:, 2:3] + fresh.cumsum(1)

    def forward(self, x, ctx, part=None):
        B, S = x.size(0), ctx.prefix
        v, at = x[:, S:], torch.arange(x.size(1) - S, device=x.device)
        T, rows = v.size(1), torch.arange(B, device=x.device)
        before, pos = torch.zeros(B, 4, dtype=torch.long, device=x.device), None
        if part is not None:
            pos = ctx.pos[:, S:]
            before = part.marks[rows, (pos[:, 0] - 1).clamp(min=0)] * (pos[:, :1] > 0)
        closes, place, count, docs = self.chunks(ctx, T, before)
        M = min(self.capacity, T if self.chunk == "space" else -(-T // len(self.cos)) if part is not None else T // len(self.cos))
        index = count - before[:, 1:2] - closes.long()  # (B, T) the chunk of each position, from the first that is open
        ends = (index[:, None] == torch.arange(M, device=x.device)[:, None]) & closes[:, None]  # (B, M, T) position t ends chunk m
        of = lambda values: (ends * values[:, None]).sum(-1)  # (B, T) -> (B, M): at the end of each chunk
        turn = place.clamp(max=len(self.cos) - 1)  # (a word's letters beyond the table turn alike)
        turned = rotate(v, *(F.embedding(turn, t).to(x.dtype) for t in (self.cos, self.sin)))
        first = at - place
        if part is None:
            inside = (at >= of(first)[..., None]) & (at <= of(at.expand(B, T))[..., None]) & ends.any(-1, keepdim=True)
            sums = inside.to(x.dtype) @ turned
        else:  # what is open after each position is kept
            inside = (at >= first[..., None]) & (at <= at[:, None])  # (B, T, T)
            opened = inside.to(x.dtype) @ turned + (first < 0)[..., None] * part.open.before(pos)[:, None].to(x.dtype)
            part.open.write(opened, pos)
            sums = ends.to(x.dtype) @ opened
        doc = of(docs)  # (B, M)
        closed = torch.where(closes, docs, -1).cummax(1).values  # documents begun when the last chunk closed
        closed = torch.where(closed < 0, before[:, 3:], closed)
        if part is not None:
            following = torch.where(closes, 0, place + 1)
            part.marks[rows[:, None], pos] = torch.stack((following, count, docs, closed), -1)
        count = F.pad(count, (S, 0))  # a prefix reads u_0, as the first tokens do
        ctx.plan = Plan(None, None, count, self.capacity + (2 if part is not None else 1))
        if part is None or ctx.begins or torch.compiler.is_compiling() or bool(closes.any()):
            doc_before = torch.cat((before[:, 3:], doc[:, :-1]), 1)
            scored = None if ctx.scored is None else (inside * ctx.scored[:, None, S:]).sum(-1)
            self.step(x, ctx, part, sums, before[:, 1], ends.any(-1), of(at.expand(B, T)), doc, doc_before, scored)
            if part is None and ctx.memory_writes is not None and T:
                ended = docs[:, -1] > closed[:, -1]  # a document that no chunk has closed in: what the one before left ends all the same
                for m in self.modules():
                    if isinstance(m, AssociativeMemory):
                        ctx.memory_writes[m.i].usage[:, -1] *= ~ended[:, None, None]
        if self.tell is None:
            return x
        # a document without a chunk yet reads u_0, as the first tokens of a text do
        count = count.masked_fill(F.pad(docs > closed, (S, 0)), 0)
        if part is None:  # a product with 0 and 1 in place of a lookup, whose gradient would be added up row by row
            return x + (count[..., None] == torch.arange(ctx.told.size(1), device=x.device)).to(x.dtype) @ ctx.told
        return x + part.told[rows[:, None], count].to(x.dtype)

    def step(self, x, ctx, part, sums, closed, exists, end, doc, doc_before, scored):
        """The layers inside take a step for each new concept. sums (B, M, C) of chunks, of which exists (B, M) are real, that
        end at positions end (B, M); closed (B,): how many were closed before them; doc, doc_before (B, M): documents begun at the
        end of each and of the one before."""
        concepts = rms_norm(sums)
        fresh = None if ctx.fresh is None else doc != doc_before
        h, n = concepts, int(ctx.begins)
        if ctx.begins:
            h = torch.cat((self.bos.to(x.dtype).expand(len(x), 1, -1), h), dim=1)
            fresh = None if fresh is None else F.pad(fresh, (1, 0))
        state = None if part is None else part.inner
        if state is not None:
            state.begun, state.pos = not ctx.begins, closed + 1 - n
        first = closed + 1 - n
        inner = Context.make(h, ctx.table, state, prefix=n, fresh=fresh, losses=ctx.losses, levels=ctx.levels, keep=ctx.keep,
                             memory=ctx.memory, memory_writes=ctx.memory_writes, real=F.pad(exists, (n, 0), value=True),
                             scored=None if scored is None else F.pad(scored, (n, 0)))
        u = self.ln(self.run(h, inner, state))
        if ctx.levels is not None:
            ctx.levels.append(LevelOutput(self, u, concepts, exists, end))
        ctx.plan.first = first
        if self.tell is None:
            ctx.plan.concepts = self.head(u)
        elif part is None:
            ctx.told = self.tell(u)
        else:
            place = (first[:, None] + torch.arange(u.size(1), device=u.device)).clamp(max=part.told.size(1) - 1)
            part.told[torch.arange(len(x), device=x.device)[:, None], place] = self.tell(u).to(part.told.dtype)
        if scored is not None and self.regresses and part is None:
            self.regress(ctx, u, concepts.detach().float(), exists, doc, doc_before, scored)

    def unbind(self, concepts):
        """Concepts (.., C) that are sums -> vectors (.., chunk, C): turned back by each place. Their products with embeddings
        add up to the product of the concept with a chunk of those embeddings, so each place is read on its own."""
        return rotate(concepts[..., None, :], self.cos, -self.sin)

    def regress(self, ctx, u, concepts, exists, doc, doc_before, scored):
        """Leave the loss of predicting concepts (B, M, C) from u (B, M + 1, C): a chunk counts as many times as it has scored
        tokens, so that the weight beside cross-entropy does not hang on the chunk, and not at all across documents."""
        M, H = concepts.size(1), self.horizon
        ahead = lambda t: torch.stack([F.pad(t[:, h:], (0, 0) * (t.dim() - 2) + (0, min(h, M))) for h in range(H)], 2)  # (B, M, H, ..)
        count = ahead(scored * exists) * (ahead(doc) == doc_before[..., None])
        loss = (self.head.loss(u[:, :M], ahead(concepts)) * count).sum() / H
        ctx.losses[self.depth] = ctx.losses.get(self.depth, 0.0) + loss


# ---------------------------------------------------------------------------------------------------------------------
# context slots


class Slots(nn.Module):
    """Context slots (softAR): the tokens before the window as [aggregate | segments | spans], oldest first.

    history (B, history) token ids, oldest first, -1 where there is none, and a vector for each, (B, history, C)
    -> (B, S, C). The vectors are embeddings, or with `enrich` what the model put out over the history. The aggregate is a
    decayed mean of the whole history; a token's weight has fallen to e^-4 when it leaves, so that slots are a function of
    the ids kept and of nothing else. A segment is the mean of an equal part; a span is the sum of its tokens, each turned
    by its place (`binding`, so order survives the sum). Then a norm, one shared
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
        cos, sin = binding(cfg.span, cfg.n_embd)
        self.register_buffer("cos", cos if cfg.span_binding else torch.ones_like(cos), persistent=False)
        self.register_buffer("sin", sin * cfg.span_binding, persistent=False)

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


class EmbeddingHead(nn.Module):
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


class ExitClassifier(nn.Module):
    """How sure an exit may be that the last layer would choose as it does: output vectors (.., C) -> logit (..). One for all exits,
    trained beside the model without a gradient into it (the classifier of CALM, arXiv:2207.07061)."""

    def __init__(self, cfg):
        super().__init__()
        self.proj = Linear(cfg.n_embd, 1, bias=True)

    def forward(self, h):
        return self.proj(h).float()[..., 0]


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
class Exits:
    """What a forward leaves of its exits."""
    h: list = dataclasses.field(default_factory=list)  # output vectors (B, T, C) at each
    whole: torch.Tensor | None = None  # (B, 1) rows that nobody left at one; None: all


@dataclass
class Output:
    """What GPT.forward returns, whatever the variant. Unpacks as `logits, loss = model(idx, targets)`."""
    logits: torch.Tensor  # (B, T, V)
    loss: torch.Tensor | None  # scalar: the weighted sum of `losses`, None without targets
    losses: dict  # name: scalar; "ce" is the plain cross-entropy, nats a scored token
    early: torch.Tensor | None = None  # (B, T, V) logits of the exit that was asked for
    memory_writes: dict | None = None  # {block: MemoryWrites} of blocks M, where forward was given a memory
    h: torch.Tensor | None = None  # (B, T, C) normalised vectors that the head reads, None with targets

    def __iter__(self):
        return iter((self.logits, self.loss))


@dataclass
class Taught:
    """What a teacher says of the same inputs, and what each part of it counts."""
    logits: torch.Tensor  # (B, T, V)
    fed: dict  # {block: (B, S + T, C)}: what those of its feed-forward layers gave that the student has replaced
    weight: float = 1.0  # of the divergence from its distribution
    match: float = 0.0  # of matching what it gave in those places
    ce: float = 0.0  # of the text itself


class GPT(Stack):
    """A decoder-only transformer and its variants. All weights are step_draw from (seed, parameter name); with seed None they have no
    values yet."""

    def __init__(self, cfg, seed=1337):
        super().__init__()
        if cfg.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, not {cfg.vocab_size}")
        self.cfg = cfg
        self.wte = Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = Embedding(cfg.block_size, cfg.n_embd) if cfg.pos == "learned" else None
        self.slots = Slots(cfg) if cfg.n_slot else None
        self.drop = nn.Dropout(cfg.dropout)
        tree = parse_layers(cfg.layers)
        self.add_layers(cfg, tree, itertools.count())
        self.ln_f = NORMS[cfg.norm](cfg)
        nearest = cfg.head == "nearest"
        self.lm_head = None if nearest else Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        self.point = EmbeddingHead(cfg) if nearest or (cfg.semantic_weight and cfg.semantic != "soft_ce") else None
        self.sure = ExitClassifier(cfg) if cfg.exit_classifier else None
        if cfg.n_think and not 0 <= cfg.think_token < cfg.vocab_size:
            raise ValueError(f"think_token must be an id below {cfg.vocab_size}, not {cfg.think_token}")
        if cfg.tie:
            self.lm_head.weight = self.wte.weight
        table = cfg.pos == "rope" and cfg.attending()
        self.register_buffer("cos", None, persistent=False)
        if table:
            angle = 10000.0 ** (-torch.arange(0, 1, 2 / cfg.heads(table[0])[2]))
            length = cfg.n_slot + max(cfg.block_size, cfg.history if cfg.enrich else 0) + 2 * bool(self.levels)  # a level has bos
            angle = torch.outer(torch.arange(length, dtype=torch.float32), angle)
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)
        space = None
        if cfg.chunk.startswith("space") and self.levels:
            if not cfg.space:
                raise ValueError("chunk = space needs the ids that end a word (space), which a dataset of characters knows")
            space = torch.isin(torch.arange(cfg.vocab_size), torch.tensor(cfg.space))
        self.register_buffer("space", space, persistent=False)
        self.dtype = torch.float32  # what the forward computes in; the trainer sets bf16 where it is fast
        if seed is not None:  # else the values come from elsewhere
            self.init_weights(seed)

    @classmethod
    def of(cls, config, weights):
        """The model of settings, plain data, with weights {name: tensor}; ValueError where they do not fit, before memory is taken."""
        try:
            cfg = GPTConfig(**config)
        except TypeError as e:
            raise ValueError(str(e)) from None
        with torch.device("meta"):
            shapes = {n: t.shape for n, t in cls(cfg, None).state_dict().items()}
        for n in shapes.keys() | weights.keys():
            theirs = weights[n].shape if n in weights else None
            if shapes.get(n) != theirs:
                raise ValueError(f"{n} is {theirs and tuple(theirs)} in it, and {n in shapes and tuple(shapes[n]) or None} by its settings")
        model = cls(cfg, None)
        model.load_state_dict(weights)
        return model

    @torch.no_grad()
    def init_weights(self, seed):
        """Every initial value, in one place. Each parameter has a generator of its own, seeded by (seed, its name), so a
        mechanism that is switched on changes no other parameter."""
        gpt2 = self.cfg.init == "gpt2"
        for name, p in self.named_parameters():
            name = name.replace(".c_k.", ".c_q.")  # of associative memories: what asks alike is alike from the start
            g = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big"))
            if name.endswith("bias") or ".rnn.bias_" in name:
                p.zero_()
            elif name.endswith(".keys") or name.endswith("values.weight"):
                p.normal_(0.0, 1.0, generator=g)
            elif name.endswith(".rate"):  # of recurrences: memories from a few positions to some hundred
                p.uniform_(0.0, 3.0, generator=g)
            elif p.dim() == 1 and not name.endswith(("slots.empty", ".bos")):  # gains of norms
                p.fill_(1.0)
            elif name.endswith((".tell.weight", ".cross.c_proj.weight")):  # a level adds nothing at first
                p.zero_()
            elif gpt2:
                out = name.endswith("c_proj.weight")
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.cfg.n_layer) if out else 0.02, generator=g)
            elif name.endswith(("c_proj.weight", "value_embed.weight")) or name == "lm_head.weight":
                p.zero_()
            elif name in ("wte.weight", "slots.empty") or name.endswith(".bos"):  # as the output head too, ones would shout the current token
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
        return bool(self.cfg.dropout or self.cfg.channel_drop or self.cfg.soft_rate or self.cfg.layer_drop or self.cfg.exit_rate or
                    self.cfg.mem_drop or self.cfg.mem_noise)

    def draw_step(self, seed, step):
        """What a training step draws as a whole, from (seed, step) alone, as numbers: n_layer of them, 0 where a block is left
        out (LayerSkip, Elhoushi et al. 2024, arXiv:2404.16710: with a chance that grows exponentially from 0 for the first block to
        layer_drop for the last), then the weight of each exit. None where there is nothing to draw."""
        cfg, n = self.cfg, self.cfg.n_layer
        weight = self.exit_weights()
        if not cfg.layer_drop and not weight:
            return None
        chance = cfg.layer_drop * (torch.exp2(torch.arange(n) / max(n - 1, 1)) - 1)
        g = torch.Generator().manual_seed(hash((seed, step)) % 2 ** 63)
        kept = (torch.rand(n, generator=g) >= chance).float()
        if cfg.exit_loss == "rotate":
            weight = [float(i == step % len(weight)) for i in range(len(weight))]
        return torch.cat((kept, torch.tensor(weight)))

    def exit_weights(self):
        """What each exit's loss counts, by its depth; [] where they are not trained."""
        depths = list(self.exits.values()) if self.cfg.exit_weight else []
        return [k / sum(depths) for k in depths]

    def flops_per_token(self):
        """Floating-point operations of forward and backward per scored token, slots counted as positions. A pass of thinking
        counts whole, one without gradient a third."""
        cfg = self.cfg
        outside = [p for m in (self.lm_head or self.wte, self.point) if m is not None for p in m.parameters()]
        head = 6 * sum(p.numel() for p in outside if p.dim() == 2)
        passes = 1 + cfg.n_think + (cfg.soft_rate > 0) / 3
        reads = passes + (len(self.exits) if cfg.exit_weight else 0)
        history = self.flops(cfg.n_slot + cfg.history) / 3 if cfg.enrich else 0
        return head * reads + (self.flops(cfg.n_slot + cfg.block_size) * passes + history) / cfg.block_size

    def init_state(self, B, dtype=None, memory=None, carried=None, known=None):
        """An empty decoding State for B rows, with room for every slot and the whole window. memory {block: Memory}: what blocks M
        can find besides what they read; carried: the entries of the first known (B,) tokens, as leave_window gave them."""
        device, S, V = self.wte.weight.device, self.cfg.n_slot, self.cfg.vocab_size
        L = S + self.cfg.block_size
        parts = self.init_states(B, L, memory or {}, device, dtype or self.dtype)
        if self.cfg.n_think:
            parts.append(Thoughts(torch.zeros(B, L, V, device=device), torch.zeros(B, L, dtype=torch.long, device=device)))
        for layer, part in zip(self.order, parts) if carried else ():
            if isinstance(layer, Block) and layer.i in carried:
                w, (keys, values, ok) = part[2], carried[layer.i]
                w.keys[:, :, S:], w.values[:, :, S:], w.ok[:, S:], w.given = keys, values, ok, known
        return State(torch.zeros(B, dtype=torch.long, device=device), parts, L, memory=memory)

    def leave_window(self, state, n):
        """Write into the memories of a state what leaves its window with the first n (B,) tokens. -> {block: what Memory.write gave},
        and for token-level blocks {block: entries of the tokens behind those}, which were made with more before them than will stand
        in a window that begins there: keys and values (B, H, L, D), and which there are (B, L). Levels make theirs anew."""
        wrote = {i: state.memory[i].write(w) for i, w in self.written(state.parts, state.memory, self.cfg.n_slot, n)}
        S, carried = self.cfg.n_slot, {}
        for layer, part in zip(self.order, state.parts):
            if isinstance(layer, Block) and part[2] is not None:
                w, L = part[2], part[2].ok.size(1)
                at = (S + n[:, None] + torch.arange(L - S, device=n.device)).clamp(max=L - 1)
                keys, values = (t.gather(2, at[:, None, :, None].expand(-1, t.size(1), -1, t.size(3))) for t in (w.keys, w.values))
                carried[layer.i] = keys, values, w.ok.gather(1, at)
        return wrote, carried

    def recalled(self, state):
        """Of each token-level block M, what the last position of each row found of what was told: yields (block, places (B, H, k) there,
        negative for something else, weights (B, H, k))."""
        for layer, part in zip(self.order, state.parts):
            if isinstance(layer, Block) and part[2] is not None:
                rows, at = torch.arange(len(state.pos), device=state.pos.device), state.pos - 1
                yield layer.i, part[2].found[rows, :, at] - part[2].usage.size(-1), part[2].weight[rows, :, at]

    def init_memory(self, B, size=None):
        """{block: an empty Memory} for B rows of blocks M, `size` entries each (mem_size); {} where there are none."""
        return {m.i: Memory.empty(B, self.cfg, size, self.wte.weight.device, self.dtype)
                for m in self.modules() if isinstance(m, AssociativeMemory)}

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

    def context(self, x, S, tokens, state, ids=None, targets=None, losses=None, **more):
        """What all blocks and levels share of these inputs x (B, S + T, C). ids (B, T): which symbols soft tokens stand for."""
        if self.cfg.eot >= 0 or self.space is not None:
            if ids is None:
                ids = tokens.argmax(-1) if tokens.is_floating_point() else tokens
            more["fresh"] = F.pad(ids == self.cfg.eot, (S, 0)) if self.cfg.eot >= 0 else None
            more["space"] = self.space[ids] if self.space is not None else None
        if targets is not None and losses is not None:  # a token that is a target is scored where it stands
            more["scored"] = F.pad((targets[:, :-1] >= 0).float(), (S + 1, 0))
        table = None if self.cos is None else (self.cos, self.sin)
        if state is not None:
            more["memory"] = state.memory
        return Context.make(x, table, state, prefix=S, tokens=tokens, losses=losses, **more)

    def hidden(self, tokens, history=None, state=None, have=None, ids=None, targets=None, losses=None, exits=None, keep=None, fed=None,
               memory=None, wrote=None):
        """The trunk: tokens, ids (B, T) or distributions (B, T, V) -> normalised output vectors (B, T, C). have (B, T) is
        False where there is no token: what it gives there means nothing, and all else is as if the row had none there. ids (B, T):
        which symbols soft tokens stand for. Levels leave what they lose in `losses`, over the scored ones of targets (B, T); what
        there is of exits goes to `exits`, an Exits; token-level feed-forward layers leave what they gave in `fed`,
        blocks M what they would write into memory {block: Memory} in `wrote`. keep (n_layer,) is 0 for blocks to leave out."""
        if have is not None:  # what is missing goes behind all that is there, where nothing sees it
            order = (~have).sort(stable=True)[1]
            h = self.hidden(tokens.gather(1, order))
            return torch.empty_like(h).scatter(1, order[..., None].expand_as(h), h)
        x, S = self.embed(tokens, history, state)
        ctx = self.context(x, S, tokens, state, ids, targets, losses, exits=None if exits is None else [], keep=keep, fed=fed,
                           memory=memory, memory_writes=wrote)
        if self.training and self.cfg.exit_rate:
            ctx.leave = self.trial(len(x), S)
        x = self.run(x, ctx, state)
        if exits is not None:
            exits.h = [self.ln_f(h[:, S:]) for h in ctx.exits]
            exits.whole = None if ctx.gone is None else ~ctx.gone.any(1, keepdim=True)
        return self.ln_f(x[:, S:])

    def reach_exit(self, x, ctx):
        """What happens at an exit: x (B, L, C) is noted down, and the positions that ctx.leave says stay as they are from here on. With
        exit_keys what the first exit sees is what keys and values are made of from here on."""
        if self.cfg.exit_keys and ctx.source is None:
            ctx.source = x
        if ctx.exits is not None:
            ctx.exits.append(x)
        if ctx.leave is not None:
            now = ctx.leave(x)
            ctx.gone = now if ctx.gone is None else ctx.gone | now

    def trial(self, B, S):
        """A rule by which positions leave in training, so that the layers learn to see those that left: in a share exit_rate of the
        rows they do where the likeliest token has more than a probability that is step_draw per row. (Their own exits are then their last layer:
        they teach neither exit_distill nor the classifier.)"""
        limit = torch.rand(2, B, 1, device=self.wte.weight.device)
        limit = torch.where(limit[0] < self.cfg.exit_rate, 0.5 + 0.5 * limit[1], 2.0)

        def rule(x):
            with torch.no_grad():
                return F.pad(self.to_logits(self.ln_f(x[:, S:]))[0].softmax(-1).amax(-1) > limit, (S, 0))
        return rule

    def exit_place(self, blocks):
        """Where in the order the exit after so many blocks stands; ValueError names those that there are."""
        for place, k in self.exits.items():
            if k == blocks:
                return place
        raise ValueError(f"the model has no exit after {blocks} blocks" + (
            f"; it has them after {', '.join(map(str, self.exits.values()))}" if self.exits else " and none at all; train one "
            "with a . in layers"))

    def forward_early(self, tokens, state, place):
        """The layers up to an exit's place: tokens (B, T) that continue a state -> what goes on from there x (B, T, C), and the
        exit's logits (B, T, V)."""
        x, S = self.embed(tokens, None, state)
        x = self.run(x, self.context(x, S, tokens, state), state, last=place)
        return x, self.to_logits(self.ln_f(x))[0]

    def forward_remainder(self, x, tokens, state, place):
        """The layers from an exit's place on, over what forward_early left x (B, T, C), in a state that was rolled back to before it:
        logits (B, T, V). Blocks that read a plan or keys from before the exit need it again: then all layers run."""
        if (self.cfg.plan == "cross" and self.levels) or (self.cfg.exit_keys and place != next(iter(self.exits))):
            return self(tokens, state=state).logits
        ctx = self.context(x, 0, tokens, state)
        ctx.source = x if self.cfg.exit_keys else None
        x = self.run(x, ctx, state, first=place)
        return self.to_logits(self.ln_f(x))[0]

    def forward_with_exits(self, tokens, leave, history=None, state=None):
        """A forward in which positions may leave at an exit: -> logits (B, T, V), each at its own depth, and blocks run (B, T).
        leave(h, before) of normalised vectors (B, T, C) at an exit and at the one before it (at first the inputs') says which (B, T)
        leave. The later layers see a position that left as it was then (CALM, Schuster et al. 2022,
        arXiv:2207.07061), so over a whole window or a token at a time the result is the same. With a state, once all have left
        the layers only remember."""
        x, S = self.embed(tokens, history, state)
        ctx = self.context(x, S, tokens, state)
        before, depth = self.ln_f(x[:, S:]), torch.full(x.shape[:2], self.cfg.n_layer, device=x.device)

        def rule(x):
            nonlocal before
            h = self.ln_f(x[:, S:])
            now, before = leave(h, before), h
            return F.pad(now, (S, 0)) if S else now  # slots stay to the end

        ctx.leave = rule
        for a, b in itertools.pairwise((0, *self.exits, None)):
            if a:
                self.reach_exit(x, ctx)
                n = int(ctx.gone.sum())
                if not n:
                    ctx.gone = None
                else:
                    depth = torch.where(ctx.gone, depth.clamp(max=self.exits[a]), depth)
                if n == depth.numel() and state is not None:
                    self.remember(x, ctx, state, a)
                    break
            x = self.run(x, ctx, state, a, b)
        return self.to_logits(self.ln_f(x[:, S:]))[0], depth[:, S:]

    def concepts(self, tokens, history=None):
        """What each level makes of tokens (B, T): a list of LevelOutput, the slowest of nested levels first."""
        x, S = self.embed(tokens, history, None)
        ctx = self.context(x, S, tokens, None, levels=[])
        self.run(x, ctx)
        return ctx.levels

    def to_logits(self, h, regress=False):
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
            logits = self.to_logits(self.hidden(idx, history))[0]
            if self.cfg.eot >= 0:  # where a text ends is no guess: an end stays one, and nothing else becomes one
                logits[..., self.cfg.eot] = float("-inf")
            p = logits.softmax(-1)
        soft = (torch.rand(idx.shape, device=idx.device) < self.cfg.soft_rate) & (idx != self.cfg.think_token) & (idx != self.cfg.eot)
        soft = soft[:, 1:, None]  # nothing is expected in the first place
        hard = F.one_hot(idx, self.cfg.vocab_size).to(p.dtype)
        return torch.cat((hard[:, :1], torch.where(soft, p[:, :-1], hard[:, 1:])), dim=1)

    def think(self, tokens, history, state, **more):
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
        tokens, n = torch.cat((first, hard[:, 1:]), dim=1), min(n, T - 1)
        for i in range(n + 1):
            if i:
                p = self.to_logits(h)[0].softmax(-1)
                tokens = torch.cat((first, torch.where(soft[:, 1:], p[:, :-1], hard[:, 1:])), dim=1)
                if state is not None:
                    state.pos, state.begun = before
            h = self.hidden(tokens, history, state, **({k: more[k] for k in ("ids", "keep", "memory")} if i < n else more))
        if state is not None:
            rows = torch.arange(B, device=hard.device)[:, None]
            pos = state.pos[:, None] - T + torch.arange(T, device=hard.device)
            state.parts[-1].p[rows, pos] = self.to_logits(h)[0].softmax(-1)
            state.parts[-1].count[rows, pos] = count
        return h

    def forward(self, idx, targets=None, history=None, state=None, denom=None, step_draw=None, at_exit=0, taught=None, fed=None, memory=None, ids=None):
        """idx (B, T) token ids, or (B, T, V) distributions over them (soft tokens) -> Output.

        targets (B, T): the next tokens, -1 where none is scored; the loss is their summed cross-entropy over `denom`
        (default: how many are scored; a trainer passes the count over all ranks and micro-steps).
        history (B, cfg.history): the ids before the window, oldest first, -1 where missing; None: all missing.
        state: decoding State that idx continues; it is updated in place.
        step_draw: what draw_step drew for this step; None: no block is left out, and exits count by depth.
        at_exit: also read the exit after so many blocks, as Output.early.
        memory: {block: Memory} of these rows, for blocks M without a state; Output.memory_writes is what they would write there.
        ids (B, T): which symbols soft tokens stand for, as far as ends of documents and words go; None: the likeliest.
        taught: what a teacher says, Taught, to learn from that. fed: a dict for what token-level feed-forward layers give, by block.
        """
        cfg = self.cfg
        ids = idx if ids is None and not idx.is_floating_point() else ids
        if self.training and cfg.soft_rate:
            idx = self.soften(idx, history)
        trunk, of_levels, exits = self.think if cfg.n_think else self.hidden, {}, None
        if at_exit or (targets is not None and self.exits and (cfg.exit_weight or self.sure is not None)):
            exits = Exits()
        keep = step_draw[:cfg.n_layer] if self.training and cfg.layer_drop and step_draw is not None else None
        fed, wrote = {} if taught is not None else fed, None if memory is None else {}
        h = trunk(idx, history, state, targets=targets, losses=of_levels, exits=exits, keep=keep, fed=fed, memory=memory, wrote=wrote, ids=ids)
        logits, z, e = self.to_logits(h, regress=targets is not None)
        early = self.to_logits(exits.h[list(self.exits.values()).index(at_exit)])[0] if at_exit else None
        if targets is None:
            return Output(logits, None, {}, early, wrote, h)
        denom = (targets >= 0).sum().clamp(min=1) if denom is None else denom
        ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        losses = {"ce": ce / denom}
        loss = losses["ce"] * (cfg.ce_weight or float(cfg.head == "nearest"))
        if taught is not None:
            loss = taught.ce * loss + self.taught_losses(taught, logits, fed, targets >= 0, denom, losses)
        if cfg.semantic_weight:
            losses["semantic"] = semantic_loss(cfg.semantic, z, logits, e, targets, cfg.semantic_temp) / denom
            loss = loss + cfg.semantic_weight * losses["semantic"]
        for depth, value in of_levels.items():
            losses[f"concept_{depth}"] = value / denom
            loss = loss + cfg.level_weight(depth) * losses[f"concept_{depth}"]
        if exits is not None:
            loss = loss + self.exit_losses(exits, logits, targets, denom, step_draw, losses)
        return Output(logits, loss, losses, early, wrote)

    def taught_losses(self, taught, logits, fed, scored, denom, losses):
        """What a teacher adds to the loss (Hinton et al. 2015, arXiv:1503.02531), nats a token where scored (B, T): the divergence of
        logits (B, T, V) from its own; and how far what each replaced feed-forward layer gives is from what the teacher's gave in that
        place, as a share of it (squares of lengths: 0 is a copy, 1 as good as nothing), their mean."""
        over_tokens = lambda each: each[:, -scored.size(1):].masked_fill(~scored, 0.0).sum() / denom
        p = taught.logits.log_softmax(-1)
        losses["teacher"] = over_tokens((p.exp() * (p - logits.log_softmax(-1))).sum(-1))
        loss = taught.weight * losses["teacher"]
        if taught.match and taught.fed:
            pairs = [(fed[i].float(), theirs.float()) for i, theirs in taught.fed.items()]
            losses["match"] = over_tokens(sum((y - t).square().sum(-1) / t.square().sum(-1).clamp(min=1e-8) for y, t in pairs)) / len(pairs)
            loss = loss + taught.match * losses["match"]
        return loss

    def exit_losses(self, exits, logits, targets, denom, step_draw, losses):
        """What exits, an Exits, add to the loss: cross-entropy, with exit_distill the divergence from logits (B, T, V) in part, weighted
        as step_draw; and the classifier's, which no gradient leaves."""
        cfg, total, scored = self.cfg, 0.0, targets >= 0
        weights = self.exit_weights() if step_draw is None else step_draw[cfg.n_layer:].unbind()
        names, read = [f"exit_{k}" for k in self.exits.values()], exits.h
        if cfg.exit_loss == "rotate" and len(weights) > 1 and step_draw is not None:  # one exit counts: read it alone
            read = [sum(w.to(h.dtype) * h for w, h in zip(weights, exits.h))]
            weights, names = (1.0,), ["exit"]
        for name, h, w in zip(names, read, weights):
            out = self.to_logits(h)[0]
            losses[name] = F.cross_entropy(out.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum") / denom
            loss = (1 - cfg.exit_distill) * losses[name]
            if cfg.exit_distill:
                p = logits.detach().log_softmax(-1)
                far = (p.exp() * (p - out.log_softmax(-1))).sum(-1)
                loss = loss + cfg.exit_distill * far.masked_fill(~scored, 0.0).sum() / denom
            total = total + cfg.exit_weight * w * loss
        if self.sure is not None:
            with torch.no_grad():
                right = torch.stack([self.to_logits(h)[0].argmax(-1) == logits.argmax(-1) for h in exits.h]).float()
            said = self.sure(torch.stack([h.detach() for h in exits.h]))  # (exits, B, T)
            wrong = F.binary_cross_entropy_with_logits(said, right, reduction="none").mean(0)
            judged = scored if exits.whole is None else scored & exits.whole  # other rows' last layer is the exit itself
            losses["sure"] = wrong.masked_fill(~judged, 0.0).sum() / denom
            total = total + losses["sure"]
        return total


def settings(cfg):
    """A config as plain data, for a checkpoint; GPTConfig(**settings) makes it again."""
    return dataclasses.asdict(cfg)
