"""Symbols on a lattice: the code holds, the search finds it, the bits are saved."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vaestream.codec.lattice import CHECKS, GROUP, LatticeRounding, check_parities, groups
from vaestream.codec.priors import scale_of_index
from vaestream.codec.rounding import SQUARED_ERROR_OF_A_BIT
from vaestream.codec.streams import SymbolCoding, TileDecoder, TileEncoder
from vaestream.codec.weights_file import gaussian_tables

TABLES = gaussian_tables()
FIRST = 10


def laplacian_pass(
    rng: np.random.Generator, size: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Residuals, and table indices that fit them, mostly narrow."""
    index = np.minimum(rng.geometric(0.1, size) - 1, 63).astype(np.uint8)
    scale = scale_of_index(torch.from_numpy(index).double()).numpy()
    return rng.laplace(0, scale / np.sqrt(2)).astype(np.float32), index


def on_lattice(
    rounding: LatticeRounding, x: NDArray[np.float32], index: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Symbols of residuals, rounded and put onto the lattice."""
    symbols = np.round(x)
    rounding.apply(x[None], index[None], symbols[None])
    return symbols


def words(symbols: NDArray[np.float32], index: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which members of each group are odd."""
    odd: NDArray[np.bool_] = symbols[groups(index, FIRST)].astype(np.int64) % 2 == 1
    return odd


def test_groups_hold_what_the_tables_say() -> None:
    index = laplacian_pass(np.random.default_rng(0), 5000)[1]
    members = groups(index, FIRST)
    assert members.shape == (int((index >= FIRST).sum()) // GROUP, GROUP)
    assert len(np.unique(members)) == members.size
    in_order = index[members].ravel().astype(int)
    assert (np.diff(in_order) >= 0).all()
    left_over = np.setdiff1d(np.flatnonzero(index >= FIRST), members)
    assert index[left_over].max() <= in_order[0]
    assert not len(groups(index[:FIRST], FIRST)) and not len(groups(index[:0], FIRST))


def test_checks_make_words_of_the_code() -> None:
    """Extended Hamming: an even number of ones, whose places add up to 0 by exclusive or."""
    rng = np.random.default_rng(1)
    members = rng.integers(-9, 10, (200, GROUP)).astype(np.int32)
    members[:, CHECKS] = check_parities(members)
    odd = members % 2 == 1
    assert not (odd.sum(axis=1) % 2).any()
    assert not np.bitwise_xor.reduce(np.where(odd, np.arange(GROUP), 0), axis=1).any()


@pytest.mark.parametrize("seed", range(3))
def test_symbols_land_on_the_lattice_near_what_they_stand_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, index = laplacian_pass(rng, 20000)
    x[:5] = [1e9, -1e7, 0.0, 0.5, -0.5]
    index[:5] = 40
    symbols = on_lattice(LatticeRounding(TABLES, FIRST), x, index)
    odd = words(symbols, index)
    assert len(odd) > 100
    assert np.array_equal(
        odd[:, CHECKS], check_parities(symbols[groups(index, FIRST)].astype(np.int32))
    )
    assert np.abs(symbols - x)[2:].max() < 2
    assert np.abs(symbols[:2] - [2**23, -(2**23)]).max() <= 1
    others = np.setdiff1d(np.arange(len(x)), groups(index, FIRST))
    assert np.array_equal(symbols[others], np.round(x)[others])


@pytest.mark.parametrize(("widest", "excess"), [(63, 0.004), (FIRST + 2, 0.007)])
def test_the_search_is_near_the_best(widest: int, excess: float) -> None:
    """Against the cheapest of all groups whose members are one of the two or three nearest, by
    dynamic programming over the 64 sums. Narrow tables: there a parity is worth less than a bit."""
    rng = np.random.default_rng(5)
    x, index = laplacian_pass(rng, 20000)
    x, index = x[index <= widest], index[index <= widest]
    symbols = on_lattice(LatticeRounding(TABLES, FIRST, strength=1.0), x, index)
    bits = np.stack([t.magnitude_bits for t in TABLES])

    def cost(s: NDArray[np.float32]) -> NDArray[np.float32]:
        spent: NDArray[np.float32] = bits[index, np.minimum(s, 63).astype(int)]
        return spent + (s - np.abs(x)) ** 2 / np.float32(SQUARED_ERROR_OF_A_BIT)

    parity = 2.0 ** -bits.astype(float)
    parity[:, 1:] *= 2
    free = -np.log2(np.stack([parity[:, 0::2].sum(1), parity[:, 1::2].sum(1)], 1))
    lower = np.floor(np.abs(x))
    by_parity = np.empty((len(x), 2))
    around = np.minimum(cost(lower + 1), cost(np.abs(lower - 1)))
    even = lower % 2 == 0
    by_parity[:, 0] = np.where(even, cost(lower), around)
    by_parity[:, 1] = np.where(even, around, cost(lower))
    found = cost(np.abs(symbols))
    spent = best = plain = 0.0
    for members in groups(index, FIRST):
        own = by_parity[members]
        own[list(CHECKS)] -= free[index[members[list(CHECKS)]]]
        sums = np.full(64, np.inf)
        sums[0] = 0
        for place, (zero, one) in enumerate(own):
            sums = np.minimum(sums + zero, sums[np.arange(64) ^ (place + 32)] + one)
        best += sums[0]
        checks = members[list(CHECKS)]
        spent += found[members].sum() - free[index[checks], symbols[checks].astype(int) % 2].sum()
        plain += np.minimum(by_parity[members, 0], by_parity[members, 1]).sum()
    assert best * 0.9999 <= spent < best * (1 + excess)
    if widest == 63:  # the parities that follow are worth more than what it costs to obey
        assert spent < plain


def test_tiles_on_the_lattice_come_back() -> None:
    """Among them groups of which a part is too quiet to be coded, checks that are escapes, and
    passes around the size of a group."""
    rng = np.random.default_rng(2)
    skip = 14
    coding = SymbolCoding(TABLES, FIRST)
    encoder = TileEncoder(coding)
    passes = []
    cut = escaped = 0
    for size in (3000, 31, 32, 33, 0, 8000):
        x, index = laplacian_pass(rng, size)
        if size in (31, 32, 33):
            index[:] = rng.integers(FIRST, 40, size)
        symbols = np.round(x).astype(np.int32)
        symbols[index < skip] = 0
        members = groups(index, FIRST)
        live = index[members] >= skip
        places = members[:, CHECKS]
        symbols[places[live[:, CHECKS]]] += (
            2 * 10**6 * (rng.random(int(live[:, CHECKS].sum())) < 0.1)
        )
        if not live.all():  # where checks are quiet, so is the group but for two pairs
            rows = np.flatnonzero(~live.all(axis=1) & live[:, 28:].all(axis=1))
            quiet = np.flatnonzero(~live.all(axis=1))
            symbols[members[quiet]] = 0
            symbols[members[rows][:, [28, 29, 30, 31]]] = [1, -1, 3, 5]
            cut += len(rows)
        whole = live.all(axis=1)
        parities = check_parities(symbols[members])
        symbols[places[whole]] += (symbols[places[whole]] & 1) ^ parities[whole]
        escaped += int((symbols[places] > 10**6).sum())
        passes.append((symbols, index))
        encoder.add(symbols, index)
    assert cut and escaped
    data = encoder.finish()
    assert data[0] == skip
    decoder = TileDecoder(data, coding)
    for expected, index in passes:
        assert np.array_equal(decoder.take(index), expected)


def test_symbols_beside_the_lattice_are_not_written() -> None:
    encoder = TileEncoder(SymbolCoding(TABLES, FIRST))
    index = np.full(GROUP, FIRST, np.uint8)
    encoder.add((np.arange(GROUP) == 5).astype(np.int32), index)
    with pytest.raises(ValueError, match="lattice"):
        encoder.finish()


def test_the_parities_of_checks_cost_nothing() -> None:
    rng = np.random.default_rng(3)
    x, index = laplacian_pass(rng, 40000)
    rounding = LatticeRounding(TABLES, FIRST)
    symbols = on_lattice(rounding, x, index)
    sizes = []
    for coding in (SymbolCoding(TABLES, FIRST), SymbolCoding(TABLES, len(TABLES))):
        encoder = TileEncoder(coding)
        encoder.add(symbols.astype(np.int32), index)
        sizes.append(8 * len(encoder.finish()))
    free = rounding.free_bits(index[None], symbols[None])
    assert sizes[1] - sizes[0] == pytest.approx(float(free.sum()), rel=0.05)
