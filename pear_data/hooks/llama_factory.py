"""LLaMA-Factory v1 on `pear-data export --format messages`: its SFT trainer, whose loss is divided by labels.

    python -m pear_data.hooks.llama_factory config.yaml

LLaMA-Factory divides each micro-batch by the sum of its own weights. A micro-batch of one sample, its default, then
trains as if the sample had no weight.
"""

from __future__ import annotations

from typing import Any

from llamafactory.v1.trainers import sft_trainer
from torch import Tensor

_IGNORED_LABEL = -100


class PearSFTTrainer(sft_trainer.SFTTrainer):  # type: ignore[misc]  # LLaMA-Factory is not checked
    """LLaMA-Factory's trainer on sum(w nll) / number of labels, over the micro-batches and ranks of a step.

    Raises ValueError where sequences are split between ranks (`cp_size`): another loss, out of reach, has the weights.
    """

    def __init__(self, args: Any, **parts: Any) -> None:
        if (args.dist_config or {}).get("cp_size", 1) > 1:
            raise ValueError(
                "dist_config.cp_size splits sequences, and LLaMA-Factory then takes its own loss: set it to 1"
            )
        super().__init__(args=args, **parts)

    def compute_loss(self, batch: dict[str, Any]) -> Tensor:
        """sum(w nll) / labels of a micro-batch; LLaMA-Factory weighs micro-batches by their labels itself."""
        weights = batch["loss_weights"].to(self.device, non_blocking=True)[..., 1:]
        labels = (batch["labels"].to(self.device, non_blocking=True) != _IGNORED_LABEL).sum()
        loss: Tensor = -(self.compute_log_probs(self.model, batch) * weights).sum() / labels.clamp(min=1)
        return loss


def run_sft(args: Any = None) -> None:
    """LLaMA-Factory's `run_sft` with this trainer; `args` as there, by default the command line."""
    sft_trainer.SFTTrainer = PearSFTTrainer
    sft_trainer.run_sft(args)


if __name__ == "__main__":
    run_sft()
