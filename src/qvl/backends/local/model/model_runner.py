"""Runs a step on the device: pictures, the forward pass over the packed batch, logits of the last positions."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby
from typing import TYPE_CHECKING

from qvl.backends.local.model.decoder import DecodeGroup, Deepstack, PromptChunk
from qvl.backends.local.model.graphs import DecodeGraphs, DecodeInputs, padded_count, padded_length
from qvl.backends.local.model.kv_storage import Storage
from qvl.backends.local.model.vision import FeatureCache
from qvl.backends.local.scheduling.kv_cache import Resize

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence as ListLike

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from qvl.backends.local.model.device import Device
    from qvl.backends.local.model.loader import Checkpoint
    from qvl.backends.local.scheduling.kv_cache import Op
    from qvl.backends.local.scheduling.scheduler import ScheduledTokens, Step
    from qvl.backends.local.scheduling.sequence import Sequence
    from qvl.backends.local.text.processor import ImageRules, PreparedPicture


class Runner:
    """Owns the model and every tensor of the engine. Used from the engine's thread alone.

    Args:
        checkpoint: weights; its modules' parameters are rearranged (see TextDecoder).
        features: where features of pictures are kept.
        decode_graphs: record decode steps and replay them.
        batch_invariant: compute each token and picture as if it were alone.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: Device,
        rules: ImageRules,
        features: FeatureCache,
        decode_graphs: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        self.device = device
        self.features = features
        kernels = device.kernels()
        self.decoder = checkpoint.family.decoder(checkpoint.model, kernels, batch_invariant=batch_invariant)
        self.tower = checkpoint.family.tower(checkpoint.model, rules, kernels)
        self.storage = Storage(self.decoder.layout())
        self.vocab_size = self.decoder.vocab_size
        self.num_encoded = 0
        self._input_device = self.decoder.embed.weight.device
        one_device = len({layer.device for layer in self.decoder.layers}) == 1
        self.graphs = DecodeGraphs(device, self._decode) if decode_graphs and one_device else None

    def apply(self, ops: ListLike[Op]) -> None:
        """Carry out the accounting's decisions about KV memory."""
        if self.graphs is not None:
            self.graphs.forget({op.capacity for op in ops if isinstance(op, Resize)})
        self.storage.apply(ops)

    def encode(self, chunk: ScheduledTokens, tokens: int) -> list[PreparedPicture]:
        """Look up or compute the features of the pictures that `chunk` covers.

        Returns:
            pictures that cost more than `tokens` tokens of text: these are only begun, for `encode_slice` to go on.

        Raises:
            RuntimeError: the vision tower failed or the device has no memory for it.
        """
        small: list[PreparedPicture] = []
        large: list[PreparedPicture] = []
        for picture in chunk.sequence.prepared.pictures:
            if picture.start < chunk.end and picture.end > chunk.start and picture.pending:
                picture.features = self.features.get(picture.key, counted=False)
                if picture.features is None:
                    (large if self.tower.cost(picture) > tokens * self.decoder.cost else small).append(picture)
        for some in [[picture] for picture in small] if self.decoder.batch_invariant else [small] if small else []:
            for picture, features in zip(some, self.tower.encode(some), strict=True):
                self._keep(picture, features)
        for picture in large:
            picture.encoding = self._in_slices(picture, tokens)
        return large

    def encode_slice(self, picture: PreparedPicture) -> None:
        """Go on with a picture that `encode` began; when it is done, `features` are there and `encoding` is None."""
        if picture.encoding is not None:
            next(picture.encoding, None)

    def _in_slices(self, picture: PreparedPicture, tokens: int) -> Iterator[None]:
        # Another request may have brought the same picture while this one waited.
        picture.features = self.features.get(picture.key, counted=False)
        if picture.features is None:
            for done in self.tower.slices([picture], tokens * self.decoder.cost):
                if done is None:
                    yield
                else:
                    self._keep(picture, done[0])
        picture.encoding = None

    def _keep(self, picture: PreparedPicture, features: Tensor) -> None:
        self.num_encoded += 1
        picture.features = features
        self.features.put(picture.key, features)

    def forward(self, step: Step) -> tuple[list[Sequence], Tensor]:
        """Compute `step`.

        Returns:
            the sequences that get a token, and their logits, float32 [len, vocabulary].
        """
        import torch

        if step.decode and not step.prefill and self.graphs is not None:
            return self._forward_recorded(self.graphs, sorted(step.decode, key=_slot_index))
        decode = sorted(step.decode, key=_slot_index)
        ids = [sequence.tokens[-1] for sequence in decode]
        for chunk in step.prefill:
            ids += chunk.sequence.tokens[chunk.start : chunk.end]
        hidden = self.decoder.embed(self._int64(ids))
        chunks = self._chunks(step.prefill, len(decode))
        deepstack = self._write_features(hidden, step.prefill, chunks)
        sampled, rows = list(decode), list(range(len(decode)))
        for chunk, packed in zip(step.prefill, chunks, strict=True):
            if chunk.samples:
                sampled.append(chunk.sequence)
                rows.append(packed.first + packed.count - 1)
        hidden = self.decoder.forward(
            hidden,
            self.decoder.rotary(self._positions(decode, step.prefill)),
            self.storage,
            [] if self.decoder.batch_invariant else self._groups(decode),
            [*self._single(decode), *chunks] if self.decoder.batch_invariant else chunks,
            deepstack,
            None if len(rows) == len(ids) else self._int64(rows),
        )
        if not sampled:
            return [], hidden.new_empty((0, self.vocab_size), dtype=torch.float32)
        return sampled, self.decoder.logits(hidden)

    def _forward_recorded(self, graphs: DecodeGraphs, decode: list[Sequence]) -> tuple[list[Sequence], Tensor]:
        """Compute a step without prompts, padded to a shape that comes back."""
        padded: list[Sequence] = []
        rows: list[int] = []
        for _, members in groupby(decode, key=lambda sequence: _slot_index(sequence)[0]):
            some = list(members)
            rows += range(len(padded), len(padded) + len(some))
            padded += some + [some[-1]] * (padded_count(len(some)) - len(some))
        ids = self._int64([sequence.tokens[-1] for sequence in padded])
        inputs = DecodeInputs(ids, self._positions(padded, []), self._groups(padded, pad=True))
        logits = graphs.run(inputs)
        return decode, logits if len(rows) == len(padded) else logits.index_select(0, self._int64(rows))

    def _decode(self, inputs: DecodeInputs) -> Tensor:
        hidden, rotary = self.decoder.embed(inputs.ids), self.decoder.rotary(inputs.positions)
        return self.decoder.logits(self.decoder.forward(hidden, rotary, self.storage, inputs.groups, (), None))

    def save(self, sequence: Sequence, pairs: ListLike[tuple[int, int]], num_blocks: int) -> None:
        """Copy blocks of a sequence's row into the prefix storage; see `Storage.save`."""
        if pairs and sequence.slot is not None:
            self.storage.save(sequence.slot.capacity, sequence.slot.row, pairs, num_blocks)

    def release(self) -> None:
        """Drop all KV, and what `release_caches` drops."""
        self.storage.clear()
        self.release_caches()

    def release_caches(self) -> None:
        """Give back what is kept for later alone: prefixes, features, recordings."""
        if self.graphs is not None:
            self.graphs.clear()
        self.storage.clear_blocks()
        self.features.clear()
        self.device.empty_cache()

    def _int64(self, values: list[int]) -> Tensor:
        import torch

        return self._to_device(torch.tensor(values, dtype=torch.int64))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._input_device, non_blocking=self.device.non_blocking)

    def _added(self, visible: Tensor) -> Tensor:
        """Return a bool mask as what is added to attention scores: once a step, else every layer would convert it."""
        added = self.decoder.norm.new_zeros(visible.shape, device="cpu")
        return self._to_device(added.masked_fill_(~visible, float("-inf")))

    def _positions(self, decode: list[Sequence], prefill: list[ScheduledTokens]) -> Tensor:
        import numpy as np
        import torch

        parts = []
        if decode:
            now = np.array([len(s.tokens) - 1 + s.prepared.position_delta for s in decode], dtype=np.int64)
            parts.append(np.broadcast_to(now, (3, len(decode))))
        parts += [_chunk_positions(chunk) for chunk in prefill]
        return self._to_device(torch.from_numpy(np.concatenate(parts, axis=1)))

    def _groups(self, decode: list[Sequence], *, pad: bool = False) -> list[DecodeGroup]:
        """Return the decoding sequences by pool.

        `pad` makes shapes that come back: more rows and keys than are needed, and always a mask.
        """
        import torch

        by_pool: dict[int, list[Sequence]] = defaultdict(list)
        for sequence in decode:
            by_pool[_slot_index(sequence)[0]].append(sequence)
        groups = []
        heads = self.decoder.num_kv_heads
        first = 0
        for capacity, members in by_pool.items():
            rows = torch.tensor([_slot_index(sequence)[1] for sequence in members])
            lengths = torch.tensor([len(sequence.tokens) for sequence in members])
            num_rows, longest = int(rows[-1]) + 1, int(lengths.max())
            if pad:
                num_rows = min(padded_count(num_rows), self.storage.num_rows(capacity))
                longest = padded_length(longest, capacity)
            write = ((rows[:, None] * heads + torch.arange(heads)) * capacity + (lengths - 1)[:, None]).flatten()
            whole = num_rows == len(members) and not pad
            mask = None
            if not whole or int(lengths.min()) < longest:
                # Rows nobody decodes see their first key, so that no row is empty.
                visible = torch.ones(num_rows, dtype=torch.int64)
                visible[rows] = lengths
                mask = self._added(torch.arange(longest) < visible[:, None])[:, None, None]
            row_index = None if whole else self._to_device(rows)
            groups.append(
                DecodeGroup(first, len(members), capacity, longest, num_rows, row_index, self._to_device(write), mask)
            )
            first += len(members)
        return groups

    def _single(self, decode: list[Sequence]) -> list[PromptChunk]:
        """Return decoding sequences as chunks of one token."""
        return [
            PromptChunk(first, 1, *_slot_index(sequence), len(sequence.tokens) - 1, None)
            for first, sequence in enumerate(decode)
        ]

    def _chunks(self, prefill: list[ScheduledTokens], first: int) -> list[PromptChunk]:
        import torch

        chunks = []
        for chunk in prefill:
            capacity, row = _slot_index(chunk.sequence)
            mask = None
            if chunk.start and chunk.count > 1 and not self.decoder.batch_invariant:
                mask = self._added(torch.ones((chunk.count, chunk.end), dtype=torch.bool).tril_(chunk.start))
            chunks.append(PromptChunk(first, chunk.count, capacity, row, chunk.start, mask))
            first += chunk.count
        return chunks

    def _write_features(
        self, hidden: Tensor, prefill: list[ScheduledTokens], chunks: list[PromptChunk]
    ) -> Deepstack | None:
        """Write picture features over the placeholders' embeddings; return what the first layers add."""
        import torch

        indices: list[Tensor] = []
        features: list[Tensor] = []
        for chunk, packed in zip(prefill, chunks, strict=True):
            for picture in chunk.sequence.prepared.pictures:
                start, end = max(picture.start, chunk.start), min(picture.end, chunk.end)
                if start < end:
                    assert picture.features is not None
                    begin = packed.first + start - chunk.start
                    indices.append(torch.arange(begin, begin + end - start))
                    features.append(picture.features[:, start - picture.start : end - picture.start])
        if not indices:
            return None
        joined = torch.cat(features, dim=1).to(hidden.device)
        rows = torch.cat(indices).to(hidden.device)
        hidden.index_copy_(0, rows, joined[0].to(hidden.dtype))
        return Deepstack(rows, joined[1:]) if len(joined) > 1 else None


def _slot_index(sequence: Sequence) -> tuple[int, int]:
    if sequence.slot is None:
        raise RuntimeError("a scheduled sequence has no row")
    return sequence.slot.capacity, sequence.slot.row


def _chunk_positions(chunk: ScheduledTokens) -> NDArray[np.int64]:
    """Return int64 [3, count]: of the prompt as prepared, of generated tokens (after a preemption) counting on."""
    import numpy as np

    sequence = chunk.sequence
    known = sequence.prepared.positions[:, chunk.start : min(chunk.end, sequence.num_prompt)]
    later = np.arange(max(chunk.start, sequence.num_prompt), chunk.end) + sequence.prepared.position_delta
    return np.concatenate([known, np.broadcast_to(later, (3, len(later)))], axis=1)
