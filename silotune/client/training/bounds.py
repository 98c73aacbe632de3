"""What a trainer may touch, by what it is for: the base model, the records of one dataset, a device.

Records in a database are read by the trainer itself: it may then connect to that one address. The
daemon finds the address out, since a trainer asks no name server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from silotune.client.training.base import TrainingJob
from silotune.data.site import DatasetConfig, ResourcesConfig, expand_url

_SOME_THREADS = 64
_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306, "mssql": 1433, "oracle": 1521}
_KEPT = (
    "PATH", "LANG", "LANGUAGE", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM",
)  # fmt: skip
_KEPT_KINDS = ("LC_", "OMP_", "MKL_", "OPENBLAS_", "CUDA_", "NVIDIA_", "PYTORCH_")


def bounds_of(job: TrainingJob, resources: ResourcesConfig, *, records: bool) -> dict[str, Any]:
    """What a process may read, reach and use, as JSON values; where it may write is added later.

    Parameters
    ----------
    job : TrainingJob
        What is to be trained on what.
    resources : ResourcesConfig
        Of the site.
    records : bool
        Whether it may read the records of the plan's dataset.
    """
    dataset = job.site.dataset(job.plan.data.dataset)
    read = [*_model_paths(job.base)]
    if records:
        read += _record_paths(job, dataset)
    return {
        "read": [str(path) for path in read],
        "reach": _address(job, dataset) if records else None,
        "threads": (resources.threads or os.cpu_count() or 1) * 8 + _SOME_THREADS,
        "memory": None if resources.memory_mb is None else resources.memory_mb * 1_000_000,
        "gpu": resources.device != "cpu",
    }


def environment(scratch: Path) -> dict[str, str]:
    """The environment of a trainer: of the daemon's what computing needs, and no secret."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or name.startswith(_KEPT_KINDS)
    }
    if "PYTHONPATH" in kept:
        paths = kept["PYTHONPATH"].split(os.pathsep)
        kept["PYTHONPATH"] = os.pathsep.join(str(Path(path).absolute()) for path in paths if path)
    place = str(scratch)
    return kept | {
        "HOME": place,
        "TMPDIR": place,
        "HF_HOME": place,
        "HF_HUB_CACHE": str(_hub_cache()),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def database_url(job: TrainingJob) -> str:
    """Where the records are, if they are in a database, with its password; else empty."""
    dataset = job.site.dataset(job.plan.data.dataset)
    return "" if dataset.url is None else expand_url(dataset.url)


def _hub_cache() -> Path:
    """Where Hugging Face's libraries keep models, as they find it."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser().absolute()


def _model_paths(base: str) -> Iterator[Path]:
    if not base:
        return
    folder = Path(base).expanduser()
    if not folder.is_dir():
        yield _hub_cache() / f"models--{base.replace('/', '--')}"
        return
    yield folder.resolve()
    for path in folder.iterdir():
        if path.is_symlink():
            yield path.resolve()


def _record_paths(job: TrainingJob, dataset: DatasetConfig) -> list[Path]:
    if dataset.path is not None:
        return [(job.site.folder / dataset.path).resolve()]
    url = urlsplit(database_url(job))
    if not url.scheme.startswith("sqlite"):
        return []
    file = (job.site.folder / url.path.removeprefix("/")).resolve()
    return [file, *(file.with_name(file.name + end) for end in ("-wal", "-shm", "-journal"))]


def _address(job: TrainingJob, dataset: DatasetConfig) -> list[Any] | None:
    """Host and port of a database; None if the records are in a file."""
    if dataset.url is None:
        return None
    url = urlsplit(database_url(job))
    kind = url.scheme.partition("+")[0]
    if kind == "sqlite":
        return None
    return [url.hostname or "localhost", url.port or _PORTS.get(kind, 0)]
