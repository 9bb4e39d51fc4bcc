"""Decoding: every way to turn a model into text.

    python sample.py                                        500 tokens from the newest checkpoint under out/
    python sample.py --prompt="ROMEO:" --n=3 --top_p=0.9
    python sample.py --prompt=FILE:scene.txt --temperature=0
    python sample.py --amateur=out/small/ckpt.pt            contrastive decoding against a weaker model

There is no upper bound on max_new_tokens: when the window is full, its oldest quarter folds into the context slots, or is
dropped where the model has none.
"""
import codecs
import glob
import math
import os
import sys
from dataclasses import dataclass

import config  # before torch: it sets an allocator switch that torch reads when imported
import numpy as np
import torch

import prepare
from config import UserError
from model import GPT, GPTConfig


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
    seed: int = 1337  # of the choices
    device: str = "auto"  # auto (a GPU where there is one) | cpu | cuda | mps
    dtype: str = "float32"  # float32 | bfloat16
    compile: bool = False  # compile the decoding step: half a minute once, then several times as fast on a CPU

    def __post_init__(self):
        config.within(self, 1, None, "n")
        config.within(self, 0, None, "max_new_tokens", "temperature", "top_k", "beta", "seed")
        config.within(self, 0, 1, "top_p", "min_p", "alpha")
        config.within(self, 0.01, 100, "repetition_penalty")
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


def choose(logits, cfg, generator):
    """A token per row (B,), by the temperature and filters of the settings."""
    if cfg.temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / cfg.temperature
    if cfg.top_k:
        logits = keep_top_k(logits, cfg.top_k)
    if cfg.top_p < 1:
        logits = keep_top_p(logits, cfg.top_p)
    if cfg.min_p > 0:
        logits = keep_min_p(logits, cfg.min_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# rows of text over a model


class Decoder:
    """B rows of tokens over a model: each its window, the ring of history behind it, and the cached state of both.

    `logits` (B, V) are always those of the next token. All that a row's future depends on are the ids it keeps: when its
    window is full, the oldest quarter leaves for the ring at once, and slots and window are computed anew in one pass.
    """

    def __init__(self, model, rows, eot=None, compile=False):
        self.model, self.eot = model, eot
        self.step = torch.compile(model, dynamic=False) if compile else model
        self.T, self.H = model.cfg.block_size, model.cfg.history
        self.rows = []  # (history, window) per row, lists of ids, oldest first
        for ids in rows:
            self.rows.append(([], []))
            for token in ids:  # a prompt ends up where the same tokens would be, had they been generated
                self.keep(len(self.rows) - 1, token)
        self.fill()

    def keep(self, b, token):
        """Append a token to row b; -> True if it folded."""
        ring, window = self.rows[b]
        fold = len(window) == self.T
        if fold:
            n = max(1, self.T // 4)
            ring.extend(window[:n])
            del window[:n]
            del ring[:max(0, len(ring) - self.H)]
        window.append(token)
        return fold

    @torch.inference_mode()
    def fill(self):
        """Slots, window and state from the kept ids, in one pass over rows padded at the right."""
        device = self.model.wte.weight.device
        width = max(len(w) for _, w in self.rows)
        idx = torch.tensor([w + [0] * (width - len(w)) for _, w in self.rows], device=device)
        history = None
        if self.H:
            ring = np.array([[-1] * (self.H - len(r)) + r for r, _ in self.rows])
            history = torch.from_numpy(prepare.forget(ring, self.eot)).to(device)
        self.state = self.model.init_state(len(self.rows))
        logits = self.model(idx, history=history, state=self.state).logits
        short = torch.tensor([width - len(w) for _, w in self.rows], device=device)
        if bool(short.any()):
            self.state.rollback(short)
        self.logits = logits[torch.arange(len(self.rows), device=device), width - 1 - short]

    @torch.inference_mode()
    def push(self, tokens):
        """Append a token to each row, a list of B ids; -> logits (B, V) of the next."""
        if any([self.keep(b, t) for b, t in enumerate(tokens)]):
            self.fill()
        else:
            idx = torch.tensor(tokens, device=self.model.wte.weight.device)[:, None]
            self.logits = self.step(idx, state=self.state).logits[:, -1]
        return self.logits

    @torch.inference_mode()
    def select(self, rows):
        """A Decoder over these rows of this one; a row may be taken several times, and what it holds is computed once."""
        new = object.__new__(Decoder)
        new.__dict__.update(self.__dict__)
        new.rows = [(list(self.rows[r][0]), list(self.rows[r][1])) for r in rows]
        at = torch.tensor(rows, device=self.logits.device)
        new.state, new.logits = self.state.select(at), self.logits[at]
        return new

    def seen(self):
        """(B, V) bool: the tokens in each row's window."""
        out = torch.zeros_like(self.logits, dtype=torch.bool)
        for b, (_, window) in enumerate(self.rows):
            out[b, window] = True
        return out


def generate(expert, cfg, amateur=None, generator=None):
    """Yield lists of B token ids, cfg.max_new_tokens of them, and push each into expert (and amateur)."""
    for _ in range(cfg.max_new_tokens):
        logits = expert.logits.float()
        if amateur is not None:
            logits = contrast(logits, amateur.logits.float(), cfg.alpha, cfg.beta)
        if cfg.repetition_penalty != 1:
            logits = penalize(logits, expert.seen(), cfg.repetition_penalty)
        tokens = choose(logits, cfg, generator).tolist()
        yield tokens
        for d in (expert, amateur):
            if d is not None:
                d.push(tokens)


class Text:
    """The text of one row as its tokens come in: whole characters only, ended before the stop string."""

    def __init__(self, tokenizer, stop=""):
        self.tok, self.stop, self.text, self.shown, self.done = tokenizer, stop, "", 0, False
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token):
        """Take a token; -> the text that is now certain to stand."""
        if self.done:
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
    generator = torch.Generator(device=cfg.device).manual_seed(cfg.seed)
    expert, amateur = Decoder(model, [ids], tok.eot, cfg.compile).select([0] * cfg.n), None
    if cfg.amateur:
        weak, weak_ckpt = load(cfg.amateur, cfg.device, cfg.dtype)
        if weak_ckpt["tokenizer"] != ckpt["tokenizer"]:
            raise UserError(f"amateur {cfg.amateur} has another tokenizer than {path}; it must be the same")
        amateur = Decoder(weak, [ids], tok.eot, cfg.compile).select([0] * cfg.n)
    texts = [Text(tok, cfg.stop) for _ in range(cfg.n)]
    print(f"[{path}, step {ckpt['step']}]", file=sys.stderr)
    print(prompt, end="", flush=True)
    for tokens in generate(expert, cfg, amateur, generator):
        fresh = [t.add(i) for t, i in zip(texts, tokens)]
        print(fresh[0], end="", flush=True)  # the first sample as it is made, the others when they are whole
        if all(t.done for t in texts):
            break
    print(texts[0].end())
    for t in texts[1:]:
        t.end()
        print("-" * 40 + "\n" + prompt + t.text)
    return 0


if __name__ == "__main__":
    config.run(main)
