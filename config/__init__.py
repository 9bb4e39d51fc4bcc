"""Reads presets and --key=value, types them by dataclass, builds --help, and turns a wrong word
into one sentence.

A preset is a file of assignments whose values are literals or arithmetic on numbers. It is read
with `ast` and never executed. A setting is a field of a dataclass; its meaning is the comment
behind the field, which an indented line may continue, and nowhere else; a comment above a field is
the heading of those that follow.
"""
import ast
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import getpass
import glob
import inspect
import math
import operator
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
import types
import typing
import warnings

# torch reads this once, when it is first imported: large blocks on 2 MB pages (a fifth off a step
# of 10M parameters)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# and glibc is to keep what a step frees for the next step; it would give it back to the system,
# which hands it out again page by page, each filled with zeros (a fifth off a step of 4 layers, 128
# wide). Other C libraries have no mallopt
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
with contextlib.suppress(AttributeError, OSError, TypeError):
    for option, value in ((M_TRIM_THRESHOLD, 2 ** 31 - 1), (M_TOP_PAD, 2 ** 26),
                          (M_MMAP_THRESHOLD, 2 ** 30)):
        ctypes.CDLL(None).mallopt(option, value)

# Ctrl-C while torch is imported ends our programs silently; `run` brings Python's handler back
PROGRAMS = [os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), f"{name}.py")
            for name in ("train", "sample", "prepare", "pretrained", "bench")]
if (os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "") in PROGRAMS
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class UserError(Exception):
    """Something the user gave is wrong. The message is one sentence: what, and what to do. Ends a
    run with exit code 2."""
    everywhere = True  # whether all processes of a run meet it, so that one may speak for all


def visible(text):
    """Return text for a terminal: control characters but tabs and line ends as escapes, so that no
    text, name or path can steer it, and no password of a database's URL."""
    text = re.sub(r"(postgres(?:ql)?://[^\s:/@]*:)(?:\S*(?=@)|(?!\d+\b)[^\s/?']+)|"
                  r"([?&](?:ssl)?password=)[^\s&']*", r"\1\2***", text)
    harmless = lambda c: c in "\t\n" or c.isprintable() or (c.isspace() and ord(c) >= 0xA0)
    return "".join(c if harmless(c) else c.encode("unicode_escape").decode() for c in text)


def note(text):
    """Print something to the user beside the output, on standard error."""
    print(visible(text), file=sys.stderr)


warnings.filterwarnings("ignore", module="<unknown>")  # what Python says of a text that `ast` reads

OPS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
       ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
       ast.USub: operator.neg, ast.UAdd: operator.pos}


def evaluate(node, depth=0):
    """Return the value of an ast node made of literals, tuples, lists and + - * / // % on numbers.
    ValueError for anything else and what is nested deeper than 50; OverflowError for a number that
    64 bits do not hold."""
    if depth > 50:
        raise ValueError("what is nested so deeply")
    value = Ellipsis
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, str, bool, type(None)):
        value = node.value
    elif isinstance(node, (ast.Tuple, ast.List)):
        value = tuple(evaluate(e, depth + 1) for e in node.elts)
    elif isinstance(node, (ast.UnaryOp, ast.BinOp)) and type(node.op) in OPS:
        parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        numbers = [evaluate(e, depth + 1) for e in parts]
        if all(type(n) in (int, float) for n in numbers):
            value = OPS[type(node.op)](*numbers)
    if value is Ellipsis:
        raise ValueError(ast.unparse(node))
    if (type(value) is int and not -2 ** 63 <= value < 2 ** 63
            or type(value) is float and not math.isfinite(value)):
        raise OverflowError("a number that 64 bits do not hold")
    return value


def read_preset(path):
    """Return a preset file as {name: value}; UserError names the line that is not an assignment of
    a literal."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"preset {path} is not a file; presets are the .py files in config/")
        with open(path, "rb") as f:
            raw = f.read(100_001)
        if len(raw) > 100_000:
            raise UserError(f"preset {path} is longer than 100,000 bytes; write lines such as "
                            f"n_layer = 6")
        tree = ast.parse(raw.decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"preset {path} cannot be read ({getattr(e, 'strerror', None) or e}); "
                        f"presets are the .py files in config/") from None
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise UserError(f"preset {path} is not a list of assignments "
                        f"({str(e)[:80] or 'nested too deeply'}); "
                        f"write lines such as n_layer = 6") from None
    out = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        line, targets = f"preset {path}, line {node.lineno}", getattr(node, "targets", ())
        if not (isinstance(node, ast.Assign) and len(targets) == 1
                and isinstance(targets[0], ast.Name)):
            raise UserError(f"{line}: only assignments such as n_layer = 6 are read, code in a "
                            f"preset is never run")
        try:
            out[targets[0].id] = evaluate(node.value)
        except (ValueError, ArithmeticError, RecursionError) as e:
            raise UserError(f"{line}: {targets[0].id} must be a literal or arithmetic on numbers, "
                            f"not {str(e)[:80]}") from None
    return out


@functools.lru_cache
def described(cls):
    """Return {heading: {field: meaning}} of a dataclass, read from its source.

    A meaning is the comment behind a field, with indented lines that continue it; a heading is a
    comment of its own above the fields that it heads.
    """
    heading, out = cls.__name__.removesuffix("Config"), {}
    pattern = r"^    (?:# (.*)|(\w+): [^#\n]*(?:# *(.*(?:\n {8}# .*)*))?)$"
    for title, field, meaning in re.findall(pattern, inspect.getsource(cls), re.M):
        heading = title or heading
        if field:
            out.setdefault(heading, {})[field] = re.sub(r"\n +#", "", meaning)
    return out


def coerce(key, value, kind):
    """Return `value` as the type `kind` of the setting `key`; a string from the command line is
    parsed, an int may stand for a float and a single value for a tuple. UserError says what was
    expected."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    items = [typing.get_args(k)[:1] for k in kinds]  # of tuple[int, ...]: (int,)
    given = value
    if isinstance(value, str) and bool in kinds:
        value = {"true": True, "false": False}.get(value.lower(), value)
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and (len(text) > 10_000 or "\0" in text):
            raise UserError(f"{key} takes at most 10,000 characters and no zero byte; a longer "
                            f"text goes into a file")
    if isinstance(value, str) and str not in kinds and (str,) not in items:
        try:
            value = evaluate(ast.parse(value.strip() or "()", mode="eval").body)  # (nothing: none)
        except OverflowError as e:
            raise UserError(f"{key} was given {e} ({value[:40]}); give a smaller one") from None
        except (ValueError, SyntaxError, ArithmeticError, MemoryError, RecursionError):
            pass  # it is no literal
    for k, item in zip(kinds, items):
        if item:
            values = value if isinstance(value, tuple) else (value,)
            if item == (float,):
                values = tuple(float(v) if type(v) is int else v for v in values)
            if all(type(v) in item for v in values):
                return values
        elif k is float and type(value) in (int, float):
            return float(value)
        elif type(value) is k:
            return value
    names = " or ".join(str(k) if item else k.__name__ for k, item in zip(kinds, items))
    raise UserError(f"{key} takes {names}, not {given!r:.80}")


def listed(values):
    """Return strings, some of which list several with commas, one by one."""
    return tuple(v for value in values for v in value.split(","))


SAME = {"lr": "learning_rate", "num_samples": "n", "start": "prompt"}  # other names, understood

LIKE = {  # what other programs call a setting, where the letters do not tell
    "accum": "gradient_accumulation_steps", "bs": "batch_size", "checkpoint": "out_dir",
    "ckpt": "out_dir", "context_length": "block_size", "d_model": "n_embd", "depth": "n_layer",
    "dim": "n_embd", "file": "input", "heads": "n_head", "hidden_size": "n_embd",
    "out": "out_dir", "resume": "init_from", "seq_len": "block_size", "steps": "max_iters",
    "temp": "temperature", "wd": "weight_decay"}

ELSEWISE = {  # nanoGPT's settings that are something else here: (a setting here, what to say)
    "eval_iters": ("eval_tokens", "a validation reads the whole split, or eval_tokens of it"),
    "backend": ("device", "it follows from device: nccl for GPUs, gloo for CPUs"),
    "init_from": ("prompt", "the checkpoint to sample from is out_dir")}


def nearest(word, words):
    """Return what to say of a word that is none of `words`."""
    here, text = ELSEWISE.get(word, ("", ""))
    if here in words:
        return f"; {text}"
    known = LIKE.get(word.lower())
    close = [known] if known in words else difflib.get_close_matches(word, list(words), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else "; --help lists them all"


def stray(arg, words, kinds):
    """Return what to say of a word that is neither a setting nor one of `words`."""
    there = os.path.exists(arg)
    text = f"--prompt={'FILE:' * there}{arg}" * ("prompt" in kinds)
    if not words:
        return (f"{arg} is neither a preset (a file that ends in .py, such as "
                f"config/shakespeare.py) nor a setting (such as --seed=1)")
    like = nearest(arg, words)
    if text and (there or "did you mean" not in like):
        like = f"; a text is given as {shlex.quote(text)}"
    file = ", and no file" * ("input" in kinds)
    return f"{arg} is none of {', '.join(words)}{file}{like}"


# What a beginner sets, shown first.
BASIC = ("dataset input name tokenizer out_dir init_from n_layer n_embd block_size batch_size "
         "max_iters learning_rate prompt n max_new_tokens temperature top_k interactive trace "
         "device").split()


def presets():
    """Yield (path, first line of its docstring, names of its settings) of each preset here."""
    for path in sorted(glob.glob(os.path.join(os.path.dirname(__file__), "[!_]*.py"))):
        with open(path, encoding="utf-8") as f:
            doc = ast.get_docstring(ast.parse(f.read())) or ""
        yield os.path.relpath(path), doc.partition("\n")[0], read_preset(path).keys()


def letters(classes):
    """Return [(letter, meaning)] of what may stand in `layers`, by the docstrings of the files of
    these classes."""
    docs = [sys.modules[cls.__module__].__doc__ or "" for cls in classes]
    return re.findall(r"^    (\( \)|\S) +(\S.*)$", "\n".join(docs), re.M)


def show_help(doc, classes):
    """Print what a program does and its settings, under headings, as wide as the terminal."""
    width, rows, sections = shutil.get_terminal_size((100, 24)).columns, {}, {}

    def show(text):
        column = re.match(r" *\S.*?   +| *", text).end()  # of what is wrapped
        indent = " " * min(column, width * 2 // 3)
        print("\n".join(textwrap.wrap(text, width, subsequent_indent=indent)))

    def show_table(heading, rows):
        if rows:
            print(f"\n{heading}:")
        for left, right in rows:
            show(f"  {left:<24}   {right}")

    for line in inspect.cleandoc(doc or "").splitlines():
        show(line)
    print("\nSettings are given as --key=value or --key value, or as lines of a preset file.")
    for cls in classes:
        options = getattr(sys.modules[cls.__module__], "CHOICES", {})
        for heading, meanings in described(cls).items():
            for name, meaning in meanings.items():
                if any(str(option) not in meaning for option in options.get(name, ())):
                    meaning += f" ({' | '.join(map(str, options[name]))})"
                rows[name] = f"--{name}={getattr(cls, name)!r}", meaning
                sections.setdefault(heading, []).append(name)
    show_table("the first to know", [rows[name] for name in BASIC if name in rows])
    for heading, names in sections.items():
        show_table(heading, [rows[name] for name in names if name not in BASIC])
    if "layers" in rows:
        show_table("letters of layers", letters(classes))
    show_table("presets", [row[:2] for row in presets() if row[2] <= rows.keys()])


class Given(dict):
    """Settings {field: value} that were given; named: those of the command line."""
    named = frozenset()


def parse(argv, *classes, doc="", words=(), free=(), files=""):
    """Return the settings of a command line `[WORD ...] [PRESET.py ...] [--key=value ...]`, where
    `--key value` is as good, and `--key` for a boolean. A later preset overrides an earlier one, a
    setting of the command line every preset; of a tuple of strings all are gathered.

    The result has a Given for each dataclass in `classes` (a setting that two share goes to both),
    and then the list of `words` that stood there (names of datasets, claims or commands). Behind a
    word that is in `free` too all others are taken as they stand (names of files, a text). What
    names a file otherwise, or looks like it, is a value of the setting `files`.
    UserError names what is wrong; --help prints and exits."""
    kinds = {}
    for cls in classes:
        kinds.update(typing.get_type_hints(cls))
    given, override, found, rest = {}, {}, [], list(argv)

    def known(key, where, as_given=""):
        name = SAME.get(key) if key not in kinds and SAME.get(key) in kinds else key
        if name not in kinds:
            raise UserError(f"{name or as_given} (in {where}) is not a setting"
                            f"{nearest(name, kinds)}")
        return name

    while rest:
        arg = rest.pop(0)
        if arg in ("--help", "-h"):
            show_help(doc, classes)
            sys.exit(0)
        if arg.startswith("-") and arg != "-":
            key, equals, value = arg.lstrip("-").partition("=")
            name = known(key.replace("-", "_"), "the command line", arg)
            if not equals:
                value = value_behind(name, kinds[name], rest)
            value = coerce(name, value, kinds[name])
            gathered = override.get(name, ()) if kinds[name] == tuple[str, ...] else None
            override[name] = value if gathered is None else gathered + value
        elif found and found[0] in free:
            found.append(arg)
        elif files and arg not in words and (re.search(r"^-$|^hf:|[./\\*?[]", arg)
                                             or os.path.exists(arg)):
            override[files] = (*override.get(files, ()), arg)
        elif arg.endswith(".py"):
            preset = {}
            for key, value in read_preset(arg).items():
                name = known(key, arg)
                preset[name] = coerce(name, value, kinds[name])
            given = over(given, preset)
        elif arg in words:
            found.append(arg)
        else:
            raise UserError(stray(arg, words, kinds))
    given, parsed = over(given, override), []
    for cls in classes:
        names = [f.name for f in dataclasses.fields(cls)]
        parsed.append(Given({name: given[name] for name in names if name in given}))
        parsed[-1].named = override.keys() & names
    return [*parsed, found]


def value_behind(name, kind, rest):
    """Return the value of a setting that has none behind a =: the next argument, taken out of
    `rest`; a boolean needs none."""
    if bool in (kind, *typing.get_args(kind)):
        return rest.pop(0) if rest and rest[0].lower() in ("true", "false") else True
    if not rest or rest[0].startswith("--"):
        raise UserError(f"--{name} needs a value, as --{name}=VALUE")
    return rest.pop(0)


EITHER = {"layers", "n_layer"}  # settings that say the same in two ways


def over(old, new):
    """Return the settings {name: value} of new over those of old; of EITHER, only what new has."""
    left_out = EITHER if EITHER & new.keys() else ()
    return {**{k: v for k, v in old.items() if k not in left_out}, **new}


def as_flags(settings):
    """Return settings {name: value} as they are written on a command line."""
    as_word = lambda v: ",".join(map(str, v)) if isinstance(v, (tuple, list)) else str(v)
    return shlex.join(f"--{k}={as_word(v)}" for k, v in settings.items())


def summary(error):
    """Return what an exception says in its first paragraph, as one short line."""
    return " ".join(str(error).strip().partition("\n\n")[0].split())[:200] or type(error).__name__


def build(cls, **values):
    """Return cls(**values); the ValueError of an impossible combination becomes a UserError."""
    try:
        return cls(**values)
    except ValueError as e:
        raise UserError(str(e)) from None


def check(cfg, choices, limits):
    """Raise ValueError unless settings of cfg are one of their choices {name: values}, where
    every:N stands for any number from 1 on, and as they are by default or within their limits
    [(lowest, highest, names)]."""
    for name, options in choices.items():
        value = getattr(cfg, name)
        number = re.sub(":[1-9][0-9]{0,17}$", ":N", str(value))
        if str(value).endswith(":N") or value not in options and number not in options:
            named = ", ".join(map(str, filter(None, options)))
            raise ValueError(f"{name} is one of {named}, not {value!r}")
    for low, high, names in limits:
        for name in names.split():
            if getattr(cfg, name) != getattr(type(cfg), name):
                within(cfg, low, high, name)


def idle(cfg, *mechanisms):
    """Yield (name, what it needs) of each setting of cfg that was changed and has nothing to work
    on. mechanisms: (whether it is there, what it is, names of its settings)."""
    for there, needs, names in mechanisms:
        for name in names.split():
            if not there and getattr(cfg, name) != getattr(type(cfg), name):
                yield name, needs


def refuse_idle(named, *pairs):
    """Raise UserError for what `idle` yields, if it is one of the names given."""
    for name, needs in pairs:
        if name in named:
            raise UserError(f"{name} has nothing to work on; it needs {needs}")


def within(cfg, low, high, *names):
    """Raise ValueError unless each named setting of cfg lies in [low, high]."""
    for name in names:
        value = getattr(cfg, name)
        if not low <= value <= high:  # (NaN is outside too)
            raise ValueError(f"{name} must lie between {low} and {high}, not {value}")


def find_device(name):
    """Return the device that a setting names, with auto a GPU where there is one; UserError where
    it is not to be had."""
    import torch
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as e:  # each kind of device fails in a way of its own
        raise UserError(f"device {name!r} is not to be had here ({summary(e)}); give --device=cpu, "
                        f"or leave it out") from None
    return name


@functools.lru_cache
def compiles(cxx):
    """Whether a C++ compiler makes a shared library of one line: tried, once."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, made = os.path.join(folder, "x.cpp"), os.path.join(folder, "x.so")
            with open(source, "w") as f:
                f.write("int x() { return 1; }")
            how = ["-shared", "-fPIC", source, "-o", made]
            if sys.platform == "win32":
                how = ["/LD", source, f"/Fe:{made}"]
            subprocess.run([cxx, *how], cwd=folder, capture_output=True, timeout=60, check=True)
            return os.path.exists(made)
    except (OSError, ValueError, subprocess.SubprocessError):
        return False


def compiler_missing(device):
    """Return what torch.compile needs on this device ("cpu" or "cuda") and does not find, "" where
    nothing is missing."""
    if device == "cuda":
        from torch.utils._triton import has_triton
        return "" if has_triton() else "Triton for this GPU"
    usual, package = {
        "darwin": ("clang++", "the Xcode tools: xcode-select --install"),
        "win32": ("cl", "Visual Studio's build tools"),
    }.get(sys.platform, ("g++", "the package g++"))
    cxx = os.environ.get("CXX", usual)  # as torch looks for it
    if not compiles(cxx):
        return f"a C++ compiler that works (not {cxx}; install {package})"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "Python.h (package python3-dev)"
    return ""


def out_of_memory(error):
    """Whether an exception says that memory, of the machine or of a GPU, was not enough."""
    return isinstance(error, MemoryError) or re.search(
        "not enough memory|out of memory|allocate memory|ALLOC_FAILED", str(error)) is not None


def failure(error):
    """Return what to say of an OSError."""
    return (f"{error.filename or 'a file or the output'} failed ({error.strerror or error}); see "
            f"to it and try again")


def compile_failure(e):
    """Return what to do about an error of torch's compiler, a sentence; "" for another error."""
    if not type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return ""
    cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", cache)
    return (f"torch.compile failed ({summary(e)}); leave it out with --compile=False, at about "
            f"half the speed, or, where a compile was once killed, delete its files in {cache}")


def check_torch(version):
    """Raise UserError where a version of torch is older than this code can work with."""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 9):
        raise UserError(f"torch {version} is too old: 2.11 (on a GPU) and 2.13 were tested; pip "
                        f"install -r requirements.txt")


def run(main):
    """main(argv) as a program. Exit code 2 and one sentence for a UserError, where memory is not
    enough, and for a file or an output that fails; 130 when interrupted; 141 when nobody reads the
    output any more."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, mode))
        if mode == "w":
            getattr(sys, name).reconfigure(errors="backslashreplace")
    code, why = 0, ""
    try:
        try:
            if "torch" in sys.modules:
                check_torch(sys.modules["torch"].__version__)
            code = main(sys.argv[1:])
        except SystemExit as e:  # --help
            code = e.code
        sys.stdout.flush()
    except UserError as e:  # under torchrun one process says what all would
        ranks = "TORCHELASTIC_RUN_ID" in os.environ and e.everywhere
        code, why = 2, str(e)
        if ranks and os.environ.get("LOCAL_RANK") != "0":
            time.sleep(20)  # the first says it for all; torchrun then ends those that wait
    except BrokenPipeError:  # | head
        code = 141
    except KeyboardInterrupt:
        code = 130
    except OSError as e:
        code, why = 2, failure(e)
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e) and not compile_failure(e):
            raise
        code, why = 2, compile_failure(e) or (
            "there is not enough memory for this; lower batch_size, block_size, n_embd or n_layer "
            "(in sampling: n, beams or best_of; in preparing: n_docs), or close other programs")
    with contextlib.suppress(OSError):
        if why:
            print(f"{os.path.basename(sys.argv[0])}: {visible(why)}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again at its end, and say so
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
