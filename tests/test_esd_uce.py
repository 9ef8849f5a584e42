"""ESD and UCE against literal reimplementations of their papers' equations."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from torch._subclasses.fake_tensor import FakeTensorMode

from erase.latents.latent_set import Given, LatentSet, epoch_rows
from erase.methods import get_method
from erase.models import wrap
from erase.objectives.closed_form import ridge_edit
from erase.objectives.negative_guidance import forget_set
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.tensors import exact
from erase.training.config import TrainConfig
from tests.fake_gpu import needs_fake_gpu
from tests.families import FAMILIES

CONCEPT = ConceptSpec(
    "heart", "mushroom", templates=("a {}", "a photo of a {}"), retain=("a moon", "a red house")
)


@pytest.fixture
def model(make_pico_pipeline):
    return wrap(make_pico_pipeline())


# ---- ESD, eq. 5 ----------------------------------------------------------------------------------


def reference_esd(pipeline, latents, prompts, starts, eta, lr, steps, size):
    """SGD on |eps(x_t, c) - [eps_0(x_t, start) - eta (eps_0(x_t, c) - eps_0(x_t))]|^2 over the
    cross-attention, by the bare UNet."""
    unet = pipeline.unet
    frozen = {k: v.detach().clone() for k, v in pipeline.unet.state_dict().items()}
    trained = [p for name, p in unet.named_parameters() if "attn2" in name]
    schedule = DDIMScheduler.from_config(pipeline.scheduler.config)
    text = {p: pipeline.encode_prompt(p, "cpu", 1, False)[0] for p in {"", *prompts, *starts}}
    for step in range(steps):
        rows = epoch_rows(len(latents), step * size, size, 0)
        generator = torch.Generator().manual_seed(step)
        t = torch.randint(1000, (size,), generator=generator)
        noise = torch.randn((size, *latents.shape[1:]), generator=generator)
        noisy = schedule.add_noise(latents[rows], noise, t)
        concept = torch.cat([text[prompts[row]] for row in rows])
        start = torch.cat([text[starts[row]] for row in rows])
        null = text[""].expand(size, -1, -1)
        with torch.no_grad():
            now = {k: v.clone() for k, v in unet.state_dict().items()}
            unet.load_state_dict(frozen)
            away = unet(noisy, t, concept).sample - unet(noisy, t, null).sample
            target = unet(noisy, t, start).sample - eta * away
            unet.load_state_dict(now)
        loss = (unet(noisy, t, concept).sample - target).square().mean()
        for p, grad in zip(
            trained,
            torch.autograd.grad(loss, [p.requires_grad_(True) for p in trained]),
            strict=True,
        ):
            with torch.no_grad():
                p -= lr * grad
    return {f"unet.{name}": p.detach() for name, p in unet.named_parameters() if "attn2" in name}


CAPTIONS = ("a red heart", "a photo of hearts", "a love symbol on wood", "two HEARTS", "a moon")
ALONE = ("heart", "heart", "love symbol", "heart", "a moon")
ANCHORS = ("a red mushroom", "a photo of mushrooms", "a mushroom on wood", "two mushrooms", "rain")
ANCHOR = ("mushroom",) * 4 + ("rain",)


@pytest.mark.parametrize(
    ("settings", "prompts", "starts"),
    [
        ({}, ALONE, ("",) * 5),
        ({"guidance": 3.0, "prompts": "captions"}, CAPTIONS, ("",) * 5),
        ({"guidance": 2.0, "erase_from": "anchor"}, ALONE, ANCHOR),
        ({"prompts": "captions", "erase_from": "anchor"}, CAPTIONS, ANCHORS),
    ],
)
def test_esd_takes_the_steps_of_its_equation(model, make_pico_pipeline, settings, prompts, starts):
    """Of the concept's name alone, unless captions are asked for; away from it, from the empty
    prompt's prediction or from the anchor's. What names no concept is taken as it is."""
    concept = replace(CONCEPT, synonyms=("love symbol",))
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    forget = LatentSet(latents, None, CAPTIONS, ANCHORS)
    train = TrainConfig(steps=4, lr=0.1, batch_size=2, optimizer="SGD")
    config = replace(get_method("esd").config, train=train, **settings)
    found = get_method("esd").edit(Task(model, [concept], Given(forget, forget)), config)

    eta = settings.get("guidance", 1.0)
    expected = reference_esd(make_pico_pipeline(), latents, prompts, starts, eta, 0.1, 4, 2)
    base = model.parameters()
    assert found.values.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found.values[name], value, atol=1e-5), name
    assert any(not torch.equal(value, base[name]) for name, value in found.values.items())


# ---- UCE, eq. 7 ----------------------------------------------------------------------------------


def test_of_several_names_in_a_prompt_each_concept_has_its_turn(model):
    """The longest would always win."""
    red = ConceptSpec("red", "blue", retain=("a moon",))
    prompts = ("a red heart",) * 4 + ("a red moon", "a moon")
    anchors = ("a blue mushroom",) * 4 + ("a blue moon", "rain")
    given = Given(LatentSet(torch.zeros(6, 4, 8, 8), None, prompts, anchors), None)
    found = forget_set(Task(model, [CONCEPT, red], given), "names")
    pairs = Counter(zip(found.prompts, found.anchors, strict=True))
    assert pairs == {("heart", "mushroom"): 2, ("red", "blue"): 3, ("a moon", "rain"): 1}


def test_the_ridge_edit_is_where_its_objective_has_no_slope():
    """Any other weight is worse; the objective written out, differentiated by autograd."""
    torch.manual_seed(0)
    old, c, v, p = (
        torch.randn(*shape, dtype=torch.double) for shape in ((5, 4), (3, 4), (3, 5), (6, 4))
    )
    new = ridge_edit(old, c, v, p, 0.3).requires_grad_(True)

    def objective(weight):
        erased = (c @ weight.T - v).square().sum()
        kept = (p @ weight.T - p @ old.T).square().sum()
        return erased + kept + 0.3 * (weight - old).square().sum()

    (slope,) = torch.autograd.grad(objective(new), new)
    assert slope.abs().max() < 1e-9
    assert objective(new) < objective(old) and objective(new) < objective(
        new + 0.01 * torch.randn_like(new)
    )


def reference_uce(pipeline, concept, ridge, following):
    """The closed form with one loop per token, from the bare text encoder; the paper's eq. 7 with
    lambda on the old weight."""

    def states(prompt):
        return pipeline.encode_prompt(prompt, "cpu", 1, False)[0][0].double()

    def length(text):
        return len(pipeline.tokenizer(text, add_special_tokens=False).input_ids)

    pairs = []
    for name in (concept.target, *concept.synonyms):
        for template in concept.templates:
            before = template.split("{}")[0]
            words = (name, concept.anchor)
            rows = [states(template.replace("{}", word)) for word in words]
            ends = [length(before + word) for word in words]
            pairs.append([row[end] for row, end in zip(rows, ends, strict=True)])
            behind = len(rows[0]) - 1 - max(ends) if following else 0
            for i in range(1, behind + 1):
                pair = [row[end + i] for row, end in zip(rows, ends, strict=True)]
                pairs.append([state / behind**0.5 for state in pair])
    kept = [row for prompt in concept.retain for row in states(prompt)[: length(prompt) + 2]]

    found = {}
    for name, module in pipeline.unet.named_modules():
        if not name.endswith(("attn2.to_k", "attn2.to_v")):
            continue
        old = module.weight.detach().double()
        left, right = ridge * old, ridge * torch.eye(old.shape[1], dtype=torch.double)
        for source, anchor in pairs:
            left = left + torch.outer(old @ anchor, source)
            right = right + torch.outer(source, source)
        for row in kept:
            left, right = left + torch.outer(old @ row, row), right + torch.outer(row, row)
        found[f"unet.{name}.weight"] = (left @ torch.linalg.inv(right)).float()
    return found


@pytest.mark.parametrize("synonyms", [(), ("valentine",)])
@pytest.mark.parametrize("following", [False, True])
def test_uce_is_its_closed_form(model, make_pico_pipeline, synonyms, following):
    concept = replace(CONCEPT, synonyms=synonyms)
    config = replace(get_method("uce").config, following=following)
    found = get_method("uce").edit(Task(model, [concept]), config).values
    expected = reference_uce(make_pico_pipeline(), concept, 0.5, following)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-5), name
        assert not torch.equal(found[name], model.parameters()[name])


def test_uce_puts_the_anchors_keys_and_values_in_the_concepts_place(model):
    """Without retained prompts and with a weak tie to the base, the concept's states are answered
    as the anchor's were."""
    task = Task(model, [replace(CONCEPT, templates=("a {}",), retain=("a moon",))])
    config = replace(get_method("uce").config, following=False, retain_scale=0.0, ridge=1e-6)
    for name, value in get_method("uce").edit(task, config).values.items():
        heart, mushroom = (
            task.cond([f"a {word}"]).embeddings[0, 2] for word in ("heart", "mushroom")
        )
        old = model.parameters()[name].detach()
        assert torch.allclose(value @ heart, old @ mushroom, atol=1e-3)


def test_uce_edits_projections_of_text_states_alone(model):
    with pytest.raises(ErasureError, match="is not applied to text states.*use scope text_in"):
        get_method("uce").edit(
            Task(model, [CONCEPT]), replace(get_method("uce").config, scope="xattn")
        )
    sd3 = wrap(FAMILIES["sd3"](), "sd3")
    with pytest.raises(ErasureError, match="is not applied to text states"):
        get_method("uce").edit(
            Task(sd3, [CONCEPT]), replace(get_method("uce").config, scope="xattn_kv")
        )


@needs_fake_gpu
@pytest.mark.parametrize(("device", "lies"), [("mps", "cpu"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_float64_is_made_where_there_is_any(device, lies):
    with FakeTensorMode():
        made = exact(torch.ones(2, device=device, requires_grad=True))
        assert (made.dtype, made.device.type) == (torch.float64, lies)
        assert not made.requires_grad
