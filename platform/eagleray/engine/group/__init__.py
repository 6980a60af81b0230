"""One model over several processes: tensor-parallel shards, pipeline stages, or both. Plain torch and sockets.

::

    group, check     from a committed version to an engine whose weights lie on ranks; what is refused
    led              what that engine drives in its own process: network, cache, model without weights
    link, wire       commands to all ranks, their results, and who is still there
    rank, load       a rank's process: it reads its own ranges, cut before there is memory
    part, pipe       a rank's share of a command, and what stages pass on
    commands         what all ranks do in the same order

The leader holds no weights and decides everything (which rows run, which tokens are chosen); ranks compute and
follow. So whatever an engine does in one process, a group does too: rows that enter and leave, streams, beams.
"""

from eagleray.engine.group.check import check_group, group_layout
from eagleray.engine.group.group import GroupPlace, Launch, Ranks, load_group
from eagleray.engine.group.rank import run_rank
from eagleray.engine.group.wire import RankSpec

__all__ = ["GroupPlace", "Launch", "RankSpec", "Ranks", "check_group", "group_layout", "load_group", "run_rank"]
