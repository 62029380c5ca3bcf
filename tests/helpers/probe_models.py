"""Every family that is said to work: what we read off a padded batch against transformers' own forward pass of each
sample alone; and the probe at load, which must notice a model that is read wrongly.

Legend: B rows, S positions, T response tokens, V vocabulary.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from vlsi_cache.data.collate import collate
from vlsi_cache.data.sequence import Encoded
from vlsi_cache.models.backbone import Backbone, head_of
from vlsi_cache.models.probe import Probe, with_branch

VOCAB_SIZE, NUM_LAYERS = 300, 3
PLAIN = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
GROUPED = {**PLAIN, "num_key_value_heads": 1}
WIDE = {**GROUPED, "head_dim": 8}
MAMBA = {"mamba_chunk_size": 8, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
DELTA |= {"layer_types": ["linear_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
GPT2 = {"n_embd": 16, "n_layer": NUM_LAYERS, "n_head": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {**GROUPED, **MAMBA, "attn_layer_indices": [1]},
    "bloom": {"hidden_size": 16, "n_layer": NUM_LAYERS, "n_head": 2},
    "codegen": {**GPT2, "n_head": 4, "rotary_dim": 4},
    "cohere": {**GROUPED, "logit_scale": 0.3},
    "cohere2": {**GROUPED, "logit_scale": 0.3},
    "deepseek_v3": {
        **PLAIN,
        "num_key_value_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 9,
    },
    "exaone4": GROUPED,
    "falcon": {"hidden_size": 16, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2},
    "falcon_h1": {**WIDE, **MAMBA, "mamba_d_ssm": 32, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0},
    "gemma": WIDE,
    "gemma2": {**WIDE, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": WIDE,
    "gemma4_text": {**WIDE, "vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 8},
    "glm4": {**WIDE, "pad_token_id": 0},
    "gpt2": {**GPT2, "n_positions": 512},
    "gpt_bigcode": GPT2,
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": NUM_LAYERS,
        "num_heads": 2,
        "attention_types": [[["global", "local", "global"], 1]],
    },
    "gpt_neox": PLAIN,
    "gpt_oss": {**WIDE, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gptj": {**GPT2, "rotary_dim": 4},
    "granite": {**GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "granitemoehybrid": {
        **GROUPED,
        **MAMBA,
        "logits_scaling": 3.0,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 2,
        "shared_intermediate_size": 16,
    },
    "jamba": {
        **GROUPED,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    "llama": GROUPED,
    "llama4_text": {
        **WIDE,
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 32,
        "num_local_experts": 2,
        "attention_chunk_size": 64,
    },
    "mamba": {"hidden_size": 16, "num_hidden_layers": NUM_LAYERS, "state_size": 4},
    "mamba2": {
        "hidden_size": 16,
        "num_hidden_layers": NUM_LAYERS,
        "state_size": 4,
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "ministral3": GROUPED,
    "mistral": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 2},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": NUM_LAYERS},
    "nemotron_h": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": NUM_LAYERS,
        "hybrid_override_pattern": "M*-",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "chunk_size": 8,
        "n_groups": 1,
    },
    "olmo2": GROUPED,
    "olmo3": GROUPED,
    "olmoe": {**GROUPED, "num_experts": 2, "num_experts_per_tok": 1},
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 512,
    },
    "phi": PLAIN,
    "phi3": {**GROUPED, "pad_token_id": 0},
    "phimoe": {**GROUPED, "num_local_experts": 2},
    "qwen2": GROUPED,
    "qwen2_moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": WIDE,
    "qwen3_5_text": {**WIDE, **DELTA, "num_hidden_layers": 4},
    "qwen3_moe": {**WIDE, **EXPERTS},
    "qwen3_next": {**WIDE, **DELTA, **EXPERTS, "num_hidden_layers": 4, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {**GROUPED, "lru_width": 16, "attention_window_size": 16},
    "smollm3": {**GROUPED, "pad_token_id": 0, "no_rope_layers": [1, 0, 1]},
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "xglm": {"d_model": 16, "ffn_dim": 32, "num_layers": NUM_LAYERS, "attention_heads": 2},
    "zamba2": {
        "hidden_size": 16,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "mamba_d_state": 4,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "attention_hidden_size": 32,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
    },
}
LENGTHS, NUM_RESPONSE = (11, 7), (4, 2)


def make_model(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(family, **{"vocab_size": VOCAB_SIZE, **FAMILIES.get(family, {}), **changes})
        model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # a state that lasts; one that is forgotten at once is mostly rounding
            parameter.data.fill_(-2.0)
    bias_V = getattr(model.get_output_embeddings(), "bias", None)
    if bias_V is not None:  # it starts at zero
        bias_V.data.normal_()
    return model


def make_probe(lengths: tuple[int, ...] = LENGTHS, num_response: tuple[int, ...] = NUM_RESPONSE) -> Probe:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 200, (1, length), generator=generator) for length in lengths]
    ids_BS = torch.zeros(len(ids), max(lengths), dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    for row, row_1S in enumerate(ids):
        ids_BS[row, : row_1S.shape[1]], mask_BS[row, : row_1S.shape[1]] = row_1S[0], 1
    starts = [length - num - 1 for length, num in zip(lengths, num_response, strict=True)]
    positions = [start + j for start, num in zip(starts, num_response, strict=True) for j in range(num)]
    rows_T = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor(num_response))
    shorter = ids[0][:, : lengths[0] - num_response[0] // 2]
    pairs = zip(ids, num_response, strict=True)
    encoded = [Encoded(one[0].numpy(), one.shape[1] - num, one[0, -num:].numpy()) for one, num in pairs]
    return Probe(
        together={"input_ids": ids_BS, "attention_mask": mask_BS},
        rows_T=rows_T,
        positions_T=torch.tensor(positions),
        alone=[{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids],
        shorter={"input_ids": shorter, "attention_mask": torch.ones_like(shorter)},
        num_shorter=num_response[0] - num_response[0] // 2,
        packed=collate([with_branch(encoded[0]), *encoded[1:]], pad_id=0, row_width=4096),
        branched=collate([with_branch(one) for one in encoded], pad_id=0),
    )


def own_logprobs(model: Any, probe: Probe) -> Tensor:
    """transformers' own, of each sample alone, [T, V]."""
    alone = [model(**inputs).logits[0] for inputs in probe.alone]
    pairs = zip(probe.rows_T.tolist(), probe.positions_T.tolist(), strict=True)
    return torch.stack([alone[row][position] for row, position in pairs]).log_softmax(-1)


def our_logprobs(backbone: Backbone, probe: Probe) -> Tensor:
    hidden_TD = backbone.capture(probe.together, [], probe.rows_T, probe.positions_T)[backbone.num_layers]
    out_TV = torch.empty(len(probe.rows_T), backbone.real_vocab_limit)
    return head_of(backbone).logits_into(out_TV, hidden_TD, 0).log_softmax(-1)
