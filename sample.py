"""Decoding: every way to turn a model into text.

    python sample.py                              500 tokens from the newest checkpoint under out/
    python sample.py --prompt="ROMEO:" --n=3 --top_p=0.9
    python sample.py --prompt=FILE:scene.txt --temperature=0
    python sample.py --prompt= --stop_at_end      a text from its beginning to its end
    python sample.py --amateur=out/small/ckpt.pt  contrastive decoding against a weaker model
    python sample.py --exit=softmax --trace       a token leaves at the first exit sure of it
    python sample.py --speculate=4 --draft_exit=2  the first 2 blocks draft, the rest verifies:
                                                  the same text, sooner
    python sample.py --beams=8                    the likeliest text; --best_of=8: the likeliest
                                                  of 8 samples
    python sample.py --soft --trace               tokens stay soft while they lie near symbols
    python sample.py --interactive                talk, turn by turn; --log=talk.jsonl keeps what
                                                  was said, and --memory=FILE remembers it
    python sample.py learn --knn=works.db FILE... read texts into a datastore, without a gradient;
                                                  --knn=works.db then uses it
    python sample.py learn --memory=facts.db FILE...
                                                  likewise into the memory of blocks M;
                                                  --memory=facts.db then remembers it;
                                                  --instead=TEXT: and forget that text
    python sample.py memory FILE list TEXT        what is in a store; also stats, show ID,
                                                  forget ID or TEXT, prune N
    python sample.py info PATH                    what a checkpoint or a preset is: its parts with
                                                  their parameters and FLOPs, settings, losses

There is no upper bound on max_new_tokens: when the window is full, its oldest quarter folds into
the context slots, or is dropped where the model has none.
"""
import codecs
import collections
import contextlib
import copy
import glob
import html
import json
import math
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass

import config  # before torch: it sets the allocator's switches
import numpy as np
import torch
from torch.nn import functional as F

import memory
import prepare
from config import UserError, summary
from model import GPT, GRU, GPTConfig, Level, Linear, averaged, expected_rows, standing_at


@dataclass
class SampleConfig:
    # sampling
    out_dir: str = ""  # a checkpoint file or its folder; default: the newest under out/
    prompt: str = "\n"  # text to go on from; FILE:path, or - for standard input; empty: a new text
    n: int = 1  # samples
    max_new_tokens: int = 500  # tokens to make; no upper bound
    temperature: float = 0.8  # 0: the most likely token always
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the most likely tokens that hold this share of the probability
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the most likely one
    repetition_penalty: float = 1.0  # divide the odds of tokens in the window (CTRL); 1: off
    stop: str = ""  # end a sample before this text; <|endoftext|>: as stop_at_end
    stop_at_end: bool = False  # end a sample where the model ends the text
    average: tuple[str, ...] = ()  # models to average probabilities with (PATH,PATH)
    # contrastive decoding
    amateur: str = ""  # contrastive decoding: against a checkpoint | exit:K | context:N
    alpha: float = 0.1  # contrastive: keep tokens at least alpha times as likely as the first
    beta: float = 0.5  # contrastive: strength
    # soft tokens
    soft: bool | str = False  # read soft tokens (vector: regressed points) until they collapse
    soft_top_k: int = 0  # soft: over the k most likely tokens; 0: over those that the filters keep
    gumbel: float = 0.5  # soft: temperature of a Gumbel-softmax on each soft token; 0: no noise
    collapse: str = "distance"  # always | never | every:N | distance (off tokens) | entropy (sure)
    collapse_threshold: float = -1.0  # entropy: below which (-1: 0.5); distance: above (-1: 0.1)
    collapse_by: str = "nearest"  # what soft tokens become: nearest | context (drawn in one pass) |
        # whole (drawn by how well it explains all that came after it)
    collapse_which: str = "all"  # of earlier soft tokens: all | far (less than 0.7 like any symbol)
    collapse_back: int = -1  # collapse only the last n earlier soft tokens; -1: all, 0: none
    n_think: int = 0  # think tokens after the prompt, for a model trained with n_think
    think_after: str = ""  # and after each occurrence of this text; max_new_tokens counts them
    # plans
    plan_draw: bool = False  # write by draws of the concepts that levels plan, not by their means
    # exits
    exit: str = ""  # leave at the first exit sure by softmax | margin | cosine | classifier
    exit_threshold: float = -1.0  # from 0 (leave at once) to 1; -1: what bench.py calibrate stored
    exit_decay: float = 0.0  # 0.9 threshold + 0.1 e^(-exit_decay t / max_new_tokens); 0: threshold
    # speculation and search
    speculate: int = 0  # draft so many tokens at a time and verify them in one pass; 0: off
    draft_exit: int = 0  # speculate: draft with the first K blocks, which an exit follows
    draft: str = ""  # speculate: draft with this checkpoint; its window should not be shorter
    beams: int = 0  # beam search over so many texts, of which the n likeliest are shown; 0: off
    best_of: int = 0  # make so many samples and show the n likeliest; 0: off
    # memories
    memory: str = ""  # what M finds besides: a store of learn, or what was said if interactive
    memory_index: bool = False  # memory: by an index, kept beside it; for 100,000 entries and more
    knn: str = ""  # what came next at places like this: a store of learn; interactive adds to it
    knn_lambda: float = 0.25  # knn: its weight, from 0 (the model alone) to 1
    knn_k: int = 256  # knn: how many places
    knn_temp: float = 0.0625  # knn: a place at distance d counts exp(-d^2 / (knn_temp n_embd))
    knn_within: float = 0.0  # knn: places with d^2 / n_embd above this do not count; 0: no limit
    instead: str = ""  # learn: a text to forget first, such as the wrong word
    limit: int = 20  # memory list: entries to show; 0: all
    # output
    interactive: bool = False  # talk: lines are typed and answered in turn, with all in view
    roles: str = "You,Model"  # interactive: names before lines; empty: text goes on without names
    log: str = ""  # interactive: a file to which what is said is added, a JSON object a line
    trace: bool = False  # colour tokens by exit, draft, contrastive shift, or entropy
    trace_html: str = ""  # write that as a page for a browser
    json: bool = False  # a JSON line a token: entropy, soft or not, which before it were
    # run
    seed: int = 1337  # of the choices
    device: str = "auto"  # auto (a GPU where there is one) | cpu | cuda | mps
    dtype: str = "float32"  # float32 | bfloat16
    int8: bool = False  # blocks' matrices as 8-bit integers, with dtype = bfloat16 on a CPU
    compile: bool = False  # compile the step: half a minute once, several times as fast on a CPU

    def __post_init__(self):
        config.check(self, CHOICES, LIMITS)
        self.average = config.listed(self.average)
        if self.stop == prepare.END:
            self.stop, self.stop_at_end = "", True
        for name in ("stop", "think_after", "instead"):
            check_utf8(getattr(self, name), name)
        if not re.fullmatch("([^,]+,[^,]+)?", self.roles):
            raise ValueError(f"roles is two names, such as You,Model, or empty, not {self.roles!r}")
        ways = [k for k in WAYS if getattr(self, k)]
        if len(ways) > 1:
            raise ValueError(f"{ways[0]} and {ways[1]} are two ways to decode; choose one")
        if 0 < (self.beams or self.best_of) < self.n:
            raise ValueError(f"{ways[0]} = {getattr(self, ways[0])} cannot show n = {self.n} "
                             f"texts; give at least as many")
        for name, needs in self.idle():
            raise ValueError(f"{name} needs {needs}; else leave it out")

    def idle(self):
        """Yield (name, what it needs) of each setting that was changed and would do nothing, or
        not what it says."""
        return config.idle(
            self,
            (self.temperature, "draws, and at temperature = 0 nothing is drawn",
             "top_k top_p min_p best_of soft"),
            (not self.beams, "draws, and beams look for the likeliest text",
             "temperature top_k top_p min_p repetition_penalty think_after plan_draw"),
            (self.soft, "soft tokens: --soft",
             "soft_top_k gumbel collapse collapse_threshold collapse_by collapse_which "
             "collapse_back"),
            (self.soft != "vector", "mixtures of symbols, and a vector is none",
             "soft_top_k gumbel"),
            (self.soft != "vector" or self.collapse != "never", "draws, and vectors that never "
             "collapse are not drawn",
             "temperature top_k top_p min_p repetition_penalty amateur knn average"),
            (self.collapse != "always", "soft tokens, and with collapse = always there are none",
             "soft_top_k gumbel collapse_by collapse_which collapse_back"),
            (self.collapse != "never", "soft tokens that collapse, and with collapse = never none "
             "does", "collapse_by collapse_which collapse_back"),
            (self.collapse in ("entropy", "distance"), "collapse = entropy or distance",
             "collapse_threshold"),
            (self.collapse_back, "earlier soft tokens, and collapse_back = 0 leaves those as they "
             "are", "collapse_by collapse_which"),
            (self.collapse_by == "nearest", "the model alone to draw from with collapse_by = "
             "context or whole", "knn average amateur repetition_penalty"),
            (self.exit, "early exits, such as --exit=softmax", "exit_threshold exit_decay"),
            (self.exit_threshold >= 0, "an exit_threshold: none is ever stored for it",
             "exit_decay"),
            (bool(self.draft_exit) != bool(self.draft), "a draft: either draft_exit or draft",
             "speculate"),
            (self.speculate, "drafts to make, such as --speculate=4", "draft_exit draft"),
            (self.amateur, "contrastive decoding, such as --amateur=context:8", "alpha beta"),
            (not (self.exit or self.speculate), "every layer of every token, which exit and "
             "speculate save", "amateur knn average"),
            (self.knn, "a datastore, such as --knn=works.db", "knn_k knn_lambda knn_temp "
             "knn_within"),
            (self.knn_lambda, "a knn_lambda above 0", "knn_k knn_temp"),
            (self.knn_k > 1, "several places to weigh, and knn_k = 1 takes one", "knn_temp"),
            (self.memory, "a memory, such as --memory=facts.db", "memory_index"),
            (not self.interactive, "a run that is not interactive: that reads lines and shows one "
             "sample as it is made", "n beams best_of json trace_html n_think"),
            (self.interactive, "a conversation: --interactive", "roles log"),
            (not self.interactive or self.prompt not in ("-", "FILE:-"), "standard input, which "
             "interactive reads", "prompt"),
            (not self.json, "text to colour, and json prints none (trace_html does)", "trace"),
            (self.dtype == "bfloat16", "dtype = bfloat16: beside fp32 torch's 8-bit product is "
             "slower than the plain one", "int8"))


CHOICES = {
    "soft": (False, True, "vector"),
    "exit": ("", "softmax", "margin", "cosine", "classifier"),
    "collapse_by": ("nearest", "context", "whole"), "collapse_which": ("all", "far"),
    "collapse": ("distance", "entropy", "always", "never", "every:N"),
    "dtype": ("float32", "bfloat16"),
}
LIMITS = (  # lowest, highest, settings
    (1, 10_000, "n"),
    (0, 10_000, "beams best_of speculate draft_exit n_think"),
    (0, 2 ** 62, "max_new_tokens top_k soft_top_k limit"),
    (-1, 2 ** 62, "collapse_back"),
    (1, 2 ** 31, "knn_k"),
    (0, 2 ** 63 - 1, "seed"),
    (0, 1, "top_p min_p alpha knn_lambda exit_threshold"),
    (0, 1000, "beta exit_decay collapse_threshold temperature gumbel"),
    (1e-6, 1e9, "knn_temp"),
    (0, 1e9, "knn_within"),
    (0.01, 100, "repetition_penalty"))


def check_utf8(text, name):
    """Raise UserError where a text has bytes that are no UTF-8, for a shell half a character."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{name} is not UTF-8 text: {text[:80]!r}; convert it first")


# -------------------------------------------------------------------------------------------------
# choosing a token: functions over logits (B, V)


def penalize(logits, seen, penalty):
    """Lower the logits of the tokens in seen (B, V, bool): divided by the penalty if positive,
    multiplied if negative."""
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


def scale(logits, temperature):
    """Divide by the temperature; below 0.001 keep the first of the largest alone."""
    if temperature >= 1e-3:
        return (logits - logits.amax(-1, keepdim=True)) / temperature
    return torch.full_like(logits, -math.inf).scatter(1, logits.argmax(-1, keepdim=True), 0.0)


def keep_top_k(logits, k):
    """Keep the k largest; at 0 all."""
    if not k:
        return logits
    least = logits.topk(min(k, logits.size(-1)))[0][:, -1:]
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits, p):
    """Keep the smallest set of most likely tokens whose probabilities reach p (nucleus,
    arXiv:1904.09751); at 1 all."""
    if p == 1:
        return logits
    ordered, index = logits.sort(descending=True, dim=-1)
    probs = ordered.softmax(-1)
    drop = probs.cumsum(-1) - probs >= p  # what stands before a token already reaches p
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), -math.inf)


def keep_min_p(logits, p):
    """Keep tokens at least p times as likely as the first (arXiv:2407.01082); at 0 all."""
    if not p:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def contrast(expert, amateur, alpha, beta):
    """Return (1 + beta) expert - beta amateur over the tokens at least alpha times as likely as
    the expert's first; the others are out (O'Brien and Lewis 2023, arXiv:2309.09117)."""
    logits = (1 + beta) * expert - beta * amateur
    return logits.masked_fill(keep_min_p(expert, alpha) == -math.inf, -math.inf)


# setting: a function of logits (B, V) and its value, in their order; there is a value at which it
# changes nothing
PROCESSORS = {"temperature": scale, "top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p}


def distribution(logits, cfg, seen=None):
    """Return the probabilities (B, V) of the next token by the settings, with the penalty for
    tokens that were seen (B, V, bool)."""
    if seen is not None:
        logits = penalize(logits, seen, cfg.repetition_penalty)
    for name, process in PROCESSORS.items():
        logits = process(logits, getattr(cfg, name))
    return logits.softmax(-1)


def choose(p, generator):
    """Return a token per row (B,), drawn from p (B, V)."""
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def entropies(p):
    """Return the entropy of each row of p (B, V), a list, in nats."""
    return torch.special.entr(p).sum(-1).tolist()


def log_probability(logits, tokens):
    """Return that of a token per row, a list of B ids, under logits (B, V): a list."""
    at = torch.tensor(tokens, dtype=torch.long, device=logits.device)[:, None]
    return logits.log_softmax(-1).gather(1, at)[:, 0].tolist()


# -------------------------------------------------------------------------------------------------
# early exit: how sure an exit is, and how sure is enough


def top_two(model, h):
    """Return the probabilities of the two likeliest tokens, (B, T) each."""
    return model.to_logits(h).softmax(-1).topk(2, dim=-1).values.unbind(-1)


# of output vectors h (B, T, C) at an exit, and of those at the exit before it: (B, T) in [0, 1]
CONFIDENCE = {
    "softmax": lambda model, h, before: model.to_logits(h).softmax(-1).amax(-1),
    "margin": lambda model, h, before: torch.sub(*top_two(model, h)),
    "cosine": lambda model, h, before:
    F.cosine_similarity(h.float(), before.float(), dim=-1).clamp(0, 1),
    "classifier": lambda model, h, before: model.sure(h).sigmoid(),
}


def exit_rule(model, kind, threshold, decay=0.0, total=1):
    """Return should_exit(h, before) for GPT.forward_with_exits: where the confidence is above the
    threshold; at 0 all leave. With decay it falls along the text (CALM, arXiv:2207.07061):
    should_exit.t, how many tokens were made before the first place of h, a number or one per row
    (B, 1) and negative within a prompt, is for the caller to set."""
    # (a tensor: one graph serves every threshold)
    limit = torch.tensor(float(threshold), device=model.wte.weight.device)
    above = torch.where(limit > 0, limit, -1.0)

    def should_exit(h, before):
        sure, least = CONFIDENCE[kind](model, h, before), above
        if decay:
            t = (should_exit.t + torch.arange(h.size(1), device=h.device)).clamp(min=0)
            least = (0.9 * limit + 0.1 * torch.exp(-decay * t / total)).clamp(0, 1)
        return sure > least
    should_exit.t = 0
    return should_exit


def thresholds_path(path):
    """Return where the thresholds of a checkpoint file are kept."""
    return os.path.join(os.path.dirname(path), "exits.json")


def stored_thresholds(path):
    """Return {confidence: what calibrate found} beside a checkpoint; {} where nothing is stored.
    UserError where somebody changed it."""
    try:
        with open(thresholds_path(path), "rb") as f:
            stored = prepare.unseal(f.read(2 ** 20))
        for kind, found in stored.items():
            if not (kind in CONFIDENCE and 0 <= found["threshold"] <= 1 and found["of"]):
                raise ValueError(f"no threshold of {kind}")
        return stored
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{thresholds_path(path)} is damaged, or not as calibrate wrote it "
                        f"({str(e)[:80]}); delete it and run python bench.py calibrate "
                        f"again") from None


def model_id(cfg, path):
    """Return what a threshold was found for: the checkpoint, and how its weights are held."""
    return f"{prepare.checkpoint_id(path)} {cfg.dtype}{' int8' * cfg.int8}"


def check_exits(model, kind):
    """Raise UserError unless the model can leave early by this confidence."""
    if not model.exits:
        raise UserError("the model has no exits; train one with a . in layers, such as python "
                        "train.py --layers=AA.AA.AA")
    if kind == "classifier" and model.sure is None:
        raise UserError("the model has no classifier of exits; train one with --exit_classifier, "
                        "or use softmax, margin or cosine")
    if model.cfg.n_think:
        raise UserError("a model that thinks (n_think) reads its own last layer and cannot leave "
                        "early; leave exit out, or take another model")


def make_rule(cfg, model, path):
    """Return the exit_rule of the settings, None without exits."""
    if not cfg.exit:
        return None
    check_exits(model, cfg.exit)
    threshold = cfg.exit_threshold
    if threshold < 0:
        found = stored_thresholds(path).get(cfg.exit, {"of": ""})
        if found["of"] != model_id(cfg, path):
            raise UserError(f"no exit_threshold is stored for {cfg.exit} of this {path} in "
                            f"{cfg.dtype}; run python bench.py calibrate "
                            f"--out_dir={shlex.quote(path)} --exit={cfg.exit} "
                            f"--dtype={cfg.dtype}{' --int8' * cfg.int8}, or give one")
        threshold = found["threshold"]
    return exit_rule(model, cfg.exit, threshold, cfg.exit_decay, max(cfg.max_new_tokens, 1))


# -------------------------------------------------------------------------------------------------
# soft tokens: the next input is p @ E or a vector, until a policy says that it is time for a symbol


def soft_token(p, cfg, generator):
    """Return the distribution (B, V) that stands in the place of a token: the k most likely of p,
    drawn by a Gumbel-softmax (without that noise the likeliest dominates what the model makes of a
    mixture, and long texts end in blanks)."""
    logits = keep_top_k(p.log(), cfg.soft_top_k)
    if cfg.gumbel:
        u = torch.rand(p.shape, generator=generator, device=p.device).clamp(1e-9, 1 - 1e-7)
        logits = (logits - (-u.log()).log()) / max(cfg.gumbel, 1e-3)
    return logits.softmax(-1)


def similarity(soft, table):
    """Return the cosine (B, V) between the embedding of a soft token, p @ E of a distribution
    (B, V) or a vector (B, V + C), and every row of the table E (V, C)."""
    return F.normalize(expected_rows(soft, table), dim=-1) @ F.normalize(table, dim=-1).T


def collapses(p, soft, table, cfg, step):
    """Return which rows (B,) choose a symbol now, by cfg.collapse. p (B, V): of the next token;
    soft: what it would be as a soft one; step: tokens made so far."""
    kind, _, every = cfg.collapse.partition(":")
    limit = cfg.collapse_threshold
    if kind == "entropy":
        return torch.special.entr(p).sum(-1) < (0.5 if limit < 0 else limit)
    if kind == "distance":
        return 1 - similarity(soft, table).amax(-1) > (0.1 if limit < 0 else limit)
    now = kind == "always" or (kind == "every" and (step + 1) % int(every) == 0)
    return torch.full(p.shape[:1], now, device=p.device)


# -------------------------------------------------------------------------------------------------
# rows of text over a model


class Decoder:
    """B rows of tokens over a model: each its window, the ring of history behind it, and the
    cached state of both.

    `logits` (B, V) are always those of the next token. All that a row's future depends on are the
    ids it keeps, and what its soft tokens hold: when its window is full, the oldest quarter leaves
    for the ring at once (as ids), and slots and window are computed anew in one pass."""

    def __init__(self, model, rows, eot=None, compile=False, context=0, at_exit=0, leave=None,
                 memory=None, sources=None, neighbours=None, amateur=None, draft=None, others=(),
                 room=0):
        """context: a window of so many tokens, and no history; at_exit: keep the logits `early` of
        the exit after so many blocks too; leave: an exit_rule by which tokens leave early; memory
        {block: Memory}: what blocks M find, and write to when the window is full (a copy of their
        own); sources {block: (store, ids (H, N))}: which entries those are; neighbours: a
        memory.Neighbours; amateur, draft: a Decoder that reads the same tokens, to contrast with
        or to propose them; others: Decoders whose probabilities are averaged with this one's;
        room: tokens that the state of a compiled step has room for, the window where it is 0; other
        states grow by doubling, since attention reads all that they have room for."""
        self.model, self.eot, self.at_exit, self.leave = model, eot, at_exit, leave
        self.made = 0  # tokens behind the prompt
        self.neighbours, self.sources = neighbours, sources or {}
        self.amateur, self.draft, self.others = amateur, draft, list(others)
        self.step = compiled(model) if compile else model
        self.T, self.H, self.V = model.cfg.block_size, model.cfg.history, model.cfg.vocab_size
        if context:
            self.T, self.H = min(context, self.T), 0
        self.room = self.room_for(room or self.T) if compile else 0
        self.device = model.wte.weight.device
        self.memory, self.own = dict(memory or {}), False  # own: nobody else reads it
        # entries of the first `known` tokens of each window, as the one before had them
        self.carried, self.known = {}, [0] * len(rows)
        self.rows = [([], []) for _ in rows]  # (history, window), lists of ids, oldest first
        self.counts = [np.zeros(model.cfg.n_history - model.cfg.history, int) for _ in rows]
        # {place in the window: distribution (V,) or vector (V + C,)} of soft tokens
        self.soft = [{} for _ in rows]
        # what was expected of the first tokens of a window that has folded, (places, V)
        self.n_soft = 0 if context else max(model.cfg.n_soft, 0)
        self.expected = [torch.empty(0, self.V, device=self.device) for _ in rows]
        for b, ids in enumerate(rows):
            for token in ids:  # a prompt ends up where the same tokens would be, had they been made
                self.append(b, token)
        self.prefill()

    @property
    def amateur_logits(self):
        """The logits (B, V) of an amateur, None where there is none."""
        return self.amateur.logits if self.amateur else self.early

    def companions(self):
        """Return the Decoders that read the same tokens."""
        return [d for d in (self.amateur, self.draft, *self.others) if d]

    def append(self, b, token, soft=None):
        """Append a token to row b, and what it holds if it is soft. Return True if the window
        folded."""
        ring, window = self.rows[b]
        folds = len(window) == self.T
        if folds:
            n = max(1, self.T // 4)
            if self.memory or self.n_soft:
                self.look_back(b, n)
            if self.model.cfg.running_mean:  # of all that has left, since a document began
                for left in window[:n]:
                    self.counts[b][left] += 1
                    self.counts[b] *= left != self.eot
            ring.extend(window[:n])
            del window[:n]
            del ring[:max(0, len(ring) - self.H)]
            self.soft[b] = {at - n: p for at, p in self.soft[b].items() if at >= n}
        if soft is not None:
            self.soft[b][len(window)] = soft
        window.append(token)
        return folds

    @torch.inference_mode()
    def look_back(self, b, n):
        """Write into row b's memory what leaves its window with the first n tokens, and note what
        was expected of the others when they were made."""
        B = len(self.rows)
        if not self.own:
            self.memory = {i: m.copy(B) for i, m in self.memory.items()}
            self.own = True
        state = self.init_state([b])
        nowhere = torch.empty(1, 0, dtype=torch.long, device=self.device)
        logits = self.read(self.model, state, [b], [0], self.T, self.history([b]),
                           None if self.n_soft else nowhere)[0]
        if self.n_soft:
            # logits at t expect the token at t + 1, so one row down; nothing expects the first
            known, p = self.expected[b], F.pad(self.model.expect(logits[0]), (0, 0, 1, 0))
            self.expected[b] = torch.cat((known, p[len(known):]))[n:]
        if not self.memory:
            return
        carried = self.model.leave_window(state, torch.tensor([n], device=self.device))[1]
        for i, parts in carried.items():
            if i not in self.carried:
                self.carried[i] = [t.repeat_interleave(B, 0) for t in parts]
            for mine, new in zip(self.carried[i], parts):
                mine[b] = new[0]
        self.known[b] = self.T - n

    def init_state(self, rows):
        """Return an empty state for rows in a row, with what each finds besides its window."""
        memory, carried = self.remembered(slice(rows[0], rows[-1] + 1))  # views, to write to
        known = torch.tensor([self.known[b] for b in rows], device=self.device)
        longest = max(len(self.rows[b][1]) for b in rows)
        self.room = max(self.room, self.room_for(longest + 1))
        return self.model.init_state(len(rows), memory, carried, known, self.room)

    def remembered(self, at):
        """Return the memory and the carried entries of rows `at`, a slice or a LongTensor."""
        return ({i: m.select(at) for i, m in self.memory.items()},
                {i: [t[at] for t in parts] for i, parts in self.carried.items()})

    def region(self, b):
        """Return {place: distribution (V,)} of the soft region of row b, which is hard until its
        window has folded, and where training had it hard."""
        cfg, window = self.model.cfg, self.rows[b][1]
        return {at: p for at, p in enumerate(self.expected[b][:self.n_soft])
                if at and window[at] not in (cfg.eot, cfg.think_token)}

    def inputs(self, rows, first, width):
        """Return what the model reads of each of these rows from place first[i] on, `width` tokens
        padded at the right: ids (B, width), or where one of them is soft distributions
        or vectors (B, width, V or V + C); and the ids."""
        windows = [self.rows[b][1][f:f + width] for f, b in zip(first, rows)]
        ids = torch.tensor([w + [0] * (width - len(w)) for w in windows], device=self.device)
        soft = [(i, at - f, p) for i, (f, b) in enumerate(zip(first, rows))
                for at, p in {**self.region(b), **self.soft[b]}.items() if f <= at < f + width]
        if not soft:
            return ids, ids
        idx = F.one_hot(ids, len(soft[0][2])).float()
        for i, at, p in soft:
            idx[i, at] = p
        return idx, ids

    def history(self, rows):
        """Return the ring behind the window of these rows, as the model takes it; None where it
        has no slots."""
        if not self.H:
            return None
        rings = [self.rows[b][0] for b in rows]
        ring = np.array([[-1] * (self.H - len(r)) + r for r in rings])
        ring = prepare.forget(ring, self.eot)
        counts = np.array([self.counts[b] for b in rows])
        return torch.from_numpy(np.concatenate((counts, ring), 1)).to(self.device)

    @torch.inference_mode()
    def prefill(self, every=False):
        """Compute slots, window and state from what is kept, in one pass over rows padded at the
        right. Return logits of the next token (B, 1, V), with `every` of all places (B, T, V)."""
        lengths, rows = [len(w) for _, w in self.rows], range(len(self.rows))
        width = max(lengths)
        self.state = self.init_state(rows)
        last = torch.tensor(lengths, device=self.device) - 1
        out = self.read(self.model, self.state, rows, [0] * len(rows), width, self.history(rows),
                        None if every else last[:, None])
        self.state.rollback(width - 1 - last)
        self.record(out, last if every else -1)
        return out[0]

    def read(self, model, state, rows, first, width, history=None, at=None):
        """Read `width` tokens of each of these rows from place first[i] on. Return for the places
        `at` (B, n) among them (None: all) the logits, with `at_exit` those of the exit, with
        `leave` the blocks run, without it what the head read. Tokens of a prompt leave early too:
        so the state is that of decoding from its first token."""
        idx, ids = self.inputs(rows, first, width)
        if self.leave is None:
            out, early = model(idx, history=history, state=state, ids=ids, at=at), None
            if self.at_exit:
                early = out.exits[list(model.exits.values()).index(self.at_exit)]
                early = model.to_logits(standing_at(early, at))
            return out.logits, early, None, standing_at(out.h, at)
        before = [self.made - len(self.rows[b][1]) + f for b, f in zip(rows, first)]
        self.leave.t = torch.tensor(before, device=self.device)[:, None]
        logits, depth = model.forward_with_exits(idx, self.leave, history, state, ids)
        return standing_at(logits, at), None, standing_at(depth, at), None

    def read_last(self, n, model):
        """Read the last n tokens of each row behind the state."""
        first = [len(window) - n for _, window in self.rows]
        last = None if n == 1 else torch.full((len(first), 1), n - 1, device=self.device)
        self.record(self.read(model, self.state, range(len(first)), first, n, at=last), -1)

    def record(self, out, last):
        """Note what `read` made of the last token of each row, which stands at place last (B,)."""
        at = torch.arange(len(self.rows), device=self.device), last
        self.logits, self.early, depth, self.h = (None if t is None else t[at] for t in out)
        self.depth = [None] * len(self.rows) if depth is None else depth.tolist()
        # per row [(store, id)]: the entries that told most about the next token
        self.found = [[] for _ in self.rows]
        if self.neighbours:
            self.logits, self.found = self.neighbours.mix(self.logits, self.h)
        if self.others:
            # (behind the same size as logits had: a repetition_penalty is by their sign)
            size = self.logits.logsumexp(-1, keepdim=True)
            self.logits = averaged([d.logits for d in (self, *self.others)]) + size
        for i, places, weights in self.model.recalled(self.state) if self.sources else ():
            self.record_entries(*self.sources[i], places, weights)

    def record_entries(self, store, ids, places, weights, n=3):
        """Note which n entries of a store the last token of each row found: ids (H, N), places
        (B, H, k) there, negative for others, weights (B, H, k)."""
        k = weights.size(2)
        for b, (at, w) in enumerate(zip(places.flatten(1).tolist(), weights.flatten(1))):
            for j in w.topk(min(n, len(w)))[1].tolist():
                if w[j] > 0.05 and at[j] >= 0 and ids[j // k, at[j]] >= 0:
                    self.found[b].append((store, int(ids[j // k, at[j]])))

    def room_for(self, n):
        """Return the room of a state that is to hold n tokens: a power of 2, or the window."""
        return min(self.T, 1 << (n - 1).bit_length())

    @torch.inference_mode()
    def make_room(self, more=0):
        """Give the state room for the windows and so many tokens more."""
        needed = max(len(window) for _, window in self.rows) + more
        if needed > self.room:
            self.room = self.room_for(needed)
            new = self.model.init_state(len(self.rows), self.state.memory, room=self.room)
            self.state = new.copy_from(self.state)

    @torch.inference_mode()
    def push(self, tokens, soft=None):
        """Append a token to each row, a list of B ids, or a soft one where soft[b] is a
        distribution (V,) or a vector (V + C,). Return logits (B, V) of the next."""
        for d in self.companions():
            d.push(tokens, soft)
        folded = any([self.append(b, t, soft and soft[b]) for b, t in enumerate(tokens)])
        self.made += 1
        if folded:
            self.prefill()
        else:
            self.make_room()
            self.read_last(1, self.step)
        return self.logits

    @torch.inference_mode()
    def extend(self, ids):
        """Append the same ids to every row, in one pass where they fit."""
        for d in self.companions():
            d.extend(ids)
        if any([self.append(b, t) for b in range(len(self.rows)) for t in ids]):
            self.prefill()
        elif ids:
            self.make_room()
            self.read_last(len(ids), self.model)

    @torch.inference_mode()
    def weigh(self, b, at, changed, n=8):
        """Return what the soft token at place `at` of row b was, by itself and by all that stands
        behind it: (1, V), p(v) times the likelihood of what follows v, over its n likeliest v. The
        likelihood of a soft token is its expected log-likelihood. The cache holds what stands
        before the place `changed`, at most `at`, and what is from there on is read again."""
        window, at = self.rows[b][1], at - changed
        idx, ids = self.inputs([b], [changed], len(window) - changed)
        prior, likeliest = idx[0, at].topk(min(n, self.V))
        idx, ids = (t.repeat(len(prior), *[1] * (t.dim() - 1)) for t in (idx, ids))
        idx[:, at], ids[:, at] = F.one_hot(likeliest, self.V).float(), likeliest
        state = self.state.select(torch.full_like(likeliest, b))
        state.rollback(len(window) - changed)
        logits = self.model(idx, state=state, ids=ids).logits[:, at:-1]
        follows = (idx[:, at + 1:] * logits.log_softmax(-1)).sum((1, 2))
        p = (prior.log() + follows).softmax(0)
        return torch.zeros_like(idx[:1, at]).scatter(1, likeliest[None], p[None])

    @torch.inference_mode()
    def collapse(self, changes):
        """Put symbols in the place of soft tokens, changes [(row, place from the end (-1 is the
        last), id)], and repair the cache: what stands from the first of them on is computed again,
        in one pass. Places that have left are passed by."""
        for d in self.companions():
            d.collapse(changes)
        first = 0
        for b, at, token in changes:
            window = self.rows[b][1]
            if -at <= len(window):
                window[at] = token
                del self.soft[b][len(window) + at]
                first = min(first, at)
                self.known[b] = min(self.known[b], len(window) + at)
        if first and -first < min(len(w) for _, w in self.rows) and not self.carried:
            self.state.rollback(-first)
            self.read_last(-first, self.model)
        elif first:
            self.prefill()

    @torch.inference_mode()
    def select(self, rows):
        """Return a Decoder over these rows of this one; a row may be taken several times, and what
        it holds is computed once."""
        new, at = copy.copy(self), torch.tensor(rows, device=self.device)
        new.rows = [tuple(map(list, self.rows[r])) for r in rows]
        new.soft = [dict(self.soft[r]) for r in rows]
        new.counts = [self.counts[r].copy() for r in rows]
        for name in ("known", "depth", "found", "expected"):
            setattr(new, name, [getattr(self, name)[r] for r in rows])
        new.memory, new.carried = self.remembered(at)
        self.own = new.own = False  # one row is shared until somebody writes
        new.state = self.state.select(at)
        new.logits, new.h, new.early = (None if t is None else t[at]
                                        for t in (self.logits, self.h, self.early))
        new.amateur = self.amateur and self.amateur.select(rows)
        new.draft = self.draft and self.draft.select(rows)
        new.others = [d.select(rows) for d in self.others]
        return new

    @torch.inference_mode()
    def plan_lines(self, tok):
        """Return for each chunk that row 0's window holds now the tokens whose composition is
        nearest to the concept that is predicted from what stands before it, beside what was
        written; nothing where no level that stands first plans bound sums of as many tokens."""
        level, window = self.model.order[0], self.rows[0][1]
        cfg = self.model.cfg
        fixed = isinstance(level, Level) and not level.words and cfg.chunk_binding
        if not fixed or level.head is None or cfg.concept_of != "chunk":
            return []
        made = self.model.concepts(torch.tensor([window], device=self.device), self.history([0]))
        made = next(m for m in made if m.level is level)
        points = level.unbind(level.head(made.u)[0, :, 0, 0])  # (M + 1, chunk, C)
        near = points @ self.model.embeddings().T  # (M + 1, chunk, V)
        k, lines = near.size(1), ["", "planned | written"]
        for plan, end, exists in zip(near.argmax(-1).tolist(), made.end[0].tolist(),
                                     made.exists[0].tolist()):
            if exists:
                written = tok.decode(window[end + 1 - k:end + 1])
                lines.append(f"{tok.decode(plan)!r} | {written!r}")
        return lines

    def seen(self):
        """Return (B, V) bool: the tokens in each row's window."""
        seen = torch.zeros_like(self.logits, dtype=torch.bool)
        for b, (_, window) in enumerate(self.rows):
            seen[b, window] = True
        return seen


def compiled(model):
    """Return the model with its forward compiled, and what decoding runs in pieces compiled piece
    by piece: shapes are those of one token, or of one draft. Shares the weights."""
    # (each segment between exits has a graph of its own)
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    fast, cuda = copy.copy(model), model.wte.weight.device.type == "cuda"
    # on a CPU: store the vector that a matrix multiplies, do not make it anew for every row
    options = {} if cuda else {"realize_opcount_threshold": 6}
    for name in ("first_segment", "segment", "last_segment", "forward_early", "forward_remainder",
                 "forward"):
        setattr(fast, name, torch.compile(getattr(model, name), dynamic=False, options=options))
    return CudaGraph(fast) if cuda else fast


class CudaGraph:
    """A model whose step over one token a row is recorded once for each state and then launched as
    a whole, since a GPU waits for the launches of many small kernels. What it returns is
    overwritten by the next step."""

    def __init__(self, model):
        self.model, self.state = model, None
        # what waits for the GPU cannot be recorded: a GRU's documents, a search by an index
        self.waits = any(isinstance(m, GRU) for m in model.modules())

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, idx, state, **more):
        index = any(m.store and m.store.index for m in state.memory.values())
        if idx.is_floating_point() or idx.size(1) > 1 or self.waits or index:
            return self.model(idx, state=state, **more)
        if self.state is not state:
            self.record(idx, state)
        self.idx.copy_(idx)
        self.pos.copy_(state.pos)
        self.graph.replay()
        state.pos = self.behind
        return self.out

    def record(self, idx, state):
        self.state, self.idx, self.pos = state, idx.clone(), state.pos.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile, and let libraries take their memory
            for _ in range(2):
                state.pos = self.pos.clone()
                self.model(self.idx, state=state)
        torch.cuda.current_stream().wait_stream(stream)
        state.pos, self.graph = self.pos, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.model(self.idx, state=state)
        self.behind, state.pos = state.pos, self.pos.clone()


AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


class Int8(torch.nn.Module):
    """A Linear with its weights as 8-bit integers and a scale per output. torch's own weight-only
    product is private, but twice as fast as what is public; it reads past the end of rows whose
    length is no multiple of 16, so they are padded. For one token the loop that the compiler makes
    is faster still with AVX-512; elsewhere, and for several, it is slower."""

    def __init__(self, linear):
        super().__init__()
        w = linear.weight.detach().float()
        scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.pad = 0, -linear.in_features % 16
        q = (w / scale).round().to(torch.int8)
        self.register_buffer("q", F.pad(q, self.pad).contiguous())
        self.register_buffer("scale", scale[:, 0].to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x, first=0, last=None):
        rows = F.pad(x, self.pad).contiguous().view(-1, self.q.size(1))
        q, scale = self.q[first:last], self.scale[first:last]
        if len(rows) == 1 and AVX512 and torch.compiler.is_compiling():
            y = ((q.float() * rows.float()).sum(-1) * scale).to(x.dtype)
        else:
            y = torch._weight_int8pack_mm(rows, q, scale)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[first:last].to(y.dtype)


def to_int8(model):
    """Put Int8 in the place of every Linear of the blocks."""
    for part in (*model.blocks.modules(), *model.levels.modules()):
        for name, child in part.named_children():
            if isinstance(child, Linear):
                setattr(part, name, Int8(child))
    return model


# -------------------------------------------------------------------------------------------------
# ways to decode: each yields steps, lists of B lists of GeneratedToken


@dataclass
class GeneratedToken:
    """A token of a sample."""
    token: int  # its id
    soft: bool = False  # whether it was made soft
    entropy: float = 0.0  # of its choice, nats
    soft_behind: list | tuple = ()  # places before it (-1: the last) that were soft at its choice
    logp: float = 0.0  # its log-probability under the model, without filters
    depth: int | None = None  # blocks after which it was chosen
    drafted: bool | None = None  # whether a draft proposed it
    shift: float | None = None  # contrastive: by how much its log-probability rose
    found: list | tuple = ()  # [(store, id)]: the entries that told most about it


def generated(tokens, logits, p, **more):
    """Return the GeneratedToken of each of tokens, a list of B ids chosen from p (B, V), where the
    model gave logits (B, V). more: other fields, of all."""
    figures = zip(tokens, entropies(p), log_probability(logits, tokens))
    return [GeneratedToken(token, entropy=entropy, logp=logp, **more)
            for token, entropy, logp in figures]


class Plain:
    """Draw token by token, cfg.max_new_tokens for each row. think = (delimiter ids, ids): ids that
    follow of themselves whenever a row ends with the delimiter; new_text(): the Text of a sample
    that begins."""

    def __init__(self, decoder, cfg, generator=None, think=((), ()), new_text=None):
        self.decoder, self.cfg, self.generator = decoder, cfg, generator
        self.delimiter, self.thoughts = map(list, think)
        self.new_text = new_text
        self.forced = [[] for _ in decoder.rows]  # what follows of itself
        self.report = ""  # what is said about it in the end

    def scores(self):
        """Return what the model says of the next token: logits (B, V)."""
        logits, amateur = self.decoder.logits, self.decoder.amateur_logits
        if amateur is None:
            return logits
        return contrast(logits, amateur, self.cfg.alpha, self.cfg.beta)

    def seen(self):
        """Return (B, V) bool: the tokens in each row's window; None where none is penalized."""
        return None if self.cfg.repetition_penalty == 1 else self.decoder.seen()

    def probabilities(self):
        """Return the probabilities (B, V) by which the next token is chosen."""
        return distribution(self.scores(), self.cfg, self.seen())

    def force(self, tokens):
        """Return tokens, a list of B ids, or in their place what follows of itself."""
        tokens = [f.pop(0) if f else t for t, f in zip(tokens, self.forced)]
        n = len(self.delimiter)
        for b, token in enumerate(tokens) if n else ():
            if [*self.decoder.rows[b][1][-n:], token][-n:] == self.delimiter:
                self.forced[b] = list(self.thoughts)
        return tokens

    def describe(self, p, tokens, hard):
        """Return the GeneratedToken of each row, chosen from p (B, V), not soft where hard."""
        d, made = self.decoder, generated(tokens, self.decoder.logits, p)
        for b, token in enumerate(made):
            token.soft, token.depth, token.found = not hard[b], d.depth[b], d.found[b]
            token.soft_behind = sorted(at - len(d.rows[b][1]) for at in d.soft[b])
        if d.amateur_logits is not None:
            for token, logp in zip(made, log_probability(self.scores(), tokens)):
                token.shift = logp - token.logp
        return made

    def generate(self):
        """Yield a token for each row, and push it into the decoder."""
        for _ in range(self.cfg.max_new_tokens):
            p = self.probabilities()
            tokens = self.force(choose(p, self.generator).tolist())
            yield [[made] for made in self.describe(p, tokens, [True] * len(tokens))]
            self.decoder.push(tokens)


class Soft(Plain):
    """Keep tokens soft, distributions that the model reads as expected embeddings or the vectors
    that it regresses, until a policy says that one is to be a symbol; then those before it become
    symbols too."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        model = self.decoder.model
        mixes = model.cfg.n_think or model.cfg.n_soft  # distributions among its inputs
        if self.cfg.soft == "vector" and (model.point is None or mixes):
            raise UserError("soft = vector needs a model that regresses a point, and has neither "
                            "thoughts nor a soft region (n_think, n_soft), which are "
                            "distributions; train one with --head=nearest or --semantic_weight=0.1")
        if self.cfg.soft == "vector" and self.cfg.collapse_by == "whole":
            raise UserError("collapse_by = whole weighs the symbols of a distribution, and a "
                            "vector (soft = vector) stands for one; take context or nearest")
        if self.cfg.soft == "vector" and any(d.model is not model
                                             for d in self.decoder.companions()):
            raise UserError("soft = vector makes vectors that only the model itself reads; leave "
                            "out average, and take a part of the model as its amateur (exit:K, "
                            "context:N)")

    @torch.inference_mode()
    def soft_tokens(self, p):
        """Return what stands for the next token, drawn from p (B, V), if it is soft: (B, V or
        V + C)."""
        return self.decoder.model.vectors(self.decoder.h) if self.cfg.soft == "vector" else p

    def generate(self):
        """Yield tokens; one that will be chosen in context comes when it has collapsed."""
        cfg, d = self.cfg, self.decoder
        self.table = table = d.model.wte.weight.detach().float()
        waiting = [[] for _ in d.rows]
        holds = cfg.collapse_by != "nearest" and cfg.collapse != "never"
        for step in range(cfg.max_new_tokens):
            p = self.probabilities()
            now = collapses(p, self.soft_tokens(p), table, cfg, step).tolist()
            if self.collapse_earlier([n and not f for n, f in zip(now, self.forced)], waiting):
                p = self.probabilities()
            hard = [n or bool(f) for n, f in zip(now, self.forced)]
            tokens, soft = choose(p, self.generator).tolist(), [None] * len(hard)
            if not all(hard):
                mixed = self.soft_tokens(p)
                if cfg.soft != "vector":
                    mixed = soft_token(p, cfg, self.generator)
                near = similarity(mixed, table).argmax(-1).tolist()
                tokens = [t if h else n for t, h, n in zip(tokens, hard, near)]
                soft = [None if h else m for h, m in zip(hard, mixed)]
            tokens, ready = self.force(tokens), []
            for row, made in zip(waiting, self.describe(p, tokens, hard)):
                row.append(made)
                soft_places = [*made.soft_behind, *[0] * made.soft] if holds else ()
                n = max(len(row) - 1 + min(soft_places, default=1), 0)
                ready.append(row[:n])
                del row[:n]
            yield ready
            d.push(tokens, soft)
        if any(waiting):
            yield waiting

    def collapse_earlier(self, now, waiting):
        """Make the soft tokens of rows where `now` symbols, in place: the nearest one, which is
        the id that stands there already, one drawn from what the model expects there in a pass
        over the whole window, or one drawn by `weigh`. What waits to be shown is corrected. Return
        True if there was any."""
        d, cfg, changes = self.decoder, self.cfg, []
        rows = [b for b, soft in enumerate(d.soft) if now[b] and soft and cfg.collapse_back]
        if not rows:
            return False
        logits = d.prefill(every=True) if cfg.collapse_by == "context" else None
        for b in rows:
            window, first = d.rows[b][1], 0
            for at in sorted(d.soft[b])[-max(cfg.collapse_back, 0):]:
                if cfg.collapse_which == "far" and \
                        similarity(d.soft[b][at][None], self.table).max() >= 0.7:
                    continue
                token, first = window[at], first or at
                if at and cfg.collapse_by != "nearest":
                    p = d.weigh(b, at, first) if logits is None else distribution(
                        logits[b, at - 1:at], cfg)
                    token = window[at] = choose(p, self.generator).item()
                    chosen = torch.tensor(token, device=d.device)
                    d.soft[b][at] = F.one_hot(chosen, len(d.soft[b][at])).float()
                place = at - len(window)  # from the end, which all decoders have in common
                changes.append((b, place, token))
                if -place <= len(waiting[b]):
                    waiting[b][place].token = token
        d.collapse(changes)
        return True


class Speculation(Plain):
    """Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192), cfg.speculate tokens ahead:
    a draft proposes them one by one, the model verifies them in one pass, and what is kept is
    distributed exactly as the model's own. The draft is the decoder's own (a smaller model), or the
    model's first blocks up to an exit, which then verifies from there on (LayerSkip,
    arXiv:2404.16710): both share one cache."""

    def __init__(self, decoder, cfg, *more, **named):
        super().__init__(decoder, cfg, *more, **named)
        if decoder.model.cfg.n_think:
            raise UserError("the model thinks (n_think), and a draft cannot; leave speculate out")
        self.draft, self.decoders = decoder.draft, [decoder, *decoder.companions()]
        if cfg.draft_exit:
            self.place = config.build(decoder.model.exit_place, blocks=cfg.draft_exit)
        self.proposed = self.accepted = 0
        room = min(d.T for d in self.decoders)
        if cfg.speculate >= room - 1:
            raise UserError(f"speculate = {cfg.speculate} tokens ahead do not fit into a window "
                            f"of {room}; give fewer")

    def propose(self, tokens, n, seen):
        """Draft n tokens after tokens (B,). Return them (B, n), their distributions (B, n, V),
        and what the model goes on from, (B, n + 1, C). The draft's state then stands behind them
        all."""
        drafted, q, hidden = [], [], []
        for i in range(n + 1):
            if self.draft:
                logits = self.draft.step(tokens[:, None], state=self.draft.state).logits
            else:
                d = self.decoder
                x, logits = d.step.forward_early(tokens[:, None], d.state, self.place)
                hidden.append(x.clone())  # (a compiled graph may use its memory again)
            if i == n:
                break
            if seen is not None:
                seen = seen.scatter(1, tokens[:, None], True)
            q.append(distribution(logits[:, -1], self.cfg, seen))
            tokens = choose(q[-1], self.generator)
            drafted.append(tokens)
        return (torch.stack(drafted, 1), torch.stack(q, 1),
                torch.cat(hidden, 1) if hidden else None)

    def verify(self, tokens, hidden):
        """Return the model's logits (B, n + 1, V) after each of tokens (B, n + 1)."""
        d = self.decoder
        if hidden is None:
            return d.step(tokens, state=d.state).logits
        d.state.rollback(tokens.size(1))
        return d.step.forward_remainder(hidden, tokens, d.state, self.place)

    def judge(self, first, drafted, q, logits):
        """Keep of drafted (B, n), drawn from q (B, n, V) behind the tokens first (B,), what the
        model's logits (B, n + 1, V) agree to. Return how many of each row (B,), the token that
        follows those (B,), and the distribution at each place (B, n + 1, V)."""
        (B, n), seen, at = drafted.shape, self.seen(), drafted[..., None]
        if seen is not None:
            tokens = torch.cat((first[:, None], drafted), 1)
            read = F.one_hot(tokens, logits.size(2)).cumsum(1).bool()
            seen = (seen[:, None] | read).flatten(0, 1)
        p = distribution(logits.flatten(0, 1), self.cfg, seen).view_as(logits)
        odds = (p[:, :n].gather(2, at) / q.gather(2, at))[..., 0]
        luck = torch.rand(B, n, generator=self.generator, device=p.device)
        kept = (luck < odds).cumprod(1).sum(1)
        # what is left of p where q has drawn and been refused (`choose` needs no sum of 1)
        left = (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0)
        left = torch.where(left.any(-1, keepdim=True), left, p)
        return kept, choose(left[torch.arange(B, device=p.device), kept], self.generator), p

    @torch.inference_mode()
    def generate(self):
        """Yield several tokens at once."""
        cfg, d, n = self.cfg, self.decoder, self.cfg.speculate
        counts, p, first = [0] * len(d.rows), self.probabilities(), None
        while min(counts) < cfg.max_new_tokens:
            first = choose(p, self.generator) if first is None else first
            ready = [[made] for made in generated(first.tolist(), d.logits, p, drafted=False)]
            if min(e.T - len(w) for e in self.decoders for _, w in e.rows) <= n:  # one is to fold
                d.push(first.tolist())
                p, first = self.probabilities(), None
            else:
                for e in self.decoders:
                    e.make_room(n + 1)
                drafted, q, hidden = self.propose(first, n, self.seen())
                logits = self.verify(torch.cat((first[:, None], drafted), 1), hidden)
                kept, first, p = self.judge(first, drafted, q, logits)
                for b, k in enumerate(kept.tolist()):
                    ready[b] += generated(drafted[b, :k].tolist(), logits[b, :k], p[b, :k],
                                          drafted=True)
                for e in self.decoders:
                    e.state.rollback(n - kept)
                    for b, tokens in enumerate(ready):
                        for made in tokens:
                            e.append(b, made.token)
                rows = torch.arange(len(kept), device=kept.device)
                d.logits, p = logits[rows, kept], p[rows, kept]
                self.proposed += n * len(kept)
                self.accepted += int(kept.sum())
                self.report = f"[{self.accepted} of {self.proposed} drafted tokens accepted]"
            yield [row[:max(cfg.max_new_tokens - c, 0)] for row, c in zip(ready, counts)]
            counts = [c + len(row) for c, row in zip(counts, ready)]


def likeliest(rows, n):
    """Return the n likeliest of rows of GeneratedToken, by the mean of their log-probabilities."""
    mean = lambda row: sum(made.logp for made in row) / max(len(row), 1)
    return sorted(rows, key=mean, reverse=True)[:n]


class BestOf(Plain):
    """Draw samples, each up to its end, and show the likeliest first, all at once."""

    def generate(self):
        rows = [([], self.new_text()) for _ in self.decoder.rows]
        for ready in super().generate():
            for (row, text), tokens in zip(rows, ready):
                for made in tokens:
                    if not text.done:
                        text.add(made.token)
                        row.append(made)
            if all(text.done for _, text in rows):
                break
        yield likeliest([row for row, _ in rows], self.cfg.n)


class Beams(Plain):
    """Search the cfg.beams likeliest texts from the row of a decoder, by the sum of
    log-probabilities; a text that has ended grows no more. They are shown all at once, the
    likeliest first (by its mean, as lengths differ)."""

    @torch.inference_mode()
    def generate(self):
        score = torch.zeros(1, device=self.decoder.device)
        stays = torch.full((self.decoder.V,), -math.inf, device=score.device)
        stays[0] = 0.0  # a finished text has one way to go on, at no cost
        texts = [([], self.new_text())]
        for _ in range(self.cfg.max_new_tokens):
            logits = self.scores()
            entropy = entropies(logits.softmax(-1))
            done = torch.tensor([text.done for _, text in texts], device=score.device)
            step = torch.where(done[:, None], stays, logits.log_softmax(-1))
            total = (score[:, None] + step).flatten()
            score, best = total.topk(min(self.cfg.beams, int(total.isfinite().sum())))
            parents, tokens = (best // len(stays)).tolist(), (best % len(stays)).tolist()
            grown = []
            for parent, token in zip(parents, tokens):
                made, text = texts[parent]
                if not text.done:
                    text = text.copy()
                    text.add(token)
                    logp = step[parent, token].item()
                    made = [*made, GeneratedToken(token, entropy=entropy[parent], logp=logp)]
                grown.append((made, text))
            texts = grown
            if all(text.done for _, text in texts):
                break
            self.decoder = self.decoder.select(parents)
            self.decoder.push(tokens)
        yield likeliest([made for made, _ in texts], self.cfg.n)


WAYS = {"soft": Soft, "exit": Plain, "speculate": Speculation, "beams": Beams, "best_of": BestOf}


def way_of(cfg):
    """Return the class of the way to decode that the settings ask for."""
    return next((way for name, way in WAYS.items() if getattr(cfg, name)), Plain)


def generate(decoder, cfg, generator=None, **more):
    """Return an iterator of steps, by the settings."""
    return way_of(cfg)(decoder, cfg, generator, **more).generate()


def gather(steps, B):
    """Return all that an iterator of steps gives: a list of GeneratedToken for each of B rows."""
    rows = [[] for _ in range(B)]
    for ready in steps:
        for row, tokens in zip(rows, ready):
            row += tokens
    return rows


# -------------------------------------------------------------------------------------------------
# text, and how it is shown


class Text:
    """The text of one row as its tokens come in: whole characters only, ended before the stop
    string or by the token `last`. It holds no more than what may begin the stop string."""

    def __init__(self, tokenizer, stop="", silent=None, last=None):
        self.tok, self.stop, self.held, self.done = tokenizer, stop, "", False
        self.silent, self.last = silent, last  # silent: the think token, which is no text
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def copy(self):
        new = copy.copy(self)
        new.utf8 = copy.copy(self.utf8)
        return new

    def add(self, token):
        """Take a token. Return the text that is now certain to stand."""
        if self.done or token == self.silent:
            return ""
        if token == self.last:
            out, self.done = self.end(), True
            return out
        self.held += self.utf8.decode(self.tok.decode_bytes([token]))
        before, found, _ = self.held.partition(self.stop) if self.stop else (self.held, "", "")
        if found:
            self.held, self.done = "", True
            return before
        begun = range(max(len(self.stop), 1))  # so much of the stop string may have begun
        sure = len(self.held) - max(n for n in begun if self.held.endswith(self.stop[:n]))
        out, self.held = self.held[:sure], self.held[sure:]
        return out

    def end(self):
        """Return what was held back."""
        out, self.held = self.held + ("" if self.done else self.utf8.decode(b"", True)), ""
        return out


def new_text(cfg, tok, mcfg):
    """Return the Text of a sample that begins."""
    silent = mcfg.think_token if mcfg.n_think else None
    return Text(tok, cfg.stop, silent, tok.eot if cfg.stop_at_end else None)


def on_screen(text):
    """Return a text as it is printed: on a terminal its control characters are escapes."""
    return config.visible(text) if sys.stdout.isatty() else text


def retrieved(made):
    """Return the entries that told most about a token, as "ID 'text'"."""
    return [f"{i} {store.texts([i])[0]!r}" for store, i in made.found]


HEAT = 40, 148, 220, 208, 196  # of a terminal: from green to red
PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>Trace</title>
<meta name=viewport content="width=device-width">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root{color-scheme:light dark;--low:#cfe6ff;--high:#ff9a5c}
@media(prefers-color-scheme:dark){:root{--low:#123a5c;--high:#a0440c}}
body{font:16px/1.6 monospace;max-width:60em;margin:auto;padding:1em 1em 8em}
pre{font:inherit;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;
border-top:1px solid #888;padding-top:1em}
i,u{font-style:normal;cursor:pointer;background:color-mix(in oklab,var(--high) var(--v),var(--low))}
i:hover,u:hover{outline:2px solid}
pre :hover:after{content:attr(data-t);position:fixed;left:0;right:0;bottom:0;padding:.5em 1em;
background:canvas;border-top:2px solid;white-space:pre-wrap}
p i{padding:.1em .5em;margin:.1em 0;display:inline-block}
</style><h1>Trace</h1><p>"""
TOKEN = '<{0} style=--v:{1:.0%} data-t="{2}">{3}</{0}>'


def heat(made, mcfg):
    """Return (what it means, 0 to 1) of a token: by its exit, its draft, its contrastive shift or
    else its entropy."""
    if made.depth is not None:
        return f"left after {made.depth} of {mcfg.n_layer} blocks", made.depth / mcfg.n_layer
    if made.drafted is not None:
        return "drafted" if made.drafted else "not drafted", float(not made.drafted)
    if made.shift is not None:
        return f"shift {made.shift:+.2f}", min(max(made.shift / 2 + 0.5, 0.0), 1.0)
    return f"entropy {made.entropy:.2f}", min(made.entropy / math.log(mcfg.vocab_size), 1.0)


def show(made, text, i, tok, cfg, mcfg):
    """Return what is printed of a token of sample i, whose certain text is `text`: as it is, in
    colour, or as a line of JSON with the token's own text."""
    if cfg.json:
        found = [{"id": int(i), "text": store.texts([i])[0]} for store, i in made.found]
        line = {"sample": i, "text": tok.decode([made.token]), **vars(made), "found": found or None,
                "entropy": round(made.entropy, 4), "logp": round(made.logp, 4)}
        says = lambda v: v is not None and (not isinstance(v, float) or math.isfinite(v))
        return json.dumps({k: v for k, v in line.items() if says(v)}) + "\n"  # (no infinity)
    text = on_screen(text)
    if not (cfg.trace and text and sys.stdout.isatty()) or (cfg.soft and not made.soft):
        return text
    colour = HEAT[min(int(heat(made, mcfg)[1] * len(HEAT)), len(HEAT) - 1)]
    return f"\033[{'36;4' if cfg.soft else f'38;5;{colour}'}m{text}\033[0m"


def check_page(path, name="trace_html", start=PAGE.partition("\n")[0]):
    """Raise UserError where a page at path, the setting of this name, would take the place of
    something else (ours has this start), or has no folder."""
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(f"the folder of {name} {path} does not exist; make it, or name another")
    ours = False
    if os.path.isfile(path):
        with open(path, "rb") as f:
            ours = f.read(len(start)) in (b"", start.encode())
    if os.path.lexists(path) and not ours:
        raise UserError(f"{name} {path} is there already, and is not one that this wrote; "
                        f"choose another file")


def write_page(path, prompt, samples, mcfg, plans):
    """Write samples, lists of (text, GeneratedToken), as a page: each token on its colour, soft
    ones underlined, with what that means under the pointer; what colours mean; lines of plans."""
    shown = lambda text: html.escape(config.visible(text))
    scale = dict(heat(made, mcfg) for pieces in samples for _, made in pieces)
    marks, page = sorted(scale, key=scale.get), [PAGE]
    for at in sorted({i * (len(marks) - 1) // 4 for i in range(5)} if marks else ()):
        page += TOKEN.format("i", scale[marks[at]], "", marks[at]), "\n"
    page.append("<p>Point at or tap a token to see what its colour means and how likely the model "
                "found it. Underlined tokens were soft; the prompt has no colour.")
    for pieces in samples:
        page += "<pre>\n", shown(prompt)  # (a line end right behind the tag is not shown)
        for text, made in pieces:
            meaning, value = heat(made, mcfg)
            title = "\n".join((f"{meaning}, {math.exp(made.logp):.0%}", *retrieved(made)))
            page.append(TOKEN.format("iu"[made.soft], value, shown(title), shown(text)))
        page.append("</pre>")
    if plans:
        page += "<pre>", shown("\n".join(plans)), "</pre>"
    with prepare.replacing(path) as f:
        f.write("".join(page).encode())


def write(steps, cfg, tok, mcfg, prompt, used, keep=False):
    """Print what an iterator of steps gives, the first sample as it is made, the others when they
    are whole. used: a Counter that takes (store, id) of what was found. Return for each sample its
    pieces [(text, GeneratedToken)], which with keep are kept of the first too."""
    samples = [(new_text(cfg, tok, mcfg), []) for _ in range(cfg.n)]
    for ready in steps:
        for i, ((text, pieces), tokens) in enumerate(zip(samples, ready)):
            for made in tokens:
                if text.done:
                    break
                piece = text.add(made.token)
                used.update(made.found)
                if i or keep:
                    pieces.append((piece, made))
                if not i:
                    print(show(made, piece, i, tok, cfg, mcfg), end="", flush=True)
        if all(text.done for text, _ in samples):
            break
    for i, (text, pieces) in enumerate(samples):
        if i:
            print("" if cfg.json else "-" * 40 + "\n" + on_screen(prompt), end="")
            print(*(show(made, piece, i, tok, cfg, mcfg) for piece, made in pieces), sep="", end="")
        if not cfg.json:
            end = text.end()
            print(on_screen(end))
            if pieces:
                pieces[-1] = (pieces[-1][0] + end, pieces[-1][1])
    return [pieces for _, pieces in samples]


def converse(decoder, cfg, tok, path, prompt, generator, think, used, log):
    """Turn by turn: a line is read, appended to all that stands there, and gone on from; what was
    shown then stands there too. With roles each line has a name before it, and the model stops
    where it would speak for the other. Turns go to the file `log`, and to the stores of the model
    of `path`, both sides' lines as one text. used: as in write."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then knows the arrow keys, and the lines before)

    def log_turn(role, text):
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "role": role, "text": text}
        print(json.dumps(line, ensure_ascii=False), file=log, flush=True)

    print(on_screen(prompt), end="\n" if prompt and not prompt.endswith("\n") else "")
    you, other = (cfg.roles or SampleConfig.roles).split(",")
    before, after, last = f"{you}: ", f"\n{other}:", prompt  # last: what stands before a line
    if not (cfg.roles and can_encode(tok, after + before)):
        if cfg.roles != SampleConfig.roles:
            config.note(f"[this model cannot write {you}: and {other}:, so nobody is named; give "
                        f"other --roles]" * bool(cfg.roles))
        before, after = "", "\n" if can_encode(tok, "\n") else ""
    elif not cfg.stop:
        cfg.stop = f"\n{you}:"
    while True:
        try:
            text = input(before or "> ")
            line = "\n" * (before > "" and last[-1:] not in ("", "\n")) + before + text + after
            ids = encode(tok, line, "the line")
        except EOFError:
            print()
            return
        except (UnicodeDecodeError, UserError) as e:
            config.note(f"{e}; type another line")
            continue
        decoder.extend(ids)
        log_turn(you, text)
        print(after[1:], end="")
        copied = decoder.select([0])  # what is made and not shown goes
        steps = generate(copied, cfg, generator, think=think)
        pieces = write(steps, cfg, tok, decoder.model.cfg, prompt, used, keep=True)[0]
        if cfg.stop_at_end and pieces and pieces[-1][1].token == tok.eot:
            del pieces[-1]
        while cfg.stop and pieces and not pieces[-1][0]:  # tokens of the stop
            del pieces[-1]
        shown, last = [made.token for _, made in pieces], "".join(piece for piece, _ in pieces)
        whole = tok.decode([t for t in shown if t != decoder.model.cfg.think_token])
        if cfg.stop and whole != last and whole.startswith(last):  # a token reaches into the stop
            shown = tok.encode(last)
        decoder.extend(shown)
        log_turn(other, last.strip())
        last = last or line
        for kind, file in stores_of(cfg) if len(ids + shown) > 1 else ():
            try:
                with memory.open_store(kind, file, decoder.model, path, True) as store:
                    memory.learn(store, decoder.model, tok, ids + shown)
            except UserError as e:
                config.note(f"[not remembered: {e}]")


# -------------------------------------------------------------------------------------------------
# what decoding begins from: a device, a model, a prompt


def newest(root="out"):
    """Return the checkpoint under root that was written last."""
    found = glob.glob(os.path.join(root, "**", "ckpt.pt"), recursive=True)
    if not found:
        raise UserError(f"there is no checkpoint under {root}/; name one with --out_dir=FOLDER, or "
                        f"make one with python prepare.py and then python train.py")
    return max(found, key=os.path.getmtime)


def load(path, device="cpu", dtype="float32", int8=False):
    """Return (model in eval mode, checkpoint) of a checkpoint file or the folder it is in."""
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
    return (to_int8(model) if int8 else model).eval(), ckpt


def draw_plans(model, on=True):
    """Have levels hand down draws of what they predict (by torch's own generator), or no longer."""
    for level in model.modules():
        if isinstance(level, Level):
            level.draws = on


def open_model(cfg):
    """Return (model, checkpoint, path of its file) of the settings, on the device and in the type
    that they name."""
    cfg.device = config.find_device(cfg.device)
    kind = torch.device(cfg.device).type
    missing = config.compiler_missing(kind) if cfg.compile else ""
    if missing:
        raise UserError(f"compile needs {missing}, which was not found; install it or leave "
                        f"--compile out")
    if cfg.int8 and kind != "cpu":
        raise UserError(f"int8 is for a CPU, not {cfg.device}; give --device=cpu, or leave it out")
    path = prepare.checkpoint_path(cfg.out_dir or os.path.dirname(newest()))
    return *load(path, cfg.device, cfg.dtype, cfg.int8), path


def tokenizer_of(ckpt, path):
    """Return the tokenizer of a checkpoint; UserError where it is not that of its model."""
    tok, n = prepare.Tokenizer(ckpt["tokenizer"]), ckpt["model_config"]["vocab_size"]
    if tok.n_vocab != n:
        raise UserError(f"checkpoint {path} is damaged: its tokenizer has {tok.n_vocab} tokens and "
                        f"its model {n}; take another")
    return tok


def encode(tok, text, name):
    """Return the token ids of a text; UserError names it, and what the vocabulary has."""
    check_utf8(text, name)
    if prepare.END in text:
        config.note(f"[{prepare.END} in {name} is read as letters]")
    try:
        return tok.encode(text)
    except UserError as e:
        raise UserError(f"{name}: {e} (this model reads {tok.chars!r:.100})") from None


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
    if text == SampleConfig.prompt and not can_encode(tok, text):
        text = "" if tok.eot is not None else tok.decode([0])
        begins = f"with {text!r}" if text else "a new text"
        config.note(f"[the model reads no line end; it begins {begins}]")
    begins = not text or text.startswith(prepare.END)
    if begins and tok.eot is None:
        raise UserError(f"the prompt is empty or begins with {prepare.END}, and the model has no "
                        f"end of a text to begin from; give at least one character")
    text = text.removeprefix(prepare.END)
    return text, [tok.eot] * begins + encode(tok, text, "the prompt")


def think_tokens(cfg, mcfg, tok, path):
    """Return (ids after which think tokens follow, those that do then)."""
    if not (cfg.n_think or cfg.think_after):
        return (), ()
    if cfg.n_think > mcfg.n_think or not mcfg.n_think:
        raise UserError(f"{path} was not trained to think so often: it has n_think = "
                        f"{mcfg.n_think}; give fewer, or leave n_think and think_after out")
    after = encode(tok, cfg.think_after, "think_after")
    return after, [mcfg.think_token] * (cfg.n_think or mcfg.n_think)


def amateur_of(cfg, model):
    """Return (kind, number) of an amateur within the model, such as exit:2 or context:8; ("", 0)
    of another."""
    inside = re.fullmatch("(exit|context):(.*)", cfg.amateur)
    if not inside:
        return "", 0
    kind, number = inside.groups()
    if not re.fullmatch("[1-9][0-9]{0,8}", number):
        raise UserError(f"amateur {cfg.amateur} needs a number of at least 1, as {kind}:1")
    if kind == "exit":
        config.build(model.exit_place, blocks=int(number))
    return kind, int(number)


def make_decoder(cfg, model, rows, eot=None, other=None, average=(), streams=(), **more):
    """Return the Decoder of the settings over rows of ids, beside its amateur or draft. other: the
    model of that, where it is not a part of this one; average: models to average it with; streams:
    those of these that remember what leaves their window; more: arguments of the Decoder."""
    if cfg.plan_draw:
        if not (model.levels and model.cfg.draws()):
            raise UserError("plan_draw needs a model whose levels hand down concepts that can be "
                            "drawn; train one with --layers='(AA)AA' --plan=cross --concept=energy")
        torch.manual_seed(cfg.seed)
    draw_plans(model, cfg.plan_draw)
    made = cfg.max_new_tokens + cfg.speculate
    unknown = cfg.interactive or cfg.speculate and cfg.n > 1  # (rows do not stay together)
    room = 0 if unknown else max(map(len, rows)) + made
    start = lambda m, **more: Decoder(m, rows, eot, cfg.compile, room=room, **more)
    start_other = lambda m: start(m, memory=m.init_memory(1) if m in streams else None)
    kind, number = amateur_of(cfg, model)
    if kind == "exit":
        more["at_exit"] = number
    elif kind == "context":
        more["amateur"] = start(model, context=number)
    elif cfg.amateur or cfg.draft:
        more["amateur" if cfg.amateur else "draft"] = start_other(other)
    return start(model, others=map(start_other, average), **more)


def stores_of(cfg):
    """Return [(kind, file)] of the stores of entries that the settings name."""
    return [(kind, file) for kind in ("memory", "knn") if (file := getattr(cfg, kind))]


def open_decoder(cfg, model, ckpt, path, ids, eot, stores):
    """Return the Decoder of the settings over ids, as many rows as they need, with the files that
    they name. stores: an ExitStack that closes what is opened."""
    def load_other(name, path):
        other, its = load(path, cfg.device, cfg.dtype, cfg.int8)
        if its["tokenizer"] != ckpt["tokenizer"]:
            raise UserError(f"{name} {path} has another tokenizer than the model; name one that "
                            f"was trained on the same dataset")
        if its["train_config"].get("stream"):
            streams.append(other)
        return other

    streams = []
    more = {"leave": make_rule(cfg, model, path), "streams": streams,
            "average": [load_other("average", other) for other in cfg.average]}
    name = "amateur" if cfg.amateur else "draft"
    named = getattr(cfg, name)
    if named and not amateur_of(cfg, model)[0]:
        more["other"] = load_other(name, named)
    if cfg.memory or ckpt["train_config"].get("stream"):
        more["memory"] = model.init_memory(1)  # what leaves the window is kept, as in training
    for kind, file in stores_of(cfg):
        if cfg.interactive:  # what is said will be written there; a new one is made
            memory.open_store(kind, file, model, path, write=True).close()
        store = stores.enter_context(memory.open_store(kind, file, model, path))
        if cfg.interactive and not store.count():
            continue
        if kind == "memory":
            more["memory"], more["sources"] = memory.open_memory(
                store, model, model.cfg.mem_size, cfg.memory_index)
        else:
            more["neighbours"] = memory.Neighbours.open(
                store, cfg.knn_k, cfg.knn_lambda, cfg.knn_temp * model.cfg.n_embd, cfg.device,
                model.cfg.vocab_size, (cfg.knn_within or math.inf) * model.cfg.n_embd)
    decoder = make_decoder(cfg, model, [ids], eot, **more)
    return decoder.select([0] * (1 if cfg.beams else cfg.best_of or cfg.n))


# -------------------------------------------------------------------------------------------------
# commands


def learn(cfg, *files):
    """Read texts into a store, without a gradient. Each file is one document, and in the store
    whole or not at all; with instead all of them together, and that text is forgotten."""
    if len(stores_of(cfg)) != 1:
        raise UserError("learn needs to know where to: --memory=PATH for blocks M, or --knn=PATH, "
                        "one at a time")
    (kind, target), = stores_of(cfg)
    if not files:
        raise UserError(f"learn needs texts to read: python sample.py learn "
                        f"--{kind}={shlex.quote(target)} FILE...")
    model, ckpt, path = open_model(cfg)
    tok, texts = tokenizer_of(ckpt, path), []
    for name in files:  # all that may be wrong with them is found before anything is written
        texts.append((name, encode(tok, "".join(prepare.pieces(name)), name)))
        if len(texts[-1][1]) < 2:
            raise UserError(f"{name} holds fewer than 2 tokens; give a longer text")
    said, say = [], print
    if cfg.instead:
        memory.Store(target).close()  # it is there
        say = said.append  # nothing is done before all is
    with (memory.open_store(kind, target, model, path, write=True) as store,
          store.batch() if cfg.instead else contextlib.nullcontext()):
        if cfg.instead:
            say(memory.take_out(store, cfg.instead))
        for name, ids in texts:
            say(f"{config.visible(name)}: {memory.learn(store, model, tok, ids):,} entries")
        say(f"{config.visible(target)}: {store.count():,} entries")
    print(*said, sep="\n", end="\n" * bool(said))


def inspect(cfg, path="", action="stats", *words):
    """Look into a store, or edit it."""
    if not path or action not in memory.ACTIONS:
        raise UserError(f"memory takes a store and one of {', '.join(memory.ACTIONS)}, as python "
                        f"sample.py memory facts.db list")
    if cfg.limit != SampleConfig.limit and action != "list":
        raise UserError(f"limit is for list, not {action}; leave it out")
    check_utf8(" ".join(words), f"what {action} takes")
    memory.inspect(path, action, words, cfg.limit)


def stand_in(m):
    """Return the GPTConfig of model settings without a dataset: Shakespeare's 65 characters, one of
    them for thinking, and as many that end a word that random text has words as long."""
    return GPTConfig(**{"vocab_size": 65, "think_token": 0, "space": tuple(range(12)), **m})


def info(cfg, path="", *more):
    """Show what a checkpoint or a preset is: its parts as they run, what was set, its losses."""
    if more:
        raise UserError(f"info takes one checkpoint or preset, not {' and '.join([path, *more])}")
    import train  # here: who samples does not wait for the loop to be loaded
    if path.endswith(".py"):
        m, t, _ = config.parse([path], GPTConfig, train.TrainConfig)
        model, held = GPT(config.build(stand_in, m=m), None), {}
    else:
        cfg.out_dir = path or cfg.out_dir
        model, ckpt, path = open_model(cfg)
        m, t = ckpt["model_config"], ckpt["train_config"]
        held = {k: ckpt[k] for k in ("step", "val_loss", "best_val_loss")}
        with contextlib.suppress(UserError):
            for row in train.read_log(os.path.dirname(path)):
                held.update({f"log.csv: {k}": v for k, v in row.items() if v})
    meanings, total = dict(config.letters([GPTConfig])), model.flops_per_token()
    lines, seen = [], set()
    for name, part, depth, flops in reversed([*model.token_costs()]):
        inside = {*part.parameters()} if part else set()
        if inside or name in meanings:
            # what is shared counts once, and a level without what is shown in it
            own = inside - seen
            meaning = meanings.get(name, type(part).__name__).split(":")[0]
            what = f"{'    ' * depth}{name}  {meaning}"
            lines.append(f"{what:60.60}{sum(p.numel() for p in own):13,}"
                         f"{sum(p.nbytes for p in own):15,}{flops / total:8.1%}")
        seen |= inside
    print(config.visible(path), f"\n{'':63}parameters          bytes   FLOPs", *reversed(lines),
          f"\n{model.num_params():,} parameters without learned positions, {total:,.0f} FLOPs a "
          f"token (forward and backward), {model.cfg.vocab_size:,} symbols\n", sep="\n")
    defaults = {**vars(GPTConfig()), **vars(train.TrainConfig())}
    held = {k: int(v) if float(v).is_integer() else round(v, 4) for k, v in held.items()
            if v is not None}
    for name, value in {**m, **t, **held}.items():
        if value != defaults.get(name):
            print(config.visible(f"{name} = {value!s:.80}"))


COMMANDS = {  # what each does, and the settings that it takes besides out_dir
    "learn": (learn, "memory knn instead device dtype int8"),
    "memory": (inspect, "limit"),
    "info": (info, "")}


def main(argv):
    values, words = config.parse(argv, SampleConfig, doc=__doc__, words=COMMANDS, free=COMMANDS)
    cfg = config.build(SampleConfig, **values)
    if words:
        run, taken = COMMANDS[words[0]]
        for name in sorted(values.keys() - {"out_dir", *taken.split()}):
            raise UserError(f"{name} does nothing in {words[0]}; leave it out")
        if not values.get("instead", "it").strip():
            raise UserError("instead needs a text that was learned; else leave it out")
        return run(cfg, *words[1:])
    for name, command in (("limit", "memory FILE list"), ("instead", "learn")):
        if name in values:
            raise UserError(f"{name} is for python sample.py {command}; leave it out")
    try:
        with contextlib.ExitStack() as stores:
            return decode(cfg, stores)
    except RuntimeError as e:
        if not (cfg.compile and isinstance(e, torch._dynamo.exc.TorchDynamoException)):
            raise
        raise UserError(f"compile failed here ({summary(e)}); leave --compile out") from None


def decode(cfg, stores):
    """Print text by the settings. stores: an ExitStack that closes what is opened."""
    model, ckpt, path = open_model(cfg)
    tok, mcfg = tokenizer_of(ckpt, path), model.cfg
    prompt, ids = read_prompt(cfg.prompt, tok)
    if cfg.stop_at_end and tok.eot is None:
        raise UserError(f"{path} was trained on one text without an end, and would never stop "
                        f"there; leave stop_at_end out, or train on several texts, such as python "
                        f"prepare.py --input=ONE --input=TWO")
    if cfg.trace_html:
        check_page(cfg.trace_html)
    if cfg.log:
        check_page(cfg.log, "log", '{"time": ')
    think = think_tokens(cfg, mcfg, tok, path)
    ids += [mcfg.think_token] * cfg.n_think
    decoder = open_decoder(cfg, model, ckpt, path, ids, tok.eot, stores)
    generator = torch.Generator(device=cfg.device).manual_seed(cfg.seed)
    run = way_of(cfg)(decoder, cfg, generator, think, lambda: new_text(cfg, tok, mcfg))
    scored = "" if ckpt.get("val_loss") is None else f", val loss {ckpt['val_loss']:.4f}"
    config.note(f"[{path}, step {ckpt['step']}{scored}]")
    kind = "point" if cfg.soft == "vector" else "softmax"
    reads_soft = (mcfg.soft_rate or mcfg.n_soft) and mcfg.soft_of == kind
    if cfg.soft and not reads_soft:
        config.note(f"[this model never read such soft tokens in training; expect poor text, or "
                    f"train one with python train.py --soft_rate=0.1 --soft_of={kind}]")
    used = collections.Counter()  # (store, id) of what was found
    if cfg.interactive:
        log = stores.enter_context(open(cfg.log or os.devnull, "a", encoding="utf-8"))
        converse(decoder, cfg, tok, path, prompt, generator, think, used, log)
    else:
        print("" if cfg.json else on_screen(prompt), end="", flush=True)
        found = cfg.trace and bool(decoder.sources or decoder.neighbours)
        samples = write(run.generate(), cfg, tok, mcfg, prompt, used, bool(cfg.trace_html) or found)
        plans = (cfg.trace or cfg.trace_html) and not (cfg.beams or cfg.best_of)
        plans = decoder.plan_lines(tok) if plans else []
        for line in plans if cfg.trace else ():
            print(line)
        for piece, made in samples[0] if found else ():
            if made.found:
                print(f"{piece!r:>12}", *retrieved(made), sep=" | ")
        if run.report:
            config.note(run.report)
        if cfg.trace_html:
            write_page(cfg.trace_html, prompt, samples, mcfg, plans)
    memory.count_uses(used)


if __name__ == "__main__":
    config.run(main)
