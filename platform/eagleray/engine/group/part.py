"""What one rank of a group holds of a model, and how it takes part in what the whole model does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from eagleray.engine.decoder.cache import KeyValueCache
from eagleray.engine.decoder.network import Network
from eagleray.engine.decoder.packing import Packing
from eagleray.engine.group.pipe import Pipe
from eagleray.parallel.stage import Stage

Change = tuple[Literal["keep", "reorder"], Sequence[Any]]
"""What happened to the rows of a cache since its last use: the arguments of `keep` or of `reorder`."""


class NetworkPart:
    """This rank's part of an encoder-decoder network, and the caches of its own layers.

    Args:
        network: The part.
        pipe: The way to the other stages.
        opens_decoder: Whether the decoder's first layer is here.
        tells_scores: Whether its scores are wanted: another rank may have the same ones.
    """

    def __init__(self, network: Network, pipe: Pipe, *, opens_decoder: bool, tells_scores: bool) -> None:
        self._network, self._pipe = network, pipe
        self._opens_decoder, self._tells_scores = opens_decoder, tells_scores
        self._caches: dict[int, KeyValueCache] = {}

    def admit(self, key: int, num_beams: int, num_slots: int, sources: Sequence[Sequence[int]]) -> None:
        """Encode rows and let them into a cache, which is made with its first ones."""
        if key not in self._caches:
            self._caches[key] = self._network.make_cache(num_beams, num_slots)
        cache, network, pipe = self._caches[key], self._network, self._pipe
        packing = Packing(sources, network.device)

        def compute() -> Sequence[Tensor]:
            x = network.embed_source(packing) if pipe.is_first else pipe.receive()[0]
            x = network.run_encoder(x, packing)
            if self._opens_decoder:
                x = network.close_source(x)
            network.join(x, packing, cache)
            return (x,)

        pipe.pass_on(compute)

    def step(self, key: int, tokens: Sequence[int]) -> Any:
        """Take one step; return this rank's part of the scores, where it has one, shape (N, V / ranks)."""
        cache, network, pipe = self._caches[key], self._network, self._pipe
        cache.begin_column()
        if not network.decoder:
            return None  # a stage of the encoder alone

        def compute() -> Sequence[Tensor]:
            if self._opens_decoder:
                x = network.embed_target(torch.tensor(tokens, device=network.device), cache)
            else:
                x = pipe.receive()[0]
            x = network.run_decoder(x, cache)
            return (network.score(x).float(),) if pipe.is_last else (x,)

        (result,) = pipe.pass_on(compute)
        return result.cpu().numpy() if self._tells_scores else None

    def change(self, key: int, changes: Sequence[Change]) -> None:
        """Follow what happened to the rows of a cache."""
        for kind, argument in changes:
            if kind == "keep":
                self._caches[key].keep(argument)
            else:
                self._caches[key].reorder(torch.tensor(argument, device=self._network.device))

    def drop(self, keys: Sequence[int]) -> None:
        """Let go of caches."""
        for key in keys:
            self._caches.pop(key, None)


class Part:
    """This rank's part of a model.

    Args:
        module: The model, cut over a tensor-parallel group, or a stage's layers under the names of the whole
            model; None: it is needed no more.
        stage: How a stage runs; None: there is one stage.
        pipe: The way to the other stages.
        network: What decodes; None: the model is called, or generates by itself.
        settings: Its generation config.
        device: Where it computes.
        is_first_shard: Whether this is the first of the ranks that the layers are cut over.
        num_bytes_read: Of the checkpoint.
    """

    def __init__(
        self,
        module: nn.Module | None,
        stage: Stage | None,
        pipe: Pipe,
        network: NetworkPart | None,
        settings: Mapping[str, Any] | None,
        device: torch.device,
        *,
        is_first_shard: bool,
        num_bytes_read: int,
    ) -> None:
        self.module, self.stage, self.pipe, self.network, self.settings = module, stage, pipe, network, settings
        self.device, self.is_first_shard, self.num_bytes_read = device, is_first_shard, num_bytes_read

    @property
    def speaks(self) -> bool:
        """Whether this rank tells what the whole model gives."""
        return self.pipe.is_last and self.is_first_shard

    def forward(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the model; return its output where this rank speaks.

        Raises:
            RuntimeError: Its weights are only those of the decoder, in another precision.
        """
        args, kwargs = _moved(args, self.device), _moved(kwargs, self.device)
        if self.module is None:
            raise RuntimeError("the model itself is not kept where serve.dtype is not float32")
        if self.stage is None:
            output = self.module(*args, **kwargs)
        else:
            output = self._run_stage(self.stage, kwargs)
        return _moved(output, torch.device("cpu")) if self.speaks else None

    def generate(self, kwargs: Mapping[str, Any]) -> Any:
        """Let transformers generate, on all ranks alike; return the tokens where this rank speaks."""
        hf_model: Any = self.module
        tokens_BT = hf_model.generate(**_moved(kwargs, self.device))
        return tokens_BT.cpu() if self.speaks else None

    def _run_stage(self, stage: Stage, kwargs: Mapping[str, Any]) -> Any:
        output: Any = None

        def compute() -> Sequence[Tensor]:
            nonlocal output
            stream = [] if self.pipe.is_first else self.pipe.receive()
            if self.pipe.is_last:
                output = stage.finish(stream, kwargs)
                return ()
            return stage.run(stream, kwargs)

        self.pipe.pass_on(compute)
        return output


def _moved(values: Any, device: torch.device) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, values)
