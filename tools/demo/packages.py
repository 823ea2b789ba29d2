"""Fetch Debian packages and unpack them into a cache folder, without installing anything."""

from __future__ import annotations

import subprocess
from pathlib import Path


def unpack(package: str, cache: Path) -> Path:
    """Return the folder that holds the files of ``package``, fetching and unpacking it on first use."""
    target = cache / "unpacked" / package
    done = cache / "unpacked" / f"{package}.done"
    if done.exists():
        return target
    archives = cache / "debs"
    archives.mkdir(parents=True, exist_ok=True)
    target.mkdir(parents=True, exist_ok=True)
    if not list(archives.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=archives, check=True)
    archive = sorted(archives.glob(f"{package}_*.deb"))[-1]
    subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
    # The name carries the version, which the model card reports.
    done.write_text(archive.name)
    return target


def version(package: str, cache: Path) -> str:
    """Return the version of an unpacked package."""
    name = (cache / "unpacked" / f"{package}.done").read_text()
    return name.split("_")[1].replace("%3a", ":")
