"""Measures: speed, and the claims of the README.

    python bench.py                   every preset: parameters, ms a step, tokens/s, memory, MFU, decoding, beside nanoGPT
    python bench.py CLAIM             rerun one claim of the README and print its table:
                                      CLAIMS
    python bench.py render            write docs/RESULTS.md, docs/LOG.md and README's table from docs/results/*.json
    python bench.py --profile         where the time of a step goes, by operator

Speeds are medians of A B A B turns within one run, each training arm in a process of its own. Losses are cross-entropy on
the whole validation split, nats a token.
"""
import atexit
import contextlib
import dataclasses
import glob
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import mean, median

import config  # before torch: it sets the allocator's switches
import numpy as np
import torch

import prepare
import sample
import train
from config import UserError
from model import Clusters, FeaturalMemory, GPT, GPTConfig, Level, Linear, rms_norm, search
from train import TrainConfig

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class BenchConfig:
    json: bool = False  # print the table as JSON lines
    profile: bool = False  # torch profiler over a training step of softar_shakespeare, or of --presets
    presets: tuple[str, ...] = ()  # only these presets; repeatable
    rounds: int = 5  # turns of A B A B
    seeds: int = 3  # seeds of a claim that trains
    jobs: int = 2  # trainings at once where only their losses count, sharing the cores; seconds are measured alone
    dataset: str = "shakespeare"  # dataset of a claim that trains
    data_dir: str = "data"  # where datasets are kept
    figure: str = ""  # concepts: draw the samples of the fork task into this SVG file
    out_dir: str = ""  # keep the runs of a claim here; default: a temporary folder

    def __post_init__(self):
        config.within(self, 1, 10_000, "rounds", "seeds", "jobs")


# ---------------------------------------------------------------------------------------------------------------------
# arms: a process each, so that memory, allocator and compiler caches do not mix


def read_arm(preset=None, **overrides):
    """({model settings}, {training settings}) of a preset's name with overrides."""
    argv = [os.path.join(HERE, "config", preset + ".py")] if preset else []
    m, t, _ = config.parse(argv, GPTConfig, TrainConfig)
    model_fields = {f.name for f in dataclasses.fields(GPTConfig)}
    more = {k: v for k, v in overrides.items() if k in model_fields}
    if "layers" in more:  # (arms may share a shape that has n_layer)
        more.pop("n_layer", None)
    return config.over(m, more), {**t, **{k: v for k, v in overrides.items() if k not in model_fields}}


def stand_in(m):
    """GPTConfig of model settings without a dataset: Shakespeare's 65 characters, one of them for thinking, and as many that
    end a word that random text has words as long."""
    return GPTConfig(**{"vocab_size": 65, "think_token": 0, "space": tuple(range(12)), **m})


def like_nanogpt(m, t):
    """nanoGPT's settings at the shape of another arm, without dropout."""
    shape = {k: getattr(GPTConfig(**m), k) for k in ("n_layer", "n_head", "n_embd", "block_size")}
    rows = {k: t[k] for k in ("batch_size", "gradient_accumulation_steps") if k in t}
    return read_arm("nanogpt", **{"batch_size": TrainConfig.batch_size, **shape, **rows, "dropout": 0.0})


class Arm:
    """A child process that holds one Runner and does what it is told: {"do": ...} a line in, a result a line out."""

    def __init__(self, m, t, env=None, **first):
        self.p = subprocess.Popen([sys.executable, os.path.abspath(__file__), "_arm"], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
        self.info = self.ask(m=m, t=t, **first)  # of a training arm, its result

    def ask(self, **what):
        with contextlib.suppress(BrokenPipeError):  # what it said before it ended comes below
            self.p.stdin.write(json.dumps(what) + "\n")
            self.p.stdin.flush()
        while line := self.p.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
            print(line, end="", file=sys.stderr)
        self.p.wait()
        raise UserError(f"an arm of the benchmark ended early (exit code {self.p.returncode}); what it said is above")

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.p.stdin.close()
        self.p.wait()


def serve():
    """The child of Arm. The first line gives the settings, each further one says what to do; answers are JSON lines."""
    first = json.loads(sys.stdin.readline())
    m, t = ({k: tuple(v) if isinstance(v, list) else v for k, v in d.items()} for d in (first["m"], first["t"]))
    if first.get("train"):
        with altered_plans(ALTERED[first["leak"]]) if first.get("leak") else contextlib.nullcontext():
            r = train.train(GPTConfig(**m), TrainConfig(**t), say=lambda s: print(s, flush=True))
        r.update(peak_mb=peak_mb(), **after(t, first["after"]))
        print(json.dumps(r), flush=True)
        return
    mcfg, tcfg = stand_in(m), TrainConfig(**t)
    torch._inductor.config.cpp.enable_kernel_profile = bool(first.get("profiled"))  # the compiler's kernels by name
    run = train.Runner(mcfg, tcfg, train.find_place(tcfg))
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(mcfg.vocab_size, (2, run.n_rows, mcfg.block_size), generator=g)
    h = torch.randint(mcfg.vocab_size, (run.n_rows, mcfg.history), generator=g)
    if tcfg.score_last:
        y[:, :-tcfg.score_last] = -1
    n_scored = int((y >= 0).sum())
    tcfg.max_iters = 10 ** 9  # constant learning rate

    def step():
        t0 = time.perf_counter()
        run.step(0, x, y, h, n_scored)
        return time.perf_counter() - t0

    compile_seconds = step()
    print(json.dumps({"params": run.model.num_params(), "compile": compile_seconds, "tokens": run.tokens,
                      "compiled": run.compiled}), flush=True)
    for line in sys.stdin:
        what = json.loads(line)
        if what["do"] == "steps":
            out = {"seconds": median(step() for _ in range(what["n"]))}
        elif what["do"] == "end":
            out = {"peak_mb": peak_mb(), "mfu": run.mfu(what["seconds"])}
        elif what["do"] == "profile":
            out = profile(step)
        print(json.dumps(out), flush=True)


def shuffle_history(h):
    """Each row's history in another order (the same at every call)."""
    order = torch.rand(h.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    return h.gather(1, order)


def ablated(alter):
    """Validation loss with each history altered by alter(history)."""
    return lambda run, data: run.evaluate(data, alter)[0]


@contextlib.contextmanager
def altered_plans(alter):
    """What levels tell the stack below, (B, M + 1, ..) by how many chunks are closed, altered by alter(told)."""
    step = Level.step

    def altered(self, x, ctx, *rest):
        step(self, x, ctx, *rest)
        if ctx.told is not None:
            ctx.told = alter(ctx.told)
        if ctx.plan.concepts is not None:
            ctx.plan.concepts = alter(ctx.plan.concepts)

    Level.step = altered
    try:
        yield
    finally:
        Level.step = step


ALTERED = {"shuffled": lambda told: told.roll(1, 0), "zeroed": torch.zeros_like,
           "one ahead": lambda told: torch.cat((told[:, 1:], told[:, -1:]), 1)}  # a leak: the state that has read this chunk


def without_plan(alter):
    """Validation loss with what levels tell altered."""
    def measure(run, data):
        with altered_plans(ALTERED[alter]):
            return run.evaluate(data)[0]
    return measure


@torch.inference_mode()
def explained(run, data):
    """How much of the next concept the fastest level predicts: R^2 over the mean of all concepts, and over copying the last
    one. (cos regresses a direction: all its predictions take the one length that fits best.)"""
    pairs = []
    for x, y, h, _ in data.whole(run.place, 64):
        made = run.model.eval().concepts(x, h if run.mcfg.n_slot else None)[-1]
        good, c = made.exists[:, 1:] & (y >= 0).any(1, keepdim=True), made.concepts  # not the rows that only pad a batch
        pairs.append((made.level.head(made.u)[:, 1:-1, 0][good], c[:, 1:][good].float(), c[:, :-1][good].float()))
    p, c, last = (torch.cat(t) for t in zip(*pairs))
    if run.mcfg.concept == "cos":
        p = torch.nn.functional.normalize(p, dim=-1)
        p = p * (p * c).sum() / (p * p).sum()
    left = [(v - c).square().sum().item() for v in (p, c.mean(0), last)]
    return {"R2 over the mean": 1 - left[0] / left[1], "R2 over copying": 1 - left[0] / left[2]}


@torch.inference_mode()
def wrong_distance(run, data):
    """Mean of 1 - cosine between the embeddings of the most likely and of the right token, where they differ, as a share of
    what it is between two tokens drawn from the text: every model has a table of its own."""
    e, far = torch.nn.functional.normalize(run.model.wte.weight, dim=-1), []
    often = torch.from_numpy(np.bincount(data.tokens, minlength=len(e)) / data.n).float()
    mean_e = often @ e  # two different tokens: take the share that are the same out
    chance = (1 - mean_e @ mean_e) / (1 - often @ often)
    for x, y, h, _ in data.whole(run.place, 64):
        best = run.model.eval()(x, history=h if run.mcfg.n_slot else None).logits.argmax(-1)
        wrong = (y >= 0) & (best != y)
        far.append(1 - (e[best[wrong]] * e[y[wrong]]).sum(-1))
    return (torch.cat(far).mean() / chance).item()


@torch.inference_mode()
def two_steps(run, data, n=2048, rows=16):
    """Nats of the token after next, given what stands before the next: after one soft step in its place, after one sampled
    token, and by the exact sum over the vocabulary; over n places of the split."""
    model, V, T = run.model.eval(), run.mcfg.vocab_size, run.mcfg.block_size
    g, total = torch.Generator().manual_seed(0), torch.zeros(3)
    last = torch.randint(T, data.n, (n,), generator=g).numpy()
    for i in range(0, n, rows):
        x, y, _ = data.rows(last[i:i + rows], last[i:i + rows])
        state, B = model.init_state(rows), len(x)
        p = model(x[:, :-1], state=state).logits[:, -1].float().softmax(-1)
        after = lambda tokens, s: model(tokens, state=s).logits[:, -1].float().log_softmax(-1)
        right = y[:, -1:]
        soft = after(p[:, None], state.select(torch.arange(B))).gather(1, right)
        drawn = after(torch.multinomial(p, 1, generator=g), state.select(torch.arange(B))).gather(1, right)
        every = after(torch.arange(V).repeat(B)[:, None], state.select(torch.arange(B).repeat_interleave(V)))
        exact = (p.log() + every.view(B, V, V).gather(2, right[:, None].expand(B, V, 1))[..., 0]).logsumexp(-1)
        total -= torch.stack([soft.sum(), drawn.sum(), exact.sum()])
    return dict(zip(("soft step", "sampled step", "exact sum"), (total / n).tolist()))


@torch.inference_mode()
def by_hops(run, data):
    """Share of right answers of the chain task, by how many pointers are to be followed."""
    chars, right = data.meta["tokenizer"]["chars"], {}
    for x, y, _, _ in data.whole(run.place, 256):
        best = run.model.eval()(x).logits.argmax(-1)
        for row, target, guess in zip(x.tolist(), y[:, -1].tolist(), best[:, -1].tolist()):
            if target >= 0:
                k = next(chars[i] for i in reversed(row) if i < len(chars) and chars[i] in "01234")
                right.setdefault(f"k = {k}", []).append(guess == target)
    return {k: mean(v) for k, v in sorted(right.items())}


@torch.inference_mode()
def by_length(run, data, size=64):
    """Share of right answer symbols of a formal task, a document a row, by the length of its string: means over lengths."""
    (start, end), each = data.docs, {}
    for i in range(0, len(start), size):
        x, y, _ = data.rows(start[i:i + size] + 1, end[i:i + size])
        asked = (y >= 0).sum(1)
        right = ((run.model.eval()(x).logits.argmax(-1) == y) & (y >= 0)).sum(1) / asked
        for n, r in zip((end - start)[i:i + size] - asked.numpy(), right.tolist()):
            each.setdefault(int(n), []).append(r)
    each = {n: mean(r) for n, r in each.items()}
    return {f"{low} to {high}": mean(r for n, r in each.items() if low <= n <= high)
            for low, high in ((41, 500), (41, 100), (401, 500)) if any(low <= n <= high for n in each)}


AFTER = {"history shuffled": ablated(shuffle_history), "slots empty": ablated(lambda h: torch.full_like(h, -1)),
         "wrong distance": wrong_distance, "two steps": two_steps, "hops": by_hops, "lengths": by_length,
         "usage": lambda run, data: run.usage(data), "concepts": explained, "plan shuffled": without_plan("shuffled"), "plan zeroed": without_plan("zeroed")}


def after(t, names):
    """{measure: value} of the checkpoint that was just trained, over the validation split, in fp32."""
    if not names:
        return {}
    tcfg = TrainConfig(**{**t, "compile": False, "dtype": "float32"})
    ckpt = prepare.load_checkpoint(os.path.join(tcfg.out_dir, "ckpt.pt"))
    mcfg = GPTConfig(**ckpt["model_config"])
    run = train.Runner(mcfg, tcfg, train.find_place(tcfg))
    run.model.load_state_dict(ckpt["model"])
    data = train.Data(tcfg, mcfg, "val")
    return {name: AFTER[name](run, data) for name in names}


def peak_mb():
    """Peak memory so far: of the GPU where there is one, otherwise of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def turns(arms, rounds, ask, least=1.0):
    """Each arm asked in turn, `rounds` times: {name: [seconds per round]}. An arm does as many steps as fit `least` seconds."""
    n, out = {}, {k: [] for k in arms}
    for k, a in arms.items():
        n[k] = max(1, int(least / ask(a, 1)))
    for _ in range(rounds):
        for k, a in arms.items():
            out[k].append(ask(a, n[k]))
    return out


def seconds(f, n=1):
    """Of one call of f(), mean of n."""
    t0 = time.perf_counter()
    for _ in range(n):
        f()
    return (time.perf_counter() - t0) / n


def compare(a, b):
    """Median over rounds of a / b."""
    return median(x / y for x, y in zip(a, b))


def show(cfg, title, rows):
    """Print rows (dicts) as a table, or as JSON lines."""
    if cfg.json:
        for r in rows:
            print(json.dumps({"table": title, **r}))
        return rows
    names = list(dict.fromkeys(k for r in rows for k in r))
    text = [[f"{r[k]:,.4g}" if isinstance(r.get(k), float) and abs(r[k]) < 1000 else f"{r[k]:,.0f}"
             if isinstance(r.get(k), float) else str(r.get(k, "")) for k in names] for r in rows]
    width = [max(map(len, col)) for col in zip(names, *text)]
    print(f"\n{title}")
    for line in [names, ["-" * w for w in width], *text]:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, width))).rstrip())
    sys.stdout.flush()
    return rows


def fit(cfg, preset=None, seed=1, after=(), env=None, leak="", **overrides):
    """Train one arm in a process of its own; -> what train.train returns, `wall` seconds of the whole process, and the
    measures of AFTER that are named."""
    m, t = read_arm(preset, **overrides)
    t = {"dataset": cfg.dataset, **t, "data_dir": cfg.data_dir, "seed": seed}
    keep = cfg.out_dir or scratch()
    t["out_dir"] = os.path.join(keep, overrides.get("out_dir") or f"{preset or 'arm'}-{os.getpid()}-{time.time_ns()}")
    start = time.perf_counter()
    arm = Arm(m, t, env, train=True, after=list(after), leak=leak)
    arm.close()
    if arm.info["stopped"]:
        raise UserError("a training was stopped by a signal; so is the claim")
    return {**arm.info, "wall": time.perf_counter() - start, "out_dir": t["out_dir"]}


def have(cfg, task, name="", *more):
    """Make the dataset of a synthetic task where it is not there yet."""
    if not os.path.exists(os.path.join(cfg.data_dir, name or task, "meta.json")):
        prepare.main([task, f"--name={name}", f"--data_dir={cfg.data_dir}", *more])


def cold():
    """The environment of a process whose compiler cache is empty."""
    return {"TORCHINDUCTOR_CACHE_DIR": scratch()}


def scratch():
    """A new folder that goes when this process ends."""
    folder = tempfile.mkdtemp(prefix="bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def one_of_many(cfg):
    """The environment of a process that runs beside others: its share of the cores."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // cfg.jobs))}


def over_seeds(cfg, arms):
    """fit for each of {name: overrides} and each seed, cfg.jobs of them at once -> {name: {figure: mean over seeds}}, with
    "spread", the largest minus the smallest validation loss, and "runs". Seconds mean nothing here: see step_times."""
    env = one_of_many(cfg)
    pool = ThreadPoolExecutor(cfg.jobs)
    try:
        runs = {k: [pool.submit(fit, cfg, seed=s, env=env, **a) for s in range(1, cfg.seeds + 1)] for k, a in arms.items()}
        runs = {k: [f.result() for f in fs] for k, fs in runs.items()}
    finally:
        pool.shutdown(cancel_futures=True)
    out = {}
    for k, rs in runs.items():
        val = [r["val_loss"] for r in rs]
        out[k] = {**averages(rs), "spread": max(val) - min(val), "runs": rs}
    return out


def averages(dicts):
    """The mean of every number, dicts of numbers included."""
    first = dicts[0]
    return {k: averages([d[k] for d in dicts]) if isinstance(v, dict) else mean(d[k] for d in dicts) for k, v in first.items()
            if isinstance(v, (int, float, dict)) and not isinstance(v, bool)}


def step_times(cfg, arms, seconds=1.0, env=None):
    """{name: [seconds a step per round]} of arms given as (model settings, training settings), in turns. With env =
    one_of_many, on a core each as over_seeds trains them, so that an arm is compiled once for both."""
    live = {k: Arm(*a, env) for k, a in arms.items()}
    times = turns(live, cfg.rounds, lambda a, n: a.ask(do="steps", n=n)["seconds"], seconds)
    for a in live.values():
        a.close()
    return times


# ---------------------------------------------------------------------------------------------------------------------
# speed


def train_speed(m, t, rounds):
    """One arm in turn with nanoGPT at its shape -> row."""
    arms = {"ours": Arm(m, t), "nanogpt": Arm(*like_nanogpt(m, t))}
    times = turns(arms, rounds, lambda a, n: a.ask(do="steps", n=n)["seconds"])
    ends = {k: a.ask(do="end", seconds=median(times[k])) for k, a in arms.items()}
    for a in arms.values():
        a.close()
    ours = arms["ours"].info
    return {"params M": ours["params"] / 1e6, "ms a step": 1000 * median(times["ours"]),
            "tokens/s": ours["tokens"] / median(times["ours"]), "MFU": ends["ours"]["mfu"], "peak MB": ends["ours"]["peak_mb"],
            "compile s": ours["compile"], "nanoGPT ms": 1000 * median(times["nanogpt"]),
            "nanoGPT MB": ends["nanogpt"]["peak_mb"], "nanoGPT / ours": compare(times["nanogpt"], times["ours"])}


def decode_arms(m, more=False):
    """{name: function(n) -> seconds a token} for one shape with random weights, one row, positions half way into the window:
    with the cache and recomputing the window, in fp32; with `more` also the compiled step in fp32, bf16 and with 8-bit weights, and
    a KV-cached transformers GPT-2 of the same shape, where that package is installed."""
    cfg = stand_in(m)
    half = np.random.default_rng(0).integers(0, cfg.vocab_size, cfg.block_size // 2).tolist()
    room = cfg.block_size - len(half) - 1
    window = torch.randint(cfg.vocab_size, (1, cfg.block_size))

    def ours(dtype=torch.float32, compile=False, int8=False):
        model = GPT(cfg).eval().to(dtype)
        model.dtype = dtype
        model = sample.to_int8(model) if int8 else model
        d = sample.Decoder(model, [half], compile=compile)

        def run(n):
            d.rows = [([], list(half))]
            d.fill()
            return seconds(lambda: d.push([1]), min(n, room))
        return run

    model = GPT(cfg).eval()
    arms = {"cache": ours(), "recomputing": lambda n: seconds(torch.inference_mode()(lambda: model(window)), n)}
    if more:
        arms.update({"cache, compiled": ours(compile=True), "cache, compiled, bf16": ours(torch.bfloat16, True),
                     "cache, compiled, int8": ours(torch.bfloat16, True, True)})
    if more and importlib.util.find_spec("transformers"):
        from transformers import GPT2Config, GPT2LMHeadModel
        other = GPT2LMHeadModel(GPT2Config(vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd,
                                           n_layer=cfg.n_layer, n_head=cfg.heads(0)[0], bos_token_id=0, eos_token_id=0)).eval()

        @torch.inference_mode()
        def theirs(n):
            box = [other(window[:, :len(half)], use_cache=True).past_key_values]

            def push():
                box[0] = other(window[:, :1], past_key_values=box[0], use_cache=True).past_key_values
            return seconds(push, min(n, room))
        arms["transformers GPT-2"] = theirs
    return arms


def decode_times(m, rounds, more=False):
    arms = decode_arms(m, more)
    for f in arms.values():
        f(1)  # compile
    return turns(arms, rounds, lambda f, n: f(n), 0.5)


def all_presets(cfg):
    """The table of python bench.py."""
    names = cfg.presets or sorted(os.path.basename(p)[:-3] for p in glob.glob(os.path.join(HERE, "config", "*.py"))
                                  if not p.endswith("__init__.py"))
    rows = []
    for name in names:
        m, t = read_arm(name)
        print(f"measuring {name} ...", file=sys.stderr)
        row = {"preset": name, **train_speed(m, t, cfg.rounds)}
        d = decode_times(m, cfg.rounds)
        rows.append({**row, "decode/s": 1 / median(d["cache"]), "uncached/s": 1 / median(d["recomputing"])})
    return show(cfg, "every preset beside nanoGPT's settings at the same shape and batch (no dropout there)", rows)


SIZES = {"6 layers, 384 wide, 16 x 256": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=16),
         "4 layers, 128 wide, 12 x 64": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12)}


def speed(cfg):
    """a training step beside nanoGPT's (eager, fp32) at two sizes, no dropout in either"""
    rows = []
    for size, shape in SIZES.items():
        for name, more in (("Muon", {}), ("Muon, 3 iterations", {"ns_steps": 3}), ("AdamW", {"optimizer": "adamw"})):
            rows.append({"size": size, "optimizer": name, **train_speed(*read_arm(**shape, **more), cfg.rounds)})
    return show(cfg, "training, beside nanoGPT with AdamW, eager, fp32", rows)


def bandwidth(n=5):
    """Bytes a second that this machine reads from memory: the best sum over half a gigabyte."""
    x, best = torch.ones(2 ** 27), float("inf")
    for _ in range(n):
        t0 = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - t0)
    return 4 * x.numel() / best


def decode(cfg):
    """tokens/s of decoding beside the memory's limit: cached, compiled, bf16, int8, recomputing, transformers' GPT-2 (pip install it)"""
    rows = []
    for size, shape in {"6 layers, 384 wide": SIZES["6 layers, 384 wide, 16 x 256"],
                        "12 layers, 768 wide": dict(n_layer=12, n_head=12, n_embd=768, block_size=256)}.items():
        m, _ = read_arm(**shape)
        model = GPT(stand_in(m))
        inside, head = sum(p.numel() for p in model.blocks.parameters()), model.lm_head.weight.numel()
        before = bandwidth()
        times = decode_times(m, cfg.rounds, more=True)
        speed = max(before, bandwidth())
        for k, v in times.items():
            each = (1, 2) if "int8" in k else (2, 2) if "bf16" in k else (4, 4)  # bytes a weight
            limit = speed / (each[0] * inside + each[1] * head)
            rows.append({"size": size, "decoding": k, "tokens/s": 1 / median(v), "/ recomputing": compare(times["recomputing"], v),
                         **({"/ transformers": compare(times["transformers GPT-2"], v)} if "transformers GPT-2" in times else {}),
                         **({"GB/s": speed / 1e9, "limit": limit, "of it": 1 / median(v) / limit} if "cache" in k else {})})
    return show(cfg, "decoding, window 256, one row (fp32 where not said; limit: measured memory bandwidth over the bytes of the weights)", rows)


def profile(step):
    """One step under the torch profiler -> {"rows": time by operator, the compiler's own kernels by name, "parts": seconds
    by what they are for}. Attention is the batched products and the kernels with a softmax; inside an optimizer's step
    everything is the optimizer's."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        step()
    events = sorted(p.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    parts = dict.fromkeys(("attention", "matrix products", "elementwise", "optimizer", "rest"), 0.0)
    for e in p.events():
        up, name = e, e.name
        while up is not None and not up.name.startswith("Optimizer.step"):
            up = up.cpu_parent
        kind = "optimizer" if up is not None else "attention" if "bmm" in name or "softmax" in name else \
            "matrix products" if name in ("aten::mm", "aten::addmm") else "elementwise" if "cpp_fused" in name else "rest"
        parts[kind] += e.self_cpu_time_total / 1e6
    return {"rows": [{"operator": e.key[:70], "ms": e.self_cpu_time_total / 1000, "share": e.self_cpu_time_total / total,
                      "calls": e.count} for e in events[:15]], "parts": parts}


def profile_presets(cfg):
    for name in cfg.presets or ["softar_shakespeare"]:
        arm = Arm(*read_arm(name), profiled=True)
        arm.ask(do="steps", n=2)
        show(cfg, f"one step of {name}", arm.ask(do="profile")["rows"])
        arm.close()


def parts(cfg):
    """where a training step's time goes at three sizes: attention, matrix products, elementwise, optimizer, data"""
    rows = []
    for size, shape in {**SIZES, "6 layers, 256 wide, 16 x 256": dict(n_layer=6, n_head=4, n_embd=256, block_size=256,
                                                                      batch_size=16)}.items():
        m, t = read_arm(**shape)
        arm = Arm(m, t, profiled=True)
        seconds = arm.ask(do="steps", n=10)["seconds"]
        profiles = [arm.ask(do="profile")["parts"] for _ in range(cfg.rounds)]
        mfu = arm.ask(do="end", seconds=seconds)["mfu"]
        arm.close()
        data = train.Data(TrainConfig(**t, dataset=cfg.dataset, data_dir=cfg.data_dir), GPTConfig(**m), "train")
        t0 = time.perf_counter()
        for i in range(20):
            data.batch(i, slice(None), t["batch_size"])
        row = {k: median(p[k] for p in profiles) for k in profiles[0]}
        row["data"] = (time.perf_counter() - t0) / 20
        rows.append({"size": size, "ms a step": 1000 * seconds, **{k: f"{v / sum(row.values()):.1%}" for k, v in row.items()},
                     "share of matmul peak": mfu})
    return show(cfg, "where a step's time goes (torch profiler; medians)", rows)


# ---------------------------------------------------------------------------------------------------------------------
# claims that train


def best(cfg):
    """the lowest loss within 15 minutes: config/shakespeare_best.py"""
    rows = []
    for seed in range(1, cfg.seeds + 1):
        r = fit(cfg, "shakespeare_best", seed=seed)
        rows.append({"seed": seed, "val loss": r["val_loss"], "best on the way": r["best_val_loss"], "steps": r["step"],
                     "seconds of steps": r["step_seconds"], "process, seconds": r["wall"]})
    return show(cfg, f"config/shakespeare_best.py on {cfg.dataset}", rows)


NO_SLOTS = dict(history=0, aggregate=0, n_segment=0, n_span=0, span=0)


def main_job(cfg):
    """the main job, and the same model with its slots off for the same seconds of steps"""
    on = fit(cfg, "softar_shakespeare")
    m, t = read_arm("softar_shakespeare")
    times = step_times(cfg, {"on": (m, t), "off": read_arm("softar_shakespeare", **NO_SLOTS)}, seconds=4.0)
    steps = round(t["max_iters"] * compare(times["on"], times["off"]))
    off = fit(cfg, "softar_shakespeare", **NO_SLOTS, max_iters=steps)
    rows = [{"arm": k, "steps": r["step"], "seconds of steps": r["step_seconds"], "seconds in all": r["wall"],
             "val loss": r["val_loss"]} for k, r in (("slots", on), ("no slots, steps timed for equal seconds", off))]
    return show(cfg, f"main job on {cfg.dataset}, seed 1", rows)


def time_to_loss(cfg):
    """seconds to val 1.88: config/shakespeare_cpu.py beside nanoGPT's CPU recipe, in turns, compiler caches empty"""
    rows = []
    for seed in range(1, cfg.seeds + 1):
        for preset in ("shakespeare_cpu", "nanogpt_cpu"):
            r = fit(cfg, preset, seed=seed, env=cold(), eval_interval=10 ** 9, log_interval=200)
            rows.append({"preset": preset, "seed": seed, "val loss": r["val_loss"], "steps": r["step"], "seconds of steps":
                         r["step_seconds"], "first step": r["compile_seconds"], "process, seconds": r["wall"]})
    for k in ("seconds of steps", "process, seconds"):
        a, b = (median(r[k] for r in rows if r["preset"] == p) for p in ("nanogpt_cpu", "shakespeare_cpu"))
        rows.append({"preset": f"nanogpt_cpu / shakespeare_cpu: {k}", k: a / b})
    return show(cfg, f"time to val 1.88 on {cfg.dataset}", rows)


def a100(cfg):
    """val 1.4697 (nanoGPT's A100 recipe) with config/shakespeare.py, in how many of that recipe's steps"""
    times = step_times(dataclasses.replace(cfg, rounds=2), {"ours": read_arm("shakespeare"), "nanogpt": read_arm("nanogpt")})
    rows = []
    for seed in range(1, cfg.seeds + 1):
        r = fit(cfg, "shakespeare", seed=seed)
        rows.append({"seed": seed, "val loss": r["val_loss"], "steps": r["step"], "seconds of steps": r["step_seconds"],
                     "as nanoGPT steps": r["step"] * median(times["ours"]) / median(times["nanogpt"]),
                     "a nanoGPT step, s": median(times["nanogpt"])})
    return show(cfg, f"config/shakespeare.py on {cfg.dataset} (the bar: 1.4697 in 18 steps of config/nanogpt.py)", rows)


SLOT_MODEL = dict(n_layer=4, n_head=4, n_embd=128, block_size=16, batch_size=64, max_iters=1500, eval_interval=10 ** 9,
                  history_drop=0.0, log_interval=500)


def slot_arms(H, span, **more):
    """The arms of the slot claims for a history of H tokens: none, slots, uncompressed, and an ordinary window. All are
    scored on the same tokens: the last 16 of a row."""
    base = {**SLOT_MODEL, **more}
    slots = dict(base, history=H, aggregate=1, n_segment=2, n_span=H // span, span=span)
    window = dict(base, block_size=H + 16, score_last=16)
    return {"a no history": base, "b slots": slots, "c uncompressed": window,
            "d ordinary window": dict(window, train_on_all=True, batch_size=max(2, base["batch_size"] * 80 // (H + 16)))}


def slots(cfg):
    """what 64 tokens of history are worth as slots, with ablations, beside an ordinary window at equal seconds"""
    arms = slot_arms(64, 4)
    times = step_times(cfg, {k: read_arm(**a) for k, a in arms.items()})
    t_b = times["b slots"]
    arms["d ordinary window"]["max_iters"] = round(SLOT_MODEL["max_iters"] * compare(t_b, times["d ordinary window"]))
    arms["b, binding off"] = dict(arms["b slots"], span_binding=False)
    arms["b slots"] = dict(arms["b slots"], after=["history shuffled", "slots empty"])
    got = over_seeds(cfg, arms)
    a, c = got["a no history"]["val_loss"], got["c uncompressed"]["val_loss"]
    rows = [{"arm": k, "val loss": g["val_loss"], "spread": g["spread"], "steps": int(g["step"]),
             "gap closed": (a - g["val_loss"]) / (a - c), "step time / c": compare(times[k], times["c uncompressed"])
             if k in times else compare(t_b, times["c uncompressed"])} for k, g in got.items()]
    rows += [{"arm": f"b, {k} at evaluation", "val loss": got["b slots"][k], "gap closed": (a - got["b slots"][k]) / (a - c)}
             for k in arms["b slots"]["after"]]
    return show(cfg, f"64 tokens of history on {cfg.dataset}, mean of {cfg.seeds} seeds, {SLOT_MODEL['max_iters']} steps", rows)


def spans(cfg):
    """spans of 2 to 16 over histories of 64 to 1,024 tokens, beside an ordinary window of that length at equal seconds"""
    few, times, arms = dataclasses.replace(cfg, rounds=3, seeds=1), {}, {}
    small = dict(n_layer=2, batch_size=32, max_iters=600)
    for H in (64, 256, 1024):
        mine = {(H, f"spans of {span}"): slot_arms(H, span, **small)["b slots"] for span in (2, 4, 8, 16)}
        four, window = (H, "spans of 4"), (H, f"window of {H + 16}, seconds of spans of 4")
        mine[window] = slot_arms(H, 4, **small)["d ordinary window"]
        times.update(step_times(few, {k: read_arm(**a) for k, a in mine.items()}, env=one_of_many(cfg)))
        mine[window]["max_iters"] = round(small["max_iters"] * compare(times[four], times[window]))
        arms.update(mine)
    got = over_seeds(few, arms)
    rows = [{"history": H, "arm": arm, "slots": sum(arms[H, arm].get(k, 0) for k in ("aggregate", "n_segment", "n_span")),
             "val loss": g["val_loss"], "steps": int(g["step"]), "ms a step": 1000 * median(times[H, arm])}
            for (H, arm), g in got.items()]
    return show(cfg, f"spans and histories on {cfg.dataset}, 2 layers, 600 steps of 32 x 16, one seed, one core", rows)


def cipher(cfg):
    """the cipher task: no history, slots, and the history uncompressed, above the source's entropy rate"""
    floor = prepare.open_dataset("cipher", cfg.data_dir)["entropy_rate"]
    base = dict(preset="cipher", eval_interval=10 ** 9, log_interval=200)
    arms = {"no history": dict(base, **NO_SLOTS), "slots": base,
            "uncompressed": dict(base, **NO_SLOTS, block_size=272, score_last=16)}
    times = step_times(cfg, {k: read_arm(**a) for k, a in arms.items()})
    got = over_seeds(cfg, arms)
    top, low = got["no history"]["val_loss"], got["uncompressed"]["val_loss"]
    rows = [{"arm": k, "val loss": g["val_loss"], "spread": g["spread"], "above the floor": g["val_loss"] - floor,
             "gap closed": (top - g["val_loss"]) / (top - low), "ms a step": 1000 * median(times[k])}
            for k, g in got.items()]
    return show(cfg, f"cipher, mean of {cfg.seeds} seeds, entropy rate {floor:.4f}", rows)


def stream(cfg, total=100_000, block=20_000):
    """100,000 characters from one prompt, with slots, by attention and by recurrences: memory and time a token"""
    rows, shape = [], dict(n_embd=128, n_head=4)
    arms = {"AA with slots, history 256": read_arm("softar_shakespeare", n_layer=2, n_head=4, n_embd=128),
            "AA": read_arm(layers="AA", block_size=256, **shape), "RR": read_arm(layers="RR", block_size=256, **shape)}
    for name, (m, _) in arms.items():
        d = sample.Decoder(GPT(stand_in(m)).eval(), [[1]])
        generator, scfg = torch.Generator().manual_seed(1), sample.SampleConfig(max_new_tokens=total)
        t0, last = time.perf_counter(), 0
        for i, _ in enumerate(sample.generate(d, scfg, generator=generator), 1):
            if i == 1000 or i % block == 0:
                rows.append({"model": name, "tokens": i, "memory MB": resident_mb(),
                             "ms a token": 1000 * (time.perf_counter() - t0) / (i - last), "ids kept": sum(map(len, d.rows[0]))})
                t0, last = time.perf_counter(), i
    return show(cfg, "one stream, 2 layers, 128 wide, window 256, random weights", rows)


def resident_mb():
    """Memory of this process now."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


SMALL = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, eval_interval=10 ** 9, log_interval=500)


def soft(cfg):
    """the token after next, behind a soft step, a sampled one and the exact sum, with and without soft inputs in training"""
    arms = {f"soft_rate = {r}": dict(SMALL, max_iters=1500, soft_rate=r, after=["two steps"]) for r in (0.0, 0.1, 0.3, 1.0)}
    got = over_seeds(cfg, arms)
    rows = []
    for k, g in got.items():
        two = g["two steps"]
        rows.append({"arm": k, "val loss": g["val_loss"], "spread": g["spread"], **two, "gap closed":
                     (two["sampled step"] - two["soft step"]) / (two["sampled step"] - two["exact sum"])})
    return show(cfg, f"nats of the token after next, {cfg.dataset}, 1,500 steps of 12 x 64, mean of {cfg.seeds} seeds", rows)


def semantic(cfg):
    """losses that know how far off a wrong token is, at three weights, beside cross-entropy alone and regression alone"""
    kinds = {"cos": dict(semantic="cos"), "mse": dict(semantic="mse"), "soft_ce": dict(semantic="soft_ce"),
             "nearest head, mse": dict(head="nearest", semantic="mse")}
    base = dict(SMALL, max_iters=600)
    timed = {"none": base, **{k: dict(base, **a, semantic_weight=0.1) for k, a in kinds.items()}}
    times = step_times(cfg, {k: read_arm(**a) for k, a in timed.items()}, env=one_of_many(cfg))
    ratio = {k: compare(t, times["none"]) for k, t in times.items()}
    arms = {"cross-entropy alone": (base, "none"),
            **{f"cross-entropy alone, the seconds of {k}": (dict(base, max_iters=round(base["max_iters"] * ratio[k])), "none") for k in kinds},
            "nearest head, cross-entropy alone": (dict(base, head="nearest"), "nearest head, mse")}
    arms.update({f"{k}, weight {w}": (dict(base, **a, semantic_weight=w), k) for k, a in kinds.items() for w in (0.01, 0.1, 1.0)})
    arms["nearest head, mse alone"] = dict(base, **kinds["nearest head, mse"], semantic_weight=1.0, ce_weight=0.0), "nearest head, mse"
    got = over_seeds(cfg, {k: dict(a, after=["wrong distance"]) for k, (a, _) in arms.items()})
    none = got["cross-entropy alone"]["val_loss"]
    rows = [{"arm": k, "steps": int(g["step"]), "val loss": g["val_loss"], "against none": g["val_loss"] - none, "spread":
             g["spread"], "distance when wrong": g["wrong distance"], "step time": ratio[arms[k][1]]} for k, g in got.items()]
    return show(cfg, f"semantic losses on {cfg.dataset}, 4 layers, 128 wide, 12 x 64, 600 steps, mean of {cfg.seeds} seeds", rows)


def chain(cfg):
    """following 2 to 4 pointers: thinking, as many pause tokens, and neither, 2 layers in all"""
    for name, pause in (("chain", -1), ("chain0", 0)):
        have(cfg, "chain", name, f"--n_pause={pause}")
    base = dict(preset="chain", eval_interval=10 ** 9, log_interval=500)
    pause = dict(base, n_think=0)
    arms = {"thinking (n_think = 4)": base, "pause tokens (n_think = 0)": pause, "neither": dict(pause, dataset="chain0")}
    times = step_times(dataclasses.replace(cfg, rounds=3), {k: read_arm(**a) for k, a in arms.items()}, env=one_of_many(cfg))
    ratio = {k: compare(t, times["pause tokens (n_think = 0)"]) for k, t in times.items()}
    arms["pause tokens, the seconds of thinking"] = dict(
        pause, max_iters=round(read_arm("chain")[1]["max_iters"] * ratio["thinking (n_think = 4)"]))
    got = over_seeds(cfg, {k: dict(a, after=["hops"]) for k, a in arms.items()})
    rows = [{"arm": k, "steps": int(g["step"]), "step time": ratio.get(k, 1.0), "val loss": g["val_loss"], "spread": g["spread"],
             **g["hops"]} for k, g in got.items()]
    return show(cfg, f"chain: share of right answers (chance 0.0625), mean of {cfg.seeds} seeds", rows)


def coherence(cfg, total=20_000):
    """a stream of 20,000 characters under each collapse policy, beside human text: repetition, words, a judge's loss"""
    shape = dict(SMALL, block_size=256, batch_size=16, max_iters=750)
    writer = fit(cfg, seed=1, **shape, soft_rate=0.3, history=256, aggregate=1, n_segment=2, n_span=16, span=4)
    judge = fit(cfg, seed=2, **shape)
    model, ckpt = sample.load(writer["out_dir"])
    critic, _ = sample.load(judge["out_dir"])
    tok = prepare.Tokenizer(ckpt["tokenizer"])
    val, train_ids = (prepare.open_bin(os.path.join(cfg.data_dir, cfg.dataset, f"{s}.bin"))[0] for s in ("val", "train"))
    known = set(tok.decode(np.asarray(train_ids).tolist()).lower().split())
    rows = [{"text": "human (validation split)", **text_figures(np.asarray(val[:total]).tolist(), tok, critic, known)}]
    for collapse in ("always", "entropy", "distance", "never"):
        scfg = sample.SampleConfig(soft=True, collapse=collapse, max_new_tokens=total)
        d = sample.Decoder(model, [[int(val[0])]], tok.eot).select([0] * cfg.seeds)
        made = sample.gather(sample.generate(d, scfg, generator=torch.Generator().manual_seed(1)), cfg.seeds)
        figures = [{**text_figures([t.token for t in row], tok, critic, known), "share soft": mean(t.soft for t in row)}
                   for row in made]
        rows.append({"text": f"collapse = {collapse}", **averages(figures)})
    return show(cfg, f"streams of {total:,} characters, temperature 0.8, mean of {cfg.seeds}", rows)


def kept(cfg, name, preset=None, **overrides):
    """Folder of a model that several claims use: trained once where cfg.out_dir keeps it."""
    folder = os.path.join(cfg.out_dir, name)
    if cfg.out_dir and os.path.exists(os.path.join(folder, "ckpt.pt")):
        return folder
    return fit(cfg, preset, out_dir=name, init_from="auto", **overrides)["out_dir"]


JUDGE = dict(SMALL, seed=2, block_size=256, batch_size=16, max_iters=750)


@torch.inference_mode()
def answers(model, tok, facts, memory, rows=64):
    """Share of facts [(what of, value)] whose whole value is the likeliest text behind the question, which follows 6 unrelated facts: each
    token of it the likeliest behind those before, as greedy decoding has it."""
    right, before = 0, "\n" + "".join(f"!{key} {value}\n" for key, value in prepare.random_facts(np.random.default_rng(0), 6))
    d = sample.Decoder(model, [tok.encode(before)], memory=memory)  # read once for all
    for some in (facts[i:i + rows] for i in range(0, len(facts), rows)):
        texts = [tok.encode(f"?{key} {value}\n") for key, value in some]
        idx = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True)
        best = model(idx, state=d.state.select(torch.zeros(len(some), dtype=torch.long))).logits.argmax(-1).tolist()
        for text, guess, (_, value) in zip(texts, best, some):
            n = len(text) - len(value) - 1
            right += guess[n - 1:len(text) - 1] == text[n:]
    return right / len(facts)


def judge_of(cfg):
    """A model that others' texts are judged by: another shape, another seed."""
    return sample.load(kept(cfg, "judge", **JUDGE))[0]


def timed_tokens(makers, rounds, n):
    """{name: [seconds a token per round]} of functions that give an iterator of decoding steps (lists of rows of GeneratedToken), in turns,
    each over at least n tokens of its first row."""
    def run(make, _):
        steps, made = make(), 0
        t0 = time.perf_counter()
        for ready in steps:
            made += len(ready[0])
            if made >= n:
                break
        return (time.perf_counter() - t0) / made
    for make in makers.values():
        run(make, 1)  # compile
    return turns(makers, rounds, run, 0.0)


def random_exits(model, depth):
    """A rule that leaves at random, at each exit with the chance that makes the mean of blocks run `depth`."""
    places, n = list(model.exits.values()), model.cfg.n_layer
    mean = lambda p: sum(k * p * (1 - p) ** i for i, k in enumerate(places)) + n * (1 - p) ** len(places)
    low, high = 0.0, 1.0
    for _ in range(40):
        low, high = ((low + high) / 2, high) if mean((low + high) / 2) > depth else (low, (low + high) / 2)
    g = torch.Generator().manual_seed(0)
    return lambda h, before: torch.rand(h.shape[:2], generator=g) < low


@torch.inference_mode()
def exits(cfg, repetitions=100, tokens=200):
    """early exit: blocks, disagreement and a judge's loss over thresholds, beside random exits; what calibration promises"""
    model, ckpt = sample.load(kept(cfg, "exits", "exits_shakespeare"), dtype="bfloat16")
    critic, n = judge_of(cfg), model.cfg.n_layer
    rows = sample.held_out(ckpt, sample.SampleConfig(data_dir=cfg.data_dir, sequences=1000), 64)[:3000]
    table, promise, prompts = [], [], rows[-32:, :32].tolist()

    def text(rule):
        d = sample.Decoder(model, prompts, leave=rule)
        out = sample.gather(sample.generate(d, sample.SampleConfig(max_new_tokens=tokens), generator=torch.Generator().manual_seed(1)),
                            len(prompts))
        return mean(judged(critic, [p + [t.token for t in o] for p, o in zip(prompts, out)], 32)), mean(
            t.depth or n for o in out for t in o)

    arms = {"every block": None}
    for kind in sample.CONFIDENCE:
        risks, depth = sample.exit_risks(model, rows if kind == "softmax" else rows[:1000], kind)
        half = len(risks) // 2
        at = sample.laxest(risks[:half], 0.02, 0.95)
        g, broken = torch.Generator().manual_seed(0), 0
        for _ in range(repetitions):  # calibrated on 500, seen on the 500 or more that are left
            order = torch.randperm(len(risks), generator=g)
            i = sample.laxest(risks[order[:500]], 0.02, 0.95)
            broken += i >= 0 and risks[order[500:], i].mean().item() > 0.02
        fresh = {"threshold at 2%": sample.THRESHOLDS[at], "blocks": depth[half:, at].mean().item(), "observed on fresh text":
                 risks[half:, at].mean().item()} if at >= 0 else {"threshold at 2%": "none"}
        promise.append({"confidence by": kind, "calibrated on": half, **fresh, "repetitions under 2%": repetitions - broken})
        for i in sorted({max(at, 0), *((3, 5, 9, 15) if kind == "softmax" else (9,))}):
            name = f"{kind} > {sample.THRESHOLDS[i]:.3g}" + (" (2% risk)" if i == at else "")
            arms[name] = sample.exit_rule(model, kind, sample.THRESHOLDS[i])
            table.append({"rule": name, "blocks": depth[half:, i].mean().item(), "differ": risks[half:, i].mean().item()})
            if kind == "softmax":
                rule = random_exits(model, table[-1]["blocks"])
                x = rows[-500:]
                logits, deep = model.forward_with_exits(x, rule)
                differ = (logits.argmax(-1) != model(x).logits.argmax(-1)).float().mean().item()
                arms[f"random, as deep as {name}"] = rule
                table.append({"rule": f"random, as deep as {name}", "blocks": deep.float().mean().item(), "differ": differ})
    table.insert(0, {"rule": "every block", "blocks": float(n), "differ": 0.0})
    for row in table:
        row["judge"], row["blocks when writing"] = text(arms[row["rule"]])
    human = sample.held_out(ckpt, sample.SampleConfig(data_dir=cfg.data_dir, sequences=100), 32 + tokens)[:500]
    human = mean(judged(critic, human.tolist(), 32))
    show(cfg, f"calibration: risk 2%, confidence 95%, sequences of 64; on as many fresh ones, and {repetitions} repetitions with 500", promise)
    return show(cfg, f"early exit, 6 layers, bf16 (judge: nats a character on 32 texts of {tokens}; human text {human:.3f})", table)


def exit_speed(cfg, tokens=200):
    """early exit by softmax, one row: tokens/s over thresholds, in fp32, in bf16 and compiled"""
    folder, rows = kept(cfg, "exits", "exits_shakespeare"), []
    for dtype, compile in (("float32", False), ("bfloat16", False), ("float32", True), ("bfloat16", True)):
        model, ckpt = sample.load(folder, dtype=dtype)
        prompt = sample.held_out(ckpt, sample.SampleConfig(data_dir=cfg.data_dir, sequences=100), 64)[-1:, :32].tolist()
        rules = {"every block": None, **{f"softmax > {t}": sample.exit_rule(model, "softmax", t) for t in (0.8, 0.7, 0.6, 0.5)}}
        start = lambda rule: sample.generate(sample.Decoder(model, prompt, compile=compile, leave=rule), sample.SampleConfig(
            max_new_tokens=tokens), generator=torch.Generator().manual_seed(1))
        times = timed_tokens({k: lambda rule=rule: start(rule) for k, rule in rules.items()}, cfg.rounds, tokens)
        for k, rule in rules.items():
            blocks = mean(made[0][0].depth or model.cfg.n_layer for made in start(rule))
            rows.append({"weights": dtype + (", compiled" if compile else ""), "rule": k, "blocks": blocks, "tokens/s": 1 / median(times[k]),
                         "x": compare(times["every block"], times[k])})
    return show(cfg, f"early exit, 6 layers, 512 wide, one row, {tokens} tokens", rows)


@torch.inference_mode()
def judged(critic, texts, skip):
    """Nats a token of each text (lists of ids of one length) under another model, from the skip-th token on."""
    out = []
    for part in torch.tensor(texts).split(64):
        logp = critic(part[:, :-1]).logits.log_softmax(-1).gather(2, part[:, 1:, None])[..., 0]
        out += (-logp[:, skip - 1:]).mean(1).tolist()
    return out


def speculate(cfg, n=1000, rows=10):
    """self-speculation at 12 layers, 512 wide: the same greedy text, acceptance, speed; and with a small model as the draft"""
    shape = dict(layers="AA.AAAAAAAAAA", n_embd=512, n_head=8, block_size=256, batch_size=8, exit_distill=0.5)
    folder = kept(cfg, "deep", seed=1, max_iters=400, eval_interval=400, log_interval=50, **shape)
    small = kept(cfg, "small", seed=3, n_layer=2, n_head=4, n_embd=128, batch_size=16, max_iters=600, eval_interval=600)
    val, table = prepare.open_bin(os.path.join(cfg.data_dir, cfg.dataset, "val.bin"))[0], []
    prompts = [np.asarray(val[i * 5000:i * 5000 + 100]).tolist() for i in range(rows)]
    for dtype, compile in (("float32", False), ("bfloat16", True)):
        model, _ = sample.load(folder, dtype=dtype)
        draft, _ = sample.load(small, dtype=dtype)
        drafts = {f"{k} ahead, {name}": dict(speculate=k, **more) for k in (3, 5)
                  for name, more in (("exit 2", dict(draft_exit=2)), ("small model", dict(draft="small")))}

        def run(ps, how, temperature, count):
            d = sample.Decoder(model, ps, compile=compile)
            scfg, g = sample.SampleConfig(max_new_tokens=count, temperature=temperature, **how), torch.Generator().manual_seed(1)
            if not how:
                return sample.generate(d, scfg, generator=g), None
            s = sample.Speculation(d, scfg, g, sample.Decoder(draft, ps, compile=compile) if "draft" in how else None)
            return s.generate(), s

        for temperature in (0.0, 0.8):
            arms = {"plain": {}, **drafts}
            times = timed_tokens({k: lambda how=how: run(prompts[:1], how, temperature, 10 ** 9)[0] for k, how in arms.items()},
                                 cfg.rounds, 300)
            for k, how in arms.items():
                steps, s = run(prompts[:1], how, temperature, 500)
                sample.gather(steps, 1)
                table.append({"decoding": k, "type": dtype + (", compiled" if compile else ""), "temperature": temperature,
                              "tokens/s": 1 / median(times[k]), "x": compare(times["plain"], times[k]),
                              **({"accepted": s.accepted / s.proposed} if s else {})})
        if not compile:
            same_text(cfg, run, prompts, drafts, model, n)
    return show(cfg, "speculation, 12 layers, 512 wide, one row", table)


@torch.inference_mode()
def same_text(cfg, run, prompts, drafts, model, n):
    """Whether greedy texts of n tokens are those of plain decoding, and where not, how near the two likeliest tokens were."""
    def texts(how):
        return [[t.token for t in row] for row in sample.gather(run(prompts, how, 0.0, n)[0], len(prompts))]
    plain, rows = texts({}), []
    for k in list(drafts)[:2]:
        first = [next((i for i, (a, b) in enumerate(zip(p, q)) if a != b), None) for p, q in zip(plain, texts(drafts[k]))]
        gaps = []
        for prompt, p, i in zip(prompts, plain, first):
            if i is not None:
                d = sample.Decoder(model, [prompt + p[:i]])
                gaps.append(torch.sub(*d.logits[0].topk(2).values).abs().item())
        rows.append({"draft": k, "texts": len(prompts), "tokens each": n, "differing texts": len(gaps), "widest gap where they first differ":
                     max(gaps, default=0.0)})
    return show(cfg, "greedy text beside that of plain decoding, fp32, across folds", rows)


def contrast(cfg, n=200, length=192, skip=64):
    """contrastive decoding with each kind of amateur beside greedy and nucleus: repetition, words, a judge's loss, paired intervals"""
    model, ckpt = sample.load(kept(cfg, "exits", "exits_shakespeare"))
    weak = sample.load(kept(cfg, "weak", seed=3, n_layer=2, n_head=2, n_embd=64, batch_size=16, max_iters=300, eval_interval=300))[0]
    critic, tok = judge_of(cfg), prepare.Tokenizer(ckpt["tokenizer"])
    rows = sample.held_out(ckpt, sample.SampleConfig(data_dir=cfg.data_dir, sequences=n), skip + length)[:n].tolist()
    train_ids = prepare.open_bin(os.path.join(cfg.data_dir, cfg.dataset, "train.bin"))[0]
    known, prompts = set(tok.decode(np.asarray(train_ids).tolist()).lower().split()), [r[:skip] for r in rows]
    kinds = {"model (2 layers, 64 wide)": {}, "exit after 2": dict(at_exit=2), "exit after 4": dict(at_exit=4), "last 8 tokens": dict(context=8)}

    def continuations(kind, **settings):
        more = kinds.get(kind, {})
        expert = sample.Decoder(model, prompts, at_exit=more.get("at_exit", 0))
        amateur = None
        if kind and "at_exit" not in more:
            amateur = sample.Decoder(model if more else weak, prompts, **more)
        scfg = sample.SampleConfig(max_new_tokens=length, amateur=kind, **settings)
        g = torch.Generator().manual_seed(1)
        made = sample.gather(sample.generate(expert, scfg, amateur, g), n)
        return [p + [t.token for t in row] for p, row in zip(prompts, made)]

    def figures(texts):
        return [{**word_figures(tok.decode(text[skip:]).lower().split()[1:-1], known), "judge": nats}  # words at the ends may be cut
                for text, nats in zip(texts, judged(critic, texts, skip))]

    got = {"human": figures(rows), "greedy": figures(continuations("", temperature=0.0)),
           "nucleus 0.95": figures(continuations("", temperature=1.0, top_p=0.95)),
           "alpha 0.1 alone": figures(continuations("model (2 layers, 64 wide)", temperature=1.0, beta=0.0))}
    for kind in kinds:
        got[f"contrast, {kind}"] = figures(continuations(kind, temperature=1.0))
    for more in (dict(beta=0.25), dict(beta=1.0), dict(alpha=0.3)):
        name = f"sweep: exit after 2, {' '.join(f'{k} {v}' for k, v in more.items())}"
        got[name] = figures(continuations("exit after 2", temperature=1.0, **more))
    table, paired = [], []
    for name, each in got.items():
        row = {"decoding": name, **averages(each)}
        table.append(row)
        d = {k: np.array([a[k] - b[k] for a, b in zip(each, got["nucleus 0.95"])]) for k in each[0]}
        paired.append({"decoding": name, **{k: f"{v.mean():+.3f} +- {1.96 * v.std(ddof=1) / len(v) ** 0.5:.3f}" for k, v in d.items()}})
    show(cfg, "the same, less nucleus 0.95 after the same prompt: mean and 95% interval", paired)
    return show(cfg, f"{n} continuations of {length} characters, temperature 1, alpha 0.1, beta 0.5", table)


@torch.inference_mode()
def text_figures(ids, tok, critic, known):
    """Figures of a text: word 4-grams that occurred before, distinct words, words that the training text has, and its
    nats a character under another model."""
    T = critic.cfg.block_size
    n = (len(ids) - 1) // T
    x, y = (torch.tensor(ids[i:i + n * T]).view(n, T) for i in (0, 1))
    loss = sum(critic(a, b, denom=torch.ones(())).losses["ce"].item() for a, b in zip(x.split(16), y.split(16))) / (n * T)
    return {**word_figures(tok.decode(ids).lower().split(), known), "judge": loss}


def word_figures(words, known):
    """Of a list of words: 4-grams that occurred before, distinct words and pairs of words, and words that the training text has."""
    words = words or [""]
    grams = {k: [tuple(words[i:i + k]) for i in range(max(1, len(words) - k + 1))] for k in (1, 2, 4)}
    distinct = {k: len(set(g)) / len(g) for k, g in grams.items()}
    return {"repeated 4-grams": 1 - distinct[4], "distinct words": distinct[1], "distinct pairs": distinct[2],
            "known words": mean(w in known for w in words)}


FORMAL_MODELS = {"A": dict(preset="formal_a"), "A, pos = none": dict(preset="formal_a", pos="none"), "G": dict(preset="formal_g"),
                 **{f"R, gate = {g}": dict(preset="formal_r", gate=g) for g in ("real", "positive")},
                 "R, gate = complex": dict(preset="formal_r", gate="complex", weight_decay=0.1),
                 "RR(RA)R": dict(preset="formal_h")}


def formal_tasks(cfg, tasks):
    """{task: names of FORMAL_MODELS} -> the table of how they do on strings longer than any they were trained on."""
    arms = {}
    for task, models in tasks.items():
        have(cfg, task)
        long = dict(score_last=0, block_size=1024, batch_size=4) if task == "reverse_string" else {}
        arms.update({(task, k): dict(FORMAL_MODELS[k], dataset=task, eval_interval=10 ** 9, log_interval=500, after=["lengths"], **long)
                     for k in models})
    rows = []
    for (task, arm), g in over_seeds(cfg, arms).items():
        each = [r["lengths"]["41 to 500"] for r in g["runs"]]
        rows.append({"task": task, "layers": arm, "best": max(each), "mean": mean(each), "worst": min(each),
                     **{k: v for k, v in g["lengths"].items() if k != "41 to 500"}, "params M": g["params"] / 1e6, "steps": int(g["step"])})
    return show(cfg, f"share of right answers, mean over lengths 41 to 500, {cfg.seeds} seeds, steps of 4,096 symbols", rows)


def formal(cfg):
    """parity, even_pairs, cycle_navigation: trained on strings of 1 to 40 symbols, asked for 41 to 500"""
    return formal_tasks(cfg, {"parity": ["A", "R, gate = real", "R, gate = positive", "RR(RA)R"], "even_pairs": ["A", "R, gate = real"],
                              "cycle_navigation": ["A", "R, gate = real", "R, gate = complex", "G"]})


def formal_more(cfg):
    """modular_arithmetic and reverse_string, likewise"""
    recurrent = ["A", "R, gate = real", "R, gate = complex"]
    return formal_tasks(cfg, {"modular_arithmetic": recurrent, "reverse_string": recurrent})


LEVELS = dict(n_embd=128, n_head=4, block_size=256, batch_size=8, eval_interval=10 ** 9, log_interval=200)
STACKS = {"AAAAAA": dict(layers="AAAAAA"), "(AA)AAAA": dict(layers="(AA)AAAA"), "(AA)AAAA, words": dict(layers="(AA)AAAA", chunk="space"),
          "A(AAAA)A": dict(layers="A(AAAA)A"), "RR(RA)RR": dict(layers="RR(RA)RR"), "RRARRA": dict(layers="RRARRA")}


def levels(cfg):
    """a flat model, concept models, a hierarchical RNN and a flat hybrid, at equal parameters and equal seconds"""
    base = dict(LEVELS, max_iters=350)
    arms = {k: dict(base, **a) for k, a in STACKS.items()}
    times = step_times(dataclasses.replace(cfg, rounds=3), {k: read_arm(**a) for k, a in arms.items()}, env=one_of_many(cfg))
    ratio = {k: compare(times[k], times["AAAAAA"]) for k in arms}
    for k, a in arms.items():
        a["max_iters"] = round(base["max_iters"] / ratio[k])
    got = over_seeds(cfg, arms)
    got.update(over_seeds(dataclasses.replace(cfg, seeds=1), {"(AA)AAAA with a leak": dict(arms["(AA)AAAA"], leak="one ahead")}))
    flat = got["AAAAAA"]["val_loss"]
    rows = [{"layers": k, "steps": int(g["step"]), "val loss": g["val_loss"], "against AAAAAA": g["val_loss"] - flat, "spread": g["spread"],
             "params M": g["params"] / 1e6, "step time": ratio.get(k, ratio["(AA)AAAA"])} for k, g in got.items()]
    return show(cfg, f"levels on {cfg.dataset}, 6 blocks, 128 wide, 8 x 256, mean of {cfg.seeds} seeds (the leak: one)", rows)


def concepts(cfg):
    """how well the next concept is predicted, what a plan is worth, and whether two futures stay two"""
    for task in ("plan", "fork"):
        have(cfg, task)
    measures, kinds = ["plan shuffled", "plan zeroed"], ("cos", "mse", "energy", "flow")
    base = dict(LEVELS, layers="(AA)AA", max_iters=350)
    arms = {f"{cfg.dataset}, {k}": dict(base, concept=k, concept_weight=0.1, after=["concepts", *measures]) for k in kinds}
    arms[f"{cfg.dataset}, no regression"] = dict(base, concept_weight=0.0, after=measures)
    arms[f"{cfg.dataset}, cross, horizon 3"] = dict(base, plan="cross", horizon=3, concept_weight=0.1, after=["concepts", *measures])
    small = dict(LEVELS, layers="(AA)A", dataset="plan", block_size=72, batch_size=32, max_iters=600, after=["concepts", *measures])
    arms.update({f"plan, {p}": dict(small, plan=p, concept_weight=0.1) for p in ("add", "cross")})
    got = over_seeds(cfg, arms)
    rows = [{"arm": k, "val loss": g["val_loss"], "spread": g["spread"], **{f"{m}": g[m] - g["val_loss"] for m in measures},
             **g.get("concepts", {})} for k, g in got.items()]
    show(cfg, f"concepts, mean of {cfg.seeds} seeds (plan shuffled, zeroed: by how much the loss grows)", rows)
    rows, bars = [], {}
    for kind in ("mse", "energy", "flow"):
        r = fit(cfg, seed=1, **dict(LEVELS, layers="(AA)A", dataset="fork", block_size=64, batch_size=32, max_iters=400,
                                    concept=kind, concept_weight=0.1))
        bars[kind] = fork_samples(cfg, sample.load(r["out_dir"])[0])
        t, off = bars[kind]
        rows.append({"head": kind, "first mode": (t < -0.5).mean(), "middle": (abs(t) <= 0.5).mean(), "second mode": (t > 0.5).mean(),
                     "distance beside the line": off})
    if cfg.figure:
        draw(cfg.figure, {k: t for k, (t, _) in bars.items()})
    return show(cfg, "fork: samples of the next concept, which is one of two (at -1 and 1), evenly", rows)


@torch.inference_mode()
def fork_samples(cfg, model, n=500):
    """Where samples of the next concept lie on the line through the two that may come (-1 and 1), and how far beside it, in
    units of half their distance."""
    tokens, _, _, _, _ = prepare.open_bin(os.path.join(cfg.data_dir, "fork", "val.bin"))
    torch.manual_seed(0)
    n = min(n, (len(tokens) - 63) // 64)
    x = torch.from_numpy(tokens[63:63 + 64 * n].astype(np.int64)).view(n, 64)  # from an end of text on
    made = model.concepts(x)[-1]
    first, c = x.view(n, 16, 4)[:, :, 0], made.concepts
    a, b = (c[first == model_id].mean(0) for model_id in (1, 5))  # abcd, efgh
    half, drawn = (b - a) / 2, made.level.head.sample(made.u)[:, 2:-1, 0].flatten(0, 1)
    t = (drawn - (a + b) / 2) @ half / half.square().sum()
    beside = (drawn - (a + b) / 2 - t[:, None] * half).norm(dim=-1).mean() / half.norm()
    return t.numpy(), beside.item()


def draw(path, samples):
    """Histograms side by side, as SVG: {title: positions on the line}."""
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{240 * len(samples)}" height="160" font-family="sans-serif" font-size="12">']
    for i, (title, t) in enumerate(samples.items()):
        counts, x0 = np.histogram(t, 40, (-2, 2))[0], 240 * i + 20
        out.append(f'<text x="{x0 + 100}" y="16" text-anchor="middle">{title}</text>')
        out += [f'<rect x="{x0 + 5 * j}" y="{130 - 100 * n / counts.max():.1f}" width="4" height="{100 * n / counts.max():.1f}" '
                f'fill="steelblue"/>' for j, n in enumerate(counts)]
        out += [f'<text x="{x0 + 50 * (v + 2)}" y="146" text-anchor="middle">{v}</text>' for v in (-1, 0, 1)]
    with prepare.replacing(path) as f:
        f.write("\n".join([*out, "</svg>"]).encode())


def blocks(cfg):
    """time of a training step of each block at windows of 256, 1,024 and 4,096 tokens, 4,096 tokens a step"""
    arms = {}
    for T in (256, 1024, 4096):
        for layers in ("AA", "RR", "GG"):
            arms[T, layers] = read_arm(n_embd=128, n_head=4, layers=layers, block_size=T, batch_size=4096 // T)
    times = {}
    for layers in dict.fromkeys(k[1] for k in arms):  # a few processes at a time
        times.update(step_times(dataclasses.replace(cfg, rounds=3), {k: a for k, a in arms.items() if k[1] == layers}))
    rows = [{"layers": layers, **{f"ms at {T:,}": 1000 * median(times[T, layers]) for T in (256, 1024, 4096)},
             "4,096 / 256": median(times[4096, layers]) / median(times[256, layers])} for layers in dict.fromkeys(k[1] for k in arms)]
    return show(cfg, "time of a training step by window, 128 wide, 4,096 tokens a step", rows)


@torch.inference_mode()
def text_keys(cfg, n_query, n_key):
    """{kind: (queries of held-out text, keys of training text)}, 64 wide, of a small model: what its head reads, through a random
    projection, and the queries and keys of an attention head, before they are turned by their place."""
    model, ckpt = sample.load(kept(cfg, "keys", n_layer=4, n_head=2, n_embd=128, batch_size=16, max_iters=400, eval_interval=400))
    T, attn, out = model.cfg.block_size, model.blocks[2].attn, {}
    shrink = torch.linalg.qr(torch.randn(128, 64, generator=torch.Generator().manual_seed(0)))[0]
    for split, n in (("val", n_query), ("train", n_key)):
        tokens = prepare.open_bin(os.path.join(cfg.data_dir, ckpt["dataset"], f"{split}.bin"))[0]
        starts = torch.randperm(len(tokens) // T, generator=torch.Generator().manual_seed(0))[:n // T] * T
        hidden, qkv = [], []
        hooks = [model.lm_head.register_forward_pre_hook(lambda _, x: hidden.append(x[0].view(-1, 128))),
                 attn.c_attn.register_forward_hook(lambda _, x, y: qkv.append(y.view(-1, 6, 64)))]
        for some in starts.split(32):
            model(torch.stack([torch.from_numpy(tokens[i:i + T].astype(np.int64)) for i in some]))
        for h in hooks:
            h.remove()
        out.setdefault("hidden", []).append(rms_norm(torch.cat(hidden) @ shrink))
        out.setdefault("attention", []).append(rms_norm(torch.cat(qkv)[:, 0 if split == "val" else 2].contiguous()))
    return out


def recall(q, keys, places):
    """Share of the places (Q, k) found for queries q whose keys score as high as the k-th best does, up to rounding."""
    k, part = places.size(1), 256
    good = [(s.gather(1, p) >= s.topk(k)[0][:, -1:] - 1e-6 * x.norm(dim=-1, keepdim=True) * keys.norm(dim=-1).max()).float().mean().item()
            for x, p in zip(q.split(part), places.split(part)) for s in (x @ keys.t(),)]
    return mean(good)


@torch.inference_mode()
def retrieval(cfg, Q=4096, N=65536, k=32):
    """32 of 64K keys for 4,096 queries: exact, beside faiss (pip install faiss-cpu), product keys, and by clusters; where those pay"""
    g = torch.Generator().manual_seed(0)
    kinds = {"Gaussian": [torch.randn(n, 64, generator=g) for n in (Q, N)], **text_keys(cfg, Q, 4 * N)}
    more = {kind: keys for kind, (_, keys) in kinds.items()}
    kinds = {kind: (q, keys[:N].clone()) for kind, (q, keys) in kinds.items()}
    memory = FeaturalMemory(GPTConfig(vocab_size=2, n_embd=64, n_head=1, layers="F", n_mem=N, mem_head=1, mem_top=k), 0)
    memory.c_q.weight.copy_(torch.eye(64))
    memory.keys.normal_(generator=g)
    first, second = rms_norm(memory.keys[0]) * 32 ** -0.5
    x = torch.randn(1, Q, 64, generator=g)
    kinds["grid"] = rms_norm(x.view(Q, 2, 32)).flatten(1), torch.cat((first.repeat_interleave(memory.side, 0), second.repeat(memory.side, 1)), dim=-1)

    q, keys = kinds["hidden"]
    find = torch.compile(memory.find, fullgraph=True, dynamic=False)
    arms = {("exact", "hidden"): lambda: search(q, keys, k)[1],
            ("product and topk", "hidden"): lambda: torch.cat([(part @ keys.t()).topk(k)[1] for part in q.split(512)]),
            ("exact", "grid"): lambda: search(*kinds["grid"], k)[1],
            ("product keys", "grid"): lambda: memory.find(x)[0][0, :, 0], ("product keys, compiled", "grid"): lambda: find(x)[0][0, :, 0]}
    if importlib.util.find_spec("faiss"):
        import faiss
        faiss.omp_set_num_threads(torch.get_num_threads())
        flat = faiss.IndexFlatIP(64)
        flat.add(keys.numpy())
        arms["faiss, flat", "hidden"] = lambda: torch.from_numpy(flat.search(q.numpy(), k)[1])
    else:
        print("faiss is not installed, so that its row is missing; pip install faiss-cpu", file=sys.stderr)
    index = {}
    for kind in ("hidden", "attention", "Gaussian"):
        index[kind] = Clusters(64)
        index[kind].add(kinds[kind][1])
        for probes in (6, 17, 32):
            arms[f"clusters, {probes} of {int((index[kind].count > 0).sum())} pages", kind] = \
                lambda c=index[kind], q=kinds[kind][0], p=probes: c.search(q, k, p)[1]
    found = {name: f() for name, f in arms.items()}
    times = turns(arms, cfg.rounds, seconds, 0.5)
    rows = []
    for name, (what, kind) in zip(arms, arms):
        exact = times["exact", "grid" if kind == "grid" else "hidden"]
        rows.append({"search": what, "keys": kind, "recall": recall(*kinds[kind], found[what, kind]), "ms": 1000 * median(times[what, kind]),
                     "x exact": compare(exact, times[what, kind]), **({"x faiss": compare(times["faiss, flat", "hidden"], times[what, kind])}
                                                                     if ("faiss, flat", "hidden") in times else {})})
    show(cfg, f"{k} of {N:,} keys for {Q:,} queries, fp32, {torch.get_num_threads()} threads", rows)
    return clusters_by_size(cfg, kinds["attention"][0], [more["attention"][:n].clone() for n in (N // 16, N // 4, N, 4 * N)], k)


def clusters_by_size(cfg, q, sets, k):
    """What an approximate index of each of several sets of keys costs and gives, beside exact search: the table."""
    rows = []
    for keys in sets:
        c, last = Clusters(64), iter(keys[-100:].split(1))
        row = {"keys": len(keys), "build, s": seconds(lambda: c.add(keys[:-100])), "add one, ms": 1000 * seconds(lambda: c.add(next(last)), 100),
               "MB": c.keys.nbytes / 2 ** 20, "exact, MB": keys.nbytes / 2 ** 20, "recall": recall(q[:256], keys, c.search(q[:256], k)[1])}
        for some in (1, 64, len(q)):
            arms = {"exact": lambda: search(q[:some], keys, k), "clusters": lambda: c.search(q[:some], k)}
            t = turns(arms, cfg.rounds, seconds, 0.2)
            row.update({f"{some:,} queries, ms": 1000 * median(t["clusters"]), f"x exact, {some:,}": compare(t["exact"], t["clusters"])})
        rows.append(row)
    return show(cfg, "clusters (16 pages a query) by the number of keys of attention", rows)


MEMORY_MODEL = dict(preset="shakespeare_cpu", max_iters=400, eval_interval=400, log_interval=400)


def featural(cfg):
    """featural memory beside the MLP: random pairs learned at equal FLOPs; loss at equal steps, equal parameters and equal seconds"""
    random_pairs(cfg)
    base, memory, C = MEMORY_MODEL, dict(MEMORY_MODEL, layers="AAFA", mem_head=2, mem_top=8, n_mem=4096), 128
    n_plain, n_memory = (GPT(stand_in(read_arm(**a)[0])).num_params() for a in (base, memory))
    width = 4 * C + round((n_memory - n_plain) / (2 * C))
    arms = {"AAAA": base, "AAFA, 4,096 slots": memory, "AAFA, 784 slots, as many parameters as AAAA": dict(memory, n_mem=784),
            f"AAAA, third MLP {width} wide, as many as AAFA": dict(base, n_mlp=(0, 0, width, 0))}
    times = step_times(dataclasses.replace(cfg, rounds=3), {k: read_arm(**a) for k, a in arms.items()}, env=one_of_many(cfg))
    slower = compare(times["AAFA, 4,096 slots"], times["AAAA"])
    arms["AAAA, seconds of AAFA"] = dict(base, max_iters=round(base["max_iters"] * slower))
    got = over_seeds(cfg, {k: dict(a, after=["usage"]) if "layers" in a else a for k, a in arms.items()})
    rows = [{"arm": k, "val loss": g["val_loss"], "spread": g["spread"], "steps": int(g["step"]), "params M": g["params"] / 1e6,
             "step time": compare(times.get(k, times["AAAA"]), times["AAAA"]), **g.get("usage", {})} for k, g in got.items()]
    return show(cfg, f"featural memory on {cfg.dataset}, 4 layers, 128 wide, 12 x 64, mean of {cfg.seeds} seeds", rows)


def learn_pairs(kind, n, scale, steps=1000, batch=512, seed=1):
    """One feed-forward layer, kind (settings), learns n pairs of a random vector and one of 256 labels in so many steps, at its learning
    rates times scale. -> share of the pairs that are right in the end."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=256, n_head=1, **kind), seed)
    layer, optimizers = model.blocks[0].mlp, train.make_optimizers(model, TrainConfig())
    answer = lambda x: model.lm_head(model.ln_f(x + layer(x, None)))
    x = torch.nn.functional.normalize(torch.randn(n, 1, model.cfg.n_embd), dim=-1) * model.cfg.n_embd ** 0.5
    y = torch.randint(256, (n,))
    for step in range(steps):
        for o in optimizers:
            for g in o.param_groups:
                g["lr"] = g["peak_lr"] * scale * min(1.0, (steps - step) / (0.8 * steps))
        at = torch.randint(n, (batch,))
        torch.nn.functional.cross_entropy(answer(x[at])[:, 0], y[at]).backward()
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
    with torch.inference_mode():
        return sum((answer(a)[:, 0].argmax(-1) == b).sum().item() for a, b in zip(x.split(4096), y.split(4096))) / n


def random_pairs(cfg):
    """How many random pairs one layer learns, at equal FLOPs a position: sizes double until fewer than 90% are right at every rate."""
    memory = dict(layers="F", n_embd=32, n_mem=4096, mem_head=2, mem_top=8, mem_dim=32)
    attention = 2 * 4 * 32 ** 2 + 4 * 32  # of one position, which stands in flops and is not run
    flops = lambda kind: GPT(GPTConfig(vocab_size=256, n_head=1, **kind)).flops(1) / 3 - attention
    width, rows = round(flops(memory) / (4 * 32)), []
    for name, kind in ((f"MLP, {width} wide", dict(layers="A", n_embd=32, n_mlp=width)), ("F, 4,096 slots", memory)):
        size = sum(p.numel() for p in GPT(GPTConfig(vocab_size=256, n_head=1, **kind)).blocks[0].mlp.parameters())
        row = {"layer": name, "FLOPs": flops(kind), "params": size, "ms a step": 0.0, "learned": 0}
        for n in (2 ** i for i in range(10, 17)):
            right, start = 0.0, time.perf_counter()
            for tries, scale in enumerate((1.0, 0.25, 4.0), 1):
                right = max(right, learn_pairs(kind, n, scale))
                if right >= 0.99:
                    row["learned"] = n
                    break
            row[f"{n:,}"], row["ms a step"] = right, 1000 * (time.perf_counter() - start) / tries / 1000
            if right < 0.9:
                break
        rows.append(row)
    rows.append({"layer": "F / MLP", **{k: rows[1][k] / rows[0][k] for k in ("FLOPs", "params", "learned", "ms a step")}})
    return show(cfg, "random pairs learned to 99% in 1,000 steps of 512; share right by their number, best of 3 learning rates", rows)


def distill(cfg):
    """students whose feed-forward layers are memories, and smaller ones, beside their teacher and themselves from scratch"""
    teacher = os.path.join(kept(cfg, "teacher", "shakespeare_cpu", max_iters=750, eval_interval=750), "ckpt.pt")
    memory = dict(layers="AFFF", mem_head=2, mem_dim=32, mem_top=8, n_mem=1024)
    kinds = {"three memories": memory, "half as wide": dict(n_embd=64, n_head=2)}
    arms = {f"{k}, {how}": {**MEMORY_MODEL, "max_iters": 600, "eval_interval": 600, **m, **t} for k, m in kinds.items()
            for how, t in (("distilled", dict(teacher=teacher, distill_match=0.0)), ("from scratch", {}))}
    arms["three memories, layers matched too"] = dict(arms["three memories, distilled"], distill_match=1.0)
    got, first = over_seeds(cfg, arms), prepare.load_checkpoint(teacher)
    rows = []
    for name, g in {"teacher": {"val_loss": first["val_loss"], "step": first["step"], "runs": [{"path": teacher}]}, **got}.items():
        model = GPT(GPTConfig(**prepare.load_checkpoint(g["runs"][0]["path"])["model_config"]))
        dense = sum(m.weight.numel() for b in model.blocks for m in b.mlp.modules() if isinstance(m, Linear))
        rows.append({"model": name, "val loss": g["val_loss"], "spread": g.get("spread", 0.0), "above the teacher": g["val_loss"] - first["val_loss"],
                     "dense feed-forward M": dense / 1e6, "params M": model.num_params() / 1e6, "steps": int(g["step"])})
    return show(cfg, f"a teacher and what learned from it on {cfg.dataset}, 4 layers, 128 wide, 12 x 64, mean of {cfg.seeds} seeds", rows)


def variants(cfg):
    """each flag of the plain model switched, one at a time: loss and time of a step at nanoGPT's CPU shape, 500 steps"""
    shape = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, max_iters=500, eval_interval=10 ** 9,
                 log_interval=500)
    arms = {"defaults": {}, "norm = layer": dict(norm="layer"), "norm = scale": dict(norm="scale"), "mlp = gelu": dict(mlp="gelu"),
            "mlp = swiglu": dict(mlp="swiglu"), "pos = learned": dict(pos="learned"), "pos = none": dict(pos="none"),
            "tie = True": dict(tie=True), "qk_norm = False": dict(qk_norm=False),
            "n_kv_head = 1": dict(n_kv_head=1), "n_kv_head = 4,2,2,1": dict(n_kv_head=(4, 2, 2, 1)),
            "n_mlp = -1,-1,-1,2048 (one wide FFN)": dict(n_mlp=(-1, -1, -1, 2048)), "n_value_embed = 4": dict(n_value_embed=4), "dropout = 0.1": dict(dropout=0.1), "optimizer = adamw":
            dict(optimizer="adamw"), "slots (64 tokens as 16 spans)": dict(history=64, aggregate=1, n_segment=2, n_span=16, span=4)}
    times = step_times(dataclasses.replace(cfg, rounds=3), {k: read_arm(**shape, **a) for k, a in arms.items()})
    got = over_seeds(cfg, {k: {**shape, **a} for k, a in arms.items()})
    rows = [{"flag": k, "val loss": g["val_loss"], "against defaults": g["val_loss"] - got["defaults"]["val_loss"],
             "spread": g["spread"], "params M": g["params"] / 1e6, "step time": compare(times[k], times["defaults"])}
            for k, g in got.items()]
    return show(cfg, f"flags on {cfg.dataset}, 4 layers, 128 wide, 12 x 64, 500 steps, mean of {cfg.seeds} seeds", rows)


def facts(cfg, sizes=(100, 1000, 10_000, 100_000, 300_000), n=400, indexed=100_000):
    """random facts, each read once and asked far outside the window, by how many are stored: right answers, seconds"""
    have(cfg, "facts")
    model, ckpt = sample.load(kept(cfg, "facts", "facts", dataset="facts"))
    tok, rows = prepare.Tokenizer(ckpt["tokenizer"]), []
    for size in sizes:
        known = prepare.random_facts(np.random.default_rng(size), size)
        asked = [known[i] for i in np.random.default_rng(0).permutation(size)[:n if size <= indexed else n // 4]]  # (seconds each)
        found = []
        read = seconds(lambda: found.append(sample.absorb(model, tok.encode("\n" + "".join(f"!{k} {v}\n" for k, v in known)))))
        entries = max(len(keys) for heads in found[0].values() for keys, *_ in heads)
        for how in ("exact", "index", "cleared") if size <= indexed else ("exact", "cleared"):  # an index takes as much room again, and more
            d = memory = None  # the one before goes first
            made = 0.0
            if how != "cleared":
                box = []
                made = seconds(lambda: box.append(sample.remembered(model, found[0], index=how == "index")))
                memory = box.pop()
            d = sample.Decoder(model, [tok.encode("\n?")], memory=memory)
            rows.append({"facts": size, "memory": how, "entries": entries if memory else 0, "GB": sum(
                t.numel() * t.element_size() for m in (memory or {}).values() for t in (m.keys, m.values)) / 1e9,
                "questions": len(asked), "right": answers(model, tok, asked, memory, rows=max(1, min(64, 2 ** 22 // entries))),
                "read s": read, "made s": made, "ms a token": 1e3 * median(seconds(lambda: d.push([4])) for _ in range(20))})
            print(rows[-1], file=sys.stderr)  # (the largest takes a quarter of an hour, and 18 GB)
    return show(cfg, "facts told once, questions for whole values, greedy, eager, fp32; ms a token: one row", rows)


PLAYS = dict(n_embd=128, n_head=4, block_size=64, mem_chunk=16, mem_head=2, mem_top=16, batch_size=16, stream=256, max_iters=1000,
             eval_interval=10 ** 9, log_interval=250)


def plays(cfg):
    """held-out plays at a window of 64: validation loss by what an associative memory keeps"""
    arms = {"AAAA, no memory": dict(PLAYS, layers="AAAA")}
    arms.update({f"AAMA, {n:,}": dict(PLAYS, layers="AAMA", mem_size=n) for n in (0, 512, 2048, 8192)})
    arms["AAMA, 2,048, keys returned"] = dict(PLAYS, layers="AAMA", mem_size=2048, mem_straight=True)
    arms["RR(RM)R, words, 0"] = dict(PLAYS, layers="RR(RM)R", chunk="space", mem_chunk=4, mem_size=0)
    arms["RR(RM)R, words, 2,048"] = dict(arms["RR(RM)R, words, 0"], mem_size=2048)
    arms["AAAA, a window of 256"] = dict(PLAYS, layers="AAAA", block_size=256, batch_size=4, stream=64)
    times = step_times(dataclasses.replace(cfg, rounds=3), {k: read_arm(**a) for k, a in arms.items()}, env=one_of_many(cfg))
    arms["AAAA, seconds of AAMA, 8,192"] = dict(PLAYS, layers="AAAA", max_iters=round(
        PLAYS["max_iters"] * compare(times["AAMA, 8,192"], times["AAAA, no memory"])))
    got = over_seeds(cfg, arms)
    rows = [{"arm": k, "val loss": g["val_loss"], "against 0": g["val_loss"] - got["RR(RM)R, words, 0" if "words" in k else "AAMA, 0"]["val_loss"],
             "spread": g["spread"], "params M": g["params"] / 1e6, "steps": int(g["step"]),
             "step time": compare(times.get(k, times["AAAA, no memory"]), times["AAAA, no memory"])} for k, g in got.items()]
    return show(cfg, f"{cfg.dataset}, windows of 64 in turn, mean of {cfg.seeds} seeds", rows)


# ---------------------------------------------------------------------------------------------------------------------
# memory


STORED = dict(model="nobody", kind="memory", key=(64, "float32"), value=(64, "float32"))


def batch_of(b, n=200):
    """The b-th batch of a store that is written to be killed: keys, values, texts."""
    keys, values = np.random.default_rng(b).standard_normal((2, n, 64), dtype=np.float32)
    return keys, values, [f"entry {i} of batch {b}" for i in range(n)]


def write_on(path):
    """The child of kill_writers: batch after batch into a store, the uses of the batch before along with it, told before and after, until
    it is killed."""
    with sample.Store(path, **STORED, write=True) as store:
        n = len(batch_of(0)[2])
        for b in itertools.count(store.stats()["entries"] // n):
            batch = batch_of(b)
            print("begin", b, flush=True)
            with store.batch():
                ids = store.add(0, [0] * n, *batch)
                if b:
                    store.touch(ids - n)
            print("done", b, flush=True)


def kill_writers(path, kills, seed=0):
    """A store that is written by one process after another, each killed (SIGKILL) after a random part of a quarter of a second; what this
    process then finds in it -> figures."""
    g, out = np.random.default_rng(seed), dict.fromkeys(("kills", "in the middle of a batch", "batches told committed", "of them lost",
                                                         "damaged or half written", "same answers"), 0)
    q, batches = torch.from_numpy(g.standard_normal((8, 64), dtype=np.float32)), []
    for _ in range(kills):
        p = subprocess.Popen([sys.executable, os.path.abspath(__file__), "_writer", path], stdout=subprocess.PIPE, text=True)
        said = [p.stdout.readline()]
        time.sleep(g.uniform(0, 0.25))
        p.kill()
        said = [line.split() for line in said + p.stdout.readlines() if line.endswith("\n")]
        p.wait()
        told = 1 + max((int(b) for what, b in said if what == "done"), default=int(said[0][1]) - 1)  # batches
        with sample.Store(path, STORED["model"]) as store:
            a, texts = store.arrays(0), [e[5] for some in store.entries() for e in some]
            sound = store.db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        n = len(batch_of(0)[2])
        batches += [batch_of(b) for b in range(len(batches), -(-len(texts) // n))]
        keys, values = (np.concatenate([np.empty((0, 64), np.float32), *(b[i] for b in batches)]) for i in (0, 1))
        uses = np.repeat(([1] * len(batches) + [0])[1:], n)
        whole = sound and texts == [t for b in batches for t in b[2]] and all(
            np.array_equal(a[k], v) for k, v in (("keys", keys), ("values", values), ("uses", uses)))
        answers = [search(q, torch.from_numpy(k), 32) for k in (a["keys"], keys)] if whole and batches else []
        out["kills"] += 1
        out["in the middle of a batch"] += said[-1][0] == "begin"
        out["batches told committed"] = told
        out["of them lost"] += max(told - len(batches), 0)
        out["damaged or half written"] += not whole
        out["same answers"] += whole and all(torch.equal(x, y) for x, y in zip(*answers))
    return out


def crash(cfg, kills=50):
    """a store whose writer is killed 50 times in the middle of writing: nothing committed is lost, nothing is half written"""
    path = os.path.join(scratch(), "store.db")
    figures = kill_writers(path, kills)
    return show(cfg, "SIGKILL while writing, then read by another process", [{**figures, "MB": os.path.getsize(path) / 2 ** 20}])


LAMBDAS, TEMPS, KS = np.linspace(0, 0.8, 21), 2.0 ** np.arange(-7, 2), (16, 64, 256)  # temperatures: times the channels


def tuned(logp, far, hits, C, fits):
    """The weight, temperature and k of a kNN-LM that are best where fits (n,) says, and the nats (n,) of each place with them. logp (n,): of
    the right token by the model; far, hits (n, K): distances of the entries found, and whether the right token stood behind each."""
    best = (math.inf,)
    for k, temp in itertools.product(KS, C * TEMPS):
        p = ((-far[:, :k] / temp).softmax(1) * hits[:, :k]).sum(1)
        for lam in LAMBDAS:
            nats = -(logp.exp() * (1 - lam) + lam * p).log()
            here = nats[fits].mean().item()
            if here < best[0] - 1e-7:
                best = here, lam, temp, k, nats
    return best[1:]


def behind(h, places, k, size=64):
    """Squared distances and rows (n, k) of the entries of a text h (N, C) nearest to each of its places, of those before the place alone."""
    out = []
    for p in places.split(size):
        keys = h[:p[-1]].float()
        far = torch.cdist(h[p].float(), keys).square().masked_fill(torch.arange(len(keys)) >= p[:, None], math.inf)
        out.append(far.topk(k, largest=False))
    return [torch.cat(t) for t in zip(*out)]


@torch.inference_mode()
def knn(cfg, sizes=(30_000, 100_000, 300_000), n=6000):
    """kNN-LM: validation loss with the training text, or with what stands before in the text itself; tuned and scored on different halves"""
    folder = kept(cfg, "judge", **JUDGE)
    model, ckpt = sample.load(folder)
    tok, C, K = prepare.Tokenizer(ckpt["tokenizer"]), model.cfg.n_embd, max(KS)
    train_ids, val_ids = (np.asarray(prepare.open_bin(os.path.join(cfg.data_dir, cfg.dataset, f"{s}.bin"))[0]).tolist()
                          for s in ("train", "val"))
    right, h, logp = torch.tensor(val_ids[1:]), [], []
    for vectors, logits in sample.outputs(model, val_ids):
        logp.append(logits.log_softmax(-1).gather(1, right[sum(map(len, h)):][:len(logits), None])[:, 0])
        h.append(vectors.half())
    h, logp = torch.cat(h), torch.cat(logp)
    at = torch.linspace(K, len(right) - 1, 2 * n).long()  # what is scored: places evenly over the split, of which the first half tunes
    fits = torch.arange(2 * n) < n
    rows = [{"datastore": "none", "val loss": -logp[at][~fits].mean().item()}]

    def row(name, entries, far, tokens, **more):
        lam, temp, k, nats = tuned(logp[at], far, tokens == right[at, None], C, fits)
        gain = (-logp[at] - nats)[~fits]
        rows.append({"datastore": name, "entries": entries, "lambda": lam, "temp": temp / C, "k": k, "val loss": nats[~fits].mean().item(),
                     "gain": gain.mean().item(), "95%": 1.96 * (gain.std() / n ** 0.5).item(), **more})

    def look(near, own=False):
        return [torch.cat(t) for t in zip(*(near.find(h[p], p if own else None) for p in at.split(256)))]

    places = itertools.cycle(at.split(1))
    path = os.path.join(scratch(), "knn.db")
    with sample.Store(path, prepare.checkpoint_id(prepare.checkpoint_path(folder)), "knn", (C, "float16"), (1, "int32"), True) as store:
        for before, size in itertools.pairwise((0, *sizes)):
            sample.learn_knn(store, model, tok, train_ids[before:size + 1])
            t0 = time.perf_counter()
            near = sample.Neighbours.open(store, K, 0.25, 10.0)
            read = time.perf_counter() - t0
            far, found = look(near)
            one = turns({"find": lambda: near.find(h[next(places)])}, cfg.rounds, seconds, 0.5)["find"]
            row("training text", size, far, near.tokens[found], **{
                "ms a token": 1000 * median(one), "MB": store.stats()["bytes"] / 2 ** 20, "read, s": read})
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    row("training text, its tokens shuffled", size, far, near.tokens[order][found])
    recent, back = behind(h, at, K)
    row("this text, before the place", len(h), recent, right[back])
    both, order = torch.cat((far, recent), 1).sort(1)
    row("both", size + len(h), both[:, :K], torch.cat((near.tokens[found], right[back]), 1).gather(1, order)[:, :K])
    far, found = look(sample.Neighbours(h, right, K, 0.25, 10.0), own=True)
    row("this text but for the place: its future too", len(h), far, right[found])
    return show(cfg, f"kNN-LM, {cfg.dataset}, 4 layers, 128 wide: tuned on {n:,} places of one half of the validation split, scored on "
                     f"{n:,} of the other", rows)


CLAIMS = {"speed": speed, "parts": parts, "decode": decode, "main": main_job, "cpu": time_to_loss, "a100": a100, "best": best, "slots": slots,
          "variants": variants, "spans": spans, "cipher": cipher, "stream": stream, "soft": soft,
          "semantic": semantic, "chain": chain, "coherence": coherence, "formal": formal, "formal_more": formal_more, "levels": levels, "concepts": concepts,
          "blocks": blocks, "exits": exits, "exit_speed": exit_speed, "speculate": speculate, "contrast": contrast, "retrieval": retrieval,
          "crash": crash, "knn": knn, "facts": facts, "plays": plays, "featural": featural, "distill": distill}


def main(argv):
    if argv[:1] == ["_arm"]:
        return serve()
    if argv[:1] == ["_writer"]:
        return write_on(argv[1])
    if argv[:1] == ["render"]:
        return render(argv[1:])
    doc = __doc__.replace("CLAIMS", "\n".join(f"{'' if i == 0 else ' ' * 38}{k:14} {f.__doc__}"
                                              for i, (k, f) in enumerate(CLAIMS.items())))
    values, claims = config.parse(argv, BenchConfig, doc=doc, words=list(CLAIMS))
    cfg = config.build(BenchConfig, **values)
    for preset in cfg.presets:
        read_arm(preset)
    if cfg.profile:
        profile_presets(cfg)
    for name in claims:
        CLAIMS[name](cfg)
    if not claims and not cfg.profile:
        all_presets(cfg)
    return 0


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


def to_cell(value):
    """Return a value as the text of a cell of a Markdown table."""
    if type(value) in (int, float):
        value = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value).replace("|", "\\|")


def to_table(columns, rows):
    """Return a Markdown table."""
    head, *body = (f"| {' | '.join(map(to_cell, line))} |\n" for line in (columns, *rows))
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
             *tables, *prose[1:]]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def render_mechanisms(records):
    """Return README's table of mechanisms."""
    found = [{**r["mechanism"], "claim": r["claim"]} for r in records if r.get("mechanism")]
    rows = []
    for m in sorted(found, key=lambda m: m["order"]):
        link = f"[{m['name']}](docs/RESULTS.md#{m['claim']})"
        rows.append((link, m["flags"], m["does"], m["verdict"], m["figure"]))
    return to_table(("mechanism", "flags", "what it does", "verdict", "figure"), rows)


def read_records(root):
    """Return {file name: record} of docs/results; UserError names a file that is no record."""
    records = {}
    for path in sorted(glob.glob(os.path.join(root, "docs", "results", "*.json"))):
        name = os.path.basename(path)
        wanted = {"entries"} if name == "log.json" else RECORD_FIELDS
        try:
            with open(path, encoding="utf-8") as f:
                records[name] = json.load(f)
            missing = wanted - records[name].keys()
        except (ValueError, AttributeError) as e:
            raise UserError(f"record {path} cannot be read ({e})") from None
        if missing:
            raise UserError(f"record {path} has no {', '.join(sorted(missing))}")
    return records


def rendered(root):
    """Return {path: text} of the files that are rendered in the repository `root`."""
    records = read_records(root)
    entries = records.pop("log.json")["entries"]
    claims = sorted(records.values(), key=lambda r: r["order"])
    contents = "".join(f"- [{r['title']}](#{r['claim']})\n" for r in claims) + "\n"
    columns = ("what", "measured", "commit")
    log = to_table(columns, [[e[k] for k in columns] for e in entries])
    with open(os.path.join(root, "README.md"), encoding="utf-8") as f:
        before, start, rest = f.read().partition("<!-- render: mechanisms -->\n")
    _, end, after = rest.partition("<!-- end -->")
    readme = before + start + render_mechanisms(claims) + end + after
    return {"docs/RESULTS.md": RESULTS_HEAD + contents + "\n".join(map(render_record, claims)),
            "docs/LOG.md": LOG_HEAD + log, "README.md": readme if start and end else None}


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
    if files["README.md"] is None:
        raise UserError("README.md has no lines <!-- render: mechanisms --> and <!-- end -->")
    stale = []
    for name, text in files.items():
        path = os.path.join(root, name)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                if f.read() == text:
                    continue
        stale.append(name)
        if not argv:
            with open(path, "w", encoding="utf-8", newline="\n") as f:
                f.write(text)
    verb = "is not what the records give; run python bench.py render" if argv else "written"
    for name in stale:
        print(f"{name}: {verb}")
    return int(bool(argv and stale))


if __name__ == "__main__":
    config.run(main)
