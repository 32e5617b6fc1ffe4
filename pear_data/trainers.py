"""Which export each trainer takes, and which trainers cannot take weights at all."""

from __future__ import annotations

from typing import Final

FORMATS: Final = ("hf", "hf-packed", "verl", "swift", "shifted", "messages")

_TAKES: Final = {
    "transformers": "hf",
    "accelerate": "hf",
    "pytorch": "hf",
    "axolotl": "hf",
    "trl": "hf (or hf-packed)",
    "ms-swift": "swift",
    "levanter": "shifted",
    "tinker": "shifted",
    "llama-factory": "messages, with a sequence-level weighting",
    "llamafactory": "messages, with a sequence-level weighting",
    "nemo-rl": "messages, with a sequence-level weighting",
}

_CANNOT: Final = {
    "slime": "slime casts loss masks to integers",
    "megatron-bridge": "Megatron-Bridge puts loss masks into a LongTensor",
    "areal": "AReaL casts loss masks to booleans",
    "prime-rl": "prime-rl's SFT casts loss masks to booleans",
    "openrlhf": "OpenRLHF reads no weights from a dataset (override SFTDataset.get_loss_mask and train on --format hf)",
    "torchtitan": "torchtitan's loss sees predictions and labels only",
    "megatron-lm": "Megatron-LM divides a float mask by an integer count of it",
}


def format_fault(name: str) -> str | None:
    """Why `name` is no format to export to, and what to give instead; None for one of `FORMATS`."""
    known = name.lower().replace("_", "-")
    if name in FORMATS:
        return None
    if known in _TAKES:
        return f"{name} is a trainer: it takes --format {_TAKES[known]}"
    if known in _CANNOT:
        return (
            f"{_CANNOT[known]}, so every weight would be lost or cut to 0 and 1: train with a trainer that takes "
            "weights (transformers, trl, axolotl, verl, ms-swift, levanter)"
        )
    return f"{name!r} is no format: give one of {', '.join(FORMATS)}"
