"""What a CPU says of itself decides in which dtype the networks compute."""

import pytest
import torch

from vaestream.codec import hardware


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"GenuineIntel", "avx2"}, torch.float32),
        ({"GenuineIntel", "avx2", "avx512_bf16"}, torch.float32),
        ({"GenuineIntel", "avx2", "avx512_bf16", "amx_bf16"}, torch.bfloat16),
        ({"AuthenticAMD", "avx2"}, torch.float32),
        ({"AuthenticAMD", "avx2", "avx512_bf16"}, torch.bfloat16),
        (set(), torch.float32),
    ],
)
def test_bfloat16_is_chosen_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: frozenset(flags))
    assert hardware.best_dtype(torch.device("cpu")) == dtype
