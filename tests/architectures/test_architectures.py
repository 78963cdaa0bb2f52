"""Every architecture: half of its blocks' weights gone, on disk and in memory, and the outputs those of the zeros."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sparsify.checkpoint import reader, writer
from sparsify.layers.swap import convert, masks_of, sparse_modules
from tests.architectures.zoo import ARCHITECTURES, Architecture, prune

ALL = [pytest.param(case, id=case.name) for case in ARCHITECTURES]
GENERATORS = [pytest.param(case, id=case.name) for case in ARCHITECTURES if case.generates]


def first_output(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**batch)
    return output.logits_per_text if hasattr(output, "logits_per_text") else output.logits


def exact_output(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output in float64; the model stays in it."""
    model.config._experts_implementation = "eager"  # the fused product of experts knows no float64
    return first_output(
        model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    )


def budget(dense: torch.Tensor, exact: torch.Tensor) -> float:
    """Twice what the dense model itself loses to rounding, and a few roundings of the largest output.

    The second part matters where there are few outputs, all of which the dense model may happen to round well.
    """
    rounding = torch.finfo(dense.dtype).eps * exact.abs().max()
    return float(2 * (dense.double() - exact).abs().max() + 4 * rounding)


def live_tensors() -> list[torch.Tensor]:
    """All floating tensors alive in the process."""
    return [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor) and thing.is_floating_point()
    ]


def live_shapes(model: Any, others: list[weakref.ref[Any]]) -> set[tuple[int, ...]]:
    """Shapes of the live tensors that are neither dense parameters of `model` nor among `others`."""
    sparse = {id(p) for module in sparse_modules(model).values() for p in module.parameters()}
    own = {id(p) for p in model.parameters()} - sparse
    foreign = {id(reference()) for reference in others}
    return {tuple(tensor.shape) for tensor in live_tensors() if id(tensor) not in own | foreign}


def header_bytes(file: Path) -> int:
    """Names and shapes in front of the tensors: much of a file with many small ones."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


@pytest.mark.parametrize("case", ALL)
def test_outputs_are_those_of_the_zeros(case: Architecture, tmp_path: Path) -> None:
    model = case.build()
    masks, _ = prune(model, case.block)
    batch = case.batch()
    dense = first_output(model, batch)
    exact = exact_output(model, batch)
    convert(model.float(), masks)
    writer.save(model, tmp_path / "sparse")
    loaded = case.load(tmp_path / "sparse")
    assert (first_output(loaded, batch).double() - exact).abs().max() <= budget(dense, exact)
    assert exact.abs().max() > 1e-3  # the comparison means something


@pytest.mark.parametrize("case", [p for p in ALL if not p.values[0].routed])
def test_bfloat16(case: Architecture, tmp_path: Path) -> None:
    model = case.build().to(torch.bfloat16)
    masks, _ = prune(model, case.block)
    batch = case.batch(torch.bfloat16)
    dense = first_output(model, batch)
    exact = exact_output(model, batch)
    convert(model.to(torch.bfloat16), masks)
    writer.save(model, tmp_path / "sparse")
    loaded = case.load(tmp_path / "sparse")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert (first_output(loaded, batch).double() - exact).abs().max() <= budget(dense, exact)


@pytest.mark.parametrize("case", ALL)
def test_half_of_the_weights_is_gone(case: Architecture, tmp_path: Path) -> None:
    model = case.build()
    masks, selection = prune(model, case.block)
    shapes = {name: mask.shape for name, mask in masks.items()}
    block_elements = sum(n * k for n, k in shapes.values())
    assert not [kept for kept in selection.dense if kept.reason.startswith("smaller")]
    kept_elements = sum(mask.elements_kept for mask in masks.values())
    convert(model, masks)
    writer.save(model, tmp_path / "sparse")
    stored: dict[str, tuple[int, ...]] = {}
    with safe_open(tmp_path / "sparse" / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 -- not a mapping
            stored[key] = tuple(file.get_slice(key).get_shape())
    # What is stored, straight from the file: no mask, no metadata of ours.
    indices = {key: shape for key, shape in stored.items() if key.endswith("_indices")}
    names = {key.removesuffix("_indices").removesuffix("crow").removesuffix("col") for key in indices}
    packed = {
        key: stored[key] for name in names for key in (f"{name}weight", name.rstrip("_")) if key in stored
    }
    assert sum(torch.Size(shape).numel() for shape in packed.values()) == pytest.approx(
        0.5 * block_elements, abs=0.01 * block_elements
    )
    assert kept_elements == pytest.approx(0.5 * block_elements, abs=0.01 * block_elements)
    dense = [shape for key, shape in stored.items() if key not in packed and key not in indices]
    elements = kept_elements + sum(torch.Size(shape).numel() for shape in [*indices.values(), *dense])
    file = tmp_path / "sparse" / "model.safetensors"
    assert file.stat().st_size - header_bytes(file) <= 1.03 * 4 * elements


@pytest.mark.parametrize("case", ALL)
def test_no_dense_copy_after_loading(case: Architecture, tmp_path: Path) -> None:
    gc.collect()
    others = [weakref.ref(tensor) for tensor in live_tensors()]  # what tests before this one left behind
    model = case.build()
    masks, selection = prune(model, case.block)
    convert(model, masks)
    writer.save(model, tmp_path / "sparse")
    expected = {name: (mask.shape, mask.blocks_kept) for name, mask in masks.items()}
    del model, masks, selection
    gc.collect()
    loaded = case.load(tmp_path / "sparse")
    first_output(loaded, case.batch())
    gc.collect()
    alive = live_shapes(loaded, others)
    for name, (shape, blocks) in expected.items():
        assert shape not in alive and shape[::-1] not in alive, (name, shape)
        assert masks_of(loaded)[name].blocks_kept == blocks
    for module in sparse_modules(loaded).values():
        for parameter in module.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", GENERATORS)
def test_generate_is_identical(case: Architecture, cache: str, tmp_path: Path) -> None:
    model = case.build()
    masks, _ = prune(model, case.block)
    batch = {key: value for key, value in case.batch().items() if not key.startswith("decoder")}
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    want = model.generate(**batch, **options)
    convert(model, masks)
    writer.save(model, tmp_path / "sparse")
    got = case.load(tmp_path / "sparse").generate(**batch, **options)
    assert torch.equal(got, want)
    assert want.shape[1] >= 12


@pytest.mark.parametrize("case", ALL)
def test_inspection_agrees_with_the_masks(case: Architecture, tmp_path: Path) -> None:
    model = case.build()
    masks, _ = prune(model, case.block)
    convert(model, masks)
    writer.save(model, tmp_path / "sparse")
    info = reader.open_checkpoint(tmp_path / "sparse")
    elements = sum(torch.Size(layer.shape).numel() for layer in info.layers)
    assert elements == sum(mask.shape[0] * mask.shape[1] for mask in masks.values())
    kept = sum(layer.density * torch.Size(layer.shape).numel() for layer in info.layers)
    assert kept == pytest.approx(sum(mask.elements_kept for mask in masks.values()))
    assert info.total_bytes - info.dense_bytes - sum(layer.bytes_stored for layer in info.layers) < 64_000
