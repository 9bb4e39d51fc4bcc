"""Trains a model: batches, optimizers, distillation, checkpoints, the loop.

    python train.py                                  the default model on the default dataset
    python train.py config/softar_shakespeare.py     a preset
    python train.py config/nanogpt_cpu.py --seed=2   a preset, one setting changed
    torchrun --nproc_per_node=8 train.py             the same run on eight processes

A row of a batch is a function of (seed, step, row) and of nothing that was drawn before, so a run
that was stopped goes on exactly as if it had not been, and any number of processes computes the
same thing (but for what the forward draws: dropout, soft inputs, noise, which are drawn by
micro-step and rank).
"""
import bisect
import contextlib
import copy
import csv
import dataclasses
import functools
import importlib
import inspect
import io
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import config  # before torch: it sets the allocator's switches
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import prepare
import pretrained
from config import UserError, summary, visible
from model import (BF16_CPU, GROUPS, MLP, FeaturalMemory, GPT, GPTConfig, averaged, cross_entropy,
                   divergence, ends_with_document, rms_norm, settings)

CHOICES = {"optimizer": ("muon", "normuon", "adamw"), "schedule": ("wsd", "cosine"),
           "dtype": ("auto", "float32", "bfloat16", "float16"),
           "semantic_table": ("own", "ppmi", "random")}
LIMITS = (  # lowest, highest, settings
    (1, 2 ** 20, "batch_size gradient_accumulation_steps"),
    (1, 2 ** 53, "max_iters eval_interval log_interval"),
    (0, 2 ** 53, "warmup_iters lr_decay_iters eval_tokens score_last loss_skip sample_every "
                 "sample_at_end train_tokens stream"),
    (0, 2 ** 63 - 1, "seed"),  # a key of NumPy's Philox has 64 bits
    (1, 100, "ns_steps"),
    (0, 1, "ema_decay question_weight history_drop cooldown"),
    (0, 0.99999, "momentum beta1 beta2"),
    (0, 1e9, "weight_decay grad_clip min_lr muon_lr value_lr distill distill_match distill_ce"),
    (1e-12, 1e9, "learning_rate"))


@dataclass
class TrainConfig:
    # training
    max_iters: int = 750  # optimizer steps
    batch_size: int = 16  # rows of a micro-step
    gradient_accumulation_steps: int = 1  # times batch_size: rows of a step, over all processes
    optimizer: str = "muon"  # muon (matrices inside blocks and slots; AdamW for the rest) | adamw |
        # normuon (muon, with updates of columns or rows of one length and cautious weight decay)
    learning_rate: float = 4e-3  # of AdamW
    value_lr: float = 2.0  # of the values of featural memories, times learning_rate
    muon_lr: float = 0.02  # of Muon
    momentum: float = 0.95  # of Muon
    ns_steps: int = 4  # Newton-Schulz iterations of Muon
    weight_decay: float = 0.0  # decoupled, on everything with two dimensions
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    shard_optimizer: bool = False  # each process keeps what AdamW and Muon hold of its share alone
    grad_clip: float = 1.0  # clip the gradient to this norm; 0: do not
    ema_decay: float = 0.99  # of concept_of = ema: share of the average that each step keeps
    semantic_table: str = "own"  # embeddings of semantic losses: own | ppmi (of the text) | random
    schedule: str = "wsd"  # wsd (constant, then linearly down) | cosine
    decay_lr: bool = True  # False: constant after the warm-up
    warmup_iters: int = 0  # linear warm-up
    lr_decay_iters: int = 0  # step at which min_lr is reached; 0: max_iters
    min_lr: float = 0.0  # AdamW's rate at the end; Muon's falls by the same factor
    cooldown: float = 0.8  # share of the run that wsd cools down over, the warm-up left out
    teacher: str = ""  # PATH of a model to learn from
    teacher_start: bool = True  # start from the teacher's weights, as far as they fit
    distill: float = 1.0  # with a teacher, weight: of the divergence from its distribution
    distill_match: float = 1.0  # likewise: of giving what replaced feed-forward layers gave
    distill_ce: float = 0.0  # likewise: of the text itself
    soft_labels: bool = False  # ask a teacher once for the whole text, not in each step
    born_again: tuple[int, ...] = ()  # steps at which a new model begins, the last one its teacher
    # data
    dataset: str = "shakespeare"  # folder under data_dir, made by prepare.py
    data_dir: str = "data"  # where datasets are kept
    stream: int = 0  # windows of a text that a row reads in turn, for memories M to last; 0: off
    history_drop: float = 0.1  # share of training rows whose history is cut short at a random place
    train_tokens: int = 0  # train on the first n tokens of the training split; 0: on all
    score_last: int = 0  # score only the last n tokens of a row; 0: all
    train_on_all: bool = False  # with score_last: only in validation, train on the whole row
    loss_skip: int = 0  # first tokens of a training row that are no targets (in validation all are)
    question_weight: float = 0.0  # share of questions' tokens that training scores beside answers
    # run
    out_dir: str = "out/gpt"  # checkpoints and log.csv go here
    init_from: str = "scratch"  # scratch | resume | auto (resume if there is one) | PATH of a model
    overwrite: bool = False  # begin anew in an out_dir that has a run, which is deleted
    seed: int = 1337  # of the weights, the batches and dropout
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # auto (bf16 where the hardware has it) | float32 | bfloat16 | float16
    grad_checkpoint: bool = False  # compute blocks again going back: less memory
    compile: bool = True  # torch.compile (where there is a compiler)
    eval_interval: int = 250  # steps between validations (and checkpoints)
    eval_tokens: int = 0  # tokens that a validation reads, except the last one; 0: the whole split
    eval_only: bool = False  # validate once and stop
    average: tuple[str, ...] = ()  # eval_only: models to average probabilities with (PATH,PATH)
    log_interval: int = 10  # steps between log lines
    sample_every: int = 0  # steps between samples of 100 tokens, which are printed; 0: none
    sample_at_end: int = 0  # tokens that sample.py writes at the end, and in soft ones if trained
    always_save_checkpoint: bool = True  # False: only where the validation loss improved
    tensorboard_log: bool = False  # also log to tensorboard
    wandb_log: bool = False  # also log to Weights & Biases
    trackio_log: bool = False  # also log to trackio
    wandb_project: str = "nanoconcept"  # its project, and trackio's
    wandb_run_name: str = ""  # its run, and trackio's; default: out_dir
    wandb_id: str = ""  # id of a run to go on with; default: a new one, kept when this is resumed

    def __post_init__(self):
        config.check(self, CHOICES, LIMITS)
        self.average = config.listed(self.average)
        if self.overwrite and self.init_from in ("resume", "auto"):
            raise ValueError(f"overwrite begins anew, and init_from = {self.init_from} goes on "
                             f"with a run; leave one of them out")
        if (self.teacher or self.born_again) and not (self.distill or self.distill_ce):
            raise ValueError("distill = 0 and distill_ce = 0 leave nothing to learn but what "
                             "feed-forward layers give; set one of them")
        if self.born_again and self.stream:
            raise ValueError("born_again asks its teacher about one window at a time, without what "
                             "a stream remembers; leave one of them out")
        bounds = 0, *self.born_again, self.decay_lr and self.lr_decay_iters or self.max_iters
        if self.born_again[-1:] >= (self.max_iters,):
            raise ValueError(f"born_again = {self.born_again[-1]} is never reached; give steps "
                             f"below max_iters ({self.max_iters})")
        if min(b - a for a, b in itertools.pairwise(bounds)) <= self.warmup_iters:
            raise ValueError(f"between two of the steps {', '.join(map(str, bounds))}, where a "
                             f"learning rate begins and ends (born_again, and then lr_decay_iters "
                             f"or max_iters), warmup_iters ({self.warmup_iters}) leaves nothing; "
                             f"give fewer, or steps that rise by more")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr ({self.min_lr}) is where learning_rate "
                             f"({self.learning_rate}) falls to; give less")

    @property
    def labelled(self):
        """Whether a teacher is asked for the whole text, once."""
        return bool(self.soft_labels or self.born_again)

    def idle(self, mcfg):
        """Return (name, what it needs) of each setting that was changed and has nothing to work
        on, beside a model of mcfg."""
        return config.idle(
            self,
            (self.teacher, "a teacher (--teacher=PATH)", "teacher_start soft_labels"),
            (self.teacher and not self.labelled, "a teacher that is asked in each step "
             "(--teacher=PATH, without --soft_labels)", "distill_match"),
            (self.teacher or self.born_again, "a teacher (--teacher=PATH, or --born_again)",
             "distill distill_ce"),
            (self.eval_only, "eval_only", "average"),
            (self.optimizer != "adamw", "optimizer = muon or normuon", "muon_lr momentum ns_steps"),
            (self.decay_lr, "decay_lr = True", "schedule lr_decay_iters min_lr"),
            (self.decay_lr and self.schedule == "wsd", "schedule = wsd, and decay_lr", "cooldown"),
            (self.score_last, "score_last", "train_on_all"),
            (mcfg.concept_of == "ema", "concept_of = ema", "ema_decay"),
            (mcfg.semantic_weight and mcfg.head == "softmax", "a semantic_weight above 0, and "
             "head = softmax", "semantic_table"),
            (not self.score_last or self.train_on_all, "rows that are scored whole in training "
             "(score_last = 0, or train_on_all)", "loss_skip"),
            ("M" in mcfg.layers, "a block M in layers", "stream"),
            (mcfg.history and not self.stream, "history, without stream", "history_drop"),
            ("F" in mcfg.layers, "a block F in layers", "value_lr"),
            (self.wandb_log or self.trackio_log, "wandb_log or trackio_log",
             "wandb_project wandb_run_name wandb_id"))


# --------------------------------------------------------------------------------------------------
# where it runs


def gather_rows(t, world):
    """Return the rows (n, ...) of all processes, in the order of their ranks."""
    if world == 1:
        return t
    parts = [torch.empty_like(t) for _ in range(world)]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts)


@dataclass
class Place:
    """This process among all, and the hardware it has."""
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    def sum(self, *values):
        """Return each number summed over all processes."""
        if self.world == 1:
            return list(values)
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(t)
        return t.tolist()

    def all_sum(self, t):
        """Return a tensor summed over all processes."""
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def put(self, t):
        """Return a small tensor on the device, without waiting for a GPU. (MPS may read what is
        freed by then, pytorch#189690.)"""
        return t.to(self.device, non_blocking=self.device.type == "cuda")

    def on_rank_zero(self, do):
        """Return what do() returns on rank 0, where alone it runs, and None on others; raise its
        UserError, if it raises one, on every rank."""
        error = result = None
        if self.rank == 0:
            try:
                result = do()
            except UserError as e:
                error = str(e)
            except OSError as e:
                error = config.failure(e)
        if self.world > 1:
            box = [error]
            dist.broadcast_object_list(box, src=0)
            error = box[0]
        if error:
            raise UserError(error)
        return result


def ranks():
    """Return (rank, processes, rank on this machine, processes on this machine) as torchrun says,
    or else 0, 1, 0, 1; raise UserError where only half of that is said, or nonsense."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    if not any(n in os.environ for n in names[:3]):
        return 0, 1, 0, 1
    env = {"LOCAL_WORLD_SIZE": "1", **os.environ}
    with contextlib.suppress(KeyError, ValueError):
        rank, world, local_rank, local_world = (int(env[n]) for n in names)
        if 0 <= rank < world and 0 <= local_rank and 0 < local_world <= world:
            return rank, world, local_rank, local_world
    raise UserError(f"{', '.join(names)} do not say together which of how many processes this is; "
                    f"start several with torchrun, or unset these variables")


def find_place(tcfg):
    """Return the Place that the settings say; start the process group when torchrun started us."""
    rank, world, local_rank, local_world = ranks()
    name, n_gpu = tcfg.device, torch.cuda.device_count()
    if name == "auto":  # several processes want a GPU each, or none
        mps = torch.backends.mps.is_available() and world == 1
        name = "cuda" if n_gpu >= local_world else "mps" if mps else "cpu"
    too_few = world > 1 and (name == "mps" or name == "cuda" and n_gpu < local_world)
    if too_few or local_world > 1 and name.startswith("cuda:"):  # (that is one for all)
        raise UserError(f"{local_world} processes cannot each have a {name} device here; start "
                        f"fewer, or use --device={'cuda' if ':' in name else 'cpu'}")
    device = torch.device(config.find_device(f"cuda:{local_rank}" if name == "cuda" else name))
    kind = device.type
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = kind == "cpu" and BF16_CPU
    if world > 1 and not dist.is_initialized():
        # torchrun of torch 2.13 keeps one store for all attempts, with addresses of processes that
        # are gone; between machines attempts are counted apart, and only its own switch helps
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if local_world == world else ""
        try:
            store = dist.PrefixStore(f"attempt {attempt}", next(dist.rendezvous("env://"))[0])
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank,
                                    world_size=world)
        except (RuntimeError, ValueError) as e:
            raise UserError(f"the {world} processes did not find one another ({summary(e)}); start "
                            f"them with torchrun (with --max-restarts on several machines set "
                            f"TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), or unset RANK, WORLD_SIZE, "
                            f"LOCAL_RANK") from None
    if kind == "cpu" and world > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    fallback = "float16" if kind == "cuda" else "float32"
    dtype = tcfg.dtype if tcfg.dtype != "auto" else "bfloat16" if bf16 else fallback
    return Place(device, getattr(torch, dtype), rank, world)


def matmul_peak(place, seconds=0.3):
    """Return the floating-point operations a second that a plain matrix product reaches here, the
    best within some time: MFU's 100%."""
    n = 1024 if place.device.type == "cpu" else 4096
    a, best = torch.randn(n, n, device=place.device, dtype=place.dtype), math.inf
    (a @ a)[0, 0].item()  # (the first one loads the library)
    start = time.perf_counter()
    while (t := time.perf_counter()) < start + seconds or best == math.inf:
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - t)
    return 2 * n ** 3 / best


def can_compile(place, tcfg, say):
    """Return whether torch.compile is wanted and possible; say what it lacks."""
    if not tcfg.compile or place.device.type == "mps":
        return False
    missing = config.compiler_missing(place.device.type)
    if missing:
        say(f"{missing} was not found: training goes on uncompiled, at about half the speed")
    return not missing


# --------------------------------------------------------------------------------------------------
# batches


class Data:
    """One split of a dataset as rows: T tokens, their targets, and the H tokens before them."""

    def __init__(self, tcfg, mcfg, split):
        self.meta = meta = prepare.open_dataset(tcfg.dataset, tcfg.data_dir)
        path = os.path.join(tcfg.data_dir, tcfg.dataset, f"{split}.bin")
        self.tokens, self.mask, self.n_vocab, tok_hash, self.sha = prepare.open_bin(path)
        made_of = tok_hash, self.n_vocab, self.sha
        if made_of != (meta["tokenizer_sha256"], meta["n_vocab"], meta["sha256"][split]):
            raise UserError(f"{path} was made from another text or with another tokenizer than the "
                            f"meta.json beside it says; make the dataset again: "
                            f"{prepare.command(path)}")
        if mcfg.vocab_size not in (0, self.n_vocab):
            raise UserError(f"vocab_size is {mcfg.vocab_size}, but dataset {tcfg.dataset!r} has "
                            f"{self.n_vocab} tokens; leave it out")
        if split == "train" and tcfg.train_tokens:
            if len(self.tokens) < tcfg.train_tokens:
                raise UserError(f"{path} has {len(self.tokens):,} tokens, fewer than train_tokens "
                                f"= {tcfg.train_tokens:,}; give less, or 0 for all")
            self.tokens = self.tokens[:tcfg.train_tokens]
            self.mask = None if self.mask is None else self.mask[:tcfg.train_tokens]
        self.n, self.bytes, self.eot = len(self.tokens), meta["bytes"][split], meta["eot"]
        self.T, self.H, self.running_mean = mcfg.block_size, mcfg.history, mcfg.running_mean
        self.drop, self.seed, self.stream = tcfg.history_drop, tcfg.seed, tcfg.stream
        train = split == "train"
        need = (self.stream if train and self.stream else 1) * self.T + 1
        self.question_weight = tcfg.question_weight
        self.labels = None  # what a teacher makes of each token, (n, V) logarithms in fp16
        self.last = tcfg.score_last or self.T
        if self.last > self.T:
            raise UserError(f"score_last ({self.last}) is larger than block_size ({self.T}); "
                            f"give less")
        if self.n < need:
            what = "stream * block_size" if train and self.stream else "block_size"
            raise UserError(f"{path} has {self.n} tokens, fewer than {what} + 1 = {need}; give a "
                            f"longer text or less of these")
        if self.mask is not None:  # places that may be a row's last target
            self.ends = np.flatnonzero(self.mask)
            self.ends = self.ends[self.ends >= self.T]
            if not len(self.ends):
                raise UserError(f"{path} scores no token that has block_size = {self.T} tokens "
                                f"before it; give a smaller block_size")
        self.docs = None  # where answers need their whole document: its first and last token
        if meta.get("whole"):
            end = np.flatnonzero(np.append(self.tokens[1:], self.eot) == self.eot)
            end = end[self.tokens[end] != self.eot]
            first, behind = np.append(0, end[:-1] + 2), np.minimum(end + 1, self.n - 1)
            self.docs = first, np.where(self.mask[behind] > 0, behind, end)  # (or a scored end)
            longest = int((self.docs[1] - self.docs[0]).max())
            if longest > self.T:
                raise UserError(f"{path} has a document of {longest} tokens, and its answer needs "
                                f"all of them; give a block_size of at least {longest}, not "
                                f"{self.T}")
        if self.stream and (self.last < self.T or self.docs):
            what, too = ("whole documents", "") if self.docs else ("score_last", ", or score_last")
            raise UserError(f"stream reads windows that follow one another, and where only {what} "
                            f"score, they overlap; leave stream out{too}")
        if self.question_weight and self.mask is None:
            raise UserError("question_weight needs a task, or a dataset made with answer_marker: "
                            "one that says what answers are")
        if train and (tcfg.train_on_all or not tcfg.score_last):
            self.last = self.T - tcfg.loss_skip
            if self.last < 1:
                raise UserError(f"loss_skip leaves no target of block_size = {self.T}; give less")

    def facts(self, mcfg):
        """Return the settings of a model that the dataset knows."""
        think, eot, space = mcfg.think_token, mcfg.eot, mcfg.space
        think = self.meta.get("think_token", -1) if think < 0 else think
        if mcfg.n_think and not 0 <= think < self.n_vocab:
            raise UserError(f"n_think needs a dataset with a think token, such as python "
                            f"prepare.py chain makes, or one of the dataset's {self.n_vocab} ids "
                            f"as --think_token, not {think}")
        begins_again = any(map(ends_with_document, mcfg.layers)) or mcfg.n_gram or \
            mcfg.soft_rate or mcfg.n_soft or mcfg.doc_mask
        if eot < 0 and begins_again and self.eot is not None:
            eot = self.eot
        if "(" in mcfg.layers and mcfg.chunk.startswith("space"):
            space = space or tuple(prepare.Tokenizer(self.meta["tokenizer"]).spaces())
            if not space:
                raise UserError("chunk = space needs a dataset with white space; give a number")
        if max((eot, *space)) >= self.n_vocab:
            raise UserError(f"eot ({eot}) and space {space} must be ids of the dataset, below "
                            f"{self.n_vocab}")
        parts = (self.tokens[i:i + 2 ** 24] for i in range(0, len(self.tokens), 2 ** 24))
        if mcfg.doc_mask and not any((part == eot).any() for part in parts):
            raise UserError("doc_mask needs a dataset whose documents end: prepare it from several "
                            "files, or with --separator; or leave doc_mask out")
        return {"vocab_size": self.n_vocab, "think_token": think if mcfg.n_think else -1,
                "eot": eot, "space": space}

    def rows(self, first, last, keep=None, also=None):
        """Return the rows whose scored targets are the tokens first..last (B,) of the split, with
        `last` at the row's end where there is room before it: x (B, T); y (B, T), -1 where not
        scored; history (B, H), -1 where missing: before the split's start, before an end of text,
        and older than `keep` (B,) tokens; with running_mean behind V counts of tokens, in all.
        also (B, T): targets that count where the mask leaves them out. And where the text has
        labels, those of each target, (B, T, V)."""
        start = np.maximum(last - self.T, 0)
        pos = start[:, None] + np.arange(-self.H, self.T + 1)
        inside, clipped = (pos >= 0) & (pos < self.n), pos.clip(0, self.n - 1)
        tok = np.where(inside, self.tokens[clipped].astype(np.int64), -1)
        scored = inside & (pos >= first[:, None]) & (pos <= last[:, None])
        if self.mask is not None:
            asked = self.mask[clipped] > 0
            if also is not None:
                asked[:, self.H + 1:] |= also
            scored &= asked
        if self.docs:  # an answer is asked only where its whole document is in the row
            begins = (start == 0) | (self.tokens[np.maximum(start - 1, 0)] == self.eot)
            ends = tok[:, self.H:] == self.eot
            scored[:, self.H:] &= (ends.cumsum(1) > ends) | begins[:, None]
        history = prepare.forget(tok[:, :self.H], self.eot)
        if keep is not None:
            history = np.where(np.arange(self.H, 0, -1) > keep[:, None], -1, history)
        if self.running_mean:
            counts = [self.counts(*each) for each in zip(start, np.full_like(start, self.H)
                                                         if keep is None else keep)]
            history = np.concatenate((counts, history), 1)
        x, y = np.maximum(tok[:, self.H:-1], 0), np.where(scored, tok, -1)[:, self.H + 1:]
        made = tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in (x, y, history))
        if self.labels is None:
            return made
        # (NumPy's: a thread that has PyTorch index would start another pool of threads)
        return *made, torch.from_numpy(self.labels[clipped[:, self.H + 1:]])

    def counts(self, start, keep, most=2 ** 16):
        """Return how often each token occurs (V,) in a document before the place start: in all of
        it (as far as that matters to a mean), or in its last `keep` tokens if those are fewer than
        a history."""
        n = keep if keep < self.H else most
        text = np.asarray(self.tokens[max(0, start - n):start])
        if self.eot is not None:
            text = text[np.flatnonzero(np.append(self.eot, text) == self.eot)[-1]:]
        return np.bincount(text, minlength=self.n_vocab)

    def batch(self, step, rows, n_rows):
        """Return rows `rows` (a slice) of the n_rows of this step, as `rows` does: row r depends on
        (seed, step, r) alone. A question's token is a target with the chance question_weight:
        so each loss weighs it, on average, by that."""
        def draw(k, n=3, counter=0):
            philox = np.random.Philox(key=[self.seed, k], counter=counter)
            return np.random.Generator(philox).random((n_rows, n))[rows]

        if self.stream:
            text, window = self.stream_position(step, rows, n_rows)
            texts = np.stack([draw(k) for k in range(text.min(), text.max() + 1)])
            u = texts[text - text.min(), np.arange(len(text)), 0]
            last = (u * (self.n - self.stream * self.T)).astype(np.int64) + (window + 1) * self.T
            return self.rows(last - self.last + 1, last)
        u = draw(step)
        share = lambda column, n: (u[:, column] * n).astype(np.int64)
        last = self.T + share(0, self.n - self.T) if self.mask is None else \
            self.ends[share(0, len(self.ends))]
        keep = np.where(u[:, 1] < self.drop, share(2, self.H), self.H)
        also = None
        if self.question_weight:
            also = draw(step, self.T, 2 ** 64) < self.question_weight
        return self.rows(last - self.last + 1, last, keep, also)

    def stream_position(self, step, rows, n_rows):
        """Return, with stream, which text each of these rows reads, counted, and which of its
        windows; rows begin one after another."""
        return np.divmod(step + np.arange(n_rows)[rows] * self.stream // n_rows, self.stream)

    def begins(self, step, rows, n_rows):
        """Return (rows,) True where a row begins another text, and its memory ends."""
        return torch.from_numpy(self.stream_position(step, rows, n_rows)[1] == 0)

    def eval_windows(self, limit=0):
        """Return the first and the last target (n,) of windows that score every token of the split
        but its first, or the first `limit` behind that, once: a window for each document where
        answers need their whole document."""
        if self.docs:
            first, last = self.docs[0] + 1, self.docs[1]
        else:
            first = np.arange(1, self.n, self.last)
            last = np.minimum(first + self.last - 1, limit or self.n - 1)
        if limit:
            within = (first <= limit) & (last <= limit)
            first, last = first[within], last[within]
        # leave out windows without a target (a stream reads them: a memory shall know them)
        if self.mask is not None and not self.stream and len(first):
            scored = np.asarray(self.mask[1:], dtype=np.int64)  # (none between documents)
            some = np.add.reduceat(scored, first - 1) > 0
            first, last = first[some], last[some]
        return first, last

    def check_scored(self, limit):
        """Raise UserError where none of the first `limit` tokens (0: all, of which some are) is
        scored."""
        if limit and not any(self.mask is None or self.mask[a:b + 1].any()
                             for a, b in zip(*self.eval_windows(limit))):
            raise UserError(f"none of the validation split's first {limit} tokens is scored; give "
                            f"more eval_tokens")

    def eval_batches(self, place, size, n_rows=0, limit=0):
        """Yield eval_windows in batches of `size` rows, dealt to this process: x, y and history as
        `rows` gives them, and whether each row begins a text. Rows that pad the last batch score
        nothing. With stream the split is read as n_rows texts of equal length, however many rows a
        batch has: a row goes on where the same row of the batch before ended."""
        first, last = self.eval_windows(limit)
        n, length = len(first), 1  # windows, and how many of them a text has
        if self.stream:
            n_rows = n_rows or size * place.world
            length = -(-n // n_rows)
            texts = np.arange(n_rows).reshape(place.world, -1, 1, size)[place.rank]
            index = texts * length + np.arange(length)[:, None]  # (batches of texts, length, size)
        else:
            n_mine = len(range(place.rank, n, place.world))
            index = np.arange(-(-n_mine // size) * size) * place.world + place.rank
        for window in index.reshape(-1, size):
            clipped = window.clip(max=n - 1)
            x, y, h = self.rows(first[clipped], last[clipped])
            y[torch.from_numpy(window >= n)] = -1
            yield *(t.to(place.device) for t in (x, y, h)), torch.from_numpy(window % length == 0)


def ppmi_table(tokens, V, C, window=4):
    """Return vectors (V, C), alike for tokens in like company: the positive pointwise mutual
    information of tokens at most `window` places apart, in C dimensions (Levy and Goldberg 2014).
    """
    if V > 2 ** 12:
        raise UserError(f"semantic_table = ppmi counts all pairs of a vocabulary, and one of {V:,} "
                        f"is too large; make the dataset with at most {2 ** 12:,} tokens")
    tokens, pairs = np.asarray(tokens).astype(np.int64), np.zeros(V * V)
    for d in range(1, window + 1):
        pairs += np.bincount(tokens[:-d] * V + tokens[d:], minlength=V * V)
    pairs = pairs.reshape(V, V) + pairs.reshape(V, V).T
    share = pairs.sum(0)
    chance = np.outer(share, share) / share.sum()
    ppmi = np.log(np.divide(pairs, chance, out=np.ones_like(pairs), where=pairs > chance))
    values, vectors = np.linalg.eigh(ppmi)  # (symmetric: its singular values, but for their signs)
    order = np.argsort(-np.abs(values))[:C]
    return vectors[:, order] * np.abs(values[order]) ** 0.5


def semantic_table(kind, tokens, V, C):
    """Return what semantic losses measure by, (V, C), rows of the norm sqrt(C); None: the model's
    own embeddings. "random" is the control: near and far mean nothing in it."""
    if kind == "own":
        return None
    rows = ppmi_table(tokens, V, C) if kind == "ppmi" else \
        np.random.default_rng(0).standard_normal((V, C))
    rows = torch.from_numpy(rows).float()
    return rms_norm(torch.nn.functional.pad(rows, (0, C - rows.size(1))))


# --------------------------------------------------------------------------------------------------
# optimizers


def shared_out(x, do):
    """Return do(x) of rows x (n, ...) that are the same in all processes: each does its share."""
    world = dist.get_world_size()
    size = -(-len(x) // world)
    mine = x[dist.get_rank() * size:][:size]
    mine = do(torch.cat((mine, x[:1].expand(size - len(mine), *x.shape[1:]))))  # (all as many)
    return gather_rows(mine, world)[:len(x)]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, made orthogonal by Newton-Schulz iterations, as the
    update of a matrix. The rule of torch.optim.Muon, but four iterations of scaled rows do for
    five, matrices of one shape go through them together, the parts of a fused matrix (its `parts`,
    row counts) each on its own, and a matrix that has more rows than columns is transposed first.
    If `shared`, processes divide the iterations: all must hold the same gradients.

    If `normed`, the columns of an update get one length (the rows, which are neurons, where there
    are more rows than columns: NorMuon, Li et al. 2025, arXiv:2510.05491, who divide by running
    means), and weights decay only where the update makes them smaller (cautious weight decay, Chen
    et al. 2025, arXiv:2510.12402).
    """
    QUINTIC = (3.4445, -4.7750, 2.0315)

    def __init__(self, params, lr, momentum, weight_decay, ns_steps, dtype=torch.bfloat16,
                 shared=False, normed=False):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps)
        super().__init__(params, defaults)
        # of the iterations: bf16 is enough, fp32 lets runs of several shapes agree closely
        self.dtype, self.shared, self.normed = dtype, shared, normed

    @classmethod
    def orthogonalize(cls, x, steps, dtype):
        """Return each matrix of x (N, R, C), R <= C, with its singular values near 1, in dtype.

        Rows are scaled first so that no singular value exceeds 1, which saves an iteration
        (Turbo-Muon, Boissin et al. 2025, arXiv:2512.04632). Of a long matrix two iterations are
        made as one polynomial of x x^T, which is then computed anew, because rounding errors build
        up in 16 bits (Gram Newton-Schulz, Zhang et al. 2026, who restart it likewise)."""
        a, b, c = cls.QUINTIC
        x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
        gram = x @ x.mT
        scale = gram.abs().sum(2, keepdim=True).clamp(min=1e-7).rsqrt()
        x, gram = scale * x, scale * gram * scale.mT
        at_once = 2 if x.size(2) > 1.5 * x.size(1) else 1  # (of a squarer one it is more work)
        for left in range(steps, 0, -at_once):
            by, own = torch.baddbmm(gram, gram, gram, beta=b, alpha=c), a
            if min(left, at_once) == 2:
                half = torch.baddbmm(gram, gram, by, beta=a)
                gram = torch.baddbmm(half, by, half, beta=a)
                then = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
                by, own = torch.baddbmm(then + by, then, by, beta=a), a * a
            x = torch.baddbmm(x, by, x, beta=own)  # (by + own I) x
            if left > at_once:
                gram = x @ x.mT
        return x

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            # Nesterov; the gradient is not needed any more
            torch._foreach_lerp_(grads, momenta, group["momentum"])
            decay = group["lr"] * group["weight_decay"]
            if decay and not self.normed:
                torch._foreach_mul_(params, 1 - decay)
            by_shape = {}
            for p, g in zip(params, grads):
                parts = getattr(p, "parts", (p.size(0),))
                for target, update in zip(p.split(parts), g.split(parts)):
                    scale = max(1, update.size(0) / update.size(1)) ** 0.5
                    if scale > 1:
                        target, update = target.T, update.T
                    by_shape.setdefault(update.shape, []).append((target, update, scale))
            for matrices in by_shape.values():
                do = lambda x: self.orthogonalize(x, group["ns_steps"], self.dtype)
                updates = torch.stack([update for _, update, _ in matrices])
                updates = shared_out(updates, do) if self.shared else do(updates)
                if self.normed:
                    squares = updates.square().mean(1, keepdim=True)
                    mean = squares.mean(2, keepdim=True)
                    updates = updates * (mean / squares.clamp(min=1e-7)).sqrt()
                for (target, _, scale), update in zip(matrices, updates):
                    if decay and self.normed:
                        target.sub_(target * (target * update > 0), alpha=decay)
                    target.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model, tcfg, world=1):
    """Return AdamW, and Muon where it has something to do, for the groups that parameters state
    (without Muon matrices are among the tables); each group has its peak_lr. With shard_optimizer
    each of `world` processes steps its share of the parameters, and keeps state of no others (ZeRO,
    Rajbhandari et al. 2020, arXiv:1910.02054)."""
    shard = tcfg.shard_optimizer and world > 1

    def make(kind, params, **more):
        if not shard:
            return kind(params, **more)
        from torch.distributed.optim import ZeroRedundancyOptimizer
        return ZeroRedundancyOptimizer(params, kind, **more)

    groups = {name: [] for name in GROUPS}
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        matrix = p.group == "matrix" and tcfg.optimizer == "adamw"
        groups["table" if matrix else p.group].append(p)
    adam = [dict(params=groups["table"], weight_decay=tcfg.weight_decay),
            dict(params=groups["gain"], weight_decay=0.0),
            dict(params=groups["values"], weight_decay=0.0, lr=tcfg.learning_rate * tcfg.value_lr)]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    optimizers = [make(torch.optim.AdamW, [g for g in adam if g["params"]], lr=tcfg.learning_rate,
                       betas=(tcfg.beta1, tcfg.beta2), fused=fused)]
    if groups["matrix"]:
        muon = functools.partial(Muon, dtype=model.dtype, shared=world > 1 and not shard,
                                 normed=tcfg.optimizer == "normuon")
        optimizers.append(make(muon, groups["matrix"], lr=tcfg.muon_lr, momentum=tcfg.momentum,
                               weight_decay=tcfg.weight_decay, ns_steps=tcfg.ns_steps))
    for o in optimizers:
        for g in o.param_groups:
            g["peak_lr"] = g["lr"]
    return optimizers


def lr_factor(step, tcfg):
    """Return the learning rate of a step as a share of its peak."""
    bounds = 0, *tcfg.born_again, tcfg.lr_decay_iters or tcfg.max_iters
    k, warmup = bisect.bisect(tcfg.born_again, step), tcfg.warmup_iters
    step, end = step - bounds[k], bounds[k + 1] - bounds[k]
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if not tcfg.decay_lr:
        return 1.0
    floor = tcfg.min_lr / tcfg.learning_rate
    if step >= end:
        return floor
    if tcfg.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (end - warmup)))
    else:
        share = min(1.0, (end - step) / max(min(tcfg.cooldown * end, end - warmup), 1))
    return floor + (1 - floor) * share


# --------------------------------------------------------------------------------------------------
# growth: a model that starts as one with less in it


@torch.no_grad()
def grow(new, old):
    """Give the GPT `new` the weights of the GPT `old`, so that its outputs are the same.

    Return [(parameter of new, of old, where that stands in it, its factor)]. Raise ValueError where
    the outputs would change.

    Layers pair in their order and parameters by name. In a tensor that is larger now, old values
    stand first in each of its parts. What writes into the residual stream writes 0 where it is new;
    what reads it is drawn, so that there is a gradient. C channels among C' are sqrt(C' / C) times
    as large, so that the norm is the same, and are read by as much less (after Gesmundo and Maile
    2023, arXiv:2308.06103).
    """
    a, b, grown, pairs = old.cfg, new.cfg, [], [(new, old)]
    for ours, theirs in pairs:
        rest = list(getattr(theirs, "order", ()))
        for layer in getattr(ours, "order", ()):
            same = rest and layer.letter == rest[0].letter
            partner = rest.pop(0) if same else None
            if layer in [*ours.blocks, *ours.levels]:  # (a level may run blocks of others)
                pairs.append((layer, partner))
        known = dict(theirs.named_parameters()) if theirs else {}
        for name, p in ours.named_parameters():
            if name.startswith(("blocks.", "levels.")):
                continue
            q = known.get(name)
            writes = {"wte", "wpe", "tables", "c_proj"} & {*name.split(".")}
            if writes or "value_embed" in name:
                p.zero_()
            if q is not None:
                first = itertools.accumulate(getattr(p, "parts", ()), initial=0)
                parts = zip(first, getattr(q, "parts", (len(q),)))
                rows = torch.cat([i + torch.arange(n) for i, n in parts])
                power = 0 if "value" in name else bool(writes) or -(p.shape[1:] == (b.n_embd,))
                factor = (b.n_embd / a.n_embd) ** (power / 2)
                where = rows, *map(slice, q.shape[1:])
                p[where] = q * factor
                grown.append((p, q, where, factor))
    places = {id(p): id(q) for p, q, *_ in grown}  # (a shared MLP has room for one)
    if {*places.values()} != {*map(id, old.parameters())}:
        raise ValueError("not all that is in it has a place")
    size = lambda m: sum(p.numel() for p in m.parameters())
    if size(new) > size(old) and outputs_differ(new, old):
        raise ValueError("its outputs would change: slots need slot_gate = True, heads their old "
                         "head_dim, more channels norm = rms or scale, an untied head and no old "
                         "level, slots, R, G, swiglu or share_mlp")
    return grown


@torch.no_grad()
def outputs_differ(new, old):
    """Return whether two models differ in what they put out by more than rounding, on a text of
    512 tokens at most, with those in it at which a document ends and the model thinks."""
    a, b = old.cfg, new.cfg
    x = torch.arange(min(a.block_size, b.block_size, 512))[None] ** 2 % a.vocab_size
    for k, token in enumerate({b.eot, b.think_token} - {-1}, 2):
        x[:, x.size(1) // k] = token
    h = torch.arange(max(a.history, b.history))[None] % a.vocab_size
    counts = torch.arange(a.vocab_size)[None]
    one, other = (m.eval()(x, history=torch.cat((
        counts[:, :m.cfg.n_history - m.cfg.history], h[:, h.size(1) - m.cfg.history:]), 1)
    ).logits for m in (new, old))
    return (one - other).abs().max().item() > 1e-4 + 1e-5 * other.abs().max().item()


def grow_optimizers(fresh, old, grown):
    """Give fresh optimizers of a grown model what those of the old one keep; what is new has no
    momentum."""
    for ours, theirs in zip(fresh, old):
        for p, q, where, factor in grown:
            for k, v in theirs.state.get(q, {}).items():
                ours.state[p][k] = kept = torch.zeros_like(p) if v.dim() else v
                if v.dim():
                    kept[where] = v / factor ** (1 + (k == "exp_avg_sq"))


# --------------------------------------------------------------------------------------------------
# logs, the files of a run, signals


def start_tensorboard(name, tcfg, mcfg):
    from torch.utils.tensorboard import SummaryWriter
    tb = SummaryWriter(tcfg.out_dir)
    return lambda step, values: [tb.add_scalar(k, v, step) for k, v in values.items()], tb.close


def start_wandb(name, tcfg, mcfg):
    """Start wandb, or trackio, which is like it but knows a run by its name."""
    logger, own = importlib.import_module(name), {}
    if name == "wandb":
        own["id"] = tcfg.wandb_id or None
    run = logger.init(project=tcfg.wandb_project, name=tcfg.wandb_run_name or tcfg.out_dir,
                      config={**settings(mcfg), **vars(tcfg)},
                      resume="allow" if tcfg.wandb_id else "never", **own)
    tcfg.wandb_id = tcfg.wandb_id or str(run.id)  # goes into checkpoints
    return lambda step, values: logger.log(values, step=step), logger.finish


# what logs beside log.csv where NAME_log asks for it: what takes the name and the settings and
# returns (a function of a step and its values, one for the end), and what a user does where that
# fails
LOGGERS = {"tensorboard": (start_tensorboard, "pip install tensorboard"),
           # (before wandb: an id that is there already means a resumed run to it)
           "trackio": (start_wandb, "pip install trackio"),
           "wandb": (start_wandb, "pip install wandb and run wandb login")}


UNREADABLE = OSError, ValueError, KeyError, csv.Error  # of a log.csv that something cut or changed


class Log:
    """log.csv in out_dir, and LOGGERS that are asked for. Rank 0 only. What fails in the course of
    a run is said once and left out.

    log.csv has FIELDS, and a column for whatever else was logged (train_NAME: the mean since the
    last row of a loss that is not cross-entropy), which is added when it first comes."""
    FIELDS = ["step", "train_loss", "val_loss", "bits_per_byte", "lr", "tokens_per_s", "mfu",
              "step_seconds", "tokens"]

    def __init__(self, tcfg, mcfg):
        """Start LOGGERS, which may fail; log.csv is not touched."""
        self.path, self.fields = os.path.join(tcfg.out_dir, "log.csv"), self.FIELDS
        self.loggers = {}
        for name, (start, todo) in LOGGERS.items():
            if getattr(tcfg, f"{name}_log"):
                try:
                    self.loggers[name] = start(name, tcfg, mcfg)
                except Exception as e:  # whatever they raise
                    raise UserError(f"{name} did not start ({summary(e)}); {todo}, or leave "
                                    f"{name}_log out") from None

    def begin(self, step, scored):
        """Begin log.csv; one that is there keeps its rows of training up to `step`, and of
        validation up to step `scored`."""
        rows = []
        try:
            if os.path.lexists(self.path):
                rows = [row for row in self.read(self.path)
                        if int(row["step"]) <= (step if row["train_loss"] else scored)]
        except UNREADABLE as e:
            names = (f"{self.path}.damaged{i}" for i in itertools.count(1))
            kept = next(name for name in names if not os.path.lexists(name))
            os.rename(self.path, kept)
            say(f"{self.path} cannot be read ({summary(e)}); it is kept as {kept}, and the log "
                f"begins anew", sys.stderr)
        self.rewrite(rows)
        self.loggers["log.csv"] = self.write, lambda: None

    @staticmethod
    def read(path):
        """Return the rows of log.csv as dicts of strings; raise an error where it is something
        else."""
        with open(path, newline="", encoding="utf-8") as f:
            whole, _, _ = f.read().rpartition("\n")  # the last row may have been cut short
        fields, *rows = csv.reader(whole.splitlines())
        return [dict(zip(fields, row, strict=True)) for row in rows]

    def rewrite(self, rows):
        """Write log.csv anew, with these rows and a column for all that they have."""
        self.fields = list(dict.fromkeys(itertools.chain(self.fields, *rows)))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self.fields)
        table.writeheader()
        table.writerows(rows)
        with prepare.replacing(self.path) as f:
            f.write(text.getvalue().encode())

    def write(self, step, values):
        """Append a row to log.csv, which may have been taken away with its folder."""
        prepare.make_dir(os.path.dirname(self.path))
        row = {"step": step, **{k: f"{v:.8g}" for k, v in values.items()}}
        if not os.path.exists(self.path):
            self.rewrite([row])
        elif not row.keys() <= {*self.fields}:
            self.rewrite([*self.read(self.path), row])
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as f:
                csv.DictWriter(f, self.fields).writerow(row)

    def attempt(self, which, *args):
        """Call each logger's function `which`: 0 logs, 1 closes."""
        for name, functions in list(self.loggers.items()):
            try:
                functions[which](*args)
            except Exception as e:  # a full disk or a lost network is no reason to lose the run
                del self.loggers[name]
                say(f"{name} takes no more ({summary(e)}); training goes on without it", sys.stderr)

    def __call__(self, step, **values):
        self.attempt(0, step, values)

    def close(self):
        self.attempt(1)


def read_log(folder, column="step"):
    """Return the rows of the log.csv of a run that have this column, dicts of numbers; UserError
    where there are none."""
    try:
        rows = Log.read(os.path.join(folder, "log.csv"))
        rows = [{k: float(v) for k, v in row.items() if v} for row in rows
                if math.isfinite(float(row[column] or "nan"))]
        if not rows:
            raise KeyError("no row has one")
        return rows
    except UNREADABLE as e:
        raise UserError(f"{folder} has no log.csv with {column} ({summary(e)}); name the out_dir "
                        f"of a run of train.py, and a column that it has") from None


class RunFiles:
    """The files of a run in out_dir: the last checkpoint, the one before it, the best, the
    thresholds of exits that bench.py calibrates, the log; and the lock of the process that writes
    them."""
    NAMES = "ckpt.pt", "ckpt_prev.pt", "ckpt_best.pt", "exits.json", "log.csv"

    def __init__(self, out_dir):
        self.out_dir, self.lock_file = out_dir, None
        self.paths = [os.path.join(out_dir, name) for name in self.NAMES]
        self.last, _, self.best, *_ = self.paths
        # of the checkpoints that this run has written, or goes on from: the step of the last, and
        # {path: validation loss, None where the weights were not scored}
        self.last_step, self.val_losses = None, {}

    def checkpoints(self):
        """Return the paths of those that exist, in the order in which a run goes on from them."""
        return [p for p in self.paths[:3] if os.path.exists(p)]

    def resumes(self, init_from):
        """Return whether a start goes on with this run."""
        return init_from == "resume" or (init_from == "auto" and bool(self.checkpoints()))

    def generation(self, k):
        """Return the path of the model of the k-th part of a run with born_again."""
        return os.path.join(self.out_dir, f"ckpt_gen{k}.pt")

    def all_paths(self):
        """Return the paths of all that a run may leave, the log last."""
        names = os.listdir(self.out_dir) if os.path.isdir(self.out_dir) else []
        born = [name for name in names if re.fullmatch(r"ckpt_gen\d+\.pt", name)]
        return [os.path.join(self.out_dir, name) for name in born] + self.paths

    def load_last(self, say=lambda text: None):
        """Return (checkpoint, its path) that the run goes on from: the last, or where that is
        damaged the one before, or else the best; raise UserError where there is none."""
        error = None
        for path in self.paths[:3]:
            try:
                saved = prepare.load_checkpoint(path)
            except UserError as e:
                error = error or e
                continue
            if error:
                say(f"{error}; going on from {path}")
            return saved, path
        raise error

    def lock(self):
        """Lock out_dir until `unlock`; raise UserError when another run holds it."""
        prepare.make_dir(self.out_dir)
        try:
            self.lock_file = prepare.hold(
                os.path.join(self.out_dir, "lock"), f"another run is writing to {self.out_dir}; "
                f"wait for it or choose another --out_dir")
        except OSError as e:
            raise UserError(f"out_dir {self.out_dir} cannot be written ({e.strerror}); choose "
                            f"another with --out_dir") from None
        for path in self.paths:  # of a run that was killed while writing
            prepare.sweep(path)

    def unlock(self):
        if self.lock_file:
            self.lock_file.close()

    def check_new(self, tcfg):
        """Refuse to begin a run where there is one, unless that is to be overwritten."""
        found = [os.path.basename(p) for p in self.all_paths() if os.path.lexists(p)]
        killed = tcfg.init_from == "auto" and found == ["log.csv"]  # before it saved anything
        if found and not killed and not tcfg.overwrite:
            resume = "go on with it by --init_from=resume, " if self.checkpoints() else ""
            raise UserError(f"{self.out_dir} has a run ({', '.join(found)}); {resume}choose "
                            f"another --out_dir, or delete it by --overwrite")

    def clear(self):
        """Delete the run but for its log, which is begun anew."""
        for path in self.all_paths()[:-1]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def save(self, place, state, is_best):
        """Save the last checkpoint on rank 0, and a copy as the best."""
        step = state["step"]

        def write():
            if not os.path.exists(os.path.join(self.out_dir, "lock")):  # the folder was taken away
                self.lock()
            prepare.save_checkpoint(self.last, state, demote=self.last_step != step,
                                    is_best=is_best)
        place.on_rank_zero(write)
        self.last_step = step
        for path in (self.last, self.best) if is_best else (self.last,):
            self.val_losses[path] = state["val_loss"]


class StopSignal:
    """The number of the first SIGINT, SIGTERM or SIGHUP, 0 before; asked once a step, and once a
    batch of a validation or of labels. A second signal ends the process at once; not under
    torchrun, which sends a SIGTERM of its own behind the Ctrl-C that every process has already
    seen."""

    def __init__(self):
        self.number, self.before, self.alone = 0, {}, "RANK" not in os.environ
        wanted = [signal.SIGINT, signal.SIGTERM]
        # Windows has no SIGHUP, and nohup ignores it
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            wanted.append(signal.SIGHUP)
        for s in wanted:
            with contextlib.suppress(ValueError):  # not the main thread
                self.before[s] = signal.signal(s, self.handle)

    def handle(self, number, frame):
        if self.alone:
            if self.number:
                os._exit(128 + number)
            with contextlib.suppress(AttributeError, OSError, ValueError):  # no standard error
                os.write(sys.__stderr__.fileno(), b"stopping; a second signal ends at once\n")
        self.number = self.number or number

    def restore(self):
        for s, handler in self.before.items():
            signal.signal(s, handler)


# --------------------------------------------------------------------------------------------------
# a step, a validation


def ask(model, x, h, **more):
    """Return the Output of a model on inputs x (B, T) with histories h (B, H) at least as long as
    its own."""
    return model(x, history=h[:, h.size(1) - model.cfg.n_history:], **more)


class Distillation(torch.nn.Module):
    """A student whose loss draws it to a teacher (Hinton et al. 2015, arXiv:1503.02531)."""

    def __init__(self, student, tcfg):
        super().__init__()
        self.student, self.tcfg = student, tcfg

    def forward(self, idx, targets, history, teacher=None, *, denom, **more):
        """Return the student's Output with two more losses, in nats and in shares of a layer's
        output, means over scored tokens: "teacher", the divergence of the student's distribution
        from the teacher's; "match", how far what each replaced feed-forward layer gives is from
        what the teacher's gave in its place (squares of lengths: 0 is a copy, 1 as good as
        nothing). teacher: (its logits (B, T, V), {block: its output (B, S + T, C)})."""
        tcfg, scored = self.tcfg, targets >= 0
        out = self.student(idx, targets, history, denom=denom, **more)
        if teacher is None:  # the first part of a run with born_again has no teacher
            return out
        logits, wanted = teacher

        def mean(each):  # (B, T or S + T): slots are not scored
            return each[:, -scored.size(1):].masked_fill(~scored, 0.0).sum() / denom

        losses = {"teacher": mean(divergence(logits, out.logits))}
        # the text counts distill_ce times what it does without a teacher
        loss = out.loss - (1 - tcfg.distill_ce) * self.student.ce_weight * out.losses["ce"]
        loss = loss + tcfg.distill * losses["teacher"]
        if tcfg.distill_match and wanted:
            pairs = [(out.ff_outputs[i].float(), t.float()) for i, t in wanted.items()]
            far = sum((y - t).square().sum(-1) / t.square().sum(-1).clamp(min=1e-8)
                      for y, t in pairs)
            losses["match"] = mean(far) / len(pairs)
            loss = loss + tcfg.distill_match * losses["match"]
        out.loss, out.losses = loss, {**out.losses, **losses}
        return out


class Runner:
    """A model with its optimizers on a Place: what a step and a validation need, and nothing of
    files."""

    def __init__(self, mcfg, tcfg, place, say=print):
        self.mcfg, self.tcfg, self.place = mcfg, tcfg, place
        self.n_rows = tcfg.batch_size * tcfg.gradient_accumulation_steps
        self.my_rows = self.n_rows // place.world
        self.micro = min(tcfg.batch_size, self.my_rows)
        if self.n_rows % place.world or self.my_rows % self.micro:
            raise UserError(f"batch_size * gradient_accumulation_steps ({tcfg.batch_size} * "
                            f"{tcfg.gradient_accumulation_steps}) rows cannot be dealt evenly to "
                            f"{place.world} processes in whole micro-steps; choose multiples")
        # before torch.compile, whose workers take the cores while they start
        self.peak = matmul_peak(place)
        with torch.device("meta"):
            n = GPT(mcfg, None).num_params()
        # bytes of weights, gradients, two moments
        size = 8 * n + 8 * n // (place.world if tcfg.shard_optimizer else 1)
        with contextlib.suppress(ValueError, AttributeError, OSError):  # not all systems tell
            room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if place.device.type == "cpu" and size > room:
                raise UserError(f"a model of {n:,} parameters takes "
                                f"{size / 2 ** 30:,.0f} GB to train, and this machine has "
                                f"{room / 2 ** 30:,.0f}; lower n_embd, n_layer or vocab_size")
        self.model = GPT(mcfg, tcfg.seed).to(place.device)
        self.model.dtype, self.model.grad_checkpoint = place.dtype, tcfg.grad_checkpoint
        # losses are scaled: fp16 would lose small gradients
        self.beyond = 0  # steps in a row that were left out
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == torch.float16)
        self.compiled = can_compile(place, tcfg, say)
        self.inner = self.maybe_compile(self.model)
        self.teacher, self.replaced = None, {}
        self.distillation = Distillation(self.model, tcfg) if tcfg.born_again else None
        self.tokens = self.n_rows * mcfg.block_size  # of a step
        self.slice = slice(place.rank * self.my_rows, (place.rank + 1) * self.my_rows)
        self.begin()

    def maybe_compile(self, module):
        return torch.compile(module, dynamic=False) if self.compiled else module

    @functools.cached_property
    def forward(self):
        """What a training step calls, made at the first: whether there is a teacher is known."""
        module = self.inner
        if self.distillation is not None:
            module = self.maybe_compile(self.distillation)
        if self.place.world == 1:
            return module
        # buffers are tables that every process makes alike (the first name is that of torch 2.13)
        names = inspect.signature(DDP).parameters
        name = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in names)
        return DDP(module, **{name: False})

    def mfu(self, seconds):
        """Return the share of the matmul peak that a step of so many seconds reaches; a teacher's
        forward is a third of a step."""
        flops = self.model.flops_per_token()
        if self.teacher is not None and not self.tcfg.labelled:
            flops += self.teacher.flops_per_token() / 3
        return flops * self.tokens / seconds / self.peak / self.place.world

    def learn_from(self, saved, path):
        """Take a checkpoint as the teacher. Where it has an MLP and this model, as wide, something
        else, that is to give what the MLP gives: `replaced` is {the teacher's block: this model's},
        paired by their names, as weights are. Return those of the teacher's weights that fit this
        model."""
        teacher = self.open_other("teacher", path, saved)
        if teacher.cfg.n_embd != self.mcfg.n_embd:
            like = {}
        else:
            pairs = zip(teacher.blocks, self.model.blocks) if not self.tcfg.labelled else ()
            self.replaced = {t.i: b.i for t, b in pairs
                             if isinstance(t.mlp, MLP) and b.mlp and not isinstance(b.mlp, MLP)}
            state = self.model.state_dict()
            like = {n: p for n, p in saved["model"].items()
                    if n in state and state[n].shape == p.shape}
        self.teacher = self.maybe_compile(teacher)
        for model in (self.model, teacher):
            model.record_ff_outputs = bool(self.replaced)
        self.distillation = Distillation(self.model, self.tcfg)
        return like

    def open_other(self, name, path, saved):
        """Return the model of a checkpoint that is to read what this one reads."""
        try:
            model = GPT.of(saved["model_config"], saved["model"])
        except ValueError as e:
            raise UserError(f"{name} {path} does not fit this version ({summary(e)}); train it "
                            f"again") from None
        theirs, ours = model.cfg, self.mcfg
        means = theirs.running_mean and theirs.n_history != ours.n_history
        if theirs.block_size < ours.block_size or theirs.history > ours.history or means:
            raise UserError(f"{name} {path} reads {theirs.block_size} tokens and {theirs.history} "
                            f"of history before them; give this model a block_size of at most "
                            f"{theirs.block_size} and a history of at least {theirs.history}"
                            + ", that and running_mean = 1" * bool(means))
        model.dtype = self.place.dtype
        return model.eval().requires_grad_(False).to(self.place.device)

    def ask_teacher(self, x, h):
        """Return what the teacher says of inputs x (B, T) after histories h (B, H), as Distillation
        takes it."""
        with torch.no_grad():
            out = ask(self.teacher, x, h)
        return out.logits, {i: out.ff_outputs[t] for t, i in self.replaced.items()}

    @torch.no_grad()
    def label(self, data, model, stop=lambda: 0):
        """Return what a model says of each token of a split, an array (n, V) of logarithms, from
        windows that overlap by half: so each has half a window before it, or all there is; where
        answers need their whole document, from a window for each. Every process asks for itself,
        and leaves it at what it has where stop(), asked once a batch, says so."""
        first = np.arange(1, data.n, -(-data.T // 2))
        if data.docs:  # an answer needs its whole document
            first = np.append(1, data.docs[0][1:])
        last = np.append(first[1:] - 1, data.n - 1)
        if data.docs:
            last = np.minimum(last, data.docs[0] + data.T)
            # a window as long as its document only reads what begins it: another predicts that
            left = data.docs[0][1:][(last - data.T >= data.docs[0])[1:]]
            first, last = np.append(first, left), np.append(last, left)
        data, place = copy.copy(data), torch.arange(data.T)
        data.mask = data.docs = data.labels = None
        labels = torch.zeros(data.n, self.mcfg.vocab_size, dtype=torch.float16)
        model.eval()
        for i in prepare.bar(range(0, len(first), self.micro), desc="label"):
            if stop():
                break
            at = np.arange(i, i + self.micro).clip(max=len(first) - 1)  # (as many rows each time)
            x, y, h = (t.to(self.place.device) for t in data.rows(first[at], last[at]))
            logits = ask(model, x, h, targets=y, denom=torch.ones((), device=x.device)).logits
            pos = 1 + torch.from_numpy(last[at] - data.T).clamp(min=0)[:, None] + place
            labels[pos[y.cpu() >= 0]] = logits[y >= 0].float().log_softmax(-1).half().cpu()
        model.train()
        return labels.numpy()

    def begin(self):
        """Make new optimizers, and forget what blocks M of this process's rows remember."""
        self.optimizers = make_optimizers(self.model, self.tcfg, self.place.world)
        self.memory = self.model.init_memory(self.my_rows) if self.tcfg.stream else {}

    def reset(self, seed):
        """Draw new weights and begin anew with them; what is compiled stays."""
        self.model.load_state_dict(GPT(self.mcfg, seed).state_dict())
        self.move_averages(0.0)
        self.begin()

    def draw(self, step):
        """Return what the model draws for a whole step, on the device; None where it draws
        nothing."""
        step_draw = self.model.draw_step(self.tcfg.seed, step)
        return None if step_draw is None else self.place.put(step_draw)

    def with_memory(self, forward, memory, begins, *inputs, **more):
        """Return forward's Output with what blocks M find in memory, {block: Memory}. Memory ends
        in rows that begin another text (begins, (rows,))."""
        for m in memory.values() if begins is not None else ():
            m.usage[begins] = 0
        return forward(*inputs, **more, memory=memory or None)

    def remember(self, memory, out):
        """Write what blocks M write, behind a backward pass that may search once more."""
        for i, m in memory.items():
            m.write(out.memory_writes[i])

    def step(self, step, x, y, h, labels=None, begins=None, flag=0):
        """Take one optimizer step on this process's rows. labels (rows, T, V): what a teacher says
        of them; begins (rows,): whose memory ends; flag: a number to sum over the processes.

        Return (names of the losses, a tensor of these, the sum of the flags and the gradient's
        norm). Where one is not finite, on any process, nothing is updated, except on a GPU, which
        is not waited for.
        """
        place, tcfg, step_draw, losses = self.place, self.tcfg, self.draw(step), []
        n_scored = place.all_sum(place.put((y >= 0).sum()))
        denom = n_scored.clamp(min=1) / place.world  # DDP takes the mean
        for i in range(0, self.my_rows, self.micro):
            rows = slice(i, i + self.micro)
            torch.manual_seed(hash((tcfg.seed, step, i // self.micro, place.rank)))  # dropout
            mx, my, mh = (t[rows].to(place.device, non_blocking=True) for t in (x, y, h))
            more = {}
            if labels is not None:
                logits = labels[rows].to(place.device, torch.float32, non_blocking=True)
                more["teacher"] = logits, {}
            elif self.teacher is not None:
                more["teacher"] = self.ask_teacher(mx, mh)
            memory = {k: m.select(rows) for k, m in self.memory.items()}
            last = rows.stop == self.my_rows
            with contextlib.nullcontext() if place.world == 1 or last else self.forward.no_sync():
                out = self.with_memory(
                    self.forward, memory, None if begins is None else begins[rows], mx, my, mh,
                    denom=denom, step_draw=step_draw, **more)
                self.scaler.scale(out.loss).backward()
                self.remember(memory, out)
            losses.append(torch.stack([*out.losses.values()]).detach())
        for o in self.optimizers:
            self.scaler.unscale_(o)
        parameters = self.model.parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, tcfg.grad_clip or math.inf)
        values = torch.stack(losses).sum(0) / place.world
        values = place.all_sum(torch.cat((values, values.new_full((1,), flag))))
        values = torch.cat((values, norm[None]))
        scaled = self.scaler.is_enabled()
        finite = (place.device.type == "cuda" and not scaled) or bool(values.isfinite().all())
        for o in self.optimizers:
            for g in o.param_groups:
                g["lr"] = g["peak_lr"] * lr_factor(step, tcfg)
            if finite:
                o.step()
            o.zero_grad(set_to_none=True)
        # gradients beyond fp16 lower the scale; they are an error where that does not help
        self.beyond = 0 if finite or not scaled else self.beyond + 1
        if 0 < self.beyond < 50:
            values[-1] = 0.0
        self.scaler.update()
        if finite:
            self.move_averages(self.tcfg.ema_decay)
        return list(out.losses), values

    @torch.no_grad()
    def move_averages(self, keep):
        """Draw the moving averages that levels regress on (concept_of = ema) to their weights, of
        which `keep` is the share that stays."""
        for level in self.model.levels:
            if level.average is not None:
                pair = list(level.average.parameters()), list(level.blocks.parameters())
                torch._foreach_lerp_(*pair, 1 - keep)

    def evaluate(self, data, alter=None, stop=lambda: 0, limit=0, others=()):
        """Return (nats a scored token, bits a byte) over a whole split, or its first `limit`
        tokens: plain cross-entropy, the same for every variant; None where stop(), asked once a
        batch, said so on any process. For ablations, alter(history) stands in for each history.
        others: models whose probabilities are averaged with this one's."""
        place, losses, count, stopped = self.place, [], 0, 0
        one = torch.ones((), device=place.device)
        memory = self.model.init_memory(self.micro) if data.stream else {}
        # a model that computes the same in training takes the graph that is compiled already: a
        # cold start is 10 s shorter
        reuse = self.compiled and self.distillation is None and not self.model.random()
        step_draw = self.draw(0) if reuse else None
        batches = data.eval_batches(place, self.micro, self.n_rows, limit)
        self.model.train(reuse)
        with torch.set_grad_enabled(reuse):
            for x, y, h, begins in prepare.bar(batches, desc="validate") if place.rank == 0 \
                    else batches:
                if stopped := stop():
                    break
                past = alter(h) if alter else h
                out = self.with_memory(self.inner, memory, begins, x, y, past, denom=one,
                                       step_draw=step_draw)
                self.remember(memory, out)
                ce = out.losses["ce"]
                if others:
                    ce = cross_entropy(
                        averaged([out.logits, *(ask(m, x, h).logits for m in others)]), y)
                losses.append(ce.detach())
                count += int((y >= 0).sum())
        self.model.train()
        total = sum(torch.stack(losses).tolist()) if losses else 0.0  # a GPU is waited for here
        total, count, stopped = place.sum(total, count, stopped)
        if stopped:
            return None
        return total / count, total / math.log(2) / data.bytes * (data.n - 1) / count

    @torch.no_grad()
    def usage(self, data, batches=8):
        """Return how featural memories are used over some batches of a split, the mean of their
        tables: {"slots_used": share of slots that some query found, "slot_entropy": entropy of the
        weights that slots are found with, as a share of log n_mem}; {} without memories."""
        memories = [m for m in self.model.modules() if isinstance(m, FeaturalMemory)]
        if not memories:
            return {}
        weights = torch.zeros(len(memories), self.mcfg.n_mem, device=self.place.device)

        def count(memory, args):
            slots, score = memory.find(args[0])
            share = score.softmax(-1).flatten()
            weights[memories.index(memory)].index_add_(0, slots.flatten(), share)

        some = itertools.islice(data.eval_batches(self.place, self.micro, self.n_rows), batches)
        self.model.eval()
        with contextlib.ExitStack() as hooks:
            for m in memories:
                hooks.enter_context(m.register_forward_pre_hook(count))
            for x, _, h, _ in some:
                # uncompiled: hooks would have it compiled anew
                self.model(x, history=h)
        self.model.train()
        share = weights / weights.sum(1, keepdim=True)
        entropy = torch.special.entr(share).sum(1).mean().item()
        return {"slots_used": (weights > 0).float().mean().item(),
                "slot_entropy": entropy / math.log(self.mcfg.n_mem)}


# --------------------------------------------------------------------------------------------------
# what a run starts from


# Settings that belong to a start and not to the run, and those that change nothing it computes.
OF_A_START = ("out_dir", "init_from", "overwrite", "eval_only", "average")
# what a validation scores: eval_only does it as the run of the model did
SCORED = ("dataset", "data_dir", "score_last", "stream", "batch_size",
          "gradient_accumulation_steps")  # (a stream is read in as many rows)
# settings of a model that its dataset or its layers give
GIVEN = "vocab_size", "eot", "space", "think_token", "n_layer"
WITHOUT_EFFECT = (*OF_A_START, "data_dir", "device", "compile", "sample_every", "sample_at_end",
                  "shard_optimizer", "tensorboard_log", "wandb_log", "trackio_log",
                  "wandb_project", "wandb_run_name", "wandb_id")


def read_other(name, path, tcfg, data):
    """Return the checkpoint of another model, such as a teacher, that is to read the same text."""
    path = prepare.checkpoint_path(path)
    if not os.path.exists(path):
        folder = os.path.dirname(path) or "."
        preset = os.path.join("config", os.path.basename(folder) + ".py")
        known = os.path.exists(os.path.join(os.path.dirname(__file__), preset))
        how = preset if known else f"--out_dir={shlex.quote(folder)}"
        raise UserError(f"{name} {path} is not there; train it first (python train.py {how}), "
                        f"import one (python pretrained.py import), or name another checkpoint")
    saved = prepare.load_checkpoint(path)
    if saved["data"]["tokenizer"] != data["tokenizer"]:
        raise UserError(f"{name} {path} was trained with another tokenizer than that of dataset "
                        f"{tcfg.dataset!r}; train one on that")
    if saved["train_config"].get("stream"):
        raise UserError(f"{name} {path} was trained to remember what stood before its window "
                        f"(stream), and is not given that here; name one without --stream")
    return saved


def read_start(init_from):
    """Return (checkpoint, its path) of the model to start from; one that others trained, in Hugging
    Face's layout or GGUF, becomes a checkpoint here."""
    if pretrained.is_pretrained(init_from):
        return pretrained.read(init_from), init_from
    path = prepare.checkpoint_path(init_from)
    if not os.path.exists(path):
        raise UserError(f"init_from is scratch, resume, auto, or the PATH of a checkpoint of "
                        f"train.py, of its folder or of a pretrained model, and {path} is not "
                        f"there; python pretrained.py import fetches models by name")
    return prepare.load_checkpoint(path), path


def over_stored(cls, stored, given, leave):
    """Return the settings given over those of class cls that a checkpoint stores, without some."""
    kinds = typing.get_type_hints(cls)
    old = {k: config.coerce(k, v, kinds[k]) for k, v in stored.items()
           if k in kinds and k not in leave}
    return config.over(old, given)


def with_stored(m, t):
    """Return the settings {field: value} of the model and of training: those that were given now, m
    and t, over those of the run that they resume, or of the model that they start from (and what
    it scores, where they only validate it), if they do. (The run itself loads its checkpoint again,
    once nobody else can write it.)"""
    init_from, out_dir = (t.get(k, getattr(TrainConfig, k)) for k in ("init_from", "out_dir"))
    files = RunFiles(out_dir)
    resumes = files.resumes(init_from)
    if not resumes and init_from in ("scratch", "auto"):
        return m, t
    saved, path = files.load_last() if resumes else read_start(init_from)
    if gone := saved["model_config"].keys() - settings(GPTConfig()).keys():
        raise UserError(f"{path} does not fit this version, which has no setting "
                        f"{', '.join(sorted(gone))}; train it again, or go on with the version "
                        f"that trained it")
    leave = ("vocab_size", "n_layer") if resumes else GIVEN
    m = over_stored(GPTConfig, saved["model_config"], m, leave)
    stored = saved["train_config"]
    if not resumes:
        stored = {k: v for k, v in stored.items() if t.get("eval_only") and k in SCORED}
    return m, over_stored(TrainConfig, stored, t, OF_A_START)


def other_tokenizer(path, theirs, ours, tcfg):
    """Return what to do about the dataset of tcfg, with tokenizer `ours`, to go on from a
    checkpoint with `theirs`, a sentence."""
    file = os.path.join(tcfg.data_dir, tcfg.dataset, "")
    unknown = {*ours.get("chars", ())} - {*theirs.get("chars", ours.get("chars", ()))}
    out = f"take {' '.join(map(repr, sorted(unknown)))} out of the text, and " if unknown else ""
    kind = path if path.endswith(".pt") else theirs.get("encoding", path)
    return (f"{path} has another tokenizer: {out}make the dataset with its own, "
            f"{prepare.command(file, f'--tokenizer={kind}', '--overwrite')}")


def differences(saved, now):
    """Return {name: (saved value, value now)} of what differs between two flat dicts."""
    return {k: (saved.get(k), now.get(k)) for k in sorted(saved.keys() | now.keys())
            if saved.get(k) != now.get(k)}


def check_resumed(saved, path, tcfg, mcfg, data, say):
    """Raise UserError where a checkpoint is of another run than the settings and data say; say
    which settings the run goes on with that it did not have."""
    defaults = {**settings(GPTConfig()), **vars(TrainConfig())}  # (some are newer than the run)
    before = {**defaults, **saved["model_config"], **saved["train_config"], **saved["data"]}
    changed = differences(before, {**settings(mcfg), **vars(tcfg), **data})
    if any(k in changed for k in ("eval_tokens", "score_last")):
        saved["best_val_loss"] = math.inf  # of other tokens
    fixed = {"optimizer", "stream", "teacher", "born_again"}
    free = (saved["train_config"].keys() | vars(tcfg).keys()) - fixed
    wrong = [f"{k}: {old!r} -> {now!r}" for k, (old, now) in changed.items() if k not in free]
    if wrong:
        raise UserError(f"{path} does not fit this run ({'; '.join(wrong)}); leave these settings "
                        f"out, or make the dataset again as it was, or give another --out_dir to "
                        f"train another model")
    for k, (old, now) in changed.items():
        if k not in WITHOUT_EFFECT:
            say(f"going on with another {k}: {old!r} -> {now!r}")


def shapes(tree):
    """Return a dict of dicts of tensors with (shape, type) in the place of each tensor."""
    return {k: shapes(v) if isinstance(v, dict) else (v.shape, v.dtype) for k, v in tree.items()}


UNFIT = RuntimeError, ValueError, LookupError, TypeError, AttributeError  # of damaged data


def restore_optimizer(optimizer, saved, step):
    """Give an optimizer the state of one that took `step` steps, but the rates of the settings;
    raise ValueError unless it has, for each parameter, what a step leaves: kernels trust it."""
    like, muon = {}, "momentum" in optimizer.param_groups[0]
    parameters = itertools.chain(*(g["params"] for g in optimizer.param_groups))
    for i, p in enumerate(parameters if step else ()):
        like[i] = {"momentum": p} if muon else \
            {"step": torch.tensor(0.0), "exp_avg": p, "exp_avg_sq": p}
    if shapes(saved["state"]) != shapes(like):
        raise ValueError("its optimizers have other parts")
    give_state(optimizer, saved["state"])


def give_state(optimizer, state):
    """Give an optimizer a state, {index of a parameter: {name: value}}; its rates stay. One that is
    sharded takes its share."""
    groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
    optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
    if hasattr(optimizer, "optim"):
        optimizer.state.clear()  # ZeRO's own copy, which nothing reads
        # moves each `step` to where a fused AdamW needs it
        optimizer.optim.load_state_dict(optimizer.optim.state_dict())


def whole_state(optimizer):
    """Return an optimizer's state_dict. All processes must call this: one that is sharded is whole
    on the first and {} on the others."""
    if not hasattr(optimizer, "optim"):
        return optimizer.state_dict()
    optimizer.consolidate_state_dict()
    state = optimizer.state_dict() if dist.get_rank() == 0 else {}
    optimizer._all_state_dicts = []  # (it would keep the whole until the next time)
    return state


def restore_memory(run, saved):
    """Give the memories of a Runner its rows of what a checkpoint has of all; raise ValueError
    where it does not fit."""
    for i, m in run.memory.items():
        for own, of_all in zip((m.keys, m.values, m.usage), saved[i], strict=True):
            rows = of_all[run.slice]
            if len(of_all) != run.n_rows or (rows.shape, rows.dtype) != (own.shape, own.dtype):
                raise ValueError("its memories are of other rows or sizes")
            own.copy_(rows)


# --------------------------------------------------------------------------------------------------
# the loop


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside the weights and optimizers."""
    step: int = 0
    best_val_loss: float = math.inf
    validated: int | None = None  # step of the last validation
    step_seconds: float = 0.0  # of all steps but the first of each start, which compiles
    interval_losses: list = dataclasses.field(default_factory=list)  # since the last log line


class Training:
    """A run: its data, Runner, files and Progress. `held` is an ExitStack for what is to be closed
    at its end."""

    def __init__(self, mcfg, tcfg, say, held):
        """Find out whether what is asked for is possible; of a run that is there nothing is
        changed before that is known."""
        self.started, self.tcfg, self.held = time.perf_counter(), tcfg, held
        self.place, self.writes = find_place(tcfg), not tcfg.eval_only
        self.say = say = say if self.place.rank == 0 else lambda text: None
        self.train_data = Data(tcfg, mcfg, "train")
        self.mcfg = config.build(GPTConfig, **{**settings(mcfg), **self.train_data.facts(mcfg)})
        self.val_data = Data(tcfg, mcfg, "val")
        self.limit = tcfg.eval_tokens if tcfg.eval_tokens < self.val_data.n - 1 else 0
        self.val_data.check_scored(self.limit)
        self.data = {"train.bin": self.train_data.sha[:16], "val.bin": self.val_data.sha[:16],
                     "tokenizer": self.train_data.meta["tokenizer_sha256"][:16]}
        others = [read_other("average", path, tcfg, self.data) for path in tcfg.average]
        teacher = None
        if tcfg.teacher:
            teacher = read_other("teacher", tcfg.teacher, tcfg, self.data)
            # (which one it is, a resumed run must find again)
            self.data["teacher"] = prepare.checkpoint_id(prepare.checkpoint_path(tcfg.teacher))
        self.files = RunFiles(tcfg.out_dir)
        held.callback(self.files.unlock)
        self.on_disk(self.files.lock)
        self.resumed = self.files.resumes(tcfg.init_from)
        saved, path = self.find_start()
        if not self.resumed:
            self.on_disk(lambda: self.files.check_new(tcfg))
        self.run = Runner(self.mcfg, tcfg, self.place, say)
        table = semantic_table(tcfg.semantic_table, self.train_data.tokens, self.mcfg.vocab_size,
                               self.mcfg.n_embd)
        self.run.model.semantic_table = None if table is None else table.to(self.place.device)
        self.others = [self.run.open_other("average", *o) for o in zip(tcfg.average, others)]
        self.progress = Progress()
        if saved:
            self.load_weights(saved, path)
        if teacher:
            weights = self.run.learn_from(teacher, tcfg.teacher)
            weights = weights if tcfg.teacher_start and not saved else {}
            self.run.model.load_state_dict(weights, strict=False)
            n = sum(p.numel() for p in weights.values())
            say(f"learning from {tcfg.teacher}; {n:,} weights start as its own")
        begun = saved or teacher
        if begun and begun["model_config"].get("concept_of") != "ema":
            self.run.move_averages(0.0)  # a start from weights without any has copies of its own
        if self.resumed:
            self.restore(saved, path)
        if tcfg.labelled and self.writes and self.progress.step < tcfg.max_iters:
            self.find_labels()
        self.curve, self.compile_seconds, self.train_loss = [], 0.0, math.inf
        self.interval = 0, 0.0  # steps since the last log line but the first, and their seconds
        self.on_gpu, self.pending = self.place.device.type == "cuda", []  # steps not read yet
        self.maker, self.coming = ThreadPoolExecutor(1), {}  # of batches
        held.callback(self.maker.shutdown)

    def on_disk(self, do):
        """Return what do() returns on rank 0 if this run writes, else None."""
        return self.place.on_rank_zero(do) if self.writes else None

    def find_start(self):
        """Return (checkpoint, its path) by init_from, (None, "") for a fresh start; raise UserError
        where it does not fit the run or its dataset."""
        tcfg, data, spec = self.tcfg, self.data, self.train_data.meta["tokenizer"]
        if self.resumed:
            saved, path = self.files.load_last(self.say)
            check_resumed(saved, path, tcfg, self.mcfg, data, self.say)
            return saved, path
        if tcfg.init_from in ("scratch", "auto"):
            return None, ""
        saved, path = read_start(tcfg.init_from)
        if saved["data"]["tokenizer"] != data["tokenizer"]:
            raise UserError(other_tokenizer(path, saved["tokenizer"], spec, tcfg))
        return saved, path

    def load_weights(self, saved, path):
        """Take the weights of a checkpoint, which may have less in it, and what its optimizers keep
        of them: what is new adds nothing before it is trained."""
        run, tcfg, theirs, weights = self.run, self.tcfg, saved["model_config"], saved["model"]
        states = saved["optimizers"]
        if not self.resumed and "wpe.weight" in weights and \
                self.mcfg.block_size < theirs["block_size"]:  # a shorter window: fewer positions
            theirs, states = {**theirs, "block_size": self.mcfg.block_size}, []
            weights = {**weights, "wpe.weight": weights["wpe.weight"][:self.mcfg.block_size]}
        try:
            if self.resumed:
                return run.model.load_state_dict(weights)
            old, new = GPT.of(theirs, weights), GPT(self.mcfg, tcfg.seed)
            grown = grow(new, old)
            run.model.load_state_dict(new.state_dict())
            if states and saved["train_config"]["optimizer"] == tcfg.optimizer:
                fresh, kept = make_optimizers(new, tcfg), make_optimizers(old, tcfg)
                for o, state in zip(kept, states, strict=True):
                    restore_optimizer(o, state, saved["step"])
                grow_optimizers(fresh, kept, grown)
                for o, f in zip(run.optimizers, fresh):
                    give_state(o, f.state_dict()["state"])
        except UNFIT as e:
            changed = differences(theirs, settings(self.mcfg))
            flags = config.as_flags({k: old for k, (old, _) in changed.items() if k not in GIVEN})
            wrong = f"; give its own settings, {flags}" if flags else ""
            raise UserError(f"{path} is of another shape, and cannot grow into this one "
                            f"({summary(e)}){wrong}") from None
        n = new.num_params() - old.num_params()
        changed = differences({**settings(GPTConfig()), **theirs}, settings(self.mcfg))
        if n:
            self.say(f"{path} has none of {n:,} new parameters, which add nothing at first")
        elif changed and self.place.rank == 0 and outputs_differ(new, old):
            self.say(f"with these settings the outputs of {path} are not what they were; changed: "
                     + ", ".join(f"{k}: {was!r} -> {now!r}" for k, (was, now) in changed.items()))

    def restore(self, saved, path):
        """Go on where a checkpoint of this run is: optimizers, memories, Progress."""
        run, files = self.run, self.files
        try:
            states = saved["optimizers"]
            # (in fp16 every gradient so far may have been beyond it, and no step was taken)
            begun = not run.scaler.is_enabled() or any(state["state"] for state in states)
            for o, state in zip(run.optimizers, states, strict=True):
                restore_optimizer(o, state, saved["step"] * begun)
            restore_memory(run, saved["memory"])
            if run.scaler.is_enabled() and saved.get("scaler"):
                run.scaler.load_state_dict(saved["scaler"])
        except UNFIT as e:
            raise UserError(f"{path} cannot be gone on with ({summary(e)}); begin another run "
                            f"from its weights, with --init_from={shlex.quote(path)} and another "
                            f"--out_dir") from None
        self.progress = p = Progress(**{k: saved[k] for k in vars(self.progress)})
        if p.step >= self.tcfg.max_iters:
            p.validated = None  # the last validation is done again
        files.val_losses[path] = saved["val_loss"]
        if path == files.last:
            files.last_step = p.step
        # the best may be later than the state that is gone on from
        if math.isfinite(p.best_val_loss) and os.path.exists(files.best):
            with contextlib.suppress(UserError):
                best = prepare.load_checkpoint(files.best)
                p.best_val_loss = min(p.best_val_loss, best["best_val_loss"])
                files.val_losses[files.best] = best["val_loss"]

    def find_labels(self):
        """Have the whole text labelled by the teacher of this part of the run: the model of the
        part before it, or in the first part the teacher that was given, if there is one."""
        run, data = self.run, self.train_data
        k = bisect.bisect_left(self.tcfg.born_again, self.progress.step)
        size = data.n * data.n_vocab / 2 ** 29  # GB, in each process
        if size > 16:
            raise UserError(f"what a teacher says of {data.n:,} tokens, each among {data.n_vocab:,}"
                            f", takes {size:,.0f} GB; give fewer by --train_tokens, or a teacher "
                            f"that is asked in each step (--teacher, without --soft_labels)")
        if k:
            own = copy.deepcopy(run.model.state_dict())
            path = self.files.generation(k)
            if not os.path.exists(path):
                raise UserError(f"{path}, which teaches this run, is not there; put it back, or "
                                f"begin anew with --overwrite")
            run.model.load_state_dict(prepare.load_checkpoint(path)["model"])
            data.labels = run.label(data, run.inner)
            run.model.load_state_dict(own)
        elif run.teacher is not None:
            data.labels = run.label(data, run.teacher)

    def begin_log(self):
        """Return the Log, begun; a run that is there and not resumed is deleted."""
        log, p = Log(self.tcfg, self.mcfg), self.progress
        self.held.callback(log.close)
        if not self.resumed:
            self.files.clear()
        log.begin(p.step, p.step - 1 if p.validated is None else p.validated)
        return log

    def stopped(self):
        """Return the number of a signal that any process got, 0 without."""
        if self.place.world == 1:
            return self.signal.number
        number = torch.tensor([self.signal.number], device=self.place.device)
        return int(gather_rows(number, self.place.world).max())

    def state(self, val_loss=None):
        """Return what a checkpoint holds."""
        run, meta = self.run, self.train_data.meta
        memory = {i: [gather_rows(t, self.place.world) for t in (m.keys, m.values, m.usage)]
                  for i, m in run.memory.items()}
        return {**vars(self.progress), "val_loss": val_loss, "memory": memory,
                "model": run.model.state_dict(),
                "optimizers": [whole_state(o) for o in run.optimizers],
                "scaler": run.scaler.state_dict(),
                "model_config": settings(self.mcfg), "train_config": vars(self.tcfg),
                "tokenizer": meta["tokenizer"], "data": self.data, "dataset": self.tcfg.dataset}

    def save(self, val_loss=None, is_best=False):
        """Save this step, with its validation loss if that is known."""
        self.files.save(self.place, self.state(val_loss), is_best)

    def stop_for(self, what, bad=""):
        """Raise UserError for a number that is not finite, with the last good checkpoint, not
        `bad`."""
        good = [p for p in self.files.checkpoints() if p != bad]
        last = f"the last good checkpoint is {good[0]}" if good else "there is none saved"
        raise UserError(f"step {self.progress.step}: {what}; {last}; lower the learning rates or "
                        f"check the data")

    def loop(self):
        """Train until the last step or a signal. Return what `train` returns."""
        p, tcfg, run, place = self.progress, self.tcfg, self.run, self.place
        self.say(f"{self.mcfg.layers}, {self.mcfg.n_embd} wide, {self.mcfg.n_slot} slots: "
                 f"{run.model.num_params() / 1e6:.2f}M parameters on {place.device} x "
                 f"{place.world}, {str(place.dtype)[6:]}, matmul peak {run.peak / 1e12:.2f} "
                 f"TFLOP/s; {run.n_rows} x {self.mcfg.block_size} tokens a step"
                 f"{', compiling at the first' if run.compiled else ''}")
        if tcfg.shard_optimizer and place.world == 1:
            self.say("shard_optimizer has nothing to divide: there is one process (torchrun starts "
                     "several)")
        self.signal = StopSignal()
        self.held.callback(self.signal.restore)
        self.log = self.on_disk(self.begin_log) or (lambda *a, **k: None)
        self.counted, self.heard = time.perf_counter(), 0
        while True:
            done = p.step >= tcfg.max_iters or tcfg.eval_only
            anew = p.step in tcfg.born_again
            due = p.step > 0 and p.step % tcfg.eval_interval == 0 or anew
            due = due and p.step != p.validated
            # (to ask all processes makes a GPU wait; a step's losses tell if one got a signal)
            ask = place.world == 1 or done or due or anew or self.heard
            stopped = self.stopped() if ask else 0
            if done or due or stopped:
                self.settle()
                self.count()
            if (done or due) and not stopped:
                stopped = 0 if self.validate(done) else self.stopped()
            if stopped:
                self.save_and_say_how_to_go_on()
                break
            if done:
                break
            if due:
                self.counted = time.perf_counter()
            if anew and not self.begin_again():
                continue  # to what a signal asks for
            self.train_step()
            if p.step % tcfg.log_interval == 0:
                self.log_losses()
            if tcfg.sample_every and p.step % tcfg.sample_every == 0:
                self.show_sample()
        return self.result(stopped)

    def batch(self, step):
        """Return the rows of a step as Data.batch does; those of the next are made meanwhile."""
        def make(step):
            rows = self.train_data.batch(step, self.run.slice, self.run.n_rows)
            return [t.pin_memory() for t in rows] if self.on_gpu else rows

        made = self.coming.pop(step, None)
        self.coming = {step + 1: self.maker.submit(make, step + 1)}
        return make(step) if made is None else made.result()

    def begin_again(self):
        """Keep the model as the teacher of a new one of its shape, and begin with that (Furlanello
        et al. 2018, arXiv:1805.04770). Return False, with nothing begun, where a signal stopped
        it."""
        p, tcfg, start = self.progress, self.tcfg, time.perf_counter()
        k = tcfg.born_again.index(p.step) + 1
        self.settle()
        path, state = self.files.generation(k), self.state()
        self.place.on_rank_zero(lambda: prepare.save_checkpoint(path, state, demote=False))
        self.train_data.labels = None  # (before as many are made)
        labels = self.run.label(self.train_data, self.run.inner, lambda: self.signal.number)
        self.counted = time.perf_counter()
        if self.stopped():
            return False
        self.train_data.labels = labels
        self.run.reset(tcfg.seed + k)
        self.coming = {}  # (rows with labels of the teacher before)
        p.step_seconds += self.counted - start
        self.say(f"step {p.step}: begins again; its teacher is the model so far, which labelled "
                 f"the text in {time.perf_counter() - start:.0f} s")
        return True

    def train_step(self):
        p, run = self.progress, self.run
        begins = self.train_data.begins(p.step, run.slice, run.n_rows) if run.memory else None
        self.pending.append((p.step, *run.step(p.step, *self.batch(p.step), begins=begins,
                                               flag=self.signal.number)))
        p.step += 1
        self.settle(leave=int(self.on_gpu and self.compile_seconds > 0))
        if self.compile_seconds:
            return self.count(1)
        self.compile_seconds = time.perf_counter() - self.counted
        self.counted += self.compile_seconds
        self.say(f"first step {self.compile_seconds:.1f} s"
                 f"{' with compiling' if run.compiled else ''}")

    def count(self, steps=0):
        """Count the time since it was last counted as that of steps. (A GPU is a step behind, so
        its time is known where it is waited for.)"""
        if self.compile_seconds:
            seconds = time.perf_counter() - self.counted
            self.counted += seconds
            self.progress.step_seconds += seconds
            self.interval = self.interval[0] + steps, self.interval[1] + seconds

    def settle(self, leave=0):
        """Read what steps gave, all but the last `leave`, which a GPU may still compute."""
        while len(self.pending) > leave:
            step, names, values = self.pending.pop(0)
            *values, self.heard, norm = values.tolist()
            losses = dict(zip(names, values))
            if not all(map(math.isfinite, (*values, norm))):
                self.progress.step = step
                self.stop_for(f"loss {losses['ce']}, gradient norm {norm}: training stopped before "
                              f"the update")
            self.progress.interval_losses.append(losses)

    def log_losses(self):
        """Log and print the means of all losses since the last time."""
        p, run = self.progress, self.run
        self.settle()
        self.count()
        steps, seconds = self.interval
        each = seconds / steps if steps else self.compile_seconds
        means = {}
        for name in p.interval_losses[-1]:
            values = [losses[name] for losses in p.interval_losses if name in losses]
            means[name] = sum(values) / len(values)
        ce = self.train_loss = means.pop("ce")
        self.say(f"step {p.step}/{self.tcfg.max_iters}: loss {ce:.4f}, {run.tokens / each:,.0f} "
                 f"tokens/s, mfu {run.mfu(each):.0%}, "
                 f"{clock(time.perf_counter() - self.started)} elapsed, "
                 f"{clock((self.tcfg.max_iters - p.step) * each)} to go"
                 + "".join(f", {name} {value:.4f}" for name, value in means.items()))
        self.log(p.step, train_loss=ce, lr=run.optimizers[0].param_groups[0]["lr"],
                 tokens_per_s=run.tokens / each, mfu=run.mfu(each), step_seconds=p.step_seconds,
                 tokens=p.step * run.tokens,
                 **{f"train_{name}": value for name, value in means.items()})
        self.interval, p.interval_losses = (0, 0.0), []

    @torch.no_grad()
    def show_sample(self):
        """Print what the model writes now, by random numbers of its own."""
        self.settle()
        self.count()
        model, device = self.run.model.eval(), self.place.device
        draws = torch.Generator(device).manual_seed(self.tcfg.seed)
        n = min(100, self.mcfg.block_size)
        state, ids = model.init_state(1, room=n), [int(self.train_data.tokens[0])]
        for _ in range(n):
            logits = model(torch.tensor([ids[-1:]], device=device), state=state).logits[0, -1]
            ids.append(int(torch.multinomial((logits / 0.8).softmax(-1), 1, generator=draws)))
        model.train()
        text = prepare.Tokenizer(self.train_data.meta["tokenizer"]).decode(ids[1:])
        self.say(f"step {self.progress.step}: {text!r}")
        self.counted = time.perf_counter()

    def validate(self, done):
        """Score the validation split, log and save; done: at the end, all of it. Return False where
        a signal stopped it."""
        p, run, tcfg, files = self.progress, self.run, self.tcfg, self.files
        if self.writes and tcfg.always_save_checkpoint and files.last_step != p.step:
            self.save()  # before what may take long
        stop = lambda: self.signal.number
        score = functools.partial(run.evaluate, self.val_data, stop=stop, others=self.others)
        chosen = scores = score(limit=self.limit)
        if done and chosen and self.limit:  # (the best is chosen by the same tokens each time)
            scores = score()
        if not scores:
            return False
        val_loss, bits = scores
        if not math.isfinite(val_loss):
            self.stop_for(f"validation loss {val_loss}",
                          files.last if files.last_step == p.step else "")
        self.curve.append((p.step, p.step_seconds, val_loss))
        usage = run.usage(self.val_data)
        line = f"step {p.step}: val loss {val_loss:.4f}, {bits:.4f} bits per byte"
        if self.limit and not done:
            line += f" on the first {self.limit:,} tokens"
        if usage:
            line += (f"; of its memories {usage['slots_used']:.0%} of slots used, entropy "
                     f"{usage['slot_entropy']:.2f}")
        self.say(line)
        self.log(p.step, val_loss=val_loss, bits_per_byte=bits, step_seconds=p.step_seconds,
                 tokens=p.step * run.tokens, **usage)
        # killed between its best checkpoint and its last, a run does the step again, as well
        again = chosen[0] == p.best_val_loss and files.last_step != p.step
        better = chosen[0] < p.best_val_loss or again
        p.validated, p.best_val_loss = p.step, min(p.best_val_loss, chosen[0])
        if self.writes and (better or tcfg.always_save_checkpoint):
            self.save(val_loss, better)
        return True

    def save_and_say_how_to_go_on(self):
        """Do what a signal asks for."""
        p, files, where = self.progress, self.files, "nothing was written"
        if self.writes:
            if files.last_step != p.step:
                self.save()
            where = (f"step {p.step} is saved in {files.last}; go on with: "
                     f"{command(self.tcfg, self.place)}")
        self.say(f"stopped by a signal; {where}")

    def result(self, stopped):
        """Return what `train` returns; say so where nothing was learned."""
        p, files, curve, V = self.progress, self.files, self.curve, self.mcfg.vocab_size
        val_loss = curve[-1][2] if curve else None
        if curve and not stopped and val_loss >= math.log(V):
            do = "lower learning_rate and muon_lr, or train longer"
            if self.train_loss < math.log(V):
                do = (f"only the training text was learned (loss {self.train_loss:.4f}); give a "
                      f"longer text, or train for fewer steps")
            self.say(f"val loss {val_loss:.4f} is no better than guessing among {V} tokens "
                     f"({math.log(V):.4f}): {do}")
        path = next((p for p in (files.best, files.last) if p in files.val_losses), None)
        return dict(val_loss=val_loss, best_val_loss=p.best_val_loss, step=p.step, curve=curve,
                    step_seconds=p.step_seconds, stopped=stopped, path=path,
                    saved_val_loss=files.val_losses.get(path),
                    compile_seconds=self.compile_seconds, params=self.run.model.num_params(),
                    seconds=time.perf_counter() - self.started)


def train(mcfg, tcfg, say=print):
    """Train as the settings say; `say` prints. Return a dict: val_loss, best_val_loss, step,
    step_seconds (the sum of the steps alone, without the first, which compiles), compile_seconds,
    seconds, params, path (of the checkpoint that sample.py takes, None if there is none),
    saved_val_loss (of that one, None if it was not scored), curve [(step, step_seconds, val_loss)],
    stopped (the number of the signal that did, or 0)."""
    try:
        with contextlib.ExitStack() as held:
            return Training(mcfg, tcfg, say, held).loop()
    except RuntimeError as e:
        if not config.compile_failure(e):
            raise
        raise UserError(config.compile_failure(e)) from None


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def command(tcfg, place):
    """Return the command that goes on with a run."""
    n = os.environ.get("LOCAL_WORLD_SIZE", place.world)
    start = "python" if place.world == 1 else f"torchrun --nproc_per_node={n}"
    return f"{start} train.py --init_from=resume --out_dir={shlex.quote(tcfg.out_dir)}"


def main(argv):
    m, t, _ = config.parse(argv, GPTConfig, TrainConfig, doc=__doc__)
    named = m.named | t.named  # (a preset may be used with other layers)
    m, t = with_stored(m, t)
    mcfg, tcfg = config.build(GPTConfig, **m), config.build(TrainConfig, **t)
    config.refuse_idle(named, *mcfg.idle(), *tcfg.idle(mcfg))
    try:
        r = train(mcfg, tcfg, say)
    finally:
        grouped = dist.is_initialized()
        rank = dist.get_rank() if grouped else 0
        if grouped:
            dist.destroy_process_group()
    if rank == 0 and not r["stopped"]:
        said = f"on {tcfg.dataset}" if tcfg.eval_only else (
            f"after {r['step']} steps in {clock(r['seconds'])} ({r['step_seconds']:.0f} s of "
            f"steps, {r['compile_seconds']:.0f} s for the first)")
        say(f"done: val loss {r['val_loss']:.4f} {said}")
        if r["path"] and not tcfg.eval_only:
            scored = "" if r["saved_val_loss"] is None else f" (val loss {r['saved_val_loss']:.4f})"
            sample = f"python sample.py --out_dir={shlex.quote(tcfg.out_dir)}"
            say(f"checkpoint: {r['path']}{scored}\nsample from it: {sample}")
            ways = [""]
            if mcfg.soft_rate or mcfg.n_soft:
                ways.append(" --soft")
                say(f"and in soft tokens: {sample} --soft")
            for way in ways if tcfg.sample_at_end else ():
                say(f"\nsample.py{way}:")
                program = os.path.join(os.path.dirname(__file__), "sample.py")
                subprocess.run([sys.executable, program, f"--out_dir={tcfg.out_dir}", *way.split(),
                                f"--max_new_tokens={tcfg.sample_at_end}",
                                f"--device={tcfg.device}"])
    code = 128 + r["stopped"] if r["stopped"] else 0
    if grouped:
        # DDP leaves gloo's threads alive (torch 2.13), and one that drops its last tensor while
        # Python ends aborts the process: 1 run in 10 with 8 ranks on 2 cores. All is saved and said
        os._exit(code)
    return code


def say(text, to=None):
    """Print a line now. An output that takes no more (a full disk, a reader or a terminal that is
    gone) is no reason to lose a run: what is said to it from then on goes nowhere."""
    to = to or sys.stdout
    try:
        print(visible(text), file=to, flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())
    except ValueError:  # it was closed, or has another alphabet
        pass


if __name__ == "__main__":
    config.run(main)
