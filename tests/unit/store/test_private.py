"""Files that are being made are nobody else's, under the worst umask and with links planted where they go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pear_data.errors import PearError
from pear_data.stages.export.folder import whole_folder
from pear_data.store import writable_store
from pear_data.store.commit import atomic_path
from pear_data.store.private import create_private, private_folder


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_file_is_private_until_it_is_whole_and_then_as_the_umask_says(tmp_path, umask):
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("half")
        assert mode(temporary) == 0o600
    assert mode(tmp_path / "file") == 0o666 & ~umask


def test_an_export_is_private_until_it_is_whole_and_then_as_the_umask_says(tmp_path, umask):
    with whole_folder(tmp_path / "out") as partial:
        assert mode(partial) == 0o700
        (partial / "train-00000.parquet").write_bytes(b"")
    assert mode(tmp_path / "out") == 0o777 & ~umask


def test_nothing_is_written_through_a_planted_link(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    link = tmp_path / "link"
    link.symlink_to(precious / "file")
    with pytest.raises(FileExistsError):
        create_private(link)
    (tmp_path / "folder").symlink_to(precious)
    with pytest.raises(FileExistsError):
        private_folder(tmp_path / "folder")
    (tmp_path / ".out.pear_export").symlink_to(precious)
    with (
        pytest.raises(PearError, match="cannot write .*: File exists; remove it"),
        whole_folder(tmp_path / "out"),
    ):
        pass
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".lock").symlink_to(precious / "file")
    with pytest.raises(PearError, match="cannot write to"), writable_store(tmp_path / "store", create=True):
        pass
    assert (precious / "file").read_text() == "kept"
    assert mode(precious) & 0o055
