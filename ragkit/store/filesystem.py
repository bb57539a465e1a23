"""Which kind of file system a folder lies on: SQLite's WAL needs shared memory, which network ones do not give."""

from __future__ import annotations

from pathlib import Path

from ragkit.errors import StoreError

_NETWORK = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "afs",
        "ceph",
        "lustre",
        "glusterfs",
        "beegfs",
        "gpfs",
        "orangefs",
        "coda",
        "ncpfs",
        "davfs",
        "fuse.sshfs",
        "fuse.glusterfs",
        "fuse.ceph",
        "fuse.s3fs",
        "fuse.rclone",
        "fuse.davfs2",
        "fuse.gcsfuse",
        "fuse.mountpoint-s3",
    }
)


def filesystem_type(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Return the kernel's name of the file system that holds `folder` ("ext4"), or "" where it cannot be told."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    place = folder.resolve()
    best, kind = -1, ""
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = Path(_unescape(fields[1]))
        # a later mount on the same point hides the earlier one
        if (place == mount or mount in place.parents) and len(mount.parts) >= best:
            best, kind = len(mount.parts), fields[2]
    return kind


def refuse_network_folder(folder: Path) -> None:
    """Raise `StoreError` where `folder` lies on a network file system."""
    kind = filesystem_type(folder)
    if kind in _NETWORK:
        raise StoreError(
            f"the store {folder} lies on a network file system ({kind}), where SQLite's write-ahead log can lose data; "
            "put the store on a local disk (--store DIR or RAGKIT_STORE)"
        )


def _unescape(field: str) -> str:
    for code in ("\\040", "\\011", "\\012", "\\134"):  # the four characters that the kernel escapes in mount points
        field = field.replace(code, chr(int(code[1:], 8)))
    return field
