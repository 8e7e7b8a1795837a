"""The sizes of tiny hosts: what each config field shrinks to, and what field names cannot tell.

Names, defaults and constraints are those of transformers 5.23; `hosts.tiny` applies them.
"""

from __future__ import annotations

from typing import Any

HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
ROTARY_DIM = 8
POSITIONS = 64
VOCABULARY = 128
#: Special tokens have ids from here on, the tokens of an example lie between `FIRST_TOKEN` and this.
SPECIAL = 112
FIRST_TOKEN = 8
#: Shorter than the example, so that sliding attention differs from full attention.
WINDOW = 5

#: Field name (a full match, first row that fits) -> tiny value. A field whose default is smaller keeps it.
RULES: tuple[tuple[str, int], ...] = (
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r".*_token_(id|index)|(mask|unk)_index", SPECIAL),
    (r"mamba_(n|num)_heads|n_mamba_heads", 8),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"mamba_d_state|(ssm_)?state_size", 8),
    (r"(mamba_)?chunk_size|attention_chunk_size|block_size|index_topk", 8),
    (r"n_groups|linear_num_key_heads", 2),
    (r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads", KV_HEADS),
    (
        r"(.*_)?(num_heads|n_heads?|num_(.*_)?attention_heads|attention_heads)|num_query_groups|linear_num_value_heads",
        HEADS,
    ),
    (r"qk_rope_head_dim|rotary_dim", ROTARY_DIM),
    (r"query_pre_attn_scalar", HEAD_DIM),
    (r"(.*_)?(head_dim|head_size|d_head|d_kv|dim_head|headdim|kv_channels)", HEAD_DIM),
    (r".*_(rank|lowrank)|d_rel", 16),
    (r"hidden_size_per_layer_input|ple_embed_dim", 8),
    (r".*vocab_size.*|.*_group_vocab", VOCABULARY),
    (r"(.*_)?(moe|experts?|shared|dense)(_.*)?_(intermediate|ffn_hidden)_size", 32),
    (r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|feed_forward_size|d_ff|dff|dim_ff|n_inner|d_inner)(_mlp)?", 96),
    (r"(.*_)?(hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|embed_dim|lru_width)(_global)?", HIDDEN),
    (r"word_embed_proj_dim|projection_dim|adapter_(in_dim|out_dim|input_size)|out_hidden_size", HIDDEN),
    (r"(.*_)?(num_(.*_)?layers|n_layers?|encoder_layers|decoder_layers|num_blocks|depth)", 2),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_target_positions", POSITIONS),
    (r"context_length|original_max_position_embeddings|rel_extent|position_bias_max_distance", POSITIONS),
    (r"sliding_window(_size)?|local_attention(_window_len)?|attention_window_size|keep_window_size", WINDOW),
    (r"(moe_)?num_(local_)?experts|n_routed_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|moe_top_k", 2),
    (r"n_group|topk_group|num_expert_group|first_k_dense_replace|num_dense_layers", 1),
    (r"(moe_)?(num|n)_shared_experts", 1),
)

_GEMMA4 = {"global_head_dim": 2 * HEAD_DIM}
_DOTS3_SLIDING = {
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": HEAD_DIM + ROTARY_DIM,
    "swa_qk_nope_head_dim": HEAD_DIM,
    "swa_v_head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD_DIM + ROTARY_DIM,
    "sliding_window": WINDOW,
}
_QSA = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_SLIDING = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

#: What field names cannot tell, per architecture; a dot enters a nested config.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
        "num_key_value_heads": KV_HEADS,
    },
    "dbrx": {"attn_config.rope_theta": 10_000.0, "attn_config.kv_n_heads": KV_HEADS, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "dots3_note": _DOTS3_SLIDING,
    "dots3_note_text": _DOTS3_SLIDING,
    "falcon_h1": {"mamba_d_head": HEAD_DIM},
    "gemma2": {"attn_logit_softcapping": 2.0},
    "gemma3n_text": {
        "intermediate_size": 96,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "num_hidden_layers": 4,
    },
    "gemma4": {f"text_config.{k}": v for k, v in _GEMMA4.items()},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {f"text_config.{k}": v for k, v in _GEMMA4.items()},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 2},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads_per_layer": [HEADS, 2 * HEADS],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": ROTARY_DIM, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": ["sliding_attention", "full_attention"]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"head_dim": HEAD_DIM, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"sliding_window": WINDOW},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": _SLIDING,
    "qwen2_moe": _SLIDING,
    "qwen3": _SLIDING,
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": WINDOW},
    "qwen4_exp": _QSA,
    "qwen4_exp_text": _QSA,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (HIDDEN // 2, HIDDEN // 2),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "smollm3": _SLIDING,
    "starcoder2": {"sliding_window": WINDOW},
    "vaultgemma": {"attn_logit_softcapping": 2.0},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
}

_CONTRADICTION = (
    "its config must share the keys and values of all layers (validate_architecture), and its layers need one that "
    "does not (kv_sharing_modes), so transformers 5.23 itself cannot build it"
)
#: Architectures that no config builds, with the reason.
UNBUILDABLE = {"gemma4_assistant": _CONTRADICTION, "gemma4_unified_assistant": _CONTRADICTION}

_IMAGE = {"image_size": 16, "patch_size": 4}
#: Classes that are no causal language models, with what their configs need beside the rules.
OTHERS: dict[str, dict[str, Any]] = {
    "BertModel": {},
    "RobertaModel": {},
    "AlbertModel": {},
    "DistilBertModel": {"dim": HIDDEN, "hidden_dim": 96},
    "ViTModel": _IMAGE,
    "DeiTModel": _IMAGE,
    "Dinov2Model": _IMAGE,
    "Dinov2WithRegistersModel": _IMAGE,
    "CLIPModel": {f"vision_config.{k}": v for k, v in _IMAGE.items()},
    "CLIPTextModel": {},
    "CLIPVisionModel": _IMAGE,
    "SiglipModel": {f"vision_config.{k}": v for k, v in _IMAGE.items()},
    "SiglipVisionModel": _IMAGE,
    "WhisperModel": {"num_mel_bins": 8, "max_source_positions": 12},
    "T5Model": {},
    "BartModel": {},
    "MBartModel": {},
    "MarianModel": {},
}
