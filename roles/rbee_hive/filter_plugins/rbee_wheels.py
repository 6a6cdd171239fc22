"""Which of several wheels is the newest."""

from __future__ import annotations

from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version


def rbee_newest_wheel(paths):
    """Return the path of the wheel with the highest version, ``0.3.10`` being newer than ``0.3.9``; '' for none.

    Of several with the same version the highest build number, then the last by name. What is not called like a wheel comes last.
    """
    return max(paths, key=_order, default="")


def _order(path):
    name = path.rsplit("/", 1)[-1]
    try:
        _, version, build, _ = parse_wheel_filename(name)
    except InvalidWheelFilename:
        return Version("0.dev0"), (), name
    return version, build, name


class FilterModule:
    """The filters of the role."""

    def filters(self):
        """Return name -> function."""
        return {"rbee_newest_wheel": rbee_newest_wheel}
