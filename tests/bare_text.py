"""A CLIP text encoder written out, for literal copies of the equations of methods that train
one."""

import re

import torch

from erase.models.naming import named_weights
from tests.bare import LR, STEPS


def spoken(encoder, ids, prefix=None):
    """Text states, and what the last self-attention says before it is added to the rest.

    Args:
        encoder: a `CLIPTextModel`.
        ids: of whole prompts, shape (n, tokens).
        prefix: embeddings in the places behind the begin token, shape (n, k, dim).
    """
    p = {name.split("text_model.")[-1]: value for name, value in encoder.named_parameters()}
    x, tokens = p["embeddings.token_embedding.weight"][ids], ids.shape[1]
    if prefix is not None:
        x = torch.cat([x[:, :1], prefix, x[:, 1 + prefix.shape[1] :]], dim=1)
    x = x + p["embeddings.position_embedding.weight"][:tokens]
    ahead = torch.ones(tokens, tokens).triu(1).bool()

    def linear(name, inputs):
        return inputs @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, inputs):
        shift = inputs - inputs.mean(-1, keepdim=True)
        scaled = shift / (shift.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    heads, said = encoder.config.num_attention_heads, None
    for layer in range(encoder.config.num_hidden_layers):
        at = f"encoder.layers.{layer}"
        inside = norm(f"{at}.layer_norm1", x)
        q, k, v = (
            linear(f"{at}.self_attn.{one}_proj", inside).unflatten(-1, (heads, -1)).transpose(1, 2)
            for one in "qkv"
        )
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(ahead, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        said = linear(f"{at}.self_attn.out_proj", mixed)
        x = x + said
        inside = linear(f"{at}.mlp.fc1", norm(f"{at}.layer_norm2", x))
        x = x + linear(f"{at}.mlp.fc2", inside * torch.sigmoid(1.702 * inside))
    return norm("final_layer_norm", x), said


def ids_of(pipeline, prompts):
    """Ids of whole prompts, begin, end and padding included."""
    length = pipeline.tokenizer.model_max_length
    texts = pipeline.tokenizer(prompts, padding="max_length", max_length=length)
    return torch.tensor(texts.input_ids)


def train(encoder, pattern, loss):
    """SGD of `loss(step)` over the encoder's parameters whose names match the pattern."""
    chosen = {f"text_encoder.{name}": p for name, p in named_weights(encoder)}
    chosen = {name: p for name, p in chosen.items() if re.search(pattern, name)}
    for step in range(STEPS):
        slopes = torch.autograd.grad(loss(step), list(chosen.values()))
        with torch.no_grad():
            for p, slope in zip(chosen.values(), slopes, strict=True):
                p -= LR * slope
    return {name: p.detach() for name, p in chosen.items()}
