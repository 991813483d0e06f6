"""Entropy coding with stored integer tables, on constriction's ANS coder.

Every table is a list of integer counts that was fixed when the weights were written. Nothing here
evaluates a density, so no change of a maths library can change a table.

Symbols are coded in groups that share a table, a call of the coder a group: an order of magnitude
faster than a density per symbol. ANS is a stack, so the encoder pushes the groups last to first
and the decoder pops them first to last.

ANS: Duda, "Asymmetric numeral systems", arXiv:1311.2540. constriction: Bamler, "Understanding
entropy coding with asymmetric numeral systems", arXiv:2201.01741.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import constriction
import numpy as np
from numpy.typing import NDArray

from vaestream.errors import BitstreamError

_SMALL = 8  # categories

MAGNITUDES = 64
"""How many of a symbol's magnitudes `Table.magnitude_bits` tells apart."""

_ESCAPE_BITS = 8.0  # of the value itself: a varint, mostly of one byte


@dataclass(frozen=True)
class Table:
    """Counts of the symbols low, low+step, ...; the last count is that of the escape.

    step: 1, or 2 for symbols of one parity, which `of_parity` makes.
    """

    low: int
    counts: NDArray[np.int32]
    step: int = 1

    @property
    def escape(self) -> int:
        """The category that stands for every symbol the table does not hold."""
        return len(self.counts) - 1

    def count(self, symbols: NDArray[np.integer]) -> NDArray[np.int64]:
        """How often each category occurs among symbols of any value; of a table of step 1."""
        categories = symbols.astype(np.int64) - self.low
        categories[(categories < 0) | (categories > self.escape)] = self.escape
        return np.bincount(categories, minlength=len(self.counts))

    @cached_property
    def magnitude_bits(self) -> NDArray[np.float32]:
        """Bits of a symbol by its magnitude, (64,), the mean over its signs; of a table of step
        1."""
        counts = self.counts.astype(np.float64)
        bits = np.log2(counts.sum()) - np.log2(counts)
        radius = min(-self.low, MAGNITUDES - 1)
        inside = bits[-self.low - radius : -self.low + radius + 1]
        found = np.full(MAGNITUDES, bits[-1] + _ESCAPE_BITS)
        found[: radius + 1] = ((inside + inside[::-1]) / 2)[radius:]
        return found.astype(np.float32)

    def symbols(self, categories: NDArray[np.int32], out: NDArray[np.int32]) -> None:
        """Write the symbols that categories stand for into `out`; for an escape the one beyond the
        last."""
        if self.step > 1:
            categories = categories * self.step
        np.add(categories, self.low, out=out)

    def of_parity(self, odd: bool) -> "Table":
        """The same, of its odd or even symbols alone."""
        first = (self.low + odd) % 2
        counts = np.append(self.counts[first:-1:2], self.counts[-1])
        return Table(self.low + first, counts, 2)

    @cached_property
    def model(self) -> constriction.stream.model.Categorical:
        # `perfect` is given always: its default differs between releases, and so would the bits.
        # `lazy` changes none: small tables decode twice as fast without a search.
        return constriction.stream.model.Categorical(
            self.counts.astype(np.float64), perfect=False, lazy=len(self.counts) <= _SMALL
        )


class TableSet:
    """Tables of one step, for symbols in as many runs."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tuple(tables)
        self._low = np.array([t.low for t in tables], np.int32)
        self._escape = np.array([t.escape for t in tables], np.int32)
        (step,) = {t.step for t in tables}
        self._shift = step >> 1  # by so many bits a step is more than 1

    def __len__(self) -> int:
        return len(self.tables)

    def categories(
        self, symbols: NDArray[np.int32], ends: Sequence[int]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Of symbols in groups (see `GroupEncoder.add`), and which of them are escapes."""
        low, escapes = self._spread(ends)
        categories = (symbols - low) >> self._shift
        outside = categories.view(np.uint32) >= escapes.view(np.uint32)  # below 0 too
        categories[outside] = escapes[outside]
        return categories, outside

    def escapes(self, symbols: NDArray[np.int32], ends: Sequence[int]) -> NDArray[np.intp]:
        """Where escapes stand among what `Table.symbols` gives, in groups."""
        beyond = self._low + (self._escape << self._shift)
        return np.flatnonzero(symbols == np.repeat(beyond, np.diff(ends)))

    def _spread(self, ends: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Each symbol's `low` and `escape`: numpy's calls cost more than its work on small
        groups."""
        sizes = np.diff(ends)
        return np.repeat(self._low, sizes), np.repeat(self._escape, sizes)


class GroupEncoder:
    """Encodes groups of symbols into one stream."""

    def __init__(self) -> None:
        self._groups: list[tuple[Table, NDArray[np.int32]]] = []
        self._escapes: list[int] = []

    def add(self, symbols: NDArray[np.int32], tables: TableSet, ends: Sequence[int]) -> None:
        """Append groups: symbols[ends[i] : ends[i + 1]], int32 of any value, with table i."""
        categories, escapes = tables.categories(symbols, ends)
        self._escapes += symbols[escapes].tolist()
        for table, start, end in zip(tables.tables, ends[:-1], ends[1:], strict=True):
            if end > start:
                self._groups.append((table, categories[start:end]))

    def finish(self) -> bytes:
        """The stream: number of escapes (varint), their values (zigzag varints), ANS words."""
        coder = constriction.stream.stack.AnsCoder()
        for table, categories in reversed(self._groups):
            coder.encode_reverse(categories, table.model)
        head = bytearray(write_varint(len(self._escapes)))
        for value in self._escapes:
            head += write_varint((value << 1) ^ (value >> 63))
        words: NDArray[np.uint32] = coder.get_compressed()
        return bytes(head) + words.astype("<u4").tobytes()


class GroupDecoder:
    """Decodes what `GroupEncoder` wrote, given the same tables in the same order."""

    def __init__(self, data: bytes) -> None:
        count, at = read_varint(data, 0)
        if count > len(data):
            raise BitstreamError("an escape count is larger than its stream")
        escapes = []
        for _ in range(count):
            value, at = read_varint(data, at)
            if value >> 32:
                raise BitstreamError("an escape value is beyond 32 bits")
            escapes.append((value >> 1) ^ -(value & 1))
        if (len(data) - at) % 4:
            raise BitstreamError("an entropy-coded stream does not end on a 32-bit word")
        self._escapes = escapes
        self._used = 0
        words = np.frombuffer(data, "<u4", offset=at).astype(np.uint32)
        if len(words) and words[-1] == 0:
            raise BitstreamError("an entropy-coded stream ends in a zero word")
        self._coder = constriction.stream.stack.AnsCoder(words)

    def take(self, tables: TableSet, ends: Sequence[int]) -> NDArray[np.int32]:
        """The next groups, laid out as `GroupEncoder.add` was given them: (ends[-1],) int32."""
        symbols = np.empty(ends[-1], np.int32)
        for table, start, end in zip(tables.tables, ends[:-1], ends[1:], strict=True):
            if end > start:
                table.symbols(self._coder.decode(table.model, end - start), symbols[start:end])
        escapes = tables.escapes(symbols, ends)
        if len(escapes):
            values = self._escapes[self._used : self._used + len(escapes)]
            if len(values) < len(escapes):
                raise BitstreamError("an entropy-coded stream has too few escape values")
            symbols[escapes] = values
            self._used += len(escapes)
        return symbols


def write_varint(value: int) -> bytes:
    """LEB128: seven bits a byte, least significant first, the top bit says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, offset behind it). Raises BitstreamError at the end of data or beyond 63 bits."""
    value = shift = 0
    while at < len(data) and shift < 63:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise BitstreamError("a number in the bitstream does not end")
