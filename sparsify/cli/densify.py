"""`sparsify densify`: back to an ordinary dense checkpoint."""

from __future__ import annotations

from sparsify.cli import console, options


def densify(
    path: options.Model,
    out: options.Out,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    module: options.Module = None,
) -> None:
    """Turn a block-sparse checkpoint into an ordinary dense one, for any runtime; removed blocks become zeros."""
    from sparsify.checkpoint import densify as work
    from sparsify.checkpoint import plain
    from sparsify.checkpoint.reader import open_checkpoint

    console.quiet_transformers()
    build = None if module is None else plain.builder(path, open_checkpoint(path).config, module)
    dense = None if build is None else build()
    info, needed = work.plan(path, out, force, dense)
    if not dry_run:
        with console.RichProgress().task(f"writing {out}"):
            work.densify(path, out, force=force, module=dense)
    if json:
        document = {
            "path": info.path,
            "out": console.absolute(out),
            "layers": len(info.layers),
            "bytes": needed,
        }
        console.print_json(document | {"written": not dry_run})
        return
    verb = "would be" if dry_run else "were"
    console.say(
        f"{len(info.layers)} block-sparse weights {verb} made dense: {console.size(needed)} of weights"
    )
    console.say(f"{'would be written' if dry_run else 'written'} to {console.absolute(out)}")
