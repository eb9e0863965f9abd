"""Pack the samples of a split into chunks, once, and keep them within a memory budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from workers.tasks import Passage, Sample

from .draft import Draft
from .packing import Chunk, Packer, cut, make_rows
from .prompts import ImagePrompts

Item = TypeVar("Item", bound=Sample | Passage)


@dataclass
class SampleChunks:
    """Chunks of consecutive samples of a split (indices ``first`` up to ``last``), and the samples that failed."""

    first: int
    last: int
    chunks: tuple[Chunk, ...]
    failed: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Memory of the tensors, in bytes."""
        return sum(chunk.nbytes_of_everything for chunk in self.chunks)


class ChunkCache(Generic[Item]):
    """Make and keep chunks; those used longest ago are dropped when the budget is full, and made again when needed.

    ``read`` reads samples with their indices, and tells by id why others fail (``PromptReader.read``).
    """

    def __init__(
        self,
        read: Callable[[Sequence[tuple[int, Item]], dict[str, str]], list[ImagePrompts]],
        packer: Packer,
        drafts: Callable[[Item], Sequence[Draft]],
        *,
        budget: int,
    ) -> None:
        self._read, self._packer, self._drafts = read, packer, drafts
        self.budget = budget
        self._kept: OrderedDict[tuple[str, int, int], SampleChunks] = OrderedDict()

    @property
    def kept(self) -> tuple[SampleChunks, ...]:
        """Chunks that are kept now, least recently used first."""
        return tuple(self._kept.values())

    @property
    def nbytes(self) -> int:
        """Memory of what is kept, in bytes."""
        return sum(part.nbytes for part in self._kept.values())

    def of(self, split: str, samples: Sequence[Item], start: int, tokens: int) -> Iterator[SampleChunks]:
        """Pack ``samples``, which stand in the split from index ``start`` on, in chunks of at most ``tokens``."""
        first = start
        while first < start + len(samples):
            part = self._part(split, samples[first - start :], first, tokens)
            first = part.last
            yield part

    def _part(self, split: str, samples: Sequence[Item], first: int, tokens: int) -> SampleChunks:
        """Return the longest part kept that begins with the first of ``samples``, or a new one.

        A new one ends where its share of the budget does, so callers go on behind the end of what they are given.
        """
        end = first + len(samples)
        if kept := [key for key in self._kept if key[:2] == (split, first) and key[2] <= end]:
            longest = max(kept)
            self._kept.move_to_end(longest)
            return self._kept[longest]
        failed: dict[str, str] = {}
        images: list[ImagePrompts] = []
        size, last = 0, first
        for group in _by_image(samples):
            images += self._read(list(enumerate(group, last)), failed)
            last += len(group)
            size += images[-1].nbytes if images else 0
            if size > self.budget // 4:
                break
        drafts = {first + number: self._drafts(sample) for number, sample in enumerate(samples[: last - first])}
        rows = make_rows(images, drafts.__getitem__)
        chunks = tuple(
            self._packer.chunk((split, first, last, tokens, number), group)
            for number, group in enumerate(cut(rows, tokens))
        )
        part = SampleChunks(first, last, chunks, failed)
        self._kept[split, first, last] = part
        while self.nbytes > self.budget and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return part

    def halve(self, part: SampleChunks, chunk: Chunk) -> tuple[Chunk, ...]:
        """Put two chunks of half the rows in the place of one; none, where it has one row only."""
        if len(chunk.rows) == 1:
            return ()
        middle = len(chunk.rows) // 2
        halves = tuple(
            self._packer.chunk((*chunk.key, number), rows)
            for number, rows in enumerate((chunk.rows[:middle], chunk.rows[middle:]))
        )
        index = part.chunks.index(chunk)
        part.chunks = (*part.chunks[:index], *halves, *part.chunks[index + 1 :])
        return halves


def _by_image(samples: Sequence[Item]) -> Iterator[list[Item]]:
    group: list[Item] = []
    for sample in samples:
        if group and sample.image_key != group[0].image_key:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group
