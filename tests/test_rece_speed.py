"""RECE and SPEED: their closed forms against objectives written out, and against loops over single
states."""

from dataclasses import replace

import pytest
import torch

from erase.methods import get_method
from erase.methods.rece import still_meaning
from erase.models import wrap
from erase.objectives.closed_form import condensed, erasure_states, ridge_edit
from erase.objectives.null_space import confined_edit, held_still
from erase.objectives.text_inputs import seen_states
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.training.confine import null_space, second_moment
from tests.families import FAMILIES

CONCEPT = ConceptSpec(
    "heart", "mushroom", templates=("a {}", "a photo of a {}"), retain=("a moon", "a red house")
)
CLOSED = ("rece", "speed")


@pytest.fixture
def model(make_pico_pipeline):
    return wrap(make_pico_pipeline())


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.double)


# ---- RECE ----------------------------------------------------------------------------------------


def test_what_still_means_the_concept_is_where_its_objective_has_no_slope():
    new, old = ({"k": normal(5, 4, seed=s), "v": normal(6, 4, seed=s + 1)} for s in (0, 2))
    state = normal(1, 4, seed=4)
    found = still_meaning(new, old, state, 0.3).requires_grad_(True)

    def objective(c):
        misses = (new[name] @ c[0] - old[name] @ state[0] for name in new)
        return sum(miss.square().sum() for miss in misses) + 0.3 * c.square().sum()

    (slope,) = torch.autograd.grad(objective(found), found)
    assert slope.abs().max() < 1e-9
    assert objective(found) < objective(state)


def test_at_the_base_the_concept_itself_means_the_concept():
    weights = {"k": normal(5, 4), "v": normal(6, 4, seed=1)}
    states = normal(3, 4, seed=2)
    assert torch.allclose(still_meaning(weights, weights, states, 1e-10), states)


def reference_rece(pipeline, concept, rounds, ridge, search, retain):
    """Algorithm 1, one state at a time, from the bare text encoder."""

    def states(prompt):
        return pipeline.encode_prompt(prompt, "cpu", 1, False)[0][0].double()

    def length(text):
        return len(pipeline.tokenizer(text, add_special_tokens=False).input_ids)

    pairs = []
    for template in concept.templates:
        before = template.split("{}")[0]
        pair = [
            states(template.replace("{}", word))[length(before + word)]
            for word in (concept.target, concept.anchor)
        ]
        pairs.append(pair)
    kept = [row for prompt in concept.retain for row in states(prompt)[: length(prompt) + 2]]
    old = {
        f"unet.{name}.weight": module.weight.detach().double()
        for name, module in pipeline.unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    }
    eye = torch.eye(len(kept[0]), dtype=torch.double)

    def erased(values, rounds_of_sources):
        new = {}
        for name, value in values.items():
            left, right = ridge * value, ridge * eye
            for sources in rounds_of_sources:
                for source, (_, anchor) in zip(sources, pairs, strict=True):
                    left = left + torch.outer(old[name] @ anchor, source)
                    right = right + torch.outer(source, source)
            for row in kept:
                left = left + retain * torch.outer(old[name] @ row, row)
                right = right + retain * torch.outer(row, row)
            new[name] = left @ torch.linalg.inv(right)
        return new

    found = [[source for source, _ in pairs]]
    values = erased(old, found)
    for _ in range(rounds):
        gram = search * eye + sum(value.T @ value for value in values.values())
        cross = sum(value.T @ old[name] for name, value in values.items())
        found.append([torch.linalg.inv(gram) @ cross @ source for source in found[0]])
        values = erased(values, found)
    return values


@pytest.mark.parametrize("rounds", [0, 2])
def test_rece_is_its_algorithm(model, make_pico_pipeline, rounds):
    config = replace(get_method("rece").config, rounds=rounds, following=False)
    found = get_method("rece").edit(Task(model, [CONCEPT]), config).values
    expected = reference_rece(make_pico_pipeline(), CONCEPT, rounds, 0.1, 0.1, 0.1)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value.float(), atol=1e-5), name


def test_without_rounds_rece_is_uce(model):
    uce = get_method("uce")
    settings = replace(uce.config, retain_scale=0.1, ridge=0.1)
    rece = replace(get_method("rece").config, rounds=0)
    one = uce.edit(Task(model, [CONCEPT]), settings).values
    other = get_method("rece").edit(Task(model, [CONCEPT]), rece).values
    assert all(torch.allclose(other[name], value, atol=1e-6) for name, value in one.items())


def test_each_round_leaves_the_attacker_less(model):
    """The best state of the concept's old answers comes less near to them, round by round."""
    task = Task(model, [CONCEPT])
    concepts, *_ = (states.double() for states in erasure_states(task))
    base = {name: p.detach().double() for name, p in task.weights("xattn_kv").items()}

    def miss(rounds):
        config = replace(get_method("rece").config, rounds=rounds, following=False)
        values = get_method("rece").edit(task, config).values
        new = {name: value.double() for name, value in values.items()}
        found = still_meaning(new, base, concepts, config.attack_ridge)
        apart = [(found @ new[n].T - concepts @ base[n].T).square().sum() for n in base]
        return float(sum(apart))

    misses = [miss(rounds) for rounds in (0, 1, 3)]
    assert misses[0] < misses[1] < misses[2]


# ---- SPEED ---------------------------------------------------------------------------------------


def test_the_projector_frees_what_the_states_do_not_have():
    states = normal(3, 8)
    projector = null_space(second_moment(states), 1e-6)
    assert torch.allclose(projector @ projector, projector) and torch.allclose(
        projector, projector.T
    )
    assert (states @ projector).abs().max() < 1e-7
    assert torch.linalg.matrix_rank(projector) == 8 - 3


def test_each_retained_direction_takes_one_of_the_free_ones():
    moments = [second_moment(normal(n, 8)) for n in range(1, 10)]
    ranks = [int(null_space(moment, 1e-6).trace().round()) for moment in moments[:7]]
    assert ranks == [7, 6, 5, 4, 3, 2, 1]
    with pytest.raises(ErasureError, match="none of 8 directions free.*raise it, or retain fewer"):
        null_space(moments[8], 1e-6)


def test_the_edit_in_a_null_space_is_where_its_objective_has_no_slope():
    """Among the changes that leave the retained and the still states alone, none is better."""
    weight, inputs, outputs = normal(5, 8), normal(2, 8, seed=1), normal(2, 5, seed=2)
    retained, still = normal(3, 8, seed=3), normal(2, 8, seed=4)
    projector = held_still(null_space(second_moment(retained), 1e-6), still)
    change = confined_edit(weight, inputs, outputs, inputs[:0], 0.3, projector) - weight
    assert (retained @ change.T).abs().max() < 1e-6 and (still @ change.T).abs().max() < 1e-6

    change = change.requires_grad_(True)
    miss = inputs @ (weight + change).T - outputs
    objective = miss.square().sum() + 0.3 * change.square().sum()
    (slope,) = torch.autograd.grad(objective, change)
    # what is orthogonal to everything that must not change
    fixed = torch.linalg.qr(torch.cat([retained, still]).T).Q
    free = torch.eye(8, dtype=torch.double) - fixed @ fixed.T
    assert slope.abs().max() > 0.1 and (slope @ free).abs().max() < 1e-6


def test_the_edit_in_a_null_space_is_the_paper_s_formula():
    weight, t, outputs = normal(5, 8), normal(2, 8, seed=1), normal(2, 5, seed=2)
    p, k = null_space(second_moment(normal(3, 8, seed=3)), 1e-6), normal(2, 8, seed=4)
    eye = torch.eye(8, dtype=torch.double)
    m = torch.linalg.inv(t.T @ t @ p + 0.3 * eye)
    bracket = eye - m @ k.T @ torch.linalg.inv(k @ p @ m @ k.T) @ k @ p
    change = (outputs - t @ weight.T).T @ t @ p @ bracket @ m
    found = confined_edit(weight, t, outputs, t[:0], 0.3, held_still(p, k))
    assert torch.allclose(found, weight + change)


def test_with_all_directions_free_it_is_the_ridge_edit():
    weight, inputs, outputs = normal(5, 8), normal(2, 8, seed=1), normal(2, 5, seed=2)
    free = torch.eye(8, dtype=torch.double)
    found = confined_edit(weight, inputs, outputs, free, 0.3, free)
    assert torch.allclose(found, ridge_edit(weight, inputs, outputs, free, 0.3))


def test_speed_erases_without_touching_what_is_retained(model):
    """Beside few prompts, the anchor's values stand in the concept's place to a tenth, and no
    retained token's value changes."""
    task = Task(model, [replace(CONCEPT, templates=("a {}",), retain=("a moon",))])
    config = replace(
        get_method("speed").config,
        following=False,
        threshold=1e-6,
        copies=0,
        filter=False,
        ridge=1e-6,
    )
    base = {name: p.detach().double() for name, p in task.weights(config.scope).items()}
    concepts, anchors, retained = (states.double() for states in erasure_states(task))
    found = get_method("speed").edit(task, config).values
    assert found.keys() == base.keys() and all(name.endswith("to_v.weight") for name in found)
    for name, value in found.items():
        change = value.double() - base[name]
        assert (retained @ change.T).abs().max() < 1e-4
        assert (task.cond([""]).embeddings[0, 0].double() @ change.T).abs().max() < 1e-4
        wanted = (anchors - concepts) @ base[name].T
        assert (concepts @ change.T - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("name", CLOSED)
def test_the_closed_forms_edit_projections_of_text_states_alone(name):
    config = get_method(name).config
    sd3 = wrap(FAMILIES["sd3"](), "sd3")
    with pytest.raises(ErasureError, match="is not applied to text states"):
        get_method(name).edit(Task(sd3, [CONCEPT]), replace(config, scope="xattn_kv"))
    for family in ("sd1", "sd2", "sdxl", "sd3", "flux"):
        task = Task(wrap(FAMILIES[family](), family), [CONCEPT])
        found = get_method(name).edit(task, replace(config, scope="text_in"))
        assert all(value.isfinite().all() for value in found.values.values())


def test_condensed_states_say_the_same_to_a_least_squares_problem():
    states, weight, keep = normal(50, 12), normal(5, 6, seed=1), normal(3, 6, seed=2)
    few = condensed(states)
    assert few.shape == (12, 12) and torch.allclose(few.T @ few, states.T @ states)
    whole, small = (
        ridge_edit(weight, rows[:, :6], rows[:, 6:] @ weight.T, keep, 0.3) for rows in (states, few)
    )
    assert torch.allclose(whole, small)
    assert torch.equal(condensed(states[:12]), states[:12])


def test_what_another_concept_forgets_is_not_retained(model):
    """Of two concepts that each retain the other, as those of the embedded world do."""
    moon = ConceptSpec("moon", "house", templates=("a {}",), retain=("a heart", "a fish"))
    task = Task(model, [CONCEPT, moon])
    retained = erasure_states(task)[2]
    assert torch.equal(retained, seen_states(task, ["a red house", "a fish"]))


@pytest.mark.parametrize("name", [*CLOSED, "uce"])
def test_a_closed_form_without_retained_prompts_is_refused(model, name):
    with pytest.raises(ErasureError, match="give the concept some retain prompts"):
        get_method(name).edit(Task(model, [replace(CONCEPT, retain=())]), get_method(name).config)


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        ("rece", "rounds", -1),
        ("rece", "ridge", 0),
        ("speed", "threshold", 1.5),
        ("speed", "copies", -1),
    ],
)
def test_settings_out_of_range_are_refused(method, setting, value):
    with pytest.raises(ErasureError, match=setting):
        replace(get_method(method).config, **{setting: value})
