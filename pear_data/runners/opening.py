"""From the settings of a policy to a scorer: where its engines run, and how many."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

from pear_data.config import ScoreSettings
from pear_data.engines.selection import engine_arguments, open_engine
from pear_data.resources import resolve
from pear_data.runners.base import Host, OpenEngine
from pear_data.runners.local_host import LocalHost
from pear_data.runners.placement import worker_environments
from pear_data.runners.pool import ScorerPool
from pear_data.runners.supervised import SupervisedScorer

OpenHost = Callable[[], Host]


@contextlib.contextmanager
def open_scorer(
    settings: ScoreSettings, say: Callable[[str], None], note: Callable[[str], None] = lambda line: None
) -> Iterator[ScorerPool]:
    """The engines that `settings` ask for, starting; `ready` waits for them. They are closed at the end.

    Raises:
        UsageError: an engine argument cannot be read, or there are fewer GPUs than asked for.
        PearError: Ray is not installed, or there is no cluster.
    """
    assert settings.model is not None
    engine = partial(
        open_engine,
        settings.engine,
        resolve(settings.model),
        revision=settings.revision,
        dtype=settings.dtype,
        max_length=settings.max_length,
        trust_remote_code=settings.trust_remote_code,
        head_dtype=settings.head_dtype,
        tensor_parallel=settings.tensor_parallel,
        engine_args=engine_arguments(settings.engine_arg),
    )
    with contextlib.ExitStack() as stack:
        hosts = _on_ray(engine, settings, stack) if settings.runner == "ray" else _here(engine, settings)
        pool = ScorerPool([SupervisedScorer(open_host, say, note) for open_host in hosts], say)
        stack.callback(pool.close)
        yield pool


def _here(engine: OpenEngine, settings: ScoreSettings) -> list[OpenHost]:
    return [
        partial(LocalHost, engine, environment)
        for environment in worker_environments(settings.workers, settings.tensor_parallel)
    ]


def _on_ray(engine: OpenEngine, settings: ScoreSettings, stack: contextlib.ExitStack) -> list[OpenHost]:
    from pear_data.runners.ray_host import RayHost, ray_cluster

    resources = stack.enter_context(ray_cluster(settings.ray_address, settings.tensor_parallel))
    return [partial(RayHost, engine, resources)] * settings.workers
