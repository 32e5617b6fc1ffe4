"""Makes the engines in `faulty_engines` importable, here and in the child processes that run them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
