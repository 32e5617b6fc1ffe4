"""Scoring: naive, padded, pear-data's transformers engine and vLLM on one model and corpus, side by side.

    python tests/benchmarks/scoring.py                        # CPU, float32, 30M parameters
    python tests/benchmarks/scoring.py --dtype bfloat16
    python tests/benchmarks/scoring.py --shared --samples 64 --methods naive,unshared,ours
                                                              # eight responses to each 500-token prompt
    python tests/benchmarks/scoring.py --device cuda --dtype bfloat16 --model half-b

Every method runs in a process of its own; the rounds are interleaved (A, B, C, A, B, C, ...) and the medians compared.
Peak memory is what a method's first pass adds to its process once the model is loaded. The floor is every matrix
multiplication the scoring cannot avoid, those of attention included, and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
from matmul_floor import matmul_floor, matmul_flops
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pear_data.allocator import keep_freed_memory
from pear_data.engines import packing
from pear_data.engines.batching import spans
from pear_data.tokens import TokenBatch

SIZES = {
    "30m": {
        "vocab_size": 50_257,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "30m-deep": {  # narrower and deeper: more of the time goes to what is not a matrix product
        "vocab_size": 50_257,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "half-b": {  # Qwen2.5-0.5B's shape
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}
PEAK_FLOPS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}  # dense bfloat16
LONGEST = 2048
# Also "unshared": ours with every prompt computed anew.
METHODS = ("naive", "padded8", "ours", "vllm", "floor")
BASELINE = "naive"
Score = Callable[[TokenBatch], "np.ndarray | None"]


def corpus(samples: int, vocab_size: int, shared: bool, seed: int = 1) -> TokenBatch:
    """Lognormal lengths, about 61 % of the tokens scored; or eight responses to each 500-token prompt."""
    random = np.random.default_rng(seed)
    if shared:
        prompts = np.full(samples, 500)
        responses = np.clip(random.lognormal(4.8, 0.6, samples), 1, 1000).astype(int)
    else:
        prompts = np.clip(random.lognormal(4.3, 0.7, samples), 4, LONGEST // 2).astype(int)
        responses = np.clip(random.lognormal(4.6, 0.9, samples), 1, LONGEST // 2).astype(int)
    lengths = prompts + responses
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = random.integers(0, vocab_size, offsets[-1], dtype=np.int32)
    mask = np.ones(offsets[-1], dtype=bool)
    mask[spans(offsets[:-1], prompts)] = False
    if shared:
        for first in range(0, samples, 8):
            prompt = ids[offsets[first] : offsets[first] + 500]
            for row in range(first, min(first + 8, samples)):
                ids[offsets[row] : offsets[row] + 500] = prompt
    return TokenBatch([f"s{row}" for row in range(samples)], ids, mask, offsets)


def _plain(model: Any, batch: TokenBatch, rows_per_batch: int) -> np.ndarray:
    """What scripts do: padded rows in the corpus's order, full float32 logits, log-softmax, gather."""
    import torch

    found = []
    for first in range(0, len(batch), rows_per_batch):
        rows = range(first, min(first + rows_per_batch, len(batch)))
        ids = [
            torch.from_numpy(batch.input_ids[slice(*batch.offsets[r : r + 2])].astype(np.int64)) for r in rows
        ]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)
        attention = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
        logits = model(
            input_ids=padded,
            attention_mask=attention.to(model.device) if len(ids) > 1 else None,
            use_cache=False,
        ).logits[:, :-1]
        exact = logits if logits.dtype == torch.float64 else logits.float()
        logprobs = exact.log_softmax(-1).gather(-1, padded[:, 1:, None])[..., 0].cpu().numpy()
        for place, row in enumerate(rows):
            scored = np.flatnonzero(batch.loss_mask[slice(*batch.offsets[row : row + 2])])
            found.append(logprobs[place, scored - 1])
    return np.concatenate(found)


def _load(folder: str, dtype: str, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    torch.set_grad_enabled(False)
    return model


def _open(method: str, folder: str, dtype: str, device: str, forward_tokens: int | None) -> Score:
    if method in ("naive", "padded8", "exact"):
        # float64 where it is affordable; on a GPU the reference is float32.
        model = _load(
            folder, ("float64" if device == "cpu" else "float32") if method == "exact" else dtype, device
        )
        rows = 8 if method == "padded8" else 1
        return lambda batch: _plain(model, batch, rows)
    if method == "vllm":
        from pear_data.engines.vllm_engine import VllmEngine

        vllm = VllmEngine(folder, dtype=dtype)
        return lambda batch: vllm.score(batch, lambda tokens: None)
    if method == "floor":
        keep_freed_memory()  # as our engine does
        return matmul_floor(folder, dtype, device)
    from pear_data.engines.transformers_engine import TransformersEngine

    engine = TransformersEngine(folder, dtype=dtype, device=device)
    if forward_tokens is not None:
        engine._forward_tokens = forward_tokens
    if method == "unshared":
        packing.LEAST_SHARED = LONGEST + 1
    if method in ("ours", "unshared"):
        return lambda batch: _in_calls(engine, batch)
    raise ValueError(method)


def _in_calls(engine: Any, batch: TokenBatch) -> np.ndarray:
    """As the stage does it: consecutive samples, `engine.batch_tokens` to a call."""
    calls = batch.offsets[1:] // engine.batch_tokens
    edges = [0, *(np.flatnonzero(np.diff(calls)) + 1).tolist(), len(batch)]
    parts = [batch.take(np.arange(a, b)) for a, b in pairwise(edges)]
    return np.concatenate([engine.score(part, lambda tokens: None) for part in parts])


def _worker(pipe: Connection, method: str, threads: int, batch: TokenBatch, *options: Any) -> None:
    import torch

    torch.set_num_threads(threads)
    score = _open(method, *options)
    torch.set_num_threads(threads)
    cuda = options[2] == "cuda"
    before = torch.cuda.memory_allocated() if cuda else _resident("VmRSS")
    pipe.send("ready")
    while pipe.recv() == "run":
        start = time.perf_counter()
        found = score(batch)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
        pipe.send((seconds, peak - before, found))


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


class Runner:
    """One method in its own process."""

    def __init__(self, method: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_worker, args=(theirs, method, *arguments))
        self._process.start()
        theirs.close()
        self.pipe.recv()
        self.seconds: list[float] = []
        self.first = self.run()  # warms up; not among the timed runs

    def run(self) -> tuple[float, int, np.ndarray | None]:
        self.pipe.send("run")
        answer: tuple[float, int, np.ndarray | None] = self.pipe.recv()
        return answer

    def close(self) -> None:
        self.pipe.send("stop")
        self._process.join(60)
        self._process.kill()


def _make_model(folder: Path, size: str, dtype: str) -> str:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**SIZES[size], max_position_embeddings=4096, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.05)  # log-probs that spread over a few nats
    model.to(getattr(torch, dtype)).save_pretrained(folder / size)
    return str(folder / size)


@click.command(help=__doc__)
@click.option("--model", "size", type=click.Choice(list(SIZES)), default="30m", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--samples", default=160, show_default=True)
@click.option("--shared", is_flag=True, help="Eight responses to each 500-token prompt.")
@click.option("--methods", default=",".join(METHODS), show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--forward-tokens", type=int, help="Tokens of a pack, instead of the engine's own choice.")
def main(
    size: str,
    dtype: str,
    device: str,
    samples: int,
    shared: bool,
    methods: str,
    rounds: int,
    threads: int,
    forward_tokens: int | None,
) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    batch = corpus(samples, SIZES[size]["vocab_size"], shared)
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = _make_model(Path(scratch), size, dtype)
        common = (threads, batch, folder, dtype, device, forward_tokens)
        exact = Runner("exact", threads, batch, folder, dtype, device, None)
        reference = exact.first[2]
        exact.close()
        runners = {method: Runner(method, *common) for method in methods.split(",")}
        for _ in track(range(rounds), "rounds", console=Console(stderr=True)):
            for runner in runners.values():
                runner.seconds.append(runner.run()[0])
        for runner in runners.values():
            runner.close()
        flops = matmul_flops(folder, batch)
    scored = int(batch.loss_mask.sum())
    console.print(
        f"{size} {dtype} {device}, {threads} threads: {samples} samples, {batch.offsets[-1]:,} tokens, "
        f"{scored / batch.offsets[-1]:.0%} scored, longest {batch.num_tokens.max():,}; {rounds} rounds"
    )
    console.print(_table(runners, reference, int(batch.offsets[-1])))
    if device == "cuda":
        _utilisation(console, runners, flops)


def _utilisation(console: Console, runners: dict[str, Runner], flops: float) -> None:
    import torch

    name = torch.cuda.get_device_name()
    peak = next((peak for known, peak in PEAK_FLOPS.items() if name.startswith(known)), None)
    for method, runner in runners.items():
        rate = flops / statistics.median(runner.seconds)
        share = f", {rate / peak:.1%} of {name}'s peak" if peak else ""
        console.print(f"{method}: {rate / 1e12:,.1f} TFLOP/s of needed matrix products{share}")


def _table(runners: dict[str, Runner], reference: np.ndarray | None, tokens: int) -> Table:
    table = Table()
    for heading in ("method", "seconds", "tokens/s", f"x {BASELINE}", "x floor", "max error", "extra MiB"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    median = {name: statistics.median(runner.seconds) for name, runner in runners.items()}
    for name, runner in runners.items():
        found = runner.first[2]
        error = "" if found is None or reference is None else f"{np.abs(found - reference).max():.1e}"
        table.add_row(
            name,
            f"{median[name]:.2f}",
            f"{tokens / median[name]:,.0f}",
            f"{median[BASELINE] / median[name]:.2f}" if BASELINE in median else "",
            f"{median['floor'] / median[name]:.2f}" if "floor" in median else "",
            error,
            f"{runner.first[1] / 2**20:,.0f}",
        )
    return table


if __name__ == "__main__":
    main()
