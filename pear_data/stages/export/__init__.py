"""Weighted datasets for external trainers, in the layouts they take.

run.py         the stage: what goes out, in which order; folder.py, files.py: where it lands
selection.py   --where and the splits; rows.py: samples as flat arrays; packing.py
formats.py     what a format is; tables.py (hf, hf-packed, verl), swift.py, shifted.py, messages.py (jsonl.py)
reread.py      --check, with check.py's rules; manifest.py, totals.py: pear_export.json and the last line; live.py
"""

from pear_data.stages.export.manifest import ExportManifest
from pear_data.stages.export.reread import check_export
from pear_data.stages.export.run import export

__all__ = ["ExportManifest", "check_export", "export"]
