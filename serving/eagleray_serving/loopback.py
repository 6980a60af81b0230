"""Keeps what Serve opens by itself off the network."""

from __future__ import annotations

import logging
from typing import Any

from eagleray_serving.front import LOOPBACK

logger = logging.getLogger(__name__)

ALL_INTERFACES = "[::]:"


def keep_on_loopback() -> None:
    """Bind this replica's internal port to loopback where its node is on loopback; called by its constructor.

    Every replica of Serve opens a gRPC port on all interfaces, which unpickles what it is sent and asks for no
    token: whoever reaches it runs code here. There is no setting for it; a test looks at the ports of a server.
    """
    import ray
    from ray.serve._private import replica

    if ray.util.get_node_ip_address() != LOOPBACK:
        return  # a cluster of several machines: its replicas must reach each other, its network keeps others out
    bind = getattr(replica, "add_port_to_grpc_server", None)
    if bind is None:
        logger.warning("this version of Ray opens its replicas' port elsewhere: it may be reachable from outside")
        return

    def bind_to_loopback(server: Any, address: str) -> int:
        return int(bind(server, address.replace(ALL_INTERFACES, f"{LOOPBACK}:")))

    replica.add_port_to_grpc_server = bind_to_loopback
