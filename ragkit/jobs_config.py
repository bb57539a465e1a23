"""The settings of jobs: what runs the steps of an ingest or a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from ragkit.errors import ConfigError


class ExecutorName(StrEnum):
    """What runs a job's steps: this process, or the workers of a Ray cluster."""

    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True, slots=True)
class JobsConfig:
    """How jobs are run.

    Attributes:
        engine: local, or ray.
        ray_address: the cluster's, such as `10.0.0.1:6379`; `auto` finds one that runs on this machine. Where it is
            empty, RAY_ADDRESS names the cluster, and without that one starts on this machine for the job.
        ray_cpus: CPU cores that a worker takes, and so the threads that its models may use.
    """

    engine: ExecutorName = ExecutorName.LOCAL
    ray_address: str = ""
    ray_cpus: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ray_cpus) and self.ray_cpus > 0):
            raise ConfigError(f"jobs.ray_cpus must be a finite number > 0, got {self.ray_cpus}")
