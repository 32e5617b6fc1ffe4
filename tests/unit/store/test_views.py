"""The views hold what the files hold, for exactly the committed files, and queries can only read them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_data.binning import BINS, bins_of, middles_of
from pear_data.config import WeightSettings
from pear_data.errors import MismatchError, PearError, UsageError
from pear_data.progress import Silent
from pear_data.schema import CORPUS_SUMMARY
from pear_data.stages.weight import weight
from pear_data.store import open_store, writable_store
from pear_data.store.shards import summary_path, summary_shard
from pear_data.store.totals_views import middle
from pear_data.store.views import connect


@pytest.fixture
def folder(make_store, samples):
    samples[2].initial_status = "nonfinite"
    samples[3].label = -1
    folder = make_store(samples)
    summarise_corpus(folder)
    with writable_store(folder) as store:
        weight(store, WeightSettings(level="token"), Silent())
        weight(store, WeightSettings(level="block", block_size=2), Silent())
    return folder


def summarise_corpus(folder, shards=slice(None)):
    with writable_store(folder) as store:
        for shard in store.stage("corpus").shards[shards]:
            path = summary_path(store.path, "corpus", shard.name)
            with summary_shard(path, CORPUS_SUMMARY) as writer:
                for table in store.row_groups(shard, CORPUS_SUMMARY.names):
                    writer.add(table)
            shard.summary = store.entry_of(path)
        store.save()


@pytest.fixture
def views(folder):
    with connect(open_store(folder)) as views:
        yield views


def scalar(views, query, *parameters):
    ((value,),) = views.rows(query, parameters)
    return value


def columns(views, view):
    return {name: kind for name, kind, *_ in views.rows(f"describe {view}")}


def test_stage_views_hold_every_row_and_say_which_stage(views, folder):
    store = open_store(folder)
    assert views.table("from corpus order by sample_id").equals(
        store.corpus.to_table().sort_by("sample_id").cast(views.table("from corpus").schema)
    )
    assert views.rows("select policy, count(*), count(logprobs) from scores group by 1 order by 1") == [
        ("behavior", 20, 20),
        ("initial", 20, 19),
    ]
    assert views.rows("select name, count(*), count(weights) from weights group by 1 order by 1") == [
        ("block", 20, 19),
        ("token", 20, 19),
    ]


SUMMARY = (
    *("log_ratio_sum", "weight_mean", "weight_min", "weight_max", "ess", "clipped_low", "clipped_high"),
    *("saturated_low", "saturated_high", "weight_sum", "weight_square_sum"),
)


def test_samples_join_every_stage_by_id(views, folder, samples):
    found = {row["sample_id"]: row for row in views.table("from samples").to_pylist()}
    assert len(found) == len(samples)
    stored = {row["sample_id"]: row for row in open_store(folder).weights["block"].to_table().to_pylist()}
    for sample in samples:
        row = found[sample.sample_id]
        assert (row["num_tokens"], row["num_scored"]) == (len(sample.input_ids), sample.loss_mask.sum())
        assert row["status_initial"] == sample.initial_status
        mean = np.mean(sample.behavior, dtype=np.float64)
        assert row["perplexity_behavior"] == pytest.approx(np.exp(-mean), rel=1e-12)
        assert row["weight_status"] == row["weight_status_block"]
        for name in SUMMARY:
            assert row[name] == row[f"{name}_block"]
        weights = stored[sample.sample_id]["weights"]
        if weights is None:
            assert {row[name] for name in SUMMARY} == {None}
            continue
        weights = np.array(weights, dtype=np.float64)
        log_ratio = sample.initial.astype(np.float64) - sample.behavior
        assert row["log_ratio_sum"] == pytest.approx(log_ratio.sum(), rel=1e-12)
        assert row["weight_mean"] == pytest.approx(weights.mean(), rel=1e-6)
        assert (row["weight_min"], row["weight_max"]) == (weights.min(), weights.max())
        ess = weights.sum() ** 2 / (weights**2).sum() if weights.any() else 0.0
        assert row["ess"] == pytest.approx(ess, rel=1e-6)
        assert row["clipped_low"] == (log_ratio < -0.08).sum()
        assert row["clipped_high"] == (log_ratio > 0.3).sum()
        assert row["weight_sum"] ** 2 == pytest.approx(ess * row["weight_square_sum"], rel=1e-6)
    assert found["s2"]["logprob_sum_initial"] is None
    assert found["s2"]["weight_status"] == "unscored"
    assert (found["s3"]["weight_status"], found["s3"]["ess"], found["s3"]["weight_mean"]) == ("dropped", 0, 0)
    assert found["s0"]["weight_mean_token"] != found["s0"]["weight_mean_block"]


def test_tokens_are_the_scored_tokens_in_order(views, folder, samples):
    weights = {
        row["sample_id"]: row["weights"] for row in open_store(folder).weights["token"].to_table().to_pylist()
    }
    rows = views.table("from tokens order by sample_id, t").to_pylist()
    assert len(rows) == sum(sample.loss_mask.sum() for sample in samples)
    for sample in samples:
        mine = [row for row in rows if row["sample_id"] == sample.sample_id]
        positions = np.flatnonzero(sample.loss_mask)
        assert [row["position"] for row in mine] == positions.tolist()
        assert [row["t"] for row in mine] == list(range(1, len(positions) + 1))
        assert [row["token_id"] for row in mine] == sample.input_ids[positions].tolist()
        assert [row["token"] for row in mine] == [f" t{token}" for token in sample.input_ids[positions]]
        assert [row["logprob_behavior"] for row in mine] == sample.behavior.tolist()
        if sample.initial_status == "ok":
            expected = sample.initial.astype(float) - sample.behavior.astype(float)
            assert [row["log_ratio"] for row in mine] == expected.tolist()
            assert [row["weight_token"] for row in mine] == weights[sample.sample_id]
            assert [row["weight"] for row in mine] == [row["weight_block"] for row in mine]
        else:
            assert {row["weight"] for row in mine} == {row["log_ratio"] for row in mine} == {None}


def test_weights_have_their_summary(views, folder):
    store = open_store(folder)
    found = views.table("from weights where name = 'token' order by sample_id")
    stored = store.weights["token"].to_table().sort_by("sample_id")
    for name in ("sample_id", "num_scored", "status"):
        assert found[name].to_pylist() == stored[name].to_pylist()
    assert found["weights"].to_pylist() == stored["weights"].to_pylist()
    samples = views.table(
        f"select {', '.join(f'{name}_token as {name}' for name in SUMMARY)} from samples order by sample_id"
    )
    assert found.select(SUMMARY).equals(samples)


def counted(values):
    bins, counts = np.unique(bins_of(np.asarray(values, dtype=np.float32)), return_counts=True)
    return dict(zip(middles_of(bins).tolist(), counts.tolist(), strict=True))


def test_histograms_count_every_token_and_sample(views):
    tokens = (
        "select {0} from tokens join samples using (sample_id, source) where label > 0 and {0} is not null"
    )
    for source in ("even", "odd"):
        for name in ("block", "token"):
            expected = {
                "log_ratio": tokens.format("log_ratio"),
                "weight": tokens.format(f"weight_{name}"),
                "sample_weight": f"select weight_sum_{name} from samples where label > 0 and ess_{name} is not null",
            }
            for quantity, query in expected.items():
                found = views.rows(
                    "select value, count from histograms where name = ? and source = ? and quantity = ?",
                    [name, source, quantity],
                )
                values = views.rows(f"{query} and source = '{source}'")
                assert dict(found) == counted([value for (value,) in values])
                assert len(found) == len(dict(found))
    kinds = columns(views, "histograms")
    assert kinds == {
        **dict.fromkeys(("name", "source", "quantity"), "VARCHAR"),
        "value": "DOUBLE",
        "count": "BIGINT",
    }


def test_a_bin_is_shown_by_its_middle():
    finite = np.arange(0x80, BINS - 0x80)  # the rest would hold infinity and what is no number
    with duckdb.connect() as plain:
        shown = plain.execute(f"select {middle('range')} from range(128, {BINS - 128})").fetchnumpy()
    np.testing.assert_array_equal(next(iter(shown.values())), middles_of(finite))


def test_deciles_add_up_tokens_by_where_they_are(views):
    query = """select source, (t - 1) * 10 // num_scored + 1 as decile, count(*), sum(weight_block),
        sum(weight_block::double ** 2), sum(logprob_initial::double), sum(logprob_behavior::double),
        count(*) filter (log_ratio < -0.08), count(*) filter (log_ratio > 0.3)
        from tokens join samples using (sample_id, source) where label > 0 and log_ratio is not null
        group by all order by all"""
    found = views.rows(
        """select source, decile, tokens, weight_sum, weight_square_sum, target_logprob_sum, behavior_logprob_sum,
        clipped_low, clipped_high from deciles where name = 'block' and tokens > 0 order by all"""
    )
    expected = views.rows(query)
    assert [row[0] for row in found] == [row[0] for row in expected]
    np.testing.assert_allclose([row[1:] for row in found], [row[1:] for row in expected], rtol=1e-6)
    assert scalar(views, "select count(*) from deciles where name = 'block'") == 20


def test_sums_no_one_knows_are_null(folder):
    with writable_store(folder) as store:
        del store.manifest.stages["scores/behavior"]
        for name in ("block", "token"):
            del store.manifest.stages[f"weights/{name}"]
        weight(store, WeightSettings(level="uniform"), Silent())
    with connect(open_store(folder)) as views:
        assert views.rows(
            "select count(behavior_logprob_sum), count(log_ratio_square_sum), count(target_logprob_sum) from deciles"
        ) == [(0, 0, 20)]
        assert views.rows("select distinct quantity from histograms order by 1") == [
            ("sample_weight",),
            ("weight",),
        ]
        assert views.rows("select count(log_ratio_sum), count(ess) from samples") == [(0, 19)]


def test_the_readme_query(views, folder):
    corpus = open_store(folder).corpus.to_table().group_by("source").aggregate([("num_scored", "sum")])
    query = "select source, avg(weight_mean), sum(num_scored) from samples group by source"
    assert {source: total for source, _, total in views.rows(query)} == {
        row["source"]: row["num_scored_sum"] for row in corpus.to_pylist()
    }


@pytest.mark.parametrize(
    "stages", [[], ["corpus"], ["corpus", "scores/behavior"], ["corpus", "weights/token"]]
)
def test_every_view_exists_whatever_stages_do(folder, stages):
    store = open_store(folder)
    with connect(store) as views:
        complete = {
            view: columns(views, view) for view in ("corpus", "scores", "weights", "samples", "tokens")
        }
    store.manifest.stages = {key: store.manifest.stages[key] for key in stages}
    with connect(store) as views:
        for view, kinds in complete.items():
            assert columns(views, view).items() <= kinds.items()
            if view in ("corpus", "scores", "weights"):
                assert columns(views, view) == kinds
        assert {"sample_id", "source", "weight_mean", "ess", "weight_status"} <= columns(
            views, "samples"
        ).keys()
        assert {"position", "t", "token", "log_ratio", "weight"} <= columns(views, "tokens").keys()
        assert scalar(views, "select count(*) from samples") == (20 if stages else 0)
        assert bool(scalar(views, "select count(*) from tokens")) == bool(stages)
        assert scalar(views, "select count(log_ratio) from tokens") == 0


SEEN = [
    "select source, count(*), max(ess), min(weight_min_token) from samples group by source",
    "select s.source from samples s where s.ESS > 1 and s.perplexity_initial < 9",
    "select count(*) from samples",
    "select count(*) from tokens",
    "select max(log_ratio) from tokens where token = ' t3'",
    'select "weight", position from tokens qualify row_number() over (partition by source order by t, sample_id) = 1',
    "select name, max(weight_max) from weights group by all",
    "with a as (select sample_id, ess from samples) select a.ess, t.weight from a join tokens t using (sample_id)",
    "select samples.num_tokens from samples, corpus where samples.sample_id = corpus.sample_id and corpus.label = 1",
    "select (select max(weight_token) from tokens t where t.sample_id = s.sample_id) from samples s",
    "select max(weight_status) from samples union by name select max(token) from tokens",
    "select count(distinct label) filter (num_scored > 3) over (order by weight_mean_token) from samples",
    "explain analyze select count(clipped_high) from samples",
]
UNSEEN = [
    "from samples",
    "select * from samples",
    "select s.* exclude (ess) from samples s join tokens using (sample_id)",
    "select columns('weight_.*') from samples",
    "select samples from samples",
    # The column has the name of a table, whose name in a column's place is a row.
    "select name, max(list_max(weights)), max(ess) from weights group by name",
    "select to_json(s) from samples as s",
    "select #5 from samples",
    "select a, c from samples as s(a, b, c)",
    "select sample_id from samples natural join tokens",
    "select label from (from samples)",
    "select count(*) from (select sample_id, source from samples group by all) join (from tokens) using (source)",
    "describe samples",
    "summarize select sample_id, source from samples",
    "from samples pivot (avg(num_scored) for source in ('even', 'odd'))",
    "from (unpivot samples on ess, weight_mean into name n value v)",
    "select column_name from information_schema.columns where table_name = 'samples'",
    "select num_scored from main.samples",
    "select exists (select * from samples where ess > 0)",
]


@pytest.mark.parametrize(("queries", "named"), [(SEEN, True), (UNSEEN, False)])
def test_columns_no_query_sees_are_left_out_and_missed_by_none(folder, queries, named, monkeypatch):
    store = open_store(folder)
    with connect(store) as views, connect(store) as whole_views:
        make = whole_views._make
        monkeypatch.setattr(whole_views, "_make", lambda *seen: make())
        for query in queries:
            assert (views._checked(query).columns is not None) == named, query
            narrow, whole = views.table(query), whole_views.table(query)
            assert narrow.schema == whole.schema, query
            if "explain" not in query:
                rows, expected = (sorted(map(str, table.to_pylist())) for table in (narrow, whole))
                assert rows == expected, query


def test_questions_about_samples_open_no_tokens(folder):
    with connect(open_store(folder)) as views:
        for part in [*folder.glob("corpus/*"), *folder.glob("weights/*/*")]:
            part.unlink()
        ((total, least, token),) = views.rows(
            "select sum(num_scored), min(ess), max(weight_mean_token) from samples where label = 1"
        )
        assert total > 0 < least < token + total
        assert len(views.rows("select name, sum(ess) from weights group by name")) == 2
        assert scalar(views, "select sum(count) from histograms") > 0
        assert scalar(views, "select sum(tokens) from deciles") > 0
        assert scalar(views, "select count(*) from tokens where source = 'even'") > 0
        with pytest.raises(PearError, match=r"weights/token/part-0000\d.parquet"):
            views.rows("select avg(weight_token) from tokens")


@pytest.mark.parametrize("shards", [slice(0), slice(1), slice(1, 3)])
def test_corpora_of_an_earlier_version_are_read_from_their_parts(make_store, samples, shards):
    folder = make_store(samples)
    summarise_corpus(folder, shards)
    query = "select sample_id, source, label, num_tokens, num_scored from {} order by all"
    with connect(open_store(folder)) as views:
        assert len(views.rows("from samples")) == 20
        assert views.rows(query.format("samples")) == views.rows(query.format("corpus"))


def test_weightings_of_an_earlier_version_are_left_out(folder):
    store = open_store(folder)
    store.manifest.stages["weights/block"].shards[1].summary = None
    with connect(store) as views:
        assert views.rows("select distinct name from weights") == [("token",)]
        assert "ess_block" not in columns(views, "samples")
        assert scalar(views, "select bool_and(weight is not distinct from weight_token) from tokens")


def test_columns_without_a_name_are_those_of_block_or_the_first(folder):
    store = open_store(folder)
    assert list(store.manifest.stages)[-2:] == ["weights/token", "weights/block"]
    with connect(store) as views:
        assert scalar(views, "select bool_and(weight is not distinct from weight_block) from tokens")
    del store.manifest.stages["weights/block"]
    with connect(store) as views:
        assert scalar(views, "select bool_and(weight is not distinct from weight_token) from tokens")


def test_only_committed_shards_are_read(folder):
    shutil.copy(folder / "corpus" / "part-00000.parquet", folder / "corpus" / "part-00009.parquet")
    store = open_store(folder)
    del store.manifest.stages["weights/token"].shards[0]
    with connect(store) as views:
        assert scalar(views, "select count(*) from corpus") == 20
        assert scalar(views, "select count(*) from weights where name = 'token'") == 13
        assert scalar(views, "select count(weight_mean_token) from samples") == 13


@pytest.mark.parametrize("name", ["label=1", "a b'c", "s[ab]*?", "ü"])
def test_folders_with_any_name(make_store, samples, tmp_path, name):
    folder = make_store(samples, f"{name}/store")
    decoy = tmp_path / "sa" / "store" / "corpus"
    decoy.mkdir(parents=True)
    pq.write_table(pa.table({"sample_id": ["decoy"]}), decoy / "part-00000.parquet")
    with connect(open_store(folder)) as views:
        assert scalar(views, "select count(*) from corpus where label = 1 and sample_id <> 'decoy'") == 20


def test_policies_with_any_name(make_store, samples):
    store = open_store(make_store(samples))
    store.manifest.stages["scores/a-b.c"] = store.manifest.stages.pop("scores/behavior")
    with connect(store) as views:
        assert scalar(views, 'select count("logprob_a-b.c") from tokens') > 0


@pytest.mark.parametrize("place", [-1, -6, -8])  # the closing magic, the footer's length
def test_a_damaged_footer_is_one_line(folder, place):
    path = folder / "corpus" / "part-00000.parquet"
    flipped = bytearray(path.read_bytes())
    flipped[place] ^= 0x55
    path.write_bytes(flipped)
    refusal = pytest.raises(MismatchError, match=r"^a file of .*: run `pear-data verify`, which names it$")
    with refusal, connect(open_store(folder)):
        pass


def test_a_damaged_store_is_refused_before_the_query(folder):
    path = folder / "scores" / "initial" / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MismatchError, match=r"part-00001.parquet has \d+ bytes where the manifest says"):
        connect(open_store(folder)).__enter__()
    path.unlink()
    with pytest.raises(MismatchError, match="is missing"):
        connect(open_store(folder)).__enter__()


READING = [
    "select 1",
    "select 1; -- and no more",
    "from samples limit 1",
    "values (1)",
    "describe tokens",
    "summarize samples",
    "show tables",
    "explain select 1",
    "/* é */ explain /* ü */ analyze -- ö\n select 'é' from samples",
    "with a as (select 1 as x) from a",
    "with recursive r as (select 1 as a union all select a + 1 from r where a < 3) from r",
    "select * from unnest([1, 2]), range(2)",
    "from samples pivot (avg(num_scored) for source in ('even', 'odd'))",
    "select list_transform(logprobs, lambda x: x * 2) from scores",
    "select record->>'$.id' from corpus",
    "select source, sum(num_scored) from samples group by grouping sets ((), (source))",
]


def test_reading_is_allowed(views):
    for query in READING:
        assert views.rows(query) is not None, query


REFUSED = [
    "",
    "-- nothing",
    "selec 1",
    "select 1; select 2",
    "create table t (a int)",
    "insert into corpus values (1)",
    "drop view corpus",
    "attach '{elsewhere}'",
    "copy (select 1) to '{elsewhere}'",
    "copy corpus from '{secret}'",
    "export database '{elsewhere}'",
    "install httpfs",
    "load httpfs",
    "set memory_limit = '1TB'",
    "reset lock_configuration",
    "pragma enable_profiling",
    "call enable_logging()",
    "use main",
    "begin",
    "checkpoint",
    "prepare p as select 1",
    "explain analyze copy (select 1) to '{elsewhere}'",
    "explain analyze create table t as select 1",
    "explain (format json) select 1",
    "with a as (copy (select 1) to '{shard}' (use_tmp_file false)) from a",
    "explain analyze with a as (copy (select 1) to '{shard}' (use_tmp_file false)) from a",
    "with a as (insert into corpus values (1) returning *) from a",
    "from query('with a as (copy (select 1) to ''{shard}'' (use_tmp_file false)) from a')",
    "from json_execute_serialized_sql(json_serialize_sql('select 1'))",
    "from read_text('{secret}')",
    "select (select content from read_text('{secret}'))",
    "describe select * from read_csv('{secret}')",
    "from glob('/etc/*')",
    "from read_parquet('{shard}')",
    "from enable_logging('QueryLog', storage = 'file', storage_path = '{elsewhere}')",
    "from arrow_scan(1, 2, 3)",
    "from duckdb_secrets()",
    "from samples where sample_id in (from query_table('corpus'))",
]


def test_whatever_does_more_than_read_is_refused(views, folder, tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("swordfish")
    shard = folder / "corpus" / "part-00000.parquet"
    before = shard.read_bytes()
    for query in REFUSED:
        with pytest.raises(UsageError) as refusal:
            views.rows(query.format(elsewhere=tmp_path / "elsewhere", secret=secret, shard=shard))
            pytest.fail(f"not refused: {query}")
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "elsewhere").exists(), query
        assert shard.read_bytes() == before, query


def test_files_that_are_no_artefacts_cannot_be_read(views, folder, tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("swordfish")
    for path in (secret, folder / "manifest.json", "/etc/passwd", "https://example.org/x.parquet"):
        with pytest.raises(PearError, match="file system operations are disabled|not exist"):
            views.rows(f"from '{path}'")


def test_the_guard_is_not_all_there_is(views):
    """Behind the check of the statement, DuckDB itself is locked."""
    raw = views._connection
    for statement, reason in {
        "set enable_external_access = true": "locked|Cannot",
        "set lock_configuration = false": "locked|Cannot",
        "copy (select 1) to '/tmp/x.parquet'": "disabled by configuration",
        "install httpfs": "disabled|Cannot",
        "load httpfs": "disabled|Cannot|not found",
    }.items():
        with pytest.raises(duckdb.Error, match=reason):
            raw.execute(statement)


def test_variables_of_the_program_are_out_of_reach(views):
    secret = pa.table({"a": [1]})
    with pytest.raises(PearError, match="does not exist"):
        views.rows("from secret")
    assert len(secret) == 1


def test_mistakes_are_one_line(views):
    with pytest.raises(PearError, match="the query failed: Catalog Error: Table with name nope") as mistake:
        views.rows("from nope")
    assert "\n" not in str(mistake.value)
    with pytest.raises(PearError, match="the query failed: .*boom"):
        views.rows("select error('boom')")
    _, batches = views.batches(
        "select case when range > 50000 then error('late') end from range(100000)", 2048
    )
    with pytest.raises(PearError, match="the query failed: .*late"):
        list(batches)


def test_a_query_is_stopped_in_time(folder):
    start = time.monotonic()
    with (
        connect(open_store(folder), timeout=0.3) as views,
        pytest.raises(PearError, match=r"longer than 0\.3 s"),
    ):
        views.rows("select count(*) from range(1000000000) a, range(1000000000) b")
    assert time.monotonic() - start < 20


def test_parameters_and_store_sql(views, folder):
    assert scalar(views, "select count(*) from tokens where sample_id = ?", "s0' or 1=1 --") == 0
    assert open_store(folder).sql("select count(*) as n from samples").to_pylist() == [{"n": 20}]


@pytest.mark.parametrize(
    "query",
    [
        "select count(*) from range(1000000000) a, range(1000000000) b",
        "select range from range(100000000000)",
    ],
)
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_running_query_can_be_interrupted(folder, query, kind):
    command = [
        sys.executable,
        "-m",
        "pear_data",
        "sql",
        query,
        "--store",
        str(folder),
        "-o",
        str(folder / "out.csv"),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not list(folder.glob("out.csv.*.tmp")) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.2)
            process.send_signal(kind)
            assert process.wait(timeout=30) == 130
        finally:
            process.kill()
        assert process.stderr.read().strip().startswith("Error: interrupted")
    assert not list(folder.glob("out.csv*"))
