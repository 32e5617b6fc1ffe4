"""verl's own SFT trainer on a CPU: `verl_on_cpu.py OVERRIDES`, as `python -m verl.trainer.sft_trainer OVERRIDES`.

verl knows accelerators only. Here its extension points get a platform for CPUs, and its FSDP engine is registered for
it; the trainer, the engine, the loss and the collator are verl's.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import torch
import verl
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def nothing(*_arguments: Any, **_named: Any) -> int:
    return 0


@PlatformRegistry.register(platform="cpu")
class Cpu(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = SimpleNamespace(
        **vars(torch.cpu),
        empty_cache=nothing,
        memory_allocated=nothing,
        memory_reserved=nothing,
        max_memory_allocated=nothing,
        max_memory_reserved=nothing,
        mem_get_info=lambda *_: (0, 0),
        get_device_name=lambda *_: "cpu",
    )
    synchronize = set_device = set_allocator_settings = empty_cache = profiler_start = profiler_stop = nothing

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


@hydra.main(
    config_path=str(Path(verl.__file__).parent / "trainer" / "config"),
    config_name="sft_trainer_engine",
    version_base=None,
)
def main(config: Any) -> None:
    # verl reads its platform when these are imported.
    from verl.trainer.sft_trainer import SFTTrainer
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device="cpu")(
        FSDPEngineWithLMHead
    )
    # As verl's run_sft, which would ask for two backends of the one device.
    torch.distributed.init_process_group("gloo")
    SFTTrainer(config).fit()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
