"""Every setting that determines an artefact: changed, resuming is refused with exit code 4 and the setting's name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from small_job import OUT, STORE, in_process, whole_states

from pear_data import open_store
from pear_data.config import ExportSettings, IngestSettings, ScoreSettings, WeightSettings
from pear_data.demo import asset
from pear_data.errors import EXIT_MISMATCH, MismatchError
from pear_data.progress import Silent
from pear_data.stages.export import export
from pear_data.stages.ingest import ingest
from pear_data.stages.score import score
from pear_data.stages.sources import engine_source, recorded_source
from pear_data.stages.weight import weight
from pear_data.store import writable_store

INITIAL = str(asset("initial"))

# -- settings -> (settings changed to, what the refusal names) ---------------------------------------------------------

INGEST = {
    "corpus": ({"corpus": ["other.jsonl"]}, "inputs"),
    "tokenizer": ({"tokenizer": "other"}, "tokenizer"),
    "chat_template": ({"chat_template": "template.jinja"}, "chat_template"),
    "turns": ({"turns": "all"}, "turns"),
    "prompt_field": ({"prompt_field": "problem", "response_field": "answer"}, "prompt_field"),
    "response_field": ({"prompt_field": "problem", "response_field": "answer"}, "response_field"),
    "id_field": ({"id_field": ":row"}, "id_field"),
    "source_field": ({"source_field": "source"}, "source_field"),
    "label_field": ({"label_field": "label"}, "label_field"),
    "limit": ({"limit": 3}, "limit"),
    "shard_tokens": ({"shard_tokens": 7}, "shard_tokens"),
    "trust_remote_code": ({"trust_remote_code": True}, "trust_remote_code"),
}
WEIGHT = {
    "level": ({"level": "token"}, "level"),
    "block_by": ({"block_by": "lines"}, "block_by"),
    "block_size": ({"block_size": 5}, "block_size"),
    "block_regex": ({"block_by": "regex", "block_regex": "a"}, "block_regex"),
    "gamma": ({"gamma": 0.9}, "gamma"),
    "clip_log_ratio": ({"clip_log_ratio": (-0.1, 0.3)}, "clip_log_ratio"),
    "clip_log_weight": ({"clip_log_weight": (-9, 5)}, "clip_log_weight"),
    "negative_scale": ({"negative_scale": 0.5}, "negative_scale"),
    "center": ({"center": "sample"}, "center"),
    "normalize": ({"normalize": "sample"}, "normalize"),
    "per_source": ({"per_source": {"odd": {"gamma": 0.5}}}, "per_source"),
    "target": ({"target": "model"}, "inputs.scores/model"),
    "behavior": ({"behavior": "model"}, "inputs.scores/model"),
}
EXPORT = {
    "weights": ({"weights": "token"}, "weighting"),
    "format": ({"format": "verl"}, "format"),
    "max_length": ({"max_length": 350}, "max_length"),
    "eval_fraction": ({"eval_fraction": 0.5}, "eval_fraction"),
    "where": ({"where": "num_scored > 1"}, "where"),
    "live": ({"live": True}, "live"),
    "behavior": ({"live": True, "behavior": "behavior"}, "live"),
    "shard_tokens": ({"shard_tokens": 7}, "shard_tokens"),
}
# Where a policy's log-probs come from, by what its source says of itself.
OF_TEXT = {"align", "model_template"}
OF_ENGINES = {"model", "revision", "engine", "dtype", "trust_remote_code"}
SCORE = {"from_field", "max_length", *OF_TEXT, *OF_ENGINES}

NAMED = {"model": "weights_sha256", "model_template": "chat_template"}

# What says where and how work is done, or where it lands, and changes no content.
PLACEMENT = {
    IngestSettings: {"revision", "max_bad"},  # the tokenizer's fingerprint tells its revision
    ScoreSettings: {"policy", "workers", "runner", "ray_address", "audit"},
    WeightSettings: {"name", "workers", "runner", "ray_address"},
    ExportSettings: {"out", "check"},
}
# In vLLM's identity, see tests/reference/test_vllm_engine.py.
VLLM = {"head_dtype", "tensor_parallel", "engine_arg"}


@pytest.mark.parametrize(
    ("model", "changed"),
    [
        (IngestSettings, {*INGEST}),
        (ScoreSettings, SCORE | VLLM),
        (WeightSettings, {*WEIGHT}),
        (ExportSettings, {*EXPORT}),
    ],
)
def test_every_setting_is_changed_below_or_changes_nothing(model, changed):
    assert changed.isdisjoint(PLACEMENT[model])
    assert changed | PLACEMENT[model] == set(model.model_fields)


def refusal(names, command, *arguments):
    with pytest.raises(MismatchError) as caught:
        command(*arguments, Silent())
    assert caught.value.exit_code == EXIT_MISMATCH
    assert f"{names}: was " in str(caught.value) or f"{names}." in str(caught.value), str(caught.value)


# -- ingest ------------------------------------------------------------------------------------------------------------


def texts(answer):
    row = {"problem": "2 + 2", "solution": "4", "answer": answer, "source": "sums", "label": 1}
    return "".join(json.dumps(row | {"problem": f"{number} + 2"}) + "\n" for number in range(4))


@pytest.fixture(scope="module")
def text_corpus(tmp_path_factory):
    """A folder with a store of a few texts, and everything that the changed settings name."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "corpus.jsonl").write_text(texts("four"))
    (folder / "other.jsonl").write_text(texts("fore"))
    (folder / "template.jinja").write_text(
        "{# another #}" + (asset("initial") / "chat_template.jinja").read_text()
    )
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(INITIAL)
    other.add_tokens(["another token"])
    other.save_pretrained(folder / "other")
    return folder


def ingest_settings(**changed):
    return IngestSettings(**({"corpus": ["corpus.jsonl"], "tokenizer": INITIAL} | changed))


@pytest.fixture(scope="module")
def text_store(text_corpus):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(text_corpus)
        with writable_store("store", create=True) as store:
            ingest(store, ingest_settings(), Silent())
            yield store


@pytest.mark.parametrize("field", INGEST)
def test_a_corpus_begun_with_other_settings(text_store, field):
    changed, names = INGEST[field]
    refusal(names, ingest, text_store, ingest_settings(**changed))
    ingest(text_store, ingest_settings(), Silent())


# -- score -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    whole = whole_states(tmp_path_factory.mktemp("states"))
    with writable_store(whole / STORE) as store:
        weight(store, WeightSettings(level="token"), Silent())
    return whole


@pytest.fixture
def job(scored, tmp_path):
    return shutil.copytree(scored, tmp_path / "job")


def other(setting):
    """A source that differs from the one the policy "model" was scored with in one of its settings."""
    if setting == "from_field":
        return recorded_source("initial", Silent())
    if setting == "max_length":
        return engine_source(in_process(), 341)
    source = engine_source(in_process(), None)
    assert (NAMED.get(setting, setting) in source.settings) == (setting in OF_ENGINES)
    return replace(source, settings=source.settings | {NAMED.get(setting, setting): "other"})


@pytest.mark.parametrize("setting", sorted(SCORE))
def test_a_policy_scored_by_something_else(job, setting):
    with writable_store(job / STORE) as store:
        policy = ScoreSettings(policy="model", model=INITIAL)
        refusal(NAMED.get(setting, setting), score, store, policy, other(setting))
        score(store, policy, engine_source(in_process(), None), Silent())


# -- weight and export -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", WEIGHT)
def test_a_weighting_of_other_settings(job, setting):
    changed, names = WEIGHT[setting]
    with writable_store(job / STORE) as store:
        refusal(names, weight, store, WeightSettings(**({"name": "block"} | changed)))
        weight(store, WeightSettings(), Silent())


def export_settings(job, **changed):
    return ExportSettings(**({"out": str(job / OUT), "shard_tokens": 1000, "eval_fraction": 0.3} | changed))


@pytest.mark.parametrize("setting", EXPORT)
def test_an_export_of_other_settings(job, setting):
    changed, names = EXPORT[setting]
    store = open_store(job / STORE)
    refusal(names, export, store, export_settings(job, **changed))
    assert "nothing to do" in export(store, export_settings(job), Silent()).summary
