"""What a benchmark was run on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers


def describe_machine(device: torch.device) -> dict[str, object]:
    """Chip, threads and versions, for the record beside the figures."""
    return {
        "chip": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
