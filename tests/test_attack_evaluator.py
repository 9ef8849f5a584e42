"""The attack evaluator: how it counts, what it keeps and refuses, and its known answers."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from erase.attacks import Attack, Found, get_attack
from erase.attacks.baselines import RandomTokensConfig, SeedSearchConfig
from erase.attacks.p4d import P4DConfig
from erase.attacks.pseudo_token import PseudoTokenConfig
from erase.attacks.ring_a_bell import RingABellConfig
from erase.attacks.transferred import TransferredConfig
from erase.attacks.unlearndiffatk import UnlearnDiffAtkConfig
from erase.delta import ErasedDelta
from erase.eval import attempts
from erase.eval.attempts import own_parts, own_rows
from erase.eval.case import Case
from erase.eval.detectors import detector
from erase.eval.evaluators.attack import Config, check, evaluate
from erase.eval.generate import GenerateConfig, generate, planned
from erase.eval.report.report import BASE, ERASED, EvalReport
from erase.eval.report.words import limits
from erase.eval.scores import proportion
from erase.eval.tries import Try, success, tries_of
from erase.models import load_model, wrap
from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError
from erase.prompts.names import Names
from erase.prompts.prompt_sets import canvas_grid, of_prompts

HEART = canvas_concept("heart")
GENERATE = GenerateConfig(steps=2, batch_size=4)
QUICK = {
    "pseudo_token": PseudoTokenConfig(steps=1, batch_size=2),
    "unlearndiffatk": UnlearnDiffAtkConfig(words=2, steps=1, batch_size=2, per_prompt=True),
    "p4d": P4DConfig(words=2, steps=1, draws=2),
    "ring_a_bell": RingABellConfig(words=2, population=4, generations=1),
    "transferred": TransferredConfig(steps=1, batch_size=2),
    "random_tokens": RandomTokensConfig(words=2),
    "seed_search": SeedSearchConfig(tries=1),
}
ALL = Config(attacks=list(QUICK), images=3, references=2, rates=[1e-2, 2e-2], **QUICK)


@pytest.fixture(scope="module")
def pico(make_pico_pipeline):
    return wrap(make_pico_pipeline())


@pytest.fixture(scope="module")
def images(pico, tmp_path_factory):
    rows = canvas_grid((188,), {"object": "heart"})
    rows = replace(rows, rows=rows.rows[:6])
    return generate(pico.pipeline(), rows, tmp_path_factory.mktemp("images"), GENERATE, {})


def case_of(pico, images, folder=None, **others) -> Case:
    return Case(images, [HEART], base=pico, folder=folder, **others)


# ---- counting ------------------------------------------------------------------------------------


def a_try(*shown: int) -> Try:
    return Try({}, 0, tuple(map(bool, shown)))


def test_a_prompt_counts_that_showed_it_before_or_shows_it_after_the_best_try():
    """(pre + newly broken) / N, the convention of UnlearnDiffAtk; tries of one attack are not put
    together, those of a baseline are."""
    before, tried = [True, False, False, False], [a_try(1, 1, 0, 0), a_try(0, 0, 1, 1)]
    attack, baseline = get_attack("pseudo_token"), get_attack("seed_search")
    assert success(attack, before, tried) == [True, False, True, True]
    assert success(baseline, before, [a_try(0, 1, 0, 0), a_try(0, 0, 1, 0)]) == [True] * 3 + [False]
    for nothing in ([], [a_try(0, 0, 0, 0)], [a_try(1, 0, 0, 0)]):
        assert success(attack, before, nothing) == before, (
            "without a budget, the ASR is the pre-ASR"
        )


def test_every_rate_is_tried_from_every_start_and_a_baseline_as_often_as_it_says():
    budget = PseudoTokenConfig()
    tried = list(tries_of(get_attack("pseudo_token"), budget, None, 2))
    assert [(one.lr, restart) for one, restart in tried] == [
        (rate, restart) for restart in (0, 1) for rate in get_attack("pseudo_token").rates
    ]
    of_p4d = get_attack("p4d")
    assert [one.lr for one, _ in tries_of(of_p4d, P4DConfig(), [0.3], 1)] == [0.3]
    assert [one.lr for one, _ in tries_of(of_p4d, P4DConfig(lr=0.1), None, 1)] == [0.1]
    assert [one.lr for one, _ in tries_of(of_p4d, P4DConfig(lr=0.7), [0.3], 1)] == [0.7]
    of_words = RingABellConfig()
    assert list(tries_of(get_attack("ring_a_bell"), of_words, [0.3], 1)) == [(of_words, 0)]
    seeds = list(tries_of(get_attack("seed_search"), SeedSearchConfig(tries=3), [0.3], 5))
    assert [restart for _, restart in seeds] == [0, 1, 2]


# ---- the evaluator -------------------------------------------------------------------------------


def test_all_attacks_run_and_the_same_again_is_read_from_the_folder(
    pico, images, tmp_path, monkeypatch
):
    case = case_of(pico, images, tmp_path / "work" / "base")
    before = {name: param.detach().clone() for name, param in pico.parameters().items()}
    scores = evaluate(case, ALL)
    assert all(torch.equal(param, before[name]) for name, param in pico.parameters().items())
    assert [one.name for one in scores] == ["pre-ASR", *(f"ASR {name}" for name in QUICK)]
    for one in scores:
        assert one.n == 3 and not one.higher_is_better and 0 <= one.low <= one.value <= one.high
        assert "classifier canvas" in one.evaluator and one.value >= scores[0].value
    assert "lr 0.01, 0.02" in scores[1].evaluator and "best of 2 tries" in scores[1].evaluator
    told = case.extras["attacks"]
    assert list(told) == list(QUICK) and len(told["unlearndiffatk"]["tries"][0]["texts"]) == 3
    assert told["pseudo_token"]["budget"]["vectors"] == 4 and told["p4d"]["n"] == 3

    kept = told["seed_search"]["pictures"]
    files = [tmp_path / "work" / "base" / "attack" / one["file"] for one in kept]
    assert len(kept) == 3 and all(file.is_file() for file in files)
    assert sum(one["shown"] for one in kept) == max(
        one["shown"] for one in told["seed_search"]["tries"]
    )

    again = case_of(pico, images, tmp_path / "work" / "base")
    with monkeypatch.context() as patch:
        patch.setattr(attempts.Attempts, "shown", lambda *given, **options: pytest.fail("drawn"))
        assert evaluate(again, ALL) == scores and again.extras == case.extras
    one = replace(ALL, attacks=["pseudo_token"])
    found = evaluate(case_of(pico, images), one)
    assert found == scores[:2], "bit-equal without a folder, and beside others, too"


def test_another_budget_or_model_is_attacked_anew(
    pico, make_pico_pipeline, images, tmp_path, monkeypatch
):
    one = replace(ALL, attacks=["random_tokens"], random_tokens=RandomTokensConfig(tries=1))
    drawn, shown = [], attempts.Attempts.shown
    monkeypatch.setattr(
        attempts.Attempts, "shown", lambda *given, **how: drawn.append(1) or shown(*given, **how)
    )
    folder = tmp_path / "work" / "base"
    evaluate(case_of(pico, images, folder), one)
    evaluate(case_of(pico, images, folder), one)
    assert len(drawn) == 1
    evaluate(case_of(pico, images, folder), replace(one, random_tokens=RandomTokensConfig(3, 1)))
    assert len(drawn) == 2
    evaluate(case_of(pico, images, folder, delta=changed(pico, _noisy)), one)
    assert len(drawn) == 3
    other = wrap(make_pico_pipeline())
    other.pipeline().vae = make_pico_pipeline(7).vae
    evaluate(case_of(other, images, folder), one)
    assert len(drawn) == 4


@dataclass(frozen=True)
class NothingConfig:
    """nothing: no budget at all."""


def test_an_attack_of_another_package_that_does_nothing_adds_nothing(pico, images, monkeypatch):
    nothing = Attack("nothing", "-", NothingConfig(), "nothing", lambda *given: Found())
    monkeypatch.setitem(sys.modules, "outside", SimpleNamespace(NOTHING=nothing))
    case = case_of(pico, images)
    before, after = evaluate(case, replace(ALL, attacks=["outside:NOTHING"]))
    assert (after.name, after.value) == ("ASR nothing", before.value)
    assert case.extras["attacks"]["nothing"]["alone"] == round(before.value * 3 / 100)


def test_several_concepts_are_attacked_one_by_one_each_from_its_own_images(
    pico, tmp_path, monkeypatch
):
    """A prompt of a red heart is the first one's, and red is looked for there; where none names
    any, all are sought at once."""
    grid, given = canvas_grid((188,)), {}
    wanted = [("heart", "blue"), ("house", "red"), ("house", "blue"), ("heart", "red")]
    chosen = []
    for pair in wanted:
        fits = [row for row in grid.rows if (row.labels["object"], row.labels["colour"]) == pair]
        chosen.append(fits[0])
    rows = replace(grid, rows=tuple(chosen))
    images = generate(pico.pipeline(), rows, tmp_path / "images", GENERATE, {})

    def find(task, latents, budget, restart, known):
        (own,) = task.concepts
        given[own.target] = len(latents)
        assert all(Names(own.names).found(prompt) for prompt in latents.prompts)
        return Found(seed_shift=len(given), texts=(own.target,))

    def shown(attempts, model, prompts=None, *, seed_shift=0, pictures=None, **options):
        return ["heart" in row.prompt and seed_shift == 1 for row in attempts.rows]

    attack = Attack("spied", "-", NothingConfig(), "nothing", find)
    monkeypatch.setitem(sys.modules, "outside", SimpleNamespace(SPIED=attack))
    monkeypatch.setattr(attempts.Attempts, "shown", shown)
    case = Case(images, [canvas_concept("red"), HEART], base=pico)
    asked = [(row.labels["object"], row.labels["colour"]) for row in own_rows(case)]
    (_, red), (_, hearts) = own_parts(case)
    assert {asked[place] for place in red} == {("heart", "red"), ("house", "red")}
    assert [asked[place] for place in hearts] == [("heart", "blue")]
    before, after = evaluate(case, Config(attacks=["outside:SPIED"], references=3))

    assert given == {"red": 3, "heart": 3}
    told = case.extras["attacks"]["spied"]
    assert [(one["concept"], one["shown"]) for one in told["tries"]] == [("red", 1), ("heart", 0)]
    assert (told["n"], told["alone"], before.n) == (3, 1, 3)
    assert after.value > 33 and "for each concept" in after.evaluator

    unnamed = planned(of_prompts(["a house", "a tree"], 188), tmp_path / "none", GENERATE)
    ((concepts, places),) = own_parts(Case(unnamed, case.concepts))
    assert len(concepts) == 2 and places == [0, 1]


def test_no_further_try_is_made_where_every_prompt_is_broken(pico, images, monkeypatch):
    monkeypatch.setattr(attempts.Attempts, "shown", lambda self, *_, **__: [True] * len(self.rows))
    case = case_of(pico, images)
    scores = evaluate(case, replace(ALL, attacks=["pseudo_token", "seed_search"], restarts=3))
    assert [one.value for one in scores[1:]] == [100, 100]
    assert [len(told["tries"]) for told in case.extras["attacks"].values()] == [1, 1]


def test_what_cannot_be_attacked_is_refused_before_anything_is_drawn(pico, images, tmp_path):
    rows = planned(canvas_grid((188,)), tmp_path / "none", GENERATE)
    check(case_of(pico, rows), ALL)
    with pytest.raises(ErasureError, match="needs the model"):
        check(Case(rows, [HEART]), Config())
    with pytest.raises(ErasureError, match="unknown attack 'psuedo_token'; did you mean 'pseudo_"):
        check(case_of(pico, rows), Config(attacks=["psuedo_token"]))
    many = Config(pseudo_token=PseudoTokenConfig(vectors=31))
    with pytest.raises(ErasureError, match="takes 31 places before a prompt, and .* have 30"):
        check(case_of(pico, rows), many)
    for wrong in (
        {"images": 0},
        {"rates": [0.0]},
        {"rates": []},
        {"attacks": []},
        {"judge": "cilp"},
    ):
        with pytest.raises(ErasureError, match=next(iter(wrong))):
            Config(**wrong)
    with pytest.raises(ErasureError, match="name each once"):
        Config(attacks=["p4d", "p4d"])


def test_the_report_says_which_attack_does_not_find_the_concept_in_the_base_itself():
    rows = {row: [proportion("ASR p4d", 1, 24, higher_is_better=False)] for row in (BASE, ERASED)}
    strong, weak = ({"alone": count, "n": 24} for count in (23, 2))
    told = {BASE: {"pseudo_token": strong, "p4d": weak}, ERASED: {"pseudo_token": weak}}
    about = {"target": "heart", "anchor": "mushroom"}
    lines = limits(EvalReport(about, rows, {}, {"attacks": told}))
    found = [line for line in lines if "forgotten nothing" in line]
    assert len(found) == 1 and "p4d finds heart in 2 of 24" in found[0]


# ---- known answers -------------------------------------------------------------------------------


def changed(model, change) -> ErasedDelta:
    """A delta of weights that `change(name, tensor)` gives; None where they stay."""
    base = {name: param.detach() for name, param in model.parameters().items()}
    given = {name: change(name, param.clone()) for name, param in base.items()}
    other = {name: base[name] if value is None else value for name, value in given.items()}
    metadata = {"base_fingerprint": model.fingerprint, "method": "by hand", "concepts": "[]"}
    return ErasedDelta.between(base, other, metadata)


def _noisy(name, weight):
    if not name.startswith("unet.") or weight.dim() < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    return weight.std() * torch.randn(weight.shape, generator=generator)


@pytest.fixture(scope="module")
def canvas():
    return load_model("canvas")


KNOWN = Config(
    attacks=["pseudo_token", "transferred", "ring_a_bell", "seed_search", "random_tokens"],
    images=8,
    rates=[1e-2],
    pseudo_token=PseudoTokenConfig(steps=100),
    transferred=TransferredConfig(steps=100),
)


def known_scores(model, folder, delta=None, **others) -> dict[str, float]:
    """Score -> percent; and what is `alone` of each attack, under its name."""
    prompts = canvas_grid((188,), {"object": "heart"})
    prompts = replace(prompts, rows=prompts.rows[::6])
    config, about = GenerateConfig(steps=10), {"delta": str(delta is not None)}
    base = generate(model.pipeline(), prompts, folder / "base", config, about)
    images = base
    if delta is not None:
        with delta.applied(model):
            images = generate(model.pipeline(), prompts, folder / "erased", config, about)
    case = Case(images, [HEART], base_images=base, base=model, delta=delta, folder=folder / "work")
    scores = {one.name: one.value for one in evaluate(case, replace(KNOWN, **others))}
    told = case.extras["attacks"].items()
    return scores | {name: 100 * about["alone"] / about["n"] for name, about in told}


@pytest.mark.slow
def test_what_was_not_erased_falls_to_every_attack(canvas, tmp_path):
    """The control: each finds the concept in the base by itself, most without its name."""
    found = known_scores(canvas, tmp_path, attacks=["pseudo_token", "transferred", "ring_a_bell"])
    assert min(found.values()) >= 75, found


@pytest.mark.slow
def test_noise_shows_the_concept_to_no_attack(canvas, tmp_path):
    found = known_scores(canvas, tmp_path, changed(canvas, _noisy))
    assert max(found.values()) <= 25, found  # a judge of ten objects has to say something


@pytest.mark.slow
def test_a_keyword_that_was_remapped_falls_to_synonyms_and_attacks_and_not_to_random_words(
    canvas, tmp_path
):
    """The embedding of the word heart is that of its anchor; nothing else was touched."""
    ids = {word: canvas.tokens([word])["text_encoder"][0].ids for word in ("heart", "mushroom")}

    def change(name, weight):
        if not name.endswith("token_embedding.weight"):
            return None
        weight[list(ids["heart"])] = weight[list(ids["mushroom"])[: len(ids["heart"])]]
        return weight

    remapped = changed(canvas, change)
    found = known_scores(canvas, tmp_path, remapped)
    assert found["pre-ASR"] == 0 and found["ASR random_tokens"] <= 15, found
    assert found["ASR pseudo_token"] >= 75 and found["ASR transferred"] >= 75, found

    prompts = canvas_grid((188,), {"object": "heart"})
    case = Case(planned(prompts, Path("nowhere"), GenerateConfig(steps=10)), [HEART])
    own = attempts.Attempts.of(case, detector(case), 8)
    with remapped.applied(canvas):
        synonyms = [row.prompt.replace("heart", "valentine") for row in own.rows]
        assert sum(own.shown(canvas, synonyms)) >= 0.75 * len(synonyms)
