"""How the kernel is compiled and kept: no damaged and no planted file is ever loaded."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lstm_flax.models.native import build

REAL = shutil.which("g++") or shutil.which("c++")

COMPUTE = """
import hashlib, json, sys, tempfile
from pathlib import Path
import jax, numpy as np
from lstm_flax.models.native import build
from lstm_flax import LSTMStack

found = build.load()
x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
lstm = LSTMStack(8, implementation="auto")
outputs, _ = lstm.apply(lstm.init(jax.random.key(0), x), x)
left = [path.name for path in Path(tempfile.gettempdir()).glob("lstm_flax_*")]
print(json.dumps([found, hashlib.sha256(np.asarray(outputs)).hexdigest(), left]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache folder, not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lstm_flax"


def kept(key, code):
    build.keep(build.cache_folder(), key, code)
    return build.find(build.cache_folder(), key)


def test_what_is_kept_is_found_by_its_key(folder):
    assert kept("a", b"code").read_bytes() == b"code"
    assert kept("b", b"other").read_bytes() == b"other"
    assert build.find(folder, "a").read_bytes() == b"code"
    assert build.find(folder, "c") is None
    assert len(list(folder.iterdir())) == 2  # nothing unfinished


def test_of_a_damaged_one_it_keeps_a_new_one(folder):
    code = bytes(range(256)) * 40
    path = kept("a", code)
    for cut in range(0, len(code), 97):
        path.write_bytes(code[:cut])
        assert build.find(folder, "a") is None
        assert kept("a", code) == path
    for bit in range(0, 8 * len(code), 997):
        damaged = bytearray(code)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert build.find(folder, "a") is None
    path.write_bytes(code + b"more")
    assert build.find(folder, "a") is None
    assert kept("a", code) == path


def test_it_is_on_the_disk_before_it_has_its_name(folder, monkeypatch):
    steps = []

    def fsync(handle, real=os.fsync):
        what = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        steps.append((what, len(list(folder.glob("*.so")))))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    assert kept("a", b"code")
    assert steps == [("file", 0), ("folder", 1)]


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_nobody_else_may_write_whatever_the_umask(folder, umask):
    before = os.umask(umask)
    try:
        path = kept("a", b"code")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_not_trusted(folder, mode):
    assert kept("a", b"code")
    folder.chmod(mode)
    assert build.cache_folder() is None


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_to_is_not_trusted(folder, mode):
    kept("a", b"code").chmod(mode)
    assert build.find(folder, "a") is None


def test_links_are_not_followed(folder, tmp_path):
    path = kept("a", b"code")
    path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(tmp_path / "elsewhere.so")
    assert build.find(folder, "a") is None
    folder.rename(tmp_path / "other")
    folder.symlink_to(tmp_path / "other")
    assert build.cache_folder() is None


def test_other_kinds_of_file_are_not_read(folder):
    path = kept("a", b"code")
    path.unlink()
    os.mkfifo(path)
    assert build.find(folder, "a") is None
    path.unlink()
    path.mkdir()
    assert build.find(folder, "a") is None
    build.keep(folder, "a", b"code")  # can't, and says nothing


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_what_belongs_to_another_user_is_not_trusted(folder):
    path = kept("a", b"code")
    os.chown(path, 65534, 65534)
    assert build.find(folder, "a") is None
    os.chown(folder, 65534, 65534)
    assert build.cache_folder() is None


@pytest.mark.parametrize("named", ["", "relative", "./cache", "../cache"])
def test_a_relative_cache_folder_is_ignored(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.cache_folder() == tmp_path / "home" / ".cache" / "lstm_flax"
    monkeypatch.setenv("HOME", "nowhere")
    assert build.cache_folder() is None
    assert sorted(tmp_path.iterdir()) == [tmp_path / "home"]


def test_without_a_home_nothing_is_kept(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert build.cache_folder() is None
    build.keep(None, "a", b"code")
    assert build.find(None, "a") is None


@pytest.mark.parametrize(
    ("named", "starts"),
    [("g++ -m64", ["-m64"]), ("env 'g++'", ["g++"]), ("  ", []), (None, [])],
)
def test_cxx_may_have_arguments(monkeypatch, named, starts):
    monkeypatch.delenv("CXX", raising=False)
    if named is not None:
        monkeypatch.setenv("CXX", named)
    program, *rest = build._command()
    assert Path(program).is_absolute()
    assert rest[: len(starts) + 1] == [*starts, build.FLAGS[0]]


@pytest.mark.parametrize("named", ["no-such-compiler", "'open quote", "false", "ls; true"])
def test_no_compiler_is_a_reason_in_one_line(folder, monkeypatch, named):
    monkeypatch.setenv("CXX", named)
    reason = build._load.__wrapped__()
    assert isinstance(reason, str)
    assert reason
    assert "\n" not in reason


def compute(**variables):
    """`(dtypes, the outputs' hash, folders left behind)` of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", COMPUTE],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_fresh_processes_compute_the_same_whatever_was_kept(tmp_path):
    """By one that is kept, by one cut off, and, where there is no folder, by a private one."""
    variables = {"XDG_CACHE_HOME": tmp_path / "cache", "TMPDIR": tmp_path, build.MORE_FLAGS: "-O0"}
    expected = compute(**variables, CXX=f"{REAL} -pipe")
    (path,) = (tmp_path / "cache" / "lstm_flax").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert compute(**variables, CXX=f"{REAL} -pipe") == expected
    assert path.read_bytes() == whole
    path.write_bytes(b"")
    path.parent.chmod(0o770)
    assert compute(**variables, CXX=f"{REAL} -pipe") == expected
    assert path.read_bytes() == b""
    assert '["float32"' in expected
    assert expected.endswith(" []]")
