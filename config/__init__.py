"""Reads presets and --key=value, types them by dataclass, builds --help, and turns a wrong word into one sentence.

A preset is a file of assignments whose values are literals or arithmetic on literals. It is read with `ast` and never
executed. A setting is a field of a dataclass; its one-line meaning is the comment behind the field, and nowhere else.
"""
import ast
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import inspect
import operator
import os
import re
import shutil
import sys
import sysconfig
import types
import typing

# torch reads this once, when it is first imported: large blocks on 2 MB pages (a fifth off a step of 10M parameters)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# and glibc is to keep what a step frees for the next step; it would give it back to the system, which hands it out again page
# by page, each filled with zeros (a fifth off a step of 4 layers, 128 wide). Other C libraries have no mallopt
with contextlib.suppress(AttributeError, OSError, TypeError):
    for option, value in ((-1, 2 ** 31 - 1), (-2, 2 ** 26), (-3, 2 ** 30)):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(option, value)


class UserError(Exception):
    """Something the user gave is wrong. The message is one sentence: what, and what to do. Ends a run with exit code 2."""


def visible(text):
    """Text for a terminal: control characters but tabs and line ends as escapes, so that no text, name or path can steer it."""
    return "".join(c if c in "\t\n" or c.isprintable() or c.isspace() and ord(c) >= 0xA0 else c.encode("unicode_escape").decode()
                   for c in text)


OPS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
       ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos}


def evaluate(node):
    """The value of an ast node made of literals, tuples, lists and + - * / // % on them; ValueError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool, type(None))):
        return node.value
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(evaluate(e) for e in node.elts)
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPS:
        return OPS[type(node.op)](evaluate(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPS:
        a, b = evaluate(node.left), evaluate(node.right)
        for seq, n in ((a, b), (b, a)):  # "A" * 10**9 would be a file that eats the machine
            if isinstance(seq, (str, tuple)) and isinstance(n, int) and len(seq) * n > 10_000:
                raise ValueError("a repetition this long")
        return OPS[type(node.op)](a, b)
    raise ValueError(ast.unparse(node))


def read_preset(path):
    """A preset file as {name: value}; UserError names the line that is not an assignment of a literal."""
    try:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"preset {path} cannot be read ({getattr(e, 'strerror', None) or e}); "
                        f"presets are the .py files in config/") from None
    except (SyntaxError, ValueError) as e:
        raise UserError(f"preset {path} is not a list of assignments ({e}); write lines such as n_layer = 6") from None
    out = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise UserError(f"preset {path}, line {node.lineno}: only assignments such as n_layer = 6 are read, "
                            f"code in a preset is never run")
        try:
            out[node.targets[0].id] = evaluate(node.value)
        except (ValueError, TypeError, ArithmeticError) as e:
            raise UserError(f"preset {path}, line {node.lineno}: {node.targets[0].id} must be a literal or arithmetic "
                            f"on literals, not {str(e)[:80]}") from None
    return out


@functools.lru_cache
def meanings(cls):
    """{field: the comment behind it} of a dataclass, read from its source."""
    return dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))


def coerce(key, value, kind):
    """`value` as the type `kind` of the setting `key`; a string from the command line is parsed, an int may stand for a
    float and a single string for a tuple of strings. UserError says what was expected."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    given = value
    if isinstance(value, str) and str not in kinds and not any(typing.get_args(k)[:1] == (str,) for k in kinds):
        try:
            value = evaluate(ast.parse(value.strip(), mode="eval").body)
        except (ValueError, TypeError, SyntaxError, ArithmeticError):
            value = {"true": True, "false": False}.get(value.lower(), value)
    for k in kinds:
        item = typing.get_args(k)[:1]
        if item:  # tuple[int, ...] or tuple[str, ...]
            value_t = value if isinstance(value, tuple) else (value,)
            if item == (float,):
                value_t = tuple(float(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in value_t)
            if all(isinstance(v, item) and not isinstance(v, bool) for v in value_t):
                return value_t
        elif k is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        elif isinstance(value, k) and (k is bool or not isinstance(value, bool)):
            return value
    names = " or ".join(getattr(k, "__name__", str(k)) if not typing.get_args(k) else str(k) for k in kinds)
    raise UserError(f"{key} takes {names}, not {given!r}")


def nearest(word, words):
    close = difflib.get_close_matches(word, list(words), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else "; --help lists them all"


def show_help(doc, classes):
    print(inspect.cleandoc(doc or "") + "\n\nSettings, as --key=value or as lines of a preset file:")
    for cls in classes:
        print(f"\n{cls.__name__}")
        for f in dataclasses.fields(cls):
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            print(f"  --{f.name}={default!r:<12} {meanings(cls).get(f.name, '')}")


def parse(argv, *classes, doc="", words=(), free=()):
    """Settings from the command line: `[WORD ...] [PRESET.py ...] [--key=value ...]`: a later preset
    overrides an earlier one, a --key=value overrides every preset.
    Returns one {field: value} for each dataclass in `classes`, holding only what was given, and then the list of
    `words` that stood there (names of datasets, claims or commands). Behind a word that is in `free` too all others are taken as they
    stand (names of files, a text). A setting that two classes share goes to both. A tuple of
    strings gathers each time it is given. UserError names what is wrong; --help prints and exits."""
    types_ = {f.name: typing.get_type_hints(c)[f.name] for c in classes for f in dataclasses.fields(c)}
    given, override, found = {}, {}, []
    for arg in argv:
        if arg in ("--help", "-h"):
            show_help(doc, classes)
            sys.exit(0)
        if not arg.startswith("-"):
            if found and found[0] in free:
                found.append(arg)
                continue
            if arg.endswith(".py"):
                pairs = [(k, v, arg) for k, v in read_preset(arg).items()]
            elif words is None or arg in words:
                found.append(arg)
                continue
            elif words:
                raise UserError(f"{arg} is none of {', '.join(words)}{nearest(arg, words)}")
            else:
                raise UserError(f"{arg} is neither a preset (a file that ends in .py) nor a --key=value")
        else:
            key, eq, value = arg.lstrip("-").partition("=")
            key = key.replace("-", "_")
            if not eq and types_.get(key, bool) is not bool:
                raise UserError(f"--{key} needs a value, as --{key}=VALUE")
            pairs = [(key, value if eq else True, "the command line")]
        for key, value, where in pairs:
            if key not in types_:
                raise UserError(f"{key} (in {where}) is not a setting{nearest(key, types_)}")
            value = coerce(key, value, types_[key])
            if not arg.startswith("-"):
                given[key] = value
            elif types_[key] == tuple[str, ...]:
                override[key] = override.get(key, ()) + value
            else:
                override[key] = value
    given.update(override)
    return [{f.name: given[f.name] for f in dataclasses.fields(c) if f.name in given} for c in classes] + [found]


def build(cls, **values):
    """cls(**values), with the ValueError of an impossible combination as a UserError."""
    try:
        return cls(**values)
    except ValueError as e:
        raise UserError(str(e)) from None


def within(cfg, low=None, high=None, *names):
    """ValueError unless each named setting of cfg lies in [low, high]; None: no bound."""
    for name in names:
        value = getattr(cfg, name)
        if not ((low is None or value >= low) and (high is None or value <= high)):  # not: NaN is outside too
            raise ValueError(f"{name} must be at least {low}, not {value}" if high is None else
                             f"{name} must lie between {low} and {high}, not {value}")


def compiler_missing(device):
    """What torch.compile needs on this device ("cpu" or "cuda") and does not find; "" where nothing is missing."""
    if device == "cuda":
        from torch.utils._triton import has_triton
        return "" if has_triton() else "Triton for this GPU"
    if sys.platform == "linux" and not shutil.which(os.environ.get("CXX", "g++")):
        return "a C++ compiler (package g++)"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "Python.h (package python3-dev)"
    return ""


def run(main):
    """main(argv) as a program: exit code 2 and one sentence for a UserError, 130 when interrupted."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":  # under torchrun every process has the same to say
            print(f"{os.path.basename(sys.argv[0])}: {e}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
