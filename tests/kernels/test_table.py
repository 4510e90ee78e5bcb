"""The choice of products from measured times."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sensorium.kernels import ops
from sensorium.kernels.cpu.linear import floats, levels, onednn, table


@pytest.fixture
def found_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache folder without measured times; the table is read again before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table.choose_again()
    yield tmp_path
    table.choose_again()


def offer(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    products = {
        name: table.Product(lambda form, has=name in names: has, product.pack)
        for name, product in table.PRODUCTS.items()
    }
    monkeypatch.setattr(table, "PRODUCTS", products)


def measure(folder: Path, level: str, **times: dict[str, float]) -> None:
    """Write times of bf16 products; keys are r1, r8..."""
    rows = {name[1:]: own for name, own in times.items()}
    (folder / "sensorium").mkdir()
    text = json.dumps({"level": level, "times": {"bfloat16": rows}})
    (folder / "sensorium" / "products.json").write_text(text)


def test_the_fastest_on_the_whole_is_chosen(
    found_anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, "panels", "oneDNN", "torch")
    measure(
        found_anew,
        levels.level(),
        r1={"panels": 1.0, "oneDNN": 1.5, "torch": 0.9},
        r8={"panels": 3.0, "oneDNN": 2.5, "torch": 9.0},
    )
    assert table.choose("bfloat16") == "panels"
    offer(monkeypatch, "oneDNN", "torch")
    table.choose_again()
    assert table.choose("bfloat16") == "oneDNN"


def test_times_of_another_level_do_not_count(
    found_anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, "panels", "oneDNN")
    measure(found_anew, "another", r1={"panels": 1.0, "oneDNN": 9.0})
    monkeypatch.setattr(table, "SHIPPED", found_anew / "none.json")
    assert table.choose("bfloat16") == "oneDNN", "as without any measurement"


def test_a_damaged_file_is_named(found_anew: Path, caplog: pytest.LogCaptureFixture) -> None:
    measure(found_anew, levels.level())
    table.own_file().write_text("{")
    with caplog.at_level(logging.WARNING):
        assert table.choose("float16") in table.PRODUCTS
    assert str(table.own_file()) in caplog.text


@pytest.mark.usefixtures("found_anew")
@pytest.mark.parametrize("level", ["avx2", "avx-vnni", "avx512", "avx512-vnni"])
def test_16_bit_weights_run_in_panels_where_the_cpu_must_widen_them(
    monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    monkeypatch.setattr(levels, "level", lambda: level)
    offer(monkeypatch, "panels", "oneDNN", "torch")
    assert table.choose("bfloat16") == "panels"
    offer(monkeypatch, "panels", "torch")
    table.choose_again()
    assert table.choose("float16") == "panels"


@pytest.mark.usefixtures("found_anew")
@pytest.mark.parametrize(
    ("level", "product"),
    [("avx512-bf16", "panels"), ("amx-bf16", "oneDNN"), ("amx-int8", "oneDNN")],
)
def test_units_for_bf16_are_used(monkeypatch: pytest.MonkeyPatch, level: str, product: str) -> None:
    """Pairs by panels; tiles, with which no times are shipped, by the library."""
    monkeypatch.setattr(levels, "level", lambda: level)
    monkeypatch.setattr(levels, "has", lambda feature: feature != "amx-bf16" or "amx" in level)
    offer(monkeypatch, "panels", "oneDNN", "torch")
    assert table.choose("bfloat16") == product


@pytest.mark.parametrize("form", table.FLOATS)
def test_weights_are_packed_as_chosen(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    weight, x = torch.randn(48, 64).to(table.dtype_of(form)), torch.randn(3, 64)
    x = x.to(weight.dtype)
    expected = (x.double() @ weight.double().t()).to(weight.dtype)
    for name, product in table.PRODUCTS.items():
        if not product.available(form):
            continue
        monkeypatch.setattr(table, "choose", lambda form, own=name: own)
        packed = ops.pack_weight(weight)
        assert isinstance(packed, floats.FloatWeight if name == "panels" else onednn.LibraryWeight)
        assert packed.format == form
        torch.testing.assert_close(packed.bind()(x), expected, rtol=2e-2, atol=2e-2)


def test_one_line_names_them_all() -> None:
    line = ops.products()
    assert levels.level() in line
    assert all(form in line for form in (*table.FLOATS, *table.INTEGERS))


def malformed() -> list[object]:
    """Contents of a file of times that no program wrote, of the right level."""
    times: list[object] = [
        *(None, [], "fast", 5, {"bfloat16": 3}, {"bfloat16": {"1": []}}),
        *({"bfloat16": {"1": {"panels": "fast"}}}, {"bfloat16": {"1": {"panels": 0}}}),
        *({"bfloat16": {"1": {"panels": -1.0}}}, {"bfloat16": {"1": {"panels": True}}}),
        *({"bfloat16": {"1": {"panels": float("nan")}}}, {"bfloat16": {"1": None}}),
        *({"int8": {rows: {"tiles": 1.0, "vectors": 2.0}}} for rows in ("many", "", "²", "-8")),
    ]
    return [[1], "text", 7, *({"level": levels.level(), "times": each} for each in times)]


@pytest.mark.parametrize("content", malformed(), ids=str)
def test_a_malformed_file_does_not_count(
    found_anew: Path, content: object, caplog: pytest.LogCaptureFixture
) -> None:
    shipped = {form: table.choose(form) for form in table.FLOATS}
    table.choose_again()
    (found_anew / "sensorium").mkdir()
    table.own_file().write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert {form: table.choose(form) for form in table.FLOATS} == shipped
    assert str(table.own_file()) in caplog.text


def test_formats_that_were_not_measured_here_follow_the_shipped_times(
    found_anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels, "level", lambda: "avx2")
    measure(found_anew, "avx2", r1={"panels": 9.0, "torch": 1.0})
    offer(monkeypatch, "panels", "torch")
    assert (table.choose("bfloat16"), table.choose("float16")) == ("torch", "panels")


def test_shipped_times_are_whole_and_name_their_cpu() -> None:
    shipped = json.loads(table.SHIPPED.read_text())
    for level, own in shipped.items():
        assert level in levels.LEVELS
        assert own["machine"]["processor"]
        assert table.checked(own["times"]).keys() >= set(table.FLOATS)
