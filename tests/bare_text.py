"""A CLIP text encoder written out, for literal copies of the equations of methods that train
one, or put embeddings into it."""

import re

import torch

from erase.attacks import RESTART
from tests.bare import FORGET, LR, STEPS, Bare, drawn, mean


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
    chosen = {f"text_encoder.{name}": p for name, p in encoder.named_parameters()}
    chosen = {name: p for name, p in chosen.items() if re.search(pattern, name)}
    for step in range(STEPS):
        slopes = torch.autograd.grad(loss(step), list(chosen.values()))
        with torch.no_grad():
            for p, slope in zip(chosen.values(), slopes, strict=True):
                p -= LR * slope
    return {name: p.detach() for name, p in chosen.items()}


class BareText(Bare):
    """The bare pipeline row by row, under text states; a prompt is a function of a row's number
    that gives its states."""

    def states(self, texts, found=None):
        holders = "a " * len(found) if found is not None else ""
        ids = ids_of(self.pipeline, [holders + text for text in texts])
        prefix = None if found is None else found[None].expand(len(ids), -1, -1)
        return spoken(self.pipeline.text_encoder, ids, prefix)[0]

    def seen(self, unet, row, states):
        latent, noise, t, _ = row
        noisy = self.schedule.add_noise(latent[None], noise[None], t[None])
        return unet(noisy, t[None], states[None]).sample[0]

    def descend(self, loss, steps, lr):
        """SGD of `loss(step)` over the cross-attention."""
        for step in range(steps):
            params = [p for name, p in self.unet.named_parameters() if "attn2" in name]
            slopes = torch.autograd.grad(loss(step), [p.requires_grad_(True) for p in params])
            with torch.no_grad():
                for p, slope in zip(params, slopes, strict=True):
                    p -= lr * slope

    def found_again(self, restart, unnamed, vectors):
        """Textual inversion on the model as it is: two steps of Adam at 0.05, by so many embeddings
        before these prompts of the forget rows."""
        seed = -RESTART * (1 + restart)
        table = self.pipeline.text_encoder.get_input_embeddings().weight.detach()
        start = torch.Generator().manual_seed(seed)
        found = table[torch.randint(len(table), (vectors,), generator=start)]
        found = found.clone().requires_grad_()
        adam = torch.optim.Adam([found], lr=0.05)
        for step in range(2):
            states = self.states(unnamed, found)
            errors = [
                (self.seen(self.unet, row, states[row[3]]) - row[1]).square().mean()
                for row in drawn(FORGET, step, seed)
            ]
            (found.grad,) = torch.autograd.grad(mean(errors), found)
            adam.step()
        return found.detach()
