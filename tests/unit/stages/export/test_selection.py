"""Which samples an export takes, and on which side of the split each falls."""

from __future__ import annotations

from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from pear_data import open_store
from pear_data.config import ExportSettings, WeightSettings
from pear_data.errors import MismatchError, PearError, UsageError
from pear_data.progress import Silent
from pear_data.stages.export import export
from pear_data.stages.weight import weight
from pear_data.store import writable_store


def names(rows):
    return [row["sample_id"] for row in rows]


def test_the_split_depends_on_the_id_alone(exported, make_store, samples, tmp_path):
    _, manifest, rows = exported("hf", eval_fraction=0.3)
    evaluated = set(names(rows["validation"]))
    assert 0 < len(evaluated) < len(names(rows["train"]))
    assert manifest["splits"] == {"train": len(rows["train"]), "validation": len(rows["validation"])}
    _, _, others = exported("shifted", "block", name="other", eval_fraction=0.3, shard_tokens=50)
    assert set(names(others["validation"])) == evaluated
    _, _, more = exported("hf", name="more", eval_fraction=0.6)
    assert evaluated < set(names(more["validation"]))

    grown = make_store(samples + samples_like(samples), "grown")
    with writable_store(grown) as store:
        weight(store, WeightSettings(level="token"), Silent())
    export(
        open_store(grown),
        ExportSettings(out=str(tmp_path / "grown_out"), weights="token", eval_fraction=0.3),
        Silent(),
    )
    grown_names = pq.read_table(tmp_path / "grown_out" / "validation-00000.parquet")["sample_id"].to_pylist()
    assert {name for name in grown_names if not name.startswith("n")} == evaluated


def samples_like(samples):
    return [replace(sample, sample_id=f"n{sample.sample_id}") for sample in samples]


def test_turns_of_one_conversation_fall_to_one_side(make_store, samples, tmp_path):
    for number, sample in enumerate(samples):
        sample.sample_id = f"c{number // 2}#{number % 2 + 1}"
    folder = make_store(samples, "turns")
    with writable_store(folder) as store:
        store.manifest.stages["corpus"].settings["turns"] = "all"
        weight(store, WeightSettings(level="token"), Silent())
        settings = ExportSettings(out=str(tmp_path / "out"), weights="token", eval_fraction=0.5)
        export(store, settings, Silent())
    sides = [
        {
            name.split("#")[0]
            for name in pq.read_table(tmp_path / "out" / f"{split}-00000.parquet")["sample_id"].to_pylist()
        }
        for split in ("train", "validation")
    ]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_where_is_a_condition_on_a_sample(folder, exported, expected):
    _, manifest, rows = exported("hf", where="source = 'even' and num_scored > 3 -- of mine")
    sources = {row["sample_id"]: row["source"] for row in open_store(folder).corpus.to_table().to_pylist()}
    chosen = [
        name for name, columns in expected().items() if sources[name] == "even" and columns[1].sum() > 3
    ]
    assert names(rows["train"]) == chosen
    assert manifest["left_out"]["where"] == len(expected()) - len(chosen)
    assert manifest["where"].endswith("of mine")


def test_columns_that_name_no_weighting_are_those_of_the_exported_one(exported, expected):
    _, _, rows = exported("hf", "token", where="weight_max > 1.05 and samples.weight_max = weight_max_token")
    assert names(rows["train"]) == [
        name for name, columns in expected("token").items() if columns[2].max() > 1.05
    ]


@pytest.mark.parametrize(
    ("predicate", "error", "reason"),
    [
        ("source =", UsageError, "does not parse"),
        ("nothing = 1", PearError, "nothing"),
        (
            "sample_id in (select sample_id from samples)",
            UsageError,
            "no condition on the columns of one sample",
        ),
        ("true) limit (3", UsageError, "no condition on"),
        ("true) using sample (3", UsageError, "no condition on"),
        ("true) union select sample_id from samples where (true", UsageError, "no condition on"),
        ("true; drop table x", UsageError, "does not parse"),
        ("sample_id = (select content from read_text('/etc/passwd'))", UsageError, "refused"),
        ("row_number() over () = 1", PearError, "window"),
    ],
)
def test_what_is_no_condition(exported, tmp_path, predicate, error, reason):
    with pytest.raises(error, match=reason):
        exported("hf", where=predicate)
    assert not (tmp_path / "out").exists()


def test_another_choice_is_another_export(exported):
    exported("hf", eval_fraction=0.3, where="num_scored > 1")
    assert "nothing to do" in exported("hf", eval_fraction=0.3, where="num_scored > 1")[0]
    with pytest.raises(
        MismatchError, match=r'eval_fraction: was 0.3, now 0.0; where: was "num_scored > 1", now null'
    ):
        exported("hf")
    with pytest.raises(MismatchError, match="live: was null"):
        exported("hf", eval_fraction=0.3, where="num_scored > 1", live=True)


def test_nothing_left_says_why(exported):
    with pytest.raises(UsageError, match=r"no sample is left to export \(1 dropped, 1 unscored, 18 where\)"):
        exported("hf", where="false")
    with pytest.raises(UsageError, match="all 18 samples fall to evaluation"):
        exported("hf", eval_fraction=0.999999)
