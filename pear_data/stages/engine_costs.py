"""What an engine's ways mean for the plan: how many tokens go through a model at once, and the memory that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pear_data.engines.head import ROW_BLOCK, VOCAB_BLOCK
from pear_data.engines.transformers_engine import FORWARD_TOKENS
from pear_data.engines.vllm_paths import Classic, ScoringPath, Targets
from pear_data.stages.model_size import Counts, Flops, ModelSize

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PATHS: dict[str, ScoringPath] = {path.name: path for path in (Targets(), Classic())}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU, or in the memory of a CPU."""

    weights: int
    activations: int  # of one layer of a forward pass
    logits: int
    kv_longest: int  # keys and values of the longest sample; 0 where the engine keeps none

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.logits + self.kv_longest


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """How the engine of this identity (`Engine.identity`) goes about a model of this size."""

    identity: Mapping[str, Any]
    size: ModelSize

    @property
    def forward_tokens(self) -> int:
        """Tokens of one forward pass."""
        if self._path is None:
            return FORWARD_TOKENS[self._device]
        given = self.identity.get("engine_arg.max_num_batched_tokens")
        return int(given or self._path.step_tokens(self.size.vocabulary))

    def flops(self, num_tokens: Counts, num_scored: Counts) -> Flops:
        """FLOPs of samples with these tokens and scored tokens, [n] each."""
        return self.size.flops(num_tokens, num_tokens if self._head_on_every_token else num_scored)

    def memory(self, longest: int, tensor_parallel: int) -> Memory:
        """Memory for samples of up to `longest` tokens, on each of the GPUs that share a copy of the model."""
        width = BYTES[self.identity["dtype"]]
        # vLLM cuts long samples into chunks, transformers runs them whole.
        tokens = self.forward_tokens if self._path else max(self.forward_tokens, longest)
        return Memory(
            weights=width * self.size.parameters // tensor_parallel,
            activations=width * self.size.activation_entries(tokens),
            logits=self._logits(tokens, width),
            kv_longest=width * self.size.kv_entries * longest // tensor_parallel if self._path else 0,
        )

    def _logits(self, tokens: int, width: int) -> int:
        vocabulary = self.size.vocabulary
        if self._path is not None:
            return self._path.logits_bytes(vocabulary)
        if self._head_on_every_token:
            return (4 + width) * tokens * vocabulary  # as the model makes them, and in float32
        return 4 * ROW_BLOCK[self._device] * min(VOCAB_BLOCK[self._device], vocabulary)

    @property
    def _device(self) -> str:
        return str(self.identity["device"])

    @property
    def _path(self) -> ScoringPath | None:
        """How vLLM is asked; None for transformers."""
        return _PATHS[self.identity["path"]] if self.identity["engine"] == "vllm" else None

    @property
    def _head_on_every_token(self) -> bool:
        return isinstance(self._path, Classic) or self.identity.get("head") == "model"
