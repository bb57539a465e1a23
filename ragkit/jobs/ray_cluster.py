"""The connection to a Ray cluster: an existing one by its address, or one that is started on this machine for the job.

Anyone who can reach a Ray cluster without authentication can run code on it, so token authentication is on unless the
environment says otherwise, the dashboard stays off, and nothing is reported to anybody.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ragkit.config import Device
from ragkit.errors import JobError, MissingExtraError, UsageError
from ragkit.jobs_config import JobsConfig

# What jobs hold in Ray's object store at once is bounded, so a started cluster needs no third of the machine's memory.
_OBJECT_STORE_BYTES = 512 << 20
_CONNECT_S = 10.0

logger = logging.getLogger(__name__)


def import_ray() -> ModuleType:
    """Return the module `ray`, imported with authentication on and usage reports off.

    Raises:
        MissingExtraError: it is not installed.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported; workers inherit it
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # workers of no GPU may still see that there is none
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # Ray prints to stdout, where our results go
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--engine ray needs Ray: pip install 'ragkit[ray]'") from error
    _obey_environment()
    return ray  # type: ignore[no-any-return]


def _obey_environment() -> None:
    """Have Ray read its settings again where the program imported it before the environment was set."""
    raylet: Any = import_module("ray._raylet")
    token = raylet.AuthenticationMode.TOKEN
    if os.environ["RAY_AUTH_MODE"].lower() == "token" and raylet.get_authentication_mode() != token:
        raylet.Config.initialize("")
        if raylet.get_authentication_mode() != token:
            raise JobError("Ray was imported without authentication: set RAY_AUTH_MODE=token before the program starts")


class RayCluster:
    """A connection, made when it is first needed. A context manager: leaving it ends a cluster that was started for it.

    A connection that the process has already is used and left as it is.

    Args:
        config: the address, and how many cores a worker takes.

    Attributes:
        ray: the module.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, config: JobsConfig) -> None:
        self.ray = import_ray()
        self._config = config
        self._is_ours = False

    def connect(self) -> None:
        """Make the connection, if there is none yet.

        Raises:
            JobError: no cluster answers at the address, or it refuses the token.
        """
        if not self.ray.is_initialized():
            self._connect(self._config.ray_address or os.environ.get("RAY_ADDRESS", ""))
            self._is_ours = True

    @property
    def worker_cpus(self) -> float:
        """CPU cores that a worker takes."""
        return self._config.ray_cpus

    def room(self) -> int:
        """Return how many workers the CPU cores of all nodes have room for, beside one core for each GPU."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return sum(int(max(0, node.get("CPU", 0) - node.get("GPU", 0)) // self.worker_cpus) for node in nodes)

    def gpus(self, device: Device) -> int:
        """Return how many GPUs workers may use: the cluster's, none on the device `cpu`.

        Raises:
            UsageError: the device `cuda` is asked for, and the cluster has none.
        """
        found = int(self.ray.cluster_resources().get("GPU", 0))
        if device is Device.CUDA and not found:
            raise UsageError(
                "--device cuda needs a GPU, and the Ray cluster has none: add a node with one, or --device cpu"
            )
        return 0 if device is Device.CPU else found

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            self._is_ours = False
            self.ray.shutdown()

    def _connect(self, address: str) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        if address:
            _refuse_silent(address)
            options["address"] = address
        else:
            _give_token()
            options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        try:
            # Ray puts the driver's working folder on its workers' module path. In a checkout that folder holds
            # folders named like our packages, which would hide the installed ones.
            with contextlib.chdir("/"), _own_signals():
                self.ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError, self.ray.exceptions.RayError) as error:
            where = f"the Ray cluster at {address!r} cannot be used" if address else "Ray could not be started here"
            reason = " ".join(str(error).split())[:300]
            raise JobError(
                f"{where}: {reason}; check --ray-address, and that RAY_AUTH_TOKEN (or the file that "
                "RAY_AUTH_TOKEN_PATH names) is the cluster's token"
            ) from error


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the program's handler of SIGTERM, which Ray replaces by one that leaves at once."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _refuse_silent(address: str) -> None:
    """Raise `JobError` where nothing answers at an address: Ray would end the process after a while."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            return
    except (OSError, ValueError, OverflowError) as error:
        raise JobError(
            f"the Ray cluster at {address!r} cannot be used: {error}; --ray-address takes HOST:PORT of its head node"
        ) from error


def _give_token() -> None:
    """Set a token for a cluster of this process, where none is set: it lives as long as the process."""
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if os.environ["RAY_AUTH_MODE"] == "token" and not named and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
