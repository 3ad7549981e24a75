"""Sizes of the smallest multimodal models, where shrinking by name doesn't do; ``smallest`` has the rest."""

from __future__ import annotations

from typing import Any

VOCABULARY = 256


def sections(*sizes: int, **others: Any) -> dict[str, Any]:
    """Rotary settings whose sections for time, height and width are as narrow as the heads."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sizes), **others}}


LATENT = {"head_dim": 8}
TOWER = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "out_hidden_size": 64}
SMALL_IMAGE = {"image_size": 32, "patch_size": 8}
# Names of tokens by their ids, of which the class computes with those of pictures.
PICTURE_TOKENS = {"<image>": 5, **{f"IMGIMG{letter}Z": 6 + number for number, letter in enumerate("ABCDEFGH")}}

OVERRIDES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": PICTURE_TOKENS},
    "cohere_compass": {"text_config": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
    }}},
    "cosmos3_edge": {"text_config": sections(2, 3, 3)},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2,
                                      "moe_intermediate_size": 64},
                      "vision_config": {"sam_config": {"image_size": 64, "output_channels": 32, "mlp_dim": 128,
                                                       "downsample_channels": [48, 64], "global_attn_indexes": [1]}}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "emu3": {"vocabulary_map": PICTURE_TOKENS, "vq_config": {"base_channels": 32, "codebook_size": 64}},
    "ernie4_5_vl_moe": {"text_config": {**sections(3, 3, 2), "moe_intermediate_size": [64, 32]},
                        "vision_config": {**TOWER, "intermediate_size": 128}},
    "fast_vlm": {"vision_config": {"architecture": "fastvit_mci3", "hidden_size": 512, "model_args": {
        "inference_mode": True, "layers": [1, 1, 1, 1, 1], "embed_dims": [16, 32, 64, 128, 256]}}},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16, "num_attention_heads": 4}},
    "glm46v": {"text_config": sections(1, 1, 2, partial_rotary_factor=0.5), "vision_config": TOWER},
    "glm4v": {"text_config": sections(1, 1, 2, partial_rotary_factor=0.5), "vision_config": TOWER},
    "glm4v_moe": {"text_config": sections(1, 1, 2, partial_rotary_factor=0.5), "vision_config": TOWER},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_topk": 4, "index_kpool": 2, "qk_rope_head_dim": 0,
                                  "head_dim": 0},
                  "vision_config": {**TOWER, "projection_intermediate_size": 128}},
    "glm_ocr": {"text_config": sections(2, 3, 3), "vision_config": TOWER},
    "glmga": {"text_config": sections(1, 1, 2, partial_rotary_factor=0.5), "vision_config": TOWER},
    "granite4_vision": {"deepstack_layer_map": [[0, 1]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "granite_docling": {"vision_config": {"out_hidden_size": 64}},
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": {
                       "rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0,
                       "mrope_section": [2, 2, 2, 2]}},
                   "vision_config": {"text_hidden_size": 64, "out_hidden_size": 64}},
    "inkling2": {"vision_config": {"text_hidden_size": 64}, "audio_config": {"text_hidden_size": 64}},
    "janus": {"vision_config": {**SMALL_IMAGE, "projection_dim": 64},
              "vq_config": {"base_channels": 32, "num_embeddings": 64, "projection_dim": 64,
                            "image_token_embed_dim": 64, "latent_channels": 32}},
    "kimi_k25": {"text_config": LATENT},
    "kosmos-2": {"text_config": {"embed_dim": 64, "layers": 2, "attention_heads": 4, "ffn_dim": 128}},
    "kosmos-2.5": {"text_config": {"embed_dim": 64, "layers": 2, "attention_heads": 4, "ffn_dim": 128}},
    "kyutai_speech_to_text": {"codebook_vocab_size": 64, "num_codebooks": 4,
                              "codec_config": {"hidden_size": 64, "upsample_groups": 64}},
    "mistral_large4": {"text_config": {**LATENT, "num_key_value_heads": 4}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "muse_spark": {"audio_config": {"out_hidden_size": 64, "hidden_sizes": [32, 64], "depths": [1, 1],
                                    "patch_sizes": [16, 6], "num_hidden_layers": 2},
                   "out_hidden_size": 64, "projector_hidden_size": 64, "text_config": {"moe_hidden_size": 64}},
    "nemo_speechlm": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 64}}}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": sections(2, 3, 3)},
    "perception_lm": {"vision_config": {"architecture": "vit_pe_lang_large_patch14_448", "model_args": {
        "embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": [28, 28], "ref_feat_shape": [2, 2],
        "global_pool": "", "init_values": 0.1, "use_post_transformer_norm": False}}},
    "qwen2_5_omni_thinker": {"text_config": sections(2, 3, 3), "vision_config": TOWER},
    "qwen2_5_vl": {"text_config": sections(2, 3, 3), "vision_config": TOWER},
    "qwen3_omni_moe": {"thinker_config": {"vision_start_token_id": 6},
                       "code2wav_config": {"decoder_dim": 64, "codebook_size": 64},
                       "talker_config": {"spatial_merge_size": 2,
                                         "text_config": {"shared_expert_intermediate_size": 64}}},
    "qwen2_vl": {"text_config": sections(2, 3, 3), "vision_config": {**TOWER, "mlp_ratio": 2}},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "vibevoice_asr": {name: {"num_filters": 4, "depths": [1, 1, 1], "downsampling_ratios": [2, 2]} for name in (
        "acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config")},
}  # fmt: skip
