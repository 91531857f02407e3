"""A read-only FUSE file system over one flat directory, which fails as it is told: `python faulty_fs.py SOURCE MOUNT CONTROL`.

It speaks the kernel's protocol through /dev/fuse and needs no library. Linux, root. Files are opened with FOPEN_DIRECT_IO, so
that every read of a program comes here, whatever is in the page cache. Source: linux/fuse.h, protocol 7.31.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import stat
import struct
import sys
import threading
import time
from pathlib import Path

IN_HEADER, OUT_HEADER = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
ATTRIBUTES = struct.Struct("<6Q10I")
READ = struct.Struct("<QQIIQII")
LOOKUP, FORGET, GETATTR, OPEN, STAT_FS, RELEASE, FLUSH = 1, 2, 3, 14, 17, 18, 25
READ_FILE, INIT, OPEN_FOLDER, READ_FOLDER, CLOSE_FOLDER, INTERRUPT, BATCH_FORGET = 15, 26, 27, 28, 29, 36, 42
UNANSWERED = (FORGET, BATCH_FORGET, INTERRUPT)
DIRECT_IO, ASYNC_READ = 1, 1
LARGEST = 1 << 20
THREADS = 12
FOREVER_S = 3600
MNT_DETACH, PR_SET_PDEATHSIG = 2, 1


class Control(ctypes.Structure):
    """What a test and the file system share.

    Args:
        bad_start, bad_end: bytes of every file whose read is EIO.
        short_bytes: the most that one read gives; 0 gives all.
        delay_us: of every read.
        hanging: reads of weights wait while it is not 0.
        waiting: reads that wait.
        reads: of weights.
    """

    _fields_ = tuple(
        (name, ctypes.c_longlong)
        for name in ("bad_start", "bad_end", "short_bytes", "delay_us", "hanging", "waiting", "reads")
    )


class FaultyFolder:
    """Answers of the file system; node 1 is the folder, the others its files in order."""

    def __init__(self, source: Path, control: Control) -> None:
        self._files = [os.open(path, os.O_RDONLY) for path in sorted(source.iterdir()) if path.is_file()]
        self._names = [path.name for path in sorted(source.iterdir()) if path.is_file()]
        self._control = control
        self._lock = threading.Lock()

    def answer(self, opcode: int, node: int, body: bytes) -> bytes:
        """What follows the header.

        Raises:
            OSError: as the caller is to see it.
        """
        if opcode == INIT:
            _, _, ahead, _ = struct.unpack_from("<IIII", body)
            return struct.pack("<IIIIHHIIHHI7I", 7, 31, ahead, ASYNC_READ, 16, 12, LARGEST, 1, 256, 0, 0, *[0] * 7)
        if opcode == LOOKUP:
            name = body.rstrip(b"\0").decode()
            if name not in self._names:
                raise OSError(errno.ENOENT, name)
            found = self._names.index(name) + 2
            return struct.pack("<QQQQII", found, 0, 60, 60, 0, 0) + self._attributes(found)
        if opcode == GETATTR:
            return struct.pack("<QII", 60, 0, 0) + self._attributes(node)
        if opcode in (OPEN, OPEN_FOLDER):
            return struct.pack("<QII", node, DIRECT_IO if opcode == OPEN else 0, 0)
        if opcode == READ_FOLDER:
            return self._entries(READ.unpack_from(body)[1])
        if opcode == READ_FILE:
            _, offset, size, *_ = READ.unpack_from(body)
            return self._read(node, offset, size)
        if opcode == STAT_FS:
            return struct.pack("<5Q4I6I", 1 << 30, 1 << 20, 1 << 20, 1000, 0, 4096, 255, 4096, 0, *[0] * 6)
        if opcode in (RELEASE, CLOSE_FOLDER, FLUSH):
            return b""
        raise OSError(errno.ENOSYS, "not here")

    def _attributes(self, node: int) -> bytes:
        found = os.fstat(self._files[node - 2]) if node > 1 else None
        mode = stat.S_IFDIR | 0o755 if found is None else stat.S_IFREG | 0o444
        size, when = (0, 0) if found is None else (found.st_size, int(found.st_mtime))
        return ATTRIBUTES.pack(node, size, -(-size // 512), when, when, when, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _entries(self, after: int) -> bytes:
        names = [(".", 1, stat.S_IFDIR), ("..", 1, stat.S_IFDIR)]
        names += [(name, node, stat.S_IFREG) for node, name in enumerate(self._names, start=2)]
        found = b""
        for number, (name, node, kind) in enumerate(names[after:], start=after + 1):
            spelled = name.encode()
            entry = struct.pack("<QQII", node, number, len(spelled), kind >> 12) + spelled
            found += entry + bytes(-len(entry) % 8)
        return found

    def _read(self, node: int, offset: int, size: int) -> bytes:
        file, control = self._files[node - 2], self._control
        if not self._names[node - 2].endswith(".safetensors"):
            return os.pread(file, size, offset)
        with self._lock:
            control.reads += 1
        if control.hanging:
            with self._lock:
                control.waiting += 1
            until_s = time.monotonic() + FOREVER_S
            while control.hanging and time.monotonic() < until_s:
                time.sleep(0.05)
            with self._lock:
                control.waiting -= 1
        if control.delay_us:
            time.sleep(control.delay_us / 1e6)
        if offset < control.bad_end and offset + size > control.bad_start:
            raise OSError(errno.EIO, "a bad sector")
        return os.pread(file, min(size, control.short_bytes or size), offset)


def serve(device: int, folder: FaultyFolder) -> None:
    """Answer the kernel until the file system is unmounted."""
    while True:
        try:
            request = os.read(device, LARGEST + 4096)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                continue
            return  # unmounted
        size, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
        if opcode in UNANSWERED:
            continue
        status, body = 0, b""
        try:
            body = folder.answer(opcode, node, request[IN_HEADER.size : size])
        except OSError as error:
            status = -(error.errno or errno.EIO)
        try:
            os.writev(device, [OUT_HEADER.pack(OUT_HEADER.size + len(body), status, unique), body])
        except OSError as error:
            if error.errno != errno.ENOENT:  # who asked was killed
                return


def mounted(path: Path) -> int:
    """The descriptor behind a new mount.

    Raises:
        OSError: this user cannot mount, or there is no FUSE.
    """
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"faulty", os.fsencode(path), b"fuse", 1 | 2 | 4, options):  # read-only, no set-user, no devices
        number = ctypes.get_errno()
        os.close(device)
        raise OSError(number, os.strerror(number), str(path))
    return device


def unmount(path: Path) -> None:
    """Take the mount away, whoever uses it; reads that wait get an error once its process has ended."""
    ctypes.CDLL(None).umount2(os.fsencode(path), MNT_DETACH)


def main(source: str, mount: str, control: str) -> None:
    """Mount, say so, and serve."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with Path(control).open("r+b") as file:
        shared = Control.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(Control)))
    folder = FaultyFolder(Path(source), shared)
    device = mounted(Path(mount))
    threads = [threading.Thread(target=serve, args=(device, folder), daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    print("mounted", flush=True)
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
