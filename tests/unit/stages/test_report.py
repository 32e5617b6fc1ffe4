"""The page is whole, self-contained and inert, and what it draws is what the store holds."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pear_data.cli.entry import run
from pear_data.config import ReportSettings, WeightSettings
from pear_data.errors import PearError, UsageError
from pear_data.progress import Silent
from pear_data.schema import VOCABULARY
from pear_data.stages.charts import WIDTH, log_ratio_chart, log_weight_chart, position_chart
from pear_data.stages.colours import FACTORS, STEPS, scale_for
from pear_data.stages.histogram import Histogram
from pear_data.stages.report import render, report
from pear_data.stages.weight import weight
from pear_data.store import open_store, writable_store

NASTY = '</script><script>alert("x")</script><img src=x onerror=alert(1)>\x1b[2J\x07\u202e&"\''


class Page(HTMLParser):
    """Elements, attributes and the scored tokens of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.tokens = [], [], []
        self._token = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        kind = dict(attrs).get("class", "")
        if tag == "span" and kind.startswith("step") and "title" in dict(attrs):
            self._token = [kind, dict(attrs)["title"], ""]

    def handle_data(self, data):
        if self._token:
            self._token[2] += data

    def handle_endtag(self, tag):
        if tag == "span" and self._token:
            self.tokens.append(tuple(self._token))
            self._token = None


def add_weights(folder, *levels, **settings):
    with writable_store(folder) as store:
        for level in levels:
            weight(store, WeightSettings(level=level, **settings), Silent())
    return open_store(folder)


@pytest.fixture
def folder(make_store, samples):
    samples[0].label = -1
    samples[1].behavior_status = "nonfinite"
    return make_store(samples)


def with_nasty_text(folder):
    """The same store with text no page should trust in every token."""
    with writable_store(folder) as store:
        path = folder / "tokenizer" / "vocabulary.parquet"
        texts = [f"{NASTY}{index}\n" for index in range(50)]
        pq.write_table(pa.table([range(50), texts], schema=VOCABULARY), path)
        store.manifest.tokenizer.vocabulary = store.entry_of(path)
        store.save()


def test_the_page_is_self_contained_and_inert(folder):
    with_nasty_text(folder)
    text = render(add_weights(folder, "token", "block"), ["token", "block"])
    page = Page(text)
    assert "script" not in page.tags
    assert not {"img", "link", "iframe", "object", "base", "form", "input"} & set(page.tags)
    assert not [
        name for _, name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "style")
    ]
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert not set(text) & {"\x1b", "\x07", "\u202e", "\x00"}
    assert "url(" not in text
    assert "@import" not in text
    assert any("</script><script>alert" in shown for _, _, shown in page.tokens)


def test_tokens_carry_their_own_numbers(folder, samples):
    store = add_weights(folder, "token")
    page = Page(render(store, ["token"]))
    rows = {row["sample_id"]: row for row in store.weights["token"].to_table().to_pylist()}
    scored = {
        (f"{weight:.4g}", f"{log_ratio:+.3f}")
        for sample in samples[2:]
        for weight, log_ratio in zip(
            rows[sample.sample_id]["weights"], sample.initial.astype(float) - sample.behavior, strict=True
        )
    }
    seen = {re.search(r"weight (\S+), log-ratio (\S+)", title).groups() for _, title, _ in page.tokens}
    assert seen <= scored
    assert len(seen) > 20
    for kind, title, shown in page.tokens:
        value = float(re.search(r"weight (\S+),", title)[1])
        assert (int(kind[4:]) - STEPS) * (value - 1) >= -1e-2, (kind, value)
        assert shown.startswith(" t")
        assert title.startswith(shown)


def test_the_extremes_and_the_middle_are_shown(folder, samples):
    store = add_weights(folder, "block")
    rows = [row for row in store.weights["block"].to_table().to_pylist() if row["status"] == "ok"]
    least = np.median([row["num_scored"] for row in rows]) / 2
    ranked = sorted((row["weight_mean"], row["sample_id"]) for row in rows if row["num_scored"] >= least)
    text = render(store, ["block"])
    headers = dict(re.findall(r"<h3>(.*?)</h3><span>(.*?)</span>", text))
    by_reason = {reason: sample for why, sample in headers.items() for reason in why.lower().split(", ")}
    assert by_reason["greatest mean weight"] == ranked[-1][1]
    assert by_reason["least mean weight"] == ranked[0][1]
    assert by_reason["median mean weight"] == ranked[(len(ranked) - 1) // 2][1]
    assert "s0" not in by_reason.values()
    assert "s1" not in by_reason.values()


def test_what_is_not_in_the_numbers_is_said(folder):
    text = render(add_weights(folder, "block"), ["block"])
    assert "not in the numbers: 1 dropped, 1 unscored samples" in text


def test_each_weighting_has_its_section_and_the_default_is_open(folder):
    store = add_weights(folder, "token", "block", "sequence")
    text = render(store, store.manifest.names("weights"))
    sections = re.findall(r"<details( open)?>\s*<summary>Samples, weights “(\w+)”", text)
    assert sections == [(" open", "block"), ("", "token"), ("", "sequence")]
    assert "By source, weights “block”" in text


def test_findings_are_on_the_page(make_store, samples):
    for sample in samples:
        sample.initial -= 2
    text = render(add_weights(make_store(samples), "token"), ["token"])
    assert "What looks wrong" in text
    assert "--clip-log-ratio -0.02 0.3" in text


def test_nothing_weighted_is_still_a_page(make_store, samples):
    for sample in samples:
        sample.initial_status = "nonfinite"
    assert "No sample has weights to show" in render(add_weights(make_store(samples), "block"), ["block"])


def test_a_long_sample_is_cut_in_the_middle_and_says_so(make_store, samples):
    size = 2000
    samples[0].input_ids = np.arange(size + 1, dtype=np.int32) % 50
    samples[0].loss_mask = np.arange(size + 1) > 0
    samples[0].behavior = samples[0].initial = np.full(size, -1, dtype=np.float32)
    text = render(add_weights(make_store(samples[:1]), "token"), ["token"])
    assert "… 1,301 tokens left out …" in text
    assert len(Page(text).tokens) == 699


def test_written_whole_or_not_at_all(folder, tmp_path):
    store = add_weights(folder, "block")
    out = tmp_path / "report.html"
    assert "block" in report(store, ReportSettings(out=str(out))).summary
    assert out.read_text(encoding="utf-8").rstrip().endswith("</html>")
    with pytest.raises(UsageError, match="weights/nope"):
        report(store, ReportSettings(out=str(out), weights="nope"))
    with pytest.raises(UsageError, match="no weights yet"):
        empty = open_store(folder)
        del empty.manifest.stages["weights/block"]
        report(empty, ReportSettings(out=str(out)))
    with pytest.raises(PearError, match="cannot write"):
        report(store, ReportSettings(out=str(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "store"]
    assert run(["report", "-o", str(out), "--weights", "block", "--store", str(folder)]) == 0


def histogram_of(values):
    histogram = Histogram()
    histogram.add(np.asarray(values, dtype=np.float32))
    return histogram


def test_charts_hold_every_token_and_mark_the_clips():
    random = np.random.default_rng(0)
    values = random.normal(-0.1, 0.4, 20_000).astype(np.float32)
    chart = log_ratio_chart(histogram_of(values), (-0.08, 0.3))
    shares = [float(re.search(r": (\S+) %", bar.title)[1]) / 100 for bar in chart.bars]
    assert sum(shares) == pytest.approx(1, abs=0.03)
    clipped = sum(share for share, bar in zip(shares, chart.bars, strict=True) if bar.kind == "clipped")
    assert clipped == pytest.approx(np.mean((values < -0.08) | (values > 0.3)), abs=0.03)
    low, high = (line.at for line in chart.lines)
    for bar in chart.bars:
        assert (bar.kind == "kept") == (low - 0.1 <= bar.x and bar.x + bar.width <= high + 0.1)
        assert bar.x >= 0
        assert bar.x + bar.width <= WIDTH
        assert bar.height >= 0
    tallest = max(chart.bars, key=lambda bar: bar.height)
    assert tallest.y == chart.top


@pytest.mark.parametrize("values", [[1.0], [1.0] * 9, [1e-30, 1e30], [0.5, 0.6], [4.54e-5, 148.0]])
def test_charts_of_any_weights(values):
    chart = log_weight_chart(histogram_of(values), lambda weights: ["step0"] * len(weights))
    assert chart.bars
    assert chart.x_ticks
    assert all(0 <= bar.x <= WIDTH and bar.y <= chart.bottom for bar in chart.bars)
    assert position_chart([None, 0.5, *[1.0] * 8], lambda weights: ["step0"] * len(weights)).bars


@pytest.mark.parametrize("factor", FACTORS)
def test_the_colour_scale(factor):
    scale = scale_for(factor**-4.4, factor**4.4)
    assert scale.factor == factor
    weights = np.array([0, factor**-9, factor**-2, 1, factor, factor**4, factor**9], dtype=np.float32)
    assert scale.steps(weights).tolist() == [-4, -4, -2, 0, 1, 4, 4]
    assert scale.label(0) == "1"
    assert scale.label(-STEPS).startswith("≤ ")
    assert float(scale.label(1)) == factor
    assert scale_for(1, 1).factor == FACTORS[0]


def test_every_element_is_closed(folder):
    text = render(add_weights(folder, "block"), ["block"])
    assert text.startswith("<!doctype html>")
    counts = {
        tag: text.count(f"<{tag}") - text.count(f"</{tag}>")
        for tag in ("div", "span", "table", "svg", "details")
    }
    assert set(counts.values()) == {0}
