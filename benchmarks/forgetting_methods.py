"""The methods that `forgetting.py` compares."""

# name -> settings of the trainer. "on": whose likelihood the anchor holds; on the chosen response it makes the
# known remedies: NLL on chosen (TRL's rpo_alpha: 1, mean over tokens) and DPOP (Pal et al. 2024, λ = 5). "keep": weight of
# `bapo.keep`, 4 of its prompts a step; they are not among those that are measured, but of their kind, or ("general") the
# 100 that come with the plugin. "scale": the adapter is
# measured as θ_0 + scale · Δ (WiSE-FT, Wortsman et al. 2022), as `bapo eval --scale` does
METHODS: dict[str, dict] = {
    "DPO": {"anchor_weight": 0},
    "DPO, β = 0.3": {"anchor_weight": 0, "beta": 0.3},
    "DPO × 0.5": {"anchor_weight": 0, "scale": 0.5},
    "DPO + NLL": {"anchor_loss": "nll", "anchor_weight": 1, "anchor_reduction": "mean", "on": "chosen"},
    "DPOP": {"anchor_level": "response", "anchor_weight": 5, "anchor_placement": "margin", "on": "chosen"},
    "BAPO token hinge 0.03": {"anchor_weight": 0.03},
    "BAPO token hinge 0.05": {"anchor_weight": 0.05},
    "BAPO token hinge 0.1": {"anchor_weight": 0.1},
    "BAPO token absolute 0.05": {"anchor_loss": "absolute", "anchor_weight": 0.05},
    "BAPO hinge 0.03": {"anchor_level": "response", "anchor_weight": 0.03},
    "BAPO hinge 0.1": {"anchor_level": "response", "anchor_weight": 0.1},
    "BAPO hinge 0.3": {"anchor_level": "response", "anchor_weight": 0.3},
    "BAPO absolute 0.1": {"anchor_loss": "absolute", "anchor_level": "response", "anchor_weight": 0.1},
    "BAPO squared 0.01": {"anchor_loss": "squared", "anchor_level": "response", "anchor_weight": 0.01},
    "BAPO nll 0.1": {"anchor_loss": "nll", "anchor_weight": 0.1},
    "BAPO kl 0.1": {"anchor_loss": "kl", "anchor_weight": 0.1},
    "BAPO kl 0.3": {"anchor_loss": "kl", "anchor_weight": 0.3},
    "BAPO auto 0.05": {"anchor_weight": "auto", "drift_limit": 0.05},
    "BAPO auto 0.02": {"anchor_weight": "auto", "drift_limit": 0.02},
    "BAPO hinge 0.03 + keep 0.1": {"anchor_level": "response", "anchor_weight": 0.03, "keep": 0.1},
    "BAPO token hinge 0.03 + keep 0.1": {"anchor_weight": 0.03, "keep": 0.1},
    "BAPO token hinge 0.03 + general 0.1": {"anchor_weight": 0.03, "keep": 0.1, "kept": "general"},
    "BAPO token hinge 0.05 + general 0.1": {"anchor_weight": 0.05, "keep": 0.1, "kept": "general"},
    "BAPO kl 0.1 + keep 0.1": {"anchor_loss": "kl", "anchor_weight": 0.1, "keep": 0.1},
}  # fmt: skip
DEFAULT = "BAPO token hinge 0.05"
