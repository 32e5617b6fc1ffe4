"""Scoring with vLLM, offline: one request per sample, its prompt up to the last scored token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pear_data.engines.base import OnTokens
from pear_data.engines.batching import check_lengths, check_vocabulary
from pear_data.engines.checkpoint import load_config, resolve_max_length
from pear_data.engines.model_identity import model_identity
from pear_data.engines.vllm_arguments import (
    FIXED,
    check_engine_args,
    check_rope,
    environment,
    max_model_len,
    memory_arguments,
    model_dtype,
    recorded,
    with_head_dtype,
)
from pear_data.engines.vllm_paths import Classic, ScoringPath, choose_path
from pear_data.engines.vllm_prefixes import Logprobs, PrefixTree, Request
from pear_data.engines.vllm_process import VllmProcess
from pear_data.errors import PearError, UsageError
from pear_data.tokens import TokenBatch

BATCH_TOKENS = {"cpu": 16_384, "cuda": 262_144}


class VllmEngine:
    """Log-probs from `vllm.LLM`.

    On a GPU vLLM runs in a child process, started by spawning: a script that opens this engine keeps its work under
    `if __name__ == "__main__":`. On a CPU it runs in this process. VLLM_* variables that are set keep their say.

    Args:
        model: a local directory or a hub name; safetensors weights only, quantised ones as vLLM knows them.
        revision: a hub branch, tag or commit.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, bfloat16 on a GPU; for a quantised
            model what vLLM takes from the checkpoint.
        head_dtype: "model", or "float32" for an output head in float32 on top of a 16-bit model.
        max_length: tokens of the longest sample; default all the positions the model has.
        trust_remote_code: run the code that comes with the model.
        tensor_parallel: GPUs that share one copy of the model.
        engine_args: more arguments for `vllm.LLM`, over the ones chosen here.
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
        head_dtype: str = "model",
        max_length: int | None = None,
        trust_remote_code: bool = False,
        tensor_parallel: int = 1,
        engine_args: Mapping[str, Any] | None = None,
        path: str = "auto",
    ) -> None:
        given = engine_args or {}
        config = load_config(model, revision, trust_remote_code)
        self.max_length = resolve_max_length(config, max_length, model)
        check_rope(config, self.max_length, model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and tensor_parallel > torch.cuda.device_count():
            raise UsageError(
                f"--tensor-parallel {tensor_parallel}: visible GPUs: {torch.cuda.device_count()}"
            )
        self.batch_tokens = BATCH_TOKENS[device]
        self._path: ScoringPath = Classic()
        common = {
            "model": model,
            "revision": revision,
            "dtype": model_dtype(dtype, device, config, given),
            "trust_remote_code": trust_remote_code,
            "tensor_parallel_size": tensor_parallel,
            "max_model_len": max_model_len(self.max_length),
        }

        def arguments() -> dict[str, Any]:
            check_engine_args(given)
            chosen = FIXED | common | with_head_dtype(given, head_dtype)
            self._path = choose_path(path, chosen)
            return memory_arguments(self._path, config.get_text_config().vocab_size, chosen, device)

        self._process = VllmProcess(model, arguments, environment(config, self.max_length, device, given))
        running = self._process.llm.llm_engine.model_config
        self.max_length = min(self.max_length, running.max_model_len - 1)
        self._vocab_size: int = running.get_vocab_size()
        self._identity: dict[str, str | int | float | bool | None] = {
            **model_identity(model, revision),
            "trust_remote_code": trust_remote_code,
            "dtype": str(running.dtype).removeprefix("torch."),
            "head_dtype": head_dtype,
            "quantization": running.quantization,
            "device": device,
            "tensor_parallel": tensor_parallel,
            "path": self._path.name,
            **recorded(given),
        }
        self._try_out()

    def identity(self) -> dict[str, str | int | float | bool | None]:
        """See `Engine.identity`; `path` is "targets" or "classic", `quantization` vLLM's name of the method."""
        import vllm

        return {
            "engine": self.name,
            "engine_version": vllm.__version__,
            "torch_version": version("torch"),
            **self._identity,
        }

    def score(self, batch: TokenBatch, on_tokens: OnTokens) -> npt.NDArray[np.float32]:
        """See `Engine.score`. Raises ValueError also for a token id outside the vocabulary, PearError where the
        engine dies or gives a sample no log-probs.
        """
        check_lengths(batch, self.max_length)
        check_vocabulary(batch, self._vocab_size)
        rows = np.flatnonzero(batch.num_scored).tolist()
        samples, scored = [], []
        for row in rows:
            start, end = batch.offsets[row : row + 2]
            scored.append(np.flatnonzero(batch.loss_mask[start:end]))
            samples.append(batch.input_ids[start : start + scored[-1][-1] + 1])
        tree = PrefixTree(samples, [int(at[0]) for at in scored], share=self._path.shares_rows)
        lengths = {i: int(batch.num_tokens[rows[i]]) for i in tree.requests}
        on_tokens(int(batch.offsets[-1]) - sum(lengths.values()))
        answers = self._answers(tree.requests, lengths, on_tokens, [batch.sample_ids[row] for row in rows])
        found = [values[at - at[0]] for values, at in zip(tree.logprobs(answers), scored, strict=True)]
        return np.concatenate([np.empty(0, dtype=np.float32), *found])

    def close(self) -> None:
        """See `Engine.close`; the engine scores nothing afterwards."""
        self._process.stop()

    def _try_out(self) -> None:
        """Score two tokens: a kernel that refuses the model's numbers says so at its first request only."""
        ids, scored = np.array([0, 1], dtype=np.int32), np.array([False, True])
        try:
            self.score(TokenBatch(["start-up"], ids, scored, np.array([0, 2])), lambda tokens: None)
        except PearError:
            self.close()
            raise

    def _answers(
        self, requests: dict[int, Request], lengths: dict[int, int], on_tokens: OnTokens, names: list[str]
    ) -> dict[int, Logprobs]:
        """The answer to each request; one that is missing or not finite is asked for again without the cache."""
        answers: dict[int, Logprobs] = {}
        pending = requests
        for read_cache in (True, False):
            for i, request, answer in self._ask(pending, read_cache):
                if answer is not None and (not read_cache or _finite(answer, request)):
                    answers[i] = answer
                    on_tokens(lengths[i])
            pending = {i: request for i, request in pending.items() if i not in answers}
        for i in pending:
            raise PearError(f"vLLM gave no log-probs for sample {names[i]}; try --engine transformers")
        return answers

    def _ask(
        self, requests: dict[int, Request], read_cache: bool
    ) -> Iterator[tuple[int, Request, Logprobs | None]]:
        """The answers as they come, None where vLLM gave none."""
        asked = [
            (i, request if read_cache else replace(request, read_cache=False))
            for i, request in requests.items()
        ]
        prompts = [{"prompt_token_ids": request.ids.tolist()} for _, request in asked]
        parameters = [self._path.parameters(request) for _, request in asked]
        for position, output in self._process.generate(prompts, parameters):
            i, request = asked[position]
            yield i, request, self._path.logprobs(output, request)


def _finite(answer: Logprobs, request: Request) -> bool:
    return bool(np.isfinite(answer[request.targets >= 0]).all())
