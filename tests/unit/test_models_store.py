"""References, choice of a file, and the catalog's files."""

from __future__ import annotations

import fcntl
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rbee_serve.contract import errors
from rbee_serve.models import catalog, store

Q4 = "model-Q4_K_M.gguf"
Q8 = "model-Q8_0.gguf"


def entry(models_dir: Path, **changes: Any) -> dict[str, Any]:
    """A Ready entry with its file on disk."""
    path = models_dir / "org" / "repo" / Q4
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF....")
    base = {
        "id": "model-q4_k_m",
        "reference": f"hf:org/repo:{Q4}",
        "provider": "hf",
        "name": "model",
        "path": str(path),
        "size_bytes": 8,
        "added_at": "2026-01-01T00:00:00Z",
        "status": "Ready",
        "sha256": None,
        "metadata": {},
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    ("text", "kind", "repo", "file"),
    [
        ("hf:org/repo", "hf", "org/repo", None),
        ("hf:Org-1/Re.po_2:Q4_K_M", "hf", "Org-1/Re.po_2", "Q4_K_M"),
        ("hf:org/repo:sub/file.gguf", "hf", "org/repo", "sub/file.gguf"),
        ("smollm2-135m-instruct.q4_1", "id", "/", None),
    ],
)
def test_reference_is_parsed(text: str, kind: str, repo: str, file: str | None) -> None:
    ref = store.parse_ref(text)
    assert (ref.kind, ref.repo_id, ref.file, ref.text) == (kind, repo, file, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hf:",
        "hf:org",
        "hf:org/",
        "hf:../repo",
        "hf:org/..",
        "hf:org/repo:",
        "hf:org/repo:../../etc/passwd",
        "hf:org/repo:/abs.gguf",
        "hf:org/repo:a//b.gguf",
        "hf:org/re po",
        "hf:org/repo/extra",
        "hf:org/repo:x\n",
        "file:///etc/../x.gguf",
        "file://relative.gguf",
        "file:///etc/passwd",
        "http://example.org/x.gguf",
        "org/repo",
        "-rf",
        "x" * 300,
    ],
)
def test_reference_that_is_none_is_refused(text: str) -> None:
    """What could leave the models directory, too."""
    with pytest.raises(errors.InvalidModelRef) as e:
        catalog.parse_ref(text)
    assert e.value.hint is not None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("Llama-3-8B-Q4_K_M.gguf", "Q4_K_M"),
        ("x.i1-IQ2_XXS.gguf", "IQ2_XXS"),
        ("dir/x-f16.gguf", "F16"),
        ("x-BF16-00001-of-00003.gguf", "BF16"),
        ("Qwen2.5-7B.gguf", None),
        ("plain.gguf", None),
    ],
)
def test_quantization_is_read_from_the_name(name: str, expected: str | None) -> None:
    assert store.quantization(name) == expected


def test_file_is_chosen_by_name_quantisation_or_because_it_is_the_only_one() -> None:
    names = ["README.md", Q4, Q8, "mmproj-model-f16.gguf"]
    assert store.choose_file(store.parse_ref(f"hf:o/r:{Q8}"), names) == Q8
    assert store.choose_file(store.parse_ref("hf:o/r:q8_0"), names) == Q8
    assert store.choose_file(store.parse_ref("hf:o/r"), [Q4, "config.json"]) == Q4


def test_several_files_are_listed_with_a_reference_that_works() -> None:
    with pytest.raises(errors.InvalidModelRef) as e:
        catalog.choose_files(store.parse_ref("hf:o/r"), [Q4, Q8])
    assert e.value.details["quantizations"] == ["Q4_K_M", "Q8_0"]
    assert "hf:o/r:Q4_K_M" in (e.value.hint or "")


def test_a_file_that_is_not_there_is_not_found_and_the_others_are_named() -> None:
    with pytest.raises(errors.ModelNotFound, match=Q4):
        catalog.choose_files(store.parse_ref("hf:o/r:Q2_K"), [Q4])
    with pytest.raises(errors.ModelNotFound, match="no GGUF"):
        catalog.choose_files(store.parse_ref("hf:o/r"), ["model.safetensors"])


def test_the_parts_of_a_split_model_are_one_model() -> None:
    names = [f"x-Q8_0-0000{i}-of-00003.gguf" for i in (3, 1, 2)] + [Q4]
    for text in ("hf:o/r:Q8_0", "hf:o/r:x-Q8_0.gguf", "hf:o/r:x-Q8_0-00002-of-00003.gguf"):
        assert store.choose_files(store.parse_ref(text), names) == sorted(names[:3]), text
    with pytest.raises(errors.InvalidModelRef, match=r"could be 2 files: model-Q4_K_M.gguf, x-Q8_0.gguf"):
        catalog.choose_files(store.parse_ref("hf:o/r"), names)
    twins = ["a/x-Q8_0.gguf", "b/x-Q8_0.gguf"]
    with pytest.raises(errors.InvalidModelRef) as e:
        catalog.choose_files(store.parse_ref("hf:o/r:Q8_0"), twins)
    assert str(e.value.hint).endswith("for example hf:o/r:a/x-Q8_0.gguf"), "what is named must be one file"
    with pytest.raises(errors.ModelNotFound, match="missing: 2"):
        catalog.choose_files(store.parse_ref("hf:o/r:Q8_0"), names[:2])


def test_a_split_model_is_found_by_its_repository_and_fails_when_a_part_is_gone(tmp_path: Path) -> None:
    home = tmp_path / "org" / "repo"
    home.mkdir(parents=True)
    files = [{"path": str(home / f"x-0000{i}-of-00002.gguf"), "size_bytes": 3, "sha256": None} for i in (1, 2)]
    for file in files:
        Path(str(file["path"])).write_bytes(b"abc")
    one = entry(tmp_path, reference="hf:org/repo:x.gguf", path=files[0]["path"], files=files, size_bytes=6)
    store.put(tmp_path, home, one)
    assert store.find(store.read(tmp_path)[0], store.parse_ref("hf:org/repo")) == one
    assert store.find([one], store.parse_ref("hf:org/repo:x-00002-of-00002.gguf")) == one
    Path(str(files[1]["path"])).unlink()
    assert "x-00002-of-00002.gguf" in store.read(tmp_path)[0][0]["problem"]


def test_delete_takes_files_partials_entry_and_empty_directories_and_tells_what_was_freed(tmp_path: Path) -> None:
    home = tmp_path / "org" / "repo"
    one = entry(tmp_path)
    store.put(tmp_path, home, one)
    store.partial_path(Path(one["path"])).write_bytes(b"12345")
    assert store.delete(tmp_path, one) == (8 + 5, [])
    assert list(tmp_path.iterdir()) == []
    assert store.delete(tmp_path, one) == (0, [])


def test_delete_leaves_a_file_that_lies_elsewhere_and_other_models_alone(tmp_path: Path) -> None:
    models, elsewhere = tmp_path / "models", tmp_path / "elsewhere.gguf"
    elsewhere.write_bytes(b"GGUF")
    store.put(models, models / "org" / "repo", entry(models))
    local = entry(models, id="local", reference=f"file://{elsewhere}", provider="file", path=str(elsewhere), size_bytes=4)
    store.put(models, models / "local" / "local", local)
    assert store.delete(models, local) == (0, [str(elsewhere)])
    assert elsewhere.exists()
    assert [e["id"] for e in store.read(models)[0]] == ["model-q4_k_m"]
    sneaky = {**local, "path": str(models / ".." / "elsewhere.gguf")}
    assert store.delete(models, sneaky)[0] == 0
    assert elsewhere.exists()


def test_a_damaged_neighbour_is_no_obstacle_on_a_machine_without_pyyaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(tmp_path, tmp_path / "org" / "repo", entry(tmp_path))
    for damage in ("a: [", "id: by-hand\n"):
        (tmp_path / "A" / damage[:1]).mkdir(parents=True)
        (tmp_path / "A" / damage[:1] / store.METADATA).write_text(damage)
    monkeypatch.setitem(sys.modules, "yaml", None)
    (one,) = store.read(tmp_path)[0]
    assert store.delete(tmp_path, one)[1] == []
    assert store.read(tmp_path)[0] == []
    assert len([*tmp_path.glob(f"A/*/{store.METADATA}")]) == 2, "what cannot be read here is left to its owner"


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/m.gguf",
        "https://example.org/m.gguf#sha256=12",
        f"https://example.org/m.bin#sha256={'a' * 64}",
        f"https:///m.gguf#sha256={'a' * 64}",
        f"https://user:pass@example.org/m.gguf#sha256={'a' * 64}",
    ],
)
def test_an_address_needs_a_gguf_and_a_digest(text: str) -> None:
    with pytest.raises(errors.InvalidModelRef):
        catalog.parse_ref(text)


def test_an_address_with_a_digest_is_a_reference() -> None:
    ref = store.parse_ref(f"https://example.org:8443/a/m-Q8_0.gguf?v=1#sha256={'a' * 64}")
    assert (ref.kind, ref.path, ref.file) == ("https", "https://example.org:8443/a/m-Q8_0.gguf?v=1", "a" * 64)
    assert (ref.org, ref.repo) == ("web", "example.org-8443-aaaaaaaaaaaa")


def test_default_id_is_the_stem_and_avoids_an_id_that_another_reference_has() -> None:
    assert store.default_id("Sub/SmolLM2 135M.Q4_1.gguf") == "smollm2-135m.q4_1"
    taken = {"m": "hf:other/r:M.gguf"}
    assert store.default_id("M.gguf", taken, reference="hf:Org/r:M.gguf", org="Org") == "m-org"
    assert store.default_id("M.gguf", taken, reference="hf:other/r:M.gguf", org="other") == "m"
    taken |= {"m-org": "hf:Org/r:M.gguf"}
    assert store.default_id("M.gguf", taken, reference="hf:Org/s:M.gguf", org="Org") == "m-org-2"
    assert store.default_id("M.gguf", taken, reference="hf:Org/r:M.gguf", org="Org") == "m-org"


def test_what_is_put_is_read_and_found(tmp_path: Path) -> None:
    one = entry(tmp_path)
    assert store.put(tmp_path, tmp_path / "org" / "repo", one) is True
    assert store.put(tmp_path, tmp_path / "org" / "repo", one) is False
    entries, problems = store.read(tmp_path)
    assert (entries, problems) == ([one], [])
    for text in ("model-q4_k_m", f"hf:org/repo:{Q4}", "hf:org/repo", "hf:org/repo:Q4_K_M", f"file://{one['path']}"):
        assert store.find(entries, store.parse_ref(text)) == one, text
    for text in ("other", "hf:org/other", "hf:org/repo:Q8_0"):
        assert store.find(entries, store.parse_ref(text)) is None, text


def test_the_catalog_is_yaml_that_others_read(tmp_path: Path) -> None:
    store.put(tmp_path, tmp_path / "org" / "repo", entry(tmp_path))
    path = tmp_path / "org" / "repo" / "metadata.yaml"
    assert yaml.safe_load(path.read_text()) == json.loads(path.read_text())
    assert path.stat().st_mode & 0o777 == 0o644


def test_two_quantisations_of_a_repository_are_two_models(tmp_path: Path) -> None:
    home = tmp_path / "org" / "repo"
    store.put(tmp_path, home, entry(tmp_path))
    (home / Q8).write_bytes(b"GGUF....")
    store.put(tmp_path, home, entry(tmp_path, id="model-q8_0", reference=f"hf:org/repo:{Q8}", path=str(home / Q8)))
    entries, _ = store.read(tmp_path)
    assert [e["id"] for e in entries] == ["model-q4_k_m", "model-q8_0"]
    with pytest.raises(store.CatalogError, match="2 files"):
        store.find(entries, store.parse_ref("hf:org/repo"))
    assert store.remove("model-q4_k_m", home) is True
    assert [e["id"] for e in store.read(tmp_path)[0]] == ["model-q8_0"]
    assert store.remove("model-q8_0", home) is True
    assert not (home / "metadata.yaml").exists()


def test_hand_written_yaml_of_one_model_is_read(tmp_path: Path) -> None:
    one = entry(tmp_path)
    (tmp_path / "org" / "repo" / "metadata.yaml").write_text(yaml.safe_dump(one))
    assert store.read(tmp_path)[0] == [one]


def test_yaml_is_read_by_another_interpreter_where_this_one_has_no_pyyaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes' own Python has no packages; a runtime's has."""
    one = entry(tmp_path)
    (tmp_path / "org" / "repo" / "metadata.yaml").write_text(yaml.safe_dump(one))
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert store.read(tmp_path, sys.executable)[0] == [one]
    entries, problems = store.read(tmp_path)
    assert entries == []
    assert "PyYAML" in problems[0]["problem"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "not valid YAML"),
        ("[]", "neither one model"),
        ('{"models": [{"id": "x"}]}', "reference is missing"),
        ('{"models": ["x"]}', "not a mapping"),
        ('{"models": [{"id": "x", "reference": "r", "path": "/p", "status": "Ready"}]}', "size_bytes"),
        ('{"models": [{"id": "x", "reference": "r", "path": "/p", "status": "ready", "size_bytes": 1}]}', "status is 'ready'"),
    ],
)
def test_broken_metadata_is_reported_and_the_others_are_still_read(tmp_path: Path, text: str, expected: str) -> None:
    store.put(tmp_path, tmp_path / "org" / "repo", entry(tmp_path))
    bad = tmp_path / "bad" / "repo"
    bad.mkdir(parents=True)
    (bad / "metadata.yaml").write_text(text)
    entries, problems = store.read(tmp_path)
    assert [e["id"] for e in entries] == ["model-q4_k_m"]
    assert len(problems) == 1
    assert problems[0]["path"].endswith("bad/repo/metadata.yaml")
    assert expected in problems[0]["problem"]


def test_a_broken_file_is_set_aside_with_what_was_good_in_it_kept(tmp_path: Path) -> None:
    """SPEC E-06: kept as .corrupt, reported for as long as it is there, the others served."""
    home = tmp_path / "org" / "repo"
    one = entry(tmp_path)
    (home / "metadata.yaml").write_text(json.dumps({"models": [one, {"id": "half"}]}))
    assert len(store.read(tmp_path)[1]) == 1
    assert not (home / "metadata.yaml.corrupt").exists()  # who only looks changes nothing

    entries, problems = store.read(tmp_path, set_aside=True)

    assert [e["id"] for e in entries] == [one["id"]]
    assert "metadata.yaml.corrupt (set aside)" in problems[0]["path"]
    assert "half" in (home / "metadata.yaml.corrupt").read_text()
    entries, problems = store.read(tmp_path, set_aside=True)
    assert [e["id"] for e in entries] == [one["id"]]
    assert len(problems) == 1
    assert "rename" in problems[0]["problem"]


def test_a_broken_file_is_never_written_over(tmp_path: Path) -> None:
    home = tmp_path / "org" / "repo"
    one = entry(tmp_path)
    (home / "metadata.yaml").write_text("a: [")
    store.put(tmp_path, home, one)
    assert (home / "metadata.yaml.corrupt").read_text() == "a: ["
    assert store.read(tmp_path)[0] == [one]


def test_what_only_this_interpreter_can_not_read_is_not_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "repo").mkdir(parents=True)
    (tmp_path / "org" / "repo" / "metadata.yaml").write_text(yaml.safe_dump(entry(tmp_path)))
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert len(store.read(tmp_path, set_aside=True)[1]) == 1
    assert (tmp_path / "org" / "repo" / "metadata.yaml").exists()


def test_a_ready_model_without_its_file_or_with_another_size_is_failed(tmp_path: Path) -> None:
    one = entry(tmp_path)
    store.put(tmp_path, tmp_path / "org" / "repo", one)
    Path(one["path"]).write_bytes(b"short")
    assert "5 bytes" in store.read(tmp_path)[0][0]["problem"]
    Path(one["path"]).unlink()
    (found,) = store.read(tmp_path)[0]
    assert found["status"] == "Failed"
    assert "No such file" in found["problem"]


def test_a_download_counts_as_running_while_its_partial_file_is_locked(tmp_path: Path) -> None:
    one = entry(tmp_path, status="Downloading")
    store.put(tmp_path, tmp_path / "org" / "repo", one)
    partial = store.partial_path(Path(one["path"]))
    with partial.open("wb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert store.read(tmp_path)[0][0]["status"] == "Downloading"
    (found,) = store.read(tmp_path)[0]
    assert found["status"] == "Failed"
    assert "interrupted" in found["problem"]


def test_metadata_is_written_only_beneath_the_models_directory(tmp_path: Path) -> None:
    with pytest.raises((ValueError, store.CatalogError)):
        store.put(tmp_path / "models", tmp_path / "elsewhere" / "x", entry(tmp_path))
    with pytest.raises(store.CatalogError):
        store.put(tmp_path, tmp_path / "org", entry(tmp_path))


def test_a_hundred_models_are_listed_within_the_budget(tmp_path: Path) -> None:
    """SPEC 3.8: under 10 ms for 100 models; five times that here, for a machine that is busy."""
    import time

    for i in range(100):
        one = entry(tmp_path, id=f"m{i}", reference=f"hf:org{i}/repo:{Q4}")
        store.put(tmp_path, tmp_path / f"org{i}" / "repo", one)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        entries, problems = store.read(tmp_path)
        times.append(time.perf_counter() - began)
    assert len(entries) == 100
    assert problems == []
    assert min(times) < 0.05
