"""The Ray cluster of a render: joined, or started on this machine and reachable from nowhere else."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

JOIN_TIMEOUT_S = 5.0
# with no clusters allowed, as is Ray's default on a desktop, it binds every socket to 127.0.0.1
CLUSTERS_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one attempt asks of the cluster."""

    num_ranks: int
    device: Literal["cpu", "cuda"]

    def bundles(self) -> list[dict[str, float]]:
        """Resources per rank, and of the decoder last."""
        rank = {"CPU": 1.0, "GPU": 1.0} if self.device == "cuda" else {"CPU": 1.0}
        return [dict(rank) for _ in range(self.num_ranks)] + [{"CPU": 1.0}]

    def total(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for bundle in self.bundles():
            for name, amount in bundle.items():
                found[name] = found.get(name, 0) + amount
        return found


@contextmanager
def connected(address: str | None, num_ranks: int | None) -> Iterator[None]:
    """Within, Ray is there: the cluster at `address`, one that the caller has joined, or a local one.

    A local one has room for `num_ranks` (default: one per core): ranks on a CPU may share cores.
    ValueError in one line when there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # its 15 lets anything else on the machine go first
    # its warning about a future default is for those who set it
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    with _ray_set(loopback_only=address is None):
        _connect(address, num_ranks)
        try:
            yield
        finally:
            ray.shutdown()


def _connect(address: str | None, num_ranks: int | None) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None:
        _check_reachable(address)
        try:
            ray.init(address=address, **quiet)
        except Exception as error:
            raise ValueError(f"address={address}: cannot be joined: {str(error).splitlines()[0]}") from error
    else:
        ranks = num_ranks or local_ranks()
        ray.init(
            address="local", include_dashboard=False, num_cpus=max(ranks + 1, os.cpu_count() or 1), **quiet
        )
        _let_agents_end()
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's C++ part put one that prints a trace before ours


def _let_agents_end() -> None:
    """Make Ray's agents go when the raylet was killed, as it is when this process is.

    They look in its log for why it ended, and unless it was asked to, they try for a minute to tell a server
    that is gone as well.
    """
    from ray._private import worker

    node: Any = worker._global_node
    log = Path(node.get_logs_dir_path(), "raylet.out")
    with log.open("a", encoding="utf-8") as file:
        file.write("vidgen: so that the agents do not outlive a killed driver: Raylet received SIGTERM\n")


@contextmanager
def _ray_set(*, loopback_only: bool) -> Iterator[None]:
    """Within, Ray keeps to loopback if asked to, does not print what happens to workers on our stdout, and
    leaves SIGTERM to us.

    It has no settings for these, so its internals are set: the variable is for the processes it starts.
    """
    from ray._private import ray_constants, utils, worker

    before = ray_constants.ENABLE_RAY_CLUSTER, worker.print_to_stdstream, os.environ.get(CLUSTERS_VARIABLE)
    set_sigterm_handler = utils.set_sigterm_handler
    worker.print_to_stdstream = lambda *_, **__: None
    utils.set_sigterm_handler = lambda *_: None
    if loopback_only:
        ray_constants.ENABLE_RAY_CLUSTER = False
        os.environ[CLUSTERS_VARIABLE] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER, worker.print_to_stdstream, variable = before
        utils.set_sigterm_handler = set_sigterm_handler
        os.environ.pop(CLUSTERS_VARIABLE, None)
        if variable is not None:
            os.environ[CLUSTERS_VARIABLE] = variable


def wanted_address(address: str | None) -> str | None:
    """The address of the cluster to join: the given one, else RAY_ADDRESS, else none."""
    return address or os.environ.get("RAY_ADDRESS") or None


def local_ranks() -> int:
    """Ranks that this machine has room for: its GPUs, else the cores that this process may use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def offered_ranks(device: Literal["cpu", "cuda"]) -> int:
    """How many ranks the connected cluster has room for now, beside a decoder."""
    import ray

    free = ray.available_resources()
    if device == "cuda":
        return int(min(free.get("GPU", 0), free.get("CPU", 0) - 1))
    return int(free.get("CPU", 0)) - 1


def has_gpus() -> bool:
    """Whether the connected cluster has any."""
    import ray

    return ray.cluster_resources().get("GPU", 0) >= 1


def check_room(needs: Needs) -> None:
    """ValueError with what is needed against what there is, when the cluster can never have that much."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    needed = needs.total()
    if all(total.get(name, 0) >= amount for name, amount in needed.items()):
        return
    shown = ", ".join(
        f"{amount:g} {name} (the cluster has {total.get(name, 0):g}, {free.get(name, 0):g} free)"
        for name, amount in needed.items()
    )
    raise ValueError(
        f"ranks={needs.num_ranks}: need {shown}, one for the decoder; take fewer ranks or --ranks auto"
    )


def _check_reachable(address: str) -> None:
    """ValueError unless something listens there: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ValueError(
            f"address={address}: need HOST:PORT of a Ray head node (such as 10.0.0.1:6379), or auto"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=JOIN_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"address={address}: no Ray cluster answers there ({error}); start one with `ray start --head`, "
            "or leave --address out to run on this machine"
        ) from error
