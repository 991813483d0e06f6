"""The integer scale branch gives the same table indices whatever surrounds it."""

import numpy as np
import pytest
import torch

from vaestream.codec import Codec
from vaestream.codec.exact import ExactScaleBranch, known_answer
from vaestream.codec.hyperprior import ModelConfig, ScaleBranch
from vaestream.errors import WeightsError


@pytest.fixture(scope="module")
def branch() -> ScaleBranch:
    """Weights over the whole int8 range, so that sums come near the limit."""
    torch.manual_seed(0)
    branch = ScaleBranch(ModelConfig(latent=40, hyper=24, scale_width=24))
    with torch.no_grad():
        for layer in (branch.up1, branch.up2, branch.project):
            layer.weight.uniform_(-2, 2)
            assert layer.bias is not None
            layer.bias.uniform_(-20, 20)
    return branch


def indices(branch: ScaleBranch, z: torch.Tensor, dtype: torch.dtype = torch.float32) -> np.ndarray:
    exact = ExactScaleBranch(branch.integer_layers(), torch.device("cpu"))
    exact._set_dtype(dtype)
    return exact.indices(exact.features(z)).numpy()


def hyper_latents(rows: int = 9, columns: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-255, 256, (1, 24, rows, columns), generator=generator, dtype=torch.int32)


def test_float32_float64_and_integers_agree(branch: ScaleBranch) -> None:
    exact = ExactScaleBranch(branch.integer_layers(), torch.device("cpu"))
    exact.self_test(known_answer(branch))  # against 64-bit integers
    z = hyper_latents()
    single = indices(branch, z)
    assert np.array_equal(single, indices(branch, z, torch.float64))
    assert single.min() == 0 and single.max() == 63  # the pattern reaches both clamps


def test_training_simulates_what_coding_computes(branch: ScaleBranch) -> None:
    z = hyper_latents()
    simulated = branch(z.float())[0].permute(1, 2, 0).detach().numpy()
    assert np.array_equal(simulated, indices(branch, z))


def test_flags_threads_and_autocast_change_nothing(branch: ScaleBranch) -> None:
    z = hyper_latents(40, 30)
    expected = indices(branch, z)
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    try:
        for flag in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(flag)
            assert np.array_equal(indices(branch, z), expected)
        torch.set_num_threads(2)
        with torch.autocast("cpu", torch.bfloat16):
            assert np.array_equal(indices(branch, z), expected)
        with torch.backends.mkldnn.flags(enabled=False):
            assert np.array_equal(indices(branch, z), expected)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


def test_a_part_of_the_features_gives_that_part_of_the_indices(branch: ScaleBranch) -> None:
    exact = ExactScaleBranch(branch.integer_layers(), torch.device("cpu"))
    features = exact.features(hyper_latents())
    whole = exact.indices(features)
    assert torch.equal(exact.indices(features[5:13, 7:8]), whole[5:13, 7:8])


def test_sums_that_float32_cannot_count_are_refused() -> None:
    branch = ScaleBranch(ModelConfig(latent=4, hyper=96, scale_width=4))
    with torch.no_grad():
        branch.up1.weight.fill_(2.0)  # 255 * 864 * 127 is beyond 2**24
    with pytest.raises(ValueError, match=r"2\*\*24"):
        branch.integer_layers()


def test_wrong_arithmetic_is_noticed_when_a_model_loads(codec: Codec, branch: ScaleBranch) -> None:
    exact = ExactScaleBranch(branch.integer_layers(), torch.device("cpu"))
    with pytest.raises(WeightsError, match="integer arithmetic"):
        exact.self_test(known_answer(branch) ^ 1)
