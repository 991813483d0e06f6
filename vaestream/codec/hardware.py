"""What the device at hand computes fast."""

from functools import cache
from pathlib import Path

import torch

_INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        fast = not _cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16"})
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def multiplies_int8(device: torch.device) -> bool:
    """Whether products of int8 matrices are fast and exact.

    Older instructions add pairs of products in 16 bits, which may saturate. So the CPU must have
    the newer ones, and the library must be seen to use them.
    """
    return device.type == "cpu" and _cpu_multiplies_int8()


@cache
def _cpu_multiplies_int8() -> bool:
    if _cpu_flags().isdisjoint(_INT8_FLAGS) or not torch._C._has_mkldnn:
        return False
    signs = torch.tensor([1, -1, 1, 1, -1, -1], dtype=torch.int64)
    rows = (127 * signs.repeat(64, 16)).to(torch.int8)
    rows[::2] = -128
    columns = (127 * signs.repeat_interleave(16)[:, None].expand(-1, 64)).to(torch.int8)
    columns[:, ::2] = 127
    product = torch._int_mm(rows, columns.contiguous())
    return torch.equal(product.long(), rows.long() @ columns.long())


@cache
def _cpu_flags() -> frozenset[str]:
    """What Linux says the CPU has; empty where it cannot be asked."""
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text().split()) if cpuinfo.exists() else frozenset()
