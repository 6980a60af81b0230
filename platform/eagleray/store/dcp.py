"""torch's distributed checkpoint (DCP) over the store: its planners, our writer and reader.

DCP decides who writes and who reads which box of which tensor, so that replicated tensors are stored once and a
checkpoint of one layout is read in another. Its own storage would write a pickle and commit nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from eagleray.errors import CheckpointDamagedError, NotFoundError, StoreError
from eagleray.store.manifest import FileEntry, Manifest, ShardEntry, TensorEntry, version_dir
from eagleray.store.objects import ObjectStore
from eagleray.store.peers import Peers
from eagleray.store.safetensors import Piece, SafetensorsStream, dtype_name, dtype_of, from_bytes

Stored = tuple[TensorEntry, ShardEntry]

_HINT = "Use another version, or restore the file."
_MAX_REQUEST_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class HostShard:
    """This rank's part of a tensor, on the host; DCP plans it through the method below.

    Attributes:
        shape: The whole tensor's.
        offsets: Where the part begins in it.
        local: The part, in host memory.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor, *, copy: bool = True) -> HostShard | None:
        """Take this rank's part of a tensor; None where it has none.

        Args:
            tensor: On any device.
            copy: Whether its memory is the part's own; what is not in host memory is copied there in any case.
        """
        shape, offsets, local = tuple(tensor.shape), (0,) * tensor.ndim, tensor.detach()
        if isinstance(tensor, DTensor):
            if tensor.device_mesh.get_coordinate() is None:
                return None
            chunks: list[ChunkStorageMetadata] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
            offsets, local = tuple(chunks[0].offsets), tensor.to_local().detach()
        if local.numel() == 0 and 0 not in shape:
            return None
        if not copy and local.device.type == "cpu":
            return cls(shape, offsets, local)
        host = torch.empty(local.shape, dtype=local.dtype)
        host.copy_(local)
        return cls(shape, offsets, host)

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        """What DCP asks of an object that is no plain tensor."""
        chunk = ChunkStorageMetadata(torch.Size(self.offsets), self.local.shape)
        properties = TensorProperties(dtype=self.local.dtype)
        data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(self.shape))
        return [WriteItem(MetadataIndex(name, self.offsets), WriteItemType.SHARD, tensor_data=data)]


class HostShardPlanner(DefaultSavePlanner):
    """DCP's planner over `HostShard`s."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """The data of a planned item."""
        shard: HostShard = self.state_dict[index.fqn]
        return shard.local


@dataclass(frozen=True, slots=True)
class WrittenTensors:
    """What a rank wrote: its files and, by tensor name, its shards."""

    files: tuple[FileEntry, ...]
    shards: Mapping[str, tuple[ShardEntry, ...]]


class StoreWriter(StorageWriter):
    """Writes a rank's items as safetensors files and hands what it wrote to `commit`.

    Args:
        store: The store.
        base: The version's prefix.
        attempt: Folder of this save under it; no other save has the same.
        rank: Makes the rank's file names.
        commit: Called on the coordinator with all tensors and files, when every rank's are durable.
    """

    def __init__(
        self,
        store: ObjectStore,
        base: str,
        attempt: str,
        rank: int,
        commit: Callable[[tuple[TensorEntry, ...], tuple[FileEntry, ...]], None],
    ) -> None:
        self._store = store
        self._base = base
        self._attempt = attempt
        self._rank = rank
        self._commit = commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer is of one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Object stores need no folders."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items, one file for the model and one for the optimizer."""
        pieces: dict[str, list[Piece]] = defaultdict(list)
        for item in plan.items:
            piece = _piece(item, planner)
            if piece.local.numel():
                pieces[item.index.fqn.split(".", 1)[0]].append(piece)
        streams = [self._write(part, pieces[part]) for part in sorted(pieces)]
        shards = {name: tuple(shards) for stream in streams for name, shards in stream.shards.items()}
        written = WrittenTensors(tuple(stream.file for stream in streams), shards)
        future: Future[list[WriteResult]] = Future()
        size = sum(file.size for file in written.files)
        future.set_result([WriteResult(MetadataIndex(self._attempt), size, written)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Put the ranks' parts together and commit them."""
        written: list[WrittenTensors] = [result.storage_data for rank in results for result in rank]
        shards: dict[str, list[ShardEntry]] = defaultdict(list)
        for part in written:
            for name, entries in part.shards.items():
                shards[name].extend(entries)
        tensors = [
            _tensor_entry(name, properties, shards[name])
            for name, properties in metadata.state_dict_metadata.items()
        ]
        files = [file for part in written for file in part.files]
        self._commit(tuple(sorted(tensors, key=lambda tensor: tensor.name)), tuple(files))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """A writer is made for a version; it is not found by an identifier."""
        return False

    def _write(self, part: str, pieces: Sequence[Piece]) -> SafetensorsStream:
        stream = SafetensorsStream(f"{self._attempt}/{part}-{self._rank:05d}.safetensors", pieces)
        key = f"{self._base}/{stream.path}"
        self._store.put(key, stream)
        # A store that lost a part must not be believed: what it says is there is compared with what was sent.
        size, header = self._store.size(key), self._store.get_range(key, 0, len(stream.header))
        if size != stream.file.size or header != stream.header:
            raise StoreError(f"{key} was not stored whole: {size} of {stream.file.size} bytes")
        return stream


class StoreReader(StorageReader):
    """Reads what a plan needs of a committed version; every range is verified before it is used.

    Attributes:
        num_bytes_read: Bytes that were read so far.
    """

    def __init__(self, store: ObjectStore, manifest: Manifest) -> None:
        self._store = store
        self._base = version_dir(manifest.name, manifest.version)
        self._tensors = {tensor.name: tensor for tensor in manifest.tensors}
        self._shards: dict[str, dict[tuple[int, ...], ShardEntry]] = {}
        self.num_bytes_read = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader is of one version."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The tensors of the manifest, as DCP describes them."""
        return Metadata(state_dict_metadata={name: _metadata(tensor) for name, tensor in self._tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The manifest says it all."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each block that an item needs once, verify it, and copy its boxes to where they belong."""
        items: dict[MetadataIndex, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            items[item.storage_index].append(item)
        wanted = [(self._tensors[index.fqn], self._shard_of(index)) for index in items]
        for tensor, shard, data in self.read(wanted):
            for item in items[MetadataIndex(tensor.name, torch.Size(shard.offsets))]:
                box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                target = planner.resolve_tensor(item).detach()
                target.copy_(data[box])
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def read(self, wanted: Iterable[Stored]) -> Iterator[tuple[TensorEntry, ShardEntry, torch.Tensor]]:
        """Read shards and verify them; those that lie side by side in a file come in one request.

        Raises:
            CheckpointDamagedError: Bytes are not those that were committed.
        """
        for run in _runs(wanted):
            start, data = run[0][1].start, self._get(run)
            for tensor, shard in run:
                part = memoryview(data)[shard.start - start : shard.end - start]
                self._check(tensor, shard, part)
                yield tensor, shard, from_bytes(part, tensor.dtype, shard.sizes)

    def _shard_of(self, index: MetadataIndex) -> ShardEntry:
        if index.fqn not in self._shards:
            self._shards[index.fqn] = {shard.offsets: shard for shard in self._tensors[index.fqn].shards}
        return self._shards[index.fqn][tuple(index.offset or ())]

    def _get(self, run: Sequence[Stored]) -> bytes:
        file, start, end = run[0][1].file, run[0][1].start, run[-1][1].end
        key = f"{self._base}/{file}"
        try:
            data = self._store.get_range(key, start, end)
        except NotFoundError:
            raise CheckpointDamagedError(f"{key} is missing", _HINT) from None
        self.num_bytes_read += len(data)
        return data

    def _check(self, tensor: TensorEntry, shard: ShardEntry, data: memoryview) -> None:
        if len(data) != shard.end - shard.start or hashlib.sha256(data).hexdigest() != shard.sha256:
            raise CheckpointDamagedError(
                f"{self._base}/{shard.file} is damaged: bytes {shard.start} to {shard.end}, which hold "
                f"{tensor.name}, are not those that were committed",
                _HINT,
            )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """A reader is made for a version; it is not found by an identifier."""
        return False


def save_together(tensors: Mapping[str, HostShard], writer: StorageWriter, peers: Peers) -> None:
    """Save on all ranks; it is committed on all or on none.

    `torch.distributed.checkpoint.save` is not used: it warns in a single process, and it pickles whatever a rank
    raised.

    Raises:
        StoreError: A rank failed, the same error on all; nothing is committed.
        PeersLostError: A rank did not answer in time.
    """
    planner = HostShardPlanner()
    metadata: list[Metadata] = []

    def local_plan() -> SavePlan:
        planner.set_up_planner(dict(tensors), None, peers.is_first)
        writer.set_up_storage_writer(peers.is_first)
        return writer.prepare_local_plan(planner.create_local_plan())

    def global_plan(plans: list[SavePlan]) -> list[SavePlan]:
        deduplicated, described = planner.create_global_plan(plans)
        metadata.append(described)
        return writer.prepare_global_plan(deduplicated)

    def finish(results: list[list[WriteResult]]) -> list[None]:
        writer.finish(metadata[0], results)
        return [None] * len(results)

    plan = planner.finish_plan(peers.together(local_plan, global_plan))
    peers.together(lambda: writer.write_data(plan, planner).wait(), finish)


def load_local(tensors: Mapping[str, torch.Tensor], reader: StorageReader) -> None:
    """Load this rank's part of tensors in place, without a word to the others."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(dict(tensors), metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    plan = planner.finish_plan(reader.prepare_global_plan(planner.create_global_plan([plan]))[0])
    reader.read_data(plan, planner).wait()


def _runs(wanted: Iterable[Stored]) -> Iterator[list[Stored]]:
    """Put shards together that lie side by side in a file, up to the size of a request."""
    run: list[Stored] = []
    for tensor, shard in sorted(wanted, key=lambda each: (each[1].file, each[1].start)):
        if run and not (
            shard.file == run[-1][1].file
            and shard.start == run[-1][1].end
            and shard.end - run[0][1].start <= _MAX_REQUEST_BYTES
        ):
            yield run
            run = []
        run.append((tensor, shard))
    if run:
        yield run


def _piece(item: WriteItem, planner: SavePlanner) -> Piece:
    assert item.tensor_data is not None
    local = planner.resolve_data(item)
    assert isinstance(local, torch.Tensor)
    return Piece(item.index.fqn, tuple(item.index.offset or ()), tuple(item.tensor_data.size), local)


def _tensor_entry(name: str, described: Any, shards: Sequence[ShardEntry]) -> TensorEntry:
    assert isinstance(described, TensorStorageMetadata)
    return TensorEntry(
        name=name,
        dtype=dtype_name(described.properties.dtype),
        shape=tuple(described.size),
        shards=tuple(sorted(shards, key=lambda shard: shard.offsets)),
    )


def _metadata(tensor: TensorEntry) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype_of(tensor.dtype)),
        size=torch.Size(tensor.shape),
        chunks=[ChunkStorageMetadata(torch.Size(s.offsets), torch.Size(s.sizes)) for s in tensor.shards],
    )
