"""FIA: its equations written out, neuron by neuron, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch

from erase.latents.latent_set import Given, LatentSet
from erase.methods import get_method
from erase.methods.fia import top
from erase.models import wrap
from erase.objectives.responses import Moments, response
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.task import Task
from tests.bare import RETAIN, Bare, latents
from tests.families import FAMILIES

HEART, MOON = (ConceptSpec(name, "tree", retain=("a star",)) for name in ("heart", "moon"))
PROMPTS = ("a heart", "a red moon", "a red heart", "moon", "a blue heart", "a blue moon")
UNNAMED = ("a", "a red", "a red", "", "a blue", "a blue")
FORGET = LatentSet(latents(6, 0), None, PROMPTS, ("a tree",) * 6)
SMALL = replace(get_method("fia").config, density=0.08, often=0.2, steps=3, early=0.5)


def task_of(pipeline, concepts):
    return Task(wrap(pipeline), concepts, Given(FORGET, RETAIN))


def edit(task, **change):
    return get_method("fia").edit(task, replace(SMALL, **change)).values


def lost(task, **change):
    """Which weights become 0, by name."""
    base = task.model.parameters()
    found = edit(task, **change)
    for name, value in found.items():
        assert torch.equal(value[value != 0], base[name][value != 0]), "others keep their bits"
    return {name: (value == 0) & (base[name] != 0) for name, value in found.items()}


class Literal(Bare):
    """FIA on the bare UNet: one row, timestep, layer and output at a time."""

    def energies(self, rows, texts, step):
        """Of each layer, U_ij in each row."""
        stream, layers, kept = torch.Generator().manual_seed(step), self.layers(), {}
        noise = torch.randn((len(rows), 4, 8, 8), generator=stream)
        t = torch.tensor(999 - int(step * 0.5 * 999 / 3))
        hooks = [
            layer.register_forward_hook(
                lambda layer, given, output, name=name: kept.setdefault(name, []).append(
                    self.energy(layer.weight, given[0][0])
                )
            )
            for name, layer in layers.items()
        ]
        with torch.no_grad():
            for i, row in enumerate(rows):
                self.predict(FORGET.latents[row], noise[i], t, texts[row])
        for hook in hooks:
            hook.remove()
        return kept

    def layers(self):
        modules = self.unet.named_modules()
        return {name: module for name, module in modules if name.endswith("ff.net.2")}

    def energy(self, weight, x):
        """Eq. 1: weight, norm of the input, cosine of input and output."""
        rows = []
        for w in weight:
            y = x @ w
            cosine = torch.nn.functional.cosine_similarity(x, y[:, None], dim=0)
            rows.append(w.abs() * x.norm(dim=0) * cosine.abs())
        return torch.stack(rows)

    def sensitive(self, rows):
        """Eq. 2 to 6: of each layer, the places (output, input) of a concept."""
        strength, often = {}, {}
        for step in range(3):
            concept = self.energies(rows, PROMPTS, step)
            rest = self.energies(rows, UNNAMED, step)
            for name in concept:
                c, b = torch.stack(concept[name]), torch.stack(rest[name])
                s = (c.mean(0) - b.mean(0) - b.std(0, unbiased=False)).clamp(min=0)
                least = s.flatten().sort(descending=True).values[int(0.2 * s.numel()) - 1]
                strength.setdefault(name, []).append(s)
                often.setdefault(name, []).append((s >= least) & (s > 0))
        chosen = {}
        for name, found in strength.items():
            a = torch.stack(found).mean(0)
            a = a / a.max() / 2 + torch.stack(often[name]).float().mean(0) / 2
            count = int(0.08 * a.numel())
            layer = {
                divmod(i, a.shape[1]) for i in a.flatten().argsort(descending=True)[:count].tolist()
            }
            rows = [a[i].argsort(descending=True)[: int(0.08 * a.shape[1])] for i in range(len(a))]
            outputs = {(i, j) for i, row in enumerate(rows) for j in row.tolist()}
            chosen[name] = {(i, j) for i, j in layer & outputs if a[i, j] > 0}
        return chosen


def test_fia_is_its_equations(make_pico_pipeline):
    """Rounding may exchange two weights at the edge, which are as sensitive as each other."""
    literal = Literal(make_pico_pipeline())
    hearts, moons = literal.sensitive([0, 2, 4]), literal.sensitive([1, 3, 5])
    found = lost(task_of(make_pico_pipeline(), [HEART, MOON]))
    assert found.keys() == {f"unet.{name}.weight" for name in hearts}
    for name, expected in hearts.items():
        places = {tuple(place) for place in found[f"unet.{name}.weight"].nonzero().tolist()}
        assert len(places ^ (expected ^ moons[name])) <= 2 < 20 < len(places)


def test_a_weight_that_enough_concepts_share_stays(make_pico_pipeline):
    pipeline = make_pico_pipeline()
    heart, moon = (lost(task_of(pipeline, [one])) for one in (HEART, MOON))
    both = task_of(pipeline, [HEART, MOON])
    shared = sum(int((heart[name] & moon[name]).sum()) for name in heart)
    assert shared > 0
    for name, found in lost(both).items():
        assert torch.equal(found, heart[name] ^ moon[name])
    third = ConceptSpec("blue", "green", retain=("a star",))
    every = lost(task_of(pipeline, [HEART, MOON, third]), shared=1.0)
    blue = lost(task_of(pipeline, [third]))
    for name, found in every.items():
        hits = heart[name].int() + moon[name].int() + blue[name].int()
        assert torch.equal(found, (hits > 0) & (hits < 3)), "one that two of three share is lost"


def test_no_layer_and_no_output_loses_more_than_the_density(make_pico_pipeline):
    for density in (0.01, 0.1):
        for found in lost(task_of(make_pico_pipeline(), [HEART]), density=density).values():
            assert 0 < found.sum() <= max(1, int(density * found.numel()))
            assert found.sum(dim=1).max() <= max(1, int(density * found.shape[1]))


def test_what_the_name_does_not_move_is_not_lost(make_pico_pipeline):
    """Without a way for the text into the image, nothing responds to the name."""
    pipeline = make_pico_pipeline()
    for name, module in pipeline.unet.named_modules():
        if name.endswith("attn2.to_v"):
            module.weight.detach().zero_()
    assert not any(found.any() for found in lost(task_of(pipeline, [HEART])).values())


def test_a_response_by_hand():
    weight = torch.tensor([[2.0, 0.0], [0.0, -3.0], [1.0, 1.0]])
    inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # orthogonal, of norms 1 and 2
    third = torch.tensor([1.0, 2.0]) * torch.tensor([1.0, 2.0]) / 5**0.5  # norm times cosine
    expected = torch.stack([torch.tensor([2.0, 0.0]), torch.tensor([0.0, 6.0]), third])
    assert torch.allclose(response(weight, inputs), expected)
    assert torch.equal(response(weight, torch.zeros(2, 2)), torch.zeros(3, 2))


def test_moments_are_those_of_all_at_once():
    values = 1e4 + torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    one, other = Moments(values[0]), Moments(values[0])
    for value in values:
        one.add(value)
        other.add(value - 5)
    wanted = values.double()
    assert torch.allclose(one.mean, wanted.mean(0).float())
    assert torch.allclose(one.deviation, wanted.std(0, unbiased=False).float(), rtol=1e-2)
    assert torch.allclose(one.above(other), 5 - other.deviation, atol=0.02)
    assert torch.equal(other.above(one), torch.zeros(3))


def test_the_top_share_of_each_row():
    values = torch.tensor([[3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 1.0]])
    half = torch.tensor([[True, False, True, False], [False, False, False, True]])
    assert torch.equal(top(values, 0.5), half)
    one = torch.tensor([[True, False, False, False], [False, False, False, True]])
    assert torch.equal(top(values, 0.1), one)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_feed_forward_layers_of_every_family_are_found(family):
    model = wrap(FAMILIES[family](), family)
    shape = len(PROMPTS), *model.latent_shape
    points = LatentSet(torch.randn(shape, generator=torch.Generator()), None, PROMPTS, PROMPTS)
    found = lost(Task(model, [HEART], Given(points, points)), steps=2)
    part = next(iter(model.parameters())).split(".")[0]
    blocks = {name.split(".ff")[0] for name in model.parameters(part) if ".ff" in name}
    assert {name.split(".ff")[0] for name in found} == blocks
    assert part == "unet" or any(".ff_context.net.2." in name for name in found)
    assert all(value.any() for value in found.values())


def test_another_scope_takes_the_linear_layers_in_it(make_pico_pipeline):
    task = task_of(make_pico_pipeline(), [HEART])
    found = lost(task, scope="xattn")
    assert {name.split("attn2.")[1] for name in found} == {
        f"{layer}.weight" for layer in ("to_q", "to_k", "to_v", "to_out.0")
    }
    with pytest.raises(ErasureError, match=r"conv_in.*no weight of a linear layer"):
        edit(task, scope=r"\.conv_in\.")
    with pytest.raises(ErasureError, match="text_encoder.*no weight of a linear layer"):
        edit(task, scope="text_encoder")


def test_a_concept_that_no_prompt_names_is_refused(make_pico_pipeline):
    fish = ConceptSpec("fish", "tree", retain=("a star",))
    with pytest.raises(ErasureError, match="no forget prompt names 'fish'.*synonyms"):
        edit(task_of(make_pico_pipeline(), [HEART, fish]))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("density", 0), ("density", 1.1), ("often", 0), ("shared", 2), ("steps", 0), ("early", 0)],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ErasureError, match=setting):
        replace(SMALL, **{setting: value})
