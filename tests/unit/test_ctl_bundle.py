"""The bundle's format: equal contents give equal bytes, and nothing that was not written by rbee passes."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_ctl import bundle, bundle_parts
from rbee_ctl.bundle import Source
from rbee_ctl.inventory import Host, Inventory
from rbee_serve.contract.errors import BundleInvalid, ChecksumMismatch, InvalidRequest

FACTS: dict[str, Any] = {"rbee_version": "0.1.0", "python": "3.11", "machine": "x86_64", "models": []}
LONG = "controller/" + "a_long_name_of_a_wheel-" * 6 + "x86_64.whl"  # more than the 100 bytes of a plain tar header
FILES = {
    "controller/a.whl": b"a wheel",
    LONG: b"another",
    "models/0123456789abcdef/m.gguf": bytes(range(256)) * 9,
    "nodes/wheels.tar": b"x" * 512,
}


def sources(base: Path, files: dict[str, bytes] = FILES) -> list[Source]:
    found = []
    for name, data in files.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        found.append(Source(name, path))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    base = tmp_path_factory.mktemp("bundle")
    bundle.write(base / "b.tar", sources(base), FACTS)
    return (base / "b.tar").read_bytes()


def check(tmp_path: Path, data: bytes) -> BundleInvalid:
    path = tmp_path / "broken.tar"
    path.write_bytes(data)
    with pytest.raises(BundleInvalid) as e:
        bundle.read(path)
    assert str(path) in e.value.message
    return e.value


def test_equal_contents_give_equal_bytes_and_come_out_as_they_went_in(tmp_path: Path, made: bytes) -> None:
    other = tmp_path / "elsewhere"
    bundle.write(tmp_path / "again.tar", reversed(sources(other)), FACTS)
    assert (tmp_path / "again.tar").read_bytes() == made
    contents = bundle.read(tmp_path / "again.tar", tmp_path / "out")
    assert {n: (tmp_path / "out" / n).read_bytes() for n in FILES} == FILES
    assert contents.facts == FACTS
    assert not list(tmp_path.glob("*.partial"))


def test_everybody_s_tar_and_sha256sum_can_read_it(tmp_path: Path, made: bytes) -> None:
    (tmp_path / "b.tar").write_bytes(made)
    subprocess.run(["tar", "-xf", "b.tar"], cwd=tmp_path, check=True)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
    assert "bundle install" in (tmp_path / "README.txt").read_text()


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_found_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, made: bytes, data: st.DataObject
) -> None:
    at, bit = data.draw(st.integers(0, len(made) - 1)), data.draw(st.integers(0, 7))
    broken = bytearray(made)
    broken[at] ^= 1 << bit
    check(tmp_path_factory.mktemp("flip"), bytes(broken))


@pytest.mark.parametrize("name", [*FILES, "README.txt", "SHA256SUMS", "manifest.json"])
def test_a_missing_file_is_named(tmp_path: Path, made: bytes, name: str) -> None:
    path = tmp_path / "b.tar"
    path.write_bytes(made)
    subprocess.run(["tar", "--delete", "-f", str(path), name], check=True)
    assert name in check(tmp_path, path.read_bytes()).message


@pytest.mark.parametrize("name", ["extra.txt", "models/0123456789abcdef/other.gguf", "controller/a.whl"])
def test_an_extra_file_is_named(tmp_path: Path, made: bytes, name: str) -> None:
    path = tmp_path / "b.tar"
    path.write_bytes(made)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert name in check(tmp_path, path.read_bytes()).message


def test_half_of_it_more_than_it_and_something_else_are_refused(tmp_path: Path, made: bytes) -> None:
    assert "too early" in check(tmp_path, made[: len(made) // 2]).message
    check(tmp_path, made + b"\0")
    check(tmp_path, made[:-512])
    assert "no bundle" in check(tmp_path, bytes(10240)).message
    check(tmp_path, b"")
    check(tmp_path, b"GGUF" * 1000)


def test_a_manifest_that_leads_out_of_the_bundle_is_refused(tmp_path: Path) -> None:
    contents = bundle.write(tmp_path / "b.tar", sources(tmp_path, {"../../outside": b"x"}), FACTS)
    assert "../../outside" in contents.files
    with pytest.raises(BundleInvalid, match="leads out"):
        bundle.read(tmp_path / "b.tar", tmp_path / "deep/er")
    assert not (tmp_path.parent / "outside").exists()


def test_a_file_that_goes_away_while_it_is_written_leaves_nothing(tmp_path: Path) -> None:
    files = sources(tmp_path)
    with pytest.raises(OSError, match="gone"):
        bundle.write(tmp_path / "b.tar", [*files, Source("gone", tmp_path / "gone")], FACTS)
    assert not list(tmp_path.glob("b.tar*"))


# --- what goes in and out -------------------------------------------------------------------------------------------


def inventory(**model: Any) -> Inventory:
    variables = {"rbee_models": [{"id": "m", "reference": "file:///m.gguf", **model}]}
    return Inventory(Path("inventory.yml"), {"a": Host("a", "a", frozenset({"rbee_hives"}), (), variables)})


def nothing(*_: str) -> None:
    raise AssertionError("nothing was to be fetched")


def test_a_declared_model_is_taken_from_its_src_or_the_cache_and_its_digest_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBEE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"a model")
    digest = bundle_parts.digest_of((file,))
    (model,) = bundle_parts.declared(inventory(src=str(file), sha256=digest), nothing)
    assert (model.id, model.sha256, model.files) == ("m", digest, (file,))
    with pytest.raises(ChecksumMismatch):
        bundle_parts.declared(inventory(src=str(file), sha256="0" * 64), nothing)
    with pytest.raises(InvalidRequest, match="not here"):
        bundle_parts.declared(inventory(src="/nowhere/m.gguf", sha256="0" * 64), nothing)
    cached = tmp_path / "cache/models" / digest[:16] / "m.gguf"
    cached.parent.mkdir(parents=True)
    file.rename(cached)
    (model,) = bundle_parts.declared(inventory(src=str(file), sha256=digest), nothing)
    assert model.files == (cached,)


def test_a_bundle_fits_the_rbee_that_made_it_and_no_other() -> None:
    here = {"rbee_version": "0.1.0", "python": "3.11", "machine": "x86_64", "build": "b", "sources": "s1"}
    contents = bundle.Contents({}, {"wheels": here})
    assert bundle_parts.misfit(contents, here) is None
    assert "sources" in str(bundle_parts.misfit(contents, {**here, "sources": "s2"}))
    assert "python is 3.11, here it is 3.12" in str(bundle_parts.misfit(contents, {**here, "python": "3.12"}))


def test_wheels_and_models_are_laid_where_the_site_looks_and_the_second_time_nothing_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBEE_CACHE", str(tmp_path / "cache"))
    name = "models/0123456789abcdef/m.gguf"
    models = [{"id": "m", "reference": "r", "sha256": "0123456789abcdef", "files": [name]}]
    bundle.write(tmp_path / "b.tar", sources(tmp_path), {**FACTS, "models": [*models, {**models[0], "id": "same"}]})
    here = {"archive": str(tmp_path / "cache/wheelhouses/key.tar")}
    laid = []
    for run in ("one", "two"):
        contents = bundle.read(tmp_path / "b.tar", tmp_path / run)
        laid.append(bundle_parts.lay_out(contents, tmp_path / run, here))
    assert laid == [[here["archive"], str(tmp_path / "cache" / name)], []]
    assert (tmp_path / "cache" / name).read_bytes() == FILES[name]
    assert json.loads(contents.manifest())["format"] == 1
