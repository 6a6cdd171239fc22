"""``rbee-ctl bundle``: everything that a fleet without internet needs, in one file."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rbee_ctl.commands.options import Json, Nodes, Verbose, session
from rbee_ctl.result import OperationResult

if TYPE_CHECKING:
    from rbee_ctl.session import Session

app = typer.Typer(help="A fleet without internet, in one file: create, verify, install.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE", help="the bundle, a tar file")]


@app.command()
def create(
    ctx: typer.Context,
    file: File,
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="REF", help="also this model, fetched from the hub; may be repeated")
    ] = None,
    declared: Annotated[bool, typer.Option(help="the models that the inventory declares")] = True,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Put wheels of controller and nodes and the models into one file. The same contents give the same bytes."""
    from rbee_ctl import bundle, bundle_parts
    from rbee_serve.contract.errors import InsufficientDisk

    s = session(ctx, json=json, verbose=verbose)
    file = file.absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    models = bundle_parts.declared(s.inventory, _say(s)) if declared else []
    hub = bundle_parts.HubSettings.of(s.inventory if s.settings.inventory.value is not None else None)
    models += [bundle_parts.fetched(reference, _say(s), hub) for reference in model or []]
    with tempfile.TemporaryDirectory(prefix=".rbee-bundle-", dir=file.parent) as scratch:
        s.ui.narrate("ctl", "bundle", "collecting the wheels (the first time llama.cpp is compiled, which takes minutes)")
        wheels = bundle_parts.wheelhouse(f"--controller={scratch}")
        model_files, said = bundle_parts.sources_of(models)
        sources = [bundle.Source(bundle_parts.NODES, Path(wheels["archive"])), *model_files]
        sources += [bundle.Source(f"controller/{p.name}", p) for p in sorted(Path(scratch).iterdir())]
        known = ("rbee_version", "python", "machine", "build", "sources", "llama")
        facts = {k: wheels[k] for k in ("rbee_version", "python", "machine")}
        facts |= {"wheels": {k: wheels[k] for k in known}, "models": said}
        needed = sum(source.path.stat().st_size for source in sources)
        if (free := shutil.disk_usage(file.parent).free) < needed + (1 << 20):
            words = f"the bundle takes {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free in {file.parent}"
            raise InsufficientDisk(words, hint="write it elsewhere", required_bytes=needed, available_bytes=free)
        contents = bundle.write(file, sources, facts, _progress(s))
    return _result("bundle create", file, contents)


@app.command()
def verify(ctx: typer.Context, file: File, json: Json = False) -> OperationResult:
    """Read the whole file: a flipped byte, a missing or an extra file is found and named."""
    from rbee_ctl import bundle

    s = session(ctx, json=json)
    return _result("bundle verify", file, bundle.read(_there(file), on_bytes=_progress(s)))


@app.command()
def install(
    ctx: typer.Context,
    file: File,
    node: Nodes = None,
    inventory: Annotated[Path | None, typer.Option("--inventory", "-i", metavar="FILE", help="Ansible inventory")] = None,
    apply: Annotated[
        bool, typer.Option(help="deploy the inventory's fleet; without it wheels and models are only laid out")
    ] = True,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Verify a bundle, lay its wheels and models where site.yml looks, deploy the fleet. Nothing is asked of any network."""
    import os

    from rbee_ctl import bundle, bundle_parts
    from rbee_ctl.commands.fleet import per_host
    from rbee_serve.contract.errors import BundleInvalid

    s = session(ctx, json=json, verbose=verbose)
    if inventory is not None:
        os.environ["RBEE_INVENTORY"] = str(inventory)
    if apply:
        s.known_node(node)  # before anything is unpacked
    cache = bundle_parts.cache()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=cache) as unpacked:
        contents = bundle.read(_there(file), Path(unpacked), _progress(s))
        here = bundle_parts.wheelhouse("--plan")
        if why := bundle_parts.misfit(contents, here):
            raise BundleInvalid(
                f"{file} is not for this rbee-ctl: {why}",
                hint=f"install the one in the bundle: tar -xf {file} controller README.txt, then as README.txt says",
                bundle=str(file),
            )
        laid = bundle_parts.lay_out(contents, Path(unpacked), here)
    s.ui.narrate("ctl", "bundle", f"{len(laid)} files laid into {cache}" if laid else f"everything is in {cache} already")
    if not apply:
        return dataclasses.replace(_result("bundle install", file, contents), messages=("next: rbee-ctl apply",))
    models = [{k: m[k] for k in ("id", "reference", "sha256")} for m in contents.facts["models"]]
    play = s.play("site", limit=node, extra_vars={"rbee_bundle_models": models})
    return per_host("bundle install", play, "hosts")


def _there(file: Path) -> Path:
    from rbee_serve.contract.errors import BundleInvalid

    if not file.is_file():
        raise BundleInvalid(f"{file} is not there", hint="rbee-ctl bundle create FILE", bundle=str(file))
    return file


def _result(command: str, file: Path, contents: Any) -> OperationResult:
    facts, files = contents.facts, contents.files
    data = {
        "bundle": str(file),
        "size_bytes": file.stat().st_size,
        "rbee_version": facts["rbee_version"],
        "python": facts["python"],
        "machine": facts["machine"],
        "wheels": sum(name.startswith("controller/") and name.endswith(".whl") for name in files),
        "models": [{**m, "size_bytes": sum(files[name][0] for name in m["files"])} for m in facts["models"]],
        "files": len(files),
    }
    return OperationResult(command, data={"bundle": data}, view="bundle")


def _say(s: Session) -> Any:
    return lambda action, text: s.ui.progress("ctl", action, text)


def _progress(s: Session) -> Any:
    def on_bytes(stage: str, done: int, total: int) -> None:
        s.ui.progress("ctl", "bundle", f"{stage}: {done / 1e6:.0f} of {total / 1e6:.0f} MB ({100 * done // max(total, 1)} %)")

    return on_bytes
