"""Pretrained models in, and models of ours out: Hugging Face's layout, and GGUF.

    python pretrained.py import SmolLM2-135M --out_dir=out/smol   a folder with config.json,
                                                  safetensors and tokenizer.json, of the GPT-2 or
                                                  the Llama family (Mistral and Qwen2 too), becomes
                                                  a checkpoint, which all programs here read
    python pretrained.py import smol.gguf --out_dir=out/smol      so does a GGUF file, dequantised
    python pretrained.py import HuggingFaceTB/SmolLM2-135M        and a model of Hugging Face's hub,
                                                  whose files are kept under data/download
    python pretrained.py export out/gpt --out_dir=gpt_hf          a checkpoint becomes a folder that
                                                  transformers reads

python train.py --init_from=FOLDER imports it as it starts.
"""
import hashlib
import json
import math
import os
import re
import shlex
import struct
from dataclasses import dataclass

import config  # before torch: it sets the allocator's switches
import requests
import torch
from torch.nn import functional as F

import prepare
from config import UserError, summary, visible
from model import GPT, GPTConfig, settings


@dataclass
class PretrainedConfig:
    out_dir: str = ""  # folder to write to; default: out/NAME, and of an export FOLDER/hf
    tokenizer: str = ""  # import: PATH of a tokenizer.json, or gpt2; default: what comes with it
    block_size: int = 0  # import: tokens in the window, no more than it was trained on; 0: as many

    def __post_init__(self):
        config.check(self, {}, [(1, 2 ** 20, "block_size")])


# --------------------------------------------------------------------------------------------------
# names: a parameter of ours is one of theirs, or several below one another

LLAMA = {"wte": "embed_tokens", "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
         "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj mlp.gate_proj",
         "mlp.c_proj": "mlp.down_proj"}
NAMES = {"llama": LLAMA, "nanochat": {**LLAMA, "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}}
GAINS = {"attn.c_attn": "input_layernorm", "mlp.c_fc": "post_attention_layernorm",
         "lm_head": "norm"}  # of the norm before each matrix, which takes it in
CONV1D = re.compile(r"\.c_(attn|proj|fc)\.weight$")  # GPT-2's matrices lie on their side


def split_name(name):
    """Return (place, module, kind) of a parameter of ours.

    Example: "blocks.3.mlp.c_fc.weight" -> ("layers.3.", "mlp.c_fc", "weight")
    """
    i, module, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    return f"layers.{i}." if i else "", module, kind


def their_names(name, family):
    """Return what a family calls the parameter `name` of ours, a list."""
    place, module, kind = split_name(name)
    if module == "lm_head":
        return [name]
    if family == "gpt2":
        return ["transformer." + name.replace("blocks.", "h.", 1)]
    return [f"model.{place}{part}.{kind}" for part in NAMES[family][module].split()]


def gain_name(name):
    """Return what the Llama family calls the gain that a matrix of ours takes in, "" for none."""
    place, module, kind = split_name(name)
    return f"model.{place}{GAINS[module]}.weight" if module in GAINS and kind == "weight" else ""


def part_sizes(model, name, n, rows):
    """Return how many of the rows of a parameter each of its n parts has."""
    parts = getattr(model.get_submodule(name.rpartition(".")[0]).weight, "parts", ())
    return parts if len(parts) == n else [rows // n] * n


# --------------------------------------------------------------------------------------------------
# files that others wrote

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")  # not read


def read_json(path):
    """Return the dict in a JSON file; UserError where it is none."""
    try:
        with open(path, "rb") as f:
            data = json.loads(f.read())
        prepare.demand(type(data) is dict)
        return data
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}); a folder in Hugging Face's "
                        f"layout has config.json and model.safetensors") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is no JSON object; fetch it again") from None


def safetensors_header(path):
    """Return {name: (torch type, shape, first byte, how many bytes)} of a safetensors file.

    UserError unless every tensor lies within the file and is as long as its shape says.
    """
    bad = lambda why: UserError(f"{path} is no whole safetensors file ({why}); fetch it again")
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            if size < 10 or start > min(size, 10 ** 8):
                raise bad("its header is longer than the file")
            header = json.loads(f.read(start - 8))
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}); weights are read from "
                        f"safetensors files, no others") from None
    except (ValueError, RecursionError):
        raise bad("its header is no JSON") from None
    found = {}
    for name, entry in header.items() if type(header) is dict else [("its header", None)]:
        if name == "__metadata__" or BUFFERS.search(name):
            continue
        try:
            kind, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
            prepare.demand(all(prepare.integer(n) for n in (*shape, first, last)))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise bad(f"{name} is not described") from None
        if type(kind) is not str or kind not in DTYPES:
            raise UserError(f"{path} has {name} as {kind!r}; {', '.join(DTYPES)} are read")
        if not first <= last <= size - start or (
                last - first != math.prod(shape) * DTYPES[kind].itemsize):
            raise bad(f"{name} is not where it says")
        found[name] = DTYPES[kind], tuple(shape), start + first, last - first
    return found


HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def fetch(name):
    """Return the folder with the files of the model `name` of the hub, OWNER/NAME: those that are
    there already are not fetched again."""
    folder = os.path.join("data", "download", name.replace("/", "--"))
    prepare.make_dir(folder)
    one, index = "model.safetensors", "model.safetensors.index.json"
    got = lambda file: fetch_file(f"{HUB}/{name}/resolve/main/{file}", os.path.join(folder, file))
    if not got("config.json"):
        raise UserError(f"{HUB} has no model {name} that can be read without an account; name "
                        f"another, as OWNER/NAME, or a file or folder that is there")
    files = Folder.files(folder) if got(index) else [one]
    missing = [file for file in files if not got(file)]
    if missing:
        raise UserError(f"{name} has no {missing[0]} on {HUB}, and no other weights are read; name "
                        f"another model")
    got("tokenizer.json")
    return folder


def fetch_file(url, path):
    """Fetch a file in pieces; return whether it is there. One that was interrupted goes on where it
    stopped, and what the hub says of its SHA-256 is checked."""
    part = f"{path}.part"
    if os.path.exists(path):
        return True
    start = os.path.getsize(part) if os.path.exists(part) else 0
    try:
        ask = {"Range": f"bytes={start}-"} if start else {}
        with requests.get(url, headers=ask, timeout=(5, 30), stream=True) as r:
            # the hub says 401 or 403 of a model that it does not have, asked for its first file
            if r.status_code == 404 or url.endswith("/config.json") and r.status_code in (401, 403):
                return False
            if r.status_code != 416:  # there is no more of it than is here
                r.raise_for_status()
                size = int(r.headers.get("Content-Length", 0))
                with open(part, "ab" if r.status_code == 206 else "wb") as f, prepare.bar(
                        total=size, desc=os.path.basename(path), unit="B", unit_scale=True) as bar:
                    for piece in r.iter_content(1 << 20):
                        f.write(piece)
                        bar.update(len(piece))
            said = [h.headers.get("X-Linked-ETag", "").strip('"') for h in (*r.history, r)]
    except requests.RequestException as e:
        raise UserError(f"{url} could not be fetched ({type(e).__name__}); the same command goes "
                        f"on where it stopped") from None
    sha = hashlib.sha256()
    with open(part, "rb") as f:
        for piece in iter(lambda: f.read(1 << 20), b""):
            sha.update(piece)
    for wanted in said:
        if re.fullmatch("[0-9a-f]{64}", wanted) and wanted != sha.hexdigest():
            os.unlink(part)
            raise UserError(f"{url} has SHA-256 {sha.hexdigest()}, not {wanted}, and was refused; "
                            f"try again")
    os.replace(part, path)
    return True


class Source:
    """A pretrained model as others keep it: `config` in the words of a config.json, `shapes` {key:
    shape}, and `take`, which gives a tensor and notes that it was asked for."""

    def __init__(self, path):
        self.path, self.taken = path, set()

    def key(self, name):
        """Return what the files call the tensor that Hugging Face's classes call `name`."""
        return name

    def take(self, name, shape):
        """Return a tensor in fp32; UserError unless it is there, of this shape and finite."""
        key = self.key(name)
        self.taken.add(key)
        if key not in self.shapes:
            raise UserError(f"{self.path} has no tensor {key}; fetch the whole model again")
        if self.shapes[key] != tuple(shape):
            raise UserError(f"{self.path} has {key} of shape {self.shapes[key]}, and its config "
                            f"says {tuple(shape)}; fetch both again")
        t = self.read(key).float()
        if not torch.isfinite(t).all():
            raise UserError(f"{self.path} has a number in {key} that is not finite")
        return t


class Folder(Source):
    """A folder in Hugging Face's layout, with one safetensors file or several and an index."""

    def __init__(self, path):
        super().__init__(path)
        self.config = read_json(os.path.join(path, "config.json"))
        self.entries = {name: (file, *entry)
                        for file in (os.path.join(path, f) for f in self.files(path))
                        for name, entry in safetensors_header(file).items()}
        gpt2 = self.config.get("model_type") == "gpt2"
        self.transposed = CONV1D if gpt2 else re.compile("(?!)")
        self.shapes = {n: e[2][::-1] if self.transposed.search(n) else e[2]
                       for n, e in self.entries.items()}

    @staticmethod
    def files(path):
        """Return the names of the files with the weights."""
        index = os.path.join(path, "model.safetensors.index.json")
        if not os.path.exists(index):
            return ["model.safetensors"]
        files = read_json(index).get("weight_map")
        files = sorted({*map(str, files.values())}) if type(files) is dict else [""]
        if any(os.path.basename(f) != f or not f for f in files):
            raise UserError(f"{index} names no files of its own folder; fetch it again")
        return files

    def key(self, name):  # of a model that was saved without its head, there is no prefix
        short = re.sub(r"^(model|transformer)\.", "", name)
        return short if short in self.shapes else name

    def read(self, key):
        file, dtype, shape, first, size = self.entries[key]
        with open(file, "rb") as f:
            f.seek(first)
            t = torch.frombuffer(bytearray(f.read(size)), dtype=dtype).view(shape)
        return t.T if self.transposed.search(key) else t

    def tokenizer(self, n_vocab, eot):
        """Return the spec of its tokenizer."""
        if os.path.exists(os.path.join(self.path, "tokenizer.json")):
            return prepare.json_spec(self.path, n_vocab, eot)
        if self.config["model_type"] == "gpt2" and n_vocab == 50257:
            return prepare.tokenizer_spec("gpt2")
        raise UserError(f"{self.path} has no tokenizer.json; name one with --tokenizer=PATH")


class Gguf(Source):
    """A GGUF file, read by the package gguf, its tensors dequantised."""

    def __init__(self, path):
        super().__init__(path)
        try:
            import gguf
        except ImportError:
            raise UserError("a GGUF file is read by the package gguf; install it: pip install "
                            "gguf") from None
        class Reader(gguf.GGUFReader):
            def _get(self, offset, dtype, count=1, **more):
                part = super()._get(offset, dtype, count, **more)
                if len(part) < count:  # (the package reads on, as far as a header says)
                    raise ValueError("its header promises more than there is")
                return part

        try:
            reader = Reader(path)
            self.fields = {key: f.contents() for key, f in reader.fields.items()}
            self.tensors = {t.name: t for t in reader.tensors}
            self.shapes = {n: tuple(map(int, t.shape[::-1])) for n, t in self.tensors.items()}
            arch = self.fields["general.architecture"]
            self.config = self.config_of(arch)
            number = {name: i for i, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
            # (which takes minutes for the layers that a header may promise)
            n_layer = min(self.config["num_hidden_layers"], len(self.tensors))
            self.names = gguf.get_tensor_name_map(number, n_layer)
        except Exception as e:  # the package has no exception of its own
            raise UserError(f"{path} was not understood as a GGUF file ({summary(e)}); take "
                            f"another") from None
        self.dequantize = gguf.quants.dequantize

    def key(self, name):
        return self.names.get_name(name, (".weight", ".bias")) or name

    def config_of(self, arch):
        """Return what config.json would say."""
        get = lambda key, usual=None: self.fields.get(f"{arch}.{key}", usual)
        number = lambda key, usual: float(f"{get(key, usual):.6g}")  # it was rounded to 32 bits
        heads, n_embd = get("attention.head_count"), get("embedding_length")
        size = get("attention.key_length", n_embd // heads)
        c = dict(model_type=arch, num_hidden_layers=get("block_count"), hidden_size=n_embd,
                 num_attention_heads=heads, intermediate_size=get("feed_forward_length"),
                 num_key_value_heads=get("attention.head_count_kv", heads), head_dim=size,
                 max_position_embeddings=get("context_length"),
                 rms_norm_eps=number("attention.layer_norm_rms_epsilon", 0),
                 layer_norm_epsilon=number("attention.layer_norm_epsilon", 0),
                 rope_theta=number("rope.freq_base", 1e4),
                 partial_rotary_factor=get("rope.dimension_count", size) / size,
                 sliding_window=get("attention.sliding_window"), use_sliding_window=True,
                 attention_bias="blk.0.attn_output.bias" in self.shapes,
                 tie_word_embeddings="output.weight" not in self.shapes,
                 vocab_size=self.shapes["token_embd.weight"][0],
                 eos_token_id=self.fields.get("tokenizer.ggml.eos_token_id"))
        kind = "llama3" if "rope_freqs.weight" in self.shapes else get("rope.scaling.type", "none")
        if kind != "none":
            c["rope_scaling"] = {"rope_type": kind}
        own = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_head":
               "num_attention_heads", "n_inner": "intermediate_size",
               "n_positions": "max_position_embeddings"}
        return {**c, **{k: c[v] for k, v in own.items()}}

    def read(self, key):
        t = self.tensors[key]
        w = torch.tensor(self.dequantize(t.data, t.tensor_type)).view(self.shapes[key])
        part = re.search(r"\.attn_([qk])\.", key)
        if part and self.config["model_type"] == "llama":  # channels that turn are neighbours there
            heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}[part[1]]
            w = w.view(self.config[heads], -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)
        return w

    def tokenizer(self, n_vocab, eot):
        """Return the spec of its tokenizer."""
        get = lambda key: self.fields.get(f"tokenizer.ggml.{key}")
        pre = {"gpt-2": [], "smollm": [{"type": "Digits", "individual_digits": True}]}
        if get("model") != "gpt2" or get("pre") not in pre:
            raise UserError(f"{self.path} has a tokenizer {get('model')}, {get('pre')}, and gpt2 "
                            f"with {' or '.join(pre)} are read; name its tokenizer.json with "
                            f"--tokenizer=PATH")
        try:
            kinds = get("token_type") or [1] * len(get("tokens"))
            special = {i: t for i, t in enumerate(get("tokens")) if kinds[i] == 3}
            vocab = {t: i for i, t in enumerate(get("tokens"))}
            text = byte_level_json(vocab, get("merges"), special, pre[get("pre")])
            return prepare.spec_of_json(text, n_vocab, eot)
        except (TypeError, IndexError):
            raise UserError(f"{self.path} has no whole tokenizer; name one with "
                            f"--tokenizer=PATH") from None


# --------------------------------------------------------------------------------------------------
# in

FAMILIES = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "llama"}  # by model_type
GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
FITTING = {  # what a config.json may say, if it says anything
    "gpt2": {"activation_function": tuple(GELUS), "layer_norm_epsilon": (1e-5,),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
             "add_cross_attention": (False,), "quantization_config": (None,),
             "tie_word_embeddings": (True, False)},
    "llama": {"hidden_act": ("silu",), "partial_rotary_factor": (None, 1.0),
              "quantization_config": (None,), "tie_word_embeddings": (True, False)}}


def family_settings(source, block_size=0):
    """Return (family, GPTConfig, names of modules with a bias, positions it was trained on) of the
    config of a Source; UserError for what does not fit."""
    c, path = source.config, source.path
    family = FAMILIES.get(str(c.get("model_type")))
    if family is None:
        raise UserError(f"{path} is of the architecture {c.get('model_type')!r}; "
                        f"{', '.join(FAMILIES)} are read")
    for name, fitting in FITTING[family].items():
        if name in c and c[name] not in fitting:
            raise UserError(f"{path} has {name} = {str(c[name])[:80]}, which nothing here does "
                            f"(it may be {' or '.join(map(str, fitting))})")
    try:
        values, biased, longest = (gpt2_settings if family == "gpt2" else llama_settings)(c)
        if not prepare.integer(longest, 1) or block_size > longest:
            raise ValueError(f"block_size must be at most the {longest} positions that it was "
                             f"trained on, not {block_size}")
        window = c.get("use_sliding_window", True) and c.get("sliding_window")
        if window and window < (block_size or longest):
            raise ValueError(f"it attends to the last {window} positions alone (sliding_window); "
                             f"read no more at once, with --block_size={window}")
        cfg = GPTConfig(**values, block_size=block_size or longest)
    except KeyError as e:
        raise UserError(f"the config of {path} does not say {e}; fetch it again") from None
    except (TypeError, AttributeError, ArithmeticError):
        raise UserError(f"the config of {path} has a value of another kind; fetch it "
                        f"again") from None
    except ValueError as e:
        raise UserError(f"{path} does not fit: {e}") from None
    return family, cfg, biased, longest


def gpt2_settings(c):
    """Return (settings, modules with a bias, positions) of a GPT-2's config."""
    return dict(
        vocab_size=c["vocab_size"], n_layer=c["n_layer"], n_embd=c["n_embd"], n_head=c["n_head"],
        n_mlp=c.get("n_inner") or 0, mlp=GELUS[c.get("activation_function", "gelu_new")],
        norm="layer", pos="learned", init="gpt2", bias=True, qk_norm=False, embed_norm=False,
        tie=c.get("tie_word_embeddings", True)), None, c["n_positions"]


def llama_settings(c):
    """Return (settings, modules with a bias, positions) of a config of the Llama family."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"its rotary angles are scaled ({kind}), which nothing here does")
    heads = c["num_attention_heads"]
    attention = "q_proj k_proj v_proj " + "o_proj" * (c["model_type"] != "qwen2")
    biased = attention.split() if c["model_type"] == "qwen2" or c.get("attention_bias") else []
    biased += ["up_proj", "gate_proj", "down_proj"] if c.get("mlp_bias") else []
    base = rope.get("rope_theta", c.get("rope_theta", 10000.0))
    return dict(
        vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"], n_embd=c["hidden_size"],
        n_head=heads, n_kv_head=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads, n_mlp=c["intermediate_size"],
        mlp="swiglu", norm_eps=c["rms_norm_eps"], rope_base=float(base), bias=bool(biased),
        tie=c.get("tie_word_embeddings", False), init="gpt2", qk_norm=False,
        embed_norm=False), biased, c["max_position_embeddings"]


def weights_of(source, family, cfg, biased, longest):
    """Return (cfg, {name: tensor}): the weights of a Source under our names.

    RMSNorm's gains go into the matrices behind them. So a tied head with a gain before it becomes
    one of its own.
    """
    head = "model.embed_tokens.weight" if cfg.tie else "lm_head.weight"
    if family == "llama" and cfg.tie:
        gain = source.take("model.norm.weight", [cfg.n_embd])
        cfg = GPTConfig(**{**settings(cfg), "tie": bool((gain == 1).all())})
    with torch.device("meta"):
        model = GPT(cfg, None)
    weights, rows = {}, {"lm_head.weight": cfg.vocab_size, "wpe.weight": longest}
    for name, p in model.named_parameters():
        names = [head] if name == "lm_head.weight" else their_names(name, family)
        sizes = part_sizes(model, name, len(names), rows.get(name, len(p)))
        parts = []
        for part, size in zip(names, sizes):
            shape, module = (size, *p.shape[1:]), part.split(".")[-2]
            none = family == "llama" and part.endswith("bias") and module not in biased
            parts.append(torch.zeros(shape) if none else source.take(part, shape))
        w = torch.cat(parts)
        if family == "llama" and gain_name(name):
            w *= source.take(gain_name(name), [cfg.n_embd])
        # a shorter window needs fewer positions; a head may have rows that nobody reads
        weights[name] = F.pad(w[:len(p)], (0, 0) * (p.dim() - 1) + (0, max(len(p) - len(w), 0)))
    if cfg.tie:
        weights["lm_head.weight"] = weights["wte.weight"]
    left = sorted(source.shapes.keys() - source.taken - {"lm_head.weight"})
    if left:
        raise UserError(f"{source.path} has tensors that have no place here: "
                        f"{', '.join(left[:3])}{' ...' if len(left) > 3 else ''}")
    return cfg, weights


def is_pretrained(path):
    """Return whether `path` is a model of somebody else's: a GGUF file, or a folder with a
    config.json and no checkpoint."""
    return path.endswith(".gguf") or (os.path.exists(os.path.join(path, "config.json"))
                                      and not os.path.exists(prepare.checkpoint_path(path)))


def read(path, tokenizer="", block_size=0):
    """Return the model at `path`, a folder in Hugging Face's layout or a GGUF file, as the data of
    a checkpoint. UserError where it is damaged or does not fit."""
    source = (Gguf if path.endswith(".gguf") else Folder)(path)
    family, cfg, biased, longest = family_settings(source, block_size)
    eot = source.config.get("eos_token_id")
    eot = eot[0] if type(eot) is list and eot else eot
    if eot is not None and not prepare.integer(eot, 0, cfg.vocab_size - 1):
        raise UserError(f"{path} ends a text with token {str(eot)[:80]}, and has "
                        f"{cfg.vocab_size:,}; fetch it again")
    if tokenizer and os.path.exists(tokenizer):
        spec = prepare.json_spec(tokenizer, cfg.vocab_size, eot)
    else:
        spec = prepare.tokenizer_spec(tokenizer) if tokenizer else \
            source.tokenizer(cfg.vocab_size, eot)
    tok = prepare.Tokenizer(spec)
    if tok.n_vocab != cfg.vocab_size:
        raise UserError(f"{path} has {cfg.vocab_size:,} tokens and its tokenizer {tok.n_vocab:,}; "
                        f"name its own with --tokenizer=PATH")
    cfg, weights = weights_of(source, family, cfg, biased, longest)
    cfg.eot = -1 if tok.eot is None else tok.eot
    return checkpoint(cfg, weights, tok)


def checkpoint(cfg, weights, tok):
    """Return what train.py would save of a model that no run of its own made."""
    return {"model": weights, "model_config": settings(cfg), "train_config": {}, "memory": {},
            "optimizers": [], "step": 0, "step_seconds": 0.0, "validated": None, "val_loss": None,
            "interval_losses": [], "best_val_loss": math.inf, "tokenizer": tok.spec, "dataset": "",
            "data": {"train.bin": "", "val.bin": "", "tokenizer": tok.hash[:16]}}


def import_model(cfg, path):
    """Write a checkpoint of a model that others trained."""
    name = os.path.basename(os.path.abspath(path)).removesuffix(".gguf")
    folder = cfg.out_dir or os.path.join("out", name)
    out = os.path.join(folder, "ckpt.pt")
    if os.path.exists(prepare.checkpoint_path(folder)):
        raise UserError(f"{folder} holds a checkpoint already; name another folder with --out_dir")
    if not os.path.exists(path) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        path = fetch(path)
    if not is_pretrained(path):
        raise UserError(f"{path} is neither a GGUF file, nor a folder with config.json and "
                        f"safetensors, nor OWNER/NAME of a model of the hub; name one")
    saved = read(path, cfg.tokenizer, cfg.block_size)
    prepare.make_dir(folder)
    prepare.save_checkpoint(out, saved)
    c, n = saved["model_config"], sum({t.data_ptr(): t.numel() for t in
                                       saved["model"].values()}.values())
    print(f"{visible(out)}: {n:,} parameters, a window of {c['block_size']:,} tokens, vocabulary "
          f"{c['vocab_size']:,}\npython sample.py --out_dir={shlex.quote(folder)} --prompt='Once'")
    return 0


# --------------------------------------------------------------------------------------------------
# out

SIZES = "block_size vocab_size n_layer n_embd n_head n_mlp rope_base tie"
# settings that change nothing that a trained model computes
IN_TRAINING = ("init dropout channel_drop layer_drop soft_rate soft_of ce_weight semantic "
               "semantic_weight semantic_temp next_latent logit_decay eot space")
FREE = {"nanochat": "n_kv_head", "gpt2": "bias", "llama": "bias n_kv_head head_dim norm_eps"}
OURS = {  # settings that make a family; all others are as they are by default
    "nanochat": {}, "llama": dict(mlp=("swiglu",), qk_norm=(False,), embed_norm=(False,)),
    "gpt2": dict(mlp=("gelu", "gelu_tanh"), norm=("layer",), pos=("learned",), qk_norm=(False,),
                 embed_norm=(False,))}


def in_the_way(cfg, family):
    """Return the settings of cfg that a family has no place for, as "name = value"."""
    free = {*f"{SIZES} {IN_TRAINING} {FREE[family]}".split(), *(name for name, _ in cfg.idle())}
    values, default = settings(cfg), settings(GPTConfig())
    wrong = [k for k, v in values.items() if k not in free and k != "layers"
             and v not in OURS[family].get(k, (default[k],))]
    wrong += ["layers"] * (cfg.layers.strip("A") != "") + ["n_mlp"] * (cfg.n_mlp == -1)
    wrong += [k for k in ("n_head", "n_kv_head", "n_mlp") if isinstance(values[k], tuple)]
    return [f"{k} = {values[k]}" for k in dict.fromkeys(wrong)]


def their_config(family, cfg, model, tok):
    """Return config.json, a dict."""
    kv = cfg.n_kv_head or cfg.n_head
    more = {"vocab_size": cfg.vocab_size, "tie_word_embeddings": cfg.tie, "dtype": "float32",
            "bos_token_id": tok.eot, "eos_token_id": tok.eot}
    n_mlp = model.blocks[0].mlp.c_proj.in_features
    if family == "gpt2":
        act = next(theirs for theirs, ours in GELUS.items() if ours == cfg.mlp)
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
                "n_layer": cfg.n_layer, "n_embd": cfg.n_embd, "n_head": cfg.n_head,
                "n_inner": n_mlp, "n_positions": cfg.block_size, "activation_function": act, **more}
    more.update(
        num_hidden_layers=cfg.n_layer, hidden_size=cfg.n_embd, num_attention_heads=cfg.n_head,
        num_key_value_heads=kv, intermediate_size=n_mlp, max_position_embeddings=cfg.block_size,
        rms_norm_eps=cfg.norm_eps, rope_theta=cfg.rope_base, attention_bias=cfg.bias,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_base})
    if family == "nanochat":
        return {"architectures": ["NanoChatForCausalLM"], "model_type": "nanochat",
                "hidden_act": "relu2", "final_logit_softcapping": None, **more}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "head_dim": cfg.heads(0)[2], "mlp_bias": cfg.bias, **more}


def their_weights(family, cfg, model):
    """Return {their name: tensor} of a model of ours."""
    out, C, D = {}, cfg.n_embd, cfg.heads(0)[2]
    for name, p in model.named_parameters():
        if name.startswith(("point.", "latent.")):  # these have a share in a loss alone
            continue
        w = p.detach().float()[:cfg.vocab_size] if name == "lm_head.weight" else p.detach().float()
        names = their_names(name, family)
        for part, t in zip(names, w.split(part_sizes(model, name, len(names), len(w)))):
            if family == "nanochat" and re.search(r"[qk]_proj", part):  # turned the other way round
                t = t.view(-1, 2, D // 2, C).flip(1).reshape(t.shape)
            out[part] = (t.T if family == "gpt2" and CONV1D.search(part) else t).contiguous()
        if family == "llama" and gain_name(name):  # the matrix has it
            out[gain_name(name)] = torch.ones(C)
        place = name.removesuffix(".weight")
        if family == "gpt2" and not cfg.bias and place not in ("wte", "wpe", "lm_head"):
            out[names[0].removesuffix("weight") + "bias"] = torch.zeros(len(w))
    if family == "llama":
        out["model.norm.weight"] = torch.ones(C)  # (of a tied head too)
    return out


def write_safetensors(path, tensors):
    """Write fp32 tensors {name: tensor} as a safetensors file."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        size = t.numel() * 4
        header[name] = {"dtype": "F32", "shape": [*t.shape], "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with prepare.replacing(path) as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for t in tensors.values():
            f.write(t.numpy().tobytes())


def added_tokens(special):
    """Return what a tokenizer.json says of special tokens {id: text}."""
    rest = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": i, "content": t, **rest, "special": True} for i, t in special.items()]


def byte_level_json(vocab, merges, special, split):
    """Return a tokenizer.json of a byte-level BPE: vocab {token in GPT-2's letters: id}, merges
    ["left right"], special {id: text}, split: what cuts a text first; [] for GPT-2's words."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    words = {**level, "use_regex": not any(s["type"] == "Split" for s in split)}
    return json.dumps({
        "version": "1.0", "added_tokens": added_tokens(special), "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, words]},
        "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}}, ensure_ascii=False)


def spell(token):
    """Return bytes in GPT-2's letters."""
    return "".join(prepare.LETTERS[b] for b in token)


def merges_of(ranks):
    """Return the merges ["left right"] of tiktoken's ranks {bytes: rank}, in GPT-2's letters.

    A token is made of the two parts that the tokens before it leave of its bytes.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            found = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = found.index(min(found))
            if found[i] >= rank:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(spell, parts)))
    return merges


def their_tokenizer(tok):
    """Return the text of a tokenizer.json that does what a tokenizer of ours does."""
    text = tokenizer_json(tok)
    if not tok.spec.get("unix_lines"):
        return text
    theirs, lines = json.loads(text), {"type": "Replace", "pattern": {"Regex": "\r\n?"},
                                       "content": "\n"}
    every = [lines, theirs["normalizer"]] if theirs.get("normalizer") else [lines]
    return json.dumps(theirs | {"normalizer": {"type": "Sequence", "normalizers": every}},
                      ensure_ascii=False)


def tokenizer_json(tok):
    """Return the text of a tokenizer.json for a tokenizer of ours, but for its line ends."""
    spec, special = tok.spec, {} if tok.eot is None else {tok.eot: prepare.END}
    if spec["kind"] == "tokenizers":
        return spec["json"]
    regex = lambda pattern: {"type": "Split", "pattern": {"Regex": pattern},
                             "behavior": "Isolated", "invert": False}
    if spec["kind"] == "char":
        return json.dumps({
            "version": "1.0", "added_tokens": added_tokens(special), "normalizer": None,
            "pre_tokenizer": regex(r"(?m)."), "post_processor": None, "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "vocab": tok.index | {t: i for i, t in special.items()},
                      "merges": []}}, ensure_ascii=False)
    if spec["kind"] not in ("byte", "tiktoken"):
        raise UserError(f"a tokenizer of kind {spec['kind']} has no tokenizer.json; train on a "
                        f"dataset of characters, bytes or an encoding of tiktoken")
    ranks, more = tok.enc._mergeable_ranks, tok.enc._special_tokens
    vocab = {spell(t): i for t, i in ranks.items()}
    split = []
    if spec["kind"] == "tiktoken":  # (its {1,3}+, tokenizers would read as any number of {1,3})
        split = [regex(re.sub(r"(\{\d+(,\d*)?\})\+", r"\1", tok.enc._pat_str))]
    return byte_level_json(vocab, merges_of(ranks), {i: t for t, i in more.items()}, split)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

{n:,} parameters: {layers} layers of {width} channels, a window of {window:,} tokens, vocabulary
{vocab:,}. {origin}

```python
from transformers import pipeline
print(pipeline("text-generation", "PATH")("Once", max_new_tokens=100)[0]["generated_text"])
```
"""
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"  # turns are lines


def export_model(args, path):
    """Write a folder that transformers reads of a checkpoint."""
    path = prepare.checkpoint_path(path)
    saved = prepare.load_checkpoint(path)
    model = config.build(GPT.of, config=saved["model_config"], weights=saved["model"])
    cfg, tok = model.cfg, prepare.Tokenizer(saved["tokenizer"])
    wrong = {family: in_the_way(cfg, family) for family in OURS}
    family = min(wrong, key=lambda f: len(wrong[f]))
    if wrong[family]:
        raise UserError(f"{path} is no model that transformers has: {', '.join(wrong[family])} "
                        f"stand in the way of {family}")
    folder = args.out_dir or os.path.join(os.path.dirname(path), "hf")
    if os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f"{folder} is not empty; name another folder with --out_dir")
    tokenizer = their_tokenizer(tok)
    added = {t["id"]: t["content"] for t in json.loads(tokenizer).get("added_tokens") or ()}
    end = added.get(tok.eot)
    loss = "" if saved["val_loss"] is None else f"; validation loss {saved['val_loss']:.4f}"
    trained = f"Trained for {saved['step']:,} steps on {saved['dataset']}{loss}."
    card = CARD.format(
        name=os.path.basename(os.path.dirname(os.path.abspath(path))), n=model.num_params(),
        layers=cfg.n_layer, width=cfg.n_embd, window=cfg.block_size, vocab=cfg.vocab_size,
        origin=trained if saved["step"] else "Its weights were imported.")
    prepare.make_dir(folder)
    write_safetensors(os.path.join(folder, "model.safetensors"),
                      their_weights(family, cfg, model))
    write = lambda data: json.dumps(data, indent=1, ensure_ascii=False)
    for name, text in (
            ("tokenizer.json", tokenizer), ("README.md", card),
            ("tokenizer_config.json", write({
                "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end,
                "model_max_length": cfg.block_size, "chat_template": TEMPLATE})),
            ("config.json", write(their_config(family, cfg, model, tok)))):  # last: all is there
        with prepare.replacing(os.path.join(folder, name)) as f:
            f.write(text.encode())
    print(f"{visible(folder)}: {family}, {model.num_params():,} parameters")
    return 0


COMMANDS = {"import": import_model, "export": export_model}


def main(argv):
    values, words = config.parse(argv, PretrainedConfig, doc=__doc__, words=COMMANDS, free=COMMANDS)
    cfg = config.build(PretrainedConfig, **values)
    if len(words) != 2:
        raise UserError("name one command and one model: python pretrained.py import FOLDER, or "
                        "python pretrained.py export out/RUN")
    if words[0] == "export" and {"tokenizer", "block_size"} & values.keys():
        raise UserError("tokenizer and block_size are for import; leave them out")
    return COMMANDS[words[0]](cfg, words[1])


if __name__ == "__main__":
    config.run(main)
