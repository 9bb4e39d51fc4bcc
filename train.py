"""Trains a model: batches, optimizer, loop, checkpoints.

    python train.py                                  the default model on the default dataset
    python train.py config/softar_shakespeare.py     a preset
    python train.py config/nanogpt_cpu.py --seed=2   a preset, one setting changed
    torchrun --nproc_per_node=8 train.py             the same run on eight processes

A row of a batch is a function of (seed, step, row) and of nothing that was drawn before, so a run that was stopped goes on
exactly as if it had not been, and any number of processes computes the same thing (dropout, soft inputs and the noise of
concept heads alone are drawn by micro-step and rank).
"""
import contextlib
import csv
import dataclasses
import io
import itertools
import math
import os
import shlex
import signal
import sys
import time
import typing
from dataclasses import dataclass

import config  # before torch: it sets the allocator's switches
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import prepare
from config import UserError, summary, visible
from model import FeaturalMemory, GPT, GPTConfig, MLP, Taught, settings


@dataclass
class TrainConfig:
    out_dir: str = "out/gpt"  # checkpoints and log.csv go here
    dataset: str = "shakespeare"  # folder under data_dir, made by prepare.py
    data_dir: str = "data"  # where datasets are kept
    init_from: str = "scratch"  # scratch | resume | auto (resume if there is a run) | PATH
    overwrite: bool = False  # begin anew in an out_dir that has a run, which is deleted
    teacher: str = ""  # PATH of a model to learn from, and to start from as far as its weights fit
    distill: float = 1.0  # with a teacher: weight of the divergence from its distribution
    distill_match: float = 1.0  # with a teacher: weight of matching its feed-forward layers where a memory is in their place
    distill_ce: float = 0.0  # with a teacher: weight of the text itself
    stream: int = 0  # windows of a text that a row reads in turn, for memories M to outlast the window; 0: each row anywhere
    max_iters: int = 750  # optimizer steps
    batch_size: int = 16  # rows a micro-step, over all processes
    gradient_accumulation_steps: int = 1  # micro-steps a step, over all processes
    eval_interval: int = 250  # steps between validations (and checkpoints)
    eval_tokens: int = 0  # so many are read by validations, but by the last one; 0: the whole split
    eval_only: bool = False  # validate once and stop
    log_interval: int = 10  # steps between log lines
    always_save_checkpoint: bool = True  # False: only where the validation loss improved
    optimizer: str = "muon"  # muon (matrices inside blocks and slots; AdamW for the rest) | adamw
    learning_rate: float = 4e-3  # of AdamW
    value_lr: float = 2.0  # of the values of featural memories, times learning_rate
    muon_lr: float = 0.02  # of Muon
    momentum: float = 0.95  # of Muon
    ns_steps: int = 5  # Newton-Schulz iterations of Muon
    weight_decay: float = 0.0  # decoupled, on everything with two dimensions
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # clip the gradient to this norm; 0: do not
    schedule: str = "wsd"  # wsd (constant, then linear cool-down) | cosine | triangle (linear down from the warm-up on)
    decay_lr: bool = True  # False: constant after the warm-up
    warmup_iters: int = 0  # linear warm-up
    lr_decay_iters: int = 0  # step at which min_lr is reached; 0: max_iters
    min_lr: float = 0.0  # AdamW's rate at the end; Muon's falls by the same factor
    cooldown: float = 0.8  # share of the run that wsd cools down over
    history_drop: float = 0.1  # share of training rows whose history is cut short at a random place
    score_last: int = 0  # score only the last n tokens of a row; 0: all
    train_on_all: bool = False  # with score_last: train on all that a row asks, and score its last in validation only
    seed: int = 1337  # of the weights, the batches and dropout
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "auto"  # auto (bfloat16 where the hardware has it) | float32 | bfloat16
    compile: bool = True  # torch.compile (where there is a compiler)
    tensorboard_log: bool = False  # also log to tensorboard
    wandb_log: bool = False  # also log to Weights & Biases
    wandb_project: str = "nanoconcept"  # its project
    wandb_run_name: str = ""  # its run; default: out_dir

    def __post_init__(self):
        for name, options in (("optimizer", ("muon", "adamw")), ("schedule", ("wsd", "cosine", "triangle")),
                              ("dtype", ("auto", "float32", "bfloat16"))):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} is one of {', '.join(options)}, not {getattr(self, name)!r}")
        config.within(self, 1, 2 ** 20, "batch_size", "gradient_accumulation_steps")
        config.within(self, 1, 2 ** 53, "eval_interval", "log_interval", "max_iters")
        config.within(self, 0, 2 ** 53, "warmup_iters", "lr_decay_iters", "eval_tokens",
                      "score_last", "stream")
        config.within(self, 1, 100, "ns_steps")
        config.within(self, 0, 1e9, "weight_decay", "grad_clip", "min_lr", "muon_lr", "value_lr",
                      "distill", "distill_match", "distill_ce")
        config.within(self, 0, 2 ** 63 - 1, "seed")  # a key of NumPy's Philox has 64 bits
        if self.overwrite and self.init_from in ("resume", "auto"):
            raise ValueError(f"overwrite begins anew, and init_from = {self.init_from} goes on "
                             f"with a run; leave one of them out")
        if self.teacher and not (self.distill or self.distill_ce):
            raise ValueError("distill = 0 and distill_ce = 0 leave nothing to learn but what feed-forward layers give; set one of them")
        for name in ("distill", "distill_match", "distill_ce"):
            if not self.teacher and getattr(self, name) != getattr(TrainConfig, name):
                raise ValueError(f"{name} is what a teacher's word counts, and there is none; give --teacher=PATH")
        end = self.decay_lr and self.lr_decay_iters or self.max_iters
        if end <= self.warmup_iters:
            raise ValueError(f"warmup_iters ({self.warmup_iters}) leaves nothing of the {end} "
                             f"steps that the learning rate takes (lr_decay_iters, or max_iters); "
                             f"give fewer")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr ({self.min_lr}) is where learning_rate "
                             f"({self.learning_rate}) falls to; give less")
        config.within(self, 0, 1, "history_drop", "cooldown")
        config.within(self, 0, 0.99999, "momentum", "beta1", "beta2")
        config.within(self, 1e-12, 1e9, "learning_rate")


    def idle(self, mcfg):
        """Yield (name, what it needs) of each setting that was changed and has nothing to work on,
        beside a model of mcfg."""
        for there, needs, names in (
                (self.optimizer == "muon", "optimizer = muon", "muon_lr momentum ns_steps"),
                (self.decay_lr, "decay_lr = True", "schedule lr_decay_iters min_lr"),
                (self.decay_lr and self.schedule == "wsd", "schedule = wsd, and decay_lr", "cooldown"),
                (self.score_last, "score_last", "train_on_all"),
                ("M" in mcfg.layers, "a block M in layers", "stream"),
                (mcfg.history and not self.stream, "history, without stream", "history_drop"),
                ("F" in mcfg.layers, "a block F in layers", "value_lr"),
                (self.wandb_log, "wandb_log", "wandb_project wandb_run_name")):
            for name in names.split():
                if not there and getattr(self, name) != getattr(TrainConfig, name):
                    yield name, needs


# ---------------------------------------------------------------------------------------------------------------------
# where it runs


@dataclass
class Place:
    """This process among all, and the hardware it has."""
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    def sum(self, *values):
        """Each number summed over all processes."""
        if self.world == 1:
            return list(values)
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(t)
        return t.tolist()

    def rows(self, t):
        """The rows (n, ...) of all processes, in the order of their ranks."""
        if self.world == 1:
            return t
        parts = [torch.empty_like(t) for _ in range(self.world)]
        dist.all_gather(parts, t.contiguous())
        return torch.cat(parts)

    def same(self, do):
        """do() on rank 0, and what it returns there; its UserError, if it raises one, on every rank."""
        error = made = None
        if self.rank == 0:
            try:
                made = do()
            except UserError as e:
                error = str(e)
            except OSError as e:
                error = (f"{e.filename or 'a file'} failed ({e.strerror or e}); see to it and try "
                         f"again")
        if self.world > 1:
            box = [error]
            dist.broadcast_object_list(box, src=0)
            error = box[0]
        if error:
            raise UserError(error)
        return made


def ranks():
    """(rank, processes, rank on this machine, processes on this machine) as torchrun says, or else
    0, 1, 0, 1; raise UserError where only half of that is said, or nonsense."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    if not any(n in os.environ for n in names):
        return 0, 1, 0, 1
    try:
        rank, world, local = (int(os.environ[n]) for n in names)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        [os.environ[n] for n in ("MASTER_ADDR", "MASTER_PORT") if world > 1]
        if 0 <= rank < world and 0 <= local and 0 < here <= world:
            return rank, world, local, here
    except (KeyError, ValueError):
        pass
    said = ", ".join(f"{n} = {os.environ.get(n)!r}" for n in (*names, "MASTER_ADDR", "MASTER_PORT"))
    raise UserError(f"the environment makes this process one of several, but not wholly ({said}); "
                    f"start several with torchrun, or unset these variables") from None


def find_place(tcfg):
    """The device and type of the settings, and the process group when torchrun started us."""
    rank, world, local, here = ranks()
    name = tcfg.device
    if name == "auto":  # several processes want a GPU each, or none
        name = "cuda" if torch.cuda.device_count() >= here else \
            "mps" if torch.backends.mps.is_available() and world == 1 else "cpu"
    if world > 1 and (name == "mps" or (name == "cuda" and torch.cuda.device_count() < here)):
        raise UserError(f"{here} processes cannot each have a {name} device here; start fewer, or use --device=cpu")
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"device is one of auto, cpu, cuda (or one of several, as cuda:1) and mps, "
                        f"not {name!r}")
    try:
        # a torch without CUDA may lack functions
        if kind == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no CUDA")
        device = torch.device("cuda", local) if name == "cuda" else torch.device(name)
        if kind == "cuda":
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, AttributeError) as e:
        raise UserError(f"device {name!r} is not to be had here ({summary(e)}); use --device=auto "
                        f"or cpu") from None
    if world > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        except (RuntimeError, ValueError) as e:
            raise UserError(f"the {world} processes did not find one another ({summary(e)}); start "
                            f"them with torchrun, or unset RANK, WORLD_SIZE, LOCAL_RANK") from None
    if device.type == "cpu" and world > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16,
             "auto": torch.bfloat16 if bf16 else torch.float32}[tcfg.dtype]
    return Place(device, dtype, rank, world)


def matmul_peak(place, seconds=0.3):
    """Floating-point operations a second that a plain matrix product reaches here, the best within some time: MFU's 100%."""
    n = 1024 if place.device.type == "cpu" else 4096
    a, best, start = torch.randn(n, n, device=place.device, dtype=place.dtype), float("inf"), time.perf_counter()
    while (t := time.perf_counter()) < start + seconds or best == float("inf"):
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - t)
    return 2 * n ** 3 / best


def can_compile(place, tcfg, say):
    if not tcfg.compile or place.device.type == "mps":
        return False
    missing = config.compiler_missing(place.device.type)
    if missing:
        say(f"{missing} was not found: training goes on uncompiled, at about half the speed")
    return not missing


# ---------------------------------------------------------------------------------------------------------------------
# batches


class Data:
    """One split of a dataset as rows of T tokens with their targets and the `history` tokens before them."""

    def __init__(self, tcfg, mcfg, split):
        meta = prepare.open_dataset(tcfg.dataset, tcfg.data_dir)
        path = os.path.join(tcfg.data_dir, tcfg.dataset, f"{split}.bin")
        self.tokens, self.mask, self.n_vocab, tok_hash, self.sha = prepare.open_bin(path)
        if (tok_hash, self.n_vocab, self.sha) != (meta["tokenizer_sha256"], meta["n_vocab"], meta["sha256"][split]):
            raise UserError(f"{path} was made from another text or with another tokenizer than the meta.json beside it says; "
                            f"make the dataset again: {prepare.command(path)}")
        if mcfg.vocab_size not in (0, self.n_vocab):
            raise UserError(f"vocab_size is {mcfg.vocab_size}, but dataset {tcfg.dataset!r} has {self.n_vocab} tokens; leave "
                            f"it out")
        everything = not tcfg.score_last or (split == "train" and tcfg.train_on_all)
        self.T, self.H, self.last = mcfg.block_size, mcfg.history, mcfg.block_size if everything else tcfg.score_last
        self.n, self.eot, self.drop, self.seed, self.stream = len(self.tokens), meta["eot"], tcfg.history_drop, tcfg.seed, tcfg.stream
        if self.last > self.T:
            raise UserError(f"score_last ({self.last}) is larger than block_size ({self.T}); "
                            f"give less")
        if self.n < self.T + 1:
            raise UserError(f"{path} has {self.n} tokens, fewer than block_size + 1 = {self.T + 1}; give a longer text or "
                            f"a smaller block_size")
        if split == "train" and self.n < self.stream * self.T + 1:
            raise UserError(f"{path} has {self.n} tokens, fewer than stream * block_size + 1 = {self.stream * self.T + 1}; give a "
                            f"smaller stream")
        self.bytes, self.meta = meta["bytes"][split], meta
        self.ends = None if self.mask is None else np.flatnonzero(self.mask)  # places that may be a row's last target
        if self.ends is not None:
            self.ends = self.ends[self.ends >= self.T]
            if not len(self.ends):
                raise UserError(f"{path} scores no token that has block_size = {self.T} tokens "
                                f"before it; give a smaller block_size")
        self.docs = None  # of a task whose answers need their whole document: first and last token of each
        if meta.get("whole"):
            end = np.flatnonzero(np.append(self.tokens[1:], self.eot) == self.eot)
            end = end[self.tokens[end] != self.eot]
            self.docs = np.append(0, end[:-1] + 2), end
            longest = int((self.docs[1] - self.docs[0]).max())
            if longest > self.T:
                raise UserError(f"{path} has a document of {longest} tokens, and its answer needs all of them; give a block_size "
                                f"of at least {longest}, not {self.T}")

        if self.stream and (self.last < self.T or self.docs is not None):
            raise UserError(f"stream reads windows that follow one another, and where only {'whole documents' if self.docs else 'score_last'} "
                            f"score, they overlap; leave stream out" + ("" if self.docs else ", or score_last"))

    def facts(self, mcfg):
        """The settings of a model that the dataset knows."""
        think = mcfg.think_token if mcfg.think_token >= 0 else self.meta.get("think_token", -1)
        if mcfg.n_think and not 0 <= think < self.n_vocab:
            raise UserError(f"n_think needs a dataset with a think token, such as python prepare.py chain makes, or one of the "
                            f"dataset's {self.n_vocab} ids as --think_token, not {think}")
        eot, space = mcfg.eot, mcfg.space
        if eot < 0 and set("RGM(") & set(mcfg.layers) and self.eot is not None:  # something begins again with a document
            eot = self.eot
        if "(" in mcfg.layers and mcfg.chunk.startswith("space"):
            space = space or tuple(prepare.Tokenizer(self.meta["tokenizer"]).spaces())
            if not space:
                raise UserError("chunk = space needs a dataset with white space; give a number")
        if max((eot, *space)) >= self.n_vocab:
            raise UserError(f"eot ({eot}) and space {space} must be ids of the dataset, below {self.n_vocab}")
        return {"vocab_size": self.n_vocab, "think_token": think if mcfg.n_think else -1, "eot": eot, "space": space}

    def rows(self, first, last, keep=None):
        """Rows whose scored targets are the tokens first..last (B,) of the split, `last` at the row's end where there is
        room before it. -> x (B, T), y (B, T) with -1 where not scored, history (B, H) with -1 where missing: before the
        start, before an end of text, and older than `keep` (B,) tokens."""
        start = np.maximum(last - self.T, 0)
        at = start[:, None] + np.arange(-self.H, self.T + 1)
        inside = (at >= 0) & (at < self.n)
        tok = np.where(inside, self.tokens[np.clip(at, 0, self.n - 1)].astype(np.int64), -1)
        scored = inside & (at >= first[:, None]) & (at <= last[:, None])
        if self.mask is not None:
            scored &= self.mask[np.clip(at, 0, self.n - 1)] > 0
        if self.meta.get("whole"):  # an answer is asked only where its whole document is in the row
            begins = (start == 0) | (self.tokens[np.maximum(start - 1, 0)] == self.eot)
            scored[:, self.H:] &= ((tok[:, self.H:] == self.eot).cumsum(1) > 0) | begins[:, None]
        history = prepare.forget(tok[:, :self.H], self.eot)
        if keep is not None:
            history = np.where(np.arange(self.H, 0, -1) > keep[:, None], -1, history)
        x, y = np.maximum(tok[:, self.H:-1], 0), np.where(scored, tok, -1)[:, self.H + 1:]
        return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in (x, y, history))

    def batch(self, step, rows, n_rows):
        """Rows `rows` (a slice) of the n_rows of this step: row r depends on (seed, step, r) alone."""
        draw = lambda k: np.random.Generator(np.random.Philox(key=[self.seed, k])).random((n_rows, 3))[rows]
        if self.stream:
            turn, window = self.turn(step, rows, n_rows)
            u = np.stack([draw(k) for k in range(turn.min(), turn.max() + 1)])[turn - turn.min(), np.arange(len(turn))]
            last = (u[:, 0] * (self.n - self.stream * self.T)).astype(np.int64) + (window + 1) * self.T
            return self.rows(last - self.last + 1, last)
        u = draw(step)
        if self.ends is None:
            last = self.T + (u[:, 0] * (self.n - self.T)).astype(np.int64)
        else:
            last = self.ends[(u[:, 0] * len(self.ends)).astype(np.int64)]
        keep = np.where(u[:, 1] < self.drop, (u[:, 2] * self.H).astype(np.int64), self.H)
        return self.rows(last - self.last + 1, last, keep)

    def turn(self, step, rows, n_rows):
        """With stream: which text each of these rows reads, counted, and which of its windows; rows begin one after another."""
        return np.divmod(step + np.arange(n_rows)[rows] * self.stream // n_rows, self.stream)

    def begins(self, step, rows, n_rows):
        """(rows,) True where a row begins another text, and its memory ends."""
        return torch.from_numpy(self.turn(step, rows, n_rows)[1] == 0)

    def whole(self, place, size, n_rows=0, limit=0):
        """Every token of the split but the first, or of the first `limit` behind that, scored once,
        in batches of `size` rows, dealt to this process: x, y, history as `rows` gives them, and whether their rows begin a text. Where answers need their whole document, a row ends with each document.
        With stream the split is read as `n_rows` texts of equal length, however many rows a batch has: a row goes on where the same
        row of the batch before ended, or begins another text."""
        if self.docs is not None:
            first, last = self.docs[0] + 1, self.docs[1]
        else:
            first = np.arange(1, self.n, self.last)
            last = np.minimum(first + self.last - 1, limit or self.n - 1)
        if limit:
            some = (first <= limit) & (last <= limit)
            first, last = first[some], last[some]
        if self.mask is not None and not self.stream and len(first):  # (what a memory shall know must be read, scored or not)
            has = np.add.reduceat(np.asarray(self.mask[1:], dtype=np.int64), first - 1) > 0  # (the mask is 0 between documents)
            first, last = first[has], last[has]
        if self.stream:
            n_rows = n_rows or size * place.world
            each, mine = -(-len(first) // n_rows), n_rows // place.world  # windows that follow one another; texts of this process
            for text, i in itertools.product(range(place.rank * mine, (place.rank + 1) * mine, size), range(each)):
                at = (text + np.arange(size)) * each + i
                x, y, h = self.rows(*(a[at.clip(max=len(first) - 1)] for a in (first, last)))
                yield [x, y.masked_fill(torch.from_numpy(at >= len(first))[:, None], -1), h, torch.full((size,), i == 0)]
            return
        first, last = first[place.rank::place.world], last[place.rank::place.world]
        for i in range(0, len(first), size):
            x, y, h = self.rows(first[i:i + size], last[i:i + size])
            n = size - len(x)  # padded, so that there is one shape to compile
            yield [*(torch.nn.functional.pad(t, (0, 0, 0, n), value=v) for t, v in ((x, 0), (y, -1), (h, -1))), torch.ones(size, dtype=bool)]


# ---------------------------------------------------------------------------------------------------------------------
# optimizer


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, made orthogonal by Newton-Schulz iterations, as the update of a matrix. The rule
    of torch.optim.Muon, but matrices of one shape go through the iterations together, the parts of a fused matrix (its
    `parts`, row counts) each on its own, and a matrix that stands upright lies down first."""
    QUINTIC = (3.4445, -4.7750, 2.0315)

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, ns_steps=5, dtype=torch.bfloat16):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps))
        self.dtype = dtype  # of the iterations: bf16 is enough, fp32 lets runs of several shapes agree closely

    @classmethod
    def orthogonalize(cls, x, steps):
        """(n, a, b) with a <= b -> each matrix with its singular values near 1."""
        a, b, c = cls.QUINTIC
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            torch._foreach_lerp_(grads, momenta, group["momentum"])  # Nesterov; the gradient is not needed any more
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            by_shape = {}
            for p, g in zip(params, grads):
                parts = getattr(p, "parts", (p.size(0),))
                for target, update in zip(p.split(parts), g.split(parts)):
                    shape = min(update.shape), max(update.shape)
                    by_shape.setdefault(shape, []).append((target, update))
            for pairs in by_shape.values():
                flat = torch.stack([u if u.size(0) <= u.size(1) else u.T for _, u in pairs]).to(self.dtype)
                for (target, u), o in zip(pairs, self.orthogonalize(flat, group["ns_steps"])):
                    o = o if u.size(0) <= u.size(1) else o.T
                    target.add_(o, alpha=-group["lr"] * max(1, u.size(0) / u.size(1)) ** 0.5)


def param_groups(model, tcfg):
    """{"muon": [...], "adamw": [...], "values": [...], "plain": [...]}: linear layers inside blocks, levels and slots; everything else
    with two dimensions, heads among it; values of memories, at a rate of their own; gains and biases, which never decay. With
    optimizer = adamw the first is part of the second."""
    out = {"muon": [], "adamw": [], "values": [], "plain": []}
    for name, p in model.named_parameters():
        inside = name.startswith(("blocks.", "levels.", "slots.proj")) and p.dim() == 2 and not (
            name.endswith(("embed.weight", "values.weight")) or ".head." in name)
        if name.endswith("values.weight"):
            out["values"].append(p)
            continue
        out["plain" if p.dim() < 2 else "muon" if inside and tcfg.optimizer == "muon" else "adamw"].append(p)
    return out


def make_optimizers(model, tcfg):
    groups = param_groups(model, tcfg)
    adam = [{"params": groups["adamw"], "weight_decay": tcfg.weight_decay}, {"params": groups["plain"], "weight_decay": 0.0},
            {"params": groups["values"], "weight_decay": 0.0, "lr": tcfg.learning_rate * tcfg.value_lr}]
    out = [torch.optim.AdamW([g for g in adam if g["params"]], lr=tcfg.learning_rate, betas=(tcfg.beta1, tcfg.beta2),
                             fused=next(model.parameters()).device.type in ("cpu", "cuda"))]
    if groups["muon"]:
        out.append(Muon(groups["muon"], tcfg.muon_lr, tcfg.momentum, tcfg.weight_decay, tcfg.ns_steps,
                        model.dtype))
    for o in out:
        for g in o.param_groups:
            g["peak_lr"] = g["lr"]
    return out


def lr_factor(step, tcfg):
    """The learning rate of a step as a share of its peak."""
    if step < tcfg.warmup_iters:
        return (step + 1) / (tcfg.warmup_iters + 1)
    if not tcfg.decay_lr:
        return 1.0
    end, floor = tcfg.lr_decay_iters or tcfg.max_iters, tcfg.min_lr / tcfg.learning_rate
    if step >= end:
        return floor
    if tcfg.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * (step - tcfg.warmup_iters) / (end - tcfg.warmup_iters)))
    elif tcfg.schedule == "triangle":
        share = (end - step) / (end - tcfg.warmup_iters)
    else:
        share = min(1.0, (end - step) / max(tcfg.cooldown * end, 1))
    return floor + (1 - floor) * share


# ---------------------------------------------------------------------------------------------------------------------
# logs, locks, checkpoints


# The files of a run in out_dir.
RUN = "ckpt.pt", "ckpt_prev.pt", "ckpt_best.pt", "log.csv", "exits.json"


def start_tensorboard(tcfg):
    from torch.utils.tensorboard import SummaryWriter
    tb = SummaryWriter(tcfg.out_dir)
    return lambda step, values: [tb.add_scalar(k, v, step) for k, v in values.items()], tb.close


def start_wandb(tcfg):
    import wandb
    wandb.init(project=tcfg.wandb_project, name=tcfg.wandb_run_name or tcfg.out_dir)
    return lambda step, values: wandb.log(values, step=step), wandb.finish


class Log:
    """log.csv in out_dir, and tensorboard and wandb when they are asked for. Rank 0 only. What
    fails in the course of a run is said once and left out."""
    FIELDS = ("step", "train_loss", "val_loss", "bits_per_byte", "lr", "tokens_per_s", "mfu", "step_seconds", "slots_used",
              "slot_entropy")

    def __init__(self, tcfg):
        """Start tensorboard and wandb, which may fail; log.csv is not touched."""
        self.path, self.logs, self.closes = os.path.join(tcfg.out_dir, "log.csv"), {}, {}
        for name, start in (("tensorboard", start_tensorboard), ("wandb", start_wandb)):
            if getattr(tcfg, f"{name}_log"):
                try:
                    self.logs[name], self.closes[name] = start(tcfg)
                except Exception as e:  # whatever they raise
                    self.close()
                    todo = f"pip install {name}" if isinstance(e, ImportError) else \
                        "run wandb login" if name == "wandb" else "install it again"
                    raise UserError(f"{name} did not start ({summary(e)}); {todo}, or leave "
                                    f"{name}_log out") from None

    def begin(self, step, scored):
        """Begin log.csv; that of a resumed run keeps its rows of training up to `step`, and of
        validation up to step `scored`."""
        text, rows = io.StringIO(newline=""), []
        try:
            if step and os.path.lexists(self.path):
                last = lambda row: step if row["train_loss"] else scored
                rows = [row for row in self.read(self.path) if row["step"] <= last(row)]
        except (OSError, ValueError, csv.Error) as e:
            names = (f"{self.path}.damaged{i}" for i in itertools.count(1))
            kept = next(name for name in names if not os.path.lexists(name))
            os.rename(self.path, kept)
            say(f"{self.path} cannot be read ({summary(e)}); it is kept as {kept}, and the log "
                f"begins anew", sys.stderr)
        table = csv.DictWriter(text, self.FIELDS)
        table.writeheader()
        table.writerows(rows)
        with prepare.replacing(self.path) as f:
            f.write(text.getvalue().encode())
        self.logs["log.csv"] = self.write

    @classmethod
    def read(cls, path):
        """Return the rows of a log.csv, dicts of texts, `step` a number; raise ValueError or
        csv.Error where it is something else."""
        if not os.path.isfile(path):
            raise ValueError("it is not a file")
        with open(path, newline="", encoding="utf-8") as f:
            head, *rows = list(csv.reader(f)) or [[]]
        if head != list(cls.FIELDS[:len(head)]) or len(head) < 2:
            raise ValueError("its columns have other names")
        if rows and len(rows[-1]) < len(head):  # the machine stopped while it was written
            rows.pop()
        for row in rows:
            numbers = all(math.isfinite(float(v)) for v in row if v)
            if len(row) != len(head) or not row[0].isdecimal() or not numbers:
                raise ValueError(f"a row is {','.join(row)[:80]!r}")
        rows = [{**dict.fromkeys(cls.FIELDS, ""), **dict(zip(head, row)), "step": int(row[0])}
                for row in rows]
        if any(a["step"] > b["step"] for a, b in itertools.pairwise(rows)):
            raise ValueError("its steps do not follow one another")
        return rows

    def write(self, step, values):
        """Append a row to log.csv, which may have been taken away with its folder."""
        prepare.make_dir(os.path.dirname(self.path))
        with open(self.path, "a", newline="", encoding="utf-8") as f:
            table = csv.DictWriter(f, self.FIELDS)
            if not f.tell():
                table.writeheader()
            table.writerow({"step": step, **{k: f"{v:.8g}" for k, v in values.items()}})

    def __call__(self, step, **values):
        for name, log in list(self.logs.items()):
            try:
                log(step, values)
            except Exception as e:  # a full disk or a lost network is no reason to lose the run
                del self.logs[name]
                say(f"{name} takes no more ({summary(e)}); training goes on without it", sys.stderr)

    def close(self):
        for name, close in self.closes.items():
            try:
                close()
            except Exception as e:
                say(f"{name} did not close ({summary(e)})", sys.stderr)


def lock(out_dir):
    """A lock on out_dir that lasts as long as the returned file is open; UserError when another run holds it."""
    prepare.make_dir(out_dir)
    try:
        f = prepare.hold(os.path.join(out_dir, "lock"), f"another run is writing to {out_dir}; wait for it or choose another --out_dir")
    except OSError as e:
        raise UserError(f"out_dir {out_dir} cannot be written ({e.strerror}); choose another with --out_dir") from None
    for name in RUN:  # of a run that was killed while writing
        prepare.sweep(os.path.join(out_dir, name))
    return f


def check_new(tcfg):
    """Refuse to begin a run where there is one, unless that is to be overwritten."""
    there = [n for n in RUN if os.path.lexists(os.path.join(tcfg.out_dir, n))]
    if tcfg.init_from == "auto" and there == ["log.csv"]:  # of a run that was killed before it saved
        with contextlib.suppress(OSError, ValueError, csv.Error):
            there = [] if Log.read(os.path.join(tcfg.out_dir, "log.csv")) is not None else there
    if there and not tcfg.overwrite:
        resume = "go on with it by --init_from=resume, " * any(n.endswith(".pt") for n in there)
        raise UserError(f"{tcfg.out_dir} has a run ({', '.join(there)}); {resume}choose another "
                        f"--out_dir, or delete it by --overwrite")


def clear(out_dir):
    """Delete the run in out_dir."""
    for name in RUN:
        try:
            os.unlink(os.path.join(out_dir, name))
        except FileNotFoundError:
            pass
        except OSError as e:
            raise UserError(f"{os.path.join(out_dir, name)} cannot be deleted ({e.strerror}); "
                            f"choose another --out_dir") from None


def differences(saved, now, names=None):
    """What differs between two flat dicts, in all keys or those named, as `key: saved -> now`
    strings."""
    names = sorted(names or saved.keys() | now.keys())
    return [f"{k}: {saved.get(k)!r} -> {now.get(k)!r}" for k in names if saved.get(k) != now.get(k)]


def identity(train_data, val_data):
    """What a resumed run must find again: the dataset's contents and tokenizer."""
    return {"train.bin": train_data.sha[:16], "val.bin": val_data.sha[:16],
            "tokenizer": train_data.meta["tokenizer_sha256"][:16]}


class Flag:
    """The number of the first SIGINT, SIGTERM or SIGHUP, 0 before; asked once a step, and once a
    batch of a validation. A second signal ends the process at once; not under torchrun, which sends
    a SIGTERM of its own behind the Ctrl-C that every process has already seen."""

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
        if self.number and self.alone:
            os._exit(128 + number)
        if not self.number and os.environ.get("RANK", "0") == "0":
            more = b"; a second signal ends at once" * self.alone
            with contextlib.suppress(AttributeError, OSError, ValueError):  # no standard error
                os.write(sys.__stderr__.fileno(), b"stopping" + more + b"\n")
        self.number = self.number or number

    def restore(self):
        for s, h in self.before.items():
            signal.signal(s, h)


# ---------------------------------------------------------------------------------------------------------------------
# the loop


class Runner:
    """A model with its optimizers on a Place: what a step and a validation need, and nothing of files."""

    def __init__(self, mcfg, tcfg, place, say=print):
        self.mcfg, self.tcfg, self.place = mcfg, tcfg, place
        self.n_rows = tcfg.batch_size * tcfg.gradient_accumulation_steps
        self.my_rows = self.n_rows // place.world
        self.micro = min(tcfg.batch_size, self.my_rows)
        if self.n_rows % place.world or self.my_rows % self.micro:
            raise UserError(f"batch_size * gradient_accumulation_steps ({tcfg.batch_size} * "
                            f"{tcfg.gradient_accumulation_steps}) rows cannot be dealt evenly to {place.world} processes in "
                            f"whole micro-steps; choose multiples")
        self.peak = matmul_peak(place)  # before torch.compile, whose workers take the cores while they start
        with torch.device("meta"):
            size = 4 * 4 * GPT(mcfg, None).num_params()  # bytes of weights, gradients and two moments
        with contextlib.suppress(ValueError, AttributeError, OSError):  # not all systems tell
            room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if place.device.type == "cpu" and size > room:
                raise UserError(f"a model of {size / 16:,.0f} parameters takes "
                                f"{size / 2 ** 30:,.0f} GB to train, and this machine has "
                                f"{room / 2 ** 30:,.0f}; lower n_embd, n_layer or vocab_size")
        self.model = GPT(mcfg, tcfg.seed).to(place.device)
        self.model.dtype = place.dtype
        self.optimizers = make_optimizers(self.model, tcfg)
        self.compiled = can_compile(place, tcfg, say)
        self.teacher, self.replaced = None, {}
        self.inner = torch.compile(self.model, dynamic=False) if self.compiled else self.model
        self.forward = DDP(self.inner, forward_sync_buffers=False) if place.world > 1 else self.inner
        self.tokens = self.n_rows * mcfg.block_size  # of a step
        self.memory = self.model.init_memory(self.my_rows) if tcfg.stream else {}  # of this process's rows
        self.slice = slice(place.rank * self.my_rows, (place.rank + 1) * self.my_rows)

    def grow(self, weights, exactly):
        """Take the weights of a checkpoint, which need not have levels, or attention to their plans, unless `exactly`: those
        add nothing before they are trained. -> how many numbers were not in it; RuntimeError where it does not fit."""
        missing = {n for n in self.model.state_dict() if n not in weights} if not exactly else set()
        new = {n: p for n, p in self.model.named_parameters() if n in missing and
               (n.startswith(("levels.", "sure.")) or ".cross." in n or ".ln_x." in n)}
        self.model.load_state_dict({**{n: p.detach() for n, p in new.items()}, **weights})
        return sum(p.numel() for p in new.values())

    def mfu(self, seconds):
        """Share of the matmul peak that a step of so many seconds reaches; a teacher's forward is a third of a step."""
        flops = self.model.flops_per_token() + (self.teacher.flops_per_token() / 3 if self.teacher is not None else 0)
        return flops * self.tokens / seconds / self.peak / self.place.world

    def learn_from(self, saved, path):
        """Take a checkpoint as the teacher. Where it has an MLP and this model, as wide, something
        else, that is to give what the MLP gives: `replaced` is {the teacher's block: this model's},
        paired by their names, as weights are. -> those of the teacher's weights that fit this
        model."""
        try:
            teacher = GPT.of(saved["model_config"], saved["model"])
        except ValueError as e:
            raise UserError(f"teacher {path} does not fit this version ({summary(e)}); train it "
                            f"again") from None
        theirs, ours = teacher.cfg, self.mcfg
        if theirs.block_size < ours.block_size or theirs.history > ours.history:
            raise UserError(f"teacher {path} reads {theirs.block_size} tokens and {theirs.history} of history before them; give the "
                            f"student a block_size of at most {theirs.block_size} and a history of at least {theirs.history}")
        wide = theirs.n_embd == ours.n_embd
        self.replaced = {t.i: b.i for t, b in zip(teacher.blocks, self.model.blocks) if wide and
                         isinstance(t.mlp, MLP) and not isinstance(b.mlp, (MLP, type(None)))}
        teacher.dtype = self.place.dtype
        teacher.eval().requires_grad_(False).to(self.place.device)
        self.teacher = torch.compile(teacher, dynamic=False) if self.compiled else teacher
        mine = self.model.state_dict()
        return {n: p for n, p in saved["model"].items() if wide and n in mine and mine[n].shape == p.shape}

    def taught(self, x, h):
        """What the teacher, if there is one, says of inputs x (B, T) after histories h (B, H)."""
        if self.teacher is None:
            return None
        fed, H = {}, self.teacher.cfg.history
        with torch.no_grad():
            logits = self.teacher(x, history=h[:, h.size(1) - H:] if H else None, fed=fed).logits
        fed = {i: fed[t] for t, i in self.replaced.items()}
        return Taught(logits, fed, self.tcfg.distill, self.tcfg.distill_match, self.tcfg.distill_ce)

    def draw(self, step):
        """What the model draws for a whole step, on the device; None where it draws nothing."""
        step_draw = self.model.draw_step(self.tcfg.seed, step)
        return None if step_draw is None else step_draw.to(self.place.device)

    def reads(self, forward, memory, begins, *inputs, **more):
        """forward, with what its blocks M find in memory {block: Memory}, where there is one, which ends in rows that begin another text
        (begins, (rows,)); and then what they write."""
        for m in memory.values() if begins is not None else ():
            m.usage[begins] = 0
        out = forward(*inputs, **more, **({"memory": memory} if memory else {}))
        for i, m in memory.items():
            m.write(out.memory_writes[i])
        return out

    def step(self, step, x, y, h, n_scored, begins=None):
        """One optimizer step on this process's rows. -> (loss, gradient norm); where either is not finite, on any process,
        nothing was updated. n_scored: scored tokens of the step over all processes; begins (rows,): whose memory ends."""
        for o in self.optimizers:
            for g in o.param_groups:
                g["lr"] = g["peak_lr"] * lr_factor(step, self.tcfg)
        place, losses, step_draw = self.place, [], self.draw(step)
        denom = torch.tensor(n_scored / place.world, dtype=torch.float32, device=place.device)  # DDP takes the mean
        for m in range(0, self.my_rows, self.micro):
            torch.manual_seed(hash((self.tcfg.seed, step, m // self.micro, place.rank)))  # dropout
            mx, my, mh = (t[m:m + self.micro].to(place.device, non_blocking=True) for t in (x, y, h))
            last = m + self.micro == self.my_rows
            with contextlib.nullcontext() if place.world == 1 or last else self.forward.no_sync():
                mine = {i: t.select(slice(m, m + self.micro)) for i, t in self.memory.items()}
                out = self.reads(self.forward, mine, None if begins is None else begins[m:m + self.micro], mx, my,
                                 mh if self.mcfg.n_slot else None, denom=denom, step_draw=step_draw, taught=self.taught(mx, mh))
                out.loss.backward()
            losses.append(out.losses["ce"].detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.tcfg.grad_clip or float("inf"))
        loss, norm = torch.stack([torch.stack(losses).sum() / place.world, norm]).tolist()
        loss = place.sum(loss)[0]
        finite = math.isfinite(loss) and math.isfinite(norm)
        for o in self.optimizers:
            if finite:
                o.step()
            o.zero_grad(set_to_none=True)
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        return loss, norm

    def evaluate(self, data, alter=None, stop=lambda: 0, limit=0):
        """(nats a scored token, bits a byte) over a whole split, or its first `limit` tokens: plain cross-entropy, the same for
        every variant; None where stop(), asked once a batch, said so on any process. For ablations,
        alter(history) stands in for each history."""
        total, count, stopped, one = 0.0, 0, 0, torch.ones((), device=self.place.device)
        batches, memory = data.whole(self.place, self.micro, self.n_rows, limit), self.model.init_memory(self.micro) if data.stream else {}
        # a model that computes the same in training takes the graph that is compiled already: a cold start is 10 s shorter
        reuse = self.compiled and self.teacher is None and not self.model.random()
        step_draw = self.draw(0) if reuse else None
        self.model.train(reuse)
        with torch.set_grad_enabled(reuse):
            for x, y, h, begins in prepare.bar(batches, desc="validate") if self.place.rank == 0 else batches:
                if stopped := stop():
                    break
                x, y, h = (t.to(self.place.device) for t in (x, y, h))
                h = (alter(h) if alter else h) if self.mcfg.n_slot else None
                total += self.reads(self.inner, memory, begins, x, y, h, denom=one, step_draw=step_draw).losses["ce"].item()
                count += int((y >= 0).sum())
        self.model.train()
        total, count, stopped = self.place.sum(total, count, stopped)
        if stopped:
            return None
        if not count:
            raise UserError(f"none of the validation split's first {limit} tokens is scored; give "
                            f"more eval_tokens")
        return total / count, total / math.log(2) / data.bytes * (data.n - 1) / count

    @torch.no_grad()
    def usage(self, data, batches=8):
        """How featural memories are used over some batches of a split, the mean of their tables: {"slots_used": share of slots that some
        query found, "slot_entropy": entropy of the weights that slots are found with, as a share of log n_mem}; {} without memories."""
        used, hooks = {}, []

        def note(memory, args):
            slots, score = memory.find(args[0])
            table = used.setdefault(id(memory.values), args[0].new_zeros(self.mcfg.n_mem, dtype=torch.float32))  # a shared one is None
            table.index_add_(0, slots.flatten(), score.float().softmax(-1).flatten())

        for m in self.model.modules():
            if isinstance(m, FeaturalMemory):
                hooks.append(m.register_forward_pre_hook(note))
        if not hooks:
            return {}
        self.model.eval()
        try:
            for x, _, h, _ in itertools.islice(data.whole(self.place, self.micro, self.n_rows), batches):
                x, h = x.to(self.place.device), h.to(self.place.device)
                self.model(x, history=h if self.mcfg.n_slot else None)  # uncompiled: hooks would have it compiled anew
        finally:
            self.model.train()
            for hook in hooks:
                hook.remove()
        p = torch.stack(list(used.values()))
        share = p / p.sum(1, keepdim=True)
        return {"slots_used": (p > 0).float().mean().item(),
                "slot_entropy": torch.special.entr(share).sum(1).mean().item() / math.log(self.mcfg.n_mem)}


def find_teacher(tcfg, data):
    """The checkpoint of the teacher, None without one. Which one it is joins data: a resumed run must find the same again."""
    if not tcfg.teacher:
        return None
    path = prepare.checkpoint_path(tcfg.teacher)
    if not os.path.exists(path):
        folder = os.path.dirname(path) or "."
        preset = os.path.join("config", os.path.basename(os.path.abspath(folder)) + ".py")
        known = os.path.exists(os.path.join(os.path.dirname(os.path.abspath(__file__)), preset))
        more = preset if known else f"--out_dir={shlex.quote(folder)}"
        raise UserError(f"teacher {path} is not there; train it first (python train.py {more} "
                        f"--dataset={shlex.quote(tcfg.dataset)}), or name another checkpoint")
    saved = prepare.load_checkpoint(path)
    if saved["data"]["tokenizer"] != data["tokenizer"]:
        raise UserError(f"teacher {path} was trained with another tokenizer than that of dataset {tcfg.dataset!r}; train one on that")
    if saved["train_config"].get("stream"):
        raise UserError(f"teacher {path} was trained to remember what stood before its window "
                        f"(stream), and a teacher is not given that; train one without --stream")
    data["teacher"] = prepare.checkpoint_id(path)
    return saved


def resumes(init_from, out_dir):
    """Whether a start goes on with the run in out_dir."""
    path = os.path.join(out_dir, "ckpt.pt")
    there = any(os.path.exists(p) for p in (path, prepare.previous(path), prepare.best(path)))
    return init_from == "resume" or (init_from == "auto" and there)


def last_state(out_dir, say=lambda text: None):
    """(checkpoint, its path) that the run in out_dir goes on from: the last, or where that is
    damaged the one before, or else the best; raise UserError where there is none."""
    path, error = os.path.join(out_dir, "ckpt.pt"), None
    for p in (path, prepare.previous(path), prepare.best(path)):
        if p != path and not os.path.exists(p):
            continue
        try:
            saved = prepare.load_checkpoint(p)
        except UserError as e:
            error = error or e
            continue
        if error:
            say(f"{error}; going on from {p}")
        return saved, p
    raise error


# Settings that belong to a start and not to the run, and those that a run computes the same with.
OF_A_START = ("out_dir", "init_from", "overwrite", "eval_only")
UNTOLD = (*OF_A_START, "data_dir", "device", "compile", "tensorboard_log", "wandb_log",
          "wandb_project", "wandb_run_name")


def with_stored(m, t):
    """Settings {field: value} of the model and of training: those that were given now, m and t,
    over those of the run that they resume, if they do."""
    start = {k: t.get(k, getattr(TrainConfig, k)) for k in ("init_from", "out_dir")}
    if not resumes(**start):
        return m, t
    saved, path = last_state(start["out_dir"])
    both = []
    for cls, given, stored, leave in ((GPTConfig, m, "model_config", ("vocab_size", "n_layer")),
                                      (TrainConfig, t, "train_config", OF_A_START)):
        kinds = typing.get_type_hints(cls)
        try:
            old = {k: config.coerce(k, v, kinds[k]) for k, v in saved[stored].items()
                   if k in kinds and k not in leave}
        except UserError as e:
            raise UserError(f"checkpoint {path} is damaged: {e}; take another") from None
        both.append(config.over(old, given))
    return both


def other_tokenizer(path, theirs, ours, tcfg):
    """What to do about the dataset of tcfg, with tokenizer `ours`, to go on from a checkpoint with
    `theirs`, a sentence."""
    wrong, file = f"{path} has another tokenizer: ", os.path.join(tcfg.data_dir, tcfg.dataset, "")
    if theirs["kind"] != "char" or ours["kind"] != "char":
        again = f"--tokenizer={theirs.get('encoding', theirs['kind'])}"
        return wrong + f"make the dataset with {prepare.command(file, again, '--overwrite')}"
    lacks = sorted(set(theirs["chars"]) - set(ours["chars"]))
    unknown = sorted(set(ours["chars"]) - set(theirs["chars"]))
    todo = [f"add a line with {' '.join(map(repr, lacks))} to the text"] if lacks else []
    todo += [f"take {' '.join(map(repr, unknown))} out of it"] if unknown else []
    if theirs["eot"] != ours["eot"]:
        todo += ["give it as several documents (--input=A --input=B, or --separator)" if theirs["eot"]
                 else "give it as one document (one --input)"]
    return wrong + (f"the model needs a text of exactly its own characters; {', '.join(todo)}, and "
                    f"make it again with {prepare.command(file, '--overwrite')}")


def find_start(tcfg, mcfg, data, spec, say):
    """(checkpoint or None, its path, whether it is resumed) by init_from; raise UserError where
    what is found does not fit the run or its dataset, of which data has the hashes and spec the
    tokenizer. What a resumed run changes is said."""
    resume = resumes(tcfg.init_from, tcfg.out_dir)
    if not resume and tcfg.init_from in ("scratch", "auto"):
        return None, "", False
    if resume:
        saved, path = last_state(tcfg.out_dir, say)
    else:
        path = prepare.checkpoint_path(tcfg.init_from)
        if not os.path.exists(path):
            raise UserError(f"init_from is scratch, resume, auto, or the PATH of a checkpoint of "
                            f"train.py or of its folder, and {path} is not there; pretrained "
                            f"models are not read by name yet")
        saved = prepare.load_checkpoint(path)
    if not resume:
        if saved["data"]["tokenizer"] != data["tokenizer"]:
            raise UserError(other_tokenizer(path, saved["tokenizer"], spec, tcfg))
        return saved, path, False
    now, fixed = dataclasses.asdict(tcfg), ("optimizer", "stream")
    before = {f.name: saved["train_config"].get(f.name, f.default)
              for f in dataclasses.fields(tcfg)}
    model = {**{f.name: f.default for f in dataclasses.fields(mcfg)}, **saved["model_config"]}
    wrong = differences(model, settings(mcfg)) + differences(saved["data"], data)
    wrong += differences(before, now, fixed)
    if wrong:
        names = {w.partition(":")[0] for w in wrong}
        todo = "leave these settings out"
        if names & data.keys():
            todo = "make the dataset again as it was"
        if "teacher" in names:
            todo = "name the teacher that it learned from"
        raise UserError(f"{path} does not fit this run ({'; '.join(wrong)}); {todo}, or give "
                        f"another --out_dir to train another model")
    for line in differences(before, now, now.keys() - {*fixed, *UNTOLD}):
        say(f"going on with another {line}")
    if any(before[k] != now[k] for k in ("eval_tokens", "score_last")):
        saved["best_val_loss"] = float("inf")  # of other tokens
    return saved, path, True


def take_state(optimizer, saved, step):
    """Give an optimizer the state of one that took `step` steps, but the rates of the settings.
    Raise ValueError unless that has for each parameter what a step leaves, in its shape: the
    kernels trust it."""
    own, state, taken = optimizer.state_dict()["param_groups"], saved["state"], {}
    params = [p for g in optimizer.param_groups for p in g["params"]] if step else []
    names = {"momentum"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
    of = lambda groups: [g["params"] for g in groups]
    if of(saved["param_groups"]) != of(own) or len(state) != len(params):
        raise ValueError("its optimizers have other parameters")
    for i, p in enumerate(params):
        fits = lambda k: sound(state[i][k], () if k == "step" else p.shape, p.dtype)
        if state[i].keys() != names or not all(map(fits, names)):
            raise ValueError("its optimizers hold something else than these steps leave")
        taken[i] = {k: t.clone(memory_format=torch.contiguous_format) for k, t in state[i].items()}
    optimizer.load_state_dict({"state": taken, "param_groups": own})


def sound(t, shape, dtype):
    """Whether t is a tensor of that shape and type, all of finite numbers."""
    return torch.is_tensor(t) and t.shape == shape and t.dtype == dtype and bool(t.isfinite().all())


def take_memory(run, saved):
    """Give the memories of a Runner its rows of what a checkpoint has of all. -> False where there
    are more rows or fewer; raise ValueError where it does not fit."""
    parts = {i: (m.keys, m.values, m.usage) for i, m in run.memory.items()}
    rows = {len(t) for tensors in saved.values() for t in tensors}
    fits = lambda mine, t: sound(t, (*rows, *mine.shape[1:]), mine.dtype)
    if saved.keys() != parts.keys() or len(rows) != 1 or not all(
            len(saved[i]) == 3 and all(map(fits, parts[i], saved[i])) for i in parts):
        raise ValueError("its memories are of other sizes")
    if rows != {run.n_rows}:
        return False
    for i in parts:
        for mine, all_rows in zip(parts[i], saved[i]):
            mine.copy_(all_rows[run.slice])
    return True


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def train(mcfg, tcfg, say=print):
    """Train as the settings say. -> dict with val_loss, best_val_loss, step, step_seconds (the sum
    of the steps alone, without the first, which compiles), compile_seconds, params, path (of the
    checkpoint that sample.py takes, None if there is none), saved_val_loss (of that one, None if it
    was not scored), curve [(step, step_seconds, val_loss)], stopped (the number of the signal that
    did, or 0). `say` prints."""
    try:
        with contextlib.ExitStack() as held:
            return loop(mcfg, tcfg, say, held)
    except RuntimeError as e:
        if not type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise UserError(f"torch.compile failed ({summary(e)}); train with --compile=False, at "
                        f"about half the speed") from None


def loop(mcfg, tcfg, say, held):
    """train, with what is to be closed at its end put on the ExitStack `held`."""
    # what is asked for is possible, and nothing is written before that is known
    t_start = time.perf_counter()
    place, writes = find_place(tcfg), not tcfg.eval_only
    if place.rank:
        say = lambda *a, **k: None
    train_data = Data(tcfg, mcfg, "train")
    mcfg = config.build(GPTConfig, **{**settings(mcfg), **train_data.facts(mcfg)})
    val_data = Data(tcfg, mcfg, "val")
    limit = tcfg.eval_tokens if tcfg.eval_tokens < val_data.n - 1 else 0
    path, data = os.path.join(tcfg.out_dir, "ckpt.pt"), identity(train_data, val_data)
    teacher = find_teacher(tcfg, data)
    place.same(lambda: held.enter_context(lock(tcfg.out_dir)) if writes else None)
    saved, start, resumed = find_start(tcfg, mcfg, data, train_data.meta["tokenizer"], say)
    place.same(lambda: check_new(tcfg) if writes and not resumed else None)
    run = Runner(mcfg, tcfg, place, say)
    step, best, validated, step_seconds, block_loss, curve = 0, float("inf"), None, 0.0, [], []
    on_disk, last_val, best_val = None, None, None  # step and loss of the last, loss of the best
    if saved is not None:
        try:
            grown = run.grow(saved["model"], resumed)
        except (RuntimeError, ValueError) as e:
            wrong = own_settings(saved, mcfg) or summary(e)
            raise UserError(f"{start} is of another shape: {wrong}") from None
        if grown:
            say(f"{start} has none of {grown:,} new parameters, which add nothing at first")
    if teacher is not None:
        like = run.learn_from(teacher, tcfg.teacher)
        if saved is None:
            run.model.load_state_dict(like, strict=False)
        say(f"learning from {tcfg.teacher}" + (f", whose feed-forward layers {', '.join(map(str, run.replaced))} are replaced"
                                               if run.replaced else "") +
            (f"; {sum(p.numel() for p in like.values()):,} weights start as its own" if saved is None else ""))
    if resumed:
        try:
            for o, state in zip(run.optimizers, saved["optimizers"], strict=True):
                take_state(o, state, saved["step"])
            if run.memory and not take_memory(run, saved["memory"]):
                say(f"{start} has memories of other rows than these {run.n_rows}; they begin empty")
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as e:
            raise UserError(f"{start} cannot be gone on with ({summary(e)}); begin another run "
                            f"from its weights, with --init_from={shlex.quote(start)} and another "
                            f"--out_dir") from None
        step, best, step_seconds, block_loss = (saved[k] for k in (
            "step", "best_val_loss", "step_seconds", "block_loss"))
        if step < tcfg.max_iters:  # (the last validation is done again)
            validated = saved["validated"]
        if start == path:
            on_disk, last_val = step, saved["val_loss"]
    first_step, best_file = step, prepare.best(path)
    # the best may be later than the state that is gone on from
    if resumed and math.isfinite(best) and os.path.exists(best_file):
        with contextlib.suppress(UserError):
            kept = prepare.load_checkpoint(best_file)
            best, best_val = min(best, kept["best_val_loss"]), kept["val_loss"]
    del saved, teacher
    say(f"{mcfg.layers}, {mcfg.n_embd} wide, {mcfg.n_slot} slots: {run.model.num_params() / 1e6:.2f}M parameters on "
        f"{place.device} x {place.world}, {str(place.dtype)[6:]}, matmul peak {run.peak / 1e12:.2f} TFLOP/s; "
        f"{run.n_rows} x {mcfg.block_size} tokens a step" + (", compiling at the first" if run.compiled else ""))

    # the run begins
    flag, compile_seconds, stopped, block_t, block_n = Flag(), 0.0, 0, 0.0, 0
    held.callback(flag.restore)

    def begin():
        log = Log(tcfg)
        held.callback(log.close)
        if not resumed:
            clear(tcfg.out_dir)
        log.begin(step, step - 1 if validated is None else validated)
        return log

    log = place.same(lambda: begin() if writes else None) or (lambda *a, **k: None)

    def asked():
        """The number of a signal that any process got, 0 without."""
        return int(place.rows(torch.tensor([flag.number], device=place.device)).max())

    def write(state, is_best):
        if not os.path.exists(os.path.join(tcfg.out_dir, "lock")):  # somebody took the folder away
            held.enter_context(lock(tcfg.out_dir))
        prepare.save_checkpoint(path, state, demote=on_disk != step, is_best=is_best)

    def save(val=None, is_best=False):
        """Save this step, with its validation loss if that is known."""
        nonlocal on_disk, last_val, best_val
        memory = {i: [place.rows(t) for t in (m.keys, m.values, m.usage)]
                  for i, m in run.memory.items()}
        state = {"memory": memory, "model": run.model.state_dict(),
                 "optimizers": [o.state_dict() for o in run.optimizers], "step": step,
                 "val_loss": val, "best_val_loss": best, "validated": validated,
                 "step_seconds": step_seconds, "block_loss": block_loss,
                 "model_config": settings(mcfg), "train_config": dataclasses.asdict(tcfg),
                 "tokenizer": train_data.meta["tokenizer"], "data": data, "dataset": tcfg.dataset}
        place.same(lambda: write(state, is_best))
        on_disk, last_val, best_val = step, val, val if is_best else best_val

    def stop_for(what, bad=""):
        files = [p for p in (path, best_file, prepare.previous(path))
                 if os.path.exists(p) and p != bad]
        good = f"the last good checkpoint is {files[0]}" if files else \
            "there is no checkpoint of this run yet"
        raise UserError(f"step {step}: {what}; {good}; lower the learning rates or check the data")

    while True:
        done, stopped = step >= tcfg.max_iters or tcfg.eval_only, asked()
        due = done or (step > 0 and step % tcfg.eval_interval == 0 and step != validated)
        if due and not stopped:
            if writes and tcfg.always_save_checkpoint and on_disk != step:
                save()  # before what may take long
            chosen = scores = run.evaluate(val_data, limit=limit, stop=lambda: flag.number)
            if done and chosen and limit:  # (the best is chosen by the same tokens each time)
                scores = run.evaluate(val_data, stop=lambda: flag.number)
            if scores:
                val, bpb = scores
                if not math.isfinite(val):
                    stop_for(f"validation loss {val}", path if on_disk == step else "")
                curve.append((step, step_seconds, val))
                usage = run.usage(val_data)
                of = "" if done or not limit else f" on the first {limit:,} tokens"
                say(f"step {step}: val loss {val:.4f}, {bpb:.4f} bits per byte{of}" + (
                    f"; of its memories {usage['slots_used']:.0%} of slots used, entropy {usage['slot_entropy']:.2f}" if usage else ""))
                log(step, val_loss=val, bits_per_byte=bpb, step_seconds=step_seconds, **usage)
                validated, better, best = step, chosen[0] < best, min(best, chosen[0])
                if writes and (better or tcfg.always_save_checkpoint):
                    save(val, better)
            else:
                stopped = asked()
        if stopped:
            if writes and on_disk != step:
                save()
            where = f"step {step} is saved in {path}; go on with: {command(tcfg, place)}"
            say(f"stopped by a signal; {where if writes else 'nothing was written'}")
            break
        if done:
            break
        t0 = time.perf_counter()
        x, y, h = train_data.batch(step, run.slice, run.n_rows)
        begins = train_data.begins(step, run.slice, run.n_rows) if run.memory else None
        loss, norm = run.step(step, x, y, h, place.sum(int((y >= 0).sum()))[0], begins)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            stop_for(f"loss {loss}, gradient norm {norm}: training stopped before the update")
        dt = time.perf_counter() - t0
        step += 1
        block_loss.append(loss)
        if step == first_step + 1:
            compile_seconds = dt
            say(f"first step {dt:.1f} s" + (" with compiling" if run.compiled else ""))
        else:
            step_seconds, block_t, block_n = step_seconds + dt, block_t + dt, block_n + 1
        if step % tcfg.log_interval == 0:
            loss, each = sum(block_loss) / len(block_loss), block_t / block_n if block_n else dt
            say(f"step {step}/{tcfg.max_iters}: loss {loss:.4f}, {run.tokens / each:,.0f} "
                f"tokens/s, mfu {run.mfu(each):.0%}, {clock(time.perf_counter() - t_start)} "
                f"elapsed, {clock((tcfg.max_iters - step) * each)} to go")
            log(step, train_loss=loss, lr=run.optimizers[0].param_groups[0]["lr"],
                tokens_per_s=run.tokens / each,
                mfu=run.mfu(each), step_seconds=step_seconds)
            block_t, block_n, block_loss = 0.0, 0, []
    guess = math.log(mcfg.vocab_size)
    if curve and not stopped and curve[-1][2] >= guess:
        say(f"val loss {curve[-1][2]:.4f} is no better than guessing among {mcfg.vocab_size} "
            f"tokens ({guess:.4f}): lower --learning_rate"
            f"{' and --muon_lr' if tcfg.optimizer == 'muon' else ''}, or train longer (--max_iters)")
    has_best = on_disk is not None and os.path.exists(best_file)
    return {"val_loss": curve[-1][2] if curve else None, "best_val_loss": best, "step": step, "curve": curve,
            "step_seconds": step_seconds, "compile_seconds": compile_seconds, "params": run.model.num_params(),
            "seconds": time.perf_counter() - t_start, "stopped": stopped,
            "path": best_file if has_best else path if on_disk is not None else None,
            "saved_val_loss": (best if best_val is None else best_val) if has_best else last_val}


def own_settings(saved, mcfg):
    """Name the flags by which mcfg would have the shape of a checkpoint's model; "" where it
    has."""
    flags = []
    for k, v in saved["model_config"].items():
        if k not in ("n_layer", "vocab_size", "eot", "space",
                     "think_token") and v != settings(mcfg).get(k):
            value = ",".join(map(str, v)) if isinstance(v, tuple) else str(v)
            flags.append(f"--{k}={shlex.quote(value)}")
    return f"give its own settings, {' '.join(flags)}" if flags else ""


def command(tcfg, place):
    """The command that goes on with a run."""
    here = os.environ.get("LOCAL_WORLD_SIZE", place.world)
    start = "python" if place.world == 1 else f"torchrun --nproc_per_node={here}"
    return f"{start} train.py --init_from=resume --out_dir={shlex.quote(tcfg.out_dir)}"


def main(argv):
    m, t, _ = config.parse(argv, GPTConfig, TrainConfig, doc=__doc__)
    m, t = with_stored(m, t)
    mcfg, tcfg = config.build(GPTConfig, **m), config.build(TrainConfig, **t)
    named = {a.lstrip("-").partition("=")[0].replace("-", "_") for a in argv if a.startswith("-")}
    for name, needs in (*mcfg.idle(), *tcfg.idle(mcfg)):
        if name in named:  # (a preset may be used with other layers)
            raise UserError(f"{name} has nothing to work on; it needs {needs}")
    try:
        r = train(mcfg, tcfg, say)
    finally:
        grouped = dist.is_initialized()
        rank = dist.get_rank() if grouped else 0
        if grouped:
            dist.destroy_process_group()
    if rank == 0 and not r["stopped"]:
        say(f"done: val loss {r['val_loss']:.4f} after {r['step']} steps in {clock(r['seconds'])} "
            f"({r['step_seconds']:.0f} s of steps, {r['compile_seconds']:.0f} s for the first)")
        if r["path"] and not tcfg.eval_only:
            scored = "" if r["saved_val_loss"] is None else f" (val loss {r['saved_val_loss']:.4f})"
            say(f"checkpoint: {r['path']}{scored}\n"
                f"sample from it: python sample.py --out_dir={shlex.quote(tcfg.out_dir)}")
    code = 128 + r["stopped"] if r["stopped"] else 0
    if grouped:  # DDP leaves gloo's threads alive (torch 2.13), and one that drops its last tensor while Python ends aborts
        os._exit(code)  # the process: 1 run in 10 with 8 ranks on 2 cores. All is saved and said
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
