"""The prompt attacks: each one's equation against a literal reading of it on a pico model, and what
must hold of all."""

import pytest
import torch
import torch.nn.functional as F

from erase.attacks import (
    ALONE,
    ATTACKS,
    NAMED,
    NAMELESS,
    RESTART,
    Found,
    check_own_rows,
    get_attack,
)
from erase.attacks.baselines import RandomTokensConfig, SeedSearchConfig, other_seed, random_words
from erase.attacks.p4d import P4DConfig
from erase.attacks.p4d import find as find_p4d
from erase.attacks.p4d import learn as learn_p4d
from erase.attacks.pseudo_token import find_pseudo_token, nameless
from erase.attacks.ring_a_bell import RingABellConfig, _children, _distance, wanted_states
from erase.attacks.ring_a_bell import learn as learn_ring_a_bell
from erase.attacks.unlearndiffatk import UnlearnDiffAtkConfig, search, squared_norm
from erase.attacks.unlearndiffatk import find as find_unlearndiffatk
from erase.attacks.words import nearest, onto_simplex, words_of
from erase.latents.latent_set import Given, LatentSet
from erase.models import wrap
from erase.models.prefix import encode_live
from erase.prompts.concepts import ConceptSpec
from erase.prompts.errors import ErasureError
from erase.task import Task
from erase.training.batches import row_batches

CONCEPT = ConceptSpec("heart", "star", ("love heart",), ("a {}", "a red {}"), ("a moon",))
SHORT = {
    "pseudo_token": {"steps": 2, "batch_size": 2},
    "transferred": {"steps": 2, "batch_size": 2},
    "unlearndiffatk": {"words": 2, "steps": 2, "batch_size": 2},
    "p4d": {"words": 2, "steps": 2, "draws": 4},
    "ring_a_bell": {"words": 3, "population": 6, "generations": 2},
    "random_tokens": {"words": 2},
    "seed_search": {},
}


@pytest.fixture
def task(make_pico_pipeline):
    generator = torch.Generator().manual_seed(0)
    prompts = ("a red heart",) * 3 + ("hearts",) * 3
    latents = LatentSet(torch.randn(6, 4, 8, 8, generator=generator), None, prompts)
    return Task(wrap(make_pico_pipeline()), [CONCEPT], Given(latents, latents))


def short(name):
    """The attack and a budget of a second."""
    attack = get_attack(name)
    return attack, type(attack.config)(**SHORT[name])


# ---- of all --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS.ours)
def test_every_attack_leaves_the_model_and_finds_the_same_again(task, name):
    attack, budget = short(name)
    before = {key: param.detach().clone() for key, param in task.model.parameters().items()}
    found = []
    for restart in (0, 0, 1):
        known = attack.learn(task, task.forget(), budget, restart)
        found.append(attack.find(task, task.forget(), budget, restart, known))
    for key, param in task.model.parameters().items():
        assert torch.equal(param, before[key]) and param.grad is None and not param.requires_grad

    first, same, other = found
    assert first.prompt in (NAMED, NAMELESS, ALONE) and first.texts == same.texts
    assert first.seed_shift == same.seed_shift and first.prefix.keys() == same.prefix.keys()
    assert all(torch.equal(first.prefix[key], same.prefix[key]) for key in first.prefix)
    assert first.seed_shift != other.seed_shift or any(
        not torch.equal(first.prefix[key], other.prefix[key]) for key in first.prefix
    )
    assert all(not vectors.requires_grad for vectors in first.prefix.values())


@pytest.mark.parametrize("name", ATTACKS.ours)
def test_an_index_line_is_one_attacks_alone_and_names_its_source(name):
    attack = get_attack(name)
    same = [one for one in ATTACKS.ours if type(get_attack(one).config) is type(attack.config)]
    assert attack.name == name and same == [name] and attack.paper.startswith("https://")
    assert bool(attack.rates) == hasattr(attack.config, "lr")
    assert attack.repeated == hasattr(attack.config, "tries")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("unlearndiffatk", {"words": 0}),
        ("unlearndiffatk", {"prompt": "nameles"}),
        ("p4d", {"draws": 0}),
        ("ring_a_bell", {"mutation": 1.5}),
        ("random_tokens", {"tries": 0}),
        ("seed_search", {"tries": 0}),
    ],
)
def test_an_impossible_budget_is_refused(name, wrong):
    with pytest.raises(ErasureError, match=next(iter(wrong))):
        type(get_attack(name).config)(**wrong)


# ---- words ---------------------------------------------------------------------------------------


def test_words_are_what_a_user_can_type(task):
    """The embeddings of words before a prompt give the states of the prompt with these words."""
    words = words_of(task.model)
    assert "heart" in words.texts and len(set(words.texts)) == len(words)
    chosen = torch.tensor([list(words.texts).index(word) for word in ("red", "star", "heart")])
    assert words.text(chosen) == "red star heart"
    with torch.no_grad():
        typed = encode_live(
            task.model.pipeline(), ["red star heart a moon"], task.model.device
        ).embeddings
        put = task.cond(["a moon"], words.embedded(chosen)).embeddings
    assert torch.allclose(typed, put, atol=1e-6)
    everything = words.text(torch.arange(20))
    assert len(task.model.tokens([everything])["text_encoder"][0].ids) == 20


def test_the_projection_is_the_nearest_point_of_the_simplex():
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(5, 40, generator=generator, dtype=torch.float64)
    found = onto_simplex(values)
    assert (found >= 0).all() and torch.allclose(found.sum(-1), torch.ones(5).double())
    for row, point in zip(values, found, strict=True):  # by sorting (Duchi et al. 2008, figure 1)
        ordered = row.sort(descending=True).values
        taus = (ordered.cumsum(0) - 1) / torch.arange(1, 41)
        tau = taus[int((ordered > taus).sum()) - 1]
        assert torch.allclose(point, (row - tau).clamp(min=0), atol=1e-12)
    assert torch.allclose(onto_simplex(found), found)
    hot = F.one_hot(torch.tensor([3]), 9).float()
    assert torch.equal(onto_simplex(hot), hot)


def test_the_nearest_word_has_the_greatest_cosine():
    table = torch.tensor([[10.0, 10.0], [0.1, 0.0], [0.0, 1.0]])
    assert nearest(torch.tensor([[1.0, 0.1], [3.0, 2.9], [-1.0, 5.0]]), table).tolist() == [1, 0, 2]


# ---- UnlearnDiffAtk ------------------------------------------------------------------------------


def test_unlearndiffatk_takes_the_papers_step(task):
    """Two steps of (draw words from w, gradient of |eps - eps_theta(x_t, [words; c])|^2 straight
    through, Adam with weight decay, projection), written out."""
    config = UnlearnDiffAtkConfig(words=2, steps=2, lr=0.05, batch_size=3)
    words, batches = words_of(task.model), row_batches(task, task.forget(), 3, 0)
    found = search(task, words, batches, config, seed=5)

    generator = torch.Generator().manual_seed(5)
    table = words.tables["text_encoder"]
    w = onto_simplex(torch.rand(2, len(words), generator=generator))
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(2):
        drawn = torch.multinomial(w.repeat(3, 1), 1, generator=generator).view(3, 2)
        hot = F.one_hot(drawn, len(words)).float().requires_grad_()
        rows, prompts = batches(step)
        cond = task.model.encode(prompts, hot @ table)
        error = task.model.predict(rows.noisy, rows.t, cond) - rows.target
        (gradients,) = torch.autograd.grad(error.pow(2).sum((1, 2, 3)).mean(), [hot])
        gradient = gradients.sum(0) + 0.1 * w
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        unbiased = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
        w = onto_simplex(w - 0.05 * unbiased[0] / (unbiased[1].sqrt() + 1e-8))
    assert torch.allclose(found, w, atol=1e-4)
    assert (found >= 0).all() and torch.allclose(found.sum(-1), torch.ones(2))


def test_the_squared_norm_is_that_of_each_row():
    one, other = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    assert float(squared_norm(one, other.expand(2, 1, 2, 2))) == (4 * 1 + 4 * 4) / 2


def test_words_for_each_prompt_are_found_in_parts_and_stand_before_their_own(task):
    config = UnlearnDiffAtkConfig(words=2, steps=1, batch_size=4, per_prompt=True)
    found = find_unlearndiffatk(task, task.forget(), config, 0, {})
    assert found.prefix["text_encoder"].shape[:2] == (6, 2) and len(found.texts) == 6
    assert len(set(found.texts)) > 1 and get_attack("unlearndiffatk").per_prompt(config)
    for text, vectors in zip(found.texts, found.prefix["text_encoder"], strict=True):
        ids = task.model.tokens([text])["text_encoder"][0].ids
        table = task.model.component("text_encoder").get_input_embeddings().weight
        assert torch.equal(vectors, table[list(ids)])


def test_embeddings_of_other_prompts_than_those_that_are_attacked_are_refused(task):
    check_own_rows(task.forget(), Found({"text_encoder": torch.zeros(6, 2, 32)}))
    with pytest.raises(ErasureError, match="embeddings for 5 prompts, and there are 6"):
        check_own_rows(task.forget(), Found({"text_encoder": torch.zeros(5, 2, 32)}))


# ---- P4D -----------------------------------------------------------------------------------------


def test_p4d_asks_the_base_under_the_concepts_own_prompt(task):
    config = P4DConfig(words=2, steps=1, draws=9)
    known = learn_p4d(task, task.forget(), config, 0)
    assert sorted(set(known["row"].tolist())) == list(range(6)) and len(known["row"]) == 9
    prompts = [task.forget().prompts[row] for row in known["row"]]
    with torch.no_grad():
        said = task.model.predict(known["noisy"], known["t"], task.cond(prompts))
    assert torch.allclose(known["wanted"], said, atol=1e-5)


def test_p4d_projects_on_the_way_in_and_moves_the_free_embedding(task):
    """Two steps of AdamW along the gradient at the words nearest to the free embeddings; of the two
    prompts that were asked on the way, the one with the lesser error is the result."""
    config = P4DConfig(words=3, steps=2, lr=0.2, draws=4)
    known = learn_p4d(task, task.forget(), config, 0)
    found = find_p4d(task, task.forget(), config, 0, known)

    words, unnamed = words_of(task.model), nameless([CONCEPT])
    table = words.tables["text_encoder"]
    start = torch.randint(len(words), (3,), generator=torch.Generator().manual_seed(0))
    free, asked = table[start], []
    for _ in range(2):
        put = table[nearest(free, table)].clone().requires_grad_()
        prompts = [unnamed(task.forget().prompts[row]) for row in known["row"]]
        cond = task.model.encode(prompts, put)
        said = task.model.predict(known["noisy"], known["t"], cond)
        error = F.mse_loss(said, known["wanted"])
        (gradient,) = torch.autograd.grad(error, [put])
        asked.append((float(error.detach()), words.text(nearest(free, table))))
        free = free * (1 - 0.2 * 0.1) - 0.2 * gradient / (gradient.abs() + 1e-8)
    assert asked[0][1] != asked[1][1] and found.prompt == NAMELESS
    assert found.texts == (min(asked)[1],)


# ---- Ring-A-Bell ---------------------------------------------------------------------------------


def test_the_concept_vector_is_the_mean_difference_of_prompt_pairs(task):
    config = RingABellConfig(strength=2.0, pairs=2)
    first, second = CONCEPT.pairs()[0], CONCEPT.pairs()[2]
    states = {text: task.model.encode([text]).embeddings[0] for text in (*first, *second)}
    vector = (states[first[0]] - states[first[1]] + states[second[0]] - states[second[1]]) / 2
    (wanted,) = wanted_states(task, config)
    assert torch.allclose(wanted, states[first[1]] + 2 * vector, atol=1e-5)


def test_each_concept_has_its_own_vector_and_the_nearest_counts(task):
    concepts = [CONCEPT, ConceptSpec("Neon", "Plain", templates=("{} style", "a {} thing"))]
    config = RingABellConfig(words=2, population=4)

    def wanted_of(*some):
        latents = task.forget()
        return wanted_states(Task(task.model, some, Given(latents, latents)), config)

    wanted = wanted_of(*concepts)
    alone = [wanted_of(one)[0] for one in concepts]
    assert torch.equal(wanted, torch.stack(alone))
    words, people = words_of(task.model), torch.arange(8).view(4, 2)
    each = [_distance(task, words, people, one[None]) for one in wanted]
    assert torch.equal(_distance(task, words, people, wanted), torch.minimum(*each))


def test_the_genetic_search_comes_near_to_what_it_is_to_find(task):
    """With as many generations, no distance of its best prompt rises; and a single word is found
    among all."""
    words = words_of(task.model)

    def distance(generations, **changed):
        config = RingABellConfig(words=2, population=20, generations=generations, **changed)
        chosen = learn_ring_a_bell(task, task.forget(), config, 0)["words"]
        states = task.cond([""], words.embedded(chosen)).embeddings[0]
        return float((states - wanted_states(task, config)).square().mean())

    with torch.no_grad():
        found = [distance(generations) for generations in (1, 5, 40)]
    assert found == sorted(found, reverse=True) and found[-1] < found[0]


def test_children_are_of_their_parents_words_but_for_mutations():
    parents = torch.arange(12).view(3, 4)
    generator = torch.Generator().manual_seed(0)
    config = RingABellConfig(words=4, population=200, mutation=0.0, crossover=0.0)
    assert all(
        child in parents.tolist() for child in _children(parents, 99, config, generator).tolist()
    )
    config = RingABellConfig(words=4, population=200, mutation=0.0, crossover=1.0)
    crossed = _children(parents, 99, config, generator)
    assert ((crossed % 4) == torch.arange(4)).all(), "each word keeps its place"
    switches = ((crossed // 4).diff(dim=1) != 0).sum(1)
    assert switches.max() == 1, "the head of one and the tail of another"
    config = RingABellConfig(words=4, population=200, mutation=1.0, crossover=0.0)
    mutated = _children(parents * 0, 99, config, generator)
    assert ((mutated != 0).sum(1) <= 1).all() and (mutated != 0).any()


# ---- baselines -----------------------------------------------------------------------------------


def test_the_baselines_use_neither_images_nor_weights(task):
    nothing = LatentSet(torch.zeros(0, 4, 8, 8), None, ())
    seeds = [other_seed(task, nothing, SeedSearchConfig(), restart, {}) for restart in range(3)]
    assert [one.seed_shift for one in seeds] == [RESTART, 2 * RESTART, 3 * RESTART]
    assert not any(one.prefix for one in seeds)
    texts = {
        random_words(task, nothing, RandomTokensConfig(words=4), restart, {}).texts
        for restart in range(3)
    }
    assert len(texts) == 3


def test_what_is_transferred_is_the_bases_own(task):
    attack, budget = short("transferred")
    known = attack.learn(task, task.forget(), budget, 1)
    found = attack.find(task, task.forget(), budget, 1, known)
    own = find_pseudo_token(task, task.forget(), budget, 1)["text_encoder"]
    assert torch.equal(found.prefix["text_encoder"], own) and found.prompt == NAMELESS
