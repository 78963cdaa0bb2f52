"""`sparsify inspect`: what a checkpoint consists of."""

from __future__ import annotations

from dataclasses import asdict

from sparsify.cli import console, options


def inspect(path: options.Model, json: options.Json = False) -> None:
    """Show each block-sparse layer of a checkpoint: shape, block, density, bytes. No weights are loaded."""
    from sparsify.checkpoint.reader import open_checkpoint

    info = open_checkpoint(path)
    if json:
        layers = [asdict(layer) | {"block": str(layer.block)} for layer in info.layers]
        console.print_json(
            {
                "path": info.path,
                "architectures": info.config.get("architectures"),
                "layers": layers,
                "kept_dense": info.kept_dense,
                "dense_bytes": info.dense_bytes,
                "total_bytes": info.total_bytes,
                "files": info.files,
            }
        )
        return
    rows = [
        [
            layer.name,
            "x".join(map(str, layer.shape)),
            str(layer.block),
            f"{layer.density:.3f}",
            f"{layer.bytes_stored:,}",
            f"{layer.bytes_dense:,}",
        ]
        for layer in info.layers
    ]
    if rows:
        console.print_table(["layer", "shape", "block", "density", "bytes", "bytes if dense"], rows)
        stored, dense = (
            sum(getattr(layer, key) for layer in info.layers) for key in ("bytes_stored", "bytes_dense")
        )
        console.say(
            f"{len(rows)} block-sparse weights take {console.size(stored)} instead of {console.size(dense)}"
        )
    else:
        console.say("no block-sparse layers: a dense checkpoint")
    if info.kept_dense:
        title = f"pruned, and dense all the same: {len(info.kept_dense)}"
        console.print_table(["layer", "why"], [[name, why] for name, why in info.kept_dense.items()], title)
    console.say(
        f"other tensors {console.size(info.dense_bytes)}; {len(info.files)} weight "
        f"{'file' if len(info.files) == 1 else 'files'}, {console.size(info.total_bytes)}"
    )
