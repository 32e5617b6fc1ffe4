"""Files cut short and single bits flipped: found by `verify` and by whoever reads the file, made again by its stage."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from small_job import OUT, STEPS, STORE, content, make_states

from pear_data import open_store
from pear_data.config import ExportSettings, ScoreSettings, StatsSettings, WeightSettings
from pear_data.errors import MismatchError
from pear_data.progress import Silent
from pear_data.stages.export import export
from pear_data.stages.score import score_policy
from pear_data.stages.verify import verify
from pear_data.stages.weight import weight
from pear_data.store import writable_store
