"""``rbee-ctl runtime`` and ``rbee-ctl worker build|download|binary``: the builds of llama.cpp that workers run from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rbee_ctl.commands.options import Json, Node, Nodes, Verbose, Yes, session
from rbee_ctl.result import OperationResult

app = typer.Typer(help="Runtimes (worker binaries): list, get, build, download, use, delete.", no_args_is_help=True)
binary = typer.Typer(help="The same as runtime list, get, delete.", no_args_is_help=True)

Type = Annotated[str, typer.Option("--type", metavar="TYPE", help="cpu, cuda, rocm or vulkan (or cpu-llm-worker, ...)")]
AnyType = Annotated[str | None, typer.Option("--type", metavar="TYPE", help="only cpu, cuda, rocm or vulkan")]
Version = Annotated[str | None, typer.Option("--version", metavar="VERSION", help="which one; default: the current one")]


def _kind(text: str) -> str:
    """Return the type; raises InvalidBackend, BackendUnavailable."""
    from rbee_ctl.references import check_backend

    return str(check_backend(text.removesuffix("-llm-worker")))


def _variables(kind: str | None, version: str | None = None, **more: Any) -> dict[str, Any]:
    named = {"rbee_runtime_type": _kind(kind) if kind else None, "rbee_runtime_version": version, **more}
    return {k: v for k, v in named.items() if v is not None}


@binary.command("list")
@app.command("list")
def list_(
    ctx: typer.Context, node: Nodes = None, kind: AnyType = None, json: Json = False, verbose: Verbose = False
) -> OperationResult:
    """List the runtimes of machines."""
    from rbee_ctl.commands.fleet import per_host

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    return per_host("runtime list", s.look("runtime_list", limit=node, extra_vars=_variables(kind)), "runtimes")


@binary.command()
@app.command()
def get(
    ctx: typer.Context, kind: Type, node: Nodes = None, version: Version = None, json: Json = False, verbose: Verbose = False
) -> OperationResult:
    """Show one runtime: path, size, features, where it came from, who uses it."""
    from rbee_ctl.commands.fleet import per_host

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    return per_host("runtime get", s.look("runtime_get", limit=node, extra_vars=_variables(kind, version)), "runtime_record")


@binary.command()
@app.command()
def delete(
    ctx: typer.Context,
    kind: Type,
    node: Node = None,
    version: Annotated[str | None, typer.Option("--version", metavar="VERSION", help="which one; default: the only one")] = None,
    force: Annotated[bool, typer.Option("--force", help="also while a worker uses it")] = False,
    yes: Yes = False,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Delete a runtime of one machine; refused while a worker uses it."""
    from rbee_ctl.commands.fleet import per_host

    s = session(ctx, json=json, verbose=verbose)
    variables = _variables(kind, version, rbee_runtime_force=force)
    node = s.one_node(node)
    s.ui.confirm(f"delete the {_kind(kind)} runtime {version or ''} on {node}?", yes=yes)
    return per_host("runtime delete", s.play("runtime_delete", limit=node, extra_vars=variables), "runtime_deleted")


@app.command()
def use(
    ctx: typer.Context,
    kind: Type,
    version: Annotated[str, typer.Option("--version", metavar="VERSION", help="the one to switch to, also an older one")],
    node: Nodes = None,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Switch workers to another runtime, or back: one machine and worker after the other, each drained; where one does not come
    up, all of that machine go back."""
    from rbee_ctl.commands.fleet import per_host

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    return per_host("runtime use", s.play("runtime_use", limit=node, extra_vars=_variables(kind, version)), "runtime_used")


@app.command()
def build(
    ctx: typer.Context,
    kind: Type,
    node: Node = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="INDEX",
            help="address of a package index with llama-cpp-python; default: rbee_runtime_source of the inventory if it is "
            "one, else the public index",
        ),
    ] = None,
    cmake_args: Annotated[
        str | None,
        typer.Option(
            "--cmake-args",
            metavar="ARGS",
            help="CMake settings of this build, as -DCMAKE_CUDA_ARCHITECTURES=86; default: rbee_runtime_cmake_args of the "
            "inventory, else for every architecture that llama.cpp names",
        ),
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Compile a runtime on one machine, with the compiler's output as it comes."""
    from rbee_ctl.commands.fleet import per_host
    from rbee_serve.contract.errors import InvalidRequest

    s = session(ctx, json=json, verbose=verbose)
    if source is not None and (not source.startswith(("http://", "https://")) or ".whl" in source):
        raise InvalidRequest(
            f"--source {source!r}: the address of a package index expected, https://...",
            hint=f"a wheel is installed by: rbee-ctl worker download --type {kind} --source {source}",
            field="source",
        )
    variables = _variables(kind, rbee_runtime_source=source, rbee_runtime_cmake_args=cmake_args)
    return per_host("worker build", s.play("runtime_build", limit=s.one_node(node), extra_vars=variables), "runtime_made")


@app.command()
def download(
    ctx: typer.Context,
    kind: Type,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="WHERE",
            help="a wheel or a directory with one here, a wheel's address, or a package index; default: rbee_runtime_source "
            "of the inventory",
        ),
    ] = None,
    node: Nodes = None,
    sha256: Annotated[str | None, typer.Option("--sha256", metavar="DIGEST", help="digest that the wheel must have")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> OperationResult:
    """Install a runtime that was built elsewhere, checked against a digest; the address of a wheel must come with one."""
    from rbee_ctl.commands.fleet import per_host
    from rbee_serve.contract.errors import InvalidRequest

    s = session(ctx, json=json, verbose=verbose)
    s.known_node(node)
    where = source
    if source and source.startswith(("http://", "https://")) and ".whl" in source and not (sha256 or "#sha256=" in source):
        words = f"{source} comes without a digest: what lies there could be anything"
        raise InvalidRequest(words, hint="add --sha256 DIGEST", field="sha256")
    if source is not None and not source.startswith(("http://", "https://")):
        where = str(Path(source).resolve())
    variables = _variables(kind, rbee_runtime_source=where, rbee_runtime_sha256=sha256)
    return per_host("worker download", s.play("runtime_download", limit=node, extra_vars=variables), "runtime_made")
