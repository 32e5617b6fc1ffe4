"""Makes what stands beside the tests importable, here and in child processes; long loops run only where asked for."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(config, items):
    if "kill_loop" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("kill_loop")]
    items[:] = [item for item in items if item not in long]
    config.hook.pytest_deselected(items=long)
