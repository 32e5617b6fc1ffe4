"""One store of every format version is kept and read for ever; the newest is what today's code writes."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from golden_store import make, rows

import pear_data.stages.migrate as migration
import pear_data.store.commit as commit
from pear_data.cli.entry import run
from pear_data.config import CLIP_LOG_RATIO, CLIP_LOG_WEIGHT
from pear_data.errors import MismatchError, PearError
from pear_data.progress import Silent
from pear_data.schema import FORMAT_VERSION
from pear_data.stages.migrate import migrate
from pear_data.stages.verify import verify
from pear_data.store import open_store, writable_store

STORES = Path(__file__).parent / "stores"
VERSIONS = range(1, FORMAT_VERSION + 1)
DRIFT = (
    "today's code writes another store than tests/contract/stores/v{version}: raise FORMAT_VERSION, teach `migrate` "
    "the way there, and add a golden store with `python tests/contract/golden_store.py tests/contract/stores/vN`; "
    "never change one that is there"
)


@pytest.fixture
def old(tmp_path):
    """A copy of the store of version 1, to write to."""
    shutil.copytree(STORES / "v1", tmp_path / "store")
    return tmp_path / "store"


# -- what they hold, from the rows they were made of -------------------------------------------------------------------


def samples():
    return [row for row in rows() if "input_ids" in row]


def log_weights(d, level, gamma, block):
    """log G_t of the method, one token after the other."""
    low, high = CLIP_LOG_RATIO
    clipped = [min(max(value, low), high) for value in d]
    last = len(d)
    ends = {"token": range(1, last + 1), "sequence": [0] * last}.get(
        level, [min(last, (t // block + 1) * block) for t in range(last)]
    )
    decay = 0 if level == "sequence" else math.log(gamma)
    return [(last - end) * decay + sum(clipped[end:]) for end in ends]


MADE = {"token": ("token", 0.99, 1, 0), "block": ("block", 0.999, 2, 0), "whole": ("sequence", 1, 1, 0.5)}


def weights_of(row, name):
    """The weights that weighting `name` gives a sample; null where a policy has no log-probs."""
    level, gamma, block, scale = MADE[name]
    if row["behavior"] is None:
        return None
    d = [target - behavior for target, behavior in zip(row["initial"], row["behavior"], strict=True)]
    if row["label"] < 0:
        level, factor = "sequence", -scale
    else:
        factor = 1
    low, high = CLIP_LOG_WEIGHT
    return [factor * math.exp(min(max(value, low), high)) for value in log_weights(d, level, gamma, block)]


def views_hold_what_was_scored(store):
    found = store.sql(
        "select sample_id, source, label, input_ids, num_scored from corpus order by 1"
    ).to_pylist()
    assert found == [
        {
            "sample_id": row["id"],
            **{name: row[name] for name in ("source", "label", "input_ids")},
            "num_scored": sum(row["loss_mask"]),
        }
        for row in samples()
    ]
    scores = store.sql(
        "select policy, sample_id, logprobs, span_tokens, status from scores order by 1, 2"
    ).to_pylist()
    assert scores == [
        {
            "policy": policy,
            "sample_id": row["id"],
            "logprobs": row[policy],
            "span_tokens": None,
            "status": "ok" if row[policy] else "bad_field",
        }
        for policy in ("behavior", "initial")
        for row in samples()
    ]
    joined = store.sql(
        "select sample_id, num_tokens, perplexity_initial p from samples order by 1"
    ).to_pylist()
    assert [row["num_tokens"] for row in joined] == [len(row["input_ids"]) for row in samples()]
    np.testing.assert_allclose(
        [row["p"] for row in joined], [math.exp(-np.mean(row["initial"])) for row in samples()]
    )
    tokens = store.sql("select token, log_ratio from tokens where sample_id = 's7' order by t").to_pylist()
    assert [row["token"] for row in tokens] == [f"w{index}" for index in range(3, 11)]
    assert [row["log_ratio"] for row in tokens] == [0.25 - 0.0625 * step for step in range(8)]
    (quarantined,) = ds.dataset(store.path / "quarantine", format="parquet").to_table().to_pylist()
    assert json.loads(quarantined["raw"]) == rows()[3]


def views_hold_the_weights(store):
    for name in MADE:
        found = store.sql(f"select * from weights where name = '{name}' order by sample_id").to_pylist()
        for row, made in zip(samples(), found, strict=True):
            expected = weights_of(row, name)
            assert (made["weights"] is None) == (expected is None)
            if expected is not None:
                np.testing.assert_allclose(made["weights"], expected, rtol=1e-6)
                assert made["weight_mean"] == pytest.approx(np.mean(expected), rel=1e-6)
        used = [row for row in samples() if row["behavior"] and row["label"] > 0]
        (row,) = store.sql(
            f"select sum(weight_sum) w, sum(tokens) n from deciles where name = '{name}'"
        ).to_pylist()
        assert row["w"] == pytest.approx(sum(sum(weights_of(one, name)) for one in used), rel=1e-6)
        assert row["n"] == sum(len(one["initial"]) for one in used)
        (row,) = store.sql(
            f"select sum(count) n from histograms where name = '{name}' and quantity = 'log_ratio'"
        ).to_pylist()
        assert row["n"] == sum(len(one["initial"]) for one in used)


def test_every_version_has_its_store():
    assert sorted(path.name for path in STORES.iterdir()) == sorted(f"v{version}" for version in VERSIONS), (
        "add a golden store: `python tests/contract/golden_store.py tests/contract/stores/vN`"
    )
    for path in STORES.iterdir():
        assert open_store(path).manifest.format_version == int(path.name[1:])
        assert sum(file.stat().st_size for file in path.rglob("*")) < 250_000


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_read(version):
    store = open_store(STORES / f"v{version}")
    views_hold_what_was_scored(store)
    assert verify(store, Silent()).summary.count("whole") == 1
    if version > 1:
        views_hold_the_weights(store)


def test_version_1_is_read_without_its_weights_which_is_said(tmp_path, capsys):
    where = ["--store", str(STORES / "v1")]
    assert run(["sql", "select count(*) n from weights", *where]) == 0
    shown = capsys.readouterr()
    assert shown.out == '{"n":0}\n'
    assert shown.err.count("is left out, as an earlier version made it") == len(MADE)
    for command in (
        ["stats"],
        ["compare", "token", "block"],
        ["report", "-o", str(tmp_path / "report.html")],
    ):
        assert run([*command, *where]) == 4, command
        assert "run `pear-data migrate --store" in capsys.readouterr().err


@pytest.fixture(scope="module")
def todays(tmp_path_factory):
    """The store as today's code writes it."""
    place = tmp_path_factory.mktemp("golden") / "store"
    make(place)
    return place


def test_the_present_version_is_what_todays_code_writes(todays):
    golden, made = (_described(place) for place in (STORES / f"v{FORMAT_VERSION}", todays))
    assert golden == made, DRIFT.format(version=FORMAT_VERSION)


def _described(folder):
    """What a store consists of, without what changes from run to run or with a library's version."""
    manifest = (folder / "manifest.json").read_text()
    manifest = re.sub(r'"[0-9a-f]{64}"|"pear-data [^"]+"', '"..."', manifest)
    manifest = re.sub(r'"bytes": \d+', '"bytes": 0', manifest)
    files = {}
    for path in sorted(folder.rglob("*")):
        # Logs are for people: no command reads what an earlier version wrote into them.
        if path.is_file() and path.name != ".lock" and "logs" not in path.relative_to(folder).parts:
            files[path.relative_to(folder).as_posix()] = _content(path) if path.suffix == ".parquet" else None
    return json.loads(manifest), files


def _content(path):
    with pq.ParquetFile(path) as parquet:
        groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
        written = [
            (column.path_in_schema, column.compression, sorted(column.encodings), column.is_stats_set)
            for group in groups
            for column in (group.column(index) for index in range(group.num_columns))
        ]
        schema = parquet.schema_arrow
        return str(schema), [field.nullable for field in schema], written, parquet.read().to_pylist()


# -- migrate -----------------------------------------------------------------------------------------------------------


def test_migrated_weights_are_those_of_version_1(old, capsys):
    before = {
        name: weights.to_table().sort_by("sample_id") for name, weights in open_store(old).weights.items()
    }
    assert run(["migrate", "--store", str(old)]) == 0
    assert capsys.readouterr().err.endswith(
        f"{old}: format version 1 is now {FORMAT_VERSION}; weightings made again: token, block, whole\n"
    )
    store = open_store(old)
    views_hold_what_was_scored(store)
    views_hold_the_weights(store)
    assert "whole and aligned" in verify(store, Silent()).summary
    for name, table in before.items():
        now = store.sql(f"from weights where name = '{name}' order by sample_id")
        assert table["status"].to_pylist() == now["status"].to_pylist()
        for column in ("weights", "log_ratio_sum", "weight_mean", "weight_min", "weight_max", "ess"):
            values, expected = (found[column].combine_chunks() for found in (now, table))
            assert values.is_null().equals(expected.is_null())
            if column == "weights":
                values, expected = values.flatten(), expected.flatten()
            np.testing.assert_allclose(
                values.drop_null().to_numpy(), expected.drop_null().to_numpy(), rtol=2e-7, err_msg=column
            )
    assert not [path for path in old.rglob("*") if "migration" in path.name]


def test_a_migrated_store_is_like_one_of_the_present_version(old, todays):
    migrate(old, Silent())
    found, made = _described(old), _described(todays)
    assert found[0] == made[0]
    assert found[1].keys() == made[1].keys()
    assert {name: _rows(old / name) for name in found[1]} == {name: _rows(todays / name) for name in made[1]}


def _rows(path):
    return pq.read_table(path).to_pylist() if path.suffix == ".parquet" else None


def test_commands_go_on_with_a_migrated_store(old, capsys):
    assert run(["weight", "--level", "block", "--block-size", "2", "--store", str(old)]) == 1
    assert (
        "format version 1, which is read and no longer written: run `pear-data migrate"
        in capsys.readouterr().err
    )
    assert run(["migrate", "--store", str(old)]) == 0
    manifest = (old / "manifest.json").read_bytes()
    assert run(["weight", "--level", "block", "--block-size", "2", "--store", str(old)]) == 3
    assert run(["score", "--policy", "initial", "--from-field", "initial", "--store", str(old)]) == 0
    assert (old / "manifest.json").read_bytes() == manifest
    assert run(["migrate", "--store", str(old)]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert run(["export", str(old.parent / "out"), "--weights", "whole", "--store", str(old)]) == 0


class Killed(BaseException):
    """What no code catches."""


def test_a_migration_that_dies_anywhere_leaves_a_whole_store(old, monkeypatch):
    done = []
    fresh = shutil.copytree(old, old.parent / "fresh")
    monkeypatch.setattr(commit, "on_operation", lambda what, final: done.append((what, final)))
    migrate(old, Silent())
    weights = {name: table.to_table() for name, table in open_store(old).weights.items()}
    # Beside the store all is alike: some of it will do. So it is with files, but not with manifests.
    beside = [index for index, (_, path) in enumerate(done) if "migration.tmp" in path.parts]
    in_place = sorted(set(range(len(done))) - set(beside))
    manifests = [index for index in in_place if done[index][1].name == "manifest.json"]
    assert len(beside) > 100
    assert len(in_place) > 40
    tried = sorted({*beside[::60], *in_place[::7], *manifests[::2], len(done) - 1})
    seen = []
    for index in tried:
        shutil.rmtree(old)
        shutil.copytree(fresh, old)
        monkeypatch.setattr(commit, "on_operation", _killer(index))
        with pytest.raises(Killed):
            migrate(old, Silent())
        monkeypatch.setattr(commit, "on_operation", None)
        store = open_store(old)
        seen.append(store.manifest.format_version)
        assert "are whole" in verify(store, Silent()).summary
        assert store.weights.keys() == weights.keys()
        migrate(old, Silent())
        store = open_store(old)
        assert {name: table.to_table() for name, table in store.weights.items()} == weights
        left = {path.name for path in old.iterdir()}
        assert left == {path.name for path in (STORES / "v2").iterdir()} | {".lock"}
    assert set(seen) == {1, FORMAT_VERSION}
    assert "whole and aligned" in verify(store, Silent()).summary
    views_hold_the_weights(store)


def _killer(index):
    left = index

    def kill(what, final):
        nonlocal left
        if not left:
            raise Killed
        left -= 1

    return kill


def test_old_weights_that_outlive_a_finished_migration_go_with_the_next(old, monkeypatch):
    monkeypatch.setattr(migration, "_forget_old", lambda store: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        migrate(old, Silent())
    monkeypatch.undo()
    assert "whole and aligned" in verify(open_store(old), Silent()).summary
    assert (old / commit.ASIDE).exists()
    assert "nothing to do" in migrate(old, Silent()).summary
    assert not (old / commit.ASIDE).exists()


def test_weights_that_cannot_be_made_again_are_kept_and_named(old, capsys):
    (old / "scores" / "behavior" / "part-00001.parquet").unlink()
    assert run(["migrate", "--store", str(old)]) == 0
    shown = capsys.readouterr().err
    assert f"token, block, whole could not be made again and stay in {old / 'before-migration'}" in shown
    assert f"{old}/scores/behavior/part-00001.parquet is missing" in shown
    assert (old / "before-migration" / "weights" / "block" / "part-00000.parquet").is_file()
    assert run(["score", "--policy", "behavior", "--from-field", "behavior", "--store", str(old)]) == 3
    assert run(["weight", "--level", "token", "--level", "block", "--store", str(old)]) == 3
    assert run(["migrate", "--store", str(old)]) == 0
    assert "whole could not be made again" in capsys.readouterr().err


def test_a_newer_store_and_a_second_writer_are_refused(old):
    path = old / "manifest.json"
    with writable_store(old, any_version=True), pytest.raises(PearError, match="is being written by process"):
        migrate(old, Silent())
    path.write_text(
        path.read_text().replace('"format_version": 1', f'"format_version": {FORMAT_VERSION + 1}')
    )
    before = path.read_bytes()
    with pytest.raises(
        PearError, match=f"format version {FORMAT_VERSION + 1}, this pear-data reads up to"
    ) as refusal:
        migrate(old, Silent())
    assert not isinstance(refusal.value, MismatchError)
    assert path.read_bytes() == before
    with pytest.raises(PearError, match="no store at"):
        migrate(old.parent / "nowhere", Silent())
    assert not (old.parent / "nowhere").exists()
