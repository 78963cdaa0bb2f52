"""Tuning: right kernels alone are timed, nothing is measured twice, and the results decide."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import sparsify
from sparsify.bench import products
from sparsify.bench.products import Product, Weight, contest
from sparsify.bench.timing import Times
from sparsify.blocks import BlockMask, BlockShape
from sparsify.errors import CheckpointError, ConfigError, OutputError, SparsifyError
from sparsify.kernels import dispatch, tuning
from sparsify.kernels.linear import reference
from sparsify.kernels.tuning_files import Candidate, device_name, read, user_file
from sparsify.layers.swap import masks_of
from sparsify.tune import cases as tune_cases
from sparsify.tune import run as tune_run
from sparsify.tune import verdict
from sparsify.tune.run import tune
from tests.architectures.zoo import BY_NAME
from tests.cli import checkpoints

CPU = torch.device("cpu")
SMALL = {"shapes": [(64, 48)], "blocks": ["16x16"], "sparsities": [0.5], "tokens": [1, 4], "device": "cpu"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(products, "CPU_COPIES", 1)  # cold weights cost time, and matter for no test but one
    dispatch.forget()
    yield
    dispatch.forget()


def weight(density=0.5, shape=(64, 48), block=(16, 16), dtype=torch.float32) -> Weight:
    size = BlockShape(*block)
    return Weight(BlockMask(torch.rand(size.grid(shape)) < density, shape, size), dtype, CPU)


class Runners:
    """Candidates that exist for a test alone: named, slow by a factor, right or wrong."""

    def __init__(self, monkeypatch, slowness: dict[str, float], wrong: dict[str, object] | None = None):
        self.slowness, self.wrong = slowness, wrong or {}
        self.ran: list[str] = []
        self.raced: list[list[str]] = []
        found = [Candidate.parse(text) for text in slowness]
        monkeypatch.setattr(dispatch, "candidates", lambda *arguments: found)
        monkeypatch.setattr(dispatch, "load", self.load)
        monkeypatch.setattr(products, "race", self.race)

    def load(self, candidate: Candidate, op: str):
        def run(*arguments):
            self.ran.append(str(candidate))
            fault = self.wrong.get(str(candidate))
            if isinstance(fault, Exception):
                raise fault
            result = getattr(reference, op)(*arguments)
            if fault is not None:
                result[-1, -1] = fault
            return result

        return run

    def race(self, calls, device, repeats):
        self.raced.append([*calls])
        return Times({name: self.slowness.get(name, 6.0) * 1e-6 for name in calls}, "cpu", repeats)


class TestContest:
    def test_a_kernel_is_timed_with_its_options(self, monkeypatch):
        runners = Runners(monkeypatch, {"a": 2, "a tile=1": 3, "a tile=2": 2, "b": 3})
        outcome = contest(Product("dsd", weight(), 4), 5)
        assert runners.raced == [["a", "b"], ["dense", "a tile=1", "a tile=2", "b"]]
        assert outcome.dense == pytest.approx(6)
        times = {str(candidate): time for candidate, time in outcome.times.items()}
        assert times == pytest.approx({"a tile=1": 3, "a tile=2": 2, "b": 3})

    def test_a_hopeless_kernel_is_not_tried_with_options_or_again(self, monkeypatch):
        runners = Runners(monkeypatch, {"a": 2, "b": 5, "b tile=1": 5, "c": 3, "c tile=1": 9})
        outcome = contest(Product("dsd", weight(), 4), 5)
        assert runners.raced[1] == ["dense", "a", "c tile=1"]
        ran = len(runners.ran)
        contest(Product("dsd", weight(0.25), 4), 5, outcome.ratios)
        assert runners.raced[2:] == [["dense", "a"]]  # the coarse race is known already
        assert set(runners.ran[ran:]) == {"a"}

    def test_many_options_are_tried_only_where_the_kernel_is_close(self, monkeypatch):
        options = [f"{kernel} tile={tile}" for kernel in "abc" for tile in range(1, 6)]
        runners = Runners(monkeypatch, {"a": 1, "b": 1.2, "c": 1.3} | dict.fromkeys(options, 1))
        contest(Product("dsd", weight(), 4), 5)
        assert runners.raced[1] == ["dense", *options[:10], "c"]

    def test_what_was_fast_and_is_wrong_now_is_replaced(self, monkeypatch):
        runners = Runners(monkeypatch, {"a": 2, "b": 1}, {"b": math.nan})
        outcome = contest(Product("dsd", weight(), 4), 5, {Candidate("b"): 1.0})
        assert list(map(str, outcome.times)) == ["a"] and runners.raced == [["dense", "a"]]

    @pytest.mark.parametrize("fault", [math.nan, 1e3, math.inf])
    @pytest.mark.parametrize("op", ["dsd", "dds", "sdd"])
    def test_one_wrong_element_disqualifies(self, op, fault, monkeypatch):
        wrong = torch.full((16,), fault) if op == "sdd" else fault
        runners = Runners(monkeypatch, {"a": 2, "b": 1}, {"b": wrong})
        outcome = contest(Product(op, weight(), 4), 5)
        assert list(map(str, outcome.times)) == ["a"] and runners.raced == [["dense", "a"]]
        ((candidate, text),) = outcome.wrong.items()
        assert str(candidate) == "b" and text.startswith("off by ") and "allowed are" in text

    def test_a_kernel_that_fails_disqualifies_itself(self, monkeypatch):
        Runners(monkeypatch, {"a": 2, "b": 1}, {"b": TypeError("no such option\nat all")})
        outcome = contest(Product("dsd", weight(), 4), 5)
        assert outcome.wrong == {Candidate("b"): "TypeError: no such option"}

    def test_a_broken_device_ends_the_tuning(self, monkeypatch):
        Runners(monkeypatch, {"a": 2}, {"a": torch.AcceleratorError("illegal memory access")})
        with pytest.raises(torch.AcceleratorError):
            contest(Product("dsd", weight(), 4), 5)

    def test_options_that_are_all_wrong_leave_the_kernels_own_choice(self, monkeypatch):
        Runners(monkeypatch, {"a": 2, "a tile=1": 1}, {"a tile=1": math.nan})
        assert list(map(str, contest(Product("dsd", weight(), 4), 5).times)) == ["a"]

    def test_nothing_right_is_no_time(self, monkeypatch):
        Runners(monkeypatch, {"a": 2}, {"a": math.nan})
        assert contest(Product("dsd", weight(), 4), 5).times == {}

    @pytest.mark.parametrize("op", ["dsd", "dds", "sdd"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_real_kernels_pass(self, op, dtype, monkeypatch):
        portable = [
            Candidate(f"triton_{op}"),
            Candidate(f"triton_{op}", (("stages", 2),)),
            Candidate("reference"),
        ]
        if dtype == torch.float32:
            monkeypatch.setattr(dispatch, "candidates", lambda *arguments: portable)
        product = Product(op, weight(shape=(70, 100), dtype=dtype), 5)
        assert [product.fault(candidate) for candidate in product.candidates] == [None] * len(
            product.candidates
        )
        outcome = contest(product, 1)
        assert not outcome.wrong and min(outcome.times.values()) > 0 and outcome.dense > 0

    def test_few_tokens_read_every_copy_of_the_weight(self, monkeypatch):
        monkeypatch.setattr(products, "CPU_COPIES", 3)
        runners = Runners(monkeypatch, {"a": 3})
        product = Product("dsd", weight(), 4)
        assert len({values.data_ptr() for pair in product.copies for values in pair}) == 2 * 3
        assert all(torch.equal(values, product.copies[0][1]) for _, values in product.copies)
        outcome = contest(product, 5)
        assert runners.ran == ["a"] * 3 and outcome.times == {Candidate("a"): pytest.approx(1)}
        assert outcome.dense == pytest.approx(2)
        assert len(Product("dsd", weight(), 65).copies) == 1
        monkeypatch.setattr(products, "COLD_BYTES", 2 * 64 * 48 * 4)
        assert len(Product("dsd", weight(), 4).copies) == 2

    def test_empty_and_full_masks(self):
        for density in (0.0, 1.0):
            assert contest(Product("dsd", weight(density), 4), 1).times


class TestCases:
    def test_random_masks_have_the_sparsity_asked_for(self):
        named = [(("a", "b"), (64, 96)), (("tiny",), (8, 8))]
        found = tune_cases.with_random_masks(named, torch.float32, ["16x16", "32"], [0.75, 0.5])
        assert [(case.names, str(case.mask.block), case.mask.density) for case in found] == [
            (("a", "b"), "16x16", 0.5), (("a", "b"), "16x16", 0.25),
            (("a", "b"), "32x32", 0.5), (("a", "b"), "32x32", pytest.approx(1 / 3)),
        ]  # fmt: skip
        again = tune_cases.with_random_masks(named, torch.float32, ["16x16", "32"], [0.5, 0.75])
        assert all(torch.equal(a.mask.keep, b.mask.keep) for a, b in zip(found, again, strict=True))

    @pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
    def test_a_sparse_checkpoint_keeps_its_masks(self, name, tmp_path):
        model = BY_NAME[name].build()
        sparsify.prune(model, block=BY_NAME[name].block, sparsity=0.5)
        sparsify.save(model, tmp_path / "sparse")
        found = tune_cases.of_model(tmp_path / "sparse", None, None, None, False)
        masks = masks_of(model)
        assert sorted(name for case in found for name in case.names) == sorted(masks)
        for case in found:
            assert any(torch.equal(case.mask.keep, masks[name].keep) for name in case.names)
            assert {masks[name].shape for name in case.names} == {case.mask.shape}
        assert len(found) < len(masks)

    def test_a_dense_checkpoint_gets_random_masks_without_its_weights(self, tmp_path):
        checkpoints.llama(tmp_path / "dense", torch.bfloat16)
        found = tune_cases.of_model(tmp_path / "dense", None, ["32x32"], [0.5], False)
        assert {case.mask.shape: len(case.names) for case in found} == {
            (128, 128): 4, (64, 128): 4, (200, 128): 4, (128, 200): 2,
        }  # fmt: skip
        assert {case.dtype for case in found} == {torch.bfloat16}
        with pytest.raises(ConfigError, match="is a dense checkpoint: say with --block and --sparsity"):
            tune_cases.of_model(tmp_path / "dense", None, None, None, False)

    def test_of_convolutions_those_of_a_single_pixel_are_linear_layers(self, tmp_path):
        model = BY_NAME["resnet"].build()
        model.save_pretrained(tmp_path / "dense")
        found = tune_cases.of_model(tmp_path / "dense", None, ["32x32"], [0.5], False)
        names = {name for case in found for name in case.names}
        assert names and all(name.endswith("shortcut.convolution") for name in names)
        sparsify.prune(model, block="32x32", sparsity=0.5, floor=0.2)
        sparsify.save(model, tmp_path / "sparse")
        found = tune_cases.of_model(tmp_path / "sparse", None, None, None, False)
        assert {name for case in found for name in case.names} == names
        narrow = BY_NAME["resnet"].build()
        sparsify.prune(narrow, block="32x32", sparsity=0.5, ignore=["re:shortcut"])
        sparsify.save(narrow, tmp_path / "wide")
        with pytest.raises(ConfigError, match=r"no layer to tune: convolutions wider than a pixel"):
            tune_cases.of_model(tmp_path / "wide", None, None, None, False)

    def test_standard_shapes_are_distinct(self):
        assert len(set(tune_cases.STANDARD_SHAPES)) == len(tune_cases.STANDARD_SHAPES)


class TestRun:
    def test_measures_writes_and_decides(self):
        report = tune(**SMALL, repeats=2)
        assert [(row["tokens"], row["kernel"], row["layers"]) for row in report["rows"]] == [
            (1, "reference", 1), (4, "reference", 1),
        ]  # fmt: skip
        assert report["file"] == str(user_file(device_name(CPU))) and (
            report["measured"],
            report["left"],
        ) == (2, 0)
        for tokens in (1, 2, 4):
            assert tuning.speedup(CPU, torch.float32, (16, 16), (64, 48), 0.5, tokens)
        assert json.dumps(report)

    def test_goes_on_where_it_stopped(self, monkeypatch):
        assert tune(**SMALL, repeats=1)["measured"] == 2
        report = tune(**SMALL | {"tokens": "1,4,16"}, repeats=1)
        assert (report["measured"], len(report["rows"])) == (1, 3)
        assert tune(**SMALL, repeats=1, force=True)["measured"] == 2
        assert len(read(user_file(device_name(CPU)))) == 3

    def test_training_measures_gradients_for_many_tokens(self):
        report = tune(**SMALL | {"tokens": [4, 256]}, repeats=1, training=True)
        assert [(row["op"], row["tokens"]) for row in report["rows"]] == [
            ("dsd", 4), ("dsd", 256), ("dds", 256), ("sdd", 256),
        ]  # fmt: skip

    def test_another_file(self, tmp_path):
        assert tune(**SMALL, repeats=1, out=tmp_path / "new" / "table.json")["measured"] == 2
        assert len(read(tmp_path / "new" / "table.json")) == 2
        assert not user_file(device_name(CPU)).exists()

    def test_an_interruption_keeps_what_is_measured(self, monkeypatch):
        right, calls = tune_run.contest, []

        def once(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return right(*arguments)

        monkeypatch.setattr(tune_run, "contest", once)
        with pytest.raises(
            KeyboardInterrupt, match=r"what was measured is kept in .*; run it again to go on"
        ):
            tune(**SMALL, repeats=1)
        assert [entry.tokens for entry in read(user_file(device_name(CPU)))] == [1]
        assert tune(**SMALL, repeats=1)["measured"] == 1

    def test_stops_in_time_and_says_what_is_left(self):
        report = tune(**SMALL, repeats=1, minutes=0)
        assert (report["measured"], report["left"], report["rows"]) == (0, 2, [])
        assert "2 measurements still to be made" in verdict.closing(report)[1]

    def test_wrong_kernels_are_reported(self, monkeypatch):
        Runners(monkeypatch, {"a": 8, "b": 1}, {"b": math.nan})
        report = tune(**SMALL, repeats=1)
        assert [row["kernel"] for row in report["rows"]] == ["a", "a"]
        (dropped,) = report["dropped"]
        assert dropped["candidate"] == "b" and dropped["first"] == "dsd of 64x48 in 16x16 at 1 tokens"
        lines = verdict.closing(report)
        assert any(line.startswith("left out: b (dsd of 64x48") for line in lines)
        assert "at 4 tokens 1 of 1 layer is slower sparse than dense" in lines

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"shapes": None}, "give a checkpoint or --shapes"),
            ({"model": "x"}, "give a checkpoint or --shapes"),
            ({"shapes": "64"}, "shapes: got '64', expected OUTxIN"),
            ({"shapes": "64x0"}, "shapes: got '64x0'"),
            ({"tokens": "0"}, "tokens: got '0'"),
            ({"repeats": 0}, "repeats: got 0"),
            ({"dtype": "int8"}, "dtype: got 'int8'"),
            ({"sparsities": [1.0]}, "sparsity: got 1, expected at least 0 and below 1"),
            ({"blocks": ["128"]}, "every weight is smaller than one block of 128"),
            ({"blocks": ["17"]}, "block shape 17x17 is not supported"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(SparsifyError, match=message):
            tune(**SMALL | options)

    def test_bad_places(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot write"):
            tune(**SMALL, out=tmp_path / "file" / "table.json")
        with pytest.raises(CheckpointError, match="is neither a folder nor a model that the Hub gives us"):
            tune("/no/such/model", device="cpu")


@pytest.mark.gpu
def test_a_gpu_is_tuned(tmp_path: Path):
    report = tune(
        shapes=[(512, 256)], blocks=["64x64", "128x16", "32x32"], sparsities=[0.5], tokens=[1, 16, 512],
        training=True, repeats=3, device="cuda", out=tmp_path / "t.json",
    )  # fmt: skip
    assert report["left"] == 0 and not report["dropped"]
    assert all(0 < row["sparse_us"] < 1000 and 0 < row["dense_us"] < 1000 for row in report["rows"])
    assert len(report["rows"]) == 3 * (3 + 2)
