"""An engine as an actor of a Ray cluster. The supervisor restarts it, not Ray; the store stays with the driver."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

from pear_data.engines.base import OnTokens
from pear_data.errors import PearError
from pear_data.runners.base import EngineLostError, Facts, Floats, OpenEngine
from pear_data.runners.served import ServedEngine, Trouble
from pear_data.tokens import TokenBatch

PLACEMENT_SECONDS = 300.0  # for Ray to find room, which may mean to start a node

_REACHABLE_SECONDS = 10.0

Resources = dict[str, float]


@contextlib.contextmanager
def ray_cluster(address: str | None, gpus: int) -> Iterator[Resources]:
    """Join a running cluster (by default the one RAY_ADDRESS names or Ray finds) and leave it at the end.

    Yields what an actor asks for: `gpus` GPUs where the cluster has any, and a core.

    Raises PearError where Ray is not installed or there is no cluster.
    """
    ray = _imported()
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        _check_reachable(where)
        with _sigterm_kept():
            ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise PearError(
            f"--runner ray: no Ray cluster at {where} ({_first_line(error)}); run `ray start --head`, or give "
            "--ray-address"
        ) from error
    # What befalls workers comes back as errors; Ray would print it besides, on stdout, whatever log_to_driver says.
    ray._private.worker._worker_logs_enabled = False
    try:
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        yield {"num_cpus": 1, "num_gpus": gpus if has_gpus else 0}
    finally:
        ray.shutdown()
        ray._private.worker._worker_logs_enabled = True


class RayHost:
    """A `Host` that is an actor, see `ray_cluster`. The nodes need pear-data, and the model under the same name."""

    def __init__(self, open_engine: OpenEngine, resources: Resources) -> None:
        self._ray = _imported()
        actor = self._ray.remote(ServedEngine).options(
            **resources, scheduling_strategy="SPREAD", max_restarts=0, max_task_retries=0
        )
        self._actor = actor.remote(open_engine)

    def ready(self) -> Facts:
        """See `Host.ready`. Raises PearError also where Ray finds no room for the actor."""
        placed = self._actor.placed.remote()
        if not self._ray.wait([placed], timeout=PLACEMENT_SECONDS)[0]:
            raise PearError(
                f"Ray found no room for a worker within {PLACEMENT_SECONDS:.0f} s: lower --workers or "
                "--tensor-parallel, or add nodes"
            )
        self._get(placed)
        answer = self._get(self._actor.open.remote())
        if isinstance(answer, Trouble):
            answer.raise_at_start()
        facts: Facts = answer
        return facts

    def score(self, batch: TokenBatch, on_tokens: OnTokens) -> Floats:
        """See `Host.score`; nothing is told of the tokens on the way."""
        answer = self._get(self._actor.score.remote(batch))
        if isinstance(answer, Trouble):
            answer.raise_at_work()
        logprobs: Floats = answer
        return logprobs

    def stop(self) -> None:
        """See `Host.stop`. What the engine started ends with its worker process."""
        self._ray.kill(self._actor)

    def _get(self, reference: Any) -> Any:
        with cluster_errors():
            return self._ray.get(reference)


@contextlib.contextmanager
def cluster_errors() -> Iterator[None]:
    """Make Ray's errors ours: a worker that cannot run our code is a PearError, a lost one an EngineLostError."""
    errors = _imported().exceptions
    try:
        yield
    except errors.RayTaskError as error:
        raise PearError(
            f"a Ray worker cannot run pear-data ({_last_line(error)}): install the same pear-data on every node"
        ) from error
    except errors.RayError as error:
        raise EngineLostError(f"Ray lost its worker: {_first_line(error)}") from None


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise PearError("--runner ray: Ray is not installed; run: pip install 'pear-data[ray]'") from None
    return ray


def _check_reachable(address: str) -> None:
    """Raises OSError where nothing listens at HOST:PORT, for which Ray would wait five minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "//" not in host:
        with socket.create_connection((host, int(port)), timeout=_REACHABLE_SECONDS):
            pass


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself and would end an interrupted command as if it had succeeded."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if signal.getsignal(signal.SIGTERM) is not before:
            signal.signal(signal.SIGTERM, before)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
