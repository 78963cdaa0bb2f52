"""`sparsify pruners`: the pruning algorithms by name."""

from __future__ import annotations

from inspect import getdoc, signature

from sparsify.cli import console, options


def pruners(json: options.Json = False) -> None:
    """List the pruners: what they do, what they need, their options."""
    from sparsify.pruner import available, find_pruner

    found = {name: find_pruner(name) for name in available()}
    entries = [
        {
            "name": name,
            "summary": (getdoc(cls) or "").partition("\n")[0],
            "needs": "training" if cls.in_training else "data" if cls.requires else "",
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
            entry["needs"],
            ", ".join(f"{key}={value}" for key, value in entry["options"].items()),
        ]
        for entry in entries
    ]
    console.print_table(["pruner", "what it does", "needs", "options"], rows)
