"""Runs a step on the device: encodes pictures, computes the forward pass and the logits of last positions."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from qvl.backends.local.model.decoder_step import Deepstack, PromptChunk
from qvl.backends.local.model.device import to_device
from qvl.backends.local.model.graphs import DecodeGraphs, padded_count, padded_length
from qvl.backends.local.model.kv_storage import Storage
from qvl.backends.local.model.linear import LinearPlan
from qvl.backends.local.model.prompt_scores import note_scores, num_scored
from qvl.backends.local.model.shared_rows import SharedRow, can_share
from qvl.backends.local.model.step_inputs import GroupPlan, GroupShape, StepInputs, send
from qvl.backends.local.model.vision import FeatureCache
from qvl.backends.local.scheduling.kv_cache import Resize, ResizeStates

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Sequence as ListLike

    from numpy.typing import NDArray
    from torch import Tensor

    from qvl.backends.local.model.device import Device
    from qvl.backends.local.model.loader import Checkpoint
    from qvl.backends.local.scheduling.kv_cache import Op, Part
    from qvl.backends.local.scheduling.sequence import Sequence
    from qvl.backends.local.scheduling.step import ScheduledTokens, Step
    from qvl.backends.local.text.processor import ImageRules, PreparedPicture


class Runner:
    """Owns the model and every tensor of the engine. Used from the engine's thread alone.

    Args:
        checkpoint: weights; its modules' parameters are rearranged (see TextDecoder).
        features: the cache of picture features.
        decode_graphs: record decode steps and replay them.
        batch_invariant: compute each token and picture as if it were alone.
        plan: makes the matrix products; by measurement unless given.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: Device,
        rules: ImageRules,
        features: FeatureCache,
        decode_graphs: bool = False,
        batch_invariant: bool = False,
        plan: LinearPlan | None = None,
    ) -> None:
        self.device = device
        self.features = features
        self.kernels, self.plan = device.kernels(), plan or LinearPlan()
        self.decoder = checkpoint.family.decoder(
            checkpoint.model, self.kernels, self.plan, batch_invariant=batch_invariant
        )
        self.tower = checkpoint.family.tower(checkpoint.model, rules, self.kernels, self.plan)
        self.storage = Storage(self.decoder.layout())
        # Computed as if alone, attention may depend on nothing but the place, not on what others keep.
        self.shares_rows = not (batch_invariant or decode_graphs) and can_share(device.torch, self.decoder.norm.dtype)
        self.vocab_size = self.decoder.vocab_size
        self.num_encoded = 0
        self._input_device = self.decoder.embed.weight.device
        one_device = len({layer.device for layer in self.decoder.layers}) == 1
        self.graphs = DecodeGraphs(device, self._decode) if decode_graphs and one_device else None

    def apply(self, ops: ListLike[Op]) -> None:
        """Execute the resizes and copies of KV rows that `KvCache` decided."""
        if self.graphs is not None:
            if any(isinstance(op, ResizeStates) for op in ops):
                self.graphs.clear()
            self.graphs.forget({op.pool for op in ops if isinstance(op, Resize)})
        self.storage.apply(ops)

    def picture_cost(self, picture: PreparedPicture) -> float:
        """Return the number of prompt tokens that take as many multiplications as the picture."""
        return self.tower.cost(picture) / self.decoder.cost

    def encode(self, pictures: ListLike[PreparedPicture], units: float, grain: float) -> float:
        """Encode a slice of `pictures`, in their order; those with features, or cached ones, are skipped.

        Args:
            units: cost of the slice, in the unit of `picture_cost`; at least one piece is computed.
            grain: largest cost of a piece, and of pictures that are encoded together.

        Returns:
            the cost of the computed pieces.

        Raises:
            RuntimeError: the vision tower failed or lacks memory; the next call encodes the picture from its start.
        """
        spent = 0.0
        while missing := self._missing(pictures):
            first = missing[0]
            if first.encoding is None:
                first.encoding, first.encoded = self._encoding(self._together(missing, grain), grain), 0.0
                first.piece = next(first.encoding) / self.decoder.cost
            if spent and spent + first.piece > units:
                break
            spent += first.piece
            first.encoded += first.piece
            try:
                first.piece = next(first.encoding, 0.0) / self.decoder.cost
            except Exception:
                first.encoding, first.encoded = None, 0.0
                raise
        return spent

    def recall(self, pictures: Iterable[PreparedPicture]) -> None:
        """Give the pictures whose encoding has not begun the features that are kept of them."""
        for picture in pictures:
            if picture.features is None and picture.encoding is None:
                picture.features = self.features.get(picture.key, counted=False)

    def _missing(self, pictures: ListLike[PreparedPicture]) -> list[PreparedPicture]:
        """Return the pictures without features, none of which is kept."""
        self.recall(pictures)
        return [picture for picture in pictures if picture.features is None]

    def _together(self, pictures: list[PreparedPicture], grain: float) -> list[PreparedPicture]:
        """Return the first of `pictures`, with the small ones behind it that are faster encoded together."""
        total = 0.0
        some: list[PreparedPicture] = []
        for picture in pictures:
            total += picture.cost
            if some and (total > grain or self.decoder.batch_invariant):
                break
            some.append(picture)
        return some

    def _encoding(self, pictures: list[PreparedPicture], grain: float) -> Iterator[float]:
        """Yield the multiplications of each piece before it is computed; set the features at the end."""
        computed = yield from self.tower.pieces(pictures, grain * self.decoder.cost)
        for picture, features in zip(pictures, computed, strict=True):
            self.num_encoded += 1
            picture.features, picture.encoding = features, None
            self.features.put(picture.key, features)

    def forward(self, step: Step) -> tuple[list[Sequence], Tensor]:
        """Compute the forward pass of `step`.

        Returns:
            the n sequences that get a token, and their logits, float32 [n, vocabulary].
        """
        import torch

        if step.decode and not step.prefill and self.graphs is not None:
            return self._forward_recorded(self.graphs, sorted(step.decode, key=_slot_index))
        decode = sorted(step.decode, key=_slot_index)
        ids = [sequence.tokens[-1] for sequence in decode]
        for chunk in step.prefill:
            ids += [*chunk.sequence.tokens[chunk.start : chunk.end], *chunk.draft]
        chunks = self._chunks(step.prefill, len(decode))
        sampled, rows = list(decode), list(range(len(decode)))
        for chunk, packed in zip(step.prefill, chunks, strict=True):
            if chunk.samples:
                newest = packed.first + chunk.count - 1
                sampled += [chunk.sequence] * (1 + len(chunk.draft))
                rows += range(newest, newest + 1 + len(chunk.draft))
        scored = [chunk for chunk in step.prefill if num_scored(chunk)]
        if scored:
            for chunk, packed in zip(step.prefill, chunks, strict=True):
                rows += range(packed.first, packed.first + num_scored(chunk))
        pictured, features = _features(step.prefill, chunks)
        inputs = send(
            ids,
            [_decode_positions(decode), *map(_chunk_positions, step.prefill)],
            [] if self.decoder.batch_invariant else self._groups(decode),
            self.decoder.num_kv_heads,
            self._input_device,
            kept=None if len(rows) == len(ids) and not scored else rows,
            pictured=pictured,
            states=[] if self.decoder.batch_invariant else _states(decode),
            adapters=_adapters(decode, step.prefill),
        )
        hidden = self.decoder.embed(inputs.ids)
        hidden = self.decoder.forward(
            hidden,
            self.decoder.rotary(inputs.positions),
            self.storage,
            inputs.groups,
            [*self._single(decode), *chunks] if self.decoder.batch_invariant else chunks,
            _write_features(hidden, inputs.pictured, features),
            inputs.kept,
            self._shared(decode, step.prefill, chunks),
            inputs.states,
            inputs.adapted,
        )
        if scored:
            note_scores(scored, self.decoder.logits(hidden[len(sampled) :]))
            hidden = hidden[: len(sampled)]
        if not sampled:
            return [], hidden.new_empty((0, self.vocab_size), dtype=torch.float32)
        return sampled, self.decoder.logits(hidden)

    def _forward_recorded(self, graphs: DecodeGraphs, decode: list[Sequence]) -> tuple[list[Sequence], Tensor]:
        """Compute a decode-only step by a recorded graph, padded to one of its shapes; returns as `forward`."""
        padded: list[Sequence] = []
        rows: list[int] = []
        for _, members in groupby(decode, key=lambda sequence: _slot_index(sequence)[0]):
            some = list(members)
            rows += range(len(padded), len(padded) + len(some))
            padded += some + [some[-1]] * (padded_count(len(some)) - len(some))
        ids = [sequence.tokens[-1] for sequence in padded]
        groups = self._groups(padded, pad=True)
        heads = self.decoder.num_kv_heads
        positions, states = [_decode_positions(padded)], _states(padded)
        adapters = _adapters(padded, [])
        logits = graphs.run(send(ids, positions, groups, heads, self._input_device, states=states, adapters=adapters))
        if len(rows) == len(padded):
            return decode, logits
        return decode, logits.index_select(0, to_device(np.array(rows), logits.device))

    def _decode(self, inputs: StepInputs) -> Tensor:
        hidden, rotary = self.decoder.embed(inputs.ids), self.decoder.rotary(inputs.positions)
        states, adapted = inputs.states, inputs.adapted
        hidden = self.decoder.forward(
            hidden, rotary, self.storage, inputs.groups, (), None, states=states, adapted=adapted
        )
        return self.decoder.logits(hidden)

    def release(self) -> None:
        """Free all KV memory, and what `release_caches` frees."""
        self.storage.clear()
        self.release_caches()

    def release_caches(self) -> None:
        """Free the memory of picture features and recorded graphs."""
        if self.graphs is not None:
            self.graphs.clear()
        self.features.clear()
        self.device.empty_cache()

    def _groups(self, decode: list[Sequence], *, pad: bool = False) -> list[GroupPlan]:
        """Return the sequences in decode, grouped by pool; where rows are shared, by neighbours in it.

        `pad` rounds shapes up so that recorded graphs fit: more rows and keys than needed, and always a mask.
        """
        by_pool: dict[int, list[Sequence]] = defaultdict(list)
        for sequence in decode:
            by_pool[_slot_index(sequence)[0]].append(sequence)
        split = self.shares_rows and not pad
        groups: list[GroupPlan] = []
        for capacity, members in by_pool.items():
            for some in _runs(members) if split else [members]:
                first = sum(group.shape.num_tokens for group in groups)
                groups.append(self._group(first, capacity, some, split=split, pad=pad))
        return groups

    def _group(self, first: int, capacity: int, members: list[Sequence], *, split: bool, pad: bool) -> GroupPlan:
        heads = self.decoder.num_kv_heads
        rows = np.array([_slot_index(sequence)[1] for sequence in members], dtype=np.int64)
        lengths = np.array([len(sequence.tokens) - sequence.base for sequence in members], dtype=np.int64)
        first_row = int(rows[0]) if split else 0
        num_rows, longest = int(rows[-1]) + 1 - first_row, int(lengths.max())
        if pad:
            num_rows = min(padded_count(num_rows), self.storage.num_rows(capacity))
            longest = padded_length(longest, capacity)
        write = ((rows[:, None] * heads + np.arange(heads)) * capacity + (lengths - 1)[:, None]).reshape(-1)
        whole = num_rows == len(members) and not pad
        full = whole and int(lengths.min()) == longest
        # Rows nobody decodes see their first key, so that no row is empty.
        visible = np.ones(0 if full else num_rows, dtype=np.int64)
        if not full:
            visible[rows - first_row] = lengths
        shared = bool(members[0].shared)
        shape = GroupShape(first, len(members), capacity, longest, first_row, num_rows, shared, whole, full)
        return GroupPlan(shape, rows[: 0 if whole else None], write, visible)

    def _shared(
        self, decode: list[Sequence], prefill: list[ScheduledTokens], chunks: list[PromptChunk]
    ) -> list[SharedRow]:
        """Return the rows that sequences of the step share, with the tokens that see them."""
        where: dict[Part, list[NDArray[np.int64]]] = defaultdict(list)
        for index, sequence in enumerate(decode):
            for part in sequence.shared:
                where[part].append(np.arange(index, index + 1))
        for chunk, packed in zip(prefill, chunks, strict=True):
            for part in chunk.sequence.shared:
                where[part].append(np.arange(packed.first, packed.first + packed.count))
        rows = []
        for (slot, tokens), parts in where.items():
            seen = np.concatenate(parts)
            first, last = int(seen[0]), int(seen[-1]) + 1
            together = slice(first, last) if last - first == len(seen) else to_device(seen, self._input_device)
            rows.append(SharedRow(slot.pool, slot.row, tokens, together))
        return rows

    def _single(self, decode: list[Sequence]) -> list[PromptChunk]:
        """Return the sequences in decode as prompt chunks of one token."""
        return [
            _with_states(sequence, PromptChunk(first, 1, *_slot_index(sequence), len(sequence.tokens) - 1))
            for first, sequence in enumerate(decode)
        ]

    def _chunks(self, prefill: list[ScheduledTokens], first: int) -> list[PromptChunk]:
        chunks = []
        for chunk in prefill:
            sequence, count = chunk.sequence, chunk.count + len(chunk.draft)
            start = chunk.start - sequence.base
            packed = PromptChunk(first, count, *_slot_index(sequence), start, bool(sequence.shared))
            chunks.append(_with_states(sequence, packed))
            first += count
        return chunks


def _features(
    prefill: list[ScheduledTokens], chunks: list[PromptChunk]
) -> tuple[list[NDArray[np.int64]], list[Tensor]]:
    """Return which tokens of the step are parts of pictures, and their features."""
    indices: list[NDArray[np.int64]] = []
    features: list[Tensor] = []
    for chunk, packed in zip(prefill, chunks, strict=True):
        for picture in chunk.sequence.prepared.pictures:
            start, end = max(picture.start, chunk.start), min(picture.end, chunk.end)
            if start < end:
                assert picture.features is not None
                begin = packed.first + start - chunk.start
                indices.append(np.arange(begin, begin + end - start))
                features.append(picture.features[:, start - picture.start : end - picture.start])
    return indices, features


def _write_features(hidden: Tensor, rows: Tensor, features: list[Tensor]) -> Deepstack | None:
    """Write picture features over the placeholders' embeddings; return the features for the first layers to add."""
    import torch

    if not features:
        return None
    joined = torch.cat(features, dim=1).to(hidden.device)
    hidden.index_copy_(0, rows, joined[0].to(hidden.dtype))
    return Deepstack(rows, joined[1:]) if len(joined) > 1 else None


def _slot_index(sequence: Sequence) -> tuple[int, int]:
    if sequence.slot is None:
        raise RuntimeError("a scheduled sequence has no KV row")
    return sequence.slot.pool, sequence.slot.row


def _runs(members: list[Sequence]) -> Iterator[list[Sequence]]:
    """Yield those whose rows lie side by side and who all share rows with others, or all do not."""
    run: list[Sequence] = []
    for sequence in members:
        row = _slot_index(sequence)[1]
        if run and (row != _slot_index(run[-1])[1] + 1 or bool(sequence.shared) != bool(run[-1].shared)):
            yield run
            run = []
        run.append(sequence)
    yield run


def _with_states(sequence: Sequence, chunk: PromptChunk) -> PromptChunk:
    """Return `chunk` with the sequence's states before and behind it, and those to keep of it, if there are any."""
    states = sequence.states
    if states is None:
        return chunk
    marks = [(mark.tokens - sequence.num_computed, mark.state) for mark in states.marks]
    within = tuple((count, state) for count, state in marks if 0 < count <= chunk.count)
    return replace(chunk, read=states.now, write=states.next, marks=within)


def _states(decode: list[Sequence]) -> list[tuple[int, int]]:
    """Return the states before and behind the next token of each sequence, where the model has any."""
    return [(states.now or 0, states.next) for sequence in decode if (states := sequence.states) is not None]


def _adapters(decode: list[Sequence], prefill: list[ScheduledTokens]) -> list[int]:
    """Return the adapter of each token of a step, 0 for none; nothing if no token has one."""
    numbers = [sequence.prepared.adapter for sequence in decode]
    for chunk in prefill:
        numbers += [chunk.sequence.prepared.adapter] * (chunk.count + len(chunk.draft))
    return numbers if any(numbers) else []


def _decode_positions(decode: list[Sequence]) -> NDArray[np.int64]:
    """Return int64 [3, len(decode)], of each sequence's newest token."""
    now = [len(sequence.tokens) - 1 + sequence.prepared.position_delta for sequence in decode]
    return np.broadcast_to(np.array(now, dtype=np.int64), (3, len(now)))


def _chunk_positions(chunk: ScheduledTokens) -> NDArray[np.int64]:
    """Return rotary positions, int64 [3, count]; generated tokens (after a preemption) count on from the prompt's."""
    sequence, end = chunk.sequence, chunk.end + len(chunk.draft)
    known = sequence.prepared.positions[:, chunk.start : min(end, sequence.num_prompt)]
    later = np.arange(max(chunk.start, sequence.num_prompt), end) + sequence.prepared.position_delta
    return np.concatenate([known, np.broadcast_to(later, (3, len(later)))], axis=1)
