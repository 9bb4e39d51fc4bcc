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

    def __init__(self, m, t):
        self.p = subprocess.Popen([sys.executable, os.path.abspath(__file__), "_arm"], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True, cwd=os.getcwd())
        self.info = self.ask(m=m, t=t)

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
        print(json.dumps({**r, "peak_mb": peak_mb()}), flush=True)
        return
    mcfg, tcfg = GPTConfig(**{"vocab_size": 65, **m}), TrainConfig(**t)
    run = train.Runner(mcfg, tcfg, train.find_place(tcfg))
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(mcfg.vocab_size, (2, run.n_rows, mcfg.block_size), generator=g)
    h = torch.randint(mcfg.vocab_size, (run.n_rows, mcfg.history), generator=g)
    if tcfg.score_last:
        y[:, :-tcfg.score_last] = -1
    tcfg.max_iters = 10 ** 9  # constant learning rate

    def step():
        t0 = time.perf_counter()
        run.step(0, x, y, h, int((y >= 0).sum()))
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


def fit(cfg, preset=None, seed=1, **overrides):
    """Train one arm in a process of its own; -> what train.train returns."""
    m, t = read_arm(preset, **overrides)
    t.update(dataset=cfg.dataset, data_dir=cfg.data_dir, seed=seed)
    keep = cfg.out_dir or tempfile.mkdtemp(prefix="bench-")
    t["out_dir"] = os.path.join(keep, overrides.get("out_dir") or f"{preset or 'arm'}-{os.getpid()}-{time.time_ns()}")
    arm = object.__new__(Arm)
    arm.p = subprocess.Popen([sys.executable, os.path.abspath(__file__), "_arm"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    start = time.perf_counter()
    try:
        out = arm.ask(m=m, t=t, train=True)
    finally:
        arm.close()
    return {**out, "wall": time.perf_counter() - start}


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


def decode_arms(m, tokens=64):
    """{name: function(n) -> seconds a token} for one shape with random weights: with the cache, recomputing the window,
    and a KV-cached transformers GPT-2 of the same shape, where that package is installed. All in fp32, one row, positions
    half way into the window."""
    cfg = GPTConfig(**{"vocab_size": 65, **m})
    model = GPT(cfg).eval()
    half = list(np.random.default_rng(0).integers(0, cfg.vocab_size, cfg.block_size // 2))
    d = sample.Decoder(model, [list(map(int, half))])

    def timed(f, n):
        t0 = time.perf_counter()
        for _ in range(n):
            f()
        return (time.perf_counter() - t0) / n

    def cached(n):
        d.rows, n = [([], list(map(int, half)))], min(n, cfg.block_size // 2 - 1)
        d.fill()
        return timed(lambda: d.push([1]), n)

    window = torch.randint(cfg.vocab_size, (1, cfg.block_size))
    arms = {"cache": cached}
    with torch.inference_mode():
        arms["recomputing"] = lambda n: timed(torch.inference_mode()(lambda: model(window)), n)
    if importlib.util.find_spec("transformers"):
        from transformers import GPT2Config, GPT2LMHeadModel
        h, _, _ = cfg.heads(0)
        other = GPT2LMHeadModel(GPT2Config(vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd,
                                           n_layer=cfg.n_layer, n_head=h)).eval()

        def theirs(n):
            n = min(n, cfg.block_size // 2 - 1)
            with torch.inference_mode():
                cache = other(window[:, :cfg.block_size // 2], use_cache=True).past_key_values
                box = [cache]

                def push():
                    box[0] = other(window[:, :1], past_key_values=box[0], use_cache=True).past_key_values
                return timed(push, n)
        arms["transformers GPT-2"] = theirs
    return arms


def decode_row(m, rounds):
    times = turns(decode_arms(m), rounds, lambda f, n: f(n), seconds=0.5)
    row = {"cached tokens/s": 1 / median(times["cache"]), "recomputed tokens/s": 1 / median(times["recomputing"]),
           "cache / recomputing": compare(times["recomputing"], times["cache"])}
    if "transformers GPT-2" in times:
        row.update({"transformers tokens/s": 1 / median(times["transformers GPT-2"]),
                    "cache / transformers": compare(times["transformers GPT-2"], times["cache"])})
    return row


def all_presets(cfg):
    """The table of python bench.py."""
    names = cfg.presets or sorted(os.path.basename(p)[:-3] for p in glob.glob(os.path.join(HERE, "config", "*.py"))
                                  if not p.endswith("__init__.py"))
    rows = []
    for name in names:
        m, t = read_arm(name)
        print(f"measuring {name} ...", file=sys.stderr)
        row = {"preset": name, **train_speed(m, t, cfg.rounds)}
        d = decode_row(m, cfg.rounds)
        rows.append({**row, "decode/s": d["cached tokens/s"], "uncached/s": d["recomputed tokens/s"]})
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
    """tokens/s of decoding with a cache, without, and transformers' GPT-2 (pip install transformers)"""
    m, _ = read_arm(**next(iter(SIZES.values())))
    return show(cfg, "decoding, 6 layers, 384 wide, window 256, fp32, one row", [decode_row(m, cfg.rounds)])


def profile(step):
    """Time of one step by operator, of the compiled graph's own kernels too, from the torch profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        step()
    events = sorted(p.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return {"rows": [{"operator": e.key[:70], "ms": e.self_cpu_time_total / 1000, "share": e.self_cpu_time_total / total,
                      "calls": e.count} for e in events[:15]]}


def profile_presets(cfg):
    for name in cfg.presets or ["softar_shakespeare"]:
        arm = Arm(*read_arm(name))
        arm.ask(do="steps", n=2)
        show(cfg, f"one step of {name}", arm.ask(do="profile")["rows"])
        arm.close()


# ---------------------------------------------------------------------------------------------------------------------
# claims that train


def main_job(cfg):
    """the main job, and the same model with its slots off for the same seconds of steps"""
    on = fit(cfg, "softar_shakespeare")
    off_settings = dict(history=0, aggregate=0, n_segment=0, n_span=0, span=0)
    m, t = read_arm("softar_shakespeare")
    arms = {"on": Arm(m, t), "off": Arm(*read_arm("softar_shakespeare", **off_settings))}
    times = turns(arms, cfg.rounds, lambda a, n: a.ask(do="steps", n=n)["seconds"])
    for a in arms.values():
        a.close()
    steps = round(t["max_iters"] * compare(times["on"], times["off"]))
    off = fit(cfg, "softar_shakespeare", **off_settings, max_iters=steps)
    rows = [{"arm": k, "steps": r["step"], "seconds of steps": r["step_seconds"], "seconds in all": r["wall"],
             "val loss": r["val_loss"]} for k, r in (("slots", on), ("no slots, equal seconds", off))]
    return show(cfg, f"main job on {cfg.dataset}, seed 1", rows)


CLAIMS = {"speed": speed, "decode": decode, "main": main_job}


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
