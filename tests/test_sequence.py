"""Requests one after another: what the later erasure begins from, what it keeps of the earlier,
what comes out, and what it says of itself."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from erase.compose import compose
from erase.compose.sequence import followed
from erase.delta import ErasedDelta
from erase.eval.evidence import Evidence
from erase.eval.report.card import model_card
from erase.eval.report.reproduce import recipe
from erase.export.formats import usage
from erase.latents.config import LatentConfig
from erase.latents.prepare import Plan
from erase.mask import SaliencyMask
from erase.methods import get_method
from erase.methods.uce import UCEConfig
from erase.models import load_model, wrap
from erase.models.scopes import reads_text
from erase.objectives.closed_form import ridge_edit
from erase.objectives.text_inputs import seen_states, subject_states
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.prompts.several import earlier_prompts, retained_prompts
from erase.run import EraseConfig, erase_concept
from erase.scripts import run_erase
from erase.task import Task
from erase.training.config import MaskConfig, TrainConfig
from erase.training.confine import null_space, null_spaces, restraints, second_moment
from tests.run_fixtures import DATA, FLAGS, METHOD
from tests.run_fixtures import base as base
from tests.test_delta import copies, make, patched, unchanged

HEART = ConceptSpec("heart", "mushroom", retain=("a moon", "a photo of a house", "a blue fish"))
STAR = ConceptSpec("star", "ring", retain=("a moon", "a photo of a house", "a heart and a house"))
FISH = ConceptSpec("fish", "ring", retain=("a moon", "a photo of a house"))
CONFIG = EraseConfig(latents=DATA)


@pytest.fixture
def model(make_pico_pipeline):
    return wrap(make_pico_pipeline(), "pico")


@pytest.fixture(scope="module")
def chain(make_pico_pipeline, tmp_path_factory):
    """heart, then star, then fish by another method: the model, the deltas, their folders."""
    model, deltas = wrap(make_pico_pipeline(), "pico"), []
    folders = [tmp_path_factory.mktemp(name) for name in ("heart", "star", "fish")]
    requests = [(HEART, CONFIG, METHOD), (STAR, CONFIG, METHOD)]
    requests.append((FISH, replace(CONFIG, method="uce", seed=5), None))
    for folder, (concept, config, settings) in zip(folders, requests, strict=True):
        after = deltas[-1] if deltas else None
        deltas.append(
            erase_concept(concept, config, settings, model=model, out=folder, after=after)
        )
    return model, deltas, folders


# ---- two deltas, one after the other -------------------------------------------------------------


def step_from(model, earlier, seed, scope="attn2"):
    """A delta of base + `earlier`."""
    with earlier.applied(model):
        return make(model, "star", seed, 0.3, scope)


def test_a_followed_delta_is_both_applied_in_turn_to_the_bit(model):
    earlier = make(model)
    later = step_from(model, earlier, 1, "attn")
    both = followed(model, earlier, later, earlier.metadata)
    with earlier.applied(model), later.applied(model):
        expected = copies(model)
    base, found = copies(model), patched(model, both)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert both.count == sum(int((expected[n] != value).sum()) for n, value in base.items())
    assert unchanged(model, base) and both.inverse(model).count == both.count


def test_what_the_later_one_takes_back_is_in_no_delta(model):
    earlier = make(model)
    back = earlier.inverse(model)
    assert followed(model, earlier, back, earlier.metadata).count == 0


def test_a_chain_that_does_not_join_is_refused(model, make_pico_pipeline):
    earlier, other = make(model), make(model, seed=2)
    with pytest.raises(ErasureError, match="belongs to base pico"):
        followed(model, earlier, step_from(model, other, 1), earlier.metadata)
    with pytest.raises(ErasureError, match="belongs to base pico"):
        followed(wrap(make_pico_pipeline(seed=1)), earlier, earlier, earlier.metadata)


# ---- an erasure after another --------------------------------------------------------------------


def test_the_later_request_is_a_run_on_what_the_earlier_one_left(chain):
    """By hand: the method on the erased model, whose weights, latents and teacher are the
    earlier's."""
    model, (heart, star, _), folders = chain
    base = copies(model)
    with heart.applied(model):
        start = model.fingerprint
        task = Task(model, [STAR], DATA, earlier=[HEART])
        values = {name: value.clone() for name, value in
                  get_method("salun").edit(task, METHOD).values.items()}  # fmt: skip
    with star.applied(model):
        whole = copies(model)
        assert all(torch.equal(whole[name], value) for name, value in values.items())
    assert unchanged(model, base)
    mask = SaliencyMask.load(folders[1] / "mask.safetensors")
    assert mask.metadata["base_fingerprint"] == start != model.fingerprint
    earlier = patched(model, heart)
    assert any(not torch.equal(whole[n][mask[n]], earlier[n][mask[n]]) for n in mask.bits)
    assert all(torch.equal(whole[n][~mask[n]], earlier[n][~mask[n]]) for n in mask.bits)


def test_what_comes_out_is_a_delta_of_the_original_base_and_undoes_to_it(chain):
    model, deltas, folders = chain
    base = copies(model)
    for delta, folder in zip(deltas, folders, strict=True):
        loaded = ErasedDelta.load(folder)
        assert loaded.sha256 == delta.sha256 and loaded.metadata["base_fingerprint"] == (
            model.fingerprint
        )
    last = ErasedDelta.load(folders[-1])
    back = last.inverse(model)
    last.apply(model)
    try:
        assert not unchanged(model, base)
        back.check(model)
    finally:
        back.apply(model)
    assert unchanged(model, base) and back.requests == [] and "after" not in back.metadata


def test_the_same_requests_give_the_same_file_bit_for_bit(chain, tmp_path):
    model, (heart, star, _), _ = chain
    again = erase_concept(STAR, CONFIG, METHOD, model=model, after=heart)
    assert again.sha256 == star.sha256 and again.metadata == star.metadata
    for name, delta in (("a", again), ("b", star)):
        delta.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_log_tells_of_every_request_and_its_digests_are_a_chain(chain, caplog):
    model, deltas, folders = chain
    last = ErasedDelta.load(folders[-1])
    assert not caplog.records, "every key of the metadata is known"
    log = last.requests
    assert [one["erased"] for one in log] == [["heart"], ["star"], ["fish"]]
    assert [one["sha256"] for one in log] == [delta.sha256 for delta in deltas]
    assert [one["after"] for one in log] == [None, deltas[0].sha256, deltas[1].sha256]
    assert [one["method"] for one in log] == ["salun", "salun", "uce"]
    assert [one["seed"] for one in log] == [0, 0, 5]
    assert log[0]["start"] == model.fingerprint
    for request, before in zip(log[1:], deltas, strict=False):
        with before.applied(model):
            assert request["start"] == model.fingerprint
    assert len({one["config_sha256"] for one in log}) == 2, "of two settings"
    assert last.title == "heart, star, fish" and last.name == "pico without heart, star, fish"
    assert last.metadata["method"] == "salun+uce" and last.metadata["after"] == log[-1]["after"]
    assert [one["anchor"] for one in last.concepts] == ["mushroom", "ring", "ring"]


def test_reports_and_cards_know_a_sequence(chain):
    model, (_, star, fish), folders = chain
    assert Evidence.of(folders[1], star).mask is not None
    with pytest.raises(ErasureError, match="of another delta"):
        Evidence.of(folders[1], fish)
    card = model_card(None, fish.metadata, usage("diffusers", model, fish.components))
    for number, name, delta in ((1, "heart", None), (2, "star", star), (3, "fish", fish)):
        line = next(line for line in card.splitlines() if line.startswith(f"| {number} | {name} "))
        assert delta is None or delta.sha256[:16] in line
    assert recipe(star) == {}, "no one command makes it"


def test_a_finished_folder_goes_on_and_that_of_another_sequence_is_refused(chain):
    model, (heart, star, _), folders = chain
    found = erase_concept(STAR, CONFIG, METHOD, model=model, out=folders[1], after=heart)
    assert found.sha256 == star.sha256 and found.requests == star.requests
    for after in (None, compose(model, [(heart, 0.5)])):
        with pytest.raises(ErasureError, match="holds another run|is of another run"):
            erase_concept(STAR, CONFIG, METHOD, model=model, out=folders[1], after=after)


def test_dates_stand_beside_the_delta_not_in_it(chain):
    _, deltas, folders = chain
    told = json.loads((folders[1] / "training.json").read_text())
    assert told["finished"].startswith("20") and told["delta_sha256"] == deltas[1].sha256
    assert told["finished"] not in json.dumps(deltas[1].metadata)


@pytest.mark.parametrize(
    ("concept", "message"),
    [
        (HEART, "'heart' was erased by .* already"),
        (ConceptSpec("love", "ring", ("Heart",), retain=("a moon",)), "'Heart' was erased by"),
        (ConceptSpec("moon", "heart", retain=("a fish",)), "the anchor of 'moon' is 'heart'"),
        (ConceptSpec("mushroom", "ring", retain=("a moon",)), "in the place of 'heart'"),
    ],
)
def test_requests_that_contradict_an_earlier_one_are_refused(chain, concept, message):
    model, (heart, *_), _ = chain
    with pytest.raises(ErasureError, match=message):
        erase_concept(concept, CONFIG, METHOD, model=model, after=heart)


def test_another_base_an_undo_and_no_delta_are_refused(chain, make_pico_pipeline):
    model, (heart, *_), folders = chain
    with pytest.raises(ErasureError, match="belongs to base pico"):
        erase_concept(STAR, CONFIG, METHOD, model=wrap(make_pico_pipeline(seed=1)), after=heart)
    with pytest.raises(ErasureError, match="puts concepts back"):
        erase_concept(STAR, CONFIG, METHOD, model=model, after=heart.inverse(model))
    with pytest.raises(ErasureError, match="give a delta"):
        erase_concept(STAR, CONFIG, METHOD, model=model, after=folders[0])


def test_a_damaged_log_is_refused(chain, tmp_path):
    _, (_, star, _), _ = chain
    for spoilt in ("{}", '[{"erased": "heart"}]', '[{"erased": [1], "method": "salun"}]', "["):
        metadata = {**star.metadata, "requests": spoilt}
        replace(star, metadata=metadata).save(tmp_path / "d.safetensors")
        with pytest.raises(ErasureError, match="requests is not|request 1 of its log"):
            ErasedDelta.load(tmp_path / "d.safetensors")


# ---- protection ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_a_share_of_the_retain_latents_is_drawn_under_earlier_prompts(model, share):
    data = replace(DATA, n_retain=16, earlier=share)
    templates = ("a {}", "a {} and a star", "a red {}")
    earlier = [replace(HEART, templates=templates)]
    found = Plan(model, [STAR], data, 0, earlier=earlier).retain()
    kept = ("a heart", "a red heart")  # the third names what is to go
    assert earlier_prompts(earlier, [STAR]) == [kept]
    assert sum(prompt in kept for prompt in found.prompts) == 16 * share
    assert "a heart and a star" not in found.prompts
    plain = Plan(model, [STAR], data, 0).retain()
    count = 16 - int(16 * share)
    assert plain.prompts[:count] == found.prompts[:count] and len(found) == 16
    assert torch.equal(plain.latents[:count], found.latents[:count])


MANY = replace(HEART, templates=tuple(f"{word} {{}}" for word in "abcdefgh"))
FEW = ConceptSpec("moon", "ring", templates=("{}",))


def test_earlier_concepts_are_kept_equally_often_however_few_their_prompts(model):
    assert [len(own) for own in earlier_prompts([MANY, FEW], [STAR])] == [8, 1]
    found = Plan(model, [STAR], replace(DATA, n_retain=16, earlier=0.25), 0, earlier=[MANY, FEW])
    assert found.retain().prompts[-4:].count("moon") == 2
    kept = retained_prompts([STAR], [MANY, FEW])
    assert kept[: len(STAR.retain)] == STAR.retain and kept.count("moon") == 8
    assert len(set(kept)) == len(kept) - 7
    states = seen_states(Task(model, [STAR]), kept)
    once = seen_states(Task(model, [STAR]), list(dict.fromkeys(kept)))
    assert len(states) == len(once) + 7 * len(seen_states(Task(model, [STAR]), ["moon"]))


def test_confine_weighs_each_earlier_concept_the_same(model):
    task = Task(model, [STAR], DATA, earlier=[MANY, FEW])
    config = replace(METHOD, scope="xattn", confine=0.3)
    found = next(iter(null_spaces(task, task.weights("xattn"), config).values()))
    covariance = 0
    for own in earlier_prompts(task.earlier, task.concepts):
        states = task.cond(own).embeddings.flatten(0, 1).double()
        covariance = covariance + states.T @ states / len(states)
    squares, directions = torch.linalg.eigh(covariance)
    free = directions[:, squares < 0.3 * squares.mean()]
    assert torch.allclose(found, free @ free.T)


def test_own_retain_images_do_not_keep_what_they_do_not_show(model, tmp_path):
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "moon.png")
    data = replace(DATA, retain_images=str(tmp_path))
    with pytest.raises(ErasureError, match=r"latents\.earlier"):
        Plan(model, [STAR], data, 0, earlier=[HEART]).retain()
    assert len(Plan(model, [STAR], replace(data, earlier=0.0), 0, earlier=[HEART]).retain()) == 8


def test_a_closed_form_keeps_the_states_of_earlier_prompts(model):
    task = Task(model, [STAR], DATA, earlier=[HEART])
    config = UCEConfig(following=False)
    values = get_method("uce").edit(task, config).values
    keep = seen_states(task, [*STAR.retain, *(prompt for prompt, _ in HEART.pairs())])
    inputs, anchors = subject_states(task, STAR)
    for name, weight in task.weights("xattn_kv").items():
        expected = ridge_edit(weight, inputs, anchors @ weight.detach().T, keep, 0.5)
        assert torch.allclose(values[name], expected, atol=1e-6)
    alone = get_method("uce").edit(Task(model, [STAR], DATA), config).values
    assert any(not torch.equal(alone[name], value) for name, value in values.items())


def test_confined_keys_and_values_change_in_the_null_space_of_all_earlier_prompts_tokens(model):
    """At every token that is attended to, padding too: answers to the others may change."""
    task = Task(model, [STAR], DATA, earlier=[replace(HEART, templates=("a {}",))])
    quick, half = TrainConfig(steps=2, batch_size=2, lr=1e-2), get_method("salun-half")
    all_of = replace(half.config, scope="xattn", train=quick, mask=MaskConfig(density=1.0))
    states, old = task.cond(["a heart"]).embeddings[0], copies(model)
    outside = torch.eye(states.shape[1]) - null_space(second_moment(states), 0.3).float()

    left = {}
    for confine in (0.0, 0.3):
        values = half.edit(task, replace(all_of, confine=confine)).values
        changes = {name: value - old[name] for name, value in values.items()}
        text = [change for name, change in changes.items() if reads_text(name)]
        left[confine] = max(float((change @ outside).abs().max()) for change in text)
        assert len(text) == len(task.weights("xattn_kv")) and all(one.any() for one in text)
        assert all(change.any() for change in changes.values()), "queries are free"
    assert left[0.3] < 1e-6 < 1e-3 < left[0.0]


def test_without_an_earlier_erasure_the_retained_prompts_confine(model):
    task, config = Task(model, [STAR], DATA), replace(METHOD, scope="xattn", confine=0.3)
    found = next(iter(null_spaces(task, task.weights("xattn"), config).values()))
    states = task.cond(list(STAR.retain)).embeddings.flatten(0, 1)
    assert torch.allclose(found, null_space(second_moment(states), 0.3))


@pytest.mark.parametrize("earlier", [(), (MANY, FEW)])
def test_text_is_drawn_back_by_retained_and_by_earlier_prompts_each_list_alike(model, earlier):
    task = Task(model, [STAR], DATA, earlier=earlier)
    config = replace(METHOD, scope="xattn", prox_text=3.0)
    found = restraints(task, task.weights("xattn"), config)
    assert found.keys() == task.weights("xattn_kv").keys()
    second = 0
    for own in (STAR.retain, *earlier_prompts(earlier, [STAR])):
        states = task.cond(list(own)).embeddings.flatten(0, 1).double()
        second = second + states.T @ states / len(states)
    second = second / second.trace() * len(second)
    name, restraint = next(iter(found.items()))
    change = torch.randn_like(task.weights("xattn")[name]).double()
    expected = change @ torch.linalg.inv(torch.eye(len(second)) + 0.2 * 3.0 * second)
    assert torch.allclose(restraint(change, 0.2), expected)


def test_held_prompts_are_encoded_in_parts_and_not_kept(model, monkeypatch):
    task, config = Task(model, [STAR], DATA, earlier=[MANY, FEW]), replace(METHOD, prox_text=3.0)
    whole = restraints(task, task.weights("xattn_kv"), config)
    monkeypatch.setattr("erase.training.confine.AT_ONCE", 2)
    parts = restraints(task, task.weights("xattn_kv"), config)
    for name, restraint in whole.items():
        change = torch.randn_like(task.weights("xattn_kv")[name]).double()
        assert torch.allclose(restraint(change, 0.2), parts[name](change, 0.2), rtol=1e-4)
    assert not task._states


def test_text_that_is_drawn_back_is_answered_more_nearly_as_before(model):
    task, scope = Task(model, [STAR], DATA), "xattn_kv"
    train = TrainConfig(steps=8, batch_size=2, lr=1e-2)
    config = replace(METHOD, scope=scope, train=train, mask=MaskConfig(density=1.0))
    states, old = task.cond(list(STAR.retain)).embeddings.flatten(0, 1), copies(model)
    moved = {}
    for weight in (0.0, 30.0):
        values = get_method("salun").edit(task, replace(config, prox_text=weight)).values
        moved[weight] = sum(float((states @ (values[n] - old[n]).T).norm()) for n in values)
        assert all((values[name] - old[name]).any() for name in values)
    assert moved[30.0] < 0.5 * moved[0.0]


@pytest.mark.parametrize("option", ["confine", "prox_text"])
def test_what_holds_answers_wants_prompts_to_hold_and_keys_or_values(model, option):
    config, alone = replace(METHOD, **{option: 0.1}), replace(STAR, retain=())
    with pytest.raises(ErasureError, match="those of earlier concepts .*, and there are none"):
        restraints(Task(model, [alone], DATA), model.parameters(), config)
    with pytest.raises(ErasureError, match="there are none; give the concept some"):
        erase_concept(alone, EraseConfig(model="nowhere"), config)
    task = Task(model, [STAR], DATA, earlier=[HEART])
    with pytest.raises(ErasureError, match=f"there are none in scope selfattn; .* or {option} 0"):
        get_method("salun").edit(task, replace(config, scope="selfattn"))


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_goes_on_from_a_folder(base, tmp_path, capsys):
    def erase(concept, out, *more):
        argv = ["--model", str(base), "--concept", concept, "--anchor", "ring"]
        argv += ["--retain", "a blue moon", "--out", str(tmp_path / out), *FLAGS, *more]
        run_erase.main([*argv, "--train.lr", "1e-3"])

    erase("heart", "first")
    erase("star", "second", "--after", str(tmp_path / "first"), "--prox_l2", "5")
    assert "star -> ring; after heart" in capsys.readouterr().out
    delta = ErasedDelta.load(tmp_path / "second")
    assert [one["erased"] for one in delta.requests] == [["heart"], ["star"]]
    delta.check(load_model(str(base)))
    assert delta.origin.config["method"]["prox_l2"] == 5
    assert asdict(LatentConfig())["earlier"] == delta.origin.config["erase"]["latents"]["earlier"]
