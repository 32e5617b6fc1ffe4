"""The audit's reference: plain transformers in float32, one sample at a time, sharing no code with the engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import SafetensorError

from pear_data.engines.checkpoint import no_loading_bar
from pear_data.errors import PearError

LOGITS = (
    1 << 29
)  # logits of one forward pass: 2 GiB; a longer sample takes several passes, a block of rows each
WIDE_ROWS = 256  # rows whose logits are widened to float64 at once
ROOM = 1.25  # GPU memory a model needs, relative to its weights, the logits apart


class PlainFloat32:
    """`AutoModelForCausalLM` in float32, on the CUDA device; on the CPU where there is none, or from the first sample
    on that the device has no memory for.

    Raises PearError where the model cannot be loaded in float32.
    """

    def __init__(self, model: str, revision: str | None, trust_remote_code: bool) -> None:
        loaded = _load(model, revision, trust_remote_code)
        weights = sum(tensor.nbytes for tensor in loaded.parameters())
        self._devices = [_device(weights * ROOM + 4 * LOGITS)]
        self._model = loaded.eval().to(self._devices[0])

    @property
    def description(self) -> str:
        """What scored, where it was: "transformers 5.19.0 in float32 on cuda"."""
        return f"transformers {transformers.__version__} in float32 on {', then '.join(self._devices)}"

    def logprobs(
        self, input_ids: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64]:
        """Natural-log probability of each scored token of one sample, in order; log-sum-exp in float64.

        Args:
            input_ids: the sample's tokens, [T].
            loss_mask: which of them are scored, [T]; never the first.
        """
        device = self._devices[-1]
        ids = torch.from_numpy(input_ids.astype(np.int64)).to(device)
        scored = torch.from_numpy(np.flatnonzero(loss_mask)).to(device)
        rows = max(1, LOGITS // self._model.config.get_text_config().vocab_size)
        try:
            with torch.inference_mode(), _no_tf32():
                found = [self._block(ids, block) for block in torch.split(scored, rows)]
            return torch.cat(found).cpu().numpy()
        except torch.OutOfMemoryError:
            if device == "cpu":
                raise
        self._devices.append("cpu")
        self._model.to("cpu")
        return self.logprobs(input_ids, loss_mask)

    def _block(self, ids: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        """Log-probs of a few scored tokens from a pass over the whole sample, float64."""
        logits = self._model(input_ids=ids[None], use_cache=False, logits_to_keep=scored - 1).logits[0]
        targets = ids[scored]
        parts = zip(torch.split(logits, WIDE_ROWS), torch.split(targets, WIDE_ROWS), strict=True)
        return torch.cat(
            [rows.double().log_softmax(-1).gather(1, target[:, None])[:, 0] for rows, target in parts]
        )

    def close(self) -> None:
        """Free the model."""
        self._model = None
        if "cuda" in self._devices:
            torch.cuda.empty_cache()


def _device(needed: float) -> str:
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] >= needed:
        return "cuda"
    return "cpu"


def _load(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(model, **options)
        # Only eager attention applies a soft cap on attention scores (Gemma 2).
        caps = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        with no_loading_bar():
            return transformers.AutoModelForCausalLM.from_pretrained(
                model,
                dtype=torch.float32,
                use_safetensors=True,
                attn_implementation="eager" if caps else None,
                **options,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PearError(
            f"--audit: plain transformers cannot load {model} in float32 ({reason}): score without --audit"
        ) from error


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Products of float32 in float32: TF32 keeps 10 bits of mantissa, which is what an audit is to find."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
