"""Axolotl on an export: a plugin that carries the weights from the dataset to the loss.

    plugins:
      - pear_data.hooks.axolotl.PearPlugin

Axolotl takes a pre-tokenized dataset with its columns as they are, then drops or ignores those it does not know. The
plugin keeps them in the loader, collates them, counts labels over gradient accumulation and ranks, and attaches the
weighted loss to the model. What would lose a weight on the way is refused when the configuration is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import BasePlugin

from pear_data.loss import PearCollator, attach

_COLUMNS = ("loss_weights", "behavior_logprobs", "sample_id")
_PREPARED = "last_run_prepared"  # Axolotl's own default of dataset_prepared_path

_OTHER_LOSS = "it computes another loss, without the weights: leave it out"
_OTHER_TRAINER = "its trainer does not know of the weights: leave it out"
_OTHER_DATA = "its rows are prepared without the weights: list the export under `datasets`"
_REFUSED = {
    "chunked_cross_entropy": _OTHER_LOSS,
    "cut_cross_entropy": _OTHER_LOSS,
    "liger_cross_entropy": _OTHER_LOSS,
    "liger_fused_linear_cross_entropy": _OTHER_LOSS,
    "orpo_alpha": _OTHER_LOSS,
    "use_eaft": _OTHER_LOSS,
    "kd_trainer": _OTHER_TRAINER,
    "process_reward_model": _OTHER_TRAINER,
    "reward_model": _OTHER_TRAINER,
    "rl": _OTHER_TRAINER,
    "trainer_cls": _OTHER_TRAINER,
    "pretraining_dataset": _OTHER_DATA,
    "streaming": _OTHER_DATA,
    "use_pose": "its position ids would be lost: leave it out",
}
_WHOLE_SEQUENCES = ("context_parallel_size", "sequence_parallel_degree")


class PearPlugin(BasePlugin):  # type: ignore[misc]  # Axolotl has no types
    """Train on `pear-data export --format hf`, padded or, with `sample_packing` or `batch_flattening`, padding-free.

    Reading the configuration raises ValueError, naming the setting, for all that would lose or bypass a weight.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        for name, reason in _REFUSED.items():
            if cfg.get(name):
                raise ValueError(f"{name} does not go with pear_data.hooks.axolotl.PearPlugin: {reason}")
        for name in _WHOLE_SEQUENCES:
            if (cfg.get(name) or 1) > 1:
                raise ValueError(f"{name} splits a sequence, and its weights would stay whole: set it to 1")
        if cfg.get("excess_length_strategy") != "raise":
            raise ValueError(
                "set `excess_length_strategy: raise`: else Axolotl drops samples longer than sequence_len, or cuts "
                "them and not their weights; `pear-data export --max-length` makes them fit"
            )
        cfg["dataset_prepared_path"] = _prepared_path(cfg, _manifests(cfg))

    def get_trainer_cls(self, cfg: Any) -> type[AxolotlTrainer]:
        return PearAxolotlTrainer

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"average_tokens_across_devices": True}

    def get_collator_cls_and_kwargs(
        self, cfg: Any, is_eval: bool = False
    ) -> tuple[type[PearAxolotlCollator], dict[str, Any]]:
        return PearAxolotlCollator, {"padding_free": bool(cfg.sample_packing or cfg.batch_flattening)}

    def post_model_load(self, cfg: Any, model: Any) -> None:
        attach(model)


class PearAxolotlTrainer(AxolotlTrainer):  # type: ignore[misc]
    """AxolotlTrainer that keeps the columns of weights and divides by the labels of the whole step.

    AxolotlTrainer itself takes the mean of each micro-batch and the mean of those.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True

    _signature_columns: list[str]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, *_COLUMNS])]


class PearAxolotlCollator:
    """PearCollator in the signature Axolotl calls, for rows and for the bins of rows of its sample packing."""

    def __init__(
        self, tokenizer: Any, *, padding_free: bool, pad_to_multiple_of: int | None = None, **_padding: Any
    ) -> None:
        self.collator = PearCollator(tokenizer.pad_token_id, padding_free, pad_to_multiple_of)

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        rows = [row for feature in features for row in (feature if isinstance(feature, list) else [feature])]
        return self.collator(rows)


def _manifests(cfg: Mapping[str, Any]) -> list[bytes]:
    """The manifests of the exports that the configuration names.

    Raises ValueError for an export of another format than hf.
    """
    found = []
    for dataset in [*(cfg.get("datasets") or []), *(cfg.get("test_datasets") or [])]:
        path = Path(str(dataset["path"]), "pear_export.json")
        if path.is_file():
            found.append(path.read_bytes())
            name = json.loads(found[-1]).get("format")
            if name != "hf":
                raise ValueError(f"{path.parent} is an export of --format {name}: Axolotl takes --format hf")
    return found


def _prepared_path(cfg: Mapping[str, Any], manifests: list[bytes]) -> str:
    """Where Axolotl keeps prepared datasets: one folder for each state of the exports, as it knows only their paths."""
    exports = hashlib.sha256(b"".join(manifests)).hexdigest()[:16]
    return str(Path(cfg.get("dataset_prepared_path") or _PREPARED, f"pear-{exports}"))
