"""What the device at hand computes fast."""

from functools import cache
from pathlib import Path

import torch


def device_of(name: str) -> torch.device:
    """For "auto" CUDA, if there is one; else the device of that name, or torch's RuntimeError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        flags = _cpu_flags()
        # Intel's AVX-512 takes as many products a cycle in bfloat16 as in float32, AMD's twice.
        fast = "amx_bf16" in flags or {"avx512_bf16", "AuthenticAMD"} <= flags
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def multiplies_int8(device: torch.device) -> bool:
    """Whether products of int8 matrices are fast and exact.

    torch gives them to oneDNN on CPUs with AVX-512 VNNI alone; elsewhere they are exact but slow.
    """
    return (
        device.type == "cpu"
        and "avx512_vnni" in _cpu_flags()
        and bool(torch.backends.mkldnn.enabled)
        and _int8_is_exact()
    )


@cache
def _int8_is_exact() -> bool:
    """Whether extreme operands give what they should, few rows and many: instructions before VNNI
    would add pairs of products in 16 bits, which may saturate."""
    signs = torch.tensor([1, -1, 1, 1, -1, -1], dtype=torch.int64, device="cpu")
    rows = (127 * signs.repeat(64, 16)).to(torch.int8)
    rows[::2] = -128
    columns = (127 * signs.repeat_interleave(16)[:, None].expand(-1, 64)).to(torch.int8)
    columns[:, ::2] = 127
    try:
        return all(
            torch.equal(
                torch._int_mm(rows[:count], columns).long(), rows[:count].long() @ columns.long()
            )
            for count in (1, 3, len(rows))
        )
    except (AttributeError, RuntimeError):  # a function of torch's that is not public
        return False


@cache
def _cpu_flags() -> frozenset[str]:
    """What Linux says the CPU has, and who made it; empty where it cannot be asked."""
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text().split()) if cpuinfo.exists() else frozenset()
