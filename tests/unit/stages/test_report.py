"""The page is whole, self-contained and inert, and what it draws is what the store holds."""

from __future__ import annotations

import html
import re
import shlex
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
from pear_data.stages.axes import WIDTH
from pear_data.stages.charts import log_ratio_chart, weight_chart
from pear_data.stages.colours import FACTORS, STEPS, scale_for
from pear_data.stages.heat_map import SHOWN_CHARACTERS, SHOWN_TOKENS
from pear_data.stages.histogram import Histogram
from pear_data.stages.page_text import NAME_CHARACTERS
from pear_data.stages.position_charts import position_charts
from pear_data.stages.report import SHOWN_WEIGHTINGS, render, report
from pear_data.stages.side_by_side import compare_sources
from pear_data.stages.statistics import DecileStatistics, GroupStatistics
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


def with_nasty_text(folder, text=NASTY):
    """The same store with text no page should trust in every token."""
    with writable_store(folder) as store:
        path = folder / "tokenizer" / "vocabulary.parquet"
        texts = [f"{text}{index}\n" for index in range(50)]
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
    ids = [row["sample_id"] for row in rows if row["num_scored"] >= least]
    weights = {row["sample_id"]: np.array(row["weights"], float) for row in rows}
    log_ratios = {s.sample_id: (s.initial.astype(float) - s.behavior).mean() for s in samples}
    means = sorted(ids, key=lambda one: weights[one].mean())
    ess = sorted(
        ids, key=lambda one: weights[one].sum() ** 2 / (weights[one] ** 2).mean() / len(weights[one]) ** 2
    )
    expected = {
        "greatest mean weight": means[-1],
        "least mean weight": means[0],
        "median mean weight": means[(len(means) - 1) // 2],
        "lowest ess": ess[0],
        "highest ess": ess[-1],
        "largest single weight": max(ids, key=lambda one: weights[one].max()),
        "least likely under the target": min(ids, key=log_ratios.get),
        "likeliest under the target": max(ids, key=log_ratios.get),
    }
    headers = re.findall(r"<h4>(.*?)</h4><span><bdi>(.*?)</bdi>", render(store, ["block"]))
    assert {reason: one for why, one in headers for reason in why.lower().split(", ")} == expected
    assert len(headers) == len(set(expected.values()))


def test_what_is_not_in_the_numbers_is_said(folder):
    text = render(add_weights(folder, "block"), ["block"])
    assert "not in the numbers: 1 dropped, 1 unscored samples" in text


def test_each_weighting_has_its_section_and_the_default_is_first_and_open(folder):
    store = add_weights(folder, "token", "block", "sequence")
    text = render(store, store.manifest.names("weights"))
    sections = re.findall(r'<details class="weighting"( open)?>\s*<summary>Weights “(\w+)”', text)
    assert sections == [(" open", "block"), ("", "token"), ("", "sequence")]
    assert "Weightings side by side" in text
    assert "Weightings side by side" not in render(store, ["token"])


def test_further_weightings_are_compared_only_and_that_is_said(folder):
    names = [f"w{number}" for number in range(SHOWN_WEIGHTINGS + 2)]
    with writable_store(folder) as store:
        for number, name in enumerate(names):
            weight(store, WeightSettings(name=name, block_size=1 + number), Silent())
    text = render(open_store(folder), names)
    assert text.count('<details class="weighting"') == SHOWN_WEIGHTINGS
    assert "Charts and samples of w6, w7 are left out" in text
    assert all(f"<td><bdi>{name}</bdi></td>" in text for name in names)


def test_the_verdict_comes_first_with_commands_to_copy(make_store, samples):
    for sample in samples:
        sample.initial -= 2
    text = render(add_weights(make_store(samples), "token"), ["token"])
    assert "look wrong</span></h1>" in text or "looks wrong</span></h1>" in text
    assert (
        text.index("<h1>")
        < text.index("of the log-ratios lie below the lower clip -0.08")
        < text.index("<h2>")
    )
    commands = [html.unescape(found) for found in re.findall(r'<code class="command">(.*?)</code>', text)]
    assert commands
    assert all(command.startswith("pear-data weight --level ") for command in commands)
    assert all(command.endswith(" --name token-2") for command in commands)


def test_a_command_of_the_page_runs_as_it_is(make_store, samples):
    for sample in samples:
        sample.initial -= 2
    folder = make_store(samples)
    text = render(add_weights(folder, "token", gamma=0.99), ["token"])
    command = html.unescape(re.search(r'<code class="command">(.*?)</code>', text)[1])
    assert run([*shlex.split(command)[1:], "--store", str(folder)]) == 0
    made = open_store(folder).stage("weights/token-2").settings
    assert made["gamma"] == 0.99
    assert made != open_store(folder).stage("weights/token").settings


def test_commands_in_sentences_are_code_and_nothing_else_is_markup(make_store, samples):
    for sample in samples:
        sample.initial_status = "nonfinite"
    text = render(add_weights(make_store(samples), "block"), ["block"])
    # The sentence holds status_<policy>, too.
    assert (
        "look at status_&lt;policy&gt; and label in <code>pear-data sql &#39;from samples&#39;</code>" in text
    )


def test_nothing_wrong_is_said_too(folder):
    assert "Nothing looks wrong" in render(add_weights(folder, "uniform"), ["uniform"])


@pytest.mark.parametrize("level", ["uniform", "dft"])
@pytest.mark.parametrize("has_behavior", [True, False])
def test_baselines_have_their_page(make_store, samples, level, has_behavior):
    folder = make_store(samples)
    if not has_behavior:
        with writable_store(folder) as store:
            del store.manifest.stages["scores/behavior"]
            store.save()
    text = render(add_weights(folder, level), [level])
    titles = re.findall(r"<figcaption><b>(.*?)</b>", text)
    about_ratios = ["Log-ratios of the tokens", "Mean log-ratio by position"] if has_behavior else []
    assert titles == [
        "Weights of the tokens", *about_ratios[:1], "Mean weight by position",
        "Effective sample size by position", *about_ratios[1:],
    ]  # fmt: skip
    assert ("log-ratio" in Page(text).tokens[0][1]) == has_behavior
    assert not re.search(r"\b(nan|inf)\b", text)


def test_many_sources_are_cut_to_the_largest_and_that_is_said(make_store):
    groups = [
        GroupStatistics.model_validate(
            {**dict.fromkeys(GroupStatistics.model_fields), "source": f"s{n:03}", "samples": n, "scored_tokens": n,
             "statuses": {}, "negatives": 0, "weight_by_decile": [], "by_decile": []}
        )
        for n in range(200)
    ]  # fmt: skip
    whole = groups[0].model_copy(update={"source": None, "scored_tokens": sum(range(200))})
    compared = compare_sources(WeightSettings(), whole, groups)
    assert [row.name for row in compared.rows] == ["all sources", *(f"s{n:03}" for n in range(199, 179, -1))]
    share = 100 * sum(range(180)) / sum(range(200))
    assert compared.left_out.startswith(f"180 smaller sources with {share:.3g} % of the tokens are left out")
    assert compare_sources(WeightSettings(), whole, groups[:1]).left_out is None


def test_nothing_weighted_is_still_a_page(make_store, samples):
    for sample in samples:
        sample.initial_status = "nonfinite"
    assert "No sample has weights to show" in render(add_weights(make_store(samples), "block"), ["block"])


def test_a_long_sample_is_cut_in_the_middle_and_says_so(make_store, samples):
    size = 2000
    samples[0].input_ids = np.arange(size + 300, dtype=np.int32) % 50
    samples[0].loss_mask = np.arange(size + 300) >= 300
    samples[0].behavior = samples[0].initial = np.full(size, -1, dtype=np.float32)
    text = render(add_weights(make_store(samples[:1]), "token"), ["token"])
    assert "2,000 scored tokens, 500 shown" in text
    assert " … 1,500 scored tokens left out … " in text
    assert " … 220 tokens left out … " in text
    assert len(Page(text).tokens) == SHOWN_TOKENS


def test_long_names_and_tokens_are_cut_and_say_so(make_store, samples):
    for sample in samples:
        sample.sample_id = f"{sample.sample_id}{'x' * 10_000}"
    folder = make_store(samples)
    with_nasty_text(folder, "y" * 5000)
    text = render(add_weights(folder, "token"), ["token"])
    assert "x" * NAME_CHARACTERS not in text
    assert re.search(r"x{70,}… \(10,00\d characters\)", text)
    assert "y" * (SHOWN_CHARACTERS + 1) not in text
    assert len(text) < 300_000


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


def shares_of(chart):
    return [float(re.search(r": (\S+) %", bar.title)[1]) / 100 for bar in chart.bars]


def test_charts_hold_every_token_and_mark_the_clips():
    random = np.random.default_rng(0)
    values = random.normal(-0.1, 0.4, 20_000).astype(np.float32)
    chart = log_ratio_chart(histogram_of(values), (-0.08, 0.3), "")
    shares = shares_of(chart)
    assert sum(shares) == pytest.approx(1, abs=0.01)
    clipped = sum(share for share, bar in zip(shares, chart.bars, strict=True) if bar.kind == "clipped")
    assert clipped == pytest.approx(np.mean((values < -0.08) | (values > 0.3)), abs=0.01)
    low, high = (line.at for line in chart.lines)
    for bar in chart.bars:
        assert (bar.kind == "plain") == (low - 0.1 <= bar.x and bar.x + bar.width <= high + 0.1)
        assert bar.x >= 0
        assert bar.x + bar.width <= WIDTH
        assert bar.height >= 0
    tallest = max(chart.bars, key=lambda bar: bar.height)
    assert tallest.y == chart.top


def test_heights_of_bars_are_shares():
    values = np.exp(np.random.default_rng(1).normal(-0.5, 0.7, 50_000)).astype(np.float32)
    chart = weight_chart(histogram_of(values), lambda weights: ["step0"] * len(weights))
    shares = np.array(shares_of(chart))
    heights = np.array([bar.height for bar in chart.bars])
    np.testing.assert_allclose(heights / heights.max(), shares / shares.max(), atol=0.01)
    for bar, share in zip(chart.bars[1:-1], shares[1:-1], strict=True):
        low, high = map(float, re.match(r"(\S+) to (\S+):", bar.title).groups())
        assert share == pytest.approx(np.mean((values >= low) & (values < high)), abs=0.004)


@pytest.mark.parametrize("clips", [None, (-0.08, 0.3), (-1e9, 1e9), (0.0, 0.0), (-2.0, -1.0)])
@pytest.mark.parametrize(
    "values", [[0.0], [0.0] * 9, [-1e-7, 1e-7], [-300.0, 300.0], [-0.05, 0.01], [-3.0] * 5]
)
def test_charts_of_any_log_ratios(values, clips):
    chart = log_ratio_chart(histogram_of(values), clips, "")
    assert sum(shares_of(chart)) == pytest.approx(1, abs=0.02)
    assert all(0 <= bar.x <= WIDTH and chart.top <= bar.y <= chart.bottom for bar in chart.bars)
    assert all(0 <= line.at <= WIDTH for line in chart.lines)
    assert len(chart.x_ticks) > 1


@pytest.mark.parametrize(
    "values", [[1.0], [1.0] * 9, [1e-30, 1e30], [0.5, 0.6], [4.54e-5, 148.0], [0.0, 1.0], [0.0]]
)
def test_charts_of_any_weights(values):
    chart = weight_chart(histogram_of(values), lambda weights: ["step0"] * len(weights))
    assert sum(shares_of(chart)) == pytest.approx(1, abs=0.02)
    assert chart.x_ticks
    assert all(0 <= bar.x <= WIDTH and bar.y <= chart.bottom for bar in chart.bars)


def tenth(**numbers):
    return DecileStatistics(**{**dict.fromkeys(DecileStatistics.model_fields), "tokens": 5, **numbers})


def test_position_charts_skip_what_is_not_known():
    empty = DecileStatistics(**{**dict.fromkeys(DecileStatistics.model_fields), "tokens": 0})
    known = tenth(weight_mean=0.5, ess_ratio=1.0, log_ratio_mean=-0.2, log_ratio_clipped_low=0.25,
                  log_ratio_clipped_high=0.5, saturated=0.0, ppl_ratio=1.2)  # fmt: skip
    charts = position_charts([empty, *[known] * 9], lambda weights: ["step0"] * len(weights), has_clips=True)
    assert [len(chart.bars) for chart in charts] == [9, 9, 18, 9]
    low, high = charts[2].bars[:2]
    assert high.height == pytest.approx(2 * low.height, abs=0.02)
    assert high.y + high.height == pytest.approx(low.y, abs=0.02)
    assert all(bar.y >= charts[3].base for bar in charts[3].bars)
    weightless = tenth(weight_mean=0.0, saturated=0.0)
    charts = position_charts([weightless] * 10, lambda weights: ["step0"] * len(weights), has_clips=True)
    assert len(charts) == 2


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
        for tag in ("div", "span", "table", "svg", "details", "bdi", "article")
    }
    assert set(counts.values()) == {0}
