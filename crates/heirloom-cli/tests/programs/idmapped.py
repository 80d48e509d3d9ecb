#!/usr/bin/env python3
"""Mounts a directory so that what belongs to one user belongs to another one there, as Kubernetes mounts the volumes of pods
that have users of their own: idmapped.py DIRECTORY TARGET FROM TO. Mounts what has been mounted at TARGET over."""

import ctypes
import os
import subprocess
import sys
import time

OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
AT_FDCWD, AT_EMPTY_PATH, OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = -100, 0x1000, 1, 4
MOUNT_ATTR_IDMAP = 0x100000

libc = ctypes.CDLL(None, use_errno=True)


class Attributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def call(number, *arguments):
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        sys.exit(f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return result


directory, target, before, after = sys.argv[1:]
# A user namespace that says who is who; it has to exist for as long as this takes.
holder = subprocess.Popen(["unshare", "--user", "cat"], stdin=subprocess.PIPE)
path = f"/proc/{holder.pid}/ns/user"
while os.readlink(path) == os.readlink("/proc/self/ns/user"):
    time.sleep(0.001)
for kind in ("uid", "gid"):
    with open(f"/proc/{holder.pid}/{kind}_map", "w") as file:
        file.write(f"{before} {after} 1")
tree = call(OPEN_TREE, AT_FDCWD, directory.encode(), OPEN_TREE_CLONE)
attributes = Attributes(MOUNT_ATTR_IDMAP, 0, 0, os.open(path, os.O_RDONLY))
call(MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, ctypes.byref(attributes), ctypes.sizeof(attributes))
call(MOVE_MOUNT, tree, b"", AT_FDCWD, target.encode(), MOVE_MOUNT_F_EMPTY_PATH)
holder.communicate()
