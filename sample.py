"""Decoding: every way to turn a model into text.

    python sample.py                                        500 tokens from the newest checkpoint under out/
    python sample.py --prompt="ROMEO:" --n=3 --top_p=0.9
    python sample.py --prompt=FILE:scene.txt --temperature=0
    python sample.py --amateur=out/small/ckpt.pt            contrastive decoding against a weaker model
    python sample.py --soft --collapse=entropy --trace      tokens stay soft until the model is sure

There is no upper bound on max_new_tokens: when the window is full, its oldest quarter folds into the context slots, or is
dropped where the model has none.
"""
import codecs
import glob
import json
import math
import os
import sys
from dataclasses import dataclass

import config  # before torch: it sets the allocator's switches
import numpy as np
import torch
from torch.nn import functional as F

import prepare
from config import UserError
from model import GPT, GPTConfig, Level, rms_norm


@dataclass
class SampleConfig:
    out_dir: str = ""  # folder of a checkpoint, or a checkpoint file; default: the newest under out/
    prompt: str = "\n"  # text to go on from; FILE:path reads a file, - reads standard input
    n: int = 1  # samples
    max_new_tokens: int = 500  # tokens to make; no upper bound
    temperature: float = 0.8  # 0: the most likely token always
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the most likely tokens that hold this share of the probability
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the most likely one
    repetition_penalty: float = 1.0  # divide the odds of tokens in the window (CTRL, arXiv:1909.05858); 1: off
    stop: str = ""  # end a sample before this text
    amateur: str = ""  # contrastive decoding against this checkpoint
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
    trace: bool = False  # show soft tokens in colour on a terminal
    json: bool = False  # a JSON line a token: its entropy, whether it was soft, which before it were when it was chosen
    seed: int = 1337  # of the choices
    device: str = "auto"  # auto (a GPU where there is one) | cpu | cuda | mps
    dtype: str = "float32"  # float32 | bfloat16
    compile: bool = False  # compile the decoding step: half a minute once, then several times as fast on a CPU

    def __post_init__(self):
        config.within(self, 1, None, "n")
        config.within(self, 0, None, "max_new_tokens", "temperature", "top_k", "beta", "seed")
        config.within(self, 0, 1, "top_p", "min_p", "alpha")
        config.within(self, 0.01, 100, "repetition_penalty")
        config.within(self, 0, None, "soft_top_k", "gumbel", "n_think")
        config.within(self, -1, None, "collapse_back", "collapse_threshold")
        if self.soft and self.temperature == 0:
            raise ValueError("soft needs a temperature above 0: at 0 a token has nothing soft about it")
        if self.collapse_by not in ("nearest", "context"):
            raise ValueError(f"collapse_by is nearest or context, not {self.collapse_by!r}")
        kind, _, every = self.collapse.partition(":")
        if self.collapse not in ("always", "never", "entropy", "distance") and not (kind == "every" and every.isdigit()
                                                                                    and int(every)):
            raise ValueError(f"collapse is always, never, entropy, distance or every:N, not {self.collapse!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is float32 or bfloat16, not {self.dtype!r}")


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


def choose(p, generator):
    """A token per row (B,), drawn from p (B, V)."""
    return torch.multinomial(p, 1, generator=generator)[:, 0]


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

    def __init__(self, model, rows, eot=None, compile=False):
        self.model, self.eot = model, eot
        self.step = torch.compile(model, dynamic=False) if compile else model
        self.T, self.H, self.V = model.cfg.block_size, model.cfg.history, model.cfg.vocab_size
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
            ring.extend(window[:n])
            del window[:n]
            del ring[:max(0, len(ring) - self.H)]
            self.soft[b] = {at - n: p for at, p in self.soft[b].items() if at >= n}
        if soft is not None:
            self.soft[b][len(window)] = soft
        window.append(token)
        return fold

    def inputs(self, first, width):
        """What the model reads of each row from place first[b] on, `width` tokens padded at the right: ids (B, width), or
        distributions (B, width, V) where one of them is soft."""
        idx = torch.tensor([(w[f:f + width] + [0] * width)[:width] for f, (_, w) in zip(first, self.rows)],
                           device=self.model.wte.weight.device)
        soft = [(b, at - f, p) for b, f in enumerate(first) for at, p in self.soft[b].items() if f <= at < f + width]
        if soft:
            idx = F.one_hot(idx, self.V).float()
            for b, at, p in soft:
                idx[b, at] = p
        return idx

    def history(self, n=None):
        """The ring behind the window of the first n rows (all), as the model takes it; None where it has no slots."""
        if not self.H:
            return None
        ring = np.array([[-1] * (self.H - len(r)) + r for r, _ in self.rows[:n]])
        return torch.from_numpy(prepare.forget(ring, self.eot)).to(self.model.wte.weight.device)

    @torch.inference_mode()
    def fill(self):
        """Slots, window and state from what is kept, in one pass over rows padded at the right."""
        device = self.model.wte.weight.device
        width = max(len(w) for _, w in self.rows)
        self.state = self.model.init_state(len(self.rows))
        logits = self.model(self.inputs([0] * len(self.rows), width), history=self.history(), state=self.state).logits
        short = torch.tensor([width - len(w) for _, w in self.rows], device=device)
        if bool(short.any()):
            self.state.rollback(short)
        self.logits = logits[torch.arange(len(self.rows), device=device), width - 1 - short]
        return logits

    @torch.inference_mode()
    def push(self, tokens, soft=None):
        """Append a token to each row, a list of B ids, or a soft one where soft[b] is a distribution (V,); -> logits
        (B, V) of the next."""
        if any([self.keep(b, t, soft and soft[b]) for b, t in enumerate(tokens)]):
            self.fill()
        else:
            self.logits = self.step(self.inputs([len(w) - 1 for _, w in self.rows], 1), state=self.state).logits[:, -1]
        return self.logits

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
        if not first:
            return
        if -first < min(len(w) for _, w in self.rows):
            self.state.rollback(-first)
            again = self.inputs([len(w) + first for _, w in self.rows], -first)
            self.logits = self.model(again, state=self.state).logits[:, -1]
        else:
            self.fill()

    @torch.inference_mode()
    def select(self, rows):
        """A Decoder over these rows of this one; a row may be taken several times, and what it holds is computed once."""
        new = object.__new__(Decoder)
        new.__dict__.update(self.__dict__)
        new.rows = [(list(self.rows[r][0]), list(self.rows[r][1])) for r in rows]
        new.soft = [dict(self.soft[r]) for r in rows]
        at = torch.tensor(rows, device=self.logits.device)
        new.state, new.logits = self.state.select(at), self.logits[at]
        return new

    def planned(self):
        """Whether the model plans chunks of tokens that can be read back: a level that stands first and sums them."""
        level = self.model.order[0]
        return isinstance(level, Level) and level.head is not None and level.compose is None and level.chunk != "space"

    @torch.inference_mode()
    def plan_lines(self, tok):
        """For each chunk that row 0's window holds now, the tokens whose composition is nearest to the concept that is predicted
        from what stands before it, beside what was written."""
        device = self.model.wte.weight.device
        made = next(m for m in self.model.concepts(torch.tensor([self.rows[0][1]], device=device), self.history(1))
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


@dataclass
class Made:
    """A token of a sample: its id, whether it was made soft, the entropy of its choice in nats, and which places before it
    (-1 is the one before) were soft when it was chosen."""
    token: int
    soft: bool
    entropy: float
    behind: list


def next_token(expert, amateur, cfg):
    """Probabilities (B, V) of the next token by all that the settings say."""
    logits = expert.logits.float()
    if amateur is not None:
        logits = contrast(logits, amateur.logits.float(), cfg.alpha, cfg.beta)
    if cfg.repetition_penalty != 1:
        logits = penalize(logits, expert.seen(), cfg.repetition_penalty)
    return distribution(logits, cfg)


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
    """Yield lists of B lists of Made, cfg.max_new_tokens for each row in all, and push them into expert (and amateur).
    Mostly a step gives one token a row; a soft token that will be chosen in context comes when it has collapsed.
    think = (delimiter ids, ids): ids that follow of themselves whenever a row ends with the delimiter."""
    B, table = expert.logits.size(0), expert.model.wte.weight.detach().float()
    made, forced = [[] for _ in range(B)], [[] for _ in range(B)]  # what waits to be shown; what follows of itself
    delimiter, thoughts = list(think[0]), list(think[1])
    for step in range(cfg.max_new_tokens):
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
        ready = []
        for b, token in enumerate(tokens):
            behind = sorted(at - len(expert.rows[b][1]) for at in expert.soft[b])
            made[b].append(Made(token, not hard[b], entropy[b], behind))
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


class Text:
    """The text of one row as its tokens come in: whole characters only, ended before the stop string."""

    def __init__(self, tokenizer, stop="", silent=-1):
        self.tok, self.stop, self.text, self.shown, self.done = tokenizer, stop, "", 0, False
        self.silent = silent  # the think token, which is no text
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token):
        """Take a token; -> the text that is now certain to stand."""
        if self.done or token == self.silent:
            return ""
        self.text += self.utf8.decode(self.tok.decode_bytes([token]))
        sure = len(self.text)
        if self.stop:
            at = self.text.find(self.stop)
            self.done = at >= 0
            if self.done:
                self.text, sure = self.text[:at], at
            else:  # the stop string may have begun
                sure -= next((n for n in range(min(len(self.stop) - 1, sure), 0, -1)
                              if self.text.endswith(self.stop[:n])), 0)
        out, self.shown = self.text[self.shown:sure], max(self.shown, sure)
        return out

    def end(self):
        """-> what was held back."""
        if not self.done:
            self.text += self.utf8.decode(b"", True)
        out, self.shown = self.text[self.shown:], len(self.text)
        return out


# ---------------------------------------------------------------------------------------------------------------------


def newest(root="out"):
    """The checkpoint under root that was written last."""
    found = glob.glob(os.path.join(root, "**", "ckpt.pt"), recursive=True)
    if not found:
        raise UserError(f"there is no checkpoint under {root}/; train one with python train.py, or name one with --out_dir")
    return max(found, key=os.path.getmtime)


def load(path, device="cpu", dtype="float32"):
    """(model in eval mode, checkpoint) of a checkpoint file or the folder it is in."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) or not path.endswith(".pt") else path
    ckpt = prepare.load_checkpoint(path)
    try:
        model = GPT(GPTConfig(**ckpt["model_config"]))
        model.load_state_dict(ckpt["model"])
        ckpt["tokenizer"], ckpt["step"]
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"checkpoint {path} does not fit this version ({str(e)[:100]}); train it again") from None
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {device!r} is not to be had here ({str(e).splitlines()[0][:80]}); use cpu") from None
    if dtype == "bfloat16":
        model.bfloat16()
    model.dtype = getattr(torch, dtype)
    return model.eval(), ckpt


def read_prompt(prompt):
    """The text of --prompt: itself, a file behind FILE:, or standard input for -."""
    try:
        if prompt == "-":
            text = sys.stdin.read()
        elif prompt.startswith("FILE:"):
            with open(prompt[5:], encoding="utf-8") as f:
                text = f.read()
        else:
            text = prompt
    except OSError as e:
        raise UserError(f"prompt {prompt} cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"prompt {prompt} is not UTF-8 text") from None
    if not text:
        raise UserError("the prompt is empty; give at least one character")
    return text


def main(argv):
    values, _ = config.parse(argv, SampleConfig, doc=__doc__)
    cfg = config.build(SampleConfig, **values)
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    missing = config.compiler_missing(cfg.device) if cfg.compile else ""
    if missing:
        raise UserError(f"compile needs {missing}, which was not found; install it or leave --compile out")
    path = cfg.out_dir or newest()
    model, ckpt = load(path, cfg.device, cfg.dtype)
    tok = prepare.Tokenizer(ckpt["tokenizer"])
    prompt = read_prompt(cfg.prompt)
    ids = tok.encode(prompt)
    think = ((), ())
    if cfg.n_think or cfg.think_after:
        if not model.cfg.n_think:
            raise UserError(f"{path} was not trained to think (n_think is 0); leave --n_think and --think_after out")
        if cfg.n_think > model.cfg.n_think:
            raise UserError(f"{path} thinks {model.cfg.n_think} times in a window, not {cfg.n_think}; give a smaller n_think")
        one = model.cfg.think_token
        think, ids = (tok.encode(cfg.think_after), [one] * (cfg.n_think or model.cfg.n_think)), ids + [one] * cfg.n_think
    generator = torch.Generator(device=cfg.device).manual_seed(cfg.seed)
    expert, amateur = Decoder(model, [ids], tok.eot, cfg.compile).select([0] * cfg.n), None
    if cfg.amateur:
        weak, weak_ckpt = load(cfg.amateur, cfg.device, cfg.dtype)
        if weak_ckpt["tokenizer"] != ckpt["tokenizer"]:
            raise UserError(f"amateur {cfg.amateur} has another tokenizer than {path}; it must be the same")
        amateur = Decoder(weak, [ids], tok.eot, cfg.compile).select([0] * cfg.n)
    texts = [Text(tok, cfg.stop, model.cfg.think_token if model.cfg.n_think else -1) for _ in range(cfg.n)]
    others = [[] for _ in texts]  # the first sample is shown as it is made, the others when they are whole
    print(f"[{path}, step {ckpt['step']}]", file=sys.stderr)
    if cfg.soft and not model.cfg.soft_rate:
        print("[this model never read soft tokens in training; expect poor text, or train one with --soft_rate=0.3]",
              file=sys.stderr)
    print("" if cfg.json else prompt, end="", flush=True)
    for ready in generate(expert, cfg, amateur, generator, think):
        for i, (text, tokens) in enumerate(zip(texts, ready)):
            for made in tokens:
                if text.done:
                    break
                piece = show(made, text.add(made.token), i, tok, cfg)
                if i:
                    others[i].append(piece)
                else:
                    print(piece, end="", flush=True)
        if all(t.done for t in texts):
            break
    ends = ["" if cfg.json else t.end() for t in texts]
    print(ends[0], end="" if cfg.json else "\n")
    if cfg.trace and not cfg.json and expert.planned():
        print("\n" + "\n".join(expert.plan_lines(tok)))
    for pieces, end in zip(others[1:], ends[1:]):
        print(*([] if cfg.json else ["-" * 40 + "\n" + prompt]), *pieces, end, sep="", end="" if cfg.json else "\n")
    return 0


def show(made, text, i, tok, cfg):
    """What is printed of a token of sample i, whose certain text is `text`: as it is, with soft ones in colour, or as a line
    of JSON with the token's own text."""
    if cfg.json:
        return json.dumps({"sample": i, "token": made.token, "text": tok.decode([made.token]), "soft": made.soft,
                           "entropy": round(made.entropy, 4), "soft_behind": made.behind}) + "\n"
    return f"\033[36;4m{text}\033[0m" if cfg.trace and made.soft and text and sys.stdout.isatty() else text


if __name__ == "__main__":
    config.run(main)
