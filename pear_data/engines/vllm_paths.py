"""The two ways to ask vLLM for the log-probs of given tokens, each a request and the reading of its answer.

- *targets*, vLLM >= 0.32 with its V2 runner: `prompt_logprob_token_ids` from `prompt_logprob_start` on. Only the rows
  asked for go through the output head, 1,024 at a time, and the answer is an array. Prefixes in the cache are read.
- *classic*, any vLLM: `prompt_logprobs=0` for the whole prompt, answered with Python lists. All logits of a step exist
  at once, and vLLM reads no cached prefix for such a request.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from pear_data.engines.vllm_prefixes import Logprobs, Request
from pear_data.errors import UsageError

# Of one step's logits and what is derived from them: vLLM's own profiling of memory does not see these.
LOGITS_BYTES = 2 * 2**30
_BYTES_PER_LOGIT = 12  # the logits, a soft cap's copies or the float32 log-probs
_STEP_TOKENS = 8192
_BLOCK = 128


class ScoringPath(Protocol):
    name: str
    shares_rows: bool  # whether a request may leave out the rows another one computes

    def step_tokens(self, vocab_size: int) -> int:
        """`max_num_batched_tokens`."""
        ...

    def logits_bytes(self, vocab_size: int) -> int:
        """Memory that the logits of a step need and vLLM does not reserve."""
        ...

    def parameters(self, request: Request) -> Any:
        """The `SamplingParams` of a request."""
        ...

    def logprobs(self, output: Any, request: Request) -> Logprobs | None:
        """The log-probs in a `RequestOutput`, shaped as the request's targets; None where vLLM gave none."""
        ...


class Targets:
    name = "targets"
    shares_rows = True

    def step_tokens(self, vocab_size: int) -> int:
        return _STEP_TOKENS

    def logits_bytes(self, vocab_size: int) -> int:
        return 1024 * vocab_size * _BYTES_PER_LOGIT

    def parameters(self, request: Request) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            prompt_logprob_token_ids=request.targets,
            prompt_logprob_start=request.start,
            skip_reading_prefix_cache=not request.read_cache,
        )

    def logprobs(self, output: Any, request: Request) -> Logprobs | None:
        rows: Logprobs | None = output.prompt_token_id_logprobs
        # A prefix found in the cache beyond the first row asked for leaves no rows to score.
        return rows if rows is not None and rows.shape == request.targets.shape else None


class Classic:
    name = "classic"
    shares_rows = False

    def step_tokens(self, vocab_size: int) -> int:
        rows = LOGITS_BYTES // (_BYTES_PER_LOGIT * vocab_size)
        return min(_STEP_TOKENS, max(_BLOCK, rows // _BLOCK * _BLOCK))

    def logits_bytes(self, vocab_size: int) -> int:
        return self.step_tokens(vocab_size) * vocab_size * _BYTES_PER_LOGIT

    def parameters(self, request: Request) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0, flat_logprobs=True
        )

    def logprobs(self, output: Any, request: Request) -> Logprobs | None:
        flat = output.prompt_logprobs
        # One entry per position after the first, which has none: entry r belongs to row r.
        if flat is None or not np.array_equal(flat.token_ids, request.ids[1:]):
            return None
        return np.array(flat.logprobs[request.start :], dtype=np.float32)[:, None]


def targets_available(arguments: dict[str, Any]) -> bool:
    """Whether the installed vLLM takes targets by row and would run its V2 runner with these `vllm.LLM` arguments."""
    from vllm import EngineArgs, SamplingParams

    if "prompt_logprob_start" not in SamplingParams.__annotations__:
        return False
    return bool(EngineArgs(**arguments).create_engine_config().use_v2_model_runner)


def choose_path(path: str, arguments: dict[str, Any]) -> ScoringPath:
    """The path named "targets" or "classic", or for "auto" the better one that runs with these arguments.

    Raises UsageError for another name, and for targets where vLLM does not run them.
    """
    if path not in ("auto", "targets", "classic"):
        raise UsageError(f"path {path}: choose auto, targets or classic")
    if path == "classic":
        return Classic()
    if targets_available(arguments):
        return Targets()
    if path == "targets":
        raise UsageError("path targets: needs vLLM >= 0.32 with its V2 model runner; choose auto or classic")
    return Classic()
