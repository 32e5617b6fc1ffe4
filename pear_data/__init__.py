"""pear-data: offline importance weighting of SFT corpora (PEAR, arXiv 2602.01058).

The public face is small and imported lazily, so that `import pear_data` costs nothing:

    importance_weights(target, behavior, lengths, ...)   the weighting kernels on flat log-probs
    open_store(path)                                     a store made by the commands
    loss                                                 the training hook (imports torch)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pear_data import loss
    from pear_data.store import Store, open_store
    from pear_data.weighting import importance_weights

__version__ = "0.1.0"
__all__ = ["Store", "__version__", "importance_weights", "loss", "open_store"]

_HOME_OF = {
    "Store": "pear_data.store",
    "importance_weights": "pear_data.weighting",
    "open_store": "pear_data.store",
}


def __getattr__(name: str) -> Any:
    if name == "loss":
        return importlib.import_module("pear_data.loss")
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'pear_data' has no attribute {name!r}")
