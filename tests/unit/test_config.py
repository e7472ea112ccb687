"""The `bapo:` block and contradictions with the rest of the YAML."""

import pytest

from bapo_plugin.checks import check_config
from bapo_plugin.config import DRIFT_LIMIT, BAPOConfig, parse_block

GOOD = {
    "rl": "bapo",
    "adapter": "qlora",
    "load_in_4bit": True,
    "datasets": [{"path": "rows.jsonl"}],
}


def test_defaults():
    config = check_config(GOOD)
    assert (config.anchor_weight, config.anchor_loss, config.anchor_level) == (
        0.05,
        "hinge",
        "token",
    )
    assert config.holds_tokens
    for other in ({"anchor_level": "response"}, {"anchor_loss": "kl"}):
        assert parse_block(other).anchor_weight == 0.1 and not parse_block(other).holds_tokens
    assert parse_block({"anchor_level": "response", "anchor_weight": 0.05}).anchor_weight == 0.05
    budget = parse_block({"anchor_weight": "auto"})
    assert (budget.drift_limit, budget.anchor_loss) == (DRIFT_LIMIT, "kl")
    assert parse_block({"anchor_weight": "auto", "anchor_loss": "hinge"}).anchor_loss == "hinge"
    assert parse_block(budget.model_dump(exclude_none=True)) == budget
    assert (config.anchor_reduction, config.anchor_placement) == ("sum", "additive")


def test_every_field_is_described():
    for name, field in BAPOConfig.model_json_schema()["properties"].items():
        assert len(field["description"]) > 20, name


@pytest.mark.parametrize(
    ("block", "match"),
    [
        ({"anchor_wieght": 1}, r"bapo\.anchor_wieght: unknown key; did you mean anchor_weight"),
        ({"zzz": 1}, r"bapo\.zzz: unknown key; known keys are anchor_weight, anchor_loss"),
        (
            {"anchor_weight": -0.5},
            r"bapo\.anchor_weight: .*greater than or equal to 0, or auto, got -0.5",
        ),
        ({"anchor_weight": float("nan")}, r"bapo\.anchor_weight: .*finite"),
        ({"drift_limit": 0.1}, r"bapo: drift_limit: 0.1 has no effect.*anchor_weight: auto"),
        ({"anchor_weight": "auto", "drift_limit": 0}, r"bapo\.drift_limit: .*greater than 0"),
        ({"anchor_weight": "auto", "anchor_loss": "nll"}, r"bapo: .*doesn't measure"),
        (
            {"keep": {"prompts": "a.csv"}},
            r"bapo\.keep\.prompts: must be general, or the name.*, got 'a.csv'",
        ),
        (
            {"keep": {"prompts": "unrelated"}},
            r"bapo\.keep\.prompts: those are .* measured on; take general",
        ),
        (
            {"retention": {"prompts": "general"}},
            r"bapo\.retention\.prompts: must be .*, unrelated, or the name",
        ),
        ({"keep": "a.txt"}, r"bapo\.keep: must be a block of settings, such as\n  keep: {prompts"),
        ({"keep": {"prompts": "a.txt", "wieght": 1}}, r"bapo\.keep\.wieght: .*did you mean weight"),
        ({"anchor_weight": "much"}, r"bapo\.anchor_weight: .*got 'much'"),
        (
            {"anchor_loss": "huber"},
            r"bapo\.anchor_loss: .*'hinge', 'absolute', 'squared', 'nll' or 'kl'",
        ),
        ({"anchor_loss": "nll", "anchor_placement": "margin"}, "set anchor_placement: additive"),
        ("strong", r"bapo: must be a block of settings, got 'strong'"),
        ([1], r"bapo: must be a block"),
    ],
)
def test_block_errors_name_key_value_and_remedy(block, match):
    with pytest.raises(ValueError, match=match):
        parse_block(block)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (
            {"dpo_loss_type": ["nca_pair"]},
            r"dpo_loss_type: 'nca_pair' .*possible are sigmoid, sigmoid_norm, hinge",
        ),
        ({"dpo_label_smoothing": 0.6}, r"dpo_label_smoothing: 0.6 must be a number in \[0, 0.5\)"),
        (
            {"dpo_label_smoothing": 0.1, "dpo_loss_type": ["ipo"]},
            "no meaning for dpo_loss_type 'ipo'",
        ),
        ({"dpo_loss_type": "exo_pair"}, "needs `dpo_label_smoothing"),
        ({"rl_beta": 0}, "rl_beta: 0 must be a number above 0"),
        ({"trl": {"beta": -1}}, "trl.beta: -1 must be a number above 0"),
        (
            {"rl_beta": 0.1, "trl": {"beta": 0.2}},
            "rl_beta: 0.1 and trl.beta: 0.2 contradict each other",
        ),
        ({"dpo_use_weighting": True}, "dpo_use_weighting: True .*remove the line"),
        ({"dpo_use_liger_kernel": True}, "dpo_use_liger_kernel"),
        ({"dpo_padding_free": True}, "dpo_padding_free"),
        ({"sample_packing": True}, "sample_packing"),
        ({"streaming": True}, "streaming"),
        ({"torch_compile": True}, "torch_compile"),
        ({"context_parallel_size": 2}, "context_parallel_size: 2 would split"),
        ({"context_parallel_size": "2"}, "context_parallel_size: '2' would split"),
        ({"context_parallel_size": "x"}, "context_parallel_size: 'x' must be a number"),
        ({"trl": "x"}, "trl: 'x' must be a block"),
        ({"peft": "x"}, "peft: 'x' must be a block"),
        ({"accelerator_config": "x"}, "accelerator_config: 'x' must be a block"),
        ({"dpo_loss_type": 5}, "dpo_loss_type: 5 must be a name or a list"),
        ({"dpo_loss_type": [["hinge"]]}, "dpo_loss_type: .* must be a name or a list"),
        ({"dpo_loss_weights": 5}, "dpo_loss_weights: 5 must have one number"),
        ({"peft_init_lora_weights": [1]}, "peft_init_lora_weights"),
        ({"precompute_ref_log_probs": "x"}, "precompute_ref_log_probs: 'x' must be true or false"),
        ({"push_dataset_to_hub": "me/rows"}, "push_dataset_to_hub: me/rows does not work"),
        ({"bapo": {"anchor_weight": True}}, "anchor_weight: must be a number; YAML reads yes"),
        ({"bapo": {"anchors": {"max_new_tokens": True}}}, "max_new_tokens: must be a number"),
        (
            {"bapo": {"retention": {"prompts": "5"}}},
            "retention.prompts: must be a number .*without quotes",
        ),
        ({"datasets": "rows.jsonl"}, "datasets: 'rows.jsonl' must be a list"),
        ({"datasets": [{"path": 5}]}, r"datasets\[0\]: .* must be a block with at least `path:`"),
        (
            {"datasets": [{"path": "a", "feild_base": "x"}]},
            r"datasets\[0\].feild_base: unknown key; did you mean field_base",
        ),
        (
            {"datasets": [{"path": "a", "field_base": True}]},
            "field_base: True must be the name of a column, or false",
        ),
        ({"datasets": [{"path": "a", "roles": ["x"]}]}, "roles: .* must be a block"),
        (
            {"datasets": [{"path": "a", "type": {"field_chosne": "x"}}]},
            "type.field_chosne: unknown key; did you mean field_chosen",
        ),
        ({"trl": {"sync_ref_model": True}}, "moves the reference"),
        (
            {"trl": {"sync_ref_model": True}, "precompute_ref_log_probs": True},
            "contradict each other.*remove one of the two lines",
        ),
        ({"adapter": None}, "load_in_4bit: true without an adapter.*set `adapter: qlora`"),
        ({"datasets": []}, "datasets: is empty"),
        (
            {"datasets": ["rows.jsonl"]},
            r"datasets\[0\]: 'rows.jsonl' must be a block with at least `path:`",
        ),
        (
            {"rl_adapter_ref_model": True},
            "rl_adapter_ref_model.*adapter switched off is the reference",
        ),
        (
            {"peft_init_lora_weights": "pissa"},
            "peft_init_lora_weights: pissa changes the weights below",
        ),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, "loftq_config changes the weights below"),
        ({"trainer_cls": "my.Trainer"}, "trainer_cls: my.Trainer can't be combined"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches: true would cut"),
        (
            {"adapter": None, "load_in_4bit": False, "bapo": {"anchor_weight": "auto"}},
            "bapo.anchor_weight: auto takes bapo.anchor_loss: kl, .*needs an adapter; set `adapter:`",
        ),
        (
            {"adapter": None, "load_in_4bit": False, "bapo": {"anchor_loss": "kl"}},
            "bapo.anchor_loss: kl compares .*needs an adapter",
        ),
        (
            {"adapter": None, "load_in_4bit": False, "bapo": {"keep": {"prompts": "a.txt"}}},
            "bapo.keep compares .*needs an adapter",
        ),
        (
            {"bapo": {"anchor_weight": "auto"}, "dpo_loss_type": ["ipo"]},
            "bapo.anchor_weight: auto doesn't work with dpo_loss_type: ipo",
        ),
        ({"adapter": "llama-adapter"}, "llama-adapter can't be switched off"),
        (
            {"dpo_loss_type": ["sigmoid", "hinge"], "dpo_loss_weights": [1]},
            "must have one number for each of the 2 losses",
        ),
        ({"rl_beta": True}, "rl_beta: True must be a number"),
        # keys that YAML reads as something else than text
        ({"bapo": {1: 2}}, "bapo.1: unknown key; known keys are anchor_weight"),
        ({"bapo": {"keep": {"prompts": "a.txt", True: 1}}}, "bapo.keep.True: unknown key; known"),
        ({"bapo": {"anchors": {"server": {None: 1}}}}, "bapo.anchors.server.None: unknown key"),
        ({"val_set_size": float("nan")}, "val_set_size: nan must be a share"),
        ({"val_set_size": float("inf")}, "val_set_size: inf must be a share"),
        ({"seed": -1}, "seed: -1 must be a whole number from 0 to"),
        ({"num_epochs": float("-inf")}, "num_epochs: -inf must be a number above 0"),
        ({"dataset_prepared_path": "a\0"}, "dataset_prepared_path: .* can't be the name"),
        ({"output_dir": "a" * 300}, "output_dir: 'aaa.* can't be the name of a folder"),
        ({"datasets": [{"path": "a" * 300}]}, r"datasets\[0\].path: .* can't be the name"),
        ({"bapo": {"anchors": {"store": "a" * 300}}}, "bapo.anchors.store: 'aaa.* too long"),
        ({"bapo": {"special_tokens_in_words": "drop"}}, "special_tokens_in_words: Input should be"),
    ],
)
def test_contradictions(extra, match):
    with pytest.raises(ValueError, match=match):
        check_config(GOOD | extra)


def test_all_problems_in_one_message():
    with pytest.raises(ValueError) as error:
        check_config(GOOD | {"rl_beta": -1, "sample_packing": True, "bapo": {"anchor_weight": -1}})
    for part in ("rl_beta: -1", "sample_packing: True", "bapo.anchor_weight"):
        assert part in str(error.value)


def test_harmless_settings_pass():
    entry = {
        "path": "a",
        "chat_template": "jinja",
        "chat_template_jinja": "x",
        "shards": 2,
        "name": "n",
    }
    entry |= {
        "roles": {"user": ["me"]},
        "message_property_mappings": {"role": "from"},
        "ds_type": "json",
    }
    check_config(GOOD | {"datasets": [entry | {"field_base": False}]})
    # YAML reads numbers without a dot in the mantissa as strings, and axolotl takes them
    check_config(
        GOOD | {"rl_beta": "5e-2", "dpo_label_smoothing": "1e-3", "peft_init_lora_weights": True}
    )
    check_config(
        GOOD | {"sample_packing": False, "rl_beta": 0.3, "dpo_loss_type": ["sigmoid", "hinge"]}
    )
    check_config(
        GOOD | {"dpo_label_smoothing": 0.1, "dpo_loss_type": ["robust"], "trl": {"beta": 0.2}}
    )
