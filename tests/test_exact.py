"""The integer scale branch gives the same table indices whatever surrounds it."""

import numpy as np
import pytest
import torch

from vaestream.codec.config import ModelConfig
from vaestream.codec.exact import ExactScaleBranch, magnitudes
from vaestream.codec.hardware import multiplies_int8
from vaestream.codec.scale_branch import ScaleBranch
from vaestream.errors import WeightsError

DTYPES = [torch.float32, torch.float64]
if multiplies_int8(torch.device("cpu")):
    DTYPES.append(torch.int8)


@pytest.fixture(scope="module")
def branch() -> ScaleBranch:
    """Weights over the whole int8 range, so that sums come near the limit."""
    torch.manual_seed(0)
    branch = ScaleBranch(
        ModelConfig(latent=40, hyper=24, scale_width=24, groups=(8, 32), scale_context_width=24)
    )
    with torch.no_grad():
        for layer in branch.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.weight.uniform_(-2, 2)
                if layer.bias is not None:
                    layer.bias.uniform_(-20, 20)
    return branch


def indices(branch: ScaleBranch, z: torch.Tensor, dtype: torch.dtype | None = None) -> np.ndarray:
    """Of all passes, one after the other."""
    exact = ExactScaleBranch(branch.integer_layers(), torch.device("cpu"), dtype)
    features = exact.features(z)
    known = magnitudes(symbols(*features.shape[:2]))
    return np.concatenate(
        [
            exact.indices(number, features[None], known[None, :, :, : p.known])[0].numpy()
            for number, p in enumerate(branch.passes)
        ],
        axis=2,
    )


def symbols(rows: int, columns: int) -> torch.Tensor:
    """What the contexts see: mostly small, and some beyond what they tell apart."""
    generator = torch.Generator().manual_seed(2)
    return torch.round(torch.randn((rows, columns, 8), generator=generator) * 8)


def hyper_latents(rows: int = 9, columns: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-255, 256, (1, 24, rows, columns), generator=generator, dtype=torch.int32)


def test_whatever_it_computes_in_gives_the_same(branch: ScaleBranch) -> None:
    z = hyper_latents()
    reference = indices(branch, z, torch.int64)
    for dtype in DTYPES:
        assert np.array_equal(indices(branch, z, dtype), reference)
    # Exact on any CPU, if slow, without the library whose instructions may not be.
    with torch.backends.mkldnn.flags(enabled=False):
        assert np.array_equal(indices(branch, z, torch.int8), reference)
    assert reference.min() == 0 and reference.max() == 63  # the pattern reaches both clamps


def test_training_simulates_what_coding_computes(branch: ScaleBranch) -> None:
    z = hyper_latents()
    features = branch.features(z)
    known = symbols(*features.shape[-2:]).permute(2, 0, 1)[None]
    simulated = torch.cat(
        [
            branch.index(number, features, known[:, : p.known] if p.known else None)
            for number, p in enumerate(branch.passes)
        ],
        dim=1,
    )
    assert np.array_equal(simulated[0].permute(1, 2, 0).detach().numpy(), indices(branch, z))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_flags_threads_and_autocast_change_nothing(
    branch: ScaleBranch, dtype: torch.dtype | None
) -> None:
    z = hyper_latents(40, 30)
    expected = indices(branch, z, dtype)
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    try:
        for flag in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(flag)
            assert np.array_equal(indices(branch, z, dtype), expected)
        torch.set_num_threads(2)
        with torch.autocast("cpu", torch.bfloat16):
            assert np.array_equal(indices(branch, z, dtype), expected)
        with torch.backends.mkldnn.flags(enabled=False):
            assert np.array_equal(indices(branch, z, dtype), expected)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


def test_a_part_of_the_features_gives_that_part_of_the_indices(branch: ScaleBranch) -> None:
    exact = ExactScaleBranch(branch.integer_layers(), torch.device("cpu"))
    features = exact.features(hyper_latents())
    whole = exact.indices(0, features[None])
    assert torch.equal(exact.indices(0, features[None, 5:13, 7:8]), whole[:, 5:13, 7:8])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pass_that_codes_some_places_computes_the_same_there(
    branch: ScaleBranch, dtype: torch.dtype
) -> None:
    """Rows and columns may be odd in number, and too few for every grid."""
    cpu = torch.device("cpu")
    reference = ExactScaleBranch(branch.integer_layers(), cpu, torch.int64)
    exact = ExactScaleBranch(branch.integer_layers(), cpu, dtype)
    features = exact.features(hyper_latents())
    for rows, columns in ((9, 14), (1, 3), (1, 1)):
        part = features[None, :rows, :columns]
        known = magnitudes(symbols(rows, columns))[None]
        for number, p in enumerate(branch.passes):
            context = known[..., : p.known] if p.known else None
            whole = reference.indices(number, part, context)
            own = exact.indices(number, part, context, p.grids())
            mask = p.mask(rows, columns, part.device)
            if mask is None:
                assert torch.equal(own, whole)
            else:
                assert torch.equal(own[:, mask], whole[:, mask])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_magnitudes_hold_for_the_smallest_integers(dtype: torch.dtype) -> None:
    least = torch.iinfo(dtype).min
    values = [least, least + 1, -16, -15, -3, 0, 14, 15, 16, -(least + 1)]
    expected = [15, 15, 15, 15, 3, 0, 14, 15, 15, 15]
    assert magnitudes(torch.tensor(values, dtype=dtype)).tolist() == expected
    assert magnitudes(torch.tensor(values, dtype=torch.float32)).tolist() == expected


def test_sums_that_float32_cannot_count_are_refused() -> None:
    branch = ScaleBranch(ModelConfig(latent=4, hyper=96, scale_width=4))
    with torch.no_grad():
        branch.up1.weight.fill_(2.0)  # 255 * 864 * 127 is beyond 2**24
    with pytest.raises(ValueError, match=r"2\*\*24"):
        branch.integer_layers()


def test_wrong_arithmetic_is_noticed_when_a_model_loads(branch: ScaleBranch) -> None:
    layers = branch.integer_layers()
    answer = ExactScaleBranch(layers, torch.device("cpu"), torch.int64).answer()
    exact = ExactScaleBranch(layers, torch.device("cpu"))
    exact.self_test(answer)
    with pytest.raises(WeightsError, match="integer arithmetic"):
        exact.self_test(answer ^ 1)


@pytest.mark.parametrize("steps", [(3,), (4, 1), (0, 2)])
def test_a_config_with_impossible_steps_is_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="steps"):
        ModelConfig(latent=40, groups=(8, 32), steps=steps)
