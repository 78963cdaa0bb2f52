"""`sparsify pruners`: the pruning algorithms by name."""

from __future__ import annotations

from inspect import getdoc, signature

from sparsify.cli import console, options


def pruners(json: options.Json = False) -> None:
    """List the pruners with their options."""
    from sparsify.pruner import available, create_pruner

    found = {name: type(create_pruner(name)) for name in available()}
    entries = [
        {
            "name": name,
            "summary": (getdoc(cls) or "").partition("\n")[0],
            "options": {key: value.default for key, value in signature(cls).parameters.items()},
        }
        for name, cls in found.items()
    ]
    if json:
        console.print_json(entries)
        return
    rows = [
        [
            entry["name"],
            entry["summary"],
            ", ".join(f"{key}={value}" for key, value in entry["options"].items()),
        ]
        for entry in entries
    ]
    console.print_table(["pruner", "what it does", "options"], rows)
