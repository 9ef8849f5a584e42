"""MACE: its two closed forms and its attention loss, each written here once more, for two
concepts."""

from dataclasses import replace

import pytest
import torch

from erase.latents.latent_set import Given, LatentSet, epoch_rows
from erase.methods import get_method
from erase.models import wrap
from erase.objectives.text_inputs import following_states, retained_states, subject_states
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.training.config import MaskConfig
from erase.training.confine import null_spaces
from tests.attention import keeping
from tests.bare import RETAIN, SGD, SIZE, Bare, latents, mean
from tests.test_methods import stop_before_step

SHAPES = {"templates": ("a {} here", "{}"), "retain": ("a star", "a red house")}
CONCEPTS = [
    ConceptSpec("heart", "mushroom", synonyms=("red heart",), **SHAPES),
    ConceptSpec("moon", "tree", **SHAPES),
]
PROMPTS = ("a heart here", "moon", "red heart", "a moon here")
FORGET = LatentSet(latents(4, 0), None, PROMPTS, ("a mushroom here", "tree", "mushroom", "a tree"))
PLACES = {"a heart here": [2], "moon": [1], "red heart": [1, 2], "a moon here": [2]}
KV = ("attn2.to_k", "attn2.to_v")
CONFIG = replace(
    get_method("mace").config, lora_rank=0, train=replace(SGD, lr=0.01), retain_scale=0.5
)


@pytest.fixture
def task(make_pico_pipeline):
    return Task(wrap(make_pico_pipeline()), CONCEPTS, Given(FORGET, RETAIN))


def edit(task, config=CONFIG):
    return get_method("mace").edit(task, config)


class Literal(Bare):
    """The three stages on the bare pipeline, one state, row and token at a time."""

    def __init__(self, pipeline, config):
        super().__init__(pipeline)
        self.config, self.kept = config, keeping(pipeline.unet)
        modules = pipeline.unet.named_modules()
        self.weights = {name: m.weight for name, m in modules if name.endswith(KV)}
        self.old = {name: weight.detach().double() for name, weight in self.weights.items()}

    def states(self, prompt):
        return self.pipeline.encode_prompt(prompt, "cpu", 1, False)[0][0].double()

    def length(self, text):
        return len(self.pipeline.tokenizer(text, add_special_tokens=False).input_ids)

    def named(self, concept):
        """(the last state of each name), (each state behind it, beside that behind the anchor)."""
        last, behind = [], []
        for template in concept.templates:
            for name in concept.names:
                ours = self.states(template.replace("{}", name))
                theirs = self.states(template.replace("{}", concept.anchor))
                before = template.split("{}")[0]
                end, other = self.length(before + name), self.length(before + concept.anchor)
                last.append(ours[end])
                behind += zip(ours[end + 1 :], theirs[other + 1 :], strict=False)
        return last, behind

    def solved(self, pairs):
        """argmin_W sum |W c - v|^2 + retained + ridge, for (c, {projection: v})."""
        kept = []
        for prompt in SHAPES["retain"]:
            kept += list(self.states(prompt)[: self.length(prompt) + 2])
        values = {}
        for name, old in self.old.items():
            left = self.config.ridge * old
            right = self.config.ridge * torch.eye(old.shape[1], dtype=torch.double)
            for state, wanted in pairs:
                left, right = (
                    left + torch.outer(wanted[name], state),
                    right + torch.outer(state, state),
                )
            for state in kept:
                left = left + 0.5 * torch.outer(old @ state, state)
                right = right + 0.5 * torch.outer(state, state)
            values[name] = left @ torch.linalg.inv(right)
        return values

    def put(self, values):
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(values[name])

    def maps(self, *row):
        self.kept.clear()
        self.predict(*row)
        return list(self.kept)

    def loss(self, rows):
        """Squared attention to the name, at the positions that look at it at the base."""
        seen = [self.at_base(self.maps, *row) for row in rows]
        return mean(self.one(before, *row) for before, row in zip(seen, rows, strict=True))

    def one(self, seen, latent, noise, t, prompt):
        total = 0
        for before, scores in zip(seen, self.maps(latent, noise, t, prompt), strict=True):
            looks = mean(before[:, :, token] for token in PLACES[prompt]).mean(dim=0)
            for token in PLACES[prompt]:
                total = total + mean(
                    head[looks > looks.mean(), token].square().sum() for head in scores
                )
        return total

    def drawn(self, concept, step):
        own = [i for i, prompt in enumerate(PROMPTS) if any(n in prompt for n in concept.names)]
        generator = torch.Generator().manual_seed(step)
        torch.randint(1000, (SIZE,), generator=generator)
        noise = torch.randn((SIZE, 4, 8, 8), generator=generator)
        t = torch.arange(1000)
        weights = torch.sigmoid(0.05 * (t - 200)) - torch.sigmoid(0.05 * (t - 400))
        t = torch.multinomial(weights, SIZE, replacement=True, generator=generator)
        rows = epoch_rows(len(own), step * SIZE, SIZE, 0).tolist()
        return [
            (FORGET.latents[own[r]], noise[i], t[i], PROMPTS[own[r]]) for i, r in enumerate(rows)
        ]

    def erase(self):
        named = {concept.target: self.named(concept) for concept in CONCEPTS}
        words = []
        for _, behind in named.values():
            words += [(c, {n: old @ a for n, old in self.old.items()}) for c, a in behind]
        refined, goals = self.solved(words), []
        for concept in CONCEPTS:
            self.put(refined)
            for step in range(SGD.steps):
                value = self.loss(self.drawn(concept, step))
                params = [weight.requires_grad_(True) for weight in self.weights.values()]
                slopes = torch.autograd.grad(value, params, allow_unused=True)
                with torch.no_grad():
                    for weight, slope in zip(params, slopes, strict=True):
                        weight -= 0.01 * (0 if slope is None else slope)
            tuned = {name: weight.detach().double() for name, weight in self.weights.items()}
            last, behind = named[concept.target]
            states = [*last, *(c for c, _ in behind)]
            goals += [(c, {name: value @ c for name, value in tuned.items()}) for c in states]
        return self.solved(goals)


def test_mace_is_its_three_stages(task, make_pico_pipeline):
    found, expected = edit(task).values, Literal(make_pico_pipeline(), CONFIG).erase()
    assert len(found) == len(expected) > 0
    for name, value in expected.items():
        assert torch.allclose(found[f"unet.{name}.weight"], value.float(), atol=1e-5), name


def gaps(task, found):
    """How far the answers to the words behind the names are from those behind the anchor, beside
    how far they were, and how far the answers to retained prompts moved."""
    pairs = [following_states(task, concept) for concept in CONCEPTS]
    words, instead = (torch.cat(states) for states in zip(*pairs, strict=True))
    retained, base = retained_states(task), task.model.parameters()
    left = sum((words @ v.T - instead @ base[n].T).norm() for n, v in found.items())
    before = sum((words @ base[n].T - instead @ base[n].T).norm() for n in found)
    moved = sum((retained @ (v - base[n]).T).norm() for n, v in found.items())
    return float(left / before), float(moved / sum((retained @ base[n].T).norm() for n in found))


def test_the_words_around_the_name_tell_of_the_anchor_and_others_stay(task):
    """Without a step, the two closed forms alone."""
    still = replace(CONFIG, train=replace(SGD, lr=1e-30, steps=1), ridge=1e-3)
    near, moved = gaps(task, edit(task, still).values)
    assert near < 0.4 and moved < 0.15
    free = gaps(task, edit(task, replace(still, retain_scale=0.0)).values)
    assert free[0] < near and free[1] > 3 * moved


def test_one_weight_answers_as_the_adapter_of_each_concept(task):
    """Nearer than the sum of the adapters does."""
    alone, config = [], replace(CONFIG, train=replace(SGD, lr=0.3), retain_scale=0.0, ridge=1e-4)
    for concept in CONCEPTS:
        alone.append(edit(Task(task.model, [concept], Given(FORGET, RETAIN)), config).values)
    together, base = edit(task, config).values, task.model.parameters()
    fused = added = 0.0
    for i, concept in enumerate(CONCEPTS):
        states = subject_states(task, concept)[0]
        for name, value in together.items():
            goal = states @ alone[i][name].T
            both = alone[0][name] + alone[1][name] - base[name]
            fused += float((states @ value.T - goal).square().sum())
            added += float((states @ both.T - goal).square().sum())
    assert fused < 0.5 * added


def test_outside_the_mask_the_closed_forms_keep_the_bits_too(task):
    config = replace(CONFIG, mask=MaskConfig(rule="remap", density=0.1, batches=2))
    found, base = edit(task, config), task.model.parameters()
    for name, value in found.values.items():
        assert torch.equal(value[~found.mask[name]], base[name][~found.mask[name]])
    assert any(not torch.equal(value, base[name]) for name, value in found.values.items())


def test_confined_both_closed_forms_stay_in_the_null_space(task):
    earlier = ConceptSpec("fish", "tree", templates=("a {}",))
    after = Task(task.model, CONCEPTS, Given(FORGET, RETAIN), earlier=[earlier])
    config, base = replace(CONFIG, confine=0.1), task.model.parameters()
    space = next(iter(null_spaces(after, after.weights(config.scope), config).values()))
    for name, value in edit(after, config).values.items():
        change = (value - base[name]).double()
        assert 0 < change.norm() and (change - change @ space).norm() < 1e-5 * change.norm()


def test_stopped_in_the_second_concept_it_goes_on_from_there(task, make_pico_pipeline, tmp_path):
    config = replace(CONFIG, lora_rank=1, train=replace(SGD, checkpoint_every=1))
    whole = edit(task, config)
    assert len(whole.losses) == 2 * SGD.steps
    kept = Task(task.model, CONCEPTS, Given(FORGET, RETAIN), folder=tmp_path)
    fitted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("erase.methods.mace.fine_tune", counted(fitted, patch))
        with pytest.raises(KeyboardInterrupt):
            edit(kept, config)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["training-0.pt", "training-1.pt"]
    resumed = edit(kept, config)
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.values[name], value) for name, value in whole.values.items())


def counted(fitted, patch):
    """`fine_tune`, whose second call is stopped before its third step."""
    from erase.methods.mace import fine_tune

    def stopped(*args, **further):
        if fitted:
            stop_before_step(patch, 2)
        fitted.append(1)
        return fine_tune(*args, **further)

    return stopped


def test_an_adapter_turns_attention_from_its_own_concepts_names_alone(task, monkeypatch):
    asked = []
    import erase.objectives.cross_attention as module

    def spy(task, concepts, prompts, tokens, found=module.name_places):
        asked.append((tuple(concepts), tuple(prompts)))
        return found(task, concepts, prompts, tokens)

    monkeypatch.setattr(module, "name_places", spy)
    edit(task)
    for concepts, prompts in asked:
        (concept,) = concepts
        assert all(any(name in prompt for name in concept.names) for prompt in prompts)
    assert {concepts for concepts, _ in asked} == {(one,) for one in CONCEPTS}


def test_a_concept_that_no_caption_names_is_refused(make_pico_pipeline):
    fish = ConceptSpec("fish", "tree", **SHAPES)
    task = Task(wrap(make_pico_pipeline()), [CONCEPTS[0], fish], Given(FORGET, RETAIN))
    with pytest.raises(ErasureError, match="no forget prompt names 'fish'.*synonyms"):
        edit(task)
