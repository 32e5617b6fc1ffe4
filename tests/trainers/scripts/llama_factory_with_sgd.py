"""Trainings of LLaMA-Factory v1 with SGD, one after another: `llama_factory_with_sgd.py JOBS`, JSON.

A job is a configuration and whether pear-data's trainer takes the place of LLaMA-Factory's. Optimizers are plugins of
LLaMA-Factory; it brings none but AdamW.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from llamafactory.v1.accelerator import helper
from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin
from llamafactory.v1.trainers import sft_trainer

from pear_data.hooks import llama_factory


@OptimizerPlugin("sgd").register()
def sgd(model: torch.nn.Module, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=config["lr"])


helper.synchronize = lambda: None  # several CPU ranks have no accelerator to wait for
stock = sft_trainer.SFTTrainer
for settings, hooked in json.loads(Path(sys.argv[1]).read_text()):
    sft_trainer.SFTTrainer = stock
    (llama_factory.run_sft if hooked else sft_trainer.run_sft)(settings)
