"""The number types a model can be run in."""

from __future__ import annotations

import torch

from pear_data.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = {"cpu": "float32", "cuda": "bfloat16"}


def resolve_dtype(requested: str, device: str) -> str:
    """A name in DTYPES for `requested`, "auto" being the one for the device. Raises UsageError for another name."""
    if requested != "auto" and requested not in DTYPES:
        raise UsageError(f"--dtype {requested}: choose auto, {', '.join(DTYPES)}")
    return AUTO[device] if requested == "auto" else requested
