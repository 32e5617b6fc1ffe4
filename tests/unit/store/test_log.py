"""The log of a stage: whole lines in order, whatever is torn, lost or hostile."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from pear_data.errors import PearError
from pear_data.store.log import EVENTS, Ended, Said, StageLog, Started, log_path, read_log

KEY = "scores/initial"


def said(text):
    return Said(event="said", text=text)


def texts(store):
    return [None if event is None else event.text for event in read_log(store, KEY)]


@pytest.fixture
def log(tmp_path):
    opened = StageLog(tmp_path, KEY)
    yield opened
    opened.close()


def test_events_come_back_as_they_were_a_line_of_json_each(tmp_path, log):
    assert log.last is None
    events = [
        Started(command="pear-data score", version="1", process=7),
        said("two\nlines \x1b[2J"),
        Ended(outcome="done", exit_code=0, seconds=1.5, text=""),
    ]
    for event in events:
        log.add(event)
    assert list(read_log(tmp_path, KEY)) == events
    lines = log_path(tmp_path, KEY).read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["started", "said", "ended"]
    written = datetime.fromisoformat(json.loads(lines[0])["time"])
    assert abs((datetime.now(UTC) - written).total_seconds()) < 60
    again = StageLog(tmp_path, KEY)
    assert again.last == events[-1]
    again.close()


@pytest.mark.parametrize("cut", range(1, 64, 9))
def test_half_a_line_costs_that_line_alone(tmp_path, log, cut):
    log.add(said("first"))
    path = log_path(tmp_path, KEY)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:cut])
    assert texts(tmp_path) == ["first"]  # it may be growing still
    again = StageLog(tmp_path, KEY)
    assert again.last.text == "first"
    again.add(said("second"))
    again.close()
    assert texts(tmp_path) == ["first", None, "second"]


@pytest.mark.parametrize(
    "line",
    [
        b"\x00" * 40,
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"event": "of a later version"}',
        b'{"event": "ended"}',
        b"{" * 9999,
    ],
)
def test_what_is_no_event_is_passed_over_and_counted(tmp_path, log, line):
    log.add(said("first"))
    with log_path(tmp_path, KEY).open("ab") as file:
        file.write(line + b"\n")
    log.add(said("second"))
    assert texts(tmp_path) == ["first", None, "second"]


def test_no_log_has_no_events(tmp_path):
    assert list(read_log(tmp_path, KEY)) == []


def test_it_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("kept")
    log_path(tmp_path, KEY).parent.mkdir(parents=True)
    log_path(tmp_path, KEY).symlink_to(tmp_path / "precious")
    with pytest.raises(PearError, match=r"cannot write .*logs/scores/initial\.jsonl"):
        StageLog(tmp_path, KEY)
    assert (tmp_path / "precious").read_text() == "kept"


FULL = """
import sys
from pathlib import Path
from pear_data.errors import PearError
from pear_data.store.log import Said, StageLog
log = StageLog(Path(sys.argv[1]), "scores/initial")
try:
    while True:
        log.add(Said(event="said", text="x" * 100))
except PearError as error:
    print(error)
"""


def test_a_full_disk_is_said_and_what_fitted_can_be_read(tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "logs/scores/initial.jsonl: File too large" in done.stdout
    assert len(log_path(tmp_path, KEY).read_bytes()) == 1000
    assert set(texts(tmp_path)) == {"x" * 100}


def test_the_schema_has_every_event():
    names = EVENTS.json_schema()["discriminator"]["mapping"]
    assert names.keys() == {"started", "lost", "counting", "said", "noted", "shard", "ended"}
