import pytest

from ragkit.errors import StoreError
from ragkit.store import Store, filesystem

MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/export /mnt/team\\040files nfs4 rw 0 0
tmpfs /mnt/team\\040files/fast tmpfs rw 0 0
//nas/share /mnt/nas cifs rw 0 0
"""


@pytest.fixture
def mounts(tmp_path):
    path = tmp_path / "mounts"
    path.write_text(MOUNTS)
    return path


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/x", "ext4"),
        ("/mnt/team files/a/b", "nfs4"),
        ("/mnt/team files/fast/b", "tmpfs"),
        ("/mnt/team files2", "ext4"),
        ("/mnt/nas", "cifs"),
    ],
)
def test_the_innermost_mount_says_which_file_system_holds_a_folder(mounts, folder, kind):
    from pathlib import Path

    assert filesystem.filesystem_type(Path(folder), mounts) == kind


def test_without_a_mount_table_the_file_system_is_unknown(tmp_path):
    assert filesystem.filesystem_type(tmp_path, tmp_path / "absent") == ""


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs"])
def test_a_store_on_a_network_file_system_is_refused_with_the_reason(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(filesystem, "filesystem_type", lambda folder: kind)
    with pytest.raises(StoreError, match=rf"network file system \({kind}\).*write-ahead log.*local disk"):
        Store.create(tmp_path / "s")
    assert not Store.exists(tmp_path / "s")


def test_an_existing_store_that_moved_to_a_network_file_system_is_refused(tmp_path, monkeypatch):
    Store.create(tmp_path / "s").close()
    monkeypatch.setattr(filesystem, "filesystem_type", lambda folder: "nfs")
    with pytest.raises(StoreError, match="network file system"):
        Store.open(tmp_path / "s")
