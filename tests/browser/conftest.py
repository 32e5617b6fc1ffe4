"""Chromium, and a report whose sources, ids and tokens are what an attacker would choose."""

from __future__ import annotations

import json
import random
import shutil
import string

import pytest
from playwright.sync_api import sync_playwright
from transformers import AutoTokenizer

from pear_data.cli.entry import run
from pear_data.demo import asset

SAMPLES = 75
LONG = "a-very-long-name-" * 600
HOSTILE = [
    '</script><script>document.title="broken"</script>',
    "</style><style>body{display:none}</style><title>x</title></details></main>",
    "<img src=x onerror=\"document.title='broken'\"> ' \" ` &lt; {{ 7 * 7 }} {% raw %}",
    "\x1b[31mred\x1b[0m\x07\x1b]0;title\x07\x9b2J",
    "\u202eright to left\u202c \u2066isolate \u200bzero width\ufeff",
    "שלום and عربى <bdo dir=rtl>",
    "javascript:alert(1) data:text/html,<script> url(https://example.org/x.png) @import 'x'",
    LONG,
]
# What people must be able to read of them: all of it but control characters and the marks that reorder text.
READABLE = [
    '</script><script>document.title="broken"</script>',
    "</style><style>body{display:none}</style><title>x</title></details></main>",
    "<img src=x onerror=\"document.title='broken'\"> ' \" ` &lt; {{ 7 * 7 }} {% raw %}",
    "[31mred[0m]0;title2J",
    "right to left isolate zero width",
    "שלום and عربى <bdo dir=rtl>",
    "javascript:alert(1) data:text/html,<script> url(https://example.org/x.png) @import 'x'",
]
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def chromium():
    """Path of the browser. A machine without one fails the tests: a page no browser has shown is not tested."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.fail("there is no Chromium: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def browser(chromium, tmp_path_factory):
    """A browser with a profile of its own; gone with the module, since its event loop is in others' way."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=chromium, args=ARGUMENTS, headless=True
        )
        yield context
        context.close()


@pytest.fixture(scope="session")
def page_path(tmp_path_factory):
    """A report over hostile text: three weightings and 25 sources, some of which look wrong."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "corpus.jsonl").write_text("".join(_rows()), encoding="utf-8")
    store = ["--store", str(folder / "store")]
    fields = ["--id-field", "id", "--source-field", "source"]
    tokenizer = ["--tokenizer", str(asset("initial"))]
    assert run(["ingest", str(folder / "corpus.jsonl"), *tokenizer, *fields, *store]) == 0
    for policy in ("initial", "behavior"):
        assert run(["score", "--policy", policy, "--from-field", f"logprobs_{policy}", *store]) == 0
    for options in (["--level", "block"], ["--level", "token", "--center", "sample"], ["--level", "uniform"]):
        assert run(["weight", *options, *store]) == 0
    assert run(["report", "-o", str(folder / "report.html"), *store]) == 0
    return folder / "report.html"


def _rows():
    """Rows of JSONL that are tokenized already; responses repeat hostile text between harmless words."""
    tokenizer = AutoTokenizer.from_pretrained(str(asset("initial")))
    chance = random.Random(3)
    for number in range(SAMPLES):
        hostile = HOSTILE[number % (len(HOSTILE) - 1)]
        words = " ".join("".join(chance.choices(string.ascii_lowercase, k=5)) for _ in range(30))
        prompt = tokenizer.encode(f"{hostile} or\x00 not?\n")
        response = tokenizer.encode(f"{words}\n{hostile}\n{words}")
        behavior = [-chance.expovariate(20) for _ in response]
        # The policies are far apart in the sources with hostile names, so that findings and remedies name these.
        apart = 3 if number % 25 < len(HOSTILE) else 60
        yield (
            json.dumps(
                {
                    "id": f"{number} {HOSTILE[number % len(HOSTILE)]}",
                    "source": HOSTILE[number % 25] if number % 25 < len(HOSTILE) else f"source {number % 25}",
                    "input_ids": [*prompt, *response],
                    "loss_mask": [*[0] * len(prompt), *[1] * len(response)],
                    "logprobs_behavior": behavior,
                    "logprobs_initial": [value - chance.expovariate(apart) for value in behavior],
                }
            )
            + "\n"
        )


@pytest.fixture(scope="session")
def readable():
    """Text that the page must show."""
    return READABLE
