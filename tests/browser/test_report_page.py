"""The report as Chromium shows it: light, dark, on paper and on a telephone; nothing in it runs, nothing is loaded."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field

import pytest

LEAST_CONTRAST = 4.5
# Scheme, medium and width of the window.
VIEWS = {
    "light": ("light", "screen", 1200),
    "dark": ("dark", "screen", 1200),
    "narrow": ("light", "screen", 400),
    "narrow and dark": ("dark", "screen", 400),
    "print": ("light", "print", 794),
    "print where the screen is dark": ("dark", "print", 794),
}

# Every element with text of its own that is shown: its contrast with the background behind it, by WCAG 2.
CONTRASTS = """() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, alpha = 1] = parse(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return [r, g, b];
      if (alpha > 0) throw new Error('half transparent background');
    }
    throw new Error('no background');
  };
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || element.tagName === 'title' || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const ink = element instanceof SVGElement ? style.fill : style.color;
    const [high, low] = [luminance(parse(ink)), luminance(behind(element))].sort((a, b) => b - a);
    const kind = `${element.tagName} ${element.getAttribute('class') || ''}`;
    found.push({kind, contrast: (high + 0.05) / (low + 0.05)});
  }
  return found;
}"""
# What reaches beyond the window, but for what scrolls by itself.
OUTSIDE = """() => [...document.body.querySelectorAll('*')]
  .filter(element => !element.closest('.scroll > *') && element.getBoundingClientRect().right > innerWidth + 0.5)
  .map(element => element.outerHTML.slice(0, 200))"""
SIZES = """() => [...document.querySelectorAll('svg')]
  .map(svg => svg.getBoundingClientRect())
  .map(box => [box.width, box.height])"""
PAPER = "getComputedStyle(document.body).backgroundColor"


@dataclass
class Seen:
    """A page and what was heard of it."""

    page: object
    requests: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextlib.contextmanager
def opened(browser, path, view="light"):
    """A page of the file at `path` as one of VIEWS, all its sections open."""
    scheme, medium, width = VIEWS[view]
    page = browser.new_page()
    seen = Seen(page)
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("requestfinished", lambda request: seen.loaded.append(request.url))
    page.on("console", lambda message: seen.complaints.append(message.text))
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("dialog", lambda dialog: (seen.complaints.append(dialog.message), dialog.dismiss()))
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme, media=medium)
    try:
        page.goto(path.as_uri(), wait_until="load")
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        yield seen
    finally:
        page.close()


@pytest.fixture(params=VIEWS)
def seen(browser, page_path, request):
    with opened(browser, page_path, request.param) as found:
        yield found


def test_nothing_is_loaded_and_nothing_runs(seen, page_path):
    assert seen.requests == [page_path.as_uri()]
    assert seen.complaints == []
    assert seen.page.title() == "Token weights of store"
    assert seen.page.evaluate("document.scripts.length + document.images.length + document.links.length") == 0


def test_nothing_reaches_beyond_the_window(seen):
    wide, shown = seen.page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= shown
    assert seen.page.evaluate(OUTSIDE) == []


def test_every_chart_has_a_size(seen):
    sizes = seen.page.evaluate(SIZES)
    assert len(sizes) > 50
    assert min(min(size) for size in sizes) >= 5


def test_every_text_can_be_read(seen):
    found = seen.page.evaluate(CONTRASTS)
    tokens = [one for one in found if one["kind"].lower().startswith("span step")]
    assert len({one["kind"] for one in tokens}) == 9
    assert len(tokens) > 3000
    too_faint = {
        (one["kind"], round(one["contrast"], 2)) for one in found if one["contrast"] < LEAST_CONTRAST
    }
    assert too_faint == set()


def test_hostile_text_is_shown_as_text(seen, readable):
    shown = seen.page.evaluate("document.body.textContent")
    for text in readable:
        # A name is shown to its 80th character.
        assert text[:70] in shown
    assert not set(shown) & set("\x00\x07\x1b\x9b\u202e\u2066\u200b\ufeff")
    assert seen.page.evaluate("getComputedStyle(document.body).display") == "block"
    assert seen.page.locator("main").count() == 1


@pytest.mark.parametrize("view", ["light", "dark"])
def test_tooltips_carry_numbers(browser, page_path, view):
    with opened(browser, page_path, view) as seen:
        titles = seen.page.locator(".tokens span").evaluate_all("all => all.map(one => one.title)")
        assert all("weight " in title for title in titles)
        bars = seen.page.locator("figure rect title").all_text_contents()
        assert all("%" in title or ":" in title for title in bars)


def test_paper_is_white_whatever_the_screen(browser, page_path):
    with opened(browser, page_path, "print where the screen is dark") as seen:
        assert seen.page.evaluate(PAPER) == "rgb(255, 255, 255)"
        assert seen.page.pdf(format="A4").startswith(b"%PDF-")


def test_dark_is_dark(browser, page_path):
    with opened(browser, page_path, "dark") as seen:
        shades = re.findall(r"\d+", seen.page.evaluate(PAPER))
        assert max(map(int, shades)) < 40


def test_what_was_put_into_the_page_would_not_run(browser, page_path, tmp_path):
    """The content security policy is the second wall: were the escaping broken, it would still hold."""
    broken = tmp_path / "broken.html"
    attack = (
        "<script>document.title = 'broken'</script><img src='x.png' onerror=\"document.title = 'broken'\">"
        "<link rel=stylesheet href='x.css'><iframe src='about:blank'></iframe><form action='x'></form>"
    )
    text = page_path.read_text(encoding="utf-8")
    broken.write_text(text.replace("<main>", f"<main>{attack}", 1), encoding="utf-8")
    with opened(browser, broken) as seen:
        assert seen.page.title() == "Token weights of store"
        assert seen.loaded == [broken.as_uri()]
        assert any("Content Security Policy" in complaint for complaint in seen.complaints)
