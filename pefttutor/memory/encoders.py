"""The forward pass of BERT, ViT, and the encoder-decoders T5 and mT5 on a `Tape` (see `decoders`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pefttutor.memory.attention import Attention
from pefttutor.memory.paper import INDEX, Paper
from pefttutor.memory.step import Step, opened
from pefttutor.memory.tape import Tape

__all__ = ["bert", "t5", "vit"]

# ---- BERT and ViT: encoders


def bert(tape: Tape, model: Any, step: Step, x: Paper | None = None) -> Paper:
    """The body of BERT without its pooler, written onto the tape; with `x`, from what goes into the blocks on.

    Shapes: → (batch · sequence, d), the last hidden state.
    """
    body, config = model.base_model, model.config
    attention = step.heads(
        config.num_attention_heads, dropout=config.attention_probs_dropout_prob, causal=False
    )
    p = config.hidden_dropout_prob

    def block(tape: Tape, layer: Any, x: Paper, mask: Paper | None) -> Paper:
        inner, out = layer.attention.self, layer.attention.output
        q, k, v = (tape.call(part, x, "attention") for part in (inner.query, inner.key, inner.value))
        h = tape.dropout(tape.call(out.dense, attention(tape, q, k, v), "attention"), p)
        x = tape.call(out.LayerNorm, x.like(h), "norms")
        h = tape.activation(config.hidden_act, tape.call(layer.intermediate.dense, x, "ffn"), "ffn")
        h = tape.dropout(tape.call(layer.output.dense, h, "ffn"), p)
        return tape.call(layer.output.LayerNorm, x.like(h), "norms")

    if x is None:
        e, kinds = body.embeddings, Paper(step.sequence_length, 1, INDEX, False)
        positions = kinds.like(itemsize=0)  # a buffer, which exists anyway
        x = tape.call(e.word_embeddings, step.ids(step.sequence_length), "embeddings")
        x = x.like(tape.call(e.token_type_embeddings, kinds, "embeddings"))
        x = x.like(tape.call(e.position_embeddings, positions, "embeddings"))
        x = tape.dropout(tape.call(e.LayerNorm, opened(tape, model, x, body), "norms"), p)
    mask = step.mask(step.sequence_length, step.sequence_length + step.prefix, x.itemsize)
    for layer in body.encoder.layer:
        x = tape.block(block, layer, x, mask=mask)
    return x


def vit(tape: Tape, model: Any, step: Step, x: Paper | None = None) -> Paper:
    """The body of a vision transformer, written onto the tape; its tokens are a picture's patches and one more. With
    `x`, from what goes into the blocks on.

    Shapes: → (batch · (patches + 1), d), the last hidden state.
    """
    body, config = model.base_model, model.config
    e, conv = body.embeddings, body.embeddings.patch_embeddings.projection
    patches = e.patch_embeddings.num_patches
    attention = replace(step, padding=False).heads(  # pictures are of one size
        config.num_attention_heads,
        dropout=config.attention_probs_dropout_prob,
        float_softmax=True,
        length=patches + 1,
    )
    p = config.hidden_dropout_prob

    def block(tape: Tape, layer: Any, x: Paper) -> Paper:
        attn, h = layer.attention, tape.call(layer.layernorm_before, x, "norms")
        q, k, v = (tape.call(part, h, "attention") for part in (attn.q_proj, attn.k_proj, attn.v_proj))
        x = x.like(tape.dropout(tape.call(attn.o_proj, attention(tape, q, k, v), "attention"), p))
        h = tape.call(layer.mlp.fc1, tape.call(layer.layernorm_after, x, "norms"), "ffn")
        h = tape.call(layer.mlp.fc2, tape.activation(config.hidden_act, h, "ffn"), "ffn")
        return x.like(tape.dropout(h, p))

    if x is None:
        pixels = Paper(step.batch_size * patches, conv.weight[0].numel(), conv.weight.element_size(), False)
        x = opened(tape, model, tape.call(conv, pixels, "embeddings"))
        grad = tape.own(e, "embeddings") or x.grad
        x = tape.dropout(x.like(rows=step.batch_size * (patches + 1), grad=grad), p)
    for layer in body.layers:
        x = tape.block(block, layer, x)
    return tape.call(body.layernorm, x, "norms")


# ---- T5 and mT5: encoder and decoder


def t5(tape: Tape, model: Any, step: Step) -> Paper:
    """Encoder and decoder of T5 and mT5, written onto the tape.

    Padding is that of the text that is read, and a prefix stands before the one that is written.

    Shapes: → (batch · target, d), the decoder's last hidden state. Raises: ValueError for an encoder alone.
    """
    if not hasattr(model, "decoder"):
        raise ValueError(
            f"{type(model).__name__} has an encoder alone, and the estimator knows T5 with encoder and decoder: "
            "give a model of T5ForConditionalGeneration, or measure(step, model=model)"
        )
    n, m, config = step.sequence_length, step.target_length, model.config
    p, heads = config.dropout_rate, config.num_heads

    def attend(tape: Tape, layer: Any, x: Paper, states: Paper | None, attention: Attention) -> Paper:
        inner = layer.EncDecAttention if states else layer.SelfAttention
        h = tape.call(layer.layer_norm, x, "norms")
        q = tape.call(inner.q, h, "attention")
        k, v = (tape.call(part, states or h, "attention") for part in (inner.k, inner.v))
        return x.like(tape.dropout(tape.call(inner.o, attention(tape, q, k, v), "attention"), p))

    def feed_forward(tape: Tape, layer: Any, x: Paper) -> Paper:
        inner, h = layer.DenseReluDense, tape.call(layer.layer_norm, x, "norms")
        if config.is_gated_act:
            gate = tape.activation(config.dense_act_fn, tape.call(inner.wi_0, h, "ffn"), "ffn")
            h = tape.mul(gate, tape.call(inner.wi_1, h, "ffn"), "ffn")
        else:
            h = tape.activation(config.dense_act_fn, tape.call(inner.wi, h, "ffn"), "ffn")
        return x.like(tape.dropout(tape.call(inner.wo, tape.dropout(h, p), "ffn"), p))

    def stack(part: Any, length: int, states: Paper | None) -> Paper:
        saves_layers = part.block[0].gradient_checkpointing
        bias = tape.trains(*part.block[0].layer[0].SelfAttention.relative_attention_bias.parameters())
        own = replace(step, padding=step.padding and not states, prefix=step.prefix if states else 0)
        self_attention = own.heads(heads, length=length, dropout=p, bias=bias or saves_layers)
        cross_attention = step.heads(heads, length=length, keys=n, dropout=p, bias=saves_layers)
        x = tape.call(part.embed_tokens, step.ids(length), "embeddings")
        x = tape.dropout(opened(tape, model, x, part), p)

        def block(tape: Tape, layer: Any, x: Paper, states: Paper | None, **given: Paper | None) -> Paper:
            if bias and "own" not in given:  # the first layer makes it
                tape.save(Paper(length, length, INDEX, False), "embeddings")  # the bucket of each distance
            x = attend(tape, layer.layer[0], x, None, self_attention)
            if states:
                x = attend(tape, layer.layer[1], x, states, cross_attention)
            return feed_forward(tape, layer.layer[-1], x)

        masks = own.mask(length, length, x.itemsize, causal=bool(states)), step.mask(length, n, x.itemsize)
        given = {"states": states, "mask": masks[0], "cross_mask": masks[1] if states else None}
        biases = [Paper(heads * length, keys, x.itemsize, bias) for keys in (length + own.prefix, n)]
        passed_on = {"own": biases[0], "cross": biases[1] if states else None}  # the first layer's
        for i, layer in enumerate(part.block):
            x = tape.block(block, layer, x, **given, **(passed_on if i else {}))
        return tape.dropout(tape.call(part.final_layer_norm, x, "norms"), p)

    return stack(model.decoder, m, stack(model.encoder, n, None))
