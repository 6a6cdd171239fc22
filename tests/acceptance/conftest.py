"""Lab fixtures: booted machines and a deployed fleet, each made once a session and taken down in any case."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from demands import lacking
from machines import Fleet, Lab, unavailable

HERE = Path(__file__).resolve().parent
NODES = 2
LIMIT_S = 1800
"""For one test with the fleet that it may have to deploy first; the commands within have limits of their own."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder ``lab`` and give it time for booting and deploying machines."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("lab")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(LIMIT_S))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what the machines' units said when a test on them failed."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        labs = {id(v): v for v in item.funcargs.values() if isinstance(v, Lab)}
        labs |= {id(v.lab): v.lab for v in item.funcargs.values() if isinstance(v, Fleet)}
        for lab in labs.values():
            for node in lab.run("status", check=False).get("nodes", []):
                report.sections.append((f"journal of {node['name']} ({node['state']})", lab.journal(node["name"])))
    return report


@pytest.fixture(scope="session")
def lab_possible() -> None:
    """Skip, or with CI=true fail, where no lab can start."""
    if reason := unavailable():
        lacking(f"no lab: {reason}")


@pytest.fixture(scope="session")
def lab(lab_possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two booted machines with nothing of rbee's on them, for the whole session."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        lab.up(NODES)
        yield lab
    finally:
        lab.down()


@pytest.fixture(scope="session")
def fleet(lab: Lab, model_path: Path) -> Fleet:
    """The lab after one run of site.yml: queen's URL and client key as the run wrote them."""
    done = lab.playbook("site", timeout=1500)
    assert done.returncode == 0, f"site.yml ended with {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    client = tomllib.loads((lab.directory / "state/client.toml").read_text())
    key_file = lab.directory / "state" / client["api_key_file"]
    return Fleet(lab, client["queen_url"].rstrip("/"), key_file.read_text().strip())


@pytest.fixture
def own_lab(lab_possible: None, tmp_path: Path) -> Iterator[Lab]:
    """A lab of this test's own that nothing is booted in yet."""
    lab = Lab(tmp_path / "lab")
    try:
        yield lab
    finally:
        lab.run("down", check=False)
