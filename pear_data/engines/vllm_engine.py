"""Scoring with vLLM, offline: one request per sample, its prompt up to the last scored token."""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pear_data.engines.base import OnTokens
from pear_data.engines.batching import check_lengths, check_vocabulary, needed_tokens
from pear_data.engines.checkpoint import NO_LIMIT, load_config, resolve_max_length
from pear_data.engines.dtypes import resolve_dtype
from pear_data.engines.model_identity import model_identity
from pear_data.engines.vllm_paths import Classic, Ids, Logprobs, ScoringPath, Targets, targets_available
from pear_data.engines.vllm_process import VllmProcess
from pear_data.errors import PearError, UsageError
from pear_data.tokens import TokenBatch

BATCH_TOKENS = {"cpu": 16_384, "cuda": 262_144}


class VllmEngine:
    """Log-probs from `vllm.LLM`.

    On a GPU vLLM runs in a child process, started by spawning: a script that opens this engine keeps its work under
    `if __name__ == "__main__":`. On a CPU it runs in this process. VLLM_* variables that are set keep their say.

    Args:
        model: a local directory or a hub name; safetensors weights only.
        revision: a hub branch, tag or commit.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, bfloat16 on a GPU.
        max_length: tokens of the longest sample; default all the positions the model has.
        trust_remote_code: run the code that comes with the model.
        path: how log-probs are asked for, see `vllm_paths`: "targets", "classic", or "auto": targets where the
            installed vLLM runs it.

    Raises PearError where vLLM does not start with the model, UsageError for an option it cannot take.
    """

    name = "vllm"

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        trust_remote_code: bool = False,
        path: str = "auto",
    ) -> None:
        config = load_config(model, revision, trust_remote_code)
        self.max_length = resolve_max_length(config, max_length, model)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._dtype = resolve_dtype(dtype, self._device)
        self.batch_tokens = BATCH_TOKENS[self._device]
        self._path: ScoringPath = Classic()

        def arguments() -> dict[str, Any]:
            common = _arguments(model, revision, self._dtype, self.max_length, trust_remote_code)
            self._path = _choose_path(path, common)
            return common | {"max_num_batched_tokens": self._path.max_num_batched_tokens}

        self._process = VllmProcess(model, arguments, _environment(config, self.max_length, self._device))
        model_config = self._process.llm.llm_engine.model_config
        self.max_length = min(self.max_length, model_config.max_model_len - 1)
        self._vocab_size: int = model_config.get_vocab_size()
        self._source = model_identity(model, revision) | {"trust_remote_code": trust_remote_code}

    def identity(self) -> dict[str, str | int | float | bool | None]:
        """See `Engine.identity`; `path` is "targets" or "classic"."""
        import vllm

        return {
            "engine": self.name,
            "engine_version": vllm.__version__,
            "torch_version": version("torch"),
            **self._source,
            "dtype": self._dtype,
            "device": self._device,
            "path": self._path.name,
        }

    def score(self, batch: TokenBatch, on_tokens: OnTokens) -> npt.NDArray[np.float32]:
        """See `Engine.score`. Raises ValueError also for a token id outside the vocabulary, PearError where the
        engine dies or gives a sample no log-probs.
        """
        check_lengths(batch, self.max_length)
        check_vocabulary(batch, self._vocab_size)
        rows = np.flatnonzero(needed_tokens(batch)).tolist()
        found = self._request(batch, rows, read_cache=True)
        found |= self._request(batch, [row for row in rows if not _complete(found[row])], read_cache=False)
        logprobs = np.empty(batch.scored_offsets[-1], dtype=np.float32)
        for row, start, end in zip(
            rows, batch.scored_offsets[rows], batch.scored_offsets[1:][rows], strict=True
        ):
            answer = found[row]
            if answer is None:
                raise PearError(f"vLLM gave no log-probs for sample {batch.sample_ids[row]}")
            logprobs[start:end] = answer
        on_tokens(int(batch.offsets[-1]))
        return logprobs

    def close(self) -> None:
        """See `Engine.close`; the engine scores nothing afterwards."""
        self._process.stop()

    def _request(self, batch: TokenBatch, rows: list[int], read_cache: bool) -> dict[int, Logprobs | None]:
        """Log-probs of the scored tokens of the samples at `rows`, each None where vLLM gave none."""
        asked: dict[int, tuple[Ids, npt.NDArray[np.int64]]] = {}
        for row in rows:
            start, end = batch.offsets[row : row + 2]
            scored = np.flatnonzero(batch.loss_mask[start:end])
            asked[row] = batch.input_ids[start : start + scored[-1] + 1], scored
        prompts = [{"prompt_token_ids": ids.tolist()} for ids, _ in asked.values()]
        parameters = [
            self._path.parameters(ids, int(scored[0]), read_cache) for ids, scored in asked.values()
        ]
        outputs = self._process.generate(prompts, parameters) if asked else []
        found: dict[int, Logprobs | None] = {}
        for (row, (ids, scored)), output in zip(asked.items(), outputs, strict=True):
            logprobs = self._path.logprobs(output, ids, int(scored[0]))
            found[row] = None if logprobs is None else logprobs[scored - scored[0]]
        return found


def _complete(logprobs: Logprobs | None) -> bool:
    return logprobs is not None and bool(np.isfinite(logprobs).all())


def _choose_path(path: str, arguments: dict[str, Any]) -> ScoringPath:
    if path not in ("auto", "targets", "classic"):
        raise UsageError(f"path {path}: choose auto, targets or classic")
    if path == "classic":
        return Classic()
    if targets_available(arguments):
        return Targets()
    if path == "targets":
        raise UsageError("path targets: needs vLLM >= 0.32 with its V2 model runner; choose auto or classic")
    return Classic()


def _arguments(
    model: str, revision: str | None, dtype: str, max_length: int, trust_remote_code: bool
) -> dict[str, Any]:
    return {
        "model": model,
        "revision": revision,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "load_format": "safetensors",
        "skip_tokenizer_init": True,
        # One more than a sample has: vLLM insists on room for a token it never has to process.
        "max_model_len": None if max_length == NO_LIMIT else max_length + 1,
        # Prompts only: graphs and compilation pay for decoding.
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
    }


def _environment(config: Any, max_length: int, device: str) -> dict[str, str]:
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # for the one more; `resolve_max_length` holds the real limit
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would inherit threads and locks of this process
    }
    if device == "cpu":
        variables |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(_kv_cache_gib(config, max_length)),
        }
    return variables


def _kv_cache_gib(config: Any, max_length: int) -> int:
    """GiB that hold the keys and values of one longest sample in float32, at least 1."""
    text = config.get_text_config()
    head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads: int = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    longest = 0 if max_length == NO_LIMIT else max_length
    needed: int = 8 * text.num_hidden_layers * heads * head_dim * longest
    return max(1, math.ceil(needed * 1.1 / 2**30))
