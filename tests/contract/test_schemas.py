"""`schemas/` says what the code does: nothing has drifted, and what real commands write keeps to it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
import yaml
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pear_data.cli.entry import run
from pear_data.contracts import MEANINGS, PLACES, contracts, write_contracts
from pear_data.resources import folder
from pear_data.schema import ARTEFACTS
from pear_data.store import open_store
from pear_data.store.view_sql import view_statements


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A store, an export and its statistics, made by commands from recorded log-probs of pre-tokenized samples."""
    place = tmp_path_factory.mktemp("job")
    words = {f"w{index}": index for index in range(20)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(place / "tokenizer")
    rows = [
        {
            "id": f"s{index}",
            "source": ["a", "b"][index % 2],
            "input_ids": [1, 2, *range(3, 4 + index)],
            "loss_mask": [False, False] + [True] * (1 + index),
            "initial": [-0.5 - 0.1 * step for step in range(1 + index)],
            "behavior": [-0.4 - 0.12 * step for step in range(1 + index)],
        }
        for index in range(12)
    ]
    rows.append({"id": "no tokens", "source": "a"})
    (place / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = ["--store", str(place / "store")]
    corpus = [str(place / "corpus.jsonl"), "--tokenizer", str(place / "tokenizer"), "--id-field", "id"]
    assert run(["ingest", *corpus, "--source-field", "source", *store]) == 3
    for policy in ("initial", "behavior"):
        assert run(["score", "--policy", policy, "--from-field", policy, *store]) == 0
    assert run(["weight", *store]) == 0
    assert run(["export", str(place / "export"), "--weights", "block", *store]) == 0
    packs = ["--format", "hf-packed", "--max-length", "16"]
    assert run(["export", str(place / "packed"), *packs, *store]) == 0
    assert run(["export", str(place / "verl"), "--format", "verl", *store]) == 0
    shutil.copytree(place / "store", place / "mended" / "store")
    mended = {"input": "corpus.jsonl", "row": 13, "raw": {**rows[0], "id": "mended"}}
    (place / "mended.jsonl").write_text(json.dumps(mended))
    assert (
        run(["quarantine", "retry", str(place / "mended.jsonl"), "--store", str(place / "mended" / "store")])
        == 0
    )
    return place


def schema(name):
    found = json.loads((folder("schemas") / f"{name}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


def test_nothing_has_drifted():
    current = contracts()
    published = {path.name: path.read_text(encoding="utf-8") for path in folder("schemas").iterdir()}
    assert published.keys() == current.keys(), "run `python -m pear_data.contracts`"
    for name, text in current.items():
        assert published[name] == text, f"schemas/{name} has drifted: run `python -m pear_data.contracts`"


def test_writing_leaves_only_the_contracts(tmp_path):
    (tmp_path / "old.schema.json").write_text("{}")
    write_contracts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == contracts().keys()


def test_every_column_has_one_meaning():
    assert PLACES.keys() == ARTEFACTS.keys()
    named = {field.name for found in ARTEFACTS.values() for field in found}
    own = {f"{artefact}.{field.name}" for artefact, found in ARTEFACTS.items() for field in found}
    assert MEANINGS.keys() <= named | own


def test_a_real_manifest_keeps_to_its_schema(job):
    for manifest in (
        json.loads((job / place / "manifest.json").read_text()) for place in ("mended/store", "store")
    ):
        schema("manifest").validate(manifest)
    manifest["stages"]["corpus"]["shards"][0]["file"]["sha256"] = 1
    assert list(schema("manifest").iter_errors(manifest))


def test_real_statistics_keep_to_their_schema(job, capsys):
    assert run(["stats", "--format", "json", "--store", str(job / "store")]) == 0
    found = json.loads(capsys.readouterr().out)
    schema("statistics").validate(found)
    assert found[0]["corpus"]["samples"] == 12
    del found[0]["corpus"]["ess"]
    assert list(schema("statistics").iter_errors(found))


def test_a_real_export_keeps_to_its_schema(job):
    schema("pear_export").validate(json.loads((job / "export" / "pear_export.json").read_text()))


def test_bundled_recipes_keep_to_their_schema():
    recipes = list(folder("pipelines").glob("*.yaml"))
    assert recipes
    for path in recipes:
        schema("recipe").validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert list(schema("recipe").iter_errors({"steps": [{"weight": {"gama": 0.9}}]}))


def test_real_files_have_the_published_columns(job):
    published = json.loads((folder("schemas") / "artefacts.json").read_text(encoding="utf-8"))["artefacts"]
    names = {"POLICY": "initial", "NAME": "block", "NNNNN": "00000", "STORE": "store"}
    names |= {"PACKED_OUT": "packed", "VERL_OUT": "verl", "OUT": "export"}
    for artefact in published.values():
        place = artefact["place"].replace(
            "STORE/quarantine/mended-part-NNNNN", "mended/STORE/quarantine/mended-part-00001"
        )
        for placeholder, value in names.items():
            place = place.replace(placeholder, value)
        columns = [
            {"name": field.name, "type": type_name(field.type), "nullable": field.nullable}
            for field in pq.read_schema(job / place)
        ]
        assert columns == [{key: column[key] for key in columns[0]} for column in artefact["columns"]], place


def type_name(kind):
    return f"list<{kind.value_type}>" if hasattr(kind, "value_type") else str(kind)


def test_the_published_views_run_on_a_real_store(job):
    statements = (folder("schemas") / "views.sql").read_text(encoding="utf-8")
    store = open_store(job / "store")
    with duckdb.connect() as published, duckdb.connect() as real:
        published.execute(statements.replace("'STORE/", f"'{Path(store.path).absolute()}/"))
        for statement in view_statements(store.manifest, str(Path(store.path).absolute())):
            real.execute(statement)
        for view in ("corpus", "scores", "weights", "samples", "tokens"):
            query = f"from {view} order by all"
            assert published.execute(query).fetchall() == real.execute(query).fetchall()
            assert published.execute(f"select count(*) from {view}").fetchone() != (0,)


def test_status_and_logs_keep_to_their_schemas(job, capsys):
    assert run(["status", "--store", str(job / "store")]) == 0
    status = json.loads(capsys.readouterr().out)  # no terminal, hence JSON
    schema("status").validate(status)
    assert {stage["state"] for stage in status["stages"]} == {"done"}
    assert run(["status", "--store", str(job / "store"), "--format", "table"]) == 0
    assert "weights/block" in capsys.readouterr().out
    logs = sorted((job / "store" / "logs").rglob("*.jsonl"))
    assert len(logs) == len(status["stages"])
    for line in [line for path in logs for line in path.read_text(encoding="utf-8").splitlines()]:
        schema("log_event").validate(json.loads(line))
