"""The algebra of deltas: exact, whole or not at all, undone to the bit, composed, compared; and
files that nobody can misuse."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erase.compose import check_distinct, compose, conflict_table, conflicts
from erase.delta import ErasedDelta
from erase.delta.base import load_base
from erase.delta.origin import gone
from erase.models.sd import StableDiffusion
from erase.prompts.errors import ErasureError
from erase.tensors import from_gaps, pack, to_gaps


@pytest.fixture
def model(make_pico_pipeline):
    return StableDiffusion(make_pico_pipeline(), "pico")


def copies(model):
    return {name: param.detach().clone() for name, param in model.parameters().items()}


def unchanged(model, weights) -> bool:
    return all(torch.equal(param, weights[name]) for name, param in model.parameters().items())


def make(model, target="heart", seed=0, density=0.5, scope="attn2", size=0.1):
    """A delta that moves a random share of a scope's weights."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: param for name, param in copies(model).items() if scope in name}
    erased = {}
    for name, value in base.items():
        moved = torch.rand(value.shape, generator=generator) < density
        erased[name] = torch.where(
            moved, value + size * torch.randn(value.shape, generator=generator), value
        )
    metadata = {
        "base_fingerprint": model.fingerprint, "base_id": "pico", "method": "salun", "config": "{}",
        "created_with": "test",
        "concepts": json.dumps([{"target": target, "anchor": "moon"}]),
    }  # fmt: skip
    return ErasedDelta.between(base, erased, metadata)


# ---- places ----


@given(st.lists(st.integers(0, 2600), max_size=30), st.integers(1, 330))
@settings(deadline=None)
def test_gaps_give_the_bits_back(places, size):
    flat = torch.zeros(size * 8, dtype=torch.bool)
    flat[[place for place in places if place < size * 8]] = True
    assert torch.equal(from_gaps(to_gaps(pack(flat))), pack(flat))


@pytest.mark.parametrize("gaps", [[], [255], [3, 255], [3], [7, 255, 2]])
def test_gaps_that_end_in_the_middle_are_refused(gaps):
    with pytest.raises(ErasureError, match="end in the middle"):
        from_gaps(torch.tensor(gaps, dtype=torch.uint8))


@pytest.mark.parametrize("density, kind", [(0.5, "bits"), (0.01, "gaps")])
def test_a_file_holds_the_smaller_form_and_a_few_lines_of_numpy_read_it(
    model, tmp_path, density, kind
):
    delta = make(model, density=density)
    delta.save(tmp_path / "d.safetensors")
    tensors = load_file(tmp_path / "d.safetensors")
    assert any(key.startswith(f"{kind}.") for key in tensors)
    weights = {name: weight.numpy() for name, weight in copies(model).items()}
    for key in tensors:
        part, _, name = key.partition(".")
        if part == "values":
            flat = weights[name].reshape(-1)
            if f"bits.{name}" in tensors:
                where = np.unpackbits(
                    tensors[f"bits.{name}"].numpy(), count=flat.size, bitorder="little"
                ).nonzero()[0]
            else:
                gaps = tensors[f"gaps.{name}"].numpy().astype(int)
                where = (np.cumsum(gaps + (gaps < 255))[gaps < 255] - 1)[:-1]
            flat[where] = tensors[key].numpy()
    delta.apply(model)
    assert all(
        np.array_equal(param.detach().numpy(), weights[name])
        for name, param in model.parameters().items()
    )


# ---- files ----


def test_what_is_saved_is_what_is_loaded(model, tmp_path):
    for density in (0.5, 0.01):
        delta = make(model, density=density)
        delta.save(tmp_path / "d.safetensors")
        loaded = ErasedDelta.load(tmp_path / "d.safetensors")
        assert (
            loaded.sha256 == delta.sha256
            and loaded.count == delta.count
            and loaded.title == "heart"
        )
        assert loaded.values.keys() == loaded.bits.keys() == delta.values.keys()


NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
DAMAGE = {
    "bits of a wrong length": (
        lambda t: t.update({f"bits.{NAME}": t[f"bits.{NAME}"][:-1]}),
        "do not fit their places",
    ),
    "values too few": (
        lambda t: t.update({f"values.{NAME}": t[f"values.{NAME}"][:-1]}),
        "do not fit their places",
    ),
    "a value that is not a number": (
        lambda t: t[f"values.{NAME}"].fill_(float("nan")),
        "not finite",
    ),
    "an infinite value": (lambda t: t[f"values.{NAME}"].fill_(float("inf")), "not finite"),
    "no places": (lambda t: t.pop(f"bits.{NAME}"), "lacks its values or its places"),
    "no values": (lambda t: t.pop(f"values.{NAME}"), "lacks its values or its places"),
    "bits of another type": (
        lambda t: t.update({f"bits.{NAME}": t[f"bits.{NAME}"].int()}),
        "is not part of a delta",
    ),
    "values of another type": (
        lambda t: t.update({f"values.{NAME}": t[f"values.{NAME}"].long()}),
        "is not part of a delta",
    ),
    "values of two dimensions": (
        lambda t: t.update({f"values.{NAME}": t[f"values.{NAME}"][None]}),
        "is not part of a delta",
    ),
    "a foreign tensor": (
        lambda t: t.update({f"extra.{NAME}": torch.zeros(1)}),
        "is not part of a delta",
    ),
    "gaps cut short": (
        lambda t: (
            t.pop(f"bits.{NAME}"),
            t.update({f"gaps.{NAME}": torch.tensor([255], dtype=torch.uint8)}),
        ),
        "end in the middle",
    ),
}


@pytest.mark.parametrize("spoil, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_refused_by_file_and_tensor(model, tmp_path, spoil, message):
    path = tmp_path / "d.safetensors"
    make(model).save(path)
    with safe_open(path, "pt") as file:
        tensors, metadata = load_file(path), file.metadata()
    spoil(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(ErasureError, match=message) as caught:
        ErasedDelta.load(path)
    assert str(path) in str(caught.value) and NAME in str(caught.value)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({}, "does not say which base"),
        ({"base_fingerprint": "1", "concepts": "["}, "its concepts is not JSON"),
    ],
)
def test_metadata_that_cannot_be_read_is_refused(tmp_path, metadata, message):
    save_file(
        {"values.p": torch.ones(1)}, tmp_path / "d.safetensors", metadata | {"format": "delta"}
    )
    with pytest.raises(ErasureError, match=rf"d\.safetensors:? {message}"):
        ErasedDelta.load(tmp_path / "d.safetensors")


# ---- applying ----

MISFITS = {
    "an unknown parameter": (
        lambda d: (d.values.update(nowhere=d.values[NAME]), d.bits.update(nowhere=d.bits[NAME])),
        "nowhere",
    ),
    "places beyond the shape": (
        lambda d: d.bits.update(
            {NAME: torch.cat([d.bits[NAME], torch.zeros(1, dtype=torch.uint8)])}
        ),
        NAME,
    ),
    "a value that is not a number": (lambda d: d.values[NAME].fill_(float("nan")), NAME),
}


@pytest.mark.parametrize("spoil, named", MISFITS.values(), ids=MISFITS)
def test_nothing_is_applied_unless_everything_can_be(model, spoil, named):
    delta, weights = make(model), copies(model)
    spoil(delta)
    with pytest.raises(ErasureError, match=named):
        delta.apply(model)
    assert unchanged(model, weights)


def test_places_behind_the_last_weight_are_refused():
    """A tensor of 4 weights takes half a byte; a set bit in the other half belongs to no weight."""
    delta = ErasedDelta(
        {"p": torch.tensor([1.0])}, {"p": torch.tensor([0b10000], dtype=torch.uint8)}, {}
    )
    with pytest.raises(ErasureError, match=r"places of p do not fit its shape \(4,\)"):
        delta._check_fit("p", torch.nn.Parameter(torch.zeros(4)))


def test_values_that_the_model_would_round_are_refused_and_rounded_on_purpose(make_pico_pipeline):
    """A half-precision file has one fingerprint, however it is loaded: exactness must not depend on
    that."""
    narrow, wide = (
        StableDiffusion(make_pico_pipeline().to(torch.float16).to(dtype), "pico")
        for dtype in (torch.half, torch.float)
    )
    delta, weights = make(wide), copies(narrow)
    assert narrow.fingerprint == wide.fingerprint
    with pytest.raises(
        ErasureError,
        match=r"float32 values of unet.* that float16 weights would round.*delta\.rounded",
    ):
        delta.apply(narrow)
    assert unchanged(narrow, weights)
    for model in (narrow, wide):
        delta.rounded(torch.float16).apply(model)
    assert narrow.fingerprint == wide.fingerprint
    with pytest.raises(ErasureError, match="beyond the range"):
        ErasedDelta(
            {"p": torch.tensor([1e6])}, {"p": torch.tensor([1], dtype=torch.uint8)}
        ).rounded(torch.float16)


def test_the_likely_reason_why_a_base_is_another_is_said(make_pico_pipeline):
    model, narrow = (
        StableDiffusion(make_pico_pipeline().to(kind), "pico")
        for kind in (torch.float32, torch.half)
    )
    delta = make(model)
    with pytest.raises(ErasureError, match="rounded to float16 .*load that base in float32"):
        delta.apply(narrow)
    narrow = StableDiffusion(delta.apply(model).pipeline().to(torch.half).to(torch.float32), "e")
    with pytest.raises(ErasureError, match="rounded to float16"):  # an export in float16
        delta.inverse(StableDiffusion(make_pico_pipeline(), "pico")).apply(narrow)
    other = StableDiffusion(make_pico_pipeline(seed=1), "other")
    with pytest.raises(ErasureError, match="; load that base, or erase from this one$"):
        delta.apply(other)


def test_a_delta_is_not_applied_twice(model):
    delta = make(model)
    delta.apply(model)
    with pytest.raises(ErasureError, match="it has the values of this delta already"):
        delta.apply(model)


def test_undoing_gives_the_base_back_to_the_bit(model, tmp_path):
    delta, weights = make(model), copies(model)
    undo = delta.inverse(model)
    assert unchanged(model, weights) and undo.title == "nothing"
    assert undo.name == "pico without heart, undone"
    with pytest.raises(ErasureError, match="belongs to base pico without heart"):
        undo.apply(model)
    delta.apply(model)
    assert not unchanged(model, weights)
    undo.save(tmp_path / "undo.safetensors")
    ErasedDelta.load(tmp_path / "undo.safetensors").apply(model)
    assert unchanged(model, weights) and model.fingerprint == delta.metadata["base_fingerprint"]


def test_undone_weights_are_said_to_lack_nothing(model):
    heart, star = make(model), make(model, "star", seed=1)
    both = compose(model, [(heart, 1.0), (star, 0.5)])
    undo = both.inverse(model)
    told = both.metadata | {"undoes": both.sha256}  # as earlier versions wrote it
    assert gone(undo.metadata) == gone(told) == [] and "parts" not in undo.metadata
    with both.applied(model) as erased:
        half = compose(erased, [(undo, 0.5)])
    assert half.name == "pico without heart, star, changed" and gone(half.metadata) == []


# ---- composing ----


def patched(model, delta):
    """Base + delta, tensor by tensor, as integers: compared bit by bit."""
    weights = copies(model)
    for name, value in delta.values.items():
        weights[name][delta.where(name, tuple(weights[name].shape))] = value
    return weights


def bits_of(tensor):
    return tensor.view(torch.int32)


def places(model, delta):
    return {
        name: delta.where(name, tuple(p.shape))
        if name in delta.values
        else torch.zeros(p.shape, dtype=torch.bool)
        for name, p in model.parameters().items()
    }


def test_a_weight_that_one_part_changes_gets_its_value_to_the_bit(model):
    delta, other = make(model), make(model, "star", seed=1)
    for value in delta.values.values():
        value[:5] = -0.0  # base + (value - base) is 0.0
    assert (
        compose(model, [(delta, 1.0)]).sha256
        == compose(model, [(delta, 1.0), (other, 0.0)]).sha256
        == delta.sha256
    )
    both, mine = patched(model, compose(model, [(delta, 1.0), (other, 1.0)])), patched(model, delta)
    alone = {
        name: place & ~places(model, other)[name] for name, place in places(model, delta).items()
    }
    assert sum(int(place.sum()) for place in alone.values()) > 100
    assert all(
        torch.equal(bits_of(both[name])[place], bits_of(mine[name])[place])
        for name, place in alone.items()
    )


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.7, -0.3), (-1.0, 2.0), (0.0, 0.5)])
def test_composition_is_the_scaled_sum(model, scales):
    deltas = make(model), make(model, "star", seed=1)
    base = copies(model)
    found = patched(model, compose(model, list(zip(deltas, scales, strict=True))))
    changed = [patched(model, delta) for delta in deltas]
    for name, value in base.items():
        change = sum(
            scale * (other[name].double() - value.double())
            for scale, other in zip(scales, changed, strict=True)
        )
        assert torch.allclose(found[name].double(), value.double() + change, rtol=1e-7, atol=1e-9)
    assert unchanged(model, base)


def test_order_does_not_matter_and_what_is_taken_back_is_gone(model):
    heart, star = make(model), make(model, "star", seed=1, scope="attn")
    forth, back = (
        compose(model, parts)
        for parts in ([(heart, 1.0), (star, 0.5)], [(star, 0.5), (heart, 1.0)])
    )
    assert forth.sha256 == back.sha256
    assert compose(model, [(heart, 1.0), (heart, -1.0)]).count == 0
    assert compose(model, [(heart, 0.0)]).count == 0


def test_on_conflict(model):
    heart, star = make(model), make(model, "star", seed=1)
    base, changed = copies(model), [patched(model, delta) for delta in (heart, star)]
    for rule, winner in (("first", 0), ("last", 1)):
        found = patched(model, compose(model, [(heart, 1.0), (star, 1.0)], rule))
        for name, value in base.items():
            ours, theirs = changed[winner][name], changed[1 - winner][name]
            assert torch.equal(
                bits_of(found[name]), bits_of(torch.where(ours != value, ours, theirs))
            )
    with pytest.raises(ErasureError, match=r"^[\d,]+ weights are changed by.*--on_conflict sum"):
        compose(model, [(heart, 1.0), (star, 1.0)], "error")
    with pytest.raises(ErasureError, match="did you mean 'first'"):
        compose(model, [(heart, 1.0)], "fist")


def test_a_composed_delta_tells_its_parts_and_is_a_delta_like_any_other(model, tmp_path):
    heart, star = make(model), make(model, "star", seed=1)
    both = compose(model, [(heart, 1.0), (star, -0.5)])
    both.save(tmp_path / "d.safetensors")
    loaded, weights = ErasedDelta.load(tmp_path / "d.safetensors"), copies(model)
    assert loaded.title == "heart"  # a negative scale erases nothing
    told = json.loads(loaded.metadata["parts"])
    assert [(part["erased"], part["scale"], part["sha256"]) for part in told] == [
        ("heart", 1.0, heart.sha256), ("star", -0.5, star.sha256)
    ]  # fmt: skip
    undo = loaded.inverse(model)
    undo.apply(loaded.apply(model))
    assert unchanged(model, weights)


def test_no_erasure_is_added_twice(model):
    heart, star = make(model), make(model, "star", seed=1)
    check_distinct([heart, star])
    both = compose(model, [(heart, 1.0), (star, 1.0)])
    log = [
        {"erased": [], "method": "esd", "config_sha256": "", "start": "", "sha256": delta.sha256}
        for delta in (heart, star)
    ]
    after = replace(star, metadata={**star.metadata, "requests": json.dumps(log)})
    for deltas, said in (
        ([heart, star, heart], "are the same delta; give it once"),
        ([star, both], "holds what .* changes; leave"),
        ([after, heart], "holds what .* changes; leave"),
    ):
        with pytest.raises(ErasureError, match=said):
            check_distinct(deltas)


def test_a_concept_that_two_parts_erase_is_told_once(model):
    both = compose(model, [(make(model), 1.0), (make(model, seed=1), 1.0)])
    assert [concept["target"] for concept in both.concepts] == ["heart"]


def test_the_base_of_deltas_composed_of_composed_ones_is_read_as_it_was(model, monkeypatch):
    heart, star = make(model), make(model, "star", seed=1)
    heart.metadata["config"] = json.dumps({"erase": {"load": {"variant": "non_ema"}}})
    both = compose(model, [(compose(model, [(heart, 1.0)]), 1.0), (star, 1.0)])
    monkeypatch.setattr("erase.delta.base.load_model", lambda name, device, options: options)
    assert load_base(both, "a/b").variant == load_base(heart, "a/b").variant == "non_ema"


def test_deltas_of_different_bases_are_refused_and_both_are_named(model, make_pico_pipeline):
    other = make(StableDiffusion(make_pico_pipeline(seed=1), "other"), "star")
    other.metadata["base_id"] = "other"
    for call in (
        lambda: compose(model, [(make(model), 1.0), (other, 1.0)]),
        lambda: conflicts(model, [make(model), other]),
    ):
        with pytest.raises(
            ErasureError, match=r"\(heart\) was made from base pico .*\(star\) from other"
        ):
            call()
    with pytest.raises(ErasureError, match="cannot be scaled by nan"):
        compose(model, [(make(model), float("nan"))])
    with pytest.raises(ErasureError, match="not finite in torch.float32; use smaller scales"):
        compose(model, [(make(model), 1e39)])
    with pytest.raises(ErasureError, match="no delta"):
        compose(model, [])


# ---- conflicts ----


def test_random_deltas_overlap_as_chance_has_it_and_do_not_agree(model):
    pair = conflicts(
        model,
        [
            make(model, seed=0, scope="attn", density=0.3),
            make(model, "star", seed=1, scope="attn", density=0.3),
        ],
    )
    assert [(one.a, one.b, one.component) for one in pair] == [
        ("heart", "star", "unet"),
        ("heart", "star", "text_encoder"),
        ("heart", "star", "all"),
    ]
    every = pair[-1]
    assert every.shared == sum(one.shared for one in pair[:-1]) and every.count_a == sum(
        one.count_a for one in pair[:-1]
    )
    assert abs(every.shared / every.expected - 1) < 0.05 and abs(every.cosine) < 0.05
    assert every.jaccard == pytest.approx(0.09 / 0.51, rel=0.05)


def test_overlap_of_known_deltas(model):
    heart = make(model)
    same = heart
    opposite = compose(model, [(heart, -1.0)])
    elsewhere = make(model, "moon", scope="conv")
    named = {(one.a, one.b): one for one in conflicts(model, [same, same, opposite, elsewhere])}
    assert named["heart (1)", "heart (2)"].jaccard == 1 and named[
        "heart (1)", "heart (2)"
    ].cosine == pytest.approx(1)
    assert named["heart (1)", "nothing"].cosine == pytest.approx(-1, abs=1e-6)
    apart = conflicts(model, [same, elsewhere])
    assert [(one.shared, one.expected, one.cosine) for one in apart] == [(0, 0, 0)]
    json.dumps([one.plain() for one in apart], allow_nan=False)
    assert conflict_table(apart).row_count == 1
