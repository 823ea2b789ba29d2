"""Shapes say what published models are made of, and configurations are read as the hub writes them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fiddler.errors import ConfigError
from fiddler.lab.shape import FOLDER, Latent, ModelShape, shapes

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "tie_word_embeddings": False,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
PUBLISHED = {
    "mixtral-8x7b": MIXTRAL,
    "qwen3-30b-a3b": QWEN3,
    "deepseek-v2-lite": DEEPSEEK,
    "deepseek-v3": DEEPSEEK_V3,
    "gpt-oss-20b": GPT_OSS,
}


def written(folder: Path, **changes: Any) -> Path:
    """A copy of Mixtral's profile with keys changed, or left out where `None`."""
    values = json.loads((FOLDER / "mixtral-8x7b.json").read_text()) | changes
    path = folder / "mine.json"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return path


class TestShipped:
    def test_are_the_published_ones(self) -> None:
        assert shapes() == sorted(PUBLISHED)

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_equal_what_the_configuration_says(self, name: str) -> None:
        assert ModelShape.from_config(PUBLISHED[name], name) == ModelShape.load(name)

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_name_their_source(self, name: str) -> None:
        assert ModelShape.load(name).source.startswith("https://huggingface.co/")

    @pytest.mark.parametrize(
        ("name", "billions"),
        [
            ("mixtral-8x7b", 46.7),
            ("qwen3-30b-a3b", 30.5),
            ("deepseek-v2-lite", 15.7),
            ("deepseek-v3", 671.0),
            ("gpt-oss-20b", 20.9),
        ],
    )
    def test_have_as_many_weights_as_the_model_cards_say(self, name: str, billions: float) -> None:
        shape = ModelShape.load(name)
        weights = shape.total_experts * shape.expert_weights + shape.resident_bytes / 2
        assert weights / 1e9 == pytest.approx(billions, rel=0.003)


class TestSizes:
    def test_of_mixtral_by_hand(self) -> None:
        shape = ModelShape.load("mixtral-8x7b")
        assert shape.expert_bytes == 3 * 4096 * 14336 * 2 == 352_321_536
        assert shape.expert_flops_per_row == 2 * 3 * 4096 * 14336
        assert shape.total_experts == 256
        attention = 4096 * 4096 + 2 * 4096 * 1024 + 4096 * 4096
        assert shape.dense_bytes == 2 * (attention + 8 * 4096)
        assert shape.kv_bytes_per_token == 2 * 8 * 128 * 2
        assert shape.head_bytes == 32000 * 4096 * 2
        assert shape.resident_bytes == 32 * shape.dense_bytes + 2 * shape.head_bytes

    def test_of_latent_attention_and_shared_experts_by_hand(self) -> None:
        shape = ModelShape.load("deepseek-v2-lite")
        attention = 2048 * 16 * 192 + 2048 * (512 + 64) + 512 * 16 * (128 + 128) + 16 * 128 * 2048
        assert shape.kv_bytes_per_token == (512 + 64) * 2
        assert shape.dense_weights == attention + 64 * 2048 + 2 * 3 * 2048 * 1408
        assert shape.plain_weights == attention + 3 * 2048 * 10944

    def test_of_low_rank_queries(self) -> None:
        shape = ModelShape.load("deepseek-v2-lite")
        lower = replace(shape, latent=Latent(512, 128, 64, 128, q_rank=1000))
        assert lower.plain_weights - shape.plain_weights == 1000 * (2048 + 16 * 192) - 2048 * 16 * 192

    def test_a_tied_head_is_held_once(self) -> None:
        shape = ModelShape.load("qwen3-30b-a3b")
        assert shape.resident_bytes - replace(shape, tied=True).resident_bytes == shape.head_bytes

    def test_quantised_experts_are_smaller_and_take_the_same_operations(self) -> None:
        shape = ModelShape.load("gpt-oss-20b").stored_as("bf16")
        stored = shape.stored_as("mxfp4")
        assert shape.expert_bytes == 3 * 2880 * 2880 * 2
        assert stored == ModelShape.load("gpt-oss-20b")
        assert stored.expert_bytes == 3 * 2880 * 2880 * 17 // 32
        assert stored.expert_flops_per_row == shape.expert_flops_per_row
        assert stored.dense_bytes == shape.dense_bytes

    def test_blocks_that_a_matrix_does_not_fill_have_scales_of_their_own(self) -> None:
        shape = replace(ModelShape.load("qwen3-30b-a3b"), expert_intermediate=704, quant="fp8")
        assert shape.expert_bytes == 3 * (704 * 2048 + 6 * 16 * 4)  # 5.5 blocks of 128

    def test_an_mlp_without_gate_has_two_matrices(self) -> None:
        shape = replace(ModelShape.load("mixtral-8x7b"), gated=False)
        assert shape.expert_weights == 2 * 4096 * 14336

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"n_layers": 0}, "n_layers=0 must be a whole number of at least 1"),
            ({"vocab": 1.5}, "vocab=1.5 must be a whole number"),
            ({"n_heads": True}, "n_heads=True must be a whole number"),
            ({"n_dense_layers": -1}, "n_dense_layers=-1 must be a whole number of at least 0"),
            ({"top_k": 9}, "top_k=9 is more than n_experts=8"),
            ({"n_shared_experts": 1}, "n_shared_experts and shared_intermediate belong together"),
            ({"n_dense_layers": 1}, "dense_intermediate must be set"),
            ({"bytes_per_weight": 0.0}, "bytes_per_weight=0.0 must be above 0"),
            ({"quant": "int5"}, "quant='int5' is unknown; known: fp8, "),
            ({"quant": "q4_k", "hidden": 4100}, "quant='q4_k': rows of 4100 columns are not filled"),
        ],
        ids=str,
    )
    def test_impossible_ones_are_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            replace(ModelShape.load("mixtral-8x7b"), **changes)


class TestLoad:
    def test_takes_a_path(self, tmp_path: Path) -> None:
        shape = ModelShape.load(written(tmp_path, n_layers=2, bytes_per_weight=0.53125))
        assert (shape.name, shape.n_layers) == ("mine", 2)
        assert shape.expert_bytes == 3 * 4096 * 14336 * 17 // 32

    def test_names_what_there_is(self) -> None:
        with pytest.raises(ConfigError, match=r"no profile 'mixtral'; .*mixtral-8x7b"):
            ModelShape.load("mixtral")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"n_layer": 3}, "mine.json: unknown key n_layer"),
            ({"name": "x"}, "mine.json: unknown key name"),
            ({"hidden": None, "vocab": None}, "mine.json: missing key hidden, vocab"),
            ({"source": None}, "mine.json: missing key source"),
            ({"source": " "}, "mine.json: source: must be a text"),
            ({"vocab": "many"}, "mine.json: vocab='many' must be a whole number"),
            ({"bytes_per_weight": "two"}, "mine.json: "),
            ({"latent": {"kv_rank": 1}}, "mine.json: latent: missing key nope_dim, rope_dim, value_dim"),
            ({"latent": [1]}, "mine.json: latent: must be a JSON object"),
        ],
        ids=str,
    )
    def test_names_the_key_that_is_wrong(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            ModelShape.load(written(tmp_path, **changes))


class TestFromConfig:
    def test_reads_the_format_beside_a_text_model_or_within(self) -> None:
        about = {"quantization_config": {"quant_method": "mxfp4"}}
        outside = ModelShape.from_config({"text_config": QWEN3, **about})
        assert outside.quant == "mxfp4"
        assert ModelShape.from_config({"text_config": QWEN3 | about}) == outside

    def test_an_unknown_format_is_refused_unless_nobody_asks(self) -> None:
        config = QWEN3 | {"quantization_config": {"quant_method": "aqlm"}}
        with pytest.raises(ConfigError, match=r"does not say one of fp8.*; name the format with --quant"):
            ModelShape.from_config(config)
        assert ModelShape.from_config(config, announced=False).quant is None

    def test_names_everything_that_is_missing(self) -> None:
        config = {key: value for key, value in QWEN3.items() if key not in {"num_experts", "vocab_size"}}
        with pytest.raises(
            ConfigError, match=r"lacks num_local_experts\|num_experts\|n_routed_experts.*, vocab_size$"
        ):
            ModelShape.from_config(config)

    @pytest.mark.parametrize("value", ["48", 0, 1.5, True, [64, 64]], ids=repr)
    def test_refuses_a_size_that_is_none(self, value: Any) -> None:
        with pytest.raises(ConfigError, match=r"n_experts=.* must be a whole number"):
            ModelShape.from_config(QWEN3 | {"num_experts": value})

    def test_latent_attention_needs_all_its_widths(self) -> None:
        with pytest.raises(ConfigError, match="lacks v_head_dim"):
            ModelShape.from_config(DEEPSEEK | {"v_head_dim": None})

    def test_a_model_without_experts_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="n_layers=0"):
            ModelShape.from_config(DEEPSEEK | {"first_k_dense_replace": 27})

    @pytest.mark.parametrize(
        ("changes", "n_layers"),
        [
            ({"mlp_only_layers": [0, 5]}, 46),
            ({"decoder_sparse_step": 2}, 24),
            ({"first_k_dense_replace": 3}, 45),
            ({"moe_layer_freq": 3}, 16),
            ({"moe_layer_freq": [0] * 8 + [1] * 40}, 40),
            ({"mlp_layer_types": ["dense"] + ["sparse"] * 47}, 47),
        ],
        ids=str,
    )
    def test_counts_the_layers_with_experts(self, changes: dict[str, Any], n_layers: int) -> None:
        shape = ModelShape.from_config(QWEN3 | changes)
        assert (shape.n_layers, shape.n_dense_layers) == (n_layers, 48 - n_layers)
        assert shape.dense_intermediate == 6144

    def test_a_shared_expert_may_only_have_a_width(self) -> None:
        shape = ModelShape.from_config(QWEN3 | {"shared_expert_intermediate_size": 5632})
        assert (shape.n_shared_experts, shape.shared_intermediate) == (1, 5632)

    def test_reads_the_text_model_of_a_multimodal_one(self) -> None:
        assert ModelShape.from_config({"text_config": QWEN3}) == ModelShape.from_config(QWEN3)

    def test_is_named_by_its_type(self) -> None:
        assert ModelShape.from_config(GPT_OSS).name == "gpt_oss"
