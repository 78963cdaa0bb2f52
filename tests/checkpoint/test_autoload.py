"""Programs that never import sparsify: with the package installed they load its checkpoints, without it they stop."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify
from sparsify import _autoload
from sparsify.checkpoint import writer
from sparsify.layers.swap import convert
from tests.architectures.zoo import BY_NAME, prune

ROOT = Path(sparsify.__file__).parents[1]


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a fresh process in which the package can be imported only as `environment` says."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """Environment of a program on a machine where the package is installed with its entry point."""
    info = tmp_path / "site" / "block_sparsify-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: block-sparsify\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nsparsify = sparsify._autoload:install\n")
    return {"PYTHONPATH": f"{info.parent}{os.pathsep}{ROOT}"}


def save_sparse(name: str, folder: Path, only: str = "", **options: Any) -> Any:
    model = BY_NAME[name].build()
    masks, _ = prune(model, BY_NAME[name].block)
    convert(model, {key: mask for key, mask in masks.items() if only in key})
    writer.save(model, folder, **options)
    return model


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", *(f"w{i}" for i in range(329))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>")


def test_installed_package_is_enough(installed: dict[str, str], tmp_path: Path) -> None:
    model = save_sparse("llama", tmp_path / "sparse", tokenizer=tokenizer())
    ids = torch.arange(3, 20)[None]
    code = """
import torch
from transformers import AutoModelForCausalLM, pipeline
model = AutoModelForCausalLM.from_pretrained("sparse")
torch.save(model(torch.arange(3, 20)[None]).logits.detach(), "logits.pt")
text = pipeline("text-generation", "sparse", max_new_tokens=5)("w5 w6")[0]["generated_text"]
print(text)
"""
    done = run(code, tmp_path, **installed)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 6, done.stdout  # the prompt's second word runs into the first new one
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(ids).logits)


def test_torch_imported_in_the_middle_of_transformers(installed: dict[str, str], tmp_path: Path) -> None:
    """Here the module to register with is already half imported when torch calls the hook."""
    code = """
import sys, transformers.quantizers.auto as auto, transformers.modeling_utils
assert "block_sparse" in auto.AUTO_QUANTIZER_MAPPING, "not registered"
assert not [name for name in sys.modules if name.startswith("sparsify.kernels.triton")]
"""
    done = run(code, tmp_path, **installed)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A library `hooked` that our `registrar` is to be registered with, and a fresh hook for them."""
    for name, text in {
        "hooked.py": "known = []",
        "registrar.py": "def register():\n    import hooked\n    hooked.known.append('ours')",
        "middle.py": "from sparsify import _autoload\n_autoload.install()\nknown = []",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(_autoload, "_HOOKS", {"hooked": "registrar"})
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f) is not _autoload._Finder])
    yield tmp_path
    for name in ("hooked", "registrar", "middle"):
        sys.modules.pop(name, None)


def test_registered_right_after_the_import(library: Path) -> None:
    _autoload.install()
    assert importlib.util.find_spec("hooked") is not None  # looking is not importing
    assert "registrar" not in sys.modules
    assert importlib.import_module("hooked").known == ["ours"]


def test_registered_at_once_with_what_is_there_already(library: Path) -> None:
    """`import sparsify` after transformers, in a process whose torch does not call entry points."""
    hooked = importlib.import_module("hooked")
    _autoload.install()
    assert hooked.known == ["ours"]


def test_half_imported_module_is_left_to_the_next(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_autoload, "_HOOKS", {"middle": "registrar", "hooked": "registrar"})
    assert importlib.import_module("middle").known == []
    assert importlib.import_module("hooked").known == ["ours"]


def test_without_the_package_loading_stops(tmp_path: Path) -> None:
    """Whatever is packed, plain transformers must end with an error and never with made-up weights."""
    save_sparse("llama", tmp_path / "linear")
    save_sparse("gpt2", tmp_path / "conv1d")
    save_sparse("mixtral", tmp_path / "experts", only=".experts.")
    code = """
import sys
sys.modules["sparsify"] = None
import torch
from transformers import AutoModelForCausalLM
for name in ("linear", "conv1d", "experts"):
    try:
        model = AutoModelForCausalLM.from_pretrained(name)
    except RuntimeError as error:
        print(name, "stopped:", "mismatch" in str(error))
"""
    done = run(code, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} stopped: True" for name in ("linear", "conv1d", "experts")]
    assert "block_sparse" in done.stderr  # transformers names the unknown method


def test_broken_checkout_never_breaks_torch(installed: dict[str, str], tmp_path: Path) -> None:
    """Without symbolic links the package cannot work, but `import torch` of other programs must."""
    package = tmp_path / "broken" / "sparsify"
    package.mkdir(parents=True)
    for name in ("__init__.py", "_autoload.py"):
        (package / name).write_text((ROOT / "sparsify" / name).read_text())
    for name in ("kernels", "pruners", "recipes"):
        (package / name).write_text(f"../{name}")
    paths = installed["PYTHONPATH"].replace(str(ROOT), str(package.parent))
    code = """
import torch
print(torch.ones(2).sum().item())
import sparsify
try:
    sparsify.BlockShape
except ImportError as error:
    print(error)
"""
    done = run(code, tmp_path, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    total, message = done.stdout.splitlines()
    assert total == "2.0" and "git config core.symlinks true" in message


def test_failing_registration_only_warns(library: Path) -> None:
    (library / "registrar.py").write_text("raise RuntimeError('broken')")
    _autoload.install()
    with pytest.warns(UserWarning, match="could not register itself with hooked: broken"):
        importlib.import_module("hooked")


def test_second_call_changes_nothing() -> None:
    _autoload.install()
    before = list(sys.meta_path)
    _autoload.install()
    assert sys.meta_path == before
    assert sum(isinstance(finder, _autoload._Finder) for finder in before) == 1


def test_hook_uses_the_standard_library_alone() -> None:
    tree = ast.parse(Path(_autoload.__file__).read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert all(name.split(".")[0] in sys.stdlib_module_names for name in names), names
