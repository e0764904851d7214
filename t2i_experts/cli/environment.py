"""What a machine has: packages, GPUs, memory, disk, and the parts that come with this package or as plugins."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

from t2i_experts import __version__
from t2i_experts.cli.findings import Finding, size
from t2i_experts.shards.parallel import cores

DISTRIBUTION = "t2i-experts"
EXTRAS = {
    "art": "draws the emoji that the embedded model is trained on",
    "bench": "the baselines of bench, and stage.codec.kind=autoencoder_kl",
    "parquet": "shards build from Parquet tables",
    "track": "training.trackers",
}
"""What an optional dependency is for; one that is not listed here goes by its extra's name. Those of `test` are for developers."""

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"  # of a checkout
_NAME, _BOUND, _EXTRA = re.compile(r"[A-Za-z0-9_.-]+"), re.compile(r">=\s*([0-9.]+)"), re.compile(r"extra == ['\"]([a-z0-9-]+)['\"]")


def packages() -> list[Finding]:
    """Python, this package, and each package that it needs or can use, against the lower bound that it declares."""
    rows = [Finding("python", f"{platform.python_version()} ({sys.executable})", platform.python_version())]
    rows.append(Finding(DISTRIBUTION, f"{__version__} ({Path(__file__).parents[1]})", __version__))
    try:
        requirements, needed = _requirements()
    except metadata.PackageNotFoundError:
        note = f"{DISTRIBUTION} is on the path but not installed, so what it needs is not known: install it with pip"
        return [*rows, Finding("requirements", "not known", note=note)]
    if _numbers(platform.python_version()) < _numbers(needed):
        rows[0] = Finding("python", rows[0].text, rows[0].value, problem=f"this is Python {rows[0].value}: install Python {needed}")
    seen: set[str] = set()
    for requirement in requirements:
        name, bound, extra = _NAME.match(requirement), _BOUND.search(requirement), _EXTRA.search(requirement)
        if name is None or bound is None or name[0] in seen or (extra and extra[1] == "test"):
            continue
        seen.add(name[0])
        rows.append(_package(name[0], bound[1], extra and extra[1]))
    return rows


def _requirements() -> tuple[list[str], str]:
    """What this package needs and can use, as its metadata lists it, and the Python that it needs.

    From pyproject.toml where that is beside the package: a checkout goes on, and the metadata of an editable installation stays behind.
    """
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8")).get("project", {}) if PYPROJECT.is_file() else {}
    if project.get("name") != DISTRIBUTION:  # another's may lie beside an installed package
        return metadata.requires(DISTRIBUTION) or [], metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    optional = [f"{one}; extra == '{extra}'" for extra, some in project["optional-dependencies"].items() for one in some]
    return [*project["dependencies"], *optional], project["requires-python"]


def _package(name: str, bound: str, extra: str | None) -> Finding:
    purpose = f"; optional: {EXTRAS.get(extra, f'for the extra {extra}')}" if extra else ""
    command = f'pip install "{name}>={bound}"'
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        problem = "" if extra else f"{name} is not installed: {command}"
        return Finding(name, f"not installed (>={bound}{purpose})" + (f": {command}" if extra else ""), {"needs": bound}, problem)
    old = _numbers(found) < _numbers(bound)
    value = {"version": found, "needs": bound}
    return Finding(name, f"{found} (>={bound}{purpose})", value, f"{name} {found} is older than {bound}: {command}" if old else "")


def _numbers(version: str) -> tuple[int, ...]:
    """Of a version, for comparison: those before any local or pre-release part, without zeros at the end."""
    numbers = [int(number) for number in re.findall(r"\d+", re.split(r"[+a-z]", version.lstrip(">=~ "))[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def devices() -> list[Finding]:
    """What torch can compute on."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only"
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    why = "; ".join(str(warning.message).split(". ")[0] for warning in complaints)
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    rows = [Finding("torch is built for", build)]
    if not available:
        problem = ""
        if driver:
            fault = f": {why}" if why else ""
            problem = f"an NVIDIA driver is here, but torch ({build}) cannot use it{fault}. Choose a build at pytorch.org/get-started"
        mps = torch.backends.mps.is_available()
        rows.append(Finding("GPU", "Apple's, through MPS" if mps else "none: all computes on the CPU", "mps" if mps else "none", problem))
    for i in range(torch.cuda.device_count() if available else 0):
        facts = torch.cuda.get_device_properties(i)
        bf16 = facts.major >= 8 or torch.version.hip is not None
        text = f"{facts.name}, {size(facts.total_memory)}, bfloat16 {'yes' if bf16 else 'no'}"
        value = {"name": facts.name, "memory": facts.total_memory, "bf16": bf16}
        rows.append(Finding(f"GPU {i}", text, value, note="" if bf16 else f"GPU {i} has no bfloat16: training.precision=fp32"))
    rows.append(Finding("CPU cores", str(cores()), cores()))
    rows.append(Finding("memory", size(main_memory()), main_memory()))
    return rows


def main_memory() -> int:
    """Bytes that processes here may use: the machine's, or the container's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total


def free_disk(folder: Path) -> int:
    """Bytes that are free where `folder` lies, or will."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def disks() -> list[Finding]:
    """Where there is room."""
    from t2i_experts.conditioning.presence import hub_cache

    places = {"working directory": Path.cwd(), "hub cache": hub_cache()}
    free = {name: free_disk(path) for name, path in places.items()}
    return [Finding(name, f"{size(free[name])} free in {path}", {"path": str(path), "free": free[name]}) for name, path in places.items()]


def parts() -> list[Finding]:
    """The embedded model, its encoders, and plugins."""
    from t2i_experts.cascade.model_folder import INDEX, embedded_model
    from t2i_experts.conditioning.presence import find_encoder
    from t2i_experts.config import EncoderConfig
    from t2i_experts.registry import registry
    from t2i_experts.registry.plugins import enabled

    whole = (embedded_model() / INDEX).is_file()
    note = "" if whole else "this version has no embedded model yet: generate needs --model"
    rows = [Finding("embedded model", str(embedded_model()) if whole else "none in this version", whole, note=note)]
    for name, kind in (("t5", "t5"), ("clip", "clip_text")):
        presence = find_encoder(EncoderConfig(kind, f"embedded:{name}"))
        text = f"{presence.place}, {size(presence.bytes)}" if presence.place else "missing"
        rows.append(Finding(f"embedded {name}", text, str(presence.place), presence.remedy))
    for plugin in registry.plugins():
        added = ", ".join(f"{kind} {name}" for kind, name in plugin.added) or "nothing"
        problem = f"the plugin {plugin} was skipped: {plugin.error}. Repair it, or pip uninstall {plugin.distribution}"
        text = f"failed: {plugin.error}" if plugin.error else f"adds {added}"
        rows.append(Finding(f"plugin {plugin.name}", text, plugin.error or "ok", problem if plugin.error else ""))
    if not enabled():
        rows.append(Finding("plugins", "turned off: T2I_PLUGINS=0", "off"))
    return rows
