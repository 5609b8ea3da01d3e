"""Parameters of a run on toys, for a tiny backbone."""

from typing import Any

from coop_core.params import Params, parse_params


def toy_params(architecture: str, *, seed: int = 1, **changes: dict[str, Any]) -> Params:
    """`changes` by section; a method of another name takes the place of the whole section."""
    tree: dict[str, Any] = {
        "seed": seed,
        "dataset": {"source": "toys"},
        "split": {"shots": 2},
        "backbone": {"architecture": architecture},
        "features": {"views": 1, "batch_size": 8},
        "method": {"name": "coop", "n_context": 2},
        "train": {"epochs": 4, "learning_rate": 0.02, "batch_size": 4},
        "engine": {},
        "baselines": {"ensemble_templates": ["a photo of a {}."]},
        "evaluate": {},
    }
    method = changes.pop("method", {})
    own = {} if method.get("name", "coop") != "coop" else tree["method"]
    tree["method"] = {**own, **method}
    tree = {name: {**value, **changes.get(name, {})} if isinstance(value, dict) else value
            for name, value in tree.items()}  # fmt: skip
    further = {name: value for name, value in changes.items() if name not in tree}
    return parse_params(tree | further, where="toy")
