"""The files to which the long tests write their figures."""

import json
import pathlib
import platform
from typing import Any

import jax

from alexnet_jax.runs.folder import versions

FOLDER = pathlib.Path(__file__).parents[2] / "results"


def write(name: str, command: str, figures: dict[str, Any]) -> None:
    """Writes `results/stress-NAME.json`: the figures, what made them and on what.

    Args:
      name: of the test.
      command: what to type at the repository's root to get these figures again.
      figures: JSON-ready.
    """
    machine = {"device": jax.devices()[0].device_kind, "system": f"{platform.system()} {platform.machine()}"}
    text = json.dumps({"command": command, "figures": figures, **machine, "versions": versions()}, indent=2)
    (FOLDER / f"stress-{name}.json").write_text(text + "\n")
    print(json.dumps(figures, indent=2))
