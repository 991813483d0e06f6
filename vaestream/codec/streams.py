"""Entropy-coded streams of a photo: z, whole, and y, a tile at a time."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vaestream.errors import BitstreamError

from .entropy import GroupDecoder, GroupEncoder, Table


def encode_z(z_hat: NDArray[np.int32], tables: list[Table]) -> bytes:
    """z_hat (hyper, h, w) int32, one table a channel."""
    encoder = GroupEncoder()
    encoder.add(z_hat.reshape(-1), tables, _equal_ends(len(tables), z_hat[0].size))
    return encoder.finish()


def decode_z(data: bytes, tables: list[Table], height: int, width: int) -> NDArray[np.int32]:
    """Inverse of `encode_z`: (hyper, height, width) int32."""
    symbols = GroupDecoder(data).take(tables, _equal_ends(len(tables), height * width))
    return symbols.reshape(len(tables), height, width)


def tables_of_z(tables: Sequence[Sequence[Table]], quality: float) -> list[Table]:
    """Those of one quality, one a channel, out of those for qualities from 0 to 100."""
    return list(tables[round(quality / 100 * (len(tables) - 1))])


def _equal_ends(groups: int, size: int) -> list[int]:
    return list(range(0, (groups + 1) * size, size))


class TileEncoder:
    """Encodes the symbols of a tile, pass by pass.

    The stream's first byte is the number of tables, from the narrowest, that the tile does not
    use: all its symbols there are zero and are not coded.
    """

    def __init__(self, tables: list[Table]) -> None:
        self._tables = tables
        self._skip = len(tables)
        self._passes: list[tuple[NDArray[np.int32], NDArray[np.uint8]]] = []

    def add(self, symbols: NDArray[np.int32], index: NDArray[np.uint8]) -> None:
        """The symbols of the next pass and the table index of each, both flat."""
        self._skip = min(self._skip, int(index[symbols != 0].min(initial=self._skip)))
        self._passes.append((symbols, index))

    def finish(self) -> bytes:
        """The tile's stream."""
        encoder = GroupEncoder()
        for symbols, index in self._passes:
            order, ends = _coding_order(index, self._skip, len(self._tables))
            encoder.add(symbols[order], self._tables, ends)
        return bytes([self._skip]) + encoder.finish()


class TileDecoder:
    """Decodes what `TileEncoder` wrote, pass by pass."""

    def __init__(self, data: bytes, tables: list[Table]) -> None:
        """Raises BitstreamError if `data` cannot be a tile's stream; so does `take`."""
        if not data or data[0] > len(tables):
            raise BitstreamError("a tile's stream has no valid first byte")
        self._tables = tables
        self._skip = data[0]
        self._decoder = GroupDecoder(data[1:])

    def take(self, index: NDArray[np.uint8]) -> NDArray[np.int32]:
        """The symbols of the next pass, given the table index of each, both flat."""
        symbols = np.zeros(len(index), np.int32)
        order, ends = _coding_order(index, self._skip, len(self._tables))
        symbols[order] = self._decoder.take(self._tables, ends)
        return symbols


def _coding_order(
    index: NDArray[np.uint8], skip: int, tables: int
) -> tuple[NDArray[np.intp], list[int]]:
    """Positions of the coded symbols, by table and within a table as they stand.

    With them, where each table's run begins, and the end of the last: tables + 1 numbers.
    """
    coded = np.flatnonzero(index >= skip)
    used = index[coded]
    order = np.argsort(used, kind="stable")  # a radix sort, for bytes
    ends = np.searchsorted(used[order], np.arange(tables + 1))
    return coded[order], ends.tolist()
