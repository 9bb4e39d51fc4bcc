"""GPT and its variants, bottom-up: settings, primitives, mixers, feed-forward layers, block,
level, n-grams, slots, soft tokens, exits, GPT.

A variant is a setting of GPTConfig. At 0, "" or False it has no parameter and draws no random
number, and what is left is the plain GPT, bit for bit. `layers` describes the network, one
character a block:

    A   causal self-attention + MLP
    R   gated linear recurrence + MLP
    D   gated delta rule + MLP
    G   GRU + MLP
    S   differentiable stack + MLP
    F   causal self-attention + featural memory: learned slots in place of the MLP
    M   causal self-attention + associative memory: entries written while reading
    ( ) a level: what stands inside runs once a chunk of what stands outside
    .   an early exit: the model's one head reads what it has got so far

Glossary (B rows, T tokens, L = S + T positions, C = n_embd, H heads, D = head_dim, V tokens):

    mixer           what moves information between positions: attention or a recurrence
    history         (B, cfg.n_history) ids before the window, -1 where missing (behind V counts of
                    tokens with running_mean)
    slot            one of S context vectors in front of the window, made of the history
    running mean    a slot: the mean of all that ever came before the window
    aggregate       a slot: the decayed mean of the history
    segment, span   slots: the mean of an equal part of it; a few tokens as a sum bound by place
    chunk           positions that make one position of the level above
    concept         what a level reads: the normed, bound sum of a chunk (B, M, C)
    level           a slower stack, over concepts
    plan            what a level hands down: its state, or the concepts that it predicts
    rollout         a level reads its own predictions, to predict what comes after them
    exit            a place between blocks where the head may read and a token may stop
    draft, verify   the blocks before an exit, run ahead; the rest of them, over several tokens
    entry           a key and a value in an associative memory, with how often it was used
    soft token      a distribution over the vocabulary (B, T, V) in the place of an id (B, T)
    soft region     places at one end of the window where tokens are soft
    vector          a soft token (B, T, V + C): a symbol as one-hot, and what is added to its row
    prefix          positions at the front that are no tokens: slots, a level's start vector
    doc_start       (B, L) True where a document begins
    word_end        (B, T) True where a word or a learned chunk ends
    is_token        (B, L) False for padding: places in a level for chunks that there are not
    scored          (B, L) how many scored targets stand there

This module knows torch and nothing else: no files, no data, no decoding policy.

Example:
    >>> model = GPT(GPTConfig(vocab_size=65, layers="(AA)AA", chunk="4", block_size=32), seed=1)
    >>> ids = torch.randint(65, (2, 33))
    >>> out = model(ids[:, :-1], targets=ids[:, 1:])
    >>> out.logits.shape, sorted(out.losses)
    (torch.Size([2, 32, 65]), ['ce', 'concept_1'])
    >>> out.loss.backward()
    >>> state = model.eval().init_state(B=2)  # decoding: a cache, updated in place
    >>> model(ids[:, :8], state=state).logits[:, -1].shape
    torch.Size([2, 65])
"""
import hashlib
import itertools
import math
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------
# settings


LIMITS = (  # lowest, highest, settings; whole numbers where the default is one
    (0, 1, "running_mean aggregate soft_rate exit_distill exit_rate plan_draw rollout"),
    (1e-6, 1, "mem_store"),
    (0, 1 - 1e-9, "dropout channel_drop layer_drop"),
    (0, 1e6, "concept_weight plan_noise mem_noise ce_weight semantic_weight exit_weight "
             "next_latent logit_decay"),
    (1e-6, 1e6, "mem_novelty semantic_temp"),
    (1e-12, 1e12, "norm_eps rope_base"),
    (0, 1000, "n_layer n_value_embed n_think"),
    (0, 2 ** 12, "n_kv_head head_dim n_segment"),
    (1, 2 ** 12, "n_head horizon mem_head mem_top mem_dim"),
    (0, 2 ** 16, "mem_shift n_span span level_embd"),
    (1, 2 ** 16, "n_embd mem_chunk"),
    (-1, 2 ** 20, "n_mlp"),
    (0, 2 ** 20, "history"),
    (1, 2 ** 20, "block_size n_mem"),
    (2, 8, "n_gram"),
    (0, 2 ** 24, "vocab_size space mem_size"),
    (1, 2 ** 24, "n_gram_size"),
    (-1, 2 ** 24, "eot think_token"),
    (-2 ** 20, 2 ** 20, "n_soft"))
# refused where they do nothing
SWITCHES = ("share_levels share_mlp qk_scale rollout plan_draw plan_noise enrich slot_gate "
            "doc_mask mem_noise exit_rate exit_keys exit_classifier")


@dataclass
class GPTConfig:
    # model
    block_size: int = 256  # tokens in the window (context slots come on top)
    vocab_size: int = 0  # number of tokens; 0: that of the dataset
    layers: str = ""  # one character a block; "" means "A" * n_layer
    n_layer: int = 0  # number of blocks; 0: 6, or those of layers
    n_embd: int = 384  # channels C of the residual stream
    n_head: int | tuple[int, ...] = 6  # query heads; one number, or one per block of layers
    n_kv_head: int | tuple[int, ...] = 0  # key and value heads, one or per block; 0: n_head
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    n_mlp: int | tuple[int, ...] = 0  # MLP width, one or per block; 0: 4 n_embd, -1: none
    share_mlp: bool = False  # all MLPs are one: one set of weights
    mlp: str = "relu2"  # relu2 | gelu | gelu_tanh (GPT-2's) | swiglu
    norm: str = "rms"  # rms (no gain: the next matrix has it) | layer | scale
    norm_eps: float = 1e-6  # rms: what is added to the mean square
    pos: str = "rope"  # rope | learned | none
    rope_base: float = 10000.0  # rope: the slowest pair turns once in 2 pi times so many positions
    init: str = "fan_in"  # fan_in (output projections and head start at 0) | gpt2 (normal 0.02)
    bias: bool = False  # biases in linear layers and LayerNorm
    tie: bool = False  # output head shares the token embedding
    qk_norm: bool = True  # RMSNorm on queries and keys
    qk_scale: bool = False  # a learned factor of each head's normed scores, 1 at first
    embed_norm: bool = True  # RMSNorm on the embeddings
    doc_mask: bool = False  # attention stops where its document began, as memories always do
    # recurrences and levels
    gate: str = "real"  # of R: positive (0 to 1) | real (-1 to 1) | complex (channel pairs turn)
    chunk: str | int = "4"  # positions in a chunk, or space (a word); "space,4": one value a depth
        # or entropy:2.5 (until the first exit is so many nats unsure) | route:4 (a mean length)
    plan: str = "add"  # a level hands down: add (its state) | cross (the concepts that it predicts)
        # | latent (the same, and blocks behind it see no more of the text than their own chunk)
    plan_draw: float = 0.0  # share of training rows that are handed a draw of the concepts ahead
    plan_noise: float = 0.0  # above 0 they are handed the true ones, with noise of this deviation
    concept: str = "cos"  # loss of the next concept: cos | mse | energy (energy score) | flow
    concept_weight: float | tuple[float, ...] = 0.01  # its weight, one or per depth; 0: no loss
    concept_of: str = "chunk"  # what is predicted of a chunk: chunk (its concept) | bag (without
        # order) | state (of the level that has read it) | ema (that of the level's moving average)
    horizon: int = 1  # concepts that are predicted ahead
    rollout: float = 0.0  # above 0: one after another, each read as if it had come, in this share
        # of training rows
    level_embd: int | tuple[int, ...] = 0  # channels in levels, one or per depth; 0: as outside
    chunk_binding: bool = True  # turn each position of a chunk by its place (False: a plain sum)
    share_levels: bool = False  # levels run the blocks of the token level: one set of weights
    eot: int = -1  # id that ends a document, where memory of the past ends; -1: the dataset's
    space: tuple[int, ...] = ()  # ids that end a word, for chunk = space; (): the dataset's
    # memories
    n_mem: int = 4096  # slots of a featural memory (F), a square number
    mem_head: int = 4  # queries that each position puts to a memory
    mem_top: int = 16  # slots or entries that a query reads
    mem_dim: int = 64  # channels of a query and of a key
    mem_size: int = 2048  # entries that an associative memory (M) keeps beyond its window, per head
    mem_chunk: int = 16  # positions that search before any of them is written
    mem_shift: int = 1  # an entry's value stands so many places after its key: what came next
    mem_novelty: float = 0.98  # a key this near (cosine) to an older one replaces it; above 1: none
    mem_noise: float = 0.0  # deviation of noise on queries in training: finds must be nearer
    mem_store: float = 1.0  # how near (times its cosine) an entry of a store counts beside others
    # model
    n_value_embed: int = 0  # the last n token-level blocks A add a token embedding to their values
    dropout: float = 0.0  # on embeddings, attention weights and residual branches
    channel_drop: float = 0.0  # dropout of whole channels of a row on residual branches: cheap
    # soft tokens
    head: str = "softmax"  # softmax | nearest (logits fall with the distance to each embedding)
    ce_weight: float = 1.0  # weight of cross-entropy in training; 0: the semantic loss alone
    semantic: str = "cos"  # cos | mse (regress the target's embedding) | soft_ce (soft targets)
    semantic_weight: float = 0.0  # weight of that loss; 0: off
    semantic_temp: float = 0.1  # soft_ce: temperature of the cosine; 1e6 is label smoothing
    next_latent: float = 0.0  # weight of predicting the next output vector from this one; 0: off
    logit_decay: float = 0.0  # weight of the logits' mean square, as a loss; 0: off
    soft_rate: float = 0.0  # share of training inputs replaced by the model's own expectation
    n_soft: int = 0  # the first n places of a window (-n: the last) are soft, in a part of the rows
    soft_of: str = "softmax"  # a soft token is a softmax (distribution) | point (regressed vector)
    n_think: int = 0  # the first n think tokens of a window read the model's last output
    think_token: int = -1  # id of the think token; -1: that of the dataset
    # n-grams
    n_gram: tuple[int, ...] = ()  # tables of hashed n-grams of these lengths, added to embeddings
    n_gram_size: int = 16384  # rows of each table
    # slots
    history: int = 0  # tokens before the window that are compressed into context slots
    running_mean: int = 0  # 1: a slot with the mean of all that came before, however long
    aggregate: int = 0  # 1: a slot with the decayed mean of the whole history
    n_segment: int = 0  # slots with the means of as many equal parts of the history
    n_span: int = 0  # slots that each bind `span` tokens, the last n_span * span of the history
    span: int = 0  # tokens in a span
    span_binding: bool = True  # turn each token of a span by its place (False: a bag of tokens)
    enrich: bool = False  # make slots of the model's outputs over the history, not of embeddings
    slot_gate: bool = False  # attend to slots apart, times a gate that starts at 0, so that slots
        # can be given to a trained model of blocks A, F, M
    # exits
    exit_weight: float = 1.0  # weight of the exits' losses together; 0: they are not trained
    exit_loss: str = "depth"  # depth (all exits, deeper ones more: CALM) | rotate (one a step)
    exit_distill: float = 0.0  # share of an exit's loss that is its divergence from the last layer
    exit_rate: float = 0.0  # share of training rows whose tokens stop at exits, as in decoding
    exit_keys: bool = False  # attention after the first exit takes keys and values from there
    exit_classifier: bool = False  # train a classifier: would the last layer choose the same?
    layer_drop: float = 0.0  # chance that a step leaves out the last block; earlier ones less

    def __post_init__(self):
        for name, options in CHOICES.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name} is one of {', '.join(options)}, not "
                                 f"{getattr(self, name)!r}")
        for low, high, names in LIMITS:
            for name in names.split():
                value, whole = getattr(self, name), type(getattr(GPTConfig, name)) is not float
                each = value if isinstance(value, tuple) else (value,)
                kinds = (int,) if whole else (int, float)
                inside = all(type(v) in kinds and low <= v <= high for v in each)  # NaN is not
                if not inside or not (each or name in ("space", "n_gram")):
                    raise ValueError(f"{name} must be a {'whole ' * whole}number between {low} and "
                                     f"{high:,}, not {value!r}")
        if self.n_embd % 2:
            raise ValueError(f"n_embd ({self.n_embd}) must be even: channels turn in pairs")
        self.layers = self.layers or "A" * (self.n_layer or 6)
        parse_layers(self.layers)
        if self.n_layer not in (0, len(self.letters)):
            raise ValueError(f"n_layer says {self.n_layer} blocks, and layers = {self.layers} has "
                             f"{len(self.letters)}; leave one of them out")
        self.n_layer = len(self.letters)
        if isinstance(self.concept_weight, tuple) and not any(self.concept_weight):
            self.concept_weight = 0.0
        for name, needs in self.idle():
            if name in SWITCHES.split():
                raise ValueError(f"{name} has nothing to work on; it needs {needs}")
        for mechanism in CHECKED:
            mechanism.check(self)
        if self.tie and self.init == "fan_in" and not self.embed_norm:
            raise ValueError("tie = True with init = fan_in needs embed_norm = True: one table "
                             "cannot be small for the head and large for the input")
        if self.layer_drop and self.n_layer < 2:
            raise ValueError("layer_drop spares the first block, and there is no other; leave it "
                             "out")

    def idle(self):
        """Yield (name, what it needs) of each setting that was changed and has nothing to work on.

        Sizes may be left in a preset where nothing uses them; SWITCHES, and settings named on the
        command line, may not.
        """
        has = lambda letters: bool(set(letters) & set(self.layers))
        n_mlps = sum(BLOCKS[c][1] is mlp for c in self.letters)
        for useful, needs, names in (
                (has("R"), "a block R in layers", "gate"),
                (self.attending(), "a block that attends (A, F or M) in layers",
                 "n_kv_head qk_norm doc_mask"),
                (self.qk_norm and has("AFM"), "qk_norm = True and a block A, F or M in layers",
                 "qk_scale"),
                (self.attending() or has("DS"), "a block with heads (A, D, S, F or M) in layers",
                 "head_dim"),
                (self.norm == "rms" or self.embed_norm, "norm = rms or embed_norm", "norm_eps"),
                (self.pos == "rope" and self.attending(), "pos = rope and a block that attends "
                 "(A, F or M) in layers", "rope_base"),
                (n_mlps, "a block with an MLP (A, R, D, G or S) in layers", "mlp n_mlp"),
                (n_mlps > 1 and type(self.n_mlp) is int and self.n_mlp >= 0,
                 "two blocks with an MLP, and one n_mlp for all", "share_mlp"),
                (self.ce_weight, "a ce_weight above 0", "logit_decay"),
                (has("("), "a level, ( ), in layers",
                 "share_levels chunk level_embd chunk_binding plan concept concept_weight "
                 "concept_of horizon"),
                (has("FM"), "a memory (F or M) in layers", "mem_head mem_top mem_dim"),
                (has("F"), "a block F in layers", "n_mem"),
                (has("M"), "a block M in layers",
                 "mem_size mem_chunk mem_shift mem_novelty mem_noise mem_store"),
                (has("."), "an exit, . , in layers",
                 "exit_weight exit_loss exit_distill exit_rate exit_keys exit_classifier"),
                (self.exit_weight, "an exit_weight above 0", "exit_loss exit_distill"),
                (self.plan != "add" or self.concept_weight, "plan = cross or a concept_weight",
                 "concept concept_of horizon"),
                (has("(") and self.draws(), "a level with plan = cross or latent, concept = energy "
                 "or flow, and a concept_weight", "plan_draw"),
                (self.plan_draw, "a plan_draw", "plan_noise"),
                (has("(") and self.plan != "add" and self.horizon > 1 and self.concept_weight,
                 "a level with plan = cross or latent, a horizon above 1, and a concept_weight",
                 "rollout"),
                (self.n_slot, "context slots: history and one of running_mean, aggregate, "
                 "n_segment, n_span", "enrich slot_gate"),
                (any(BLOCKS[item[0]][0] is Attention for item in self.tree if not is_level(item)),
                 "a block A, F or M outside of levels", "slot_gate"),
                (self.n_span, "spans: history, n_span and span", "span_binding"),
                (self.semantic_weight, "a semantic_weight above 0", "semantic"),
                (self.semantic_weight and self.semantic == "soft_ce",
                 "semantic = soft_ce and its weight", "semantic_temp"),
                (self.soft_rate, "a soft_rate above 0", "soft_of"),
                (self.n_gram, "an n_gram", "n_gram_size"),
                (self.n_think, "n_think above 0", "think_token")):
            for name in () if useful else names.split():
                if getattr(self, name) != getattr(GPTConfig, name):
                    yield name, needs

    @property
    def letters(self):
        """The blocks alone, in the order of the string: block i has character letters[i]."""
        return [c for c in self.layers if c in BLOCKS]

    @property
    def tree(self):
        """Blocks and levels as parse_layers gives them, without exits."""
        return [item for item in parse_layers(self.layers) if item != "."]

    @property
    def n_slot(self):
        return self.running_mean + self.aggregate + self.n_segment + self.n_span

    @property
    def n_history(self):
        """How many numbers a row of history has: with running_mean V counts, then the ids."""
        return self.running_mean * self.vocab_size + self.history

    @property
    def regresses(self):
        """Whether the model has an EmbeddingHead."""
        return self.head == "nearest" or (self.semantic_weight and self.semantic != "soft_ce")

    def attending(self):
        """Return the numbers of the blocks that attend to something, by heads."""
        cross = self.plan != "add"
        return [i for i, c in enumerate(self.letters) if cross or BLOCKS[c][0] is Attention]

    def draws(self):
        """Return whether levels can hand down draws."""
        return self.plan != "add" and self.concept in ("energy", "flow") and self.concept_weight

    def most_chunks(self, depth, length=None):
        """Return how many chunks levels of this depth close at most over `length` tokens.

        Words beyond a quarter of the tokens close none, nor do learned chunks far shorter than
        they should be on average. length: the longest that is read.
        """
        if length is None:
            length = max(self.block_size, self.history if self.enrich else 0)
        chunks = self.chunk.split(",")
        for c in chunks[:depth] if len(chunks) > 1 else chunks * depth:
            length //= parse_chunk(c)[2]
        return length

    def per_layer(self, name, i):
        value = getattr(self, name)
        return value[i] if isinstance(value, tuple) else value

    def widened(self, width):
        """Return these settings for blocks of `width` channels: as many more heads, wider MLPs."""
        def grown(v):
            if isinstance(v, tuple):
                return tuple(map(grown, v))
            return v if v < 1 else max(1, v * width // self.n_embd)

        names = "n_head", "n_kv_head", "n_mlp"
        return replace(self, n_embd=width, **{name: grown(getattr(self, name)) for name in names})

    def heads(self, i):
        """Return (query heads, key and value heads, head_dim) of block i."""
        h = self.per_layer("n_head", i)
        return h, self.per_layer("n_kv_head", i) or h, self.head_dim or self.n_embd // h


def parse_layers(layers):
    """Return a layer string as a tree: (character, number) is a block, a list a level, "." an exit.

    Raise ValueError that names the first character that is wrong.

    Example: "A.(R)A" -> [("A", 0), ".", [("R", 1)], ("A", 2)]
    """
    if len(layers) > 1000:
        raise ValueError(f"layers has {len(layers):,} characters; give at most 1,000")
    open_lists, number = [[]], itertools.count()
    last_block = max(map(layers.rfind, BLOCKS))
    for i, c in enumerate(layers):
        where, inner = f"layers = {layers[:80]!r}: character {i + 1}, {c!r},", open_lists[-1]
        if c == "(":
            if len(open_lists) > 8:
                raise ValueError(f"{where} opens more than 8 levels in one another")
            open_lists.append([])
        elif c == ")":
            if len(open_lists) == 1 or not inner:
                raise ValueError(f"{where} ends " + (
                    "no level" if len(open_lists) == 1 else "a level without a block"))
            open_lists.pop()
            open_lists[-1].append(inner)
        elif c == ".":
            if len(open_lists) > 1:
                raise ValueError(f"{where} is an exit inside a level, which has no tokens to "
                                 f"choose; put it outside")
            if not inner or inner[-1] == "." or i > last_block:
                raise ValueError(f"{where} is an exit, which stands between blocks")
            inner.append(c)
        elif c in BLOCKS:
            inner.append((c, next(number)))
        else:
            raise ValueError(f"{where} is no block; blocks are {', '.join(BLOCKS)}, ( ) a level, "
                             f"and . an exit")
    if len(open_lists) > 1:
        raise ValueError(f"layers = {layers!r}: a level is not closed; add )")
    return open_lists[0]


def is_level(item):
    return isinstance(item, list)


def stacks(items, depth=0):
    """Yield (items, depth) of a tree, as parse_layers gives it, and of every level in it."""
    yield items, depth
    for item in filter(is_level, items):
        yield from stacks(item, depth + 1)


def parse_chunk(c):
    """Return (kind, number, room) of a value of `chunk`, which has room for a chunk every so many
    positions; raise ValueError where it is none.

    Example: "4" -> ("", 4, 4), "space" -> ("space", 4, 4), "route:4" -> ("route", 4, 3)
    """
    if c == "space":
        return c, 4, 4
    kind, colon, number = c.rpartition(":")
    try:
        n = float(number) if kind == "entropy" else int(number)
    except ValueError:
        n = -1
    least, room = {"": (1, n), "entropy": (0, 3), "route": (2, 3 * n // 4)}.get(kind, (n + 1, 0))
    if not least <= n < 1e9 or colon and not kind:
        raise ValueError(f"chunk is a positive number or, for the first level, space, entropy:2.5 "
                         f"(nats) or route:4 (a mean length of 2 or more), not {c!r}")
    return kind, n, room


# --------------------------------------------------------------------------------------------------
# parameters: each states its initial values and its optimizer group where it is made


def constant(value):
    """Return an initial law: every number is `value`."""
    return lambda p, cfg, generator: p.fill_(value)


def normal(std, gpt2=0.02):
    """Return an initial law: normal with deviation std, or gpt2 where cfg.init says so.

    Each is a number or a function of (parameter, cfg); 0 gives zeros.
    """
    def law(p, cfg, generator):
        deviation = gpt2 if cfg.init == "gpt2" else std
        if callable(deviation):
            deviation = deviation(p, cfg)
        return p.normal_(0.0, deviation, generator=generator) if deviation else p.zero_()
    return law


ZEROS, ONES = constant(0.0), constant(1.0)
MATRIX = normal(lambda p, cfg: p.size(1) ** -0.5)
RESIDUAL = normal(0.0, gpt2=lambda p, cfg: 0.02 / math.sqrt(2 * cfg.n_layer))
HEAD = normal(0.0)
EMBEDDING = normal(lambda p, cfg: 1 / cfg.n_embd if cfg.tie else 1.0)  # a tied head would shout
GROUPS = ("matrix", "table", "values", "gain")  # Muon; AdamW; at a rate of its own; without decay


def stated(p, init, group):
    """Return the parameter p with its initial law and the optimizer group it belongs to."""
    p.init, p.group = init, group
    return p


def parameter(*shape, init, group="gain"):
    """Return a new parameter of this shape, an initial law and one of GROUPS."""
    return stated(nn.Parameter(torch.empty(shape)), init, group)


def constants(module, **tensors):
    """Give a module tensors that it computes with, which no checkpoint has."""
    for name, t in tensors.items():
        module.register_buffer(name, t, persistent=False)


MKL = torch.backends.mkl.is_available()
# instructions for products in bf16; without them torch takes 80 times as long as in fp32
BF16_CPU = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def better_in_fp32(x):
    """Return whether products of x are better taken in fp32: in bf16 on a CPU that has none."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not BF16_CPU


def few_rows(x, weight, bias=None):
    """Return F.linear(x, weight, bias), x (n, in), for few rows on a CPU the quick way.

    Reading the weights is what takes time. By MKL's F.linear on an AMD CPU one thread computes a
    single row, and two rows take twice as long, at half of the memory's speed or less. From 8 on
    it is as fast.
    """
    n_out, n_in = weight.shape
    if not 0 < x.size(0) < 8 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if bias is not None:
        return few_rows(x, weight) + bias
    if x.size(0) == 1 and torch.compiler.is_compiling():  # a fused sum
        return (weight.float() * x.float()[0]).sum(-1).to(x.dtype)[None]
    if x.dtype != torch.float32 or not MKL:
        return F.linear(x, weight)
    if x.size(0) > 1:  # this way round MKL shares the outputs among threads
        return (weight @ x.T).T.contiguous()
    threads = torch.get_num_threads()
    n = n_out // threads * threads  # outputs that they share evenly
    if threads == 1 or n * n_in < 2 ** 17:
        return F.linear(x, weight)
    if n < n_out:
        return torch.cat((few_rows(x, weight[:n]), F.linear(x, weight[n:])), 1)
    shares = weight.view(threads, -1, n_in).mT
    return torch.bmm(x.expand(threads, 1, n_in), shares).view(1, n)


class Linear(nn.Linear):
    """nn.Linear that computes in its input's type and states its law.

    n_out may be several sizes, of matrices that lie in one and that Muon takes apart. The weights
    stay fp32 for the optimizer and are cast where they are used: compiled, that is one cast a
    step, which costs less than autocast's bookkeeping.
    """

    def __init__(self, n_in, n_out, bias=False, init=MATRIX, group="matrix"):
        sizes = n_out if isinstance(n_out, tuple) else (n_out,)
        super().__init__(n_in, sum(sizes), bias=bias)
        stated(self.weight, init, group).parts = sizes
        if bias:
            stated(self.bias, ZEROS, "gain").parts = sizes

    def reset_parameters(self):
        """Do nothing: GPT.init_weights gives values, and building draws no random number."""

    def forward(self, x, first=0, last=None):
        """Return the outputs from the first-th on, up to the last."""
        rows = x.numel() // x.size(-1)
        if rows > 8 and better_in_fp32(x):  # (for fewer it takes longer to cast the weights)
            return self.forward(x.float(), first, last).to(x.dtype)
        weight, bias = self.weight, self.bias
        if first or last:
            weight, bias = weight[first:last], None if bias is None else bias[first:last]
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if rows < 8:
            y = few_rows(x.reshape(-1, x.size(-1)), weight, bias)
            return y.view(*x.shape[:-1], len(weight))
        return F.linear(x, weight, bias)


class Embedding(nn.Embedding):
    """nn.Embedding of tokens that may be soft.

    Ids (...) give rows, distributions p (..., V) expected rows p @ E, to which channels beyond V
    are added: (..., C).
    """

    def __init__(self, n, dim, init=EMBEDDING, group="table"):
        super().__init__(n, dim)
        stated(self.weight, init, group)

    def reset_parameters(self):
        """Do nothing, as in Linear."""

    def forward(self, tokens):
        if tokens.is_floating_point():
            return expected_rows(tokens.to(self.weight.dtype), self.weight)
        return F.embedding(tokens, self.weight)


def expected_rows(soft, table):
    """Return what soft tokens (..., V or V + C) stand for by a table (V, C): (..., C)."""
    x, offset = soft[..., :len(table)] @ table, soft[..., len(table):]
    return x + offset if offset.size(-1) else x


# --------------------------------------------------------------------------------------------------
# primitives


def rms_norm(x, eps=1e-6):  # torch's default would depend on the type
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def RMSNorm(cfg):
    """Return x / rms(x), without a gain, as a module."""
    return nn.RMSNorm(cfg.n_embd, eps=cfg.norm_eps, elementwise_affine=False)


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = parameter(cfg.n_embd, init=ONES)
        self.bias = parameter(cfg.n_embd, init=ZEROS) if cfg.bias else None

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias)


class ScaleNorm(nn.Module):
    """x / |x| times one learned length (Nguyen and Salazar 2019, arXiv:1910.05895)."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = parameter(1, init=ONES)  # in units of sqrt(C), so that 1 is RMSNorm

    def forward(self, x):
        return rms_norm(x) * self.weight.to(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "scale": ScaleNorm}


class Drop(nn.Module):
    """Dropout of single values, and of whole channels for all positions of a row.

    The second (variational dropout, Gal and Ghahramani 2016, arXiv:1512.05287) draws T times fewer
    random numbers, and those are what dropout costs on a CPU.
    """

    def __init__(self, cfg):
        super().__init__()
        self.each, self.channel = cfg.dropout, cfg.channel_drop

    def forward(self, x):
        if self.channel and self.training:
            x = x * F.dropout(x.new_ones(x.size(0), 1, x.size(2)), self.channel)
        return F.dropout(x, self.each, self.training) if self.each else x


def rotate(x, cos, sin):
    """Turn the channel pairs (i, i + n/2) of x (..., n) by angles: cos and sin (..., n/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def angles(table, place, dtype):
    """Return cos and sin of a table, None or two tensors (places, n/2), at these places."""
    return None if table is None else tuple(t[place].to(dtype) for t in table)


def split_heads(x, head_dim, norm=False, rope=None):
    """Split x (B, L, heads * D) into (B, heads, L, D), normed and turned where that is asked."""
    x = x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    x = rms_norm(x) if norm else x
    return x if rope is None else rotate(x, *rope)


def merge_heads(x):
    """Return x (B, heads, L, D) as (B, L, heads * D)."""
    return x.transpose(1, 2).flatten(2)


def binding(places, C, bound=True):
    """Return {cos, sin} (places, C/2) of a rotary binding: a vector is turned by its place.

    So order survives a sum (in the manner of Plate 1995). Angles spread evenly over (0, pi): sums
    of vectors at different places are orthogonal on average. Not bound: nothing turns.
    """
    turn = bound * math.pi * (torch.arange(C // 2) + 0.5) / (C // 2)
    turn = torch.outer(torch.arange(places, dtype=torch.float32), turn)
    return dict(cos=turn.cos(), sin=turn.sin())


def causal_pieces(T, device):
    """Return [(a, b, mask)] of pieces a..b of T queries, about 128 each: mask (1, 1, b - a, b)."""
    n, place = max(1, T // 128), torch.arange(T, device=device)
    cuts = [T * i // n for i in range(n + 1)]
    return [(a, b, (place[:b] <= place[a:b, None])[None, None])
            for a, b in itertools.pairwise(cuts)]


def skips_blocks(x):
    """Return whether FlexAttention reads x, which skips blocks of 128 x 128 scores that are masked
    whole: in what is compiled for one GPU. (Several need a switch of DDP's that nobody has tried.)
    """
    return (x.device.type == "cuda" and x.size(1) > 128 and torch.compiler.is_compiling()
            and not torch.distributed.is_initialized())


def attend(q, k, v, mask, dropout):
    """Softmax attention: q (B, H, T, D), k and v (B, Hkv, L, D) -> (B, H, T, D).

    mask (B, 1, T, L) is True where a query may look; None means causal, with T = L; a BlockMask
    leaves blocks of scores out (FlexAttention, Dong et al. 2024, arXiv:2412.05496). On a CPU with
    bf16 the attention is written out: the compiler fuses it, while the backward of PyTorch's own
    kernel runs about ten times slower in bf16 than in fp32 there.
    """
    B, H, T, D = q.shape
    groups, on_cpu = k.size(1), q.device.type == "cpu"
    if isinstance(mask, BlockMask):
        q, k, v = (t.contiguous() for t in (q, k, v))  # (strides went wrong in torch 2.13 on a CPU)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=H != groups)
    if better_in_fp32(q):
        return attend(q.float(), k.float(), v.float(), mask, dropout).to(q.dtype)
    low = q.dtype != torch.float32
    if on_cpu and T == 1 and mask is not None and (low or torch.compiler.is_compiling()):
        # one query: sums, which the compiler fuses; scaled before, the product would be stored
        q = q.reshape(B, groups, -1, 1, D)
        scores = (q.float() * k.float().unsqueeze(2)).sum(-1) * D ** -0.5  # (B, Hkv, H / Hkv, L)
        p = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return (p[..., None] * v.float().unsqueeze(2)).sum(-2).to(q.dtype).view(B, H, T, D)
    if not (on_cpu and low):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None,
                                              enable_gqa=H != groups)
    if mask is None:  # in pieces: no query meets the keys of later pieces, and scores stay in cache
        pieces = [attend(q[:, :, a:b], k[:, :, :b], v[:, :, :b], causal, dropout)
                  for a, b, causal in causal_pieces(T, q.device)]
        return torch.cat(pieces, dim=2)
    q = (q * D ** -0.5).reshape(B, groups, -1, D)  # the query heads of one key head, as rows
    scores = (q @ k.transpose(-2, -1)).view(B, groups, H // groups, T, -1)
    p = scores.float().masked_fill(~mask.unsqueeze(-3), float("-inf")).softmax(-1).to(q.dtype)
    return (F.dropout(p, dropout).view(B, groups, -1, p.size(-1)) @ v).view(B, H, T, D)


def topk_indices(scores, k, ordered=True):
    """Return where the k largest of scores (..., N) stand, largest first if ordered: (..., k)."""
    return scores.topk(k, sorted=ordered)[1]


def topk(scores, k, group=8, ordered=True):
    """Return the k largest of scores (..., N) and where they stand, (..., k) each, exactly.

    They lie in the k groups of 8 with the largest maxima, which are found in the same way; where
    values are equal, either may be taken. Values have a gradient. On a CPU it takes a fifth to a
    half of torch.topk's time for rows of thousands to a million.
    """
    N = scores.size(-1)
    n = N // group
    if N < 32 * k or scores.numel() < 2 ** 17 or scores.device.type != "cpu":
        places = topk_indices(scores, k, ordered)
    else:
        groups = scores.detach()[..., :n * group].unflatten(-1, (group, n))  # j, j + n, j + 2n, ..
        found = topk(groups.amax(-2), k, ordered=False)[1]
        rest = torch.arange(n * group, N, device=scores.device).expand(*found.shape[:-1], -1)
        places = torch.cat([found + i * n for i in range(group)] + [rest], dim=-1)
        candidates = scores.detach().gather(-1, places)
        places = places.gather(-1, topk_indices(candidates, k, ordered))
    return scores.gather(-1, places), places


# --------------------------------------------------------------------------------------------------
# what layers share: a cache each, one frozen Sequence, one Aux that grows


def standing_at(x, pos):
    """Return what stands at places pos (B, n) of x (B, T, ...): (B, n, ...); None: all of x."""
    return x if pos is None else x[torch.arange(len(pos), device=pos.device)[:, None], pos]


@dataclass(eq=False)
class Cache:
    """What a layer carries while decoding: named tensors (B, L, ...), one row a position.

    Which positions count is said by those of the inputs, so a rollback has nothing to do here.
    """
    tensors: dict = field(default_factory=dict)
    inside: list = field(default_factory=list)  # the caches of the layers within

    @classmethod
    def empty(cls, like, B, L, **sizes):
        """Return a cache of zeros on the device of `like` and in its type, or in one that is named.

        Example: Cache.empty(x, B, L, k=(H, D), docs=(torch.long,))
        """
        tensors = {}
        for name, size in sizes.items():
            *size, dtype = size if isinstance(size[-1], torch.dtype) else (*size, like.dtype)
            tensors[name] = torch.zeros(B, L, *size, device=like.device, dtype=dtype)
        return cls(tensors)

    def __getitem__(self, name):
        return self.tensors[name]

    def write(self, pos, **tensors):
        """Write tensors (B, T, ...) at positions pos (B, T)."""
        rows = torch.arange(len(pos), device=pos.device)[:, None]
        for name, new in tensors.items():
            self.tensors[name][rows, pos] = new.to(self.tensors[name].dtype)

    def attended(self, pos, k, v):
        """Write keys and values (B, H, T, D) at pos; return those of all places (B, H, L, D)."""
        self.write(pos, k=k.transpose(1, 2), v=v.transpose(1, 2))
        return self["k"].transpose(1, 2), self["v"].transpose(1, 2)

    def read(self, name, pos):
        """Return what stands at positions pos (B, T): (B, T, ...)."""
        return standing_at(self.tensors[name], pos)

    def before(self, name, pos):
        """Return what stood before positions pos (B, T): (B, ...), 0 at the start."""
        first = pos[:, 0]
        last = self.read(name, (first - 1).clamp(min=0)[:, None])[:, 0]
        return torch.where((first > 0).view(-1, *[1] * (last.dim() - 1)), last, 0)

    def copy_from(self, other):
        """Copy what another cache of the same layer holds, whose room is no larger."""
        for name, t in other.tensors.items():
            self.tensors[name][:, :t.size(1)] = t
        for mine, its in zip(self.inside, other.inside):
            if mine is not None:
                mine.copy_from(its)

    def select(self, rows):
        """Return the cache of these rows (a LongTensor; a row may be taken several times)."""
        return Cache({n: t[rows] for n, t in self.tensors.items()},
                     [None if c is None else c.select(rows) for c in self.inside])


@dataclass(eq=False)
class State:
    """What decoding carries from one forward to the next, made by GPT.init_state.

    Every shape stays as it is, so that a decoding step compiles once; that no row outgrows
    `capacity` is for the caller to see to.
    """
    pos: torch.Tensor  # (B,) how many positions each row has filled
    caches: list  # one Cache a layer
    capacity: int
    memory: dict  # {block: Memory} that blocks M read
    own: dict  # Caches of what stands before all layers: "n_grams", "docs", "thoughts"
    begun: bool = False  # the slots are in

    def advance(self, T):
        """Return positions (B, T) of the next T inputs, none past the last place."""
        pos = (self.pos[:, None] + torch.arange(T, device=self.pos.device))
        self.pos, self.begun = self.pos + T, True
        return pos.clamp(max=self.capacity - 1)

    def rollback(self, n):
        """Forget the last n positions: a number, or one per row (B,)."""
        self.pos = self.pos - n

    def copy_from(self, other):
        """Copy what another state of the same rows holds, whose room is no larger; return self."""
        self.pos, self.begun = other.pos, other.begun
        for mine, its in zip([*self.caches, *self.own.values()],
                             [*other.caches, *other.own.values()]):
            mine.copy_from(its)
        return self

    def select(self, rows):
        """Return the state of these rows (a LongTensor; a row may be taken several times)."""
        return replace(self, pos=self.pos[rows], caches=[c.select(rows) for c in self.caches],
                       memory={i: m.select(rows) for i, m in self.memory.items()},
                       own={name: c.select(rows) for name, c in self.own.items()})


@dataclass(frozen=True)
class Sequence:
    """What every layer of a stack may know of its inputs x (B, L, C)."""
    front: int  # positions of the whole stack that come first and are no tokens: slots, or a start
    n_prefix: int  # how many of these inputs are such: front at the start, later 0
    begins: bool  # nothing stands before these inputs
    pos: torch.Tensor | None  # (B, L) places in the caches; None: there are none
    mask: torch.Tensor | None  # (B, 1, L, capacity) True where a query may look; None: causal
    rope: tuple | None  # cos and sin, (L, D/2) or (B, 1, L, D/2)
    rope_table: tuple | None  # cos and sin of all positions
    doc_start: torch.Tensor  # (B, L) True where a document begins
    is_token: torch.Tensor  # (B, L) False for padding, which follows all else
    doc_ended: torch.Tensor  # (B,) True: another document begins after these
    tokens: torch.Tensor | None = None  # (B, T) ids or (B, T, V) distributions
    word_end: torch.Tensor | None = None  # (B, T) True where a word or a learned chunk ends
    scored: torch.Tensor | None = None  # (B, L) scored targets there; None: there is no loss
    kv_input: torch.Tensor | None = None  # (B, L, C) what keys and values are made of; None: x
    layer_mask: torch.Tensor | None = None  # (n_layer,) 0 for a block that is left out; None: none
    blocks: BlockMask | None = None  # what mask says, for FlexAttention; None: there is only mask
    memory: dict | None = None  # {block: Memory} that blocks M read
    recompute: bool = False  # keep only the input of each block, and compute it again going back

    @classmethod
    def of(cls, x, rope_table, front, pos=None, capacity=0, begins=True, docs=None, **more):
        """Return the Sequence of inputs x: its mask and rotary angles follow from positions.

        docs (B, places): how many documents have begun at each place that is looked at, where only
        one's own is seen; None: all are. Unless `more` says otherwise, all inputs are tokens of one
        document.
        """
        mask, index = None, slice(x.size(1))
        nowhere = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        more = dict(doc_start=nowhere, is_token=~nowhere, doc_ended=nowhere[:, 0]) | more
        if pos is not None:
            mask = (torch.arange(capacity, device=x.device) <= pos[..., None])[:, None]
            index = pos[:, None]
        if docs is not None:
            own = docs if pos is None else docs.gather(1, pos)
            seen = (own[..., None] == docs[:, None])[:, None]
            mask = seen.tril() if mask is None else mask & seen
        rope = angles(rope_table, index, x.dtype)
        return cls(front, front * begins, begins, pos, mask, rope, rope_table, **more)


@dataclass
class Aux:
    """What layers leave behind. They only add to it, and only GPT reads it."""
    ff_outputs: dict | None = None  # block: (B, L, C); None: they are not kept
    losses: list = field(default_factory=list)  # (name, weight, sum over scored tokens)
    concepts: list = field(default_factory=list)  # LevelOutputs, in the order in which levels run
    memory_writes: dict = field(default_factory=dict)  # block: MemoryWrites


class Layer(nn.Module):
    """A mixer or a feed-forward layer: forward(x, seq, aux, cache=None), x (B, L, C) -> the same.

    `carries` names what decoding keeps of each position, with its size, as Cache.empty takes it.
    """
    carries = {}  # nothing
    ends_with_document = True  # it carries state, which the start of a document must reset

    def init_cache(self, B, L, like):
        """Return an empty Cache for B rows of L positions, like a tensor of the model's type."""
        return Cache.empty(like, B, L, **self.carries) if self.carries else None

    def update_cache(self, x, seq, aux, cache):
        """Do to the cache what forward does, for positions whose output nobody needs."""
        self(x, seq, aux, cache)

    def flops(self, L):
        """Return operations of forward and backward over L positions: 6 a weight of a matrix."""
        return 6 * L * n_weights(self)


def n_weights(module):
    """Return how many numbers the matrices of a module have, without tables that are looked up."""
    inside = () if module is None else module.modules()
    return sum(p.numel() for m in inside if not isinstance(m, Embedding)
               for p in m.parameters(recurse=False) if p.dim() > 1)


# --------------------------------------------------------------------------------------------------
# mixers


class Attention(Layer):
    """Causal self-attention with grouped key heads, rotary positions and QK-norm.

    (Ainslie et al. 2023, arXiv:2305.13245; Su et al. 2021, arXiv:2104.09864; Henry et al. 2020,
    arXiv:2010.04245, who learn a factor of normed scores, as qk_scale does.) The last n_value_embed
    token-level blocks A add a token embedding of their own to the values. (B, L, C) -> (B, L, C).
    """
    ends_with_document = False  # it sees the whole window (unless doc_mask is on)

    def __init__(self, cfg, i):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = cfg.heads(i)
        self.qk_norm, self.dropout = cfg.qk_norm, cfg.dropout
        self.q_dim, self.kv_dim = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.c_attn = Linear(cfg.n_embd, (self.q_dim, self.kv_dim, self.kv_dim), cfg.bias)
        self.c_proj = Linear(self.q_dim, cfg.n_embd, cfg.bias, init=RESIDUAL)
        self.qk_scale = parameter(self.n_head, 1, 1, init=ONES) if cfg.qk_scale else None
        self.carries = dict.fromkeys("kv", (self.n_kv_head, self.head_dim))
        plain = [item[1] for item in cfg.tree if item[0] == "A"]
        embeds = i in plain[len(plain) - cfg.n_value_embed:]
        self.value_embed = Embedding(cfg.vocab_size, self.kv_dim, init=HEAD) if embeds else None
        gated = cfg.slot_gate and (cfg.letters[i], i) in cfg.tree
        self.slot_gate = parameter(self.n_head, 1, 1, init=ZEROS) if gated else None

    @staticmethod
    def check(cfg):
        for name in ("n_head", "n_kv_head", "n_mlp"):
            value = getattr(cfg, name)
            if isinstance(value, tuple) and len(value) != cfg.n_layer:
                raise ValueError(f"{name} gives {len(value)} values for {cfg.n_layer} layers")
        attending = cfg.attending()
        for i, c in enumerate(cfg.letters):
            h, kv, d = cfg.heads(i)
            if d * h != cfg.n_embd and not cfg.head_dim and (i in attending or c in "DS"):
                raise ValueError(f"n_embd ({cfg.n_embd}) is not a multiple of n_head ({h}); set "
                                 f"head_dim to choose one")
            if i not in attending:
                continue
            if h % kv:
                raise ValueError(f"n_head ({h}) must be a positive multiple of n_kv_head ({kv}) in "
                                 f"layer {i}")
            first = cfg.heads(attending[0])[2]
            if cfg.pos == "rope" and (d % 2 or d != first):
                raise ValueError(f"head_dim must be even and the same in all layers for pos = "
                                 f"rope, not {d}; with a different n_head per layer set head_dim")
        if cfg.n_value_embed > sum(item[0] == "A" for item in cfg.tree):
            raise ValueError(f"n_value_embed ({cfg.n_value_embed}) must lie between 0 and the "
                             f"number of token-level blocks A")
        if cfg.doc_mask and (cfg.slot_gate or cfg.n_think or cfg.plan != "add"):
            raise ValueError("doc_mask hides other documents, and slot_gate, n_think and plan = "
                             "cross or latent let tokens look across; leave one of them out")

    def heads(self, qk, v, seq):
        """Split queries and keys, and values, (B, L, heads * D) into (B, heads, L, D)."""
        if self.value_embed is not None and seq.tokens is not None:
            ve = self.value_embed(seq.tokens).to(v.dtype)
            v = v + F.pad(ve, (0, 0, v.size(1) - ve.size(1), 0))  # slots have no token
        return (split_heads(qk, self.head_dim, self.qk_norm, seq.rope),
                split_heads(v, self.head_dim))

    def update_cache(self, x, seq, aux, cache):
        kv = self.c_attn(x if seq.kv_input is None else seq.kv_input, self.q_dim)
        cache.attended(seq.pos, *self.heads(*kv.chunk(2, dim=-1), seq))

    def forward(self, x, seq, aux, cache=None):
        if seq.kv_input is None:
            qkv = self.c_attn(x)
        else:
            kv = self.c_attn(seq.kv_input, self.q_dim)
            qkv = torch.cat((self.c_attn(x, 0, self.q_dim), kv), dim=-1)
        qk, v = self.heads(*qkv.split((self.q_dim + self.kv_dim, self.kv_dim), dim=-1), seq)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=1)
        if self.qk_scale is not None:
            q = q * self.qk_scale.to(q.dtype)
        if cache is not None:
            k, v = cache.attended(seq.pos, k, v)
        dropout = self.dropout if self.training else 0.0
        # FlexAttention has no dropout, and heads of 16 channels or more, 128 to be sure
        fits = not dropout and 16 <= self.head_dim <= 128 and skips_blocks(x)
        if self.slot_gate is None or seq.tokens is None:  # (a level may share this block)
            y = attend(q, k, v, seq.blocks if fits and seq.blocks else seq.mask, dropout)
        else:
            y = self.attend_apart(q, k, v, seq, dropout)
        return self.c_proj(merge_heads(y))

    def attend_apart(self, q, k, v, seq, dropout):
        """Return attention to the window, plus `slot_gate` times that to the slots.

        Each has a softmax of its own, so a gate of 0 leaves the outputs of a model without slots,
        and has a gradient (as in Flamingo, Alayrac et al. 2022, arXiv:2204.14198). Slots see slots.
        """
        S, n, mask = seq.front, seq.n_prefix, seq.mask
        slots, tokens = (k[:, :, :S], v[:, :, :S]), q[:, :, n:]
        every = torch.ones(1, 1, 1, S, dtype=torch.bool, device=q.device)
        gate = 10 * self.slot_gate.to(q.dtype)  # (AdamW opens it in tens of steps, not hundreds)
        y = gate * attend(tokens, *slots, every, dropout)
        mask = None if mask is None else mask[:, :, n:, S:]
        y = y + attend(tokens, k[:, :, S:], v[:, :, S:], mask, dropout)
        return torch.cat((attend(q[:, :, :n], *slots, None, dropout), y), 2) if n else y

    def flops(self, L):  # 12 H D for every pair of positions (PaLM, arXiv:2204.02311, appendix B)
        return super().flops(L) + 12 * self.q_dim * L * L


def scan(a, b, size=16):
    """Return h_t = a_t h_{t-1} + b_t over dim 1, with h_{-1} = 0: a, b (B, T, D) -> h.

    Pieces of `size` steps run side by side, each in one loop that the compiler fuses; then the
    ends of the pieces, in the same way; then what each end carries on (Blelloch 1990). The work is
    linear in T.
    """
    B, T, D = b.shape
    n = -(-T // size)
    if n > 1:
        a, b = (F.pad(t, (0, 0, 0, n * size - T)).view(B, n, size, D).unbind(2) for t in (a, b))
    else:
        a, b = a.unbind(1), b.unbind(1)
    h, reach = [b[0]], [a[0]]  # reach: how much of what came before the piece is left
    for t in range(1, len(a)):
        h.append(a[t] * h[-1] + b[t])
        reach.append(a[t] * reach[-1])
    if n == 1:
        return torch.stack(h, 1)
    ends = scan(reach[-1], h[-1], size)
    before = F.pad(ends[:, :-1], (0, 0, 1, 0))[:, :, None]
    return (torch.stack(h, 2) + torch.stack(reach, 2) * before).view(B, -1, D)[:, :T]


class Recurrence(Layer):
    """Gated linear recurrence h_t = a_t h_{t-1} + (1 - |a_t|) v_t, read through a SiLU gate.

    (After Martin and Cundy 2018, arXiv:1709.04057, and De et al. 2024, arXiv:2402.19427.) a_t and
    v_t are linear in x_t. A gate in (0, 1) cannot count; one that can be negative solves parity,
    one that turns solves cycles (Grazzi et al. 2024, arXiv:2411.12537). A turning gate is a
    positive one in a frame that turns along; channel pair i settles near n-ths of a full turn,
    n = 2 + i mod 8, so that it counts modulo n and hardly drifts. Documents begin with h = 0.
    (B, L, C) -> (B, L, C).
    """

    def __init__(self, cfg, i):
        super().__init__()
        C, self.turns = cfg.n_embd, cfg.gate == "complex"
        self.squash = torch.tanh if cfg.gate == "real" else torch.sigmoid
        self.c_in = Linear(C, (C, C, C), cfg.bias)  # values, gates, what is read
        # gate bias: from a few steps to hundreds; half of what turns keeps for good
        rates, most = (C // 2, 6.0) if self.turns else (C, 3.0)
        self.rate = parameter(rates, init=lambda p, cfg, g: p.uniform_(0.0, most, generator=g))
        self.c_proj = Linear(C, C, cfg.bias, init=RESIDUAL)
        constants(self, stops=2.0 + torch.arange(C // 2) % 8 if self.turns else None)
        self.carries = dict(h=(C, torch.float32))

    def settle(self, turn):
        """Draw half turns (.., C/2) near the closest n-th of a full turn: a smooth staircase.

        A free angle drifts, and need not wrap at all within the lengths that training sees.
        """
        n = math.pi * self.stops.float()
        return turn - torch.sin(n * turn) / n

    def forward(self, x, seq, aux, cache=None):
        v, g, out = self.c_in(x).chunk(3, dim=-1)
        v, g = v.float(), g.float()
        if self.turns:
            g, turn = g.chunk(2, dim=-1)
            frame = (math.pi * self.settle(turn)).cumsum(1)  # (B, L, C/2) radians since the first
            cos, sin = frame.cos(), frame.sin()
            v = rotate(v, cos, -sin)
        # a gate reaches 1 itself: then it keeps for ever, and takes in nothing
        a = (1.05 * self.squash(g + self.rate)).clamp(-1, 1)
        if self.turns:
            a = a.repeat(1, 1, 2)
        b = (1 - a.abs()) * v
        a = a.masked_fill(seq.doc_start[..., None], 0.0)
        if cache is not None:
            b[:, 0] += a[:, 0] * cache.before("h", seq.pos)
        h = scan(a, b)
        if self.turns:
            h = rotate(h, cos, sin)
        if cache is not None:
            cache.write(seq.pos, h=h)
        h = rms_norm(h, eps=1e-16)  # tiny eps: what decayed evenly keeps its direction
        return self.c_proj(h.to(x.dtype) * F.silu(out))


def delta_scan(q, k, v, beta, log_keep, doc, size=64):
    """Return what queries read of a state that follows the delta rule: (B, H, T, D).

    q, k, v (B, H, T, D); beta, log_keep (B, H, T); doc (B, T) numbers of documents. The steps of a
    piece are solved together (the WY form of Yang et al. 2024, arXiv:2406.06484). With G_t what is
    kept from the start of the piece to step t, and S_0 the state that it finds,

        S_t = G_t S_0 + sum over i <= t of (G_t / G_i) k_i w_i
        w_t + b_t sum over i < t of (G_t / G_i) (k_t k_i) w_i = b_t (v_t - G_t k_t S_0)

    which is one triangular system, linear in S_0: w = own - back S_0.
    """
    (B, H, T, D), n = q.shape, -(-q.size(2) // size)
    pad = lambda t: F.pad(t, (0, 0) * (t.dim() - 3) + (0, n * size - T))
    q, k, v, beta, g = (pad(t).unflatten(2, (n, size)) for t in (q, k, v, beta, log_keep))
    g = g.cumsum(-1)  # (B, H, n, size) log G_t
    doc = F.pad(doc, (0, n * size - T), value=-1).view(B, 1, n, size)
    before = F.pad(doc[..., :-1, -1:], (0, 0, 1, 0), value=-1)  # the document that a piece finds
    sees = (doc[..., None] == doc[..., None, :]).tril()
    since = (g[..., None] - g[..., None, :]).masked_fill(~sees, float("-inf")).exp()  # G_t / G_i
    start = (g.exp() * (doc == before))[..., None]  # G_t, 0 once another document has begun
    system = beta[..., None] * (k @ k.mT * since)
    right = beta[..., None] * torch.cat((v, start * k), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, back = solved.chunk(2, -1)
    from_old, from_new, to_next = q * start, q @ k.mT * since, k * since[..., -1, :, None]
    S, out = q.new_zeros(B, H, D, D), []
    for i in range(n):
        w = own[:, :, i] - back[:, :, i] @ S
        out.append(from_old[:, :, i] @ S + from_new[:, :, i] @ w)
        S = start[:, :, i, -1:] * S + to_next[:, :, i].mT @ w
    return torch.cat(out, 2)[:, :, :T]


class DeltaRule(Layer):
    """A gated delta rule: S_t = a_t S_{t-1} + b_t k_t (v_t - a_t k_t S_{t-1}), read as q_t S_t.

    (Gated DeltaNet, Yang et al. 2024, arXiv:2412.06464, without its convolutions.) What a key held
    is replaced, not added to. b_t in (0, 2): a state may change its sign, and so count (Grazzi et
    al. 2024, arXiv:2411.12537). Documents begin with S = 0. (B, L, C) -> (B, L, C).
    """

    def __init__(self, cfg, i):
        super().__init__()
        (self.n_head, _, self.head_dim), C = cfg.heads(i), cfg.n_embd
        width = self.n_head * self.head_dim
        self.c_in = Linear(C, (width,) * 4, cfg.bias)  # queries, keys, values, what is read
        self.c_gate = Linear(C, (self.n_head, self.n_head), group="table")
        law = lambda p, cfg, generator: p.uniform_(2.0, 6.0, generator=generator)
        self.rate = parameter(self.n_head, init=law)  # gate bias
        self.c_proj = Linear(width, C, cfg.bias, init=RESIDUAL)
        self.carries = dict(S=(self.n_head, self.head_dim, self.head_dim, torch.float32))

    def forward(self, x, seq, aux, cache=None):
        *qkv, out = self.c_in(x).chunk(4, dim=-1)
        q, k, v = (split_heads(t, self.head_dim).float() for t in qkv)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta, keep = self.c_gate(x).float().transpose(1, 2).chunk(2, dim=1)  # (B, H, L)
        beta, log_keep = 2 * beta.sigmoid(), F.logsigmoid(keep + self.rate[:, None])
        if cache is None:
            y = delta_scan(q, k, v, beta, log_keep, seq.doc_start.cumsum(1))
        else:
            y = self.step_by_step(q, k, v, beta, log_keep.exp(), seq.doc_start, seq.pos, cache)
        y = merge_heads(rms_norm(y))
        return self.c_proj(y.to(x.dtype) * F.silu(out))

    def step_by_step(self, q, k, v, beta, keep, starts, pos, cache):
        """Do as delta_scan does from the state in a cache on; write there what each step leaves."""
        S, states = cache.before("S", pos), []  # (B, H, D, D)
        keep = keep.masked_fill(starts[:, None], 0.0)
        for t in range(q.size(2)):
            S = keep[:, :, t, None, None] * S
            error = v[:, :, t] - (k[:, :, t, :, None] * S).sum(-2)
            S = S + (beta[:, :, t, None] * k[:, :, t])[..., None] * error[..., None, :]
            states.append(S)
        states = torch.stack(states, 1)
        cache.write(pos, S=states)
        return torch.einsum("bhtd,bthde->bhte", q, states)

    def flops(self, L):  # a state is decayed, read twice and written once a step
        return super().flops(L) + 24 * L * self.n_head * self.head_dim ** 2


class GRU(Layer):
    """A GRU (Cho et al. 2014, arXiv:1406.1078), torch's own: not linear, so one step after another.

    Documents begin with h = 0. (B, L, C) -> (B, L, C).
    """

    def __init__(self, cfg, i):
        super().__init__()
        C = cfg.n_embd
        with torch.random.fork_rng(devices=[]):  # its own initial values are not used
            self.rnn = nn.GRU(C, C, batch_first=True)
        for p in self.rnn.parameters():
            stated(p, *((ZEROS, "gain") if p.dim() == 1 else (MATRIX, "matrix"))).parts = (C, C, C)
        self.c_proj = Linear(C, C, cfg.bias, init=RESIDUAL)
        self.carries = dict(h=(C, torch.float32))

    def forward(self, x, seq, aux, cache=None):
        v = x.to(self.rnn.weight_ih_l0.dtype)  # torch's own takes no other
        before = None if cache is None else cache.before("h", seq.pos).to(v.dtype)
        # torch's own GRU breaks the graph, and so do documents of any length
        h = torch.compiler.disable(self.documents)(v, seq.doc_start, before)
        if cache is not None:
            cache.write(seq.pos, h=h)
        return self.c_proj(h.to(x.dtype))

    def documents(self, v, starts, before):
        """Run each document of each row as a sequence of its own.

        v (B, T, C), starts (B, T), what was held before (B, C) or None -> h (B, T, C).
        """
        begins = starts.clone()
        begins[:, 0] = True
        row = begins.nonzero()[:, 0]
        h0 = None
        if before is not None:
            h0 = torch.where(starts[begins][:, None], 0.0, before[row])[None]
        if len(row) == len(v):  # one each
            return self.rnn(v, h0)[0]
        ends = begins.flatten().nonzero()[1:, 0].tolist()
        documents = v.flatten(0, 1).tensor_split(ends)
        packed = nn.utils.rnn.pack_sequence(documents, enforce_sorted=False)
        return torch.cat(nn.utils.rnn.unpack_sequence(self.rnn(packed, h0)[0])).view_as(v)


class Pushdown(Layer):
    """A stack a head: pop a part of it, push a part of a vector, read the topmost unit.

    (The neural stack of Grefenstette et al. 2015, arXiv:1506.02516, after Joulin and Mikolov 2015,
    arXiv:1503.01007.) How much is popped and pushed, 0 to 1 each, depends on x_t alone, so heights
    are sums: step j pops down to low_j, and pushes v_j from there up to top_j. At t what is left of
    v_j ends at the least low_i, j < i <= t, and of that y_t reads what lies above top_t - 1. So all
    steps run at once, like attention, and no depth is set. Documents begin with an empty stack and
    a whole push. (B, L, C) -> (B, L, C).
    """

    def __init__(self, cfg, i):
        super().__init__()
        (self.n_head, _, self.head_dim), C = cfg.heads(i), cfg.n_embd
        width = self.n_head * self.head_dim
        self.c_in = Linear(C, (width, width), cfg.bias)  # what is pushed, what is read
        wide = normal(lambda p, cfg: 4 * p.size(1) ** -0.5)  # gates near 0 and 1 from the start
        self.c_gate = Linear(C, (self.n_head,) * 2, bias=True, init=wide, group="table")
        self.c_proj = Linear(width, C, cfg.bias, init=RESIDUAL)
        height = self.n_head, torch.float32
        self.carries = dict(v=(self.n_head, self.head_dim), low=height, top=height)

    def forward(self, x, seq, aux, cache=None):
        v, out = self.c_in(x).chunk(2, dim=-1)
        v = v.unflatten(-1, (self.n_head, -1))
        # gates reach 0 and 1 themselves: else hundreds of steps would blur
        gate = (1.1 * self.c_gate(x).float().sigmoid() - 0.05).clamp(0, 1)
        push, pop = gate.chunk(2, dim=-1)  # (B, L, H)
        top = (push - pop).cumsum(1)
        if cache is not None:
            top = top + cache.before("top", seq.pos)[:, None]
        low = (top - push).masked_fill(seq.doc_start[..., None], -math.inf)
        if cache is None:
            y = [self.read(top[:, a:b], v[:, :b], low[:, :b], top[:, :b], mask)
                 for a, b, mask in causal_pieces(x.size(1), x.device)]
            y = torch.cat(y, dim=1)
        else:
            cache.write(seq.pos, v=v, low=low, top=top)
            y = self.read(top, cache["v"], cache["low"], cache["top"], seq.mask)
        return self.c_proj(y * F.silu(out))

    def read(self, at, v, low, top, mask):
        """Return the topmost unit of stacks as high as at (B, T, H): (B, T, H * D).

        v (B, L, H, D), and low and top (B, L, H) as it was pushed; mask (B, 1, T, L) True for what
        was pushed up to then.
        """
        low, top = low.mT[:, :, None], top.mT[:, :, None]  # (B, H, 1, L)
        later = F.pad(low.masked_fill(~mask, math.inf)[..., 1:], (0, 1), value=math.inf)
        left = later.flip(-1).cummin(-1).values.flip(-1).minimum(top)  # (B, H, T, L)
        start = low.maximum(top - 1).maximum(at.mT[..., None] - 1)
        share = (left - start).clamp(min=0) * mask
        return merge_heads(share.to(v.dtype) @ v.transpose(1, 2))

    def flops(self, L):
        return super().flops(L) + 6 * self.n_head * self.head_dim * L * L


# --------------------------------------------------------------------------------------------------
# feed-forward layers


def swiglu(x):
    up, gate = x.chunk(2, dim=-1)
    return up * F.silu(gate)


ACTIVATIONS = {  # relu2: So et al. 2021, arXiv:2109.08668; swiglu: Shazeer 2020, arXiv:2002.05202
    "relu2": lambda x: F.relu(x).square(), "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "swiglu": swiglu}


class MLP(Layer):
    """Two matrices with an activation between them. (B, L, C) -> (B, L, C).

    With share_mlp one, which may be wide, serves all blocks (Pires et al. 2023, arXiv:2309.01826).
    """
    ends_with_document = False

    def __init__(self, cfg, i):
        super().__init__()
        width, gated = cfg.per_layer("n_mlp", i), cfg.mlp == "swiglu"
        width = width or (-(-8 * cfg.n_embd // 3 // 32) * 32 if gated else 4 * cfg.n_embd)
        self.act = ACTIVATIONS[cfg.mlp]
        self.c_fc = Linear(cfg.n_embd, width * (1 + gated), cfg.bias)
        self.c_proj = Linear(width, cfg.n_embd, cfg.bias, init=RESIDUAL)

    def forward(self, x, seq, aux, cache=None):
        return self.c_proj(self.act(self.c_fc(x)))


class FeaturalMemory(Layer):
    """In place of an MLP: learned slots, of which each position reads the nearest few.

    Each of mem_head queries finds the mem_top nearest of n_mem learned keys and takes the sum of
    their values, weighted by nearness. Keys are pairs of half keys, sqrt(n_mem) of each, so that
    two short lists search all of them, exactly (product keys, Lample et al. 2019,
    arXiv:1907.05242). Queries and half keys have one length, so their product is their distance.
    Slots are chosen without a gradient, and weighted with one. (B, L, C) -> (B, L, C).
    """
    ends_with_document = False

    def __init__(self, cfg, i):
        super().__init__()
        H, D = cfg.mem_head, cfg.mem_dim
        self.n_head, self.top, self.side = H, cfg.mem_top, math.isqrt(cfg.n_mem)
        unit = normal(1.0, gpt2=1.0)
        self.c_q = Linear(cfg.n_embd, H * D, cfg.bias)
        self.keys = parameter(H, 2, self.side, D // 2, init=unit, group="table")
        self.values = Embedding(cfg.n_mem, cfg.n_embd, init=unit, group="values")
        self.c_proj = Linear(cfg.n_embd, cfg.n_embd, cfg.bias, init=RESIDUAL)
        # the i-th best half with the j-th best loses to i * j - 1 pairs of halves no worse
        ranks = range(1, min(self.top, self.side) + 1)
        pairs = [(i - 1, j - 1) for i in ranks for j in ranks if i * j <= self.top]
        constants(self, pairs=torch.tensor(pairs).t().contiguous())

    @staticmethod
    def check(cfg):
        square = math.isqrt(cfg.n_mem) ** 2 == cfg.n_mem
        fits = square and 2 <= cfg.mem_top <= cfg.n_mem and cfg.mem_dim % 2 == 0 and cfg.mem_dim > 3
        if "F" in cfg.layers and not fits:
            raise ValueError(f"a memory F needs n_mem ({cfg.n_mem}) to be a square number of at "
                             f"least mem_top ({cfg.mem_top}) slots, mem_top to be at least 2 (of "
                             f"one slot it cannot learn which), and mem_dim ({cfg.mem_dim}) to be "
                             f"even and at least 4")

    def find(self, x):
        """Return the slots that x (B, L, C) finds (B, L, H, top), and how near they are."""
        q = rms_norm(self.c_q(x).unflatten(-1, (self.n_head, 2, -1)))
        score = torch.einsum("bthpd,hpnd->bthpn", q, rms_norm(self.keys.to(x.dtype))).float()
        half = topk_indices(score, min(self.top, self.side))  # the best pairs are among these
        half_score, (a, b) = score.detach().gather(-1, half), self.pairs
        pair = topk_indices(half_score[..., 0, a] + half_score[..., 1, b], self.top)
        a, b = half[..., 0, :].gather(-1, a[pair]), half[..., 1, :].gather(-1, b[pair])
        near = score[..., 0, :].gather(-1, a) + score[..., 1, :].gather(-1, b)
        return a * self.side + b, near * q.size(-1) ** -0.5

    def forward(self, x, seq, aux, cache=None):
        B, L, C = x.shape
        slots, score = self.find(x)
        table = self.values.weight
        weight = score.softmax(-1).view(B * L, -1).to(table.dtype)
        y = F.embedding_bag(slots.view(B * L, -1), table, per_sample_weights=weight, mode="sum")
        return self.c_proj(y.view(B, L, C).to(x.dtype))

    def flops(self, L):  # of its values those that are found
        return super().flops(L) + 6 * L * self.n_head * self.top * self.c_proj.in_features


@dataclass
class Memory:
    """The entries of one block M: keys and values (B, H, N, D), and their usage (B, H, N).

    usage counts how often and how recently an entry was read, and is 0 where there is none (LRFU,
    Lee et al. 2001). Blocks read it; `write` changes it, and a trainer empties rows whose text
    ends. One row may stand for all (B = 1).
    """
    keys: torch.Tensor
    values: torch.Tensor
    usage: torch.Tensor
    store: "Memory | None" = None  # entries besides, which every document finds and nothing changes
    index: list | None = None  # one a head, with search(q, k), of keys that nothing changes
    ROOM = 2 ** 26  # scores at once
    DECAY = 0.999  # of usage, a memory chunk

    def select(self, rows):
        """Return those rows (a slice or a LongTensor); what stands for all still does."""
        if len(self.usage) == 1:
            return self
        return Memory(self.keys[rows], self.values[rows], self.usage[rows], self.store)

    def copy(self, B):
        """Return a memory of B rows that may be written to, each as the one row of this."""
        parts = (t.expand(B, *t.shape[1:]).clone() for t in (self.keys, self.values, self.usage))
        return Memory(*parts, self.store)

    def nearest(self, q, n):
        """Return the n entries nearest to q (B, H, T, D): cosines and places, (B, H, T, n) each.

        Cosines are -inf where there are no more. With an index almost all of them are right.
        """
        B, H, T, D = q.shape
        if self.index is not None:
            found = [i.search(x.reshape(-1, D), n) for i, x in zip(self.index, q.unbind(1))]
            return tuple(torch.stack(t, 1).view(B, T, H, n).transpose(1, 2) for t in zip(*found))
        room = max(1, self.ROOM // (B * H * self.keys.size(2)))
        if T > room:  # as many queries at a time as have room for their scores
            found = [self.nearest(x, n) for x in q.split(room, 2)]
            return tuple(torch.cat(t, 2) for t in zip(*found))
        keys = self.keys.to(q.dtype)
        if len(keys) == 1:  # one row stands for all: one product, and no copies of it
            scores = q.transpose(0, 1).reshape(1, H, B * T, D) @ keys.mT
            scores = scores.view(H, B, T, -1).transpose(0, 1)
        else:
            scores = q @ keys.mT
        return topk(scores.float().masked_fill(~(self.usage > 0)[:, :, None], float("-inf")), n)

    @torch.no_grad()
    def write(self, new):
        """Take over MemoryWrites: count uses, replace what is old, and keep the most used entries.

        Return (slots (B, H, n) here, places (B, H, n) in the window, which of them were written).
        """
        _, H, N = self.usage.shape
        exists = new.exists[:, None].expand(-1, H, -1)  # (B, H, L)
        old = self.usage * (self.DECAY ** new.chunks)[:, None, None]
        old = old.clamp(min=1e-30) * (self.usage > 0) * new.keep_old[:, None, None]  # 0 is none
        usage = torch.cat((old, exists.float()), -1)  # (B, H, N + L)
        alive, found = usage > 0, new.found.transpose(1, 2).flatten(2)
        used = new.weight.transpose(1, 2).flatten(2) * (found < usage.size(-1))
        usage = usage.scatter_add(2, found.clamp(max=usage.size(-1) - 1), used) * alive
        keys = new.keys.transpose(1, 2)
        if new.novelty <= 1:
            usage = self.replace(usage, keys, new.novelty)
        self.usage.copy_(usage[..., :N])
        n = min(N, exists.size(-1))
        least, slot = self.usage.topk(n, largest=False)
        most, place = usage[..., N:].topk(n)
        better = most > least
        for mine, theirs in ((self.keys, keys), (self.values, new.values.transpose(1, 2))):
            i, j = (t[..., None].expand(*t.shape, mine.size(-1)) for t in (slot, place))
            kept = torch.where(better[..., None], theirs.gather(2, j).to(mine.dtype),
                               mine.gather(2, i))
            mine.scatter_(2, i, kept)
        self.usage.scatter_(2, slot, torch.where(better, most, least))
        return slot, place - new.front, better

    def replace(self, usage, keys, novelty):
        """Hand the usage (B, H, N + L) of entries on to the latest of keys (B, H, L, D) like them.

        An entry as near as `novelty` to a later one has none left, and is gone.
        """
        N, L = self.usage.size(-1), keys.size(2)
        near = torch.cat([keys @ k.mT >= novelty for k in (self.keys.to(keys.dtype), keys)], -1)
        order = torch.arange(-N, L, device=keys.device)
        later = torch.arange(L, device=keys.device)[:, None] > order
        near &= (usage > 0)[:, :, None] & (usage[..., N:] > 0)[..., None] & later
        # (of two bytes, since there are B H L (N + L) of them)
        kind = torch.int16 if L < 2 ** 15 else torch.int32
        number = torch.arange(1, L + 1, device=keys.device, dtype=kind)
        latest = (near * number[:, None]).amax(-2).long()
        goes_to = torch.where(latest > 0, N + latest - 1, torch.arange(N + L, device=keys.device))
        for _ in range(L.bit_length()):  # what replaces may be replaced itself
            goes_to = goes_to.gather(2, goes_to)
        return torch.zeros_like(usage).scatter_add(2, goes_to, usage)


@dataclass(frozen=True)
class MemoryWrites:
    """What a window of L places writes into a Memory of N entries, by AssociativeMemory.writes."""
    keys: torch.Tensor  # (B, L, H, D)
    values: torch.Tensor  # (B, L, H, D)
    exists: torch.Tensor  # (B, L) where there is an entry to write
    found: torch.Tensor  # (B, L, H, k) what was read: entries of the memory, N + places, or beyond
    weight: torch.Tensor  # (B, L, H, k) with which weight
    keep_old: torch.Tensor  # (B,) False where the document of the memory has ended
    chunks: torch.Tensor  # (B,) memory chunks that went by
    novelty: float
    front: int  # places at the front that are no tokens


ENTRY = "keys", "values", "exists"  # what one has in a window


class AssociativeMemory(Layer):
    """In place of an MLP: each position attends to the mem_top nearest entries, or to nothing.

    Positions go in memory chunks of mem_chunk, counted from the window's start. A chunk finds the
    entries of earlier ones, to which gradients flow, and those of a Memory from before the window
    (Memorizing Transformers, Wu et al. 2022, arXiv:2203.08913), so nothing sees its future. An
    entry pairs a key with what came next (mem_shift). When the window is written, an entry as near
    as mem_novelty to a later one gives its place and its usage to that, and the most used ones
    stay (Memory.write). A document sees its own entries only. (B, L, C) -> (B, L, C).
    """

    def __init__(self, cfg, i):
        super().__init__()
        H, D, C = cfg.mem_head, cfg.mem_dim, cfg.n_embd
        self.cfg, self.i = cfg, i
        self.c_q, self.c_k, self.c_v = (Linear(C, H * D, cfg.bias) for _ in range(3))
        self.c_k.weight.seeded_as = "c_k", "c_q"  # what asks alike is alike from the start
        self.scale = parameter(H, init=ONES)  # logit = 10 scale log(entries + 2) cosine
        self.null_logit = parameter(H, init=ONES)  # twice the cosine that "nothing" counts as
        self.c_proj = Linear(H * D, C, cfg.bias, init=RESIDUAL)
        read = H, cfg.mem_top
        self.carries = dict(keys=(H, D), values=(H, D), docs=(torch.long,),
                            found=(*read, torch.long), weight=(*read, torch.float32),
                            **dict.fromkeys(("exists", "is_token", "fixed"), (torch.bool,)))

    @staticmethod
    def check(cfg):
        if "M" not in cfg.layers:
            return
        first = cfg.mem_chunk * (cfg.mem_shift // cfg.mem_chunk + 1)  # place that finds something
        for items, depth in stacks(cfg.tree):
            places = cfg.most_chunks(depth, cfg.block_size)
            if any(item[0] == "M" for item in items) and places <= first:
                what = f"{places} chunks of a level" if depth else f"block_size = {places} tokens"
                raise ValueError(f"a block M has {what}, and with mem_chunk = {cfg.mem_chunk} and "
                                 f"mem_shift = {cfg.mem_shift} finds nothing before "
                                 f"place {first + 1}; give a smaller mem_chunk or mem_shift"
                                 + ", or a smaller chunk" * bool(depth))
        if cfg.block_size % cfg.mem_chunk:
            raise ValueError(f"block_size ({cfg.block_size}) is not a multiple of mem_chunk "
                             f"({cfg.mem_chunk})")
        if cfg.mem_shift > cfg.block_size // 2:
            raise ValueError(f"mem_shift ({cfg.mem_shift}) pairs a key with a value so many places "
                             f"on; give at most half of block_size ({cfg.block_size})")

    def init_cache(self, B, L, like):
        return super().init_cache(B, L + self.cfg.mem_shift + 1, like)  # the last is nobody's

    def forward(self, x, seq, aux, cache=None):
        (B, L, _), cfg, memory = x.shape, self.cfg, (seq.memory or {}).get(self.i)
        pos = torch.arange(L, device=x.device).expand(B, L) if seq.pos is None else seq.pos
        q, k, v = (f(x).view(B, L, cfg.mem_head, -1) for f in (self.c_q, self.c_k, self.c_v))
        if self.training and cfg.mem_noise:
            noise = torch.randn(q.shape, device=q.device)
            q = F.normalize(q.float(), dim=-1) + cfg.mem_noise * noise
        q, k = (F.normalize(t.float(), dim=-1).to(x.dtype) for t in (q, k))
        window = self.init_cache(B, L, x) if cache is None else cache
        self.enter(k, v, pos, seq, window)
        y, found, weight = self.search(q.transpose(1, 2), pos, window, memory, seq.front)
        window.write(pos, found=found.transpose(1, 2), weight=weight.transpose(1, 2))
        if cache is None and memory is not None:
            n = window["is_token"].sum(1)
            aux.memory_writes[self.i] = self.writes(window, seq.front, n, seq.doc_ended)
        return self.c_proj(merge_heads(y))

    def enter(self, k, v, pos, seq, window):
        """Write keys and values (B, T, H, D) of positions pos (B, T) into a window, a Cache.

        The value of a position stands with the key of the one mem_shift before it, where both are
        tokens of one document. What is `fixed` stays as it is.
        """
        shift, is_token = self.cfg.mem_shift, (pos >= seq.front) & seq.is_token
        docs = seq.doc_start.cumsum(1) + window.before("docs", pos)[:, None]
        window.write(pos, docs=docs, is_token=is_token)
        key_pos = (pos - shift).clamp(min=0)
        exists = is_token & (pos >= shift) & window["is_token"].gather(1, key_pos)
        exists = exists & (window["docs"].gather(1, key_pos) == docs)
        last = window["fixed"].size(1) - 1
        open_place = lambda place: torch.where(window["fixed"].gather(1, place), last, place)
        window.write(open_place(pos), values=v, exists=exists)
        window.write(open_place(pos + shift), keys=k)

    def search(self, q, pos, window, memory, front):
        """Return what queries q (B, H, T, D) at positions pos (B, T) read: (B, H, T, D).

        And which entries they found, by numbers (N of the memory, then the window's places, then
        those of its store), and with which weights: (B, H, T, k) each.
        """
        cfg = self.cfg
        keys, values = (window[n].transpose(1, 2) for n in ("keys", "values"))
        L, docs = keys.size(2), window.read("docs", pos)
        chunk = lambda place: (place - front).div(cfg.mem_chunk, rounding_mode="floor")
        visible = window["exists"][:, None] & (window["docs"][:, None] == docs[..., None])
        visible &= chunk(torch.arange(L, device=q.device)) < chunk(pos)[..., None]  # (B, T, L)
        is_token = pos >= front
        N = 0 if memory is None else memory.usage.size(-1)
        # (entries, who may read them, the number of the first, what counts of a cosine)
        sources = [] if memory is None else [(memory.store, is_token, N + L, cfg.mem_store),
                                             (memory, is_token & (docs == 0), 0, 1)]
        sources = [s for s in sources if s[0] is not None and s[0].usage.size(-1)]
        # the nearest, chosen without a gradient
        cosine, n_entries = (q @ keys.mT).float(), visible.sum(-1)[:, None]
        with torch.no_grad():
            scores = [cosine.masked_fill(~visible[:, None], float("-inf"))]
            numbers = [(N + torch.arange(L, device=q.device)).expand_as(cosine)]
            old = [[q.unsqueeze(3)[:, :, :, :0]] * 2]  # none yet: (B, H, T, n, D) each
            for entries, allowed, first, counts in sources:
                near, place = entries.nearest(q, min(cfg.mem_top, entries.usage.size(-1)))
                near = counts * near.masked_fill(~allowed[:, None, :, None], float("-inf"))
                scores.append(near)
                numbers.append(place + first)
                old.append([f * t[:, :, None].take_along_dim(place[..., None], 3).to(q.dtype)
                            for f, t in ((counts, entries.keys), (1, entries.values))])
                n_entries = n_entries + (entries.usage > 0).sum(-1)[..., None] * allowed[:, None]
            scores, numbers = torch.cat(scores, -1), torch.cat(numbers, -1)
            top, found = topk(scores, min(cfg.mem_top, scores.size(-1)))
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, found, top.isfinite())
        # attention to them and to nothing
        old_keys, old_values = (torch.cat(t, 3) for t in zip(*old))  # (B, H, T, n, D)
        cosine = torch.cat((cosine, (q[..., None, :] * old_keys).sum(-1).float()), -1)
        # the more there are, the nearer the best false one (arXiv:2501.19399)
        sharp = (10 * self.scale[:, None] * (n_entries + 2).log())[..., None]  # (B, H, T, 1)
        logits = (sharp * cosine).masked_fill(~chosen, float("-inf"))
        null = sharp * self.null_logit[:, None, None] / 2
        p = torch.cat((logits, null), -1).softmax(-1)[..., :-1]
        p_new, p_old = p[..., :L].to(values.dtype), p[..., L:, None].to(values.dtype)
        y = p_new @ values + (p_old * old_values).sum(-2)
        short = 0, cfg.mem_top - found.size(-1)
        return y, *(F.pad(t.gather(-1, found), short) for t in (numbers, p.detach()))

    @torch.no_grad()
    def writes(self, window, front, n, doc_ended):
        """Return the MemoryWrites of the first n (B,) tokens after `front` of a window, a Cache.

        doc_ended (B,): a document begins after them, so what they leave is of no use.
        """
        place, docs = torch.arange(window["docs"].size(1), device=n.device), window["docs"]
        doc = docs.gather(1, (front + n - 1).clamp(min=0)[:, None]) * (n > 0)[:, None]
        inside = (place >= front) & (place < (front + n)[:, None]) & (docs == doc)  # (B, L)
        inside, keep_old = inside & ~doc_ended[:, None], (doc[:, 0] == 0) & ~doc_ended
        return MemoryWrites(window["keys"].detach(), window["values"].detach(),
                            window["exists"] & inside, window["found"],
                            window["weight"] * inside[..., None, None], keep_old,
                            n / self.cfg.mem_chunk, self.cfg.mem_novelty, front)


class Recall:
    """What a GPT does with associative memories while decoding."""

    def leave_window(self, state, n):
        """Write into the memories of a state what leaves its window with the first n (B,) tokens.

        Return {block: what Memory.write gave}, and for token-level blocks {block: [(B, L, ...)]},
        the entries of the tokens after those, which were made with more before them than will
        stand in a window that begins there. Levels make theirs anew.
        """
        S, carried = self.cfg.n_slot, {}
        nobody = torch.zeros_like(n, dtype=torch.bool)
        writes = self.memory_writes(state.caches, S, n, nobody)
        written = {i: state.memory[i].write(new) for i, new in writes}
        for i, window in self.windows(state.caches):
            last = window["exists"].size(1) - 1
            place = (S + n[:, None] + torch.arange(last + 1 - S, device=n.device)).clamp(max=last)
            carried[i] = [window.read(name, place) for name in ENTRY]
        return written, carried

    def recalled(self, state):
        """Yield of each token-level block M what the last position of each row found in a store.

        That is (block, places (B, H, k) there, negative for something else, weights (B, H, k)).
        """
        for i, window in self.windows(state.caches):
            N = state.memory[i].usage.size(-1) + window["exists"].size(1)
            found, weight = (window.before(n, state.pos[:, None]) for n in ("found", "weight"))
            yield i, found - N, weight

    def windows(self, caches):
        """Yield (block, the Cache of its window) of token-level blocks M."""
        for layer, cache in zip(self.order, caches):
            if layer.i is not None and cache.inside[2] is not None:
                yield layer.i, cache.inside[2]

    def init_memory(self, B, size=None):
        """Return {block: an empty Memory}, B rows of `size` (mem_size) entries, of blocks M."""
        cfg, device = self.cfg, self.wte.weight.device
        shape = B, cfg.mem_head, cfg.mem_size if size is None else size, cfg.mem_dim
        zeros = torch.zeros(shape, device=device, dtype=self.dtype)
        return {m.i: Memory(zeros.clone(), zeros.clone(), torch.zeros(shape[:-1], device=device))
                for m in self.modules() if isinstance(m, AssociativeMemory)}


# --------------------------------------------------------------------------------------------------
# blocks and stacks


def mlp(cfg, i):
    """Return the MLP of block i, None where its width is -1."""
    return None if cfg.per_layer("n_mlp", i) < 0 else MLP(cfg, i)


BLOCKS = {  # character: (mixer, feed-forward layer)
    "A": (Attention, mlp), "R": (Recurrence, mlp), "D": (DeltaRule, mlp), "G": (GRU, mlp),
    "S": (Pushdown, mlp),
    "F": (Attention, FeaturalMemory), "M": (Attention, AssociativeMemory)}


def ends_with_document(c):
    """Return whether what stands at character c of layers carries something that documents end."""
    return c == "(" or any(getattr(part, "ends_with_document", False) for part in BLOCKS.get(c, ()))


class Block(nn.Module):
    """Pre-norm residual block: a mixer, attention to a plan if there is one, a feed-forward layer.

    n_states: how many states the level before this block has, with plan = cross; 0: none.
    """

    def __init__(self, cfg, letter, i, n_states):
        super().__init__()
        mixer, feed_forward = BLOCKS[letter]
        norm = NORMS[cfg.norm]
        self.letter, self.i = letter, i
        self.ln_1, self.attn = norm(cfg), mixer(cfg, i)
        self.ln_x, self.cross = (norm(cfg), Cross(cfg, i, n_states)) if n_states else (None, None)
        self.mlp = feed_forward(cfg, i)
        self.ln_2 = None if self.mlp is None else norm(cfg)
        self.drop = Drop(cfg)

    def init_cache(self, B, L, like):
        layers = self.attn, self.cross, self.mlp
        return Cache(inside=[None if m is None else m.init_cache(B, L, like) for m in layers])

    def forward(self, x, seq, aux, cache=None, plan=None):
        """Return (x, plan): the plan goes on to the next layer."""
        if seq.recompute and cache is None:
            return checkpoint(self.output, x, seq, aux, None, plan, use_reentrant=False), plan
        return self.output(x, seq, aux, cache, plan), plan

    def output(self, x, seq, aux, cache, plan):
        own, seen, entries = (None, None, None) if cache is None else cache.inside
        start, seq = x, self.normed_kv(seq)
        if plan is not None and plan.mask is not None:
            seq = replace(seq, mask=plan.mask)
        x = x + self.drop(self.attn(self.ln_1(x), seq, aux, own))
        if plan is not None and self.cross is not None:
            x = x + self.drop(self.cross(self.ln_x(x), seq, seen, plan))
        if self.mlp is not None:
            y = self.mlp(self.ln_2(x), seq, aux, entries)
            if aux.ff_outputs is not None:
                aux.ff_outputs[self.i] = y
            x = x + self.drop(y)
        if seq.layer_mask is not None:
            x = start + seq.layer_mask[self.i].to(x.dtype) * (x - start)
        return x

    def normed_kv(self, seq):
        """Return seq with what keys and values are made of, if that is not x, normed as x is."""
        return seq if seq.kv_input is None else replace(seq, kv_input=self.ln_1(seq.kv_input))

    def update_cache(self, x, seq, aux, cache, plan):
        """Update the cache by x (B, L, C) without the output. Return the plan."""
        own, seen, entries = cache.inside
        if entries is not None:  # what it enters depends on what it attends to
            return self(x, seq, aux, cache, plan)[1]
        self.attn.update_cache(self.ln_1(x), self.normed_kv(seq), aux, own)
        if plan is not None and self.cross is not None and plan.concepts is not None:
            self.cross(self.ln_x(x), seq, seen, plan)
        return plan

    def cached_writes(self, cache, front, n, ended):
        """Yield (i, MemoryWrites) where the feed-forward layer is a memory with a cache."""
        if cache.inside[2] is not None:
            yield self.i, self.mlp.writes(cache.inside[2], front, n, ended)

    def costs(self, L, times=1, depth=0):
        flops = self.attn.flops(L) + 6 * L * n_weights(self.cross)
        flops += 0 if self.mlp is None else self.mlp.flops(L)
        yield self.letter, self, depth, times * flops


class Stack(nn.Module):
    """Blocks and levels that run at one pace, in the order of the layer string.

    GPT is one, and so is every level. Neither counts in the other's names, so that parameters keep
    theirs when a model grows a level.
    """
    exits = {}  # levels have none

    def add_layers(self, cfg, tree, depth=0, shared=None):
        """Make the layers of a tree. shared: the token-level blocks, for levels that run those."""
        self.blocks, self.levels, self.order = nn.ModuleList(), nn.ModuleList(), []
        n_states = 0
        for item in tree if shared is None else ():  # blocks first: levels may share them
            if is_level(item):
                n_states = cfg.most_chunks(depth + 1) + 2 if cfg.plan != "add" else 0
            else:
                self.blocks.append(Block(cfg, *item, n_states))
        blocks = iter(self.blocks if shared is None else shared)
        lent = list(self.blocks) if cfg.share_levels and depth == 0 else shared
        for item in tree:
            if is_level(item):
                self.levels.append(Level(cfg, item, depth + 1, lent))
            self.order.append(self.levels[-1] if is_level(item) else next(blocks))

    def init_caches(self, B, L, like):
        return [layer.init_cache(B, L, like) for layer in self.order]

    def run(self, x, seq, aux, caches=None, plan=None, first=0, last=None, exited=None):
        """Run x (B, L, C) through all layers, or those from the first-th on up to the last.

        exited (B, L): positions that stay as they are. Return (x, the plan of the last level).
        """
        caches = [None] * len(self.order) if caches is None else caches
        for layer, cache in zip(self.order[first:last], caches[first:last]):
            y, plan = layer(x, seq, aux, cache, plan)
            x = y if exited is None else torch.where(exited[..., None], x, y)
        return x, plan

    def memory_writes(self, caches, front, n, ended):
        """Yield (block, MemoryWrites) of the first n (B,) positions after `front`, by the caches.

        ended (B,): a document begins after the last of them.
        """
        for layer, cache in zip(self.order, caches):
            yield from layer.cached_writes(cache, front, n, ended)

    def costs(self, L, times=1, depth=0):
        """Yield (name, module, depth, operations as in Layer.flops) of layers run so many times.

        Blocks have their letter for a name. A level is followed by what stands in it, one deeper.
        """
        for i, layer in enumerate(self.order):
            if i in self.exits:
                yield ".", None, depth, 0
            yield from layer.costs(L, times, depth)

    def flops(self, L):
        return sum(flops for *_, flops in self.costs(L))


# --------------------------------------------------------------------------------------------------
# levels: where chunks end, compose, run the inner stack, regress, hand down


@dataclass
class Plan:
    """What a level hands to the blocks after it with plan = cross or latent."""
    concepts: torch.Tensor | None  # (B, M, horizon, C) predicted by M states; None: no new ones
    state: torch.Tensor  # (B, M) the numbers of these states
    count: torch.Tensor  # (B, L) chunks closed up to each position
    seen: torch.Tensor  # (B, L, states * horizon) True where it reads a concept; latent: or nothing
    mask: torch.Tensor | None  # (B, 1, L, keys) latent: which positions it sees; None: all before


class Cross(nn.Module):
    """Attention to the concepts that a level has predicted.

    A query turns by the number of the chunk it stands in, a key by that of the chunk it speaks of,
    so what counts is how far ahead a concept lies. (B, L, C) -> (B, L, C).
    """

    def __init__(self, cfg, i, n_states):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = cfg.heads(i)
        self.horizon, self.qk_norm, self.n_states = cfg.horizon, cfg.qk_norm, n_states
        q_dim, kv_dim = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.c_q = Linear(cfg.n_embd, q_dim, cfg.bias)
        self.c_kv = Linear(cfg.n_embd, (kv_dim, kv_dim), cfg.bias)
        self.c_proj = Linear(q_dim, cfg.n_embd, cfg.bias, init=ZEROS)  # a new level adds nothing

    def init_cache(self, B, L, like):
        size = self.n_kv_head, self.head_dim
        return Cache.empty(like, B, self.n_states * self.horizon, k=size, v=size)

    def forward(self, x, seq, cache, plan):
        ahead, table = torch.arange(self.horizon, device=x.device), seq.rope_table

        def split(x, chunk):  # turned by the chunk of each place (B, L)
            chunk = None if table is None else chunk.clamp(max=table[0].size(0) - 1)[:, None]
            return split_heads(x, self.head_dim, self.qk_norm, angles(table, chunk, x.dtype))

        q = split(self.c_q(x), plan.count)
        if plan.concepts is None:  # those before
            k, v = cache["k"].transpose(1, 2), cache["v"].transpose(1, 2)
        else:
            state = plan.state[..., None]
            k, v = self.c_kv(plan.concepts.flatten(1, 2).to(x.dtype)).chunk(2, dim=-1)
            k = split(k, (state + ahead).flatten(1))
            v = split_heads(v, self.head_dim)
            if cache is not None:
                place = state.clamp(max=self.n_states - 1) * self.horizon + ahead
                k, v = cache.attended(place.flatten(1), k, v)
        if plan.mask is not None:  # or nothing
            k, v = (F.pad(t, (0, 0, 1, 0)) for t in (k, v))
        y = attend(q, k, v, plan.seen[:, None], 0.0)
        return self.c_proj(merge_heads(y))


DISTANCES = {  # of points (.., C): 1 - cosine, of directions; squared distance / C
    "cos": lambda x, y: 1 - F.cosine_similarity(x, y, dim=-1),
    "mse": lambda x, y: (x - y).square().mean(-1)}


class PointHead(nn.Module):
    """Regresses the next `horizon` concepts (.., H, C) from a level's states u (.., C): one point.

    That is the mean of what may come.
    """

    def __init__(self, cfg):
        super().__init__()
        self.horizon, self.distance = cfg.horizon, DISTANCES[cfg.concept]
        self.out = Linear(cfg.n_embd, cfg.horizon * cfg.n_embd, cfg.bias, group="table")

    def forward(self, u):
        return self.out(u).float().unflatten(-1, (self.horizon, -1))

    def sample(self, u):
        """Return a draw of the concepts ahead (.., H, C): there is but one."""
        return self(u)

    def loss(self, u, target):
        """States (B, M, C), targets (B, M, H, C) of norm sqrt(C) -> (B, M, H)."""
        return self.distance(self(u), target)


class EnergyHead(nn.Module):
    """Makes concepts of noise, scored by the energy score 2 E|X - y| - E|X - X'|.

    (Gneiting and Raftery 2007; Shao et al. 2025, arXiv:2510.27688.) The true distribution minimises
    it, so two futures stay two.
    """

    def __init__(self, cfg, n_noise=None):
        super().__init__()
        C, H = cfg.n_embd, cfg.horizon
        self.horizon, self.n_noise = H, n_noise or C // 2
        self.c_fc = Linear(C, 2 * C, cfg.bias, group="table")
        self.c_in = Linear(self.n_noise, 2 * C, group="table")
        self.c_mid = Linear(2 * C, 2 * C, cfg.bias, group="table")
        self.out = Linear(2 * C, H * C, cfg.bias, group="table")

    def inside(self, u, z):
        """Return what the network makes of states u (.., C) and noise z: (.., H, C)."""
        h = self.c_fc(u) + self.c_in(z)
        h = h + self.c_mid(rms_norm(F.silu(h)))  # with one layer, two futures run into each other
        return self.out(F.silu(h)).float().unflatten(-1, (self.horizon, -1))

    def forward(self, u):
        """Return what is made of noise that is 0."""
        return self.inside(u, u.new_zeros(*u.shape[:-1], self.n_noise))

    def sample(self, u):
        noise = torch.randn(*u.shape[:-1], self.n_noise, device=u.device, dtype=u.dtype)
        return self.inside(u, noise)

    def loss(self, u, target):
        x, y = self.sample(u), self.sample(u)
        distance = lambda a, b: ((a - b).square().mean(-1) + 1e-8).sqrt()
        return distance(x, target) + distance(y, target) - distance(x, y)


class FlowHead(EnergyHead):
    """Denoises: from a mixture (1 - t) e + t y of noise and target it regresses y.

    That says where the flow from noise to targets goes (Lipman et al. 2022,
    arXiv:2210.02747).
    """
    STEPS, TIMES = 8, 8  # of a sample; features of its time

    def __init__(self, cfg):
        super().__init__(cfg, cfg.horizon * cfg.n_embd + self.TIMES)

    def denoise(self, u, y, t):
        """Return the mean of the targets that y (.., H, C) at time t (.., 1, 1) may come from."""
        t = torch.cos(math.pi * t.flatten(-2) * torch.arange(self.TIMES, device=t.device))
        return self.inside(u, torch.cat((y.flatten(-2), t), dim=-1).to(u.dtype))

    def forward(self, u):
        start = u.new_zeros(*u.shape[:-1], self.horizon, u.size(-1))
        return self.denoise(u, start, start[..., :1, :1])

    def sample(self, u):
        y = torch.randn(*u.shape[:-1], self.horizon, u.size(-1), device=u.device)
        for i in range(self.STEPS):  # what is left of the way, in equal steps
            t = torch.full_like(y[..., :1, :1], i / self.STEPS)
            y = y + (self.denoise(u, y, t) - y) / (self.STEPS - i)
        return y

    def loss(self, u, target):
        noise = torch.randn_like(target)
        t = torch.rand(*target.shape[:-2], 1, 1, device=target.device)
        return (self.denoise(u, (1 - t) * noise + t * target, t) - target).square().mean(-1)


CONCEPT_HEADS = {"cos": PointHead, "mse": PointHead, "energy": EnergyHead, "flow": FlowHead}


@dataclass
class LevelOutput:
    """What a level made of its inputs. State i predicts concept i."""
    level: "Level"
    u: torch.Tensor  # (B, M + 1, R, C) states; R is 1, or the horizon of a rollout
    concepts: torch.Tensor  # (B, M, C)
    exists: torch.Tensor  # (B, M) which concepts there are
    end: torch.Tensor  # (B, M) where in the stack below their chunks end


@dataclass(frozen=True)
class Chunks:
    """Where chunks end among T positions; M chunks, from the first that is open on."""
    place: torch.Tensor  # (B, T) place in its chunk
    next_place: torch.Tensor  # (B, T) that of the next position
    ends: torch.Tensor  # (B, M, T) True where position t ends chunk m
    count: torch.Tensor  # (B, T) chunks closed so far
    docs: torch.Tensor  # (B, T) documents begun so far
    closed_docs: torch.Tensor  # (B, T) documents begun when the last chunk closed
    state: torch.Tensor  # (B, M), or (B, M + 1) from the start on: numbers of the states to come
    exists: torch.Tensor  # (B, M) which chunks end here
    end: torch.Tensor  # (B, M) where
    doc: torch.Tensor  # (B, M) documents begun at the end of each
    doc_before: torch.Tensor  # (B, M) documents begun at the end of the one before



class Router(nn.Module):
    """Learns where chunks end: where a position is unlike the one before it.

    It ends one with probability p_t = (1 - cos(W_q x_t, W_k x_{t-1})) / 2, and does so above 1/2.
    (H-Net, Hwang et al. 2025, arXiv:2507.07955, where such a position begins a chunk.) What the
    level adds is multiplied by how sure the router was of each position, straight-through, and a
    loss aims at chunks of `length` positions on average. At first p_t says how far x_t is from
    x_{t-1}.
    """
    WEIGHT = 0.1  # of that loss: with 0.03, as there, chunks were still too short after 250 steps

    def __init__(self, cfg, length):
        super().__init__()
        C, self.length = cfg.n_embd, length
        same = lambda p, cfg, generator: p.copy_(torch.eye(p.size(1)).repeat(2, 1))
        self.c_qk = Linear(C, (C, C), init=same, group="table")

    def forward(self, x, seq, aux, cache=None):
        """Return seq with the ends of chunks, and how sure each position (B, L) of x is of it."""
        q, key = self.c_qk(x).chunk(2, dim=-1)
        before = torch.zeros_like(key[:, 0])
        if cache is not None:
            before = cache.before("key", seq.pos)
            cache.write(seq.pos, key=key)
        key = torch.cat((before[:, None], key[:, :-1]), 1).masked_fill(seq.doc_start[..., None], 0)
        p = (1 - F.cosine_similarity(q.float(), key.float(), dim=-1)) / 2  # a 0 ends nothing
        ends, S = p > 0.5, seq.n_prefix
        if seq.scored is not None:
            # least where a share of 1 / length ends, by the mean of p too; of each row
            f, g, N = ends[:, S:].float().mean(1), p[:, S:].mean(1), self.length
            loss = ((N - 1) * f * g + (1 - f) * (1 - g)) * N / (N - 1)
            aux.losses.append(("ratio", self.WEIGHT, (loss * seq.scored.sum(1)).sum()))
        return replace(seq, word_end=ends[:, S:]), torch.where(ends, p, 1 - p).to(x.dtype)


class Level(Stack):
    """A slower stack: next-concept prediction, and the hierarchical RNN, in one.

    What is inside runs once a chunk of the positions outside, in five steps:

        find_chunks   tell where chunks end
        compose       make the concept of chunk i, c_i = norm(sum_j turn(x_j, place j))
        run_inner     run the layers inside over (bos, c_0, .., c_{n-1}): states u_0 .. u_n
        regress       predict from u_i the concept c_i, which is not complete yet
        hand_down     let position t read u_i, i = the number of chunks closed up to and with t

    So nothing sees its future. A document without a closed chunk reads u_0 (with plan = add). With
    level_embd concepts go in, and states come out, through a matrix each.
    x (B, L, C) -> (B, L, C).

    Variants have a place each: learned chunks are the Router's, concepts predicted one after
    another are in `roll_out`, what is predicted in their place (concept_of) is in `target`, drawn
    plans are in `some_drawn`, and latent plans in `hand_down`.

    Example, chunk = 2: tokens a b c d e, chunks (a b) (c d); a reads u_0, b and c read u_1 (made of
    bos and c_0), d and e read u_2; u_1 regresses c_1 = the bound sum of (c d).
    """

    letter, i = "( )", None  # a block has a number
    CARRIED = "next_place", "count", "docs", "closed_docs"  # of Chunks, by a cache

    def __init__(self, cfg, tree, depth, shared):
        super().__init__()
        C, chunks = cfg.n_embd, cfg.chunk.split(",")
        width = cfg.per_layer("level_embd", depth - 1) or C
        chunk = chunks[min(depth, len(chunks)) - 1]
        kind, size, _ = parse_chunk(chunk)
        self.words, self.horizon = bool(kind), cfg.horizon
        self.router = Router(cfg, size) if kind == "route" else None
        self.name, self.weight = f"concept_{depth}", cfg.per_layer("concept_weight", depth - 1)
        self.draw_rate, self.noise, self.draws = cfg.plan_draw, cfg.plan_noise, False
        self.alone, self.capacity = cfg.plan == "latent", cfg.most_chunks(depth)
        # the share of training rows that are rolled out, and in how many passes
        self.rollout, self.n_pass = cfg.rollout or 1.0, cfg.horizon if cfg.rollout else 1
        self.room = self.capacity + 1 + self.n_pass  # of caches: bos, and a place that nobody reads
        self.n_embd, self.bos = C, parameter(width, init=EMBEDDING)
        # a level of another width has a door: for concepts, and for its states
        self.c_in, self.c_out = (Linear(*way, cfg.bias) if width != C else nn.Identity()
                                 for way in ((C, width), (width, C)))
        self.ln = NORMS[cfg.norm](cfg)
        self.tell = Linear(C, C, cfg.bias, init=ZEROS) if cfg.plan == "add" else None
        needed = self.weight > 0 or self.tell is None
        step = replace(cfg, horizon=1, rollout=0.0) if cfg.rollout else cfg
        self.head = CONCEPT_HEADS[cfg.concept](step) if needed else None
        constants(self, **binding(64 if self.words else size, C, cfg.chunk_binding))
        inside = cfg if width == C else cfg.widened(width)
        self.add_layers(inside, tree, depth, shared)
        self.bag, self.of_state = cfg.concept_of == "bag", cfg.concept_of == "state"
        self.doc_mask = cfg.doc_mask
        self.average = None
        if cfg.concept_of == "ema" and self.weight > 0:
            self.average = Stack()
            self.average.add_layers(inside, tree, depth)
            for p in self.average.requires_grad_(False).parameters():
                p.seeded_as = "average.", ""  # a copy at first

    @staticmethod
    def check(cfg):
        chunks = str(cfg.chunk).replace(" ", "").split(",")
        cfg.chunk, block_size, C = ",".join(chunks), cfg.block_size, cfg.n_embd
        depth = max(d for _, d in stacks(cfg.tree))
        kind, *others = (parse_chunk(c)[0] for c in chunks)
        if any(others):
            raise ValueError(f"chunk is a number for every level but the first, not in {cfg.chunk}")
        for name in ("concept_weight", "level_embd"):
            value = getattr(cfg, name)
            if isinstance(value, tuple) and len(value) != depth:
                raise ValueError(f"{name} gives {len(value)} values for {depth} depths of levels")
        if not depth:
            return
        for width in (cfg.per_layer("level_embd", d) for d in range(depth)):
            heads = [cfg.heads(i)[:2] for i in range(cfg.n_layer)]
            grown = [(h * width // C, max(1, kv * width // C)) for h, kv in heads]
            if width % 2 or any(h * width % C for h, _ in heads) or any(h % kv for h, kv in grown):
                raise ValueError(f"level_embd ({width}) must be even and hold whole heads, of the "
                                 f"size that n_embd ({C}) has with n_head ({cfg.n_head}), and as "
                                 f"many for each of n_kv_head ({cfg.n_kv_head})")
            for name in ("share_mlp", "share_levels"):
                if getattr(cfg, name) and width not in (0, C):
                    raise ValueError(f"{name} gives levels what has {C} channels (n_embd); leave "
                                     f"out level_embd ({width})")
        if len(chunks) not in (1, depth):
            raise ValueError(f"chunk gives {len(chunks)} values for {depth} depths of levels")
        if kind and len(chunks) < depth:
            raise ValueError(f"chunk = {cfg.chunk} says nothing of the levels above words; give "
                             f"one value a depth, as {cfg.chunk},4")
        if kind == "entropy" and not (cfg.exit_weight and "." in cfg.layers.split("(")[0]):
            raise ValueError("chunk = entropy reads the first exit, which has to stand before all "
                             "levels and to be trained: layers = A.(A)A, and an exit_weight")
        if kind == "route" and cfg.plan != "add":
            raise ValueError("chunk = route learns by what a level adds; use plan = add")
        if not cfg.most_chunks(depth, block_size):
            raise ValueError(f"chunk = {cfg.chunk} closes no chunk of the slowest level in a "
                             f"window of {block_size}; give a smaller one")
        if cfg.share_levels and cfg.plan != "add" and depth > 1:
            raise ValueError(f"share_levels with plan = {cfg.plan} takes one depth of levels: "
                             f"nobody would read the slower plans")
        if cfg.concept_of != "chunk" and (cfg.rollout or cfg.plan_noise):
            raise ValueError(f"rollout and plan_noise hand down concepts as they are composed, and "
                             f"concept_of = {cfg.concept_of} predicts something else")
        if cfg.n_gram and cfg.plan == "latent":
            raise ValueError("n_gram shows each token those before it, and with plan = latent none "
                             "sees what came before its chunk; leave one of them out")
        if cfg.concept_of == "ema" and (depth > 1 or cfg.share_levels or cfg.share_mlp
                                        or {*"FM"} & {*cfg.layers}):
            raise ValueError("concept_of = ema takes one depth of levels, and neither memories (F, "
                             "M), share_levels nor share_mlp; concept_of = state takes them all")
        if cfg.share_levels and "M" in cfg.layers:
            raise ValueError("share_levels gives one block to several levels, and a memory M "
                             "belongs to one; leave one of them out")
        if cfg.rollout and (depth > 1 or any("M" in str(t) for t in cfg.tree if is_level(t))):
            raise ValueError("rollout runs a level ahead from each of its states, which a memory M "
                             "or a level inside it cannot; leave one of them out")
        if cfg.rollout and cfg.horizon > cfg.most_chunks(depth):
            raise ValueError(f"rollout looks {cfg.horizon} chunks ahead (horizon), and a window "
                             f"has {cfg.most_chunks(depth)}; give fewer")
        outer = [item[0] for item in cfg.tree if not is_level(item)]

        for items, _ in stacks(cfg.tree):
            for i, item in enumerate(items):
                if not is_level(item):
                    continue
                if cfg.plan != "add" and all(map(is_level, items[i:])):
                    raise ValueError(f"plan = {cfg.plan} needs a block behind each level, to read "
                                     f"its plan")
                if cfg.plan == "latent" and (
                        i or any(k[0] not in ("A", "F") for k in items[1:])):
                    raise ValueError(f"plan = latent takes a level first, then blocks A or F: all "
                                     f"else in layers = {cfg.layers} carries what came before a "
                                     f"chunk")
                letters = [inner[0] for inner in item if not is_level(inner)]
                if cfg.share_levels and outer[:len(letters)] != letters:
                    raise ValueError(f"share_levels runs the first token-level blocks "
                                     f"({''.join(outer)}) in every level, but one of them asks for "
                                     f"{''.join(letters)}")

    def init_cache(self, B, L, like):
        sizes, C = dict.fromkeys(self.CARRIED, (torch.long,)), self.n_embd
        if self.router is not None:
            sizes["key"] = (C,)
        cache = Cache.empty(like, B, L, open_sum=(C, torch.float32), **sizes)
        sizes = {"docs": (torch.long,)} if self.doc_mask else {}
        states = Cache.empty(like, B, self.room, returned=(C,), **sizes)
        cache.inside = [states, *self.init_caches(B, self.room, like)]
        return cache

    def forward(self, x, seq, aux, cache=None, plan=None):
        """Return (x, Plan): with plan = add x and what this level adds, else what it predicts."""
        if self.router is not None:
            seq, sure = self.router(x, seq, aux, cache)
        chunks = self.find_chunks(x, seq, cache)
        sums, inside = self.compose(x[:, seq.n_prefix:], chunks, seq, cache)
        new = None
        # asking a GPU whether any chunk closes would wait for it
        if (cache is None or seq.begins or x.device.type != "cpu"
                or torch.compiler.is_compiling() or chunks.exists.any()):
            concepts, scored = rms_norm(sums), None
            if seq.scored is not None and cache is None:
                scored = (inside * seq.scored[:, None, seq.n_prefix:]).sum(-1)  # (B, M)
            u, points, average = self.run_inner(concepts, scored, chunks, seq, aux, cache)
            aux.concepts.append(LevelOutput(self, u, concepts, chunks.exists, chunks.end))
            if scored is not None and self.weight > 0:
                target = self.target(x[:, seq.n_prefix:], inside, concepts, u, average)
                self.regress(u, target, scored, chunks, aux)
            if self.training and self.draw_rate:
                points = self.some_drawn(points, u, concepts, chunks)
            new = self.returned(u, points)
        y, plan = self.hand_down(x, new, chunks, seq, cache)
        if self.router is not None:  # straight-through: times 1, and with the gradient of `sure`
            y = y + (sure - sure.detach())[..., None] * (y - x).detach()
        return y, plan

    def update_cache(self, x, seq, aux, cache, plan):
        return self(x, seq, aux, cache, plan)[1]

    # -- 1. find chunks

    def find_chunks(self, x, seq, cache):
        """Return the Chunks of x (B, S + T, C); in a cache, note where they stand."""
        S, device, doc_start = seq.n_prefix, x.device, seq.doc_start[:, seq.n_prefix:]
        (B, T), pos = doc_start.shape, None if cache is None else seq.pos[:, S:]
        last = dict.fromkeys(self.CARRIED, torch.zeros(B, dtype=torch.long, device=device))
        if cache is not None:
            last = {name: cache.before(name, pos) for name in last}
        at = torch.arange(T, device=device)
        # places in chunks, and where those end
        starts = doc_start | F.pad(seq.word_end[:, :-1], (1, 0)) if self.words else doc_start
        # of the running chunk, which may have started before
        start = torch.where(starts, at, -last["next_place"][:, None]).cummax(1).values
        place = at - start
        if self.words:
            closes, M = seq.word_end, T
        else:
            size = len(self.cos)
            place = place % size
            closes, M = place == size - 1, T // size if cache is None else -(-T // size)
        closes = closes & seq.is_token[:, S:]
        # how many are closed, none beyond the capacity, and in which document
        count = last["count"][:, None] + closes.cumsum(1)
        closes = closes & (count <= self.capacity)
        count, docs = count.clamp(max=self.capacity), last["docs"][:, None] + doc_start.cumsum(1)
        chunk = count - last["count"][:, None] - closes.long()  # (B, T) from the first open one on
        # the same by chunk
        m = torch.arange(min(M, self.capacity), device=device)[:, None]
        state = last["count"][:, None] + torch.arange(1 - seq.begins, len(m) + 1, device=device)
        closed_docs = torch.where(closes, docs, last["closed_docs"][:, None]).cummax(1).values
        ends = (chunk[:, None] == m) & closes[:, None]
        doc = (ends * docs[:, None]).sum(-1)
        chunks = Chunks(
            place=place, next_place=torch.where(closes, 0, place + 1), ends=ends,
            count=count, docs=docs, closed_docs=closed_docs, state=state,
            exists=ends.any(-1), end=(ends * at).sum(-1), doc=doc,
            doc_before=torch.cat((last["closed_docs"][:, None], doc[:, :-1]), 1))
        if cache is not None:
            cache.write(pos, **{name: getattr(chunks, name) for name in last})
        return chunks

    # -- 2. compose

    def compose(self, x, chunks, seq, cache):
        """Return the bound sums of chunks of x (B, T, C): (B, M, C), and the positions inside.

        inside (B, M, T); in a cache what is open after each position is kept instead.
        """
        at = torch.arange(x.size(1), device=x.device)
        turn = chunks.place.clamp(max=len(self.cos) - 1)  # (letters beyond the table turn alike)
        turned = rotate(x, *(F.embedding(turn, t).to(x.dtype) for t in (self.cos, self.sin)))
        first = at - chunks.place
        if cache is None:
            first = (chunks.ends * first[:, None]).sum(-1)
            inside = (at >= first[..., None]) & (at <= chunks.end[..., None])
            inside = inside & chunks.exists[..., None]
            return inside.to(x.dtype) @ turned, inside
        pos = seq.pos[:, seq.n_prefix:]
        inside = (at >= first[..., None]) & (at <= at[:, None])  # (B, T, T)
        opened = (first < 0)[..., None] * cache.before("open_sum", pos)[:, None]  # (fp32)
        opened = opened + inside.to(opened.dtype) @ turned.to(opened.dtype)
        cache.write(pos, open_sum=opened)
        return (chunks.ends.to(opened.dtype) @ opened).to(x.dtype), inside

    # -- 3. run the layers inside, and predict concepts

    def run_inner(self, concepts, scored, chunks, seq, aux, cache):
        """Run the layers inside over bos, where all begins, and concepts (B, M, C).

        Return states (B, M + 1, R, C); the concepts that they predict (B, M + 1, H, C), None where
        states are handed down; and the states of the averaged layers (B, M + 1, C), or None.
        scored (B, M): how many scored tokens are in each chunk; None: there is no loss.
        """
        n, x, average = int(seq.begins), self.c_in(concepts), None
        if seq.begins:
            x = torch.cat((self.bos.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        if scored is not None:
            scored = F.pad(scored, (n, 0))
        ended = seq.doc_ended | (chunks.docs > chunks.closed_docs)[:, -1:].any(1)
        pos, caches = None, None
        docs = F.pad(chunks.doc, (n, 0)) if self.doc_mask else None
        if cache is not None or self.n_pass > 1:
            pos = chunks.state.clamp(max=self.room - 1)
            caches = self.init_caches(len(x), self.room, x) if cache is None else cache.inside[1:]
        if docs is not None and cache is not None:
            cache.inside[0].write(pos, docs=docs)
            docs = cache.inside[0]["docs"]
        aux = replace(aux, ff_outputs=None)  # those of token-level blocks are recorded
        inner = Sequence.of(x, seq.rope_table, 1, pos, self.room, seq.begins, docs,
                            doc_start=F.pad(chunks.doc != chunks.doc_before, (n, 0)),
                            is_token=F.pad(chunks.exists, (n, 0), value=True), doc_ended=ended,
                            scored=scored, layer_mask=seq.layer_mask, memory=seq.memory,
                            recompute=seq.recompute)
        u = self.states(self, x, inner, aux, caches)
        if self.average is not None and scored is not None:
            with torch.no_grad():
                average = self.states(self.average, x, inner, Aux())
        if self.tell is not None:
            return u[:, :, None], None, average
        return *self.roll_out(u, inner, caches), average

    def states(self, stack, x, seq, aux, caches=None):
        """Return what a stack makes of x (B, L, level_embd), as states (B, L, C)."""
        return self.ln(self.c_out(stack.run(x, seq, aux, caches)[0]))

    def predict(self, u):
        """Return the concepts ahead (.., H, C) of states (.., C): points, or draws of them."""
        return self.head.sample(u) if self.draws else self.head(u)

    def roll_out(self, u, seq, caches):
        """Return states (B, M + 1, R, C) and the concepts (B, M + 1, H, C) that they predict.

        In one pass R is 1. With `rollout`, in R = H: what state i predicts is read as the concept i
        by the layers inside, behind all that they have read before; the state that they make of it
        predicts concept i + 1, and so on. Each state goes on in a branch of its own, with a copy of
        its row's caches. In training only the first rows do so, and beyond their first concept the
        others have none.
        """
        (B, M, _), n = u.shape, self.n_rolled(len(u))
        states, points, row = [u], [self.predict(u)], torch.arange(n, device=u.device)
        row = row.repeat_interleave(M)
        for h in range(1, self.n_pass):
            caches = [cache.select(row) for cache in caches]
            x = self.c_in(rms_norm(points[-1][:n]).to(u.dtype).flatten(0, 1))  # (n M, 1, C)
            pos = (seq.pos[:n] + h).clamp(max=self.room - 1).view(-1, 1)
            branch = Sequence.of(x, seq.rope_table, 1, pos, self.room, False,
                                 layer_mask=seq.layer_mask)
            x = self.states(self, x, branch, Aux(), caches).view(n, M, -1)
            states.append(F.pad(x, (0, 0, 0, 0, 0, B - n)))
            points.append(self.predict(states[-1]))
            row = torch.arange(n * M, device=u.device)
        return torch.stack(states, 2), torch.cat(points, 2)

    def n_rolled(self, B):
        """Return how many of B rows are rolled out."""
        return math.ceil(B * self.rollout) if self.training else B

    def rolled(self, u):
        """Return which concepts ahead of u (B, ..) were predicted: (B, 1, H)."""
        row = torch.arange(len(u), device=u.device)[:, None, None]
        return (row < self.n_rolled(len(u))) | (torch.arange(self.horizon, device=u.device) == 0)

    # -- 4. regress

    def target(self, x, inside, concepts, u, average):
        """Return what is to be predicted of each chunk: (B, M, C).

        That is its concept, or with another concept_of something without a spelling. bag: the sum
        of its vectors without places, a summary of the future (arXiv:2510.14751). state: u_{i+1},
        what the level makes of chunk i once it has read it. ema: the same of `average`, layers
        inside whose weights are a moving average, which a trainer moves (JEPA, Assran et al. 2023,
        arXiv:2301.08243). States that are all alike would predict each other; that tokens read
        them keeps them apart.
        """
        if self.bag:
            return rms_norm(inside.to(x.dtype) @ x)
        if average is not None:
            return average[:, 1:]
        return u[:, 1:, 0] if self.of_state else concepts

    def regress(self, u, target, scored, chunks, aux):
        """Leave the loss of predicting a target (B, M, C) from states u (B, M + 1, R, C).

        A chunk counts as many times as it has scored tokens, so that the weight beside
        cross-entropy does not depend on the chunk, and not at all across documents.
        """
        M, H = target.size(1), self.horizon
        target = self.ahead(target.detach().float()).unflatten(2, (u.size(2), -1))
        loss = self.head.loss(u[:, :M], target).flatten(2)
        counts = self.ahead(scored) * self.known(chunks) * self.rolled(u)
        aux.losses.append((self.name, self.weight, (loss * counts).sum() / H))

    def ahead(self, t):
        """Return for state i the entries i, i + 1, .. of t: (B, M, ..) -> (B, M, H, ..)."""
        pad, M = (0, 0) * (t.dim() - 2), t.size(1)
        return torch.stack([F.pad(t[:, h:], (*pad, 0, min(h, M))) for h in range(self.horizon)], 2)

    def known(self, chunks):
        """Return which concepts ahead exist, in the document of the state: (B, M, H)."""
        same = self.ahead(chunks.doc) == chunks.doc_before[..., None]
        return same & self.ahead(chunks.exists)

    # -- 5. hand down

    def returned(self, u, points):
        """Return what positions outside read: of states u (B, M + 1, R, C), or these points."""
        return points if self.tell is None else self.tell(u[:, :, 0])

    def some_drawn(self, points, u, concepts, chunks):
        """Return points (B, M + 1, H, C), in a share of rows replaced by draws, as in decoding.

        They are the head's draws, without a gradient. With `noise` they are the true concepts, with
        noise added: so tokens learn to write what is drawn (as a latent diffusion model does,
        Rombach et al. 2022, arXiv:2112.10752). In such rows, and in training alone, a token sees
        its future, as far as the chunk to come.
        """
        if self.noise:
            true = F.pad(self.ahead(concepts), (0, 0, 0, 0, 0, 1))
            known = F.pad(self.known(chunks), (0, 0, 0, 1))[..., None]
            drawn = torch.where(known, true + self.noise * torch.randn_like(true), points)
        else:
            with torch.no_grad():
                drawn = self.head.sample(u).flatten(2, 3)
        rows = torch.rand(len(points), 1, 1, 1, device=points.device) < self.draw_rate
        return torch.where(rows, drawn, points)

    def hand_down(self, x, new, chunks, seq, cache):
        """Return (x, Plan) as forward does. new: of `returned`; None: no chunk has closed."""
        S = seq.n_prefix
        # plan = cross or latent; a prefix reads u_0, as the first tokens do
        if self.tell is None:
            count, mask = F.pad(chunks.count, (S, 0)), None
            n = new.size(1) if cache is None else self.capacity + 2
            state = torch.arange(n, device=x.device).repeat_interleave(self.horizon)
            seen = state <= count[..., None]
            if self.alone:  # latent: its own chunk, and of concepts those of it, or nothing
                counts = count if cache is None else cache["count"]
                mask = (count[..., None] == counts[:, None])[:, None]  # (B, 1, L, keys)
                mask = mask.tril() if cache is None else mask & seq.mask
                seen = state == count[..., None]
            seen = seen & self.rolled(x).repeat(1, 1, n)
            seen = F.pad(seen, (int(self.alone), 0), value=True)
            return x, Plan(new, chunks.state, count, seen, mask)
        # plan = add; a document without a chunk yet reads u_0, as the first tokens of a text do
        count = chunks.count.masked_fill(chunks.docs > chunks.closed_docs, 0)
        count = F.pad(count, (S, 0))
        if cache is None:  # a product with 0 and 1: a lookup's gradient is added up row by row
            one_hot = count[..., None] == torch.arange(new.size(1), device=x.device)
            return x + one_hot.to(x.dtype) @ new, None
        states = cache.inside[0]
        if new is not None:
            states.write(chunks.state.clamp(max=self.room - 1), returned=new)
        return x + states.read("returned", count).to(x.dtype), None

    # -- beside the forward

    def unbind(self, concepts):
        """Turn concepts (.., C) that are sums back by each place: (.., chunk, C).

        Their products with embeddings add up to the product of the concept with a chunk of those
        embeddings, so each place is read on its own.
        """
        return rotate(concepts[..., None, :], self.cos, -self.sin)

    def cached_writes(self, cache, front, n, ended):
        """Yield (block, MemoryWrites) of blocks M inside, by the first n (B,) positions below."""
        count, docs, closed_docs = (cache.before(name, (front + n)[:, None]) * (n > 0)
                                    for name in ("count", "docs", "closed_docs"))
        yield from self.memory_writes(cache.inside[1:], 1, count, ended | (docs > closed_docs))

    def costs(self, L, times=1, depth=0):
        inside = min(L, self.capacity) + 1
        yield self.letter, self, depth, 6 * times * L * n_weights(self.router)
        for name in ("c_in", "c_out", "tell", "head"):
            part = getattr(self, name)
            yield name, part, depth + 1, 6 * times * inside * n_weights(part)
        passes = 1 + self.rollout * (self.n_pass - 1)
        yield from super().costs(inside, times * passes, depth + 1)


# --------------------------------------------------------------------------------------------------
# n-grams


class NGrams(nn.Module):
    """A learned vector for each common n-gram, added at its last token.

    N-grams whose hashes collide share a row (after Engram, Cheng et al. 2026, arXiv:2601.07372).
    None reaches beyond the window or the document. ids (B, T) -> (B, T, C).

    Example, n_gram = (2, 3): behind "the" stand the vectors of "he" and of "the".
    """

    def __init__(self, cfg):
        super().__init__()
        self.lengths, self.rows, self.eot = cfg.n_gram, cfg.n_gram_size, cfg.eot
        self.tables = nn.ModuleList(Embedding(self.rows, cfg.n_embd, init=ZEROS)
                                    for _ in self.lengths)

    @staticmethod
    def check(cfg):
        if len({*cfg.n_gram}) < len(cfg.n_gram) or max(cfg.n_gram, default=0) > cfg.block_size:
            raise ValueError(f"n_gram gives lengths, each once and at most block_size "
                             f"({cfg.block_size}), not {cfg.n_gram}")

    def forward(self, ids, pos, cache=None):
        """Return the sum of their vectors; ids (B, T) stand at places pos (B, T) of the window."""
        total, hashed, later = 0, ids, ids
        inside = torch.ones_like(ids, dtype=torch.bool)
        window = Cache.empty(ids, *ids.shape, ids=(ids.dtype,)) if cache is None else cache
        window.write(pos, ids=ids)
        for n in range(2, max(self.lengths) + 1):
            place = pos - n + 1
            earlier = window["ids"].gather(1, place.clamp(min=0)).masked_fill(place < 0, -1)
            inside = inside & (earlier >= 0) & (later != self.eot)  # (an end begins a document)
            hashed, later = (hashed * 1_000_003 + earlier + 1) % (2 ** 31 - 1), earlier
            for length, table in zip(self.lengths, self.tables):
                if length == n:
                    total = total + table(hashed % self.rows) * inside[..., None]
        return total


# --------------------------------------------------------------------------------------------------
# context slots


class Slots(nn.Module):
    """Context slots (softAR): the tokens before the window, most compressed first.

    As [running mean | aggregate | segments | spans]. history (B, history) token ids, oldest first,
    -1 where there is none, and a vector for each, (B, history, C) -> (B, S, C). The vectors are
    embeddings, or with `enrich` what the model put out over the history. With running_mean the ids
    follow V counts, how often each token stood before the window, and the vectors follow their mean
    embedding. The aggregate is a decayed mean of the whole history; a token's weight has fallen to
    e^-4 when it leaves. A segment is the mean of an equal part; a span is the sum of its tokens,
    each turned by its place (`binding`). Then come a norm, one shared projection and a learned
    embedding per slot. A slot with nothing in it has the learned vector `empty` in place of its
    normed sum.

    Example, history = 4, n_segment = 2, n_span = 1, span = 2: ids a b c d give the slots
    [a + b, c + d, turn(c, 0) + turn(d, 1)], each normed and projected.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, C = cfg, cfg.n_embd
        self.proj = Linear(C, C, cfg.bias)
        self.slot_embed = parameter(cfg.n_slot, C, init=normal(0.1), group="table")
        self.empty = parameter(C, init=EMBEDDING)
        age = torch.arange(cfg.history - 1, -1, -1, dtype=torch.float32)
        constants(self, decay=torch.exp(-4 * age / cfg.history),
                  **binding(cfg.span, C, cfg.span_binding))

    @staticmethod
    def check(cfg):
        history, n_span, span = cfg.history, cfg.n_span, cfg.span
        if cfg.enrich and cfg.pos == "learned" and history > cfg.block_size:
            raise ValueError(f"enrich with pos = learned needs history ({history}) <= block_size "
                             f"({cfg.block_size})")
        if bool(history) != bool(cfg.n_slot):
            raise ValueError("history and its slots (running_mean, aggregate, n_segment, n_span) "
                             "go together: set both or neither")
        if bool(n_span) != bool(span) or n_span * span > history:
            raise ValueError(f"n_span * span ({n_span} * {span}) must be positive and fit into "
                             f"history ({history})")
        if cfg.slot_gate and cfg.plan == "latent":
            raise ValueError("slot_gate has every token read the slots, and with plan = latent "
                             "none reads what came before its chunk; leave one of them out")
        if cfg.n_segment and history % cfg.n_segment:
            raise ValueError(f"history ({history}) is not a multiple of n_segment "
                             f"({cfg.n_segment})")
        if cfg.n_slot and all(map(is_level, cfg.tree)):
            raise ValueError(f"context slots are read by blocks outside of levels, and layers = "
                             f"{cfg.layers} has none; add one")

    def forward(self, history, vectors):
        cfg = self.cfg
        counts, ids = history[:, :-cfg.history], history[:, -cfg.history:]
        exists = (ids >= 0).to(vectors.dtype)  # (B, history)
        e = vectors[:, -cfg.history:] * exists[..., None]
        parts = []  # sums (B, n, C), and how much is in each (B, n)
        if cfg.running_mean:
            parts.append((vectors[:, :1], counts.clamp(min=0).sum(1, keepdim=True).to(e.dtype)))
        if cfg.aggregate:
            w = self.decay * exists
            parts.append((w[:, None] @ e, w.sum(1, keepdim=True)))
        if cfg.n_segment:
            parts.append([t.unflatten(1, (cfg.n_segment, -1)).sum(2) for t in (e, exists)])
        if cfg.n_span:
            n, shape = cfg.n_span * cfg.span, (cfg.n_span, cfg.span)
            spans, there = (t[:, -n:].unflatten(1, shape) for t in (e, exists))
            parts.append((rotate(spans, self.cos, self.sin).sum(2), there.sum(2)))
        pooled, count = (torch.cat(part, 1) for part in zip(*parts))
        # the norm makes a sum and a mean the same
        pooled = torch.where(count[..., None] > 0, rms_norm(pooled), self.empty)
        return self.proj(pooled) + self.slot_embed


# --------------------------------------------------------------------------------------------------
# soft tokens: losses in embedding space, soft inputs, thinking


class EmbeddingHead(nn.Module):
    """The output as a point z of the embedding space. (B, T, C) -> (B, T, C).

    It is regressed onto the target's normalised embedding e_y, or read off by distance: |e_v|^2 is
    C for every v, so -|z - e_v|^2 and 2 z.e_v differ by the same for all tokens and have one
    softmax, which is what `nearest` computes.
    """

    def __init__(self, cfg):
        super().__init__()
        small = normal(lambda p, cfg: 0.1 * p.size(1) ** -0.5)  # all tokens as near
        self.proj = Linear(cfg.n_embd, cfg.n_embd, cfg.bias, init=small, group="table")
        self.scale = parameter(1, init=ONES) if cfg.head == "nearest" else None

    @staticmethod
    def check(cfg):
        nearest, soft_ce = cfg.head == "nearest", cfg.semantic == "soft_ce"
        if "." in cfg.layers and nearest and not cfg.ce_weight:
            raise ValueError("exits are trained by cross-entropy, which ce_weight = 0 turns off; "
                             "leave one of them out")
        if not cfg.ce_weight and not cfg.semantic_weight:
            raise ValueError("ce_weight = 0 and semantic_weight = 0 leave nothing to learn; set "
                             "one of them")
        if not cfg.ce_weight and nearest == soft_ce:
            raise ValueError("ce_weight = 0 goes with --head=nearest and semantic = mse or cos, "
                             "or with head = softmax and --semantic=soft_ce")
        if nearest and cfg.tie:
            raise ValueError("head = nearest has no table to tie: it already reads the token "
                             "embedding; leave tie out")
        if cfg.soft_of == "point" and (cfg.n_think or cfg.n_soft or not cfg.regresses):
            raise ValueError("soft_of = point needs a model that regresses one (head = nearest, or "
                             "semantic = cos or mse with its weight), and has neither thoughts nor "
                             "a soft region (n_think, n_soft), which are distributions")

    def forward(self, h):
        return self.proj(h).float()

    def nearest(self, z, e):
        """Return logits (B, T, V) of points (B, T, C) by embeddings (V, C).

        They are negative squared distances, up to a constant of each row.
        """
        return 16 * self.scale * (z @ e.T) / e.size(-1)


class NextLatent(nn.Module):
    """Regresses each output vector from the one before and the token between, and gives the loss.

    So an output must hold what later ones are made of (NextLat, arXiv:2511.05963).
    """

    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        self.change = nn.Sequential(Linear(2 * C, 2 * C, group="table"), nn.SiLU(),
                                    Linear(2 * C, C, init=ZEROS, group="table"))

    def forward(self, h, e, targets):
        """Outputs h and embeddings e of the inputs, (B, T, C) each -> a sum over scored targets."""
        before, after = h[:, :-1], h[:, 1:].detach()
        guess = before + self.change(torch.cat((before, e[:, 1:].to(h.dtype)), -1))
        return scored_sum(DISTANCES["mse"](guess.float(), after), targets[:, 1:])


class SoftTokens:
    """What a GPT does with soft tokens, distributions or vectors in the place of ids."""

    def vectors(self, h):
        """Return the points that outputs h (..., C) regress, as vectors to read: (..., V + C).

        The symbol is the one with the nearest embedding, and the point is made as long as that.
        What knows symbols alone (value embeddings, n-grams, ends of words) needs to know no more.
        """
        z = F.normalize(self.point(h), dim=-1)
        near = (z @ self.embeddings().T).argmax(-1)
        e = self.wte(near).float()
        offset = z * e.norm(dim=-1, keepdim=True) - e
        return torch.cat((F.one_hot(near, self.cfg.vocab_size), offset), -1)

    @staticmethod
    def check(cfg):
        T = cfg.block_size
        if not -T < cfg.n_soft <= T - max(1, T // 4):
            raise ValueError(f"n_soft ({cfg.n_soft}) takes at most three quarters of block_size "
                             f"({T}) at its front, where a window that folds leaves tokens, or "
                             f"less than all of it at its end (negative)")

    def expect(self, logits):
        """Return the soft tokens of logits (.., V). None of them is the end of a text."""
        if self.cfg.eot >= 0:
            logits[..., self.cfg.eot] = float("-inf")
        return logits.softmax(-1)

    def soften(self, idx, history):
        """Return training inputs of which some are soft: idx (B, T) -> (B, T, V or V + C).

        A soft token is what the model expected in the token's place, from a pass without gradient.
        To keep that pass cheap, all of them stand in the first quarter of the rows (or in a share
        soft_rate of them, if that is more). In those rows the soft region is soft as a whole, and
        of the rest as much as makes a share soft_rate of the batch. The end of a text stays hard.
        Where that share is not a whole number of rows (of a small micro-batch), a region is soft by
        chance.
        """
        cfg, (B, T), share = self.cfg, idx.shape, max(self.cfg.soft_rate, 0.25)
        n, last = math.ceil(B * share), cfg.block_size
        region = slice(cfg.n_soft) if cfg.n_soft >= 0 else slice(last + cfg.n_soft, last)
        read = T if cfg.soft_rate else min(T, region.stop)
        with torch.no_grad():
            h = self.hidden(idx[:n, :read], None if history is None else history[:n])
            p = self.vectors(h) if self.soft_points else self.expect(self.to_logits(h))
            p = F.pad(p, (0, 0, 0, T - read))
        soft = torch.rand(n, T, device=idx.device) < cfg.soft_rate * B / n
        chance = B * share / n
        soft[:, region] = chance == 1 or torch.rand(n, 1, device=idx.device) < chance
        soft = soft & (idx[:n] != cfg.think_token) & (idx[:n] != cfg.eot)
        soft[:, 0] = False  # nothing is expected there
        tokens = F.one_hot(idx, p.size(-1)).to(p.dtype)
        mixed = torch.where(soft[..., None], p.roll(1, 1), tokens[:n])
        return torch.cat((mixed, tokens[n:]))

    def think(self, tokens, history, state, **more):
        """Return tokens (B, T, V) in which thoughts stand, and think tokens so far (B, T).

        Each of the first n_think think tokens in the window reads the distribution that the model
        put out one step before, and gradients flow through it (Coconut, Hao et al. 2024,
        arXiv:2412.06769, with expected embeddings for hidden states). Takes n_think passes over
        all places: after the i-th the first i are right.
        """
        n, V = self.cfg.n_think, self.cfg.vocab_size
        hard = tokens if tokens.is_floating_point() else F.one_hot(tokens, V).float()
        thinks = hard[..., self.cfg.think_token] == 1
        count, first = thinks.cumsum(1), hard[:, :1]
        has_past = torch.zeros_like(thinks[:, :1])  # an output before the first place
        if state is not None and state.begun:
            pos, thoughts = state.pos[:, None], state.own["thoughts"]
            has_past = pos > self.cfg.n_slot
            first = thoughts.before("p", pos)[:, None]
            count = count + thoughts.before("count", pos)[:, None] * has_past
        soft = (thinks & (count <= n))[..., None]
        first = torch.where(soft[:, :1] & has_past[..., None], first, hard[:, :1])
        tokens = torch.cat((first, hard[:, 1:]), dim=1)
        before = None if state is None else (state.pos, state.begun)
        for _ in range(min(n, tokens.size(1) - 1)):
            p = self.to_logits(self.hidden(tokens, history, state, **more)).softmax(-1)
            tokens = torch.cat((first, torch.where(soft[:, 1:], p[:, :-1], hard[:, 1:])), dim=1)
            if state is not None:
                state.pos, state.begun = before
        return tokens, count

    def note_thoughts(self, state, h, count):
        """Keep in a state the distributions that the output vectors h (B, T, C) of its last
        positions give, and the count (B, T)."""
        T = h.size(1)
        pos = state.pos[:, None] - T + torch.arange(T, device=h.device)
        state.own["thoughts"].write(pos, p=self.to_logits(h).softmax(-1), count=count)


# --------------------------------------------------------------------------------------------------
# early exits: they cut the trunk into segments


class ExitClassifier(nn.Module):
    """The logit (..) that the last layer would choose as an exit does, of output vectors (.., C).

    One for all exits, trained beside the model without a gradient into it (the classifier of CALM,
    Schuster et al. 2022, arXiv:2207.07061).
    """

    def __init__(self, cfg):
        super().__init__()
        self.proj = Linear(cfg.n_embd, 1, bias=True, group="table")

    def forward(self, h):
        return self.proj(h).float()[..., 0]


class EarlyExit:
    """What a GPT does at its exits: losses there, tokens that stop, drafts.

    Example, layers = "AA.AA": exits = {2: 2}, the first segment is the first two blocks.
    """

    @staticmethod
    def check(cfg):
        behind = cfg.layers[cfg.layers.find("."):] if cfg.exit_keys else ""
        for c in behind:
            if ends_with_document(c):
                raise ValueError(f"exit_keys promises that a token which leaves changes nothing "
                                 f"for others, and behind the first exit in layers = {cfg.layers} "
                                 f"{'a level' if c == '(' else c} carries on what a token left "
                                 f"with; put A or F there")

    def add_exits(self, cfg):
        """Make exits, {layers before it: blocks before it, also in levels}, and the segments."""
        self.exits = {}
        for before in itertools.accumulate(cfg.layers.split(".")[:-1]):
            self.exits[len(parse_layers(before))] = sum(c in BLOCKS for c in before)
        kind, limit, _ = parse_chunk(cfg.chunk.split(",")[0])
        self.limit = limit if kind == "entropy" and self.levels else None
        self.sure = ExitClassifier(cfg) if cfg.exit_classifier else None
        self.segments = list(itertools.pairwise((0, *self.exits, len(self.order))))
        self.exits_rotate = cfg.exit_loss == "rotate" and len(self.exits) > 1

    def exit_weights(self):
        """Return what each exit's loss counts, by its depth; [] where they are not trained."""
        depths = list(self.exits.values()) if self.cfg.exit_weight else []
        return [k / sum(depths) for k in depths]

    def draw_step(self, seed, step):
        """Return what a training step draws as a whole, from (seed, step) alone; None for nothing.

        n_layer numbers, 0 where a block is left out (LayerSkip, Elhoushi et al. 2024,
        arXiv:2404.16710: with a chance that grows exponentially from 0 for the first block to
        layer_drop for the last), then the weight of each exit.
        """
        cfg, n, weight = self.cfg, self.cfg.n_layer, self.exit_weights()
        if not cfg.layer_drop and not weight:
            return None
        chance = cfg.layer_drop * (torch.exp2(torch.arange(n) / max(n - 1, 1)) - 1)
        generator = torch.Generator().manual_seed(hash((seed, step)) % 2 ** 63)
        kept = (torch.rand(n, generator=generator) >= chance).float()
        if cfg.exit_loss == "rotate":
            weight = [float(i == step % len(weight)) for i in range(len(weight))]
        return torch.cat((kept, torch.tensor(weight)))

    def behind_exit(self, x, seq):
        """Return the Sequence of the layers behind the first exit, which sees x (B, L, C).

        With exit_keys they take keys from there. With chunk = entropy:limit a chunk ends where the
        next token, as the head expects it there, has more than `limit` nats of entropy (Byte Latent
        Transformer, Pagnoni et al. 2024, arXiv:2412.09871).
        """
        if self.cfg.exit_keys:
            seq = replace(seq, kv_input=x)
        if self.limit is not None:
            with torch.no_grad():
                logp = self.to_logits(self.ln_f(x[:, seq.n_prefix:])).log_softmax(-1)
            seq = replace(seq, word_end=-(logp.exp() * logp).sum(-1) > self.limit)
        return seq

    def exit_trial(self, B):
        """Return should_exit(h, _) for training, so that layers learn to see tokens that stopped.

        In a share exit_rate of the B rows they stop where the likeliest token has more than a
        probability that is drawn per row. Their own exit is then their last layer: there is nothing
        to distil at it, and they teach the classifier nothing.
        """
        limit = torch.rand(2, B, 1, device=self.wte.weight.device)
        limit = torch.where(limit[0] < self.cfg.exit_rate, 0.5 + 0.5 * limit[1], 2.0)

        def should_exit(h, _):
            with torch.no_grad():
                return self.to_logits(h).softmax(-1).amax(-1) > limit
        return should_exit

    def exit_losses(self, exits, depth, logits, targets, step_draw):
        """Return [(name, weight, sum)] of what exits lose: a list of output vectors (B, T, C).

        Cross-entropy, with exit_distill the divergence from logits (B, T, V) in part, weighted as
        step_draw says; and the classifier's, which no gradient leaves. depth (B, L): after how
        many blocks each position stopped; None: none did.
        """
        cfg, losses = self.cfg, []
        names, outputs = [f"exit_{k}" for k in self.exits.values()], exits
        weights = self.exit_weights()
        if step_draw is not None and weights:
            weights = step_draw[cfg.n_layer:].unbind()
            if self.exits_rotate:  # read the one that counts
                outputs = [sum(w.to(h.dtype) * h for w, h in zip(weights, exits))]
                names, weights = ["exit"], [1.0]
        for name, h, weight in zip(names, outputs, weights):
            out, weight = self.to_logits(h), cfg.exit_weight * weight
            losses.append((name, (1 - cfg.exit_distill) * weight, cross_entropy(out, targets)))
            if cfg.exit_distill:
                kl = scored_sum(divergence(logits.detach(), out), targets)
                losses.append((f"{name}_distill", cfg.exit_distill * weight, kl))
        if self.sure is not None:
            with torch.no_grad():
                choice = logits.argmax(-1)
                right = torch.stack([self.to_logits(h).argmax(-1) == choice for h in exits]).float()
            sure = self.sure(torch.stack(exits).detach())  # (exits, B, T)
            wrong = F.binary_cross_entropy_with_logits(sure, right, reduction="none").mean(0)
            if depth is not None:  # the last layer of other rows is the exit itself
                wrong = wrong.masked_fill((depth < cfg.n_layer).any(1, keepdim=True), 0.0)
            losses.append(("sure", 1.0, scored_sum(wrong, targets)))
        return losses

    def exit_place(self, blocks):
        """Return before which layer the exit after so many blocks stands; ValueError names them."""
        for place, k in self.exits.items():
            if k == blocks:
                return place
        there = ", ".join(map(str, self.exits.values()))
        raise ValueError(f"the model has no exit after {blocks} blocks" + (
            f"; it has them after {there}" if there else
            " and none at all; train one with a . in layers"))

    def forward_early(self, tokens, state, place):
        """Run the layers up to an exit's place over tokens (B, T) that continue a state.

        Return x (B, T, C), what goes on from there, and the exit's logits (B, T, V).
        """
        x, seq = self.embed(tokens, state=state)
        x = self.trunk(x, seq, Aux(), state, until=place)[0]
        return x, self.to_logits(self.ln_f(x))

    def forward_remainder(self, x, tokens, state, place):
        """Run the layers from an exit's place on over what forward_early left, x (B, T, C).

        In a state that was rolled back to before it; return logits (B, T, V). Blocks that read a
        plan, keys or ends of chunks from before the exit need it again: then all layers run.
        """
        needs_first = self.cfg.exit_keys or self.limit is not None
        if (needs_first and place != next(iter(self.exits))
                or self.cfg.plan != "add" and self.levels):
            return self(tokens, state=state).logits
        seq = self.behind_exit(x, self.embed(tokens, state=state)[1])
        x, _ = self.run(x, seq, Aux(), state.caches, first=place)
        return self.to_logits(self.ln_f(x))

    def forward_with_exits(self, tokens, should_exit, history=None, state=None, ids=None):
        """Return logits (B, T, V), each of the layer its token stopped at, and blocks run (B, T).

        should_exit(h, before) of normalised vectors (B, T, C) at an exit and at the one before it
        (at first the inputs') says which tokens (B, T) stop. The later layers see such a token as
        it was then (CALM), so over a whole window or a token at a time the result is the same.
        With a state, once all have stopped the layers only update their caches. Python waits for
        the device to learn whether they have; sample.compiled makes one graph of all that runs from
        one such question to the next. The model has at least one exit.
        """
        caches, k = None if state is None else state.caches, 1
        x, seq, plan, depth = self.first_segment(tokens, should_exit, history, state, ids)
        stopped = lambda: caches is not None and bool((depth < self.cfg.n_layer).all())
        while not (done := stopped()) and k < len(self.exits):
            x, seq, plan, depth = self.segment(k, x, seq, Aux(), caches, plan, depth, should_exit)
            k += 1
        return self.last_segment(k, x, seq, caches, plan, depth, done), depth[:, seq.n_prefix:]

    def first_segment(self, tokens, should_exit, history, state, ids):
        """Embed tokens and run segment 0: arguments of forward_with_exits, results of segment."""
        x, seq = self.embed(tokens, history, state, ids=ids)
        caches = None if state is None else state.caches
        return self.segment(0, x, seq, Aux(), caches, should_exit=should_exit)

    def last_segment(self, k, x, seq, caches, plan, depth, done):
        """Return the logits (B, T, V) of x (B, L, C) after segment k, the last.

        done: all tokens have stopped. The logits are then those of x as it is, and the layers from
        segment k on only update their caches.
        """
        if done:
            first = self.segments[k][0]
            for layer, cache in zip(self.order[first:], caches[first:]):
                plan = layer.update_cache(x, seq, Aux(), cache, plan)
        else:
            x = self.segment(k, x, seq, Aux(), caches, plan, depth)[0]
        return self.to_logits(self.ln_f(x[:, seq.n_prefix:]))


# --------------------------------------------------------------------------------------------------
# GPT


def cross_entropy(logits, targets):
    """Return the summed cross-entropy of logits (B, T, V) over targets (B, T) that are not -1."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1,
                           reduction="sum")


def scored_sum(loss, targets):
    """Return the sum of a loss (B, T) over scored targets (B, T)."""
    return loss.masked_fill(targets < 0, 0.0).sum()


def averaged(each):
    """Return logits of the mean of the distributions that have these logits, (..., V) each."""
    each = torch.stack([logits.float() for logits in each]).log_softmax(-1)
    return each.logsumexp(0) - math.log(len(each))


def divergence(logits, others):
    """Return the Kullback-Leibler divergence of others (B, T, V) from logits, nats: (B, T)."""
    p = logits.float().log_softmax(-1)
    return (p.exp() * (p - others.float().log_softmax(-1))).sum(-1)


@dataclass
class Output:
    """What GPT.forward returns, whatever the variant. Unpacks as `logits, loss = model(...)`."""
    logits: torch.Tensor  # (B, T, V), or (B, n, V) of places `at`; with targets not cast to fp32
    loss: torch.Tensor | None  # scalar: the weighted sum of `losses`, None without targets
    losses: dict  # name: scalar; "ce" is the plain cross-entropy, nats a scored token
    # with targets these are None: the normalised vectors (B, T, C) that the head reads
    h: torch.Tensor | None = None
    exits: list | None = None  # the same at each exit
    memory_writes: dict | None = None  # {block: MemoryWrites} of blocks M that were given a memory
    ff_outputs: dict | None = None  # {block: (B, S + T, C)}, with GPT.record_ff_outputs

    def __iter__(self):
        return iter((self.logits, self.loss))


class GPT(Stack, Recall, SoftTokens, EarlyExit):
    """A decoder-only transformer and its variants.

    All weights are drawn from (seed, parameter name); with seed None they have no values yet.
    """

    def __init__(self, cfg, seed=1337):
        super().__init__()
        V, C = cfg.vocab_size, cfg.n_embd
        if V < 1:
            raise ValueError(f"vocab_size must be at least 1, not {V}")
        if cfg.n_think and not 0 <= cfg.think_token < V:
            raise ValueError(f"think_token must be an id below {V}, not {cfg.think_token}")
        nearest, norm = cfg.head == "nearest", NORMS[cfg.norm]
        self.cfg, self.n_slot = cfg, cfg.n_slot
        self.wte = Embedding(V, C)
        self.wpe = Embedding(cfg.block_size, C, init=normal(0.1)) if cfg.pos == "learned" else None
        self.n_grams = NGrams(cfg) if cfg.n_gram else None
        self.slots = Slots(cfg) if cfg.n_slot else None
        self.drop = nn.Dropout(cfg.dropout)
        self.embed_norm = RMSNorm(cfg) if cfg.embed_norm else nn.Identity()
        self.add_layers(cfg, cfg.tree)
        if cfg.share_mlp:
            first, *others = (b for b in self.modules() if isinstance(getattr(b, "mlp", 0), MLP))
            for block in others:
                block.mlp = first.mlp
        self.ln_f = norm(cfg)
        # a large table is padded, by rows that nobody reads: GPUs want multiples of 64
        padded = V if V < 1024 or cfg.tie else -(-V // 64) * 64
        self.lm_head = None if nearest else Linear(C, padded, init=HEAD, group="table")
        self.point = EmbeddingHead(cfg) if cfg.regresses else None
        self.soft_points = cfg.soft_of == "point"
        self.add_exits(cfg)
        self.ce_weight = cfg.ce_weight or float(nearest)  # of a nearest head it sets the scale
        self.latent = NextLatent(cfg) if cfg.next_latent else None
        self.distance = DISTANCES.get(cfg.semantic)
        if cfg.tie:
            self.lm_head.weight = self.wte.weight
        self.add_tables(cfg)
        self.dtype = torch.float32  # what the forward computes in; a trainer sets bf16
        self.grad_checkpoint = False  # compute blocks again in the backward pass
        self.record_ff_outputs = False  # leave those of token-level blocks in Output
        for name, p in self.named_parameters():
            if getattr(p, "group", None) not in GROUPS:
                raise ValueError(f"parameter {name} states no initial values and optimizer group; "
                                 f"make it with parameter() or Linear() of model.py")
        if seed is not None:  # else the values come from elsewhere
            self.init_weights(seed)

    def add_tables(self, cfg):
        """Make rotary angles of all positions, and which tokens end a word."""
        # (semantic_table is for a trainer to give)
        constants(self, cos=None, sin=None, ends_word=None, semantic_table=None)
        attending = cfg.attending() if cfg.pos == "rope" else []
        if attending:
            length = cfg.n_slot + max(cfg.block_size, cfg.history if cfg.enrich else 0)
            length += (2 + cfg.horizon) * bool(self.levels)  # a level has bos, and looks ahead
            with torch.device("cpu"):  # (for these, the meta device would load torch._dynamo)
                angle = cfg.rope_base ** (-torch.arange(0, 1, 2 / cfg.heads(attending[0])[2]))
                angle = torch.outer(torch.arange(length, dtype=torch.float32), angle)
            self.cos, self.sin = (t.to(self.wte.weight.device) for t in (angle.cos(), angle.sin()))
        if cfg.chunk.startswith("space") and self.levels:
            if not cfg.space:
                raise ValueError("chunk = space needs the ids that end a word (space), which a "
                                 "dataset of characters knows")
            self.ends_word = torch.isin(torch.arange(cfg.vocab_size), torch.tensor(cfg.space))

    @classmethod
    def of(cls, config, weights):
        """Return the model of settings, plain data, with weights {name: tensor}.

        Raise ValueError where they do not fit, before memory is taken.
        """
        try:
            cfg = GPTConfig(**config)
        except TypeError as e:
            raise ValueError(str(e)) from None
        shapes = lambda tensors: {n: tuple(t.shape) for n, t in tensors.items()}
        with torch.device("meta"):
            needed = shapes(cls(cfg, None).state_dict())
        given = shapes(weights)
        for n, _ in needed.items() ^ given.items():  # in one alone
            raise ValueError(f"{n} is {given.get(n)} in it, and {needed.get(n)} by its settings")
        model = cls(cfg, None)
        model.load_state_dict(weights)
        return model

    @torch.no_grad()
    def init_weights(self, seed):
        """Give every parameter its initial values, by the law it states.

        Each has a generator of its own, seeded by (seed, its name), so a mechanism that is
        switched on changes no other parameter.
        """
        for name, p in self.named_parameters():
            name = name.replace(*getattr(p, "seeded_as", ("", "")))
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            number = int.from_bytes(digest[:7], "big")
            p.init(p, self.cfg, torch.Generator().manual_seed(number))

    def num_params(self):
        """Return the number of parameters without learned positions, as nanoGPT counts."""
        return sum(p.numel() for name, p in self.named_parameters() if name != "wpe.weight")

    def random(self):
        """Return whether training computes something else than evaluation does."""
        names = "dropout channel_drop soft_rate n_soft layer_drop exit_rate mem_noise plan_draw"
        some = self.cfg.rollout % 1  # not all rows
        return some > 0 or any(getattr(self.cfg, name) for name in names.split())

    def token_costs(self):
        """Yield (name, module, depth, operations of forward and backward per token of the window).

        All parts come in the order in which they run; the module is None where one is absent. Slots
        count as positions, a pass of thinking whole, one without gradient a third.
        """
        cfg, T = self.cfg, self.cfg.block_size
        passes = 1 + cfg.n_think + bool(cfg.soft_rate or cfg.n_soft) / 3
        reads = passes + (len(self.exits) if cfg.exit_weight else 0) + (self.limit is not None) / 3
        table = self.wte.weight.numel() if self.lm_head is None else 0
        yield "wte", self.wte, 0, 6 * reads * table
        for name in ("wpe", "n_grams", "slots", "embed_norm"):
            yield name, getattr(self, name), 0, 0
        window, history = (self.costs(cfg.n_slot + n) for n in (T, cfg.history))
        for (*part, flops), (*_, more) in zip(window, history):
            yield *part, (passes * flops + cfg.enrich * more / 3) / T
        for name in ("ln_f", "lm_head", "point", "latent", "sure"):
            part = getattr(self, name)
            yield name, part, 0, 6 * reads * n_weights(part)

    def flops_per_token(self):
        """Return operations of forward and backward per token of the window."""
        return sum(flops for *_, flops in self.token_costs())

    # -- decoding

    def init_state(self, B, memory=None, carried=None, known=None, room=None):
        """Return an empty State for B rows, with room for every slot and the whole window, or so
        many tokens of it.

        memory {block: Memory}: what blocks M can find besides what they read, of one row, or of B
        for leave_window to write to. carried: the entries of the first known (B,) tokens, as
        leave_window gave them.
        """
        device, S, V = self.wte.weight.device, self.cfg.n_slot, self.cfg.vocab_size
        L = S + (self.cfg.block_size if room is None else room)
        like, own = torch.empty(0, device=device, dtype=self.dtype), {}
        caches = self.init_caches(B, L, like)
        for i, window in self.windows(caches) if carried else ():
            for name, t in zip(ENTRY, carried[i]):
                window[name][:, S:] = t
            place = torch.arange(window["fixed"].size(1), device=device)
            window["fixed"][:] = place < S + known[:, None]
        if self.n_grams is not None:
            own["n_grams"] = Cache.empty(like, B, self.cfg.block_size, ids=(torch.long,))
        if self.cfg.doc_mask:
            own["docs"] = Cache.empty(like, B, L, docs=(torch.long,))
        if self.cfg.n_think:
            own["thoughts"] = Cache.empty(like, B, L, p=(V, torch.float32), count=(torch.long,))
        pos = torch.zeros(B, dtype=torch.long, device=device)
        return State(pos, caches, L, memory or {}, own)

    # -- the forward

    def history_vectors(self, history):
        """Return what slots are made of: a vector for each id of history (B, cfg.n_history).

        They are embeddings, or with `enrich` the outputs of one pass without gradient over the
        ids, in which what is missing stands behind all else, where nothing sees it. With
        running_mean the mean embedding of the counts comes first.
        """
        counts, history = history[:, :-self.cfg.history], history[:, -self.cfg.history:]
        ids = history.clamp(min=0)
        if not self.cfg.enrich:
            vectors = self.wte(ids)
        else:
            with torch.no_grad():
                order = (history < 0).sort(stable=True)[1]
                h = self.hidden(ids.gather(1, order)).float()
                vectors = torch.empty_like(h).scatter(1, order[..., None].expand_as(h), h)
        if not self.cfg.running_mean:
            return vectors
        counts = counts.clamp(min=0).float()
        mean = self.wte(counts / counts.sum(1, keepdim=True).clamp(min=1))
        return torch.cat((mean[:, None], vectors), 1)

    def embed(self, tokens, history=None, state=None, ids=None, targets=None, step_draw=None,
              memory=None):
        """Return x (B, S + T, C) and its Sequence, of ids (B, T), distributions or vectors.

        history (B, cfg.n_history): as in forward. Slots come first, once: with a state
        that already holds positions there are none to add. The state moves on. ids (B, T): which
        symbols soft tokens stand for; None: the likeliest.
        """
        cfg, x, begins = self.cfg, self.wte(tokens), state is None or not state.begun
        soft = tokens.is_floating_point()
        symbols = tokens[..., :cfg.vocab_size] if soft else tokens
        likeliest = symbols.argmax(-1) if soft else tokens
        place = torch.arange(tokens.size(1), device=x.device).expand(tokens.shape[:2])
        if not begins:
            place = (place + state.pos[:, None] - self.n_slot).clamp(max=cfg.block_size - 1)
        if self.wpe is not None:
            x = x + self.wpe(place)
        if self.n_grams is not None:
            cache = None if state is None else state.own["n_grams"]
            x = x + self.n_grams(likeliest, place, cache)
        if self.slots is not None and begins:
            if history is None:
                history = torch.full((len(x), cfg.n_history), -1, device=x.device)
                vectors = x.new_zeros(len(x), cfg.running_mean + cfg.history, x.size(-1))
            else:
                vectors = self.history_vectors(history)
            x = torch.cat((self.slots(history, vectors), x), dim=1)
        x = self.drop(self.embed_norm(x.to(self.dtype)))

        # what layers may know of them
        S, more, pos, capacity = x.size(1) - tokens.size(1), {}, None, 0
        ids = likeliest if ids is None else ids
        more["doc_start"] = F.pad(ids == cfg.eot, (S, 0))
        docs = more["doc_start"].cumsum(1) if cfg.doc_mask else None
        if docs is not None and state is None and skips_blocks(x):
            more["blocks"] = create_block_mask(
                lambda b, h, i, j: (j <= i) & (docs[b, i] == docs[b, j]), len(x), None,
                x.size(1), x.size(1), x.device)
        if self.ends_word is not None:
            more["word_end"] = self.ends_word[ids]
        if targets is not None:  # a token that is a target is scored where it stands
            more["scored"] = F.pad((targets[:, :-1] >= 0).float(), (S + 1, 0))
        if self.training and cfg.layer_drop and step_draw is not None:
            more["layer_mask"] = step_draw[:cfg.n_layer]
        if state is not None:
            memory, capacity, pos = state.memory, state.capacity, state.advance(x.size(1))
            if docs is not None:
                cache = state.own["docs"]
                cache.write(pos, docs=docs + cache.before("docs", pos)[:, None])
                docs = cache["docs"]
        table = None if self.cos is None else (self.cos, self.sin)
        return x, Sequence.of(x, table, self.n_slot, pos, capacity, begins, docs, tokens=symbols,
                              memory=memory, **more,
                              recompute=self.grad_checkpoint and torch.is_grad_enabled())

    def segment(self, k, x, seq, aux, caches=None, plan=None, depth=None, should_exit=None):
        """Run segment k (from 0) over x (B, L, C), and ask the exit behind it which tokens stop.

        should_exit: as in forward_with_exits; None: nobody asks. depth (B, L): after how many
        blocks each position stopped, n_layer where it has not; None: no exit was asked yet. Slots
        never stop. Return x, the Sequence and the plan for what comes next, and depth.
        """
        first, last = self.segments[k]
        exited = None if depth is None else depth < self.cfg.n_layer
        start, (x, plan) = x, self.run(x, seq, aux, caches, plan, first, last, exited)
        if last not in self.exits:
            return x, seq, plan, depth
        seq = seq if k else self.behind_exit(x, seq)
        if should_exit is not None:
            S = seq.n_prefix
            now = F.pad(should_exit(*(self.ln_f(v[:, S:]) for v in (x, start))), (S, 0))
            if depth is None:
                depth = torch.full_like(now, self.cfg.n_layer, dtype=torch.long)
            depth = torch.where(now, depth.clamp(max=self.exits[last]), depth)
        return x, seq, plan, depth

    def trunk(self, x, seq, aux, state=None, should_exit=None, until=None):
        """Run x (B, L, C) through the layers, segment after segment, up to the exit `until`.

        should_exit: as in forward_with_exits. Return (x, [x at each exit], depth as segment does).
        """
        plan, depth, at_exits = None, None, []
        caches = None if state is None else state.caches
        for k, (_, last) in enumerate(self.segments):
            x, seq, plan, depth = self.segment(k, x, seq, aux, caches, plan, depth, should_exit)
            if last == until:
                break
            at_exits.append(x)
        return x, at_exits[:len(self.exits)], depth

    def hidden(self, tokens, history=None, state=None, **more):
        """Return normalised output vectors (B, T, C) of tokens, ids or soft; no loss."""
        x, seq = self.embed(tokens, history, state, **more)
        return self.ln_f(self.trunk(x, seq, Aux(), state)[0][:, seq.n_prefix:])

    def concepts(self, tokens, history=None):
        """Return what each level makes of tokens (B, T): LevelOutputs, as they run."""
        aux, (x, seq) = Aux(), self.embed(tokens, history)
        self.trunk(x, seq, aux)
        return aux.concepts

    def embeddings(self):
        """Return the normalised embeddings (V, C)."""
        return rms_norm(self.wte.weight.float())

    def to_logits(self, h):
        """Return logits (B, T, V) of output vectors (B, T, C)."""
        return self.raw_logits(h)[..., :self.cfg.vocab_size].float()

    def raw_logits(self, h):
        """Return logits (B, T, V or more) as they are computed: of a padded table, in its type.

        Those beyond V are so low that they have no share in a softmax.
        """
        if self.lm_head is not None:
            logits = self.lm_head(h)
            if logits.size(-1) == self.cfg.vocab_size:
                return logits
            beyond = torch.arange(logits.size(-1), device=h.device) >= self.cfg.vocab_size
            return logits.masked_fill(beyond, torch.finfo(logits.dtype).min)
        z, e = self.point(h), self.embeddings()
        if not self.cfg.ce_weight:  # cross-entropy then sets the scale and nothing else
            z, e = z.detach(), e.detach()
        return self.point.nearest(z, e)

    def semantic_loss(self, h, logits, targets):
        """Return the sum over scored targets (B, T) of a loss that knows how far off a token is.

        The embeddings it is measured by, its own or a trainer's, carry no gradient. soft_ce with a
        temperature of 1e6 and a weight w is label smoothing of w / (1 + w).
        """
        e, y = self.semantic_table, targets.clamp(min=0)
        e = self.embeddings().detach() if e is None else e
        if self.distance is None:  # soft_ce: cross-entropy with targets as likely as they are alike
            near = (e[y] @ e.T / e.size(-1) / self.cfg.semantic_temp).softmax(-1)  # (B, T, V)
            loss = -(near * logits.float().log_softmax(-1)).sum(-1)
        else:
            loss = self.distance(self.point(h), e[y])
        return scored_sum(loss, targets)

    def forward(self, idx, targets=None, history=None, state=None, ids=None, denom=None,
                step_draw=None, memory=None, at=None):
        """Return the Output for idx: ids (B, T), or soft tokens (B, T, V) or (B, T, V + C).

        targets (B, T): the next tokens, -1 where none is scored; the loss is their summed
        cross-entropy over `denom` (default: how many are scored; a trainer passes the count over
        all ranks and micro-steps).
        history (B, cfg.n_history): the ids before the window, oldest first, -1 where missing; with
        running_mean they follow V counts, how often each token stood before the window.
        state: a decoding State that idx continues; it is updated in place.
        ids (B, T): which symbols soft tokens stand for, as far as ends of documents and words go.
        step_draw: what draw_step drew; None: no block is left out, and exits count by depth.
        memory: {block: Memory} of these rows, for blocks M without a state.
        at (B, n): the places to make logits of, such as a prompt's last; None: all. Not with
        targets.
        """
        cfg, count = self.cfg, None
        ids = idx if ids is None and not idx.is_floating_point() else ids
        more = dict(ids=ids, step_draw=step_draw, memory=memory)

        # inputs may be soft
        if self.training and (cfg.soft_rate or cfg.n_soft):
            idx = self.soften(idx, history)
        if cfg.n_think:
            idx, count = self.think(idx, history, state, **more)

        # vectors, then the layers
        x, seq = self.embed(idx, history, state, targets=targets, **more)
        aux = Aux({} if self.record_ff_outputs else None)
        should_exit = self.exit_trial(len(x)) if self.training and cfg.exit_rate else None
        x, at_exits, depth = self.trunk(x, seq, aux, state, should_exit)

        # logits
        h, *exits = (self.ln_f(v[:, seq.n_prefix:]) for v in (x, *at_exits))
        if count is not None and state is not None:
            self.note_thoughts(state, h, count)
        raw = self.raw_logits(standing_at(h, at))
        logits = raw[..., :cfg.vocab_size]
        if targets is None:
            return Output(logits.float(), None, {}, h, exits, aux.memory_writes, aux.ff_outputs)

        # losses: sums over scored tokens, weighted here
        terms = [("ce", self.ce_weight, cross_entropy(raw, targets))]
        if cfg.semantic_weight:
            terms.append(("semantic", cfg.semantic_weight, self.semantic_loss(h, logits, targets)))
        if cfg.next_latent:
            terms.append(("latent", cfg.next_latent, self.latent(h, self.wte(idx), targets)))
        if cfg.logit_decay:
            # against features that starve others (Spectral Decoupling, Pezeshki et al. 2021,
            # arXiv:2011.09468)
            squares = logits.float().square().mean(-1)
            terms.append(("logits", cfg.logit_decay, scored_sum(squares, targets)))
        terms += aux.losses + self.exit_losses(exits, depth, logits, targets, step_draw)
        denom = (targets >= 0).sum().clamp(min=1) if denom is None else denom
        losses, loss = {}, 0.0
        for name, weight, value in terms:
            losses[name] = losses.get(name, 0.0) + value / denom
            loss = loss + weight * (value / denom)
        return Output(logits, loss, losses, None, None, aux.memory_writes, aux.ff_outputs)


CHOICES = {
    "mlp": ACTIVATIONS, "norm": NORMS, "pos": ("rope", "learned", "none"),
    "init": ("fan_in", "gpt2"), "gate": ("positive", "real", "complex"),
    "plan": ("add", "cross", "latent"), "concept": CONCEPT_HEADS,
    "concept_of": ("chunk", "bag", "state", "ema"), "head": ("softmax", "nearest"),
    "semantic": (*DISTANCES, "soft_ce"),
    "soft_of": ("softmax", "point"),
    "exit_loss": ("depth", "rotate")}
CHECKED = (Attention, Level, FeaturalMemory, AssociativeMemory, NGrams, Slots, EmbeddingHead,
           SoftTokens, EarlyExit)


def settings(cfg):
    """Return a config as plain data, for a checkpoint; GPTConfig(**settings) makes it again."""
    return asdict(cfg)
