"""Decoding: every way to turn a model into text.

    python sample.py                                        500 tokens from the newest checkpoint under out/
    python sample.py --prompt="ROMEO:" --n=3 --top_p=0.9
    python sample.py --prompt=FILE:scene.txt --temperature=0
    python sample.py --prompt= --stop_at_end                a text from its beginning to its end
    python sample.py --amateur=out/small/ckpt.pt            contrastive decoding against a weaker model
    python sample.py --exit=softmax --trace                 a token leaves at the first exit that is sure of it
    python sample.py --speculate=4 --draft_exit=2           the first 2 blocks draft, the rest verifies: the same text, sooner
    python sample.py --beams=8                              the likeliest text; --best_of=8: the likeliest of 8 samples
    python sample.py --soft --collapse=entropy --trace      tokens stay soft until the model is sure
    python sample.py --interactive                          go on from what is typed, turn by turn
    python sample.py calibrate --exit=softmax --risk=0.02   find the exit_threshold that keeps a risk, and store it
    python sample.py learn --knn=works.db FILE...           read texts into a datastore, without a gradient; --knn=works.db then uses it
    python sample.py learn --memory=facts.db FILE...        likewise into the memory of blocks M; --memory=facts.db then remembers it
    python sample.py memory FILE list TEXT                  what is in a store; also stats, show ID, forget ID or TEXT, prune N

There is no upper bound on max_new_tokens: when the window is full, its oldest quarter folds into the context slots, or is
dropped where the model has none.
"""
import codecs
import collections
import contextlib
import copy
import glob
import html
import itertools
import json
import math
import os
import re
import shlex
import sqlite3
import sys
import time
import urllib.parse
import zlib
from dataclasses import dataclass, fields

import config  # before torch: it sets the allocator's switches
import numpy as np
import torch
from torch.nn import functional as F

import prepare
from config import UserError, summary
from model import Clusters, GPT, Level, Linear, rms_norm, search


@dataclass
class SampleConfig:
    out_dir: str = ""  # folder of a checkpoint, or a checkpoint file; default: the newest under out/
    prompt: str = "\n"  # text to go on from; FILE:path, or - for standard input; empty: a new text
    n: int = 1  # samples
    max_new_tokens: int = 500  # tokens to make; no upper bound
    temperature: float = 0.8  # 0: the most likely token always
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the most likely tokens that hold this share of the probability
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the most likely one
    repetition_penalty: float = 1.0  # divide the odds of tokens in the window (CTRL, arXiv:1909.05858); 1: off
    stop: str = ""  # end a sample before this text; <|endoftext|>: as stop_at_end
    stop_at_end: bool = False  # end a sample where the model ends the text
    amateur: str = ""  # contrastive decoding against a checkpoint, exit:K (the exit after K blocks) or context:N (at most the last N tokens)
    alpha: float = 0.1  # contrastive: keep tokens at least alpha times as likely as the expert's first
    beta: float = 0.5  # contrastive: strength
    soft: bool = False  # the next input is the expected embedding of the next token until it collapses to a symbol
    soft_top_k: int = 0  # soft: over the k most likely tokens; 0: over those that the filters keep
    gumbel: float = 0.0  # soft: temperature of a Gumbel-softmax that stirs each soft token; 0: no noise
    collapse: str = "entropy"  # soft: always | never | every:N | entropy (when sure) | distance (when far from any embedding)
    collapse_threshold: float = -1.0  # entropy: nats below which to collapse (-1: 0.5); distance: 1 - cosine above which (-1: 0.1)
    collapse_by: str = "nearest"  # earlier soft tokens become: nearest (the nearest token) | context (each drawn in one pass)
    collapse_back: int = -1  # collapse only the last n earlier soft tokens; -1: all, 0: none
    n_think: int = 0  # think tokens after the prompt, for a model trained with n_think, which thinks so often in a window
    think_after: str = ""  # think tokens after each occurrence of this text (they count towards max_new_tokens)
    exit: str = ""  # leave at the first exit that is sure by softmax | margin | cosine | classifier
    exit_threshold: float = -1.0  # how sure, from 0 (leave at once) to 1 (never); -1: what calibrate stored beside the checkpoint
    exit_decay: float = 0.0  # lower the threshold along the sample: 0.9 of it, and 0.1 e^(-exit_decay t / max_new_tokens); 0: do not
    risk: float = 0.02  # calibrate: share of tokens that may differ from the last layer's first choice
    confidence: float = 0.95  # calibrate: chance that the risk is kept
    sequences: int = 1000  # calibrate: how many stretches of held-out text
    length: int = 64  # calibrate: tokens in each
    data_dir: str = "data"  # calibrate: where datasets are kept
    speculate: int = 0  # draft so many tokens at a time and verify them in one pass; 0: off
    draft_exit: int = 0  # speculate: draft with the first K blocks, which an exit follows
    draft: str = ""  # speculate: draft with this checkpoint, whose window should not be shorter
    beams: int = 0  # beam search over so many texts, of which the n likeliest are shown; 0: off
    best_of: int = 0  # make so many samples and show the n likeliest; 0: off
    memory: str = ""  # a store that learn --memory wrote with this model: what blocks M find besides what they read
    memory_index: bool = False  # memory: search it by an index, made at the start: faster from some 100,000 entries on, and almost always right
    knn: str = ""  # a datastore that learn --knn wrote with this model: mix in what came next at the places most like this one
    knn_lambda: float = 0.25  # knn: its weight, from 0 (the model alone) to 1
    knn_k: int = 256  # knn: how many places
    knn_temp: float = 0.0625  # knn: a place at the distance d counts exp(-d^2 / (knn_temp n_embd))
    limit: int = 20  # memory list: entries to show; 0: all
    interactive: bool = False  # go on from what is typed, turn by turn, with all turns in view
    trace: bool = False  # colour each token by its exit, by whether it was drafted, by contrastive shift, or by entropy
    trace_html: str = ""  # write that as a page for a browser
    json: bool = False  # a JSON line a token: its entropy, whether it was soft, which before it were when it was chosen
    seed: int = 1337  # of the choices
    device: str = "auto"  # auto (a GPU where there is one) | cpu | cuda | mps
    dtype: str = "float32"  # float32 | bfloat16
    int8: bool = False  # matrices of the blocks as 8-bit integers, with dtype = bfloat16 on a CPU
    compile: bool = False  # compile the decoding step: half a minute once, then several times as fast on a CPU

    def __post_init__(self):
        if self.stop == prepare.END:
            self.stop, self.stop_at_end = "", True
        config.within(self, 1, MANY, "n")
        config.within(self, 0, MANY, "beams", "best_of", "speculate", "draft_exit", "n_think")
        config.within(self, 1, 2 ** 31, "sequences", "length", "knn_k")
        config.within(self, 0, 2 ** 62, "max_new_tokens", "top_k", "soft_top_k", "limit")
        config.within(self, -1, 2 ** 62, "collapse_back")
        config.within(self, 0, 2 ** 63 - 1, "seed")
        config.within(self, 0, 1, "top_p", "min_p", "alpha", "knn_lambda")
        config.within(self, 0, 1000, "beta", "exit_decay")
        config.within(self, 1e-6, 1e9, "knn_temp")
        config.within(self, 1e-6, 1 - 1e-6, "risk", "confidence")
        config.within(self, 0.01, 100, "repetition_penalty")
        for name, off, low, high in (
                ("temperature", 0, 1e-3, 1000), ("gumbel", 0, 1e-3, 1000),
                ("exit_threshold", -1, 0, 1), ("collapse_threshold", -1, 0, 1000)):
            if getattr(self, name) != off:
                config.within(self, low, high, name)
        if self.exit and self.exit not in CONFIDENCE:
            raise ValueError(f"exit is one of {', '.join(CONFIDENCE)}, not {self.exit!r}")
        if self.collapse_by not in ("nearest", "context"):
            raise ValueError(f"collapse_by is nearest or context, not {self.collapse_by!r}")
        if not re.fullmatch("always|never|entropy|distance|every:[1-9][0-9]{0,17}", self.collapse):
            raise ValueError(f"collapse is always, never, entropy, distance or every:N, "
                             f"not {self.collapse!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is float32 or bfloat16, not {self.dtype!r}")
        for name in ("stop", "think_after"):
            of_utf8(getattr(self, name), name)
        ways = [k for k in ("soft", "exit", "speculate", "beams", "best_of") if getattr(self, k)]
        if len(ways) > 1:
            raise ValueError(f"{ways[0]} and {ways[1]} are two ways to decode; choose one")
        for k in ("beams", "best_of"):
            if 0 < getattr(self, k) < self.n:
                raise ValueError(f"{k} = {getattr(self, k)} cannot show n = {self.n} texts; give at least as many")
        for names, idle, why in IDLE:
            for name in names.split():
                if name in given(self) and idle(self):
                    raise ValueError(f"{name} {why}")


MANY = 10_000  # rows decoded side by side, or blocks, or tokens of a draft

SOFT = "soft_top_k gumbel collapse collapse_threshold collapse_by collapse_back"
LEAVE = "give that too, or leave it out"
IDLE = (  # settings that would do nothing, or not what they say: their names, when, and why
    ("soft", lambda c: c.temperature == 0,
     "needs a temperature above 0: at 0 a token has nothing soft about it"),
    (SOFT, lambda c: not c.soft, f"is for soft tokens, that is --soft; {LEAVE}"),
    ("soft_top_k gumbel collapse_by collapse_back", lambda c: c.collapse == "always",
     "is for soft tokens, and with collapse = always there are none; leave it out"),
    ("collapse_by collapse_back", lambda c: c.collapse == "never",
     "is for soft tokens that collapse, and with collapse = never none does; leave it out"),
    ("collapse_threshold", lambda c: c.collapse not in ("entropy", "distance"),
     "is for collapse = entropy or distance; leave it out"),
    ("collapse_by", lambda c: c.collapse_back == 0,
     "is for earlier soft tokens, and collapse_back = 0 leaves those as they are; choose one"),
    ("collapse_by", lambda c: c.knn and c.collapse_by == "context",
     "= context draws from the model alone; with knn take collapse_by = nearest"),
    ("exit_threshold exit_decay", lambda c: not c.exit,
     f"is for early exits, such as --exit=softmax; {LEAVE}"),
    ("speculate", lambda c: bool(c.draft_exit) == bool(c.draft),
     "needs a draft: either draft_exit or draft"),
    ("draft_exit draft", lambda c: not c.speculate,
     f"is for drafts, such as --speculate=4; {LEAVE}"),
    ("alpha beta", lambda c: not c.amateur,
     f"is for contrastive decoding, such as --amateur=context:8; {LEAVE}"),
    ("amateur", lambda c: c.exit or c.speculate,
     "reads every layer of every token, which exit and speculate save; choose one"),
    ("knn", lambda c: c.exit or c.speculate,
     "needs the last layer's vector of every token at once, which exit and speculate do without; "
     "choose one"),
    ("knn_k knn_lambda knn_temp", lambda c: not c.knn,
     f"is for a datastore, such as --knn=works.db; {LEAVE}"),
    ("knn_k knn_temp", lambda c: c.knn_lambda == 0,
     "is for a datastore, which has no say with knn_lambda = 0; leave it out"),
    ("knn_temp", lambda c: c.knn_k == 1,
     "weighs several places against each other, and knn_k = 1 takes one; leave it out"),
    ("memory_index", lambda c: not c.memory,
     f"is for a memory, such as --memory=facts.db; {LEAVE}"),
    ("temperature top_k top_p min_p repetition_penalty think_after", lambda c: c.beams,
     "is for draws, and beams look for the likeliest text and draw nothing; leave it out"),
    ("top_k top_p min_p best_of", lambda c: c.temperature == 0,
     "is for draws, and at temperature = 0 nothing is drawn; leave one of them out"),
    ("n beams best_of json trace_html n_think", lambda c: c.interactive,
     "does not go with interactive, which reads lines and shows one sample as it is made; "
     "leave it out"),
    ("prompt", lambda c: c.interactive and c.prompt in ("-", "FILE:-"),
     "and interactive both read standard input; choose one"),
    ("trace", lambda c: c.json,
     "colours text, and json prints none; choose one, or take trace_html"),
    ("int8", lambda c: c.dtype != "bfloat16",
     "needs dtype = bfloat16: beside fp32 torch's 8-bit product is slower than the plain one"),
)


def given(cfg):
    """Return the names of the settings that are not as they are by default."""
    return [f.name for f in fields(cfg) if getattr(cfg, f.name) != f.default]


def of_utf8(text, name):
    """Raise UserError where a text has bytes that are no UTF-8, for a shell half a character."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{name} is not UTF-8 text: {text[:80]!r}; convert it first")


# ---------------------------------------------------------------------------------------------------------------------
# choosing a token: small functions over logits (B, V)


def penalize(logits, seen, penalty):
    """Logits of the tokens in seen (B, V, bool) lowered: divided by the penalty if positive, multiplied if negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits, k):
    return logits.masked_fill(logits < logits.topk(min(k, logits.size(-1)))[0][:, -1:], -math.inf)


def keep_top_p(logits, p):
    """Keep the smallest set of most likely tokens whose probabilities reach p (nucleus, arXiv:1904.09751)."""
    sorted_, index = logits.sort(descending=True, dim=-1)
    probs = sorted_.softmax(-1)
    drop = probs.cumsum(-1) - probs >= p  # what stands before a token already reaches p
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), -math.inf)


def keep_min_p(logits, p):
    """Keep tokens at least p times as likely as the first (arXiv:2407.01082)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def contrast(expert, amateur, alpha, beta):
    """Contrastive decoding (O'Brien and Lewis 2023, arXiv:2309.09117): over the tokens at least alpha times as likely as
    the expert's first, (1 + beta) expert - beta amateur; the others are out."""
    if not alpha:
        return (1 + beta) * expert - beta * amateur
    return ((1 + beta) * expert - beta * amateur).masked_fill(keep_min_p(expert, alpha) == -math.inf, -math.inf)


def distribution(logits, cfg):
    """Probabilities (B, V) of the next token by the temperature and filters of the settings."""
    if cfg.temperature == 0:
        return torch.zeros_like(logits).scatter(1, logits.argmax(-1, keepdim=True), 1.0)
    logits = (logits - logits.amax(-1, keepdim=True)) / cfg.temperature
    if cfg.top_k:
        logits = keep_top_k(logits, cfg.top_k)
    if cfg.top_p < 1:
        logits = keep_top_p(logits, cfg.top_p)
    if cfg.min_p > 0:
        logits = keep_min_p(logits, cfg.min_p)
    return logits.softmax(-1)


def probabilities(logits, seen, cfg):
    """Of the next token (B, V), by all that the settings say of logits (B, V); seen (B, V): the tokens in each window."""
    if cfg.repetition_penalty != 1:
        logits = penalize(logits, seen, cfg.repetition_penalty)
    return distribution(logits, cfg)


def choose(p, generator):
    """A token per row (B,), drawn from p (B, V)."""
    return torch.multinomial(p, 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# early exit: how sure an exit is, and how sure is enough


def top_two(model, h):
    return model.to_logits(h)[0].softmax(-1).topk(2, dim=-1).values.unbind(-1)


CONFIDENCE = {  # of output vectors h (B, T, C) at an exit, and of those at the exit before it -> (B, T) in [0, 1]
    "softmax": lambda model, h, before: model.to_logits(h)[0].softmax(-1).amax(-1),
    "margin": lambda model, h, before: torch.sub(*top_two(model, h)),
    "cosine": lambda model, h, before: F.cosine_similarity(h.float(), before.float(), dim=-1).clamp(0, 1),
    "classifier": lambda model, h, before: model.sure(h).sigmoid(),
}


def exit_rule(model, kind, threshold, decay=0.0, total=1):
    """leave(h, before) for GPT.forward_with_exits: where the confidence is above the threshold; at 0 all leave. With decay it falls along
    the text (CALM, arXiv:2207.07061): leave.t, how many tokens were made before the first place of h, a number or one per row
    (B, 1) and negative within a prompt, is for the caller to set."""
    def leave(h, before):
        sure = CONFIDENCE[kind](model, h, before)
        if not decay:
            return sure > threshold if threshold > 0 else torch.ones_like(sure, dtype=torch.bool)
        t = (leave.t + torch.arange(h.size(1), device=h.device)).clamp(min=0)
        return sure > (0.9 * threshold + 0.1 * torch.exp(-decay * t / total)).clamp(0, 1)
    leave.t = 0
    return leave


THRESHOLDS = [0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.775, 0.75, 0.725, 0.7, 0.675, 0.65, 0.625, 0.6, 0.55, 0.5]  # from strict to lax


@torch.inference_mode()
def exit_risks(model, rows, kind, thresholds=THRESHOLDS, size=64):
    """For rows of text (n, T) and each threshold: the share of places whose first choice differs from the last layer's, and the
    mean of blocks run, (n, thresholds) each. Places see those before them as they left, so it is as if each row had been
    decoded token by token."""
    each = []
    for x in rows.split(size):
        full, of_x = model(x).logits.argmax(-1), []
        for t in thresholds:
            logits, deep = model.forward_with_exits(x, exit_rule(model, kind, t))
            of_x.append(torch.stack(((logits.argmax(-1) != full).float().mean(1), deep.float().mean(1))))
        each.append(torch.stack(of_x, -1))
    return torch.cat(each, 1).unbind(0)


def p_value(mean, n, risk):
    """Of the hypothesis that n independent losses in [0, 1] with this mean have an expectation above risk: the smaller of the
    bounds of Hoeffding and of Bentkus (Angelopoulos et al. 2021, arXiv:2110.01052)."""
    if mean >= risk:
        return 1.0
    kl = (mean * math.log(mean / risk) if mean else 0.0) + (1 - mean) * math.log((1 - mean) / (1 - risk))
    log_pmf = lambda k: (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(risk)
                         + (n - k) * math.log(1 - risk))
    below = sum(math.exp(log_pmf(k)) for k in range(math.ceil(n * mean - 1e-9) + 1))
    return min(math.exp(-n * kl), math.e * below, 1.0)


def laxest(risks, risk, confidence):
    """Learn then Test by fixed-sequence testing: risks (n, thresholds) of n sequences, thresholds from strict to lax -> the index
    of the last one before the first that is not shown to keep the risk; -1 where none is."""
    for i, mean in enumerate(risks.double().mean(0).tolist()):
        if p_value(mean, len(risks), risk) > 1 - confidence:
            return i - 1
    return risks.size(1) - 1


# ---------------------------------------------------------------------------------------------------------------------
# soft tokens: the next input is p @ E, until a policy says that it is time for a symbol


def soft_token(p, cfg, generator):
    """The distribution (B, V) that stands in the place of a token: the k most likely of p, stirred by Gumbel noise if
    asked (without it the first component dominates what the model makes of a mixture)."""
    logits = p.log()
    if cfg.soft_top_k:
        logits = keep_top_k(logits, cfg.soft_top_k)
    if cfg.gumbel:
        u = torch.rand(p.shape, generator=generator, device=p.device).clamp(1e-9, 1 - 1e-7)
        logits = (logits - (-u.log()).log()) / cfg.gumbel
    return logits.softmax(-1)


def similarity(p, table):
    """Cosine (B, V) between the expected embedding p @ E of a soft token and every row of the table E (V, C)."""
    return F.normalize(p @ table, dim=-1) @ F.normalize(table, dim=-1).T


def collapses(p, table, cfg, step):
    """Which rows (B,) choose a symbol now, by cfg.collapse. p (B, V): of the next token; step: tokens made so far."""
    kind, _, every = cfg.collapse.partition(":")
    limit = {"entropy": 0.5, "distance": 0.1}.get(kind) if cfg.collapse_threshold < 0 else cfg.collapse_threshold
    if kind == "entropy":
        return torch.special.entr(p).sum(-1) < limit
    if kind == "distance":
        return 1 - similarity(p, table).amax(-1) > limit
    now = kind == "always" or (kind == "every" and (step + 1) % int(every) == 0)
    return torch.full(p.shape[:1], now, device=p.device)


# ---------------------------------------------------------------------------------------------------------------------
# rows of text over a model


class Decoder:
    """B rows of tokens over a model: each its window, the ring of history behind it, and the cached state of both.

    `logits` (B, V) are always those of the next token. All that a row's future depends on are the ids it keeps, and what
    its soft tokens hold: when its window is full, the oldest quarter leaves for the ring at once (as ids), and slots and
    window are computed anew in one pass.
    """

    def __init__(self, model, rows, eot=None, compile=False, context=0, at_exit=0, leave=None, memory=None, sources=None, neighbours=None):
        """context: a window of so many tokens, and no history; at_exit: keep the logits `early` of the exit after so many blocks
        too; leave: an exit_rule by which tokens leave early; memory {block: Memory}: what blocks M find, and write to when the window is full
        (a copy of their own); sources {block: (store, ids (H, N))}: which entries those are; neighbours: what its logits are mixed with."""
        self.model, self.eot, self.at_exit, self.leave, self.made = model, eot, at_exit, leave, 0
        self.neighbours, self.sources = neighbours, sources or {}
        self.step = compiled(model) if compile else model
        self.T, self.H, self.V = model.cfg.block_size, model.cfg.history, model.cfg.vocab_size
        if context:
            self.T, self.H = min(context, self.T), 0
        self.memory, self.own = dict(memory or {}), False  # own: nobody else reads it
        self.carried, self.known = {}, [0] * len(rows)  # entries of the first known tokens of each window, as the one before had them
        self.rows = []  # (history, window) per row, lists of ids, oldest first
        self.soft = []  # per row {place in the window: distribution (V,)} of the tokens that are soft
        for ids in rows:
            self.rows.append(([], []))
            self.soft.append({})
            for token in ids:  # a prompt ends up where the same tokens would be, had they been generated
                self.keep(len(self.rows) - 1, token)
        self.fill()

    def keep(self, b, token, soft=None):
        """Append a token to row b, soft where its distribution (V,) is given; -> True if it folded."""
        ring, window = self.rows[b]
        fold = len(window) == self.T
        if fold:
            n = max(1, self.T // 4)
            if self.memory:
                self.write(b, n)
            ring.extend(window[:n])
            del window[:n]
            del ring[:max(0, len(ring) - self.H)]
            self.soft[b] = {at - n: p for at, p in self.soft[b].items() if at >= n}
        if soft is not None:
            self.soft[b][len(window)] = soft
        window.append(token)
        return fold

    @torch.inference_mode()
    def write(self, b, n):
        """Write into row b's memory what leaves its window with the first n tokens."""
        if not self.own:
            self.memory, self.own = {i: m.copy(len(self.known)) for i, m in self.memory.items()}, True
        state = self.state_of([b])
        self.read(self.model, self.inputs([0], self.T, [b]), state, self.history([b]), self.made - self.T)
        for i, parts in self.model.leave_window(state, torch.tensor([n], device=state.pos.device))[1].items():
            for t, new in zip(self.carried.setdefault(i, [t.repeat(len(self.known), *[1] * (t.dim() - 1)) for t in parts]), parts):
                t[b:b + 1] = new
        self.known[b] = self.T - n

    def state_of(self, rows):
        """An empty state for these rows, with what each finds besides its window."""
        if not self.memory:
            return self.model.init_state(len(rows))
        at = torch.tensor(rows, device=self.model.wte.weight.device)
        at = slice(rows[0], rows[0] + 1) if len(rows) == 1 else at  # of one row a view, to write to
        known = torch.tensor([self.known[b] for b in rows], device=self.model.wte.weight.device)
        return self.model.init_state(len(rows), memory={i: m.select(at) for i, m in self.memory.items()},
                                     carried={i: [t[at] for t in parts] for i, parts in self.carried.items()}, known=known)

    def inputs(self, first, width, rows=None):
        """What the model reads of each of these rows (all) from place first[i] on, `width` tokens padded at the right: ids (B,
        width), or where one of them is soft distributions (B, width, V); and the ids."""
        rows = range(len(self.rows)) if rows is None else rows
        ids = torch.tensor([(self.rows[b][1][f:f + width] + [0] * width)[:width] for f, b in zip(first, rows)],
                           device=self.model.wte.weight.device)
        soft = [(i, at - f, p) for i, (f, b) in enumerate(zip(first, rows)) for at, p in self.soft[b].items() if f <= at < f + width]
        if not soft:
            return ids, ids
        idx = F.one_hot(ids, self.V).float()
        for b, at, p in soft:
            idx[b, at] = p
        return idx, ids

    def history(self, rows=None):
        """The ring behind the window of these rows (all), as the model takes it; None where it has no slots."""
        if not self.H:
            return None
        rings = self.rows if rows is None else [self.rows[b] for b in rows]
        ring = np.array([[-1] * (self.H - len(r)) + r for r, _ in rings])
        return torch.from_numpy(prepare.forget(ring, self.eot)).to(self.model.wte.weight.device)

    @torch.inference_mode()
    def fill(self):
        """Slots, window and state from what is kept, in one pass over rows padded at the right."""
        lengths = torch.tensor([[len(w)] for _, w in self.rows], device=self.model.wte.weight.device)
        width = max(len(w) for _, w in self.rows)
        self.state = self.state_of(range(len(self.rows)))
        made = self.read(self.model, self.inputs([0] * len(self.rows), width), self.state, self.history(), self.made + 1 - lengths)
        short = width - lengths[:, 0]
        if bool(short.any()):
            self.state.rollback(short)
        self.take(made, width - 1 - short)
        return made[0]

    def read(self, model, inputs, state, history=None, t=None):
        """Logits over inputs, ids or distributions and ids (B, T), with `at_exit` those of the exit, with `leave` the blocks run, and
        without it what the head read. Tokens of a prompt leave early too: so the state is that of decoding from its first token. t, a
        number or (B, 1): how many tokens were made before the first of these."""
        idx, ids = inputs
        if self.leave is None:
            out = model(idx, history=history, state=state, at_exit=self.at_exit, ids=ids)
            return out.logits, out.early, None, out.h
        self.leave.t = self.made + 1 - idx.size(1) if t is None else t
        logits, depth = model.forward_with_exits(idx, self.leave, history, state)
        return logits, None, depth, None

    def take(self, made, last):
        """Note what `read` made of the last token of each row, which stands at place last (B,)."""
        at = torch.arange(len(self.rows), device=made[0].device), last
        self.logits, self.early, depth, h = (None if t is None else t[at] for t in made)
        self.found = [[] for _ in self.rows]  # per row [(store, id)]: the entries that told most about the next token
        if self.neighbours is not None:
            self.logits, self.found = self.neighbours.mix(self.logits, h)
        for i, places, weights in self.model.recalled(self.state) if self.sources else ():
            self.recall(*self.sources[i], places.flatten(1).tolist(), weights)
        self.depth = [self.model.cfg.n_layer] * len(self.rows) if depth is None else depth.tolist()

    def recall(self, store, ids, places, weights):
        """Note which entries of a store the last token of each row found: ids (H, N), places a list of H * k in each row, weights (B, H, k)."""
        for b, (at, w) in enumerate(zip(places, weights.flatten(1))):
            for j in w.topk(min(TRACED, len(w)))[1].tolist():
                h = j // weights.size(2)
                if w[j] > 0.05 and at[j] >= 0 and ids[h, at[j]] >= 0:
                    self.found[b].append((store, int(ids[h, at[j]])))

    @torch.inference_mode()
    def push(self, tokens, soft=None):
        """Append a token to each row, a list of B ids, or a soft one where soft[b] is a distribution (V,); -> logits
        (B, V) of the next."""
        if any([self.keep(b, t, soft and soft[b]) for b, t in enumerate(tokens)]):
            self.fill()
        else:
            self.take(self.read(self.step, self.inputs([len(w) - 1 for _, w in self.rows], 1), self.state), -1)
        return self.logits

    @torch.inference_mode()
    def extend(self, ids):
        """Append the same ids to every row, in one pass where they fit."""
        if not ids:
            return
        if any([self.keep(b, t) for b in range(len(self.rows)) for t in ids]):
            self.fill()
        else:
            self.take(self.read(self.model, self.inputs([len(w) - len(ids) for _, w in self.rows], len(ids)), self.state), -1)

    @torch.inference_mode()
    def harden(self, changes):
        """Put symbols in the place of soft tokens, changes {row: {place from the end (-1 is the last): id}}, and repair the
        cache: what stands from the first of them on is computed again, in one pass. Places that have left are passed by."""
        first = 0
        for b, places in changes.items():
            window = self.rows[b][1]
            for at, token in places.items():
                if -at <= len(window):
                    window[at] = token
                    del self.soft[b][len(window) + at]
                    first = min(first, at)
                    self.known[b] = min(self.known[b], len(window) + at)
        if not first:
            return
        if -first < min(len(w) for _, w in self.rows) and not self.carried:
            self.state.rollback(-first)
            self.take(self.read(self.model, self.inputs([len(w) + first for _, w in self.rows], -first), self.state), -1)
        else:
            self.fill()

    @torch.inference_mode()
    def select(self, rows):
        """A Decoder over these rows of this one; a row may be taken several times, and what it holds is computed once."""
        new = object.__new__(Decoder)
        new.__dict__.update(self.__dict__)
        new.rows = [(list(self.rows[r][0]), list(self.rows[r][1])) for r in rows]
        new.soft, new.known = [dict(self.soft[r]) for r in rows], [self.known[r] for r in rows]
        at = torch.tensor(rows, device=self.logits.device)
        new.memory = {i: m.select(at) for i, m in self.memory.items()}
        new.carried = {i: [t[at] for t in parts] for i, parts in self.carried.items()}
        self.own = new.own = False  # one row is shared until somebody writes
        new.state, new.logits = self.state.select(at), self.logits[at]
        new.early, new.depth = self.early[at] if self.at_exit else None, [self.depth[r] for r in rows]
        new.found = [self.found[r] for r in rows]
        return new

    def planned(self):
        """Whether the model plans chunks of tokens that can be read back: a level that stands first and sums them."""
        level = self.model.order[0]
        return isinstance(level, Level) and level.head is not None and level.chunk != "space"

    @torch.inference_mode()
    def plan_lines(self, tok):
        """For each chunk that row 0's window holds now, the tokens whose composition is nearest to the concept that is predicted
        from what stands before it, beside what was written."""
        device = self.model.wte.weight.device
        made = next(m for m in self.model.concepts(torch.tensor([self.rows[0][1]], device=device), self.history([0]))
                    if m.level is self.model.order[0])
        near = made.level.unbind(made.level.head(made.u)[0, :, 0]) @ rms_norm(self.model.wte.weight.float()).T  # (M + 1, chunk, V)
        k = near.size(1)
        lines = [f"{'planned':>{k + 10}} | written"]
        for plan, end, real in zip(near.argmax(-1).tolist(), made.end[0].tolist(), made.exists[0].tolist()):
            if real:
                lines.append(f"{tok.decode(plan)!r:>{k + 10}} | {tok.decode(self.rows[0][1][end + 1 - k:end + 1])!r}")
        return lines

    def seen(self):
        """(B, V) bool: the tokens in each row's window."""
        out = torch.zeros_like(self.logits, dtype=torch.bool)
        for b, (_, window) in enumerate(self.rows):
            out[b, window] = True
        return out


@torch.inference_mode()
def absorb(model, ids, piece=8192, rows=32):
    """Read ids into memory, without a gradient: pieces of the text are read side by side, each into a memory of its own, half a
    window at a time behind the half before. A text is one document. -> {block: [(keys (n, D), values (n, D), places in ids (n,)) for each head]}."""
    T, n, device = model.cfg.block_size, len(ids), model.wte.weight.device
    if list(model.init_memory(1, size=0)) == [model.blocks[-1].i] and model.cfg.mem_novelty > 1:
        piece = min(piece, 4 * T)  # what the last block finds changes nothing that is written, and little is searched faster
    ids = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    firsts, H, D = torch.arange(0, n, max(piece, T)), model.cfg.mem_head, model.cfg.mem_dim
    found = {i: [[torch.empty(n, D, dtype=m.keys.dtype), torch.empty(n, D, dtype=m.keys.dtype), torch.empty(n, dtype=torch.long), 0] for _ in range(H)]
             for i, m in model.init_memory(1, size=0).items()}  # room for all: a position is written once (what is not filled takes no memory)
    for first in prepare.bar(firsts.split(rows), desc="read"):
        last, start, carried = (first + max(piece, T)).clamp(max=n), (first - T // 2).clamp(min=0), None
        memory, known = model.init_memory(len(first), size=int((last - start).max())), torch.zeros_like(first)
        source = {i: torch.full(m.usage.shape, -1) for i, m in memory.items()}
        while bool((start < last).any()):
            x = ids[(start[:, None] + torch.arange(min(T, n))).clamp(max=n - 1)].to(device)
            state = model.init_state(len(first), memory=memory, carried=carried, known=known.to(device))
            model(x, state=state)
            left = torch.where(last - start > T, max(T // 2, 1), last - start)
            wrote, carried = model.leave_window(state, left.to(device))
            for i, w in wrote.items():
                slot, at, better = (t.cpu() for t in w)
                source[i].scatter_(2, slot, torch.where(better, start[:, None, None] + at, source[i].gather(2, slot)))
            start, known = start + left, T - left
        for i, m in memory.items():
            there = (m.usage > 0) & (source[i] >= first[:, None, None]).to(device)  # what was read before it is another piece's
            for h, of in enumerate(found[i]):
                new = [t[:, h][there[:, h]] for t in (m.keys, m.values, source[i].to(device))]
                for all_, t in zip(of, new):
                    all_[of[3]:of[3] + len(t)] = t
                of[3] += len(new[0])
    return {i: [tuple(t[:size] for t in of) for *of, size in heads] for i, heads in found.items()}


def learn_memory(store, model, tok, ids):
    """Read a text, a list of ids, into a Store of the kind "memory"; the text of an entry ends in what it brings back."""
    total, (said, spans) = 0, passages(tok, ids)
    with store.batch():
        source = store.state()["next"]
        for i, heads in absorb(model, ids).items():
            for h, (keys, values, place) in enumerate(heads):
                store.add(i, np.full(len(keys), h), keys.float().numpy(), values.float().numpy(), [said(p) for p in place.tolist()],
                          spans=spans[place.numpy()], source=source)
                total += len(keys)
    return total


def passages(tok, ids, width=40):
    """Of a text, a list of ids: a function that gives the last `width` bytes up to the end of a token, and the bytes (n, 2) that each
    token stands on. A token that ends inside a character stands on all of it."""
    pieces = [tok.decode_bytes([i]) for i in ids]
    raw, stop = b"".join(pieces), np.cumsum([len(p) for p in pieces])
    start = np.append(0, stop[:-1])
    for _ in range(3):
        stop = stop + [i < len(raw) and raw[i] & 0xC0 == 0x80 for i in stop.tolist()]
    return lambda t: raw[max(stop[t] - width, 0):stop[t]].decode(errors="ignore"), np.stack((start, stop), 1)


def open_memory(store, model, room, index=False):
    """What a Store holds as (memory {block: Memory} of one row with `room` for more, sources {block: (store, ids (H, N))})."""
    found, sources = {}, {}
    for i in model.init_memory(1, size=0):
        a = store.arrays(i)
        if not len(a["ids"]):
            raise UserError(f"store {store.path} has no entries of block {i}; python sample.py "
                            f"learn --memory={shlex.quote(store.path)} FILE fills it")
        found[i] = [tuple(torch.from_numpy(a[k][a["head"] == h].astype(np.float32)) for k in ("keys", "values"))
                    for h in range(model.cfg.mem_head)]
        ids = np.full((model.cfg.mem_head, max(len(k) for k, _ in found[i])), -1)
        for h in range(model.cfg.mem_head):
            ids[h, :(a["head"] == h).sum()] = a["ids"][a["head"] == h]
        sources[i] = store, ids
    return remembered(model, found, room, index), sources


def remembered(model, found, room=0, index=False):
    """What absorb found as told, {block: Memory} of one row with room for what is read besides; index: search it by one."""
    memory = model.init_memory(1, size=room)
    for i, heads in found.items():
        told = model.init_memory(1, size=max(len(keys) for keys, *_ in heads))[i]
        for h, (keys, values, *_) in enumerate(heads):
            told.keys[0, h, :len(keys)], told.values[0, h, :len(keys)], told.usage[0, h, :len(keys)] = keys, values, 1.0
        told.index = [Clusters(keys.size(1)) for keys, *_ in heads] if index else None
        for clusters, (keys, *_) in zip(told.index or (), heads):
            clusters.add(keys)
        memory[i].store = told
    return memory


def compiled(model):
    """The model with its forward compiled, and what decoding runs in pieces compiled piece by piece: shapes are those of one
    token, or of one draft. Shares the weights."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # a graph for each piece between exits
    fast = copy.copy(model)
    for name in ("run", "remember", "forward_early", "forward_remainder", "forward"):
        setattr(fast, name, torch.compile(getattr(model, name), dynamic=False))
    return fast


class Int8(torch.nn.Module):
    """A Linear with its weights as 8-bit integers and a scale per output (torch's own weight-only
    product; it reads past the end of rows that are no multiple of 16 long, so they are padded)."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        w = linear.weight.detach().float()
        scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.pad = 0, -self.in_features % 16
        self.register_buffer("q", F.pad((w / scale).round().to(torch.int8), self.pad).contiguous())
        self.register_buffer("scale", scale[:, 0].to(linear.weight.dtype))
        self.bias = linear.bias

    def rows(self, x, first=0, last=None):
        x = F.pad(x, self.pad).contiguous()
        q, scale = self.q[first:last], self.scale[first:last]
        y = torch._weight_int8pack_mm(x.view(-1, x.size(-1)), q, scale).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[first:last].to(y.dtype)

    def forward(self, x):
        return self.rows(x)


def to_int8(model):
    """Put Int8 in the place of every Linear of the blocks."""
    for part in (*model.blocks.modules(), *model.levels.modules()):
        for name, child in part.named_children():
            if isinstance(child, Linear):
                setattr(part, name, Int8(child))
    return model


@dataclass
class GeneratedToken:
    """A token of a sample."""
    token: int  # its id
    soft: bool = False  # whether it was made soft
    entropy: float = 0.0  # of its choice, nats
    behind: list | tuple = ()  # which places before it (-1 is the one before) were soft when it was chosen
    logp: float = 0.0  # its log-probability under the model, without filters
    depth: int | None = None  # blocks after which it was chosen
    drafted: bool | None = None  # whether a draft proposed it
    shift: float | None = None  # contrastive: by how much its log-probability rose
    found: list | tuple = ()  # [(store, id)]: the entries that told most about it


def next_token(expert, amateur, cfg):
    """Probabilities (B, V) of the next token by all that the settings say."""
    return probabilities(contrasted(expert, amateur, cfg), expert.seen() if cfg.repetition_penalty != 1 else None, cfg)


def log_probability(logits, tokens):
    """Of a token per row, a list of B ids, under logits (B, V): a list."""
    at = torch.tensor(tokens, device=logits.device)[:, None]
    return logits.float().log_softmax(-1).gather(1, at)[:, 0].tolist()


def contrasted(expert, amateur, cfg):
    """The expert's logits (B, V), against those of an amateur or of an exit where there is one."""
    logits, weak = expert.logits.float(), expert.early if amateur is None else amateur.logits
    return logits if weak is None else contrast(logits, weak.float(), cfg.alpha, cfg.beta)


def collapse_earlier(expert, amateur, rows, made, cfg, generator):
    """The soft tokens of `rows` become symbols, in place: the nearest one, which is the id that stands there already, or one
    drawn from what the model expects there in a pass over the whole window. made: what waits to be shown, per row, is
    corrected. -> True if there was any."""
    rows = [b for b in rows if expert.soft[b]] if cfg.collapse_back else []
    if not rows:
        return False
    logits, changes = expert.fill() if cfg.collapse_by == "context" else None, {}
    for b in rows:
        window = expert.rows[b][1]
        for at in sorted(expert.soft[b])[-max(cfg.collapse_back, 0):]:
            token = window[at]
            if logits is not None and at:
                token = choose(distribution(logits[b, at - 1:at].float(), cfg), generator).item()
            place = at - len(window)  # from the end, which all decoders have in common
            changes.setdefault(b, {})[place] = token
            if -place <= len(made[b]):
                made[b][place].token = token
    for d in (expert, amateur):
        if d is not None:
            d.harden(changes)
    return True


def generate(expert, cfg, amateur=None, generator=None, think=((), ())):
    """Yield lists of B lists of GeneratedToken, cfg.max_new_tokens for each row in all, and push them into expert (and amateur).
    Mostly a step gives one token a row; a soft token that will be chosen in context comes when it has collapsed.
    think = (delimiter ids, ids): ids that follow of themselves whenever a row ends with the delimiter."""
    B, table = expert.logits.size(0), expert.model.wte.weight.detach().float()
    made, forced = [[] for _ in range(B)], [[] for _ in range(B)]  # what waits to be shown; what follows of itself
    delimiter, thoughts = list(think[0]), list(think[1])
    for step in range(cfg.max_new_tokens):
        expert.made = step
        p, hard, soft = next_token(expert, amateur, cfg), [True] * B, [None] * B
        if cfg.soft:
            now = collapses(p, table, cfg, step).tolist()
            if collapse_earlier(expert, amateur, [b for b in range(B) if now[b] and not forced[b]], made, cfg, generator):
                p = next_token(expert, amateur, cfg)
            hard = [n or bool(f) for n, f in zip(now, forced)]
        entropy = torch.special.entr(p).sum(-1).tolist()
        tokens = choose(p, generator).tolist()
        if not all(hard):
            mixed = soft_token(p, cfg, generator)
            near = similarity(mixed, table).argmax(-1).tolist()
            tokens = [t if h else n for t, h, n in zip(tokens, hard, near)]
            soft = [None if h else m for h, m in zip(hard, mixed)]
        tokens = [f.pop(0) if f else t for t, f in zip(tokens, forced)]
        logp = log_probability(expert.logits, tokens)
        shift = [None] * B
        if amateur is not None or expert.early is not None:
            shift = [a - b for a, b in zip(log_probability(contrasted(expert, amateur, cfg), tokens), logp)]
        ready = []
        for b, token in enumerate(tokens):
            behind = sorted(at - len(expert.rows[b][1]) for at in expert.soft[b])
            made[b].append(GeneratedToken(token, not hard[b], entropy[b], behind, logp[b], expert.depth[b] if expert.leave else None,
                                shift=shift[b], found=expert.found[b]))
            recent = expert.rows[b][1][-len(delimiter):] + [token]
            if delimiter and recent[-len(delimiter):] == delimiter:
                forced[b] = list(thoughts)
            waits = behind + [0] * (not hard[b]) if cfg.collapse_by == "context" and cfg.collapse != "never" else []
            n = len(made[b]) + min(waits, default=1) - 1
            ready.append(made[b][:max(n, 0)])
            del made[b][:max(n, 0)]
        yield ready
        for d in (expert, amateur):
            if d is not None:
                d.push(tokens, soft)
    if any(made):
        yield made


def residual(p, q):
    """What is left of p (B, V) where q (B, V) has drawn and been refused: max(p - q, 0), to sum 1."""
    left = (p - q).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp(min=1e-30), p)


class Speculation:
    """Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) over a Decoder, cfg.speculate tokens ahead: a draft proposes
    them one by one, the model verifies them in one pass, and what is kept is distributed exactly as the model's own. The draft
    is another Decoder (a smaller model), or the model's first blocks up to an exit, which then verifies from there on
    (LayerSkip, arXiv:2404.16710): both share one cache."""

    def __init__(self, expert, cfg, generator, draft=None):
        self.expert, self.cfg, self.generator, self.draft = expert, cfg, generator, draft
        self.place = expert.model.exit_place(cfg.draft_exit) if draft is None else None
        self.proposed = self.accepted = 0

    def decoders(self):
        return [d for d in (self.expert, self.draft) if d is not None]

    def propose(self, tokens, n, seen):
        """n tokens after tokens (B,): drafted (B, n), their distributions n x (B, V), and what the model goes on from, (B, n + 1, C).
        The draft's state then stands behind them all."""
        drafted, q, hidden = [], [], []
        for i in range(n + 1):
            if self.draft is None:
                x, logits = self.expert.step.forward_early(tokens[:, None], self.expert.state, self.place)
                hidden.append(x.clone())  # (a compiled graph may use its memory again)
            else:
                logits = self.draft.step(tokens[:, None], state=self.draft.state).logits
            if i == n:
                break
            seen = seen.scatter(1, tokens[:, None], True)
            q.append(probabilities(logits[:, -1].float(), seen, self.cfg))
            tokens = choose(q[-1], self.generator)
            drafted.append(tokens)
        return torch.stack(drafted, 1), q, torch.cat(hidden, 1) if hidden else None

    def verify(self, tokens, hidden):
        """The model's logits (B, n + 1, V) after each of tokens (B, n + 1)."""
        if hidden is None:
            return self.expert.step(tokens, state=self.expert.state).logits
        self.expert.state.rollback(tokens.size(1))
        return self.expert.step.forward_remainder(hidden, tokens, self.expert.state, self.place)

    def judge(self, first, drafted, q, logits):
        """Keep of drafted (B, n), drawn from q (n x (B, V)) behind the tokens first (B,), what the model's logits (B, n + 1, V) agree to.
        -> how many of each row (B,), the token that follows those (B,), and the distribution at each place, n + 1 x (B, V)."""
        n, at, seen, p = drafted.size(1), torch.arange(len(first), device=first.device), self.expert.seen(), []
        kept, follows = torch.zeros_like(first), torch.zeros_like(first)
        going = torch.ones_like(first, dtype=torch.bool)
        for i in range(n + 1):
            seen = seen.scatter(1, (drafted[:, i - 1] if i else first)[:, None], True)
            p.append(probabilities(logits[:, i], seen, self.cfg))
            yes, left = torch.zeros_like(going), p[i]
            if i < n:
                odds = p[i][at, drafted[:, i]] / q[i][at, drafted[:, i]]
                yes = going & (torch.rand(len(first), generator=self.generator, device=at.device) < odds)
                left = residual(p[i], q[i])
            follows = torch.where(going & ~yes, choose(left, self.generator), follows)
            kept, going = kept + yes, yes
        return kept, follows, p

    @torch.inference_mode()
    def generate(self):
        """Yield lists of B lists of GeneratedToken: as generate does, but several tokens at once."""
        cfg, B = self.cfg, len(self.expert.rows)
        at, count, n = torch.arange(B, device=self.expert.logits.device), [0] * B, cfg.speculate
        p, first = next_token(self.expert, None, cfg), None
        while min(count) < cfg.max_new_tokens:
            first = choose(p, self.generator) if first is None else first
            logp, entropy = log_probability(self.expert.logits, first.tolist()), torch.special.entr(p).sum(-1).tolist()
            ready = [[GeneratedToken(t, entropy=e, logp=l, drafted=False)] for t, e, l in zip(first.tolist(), entropy, logp)]
            if min(d.T - len(w) for d in self.decoders() for _, w in d.rows) <= n:  # somebody is about to fold
                for d in self.decoders():
                    d.push(first.tolist())
                p, first = next_token(self.expert, None, cfg), None
            else:
                drafted, q, hidden = self.propose(first, n, self.expert.seen())
                logits = self.verify(torch.cat((first[:, None], drafted), 1), hidden).float()
                kept, first, each = self.judge(first, drafted, q, logits)
                for i in range(int(kept.max())):
                    logp, entropy = log_probability(logits[:, i], drafted[:, i].tolist()), torch.special.entr(each[i]).sum(-1).tolist()
                    for b in (kept > i).nonzero()[:, 0].tolist():
                        ready[b].append(GeneratedToken(drafted[b, i].item(), entropy=entropy[b], logp=logp[b], drafted=True))
                for d in self.decoders():
                    d.state.rollback(n - kept)
                    for b, tokens in enumerate(ready):
                        for made in tokens:
                            d.keep(b, made.token)
                self.expert.logits, p = logits[at, kept], torch.stack(each)[kept, at]
                self.proposed, self.accepted = self.proposed + B * n, self.accepted + int(kept.sum())
            yield [row[:max(cfg.max_new_tokens - c, 0)] for row, c in zip(ready, count)]
            count = [c + len(row) for c, row in zip(count, ready)]


def gather(steps, B):
    """All that an iterator of decoding steps gives: a list of GeneratedToken for each of B rows."""
    rows = [[] for _ in range(B)]
    for ready in steps:
        for row, tokens in zip(rows, ready):
            row += tokens
    return rows


@torch.inference_mode()
def beam_search(expert, cfg, tok, amateur=None):
    """The cfg.beams likeliest texts found from each row of expert (a Decoder over G rows), by the sum of log-probabilities; a
    text that has ended grows no more. -> G lists of lists of GeneratedToken, the likeliest first (by its
    mean, as lengths differ)."""
    G, N = len(expert.rows), cfg.beams
    expert, amateur = (d and d.select([g for g in range(G) for _ in range(N)]) for d in (expert, amateur))
    device, V = expert.logits.device, expert.V
    score = torch.full((G, N), -math.inf, device=device)
    score[:, 0] = 0.0  # the beams of a row are the same at first
    texts = [([], new_text(cfg, tok, expert.model.cfg)) for _ in range(G * N)]
    for _ in range(cfg.max_new_tokens):
        logits = contrasted(expert, amateur, cfg)
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1).tolist()
        logp = logits.log_softmax(-1)
        done = torch.tensor([t.done for _, t in texts], device=device)
        still = torch.full((V,), -math.inf, device=device)
        still[0] = 0.0  # a finished text has one way to go on, at no cost
        step = torch.where(done[:, None], still, logp)
        score, best = (score[..., None] + step.view(G, N, V)).flatten(1).topk(N)
        parents = (best // V + torch.arange(G, device=device)[:, None] * N).flatten().tolist()
        tokens, grown = (best % V).flatten().tolist(), []
        for parent, token in zip(parents, tokens):
            made, text = texts[parent]
            text = copy.copy(text)
            if not text.done:
                text.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
                text.utf8.setstate(texts[parent][1].utf8.getstate())
                text.add(token)
                made = made + [GeneratedToken(token, entropy=entropy[parent], logp=step[parent, token].item())]
            grown.append((made, text))
        texts = grown
        if all(t.done for _, t in texts):
            break
        for d in (expert, amateur):
            if d is not None:
                d.__dict__.update(d.select(parents).__dict__)
                d.push(tokens)
    found = [[made for (made, _), s in zip(texts[g * N:], score[g].tolist()) if s > -math.inf] for g in range(G)]
    return [sorted(group, key=likelihood, reverse=True) for group in found]


def likelihood(made):
    """The mean log-probability of a text of GeneratedToken."""
    return sum(m.logp for m in made) / max(len(made), 1)


class Text:
    """The text of one row as its tokens come in: whole characters only, ended before the stop
    string or by the token `last`. It holds no more than what may begin the stop string."""

    def __init__(self, tokenizer, stop="", silent=None, last=None):
        self.tok, self.stop, self.held, self.done = tokenizer, stop, "", False
        self.silent, self.last = silent, last  # silent: the think token, which is no text
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token):
        """Take a token; -> the text that is now certain to stand."""
        if self.done or token == self.silent:
            return ""
        if token == self.last:
            out, self.done = self.end(), True
            return out
        self.held += self.utf8.decode(self.tok.decode_bytes([token]))
        sure = len(self.held)
        if self.stop:
            at = self.held.find(self.stop)
            self.done = at >= 0
            if self.done:
                out, self.held = self.held[:at], ""
                return out
            begun = (n for n in range(min(len(self.stop) - 1, sure), 0, -1)
                     if self.held.endswith(self.stop[:n]))
            sure -= next(begun, 0)  # the stop string may have begun
        out, self.held = self.held[:sure], self.held[sure:]
        return out

    def end(self):
        """-> what was held back."""
        out, self.held = self.held + ("" if self.done else self.utf8.decode(b"", True)), ""
        return out


def new_text(cfg, tok, mcfg):
    """Return the Text of a sample that begins."""
    silent = mcfg.think_token if mcfg.n_think else None
    return Text(tok, cfg.stop, silent, tok.eot if cfg.stop_at_end else None)


# ---------------------------------------------------------------------------------------------------------------------
# the store: entries with a key, a value and the text they came from, in one file of SQL


TABLES = ("CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
          "CREATE TABLE entries (id INTEGER PRIMARY KEY, layer INTEGER NOT NULL, "
          "head INTEGER NOT NULL, source INTEGER NOT NULL, start INTEGER NOT NULL, "
          "stop INTEGER NOT NULL, checksum INTEGER NOT NULL, uses INTEGER NOT NULL, "
          "worth REAL NOT NULL, last REAL NOT NULL, use_checksum INTEGER NOT NULL, "
          "key BLOB NOT NULL, value BLOB NOT NULL, text TEXT NOT NULL)")
SCHEMA = {("table", "facts", TABLES[0]), ("table", "entries", TABLES[1]),
          ("index", "sqlite_autoindex_facts_1", None)}
FACTS = "format", "kind", "model", "key", "value"  # what never changes about a store
COLUMNS = ("id, layer, head, key, value, text, source, start, stop, checksum, "
           "uses, worth, last, use_checksum")
USES = "id, layer, uses, worth, last, use_checksum"
STORE_FORMAT = "3"
BROKEN = sqlite3.DatabaseError, UnicodeError  # what reading a damaged file may raise
HALF_LIFE = 7 * 24 * 3600.0  # seconds after which a use counts half when entries are pruned
AGAIN = "learn its texts with this model, into a new file"  # what to do about a store of no use
LARGEST = 2 ** 16  # bytes of an entry, besides its key and its value


def connect(path, write):
    """(a connection of the standard library's sort (PEP 249, `?` for parameters), whether the database is empty): another database would
    come in here. A commit is on the disk when it returns, readers go on while somebody writes, and deleting gives room back."""
    db = sqlite3.connect(f"file:{urllib.parse.quote(os.fsencode(os.path.abspath(path)))}?mode={'rwc' if write else 'rw'}", uri=True, timeout=10)
    db.text_factory = lambda raw: raw.decode(errors="replace")  # a damaged text is for the checksum to find
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 16 * LARGEST)
    db.execute("PRAGMA trusted_schema = OFF")
    empty = not db.execute("PRAGMA schema_version").fetchone()[0]
    if write and empty:
        db.execute("PRAGMA auto_vacuum = FULL")
    db.execute("PRAGMA synchronous = FULL" if write else "PRAGMA query_only = ON")  # (a reader that could not write would leave files behind)
    return db, empty


def checksum(i, layer, head, key, value, text, source, start, stop):
    """CRC-32 of what an entry says: it finds every flipped bit and every damage of up to 32 bits in a row."""
    return zlib.crc32(f"{i} {layer} {head} {len(key)} {source} {start} {stop} {text}".encode(), zlib.crc32(value, zlib.crc32(key)))


def use_checksum(i, layer, uses, worth, last):
    """Return the CRC-32 of how an entry was used."""
    return zlib.crc32(f"{i} {layer} {uses} {worth} {last}".encode())


def uses_whole(i, layer, uses, worth, last, found):
    """Tell whether the USES of an entry are as they were written, of their types too."""
    said = i, layer, uses, worth, last
    return [type(v) for v in said] == [int, int, int, float, float] and \
        use_checksum(*said) == found and 0 <= uses < 2 ** 53 and 0 < worth < 2 ** 53 and \
        0 <= last < 2 ** 36  # (a time before the year 4147)


def facts_checksum(facts):
    """CRC-32 of what does not change in the facts of a store."""
    return str(zlib.crc32(str([facts.get(k) for k in FACTS]).encode()))


def shape_of(said):
    """Return (numbers, type) of keys or values as a store says them, such as "64 float16"."""
    n, t = re.fullmatch("([1-9][0-9]{0,5}) (float16|float32|int32)", said).groups()
    return int(n), np.dtype(t).newbyteorder("<")


class Store:
    """Entries of a memory or a datastore on disk, one file, as numpy arrays to the outside. Each belongs to a layer and a head, and has a
    key (D,), a value (E,), the end of the text that led to it, where in that text it stands, how often and when last it was used, and a
    checksum. One process writes at a
    time, any number read and see what is committed. What `batch` writes is on the disk when it ends, whole, or not at all; so a
    process may be killed at any moment.

    model: what the entries belong to (prepare.checkpoint_id); kind: "memory" or "knn"; key, value: (D, type), (E, type) of numpy. A
    store that says something else is refused; None takes what it says. A new one needs them all."""

    def __init__(self, path, model=None, kind=None, key=None, value=None, write=False):
        self.path, self.depth, self.held, self.db = str(path), 0, None, None
        wanted = {"format": STORE_FORMAT, "kind": kind, "model": model, "key": key and f"{key[0]} {key[1]}",
                  "value": value and f"{value[0]} {value[1]}"}
        if os.path.isdir(path):
            raise UserError(f"store {path} is a folder; name a file")
        if not os.path.isfile(path) and (not write or None in wanted.values()):
            raise UserError(f"store {path} does not exist; python sample.py learn makes one")
        lock = f"{path}.lock"
        if write and os.path.isfile(lock) and os.path.getsize(lock):
            raise UserError(f"{lock} holds something, and a store at {path} needs an empty file of "
                            f"that name; choose another name")
        try:
            if write:
                self.held = prepare.hold(lock, f"store {path} is being written by another process; "
                                               f"wait for it to end")
            self.db, empty = connect(path, write)
            if write and empty:
                self.create(wanted)
            self.recognize()
            self.check(wanted)
            if write:
                self.db.execute("PRAGMA journal_mode = WAL")
        except OSError as e:
            self.close()
            raise UserError(f"store {path} cannot be opened ({e.strerror or e}); choose another place") from None
        except BROKEN as e:
            self.close()
            why = summary(e)
            raise UserError(f"{path} is not a store of this project, or it is damaged ({why}); "
                            f"nothing in it was changed, name another file") from None
        except UserError:
            self.close()
            raise

    def create(self, facts):
        """Make the tables of a new store, and write what it is."""
        if None in facts.values():
            raise UserError(f"store {self.path} is empty; python sample.py learn fills it")
        facts = {**facts, "checksum": facts_checksum(facts), "state": ""}
        self.db.execute("BEGIN")
        for table in TABLES:
            self.db.execute(table)
        self.db.executemany("INSERT INTO facts (name, value) VALUES (?, ?)", facts.items())
        self.put_state({"next": 1, "counts": {}})
        self.db.commit()

    def recognize(self):
        """Read what the store is. sqlite3.DatabaseError unless the file has our tables, each page
        in its place, and nothing else: a view or a trigger of somebody else's is never run."""
        schema = set(self.db.execute("SELECT type, name, sql FROM sqlite_master LIMIT 4"))
        if schema != SCHEMA:
            if {row[:2] for row in schema} == {row[:2] for row in SCHEMA}:
                raise UserError(f"store {self.path} was made by another version of this program; "
                                f"{AGAIN}")
            raise sqlite3.DatabaseError("it has other tables")
        found = self.db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        self.facts = dict(self.db.execute("SELECT name, value FROM facts LIMIT 8"))
        if set(self.facts) != {*FACTS, "checksum", "state"} or \
                self.facts["checksum"] != facts_checksum(self.facts):
            raise sqlite3.DatabaseError("the checksum of its facts does not fit")
        try:
            self.D, self.key_type = shape_of(self.facts["key"])
            self.E, self.value_type = shape_of(self.facts["value"])
        except AttributeError:
            raise sqlite3.DatabaseError("it says nothing of its keys and values") from None
        self.sizes = self.D * self.key_type.itemsize, self.E * self.value_type.itemsize
        self.db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, sum(self.sizes) + LARGEST)

    def check(self, wanted):
        """UserError unless the store is what is wanted."""
        for name, value in wanted.items():
            if value is not None and self.facts.get(name) != value:
                found = self.facts[name]
                raise UserError(f"store {self.path} " + (
                    f"belongs to another model ({found}, this one is {value}); {AGAIN}"
                    if name == "model" else
                    f"has {name} {found}, not {value}; give the right one, or {AGAIN}"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """What was not committed is gone."""
        if self.db is not None:
            self.db.close()
        if self.held is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.held.name)
            self.held.close()
        self.db = self.held = None

    @contextlib.contextmanager
    def asking(self):
        """The database's own errors as sentences."""
        try:
            yield
        except sqlite3.OperationalError as e:
            raise UserError(f"store {self.path} cannot be used ({e}); what was committed before is untouched") from None
        except BROKEN as e:
            raise UserError(f"store {self.path} is damaged ({e}); put a copy of it back, or "
                            f"{AGAIN}") from None

    @contextlib.contextmanager
    def batch(self):
        """What is written inside goes to the disk together when the outermost batch ends, and is taken back if it fails."""
        self.depth += 1
        try:
            with self.asking():
                yield
                if self.depth == 1:
                    self.db.commit()
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.db.rollback()
            raise
        finally:
            self.depth -= 1

    def add(self, layer, heads, keys, values, texts, now=None, spans=None, source=None):
        """Write n entries of a layer: heads (n,), keys (n, D), values (n, E) and n texts -> their ids (n,). An id is never given
        twice. now: when, in seconds since 1970. spans (n, 2): the bytes of the text read, `source`, that each brings back, the last of
        its own text; without them each text is whole and its own source."""
        n, now = len(texts), time.time() if now is None else float(now)
        keys, values = (np.ascontiguousarray(a, dtype=t).reshape(n, m) for a, t, m in (
            (keys, self.key_type, self.D), (values, self.value_type, self.E)))
        with self.batch():
            state = self.state()
            first = state["next"]
            spans = [(0, len(t.encode())) for t in texts] if spans is None else np.asarray(spans).tolist()
            said = zip(range(first, first + n), [layer] * n, np.asarray(heads).tolist(), map(bytes, keys), map(bytes, values), texts,
                       range(first, first + n) if source is None else [source] * n, *zip(*spans))
            uses = 0, 1.0, now
            self.db.executemany(
                f"INSERT INTO entries ({COLUMNS}) VALUES ({', '.join('?' * 14)})",
                ((*s, checksum(*s), *uses, use_checksum(s[0], layer, *uses)) for s in said))
            state["counts"][str(layer)] = state["counts"].get(str(layer), 0) + n
            self.put_state({"next": first + n, "counts": state["counts"]})
        return np.arange(first, first + n)

    def state(self):
        """What changes about a store as a whole: the next id, and how many entries each layer has, so that one that a damaged page hides
        is missed."""
        try:
            found = self.db.execute("SELECT value FROM facts WHERE name = 'state'").fetchone()
            state = prepare.unseal(found[0])
            if all(type(n) is int and 0 <= n < 2 ** 53 and int(layer) < 2 ** 31
                   for layer, n in (("0", state["next"]), *state["counts"].items())):
                return state
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise sqlite3.DatabaseError("what it says of its entries cannot be read") from None

    def count(self):
        """Return how many entries the store says that it has."""
        with self.asking():
            return sum(self.state()["counts"].values())

    def put_state(self, state):
        sealed = prepare.seal(state).decode()
        self.db.execute("UPDATE facts SET value = ? WHERE name = 'state'", (sealed,))

    @contextlib.contextmanager
    def snapshot(self):
        """What is read inside is of one moment, whoever writes."""
        with self.asking():
            alone = not self.db.in_transaction
            if alone:
                self.db.execute("BEGIN")
            try:
                yield
            finally:
                if alone and self.db.in_transaction:
                    self.db.rollback()

    def entries(self, where="", *values, size=4096):
        """Lists of entries, tuples of COLUMNS in the order of their ids."""
        with self.asking():
            rows = self.db.execute(f"SELECT {COLUMNS} FROM entries {where} ORDER BY id", values)
            while some := rows.fetchmany(size):
                yield some

    def whole(self, entry):
        """Tell whether an entry, a tuple of COLUMNS, is as it was written."""
        said, (found, *uses) = entry[:9], entry[9:]
        return [type(v) for v in said] == [int, int, int, bytes, bytes, str, int, int, int] and \
            checksum(*said) == found and uses_whole(*entry[:2], *uses) and \
            (len(entry[3]), len(entry[4])) == self.sizes and 0 <= entry[2] < 2 ** 31

    def arrays(self, layer):
        """All entries of a layer in the order of their ids: {"ids" (n,), "head" (n,), "keys" (n, D), "values" (n, E), "uses" (n,),
        "last" (n,)}. UserError names a damaged one."""
        raw = lambda blobs, t, m: np.frombuffer(b"".join(blobs), dtype=t).reshape(-1, m)
        parts, bad, n = [self.columns([], raw)], [], 0
        with self.snapshot():
            for some in self.entries("WHERE layer = ?", layer):
                wrong = [e[0] for e in some if not self.whole(e)]
                bad, n = bad + wrong, n + len(some)
                if not bad:
                    parts.append(self.columns(some, raw))
            told = self.state()["counts"].get(str(layer), 0)
        self.sound(bad)
        if n != told:
            self.uses()  # names an entry that says another layer
        self.complete(layer, n, told)
        found = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        for k in ("keys", "values"):
            self.sound(found["ids"][~np.isfinite(found[k]).all(1)].tolist(), "no finite numbers")
        return found

    def complete(self, layer, n, told):
        """Raise UserError where a layer has lost entries, or has more than were written."""
        if n != told:
            raise UserError(f"store {self.path} is damaged (layer {layer} has {n:,} of its "
                            f"{told:,} entries); put a copy of it back, or {AGAIN}")

    def sound(self, bad, why="the checksum does not fit"):
        """UserError that names the damaged entries, where there are some."""
        if len(bad):
            more = f", and {len(bad) - 1} more" * (len(bad) > 1)
            raise UserError(f"store {self.path} has a damaged entry ({bad[0]}{more}: {why}); take "
                            f"it out with python sample.py memory {shlex.quote(self.path)} forget "
                            f"{' '.join(map(str, bad[:20]))}")

    def columns(self, some, raw):
        ids, _, head, key, value, *_, uses, _, last, _ = zip(*some) if some else [()] * 14
        return {"ids": np.array(ids, np.int64), "head": np.array(head, np.int64), "keys": raw(key, self.key_type, self.D),
                "values": raw(value, self.value_type, self.E), "uses": np.array(uses, np.int64), "last": np.array(last, np.float64)}

    def texts(self, ids):
        """Return the texts of entries; "" for one that is not there any more, or is damaged."""
        found = [next(self.entries("WHERE id = ?", int(i)), [None])[0] for i in ids]
        return [e[5] if e and self.whole(e) else "" for e in found]

    def uses(self):
        """Return (n, 5): id, layer, uses, what they are worth and when the last one was, of all
        entries in the order of their ids. UserError names damaged entries and incomplete layers."""
        parts, bad = [np.empty((0, 5))], []
        with self.snapshot():
            rows = self.db.execute(f"SELECT {USES} FROM entries ORDER BY id")
            while some := rows.fetchmany(4096):
                right = [row[:5] for row in some if uses_whole(*row)]
                parts.append(np.array(right).reshape(-1, 5))
                bad += sorted({row[0] for row in some} - {row[0] for row in right})
            told = self.state()["counts"]
        self.sound(bad)
        found = np.concatenate(parts)
        for layer in {*found[:, 1].astype(int).tolist(), *map(int, told)}:
            self.complete(layer, int((found[:, 1] == layer).sum()), told.get(str(layer), 0))
        return found

    def touch(self, ids, n=1, now=None):
        """Entries were used n times (a number, or one for each id) at `now`, in seconds since 1970. What their uses are worth halves
        every HALF_LIFE."""
        now = time.time() if now is None else float(now)
        with self.batch():
            for i, m in zip(map(int, ids), np.broadcast_to(n, len(ids)).tolist()):
                found = self.db.execute(f"SELECT {USES} FROM entries WHERE id = ?", (i,)).fetchone()
                if found:
                    self.sound([i] * (not uses_whole(*found)))
                    _, layer, uses, worth, last, _ = found
                    worth = worth * 2 ** (min(last - now, 0) / HALF_LIFE) + m
                    used = uses + m, worth, max(now, last)
                    self.db.execute(
                        "UPDATE entries SET uses = ?, worth = ?, last = ?, use_checksum = ? "
                        "WHERE id = ?", (*used, use_checksum(i, layer, *used), i))

    def forget(self, what):
        """Take out entries by id, or all that bring back a piece of this text, wherever it was read -> how many there were."""
        with self.batch():
            if isinstance(what, str):
                what = self.within(what)
            gone, state = collections.Counter(), self.state()
            for i in map(int, what):
                row = self.db.execute(f"SELECT {USES} FROM entries WHERE id = ?", (i,)).fetchone()
                if row:  # a damaged one may say another layer than its own
                    layers = row[1], *map(int, state["counts"])
                    gone[str(next((l for l in layers if uses_whole(i, l, *row[2:])), row[1]))] += 1
                self.db.execute("DELETE FROM entries WHERE id = ?", (i,))
            self.put_state({**state, "counts": {l: n - gone[l] for l, n in state["counts"].items()}})
        return gone.total()

    def within(self, text):
        """The ids of the entries that bring back a piece of this text: one stands on the bytes start to stop of its source, of which it
        keeps the last few, so what comes after tells where the text stood."""
        raw, spans, bad = text.encode(), {}, []
        for entry in itertools.chain.from_iterable(self.entries()):
            if not self.whole(entry):
                bad.append(entry[0])
            elif text in entry[5]:
                said, source, _, stop = entry[5].encode(), *entry[6:9]
                for at in re.finditer(b"(?=" + re.escape(raw) + b")", said):  # they may overlap
                    spans.setdefault(source, set()).add(stop - len(said) + at.start() + len(raw))
        self.sound(bad)
        ids = []
        for source, ends in spans.items():
            i, start, stop = np.array(list(self.db.execute("SELECT id, start, stop FROM entries WHERE source = ?", (source,)))).T
            ends = np.array(sorted(ends))
            near = np.searchsorted(ends, start, side="right").clip(max=len(ends) - 1)  # the first that ends behind where it starts
            ids += i[(ends[near] > start) & (ends[near] - len(raw) < stop)].tolist()
        return ids

    def prune(self, n):
        """Keep the n entries whose uses, the writing counted as one, are worth most: LRFU (Lee et al. 2001), each use counts half
        a HALF_LIFE later -> how many went."""
        with self.batch():
            ids, _, _, worth, last = self.uses().T
            rank = np.log2(worth) + last / HALF_LIFE  # the order is the same at any time
            return self.forget(ids[np.argsort(rank, kind="stable")[:max(len(ids) - n, 0)]])

    def stats(self):
        """What the store says of itself and its size: facts, bytes, entries, uses, and a list of (layer, entries, used ones, uses)."""
        _, layer, uses, *_ = self.uses().T
        each = ((l, uses[layer == l]) for l in np.unique(layer))
        layers = [(int(l), len(u), int((u > 0).sum()), int(u.sum())) for l, u in each]
        sizes = [os.path.getsize(self.path + end) for end in ("", "-wal") if os.path.exists(self.path + end)]
        return {**self.facts, "bytes": sum(sizes), "entries": sum(l[1] for l in layers), "layers": layers}


# ---------------------------------------------------------------------------------------------------------------------
# kNN-LM: what stood behind places like this one


class Neighbours:
    """kNN-LM (Khandelwal et al. 2020, arXiv:1911.00172): of texts read once, every output vector and the token that came next. The
    tokens behind the k vectors nearest to the one at hand, each counting exp(-d^2 / temp), go into the model's distribution with the
    weight lam."""

    def __init__(self, keys, tokens, k, lam, temp, ids=None, store=None):
        """keys (N, C), tokens (N,) long; ids (N,) in a Store, where there is one."""
        self.k, self.lam, self.temp, self.tokens, self.ids, self.store = k, lam, temp, tokens, ids, store
        # |q - k|^2 = |q|^2 - 2 (q.k - |k|^2 / 2): with one more channel the nearest have the largest inner product
        self.keys = torch.empty(len(keys), keys.size(1) + 1, device=tokens.device)
        self.keys[:, :-1] = keys
        self.keys[:, -1] = self.keys[:, :-1].square().sum(1) / -2

    @classmethod
    def open(cls, store, k, lam, temp, device="cpu", n_vocab=None):
        """Return those of a Store of the kind "knn"; UserError where a token is none of n_vocab."""
        a = store.arrays(KNN_LAYER)
        if not len(a["ids"]):
            raise UserError(f"store {store.path} has no entries; python sample.py learn "
                            f"--knn={shlex.quote(store.path)} FILE fills it")
        tokens = torch.from_numpy(a["values"][:, 0]).long()
        if n_vocab is not None:
            wrong = (tokens < 0) | (tokens >= n_vocab)
            store.sound(a["ids"][wrong.numpy()].tolist(), "no token of this model")
        return cls(torch.from_numpy(a["keys"]), tokens.to(device), k, lam, temp, a["ids"], store)

    def find(self, h, own=None):
        """Squared distances and rows (Q, k) of the entries nearest to h (Q, C), the nearest first. own (Q,): a row that each leaves
        out, so that a place does not find itself."""
        score, at = search(F.pad(h.float(), (0, 1), value=1.0), self.keys, self.k + (own is not None))
        far = (h.float().square().sum(1, keepdim=True) - 2 * score).clamp(min=0)
        if own is not None:
            far, order = far.masked_fill(at == own[:, None], math.inf).sort(stable=True)
            far, at = far[:, :self.k], at.gather(1, order)[:, :self.k]
        return far, at

    def shares(self, far):
        """What each of the found ones counts, (Q, k)."""
        return (-far / self.temp).softmax(1)

    def mix(self, logits, h):
        """logits (B, V) of the model over its output vectors h (B, C) -> those of the mixture, on the same scale, and for each row what
        told most, [(store, id)]."""
        far, at = self.find(h)
        p = torch.zeros_like(logits).scatter_add(1, self.tokens[at], self.shares(far))
        found = [[(self.store, i) for i in row] for row in self.ids[at[:, :TRACED].cpu().numpy()]] if self.store else [[] for _ in at]
        return mixture(logits, p, self.lam), found


KNN_LAYER, TRACED = -1, 3  # the layer of output vectors in a store; entries that a trace names for a token


def mixture(logits, p, lam):
    """logits whose distribution is (1 - lam) softmax(logits) + lam p, with the same sum of exponentials; p (B, V)."""
    if not lam:
        return logits
    ours = logits + math.log(1 - lam) if lam < 1 else torch.full_like(logits, -math.inf)
    return torch.logaddexp(ours, p.log() + math.log(lam) + logits.logsumexp(-1, keepdim=True))


@torch.inference_mode()
def outputs(model, ids, rows=16):
    """For all places of a text ids (n,) but the last, in order: yields output vectors (m, C) and logits (m, V). A place has at least half
    a window before it, or all there is, and the history behind that."""
    T, H, device = model.cfg.block_size, model.cfg.history, model.wte.weight.device
    step, ids = max(T // 2, 1), torch.as_tensor(ids, dtype=torch.long)
    padded = F.pad(ids[:-1], (H, T), value=-1)
    starts = torch.arange(0, max(len(ids) - 1 - T, 0) + step, step)
    for some in starts.split(rows):
        x = torch.stack([padded[H + a:H + a + T] for a in some]).clamp(min=0).to(device)  # behind the end it does not matter
        history = torch.stack([padded[a:a + H] for a in some]).to(device) if H else None
        out = model(x, history=history)
        new = [slice(T - step if a else 0, min(T, len(ids) - 1 - a)) for a in some.tolist()]
        yield tuple(torch.cat([row[s] for row, s in zip(t, new)]) for t in (out.h.float(), out.logits))


def learn_knn(store, model, tok, ids):
    """Put every output vector over a text, a list of ids, into a Store with the token that came next; the text of an entry ends in it."""
    (said, spans), at = passages(tok, ids), 0
    with store.batch(), prepare.bar(total=len(ids) - 1, desc="learn", unit="token") as shown:
        source = store.state()["next"]
        for h, _ in outputs(model, ids):
            places = range(at + 1, at + 1 + len(h))
            store.add(KNN_LAYER, np.zeros(len(h), np.int64), h.cpu().numpy(), np.array([ids[t] for t in places])[:, None],
                      [said(t) for t in places], spans=spans[at + 1:at + 1 + len(h)], source=source)
            at += len(h)
            shown.update(len(h))
    return at


# ---------------------------------------------------------------------------------------------------------------------


def newest(root="out"):
    """The checkpoint under root that was written last."""
    found = glob.glob(os.path.join(root, "**", "ckpt.pt"), recursive=True)
    if not found:
        raise UserError(f"there is no checkpoint under {root}/; name one with --out_dir=FOLDER, or "
                        f"make one with python prepare.py and then python train.py")
    return max(found, key=os.path.getmtime)


def find_device(name):
    """Return the device that a setting names, with auto a GPU where there is one; UserError where
    it is not to be had."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as e:  # each kind of device fails in a way of its own
        raise UserError(f"device {name!r} is not to be had here ({summary(e)}); give --device=cpu, or "
                        f"leave it out") from None
    return name


def load(path, device="cpu", dtype="float32"):
    """(model in eval mode, checkpoint) of a checkpoint file or the folder it is in."""
    path = prepare.checkpoint_path(path)
    ckpt = prepare.load_checkpoint(path)
    try:
        model = GPT.of(ckpt["model_config"], ckpt["model"])
    except ValueError as e:
        raise UserError(f"checkpoint {path} does not fit this version ({summary(e)}); train it "
                        f"again") from None
    model = model.to(device)
    if dtype == "bfloat16":
        model.bfloat16()
    model.dtype = getattr(torch, dtype)
    return model.eval(), ckpt


def tokenizer_of(ckpt, path):
    """Return the tokenizer of a checkpoint; UserError where it is not that of its model."""
    tok, n = prepare.Tokenizer(ckpt["tokenizer"]), ckpt["model_config"]["vocab_size"]
    if tok.n_vocab != n:
        raise UserError(f"checkpoint {path} is damaged: its tokenizer has {tok.n_vocab} tokens and its model {n}; "
                        f"take another")
    return tok


def encode(tok, text, name):
    """Return the token ids of a text; UserError says what it is, and what the vocabulary has."""
    try:
        return tok.encode(text)
    except UserError as e:
        more = " ..." * (len(tok.chars) > 100)
        raise UserError(f"{name}: {e} (this model reads {tok.chars[:100]!r}{more})") from None


def can_encode(tok, text):
    """Tell whether the vocabulary has what a text needs."""
    with contextlib.suppress(UserError):
        return bool(tok.encode(text))


def read_prompt(prompt, tok):
    """Return (text, token ids) to go on from: --prompt itself, a file behind FILE:, or standard
    input for -. An empty one begins a new text, as does the default where there is no line end."""
    text = prompt
    if prompt == "-" or prompt.startswith("FILE:"):
        text = "".join(prepare.pieces(prompt.removeprefix("FILE:")))
    of_utf8(text, "the prompt")
    if text == SampleConfig.prompt and not can_encode(tok, text):
        text = "" if tok.eot is not None else tok.decode([0])
        begins = f"with {text!r}" if text else "a new text"
        print(f"[the model reads no line end; it begins {begins}]", file=sys.stderr)
    begins = not text or text.startswith(prepare.END)
    if begins and tok.eot is None:
        raise UserError(f"the prompt is empty or begins with {prepare.END}, and the model has no end of a text to begin from; "
                        f"give at least one character")
    text = text.removeprefix(prepare.END)
    if prepare.END in text:
        print(f"[{prepare.END} within the prompt is read as letters]", file=sys.stderr)
    return text, [tok.eot] * begins + encode(tok, text, "the prompt")


def held_out(ckpt, cfg, T):
    """Rows (n, T) of the validation split of the dataset that a checkpoint was trained on, apart from each other, in an order drawn
    once; UserError where the dataset is another one now, or too short."""
    config.build(prepare.check_name, name=ckpt["dataset"])
    tokens, _, n_vocab, _, sha = prepare.open_bin(os.path.join(cfg.data_dir, ckpt["dataset"], "val.bin"))
    if sha[:16] != ckpt["data"]["val.bin"] or n_vocab != ckpt["model_config"]["vocab_size"]:
        raise UserError(f"{cfg.data_dir}/{ckpt['dataset']} is not the dataset that the checkpoint was trained on; make that again with "
                        f"prepare.py")
    n = len(tokens) // T
    if n < cfg.sequences:
        raise UserError(f"the validation split of {ckpt['dataset']} holds {n} stretches of {T} tokens, fewer than sequences = "
                        f"{cfg.sequences}; give a smaller length or fewer sequences")
    rows = torch.from_numpy(np.asarray(tokens[:n * T]).astype(np.int64)).view(n, T)
    return rows[torch.randperm(n, generator=torch.Generator().manual_seed(cfg.seed))]


def calibrate(cfg):
    """Find and store the laxest exit_threshold that keeps the risk on held-out text: Learn then Test (Angelopoulos et al. 2021), as
    CALM does."""
    kind = cfg.exit or "softmax"
    model, ckpt, path = open_model(cfg)
    check_exits(model, kind)
    stored = stored_thresholds(path)
    if cfg.length > model.cfg.block_size:
        raise UserError(f"length ({cfg.length}) is larger than the model's block_size ({model.cfg.block_size}); give less")
    rows = held_out(ckpt, cfg, cfg.length)[:cfg.sequences].to(cfg.device)
    risks, depth = exit_risks(model, rows, kind)
    at = laxest(risks, cfg.risk, cfg.confidence)
    for i in range(len(THRESHOLDS)):
        print(f"threshold {THRESHOLDS[i]:.4f}: {depth[:, i].mean():.2f} of {model.cfg.n_layer} blocks, {risks[:, i].mean():.2%} differ"
              f"{'   <- kept' if i == at else ''}")
    if at < 0:
        raise UserError(f"no threshold keeps a risk of {cfg.risk} with confidence {cfg.confidence} on {len(rows)} sequences; ask for "
                        f"more risk, or give more sequences")
    found = {"threshold": THRESHOLDS[at], "risk": cfg.risk, "confidence": cfg.confidence, "sequences": len(rows), "length": cfg.length,
             "observed": risks[:, at].mean().item(), "blocks": depth[:, at].mean().item(), "of": model_id(cfg, path)}
    with prepare.replacing(thresholds_path(path)) as f:
        f.write(prepare.seal({**stored, kind: found}))
    print(config.visible(f"{thresholds_path(path)}: {kind} {THRESHOLDS[at]:.4f}"))
    return 0


def model_id(cfg, path):
    """What a threshold was found for: the checkpoint, and how its weights are held."""
    return f"{prepare.checkpoint_id(prepare.checkpoint_path(path))} {cfg.dtype}{' int8' if cfg.int8 else ''}"


def thresholds_path(path):
    return os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "exits.json")


def stored_thresholds(path):
    """Return {confidence: what calibrate found} beside a checkpoint; {} where nothing is stored.
    UserError where somebody changed it."""
    try:
        with open(thresholds_path(path), "rb") as f:
            stored = prepare.unseal(f.read(2 ** 20))
        for kind, found in stored.items():
            threshold = found["threshold"]
            if not (kind in CONFIDENCE and type(threshold) is float and 0 <= threshold <= 1
                    and type(found["of"]) is str):
                raise ValueError(f"no threshold of {kind}")
        return stored
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{thresholds_path(path)} is damaged, or not as calibrate wrote it "
                        f"({str(e)[:80]}); delete it and run python sample.py calibrate "
                        f"again") from None


def check_exits(model, kind):
    """UserError unless the model can leave early by this confidence."""
    if not model.exits:
        raise UserError("the model has no exits; train one with a . in layers, such as python "
                        "train.py --layers=AA.AA.AA")
    if kind == "classifier" and model.sure is None:
        raise UserError("the model has no classifier of exits; train one with --exit_classifier, or use softmax, margin or cosine")
    if model.cfg.n_think:
        raise UserError("a model that thinks (n_think) reads its own last layer and cannot leave "
                        "early; leave exit out, or take another model")


def make_rule(cfg, model, path):
    """The exit_rule of the settings, None without exits."""
    if not cfg.exit:
        return None
    check_exits(model, cfg.exit)
    threshold = cfg.exit_threshold
    if threshold < 0:
        found = stored_thresholds(path).get(cfg.exit)
        if found is None or found["of"] != model_id(cfg, path) or cfg.exit_decay:
            advice = "none ever is for exit_decay: give one, or leave exit_decay out"
            if not cfg.exit_decay:
                advice = (f"run python sample.py calibrate --out_dir={shlex.quote(path)} --exit="
                          f"{cfg.exit} --dtype={cfg.dtype}{' --int8' * cfg.int8}, or give one")
            raise UserError(f"no exit_threshold is stored for {cfg.exit} of this {path} in "
                            f"{cfg.dtype}; {advice}")
        threshold = found["threshold"]
    return exit_rule(model, cfg.exit, threshold, cfg.exit_decay, max(cfg.max_new_tokens, 1))


def other_model(name, path, cfg, tokenizer):
    """The checkpoint that a setting names, with the tokenizer that it must have."""
    model, ckpt = load(path, cfg.device, cfg.dtype)
    if ckpt["tokenizer"] != tokenizer:
        raise UserError(f"{name} {path} has another tokenizer than the model; name one that was "
                        f"trained on the same dataset")
    return to_int8(model) if cfg.int8 else model


def after_kind(name, text, low=1):
    """The number behind `name:` of an amateur such as exit:2."""
    number = text.partition(":")[2]
    if not (number.isascii() and number.isdecimal() and len(number) < 10 and int(number) >= low):
        raise UserError(f"amateur {text} needs a number of at least {low}, as {name}:{low}")
    return int(number)


def learn(cfg, *files):
    """Read texts into a store, without a gradient. Each file is one document, and in the store whole or not at all."""
    if bool(cfg.knn) == bool(cfg.memory):
        raise UserError("learn needs to know where to: --memory=PATH for blocks M, or --knn=PATH, one at a time")
    kind = "memory" if cfg.memory else "knn"
    target = getattr(cfg, kind)
    if not files:
        raise UserError(f"learn needs texts to read: python sample.py learn "
                        f"--{kind}={shlex.quote(target)} FILE...")
    model, ckpt, path = open_model(cfg)
    tok, texts = tokenizer_of(ckpt, path), []
    for name in files:  # all that may be wrong with them is found before anything is written
        text = "".join(prepare.pieces(name))
        if prepare.END in text:
            print(f"{config.visible(name)} has {prepare.END} in it, which is read as letters; give "
                  f"each text a file of its own", file=sys.stderr)
        texts.append((name, encode(tok, text, name)))
        if len(texts[-1][1]) < 2:
            raise UserError(f"{name} holds fewer than 2 tokens; give a longer text")
    read = learn_memory if cfg.memory else learn_knn
    with open_store(kind, target, model, path, write=True) as store:
        for name, ids in texts:
            print(f"{config.visible(name)}: {read(store, model, tok, ids):,} entries")
        print(f"{config.visible(target)}: {store.count():,} entries")
    return 0


def open_store(kind, target, model, path, write=False):
    """The store of a kind at target, of this model and no other."""
    if kind == "memory":
        if not model.init_memory(1, size=0):
            raise UserError(f"{path} has no block M to remember with; train one with an M in layers, such as config/facts.py")
        if any(c == "M" and model.cfg.layers[:i].count("(") > model.cfg.layers[:i].count(")") for i, c in enumerate(model.cfg.layers)):
            raise UserError(f"{path} remembers chunks (layers = {model.cfg.layers}), and a store keeps tokens; train one with an M outside levels")
        if model.cfg.n_slot:
            raise UserError(f"{path} reads context slots too, which a store keeps nothing of; train one with --history=0")
        key = value = model.cfg.mem_dim, "float16"
    else:
        key, value = (model.cfg.n_embd, "float16"), (1, "int32")
    return Store(target, prepare.checkpoint_id(prepare.checkpoint_path(path)), kind, key, value, write)


def memory(cfg, path="", action="stats", *rest):
    """Look into a store, or edit it."""
    actions = {"list": memory_list, "show": memory_show, "forget": memory_forget, "prune": memory_prune, "stats": memory_stats}
    if not path or action not in actions:
        raise UserError(f"memory takes a store and one of {', '.join(actions)}, as python sample.py memory facts.db list")
    if given(cfg).count("limit") and action != "list":
        raise UserError(f"limit is for list, not {action}; leave it out")
    of_utf8(" ".join(rest), f"what {action} takes")
    with Store(path, write=action in ("forget", "prune")) as store:
        actions[action](store, cfg, list(rest))
    return 0


def numbers(words, what):
    """Words as whole numbers; UserError where there are none, or others."""
    if not words or not all(w.isascii() and w.isdecimal() and len(w) < 100 for w in words):
        raise UserError(f"{what} takes a number, not {' '.join(words)[:40] or 'nothing'}")
    return [min(int(w), 2 ** 63 - 1) for w in words]


def memory_list(store, cfg, words):
    """The first entries, or the first that have a text in them; damaged ones always."""
    text = " ".join(words)
    found = (e for e in itertools.chain.from_iterable(store.entries())
             if not store.whole(e) or text in e[5])
    print(f"{'id':>9}  {'layer':>5} {'head':>4} {'uses':>6}  {'last used':16}  text")
    for e in itertools.islice(found, cfg.limit or None):
        print(entry_line(store, e))
    if next(found, None):
        print(f"[the first {cfg.limit}; --limit=0 shows all]")


def entry_line(store, entry, width=70):
    """An entry as a line of a list."""
    i, layer, head, _, _, text, *_, uses, _, last, _ = entry
    if not store.whole(entry):
        return f"{i:>9}  damaged"
    text = repr(text)
    return (f"{i:>9}  {layer:>5} {head:>4} {uses:>6}  {time.strftime('%Y-%m-%d %H:%M', time.localtime(last))}  "
            f"{text if len(text) <= width else text[:width - 3] + '...'}")


def memory_show(store, cfg, words):
    """All of some entries."""
    for i in numbers(words, "show"):
        entry = next(store.entries("WHERE id = ?", i), [None])[0]
        if entry is None:
            raise UserError(f"store {store.path} has no entry {i}; list shows which there are")
        print(entry_line(store, entry, width=10 ** 9))
        parts = ("key", entry[3], store.key_type), ("value", entry[4], store.value_type)
        for name, raw, t in parts if store.whole(entry) else ():
            numbers_ = np.frombuffer(raw, t)
            print(f"{name:>9}  {len(numbers_)} x {t.name}: {' '.join(f'{v:.4g}' for v in numbers_[:8])}{' ...' * (len(numbers_) > 8)}")


def memory_forget(store, cfg, words):
    """Take out entries by their numbers, or all that bring back a piece of a text."""
    what = " ".join(words)
    if not what.strip():
        raise UserError("forget takes the numbers of entries, or a text that was read")
    gone = store.forget(numbers(words, "forget") if what.replace(" ", "").isdecimal() else what)
    if not gone:
        raise UserError(f"store {store.path} has no entry {what!r}; python sample.py memory "
                        f"{shlex.quote(store.path)} list shows which there are, and a text is "
                        f"looked for in the last 40 characters before each")
    print(f"{config.visible(store.path)}: forgot {gone:,} of {gone + store.count():,} entries")


def memory_prune(store, cfg, words):
    """Keep so many entries, the best used ones."""
    if len(words) != 1:
        raise UserError(f"prune takes one number, of the entries to keep, not {' '.join(words) or 'nothing'}")
    gone = store.prune(*numbers(words, "prune"))
    print(f"{config.visible(store.path)}: pruned {gone:,} of {gone + store.count():,} entries")


def memory_stats(store, cfg, words):
    """What a store is and how it was used."""
    if words:
        raise UserError(f"stats takes nothing, not {' '.join(words)}")
    s = store.stats()
    size = f"{s['entries']:,} entries, {s['bytes'] / 2 ** 20:,.1f} MB"
    print(config.visible(f"{store.path}: {s['kind']} of model {s['model'][:12]}, {size}; "
                         f"key {s['key']}, value {s['value']}"))
    for layer, n, used, uses in s["layers"]:
        print(f"layer {layer:>3}: {n:>9,} entries, {used / n:.1%} of them used, {uses:,} uses")


COMMANDS = {  # what each does, and the settings that it takes besides out_dir
    "calibrate": (calibrate,
                  "exit risk confidence sequences length data_dir seed device dtype int8"),
    "learn": (learn, "memory knn device dtype int8"),
    "memory": (memory, "limit")}
ELSEWHERE = dict.fromkeys("risk confidence sequences length data_dir".split(), "calibrate")
ELSEWHERE["limit"] = "memory FILE list"


def check_taken(cfg, command):
    """Raise UserError for a setting that a command, or plain decoding, does nothing with."""
    for name in given(cfg):
        if command and name not in ("out_dir", *COMMANDS[command][1].split()):
            raise UserError(f"{name} does nothing in {command}; leave it out")
        if not command and name in ELSEWHERE:
            raise UserError(f"{name} is for python sample.py {ELSEWHERE[name]}; leave it out")


def open_model(cfg):
    """Return (model, checkpoint, path of its file) of the settings, on the device and in the type
    that they say."""
    cfg.device = find_device(cfg.device)
    kind = torch.device(cfg.device).type
    missing = config.compiler_missing(kind) if cfg.compile else ""
    if missing:
        raise UserError(f"compile needs {missing}, which was not found; install it or leave --compile out")
    if cfg.int8 and kind != "cpu":
        raise UserError(f"int8 is for a CPU, not {cfg.device}; give --device=cpu, or leave it out")
    path = prepare.checkpoint_path(cfg.out_dir or os.path.dirname(newest()))
    model, ckpt = load(path, cfg.device, cfg.dtype)
    if cfg.int8:
        to_int8(model)
    return model, ckpt, path


def main(argv):
    values, words = config.parse(argv, SampleConfig, doc=__doc__, words=list(COMMANDS), free=("learn", "memory"))
    cfg = config.build(SampleConfig, **values)
    if words[1:] and words[0] == "calibrate":
        raise UserError(f"calibrate takes settings alone, not {words[1]}")
    check_taken(cfg, *words[:1] or [""])
    if words:
        return COMMANDS[words[0]][0](cfg, *words[1:])
    try:
        with contextlib.ExitStack() as stores:
            return decode(cfg, stores)
    except RuntimeError as e:
        if not (cfg.compile and isinstance(e, torch._dynamo.exc.TorchDynamoException)):
            raise
        why = summary(e)
        raise UserError(f"compile failed here ({why}); leave --compile out") from None


def decode(cfg, stores):
    """Text by the settings. stores: an ExitStack that closes what is opened."""
    model, ckpt, path = open_model(cfg)
    tok = tokenizer_of(ckpt, path)
    prompt, ids = read_prompt(cfg.prompt, tok)
    if cfg.stop_at_end and tok.eot is None:
        raise UserError(f"{path} was trained on one text without an end, and would never stop "
                        f"there; leave stop_at_end out, or train on several texts, such as python "
                        f"prepare.py --input=ONE --input=TWO")
    check_page(cfg.trace_html)
    think = ((), ())
    if cfg.n_think or cfg.think_after:
        if not model.cfg.n_think:
            raise UserError(f"{path} was not trained to think (n_think is 0); leave --n_think and --think_after out")
        if cfg.n_think > model.cfg.n_think:
            raise UserError(f"{path} thinks {model.cfg.n_think} times in a window, not {cfg.n_think}; give a smaller n_think")
        one = model.cfg.think_token
        after = encode(tok, cfg.think_after, "think_after")
        think, ids = (after, [one] * (cfg.n_think or model.cfg.n_think)), ids + [one] * cfg.n_think
    if cfg.speculate and model.cfg.n_think:
        raise UserError(f"{path} thinks (n_think), and a draft cannot; leave speculate out")
    leave, at_exit, rows = make_rule(cfg, model, path), 0, [0] * (1 if cfg.beams else cfg.best_of or cfg.n)
    if cfg.amateur.startswith("exit:"):
        at_exit = after_kind("exit", cfg.amateur)
    try:
        if at_exit or cfg.draft_exit:
            model.exit_place(at_exit or cfg.draft_exit)
    except ValueError as e:
        raise UserError(f"{'amateur' if at_exit else 'draft_exit'}: {e}") from None
    others = {}
    for name in ("amateur", "draft"):
        if getattr(cfg, name) and not (name == "amateur" and cfg.amateur.startswith(("exit:", "context:"))):
            others[name] = other_model(name, getattr(cfg, name), cfg, ckpt["tokenizer"])
    room = min(m.cfg.block_size for m in (model, *others.values()))
    if cfg.speculate >= room:
        raise UserError(f"speculate = {cfg.speculate} tokens ahead do not fit into a window of "
                        f"{room}; give fewer")
    start = lambda m, **more: Decoder(m, [ids], tok.eot, cfg.compile, **more).select(rows)
    neighbours, memory, sources = None, None, {}
    if cfg.memory:
        memory, sources = open_memory(stores.enter_context(open_store("memory", cfg.memory, model, path)), model, model.cfg.mem_size,
                                      cfg.memory_index)
    elif ckpt["train_config"].get("stream"):  # what the window cannot hold is remembered, as in training
        memory = model.init_memory(1)
    if cfg.knn:
        store = stores.enter_context(open_store("knn", cfg.knn, model, path))
        temp = cfg.knn_temp * model.cfg.n_embd
        neighbours = Neighbours.open(store, cfg.knn_k, cfg.knn_lambda, temp, cfg.device,
                                     model.cfg.vocab_size)
    expert, others = start(model, at_exit=at_exit, leave=leave, neighbours=neighbours, memory=memory, sources=sources), {k: start(m) for k, m in others.items()}
    if cfg.amateur.startswith("context:"):
        others["amateur"] = start(model, context=after_kind("context", cfg.amateur))
    amateur, generator = others.get("amateur"), torch.Generator(device=cfg.device).manual_seed(cfg.seed)
    loss = ckpt.get("val_loss")
    scored = "" if loss is None else f", val loss {loss:.4f}"
    print(config.visible(f"[{path}, step {ckpt['step']}{scored}]"), file=sys.stderr)
    if cfg.soft and not model.cfg.soft_rate:
        print("[this model never read soft tokens in training; expect poor text, or train one with "
              "python train.py --soft_rate=0.3]", file=sys.stderr)
    used = collections.Counter()
    if cfg.interactive:
        converse(expert, others, cfg, tok, model.cfg, prompt, generator, think, used)
        count_uses(used)
        return 0
    speculation = Speculation(expert, cfg, generator, others.get("draft")) if cfg.speculate else None
    tokens = speculation.generate if speculation else lambda: generate(expert, cfg, amateur, generator, think)
    print("" if cfg.json else on_screen(prompt), end="", flush=True)
    if cfg.beams or cfg.best_of:
        ranked = beam_search(expert, cfg, tok, amateur)[0] if cfg.beams else \
            best(tokens(), cfg, tok, model.cfg)
        steps = [ranked[:cfg.n]]  # all at once
    else:
        steps = tokens()
    found = cfg.trace and bool(sources or neighbours)
    page = [[] for _ in range(cfg.n)] if cfg.trace_html or found else None  # (text, GeneratedToken) of each
    write(steps, cfg, tok, model.cfg, prompt, used, page)
    if cfg.trace and expert.planned() and not (cfg.beams or cfg.best_of):
        print("\n" + "\n".join(expert.plan_lines(tok)))
    for piece, made in page[0] if found else ():
        if made.found:
            print(f"{piece!r:>12} | {' | '.join(f'{i} {text!r}' for i, text in retrieved(made))}")
    if speculation:
        print(f"[{speculation.accepted} of {speculation.proposed} drafted tokens accepted]", file=sys.stderr)
    if cfg.trace_html:
        write_page(cfg.trace_html, prompt, page, model.cfg)
    count_uses(used)
    return 0


def count_uses(used):
    """Note in their stores which entries were used and how often, {(store, id): n}, unless somebody
    else is writing there."""
    for store in {store for store, _ in used}:
        ids = [i for s, i in used if s is store]
        try:
            with Store(store.path, write=True) as writer:
                writer.touch(ids, [used[store, i] for i in ids])
        except UserError as e:
            print(config.visible(f"[uses not counted: {e}]"), file=sys.stderr)


def best(steps, cfg, tok, mcfg):
    """All samples of an iterator of steps, each up to its end, the likeliest first."""
    rows, texts = [[] for _ in range(cfg.best_of)], []
    texts += (new_text(cfg, tok, mcfg) for _ in rows)
    for ready in steps:
        for row, text, tokens in zip(rows, texts, ready):
            for made in tokens:
                if not text.done:
                    text.add(made.token)
                    row.append(made)
        if all(t.done for t in texts):
            break
    return sorted(rows, key=likelihood, reverse=True)


def on_screen(text):
    """Return a text as it is printed: on a terminal its control characters are escapes."""
    return config.visible(text) if sys.stdout.isatty() else text


def write(steps, cfg, tok, mcfg, prompt, used, page=None):
    """Print what an iterator of steps gives, the first sample as it is made, the others when they
    are whole. used: a Counter that takes (store, id) of what was found; page: a list per sample
    that takes (text, GeneratedToken). -> with interactive the ids of what is shown."""
    shown = []
    texts = [new_text(cfg, tok, mcfg) for _ in range(cfg.n)]
    others = [[] for _ in texts]
    for ready in steps:
        for i, (text, tokens) in enumerate(zip(texts, ready)):
            for made in tokens:
                if text.done:
                    break
                piece = text.add(made.token)
                if cfg.interactive and made.token != text.last:
                    shown.append(made.token)
                used.update(made.found)
                if page is not None:
                    page[i].append((piece, made))
                piece = show(made, piece, i, tok, cfg, mcfg)
                if i:
                    others[i].append(piece)
                else:
                    print(piece, end="", flush=True)
        if all(t.done for t in texts):
            break
    ends = ["" if cfg.json else t.end() for t in texts]
    for end, pieces in zip(ends, page or []):
        if end and pieces:
            pieces[-1] = (pieces[-1][0] + end, pieces[-1][1])
    print(on_screen(ends[0]), end="" if cfg.json else "\n")
    for pieces, end in zip(others[1:], ends[1:]):
        head = [] if cfg.json else ["-" * 40 + "\n" + on_screen(prompt)]
        print(*head, *pieces, on_screen(end), sep="", end="" if cfg.json else "\n")
    return shown


def converse(expert, others, cfg, tok, mcfg, prompt, generator, think, used):
    """Turn by turn: a line is read, appended to all that stands there, and gone on from; what was shown then stands there too. others:
    {"amateur" or "draft": Decoder}; used: as in write."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then knows the arrow keys, and the lines typed before)
    print(on_screen(prompt), end="\n" if prompt and not prompt.endswith("\n") else "")
    line_end = "\n" if can_encode(tok, "\n") else ""
    while True:
        try:
            text = input("> ")
            of_utf8(text, "the line")
            line = encode(tok, text + line_end, "the line")
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            print("the line is not UTF-8 text; type another", file=sys.stderr)
            continue
        except UserError as e:
            print(config.visible(str(e)), file=sys.stderr)
            continue
        for d in (expert, *others.values()):
            d.extend(line)
        now, with_ = expert.select([0]), {name: d.select([0]) for name, d in others.items()}  # what is made and not shown goes
        steps = Speculation(now, cfg, generator, with_.get("draft")).generate() if cfg.speculate else \
            generate(now, cfg, with_.get("amateur"), generator, think)
        shown = write(steps, cfg, tok, mcfg, prompt, used)
        for d in (expert, *others.values()):
            d.extend(shown)


def retrieved(made):
    """[(id, text)] of the entries that told most about a token."""
    return [(int(i), store.texts([i])[0]) for store, i in made.found]


HEAT = (40, 148, 220, 208, 196)  # of a terminal: from green to red


def heat(made, mcfg):
    """(0 to 1, what it says) of a token: by its exit, its draft, its contrastive shift or else its entropy."""
    if made.depth is not None:
        return made.depth / mcfg.n_layer, f"left after {made.depth} of {mcfg.n_layer} blocks"
    if made.drafted is not None:
        return float(not made.drafted), "drafted" if made.drafted else "not drafted"
    if made.shift is not None:
        return min(max(made.shift / 2 + 0.5, 0.0), 1.0), f"shift {made.shift:+.2f}"
    return min(made.entropy / math.log(mcfg.vocab_size), 1.0), f"entropy {made.entropy:.2f}"


def show(made, text, i, tok, cfg, mcfg):
    """What is printed of a token of sample i, whose certain text is `text`: as it is, in colour, or as a line of JSON with the
    token's own text."""
    if cfg.json:
        more = {k: getattr(made, k) for k in ("depth", "drafted", "shift") if getattr(made, k) is not None}
        if made.found:
            more["found"] = [{"id": i, "text": text} for i, text in retrieved(made)]
        return json.dumps({"sample": i, "token": made.token, "text": tok.decode([made.token]), "soft": made.soft,
                           "entropy": round(made.entropy, 4), "logp": round(made.logp, 4), "soft_behind": made.behind, **more}) + "\n"
    text = on_screen(text)
    if not (cfg.trace and text and sys.stdout.isatty()):
        return text
    if cfg.soft:
        return f"\033[36;4m{text}\033[0m" if made.soft else text
    return f"\033[38;5;{HEAT[min(int(heat(made, mcfg)[0] * len(HEAT)), len(HEAT) - 1)]}m{text}\033[0m"


PAGE = ("<!doctype html><meta charset=utf-8><title>trace</title><style>"
        "body{font:16px/1.6 monospace;max-width:60em;margin:2em auto;white-space:pre-wrap}"
        "hr{border:0;border-top:1px solid #ccc}</style>")


def check_page(path):
    """Raise UserError where a page at path (none is wanted where that is empty) would take the
    place of something else, or has no folder."""
    if path and not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(f"the folder of trace_html {path} does not exist; make it, or name another")
    if path and os.path.lexists(path):
        with contextlib.suppress(OSError):
            if os.path.isfile(path):
                with open(path, "rb") as f:
                    if f.read(len(PAGE)) == PAGE.encode():
                        return
        raise UserError(f"trace_html {path} is there already, and is not a page that this wrote; "
                        f"choose another file")


def write_page(path, prompt, samples, mcfg):
    """Samples, lists of (text, GeneratedToken), as a page: each token on its colour, what it says under the pointer."""
    out = [PAGE]
    for pieces in samples:
        out.append(html.escape(prompt))
        for text, made in pieces:
            value, says = heat(made, mcfg)
            says = "\n".join((f"{says}, {math.exp(made.logp):.0%}", *(f"{i} {text!r}" for i, text in retrieved(made))))
            out.append(f'<span title="{html.escape(says)}" style="background:hsl({120 * (1 - value):.0f},70%,'
                       f'85%)">{html.escape(text)}</span>')
        out.append("<hr>")
    with prepare.replacing(path) as f:
        f.write("".join(out).encode())


if __name__ == "__main__":
    config.run(main)
