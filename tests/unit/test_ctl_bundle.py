"""The bundle's format: equal contents give equal bytes, and nothing that was not written by rbee passes."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import tarfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hub import Behaviour, Hub
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_ctl import bundle, bundle_parts, content
from rbee_ctl.bundle import Source
from rbee_ctl.inventory import Host, Inventory
from rbee_serve import process_tree
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


def test_two_that_write_one_bundle_do_not_mix(tmp_path: Path, made: bytes) -> None:
    target, refused = tmp_path / "b.tar", []

    def other(step: str, done: int, total: int) -> None:
        if step == "writing" and not refused:
            with pytest.raises(BundleInvalid, match="another run is writing") as e:
                bundle.write(target, sources(tmp_path / "other"), FACTS)
            refused.append(e.value)

    (tmp_path / "b.tar.partial").write_bytes(b"left by a run that was killed")
    bundle.write(target, sources(tmp_path / "one"), FACTS, other)
    assert len(refused) == 1
    assert target.read_bytes() == made
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_that_changes_while_it_is_packed_makes_no_bundle(tmp_path: Path) -> None:
    found = sources(tmp_path / "one")

    def change(step: str, done: int, total: int) -> None:
        if step == "reading" and done == total:
            found[0].path.write_bytes(bytes(len(FILES[found[0].name])))

    with pytest.raises(BundleInvalid, match="has changed"):
        bundle.write(tmp_path / "b.tar", found, FACTS, change)
    assert not list(tmp_path.glob("b.tar*"))


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


def test_all_parts_of_a_split_model_go_in(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]
    parts[0].write_bytes(b"one")
    with pytest.raises(InvalidRequest, match=r"not beside it: m-Q8_0-00002-of-00002\.gguf"):
        bundle_parts.declared(inventory(src=str(parts[0])), nothing)
    parts[1].write_bytes(b"two")
    (model,) = bundle_parts.declared(inventory(src=str(parts[0])), nothing)
    assert model.files == tuple(parts)
    assert model.sha256 == bundle_parts.digest_of(tuple(parts))


def test_a_bundle_asks_the_hub_of_the_inventory_with_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token in a template or a vault is not read; the environment's is there then, and a file's after it."""

    def settings(**variables: Any) -> bundle_parts.HubSettings:
        return bundle_parts.HubSettings.of(Inventory(tmp_path, {"a": Host("a", "a", frozenset({"rbee_hives"}), (), variables)}))

    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert settings() == bundle_parts.HubSettings()
    said = settings(rbee_hub_endpoint="http://hub", rbee_hub_tries=2, rbee_hub_bytes_per_s=1000, rbee_hub_token="hf_1")
    assert set(said.flags) == {"--endpoint=http://hub", "--tries=2", "--bytes-per-s=1000"}
    assert said.token == "hf_1"
    (tmp_path / "token").write_text("hf_2\n")
    assert settings(rbee_hub_token="{{ secret }}", rbee_hub_token_file=str(tmp_path / "token")).token == "hf_2"
    monkeypatch.setenv("HF_TOKEN", "hf_3")
    assert settings(rbee_hub_token="{{ secret }}", rbee_hub_token_file=str(tmp_path / "token")).token == "hf_3"


def test_a_bundle_s_model_comes_from_that_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "m-Q8_0.gguf"
    writer = GGUFWriter(model, arch="llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setenv("RBEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "another")
    with Hub(tmp_path / "hub", behaviour=Behaviour(token="hf_right")) as hub:
        hub.add("org/m", model.name, model)
        variables = {
            "rbee_models": [{"id": "m", "reference": "hf:org/m"}],
            "rbee_hub_endpoint": hub.url,
            "rbee_hub_token": "hf_right",
        }
        said: list[str] = []
        seen: list[bytes] = []  # arguments and environment of what downloads
        hosts = {"a": Host("a", "a", frozenset({"rbee_hives"}), (), variables)}

        def say(_: str, text: str) -> None:
            said.append(text)
            for child in Path("/proc/self/task").glob("*/children"):
                for pid in child.read_text().split():
                    with contextlib.suppress(OSError):
                        seen.append(Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes())

        hub.behaviour.bytes_per_s = 2_000  # long enough to be looked at
        (found,) = bundle_parts.declared(Inventory(tmp_path, hosts), say)
    assert any(b"rbee_serve.models.download" in words for words in seen)
    assert not any(token in words for words in seen for token in (b"hf_right", b"another"))
    assert (found.id, found.reference, len(hub.downloads)) == ("m", "hf:org/m:m-Q8_0.gguf", 1)
    assert "hf_right" not in "".join(said)


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


def test_a_stop_ends_the_builder_of_wheels_and_the_compilers_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM reaches rbee-ctl alone, other than Ctrl+C in a terminal."""
    script = tmp_path / "roles/rbee_wheels/files/build_wheelhouse.py"
    script.parent.mkdir(parents=True)
    script.write_text(
        textwrap.dedent(
            f"""
            import subprocess
            from pathlib import Path
            compiler = subprocess.Popen(["setsid", "sleep", "7617"])
            Path({str(tmp_path / "begun")!r}).touch()
            compiler.wait()
            """
        )
    )
    monkeypatch.setattr(content, "root", lambda: tmp_path)
    below: list[process_tree.Process] = []

    def stopped(process: subprocess.Popen[str], *_: Any) -> None:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.01)
        below.extend(process_tree.descendants(process.pid))
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", stopped)
    with pytest.raises(KeyboardInterrupt):
        bundle_parts.wheelhouse("--plan")
    assert below
    limit = time.monotonic() + 10
    while any(map(process_tree.alive, below)):
        assert time.monotonic() < limit, "it goes on"
        time.sleep(0.01)
