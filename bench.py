"""Measures: speed, and the claims of the README.

    python bench.py                   every preset: parameters, ms a step, tokens/s, memory, MFU, decoding, beside nanoGPT
    python bench.py CLAIM             rerun one claim of the README and print its table:
                                      CLAIMS
    python bench.py --profile         where the time of a step goes, by operator

Speeds are medians of A B A B turns within one run, each arm in a process of its own. Losses are cross-entropy on the whole
validation split, nats a token.
"""
import contextlib
import dataclasses
import glob
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from statistics import mean, median

import config  # before torch: it sets an allocator switch that torch reads when imported
import numpy as np
import torch

import prepare
import sample
import train
from config import UserError
from model import GPT, GPTConfig
from train import TrainConfig

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class BenchConfig:
    json: bool = False  # print the table as JSON lines
    profile: bool = False  # torch profiler over a training step of every preset
    presets: tuple[str, ...] = ()  # only these presets; repeatable
    rounds: int = 5  # turns of A B A B
    seeds: int = 3  # seeds of a claim that trains
    dataset: str = "shakespeare"  # dataset of a claim that trains
    data_dir: str = "data"  # where datasets are kept
    out_dir: str = ""  # keep the runs of a claim here; default: a temporary folder

    def __post_init__(self):
        config.within(self, 1, None, "rounds", "seeds")


# ---------------------------------------------------------------------------------------------------------------------
# arms: a process each, so that memory, allocator and compiler caches do not mix


def read_arm(preset=None, **overrides):
    """({model settings}, {training settings}) of a preset's name with overrides."""
    argv = [os.path.join(HERE, "config", preset + ".py")] if preset else []
    m, t, _ = config.parse(argv, GPTConfig, TrainConfig)
    model_fields = {f.name for f in dataclasses.fields(GPTConfig)}
    for k, v in overrides.items():
        (m if k in model_fields else t)[k] = v
    return m, t


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
        r = train.train(GPTConfig(**m), TrainConfig(**t), say=lambda s: print(s, flush=True))
        r.update(altered(m, t, first["ablate"]) if first["ablate"] else {}, peak_mb=peak_mb())
        print(json.dumps(r), flush=True)
        return
    mcfg, tcfg = GPTConfig(**{"vocab_size": 65, **m}), TrainConfig(**t)
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


ABLATIONS = {"history shuffled": shuffle_history, "slots empty": lambda h: torch.full_like(h, -1)}


def altered(m, t, names):
    """{ablation: validation loss} of the checkpoint that was just trained, its histories altered at evaluation."""
    tcfg = TrainConfig(**{**t, "compile": False})
    ckpt = prepare.load_checkpoint(os.path.join(tcfg.out_dir, "ckpt.pt"))
    mcfg = GPTConfig(**ckpt["model_config"])
    run = train.Runner(mcfg, tcfg, train.find_place(tcfg))
    run.model.load_state_dict(ckpt["model"])
    data = train.Data(tcfg, mcfg, "val")
    return {name: run.evaluate(data, ABLATIONS[name])[0] for name in names}


def peak_mb():
    """Peak memory so far: of the GPU where there is one, otherwise of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def turns(arms, rounds, ask, seconds=1.0):
    """Each arm asked in turn, `rounds` times: {name: [seconds per round]}. An arm does as many steps as fit `seconds`."""
    n, out = {}, {k: [] for k in arms}
    for k, a in arms.items():
        n[k] = max(1, int(seconds / ask(a, 1)))
    for _ in range(rounds):
        for k, a in arms.items():
            out[k].append(ask(a, n[k]))
    return out


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


def fit(cfg, preset=None, seed=1, ablate=(), cold=False, **overrides):
    """Train one arm in a process of its own; -> what train.train returns, `wall` seconds of the whole process, and the
    losses under ablations. cold: with an empty compiler cache."""
    m, t = read_arm(preset, **overrides)
    t.update(dataset=cfg.dataset, data_dir=cfg.data_dir, seed=seed)
    keep = cfg.out_dir or tempfile.mkdtemp(prefix="bench-")
    t["out_dir"] = os.path.join(keep, overrides.get("out_dir") or f"{preset or 'arm'}-{os.getpid()}-{time.time_ns()}")
    start = time.perf_counter()
    arm = Arm(m, t, {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp()} if cold else None, train=True, ablate=list(ablate))
    arm.close()
    return {**arm.info, "wall": time.perf_counter() - start}


def over_seeds(cfg, *args, **kw):
    """fit for each seed -> {figure: mean over seeds}, and "spread", the largest minus the smallest validation loss."""
    runs = [fit(cfg, *args, seed=s, **kw) for s in range(1, cfg.seeds + 1)]
    out = {k: mean(r[k] for r in runs) for k, v in runs[0].items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {**out, "spread": max(r["val_loss"] for r in runs) - min(r["val_loss"] for r in runs), "runs": runs}


def step_times(cfg, arms, seconds=1.0):
    """{name: [seconds a step per round]} of arms given as (model settings, training settings), in turns."""
    live = {k: Arm(*a) for k, a in arms.items()}
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
    with the cache and recomputing the window, in fp32; with `more` also the compiled step in fp32 and bf16, and a KV-cached
    transformers GPT-2 of the same shape, where that package is installed."""
    cfg = GPTConfig(**{"vocab_size": 65, **m})
    half = np.random.default_rng(0).integers(0, cfg.vocab_size, cfg.block_size // 2).tolist()
    room = cfg.block_size - len(half) - 1
    window = torch.randint(cfg.vocab_size, (1, cfg.block_size))

    def timed(push, n):
        t0 = time.perf_counter()
        for _ in range(n):
            push()
        return (time.perf_counter() - t0) / n

    def ours(dtype=torch.float32, compile=False):
        model = GPT(cfg).eval().to(dtype)
        model.dtype = dtype
        d = sample.Decoder(model, [half], compile=compile)

        def run(n):
            d.rows = [([], list(half))]
            d.fill()
            return timed(lambda: d.push([1]), min(n, room))
        return run

    model = GPT(cfg).eval()
    arms = {"cache": ours(), "recomputing": lambda n: timed(torch.inference_mode()(lambda: model(window)), n)}
    if more:
        arms.update({"cache, compiled": ours(compile=True), "cache, compiled, bf16": ours(torch.bfloat16, True)})
    if more and importlib.util.find_spec("transformers"):
        from transformers import GPT2Config, GPT2LMHeadModel
        other = GPT2LMHeadModel(GPT2Config(vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd,
                                           n_layer=cfg.n_layer, n_head=cfg.heads(0)[0], bos_token_id=0, eos_token_id=0)).eval()

        @torch.inference_mode()
        def theirs(n):
            box = [other(window[:, :len(half)], use_cache=True).past_key_values]

            def push():
                box[0] = other(window[:, :1], past_key_values=box[0], use_cache=True).past_key_values
            return timed(push, min(n, room))
        arms["transformers GPT-2"] = theirs
    return arms


def decode_times(m, rounds, more=False):
    arms = decode_arms(m, more)
    for f in arms.values():
        f(1)  # compile
    return turns(arms, rounds, lambda f, n: f(n), seconds=0.5)


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


def decode(cfg):
    """tokens/s of decoding: cached, compiled, recomputing, and transformers' GPT-2 (pip install transformers)"""
    m, _ = read_arm(**next(iter(SIZES.values())))
    times = decode_times(m, cfg.rounds, more=True)
    rows = [{"decoding": k, "tokens/s": 1 / median(v), "/ recomputing": compare(times["recomputing"], v),
             **({"/ transformers": compare(times["transformers GPT-2"], v)} if "transformers GPT-2" in times else {})}
            for k, v in times.items()]
    return show(cfg, "decoding, 6 layers, 384 wide, window 256, one row (fp32 where not said)", rows)


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


def main_job(cfg):
    """the main job, and the same model with its slots off for the same seconds of steps"""
    on = fit(cfg, "softar_shakespeare")
    off_settings = dict(history=0, aggregate=0, n_segment=0, n_span=0, span=0)
    m, t = read_arm("softar_shakespeare")
    times = step_times(cfg, {"on": (m, t), "off": read_arm("softar_shakespeare", **off_settings)}, seconds=4.0)
    steps = round(t["max_iters"] * compare(times["on"], times["off"]))
    off = fit(cfg, "softar_shakespeare", **off_settings, max_iters=steps)
    rows = [{"arm": k, "steps": r["step"], "seconds of steps": r["step_seconds"], "seconds in all": r["wall"],
             "val loss": r["val_loss"]} for k, r in (("slots", on), ("no slots, steps timed for equal seconds", off))]
    return show(cfg, f"main job on {cfg.dataset}, seed 1", rows)


def time_to_loss(cfg):
    """seconds to val 1.88: config/shakespeare_cpu.py beside nanoGPT's CPU recipe, in turns, cold compiler caches"""
    rows = []
    for seed in range(1, cfg.seeds + 1):
        for preset in ("shakespeare_cpu", "nanogpt_cpu"):
            r = fit(cfg, preset, seed=seed, cold=True, eval_interval=10 ** 9, log_interval=200)
            rows.append({"preset": preset, "seed": seed, "val loss": r["val_loss"], "steps": r["step"], "seconds of steps":
                         r["step_seconds"], "first step (compiling)": r["compile_seconds"], "process, seconds": r["wall"]})
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


def slot_arms(H, span, rows=64):
    """The arms of the slot claims for a history of H tokens: none, slots, uncompressed, and an ordinary window. All are
    scored on the same tokens: the last 16 of a row."""
    slots = dict(SLOT_MODEL, history=H, aggregate=1, n_segment=2, n_span=H // span, span=span)
    window = dict(SLOT_MODEL, block_size=H + 16, score_last=16)
    return {"a no history": SLOT_MODEL, "b slots": slots, "c uncompressed": window,
            "d ordinary window": dict(window, train_on_all=True, batch_size=max(2, rows * 80 // (H + 16)))}


def slots(cfg):
    """what 64 tokens of history are worth as slots, with ablations, beside an ordinary window at equal seconds"""
    arms = slot_arms(64, 4)
    times = step_times(cfg, {k: read_arm(**a) for k, a in arms.items()})
    t_b = times["b slots"]
    arms["d ordinary window"]["max_iters"] = round(SLOT_MODEL["max_iters"] * compare(t_b, times["d ordinary window"]))
    arms["b, binding off"] = dict(arms["b slots"], span_binding=False)
    got = {k: over_seeds(cfg, **a, ablate=list(ABLATIONS) if k == "b slots" else ()) for k, a in arms.items()}
    a, c = got["a no history"]["val_loss"], got["c uncompressed"]["val_loss"]
    rows = [{"arm": k, "val loss": g["val_loss"], "spread": g["spread"], "steps": int(g["step"]),
             "gap closed": (a - g["val_loss"]) / (a - c), "step time / c": compare(times[k], times["c uncompressed"])
             if k in times else compare(t_b, times["c uncompressed"])} for k, g in got.items()]
    rows += [{"arm": f"b, {k} at evaluation", "val loss": got["b slots"][k], "gap closed": (a - got["b slots"][k]) / (a - c)}
             for k in ABLATIONS]
    return show(cfg, f"64 tokens of history on {cfg.dataset}, mean of {cfg.seeds} seeds, {SLOT_MODEL['max_iters']} steps", rows)


def spans(cfg):
    """spans of 2 to 16 over histories of 64 to 1,024 tokens, beside an ordinary window of that length at equal seconds"""
    rows = []
    for H in (64, 256, 1024):
        for span in (2, 4, 8, 16):
            arm = slot_arms(H, span)["b slots"]
            t = step_times(dataclasses.replace(cfg, rounds=2), {"b": read_arm(**arm)})["b"]
            r = fit(cfg, **arm)
            rows.append({"history": H, "arm": f"spans of {span}", "slots": H // span + 3, "val loss": r["val_loss"],
                         "steps": r["step"], "ms a step": 1000 * median(t)})
            if span == 4:
                arm = slot_arms(H, span)["d ordinary window"]
                d = step_times(dataclasses.replace(cfg, rounds=2), {"d": read_arm(**arm)})["d"]
                r = fit(cfg, **{**arm, "max_iters": round(arm["max_iters"] * median(t) / median(d))})
                rows.append({"history": H, "arm": f"window of {H + 16}, equal seconds to spans of 4", "val loss": r["val_loss"],
                             "steps": r["step"], "ms a step": 1000 * median(d)})
    return show(cfg, f"spans and histories on {cfg.dataset}, seed 1", rows)


def cipher(cfg):
    """the cipher task: no history, slots, and the history uncompressed, above the source's entropy rate"""
    cfg = dataclasses.replace(cfg, dataset="cipher")
    floor = prepare.open_dataset("cipher", cfg.data_dir)["entropy_rate"]
    off = dict(history=0, aggregate=0, n_segment=0, n_span=0, span=0)
    arms = {"no history": off, "slots": {}, "uncompressed": dict(off, block_size=272, score_last=16)}
    got = {k: over_seeds(cfg, "cipher", **a, eval_interval=10 ** 9) for k, a in arms.items()}
    top, low = got["no history"]["val_loss"], got["uncompressed"]["val_loss"]
    rows = [{"arm": k, "val loss": g["val_loss"], "spread": g["spread"], "above the floor": g["val_loss"] - floor,
             "gap closed": (top - g["val_loss"]) / (top - low), "ms a step": 1000 * g["step_seconds"] / g["step"]}
            for k, g in got.items()]
    return show(cfg, f"cipher, mean of {cfg.seeds} seeds, entropy rate {floor:.4f}", rows)


def stream(cfg, total=100_000, block=10_000):
    """100,000 characters from one prompt with slots: memory and time a token"""
    m, _ = read_arm("softar_shakespeare", n_layer=4, n_embd=128)
    d = sample.Decoder(GPT(GPTConfig(**{"vocab_size": 65, **m})).eval(), [[1]])
    generator, scfg, rows = torch.Generator().manual_seed(1), sample.SampleConfig(max_new_tokens=total), []

    def rss():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20

    t0 = time.perf_counter()
    for i, _ in enumerate(sample.generate(d, scfg, generator=generator), 1):
        if i == 1000 or i % block == 0:
            t1 = time.perf_counter()
            rows.append({"tokens": i, "memory MB": rss(), "ms a token": 1000 * (t1 - t0) / (i if i == 1000 else block),
                         "ids kept": sum(map(len, d.rows[0]))})
            t0 = time.perf_counter()
    return show(cfg, "one stream, 4 layers, 128 wide, window 256, history 256", rows)


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
    got = {k: over_seeds(cfg, **shape, **a) for k, a in arms.items()}
    rows = [{"flag": k, "val loss": g["val_loss"], "against defaults": g["val_loss"] - got["defaults"]["val_loss"],
             "spread": g["spread"], "params M": g["params"] / 1e6, "step time": compare(times[k], times["defaults"])}
            for k, g in got.items()]
    return show(cfg, f"flags on {cfg.dataset}, 4 layers, 128 wide, 12 x 64, 500 steps, mean of {cfg.seeds} seeds", rows)


CLAIMS = {"speed": speed, "parts": parts, "decode": decode, "main": main_job, "cpu": time_to_loss, "a100": a100, "slots": slots,
          "variants": variants, "spans": spans, "cipher": cipher, "stream": stream}


def main(argv):
    if argv[:1] == ["_arm"]:
        return serve()
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


if __name__ == "__main__":
    config.run(main)
