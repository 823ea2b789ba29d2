"""Architectures whose sequences may share one packed forward, with prompts cut into chunks.

The exactness suite proves every entry: packed steps, ragged and chunked, with sequences joining and leaving, equal
separate unsplit forwards. An architecture that is not listed runs one forward per sequence, whole prompts at once,
with transformers' own cache, and meets the others at the experts. So does a listed one whose configuration asks
for what packed steps do not know, or makes that cache lose what the masks show (`why_apart` in dry.py).
"""

PACKED: frozenset[str] = frozenset(
    {
        "afmoe",
        "aria_text",
        "axk1",
        "beam",
        "cohere2_moe",
        "deepseek_ocr2_text",
        "deepseek_v2",
        "deepseek_v3",
        "dots1",
        "ernie4_5_moe",
        "ernie4_5_vl_moe_text",
        "exaone_moe",
        "flex_olmo",
        "flint",
        "gemma4_text",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe_text",
        "gpt_oss",
        "granitemoe",
        "granitemoe_swa",
        "granitemoeshared",
        "hunyuan_v1_moe",
        "hy_v3",
        "kolibri1",
        "laguna",
        "mellum",
        "mimo_v2_flash",
        "minimax_m2",
        "mistral4",
        "mixtral",
        "muse_spark_text",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_omni_moe_text",
        "qwen3_vl_moe_text",
        "solar_open",
    }
)
"""By the model type of the text configuration."""
