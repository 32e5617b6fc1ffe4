"""The two ways to ask vLLM for the log-probs of given tokens, each a request and the reading of its answer.

- *targets*, vLLM >= 0.32 with its V2 runner: `prompt_logprob_token_ids` from `prompt_logprob_start` on. Only the rows
  asked for go through the output head, 1,024 at a time, and the answer is an array.
- *classic*, any vLLM: `prompt_logprobs=0` for the whole prompt, answered with Python lists.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]


class ScoringPath(Protocol):
    name: str
    max_num_batched_tokens: int  # of one step; bounds the memory that vLLM's own profiling does not see

    def parameters(self, ids: Ids, first: int, read_cache: bool) -> Any:
        """`SamplingParams` for the log-probs of `ids[first:]` given what precedes each."""
        ...

    def logprobs(self, output: Any, ids: Ids, first: int) -> Logprobs | None:
        """The log-probs of `ids[first:]` in a `RequestOutput`; None where vLLM gave none."""
        ...


class Targets:
    name = "targets"
    max_num_batched_tokens = 8192

    def parameters(self, ids: Ids, first: int, read_cache: bool) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            prompt_logprob_token_ids=ids[first:, None],
            prompt_logprob_start=first - 1,
            skip_reading_prefix_cache=not read_cache,
        )

    def logprobs(self, output: Any, ids: Ids, first: int) -> Logprobs | None:
        rows = output.prompt_token_id_logprobs
        # A prefix found in the cache beyond the first scored row leaves no rows to score.
        if rows is None or rows.shape != (len(ids) - first, 1):
            return None
        scored: Logprobs = rows[:, 0]
        return scored


class Classic:
    name = "classic"
    # The logits of a step and their float32 copies: about 2 GB at a vocabulary of 152,000.
    max_num_batched_tokens = 1024

    def parameters(self, ids: Ids, first: int, read_cache: bool) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0, flat_logprobs=True
        )

    def logprobs(self, output: Any, ids: Ids, first: int) -> Logprobs | None:
        flat = output.prompt_logprobs
        # One entry per position after the first, which has none: entry i - 1 belongs to position i.
        if flat is None or not np.array_equal(flat.token_ids, ids[1:]):
            return None
        return np.asarray(flat.logprobs[first - 1 :], dtype=np.float32)


def targets_available(arguments: dict[str, Any]) -> bool:
    """Whether the installed vLLM takes targets by row and would run its V2 runner with these `vllm.LLM` arguments."""
    from vllm import EngineArgs, SamplingParams

    if "prompt_logprob_start" not in SamplingParams.__annotations__:
        return False
    return bool(EngineArgs(**arguments).create_engine_config().use_v2_model_runner)
