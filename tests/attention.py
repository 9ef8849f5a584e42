"""diffusers' own attention scores, kept: what methods that look at attention are compared with."""


class Keeping:
    """An attention that keeps its scores, as diffusers computes them."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        scores = attn.get_attention_scores(query, key)
        self.kept.append(scores)
        return attn.to_out[0](attn.batch_to_head_dim(scores @ value))


def keeping(unet):
    """The list that the scores of each pass are added to, in the order of the layers, each
    (heads, positions, tokens) for one row."""
    kept, own = [], dict(unet.attn_processors)
    unet.set_attn_processor(
        {name: Keeping(kept) if "attn2" in name else one for name, one in own.items()}
    )
    return kept
