"""What live weights add to a training step: forward and backward of a small real transformer, attached, on a CPU.

Copies of one model on one batch, with frozen weights and with live ones (blocks of four, the default, whole sequences,
and blocks with one of the two samples negative, whose weight is its sequence's), in turn, in one process. The share is
the median of the rounds' own; of it, what the arithmetic of the weights takes is also measured by itself, because it is
less than the noise of a busy machine.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from pear_data.loss import LivePear, LiveWeightsOfRows, attach

SEQUENCES, LENGTH, PROMPT = 2, 256, 48
MODEL = {
    "vocab_size": 32_768,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
NEGATIVES = "live, a negative"
WEIGHTS = {
    "frozen": None,
    "live, blocks": LivePear(),
    "live, sequences": LivePear(level="sequence"),
    NEGATIVES: LivePear(negative_scale=0.5),
}
LOSSES = ("full logits", "fused")
TARGET = 0.02

Kind = tuple[str, str]


class WeightsClock:
    """Seconds spent in live weights themselves, once their classes are watched."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for owner, name in (
            (LivePear, "weights"),
            (LiveWeightsOfRows, "__init__"),
            (LiveWeightsOfRows, "__call__"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Any) -> Any:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(MODEL["vocab_size"], (SEQUENCES, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    weights = torch.randn(ids.shape, generator=generator).exp().masked_fill(labels == -100, 0.0)
    behavior = torch.randn(ids.shape, generator=generator) * 0.3 - 10
    return {"input_ids": ids, "labels": labels, "loss_weights": weights, "behavior_logprobs": behavior}


def print_live_overhead(console: Console, threads: int, rounds: int = 7) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**MODEL, max_position_embeddings=LENGTH, tie_word_embeddings=True))
    models = {
        (loss, name): attach(copy.deepcopy(model), fused=loss == "fused", live=live)
        for loss in LOSSES
        for name, live in WEIGHTS.items()
    }
    clock, batch = WeightsClock(), _batch()
    sign = torch.tensor([-1.0, 1.0])[:, None]
    with_a_negative = batch | {"loss_weights": batch["loss_weights"] * sign}
    seconds: dict[Kind, list[float]] = {kind: [] for kind in models}
    of_weights: dict[Kind, list[float]] = {kind: [] for kind in models}
    for number in track(range(rounds + 1), "rounds", console=Console(stderr=True), transient=True):
        for kind, attached in models.items():
            clock.seconds = 0.0
            spent = _step(attached, with_a_negative if kind[1] == NEGATIVES else batch)
            if number:  # the first one warms up
                seconds[kind].append(spent)
                of_weights[kind].append(clock.seconds)
    parameters = sum(one.numel() for one in model.parameters())
    console.print(
        f"\nlive weights, cpu, float32: a step of a transformer with {parameters / 1e6:.0f}M parameters on "
        f"{SEQUENCES} x {LENGTH} tokens; {threads} thread{'s' if threads > 1 else ''}, {rounds} rounds"
    )
    console.print(_table(seconds, of_weights))
    console.print(f"target for each: {TARGET:.0%} of a step")


def _step(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of forward and backward."""
    model.zero_grad()
    start = time.perf_counter()
    model(**batch, use_cache=False).loss.backward()
    return time.perf_counter() - start


def _table(seconds: dict[Kind, list[float]], of_weights: dict[Kind, list[float]]) -> Table:
    table = Table()
    for heading in ("loss", "weights", "seconds", "over frozen", "the weights themselves"):
        table.add_column(heading, justify="left" if heading in ("loss", "weights") else "right")
    for kind, spent in seconds.items():
        loss, weights = kind
        shares = ["", ""]
        if weights != "frozen":
            frozen = seconds[loss, "frozen"]
            added = statistics.median(a / b for a, b in zip(spent, frozen, strict=True)) - 1
            themselves = statistics.median(a / b for a, b in zip(of_weights[kind], frozen, strict=True))
            shares = [f"{added:+.1%}", f"{themselves:.1%}"]
        table.add_row(loss, weights, f"{statistics.median(spent):.3f}", *shares)
    return table
