"""No attack on `sql` reads a file, writes one, reaches the network, changes a setting, or takes the machine with it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sql_attacks
from sql_attacks import MEMORY, NETWORK, READ, SECRET, SETTINGS, TIMEOUT, WRITE, attack, prepared

from pear_data.store import open_store
from pear_data.store.views import connect

# One of each kind: of time, of DuckDB's buffers, of what functions make, of the parser, of the result.
BOUNDED = (
    "a recursive CTE without end",
    "generate_series of 1e12",
    "a cross join that is sorted",
    "repeat of 4e9",
    "a list of 1e9",
    "string_agg of gigabytes",
    "a list 10,000 levels deep",
    "list_aggregate of 1e9",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with prepared(tmp_path_factory.mktemp("attacked")) as made:
        yield made


@pytest.mark.parametrize("kind", ["READ", "WRITE", "NETWORK", "SETTINGS"])
def test_every_attack_is_refused_in_one_line(place, kind, capfd):
    before = place.content()
    for name, query in getattr(sql_attacks, kind).items():
        found = attack(place, name, query)
        assert found.refused, f"{name}: {found.said}"
        assert "\n" not in found.said, name
        assert SECRET not in found.said, name
    assert place.content() == before
    assert not place.visited()
    assert capfd.readouterr() == ("", "")


def test_the_settings_stay_and_there_are_enough_attacks(place):
    assert len({*READ.values(), *WRITE.values(), *NETWORK.values(), *SETTINGS.values()}) > 120
    with connect(open_store(place.folder / "store")) as views:
        for query in SETTINGS.values():
            before = views._connection.execute("select name, value from duckdb_settings()").fetchall()
            with pytest.raises(sql_attacks.PearError):
                views.rows(query)
            assert views._connection.execute("select name, value from duckdb_settings()").fetchall() == before


def test_time_and_memory_are_bounded():
    """In a process of its own, whose memory is looked at."""
    command = [sys.executable, str(Path(__file__).parent / "sql_attacks.py"), "--bounded", *BOUNDED]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    found = json.loads(shown)
    assert found["unchanged"]
    assert found["most"] - found["started"] < 5 * MEMORY
    for name, said, refused, _ in found["outcomes"]:
        assert refused, name
        assert "longer than 1 s" in said or "Out of Memory" in said or "depth limit" in said, said


def test_what_does_not_hear_that_it_is_stopped_ends_with_the_process(place):
    store = str(place.folder / "store")
    script = (
        "import pear_data.store.views as views\n"
        "from pear_data.cli import main\n"
        "import sys\n"
        "views.PATIENCE = 0.5\n"
        f"sys.argv = ['pear-data', 'sql', {sql_attacks.BOUNDLESS['levenshtein of long strings']!r}, '--timeout', "
        f"'{TIMEOUT}', '--store', {store!r}, '-o', {str(place.folder / 'out.csv')!r}]\n"
        "main()"
    )
    start = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        "Error: the query ran longer than 1 s, and did not hear that it was stopped: narrow it\n"
    )
    assert time.monotonic() - start < 120
    assert not list(place.folder.glob("out.csv*"))
