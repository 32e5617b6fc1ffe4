"""Attacks on `pear-data sql`: what was tried, and what came of it.

`python tests/faults/sql_attacks.py` prints the table.

In an attack {secret} is a file outside the store with the word swordfish in it, {shard} a file of the store, {out} a
file that is not there, {out_folder} a folder that is not there, {url} an address that is listened at.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pear_data.errors import PearError
from pear_data.stages.sql import write_query
from pear_data.store import open_store

GOLDEN = Path(__file__).parent.parent / "contract" / "stores" / "v2"
SECRET = "swordfish"
TIMEOUT = 1.0
MEMORY = 1 << 29

READ = {
    "a file's name as a table": "from '{secret}'",
    "a file's name in quotes": 'select * from "{secret}"',
    "a file's name in a join": "select * from samples, '{secret}'",
    "a file's name in an EXISTS": "select exists (from '{secret}')",
    "a file's name in a CTE": "with a as (from '{secret}') from a",
    "a file's name in DESCRIBE": "describe '{secret}'",
    "a file's name in SUMMARIZE": "summarize '{secret}'",
    "a file's name that is explained": "explain from '{secret}'",
    "the manifest of the store": "from '{manifest}'",
    "a parquet file elsewhere": "from '{parquet}'",
    "a glob as a table": "from '/etc/*'",
    "a relative name": "from '../secret.csv'",
    "a file: URL": "from 'file://{secret}'",
    "/dev/stdin": "from '/dev/stdin'",
    "/proc/self/environ": "from '/proc/self/environ'",
    "read_csv": "from read_csv('{secret}')",
    "read_csv_auto": "from read_csv_auto('{secret}')",
    "read_text": "from read_text('{secret}')",
    "read_blob": "from read_blob('{secret}')",
    "read_json": "from read_json('{secret}')",
    "read_json_objects": "from read_json_objects('{secret}')",
    "read_ndjson": "from read_ndjson('{secret}')",
    "read_parquet of a shard": "from read_parquet('{shard}')",
    "parquet_scan": "from parquet_scan('{shard}')",
    "parquet_metadata": "from parquet_metadata('{shard}')",
    "parquet_schema": "from parquet_schema('{parquet}')",
    "parquet_kv_metadata": "from parquet_kv_metadata('{parquet}')",
    "sniff_csv": "from sniff_csv('{secret}')",
    "glob": "from glob('/etc/*')",
    "a function in mixed case": "from Read_Text('{secret}')",
    "a function in quotes": "from \"read_text\"('{secret}')",
    "a function of a schema": "from main.read_text('{secret}')",
    "a function of a catalog": "from system.main.read_text('{secret}')",
    "a function in a scalar subquery": "select (select content from read_text('{secret}'))",
    "a function in a lateral join": "select * from samples, lateral (from read_text('{secret}'))",
    "a function in HAVING": "select 1 having (select count(*) from read_text('{secret}')) > 0",
    "a function in ORDER BY": "select 1 order by (select content from read_text('{secret}'))",
    "a function in LIMIT": "select 1 limit (select length(content) from read_text('{secret}'))",
    "a function in a UNION": "select '1' union all select content from read_text('{secret}')",
    "a function in a PIVOT": "from (pivot (from read_text('{secret}')) on size in (1) using count(*))",
    "a function in a lambda": "select list_transform([1], lambda x: (select content from read_text('{secret}')))",
    "a function behind comments": "from /* samples */ read_text -- (\n('{secret}')",
    "dollar quotes": "from $a${secret}$a$",
    "unicode escapes": "from read_text(U&'\\0073{secret}')",
    "a name in full-width letters": "from \uff52ead_text('{secret}')",
    "a NUL in the query": "select 1 \0 from read_text('{secret}')",
    "query()": "from query('from read_text(''{secret}'')')",
    "query_table()": "from query_table('{secret}')",
    "query_table() of a view": "from query_table('corpus')",
    "json_execute_serialized_sql()": "from json_execute_serialized_sql(json_serialize_sql('from ''{secret}'''))",
    "a table function as a scalar": "select read_text('{secret}')",
    "getenv": "select getenv('HOME')",
    "the program's own variables": "from SECRET_TABLE",
    "read_file": "select read_file('{secret}')",
    "ST_Read": "from st_read('{secret}')",
    "sqlite_scan": "from sqlite_scan('{secret}', 'a')",
    "pandas_scan of an address": "from pandas_scan(1)",
    "arrow_scan of addresses": "from arrow_scan(1, 2, 3)",
    "which_secret": "from which_secret('s3://a', 's3')",
    "duckdb_secrets": "from duckdb_secrets()",
    "duckdb_settings": "from duckdb_settings()",
    "duckdb_logs": "from duckdb_logs()",
    "duckdb_temporary_files": "from duckdb_temporary_files()",
    "duckdb_views by function": "from duckdb_views()",
    "pragma_storage_info": "from pragma_storage_info('corpus')",
    "pragma_database_size": "from pragma_database_size()",
    "pragma_table_info": "from pragma_table_info('corpus')",
    "checkpoint()": "from checkpoint()",
    "test_all_types": "from test_all_types()",
    "seq_scan": "from seq_scan(1)",
}
WRITE = {
    "COPY": "copy (select 1) to '{out}'",
    "COPY over a shard": "copy (select 1) to '{shard}' (format parquet)",
    "COPY without a temporary file": "copy (select 1) to '{shard}' (use_tmp_file false)",
    "COPY FROM": "copy corpus from '{secret}'",
    "COPY of a view, partitioned": "copy corpus to '{out_folder}' (partition_by (source))",
    "COPY in a CTE": "with a as (copy (select 1) to '{shard}' (use_tmp_file false)) from a",
    "COPY in a subquery": "from (copy (select 1) to '{out}')",
    "COPY in a CTE in query()": "from query('with a as (copy (select 1) to ''{shard}'') from a')",
    "EXPLAIN ANALYZE COPY": "explain analyze copy (select 1) to '{out}'",
    "EXPLAIN ANALYZE of a CTE with COPY": "explain analyze with a as (copy (select 1) to '{out}') from a",
    "EXPLAIN with options": "explain (analyze, format json) copy (select 1) to '{out}'",
    "EXPLAIN of EXPLAIN": "explain explain analyze copy (select 1) to '{out}'",
    "EXPORT DATABASE": "export database '{out_folder}'",
    "IMPORT DATABASE": "import database '{out_folder}'",
    "a second statement": "select 1; copy (select 1) to '{out}'",
    "a second statement behind a comment": "select 1 /* ; */; -- ;\ncopy (select 1) to '{out}'",
    "a statement behind a false string": "select 'it''s'; copy (select 1) to '{out}'",
    "CREATE TABLE": "create table t as select 1",
    "CREATE TABLE in the catalog of views": "create or replace table stored.corpus as select 1",
    "CREATE VIEW over a file": "create view v as from '{secret}'",
    "CREATE OR REPLACE VIEW": "create or replace view corpus as select 1",
    "CREATE MACRO": "create macro f(x) as table from read_text(x)",
    "CREATE FUNCTION": "create function f(x) as x",
    "CREATE SECRET": "create persistent secret s (type http, bearer_token 'x')",
    "CREATE INDEX": "create index i on corpus (sample_id)",
    "CREATE TYPE": "create type t as enum ('a')",
    "CREATE TRIGGER": "create trigger t after insert on corpus for each row select 1",
    "INSERT": "insert into corpus values (1)",
    "INSERT in a CTE": "with a as (insert into corpus values (1) returning *) from a",
    "UPDATE": "update corpus set label = 1",
    "DELETE": "delete from corpus",
    "MERGE": "merge into corpus using samples using (sample_id) when matched then delete",
    "TRUNCATE": "truncate corpus",
    "DROP VIEW": "drop view corpus",
    "DROP SCHEMA": "drop schema stored cascade",
    "ALTER": "alter view corpus rename to x",
    "SELECT INTO": "select 1 into t",
    "ATTACH": "attach '{out}'",
    "ATTACH of a shard": "attach '{shard}' as a",
    "DETACH": "detach memory",
    "a log in a file": "from enable_logging('QueryLog', storage = 'file', storage_path = '{out_folder}')",
    "CALL of a log": "call enable_logging(storage = 'file', storage_path = '{out_folder}')",
    "a profile in a file": "pragma profiling_output = '{out}'",
    "VACUUM": "vacuum",
    "CHECKPOINT": "checkpoint",
    "COMMENT ON": "comment on view corpus is 'x'",
    "nextval": "select nextval('s')",
}
NETWORK = {
    "a URL as a table": "from '{url}/x.parquet'",
    "a URL in read_parquet": "from read_parquet('{url}/x.parquet')",
    "a URL in read_text": "select * from read_text('{url}')",
    "an s3 URL": "from 's3://bucket/x.parquet'",
    "a hub URL": "from 'hf://datasets/a/b.parquet'",
    "ATTACH of a URL": "attach '{url}/x.db'",
    "COPY to a URL": "copy (select 1) to '{url}/x.parquet'",
    "INSTALL": "install httpfs",
    "INSTALL from a URL": "install httpfs from '{url}'",
    "INSTALL of the community": "install h3 from community",
    "FORCE INSTALL": "force install httpfs",
    "LOAD": "load httpfs",
    "LOAD of a file": "load '{secret}'",
    "UPDATE EXTENSIONS": "update extensions",
    "http_get": "select http_get('{url}')",
    "an extension that loads itself": "from iceberg_scan('{url}')",
    "an extension's function": "select h3_latlng_to_cell(1, 2, 3)",
}
SETTINGS = {
    "SET": "set memory_limit = '1TB'",
    "SET GLOBAL": "set global threads = 1000",
    "SET of external access": "set enable_external_access = true",
    "SET of allowed paths": "set allowed_paths = ['{secret}']",
    "SET of the lock": "set lock_configuration = false",
    "SET of the scratch folder": "set temp_directory = '{out_folder}'",
    "SET of a variable": "set variable x = 1",
    "RESET": "reset lock_configuration",
    "PRAGMA": "pragma enable_profiling",
    "PRAGMA with a value": "pragma memory_limit = '1TB'",
    "USE": "use main",
    "BEGIN": "begin",
    "COMMIT": "commit",
    "PREPARE": "prepare p as copy (select 1) to '{out}'",
    "EXECUTE": "execute p",
    "DEALLOCATE": "deallocate p",
    "set_config": "select set_config('a', 'b', true)",
    "SET in a CTE": "with a as (set threads = 1) from a",
    "SHOW of settings": "from pragma_show('threads')",
    "a PIVOT that makes a type": "pivot samples on source",
}
# What it would take without bounds, beyond any machine.
BOUNDLESS = {
    "a recursive CTE without end": "with recursive r as (select 1 a union all select a + 1 from r) from r",
    "a recursive CTE that doubles": "with recursive r as (select 'x' a union all select a || a from r) select max(a)"
    " from r",
    "generate_series of 1e12": "select count(*) from generate_series(1, 1000000000000)",
    "a cross join": "select count(*) from range(1000000000) a, range(1000000000) b where a.range * b.range = 7",
    "a cross join that is sorted": "select * from range(100000) a, range(100000) b order by hash(a.range, b.range)",
    "a cross join with itself": "select count(*) from tokens a, tokens b, tokens c, tokens d, tokens e, tokens f",
    "repeat of 1e10": "select repeat('x', 10000000000)",
    "repeat of 4e9": "select length(repeat('x', 4000000000))",
    "lpad of 2e9": "select lpad('x', 2000000000, 'y')",
    "string_agg of gigabytes": "select length(string_agg(repeat('x', 1000000), '')) from range(50000)",
    "a list of 1e9": "select range(1000000000)",
    "list() of 3e9 rows": "select len(list(range)) from range(3000000000)",
    "list_transform of 1e8": "select list_transform(range(100000000), lambda x: repeat('x', 1000))",
    "list_reduce of 1e8": "select list_reduce(range(100000000), lambda a, b: (a * b) % 7)",
    "list_aggregate of 1e9": "select list_aggregate(range(1000000000), 'sum')",
    "nested lists": "select list_transform(range(100000), lambda x: range(100000))",
    "a regular expression that blows up": "select max(regexp_matches(repeat('a', range), '(a*)*b')) from range(99999)",
    "a regular expression of a huge automaton": "select regexp_matches('a', '((a{0,99}){0,9}){0,9}')",
    "a histogram of all there is": "select histogram(range) from range(1000000000)",
    "a window over everything": "select max(x) from (select list(range) over (order by range) x from range(999999))",
    "DISTINCT of 1e10": "select count(distinct hash(range)) from range(10000000000)",
    "a map of everything": "select map_from_entries(list((range, range))) from range(1000000000)",
    "bit_string": "select length(repeat('1', 2000000000)::bit)",
    "levenshtein of long strings": "select levenshtein(repeat('a', 3000000), repeat('b', 3000000))",
    "a factorial of factorials": "select sum(factorial(30)) from range(1000000000000)",
    "printf with a width": "select length(printf('%2000000000d', 1))",
    "a query 100,000 brackets deep": "select " + "(" * 100_000 + "1" + ")" * 100_000,
    "a list 10,000 levels deep": "select " + "[" * 10_000 + "1" + "]" * 10_000,
    "100,000 columns": "select " + ", ".join(f"1 as c{index}" for index in range(100_000)),
    "sleep": "select sleep_ms(1000000)",
}


@dataclass(frozen=True)
class Outcome:
    """What came of an attack: the error's line, or the bytes of the answer."""

    name: str
    said: str
    refused: bool
    seconds: float


@dataclass(frozen=True)
class Place:
    """A store, what lies around it, and an address that is listened at."""

    folder: Path
    listener: socket.socket
    names: dict[str, str]

    def visited(self) -> bool:
        """Whether anyone has connected."""
        try:
            self.listener.accept()
        except BlockingIOError:
            return False
        return True

    def content(self) -> dict[str, str]:
        """Checksum of every file in the folder."""
        files = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def prepared(folder: Path) -> Iterator[Place]:
    """A copy of the golden store with secrets beside it."""
    store = shutil.copytree(GOLDEN, folder / "store")
    secret, parquet = folder / "secret.csv", folder / "secret.parquet"
    secret.write_text(f"a,b\n{SECRET},1\n")
    shutil.copy(store / "corpus" / "part-00000.parquet", parquet)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        names = {
            "secret": str(secret),
            "parquet": str(parquet),
            "manifest": str(store / "manifest.json"),
            "shard": str(store / "corpus" / "part-00000.parquet"),
            "out": str(folder / "written"),
            "out_folder": str(folder / "written_folder"),
            "url": f"http://127.0.0.1:{listener.getsockname()[1]}",
        }
        yield Place(folder, listener, names)


def attack(place: Place, name: str, query: str, form: str = "jsonl", **bounds: float) -> Outcome:
    """Run a query as `pear-data sql` does."""
    for key, value in place.names.items():
        query = query.replace(f"{{{key}}}", value)
    sink = io.BytesIO()
    start = time.monotonic()
    try:
        write_query(open_store(place.folder / "store"), query, form, sink, **bounds)
        said, refused = sink.getvalue().decode(), False
    except PearError as error:
        said, refused = str(error), True
    return Outcome(name, said, refused, time.monotonic() - start)


def bounded(folder: Path, names: Iterable[str] = BOUNDLESS) -> dict[str, Any]:
    """The attacks on time and memory, one after the other in this process, each with a second and half a GiB.

    Some go on in their threads: the process must be ended with `os._exit`.
    """
    outcomes = []
    with prepared(folder) as place:
        before = place.content()
        attack(place, "warm up", "from tokens")
        started = resident()
        for name in names:
            outcomes.append(attack(place, name, BOUNDLESS[name], timeout=TIMEOUT, memory=MEMORY))
        unchanged = place.content() == before
    return {
        "outcomes": [[one.name, one.said[:200], one.refused, one.seconds] for one in outcomes],
        "started": started,
        "most": resident(),
        "unchanged": unchanged,
    }


def resident() -> int:
    """The most memory this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Print what came of every attack."""
    with tempfile.TemporaryDirectory() as folder:
        with prepared(Path(folder)) as place:
            before = place.content()
            for kind, attacks in {
                "read": READ,
                "write": WRITE,
                "network": NETWORK,
                "settings": SETTINGS,
            }.items():
                for name, query in attacks.items():
                    outcome = attack(place, name, query, timeout=60)
                    through = not outcome.refused or SECRET in outcome.said or place.visited()
                    through = through or place.content() != before
                    _print(kind, outcome, through)
        shutil.rmtree(folder)
        found = bounded(Path(folder))
        for name, said, refused, seconds in found["outcomes"]:
            _print("bounds", Outcome(name, said, refused, seconds), False)
        print(f"memory: {(found['most'] - found['started']) / 2**30:.2f} GiB more than before", flush=True)
    os._exit(0)


def _print(kind: str, outcome: Outcome, through: bool) -> None:
    verdict = "THROUGH" if through else "refused" if outcome.refused else "answered"
    said = " ".join(outcome.said.split())[:90]
    print(f"{kind:9} {outcome.name:45} {verdict:9} {outcome.seconds:6.2f} s  {said}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bounded"]:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(bounded(Path(scratch), sys.argv[2:])), flush=True)
        os._exit(0)
    else:
        main()
