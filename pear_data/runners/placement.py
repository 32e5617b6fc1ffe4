"""Which GPUs and how many threads each local worker gets, as environment variables read before torch is loaded."""

from __future__ import annotations

import os

from pear_data.errors import UsageError

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_THREADS = "OMP_NUM_THREADS"


def worker_environments(workers: int, tensor_parallel: int) -> list[dict[str, str]]:
    """The variables of each of `workers` engines that take `tensor_parallel` GPUs each.

    A single engine on one GPU or none is left as it is. Where there is no GPU, several share the cores.

    Raises UsageError where the GPUs do not suffice.
    """
    wanted = workers * tensor_parallel
    if wanted == 1:
        return [{}]
    gpus = _visible_gpus()
    if len(gpus) < wanted and (gpus or tensor_parallel > 1):
        raise UsageError(
            f"--workers {workers} with --tensor-parallel {tensor_parallel} takes {wanted} GPUs and {len(gpus)} are "
            "visible: lower one of them"
        )
    threads = {} if _THREADS in os.environ else {_THREADS: str(max(1, _cores() // workers))}
    if not gpus:
        return [threads] * workers
    shares = [gpus[first : first + tensor_parallel] for first in range(0, wanted, tensor_parallel)]
    return [threads | {_VISIBLE: ",".join(share)} for share in shares]


def _visible_gpus() -> list[str]:
    chosen = os.environ.get(_VISIBLE)
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _cores() -> int:
    return len(os.sched_getaffinity(0))
