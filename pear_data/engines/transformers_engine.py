"""Scoring with a transformers model: sorted batches, hidden states, the output head on the rows that need it.

Memory is bounded by one batch's hidden states and one block of logits, whatever the corpus and the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from pear_data.engines.base import OnTokens
from pear_data.engines.batching import (
    check_lengths,
    check_vocabulary,
    needed_tokens,
    spans,
    token_budget_batches,
)
from pear_data.engines.checkpoint import load_config, resolve_max_length, unloadable
from pear_data.engines.dtypes import DTYPES, resolve_dtype
from pear_data.engines.head import BlockedHead, full_logprobs
from pear_data.engines.model_identity import model_identity
from pear_data.engines.self_check import head_reproduces_logits, require_causal
from pear_data.errors import PearError, UsageError
from pear_data.tokens import IntArray, TokenBatch

FORWARD_TOKENS = {"cpu": 2048, "cuda": 16384}  # padded tokens of one forward pass
FORWARDS_PER_BATCH = 16  # so that sorting by length leaves little padding


class TransformersEngine:
    """Log-probs from `AutoModelForCausalLM`, on a CPU or one CUDA device.

    Args:
        model: a local directory or a hub name; safetensors weights only.
        revision: a hub branch, tag or commit.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, bfloat16 on CUDA. The head's logits
            and everything after them are float32 in any case.
        device: "cpu", "cuda", or "auto": CUDA where a device is visible.
        max_length: tokens of the longest sample; default all the positions the model has.
        trust_remote_code: run the code that comes with the model.

    Raises PearError where the model cannot be loaded or is not a causal language model, UsageError for an option
    it cannot take.
    """

    name = "transformers"

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._device = _resolve_device(device)
        self._dtype = resolve_dtype(dtype, self._device)
        config = load_config(model, revision, trust_remote_code)
        self.max_length = resolve_max_length(config, max_length, model)
        self._forward_tokens = FORWARD_TOKENS[self._device]
        self.batch_tokens = self._forward_tokens * FORWARDS_PER_BATCH
        self._model = _load(model, config, revision, DTYPES[self._dtype], trust_remote_code).to(self._device)
        self._source = model_identity(model, revision) | {"trust_remote_code": trust_remote_code}
        self._vocab_size: int = self._model.get_input_embeddings().num_embeddings
        with torch.inference_mode():
            require_causal(self._model, model)
            head = BlockedHead.of(self._model)
            self._head = head if head and head_reproduces_logits(self._model, head) else None

    def identity(self) -> dict[str, str | int | float | bool | None]:
        """See `Engine.identity`; `head` is "blocked", or "model" where only the model's own logits will do."""
        return {
            "engine": self.name,
            "engine_version": transformers.__version__,
            "torch_version": torch.__version__,
            **self._source,
            "dtype": self._dtype,
            "device": self._device,
            "attention": self._model.config._attn_implementation,
            "head": "blocked" if self._head else "model",
        }

    def score(self, batch: TokenBatch, on_tokens: OnTokens) -> npt.NDArray[np.float32]:
        """See `Engine.score`. Raises ValueError also for a token id outside the vocabulary."""
        check_lengths(batch, self.max_length)
        check_vocabulary(batch, self._vocab_size)
        scored_offsets, needed = batch.scored_offsets, needed_tokens(batch)
        logprobs = np.empty(scored_offsets[-1], dtype=np.float32)
        budget = self._forward_tokens if self._head else 1
        with torch.inference_mode():
            for rows in token_budget_batches(needed, budget):
                places = spans(scored_offsets[rows], batch.num_scored[rows])
                logprobs[places] = self._forward(batch.take(rows), needed[rows])
                on_tokens(int(batch.num_tokens[rows].sum()))
        on_tokens(int(batch.num_tokens[needed == 0].sum()))
        return logprobs

    def close(self) -> None:
        """See `Engine.close`; the engine scores nothing afterwards."""
        self._model = self._head = None
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def _forward(self, batch: TokenBatch, needed: IntArray) -> npt.NDArray[np.float32]:
        """Log-probs of the scored tokens of a few samples, from one forward pass over their needed tokens."""
        # Padding stands on the right, where no scored row of a causal model sees it: no mask is needed.
        padded = np.zeros((len(batch), needed[0]), dtype=np.int64)
        inside = np.arange(needed[0]) < needed[:, None]
        padded[inside] = batch.input_ids[spans(batch.offsets[:-1], needed)]
        scored = np.flatnonzero(batch.loss_mask)
        sample = np.repeat(np.arange(len(batch)), batch.num_scored)
        predicting = sample * needed[0] + scored - batch.offsets[sample] - 1

        ids = torch.from_numpy(padded).to(self._device)
        rows = torch.from_numpy(predicting).to(self._device)
        targets = torch.from_numpy(batch.input_ids[scored].astype(np.int64)).to(self._device)
        if self._head:
            hidden = self._model.base_model(input_ids=ids, use_cache=False)[0]
            found = self._head.logprobs(hidden.flatten(0, 1)[rows], targets)
        else:
            logits = self._model(input_ids=ids, use_cache=False).logits
            found = full_logprobs(logits.flatten(0, 1)[rows], targets)
        return found.cpu().numpy()


def _resolve_device(device: str) -> str:
    available = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {device}: choose auto, cpu or cuda")
    if device == "cuda" and not available:
        raise UsageError(
            "device cuda: torch sees no CUDA device; install a CUDA build of torch or choose cpu"
        )
    return ("cuda" if available else "cpu") if device == "auto" else device


def _load(model: str, config: Any, revision: str | None, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    # The scaled-dot-product kernels leave out a soft cap on attention scores (Gemma 2) without a word.
    caps_attention = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    try:
        with _quiet():
            loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
                model,
                revision=revision,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                attn_implementation="eager" if caps_attention else None,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unloadable(model, error) from error
    absent = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if absent:
        raise PearError(
            f"{model}: the checkpoint lacks {len(absent)} weights ({absent[0]}, ...), which would be random; "
            "give a complete causal language model"
        )
    return loaded.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar over the loading of weights: the command shows its own progress."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
