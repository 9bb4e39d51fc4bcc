"""What surrounds memories: search, the store on disk, reading texts in, and kNN-LM.

Bottom-up: exact search and an index for very many keys; the Store, one file of SQL or a schema of
PostgreSQL; what reads texts into one, for the memory of blocks M or as a datastore; what opens one
for a model; and the work of `python sample.py memory FILE list|show|forget|prune|stats`.
"""
import bisect
import collections
import contextlib
import itertools
import math
import os
import re
import shlex
import sqlite3
import time
import urllib.parse
import zlib

import config  # before torch: it sets the allocator's switches
import numpy as np
import torch
from torch.nn import functional as F

import prepare
from config import UserError, summary
from model import few_rows, topk, topk_indices


# -------------------------------------------------------------------------------------------------
# search


@torch.no_grad()
def search(q, keys, k, room=2 ** 24, span=2 ** 16):
    """Return the k largest inner products of each query q (Q, D) with keys (N, D), largest first,
    and the rows of those keys: (Q, k) each, exactly. Takes `span` keys at a time, and as many
    queries as have `room` for their scores."""
    k, span = min(k, len(keys)), min(span, len(keys))
    found = []
    for x in q.split(max(1, room // span)):
        parts = []
        for first in range(0, len(keys), span):
            part = keys[first:first + span].to(q.dtype)
            values, rows = topk(few_rows(x, part), min(k, len(part)), ordered=False)
            parts.append((values, rows + first))
        values, rows = (torch.cat(part, dim=-1) for part in zip(*parts))
        order = topk_indices(values, k)
        found.append((values.gather(-1, order), rows.gather(-1, order)))
    return tuple(torch.cat(part) for part in zip(*found))


def neg_distance(x, means):
    """Return (n, N), larger where x (n, D) is nearer to one of means (N, D)."""
    return F.linear(x, means, -means.square().sum(-1) / 2)


class Clusters:
    """An approximate index, on the CPU, of keys (N, D) by their inner product with queries: an
    inverted file (Sivic and Zisserman 2003). Each key is in the list of the nearest of some
    2 sqrt(N) centroids; a query reads the lists whose keys may be largest: the product with the
    centroid plus two standard deviations, as if keys lay around it in no direction."""

    def __init__(self, keys, centroids=None, lists=None):
        """centroids (n, D), lists (N,): those of an index made before. Without lists each key goes
        to the nearest centroid; centroids are made anew for twice, or half, as many keys."""
        keys = keys.float().cpu()
        n = max(1, round(2 * len(keys) ** 0.5))
        if centroids is None or not n / 2 ** 0.5 <= len(centroids) <= n * 2 ** 0.5:
            centroids, lists = self.k_means(keys, n), None
        if lists is None:
            parts = keys.split(4096)
            lists = torch.cat([neg_distance(part, centroids).argmax(1) for part in parts])
        self.centroids, self.lists = centroids, lists
        self.order = lists.argsort(stable=True)
        self.keys = keys[self.order]  # those of a list stand together
        sizes = torch.bincount(lists, minlength=len(centroids))
        self.ends = [0, *sizes.cumsum(0).tolist()]
        spread = torch.zeros(len(centroids)).index_add_(0, lists, keys.square().mean(1))
        spread = spread / sizes.clamp(min=1) - centroids.square().mean(1)
        self.spread = spread.clamp(min=0).sqrt().masked_fill(sizes == 0, -math.inf)

    @staticmethod
    def k_means(keys, n, rounds=6, size=40):
        """Return n centroids (n, D) of at most `size` keys for each, drawn with a seed."""
        drawn = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
        keys = keys[drawn[:size * n]]
        centroids = F.pad(keys[:n], (0, 0, 0, max(n - len(keys), 0)))
        for _ in range(rounds):
            lists = neg_distance(keys, centroids).argmax(1)
            sizes = torch.bincount(lists, minlength=n)[:, None]
            means = torch.zeros_like(centroids).index_add_(0, lists, keys) / sizes.clamp(min=1)
            centroids = torch.where(sizes > 0, means, centroids)
        return centroids

    @torch.no_grad()
    def search(self, q, k, probes=64):
        """Return for queries q (Q, D) the k largest inner products in `probes` lists, and the rows
        of those keys: (Q, k) each, -inf where there are no more."""
        x, found = q.float().cpu(), []
        hope = F.linear(x, self.centroids) + 2 * x.norm(dim=1, keepdim=True) * self.spread
        for one, lists in zip(x, hope.topk(min(probes, len(self.centroids)))[1].tolist()):
            spans = [slice(*self.ends[i:i + 2]) for i in lists]
            values = torch.cat([self.keys[span] @ one for span in spans])
            values, at = values.topk(min(k, len(values)))
            rows = torch.cat([self.order[span] for span in spans])[at]
            more = 0, k - len(at)
            found.append((F.pad(values, more, value=-math.inf), F.pad(rows, more)))
        return tuple(torch.stack(part).to(q.device) for part in zip(*found))


# -------------------------------------------------------------------------------------------------
# the store: entries with a key, a value and the text they came from, in one file of SQL or on a
# server


COLUMNS = ("id, layer, head, key, value, text, source, start, stop, "
           "uses, worth, last, checksum")
Entry = collections.namedtuple("Entry", COLUMNS)
TABLES = ("CREATE TABLE facts (value TEXT NOT NULL)",
          "CREATE TABLE entries (id INTEGER PRIMARY KEY, layer INTEGER NOT NULL, "
          "head INTEGER NOT NULL, source INTEGER NOT NULL, start INTEGER NOT NULL, "
          "stop INTEGER NOT NULL, uses INTEGER NOT NULL, worth REAL NOT NULL, last REAL NOT NULL, "
          "checksum INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL, text TEXT NOT NULL)")
SCHEMA = {("table", "facts", TABLES[0]), ("table", "entries", TABLES[1])}
STORE_FORMAT = "4"
DAMAGE = sqlite3.DatabaseError, UnicodeError  # what reading a damaged file may raise
HALF_LIFE = 7 * 24 * 3600.0  # seconds after which a use counts half when entries are pruned
LEARN_AGAIN = "learn its texts with this model, into a new file"
MAX_ENTRY = 2 ** 20  # bytes
KNN_LAYER = -1  # the layer of output vectors in a datastore
# (what has no SQL are the indexes that SQLite makes for itself)
FIND_TABLES = "SELECT type, name, sql FROM sqlite_master WHERE sql NOTNULL LIMIT 3"
FIND_SIZE = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
URL = "postgres(ql)?://"
URL_HELP = ("the URL of a store is postgresql://USER@HOST/DATABASE?schema=NAME, a NAME of small "
            "letters, digits and _; with a PASSWORD as USER:PASSWORD@, its / ? @ % written %2F "
            "%3F %40 %25")


def connect(path, write):
    """Return (a connection, whether the database is empty). A commit is on the disk when it
    returns, readers go on while somebody writes, and what is deleted is overwritten and its room
    given back."""
    name = urllib.parse.quote(os.fsencode(os.path.abspath(path)))
    db = sqlite3.connect(f"file:{name}?mode={'rwc' if write else 'rw'}", uri=True, timeout=10)
    db.text_factory = lambda raw: raw.decode(errors="replace")  # the checksum finds damaged text
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_ENTRY)
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA secure_delete = ON")
    empty = not db.execute("PRAGMA schema_version").fetchone()[0]
    if write and empty:
        db.execute("PRAGMA auto_vacuum = FULL")
    # (a reader that could not write would leave files behind)
    db.execute("PRAGMA synchronous = FULL" if write else "PRAGMA query_only = ON")
    return db, empty


# The SQL of a Store for SQLite, and that of PostgreSQL, replaced in this order. The catalog is
# listed as SQLite lists its own; a table that could run somebody else's code, or lose rows in a
# crash, is listed as no "table".
POSTGRES_SQL = {
    "?": "%s", "INTEGER": "BIGINT", "REAL": "DOUBLE PRECISION", "BLOB": "BYTEA",
    "PRAGMA integrity_check(1)": "SELECT 'ok'",  # the server sees to its pages
    "PRAGMA journal_mode = WAL": "SET synchronous_commit = on",
    FIND_SIZE: "SELECT pg_total_relation_size('entries')",
    FIND_TABLES: """
        SELECT CASE WHEN bool_and(relkind = 'r' AND relpersistence = 'p' AND relchecks = 0 AND NOT (
                relhasrules OR relhastriggers OR relrowsecurity OR relhassubclass OR relispartition
                OR atthasdef OR attidentity <> '')) THEN 'table' ELSE 'other' END,
            relname, 'CREATE TABLE ' || relname || ' (' || string_agg(
                attname || CASE atttypid WHEN 'bigint'::regtype THEN ' INTEGER'
                    WHEN 'double precision'::regtype THEN ' REAL' WHEN 'bytea'::regtype THEN ' BLOB'
                    WHEN 'text'::regtype THEN ' TEXT' ELSE ' other' END
                || CASE WHEN attnum = indkey[0] AND indnatts = 1 THEN ' PRIMARY KEY'
                    WHEN attnotnull THEN ' NOT NULL' ELSE '' END, ', ' ORDER BY attnum) || ')'
        FROM pg_class c JOIN pg_attribute ON attrelid = c.oid AND attnum > 0 AND NOT attisdropped
            LEFT JOIN pg_index ON indrelid = c.oid AND indisprimary
        WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
            AND NOT EXISTS (SELECT FROM pg_index WHERE indexrelid = c.oid AND indisprimary)
        GROUP BY c.oid, relname"""}


class Postgres(contextlib.AbstractContextManager):
    """A schema of a PostgreSQL database, to a Store what a connection of sqlite3 is, its errors
    included. A commit is on the server's disk when it returns, a transaction sees one moment."""

    def __init__(self, url):
        try:
            import psycopg
        except ImportError:
            raise UserError("a store in PostgreSQL needs a package; pip install "
                            "\"psycopg[binary]\"") from None
        self.Error = psycopg.Error
        parts = re.split(r"(?<=[?&])schema=([a-z_][a-z0-9_]{0,62})(?:&|$)", url, maxsplit=1)
        before, self.schema, after = (*parts, "nanoconcept", "")[:3]
        try:
            # (what libpq says of a URL may quote the password)
            if not re.fullmatch("[^/]*//[^/?@]*@?[^@]*", url):
                raise self.Error
            options = psycopg.conninfo.conninfo_to_dict(before + after)
        except self.Error:
            raise UserError(URL_HELP) from None
        options = {"connect_timeout": 10, **options, "client_encoding": "utf8"}
        with self.translated():
            self.db = psycopg.connect(**options, autocommit=True)

    def start(self, write, new, busy):
        """Return whether the schema is empty. write: until it is closed nobody else may;
        UserError(busy) where somebody does. new: make the schema if there is none."""
        with self.translated():
            # (a batch may wait for a model; a writer whose machine is gone holds its lock)
            self.db.execute(f'''SET search_path = "{self.schema}"; SET lock_timeout = 10000;
                SET idle_in_transaction_session_timeout = 0; SET tcp_keepalives_idle = 60;
                SET default_transaction_isolation = "repeatable read";
                SET default_transaction_read_only = {not write}''')
        lock = zlib.crc32(f"nanoconcept {self.schema}".encode())
        if write and not self.execute("SELECT pg_try_advisory_lock(?)", (lock,)).fetchone()[0]:
            raise UserError(busy)
        if new and not self.execute("SELECT current_schema()").fetchone()[0]:
            self.execute(f'CREATE SCHEMA "{self.schema}"')
        return not self.execute(FIND_TABLES).fetchone()

    @contextlib.contextmanager
    def translated(self):
        try:
            yield
        except self.Error as e:
            raise sqlite3.OperationalError(summary(e)) from None

    def execute(self, query, values=(), method="execute"):
        for ours, theirs in POSTGRES_SQL.items():
            query = query.replace(ours, theirs)
        with self.translated():
            cursor = self.db.cursor(binary=True)
            getattr(cursor, method)(query, values)
            return cursor

    def executemany(self, query, rows):
        return self.execute(query, rows, "executemany")

    @property
    def in_transaction(self):
        return self.db.info.transaction_status in (2, 3)  # fine, or failed

    def __exit__(self, kind, *_):
        if kind:
            with contextlib.suppress(self.Error):  # of a connection that is lost
                self.db.rollback()
        else:
            with self.translated():
                self.db.commit()

    def close(self):
        with contextlib.suppress(self.Error):
            self.db.rollback()
            self.db.execute("SELECT pg_advisory_unlock_all()")  # before the next writer comes
        self.db.close()


def checksum(*entry):
    """Return the CRC-32 of an Entry without its own, types included: it finds every flipped bit and
    every damage of up to 32 bits in a row."""
    id_, layer, head, key, value, *others = entry
    numbers = id_, layer, head, len(key), others
    return zlib.crc32(repr(numbers).encode(), zlib.crc32(value, zlib.crc32(key)))


def shape_of(text):
    """Return (numbers, type) of keys or values as a store names them, such as "64 float16"."""
    n, name = re.fullmatch("([1-9][0-9]{0,5}) (float16|float32|int32)", text).groups()
    return int(n), np.dtype(name).newbyteorder("<")


class Store:
    """Entries of a memory or a datastore on disk, as numpy arrays to the outside: one file, or one
    schema of the server at a URL. Each belongs to a layer and a head, and has a key (D,), a value
    (E,), the end of the text that led to it, where in that text it stands, how often and when last
    it was used, and a checksum. One process writes at a time, any number read and see what is
    committed. What `batch` writes is on the disk when it ends, whole, or not at all; so a process
    may be killed at any moment.

    model: what the entries belong to (prepare.checkpoint_id); kind: "memory" or "knn"; key, value:
    (D, type), (E, type) of numpy. A store that holds something else is refused; None takes what it
    holds. A new one needs them all."""

    def __init__(self, path, model=None, kind=None, key=None, value=None, write=False):
        self.path, self.lock, self.db = str(path), None, None
        wanted = {"format": STORE_FORMAT, "kind": kind, "model": model,
                  "key": key and f"{key[0]} {key[1]}", "value": value and f"{value[0]} {value[1]}"}
        new, self.remote = write and None not in wanted.values(), re.match(URL, self.path)
        missing = UserError(f"store {path} does not exist; python sample.py learn makes one")
        busy = f"store {path} is being written by another process; wait for it to end"
        if os.path.isdir(path):
            raise UserError(f"store {path} is a folder; name a file")
        if not (self.remote or os.path.isfile(path) or new):
            raise missing
        lock = f"{path}.lock"
        if write and os.path.isfile(lock) and os.path.getsize(lock):
            raise UserError(f"{lock} holds something, and a store at {path} needs an empty file of "
                            f"that name; choose another name")
        try:
            if self.remote:
                self.db = Postgres(self.path)
                empty = self.db.start(write, new, busy)
                if empty and not new:
                    raise missing
            else:
                if write:
                    self.lock = prepare.hold(lock, busy)
                self.db, empty = connect(path, write)
            if empty and (not write or None in wanted.values()):
                raise UserError(f"store {path} is empty; python sample.py learn fills it")
            if empty:
                self.create(wanted)
            self.recognize()
            self.check(wanted)
            if write:
                self.db.execute("PRAGMA journal_mode = WAL")
        except (OSError, *DAMAGE) as e:
            self.close()
            raise UserError(f"{path} cannot be opened ({summary(e)}): " + (
                "see that the server is there and lets you in, and that nothing else is in the "
                "schema, or name another with ?schema=NAME" if self.remote else
                "it is not a store of this project, or damaged, or its folder takes no files; "
                "nothing in it was changed, name another file")) from None
        except UserError:
            self.close()
            raise

    def create(self, facts):
        """Make the tables of a new store, and write what it is."""
        with self.batch():
            for table in TABLES:
                self.db.execute(table)
            self.db.execute("INSERT INTO facts (value) VALUES ('')")
            self.put_facts({**facts, "next": 1, "n": 0})

    def recognize(self):
        """Read what the store is. sqlite3.DatabaseError unless the file has our tables, each page
        in its place, and nothing else: a view or a trigger of somebody else's is never run."""
        schema = set(self.db.execute(FIND_TABLES))
        if schema != SCHEMA:
            if {row[:2] for row in schema} == {row[:2] for row in SCHEMA}:
                raise UserError(f"store {self.path} was made by another version of this program; "
                                f"{LEARN_AGAIN}")
            raise sqlite3.DatabaseError("it has other tables")
        found = self.db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        self.facts = self.read_facts()
        try:
            self.D, self.key_type = shape_of(self.facts["key"])
            self.E, self.value_type = shape_of(self.facts["value"])
        except (AttributeError, TypeError, KeyError):
            raise sqlite3.DatabaseError("it says nothing of its keys and values") from None
        self.sizes = self.D * self.key_type.itemsize, self.E * self.value_type.itemsize

    def check(self, wanted):
        """Raise UserError unless the store is what is wanted."""
        for name, value in wanted.items():
            found = self.facts.get(name)
            if value is not None and found != value:
                raise UserError(f"store {self.path} " + (
                    f"belongs to another model ({found}, this one is {value}); {LEARN_AGAIN}"
                    if name == "model" else
                    f"has {name} {found}, not {value}; give the right one, or {LEARN_AGAIN}"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Give up what was not committed, and let others write."""
        if self.db is not None:
            self.db.close()
        if self.lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.lock.name)
            self.lock.close()
        self.db = self.lock = None

    @contextlib.contextmanager
    def explained(self):
        """Turn the database's own errors into sentences."""
        try:
            yield
        except sqlite3.OperationalError as e:
            raise UserError(f"store {self.path} cannot be used ({e}); what was committed before "
                            f"is untouched") from None
        except DAMAGE as e:
            raise self.damaged(e) from None

    def damaged(self, why):
        return UserError(f"store {self.path} is damaged ({why}); put a copy of it back, or "
                         f"{LEARN_AGAIN}")

    @contextlib.contextmanager
    def batch(self):
        """See the store as of one moment, and write what happens inside together when the outermost
        batch ends, or take it back if it fails."""
        if self.db.in_transaction:
            yield
            return
        with self.explained(), self.db:
            self.db.execute("BEGIN")
            yield

    def read_facts(self):
        """Return what a store is, the next id, and how many entries it has, n, so that one that a
        damaged page hides is missed."""
        try:
            (value,), = self.db.execute("SELECT value FROM facts LIMIT 2")
            facts = prepare.unseal(value)
            if all(type(facts[k]) is int and 0 <= facts[k] < 2 ** 53 for k in ("next", "n")):
                return facts
        except (ValueError, TypeError, KeyError):
            pass
        raise sqlite3.DatabaseError("what it says of its entries cannot be read")

    def put_facts(self, facts):
        self.db.execute("UPDATE facts SET value = ?", (prepare.seal(facts).decode(),))

    def count(self):
        """Return how many entries the store says that it has."""
        with self.explained():
            return self.read_facts()["n"]

    def add(self, layer, heads, keys, values, texts, now=None, spans=None, source=None):
        """Write n entries of a layer: heads (n,), keys (n, D), values (n, E) and n texts. Return
        their ids (n,); an id is never given twice. now: when, in seconds since 1970. spans (n, 2):
        the bytes of the text read, `source`, that each brings back, the last of its own text;
        without them each text is whole and its own source."""
        n = len(texts)
        uses = 0, 1.0, time.time() if now is None else float(now)
        keys = np.ascontiguousarray(keys, dtype=self.key_type).reshape(n, self.D)
        values = np.ascontiguousarray(values, dtype=self.value_type).reshape(n, self.E)
        if spans is None:
            spans = [(0, len(text.encode())) for text in texts]
        with self.batch():
            facts = self.read_facts()
            ids = range(facts["next"], facts["next"] + n)
            self.put(zip(ids, [layer] * n, np.asarray(heads).tolist(), map(bytes, keys),
                         map(bytes, values), texts, ids if source is None else [source] * n,
                         *zip(*np.asarray(spans).tolist()), *([use] * n for use in uses)))
            self.put_facts({**facts, "next": ids.stop, "n": facts["n"] + n})
        return np.array(ids)

    def put(self, entries):
        """Insert each Entry, given without its checksum; where its id is there, update its text and
        its use."""
        marks = ", ".join("?" * len(Entry._fields))
        self.db.executemany(
            f"INSERT INTO entries ({COLUMNS}) VALUES ({marks}) ON CONFLICT (id) DO UPDATE SET text "
            f"= excluded.text, uses = excluded.uses, worth = excluded.worth, last = excluded.last, "
            f"checksum = excluded.checksum", ((*entry, checksum(*entry)) for entry in entries))

    def entries(self, where="", *values):
        """Yield lists of Entry in the order of their ids."""
        with self.explained():
            rows = self.db.execute(f"SELECT {COLUMNS} FROM entries {where} ORDER BY id", values)
            while some := rows.fetchmany(4096):
                yield [Entry(*row) for row in some]

    def entry(self, id_):
        """Return the Entry of an id, None where there is none."""
        return next(self.entries("WHERE id = ?", int(id_)), [None])[0]

    def intact(self, entry):
        """Tell whether an Entry is as it was written."""
        *content, found = entry
        blobs = entry.key, entry.value
        return all(type(b) is bytes for b in blobs) and tuple(map(len, blobs)) == self.sizes and \
            checksum(*content) == found and entry.worth > 0 and 0 <= entry.last < 2 ** 36

    def sound(self):
        """Yield lists of all Entries in the order of their ids, as of one moment. UserError names
        damaged ones, or says that some are lost."""
        wrong, n = [], 0
        with self.batch():
            for some in self.entries():
                n += len(some)
                wrong += [e.id for e in some if not self.intact(e)]
                if not wrong:
                    yield some
            written = self.read_facts()["n"]
        self.refuse(wrong)
        if n != written:
            raise self.damaged(f"it has {n:,} of its {written:,} entries")

    def refuse(self, ids, why="the checksum does not fit"):
        """Raise UserError that names these damaged entries, where there are some."""
        if len(ids):
            more = f", and {len(ids) - 1} more" * (len(ids) > 1)
            raise UserError(f"store {self.path} has a damaged entry ({ids[0]}{more}: {why}); take "
                            f"it out with python sample.py memory {shlex.quote(self.path)} forget "
                            f"{' '.join(map(str, ids[:20]))}")

    def columns(self, some):
        """Return a list of Entry as arrays."""
        numbers = lambda name, kind: np.array([getattr(e, name) for e in some], kind)
        blobs = lambda name, kind: np.frombuffer(b"".join(getattr(e, name) for e in some), kind)
        return {"ids": numbers("id", np.int64), "head": numbers("head", np.int64),
                "keys": blobs("key", self.key_type).reshape(-1, self.D),
                "values": blobs("value", self.value_type).reshape(-1, self.E),
                "uses": numbers("uses", np.int64), "last": numbers("last", np.float64)}

    def arrays(self, layer):
        """Return all entries of a layer in the order of their ids: {"ids" (n,), "head" (n,),
        "keys" (n, D), "values" (n, E), "uses" (n,), "last" (n,)}. UserError where any entry of the
        store is damaged or lost."""
        parts = [self.columns([])]
        for some in self.sound():
            parts.append(self.columns([e for e in some if e.layer == layer]))
        found = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        for k in ("keys", "values"):
            endless = ~np.isfinite(found[k]).all(1)
            self.refuse(found["ids"][endless].tolist(), "no finite numbers")
        return found

    def texts(self, ids):
        """Return the texts of entries; "" for one that is not there any more, or is damaged."""
        found = [self.entry(i) for i in ids]
        return [e.text if e and self.intact(e) else "" for e in found]

    def touch(self, ids, n=1, now=None):
        """Note that entries were used n times (a number, or one for each id) at `now`, in seconds
        since 1970. What their uses are worth halves every HALF_LIFE."""
        now = time.time() if now is None else float(now)
        with self.batch():
            for i, times in zip(ids, np.broadcast_to(n, len(ids)).tolist()):
                e = self.entry(i)
                if e:
                    self.refuse([e.id] * (not self.intact(e)))
                    worth = e.worth * 2 ** (min(e.last - now, 0) / HALF_LIFE) + times
                    used = e._replace(uses=e.uses + times, worth=worth, last=max(now, e.last))
                    self.put([used[:-1]])

    def forget(self, what):
        """Take out entries by id, or all that bring back a piece of this text, wherever it was
        read, and cut it out of the texts of those behind it. Return how many went."""
        with self.batch():
            ids, cut = self.within(what) if isinstance(what, str) else (what, [])
            self.put(e[:-1] for e in cut)
            gone = self.db.executemany("DELETE FROM entries WHERE id = ?",
                                       [(int(i),) for i in ids]).rowcount
            facts = self.read_facts()
            self.put_facts({**facts, "n": facts["n"] - gone})
        return gone

    def within(self, text):
        """Return the ids of the entries that bring back a piece of this text, and each Entry behind
        it, with what is left of its own: that is the last few bytes before `stop` of its source,
        and all of them make up the source again."""
        raw, sources = text.encode(), collections.defaultdict(bytearray)
        for e in (e for some in self.sound() for e in some):
            kept, source = e.text.encode(), sources[e.source]
            self.refuse([e.id] * (not len(kept) <= e.stop < 2 ** 31), "a place that no text has")
            source.extend(b"\xff" * (e.stop - len(source)))  # (a byte that no text has)
            source[e.stop - len(kept):e.stop] = kept
        places = {k: [m.start() for m in re.finditer(b"(?=" + re.escape(raw) + b")", source)]
                  for k, source in sources.items()}  # they may overlap
        ids, cut = [], []
        for e in (e for some in self.sound() for e in some):
            kept, before = e.text.encode(), bisect.bisect_left(places[e.source], e.stop)
            end = places[e.source][before - 1] + len(raw) if before else 0
            if end > e.start:
                ids.append(e.id)
            elif end > e.stop - len(kept):
                cut.append(e._replace(text=kept[end - e.stop:].decode()))
        return ids, cut

    def prune(self, n):
        """Keep the n entries whose uses, the writing counted as one, are worth most: LRFU (Lee et
        al. 2001), each use counts half a HALF_LIFE later. Return how many went."""
        with self.batch():
            # (their order is the same at any time)
            ranks = sorted((math.log2(e.worth) + e.last / HALF_LIFE, e.id)
                           for some in self.sound() for e in some)
            return self.forget([id_ for _, id_ in ranks[:max(len(ranks) - n, 0)]])

    def stats(self):
        """Return what the store says of itself, and its size: facts, bytes, entries, and a list
        of (layer, entries, used ones, uses)."""
        n = sum(map(len, self.sound()))
        layers = self.db.execute(
            "SELECT layer, COUNT(*), COUNT(NULLIF(uses, 0)), CAST(SUM(uses) AS BIGINT) "
            "FROM entries GROUP BY layer ORDER BY layer").fetchall()
        size, = self.db.execute(FIND_SIZE).fetchone()
        return {**self.facts, "bytes": size, "entries": n, "layers": layers}


def open_store(kind, target, model, path, write=False):
    """Return the Store of a kind at target, of this model, whose checkpoint is at path."""
    key, value = (model.cfg.n_embd, "float16"), (1, "int32")
    if model.cfg.running_mean:
        raise UserError(f"{path} reads a mean of all that came before, and a store is made window "
                        f"by window; train one with --running_mean=0")
    if kind == "memory":
        if not model.init_memory(1, size=0):
            raise UserError(f"{path} has no block M to remember with; train one with an M in "
                            f"layers, such as config/facts.py")
        layers = model.cfg.layers
        if any(part.count("(") > part.count(")") for part in (
                layers[:i] for i, letter in enumerate(layers) if letter == "M")):
            raise UserError(f"{path} remembers chunks (layers = {layers}), and a store keeps "
                            f"tokens; train one with an M outside levels")
        if model.cfg.n_slot:
            raise UserError(f"{path} reads context slots too, which a store keeps nothing of; "
                            f"train one with --history=0")
        key = value = model.cfg.mem_dim, "float16"
    checkpoint = prepare.checkpoint_id(prepare.checkpoint_path(path))
    return Store(target, checkpoint, kind, key, value, write)


# -------------------------------------------------------------------------------------------------
# the memory of blocks M


@torch.inference_mode()
def absorb(model, ids, piece=8192, rows=32):
    """Read ids into memory, without a gradient: pieces of the text are read side by side, each
    into a memory of its own, half a window at a time behind the half before. A text is one
    document. Return {block: [(keys (n, D), values (n, D), places in ids (n,)) of each head]}."""
    T, n, device = model.cfg.block_size, len(ids), model.wte.weight.device
    blocks = list(model.init_memory(1, size=0))
    if blocks == [model.blocks[-1].i] and model.cfg.mem_novelty > 1:
        # what the last block finds changes nothing that is written: little is searched faster
        piece = min(piece, 4 * T)
    piece = max(piece, T)
    ids = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    found = {i: [[] for _ in range(model.cfg.mem_head)] for i in blocks}
    for first in prepare.bar(torch.arange(0, n, piece).split(rows), desc="read"):
        last, start = (first + piece).clamp(max=n), (first - T // 2).clamp(min=0)
        memory = model.init_memory(len(first), size=int((last - start).max()))
        places = {i: torch.full(m.usage.shape, -1) for i, m in memory.items()}  # of entries, in ids
        known, carried = torch.zeros_like(first), None
        while bool((start < last).any()):
            x = ids[(start[:, None] + torch.arange(min(T, n))).clamp(max=n - 1)].to(device)
            state = model.init_state(len(first), memory=memory, carried=carried,
                                     known=known.to(device))
            model(x, state=state, at=x[:, :0])
            left = torch.where(last - start > T, max(T // 2, 1), last - start)
            written, carried = model.leave_window(state, left.to(device))
            for i, parts in written.items():
                slot, at, better = (t.cpu() for t in parts)
                new = torch.where(better, start[:, None, None] + at, places[i].gather(2, slot))
                places[i].scatter_(2, slot, new)
            start, known = start + left, T - left
        for i, m in memory.items():
            # what was read before a piece begins belongs to the piece before
            kept = (m.usage > 0) & (places[i] >= first[:, None, None]).to(device)
            for h, parts in enumerate(found[i]):
                every = m.keys, m.values, places[i].to(device)
                parts.append([t[:, h][kept[:, h]].cpu() for t in every])
    return {i: [tuple(map(torch.cat, zip(*parts))) for parts in heads]
            for i, heads in found.items()}


def build_memory(model, found, room=0, indexes=None):
    """Return what absorb found as a store, {block: Memory} of one row with `room` for what is
    read besides; indexes: {block: [an index of the keys of each head]} to search it by."""
    memory = model.init_memory(1, size=room)
    for i, heads in found.items():
        store = model.init_memory(1, size=max(len(keys) for keys, *_ in heads))[i]
        for h, (keys, values, *_) in enumerate(heads):
            filled = 0, h, slice(len(keys))
            store.keys[filled], store.values[filled], store.usage[filled] = keys, values, 1.0
        store.index = indexes and indexes[i]
        memory[i].store = store
    return memory


def open_indexes(store, found):
    """Return Clusters of what absorb found, {block: [one for each head]}: as they lie beside the
    store, as far as they fit the keys. What had to be made is written there."""
    path, saved, new, indexes = f"{store.path}.index", {}, {}, {}
    with contextlib.suppress(Exception):  # what is damaged, in whatever way, is made anew
        with np.load(path, allow_pickle=False) as f:  # (which compares the CRC-32 of each array)
            saved = {name: torch.from_numpy(f[name]) for name in f.files}
    for i, heads in found.items():
        for h, (keys, *_) in enumerate(heads):
            names = [f"{store.facts['model']} {i} {h} {part}"
                     for part in ("centroids", "lists", "keys")]
            centroids, lists, check = map(saved.get, names)
            now = torch.tensor(zlib.crc32(keys.numpy()))
            index = Clusters(keys, centroids, lists if check == now else None)
            indexes.setdefault(i, []).append(index)
            new.update(zip(names, (index.centroids, index.lists, now)))
    changed = any(new[name] is not saved.get(name) for name in new if not name.endswith("keys"))
    if changed and not store.remote:
        try:
            with prepare.replacing(path) as f:
                np.savez(f, **{name: t.numpy() for name, t in new.items()})
        except UserError as e:
            config.note(f"[index not kept: {e}]")
    return indexes


def open_memory(store, model, room, index=False):
    """Return what a Store holds: memory {block: Memory} of one row with `room` for more, and
    sources {block: (store, ids (H, N))}. index: search it by an index."""
    found, sources, H = {}, {}, model.cfg.mem_head
    for i in model.init_memory(1, size=0):
        a = store.arrays(i)
        if not len(a["ids"]):
            raise UserError(f"store {store.path} has no entries of block {i}; python sample.py "
                            f"learn --memory={shlex.quote(store.path)} FILE fills it")
        rows = [a["head"] == h for h in range(H)]
        found[i] = [[torch.from_numpy(a[k][of_head].astype(np.float32)) for k in ("keys", "values")]
                    for of_head in rows]
        ids = np.full((H, max(of_head.sum() for of_head in rows)), -1)
        for h, of_head in enumerate(rows):
            ids[h, :of_head.sum()] = a["ids"][of_head]
        sources[i] = store, ids
    return build_memory(model, found, room, open_indexes(store, found) if index else None), sources


# -------------------------------------------------------------------------------------------------
# kNN-LM: what came next at places like this one


class Neighbours:
    """kNN-LM (Khandelwal et al. 2020, arXiv:1911.00172): of texts read once, every output vector
    and the token that came next. The tokens behind the k vectors nearest to the one at hand, each
    counting exp(-d^2 / temp), and nothing where d^2 is above `within`, go into the model's
    distribution with the weight lam; where none counts it stays as it is."""

    def __init__(self, keys, tokens, k, lam, temp, ids=None, store=None, within=math.inf):
        """keys (N, C), tokens (N,) long; ids (N,) in a Store, where there is one."""
        self.k, self.lam, self.temp, self.within = k, lam, temp, within
        self.tokens, self.ids, self.store = tokens, ids, store
        # |q - k|^2 = |q|^2 - 2 (q.k - |k|^2 / 2): with one more channel the nearest have the
        # largest inner product
        self.keys = torch.empty(len(keys), keys.size(1) + 1, device=tokens.device)
        self.keys[:, :-1] = keys
        self.keys[:, -1] = self.keys[:, :-1].square().sum(1) / -2

    @classmethod
    def open(cls, store, k, lam, temp, device="cpu", n_vocab=None, within=math.inf):
        """Return those of a Store of the kind "knn"; UserError where a token is none of n_vocab."""
        a = store.arrays(KNN_LAYER)
        if not len(a["ids"]):
            raise UserError(f"store {store.path} has no entries; python sample.py learn "
                            f"--knn={shlex.quote(store.path)} FILE fills it")
        tokens = torch.from_numpy(a["values"][:, 0]).long()
        if n_vocab is not None:
            wrong = (tokens < 0) | (tokens >= n_vocab)
            store.refuse(a["ids"][wrong.numpy()].tolist(), "no token of this model")
        return cls(torch.from_numpy(a["keys"]), tokens.to(device), k, lam, temp, a["ids"], store,
                   within)

    def find(self, h, own=None):
        """Return squared distances and rows (Q, k) of the entries nearest to h (Q, C), the nearest
        first. own (Q,): a row that each leaves out, so that a place does not find itself."""
        score, rows = search(F.pad(h.float(), (0, 1), value=1.0), self.keys,
                             self.k + (own is not None))
        d2 = (h.float().square().sum(1, keepdim=True) - 2 * score).clamp(min=0)
        if own is not None:
            d2, order = d2.masked_fill(rows == own[:, None], math.inf).sort(stable=True)
            d2, rows = d2[:, :self.k], rows.gather(1, order)[:, :self.k]
        return d2, rows

    def mix(self, logits, h, n=3):
        """Return logits (B, V) over output vectors h (B, C) as those of the mixture, with the same
        sum of exponentials, and the n entries of each row that told most, [(store, id)]."""
        d2, rows = self.find(h)
        near = d2 <= self.within
        found = [[] for _ in rows]
        if self.store:
            found = [[(self.store, i) for i in self.ids[row[counts]]]
                     for row, counts in zip(*(t[:, :n].cpu().numpy() for t in (rows, near)))]
        if not self.lam:
            return logits, found
        lam = self.lam * near[:, :1].float()
        weights = ((d2[:, :1] - d2) / self.temp).exp() * near  # (the nearest, if any, is 1)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        p = torch.zeros_like(logits).scatter_add(1, self.tokens[rows], weights)
        ours = logits + torch.log1p(-lam)
        theirs = p.log() + lam.log() + logits.logsumexp(-1, keepdim=True)
        return torch.logaddexp(ours, theirs), found


@torch.inference_mode()
def outputs(model, ids, rows=16):
    """Yield output vectors (m, C) of all places of a text ids (n,) but the last, in order. A place
    has at least half a window before it, or all there is, and the history behind that."""
    H, device, n = model.cfg.history, model.wte.weight.device, len(ids) - 1
    T = min(model.cfg.block_size, n)  # a sentence does not take the time of a window
    step = max(T // 2, 1)
    padded = F.pad(torch.as_tensor(ids, dtype=torch.long)[:-1], (H, T), value=-1)
    for starts in torch.arange(0, max(n - T, 0) + step, step).split(rows):
        windows = padded[starts[:, None] + torch.arange(H + T)].to(device)
        x = windows[:, H:].clamp(min=0)  # behind the end it does not matter
        h = model(x, history=windows[:, :H] if H else None, at=x[:, :0]).h.float()
        new = [slice(T - step if a else 0, min(T, n - a)) for a in starts.tolist()]
        yield torch.cat([row[s] for row, s in zip(h, new)])


# -------------------------------------------------------------------------------------------------
# reading texts in


def passages(tok, ids, width=40):
    """Return of a text, a list of ids: a function that gives the last `width` bytes up to the end
    of a token, and the bytes (n, 2) that each token stands on. A token that ends inside a
    character stands on all of it."""
    pieces = [tok.decode_bytes([i]) for i in ids]
    raw, stop = b"".join(pieces), np.cumsum([len(p) for p in pieces])
    start = np.append(0, stop[:-1])
    for _ in range(3):
        stop = stop + [i < len(raw) and raw[i] & 0xC0 == 0x80 for i in stop.tolist()]

    def ending(t):
        kept = raw[max(stop[t] - width, 0):stop[t]]
        while True:  # until all that is left is characters: these stand right before the end
            try:
                return kept.decode()
            except UnicodeDecodeError as e:
                kept = kept[e.end:]

    return ending, np.stack((start, stop), 1)


def learn(store, model, tok, ids):
    """Read a text, a list of ids, into a Store, whole or not at all: what blocks M write, or every
    output vector with the token that came next. The text of an entry ends in what it brings back.
    Return how many entries there are."""
    ending, spans = passages(tok, ids)
    with store.batch():
        source = store.read_facts()["next"]

        def add(layer, head, keys, values, places):
            """Add entries of one head with keys (n, D), values (n, E), at these places (n,)."""
            store.add(layer, np.full(len(keys), head), keys.cpu().float().numpy(), values,
                      [ending(t) for t in places.tolist()], spans=spans[places], source=source)
            return len(keys)

        if store.facts["kind"] == "memory":
            # (a conversation may hold ends of text, and a memory forgets what stood before one)
            ends = [-1, *(i for i, token in enumerate(ids) if token == tok.eot), len(ids)]
            return sum(add(i, h, keys, values.float().numpy(), places.numpy() + a + 1)
                       for a, b in itertools.pairwise(ends) if b - a > 2
                       for i, heads in absorb(model, ids[a + 1:b]).items()
                       for h, (keys, values, places) in enumerate(heads))
        next_place = 1
        with prepare.bar(total=len(ids) - 1, desc="learn", unit="token") as progress:
            for keys in outputs(model, ids):
                places = np.arange(next_place, next_place + len(keys))
                next_place += add(KNN_LAYER, 0, keys, np.asarray(ids)[places, None], places)
                progress.update(len(keys))
        return next_place - 1


# -------------------------------------------------------------------------------------------------
# python sample.py memory FILE ...


def whole_numbers(words, action):
    """Return words as whole numbers; UserError where there are none, or others."""
    if not words or not all(w.isascii() and w.isdecimal() and len(w) < 100 for w in words):
        raise UserError(f"{action} takes a number, not {' '.join(words)[:40] or 'nothing'}")
    return [min(int(w), 2 ** 63 - 1) for w in words]


def entry_line(store, e, width=70):
    """Return an Entry as a line of a list."""
    if not store.intact(e):
        return f"{e.id:>9}  damaged"
    text = repr(e.text)
    if len(text) > width:
        text = text[:width - 3] + "..."
    last = time.strftime("%Y-%m-%d %H:%M", time.localtime(e.last))
    return f"{e.id:>9}  {e.layer:>5} {e.head:>4} {e.uses:>6}  {last}  {text}"


def list_entries(store, words, limit):
    """Print the first entries, or the first that have a text in them; damaged ones always."""
    text = " ".join(words)
    found = (e for some in store.entries() for e in some if not store.intact(e) or text in e.text)
    print(f"{'id':>9}  {'layer':>5} {'head':>4} {'uses':>6}  {'last used':16}  text")
    for e in itertools.islice(found, limit or None):
        print(entry_line(store, e))
    if next(found, None):
        print(f"[the first {limit}; --limit=0 shows all]")


def show(store, words, limit):
    """Print all of some entries."""
    for i in whole_numbers(words, "show"):
        e = store.entry(i)
        if e is None:
            raise UserError(f"store {store.path} has no entry {i}; list shows which there are")
        print(entry_line(store, e, width=10 ** 9))
        numbers = store.columns([e] if store.intact(e) else [])
        for name in ("keys", "values"):
            for row in numbers[name]:
                first = " ".join(f"{v:.4g}" for v in row[:8])
                print(f"{name:>9}  {len(row)} x {row.dtype.name}: {first}{' ...' * (len(row) > 8)}")


def forget(store, words, limit):
    """Take out entries by their numbers, or all that bring back a piece of a text, and cut that out
    of the texts of the others."""
    if not " ".join(words).strip():
        raise UserError("forget takes the numbers of entries, or a text that was read")
    numbers = all(w.isascii() and w.isdecimal() for w in words)
    print(take_out(store, whole_numbers(words, "forget") if numbers else " ".join(words)))


def take_out(store, what):
    """Take out entries by a list of ids, or a text. Return a sentence of how many; UserError where
    there are none."""
    gone = store.forget(what)
    if not gone:
        what = what if isinstance(what, str) else " ".join(map(str, what))
        raise UserError(f"store {store.path} has no entry {what!r}; python sample.py memory "
                        f"{shlex.quote(store.path)} list shows which there are")
    return f"{config.visible(store.path)}: forgot {gone:,} of {gone + store.count():,} entries"


def prune(store, words, limit):
    """Keep so many entries, the best used ones."""
    if len(words) != 1:
        raise UserError(f"prune takes one number, of the entries to keep, not "
                        f"{' '.join(words) or 'nothing'}")
    gone = store.prune(*whole_numbers(words, "prune"))
    print(f"{config.visible(store.path)}: pruned {gone:,} of {gone + store.count():,} entries")


def stats(store, words, limit):
    """Print what a store is and how it was used."""
    if words:
        raise UserError(f"stats takes nothing, not {' '.join(words)}")
    s = store.stats()
    size = f"{s['entries']:,} entries, {s['bytes'] / 2 ** 20:,.1f} MB"
    print(config.visible(f"{store.path}: {s['kind']} of model {s['model'][:12]}, {size}; "
                         f"key {s['key']}, value {s['value']}"))
    for layer, n, used, uses in s["layers"]:
        print(f"layer {layer:>3}: {n:>9,} entries, {used / n:.1%} of them used, {uses:,} uses")


ACTIONS = {"list": list_entries, "show": show, "forget": forget, "prune": prune, "stats": stats}


def inspect(path, action, words, limit):
    """Look into the store at path, or edit it, by one of ACTIONS."""
    with Store(path, write=action in ("forget", "prune")) as store:
        ACTIONS[action](store, words, limit)


def count_uses(used):
    """Note in their stores which entries were used and how often, {(store, id): n}, unless
    somebody else is writing there."""
    for store in {store for store, _ in used}:
        counts = {i: n for (s, i), n in used.items() if s is store}
        try:
            with Store(store.path, write=True) as writer:
                writer.touch(list(counts), list(counts.values()))
        except UserError as e:
            config.note(f"[uses not counted: {e}]")
