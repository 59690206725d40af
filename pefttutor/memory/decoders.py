"""The forward pass of decoders on a `Tape`: Llama, Mistral and Qwen; GPT-2; BLOOM.

Every function walks the modules of a real model (on the meta device), so that a layer that a method has put in the
place of another is met where it stands.
"""

from __future__ import annotations

from typing import Any

from pefttutor.memory.attention import window
from pefttutor.memory.paper import INDEX, Paper
from pefttutor.memory.step import Step, opened
from pefttutor.memory.tape import Tape

__all__ = ["bloom", "gpt2", "llama"]

# ---- Llama, Mistral, Qwen: RMSNorm, rotary positions, grouped queries, gated feed-forward


def llama(tape: Tape, model: Any, step: Step, x: Paper | None = None) -> Paper:
    """The body of Llama, Mistral and Qwen, written onto the tape; with `x`, from what goes into the blocks on.

    Shapes: → (batch · sequence, d), the last hidden state.
    """
    body, config = model.base_model, model.config
    heads, head_dim = config.num_attention_heads, body.layers[0].self_attn.head_dim
    groups, dropout = config.num_key_value_heads, config.attention_dropout
    rotary = Paper(step.sequence_length, 2 * head_dim, body.norm.weight.element_size(), False)  # cos and sin

    def block(tape: Tape, layer: Any, x: Paper) -> Paper:
        attn, h = layer.self_attn, tape.call(layer.input_layernorm, x, "norms")
        limit = window(config, attn.layer_idx)
        attention = step.heads(heads, kv=groups, dropout=dropout, float_softmax=True, window=limit)
        q, k, v = (tape.call(part, h, "attention") for part in (attn.q_proj, attn.k_proj, attn.v_proj))
        if hasattr(attn, "q_norm"):  # Qwen3: a norm for each head
            q, k = _head_norm(tape, attn.q_norm, q, head_dim), _head_norm(tape, attn.k_norm, k, head_dim)
        for part in (q, k):
            tape.mul(part, rotary, "attention")  # q · cos + rotate(q) · sin
        h = tape.call(attn.o_proj, attention(tape, q.like(), k.like(), v), "attention")
        x = x.like(h)
        h = tape.call(layer.post_attention_layernorm, x, "norms")
        gate = tape.activation(config.hidden_act, tape.call(layer.mlp.gate_proj, h, "ffn"), "ffn")
        h = tape.mul(gate, tape.call(layer.mlp.up_proj, h, "ffn"), "ffn")
        return x.like(tape.call(layer.mlp.down_proj, h, "ffn"))

    if x is None:
        x = tape.call(body.embed_tokens, step.ids(step.sequence_length), "embeddings")
        x = opened(tape, model, x, body)
    for layer in body.layers:
        x = tape.block(block, layer, x)
    return tape.call(body.norm, x, "norms")


def _head_norm(tape: Tape, norm: Any, x: Paper, head_dim: int) -> Paper:
    narrow = x.view(rows=x.numel // head_dim, width=head_dim)
    return tape.call(norm, narrow, "norms").view(rows=x.rows, width=x.width)


# ---- GPT-2 and BLOOM: LayerNorm, one matrix for query, key and value


def gpt2(tape: Tape, model: Any, step: Step, x: Paper | None = None) -> Paper:
    """The body of GPT-2, written onto the tape; with `x`, from what goes into the blocks on.

    Shapes: → (batch · sequence, d), the last hidden state.
    """
    body, config = model.base_model, model.config
    attention = step.heads(config.n_head, dropout=config.attn_pdrop)
    width = config.n_embd

    def block(tape: Tape, layer: Any, x: Paper, mask: Paper | None) -> Paper:
        qkv = tape.call(layer.attn.c_attn, tape.call(layer.ln_1, x, "norms"), "attention")
        q, k, v = (qkv.view(width=width) for _ in range(3))
        if config.use_cache and not layer.gradient_checkpointing:
            k, v = k.like(), v.like()  # the cache copies them, also in training
        h = tape.call(layer.attn.c_proj, attention(tape, q, k, v), "attention")
        x = x.like(tape.dropout(h, config.resid_pdrop))
        h = tape.call(layer.mlp.c_fc, tape.call(layer.ln_2, x, "norms"), "ffn")
        h = tape.call(layer.mlp.c_proj, tape.activation(config.activation_function, h, "ffn"), "ffn")
        return x.like(tape.dropout(h, config.resid_pdrop))

    if x is None:
        x = opened(tape, model, tape.call(body.wte, step.ids(step.sequence_length), "embeddings"), body)
        x = x.like(tape.call(body.wpe, Paper(step.sequence_length, 1, INDEX, False), "embeddings"))
        x = tape.dropout(x, config.embd_pdrop)
    mask = step.mask(step.sequence_length, step.sequence_length, x.itemsize, causal=True)
    for layer in body.h:
        x = tape.block(block, layer, x, mask=mask)
    return tape.call(body.ln_f, x, "norms")


def bloom(tape: Tape, model: Any, step: Step, x: Paper | None = None) -> Paper:
    """The body of BLOOM, written onto the tape; with `x`, from what goes into the blocks on.

    Shapes: → (batch · sequence, d), the last hidden state.
    """
    body, config = model.base_model, model.config
    attention = step.heads(config.n_head, dropout=config.attention_dropout, float_softmax=True)

    def block(tape: Tape, layer: Any, x: Paper) -> Paper:
        h = tape.call(layer.input_layernorm, x, "norms")
        residual = h if config.apply_residual_connection_post_layernorm else x
        qkv = tape.call(layer.self_attention.query_key_value, h, "attention")
        q, k, v = (qkv.view(width=config.hidden_size) for _ in range(3))
        h = tape.call(layer.self_attention.dense, attention(tape, q, k, v), "attention")
        x = residual.like(tape.dropout(h, config.hidden_dropout))
        h = tape.call(layer.post_attention_layernorm, x, "norms")
        residual = h if config.apply_residual_connection_post_layernorm else x
        h = tape.activation("bloom_gelu", tape.call(layer.mlp.dense_h_to_4h, h, "ffn"), "ffn")
        h = tape.call(layer.mlp.dense_4h_to_h, h, "ffn")
        return residual.like(tape.dropout(h, config.hidden_dropout))

    if x is None:
        x = tape.call(body.word_embeddings, step.ids(step.sequence_length), "embeddings")
        x = tape.call(body.word_embeddings_layernorm, opened(tape, model, x, body), "norms")
    for layer in body.h:
        x = tape.block(block, layer, x)
    return tape.call(body.ln_f, x, "norms")
