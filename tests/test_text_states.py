"""Text states: from memory where nothing of them is trained; else live, with gradient, and behind
embeddings of no word."""

import pytest
import torch

from erase.latents.config import LatentConfig
from erase.models import wrap
from erase.models.pipelines import encode, text_encoders
from erase.prompts.canvas import canvas_concept
from erase.prompts.errors import ErasureError
from erase.task import Task
from tests.families import FAMILIES
from tests.flow_families import FLOWS

ALL = FAMILIES | FLOWS
pytestmark = pytest.mark.usefixtures("short_chat")

PROMPTS = ["a red heart", "", "a photo of a small blue house"]


@pytest.fixture(params=ALL)
def model(request):
    return wrap(ALL[request.param](), request.param)


@pytest.fixture
def pico(make_pico_pipeline):
    return wrap(make_pico_pipeline())


def trained(model):
    """Gradients on for the first text encoder; its parameters."""
    encoder = next(iter(text_encoders(model.pipeline()).values()))
    return list(encoder.requires_grad_(True).parameters())


def test_live_states_are_the_cached_ones_to_rounding_and_have_a_gradient(model):
    """Of every family, pooled states and zeros for the empty prompt included."""
    cached = encode(model.pipeline(), PROMPTS, model.device)
    params = trained(model)
    live = model.encode(PROMPTS)

    assert torch.allclose(live.embeddings, cached.embeddings, atol=1e-4)
    assert live.extras.keys() == cached.extras.keys()
    for name, pooled in cached.extras.items():
        assert torch.allclose(live.extras[name], pooled, atol=1e-4)
    # FLUX's CLIP says pooled states alone
    states = (live.embeddings, *live.extras.values())
    sum(state.square().sum() for state in states).backward()
    assert any(p.grad is not None and p.grad.any() for p in params)


def test_without_gradient_states_are_those_of_single_prompts_bit_for_bit(model):
    cached = encode(model.pipeline(), PROMPTS, model.device)
    trained(model)
    with torch.no_grad():
        found = model.encode(PROMPTS)
    assert torch.equal(found.embeddings, cached.embeddings)


def word_embeddings(model, word):
    """Of each text encoder, the embedding of a word that is one token."""
    pipeline, found = model.pipeline(), {}
    for name, encoder in text_encoders(pipeline).items():
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        (token,) = tokenizer(word, add_special_tokens=False).input_ids
        found[name] = encoder.get_input_embeddings().weight[[token]].detach().clone()
    return found


def test_a_prefix_of_a_words_embeddings_is_that_word(model):
    prefix = word_embeddings(model, "red")
    found = model.encode(["heart", "heart in a box"], prefix)
    asked = model.encode(["red heart", "red heart in a box"])

    assert torch.allclose(found.embeddings, asked.embeddings, atol=1e-4)
    for name, pooled in asked.extras.items():
        assert torch.allclose(found.extras[name], pooled, atol=1e-4)
    other = model.encode(["blue heart", "blue heart in a box"])
    assert not torch.allclose(found.embeddings, other.embeddings, atol=1e-3)


def test_a_prefix_takes_a_gradient_and_leaves_the_encoder_as_it_was(model):
    prefix = {
        name: rows.requires_grad_(True) for name, rows in word_embeddings(model, "red").items()
    }
    before = encode(model.pipeline(), PROMPTS, model.device)
    states = model.encode(["heart", "a house"], prefix)
    (states.embeddings.square().sum() + sum(e.sum() for e in states.extras.values())).backward()

    assert all(rows.grad.any() for rows in prefix.values())
    assert not any(p.grad is not None for p in model.parameters().values())
    assert torch.equal(
        encode(model.pipeline(), PROMPTS, model.device).embeddings, before.embeddings
    )


def test_a_prefix_that_does_not_fit_is_refused(pico):
    with pytest.raises(
        ErasureError, match="a prefix of width 7 for text_encoder, whose embeddings have 32"
    ):
        pico.encode(["heart"], torch.zeros(2, 7))
    with pytest.raises(
        ErasureError, match="a prefix for 'text_encoder_9', but the model's text encoders are"
    ):
        pico.encode(["heart"], {"text_encoder_9": torch.zeros(2, 32)})
    with pytest.raises(ErasureError, match="31 embeddings or words .* read, 30; take fewer"):
        pico.encode(["heart"], torch.zeros(31, 32))


def test_a_task_computes_each_prompt_once_until_an_encoder_is_trained(pico):
    task = Task(pico, [canvas_concept("heart")], LatentConfig())
    passes = []
    encoder = pico.component("text_encoder")
    encoder.register_forward_hook(lambda *_: passes.append(1))

    task.cond(["a moon", "a tree", "a moon"])
    again = task.cond(["a tree", "a moon"])
    assert len(passes) == 2 and not again.embeddings.requires_grad
    assert torch.equal(
        again.embeddings[1], encode(pico.pipeline(), ["a moon"], pico.device).embeddings[0]
    )

    encoder.requires_grad_(True)
    live = task.cond(["a tree", "a moon"])
    # one of `encode` above, one in one pass
    assert live.embeddings.requires_grad and len(passes) == 4
