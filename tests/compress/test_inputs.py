"""Input specifications: the written form, its errors, and random examples."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import InputSpecError
from compress.inputs import (
    DTYPES,
    InputSpec,
    check_input_specs,
    cut,
    parse_input_spec,
    parse_input_specs,
    sizes_of,
    summands,
)

GOOD = [
    ("1,3,32,32", None, torch.float32, (1, 3, 32, 32), {0: "batch"}),
    ("!1,3,32,32", None, torch.float32, (1, 3, 32, 32), {}),
    ("step:int64[]", "step", torch.int64, (), {}),
    ("float32[]", None, torch.float32, (), {}),
    ("8", None, torch.float32, (8,), {0: "batch"}),
    ("ids:int64[1,128]", "ids", torch.int64, (1, 128), {0: "batch"}),
    ("ids:int64[1,seq=128]", "ids", torch.int64, (1, 128), {0: "batch", 1: "seq"}),
    ("x:float32[1,3,224,224]", "x", torch.float32, (1, 3, 224, 224), {0: "batch"}),
    ("x:[!2,3]", "x", torch.float32, (2, 3), {}),
    ("n=1,3", None, torch.float32, (1, 3), {0: "n"}),
    ("x:1,3", "x", torch.float32, (1, 3), {0: "batch"}),
    ("int8[4,h=5,w=5]", None, torch.int8, (4, 5, 5), {0: "batch", 1: "h", 2: "w"}),
    ("[n=4,n=4]", None, torch.float32, (4, 4), {0: "n", 1: "n"}),
    (" x : bool [ n = 4 , ! 2 ] ", "x", torch.bool, (4, 2), {0: "n"}),
    ("x:torch.bfloat16[1]", "x", torch.bfloat16, (1,), {0: "batch"}),
    ("model.x/0:uint8[1]", "model.x/0", torch.uint8, (1,), {0: "batch"}),
]


@pytest.mark.parametrize(("text", "name", "dtype", "shape", "dynamic"), GOOD)
def test_parse(
    text: str, name: str | None, dtype: torch.dtype, shape: tuple[int, ...], dynamic: dict[int, str]
) -> None:
    spec = parse_input_spec(text)
    assert (spec.name, spec.dtype, spec.shape, spec.symbols) == (name, dtype, shape, dynamic)
    assert parse_input_spec(str(spec)) == spec


BAD = [
    ("", "size 1 is empty"),
    ("x", "no shape"),
    ("float32", "no shape"),
    ("1,,3", "size 2 is empty"),
    ("1,3,", "size 3 is empty"),
    ("x:", "size 1 is empty"),
    ("x:int64", "no shape"),
    ("0,3", "size 0"),
    ("1,-3", "size -3"),
    ("1,3.5", "'3.5' is not a size"),
    ("1x3x32", "is not a size"),
    ("(1,3)", "is not a size"),
    ("x:float32[1,3", "not a shape"),
    ("x:y:float32[1]", "not a shape"),
    ("1,!seq=3", "is not a size"),
    ("1,2b=3", "cannot name an axis"),
    ("1,class=3", "cannot name an axis"),
    ("1,=3", "cannot name an axis"),
    ("9" * 5000, "is not between"),
    ("1," + str(2**31), "is not between"),
    ("2x:float32[1]", "not an input name"),
    (":float32[1]", "not an input name"),
    ("\u0661,3", "size"),  # a digit for Python's int(), a surprise for everyone else
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_malformed_specs_show_two_right_examples(text: str, message: str) -> None:
    with pytest.raises(InputSpecError) as caught:
        parse_input_spec(text)
    shown = str(caught.value)
    assert message in shown
    assert '"1,3,32,32"' in shown and '"ids:int64[1,seq=128]"' in shown
    assert len(shown) < 500


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("flaot32", "float32"),
        ("fp16", "float16"),
        ("bf16", "bfloat16"),
        ("long", "int64"),
        ("int46", "int64"),
        ("uint", "uint8"),
        ("bolo", "bool"),
        ("INT", "int64"),
    ],
)
def test_an_unknown_dtype_names_the_nearest(word: str, nearest: str) -> None:
    with pytest.raises(InputSpecError, match=f"nearest is '{nearest}'"):
        parse_input_spec(f"ids:{word}[1,4]")


def test_a_name_without_a_colon_is_taken_for_a_name() -> None:
    with pytest.raises(InputSpecError, match=r"'x:float32\[1,4\]'"):
        parse_input_spec("x[1,4]")


names = st.none() | st.from_regex(r"[A-Za-z_][A-Za-z0-9_./-]{0,8}", fullmatch=True)
symbols = st.from_regex(r"[a-z_]{1,3}[0-9]?", fullmatch=True).map(lambda word: "d_" + word)


@st.composite
def specs(draw: st.DrawFn) -> InputSpec:
    rank = draw(st.integers(0, 5))
    axes = st.sampled_from(range(rank)) if rank else st.nothing()
    dynamic = draw(st.dictionaries(axes, symbols | st.just("batch"), max_size=rank))
    sizes = {symbol: draw(st.integers(1, 300)) for symbol in sorted(set(dynamic.values()))}
    shape = tuple(
        sizes[dynamic[axis]] if axis in dynamic else draw(st.integers(1, 300)) for axis in range(rank)
    )
    dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
    return InputSpec(draw(names), dtype, shape, tuple(dynamic.items()))


@settings(max_examples=300, deadline=None)
@given(specs())
def test_the_written_form_round_trips(spec: InputSpec) -> None:
    again = parse_input_spec(str(spec))
    assert again == spec
    assert hash(again) == hash(spec)
    assert str(again) == str(spec)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="1x,:[]!= -fint864b", max_size=20))
def test_any_text_parses_or_raises_our_error(text: str) -> None:
    try:
        spec = parse_input_spec(text)
    except InputSpecError:
        return
    assert parse_input_spec(str(spec)) == spec


def test_specs_are_frozen_hashable_and_picklable() -> None:
    spec = parse_input_spec("ids:int64[1,seq=128]")
    assert {spec: 1}[copy.deepcopy(spec)] == 1
    assert pickle.loads(pickle.dumps(spec)) == spec
    # a mapping is taken too, and axes are kept in order
    mapping = {1: "seq", 0: "batch"}
    assert InputSpec("ids", torch.int64, (1, 128), mapping) == spec  # type: ignore[arg-type]
    assert spec.dynamic == ((0, "batch"), (1, "seq"))
    assert (spec.symbol(1), spec.symbol(2)) == ("seq", None)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "dynamic"),
    [
        ("x", torch.complex64, (1,), {}),
        ("x", torch.float32, (), {0: "batch"}),
        ("x", torch.float32, (1,), ((0, "a"), (0, "b"))),
        ("x", torch.float32, (1, 0), {}),
        ("x y", torch.float32, (1,), {}),
        ("x", torch.float32, (1,), {1: "batch"}),
        ("x", torch.float32, (1,), {0: "a b"}),
        ("x", torch.float32, (2, 3), {0: "n", 1: "n"}),
    ],
)
def test_impossible_specs_are_refused(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], dynamic: Any
) -> None:
    with pytest.raises(InputSpecError):
        InputSpec(name, dtype, shape, dynamic)


def test_like_takes_dtype_and_shape() -> None:
    spec = InputSpec.like(torch.zeros(2, 7, dtype=torch.int32), "ids")
    assert spec == parse_input_spec("ids:int32[2,7]")
    assert str(InputSpec.like(torch.tensor(1.0), "t")) == "t:float32[]"
    with pytest.raises(InputSpecError, match="size of 0"):
        InputSpec.like(torch.zeros(0, 3))


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_samples_have_the_spec(name: str) -> None:
    spec = parse_input_spec(f"x:{name}[2,seq=16,3]")
    sample = spec.sample(torch.Generator().manual_seed(0), sizes={"seq": 5, "unknown": 9}, high=7)
    assert sample.shape == (2, 5, 3) and sample.dtype == DTYPES[name]
    assert torch.equal(sample, spec.sample(torch.Generator().manual_seed(0), sizes={"seq": 5}, high=7))
    if not sample.dtype.is_floating_point and sample.dtype != torch.bool:
        assert int(sample.min()) >= 0 and int(sample.max()) < 7
        assert bool((spec.sample(None) == 1).all())


def test_sample_refuses_impossible_requests() -> None:
    spec = parse_input_spec("ids:int8[1,seq=4]")
    for wrong in ({"high": 0}, {"high": 129}, {"sizes": {"seq": 0}}):
        with pytest.raises(InputSpecError):
            spec.sample(None, **wrong)


def test_inputs_are_checked_together() -> None:
    sizes = check_input_specs(parse_input_specs(["a:int64[2,s=8]", "b:int64[2,s=8]"]))
    assert sizes == {"batch": 2, "s": 8}
    assert parse_input_specs(["a:float32[2,4]", "b:float32[!3,4]"])[1].dynamic == ()
    with pytest.raises(InputSpecError, match="s=9, but s was 8"):
        parse_input_specs(["a:int64[2,s=8]", "b:int64[2,s=9]"])
    with pytest.raises(InputSpecError, match=r"batch=3.*\n.*\n.*!1"):
        parse_input_specs(["a:int64[2]", "b:int64[3]"])
    with pytest.raises(InputSpecError, match="two inputs are called 'a'"):
        parse_input_specs(["a:int64[2]", "a:int64[2]"])


def test_the_whole_range_of_a_byte_can_be_asked_for() -> None:
    assert parse_input_spec("x:uint8[64,64]").sample(None, high=256).dtype == torch.uint8
    assert parse_input_spec("x:int64[2]").sample(None, high=2**63 - 1).dtype == torch.int64


def test_sums_of_sizes() -> None:
    specs = parse_input_specs(["x:float32[1,past=3,8]", "mask:int64[1,past+seq=10]", "ids:int64[1,seq=7]"])
    assert str(specs[1]) == "mask:int64[1,past+seq=10]"
    assert specs[1].symbol(1) == "past+seq" and summands("past + seq") == ("past", "seq")
    assert specs[1].sized({"past": 0, "seq": 2, "batch": 5}) == (5, 2)
    assert specs[0].sized({"past": 0}, least=0) == (1, 0, 8)
    assert specs[1].sized({"seq": 2}) == (1, 10)  # half of a sum says nothing
    tensors = [spec.sample(None, sizes={"batch": 2, "past": 4, "seq": 6}) for spec in specs]
    assert sizes_of(specs, tensors) == {"batch": 2, "past": 4, "seq": 6}
    shapes = [tuple(t.shape) for t in cut(specs, tensors, {"seq": 1, "batch": 1})]
    assert shapes == [(1, 4, 8), (1, 5), (1, 1)]
    with pytest.raises(InputSpecError, match=r"past\+seq=11\n.*10, as past=3, seq=7"):
        parse_input_specs(["x:float32[1,past=3,8]", "mask:int64[1,past+seq=11]", "ids:int64[1,seq=7]"])
    with pytest.raises(InputSpecError, match="no axis is called past"):
        parse_input_specs(["mask:int64[1,past+seq=11]", "ids:int64[1,seq=7]"])
    with pytest.raises(InputSpecError, match="cannot name an axis"):
        parse_input_spec("mask:int64[1,past+=11]")
    with pytest.raises(InputSpecError, match="1 or more"):
        specs[0].sized({"past": 0})
    with pytest.raises(InputSpecError, match="0 or more"):
        specs[0].sized({"past": -1}, least=0)
