"""The processes of a run, opened through accelerate: what its launcher may decide, and what it may not."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, broadcast_object_list

from t2i_experts.config import TrainingConfig
from t2i_experts.training.checkpoints import checkpoints

PLAIN = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
SAVING_MAY_TAKE = timedelta(hours=2)
PRECISIONS = {"fp32": ("no",), "bf16": ("no", "bf16")}


def open_processes(config: TrainingConfig) -> Accelerator:
    """This process among the others that the launcher started, on its device.

    The launcher says how many processes there are and where; all else is the config's. Raises ValueError for settings of the launcher
    that would change the run behind the config's back, and for a batch that the processes cannot share equally.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in PRECISIONS[config.precision]:
        raise ValueError(
            f"accelerate was launched with mixed precision {launched}, but training.precision={config.precision}; leave it to the config"
        )
    accelerator = Accelerator(
        mixed_precision="no",  # the task casts, and the denoiser alone
        cpu=config.device == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True), InitProcessGroupKwargs(timeout=SAVING_MAY_TAKE)],
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"accelerate was launched with {accelerator.gradient_accumulation_steps} gradient accumulation steps; say training.accumulation"
        )
    if accelerator.distributed_type not in PLAIN:
        raise ValueError(f"accelerate was launched as {accelerator.distributed_type.value}; only data parallelism is supported")
    share = config.accumulation * accelerator.num_processes
    if config.batch_size % share:
        raise ValueError(
            f"training.batch_size={config.batch_size} must be a multiple of accumulation x processes = "
            f"{config.accumulation} x {accelerator.num_processes}"
        )
    return accelerator


def agreed_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint of a run, as the main process sees it; None if there is none.

    Raises ValueError on a process that does not see the same: the output folder must be one that all hosts share.
    """
    newest = [path.name for path in checkpoints(root)[-1:]] or [""]
    broadcast_object_list(newest)
    if not newest[0]:
        return None
    folder = root / "checkpoints" / newest[0]
    if not folder.is_dir():
        raise ValueError(
            f"output={str(root)!r}: the main process goes on from {folder}, which is missing here; all hosts must share the folder"
        )
    return folder
