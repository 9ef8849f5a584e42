"""What closed forms say that a matrix is given of the text is what it is given in a prediction, in
every family, and names are found where their text encoders have them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from erase.latents.config import LatentConfig
from erase.methods import get_method
from erase.models import wrap
from erase.models.scopes import select, text_input
from erase.models.text_states import encoded_together, given_tokens
from erase.objectives.text_inputs import (
    behind_names,
    following_states,
    prompt_states,
    subject_states,
)
from erase.prompts.concepts import ConceptSpec
from erase.task import Task
from erase.training.confine import restraints
from tests.families import FAMILIES
from tests.flow_families import FLOWS

pytestmark = pytest.mark.usefixtures("short_chat")
MAKERS = {**FAMILIES, **FLOWS}
CONCEPT = ConceptSpec("heart", "moon", templates=("a {} in a box",), retain=("a red fish",))
READERS = {
    "sd3": ("text_encoder", "text_encoder_3"),
    "flux": ("text_encoder_2",),
    "flux-schnell": ("text_encoder_2",),
}
"""the encoders whose states lie in a place of their own; of others the first alone"""


@pytest.fixture(params=MAKERS)
def task(request):
    model = wrap(MAKERS[request.param](), request.param)
    return Task(model, [CONCEPT], LatentConfig(n_forget=2, n_retain=2, steps=1), 0)


def given(task, names, prompt):
    """What the modules of these matrices are given in a prediction under a prompt."""
    model, seen, hooks = task.model, {}, []
    for name in names:
        part, _, module = name.removesuffix(".weight").partition(".")
        keep = lambda _, inputs, name=name: seen.setdefault(name, inputs[0].detach())  # noqa: E731
        hooks.append(model.component(part).get_submodule(module).register_forward_pre_hook(keep))
    model.predict(torch.randn(1, *model.latent_shape), torch.tensor([300]), task.cond([prompt]))
    for hook in hooks:
        hook.remove()
    return seen


def test_a_matrix_is_given_what_a_closed_form_says(task):
    prompt = "a red heart in a box"
    names = list(select(task.model.parameters(), "text_in"))
    seen = given(task, names, prompt)
    assert set(seen) == set(names)
    for name, inputs in seen.items():
        of = text_input(name)
        states, count = prompt_states(task, [prompt], of)
        flat = inputs.flatten(0, -2)
        expected = states[0] if of.pooled else states[0, :count]
        assert torch.allclose(flat[: len(expected)], expected, atol=1e-5), name


def test_a_change_is_drawn_back_by_what_its_matrix_is_given_of_retained_prompts(task):
    config = replace(get_method("salun").config, scope="text_in", prox_text=3.0)
    weights = select(task.model.parameters(), "text_in")
    found, seen = restraints(task, weights, config), given(task, weights, CONCEPT.retain[0])
    assert set(found) == set(weights)
    for name, restraint in found.items():
        rows = seen[name].flatten(0, -2).double()
        _, count = prompt_states(task, CONCEPT.retain, text_input(name))
        second = rows[:count].T @ rows[:count]
        second = second / second.trace() * len(second)
        change = torch.randn(3, len(second)).double()
        expected = change @ torch.linalg.inv(torch.eye(len(second)) + 0.2 * 3.0 * second)
        assert torch.allclose(restraint(change, 0.2), expected, rtol=1e-3, atol=1e-4), name


def test_prompts_that_are_encoded_together_have_the_states_of_each_alone(task):
    """Long beside short: what is added for the others' sake counts nowhere."""
    prompts = ("a red fish", "moon", "a small blue house behind a tall green tree")
    together = encoded_together(task.model, prompts)
    for of in {*map(text_input, select(task.model.parameters(), "text_in"))}:
        alone = torch.cat([given_tokens(task.model, task.cond([one]), of) for one in prompts])
        assert torch.allclose(given_tokens(task.model, together, of), alone, atol=1e-4), of


def test_a_name_is_found_where_its_encoders_have_it(task):
    """Another word there changes the states from there on, and, of an encoder that reads forward,
    none before."""
    named, instead = (
        subject_states(task, ConceptSpec(word, "moon", templates=("a {} in a box",)))[0]
        for word in ("heart", "fish")
    )
    rows = [task.cond([f"a {word} in a box"]).embeddings[0] for word in ("heart", "fish")]
    readers = READERS.get(task.model.name, ("text_encoder",))
    assert len(named) == len(readers)
    for reader, ours, others in zip(readers, named, instead, strict=True):
        (places,) = {tokens.states for tokens in task.model.tokens(["a heart"])[reader]}
        before, name = (len(task.model.tokens([text])[reader][0].seen) for text in ("a", "a heart"))
        assert torch.equal(rows[0][places.start + name - 1], ours)
        assert not torch.equal(ours, others)
        apart = ((rows[0] - rows[1]).abs() > 1e-4).any(dim=1).nonzero().flatten()
        forward = [int(place) for place in apart if place in places]
        if reader == "text_encoder":
            assert min(forward) == places.start + before


def test_states_behind_a_name_end_with_its_encoders(task):
    named, anchors = following_states(task, CONCEPT)
    assert named.shape == anchors.shape and len(named) > 0
    if task.model.name == "sd3-without-t5":  # the zeros in its place are nobody's states
        assert named.any(dim=1).all() and anchors.any(dim=1).all()


@pytest.mark.parametrize("name", ["uce", "rece", "speed"])
def test_a_closed_form_gives_the_name_the_anchors_answers(task, name):
    """With nothing retained and a weak ridge, every matrix that reads the text answers the name
    nearly as the base answers the anchor."""
    config = get_method(name).config
    found = get_method(name).edit(task, type(config)(scope="text_in", following=False))
    base = task.model.parameters()
    assert set(found.values) == set(select(base, "text_in"))
    for key, value in found.values.items():
        ours, anchor = subject_states(task, CONCEPT, text_input(key))
        old = base[key].detach()
        gap = ((ours - anchor) @ old.T).norm()
        assert (ours @ value.T - anchor @ old.T).norm() < gap


def test_of_a_long_filling_some_states_are_looked_at_evenly_apart(monkeypatch):
    task = Task(wrap(FAMILIES["sd1"]()), [CONCEPT])
    every = behind_names(task, CONCEPT)
    monkeypatch.setattr("erase.objectives.text_inputs.MOST", 3)
    for few, all_of in zip(behind_names(task, CONCEPT), every, strict=True):
        for some, states in zip(few, all_of, strict=True):
            assert torch.equal(some, states[[0, (len(states) - 1) // 2, len(states) - 1]])


def test_an_anchor_stands_where_no_other_concept_does(task):
    """With a concept of its templates' words, the anchor's states are those of other prompts."""
    box = ConceptSpec("box", "jar", retain=("a red fish",))
    other = ConceptSpec("heart", "moon", templates=("a {} in a jar",))
    both = Task(task.model, [CONCEPT, box], LatentConfig(n_forget=2, n_retain=2, steps=1), 0)
    named, anchor = subject_states(both, CONCEPT)
    assert torch.equal(named, subject_states(task, CONCEPT)[0])
    assert torch.allclose(anchor, subject_states(task, other)[1], atol=1e-3)
    found = [following_states(one, CONCEPT)[1] for one in (both, task)]
    found.append(following_states(task, other)[1])
    most = min(map(len, found))  # "jar" may have more tokens
    behind, alone, expected = (states[:most] for states in found)
    assert torch.allclose(behind, expected, atol=1e-3)
    assert not torch.allclose(behind, alone, atol=1e-3)
