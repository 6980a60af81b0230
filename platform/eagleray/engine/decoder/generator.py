"""A loaded model that decodes lists of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from eagleray.engine.decoder.families import UnknownModelError, build_network
from eagleray.engine.decoder.linear import Precision
from eagleray.engine.decoder.network import Decoder
from eagleray.engine.decoder.rules import DecodingRules, read_rules, unfollowed_settings
from eagleray.engine.decoder.session import DecodingSession
from eagleray.engine.options import DecodingOptions
from eagleray.engine.plan import BatchLimits


class NetworkGenerator:
    """Decodes with a network, under a checkpoint's generation config.

    Args:
        network: Computes.
        settings: `GenerationConfig.to_dict()`; everything in it is followed.
        limits: Rows at once.
    """

    is_stepwise = True
    """Whether rows may enter and leave while others are decoded."""

    def __init__(self, network: Decoder, settings: Mapping[str, Any], limits: BatchLimits) -> None:
        self._network, self._settings, self._limits = network, settings, limits

    @classmethod
    def of(cls, model: nn.Module, limits: BatchLimits, precision: Precision = "float32") -> NetworkGenerator:
        """Take over a Hugging Face model.

        Args:
            model: The model, in evaluation mode.
            limits: Rows at once.
            precision: Of the matrix products.

        Raises:
            UnknownModelError: The model or its generation config asks for what is not known here.
        """
        config = getattr(model, "generation_config", None)
        if config is None:
            raise UnknownModelError(f"a {type(model).__name__} has no generation config")
        settings = config.to_dict()
        if unfollowed := unfollowed_settings(settings):
            raise UnknownModelError(f"the generation config sets {', '.join(unfollowed)}")
        return cls(build_network(model, precision), settings, limits)

    def generate(self, sources: Sequence[Sequence[int]], options: DecodingOptions) -> list[list[int]]:
        """Return what is generated for each source, in their order.

        Args:
            sources: Tokens of each row, without padding, none of them empty.
            options: How to decode.
        """
        rules = self.rules(options)
        session = DecodingSession(self._network, rules, self._limits)
        order = sorted(range(len(sources)), key=lambda row: -len(sources[row]))
        for row in order:
            session.add(sources[row])
        rows: list[list[int]] = [[] for _ in sources]
        while not session.is_idle:
            for decoded in session.step():
                rows[order[decoded.ticket]] = [rules.start_token_id, *decoded.tokens]
        return rows

    @property
    def start_token_id(self) -> int:
        """What stands in front of every answer."""
        return self.rules(DecodingOptions()).start_token_id

    def session(self, options: DecodingOptions) -> DecodingSession:
        """Return a session that rows enter and leave, as many at once as the limits allow."""
        return DecodingSession(self._network, self.rules(options), self._limits, self._limits.max_items)

    def rules(self, options: DecodingOptions) -> DecodingRules:
        """Return how tokens are chosen under some options."""
        return read_rules(
            self._settings,
            num_beams=options.num_beams,
            max_new_tokens=options.max_new_tokens,
            forced_first=options.forced_bos_token_id,
        )
