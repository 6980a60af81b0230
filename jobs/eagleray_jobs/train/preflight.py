"""What can be refused at once: before Ray is started, before torch is imported, before a run is claimed."""

from __future__ import annotations

from pathlib import Path

from eagleray.cluster import check_local, find_address, probe
from eagleray.config.crosschecks import layout_of
from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.errors import ResourceError, StoreURIError
from eagleray.resources import ResourceRequest, count_gpus
from eagleray.user_code import python_paths


def workers_request(config: RunConfig, layout: Layout, *, use_gpu: bool) -> ResourceRequest:
    """Return what the workers of a run ask of a cluster."""
    bundle = dict(config.resources.resources_per_worker)
    if use_gpu:
        bundle.setdefault("GPU", 1.0)
    return ResourceRequest(layout.num_workers, bundle)


def check(config: RunConfig, address: str | None) -> None:
    """Refuse what cannot work.

    Args:
        config: The file.
        address: What `--address` says.

    Raises:
        ConfigError: The degrees do not fit, or `code:` names no directory.
        ResourceError: This machine has less than the workers ask for, or no GPU for what needs one.
        StoreURIError: The store is relative, and the cluster is not ours alone.
        UsageError: Nothing answers at the address.
    """
    layout, target = layout_of(config), find_address(address)
    python_paths(config.code)
    if target is None:
        check_local(workers_request(config, layout, use_gpu=config.resources.use_gpu is True))
        if config.resources.use_gpu == "auto":
            check_gpus(config, "this machine", has_gpus=count_gpus() > 0)
    else:
        if config.store is not None:
            check_absolute(config.store)
        probe(target)  # before the run is claimed


def check_gpus(config: RunConfig, where: str, *, has_gpus: bool) -> None:
    """Refuse what CPUs cannot do, where the workers would compute on them.

    Raises:
        ResourceError: There is no GPU for fp16, or none to offload from.
    """
    if has_gpus:
        return
    if config.train is not None and config.train.fp16:
        raise ResourceError(
            f"train.fp16 needs GPUs, but {where} has none",
            "Set train.bf16 instead, or train on a cluster with GPUs (--address).",
        )
    if config.parallel.cpu_offload:
        raise ResourceError(
            f"parallel.cpu_offload needs GPUs, but {where} has none: the weights are in the host's memory already",
            "Leave it out, or train on a cluster with GPUs (--address).",
        )


def check_absolute(store: str) -> None:
    """Refuse a relative store on a joined cluster: on every node it would be another directory.

    Raises:
        StoreURIError: It is relative.
    """
    if "://" not in store and not Path(store).is_absolute():
        raise StoreURIError(
            f"the store {store} is a relative path, which is another directory on every node of a cluster",
            "Give --store, EAGLERAY_STORE or `store:` a shared absolute path, or s3:// or gs://.",
        )
