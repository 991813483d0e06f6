"""Entropy-coded streams of a photo: z, whole, and y, a tile at a time."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vaestream.errors import BitstreamError

from .entropy import GroupDecoder, GroupEncoder, Table, TableSet
from .lattice import CHECKS, check_parities, groups


def encode_z(z_hat: NDArray[np.int32], tables: list[Table]) -> bytes:
    """z_hat (hyper, h, w) int32, one table a channel."""
    encoder = GroupEncoder()
    encoder.add(z_hat.reshape(-1), TableSet(tables), _equal_ends(len(tables), z_hat[0].size))
    return encoder.finish()


def decode_z(data: bytes, tables: list[Table], height: int, width: int) -> NDArray[np.int32]:
    """Inverse of `encode_z`: (hyper, height, width) int32."""
    symbols = GroupDecoder(data).take(TableSet(tables), _equal_ends(len(tables), height * width))
    return symbols.reshape(len(tables), height, width)


def tables_of_z(tables: Sequence[Sequence[Table]], quality: float) -> list[Table]:
    """Those of one quality, one a channel, out of those for qualities from 0 to 100."""
    return list(tables[round(quality / 100 * (len(tables) - 1))])


def _equal_ends(groups: int, size: int) -> list[int]:
    return list(range(0, (groups + 1) * size, size))


class SymbolCoding:
    """What the symbols of y are coded with: the table of each index, and which are on a lattice."""

    def __init__(self, tables: Sequence[Table], lattice_from: int) -> None:
        """lattice_from: see `lattice.groups`; as many as there are tables if none are."""
        self.tables = TableSet(tables)
        self.by_parity = TableSet([t.of_parity(odd) for t in tables for odd in (False, True)])
        self.lattice_from = lattice_from

    def split(self, index: NDArray[np.uint8]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The groups of a pass, (n, 32), and where their checks stand, (6 * n,)."""
        members = groups(index, self.lattice_from)
        return members, members[:, CHECKS].ravel()


class TileEncoder:
    """Encodes the symbols of a tile, pass by pass.

    The stream's first byte is the number of tables, from the narrowest, that the tile does not
    use: all its symbols there are zero and are not coded.
    """

    def __init__(self, coding: SymbolCoding) -> None:
        self._coding = coding
        self._skip = len(coding.tables)
        self._passes: list[tuple[NDArray[np.int32], NDArray[np.uint8]]] = []

    def add(self, symbols: NDArray[np.int32], index: NDArray[np.uint8]) -> None:
        """The symbols of the next pass and the table index of each, both flat."""
        self._skip = min(self._skip, int(index[symbols != 0].min(initial=self._skip)))
        self._passes.append((symbols, index))

    def finish(self) -> bytes:
        """The tile's stream."""
        encoder = GroupEncoder()
        coding = self._coding
        for symbols, index in self._passes:
            _, checks = coding.split(index)
            order, ends = _coding_order(index, self._skip, len(coding.tables), without=checks)
            encoder.add(symbols[order], coding.tables, ends)
            if len(checks):
                of_checks = symbols[checks]
                key = _parity_key(index[checks], of_checks)
                order, ends = _coding_order(key, 2 * self._skip, len(coding.by_parity))
                encoder.add(of_checks[order], coding.by_parity, ends)
        return bytes([self._skip]) + encoder.finish()


class TileDecoder:
    """Decodes what `TileEncoder` wrote, pass by pass."""

    def __init__(self, data: bytes, coding: SymbolCoding) -> None:
        """Raises BitstreamError if `data` cannot be a tile's stream; so does `take`."""
        if not data or data[0] > len(coding.tables):
            raise BitstreamError("a tile's stream has no valid first byte")
        self._coding = coding
        self._skip = data[0]
        self._decoder = GroupDecoder(data[1:])

    def take(self, index: NDArray[np.uint8]) -> NDArray[np.int32]:
        """The symbols of the next pass, given the table index of each, both flat."""
        coding = self._coding
        symbols = np.zeros(len(index), np.int32)
        members, checks = coding.split(index)
        order, ends = _coding_order(index, self._skip, len(coding.tables), without=checks)
        symbols[order] = self._decoder.take(coding.tables, ends)
        if len(checks):
            parities = check_parities(symbols[members]).ravel()
            key = _parity_key(index[checks], parities)
            order, ends = _coding_order(key, 2 * self._skip, len(coding.by_parity))
            symbols[checks[order]] = self._decoder.take(coding.by_parity, ends)
        return symbols


def _parity_key(index: NDArray[np.uint8], symbols: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The number, in `SymbolCoding.by_parity`, of the table of each symbol."""
    return (2 * index + (symbols & 1)).astype(np.uint8)


def _coding_order(
    index: NDArray[np.uint8], skip: int, tables: int, without: NDArray[np.intp] | None = None
) -> tuple[NDArray[np.intp], list[int]]:
    """Positions of the coded symbols, by table and within a table as they stand.

    With them, where each table's run begins, and the end of the last: tables + 1 numbers. without:
    positions that are left out.
    """
    chosen = index >= skip
    if without is not None:
        chosen[without] = False
    coded = np.flatnonzero(chosen)
    used = index[coded]
    order = np.argsort(used, kind="stable")  # a radix sort, for bytes
    ends = np.searchsorted(used[order], np.arange(tables + 1))
    return coded[order], ends.tolist()
