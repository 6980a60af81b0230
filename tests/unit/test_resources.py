"""What a run asks of a cluster, and whether the cluster has it."""

from __future__ import annotations

import pytest

from eagleray.cluster import check_local, find_address
from eagleray.errors import ResourceError, UsageError
from eagleray.resources import ResourceRequest, count_cpus, find_shortage


def test_what_fits_exactly_is_no_shortage() -> None:
    request = ResourceRequest(4, {"CPU": 0.5})
    assert find_shortage(request, [{"CPU": 1.0}, {"CPU": 1.0}], "the cluster") is None


def test_a_shortage_names_what_is_asked_what_there_is_and_what_to_set() -> None:
    shortage = find_shortage(ResourceRequest(4, {"CPU": 1.0}), [{"CPU": 2.0}], "this machine")
    assert shortage is not None
    assert shortage.message == "4 workers x CPU 1 = CPU 4, but this machine has CPU 2"
    assert shortage.hint == "Set resources.resources_per_worker.CPU to at most 0.5, or ask for fewer workers."
    assert shortage.missing == {"CPU": 2.0}


def test_bundles_larger_than_every_node_are_a_shortage_though_the_sum_would_do() -> None:
    shortage = find_shortage(ResourceRequest(2, {"CPU": 3.0}), [{"CPU": 2.0}] * 4, "the cluster")
    assert shortage is not None
    assert "only 0 of them do" in shortage.message


def test_gpus_are_counted_with_the_cpus_of_the_same_node() -> None:
    nodes = [{"CPU": 8.0}, {"CPU": 1.0, "GPU": 4.0}]
    shortage = find_shortage(ResourceRequest(2, {"CPU": 1.0, "GPU": 1.0}), nodes, "the cluster")
    assert shortage is not None
    assert "only 1 of them do" in shortage.message


def test_more_cpus_than_this_machine_has_are_refused_without_ray() -> None:
    with pytest.raises(ResourceError, match=f"this machine has CPU {count_cpus()}\n") as caught:
        check_local(ResourceRequest(1000, {"CPU": 1.0}))
    assert caught.value.exit_code == 2


def test_ray_client_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(UsageError, match="eagleray jobs submit"):
        find_address("ray://10.0.0.1:10001")
