"""What live weights add to a training step: forward and backward of a small real transformer, on a CPU.

The same model, batch and loss, with weights that are there and with weights from the model's own log-probs (blocks of
four, the default, and whole sequences), in turn, in one process. The share is the median of the rounds' own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from pear_data.loss.fused import linear_logprobs, linear_weighted_nll
from pear_data.loss.live import LivePear, LiveWeightsOfRows
from pear_data.loss.nll import weighted_nll

SEQUENCES, LENGTH, PROMPT = 2, 256, 48
MODEL = {
    "vocab_size": 32_768,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
BLOCK, SEQUENCE = LivePear(), LivePear(level="sequence")
TARGET = 0.02


@dataclass(frozen=True)
class Batch:
    """`targets`, `weights`, `behavior` [B, L]: at the index of the hidden state that predicts the token."""

    ids: Tensor
    targets: Tensor
    weights: Tensor
    behavior: Tensor
    denom: int

    @property
    def scored(self) -> Tensor:
        return self.targets != -100


LossOfHidden = Callable[[Tensor, Tensor, Batch], Tensor]


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(MODEL["vocab_size"], (SEQUENCES, LENGTH), generator=generator)
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    targets[:, :PROMPT] = -100
    weights = torch.randn(ids.shape, generator=generator).exp()
    behavior = torch.randn(ids.shape, generator=generator) * 0.3 - 10
    return Batch(ids, targets, weights, behavior, int((targets != -100).sum()))


def _full(settings: LivePear | None) -> LossOfHidden:
    def loss(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
        logits = F.linear(hidden, head).float().flatten(0, 1)
        logprobs = -F.cross_entropy(logits, batch.targets.flatten(), reduction="none").view_as(batch.targets)
        weights = batch.weights
        if settings is not None:
            weights = settings.weights(logprobs.detach(), batch.behavior, batch.scored)
        return weighted_nll(logprobs, weights, batch.scored, denom=batch.denom)

    return loss


def _fused(settings: LivePear | None) -> LossOfHidden:
    def loss(hidden: Tensor, head: Tensor, batch: Batch) -> Tensor:
        weights: Tensor | LiveWeightsOfRows = batch.weights
        if settings is not None and settings.level == "sequence":
            logprobs = linear_logprobs(hidden, head, batch.targets)
            weights = settings.weights(logprobs, batch.behavior, batch.scored)
        elif settings is not None:
            weights = LiveWeightsOfRows(settings, batch.behavior, batch.scored)
        return linear_weighted_nll(hidden, head, batch.targets, weights, denom=batch.denom)

    return loss


LOSSES = {
    ("full logits", "frozen"): _full(None),
    ("full logits", "live, blocks"): _full(BLOCK),
    ("full logits", "live, sequences"): _full(SEQUENCE),
    ("fused", "frozen"): _fused(None),
    ("fused", "live, blocks"): _fused(BLOCK),
    ("fused", "live, sequences"): _fused(SEQUENCE),
}


def print_live_overhead(console: Console, threads: int, rounds: int = 9) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**MODEL, max_position_embeddings=LENGTH, tie_word_embeddings=True))
    batch = _batch()
    seconds: dict[tuple[str, str], list[float]] = {kind: [] for kind in LOSSES}
    for number in track(range(rounds + 1), "rounds", console=Console(stderr=True), transient=True):
        for kind, loss in LOSSES.items():
            spent = _step(model, loss, batch)
            if number:  # the first one warms up
                seconds[kind].append(spent)
    parameters = sum(one.numel() for one in model.parameters())
    console.print(
        f"\nlive weights, cpu, float32: a step of a transformer with {parameters / 1e6:.0f}M parameters on "
        f"{SEQUENCES} x {LENGTH} tokens; {threads} thread{'s' if threads > 1 else ''}, {rounds} rounds"
    )
    console.print(_table(seconds))


def _step(model: Qwen2ForCausalLM, loss: LossOfHidden, batch: Batch) -> float:
    """Seconds of forward and backward."""
    model.zero_grad()
    start = time.perf_counter()
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    loss(hidden, model.lm_head.weight, batch).backward()
    return time.perf_counter() - start


def _table(seconds: dict[tuple[str, str], list[float]]) -> Table:
    table = Table()
    for heading in ("loss", "weights", "seconds", f"over frozen (target for blocks {TARGET:.0%})"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for (path, weights), spent in seconds.items():
        added = statistics.median(a / b for a, b in zip(spent, seconds[path, "frozen"], strict=True)) - 1
        table.add_row(
            path,
            weights,
            f"{statistics.median(spent):.3f}",
            "" if weights == "frozen" else f"{added:+.1%}",
        )
    return table


if __name__ == "__main__":
    print_live_overhead(Console(width=120), 1)
