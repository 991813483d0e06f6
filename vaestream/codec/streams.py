"""Entropy-coded streams of a photo: z, whole, and y, a tile at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vaestream.errors import BitstreamError

from .entropy import GroupDecoder, GroupEncoder, Table, TableSet
from .lattice import CHECKS, by_table, check_parities, checks_among, in_groups


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


@dataclass(frozen=True)
class Layout:
    """How the symbols of a pass are coded.

    members: (n, 32), where the members of groups stand. order: where the coded symbols stand that
    are no checks, by table and within a table as they stand in the pass. ends: where each table's
    run begins in `order`, and the end of the last.
    """

    members: NDArray[np.intp]
    order: NDArray[np.intp]
    ends: list[int]


class SymbolCoding:
    """What the symbols of y are coded with: the table of each index, and which are on a lattice."""

    def __init__(self, tables: Sequence[Table], lattice_from: int) -> None:
        """lattice_from: see `lattice.groups`; as many as there are tables if none are."""
        self.tables = TableSet(tables)
        self.by_parity = TableSet([t.of_parity(odd) for t in tables for odd in (False, True)])
        self._lattice_from = lattice_from

    def layout(self, index: NDArray[np.uint8], skip: int) -> Layout:
        """Of a pass, given the table index of each symbol and the first that is coded."""
        order, ends = _runs(index, min(skip, self._lattice_from), len(self.tables))
        start = ends[self._lattice_from]
        coded = np.ones(len(order), np.bool_)
        coded[: ends[skip]] = False
        in_groups(coded[start:])[:, CHECKS] = False
        left = ends - checks_among(np.array(ends) - start, len(order) - start)
        left = np.maximum(0, left - left[skip])
        return Layout(in_groups(order[start:]), order[coded], left.tolist())

    def checks(
        self, index: NDArray[np.uint8], layout: Layout, parities: NDArray[np.uint8], skip: int
    ) -> tuple[NDArray[np.intp], list[int]]:
        """Where the coded checks of a pass stand, in order, and where the run of each of
        `by_parity` begins among them. parities: (n, 6), of the checks of each group."""
        places = layout.members[:, CHECKS].ravel()
        key = 2 * index[places] + parities.ravel()
        order, ends = _runs(key, 2 * skip, len(self.by_parity))
        return places[order], ends


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
        """The tile's stream. Raises ValueError if symbols are not on the lattice."""
        encoder = GroupEncoder()
        coding = self._coding
        for symbols, index in self._passes:
            layout = coding.layout(index, self._skip)
            encoder.add(symbols[layout.order], coding.tables, layout.ends)
            if len(layout.members):
                members = symbols[layout.members]
                parities = check_parities(members)
                if not np.array_equal(members[:, CHECKS] & 1, parities):
                    raise ValueError("the symbols of a group are not on the lattice")
                order, ends = coding.checks(index, layout, parities, self._skip)
                encoder.add(symbols[order], coding.by_parity, ends)
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
        layout = coding.layout(index, self._skip)
        symbols[layout.order] = self._decoder.take(coding.tables, layout.ends)
        if len(layout.members):
            parities = check_parities(symbols[layout.members])
            order, ends = coding.checks(index, layout, parities, self._skip)
            symbols[order] = self._decoder.take(coding.by_parity, ends)
        return symbols


def _runs(index: NDArray[np.uint8], first: int, tables: int) -> tuple[NDArray[np.intp], list[int]]:
    """The order of `by_table`, and where each table's run begins there, with the end of the last:
    tables + 1 numbers."""
    order, used = by_table(index, first)
    ends = np.cumsum(np.bincount(used, minlength=tables))
    return order, [0, *ends.tolist()]
