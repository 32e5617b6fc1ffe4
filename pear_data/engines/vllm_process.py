"""Starting and stopping vLLM, quietly: the one place that imports it.

What vLLM writes while it starts, and all that its child process ever writes, goes to an unnamed temporary file, from
which the reason is taken where it fails. VLLM_LOGGING_LEVEL=INFO shows it on the terminal instead.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from pear_data.errors import PearError

# How pydantic words a refusal: the field's name, if one is at fault, and what is wrong.
_INVALID = re.compile(
    r"validation errors? for \w+\n(?:(\S+)\n)?  (?:Value error, )?(.+?)(?: \[type=.*)?$", re.MULTILINE
)
_RAISED = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception): (.+)")  # the last line of a logged traceback
_SEE_LOG = ("Engine core initialization failed", "EngineCore encountered an issue")  # the child logged why
_MEMORY = (
    "--max-length N lowers max_model_len, --tensor-parallel N spreads the model over GPUs, "
    "--engine-arg gpu_memory_utilization=F sets the share of memory used"
)
_ADVICE = (
    (re.compile("max_model_len|KV cache|cache blocks|memory", re.IGNORECASE), _MEMORY),
    (re.compile("head_dtype"), "--head-dtype model runs the head as it is"),
    (re.compile("dtype"), "--dtype sets it"),
)


class VllmProcess:
    """A running `vllm.LLM`, in this process or in a child as VLLM_ENABLE_V1_MULTIPROCESSING says.

    Args:
        model: its name in messages.
        arguments: gives what `vllm.LLM` takes; called when vLLM may be imported.
        environment: variables for vLLM to read; those the user has set stay as they are.

    Raises PearError, with vLLM's reason in one line, where it does not start.
    """

    def __init__(
        self, model: str, arguments: Callable[[], dict[str, Any]], environment: dict[str, str]
    ) -> None:
        self._model = model
        with ExitStack() as undo:
            quiet = not output_is_wanted()
            undo.enter_context(_variables({"VLLM_LOGGING_LEVEL": "ERROR", **environment}))
            self._log = undo.enter_context(tempfile.TemporaryFile())
            with self._failures("cannot start with"), ExitStack() as starting:
                if quiet:
                    starting.enter_context(_output_to(self._log))
                import vllm

                self.llm = vllm.LLM(**arguments())
            undo.callback(self._stop)
            self._undo = undo.pop_all()

    def generate(self, prompts: list[Any], parameters: list[Any]) -> Iterator[tuple[int, Any]]:
        """Each prompt's index and `RequestOutput` as it is finished. Raises PearError where the engine dies."""
        with self._failures("stopped scoring with"):
            engine = self.llm.llm_engine
            identifiers = self.llm.enqueue(prompts, parameters, use_tqdm=False)
            # vLLM adds a random suffix to the ids it hands out, and answers without it.
            index = {identifier.partition("-")[0]: i for i, identifier in enumerate(identifiers)}
            while engine.has_unfinished_requests():
                for output in engine.step():
                    # One that is unknown was left by a call that did not come to its end.
                    if output.finished and output.request_id in index:
                        yield index[output.request_id], output

    def stop(self) -> None:
        """End the engine, and its process where it has one of its own."""
        self._undo.close()

    def _stop(self) -> None:
        from vllm import envs
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        if not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            gc.collect()
            cleanup_dist_env_and_memory()

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except PearError:
            raise
        except Exception as error:
            reason = self._reason(error)
            advice = next((f" ({text})" for pattern, text in _ADVICE if pattern.search(reason)), "")
            raise PearError(f"vLLM {what} {self._model}: {reason}{advice}") from error

    def _reason(self, error: Exception) -> str:
        text = str(error).strip() or type(error).__name__
        if text.startswith(_SEE_LOG):
            self._log.seek(0)
            logged = _RAISED.findall(self._log.read().decode(errors="replace"))
            # A process that waits for others ends with a reference to theirs.
            causes = [line.strip() for line in logged if "root cause" not in line]
            return causes[-1] if causes else text
        invalid = _INVALID.search(text)
        if invalid:
            return ": ".join(part for part in invalid.groups() if part)
        return text.splitlines()[0]


def output_is_wanted() -> bool:
    """Whether somebody wants to see what an engine writes. Importing TRL sets ERROR, which is nobody's wish."""
    return os.environ.get("VLLM_LOGGING_LEVEL", "ERROR").upper() not in ("ERROR", "CRITICAL")


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Set the environment variables that are not set yet; take them back at the end."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _output_to(log: IO[bytes]) -> Iterator[None]:
    """Send what this process and the children it starts write on their standard streams to `log`."""
    saved = {}
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        saved[descriptor] = os.dup(descriptor)
        os.dup2(log.fileno(), descriptor)
    try:
        yield
    finally:
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            os.dup2(saved[descriptor], descriptor)
            os.close(saved[descriptor])
