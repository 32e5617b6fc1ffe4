"""Scoring with a transformers model: packs of tokens, hidden states, the output head on the rows that need it.

Memory is bounded by one pack's hidden states and one block of logits, whatever the corpus and the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import SafetensorError

from pear_data.allocator import keep_freed_memory
from pear_data.engines.base import OnTokens
from pear_data.engines.batching import (
    check_lengths,
    check_vocabulary,
    needed_tokens,
    spans,
    token_budget_batches,
)
from pear_data.engines.checkpoint import (
    load_config,
    no_loading_bar,
    resolve_max_length,
    rope_switch,
    unloadable,
)
from pear_data.engines.dtypes import DTYPES, resolve_dtype
from pear_data.engines.head import BlockedHead, full_logprobs
from pear_data.engines.model_identity import model_identity
from pear_data.engines.packed_attention import Layout, packed
from pear_data.engines.packing import Pack, distinct_rows, fill_packs, lay_out, shared_prefix_groups
from pear_data.engines.self_check import head_reproduces_logits, require_causal, use_packed_attention
from pear_data.errors import PearError, UsageError
from pear_data.tokens import IntArray, TokenBatch

FORWARD_TOKENS = {"cpu": 1024, "cuda": 16384}  # of one forward pass
FORWARDS_PER_BATCH = 32  # so that packs fill well, and responses to one prompt meet
_NOT_PACKED = "The model's attention cannot be packed, so samples of like length are padded to one."

Floats = npt.NDArray[np.float32]


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

    `remark` says in a sentence where the model does not allow the fast way, "" where it does.

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
        if self._device == "cpu":
            keep_freed_memory()
        self._dtype = resolve_dtype(dtype, self._device)
        config = load_config(model, revision, trust_remote_code)
        self.max_length = resolve_max_length(config, max_length, model)
        self._rope_switch = rope_switch(config)
        self._forward_tokens = FORWARD_TOKENS[self._device]
        self.batch_tokens = self._forward_tokens * FORWARDS_PER_BATCH
        self._model = _load(model, config, revision, DTYPES[self._dtype], trust_remote_code).to(self._device)
        self._source = model_identity(model, revision) | {"trust_remote_code": trust_remote_code}
        self._vocab_size: int = self._model.get_input_embeddings().num_embeddings
        with torch.inference_mode():
            require_causal(self._model, model)
            head = BlockedHead.of(self._model)
            self._head = head if head and head_reproduces_logits(self._model, head) else None
            self._packs = self._head is not None and use_packed_attention(self._model)
        self.remark = "" if self._packs else _NOT_PACKED

    def identity(self) -> dict[str, str | int | float | bool | None]:
        """See `Engine.identity`; `head` is "blocked", or "model" where only the model's own logits will do.

        `attention` is "packed", or the name of the model's own.
        """
        return {
            "engine": self.name,
            "engine_version": transformers.__version__,
            "torch_version": torch.__version__,
            **self._source,
            "dtype": self._dtype,
            "device": self._device,
            "attention": "packed" if self._packs else self._model.config._attn_implementation,
            "head": "blocked" if self._head else "model",
        }

    def score(self, batch: TokenBatch, on_tokens: OnTokens) -> Floats:
        """See `Engine.score`. Raises ValueError also for a token id outside the vocabulary."""
        check_lengths(batch, self.max_length)
        check_vocabulary(batch, self._vocab_size)
        first, same_as = distinct_rows(batch)
        distinct = batch.take(first)
        needed = needed_tokens(distinct)
        logprobs = np.empty(distinct.scored_offsets[-1], dtype=np.float32)
        share = np.bincount(same_as) * distinct.num_tokens  # of the batch's tokens, by distinct row
        with torch.inference_mode():
            for part in self._parts(distinct, needed):
                run = self._packed if self._packs else self._padded
                for rows, found in run(distinct, part):
                    logprobs[spans(distinct.scored_offsets[rows], distinct.num_scored[rows])] = found
                    on_tokens(int(share[rows].sum()))
        on_tokens(int(share[needed == 0].sum()))
        return logprobs[spans(distinct.scored_offsets[same_as], distinct.num_scored[same_as])]

    def close(self) -> None:
        """See `Engine.close`; the engine scores nothing afterwards."""
        self._model = self._head = None
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def _parts(self, batch: TokenBatch, needed: IntArray) -> Iterator[IntArray]:
        """`needed` of the samples that may share a forward pass, 0 for the others.

        LongRoPE encodes every position of a pass as its longest sample asks for, so long samples run whole, and apart.
        """
        if self._rope_switch is None:
            yield needed
            return
        long = batch.num_tokens > self._rope_switch
        yield np.where(long, 0, needed)
        yield np.where(long & (needed > 0), batch.num_tokens, 0)

    def _packed(self, batch: TokenBatch, needed: IntArray) -> Iterator[tuple[IntArray, Floats]]:
        """Rows and the log-probs of their scored tokens, a few packs at a time."""
        waiting: list[tuple[Pack, torch.Tensor]] = []
        groups = shared_prefix_groups(batch, needed, self._forward_tokens)
        for members in fill_packs(groups, self._forward_tokens):
            pack = lay_out(batch, needed, members)
            waiting.append((pack, self._predicting_rows(pack)))
            # The head reads all its weights for every block of rows, so it waits for full ones.
            if sum(len(hidden) for _, hidden in waiting) >= self._forward_tokens:
                yield self._finish(waiting)
                waiting = []
        if waiting:
            yield self._finish(waiting)

    def _predicting_rows(self, pack: Pack) -> torch.Tensor:
        """Hidden states of the rows that predict the pack's targets, [targets, hidden]."""
        with packed(Layout.of(pack, self._device)):
            hidden: torch.Tensor = self._model.base_model(
                input_ids=self._tensor(pack.input_ids[None]),
                position_ids=self._tensor(pack.positions[None]),
                use_cache=False,
            )[0][0]
        return hidden[self._tensor(pack.predicting)]

    def _finish(self, waiting: Sequence[tuple[Pack, torch.Tensor]]) -> tuple[IntArray, Floats]:
        assert self._head is not None
        targets = self._tensor(np.concatenate([pack.targets for pack, _ in waiting]))
        found = self._head.logprobs(torch.cat([hidden for _, hidden in waiting]), targets)
        return np.concatenate([pack.rows for pack, _ in waiting]), found.cpu().numpy()

    def _padded(self, batch: TokenBatch, needed: IntArray) -> Iterator[tuple[IntArray, Floats]]:
        """The same for models whose attention cannot be packed: samples of like length, padded on the right.

        No scored row of a causal model sees that padding, so no mask is needed.
        """
        for rows in token_budget_batches(needed, self._forward_tokens if self._head else 1):
            part, width = batch.take(rows), int(needed[rows[0]])
            padded = np.zeros((len(rows), width), dtype=np.int64)
            inside = np.arange(width) < needed[rows][:, None]
            padded[inside] = part.input_ids[spans(part.offsets[:-1], needed[rows])]
            scored = np.flatnonzero(part.loss_mask)
            sample = np.repeat(np.arange(len(rows)), part.num_scored)
            predicting = self._tensor(sample * width + scored - part.offsets[sample] - 1)
            targets = self._tensor(part.input_ids[scored].astype(np.int64))
            ids = self._tensor(padded)
            if self._head:
                hidden = self._model.base_model(input_ids=ids, use_cache=False)[0]
                found = self._head.logprobs(hidden.flatten(0, 1)[predicting], targets)
            else:
                logits = self._model(input_ids=ids, use_cache=False).logits
                found = full_logprobs(logits.flatten(0, 1)[predicting], targets)
            yield rows, found.cpu().numpy()

    def _tensor(self, values: IntArray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)


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
        with no_loading_bar():
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
