"""An engine that misbehaves on chosen samples, opened in a child process by what stands here."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pear_data.errors import PearError, UsageError
from pear_data.tokens import TokenBatch


def batch_of(count: int) -> TokenBatch:
    """Samples s0, s1, ... of 3 to 7 tokens, the first of each not scored."""
    lengths = np.array([3 + index % 5 for index in range(count)])
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.arange(offsets[-1], dtype=np.int32)
    mask = np.ones(len(ids), dtype=np.bool_)
    mask[offsets[:-1]] = False
    return TokenBatch([f"s{index}" for index in range(count)], ids, mask, offsets)


def logprobs_of(batch: TokenBatch) -> np.ndarray:
    """The log-prob of a token is -(id + its position in the sample / 100)."""
    position = np.arange(len(batch.input_ids)) - np.repeat(batch.offsets[:-1], batch.num_tokens)
    return -(batch.input_ids + position / 100).astype(np.float32)[batch.loss_mask]


@dataclass
class Faulty:
    """Opens itself.

    Args:
        folder: gets the file `opened`, with the process id of every engine that was opened, one a line.
        trouble: sample id -> what happens when it is in a batch, see `happen`.
        everything: what happens with every batch.
        at_start: what happens as the n-th engine opens; nothing behind the end.
        models: the model in the identity of the n-th engine; the last one from there on.
    """

    folder: Path
    trouble: dict[str, str] = field(default_factory=dict)
    everything: str = ""
    at_start: tuple[str, ...] = ()
    models: tuple[str, ...] = ("m",)

    name = "faulty"
    batch_tokens = 10_000
    max_length = 1000

    def __call__(self):
        number = len(opened(self.folder))
        with (self.folder / "opened").open("a") as file:
            file.write(f"{os.getpid()}\n")
        self.happen(self.at_start[number] if number < len(self.at_start) else "")
        self.model = self.models[min(number, len(self.models) - 1)]
        return self, "A faulty engine."

    def identity(self):
        return {"engine": self.name, "model": self.model}

    def score(self, batch, on_tokens):
        on_tokens(1)
        self.happen(self.everything)
        for sample_id in batch.sample_ids:
            self.happen(self.trouble.get(sample_id, ""))
        on_tokens(int(batch.offsets[-1]) - 1)
        found = logprobs_of(batch)
        if "long" in self.trouble:
            return np.append(found, -1)
        return found[:-1] if "short" in self.trouble else found

    def close(self): ...

    def happen(self, what):
        match what:
            case "raise":
                raise RuntimeError("the kernel is broken\nsecond line")
            case "refuse":
                raise ValueError("a token id is outside the vocabulary")
            case "exit":
                print("goodbye", flush=True)
                os._exit(7)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill once":
                if not (self.folder / "killed").exists():
                    (self.folder / "killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            case "no memory":
                raise MemoryError
            case "no cpu memory" | "no gpu memory":
                out_of_memory(what)
            case "dead":
                raise PearError("vLLM stopped scoring with m: EngineDeadError")
            case "usage":
                raise UsageError("--dtype float16: choose another")
            case "hang":
                child = subprocess.Popen(["sleep", "600"])
                (self.folder / "hanging").write_text(str(child.pid))
                time.sleep(600)


def out_of_memory(what):
    """As torch says it on each device; on a CPU it is torch itself."""
    import torch

    if what == "no cpu memory":
        torch.empty(2**50)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def opened(folder: Path) -> list[int]:
    """Process ids of the engines opened so far."""
    file = folder / "opened"
    return [int(line) for line in file.read_text().split()] if file.exists() else []
