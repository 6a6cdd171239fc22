"""What a GPU's libraries need of a worker's sandbox; runs on a machine in a unit of a worker's directives and prints one line."""

import errno
import grp
import json
import mmap
import os
import sys
from pathlib import Path


def opens(device):
    """Whether the sandbox lets it through: where there is no such GPU, the kernel then says that there is no driver."""
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError as e:
        return e.errno in (errno.ENXIO, errno.ENODEV)
    return True


def compiles():
    """Whether memory can be written and executed, as just-in-time compilers of kernels and shaders want it."""
    try:
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    except OSError:
        return False
    return True


def group(number):
    """Return the name of a group; systemd gives a dynamic account groups without one."""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


found = {"compiles": compiles(), "groups": sorted(group(number) for number in os.getgroups())}
found |= {f"sees {device}": Path(device).exists() for device in sys.argv[1:]}
found |= {f"opens {device}": opens(device) for device in sys.argv[1:]}
print("PROBE " + json.dumps(found))
