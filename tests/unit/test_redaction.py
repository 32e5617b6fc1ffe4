"""Secrets go, whatever stands around them, and innocent text stays as it is."""

from __future__ import annotations

import time

import pytest

from pear_data.redaction import redacted, redacted_values, secret_in

TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pa@ss@host/x?a=1&token=abc#f", "https://***@host/x?a=1&token=***#f"),
        ("no cluster at ray://user:pw@host:10001", "no cluster at ray://***@host:10001"),
        ("redis://:pw@host:1", "redis://***@host:1"),
        ("https://host/x?X-Amz-Signature=ab&key=v", "https://host/x?X-Amz-Signature=***&key=***"),
        ("corpus.jsonl?token=abc:12: no object", "corpus.jsonl?token=***:12: no object"),
        ("--engine-arg hf_token=abc", "--engine-arg hf_token=***"),
        ('{"download": "password=abc", "n": 1}', '{"download": "password=***", "n": 1}'),
        ("loader={api_key: abc, b: 1}", "loader={api_key: ***, b: 1}"),
        ('{"hf_token" : "abc", "b": 1}', '{"hf_token" : "***", "b": 1}'),
        ("AWS_SECRET_ACCESS_KEY=abc/d+e", "AWS_SECRET_ACCESS_KEY=***"),
        ("Authorization: Bearer abcdefghij.k", "Authorization: Bearer ***"),
        (f"401 for {TOKEN}.", "401 for ***."),
        ("sk-proj-abcdefghijklmnop12345", "***"),
    ],
)
def test_secrets_go(text, expected):
    assert redacted(text) == expected
    assert redacted(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "part-00000: 12 samples, 345 tokens/s, mean 1.5 @ 3",
        "pad_token=<s> num_tokens=500 max_num_batched_tokens=8192",
        "s3://bucket/a@b and somebody@example.org",
        "Qwen/Qwen2.5-7B-Instruct with sk-learn and hf_overrides, hf_transformers_modeling",
        "key=value, token=3",
        "--engine-arg hf_token: set HF_TOKEN in the environment",
        "https://host:80/x?page=2",
    ],
)
def test_innocent_text_stays(text):
    assert redacted(text) == text


def test_what_secret_variables_hold_goes_everywhere(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-no-known-make")
    monkeypatch.setenv("MY_API_KEY", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert redacted("a of-no-known-make b short false") == "a *** b short false"
    settings = {"model": "x", "of-no-known-make": [1, ("of-no-known-make", {"a": None})]}
    assert redacted_values(settings) == {"model": "x", "***": [1, ("***", {"a": None})]}


def test_where_a_setting_holds_a_secret_is_said_without_it():
    assert secret_in("hf_token", "x") == "hf_token"
    assert secret_in("loader", {"a": [{"api_key": "v"}]}) == "loader.a.api_key"
    assert secret_in("download_dir", "https://user:pw@host/") == "download_dir"
    assert secret_in("names", ["a", TOKEN]) == "names"
    assert secret_in("max_num_batched_tokens", 5) is None
    assert secret_in("hf_overrides", {"eos_token": "</s>", "rope_theta": 1e6}) is None
    assert secret_in("hf_token", None) is None


@pytest.mark.parametrize(
    "piece", ["a-", "://", "@", "x_secret", "?a", "https://u:p@h ", "&token=", "{api_key:", "{ "]
)
def test_no_text_takes_long(piece):
    start = time.monotonic()
    redacted("https://" + piece * 20_000)
    assert time.monotonic() - start < 5
