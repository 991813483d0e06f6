"""Symbols on a lattice: thirty-two at a time, whose parities are a word of a code.

Latents that are rounded one by one fill their space with cubes. Cells that are rounder leave less
error for the same bits. Here 32 symbols make a group, and only those groups exist whose odd members
sit where a word of the extended Hamming code [32, 26, 4] has its ones (construction A). So six
members have a parity that follows from the other 26 and costs no bits; the decoder reads these six
from tables of one parity. The encoder looks for the cheapest group that exists.

Symbols that hardly ever leave zero take no part: their parities would save little.

Sources: Conway and Sloane, "Voronoi regions of lattices, second moments of polytopes, and
quantization", IEEE Trans. Information Theory 28, 1982; Clare et al., "Sign bit hiding", JCTVC-G271,
2011 (one parity of many symbols, in HEVC).
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .entropy import MAGNITUDES, Table
from .rounding import SQUARED_ERROR_OF_A_BIT

SEARCH_STRENGTH = 0.85
"""What part of a bit's worth in squared error (`SQUARED_ERROR_OF_A_BIT`) counts in the search."""

GROUP = 32
CHECKS = (15, 23, 27, 29, 30, 31)
"""The members of a group whose parity follows from that of the others."""

_LARGEST = np.float32(2**23)
"""float32 knows odd and even up to its double."""

_Entry = TypeVar("_Entry", bound=np.generic)

_PLACES = np.arange(GROUP, dtype=np.uint8)
_SYNDROME = (_PLACES + GROUP).astype(np.uint8)
"""What an odd symbol adds, by exclusive or: its place, and 32. Words of the code add up to 0."""


def _check_matrix() -> NDArray[np.float32]:
    """(32, 6): which members of a group each of the checks sums up."""
    bits = (_PLACES[:, None] >> np.arange(5)[::-1]) & 1
    # The place of each check but the last lacks one bit.
    matrix = np.column_stack([1 - bits, bits.sum(axis=1) % 2])
    matrix[list(CHECKS)] = 0
    return matrix.astype(np.float32)


_CHECK_MATRIX = _check_matrix()


def in_groups(ordered: NDArray[_Entry]) -> NDArray[_Entry]:
    """What belongs to symbols on the lattice, (m,), in the order of their tables, as (n, 32): a
    view. The first few are left over if 32 does not divide m."""
    return ordered[len(ordered) % GROUP :].reshape(-1, GROUP)


def checks_among(first: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """How many checks are among the first few of `count` symbols on the lattice, in the order of
    their tables; none among the first 0 and fewer."""
    whole, rest = np.divmod(np.maximum(0, first - count % GROUP), GROUP)
    return whole * len(CHECKS) + np.searchsorted(CHECKS, rest)


def by_table(index: NDArray[np.uint8], first: int) -> tuple[NDArray[np.intp], NDArray[np.uint8]]:
    """Positions of the symbols with tables from `first` on, by table and within a table as they
    stand; and the tables of those, as they stand."""
    chosen = np.flatnonzero(index >= first)
    used = index[chosen]
    order = np.argsort(used, kind="stable")  # a radix sort, for bytes
    return chosen[order], used


def groups(index: NDArray[np.uint8], first: int) -> NDArray[np.intp]:
    """(n, 32): the groups of a pass, given the table index of each of its symbols: where they
    stand.

    Symbols with tables from `first` on, in the order of their tables, else as they stand, are
    grouped by `in_groups`.
    """
    return in_groups(by_table(index, first)[0])


def check_parities(members: NDArray[np.int32]) -> NDArray[np.uint8]:
    """(n, 6): the parities of the checks of groups, (n, 32); what stands in the place of checks
    does not count."""
    odd = (members & 1).astype(np.float32)
    sums = (odd @ _CHECK_MATRIX).astype(np.uint8)
    return sums & np.uint8(1)


class LatticeRounding:
    """Finds points of the lattice that are cheap in bits and in error."""

    def __init__(
        self, tables: Sequence[Table], first: int, strength: float = SEARCH_STRENGTH
    ) -> None:
        """tables: counted, one a table index. first: see `groups`. strength: see
        `SEARCH_STRENGTH`."""
        self._first = first
        bits = np.stack([table.magnitude_bits for table in tables])
        self._worth = np.float32(1 / (strength * SQUARED_ERROR_OF_A_BIT))
        self._bits = bits.ravel()
        mass = 2.0 ** -bits.astype(np.float64)
        mass[:, 1:] *= 2
        parity = np.stack([mass[:, 0::2].sum(1), mass[:, 1::2].sum(1)], axis=1)
        self._parity_bits = -np.log2(parity / parity.sum(1, keepdims=True)).astype(np.float32)

    def apply(
        self, residual: NDArray[np.float32], index: NDArray[np.uint8], symbols: NDArray[np.float32]
    ) -> None:
        """Give the members of groups the symbols of a cheap point of the lattice.

        residual: what is to be coded, in steps. symbols: changed in place; what stands there is
        kept outside groups. All (tiles, n), a pass of each tile; a tile has groups of its own.
        """
        for tile in zip(residual, index, symbols, strict=True):
            self._apply(*tile)

    def _apply(
        self, residual: NDArray[np.float32], index: NDArray[np.uint8], symbols: NDArray[np.float32]
    ) -> None:
        members = groups(index, self._first)
        if not len(members):
            return
        x, table = residual[members], index[members].astype(np.intp)
        magnitude = np.minimum(np.abs(x), _LARGEST)
        lower = np.floor(magnitude)
        cost = self._cost(magnitude, lower, table)
        # The cheaper neighbour has the other parity.
        above = self._cost(magnitude, lower + 1, table)
        below = self._cost(magnitude, np.abs(lower - 1), table)
        other = np.where(below < above, np.abs(lower - 1), lower + 1)
        excess = np.minimum(above, below) - cost
        odd = (lower.astype(np.int32) & 1).astype(bool)
        saved = self._parity_bits[table[:, CHECKS]]
        even_saves_more = saved[..., 0] - saved[..., 1]
        excess[:, CHECKS] += np.where(odd[:, CHECKS], -even_saves_more, even_saves_more)
        moved = excess < 0
        _mend(np.abs(excess), moved, odd)
        symbols[members] = np.copysign(np.where(moved, other, lower), x)

    def free_bits(
        self, index: NDArray[np.uint8], symbols: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """The bits of the parities that follow from others, which are not spent; 0 but for checks.
        All (tiles, n), as in `apply`."""
        free = np.zeros(symbols.shape, np.float32)
        for of_tile, tile_index, tile_symbols in zip(free, index, symbols, strict=True):
            checks = groups(tile_index, self._first)[:, CHECKS]
            parities = tile_symbols[checks].astype(np.int32) & 1
            of_tile[checks] = self._parity_bits[tile_index[checks], parities]
        return free

    def _cost(
        self, magnitude: NDArray[np.float32], symbol: NDArray[np.float32], table: NDArray[np.intp]
    ) -> NDArray[np.float32]:
        """Bits, and what the error is worth in bits."""
        cell = table * MAGNITUDES + np.minimum(symbol, MAGNITUDES - 1).astype(np.intp)
        cost: NDArray[np.float32] = self._bits[cell]
        error = magnitude - symbol
        cost += error * error * self._worth
        return cost


def _mend(price: NDArray[np.float32], moved: NDArray[np.bool_], odd: NDArray[np.bool_]) -> None:
    """Change `moved` where the parities are no word of the code: the cheapest change of up to two
    members, or of three that hold the cheapest one. All (n, 32); a member that is moved changes
    its parity, price is what changing `moved` costs."""
    syndrome = np.bitwise_xor.reduce((odd ^ moved) * _SYNDROME, axis=1)
    # An odd number of members has to change: the one the syndrome names, or the cheapest and two.
    rows = np.flatnonzero(syndrome >= GROUP)
    named = syndrome[rows] - GROUP
    cheapest = price[rows].argmin(axis=1)
    rest = price[rows]
    np.put_along_axis(rest, cheapest[:, None], np.inf, axis=1)
    first, second, pair = _cheapest_pair(rest, named ^ cheapest.astype(np.uint8))
    three = np.take_along_axis(price[rows], cheapest[:, None], 1)[:, 0] + pair
    one = np.take_along_axis(price[rows], named[:, None].astype(np.intp), 1)[:, 0]
    better = (three < one) & (named != cheapest)
    moved[rows[~better], named[~better]] ^= True
    for chosen in (cheapest, first, second):
        moved[rows[better], chosen[better]] ^= True
    # An even number of them: two.
    rows = np.flatnonzero((syndrome > 0) & (syndrome < GROUP))
    first, second, _ = _cheapest_pair(price[rows], syndrome[rows])
    moved[rows, first] ^= True
    moved[rows, second] ^= True


def _cheapest_pair(
    price: NDArray[np.float32], difference: NDArray[np.uint8]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """The two members, (n,) each, whose places differ by this, by exclusive or, and what they cost
    together."""
    partner = (_PLACES[None] ^ difference[:, None]).astype(np.intp)
    both = price + np.take_along_axis(price, partner, 1)
    first = both.argmin(axis=1)
    rows = np.arange(len(price))
    return first, partner[rows, first], both[rows, first]
