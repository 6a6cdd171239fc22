"""Changing the user's own inventory: hosts and their variables are added, changed and removed; nothing else moves.

The file is not dumped anew: a YAML parser tells where each entry begins and ends, the text between stays as it is, byte for
byte (comments, anchors, vault blocks, order, quoting). Afterwards the new text is parsed and compared with what was meant;
an edit that would mean anything else is refused and nothing is written. Writing is one rename under a lock on the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rbee_ctl.inventory import HIVE_GROUP
from rbee_serve.contract.errors import InventoryReadOnly, NodeExists, NodeNotFound

Variables = Mapping[str, Any]
_NULL_TAG = "tag:yaml.org,2002:null"


class _CanNotEdit(Exception):
    """This text can not be edited by us; the argument says why."""


# --- the file -------------------------------------------------------------------------------------------------------


def add_host(path: Path, name: str, variables: Variables, group: str = HIVE_GROUP) -> None:
    """Add a host to ``group``; raises NodeExists, InventoryReadOnly with what to write by hand."""
    _rewrite(path, lambda text: added(text, name, variables, group), by_hand(path, name, variables, group))


def update_host(path: Path, name: str, variables: Variables) -> bool:
    """Set variables of a host (None removes one); True when that changed the file. Raises NodeNotFound, InventoryReadOnly."""
    return _rewrite(path, lambda text: updated(text, name, variables), by_hand(path, name, variables, None))


def remove_host(path: Path, name: str) -> None:
    """Remove a host from every group; raises NodeNotFound, InventoryReadOnly."""
    _rewrite(path, lambda text: removed(text, name), f"delete the entries of {name}")


def by_hand(path: Path, name: str, variables: Variables, group: str | None = HIVE_GROUP) -> str:
    """Return what to write into the inventory for a host where we may not; without ``group`` its variables alone."""
    shown = {k: v for k, v in variables.items() if v is not None}
    if group is not None and (path.suffix in (".yml", ".yaml") or path.is_dir()):
        return _yaml_entry(name, shown, group)
    return _ini(name, shown, group)


def check_editable(path: Path, lines: str) -> None:
    """Raise InventoryReadOnly, with the ``lines`` to write by hand, unless ``path`` is a YAML file that may be written."""
    _editable(path, lines)


def _editable(path: Path, by_hand: str) -> Path:
    """Return the real file; a folder that holds exactly one YAML file with hosts is that file."""
    if path.is_dir():
        found = [p for p in sorted(path.iterdir()) if p.suffix in (".yml", ".yaml") and p.is_file()]
        if len(found) != 1:
            raise _read_only(path, f"a folder with {len(found)} YAML files", by_hand)
        path = found[0]
    path = path.resolve()
    if path.suffix not in (".yml", ".yaml"):
        kind = "a program (dynamic inventory)" if os.access(path, os.X_OK) else "no YAML file (INI?)"
        raise _read_only(path, kind, by_hand)
    if os.access(path, os.X_OK):
        raise _read_only(path, "a program (dynamic inventory)", by_hand)
    if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        raise _read_only(path, "not writable for this user", by_hand)
    if path.exists() and not path.stat().st_mode & 0o222:  # root may write it, and its owner has said that nobody shall
        raise _read_only(path, "it is marked read-only", by_hand)
    return path


def _read_only(path: Path, why: str, by_hand: str) -> InventoryReadOnly:
    return InventoryReadOnly(
        f"inventory {path} can not be changed by rbee-ctl: {why}; nothing was written. By hand:\n{by_hand}",
        hint=f"edit {path}, then: rbee-ctl hive list",
        path=str(path),
        by_hand=by_hand,
    )


def _rewrite(path: Path, change: Callable[[str], str], by_hand: str) -> bool:
    """Replace the file by ``change(text)`` under the lock; True when it changed."""
    path = _editable(path, by_hand)
    with _locked(path.parent):
        for left in path.parent.glob(f".{path.name}.rbee-*"):  # of a run that was killed while writing
            left.unlink(missing_ok=True)
        try:
            old = path.read_bytes().decode("utf-8")
            new = change(old)
        except UnicodeDecodeError:
            raise _read_only(path, "not UTF-8", by_hand) from None
        except yaml.YAMLError as e:
            raise _read_only(path, f"not valid YAML: {' '.join(str(e).split())}", by_hand) from e
        except _CanNotEdit as e:
            raise _read_only(path, str(e), by_hand) from e
        if new == old:
            return False
        _replace(path, new)
        return True


def _replace(path: Path, text: str) -> None:
    before = path.stat()
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.rbee-", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(text.encode("utf-8"))
            os.fchmod(f.fileno(), before.st_mode & 0o7777)
            with contextlib.suppress(PermissionError):
                os.fchown(f.fileno(), before.st_uid, before.st_gid)
            f.flush()
            os.fsync(f.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: no lock file is left among the user's own."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _ini(name: str, variables: Variables, group: str | None) -> str:
    values = " ".join(f"{k}={v if isinstance(v, str | int) else json.dumps(v)}" for k, v in variables.items())
    return (f"[{group}]\n" if group else "") + f"{name} {values}".rstrip()


def _yaml_entry(name: str, variables: Variables, group: str) -> str:
    return "\n".join(_block(group, {"hosts": {name: dict(variables)}}, 0, 2, "\n").splitlines())


# --- text in, text out ----------------------------------------------------------------------------------------------


def added(text: str, name: str, variables: Variables, group: str = HIVE_GROUP) -> str:
    """Return ``text`` with the host added to ``group``."""
    document = _Document(text)
    if document.entries(name):
        raise NodeExists(
            f"node {name} is in the inventory already",
            hint=f"rbee-ctl setup update-node --name {name} ..., or rbee-ctl setup remove-node --name {name}",
            node=name,
        )
    holder, keys = document.home(group)
    wanted: Any = dict(variables) or None
    for key in reversed(keys):
        wanted = {key: {name: wanted} if key == "hosts" else wanted}
    if not keys:
        wanted = {name: wanted}
    ((key, value),) = wanted.items()
    new = document.inserted(holder, key, value)
    expected = document.plain()
    path = [*holder.path, *keys] if keys else [*holder.path]
    target = expected
    for step in path:
        target[step] = target.get(step) or {}
        target = target[step]
    target[name] = _plain_of(dict(variables) or None)
    return _checked(new, expected)


def updated(text: str, name: str, variables: Variables) -> str:
    """Return ``text`` with the host's variables set; a value of None removes the variable."""
    for key, value in variables.items():
        text = _with_variable(text, name, key, value)
    return text


def _with_variable(text: str, name: str, key: str, value: Any) -> str:
    document = _Document(text)
    entries = document.entries(name)
    if not entries:
        raise NodeNotFound(f"node {name} is not in the inventory", hint="rbee-ctl hive list", node=name)
    owner = next((e for e in entries if e.child(key) is not None), None)
    expected = document.plain()
    if value is None:
        if owner is None:
            return text
        new = document.without(owner.mapping(), key)
        _at(expected, owner.path).pop(key)
        return _checked(new, expected)
    wanted = _plain_of(value)
    if owner is not None:
        if _plain(owner.child(key)) == wanted:
            return text
        new = document.replaced(owner.mapping(), key, value)
    else:
        # Where its other variables stand; else where it is a hive.
        owner = next((e for e in entries if isinstance(e.value, yaml.MappingNode) and e.value.value), None)
        owner = owner or next((e for e in entries if HIVE_GROUP in e.path), entries[0])
        new = document.inserted(owner, key, value)
    parent = _at(expected, owner.path[:-1])
    parent[owner.path[-1]] = (parent[owner.path[-1]] or {}) | {key: wanted}
    return _checked(new, expected)


def removed(text: str, name: str) -> str:
    """Return ``text`` without the host, in whatever groups it was."""
    if not _Document(text).entries(name):
        raise NodeNotFound(f"node {name} is not in the inventory", hint="rbee-ctl hive list", node=name)
    while entries := (document := _Document(text)).entries(name):
        expected = document.plain()
        hosts = entries[0].path[:-1]
        _at(expected, hosts).pop(name)
        text = _checked(document.without(document.at(hosts).mapping(), name), expected)
    return text


def _at(data: Any, path: tuple[str, ...]) -> Any:
    for step in path:
        data = data[step]
    return data


def _tidy(data: Any) -> Any:
    """Return plain data with empty mappings as None: to Ansible they are the same."""
    if isinstance(data, dict):
        return {k: _tidy(v) for k, v in data.items()} or None
    return [_tidy(x) for x in data] if isinstance(data, list) else data


def _checked(text: str, expected: Any) -> str:
    """Return ``text`` if it means ``expected``."""
    try:
        got = _Document(text).plain()
    except yaml.YAMLError as e:
        raise _CanNotEdit(f"its form is too unusual ({' '.join(str(e).split())[:160]})") from e
    if _tidy(got) != _tidy(expected):
        raise _CanNotEdit("its form is too unusual for a safe edit")
    return text


class _Place(NamedTuple):
    """A key with its value somewhere in the document; ``path`` are the keys that lead to it."""

    path: tuple[str, ...]
    key: yaml.Node | None
    value: yaml.Node

    def child(self, key: str) -> yaml.Node | None:
        """Return the value of ``key`` in this mapping."""
        if not isinstance(self.value, yaml.MappingNode):
            return None
        return next((v for k, v in self.value.value if k.value == key), None)

    def mapping(self) -> yaml.MappingNode:
        """Return the value, which is a mapping of this place's own."""
        if not isinstance(self.value, yaml.MappingNode) or self.aliased():
            raise _CanNotEdit(f"{'.'.join(self.path)} is an alias of another entry")
        return self.value

    def aliased(self) -> bool:
        """Say whether the value stands elsewhere (``*anchor``)."""
        return self.key is not None and self.value.start_mark.index < self.key.start_mark.index


class _Document:
    """A parsed inventory with the positions of its parts."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.newline = "\r\n" if "\r\n" in text else "\n"
        self.root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(self.root, yaml.ScalarNode) and self.root.tag == _NULL_TAG:
            self.root = None  # a file of comments, or of `---` alone
        if self.root is not None and not isinstance(self.root, yaml.MappingNode):
            raise _CanNotEdit("groups are expected at the top")

    def plain(self) -> dict[str, Any]:
        """Return what the document says, tags included, aliases resolved."""
        found = _plain(self.root) if self.root is not None else {}
        return found or {}

    # --- finding ------------------------------------------------------------------------------------------------

    def _groups(self, place: _Place) -> Iterator[_Place]:
        if not isinstance(place.value, yaml.MappingNode):
            return
        for key, value in place.value.value:
            group = _Place((*place.path, str(key.value)), key, value)
            yield group
            if isinstance(value, yaml.MappingNode) and not group.aliased():
                for inner_key, inner in value.value:
                    if inner_key.value == "children":
                        yield from self._groups(_Place((*group.path, "children"), inner_key, inner))

    def groups(self) -> list[_Place]:
        """Return all groups, outer ones first."""
        return [] if self.root is None else list(self._groups(_Place((), None, self.root)))

    def entries(self, host: str) -> list[_Place]:
        """Return the entries of a host under all groups."""
        found = []
        for group in self.groups():
            hosts = group.child("hosts")
            if isinstance(hosts, yaml.MappingNode):
                found += [_Place((*group.path, "hosts", host), k, v) for k, v in hosts.value if str(k.value) == host]
        return found

    def at(self, path: tuple[str, ...]) -> _Place:
        """Return the place that ``path`` leads to."""
        place = _Place((), None, self._top())
        for step in path:
            key, value = next((k, v) for k, v in place.mapping().value if str(k.value) == step)
            place = _Place((*place.path, step), key, value)
        return place

    def _top(self) -> yaml.Node:
        if self.root is None:
            mark = yaml.Mark("", len(self.text), 0, 0, None, 0)
            return yaml.ScalarNode(_NULL_TAG, "", mark, mark)
        return self.root

    def home(self, group: str) -> tuple[_Place, list[str]]:
        """Return where a new host of ``group`` goes: a place, and the keys that are still to be made beneath it."""
        mine = [g for g in self.groups() if g.path[-1] == group and not g.aliased()]
        with_hosts = [g for g in mine if g.child("hosts") is not None]
        for g in sorted(with_hosts, key=lambda g: not isinstance(g.child("hosts"), yaml.MappingNode)):
            return self.at((*g.path, "hosts")), []
        if mine:
            return mine[0], ["hosts"]
        if self.root is None:
            return _Place((), None, self._top()), ["all", "children", group, "hosts"]
        every = next((g for g in self.groups() if g.path == ("all",)), None)
        if every is None:
            return _Place((), None, self.root), [group, "hosts"]
        if every.child("children") is not None:
            return self.at(("all", "children")), [group, "hosts"]
        return every, ["children", group, "hosts"]

    # --- changing -----------------------------------------------------------------------------------------------

    def _end(self, key: yaml.Node, value: yaml.Node) -> int:
        """Return the index behind the last character of an entry's value."""
        if value.start_mark.index < key.start_mark.index:  # an alias: it stands behind the colon
            rest = self.text[key.end_mark.index :]
            star = rest.find("*")
            return int(key.end_mark.index + star + len(rest[star:].split(None, 1)[0].rstrip(",}]")))
        return max(self._node_end(value), int(key.end_mark.index) + 1)

    def _node_end(self, node: yaml.Node) -> int:
        end = int(node.end_mark.index)
        if isinstance(node, yaml.ScalarNode):
            if node.style in ("|", ">"):
                return len(self.text[:end].rstrip()) if not node.value.endswith("\n\n") else end
            return end
        if not isinstance(node, yaml.CollectionNode) or node.flow_style:
            return end
        if isinstance(node, yaml.MappingNode):
            return self._end(*node.value[-1])
        last = node.value[-1]
        if last.start_mark.index < node.start_mark.index:
            return len(self.text[:end].rstrip())
        return self._node_end(last) if not isinstance(last, yaml.ScalarNode) or last.value else len(self.text[:end].rstrip())

    def _line_start(self, index: int) -> int:
        return self.text.rfind("\n", 0, index) + 1

    def _line_end(self, index: int) -> int:
        """Return the index behind the line that holds the character before ``index``."""
        found = self.text.find("\n", max(index - 1, 0))
        return len(self.text) if found < 0 else found + 1

    @property
    def step(self) -> int:
        """Columns by which this file indents."""
        for group in self.groups():
            if isinstance(group.value, yaml.MappingNode) and not group.value.flow_style and group.key is not None:
                inner = int(group.value.value[0][0].start_mark.column) if group.value.value else 0
                if (difference := inner - int(group.key.start_mark.column)) > 0:
                    return difference
        return 2

    def inserted(self, place: _Place, key: str, value: Any) -> str:
        """Return the text with ``key: value`` as the last entry of the mapping at ``place``."""
        node = place.value
        if place.aliased():
            raise _CanNotEdit(f"{'.'.join(place.path)} is an alias of another entry")
        if isinstance(node, yaml.MappingNode) and node.value:
            if node.flow_style:
                at = self._end(*node.value[-1])
                return f"{self.text[:at]}, {_flow(key)}: {_flow(value)}{self.text[at:]}"
            column, at = int(node.value[0][0].start_mark.column), self._line_end(self._end(*node.value[-1]))
            return self._spliced(at, at, _block(key, value, column, self.step, self.newline))
        if isinstance(node, yaml.MappingNode) or (isinstance(node, yaml.ScalarNode) and node.tag == _NULL_TAG):
            column = -self.step if place.key is None else int(place.key.start_mark.column)
            new = _block(key, value, column + self.step, self.step, self.newline)
            if place.key is None:
                return self._spliced(len(self.text), len(self.text), new)
            # `hosts:`, `hosts: {}` or `hosts: ~`: what stands behind the colon goes, a comment behind that stays.
            begin, end = int(node.start_mark.index), int(node.end_mark.index)
            emptied = _Document(self.text[:begin].rstrip(" ") + self.text[end:] if end > begin else self.text)
            at = emptied._line_end(int(place.key.end_mark.index) + 1)
            return emptied._spliced(at, at, new)
        raise _CanNotEdit(f"{'.'.join(place.path)} is no mapping")

    def _spliced(self, begin: int, end: int, new: str) -> str:
        before = self.text[:begin]
        if before and not before.endswith("\n"):
            before += self.newline
        return before + new + self.text[end:]

    def without(self, mapping: yaml.MappingNode, key: str) -> str:
        """Return the text without one entry of a mapping."""
        pairs = mapping.value
        number = next(i for i, (k, _) in enumerate(pairs) if str(k.value) == key)
        (k, v) = pairs[number]
        begin, end = int(k.start_mark.index), self._end(k, v)
        if not mapping.flow_style:
            if self.text[self._line_start(begin) : begin].strip():
                raise _CanNotEdit(f"the entry {key} does not begin its line")
            return self.text[: self._line_start(begin)] + self.text[self._line_end(end) :]
        if number > 0:
            begin = self._end(*pairs[number - 1])
        elif len(pairs) > 1:
            end = int(pairs[1][0].start_mark.index)
        return self.text[:begin] + self.text[end:]

    def replaced(self, mapping: yaml.MappingNode, key: str, value: Any) -> str:
        """Return the text with another value for ``key``; a comment behind a one-line value stays."""
        k, v = next((k, v) for k, v in mapping.value if str(k.value) == key)
        if v.start_mark.index < k.start_mark.index:
            raise _CanNotEdit(f"{key} is an alias of another entry")
        begin, end = int(v.start_mark.index), self._end(k, v)
        one_line = (
            isinstance(v, yaml.ScalarNode) and v.style not in ("|", ">") and "\n" not in self.text[begin:end] and end > begin
        )
        if mapping.flow_style or (one_line and not isinstance(value, dict | list)):
            return self.text[:begin] + _flow(value) + self.text[end:]
        start = self._line_start(int(k.start_mark.index))
        column = int(k.start_mark.column)
        return self._spliced(start, self._line_end(end), _block(key, value, column, self.step, self.newline))


def _plain(node: yaml.Node | None) -> Any:
    """Return a node as plain data: scalars as (tag, text), so that nothing is lost or guessed."""
    if isinstance(node, yaml.MappingNode):
        return {str(k.value): _plain(v) for k, v in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(n) for n in node.value]
    if node is None or node.tag == _NULL_TAG:
        return None
    return (node.tag, node.value)


def _plain_of(value: Any) -> Any:
    return _plain(yaml.compose(_flow(value), Loader=yaml.SafeLoader))


def _flow(value: Any) -> str:
    """Return a value on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1_000_000, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").replace("\n", " ")


def _block(key: str, value: Any, column: int, step: int, newline: str) -> str:
    """Return ``key: value`` as whole lines, mappings indented."""
    pad = " " * column
    if isinstance(value, dict) and value:
        return f"{pad}{_flow(key)}:{newline}" + "".join(_block(k, v, column + step, step, newline) for k, v in value.items())
    if value is None or value == {}:
        return f"{pad}{_flow(key)}:{newline}"
    if isinstance(value, list) and value:
        return f"{pad}{_flow(key)}:{newline}" + "".join(f"{pad}{' ' * step}- {_flow(x)}{newline}" for x in value)
    return f"{pad}{_flow(key)}: {_flow(value)}{newline}"
