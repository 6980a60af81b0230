"""Our own decoding of encoder-decoder models: what transformers' `generate` gives, token for token, sooner.

::

    families, marian, t5     a model's weights -> network; cut: those of a rank
    network                  encoder pass, one decoder step
    packing, cache           sources without padding; keys and values of the rows that run
    rules, greedy, beam      a generation config -> rules -> the next tokens
    session                  schedule, run, postprocess: rows leave and enter while others go on
    generator                all of it for a list of rows
"""

from eagleray.engine.decoder.families import UnknownModelError
from eagleray.engine.decoder.generator import NetworkGenerator
from eagleray.engine.decoder.session import Decoded, DecodingSession

__all__ = ["Decoded", "DecodingSession", "NetworkGenerator", "UnknownModelError"]
