"""Each directive of an accelerator's drop-in beside what a GPU's libraries see without it, on a booted machine.

The machines have no GPU: device nodes of the drivers' own numbers stand for one. Whether the sandbox lets a process through to
them is the kernel's answer all the same (EPERM, or that no driver is there).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from machines import ROOT, Lab

NODE = "lab2"
UNIT = "rbee-accelerator-probe"
PROBE = Path(__file__).with_name("accelerator_probe.py")
#: Device -> (number, group that owns it): as the drivers' own udev rules make them.
DEVICES = {
    "/dev/nvidia0": ("195 0", "root"),
    "/dev/kfd": ("240 0", "render"),
    "/dev/dri/renderD128": ("226 128", "render"),
}
#: Accelerator -> the devices that its libraries open.
NEEDED = {
    "nvidia": ["/dev/nvidia0"],
    "amd": ["/dev/kfd", "/dev/dri/renderD128"],
    "vulkan": ["/dev/dri/renderD128", "/dev/nvidia0"],
}
#: Groups of /proc/devices that no driver has registered here -> the device.
GROUPS = {"char-nvidia*": "/dev/nvidia0", "char-drm": "/dev/dri/renderD128"}


class Sandbox:
    """A unit with the directives of a worker's."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        worker = (ROOT / "systemd/rbee-worker@.service").read_text()
        fence = worker[worker.index("ProtectSystem=") : worker.index("[Install]")]
        self._write(f"/run/{UNIT}.py", PROBE.read_text())
        account = f"DynamicUser=yes\nUser={UNIT}\n"
        self._unit = f"[Service]\nType=oneshot\nExecStart=/usr/bin/python3 /run/{UNIT}.py %s\n{account}{fence}"
        made = [
            f"mkdir -p {Path(device).parent}; rm -f {device}; mknod -m {666 if owner == 'root' else 660} {device} c {number};"
            f" chgrp {owner} {device}"
            for device, (number, owner) in DEVICES.items()
        ]
        self._sh("groupadd -f -r render; groupadd -f -r video; " + "; ".join(made))

    def _sh(self, command: str) -> str:
        return self._lab.ssh(NODE, command).stdout

    def _write(self, path: str, text: str) -> None:
        self._sh(f"mkdir -p {Path(path).parent} && cat > {path} <<'EOT'\n{text}\nEOT")

    def seen(self, accelerator: str, directives: list[str]) -> dict[str, Any]:
        """Return what the probe finds with these directives as the drop-in."""
        self._write(f"/run/systemd/system/{UNIT}.service", self._unit % " ".join(NEEDED[accelerator]))
        self._write(f"/run/systemd/system/{UNIT}.service.d/50-rbee.conf", "\n".join(["[Service]", *directives]))
        said = self._sh(
            f"systemctl daemon-reload && systemctl start {UNIT} && journalctl --sync && "
            f"journalctl -u {UNIT} -o cat --no-pager | grep ^PROBE | tail -n 1"
        )
        found: dict[str, Any] = json.loads(said.removeprefix("PROBE "))
        return found

    def close(self) -> None:
        units = f"/run/systemd/system/{UNIT}.service"
        self._sh(f"rm -rf {units} {units}.d /run/{UNIT}.py {' '.join(DEVICES)}; systemctl daemon-reload")


def directives_of(accelerator: str) -> list[str]:
    """Return the drop-in's directives, one a line, with devices by their path."""
    text = (ROOT / f"systemd/accelerators/{accelerator}.conf").read_text()
    for group, device in GROUPS.items():
        text = text.replace(f"DeviceAllow={group} ", f"DeviceAllow={device} ")
    return re.findall(r"^\w+=.*$", text, re.MULTILINE)


def lost(directive: str, devices: list[str]) -> set[str]:
    """Return what is missing without this directive."""
    key, value = directive.split("=", 1)
    if key == "MemoryDenyWriteExecute":
        return {"compiles"}
    if key == "PrivateDevices":
        return {f"{what} {device}" for what in ("sees", "opens") for device in devices}
    if key == "DeviceAllow":
        return {f"opens {value.split()[0]}"}
    assert directive == "SupplementaryGroups=render video"
    return {"render", "video", *(f"opens {device}" for device in devices if DEVICES[device][1] == "render")}


@pytest.mark.N12
@pytest.mark.parametrize("accelerator", sorted(NEEDED))
def test_every_directive_of_a_drop_in_is_needed_and_all_together_show_the_gpu(lab: Lab, accelerator: str) -> None:
    devices, directives = NEEDED[accelerator], directives_of(accelerator)
    assert len(directives) >= 3
    sandbox = Sandbox(lab)
    try:
        whole = sandbox.seen(accelerator, directives)
        groups = whole.pop("groups")
        assert set(whole.values()) == {True}, whole
        for directive in directives:
            without = sandbox.seen(accelerator, [d for d in directives if d != directive])
            missing = {what for what, there in without.items() if there is False} | (set(groups) - set(without["groups"]))
            assert missing == lost(directive, devices), directive
    finally:
        sandbox.close()
